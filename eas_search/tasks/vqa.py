"""Encoding of image-and-question tasks for LLaVA-like processors: one text, at most one image per example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eas_search.exceptions import TaskDataError
from eas_search.tasks.base import Example, Task

if TYPE_CHECKING:
    from torch import Tensor

    from eas_search.tasks.encoding import EncodedSplit

CHUNK = 256  # examples that the processor gets at once; bounds the memory of raw images


class VqaTask(Task):
    """A task whose examples are questions (about an image, or plain text) with short answers.

    The processor must expand the image placeholder itself and give every tensor with one row per example, as LLaVA's
    does; otherwise `encode` refuses. Text-only tasks work with a bare tokenizer.
    """

    def format_prompt(self, processor: Any, example: Example) -> str:
        """The prompt as text: by the processor's chat template, else the image token and the question."""
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}] if example.image is not None else []
            content.append({"type": "text", "text": example.prompt})
            text: str = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            return text
        return example.prompt if example.image is None else f"{_image_token(processor)} {example.prompt}"

    def encode(self, processor: Any, examples: Sequence[Example]) -> EncodedSplit:
        """Prompt, answer and EOS as tensors, padded on the right (see EncodedSplit).

        Raises TaskDataError if there are no examples, if only some have an image, if an answer has no
        token, or if the processor does not give one row per example.
        """
        import torch

        from eas_search.tasks.encoding import EncodedSplit

        if not examples:
            raise TaskDataError(
                f"task '{self.name}' got 0 examples to encode; expected at least 1; check the split's data."
            )
        if len({e.image is None for e in examples}) == 2:
            raise TaskDataError(
                f"task '{self.name}' has examples with and without image; expected one kind; encode them apart."
            )
        tokenizer = getattr(processor, "tokenizer", processor)
        rows: list[tuple[list[int], list[int]]] = []
        others: dict[str, list[Tensor]] = {}
        for start in range(0, len(examples), CHUNK):
            part = examples[start : start + CHUNK]
            texts = [self.format_prompt(processor, example) for example in part]
            images = {} if part[0].image is None else {"images": [example.image for example in part]}
            inputs = processor(text=texts, padding=True, padding_side="right", return_tensors="pt", **images)
            _require_rows(self.name, inputs, len(part))
            lengths = inputs.pop("attention_mask").sum(dim=1).tolist()
            for text, example, ids, length in zip(texts, part, inputs.pop("input_ids").tolist(), lengths, strict=True):
                rows.append((ids[:length], _answer_ids(tokenizer, text, example.answer)))
            for name, value in inputs.items():
                if name != "token_type_ids":
                    others.setdefault(name, []).append(value)
        tensors = _padded(
            rows, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        tensors.update({name: torch.cat(values) for name, values in others.items()})
        return EncodedSplit(tensors, tuple(example.group for example in examples))


def _image_token(processor: Any) -> str:
    token = getattr(processor, "image_token", None)
    if not isinstance(token, str):
        raise TaskDataError(
            f"processor '{type(processor).__name__}' has no image token; expected one that takes images; "
            "give a multimodal model's processor."
        )
    return token


def _answer_ids(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """Tokens of the answer as they follow the prompt, and EOS."""
    joined = f"{prompt}{answer}" if prompt[-1:].isspace() else f"{prompt} {answer}"
    before, both = (tokenizer(text).input_ids for text in (prompt, joined))
    # Where a tokenizer merges across the boundary, the answer is tokenized on its own.
    same = both[: len(before)] == before
    ids: list[int] = both[len(before) :] if same else tokenizer(answer, add_special_tokens=False).input_ids
    if not ids:
        raise TaskDataError(f"answer '{answer}' has no token; expected a text of at least one; check the task's data.")
    return [*ids, tokenizer.eos_token_id]


def _require_rows(name: str, inputs: Any, count: int) -> None:
    odd = [key for key, value in inputs.items() if len(value) != count]
    if odd:
        raise TaskDataError(
            f"processor output '{odd[0]}' has {len(inputs[odd[0]])} rows for {count} examples of task '{name}'; "
            "expected one row per example; use a model with one image tensor per image (LLaVA-like)."
        )


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
