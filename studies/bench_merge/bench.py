"""What a merged PIA costs: merged student / the same model with those attentions deleted and nothing in their place.

python studies/bench_merge/bench.py [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from eas_search.latency import LatencyConfig, measure_latency
from eas_search.merging import merge
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.skipping import adapter_parameters, apply_skips
from eas_search.workbench import Workbench

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from record import load_config, write_result  # noqa: E402


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="at most two minutes")
    parser.add_argument("--output", type=Path, default=HERE, help="where results/ is")
    arguments = parser.parse_args()
    quick = arguments.quick
    config = load_config(HERE)
    settings = SearchSettings(model=config["model"], seed=config["seed"], latency_batch=config["batch_size"])
    bench = Workbench.open(settings)
    inputs = bench.latency_inputs()
    skip = tuple(config["skipped"])
    deleted = apply_skips(bench.model, SkipConfig(skip=skip, pia_dim=0, pooling="none")).eval()
    generator = torch.Generator().manual_seed(config["seed"])
    again = apply_skips(bench.model, SkipConfig(skip=skip, pia_dim=0, pooling="none")).eval()
    candidates = {"deleted (A/A)": again}
    forms = itertools.product(config["pia_dims"], ("ffn", "parallel", "residual"), ("none", "prompt"))
    for rank, placement, pooling in forms:
        student = apply_skips(bench.model, SkipConfig(skip=skip, pia_dim=rank, placement=placement, pooling=pooling))
        for parameter in adapter_parameters(student).values():
            parameter.data.normal_(std=0.02, generator=generator)
        candidates[f"{placement}, rank {rank}, pooling {pooling}"] = merge(student).eval()
    candidates["original model"] = bench.model
    latency = LatencyConfig(**config["quick" if quick else "latency"], seed=config["seed"])
    report = measure_latency(candidates, inputs, baseline=deleted, config=latency)
    title = f"{len(skip)} of {len(bench.sites)} attentions skipped, batch {config['batch_size']}, time / deleted"
    table = Table(title=title)
    for heading in ("", "prefill", "95 %", "decode", "95 %"):
        table.add_column(heading)
    rows = {}
    for name, measured in report.items():
        cells, rows[name] = [name], measured.to_dict()
        for phase in (measured.prefill, measured.decode):
            low, high = phase.ratio.within_run
            cells += [f"{phase.ratio.estimate:.3f}", f"{low:.3f} – {high:.3f}"]
        for phase in rows[name].values():
            phase["timing"].pop("samples")
            phase["baseline"].pop("samples")
        table.add_row(*cells)
    Console().print(table)
    content = {
        "seed": config["seed"],
        "quick": quick,
        "config": config,
        "conditions": report.conditions,
        "ratios": rows,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    print("wrote", write_result(arguments.output, "quick" if quick else "full", content, bench.hardware).name)


if __name__ == "__main__":
    main()
