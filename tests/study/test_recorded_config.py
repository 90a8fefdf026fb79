"""The study file beside the recorded result says what the bare command does."""

from pathlib import Path

from eas_search.architectures import attention_sites
from eas_search.models.loading import load_model
from eas_search.settings import SearchSettings
from eas_search.tasks import get_task
from eas_search.workbench import searched_space


def test_the_recorded_study_is_the_default_search() -> None:
    recorded = SearchSettings.from_file(Path(__file__).parents[2] / "studies" / "digits_vqa" / "config.yaml", {})
    bare = SearchSettings()
    # What the bare command leaves open is settled by its model and task.
    left_open = {"space", "student"}
    assert recorded.model_dump(exclude=left_open) == bare.model_dump(exclude=left_open)
    sites, task = tuple(attention_sites(load_model(bare.model)[0])), get_task(bare.task)
    assert searched_space(recorded, task, sites) == searched_space(bare, task, sites)
