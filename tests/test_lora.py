"""LoRA on kept attentions: what it computes, what it shares and how it merges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eas_search as eas
from eas_search.skip_config import SkipConfig
from eas_search.skipping import adapter_parameters, apply_skips
from eas_search.supernet import Supernet


def lora(**changes: Any) -> SkipConfig:
    return SkipConfig(**{"skip": (1,), "pia_dim": 4, "adapter_dim": 6, "adapter": "lora", "pooling": "none", **changes})


def test_only_query_and_value_of_kept_attentions_get_it_and_it_starts_as_nothing(
    llama: Any, tokens: torch.Tensor
) -> None:
    plain = apply_skips(llama, lora(adapter_dim=0))
    student = apply_skips(llama, lora())
    names = {name for name in adapter_parameters(student) if "lora" in name}
    assert names == {
        f"model.layers.{layer}.self_attn.{which}_proj.lora_{part}.default.weight"
        for layer in (0, 2, 3)
        for which in "qv"
        for part in "AB"
    }
    assert torch.equal(student(tokens).logits, plain(tokens).logits)


def test_it_adds_b_a_x_to_a_projection(llama: Any, randomise: Callable[..., nn.Module]) -> None:
    student: Any = randomise(apply_skips(llama, lora(scale=3.0)))
    layer, original = student.model.layers[0].self_attn.v_proj, llama.model.layers[0].self_attn.v_proj
    x = torch.randn(2, 3, 32)
    low = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert low[0].shape == (6, 32)
    torch.testing.assert_close(layer(x), original(x) + 3.0 * x @ low[0].T @ low[1].T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router", ["static", "routed"])
def test_merging_folds_it_into_plain_weights_and_leaves_the_original_alone(
    build_llama: Callable[..., Any],
    tokens: torch.Tensor,
    randomise: Callable[..., nn.Module],
    dtype: torch.dtype,
    router: str,
) -> None:
    model = build_llama().to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = randomise(apply_skips(model, lora(router=router, scale=0.5)))
    assert all(parameter.dtype == torch.float32 for parameter in adapter_parameters(student).values())
    expected = student(tokens).logits
    merged = eas.merge(student)
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    eas.verify_merge(student, merged, {"input_ids": tokens})
    assert torch.equal(student(tokens).logits, expected), "merging changed the student"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_training_moves_it(llama: Any, tokens: torch.Tensor) -> None:
    student = apply_skips(llama, lora())
    student(tokens, labels=tokens).loss.backward()
    gradients = {name: p.grad for name, p in adapter_parameters(student).items() if "lora_B" in name}
    assert len(gradients) == 6
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


def test_a_supernet_hands_it_down_through_a_baseline(
    llama: Any, tokens: torch.Tensor, randomise: Callable[..., nn.Module]
) -> None:
    baseline = randomise(apply_skips(llama, lora(skip=())))
    sites = eas.attention_sites(llama)
    supernet = Supernet(llama, sites, lora(skip=()))
    supernet.take_light_adapters(baseline)
    assert torch.equal(supernet.model(tokens, use_cache=False).logits, baseline(tokens).logits)
    randomise(supernet.model, seed=3)
    supernet.set_skips([1, 2])
    student = apply_skips(llama, lora(skip=(1, 2)))
    supernet.inherit(student)
    expected = supernet.model(tokens, use_cache=False).logits
    torch.testing.assert_close(student(tokens).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_it_survives_saving(
    build_llama: Callable[..., Any],
    tokens: torch.Tensor,
    randomise: Callable[..., nn.Module],
    same_model: Callable[..., None],
    tmp_path: Path,
    merged: bool,
) -> None:
    model = build_llama()
    model.config.architectures = ["LlamaForCausalLM"]
    student = randomise(apply_skips(model, lora()))
    student = eas.merge(student) if merged else student
    eas.save_pretrained(student, tmp_path / "saved")
    loaded = eas.load_pretrained(tmp_path / "saved")
    same_model(loaded, student, input_ids=tokens)


def test_the_vision_tower_keeps_its_attentions_as_they_are(llava: Any) -> None:
    sites = eas.attention_sites(llava)
    vision = [site.index for site in sites if site.tower == "vision"]
    student = apply_skips(llava, lora(skip=(vision[0],), pooling="prompt"))
    names = [name for name in adapter_parameters(student) if "lora" in name]
    assert names
    assert not any("vision" in name for name in names)
