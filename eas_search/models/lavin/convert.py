"""From published checkpoints of LLaMA, CLIP and LaVIN to one folder in the Hugging Face layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from eas_search.exceptions import ConfigError
from eas_search.models.lavin.adapter_weights import JOINTS, TrainedAdapters, joint_state, read_adapters
from eas_search.models.lavin.configuration import LavinConfig
from eas_search.models.lavin.generating import LavinForConditionalGeneration
from eas_search.models.lavin.modeling import Projector
from eas_search.models.lavin.processing import PLACEHOLDERS, LavinProcessor, add_placeholders
from eas_search.models.lavin.reading import read_checkpoint
from eas_search.models.lavin.sources import read_text_part, read_vision_part

BOTTLENECK = 128  # of the projection, where no checkpoint says otherwise


@dataclass(frozen=True)
class Sources:
    """What a LaVIN is put together from.

    Attributes:
        llama: see `read_text_part`.
        clip: see `read_vision_part`.
        adapters: LaVIN's or LaVIN-EAS's `checkpoint-*.pth`; None: projection and modality embedding are new.
        skip: LLaMA layers that the adapters' run skipped.
        vision_heads: see `read_vision_part`.
    """

    llama: str
    clip: str
    adapters: Path | None = None
    skip: tuple[int, ...] = ()
    vision_heads: int | None = None


def convert(sources: Sources, folder: Path) -> TrainedAdapters | None:
    """Write the model without adapters, with its processor, into `folder`; returns the adapters if there are any.

    Raises:
        ConfigError: a source cannot be read, or the parts do not fit together.
    """
    joints, adapters = read_trained(sources)
    text_config, text_state, tokenizer = read_text_part(sources.llama)
    vision_config, vision_state, image_processor = read_vision_part(sources.clip, sources.vision_heads)
    add_placeholders(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text_config, name, getattr(tokenizer, name))
    text_id, image_sample_id, image_id = tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS))
    config = LavinConfig(
        text_config=text_config,
        vision_config=vision_config,
        projection_dim=joints["model.projector.down.weight"].shape[0] if joints else BOTTLENECK,
        modality_token_ids=[text_id, image_sample_id],
        image_token_id=image_id,
    )
    model = _assemble(config, {**text_state, **vision_state, **(joints or _new_joints(config))})
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    LavinProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length).save_pretrained(folder)
    return adapters


def read_trained(sources: Sources) -> tuple[dict[str, Tensor], TrainedAdapters | None]:
    """(projection and modality embedding, adapters) of LaVIN's checkpoint; ({}, None) where there is none.

    Raises:
        ConfigError: it lacks some of them.
    """
    if sources.adapters is None:
        if sources.skip:
            raise ConfigError(f"skip is {list(sources.skip)} without adapters; expected the checkpoint of that run")
        return {}, None
    checkpoint = read_checkpoint(sources.adapters)
    joints = joint_state(checkpoint.tensors)
    if {name.rpartition(".")[0] for name in joints} != set(JOINTS.values()):
        raise ConfigError(
            f"checkpoint {str(sources.adapters)!r} has no adapter_proj or adapter_modality_embedding; expected LaVIN's "
            "or LaVIN-EAS's checkpoint-*.pth: check the path"
        )
    return joints, read_adapters(checkpoint.tensors, sources.skip, checkpoint.options)


def _assemble(config: LavinConfig, state: Mapping[str, Tensor]) -> Any:
    """The model with these weights, all in the precision of its LLaMA.

    Raises:
        ConfigError: weights are missing, left over, or of another size.
    """
    dtype = state["model.language_model.embed_tokens.weight"].dtype
    config.dtype = dtype
    with torch.device("meta"):
        model = LavinForConditionalGeneration(config)
    wanted = model.state_dict()
    known = {name: tensor.to(dtype).contiguous() for name, tensor in state.items() if name in wanted}
    odd = sorted(wanted.keys() - known.keys()) or [name for name in known if known[name].shape != wanted[name].shape]
    if odd or len(known) < len(state):
        name = odd[0] if odd else sorted(state.keys() - known.keys())[0]
        raise ConfigError(f"the parts do not fit together: {name} is missing, left over, or of another size")
    model.load_state_dict(known, assign=True)
    return model


def _new_joints(config: LavinConfig) -> dict[str, Tensor]:
    """Projection and modality embedding as they are before training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        projector, modality = Projector(config), nn.Embedding(2, config.text_config.hidden_size)
        nn.init.normal_(modality.weight, std=config.text_config.initializer_range)
    parts = {"model.projector": projector, "model.modality_embedding": modality}
    return {f"{path}.{name}": value.detach() for path, part in parts.items() for name, value in part.named_parameters()}
