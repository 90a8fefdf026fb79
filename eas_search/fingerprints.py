"""Fingerprints of tensors: equal contents, equal fingerprint, wherever the tensor lives.

Two multilinear hashes modulo 2⁶⁴ with random odd factors (Carter and Wegman, "Universal classes of hash functions",
1979), computed on the tensor's device: different contents of the same dtype agree with a probability of 2⁻⁶⁴ at most.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SOURCE = torch.Generator().manual_seed(20240315)
_LIMIT = 2**62
_CHUNK = 2**22  # values that are hashed at once
_factors: dict[torch.device, Tensor] = {}

Fingerprint = tuple[int, int]


def fingerprints(rows: Tensor) -> list[Fingerprint]:
    """One fingerprint per row of `rows` [N, …]. Zeros at the end of a row leave it as it is.

    The shape is no part of it; floating-point numbers count as their bits, so 0.0 and -0.0 differ.
    """
    if rows.numel() == 0:
        return [(0, 0)] * len(rows)
    bits = _bits(rows.detach().reshape(len(rows), -1))
    factors = _first_factors(bits.shape[1], bits.device)
    step = max(1, _CHUNK // bits.shape[1])
    sums = [torch.stack([(part.long() * row).sum(dim=1) for row in factors], dim=1) for part in bits.split(step)]
    return [(first, second) for first, second in torch.cat(sums).tolist()]


def fingerprint(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    """Of whole tensors with their shapes and dtypes."""
    return tuple((tuple(t.shape), str(t.dtype), fingerprints(t.reshape(1, -1))[0]) for t in tensors)


def _bits(rows: Tensor) -> Tensor:
    """The rows as integers of at most 32 bits."""
    rows = rows.contiguous()
    if rows.dtype == torch.bool:
        return rows.to(torch.int8)
    if rows.is_complex():
        rows = torch.view_as_real(rows).flatten(1)
    return rows.view({1: torch.int8, 2: torch.int16}.get(rows.element_size(), torch.int32))


def _first_factors(count: int, device: torch.device) -> Tensor:
    """[2, count] random odd factors, always the same ones."""
    home = torch.device("cpu")
    known = _factors.get(home, torch.empty(2, 0, dtype=torch.int64))
    if known.shape[1] < count:
        # One column after the other, so that a longer draw goes on where a shorter one ended.
        more = torch.randint(-_LIMIT, _LIMIT, (count - known.shape[1], 2), generator=_SOURCE).T
        known = _factors[home] = torch.cat([known, 2 * more + 1], dim=1)
    if device not in _factors or _factors[device].shape[1] < count:
        _factors[device] = known.to(device)
    return _factors[device][:, :count]
