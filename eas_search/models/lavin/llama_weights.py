"""LLaMA's published checkpoints in the terms of `transformers`.

A folder holds `params.json`, `consolidated.00.pth`, … and `tokenizer.model`. Larger models are split over several files
for model parallelism: matrices that write into several heads or neurons by rows, those that read from them by columns.
The published rotary embedding turns adjacent pairs of channels, that of `transformers` channel i and i + d/2: the rows
of the query and key projections are reordered to match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from eas_search.exceptions import ConfigError
from eas_search.models.lavin.reading import read_checkpoint, read_json

BODY = "model.language_model"
OUTSIDE = {"tok_embeddings": f"{BODY}.embed_tokens", "norm": f"{BODY}.norm", "output": "lm_head"}
INSIDE = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_BY_COLUMNS = ("attention.wo", "feed_forward.w2")
_ALIKE = ("norm", "attention_norm", "ffn_norm")


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection [heads · d, …] from adjacent pairs (2i, 2i + 1) to pairs (i, i + d/2)."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def join_shards(shards: Sequence[Mapping[str, Tensor]], width: int) -> dict[str, Tensor]:
    """One state dict from the files of a model that was split for model parallelism; `width` is the model's.

    Raises:
        ConfigError: the files do not hold the same names.
    """
    if any(shard.keys() != shards[0].keys() for shard in shards):
        raise ConfigError("the files consolidated.*.pth hold different names; expected all files of one model")
    if len(shards) == 1:
        return dict(shards[0])
    joined: dict[str, Tensor] = {}
    for name, first in shards[0].items():
        part = name.removesuffix(".weight").split(".", 2)[-1] if name.startswith("layers.") else name.partition(".")[0]
        if part in _ALIKE or name == "rope.freqs":
            joined[name] = first
            continue
        columns = part in _BY_COLUMNS or (part == "tok_embeddings" and first.shape[1] < width)
        joined[name] = torch.cat([shard[name] for shard in shards], dim=1 if columns else 0)
    return joined


def llama_state(tensors: Mapping[str, Tensor], heads: int, key_heads: int) -> dict[str, Tensor]:
    """A joined checkpoint under the names of `LavinForConditionalGeneration`; what is not LLaMA's is left out.

    Raises:
        ConfigError: a bias that is not zero, for which the model has no place.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        if path in OUTSIDE:
            state[f"{OUTSIDE[path]}.{kind}"] = tensor
            continue
        first, *rest = path.split(".", 2)
        if first != "layers" or len(rest) < 2 or rest[1] not in INSIDE:
            continue
        if kind == "bias":
            if tensor.any():
                raise ConfigError(f"{name} is a bias that is not zero; expected a LLaMA, which has none")
            continue
        turned = {"attention.wq": heads, "attention.wk": key_heads}.get(rest[1])
        place = f"{BODY}.layers.{rest[0]}.{INSIDE[rest[1]]}.{kind}"
        state[place] = tensor if turned is None else half_split(tensor, turned)
    return state


def llama_config(params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LlamaConfig:
    """Configuration from `params.json` and the shapes of the joined weights.

    Raises:
        ConfigError: `params.json` lacks what only it can say.
    """
    try:
        width, heads = int(params["dim"]), int(params["n_heads"])
        return LlamaConfig(
            vocab_size=tensors["tok_embeddings.weight"].shape[0],
            hidden_size=width,
            intermediate_size=tensors["layers.0.feed_forward.w1.weight"].shape[0],
            num_hidden_layers=int(params["n_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(params.get("n_kv_heads") or heads),
            rms_norm_eps=float(params.get("norm_eps", 1e-5)),
            rope_parameters={"rope_type": "default", "rope_theta": float(params.get("rope_theta", 10000.0))},
            max_position_embeddings=int(params.get("max_seq_len", 2048)),
        )
    except KeyError as error:
        raise ConfigError(f"the LLaMA checkpoint lacks {error}; expected params.json and weights of a model") from error


def read_llama(folder: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """(configuration, state dict under LaVIN's names) of a published checkpoint folder.

    Raises:
        ConfigError: the folder holds none.
    """
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise ConfigError(
            f"folder {str(folder)!r} has no consolidated.*.pth; expected LLaMA's files or a Hugging Face folder"
        )
    params = read_json(folder / "params.json")
    tensors = join_shards([read_checkpoint(file).tensors for file in files], int(params.get("dim", 0)))
    config = llama_config(params, tensors)
    return config, llama_state(tensors, config.num_attention_heads, config.num_key_value_heads)
