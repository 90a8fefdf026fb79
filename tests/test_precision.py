"""Half precision, several devices, activation checkpointing: a student computes what it should under each of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import nn

import eas_search as eas
from eas_search.exceptions import UnsupportedModelError
from eas_search.pooling import PoolSession
from eas_search.skip_config import SkipConfig
from eas_search.skipping import adapter_parameters, apply_skips

PLACEMENTS = ("ffn", "residual", "parallel")


def config(**changes: Any) -> SkipConfig:
    return SkipConfig(**{"skip": (0, 2), "pia_dim": 4, "adapter_dim": 4, "pooling": "prefix", **changes})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("router", ["static", "routed"])
def test_adapters_stay_float32_over_a_half_precision_base(
    build_llama: Callable[..., Any],
    tokens: torch.Tensor,
    randomise: Callable[..., nn.Module],
    dtype: torch.dtype,
    placement: str,
    router: str,
) -> None:
    full = build_llama()
    chosen = config(placement=placement, router=router)
    student = randomise(apply_skips(copy.deepcopy(full).to(dtype), chosen), std=0.1)
    exact = randomise(apply_skips(full, chosen), std=0.1)
    assert {parameter.dtype for parameter in adapter_parameters(student).values()} == {torch.float32}
    logits = student(tokens).logits
    assert logits.dtype == dtype
    # Float32 with the same adapters is the reference: half precision is off by its own rounding and no more.
    size = exact(tokens).logits.abs().max().item()
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype] * size
    assert (logits.float() - exact(tokens).logits).abs().max().item() <= tolerance
    merged = eas.merge(student)
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert {buffer.dtype for buffer in merged.buffers()} <= {dtype, torch.float32}
    assert (merged(tokens).logits.float() - exact(tokens).logits).abs().max().item() <= tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("router", ["static", "routed"])
def test_what_is_merged_has_the_precision_of_its_block_not_of_the_models_first_weight(
    llama: Any,
    tokens: torch.Tensor,
    randomise: Callable[..., nn.Module],
    dtype: torch.dtype,
    placement: str,
    router: str,
) -> None:
    """BLIP-2 in half precision keeps its first parameter, its query tokens, in float32."""
    model = copy.deepcopy(llama).to(dtype)
    model.queries = nn.Parameter(torch.zeros(1, 2, 32))
    assert next(model.parameters()) is model.queries
    chosen = config(placement=placement, router=router)
    student = randomise(apply_skips(model, chosen), std=0.1)
    merged: Any = eas.merge(student)
    found = {name: parameter.dtype for name, parameter in merged.named_parameters()}
    assert found.pop("queries") == torch.float32
    assert set(found.values()) == {dtype}
    exact = randomise(apply_skips(llama, chosen), std=0.1)(tokens).logits
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype] * exact.abs().max().item()
    assert (merged(tokens).logits.float() - exact).abs().max().item() <= tolerance


def test_gradients_reach_float32_adapters_through_a_bfloat16_base(
    build_llama: Callable[..., Any], tokens: torch.Tensor
) -> None:
    student = apply_skips(build_llama().to(torch.bfloat16), config())
    student(tokens, labels=tokens).loss.backward()
    gradients = [parameter.grad for parameter in adapter_parameters(student).values()]
    assert all(gradient is None or gradient.dtype == torch.float32 for gradient in gradients)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("router", ["static", "routed"])
@pytest.mark.parametrize("pooling", ["prompt", "prefix", "none"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_under_autocast_a_merged_model_computes_in_the_precision_of_the_original(
    llama: Any,
    tokens: torch.Tensor,
    randomise: Callable[..., nn.Module],
    placement: str,
    pooling: str,
    router: str,
    grad: bool,
) -> None:
    """The stream of the original is as precise as its embeddings; bfloat16 products round to eight bits."""
    student = randomise(apply_skips(llama, config(placement=placement, pooling=pooling, router=router)), std=0.1)
    merged: Any = eas.merge(student)
    intact = copy.deepcopy(llama)  # asked for its hidden states, a model keeps the hooks that collect them
    prompt_mask = (torch.arange(10) < 6).long().expand(4, -1)
    with torch.set_grad_enabled(grad):
        for stream in (torch.float32, torch.bfloat16):
            embeds = llama.model.embed_tokens(tokens).detach()
            inputs = {"use_cache": False, "output_hidden_states": True}
            exact = merged(inputs_embeds=embeds, prompt_mask=prompt_mask, **inputs).logits
            embeds = embeds.to(stream)
            with torch.autocast("cpu", torch.bfloat16):
                given = merged(inputs_embeds=embeds, prompt_mask=prompt_mask, **inputs)
                original = intact(inputs_embeds=embeds, **inputs)
            assert [h.dtype for h in given.hidden_states] == [h.dtype for h in original.hidden_states]
            assert original.hidden_states[1].dtype == stream
            size = exact.abs().max().item()
            assert (given.logits.float() - exact).abs().max().item() <= 0.05 * size


@pytest.mark.parametrize("router", ["static", "routed"])
@pytest.mark.parametrize("pooling", ["prompt", "prefix", "none"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_under_autocast_a_merged_model_generates(
    llama: Any,
    tokens: torch.Tensor,
    randomise: Callable[..., nn.Module],
    placement: str,
    pooling: str,
    router: str,
) -> None:
    """Against one float32 pass without a cache over what it wrote."""
    student = randomise(apply_skips(llama, config(placement=placement, pooling=pooling, router=router)), std=0.1)
    merged: Any = eas.merge(student)
    wanted = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.autocast("cpu", torch.bfloat16):
        out = merged.generate(tokens[:, :6], output_logits=True, return_dict_in_generate=True, **wanted)
    prompt_mask = (torch.arange(10) < 6).long().expand(4, -1)
    with torch.no_grad():
        exact = merged(out.sequences, prompt_mask=prompt_mask, use_cache=False).logits[:, 5:-1]
    difference = (torch.stack(out.logits, dim=1).float() - exact).abs().max().item()
    assert difference <= 0.05 * exact.abs().max().item()


@pytest.mark.parametrize("pieces", [(600,), (300, 300), (599, 1)])
def test_a_running_mean_in_bfloat16_goes_on_after_256_tokens(pieces: tuple[int, ...]) -> None:
    """A bfloat16 cannot count past 256, and a sum in it stops growing."""
    x = torch.linspace(0.0, 2.0, 600).view(1, -1, 1).to(torch.bfloat16)
    session = PoolSession("prefix", states={})
    means = torch.cat([session.mean("m", piece) for piece in x.split(list(pieces), dim=1)], dim=1)
    expected = x.double().cumsum(1) / torch.arange(1, 601).view(1, -1, 1)
    assert means.dtype == torch.bfloat16
    torch.testing.assert_close(means.double(), expected, atol=0, rtol=2**-8)


def checkpointed(model: Any) -> Any:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize("changes", [{}, {"router": "routed"}, {"adapter": "lora"}], ids=str)
@pytest.mark.parametrize("pooling", ["prompt", "prefix"])
def test_checkpointing_gives_the_same_gradients_also_for_two_passes_before_one_backward(
    build_llama: Callable[..., Any],
    tokens: torch.Tensor,
    randomise: Callable[..., nn.Module],
    changes: dict[str, Any],
    pooling: str,
) -> None:
    gradients = []
    for checkpoint in (False, True):
        model = build_llama()
        student = randomise(
            apply_skips(checkpointed(model) if checkpoint else model, config(pooling=pooling, **changes))
        )
        student.train()
        loss: Any = 0
        for prompt in (3, 7):  # tokens of the prompt: the means of the two passes differ
            labels = tokens.clone()
            labels[:, :prompt] = -100
            loss = loss + student(tokens, labels=labels, use_cache=False).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(student).items()})
    plain, again = gradients
    assert any(gradient.abs().max() > 1e-4 for gradient in plain.values() if gradient is not None)
    for name, gradient in plain.items():
        if gradient is None:
            assert again[name] is None
        else:
            torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_checkpointing_really_recomputes(build_llama: Callable[..., Any], tokens: torch.Tensor) -> None:
    student: Any = apply_skips(checkpointed(build_llama()), config())
    calls: list[int] = []
    student.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    student.train()
    student(tokens, labels=tokens, use_cache=False).loss.backward()
    assert len(calls) == 2


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("changes", [{}, {"adapter": "lora"}], ids=str)
def test_a_model_placed_by_accelerate_keeps_its_hooks(
    build_llama: Callable[..., Any],
    tokens: torch.Tensor,
    randomise: Callable[..., nn.Module],
    placement: str,
    changes: dict[str, Any],
) -> None:
    chosen = config(placement=placement, **changes)
    expected = randomise(apply_skips(build_llama(), chosen))
    places = {f"model.layers.{i}": "cpu" for i in range(4)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = dispatch_model(build_llama(), places, main_device="cpu", force_hooks=True)
    before = model(tokens).logits
    student: Any = randomise(apply_skips(model, chosen))
    assert torch.equal(student(tokens).logits, expected(tokens).logits)
    merged: Any = eas.merge(student)
    for tree in (student, merged):
        assert hasattr(tree.model.layers[0], "_hf_hook"), "the block's input would stay on another device"
    assert torch.equal(merged(tokens).logits, eas.merge(expected)(tokens).logits)
    assert torch.equal(model(tokens).logits, before)
    generated = merged.generate(tokens, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, eas.merge(expected).generate(tokens, max_new_tokens=3, do_sample=False))


class Linear4bit(nn.Linear):
    """Like bitsandbytes': a linear layer whose weight is packed bytes of another shape, useless to read directly."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
        self.bias = plain.bias
        self.exact = [plain.weight.detach()]
        packed = torch.zeros(plain.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.exact[0], self.bias)


@pytest.fixture
def quantised(build_llama: Callable[..., Any]) -> Any:
    model = build_llama()
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Linear4bit(child))
    return model


@pytest.mark.parametrize("adapter", ["light", "lora"])
def test_a_quantised_model_can_be_skipped_and_its_adapters_stay_beside_it(
    quantised: Any, llama: Any, tokens: torch.Tensor, randomise: Callable[..., nn.Module], adapter: Any
) -> None:
    chosen = config(placement="residual", adapter=adapter)
    student: Any = randomise(apply_skips(quantised, chosen))
    expected = randomise(apply_skips(llama, chosen))(tokens).logits
    torch.testing.assert_close(student(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    assert student.model.layers[1].mlp.up_proj.weight is quantised.model.layers[1].mlp.up_proj.weight
    merged = eas.merge(student)
    torch.testing.assert_close(merged(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for p in merged.parameters())


def test_nothing_is_folded_into_a_quantised_ffn(
    quantised: Any, tokens: torch.Tensor, randomise: Callable[..., nn.Module]
) -> None:
    sites = eas.attention_sites(quantised)
    assert all(site.merge_refusal and "quantised" in site.merge_refusal for site in sites)
    with pytest.raises(UnsupportedModelError, match=r"quantised.*expected placement 'residual'") as error:
        apply_skips(quantised, config(placement="ffn"))
    assert "\n" not in str(error.value)
    student: Any = randomise(apply_skips(quantised, config(placement="parallel")))  # its residual half
    merged: Any = eas.merge(student)
    assert merged.model.layers[0].mlp.up_proj.weight is quantised.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(merged(tokens).logits, student(tokens).logits, atol=1e-4, rtol=1e-4)
