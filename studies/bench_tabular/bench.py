"""Samplers replayed on an exhaustive table: many seeds in seconds, the same budget for all.

    python studies/bench_tabular/bench.py [--quick] [--table parallel]

A trial looks up the validation accuracy; what is judged is the test accuracy of the front that a sampler ends with.
Every seed divides the samples anew, so that the noise of validation is part of the comparison.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from joblib import Parallel, delayed, parallel_config
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as RichTable

from eas_search.samplers import Proposer, make_sampler, ranking_prefixes
from eas_search.search_space import SearchSpace

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from intervals import mean_interval, median_interval  # noqa: E402
from record import load_config, write_result  # noqa: E402
from table import Judge, Table, config_of, number_of  # noqa: E402

Numbers = NDArray[np.int64]
EXHAUSTIVE = 300  # of all sets, those best by validation: what a search's surrogate is fitted to at most


def play(space: SearchSpace, sampler: Proposer, first: Numbers, judge: Judge, budget: int) -> Numbers:
    """The sets that a sampler tries, in order, behind those that are queued first."""
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for number in first:
        study.enqueue_trial(space.to_params(config_of(space, int(number))))
    tried = []
    for _ in range(budget):
        trial = study.ask(space.distributions())
        tried.append(number_of(space.to_config(trial.params).skip))
        study.tell(trial, [judge.validation[tried[-1]], judge.latency[tried[-1]]])
    return np.array(tried)


def prefixes(table: Table, space: SearchSpace, metrics: tuple[str, ...], count: int) -> Numbers:
    """Prefixes of these rankings."""
    chosen = {name: table.rankings()[name] for name in metrics}
    return np.array([number_of(one.skip) for one in ranking_prefixes(space, chosen, count)])


def search(table: Table, judge: Judge, name: str, seed: int, config: dict[str, Any], budget: int) -> Numbers:
    """What sampler `name` tries; what its metrics cost is taken from its budget."""
    space, metrics = table.space(), tuple(config["metrics"]) if name == "eas" else ()
    left = max(1, budget - table.price(metrics, config["validation"]))
    scores: Any = {one: table.rankings()[one] for one in metrics} or [0.0] * len(space.sites)
    first = prefixes(table, space, metrics, max(1, left // 3)) if metrics else np.array([], dtype=np.int64)
    return play(space, make_sampler(name, space, scores, seed, 0), first, judge, left)  # type: ignore[arg-type]


def best_of_their_size(judge: Judge, numbers: Numbers, count: int) -> Numbers:
    """The sets that fall least short of the best one with their latency, by validation."""
    best = {latency: judge.validation[judge.latency == latency].max() for latency in np.unique(judge.latency)}
    short = np.array([best[judge.latency[number]] - judge.validation[number] for number in numbers])
    return numbers[np.argsort(short, kind="stable")[:count]]


def one_seed(table: Table, seed: int, config: dict[str, Any], samplers: list[str], budget: int) -> dict[str, Any]:
    """What every method ends with under one division of the samples: hypervolumes by the two references.

    Beside them `steps`, the evaluations after which the default sampler's front, by validation, was as good as the
    bandit's final one.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    judge, space = Judge.divide(table, seed, config["validation"], config["selection"]), table.space()
    every = np.arange(1, len(table.right))
    tried = {name: search(table, judge, name, seed, config, budget) for name in samplers}
    ranked = {f"prefixes of {name}": prefixes(table, space, (name,), len(space.sites)) for name in config["peers"]}
    compared = tried | ranked | {"exhaustive": best_of_their_size(judge, every, EXHAUSTIVE)}
    fronts = {
        name: judge.finals(numbers, space, config["candidates"], config["finalists"])
        for name, numbers in compared.items()
    }
    fronts["oracle"] = judge.front(every, judge.test[every])
    result: dict[str, Any] = {}
    for reference, floor in (("zero", 0.0), ("nothing left", float(judge.test[-1]))):
        areas = {name: judge.hypervolume(front, floor) for name, front in fronts.items()}
        areas["best prefixes"] = max(areas[name] for name in ranked)
        result[reference] = areas
    if "bandit" in tried:
        goal, ours = judge.hypervolume(judge.front(tried["bandit"])), tried["eas"]
        reached = [judge.hypervolume(judge.front(ours[:count])) for count in range(1, len(ours) + 1)]
        enough = np.flatnonzero(np.array(reached) >= goal)
        spent = budget - len(ours)  # on metrics
        result["steps"] = float(spent + enough[0] + 1) if enough.size else np.inf
    return result


def compare(rows: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """Ratios of the default sampler to everything else, and of the bounds to chance, seed by seed.

    `strict` is the mean under the reference "the accuracy of skipping everything".
    """
    names = [name for name in rows[0]["zero"] if name != "eas"]
    pairs = [("eas", name) for name in names] + [("exhaustive", "random"), ("exhaustive", "best prefixes")]
    found = []
    for one, other in pairs:
        zero, strict = (
            np.array([row[reference][one] / row[reference][other] for row in rows])
            for reference in ("zero", "nothing left")
        )
        found.append({"ratio": f"{one} / {other}", **summary(zero), "strict": float(strict.mean())})
    if "steps" in rows[0]:
        steps = np.array([row["steps"] for row in rows]) / budget
        name = "median share of the budget to reach the bandit's front"
        found.append({"ratio": name, **summary(steps, median_interval), "strict": None})
    return found


def summary(values: NDArray[np.float64], middle: Any = mean_interval) -> dict[str, float]:
    """Mean (or median) over seeds with its interval, smallest and largest seed."""
    estimate, low, high = middle(values, np.random.default_rng(0))
    extremes = {"smallest": float(values.min()), "largest": float(values.max())}
    return {"mean": estimate, "low": low, "high": high, **extremes}


def main() -> None:
    """Replay, print the ratios and record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = load_config(HERE)
    config, saved = whole["bench"], {name: table["saved"] for name, table in whole["tables"].items()}
    parser.add_argument("--quick", action="store_true", help="few seeds, and only the smallest budget")
    parser.add_argument("--table", help="a name of the configuration; all that were built if left out")
    parser.add_argument("--folder", type=Path, default=HERE, help="whose results folder holds the tables")
    parser.add_argument("--output", type=Path, default=HERE, help="whose results folder gets the figures")
    options = parser.parse_args()
    seeds, budgets = (5, config["budgets"][:1]) if options.quick else (config["seeds"], config["budgets"])
    latest = {Table.load(path, saved).name: path for path in sorted((options.folder / "results").glob("table-*.json"))}
    begin, content = time.perf_counter(), []
    for name, path in latest.items():
        if options.table not in (None, name):
            continue
        table = Table.load(path, saved)
        for budget in budgets:
            samplers = ["eas", *config["samplers"]]
            jobs = (delayed(one_seed)(table, seed, config, samplers, budget) for seed in range(seeds))
            with parallel_config("loky", inner_max_num_threads=1):
                rows = Parallel(config["jobs"])(jobs)
            found = compare(rows, budget)
            areas = [row["zero"] for row in rows]
            means = {one: float(np.mean([area[one] for area in areas])) for one in areas[0]}
            content.append({"table": path.name, "budget": budget, "seeds": seeds, "ratios": found, "means": means})
            shown = RichTable(title=f"{name}: budget {budget} of {len(table.right)} sets, {seeds} seeds")
            for title in ("hypervolume", "mean", "95 % interval", "seeds from", "to", "strict mean"):
                shown.add_column(title)
            for one in found:
                values = (one["mean"], one["low"], one["high"], one["smallest"], one["largest"])
                mean, low, high, smallest, largest = (f"{value:.3f}" for value in values)
                strict = "" if one["strict"] is None else f"{one['strict']:.3f}"
                shown.add_row(one["ratio"], mean, f"{low}-{high}", smallest, largest, strict)
            Console(width=110).print(shown)
    record = {"seed": 0, "config": config, "saved": saved, "runs": content, "seconds": time.perf_counter() - begin}
    print("wrote", write_result(options.output, "bench", record, {"note": "no figure depends on the hardware"}).name)


if __name__ == "__main__":
    main()
