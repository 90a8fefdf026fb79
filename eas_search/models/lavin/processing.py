"""From texts and images to the inputs of LaVIN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoProcessor, BatchFeature
from transformers.processing_utils import ProcessorMixin

from eas_search.exceptions import ConfigError
from eas_search.models.lavin.configuration import LavinConfig

TEXT_TOKEN, IMAGE_SAMPLE_TOKEN, IMAGE_TOKEN = "<modality:text>", "<modality:image>", "<image>"
PLACEHOLDERS = (TEXT_TOKEN, IMAGE_SAMPLE_TOKEN, IMAGE_TOKEN)
PREFIX_WITH_IMAGE, PREFIX_WITHOUT_IMAGE = "Image: ", "Image: N/A"


def add_placeholders(tokenizer: Any) -> None:
    """Make LaVIN's placeholders known to a tokenizer, and give it a padding token if it has none (the unknown one)."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(PLACEHOLDERS)}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


class LavinProcessor(ProcessorMixin):
    """A tokenizer that knows LaVIN's placeholders, and CLIP's image processor.

    A text becomes [modality, BOS, prefix, K × image, text], cut at `max_length` where one is given. Where in the text
    an `<image>` stands makes no difference: LaVIN sees its image first.

    Args:
        image_processor: of CLIP.
        tokenizer: of the LLaMA, after `add_placeholders`.
        image_seq_length: K, placeholders per image.
        prefix_with_image: what stands before an image.
        prefix_without_image: what stands there in samples without one.
        kwargs: see `ProcessorMixin`.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 6,
        prefix_with_image: str = PREFIX_WITH_IMAGE,
        prefix_without_image: str = PREFIX_WITHOUT_IMAGE,
        **kwargs: Any,
    ) -> None:
        self.image_seq_length = image_seq_length
        self.prefix_with_image, self.prefix_without_image = prefix_with_image, prefix_without_image
        self.image_token = IMAGE_TOKEN
        super().__init__(image_processor, tokenizer, **kwargs)

    def layout(self, ids: Sequence[int], with_image: bool, max_length: int | None = None) -> list[int]:
        """The input of one sample, from its text's token ids without BOS."""
        text_id, image_id, feature_id = self.tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS))
        prefix = self.prefix_with_image if with_image else self.prefix_without_image
        return [
            image_id if with_image else text_id,
            self.tokenizer.bos_token_id,
            *self.tokenizer(prefix, add_special_tokens=False).input_ids,
            *([feature_id] * self.image_seq_length if with_image else ()),
            *ids,
        ][:max_length]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        padding: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` [B, n], and `pixel_values` [I, 3, H, W] where there are images.

        Args:
            images: one for each text, None for a text without; None: no text has one.
            text: one or several.
            padding: as tokenizers take it.
            max_length: inputs are cut there.
            return_tensors: `pt` for tensors.
            kwargs: further arguments of the tokenizer's `pad`, e.g. `padding_side`.

        Raises:
            ConfigError: images and texts do not fit together.
        """
        texts = [text] if isinstance(text, str) else list(text or ())
        pictures = list(images) if isinstance(images, list | tuple) else [images] * (1 if images is not None else 0)
        pictures = pictures or [None] * len(texts)
        if not texts or len(pictures) != len(texts) or any(one.count(IMAGE_TOKEN) > 1 for one in texts):
            raise ConfigError(
                f"{len(pictures)} images for {len(texts)} texts; expected one image, or None, and at most one "
                f"{IMAGE_TOKEN} for each text: LaVIN sees one image at a time"
            )
        rows = []
        for one, picture in zip(texts, pictures, strict=True):
            before, _, after = one.partition(IMAGE_TOKEN)
            ids = self.tokenizer(before + after.lstrip(), add_special_tokens=False).input_ids
            rows.append(self.layout(ids, picture is not None, max_length))
        kwargs.pop("truncation", None)  # it follows from max_length
        if padding == "max_length":
            kwargs["max_length"] = max_length
        inputs = self.tokenizer.pad({"input_ids": rows}, padding=padding, return_tensors=return_tensors, **kwargs)
        found = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        if any(picture is not None for picture in pictures):
            shown = [picture for picture in pictures if picture is not None]
            found["pixel_values"] = self.image_processor(shown, return_tensors=return_tensors)["pixel_values"]
        return BatchFeature(found)


AutoProcessor.register(LavinConfig, LavinProcessor, exist_ok=True)
