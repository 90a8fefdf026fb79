"""What a skipped site of a table saves, as a share of the original model's prefill: constants for `config.yaml`.

python studies/bench_tabular/latency.py [--table towers]

A predictor is fitted as in a search, but to longer timings; the constants are the linear part of what it says of random
sets.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from eas_search.latency.config import LatencyConfig
from eas_search.latency.terms import last_sites
from eas_search.plugins import load_plugins
from eas_search.prediction import predictor_stage
from eas_search.settings import SearchSettings
from eas_search.stage_folder import StageFolder
from eas_search.workbench import Workbench

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from record import load_config  # noqa: E402

SETS = 400


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config = load_config(HERE)
    parser.add_argument("--table", choices=list(config["tables"]), default=next(iter(config["tables"])))
    table = config["tables"][parser.parse_args().table]
    load_plugins([str(HERE / "families.py")])
    space = {
        "towers": table.get("towers", ["text"]),
        "pia_dims": [table["pia_dim"]],
        "placements": ["parallel"],
    }
    settings = SearchSettings(
        model=config["model"],
        task=table.get("task", config["task"]),
        space=space,
        seed=table["seed"],
        fit_latency=LatencyConfig.fast(rounds=40, blocks=2, warmup=1, time_limit_s=90.0),
    )
    bench = Workbench.open(settings)
    with tempfile.TemporaryDirectory() as folder:
        predictor_stage(bench, StageFolder(Path(folder)))
    rng, rows, ratios = np.random.default_rng(0), [], []
    towers = list(dict.fromkeys(site.tower for site in bench.sites))
    for _ in range(SETS):
        chosen = rng.choice(len(bench.sites), size=rng.integers(1, len(bench.sites) + 1), replace=False)
        skipped = [bench.sites[i] for i in chosen]
        student = bench.space.config([site.index for site in skipped])
        counts = [sum(site.tower == tower for site in skipped) for tower in towers]
        rows.append([*counts, len(last_sites(student, bench.space.ends))])
        ratios.append(bench.predicted_latency(student)[0])
    found = np.linalg.lstsq(np.array(rows, dtype=float), 1 - np.array(ratios), rcond=None)[0]
    print({name: round(float(value), 4) for name, value in zip([*towers, "at_end"], found, strict=True)})
    assert bench.predictor is not None
    print(bench.predictor.describe(), f"; standard error {100 * bench.predictor.standard_error:.1f} %", sep="")


if __name__ == "__main__":
    main()
