"""Accuracy with PIAs / with nothing in the attentions' place, for the same skip sets and the same steps.

    python studies/bench_pia/bench.py [--quick]

Without a step PIAs are the closed-form ones; with a trial's steps both start from the same jointly trained light
adapters, and "deletion, own supernet" from light adapters that were trained jointly with nothing in the place instead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from rich.console import Console
from rich.table import Table

from eas_search.joint_training import train_jointly
from eas_search.objective import make_student
from eas_search.skip_config import SkipConfig
from eas_search.stage_folder import StageFolder
from eas_search.supernet import Supernet
from eas_search.training import FineTuneConfig, sample_scores
from eas_search.workbench import Workbench

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from record import load_config, write_result  # noqa: E402
from supernets import interval, settings_of, skip_configs, supernet_from, warm_start  # noqa: E402

OWN, WORK = "own supernet", HERE / "work"


def run_seed(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Accuracies of one seed's skip sets by number of steps and what stands in the attentions' place."""
    torch.set_num_threads(1)
    bench = Workbench.open(settings_of(config, seed))
    trial, update = bench.settings.trial, {name: config[name] for name in ("placement", "pia_dim")}
    skips = [student.model_copy(update=update) for student in skip_configs(bench, config["skipped"], config["sets"])]
    start = warm_start(bench)
    supernet = supernet_from(bench, start)
    untrained = trial.model_copy(update={"steps": 0})
    row: dict[str, Any] = {"seed": seed, "skip": [student.skip for student in skips]}
    row["0"] = {
        "pia": score(bench, supernet, skips, untrained),
        "deletion": score(bench, supernet, bare(skips), untrained),
    }
    train_jointly(bench, supernet, lambda *_: None)
    deleting = Supernet(bench.model, bench.sites, bench.space.student.model_copy(update={"pia_dim": 0}))
    deleting.load_adapters({name: start[name] for name in deleting.adapters()})
    train_jointly(bench, deleting, lambda *_: None)
    row[str(trial.steps)] = {
        "pia": score(bench, supernet, skips, trial),
        "deletion": score(bench, supernet, bare(skips), trial),
        OWN: score(bench, deleting, bare(skips), trial),
    }
    return row


def kept_row(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """`run_seed`, or what an earlier, interrupted run with this configuration has kept of the seed."""
    same = json.dumps({name: value for name, value in config.items() if name not in ("seeds", "quick")}, sort_keys=True)
    name = f"{hashlib.sha256(same.encode()).hexdigest()[:12]}-{seed}"
    return StageFolder(WORK).once(name, lambda: run_seed(config, seed))


def bare(students: list[SkipConfig]) -> list[SkipConfig]:
    """The same skip sets with nothing in the attentions' place."""
    return [student.model_copy(update={"pia_dim": 0}) for student in students]


def score(bench: Workbench, supernet: Supernet, students: list[SkipConfig], training: FineTuneConfig) -> list[float]:
    """Held-out accuracy of every student after its fine-tuning."""
    models = (make_student(bench, supernet, student, training) for student in students)
    return [sample_scores(model, bench.splits["test"]).double().mean().item() for model in models]


def ratios(config: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean accuracy with PIAs / without, by steps, number of skipped sites and what is compared with."""
    found = []
    for steps in (key for key in rows[0] if key.isdigit()):
        for position, size in enumerate(config["skipped"]):
            for peer in (name for name in rows[0][steps] if name != "pia"):
                mine = slice(position, None, len(config["skipped"]))
                own = np.array([[np.mean(row[steps][name][mine]) for name in ("pia", peer)] for row in rows])
                ratio, low, high = interval(own, lambda drawn: drawn[:, 0].mean() / drawn[:, 1].mean())
                means = dict(zip(("pia", "without"), own.mean(axis=0).tolist(), strict=True))
                found.append({"steps": int(steps), "skipped": size, "peer": peer, **means, "ratio": ratio})
                found[-1] |= {"low": low, "high": high}
    return found


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two seeds, two sets of each size, nothing recorded")
    config = load_config(HERE)
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="earlier results whose seeds count, too")
    options = parser.parse_args()
    quick = options.quick
    config |= config["quick"] if quick else {}
    rows = Parallel(n_jobs=options.jobs)(delayed(kept_row)(config, seed) for seed in config["seeds"])
    rows = [row for file in options.add for row in json.loads(file.read_text(encoding="utf-8"))["rows"]] + rows
    seeds = [row["seed"] for row in rows]
    assert len(set(seeds)) == len(seeds), f"seeds {sorted(seeds)}: one counts twice"
    found = ratios(config, rows)
    table = Table(title=f"Held-out accuracy with PIAs / with nothing in the attentions' place, {len(rows)} seeds")
    for name in ("steps", "skipped", "without: which", "PIA", "without", "ratio", "95 % interval"):
        table.add_column(name)
    for line in found:
        figures = (f"{line['pia']:.3f}", f"{line['without']:.3f}", f"{line['ratio']:.3f}")
        shown = f"{line['low']:.3f} … {line['high']:.3f}"
        table.add_row(str(line["steps"]), str(line["skipped"]), line["peer"], *figures, shown)
    Console(width=110).print(table)
    if not quick:
        hardware = Workbench.open(settings_of(config, config["seeds"][0])).hardware
        print("wrote", write_result(HERE, "bench", {"config": config, "ratios": found, "rows": rows}, hardware))
    shutil.rmtree(WORK)  # finished: another run is another measurement, perhaps of other code


if __name__ == "__main__":
    main()
