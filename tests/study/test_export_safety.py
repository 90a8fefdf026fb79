"""Exports that were damaged, tampered with or made by somebody with bad intentions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import eas_search as eas
from eas_search.exceptions import ConfigError, EasSearchError, StorageError, UnsupportedModelError, VerificationError
from eas_search.export import FORMATS, write_manifest
from eas_search.models.loading import load_model
from eas_search.models.options import LoadOptions
from eas_search.skip_config import SkipConfig
from eas_search.study.card import model_card
from eas_search.study.outputs import read_json


@pytest.fixture
def export(finished: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the export of a finished search."""
    return Path(shutil.copytree(finished.folder / "export", tmp_path / "export"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**read_json(path), **values}), encoding="utf-8")


def load_as_model(folder: Path) -> object:
    """Load an export as an original model would be, as somebody might try who takes its parts for one."""
    (folder / "eas_config.json").unlink()
    (folder / "student.safetensors").rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json")["base_config"]), encoding="utf-8")
    return load_model(str(folder), LoadOptions(device="cpu"))


def change_base(folder: Path, **values: Any) -> None:
    """Change the configuration of the base model inside an export."""
    base = read_json(folder / "config.json")["base_config"]
    change(folder / "config.json", base_config={**base, **values})
    write_manifest(folder)


Load = Callable[[Path], object]
LOADERS: list[Load] = [eas.load_pretrained, load_as_model]


@pytest.mark.parametrize("position", [0.3, 0.9])
def test_a_flipped_bit_in_the_weights_is_noticed(export: Path, position: float) -> None:
    path = export / "student.safetensors"
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerificationError, match=r"student\.safetensors .* is not what was exported"):
        eas.load_pretrained(export)


@pytest.mark.parametrize("name", ["config.json", "eas_config.json", "generation_config.json", "reference.safetensors"])
def test_a_changed_or_missing_file_is_noticed(export: Path, name: str) -> None:
    with (export / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(VerificationError, match=name):
        eas.load_pretrained(export)
    (export / name).unlink()
    with pytest.raises(EasSearchError, match=name):
        eas.load_pretrained(export)


def test_the_card_may_be_edited(export: Path) -> None:
    (export / "README.md").write_text("better words", encoding="utf-8")
    eas.load_pretrained(export)


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "..", "a\\b", "sub/config.json", ""])
def test_a_manifest_cannot_lead_out_of_its_folder(export: Path, name: str) -> None:
    digests = read_json(export / "manifest.json")["sha256"]
    change(export / "manifest.json", sha256={name: "0" * 64, **digests})
    with pytest.raises(VerificationError):
        eas.load_pretrained(export)


@pytest.mark.parametrize("content", ["", "[]", "3", '{"sha256": []}', '{"sha256": {}}', "{}", '{"sha256": {"a": 1}}'])
def test_a_manifest_that_is_none_is_refused(export: Path, content: str) -> None:
    (export / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(EasSearchError) as error:
        eas.load_pretrained(export)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"format": 1}'])
def test_an_export_file_that_is_none_is_refused(export: Path, content: str) -> None:
    (export / "eas_config.json").write_text(content, encoding="utf-8")
    write_manifest(export)
    with pytest.raises(EasSearchError) as error:
        eas.load_pretrained(export)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", [4, "1", None])
def test_another_format_is_refused_with_the_cure(export: Path, version: object) -> None:
    change(export / "eas_config.json", format=version)
    with pytest.raises(StorageError, match="update eas_search"):
        eas.load_pretrained(export)


@pytest.mark.parametrize(
    "values",
    [
        {"dtype": "save"},
        {"dtype": "no_such_type"},
        {"skip_config": {"skip": ["no.such.site"]}},
        {"skip_config": {"skip": [], "pia_dim": "many"}},
        {"skip_config": {"skip": []}},  # weights of another structure
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_the_weights_is_refused(export: Path, values: dict[str, Any]) -> None:
    change(export / "eas_config.json", **values)
    write_manifest(export)
    with pytest.raises(EasSearchError) as error:
        eas.load_pretrained(export)
    assert "\n" not in str(error.value)


def test_an_export_is_no_original_model(export: Path) -> None:
    with pytest.raises(ConfigError, match="is an export of eas_search"):
        load_model(str(export), LoadOptions(device="cpu"))


def test_a_model_without_all_its_weights_is_refused(export: Path) -> None:
    """`transformers` fills in what is missing at random and only warns; a merged FFN may also be wider."""
    with pytest.raises(EasSearchError, match=r"lacks \d+ of the weights|weights have other shapes"):
        load_as_model(export)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0 cut off"),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": "wide"}}'),
        ("tokenizer.json", b"{}"),
    ],
)
def test_a_damaged_model_folder_is_refused_in_one_line(
    tiny_model: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / name).write_bytes(content)
    with pytest.raises(EasSearchError) as error:
        load_model(str(folder), LoadOptions(device="cpu"))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", LOADERS, ids=["export", "model"])
@pytest.mark.parametrize("model_type", ["llava", "of-a-stranger"])
def test_code_that_comes_with_a_model_is_never_run(export: Path, load: Load, model_type: str) -> None:
    (export / "stranger.py").write_text("raise SystemExit('code of a stranger was run')\n", encoding="utf-8")
    auto_map = {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"}
    change(export / "config.json", auto_map=auto_map)
    change_base(export, auto_map=auto_map, model_type=model_type)
    if model_type == "llava" and load is eas.load_pretrained:  # its own class is used
        load(export)
        return
    with pytest.raises(EasSearchError) as error:
        load(export)
    assert "\n" not in str(error.value)
    assert "stranger was run" not in str(error.value)


@pytest.mark.parametrize("load", LOADERS, ids=["export", "model"])
@pytest.mark.parametrize("name", ["pipeline", "AutoModel", "LlavaConfig", "NoSuchModel", "__name__", 3])
def test_only_model_classes_of_transformers_are_built(export: Path, load: Load, name: object) -> None:
    change_base(export, architectures=[name])
    with pytest.raises((UnsupportedModelError, EasSearchError)) as error:
        load(export)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["`a` | <script>alert(1)</script>", "one\n# two\n", "](http://x) **b**", "``` \n---\nx: y"]
)
def test_a_hostile_name_stays_a_name_on_the_card(finished: SimpleNamespace, name: str) -> None:
    facts = read_json(finished.folder / "export" / "eas_config.json")["about"]
    plain = model_card(
        {**facts, "base_model": "plain"}, ["layers.0.self_attn"], 4, SkipConfig(skip=(0,)), FORMATS["eas"], "code"
    )
    card = model_card(
        {**facts, "base_model": name}, ["layers.0.self_attn", name], 4, SkipConfig(skip=(0,)), FORMATS["eas"], "code"
    )
    lines = card.splitlines()
    assert len(lines) == len(plain.splitlines()) + 1  # one more skipped site
    shown = "`" + " ".join(name.replace("`", "'").split()) + "`"
    assert sum(shown in line for line in lines) == 3
    assert all(line.count("`") % 2 == 0 for line in lines if line not in ("```python", "```"))
    assert card.replace(shown, "").find("<script") == -1
    assert lines.count("---") == 2


def test_the_card_says_what_was_skipped_what_it_costs_and_under_which_conditions(finished: SimpleNamespace) -> None:
    card = (finished.folder / "export" / "README.md").read_text(encoding="utf-8")
    best = read_json(finished.folder / "best.json")
    assert f"without {len(best['skip'])} of its 4 attentions" in card
    for name in best["skip_names"]:
        assert f"- `{name}`" in card
    for figure in (f"{100 * best['accuracy']:.1f} %", f"{best['latency']:.3f}", f"{best['latency_high']:.3f}"):
        assert figure in card
    assert "held-out samples: `32`" in card
    assert "eas.load_pretrained" in card
