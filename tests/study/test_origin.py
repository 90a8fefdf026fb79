"""An output folder goes on only with what it began with: the same settings, samples and weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from eas_search.exceptions import StorageError
from eas_search.origin import bind_contents
from eas_search.settings import SearchSettings
from eas_search.stage_folder import StageFolder
from eas_search.study.afterwards import export_trial
from eas_search.tasks import Example


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "stages").iterdir()) if path.is_file()}


@pytest.mark.parametrize("moved", [False, True])
def test_another_search_does_not_take_the_stages_of_a_folder(
    finished_copy: Path,
    search: Callable[..., SimpleNamespace],
    make_settings: Callable[..., SearchSettings],
    moved: bool,
) -> None:
    """Under another study name, or with the storage moved away."""
    before = contents(finished_copy)
    if moved:
        (finished_copy / "study.db").rename(finished_copy / "old.db")
    with pytest.raises(StorageError, match=r"seed: 0 then, 9 now.*choose another --output") as error:
        search(make_settings(seed=9), finished_copy, "tiny" if moved else "two")
    assert "\n" not in str(error.value)
    assert contents(finished_copy) == before
    assert (finished_copy / "study.db").is_file() != moved  # nothing was begun either


def test_a_search_of_a_version_that_recorded_nothing_is_not_gone_on_with(
    finished_copy: Path, search: Callable[..., SimpleNamespace], make_settings: Callable[..., SearchSettings]
) -> None:
    for name in ("settings", "contents"):
        for suffix in ("json", "safetensors"):
            (finished_copy / "stages" / f"{name}.{suffix}").unlink()
    before = contents(finished_copy)
    with pytest.raises(StorageError, match=r"a search of another version of eas_search.*choose another --output"):
        search(make_settings(), finished_copy)
    with pytest.raises(StorageError, match="a search of another version of eas_search"):
        export_trial(finished_copy, 0, finished_copy / "new")
    assert contents(finished_copy) == before


def test_what_may_change_may_change(
    finished_copy: Path, search: Callable[..., SimpleNamespace], make_settings: Callable[..., SearchSettings]
) -> None:
    assert search(make_settings(budget=6), finished_copy).result.completed == 6


def test_a_model_that_was_trained_further_does_not_resume(
    tiny_model: Path,
    tmp_path: Path,
    search: Callable[..., SimpleNamespace],
    make_settings: Callable[..., SearchSettings],
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    settings = make_settings(model=str(model), budget=1)
    search(settings, tmp_path / "run")
    before, weights = contents(tmp_path / "run"), load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("mlp.down_proj.weight"))
    save_file({**weights, name: weights[name] * 1.01}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(StorageError, match=r"the model is not what it was in the first run of .*run"):
        search(settings, tmp_path / "run")
    assert contents(tmp_path / "run") == before
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert search(settings, tmp_path / "run").result.completed == 1


PICTURE = Image.new("L", (4, 4), 7)
EXAMPLE = Example(PICTURE, "what?", "seven", "digit", ("six", "seven"), None, (b"bytes",), (("seven", 1.0),))
CHANGES = [
    {"answer": "six"},
    {"prompt": "which?"},
    {"choices": ("seven", "six")},
    {"image": Image.new("L", (4, 4), 8)},
    {"others": (b"byte",)},
    {"worth": (("seven", 0.6),)},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_other_samples_are_told_from_those_of_the_first_run(change: dict[str, object], tmp_path: Path) -> None:
    stages, model = StageFolder(tmp_path / "stages"), nn.Linear(2, 2)
    splits = {"train": [EXAMPLE, EXAMPLE], "test": [EXAMPLE]}
    bind_contents(stages, model, splits)
    bind_contents(stages, model, {name: [replace(one) for one in found] for name, found in splits.items()})
    changed = replace(EXAMPLE, **change)  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="the data of split 'test' is not"):
        bind_contents(stages, model, {**splits, "test": [changed]})
    with pytest.raises(StorageError, match="the data of split 'train' is not"):
        bind_contents(stages, model, {**splits, "train": [EXAMPLE]})


def test_another_picture_in_the_same_file_is_noticed_by_its_size(tmp_path: Path) -> None:
    stages, model, file = StageFolder(tmp_path / "stages"), nn.Linear(2, 2), tmp_path / "one.png"
    PICTURE.save(file)
    bind_contents(stages, model, {"test": [replace(EXAMPLE, image=file)]})
    Image.effect_noise((64, 64), 50).save(file)
    with pytest.raises(StorageError, match="the data of split 'test' is not"):
        bind_contents(stages, model, {"test": [replace(EXAMPLE, image=file)]})


def test_a_picture_that_is_not_there_is_left_to_whoever_opens_it(tmp_path: Path) -> None:
    bind_contents(
        StageFolder(tmp_path / "stages"), nn.Linear(2, 2), {"test": [replace(EXAMPLE, image=tmp_path / "no")]}
    )


def test_weights_that_are_not_loaded_do_not_count(tmp_path: Path) -> None:
    stages, model = StageFolder(tmp_path / "stages"), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    bind_contents(stages, model, {})
    bind_contents(stages, model, {})
    with torch.no_grad():
        model[0].weight += 1e-3
    with pytest.raises(StorageError, match="the model is not"):
        bind_contents(stages, model, {})
