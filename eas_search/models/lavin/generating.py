"""LaVIN with its output layer: logits, loss, `generate`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from eas_search.models.lavin.configuration import LavinConfig
from eas_search.models.lavin.masking import modality_mask
from eas_search.models.lavin.modeling import LavinModel, LavinPreTrainedModel


class LavinForConditionalGeneration(LavinPreTrainedModel, GenerationMixin):
    """LaVIN with its output layer: logits, loss, `generate`."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: LavinConfig) -> None:
        super().__init__(config)
        self.model = LavinModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @property
    def trained_with_adapters(self) -> tuple[str, ...]:
        """Names of the parameters that LaVIN trains together with its adapters."""
        parts = ("model.projector.", "model.modality_embedding.")
        return tuple(name for name, _ in self.named_parameters() if name.startswith(parts))

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, n, V], and the loss where `labels` [B, n] are given (-100: no label).

        Args:
            input_ids: [B, n] with placeholders, as `LavinProcessor` makes them.
            pixel_values: [I, 3, H, W], an image for each of the I rows that have one, in their order.
            attention_mask: [B, past + n], 1 for real tokens; None: all.
            labels: [B, n], see above.
            logits_to_keep: number of last positions whose logits are wanted, 0 for all, or their indexes.
            kwargs: `position_ids`, `past_key_values`, `inputs_embeds`, `use_cache`, … as in `transformers`.
        """
        outputs = self.model(input_ids, pixel_values, attention_mask, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        rows = outputs.last_hidden_state[:, kept]
        # As a matrix: torch multiplies a strided slice as a batch, for which it copies the head's weight in bfloat16.
        logits = self.lm_head(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(self, *args: Any, pixel_values: Tensor | None = None, **kwargs: Any) -> Any:
        """Images go in with the prompt; later passes find them in the cache, or see the prompt again without one."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        first = kwargs.get("is_first_iteration", False) or not kwargs.get("use_cache", True)
        inputs["pixel_values"] = pixel_values if first else None
        return inputs

    @staticmethod
    def create_masks_for_generate(
        config: LavinConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        """The mask that `generate` makes in advance for static caches."""
        return modality_mask(config.get_text_config(), inputs_embeds, attention_mask, past_key_values)


AutoModelForImageTextToText.register(LavinConfig, LavinForConditionalGeneration, exist_ok=True)
