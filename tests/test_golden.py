"""Parity with the published EAS code, on tensors recorded from it (tests/data/golden/README.md).

The expected outputs agree with a float64 recomputation to 2e-6; single modules and blocks in float32 are held to 2e-5,
scores to 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from eas_search.blocks import SkippedBlock
from eas_search.masks import question_mask
from eas_search.pia import Pia, PiaShape
from eas_search.pooling import PoolSession
from eas_search.redundancy import BanditConfig, EasBandit
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips

GOLDEN = Path(__file__).parent / "data" / "golden"
TOLERANCE = 2e-5
Golden = dict[str, Tensor]


def golden(name: str) -> Golden:
    return load_file(GOLDEN / f"{name}.safetensors")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0.0)


def load_adapter(pia: Pia, data: Golden, prefix: str = "") -> Pia:
    """Published names: conv_C is the token's projection and conv_A the pooled one, or conv_A the only one there is."""
    weights = {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}
    own, pooled = ("conv_A", None) if pia.pool is None else ("conv_C", "conv_A")
    state = {
        "down.weight": weights[f"{own}.weight"].squeeze(-1),
        "down.bias": weights[f"{own}.bias"],
        "router_weight": weights["expert_weights.weight"],
        "router_bias": weights.get("expert_weights.bias", torch.zeros(2)),
    }
    if pooled is not None:
        state |= {"pool.weight": weights["conv_A.weight"].squeeze(-1), "pool.bias": weights["conv_A.bias"]}
    for k, name in enumerate(("conv_B", "conv_D")):
        state |= {f"ups.{k}.weight": weights[f"{name}.weight"].squeeze(-1), f"ups.{k}.bias": weights[f"{name}.bias"]}
    pia.load_state_dict(state)
    return pia


def adapter(data: Golden, pooled: bool) -> Pia:
    rank, width = data["conv_A.weight"].shape[:2]
    mix = 0.5 if pooled else 1.0
    return load_adapter(Pia(PiaShape(width, rank, 2, 0.5, 10.0, "routed", pooled, mix)), data)


def without_first(n: int) -> Tensor:
    """LaVIN's router leaves token 0 out of its mean; its pooled information does not."""
    return (torch.arange(n) > 0).float().expand(2, -1)


@pytest.mark.parametrize("name", ["lavin_pia_ffn", "lavin_pia_attn"])
def test_lavin_adapters(name: str) -> None:
    data = golden(name)
    pia, x = adapter(data, pooled="conv_C.weight" in data), data["in__x"]
    kept: dict[str, Any] = {}
    router = pia.expert_weights(x, PoolSession("prompt", without_first(x.shape[1]), kept), "pia")
    close(router.squeeze(1), data["out__router"])
    close(x + pia(x, PoolSession("prompt", None, kept)), data["out__y"])


@pytest.mark.parametrize("name", ["llava_pia_ffn", "llava_pia_attn"])
def test_llava_adapters_in_training_prefill_and_decoding(name: str) -> None:
    data = golden(name)
    pia = adapter(data, pooled="conv_C.weight" in data)
    question = data["in__question_mask"] > 0
    x = data["in__x_train"]
    assert torch.equal(question_mask(data["in__labels_used_for_mask"]), question)
    close(pia.expert_weights(x, PoolSession("prompt", question), "pia").squeeze(1), data["out__router_train"])
    close(x + pia(x, PoolSession("prompt", question)), data["out__y_train"])
    kept: dict[str, Any] = {}
    x, new = data["in__x_prefill"], data["in__x_new"]
    close(x + pia(x, PoolSession("prompt", None, kept)), data["out__y_prefill"])
    close(new + pia(new, PoolSession("prompt", None, kept)), data["out__y_decode"])


def test_lavin_running_mean_of_the_pooled_term() -> None:
    """The published class has a running mean that its own decoding never reaches: what `prefix` computes."""
    data = golden("lavin_pia_attn")
    pia, kept = adapter(data, pooled=True), {}
    with torch.no_grad():
        router = data["in__weights_override"]
        prefill = PoolSession("prefix", None, kept)
        prefill.mean("pia.pool", data["in__x"], pia.pool.weight)
        pooled = PoolSession("prefix", None, kept).mean("pia.pool", data["in__x_new"], pia.pool.weight) + pia.pool.bias
        close(pooled.transpose(1, 2), data["out__global_vec_running"])
        z = 0.5 * (pia.down(data["in__x_new"]) + pooled)
        ups = [nn.functional.linear(z, up.dense(), up.bias) for up in pia.ups]
        y = data["in__x_new"] + 0.5 * sum(router[:, k].view(-1, 1, 1) * up for k, up in enumerate(ups))
    close(y, data["out__y_new_running"])


def test_question_mask() -> None:
    data = golden("llava_question_mask")
    mask = question_mask(data["in__labels"]).float()
    close(mask / mask.sum(1, keepdim=True), data["out__question_mask"])


# Whole blocks, inside a real LlamaForCausalLM of one layer.

LAVIN_FFN = {"w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}


def llama_weights(data: Golden) -> Golden:
    """State dict of a `transformers` layer; LaVIN's rotary turns adjacent pairs, so its q and k rows are reordered."""
    state = {key: value for key, value in data.items() if key.startswith(("mlp", "self_attn", "input_l", "post_a"))}
    for old, new in LAVIN_FFN.items():
        if f"feed_forward.{old}.weight" in data:
            state[f"{new}.weight"] = data[f"feed_forward.{old}.weight"]
    for old, new in (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
        if f"{old}.weight" in data:
            state[f"{new}.weight"] = data[f"{old}.weight"]
    for letter in "qkvo":
        weight = data.get(f"attention.w{letter}.weight")
        if weight is not None:
            if letter in "qk":
                weight = weight.view(4, 4, 2, 32).transpose(1, 2).reshape(32, 32)
            state[f"self_attn.{letter}_proj.weight"] = weight
    return {key: value for key, value in state.items() if "inv_freq" not in key}


def block_student(build_llama: Callable[..., Any], data: Golden, **config: object) -> Any:
    width = llama_weights(data)["mlp.gate_proj.weight"].shape[0]
    shape = {"intermediate_size": width, "num_hidden_layers": 1, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}
    base = build_llama(**shape)
    missing, unexpected = base.model.layers[0].load_state_dict(llama_weights(data), strict=False)
    assert not unexpected
    assert all(key.startswith("self_attn") for key in missing)
    return apply_skips(base, SkipConfig(router="routed", pooling="prompt", **config)).eval()


def outputs_of_the_block(student: Any) -> list[Tensor]:
    seen: list[Tensor] = []
    student.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    return seen


LLAVA_LAYERS = {
    "llava_layer_skipped": {"skip": (0,), "pia_dim": 16, "placement": "ffn", "identity": "paper"},
    "llava_layer_kept": {"adapter_dim": 8},
}


@torch.no_grad()
@pytest.mark.parametrize("name", LLAVA_LAYERS)
def test_llava_layers_in_training_prefill_and_decoding(build_llama: Callable[..., Any], name: str) -> None:
    data = golden(name)
    student = block_student(build_llama, data, **LLAVA_LAYERS[name])
    block = student.model.layers[0]
    kept = name.endswith("kept")
    pia = block.self_attn.eas_adapter if kept else block.pia_ffn
    load_adapter(pia, data, "adapter_attn." if kept else "replaced_adapter.")
    seen = outputs_of_the_block(student)
    mask = data["in__attention_mask_train"].clamp(min=torch.finfo(torch.float32).min) if kept else None
    question = data["in__question_mask"] > 0
    student(inputs_embeds=data["in__x_train"], attention_mask=mask, prompt_mask=question, use_cache=False)
    cache = student(inputs_embeds=data["in__x_prefill"], use_cache=True).past_key_values
    if kept:
        close(cache.layers[0].keys, data["out__key_cache"])
        close(cache.layers[0].values, data["out__value_cache"])
    student(inputs_embeds=data["in__x_new"], past_key_values=cache, use_cache=True)
    for form, output in zip(("train", "prefill", "decode"), seen, strict=True):
        close(output, data[f"out__y_{form}"])


@torch.no_grad()
def test_lavin_skipped_block(build_llama: Callable[..., Any]) -> None:
    data = golden("lavin_block_skipped")
    config = {"skip": (0,), "pia_dim": 32, "placement": "ffn", "identity": "paper", "scale": 0.5}
    block = block_student(build_llama, data, **config).model.layers[0]
    assert isinstance(block, SkippedBlock)
    load_adapter(block.pia_ffn, data, "replaced_adapter.")
    x, kept = data["in__x"], {}
    x_hat = block.input_layernorm(x)
    block.pia_ffn.expert_weights(x_hat, PoolSession("prompt", without_first(10), kept), "ffn")
    close(block.transform(x, PoolSession("prompt", None, kept)), data["out__y"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("masked", "expected"), [("in__mask_causal", "out__y"), ("in__mask_decision", "out__y_decision_mask")]
)
def test_lavin_kept_block(build_llama: Callable[..., Any], masked: str, expected: str) -> None:
    data = golden("lavin_block_kept")
    student = block_student(build_llama, data, adapter_dim=8, scale=0.5)
    attention = student.model.layers[0].self_attn
    load_adapter(attention.eas_adapter, data, "adapter_attn.")
    seen, adapted = outputs_of_the_block(student), []
    attention.q_proj.register_forward_pre_hook(lambda module, args: adapted.append(args[0]))
    mask = data[masked].clamp(min=torch.finfo(torch.float32).min).expand(2, -1, -1, -1)
    student(inputs_embeds=data["in__x"], attention_mask=mask, prompt_mask=without_first(10), use_cache=False)
    close(adapted[0], data["out__adapter_out"])
    close(seen[0], data[expected])


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("lavin_bandit", BanditConfig(policy="softmax", candidates=3, learning_rate=2.0, sharpness=10.0)),
        ("llava_bandit", BanditConfig(policy="sigmoid", candidates=5, learning_rate=1.0)),
    ],
)
def test_bandit_follows_the_published_updates(name: str, config: BanditConfig) -> None:
    data = golden(name)
    bandit = EasBandit(data["out__prob"].shape[1], config)
    assert torch.equal(bandit.scores, data["in__scores_init"])
    for step in range(20):
        torch.testing.assert_close(bandit.policy(), data["out__prob"][step], atol=1e-6, rtol=0.0)
        bandit.update(data["in__selected"][step].tolist(), data["in__losses"][step].tolist())
        torch.testing.assert_close(bandit.scores, data["out__scores_after"][step], atol=1e-6, rtol=0.0)
