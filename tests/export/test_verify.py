"""`verify` asks in every form that a model knows, and refuses what answers otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eas_search as eas
from eas_search.exceptions import StorageError, VerificationError
from eas_search.export import write_manifest, write_reference
from eas_search.export.forms import arrange

FORMS = {
    f"{rows}, {padding} padding, {cache} cache"
    for rows, padding, cache in itertools.product(
        ("one row", "several rows"), ("none", "left", "right"), ("no", "dynamic", "static")
    )
}


@pytest.fixture
def export(llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], write: Callable[..., Any]) -> Path:
    """A sound export."""
    folder, _ = write(student_of(llama, "pooled"), prompts)
    return folder


def test_every_form_is_compared(export: Path) -> None:
    result = eas.verify(export)
    outputs = {f"{form}: logits" for form in FORMS}
    steps = {f"{form}: step" for form in FORMS if not form.endswith("no cache")}
    assert set(result.report.differences) == outputs | steps
    assert result.generated_equal
    assert result.kind == "eas"


def test_the_recorded_answers_are_those_of_the_unmerged_student(
    export: Path, llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], logits: Callable[..., Tensor]
) -> None:
    """Recomputed here by hand for one form and for the generated tokens."""
    student = student_of(llama, "pooled")
    recorded = load_file(export / "reference.safetensors")
    rows = [prompts["input_ids"][i, mask.bool()] for i, mask in enumerate(prompts["attention_mask"])]
    width = max(map(len, rows)) + 3
    ids = torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])
    mask = torch.stack([(torch.arange(width) < len(row)).long() for row in rows])
    right = {"input_ids": ids, "attention_mask": mask}
    torch.testing.assert_close(recorded["answer/several/right/off/logits"], logits(student, right))
    alone = student.generate(rows[0][None], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(recorded["generated/one/dynamic"], alone)
    together = recorded["generated/several/static"]
    assert torch.equal(together[0, -4:], alone[0, -4:])


@pytest.mark.parametrize(
    ("rows", "padding", "first"),
    [
        ("one", "none", [[1, 2]]),
        ("one", "left", [[9, 9, 9, 1, 2]]),
        ("one", "right", [[1, 2, 9, 9, 9]]),
        ("several", "left", [[9, 9, 9, 9, 1, 2], [9, 9, 9, 3, 4, 5]]),
        ("several", "right", [[1, 2, 9, 9, 9, 9], [3, 4, 5, 9, 9, 9]]),
        ("several", "none", [[1, 2], [1, 2]]),
    ],
)
def test_how_rows_are_arranged(rows: Any, padding: Any, first: list[list[int]]) -> None:
    inputs = {
        "input_ids": torch.tensor([[0, 1, 2], [3, 4, 5]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "pixel_values": torch.arange(2.0).reshape(2, 1, 1, 1),
    }
    found = arrange(inputs, rows, padding, 9)
    assert found is not None
    assert found["input_ids"].tolist() == first
    assert found["attention_mask"].tolist() == [[int(t != 9) for t in row] for row in first]
    assert len(found["pixel_values"]) == len(first)


@pytest.mark.parametrize("name", ["student.safetensors", "reference.safetensors"])
def test_another_answer_is_refused_with_the_differences(export: Path, name: str) -> None:
    tensors = load_file(export / name)
    key = next(key for key in sorted(tensors) if key.endswith(("norm.weight", "several/left/dynamic/step")))
    tensors[key] = tensors[key] + 0.01
    metadata = {"reference": '{"positions": 9999, "new_tokens": 4, "pad": 0, "device": "cpu"}'}
    save_file(tensors, export / name, metadata=metadata)
    write_manifest(export)  # the files are what their manifest says; only the answers differ
    with pytest.raises(VerificationError, match=r"differ by .* expected at most 0\.0001") as error:
        eas.verify(export)
    report: Any = error.value.report
    assert max(report.report.differences.values()) > 1e-4
    if name == "reference.safetensors":
        assert eas.verify(export, tolerance=0.02).report.largest <= 0.02  # and what is allowed passes


def test_other_tokens_are_refused(export: Path) -> None:
    tensors = load_file(export / "reference.safetensors")
    tensors["generated/several/dynamic"][-1, -1] += 1
    metadata = {"reference": '{"positions": 9999, "new_tokens": 4, "pad": 0, "device": "cpu"}'}
    save_file(tensors, export / "reference.safetensors", metadata=metadata)
    write_manifest(export)
    with pytest.raises(VerificationError, match="generated tokens differ"):
        eas.verify(export)


def test_not_a_number_is_no_small_difference(export: Path) -> None:
    tensors = load_file(export / "student.safetensors")
    tensors["lm_head.weight"][3] = float("nan")
    save_file(tensors, export / "student.safetensors")
    write_manifest(export)
    with pytest.raises(VerificationError, match="nan"):
        eas.verify(export)


def test_without_recorded_answers_there_is_nothing_to_verify(
    export: Path, llama: Any, student_of: Callable[..., Any]
) -> None:
    eas.save_pretrained(eas.merge(student_of(llama, "ffn")), export)
    with pytest.raises(StorageError, match="has no reference"):
        eas.verify(export)
    (export / "reference.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 cut off")
    write_manifest(export)
    with pytest.raises(StorageError, match="cannot be read"):
        eas.verify(export)


@pytest.mark.parametrize("kind", ["eas", "adapter", "stock", "torch-export"])
@pytest.mark.parametrize("tower", ["clip", "vit"])
@pytest.mark.parametrize("name", ["ffn", "parallel"])
def test_encoders_that_only_read_pixels(
    request: pytest.FixtureRequest, pixels: Tensor, student_of: Callable[..., Any], write: Callable[..., Any],
    kind: str, tower: str, name: str,
) -> None:  # fmt: skip
    base = request.getfixturevalue(tower)
    if kind == "torch-export" and (tower, name) != ("clip", "ffn"):
        pytest.skip("tracing takes seconds; once is enough")
    _, result = write(student_of(base, name), {"pixel_values": pixels}, kind, base=base)
    assert result.generated_equal is None
    assert "one row, none padding, no cache: last_hidden_state" in result.report.differences
    assert "several rows, none padding, no cache: last_hidden_state" in result.report.differences
    assert result.report.largest <= 1e-4


def test_pooled_encoders(vit: Any, pixels: Tensor, student_of: Callable[..., Any], write: Callable[..., Any]) -> None:
    _, result = write(student_of(vit, "pooled", pooling="all"), {"pixel_values": pixels})
    assert result.report.largest <= 1e-4


def test_a_large_vocabulary_keeps_fewer_positions(
    llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("eas_search.export.reference.ELEMENTS", 18 * 4 * 64 * 2)
    student = student_of(llama, "ffn")
    eas.save_pretrained(eas.merge(student), tmp_path)
    write_reference(tmp_path, student, prompts)
    tensors = load_file(tmp_path / "reference.safetensors")
    assert tensors["answer/several/left/off/logits"].shape == (8, 64)  # two of each row's tokens
    with torch.no_grad():
        whole = student(prompts["input_ids"][1:2], use_cache=False).logits[0]
    torch.testing.assert_close(tensors["answer/several/left/off/logits"][2:4], whole[[0, -1]], atol=1e-5, rtol=0)
    assert eas.verify(tmp_path).report.largest <= 1e-4
