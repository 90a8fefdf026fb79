"""Retrieval of texts for images and of images for texts: recall over all pairs, and ranking within small pools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eas_search.conditions import device_of
from eas_search.tasks.scores import class_match
from eas_search.tasks.scoring import Batch, Scoring, logits_of

RANKS = (1, 5, 10)
Direction = Literal["both", "text", "image"]


def recalls(scores: Tensor, image_of_text: Sequence[int] | Tensor, ranks: Sequence[int] = RANKS) -> dict[str, float]:
    """Recall at every rank in both directions.

    Text retrieval: the share of images of which some text is among the k texts that fit them best. Image retrieval: the
    share of texts whose image is among the k images that fit them best. A wrong candidate with the same score stands
    before the right one, and NaN fits worst, so that a model that tells nothing apart retrieves nothing.

    Args:
        scores: [I, T], how well image and text fit, higher is better.
        image_of_text: [T], row of the image that a text belongs to; every image has at least one text.
        ranks: k.
    """
    scores = scores.double().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    right = torch.as_tensor(image_of_text) == torch.arange(len(scores)).unsqueeze(1)
    found: dict[str, float] = {}
    for name, values, fits in (("text", scores, right), ("image", scores.T, right.T)):
        best = values.masked_fill(~fits, -math.inf).amax(dim=1, keepdim=True)
        before = ((values >= best) & ~fits).sum(dim=1)
        found |= {f"{name} R@{k}": (before < k).double().mean().item() for k in ranks}
    return found


@torch.no_grad()
def score_matrix(model: nn.Module, texts: Batch, images: Tensor, batch_size: int = 64) -> Tensor:
    """[I, T] scores of all pairs of images [I, 3, H, W] and texts [T, n], on the CPU.

    Args:
        model: gives one logit per pair.
        texts: `input_ids`, `attention_mask`, … with one row per text.
        images: as the model's image processor makes them.
        batch_size: texts per forward pass.
    """
    model.eval()
    device = device_of(model)
    rows = []
    for image in images.split(1):
        pixels = image.to(device)
        row = []
        for part in torch.arange(len(texts["input_ids"])).split(batch_size):
            inputs = {name: value[part].to(device) for name, value in texts.items()}
            row.append(logits_of(model, {**inputs, "pixel_values": pixels}).flatten().cpu())
        rows.append(torch.cat(row))
    return torch.stack(rows)


def pool_ranking(metric: str, pictures: Tensor, direction: Direction) -> Scoring:
    """Whether the right candidate of a small pool fits best: 1 or 0, for `both` the mean of the two directions.

    The labels say where in its pool the right one stands. The inputs hold the pool's texts, `input_ids` [B, C, n], and
    the right image; the extras hold the pool's images, `pictures` [B, C], as rows of the table that is given here.
    """

    def score(model: Any, inputs: Batch, extras: Batch) -> Tensor:
        labels, rows = inputs["labels"], torch.arange(len(inputs["labels"]), device=inputs["labels"].device)
        found = []
        if direction != "image":
            found.append(class_match(logits_of(model, inputs), labels))
        if direction != "text":
            own = {n: v[rows, labels] for n, v in inputs.items() if n not in ("labels", "pixel_values")}
            columns = [
                logits_of(model, {**own, "pixel_values": pictures[column.cpu()].to(rows.device)}).flatten()
                for column in extras["pictures"].unbind(1)
            ]
            found.append(class_match(torch.stack(columns, dim=1), labels))
        return found[0] if len(found) == 1 else torch.stack(found).double().mean(dim=0)

    return Scoring(metric, score)
