"""Every format gives the trained student back, here and in a fresh process, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import eas_search as eas
from eas_search.exceptions import ConfigError, StorageError, UnsupportedModelError
from eas_search.export import FORMATS, ExportJob, check_writable, export_student, load_export

PLAIN = {"ffn", "parallel", "paper", "deleted", "lora"}
POSSIBLE = {
    "eas": {"ffn", "parallel", "paper", "pooled", "routed", "residual", "deleted", "lora"},
    "adapter": {"ffn", "parallel", "paper", "pooled", "routed", "residual", "deleted", "lora"},
    "torch-export": {"ffn", "parallel", "paper", "pooled", "routed", "residual", "deleted", "lora"},
    "onnx": {"ffn", "parallel", "paper", "pooled", "routed", "residual", "deleted", "lora"},
    "stock": PLAIN,
    "decilm": PLAIN,
    "lora": {"ffn", "lora"},
}
REASONS = {
    ("stock", "pooled"): "pooling 'prompt' adds a vector per sample",
    ("stock", "routed"): "router 'routed' mixes its experts per sample",
    ("stock", "residual"): "placement 'residual' stays two thin products",
    ("lora", "parallel"): "also writes to the residual stream",
    ("lora", "paper"): "full rank",
    ("lora", "deleted"): "no adapters",
    ("decilm", "pooled"): "vector per sample",
}
QUICK = ("eas", "adapter", "lora", "stock", "decilm")


@pytest.mark.parametrize("name", sorted(POSSIBLE["eas"]))
def test_the_plan_of_a_configuration(llama: Any, student_of: Callable[..., Any], name: str) -> None:
    plan = eas.plan_formats(student_of(llama, name))
    assert {kind for kind, verdict in plan.items() if verdict.kind == "exact"} == {
        kind for kind in FORMATS if name in POSSIBLE[kind]
    }
    for kind, verdict in plan.items():
        assert REASONS.get((kind, name), "") in verdict.reason
        assert verdict.reason
        assert "\n" not in verdict.reason


def test_a_plan_needs_no_weights(llama: Any, student_of: Callable[..., Any]) -> None:
    with torch.device("meta"):
        empty = type(llama)._from_config(llama.config)
    for name in ("ffn", "parallel", "pooled"):
        config = student_of(llama, name).eas.config
        assert eas.plan_formats(eas.apply_skips(empty, config)) == eas.plan_formats(student_of(llama, name))


@pytest.mark.parametrize("kind", QUICK)
@pytest.mark.parametrize("name", sorted(POSSIBLE["eas"]))
def test_what_is_possible_is_exact_and_the_rest_is_refused(
    llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], write: Callable[..., Any], kind: str,
    name: str,
) -> None:  # fmt: skip
    student = student_of(llama, name)
    if name not in POSSIBLE[kind]:
        with pytest.raises(UnsupportedModelError, match=f"format '{kind}' is impossible"):
            write(student, prompts, kind, base=llama)
        return
    _, result = write(student, prompts, kind, base=llama)
    assert result.generated_equal
    assert not result.left_out
    assert result.report.largest <= 1e-4


@pytest.mark.parametrize("kind", QUICK)
def test_a_first_block_that_keeps_its_attention(
    llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], write: Callable[..., Any], kind: str
) -> None:
    _, result = write(student_of(llama, "ffn", skip=(1, 3)), prompts, kind, base=llama)
    assert result.report.largest <= 1e-4


@pytest.mark.parametrize("kind", [kind for kind in QUICK if "pooled" in POSSIBLE[kind]])
def test_a_block_whose_pia_stays_thin_comes_back_so(
    llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], write: Callable[..., Any], kind: str
) -> None:
    """It takes its input away, so that its merged form, which loading builds before the weights are there, differs."""
    student = student_of(llama, "pooled")
    site = student.eas.skipped[0]
    block = student.get_submodule(site.block)
    pia, norm = block.pia_ffn, getattr(block, site.pattern.norm1)
    with torch.no_grad():  # M = I + U R with R U = -I is singular
        pia.down.weight.copy_(-torch.linalg.pinv(pia.static_up()[0]) / pia.shape.mix / norm.weight)
    assert eas.merge(student).eas.thin == (site.name,)
    _, result = write(student, prompts, kind, base=llama)
    assert result.report.largest <= 1e-4


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "decilm"])
def test_the_demo_model_in_every_format_verified_in_a_fresh_process(
    demo: SimpleNamespace, student_of: Callable[..., Any], write: Callable[..., Any], python: Callable[..., str],
    kind: str,
) -> None:  # fmt: skip
    student = student_of(demo.model, "ffn", skip=(0, 5, 13))  # 13 is a block of the vision tower
    about = {"base_model": "demo"}
    folder, _ = write(student, demo.prompts, kind, processor=demo.processor, about=about, base=demo.model)
    assert {"README.md", "manifest.json", "eas_config.json", "reference.safetensors"} <= {
        path.name for path in folder.iterdir()
    }
    code = "import sys, eas_search as eas; print(eas.verify(sys.argv[1]).report.largest)"
    assert float(python(code, folder).splitlines()[-1]) <= 1e-4


def test_decilm_in_a_fresh_process(
    llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], write: Callable[..., Any],
    python: Callable[..., str],
) -> None:  # fmt: skip
    folder, _ = write(student_of(llama, "parallel"), prompts, "decilm")
    code = "import sys, eas_search as eas; print(eas.verify(sys.argv[1]).report.largest)"
    assert float(python(code, folder)) <= 1e-4


@pytest.mark.parametrize("kind", ["eas", "adapter", "stock", "decilm"])
def test_tied_embeddings_and_half_precision(
    build_llama: Callable[..., Any], prompts: dict[str, Tensor], student_of: Callable[..., Any],
    write: Callable[..., Any], kind: str,
) -> None:  # fmt: skip
    base = build_llama(tie_word_embeddings=True).to(torch.bfloat16)
    folder, result = write(student_of(base, "parallel"), prompts, kind, base=base)
    recorded = load_file(folder / "reference.safetensors")
    largest = max(tensor.abs().max().item() for name, tensor in recorded.items() if name.startswith("answer/"))
    assert result.report.tolerance == pytest.approx(8 * 2**-7 * largest)
    loaded: Any = load_export(folder, base)
    assert loaded.dtype == torch.bfloat16
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_one_format_after_another_leaves_nothing_of_the_first(
    llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], tmp_path: Path
) -> None:
    job = ExportJob(student_of(llama, "ffn"), prompts, base=llama)
    export_student(job, tmp_path, "stock")
    (tmp_path / "notes.txt").write_text("of the user", encoding="utf-8")
    export_student(job, tmp_path, "adapter")
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "eas_config.json", "manifest.json", "notes.txt",
        "reference.safetensors",
    }  # fmt: skip


def test_what_cannot_be_exported_is_refused(
    llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], tmp_path: Path
) -> None:
    student = student_of(llama, "ffn")
    with pytest.raises(ConfigError, match="'gguf' is unknown; expected one of eas, adapter"):
        export_student(ExportJob(student, prompts), tmp_path, "gguf")
    with pytest.raises(ConfigError, match="not a student"):
        export_student(ExportJob(llama, prompts), tmp_path)
    with pytest.raises(ConfigError, match="merged"):
        export_student(ExportJob(eas.merge(student), prompts), tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    for attempt in (check_writable, lambda folder: export_student(ExportJob(student, prompts), folder)):
        with pytest.raises(StorageError, match="cannot be written"):
            attempt(tmp_path / "file" / "export")
