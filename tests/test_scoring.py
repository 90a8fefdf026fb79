"""Scores of single samples and of whole splits, against figures by hand and against other libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from science_files import write_scienceqa
from test_task_contract import words
from torch import nn

from eas_search.measures import accuracy_interval
from eas_search.models.calling import without_cache
from eas_search.tasks import Example, get_task
from eas_search.tasks.answers import AnswerTask
from eas_search.tasks.choices import option_count, option_letter
from eas_search.tasks.encoding import EncodedSplit
from eas_search.tasks.scores import (
    choice_match,
    class_match,
    normalised,
    normalised_match,
    token_likelihood,
)
from eas_search.tasks.scoring import by_group
from eas_search.training import sample_scores


class Letters:
    """A tokenizer whose token i is the i-th of these texts."""

    texts = ("", "No", "no", "the", ".", "dog", "yes", "big")

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool = False) -> str:
        return " ".join(self.texts[i] for i in ids.tolist() if i)


def saying(*rows: list[int]) -> torch.Tensor:
    """Logits that predict exactly these tokens at positions 1, 2, …; position 0 is not predicted."""
    logits = torch.zeros(len(rows), len(rows[0]) + 1, 8)
    for row, tokens in enumerate(rows):
        for i, token in enumerate(tokens):
            logits[row, i, token] = 5.0
    return logits


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Dog!", "dog"),
        ("Transverse  Plane", "transverse plane"),
        ("T2", "t2"),
        ("an X-Ray.", "x-ray"),
        ("3.5 %", "3.5 %"),
        ("a", "a"),
        ("The an.", "the an"),
        ("?!", "?!"),
        ("", ""),
        ("-5", "-5"),
        ("\u22125 mm.", "-5 mm"),
        ("(-.5)", "-.5"),
        (".5", ".5"),
        ("5.", "5"),
        ("- 5", "5"),
        ("-left-", "left"),
        ("3-5", "3-5"),
        ("left, upper", "left upper"),
    ],
)
def test_normalised_texts(text: str, plain: str) -> None:
    assert normalised(text) == plain


def test_a_text_matches_but_for_case_punctuation_and_articles() -> None:
    labels = torch.tensor([[-100, 1, 0]] * 4 + [[-100, -100, -100]])
    #                                       No  EOS    no  EOS   dog EOS    no then no end
    logits = torch.cat([saying([1, 0], [2, 0], [5, 0], [2, 4]), saying([1, 0])])
    assert normalised_match(logits, labels, Letters()).tolist() == [True, True, False, False, False]
    logits[0, 0, 3] = float("nan")
    assert not normalised_match(logits, labels, Letters())[0]
    longer = torch.tensor([[-100, 3, 5, 0]])  # "the dog": an article more or less, as long as it stops in time
    assert normalised_match(saying([4, 5, 0]), longer, Letters()).tolist() == [True]
    assert normalised_match(saying([7, 5, 0]), longer, Letters()).tolist() == [False]


def test_a_choice_is_the_likeliest_of_the_candidates_alone() -> None:
    logits = torch.zeros(4, 3, 6)
    logits[:, 1, 5] = 9.0  # a token that is no candidate
    logits[:, 1, 2] = torch.tensor([2.0, 1.0, 2.0, 2.0])
    logits[:, 1, 3] = torch.tensor([1.0, 2.0, 1.0, 1.0])
    logits[3, 1, 4] = float("nan")
    candidates = torch.tensor([[2, 3, -1], [2, 3, -1], [3, 2, 4], [2, 3, 4]])
    position, answer = torch.tensor([2, 2, 2, 2]), torch.tensor([0, 0, 1, 0])
    assert choice_match(logits, position, candidates, answer).tolist() == [True, False, True, False]


def test_classes_that_a_sample_does_not_have_are_never_chosen() -> None:
    logits = torch.tensor([[1.0, 2.0, 9.0], [1.0, 2.0, 9.0], [float("nan"), 2.0, 1.0]])
    labels = torch.tensor([1, 2, 1])
    assert class_match(logits, labels).tolist() == [False, True, False]
    possible = torch.tensor([[True, True, False], [True, True, True], [True, True, True]])
    assert class_match(logits, labels, possible).tolist() == [True, True, False]


def test_token_likelihood_is_the_geometric_mean_of_the_probabilities() -> None:
    probabilities = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.3, 0.3, 0.4]]])
    labels = torch.tensor([[0, 1, 1, -100]])  # the first has nothing before it, the last does not count
    expected = math.sqrt(0.25 * 0.8)
    assert token_likelihood(probabilities.log(), labels).item() == pytest.approx(expected, rel=1e-6)
    assert token_likelihood(probabilities.log() * float("nan"), labels).item() == 0.0


def test_perplexity_is_that_of_the_models_own_loss(llama: Any, tmp_path: Any) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"the cat {i} sat on the mat" for i in range(60)), encoding="utf-8")
    task = get_task("causal-lm", tmp_path / "text.txt", {"block": 12})
    split = task.encode(words(), task.examples("train"))
    split.tensors["input_ids"].remainder_(64)
    split.tensors["labels"].copy_(split.tensors["input_ids"].masked_fill(split.tensors["attention_mask"] == 0, -100))
    scores = sample_scores(llama, split, batch_size=7)
    total = count = 0.0
    with torch.no_grad():
        for i in range(len(split)):
            part = {name: tensor[i : i + 1] for name, tensor in split.tensors.items()}
            predicted = int((part["labels"][:, 1:] != -100).sum())
            loss = llama(**part).loss.item()
            assert scores[i].item() == pytest.approx(math.exp(-loss), rel=1e-4)
            total, count = total + loss * predicted, count + predicted
    assert split.scoring.report(split, scores)["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_groups_are_averaged_apart() -> None:
    groups = ("a", "b", "a", "b", "b")
    split = EncodedSplit({"labels": torch.zeros(5)}, groups)
    found = by_group(split, torch.tensor([True, False, False, True, True]))
    assert found == {"a": 0.5, "b": pytest.approx(2 / 3)}
    assert by_group(EncodedSplit({}, ("a", "a")), torch.ones(2)) == {}
    assert by_group(EncodedSplit({}, tuple(map(str, range(99)))), torch.ones(99)) == {}


def test_the_interval_of_a_mean_is_students() -> None:
    mean, low, high = accuracy_interval(torch.tensor([0.5, 0.6, 0.7]))
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # t(0.975, 2 degrees of freedom) from a table
    assert (mean, low, high) == pytest.approx((0.6, 0.6 - half, 0.6 + half), abs=1e-6)
    assert accuracy_interval(torch.tensor([0.1, 0.9]))[1:] == (0.0, 1.0)
    assert accuracy_interval(torch.tensor([0.3])) == (pytest.approx(0.3), 0.0, 1.0)
    whole = torch.tensor([1.0, 0.0, 1.0])
    assert accuracy_interval(whole) == accuracy_interval(whole.bool())


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("D. a dog", "D"),
        ("The answer is B. BECAUSE: A is wrong", "B"),
        ("It is hot. The answer is (A).", "A"),
        ("A dog", None),
        ("Brain", None),
        ("b", None),
        ("", None),
    ],
)
def test_option_letters(answer: str, letter: str | None) -> None:
    assert option_letter(answer) == letter


def test_options_are_counted_without_a_gap() -> None:
    assert option_count("which? A. cat B. dog C. bird") == 3
    assert option_count("which?\n(A) cat\n(B) dog") == 2
    assert option_count("which? A. cat C. bird") == 1
    assert option_count("no options here") == 0


class Parrot(nn.Module):
    """Generates what it is told to, and remembers what it was asked."""

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__()
        self.anchor, self.tokens = nn.Parameter(torch.zeros(1)), tokens
        self.asked: list[torch.Tensor] = []

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        self.asked.append(input_ids)
        return torch.cat([input_ids, self.tokens.expand(len(input_ids), -1)], dim=1)


def test_an_answer_behind_its_explanation_is_generated_not_teacher_forced(tmp_path: Any) -> None:
    tokenizer = words()
    task = get_task("scienceqa", write_scienceqa(tmp_path), {"prompt": "QCM-LEA"})
    examples = task.examples("train", 8)
    assert all("the cat sat on the mat the dog ran The answer is" in e.answer for e in examples)
    said = tokenizer("the big dog . The answer is B .", add_special_tokens=False, return_tensors="pt").input_ids
    parrot = Parrot(said)
    split = task.encode(tokenizer, examples)
    scores = sample_scores(parrot, split)
    assert scores.tolist() == [e.answer.endswith("The answer is B.") for e in examples]
    assert any(scores)
    assert "the dog ran" not in " ".join(tokenizer.batch_decode(parrot.asked[0]))


def test_letters_are_compared_at_their_place_and_words_as_text(tmp_path: Any) -> None:
    """In one split: a letter counts when it is likelier than the other options, whatever else is likely."""
    import json

    talks = [("which ? A. cat B. dog", "B"), ("is it red ?", "yes"), ("A. cat B. dog C. bird ?", "The answer is C.")]
    records = [
        {"id": i, "conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]}
        for i, (ask, answer) in enumerate(talks * 4)
    ]
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(records), encoding="utf-8")
    tokenizer = words()
    task = get_task("vqa", tmp_path)
    asked = {example.prompt: example for example in task.examples("train")}
    split = task.encode(tokenizer, [asked[ask] for ask, _ in talks])
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("A", "B", "C", "cat", "yes")}
    assert split.extras["position"].ne(0).tolist() == [True, False, True]
    assert split.extras["candidates"][0].tolist() == [ids["A"], ids["B"], -1]
    assert split.extras["candidates"][2].tolist() == [ids["A"], ids["B"], ids["C"]]
    assert split.tensors["input_ids"][2, split.extras["position"][2]] == ids["C"]

    def model(favour: dict[str, float]) -> Callable[..., Any]:
        row = torch.zeros(2000)
        for word, value in favour.items():
            row[ids[word]] = value

        class Constant(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.anchor = nn.Parameter(torch.zeros(1))

            def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
                return SimpleNamespace(logits=row.expand(*input_ids.shape, -1))

        return Constant()

    assert sample_scores(model({"cat": 9.0, "B": 2.0, "A": 1.0}), split).tolist() == [True, False, False]  # type: ignore[arg-type]
    assert sample_scores(model({"C": 5.0, "A": 1.0}), split).tolist() == [False, False, True]  # type: ignore[arg-type]


def test_a_forward_pass_without_cache_asks_only_who_knows_one(llama: Any, llava: Any, vit: Any) -> None:
    assert without_cache(llama) == without_cache(llava) == {"use_cache": False}
    assert without_cache(vit) == {}

    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert without_cache(Plain()) == {}


def test_chat_templates_of_bare_tokenizers_give_text() -> None:
    tokenizer = words()
    tokenizer.chat_template = "{% for m in messages %}question {{ m['content'][0]['text'] }} ?{% endfor %}"
    try:
        split = get_task("digits-vqa").encode(tokenizer, [Example(None, "big dog", "yes", "all")])
        assert tokenizer.decode(split.tensors["input_ids"][0]) == "question big dog ? yes </s>"
    finally:
        tokenizer.chat_template = None
    assert issubclass(type(get_task("digits-vqa")), AnswerTask)
