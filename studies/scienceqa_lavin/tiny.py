"""The whole way on a tiny LaVIN and real ScienceQA problems: convert, run, verify, evaluate.

python studies/scienceqa_lavin/tiny.py --data SCIENCEQA [--keep FOLDER]

LLaMA and CLIP are built from configurations, the tokenizer is made from the problems: nothing is downloaded. All
weights are first trained on the task for a short while, so that the attentions do something.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from eas_search.exceptions import EasSearchError
from eas_search.models.options import LoadOptions
from eas_search.study.outputs import read_json
from eas_search.tasks import get_task
from eas_search.training import FineTuneConfig, fine_tune
from eas_search.workbench import load_for_task

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "own_data")]
from record import write_result  # noqa: E402
from search_all import CLAIMS, command  # noqa: E402
from tiny_models import save, word_tokenizer  # noqa: E402

BUDGET, LAYERS, WORDS, READABLE = 6, 6, 1500, 512
PRETRAINING = FineTuneConfig(steps=150, batch_size=16, learning_rate=3e-3)
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


def asked(data: Path) -> Iterator[str]:
    """All that prompts and answers can hold."""
    yield from ["Image: N/A", "Question: Context: Options: (A) (B) (C) (D) (E) Answer: The answer is A."] * 9
    captions = read_json(data / "captions.json")["captions"] if (data / "captions.json").is_file() else {}
    for number, problem in read_json(data / "problems.json").items():
        yield " ".join([problem["question"], problem["hint"], *problem["choices"], captions.get(number, "")])


def save_parts(folder: Path, data: Path) -> tuple[Path, Path]:
    """A LLaMA with a tokenizer, and a CLIP vision tower with its image processor, in the Hugging Face layout."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = word_tokenizer(asked(data), size=WORDS, readable=READABLE)
    torch.manual_seed(0)
    llama = LlamaConfig(
        **SMALL,
        vocab_size=len(words),
        num_hidden_layers=LAYERS,
        max_position_embeddings=2 * READABLE,
        **{f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("pad", "bos", "eos")},
    )
    clip = CLIPVisionConfig(**SMALL, num_hidden_layers=4, image_size=32, patch_size=8)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return (
        save(LlamaForCausalLM(llama), words, folder / "llama"),
        save(CLIPVisionModel(clip), images, folder / "clip"),
    )


def pretrain(model_folder: Path, data: Path) -> int:
    """Train all weights of the saved model on the task, save it again; returns their number."""
    task = get_task("scienceqa", data, {"prompt": "QCM-A"})
    model, processor = load_for_task(task, str(model_folder), LoadOptions(device="cpu"))
    samples = task.encode(processor, task.examples("train", None))
    fine_tune(model.requires_grad_(True), samples, PRETRAINING, seed=0)
    model.save_pretrained(model_folder)  # type: ignore[operator]
    return sum(parameter.numel() for parameter in model.parameters())


def whole_way(folder: Path, data: Path) -> dict[str, Any]:
    """Figures of all steps."""
    llama, clip = save_parts(folder, data)
    model, run = folder / "lavin", folder / "run"
    _, convert_s = command("convert", "lavin", "--llama", llama, "--clip", clip, "--output", model)
    parameters = pretrain(model, data)
    flags = ("--config", HERE / "tiny.yaml", "--model", model, "--data", data, "--budget", str(BUDGET))
    _, run_s = command("run", *flags, "--output", run)
    said, verify_s = command("verify", run / "export")
    largest, tolerance, generated = re.findall(r"Largest (\S+) \(tolerance (\S+)\); (.*)", said)[0]
    again, _ = command("evaluate", run / "export", "--data", data)
    summary, points = read_json(run / "summary.json"), read_json(run / "pareto.json")
    return {
        "parameters": parameters,
        "trials": summary["completed"],
        "seconds": {"convert": convert_s, "run": run_s, "verify": verify_s, "stages": summary["wall_clock"]},
        "baseline": {key: summary["baseline"][key] for key in ("zero_shot_accuracy", "accuracy", "breakdown")},
        "front": [{key: point.get(key) for key in ("number", *CLAIMS)} for point in points if point["on_front"]],
        "chosen": read_json(run / "best.json")["skip_names"],
        "verified": {"largest_difference": float(largest), "tolerance": float(tolerance), "generated": generated},
        "measured_again": again.splitlines(),
    }


def main() -> None:
    """Run, print the figures, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with problems.json and pid_splits.json")
    parser.add_argument("--keep", type=Path, help="folder for models and runs, which else are deleted")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        figures = whole_way(given.keep or Path(temporary), given.data)
    print(figures)
    hardware = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    content = {"seed": 0, "pretraining": PRETRAINING.model_dump(), "sizes": {**SMALL, "layers": LAYERS}, **figures}
    print("wrote", write_result(HERE, "tiny", content, hardware).name)


if __name__ == "__main__":
    try:
        main()
    except EasSearchError as error:
        sys.exit(str(error))
