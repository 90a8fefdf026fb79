"""The data sets of the paper: every task passes the contract in the original layout and in ViLT's arrow files."""

from __future__ import annotations

import io
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from paper_tiny import (
    NAMES,
    SIZE,
    halves,
    llava_processor,
    tokenizer,
    write_aid,
    write_flickr30k,
    write_nlvr2,
    write_slake,
    write_vqav2,
)
from PIL import Image
from task_contract import Oracle, TaskContract

from eas_search.exceptions import TaskDataError
from eas_search.tasks import get_task
from eas_search.tasks.image_files import open_image
from eas_search.training import sample_scores

SHARED = Path(__file__).parents[2] / "shared" / "data" / "llava_format"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no sample data beside the repository")


@cache
def meter_words() -> Any:
    from eas_search.models.meter.processing import meter_processor

    return meter_processor(tokenizer(), SIZE)


@cache
def llava_words() -> Any:
    return llava_processor()


def picture(i: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (i % 250, 7 * i % 250, 90)).save(file, "png")
    return file.getvalue()


def write_arrow(file: Path, rows: list[dict[str, Any]]) -> None:
    """One file in the format that ViLT's preparation writes."""
    import pyarrow as pa

    columns = {name: [row[name] for row in rows] for name in rows[0]}
    table = pa.table(columns)
    with pa.OSFile(str(file), "wb") as sink, pa.RecordBatchFileWriter(sink, table.schema) as writer:
        writer.write_table(table)


class MeterTask(TaskContract):
    def make_processor(self) -> Any:
        return meter_words()


class TestVqaV2(MeterTask):
    name = "vqav2"
    options: ClassVar[dict[str, Any]] = {"least": 3}

    def make_data(self, folder: Path) -> Path:
        return write_vqav2(folder, 60, 24)

    def spoil(self, data: Path) -> None:
        file = data / "v2_mscoco_train2014_annotations.json"
        file.write_text(file.read_text("utf-8").replace('"multiple_choice_answer"', '"answer"'), encoding="utf-8")


class TestVqaV2Arrow(MeterTask):
    name = "vqav2"
    answers: ClassVar[tuple[str, ...]] = ("yes", "no", "2", "red")

    def make_data(self, folder: Path) -> Path:
        start = 0
        for name in ("vqav2_train", "vqav2_trainable_val", "vqav2_rest_val"):
            rows = []
            for i in range(start, start + 30):
                pair = [self.answers[i % 4], self.answers[(i + 1) % 4]]
                rows.append(
                    {
                        "image": picture(i),
                        "questions": [f"what colour is {i} ?", f"is it {i} ?"],
                        "answers": [pair, [pair[0]]],
                        "answer_labels": [[self.answers.index(a) for a in pair], [self.answers.index(pair[0])]],
                        "answer_scores": [[1.0, 0.3], [1.0]],
                        "image_id": i,
                        "question_id": [2 * i, 2 * i + 1],
                        "split": name,
                    }
                )
            write_arrow(folder / f"{name}.arrow", rows)
            start += 30
        return folder

    def spoil(self, data: Path) -> None:
        (data / "vqav2_train.arrow").write_bytes(b"no arrow file")


class TestNlvr2(MeterTask):
    name = "nlvr2"

    def make_data(self, folder: Path) -> Path:
        return write_nlvr2(folder, 40, 16)

    def spoil(self, data: Path) -> None:
        with (data / "data" / "train.json").open("a", encoding="utf-8") as file:
            file.write('\n{"identifier": "train-9-0-0", "sentence": "x", "label": "perhaps", "directory": 0}')


class TestNlvr2Arrow(MeterTask):
    name = "nlvr2"

    def make_data(self, folder: Path) -> Path:
        for start, part in ((0, "train"), (100, "dev"), (200, "test1")):
            rows = [
                {
                    "image_0": picture(i),
                    "image_1": picture(i + 50),
                    "questions": [f"left picture is red {i} .", f"both are blue {i} ."],
                    "answers": ["True", "False"],
                    "identifier": f"{part}-{i}",
                    "split": part,
                }
                for i in range(start, start + 20)
            ]
            write_arrow(folder / f"nlvr2_{part}.arrow", rows)
        return folder

    def spoil(self, data: Path) -> None:
        write_arrow(data / "nlvr2_train.arrow", [{"image_0": b"", "questions": ["x"]}])


class TestFlickr30k(MeterTask):
    name = "flickr30k"
    options: ClassVar[dict[str, Any]] = {"pool": 4, "direction": "text"}

    def make_data(self, folder: Path) -> Path:
        return write_flickr30k(folder, 20, 8)

    def spoil(self, data: Path) -> None:
        (data / "flickr30k-images" / "3.jpg").write_text("no picture", encoding="utf-8")


class TestFlickr30kArrow(MeterTask):
    name = "flickr30k"
    options: ClassVar[dict[str, Any]] = {"pool": 4, "direction": "text"}

    def make_data(self, folder: Path) -> Path:
        for start, part in ((0, "train"), (100, "val"), (200, "test")):
            rows = [
                {"image": picture(i), "caption": [f"red {i}", f"blue {i}"], "image_id": f"{i}.jpg", "split": part}
                for i in range(start, start + 10)
            ]
            write_arrow(folder / f"f30k_caption_karpathy_{part}.arrow", rows)
        return folder

    def spoil(self, data: Path) -> None:
        (data / "f30k_caption_karpathy_val.arrow").unlink()


class TestSlake(TaskContract):
    name = "slake"
    options: ClassVar[dict[str, Any]] = {"scoring": "teacher-forced"}

    def make_data(self, folder: Path) -> Path:
        return write_slake(folder, 40, 16)

    def make_processor(self) -> Any:
        return llava_words()

    def spoil(self, data: Path) -> None:
        file = data / "slake_train.json"
        file.write_text(file.read_text("utf-8").replace("CLOSED", "SHUT"), encoding="utf-8")


class TestAid(TaskContract):
    name = "aid"

    def make_data(self, folder: Path) -> Path:
        write_aid(folder, 40, 16)
        (folder / "aid_train50.json").write_text("not read", encoding="utf-8")
        return folder

    def make_processor(self) -> Any:
        return llava_words()

    def spoil(self, data: Path) -> None:
        (data / "images" / "red" / "red_0.jpg").unlink()


def test_vqav2_is_read_as_it_is_written(tmp_path: Path) -> None:
    task = get_task("vqav2", write_vqav2(tmp_path, 60, 24), {"least": 3})
    raw = json.loads((tmp_path / "v2_mscoco_val2014_annotations.json").read_text("utf-8"))["annotations"]
    asked = json.loads((tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").read_text("utf-8"))["questions"]
    found = task.examples("validation")
    questions = {row["question_id"]: row["question"] for row in asked}
    shown = [(f"COCO_val2014_{row['image_id']:012d}.jpg", questions[row["question_id"]]) for row in raw]
    assert len(set(shown)) == len(shown)
    given = {(str(e.image).rsplit("/", 1)[1], e.prompt): e for e in found}
    assert sorted(given) == sorted(shown)
    assert len(given) == len(found)
    assert {e.group for e in found} == {"other", "yes/no", "number"}
    assert "1" in task.labels  # "one", written as a digit
    assert "one" not in task.labels
    assert task.labels[0] == halves(0)[0]  # the first answer that is given
    for pair, row in zip(shown, raw, strict=True):
        example = given[pair]
        people = [answer["answer"].replace("one", "1") for answer in row["answers"]]
        for answer, score in example.worth:
            assert score == pytest.approx(min(1.0, 0.3 * people.count(answer)))
    pictures = [{e.image for e in task.examples(split)} for split in ("train", "test")]
    assert not pictures[0] & pictures[1]
    assert "set apart from its training examples" in task.notes[0]


def test_the_soft_score_of_an_answer_is_what_a_model_gets(tmp_path: Path) -> None:
    task = get_task("vqav2", write_vqav2(tmp_path, 60, 24), {"least": 3})
    examples = task.examples("validation")
    split = task.encode(meter_words(), examples)

    class Always(Oracle):
        def forward(self, labels: Any, **_: Any) -> Any:
            from types import SimpleNamespace

            logits = torch.zeros_like(labels)
            logits[:, task.labels.index("red")] = 1.0  # type: ignore[union-attr]
            return SimpleNamespace(logits=logits)

    expected = [dict(example.worth).get("red", 0.0) for example in examples]
    assert sample_scores(Always(), split).tolist() == pytest.approx(expected)
    assert 0 < sum(expected) / len(expected) < 1
    assert set(split.scoring.report(split, torch.tensor(expected))) == {"other", "yes/no", "number"}


def test_vqav2_arrow_files_bring_their_classes(tmp_path: Path) -> None:
    data = TestVqaV2Arrow().make_data(tmp_path)
    task = get_task("vqav2", data)
    assert task.labels == ("yes", "no", "2", "red")
    first = {e.prompt: e for e in task.examples("validation")}["what colour is 60 ?"]
    assert first.worth == (("yes", 1.0), ("no", pytest.approx(0.3)))
    assert open_image(first.image).getpixel((0, 0)) == (60, 420 % 250, 90)
    assert len(task.examples("train")) + len(task.examples("test")) == 120


def test_arrow_files_that_were_moved_are_split_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    TestVqaV2Arrow().make_data(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there" / "copy")
    monkeypatch.chdir(tmp_path)
    places = [tmp_path / "here", Path("here"), tmp_path / "there" / "copy"]
    held_out = [[e.prompt for e in get_task("vqav2", place).examples("test")] for place in places]
    assert held_out[0] == held_out[1] == held_out[2] != []


def test_a_sentence_may_hold_separators_of_lines(tmp_path: Path) -> None:
    write_nlvr2(tmp_path, 12, 8)
    file = tmp_path / "data" / "dev.json"
    file.write_text(file.read_text("utf-8").replace("picture is", "picture\u2028is"), encoding="utf-8")
    assert all("picture\u2028is" in e.prompt for e in get_task("nlvr2", tmp_path).examples("validation"))


def test_a_model_made_for_the_same_answers_keeps_its_order(tmp_path: Path) -> None:
    task = get_task("vqav2", TestVqaV2Arrow().make_data(tmp_path))
    task.adopt_labels(["red", "2", "no", "yes"])
    assert task.labels == ("red", "2", "no", "yes")
    first = {e.prompt: e for e in task.examples("validation")}["what colour is 60 ?"]
    split = task.encode(meter_words(), [first])
    assert split.tensors["labels"].tolist() == [pytest.approx([0.0, 0.0, 0.3, 1.0])]


def test_nlvr2_gives_both_pictures_in_their_order(tmp_path: Path) -> None:
    task = get_task("nlvr2", write_nlvr2(tmp_path, 12, 8))
    lines = [json.loads(line) for line in (tmp_path / "data" / "dev.json").read_text("utf-8").splitlines()]
    found = task.examples("validation")
    stems = [tmp_path / "images" / "dev" / row["identifier"].rpartition("-")[0] for row in lines]
    assert sorted((e.prompt, e.answer, str(e.image), str(e.others[0])) for e in found) == sorted(
        (row["sentence"], row["label"], f"{stem}-img0.png", f"{stem}-img1.png")
        for row, stem in zip(lines, stems, strict=True)
    )
    assert all(len(e.others) == 1 for e in found)
    assert str(stems[0]).endswith("dev/dev-12-0")
    trained = [e.image for e in task.examples("train")]
    assert tmp_path / "images" / "train" / "1" / "train-4-0-img0.png" in trained
    split = task.encode(meter_words(), found)
    assert split.tensors["pixel_values"].shape == (8, 2, 3, SIZE, SIZE)
    alone = meter_words().image_processor(images=[open_image(found[3].others[0])], return_tensors="pt")
    assert torch.equal(split.tensors["pixel_values"][3, 1], alone["pixel_values"][0])


def test_flickr30k_gives_every_image_its_own_pixels(tmp_path: Path) -> None:
    task = get_task("flickr30k", write_flickr30k(tmp_path, 20, 8), {"pool": 4})
    examples = task.examples("test")
    assert len(examples) == 16
    assert [e.answer for e in examples[:2]] == [f"A photograph of {' beside '.join(halves(i))}, {i}." for i in (28, 29)]
    split = task.encode(meter_words(), examples)
    assert split.tensors["input_ids"].shape[:2] == (16, 4)
    for row, example in enumerate(examples):
        alone = meter_words().image_processor(images=[open_image(example.image)], return_tensors="pt")
        assert torch.equal(split.tensors["pixel_values"][row], alone["pixel_values"][0])
        place = int(split.tensors["labels"][row])
        assert split.extras["pictures"][row, place] == split.extras["pictures"][row][place]
        assert (example.choices[place], example.others[place]) == (example.answer, example.image)


@pytest.mark.parametrize(
    ("name", "options", "gone", "named"),
    [
        (
            "vqav2",
            {},
            "v2_mscoco_val2014_annotations.json",
            r"'v2_mscoco_val2014_annotations.json' is missing.*visualqa",
        ),
        ("vqav2", {}, "val2014", r"'val2014' is missing: looked for val2014, images/val2014 in .*visualqa.org"),
        ("nlvr2", {}, "data/dev.json", r"'dev.json' is missing: looked for dev.json, data/dev.json.*lil-lab/nlvr"),
        ("flickr30k", {"pool": 4}, "dataset_flickr30k.json", r"'dataset_flickr30k.json' is missing.*karpathy"),
        ("flickr30k", {"pool": 4}, "flickr30k-images", r"'flickr30k-images' is missing.*DenotationGraph"),
        ("slake", {}, "images/xmlab3", r"image 'xmlab3/source.jpg' named in .*slake_train.json' .*med-vqa.com/slake"),
        ("aid", {}, "images/red", r"image 'red/red_24.jpg' named in .*aid_test20.json' .*captain-whu.github.io/AID"),
    ],
)
def test_what_is_missing_is_one_line_with_place_and_source(
    tmp_path: Path, name: str, options: dict[str, Any], gone: str, named: str
) -> None:
    write = {"vqav2": write_vqav2, "nlvr2": write_nlvr2, "flickr30k": write_flickr30k, "slake": write_slake}
    write.get(name, write_aid)(tmp_path, 20, 12)
    (tmp_path / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(TaskDataError, match=named) as caught:
        get_task(name, tmp_path, options).examples("train")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_too_few_known_answers_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TaskDataError, match=r"found 0 answer.*lower the option 'least'"):
        get_task("vqav2", write_vqav2(tmp_path, 12, 8), {"least": 90}).examples("train")
    with pytest.raises(TaskDataError, match=r"has 8 images; expected at least .* 16: lower the option 'pool'"):
        get_task("flickr30k", write_flickr30k(tmp_path / "f", 20, 8), {"pool": 16}).examples("train")


class Says:
    """A model that generates fixed texts."""

    config = None

    def __init__(self, texts: list[str], words: Any) -> None:
        self.texts, self.words, self.training = iter(texts), words, False

    def eval(self) -> None:
        return None

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def generate(self, input_ids: Any, **_: Any) -> Any:
        rows = [self.words(next(self.texts), add_special_tokens=False).input_ids for _ in input_ids]
        longest = max(map(len, rows))
        padded = [[*row, *[self.words.pad_token_id] * (longest - len(row))] for row in rows]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


def test_slake_judges_what_is_generated(tmp_path: Path) -> None:
    task, processor = get_task("slake", write_slake(tmp_path, 20, 12)), llava_words()
    examples = [e for e in task.examples("test") if e.answer in ("red and red", "yes", "no")][:4]
    known = [(e.answer.lower(), e.group) for e in examples]
    said = ["yes" if right != "yes" else "no" for right, _ in known]
    split = task.encode(processor, examples)
    model: Any = Says(said, processor.tokenizer)
    assert sample_scores(model, split).tolist() == [0.0] * len(examples)
    model = Says([right.split()[0] for right, _ in known], processor.tokenizer)
    half = [pytest.approx(1 / 3) if group == "OPEN" else 1.0 for _, group in known]
    assert sample_scores(model, split).tolist() == half
    assert set(split.scoring.report(split, torch.ones(len(examples)))) <= {"OPEN", "CLOSED"}


@needs_shared
@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("slake", {"slake_train.json": "slake_train_head.json", "slake_test.json": "slake_test_head.json"}),
        ("aid", {"aid_train20.json": "aid_train20_head.json"}),
    ],
)
def test_the_published_annotations_are_read(tmp_path: Path, name: str, files: dict[str, str]) -> None:
    records = []
    for target, source in files.items():
        text = (SHARED / source).read_text("utf-8")
        (tmp_path / target).write_text(text, encoding="utf-8")
        records += json.loads(text)
    for record in records:
        path = tmp_path / "images" / record["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    task = get_task(name, tmp_path)
    found = [e for split in ("train", "validation", "test") for e in task.examples(split)]
    assert sorted(e.answer for e in found) == sorted(r["conversations"][1]["value"].strip() for r in records)
    assert {e.group for e in found} == ({"OPEN", "CLOSED"} if name == "slake" else {"CLOSED"})


def test_the_tiny_pictures_differ() -> None:
    assert len({halves(i) for i in range(36)}) == 36
    assert {name for i in range(36) for name in halves(i)} == set(NAMES)
