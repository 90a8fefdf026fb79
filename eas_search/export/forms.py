"""The forms in which a model is asked: one row or several, padding left, right or none, with and without a KV cache.

A reloaded model must answer in each of them as the trained student did in the same form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from eas_search.models.calling import step_positions, without_cache

Rows = Literal["one", "several"]
Padding = Literal["none", "left", "right"]
CacheKind = Literal["off", "dynamic", "static"]
Inputs = dict[str, Tensor]
EXTRA_PADDING, STEPS = 3, 2


@dataclass(frozen=True)
class Form:
    """One way of asking. `cache` other than `off`: a prefill, then `STEPS` further tokens one by one."""

    rows: Rows
    padding: Padding
    cache: CacheKind = "off"

    @property
    def name(self) -> str:
        """For reports and as a key: `several rows, left padding, static cache`."""
        rows = "one row" if self.rows == "one" else "several rows"
        cache = "no cache" if self.cache == "off" else f"{self.cache} cache"
        return f"{rows}, {self.padding} padding, {cache}"


def forms_of(model: Any, inputs: Inputs) -> list[Form]:
    """The forms that make sense for this model and these inputs."""
    paddings = get_args(Padding) if is_padded_text(inputs) else ("none",)
    return [
        Form(rows, padding, cache)
        for rows in get_args(Rows)
        for padding in paddings
        for cache in cache_kinds(model, inputs)
        if arrange(inputs, rows, padding, 0) is not None
    ]


def cache_kinds(model: Any, inputs: Inputs) -> list[CacheKind]:
    """The KV caches that a model can work with; an encoder has none, an encoder-decoder is asked by generating."""
    kinds: list[CacheKind] = ["off"]
    config = model.config
    decodes = model.can_generate() and is_padded_text(inputs) and not getattr(config, "is_encoder_decoder", False)
    if decodes and without_cache(model):
        kinds.append("dynamic")
        if getattr(model, "_can_compile_fullgraph", False):  # how transformers says that a static cache works
            kinds.append("static")
    return kinds


def is_padded_text(inputs: Inputs) -> bool:
    """Whether there are rows of tokens [B, n] with a mask, which can be padded on either side."""
    tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    return tokens is not None and tokens.dim() == 2 and mask is not None and mask.shape == tokens.shape


def arrange(inputs: Inputs, rows: Rows, padding: Padding, pad: int) -> Inputs | None:
    """The inputs as `rows` and `padding` want them; None when they cannot be brought into that form.

    Args:
        inputs: a batch, e.g. input_ids [B, n], attention_mask [B, n], pixel_values [B, …].
        rows: `one` takes the first row; `several` without padding takes rows of one length.
        padding: `left` and `right` add `EXTRA_PADDING` tokens beyond the longest row.
        pad: token for padding.
    """
    batch = len(next(iter(inputs.values())))
    sliceable = all(len(tensor) == batch for tensor in inputs.values())
    if not is_padded_text(inputs):
        if rows == "one":
            return {name: tensor[:1] for name, tensor in inputs.items()} if sliceable else None
        return inputs
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    chosen = [0] if rows == "one" else list(range(batch))
    if rows == "several" and padding == "none" and len(set(lengths)) > 1:
        common, count = Counter(lengths).most_common(1)[0]
        chosen = [i for i in chosen if lengths[i] == common] if count > 1 else [0, 0]
    if chosen != list(range(batch)):
        if not sliceable:
            return None
        inputs = {name: tensor[chosen] for name, tensor in inputs.items()}
    return _pad(inputs, padding, pad)


def _pad(inputs: Inputs, padding: Padding, pad: int) -> Inputs:
    """Every tensor that runs along the tokens, with its visible tokens at one end."""
    tokens, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    width = int(mask.sum(dim=1).max()) + (0 if padding == "none" else EXTRA_PADDING)
    moved = dict(inputs)
    for name, tensor in inputs.items():
        if tensor.shape[:2] == tokens.shape:
            fill = pad if name == "input_ids" else 0
            moved[name] = tensor.new_full((len(tensor), width, *tensor.shape[2:]), fill)
            for i, row in enumerate(mask):
                values = tensor[i, row]
                moved[name][i, width - len(values) if padding == "left" else 0 :][: len(values)] = values
    return moved


@torch.no_grad()
def answer(model: Any, inputs: Inputs, form: Form, positions: int) -> dict[str, Tensor]:
    """What a model answers in a form, float32 on the CPU.

    Args:
        model: called with `inputs` as keyword arguments.
        inputs: as `arrange` gives them, on the model's device.
        form: its cache is used.
        positions: visible tokens per row whose outputs are kept, evenly spaced with the last one.

    Returns:
        By name: [Σ positions, …] where an output runs along the tokens, else the output; `step` [B, STEPS, vocabulary]
        for the tokens after the prompt.
    """
    if form.cache == "off":
        return _outputs(model(**inputs, **without_cache(model)), inputs, positions)
    mask = inputs["attention_mask"]
    last = torch.stack([row.nonzero()[-1] for row in mask])
    after = inputs["input_ids"].gather(1, last)  # an ordinary token of each row, again
    cache = _cache(model, form.cache, mask.shape[1] + STEPS)
    kept = _outputs(model(**inputs, past_key_values=cache, use_cache=True), inputs, positions)
    steps = []
    for _ in range(STEPS):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        place = step_positions(model, mask)
        output = model(input_ids=after, attention_mask=mask, past_key_values=cache, use_cache=True, **place)
        steps.append(output.logits[:, -1].float().cpu())
    return {**kept, "step": torch.stack(steps, dim=1)}


def _cache(model: Any, kind: CacheKind, length: int) -> Cache:
    config = model.config.get_text_config(decoder=True)
    return StaticCache(config=config, max_cache_len=length) if kind == "static" else DynamicCache(config=config)


def _outputs(output: Mapping[str, Any], inputs: Inputs, positions: int) -> dict[str, Tensor]:
    """The logits, or every tensor of a model without any, at the kept positions."""
    names = ["logits"] if "logits" in output else [n for n, v in output.items() if isinstance(v, Tensor)]
    found = {}
    for name in names:
        value = output[name]
        if is_padded_text(inputs) and value.dim() > 2 and value.shape[:2] == inputs["input_ids"].shape:
            rows = []
            for row, mask in zip(value, inputs["attention_mask"].bool(), strict=True):
                visible = row[mask]
                back = torch.linspace(0, len(visible) - 1, min(positions, len(visible))).round().long()
                rows.append(visible[(len(visible) - 1 - back).flip(0).to(visible.device)])
            value = torch.cat(rows)
        found[name] = value.float().cpu().contiguous()
    return found


@torch.no_grad()
def generate(model: Any, inputs: Inputs, new_tokens: int, cache: CacheKind) -> Tensor:
    """Greedy tokens of a model with one kind of cache, [B, …]."""
    options: dict[str, Any] = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    elif cache == "off":
        options["use_cache"] = False
    tokens: Tensor = model.generate(**inputs, **options)
    return tokens.cpu()
