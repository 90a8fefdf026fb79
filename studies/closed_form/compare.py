"""Accuracy before any training of PIAs: deletion against the closed-form start, by placement, on the same skip sets.

    python studies/closed_form/compare.py

The model is the adapter-only baseline (light adapters fine-tuned, nothing skipped). Skip sets are drawn from the middle
and the end of the stack, where skipping is sensible at all: the first layer is left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from eas_search.masks import question_mask
from eas_search.settings import SearchSettings
from eas_search.skipping import apply_skips
from eas_search.supernet import Supernet
from eas_search.training import fine_tune, sample_scores, seeded
from eas_search.warm_start import calibrate
from eas_search.workbench import Workbench

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from record import load_config, write_result  # noqa: E402


def main() -> None:
    """Score every skip set with every stand-in, print the table, write the result."""
    config = load_config(HERE)
    settings = SearchSettings(
        model=config["model"], task=config["task"], seed=config["seed"], samples={"test": config["test"]}
    )
    bench = Workbench.open(settings)
    with seeded(config["seed"]):
        adapted = apply_skips(bench.model, bench.space.student)
    fine_tune(adapted, bench.splits["train"], settings.baseline, config["seed"])
    dims = {"weighted": config["pia_dim"], "unweighted": config["pia_dim"], "deletion": 0}
    supernets = {
        name: Supernet(bench.model, bench.sites, bench.space.student.model_copy(update={"pia_dim": dim}))
        for name, dim in dims.items()
    }
    for supernet in supernets.values():
        supernet.take_light_adapters(adapted)
    samples = bench.splits["train"].subset(config["calibration"])
    batches = {"weighted": list(samples.batches(64))}
    batches["unweighted"] = [
        {
            **{key: value for key, value in batch.items() if key != "labels"},
            "prompt_mask": question_mask(batch["labels"]),
        }
        for batch in batches["weighted"]
    ]
    for name, calibration in batches.items():
        supernets[name].warm_start(calibrate(supernets[name].model, bench.sites, calibration))
    intact = sample_scores(adapted, bench.splits["test"]).float().mean().item()

    def score(skip: tuple[int, ...], start: str, placement: str) -> float:
        supernet = supernets[start]
        supernet.set_skips(skip, placement)  # type: ignore[arg-type]
        return sample_scores(supernet.model, bench.splits["test"]).float().mean().item()

    rng = np.random.default_rng(config["seed"])
    columns = {
        "deletion": ("deletion", "parallel"),
        "ffn": ("weighted", "ffn"),
        "residual": ("weighted", "residual"),
        "parallel": ("weighted", "parallel"),
        "parallel, unweighted fit": ("unweighted", "parallel"),
    }
    rows = []
    for size in config["skipped"]:
        for _ in range(config["sets_per_size"]):
            skip = tuple(sorted((1 + rng.choice(len(bench.sites) - 1, size=size, replace=False)).tolist()))
            rows.append({"skip": skip, **{name: score(skip, *how) for name, how in columns.items()}})
    table = Table(title=f"Held-out accuracy before any training of PIAs; nothing skipped: {intact:.3f}")
    table.add_column("skipped")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(" ".join(map(str, row["skip"])), *(f"{row[name]:.3f}" for name in columns))
    means = {}
    for size in config["skipped"]:
        chosen = [row for row in rows if len(row["skip"]) == size]
        means[size] = {name: float(np.mean([row[name] for row in chosen])) for name in columns}
        table.add_row(f"mean of {len(chosen)} sets of {size}", *(f"{means[size][name]:.3f}" for name in columns))
    Console().print(table)
    content = {"seed": config["seed"], "config": config, "intact": intact, "sets": rows, "means": means}
    print("wrote", write_result(HERE, "compare", content, bench.hardware).name)


if __name__ == "__main__":
    main()
