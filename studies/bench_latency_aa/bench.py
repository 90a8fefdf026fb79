"""Does the latency interval keep its promise?  A/A coverage, width, and repetition in other processes.

    python studies/bench_latency_aa/bench.py [--quick] [--threads N] [--seed N] [--output FOLDER]

The model is a random 12-layer Llama; the candidate is the same with the attention of four layers removed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from eas_search.latency import LatencyConfig, PhaseLatency, Ratio, measure_latency

REMOVED = (2, 5, 7, 10)
PHASES = ("prefill", "decode")
SETTINGS: dict[str, Callable[..., LatencyConfig]] = {"fast": LatencyConfig.fast, "default": LatencyConfig}


class WithoutAttention(nn.Module):
    """A Llama layer whose attention is deleted: what is left is the second norm and the FFN."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(self, hidden: torch.Tensor, **_: Any) -> torch.Tensor:
        """(B, n, d) to (B, n, d)."""
        return hidden + self.mlp(self.norm(hidden))


def build() -> tuple[nn.Module, nn.Module, dict[str, torch.Tensor]]:
    """Baseline, candidate and inputs (batch 8, 28 tokens), the same in every process."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 12, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}
    baseline = LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()
    candidate = copy.deepcopy(baseline)
    for index in REMOVED:
        candidate.model.layers[index] = WithoutAttention(candidate.model.layers[index])
    tokens = torch.randint(0, 512, (8, 28))
    return baseline, candidate, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def facts(phase: PhaseLatency | None) -> dict[str, Any] | None:
    """What is kept of one measurement: its ratio, the spread of its rounds and the baseline's median."""
    if phase is None:
        return None
    logs = np.log(np.asarray(phase.timing.samples) / np.asarray(phase.baseline.samples))
    centres = np.median(logs, axis=1)
    return {
        **phase.ratio.to_dict(),
        "baseline_s": phase.baseline.median,
        "round_sd": float(centres.std(ddof=1)),
    }


def measure(candidate: nn.Module, setting: str, threads: int | None, seed: int) -> dict[str, Any]:
    """One run of `measure_latency` against the baseline: phase → facts, and the seconds that it took."""
    baseline, _, inputs = build()
    report = measure_latency(candidate, inputs, baseline, SETTINGS[setting](threads=threads, seed=seed))
    return {
        "prefill": facts(report.prefill),
        "decode": facts(report.decode),
        "seconds": report.conditions["seconds"],
    }


def sequential(samples: int, threads: int | None) -> float:
    """The ratio of two identical models, one timed after the other, from `samples` prefills of each."""
    baseline, _, inputs = build()
    medians = []
    if threads is not None:
        torch.set_num_threads(threads)
    with torch.inference_mode():
        for model in (copy.deepcopy(baseline), baseline):
            durations = []
            for index in range(samples + 2):
                start = time.perf_counter()
                model(**inputs, use_cache=True, logits_to_keep=1)
                if index >= 2:
                    durations.append(time.perf_counter() - start)
            medians.append(np.median(durations))
    return float(medians[0] / medians[1])


def identical(setting: str, runs: int, threads: int | None, seed: int) -> dict[str, Any]:
    """A/A: identical models, interleaved and, with as many prefills, sequentially, run by run in turn."""
    config = SETTINGS[setting]()
    model = build()[0]
    interleaved, one_by_one = [], []
    for run in range(runs):
        interleaved.append(measure(model, setting, threads, seed + run))
        one_by_one.append(sequential(config.rounds * config.blocks, threads))
    found = {
        "sequential_spread": spread(one_by_one),
        "seconds": median([run["seconds"] for run in interleaved]),
    }
    for phase in PHASES:
        if interleaved[0][phase] is not None:
            found[phase] = summary([run[phase] for run in interleaved])
    found["width_over_sequential"] = width_over_sequential(interleaved, one_by_one, seed)
    return found


def width_over_sequential(interleaved: list[dict[str, Any]], one_by_one: list[float], seed: int) -> list[float]:
    """[ratio, low, high]: median width of the runs' own prefill intervals over the spread of sequential timing.

    The interval redraws runs.
    """
    own = [run["prefill"]["within_run"] for run in interleaved]
    widths = np.array([np.log(high / low) for low, high in own])
    ratios, rng = np.asarray(one_by_one), np.random.default_rng(seed)
    drawn = [rng.integers(len(widths), size=len(widths)) for _ in range(2000)]
    spreads = np.array([spread(ratios[rows]) for rows in drawn])
    with np.errstate(divide="ignore"):  # of very few runs all may be the same one
        redrawn = np.array([median(widths[rows]) for rows in drawn]) / spreads
    low, high = np.quantile(redrawn, [0.025, 0.975])
    return [median(widths) / spread(one_by_one), float(low), float(high)]


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Coverage of 1.00 by both intervals, median widths and spread of the estimates, all of log ratios."""

    def covered(low: list[float], high: list[float]) -> float:
        return float(np.mean([a <= 1 <= b for a, b in zip(low, high, strict=True)]))

    low, high = [r["low"] for r in runs], [r["high"] for r in runs]
    inner = [r["within_run"] for r in runs]
    repeat, own = covered(low, high), covered([i[0] for i in inner], [i[1] for i in inner])
    return {
        "coverage": repeat,
        "coverage_interval": list(wilson(repeat, len(runs))),
        "coverage_within_run": own,
        "coverage_within_run_interval": list(wilson(own, len(runs))),
        "width": median(np.log(high) - np.log(low)),
        "width_within_run": median([np.log(i[1] / i[0]) for i in inner]),
        "spread": spread([r["estimate"] for r in runs]),
        "runs": runs,
    }


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927)."""
    found = binomtest(round(share * count), count).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def repeated(setting: str, processes: list[list[dict[str, Any]]], phase: str) -> dict[str, Any]:
    """How often the interval of one process contains another's estimate, and the variance components."""
    runs = [[run[phase] for run in process] for process in processes]
    pairs = [(a, b) for one, other in permutations(runs, 2) for a in one for b in other]
    logs = np.log([[run["estimate"] for run in process] for process in runs])
    within = logs.var(axis=1, ddof=1).mean()
    between = max(0.0, logs.mean(axis=1).var(ddof=1) - within / logs.shape[1])
    return {
        "setting": setting,
        "ratio": float(np.exp(logs.mean())),
        "coverage": float(np.mean([a["low"] <= b["estimate"] <= a["high"] for a, b in pairs])),
        "agreement": float(np.mean([agree(a, b) for a, b in pairs])),
        "coverage_within_run": float(
            np.mean([a["within_run"][0] <= b["estimate"] <= a["within_run"][1] for a, b in pairs])
        ),
        "width": median([np.log(run["high"] / run["low"]) for process in runs for run in process]),
        "run_sd": float(within**0.5),
        "process_sd": float(between**0.5),
        "round_sd": median([run["round_sd"] for process in runs for run in process]),
        "runs": runs,
    }


def agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """`Ratio.agrees_with` of two runs as kept by `facts`."""
    fields = ("estimate", "low", "high", "within_run", "confidence")
    first, second = (Ratio(**{name: run[name] for name in fields}) for run in (one, other))
    return first.agrees_with(second)


def spread(ratios: list[float]) -> float:
    """Distance of the 2.5th from the 97.5th percentile of the log ratios."""
    low, high = np.quantile(np.log(ratios), [0.025, 0.975])
    return float(high - low)


def median(values: Any) -> float:
    """The median as a plain number."""
    return float(np.median(values))


def worker(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What a new process does: build both models and measure them several times with each setting."""
    candidate = build()[1]
    return [
        {"setting": setting, **measure(candidate, setting, args.threads, args.seed + run)}
        for run in range(args.runs)
        for setting in args.settings
    ]


def in_processes(count: int, args: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """The worker's results from `count` new interpreters, one after the other."""
    results = []
    for index in range(count):
        command = [
            sys.executable,
            __file__,
            "--worker",
            "--runs",
            str(args.runs),
            "--settings",
            *args.settings,
        ]
        command += ["--seed", str(args.seed + 1000 * (index + 1))]
        command += [] if args.threads is None else ["--threads", str(args.threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    return results


def table(found: dict[str, Any]) -> Table:
    """Both parts as one table; widths and spreads in per cent."""
    out = Table("part", "setting", "phase", "repeat", "this run", "width %", "its width %", "spread %", "remark")
    for setting, part in found["identical"].items():
        for phase in PHASES:
            if (row := part.get(phase)) is not None:
                remark = "this run covered {:.3f} – {:.3f} (95 %)".format(*row["coverage_within_run_interval"])
                if phase == "prefill":
                    ratio, low, high = part["width_over_sequential"]
                    remark += f"; its width / sequential spread {ratio:.2f} ({low:.2f} – {high:.2f})"
                cells = (row["coverage"], row["coverage_within_run"])
                cells += (100 * row["width"], 100 * row["width_within_run"], 100 * row["spread"])
                out.add_row("A/A", setting, phase, *(f"{cell:.3g}" for cell in cells), remark)
    for name, row in found["repeated"].items():
        cells = (row["coverage"], row["coverage_within_run"], 100 * row["width"])
        remark = (
            f"ratio {row['ratio']:.3f}; sd of runs {row['run_sd']:.4f}, of processes {row['process_sd']:.4f}; "
            f"agreement {row['agreement']:.3f}"
        )
        out.add_row("processes", row["setting"], name.split("/")[1], *(f"{c:.3g}" for c in cells), "", "", remark)
    return out


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Versions, hardware, load and settings."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "scipy")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": psutil.getloadavg(),
        "arguments": {key: value for key, value in vars(args).items() if key not in ("output", "worker")},
        "configs": {name: SETTINGS[name]().model_dump() for name in args.settings},
    }


def main() -> None:
    """Run both parts, print the table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fast setting only, fewer processes: two minutes")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS))
    parser.add_argument("--runs", type=int, default=3, help="measurements in each process, at least 2")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--identical-runs", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.runs < 2:
        parser.error(f"--runs is {args.runs}; expected at least 2: how much the runs of a process differ is part of it")
    args.settings = args.settings or (["fast"] if args.quick else list(SETTINGS))
    args.processes = args.processes or (5 if args.quick else 10)
    if args.worker:
        print(json.dumps(worker(args)))
        return
    found: dict[str, Any] = {"conditions": conditions(args), "identical": {}, "repeated": {}}
    console = Console(width=140)
    for setting in args.settings:
        console.print(f"A/A, {setting}: {args.identical_runs} runs")
        found["identical"][setting] = identical(setting, args.identical_runs, args.threads, args.seed)
    console.print(f"{args.processes} processes")
    processes = in_processes(args.processes, args)
    for setting in args.settings:
        chosen = [[run for run in process if run["setting"] == setting] for process in processes]
        for phase in PHASES:
            if chosen[0][0][phase] is not None:
                found["repeated"][f"{setting}/{phase}"] = repeated(setting, chosen, phase)
    console.print(table(found))
    args.output.mkdir(parents=True, exist_ok=True)
    name = datetime.now(UTC).strftime("%Y-%m-%d-%H%M%S") + ("-quick" if args.quick else "") + ".json"
    with (args.output / name).open("x", encoding="utf-8") as file:  # results are added, never changed
        json.dump(found, file, indent=1)
        file.write("\n")
    print(f"wrote {name}")


if __name__ == "__main__":
    main()
