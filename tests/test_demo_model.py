"""The shipped demo model, the encoding for it, and the agreement of pretraining with what is shipped."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from eas_search.exceptions import TaskDataError
from eas_search.models.demo import demo_path
from eas_search.tasks import Example, get_task
from eas_search.tasks.digits_vqa import PLAIN, PRETRAINING_FAMILIES, DigitsVqa, draw_examples
from eas_search.tasks.encoding import EncodedSplit
from eas_search.tasks.scores import exact_match

STUDY = Path(__file__).parents[1] / "studies" / "pretrain_demo"
EXAMPLES = 256


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(demo_path())


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(demo_path()).eval()


@pytest.fixture(scope="module")
def split(processor: Any) -> EncodedSplit:
    task = get_task("digits-vqa")
    return task.encode(processor, task.examples("test", EXAMPLES))


@pytest.fixture(scope="module")
def batches() -> Iterator[ModuleType]:
    """studies/pretrain_demo/batches.py, which is a script's neighbour and not in a package."""
    spec = importlib.util.spec_from_file_location("pretrain_demo_batches", STUDY / "batches.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def scores(model: Any, split: EncodedSplit) -> torch.Tensor:
    with torch.no_grad():
        parts = []
        for batch in split.batches(64):
            labels = batch.pop("labels")
            parts.append(exact_match(model(**batch).logits, labels))
    return torch.cat(parts)


def test_shipped_folder_is_small_and_in_the_usual_layout(model: Any) -> None:
    files = {path.name: path.stat().st_size for path in demo_path().iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert sum(files.values()) < 12e6
    assert len(model.model.language_model.layers) == 12
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_model_knows_the_plain_wording_but_not_the_shifted_one(model: Any, processor: Any, split: EncodedSplit) -> None:
    plain = DigitsVqa().encode(processor, draw_examples(PRETRAINING_FAMILIES, PLAIN, "validation", EXAMPLES))
    assert scores(model, plain).double().mean() > 0.9
    assert scores(model, split).double().mean() < 0.6


def test_labels_are_the_answer_and_eos(processor: Any, split: EncodedSplit) -> None:
    tokenizer = processor.tokenizer
    for i, example in enumerate(get_task("digits-vqa").examples("test", 16)):
        ids, mask, labels = (split.tensors[k][i] for k in ("input_ids", "attention_mask", "labels"))
        assert tokenizer.decode(labels[labels != -100]).split() == [example.answer, "<eos>"]
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        text = tokenizer.decode(ids[mask.bool()]).replace("<image>", "").split()
        assert text == ["<bos>", *example.prompt.split(), example.answer, "<eos>"]
        assert (ids == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == 16
    assert not (split.tensors["input_ids"] == tokenizer.unk_token_id).any()


def test_prompts_end_with_the_question_on_the_right(processor: Any, split: EncodedSplit) -> None:
    prompts = split.prompts(9)
    assert set(prompts) == {"input_ids", "attention_mask", "pixel_values"}
    assert all(len(value) == 9 for value in prompts.values())
    for i, example in enumerate(get_task("digits-vqa").examples("test", 9)):
        mask = prompts["attention_mask"][i].bool()
        assert mask.diff().sum() <= 1  # one block …
        assert mask[-1]  # … at the right end
        text = processor.tokenizer.decode(prompts["input_ids"][i][mask]).replace("<image>", "").split()
        assert text == ["<bos>", *example.prompt.split()]
        assert (prompts["input_ids"][i][~mask] == processor.tokenizer.pad_token_id).all()
    assert prompts["attention_mask"].all(dim=0).any()
    assert prompts["attention_mask"][:, 0].any()  # no column is padding in every row


def test_batches_pass_once_shuffle_and_trim(split: EncodedSplit) -> None:
    part = split.subset(50)
    rows = list(part.batches(16, torch.Generator().manual_seed(1)))
    assert [len(batch["labels"]) for batch in rows] == [16, 16, 16, 2]
    pixels = torch.cat([batch["pixel_values"] for batch in rows])
    assert not torch.equal(pixels, part.tensors["pixel_values"])
    assert sorted(pixels.sum(dim=(1, 2, 3)).tolist()) == sorted(
        part.tensors["pixel_values"].sum(dim=(1, 2, 3)).tolist()
    )
    again = torch.cat([batch["pixel_values"] for batch in part.batches(16, torch.Generator().manual_seed(1))])
    assert torch.equal(pixels, again)
    shortest = int(part.tensors["attention_mask"].sum(dim=1).argmin())
    only = EncodedSplit({k: v[shortest : shortest + 1] for k, v in part.tensors.items()}, part.groups[:1])
    (batch,) = only.batches(4)
    assert batch["attention_mask"].all()
    assert batch["input_ids"].shape[1] < part.tensors["input_ids"].shape[1]


def test_exact_match_equals_greedy_generation(model: Any, split: EncodedSplit) -> None:
    part = split.subset(96)
    prompts = part.prompts(96)
    made = model.generate(**prompts, max_new_tokens=2, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    wanted = torch.stack([row[row != -100] for row in part.tensors["labels"]])
    generated = (made == wanted).all(dim=1)
    assert generated.any()
    assert not generated.all()
    assert torch.equal(scores(model, part), generated)


def test_exact_match_by_hand() -> None:
    labels = torch.tensor([[-100, 1, 2], [-100, 1, 2], [-100, -100, -100]])
    logits = torch.zeros(3, 3, 4)
    logits[0, 0, 1] = logits[0, 1, 2] = logits[1, 0, 1] = logits[1, 1, 3] = 1.0
    assert exact_match(logits, labels).tolist() == [True, False, False]
    logits[0, 0, 0] = float("nan")
    assert not exact_match(logits, labels)[0]


def test_processor_gives_the_pixels_of_pretraining(processor: Any, batches: ModuleType) -> None:
    examples = get_task("digits-vqa").examples("train", 8)
    raw = np.stack([np.asarray(example.image) for example in examples])
    shipped = processor.image_processor([e.image for e in examples], return_tensors="pt").pixel_values
    torch.testing.assert_close(batches.normalise(raw), shipped, rtol=0, atol=1e-6)


@torch.no_grad()
def test_packed_questions_give_the_logits_of_separate_ones(model: Any, processor: Any, batches: ModuleType) -> None:
    ids = processor.tokenizer.get_vocab()
    packed = batches.draw_packed(ids, batches.PackedShape(2, 3, 11), 0.5, np.random.default_rng(6))
    prefix = torch.tensor([ids["<bos>"], *[ids["<image>"]] * 16])
    position, mask = batches.packed_layout(len(prefix), 3, 11)
    embed = model.get_input_embeddings()
    features = torch.stack(model.get_image_features(packed.pixels).pooler_output)
    start = embed(prefix[:1]).expand(2, 1, -1)
    together = model.model.language_model(
        inputs_embeds=torch.cat([start, features, embed(packed.blocks.flatten(1))], dim=1),
        position_ids=position,
        attention_mask=mask,
        use_cache=False,
    ).last_hidden_state[:, len(prefix) :]
    logits = model.lm_head(together).unflatten(1, (3, 11))
    for image in range(2):
        for k in range(3):
            real = packed.blocks[image, k] != ids["<pad>"]
            alone = torch.cat([prefix, packed.blocks[image, k][real]])[None]
            expected = model(input_ids=alone, pixel_values=packed.pixels[image : image + 1]).logits[0, len(prefix) :]
            torch.testing.assert_close(logits[image, k][real], expected, rtol=1e-4, atol=1e-3)
            assert (packed.targets[image, k] != -100).sum() >= 2


def test_encode_refuses_what_does_not_fit(processor: Any) -> None:
    task = get_task("digits-vqa")
    example = task.examples("train", 1)[0]
    with pytest.raises(TaskDataError, match="0 examples"):
        task.encode(processor, [])
    with pytest.raises(TaskDataError, match="has no token"):
        task.encode(processor, [Example(example.image, example.prompt, "", "text")])
    with pytest.raises(TaskDataError, match="no image token"):
        task.encode(SimpleNamespace(tokenizer=processor.tokenizer), [example])


def test_examples_without_an_image_may_stand_among_those_with_one(model: Any, processor: Any) -> None:
    pictured = get_task("digits-vqa").examples("test", 3)
    plain = Example(None, "is red greater than blue ?", "yes", "text")
    split = get_task("digits-vqa").encode(processor, [pictured[0], plain, *pictured[1:]])
    (batch,) = split.batches(4)
    assert [len(batch[name]) for name in ("input_ids", "labels", "pixel_values")] == [4, 4, 3]
    (alone,) = get_task("digits-vqa").encode(processor, pictured[1:]).batches(2)
    assert torch.equal(batch["pixel_values"][1:], alone["pixel_values"])
    with torch.no_grad():
        together, separate = model(**batch).logits[2:], model(**alone).logits
    torch.testing.assert_close(together[:, : separate.shape[1]], separate, rtol=1e-4, atol=1e-4)
    last, first = list(split.batches(2))[::-1]
    assert (len(first["pixel_values"]), len(last["pixel_values"])) == (1, 2)
    assert "pixel_values" not in next(get_task("digits-vqa").encode(processor, [plain]).batches(1))
    assert len(split.prompts(4)["input_ids"]) == len(split.prompts(4)["pixel_values"]) == 3


def test_text_only_examples_work_with_a_bare_tokenizer(processor: Any) -> None:
    plain = get_task("digits-vqa").encode(processor.tokenizer, [Example(None, "is red even ?", "yes", "text")])
    assert set(plain.tensors) == {"input_ids", "attention_mask", "labels"}
    assert processor.tokenizer.decode(plain.tensors["input_ids"][0]) == "<bos> is red even ? yes <eos>"
