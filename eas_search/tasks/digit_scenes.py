"""Scenes of four real handwritten digits on a 2×2 grid, each with its own tint.

Every cell of the 32×32 RGB image shows one UCI scan (8×8, from scikit-learn), shifted, scaled and slightly rotated.
Four pools of scans that do not overlap serve pretraining, training, validation and test.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 32
CELL = IMAGE_SIZE // 2
TINTS = np.array([[235, 45, 45], [45, 205, 70], [70, 100, 255], [245, 225, 50]], dtype=np.float64)  # RGB

POOL_SIZES = {"pretraining": 900, "train": 450, "validation": 150, "test": 297}  # in all 1,797 scans


@dataclass(frozen=True)
class Scenes:
    """N scenes; the four cells in reading order. `scans` indexes scikit-learn's 1,797 digits."""

    pixels: NDArray[np.uint8]  # [N, 32, 32, 3]
    scans: NDArray[np.int64]  # [N, 4]
    digits: NDArray[np.int64]  # [N, 4], 0–9
    colours: NDArray[np.int64]  # [N, 4], index into TINTS, all different


def draw_scenes(pool: str, count: int, rng: np.random.Generator) -> Scenes:
    """`count` random scenes on the scans of `pool`, rendered together."""
    images, labels = _scans()
    scans = rng.choice(scan_pool(pool), size=(count, 4))
    colours = rng.permuted(np.tile(np.arange(4), (count, 1)), axis=1)
    return Scenes(_render(images[scans], colours, rng), scans, labels[scans], colours)


@cache
def scan_pool(pool: str) -> NDArray[np.int64]:
    """Indexes of the scans that belong to `pool` (a key of POOL_SIZES); pools do not overlap."""
    names = list(POOL_SIZES)
    start = sum(POOL_SIZES[name] for name in names[: names.index(pool)])
    order = np.random.default_rng(1797).permutation(sum(POOL_SIZES.values()))
    return np.sort(order[start : start + POOL_SIZES[pool]])


@cache
def _scans() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scans [1797, 8, 8] with values in 0–1, and their digits [1797]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images / 16.0, bunch.target.astype(np.int64)


def _render(scans: NDArray[np.float64], colours: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Scans [N, 4, 8, 8] and colours [N, 4] → pixels [N, 32, 32, 3], by an inverse affine map, bilinear."""
    n = len(scans)
    size = rng.uniform(11.0, 15.0, (n, 4, 1, 1))  # pixels that the 8 scan pixels cover
    angle = rng.uniform(-0.15, 0.15, (n, 4, 1, 1))  # radians
    light = rng.uniform(0.75, 1.0, (n, 4, 1, 1))
    centre = CELL / 2 - 0.5 + rng.uniform(-1, 1, (2, n, 4, 1, 1)) * (CELL - size) / 2
    y, x = np.mgrid[:CELL, :CELL].reshape(2, 1, 1, CELL, CELL) - centre
    sine, cosine = np.sin(angle) * 8 / size, np.cos(angle) * 8 / size
    # One pixel of black on every side: coordinates outside the scan then read black without a special case.
    v = np.clip(cosine * y - sine * x + 4.5, 0, 8.999)
    u = np.clip(sine * y + cosine * x + 4.5, 0, 8.999)
    padded = np.pad(scans, ((0, 0), (0, 0), (1, 1), (1, 1))).reshape(n, 4, 100)
    v0, u0 = v.astype(np.int64), u.astype(np.int64)
    fv, fu = v - v0, u - u0

    def at(row: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.take_along_axis(padded, (row * 10 + column).reshape(n, 4, -1), axis=2).reshape(v.shape)

    ink = (1 - fv) * ((1 - fu) * at(v0, u0) + fu * at(v0, u0 + 1))
    ink += fv * ((1 - fu) * at(v0 + 1, u0) + fu * at(v0 + 1, u0 + 1))
    cells = (ink * light)[..., None] * TINTS[colours][:, :, None, None, :]
    grid = cells.reshape(n, 2, 2, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(np.rint(grid.reshape(n, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8))
