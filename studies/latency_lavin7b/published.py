"""What the published merge of LaVIN-EAS does for every prompt, written down from its description.

A prompt decides the router's weights, they decide the adapter's matrix M, and M is multiplied into whole projections:
W ← W M (d×d three times for a kept attention, d_ff×d twice for a skipped one), from copies of the original weights, in
every layer, before the layer runs. That is possible for one prompt at a time. Two things are kinder than published: the
product is written straight into the weight, so restoring it costs no pass of its own, and the bias is W b with the
original W (published: with the updated one, which costs the same and is wrong), so that this model answers like the
student it was made from.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from eas_search.pia import Pia
from eas_search.skip_config import SkipConfig
from eas_search.skipping import adapter_parameters, apply_skips, load_adapters

LAYERS = "model.language_model.layers"


class RemergedLayer(nn.Module):
    """A layer of the LLaMA whose first projections are multiplied anew with its adapter for every prompt.

    Args:
        layer: the original layer, which stays as it is; all weights but those projections' are shared with it.
        adapter: light adapter of a kept attention, or PIA of a skipped one; routed.
        skipped: whether the attention is skipped.
    """

    def __init__(self, layer: Any, adapter: Pia, skipped: bool) -> None:
        super().__init__()
        layer = copy.deepcopy(layer, {id(shared): shared for shared in layer.parameters()})
        self.layer, self.adapter, self.skipped = layer, adapter, skipped
        host = layer.mlp if skipped else layer.self_attn
        self.names = [f"{'mlp' if skipped else 'self_attn'}.{name}_proj" for name in ("gate", "up") if skipped]
        self.names = self.names or [f"self_attn.{letter}_proj" for letter in "qkv"]
        for name in self.names:
            linear = host.get_submodule(name.rpartition(".")[2])
            self.register_buffer(name.replace(".", "_"), linear.weight.detach())
            linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
        if skipped:
            del layer.self_attn

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """x [1, n, d] → [1, n, d]; more than one token is a prompt."""
        x = self.layer.input_layernorm(hidden_states)
        if x.shape[1] > 1:
            self.remerge(x)
        if self.skipped:
            return hidden_states + self.layer.mlp(x)
        y: Tensor = self.layer(hidden_states, **kwargs)
        return y

    def remerge(self, x: Tensor) -> None:
        """Multiply this prompt's M into the projections; x [1, n, d], normalised."""
        if len(x) != 1:
            raise ValueError(f"{len(x)} prompts; expected one: the weights can hold the merge of one prompt only")
        adapter = self.adapter
        weights = adapter.shape.scale * torch.softmax(
            nn.functional.linear(x[0, 1:].mean(0), adapter.router_weight, adapter.router_bias)
            / adapter.shape.temperature,
            dim=-1,
        )
        first, second = adapter.experts()
        up = adapter.shape.mix * (weights[0] * first.dense() + weights[1] * second.dense())
        inner = adapter.down.bias if adapter.pool is None else adapter.down.bias + adapter.pool(x).mean(dim=1)[0]
        matrix = up @ adapter.down.weight
        matrix.diagonal().add_(1.0)
        bias = up @ inner + weights[0] * first.bias + weights[1] * second.bias
        if self.skipped:
            gain = self.layer.post_attention_layernorm.weight
            matrix, bias = matrix * gain.unsqueeze(1), bias * gain
        for name in self.names:
            original, linear = getattr(self, name.replace(".", "_")), self.layer.get_submodule(name)
            torch.mm(original, matrix, out=linear.weight.data)
            torch.mv(original, bias, out=linear.bias.data)


def published_merge(model: nn.Module, student: Any, config: SkipConfig) -> Any:
    """The routed `student` of `model` in the form of the published merge; adapters of the vision tower stay thin paths.

    Args:
        model: the original LaVIN.
        student: of `config`, with adapters; its values are used.
        config: routed, placement `ffn`, identity `paper`.
    """
    outside = config.model_copy(update={"skip": (), "adapter_towers": ("vision",)})
    published = apply_skips(model, outside)
    values = adapter_parameters(student)
    load_adapters(published, {name: values[name] for name in adapter_parameters(published)})
    layers = published.get_submodule(LAYERS)
    gone = {site.layer for site in student.eas.skipped}
    for i, theirs in enumerate(student.get_submodule(LAYERS)):
        adapter = theirs.pia_ffn if i in gone else theirs.self_attn.eas_adapter
        layers[i] = RemergedLayer(layers[i], adapter, i in gone)
    return published.eval()


def remerge_flops(shape: Any, skipped: int) -> int:
    """Of the products W M for one prompt."""
    d, wide = shape.hidden_size, shape.intermediate_size
    return 2 * d * d * (3 * d * (shape.num_hidden_layers - skipped) + 2 * wide * skipped)


def prompt_flops(shape: Any, skipped: int, tokens: int) -> int:
    """Of the text tower's layers for one prompt, without adapters."""
    d, wide, kept = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers - skipped
    return 2 * tokens * (3 * d * wide * shape.num_hidden_layers + (4 * d * d + tokens * d) * kept)
