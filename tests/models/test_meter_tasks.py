"""METER and the tasks it is used for: heads, numbers of images, pools of captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from meter_tiny import batch, tiny_meter
from paper_tiny import save_meter, write_flickr30k, write_nlvr2, write_vqav2
from transformers import BlipConfig

from eas_search.exceptions import UnsupportedModelError
from eas_search.models.loading import head_class
from eas_search.models.meter import MeterForClassification, MeterForImageAndTextRetrieval
from eas_search.models.options import LoadOptions
from eas_search.settings import SearchSettings
from eas_search.tasks import get_task
from eas_search.training import sample_scores
from eas_search.workbench import Workbench, load_for_task

CPU = LoadOptions(device="cpu")
ALWAYS = ("cross_modal_text_pooler", "cross_modal_image_pooler", "token_type_embeddings")


@pytest.fixture(scope="module")
def meter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_meter(tmp_path_factory.mktemp("meter"))


@torch.no_grad()
def test_several_texts_of_an_image_score_like_its_pairs() -> None:
    model = tiny_meter(kind=MeterForImageAndTextRetrieval)
    pixels = batch()["pixel_values"]
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(3, 60, (2, 3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 1, 5:] = mask[1, 2, 4:] = 0
    labels = torch.tensor([2, 0])
    found = model(ids, pixels, mask, labels)
    assert (found.logits.shape, found.match_logits.shape) == ((2, 3), (2, 3, 2))
    for b in range(2):
        for c in range(3):
            alone = model(ids[b, c : c + 1], pixels[b : b + 1], mask[b, c : c + 1])
            torch.testing.assert_close(found.logits[b, c], alone.logits[0, 0], atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(found.match_logits[b, c], alone.match_logits[0], atol=2e-6, rtol=1e-5)
    chances = found.logits.double().softmax(dim=1)
    assert found.loss.item() == pytest.approx(-(chances[0, 2].log() + chances[1, 0].log()).item() / 2, rel=1e-5)


def test_pools_are_ranked_as_pair_by_pair(meter_folder: Path, tmp_path: Path) -> None:
    task = get_task("flickr30k", write_flickr30k(tmp_path, 20, 8), {"pool": 4})
    model, processor = load_for_task(task, str(meter_folder), CPU)
    assert isinstance(model, MeterForImageAndTextRetrieval)
    trained = {name.removeprefix("meter.").split(".")[0] for name in model.eas_trainable}
    assert trained == {"itm_score", "rank_output", *ALWAYS}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # fresh weights give all pairs nearly the same score
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    examples = task.examples("test")
    found = sample_scores(model, task.encode(processor, examples), batch_size=5).tolist()

    @torch.no_grad()
    def fit(caption: str, image: Path) -> float:
        from PIL import Image

        inputs = processor(text=[caption], images=[Image.open(image).convert("RGB")], return_tensors="pt")
        return model(**inputs).logits.item()

    for example, score in zip(examples, found, strict=True):
        captions = [fit(caption, example.image) for caption in example.choices]  # type: ignore[arg-type]
        images = [fit(example.answer, image) for image in example.others]  # type: ignore[arg-type]
        right = example.choices.index(example.answer)
        assert score == ((captions.index(max(captions)) == right) + (images.index(max(images)) == right)) / 2
    assert 0 < sum(found) < len(found)


def test_answers_become_the_classes_of_a_new_head(meter_folder: Path, tmp_path: Path) -> None:
    task = get_task("vqav2", write_vqav2(tmp_path, 60, 24), {"least": 3})
    model, processor = load_for_task(task, str(meter_folder), CPU)
    assert isinstance(model, MeterForClassification)
    assert tuple(model.config.id2label.values()) == task.labels
    assert {name.removeprefix("meter.").split(".")[0] for name in model.eas_trainable} == {"classifier", *ALWAYS}
    assert len(set(model.eas_trainable)) == len(model.eas_trainable)
    split = task.encode(processor, task.examples("validation"))
    inputs = next(split.batches(len(split)))
    with torch.no_grad():
        found = model(**inputs)
    chances, worth = found.logits.double().sigmoid(), inputs["labels"].double()
    expected = -(worth * chances.log() + (1 - worth) * (1 - chances).log()).sum(dim=1).mean()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    scores = sample_scores(model, split)
    assert scores.tolist() == pytest.approx([worth[i, found.logits[i].argmax()].item() for i in range(len(split))])


def test_the_number_of_images_must_fit(meter_folder: Path, tmp_path: Path) -> None:
    task = get_task("nlvr2", write_nlvr2(tmp_path / "data", 12, 8))
    with pytest.raises(UnsupportedModelError, match=r"reads 1 image\(s\) with a text, task 'nlvr2' has 2"):
        load_for_task(task, str(meter_folder), CPU)
    model, _ = load_for_task(task, str(save_meter(tmp_path / "two", num_images=2)), CPU)
    assert model.config.id2label == {0: "False", 1: "True"}  # type: ignore[union-attr]
    questions = get_task("vqav2", write_vqav2(tmp_path / "vqa", 60, 24), {"least": 3})
    with pytest.raises(UnsupportedModelError, match=r"reads 2 image\(s\) with a text, task 'vqav2' has 1"):
        load_for_task(questions, str(tmp_path / "two"), CPU)


@pytest.mark.parametrize(
    ("head", "named"),
    [("visual-question-answering", "which writes its answers"), ("image-text-retrieval", "cannot be trained to rank")],
)
def test_models_that_cannot_have_a_head_are_refused(head: Any, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        head_class(BlipConfig(), "some/blip", head)


def test_the_fusion_layers_are_searched_unless_the_user_says_otherwise(meter_folder: Path, tmp_path: Path) -> None:
    data = write_vqav2(tmp_path, 60, 24)
    small = {"train": 16, "validation": 8, "test": 8, "calibration": 8}
    given = {"model": str(meter_folder), "task": "vqav2", "data": data, "task_options": {"least": 3}, "samples": small}
    space = Workbench.open(SearchSettings(**given, device="cpu")).space
    assert len(space.sites) == 12  # three layers, two streams, self- and cross-attention
    assert {site.tower for site in space.sites} == {"fusion"}
    assert (space.student.pooling, space.student.adapter_towers) == ("all", ("fusion",))
    assert space.choices.placements == ("residual",)
    asked = Workbench.open(SearchSettings(**given, device="cpu", space={"towers": ["text"]})).space
    assert {site.tower for site in asked.sites} == {"text"}
