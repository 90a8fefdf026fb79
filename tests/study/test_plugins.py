"""What a user registers in a file or module of his own reaches the command line and the worker processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tiny_models import save_llama

from eas_search import cli, plugins, run, tasks
from eas_search.architectures import patterns
from eas_search.exceptions import ConfigError
from eas_search.plugins import load_plugins, plugin_name
from eas_search.settings import SearchSettings
from eas_search.study.outputs import read_json

Eas = Callable[..., SimpleNamespace]
TASK = """
from eas_search.tasks import Example, register_task
from eas_search.tasks.answers import AnswerTask
from eas_search.tasks.base import limited
from eas_search.tasks.scoring import Scoring, logits_of


@register_task
class Parity(AnswerTask):
    name = "parity"
    metric = "halves"

    def examples(self, split, limit=None):
        sizes = {"train": 64, "validation": 32, "test": 32}
        start = {"train": 0, "validation": 100, "test": 200}[split]
        numbers = range(start, start + limited(sizes, split, limit))
        return [Example(None, f"number {i % 7} ?", ("even", "odd")[i % 2], "all") for i in numbers]

    def scoring(self, tokenizer, tensors):
        def half(model, inputs, extras):  # a closure: it exists only where this file was imported
            return 0.5 + 0 * logits_of(model, inputs)[:, 0, 0]

        return Scoring(self.metric, half, answers_follow=True)
"""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing registered here stays."""
    monkeypatch.setattr(tasks, "_registered", {})
    monkeypatch.setattr(plugins, "_imported", set())


@pytest.fixture
def eas(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """A function that types `eas-search WORDS`."""

    def typed(*words: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["eas-search", *map(str, words)])
        monkeypatch.setattr(run.console, "width", 200)
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=end.value.code, out=out, err=err)

    return typed


def test_a_task_of_ones_own_is_searched_by_two_workers_exported_and_evaluated(
    eas: Eas, tiny_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_llama(tmp_path / "llama", ["number 0 1 2 3 4 5 6 ? even odd"], layers=2)
    (tmp_path / "parity.py").write_text(TASK, encoding="utf-8")
    values = {**tiny_values, "model": str(model), "task": "parity", "budget": 3, "jobs": 2}
    values["samples"] = {"train": 16, "validation": 8, "test": 8, "calibration": 8}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    mine, folder = ("--plugin", tmp_path / "parity.py"), tmp_path / "run"
    done = eas("run", "--config", tmp_path / "study.yaml", "--output", folder, *mine)
    assert done.code == 0, done.err
    summary = read_json(folder / "summary.json")
    assert (summary["plugins"], summary["task"], summary["metric"]) == (["parity.py"], "parity", "halves")
    assert (summary["completed"], summary["baseline"]["accuracy"]) == (3, 0.5)
    assert "parity.py" not in json.dumps(summary["settings"])
    found = eas("evaluate", folder / "export", *mine)
    assert found.code == 0, found.err
    assert "0.5000" in found.out
    monkeypatch.setattr(tasks, "_registered", {})
    without = eas("export", folder, "--plan")
    assert without.code == 2
    assert "task 'parity' is unknown" in without.err
    monkeypatch.setattr(plugins, "_imported", set())
    assert eas("export", folder, "--plan", *mine).code == 0


def test_a_pattern_in_a_module_reaches_the_sites_command(
    eas: Eas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "from eas_search.architectures import BlockPattern, register_pattern\n"
        "register_pattern(BlockPattern('mine-alone', 'self_attn'))\n"
    )
    (tmp_path / "own_patterns.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(patterns, "_registered", [])
    said = eas("sites", "--plugin", "own_patterns", "--json", tmp_path / "sites.json")
    assert said.code == 0, said.err
    found = read_json(tmp_path / "sites.json")["sites"]
    assert {(site["pattern"], *site["placements"]) for site in found} == {("mine-alone", "residual")}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "FileNotFoundError"),
        ("def f(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_line(
    eas: Eas, tmp_path: Path, content: str | None, named: str
) -> None:
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    for words in (("sites",), ("run",), ("evaluate", tmp_path)):
        said = eas(*words, "--plugin", path)
        assert said.code == 2
        assert len(said.err.splitlines()) == 1
        assert named in said.err
        assert "mine.py" in said.err


def test_no_file_can_name_a_plugin(tmp_path: Path) -> None:
    for key in ("plugin", "plugins", "_plugins"):
        (tmp_path / "study.yaml").write_text(f"{key}: [mine.py]", encoding="utf-8")
        with pytest.raises(ConfigError, match=key):
            SearchSettings.from_file(tmp_path / "study.yaml", {})
    settings = SearchSettings().with_plugins(["mine.py", "a.module"])
    assert settings.plugins == (str(Path("mine.py").resolve()), "a.module")
    assert settings.fingerprint() == SearchSettings().fingerprint()
    assert SearchSettings(**settings.model_dump()).plugins == ()


def test_a_plugin_is_imported_once_and_named_without_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "count.py"
    path.write_text("import sys\nsys.counted = getattr(sys, 'counted', 0) + 1\n", encoding="utf-8")
    load_plugins([str(path), str(path), "json"])
    load_plugins([str(path)])
    assert sys.counted == 1  # type: ignore[attr-defined]
    del sys.counted  # type: ignore[attr-defined]
    assert [plugin_name(str(path)), plugin_name("a.module")] == ["count.py", "a.module"]
    with pytest.raises(ConfigError, match=r"plugin 'no_such_module_of_mine' cannot be imported \(ModuleNotFoundError"):
        load_plugins(["no_such_module_of_mine"])
