"""`causal-lm`: plain language modelling on texts, packed into blocks of equal length.

Texts are the paragraphs of .txt files or the rows of a table's column text. They are joined, each followed by the
end-of-sequence token, and cut into blocks; the last block may be shorter. A limit counts texts, not blocks. It takes
runs of texts that follow each other in the data, so that a block reads on where it can, from all over the data, so that
it is not the first chapter alone. The score of a block is one over its perplexity (see `scores.token_likelihood`); that
of the corpus is reported with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from eas_search.exceptions import TaskDataError
from eas_search.models.options import Head
from eas_search.tasks.base import Example, Split, TaskOptions, require_examples
from eas_search.tasks.order import in_runs
from eas_search.tasks.sources import FileTask, column, read_rows
from eas_search.tasks.texts import readable

if TYPE_CHECKING:
    from eas_search.tasks.encoding import EncodedSplit

BLOCK = 256
RUN = 16  # texts that stay together; of paragraphs, several blocks
ROOM = 32  # tokens that stay free of what a model can read, so that decoding can be timed behind a block


class CausalLmOptions(TaskOptions):
    """Options of `causal-lm`.

    Attributes:
        text: column of a table.
        block: tokens of a block; None: 256, or fewer if the model cannot read that many.
    """

    text: str = "text"
    block: int | None = Field(default=None, ge=2)


class CausalLm(FileTask):
    """Language modelling."""

    name: ClassVar[str] = "causal-lm"
    head: ClassVar[Head] = "causal-lm"
    metric: ClassVar[str] = "token likelihood"
    Options: ClassVar[type[TaskOptions]] = CausalLmOptions
    layout: ClassVar[str] = (
        "a text file, a table (jsonl, json, csv or parquet) with column text, a folder with one per split, or a hub id"
    )
    options: CausalLmOptions

    def read(self) -> Mapping[Split, Sequence[Example]]:
        """See `FileTask.read`. Empty texts are left out."""
        found: dict[Split, list[Example]] = {}
        for split, rows in read_rows(self.place, self.name, self.layout).items():
            texts = (str(column(row, [self.options.text], f"row {i} of '{self.place}'")) for i, row in enumerate(rows))
            found[split] = [Example(None, "", text.strip(), "text") for text in texts if text.strip()]
        return found

    def key(self, example: Example) -> str:
        """Equal texts stay together."""
        return example.answer

    def arranged(self, examples: Sequence[Example]) -> list[Example]:
        """See `FileTask.arranged`."""
        return in_runs(examples, self.content, RUN)

    def encode(self, processor: Any, examples: Sequence[Example]) -> EncodedSplit:
        """Blocks of tokens [N, n], every one of them its own label. N is the number of blocks, not of texts."""
        import torch

        from eas_search.tasks.encoding import EncodedSplit
        from eas_search.tasks.scores import IGNORED
        from eas_search.tasks.scoring import TOKEN_LIKELIHOOD

        require_examples(self.name, examples)
        tokenizer = getattr(processor, "tokenizer", processor)
        texts = [example.answer for example in examples]
        separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        # The tokenizer would warn of texts that are longer than what the model reads; they are cut into blocks.
        rows = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        stream = torch.tensor([token for ids in rows for token in (*ids, *separator)])
        block = min(self._block(tokenizer), len(stream))
        if block < 2:
            raise TaskDataError(f"task '{self.name}' got a text of {block} token(s); expected 2 or more; add data.")
        # A block of one token would predict nothing.
        count = len(stream) // block + (len(stream) % block > 1)
        ids = torch.zeros(count * block, dtype=torch.long)
        real = min(len(stream), len(ids))
        ids[:real] = stream[:real]
        mask = torch.zeros(count * block, dtype=torch.long)
        mask[:real] = 1
        tensors = {
            "input_ids": ids.view(count, block),
            "attention_mask": mask.view(count, block),
            "labels": ids.masked_fill(mask == 0, IGNORED).view(count, block),
        }
        return EncodedSplit(tensors, ("text",) * count, TOKEN_LIKELIHOOD)

    def _block(self, tokenizer: Any) -> int:
        limit = readable(tokenizer)
        if self.options.block is None:
            return BLOCK if limit is None else max(2, min(BLOCK, limit - ROOM))
        if limit is not None and self.options.block > limit:
            raise TaskDataError(
                f"block of task '{self.name}' is {self.options.block}; expected at most the {limit} tokens that the "
                "model can read; lower it."
            )
        return self.options.block
