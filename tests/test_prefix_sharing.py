"""Shared prefixes: bit for bit what is computed without them, and no layer computed twice that need not be."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from eas_search.architectures import attention_sites
from eas_search.merging import merge
from eas_search.prefix_sharing import PrefixCache
from eas_search.redundancy import Passes
from eas_search.redundancy.kl import kl_scores
from eas_search.redundancy.leave_one_out import leave_one_out_scores
from eas_search.reuse import attach_caches, reusing
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips
from eas_search.supernet import Supernet

LAYERS = 4
Inputs = dict[str, Tensor]


def cached(model: Any, tokens: Tensor, limit: int = 2**24) -> tuple[Any, PrefixCache]:
    twin = copy.deepcopy(model)
    caches = attach_caches(twin, [], attention_sites(twin), {"input_ids": tokens}, (0, limit), tolerance=0)
    return twin, caches.prefixes


@torch.no_grad()
def scored(model: Any, batches: Sequence[Inputs], cache: bool = True) -> list[Tensor]:
    if not cache:
        return [model(**inputs, use_cache=False).logits for inputs in batches]
    with reusing(model, prefixes=True):
        return [model(**inputs, use_cache=False).logits for inputs in batches]


@pytest.fixture
def batches(tokens: Tensor) -> list[Inputs]:
    """Two batches: one with labels (a prompt of six tokens, padding on the right), one of other rows without."""
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    labels = torch.where(torch.arange(10) < 6, -100, tokens)
    return [{"input_ids": tokens, "attention_mask": mask, "labels": labels}, {"input_ids": tokens.flip(0)[:3, :7]}]


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def every_set() -> list[tuple[int, ...]]:
    return [skip for size in range(LAYERS + 1) for skip in itertools.combinations(range(LAYERS), size)]


def computed_at_least(sets: Sequence[tuple[int, ...]]) -> int:
    """Layers behind the longest common prefix with any earlier set; the last layer is always computed."""
    masks = [tuple(layer in skip for layer in range(LAYERS)) for skip in sets]
    total = 0
    for i, mask in enumerate(masks):
        common = [next((n for n in range(LAYERS) if mask[n] != other[n]), LAYERS) for other in masks[:i]]
        total += LAYERS - min(max(common, default=0), LAYERS - 1)
    return total


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_deletions_share_every_common_prefix(llama: Any, tokens: Tensor, batches: list[Inputs], order: str) -> None:
    model, cache = cached(llama, tokens)
    sets = every_set()[1:]  # what skips nothing has no hooks, and is called in another form
    if order == "shuffled":
        sets = [sets[i] for i in torch.randperm(len(sets), generator=torch.Generator().manual_seed(3))]
    for skip in sets:
        student = apply_skips(model, SkipConfig(skip=skip, pia_dim=0, pooling="none"))
        assert same(scored(student, batches), scored(student, batches, cache=False))
    assert cache.computed == len(batches) * computed_at_least(sets)
    assert cache.reused == len(batches) * (LAYERS * len(sets) - computed_at_least(sets))


@pytest.mark.parametrize("pooling", ["prompt", "prefix"])
def test_untrained_adapters_share_too(
    llama: Any, tokens: Tensor, batches: list[Inputs], randomise: Callable[..., Any], pooling: str
) -> None:
    model, cache = cached(llama, tokens)
    config = SkipConfig(pia_dim=4, adapter_dim=2, pooling=pooling)
    supernet = Supernet(model, attention_sites(model), config)
    randomise(supernet.model)
    for skip, dim, placement in itertools.product(every_set()[::2], (2, 4), ("parallel", "ffn")):
        wanted = config.model_copy(update={"skip": skip, "pia_dim": dim, "placement": placement})
        student = apply_skips(model, wanted).eval()
        supernet.inherit(student)
        assert same(scored(student, batches), scored(student, batches, cache=False))
    assert cache.reused > cache.computed // 2


def test_a_supernet_is_known_by_what_it_skips_now(
    llama: Any, tokens: Tensor, batches: list[Inputs], randomise: Callable[..., Any]
) -> None:
    model, cache = cached(llama, tokens)
    supernet = Supernet(model, attention_sites(model), SkipConfig(pia_dim=2, adapter_dim=2))
    randomise(supernet.model)
    for skip, placement in itertools.product(every_set(), ("parallel", "residual")):
        supernet.set_skips(skip, placement)
        assert same(scored(supernet.model, batches), scored(supernet.model, batches, cache=False))
    assert cache.reused > 0


def test_a_left_out_attention_starts_from_what_is_known(
    llama: Any, tokens: Tensor, batches: list[Inputs], randomise: Callable[..., Any]
) -> None:
    """The passes without site 1, 2 and 3 go on behind 0, 1 and 2 layers that an earlier one has computed."""
    scores = []
    for limit in (2**24, 0):
        model, cache = cached(llama, tokens, limit)
        supernet = Supernet(model, attention_sites(model), SkipConfig(pia_dim=2, adapter_dim=2))
        randomise(supernet.model)
        passes = Passes(supernet, batches[:1])
        scores.append((leave_one_out_scores(passes), kl_scores(passes)))
        assert (cache.reused, cache.computed) == ((0 + 1 + 2, 4 + 3 + 2) if limit else (0, 0))
    assert scores[0] == scores[1]


def test_the_prompt_is_part_of_what_a_pass_is_known_by(
    llama: Any, tokens: Tensor, batches: list[Inputs], randomise: Callable[..., Any]
) -> None:
    model, _ = cached(llama, tokens)
    student = randomise(apply_skips(model, SkipConfig(skip=(0, 1), pia_dim=2, pooling="prompt")))
    longer = {**batches[0], "labels": torch.where(torch.arange(10) < 3, -100, tokens)}
    for _ in range(3):
        for inputs in (batches[0], longer):
            assert same(scored(student, [inputs]), scored(student, [inputs], cache=False))
    first, second = (scored(student, [inputs])[0] for inputs in (batches[0], longer))
    assert not torch.equal(first, second)


def test_nothing_is_kept_behind_adapters_that_are_trained_anew(
    llama: Any, tokens: Tensor, batches: list[Inputs], randomise: Callable[..., Any]
) -> None:
    model, cache = cached(llama, tokens)
    held = cache.held
    for seed in range(3):  # light adapters at every layer: nothing recurs
        student = randomise(apply_skips(model, SkipConfig(skip=(2,), pia_dim=2, adapter_dim=2)), seed)
        assert same(scored(student, batches), scored(student, batches, cache=False))
    assert (cache.held, cache.reused) == (held, 0)
    for seed in range(3):  # none: the two layers in front of the skipped one are the original model's
        student = randomise(apply_skips(model, SkipConfig(skip=(2,), pia_dim=2)), seed)
        assert same(scored(student, batches), scored(student, batches, cache=False))
        assert cache.reused == seed * len(batches) * 2


def test_merged_weights_are_not_taken_for_the_originals(
    llama: Any, tokens: Tensor, batches: list[Inputs], randomise: Callable[..., Any]
) -> None:
    model, _ = cached(llama, tokens)
    for seed in range(6):  # freed one after the other, so that new weights lie where others lay
        student = apply_skips(model, SkipConfig(skip=(0, 1), pia_dim=2, pooling="none", placement="ffn"))
        merged: Any = merge(randomise(student, seed)).eval()
        del student
        for _ in range(3):
            assert same(scored(merged, batches), scored(merged, batches, cache=False))
        del merged


def test_streams_of_another_precision_are_not_taken_over(llama: Any, tokens: Tensor, batches: list[Inputs]) -> None:
    model, cache = cached(llama, tokens)
    students = [apply_skips(model, SkipConfig(skip=skip, pia_dim=0, pooling="none")) for skip in ((2,), (3,))]

    def precise(mixed: bool) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if mixed else nullcontext()

    expected = {}
    for mixed in (True, False):
        with precise(mixed):
            expected[mixed] = [scored(student, batches, cache=False) for student in students]
    for mixed in (True, False, True):
        for student, logits in zip(students, expected[mixed], strict=True):
            with precise(mixed):
                assert same(scored(student, batches), logits)
    assert cache.reused > 0


@pytest.mark.parametrize("streams", [1, 5])
def test_the_cap_is_kept(llama: Any, tokens: Tensor, batches: list[Inputs], streams: int) -> None:
    limit = streams * 4 * 10 * 32 * 4 + 1
    model, cache = cached(llama, tokens, limit)
    most = 0
    for skip in every_set() * 2:
        student = apply_skips(model, SkipConfig(skip=skip, pia_dim=0, pooling="none"))
        assert same(scored(student, batches), scored(student, batches, cache=False))
        most = max(most, cache.held)
        assert cache.held == sum(state.stream.nbytes for state in cache._states.values())
    assert 0 < most <= limit
    assert cache.full
    assert cache.reused > 0


def test_generation_and_training_are_left_alone(llama: Any, tokens: Tensor, batches: list[Inputs]) -> None:
    model, cache = cached(llama, tokens)
    student = apply_skips(model, SkipConfig(skip=(0, 2), pia_dim=0, pooling="none")).eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = student.generate(input_ids=tokens, **options)
    for _ in range(2):
        with reusing(student, prefixes=True):
            assert torch.equal(student.generate(input_ids=tokens, **options), expected)
            assert student(**batches[0]).logits.requires_grad == student.lm_head.weight.requires_grad
    assert cache.computed == cache.reused == 0


def test_a_model_is_left_as_it_was(llama: Any, tokens: Tensor, batches: list[Inputs]) -> None:
    model, _ = cached(llama, tokens)
    student = apply_skips(model, SkipConfig(skip=(1,), pia_dim=0, pooling="none"))
    before = {name: (type(m), sorted(vars(m)), len(m._forward_pre_hooks)) for name, m in student.named_modules()}
    with pytest.raises(ValueError, match="exactly one"), reusing(student, prefixes=True):
        student(nonsense=1)
    scored(student, batches)
    assert before == {
        name: (type(m), sorted(vars(m)), len(m._forward_pre_hooks)) for name, m in student.named_modules()
    }


def test_blocks_that_hand_on_more_than_the_stream_are_not_shared(tokens: Tensor) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model: Any = T5ForConditionalGeneration(config).eval()
    inputs = {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]}
    caches = attach_caches(model, [], attention_sites(model), inputs, (0, 2**20), tolerance=0)
    assert "returns more than the residual stream" in caches.prefixes.why_not
    expected = scored(model, [inputs], cache=False)
    assert same(scored(model, [inputs]), expected)
    assert same(scored(model, [inputs]), expected)
    assert caches.prefixes.held == 0
