"""LaVIN's and LaVIN-EAS's trained parts in the terms of this library.

Published names: `adapter_attn` is the light adapter in front of a kept attention, `replaced_adapter` the PIA of a
skipped one. Their maps are 1×1 convolutions: conv_A the pooled projection and conv_C the token's own (a light adapter
has only conv_A, its own), conv_B and conv_D the two up-projections, expert_weights the router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eas_search.exceptions import ConfigError
from eas_search.skip_config import SkipConfig

TEXT, VISION = "layers.", "backbone.visual.transformer.resblocks."
_LAYERS = {TEXT: "model.language_model.layers.", VISION: "model.vision_tower.encoder.layers."}
JOINTS = {
    "adapter_proj.conv_A": "model.projector.down",
    "adapter_proj.conv_B": "model.projector.up",
    "adapter_modality_embedding": "model.modality_embedding",
}


@dataclass(frozen=True)
class TrainedAdapters:
    """A skip configuration, and the adapters' values under the names that a student of it has."""

    config: SkipConfig
    tensors: dict[str, Tensor]


def joint_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Projection of image features and modality embedding under LaVIN's names; empty where there are none."""
    return {
        f"{new}.{kind}": tensors[f"{old}.{kind}"]
        for old, new in JOINTS.items()
        for kind in ("weight", "bias")
        if f"{old}.{kind}" in tensors
    }


def pia_state(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """State dict of a `Pia` from the published names that begin with `prefix`."""
    part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    own = "conv_C" if "conv_C.weight" in part else "conv_A"
    maps = {"down": own, "ups.0": "conv_B", "ups.1": "conv_D", **({"pool": "conv_A"} if own == "conv_C" else {})}
    state = {f"{new}.weight": part[f"{old}.weight"].squeeze(-1) for new, old in maps.items()}
    state |= {f"{new}.bias": part[f"{old}.bias"] for new, old in maps.items()}
    state["router_weight"] = part["expert_weights.weight"]
    state["router_bias"] = part.get("expert_weights.bias", torch.zeros(2))
    return state


def read_adapters(tensors: Mapping[str, Tensor], skip: Sequence[int], options: Mapping[str, Any]) -> TrainedAdapters:
    """The adapters of a checkpoint whose layers `skip` are skipped.

    Args:
        tensors: of the checkpoint.
        skip: skipped LLaMA layers; the published code does not keep them with the weights.
        options: of the run; `adapter_scale` and `temperature` count, by default 1 and 10.

    Raises:
        ConfigError: a layer that the checkpoint has no adapter for, or adapters that one configuration cannot describe.
    """
    skipped = {f"{TEXT}{layer}.replaced_adapter." for layer in skip}
    found: dict[str, Tensor] = {}
    light: set[int] = set()
    pia: set[int] = set()
    groups: set[int] = set()
    towers: set[str] = set()
    for source, layers in _LAYERS.items():
        numbers = {int(name.removeprefix(source).split(".")[0]) for name in tensors if name.startswith(source)}
        for number in sorted(numbers):
            gone = source == TEXT and number in skip
            prefix = f"{source}{number}.{'replaced_adapter' if gone else 'adapter_attn'}."
            if f"{prefix}conv_A.weight" not in tensors:
                continue
            skipped.discard(prefix)
            state = pia_state(tensors, prefix)
            rank = state["down.weight"].shape[0]
            (pia if gone else light).add(rank)
            groups.add(rank // state["ups.0.weight"].shape[1])
            if not gone:
                towers.add("text" if source == TEXT else "vision")
            place = f"{layers}{number}.{'pia_ffn' if gone else 'self_attn.eas_adapter'}"
            found |= {f"{place}.{name}": tensor for name, tensor in state.items()}
    if skipped:
        raise ConfigError(
            f"the adapter checkpoint has no {sorted(skipped)[0]}conv_A.weight; expected one for every skipped layer: "
            "check the list of skipped layers"
        )
    if len(light) > 1 or len(pia) > 1 or len(groups) > 1:
        raise ConfigError(
            f"the adapters have ranks {sorted(light)} and {sorted(pia)} in {sorted(groups)} groups; expected one rank "
            "for all light adapters, one for all PIAs and one number of groups"
        )
    config = SkipConfig(
        skip=tuple(f"{_LAYERS[TEXT]}{layer}.self_attn" for layer in sorted(skip)),
        placement="ffn",
        pooling="prompt",
        router="routed",
        router_spares_first=True,
        identity="paper",
        adapter_towers=tuple(sorted(towers)),
        scale=float(options.get("adapter_scale", 1.0)),
        temperature=float(options.get("temperature", 10.0)),
        **({"adapter_dim": light.pop()} if light else {}),
        **({"pia_dim": pia.pop()} if pia else {}),
        **({"groups": groups.pop()} if groups else {}),
    )
    return TrainedAdapters(config, found)
