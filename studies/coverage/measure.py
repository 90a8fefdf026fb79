"""Every model type of the installed `transformers`, tiny and with random weights, through every step of the package.

python studies/coverage/measure.py [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import checks  # noqa: E402
import decode  # noqa: E402
import formula  # noqa: E402
import invariance  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402

STEPS: dict[str, Callable[[checks.Case], dict[str, Any]]] = {
    "detect": checks.detect,
    "proof": checks.prove,
    "delete": checks.delete,
    "pia": checks.pia,
    "formula": formula.formula,
    "invariance": invariance.invariance,
    "decode": decode.decode,
    "generate": decode.generate,
    "export": checks.export,
}


class OutOfTime(BaseException):
    """Raised by the alarm; no `except Exception` may swallow it."""


def one_line(error: BaseException) -> str:
    """The error's class and first line."""
    text = (str(error).strip().splitlines() or [""])[0]
    return re.sub(r"'/\S*'", "its folder", f"{type(error).__name__}: {text}")[:300]


def examine(model_type: str) -> dict[str, Any]:
    """All steps for one model type; what goes wrong becomes its status."""
    row: dict[str, Any] = {"model_type": model_type, "class": tiny.candidates(model_type)[0], "steps": {}}
    start = time.monotonic()
    try:
        with tiny.quiet():
            model = tiny.build(model_type)
            case = checks.Case(model, tiny.inputs(model))
    except Exception as error:  # whatever a library class raises on an invented configuration
        return {**row, "status": "not built", "reason": one_line(error), "seconds": time.monotonic() - start}
    row["inputs"] = {name: list(value.shape) for name, value in case.inputs.items()}
    row["family"] = type(model).__module__.split(".")[2]
    row["class"] = type(model).__name__
    row["status"], row["reason"] = "pass", ""
    for name, step in STEPS.items():
        try:
            with tiny.quiet():
                row["steps"][name] = {"status": "pass", **step(case)}
        except checks.NotApplicable as reason:
            row["steps"][name] = {"status": "n/a", "reason": str(reason)}
            if name in ("detect", "delete"):
                row["status"], row["reason"] = "not reached", str(reason)
                break
        except checks.UnsupportedModelError as refusal:
            if row["status"] == "pass":
                row["status"], row["reason"] = "refused", f"{name}: {one_line(refusal)}"
            row["steps"][name] = {"status": "refused", "reason": one_line(refusal)}
            break
        except Exception as error:  # recorded as a failure
            row["steps"][name] = {
                "status": "failed",
                "reason": one_line(error),
                "wrong": isinstance(error, checks.Wrong),
            }
            if row["status"] == "pass":
                row["status"], row["reason"] = "failed", f"{name}: {one_line(error)}"
    row["refused_sites"] = case.refused[:3]
    row["seconds"] = time.monotonic() - start
    return row


def guarded(job: tuple[str, int]) -> dict[str, Any]:
    """`examine` within a time limit."""
    model_type, limit = job

    def ring(*_: Any) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(limit)
    try:
        return examine(model_type)
    except OutOfTime:
        return {"model_type": model_type, "status": "failed", "reason": f"more than {limit} s", "steps": {}}
    finally:
        signal.alarm(0)


def prepare() -> None:
    """One thread per process, and a bound on memory so that an oversized model is an error and not a crash."""
    import resource

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))


def show(row: dict[str, Any]) -> None:
    """A row for people."""
    print(
        f"{row['model_type']} {row.get('class', '')}: {row['status']} {row['reason']} ({row.get('seconds', 0):.1f} s)"
    )
    for name, step in row["steps"].items():
        print("   ", name, *(f"{key}={value}" for key, value in step.items()))


def main() -> None:
    """Measure what is not in the progress file yet, then write the result."""
    from record import load_config

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="model types; prints their rows and records nothing")
    parser.add_argument("--progress", type=Path, default=HERE / "progress.jsonl", help="rows measured so far")
    arguments = parser.parse_args()
    config = load_config(HERE)
    done: dict[str, dict[str, Any]] = {}
    if arguments.only is None and arguments.progress.exists():
        done = {row["model_type"]: row for row in map(json.loads, arguments.progress.read_text().splitlines())}
    wanted = arguments.only if arguments.only is not None else tiny.model_types()
    jobs = [(name, config["limit_s"]) for name in wanted if name not in done]
    with multiprocessing.get_context("spawn").Pool(config["processes"], prepare, maxtasksperchild=60) as pool:
        for row in pool.imap_unordered(guarded, jobs):
            done[row["model_type"]] = row
            if arguments.only is None:
                with arguments.progress.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            else:
                show(row)
    rows = [done[name] for name in sorted(done)]
    print(Counter(row["status"] for row in rows))
    if arguments.only is None:
        from report import record

        print("wrote", record(HERE, config, rows).name)
        os.unlink(arguments.progress)


if __name__ == "__main__":
    main()
