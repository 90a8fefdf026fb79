"""What every redundancy metric promises, whatever it looks at, on decoders, post-norm encoders and encoder-decoders."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from eas_search.architectures import attention_sites
from eas_search.names import ONE_SHOT
from eas_search.redundancy import METHODS, ONE_SHOT_METHODS, redundancy_scores

Batch = dict[str, Tensor]
BLIND = {"last_k", "random"}  # they do not look at the model
LOOKING = sorted(set(METHODS) - BLIND)
SIZES: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 0}


def loud(model: nn.Module, seed: int = 0) -> Any:
    """Weights large enough that every attention shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(values * parameter.shape[-1] ** -0.5 * 1.5)
    return model.eval()


def decoder() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, **SIZES
    )
    return loud(transformers.LlamaForCausalLM(config))


def post_norm() -> Any:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=5, num_attention_heads=2, intermediate_size=48, num_labels=3, **SIZES
    )
    model = loud(transformers.BertForSequenceClassification(config))
    with torch.no_grad():
        model.classifier.weight.mul_(10)  # sure of its answers, so that whatever changes them costs loss
    return model


def encoder_decoder() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 2}
    config = transformers.T5Config(**sizes, **SIZES, decoder_start_token_id=0)
    return loud(transformers.T5ForConditionalGeneration(config))


# (model, how labels look, output projections of attention and FFN of the block that does nothing)
FAMILIES: dict[str, tuple[Callable[[], Any], str, str, tuple[str, ...]]] = {
    "decoder": (decoder, "next", "model.layers.3.self_attn", ("self_attn.o_proj", "mlp.down_proj")),
    "post_norm": (
        post_norm,
        "class",
        "bert.encoder.layer.3.attention.self",
        ("attention.output.dense", "output.dense"),
    ),
    "encoder_decoder": (
        encoder_decoder,
        "text",
        "encoder.block.1.layer.0.SelfAttention",
        ("layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"),
    ),
}


def batches_for(model: Any, labels: str, teacher: Any = None) -> list[Batch]:
    """Two batches with padding; the labels are what the model itself answers, so that its loss is as low as it gets."""
    found = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 40, (12, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[3:6, :3] = 0
        batch: Batch = {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            if labels == "class":
                batch["labels"] = model(**batch).logits.argmax(-1)
            elif labels == "text":
                start = torch.zeros(12, 1, dtype=torch.long)
                for _ in range(4):
                    step = model(**batch, decoder_input_ids=start).logits[:, -1:].argmax(-1)
                    start = torch.cat([start, step], dim=1)
                batch["labels"] = start[:, 1:].contiguous()
            else:
                best = model(**batch).logits.argmax(-1).roll(1, dims=1)
                batch["labels"] = best.index_fill(1, torch.arange(5), -100)
        found.append(batch)
    return found


def emptied(model: Any, site: str, outputs: tuple[str, ...]) -> Any:
    """A copy in which one whole block adds nothing to the stream (block influence judges the FFN with it)."""
    twin = copy.deepcopy(model)
    block = next(s.block for s in attention_sites(twin) if s.name == site)
    with torch.no_grad():
        for name in outputs:
            projection = twin.get_submodule(f"{block}.{name}")
            projection.weight.zero_()
            if getattr(projection, "bias", None) is not None:
                projection.bias.zero_()
    return twin


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Any, list[Batch], str]:
    """(model with a block that does nothing, batches, name of that block's attention)."""
    build, labels, site, outputs = FAMILIES[request.param]
    model = emptied(build(), site, outputs)
    return model, batches_for(model, labels), site


def test_the_names_are_those_that_a_study_may_choose() -> None:
    assert tuple(ONE_SHOT_METHODS) == ONE_SHOT
    assert set(ONE_SHOT) < set(METHODS)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_one_score_per_site_of_an_untouched_model_and_the_idle_block_first(
    family: tuple[Any, list[Batch], str], method: str
) -> None:
    model, batches, idle = family
    state, tree = copy.deepcopy(model.state_dict()), repr(model)
    scores = redundancy_scores(model, batches, method)
    sites = [site for site in attention_sites(model) if site.tower == "text"]
    assert list(scores) == [site.name for site in sites]
    assert all(math.isfinite(score) for score in scores.values())
    assert len(set(scores.values())) > 1
    if method not in BLIND:
        assert max(scores, key=scores.__getitem__) == idle
    assert repr(model) == tree
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_same_scores_again(method: str) -> None:
    model = decoder()
    batches = batches_for(model, "next")
    assert redundancy_scores(model, batches, method) == redundancy_scores(model, batches, method)


@pytest.mark.parametrize("method", sorted(set(LOOKING) - {"block_influence"}))
def test_an_attention_that_does_nothing_is_the_most_redundant(method: str) -> None:
    """Its FFN works on, which only block influence holds against it."""
    build, labels, site, outputs = FAMILIES["decoder"]
    model = emptied(build(), site, outputs[:1])
    scores = redundancy_scores(model, batches_for(model, labels), method)
    assert max(scores, key=scores.__getitem__) == site


@pytest.mark.parametrize("method", LOOKING)
def test_the_only_attention_that_does_anything_is_the_least_redundant(method: str) -> None:
    """All blocks but one add nothing."""
    build, labels, _, outputs = FAMILIES["decoder"]
    model = build()
    for layer in (0, 2, 3, 4):
        model = emptied(model, f"model.layers.{layer}.self_attn", outputs)
    scores = redundancy_scores(model, batches_for(model, labels), method)
    assert min(scores, key=scores.__getitem__) == "model.layers.1.self_attn"


def test_depth_ranks_the_last_site_first_in_each_stack() -> None:
    scores = redundancy_scores(encoder_decoder(), [{"input_ids": torch.ones(1, 1)}], "last_k")
    # The first blocks' self-attentions make the position bias of all others, so they are no sites.
    assert scores == pytest.approx(
        {
            "encoder.block.1.layer.0.SelfAttention": 1 / 3,
            "encoder.block.2.layer.0.SelfAttention": 2 / 3,
            "decoder.block.0.layer.1.EncDecAttention": 0,
            "decoder.block.1.layer.0.SelfAttention": 1 / 2,
            "decoder.block.1.layer.1.EncDecAttention": 3 / 4,
        }
    )


def test_kl_is_that_of_the_answers_written_out() -> None:
    """KL(p ‖ q) = Σ p (log p − log q), only where the next token is labelled, in double precision."""
    model = decoder()
    batches = batches_for(model, "next")
    scores = redundancy_scores(model, batches, "kl")
    for layer in (0, 4):
        name = f"model.layers.{layer}.self_attn"
        without = emptied(model, name, ("self_attn.o_proj",))
        total, count = 0.0, 0
        for batch in batches:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            with torch.no_grad():
                p, q = (one(**inputs).logits.double().log_softmax(-1) for one in (model, without))
            for row in range(12):
                for position in range(8):
                    if batch["labels"][row, position + 1] != -100:
                        total += float((p[row, position].exp() * (p[row, position] - q[row, position])).sum())
                        count += 1
        assert scores[name] == pytest.approx(-total / count, rel=1e-4)


def test_taylor_is_the_slope_of_the_loss_when_an_attention_fades() -> None:
    """With one row per batch: |dL/dt| at t = 1 when the attention's output is scaled by t; central differences."""
    model = decoder().double()
    batch = {key: value[:1] for key, value in batches_for(model, "next")[0].items()}
    batch["labels"] = torch.where(batch["labels"] == -100, -100, 7)  # a loss that has a slope
    scores = redundancy_scores(model, [batch], "taylor")
    step = 3e-3  # the model's loss is float32
    for layer in (0, 3):
        weight = model.model.layers[layer].self_attn.o_proj.weight
        losses = []
        for t in (1 + step, 1 - step):
            twin = copy.deepcopy(model)
            with torch.no_grad():
                twin.model.layers[layer].self_attn.o_proj.weight.copy_(weight * t)
                losses.append(float(twin(**batch).loss))
        slope = abs(losses[0] - losses[1]) / (2 * step)
        assert scores[f"model.layers.{layer}.self_attn"] == pytest.approx(-slope, rel=2e-3)


def test_block_influence_is_one_minus_the_cosine_across_the_block() -> None:
    """Against the hidden states that the model itself reports; of the last block those before the final norm."""
    model = decoder()
    batches = batches_for(model, "next")
    scores = list(redundancy_scores(model, batches, "block_influence").values())
    for layer in range(4):
        values = []
        for batch in batches:
            with torch.no_grad():
                states = model(**batch, output_hidden_states=True).hidden_states
            a, b = states[layer].double(), states[layer + 1].double()
            cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
            values.append(cosine[batch["attention_mask"].bool()])
        assert scores[layer] == pytest.approx(float(torch.cat(values).mean()) - 1, abs=1e-6)


def test_similarity_of_a_cross_attention_starts_behind_the_self_attention() -> None:
    """T5 adds both to one stream inside one block: the second one starts where the first one ended."""
    model = encoder_decoder()
    batches = batches_for(model, "text")[:1]
    seen: list[tuple[Tensor, Tensor]] = []
    layer = model.decoder.block[1].layer[1]
    handle = layer.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((args[0] if args else kwargs["hidden_states"], out[0])),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**batches[0])
    handle.remove()
    before, after = (value.double() for value in seen[0])
    expected = ((before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))).mean()
    scores = redundancy_scores(model, batches, "similarity")
    assert scores["decoder.block.1.layer.1.EncDecAttention"] == pytest.approx(float(expected), abs=1e-6)
