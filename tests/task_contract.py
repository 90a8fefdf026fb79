"""What every task must keep to, as tests to inherit: subclass `TaskContract` and say how to make the task's data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eas_search.exceptions import ConfigError, TaskDataError
from eas_search.masks import question_mask
from eas_search.tasks import Example, Split, Task, get_task
from eas_search.tasks.encoding import EncodedSplit
from eas_search.training import sample_scores

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
VOCABULARY = 2000


class Oracle(nn.Module):
    """A model that knows every answer, or (`right=False`) always finds the right one the least likely."""

    def __init__(self, right: bool = True) -> None:
        super().__init__()
        self.certainty = nn.Parameter(torch.tensor(60.0 if right else -60.0))

    def forward(
        self, labels: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **_: Tensor
    ) -> Any:
        if labels.is_floating_point():
            logits = labels * float(self.certainty)
        elif labels.dim() == 2:
            assert input_ids is not None
            logits = torch.zeros(*input_ids.shape, VOCABULARY)
            logits.scatter_(2, input_ids.roll(-1, dims=1).unsqueeze(2), float(self.certainty))
        else:
            classes = VOCABULARY if input_ids is None or input_ids.dim() == 2 else input_ids.shape[1]
            logits = torch.zeros(len(labels), classes).scatter_(1, labels.unsqueeze(1), float(self.certainty))
        return SimpleNamespace(logits=logits)


def content(example: Example) -> tuple[object, ...]:
    """What tells examples apart."""
    picture = example.image.tobytes() if hasattr(example.image, "tobytes") else example.image
    return (picture, example.prompt, example.pair, example.choices, example.answer)


class TaskContract:
    """Tests that every task passes."""

    name: str
    options: dict[str, Any] = {}  # noqa: RUF012  (read only)

    def make_data(self, folder: Path) -> Path | None:
        """Write the task's data below `folder`; returns what --data is to name."""
        raise NotImplementedError

    def make_processor(self) -> Any:
        """A processor for it."""
        raise NotImplementedError

    def spoil(self, data: Path) -> None:
        """Damage the data; a task without data of its own leaves this out."""
        pytest.skip("carries its own data")

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path | None:
        return self.make_data(tmp_path)

    @pytest.fixture
    def task(self, data: Path | None) -> Task:
        return get_task(self.name, data, self.options)

    @pytest.fixture
    def processor(self) -> Any:
        return self.make_processor()

    @pytest.fixture
    def examples(self, task: Task) -> Sequence[Example]:
        return task.examples("train", 12)

    @pytest.fixture
    def split(self, task: Task, processor: Any, examples: Sequence[Example]) -> EncodedSplit:
        return task.encode(processor, examples)

    def test_splits_are_the_same_every_time(self, task: Task, data: Path | None) -> None:
        again = get_task(self.name, data, self.options)
        for split in SPLITS:
            found = [content(example) for example in task.examples(split, 40)]
            assert found
            assert found == [content(example) for example in again.examples(split, 40)]

    def test_splits_share_no_example(self, task: Task) -> None:
        parts = [{content(example) for example in task.examples(split, 300)} for split in SPLITS]
        assert len(set.union(*parts)) == sum(map(len, parts))

    def test_a_limit_cuts_the_list(self, task: Task) -> None:
        few = task.examples("train", 3)
        assert len(few) == 3
        assert [content(e) for e in few] == [content(e) for e in task.examples("train", 5)][:3]
        for limit in (0, -1):
            with pytest.raises(ConfigError, match=f"limit is {limit}"):
                task.examples("train", limit)
        with pytest.raises(ConfigError, match="split 'dev' is unknown"):
            task.examples("dev")  # type: ignore[arg-type]

    def test_what_is_labelled_is_exactly_the_answer(
        self, task: Task, split: EncodedSplit, processor: Any, examples: Sequence[Example]
    ) -> None:
        tokenizer, labels = getattr(processor, "tokenizer", processor), split.tensors["labels"]
        if task.head == "causal-lm":
            assert torch.equal(labels != -100, split.tensors["attention_mask"].bool())
            assert torch.equal(labels[labels != -100], split.tensors["input_ids"][labels != -100])
            return
        assert len(split) == len(examples)
        for row, example in enumerate(examples):
            if labels.is_floating_point():
                assert task.labels is not None
                known = {name: worth for name, worth in example.worth if name in task.labels}
                expected = torch.tensor([known.get(name, 0.0) for name in task.labels])
                torch.testing.assert_close(labels[row], expected)
                assert task.labels[int(labels[row].argmax())] == example.answer
                continue
            if labels.dim() == 1:
                names = task.labels if task.labels is not None else example.choices
                assert names[int(labels[row])] == example.answer
                continue
            labelled = labels[row] != -100
            assert torch.equal(labels[row][labelled], split.tensors["input_ids"][row][labelled])
            said = tokenizer.decode(labels[row][labelled])
            assert "".join(said.split()) == "".join(f"{example.answer}{tokenizer.eos_token}".split())

    def test_prompts_and_pooled_tokens_contain_no_answer(self, task: Task, split: EncodedSplit) -> None:
        prompts = split.prompts(6)
        assert "labels" not in prompts
        labels = split.tensors["labels"]
        if labels.dim() == 1 or labels.is_floating_point() or task.head == "causal-lm":
            assert task.pooling == ("none" if task.head == "causal-lm" else "all")
            return
        assert task.pooling == "none"  # unless the user wants it; then these are the tokens
        pooled = question_mask(labels)
        assert not (pooled & (labels != -100)).any()
        real = split.tensors["attention_mask"].bool()
        for row in range(min(6, len(split))):
            alone = split.tensors["input_ids"][row][pooled[row] & real[row]]
            assert torch.equal(prompts["input_ids"][row][prompts["attention_mask"][row].bool()], alone)

    def test_right_answers_score_one_and_wrong_ones_zero(self, split: EncodedSplit) -> None:
        right, wrong = sample_scores(Oracle(), split, 5), sample_scores(Oracle(right=False), split, 5)
        assert right.shape == wrong.shape == (len(split),)
        torch.testing.assert_close(right.double(), torch.ones(len(split)).double())
        torch.testing.assert_close(wrong.double(), torch.zeros(len(split)).double())
        assert sample_scores(Oracle(), split).dtype == right.dtype
        assert all(isinstance(value, float) for value in split.scoring.report(split, right).values())

    def test_batches_are_the_samples_and_hold_only_what_a_model_gets(self, split: EncodedSplit) -> None:
        labels = torch.cat(
            [batch["labels"][:, 0] if batch["labels"].dim() == 2 else batch["labels"] for batch in split.batches(5)]
        )
        whole = split.tensors["labels"]
        assert torch.equal(labels, whole[:, 0] if whole.dim() == 2 else whole)
        shuffled = [batch["labels"] for batch in split.batches(5, torch.Generator().manual_seed(0))]
        assert sum(map(len, shuffled)) == len(split)
        assert not set(split.extras) & set(next(split.batches(2)))
        assert len(split.subset(2)) == min(2, len(split))

    def test_no_examples_are_refused(self, task: Task, processor: Any) -> None:
        with pytest.raises(TaskDataError, match="got 0 examples"):
            task.encode(processor, [])

    def test_an_unknown_option_is_one_line_with_the_nearest(self, data: Path | None) -> None:
        with pytest.raises(ConfigError, match=r"option 'colour' of task .* is unknown") as caught:
            get_task(self.name, data, {"colour": "red"})
        assert "\n" not in str(caught.value)

    def test_data_that_is_missing_is_one_line_with_the_place(self, data: Path | None, tmp_path: Path) -> None:
        if data is None:
            pytest.skip("carries its own data")
        for wrong in (None, tmp_path / "nowhere" / "at" / "all"):
            with pytest.raises(TaskDataError) as caught:
                get_task(self.name, wrong, self.options).examples("train")
            assert "\n" not in str(caught.value)
            assert "expected" in str(caught.value)
            assert wrong is None or "nowhere" in str(caught.value)

    def test_damaged_data_is_one_line_with_the_file(self, data: Path | None) -> None:
        if data is None:
            pytest.skip("carries its own data")
        self.spoil(data)

        def use() -> None:
            task = get_task(self.name, data, self.options)
            task.encode(self.make_processor(), task.examples("train"))

        with pytest.raises(TaskDataError) as caught:
            use()
        assert "\n" not in str(caught.value)
        assert "expected" in str(caught.value)
