"""LaVIN as a model of `transformers`: masks, images, batches, generation, saving, and students of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import word_tokenizer
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessor, CLIPVisionConfig, LlamaConfig

import eas_search as eas
from eas_search.exceptions import ConfigError
from eas_search.export import ExportJob, export_student
from eas_search.head import head_names
from eas_search.models.lavin import LavinConfig, LavinForConditionalGeneration, LavinProcessor
from eas_search.models.lavin.processing import add_placeholders
from eas_search.models.loading import load_model
from eas_search.models.options import LoadOptions
from eas_search.training import FineTuneConfig, fine_tune

SIZE = 56  # pixels: 16 patches and a class token
QUESTIONS = ["what is this", "is the left one larger than the right one", "how many are there"]
ROUTED = {"router": "routed", "router_spares_first": True, "identity": "paper", "placement": "ffn", "adapter_dim": 4}


@pytest.fixture(scope="module")
def processor() -> LavinProcessor:
    tokenizer = word_tokenizer([*QUESTIONS, "Image: N/A"])
    add_placeholders(tokenizer)
    size = {"height": SIZE, "width": SIZE}
    pictures = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)
    return LavinProcessor(pictures, tokenizer, image_seq_length=2)


@pytest.fixture(scope="module")
def model(processor: LavinProcessor) -> LavinForConditionalGeneration:
    """Four LLaMA layers, eight CLIP layers; nobody may change it."""
    text_id, image_id, feature_id = processor.tokenizer.convert_tokens_to_ids(
        ["<modality:text>", "<modality:image>", "<image>"]
    )
    config = LavinConfig(
        text_config=LlamaConfig(
            vocab_size=text_id,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=5,
            eos_token_id=6,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=8,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=14,
        ),
        projection_dim=8,
        modality_token_ids=[text_id, image_id],
        image_token_id=feature_id,
    )
    lavin = LavinForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in lavin.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.copy_(values * (0.7 if "embed" in name else scale) + float("norm" in name and "weight" in name))
    return lavin.eval()


def pictures(count: int) -> list[Any]:
    import numpy as np
    from PIL import Image

    values = np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in values]


def batch(processor: LavinProcessor, side: str = "left", shown: tuple[int, ...] = (0, 2)) -> dict[str, Tensor]:
    """The three questions, some of them with a picture."""
    images = [picture if i in shown else None for i, picture in enumerate(pictures(3))]
    return dict(processor(images=images, text=QUESTIONS, padding=True, padding_side=side, return_tensors="pt"))


def single(processor: LavinProcessor, i: int, shown: tuple[int, ...] = (0, 2)) -> dict[str, Tensor]:
    return dict(processor(images=pictures(3)[i] if i in shown else None, text=QUESTIONS[i], return_tensors="pt"))


STUDENTS = {
    "original": None,
    "routed": {"skip": (1, 2), "pia_dim": 8, "adapter_towers": ("text", "vision"), **ROUTED},
    "first layer and vision": {"skip": (0, 3, 5, 9), "pia_dim": 8, **ROUTED},
    "parallel, running mean": {"skip": (0, 2), "pia_dim": 4, "pooling": "prefix"},
}


@pytest.fixture(scope="module", params=STUDENTS)
def any_model(request: pytest.FixtureRequest, model: Any, randomise: Callable[..., Any]) -> Any:
    config = STUDENTS[request.param]
    return model if config is None else randomise(eas.apply_skips(model, eas.SkipConfig(**config)))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batches_answer_like_single_prompts(any_model: Any, processor: LavinProcessor, side: str) -> None:
    inputs = batch(processor, side)
    logits = any_model(**inputs).logits
    for i in range(3):
        alone = any_model(**single(processor, i)).logits[0]
        together = logits[i][inputs["attention_mask"][i].bool()]
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_generation(any_model: Any, processor: LavinProcessor, options: dict[str, Any]) -> None:
    inputs = batch(processor)
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    tokens = any_model.generate(**inputs, **asked, disable_compile=True, **options)[:, -4:]
    for i in range(3):
        assert torch.equal(any_model.generate(**single(processor, i), **asked)[0, -4:], tokens[i])


@torch.no_grad()
def test_decoding_equals_one_pass(any_model: Any, processor: LavinProcessor) -> None:
    inputs, new = batch(processor), torch.tensor([[7, 8, 9], [9, 8, 7], [8, 8, 10]])
    cache = any_model(**inputs, use_cache=True).past_key_values
    mask, found = inputs["attention_mask"], []
    for t in range(3):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        step = any_model(input_ids=new[:, t : t + 1], attention_mask=mask, past_key_values=cache)
        found.append(step.logits[:, 0])
    n = inputs["input_ids"].shape[1]
    labels = torch.full_like(mask, -100)
    labels[:, n:] = new
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], new], dim=1), "attention_mask": mask}
    logits = any_model(**whole, labels=labels, use_cache=False).logits
    torch.testing.assert_close(torch.stack(found, dim=1), logits[:, n:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_nobody_sees_the_modality_token(model: Any, processor: LavinProcessor) -> None:
    inputs = single(processor, 1)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, 0] = model.config.modality_token_ids[1]
    pixels = single(processor, 0)["pixel_values"]  # an image that no placeholder shows
    first, second = model(**inputs).logits, model(**other, pixel_values=pixels).logits
    assert torch.equal(first[:, 1:], second[:, 1:])
    assert not torch.allclose(first[:, 0], second[:, 0])


@torch.no_grad()
def test_an_image_reaches_its_own_sample_only(model: Any, processor: LavinProcessor) -> None:
    inputs = batch(processor)
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][1] += 1.0  # of sample 2
    same = [torch.equal(*pair) for pair in zip(model(**inputs).logits, model(**changed).logits, strict=True)]
    assert same == [True, True, False]


@torch.no_grad()
def test_a_vision_tower_never_pools_over_the_text(model: Any, processor: LavinProcessor, randomise: Any) -> None:
    """Here the text has as many tokens as the image has patches, 17."""
    config = eas.SkipConfig(skip=(5,), pia_dim=4, placement="residual", pooling="prompt")
    student = randomise(eas.apply_skips(model, config))
    images = pictures(2)
    padded = processor(
        images=images, text=QUESTIONS[:2], padding="max_length", max_length=17, padding_side="left", return_tensors="pt"
    )
    assert padded["input_ids"].shape == (2, 17)
    for i in range(2):
        alone = student(**processor(images=images[i], text=QUESTIONS[i], return_tensors="pt")).logits[0, -1]
        torch.testing.assert_close(student(**padded).logits[i, -1], alone, atol=1e-4, rtol=0)


@torch.no_grad()
def test_truncation_keeps_the_first_image_features(model: Any, processor: LavinProcessor) -> None:
    picture = pictures(1)[0]
    whole = processor(images=picture, text=QUESTIONS[0], return_tensors="pt")
    length = int((whole["input_ids"][0] == model.config.image_token_id).nonzero()[0]) + 1  # one of two features
    cut = processor(images=picture, text=QUESTIONS[0], max_length=length, return_tensors="pt")
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, :length])
    torch.testing.assert_close(model(**cut).logits, model(**whole).logits[:, :length], atol=1e-5, rtol=0)


def test_the_layout_of_the_input(processor: LavinProcessor) -> None:
    name = processor.tokenizer.convert_ids_to_tokens
    ids = processor(text=f"<image> {QUESTIONS[0]}", images=pictures(1)).input_ids[0]
    words = ["<modality:image>", "<s>", "Image", ":", "<image>", "<image>", "what", "is", "this"]
    assert name(ids) == words
    ids = processor(text=QUESTIONS[0]).input_ids[0]
    assert name(ids) == ["<modality:text>", "<s>", "Image", ":", "N", "/", "A", "what", "is", "this"]


def test_what_is_refused(model: Any, processor: LavinProcessor) -> None:
    inputs, text = single(processor, 0), single(processor, 1)
    for wrong, message in (
        ({"input_ids": inputs["input_ids"][:, 1:], "pixel_values": inputs["pixel_values"]}, "modality token"),
        ({"input_ids": inputs["input_ids"]}, "no pixel_values"),
        ({**text, "pixel_values": inputs["pixel_values"]}, "1 images"),
        ({}, "exactly one"),
    ):
        with pytest.raises(ConfigError, match=message):
            model(**wrong)
    with pytest.raises(ConfigError, match="expected one image"):
        processor(text=QUESTIONS, images=pictures(2))
    with pytest.raises(ConfigError, match="at most one"):
        processor(text="<image> and <image>", images=pictures(1))


def test_a_vision_tower_without_a_fourth_layer_has_no_features() -> None:
    with pytest.raises(ValueError, match="expected layers from 1 to 3"):
        LavinConfig(vision_config={"num_hidden_layers": 3})


def saved(model: Any, processor: LavinProcessor, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_saving_and_loading(
    model: Any, processor: LavinProcessor, tmp_path: Path, same_model: Callable[..., None]
) -> None:
    folder = saved(model, processor, tmp_path)
    inputs = batch(processor)
    again = AutoModelForImageTextToText.from_pretrained(folder).eval()
    same_model(again, model, **inputs)
    same = AutoProcessor.from_pretrained(folder)
    assert isinstance(same, LavinProcessor)
    assert all(torch.equal(value, inputs[name]) for name, value in batch(same).items())


class Rows:
    """A training split of one batch."""

    def __init__(self, rows: dict[str, Tensor]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return 3

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> list[dict[str, Tensor]]:
        return [self.rows]


def test_a_student_is_trained_exported_and_loaded(model: Any, processor: LavinProcessor, tmp_path: Path) -> None:
    base, _ = load_model(str(saved(model, processor, tmp_path / "base")), LoadOptions(device="cpu"))
    student = eas.apply_skips(base, eas.SkipConfig(**STUDENTS["routed"]))
    inputs = batch(processor, "right")
    labels = inputs["input_ids"].where(inputs["attention_mask"].cumsum(dim=1) > 8, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    config = FineTuneConfig(steps=12, learning_rate=0.02)
    losses = fine_tune(student, Rows({**inputs, "labels": labels}), config, seed=0)
    assert losses[-1] < 0.9 * losses[0]
    before, after = base.state_dict(), student.state_dict()
    assert head_names(base) == model.trained_with_adapters
    assert all(not torch.equal(before[name], after[name]) for name in model.trained_with_adapters)
    assert all(torch.equal(before[name], after[name]) for name in before if name in after and "norm" in name)
    prompts = batch(processor, shown=(0, 1, 2))
    job = ExportJob(student, prompts, processor, about={"base_model": str(tmp_path / "base")}, base=base)
    for kind in ("eas", "adapter"):
        report = export_student(job, tmp_path / kind, kind)
        assert report.generated_equal
        assert report.report.largest < 1e-4
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "eas")
    adapted = eas.load_adapter(base, tmp_path / "adapter")
    with torch.no_grad():
        wanted = student(**prompts).logits
        for one in (loaded, adapted, eas.load_pretrained(tmp_path / "eas")):
            torch.testing.assert_close(one(**prompts).logits, wanted, atol=1e-4, rtol=0)
