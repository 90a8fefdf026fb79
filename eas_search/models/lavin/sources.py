"""Where LaVIN's parts come from: published files, or folders and ids in the Hugging Face layout."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPVisionConfig, LlamaConfig

from eas_search.exceptions import ConfigError
from eas_search.models.lavin.clip_weights import TOWER, clip_config, clip_state, visual_part
from eas_search.models.lavin.llama_weights import BODY, read_llama
from eas_search.models.lavin.reading import read_checkpoint


def read_text_part(source: str) -> tuple[LlamaConfig, dict[str, Tensor], Any]:
    """(configuration, state dict under LaVIN's names, tokenizer) of a LLaMA.

    Args:
        source: folder with `params.json`, `consolidated.*.pth` and `tokenizer.model` (there or one folder above), a
            folder in the Hugging Face layout, or a hub id.

    Raises:
        ConfigError: it is none of these.
    """
    if (Path(source) / "params.json").is_file():
        config, state = read_llama(Path(source))
        return config, state, read_tokenizer(Path(source))
    _expect(source, "llama")
    model = _pretrained(transformers.LlamaForCausalLM, source)
    state = {name.replace("model.", f"{BODY}.", 1): tensor for name, tensor in model.state_dict().items()}
    return model.config, state, _pretrained(AutoTokenizer, source)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in `tokenizer.model`.

    Raises:
        ConfigError: there is none, or the libraries that read it are missing.
    """
    places = [place for place in (folder, folder.parent) if (place / "tokenizer.model").is_file()]
    if not places:
        raise ConfigError(f"folder {str(folder)!r} has no tokenizer.model; expected it there or in the folder above")
    if any(importlib.util.find_spec(name) is None for name in ("sentencepiece", "google")):
        raise ConfigError("tokenizer.model needs sentencepiece and protobuf: pip install 'eas-search[convert]'")
    return _pretrained(transformers.LlamaTokenizer, str(places[0]))


def read_vision_part(source: str, heads: int | None = None) -> tuple[CLIPVisionConfig, dict[str, Tensor], Any]:
    """(configuration, state dict under LaVIN's names, image processor) of a CLIP vision transformer.

    Args:
        source: file with OpenAI's state dict, a folder in the Hugging Face layout, or a hub id.
        heads: attention heads, for a file whose heads do not have 64 channels.

    Raises:
        ConfigError: it is none of these.
    """
    if Path(source).is_file():
        visual = visual_part(read_checkpoint(Path(source)).tensors)
        config = clip_config(visual, heads)
        size = {"height": config.image_size, "width": config.image_size}
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": config.image_size}, crop_size=size)
        return config, clip_state(visual), processor
    _expect(source, "clip", "clip_vision_model")
    model = _pretrained(transformers.CLIPVisionModel, source)
    state = {f"{TOWER}.{name.removeprefix('vision_model.')}": tensor for name, tensor in model.state_dict().items()}
    return model.config, state, _pretrained(AutoImageProcessor, source)


def _expect(source: str, *kinds: str) -> None:
    found = _pretrained(AutoConfig, source).model_type
    if found not in kinds:
        raise ConfigError(f"{source!r} is a {found!r}; expected a model of type {kinds[0]!r}: name another one")


def _pretrained(kind: Any, source: str) -> Any:
    weights = issubclass(kind, transformers.PreTrainedModel)
    try:
        return kind.from_pretrained(source, **({"dtype": "auto"} if weights else {}))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"{source!r} cannot be loaded: {reason}; expected published files, a Hugging Face folder or a hub id"
        ) from error
