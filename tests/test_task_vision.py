"""Processors that give an image several rows or cut it into several: samples stay apart, batches are put together."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from task_contract import TaskContract
from tiny_vision import QWEN, draw_talks, idefics3_processor, qwen2_vl, save_idefics3
from torch import Tensor

from eas_search.exceptions import TaskDataError
from eas_search.models.calling import step_positions
from eas_search.models.loading import load_model
from eas_search.tasks import Example, get_task
from eas_search.tasks.encoding import EncodedSplit, joined
from eas_search.training import FineTuneConfig, fine_tune, sample_scores


class FlatPatches:
    """A processor as Qwen2-VL's, which itself needs torchvision: the library's own patches and grid, and its keys."""

    chat_template = None
    image_token = QWEN[2]

    def __init__(self) -> None:
        from tiny_models import word_tokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer = word_tokenizer(["red green blue grey what colour is it ?"], readable=256)
        self.tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN)})
        self.image_processor = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024
        )

    def __call__(self, text: list[str], images: list[Any] | None = None, **options: Any) -> dict[str, Tensor]:
        pictures: dict[str, Tensor] = {}
        if images is not None:
            pictures = dict(self.image_processor(images=images, return_tensors="pt"))
            counts = (pictures["image_grid_thw"].prod(dim=1) // 4).tolist()
            text = [t.replace(QWEN[2], QWEN[2] * n) for t, n in zip(text, counts, strict=True)]
        output = dict(self.tokenizer(text, **options))
        image = self.tokenizer.convert_tokens_to_ids(QWEN[2])
        return {**output, "mm_token_type_ids": (output["input_ids"] == image).long(), **pictures}


@cache
def flat_patches() -> FlatPatches:
    return FlatPatches()


@cache
def cut_up() -> Any:
    return idefics3_processor()


class TestVqaWithPatches(TaskContract):
    name = "vqa"

    def make_data(self, folder: Path) -> Path:
        return draw_talks(folder / "talks", 40)

    def make_processor(self) -> Any:
        return flat_patches()

    def spoil(self, data: Path) -> None:
        for path in (data.parent / "images").iterdir():
            path.write_text("no picture", encoding="utf-8")


class TestVqaWithCutImages(TestVqaWithPatches):
    def make_processor(self) -> Any:
        return cut_up()


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_talks(tmp_path_factory.mktemp("talks") / "data", 60)


@pytest.fixture(params=["patches", "cut"])
def tower(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """(model, its processor)."""
    if request.param == "patches":
        return qwen2_vl(flat_patches().tokenizer, layers=2).eval(), flat_patches()
    return load_model(str(save_idefics3(tmp_path / "model", layers=2)))


def encoded(processor: Any, talks: Path, count: int = 12) -> EncodedSplit:
    task = get_task("vqa", talks)
    return task.encode(processor, task.examples("train", count))


@torch.no_grad()
def test_a_batch_answers_like_its_samples_alone_and_like_the_processor_itself(
    tower: tuple[Any, Any], talks: Path
) -> None:
    model, processor = tower
    task = get_task("vqa", talks)
    examples = task.examples("train", 7)
    split = task.encode(processor, examples)
    (batch,) = split.batches(7)
    together = model(**batch).logits
    for row, example in enumerate(examples):
        text = task.format_prompt(processor, example)  # type: ignore[attr-defined]
        inputs = processor(
            text=[f"{text} {example.answer} </s>"], images=[Image.open(example.image)], return_tensors="pt"
        )
        alone = model(**inputs).logits[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)


def test_shuffled_batches_and_subsets_keep_every_image_with_its_text(tower: tuple[Any, Any], talks: Path) -> None:
    model, processor = tower
    split = encoded(processor, talks)
    assert split.ragged
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in split.batches(1)]
        order = torch.randperm(12, generator=torch.Generator().manual_seed(5)).tolist()
        shuffled = split.batches(1, torch.Generator().manual_seed(5))
        assert [model(**batch).loss.item() for batch in shuffled] == pytest.approx([losses[i] for i in order])
        few = [model(**batch).loss.item() for batch in split.subset(5).batches(1)]
    assert few == pytest.approx(losses[:5])
    assert len({round(loss, 3) for loss in losses}) > 4


def test_colours_are_learnt_through_the_images_and_generated_from_prompts(tower: tuple[Any, Any], talks: Path) -> None:
    model, processor = tower
    split = encoded(processor, talks, 40)
    assert sample_scores(model, split).double().mean() < 0.5
    fine_tune(model.requires_grad_(True), split, FineTuneConfig(steps=50, learning_rate=1e-2, batch_size=20), seed=0)
    assert sample_scores(model, split).double().mean() > 0.9
    prompts = split.prompts(12)
    assert next(iter(prompts)) == "input_ids"  # a batch's size is read off its first tensor
    made = model.generate(**prompts, max_new_tokens=1, do_sample=False)[:, -1]
    wanted = torch.stack([row[row != -100][0] for row in split.tensors["labels"][:12]])
    assert (made == wanted).double().mean() > 0.9


def test_texts_stand_among_pictures(tower: tuple[Any, Any], talks: Path) -> None:
    model, processor = tower
    task = get_task("vqa", talks)
    pictured = task.examples("train", 2)
    split = task.encode(processor, [pictured[0], Example(None, "what is red ?", "red", "text"), pictured[1]])
    (whole,), parts = split.batches(3), list(split.batches(1))
    assert "pixel_values" in parts[0]
    assert not {"pixel_values", "image_grid_thw", "pixel_attention_mask"} & set(parts[1])
    with torch.no_grad():
        together = model(**whole).logits
        for row, part in enumerate(parts):
            alone = model(**part).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)
    assert len(split.prompts(3)["input_ids"]) == 2


def test_what_a_token_stands_for_moves_with_it(talks: Path) -> None:
    split = encoded(flat_patches(), talks)
    image = flat_patches().tokenizer.convert_tokens_to_ids(QWEN[2])
    for tensors in (split.tensors, next(split.batches(4)), split.prompts(12)):
        assert torch.equal(tensors["mm_token_type_ids"] == 1, tensors["input_ids"] == image)
    assert split.prompts(12)["mm_token_type_ids"][:, -1].eq(0).all()


def test_pieces_are_joined_with_zeros_where_they_are_smaller() -> None:
    whole = joined([torch.ones(1, 2, 3), torch.full((2, 1, 4), 2.0)])
    assert whole.tolist() == [
        [[1, 1, 1, 0], [1, 1, 1, 0]],
        [[2, 2, 2, 2], [0, 0, 0, 0]],
        [[2, 2, 2, 2], [0, 0, 0, 0]],
    ]


def test_what_no_answer_can_follow_is_refused_in_one_line(talks: Path) -> None:
    class CrossMasked(FlatPatches):
        def __call__(self, *args: Any, **options: Any) -> dict[str, Tensor]:
            output = super().__call__(*args, **options)
            return {**output, "cross_attention_mask": torch.ones(*output["input_ids"].shape, 1, 4)}

    with pytest.raises(TaskDataError, match="'cross_attention_mask' has a value for every token") as caught:
        encoded(CrossMasked(), talks)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["SmolVLM", "Qwen2VL"])
def test_processors_that_need_torchvision(kind: str, talks: Path, tmp_path: Path) -> None:
    for package in ("torchvision", "num2words"):
        pytest.importorskip(package)
    from tiny_vision import save_qwen2_vl

    folder = save_qwen2_vl(tmp_path) if kind == "Qwen2VL" else save_idefics3(tmp_path, kind=kind)
    model, processor = load_model(str(folder))
    split = encoded(processor, talks, 40)
    fine_tune(model.requires_grad_(True), split, FineTuneConfig(steps=50, learning_rate=1e-2, batch_size=20), seed=0)
    assert sample_scores(model, split).double().mean() > 0.9


@torch.no_grad()
def test_a_step_on_the_cache_continues_where_the_pictures_positions_end(talks: Path) -> None:
    """Qwen2-VL counts a picture as fewer positions than tokens: a step must answer as the whole sequence does."""
    model = qwen2_vl(flat_patches().tokenizer, layers=2).eval()
    prompts = encoded(flat_patches(), talks).prompts(8)
    assert prompts["attention_mask"].min() == 0
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    more, one = torch.arange(3, 11).unsqueeze(1), torch.ones(8, 1, dtype=torch.long)
    kinds = torch.cat([prompts["mm_token_type_ids"], 0 * one], dim=1)
    longer = {"input_ids": torch.cat([ids, more], dim=1), "attention_mask": torch.cat([mask, one], dim=1)}
    whole = model(**{**prompts, **longer, "mm_token_type_ids": kinds}).logits[:, -1]
    cache = model(**prompts, use_cache=True).past_key_values
    positions = step_positions(model, longer["attention_mask"])
    step = model(input_ids=more, attention_mask=longer["attention_mask"], past_key_values=cache, **positions)
    torch.testing.assert_close(step.logits[:, -1], whole, rtol=1e-4, atol=1e-5)
    assert step_positions(torch.nn.Linear(1, 1), mask) == {}
