"""How a model is loaded: device, precision and what is switched on while it trains. Light: imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

Dtype = Literal["float32", "bfloat16", "float16"]
# What a model ends in. `generation` is whatever the checkpoint itself names as its architecture.
Head = Literal[
    "generation",
    "causal-lm",
    "sequence-classification",
    "multiple-choice",
    "image-classification",
    "visual-question-answering",
    "image-text-retrieval",
]


class LoadSettings(BaseModel):
    """What a study file and the flags may say about loading.

    Attributes:
        device: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto` for the first accelerator.
        dtype: precision of the frozen model; adapters are float32 whatever it is.
        device_map: None for one device, or accelerate's placement over several: `auto`, `balanced`, …, or a JSON
            object from module names to devices.
        quantization: `4bit` keeps the frozen linear layers in bitsandbytes' NF4.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = "auto"
    dtype: Dtype = "float32"
    device_map: str | None = None
    quantization: Literal["4bit"] | None = None
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _one_placement(self) -> Self:
        if self.device_map is not None and self.device != "auto":
            raise ValueError(f"device {self.device!r} and device_map {self.device_map!r}: give one of them")
        return self


class LoadOptions(LoadSettings):
    """How `load_model` loads.

    Attributes:
        trust_remote_code: run code that comes with a checkpoint. No file can say so, only a person's flag.
    """

    trust_remote_code: bool = False
