"""Parity of single LaVIN blocks and adapters with the published LaVIN-EAS, unmerged and merged (golden README)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lavin_golden import Golden, close, golden
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from eas_search.blocks import SkippedBlock
from eas_search.merging import merge
from eas_search.models.lavin.adapter_weights import pia_state
from eas_search.models.lavin.llama_weights import BODY, half_split, llama_state
from eas_search.pia import Pia, PiaShape
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips

TOLERANCE = 2e-5  # single modules in float32
WIDTH, HEADS = 32, 4
SKIPPED = {"skip": (0,), "pia_dim": 32, "placement": "ffn", "identity": "paper"}
KEPT = {"adapter_dim": 8}


def one_layer(data: Golden, prefix: str = "", **config: Any) -> LlamaForCausalLM:
    """A LLaMA with the recorded block as its only layer; what the recording lacks is random."""
    named = {f"layers.0.{name.removeprefix(prefix)}": tensor for name, tensor in data.items() if prefix in name}
    state = {
        name.replace(f"{BODY}.layers.0.", ""): tensor
        for name, tensor in llama_state(
            {n: t for n, t in named.items() if not n.startswith("layers.0.out") and "in__" not in n}, HEADS, HEADS
        ).items()
    }
    shape = LlamaConfig(
        vocab_size=8,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        rms_norm_eps=1e-5,
        **config,
    )
    model = LlamaForCausalLM(shape)
    missing, unexpected = model.model.layers[0].load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("self_attn") for name in missing)
    return model.eval()


def student_of_block(data: Golden, prefix: str = "", **config: Any) -> Any:
    student: Any = apply_skips(
        one_layer(data, prefix), SkipConfig(**{"router": "routed", "router_spares_first": True, **config})
    )
    block = student.model.layers[0]
    if isinstance(block, SkippedBlock):
        load(block.pia_ffn, pia_state(data, f"{prefix}replaced_adapter."))
    else:
        load(block.self_attn.eas_adapter, pia_state(data, f"{prefix}adapter_attn."))
    return student.eval()


def load(pia: Pia, state: dict[str, Tensor]) -> None:
    pia.load_state_dict({name: state.get(name, value) for name, value in pia.state_dict().items()})


def block_outputs(student: Any) -> list[Tensor]:
    seen: list[Tensor] = []
    student.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    return seen


def additive(mask: Tensor, batch: int) -> Tensor:
    return mask.clamp(min=torch.finfo(torch.float32).min).expand(batch, -1, -1, -1)


@torch.no_grad()
def test_skipped_block() -> None:
    data, _ = golden("lavin_block_skipped")
    student = student_of_block(data, **SKIPPED, scale=0.5)
    seen = block_outputs(student)
    student(inputs_embeds=data["in__x"], use_cache=False)
    close(seen[0], data["out__y"], TOLERANCE)
    # The published code has another function under gradient checkpointing: h = x + P(x̂), h + FFN(norm2(h)).
    block = student.model.layers[0]
    h = data["in__x"] + data["out__adapter_out"]
    close(h + block.mlp(block.post_attention_layernorm(h)), data["out__y_gradient_checkpoint_branch"], TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mask", "expected"), [("in__mask_causal", "out__y"), ("in__mask_decision", "out__y_decision_mask")]
)
def test_kept_block(mask: str, expected: str) -> None:
    data, _ = golden("lavin_block_kept")
    student = student_of_block(data, **KEPT, scale=0.5)
    seen, read = block_outputs(student), []
    student.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    student(inputs_embeds=data["in__x"], attention_mask=additive(data[mask], 2), use_cache=False)
    close(read[0], data["out__adapter_out"], TOLERANCE)
    close(seen[0], data[expected], TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["lavin_pia_ffn", "lavin_pia_attn"])
def test_adapters_with_given_expert_weights(name: str) -> None:
    """Expert weights from outside, the sequence-first form inside CLIP, and published decoding's one-token call."""
    data, _ = golden(name)
    state = pia_state(data)
    pooled = "pool.weight" in state
    rank, width = state["down.weight"].shape
    pia = Pia(PiaShape(width, rank, 2, 0.5, 10.0, "routed", pooled, 0.5 if pooled else 1.0))
    load(pia, state)

    def output(x: Tensor) -> Tensor:
        z = pia.down(x)
        if pia.pool is not None:
            z = 0.5 * (z + pia.pool(x).mean(dim=1, keepdim=True))
        ups = [F.linear(z, up.dense(), up.bias) for up in pia.experts()]
        weights = data["in__weights_override"].view(-1, 1, 2)
        return x + 0.5 * (weights[..., :1] * ups[0] + weights[..., 1:] * ups[1])

    close(output(data["in__x"]), data["out__y_override"], TOLERANCE)
    if pooled:
        close(output(data["in__x_new"]), data["out__y_new_as_called"], TOLERANCE)
    else:
        close(data["out__y_trans"].transpose(0, 1), data["out__y"], TOLERANCE)


# The recorded merge: layer 0 is kept, layer 1 is skipped; 11 tokens, then one more.

REP = {"kept": ("layers.0.", KEPT), "skipped": ("layers.1.", SKIPPED)}


@torch.no_grad()
def prefill_and_decode(student: Any, data: Golden, forget: bool = False) -> list[Tensor]:
    """Outputs of the block for the recorded tokens, the new one at the published position."""
    seen = block_outputs(student)
    cache = student(inputs_embeds=data["in__x"], attention_mask=additive(data["in__mask"], 1)).past_key_values
    if forget:
        del cache.layers[0].states["ffn.pool"]
    hidden = torch.zeros(1, 1, 1, 12)
    hidden[..., 0] = torch.finfo(torch.float32).min  # nobody sees the modality token
    at = torch.tensor([[10]])
    student(inputs_embeds=data["in__x_new"], attention_mask=hidden, position_ids=at, past_key_values=cache)
    return seen


@pytest.mark.parametrize("kind", REP)
def test_merged_blocks(kind: str) -> None:
    data, _ = golden("lavin_rep")
    prefix, config = REP[kind]
    student = student_of_block(data, prefix, **config)
    merged = prefill_and_decode(merge(student), data)
    close(merged[0], data[f"out__{kind}_rep_intended_prefill"], TOLERANCE)
    close(merged[1], data[f"out__{kind}_rep_intended_decode"], TOLERANCE)
    unmerged = prefill_and_decode(student, data)
    close(unmerged[0], data[f"out__{kind}_unmerged_prefill"], TOLERANCE)
    frozen = "kept_unmerged_decode" if kind == "kept" else "skipped_unmerged_frozen_mean_decode"
    close(unmerged[1], data[f"out__{frozen}"], TOLERANCE)


def test_published_decoding_of_a_skipped_block() -> None:
    data, _ = golden("lavin_rep")
    found = prefill_and_decode(student_of_block(data, "layers.1.", **SKIPPED), data, forget=True)
    close(found[1], data["out__skipped_unmerged_decode"], TOLERANCE)


@torch.no_grad()
def constant_router(data: Golden, kind: str) -> Any:
    """A student whose static router has the recorded prompt's expert weights: what a merge for one prompt is."""
    prefix, config = REP[kind]
    routed = student_of_block(data, prefix, **config)
    cache = routed(inputs_embeds=data["in__x"], attention_mask=additive(data["in__mask"], 1)).past_key_values
    fixed = student_of_block(data, prefix, **config, router="static")
    theirs, mine = (next(part for part in one.modules() if isinstance(part, Pia)) for one in (routed, fixed))
    mean = cache.layers[0].states["adapter.router" if kind == "kept" else "ffn.router"].value
    mine.router_bias.copy_(mean.flatten() + theirs.router_bias)
    return fixed


@torch.no_grad()
def test_merged_weights_of_a_kept_block() -> None:
    data, _ = golden("lavin_rep")
    merged = merge(constant_router(data, "kept"))
    attention = merged.model.layers[0].self_attn
    for letter in "qkv":
        wanted = [data[f"out__merged__layers.0.attention.w{letter}.{part}"] for part in ("weight", "bias_intended")]
        if letter in "qk":
            wanted = [half_split(tensor, HEADS) for tensor in wanted]
        layer = getattr(attention, f"{letter}_proj")
        close(layer.weight, wanted[0], TOLERANCE)
        close(layer.bias, wanted[1], TOLERANCE)


@torch.no_grad()
def test_merged_weights_of_a_skipped_block() -> None:
    """Ours read u = x / rms(x), so the gain of the first norm is folded in too; the bias is the prompt's."""
    data, _ = golden("lavin_rep")
    student = constant_router(data, "skipped")
    gain = student.model.layers[0].input_layernorm.weight
    ffn = merge(student).model.layers[0].mlp
    u = F.rms_norm(data["in__x"], (WIDTH,), eps=1e-5)
    shift = ffn.spread(ffn.pool(u.mean(dim=1))).flatten()
    for name, layer in (("w1", ffn.gate_proj), ("w3", ffn.up_proj)):
        close(layer.weight, data[f"out__merged__layers.1.feed_forward.{name}.weight"] * gain, TOLERANCE)
        close(layer(shift), data[f"out__merged__layers.1.feed_forward.{name}.bias_intended"], TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("form", ["intended", "official"])
def test_published_merge_multiplies_the_bias_with_the_merged_weight(form: str) -> None:
    """The published bias is W M b where W b is meant; both forms of it, put into plain layers."""
    data, _ = golden("lavin_rep")
    w = {name: data[f"out__merged__layers.0.attention.{name}.weight"] for name in ("wq", "wk", "wv")}
    b = {name: data[f"out__merged__layers.0.attention.{name}.bias_{form}"] for name in w}
    for name, weight in w.items():
        applied = weight if form == "official" else data[f"layers.0.attention.{name}.weight"]
        close(applied @ data["out__rep_bias_kept"], b[name], TOLERANCE)
    plain = one_layer(data, "layers.0.", attention_bias=True)
    attention = plain.model.layers[0].self_attn
    attention.o_proj.bias.zero_()
    for name, weight in w.items():
        turned = (lambda tensor: tensor) if name == "wv" else (lambda tensor: half_split(tensor, HEADS))
        layer = getattr(attention, f"{name[1]}_proj")
        layer.weight.copy_(turned(weight))
        layer.bias.copy_(turned(b[name]))
    found = prefill_and_decode(plain, data)
    close(found[0], data[f"out__kept_rep_{form}_prefill"], TOLERANCE)
    close(found[1], data[f"out__kept_rep_{form}_decode"], TOLERANCE)
    norm = one_layer(data, "layers.1.").model.layers[0].input_layernorm
    parts = {name: data[f"out__merged__layers.1.feed_forward.{name}.weight"] for name in ("w1", "w3")}
    bias = {name: data[f"out__merged__layers.1.feed_forward.{name}.bias_{form}"] for name in parts}
    for x, stage in ((data["in__x"], "prefill"), (data["in__x_new"], "decode")):
        hidden = {name: F.linear(norm(x), parts[name], bias[name]) for name in parts}
        y = x + F.linear(F.silu(hidden["w1"]) * hidden["w3"], data["layers.1.feed_forward.w2.weight"])
        close(y, data[f"out__skipped_rep_{form}_{stage}"], TOLERANCE)
