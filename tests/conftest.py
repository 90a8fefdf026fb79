"""Tiny models of real architectures, with random weights large enough that every part of them shows in the output."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
IMAGE_TOKEN = 60


def _random_weights(model: nn.Module, seed: int) -> nn.Module:
    """Matrices of unit gain, norm gains around 1, small biases: an attention then matters as in a trained model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() > 1:
                parameter.copy_(values * (0.7 if "embed" in name else parameter.shape[-1] ** -0.5))
            else:
                parameter.copy_(values * 0.3 + float("norm" in name and name.endswith("weight")))
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def single_thread() -> None:
    """Bitwise comparisons and timing on a shared machine both want one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def build_llama() -> Callable[..., Any]:
    """A factory: `build_llama(num_hidden_layers=2, tie_word_embeddings=True)`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(seed: int = 0, **changes: object) -> nn.Module:
        return _random_weights(LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})), seed)

    return build


@pytest.fixture(scope="session")
def build_clip() -> Callable[..., Any]:
    """A factory of CLIP vision towers."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    def build(seed: int = 0, **changes: object) -> nn.Module:
        return _random_weights(CLIPVisionModel(CLIPVisionConfig(**{**VISION, **changes})), seed)

    return build


@pytest.fixture(scope="session")
def llama(build_llama: Callable[..., Any]) -> Any:
    """4 layers, grouped-query attention. Shared by all tests: nobody may change it."""
    return build_llama()


@pytest.fixture(scope="session")
def clip(build_clip: Callable[..., Any]) -> Any:
    """A CLIP vision tower of 3 layers (QuickGELU). Shared by all tests."""
    return build_clip()


@pytest.fixture(scope="session")
def vit() -> Any:
    """A ViT of 3 layers (GELU). Shared by all tests."""
    from transformers import ViTConfig, ViTModel

    return _random_weights(ViTModel(ViTConfig(**VISION), add_pooling_layer=False), seed=0)


@pytest.fixture(scope="session")
def llava() -> Any:
    """LLaVA: the CLIP tower (16 patches become 16 tokens) and the Llama above. Shared by all tests."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**LLAMA),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=16,
    )
    return _random_weights(LlavaForConditionalGeneration(config), seed=0)


@pytest.fixture(scope="session")
def randomise() -> Callable[..., nn.Module]:
    """A function that gives all adapters of a student normal weights, so that none is a no-op."""

    def fill(student: nn.Module, seed: int = 1, std: float = 0.3) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(std * noise.to(parameter.dtype))
        return student.eval()

    return fill


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Four rows of ten ordinary tokens."""
    return torch.randint(3, 60, (4, 10), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def pixels() -> torch.Tensor:
    """Four images."""
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="session")
def image_prompt(tokens: torch.Tensor, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """A LLaVA batch of two: one token, 16 image tokens, nine tokens."""
    ids = torch.cat([tokens[:2, :1], torch.full((2, 16), IMAGE_TOKEN), tokens[:2, 1:]], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels[:2]}


@pytest.fixture(scope="session")
def without_attention() -> Callable[..., nn.Module]:
    """A function: a deep copy whose attentions at the named paths are deleted by zeroing their output projection."""
    import copy

    def delete(model: nn.Module, names: list[str]) -> nn.Module:
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for name in names:
                attention = twin.get_submodule(name)
                out = next(getattr(attention, n) for n in ("o_proj", "out_proj") if hasattr(attention, n))
                out.weight.zero_()
                if out.bias is not None:
                    out.bias.zero_()
        return twin

    return delete


@pytest.fixture(scope="session")
def same_model() -> Callable[..., None]:
    """A check of (one, other, inputs): equal weights, and answers that differ by no more than rounding.

    Where a loaded tensor happens to lie in memory decides which kernels read it, so equal weights may differ in answers
    by a few units in the last place of the largest one.
    """

    @torch.no_grad()
    def check(one: Any, other: Any, **inputs: torch.Tensor) -> None:
        ours, theirs = one.state_dict(), other.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        first, second = one(**inputs).logits, other(**inputs).logits
        rounding = 16 * torch.finfo(first.dtype).eps * first.abs().max().item()
        torch.testing.assert_close(first, second, atol=rounding, rtol=0.0)

    return check
