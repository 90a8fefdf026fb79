"""`lm-eval:NAME`: a task of EleutherAI's lm-evaluation-harness (extra `lm-eval`), with the harness's own prompts.

Multiple-choice tasks are scored as the harness's `acc`: the choice of the largest summed log-likelihood. Tasks that
generate are scored by greedy generation: the text must equal the target but for case, punctuation and articles; their
own filters and metrics are not used. Other kinds of task have no answer to fine-tune on and are refused.

Data is what the harness itself loads. With `--data DIR` the task definitions are those of DIR instead of the harness's
own; definitions may contain code that the harness runs, so name only a folder that you trust.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from eas_search.exceptions import ConfigError, TaskDataError
from eas_search.tasks.answers import AnswerTask, answer_ids
from eas_search.tasks.base import SPLITS, Example, Split, limited
from eas_search.tasks.order import by_digest
from eas_search.tasks.splits import complete
from eas_search.tasks.texts import prompt_options

if TYPE_CHECKING:
    from torch import Tensor

    from eas_search.tasks.scoring import Scoring

PREFIX = "lm-eval:"
KINDS = ("multiple_choice", "generate_until")
DOCS: dict[Split, str] = {"train": "training_docs", "validation": "validation_docs", "test": "test_docs"}


class LmEvalTask(AnswerTask):
    """One task of the harness; a class of its own per NAME, see `lm_eval_task`."""

    name: ClassVar[str] = PREFIX
    metric: ClassVar[str] = "accuracy"

    def __init__(self, data: Path | None = None, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(data, options)
        if data is not None and not data.is_dir():
            raise TaskDataError(f"'{data}' is no folder; expected one with task definitions of lm-eval, or no --data.")
        self.harness = _load(self.name.removeprefix(PREFIX), data)
        self._splits: dict[Split, list[Example]] | None = None
        if self.harness.OUTPUT_TYPE not in KINDS:
            raise ConfigError(
                f"task '{self.name}' is of kind {self.harness.OUTPUT_TYPE}; expected one of {', '.join(KINDS)}; choose "
                "another task."
            )

    def examples(self, split: Split, limit: int | None = None) -> list[Example]:
        """See `Task.examples`. Splits that the task lacks are set apart from what it has."""
        limited(dict.fromkeys(SPLITS, 1), split, limit)
        if self._splits is None:
            found = {part: [self._example(doc) for doc in self._docs(part)] for part in SPLITS}
            if not found["train"]:  # most tasks of the harness are for evaluation only
                source: Split = "validation" if found["validation"] else "test"
                found["train"], found[source] = found[source], []
            parts, note = complete(self.name, found, lambda example: example.prompt)
            self._splits = {part: by_digest(examples, _content) for part, examples in parts.items()}
            self.notes += [] if note is None else [note]
        return self._splits[split][: limited({s: len(e) for s, e in self._splits.items()}, split, limit)]

    def _docs(self, split: Split) -> list[Any]:
        has = {"train": "has_training_docs", "validation": "has_validation_docs", "test": "has_test_docs"}[split]
        return list(getattr(self.harness, DOCS[split])() or ()) if getattr(self.harness, has)() else []

    def _example(self, doc: Any) -> Example:
        prompt, target = self.harness.doc_to_text(doc), self.harness.doc_to_target(doc)
        if self.harness.OUTPUT_TYPE == "multiple_choice":
            choices = tuple(str(choice) for choice in self.harness.doc_to_choice(doc))
            answer = choices[target] if isinstance(target, int) else str(target)
            if isinstance(prompt, str) and answer in choices:
                return Example(None, prompt, answer, "all", choices)
        elif isinstance(prompt, str):
            answer = str(target[0] if isinstance(target, list) and target else target)
            return Example(None, prompt, answer, "all")
        raise TaskDataError(
            f"task '{self.name}' has documents without one prompt and one right answer; expected both; choose another "
            "task."
        )

    def scoring(self, tokenizer: Any, tensors: dict[str, Tensor]) -> Scoring:
        """Likelihood of the choices, or generation."""
        from eas_search.tasks.scoring import generated, likeliest

        if self.harness.OUTPUT_TYPE == "multiple_choice":
            return likeliest(self.metric)
        return generated(self.metric, tokenizer, tensors)

    def extras(
        self, tokenizer: Any, examples: Sequence[Example], texts: Sequence[str], tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tokens of every choice behind its prompt: `choice_ids` and `choice_labels` [N, C, n], `choice` [N]."""
        import torch

        if self.harness.OUTPUT_TYPE != "multiple_choice":
            return {}
        most = max(len(example.choices) for example in examples)
        rows = []
        for example, text in zip(examples, texts, strict=True):
            prompt = tokenizer(text, **prompt_options(tokenizer, text)).input_ids
            answers = [answer_ids(tokenizer, text, choice)[:-1] for choice in example.choices]
            rows += [(prompt, answer) for answer in answers] + [(prompt, [])] * (most - len(answers))
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
        for row, (prompt, answer) in enumerate(rows):
            ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer, dtype=torch.long)
        return {
            "choice_ids": ids.unflatten(0, (len(examples), most)),
            "choice_labels": labels.unflatten(0, (len(examples), most)),
            "choice": torch.tensor([example.choices.index(example.answer) for example in examples]),
        }


def _content(example: Example) -> str:
    return "\n".join(map(str, (example.prompt, example.choices, example.answer)))


def lm_eval_task(name: str) -> type[LmEvalTask]:
    """The class of the task called `lm-eval:NAME`."""
    return type("LmEvalTask", (LmEvalTask,), {"name": name})


def _load(name: str, definitions: Path | None) -> Any:
    """The harness's task. Raises ConfigError if the harness is not installed or knows no such task."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"task '{PREFIX}{name}' needs lm-evaluation-harness, which is not installed; "
            'run: pip install "eas-search[lm-eval]"'
        ) from error
    own = None if definitions is None else str(definitions)
    manager = TaskManager(include_path=own, include_defaults=own is None)
    if name not in manager.all_subtasks:
        close = manager.match_tasks([f"*{name}*"])[:3] if name else []
        hint = f"did you mean {' or '.join(close)}?" if close else "list them with: lm_eval ls tasks"
        raise ConfigError(f"task '{name}' is no single task of lm-evaluation-harness; {hint}")
    try:
        return manager.load(name)["tasks"][name]
    except Exception as error:  # the harness and the hub's client raise many kinds
        reason = " ".join(str(error).split())[:160]
        raise TaskDataError(f"data of task '{PREFIX}{name}' cannot be loaded by lm-eval: {reason}") from error
