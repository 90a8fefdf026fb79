"""Pretraining batches: scenes with several questions each, packed behind one image.

All questions about an image share its prefix `<bos> image`. A block mask lets each question see the prefix
and itself only, and every question starts at the same position, so a packed sequence computes exactly what
separate ones would, for half the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eas_search.tasks.digit_scenes import draw_scenes
from eas_search.tasks.digits_vqa import DIGITS, PLAIN, PRETRAINING_FAMILIES, ask


@dataclass(frozen=True)
class PackedShape:
    """B images with K blocks of Q tokens each."""

    images: int
    each: int
    length: int


@dataclass(frozen=True)
class PackedBatch:
    """B images, K questions each, padded to Q tokens."""

    pixels: Tensor  # [B, 3, 32, 32], normalised
    blocks: Tensor  # [B, K, Q] token ids of questions and captions, right-padded
    targets: Tensor  # [B, K, Q]: the next token where it is an answer, told by a caption, or <eos>; else -100


def normalise(pixels: np.ndarray, mean: float = 0.5, std: float = 0.5) -> Tensor:
    """uint8 [N, 32, 32, 3] → float32 [N, 3, 32, 32], as the shipped processor does it."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).sub(mean).div(std)


def draw_packed(ids: Mapping[str, int], shape: PackedShape, captions: float, rng: np.random.Generator) -> PackedBatch:
    """Scenes on the pretraining scans; each block behind an image is a caption with probability `captions`, else a
    question of a random family.
    """
    scenes = draw_scenes("pretraining", shape.images, rng)
    tokens = np.full((shape.images, shape.each, shape.length), ids["<pad>"])
    targets = np.full_like(tokens, -100)
    families = rng.integers(len(PRETRAINING_FAMILIES), size=(shape.images, shape.each))
    for i, (digits, colours) in enumerate(zip(scenes.digits, scenes.colours, strict=True)):
        for k in range(shape.each):
            if rng.random() < captions:
                words, told = caption(digits.tolist(), colours.tolist(), rng)
            else:
                question, answer = ask(PRETRAINING_FAMILIES[families[i, k]], PLAIN, digits, colours, rng)
                words = [*question.split(), answer]
                told = {len(words) - 1}
            row = [*(ids[word] for word in words), ids["<eos>"]]
            tokens[i, k, : len(words)] = row[:-1]
            for position in (*told, len(words)):
                targets[i, k, position - 1] = row[position]
    return PackedBatch(normalise(scenes.pixels), torch.from_numpy(tokens), torch.from_numpy(targets))


def caption(digits: list[int], colours: list[int], rng: np.random.Generator) -> tuple[list[str], set[int]]:
    """Two cells in words, and the indexes of the words that the image and the words before determine.

    A cell reads "top left red seven" or "red top left seven": either order names the cell first, then tells the rest.
    """
    words: list[str] = []
    told: set[int] = set()
    for cell in rng.permutation(4)[:2].tolist():
        place, tint = [PLAIN.rows[cell // 2], PLAIN.columns[cell % 2]], [PLAIN.colours[colours[cell]]]
        first, second = (place, tint) if rng.random() < 0.5 else (tint, place)
        words += first
        told |= set(range(len(words), len(words) + len(second) + 1))
        words += [*second, DIGITS[digits[cell]]]
    return words, told


def packed_layout(prefix: int, each: int, length: int) -> tuple[Tensor, Tensor]:
    """Positions [1, T] and boolean attention mask [1, 1, T, T] for T = prefix + each · length."""
    block = torch.cat([torch.zeros(prefix, dtype=torch.long), torch.arange(each).repeat_interleave(length) + 1])
    position = torch.cat([torch.arange(prefix), torch.arange(prefix, prefix + length).repeat(each)])
    total = torch.arange(len(block))
    mask = (total[:, None] >= total[None, :]) & ((block[None, :] == 0) | (block[None, :] == block[:, None]))
    return position[None], mask[None, None]
