"""METER with a head: answers (VQAv2, NLVR2), or the match of a text and an image (Flickr30k)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput

from eas_search.models.meter.configuration import MeterConfig
from eas_search.models.meter.model import MeterModel, MeterPreTrainedModel


class MeterForClassification(MeterPreTrainedModel):
    """An answer to a question about an image, or a verdict on a statement about `num_images` images.

    VQAv2: 3,129 answers, one image; NLVR2: two labels, two images.
    """

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        width = 2 * config.hidden_size
        self.meter = MeterModel(config)
        self.classifier = nn.Sequential(
            nn.Linear(config.num_images * width, width),
            nn.LayerNorm(width),
            nn.GELU(),
            nn.Linear(width, config.num_labels),
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Inputs as those of `MeterModel`.

        Args:
            input_ids: tokens.
            pixel_values: images.
            attention_mask: of the tokens.
            labels: [B] classes (cross-entropy), or [B, C] scores in [0, 1], VQAv2's soft targets (binary cross-entropy
                summed over the answers).
            kwargs: see `MeterModel`.

        Returns:
            `logits` [B, C] and, with labels, `loss`.
        """
        logits = self.classifier(self.meter(input_ids, pixel_values, attention_mask).pooler_output)
        loss = None
        if labels is not None and labels.is_floating_point():
            loss = F.binary_cross_entropy_with_logits(logits, labels) * labels.shape[1]
        elif labels is not None:
            loss = F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@dataclass
class MeterRetrievalOutput(ModelOutput):
    """What `MeterForImageAndTextRetrieval` gives for B pairs.

    Attributes:
        loss: with labels.
        logits: [B, 1] score of every pair, by which candidates are ranked; [B, C] with C texts per image.
        match_logits: [B, 2] (no match, match), the pretraining head; [B, C, 2] with C texts per image.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    match_logits: Tensor | None = None


class MeterForImageAndTextRetrieval(MeterPreTrainedModel):
    """How well a text and an image fit together."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        self.meter = MeterModel(config)
        self.itm_score = nn.Linear(2 * config.hidden_size, 2)
        self.rank_output = nn.Linear(2 * config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MeterRetrievalOutput:
        """Inputs as those of `MeterModel`, one pair per row.

        Args:
            input_ids: tokens [B, n], or [B, C, n] of C texts per image.
            pixel_values: images.
            attention_mask: of the tokens.
            labels: [g]: the pairs are g groups of B / g candidates, and the label says which one of its group fits
                (cross-entropy over the scores of a group). With C texts per image these are a group, g = B.
            kwargs: see `MeterModel`.
        """
        grouped = input_ids.dim() == 3
        flat = input_ids.flatten(0, -2)
        mask = None if attention_mask is None else attention_mask.flatten(0, -2)
        pooled = self.meter(flat, pixel_values, mask).pooler_output
        logits, match = self.rank_output(pooled), self.itm_score(pooled)
        loss = None if labels is None else F.cross_entropy(logits.view(len(labels), -1), labels)
        if grouped:
            logits, match = logits.view(input_ids.shape[:2]), match.unflatten(0, input_ids.shape[:2])
        return MeterRetrievalOutput(loss, logits, match)
