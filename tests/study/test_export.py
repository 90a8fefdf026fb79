"""An export gives the trained student back, in another process too, and says so when it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eas_search as eas
from eas_search.exceptions import EasSearchError, StorageError
from eas_search.export import about, save_pretrained, verify, write_reference
from eas_search.models.loading import load_model
from eas_search.models.options import LoadOptions
from eas_search.study import afterwards
from eas_search.study.outputs import read_json
from eas_search.tasks import get_task

CONFIGS = {
    "default": eas.SkipConfig(skip=(0, 2), pia_dim=4, adapter_dim=2),
    "routed": eas.SkipConfig(skip=(1, 3), pia_dim=4, placement="ffn", router="routed", adapter_dim=2),
    "residual": eas.SkipConfig(skip=(0, 1, 2, 3), pia_dim=2, placement="residual", pooling="prefix"),
    "deleted, with vision": eas.SkipConfig(skip=(1, 4), pia_dim=0),
    "nothing": eas.SkipConfig(),
}


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> SimpleNamespace:
    """Tiny model, processor and four prompts of different lengths, padded on the left."""
    model, processor = load_model(str(tiny_model), LoadOptions(device="cpu"))
    task = get_task("digits-vqa")
    return SimpleNamespace(
        model=model, processor=processor, prompts=task.encode(processor, task.examples("validation", 4)).prompts(4)
    )


def trained(model: nn.Module, config: eas.SkipConfig) -> Any:
    """A student whose adapters are no no-ops."""
    student: Any = eas.apply_skips(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student.eval()


@torch.no_grad()
def answers(model: Any, prompts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    tokens = model.generate(**prompts, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return model(**prompts).logits, tokens


@pytest.fixture
def export(base: SimpleNamespace, tmp_path: Path) -> Path:
    """An export with everything in it."""
    student = trained(base.model, CONFIGS["default"])
    save_pretrained(eas.merge(student), tmp_path / "export", base.processor, "# A card\n", {"task": "digits-vqa"})
    write_reference(tmp_path / "export", student, base.prompts)
    return tmp_path / "export"


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_loaded_answers_like_what_was_saved(
    base: SimpleNamespace, tmp_path: Path, name: str, merged: bool
) -> None:
    student = trained(base.model, CONFIGS[name])
    saved = eas.merge(student).eval() if merged else student
    eas.save_pretrained(saved, tmp_path)
    loaded: Any = eas.load_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.eas.merged == merged
    assert loaded.eas.skipped == saved.eas.skipped
    for ours, theirs in zip(answers(loaded, base.prompts), answers(saved, base.prompts), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    if merged:
        torch.testing.assert_close(
            answers(loaded, base.prompts)[0], answers(student, base.prompts)[0], atol=1e-4, rtol=0
        )


def test_a_fresh_process_gets_the_same_answers(
    export: Path, base: SimpleNamespace, start: Callable[..., Any], tmp_path: Path
) -> None:
    save_file({name: tensor.contiguous() for name, tensor in base.prompts.items()}, tmp_path / "prompts.safetensors")
    code = (
        "import sys, torch, eas_search as eas; from safetensors.torch import load_file, save_file\n"
        "model, prompts = eas.load_pretrained(sys.argv[1]), load_file(sys.argv[2])\n"
        "tokens = model.generate(**prompts, max_new_tokens=3, min_new_tokens=3, do_sample=False)\n"
        "with torch.no_grad(): save_file({'logits': model(**prompts).logits, 'tokens': tokens}, sys.argv[3])\n"
    )
    process = start("-c", code, export, tmp_path / "prompts.safetensors", tmp_path / "answers.safetensors")
    assert process.wait() == 0, process.stderr.read()
    fresh = load_file(tmp_path / "answers.safetensors")
    logits, tokens = answers(eas.load_pretrained(export), base.prompts)
    torch.testing.assert_close(fresh["logits"], logits, atol=1e-5, rtol=0)
    assert torch.equal(fresh["tokens"], tokens)


def test_generation_with_left_padding_equals_generation_one_by_one(export: Path, base: SimpleNamespace) -> None:
    model: Any = eas.load_pretrained(export)
    together = answers(model, base.prompts)[1][:, -3:]
    assert len({int(n) for n in base.prompts["attention_mask"].sum(dim=1)}) > 1
    for i, mask in enumerate(base.prompts["attention_mask"].bool()):
        one = {name: tensor[i : i + 1] for name, tensor in base.prompts.items()}
        one |= {name: one[name][:, mask] for name in ("input_ids", "attention_mask")}
        assert torch.equal(answers(model, one)[1][0, -3:], together[i])


def test_ties_and_precision_survive(base: SimpleNamespace, tmp_path: Path, same_model: Callable[..., None]) -> None:
    config = type(base.model.config)(**{**base.model.config.to_dict(), "tie_word_embeddings": True})
    tied = type(base.model)._from_config(config, dtype=torch.bfloat16).eval()
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    student = eas.merge(trained(tied, CONFIGS["default"])).eval()
    eas.save_pretrained(student, tmp_path)
    loaded: Any = eas.load_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert next(loaded.parameters()).dtype == torch.bfloat16
    same_model(loaded, student, **base.prompts)


def test_an_export_holds_no_file_that_could_run_code(export: Path) -> None:
    assert {path.suffix for path in export.iterdir()} <= {".json", ".safetensors", ".md", ".jinja", ".txt"}


def test_a_second_export_replaces_the_first(export: Path, base: SimpleNamespace) -> None:
    """A reference of the first export must not stand beside the weights of the second."""
    student = trained(base.model, CONFIGS["residual"])
    eas.save_pretrained(eas.merge(student), export)
    assert eas.load_pretrained(export).eas.config.placement == "residual"  # type: ignore[union-attr, operator]
    with pytest.raises(StorageError, match="no reference"):
        verify(export)


def test_only_a_student_can_be_saved_and_only_where_one_may_write(base: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(EasSearchError, match="not a student"):
        eas.save_pretrained(base.model, tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match="cannot be written"):
        eas.save_pretrained(trained(base.model, CONFIGS["default"]), tmp_path / "file" / "export")


def test_the_export_of_a_search_claims_what_the_search_measured(finished: SimpleNamespace) -> None:
    facts, best = about(finished.folder / "export"), read_json(finished.folder / "best.json")
    assert facts["base_model"] == finished.settings.model
    for name, value in facts["claims"].items():
        assert value == best[name]
    assert verify(finished.folder / "export").generated_equal


@pytest.mark.parametrize("bf16", [True, False])
def test_a_trial_trained_again_for_its_export_is_trained_as_the_study_was(
    finished_copy: Path, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine that would decide otherwise."""
    (finished_copy / "stages" / "precision.json").write_text(json.dumps({"bf16": bf16}), encoding="utf-8")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not bf16})
    seen = []

    def note(bench: Any, *_: Any) -> Any:
        seen.append(bench.conditions.bf16)
        raise KeyboardInterrupt

    monkeypatch.setattr(afterwards, "prepare_finalist", note)
    with pytest.raises(KeyboardInterrupt):
        afterwards.export_trial(finished_copy, None, finished_copy / "again")
    assert seen == [bf16]
