"""How good and how cheap is the latency predictor, against measuring every trial?

python studies/bench_predictor/bench.py [--quick] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import nn

from eas_search.latency import LatencyConfig, measure_latency
from eas_search.merging import merge
from eas_search.objective import trial_latency
from eas_search.prediction import predictor_stage
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips
from eas_search.stage_folder import StageFolder
from eas_search.study.heap import settled_heap
from eas_search.workbench import Workbench

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from intervals import mean_interval  # noqa: E402
from record import load_config, write_result  # noqa: E402

FloatArray = NDArray[np.float64]


def random_configs(bench: Workbench, count: int, seed: int) -> list[SkipConfig]:
    """Distinct configurations: sizes, then sites, ranks and placements, drawn evenly."""
    rng, found = np.random.default_rng(seed), dict[SkipConfig, None]()
    indexes, choices = [site.index for site in bench.sites], bench.space.choices
    while len(found) < count:
        size = int(rng.integers(1, len(indexes) + 1))
        skip = [int(index) for index in rng.choice(indexes, size=size, replace=False)]
        dim, placement = int(rng.integers(len(choices.pia_dims))), int(rng.integers(len(choices.placements)))
        found[bench.space.config(skip, dim, placement)] = None
    return list(found)


def measured(bench: Workbench, models: Sequence[nn.Module], configs: Sequence[SkipConfig]) -> tuple[FloatArray, float]:
    """(ratios, seconds) of measuring one model after the other as trials do."""
    begin = time.perf_counter()
    pairs = zip(models, configs, strict=True)
    ratios = [trial_latency(bench, lambda m=model: m, config)[0] for model, config in pairs]
    return np.array(ratios), time.perf_counter() - begin


def predicted(bench: Workbench, configs: Sequence[SkipConfig]) -> tuple[FloatArray, float, float]:
    """(ratios, seconds with the fit, leave-one-out error that the fit claims) of a new predictor."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        predictor = predictor_stage(bench, StageFolder(Path(folder)))
        ratios = [bench.predicted_latency(config)[0] for config in configs]
        return np.array(ratios), time.perf_counter() - begin, predictor.leave_one_out


def mape(found: FloatArray, truth: FloatArray) -> float:
    """Mean absolute relative error."""
    return float(np.abs(found / truth - 1).mean())


def spearman(found: FloatArray, truth: FloatArray) -> float:
    """Spearman's rank correlation; 0 when a redrawn sample has a single value."""
    rho = float(spearmanr(found, truth).statistic)
    return rho if np.isfinite(rho) else 0.0


def with_interval(
    statistic: Callable[[FloatArray, FloatArray], float], found: FloatArray, truth: FloatArray, seed: int
) -> list[float]:
    """[mean over fits, low, high] of a statistic of `found` (fits, sets); fits and sets are redrawn."""
    rng, (fits, sets) = np.random.default_rng(seed), found.shape
    redrawn = []
    for _ in range(1000):
        columns = rng.integers(sets, size=sets)
        rows = found[np.ix_(rng.integers(fits, size=fits), columns)]
        redrawn.append(np.mean([statistic(row, truth[columns]) for row in rows]))
    low, high = np.quantile(redrawn, [0.025, 0.975])
    return [float(np.mean([statistic(row, truth) for row in found])), float(low), float(high)]


def ratio_interval(seconds: Sequence[float], others: Sequence[float], seed: int) -> tuple[float, float, float]:
    """(mean of seconds / others, low, high); runs are redrawn in pairs that followed each other."""
    return mean_interval(np.array(seconds) / np.array(others), np.random.default_rng(seed))


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="at most two minutes")
    parser.add_argument("--output", type=Path, default=HERE, help="folder whose results/ gets the file")
    options = parser.parse_args()
    config = load_config(HERE)
    config |= config.pop("quick") if options.quick else {}
    seed = config["seed"]
    common: dict[str, Any] = {"model": config["model"], "seed": seed, "latency_batch": config["latency_batch"]}
    few = {"train": 8, "validation": 64, "selection": 8, "test": 8}
    space = {"towers": config["towers"]}
    bench = Workbench.open(SearchSettings(**common, space=space, samples=few, latency="measured"))
    configs = random_configs(bench, config["sets"], seed)
    models = [merge(apply_skips(bench.model, one)).eval() for one in configs]  # untrained: the shapes are the same
    fits, runs = [], []
    with settled_heap():  # as in a search
        for _ in range(config["fits"]):
            fits.append(predicted(bench, configs))
            runs.append(measured(bench, models, configs))
    report = measure_latency(
        {str(i): model for i, model in enumerate(models)},
        bench.latency_inputs(),
        baseline=bench.model,
        config=LatencyConfig(**config["truth"], seed=seed),
    )
    truth = np.array([report[str(i)].prefill.ratio.estimate for i in range(len(models))])
    guesses, direct = np.array([fit[0] for fit in fits]), np.array([run[0] for run in runs])
    figures = {
        "mape": with_interval(mape, guesses, truth, seed),
        "spearman": with_interval(spearman, guesses, truth, seed),
        "cost": ratio_interval([fit[1] for fit in fits], [run[1] for run in runs], seed),
        "mape of trials' measurements": with_interval(mape, direct, truth, seed),
        "spearman of trials' measurements": with_interval(spearman, direct, truth, seed),
    }
    table = Table(title=f"{len(configs)} random sets of {len(bench.sites)} attentions, {len(fits)} fits")
    for heading in ("", "", "95 %", "bar"):
        table.add_column(heading)
    for name, (value, low, high) in figures.items():
        bar = config["bars"].get(name)
        wanted = "" if bar is None else f"{'≥' if name == 'spearman' else '≤'} {bar}"
        table.add_row(name, f"{value:.4f}", f"{low:.4f} – {high:.4f}", wanted)
    Console().print(table)
    content = {
        "seed": seed,
        "quick": options.quick,
        "config": config,
        "conditions": report.conditions,
        "figures": figures,
        "fit": {"seconds": [fit[1] for fit in fits], "leave_one_out": [fit[2] for fit in fits]},
        "measured_seconds": [run[1] for run in runs],
        "sets": [
            {"config": one.model_dump(mode="json"), "truth": ratio, "predicted": guess, "measured": trial}
            for one, ratio, guess, trial in zip(
                configs, truth.tolist(), guesses.T.tolist(), direct.T.tolist(), strict=True
            )
        ],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    name = "quick" if options.quick else "full"
    print("wrote", write_result(options.output, name, content, bench.hardware).name)


if __name__ == "__main__":
    main()
