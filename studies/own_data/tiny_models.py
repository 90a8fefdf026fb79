"""Tiny models in the Hugging Face layout, with tokenizers trained on the spot: everything a search needs, offline."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>")


def word_tokenizer(texts: Iterable[str], pair: bool = False, size: int = 400, readable: int = 96) -> Any:
    """A word-level tokenizer of the `size` most frequent words; `pair` gives it BERT's [CLS] a [SEP] b [SEP]."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import WordLevelTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if pair:
        tokenizer.normalizer = Lowercase()
    tokenizer.train_from_iterator(texts, WordLevelTrainer(vocab_size=size, special_tokens=list(SPECIAL)))
    if pair:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=readable,
    )


def save(model: nn.Module, processor: Any, folder: Path) -> Path:
    """The model and its processor in one folder."""
    model.save_pretrained(folder)  # type: ignore[operator]
    processor.save_pretrained(folder)
    return folder


def save_llama(folder: Path, texts: Iterable[str], layers: int = 4) -> Path:
    """A Llama of width 32 that decodes words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer(texts)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return save(LlamaForCausalLM(config), tokenizer, folder)


def save_vit(folder: Path, labels: Iterable[str] | None = None, layers: int = 4) -> Path:
    """A ViT of width 32 for pictures of 16×16 pixels; None for `labels` leaves the head out of the checkpoint."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    names = dict(enumerate(labels or ()))
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        **({"id2label": names, "label2id": {name: i for i, name in names.items()}} if names else {}),
    )
    model = ViTForImageClassification(config) if names else ViTModel(config, add_pooling_layer=False)
    return save(model, ViTImageProcessor(size={"height": 16, "width": 16}), folder)


def save_bert(folder: Path, texts: Iterable[str], layers: int = 4) -> Path:
    """A BERT of width 32, without any head in its checkpoint."""
    from transformers import BertConfig, BertModel

    tokenizer = word_tokenizer(texts, pair=True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=96,
        pad_token_id=tokenizer.pad_token_id,
    )
    return save(BertModel(config), tokenizer, folder)


def draw_digits(folder: Path, count: int = 120) -> Path:
    """Pictures of handwritten digits, a folder per digit."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for i in range(count):
        place = folder / str(bunch.target[i])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(bunch.images[i] * 15)).save(place / f"{i}.png")
    return folder
