"""The run itself: rounds in new memory, blocks of every model once, in an order drawn anew for each block."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import nn

from eas_search.copying import copy_modules
from eas_search.exceptions import ConfigError
from eas_search.latency.config import LatencyConfig
from eas_search.latency.forward import TimedModel, Timer
from eas_search.models.calling import last_logits

_COPY_LIMIT_BYTES = 2**30
_LEAST_ROUNDS = 3
_MOST_REPEATS = 1000

Models = Mapping[str, nn.Module]


@dataclass
class Samples:
    """Seconds by model name: a list (rounds) of lists (blocks). `decode` is empty if a model has none."""

    prefill: dict[str, list[list[float]]] = field(default_factory=dict)
    decode: dict[str, list[list[float]]] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)


def run_interleaved(models: Models, inputs: Mapping[str, Any], config: LatencyConfig, timer: Timer) -> Samples:
    """Time every model in every block; see `measure_latency`.

    Raises:
        ConfigError: a model cannot be copied.
    """
    rng = random.Random(config.seed)
    fresh = _copies_fit(models) if config.fresh_copies is None else config.fresh_copies
    samples, begin, done, plan = Samples(), timer(), 0, None
    with _ready(models, fresh) as ready, _no_collection():
        # One model that computes every position's logits would be slower for that alone: then all of them do.
        last_only = all(last_logits(model) for model in ready.values())
        timed = {name: TimedModel(ready[name], inputs, config.decode_tokens, timer, last_only) for name in ready}
        while plan is None or done < plan.rounds:
            if plan and done >= _LEAST_ROUNDS and timer() - begin >= (config.time_limit_s or math.inf):
                break
            if fresh:
                _move(ready, rng)
            with torch.inference_mode():
                plan = plan or _plan(timed, config, begin, timer)
                _one_round(timed, plan, rng, samples)
            done += 1
    samples.conditions = {
        "rounds": done,
        "blocks": plan.blocks,
        "cut_by_time_limit": (done, plan.blocks) != (config.rounds, config.blocks),
        "fresh_copies": fresh,
        "prefill_repeats": plan.prefill_repeats,
        "decode_repeats": plan.decode_repeats,
        "logits_to_keep": int(last_only),
        "threads": torch.get_num_threads(),
        "device": str(next((p.device for model in models.values() for p in model.parameters()), "cpu")),
        "dtype": str(next((p.dtype for model in models.values() for p in model.parameters()), None)),
        "inputs": {name: list(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)},
        "seconds": timer() - begin,
        "load_average": psutil.getloadavg()[0],
        "config": config.model_dump(),
    }
    return samples


@dataclass(frozen=True)
class _Plan:
    """What one run does; `decode_repeats` is 0 unless every model can decode."""

    rounds: int
    blocks: int
    warmup: int
    prefill_repeats: int
    decode_repeats: int


def _one_round(timed: Mapping[str, TimedModel], plan: _Plan, rng: random.Random, samples: Samples) -> None:
    """Warm up, then append one row of `blocks` samples per model and phase."""
    for phase in (samples.prefill, samples.decode) if plan.decode_repeats else (samples.prefill,):
        for name in timed:
            phase.setdefault(name, []).append([])
    for block in range(plan.warmup + plan.blocks):
        for name in rng.sample(list(timed), len(timed)):
            prefill, output = timed[name].time_prefill(plan.prefill_repeats)
            decode = timed[name].time_decode(output, plan.decode_repeats) if plan.decode_repeats else None
            del output  # or its cache would still be held while the next model is timed
            if block >= plan.warmup:
                samples.prefill[name][-1].append(prefill)
                if decode is not None:
                    samples.decode[name][-1].append(decode)


def _plan(timed: Mapping[str, TimedModel], config: LatencyConfig, begin: float, timer: Timer) -> _Plan:
    """Repeats from a trial of every model, enough for the fastest; the run's size from the time left.

    A slow model or a crowded machine can make a block a hundred times longer than expected. Blocks are given
    up first, then rounds, down to three of one block, and the interval says what that costs in certainty.
    """
    most, block_s, decodes = [1, 1], 0.0, True
    for model in timed.values():
        output = model.prefill()  # the first call also builds what models build lazily
        decodes = decodes and model.can_decode(output)
        seconds = [model.time_prefill(1)[0]]
        if decodes:
            seconds.append(model.time_decode(output, 1) * config.decode_tokens)
        for phase, second in enumerate(seconds):
            needed = math.ceil(config.min_sample_s / second) if second > 0 else _MOST_REPEATS
            most[phase] = min(max(most[phase], needed), _MOST_REPEATS)
            block_s += max(second, config.min_sample_s)
    rounds, blocks, warmup = config.rounds, config.blocks, config.warmup
    if config.time_limit_s is not None and block_s > 0:
        affordable = int((config.time_limit_s - (timer() - begin)) / block_s)
        blocks = max(1, min(blocks, affordable // rounds - warmup))
        warmup = min(warmup, max(0, affordable // rounds - blocks))
        rounds = max(_LEAST_ROUNDS, min(rounds, affordable // (blocks + warmup)))
    return _Plan(rounds, blocks, warmup, most[0], most[1] if decodes else 0)


def _copies_fit(models: Models) -> bool:
    tensors = [t for model in models.values() for t in (*model.parameters(), *model.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors) < _COPY_LIMIT_BYTES


@contextmanager
def _ready(models: Models, fresh: bool) -> Iterator[dict[str, nn.Module]]:
    """The models in eval mode: themselves, or copies that share no memory, as a reloaded export shares none."""
    if fresh:
        copies = {}
        for name, model in models.items():
            try:
                copies[name] = copy_modules(model).eval()
            except (RuntimeError, TypeError) as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(f"model {name!r} cannot be copied ({reason}): set fresh_copies=False") from error
        yield copies
        return
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    try:
        yield {name: model.eval() for name, model in models.items()}
    finally:
        for module, training in modes:
            module.training = training


def _move(copies: Models, rng: random.Random) -> None:
    """Put all weights elsewhere in memory, as in a new process; copying the modules too costs far more.

    The order is random, so that no model is always the one that gets the memory freed last.
    """
    for name in rng.sample(list(copies), len(copies)):
        for tensor in (*copies[name].parameters(), *copies[name].buffers()):
            if not tensor.is_inference():  # a buffer that the forward has just made anew: it has moved already
                tensor.data = tensor.data.clone()


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection within a sample."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
