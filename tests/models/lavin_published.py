"""Tiny LaVIN checkpoints in the published layout, and LaVIN's formulas (golden README) written out in float64."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

DIM, HEADS, LAYERS, FFN, VOCAB, EPS = 32, 4, 3, 48, 100, 1e-5
CLIP_WIDTH, CLIP_LAYERS, PATCH, IMAGE = 64, 8, 14, 28  # one head of 64 channels, as in all published CLIPs
GROUPS, SCALE, TEMPERATURE = 2, 0.5, 5.0
SKIP = (1,)
Weights = dict[str, Tensor]


def draw(shapes: dict[str, tuple[int, ...]], seed: int) -> Weights:
    """Matrices of unit gain, norms around 1, small biases."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            found[name] = values * math.prod(shape[1:]) ** -0.5
        else:
            found[name] = values * 0.1 + float(("norm" in name or ".ln_" in name) and name.endswith("weight"))
    return found


def llama_weights() -> Weights:
    shapes = {"tok_embeddings.weight": (VOCAB, DIM), "norm.weight": (DIM,), "output.weight": (VOCAB, DIM)}
    for i in range(LAYERS):
        shapes |= {f"layers.{i}.attention.w{letter}.weight": (DIM, DIM) for letter in "qkvo"}
        shapes |= {f"layers.{i}.feed_forward.w{k}.weight": (FFN, DIM) for k in (1, 3)}
        shapes[f"layers.{i}.feed_forward.w2.weight"] = (DIM, FFN)
        shapes |= {f"layers.{i}.{norm}.weight": (DIM,) for norm in ("attention_norm", "ffn_norm")}
    return draw(shapes, 1) | {"rope.freqs": torch.ones(DIM // HEADS // 2)}


def clip_weights() -> Weights:
    width, places = CLIP_WIDTH, (IMAGE // PATCH) ** 2 + 1
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": (places, width),
        "proj": (width, 16),
        "conv1.weight": (width, 3, PATCH, PATCH),
        **{f"ln_{end}.{kind}": (width,) for end in ("pre", "post") for kind in ("weight", "bias")},
    }
    for i in range(CLIP_LAYERS):
        block = f"transformer.resblocks.{i}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{block}.attn.out_proj.weight": (width, width), f"{block}.attn.out_proj.bias": (width,)}
        shapes |= {f"{block}.ln_{k}.{kind}": (width,) for k in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"{block}.mlp.c_fc.weight": (4 * width, width), f"{block}.mlp.c_fc.bias": (4 * width,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (width, 4 * width), f"{block}.mlp.c_proj.bias": (width,)}
    return {f"visual.{name}": tensor for name, tensor in draw(shapes, 2).items()}


def adapter_weights() -> Weights:
    shapes: dict[str, tuple[int, ...]] = {
        "adapter_proj.conv_A.weight": (12, CLIP_WIDTH),
        "adapter_proj.conv_A.bias": (12,),
        "adapter_proj.conv_B.weight": (DIM, 12),
        "adapter_proj.conv_B.bias": (DIM,),
        "adapter_modality_embedding.weight": (2, DIM),
    }
    places = {f"layers.{i}.adapter_attn": (DIM, 8, "A") for i in range(LAYERS)}
    places |= {f"layers.{i}.replaced_adapter": (DIM, 16, "AC") for i in range(LAYERS)}
    places |= {
        f"backbone.visual.transformer.resblocks.{i}.adapter_attn": (CLIP_WIDTH, 8, "A") for i in range(CLIP_LAYERS)
    }
    for place, (width, rank, down) in places.items():
        for letter in down:
            shapes |= {f"{place}.conv_{letter}.weight": (rank, width, 1), f"{place}.conv_{letter}.bias": (rank,)}
        for letter in "BD":
            shapes[f"{place}.conv_{letter}.weight"] = (width, rank // GROUPS, 1)
            shapes[f"{place}.conv_{letter}.bias"] = (width,)
        shapes |= {f"{place}.expert_weights.weight": (2, width), f"{place}.expert_weights.bias": (2,)}
    return draw(shapes, 3)


def write_published(folder: Path, shards: int = 1) -> None:
    """LLaMA, CLIP and LaVIN checkpoints; a LLaMA of several files is split as fairscale does."""
    place = folder / "llama" / "7B"
    place.mkdir(parents=True)
    params = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "norm_eps": EPS, "multiple_of": 16, "vocab_size": -1}
    (place / "params.json").write_text(json.dumps(params))
    for k in range(shards):
        part = {}
        for name, tensor in llama_weights().items():
            columns = name.endswith(("wo.weight", "w2.weight")) or name.startswith("tok_")
            whole = tensor.dim() == 1
            part[name] = tensor if whole else tensor.chunk(shards, dim=1 if columns else 0)[k].clone()
        torch.save(part, place / f"consolidated.{k:02d}.pth")
    text = clip_weights() | {"logit_scale": torch.ones(()), "ln_final.weight": torch.ones(4)}
    torch.save(text, folder / "clip.pt")
    options = argparse.Namespace(adapter_scale=SCALE, temperature=TEMPERATURE, llama_model_path="anywhere", epochs=1)
    torch.save({"model": adapter_weights(), "args": options, "epoch": 0}, folder / "checkpoint-0.pth")
    write_tokenizer(folder / "llama")


def write_tokenizer(folder: Path) -> None:
    """`tokenizer.model` with LLaMA's first tokens: <unk> 0, <s> 1, </s> 2."""
    import sentencepiece

    texts = [
        "Image: N/A Question: What is shown? Answer:",
        "Which is brighter, the top or the bottom?",
        "the answer is",
    ]
    (folder / "texts.txt").write_text("\n".join(texts * 4))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texts.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCAB,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=9,
    )


class Reference:
    """LaVIN's training form, with the means over the prompt only."""

    def __init__(self) -> None:
        self.w = {name: tensor.double() for name, tensor in (llama_weights() | clip_weights()).items()}
        self.a = {name: tensor.double() for name, tensor in adapter_weights().items()}

    def adapter(self, place: str, x: Tensor, prompt: int) -> Tensor:
        """x + s Σ w_k (U_k h + u_k); its means look at the first `prompt` tokens."""
        w = {name.removeprefix(f"{place}."): tensor for name, tensor in self.a.items() if name.startswith(place)}
        conv = lambda letter, v: v @ w[f"conv_{letter}.weight"][..., 0].T + w[f"conv_{letter}.bias"]  # noqa: E731
        router = x[1:prompt].mean(0) @ w["expert_weights.weight"].T + w["expert_weights.bias"]
        k = torch.softmax(router / TEMPERATURE, dim=-1)
        pooled = "conv_C.weight" in w
        h = 0.5 * (conv("C", x) + conv("A", x)[:prompt].mean(0)) if pooled else conv("A", x)
        ups = []
        for letter in "BD":
            up = torch.block_diag(*w[f"conv_{letter}.weight"][..., 0].chunk(GROUPS))
            ups.append(h @ up.T + w[f"conv_{letter}.bias"])
        return x + SCALE * (k[0] * ups[0] + k[1] * ups[1])

    def image_embeddings(self, pixels: Tensor, adapters: bool = True) -> Tensor:
        """[3, H, W] → [K, d]."""
        w = {name.removeprefix("visual."): tensor for name, tensor in self.w.items()}
        norm = lambda name, v: F.layer_norm(v, v.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
        patches = F.conv2d(pixels.double()[None], w["conv1.weight"], stride=PATCH)[0].flatten(1).T
        x = norm("ln_pre", torch.cat([w["class_embedding"][None], patches]) + w["positional_embedding"])
        features = []
        for i in range(CLIP_LAYERS):
            block = f"transformer.resblocks.{i}"
            u = norm(f"{block}.ln_1", x)
            u = self.adapter(f"backbone.visual.{block}.adapter_attn", u, len(u)) if adapters else u
            q, k, v = (u @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"]).chunk(3, dim=-1)
            o = torch.softmax(q @ k.T / CLIP_WIDTH**0.5, dim=-1) @ v
            x = x + o @ w[f"{block}.attn.out_proj.weight"].T + w[f"{block}.attn.out_proj.bias"]
            h = norm(f"{block}.ln_2", x) @ w[f"{block}.mlp.c_fc.weight"].T + w[f"{block}.mlp.c_fc.bias"]
            x = x + (h * torch.sigmoid(1.702 * h)) @ w[f"{block}.mlp.c_proj.weight"].T + w[f"{block}.mlp.c_proj.bias"]
            if i % 4 == 3:
                features.append(x[0])
        a = self.a
        joint = lambda k, v: v @ a[f"adapter_proj.conv_{k}.weight"].T + a[f"adapter_proj.conv_{k}.bias"]  # noqa: E731
        return joint("B", F.silu(joint("A", torch.stack(features))))

    def rotate(self, x: Tensor) -> Tensor:
        """[n, heads, d]: adjacent pairs are complex numbers, turned by position · 10000^(−2i/d)."""
        d = x.shape[-1]
        angles = torch.arange(len(x)).double()[:, None] * 10000.0 ** (-torch.arange(0, d, 2).double() / d)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], d // 2, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2)

    def logits(self, tokens: list[Tensor | int], with_image: bool, prompt: int, skip: tuple[int, ...]) -> Tensor:
        """[n, V] for tokens (an image embedding stands for itself) behind the modality token; `prompt` counts it."""
        rows = [t.double() if isinstance(t, Tensor) else self.w["tok_embeddings.weight"][t] for t in tokens]
        x = torch.stack([self.a["adapter_modality_embedding.weight"][int(with_image)], *rows])
        n = len(x)
        mask = torch.full((n, n), -math.inf).double().triu(1)
        mask[1:, 0] = -math.inf
        norm = lambda name, v: v / (v.square().mean(-1, keepdim=True) + EPS).sqrt() * self.w[name]  # noqa: E731
        for i in range(LAYERS):
            layer = f"layers.{i}"
            u = norm(f"{layer}.attention_norm.weight", x)
            if i in skip:
                v = self.w[f"{layer}.ffn_norm.weight"] * self.adapter(f"{layer}.replaced_adapter", u, prompt)
            else:
                u = self.adapter(f"{layer}.adapter_attn", u, prompt)
                q, k, v = ((u @ self.w[f"{layer}.attention.w{letter}.weight"].T).view(n, HEADS, -1) for letter in "qkv")
                scores = torch.einsum("qhd,khd->hqk", self.rotate(q), self.rotate(k)) / (DIM // HEADS) ** 0.5
                o = torch.einsum("hqk,khd->qhd", torch.softmax(scores + mask, dim=-1), v).reshape(n, DIM)
                x = x + o @ self.w[f"{layer}.attention.wo.weight"].T
                v = norm(f"{layer}.ffn_norm.weight", x)
            gate, up = (v @ self.w[f"{layer}.feed_forward.w{k}.weight"].T for k in (1, 3))
            x = x + (F.silu(gate) * up) @ self.w[f"{layer}.feed_forward.w2.weight"].T
        return norm("norm.weight", x) @ self.w["output.weight"].T
