"""METER written out on a state dict with the published names, from the formulas of the papers and with no module.

CLIP's blocks are pre-norm with QuickGELU, RoBERTa's and METER's post-norm with GELU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
HEAD = 8  # width of an attention head
PATCH, SIDE, VISION, TEXT, FUSION, WORDS = 4, 3, 24, 16, 32, 60


def official_checkpoint(seed: int = 0, layers: int = 2) -> State:
    """A pretrained METER of width 32 with the published names, for images of 12×12 pixels."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def put(name: str, *shape: int, std: float | None = None) -> None:
        state[name] = torch.randn(shape, generator=generator) * (std or shape[-1] ** -0.5)

    def line(name: str, inside: int, outside: int) -> None:
        put(f"{name}.weight", outside, inside)
        put(f"{name}.bias", outside, std=0.2)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        put(f"{name}.bias", width, std=0.2)

    def attention(name: str, d: int) -> None:
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            line(f"{name}.{part}", d, d)
        norm(f"{name}.output.LayerNorm", d)

    def feed_forward(name: str, d: int) -> None:
        line(f"{name}.intermediate.dense", d, 2 * d)
        line(f"{name}.output.dense", 2 * d, d)
        norm(f"{name}.output.LayerNorm", d)

    vit = "vit_model.visual"
    put(f"{vit}.class_embedding", VISION, std=0.5)
    put(f"{vit}.conv1.weight", VISION, 3, PATCH, PATCH, std=0.2)
    put(f"{vit}.positional_embedding", 1 + SIDE**2, VISION, std=0.5)
    norm(f"{vit}.ln_pre", VISION)
    norm(f"{vit}.ln_post", VISION)
    put(f"{vit}.proj", VISION, TEXT)
    for i in range(layers):
        block = f"{vit}.transformer.resblocks.{i}"
        put(f"{block}.attn.in_proj_weight", 3 * VISION, VISION)
        put(f"{block}.attn.in_proj_bias", 3 * VISION, std=0.2)
        line(f"{block}.attn.out_proj", VISION, VISION)
        line(f"{block}.mlp.c_fc", VISION, 2 * VISION)
        line(f"{block}.mlp.c_proj", 2 * VISION, VISION)
        norm(f"{block}.ln_1", VISION)
        norm(f"{block}.ln_2", VISION)
    for name, rows in (("word", WORDS), ("position", 34), ("token_type", 1)):
        put(f"text_transformer.embeddings.{name}_embeddings.weight", rows, TEXT, std=0.5)
    norm("text_transformer.embeddings.LayerNorm", TEXT)
    state["text_transformer.embeddings.position_ids"] = torch.arange(34).unsqueeze(0)
    for i in range(layers):
        attention(f"text_transformer.encoder.layer.{i}.attention", TEXT)
        feed_forward(f"text_transformer.encoder.layer.{i}", TEXT)
    line("text_transformer.pooler.dense", TEXT, TEXT)
    line("cross_modal_text_transform", TEXT, FUSION)
    line("cross_modal_image_transform", VISION, FUSION)
    put("token_type_embeddings.weight", 2, FUSION, std=0.5)
    for stream in ("text", "image"):
        for i in range(layers):
            layer = f"cross_modal_{stream}_layers.{i}"
            attention(f"{layer}.attention", FUSION)
            attention(f"{layer}.crossattention", FUSION)
            feed_forward(layer, FUSION)
        line(f"cross_modal_{stream}_pooler.dense", FUSION, FUSION)
    line("mlm_score.transform.dense", FUSION, FUSION)
    line("itm_score.fc", 2 * FUSION, 2)
    return state


def answers(name: str, images: int, labels: int, seed: int = 1) -> State:
    """A fine-tuned head: `vqa_classifier` or `nlvr2_classifier`."""
    generator, width = torch.Generator().manual_seed(seed), 2 * FUSION
    shapes = {"0": (width, images * width), "1": (width,), "3": (labels, width)}
    state = {f"{name}.{i}.weight": torch.randn(shape, generator=generator) / 6 for i, shape in shapes.items()}
    return state | {f"{name}.{i}.bias": torch.randn(s[0], generator=generator) / 6 for i, s in shapes.items()}


def _line(s: State, name: str, x: Tensor) -> Tensor:
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def _norm(s: State, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return scaled * s[f"{name}.weight"] + s[f"{name}.bias"]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (t.unflatten(-1, (-1, HEAD)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD)
    if mask is not None:
        scores = scores.masked_fill(~mask.bool()[:, None, None, :], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _attention(s: State, name: str, x: Tensor, seen: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    q, k, v = (_line(s, f"{name}.self.{part}", t) for part, t in (("query", x), ("key", seen), ("value", seen)))
    return _norm(s, f"{name}.output.LayerNorm", x + _line(s, f"{name}.output.dense", _attend(q, k, v, mask)), eps)


def _feed_forward(s: State, name: str, x: Tensor, eps: float) -> Tensor:
    hidden = F.gelu(_line(s, f"{name}.intermediate.dense", x))
    return _norm(s, f"{name}.output.LayerNorm", x + _line(s, f"{name}.output.dense", hidden), eps)


def _layers(s: State, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in s if name.startswith(prefix)})


def images(s: State, pixels: Tensor) -> Tensor:
    """Patches and class token of CLIP's vision transformer after `ln_post`, [B, 1 + s², d]."""
    vit = "vit_model.visual"
    patches = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ s[f"{vit}.conv1.weight"].flatten(1).T
    x = torch.cat([s[f"{vit}.class_embedding"].expand(len(x), 1, -1), x], dim=1) + s[f"{vit}.positional_embedding"]
    x = _norm(s, f"{vit}.ln_pre", x, 1e-5)
    for i in range(_layers(s, f"{vit}.transformer.resblocks.")):
        block = f"{vit}.transformer.resblocks.{i}"
        normed = _norm(s, f"{block}.ln_1", x, 1e-5)
        q, k, v = (normed @ s[f"{block}.attn.in_proj_weight"].T + s[f"{block}.attn.in_proj_bias"]).chunk(3, dim=-1)
        x = x + _line(s, f"{block}.attn.out_proj", _attend(q, k, v, None))
        hidden = _line(s, f"{block}.mlp.c_fc", _norm(s, f"{block}.ln_2", x, 1e-5))
        x = x + _line(s, f"{block}.mlp.c_proj", hidden * torch.sigmoid(1.702 * hidden))
    return _norm(s, f"{vit}.ln_post", x, 1e-5)


def texts(s: State, ids: Tensor, mask: Tensor) -> Tensor:
    """RoBERTa's last hidden states; its positions begin at 2, after the padding token's 1."""
    name = "text_transformer.embeddings"
    positions = torch.where(ids != 1, (ids != 1).cumsum(1) + 1, torch.ones_like(ids))
    x = s[f"{name}.word_embeddings.weight"][ids] + s[f"{name}.position_embeddings.weight"][positions]
    x = _norm(s, f"{name}.LayerNorm", x + s[f"{name}.token_type_embeddings.weight"][0], 1e-5)
    for i in range(_layers(s, "text_transformer.encoder.layer.")):
        layer = f"text_transformer.encoder.layer.{i}"
        x = _feed_forward(s, layer, _attention(s, f"{layer}.attention", x, x, mask, 1e-5), 1e-5)
    return x


def pooled(s: State, ids: Tensor, mask: Tensor, pixels: Tensor, image_type: int = 1) -> Tensor:
    """The class features of one text and one image each, [B, 2d]."""
    types = s["token_type_embeddings.weight"]
    text = _line(s, "cross_modal_text_transform", texts(s, ids, mask)) + types[0]
    image = _line(s, "cross_modal_image_transform", images(s, pixels)) + types[image_type]
    for i in range(_layers(s, "cross_modal_text_layers.")):
        streams = {"text": (text, image, mask, None), "image": (image, text, None, mask)}
        after = {}
        for stream, (x, other, own_mask, other_mask) in streams.items():
            layer = f"cross_modal_{stream}_layers.{i}"
            h = _attention(s, f"{layer}.attention", x, x, own_mask, 1e-12)
            h = _attention(s, f"{layer}.crossattention", h, other, other_mask, 1e-12)
            after[stream] = _feed_forward(s, layer, h, 1e-12)
        text, image = after["text"], after["image"]
    first = {"text": text[:, 0], "image": image[:, 0]}
    return torch.cat([torch.tanh(_line(s, f"cross_modal_{n}_pooler.dense", x)) for n, x in first.items()], dim=-1)


def classified(s: State, name: str, features: Tensor) -> Tensor:
    """Logits of a fine-tuned head: linear, norm, GELU, linear."""
    hidden = F.gelu(_norm(s, f"{name}.1", _line(s, f"{name}.0", features), 1e-5))
    return _line(s, f"{name}.3", hidden)
