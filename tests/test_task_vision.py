"""Processors that give an image several rows or cut it into several: samples stay apart, batches are put together."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
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
from eas_search.tasks.image_files import open_image
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


@cache
def gemma3() -> Any:
    """Gemma 3's processor, which wants a list of pictures per text and marks their tokens; its template writes BOS."""
    from tiny_models import word_tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma3ImageProcessorPil, Gemma3Processor, PreTrainedTokenizerFast

    words = word_tokenizer(["red green blue grey what colour is it ? user model"], readable=256)
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", words.bos_token_id)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        **words.special_tokens_map,
        extra_special_tokens={"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
        model_max_length=256,
    )
    template = (
        "{{ bos_token }}user {% for c in messages[0]['content'] %}{% if c['type'] == 'image' %}<boi>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %} model\n"
    )
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)


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


class TestVqaWithAListPerText(TestVqaWithPatches):
    def make_processor(self) -> Any:
        return gemma3()


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


@torch.no_grad()
def test_gemma_3_gets_what_its_own_chat_gives_it(talks: Path) -> None:
    """One BOS, a list of pictures per text, and the marks that let a picture's tokens see each other."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    processor, task = gemma3(), get_task("vqa", talks)
    tokenizer = processor.tokenizer
    examples = task.examples("train", 5)
    split = task.encode(processor, examples)
    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**text, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 64},
        vision_config={**vision, "image_size": 28, "patch_size": 7},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<img>"),
    )
    model: Any = Gemma3ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.mul_(8 if parameter.dim() > 1 else 1)
    for row, example in enumerate(examples):
        content = [{"type": "image", "image": Image.open(example.image)}, {"type": "text", "text": example.prompt}]  # type: ignore[arg-type]
        chat = [{"role": "user", "content": content}]
        own = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        prompt = split.part(row, row + 1).prompts(1)
        assert sorted(prompt) == sorted(own)
        for name, value in own.items():
            torch.testing.assert_close(prompt[name], value)
        assert (prompt["input_ids"] == tokenizer.bos_token_id).sum() == 1
        assert torch.equal(prompt["token_type_ids"] == 1, prompt["input_ids"] == config.image_token_index)
        with_marks, without = (model(**{**prompt, **more}).logits[0, -1] for more in ({}, {"token_type_ids": None}))
        torch.testing.assert_close(with_marks, model(**own).logits[0, -1])
        assert (with_marks - without).abs().max() > 1e-4  # or the marks would not matter to this test
    (batch,) = split.batches(5)
    assert batch["token_type_ids"].sum(dim=1).tolist() == [4] * 5
    mixed = task.encode(processor, [examples[0], Example(None, "what is red ?", "red", "text")])
    assert mixed.tensors["token_type_ids"].sum(dim=1).tolist() == [4, 0]


def test_what_a_template_begins_with_is_not_begun_twice() -> None:
    tokenizer = gemma3().tokenizer
    question = Example(None, "what is red ?", "red", "all")
    tokenizer.chat_template = "{{ bos_token }}user {{ messages[0]['content'][0]['text'] }}"
    try:
        chat = [{"role": "user", "content": [{"type": "text", "text": question.prompt}]}]
        own = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True).input_ids
        split = get_task("digits-vqa").encode(tokenizer, [question])
        assert split.prompts(1)["input_ids"][0].tolist() == own
    finally:
        tokenizer.chat_template = None
    plain = get_task("digits-vqa").encode(tokenizer, [question])  # nothing but the tokenizer writes BOS here
    assert plain.prompts(1)["input_ids"][0].tolist() == tokenizer(question.prompt).input_ids
    assert plain.tensors["input_ids"][0, 0] == tokenizer.bos_token_id
    said = plain.tensors["labels"][0]
    assert tokenizer.decode(said[said != -100]) == f"red {tokenizer.eos_token}"


def saved(picture: Image.Image, kind: str = "png", **further: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **further)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation: int) -> None:
    """As the EXIF standard defines where the first row and the first column of what is stored belong."""
    upright = np.random.default_rng(0).integers(0, 256, (6, 4, 3)).astype(np.uint8)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    notes = Image.Exif()
    notes[0x112] = orientation
    picture = Image.fromarray(np.ascontiguousarray(stored))
    opened = open_image(saved(picture, exif=notes))
    assert np.array_equal(np.asarray(opened), upright)
    assert opened.mode == "RGB"


def test_damaged_notes_of_a_camera_do_not_matter() -> None:
    content = saved(Image.new("RGB", (3, 2), (9, 8, 7)), exif=b"Exif\0\0no TIFF at all")
    assert np.asarray(open_image(content)).tolist() == [[[9, 8, 7]] * 3] * 2


def test_grey_levels_of_more_than_eight_bits_are_scaled(tmp_path: Path) -> None:
    sixteen = np.array([[0, 128, 129, 257], [1000, 32768, 65406, 65535]], dtype=np.uint16)
    expected = [[0, 0, 1, 1], [4, 128, 254, 255]]  # divided by 257 by hand, to the nearest
    for kind in ("png", "tiff"):
        found = np.asarray(open_image(saved(Image.fromarray(sixteen), kind)))
        assert found[..., 0].tolist() == expected
        assert (found == found[..., :1]).all()
    wide = np.array([[-500, 0], [500, 1500]])
    for values in (wide.astype(np.int32), (wide / 1000).astype(np.float32), (wide * 1e6).astype(np.float32)):
        assert np.asarray(open_image(saved(Image.fromarray(values), "tiff")))[..., 0].tolist() == [[0, 64], [128, 255]]
    broken = np.array([[np.nan, 1.0], [np.inf, 3.0]], dtype=np.float32)
    assert np.asarray(open_image(saved(Image.fromarray(broken), "tiff")))[..., 0].tolist() == [[0, 0], [0, 255]]
    flat = np.full((2, 2), 7, dtype=np.int32)
    assert not np.asarray(open_image(saved(Image.fromarray(flat), "tiff"))).any()


def test_what_is_transparent_shows_white() -> None:
    colour = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    colour.putpixel((1, 0), (200, 100, 0, 255))
    colour.putpixel((2, 0), (0, 0, 0, 51))  # a fifth of black, four of white
    expected = [[[255, 255, 255], [200, 100, 0], [204, 204, 204]]]
    assert np.asarray(open_image(saved(colour))).tolist() == expected
    assert np.asarray(open_image(colour)).tolist() == expected
    assert colour.mode == "RGBA"  # a picture that is handed over stays as it is
    grey = Image.fromarray(np.array([[[0, 0], [50, 255]]], dtype=np.uint8), "LA")
    assert np.asarray(open_image(saved(grey)))[..., 0].tolist() == [[255, 50]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    assert np.asarray(open_image(saved(palette))).tolist() == [[[0, 0, 0], [10, 20, 30]]]
    for kind in ("png", "gif"):
        seen = open_image(saved(palette, kind, transparency=0))
        assert np.asarray(seen).tolist() == [[[255, 255, 255], [10, 20, 30]]]


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
