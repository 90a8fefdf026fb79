"""What does the toolkit cost on top of its trials?

python studies/bench_overhead/bench.py [--quick] [--sampler NAME] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from by_hand import search
from rich.console import Console
from rich.table import Table

from eas_search.names import SAMPLERS
from eas_search.objective import TrialResult, foretold_cost
from eas_search.prediction import predictor_stage
from eas_search.rungs import pack, strongest_rival
from eas_search.samplers import make_sampler
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.stage_folder import StageFolder
from eas_search.stages import empty_supernet
from eas_search.study import create_study
from eas_search.study.heap import settled_heap
from eas_search.study.loop import TrialLoop, run_here
from eas_search.study.progress import PlainDisplay, Tally
from eas_search.study.trials import Trials
from eas_search.supernet import Supernet
from eas_search.workbench import Workbench

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from intervals import mean_interval  # noqa: E402
from record import load_config, write_result  # noqa: E402


@contextmanager
def stopwatch() -> Iterator[SimpleNamespace]:
    """`seconds` of the block."""
    watch, begin = SimpleNamespace(seconds=0.0), time.perf_counter()
    yield watch
    watch.seconds = time.perf_counter() - begin


def display() -> PlainDisplay:
    """As on a terminal that nobody looks at."""
    return PlainDisplay(Console(file=io.StringIO(), width=200))


def toolkit(
    bench: Workbench, supernet: Supernet, ranking: list[float]
) -> tuple[list[SkipConfig], list[list[float]], float]:
    """One trials stage with a new study in a new SQLite file: (configurations, their objectives, seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        study = create_study(bench.settings, Path(folder), "overhead")
        with settled_heap(), stopwatch() as watch:  # as in `run_study`
            Trials(study, bench, supernet, ranking, Path(folder), display()).run()
        trials = study.get_trials(deepcopy=False)
        configs = [bench.space.to_config(trial.params) for trial in trials]
        return configs, [trial.values for trial in trials], watch.seconds


def side_by_side(bench: Workbench, supernet: Supernet, ranking: list[float], rounds: int, seed: int) -> dict[str, Any]:
    """Both searches in turn, in random order, with the same trials; seconds of each round."""
    configs, values, _ = toolkit(bench, supernet, ranking)  # says which configurations, and warms up
    rng, seconds = np.random.default_rng(seed), {"toolkit": list[float](), "by hand": list[float]()}
    for _ in range(rounds):
        for name in rng.permutation(list(seconds)):
            if name == "toolkit":
                _, found, spent = toolkit(bench, supernet, ranking)
            else:
                with stopwatch() as watch:
                    found = search(bench, supernet, configs)
                spent = watch.seconds
            seconds[name].append(spent)
            assert [one[0] for one in found] == [one[0] for one in values], f"{name} did other trials"
    logs = np.log(seconds["toolkit"]) - np.log(seconds["by hand"])
    ratio, low, high = (float(np.exp(value)) for value in mean_interval(logs, rng))
    trial_s = float(np.median(seconds["toolkit"])) / len(configs)
    return {"seconds": seconds, "trials": len(configs), "ratio": [ratio, low, high], "trial_s": trial_s}


def made_up(bench: Workbench, config: SkipConfig) -> TrialResult:
    """An evaluation that takes no time; the more, and the earlier, sites are skipped, the less accurate it is."""
    rng = np.random.default_rng(zlib.crc32(config.model_dump_json().encode()))
    share, count = len(config.skip) / len(bench.sites), len(bench.splits["validation"])
    scores = rng.random(count) < 0.8 - 0.5 * share**2 - 0.02 * sum(1 / (1 + int(index)) for index in config.skip)
    latency = 1 - 0.4 * share + rng.normal(scale=0.005)
    return TrialResult(float(scores.mean()), latency, latency, latency, 0.0, 0, 0, 0, 0.0, "none", pack(scores))


def at_many_trials(bench: Workbench, history: int, measured: int, seed: int) -> dict[str, list[float]]:
    """Seconds that the search itself spends per trial, sampler and all else, with `history` trials in the storage."""
    space, settings = bench.space, bench.settings.model_copy(update={"budget": history + measured})
    sites, seconds = [site.index for site in bench.sites], {"sampler": list[float](), "all": list[float]()}
    with tempfile.TemporaryDirectory() as folder:
        study = create_study(settings, Path(folder), "many")
        _remember(study, bench, history, seed)
        sampler = make_sampler(
            settings.sampler, space, list(map(float, sites)), seed, history, settings.supernet.bandit
        )
        study.sampler, propose = sampler, sampler.sample_relative

        def timed(*arguments: Any) -> dict[str, Any]:
            with stopwatch() as watch:
                params = propose(*arguments)
            seconds["sampler"].append(watch.seconds)
            return params

        sampler.sample_relative = timed  # type: ignore[method-assign]
        tally, cost, shown = Tally(settings.budget, len(sites)), foretold_cost(bench), display()

        def told(number: int, config: SkipConfig, result: TrialResult) -> None:
            tally.add(result)
            shown.trial(tally.news(number, config, result))

        loop = TrialLoop(study, space, sampler, settings, told)
        stamps = [0.0]

        def evaluate(config: SkipConfig) -> TrialResult:
            strongest_rival(loop.known.items(), config, cost)
            seconds["all"].append(time.perf_counter() - stamps[-1])
            result = made_up(bench, config)
            stamps.append(time.perf_counter())
            return result

        with settled_heap():
            loop.run(run_here(evaluate), 1)
    return {name: values[1:] for name, values in seconds.items()}  # the first cycle includes the loop's start


def optuna_alone(bench: Workbench, history: int, measured: int, seed: int) -> list[float]:
    """Seconds per trial of asking and telling in the same storage, with random proposals and nothing else recorded."""
    space, seconds = bench.space.distributions(), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        study = create_study(bench.settings, Path(folder), "alone")
        _remember(study, bench, history, seed)
        study.sampler = optuna.samplers.RandomSampler(seed=seed)
        with settled_heap():
            for _ in range(measured):
                with stopwatch() as watch:
                    study.tell(study.ask(space), [0.5] * len(study.directions))
                seconds.append(watch.seconds)
    return seconds[1:]


def _remember(study: optuna.Study, bench: Workbench, history: int, seed: int) -> None:
    """Add random finished trials, none twice: as many as asked for, or half the space."""
    space, rng, known = bench.space, np.random.default_rng(seed), dict[SkipConfig, TrialResult]()
    sites = [site.index for site in bench.sites]
    while len(known) < min(history, space.size // 2):
        chosen = rng.choice(sites, size=rng.integers(1, len(sites) + 1), replace=False).tolist()
        dims, placements = len(space.choices.pia_dims), len(space.choices.placements)
        config = space.config(chosen, int(rng.integers(dims)), int(rng.integers(placements)))
        known[config] = made_up(bench, config)
    study.add_trials([_finished(bench, config, result) for config, result in known.items()])


def _finished(bench: Workbench, config: SkipConfig, result: TrialResult) -> optuna.trial.FrozenTrial:
    return optuna.trial.create_trial(
        params=bench.space.to_params(config),
        distributions=bench.space.distributions(),
        values=result.values(bench.settings.objectives),
        user_attrs={"config": config.model_dump(mode="json"), "result": result.to_dict(), "origin": "history"},
    )


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="at most two minutes")
    parser.add_argument("--sampler", choices=SAMPLERS, default="eas")
    parser.add_argument("--output", type=Path, default=HERE, help="where results/ is")
    arguments = parser.parse_args()
    config = load_config(HERE)
    size, seed = config["quick" if arguments.quick else "full"], config["seed"]
    settings = SearchSettings(**config["search"], seed=seed, sampler=arguments.sampler, budget=size["trials"])
    bench = Workbench.open(settings)
    # What a trial costs does not depend on how good the supernet and the ranking are.
    supernet, ranking = empty_supernet(bench), [float(position) for position in range(len(bench.sites))]
    if settings.latency == "predicted":
        with tempfile.TemporaryDirectory() as folder:
            predictor_stage(bench, StageFolder(Path(folder)))
    both = side_by_side(bench, supernet, ranking, size["rounds"], seed)
    own, rng = at_many_trials(bench, size["history"], size["measured"], seed), np.random.default_rng(seed)
    own["optuna"] = optuna_alone(bench, size["history"], size["measured"], seed)
    shares = {
        name: mean_interval([100 * value / both["trial_s"] for value in values], rng) for name, values in own.items()
    }
    table = Table(
        "", "figure", "95 %", "bar", title=f"sampler {settings.sampler}, a trial takes {both['trial_s']:.2f} s"
    )
    ratio = both["ratio"]
    table.add_row("toolkit / loop by hand, wall-clock", f"{ratio[0]:.3f}", f"{ratio[1]:.3f} – {ratio[2]:.3f}", "≤ 1.05")
    count = size["history"] + size["measured"]
    parts = {"sampler": "sampler", "all": "sampler, storage and progress", "optuna": "Optuna alone, random proposals"}
    for name, label in parts.items():
        (mean, low, high), bar = shares[name], "≤ 2 %" if name == "all" else ""
        table.add_row(f"{label}, of a trial at {count:,}", f"{mean:.2f} %", f"{low:.2f} – {high:.2f}", bar)
    Console().print(table)
    content = {"seed": seed, "quick": arguments.quick, "config": config, "sampler": settings.sampler}
    content |= {"side_by_side": both, "own_seconds": own, "shares_percent": shares}
    arguments.output.mkdir(parents=True, exist_ok=True)
    print("wrote", write_result(arguments.output, "quick" if arguments.quick else "full", content, bench.hardware).name)


if __name__ == "__main__":
    main()
