"""VQAv2's own files, and the pyarrow files that ViLT and METER prepare from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eas_search.exceptions import TaskDataError
from eas_search.tasks.arrow import SOURCE as ARROW_SOURCE
from eas_search.tasks.arrow import ArrowImage, arrow_rows
from eas_search.tasks.base import Example, Split
from eas_search.tasks.layouts import field, find, read_json
from eas_search.tasks.vqa_accuracy import answer_vocabulary, soft_scores
from eas_search.tasks.vqa_normalise import normalise_answer

SOURCE = "https://visualqa.org/download.html (VQA v2.0)"
PARTS: dict[Split, str] = {"train": "train2014", "validation": "val2014"}
VQAV2 = (
    "a folder with v2_OpenEnded_mscoco_train2014_questions.json, v2_mscoco_train2014_annotations.json, both for "
    f"val2014, and the image folders train2014 and val2014 ({SOURCE}), or with ViLT's vqav2_*.arrow"
)
# Arrow files of a split; METER trains on most of the validation data and keeps the rest, where it is cut so.
CUT: dict[Split, tuple[str, ...]] = {"train": ("vqav2_train", "vqav2_trainable_val"), "validation": ("vqav2_rest_val",)}
WHOLE: dict[Split, tuple[str, ...]] = {"train": ("vqav2_train",), "validation": ("vqav2_val",)}

Found = tuple[dict[Split, list[Example]], tuple[str, ...]]


def read_original(folder: Path, least: int) -> Found:
    """(examples by split, answers that are the commonest one of at least `least` questions). Raises TaskDataError."""
    found: dict[Split, list[Example]] = {}
    commonest: list[str] = []
    for split, part in PARTS.items():
        names = [f"v2_OpenEnded_mscoco_{part}_questions.json", f"v2_mscoco_{part}_annotations.json"]
        files = [find(folder, (name, f"annotations/{name}", f"questions/{name}"), SOURCE) for name in names]
        images = find(folder, (part, f"images/{part}"), f"{SOURCE}, or https://cocodataset.org ({part}.zip)")
        questions = {row["question_id"]: row["question"] for row in _rows(files[0], "questions", _QUESTION)}
        answers = _rows(files[1], "annotations", _ANNOTATION)
        found[split] = []
        for row in answers:
            where = f"annotation {row['question_id']} of '{files[1]}'"
            if row["question_id"] not in questions:
                raise TaskDataError(f"{where} has no question in '{files[0]}'; expected both from {SOURCE}.")
            said = [field(answer, "answer", str, where) for answer in row["answers"]]
            commonest.append(row["multiple_choice_answer"])
            found[split].append(
                Example(
                    images / f"COCO_{part}_{row['image_id']:012d}.jpg",
                    questions[row["question_id"]],
                    normalise_answer(commonest[-1]),
                    str(row.get("answer_type") or "all"),
                    worth=tuple(soft_scores(said).items()),
                )
            )
    return found, answer_vocabulary(commonest, least)


_QUESTION = {"question_id": int, "question": str}
_ANNOTATION = {"question_id": int, "image_id": int, "multiple_choice_answer": str, "answers": list}


def _rows(file: Path, name: str, kinds: Mapping[str, type]) -> Iterator[dict[str, Any]]:
    """The records under `name`, each of their fields checked."""
    content = field(read_json(file, SOURCE), name, list, f"'{file}'")
    for number, row in enumerate(content):
        for key, kind in kinds.items():
            field(row, key, kind, f"record {number} of '{file}'")
        yield row


def read_arrow(folder: Path) -> Found:
    """(examples by split, answers in the order of their classes) of pyarrow files. Raises TaskDataError."""
    parts = CUT if (folder / "vqav2_rest_val.arrow").is_file() else WHOLE
    found: dict[Split, list[Example]] = {}
    classes: dict[int, str] = {}
    for split, names in parts.items():
        for name in names:
            file = find(folder, (f"{name}.arrow",), ARROW_SOURCE)
            for number, row in enumerate(arrow_rows(file, ("questions", "answers", "answer_labels", "answer_scores"))):
                image = ArrowImage(file, "image", number)
                columns = (row["questions"], row["answers"], row["answer_labels"], row["answer_scores"])
                try:
                    for question, answers, labels, scores in zip(*columns, strict=True):
                        worth = tuple(zip(answers, scores, strict=True))
                        classes.update(zip(labels, answers, strict=True))
                        best = max(worth, key=lambda pair: pair[1])[0] if worth else ""
                        found.setdefault(split, []).append(Example(image, question, best, "all", worth=worth))
                except (TypeError, ValueError) as error:
                    raise TaskDataError(
                        f"row {number} of '{file}' has not as many answers, labels and scores as questions; expected a "
                        f"file made by {ARROW_SOURCE}."
                    ) from error
    count = 1 + max(classes, default=-1)
    return found, tuple(classes.get(label, f"class {label}") for label in range(count))
