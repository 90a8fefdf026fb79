"""The study file beside the recorded result says what the bare command does."""

from pathlib import Path

from eas_search.settings import SearchSettings


def test_the_recorded_study_is_the_default_search() -> None:
    path = Path(__file__).parents[2] / "studies" / "digits_vqa" / "config.yaml"
    assert SearchSettings.from_file(path, {}) == SearchSettings()
