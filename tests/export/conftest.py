"""Students of tiny models and of the demo model, with random adapters; nothing is trained."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eas_search
import eas_search as eas
from eas_search.export import ExportJob, ExportReport, export_student

CONFIGS: dict[str, dict[str, Any]] = {
    "ffn": {"placement": "ffn", "pooling": "none", "pia_dim": 4, "adapter_dim": 2},
    "parallel": {"placement": "parallel", "pooling": "none", "pia_dim": 4, "adapter_dim": 2},
    "paper": {"placement": "ffn", "pooling": "none", "identity": "paper", "pia_dim": 4},
    "pooled": {"placement": "parallel", "pooling": "prompt", "pia_dim": 4},
    "routed": {"placement": "ffn", "pooling": "prefix", "router": "routed", "pia_dim": 4, "adapter_dim": 2},
    "residual": {"placement": "residual", "pooling": "none", "pia_dim": 4},
    "deleted": {"pia_dim": 0},
    "lora": {"placement": "ffn", "pooling": "none", "pia_dim": 4, "adapter_dim": 2, "adapter": "lora"},
}


@pytest.fixture(scope="session")
def student_of(randomise: Callable[..., nn.Module]) -> Callable[..., Any]:
    """A function: a student by the name of its configuration, with adapters that are no no-ops."""

    def make(model: nn.Module, name: str, skip: tuple[int, ...] = (0, 2), **changes: Any) -> Any:
        config = eas.SkipConfig(**{**CONFIGS[name], "skip": skip, **changes})
        return randomise(eas.apply_skips(model, config), std=0.1)

    return make


@pytest.fixture(scope="session")
def prompts(tokens: Tensor) -> dict[str, Tensor]:
    """Four rows of different lengths, padded on the left."""
    mask = torch.ones_like(tokens)
    mask[0, :3] = mask[2, :1] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.fixture(scope="session")
def demo() -> Any:
    """The demo model, its processor and four prompts with images."""
    from eas_search.models.loading import load_model
    from eas_search.tasks import get_task

    model, processor = load_model("demo")
    task = get_task("digits-vqa")
    found = task.encode(processor, task.examples("validation", 4)).prompts(4)
    return SimpleNamespace(model=model, processor=processor, prompts=found)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., tuple[Path, ExportReport]]:
    """A function: export a student in a format; gives folder and what verifying it found."""

    def export(student: nn.Module, prompts: dict[str, Tensor], kind: str = "eas", **job: Any) -> Any:
        folder = tmp_path / kind
        return folder, export_student(ExportJob(student, prompts, card="# A card\n", **job), folder, kind)

    return export


@pytest.fixture(scope="session")
def python() -> Callable[..., str]:
    """A function: run Python code in a fresh process that is offline; gives what it printed."""
    root = str(Path(eas_search.__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}

    def run(code: str, *args: object) -> str:
        command = [sys.executable, "-c", code, *map(str, args)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()

    return run


@pytest.fixture(scope="session")
def logits() -> Callable[..., Tensor]:
    """A function: a model's logits without cache, at the tokens that are no padding."""

    @torch.no_grad()
    def answer(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        return model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]

    return answer
