"""`break_even`: the grid, point by point, measured where that is sensible and counted elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import nn

from eas_search.break_even.measured import (
    Models,
    activation_bytes,
    build_models,
    cheapest_first,
    free_bytes,
    measure_point,
    model_inputs,
    parameter_bytes,
)
from eas_search.break_even.stack import Stack, main_stack
from eas_search.break_even.values import BreakEven, BreakEvenSettings, Gain, GridPoint
from eas_search.exceptions import ConfigError, EasSearchError
from eas_search.latency import LatencyConfig
from eas_search.models.loading import resolve_device
from eas_search.models.shallow import period, shallow_model

CONTEXTS = (64, 512, 2048, 8192)
SMALL_BYTES = 2**30  # up to here a CPU times the blocks unasked
WHOLE_BYTES = 2**26  # up to here all blocks are built, and nothing has to be inferred from a few
_LEAST_PASSES = 24  # of one point: four models, three rounds, a warm-up and the plan
Point = tuple[int, int]
News = Callable[[str], None]


def break_even(
    model: nn.Module, settings: BreakEvenSettings | None = None, news: News = lambda text: None
) -> BreakEven:
    """The most that skipping attentions of `model` can gain in prefill, decode and KV cache, over context × batch.

    S(k) = 1 / (1 - a k/L), with L attentions, k of them skipped, and a their share of the time, measured with all of
    them deleted from a few blocks of the real size with random weights; see `measured`. Where that is not sensible a is
    the share of FLOPs (prefill) or of bytes read (decode). The last k of a decoder gain more in prefill, see
    `Gain.speedup_of_last`. The part of a model is its main stack (the text tower of a multimodal one) with embeddings
    and head.

    Args:
        model: of which only the class, the configuration and the shapes are read; it may be on the meta device.
        settings: the grid, the device and the precision.
        news: told what is being done.

    Raises:
        UnsupportedModelError: the model has not one stack of self-attentions.
        ConfigError: a context beyond the model's positions, or a device that is not there.
    """
    settings = settings or BreakEvenSettings()
    stack = main_stack(model)
    device, dtype = resolve_device(settings.device), getattr(torch, settings.dtype)
    # Each once: a point that is asked for twice would be measured twice, and counted as two.
    points = list(dict.fromkeys(product(_contexts(stack, settings), settings.batches)))
    layers, why_not = _layers_to_measure(stack, settings, device)
    gains: dict[Point, tuple[Gain, Gain | None]] = {}
    notes: list[str] = []
    if not why_not:
        try:
            news(f"building {layers} of {len(stack.blocks)} blocks")
            shallow = shallow_model(model, layers, len(stack.blocks), device, dtype)
            gains = _measure(stack, build_models(shallow), points, settings, notes, news)
        except EasSearchError as error:
            why_not = f"it cannot be built with fewer layers: {error}"
    how = f"measured on {device} in {settings.dtype}: {layers} of {len(stack.blocks)} blocks, random weights"
    counted = "counted (FLOPs in prefill, bytes read in decode)"
    method = f"{counted}: {why_not}" if why_not else how if len(gains) == len(points) else f"{how}; the rest {counted}"
    return BreakEven(
        model=type(model).__name__,
        tower=stack.sites[0].tower,
        layers=len(stack.sites),
        points=tuple(_point(stack, point, gains.get(point), dtype.itemsize) for point in points),
        method=method,
        notes=(*_left_out(stack), *notes),
        conditions={
            "device": str(device),
            "dtype": settings.dtype,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "settings": settings.model_dump(),
        },
    )


def _contexts(stack: Stack, settings: BreakEvenSettings) -> tuple[int, ...]:
    """The contexts of the grid; an image has its own length."""
    if stack.sites[0].tower != "text":
        return (_image_tokens(stack),)
    limit = getattr(stack.text, "max_position_embeddings", None)
    room = settings.decode_tokens if stack.causal else 0
    limit = limit - room if type(limit) is int and limit > room else None
    if settings.contexts is None:
        chosen = tuple(context for context in CONTEXTS if limit is None or context <= limit)
        return chosen if len(chosen) > 1 else (*chosen, limit or CONTEXTS[0])
    if limit is not None and max(settings.contexts) > limit:
        raise ConfigError(
            f"context {max(settings.contexts)} is beyond the model's positions; expected at most {limit} tokens "
            f"(and {room} more to decode)"
        )
    return settings.contexts


def _image_tokens(stack: Stack) -> int:
    """Tokens of one image, from a pass without numbers."""
    seen: list[int] = []
    block = stack.model.get_submodule(stack.blocks[0])
    hook = block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    try:
        with torch.no_grad():
            size, channels = stack.model.config.image_size, getattr(stack.model.config, "num_channels", 3)
            height, width = size[-2:] if isinstance(size, tuple | list) else (size, size)
            stack.model(pixel_values=torch.zeros(1, channels, height, width, device=stack.model.device))
    finally:
        hook.remove()
    return seen[0]


def _layers_to_measure(stack: Stack, settings: BreakEvenSettings, device: torch.device) -> tuple[int, str]:
    """(layers of the model to build, '') or (0, why nothing is measured)."""
    if settings.measure == "never":
        return 0, "--measure never"
    itemsize = getattr(torch, settings.dtype).itemsize
    layers = len(stack.blocks)
    if parameter_bytes(stack, layers, itemsize) > WHOLE_BYTES:
        try:
            layers = period(stack.model, stack.blocks)
        except EasSearchError as error:
            return 0, str(error)
    size, free = parameter_bytes(stack, layers, itemsize), free_bytes(device)
    if size > 0.8 * free:
        return 0, f"{layers} blocks and the embeddings need {size / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
    if settings.measure == "auto" and device.type == "cpu" and size > SMALL_BYTES:
        return 0, (
            f"{layers} blocks and the embeddings hold {size / 2**30:.1f} GiB, more than is timed on a CPU unasked: "
            "--measure always does it"
        )
    return layers, ""


def _measure(
    stack: Stack,
    models: Models,
    points: list[Point],
    settings: BreakEvenSettings,
    notes: list[str],
    news: News,
) -> dict[Point, tuple[Gain, Gain | None]]:
    """Cheapest point first, until the time is up."""
    gains: dict[Point, tuple[Gain, Gain | None]] = {}
    begin, order = time.perf_counter(), cheapest_first(stack, points)
    limit = None if settings.measure == "always" else settings.time_limit_s
    device, itemsize = resolve_device(settings.device), getattr(torch, settings.dtype).itemsize
    seconds_per_token = 0.0  # of one prefill and one decode, at the last point
    blocks = (len(main_stack(models["intact"]).blocks), len(stack.blocks))
    for number, point in enumerate(order, 1):
        left = None if limit is None else limit - (time.perf_counter() - begin)
        expected = _LEAST_PASSES * seconds_per_token * point[0] * point[1]
        if gains and left is not None and expected > left:
            notes.append(f"not measured within {limit:g} s: {len(order) - number + 1} of {len(order)} points")
            break
        if activation_bytes(stack, point, itemsize) > 0.8 * free_bytes(device):
            notes.append(f"context {point[0]}, batch {point[1]} was not measured: it does not fit in the free memory")
            continue
        news(f"measuring context {point[0]}, batch {point[1]} ({number} of {len(order)})")
        # Later points cost more: one share too many is kept back for them.
        share = None if left is None else max(1.0, left / (len(order) - number + 2))
        config = LatencyConfig(decode_tokens=settings.decode_tokens if stack.causal else 0, time_limit_s=share)
        inputs = model_inputs(models["intact"], stack.sites[0].tower, point[1], point[0])
        gains[point] = measure_point(models, inputs, blocks, config, stack.spares)
        prefill, decode = ((gain and gain.seconds) or 0.0 for gain in gains[point])
        seconds_per_token = (prefill + settings.decode_tokens * decode) / (point[0] * point[1])
    return gains


def _point(stack: Stack, point: Point, measured: tuple[Gain, Gain | None] | None, itemsize: int) -> GridPoint:
    context, batch = point
    decode: Gain | None
    if measured is not None:
        prefill, decode = measured
    else:
        prefill = Gain.counted(stack.prefill_share(context), stack.spared_share(context))
        decode = Gain.counted(stack.decode_share(context, batch, itemsize)) if stack.causal else None
    return GridPoint(context, batch, prefill, decode, stack.kv_bytes(context, itemsize))


def _left_out(stack: Stack) -> list[str]:
    """What the figures leave out."""
    notes = []
    config: Any = stack.model.config
    if stack.sites[0].tower == "text" and config.get_text_config(decoder=True) is not config:
        notes.append("text tower only: images and sounds add time that skipping text attentions cannot save")
    if len(stack.sites) < len(stack.blocks):
        notes.append(f"{len(stack.blocks) - len(stack.sites)} of {len(stack.blocks)} blocks have no attention to skip")
    return notes
