"""How much of a trial's accuracy is the luck of the samples it was trained on, and how much of it do all trials share?

Once in float32, once with matrix products in bfloat16.

python studies/trial_noise/measure.py [--quick] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import kendalltau

from eas_search.joint_training import train_jointly
from eas_search.objective import make_student
from eas_search.skip_config import SkipConfig
from eas_search.stages import empty_supernet
from eas_search.training import sample_scores
from eas_search.workbench import Workbench

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from intervals import mean_interval  # noqa: E402
from record import load_config, write_result  # noqa: E402
from supernets import settings_of, skip_configs, start  # noqa: E402

Array = NDArray[np.float64]
PRECISIONS = {"float32": False, "bfloat16": True}


def luck(accuracy: Array) -> dict[str, float]:
    """Standard deviations of what the order of the training samples adds: two-way analysis of variance.

    Args:
        accuracy: [sets, orders].

    Returns:
        `alone`, of a set whose order is its own; `shared`, the part that an order adds to all sets; `left`, what is
        left where all sets are trained in one order: what it adds to one set and not to others.
    """
    sets, orders = accuracy.shape
    by_set, by_order = accuracy.mean(axis=1, keepdims=True), accuracy.mean(axis=0, keepdims=True)
    rest = accuracy - by_set - by_order + accuracy.mean()
    left = (rest**2).sum() / ((sets - 1) * (orders - 1))
    shared = max(0.0, float(by_order.var(ddof=1)) - left / sets)
    return {"alone": float(np.sqrt(shared + left)), "shared": float(np.sqrt(shared)), "left": float(np.sqrt(left))}


def luck_of_differences(accuracy: Array) -> dict[str, float]:
    """Standard deviations of what orders add to the difference of two sets, from pairs of them.

    Args:
        accuracy: [2 pairs, orders]: one of every pair, then their partners.

    Returns:
        `alone`, where each of both has an order of its own; `shared`, where they have the same one.
    """
    one, other = np.split(accuracy, 2)
    alone = one.var(axis=1, ddof=1) + other.var(axis=1, ddof=1)
    return {"alone": float(np.sqrt(alone.mean())), "shared": float(np.sqrt((one - other).var(axis=1, ddof=1).mean()))}


def neighbour(bench: Workbench, student: SkipConfig, rng: np.random.Generator) -> SkipConfig:
    """The same with one site exchanged for another one that is not the first, as a search varies its front."""
    skip = [int(index) for index in student.skip]
    others = [site.index for site in bench.sites[1:] if site.index not in skip]
    skip[int(rng.integers(len(skip)))] = int(rng.choice(others))
    return student.model_copy(update={"skip": tuple(sorted(skip))})


def agreements(seen: Array, held_out: Array, rng: np.random.Generator, draws: int = 200) -> dict[str, list[float]]:
    """Kendall's tau between trials' accuracies and the truth, for trials in one order and in orders of their own.

    The truth of a set is its held-out accuracy, averaged over the orders in which its trial was not trained.

    Args:
        seen, held_out: [sets, orders], on the validation and the held-out samples.
        rng: draws the orders of sets that have their own.
        draws: how often they are drawn.
    """
    sets, orders = seen.shape
    truth = (held_out.sum(axis=1, keepdims=True) - held_out) / (orders - 1)

    def tau(chosen: NDArray[np.int64]) -> float:
        rows = np.arange(sets)
        return float(kendalltau(seen[rows, chosen], truth[rows, chosen]).statistic)

    common = [tau(np.full(sets, order)) for order in range(orders)]
    return {"common": common, "own": [tau(rng.integers(orders, size=sets)) for _ in range(draws)]}


def measured(config: dict[str, Any], seed: int) -> tuple[list[list[int]], dict[str, Array], Array, dict[str, Any]]:
    """Students of a supernet: (skip sets, validation accuracies [sets, orders] by precision, held-out ones, hardware).

    What is held out is scored in float32, after training in float32: the truth for both.
    """
    bench = Workbench.open(settings_of(config, seed))
    supernet = start(bench, empty_supernet(bench))
    train_jointly(bench, supernet, lambda *_: None)
    students, rng = skip_configs(bench, config["skipped"], config["sets"] // 2), np.random.default_rng(seed)
    students += [neighbour(bench, student, rng) for student in students]
    held_out = np.zeros((len(students), config["orders"]))
    seen = {name: held_out.copy() for name in PRECISIONS}
    for row, student in enumerate(track(students, f"seed {seed}", console=Console(stderr=True))):
        for order in range(config["orders"]):
            for name, bf16 in PRECISIONS.items():
                bench.conditions = replace(bench.conditions, bf16=bf16)
                model = make_student(bench, supernet, student, bench.settings.trial, order)
                scores = sample_scores(model, bench.splits["validation"], conditions=bench.conditions)
                seen[name][row, order] = scores.double().mean().item()
                if not bf16:
                    held_out[row, order] = sample_scores(model, bench.splits["test"]).double().mean().item()
    return [[int(index) for index in student.skip] for student in students], seen, held_out, bench.hardware


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most two minutes")
    parser.add_argument("--output", type=Path, default=HERE, help="where results/ is")
    arguments = parser.parse_args()
    config = load_config(HERE)
    quick = config.pop("quick")
    config.update(quick if arguments.quick else {})
    rng, rows = np.random.default_rng(0), []
    for seed in config["seeds"]:
        skips, seen, held_out, hardware = measured(config, seed)
        apart = seen["bfloat16"] - seen["float32"]
        row = {"seed": seed, "skips": skips, "held_out": held_out.tolist(), "apart": [apart.mean(), apart.std(ddof=1)]}
        for name, accuracy in seen.items():
            found = {"luck": luck(accuracy), "neighbours": luck_of_differences(accuracy)}
            row[name] = {"validation": accuracy.tolist(), **found, "tau": agreements(accuracy, held_out, rng)}
        rows.append(row)
    columns = ("luck of an order, points", "shared by all", "left", "of a difference, own orders", "common order")
    table = Table("seed", "precision", *columns, "tau, own orders", "common order")
    for row in rows:
        for name in PRECISIONS:
            found = row[name]
            points = (f"{100 * value:.2f}" for value in (*found["luck"].values(), *found["neighbours"].values()))
            common, own = mean_interval(found["tau"]["common"], rng), float(np.mean(found["tau"]["own"]))
            cells = (*points, f"{own:.3f}", "{:.3f} ({:.3f} – {:.3f})".format(*common))
            table.add_row(str(row["seed"]), name, *cells)
        mean, spread = (100 * value for value in row["apart"])
        table.add_row("", f"bfloat16 is apart by {mean:+.2f} ± {spread:.2f} points", end_section=True)
    Console(width=150).print(table)
    arguments.output.mkdir(parents=True, exist_ok=True)
    content = {"seeds": config["seeds"], "quick": arguments.quick, "config": config, "rows": rows}
    print("wrote", write_result(arguments.output, "quick" if arguments.quick else "full", content, hardware).name)


if __name__ == "__main__":
    main()
