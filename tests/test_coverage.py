"""A small part of `studies/coverage`: varied architectures of `transformers`, made tiny, through all of its steps."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

STUDY = Path(__file__).parent.parent / "studies" / "coverage"

# One or two of each kind of block: pre-norm, post-norm, sandwich, parallel, two towers, encoder-decoder, hybrid, MoE.
MODEL_TYPES = [
    *("llama", "gpt2", "opt", "bloom", "phi", "phi3", "gpt_neox", "cohere", "gemma2", "mixtral", "qwen3_next", "bamba"),
    *("deepseek_v3", "bert", "deberta-v2", "t5", "bart", "whisper", "vit", "swin", "siglip", "llava", "qwen2_vl"),
    *("vision-text-dual-encoder", "hubert", "mllama"),
]


@pytest.fixture(scope="module")
def study() -> Any:
    """The study's modules, importable for the time of these tests."""
    sys.path.insert(0, str(STUDY))
    try:
        yield {name: importlib.import_module(name) for name in ("tiny", "measure", "checks", "reference")}
    finally:
        sys.path.remove(str(STUDY))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_architecture(study: Any, model_type: str) -> None:
    row = study["measure"].examine(model_type)
    assert row["status"] == "pass", row["reason"]
    for name in ("detect", "delete", "pia", "formula", "export"):
        assert row["steps"][name]["status"] == "pass", (name, row["steps"][name])
    assert row["steps"]["delete"]["effect"] > 1e-3


@pytest.mark.parametrize("model_type", ["albert", "mamba"])
def test_refusal(study: Any, model_type: str) -> None:
    """Layers that share one attention, and a network without attention, are refused before anything is computed."""
    row = study["measure"].examine(model_type)
    assert row["status"] == "refused"
    assert "UnsupportedModelError" in row["reason"]
    assert set(row["steps"]) == {"detect"}


def test_the_study_notices_a_wrong_deletion(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student that only halves the attention, or still runs it, must not pass."""
    tiny, checks = study["tiny"], study["checks"]
    with tiny.quiet():
        model = tiny.build("llama")
        case = checks.Case(model, tiny.inputs(model))
    checks.detect(case)

    def halved(model: nn.Module, config: Any) -> nn.Module:
        twin = checks.copy.deepcopy(model)
        with torch.no_grad():
            for index in config.skip:
                twin.get_submodule(case.sites[index].name).o_proj.weight.mul_(0.5)
        return twin

    monkeypatch.setattr(checks, "apply_skips", halved)
    with pytest.raises(checks.Wrong, match="deletion differs"):
        checks.delete(case)
    sites = {index: site.name for index, site in enumerate(case.sites)}
    monkeypatch.setattr(
        checks,
        "apply_skips",
        lambda model, config: checks.without(model, [f"{sites[i]}.o_proj" for i in config.skip]),
    )
    with pytest.raises(checks.Wrong, match="projections"):
        checks.delete(case)


def test_literal_delta(study: Any) -> None:
    """The study's own formula on numbers worked out by hand: width 2, rank 2, two groups, two tokens."""
    adapter = {
        "down.weight": torch.eye(2),
        "down.bias": torch.tensor([1.0, 0.0]),
        "pool.weight": 2 * torch.eye(2),
        "pool.bias": torch.zeros(2),
        "router_bias": torch.zeros(2),
        "ups.0.weight": torch.tensor([[1.0], [0.0]]),
        "ups.0.bias": torch.zeros(2),
        "ups.1.weight": torch.tensor([[0.0], [4.0]]),
        "ups.1.bias": torch.tensor([0.0, 1.0]),
    }
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    # s = 2 mean(x) = (4, 6); z = ((1+1+4)/2, (2+6)/2), ((3+1+4)/2, (4+6)/2); Δ = ½ (z1, 0) + ½ (0, 4 z2 + 1)
    expected = torch.tensor([[[1.5, 8.5], [2.0, 10.5]]])
    assert torch.allclose(study["reference"].literal_delta(adapter, x, "all"), expected)
    # running means: s = (2, 4), then (4, 6)
    expected = torch.tensor([[[1.0, 6.5], [2.0, 10.5]]])
    assert torch.allclose(study["reference"].literal_delta(adapter, x, "prefix"), expected)
