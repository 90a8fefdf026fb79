"""One model, ready to be timed: a prefill, then greedy single-token steps on the prefill's cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from eas_search.exceptions import ConfigError
from eas_search.models.calling import last_logits, step_positions, unwrapped, without_cache

Timer = Callable[[], float]


class TimedModel:
    """A model, its inputs and a clock.  Call under `torch.inference_mode`, with the model in eval mode.

    Args:
        model: takes `inputs` as keyword arguments; a causal model returns `logits` (B, n, vocabulary) and
            `past_key_values`.  Anything else (an encoder, an encoder-decoder) has a prefill only.
        inputs: the full prompt batch, tensors on any device; `labels` are left out, a loss is not part of
            inference.
        decode_tokens: steps per decode sample, 0 for none.
        timer: clock in seconds.
        last_only: whether the last position's logits are all that is asked of a model that knows `logits_to_keep`.
    """

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Any], decode_tokens: int, timer: Timer, last_only: bool = True
    ) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        devices = {tensor.device for tensor in tensors} or {torch.device("cpu")}
        device = getattr(model, "device", None) or next((t.device for t in tensors), torch.device("cpu"))
        self.model, self.timer, self.decode_tokens = model, timer, decode_tokens
        self.devices = [d for d in devices if d.type not in ("cpu", "meta")]
        self.inputs = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
            if name != "labels"
        }
        self.inner = unwrapped(model)
        # With every position's logits, a long prompt would be timed on the vocabulary projection that no
        # generation does.
        kept = last_logits(self.inner) if last_only else {}
        # Asked for, because a model's configuration may say that it builds no cache.
        self.options: dict[str, Any] = {**dict.fromkeys(without_cache(self.inner), True), **kept}

    def prefill(self) -> Any:
        """One forward of the whole prompt batch; returns the model's output."""
        return self.model(**{**self.inputs, **self.options})

    def can_decode(self, output: Any) -> bool:
        """Whether a prefill's output can be continued token by token."""
        if self.decode_tokens == 0 or getattr(getattr(self.inner, "config", None), "is_encoder_decoder", False):
            return False
        logits = getattr(output, "logits", None)
        return logits is not None and logits.dim() == 3 and getattr(output, "past_key_values", None) is not None

    def time_prefill(self, repeats: int) -> tuple[float, Any]:
        """Seconds per prefill over `repeats` of them, and the last one's output."""
        output = None
        start = self._now()
        for _ in range(repeats):
            output = self.prefill()
        return (self._now() - start) / repeats, output

    def time_decode(self, output: Any, repeats: int) -> float:
        """Seconds per step of `decode_tokens` greedy steps; the first repeat uses `output`'s cache, others
        new ones.

        A step costs more the longer the cache is, so a longer sample comes from more prefills (not timed
        here) and never from more steps.
        """
        elapsed = 0.0
        for repeat in range(repeats):
            output = self.prefill() if repeat else output
            cache, mask = output.past_key_values, self.inputs.get("attention_mask")
            if mask is not None and mask.dim() != 2:
                raise ConfigError(
                    f"attention_mask has {mask.dim()} dimensions, expected 2 (batch, tokens) to decode with: "
                    "pass the padding mask, or set decode_tokens=0"
                )
            start = self._now()
            for _ in range(self.decode_tokens):
                token = output.logits[:, -1:].argmax(dim=-1)
                step = {"input_ids": token, "past_key_values": cache, **self.options}
                if mask is not None:
                    mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
                    step |= {"attention_mask": mask, **step_positions(self.inner, mask)}
                output = self.model(**step)
            elapsed += self._now() - start
        return elapsed / (repeats * self.decode_tokens)

    def _now(self) -> float:
        """The clock, after all work that was queued on accelerators is done."""
        for device in self.devices:
            torch.accelerator.synchronize(device)
        return self.timer()
