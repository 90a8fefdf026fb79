"""From a published checkpoint of METER to a model of this package.

`convert_checkpoint("meter_clip16_288_roberta_pretrain.ckpt", "vqa", image_size=576)` gives the model,
`processing.save_folder(model, tokenizer, "meter-vqa")` writes it with its processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from eas_search.exceptions import ConfigError, UnsupportedModelError
from eas_search.models.meter.configuration import MeterConfig
from eas_search.models.meter.heads import MeterForClassification, MeterForImageAndTextRetrieval
from eas_search.models.meter.names import renamed
from eas_search.models.official import read_torch

Task = Literal["vqa", "nlvr2", "retrieval"]
LABELS = {"vqa": 3129, "nlvr2": 2, "retrieval": 2}
HEAD_WIDTH = 64  # of every attention head in CLIP's, RoBERTa's and METER's published sizes
POSITIONS = "meter.vision_model.embeddings.position_embedding.weight"
TYPES = "meter.token_type_embeddings.weight"


def convert_checkpoint(
    path: str | Path, task: Task, image_size: int | None = None, head_width: int = HEAD_WIDTH
) -> MeterForClassification | MeterForImageAndTextRetrieval:
    """The model of a published checkpoint, pretrained or fine-tuned, in eval mode; sizes are read off its tensors.

    A head that the checkpoint lacks is new, and its parameters' names are at `model.eas_trainable`. The ranking head
    of a checkpoint without one starts from the matching head, a second image's token type from the first one's.

    Args:
        path: a `.ckpt` file with the weights under `state_dict`, or a bare state dict.
        task: which head the model gets.
        image_size: resolution in pixels; None keeps that of the checkpoint. Positions are interpolated.
        head_width: width of an attention head, which no tensor shows.

    Raises:
        ConfigError: the file cannot be read, or an impossible task or resolution.
        UnsupportedModelError: it is not a METER with CLIP's vision transformer and RoBERTa.
    """
    if task not in LABELS:
        raise ConfigError(f"task {task!r} is unknown; expected one of {', '.join(LABELS)}")
    content = read_torch(path)
    content = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    tensors = renamed({name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)})
    if POSITIONS not in tensors or TYPES not in tensors:
        raise ConfigError(f"checkpoint {str(path)!r} holds no METER; expected its weights under 'state_dict'")
    config = read_config(tensors, task, image_size, head_width)
    vision = config.vision_config
    tensors[POSITIONS] = resized_positions(tensors[POSITIONS], vision.image_size // vision.patch_size)
    _start_from_relatives(tensors, config)
    kind = MeterForImageAndTextRetrieval if task == "retrieval" else MeterForClassification
    model = kind(config).eval()
    return _filled(model, tensors, path)


def read_config(tensors: Mapping[str, Tensor], task: Task, image_size: int | None, head_width: int) -> MeterConfig:
    """The configuration that these tensors, under our names, belong to.

    Raises:
        ConfigError: the resolution is no multiple of the patch size.
    """

    def layers(prefix: str) -> int:
        depth = prefix.count(".") + 1
        return 1 + max(int(name.split(".")[depth]) for name in tensors if name.startswith(f"{prefix}."))

    def shape(name: str) -> tuple[int, ...]:
        return tuple(tensors[f"meter.{name}"].shape)

    vision, patch = shape("vision_model.embeddings.patch_embedding.weight")[::2]
    words, text = shape("text_model.embeddings.word_embeddings.weight")
    wide, width = shape("cross_modal_text_layers.0.intermediate.dense.weight")
    size = image_size or round((tensors[POSITIONS].shape[0] - 1) ** 0.5) * patch
    if size <= 0 or size % patch:
        raise ConfigError(f"image_size is {size}, expected a multiple of the patch size {patch}")
    labels = next((len(tensors[name]) for name in ("classifier.3.weight",) if name in tensors), LABELS[task])
    return MeterConfig(
        hidden_size=width,
        intermediate_size=wide,
        num_attention_heads=width // head_width,
        num_hidden_layers=layers("meter.cross_modal_text_layers"),
        num_images=2 if task == "nlvr2" else 1,
        num_labels=labels,
        text_config={
            "vocab_size": words,
            "hidden_size": text,
            "intermediate_size": shape("text_model.encoder.layer.0.intermediate.dense.weight")[0],
            "num_hidden_layers": layers("meter.text_model.encoder.layer"),
            "num_attention_heads": text // head_width,
            "max_position_embeddings": shape("text_model.embeddings.position_embeddings.weight")[0],
        },
        vision_config={
            "hidden_size": vision,
            "intermediate_size": shape("vision_model.encoder.layers.0.mlp.fc1.weight")[0],
            "num_hidden_layers": layers("meter.vision_model.encoder.layers"),
            "num_attention_heads": vision // head_width,
            "patch_size": patch,
            "image_size": size,
        },
    )


def resized_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings [1 + s², d] of a class token and a square of patches, for a square of `side`: [1 + side², d].

    The class token keeps its own; the others are interpolated bicubically.
    """
    first, grid = positions[:1], positions[1:]
    before = round(len(grid) ** 0.5)
    if before == side:
        return positions
    picture = grid.float().view(1, before, before, -1).permute(0, 3, 1, 2)
    picture = F.interpolate(picture, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, picture.flatten(2)[0].T.to(positions.dtype)])


def _start_from_relatives(tensors: dict[str, Tensor], config: MeterConfig) -> None:
    """What a fine-tuning run takes from the pretrained checkpoint when that has no such part."""
    types = tensors[TYPES]
    if len(types) <= config.num_images:
        types = torch.cat([types, types[-1:].expand(1 + config.num_images - len(types), -1)])
    tensors[TYPES] = types[: 1 + config.num_images]
    for name in ("weight", "bias"):
        if f"itm_score.{name}" in tensors:
            tensors.setdefault(f"rank_output.{name}", tensors[f"itm_score.{name}"][1:])


def _filled(model: Any, tensors: Mapping[str, Tensor], path: str | Path) -> Any:
    own = model.state_dict()
    if surplus := sorted(name for name in tensors.keys() - own.keys() if name.startswith("meter.")):
        raise UnsupportedModelError(
            f"checkpoint {str(path)!r} also holds {surplus[0]!r}, which METER does not have; expected a checkpoint of "
            "METER itself, without adapters"
        )
    given = {name: tensor for name, tensor in tensors.items() if name in own}
    odd = sorted(name for name, tensor in given.items() if tensor.shape != own[name].shape)
    missing = sorted(own.keys() - given.keys())
    if odd := odd or [name for name in missing if name.startswith("meter.")]:
        raise ConfigError(
            f"checkpoint {str(path)!r} lacks {odd[0]!r} in the shape {tuple(own[odd[0]].shape)}; expected a complete "
            "checkpoint of one model and task"
        )
    model.load_state_dict(given, strict=False)
    model.eas_trainable = tuple(name for name in missing if name in dict(model.named_parameters()))
    return model
