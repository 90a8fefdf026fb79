"""Redundancy scores against their definitions, on models whose attentions are deleted by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eas_search.architectures import attention_sites
from eas_search.exceptions import ConfigError
from eas_search.redundancy import ONE_SHOT_METHODS, BanditConfig, EasBandit, Passes, redundancy_scores
from eas_search.redundancy.bandit import bandit_scores
from eas_search.skip_config import SkipConfig
from eas_search.supernet import Supernet

Batch = dict[str, Tensor]


@pytest.fixture(scope="module")
def batches(tokens: Tensor) -> list[Batch]:
    found = []
    for shift in (0, 11):
        ids = (tokens + shift) % 57 + 3
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[2, :3], labels[:, :6] = 0, -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def cross_entropy(model: Any, batch: Batch) -> float:
    """Mean over labelled tokens, written out."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    labels = batch["labels"][:, 1:]
    chosen = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return float(-chosen[labels != -100].mean())


def test_leave_one_out_is_minus_the_increase_of_the_loss(
    llama: Any, batches: list[Batch], without_attention: Callable[..., nn.Module]
) -> None:
    intact = sum(cross_entropy(llama, batch) for batch in batches) / 2
    scores = redundancy_scores(llama, batches, "leave_one_out")
    assert list(scores) == [f"model.layers.{i}.self_attn" for i in range(4)]
    for name, score in scores.items():
        deleted = without_attention(llama, [name])
        loss = sum(cross_entropy(deleted, batch) for batch in batches) / 2
        assert score == pytest.approx(intact - loss, abs=1e-5)  # the model's own loss is float32


def test_similarity_is_the_mean_cosine_before_and_after_the_sublayer(llama: Any, batches: list[Batch]) -> None:
    """Padding does not count: 3 of the 40 tokens of each batch."""
    scores, totals = redundancy_scores(llama, batches, "similarity"), [0.0] * 4
    before: list[Tensor] = []
    after: list[Tensor] = []
    hooks = []
    for layer in llama.model.layers:
        for norm, seen in ((layer.input_layernorm, before), (layer.post_attention_layernorm, after)):
            hooks.append(norm.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].double())))
    for batch in batches:
        cross_entropy(llama, batch)
    for hook in hooks:
        hook.remove()
    for i, (x, h) in enumerate(zip(before, after, strict=True)):
        cosine = (x * h).sum(-1) / (x.norm(dim=-1) * h.norm(dim=-1))
        totals[i % 4] += float(cosine[batches[i // 4]["attention_mask"].bool()].mean()) / 2
    assert list(scores.values()) == pytest.approx(totals, abs=1e-6)


@pytest.mark.parametrize("method", ["bandit", "leave_one_out", "similarity"])
def test_scoring_leaves_the_model_untouched(llama: Any, batches: list[Batch], method: str) -> None:
    state, tree = copy.deepcopy(llama.state_dict()), repr(llama)
    before = cross_entropy(llama, batches[0])
    scores = redundancy_scores(llama, batches, method)
    assert len(scores) == 4
    assert all(math.isfinite(score) for score in scores.values())
    assert repr(llama) == tree
    assert all(parameter.requires_grad for parameter in llama.parameters())
    assert all(torch.equal(value, state[name]) for name, value in llama.state_dict().items())
    assert cross_entropy(llama, batches[0]) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


def test_text_sites_are_scored_unless_sites_are_given(llava: Any, image_prompt: Batch) -> None:
    batch = {**image_prompt, "labels": image_prompt["input_ids"]}
    assert all("language_model" in name for name in redundancy_scores(llava, [batch], "leave_one_out"))
    vision = [site for site in attention_sites(llava) if site.tower == "vision"]
    scores = redundancy_scores(llava, [batch], "leave_one_out", vision)
    assert list(scores) == [site.name for site in vision]
    assert scores[vision[0].name] != 0.0
    assert scores[vision[2].name] == pytest.approx(0.0, abs=1e-6)  # LLaVA reads the layer before it


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(["softmax", "sigmoid"]),
    sites=st.integers(3, 8),
    losses=st.lists(st.floats(0, 5), min_size=3, max_size=3),
    seed=st.integers(0, 999),
)
def test_laws_of_an_update(policy: str, sites: int, losses: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bandit = EasBandit(sites, BanditConfig(policy=policy, candidates=3, learning_rate=2.0))
    bandit.scores = torch.randn(sites, generator=generator) * 0.1
    before, size = bandit.scores.double(), 1 + seed % (sites - 1)
    sets = bandit.draw(size, generator)
    assert len({*sets}) == 3
    assert all(len(set(chosen)) == size and tuple(sorted(chosen)) == chosen for chosen in sets)
    bandit.update(sets, losses)
    p = torch.softmax(10 * before, 0) if policy == "softmax" else torch.sigmoid(before)
    rewards = [math.exp(-loss) for loss in losses]
    for i in range(sites):
        gain = sum(reward - sum(rewards) / 3 for reward, chosen in zip(rewards, sets, strict=True) if i in chosen)
        expected = before[i] + 2.0 * gain * p[i] * (1 - p[i])
        assert float(bandit.scores[i]) == pytest.approx(float(expected), abs=1e-6)  # scores are float32
        if not any(i in chosen for chosen in sets):
            assert float(bandit.scores[i]) == float(before[i])
        if all(i in chosen for chosen in sets):
            assert float(bandit.scores[i]) == pytest.approx(float(before[i]), abs=1e-7)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_earns_nothing(loss: float) -> None:
    bandit, twin = EasBandit(4), EasBandit(4)
    bandit.update([(0,), (1,), (2,)], [0.1, loss, 0.3])
    twin.update([(0,), (1,), (2,)], [0.1, 1e9, 0.3])  # exp(−1e9) = 0
    assert torch.equal(bandit.scores, twin.scores)
    assert bandit.scores[1] < 0 < bandit.scores[0]


def test_the_policy_prefers_high_scores() -> None:
    bandit = EasBandit(5)
    bandit.scores = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    generator = torch.Generator().manual_seed(0)
    firsts = [bandit.draw(2, generator, count=1)[0] for _ in range(200)]
    assert firsts.count((1, 3)) > 180


@pytest.mark.parametrize("policy", ["softmax", "sigmoid"])
def test_a_policy_that_is_sure_of_itself_still_draws_distinct_sets(policy: str) -> None:
    """softmax(10 r) of these scores is 1 for two sites and underflows to 0 for the others."""
    bandit = EasBandit(5, BanditConfig(policy=policy))
    bandit.scores = torch.tensor([0.0, 60.0, 0.0, 60.0, 0.0])
    sets = bandit.draw(2, torch.Generator().manual_seed(0), count=6)
    assert len(set(sets)) == 6
    assert policy == "sigmoid" or sets[0] == (1, 3)


@pytest.mark.parametrize(("size", "count"), [(0, 1), (5, 1), (4, 2), (1, 5)])
def test_sets_that_do_not_exist_are_refused(size: int, count: int) -> None:
    with pytest.raises(ConfigError, match=f"{count} distinct skip sets of {size} of 4"):
        EasBandit(4).draw(size, torch.Generator(), count)


def test_all_sets_are_drawn_when_just_enough_exist() -> None:
    sets = EasBandit(4).draw(2, torch.Generator().manual_seed(0), count=6)
    assert sorted(sets) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_the_bandit_finds_the_attention_that_does_nothing(
    llama: Any, batches: list[Batch], without_attention: Callable[..., nn.Module]
) -> None:
    """On labels that the model itself produces, deleting a real attention hurts and deleting an empty one does not."""
    model = without_attention(llama, ["model.layers.2.self_attn"])
    taught = []
    for batch in batches:
        with torch.no_grad():
            best = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
        labels = torch.where(batch["labels"] == -100, -100, best.roll(1, dims=1))
        taught.append({**batch, "labels": labels})
    scores = redundancy_scores(model, taught, "bandit")
    assert max(scores, key=scores.__getitem__) == "model.layers.2.self_attn"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "guess"}, "expected one of bandit, .*leave_one_out, kl, similarity"),
        ({"batches": []}, "at least one batch"),
    ],
)
def test_wrong_requests_are_one_line(llama: Any, batches: list[Batch], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        redundancy_scores(llama, **{"batches": batches, **changes})
    assert "\n" not in str(caught.value)


def test_the_bandit_needs_three_sites(llama: Any, batches: list[Batch]) -> None:
    supernet = Supernet(llama, attention_sites(llama)[:2], SkipConfig(pia_dim=0, pooling="none"))
    with pytest.raises(ConfigError, match="use 'leave_one_out'"):
        bandit_scores(Passes(supernet, batches))


def test_leave_one_out_and_kl_look_at_the_same_passes(llama: Any, batches: list[Batch]) -> None:
    supernet = Supernet(llama, attention_sites(llama), SkipConfig(pia_dim=0, pooling="none"))
    alone = {name: ONE_SHOT_METHODS[name](Passes(supernet, batches)) for name in ("leave_one_out", "kl")}
    made: list[int] = []
    handle = supernet.model.register_forward_hook(lambda *_: made.append(1))
    passes = Passes(supernet, batches)
    together = {name: ONE_SHOT_METHODS[name](passes) for name in ("leave_one_out", "kl")}
    handle.remove()
    assert together == alone
    assert len(made) == len(batches) * (1 + len(supernet.sites))


def test_without_logits_nothing_is_left_out(llama: Any, batches: list[Batch]) -> None:
    with pytest.raises(ConfigError, match="has no loss or no logits"):
        redundancy_scores(llama, [{k: v for k, v in batch.items() if k != "labels"} for batch in batches], "kl")
