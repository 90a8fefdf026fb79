"""Only the tokens that are asked for behind the last attention: the same answers, less work, never a stale one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eas_search.architectures import attention_sites
from eas_search.asked import only_labelled
from eas_search.asked_proof import labels_suffice, prove_last_logits
from eas_search.conditions import Conditions
from eas_search.exceptions import UnsupportedModelError
from eas_search.measures import prefill_flops
from eas_search.merging import merge
from eas_search.reuse import attach_caches, reusing
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips
from eas_search.supernet import Supernet
from eas_search.training import FineTuneConfig, fine_tune, sample_scores

LAYERS, PROMPT = 4, 6
Randomise = Callable[..., nn.Module]


def families() -> Iterator[Any]:
    """Decoders of other norms, activations and blocks than Llama's; an FFN of experts is not understood."""
    import transformers as hf

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    gated = {**sizes, "intermediate_size": 48, "num_key_value_heads": 2}
    gpt2 = hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64)
    yield pytest.param(hf.GPT2LMHeadModel, gpt2, True, id="gpt2")
    yield pytest.param(hf.Gemma2ForCausalLM, hf.Gemma2Config(**gated, head_dim=8), True, id="gemma2")
    yield pytest.param(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**sizes, intermediate_size=64), True, id="gpt_neox")
    yield pytest.param(hf.Phi3ForCausalLM, hf.Phi3Config(**gated, pad_token_id=0), True, id="phi3")
    yield pytest.param(hf.OPTForCausalLM, hf.OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32), True, id="opt")
    mixture = hf.MixtralConfig(**gated, num_local_experts=2)
    yield pytest.param(hf.MixtralForCausalLM, mixture, False, id="mixtral")


def batch_of(tokens: Tensor) -> dict[str, Tensor]:
    """A prompt of six tokens and an answer of two to four; padding on the right."""
    place = torch.arange(tokens.shape[1])
    end = torch.tensor([[10], [8], [9], [10]])[: len(tokens)]
    labels = tokens.where((place >= PROMPT) & (place < end), -100)
    return {"input_ids": tokens, "attention_mask": (place < end).long(), "labels": labels}


def wanted(labels: Tensor) -> Tensor:
    """Which tokens' logits predict a label, [B, n]."""
    return torch.cat([labels[:, 1:] != -100, torch.zeros_like(labels[:, :1], dtype=torch.bool)], dim=1)


@settings(deadline=None, max_examples=60)
@given(
    skip=st.sets(st.integers(0, LAYERS - 1), min_size=1),
    rank=st.sampled_from([0, 4]),
    placement=st.sampled_from(["ffn", "residual", "parallel"]),
    pooling=st.sampled_from(["none", "prompt", "prefix"]),
    router=st.sampled_from(["static", "routed"]),
    keep=st.integers(1, 11),
    merged=st.booleans(),
)
def test_the_last_logits_are_those_of_the_whole_pass(
    llama: Any, randomise: Randomise, tokens: Tensor, skip: set[int], keep: int, merged: bool, **form: Any
) -> None:
    form["pia_dim"] = form.pop("rank")
    student: Any = randomise(apply_skips(llama, SkipConfig(skip=tuple(skip), adapter_dim=2, **form)))
    student = (merge(student) if merged else student).eval()
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0  # padding on the left, as in generation
    with torch.no_grad():
        whole = student(input_ids=tokens, attention_mask=mask).logits
        last = student(input_ids=tokens, attention_mask=mask, logits_to_keep=keep).logits
    torch.testing.assert_close(last, whole[:, -keep:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "config", "understood"), list(families()))
@pytest.mark.parametrize("placement", ["residual", "parallel"])
def test_other_families_agree(
    kind: Any, config: Any, understood: bool, placement: Any, randomise: Randomise, tokens: Tensor
) -> None:
    torch.manual_seed(0)
    model = kind(config).eval()
    skip = tuple(range(1, LAYERS))
    student: Any = randomise(apply_skips(model, SkipConfig(skip=skip, pia_dim=4, placement=placement, pooling="none")))
    prove_last_logits(student, {"input_ids": tokens}, 1e-5)
    prove_last_logits(merge(student).eval(), {"input_ids": tokens}, 1e-5)
    batch = batch_of(tokens)
    assert labels_suffice(student, batch, 1e-5)
    with torch.no_grad(), only_labelled():
        some = student(**batch, use_cache=False).logits
    # Where the FFN is not understood, it may mix tokens.
    assert torch.equal(some, student(**batch, use_cache=False).logits) != understood


def ffn_flops(tokens: int, neurons: int = 48) -> int:
    """Of a gated FFN of width 32: three products, two operations per weight and token."""
    return 2 * 3 * 32 * neurons * tokens


@pytest.mark.parametrize(("skip", "alone"), [((2, 3), 2), ((0, 1, 3), 1), ((0, 2), 0), ((0, 1, 2, 3), 4)])
def test_a_block_behind_the_last_attention_costs_as_much_as_the_tokens_asked_for(
    llama: Any, tokens: Tensor, skip: tuple[int, ...], alone: int
) -> None:
    config = SkipConfig(skip=skip, pia_dim=0)
    student, inputs = apply_skips(llama, config).eval(), {"input_ids": tokens}
    kept = apply_skips(llama, SkipConfig(skip=())).eval()
    attention = (prefill_flops(kept, inputs) - LAYERS * ffn_flops(40) - head_flops(4)) // LAYERS
    spared = min(LAYERS, alone + 1)  # the FFN behind the last attention, too
    ffns = (LAYERS - spared) * ffn_flops(40) + spared * ffn_flops(4)
    expected = (LAYERS - len(skip)) * attention + ffns + head_flops(4)
    assert prefill_flops(student, inputs) == expected
    # With pooling over the prompt every token is needed to the end; plain deletion pools nothing.
    pooled = apply_skips(llama, config.model_copy(update={"pia_dim": 4, "placement": "ffn", "pooling": "prompt"}))
    assert prefill_flops(merge(pooled).eval(), inputs) >= expected + alone * (ffn_flops(40) - ffn_flops(4))


def head_flops(tokens: int) -> int:
    return 2 * 32 * 64 * tokens


@pytest.mark.parametrize("placement", ["ffn", "residual", "parallel"])
@pytest.mark.parametrize("skip", [(3,), (1, 2, 3), (0, 1, 2, 3), (0, 2)])
def test_loss_and_gradients_are_those_of_the_whole_pass(
    llama: Any, randomise: Randomise, tokens: Tensor, placement: Any, skip: tuple[int, ...]
) -> None:
    """In double precision, in which only the order of sums is left to differ."""
    config = SkipConfig(skip=skip, pia_dim=4, placement=placement, pooling="none", adapter_dim=2)
    student: Any = randomise(apply_skips(copy.deepcopy(llama).double(), config)).double()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    batch = batch_of(tokens)
    every = student(**batch, use_cache=False)
    with only_labelled():
        some = student(**batch, use_cache=False)
    rows = wanted(batch["labels"])
    torch.testing.assert_close(some.logits[rows], every.logits[rows])
    assert not torch.equal(some.logits, every.logits)  # at least the last FFN was spared some tokens
    for one, other in zip(
        torch.autograd.grad(some.loss, trained, allow_unused=True),
        torch.autograd.grad(every.loss, trained, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)


def test_training_comes_to_the_same_adapters(llama: Any, randomise: Randomise, tokens: Tensor) -> None:
    batch, found = batch_of(tokens), []
    split = type("Split", (), {"__len__": lambda self: 4, "batches": lambda self, *_: iter([batch])})()
    for labelled in (False, True):
        student = randomise(apply_skips(llama, SkipConfig(skip=(2, 3), pia_dim=4, pooling="none", adapter_dim=2)))
        conditions = Conditions(labelled=labelled)
        losses = fine_tune(student, split, FineTuneConfig(steps=5), seed=0, conditions=conditions)
        found.append([*losses, *(p.detach().double().norm().item() for p in student.parameters() if p.requires_grad)])
    assert found[1] == pytest.approx(found[0], rel=5e-3)  # AdamW's first steps go by the gradients' signs
    assert found[1][0] > found[1][4]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_compute_the_same_tokens_again(
    llama: Any, randomise: Randomise, tokens: Tensor, reentrant: bool
) -> None:
    student: Any = randomise(apply_skips(llama, SkipConfig(skip=(2, 3), pia_dim=4, pooling="none", adapter_dim=2)))
    trained, gradients = [p for p in student.parameters() if p.requires_grad], []
    for checkpointed in (False, True):
        student.train()
        if checkpointed:
            student.enable_input_require_grads()
            student.activation_checkpointing_enable({"use_reentrant": reentrant})
        with only_labelled():
            loss = student(**batch_of(tokens), use_cache=False).loss
        student(input_ids=tokens[:2], use_cache=False)  # another pass before the first is computed again
        gradients.append(torch.autograd.grad(loss, trained) if not reentrant else backward(loss, trained))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def backward(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize("merged", [False, True])
def test_who_looks_inside_sees_every_token(llama: Any, randomise: Randomise, tokens: Tensor, merged: bool) -> None:
    student: Any = randomise(apply_skips(llama, SkipConfig(skip=(2, 3), pia_dim=4, pooling="none")))
    student = (merge(student) if merged else student).eval()
    with torch.no_grad():
        whole = student(input_ids=tokens, output_hidden_states=True)
        last = student(input_ids=tokens, output_hidden_states=True, logits_to_keep=1)
        for one, other in zip(last.hidden_states, whole.hidden_states, strict=True):
            assert torch.equal(one, other)
        student.config.output_hidden_states = True
        try:
            assert torch.equal(student(input_ids=tokens, logits_to_keep=1).hidden_states[-1], whole.hidden_states[-1])
        finally:
            student.config.output_hidden_states = False
        # The stack alone gives hidden states, whatever the model was asked for before.
        student(input_ids=tokens, logits_to_keep=1)
        assert torch.equal(student.model(input_ids=tokens).last_hidden_state, whole.hidden_states[-1])


def test_a_failed_pass_leaves_no_wish_behind(
    llava: Any, randomise: Randomise, image_prompt: dict[str, Tensor], tokens: Tensor
) -> None:
    student: Any = randomise(apply_skips(llava, SkipConfig(skip=(2, 3), pia_dim=4, pooling="none")))
    stack = student.model.language_model
    with torch.no_grad():
        expected = stack(input_ids=tokens).last_hidden_state
        with pytest.raises(ValueError, match="image"):  # before the stack has taken the wish
            student(**{**image_prompt, "pixel_values": image_prompt["pixel_values"][:1]}, logits_to_keep=1)
        assert torch.equal(stack(input_ids=tokens).last_hidden_state, expected)


def test_a_student_generates_what_the_definition_says(llama: Any, randomise: Randomise, tokens: Tensor) -> None:
    student: Any = randomise(apply_skips(llama, SkipConfig(skip=(1, 2, 3), pia_dim=4, pooling="none")), std=0.5)
    merged: Any = merge(student).eval()
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    ids, seen = tokens, mask
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, student(input_ids=ids, attention_mask=seen).logits[:, -1:].argmax(-1)], dim=1)
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    for model in (student, merged):
        assert torch.equal(model.generate(tokens, attention_mask=mask, **options), ids)


@pytest.mark.filterwarnings("ignore")  # torch's own, about what it does not compile
def test_a_compiled_model_answers_like_itself(llama: Any, randomise: Randomise, tokens: Tensor) -> None:
    student: Any = randomise(apply_skips(llama, SkipConfig(skip=(2, 3), pia_dim=4, pooling="none")))
    torch.compiler.reset()
    compiled: Any = torch.compile(student, backend="eager")
    with torch.no_grad():
        whole = student(tokens, use_cache=False).logits
        for keep in (1, 0, 3, 1):  # what was asked for last is not what is compiled in
            found = compiled(tokens, logits_to_keep=keep, use_cache=False).logits
            torch.testing.assert_close(found, whole[:, -keep:], atol=1e-5, rtol=1e-5)


def test_llava_agrees(llava: Any, randomise: Randomise, image_prompt: dict[str, Tensor]) -> None:
    student: Any = randomise(apply_skips(llava, SkipConfig(skip=(2, 3, 5), pia_dim=4, pooling="none")))
    for model in (student, merge(student).eval()):
        prove_last_logits(model, image_prompt, 1e-5)
        labels = image_prompt["input_ids"].where(torch.arange(26) > 20, -100)
        assert labels_suffice(model, {**image_prompt, "labels": labels}, 1e-5)


def test_a_supernet_s_end_is_where_its_skips_are(llama: Any, randomise: Randomise, tokens: Tensor) -> None:
    supernet = Supernet(llama, attention_sites(llama), SkipConfig(pia_dim=4, pooling="none", adapter_dim=2))
    randomise(supernet.model)
    batch = batch_of(tokens)
    for skip in ((3,), (0, 2), (), (2, 3)):
        supernet.set_skips(skip)
        with torch.no_grad():
            every = supernet.model(**batch, use_cache=False)
            with only_labelled():
                some = supernet.model(**batch, use_cache=False)
        assert not torch.equal(some.logits, every.logits)
        torch.testing.assert_close(some.loss, every.loss)


def test_a_shared_stream_holds_every_token(llama: Any, tokens: Tensor) -> None:
    """What one student computed of some tokens only is not what another goes on from, although they begin alike."""
    twin = copy.deepcopy(llama)
    caches = attach_caches(twin, [], attention_sites(twin), {"input_ids": tokens}, (0, 2**24), tolerance=0)
    batch = batch_of(tokens)
    rows = wanted(batch["labels"])
    for skip in ((1, 2, 3), (1, 2), (1,), (1, 2, 3)):
        student: Any = apply_skips(twin, SkipConfig(skip=skip, pia_dim=0, pooling="none")).eval()
        with torch.no_grad():
            expected = student(**batch, use_cache=False).logits
            with only_labelled(), reusing(student, prefixes=True):
                found = student(**batch, use_cache=False).logits
        torch.testing.assert_close(found[rows], expected[rows])
    assert caches.prefixes.reused > 0


def test_a_score_that_looks_everywhere_gets_everything(llama: Any, randomise: Randomise, tokens: Tensor) -> None:
    """Only a scoring that says so is spared the logits that predict no label."""
    student = randomise(apply_skips(llama, SkipConfig(skip=(2, 3), pia_dim=4, pooling="none")))
    batch = batch_of(tokens)

    def score(model: Any, inputs: Any, extras: Any) -> Tensor:
        return model(**inputs, use_cache=False).logits.sum(dim=(1, 2))

    found = {}
    for labelled in (False, True):
        scoring = SimpleNamespace(score=score, labelled=labelled)
        split = SimpleNamespace(scoring=scoring, tokens=10, scored_batches=lambda size: iter([(batch, {})]))
        found[labelled] = sample_scores(student, split, conditions=Conditions(labelled=True))
    with torch.no_grad():
        torch.testing.assert_close(found[False], score(student, batch, {}))
    assert not torch.allclose(found[True], found[False])


class Mixing(nn.Module):
    """An FFN that looks at its neighbour."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + x.roll(1, dims=1))


def test_blocks_that_mix_tokens_are_found_out(llama: Any, tokens: Tensor) -> None:
    student: Any = apply_skips(llama, SkipConfig(skip=(2, 3), pia_dim=0)).eval()
    assert labels_suffice(student, batch_of(tokens), 1e-4)
    student.model.layers[3].mlp = Mixing(student.model.layers[3].mlp)
    assert not labels_suffice(student, batch_of(tokens), 1e-4)
    with pytest.raises(UnsupportedModelError, match=r"mixes tokens where nothing attends.*pooling 'prompt'"):
        prove_last_logits(student, batch_of(tokens), 1e-4)


def test_nothing_is_claimed_without_labels(llama: Any, tokens: Tensor) -> None:
    student = apply_skips(llama, SkipConfig(skip=(3,), pia_dim=0))
    assert not labels_suffice(student, {"input_ids": tokens}, 1e-4)


class ByName(nn.Module):
    """A block's FFN that is called by keyword."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x=x)
        return made


def test_an_ffn_may_be_called_by_keyword(llama: Any, randomise: Randomise, tokens: Tensor) -> None:
    student: Any = randomise(apply_skips(llama, SkipConfig(skip=(2, 3), pia_dim=4, pooling="none")))
    batch = batch_of(tokens)
    with torch.no_grad(), only_labelled():
        expected = student(**batch, use_cache=False).logits
        student.model.layers[1].mlp = ByName(student.model.layers[1].mlp)
        torch.testing.assert_close(student(**batch, use_cache=False).logits, expected, rtol=0, atol=0)
