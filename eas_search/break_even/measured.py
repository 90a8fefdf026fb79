"""The attentions' share of the time, measured: few blocks of the real size, intact, without attention, and left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from eas_search.architectures import attention_sites
from eas_search.architectures.calls import CallForm, call_form
from eas_search.break_even.stack import Stack, main_stack
from eas_search.break_even.values import Gain
from eas_search.latency import LatencyConfig, measure_latency
from eas_search.latency.values import PhaseLatency, Ratio
from eas_search.models.twin_inputs import ordinary_tokens
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips, compute_all_tokens, share_copy

Models = dict[str, nn.Module]


class PassOn:
    """A block's `forward` that hands the residual stream on: what is left of the model is everything else."""

    def __init__(self, form: CallForm) -> None:
        self.form = form

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [B, n, d] as they came, in the form that callers of the block expect."""
        return self.form.pack(self.form.first(args, kwargs), args, kwargs)


def build_models(shallow: nn.Module) -> Models:
    """`intact`, `deleted` (a student without the main stack's self-attentions), and both with no block at all: `rest`
    and `deleted_rest`. All share their weights.
    """
    stack = main_stack(shallow)
    skip = tuple(site.index for site in attention_sites(shallow) if site.name in {own.name for own in stack.sites})
    deleted = apply_skips(shallow, SkipConfig(skip=skip, pia_dim=0, placement="residual", pooling="none"))
    # What an attention costs is the same everywhere; what its FFN saves at the end of a stack comes on top.
    compute_all_tokens(deleted)
    return {
        "intact": shallow,
        "deleted": deleted,
        "rest": _without_blocks(shallow, stack.blocks),
        "deleted_rest": _without_blocks(deleted, stack.blocks),
    }


def _without_blocks(model: nn.Module, blocks: Sequence[str]) -> nn.Module:
    rest = share_copy(model)
    for path in blocks:
        block = rest.get_submodule(path)
        block.__dict__["forward"] = PassOn(call_form(getattr(block, "original", type(block))))
    return rest


def model_inputs(model: Any, tower: str, batch: int, context: int) -> dict[str, Tensor]:
    """Random inputs: `context` tokens of text, or one image per sample.

    Args:
        model: built.
        tower: the one that is measured.
        batch: samples.
        context: tokens of each; an image has as many as it has.
    """
    generator = torch.Generator().manual_seed(0)
    if tower == "text":
        words = model.config.get_text_config(decoder=True).vocab_size
        return {"input_ids": ordinary_tokens(model.config, (batch, context), generator, words).to(model.device)}
    size, channels = model.config.image_size, getattr(model.config, "num_channels", 3)
    height, width = size[-2:] if isinstance(size, tuple | list) else (size, size)
    image = torch.randn(batch, channels, height, width, generator=generator)
    return {"pixel_values": image.to(model.device, model.dtype)}


def measure_point(
    models: Models, inputs: Mapping[str, Tensor], blocks: tuple[int, int], config: LatencyConfig, spares: bool
) -> tuple[Gain, Gain | None]:
    """(prefill, decode or None) of one grid point, all models interleaved.

    Args:
        models: see `build_models`.
        inputs: of all of them.
        blocks: (blocks of the models, blocks of the whole model).
        config: how thoroughly.
        spares: see `Stack.spares`.
    """
    candidates = {name: model for name, model in models.items() if name != "intact"}
    report = measure_latency(candidates, inputs, baseline=models["intact"], config=config)
    prefill = {name: latency.prefill for name, latency in report.items()}
    decode = {name: latency.decode for name, latency in report.items() if latency.decode is not None}
    ratios, seconds = _phase(prefill)
    if not decode:
        return _gain(ratios, seconds, blocks), None
    decode_ratios, decode_seconds = _phase(decode)
    one_token = None
    if spares:
        one_token = decode_seconds * (decode_ratios["deleted"].estimate - decode_ratios["deleted_rest"].estimate)
    return _gain(ratios, seconds, blocks, one_token), _gain(decode_ratios, decode_seconds, blocks)


def _phase(phases: Mapping[str, PhaseLatency]) -> tuple[dict[str, Ratio], float]:
    """(ratios to the intact model by name, its seconds)."""
    return {name: phase.ratio for name, phase in phases.items()}, phases["rest"].baseline.median


def _gain(ratios: Mapping[str, Ratio], seconds: float, blocks: tuple[int, int], one_token: float | None = None) -> Gain:
    """a of the whole model from times relative to the intact one with m of its L blocks.

    With T of the intact model and R of its rest a block costs (T - R) / m, so a model of L blocks takes
    R + (L/m)(T - R); likewise with D and R' of the student, whose hooks cost something once and not per block:

        a = 1 - (R' + (L/m)(D - R')) / (R + (L/m)(1 - R)),  T = 1.

    A block takes no less than nothing, so a rest counts as its model where it comes out above it. The interval adds up
    what the intervals of the three ratios do to a, each on its own, as independent.

    A block at the end of the stack saves, beside its attention, (D - R')/m less what one token takes there:
    `one_token` seconds in the m blocks, as in a decode step; None where nothing is saved.
    """
    factor = blocks[1] / blocks[0]
    names = ("deleted", "rest", "deleted_rest")

    def whole(time: float, rest: float) -> float:
        rest = min(rest, time)
        return rest + factor * (time - rest)

    def share(deleted: float, rest: float, deleted_rest: float) -> float:
        return 1 - whole(deleted, deleted_rest) / whole(1.0, rest)

    middle = {name: ratios[name].estimate for name in names}
    centre, below, above = share(**middle), 0.0, 0.0
    for name in names:
        ends = [share(**{**middle, name: end}) - centre for end in (ratios[name].low, ratios[name].high)]
        below, above = math.hypot(below, min(0.0, *ends)), math.hypot(above, max(0.0, *ends))
    every_token = max(0.0, middle["deleted"] - middle["deleted_rest"])
    saved = 0.0 if one_token is None else max(0.0, every_token - max(0.0, one_token) / seconds)
    spared = factor * saved / whole(1.0, middle["rest"])
    return Gain(centre, centre - below, min(centre + above, 1 - 1e-6), seconds, spared)


def parameter_bytes(stack: Stack, layers: int, itemsize: int) -> int:
    """Bytes of a shallow model, nearly: its blocks, embeddings and head."""
    per_block = sum(p.numel() for path in stack.blocks for p in stack.model.get_submodule(path).parameters())
    embeddings = stack.model.get_input_embeddings()
    words = sum(p.numel() for p in embeddings.parameters()) if stack.sites[0].tower == "text" else 0
    head = 0 if getattr(stack.text, "tie_word_embeddings", False) else stack.head()
    return (per_block * layers // len(stack.blocks) + words + head) * itemsize


def activation_bytes(stack: Stack, point: tuple[int, int], itemsize: int) -> int:
    """Bytes beside the weights for one (context, batch): the cache, and a block's widest activations a few times."""
    context, batch = point
    widest = max(p.shape[0] for path in stack.blocks[:1] for p in stack.model.get_submodule(path).parameters())
    return batch * (stack.kv_bytes(context, itemsize) + 6 * context * widest * itemsize)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def cheapest_first(stack: Stack, points: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Points (context, batch) by the FLOPs of their prefill."""
    flops = sum(2 * entries * share for entries, share in stack.matrices())
    scores = stack.costs[0].heads
    return sorted(points, key=lambda p: p[1] * (flops * p[0] + len(stack.costs) * scores.score_flops(p[0] ** 2)))
