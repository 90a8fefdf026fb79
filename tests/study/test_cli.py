"""The command line: its verbs, and one line on standard error for everything a user can get wrong."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import optuna
import pandas as pd
import pytest
from optuna.distributions import FloatDistribution
from safetensors.torch import save_file
from science_files import problem, write_scienceqa

from eas_search import cli, run
from eas_search.export import ExportJob, export_student, write_manifest
from eas_search.models.loading import load_model
from eas_search.models.options import LoadOptions
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips
from eas_search.study.closing import show_result
from eas_search.study.endings import SureInterrupt
from eas_search.study.outputs import read_json
from eas_search.tasks import get_task

Said = SimpleNamespace  # code, out, err


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """A function that types a command: `call("run", "--budget", 3)`; "run" is `python -m eas_search.run`."""

    def typed(verb: str, *args: object) -> Said:
        words = [str(arg) for arg in args]
        main, argv = (run.main, ["run.py", *words]) if verb == "run" else (cli.main, ["eas-search", verb, *words])
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(run.console, "width", 200)
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=end.value.code, out=out, err=err)

    return typed


Call = Callable[..., Said]

WRONG_FLAGS = [
    (["--model", "no/such/folder/x"], ["no/such/folder/x", "existing model folder"]),
    (["--model", "/nowhere"], ["/nowhere", "existing model folder"]),
    (["--task", "digit-vqa"], ["digit-vqa", "did you mean 'digits-vqa'?"]),
    (["--task", "soccer"], ["soccer", "expected one of ", "causal-lm, digits-vqa"]),
    (["--data", "somewhere"], ["somewhere", "leave out --data"]),
    (["--budget", "0"], ["--budget is 0", "1 or more"]),
    (["--budget", "-3"], ["-3", "1 or more"]),
    (["--budget", "abc"], ["--budget abc", "integer", "--help"]),
    (["--seed", "-1"], ["seed", "-1", "greater than or equal to 0"]),
    (["--seed", str(2**32)], ["seed", "4294967296", "less than 4294967296"]),
    (["--seed", str(2**64)], ["seed", "18446744073709551616", "less than 4294967296"]),
    (["--jobs", "0"], ["jobs", "0", "greater than or equal to 1"]),
    (["--sampler", "cma-es"], ["cma-es", "'eas'"]),
    (["--objectives", "latency"], ["objectives = ['latency']", "accuracy first", "kv_bytes"]),
    (["--objectives", "accuracy"], ["objectives = ['accuracy']", "at least one of latency"]),
    (["--objectives", "accuracy,speed"], ["'speed'", "'latency'", "'flops'"]),
    (["--objectives", "accuracy,flops,flops"], ["'flops', 'flops'", "each once"]),
    (["--latency", "guessed"], ["'guessed'", "'predicted' or 'measured'"]),
    (["--towers", "text,smell"], ["towers", "'smell'", "'vision'"]),
    (["--towers", "audio"], ["audio", "['text', 'vision']", "choose one of these"]),
    (["--fine-tune-steps", "-1"], ["--fine-tune-steps is -1", "0 (no training)"]),
    (["--dtype", "int4"], ["int4", "'float32'"]),
    (["--prefer", "nonsense"], ["nonsense", "accuracy=0.99"]),
    (["--prefer", "accuracy=2"], ["accuracy=2", "between 0 and 1"]),
    (["--prefer", "accuracy=nan"], ["accuracy=nan", "between 0 and 1"]),
    (["--time-limit", "0"], ["time_limit", "greater than 0"]),
    (["--device", "abacus"], ["abacus", "'cpu'"]),
    (["--device", "cuda:77"], ["cuda:77", "'cpu'"]),
    (["--device", "meta"], ["meta", "'cpu'"]),
    (["--storage", "nonsense"], ["nonsense", "storage URL"]),
    (["--config", "none.yaml"], ["none.yaml", "check the path"]),
    (["--output", "a-file/run"], ["a-file/run", "choose another --output"]),
    (["--no-such-flag"], ["--no-such-flag"]),
    (["--budget"], ["--budget"]),
]
WRONG_FILES = [
    ("budget: [1", ["study.yaml", "line 1", "budget: 50"]),
    ("- budget\n- 3\n", ["study.yaml", "list", "name: value"]),
    ("just words", ["study.yaml", "str", "name: value"]),
    ("bugdet: 3", ["bugdet", "did you mean 'budget'?"]),
    ("trial: {step: 3}", ["trial.step", "did you mean 'steps'?"]),
    ("colour: red", ["colour", "expected one of", "model"]),
    ("1: 2", ["1 is not a setting"]),
    ("self: 5", ["self is not a setting"]),
    ("student: {self: 5}", ["student", "self = 5"]),
    ("trial_latency: {self: 5}", ["trial_latency", "self = 5"]),
    ("budget: many", ["budget", "many", "integer"]),
    ("space: {towers: [smell]}", ["towers", "smell", "'text'"]),
    ("space: {pia_dims: [3]}", ["pia_dims holds 3", "multiples of student.groups = 2"]),
    ("space: {placements: []}", ["placements", "at least one"]),
    ("student: {skip: [1]}", ["student.skip must stay empty"]),
    ("student: {pooling: max}", ["pooling", "max", "'prompt'"]),
    ("student: {pooling: all}", ["pooling", "'prompt'"]),
    ("trial_latency: {rounds: 1}", ["rounds", "1", "greater than or equal to 3"]),
    ("data: !!python/object/apply:os.system ['touch hacked']", ["study.yaml", "line 1"]),
    ("model: [1]", ["model", "string"]),
    ("task_options: {colour: red}", ["option 'colour' of task 'digits-vqa'", "leave it out"]),
    ("task: vqa", ["task 'vqa' needs data", "LLaVA's format", "--data"]),
    ("{task: vqa, data: ., task_options: {turn: all}}", ["option 'turn'", "did you mean 'turns'?"]),
    ("{task: scienceqa, data: .}", ["'problems.json' cannot be read in '.'", "github.com/lupantech/ScienceQA"]),
]


def assert_refused(said: Said, named: list[str]) -> None:
    assert said.code == 2, said.err
    assert len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith("eas-search: ")
    for words in named:
        assert words in said.err


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a file in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("x", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("flags", "named"), WRONG_FLAGS, ids=[" ".join(flags) for flags, _ in WRONG_FLAGS])
def test_a_wrong_flag_is_one_line_with_value_and_cure(
    call: Call, place: Path, tiny_model: Path, flags: list[str], named: list[str]
) -> None:
    model = [] if "--model" in flags else ["--model", tiny_model]
    assert_refused(call("run", *model, *flags), named)


@pytest.mark.parametrize(("content", "named"), WRONG_FILES, ids=[content.strip() for content, _ in WRONG_FILES])
def test_a_wrong_study_file_is_one_line_with_value_and_cure(
    call: Call, place: Path, tiny_model: Path, content: str, named: list[str]
) -> None:
    (place / "study.yaml").write_text(content, encoding="utf-8")
    model = [] if content.startswith("model") else ["--model", tiny_model]
    assert_refused(call("run", "--config", "study.yaml", *model), named)
    assert not (place / "hacked").exists()


def test_flags_win_over_the_study_file(call: Call, place: Path) -> None:
    (place / "study.yaml").write_text("budget: 3\nseed: 5\n", encoding="utf-8")
    assert_refused(call("run", "--config", "study.yaml", "--budget", 0), ["--budget is 0"])
    assert_refused(call("run", "--config", "study.yaml", "--task", "x"), ["task 'x'"])


def test_a_name_never_becomes_a_path(place: Path) -> None:
    for name in ("../../up", "a/b", "  ", "..", "/etc", "x\ny"):
        settings, found = run._settle({}, None, None, name, None)
        assert settings.model == "demo"
        assert found.study_name == name
        assert found.output.parent == Path("runs")
        assert found.output.name not in ("", ".", "..")


def test_names_that_look_the_same_without_their_odd_characters_get_folders_of_their_own(place: Path) -> None:
    names = ("実験一", "実験二", "a/b", "a b", "a-b", "", " ")
    folders = [run._settle({}, None, None, name, None)[1].output for name in names if name]
    assert len(set(folders)) == len(folders)
    assert folders[4] == Path("runs/a-b")  # a harmless name is the folder's
    assert run.folder_name("a b") == run.folder_name("a b")


def test_an_output_folder_may_have_any_name(call: Call, study_file: Path, place: Path) -> None:
    """Neither markup of the terminal nor parts of a URL."""
    folder = Path("[lr=1]") / "#2?mode=x%41"
    command = ("run", "--config", study_file, "--output", folder)
    for budget in (2, 3):
        said = call(*command, "--budget", budget)
        assert said.code == 0, said.err
        assert f"Open {folder / 'pareto.html'} in a browser" in said.out
    assert f"Wrote {folder / 'pareto.html'}" in call("report", folder).out
    assert f"Exported and verified: {folder / 'again'}" in call("export", folder, "--output", folder / "again").out
    assert f"{folder / 'again'} is what was trained" in call("verify", folder / "again").out
    assert (folder / "study.db").is_file()
    assert {path.name for path in place.iterdir()} == {"a-file", "[lr=1]"}


@pytest.mark.parametrize("verb", ["run", "report", "export"])
def test_a_damaged_storage_is_one_line_and_stays_as_it_is(
    call: Call, finished_copy: Path, study_file: Path, verb: str
) -> None:
    database = finished_copy / "study.db"
    database.write_bytes(database.read_bytes()[:9000])
    before = database.read_bytes()
    args = ("--config", study_file, "--output", finished_copy) if verb == "run" else (finished_copy,)
    assert_refused(call(verb, *args), ["study.db", "restore a copy"])
    assert database.read_bytes() == before


def test_resuming_with_other_settings_names_the_difference(call: Call, finished_copy: Path, study_file: Path) -> None:
    name = ("--study-name", "tiny")
    said = call("run", "--config", study_file, "--output", finished_copy, "--seed", 7, *name)
    assert_refused(said, ["seed: 0 then, 7 now", "--output"])


def test_a_study_of_another_program_is_refused_and_stays_as_it_is(
    call: Call, finished_copy: Path, study_file: Path, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'foreign.db'}"
    study = optuna.create_study(storage=url, study_name="mine", directions=["maximize", "minimize"])
    space = {"x": FloatDistribution(0, 1)}
    study.add_trial(optuna.create_trial(params={"x": 0.5}, distributions=space, values=[1.0, 2.0]))
    command = ("--config", study_file, "--output", tmp_path / "run", "--study-name", "mine", "--storage", url)
    assert_refused(call("run", *command), ["'mine'", "not of eas_search", "choose another --study-name"])
    for verb in ("report", "export"):
        assert_refused(call(verb, finished_copy, "--storage", url), ["'mine'", "not one of eas_search", "--storage"])
    again = optuna.load_study(study_name="mine", storage=url)
    assert (again.user_attrs, len(again.trials)) == ({}, 1)


@pytest.mark.parametrize("verb", ["report", "export", "verify", "evaluate"])
def test_a_folder_that_is_none_is_one_line_with_the_cure(call: Call, place: Path, verb: str) -> None:
    (place / "empty").mkdir()
    assert_refused(call(verb, "empty"), ["empty", "expected"])
    assert_refused(call(verb, "missing"), ["missing", "expected"])
    assert_refused(call(verb), ["Missing argument"])


def test_a_trial_that_does_not_exist_is_one_line(call: Call, finished: SimpleNamespace) -> None:
    assert_refused(call("export", finished.folder, "--trial", 99), ["trial 99", "0 to 4", "trials.csv"])


def test_an_export_made_by_hand_cannot_be_evaluated_without_a_task(
    call: Call, tiny_model: Path, tmp_path: Path
) -> None:
    model, processor = load_model(str(tiny_model), LoadOptions(device="cpu"))
    task = get_task("digits-vqa")
    prompts = task.encode(processor, task.examples("validation", 4)).prompts(4)
    student = apply_skips(model, SkipConfig(skip=(1,), pia_dim=4)).eval()
    about = {"base_model": str(tiny_model)}
    export_student(ExportJob(student, prompts, about=about, base=model), tmp_path / "export", "adapter")
    assert_refused(call("evaluate", tmp_path / "export"), ["does not say its task", "eas-search export"])


def test_a_latency_that_was_not_claimed_is_measured_all_the_same(call: Call, finished_copy: Path) -> None:
    folder = finished_copy / "export"
    content = read_json(folder / "eas_config.json")
    for end in ("", "_low", "_high"):
        content["about"]["claims"][f"decode_latency{end}"] = None  # as where decoding was not timed
    (folder / "eas_config.json").write_text(json.dumps(content), encoding="utf-8")
    write_manifest(folder)
    said = call("evaluate", folder, "--limit", 8)
    assert said.code == 0, said.err
    assert "decode time, relative" in said.out


@pytest.mark.parametrize("limit", [0, -1])
def test_an_evaluation_of_no_samples_is_one_line(call: Call, finished: SimpleNamespace, limit: int) -> None:
    assert_refused(call("evaluate", finished.folder / "export", "--limit", limit), [str(limit)])


def test_predictions_are_scored_in_the_published_columns(call: Call, tmp_path: Path) -> None:
    folder = write_scienceqa(tmp_path)
    predictions = {str(i): problem(i)["answer"] for i in range(28, 37)}
    (tmp_path / "p.json").write_text(json.dumps({**predictions, "28": "nothing"}), encoding="utf-8")
    said = call("score", "--task", "scienceqa", "--data", folder, "--predictions", tmp_path / "p.json")
    assert said.code == 0, said.err
    head, figures = (line.split() for line in said.out.splitlines()[2:5:2])
    assert [word for word in head if word.isalnum() or "-" in word][-2:] == ["G7-12", "average"]
    assert "88.89" in figures  # 8 of 9
    assert_refused(call("score", "--data", folder, "--predictions", tmp_path / "none.json"), ["none.json", "expected"])
    wrong = call("score", "--task", "vqa", "--data", folder, "--predictions", tmp_path / "p.json")
    assert_refused(wrong, ["'vqa'", "'scienceqa'"])


def test_the_first_batch_is_shown_without_its_answers_being_pooled(
    call: Call, study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = call("run", "--config", study_file, "--show-batch")
    assert said.code == 0, said.err
    assert "score: exact match, head: generation, pooling: none" in said.out
    assert "pooled:" not in said.out
    pooled = tmp_path / "pooled.yaml"
    pooled.write_text(
        study_file.read_text("utf-8").replace("adapter_dim: 2", "adapter_dim: 2\n  pooling: prompt"), "utf-8"
    )
    said = call("run", "--config", pooled, "--show-batch")
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert "score: exact match, head: generation, pooling: prompt" in said.out
    rows = {name: [line for line in lines if line.startswith(name)] for name in ("prompt:", "labels:", "pooled:")}
    assert {len(found) for found in rows.values()} == {8}  # the baseline's batch
    for prompt, label, pooled in zip(*rows.values(), strict=True):
        assert label.endswith("<eos>'")
        assert pooled.partition("tokens: ")[2] == prompt.removeprefix("prompt: ")
        assert "16 × <image>" in prompt
    assert not (tmp_path / "runs").exists()


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--task", "soccer", "--debug"])
    with pytest.raises(run.EasSearchError, match="soccer"):
        run.main()


def test_sites_are_listed_without_loading_weights(call: Call, tiny_model: Path, tmp_path: Path) -> None:
    said = call("sites", "--model", tiny_model)
    assert said.code == 0
    assert "6 attention sites of LlavaForConditionalGeneration" in said.out
    assert [line.split()[0] for line in said.out.splitlines() if "self_attn" in line] == ["0–3", "4,"]
    (tmp_path / "bare").mkdir()
    shutil.copy(tiny_model / "config.json", tmp_path / "bare")
    assert call("sites", "--model", tmp_path / "bare").out == said.out
    assert_refused(call("sites", "--model", "/nowhere"), ["/nowhere"])


def test_report_writes_table_and_page_again(call: Call, finished_copy: Path) -> None:
    before = pd.read_csv(finished_copy / "trials.csv")
    for name in ("trials.csv", "pareto.html"):
        (finished_copy / name).unlink()
    said = call("report", finished_copy)
    assert said.code == 0, said.err
    pd.testing.assert_frame_equal(pd.read_csv(finished_copy / "trials.csv"), before)
    assert "plotly" in (finished_copy / "pareto.html").read_text(encoding="utf-8")


def test_another_trial_can_be_exported_verified_and_evaluated(
    call: Call, finished_copy: Path, finished: SimpleNamespace
) -> None:
    chosen = finished.result.summary["chosen"]
    number = next(trial.number for trial in finished.study.trials if trial.number != chosen)
    said = call("export", finished_copy, "--trial", number)
    assert said.code == 0, said.err
    folder = finished_copy / f"export-{number}"
    assert read_json(folder / "eas_config.json")["about"]["trial"] == number
    said = call("verify", folder)
    assert said.code == 0
    assert "is what was trained" in said.out
    said = call("evaluate", folder, "--limit", 32)
    assert said.code == 0, said.err
    accuracy = f"{read_json(folder / 'eas_config.json')['about']['claims']['accuracy']:.4f}"
    assert said.out.count(accuracy) == 2  # now and claimed: the same held-out samples


def test_the_formats_of_a_trial_are_planned_and_written(call: Call, finished_copy: Path) -> None:
    said = call("export", finished_copy, "--plan")
    assert said.code == 0, said.err
    rows = {line.split("│")[1].strip(): line for line in said.out.splitlines() if line.count("│") == 4}
    assert {name for name, line in rows.items() if "exact" in line} >= {"eas", "adapter", "torch-export"}
    assert "the skipped attentions are computed with zero weights" in rows["stock"]
    assert "LlavaForConditionalGeneration is not of this family" in rows["decilm"]
    number = read_json(finished_copy / "best.json")["number"]
    said = call("export", finished_copy, "--format", "adapter")
    assert said.code == 0, said.err
    folder = finished_copy / f"export-{number}-adapter"
    assert "eas.load_adapter(base_model" in (folder / "README.md").read_text(encoding="utf-8")
    said = call("verify", folder)
    assert said.code == 0, said.err
    assert "several rows, left padding, static cache" in said.out
    assert_refused(call("export", finished_copy, "--format", "gguf"), ["gguf", "expected one of eas, adapter"])


def test_what_cannot_be_written_is_refused_before_anything_is_trained(
    call: Call, finished_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: object, **__: object) -> None:
        raise AssertionError("training was started")

    monkeypatch.setattr("eas_search.study.afterwards.prepare_finalist", train)
    (finished_copy / "file").write_text("", encoding="utf-8")
    refused = call("export", finished_copy, "--output", finished_copy / "file" / "export")
    assert_refused(refused, ["cannot be written", "choose another folder"])
    refused = call("export", finished_copy, "--format", "decilm")
    assert_refused(refused, ["'decilm' is impossible", "not of this family", "--plan"])


def test_the_first_line_appears_before_torch_is_loaded(environment: dict[str, str]) -> None:
    heavy = "{'torch', 'transformers', 'plotly'}"
    code = f"import sys, eas_search.run, eas_search.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_search_from_the_command_line_reaches_its_budget_or_says_how_to_go_on(
    call: Call, study_file: Path, finished_copy: Path, tmp_path: Path
) -> None:
    command = ("--config", study_file, "--output", tmp_path / "new", "--budget", 3)
    cut = call("run", *command, "--time-limit", 0.001)
    assert (cut.code, cut.err) == (2, cut.err)
    assert "raise --time-limit" in cut.err
    full = call("run", *command, "--study-name", "x")
    assert full.code == 0, full.err
    assert "Pareto front" in full.out
    assert "3 trials in" in full.out
    assert full.err == ""
    more = call("run", *command[:-1], 9, "--study-name", "x", "--time-limit", 0.001)
    assert more.code == 1
    assert "Stopped at 3 of 9 trials" in more.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_ctrl_c_that_a_finaliser_swallowed_is_repeated_with_the_next_news(number: signal.Signals) -> None:
    said: list[str] = []
    before = signal.getsignal(number)
    sure = SureInterrupt(SimpleNamespace(stage=said.append))  # type: ignore[arg-type]
    try:
        sure.stage("one")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            sure.stage("two")
    finally:
        sure.restore()
    assert said == ["one"]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_cannot_show_a_star_gets_the_table_without_it(
    finished: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="strict"))
    assert run.guarded(lambda: show_result(run.console, finished.result, finished.settings), debug=True) == 0
    sys.stdout.flush()
    said = written.getvalue().decode(encoding)
    assert "5 trials in" in said
    assert "? is exported" in said


@pytest.fixture
def coded(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model with a class of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(tiny_model, tmp_path / "coded"))
    code = (
        "from transformers import LlavaForConditionalGeneration\nclass Own(LlavaForConditionalGeneration):\n    pass\n"
    )
    (folder / "own.py").write_text(code, encoding="utf-8")
    # Under the names that the parameters have in memory: what the library renames, it renames for its own classes.
    model, _ = load_model(str(tiny_model), LoadOptions(device="cpu"))
    save_file({name: value.clone() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    config = read_json(folder / "config.json")
    config |= {"architectures": ["Own"], "auto_map": {"AutoModelForImageTextToText": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_model_with_code_of_its_own_is_searched_and_handed_over_as_adapters(
    call: Call, study_file: Path, coded: Path, tmp_path: Path
) -> None:
    folder, trust = tmp_path / "run", "--trust-remote-code"
    said = call("run", "--config", study_file, "--model", coded, "--budget", 2, "--output", folder, trust)
    assert said.code == 0, said.err
    assert "Export in the format adapter: eas is impossible, Own is not a class of transformers" in said.out
    assert f"eas-search export {folder} --trial N {trust}" in said.out
    assert read_json(folder / "export" / "eas_config.json")["kind"] == "adapter"
    number = read_json(folder / "best.json")["number"]
    for words in (("export", folder), ("verify", folder / "export"), ("evaluate", folder / "export", "--limit", 8)):
        assert_refused(call(*words), [str(coded), "needs code that comes with it", trust])
        said = call(*words, trust)
        assert said.code == 0, said.err
    assert read_json(folder / f"export-{number}" / "eas_config.json")["kind"] == "adapter"
    plan = call("export", folder, "--plan", trust).out
    assert "Own is not a class of transformers" in plan
    assert_refused(call("export", folder, "--format", "eas", trust), ["'eas' is impossible", "--plan"])
