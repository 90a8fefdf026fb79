"""What LaVIN-EAS costs per prompt: unmerged, in the published merge, in ours, and with the attentions just deleted.

python studies/latency_lavin7b/bench.py [--quick] [--shape NAME]
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from published import prompt_flops, remerge_flops
from rows import Case, compare, judged_by_bound, print_case, print_rows, summary
from torch import Tensor, nn
from variants import BOUND, OURS, PUBLISHED, ROUTED, STATIC, build_inputs, build_model, build_variants

from eas_search.latency import LatencyConfig, LatencyReport, measure_latency
from eas_search.merging import verify_merge

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from record import load_config, write_result  # noqa: E402


class OwnInputs(nn.Module):
    """A model that runs inputs of its own, to be timed beside one that runs others."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, **_: Any) -> None:
        """The prefill."""
        self.model(**self.inputs, logits_to_keep=1)


def measure_case(variants: dict[str, nn.Module], inputs: dict[str, Tensor], latency: LatencyConfig) -> LatencyReport:
    """All variants side by side, the published merge for a single prompt only; ratios are to the bound."""
    single = len(inputs["input_ids"]) == 1
    others = {name: model for name, model in variants.items() if name != BOUND and (single or name != PUBLISHED)}
    return measure_latency(others, inputs, baseline=variants[BOUND], config=latency)


def measure_bound(variants: dict[str, nn.Module], inputs: dict[str, Tensor], latency: LatencyConfig) -> dict[str, Any]:
    """Our merges against the bound alone, prefill only: in a few per cent, slow neighbours in the round are noise."""
    ours = {name: variants[name] for name in (f"{BOUND}, A/A", *OURS)}
    report = measure_latency(ours, inputs, baseline=variants[BOUND], config=latency)
    return {f"{name} / {BOUND}, prefill": judged_by_bound(measured.prefill.ratio) for name, measured in report.items()}


def measure_batched(variants: dict[str, nn.Module], model: Any, case: Case, latency: LatencyConfig) -> dict[str, Any]:
    """Time per prompt of our merge in batches, beside the published merge with one prompt after the other."""
    inputs = build_inputs(model, case.batch, case.tokens, case.seed)
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    ours = {name: OwnInputs(variants[name], inputs) for name in (STATIC, ROUTED)}
    config = latency.model_copy(update={"decode_tokens": 0, "fresh_copies": False})
    report = measure_latency(ours, one, baseline=variants[PUBLISHED], config=config)
    return {
        f"{name} in batches of {case.batch} / {PUBLISHED}, prefill": {
            key: measured.prefill.ratio.to_dict()[key] / case.batch for key in ("estimate", "low", "high")
        }
        for name, measured in report.items()
    }


def measure_graphs(variants: dict[str, Any], inputs: dict[str, Tensor], latency: LatencyConfig) -> dict[str, Any]:
    """The same with CUDA graphs, text tower only."""
    from graphs import captured, decode_graph, prefill_graph

    with torch.inference_mode():
        embeds = variants[BOUND].model.embed(inputs["input_ids"], inputs["pixel_values"]).contiguous()
    single = len(embeds) == 1
    models = {name: model for name, model in variants.items() if single or name != PUBLISHED}
    config = latency.model_copy(update={"decode_tokens": 0, "fresh_copies": False})
    found: dict[str, Any] = {}
    for phase, capture in (("prefill", prefill_graph), ("decode", decode_graph)):
        replays, refused = captured(models, embeds, capture)
        found[phase] = {"refused": refused}
        if bound := replays.pop(BOUND, None):
            report = measure_latency(replays, {}, baseline=bound, config=config)
            found[phase] |= {"times": summary(report), "rows": compare(report, answers=())}
    return found


def measure_shape(config: dict[str, Any], name: str, device: str, quick: bool) -> dict[str, Any]:
    """Every number of tokens and every batch size of one shape."""
    shape = config["shapes"][name]
    changes = config["quick"] if quick else {}
    latency = LatencyConfig(**{**shape["latency"], **changes.get("latency", {})}, seed=config["seed"])
    model = build_model(config, shape, device)
    variants = build_variants(model, config, shape)
    text, skipped = model.config.text_config, len(shape["skip"])
    cases = []
    for tokens in shape["tokens"][: changes.get("tokens")]:
        prompt, again = prompt_flops(text, skipped, tokens), remerge_flops(text, skipped)
        for batch in changes.get("batches", shape["batches"]):
            case = Case(name, tokens, batch, config["seed"])
            inputs = build_inputs(model, batch, tokens, config["seed"])
            content: dict[str, Any] = {"shape": name, "tokens": tokens, "batch": batch}
            if batch == 1:
                for form in (PUBLISHED, ROUTED):  # the forms of one student, or the times would mean nothing
                    verify_merge(variants["routed, not merged"], variants[form], inputs)
                content["text_tower_flops"] = {"prompt": prompt, "remerge": again, "ratio": prompt / (prompt + again)}
                fine = latency.model_copy(update={**shape["fine"], "decode_tokens": 0, **changes.get("fine", {})})
                content["bound"] = measure_bound(variants, inputs, fine)
                print_rows(content["bound"])
            report = measure_case(variants, inputs, latency)
            content |= {"conditions": report.conditions, "times": summary(report)}
            content["rows"] = compare(report, config["answers"])
            print_case(case, report, content["rows"])
            if device == "cuda":
                content["graphs"] = measure_graphs(variants, inputs, latency)
            cases.append(content)
        largest = Case(name, tokens, changes.get("batches", shape["batches"])[-1], config["seed"])
        cases[-1]["batched"] = measure_batched(variants, model, largest, latency)
        print({row: round(ratio["estimate"], 4) for row, ratio in cases[-1]["batched"].items()})
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "cases": cases}


def main() -> None:
    """Measure, print the tables, write the result."""
    config = load_config(HERE)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="at most two minutes")
    parser.add_argument("--shape", choices=config["shapes"], help="only this one")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [given.shape] if given.shape else config["run"][device][: 1 if given.quick else None]
    shapes = {name: measure_shape(config, name, device, given.quick) for name in names}
    hardware = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    content = {"seed": config["seed"], "quick": given.quick, "config": config, "shapes": shapes}
    print("wrote", write_result(HERE, "quick" if given.quick else "full", content, hardware).name)


if __name__ == "__main__":
    main()
