"""Decoding with a KV cache: the same tokens as without one, and no memory for skipped attentions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eas_search.exceptions import ConfigError
from eas_search.merging import merge
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips

PROMPT, LAYERS = 6, 4
SKIP_SETS: dict[str, tuple[int, ...]] = {
    "first": (0,),
    "some": (1, 3),
    "first and last": (0, 3),
    "all": (0, 1, 2, 3),
    "none": (),
}
LOOKUP = {"prompt_lookup_num_tokens": 3}
POOLINGS = list(product(["prompt", "prefix", "none"], ["static", "routed"]))


@pytest.fixture(scope="module")
def make(llama: Any, randomise: Callable[..., nn.Module]) -> Callable[..., Any]:
    def build(skip: tuple[int, ...] = (0, 2), seed: int = 1, **changes: object) -> Any:
        values = {"pia_dim": 4, "adapter_dim": 4, "router": "routed", "pooling": "prompt", **changes}
        return randomise(apply_skips(llama, SkipConfig(skip=skip, **values)), seed)

    return build


def padding(side: str, rows: int, n: int) -> Tensor:
    """2-D mask; row 1 has three padding tokens and row 2 one."""
    mask = torch.ones(rows, n, dtype=torch.long)
    for row, count in ((1, 3), (2, 1)):
        if side == "left":
            mask[row, :count] = 0
        elif side == "right":
            mask[row, n - count :] = 0
    return mask


@torch.no_grad()
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(("pooling", "router"), POOLINGS)
@pytest.mark.parametrize("skip", SKIP_SETS.values(), ids=SKIP_SETS)
def test_cached_steps_equal_one_uncached_pass(
    make: Callable[..., Any], tokens: Tensor, skip: tuple[int, ...], pooling: str, router: str, side: str
) -> None:
    """Teacher-forced; 2e-5: the same sums over keys, of other shapes."""
    student = make(skip, pooling=pooling, router=router)
    mask = torch.cat([padding(side, 4, PROMPT), torch.ones(4, 4, dtype=torch.long)], dim=1)
    in_prompt = (torch.arange(10) < PROMPT).expand(4, -1)
    whole = student(input_ids=tokens, attention_mask=mask, prompt_mask=in_prompt, use_cache=False).logits
    cache, steps = None, []
    for start, end in [(0, PROMPT), (6, 7), (7, 8), (8, 10)]:
        step = student(
            input_ids=tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
        )
        cache = step.past_key_values
        steps.append(step.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(steps, dim=1)[real], whole[real], atol=2e-5, rtol=1e-5)
    assert cache.get_seq_length() == 10


@torch.no_grad()
def greedy_by_hand(student: Any, tokens: Tensor, mask: Tensor, steps: int) -> Tensor:
    """The definition: one whole pass per token, nothing kept between them."""
    prompt = tokens.shape[1]
    for _ in range(steps):
        in_prompt = (torch.arange(tokens.shape[1]) < prompt).expand(len(tokens), -1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = student(
            input_ids=tokens, attention_mask=mask, position_ids=positions, prompt_mask=in_prompt, use_cache=False
        ).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return tokens


WAYS: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize(("pooling", "router"), POOLINGS)
@pytest.mark.parametrize("skip", [(0, 2), (0, 1, 2, 3)], ids=str)
def test_greedy_generation_equals_the_definition(
    make: Callable[..., Any], tokens: Tensor, skip: tuple[int, ...], pooling: str, router: str, side: str, way: str
) -> None:
    student, mask = make(skip, pooling=pooling, router=router), padding(side, 4, PROMPT)
    expected = greedy_by_hand(student, tokens[:, :PROMPT], mask, steps=6)
    actual = student.generate(
        tokens[:, :PROMPT],
        attention_mask=mask,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        **WAYS[way],
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("pooling", ["prompt", "prefix", "none"])
@pytest.mark.parametrize(
    "search",
    [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["beams", "several beams", "samples"],
)
def test_reordered_and_repeated_rows_keep_their_means(
    make: Callable[..., Any], tokens: Tensor, pooling: str, search: dict[str, Any]
) -> None:
    student, found = make((0, 2), pooling=pooling), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(
            student.generate(
                tokens[:3, :PROMPT],
                attention_mask=padding("left", 3, PROMPT),
                max_new_tokens=6,
                use_cache=use_cache,
                **search,
            )
        )
    assert torch.equal(*found)
    assert len(found[0]) == 3 * search.get("num_return_sequences", 1)


def bytes_of(cache: Any) -> int:
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@torch.no_grad()
@pytest.mark.parametrize("skip", SKIP_SETS.values(), ids=SKIP_SETS)
def test_skipped_sites_hold_no_keys_and_values(
    make: Callable[..., Any], llama: Any, tokens: Tensor, skip: tuple[int, ...]
) -> None:
    full = bytes_of(llama(tokens, use_cache=True).past_key_values)
    cache = make(skip)(tokens, use_cache=True).past_key_values
    assert bytes_of(cache) * LAYERS == full * (LAYERS - len(skip))
    assert cache.get_seq_length() == tokens.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("other", [(), (1,), (0, 1, 2)], ids=str)
def test_a_cache_of_a_model_with_other_skips_is_refused(
    make: Callable[..., Any], llama: Any, tokens: Tensor, other: tuple[int, ...]
) -> None:
    cache = (make(other) if other else llama)(tokens, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="start the generation anew") as caught:
        make((0, 2))(tokens[:, :1], past_key_values=cache)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_a_cache_of_a_student_is_refused_by_every_other_model(
    make: Callable[..., Any], llama: Any, tokens: Tensor
) -> None:
    """Also by its own merged form, which keeps other means at the same sites."""
    student = make((0, 2))
    for other in (llama, merge(student), copy.deepcopy(student), make((0, 2))):
        cache = student(tokens, use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="start the generation anew"):
            other(tokens[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_copied_cache_continues_like_its_original(make: Callable[..., Any], tokens: Tensor) -> None:
    """The usual way to share a prompt: copy its cache for every continuation."""
    student = make((0, 2))
    cache = student(tokens[:, :PROMPT], use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    first, second = (student(tokens[:, PROMPT:8], past_key_values=one).logits for one in (cache, twin))
    assert torch.equal(first, second)


@pytest.mark.parametrize("pooling", ["prompt", "none"])
def test_candidate_decoding_gives_the_greedy_tokens(make: Callable[..., Any], tokens: Tensor, pooling: str) -> None:
    student = make((0, 2), pooling=pooling)
    found = [student.generate(tokens[:1], max_new_tokens=12, do_sample=False, **how) for how in ({}, LOOKUP)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("pooling", "how", "says"),
    [("prefix", LOOKUP, "expected plain decoding"), ("prompt", {"prefill_chunk_size": 4}, "in one piece")],
)
def test_what_a_pooling_cannot_do_is_refused(
    make: Callable[..., Any], tokens: Tensor, pooling: str, how: dict[str, int], says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        make((0, 2), pooling=pooling).generate(tokens[:1], max_new_tokens=12, do_sample=False, **how)
    assert "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["prompt", "prefix", "none"])
@pytest.mark.parametrize("skip", [(), (1,)], ids=str)
def test_a_cache_says_whether_it_can_take_back_tokens(
    make: Callable[..., Any], tokens: Tensor, pooling: str, skip: tuple[int, ...]
) -> None:
    cache = make(skip, pooling=pooling)(tokens, use_cache=True).past_key_values
    assert cache.is_croppable == (pooling != "prefix")


@pytest.mark.parametrize("pooling", ["prefix", "none"])
def test_a_prompt_in_chunks_gives_the_same_tokens(make: Callable[..., Any], tokens: Tensor, pooling: str) -> None:
    student = make((0, 2), pooling=pooling)
    how: list[dict[str, int]] = [{}, {"prefill_chunk_size": 4}]
    found = [student.generate(tokens, max_new_tokens=8, do_sample=False, **one) for one in how]
    assert torch.equal(*found)


@torch.no_grad()
def test_a_reset_cache_starts_anew(make: Callable[..., Any], tokens: Tensor) -> None:
    from transformers import StaticCache

    student = make((0, 2))
    cache = StaticCache(config=student.config, max_cache_len=16)
    first = student(tokens[:2], past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(student(tokens[:2], past_key_values=cache).logits, first, atol=2e-5, rtol=0.0)


@pytest.mark.parametrize("pooling", ["prompt", "prefix", "none"])
def test_llava_generates_the_same_with_and_without_a_cache(
    llava: Any, image_prompt: dict[str, Tensor], randomise: Callable[..., nn.Module], pooling: str
) -> None:
    config = SkipConfig(skip=(0, 2, 4, 5), pia_dim=4, adapter_dim=4, router="routed", pooling=pooling)
    student = randomise(apply_skips(llava, config))
    assert {site.tower for site in student.eas.skipped} == {"text", "vision"}
    found = [
        student.generate(**image_prompt, max_new_tokens=5, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*found)
    other = {**image_prompt, "pixel_values": -image_prompt["pixel_values"]}
    with torch.no_grad():
        assert (student(**other).logits - student(**image_prompt).logits).abs().max() > 1e-2
