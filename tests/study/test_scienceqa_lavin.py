"""The study files of `scienceqa_lavin` load, and say what was published."""

from pathlib import Path

import pytest

from eas_search.bandit import BanditConfig
from eas_search.settings import SearchSettings
from eas_search.tasks import get_task

STUDY = Path(__file__).parents[2] / "studies" / "scienceqa_lavin"


@pytest.mark.parametrize("name", ["config.yaml", "tiny.yaml"])
def test_the_task_takes_its_options(name: str, tmp_path: Path) -> None:
    settings = SearchSettings.from_file(STUDY / name, {"data": str(tmp_path)})
    assert get_task(settings.task, tmp_path, settings.task_options).name == "scienceqa"
    assert settings.student.model_dump(include={"router", "pooling", "identity", "router_spares_first"}) == {
        "router": "routed",
        "pooling": "prompt",
        "identity": "paper",
        "router_spares_first": True,
    }


def test_the_published_settings() -> None:
    settings = SearchSettings.from_file(STUDY / "config.yaml", {})
    training, bandit = settings.supernet.training, settings.supernet.bandit
    rules = BanditConfig(policy="softmax", candidates=3, learning_rate=2.0, sharpness=10.0, every=10, warmup=0.5)
    assert bandit == rules
    assert (settings.fixed_k, settings.student.adapter_dim, settings.space.pia_dims) == (12, 8, (32,))
    # 12,726 problems in steps of 32, 10 and 20 epochs; the bandit is due in the second half, every 10 steps.
    assert training.steps == round(12726 * 10 / 32)
    assert settings.final.steps == pytest.approx(12726 * 20 / 32, abs=1)
    assert (
        sum(
            bandit.updates_due(step + 1, training.steps) > bandit.updates_due(step, training.steps)
            for step in range(training.steps)
        )
        == 198
    )
