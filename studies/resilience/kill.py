"""Kill a search at random moments, run the same command again, count what is left.

    python studies/resilience/kill.py [--budget 50] [--kills 5]

Every run is a real process and dies by SIGKILL; the last one finishes. Passes when the budget is met exactly, every
trial that was complete before a kill is still there with the same figures, and nothing is left running.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
from optuna.trial import TrialState

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from record import print_json, write_result  # noqa: E402


def completed(folder: Path) -> dict[int, list[float]]:
    """Values of the completed trials by number; empty before the first one."""
    if not (folder / "study.db").is_file():
        return {}
    storage = f"sqlite:///{folder / 'study.db'}"
    names = optuna.get_all_study_names(storage)
    if not names:
        return {}
    study = optuna.load_study(study_name=names[0], storage=storage)
    return {trial.number: trial.values for trial in study.get_trials(states=(TrialState.COMPLETE,))}


def main() -> None:
    """Kill, resume, count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=int, default=50)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rng = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="eas-kill-")) / "run"
    command = [sys.executable, "-m", "eas_search.run", "--budget", str(arguments.budget), "--output", str(folder)]
    events, lost = [], 0
    for _ in range(arguments.kills):
        known, delay = completed(folder), rng.uniform(5, 60)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        before = completed(folder) if process.poll() is None else known
        process.send_signal(signal.SIGKILL)
        process.wait()
        after = completed(folder)
        lost += sum(1 for number, values in {**known, **before}.items() if after.get(number) != values)
        events.append({"after_s": round(delay, 1), "completed": len(after)})
        print(events[-1], flush=True)
    final = subprocess.run(command, check=False)
    study = optuna.load_study(
        study_name=optuna.get_all_study_names(f"sqlite:///{folder / 'study.db'}")[0],
        storage=f"sqlite:///{folder / 'study.db'}",
    )
    states = {state.name: len(study.get_trials(deepcopy=False, states=(state,))) for state in TrialState}
    result = {"seed": arguments.seed, "budget": arguments.budget, "exit_code": final.returncode, "kills": events}
    result |= {"lost": lost, "states": states}
    print_json(result)
    print("wrote", write_result(HERE, "kill", result, {"note": "timings play no part"}).name)
    if final.returncode or lost or states["RUNNING"] or states["COMPLETE"] != arguments.budget:
        sys.exit("the search did not survive")


if __name__ == "__main__":
    main()
