"""A fresh, untrained demo model: word-level tokenizer, processor and a small LLaVA."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE, PATCH = 32, 8
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per lower-case word; `<bos>` in front of every text."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *sorted(set(words))))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=128,
        padding_side="right",
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Images are 32×32 already, so all that happens to a pixel is (value / 255 − mean) / std."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE},
        crop_size={"height": IMAGE, "width": IMAGE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def build_model(sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A randomly initialised model; draws from torch's global generator. Embeddings and head are not tied:
    a tied head would push the words that pretraining never shows into one common direction.
    """
    vision = CLIPVisionConfig(
        image_size=IMAGE, patch_size=PATCH, hidden_act="gelu", projection_dim=64, **sizes["vision"]
    )
    tokens = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        initializer_range=0.05,
        tie_word_embeddings=False,
        **sizes["text"],
        **tokens,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE // PATCH) ** 2,
        tie_word_embeddings=False,
        **tokens,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # rows of one typical norm: large against the first sublayers' outputs, as after training
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.2)
        for layer in model.model.language_model.layers:  # attention starts as attention to what is similar
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    model.generation_config.max_new_tokens = 4
    model.generation_config.do_sample = False
    return model
