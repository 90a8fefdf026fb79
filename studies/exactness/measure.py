"""Largest differences of merged students, and of earlier logits under a change of later tokens.

python studies/exactness/measure.py
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from eas_search.merging import merge
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.skipping import adapter_parameters, apply_skips
from eas_search.supernet import Supernet
from eas_search.training import FineTuneConfig, fine_tune
from eas_search.warm_start import calibrate
from eas_search.workbench import Workbench

PLACEMENTS = ("ffn", "residual", "parallel")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from record import load_config, write_result  # noqa: E402


def padded(prompts: dict[str, Tensor], side: str, pad: int) -> dict[str, Tensor]:
    """The prompts with three more padding tokens, on one side; real tokens stay in one block."""
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    rows = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    length = max(len(row) for row in rows) + 3
    new_ids = torch.full((len(rows), length), pad)
    new_mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        new_ids[i, place], new_mask[i, place] = row, 1
    return {**prompts, "input_ids": new_ids, "attention_mask": new_mask}


def logits(model: Any, inputs: dict[str, Tensor], new: Tensor, cached: bool) -> Tensor:
    """Logits of the visible prompt tokens and of the new tokens, [tokens, V]."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    n = ids.shape[1]
    whole = torch.cat([mask, torch.ones_like(new)], dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    extra = {"pixel_values": inputs["pixel_values"]}
    if not cached:
        prompt = torch.cat([mask, torch.zeros_like(new)], dim=1).bool()
        every = torch.cat([ids, new], dim=1)
        out = model(
            input_ids=every, attention_mask=whole, position_ids=positions, prompt_mask=prompt, use_cache=False, **extra
        ).logits
    else:
        first = model(input_ids=ids, attention_mask=mask, position_ids=positions[:, :n], use_cache=True, **extra)
        parts, cache = [first.logits], first.past_key_values
        for t in range(new.shape[1]):
            step = model(
                input_ids=new[:, t : t + 1],
                attention_mask=whole[:, : n + t + 1],
                position_ids=positions[:, n + t : n + t + 1],
                past_key_values=cache,
                use_cache=True,
            )
            parts.append(step.logits)
        out = torch.cat(parts, dim=1)
    return out[whole.bool()]


def started_supernet(bench: Workbench, adapted: nn.Module, config: SkipConfig) -> Supernet:
    """A supernet as the search starts it: trained light adapters, PIAs in closed form, and routers that do route."""
    supernet = Supernet(bench.model, bench.sites, config)
    if config.adapter_dim > 0:
        supernet.take_light_adapters(adapted)
    samples = bench.splits["train"].subset(512)
    supernet.warm_start(calibrate(supernet.model, bench.sites, samples.batches(64)))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter_parameters(supernet.model).items():
        if "router" in name:
            parameter.data.normal_(std=0.5, generator=generator)
    return supernet


@torch.no_grad()
def earlier_change(student: nn.Module, batch: dict[str, Tensor], pooling: str, image_token: int) -> float:
    """Largest change of a logit before the changed token, over all tokens that may change."""
    labels, ids = batch["labels"], batch["input_ids"]
    if pooling == "prompt":
        # The last labelled token of the first sample; labels stay, so the prompt does too.
        changes = [int((labels[0] != -100).nonzero()[-1])]
    else:
        changes = [t for t in range(1, ids.shape[1]) if ids[0, t] != image_token and batch["attention_mask"][0, t]]
    base = student(**batch, use_cache=False).logits
    worst = 0.0
    for t in changes:
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 7) % (image_token - 1)
        after = student(**{**batch, "input_ids": changed}, use_cache=False).logits
        worst = max(worst, (after - base)[0, :t].abs().max().item())
    return worst


def all_students(bench: Workbench, config: dict[str, Any], router: str, pooling: str, adapter_dim: int) -> list[Any]:
    """Students of every placement and skip set of the study that share router, pooling and light adapters."""
    common = SkipConfig(pia_dim=config["pia_dim"], router=router, pooling=pooling, adapter_dim=adapter_dim)
    adapted = apply_skips(bench.model, common)
    if adapter_dim > 0:
        fine_tune(
            adapted, bench.splits["train"], FineTuneConfig(steps=config["steps"], learning_rate=1e-2), config["seed"]
        )
    supernet = started_supernet(bench, adapted, common)
    students = []
    for skip, placement in itertools.product(config["skips"], PLACEMENTS):
        student = apply_skips(bench.model, common.model_copy(update={"skip": tuple(skip), "placement": placement}))
        supernet.inherit(student)
        students.append(student.eval())
    return students


def main() -> None:
    """Measure, print, record."""
    config = load_config(HERE)
    bench = Workbench.open(SearchSettings(model=config["model"], task=config["task"], seed=config["seed"]))
    pad = bench.processor.tokenizer.pad_token_id
    image_token = bench.model.config.image_token_id
    batch = next(iter(bench.splits["train"].batches(4)))
    merged_worst: dict[str, dict[str, float]] = {}
    more_worst: dict[str, dict[str, float]] = {}
    earlier: dict[str, float] = defaultdict(float)
    forms = itertools.product(("static", "routed"), ("prompt", "prefix", "none"), (0, config["adapter_dim"]))
    students = [student for form in forms for student in all_students(bench, config, *form)]
    for student in students:
        placement, pooling = student.eas.config.placement, student.eas.config.pooling
        merged = merge(student).eval()
        changes = [earlier_change(one, batch, pooling, image_token) for one in (student, merged)]
        earlier[pooling] = max(earlier[pooling], *changes)
        for size, side, cached in itertools.product((1, 4), ("left", "right"), (False, True)):
            inputs = padded(bench.splits["validation"].prompts(size), side, pad)
            new = batch["input_ids"][:size, 17 : 17 + config["decode_tokens"]]
            with torch.no_grad():
                pair = [logits(model, inputs, new, cached) for model in (student, merged)]
            key = f"{len(student.eas.skipped)} skipped: {' '.join(map(str, student.eas.config.skip))}"
            row = merged_worst.setdefault(key, dict.fromkeys(PLACEMENTS, 0.0))
            row[placement] = max(row[placement], (pair[0] - pair[1]).abs().max().item())
        inputs = bench.splits["validation"].prompts(config["more_prompts"])
        visible = inputs["attention_mask"].bool()
        with torch.no_grad():
            pair = [model(**inputs, use_cache=False).logits[visible] for model in (student, merged)]
        row = more_worst.setdefault(key, dict.fromkeys(PLACEMENTS, 0.0))
        row[placement] = max(row[placement], (pair[0] - pair[1]).abs().max().item())
    console = Console()
    for title, rows in (("batch 1 and 4", merged_worst), (f"{config['more_prompts']} other prompts", more_worst)):
        table = Table(title=f"Largest logit difference, merged against unmerged (float32), {title}")
        table.add_column("skip set")
        for placement in PLACEMENTS:
            table.add_column(placement, justify="right")
        for key, row in rows.items():
            table.add_row(key, *(f"{value:.1e}" for value in row.values()))
        console.print(table)
    for pooling, value in earlier.items():
        console.print(f"pooling {pooling}: largest change of an earlier logit: {value!r}")
    found = {"merged": merged_worst, "more_prompts": more_worst, "earlier": earlier}
    content = {"seed": config["seed"], "config": config, **found}
    print("wrote", write_result(HERE, "measure", content, bench.hardware).name)


if __name__ == "__main__":
    main()
