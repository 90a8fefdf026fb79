"""The recorded LaVIN models (golden README) as `LavinForConditionalGeneration` and students of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from eas_search.models.lavin import LavinConfig, LavinForConditionalGeneration
from eas_search.models.lavin.adapter_weights import joint_state, read_adapters
from eas_search.models.lavin.clip_weights import clip_config, clip_state, visual_part
from eas_search.models.lavin.llama_weights import llama_state
from eas_search.skipping import apply_skips, load_adapters

ROOT = Path(__file__).parents[2]
SMALL, LARGE = ROOT / "tests" / "data" / "golden", ROOT.parent / "shared" / "golden"
Golden = dict[str, Tensor]
VOCAB = 100


def golden(name: str) -> tuple[Golden, dict[str, Any]]:
    """(tensors, hyperparameters); the test is skipped where a large recording is not at hand."""
    folder = SMALL if (SMALL / f"{name}.safetensors").is_file() else LARGE
    if not (folder / f"{name}.safetensors").is_file():
        pytest.skip(f"the recording {name} (over 1 MB) is not part of the repository; expected it in {LARGE}")
    sheet = folder / f"{name}.json"
    hyper = json.loads(sheet.read_text(encoding="utf-8"))["hyperparameters"] if sheet.is_file() else {}
    return load_file(folder / f"{name}.safetensors"), hyper


def lavin(data: Golden, hyper: dict[str, Any]) -> LavinForConditionalGeneration:
    """The recorded model without adapters; placeholders lie behind the vocabulary of 100."""
    config = LavinConfig(
        text_config=text_config(data, hyper, hyper["n_layers"]),
        vision_config=vision_config(data, hyper["clip"]["heads"]),
        projection_dim=hyper["hidden_proj"],
        modality_token_ids=[VOCAB, VOCAB + 1],
        image_token_id=VOCAB + 2,
    )
    model = LavinForConditionalGeneration(config)
    heads = hyper["heads"]
    state = llama_state(data, heads, heads) | clip_state(visual_part(data)) | joint_state(data)
    model.load_state_dict(state)
    return model.eval()


def text_config(data: Golden, hyper: dict[str, Any], layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hyper["dim"],
        intermediate_size=data["layers.0.feed_forward.w1.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=hyper["heads"],
        rms_norm_eps=hyper["norm_eps"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def vision_config(data: Golden, heads: int) -> CLIPVisionConfig:
    return clip_config(visual_part(data), heads)


def student_of(model: LavinForConditionalGeneration, data: Golden, hyper: dict[str, Any]) -> Any:
    """The model with the recorded adapters and skipped layers."""
    options = {"adapter_scale": hyper["scale"], "temperature": hyper.get("temperature", 10.0)}
    adapters = read_adapters(data, hyper["skipped_layers"], options)
    student = apply_skips(model, adapters.config)
    load_adapters(student, adapters.tensors)
    return student.eval()


def inserted(text: list[int], with_image: bool, data: Golden, features: int) -> list[int]:
    """[modality, BOS, prefix, placeholders, text] from a text that begins with BOS."""
    prefix = data["in__prefix_img" if with_image else "in__prefix_nonimg"].tolist()
    return [VOCAB + with_image, text[0], *prefix, *([VOCAB + 2] * features * with_image), *text[1:]]


def largest(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0.0)
