"""Parity with the published LaVIN-EAS, on tensors recorded from it, and what of it this package does not repeat.

Official forms that are defects are put together here, from the package's parts, to show that they are known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lavin_golden import Golden, close, golden, inserted, lavin, student_of
from torch import Tensor

from eas_search.merging import merge
from eas_search.models.lavin.masking import modality_mask
from eas_search.pooling import PoolSession, PoolState

TOLERANCE = 1e-4  # a deep stack in float32


def training_inputs(data: Golden) -> dict[str, Tensor]:
    """The recorded batch in this package's layout; label 0, and every inserted position, counts as no label."""
    with_image = data["in__img_indicators"].tolist()
    ids, labels = [], []
    for tokens, targets, image in zip(data["in__examples"], data["in__labels"], with_image, strict=True):
        row = inserted(tokens.tolist(), bool(image), data, features=2)
        new = len(row) - len(tokens)
        ids.append(row[: len(tokens)])
        labels.append([0, int(targets[0]), *([0] * (new - 1)), *targets[1:].tolist()][: len(tokens)])
    wanted = torch.tensor(labels)
    return {
        "input_ids": torch.tensor(ids),
        "pixel_values": data["in__images"][data["in__img_indicators"].bool()],
        "labels": wanted.masked_fill(wanted == 0, -100),
    }


@torch.no_grad()
def test_training_form() -> None:
    data, hyper = golden("lavin_model")
    student, inputs = student_of(lavin(data, hyper), data, hyper), training_inputs(data)
    close(student.model.image_features(data["in__images"]), data["out__image_cls_features"], TOLERANCE)
    close(student.model.get_image_features(data["in__images"]), data["out__image_embeds"], TOLERANCE)
    assert torch.equal(inputs["labels"].clamp(min=0), data["out__labels_after_insertion"])
    layers: list[Tensor] = []
    stack = student.model.language_model
    stack.layers[0].register_forward_pre_hook(lambda module, args, kwargs: layers.append(args[0]), with_kwargs=True)
    for layer in stack.layers:
        layer.register_forward_hook(lambda module, args, output: layers.append(output))
    # The published means run over the whole row: over its answer and over its padding, which is not masked either.
    output = student(**inputs, prompt_mask=torch.ones_like(inputs["input_ids"]), use_cache=False)
    close(layers[0], data["out__h0"], TOLERANCE)
    mask = modality_mask(stack.config, layers[0], None, None)
    assert torch.equal(mask[:1], data["out__mask"] == 0)
    close(torch.stack(layers[1:]), data["out__layer_outputs"], TOLERANCE)
    close(output.logits, data["out__logits"], TOLERANCE)
    close(output.loss, data["out__loss"], TOLERANCE)


@torch.no_grad()
def test_answers_enter_the_published_means_but_not_ours() -> None:
    data, hyper = golden("lavin_model")
    student, inputs = student_of(lavin(data, hyper), data, hyper), training_inputs(data)
    last = int((inputs["labels"][0] != -100).nonzero()[-1])
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, last] = (changed["input_ids"][0, last] + 1) % 100
    for prompt_mask, leaks in ((torch.ones_like(inputs["input_ids"]), True), (None, False)):
        logits = [student(**one, prompt_mask=prompt_mask).logits[0, :last] for one in (inputs, changed)]
        assert ((logits[0] - logits[1]).abs().max() > 0.05) == leaks
        assert torch.equal(logits[0], logits[1]) != leaks


def decoding(data: Golden) -> tuple[dict[str, Tensor], int]:
    """(prompts, number P of their tokens without the modality token)."""
    with_image = data["in__img_indicators"].bool()
    rows = [
        inserted([1, *data[f"in__prompt{i}"].tolist()], bool(image), data, features=2)
        for i, image in enumerate(with_image)
    ]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "pixel_values": data["in__images"][with_image]}, ids.shape[1] - 1


def recorded_decoding() -> tuple[Any, Golden, dict[str, Any]]:
    data, hyper = golden("lavin_decode")
    hyper["temperature"] = hyper["temperature_router"]
    return student_of(lavin(data, hyper), data, hyper), data, hyper


Step = Callable[[Any, int], None]


@torch.no_grad()
def steps(student: Any, data: Golden, offset: int | None, before: Step | None = None) -> list[Tensor]:
    """Logits of the prefill and of three tokens after it, those that the published decoding chose.

    `offset` is added to the published positions, which are one too small; None leaves them to the model.
    """
    prompts, length = decoding(data)
    output = student(**prompts, use_cache=True)
    cache, found = output.past_key_values, [output.logits[:, -1]]
    for step in range(1, 4):
        if before is not None:
            before(cache, length + step - 1)
        at = {} if offset is None else {"position_ids": torch.full((2, 1), length + step - 1 + offset)}
        token = data["out__next_tokens"][:, step - 1 : step]
        found.append(student(input_ids=token, past_key_values=cache, use_cache=True, **at).logits[:, -1])
    return found


def check_steps(found: list[Tensor], data: Golden, name: str) -> None:
    for step, logits in enumerate(found):
        close(logits, data["out__logits_step0" if step == 0 else f"out__{name}_step{step}"], TOLERANCE)


@torch.no_grad()
def test_prefill_means_and_expert_weights() -> None:
    """What a cache keeps of the prompt: the pooled term, and the router's logits."""
    student, data, hyper = recorded_decoding()
    prompts, _ = decoding(data)
    outputs: list[Tensor] = []
    layers = student.model.language_model.layers
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    output = student(**prompts, use_cache=True, output_hidden_states=True)
    close(output.hidden_states[0], data["out__h_step0"], TOLERANCE)
    close(torch.stack(outputs), data["out__layer_outputs_step0"], TOLERANCE)
    means = []
    for i, (layer, slot) in enumerate(zip(layers, output.past_key_values.layers, strict=True)):
        skipped = i in hyper["skipped_layers"]
        pia, key = (layer.pia_ffn, "ffn") if skipped else (layer.self_attn.eas_adapter, "adapter")
        router = (slot.states[f"{key}.router"].value + pia.router_bias) / hyper["temperature"]
        close(torch.softmax(router, dim=-1).squeeze(1), data["out__router_weights"][i], TOLERANCE)
        if skipped:
            means.append((slot.states["ffn.pool"].value + pia.pool.bias).transpose(1, 2))
    close(torch.stack(means), data["out__mean_prefill"], TOLERANCE)


def test_decoding_counts_positions_on_and_keeps_the_mean_of_the_prompt() -> None:
    student, data, _ = recorded_decoding()
    check_steps(steps(student, data, offset=None), data, "variant_frozen_pos_plus_one_logits")
    check_steps(steps(merge(student), data, offset=None), data, "variant_frozen_pos_plus_one_logits")


def test_published_decoding() -> None:
    """Positions one too small, and the pooled term of the one new token."""
    student, data, hyper = recorded_decoding()

    def forget(cache: Any, start: int) -> None:
        for layer in hyper["skipped_layers"]:
            del cache.layers[layer].states["ffn.pool"]

    found = steps(student, data, offset=0, before=forget)
    check_steps(found, data, "logits")
    chosen = torch.stack([logits.argmax(dim=-1) for logits in found], dim=1)
    assert torch.equal(chosen, data["out__next_tokens"])


def test_published_positions_with_the_mean_of_the_prompt() -> None:
    student, data, _ = recorded_decoding()
    check_steps(steps(student, data, offset=0), data, "variant_frozen_logits")


def test_published_positions_with_a_running_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variant in which each new token enters the pooled term with weight 1 / (start + 1)."""
    student, data, _ = recorded_decoding()
    starts: list[int] = []
    own = PoolSession.mean

    def running(self: PoolSession, key: str, x: Tensor, weight: Tensor | None = None) -> Tensor:
        state = (self.states or {}).get(key)
        if key != "ffn.pool" or state is None or weight is None:
            return own(self, key, x, weight)
        value = (starts[-1] * state.value + x @ weight.T) / (starts[-1] + 1)
        assert self.states is not None
        self.states[key] = PoolState(value)
        return value

    monkeypatch.setattr(PoolSession, "mean", running)
    check_steps(
        steps(student, data, offset=0, before=lambda cache, start: starts.append(start)),
        data,
        "variant_running_logits",
    )


@torch.no_grad()
def test_decoding_is_the_training_form_on_the_same_tokens() -> None:
    student, data, _ = recorded_decoding()
    prompts, length = decoding(data)
    found = steps(student, data, offset=None)
    for step, logits in enumerate(found):
        ids = torch.cat([prompts["input_ids"], data["out__next_tokens"][:, :step]], dim=1)
        whole = {**prompts, "input_ids": ids, "use_cache": False}
        prompt = torch.arange(ids.shape[1]).expand(2, -1) <= length
        close(student(**whole, prompt_mask=prompt).logits[:, -1], logits, TOLERANCE)
        published = student(**whole, prompt_mask=torch.ones_like(ids)).logits[:, -1]
        close(published, data[f"out__training_form_logits_step{step}"], TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_generate_chooses_what_the_steps_choose(options: dict[str, Any]) -> None:
    student, data, _ = recorded_decoding()
    prompts, length = decoding(data)
    tokens = student.generate(**prompts, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options)
    chosen = tokens[:, length + 1 :]
    with torch.no_grad():
        mask = torch.arange(tokens.shape[1]).expand(2, -1) <= length
        logits = student(**{**prompts, "input_ids": tokens}, prompt_mask=mask, use_cache=False).logits
    logits[..., 2] = float("-inf")  # min_new_tokens
    assert torch.equal(logits[:, length:-1].argmax(dim=-1), chosen)
