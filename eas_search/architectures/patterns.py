"""Block patterns as data: how transformer blocks name the parts that skipping needs.

A declaration only proposes. What a live block really computes is decided on numbers, see `resolve` and `probe`: the
same names may stand for a sequential or a parallel residual, for pre-norm or post-norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

Kind = Literal["self", "cross"]


@dataclass(frozen=True)
class FfnForm:
    """A plain FFN: out(act(first₀(v)) · first₁(v)) when gated, else out(act(first₀(v))).

    Attributes:
        first: names of its first projections, (gate, up) or one.
        out: name of its second projection.
        activation: name of its activation.
        fused: whether the one first projection computes gate and up, one after the other.
    """

    first: tuple[str, ...]
    out: str
    activation: str = ""
    fused: bool = False

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self.fused or len(self.first) == 2


@dataclass(frozen=True)
class BlockPattern:
    """One kind of attention site.

    With `norm2` and `ffn` it declares y = h + post_ffn(ffn(norm2(h))), h = x + post_attention(attention(norm1(x))), or
    the parallel form y = x + attention(norm1(x)) + ffn(norm2(x)): everything can be put in the attention's place, and
    merged. Without them only `attention` is known: a stand-in takes its place and the rest of the block stays as it is.

    Attributes:
        name: how the pattern is called in tables and messages.
        attention: path of the attention inside the block.
        kind: `self`, or `cross` for attention to another stream.
        writer: path of the module through which the attention's output passes on its way to the residual stream, when
            it is not inside `attention`; it is left out together with the attention.
        adds: name of an argument that the attention adds to its output (a residual inside the attention).
        reads: name of an argument that a stand-in reads instead of the attention's input, in calls that have it.
        norms: where the norms stand, for tables: `pre`, `post`, `sandwich`, or `?` where it depends on the model.
        norm1, norm2: names of the norms in front of attention and FFN; the same name when they share one.
        ffn: name of the FFN; `.` when the block itself holds the projections.
        post_attention, post_ffn: names of norms behind attention and FFN, before the residual is added.
    """

    name: str
    attention: str
    kind: Kind = "self"
    writer: str = ""
    adds: str = ""
    reads: str = ""
    norms: str = "?"
    norm1: str = ""
    norm2: str = ""
    ffn: str = ""
    post_attention: str = ""
    post_ffn: str = ""

    @property
    def whole(self) -> bool:
        """Whether the block is declared with its norms and its FFN."""
        return bool(self.norm2 and self.ffn)


FFN_FORMS: tuple[FfnForm, ...] = (
    FfnForm(("gate_proj", "up_proj"), "down_proj"),
    FfnForm(("w1", "w3"), "w2"),
    FfnForm(("gate_up_proj",), "down_proj", fused=True),
    FfnForm(("wi_0", "wi_1"), "wo"),
    *(
        FfnForm((first,), out)
        for first, out in (
            ("fc1", "fc2"),
            ("up_proj", "down_proj"),
            ("c_fc", "c_proj"),
            ("dense_h_to_4h", "dense_4h_to_h"),
            ("fc_in", "fc_out"),
            ("linear_fc1", "linear_fc2"),
            ("linear1", "linear2"),
            ("lin1", "lin2"),
            ("wi", "wo"),
            ("intermediate_dense", "output_dense"),
        )
    ),
)
ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "activation_func", "intermediate_act_fn", "hidden_act")

# Input projections of attentions: (query, key, value) apart, or one for all; the first is what shows the width.
QKV: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("linear_q", "linear_k", "linear_v"),
    ("qkv",),
    ("qkv_proj",),
    ("query_key_value",),
    ("c_attn",),
    ("Wqkv",),
    ("q_a_proj",),
    ("in_proj",),
)

_PRE_NORM = (
    # (name, norm1, attention, norm2, ffn)
    ("llama", ("input_layernorm",), ("self_attn", "attention"), ("post_attention_layernorm",), ("mlp",)),
    ("clip", ("layer_norm1",), ("self_attn", "attn", "attention"), ("layer_norm2",), ("mlp",)),
    ("vit", ("layernorm_before",), ("attention", "self_attn"), ("layernorm_after",), ("mlp",)),
    ("gpt2", ("ln_1",), ("attn", "attn.attention"), ("ln_2",), ("mlp",)),
    ("qwen-vit", ("norm1",), ("attn", "attention"), ("norm2",), ("mlp",)),
    ("opt", ("self_attn_layer_norm",), ("self_attn",), ("final_layer_norm",), (".", "mlp", "ffn")),
    ("aimv2", ("rms_norm1",), ("attention",), ("rms_norm2",), ("ffn",)),
    ("jamba", ("input_layernorm",), ("self_attn",), ("pre_ff_layernorm",), ("feed_forward",)),
    ("pixtral", ("attention_norm",), ("attention",), ("ffn_norm",), ("feed_forward",)),
    ("apertus", ("attention_layernorm",), ("self_attn",), ("feedforward_layernorm",), ("mlp",)),
    ("lfm2", ("operator_norm",), ("self_attn",), ("ffn_norm",), ("feed_forward",)),
    ("pix2struct", ("pre_attention_layer_norm",), ("attention",), ("pre_mlp_layer_norm",), ("mlp",)),
    ("falcon", ("ln_attn",), ("self_attention",), ("ln_mlp",), ("mlp",)),
    ("bloom", ("input_layernorm",), ("self_attention",), ("post_attention_layernorm",), ("mlp",)),
    ("clvp", ("input_rmsnorm",), ("self_attn",), ("post_attention_rmsnorm",), ("mlp",)),
    ("mpt", ("norm_1",), ("attn",), ("norm_2",), ("ffn",)),
)
_SHARED_NORM = (
    ("phi", "input_layernorm", "self_attn", "mlp"),
    ("falcon-shared", "input_layernorm", "self_attention", "mlp"),
    ("gpt-j", "ln_1", "attn", "mlp"),
)
_SANDWICH = (
    # (name, norm1, attention, norm2, post_attention, post_ffn); a layer scale behind a sublayer counts like a norm.
    (
        "gemma",
        "input_layernorm",
        "self_attn",
        "pre_feedforward_layernorm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
    (
        "glm4",
        "input_layernorm",
        "self_attn",
        "post_attention_layernorm",
        "post_self_attn_layernorm",
        "post_mlp_layernorm",
    ),
    ("afmoe", "input_layernorm", "self_attn", "pre_mlp_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    ("dinov2", "norm1", "attention", "norm2", "layer_scale1", "layer_scale2"),
    (
        "mimi",
        "input_layernorm",
        "self_attn",
        "post_attention_layernorm",
        "self_attn_layer_scale",
        "mlp_layer_scale",
    ),
)

PATTERNS: tuple[BlockPattern, ...] = (
    *(
        BlockPattern(name, attention, norms="pre", norm1=norm1, norm2=norm2, ffn=ffn)
        for name, *parts in _PRE_NORM
        for norm1, attention, norm2, ffn in product(*parts)
    ),
    *(
        BlockPattern(name, attention, norms="pre", norm1=norm, norm2=norm, ffn=ffn)
        for name, norm, attention, ffn in _SHARED_NORM
    ),
    *(
        BlockPattern(name, attention, "self", "", "", "", "sandwich", norm1, norm2, "mlp", post_attention, post_ffn)
        for name, norm1, attention, norm2, post_attention, post_ffn in _SANDWICH
    ),
    # From here on only the attention is declared. The first that fits an attention counts.
    BlockPattern("bert", "attention.self", writer="attention.output.dense", norms="post"),
    BlockPattern(
        "bert-cross",
        "crossattention.self",
        "cross",
        writer="crossattention.output.dense",
        reads="layer_input",
        norms="post",
    ),
    BlockPattern("t5", "layer.0.SelfAttention", norms="pre"),
    BlockPattern("t5-cross", "layer.1.EncDecAttention", "cross", norms="pre"),
    BlockPattern("bloom", "self_attention", adds="residual", norms="pre"),
    BlockPattern("pix2struct-text", "self_attention.attention", norms="pre"),
    BlockPattern("pix2struct-cross", "encoder_decoder_attention.attention", "cross", norms="pre"),
    *(BlockPattern(name, name) for name in ("self_attn", "attention", "attn", "self_attention")),
    *(
        BlockPattern(name, name, "cross")
        for name in ("encoder_attn", "crossattention", "cross_attn", "cross_attention", "encoder_decoder_attn")
    ),
)
_registered: list[BlockPattern] = []


def register_pattern(pattern: BlockPattern) -> BlockPattern:
    """Make a pattern of your own known; it is tried before those of this library. Returns it."""
    if pattern not in _registered:
        _registered.append(pattern)
    return pattern


def patterns() -> tuple[BlockPattern, ...]:
    """All patterns in the order in which they are tried."""
    return (*_registered, *PATTERNS)
