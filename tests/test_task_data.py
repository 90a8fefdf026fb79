"""Reading people's own files: formats, layouts, splits and options, and what is said when something is missing."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from science_files import problem, write_scienceqa
from test_task_contract import words
from tiny_models import draw_digits
from tiny_vision import draw_talks

from eas_search.exceptions import ConfigError, TaskDataError
from eas_search.tasks import get_task
from eas_search.tasks.base import Split
from eas_search.tasks.causal_lm import RUN
from eas_search.tasks.order import by_digest, in_proportion
from eas_search.tasks.science_columns import read_predictions, score_predictions
from eas_search.tasks.splits import complete, divided, split_named

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no sample data beside the repository")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


ROWS = [{"text": f"a cat, number {i}", "label": ("good", "bad")[i % 2]} for i in range(30)]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the file's name says."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        lines = path.suffix == ".jsonl"
        path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.json", "data.jsonl", "data.parquet", "odd [1]*.csv"])
def test_every_format_gives_the_same_rows_without_network(tmp_path: Path, name: str) -> None:
    task = get_task("text-classification", write_table(tmp_path / name, ROWS))
    splits: tuple[Split, ...] = ("train", "validation", "test")
    found = [example for split in splits for example in task.examples(split)]
    assert Counter((e.prompt, e.answer) for e in found) == Counter((r["text"], r["label"]) for r in ROWS)
    assert [len(task.examples(split)) for split in splits] == [24, 3, 3]
    assert task.notes == [
        "the data has no validation and no test split: set apart from its training examples were 3 for validation and "
        "3 for test"
    ]
    assert task.labels == ("bad", "good")


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.json", "data.jsonl"])
def test_words_for_nothing_are_words_and_marks_of_an_editor_are_not(tmp_path: Path, name: str) -> None:
    """Windows' editors put a byte order mark in front; "NA" and "None" may be classes."""
    rows = [{"text": f"text {i}", "label": ("NA", "None", "null", "1")[i % 4]} for i in range(40)]
    file = write_table(tmp_path / name, rows)
    file.write_text(file.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert get_task("text-classification", file).labels == ("1", "NA", "None", "null")  # type: ignore[attr-defined]
    if file.suffix in (".csv", ".tsv"):
        file.write_text(file.read_text(encoding="utf-8-sig") + ("x,\n" if name == "data.csv" else "x\t\n"))
        with pytest.raises(TaskDataError, match="has no 'label'"):
            get_task("text-classification", file).examples("train")


def test_a_folder_with_a_file_per_split_is_taken_as_it_is(tmp_path: Path) -> None:
    for name, part in (("my_train.csv", ROWS[:10]), ("dev.jsonl", ROWS[10:16]), ("test-2.parquet", ROWS[16:])):
        write_table(tmp_path / name, part)
    task = get_task("text-classification", tmp_path)
    for split, part in (("train", ROWS[:10]), ("validation", ROWS[10:16]), ("test", ROWS[16:])):
        assert sorted(e.prompt for e in task.examples(split)) == sorted(r["text"] for r in part)  # type: ignore[arg-type]
    assert task.notes == []


def test_only_a_missing_split_is_set_apart(tmp_path: Path) -> None:
    write_table(tmp_path / "train.csv", ROWS[:20])
    write_table(tmp_path / "test.csv", ROWS[20:])
    task = get_task("text-classification", tmp_path)
    assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [18, 2, 10]
    assert task.notes[0].startswith("the data has no validation split: ")


def test_what_belongs_together_is_never_separated_and_more_data_moves_nothing() -> None:
    values = [f"{i % 40}" for i in range(200)]
    splits, note = complete("t", {"train": values}, str)
    assert {k: len(v) for k, v in splits.items()} == {"train": 160, "validation": 20, "test": 20}
    assert note is not None
    kinds = [set(part) for part in splits.values()]
    assert sum(map(len, kinds)) == len(set.union(*kinds)) == 40
    assert complete("t", {"train": values[::-1]}, str)[0]["test"] == splits["test"][::-1]
    with pytest.raises(TaskDataError, match="only 2 distinct"):
        complete("t", {"train": ["a", "b", "a"]}, str)
    with pytest.raises(TaskDataError, match="no training examples"):
        complete("t", {"test": ["a"]}, str)


def sorted_rows(kinds: tuple[str, ...], each: int) -> list[dict[str, Any]]:
    return [{"text": f"{kind} text {i}", "label": kind} for kind in kinds for i in range(each)]


def test_a_limit_takes_every_class_of_sorted_data_in_its_share(tmp_path: Path) -> None:
    rows = [*sorted_rows(("good",), 600), *sorted_rows(("bad",), 200)]
    write_table(tmp_path / "train.csv", rows)
    write_table(tmp_path / "val.csv", [{**row, "text": f"val {row['text']}"} for row in rows])
    write_table(tmp_path / "test.csv", [{**row, "text": f"test {row['text']}"} for row in rows])
    task = get_task("text-classification", tmp_path)
    for split in ("train", "validation", "test"):
        for limit in (8, 99, 400, None):
            found = Counter(e.answer for e in task.examples(split, limit))  # type: ignore[arg-type]
            count = limit or 800
            assert found["bad"] == pytest.approx(count / 4, abs=1)
            assert found.total() == count
    search, selection, _ = divided(task.examples("validation", 2000), 1000, 1000)
    assert [Counter(e.answer for e in part)["bad"] for part in (search, selection)] == [100, 100]


@pytest.mark.parametrize("name", ["text-classification", "multiple-choice", "vqa", "image-classification"])
def test_what_a_limit_takes_does_not_depend_on_how_the_file_is_sorted(tmp_path: Path, name: str) -> None:
    def row(kind: str, i: int) -> dict[str, Any]:
        if name == "image-classification":
            file = io.BytesIO()
            Image.new("RGB", (4, 4), (i, kind == "good", 0)).save(file, "png")
            return {"image": {"bytes": file.getvalue(), "path": None}, "label": kind}
        if name == "text-classification":
            return {"text": f"{kind} text {i}", "label": kind}
        if name == "multiple-choice":
            return {"question": f"{kind} {i} ?", "choices": ["good", "bad"], "answer": kind}
        return talk(f"is it good or bad in {i} ?", kind)

    rows = [row(kind, i) for kind in ("good", "bad") for i in range(200)]
    mixed = random.Random(0).sample(rows, len(rows))
    taken = []
    for number, table in enumerate((rows, rows[::-1], mixed)):
        suffix = "parquet" if name == "image-classification" else "jsonl"
        task = get_task(name, write_table(tmp_path / f"{number}.{suffix}", table))
        splits: tuple[tuple[Split, int], ...] = (("train", 60), ("validation", 20), ("test", 20))
        taken.append([[(e.image, e.prompt, e.answer) for e in task.examples(s, limit)] for s, limit in splits])
        assert taken[-1][0] == [(e.image, e.prompt, e.answer) for e in task.examples("train")][:60]
    assert taken[0] == taken[1] == taken[2]
    for part in taken[0]:
        # Half of the data is good; drawn at random, a part is within four standard deviations of that.
        share = sum(answer == "good" for *_, answer in part) / len(part)
        assert share == pytest.approx(0.5, abs=4 * (0.25 / len(part)) ** 0.5)
        assert len({answer for *_, answer in part}) == 2


@pytest.mark.parametrize(("text", "fails"), [("how do I use the <image> tag ?", False), ("<image>\nwhat ?", True),
    ("what ?\n<image>", True), ("look:\n<image>\nwhat ?", True)])  # fmt: skip
def test_a_question_about_a_placeholder_needs_no_picture(tmp_path: Path, text: str, fails: bool) -> None:
    records = [talk(f"{text} {i}" if not text.endswith(">") else text, f"answer {i}", id=i) for i in range(20)]
    (tmp_path / "train.json").write_text(json.dumps(records), encoding="utf-8")
    task = get_task("vqa", tmp_path)
    if fails:
        with pytest.raises(TaskDataError, match="asks about an <image>"):
            task.examples("train")
    else:
        assert all(example.image is None for example in task.examples("train"))


def test_equal_examples_do_not_stand_side_by_side() -> None:
    values = ["same"] * 500 + [f"{i}" for i in range(500)]
    found = by_digest(values, str)
    assert sorted(found) == sorted(values)
    assert 30 < found[:100].count("same") < 70  # four standard deviations of a hypergeometric draw are 19
    assert found == by_digest(values[::-1], str)


def test_classes_are_spread_evenly_and_keep_their_order() -> None:
    values = [f"a{i}" for i in range(60)] + [f"b{i}" for i in range(30)] + [f"c{i}" for i in range(10)]
    found = in_proportion(values, lambda text: text[0])
    for kind, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
        own = [value for value in found if value[0] == kind]
        assert own == [value for value in values if value[0] == kind]
        for size in range(1, 101):
            assert abs(sum(value[0] == kind for value in found[:size]) - share * size) <= 2
    assert in_proportion([], str) == []


def test_rare_classes_come_in_their_proportion_too() -> None:
    """Half of the data is one class, the other half five hundred with two examples each."""
    values = ["other"] * 1000 + [f"rare {i // 2}" for i in range(1000)]
    found = in_proportion(values, str)
    for size in (128, 256, 400, 600, 1000):
        deviation = 0.5 / size**0.5  # of a random draw, which this need not be worse than
        assert found[:size].count("other") / size == pytest.approx(0.5, abs=3 * deviation)


def test_of_plain_text_a_limit_takes_runs_from_all_over(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        (tmp_path / f"{part}.txt").write_text("\n\n".join(f"{part} {i}" for i in range(40 * RUN)), encoding="utf-8")
    task = get_task("causal-lm", tmp_path)
    found = [int(e.answer.split()[1]) for e in task.examples("train", 10 * RUN)]
    runs = [found[start : start + RUN] for start in range(0, len(found), RUN)]
    assert all(run == list(range(run[0], run[0] + RUN)) for run in runs)
    assert len({run[0] for run in runs}) == 10
    assert min(found) < 10 * RUN
    assert max(found) >= 30 * RUN
    assert sorted(int(e.answer.split()[1]) for e in task.examples("train")) == list(range(40 * RUN))


def test_an_example_that_is_alone_in_its_class_stays_in_training(tmp_path: Path) -> None:
    for number in range(40):
        rows = [*sorted_rows(("a", "b"), 100), {"text": f"rare text {number}", "label": "c"}]
        task = get_task("text-classification", write_table(tmp_path / f"{number}.csv", rows))
        assert [e.prompt for e in task.examples("train") if e.answer == "c"] == [f"rare text {number}"]
        assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [161, 20, 20]
        assert task.encode(words(pair=True), task.examples("test")).tensors["labels"].max() < 2
    # Where every class is small, each keeps one, and what can be spared is shared.
    pairs = [f"{i}{half}" for i in range(12) for half in "xy"]
    splits, _ = complete("t", {"train": pairs}, str, lambda text: text[:-1])
    assert {text[:-1] for text in splits["train"]} == {str(i) for i in range(12)}
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [20, 2, 2]
    with pytest.raises(TaskDataError, match=r"only 0 can be set apart without leaving a class without any") as caught:
        complete("t", {"train": pairs}, str, str)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("slake_test_head", "test"),
        ("val", "validation"),
        ("my_eval", "validation"),
        ("train-00000-of-00002", "train"),
        ("contest", None),
        ("x", None),
    ],
)
def test_split_names(name: str, split: str | None) -> None:
    assert split_named(name) == split


@pytest.mark.parametrize("name", ["owner/name", "imdb"])
def test_a_hub_id_that_cannot_be_had_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(TaskDataError, match=f"'{name}'.* is no local file or folder and cannot be had from the hub"):
        get_task("text-classification", Path(name)).examples("train")


def test_a_hub_data_set_is_read_with_its_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    part = datasets.Dataset.from_dict({"text": list("abcdef"), "label": [0, 1, 1, 0, 1, 0]}, features=features)
    hub = datasets.DatasetDict({"train": part, "validation": part.select([1, 2]), "unsupervised": part})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"owner/name": hub}[name])
    task = get_task("text-classification", Path("owner/name"))
    assert [(e.prompt, e.answer) for e in task.examples("validation")] == [("b", "yes"), ("c", "yes")]
    assert task.labels == ("no", "yes")


def test_a_column_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    data = write_table(tmp_path / "data.csv", ROWS)
    with pytest.raises(TaskDataError, match="has no 'sentence'; expected it among text, label"):
        get_task("text-classification", data, {"text": "sentence"}).examples("train")
    pair = get_task("text-classification", data, {"pair": "label"}).examples("train", 1)[0]
    assert (pair.pair, pair.answer) == (pair.answer, pair.group)


@pytest.mark.parametrize(
    ("task", "options", "named"),
    [
        ("vqa", {"turn": "all"}, "did you mean 'turns'"),
        ("vqa", {"turns": "some"}, "turns = 'some'"),
        ("causal-lm", {"block": 1}, "block = 1"),
        ("scienceqa", {"prompt": "ABC"}, "format code"),
        ("scienceqa", {"prompt": "QCM-ALEE"}, "format code"),
        ("digits-vqa", {"x": 1}, "this task has none"),
        ("image-classification", {1: 2}, "option '1'"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, task: str, options: dict[Any, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        get_task(task, None if task == "digits-vqa" else tmp_path, options)
    assert "\n" not in str(caught.value)


def talk(*turns: str, **further: Any) -> dict[str, Any]:
    speakers = ["human", "gpt"] * 9
    return {"conversations": [{"from": s, "value": t} for s, t in zip(speakers, turns, strict=False)], **further}


def test_every_pair_of_turns_is_a_sample_unless_only_the_first_is_wanted(tmp_path: Path) -> None:
    records = [talk("what ?", "dog", "big ?", "yes", id="1", kind=k) for k in ("a", "b", "c", "d")]
    (tmp_path / "train.json").write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "val.json").write_text(json.dumps([talk("is it ?", "no")]), encoding="utf-8")
    (tmp_path / "test.json").write_text(json.dumps([talk("was it ?", "no")]), encoding="utf-8")
    every = get_task("vqa", tmp_path, {"group_by": "kind"}).examples("train")
    assert sorted((e.group, e.prompt, e.answer) for e in every) == [
        (kind, *pair) for kind in "abcd" for pair in (("big ?", "yes"), ("what ?", "dog"))
    ]
    assert [e.answer for e in get_task("vqa", tmp_path, {"turns": "first"}).examples("train")] == ["dog"] * 4


def test_pictures_are_looked_for_beside_the_questions_or_where_the_option_says(tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    records = [talk("<image>\nwhat ?", "dog", id=str(i), image=f"{i}.png") for i in range(4)]
    (tmp_path / "q" / "train.json").write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(TaskDataError, match=r"image '0.png' named in .*train.json' is not in .*task_options, images"):
        get_task("vqa", tmp_path / "q").examples("train")
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.new("L", (8, 8), i).save(tmp_path / "pictures" / f"{i}.png")
    task = get_task("vqa", tmp_path / "q", {"images": str(tmp_path / "pictures")})
    assert {e.image for e in task.examples("train")} < {tmp_path / "pictures" / f"{i}.png" for i in range(4)}


def test_a_text_that_speaks_of_a_picture_must_have_one(tmp_path: Path) -> None:
    image = tmp_path / "images" / "1.png"
    image.parent.mkdir()
    image.touch()

    def first(**further: Any) -> Any:
        (tmp_path / "train.json").write_text(json.dumps([talk("<image>\nwhat ?", "dog", id=0, **further)]), "utf-8")
        (tmp_path / "val.json").write_text(json.dumps([talk("is it ?", "no")]), encoding="utf-8")
        (tmp_path / "test.json").write_text(json.dumps([talk("was it ?", "no")]), encoding="utf-8")
        return get_task("vqa", tmp_path).examples("train", 1)[0]

    for given in ({"image": "1.png"}, {"images": ["1.png"]}, {"image": ["1.png"]}, {"images": "1.png"}):
        assert first(**given).image == image
    for given, said in (
        ({}, r"record 0 of .*train.json' asks about an <image> but has None for 'image'; expected the name of"),
        ({"image": "", "images": []}, r"asks about an <image> but has '' for 'image'; expected"),
        ({"images": ["1.png", "2.png"]}, r"has \['1.png', '2.png'\] for 'images'; expected the name of one picture"),
        ({"image": [{"path": "1.png"}]}, r"for 'image'; expected the name of one picture"),
    ):
        with pytest.raises(TaskDataError, match=said) as caught:
            first(**given)
        assert "\n" not in str(caught.value)


def test_a_line_ends_where_json_lines_says_so(tmp_path: Path) -> None:
    """Separators of Unicode may stand within a JSON text; Windows' line ends may end one."""
    records = [talk(f"what\u2028is\u2029this\x85 {i} ?", "dog") for i in range(12)]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    for number, end in enumerate(("\n", "\r\n")):
        file = tmp_path / f"{number}.jsonl"
        file.write_bytes(end.join([*lines, ""]).encode())
        task = get_task("vqa", file)
        found = [e.prompt for split in ("train", "validation", "test") for e in task.examples(split)]  # type: ignore[arg-type]
        assert sorted(found) == sorted(record["conversations"][0]["value"] for record in records)


def test_a_byte_order_mark_is_no_part_of_the_questions(tmp_path: Path) -> None:
    file = tmp_path / "talks.json"
    file.write_text(json.dumps([talk(f"what is {i} ?", "dog") for i in range(12)]), encoding="utf-8-sig")
    assert len(get_task("vqa", file).examples("train")) == 10


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train.json", "train20.json"):
        (tmp_path / name).write_text("[]", encoding="utf-8")
    with pytest.raises(TaskDataError, match=r"'train.json' and 'train20.json' .* are both for train"):
        get_task("vqa", tmp_path).examples("train")


@needs_shared
def test_published_annotations_in_llavas_format_are_read(tmp_path: Path) -> None:
    files = {"train": "slake_train_head.json", "test": "slake_test_head.json"}
    for split, name in files.items():
        (tmp_path / f"{split}.json").write_text((SHARED / "llava_format" / name).read_text("utf-8"), encoding="utf-8")
    records = json.loads((tmp_path / "test.json").read_text("utf-8"))
    for record in [*records, *json.loads((tmp_path / "train.json").read_text("utf-8"))]:
        path = tmp_path / "images" / record["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    task = get_task("vqa", tmp_path)
    test = task.examples("test")
    assert sorted((e.image, e.answer) for e in test) == sorted(  # type: ignore[type-var]
        (tmp_path / "images" / r["image"], r["conversations"][1]["value"]) for r in records
    )
    assert {e.group for e in test} == {"OPEN", "CLOSED"}
    assert len(task.examples("train")) + len(task.examples("validation")) == 400
    pictures = [{e.image for e in task.examples(split)} for split in ("train", "validation")]
    assert not pictures[0] & pictures[1]
    assert "<image>" not in test[0].prompt


@pytest.mark.parametrize(
    ("code", "asked", "answered"),
    [
        ("QCM-A", "", "The answer is C."),
        ("QCM-AE", "", "The answer is C. BECAUSE: the dog ran"),
        ("QCM-ALE", "", "The answer is C. BECAUSE: the cat sat on the mat the dog ran"),
        ("qcm-lea", "", "the cat sat on the mat the dog ran The answer is C."),
        ("QCML-AE", "\nthe cat sat on the mat", "The answer is C. BECAUSE: the dog ran"),
    ],
)
def test_scienceqa_prompts_follow_the_format_code(tmp_path: Path, code: str, asked: str, answered: str) -> None:
    task = get_task("scienceqa", write_scienceqa(tmp_path), {"prompt": code})
    asked_of = {e.prompt.split()[2]: e for e in task.examples("train")}  # "Question: question 2 ?"
    seventh = asked_of["2"]  # four choices, the hint and no picture
    assert problem(2)["answer"] == 2
    assert seventh.prompt == (
        f"Question: question 2 ?\nContext: the old house\nOptions: (A) cat (B) dog (C) bird (D) tree{asked}\nAnswer:"
    )
    assert seventh.answer == answered
    assert seventh.group == "LAN TXT G1-6"
    assert asked_of["4"].prompt.splitlines()[1] == "Context: the old house a red tree"  # with its caption
    bare = get_task("scienceqa", tmp_path, {"captions": False}).examples("train")
    (fourth,) = (e for e in bare if e.prompt.split()[2] == "4")
    assert fourth.prompt.splitlines()[1] == "Context: the old house"


def test_scienceqa_parts_and_pictures(tmp_path: Path) -> None:
    write_scienceqa(tmp_path)
    with_picture = get_task("scienceqa", tmp_path, {"part": "image"}).examples("train")
    without = get_task("scienceqa", tmp_path, {"part": "text"}).examples("train")
    assert (len(with_picture), len(without)) == (4, 14)
    assert all(e.image is None for e in with_picture)
    (tmp_path / "images").mkdir()
    shown = get_task("scienceqa", tmp_path).examples("train")
    pictures = {e.prompt.split()[2]: e.image for e in shown}
    assert (pictures["4"], pictures["5"]) == (tmp_path / "images" / "train" / "4" / "image.png", None)


def test_the_nine_columns_by_hand(tmp_path: Path) -> None:
    folder = write_scienceqa(tmp_path)  # test: 28 to 36
    right = {str(i): problem(i)["answer"] for i in range(28, 37)}
    assert score_predictions(folder, right) == {
        **dict.fromkeys(("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12"), 1.0),
        "average": 1.0,
    }
    wrong = {**right, "28": 99, "30": "B" if right["30"] != 1 else "A", "31": "no such option"}
    found = score_predictions(folder, wrong)
    # 28 is SOC, TXT and IMG, grade 5; 30 is NAT, TXT, grade 7; 31 is SOC, NO, grade 8.
    assert found["NAT"] == pytest.approx(2 / 3)
    assert found["SOC"] == pytest.approx(1 / 3)
    assert found["LAN"] == 1.0
    assert found["TXT"] == pytest.approx(3 / 5)
    assert found["IMG"] == pytest.approx(2 / 3)
    assert found["NO"] == pytest.approx(3 / 4)
    assert found["G1-6"] == pytest.approx(2 / 3)
    assert found["G7-12"] == pytest.approx(4 / 6)
    assert found["average"] == pytest.approx(6 / 9)


def test_predictions_may_be_positions_letters_texts_or_sentences(tmp_path: Path) -> None:
    folder = write_scienceqa(tmp_path)
    pids = range(28, 37)
    letters = {str(i): "ABCDE"[problem(i)["answer"]] for i in pids}
    texts = {str(i): problem(i)["choices"][problem(i)["answer"]].upper() for i in pids}
    sentences = {pid: f"Therefore the answer is ({letter})." for pid, letter in letters.items()}
    for given in (letters, texts, sentences, {pid: str("ABCDE".index(x)) for pid, x in letters.items()}):
        (tmp_path / "p.json").write_text(json.dumps({"results": given}), encoding="utf-8")
        assert score_predictions(folder, read_predictions(tmp_path / "p.json"))["average"] == 1.0
    assert score_predictions(folder, {str(i): "?" for i in pids})["average"] == 0.0
    with pytest.raises(TaskDataError, match=r"9 of 9 problems .* have no prediction, e.g. 28"):
        score_predictions(folder, {})
    with pytest.raises(TaskDataError, match=r"split 'dev' is not in .* expected one of train, val, test, minitest"):
        score_predictions(folder, {}, "dev")
    assert len(score_predictions(folder, letters, "minitest")) > 3
    (tmp_path / "p.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(TaskDataError, match="no choices by problem id"):
        read_predictions(tmp_path / "p.json")


@needs_shared
def test_the_nine_columns_of_the_published_questions() -> None:
    """Always the first option, judged by pandas on the raw file."""
    folder = SHARED / "scienceqa"
    table = pd.DataFrame.from_dict(json.loads((folder / "problems.json").read_text("utf-8")), orient="index")
    pids = json.loads((folder / "pid_splits.json").read_text("utf-8"))["test"]
    table = table.loc[pids]
    right = 100 * (table["answer"] == 0)
    hint, picture = table["hint"] != "", table["image"].notna()
    grade = table["grade"].str.removeprefix("grade").astype(int)
    found = score_predictions(folder, dict.fromkeys(pids, 0))
    expected = {
        "NAT": right[table["subject"] == "natural science"].mean(),
        "SOC": right[table["subject"] == "social science"].mean(),
        "LAN": right[table["subject"] == "language science"].mean(),
        "TXT": right[hint].mean(),
        "IMG": right[picture].mean(),
        "NO": right[~hint & ~picture].mean(),
        "G1-6": right[grade <= 6].mean(),
        "G7-12": right[grade > 6].mean(),
        "average": right.mean(),
    }
    assert {name: 100 * value for name, value in found.items()} == pytest.approx(expected)
    task = get_task("multiple-choice", folder)
    assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [1041, 371, 361]


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"choices": ["red", "blue"], "answer": 1}, "blue"),
        ({"choices": ["red", "blue"], "answer": "A"}, "red"),
        ({"choices": ["1", "0"], "answer": "0"}, "0"),
        ({"choices": '["red", "blue"]', "answer": "1"}, "blue"),
        ({"choices": {"text": ["red", "blue", "green"], "label": ["A", "B", "C"]}, "answer": "C"}, "green"),
        ({"choices": {"text": ["red", "blue", "green"], "label": ["1", "2", "3"]}, "answer": "2"}, "blue"),
        ({"choices": {"text": ["red", "blue", "green"], "label": ["1", "2", "3"]}, "answer": 2}, "blue"),
        ({"choices": {"text": ["2", "1", "0"], "label": ["A", "B", "C"]}, "answer": 2}, "0"),
        ({"choices": {"text": ["3", "2", "1"], "label": ["1", "2", "3"]}, "answer": "3"}, "1"),
        ({"choices": {"text": ["red", "blue", "green"]}, "answer": "C"}, "green"),
        ({"choices": ["8", "2", "24", "120"], "answer": 2}, "24"),
        ({"choices": [8, 2, 24, 120], "answer": 2}, "24"),
        ({"choices": ["8", "2", "24", "120"], "answer": "2"}, "2"),
    ],
)
def test_answers_of_multiple_choice_rows(tmp_path: Path, row: dict[str, Any], right: str) -> None:
    rows = [{"question": f"{i} ?", "passage": "Long ago.", **row} for i in range(12)]
    task = get_task("multiple-choice", write_table(tmp_path / "q.jsonl", rows), {"context": "passage"})
    example = task.examples("train", 1)[0]
    assert example.answer == right
    assert example.prompt.startswith("Long ago. ")


def test_a_column_of_numbers_is_read_in_one_way(tmp_path: Path) -> None:
    """Where all are texts, one that can be no position shows that they are meant so; what is neither is refused."""
    rows = [{"question": f"{i} ?", "choices": [8, 2, 24, 120], "answer": (2, 120, 24, 8)[i % 4]} for i in range(12)]
    task = get_task("multiple-choice", write_table(tmp_path / "texts.jsonl", rows))
    found = {e.prompt: e.answer for split in ("train", "validation", "test") for e in task.examples(split)}  # type: ignore[arg-type]
    assert found == {row["question"]: str(row["answer"]) for row in rows}
    from_one = [{"question": f"{i} ?", "choices": ["red", "blue"], "answer": 1 + i % 2} for i in range(12)]
    with pytest.raises(
        TaskDataError, match=r"row 1 .* has answer '2', which names none of its 2 choices; expected a pos"
    ):
        get_task("multiple-choice", write_table(tmp_path / "one.jsonl", from_one)).examples("train")
    labels = [{"question": "?", "choices": {"text": ["red", "blue"], "label": ["A"]}, "answer": "A"}]
    with pytest.raises(
        TaskDataError, match=r"has 2 choices with the labels \['A'\]; expected a list with one for each"
    ):
        get_task("multiple-choice", write_table(tmp_path / "labels.jsonl", labels)).examples("train")


def test_choices_that_a_question_lacks_are_no_answers(tmp_path: Path) -> None:
    rows = [{"question": f"{i} ?", "choices": ["cat", "dog", "bird"][: 2 + i % 2], "answer": 1} for i in range(20)]
    task = get_task("multiple-choice", write_table(tmp_path / "q.jsonl", rows))
    split = task.encode(words(pair=True), task.examples("train"))
    assert split.tensors["input_ids"].shape[1] == 3
    assert split.extras["possible"].sum(dim=1).tolist() == [len(e.choices) for e in task.examples("train")]
    decoded = words(pair=True).decode(split.tensors["input_ids"][0, 1], skip_special_tokens=True)
    assert decoded.endswith("? dog")


def test_pictures_by_folder_with_or_without_splits(tmp_path: Path) -> None:
    flat = get_task("image-classification", draw_digits(tmp_path / "flat", 60))
    assert flat.labels == tuple(map(str, range(10)))
    assert len({e.answer for e in flat.examples("train", 20)}) == 10  # some of each, not all of the first few
    for split in ("train", "val", "test"):
        draw_digits(tmp_path / "split" / split, 20)
    (tmp_path / "split" / "train" / "0" / "notes.txt").write_text("x", encoding="utf-8")
    task = get_task("image-classification", tmp_path / "split")
    assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [20, 20, 20]
    assert task.notes == []
    with pytest.raises(TaskDataError, match="no pictures in subfolders"):
        get_task("image-classification", tmp_path / "split" / "train" / "0").examples("train")


def test_pictures_of_a_parquet_file(tmp_path: Path) -> None:
    import datasets

    def png(value: int) -> dict[str, Any]:
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "png")
        return {"bytes": file.getvalue(), "path": None}

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    rows = {"image": [png(10 * i) for i in range(20)], "label": [int(i > 9) for i in range(20)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data.parquet")
    task = get_task("image-classification", tmp_path / "data.parquet")
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False, do_normalize=False)
    examples = task.examples("train")
    split = task.encode(processor, examples)
    for label, pixels in zip(split.tensors["labels"], split.tensors["pixel_values"], strict=True):
        assert int(label) == int(255 * pixels[0, 0, 0] > 95)


def test_a_model_made_for_the_same_classes_keeps_its_order(tmp_path: Path) -> None:
    task = get_task("text-classification", write_table(tmp_path / "data.csv", ROWS))
    task.adopt_labels(["x", "y"])
    assert task.labels == ("bad", "good")
    task.adopt_labels(["good", "bad"])
    split = task.encode(words(pair=True), task.examples("train", 6))
    assert split.tensors["labels"].tolist() == [int(e.answer == "bad") for e in task.examples("train", 6)]


def test_a_class_without_training_example_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "train.csv", ROWS)
    write_table(tmp_path / "test.csv", [{"text": "x", "label": "ugly"}])
    task = get_task("text-classification", tmp_path)
    with pytest.raises(TaskDataError, match=r"class 'ugly' .* has no training example; expected one of bad, good"):
        task.encode(words(pair=True), task.examples("test"))


@pytest.mark.parametrize(("block", "rows"), [(5, 12), (7, 9), (60, 1), (200, 1)])
def test_blocks_are_the_text_and_nothing_else(tmp_path: Path, block: int, rows: int) -> None:
    tokenizer = words()
    text = [f"the cat {i} sat" for i in range(12)]
    (tmp_path / "t.txt").write_text("\n\n\n".join([*text, ""]), encoding="utf-8")
    task = get_task("causal-lm", tmp_path / "t.txt", {"block": min(block, 96)})
    examples = [e for split in ("train", "validation", "test") for e in task.examples(split)]
    split = task.encode(tokenizer, examples)
    ids = split.tensors["input_ids"][split.tensors["attention_mask"].bool()]
    assert tokenizer.decode(ids).split() == " </s> ".join([*(e.answer for e in examples), ""]).split()
    assert len(split) == rows
    assert torch.equal(split.tensors["labels"] == -100, split.tensors["attention_mask"] == 0)


def test_blocks_fit_the_model(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n\n".join(f"the cat {i} sat" for i in range(90)), encoding="utf-8")
    tokenizer = words()  # reads 96 tokens, of which 32 stay free for what is decoded
    assert (
        get_task("causal-lm", tmp_path / "t.txt")
        .encode(tokenizer, get_task("causal-lm", tmp_path / "t.txt").examples("train"))
        .tensors["input_ids"]
        .shape[1]
        == 64
    )
    task = get_task("causal-lm", tmp_path / "t.txt", {"block": 97})
    with pytest.raises(TaskDataError, match="block of task 'causal-lm' is 97; expected at most the 96 tokens"):
        task.encode(tokenizer, task.examples("train"))


def test_texts_that_the_model_cannot_read_whole_are_said(tmp_path: Path) -> None:
    records = [talk("cat " * length, "dog") for length in (5, 6, 7, 8, 93, 94, 95, 300)]
    (tmp_path / "talks.json").write_text(json.dumps(records), encoding="utf-8")
    task = get_task("vqa", tmp_path / "talks.json")
    examples = [e for split in ("train", "validation", "test") for e in task.examples(split)]
    task.encode(words(), examples)  # 96 tokens, of which two are the answer and its end
    assert task.notes[-1] == "2 of 8 texts are longer than the 96 tokens the model reads"


def test_long_texts_are_cut_where_the_model_ends(tmp_path: Path) -> None:
    rows = [{"text": "cat " * (40 * i + 1), "label": ("good", "bad")[i % 2]} for i in range(12)]
    data = write_table(tmp_path / "data.jsonl", rows)
    task = get_task("text-classification", data)
    assert task.encode(words(pair=True), task.examples("train")).tensors["input_ids"].shape[1] == 96
    short = get_task("text-classification", data, {"max_length": 10})
    assert short.encode(words(pair=True), short.examples("train")).tensors["input_ids"].shape[1] == 10


@pytest.mark.parametrize("name", ["image-classification", "vqa"])
def test_data_that_was_moved_is_split_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What a search held out must not be trained on elsewhere: by another folder's name, or by a relative path."""
    make = draw_digits if name == "image-classification" else draw_talks
    make(tmp_path / "here", 60)
    (tmp_path / "there").mkdir()
    shutil.copytree(tmp_path / "here", tmp_path / "there" / "copy")
    monkeypatch.chdir(tmp_path)
    file = "talks.json" if name == "vqa" else ""
    places = [tmp_path / "here" / file, Path("here") / file, tmp_path / "there" / "copy" / file]
    held_out = [[Path(e.image).name for e in get_task(name, place).examples("test")] for place in places]  # type: ignore[arg-type]
    assert held_out[0] == held_out[1] == held_out[2] != []
