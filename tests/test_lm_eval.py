"""Tasks of lm-evaluation-harness: a local definition scored by us and by the harness's own rule."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_task_contract import words

from eas_search.exceptions import ConfigError, TaskDataError
from eas_search.tasks import get_task
from eas_search.training import sample_scores

CHOICE = """
task: my_choice
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/docs.jsonl, validation: {folder}/docs.jsonl}}
output_type: multiple_choice
training_split: train
validation_split: validation
doc_to_text: "question {{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
GENERATE = """
task: my_text
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/docs.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "question {{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
metric_list:
  - metric: exact_match
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval")
    choices = [["big dog", "cat"], ["red", "green tree", "blue"], ["old", "new"]]
    docs = [{"question": f"{i} ?", "choices": choices[i % 3], "answer": i % 2} for i in range(30)]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)), encoding="utf-8")
    for name, text in (("choice", CHOICE), ("text", GENERATE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(folder=tmp_path), encoding="utf-8")
    return tmp_path


def test_choices_are_judged_by_their_summed_likelihood(folder: Path, build_llama: Any) -> None:
    task, tokenizer = get_task("lm-eval:my_choice", folder), words()
    model = build_llama(vocab_size=len(tokenizer))
    examples = task.examples("train", 14)
    assert examples[0].choices in (("big dog", "cat"), ("red", "green tree", "blue"), ("old", "new"))
    split = task.encode(tokenizer, examples)
    scores = sample_scores(model, split, batch_size=5)
    for example, score in zip(examples, scores.tolist(), strict=True):
        sums = []
        for choice in example.choices:
            prompt = tokenizer(example.prompt, return_tensors="pt").input_ids
            whole = tokenizer(f"{example.prompt} {choice}", return_tensors="pt").input_ids
            with torch.no_grad():
                logs = model(whole).logits[0].log_softmax(dim=-1)
            places = range(prompt.shape[1], whole.shape[1])
            sums.append(sum(logs[i - 1, whole[0, i]].item() for i in places))
        assert score == (sums.index(max(sums)) == example.choices.index(example.answer))
    assert 0 < scores.double().mean() < 1


def test_what_only_has_a_test_split_is_divided_and_said(folder: Path) -> None:
    task = get_task("lm-eval:my_text", folder)
    assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [24, 3, 3]
    assert "no validation and no test split" in task.notes[0]
    example = task.examples("train", 1)[0]
    assert example.prompt.startswith("question ")
    assert example.answer in ("big dog", "cat", "red", "green tree", "old", "new")
    split = task.encode(words(), task.examples("train", 4))
    assert set(split.prompts(2)) == {"input_ids", "attention_mask"}


def test_an_unknown_name_or_folder_is_one_line(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match="task 'my_choic' is no single task of lm-evaluation-harness; did you mean my_choice"
    ):
        get_task("lm-eval:my_choic", folder)
    with pytest.raises(TaskDataError, match="is no folder"):
        get_task("lm-eval:my_choice", folder / "docs.jsonl")


def test_without_the_harness_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r'not installed; run: pip install "eas-search\[lm-eval\]"') as caught:
        get_task("lm-eval:hellaswag")
    assert "\n" not in str(caught.value)
