"""METER's co-attention layer: self-attention, cross-attention to the other stream, FFN; all of them post-norm.

The parts are BERT's and so are their names, so that the declared patterns for BERT find both attentions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bert.modeling_bert import (
    BertCrossAttention,
    BertIntermediate,
    BertOutput,
    BertSelfAttention,
    BertSelfOutput,
)

from eas_search.models.meter.configuration import MeterConfig


class MeterAttention(nn.Module):
    """h = LN(W_o attention(x) + b_o + x), to the tokens themselves or to those of the other stream."""

    def __init__(self, config: MeterConfig, cross: bool) -> None:
        super().__init__()
        self.self = (BertCrossAttention if cross else BertSelfAttention)(config)
        self.output = BertSelfOutput(config)

    def forward(self, x: Tensor, mask: Tensor | None, **other: Tensor) -> Tensor:
        """x [B, n, d] → [B, n, d]; the mask is that of the tokens attended to, `other` goes to a cross-attention."""
        attended: Any = self.self(x, attention_mask=mask, **other)
        h: Tensor = self.output(attended[0], x)
        return h


class MeterCrossLayer(GradientCheckpointingLayer):
    """h1 = self-attention(x), h2 = cross-attention(h1, other), y = LN(FFN(h2) + h2).

    What stands in for a skipped cross-attention reads h1, like the attention itself: one contract for all sites, so
    that what it must give (the attention's output for h1) is also what a least-squares start fits; without it the two
    would see different tokens whenever the self-attention is kept. In the published code of METER-EAS it reads x; with
    `skipped_cross_reads="layer_input"` the layer hands x on for that.
    """

    def __init__(self, config: MeterConfig) -> None:
        super().__init__()
        self.attention = MeterAttention(config, cross=False)
        self.crossattention = MeterAttention(config, cross=True)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)
        self.hands_on_input = config.skipped_cross_reads == "layer_input"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """This stream [B, n, d] and the other one [B, m, d] → [B, n, d]; masks as the attention implementation wants.

        Args:
            hidden_states: x.
            encoder_hidden_states: the other stream, before this layer's turn.
            attention_mask: of this stream's tokens, for n queries.
            encoder_attention_mask: of the other stream's tokens, for n queries.
        """
        h = self.attention(hidden_states, attention_mask)
        other = {"encoder_hidden_states": encoder_hidden_states}
        if self.hands_on_input:
            other["layer_input"] = hidden_states
        h = self.crossattention(h, encoder_attention_mask, **other)
        y: Tensor = self.output(self.intermediate(h), h)
        return y
