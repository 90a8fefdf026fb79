"""When the bandit of a supernet's training updates its scores, and under how many skipped sites."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from eas_search import joint_training
from eas_search.bandit import VARIANTS, BanditConfig
from eas_search.conditions import AS_IT_IS
from eas_search.exceptions import ConfigError
from eas_search.setting_groups import SupernetSettings
from eas_search.settings import SearchSettings
from eas_search.training import FineTuneConfig


def updates(settings: SupernetSettings) -> list[int]:
    """Training steps in front of which an update takes place (the number of steps: after the last one)."""
    steps = settings.training.steps
    due = [joint_training.updates_due(settings, step) for step in range(steps + 1)]
    return [step for step in range(steps + 1) for _ in range(due[step] - (due[step - 1] if step else 0))]


@pytest.mark.parametrize(
    ("variant", "steps", "expected"),
    [
        ("lavin", 100, [60, 70, 80, 90, 100]),  # warm-up 5 of 10 epochs, then every 10 steps
        ("meter", 100, [20, 30, 40, 50, 60, 70, 80, 90, 100]),  # 1 of 10
        ("llava", 32, [15, 18, 21, 24, 27, 30]),  # 15 of 40, then every 3
    ],
)
def test_published_schedules(variant: str, steps: int, expected: list[int]) -> None:
    settings = SupernetSettings(training=FineTuneConfig(steps=steps), bandit=variant, bandit_updates=None)
    assert updates(settings) == expected


def test_a_number_of_updates_is_spread_over_what_follows_the_warm_up() -> None:
    settings = SupernetSettings(training=FineTuneConfig(steps=80), bandit_updates=4)
    assert updates(settings) == [50, 60, 70, 80]
    assert len(updates(SupernetSettings())) == 40
    assert updates(SupernetSettings(training=FineTuneConfig(steps=0), bandit_updates=7)) == [0] * 7


def test_rules_of_the_published_systems() -> None:
    """Design: LaVIN K = 3, η = 2, softmax(10 r); METER K = 3, η = 1; LLaVA K = 5, η = 1, k ramps up."""
    rules = {
        name: (rule.policy, rule.candidates, rule.learning_rate, rule.every, rule.ramp)
        for name, rule in VARIANTS.items()
    }
    assert rules == {
        "lavin": ("softmax", 3, 2.0, 10, False),
        "meter": ("sigmoid", 3, 1.0, 10, False),
        "llava": ("sigmoid", 5, 1.0, 3, True),
    }


def test_the_size_ramps_up_during_the_warm_up() -> None:
    sizes = [VARIANTS["llava"].size_at(step / 40, 12) for step in (0, 3, 7, 11, 14, 15, 40)]
    assert sizes == [1, 3, 6, 9, 12, 12, 12]
    assert VARIANTS["meter"].size_at(0.0, 12) == 12


def test_rules_are_data_and_wrong_ones_are_one_line() -> None:
    own = SearchSettings(supernet={"bandit": {"policy": "sigmoid", "candidates": 4}})
    assert own.supernet.bandit == BanditConfig(policy="sigmoid", candidates=4)
    for wrong, says in (("llama", "'llama' is unknown; expected one of lavin, meter, llava"), ({"K": 3}, "bandit.K")):
        with pytest.raises(ConfigError, match=says) as error:
            SearchSettings(supernet={"bandit": wrong})
        assert "\n" not in str(error.value)


def test_a_schedule_without_an_update_is_refused() -> None:
    with pytest.raises(ConfigError, match="15 training steps leave the bandit no update"):
        SearchSettings(supernet={"training": {"steps": 15}, "bandit_updates": None})
    published = SearchSettings(supernet={"training": {"steps": 40}, "bandit_updates": None})
    with pytest.raises(ConfigError, match="0 training steps leave the bandit no update"):
        published.fine_tuned_for(0)


def trained(monkeypatch: pytest.MonkeyPatch, k: int | None, **values: Any) -> tuple[dict[str, list[Any]], list[float]]:
    """What a joint training of six sites sets in every forward pass, and the bandit's scores; no model is trained."""
    seen: dict[str, list[Any]] = {"training": [], "dims": [], "candidates": []}
    supernet: Any = SimpleNamespace(model=nn.Linear(1, 1), now=(), sites=[SimpleNamespace(index=i) for i in range(6)])

    def set_skips(skip: Any, placement: str | None = None, pia_dim: int | None = None) -> None:
        supernet.now, supernet.dim = tuple(skip), pia_dim

    def train(model: nn.Module, split: Any, config: FineTuneConfig, seed: int, before_step: Any, **_: Any) -> None:
        for step in range(config.steps):
            for _ in range(config.passes):
                before_step(step, model)
                seen["training"].append(supernet.now)
                seen["dims"].append(supernet.dim)

    def loss(*_: object) -> float:
        seen["candidates"].append(supernet.now)
        return 0.1 if 5 in supernet.now else 3.0  # the last site is the most redundant one

    supernet.set_skips, supernet.intact_logits = set_skips, None
    monkeypatch.setattr(joint_training, "fine_tune", train)
    monkeypatch.setattr(joint_training, "endless", lambda *_: iter([{}] * 999))
    monkeypatch.setattr("eas_search.redundancy.bandit.mean_loss", loss)
    settings = SearchSettings(fixed_k=k, supernet={"training": {"steps": 20}, "bandit_updates": 5, **values})
    bench: Any = SimpleNamespace(
        settings=settings,
        sites=supernet.sites,
        space=SimpleNamespace(fixed_k=k, choices=settings.space.model_copy(update={"placements": ("parallel",)})),
        splits={"validation": None, "train": None},
        conditions=AS_IT_IS,
    )
    return seen, joint_training.train_jointly(bench, supernet, lambda *_: None)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("draws", ["bandit", "random", "sandwich"])
def test_a_fixed_number_of_sites_is_skipped_in_every_pass_and_every_candidate(
    k: int, draws: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, scores = trained(monkeypatch, k, draws=draws)
    assert [len(skip) for skip in seen["training"]] == [k] * (60 if draws == "sandwich" else 20)
    assert [len(skip) for skip in seen["candidates"]] == [k] * 15  # five updates of three candidates
    assert any(scores)


def test_a_sandwich_has_nothing_all_and_something_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    skips = trained(monkeypatch, None, draws="sandwich")[0]["training"]
    assert skips[0::3] == [()] * 20
    assert skips[1::3] == [(0, 1, 2, 3, 4, 5)] * 20
    assert {len(skip) for skip in skips[2::3]} >= {1, 2, 4, 5}


def test_the_bandit_draws_what_it_prefers_and_chance_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the warm-up, with sharp scores: site 5 is in nearly every set of one; by chance in a sixth of them."""
    sharp = {"candidates": 3, "learning_rate": 20.0, "warmup": 0.1}
    share = {}
    for draws in ("bandit", "random"):
        values = {"training": {"steps": 400}, "bandit_updates": 200, "draws": draws, "bandit": sharp}
        behind = trained(monkeypatch, 1, **values)[0]["training"][200:]
        share[draws] = sum(skip == (5,) for skip in behind) / len(behind)
    assert share["bandit"] > 0.9
    assert 0.05 < share["random"] < 0.3


@pytest.mark.parametrize("nested", [True, False])
def test_nested_training_takes_every_rank_in_turn(nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dims = trained(monkeypatch, None, nested=nested)[0]["dims"]
    assert set(dims) == ({4, 8, 16} if nested else {None})
