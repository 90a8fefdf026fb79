"""Searches on one's own files, from data and model to a verified export, through the command line.

python studies/own_data/search_all.py [CASE …] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from science_files import write_scienceqa
from tiny_models import draw_digits, save_bert, save_llama, save_vit
from tiny_vision import draw_talks, save_idefics3, save_qwen2_vl

from eas_search.exceptions import EasSearchError
from eas_search.models.options import LoadOptions
from eas_search.study.outputs import read_json
from eas_search.tasks import get_task
from eas_search.training import FineTuneConfig, fine_tune
from eas_search.workbench import load_for_task

HERE = Path(__file__).parent
SCIENCEQA = HERE.parents[2] / "shared" / "data" / "scienceqa"
sys.path.insert(0, str(HERE.parent))
from record import load_config, write_result  # noqa: E402

CLAIMS = ("skip_names", "placement", "accuracy", "accuracy_low", "accuracy_high", "breakdown", "latency", "kv_bytes")


def sentences() -> Iterator[str]:
    """A small language: what an animal does follows from which it is."""
    does = {"cat": "sat on the mat", "dog": "ran to the tree", "bird": "flew over the house"}
    for number in range(120):
        for animal, action in does.items():
            yield f"the {('red', 'blue', 'old')[number % 3]} {animal} number {number % 10} {action}"


def text_file(folder: Path) -> Path:
    """Those sentences, a paragraph each."""
    folder.mkdir(parents=True)
    (folder / "all.txt").write_text("\n\n".join(sentences()), encoding="utf-8")
    return folder


def science_folder(folder: Path) -> Path:
    """ScienceQA's annotations where they lie beside the repository, else a few questions of our own."""
    if SCIENCEQA.is_dir():
        return SCIENCEQA
    folder.mkdir(parents=True)
    return write_scienceqa(folder, 400)


def asked(data: Path) -> Iterator[str]:
    """The texts of ScienceQA's problems."""
    for problem in read_json(data / "problems.json").values():
        yield " ".join([problem["question"], problem["hint"], *problem["choices"]])


Build = tuple[Callable[[Path], Path], Callable[[Path, Path, int], Path]]
BUILDERS: dict[str, Build] = {
    "llama": (text_file, lambda folder, data, layers: save_llama(folder, sentences(), layers)),
    "bert": (science_folder, lambda folder, data, layers: save_bert(folder, asked(data), layers)),
    "vit": (lambda folder: draw_digits(folder, 600), lambda folder, data, layers: save_vit(folder, layers=layers)),
    "idefics3": (lambda f: draw_talks(f, 400), lambda folder, data, layers: save_idefics3(folder, layers)),
    "smolvlm": (lambda f: draw_talks(f, 400), lambda folder, data, layers: save_idefics3(folder, layers, "SmolVLM")),
    "qwen2_vl": (lambda f: draw_talks(f, 400), lambda folder, data, layers: save_qwen2_vl(folder, layers)),
}


def pretrain(model_folder: Path, case: dict[str, Any], data: Path, config: dict[str, Any]) -> int:
    """Train all weights of the saved model on the task, save it again; returns their number."""
    task = get_task(case["task"], data, case.get("task_options"))
    torch.manual_seed(0)
    model, processor = load_for_task(task, str(model_folder), LoadOptions(device="cpu"))
    samples = task.encode(processor, task.examples("train", config["settings"]["samples"]["train"]))
    fine_tune(model.requires_grad_(True), samples, FineTuneConfig(**config["pretrain"]), seed=0)
    model.save_pretrained(model_folder)  # type: ignore[operator]
    return sum(parameter.numel() for parameter in model.parameters())


def command(*words: str | Path) -> tuple[str, float]:
    """(what `eas-search WORDS` printed, seconds). Raises SystemExit with it when the command fails."""
    program = shutil.which("eas-search", path=str(Path(sys.executable).parent))
    if program is None:
        raise SystemExit("eas-search is not installed beside this Python; expected: pip install -e .")
    start = time.perf_counter()
    wide = os.environ | {"COLUMNS": "200"}  # so that no cell of a table takes two lines
    done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, check=False, env=wide)
    if done.returncode:
        raise SystemExit(f"eas-search {words[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout, time.perf_counter() - start


def search(name: str, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One case: build, pretrain, search, verify, measure again; figures to be recorded."""
    case = config["cases"][name]
    make_data, make_model = BUILDERS[name]
    data = make_data(folder / "data")
    model = make_model(folder / "model", data, config["layers"])
    parameters = pretrain(model, case, data, config)
    study = folder / "study.yaml"
    study.write_text(yaml.safe_dump(config["settings"] | {"task_options": case.get("task_options", {})}), "utf-8")
    run = folder / "run"
    flags = ("--model", model, "--task", case["task"], "--data", data, "--budget", str(config["settings"]["budget"]))
    _, seconds = command("run", *flags, "--config", study, "--output", run)
    said, verify_seconds = command("verify", run / "export")
    largest, tolerance, generated = re.findall(r"Largest (\S+) \(tolerance (\S+)\); (.*)", said)[0]
    again, _ = command("evaluate", run / "export", "--data", data)
    summary, best = read_json(run / "summary.json"), read_json(run / "best.json")
    front = [row for row in read_json(run / "pareto.json") if row["on_front"]]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in again.splitlines() if line[:1] == "│"]
    return {
        "case": case | {"data": "ScienceQA's annotations" if data == SCIENCEQA else "generated"},
        "parameters": parameters,
        "trials": summary["completed"],
        "metric": summary["metric"],
        "seconds": {"search": seconds, "verify": verify_seconds, "stages": summary["wall_clock"]},
        "baseline": {key: summary["baseline"][key] for key in ("zero_shot_accuracy", "accuracy", "breakdown")},
        "front": len(front),
        "chosen": {key: best[key] for key in CLAIMS},
        "verified": {"largest_difference": float(largest), "tolerance": float(tolerance), "generated": generated},
        "measured_again": {name: {"now": now, "claimed": claimed} for name, now, claimed in cells},
    }


def further_versions() -> dict[str, Any]:
    """What the processors of SmolVLM and Qwen2-VL need; of torchvision they use the resizing, which is torch's own."""
    packages = ("tokenizers", "torchvision", "num2words")
    found: dict[str, Any] = {name: version(name) for name in packages if find_spec(name) is not None}
    if "torchvision" in found:
        from torchvision.extension import _has_ops

        found["torchvision has its compiled operators"] = _has_ops()
    return found


def main() -> None:
    """All cases, or those named."""
    config = load_config(HERE)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", choices=[*config["cases"], []], default=[])
    parser.add_argument("--keep", type=Path, help="folder for models, data and runs, which else are deleted")
    given = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in given.case or config["cases"]:
            missing = [package for package in config["cases"][name].get("needs", []) if find_spec(package) is None]
            if missing:
                results[name] = {"left_out": f"needs {', '.join(missing)}"}
            else:
                results[name] = search(name, config, (given.keep or Path(temporary)) / name)
            print(name, results[name], flush=True)
    hardware = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
    }
    content = {"config": config, "further_versions": further_versions(), "cases": results}
    print("wrote", write_result(HERE, "search", content, hardware).name)


if __name__ == "__main__":
    try:
        main()
    except EasSearchError as error:
        sys.exit(str(error))
