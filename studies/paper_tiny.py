"""Tiny stand-ins for the paper's models and data sets, in their original layouts: whole runs, offline, in minutes.

    python studies/paper_tiny.py                # writes runs/paper_tiny/MODEL and runs/paper_tiny/DATA_SET

The pictures are coloured rectangles and what is asked about them can be seen in them, so that there is something to
learn. Nothing is random but by a fixed seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 60, 220),
    "yellow": (230, 220, 40),
    "white": (240, 240, 240),
    "black": (15, 15, 15),
}
NAMES = tuple(COLOURS)
SIZE = 32
SENTENCES = (
    "what colour is the left half ? what is the right half ? is it all one colour ? yes no 2 1",
    "both pictures are left picture is the right one same colours a photograph of beside and how many colours",
)


def draw(left: str, right: str, file: Path) -> None:
    """A picture whose halves have two colours."""
    from PIL import Image

    picture = Image.new("RGB", (SIZE, SIZE), COLOURS[left])
    picture.paste(COLOURS[right], (SIZE // 2, 0, SIZE, SIZE))
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def halves(i: int) -> tuple[str, str]:
    """The colours of picture i; 36 in a row differ."""
    return NAMES[i % 6], NAMES[(i + i // 6) % 6]


def write_vqav2(folder: Path, train: int = 90, validation: int = 30) -> Path:
    """Questions and annotations of ten people in VQAv2's files; some of them see it differently."""
    for part, first, count in (("train2014", 0, train), ("val2014", train, validation)):
        questions, annotations = [], []
        for i in range(first, first + count):
            left, right = halves(i)
            draw(left, right, folder / part / f"COCO_{part}_{i:012d}.jpg")
            same = left == right
            asked = (
                ("What colour is the left half?", left, "other"),
                ("Is it all one colour?", "yes" if same else "no", "yes/no"),
                ("How many colours?", "one" if same else "2", "number"),
            )
            for k, (question, answer, kind) in enumerate(asked):
                number = 10 * i + k
                people = [answer if p > i % 4 else NAMES[(i + p) % 6] for p in range(10)]
                questions.append({"image_id": i, "question": question, "question_id": number})
                annotations.append(
                    {
                        "question_id": number,
                        "image_id": i,
                        "answer_type": kind,
                        "question_type": " ".join(question.lower().split()[:2]),
                        "multiple_choice_answer": answer,
                        "answers": [
                            {"answer": said, "answer_confidence": "yes", "answer_id": 1 + p}
                            for p, said in enumerate(people)
                        ],
                    }
                )
        _write(folder / f"v2_OpenEnded_mscoco_{part}_questions.json", {"questions": questions})
        _write(folder / f"v2_mscoco_{part}_annotations.json", {"annotations": annotations})
    return folder


def write_nlvr2(folder: Path, train: int = 160, rest: int = 40) -> Path:
    """Sentences about two pictures in NLVR2's files; half of them are true."""
    for part, first, count in (("train", 0, train), ("dev", train, rest), ("test1", train + rest, rest)):
        lines = []
        for i in range(first, first + count):
            one, other = halves(i), halves(7 * i + 3)
            name, place = f"{part}-{i}-0", f"{i % 3}" if part == "train" else ""
            for k, pair in enumerate((one, other)):
                draw(*pair, folder / "images" / part / place / f"{name}-img{k}.png")
            colour = one[0] if i % 2 else NAMES[(NAMES.index(one[0]) + 1) % 6]
            record = {"identifier": f"{name}-{i % 4}", "sentence": f"The left picture is {colour} on its left half."}
            record |= {"label": "True" if i % 2 else "False", **({"directory": int(place)} if place else {})}
            lines.append(json.dumps(record))
        _write(folder / "data" / f"{part}.json", "\n".join(lines))
    return folder


def write_flickr30k(folder: Path, train: int = 60, rest: int = 16) -> Path:
    """Captions in Karpathy's file, two per picture."""
    records = []
    for split, first, count in (("train", 0, train), ("val", train, rest), ("test", train + rest, rest)):
        for i in range(first, first + count):
            left, right = halves(i)
            draw(left, right, folder / "flickr30k-images" / f"{i}.jpg")
            said = (f"A photograph of {left} beside {right}, {i}.", f"Left it is {left} and right {right}, {i}.")
            sentences = [{"raw": raw, "imgid": i, "sentid": 2 * i + k} for k, raw in enumerate(said)]
            records.append({"imgid": i, "filename": f"{i}.jpg", "split": split, "sentences": sentences})
    _write(folder / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": records})
    return folder


def write_slake(folder: Path, train: int = 90, test: int = 30) -> Path:
    """Open and closed questions in the LLaVA format of SLAKE."""
    for part, first, count in (("train", 0, train), ("test", train, test)):
        records = []
        for i in range(first, first + count):
            left, right = halves(i)
            draw(left, right, folder / "images" / f"xmlab{i}" / "source.jpg")
            asked = (
                ("what is on the left and on the right ?", f"{left} and {right}", "OPEN"),
                ("is it all one colour ?", "yes" if left == right else "no", "CLOSED"),
            )
            for k, (question, answer, kind) in enumerate(asked):
                records.append(_talk(f"{2 * i + k}", f"xmlab{i}/source.jpg", question, answer, kind))
        _write(folder / f"slake_{part}.json", records)
    return folder


def write_aid(folder: Path, train: int = 90, test: int = 30) -> Path:
    """What is this a picture of, in the LLaVA format of AID."""
    for part, first, count in (("train20", 0, train), ("test20", train, test)):
        records = []
        for i in range(first, first + count):
            left, right = halves(i)
            name = f"{left}/{left}_{i}.jpg"
            draw(left, right, folder / "images" / name)
            records.append(_talk(str(i), name, "what is the label for this image ?", left, "CLOSED"))
        _write(folder / f"aid_{part}.json", records)
    return folder


def _talk(number: str, image: str, question: str, answer: str, kind: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": number, "image": image, "answer_type": kind, "conversations": turns}


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def tokenizer(texts: Iterable[str] = (*SENTENCES, " ".join(NAMES)), **special: str) -> Any:
    """A word-level tokenizer of these texts, and of single digits."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Digits, Punctuation, Sequence, Whitespace
    from transformers import PreTrainedTokenizerFast

    marks = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    words = sorted({word for text in texts for word in text.lower().split()} | set("0123456789.,?"))
    vocabulary = {word: i for i, word in enumerate([*marks.values(), *words])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer = Lowercase()
    made.pre_tokenizer = Sequence([Whitespace(), Punctuation(), Digits(individual_digits=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **marks)


def save_meter(folder: Path, num_images: int = 1, layers: int = 3) -> Path:
    """A METER of width 32 with random weights, its tokenizer and its image processor."""
    import torch

    from eas_search.models.meter import MeterConfig, MeterForClassification
    from eas_search.models.meter.processing import save_folder

    words = tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {"vocab_size": len(words), "max_position_embeddings": 80, "num_hidden_layers": 2}
    marks = {name: getattr(words, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    config = MeterConfig(
        **small,
        num_hidden_layers=layers,
        num_images=num_images,
        num_labels=2,
        text_config={**small, **text, **marks},
        vision_config={**small, "num_hidden_layers": 2, "image_size": SIZE, "patch_size": 8},
    )
    torch.manual_seed(0)
    save_folder(MeterForClassification(config), words, folder)
    return folder


def llava_processor() -> Any:
    """Tokenizer and image processor of the tiny LLaVA."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = tokenizer(("what is on the left and right label for this image yes no", *SENTENCES, " ".join(NAMES)))
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def save_llava(folder: Path, layers: int = 4) -> Path:
    """A LLaVA of width 32 with random weights, its tokenizer and its processor."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    processor = llava_processor()
    words = processor.tokenizer
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    marks = {name: getattr(words, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, num_hidden_layers=2, image_size=SIZE, patch_size=8),
        text_config=LlamaConfig(**small, **marks, vocab_size=len(words), num_hidden_layers=layers, head_dim=8),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "meter": save_meter,
    "meter_nlvr2": lambda folder: save_meter(folder, num_images=2),
    "llava": save_llava,
    "vqav2": write_vqav2,
    "nlvr2": write_nlvr2,
    "flickr30k": write_flickr30k,
    "slake": write_slake,
    "aid": write_aid,
}


def main() -> None:
    """Write all of them below runs/paper_tiny, or the folder that was named."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/paper_tiny")
    for name, build in BUILDERS.items():
        build(root / name)
    print(f"wrote {', '.join(BUILDERS)} to {root}")


if __name__ == "__main__":
    main()
