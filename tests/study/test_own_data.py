"""Whole searches on people's own files: a decoder on texts, an image classifier on folders, a BERT on questions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import safe_open
from science_files import write_scienceqa
from tiny_models import draw_digits, save_bert, save_llama, save_vit
from tiny_vision import draw_talks, save_idefics3

import eas_search
from eas_search.exceptions import ConfigError
from eas_search.export.files import EAS_CONFIG, write_json
from eas_search.export.manifest import write_manifest
from eas_search.setting_groups import SpaceSettings
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.study.afterwards import evaluate_export
from eas_search.study.outputs import read_json
from eas_search.workbench import Workbench

Search = Callable[..., SimpleNamespace]
SHARED = Path(__file__).parents[3] / "shared" / "data" / "scienceqa"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [
        f"the {c} {a} number {n} sat on the mat" for c in ("red", "blue") for a in ("cat", "dog") for n in range(15)
    ]


@pytest.fixture(scope="session")
def llama_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "llama", texts, layers=3)


@pytest.fixture(scope="session")
def text_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "all.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture
def own(tiny_values: dict[str, Any]) -> Callable[..., SearchSettings]:
    """A function: settings of a search of three trials on one's own model and data."""
    small = {"train": 48, "validation": 16, "test": 16, "calibration": 8}
    brief = {"steps": 2, "batch_size": 8, "learning_rate": 2e-2}
    steps = {"baseline": brief, "trial": brief, "final": brief, "budget": 3, "finalists": 2}

    def settings(**given: Any) -> SearchSettings:
        return SearchSettings(**{**tiny_values, **steps, "samples": small, **given})

    return settings


def check(done: SimpleNamespace, metric: str) -> dict[str, Any]:
    """What holds for every finished search; returns its best point."""
    summary, best = (read_json(done.folder / name) for name in ("summary.json", "best.json"))
    assert done.result.reached
    assert (summary["completed"], summary["metric"]) == (3, metric)
    assert 0 <= best["accuracy_low"] <= best["accuracy"] <= best["accuracy_high"] <= 1
    assert metric in (done.folder / "export" / "README.md").read_text(encoding="utf-8")
    eas_search.verify(done.folder / "export")
    return best


def test_a_decoder_on_texts(
    search: Search, own: Callable[..., SearchSettings], llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    pooled = {"adapter_dim": 2, "pooling": "prefix"}
    settings = own(
        model=str(llama_folder), task="causal-lm", data=text_file, task_options={"block": 16}, student=pooled
    )
    done = search(settings, tmp_path)
    best = check(done, "token likelihood")
    assert best["config"]["pooling"] == "prefix"
    assert best["breakdown"]["perplexity"] > 1
    baseline = read_json(tmp_path / "summary.json")["baseline"]
    # The mean of the blocks' likelihoods is one over about the perplexity; both come from the same samples.
    assert baseline["breakdown"]["perplexity"] == pytest.approx(1 / baseline["accuracy"], rel=0.2)
    assert "set apart from its training examples were 6 for validation and 6 for test" in done.said
    figures = evaluate_export(tmp_path / "export", text_file, None)
    assert figures["held-out token likelihood"][0] == figures["held-out token likelihood"][1]
    assert figures["  perplexity"][0] == figures["  perplexity"][1]
    assert "decode time, relative" in figures


def test_an_image_classifier_with_a_new_head_on_folders(
    search: Search, own: Callable[..., SearchSettings], tmp_path: Path
) -> None:
    data, model = draw_digits(tmp_path / "digits", 100), save_vit(tmp_path / "vit", layers=3)
    settings = own(model=str(model), task="image-classification", data=data, space={"pia_dims": [2]})
    done = search(settings, tmp_path / "run")
    best = check(done, "accuracy")
    assert (best["kv_bytes"], best["decode_latency"]) == (0, None)
    assert best["config"]["adapter_towers"] == ["vision"]
    with safe_open(tmp_path / "run" / "stages" / "baseline.safetensors", "pt") as kept:
        assert any("layers.2" in name for name in kept.keys())  # noqa: SIM118  (no dictionary)
    assert all(name.startswith("vit.") for name in best["skip_names"])
    assert set(best["breakdown"]) <= set("0123456789")
    again = eas_search.load_pretrained(tmp_path / "run" / "export")
    assert again.config.id2label == {i: str(i) for i in range(10)}  # type: ignore[union-attr]


def test_a_bert_with_a_new_head_on_questions(
    search: Search, own: Callable[..., SearchSettings], tmp_path: Path
) -> None:
    folder = SHARED if SHARED.is_dir() else write_scienceqa(tmp_path, 80)
    problems = json.loads((folder / "problems.json").read_text("utf-8")).values()
    model = save_bert(tmp_path / "bert", (p["question"] + " " + " ".join(p["choices"]) for p in problems), layers=3)
    settings = own(
        model=str(model),
        task="multiple-choice",
        data=folder,
        task_options={"max_length": 32},
        space={"pia_dims": [2]},
        samples={"train": 32, "validation": 8, "test": 16, "calibration": 8},
    )
    done = search(settings, tmp_path / "run")
    best = check(done, "accuracy")
    assert (best["kv_bytes"], best["placement"]) == (0, "residual")
    assert best["breakdown"]["average"] == pytest.approx(best["accuracy"])
    assert {"average"} < set(best["breakdown"]) <= {"NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "average"}


def test_a_vision_language_model_that_cuts_pictures_on_conversations(
    search: Search, own: Callable[..., SearchSettings], tmp_path: Path
) -> None:
    data, model = draw_talks(tmp_path / "talks", 100), save_idefics3(tmp_path / "idefics3", layers=3)
    pooled = {"adapter_dim": 2, "pooling": "prompt"}
    settings = own(model=str(model), task="vqa", data=data, space={"pia_dims": [2]}, student=pooled)
    done = search(settings, tmp_path / "run")
    best = check(done, "accuracy")
    assert best["config"]["pooling"] == "prompt"
    assert all(name.startswith("model.text_model.") for name in best["skip_names"])
    export = tmp_path / "run" / "export"
    figures = evaluate_export(export, data, None)
    assert figures["held-out accuracy"][0] == figures["held-out accuracy"][1]
    assert "  samples as taken by" not in figures
    content = read_json(export / EAS_CONFIG)
    write_json(export / EAS_CONFIG, {**content, "about": {**content["about"], "protocol": 2}})
    write_manifest(export)
    assert evaluate_export(export, data, 8)["  samples as taken by"] == ("this version", "another version")


def test_what_the_user_leaves_open_fits_task_and_model(
    own: Callable[..., SearchSettings], llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    lm = {"model": str(llama_folder), "task": "causal-lm", "data": text_file}
    usual = Workbench.open(own(**lm)).space
    assert (usual.student.pooling, usual.choices.towers) == ("none", ("text",))
    assert usual.choices.placements == ("parallel", "ffn")
    asked = Workbench.open(
        own(**lm, student={"pooling": "prefix"}, space={"pia_dims": [2], "placements": ["residual"]})
    )
    assert (asked.space.student.pooling, asked.space.choices.placements) == ("prefix", ("residual",))
    whole = own(**lm, student=SkipConfig(pooling="none"), space=SpaceSettings(placements=("residual",)))
    assert (whole.student.pooling, whole.space.placements, whole.space.towers) == ("none", ("residual",), None)
    with pytest.raises(ConfigError, match=r"space.towers is \['vision'\], but the model only has \['text'\]"):
        Workbench.open(own(**lm, space={"towers": ["vision"]}))
    rows = [f"{text},{'good' if 'cat' in text else 'bad'}" for text in text_file.read_text("utf-8").split("\n\n")]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    # A decoder that classifies is one all the same: a mean over all tokens would look ahead.
    classes = Workbench.open(own(model=str(llama_folder), task="text-classification", data=tmp_path / "rows.csv"))
    assert classes.space.student.pooling == "none"
    assert classes.model.config.id2label == {0: "bad", 1: "good"}  # type: ignore[union-attr]


def test_an_encoder_has_neither_decoding_nor_cache_and_all_figures_are_finite(
    own: Callable[..., SearchSettings], tmp_path: Path
) -> None:
    from eas_search.latency import measure_latency
    from eas_search.measures import kv_bytes_per_token, prefill_flops

    data, model = draw_digits(tmp_path / "digits", 60), save_vit(tmp_path / "vit", map(str, range(10)), layers=2)
    bench = Workbench.open(own(model=str(model), task="image-classification", data=data))
    inputs = bench.latency_inputs()
    assert set(inputs) == {"pixel_values"}
    report = measure_latency(bench.model, inputs, baseline=bench.model, config=bench.settings.final_latency)
    assert report.decode is None
    assert math.isfinite(report.prefill.ratio.estimate)
    assert kv_bytes_per_token(bench.model, inputs) == 0
    assert prefill_flops(bench.model, inputs) > 0
