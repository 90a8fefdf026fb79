"""Running a processor over texts and pictures, whatever form it gives the pictures.

LLaVA's gives one row per picture, [1, 3, H, W]. Others give one picture several rows (Qwen2-VL: its patches and their
grid), or cut it into as many images as it needs (SmolVLM: [1, images, 3, H, W]); these get one sample at a time, so
that it is known what belongs to which sample. Some want to be told whose pictures they get (Gemma 3): what refuses one
list of the pictures of two samples gets a list for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from eas_search.exceptions import TaskDataError
from eas_search.tasks.image_files import open_image
from eas_search.tasks.prompts import KINDS
from eas_search.tasks.texts import prompt_options

CHUNK = 256  # examples that the processor gets at once; bounds the memory of raw images
PICTURE_DIMS = 4  # [pictures, 3, H, W]


@dataclass
class Processed:
    """What a processor made of N texts, some of them with a picture.

    Attributes:
        ids: token ids of every text, its image tokens expanded.
        kinds: further values per token by name, e.g. `mm_token_type_ids`.
        stacked: tensors of the pictures with one row per sample, zeros where there is no picture.
        ragged: tensors of the pictures sample by sample, with any number of rows; None where there is no picture.
    """

    ids: list[list[int]]
    kinds: dict[str, list[list[int]]] = field(default_factory=dict)
    stacked: dict[str, Tensor] = field(default_factory=dict)
    ragged: dict[str, tuple[Tensor | None, ...]] = field(default_factory=dict)


def process(name: str, processor: Any, texts: Sequence[str], images: Sequence[Any]) -> Processed:
    """Tokens of all texts, and the tensors of their pictures.

    Args:
        name: of the task, for messages.
        processor: takes text and images; a bare tokenizer will do where there is no image.
        texts: N prompts with image placeholders.
        images: N pictures, files, bytes, or None.

    Raises:
        TaskDataError: what it gives cannot be told apart by samples, or a picture cannot be read.
    """
    pictured = [i for i, image in enumerate(images) if image is not None]
    plain = [i for i, image in enumerate(images) if image is None]
    at_once, nested = CHUNK, False
    if pictured and not _has_plain_rows(_run(processor, [texts[pictured[0]]], [images[pictured[0]]])):
        at_once = 1
    elif len(pictured) > 1:
        nested = _counts_by_sample(processor, [texts[i] for i in pictured[:2]], [images[i] for i in pictured[:2]])
    done = Processed([[] for _ in texts])
    parts: dict[str, list[Tensor | None]] = {}
    for part in [*_chunks(pictured, at_once), *_chunks(plain, CHUNK)]:
        shown = images[part[0]] is not None
        output = _run(processor, [texts[i] for i in part], [images[i] for i in part] if shown else None, nested)
        for key, value in _sorted(name, output, part, done):
            if shown:
                of_samples = [value] if len(part) == 1 else list(value.split(1))
                for i, piece in zip(part, of_samples, strict=True):
                    parts.setdefault(key, [None] * len(texts))[i] = piece
    for key, pieces in parts.items():
        whole = _stack(pieces)
        if whole is None:
            done.ragged[key] = tuple(pieces)
        else:
            done.stacked[key] = whole
    return done


def _run(processor: Any, texts: list[str], images: Sequence[Any] | None, nested: bool = False) -> dict[str, Tensor]:
    """What the processor makes of texts and their pictures: one list of all, or (`nested`) a list for each text."""
    further: dict[str, Any] = prompt_options(getattr(processor, "tokenizer", processor), texts[0])
    if images is not None:
        opened = [open_image(image) for image in images]
        further["images"] = [[picture] for picture in opened] if nested else opened
    return dict(processor(text=texts, padding=True, padding_side="right", return_tensors="pt", **further))


def _counts_by_sample(processor: Any, texts: list[str], images: Sequence[Any]) -> bool:
    """Whether a processor takes one list of pictures for those of one text, of which two texts then get too many."""
    try:
        _run(processor, texts, images)
    except (IndexError, TypeError, ValueError):
        return True
    return False


def _has_plain_rows(output: dict[str, Tensor]) -> bool:
    """Whether one sample's tensors have one row each and its picture was not cut into several."""
    return all(isinstance(v, Tensor) and len(v) == 1 and v.dim() <= PICTURE_DIMS for v in output.values())


def _chunks(rows: list[int], size: int) -> Iterable[list[int]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _sorted(name: str, output: dict[str, Tensor], part: list[int], done: Processed) -> list[tuple[str, Tensor]]:
    """Take the tokens out of an output into `done`; what is left belongs to the pictures."""
    ids, mask = output.pop("input_ids"), output.pop("attention_mask")
    # Those of most tokenizers say where a second text starts, and there is none: all 0. Others mark a picture's tokens.
    types = output.get("token_type_ids")
    if not isinstance(types, Tensor) or not types.any():
        output.pop("token_type_ids", None)
    for key, value in output.items():
        if not isinstance(value, Tensor) or (len(part) > 1 and len(value) != len(part)):
            given = f"{len(value)} rows" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise TaskDataError(
                f"processor output '{key}' has {given} for {len(part)} examples of task '{name}'; expected tensors "
                "that can be told apart by examples; choose another model."
            )
        if key not in KINDS and value.dim() > 1 and value.shape[:2] == ids.shape:
            raise TaskDataError(
                f"processor output '{key}' has a value for every token, which task '{name}' cannot extend over the "
                "answer; expected tokens and pictures alone; choose another model."
            )
    found = {key: output.pop(key) for key in KINDS if key in output}
    for row, i in enumerate(part):
        length = int(mask[row].sum())
        done.ids[i] = ids[row, :length].tolist()
        for key, value in found.items():
            done.kinds.setdefault(key, [[] for _ in done.ids])[i] = value[row, :length].tolist()
    return list(output.items())


def _stack(pieces: list[Tensor | None]) -> Tensor | None:
    """One row per sample, if that is what the pieces are; they are dropped on the way, for the sake of memory."""
    shapes = {piece.shape for piece in pieces if piece is not None}
    shape = next(iter(shapes))
    if len(shapes) > 1 or not shape or shape[0] != 1:
        return None
    first = next(piece for piece in pieces if piece is not None)
    whole = first.new_zeros(len(pieces), *shape[1:])
    for i, piece in enumerate(pieces):
        if piece is not None:
            whole[i] = piece[0]
            pieces[i] = None
    return whole
