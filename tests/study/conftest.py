"""A tiny LLaVA in a folder, settings under which a whole search takes seconds, and one finished search."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import eas_search
from eas_search.models.demo import demo_path
from eas_search.objective import TrialResult
from eas_search.search_space import SearchSpace
from eas_search.setting_groups import SpaceSettings
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.study.progress import PlainDisplay


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of 4 text and 2 vision layers, width 32, briefly trained so that its answers are not all wrong."""
    from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

    from eas_search.tasks import get_task
    from eas_search.training import FineTuneConfig, fine_tune

    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = AutoConfig.from_pretrained(demo_path())
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    for name, value in {**small, "num_key_value_heads": 4, "num_hidden_layers": 4, "head_dim": 8}.items():
        setattr(config.text_config, name, value)
    for name, value in {**small, "num_hidden_layers": 2}.items():
        setattr(config.vision_config, name, value)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    processor = AutoProcessor.from_pretrained(demo_path())
    task = get_task("digits-vqa")
    fine_tune(
        model,
        task.encode(processor, task.examples("train", 256)),
        FineTuneConfig(steps=100, batch_size=32, learning_rate=1e-2),
        seed=0,
    )
    model.save_pretrained(folder)
    for file in demo_path().iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder / file.name)
    return folder


@pytest.fixture(scope="session")
def tiny_values(tiny_model: Path) -> dict[str, Any]:
    """Settings of a search that takes seconds, as a study file would give them."""
    brief = {"steps": 2, "batch_size": 8, "learning_rate": 2e-2}
    quick = {"rounds": 3, "blocks": 1, "warmup": 0, "decode_tokens": 0, "min_sample_s": 0.0005}
    return {
        "model": str(tiny_model),
        "budget": 5,
        "device": "cpu",
        "space": {"pia_dims": [2, 4]},
        "samples": {"train": 64, "validation": 32, "selection": 32, "test": 32, "calibration": 32},
        "student": {"adapter_dim": 2},
        "baseline": brief,
        "supernet": {"training": brief, "bandit_updates": 2, "bandit_batch": 8},
        "trial": brief,
        "final": brief,
        "finalists": 3,
        "latency_batch": 2,
        "trial_latency": quick,
        "fit_latency": quick,
        "fit_passes": 1,
        "final_latency": {**quick, "decode_tokens": 1},
    }


@pytest.fixture(scope="session")
def make_settings(tiny_values: dict[str, Any]) -> Callable[..., SearchSettings]:
    """A function: the tiny settings with changes."""
    return lambda **changes: SearchSettings(**{**tiny_values, **changes})


@pytest.fixture(scope="session")
def study_file(tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny settings as a YAML study file."""
    path = tmp_path_factory.mktemp("study-file") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_values), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def search() -> Callable[[SearchSettings, Path], SimpleNamespace]:
    """A function that runs or resumes a search through the Python API; gives result, study and what was said."""

    def run(settings: SearchSettings, folder: Path, name: str = "tiny") -> SimpleNamespace:
        said = io.StringIO()
        study = eas_search.create_study(settings, folder, name)
        result = eas_search.run_study(study, settings, folder, PlainDisplay(Console(file=said, width=200)))
        return SimpleNamespace(result=result, study=study, said=said.getvalue(), folder=folder, settings=settings)

    return run


@pytest.fixture(scope="session")
def finished(
    search: Callable[..., SimpleNamespace],
    make_settings: Callable[..., SearchSettings],
    tmp_path_factory: pytest.TempPathFactory,
) -> SimpleNamespace:
    """One finished search. Shared: tests that change its folder work on a copy."""
    return search(make_settings(), tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def finished_copy(finished: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the finished search's folder."""
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment of subprocesses: one thread, offline, this checkout."""
    root = str(Path(eas_search.__file__).parent.parent)
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": root, "COLUMNS": "200"}


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function that starts `python ARGS` in the background; what still runs after the test or 100 s is killed."""
    processes: list[subprocess.Popen[str]] = []
    # Started as a background job, the tests would ignore Ctrl-C, and so would every process that they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def popen(*args: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *map(str, args)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        timer = threading.Timer(100, process.kill)
        timer.daemon = True
        timer.start()
        return process

    yield popen
    signal.signal(signal.SIGINT, before)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def small_space() -> SearchSpace:
    """Six searchable sites of a model that exists on paper only; indexes have a gap as with towers left out."""
    sites = tuple(SimpleNamespace(index=i, name=f"layers.{i}.self_attn", tower="text") for i in (0, 1, 2, 3, 4, 7))
    choices = SpaceSettings(pia_dims=(2, 4, 8), placements=("parallel", "ffn"))
    return SearchSpace(sites, choices, SkipConfig(adapter_dim=2))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def fake_result() -> Callable[..., TrialResult]:
    """A made-up evaluation: a function of the configuration, in which deep sites are cheap to skip."""

    def evaluate(config: SkipConfig, factor: float = 1.0) -> TrialResult:
        accuracy = 0.9 - sum(0.2 / (1 + index) for index in config.skip) + 0.001 * config.pia_dim
        latency = factor * (1 - 0.05 * len(config.skip))
        return TrialResult(accuracy, latency, latency - 0.01, latency + 0.01, 0.0, 64, 1000, 2000, 0.1, "cpu")

    return evaluate
