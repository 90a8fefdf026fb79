"""Published checkpoints → a model folder, and its trained adapters as an export beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from eas_search.exceptions import ConfigError, StorageError, VerificationError
from eas_search.head import head_names
from eas_search.merging import default_tolerance
from eas_search.models.lavin.adapter_weights import TrainedAdapters
from eas_search.models.lavin.convert import Sources, convert
from eas_search.models.loading import load_model
from eas_search.models.meter.convert import HEAD_WIDTH, Task, convert_checkpoint
from eas_search.models.meter.processing import save_folder
from eas_search.models.options import Head, LoadOptions

ADAPTERS = "adapters"
ROBERTA = "roberta-base"
METER_HEADS: dict[Task, Head] = {
    "vqa": "visual-question-answering",
    "nlvr2": "sequence-classification",
    "retrieval": "image-text-retrieval",
}


@dataclass(frozen=True)
class MeterSource:
    """What a METER is made from; see `models.meter.convert.convert_checkpoint`.

    Attributes:
        checkpoint: published file, pretrained or fine-tuned.
        head: what the model ends in.
        image_size: resolution in pixels; None keeps that of the checkpoint.
        tokenizer: folder or hub id of its text encoder's tokenizer.
        head_width: width of an attention head.
    """

    checkpoint: Path
    head: Task
    image_size: int | None = None
    tokenizer: str = ROBERTA
    head_width: int = HEAD_WIDTH


def convert_lavin(sources: Sources, output: Path) -> list[Path]:
    """Write `output` (the model) and, where adapters were given, `output/adapters` (for `eas_search.load_adapter`).

    Raises:
        ConfigError: a source cannot be read, or the parts do not fit together.
        StorageError: the folder is not empty or cannot be written.
        VerificationError: what was written does not answer like what was converted.
    """
    with _writing(output):
        adapters = convert(sources, output)
    return [output] if adapters is None else [output, _write_adapters(output, adapters)]


def convert_meter(source: MeterSource, output: Path) -> list[Path]:
    """Write `output`, the model with its processor.

    Raises:
        ConfigError: the checkpoint or the tokenizer cannot be read, or they do not fit together.
        UnsupportedModelError: the checkpoint is not of METER with CLIP's vision transformer and RoBERTa.
        StorageError: the folder is not empty or cannot be written.
        VerificationError: what was written does not answer like what was converted.
    """
    with _writing(output):
        model = convert_checkpoint(source.checkpoint, source.head, source.image_size, source.head_width)
        save_folder(model, _tokenizer(source.tokenizer, model.config.text_config), output)
    _verify_meter(model, output, METER_HEADS[source.head])
    return [output]


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Around what writes the new folder `output`."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise StorageError(f"output {str(output)!r} exists and is not empty; expected a new folder: choose another")
    transformers_logging.disable_progress_bar()  # a command's output is what it says itself
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"output {str(output)!r} cannot be written ({error.strerror or error}); choose another folder"
        ) from error


def _tokenizer(name: str, config: Any) -> Any:
    """The tokenizer of a text encoder with this configuration."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"tokenizer {name!r} cannot be loaded: {reason}; expected a folder or hub id of RoBERTa's tokenizer"
        ) from error
    if len(tokenizer) > config.vocab_size or tokenizer.pad_token_id != config.pad_token_id:
        raise ConfigError(
            f"tokenizer {name!r} has {len(tokenizer)} tokens and padding token {tokenizer.pad_token_id}, the text "
            f"encoder {config.vocab_size} and {config.pad_token_id}; expected the tokenizer that it was trained with"
        )
    return tokenizer


def _verify_meter(model: Any, folder: Path, head: Head) -> None:
    """Compare the model with what is in the folder: every weight, and answers to two texts about meaningless pictures.

    Answers may round differently: where a loaded tensor happens to lie in memory decides which kernels read it.
    """
    import torch

    loaded, processor = load_model(str(folder), LoadOptions(device="cpu"), head)
    inputs = dict(processor(text=["a text", "a longer text"], images=_pictures(), padding=True, return_tensors="pt"))
    if model.config.num_images > 1:
        inputs["pixel_values"] = torch.stack([inputs["pixel_values"]] * model.config.num_images, dim=1)
    with torch.no_grad():
        before, after = (one(**inputs).logits for one in (model, loaded))
    found = loaded.state_dict()
    for name, wanted in model.state_dict().items():
        if name not in found or not torch.equal(found[name], wanted):
            raise VerificationError(
                f"{name} in {str(folder)!r} is not what was converted; expected equal weights: do not use the folder, "
                "report the checkpoint"
            )
    difference, tolerance = (before - after).abs().max().item(), default_tolerance(before, after)
    if not difference <= tolerance:
        raise VerificationError(
            f"the model in {str(folder)!r} differs from the converted one by {difference:.3g}; expected at most "
            f"{tolerance:g}: do not use it, report the checkpoint"
        )


def _write_adapters(folder: Path, adapters: TrainedAdapters) -> Path:
    """The adapters on the model that was just written, with recorded answers."""
    from eas_search.export import ExportJob, export_student
    from eas_search.skipping import adapter_parameters, apply_skips, load_adapters

    base, processor = load_model(str(folder), LoadOptions(device="cpu"))
    joints = head_names(base)
    student = apply_skips(base, adapters.config)
    # What LaVIN trains beside its adapters is part of the written model already.
    beside = {name: value for name, value in adapter_parameters(student).items() if name in joints}
    load_adapters(student, {**beside, **adapters.tensors})
    prompts = dict(_prompts(processor))
    job = ExportJob(student.eval(), prompts, about={"base_model": str(folder.resolve())}, base=base)
    export_student(job, folder / ADAPTERS, "adapter")
    return folder / ADAPTERS


def _prompts(processor: Any) -> Any:
    """Two questions of different length about a picture of no meaning."""
    texts = [
        "Question: What is shown?\nAnswer:",
        "Question: Which is brighter, the top or the bottom?\nAnswer:",
    ]
    return processor(images=_pictures(), text=texts, padding=True, padding_side="left", return_tensors="pt")


def _pictures() -> list[Any]:
    """A ramp of brightness, and the same upside down."""
    import numpy as np
    from PIL import Image

    ramp = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    return [Image.fromarray(ramp), Image.fromarray(ramp[::-1].copy())]
