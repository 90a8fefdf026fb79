"""Tiny models that take images apart in their own ways, with processors, and small pictures with questions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tiny_models import save, word_tokenizer
from torch import nn

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "grey": (128, 128, 128)}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PICTURE, PATCH = 16, 4
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %} {{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}"
)


def draw_talks(folder: Path, count: int = 96) -> Path:
    """`talks.json` in LLaVA's format, each about a picture of one colour, wide, high or square; and the pictures."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    records = []
    for i in range(count):
        colour, size = list(COLOURS)[i % 4], ((32, 16), (16, 32), (16, 16))[i % 3]
        shade = tuple(max(1, value - i // 4) for value in COLOURS[colour])
        Image.new("RGB", size, shade).save(folder / "images" / f"{i}.png")
        talk = [("human", "<image>\nwhat colour is it ?"), ("gpt", colour)]
        turns = [{"from": who, "value": what} for who, what in talk]
        records.append({"id": str(i), "image": f"{i}.png", "answer_type": "OPEN", "conversations": turns})
    (folder / "talks.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "talks.json"


def _tokenizer(special: Iterable[str]) -> Any:
    tokenizer = word_tokenizer([" ".join([*COLOURS, "what colour is it ?"])], readable=256)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def idefics3_processor(kind: str = "Idefics3") -> Any:
    """Cuts a picture into squares of 16 pixels, 4 tokens each. `SmolVLM` needs torchvision and num2words."""
    import transformers
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    parts = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tokenizer = _tokenizer(["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *parts])
    sizes = {"max_image_size": {"longest_edge": PICTURE}, "size": {"longest_edge": 2 * PICTURE}}
    options = {"image_seq_len": 4, "chat_template": TEMPLATE.replace("IMAGE", "<image>")}
    if kind == "Idefics3":
        return Idefics3Processor(Idefics3ImageProcessorPil(**sizes), tokenizer, **options)
    return transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**sizes), tokenizer, transformers.SmolVLMVideoProcessor(**sizes), **options
    )


def save_idefics3(folder: Path, layers: int = 4, kind: str = "Idefics3") -> Path:
    """An Idefics3 (the architecture of the first SmolVLM) or, by `kind`, a SmolVLM of width 32."""
    import transformers

    processor = idefics3_processor(kind)
    config = getattr(transformers, f"{kind}Config")(
        text_config={"model_type": "llama", **TEXT, "num_hidden_layers": layers, **_words(processor.tokenizer)},
        vision_config={**VISION, "image_size": PICTURE, "patch_size": PATCH},
        scale_factor=2,
        image_token_id=processor.image_token_id,
        **_ends(processor.tokenizer),
    )
    return save(_seeded(getattr(transformers, f"{kind}ForConditionalGeneration"), config), processor, folder)


def qwen2_vl_processor() -> Any:
    """Flattens a picture into patches of 4 pixels, four of which become a token. Needs torchvision."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = _tokenizer(QWEN)
    sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 64, "max_pixels": 1024}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes),
        tokenizer,
        Qwen2VLVideoProcessor(**sizes),
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


def qwen2_vl(tokenizer: Any, layers: int = 4) -> Any:
    """A Qwen2-VL of width 32 for a tokenizer that knows its special tokens."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    ids = dict(zip(("start", "end", "image", "video"), tokenizer.convert_tokens_to_ids(list(QWEN)), strict=True))
    config = Qwen2VLConfig(
        text_config={
            **TEXT,
            "num_hidden_layers": layers,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            **_words(tokenizer),
        },
        vision_config={
            "embed_dim": 24,
            "hidden_size": TEXT["hidden_size"],
            "depth": 2,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        vision_start_token_id=ids["start"],
        vision_end_token_id=ids["end"],
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        **_ends(tokenizer),
    )
    return _seeded(Qwen2VLForConditionalGeneration, config)


def save_qwen2_vl(folder: Path, layers: int = 4) -> Path:
    """See `qwen2_vl`."""
    processor = qwen2_vl_processor()
    return save(qwen2_vl(processor.tokenizer, layers), processor, folder)


def _words(tokenizer: Any) -> dict[str, int]:
    return {"vocab_size": len(tokenizer), "max_position_embeddings": 256, **_ends(tokenizer)}


def _ends(tokenizer: Any) -> dict[str, int]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}


def _seeded(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(config)
