"""`decilm`: the per-layer configuration (`block_configs`) of Nemotron-NAS models, for engines that read it.

A block without attention has no weights for one, and every FFN has its own width. Such engines read one bias switch for
all FFNs and one for all attentions, so layers that need none get zeros. Their first block must have an attention (it
starts the residual stream there): if the first one is skipped, it stays with zero weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eas_search.export.files import CONFIG, read_json, write_json
from eas_search.export.formats.base import Format, Verdict, Writing
from eas_search.export.formats.plain import Misfit, check_plain, folded_ffn, hidden_width, open_norm, sizes_only

MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")  # the same layers under the same names
WEIGHTS = "model.safetensors"


class DeciLmFormat(Format):
    """Llama-like text models only."""

    name: ClassVar[str] = "decilm"
    summary: ClassVar[str] = "Nemotron-NAS block_configs, for engines such as vLLM; fast"
    library: ClassVar[str] = "transformers"
    usage: ClassVar[str] = (
        "# For engines with per-layer configurations, such as vLLM's DeciLMForCausalLM. It is in config.json\n"
        "# (`block_configs`), the weights have the names of Llama. Engines that only know `ffn_mult` cannot read it."
    )

    def plan(self, student: Any) -> Verdict:
        """See the module."""
        try:
            _check(student)
            _, merged = sizes_only(student)
            check_plain(merged)
        except Misfit as misfit:
            return Verdict("impossible", str(misfit))
        kept = " (the first block keeps an attention of zeros)" if 0 in _skipped(student) else ""
        return Verdict("exact", f"fast in an engine that reads block_configs{kept}; no such engine is checked here")

    def write(self, job: Writing) -> dict[str, Any]:
        """Configuration and weights."""
        config, tensors = _config(job.student, job.merged), _tensors(job.student, job.merged)
        write_json(job.folder / CONFIG, config)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            job.folder / WEIGHTS,
            metadata={"format": "pt"},
        )
        if job.student.generation_config is not None:
            job.student.generation_config.save_pretrained(job.folder)  # type: ignore[union-attr, operator]
        return {"merged": True}

    def load(self, folder: Path, content: Mapping[str, Any], base: nn.Module | None) -> nn.Module:
        """The described model, assembled from parts of Llama in `transformers`: to verify it, not to be fast."""
        values = read_json(folder, CONFIG)
        blocks = values.pop("block_configs")
        values |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        config = transformers.LlamaConfig.from_dict(values)
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM._from_config(config, dtype=getattr(torch, content["dtype"]))
            for layer, block in zip(model.model.layers, blocks, strict=True):
                own = copy.copy(config)
                own.intermediate_size = block["ffn"]["intermediate_size"]
                layer.mlp = type(layer.mlp)(own).to(model.dtype)
                if block["attention"]["no_op"]:
                    layer.self_attn, layer.input_layernorm = NoAttention(), nn.Identity()
        model.to_empty(device="cpu")
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        tensors = load_file(folder / WEIGHTS)
        if config.tie_word_embeddings:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        model.load_state_dict(tensors, strict=True)
        model.tie_weights()
        if (folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        return model.requires_grad_(False).eval()


class NoAttention(nn.Module):
    """In the place of an attention that is not computed."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Nothing to add."""
        return torch.zeros_like(hidden_states), None


def _skipped(student: Any) -> set[int]:
    return {site.layer for site in student.eas.skipped}


def _check(student: Any) -> None:
    name, config = type(student).__name__, student.config
    if name not in MODELS:
        raise Misfit(f"{name} is not of this family; expected one of {', '.join(MODELS)}")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise Misfit("a sliding window has no place in block_configs")


def _config(student: Any, merged: Any) -> dict[str, Any]:
    base = student.config.to_dict()
    names = merged.state_dict()
    blocks = []
    for site in student.eas.sites:
        attention = site.layer not in _skipped(student) or site.layer == 0
        group = base["num_attention_heads"] // base["num_key_value_heads"]
        blocks.append(
            {
                "attention": {"no_op": not attention, "n_heads_in_group": group if attention else None},
                "ffn": {"no_op": False, "intermediate_size": hidden_width(merged, site)},
            }
        )
    rope = base.get("rope_parameters") or {}
    return {
        **{key: value for key, value in base.items() if key not in ("auto_map", "layer_types", "quantization_config")},
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "block_configs": blocks,
        "mlp_bias": any(".mlp." in name and name.endswith(".bias") for name in names),
        "attention_bias": any(".self_attn." in name and name.endswith(".bias") for name in names),
        # Where older readers look for them.
        "rope_theta": rope.get("rope_theta"),
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
    }


def _tensors(student: Any, merged: Any) -> dict[str, Tensor]:
    """The merged weights under Llama's names, with zeros for the biases that only other layers need."""
    check_plain(merged)
    config = _config(student, merged)
    tensors = dict(merged.state_dict())
    if config["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    rows = {"q_proj": heads * head, "k_proj": config["num_key_value_heads"] * head}
    rows |= {"v_proj": rows["k_proj"], "o_proj": width}
    like = next(merged.parameters())
    for site, block in zip(student.eas.sites, config["block_configs"], strict=True):
        if folded_ffn(merged, site) is not None:
            tensors |= open_norm(student, site)
        zeros: dict[str, tuple[int, ...]] = {}
        if block["attention"]["no_op"] is False:
            if site.layer in _skipped(student):
                norm = f"{site.block}.{site.pattern.norm1}.weight"
                tensors[norm] = student.state_dict()[norm]
            for name, count in rows.items():
                read = rows["q_proj"] if name == "o_proj" else width
                zeros[f"{site.name}.{name}.weight"] = (count, read)
                if config["attention_bias"]:
                    zeros[f"{site.name}.{name}.bias"] = (count,)
        else:
            tensors.pop(f"{site.block}.{site.pattern.norm1}.weight", None)
        if config["mlp_bias"]:
            hidden = block["ffn"]["intermediate_size"]
            for name, count in (("gate_proj", hidden), ("up_proj", hidden), ("down_proj", width)):
                zeros[f"{site.block}.mlp.{name}.bias"] = (count,)
        for name, shape in zeros.items():
            tensors.setdefault(name, torch.zeros(shape, dtype=like.dtype, device=like.device))
    return tensors
