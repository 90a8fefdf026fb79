"""Decoding with a cache and `generate`, against forward passes without a cache."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from checks import SINGLE, Case, NotApplicable, Wrong, merged_student, skips
from feeds import ordinary_tokens
from torch import Tensor
from transformers import LogitsProcessor

from eas_search.models.twin import sub_configs
from eas_search.skipping import apply_skips

NEW = 3
ROWS = ("input_ids", "decoder_input_ids")
MASKS = ("attention_mask", "token_type_ids", "mm_token_type_ids", "prompt_mask")


def stream(inputs: dict[str, Tensor]) -> str:
    """The argument that decoding extends."""
    return "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"


def extended(inputs: dict[str, Tensor], new: Tensor) -> dict[str, Tensor]:
    """The inputs with further tokens [B, k] behind the text."""
    name = stream(inputs)
    out = {**inputs, name: torch.cat([inputs[name], new], dim=1)}
    if name == "input_ids":
        for mask in MASKS:
            if mask in inputs:
                fill = torch.ones_like if mask == "attention_mask" else torch.zeros_like
                out[mask] = torch.cat([inputs[mask], fill(new)], dim=1)
    return out


@torch.no_grad()
def uncached(model: Any, inputs: dict[str, Tensor], new: Tensor) -> Tensor:
    """Logits of the last prompt token and of the new tokens, [B, k + 1, V]."""
    logits = model(**extended(inputs, new), use_cache=False).logits
    return logits[:, logits.shape[1] - new.shape[1] - 1 :]


@torch.no_grad()
def cached(model: Any, inputs: dict[str, Tensor], new: Tensor) -> tuple[Tensor, Any]:
    """The same by prefill and single steps, and the cache."""
    name = stream(inputs)
    first = model(**inputs, use_cache=True)
    parts, cache = [first.logits[:, -1:]], getattr(first, "past_key_values", None)
    if cache is None:
        raise NotApplicable("the model has no KV cache")
    encoder = getattr(first, "encoder_last_hidden_state", None)
    for t in range(new.shape[1]):
        step = {name: new[:, t : t + 1], "past_key_values": cache, "use_cache": True}
        if name == "decoder_input_ids":
            if encoder is None:
                raise NotApplicable("the encoder's output is not returned")
            step["encoder_outputs"] = (encoder,)
        if "attention_mask" in inputs:
            whole = extended(inputs, new[:, : t + 1]) if name == "input_ids" else inputs
            step["attention_mask"] = whole["attention_mask"]
        parts.append(model(**step).logits[:, -1:])
    return torch.cat(parts, dim=1), cache


class Force(LogitsProcessor):
    """Makes `generate` take given tokens [B, k] whatever the logits say."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores with one finite entry per row."""
        wanted = self.tokens[:, input_ids.shape[1] - self.length]
        return torch.full_like(scores, float("-inf")).scatter(1, wanted.unsqueeze(1), 0.0)


@torch.no_grad()
def forced(model: Any, inputs: dict[str, Tensor], new: Tensor) -> tuple[Tensor, Any]:
    """Like `cached`, by `generate` with forced tokens: for models whose positions only `generate` prepares."""
    tokens = torch.cat([new, new[:, :1]], dim=1)  # the last one is chosen, never read
    out = model.generate(
        **inputs,
        max_new_tokens=tokens.shape[1],
        do_sample=False,
        logits_processor=[Force(tokens, inputs[stream(inputs)].shape[1])],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, dim=1), out.past_key_values


def tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that a cache holds, each once."""
    if isinstance(value, Tensor):
        if value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and id(value) not in seen:
        seen.add(id(value))
        yield from tensors_in(vars(value), seen)


def size(values: Iterable[Tensor]) -> int:
    """Bytes of keys and values (four-dimensional floating-point tensors)."""
    return sum(t.numel() * t.element_size() for t in values if t.is_floating_point() and t.dim() == 4)


def generator(case: Case) -> tuple[Any, Tensor]:
    """A copy of the model free for plain greedy search, and new tokens [B, k]; else not applicable."""
    model, inputs = case.model, case.inputs
    if stream(inputs) not in inputs or not getattr(model, "can_generate", lambda: False)():
        raise NotApplicable("not a generator")
    if not any(site.causal for site in case.sites):
        raise NotApplicable("no causal site")
    tokens = inputs[stream(inputs)]
    plain = copy.deepcopy(model)
    _free(plain, int(tokens[0, 0]))
    return plain, ordinary_tokens(model.config, (len(tokens), NEW), torch.Generator().manual_seed(3))


def decoder(model: Any, inputs: dict[str, Tensor], new: Tensor) -> Callable[..., tuple[Tensor, Any]]:
    """The first way of cached decoding in which the intact model agrees with itself without a cache."""
    complaints = []
    for way in (cached, forced):
        try:
            gap = apart(uncached(model, inputs, new), way(model, inputs, new)[0])
        except Exception as error:  # the intact model, not the code under test
            complaints.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")
            continue
        if gap <= SINGLE:
            return way
        complaints.append(f"it differs by {gap:.1g}")
    raise NotApplicable("the intact model's own cached decoding: " + " | ".join(complaints))


def apart(first: Tensor, second: Tensor) -> float:
    """Largest relative difference of two logit tensors."""
    both = torch.isfinite(first) | torch.isfinite(second)
    scale = max(1.0, first[torch.isfinite(first)].abs().max().item())
    return (first - second)[both].abs().max().item() / scale


def students(case: Case) -> dict[str, Any]:
    """A deleted and a merged student; both skip the first causal site and others behind it."""
    causal = [site for site in case.sites if site.causal]
    picked = {site.index: site for site in (causal[0], causal[len(causal) // 2])}
    sites = [picked[index] for index in sorted(picked)]
    merged = merged_student(case, sites, pooling="prefix")
    return {"deleted": apply_skips(case.model, skips(sites, pia_dim=0)).eval(), "merged": merged}


def decode(case: Case) -> dict[str, Any]:
    """Cached decoding of students equals passes without a cache; their cache lacks the skipped layers' bytes."""
    model, new = generator(case)
    way = decoder(model, case.inputs, new)
    base = way(model, case.inputs, new)[1]
    found: dict[str, Any] = {"way": way.__name__}
    for name, student in students(replace(case, model=model)).items():
        logits, cache = way(student, case.inputs, new)
        gap = apart(uncached(student, case.inputs, new), logits)
        if not gap <= SINGLE:
            raise Wrong(f"cached decoding ({name}) differs by {gap:.2g}, expected at most {SINGLE:g}")
        found[name] = gap
        if name == "deleted":
            found.update(_bytes(student, base, cache))
    return found


def _bytes(student: Any, base: Any, cache: Any) -> dict[str, Any]:
    """Cache bytes: what the intact model's layers at the skipped slots hold must be missing."""
    own = getattr(base, "self_attention_cache", base)
    layers = getattr(own, "layers", None)
    whole, left = size(tensors_in(base, set())), size(tensors_in(cache, set()))
    if layers is None:
        raise Wrong("the cache has no layers")
    gone = sum(size(tensors_in(layers[site.layer], set())) for site in student.eas.skipped if site.causal)
    crossed = getattr(getattr(base, "cross_attention_cache", None), "layers", None)
    # An attention to both streams at once takes its slot of the encoder's keys with it.
    both = (
        0
        if crossed is None
        else sum(size(tensors_in(crossed[s.layer], set())) for s in student.eas.skipped if s.causal)
    )
    if left not in (whole - gone, whole - gone - both) or gone == 0:
        raise Wrong(f"the cache holds {left} bytes, expected {whole} - {gone}")
    return {"cache_ratio": left / whole, "layers": len(layers), "skipped": len(student.eas.skipped)}


def generate(case: Case) -> dict[str, Any]:
    """Greedy tokens of `generate` equal those of repeated passes without a cache."""
    model, _ = generator(case)
    if wrong := _disagreement(model, case.inputs):
        raise NotApplicable(f"the intact model's own generate and greedy passes without a cache: {wrong}")
    found = {}
    for name, student in students(replace(case, model=model)).items():
        if wrong := _disagreement(student, case.inputs):
            raise Wrong(f"generate ({name}): {wrong}")
        found[name] = "equal"
    return found


def _free(model: Any, start: int) -> None:
    """No forced, suppressed or ending tokens: plain greedy search."""
    config = model.generation_config
    for name in (
        "eos_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "suppress_tokens",
        "begin_suppress_tokens",
        "bad_words_ids",
        "no_repeat_ngram_size",
        "repetition_penalty",
        "min_length",
    ):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    for name, value in (
        ("num_beams", 1),
        ("max_length", None),
        ("pad_token_id", 0),
        ("do_sample", False),
        ("decoder_start_token_id", start),
    ):
        setattr(config, name, value)


def _media_tokens(config: Any) -> list[int]:
    """Tokens that stand for images or sounds: a model that writes one cannot read its own text again."""
    found = {
        value
        for part in sub_configs(config)
        for name, value in vars(part).items()
        if re.match(r"(image|video|audio)_token_(id|index)", name) and isinstance(value, int)
    }
    return sorted(found)


@torch.no_grad()
def _disagreement(model: Any, inputs: dict[str, Tensor]) -> str:
    """'' when generate's greedy tokens are those of passes without a cache, up to ties; else what differs."""
    name = stream(inputs)
    length = inputs[name].shape[1]
    torch.manual_seed(0)
    unwritten = _media_tokens(model.config)
    try:
        result = model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=unwritten or None)
    except Exception as error:
        if hasattr(model, "eas"):
            raise
        line = (str(error).splitlines() or [""])[0][:120]
        raise NotApplicable(f"the intact model does not generate: {type(error).__name__}: {line}") from error
    tokens = result[:, length:] if result.shape[1] > length else result
    if tokens.shape[1] != 4:
        return f"{tokens.shape[1]} new tokens, expected 4"
    for t in range(4):
        last = uncached(model, inputs, tokens[:, :t])[:, -1]
        last[:, [token for token in unwritten if token < last.shape[1]]] = float("-inf")
        best = last.max(dim=-1).values
        taken = last.gather(1, tokens[:, t : t + 1]).squeeze(1)
        if (gap := (best - taken).max().item()) > SINGLE * max(1.0, best.abs().max().item()):
            return f"token {t + 1} is not the best one by {gap:.2g}"
    return ""
