"""One switchable model equals every student that inherits from it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eas_search.architectures import attention_sites
from eas_search.exceptions import ConfigError
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips
from eas_search.supernet import Supernet

PLACEMENTS = ["ffn", "residual", "parallel"]


@torch.no_grad()
def logits(model: Any, tokens: Tensor, **inputs: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False, **inputs).logits


def supernet_of(
    model: Any, randomise: Callable[..., nn.Module], sites: slice = slice(None), **values: object
) -> Supernet:
    config = SkipConfig(**{"pia_dim": 8, "placement": "parallel", "pooling": "prompt", **values})
    supernet = Supernet(model, attention_sites(model)[sites], config)
    randomise(supernet.model)
    return supernet


@pytest.mark.parametrize("adapters", [0, 4])
def test_with_nothing_skipped_it_is_the_model(llama: Any, tokens: Tensor, adapters: int) -> None:
    config = SkipConfig(pia_dim=4, pooling="prompt", adapter_dim=adapters)
    supernet = Supernet(llama, attention_sites(llama), config)
    assert torch.equal(logits(supernet.model, tokens), logits(llama, tokens))
    supernet.set_skips((0, 3))
    assert not torch.equal(logits(supernet.model, tokens), logits(llama, tokens))
    supernet.set_skips(())
    assert torch.equal(logits(supernet.model, tokens), logits(llama, tokens))


@pytest.mark.parametrize("skip", [(0,), (1, 3), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize(("placement", "router"), list(product(PLACEMENTS, ["static", "routed"])))
@pytest.mark.parametrize("adapters", [0, 4])
def test_a_student_that_inherits_everything_equals_the_switched_supernet(
    llama: Any,
    tokens: Tensor,
    randomise: Callable[..., nn.Module],
    skip: tuple[int, ...],
    placement: str,
    router: str,
    adapters: int,
) -> None:
    """The supernet is `parallel`, so it holds the PIAs of all three placements. Same operations, same order: equal."""
    supernet = supernet_of(llama, randomise, router=router, adapter_dim=adapters)
    supernet.set_skips(skip, placement)
    config = supernet.config.model_copy(update={"skip": skip, "placement": placement})
    student = apply_skips(llama, config).eval()
    supernet.inherit(student)
    labels = tokens.clone()
    labels[:, :6] = -100
    expected, actual = (logits(model, tokens, labels=labels) for model in (supernet.model, student))
    assert torch.equal(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("rank", [2, 4, 6])
def test_a_student_of_smaller_rank_takes_the_leading_units_of_each_group(
    llama: Any, tokens: Tensor, randomise: Callable[..., nn.Module], rank: int
) -> None:
    """Equal to the supernet's own PIA with the other bottleneck units cut off at their up-projection."""
    supernet = supernet_of(llama, randomise)
    student = apply_skips(llama, supernet.config.model_copy(update={"skip": (1, 2), "pia_dim": rank})).eval()
    supernet.inherit(student)
    for site in supernet.sites:
        for pia in supernet.pias(site).values():
            for up in pia.ups:
                up.weight[:, rank // 2 :] = 0.0  # [d, r / groups], two groups of 4
    supernet.set_skips((1, 2))
    torch.testing.assert_close(logits(student, tokens), logits(supernet.model, tokens), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [0, 2, 4, 8])
@pytest.mark.parametrize(("placement", "router"), list(product(PLACEMENTS, ["static", "routed"])))
def test_a_smaller_rank_in_use_is_the_student_of_that_rank(
    llama: Any, tokens: Tensor, randomise: Callable[..., nn.Module], rank: int, placement: str, router: str
) -> None:
    """Also after another rank was in use, and nothing of the other units is trained meanwhile."""
    supernet = supernet_of(llama, randomise, router=router)
    supernet.set_skips((0, 2), placement, pia_dim=6)
    supernet.set_skips((0, 2), placement, pia_dim=rank)
    config = supernet.config.model_copy(update={"skip": (0, 2), "placement": placement, "pia_dim": rank})
    student = apply_skips(llama, config).eval()
    supernet.inherit(student)
    expected = logits(student, tokens)
    torch.testing.assert_close(logits(supernet.model, tokens), expected, atol=2e-5, rtol=1e-5)
    if rank:
        supernet.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        pia = supernet.pias(supernet.sites[2])["ffn" if placement == "ffn" else "stream"]
        moved = pia.down.weight.grad.abs().sum(dim=1) > 0
        assert moved.tolist() == [unit % 4 < rank // 2 for unit in range(8)]
    supernet.set_skips((0, 2), placement)
    whole = apply_skips(llama, config.model_copy(update={"pia_dim": 8})).eval()
    supernet.inherit(whole)
    assert torch.equal(logits(supernet.model, tokens), logits(whole, tokens))


def test_inherited_weights_are_copies(llama: Any, tokens: Tensor, randomise: Callable[..., nn.Module]) -> None:
    supernet = supernet_of(llama, randomise, adapter_dim=4)
    student = apply_skips(llama, supernet.config.model_copy(update={"skip": (1,)})).eval()
    supernet.inherit(student)
    supernet.set_skips((1,))
    before = logits(supernet.model, tokens)
    randomise(student, seed=9)
    assert torch.equal(logits(supernet.model, tokens), before)


def test_adapters_go_out_and_come_back(llama: Any, tokens: Tensor, randomise: Callable[..., nn.Module]) -> None:
    supernet, other = (supernet_of(llama, randomise, adapter_dim=4) for _ in range(2))
    randomise(other.model, seed=8)
    for one in (supernet, other):
        one.set_skips((0, 2))
    expected = logits(supernet.model, tokens)
    assert not torch.equal(logits(other.model, tokens), expected)
    other.load_adapters({name: value.clone() for name, value in supernet.adapters().items()})
    assert torch.equal(logits(other.model, tokens), expected)
    with pytest.raises(ConfigError, match="do not fit"):
        other.load_adapters({})


@torch.no_grad()
def test_it_takes_the_light_adapters_of_a_trained_student(
    llama: Any, tokens: Tensor, randomise: Callable[..., nn.Module]
) -> None:
    config = SkipConfig(pia_dim=8, pooling="prompt", adapter_dim=4, router="routed")
    adapted = randomise(apply_skips(llama, config))
    supernet = Supernet(llama, attention_sites(llama), config)
    supernet.take_light_adapters(adapted)
    assert torch.equal(logits(supernet.model, tokens), logits(adapted, tokens))


@pytest.mark.parametrize("adapters", [0, 4])
def test_sites_that_cannot_be_switched_are_left_alone(
    llama: Any, tokens: Tensor, randomise: Callable[..., nn.Module], adapters: int
) -> None:
    supernet = supernet_of(llama, randomise, sites=slice(1, 3), adapter_dim=adapters)
    supernet.set_skips((1,))
    student = apply_skips(llama, supernet.config.model_copy(update={"skip": (1,)})).eval()
    supernet.inherit(student)
    assert torch.equal(logits(student, tokens), logits(supernet.model, tokens))


@torch.no_grad()
def test_it_refuses_to_decode_while_skipping(llama: Any, tokens: Tensor) -> None:
    supernet = Supernet(llama, attention_sites(llama), SkipConfig(pia_dim=4))
    supernet.set_skips((1,))
    with pytest.raises(ConfigError, match="expected use_cache=False"):
        supernet.model(input_ids=tokens, use_cache=True)


def test_it_starts_with_nothing_skipped(llama: Any) -> None:
    with pytest.raises(ConfigError, match="expected skip = "):
        Supernet(llama, attention_sites(llama), SkipConfig(skip=(1,)))
