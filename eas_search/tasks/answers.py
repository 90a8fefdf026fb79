"""Encoding of questions with short answers for LLaVA-like processors and tokenizers: one text, at most one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eas_search.exceptions import TaskDataError
from eas_search.tasks.base import Example, Task, require_examples
from eas_search.tasks.texts import prompt_options, readable

if TYPE_CHECKING:
    from torch import Tensor

    from eas_search.tasks.encoding import EncodedSplit
    from eas_search.tasks.scoring import Scoring


class AnswerTask(Task):
    """A task whose examples are questions (about an image, or plain text) with short answers.

    The processor must expand the image placeholder itself; it may give an image any number of rows (see `processing`).
    Text-only data works with a bare tokenizer.
    """

    def format_prompt(self, processor: Any, example: Example) -> str:
        """The prompt as text: by the processor's chat template, else the image token and the question."""
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}] if example.image is not None else []
            content.append({"type": "text", "text": example.prompt})
            text: str = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            return text
        return example.prompt if example.image is None else f"{_image_token(processor)} {example.prompt}"

    def scoring(self, tokenizer: Any, tensors: dict[str, Tensor]) -> Scoring:
        """The metric; `tensors` are those of the split."""
        from eas_search.tasks.scoring import EXACT_MATCH

        return EXACT_MATCH

    def encode(self, processor: Any, examples: Sequence[Example]) -> EncodedSplit:
        """Prompt, answer and EOS as tensors, padded on the right (see EncodedSplit).

        Raises TaskDataError if there are no examples, if an answer has no token, or if what the processor gives cannot
        be told apart by examples.
        """
        import torch

        from eas_search.tasks.encoding import EncodedSplit
        from eas_search.tasks.processing import process

        require_examples(self.name, examples)
        tokenizer = getattr(processor, "tokenizer", processor)
        pictured = torch.tensor([example.image is not None for example in examples])
        texts = [self.format_prompt(processor, example) for example in examples]
        done = process(self.name, processor, texts, [example.image for example in examples])
        answers = [answer_ids(tokenizer, text, e.answer) for text, e in zip(texts, examples, strict=True)]
        rows = list(zip(done.ids, answers, strict=True))
        tokens = _padded(rows, _padding(tokenizer))
        tensors = {**tokens, **_kinds(done.kinds, tokens["labels"]), **done.stacked}
        self._note_long(rows, tokenizer)
        mixed = bool(pictured.any()) and not bool(pictured.all())
        return EncodedSplit(
            tensors,
            tuple(example.group for example in examples),
            self.scoring(tokenizer, tensors),
            self.extras(tokenizer, examples, texts, tensors),
            pictured if mixed else None,
            done.ragged,
        )

    def _note_long(self, rows: Sequence[tuple[list[int], list[int]]], tokenizer: Any) -> None:
        limit = readable(tokenizer)
        longer = [] if limit is None else [row for row in rows if len(row[0]) + len(row[1]) > limit]
        if longer:
            self.notes.append(f"{len(longer)} of {len(rows)} texts are longer than the {limit} tokens the model reads")

    def extras(
        self, tokenizer: Any, examples: Sequence[Example], texts: Sequence[str], tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the scoring needs of every sample beside the model's inputs; `texts` are the formatted prompts."""
        return {}


def _image_token(processor: Any) -> str:
    token = getattr(processor, "image_token", None)
    if not isinstance(token, str):
        raise TaskDataError(
            f"processor '{type(processor).__name__}' has no image token; expected one that takes images; "
            "give a multimodal model, or data without images."
        )
    return token


def answer_ids(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """Tokens of the answer as they follow the prompt, and EOS."""
    joined = f"{prompt}{answer}" if prompt[-1:].isspace() else f"{prompt} {answer}"
    options = prompt_options(tokenizer, prompt)
    before, both = (tokenizer(text, **options).input_ids for text in (prompt, joined))
    # Where a tokenizer merges across the boundary, or ends every text with a token, the answer is tokenized on its own.
    same = both[: len(before)] == before
    ids: list[int] = both[len(before) :] if same else tokenizer(answer, add_special_tokens=False).input_ids
    if not ids:
        raise TaskDataError(f"answer '{answer}' has no token; expected a text of at least one; check the task's data.")
    return [*ids, tokenizer.eos_token_id]


def _padding(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise TaskDataError(
            f"tokenizer '{type(tokenizer).__name__}' has no end-of-sequence token; expected one after every answer; "
            "set eos_token in the model's tokenizer_config.json."
        )
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def _padded(rows: Sequence[tuple[list[int], list[int]]], padding: int) -> dict[str, Tensor]:
    """Rows of (prompt ids, answer ids) → input_ids, attention_mask and labels [N, n], padded on the right."""
    import torch

    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    shape = (len(rows), longest)
    ids, mask, labels = (
        torch.full(shape, padding),
        torch.zeros(shape, dtype=torch.long),
        torch.full(shape, -100),
    )
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor([*prompt, *answer])
        mask[i, :end] = 1
        labels[i, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _kinds(kinds: Mapping[str, Sequence[Sequence[int]]], labels: Tensor) -> dict[str, Tensor]:
    """What every token stands for, [N, n] by name; answers and padding are text, 0."""
    import torch

    found = {}
    for name, rows in kinds.items():
        found[name] = torch.zeros_like(labels)
        for i, values in enumerate(rows):
            found[name][i, : len(values)] = torch.tensor(values)
    return found
