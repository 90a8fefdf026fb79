"""Retrieval: recall over all pairs and ranking within pools, against sorting by hand."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eas_search.tasks.flickr30k import pooled
from eas_search.tasks.retrieval import pool_ranking, recalls, score_matrix


def by_sorting(scores: list[list[float]], image_of_text: list[int], k: int) -> tuple[float, float]:
    """(text R@k, image R@k): sort the candidates, wrong ones first among equals."""
    images, texts = range(len(scores)), range(len(image_of_text))

    def value(i: int, t: int) -> float:
        return -math.inf if math.isnan(scores[i][t]) else scores[i][t]

    def hit(order: list[tuple[float, bool]]) -> bool:
        return any(right for _, right in sorted(order, key=lambda pair: (-pair[0], pair[1]))[:k])

    text = [hit([(value(i, t), image_of_text[t] == i) for t in texts]) for i in images]
    image = [hit([(value(i, t), image_of_text[t] == i) for i in images]) for t in texts]
    return sum(text) / len(text), sum(image) / len(image)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([1, 2, 5, 10]))
def test_recall_is_that_of_sorted_lists(images: int, captions: int, seed: int, k: int) -> None:
    draw = random.Random(seed)
    image_of_text = [i for i in range(images) for _ in range(draw.randint(1, captions))]
    draw.shuffle(image_of_text)
    values = [0.0, 1.0, 2.0, 3.0, math.nan, math.inf, -math.inf]  # many ties
    scores = [[draw.choice(values) for _ in image_of_text] for _ in range(images)]
    found = recalls(torch.tensor(scores), image_of_text, ranks=(k,))
    assert (found[f"text R@{k}"], found[f"image R@{k}"]) == pytest.approx(by_sorting(scores, image_of_text, k))


def test_recall_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.2, 0.8, 0.1], [0.3, 0.1, 0.7, 0.6]])
    found = recalls(scores, [0, 0, 1, 1], ranks=(1, 2))
    # Image 0 likes its first text best; image 1 its own two. Text 1 prefers image 0 (right), text 2 image 0 (wrong).
    assert found == {"text R@1": 1.0, "text R@2": 1.0, "image R@1": 0.75, "image R@2": 1.0}
    assert recalls(torch.zeros(3, 3), [0, 1, 2], ranks=(1, 2, 3)) == {
        **{"text R@1": 0.0, "text R@2": 0.0, "text R@3": 1.0},
        **{"image R@1": 0.0, "image R@2": 0.0, "image R@3": 1.0},
    }


class Nearness(nn.Module):
    """Scores a pair by how near the text's first token is to the image's first value."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Any, pixel_values: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        from types import SimpleNamespace

        image = pixel_values[:, 0, 0, 0]
        if input_ids.dim() == 3:
            return SimpleNamespace(logits=-(input_ids[:, :, 0] - image.unsqueeze(1)).abs())
        return SimpleNamespace(logits=-(input_ids[:, 0] - image).abs().unsqueeze(1))


def test_the_matrix_holds_the_score_of_every_pair() -> None:
    texts = {"input_ids": torch.tensor([[1, 0], [5, 0], [3, 0]]), "attention_mask": torch.ones(3, 2)}
    images = torch.tensor([4.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    assert score_matrix(Nearness(), texts, images, batch_size=2).tolist() == [[-3, -1, -1], [0, -4, -2]]


@pytest.mark.parametrize("direction", ["both", "text", "image"])
def test_pool_ranking_is_ranking_by_hand(direction: Any) -> None:
    draw = random.Random(3)
    table = torch.tensor([draw.uniform(0, 9) for _ in range(12)]).view(12, 1, 1, 1).expand(12, 3, 2, 2)
    ids = torch.tensor([[[draw.randint(0, 9)] for _ in range(3)] for _ in range(250)])
    pool = torch.tensor([draw.sample(range(12), 3) for _ in range(250)])
    labels = torch.tensor([draw.randrange(3) for _ in range(250)])
    inputs = {"input_ids": ids, "labels": labels, "pixel_values": table[pool[torch.arange(250), labels]]}
    expected = []
    for row in range(250):
        right, own = int(labels[row]), float(table[pool[row, labels[row]], 0, 0, 0])
        text = [-abs(int(ids[row, c, 0]) - own) for c in range(3)]
        image = [-abs(int(ids[row, right, 0]) - float(table[p, 0, 0, 0])) for p in pool[row].tolist()]
        hits = [values.index(max(values)) == right for values in (text, image)]
        expected.append({"both": sum(hits) / 2, "text": float(hits[0]), "image": float(hits[1])}[direction])
    found = pool_ranking("pool R@1", table, direction).score(Nearness(), inputs, {"pictures": pool})
    assert found.double().tolist() == expected
    assert 0.2 < sum(expected) / 250 < 0.9


def test_pools_hold_different_images_and_the_own_one_at_one_place() -> None:
    images = [(Path(f"{i}.jpg"), (f"first {i}", f"second {i}", *([f"third {i}"] * (i < 3)))) for i in range(10)]
    images[7] = (Path("7.jpg"), ("first 2", "second 7"))  # word for word another image's
    examples = list(pooled(images, 4))
    assert [e.answer for e in examples[:9]] == [f"first {i}" for i in (0, 1, 2, 3, 4, 5, 6, 8, 9)]
    assert [e.answer for e in examples[9:]] == [f"second {i}" for i in range(10)]  # three third ones fill no pool
    for example in examples:
        place = example.choices.index(example.answer)
        assert example.others[place] == example.image
        assert len(set(example.others)) == len(set(example.choices)) == 4
    assert examples[8].choices == ("first 9", "first 0", "first 1", "first 2")
    assert examples[0].choices == examples[3].choices == tuple(f"first {i}" for i in range(4))
