"""Every task of the package, and one that a user might register, passes the contract."""

from __future__ import annotations

import csv
import json
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
from science_files import write_scienceqa
from task_contract import TaskContract
from tiny_models import draw_digits, word_tokenizer

from eas_search import tasks
from eas_search.models.demo import demo_path
from eas_search.tasks import Example, Split
from eas_search.tasks.answers import AnswerTask

WORDS = [
    "the",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "flew",
    "on",
    "under",
    "mat",
    "tree",
    "house",
    "red",
    "green",
    "blue",
    "old",
    "new",
    "big",
    "small",
    "question",
    "good",
    "bad",
]


@cache
def demo_processor() -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(demo_path())


@cache
def words(pair: bool = False) -> Any:
    letters = [f"( {letter} ) {letter} . The answer is" for letter in "ABCDE"]
    numbers = [str(i) for i in range(100)]
    return word_tokenizer(
        [" ".join(WORDS), *letters, *numbers, "Question : Context N / A Options BECAUSE yes no ? ."], pair
    )


def sentence(i: int) -> str:
    return f"the {WORDS[i % 7]} {WORDS[7 + i % 11]} number {i} sat on the mat"


class TestDigitsVqa(TaskContract):
    name = "digits-vqa"

    def make_data(self, folder: Path) -> None:
        return None

    def make_processor(self) -> Any:
        return demo_processor()


class TestVqaWithImages(TaskContract):
    name = "vqa"

    def make_data(self, folder: Path) -> Path:
        from PIL import Image

        (folder / "images").mkdir()
        records = []
        for i in range(40):
            Image.new("RGB", (20, 20), (6 * i, 90, 200)).save(folder / "images" / f"{i}.png")
            turns = [
                ("human", f"<image>\nwhat digit is {('red', 'green')[i % 2]} ?"),
                ("gpt", ("one", "two")[i % 3 // 2]),
            ]
            turns += [("human", "is it even ?"), ("gpt", "yes")]
            talk = [{"from": who, "value": what} for who, what in turns]
            records.append({"id": str(i), "image": f"{i}.png", "answer_type": "OPEN", "conversations": talk})
        (folder / "talks.json").write_text(json.dumps(records), encoding="utf-8")
        return folder / "talks.json"

    def make_processor(self) -> Any:
        return demo_processor()

    def spoil(self, data: Path) -> None:
        (data.parent / "images" / "3.png").write_text("no picture", encoding="utf-8")


class TestVqaChoosingLetters(TaskContract):
    name = "vqa"

    def make_data(self, folder: Path) -> Path:
        for split, start in (("train", 0), ("val", 30), ("test", 40)):
            lines = []
            for i in range(start, start + 10 + 20 * (split == "train")):
                ask = f"question {i} ? A. cat B. dog C. bird"
                talk = [{"from": "human", "value": ask}, {"from": "gpt", "value": "ABC"[i % 3]}]
                lines.append(json.dumps({"id": i, "conversations": talk}))
            (folder / f"slake_{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return folder

    def make_processor(self) -> Any:
        return words()

    def spoil(self, data: Path) -> None:
        with (data / "slake_train.jsonl").open("a", encoding="utf-8") as file:
            file.write('\n{"id": 7, "conversations": []}')


class TestScienceQa(TaskContract):
    name = "scienceqa"
    options: ClassVar[dict[str, Any]] = {"prompt": "QCM-ALE"}

    def make_data(self, folder: Path) -> Path:
        return write_scienceqa(folder)

    def make_processor(self) -> Any:
        return words()

    def spoil(self, data: Path) -> None:
        (data / "problems.json").write_text('{"1": {"question": "why"}}', encoding="utf-8")


class TestTextClassification(TaskContract):
    name = "text-classification"
    options: ClassVar[dict[str, Any]] = {"pair": "context"}

    def make_data(self, folder: Path) -> Path:
        with (folder / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "context", "label"])
            table.writerows([sentence(i), "the big house", ("good", "bad")[i % 2]] for i in range(60))
        return folder / "reviews.csv"

    def make_processor(self) -> Any:
        return words(pair=True)

    def spoil(self, data: Path) -> None:
        data.write_text("text,context\na,b\n", encoding="utf-8")


class TestMultipleChoice(TaskContract):
    name = "multiple-choice"

    def make_data(self, folder: Path) -> Path:
        rows = [
            {"question": sentence(i), "choices": WORDS[i % 5 : i % 5 + 2 + i % 3], "answer": WORDS[i % 5 + i % 2]}
            for i in range(60)
        ]
        for split, part in (("train", rows[:40]), ("validation", rows[40:50]), ("test", rows[50:])):
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
        return folder

    def make_processor(self) -> Any:
        return words(pair=True)

    def spoil(self, data: Path) -> None:
        row = {"question": "q", "choices": ["a", "b"], "answer": "c"}
        (data / "train.jsonl").write_text(json.dumps({**row, "answer": "neither"}), encoding="utf-8")


class TestMultipleChoiceOnScienceQa(TestMultipleChoice):
    def make_data(self, folder: Path) -> Path:
        return write_scienceqa(folder)

    def spoil(self, data: Path) -> None:
        (data / "pid_splits.json").write_text('{"train": ["77"]}', encoding="utf-8")


class TestImageClassification(TaskContract):
    name = "image-classification"

    def make_data(self, folder: Path) -> Path:
        return draw_digits(folder / "digits", 80)

    def make_processor(self) -> Any:
        from transformers import CLIPImageProcessor

        return CLIPImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False)

    def spoil(self, data: Path) -> None:
        next((data / "4").iterdir()).write_text("no picture", encoding="utf-8")


class TestCausalLm(TaskContract):
    name = "causal-lm"
    options: ClassVar[dict[str, Any]] = {"block": 16}

    def make_data(self, folder: Path) -> Path:
        (folder / "all.txt").write_text("\n\n".join(sentence(i) for i in range(50)), encoding="utf-8")
        return folder

    def make_processor(self) -> Any:
        return words()

    def spoil(self, data: Path) -> None:
        (data / "all.txt").write_bytes(b"\xff\xfe\x80 not a text \xff")


class Sums(AnswerTask):
    """A task as a user writes it."""

    name: ClassVar[str] = "sums"

    def examples(self, split: Split, limit: int | None = None) -> list[Example]:
        from eas_search.tasks.base import limited

        sizes: dict[Split, int] = {"train": 40, "validation": 10, "test": 10}
        start = {"train": 0, "validation": 40, "test": 50}[split] if split in sizes else 0
        numbers = range(start, start + limited(sizes, split, limit))
        return [Example(None, f"question {i} ?", str(i % 10), "sums") for i in numbers]


class TestOwnTask(TaskContract):
    name = "sums"

    @pytest.fixture(autouse=True)
    def registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tasks, "_registered", {})
        tasks.register_task(Sums)

    def make_data(self, folder: Path) -> None:
        return None

    def make_processor(self) -> Any:
        return words()
