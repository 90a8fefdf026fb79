"""Where only the attention is declared, a stand-in takes its place and the rest of the block stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from eas_search.architectures import attention_sites
from eas_search.exceptions import UnsupportedModelError
from eas_search.merging import merge
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips
from eas_search.supernet import Supernet
from eas_search.warm_start import calibrate

IDS = torch.arange(20).view(2, 10) + 4
MASK = torch.ones(2, 10, dtype=torch.long)
MASK[1, 6:] = 0


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24
    )
    torch.manual_seed(0)
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        forced_eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(config).eval()


def literal_delta(p: dict[str, Tensor], prefix: str, x: Tensor, pooled: Tensor, mask: Tensor) -> Tensor:
    """Δ of a static PIA as in design: z = ½ (C x + c + mean(A x + a)), Δ = Σ w_k (B_k z + b_k); float64."""
    w = {name.removeprefix(prefix): value.double() for name, value in p.items() if name.startswith(prefix)}
    weights = mask.double() / mask.double().sum(1, keepdim=True)
    s = torch.einsum("bn,bnd->bd", weights, pooled.double()) @ w["pool.weight"].T + w["pool.bias"]
    z = 0.5 * (x.double() @ w["down.weight"].T + w["down.bias"] + s[:, None])
    shares = torch.softmax(w["router_bias"] / 10, dim=0)
    total = torch.zeros_like(x, dtype=torch.float64)
    for k, share in enumerate(shares):
        up = torch.block_diag(*w[f"ups.{k}.weight"].chunk(2))
        total = total + share * (z @ up.T + w[f"ups.{k}.bias"])
    return total


def captured(module: nn.Module) -> list[tuple[Any, Any]]:
    seen: list[tuple[Any, Any]] = []
    module.register_forward_hook(lambda _, args, kwargs, out: seen.append(((args, kwargs), out)), with_kwargs=True)
    return seen


@torch.no_grad()
def test_post_norm_adds_before_the_norm(randomise: Callable[..., nn.Module]) -> None:
    """BERT: h = LN1(x + Δ(x)), y = LN2(h + FFN(h)); padding stays out of the mean."""
    student = randomise(apply_skips(bert(), SkipConfig(skip=(1,), pia_dim=4, placement="residual", pooling="prompt")))
    block = student.encoder.layer[1]
    seen = captured(block)
    student(input_ids=IDS, attention_mask=MASK)
    ((args, kwargs), out) = seen[0]
    x = kwargs.get("hidden_states", args[0] if args else None)
    parameters = dict(student.named_parameters())
    added = literal_delta(parameters, "encoder.layer.1.attention.self.pia_stream.", x, x, MASK)
    first, second = block.attention.output.LayerNorm, block.output.LayerNorm
    h = F.layer_norm(x.double() + added, (16,), first.weight.double(), first.bias.double(), first.eps)
    inner, outer = block.intermediate.dense, block.output.dense
    ffn = F.gelu(h @ inner.weight.double().T + inner.bias) @ outer.weight.double().T + outer.bias
    y = F.layer_norm(h + ffn, (16,), second.weight.double(), second.bias.double(), second.eps)
    given = out[0] if isinstance(out, tuple) else out
    # float32 against double precision over one block of width 16.
    torch.testing.assert_close(given.double(), y, atol=2e-6, rtol=0.0)
    assert not any("layer.1.attention" in name and "pia" not in name and "LayerNorm" not in name for name in parameters)


@torch.no_grad()
def test_a_cross_attention_pools_over_the_other_stream(randomise: Callable[..., nn.Module]) -> None:
    model = bart()
    site = next(site for site in attention_sites(model) if site.kind == "cross" and ".layers.1." in site.name)
    student = randomise(apply_skips(model, SkipConfig(skip=(site.name,), pia_dim=4, placement="residual")))
    stand_in = student.get_submodule(site.name)
    seen = captured(stand_in)
    student(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS[:, :5])
    ((args, kwargs), out) = seen[0]
    prefix = f"{site.name}.pia_stream."
    expected = literal_delta(dict(student.named_parameters()), prefix, args[0], kwargs["key_value_states"], MASK)
    torch.testing.assert_close(out[0].double(), expected, atol=2e-6, rtol=0.0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_a_decoder_behind_an_encoder_decodes_with_a_cache(kind: str, randomise: Callable[..., nn.Module]) -> None:
    model = bart()
    skip = tuple(s.index for s in attention_sites(model) if s.kind == kind and "decoder" in s.name)[:2]
    student = randomise(apply_skips(model, SkipConfig(skip=skip, pia_dim=4, placement="residual")))
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    for form in (student, merge(student).eval()):
        tokens = form.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1)
        logits = form(**inputs, decoder_input_ids=tokens, use_cache=False).logits
        assert torch.equal(logits[:, :-1].argmax(-1)[:, :6], tokens[:, 1:7])
        out = form(**inputs, decoder_input_ids=tokens[:, :4], use_cache=True)
        step = form(
            encoder_outputs=(out.encoder_last_hidden_state,),
            attention_mask=MASK,
            decoder_input_ids=tokens[:, 4:5],
            past_key_values=out.past_key_values,
        )
        torch.testing.assert_close(step.logits[:, 0], logits[:, 4], atol=1e-5, rtol=0.0)
    layers = getattr(out.past_key_values, f"{kind}_attention_cache").layers
    filled = [layer.keys is not None and layer.keys.numel() > 0 for layer in layers if hasattr(layer, "keys")]
    assert sum(filled) == 1  # of three decoder layers, two are skipped


def test_a_supernet_switches_stand_ins(randomise: Callable[..., nn.Module]) -> None:
    """With nothing skipped it is the original; with a set skipped it is the student that inherits from it."""
    model = bert()
    config = SkipConfig(pia_dim=8, adapter_dim=4, placement="parallel")
    supernet = Supernet(model, attention_sites(model), config)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    with torch.no_grad():
        assert torch.equal(supernet.model.eval()(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
        randomise(supernet.model)
        student = apply_skips(model, SkipConfig(skip=(0, 2), pia_dim=8, adapter_dim=4, placement="residual")).eval()
        supernet.inherit(student)
        supernet.set_skips((0, 2), "residual")
        given, expected = (form(**inputs).last_hidden_state for form in (supernet.model, student))
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=0.0)


def test_the_closed_form_reads_what_the_attention_reads() -> None:
    """A full-rank PIA fitted to a linear attention gives back its output: its value path is all there is."""
    model = bert()
    with torch.no_grad():  # constant scores: attention is the mean of the values, which a pooled PIA can be
        for layer in model.encoder.layer:
            layer.attention.self.query.weight.zero_()
            layer.attention.self.query.bias.zero_()
    site = attention_sites(model)[1]
    supernet = Supernet(model, attention_sites(model), SkipConfig(pia_dim=16, placement="parallel"))
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(4, 40, (64, 10), generator=generator)} for _ in range(4)]
    moments = calibrate(supernet.model, supernet.sites, batches)
    explained = supernet.warm_start(moments)
    assert explained[f"{site.name}:stream"] > 0.9  # the ridge takes some of it


def mllama() -> Any:
    """Layer 2 of 4 is a cross-attention; its keys lie in the decoder's own cache."""
    config = transformers.MllamaTextConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        cross_attention_layers=[2],
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: Any = transformers.MllamaForCausalLM(config).eval()
    for gate in ("cross_attn_attn_gate", "cross_attn_mlp_gate"):  # they start at zero, which hides the whole block
        getattr(model.model.layers[2], gate).data.fill_(0.7)
    return model


@torch.no_grad()
@pytest.mark.parametrize("other", [None, torch.linspace(-1, 1, 2 * 5 * 16).view(2, 5, 16)])
def test_a_block_that_the_cache_switches_is_switched_as_before(other: Tensor | None) -> None:
    zeroed = mllama()
    student = apply_skips(zeroed, SkipConfig(skip=(0,), pia_dim=0, pooling="none"))
    zeroed.model.layers[0].self_attn.o_proj.weight.data.zero_()
    logits = []
    for model in (student, zeroed):
        first = model(input_ids=IDS[:, :7], use_cache=True, cross_attention_states=other)
        rest = model(input_ids=IDS[:, 7:], past_key_values=first.past_key_values, use_cache=True)
        logits.append(torch.cat([first.logits, rest.logits], dim=1))
    # Float32: 1e-5 is ten roundings of logits near 1.
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_cross_attention_in_the_decoders_own_cache_is_not_skipped_with_it() -> None:
    model = mllama()
    states = torch.linspace(-1, 1, 2 * 5 * 16).view(2, 5, 16)
    student = apply_skips(model, SkipConfig(skip=(2,), pia_dim=0, pooling="none"))
    deleted = student(input_ids=IDS, cross_attention_states=states, use_cache=False).logits
    with pytest.raises(UnsupportedModelError, match="shares the decoder's KV cache"):
        student(input_ids=IDS, cross_attention_states=states, use_cache=True)
    model.model.layers[2].cross_attn.o_proj.weight.data.zero_()
    torch.testing.assert_close(deleted, model(input_ids=IDS, cross_attention_states=states).logits, atol=1e-5, rtol=0)
    pooling = apply_skips(mllama(), SkipConfig(skip=(2,), pia_dim=4, placement="residual", pooling="all"))
    with pytest.raises(UnsupportedModelError, match="has 6 rows for 2 samples"):
        pooling(input_ids=IDS, cross_attention_states=states.repeat(3, 1, 1), use_cache=False)
