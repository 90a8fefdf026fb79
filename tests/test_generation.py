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


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["prompt", "prefix", "none"])
def test_a_copied_cache_goes_on_token_by_token(make: Callable[..., Any], tokens: Tensor, pooling: str) -> None:
    """Against one pass without a cache; 2e-5 as above. What is copied must go on growing as one whole."""
    student = make((0, 2), pooling=pooling)
    in_prompt = (torch.arange(10) < PROMPT).expand(4, -1)
    whole = student(tokens, prompt_mask=in_prompt, use_cache=False).logits
    twin = copy.deepcopy(student(tokens[:, :PROMPT], use_cache=True).past_key_values)
    steps = [student(step, past_key_values=twin).logits for step in tokens[:, PROMPT:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, PROMPT:], atol=2e-5, rtol=1e-5)
    assert twin.get_seq_length() == 10


def more(student: Any, tokens: Tensor, **how: Any) -> Any:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    return student.generate(tokens, return_dict_in_generate=True, **options, **how)


@pytest.mark.parametrize("form", ["student", "merged"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_second_turn_on_the_cache_of_the_first_is_refused_where_its_tokens_could_enter_no_mean(
    make: Callable[..., Any], tokens: Tensor, form: str, copied: bool
) -> None:
    student = make((0, 2)) if form == "student" else merge(make((0, 2)))
    first = more(student, tokens[:2, :PROMPT])
    turn = torch.cat([first.sequences, tokens[:2, PROMPT:]], dim=1)
    cache = copy.deepcopy(first.past_key_values) if copied else first.past_key_values
    with pytest.raises(ConfigError, match=r"got a cache of 11 earlier tokens; .* pooling 'prefix' or 'none'") as caught:
        more(student, turn, past_key_values=cache)
    assert "\n" not in str(caught.value)
    # Without the cache, or with an emptied one, the second turn is a prompt like any other.
    cache.reset()
    again = more(student, turn, past_key_values=cache).sequences
    assert torch.equal(again, more(student, turn, use_cache=False).sequences)


@pytest.mark.parametrize(
    "changes", [{"pooling": "prefix"}, {"pooling": "none"}, {"pia_dim": 0, "adapter_dim": 0}], ids=str
)
def test_a_second_turn_goes_on_from_the_cache_where_no_mean_is_over_the_whole_prompt(
    make: Callable[..., Any], tokens: Tensor, changes: dict[str, Any]
) -> None:
    student = make((0, 2), **changes)
    first = more(student, tokens[:2, :PROMPT])
    turn = torch.cat([first.sequences, tokens[:2, PROMPT:]], dim=1)
    second = more(student, turn, past_key_values=first.past_key_values).sequences
    assert torch.equal(second, more(student, turn, use_cache=False).sequences)


@torch.no_grad()
def test_a_cache_from_which_everything_was_taken_back_is_empty(make: Callable[..., Any], tokens: Tensor) -> None:
    student = make((0, 2))
    cache = student(tokens[:2], use_cache=True).past_key_values
    cache.crop(-10)
    expected = more(student, tokens[2:], use_cache=False).sequences
    assert torch.equal(more(student, tokens[2:], past_key_values=cache).sequences, expected)


@pytest.mark.parametrize("pooling", ["prompt", "none"])
def test_students_assist_and_are_assisted(make: Callable[..., Any], llama: Any, tokens: Tensor, pooling: str) -> None:
    """The assistant goes on from its own cache at every call; greedy decoding gives the same tokens whoever assists."""
    student, other = make((0, 2), pooling=pooling), make((1,), seed=2, pooling=pooling)
    for main in (llama, student):
        alone = more(main, tokens[:1, :PROMPT]).sequences
        for assistant in (llama, student, merge(student), other):
            assert torch.equal(more(main, tokens[:1, :PROMPT], assistant_model=assistant).sequences, alone)


def test_what_an_assistant_proposes_is_what_it_would_decode_alone(make: Callable[..., Any], tokens: Tensor) -> None:
    """Its own means are over the prompt and nothing else, so that of its own answer every token is accepted."""
    student = make((0, 2))
    passes: list[int] = []
    handle = student.register_forward_pre_hook(lambda *_: passes.append(1))
    twin = make((0, 2))
    for model in (student, twin):
        model.generation_config.num_assistant_tokens_schedule = "constant"
        model.generation_config.num_assistant_tokens = 3
        model.generation_config.assistant_confidence_threshold = 0.0
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    student.generate(tokens[:1, :PROMPT], assistant_model=twin, **options)
    handle.remove()
    assert len(passes) == 3  # of four tokens each


@pytest.mark.parametrize("how", ["ids", "ids and no embeddings", "embeddings", "by place"])
def test_the_prompt_ends_in_the_same_place_however_it_is_given(
    make: Callable[..., Any], tokens: Tensor, how: str
) -> None:
    student, prompt = make((0, 2)), tokens[:, :PROMPT]
    expected = greedy_by_hand(student, prompt, torch.ones_like(prompt), steps=6)[:, PROMPT:]
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "ids": ((), {"input_ids": prompt}),
        "ids and no embeddings": ((), {"input_ids": prompt, "inputs_embeds": None}),
        "embeddings": ((), {"inputs_embeds": student.get_input_embeddings()(prompt).detach()}),
        "by place": ((prompt, None), {}),
    }
    args, named = calls[how]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for cached in (True, False):
        assert torch.equal(student.generate(*args, **named, **options, use_cache=cached)[:, -6:], expected)


class Stream:
    """What a cache that offloads its layers asks of a CUDA stream."""

    def wait_stream(self, _: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@torch.no_grad()
@pytest.mark.parametrize("skip", [(), (2,), (2, 3), (0, 3), (0, 1, 2)], ids=str)
def test_a_cache_that_offloads_its_layers_fetches_every_kept_one_in_time(
    make: Callable[..., Any], tokens: Tensor, monkeypatch: pytest.MonkeyPatch, skip: tuple[int, ...]
) -> None:
    """Without a GPU: a layer is away from `offload` to `prefetch`, and nothing may be added to it meanwhile."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    away: set[int] = set()
    update = DynamicLayer.update

    def checked(layer: Any, *args: Any, **kwargs: Any) -> Any:
        assert id(layer) not in away
        return update(layer, *args, **kwargs)

    monkeypatch.setattr(DynamicLayer, "update", checked)
    monkeypatch.setattr(DynamicLayer, "offload", lambda layer: away.add(id(layer)))
    monkeypatch.setattr(DynamicLayer, "prefetch", lambda layer: away.discard(id(layer)))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *_: Stream())
    student = make(skip)
    cache: Any = DynamicCache(config=student.config)
    cache.offloading, cache.only_non_sliding, cache.prefetch_stream = True, True, Stream()
    expected = more(student, tokens[:1, :PROMPT]).sequences
    assert torch.equal(more(student, tokens[:1, :PROMPT], past_key_values=cache).sequences, expected)
    assert len(away) == max(1, LAYERS - len(skip) - 1)  # the first one is back for the next step


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
