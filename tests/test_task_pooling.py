"""What a student pools over on real encodings: never an answer, never padding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_task_contract import WORDS, words
from torch import nn

from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips
from eas_search.tasks import Task, get_task
from eas_search.workbench import load_for_task

Randomise = Callable[..., nn.Module]


def texts(folder: Path) -> Path:
    rows = [{"text": " ".join(WORDS[: 3 + 2 * i]), "label": ("good", "bad")[i % 2]} for i in range(10)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "rows.jsonl"


def choices(folder: Path) -> Path:
    rows = [
        {"question": "the cat", "choices": ["dog", " ".join(WORDS[: 4 + 2 * i])], "answer": i % 2} for i in range(10)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "rows.jsonl"


def bert(folder: Path) -> Path:
    from tiny_models import save_bert

    return save_bert(folder / "bert", [" ".join(WORDS)], layers=2)


def llama(folder: Path) -> Path:
    from tiny_models import save_llama

    return save_llama(folder / "llama", [" ".join(WORDS)], layers=2)


@pytest.mark.parametrize(
    ("name", "data", "save", "pooling"),
    [
        ("text-classification", texts, bert, "all"),
        ("multiple-choice", choices, bert, "all"),
        ("text-classification", texts, llama, "prompt"),
    ],
)
@pytest.mark.parametrize("router", ["static", "routed"])
def test_padding_changes_no_answer(
    name: str, data: Any, save: Any, pooling: str, router: str, tmp_path: Path, randomise: Randomise
) -> None:
    from eas_search.models.options import LoadOptions

    task: Task = get_task(name, data(tmp_path))
    model, processor = load_for_task(task, str(save(tmp_path)), LoadOptions(device="cpu"))
    model.config.pad_token_id = processor.pad_token_id  # type: ignore[union-attr, assignment]
    placement = "residual" if save is bert else "parallel"
    config = SkipConfig(skip=(0,), pia_dim=4, placement=placement, pooling=pooling, router=router, adapter_dim=2)
    student = randomise(apply_skips(model, config))
    split = task.encode(processor, task.examples("train"))
    (together,) = split.batches(len(split))
    lengths = together["attention_mask"].sum(dim=-1)
    assert lengths.min() < lengths.max()
    with torch.no_grad():
        whole = student(**together).logits
        for row, batch in enumerate(split.batches(1)):
            torch.testing.assert_close(student(**batch).logits[0], whole[row], rtol=1e-4, atol=1e-5)
        # The pooled mean is not empty: what the model reads at its end reaches the answer.
        other = {**together, "input_ids": together["input_ids"].flip(-1)}
        assert not torch.allclose(student(**other).logits, whole, atol=1e-3)


def test_an_answer_changes_nothing_before_it(tmp_path: Path, randomise: Randomise, build_llama: Any) -> None:
    records = [
        {
            "id": i,
            "conversations": [
                {"from": "human", "value": " ".join(WORDS[: 2 + i])},
                {"from": "gpt", "value": "red cat"},
            ],
        }
        for i in range(12)
    ]
    (tmp_path / "talks.json").write_text(json.dumps(records), encoding="utf-8")
    task = get_task("vqa", tmp_path / "talks.json")
    tokenizer = words()
    split = task.encode(tokenizer, task.examples("train"))
    config = SkipConfig(skip=(1, 2), pia_dim=4, pooling=task.pooling, router="routed", adapter_dim=2)
    student = randomise(apply_skips(build_llama(vocab_size=len(tokenizer)), config))
    (batch,) = split.batches(len(split))
    answer = batch["labels"] != -100
    changed = batch["input_ids"].masked_fill(answer, tokenizer.convert_tokens_to_ids("dog"))
    before = answer.cumsum(dim=1) == 0
    with torch.no_grad():
        first = student(**batch).logits
        second = student(**{**batch, "input_ids": changed}).logits
    torch.testing.assert_close(first[before], second[before])
    assert not torch.allclose(first[answer], second[answer])
