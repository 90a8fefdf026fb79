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
from eas_search.training import FineTuneConfig, fine_tune

PLACEMENTS = ["ffn", "residual", "parallel"]


@torch.no_grad()
def logits(model: Any, tokens: Tensor, **inputs: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False, **inputs).logits


class TokenBatchNorm(nn.BatchNorm1d):
    """Over the features of tokens [B, n, d]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


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


def test_joint_training_moves_no_running_statistics(
    build_llama: Callable[..., Any], tokens: Tensor, randomise: Callable[..., nn.Module]
) -> None:
    """Bit-equal: the model, the supernet's own statistics, and a student that inherits from it afterwards."""

    class Texts:
        def __len__(self) -> int:
            return len(tokens)

        def batches(self, size: int, generator: torch.Generator) -> Any:
            for rows in torch.randperm(len(tokens), generator=generator).split(size):
                yield {"input_ids": tokens[rows], "labels": tokens[rows]}

    model = build_llama()
    model.model.norm = TokenBatchNorm(32).eval()
    expected = logits(model, tokens)
    supernet = supernet_of(model, randomise, adapter_dim=4)
    before = {name: value.clone() for name, value in supernet.adapters().items()}

    def draw(step: int, _: nn.Module) -> None:
        supernet.set_skips((step % 4,))

    fine_tune(
        supernet.model,
        Texts(),
        FineTuneConfig(steps=4, batch_size=2, distill=0.5),
        seed=0,
        before_step=draw,
        teacher=supernet.intact_logits,
    )
    assert any(not torch.equal(value, before[name]) for name, value in supernet.adapters().items())
    assert torch.equal(logits(model, tokens), expected)
    assert torch.equal(supernet.model.model.norm.running_mean, torch.zeros(32))
    supernet.set_skips((0, 2))
    student = apply_skips(model, supernet.config.model_copy(update={"skip": (0, 2)})).eval()
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
