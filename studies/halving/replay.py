"""What do rungs spare, and does the front stay as it is? Trials scored to the end, then stopped afterwards.

python studies/halving/replay.py [--quick] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from eas_search.objective import TrialResult, foretold_cost
from eas_search.prediction import predictor_stage
from eas_search.report.front import hypervolume, non_dominated
from eas_search.rungs import rung_ends, score_in_rungs, strongest_rival, unpack
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.stage_folder import StageFolder
from eas_search.stages import baseline_stage, supernet_stage
from eas_search.study import create_study
from eas_search.study.progress import PlainDisplay
from eas_search.study.trials import Trials
from eas_search.workbench import Workbench

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from record import load_config, write_result  # noqa: E402

Trial = tuple[SkipConfig, TrialResult]


def whole_trials(settings: SearchSettings) -> tuple[list[Trial], Workbench]:
    """The trials of a search in their order, every one scored to the end."""
    with tempfile.TemporaryDirectory() as name:
        folder, display = Path(name), PlainDisplay(Console(stderr=True))
        bench, stages = Workbench.open(settings, folder), StageFolder(folder / "stages")
        _, adapted = baseline_stage(bench, stages, display.step)
        supernet, ranking = supernet_stage(bench, stages, adapted, display.step)
        predictor_stage(bench, stages)
        study = create_study(settings, folder, "whole")
        Trials(study, bench, supernet, ranking, folder, display).run()
        trials = study.get_trials(deepcopy=False)
        return [(bench.space.to_config(t.params), TrialResult(**t.user_attrs["result"])) for t in trials], bench


def replayed(trials: Sequence[Trial], bench: Workbench, fractions: Sequence[float]) -> dict[str, Any]:
    """What these rungs would have stopped, told to nobody: figures of one study."""
    cost, known = foretold_cost(bench), dict[SkipConfig, TrialResult]()
    for config, result in trials:
        whole = unpack(result.scores)
        ends = rung_ends(len(whole), fractions)
        scored = score_in_rungs(part_of(whole), ends, strongest_rival(known.items(), config, cost))
        known[config] = replace(result, **vars(scored))
    kept = [(config, result) for config, result in known.items() if result.stopped_at is None]
    all_scored = sum(len(unpack(result.scores)) for _, result in trials)
    seen = sum(result.stopped_at or len(unpack(result.scores)) for result in known.values())
    errors = [
        result.accuracy - dict(trials)[c].accuracy for c, result in known.items() if result.stopped_at is not None
    ]
    before, after = volume([result for _, result in trials]), volume([result for _, result in kept])
    lost = front(trials) - front(kept)
    return {
        "trials": len(trials),
        "stopped": len(known) - len(kept),
        "samples_scored": seen / all_scored,
        "front": len(front(trials)),
        "front_lost": [list(config.skip) for config in lost],
        "hypervolume_ratio": after / before,
        "estimate_error": [float(np.mean(errors)), float(np.std(errors))] if errors else None,
    }


def part_of(scores: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """The scores as they would come in."""
    return lambda start, end: scores[start:end]


def front(trials: Sequence[Trial]) -> set[SkipConfig]:
    """The non-dominated trials."""
    kept = non_dominated([r.accuracy for _, r in trials], [r.latency for _, r in trials])
    return {config for (config, _), on in zip(trials, kept, strict=True) if on}


def volume(results: Sequence[TrialResult]) -> float:
    """Hypervolume of the trials' own figures."""
    return hypervolume([result.accuracy for result in results], [result.latency for result in results])


def main() -> None:
    """Search once per seed, replay with every choice of rungs, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short search without training")
    parser.add_argument("--output", type=Path, default=HERE, help="where results/ is")
    arguments = parser.parse_args()
    config = load_config(HERE)
    size = {**config, **(config["quick"] if arguments.quick else {})}
    rows: list[dict[str, Any]] = []
    for seed in size["seeds"]:
        settings = SearchSettings(**config["search"], seed=seed, budget=size["budget"])
        steps = size.get("fine_tune_steps")
        trials, bench = whole_trials(settings if steps is None else settings.fine_tuned_for(steps))
        rows += [{"seed": seed, "rungs": rungs, **replayed(trials, bench, rungs)} for rungs in config["rungs"]]
    table = Table(
        "rungs", "seed", "stopped", "samples scored", "lost of the front", "hypervolume", "estimate, mean ± sd"
    )
    for row in sorted(rows, key=lambda row: config["rungs"].index(row["rungs"])):
        error = "" if row["estimate_error"] is None else "{:+.3f} ± {:.3f}".format(*row["estimate_error"])
        stopped, lost = f"{row['stopped']} of {row['trials']}", f"{len(row['front_lost'])} of {row['front']}"
        share, ratio = f"{100 * row['samples_scored']:.0f} %", f"{row['hypervolume_ratio']:.4f}"
        table.add_row(str(row["rungs"]), str(row["seed"]), stopped, share, lost, ratio, error)
    Console(width=120).print(table)
    arguments.output.mkdir(parents=True, exist_ok=True)
    content = {"seeds": size["seeds"], "quick": arguments.quick, "config": config, "replays": rows}
    print("wrote", write_result(arguments.output, "quick" if arguments.quick else "full", content, bench.hardware).name)


if __name__ == "__main__":
    main()
