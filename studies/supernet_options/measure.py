"""What the options of the supernet's training gain: accuracy of students against today's defaults, same skip sets.

    python studies/supernet_options/measure.py [--final] [--quick]

Every option trains its own supernet from the same start; its students then take a trial's fine-tuning (`--final`: and a
finalist's). Seeds and options run in two processes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eas_search.joint_training import train_jointly
from eas_search.objective import make_student
from eas_search.training import FineTuneConfig, sample_scores
from eas_search.workbench import Workbench

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from record import load_config, write_result  # noqa: E402
from supernets import changed, interval, settings_of, skip_configs, supernet_from, warm_start  # noqa: E402


def start(config: dict[str, Any], seed: int, pooling: str | None) -> dict[str, Tensor]:
    """The supernet's adapters from which all options of a seed, and of a pooling, go on."""
    torch.set_num_threads(1)
    return warm_start(Workbench.open(changed(settings_of(config, seed), {"student": {"pooling": pooling}})))


def pooling_of(config: dict[str, Any], option: str) -> str | None:
    """What an option's students pool over; None: what the task needs."""
    return config["options"][option].get("student", {}).get("pooling")


def run_option(
    config: dict[str, Any], seed: int, option: str, adapters: dict[str, Tensor], stages: list[str]
) -> dict[str, Any]:
    """Accuracies of the option's students by stage, and what they cost."""
    torch.set_num_threads(1)
    changes = {name: value for name, value in config["options"][option].items() if name != "against"}
    settings = changed(settings_of(config, seed), changes)
    bench = Workbench.open(settings)
    supernet = supernet_from(bench, adapters)
    row: dict[str, Any] = {"seed": seed, "option": option}
    begin = time.process_time()
    train_jointly(bench, supernet, lambda *_: None)
    row["supernet_s"] = time.process_time() - begin
    row["supernet_passes"] = passes(settings.supernet.training)
    for stage in stages:
        training: FineTuneConfig = getattr(settings, stage)
        row[stage], row[f"{stage}_s"], row[f"{stage}_passes"] = [], 0.0, passes(training)
        for student in skip_configs(bench, config["skipped"], config["sets"]):
            begin = time.process_time()
            model = make_student(bench, supernet, student, training)
            row[f"{stage}_s"] += time.process_time() - begin
            row[stage].append(sample_scores(model, bench.splits["test"]).double().mean().item())
    return row


def passes(training: FineTuneConfig) -> int:
    """Samples that go forward or backward through the model; frozen weights need no gradient of their own."""
    return training.steps * training.batch_size * (3 if training.distill else 2)


def compare(config: dict[str, Any], rows: list[dict[str, Any]], stage: str) -> dict[str, Any]:
    """Per option: mean accuracy, and the paired gain over what it is compared with."""
    found = {}
    accuracy = {
        option: np.array([row[stage] for row in sorted(rows, key=lambda row: row["seed"]) if row["option"] == option])
        for option in config["options"]
    }
    for option, spec in config["options"].items():
        found[option] = {"accuracy": float(accuracy[option].mean()), "against": spec.get("against")}
        if "against" in spec:
            gain, low, high = interval(accuracy[option] - accuracy[spec["against"]], np.mean)
            found[option] |= {"gain": gain, "low": low, "high": high}
    return found


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--final", action="store_true", help="also a finalist's fine-tuning, several times as long")
    parser.add_argument("--quick", action="store_true", help="two seeds, two skip sets, nothing recorded")
    parser.add_argument("--options", nargs="*", help="only these, and what they are compared with")
    arguments = parser.parse_args()
    config = load_config(HERE)
    config |= config["quick"] if arguments.quick else {}
    if arguments.options:
        every = config["options"]
        wanted = {*arguments.options, *(every[name].get("against") for name in arguments.options)}
        config["options"] = {name: spec for name, spec in every.items() if name in wanted}
    stages = ["trial", "final"] if arguments.final else ["trial"]
    poolings = dict.fromkeys(pooling_of(config, option) for option in config["options"])
    cases = [(seed, pooling) for pooling in poolings for seed in config["seeds"]]
    starts = dict(zip(cases, Parallel(n_jobs=2)(delayed(start)(config, *case) for case in cases), strict=True))
    rows = []
    for row in Parallel(n_jobs=2, return_as="generator_unordered")(
        delayed(run_option)(config, seed, option, starts[seed, pooling_of(config, option)], stages)
        for option in config["options"]
        for seed in config["seeds"]
    ):
        print(f"seed {row['seed']}, {row['option']}:", {stage: np.round(row[stage], 3).tolist() for stage in stages})
        rows.append(row)
    compared = {stage: compare(config, rows, stage) for stage in stages}
    for stage, found in compared.items():
        print_table(stage, found, rows)
    if not arguments.quick:
        bench = Workbench.open(settings_of(config, config["seeds"][0]))
        print(
            "wrote",
            write_result(HERE, "options", {"config": config, "compared": compared, "rows": rows}, bench.hardware),
        )


def print_table(stage: str, found: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One line per option."""
    table = Table(title=f"Held-out accuracy after a {stage}'s fine-tuning")
    for name in ("option", "accuracy", "gain", "95 % interval", "against", "supernet s", "student s"):
        table.add_column(name)
    for option, figures in found.items():
        own = [row for row in rows if row["option"] == option]
        shown = ["", "", ""]
        if figures["against"]:
            shown = [f"{figures['gain']:+.4f}", f"{figures['low']:+.4f} … {figures['high']:+.4f}", figures["against"]]
        seconds = (
            np.mean([row["supernet_s"] for row in own]),
            np.mean([row[f"{stage}_s"] / len(row[stage]) for row in own]),
        )
        table.add_row(option, f"{figures['accuracy']:.4f}", *shown, *(f"{value:.1f}" for value in seconds))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
