"""Skipped and merged blocks against the formulas themselves, written out in numpy and double precision.

Nothing of the package computes here: the weights are read by name, the rest is arXiv 2403.15226 and, for `parallel`,
its two heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eas_search.merging import merge
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips

Array = np.ndarray
RANK, GROUPS, SCALE, TEMPERATURE, PROMPT = 4, 2, 0.7, 2.0, 6
BETA = 1.2784645427610738  # SiLU(β) = 1


def silu(v: Array) -> Array:
    return v / (1 + np.exp(-v))


def quick_gelu(v: Array) -> Array:
    return v / (1 + np.exp(-1.702 * v))


def weights_of(module: nn.Module) -> dict[str, Array]:
    return {name: value.detach().double().numpy() for name, value in module.state_dict().items()}


def ungrouped(weight: Array) -> Array:
    """Output group j reads bottleneck group j only."""
    dense = np.zeros((len(weight), RANK))
    for row in range(len(weight)):
        group = row // (len(weight) // GROUPS)
        dense[row, group * RANK // GROUPS : (group + 1) * RANK // GROUPS] = weight[row]
    return dense


def up_projection(w: dict[str, Array], routing: Array) -> tuple[Array, Array]:
    matrices = [ungrouped(w[f"ups.{k}.weight"]) for k in range(2)]
    return sum(SCALE * routing[k] * matrices[k] for k in range(2)), sum(
        SCALE * routing[k] * w[f"ups.{k}.bias"] for k in range(2)
    )


def pia(w: dict[str, Array], x_hat: Array, pooled: Array) -> Array:
    """Δ of one sample: x_hat [n, d]; pooled [n] says which tokens enter the mean."""
    s = x_hat[pooled].mean(0) @ w["pool.weight"].T + w["pool.bias"]
    z = 0.5 * (x_hat @ w["down.weight"].T + w["down.bias"] + s)
    logits = w["router_bias"].copy()
    if "router_weight" in w:
        logits += w["router_weight"] @ x_hat[pooled].mean(0)
    routing = np.exp(logits / TEMPERATURE) / np.exp(logits / TEMPERATURE).sum()
    up, constant = up_projection(w, routing)
    return z @ up.T + constant


def rms(x: Array, eps: float = 1e-6) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def standardised(x: Array, eps: float = 1e-5) -> Array:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def skipped_block(block: Any, x: Array, pooled: Array, placement: str, identity: str) -> Array:
    """One sample [n, d] through a block without its attention."""
    w, gated = weights_of(block), hasattr(block.mlp, "gate_proj")
    normalise = rms if gated else standardised
    g1, b1 = (w["input_layernorm.weight"], 0.0) if gated else (w["layer_norm1.weight"], w["layer_norm1.bias"])
    g2, b2 = (w["post_attention_layernorm.weight"], 0.0) if gated else (w["layer_norm2.weight"], w["layer_norm2.bias"])

    def ffn(v: Array) -> Array:
        if gated:
            hidden = silu(v @ w["mlp.gate_proj.weight"].T) * (v @ w["mlp.up_proj.weight"].T)
            return hidden @ w["mlp.down_proj.weight"].T
        return quick_gelu(v @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    def delta(name: str) -> Array:
        own = {key.removeprefix(f"{name}."): value for key, value in w.items() if key.startswith(f"{name}.")}
        return pia(own, x_hat, pooled)

    u = normalise(x)
    x_hat = g1 * u + b1
    h = x if placement == "ffn" else x + delta("pia_stream")
    if placement == "residual":
        return h + ffn(g2 * normalise(h) + b2)
    i = u if identity == "noop" else x_hat
    return h + ffn(g2 * (i + delta("pia_ffn")) + b2)


def run_block(model: Any, inputs: dict[str, Tensor]) -> tuple[Array, Array]:
    """Input and output of the block of layer 1 in a whole forward pass."""
    seen: list[Tensor] = []
    block = next(module for path, module in model.named_modules() if path.endswith("layers.1"))
    handle = block.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0].double().numpy(), seen[1].double().numpy()


@pytest.mark.parametrize("router", ["static", "routed"])
@pytest.mark.parametrize(
    ("placement", "identity"),
    [("ffn", "noop"), ("ffn", "paper"), ("residual", "noop"), ("parallel", "noop"), ("parallel", "paper")],
)
@pytest.mark.parametrize("tower", ["llama", "clip"])
def test_a_block_computes_its_formula_before_and_after_the_merge(
    build_llama: Callable[..., Any],
    build_clip: Callable[..., Any],
    randomise: Callable[..., nn.Module],
    tokens: Tensor,
    pixels: Tensor,
    tower: str,
    placement: str,
    identity: str,
    router: str,
) -> None:
    """CLIP in double precision to 1e-9; Llama norms compute in float32, hence 2e-5 on values of size 5."""
    text = tower == "llama"
    base = build_llama() if text else build_clip().double()
    config = SkipConfig(
        skip=(1,),
        pia_dim=RANK,
        placement=placement,
        identity=identity,
        router=router,
        pooling="prompt" if text else "all",
        scale=SCALE,
        temperature=TEMPERATURE,
    )
    student = randomise(apply_skips(base, config).to(base.dtype))
    inputs, pooled = {"pixel_values": pixels.double()}, np.ones((4, 17), dtype=bool)
    if text:
        mask = torch.ones_like(tokens)
        mask[1, :2] = 0
        in_prompt = torch.arange(10) < PROMPT
        inputs = {"input_ids": tokens, "attention_mask": mask, "prompt_mask": in_prompt.expand(4, -1)}
        pooled = (mask.bool() & in_prompt).numpy()
    block = next(module for path, module in student.named_modules() if path.endswith("layers.1"))
    for model in (student, merge(student)):
        x, y = run_block(model, inputs)
        for row in range(len(x)):
            expected = skipped_block(block, x[row], pooled[row], placement, identity)
            np.testing.assert_allclose(y[row], expected, atol=2e-5 if text else 1e-9, rtol=0)
            fewer = pooled[row].copy()
            fewer[np.flatnonzero(fewer)[-1]] = False
            other = skipped_block(block, x[row], fewer, placement, identity)
            assert np.abs(expected - other).max() > 1e-3  # one pooled token less would show


def static_parts(block: Any) -> tuple[dict[str, Array], dict[str, Array], dict[str, tuple[Array, Array]]]:
    w = weights_of(block)
    pias = {
        n: {k.removeprefix(f"pia_{n}."): v for k, v in w.items() if k.startswith(f"pia_{n}.")}
        for n in ("ffn", "stream")
    }
    ups = {}
    for name, own in pias.items():
        logits = own["router_bias"] / TEMPERATURE
        ups[name] = up_projection(own, np.exp(logits) / np.exp(logits).sum())
    return w, pias, ups


def test_the_weights_of_a_merged_gated_ffn(llama: Any, randomise: Callable[..., nn.Module]) -> None:
    """W' = W G2 (I + ½ B C G1); the stream's bottleneck becomes neurons whose gate is the constant β, SiLU(β) = 1."""
    config = SkipConfig(skip=(1,), pia_dim=RANK, pooling="none", scale=SCALE, temperature=TEMPERATURE)
    student = randomise(apply_skips(llama, config))
    w, pias, ups = static_parts(student.model.layers[1])
    merged = weights_of(merge(student).model.layers[1].mlp)
    g1, g2 = np.diag(w["input_layernorm.weight"]), np.diag(w["post_attention_layernorm.weight"])
    into = g2 @ (np.eye(32) + 0.5 * ups["ffn"][0] @ pias["ffn"]["down.weight"] @ g1)
    constant = g2 @ (0.5 * ups["ffn"][0] @ pias["ffn"]["down.bias"] + ups["ffn"][1])
    c, c0 = 0.5 * pias["stream"]["down.weight"] @ g1, 0.5 * pias["stream"]["down.bias"]
    gate, up = w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"]
    expected = {
        "gate_proj.weight": np.vstack([gate @ into, np.zeros((RANK, 32))]),
        "gate_proj.bias": np.concatenate([gate @ constant, np.full(RANK, BETA)]),
        "up_proj.weight": np.vstack([up @ into, c]),
        "up_proj.bias": np.concatenate([up @ constant, c0]),
        "down_proj.weight": np.hstack([w["mlp.down_proj.weight"], ups["stream"][0]]),
        "down_proj.bias": ups["stream"][1],
    }
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name], value, atol=1e-6, rtol=1e-6, err_msg=name)  # stored in float32
    assert abs(float(silu(np.array(BETA))) - 1) < 1e-15


def test_the_weights_of_a_merged_plain_ffn(build_clip: Callable[..., Any], randomise: Callable[..., nn.Module]) -> None:
    """Two neurons ±(C x̂ + c) with down columns ±B are the linear map, because act(v) − act(−v) = v."""
    config = SkipConfig(skip=(1,), pia_dim=RANK, pooling="none", scale=SCALE, temperature=TEMPERATURE)
    student = randomise(apply_skips(build_clip().double(), config).double())
    block = next(module for path, module in student.named_modules() if path.endswith("layers.1"))
    w, pias, ups = static_parts(block)
    merged = weights_of(next(m for path, m in merge(student).named_modules() if path.endswith("layers.1")).mlp)
    g1, b1 = np.diag(w["layer_norm1.weight"]), w["layer_norm1.bias"]
    g2, b2 = np.diag(w["layer_norm2.weight"]), w["layer_norm2.bias"]
    read = {name: own["down.weight"] @ b1 + own["down.bias"] for name, own in pias.items()}
    into = g2 @ (np.eye(24) + 0.5 * ups["ffn"][0] @ pias["ffn"]["down.weight"] @ g1)
    constant = g2 @ (0.5 * ups["ffn"][0] @ read["ffn"] + ups["ffn"][1]) + b2
    c, c0 = 0.5 * pias["stream"]["down.weight"] @ g1, 0.5 * read["stream"]
    expected = {
        "fc1.weight": np.vstack([w["mlp.fc1.weight"] @ into, c, -c]),
        "fc1.bias": np.concatenate([w["mlp.fc1.weight"] @ constant + w["mlp.fc1.bias"], c0, -c0]),
        "fc2.weight": np.hstack([w["mlp.fc2.weight"], ups["stream"][0], -ups["stream"][0]]),
        "fc2.bias": w["mlp.fc2.bias"] + ups["stream"][1],
    }
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name], value, atol=1e-12, rtol=0, err_msg=name)
