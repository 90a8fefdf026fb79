"""Where attention lives: sites of real architectures made tiny, and refusal of what only looks like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eas_search.architectures import (
    BlockPattern,
    attention_sites,
    prove_sites,
    refused_sites,
    register_pattern,
    resolve_skip,
)
from eas_search.architectures.norms import Normalise, split_norm
from eas_search.architectures.patterns import _registered as registered
from eas_search.exceptions import ConfigError, UnsupportedModelError
from eas_search.proof import prove_deletion, silenced
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def tiny(family: str, **changes: object) -> Any:
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
    name = f"{family}ForCausalLM" if hasattr(transformers, f"{family}ForCausalLM") else f"{family}Model"
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


@pytest.mark.parametrize(
    ("name", "pattern", "template", "width", "causal"),
    [
        ("llama", "llama", "model.layers.{}.self_attn", 32, True),
        ("clip", "clip", "encoder.layers.{}.self_attn", 24, False),
        ("vit", "vit", "layers.{}.attention", 24, False),
    ],
)
def test_sites_of_one_tower(
    request: pytest.FixtureRequest, name: str, pattern: str, template: str, width: int, causal: bool
) -> None:
    model = request.getfixturevalue(name)
    sites = attention_sites(model)
    assert [site.index for site in sites] == [site.layer for site in sites] == list(range(4 if causal else 3))
    assert {(site.pattern.name, site.width, site.causal) for site in sites} == {(pattern, width, causal)}
    assert {site.tower for site in sites} == {"text" if causal else "vision"}
    for i, site in enumerate(sites):
        assert site.name.endswith(template.format(i))
        assert isinstance(model.get_submodule(site.name).q_proj, nn.Linear)
        assert model.get_submodule(site.block) is model.get_submodule(site.name.rpartition(".")[0])
        assert model.get_submodule(site.block) in list(model.get_submodule(site.stack).layers)


def test_the_text_tower_of_llava_comes_first(llava: Any) -> None:
    sites = attention_sites(llava)
    assert [site.tower for site in sites] == ["text"] * 4 + ["vision"] * 3
    assert [site.layer for site in sites] == [0, 1, 2, 3, 0, 1, 2]
    assert [site.index for site in sites] == list(range(7))
    assert {site.stack for site in sites[:4]} == {"model.language_model"}
    assert len({site.stack for site in sites[4:]}) == 1
    assert [site.causal for site in sites] == [True] * 4 + [False] * 3


def test_a_tower_alone_keeps_its_indexes(llava: Any) -> None:
    assert [site.index for site in attention_sites(llava, ["vision"])] == [4, 5, 6]
    assert [site.index for site in attention_sites(llava, ["text"])] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="tower 'video' is unknown; expected one of text, vision, audio"):
        attention_sites(llava, ["text", "video"])


def test_a_skip_set_is_resolved_in_the_order_of_the_sites(llava: Any) -> None:
    sites = attention_sites(llava)
    assert [site.index for site in resolve_skip([6, sites[2].name, 0], sites)] == [0, 2, 6]


@pytest.mark.parametrize("name", ["llama", "clip", "vit", "llava"])
def test_real_blocks_are_proved(
    request: pytest.FixtureRequest, name: str, tokens: Tensor, pixels: Tensor, image_prompt: dict[str, Tensor]
) -> None:
    model = request.getfixturevalue(name)
    inputs = {"llama": {"input_ids": tokens}, "llava": image_prompt}.get(name, {"pixel_values": pixels})
    sites = attention_sites(model)
    assert max(prove_sites(model, sites, inputs).values()) <= 1e-6
    # The first pass may install hooks of `transformers` itself; a second must leave none behind.
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    assert len(prove_sites(model, sites, inputs)) == len(sites)
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


@pytest.mark.parametrize("family", ["Qwen2", "Mistral", "Qwen3"])
def test_other_families_with_the_same_parts_are_proved_and_skipped(family: str) -> None:
    """Equal to the model whose output projection is zero; 1e-5 in float32."""
    model, ids = tiny(family), torch.arange(12).view(2, 6)
    sites = attention_sites(model)
    assert len(sites) == 2
    prove_sites(model, sites, {"input_ids": ids})
    student = apply_skips(model, SkipConfig(skip=(0,), pia_dim=4)).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        torch.testing.assert_close(student(ids).logits, model(ids).logits, atol=1e-5, rtol=0.0)
    assert torch.equal(
        student.generate(ids, max_new_tokens=4, do_sample=False), model.generate(ids, max_new_tokens=4, do_sample=False)
    )


@pytest.mark.parametrize(
    ("family", "pattern", "residual", "whole"),
    [
        ("GPT2", "gpt2", "sequential", True),
        ("Gemma2", "gemma", "sequential", True),
        ("OPT", "opt", "sequential", True),
        ("Phi3", "llama", "sequential", True),
        ("GPTNeoX", "llama", "parallel", True),
        ("Phi", "phi", "parallel", True),
        ("Olmo2", "self_attn", "sequential", False),
        ("Bert", "bert", "sequential", False),
    ],
)
def test_families_resolve_to_their_pattern(family: str, pattern: str, residual: str, whole: bool) -> None:
    """Names alone do not tell: Llama's names stand for a parallel residual in GPT-NeoX; numbers decide."""
    changes = {"GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2}, "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16}}
    changes["Phi3"] = {"pad_token_id": 0}
    model = tiny(family, **changes.get(family, {}))
    sites = attention_sites(model)
    found = {(site.pattern.name, site.residual, site.whole, site.width) for site in sites}
    assert found == {(pattern, residual, whole, 16)}
    assert {site.placements for site in sites} == {("ffn", "residual", "parallel") if whole else ("residual",)}
    assert {site.causal for site in sites} == {family != "Bert"}
    assert all(bool(site.merge_refusal) != whole for site in sites)
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    prove_sites(model, sites, inputs)
    assert prove_deletion(model, sites, inputs) == {}


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has no attention that can be skipped") as caught:
        attention_sites(nn.Sequential(nn.Linear(4, 4)))
    assert "\n" not in str(caught.value)
    assert "register_pattern" in str(caught.value)


def test_a_block_with_the_right_names_and_another_function_only_gets_a_stand_in() -> None:
    """Granite's blocks are named like Llama's, but scale both residuals: nothing can be folded into their FFN."""
    inputs = {"input_ids": torch.arange(6).view(1, 6)}
    model = tiny("Granite", residual_multiplier=0.3)
    sites = attention_sites(model)
    assert {site.whole for site in sites} == {False}
    assert "plain residuals" in str(sites[0].merge_refusal)
    assert prove_deletion(model, sites, inputs) == {}
    with pytest.raises(UnsupportedModelError, match=r"placement .ffn. at model\.layers\.0\.self_attn"):
        apply_skips(model, SkipConfig(skip=(0,), placement="ffn"))
    plain = tiny("Granite", residual_multiplier=1.0)
    assert {site.whole for site in attention_sites(plain)} == {True}
    with pytest.raises(UnsupportedModelError, match="recomposed from its parts it differs") as caught:
        prove_sites(model, attention_sites(plain), inputs)
    assert "\n" not in str(caught.value)


HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@HALF
@pytest.mark.parametrize("scale", [0.22, 0.5, 0.97])
def test_in_half_precision_a_scaled_residual_is_still_seen(dtype: torch.dtype, scale: float) -> None:
    """A student without an attention then equals the model in which that attention adds nothing: the same operations.

    The weights are as small as in a model at its start, so that a block hardly differs from its input.
    """
    changes = {"hidden_size": 64, "head_dim": 32, "residual_multiplier": scale}
    single, half = tiny("Granite", **changes), tiny("Granite", **changes).to(dtype)
    sites = attention_sites(half)
    assert not any(site.whole for site in (*sites, *attention_sites(single)))
    student = apply_skips(half, SkipConfig(skip=(0,), pia_dim=0)).eval()
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad(), silenced(half, sites[:1]):
        expected = half(ids).logits
    with torch.no_grad():
        assert torch.equal(student(ids).logits, expected)


@HALF
@pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTNeoX", "Phi", "Gemma2", "OPT"])
def test_in_half_precision_a_block_is_what_it_is_in_float32(family: str, dtype: torch.dtype) -> None:
    changes = {"GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2}, "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16}}
    model = tiny(family, **changes.get(family, {}))
    expected = attention_sites(model)
    assert all(site.whole for site in expected)
    assert attention_sites(model.to(dtype)) == expected


@HALF
def test_an_examined_model_has_the_tensors_and_hooks_that_it_had(dtype: torch.dtype) -> None:
    model = tiny("Llama").to(dtype)
    block = model.model.layers[0]
    block.mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight  # shared with a block that is not examined
    block.mlp.register_buffer("constant", torch.ones(2, dtype=dtype))
    seen: list[torch.dtype] = []
    block.mlp.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    before = [*model.parameters(), *model.buffers()]
    values = [tensor.clone() for tensor in before]
    assert all(site.whole for site in attention_sites(model))
    assert seen
    assert set(seen) == {torch.float32}
    after = [*model.parameters(), *model.buffers()]
    assert all(one is other for one, other in zip(after, before, strict=True))
    assert all(torch.equal(one, value) for one, value in zip(after, values, strict=True))
    block.mlp.down_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attention_sites(model)
    assert all(one is other for one, other in zip(model.parameters(), before, strict=False))


def test_weights_of_a_class_of_their_own_are_examined_as_they_are() -> None:
    class Packed(nn.Parameter):
        """As those of quantisation libraries, which say that they are bfloat16."""

    model = tiny("Llama").to(torch.bfloat16)
    block = model.model.layers[0]
    block.mlp.up_proj.weight = Packed(block.mlp.up_proj.weight.detach())
    seen: list[torch.dtype] = []
    block.mlp.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    assert all(site.whole for site in attention_sites(model))
    assert set(seen) == {torch.bfloat16}


def test_an_attention_that_others_read_from_is_refused_by_name() -> None:
    """T5's first layer makes the position bias of all others."""
    import transformers

    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=32)
    model = transformers.T5ForConditionalGeneration(config).eval()
    refused = refused_sites(model)
    assert set(refused) == {f"{stack}.block.0.layer.0.SelfAttention" for stack in ("encoder", "decoder")}
    assert all("position_bias" in reason for reason in refused.values())
    kinds = [(site.kind, site.causal) for site in attention_sites(model)]
    assert sorted(kinds) == [("cross", False), ("cross", False), ("self", False), ("self", True)]


def test_a_registered_pattern_is_tried_first() -> None:
    class OddBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.mixing, self.between = nn.LayerNorm(8), OddAttention(), nn.LayerNorm(8)
            self.network = OddFfn()

        def forward(self, x: Tensor) -> Tensor:
            h = x + self.mixing(self.before(x))
            return h + self.network(self.between(h))

    model = nn.Module()
    model.blocks = nn.ModuleList([OddBlock()])
    with pytest.raises(UnsupportedModelError):
        attention_sites(model)
    pattern = BlockPattern("odd", "mixing", norms="pre", norm1="before", norm2="between", ffn="network")
    register_pattern(pattern)
    try:
        (site,) = attention_sites(model)
        assert site.whole
        assert site.name == "blocks.0.mixing"
    finally:
        registered.remove(pattern)


class OddAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q_proj(x) @ self.k_proj(x).transpose(1, 2)
        return self.o_proj(scores.softmax(-1) @ self.v_proj(x))


class OddFfn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def test_a_site_that_a_pass_does_not_reach_is_refused(llava: Any, tokens: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="encoder"):
        prove_sites(llava, attention_sites(llava), {"input_ids": tokens})  # no image: the vision tower is not run


class Rms(nn.Module):
    """RMSNorm, with Gemma's gain of 1 + weight when asked."""

    def __init__(self, width: int, gemma: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.gemma = nn.Parameter(torch.rand(width) + 0.5), 1e-6, gemma

    def forward(self, x: Tensor) -> Tensor:
        gain = 1 + self.weight if self.gemma else self.weight
        return gain * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_is_gain_times_normalised_plus_shift(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(8, eps=1e-5) if kind == "layer" else Rms(8, gemma=False)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm, x = norm.to(dtype), torch.randn(5, 8, dtype=dtype) * 3
    with torch.no_grad():
        normalise, gain, shift = split_norm(norm)
        recomposed = gain * normalise(x) + (0 if shift is None else shift)
        v = x.double()
        centred = v - v.mean(-1, keepdim=True) if kind == "layer" else v
        expected = centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    rounding = 4 * max(torch.finfo(dtype).eps, 1e-15)
    torch.testing.assert_close(normalise(x).double(), expected, atol=rounding, rtol=rounding)
    torch.testing.assert_close(recomposed.double(), norm(x).double(), atol=4 * rounding, rtol=rounding)


@pytest.mark.parametrize("length", [1, 6])
def test_a_norm_in_one_pass_has_the_gradients_of_the_library_also_at_zero(length: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, length, 8, dtype=torch.float64)
    x[0, 0] = 0.0  # where the norm of a vector has no derivative
    x.requires_grad_()
    normalise, direction = Normalise(1e-6, centred=False), torch.randn(2, length, 8, dtype=torch.float64)
    (ours,) = torch.autograd.grad((normalise(x) * direction).sum(), x)
    (theirs,) = torch.autograd.grad((F.rms_norm(x, (8,), eps=1e-6) * direction).sum(), x)
    torch.testing.assert_close(ours, theirs)
    assert normalise.scale(x.detach().bfloat16()) is None  # the factor alone would be rounded


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8), nn.LayerNorm(8, elementwise_affine=False), nn.Identity()], ids=str)
def test_a_norm_that_is_something_else_is_refused(norm: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="expected a LayerNorm or RMSNorm") as caught:
        split_norm(norm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_norm_that_is_three_percent_off_is_refused_in_any_precision(dtype: torch.dtype) -> None:
    class Scaled(Rms):
        def forward(self, x: Tensor) -> Tensor:
            return 1.03 * super().forward(x)

    split_norm(Rms(8, gemma=True).to(dtype))
    with pytest.raises(UnsupportedModelError, match="is not gain"):
        split_norm(Scaled(8, gemma=False).to(dtype))


def test_a_gain_of_one_plus_weight_is_taken_apart() -> None:
    norm = Rms(8, gemma=True)
    _, gain, shift = split_norm(norm)
    torch.testing.assert_close(gain, 1 + norm.weight)
    assert shift is None


def test_a_causal_text_encoder_is_a_text_tower(randomise: Callable[..., nn.Module], tokens: Tensor) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    shape = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "head_dim")}
    torch.manual_seed(0)
    model = CLIPTextModel(CLIPTextConfig(**{**shape, "vocab_size": 64, "eos_token_id": 63})).eval()
    assert {(site.tower, site.causal) for site in attention_sites(model)} == {("text", True)}
    student = randomise(apply_skips(model, SkipConfig(skip=(0,), pia_dim=4, pooling="prefix", adapter_dim=4)))
    other = tokens.clone()
    other[:, 7] += 1
    with torch.no_grad():
        first, second = (student(input_ids=ids).last_hidden_state for ids in (tokens, other))
    assert torch.equal(first[:, :7], second[:, :7])
    assert not torch.equal(first[:, 7:], second[:, 7:])
