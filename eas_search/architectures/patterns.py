"""Block patterns as data: how a transformer block names the parts that skipping needs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class BlockPattern:
    """A pre-norm block: y = h + ffn(norm2(h)), h = x + attention(norm1(x)).

    Attributes:
        name: how the pattern is called in tables and messages.
        norm1, attention, norm2, ffn: attribute names of the block's parts.
        qkv: names of the attention's input projections, inside the attention.
        ffn_in: names of the FFN's first projections, inside the FFN: (gate, up) when gated, else one.
        ffn_out: name of the FFN's second projection.
        activation: name of the FFN's activation.
    """

    name: str
    norm1: str
    attention: str
    norm2: str
    ffn: str
    qkv: tuple[str, ...]
    ffn_in: tuple[str, ...]
    ffn_out: str
    activation: str

    @property
    def gated(self) -> bool:
        """Whether the FFN is down(act(gate(v)) · up(v)) rather than fc2(act(fc1(v)))."""
        return len(self.ffn_in) == 2

    def fits(self, block: nn.Module) -> bool:
        """Whether `block` has exactly these parts.

        A block with any further part that computes (a third norm, a second attention) is another pattern, even when
        all names of this one are present.
        """
        parts = {name for name, child in block.named_children() if not isinstance(child, nn.Dropout | nn.Identity)}
        if parts != {self.norm1, self.attention, self.norm2, self.ffn}:
            return False
        attention, ffn = getattr(block, self.attention), getattr(block, self.ffn)
        linears = [getattr(attention, name, None) for name in self.qkv]
        linears += [getattr(ffn, name, None) for name in (*self.ffn_in, self.ffn_out)]
        return all(isinstance(linear, nn.Linear) for linear in linears) and hasattr(ffn, self.activation)


_QKV = ("q_proj", "k_proj", "v_proj")

PATTERNS: tuple[BlockPattern, ...] = (
    BlockPattern(
        name="llama",
        norm1="input_layernorm",
        attention="self_attn",
        norm2="post_attention_layernorm",
        ffn="mlp",
        qkv=_QKV,
        ffn_in=("gate_proj", "up_proj"),
        ffn_out="down_proj",
        activation="act_fn",
    ),
    BlockPattern(
        name="clip",
        norm1="layer_norm1",
        attention="self_attn",
        norm2="layer_norm2",
        ffn="mlp",
        qkv=_QKV,
        ffn_in=("fc1",),
        ffn_out="fc2",
        activation="activation_fn",
    ),
    BlockPattern(
        name="vit",
        norm1="layernorm_before",
        attention="attention",
        norm2="layernorm_after",
        ffn="mlp",
        qkv=_QKV,
        ffn_in=("fc1",),
        ffn_out="fc2",
        activation="activation_fn",
    ),
)
