"""What a merged PIA costs: merged student / the same model with those attentions deleted and nothing in their place.

python studies/bench_merge/bench.py [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from eas_search.latency import LatencyConfig, measure_latency
from eas_search.merging import merge
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.skipping import adapter_parameters, apply_skips, compute_all_tokens
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
    latency = LatencyConfig(**config["quick" if quick else "latency"], seed=config["seed"])
    demo = compare(bench.model, bench.latency_inputs(), config, latency, "demo, width 128")
    wide, tokens = wide_model(config)
    content = {
        "seed": config["seed"],
        "quick": quick,
        "config": config,
        "demo": demo,
        "wide": compare(wide, tokens, config, latency, f"random Llama, width {wide.config.hidden_size}"),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    print("wrote", write_result(arguments.output, "quick" if quick else "full", content, bench.hardware).name)


def wide_model(config: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A random Llama and a batch of tokens for it: what the demo is too narrow to show."""
    torch.manual_seed(config["seed"])
    model = LlamaForCausalLM(LlamaConfig(**config["wide"]["model"])).eval().requires_grad_(False)
    size = (config["wide"]["batch_size"], config["wide"]["tokens"])
    tokens = torch.randint(0, model.config.vocab_size, size)
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def compare(
    model: nn.Module, inputs: dict[str, Tensor], config: dict[str, Any], latency: LatencyConfig, title: str
) -> dict[str, Any]:
    """Time every form of PIA against deletion, print the table and return the figures."""
    skip = tuple(config["skipped"])
    deleted, again = (apply_skips(model, SkipConfig(skip=skip, pia_dim=0, pooling="none")).eval() for _ in range(2))
    generator = torch.Generator().manual_seed(config["seed"])
    every = apply_skips(model, SkipConfig(skip=skip, pia_dim=0, pooling="none")).eval()
    compute_all_tokens(every)
    candidates = {"deleted (A/A)": again, "deleted, every token computed": every}
    forms = itertools.product(config["pia_dims"], ("ffn", "parallel", "residual"), ("none", "prompt"))
    for rank, placement, pooling in forms:
        student = apply_skips(model, SkipConfig(skip=skip, pia_dim=rank, placement=placement, pooling=pooling))
        for parameter in adapter_parameters(student).values():
            parameter.data.normal_(std=0.02, generator=generator)
        candidates[f"{placement}, rank {rank}, pooling {pooling}"] = merge(student).eval()
    candidates["original model"] = model
    report = measure_latency(candidates, inputs, baseline=deleted, config=latency)
    batch, length = inputs["input_ids"].shape
    table = Table(title=f"{title}: {len(skip)} attentions skipped, {batch} x {length} tokens, time / deleted")
    for heading in ("", "prefill", "95 %", "decode", "95 %"):
        table.add_column(heading)
    rows = {}
    for form, measured in report.items():
        cells, rows[form] = [form], measured.to_dict()
        for phase in (measured.prefill, measured.decode):
            low, high = phase.ratio.within_run
            cells += [f"{phase.ratio.estimate:.3f}", f"{low:.3f} – {high:.3f}"]
        for phase in rows[form].values():
            phase["timing"].pop("samples")
            phase["baseline"].pop("samples")
        table.add_row(*cells)
    Console(width=110).print(table)
    return {"conditions": report.conditions, "ratios": rows}


if __name__ == "__main__":
    main()
