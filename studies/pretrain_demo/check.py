"""Does the demo model suit its purpose? `python studies/pretrain_demo/check.py`

Measures the pretrained model on its own families and on the downstream task, the effect of deleting each
attention, and what a short adapter-only fine-tune reaches, with and without the most redundant attentions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from evaluate import accuracy, family_split, write_result
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

from eas_search.models.demo import demo_path
from eas_search.tasks import get_task
from eas_search.tasks.digits_vqa import PLAIN, PRETRAINING_FAMILIES


class LightAdapter(nn.Module):
    """x̂ + B (C x̂ + c) + b, with B and b starting at zero."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = x + self.up(self.down(x))
        return adapted


@contextmanager
def deleted(model: Any, layers: Iterable[int]) -> Iterator[None]:
    """The attention of these layers adds nothing to the residual stream."""

    def silence(module: nn.Module, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.zeros_like(output[0]), *output[1:])

    handles = [model.model.language_model.layers[i].self_attn.register_forward_hook(silence) for i in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_adapters(model: Any, rank: int) -> nn.ModuleList:
    """Freeze the model and put a light adapter behind the norm of each attention."""
    model.requires_grad_(False)
    adapters = nn.ModuleList()
    for layer in model.model.language_model.layers:
        adapter = LightAdapter(model.config.text_config.hidden_size, rank)
        layer.input_layernorm.register_forward_hook(lambda module, args, output, adapter=adapter: adapter(output))
        adapters.append(adapter)
    return adapters


def fine_tune(
    model: Any,
    parameters: Iterable[nn.Parameter],
    batches: Callable[[], Iterator[dict[str, Tensor]]],
    steps: int,
    peak: float,
) -> None:
    """AdamW with 10 warm-up steps and a linear decay to zero."""
    optimiser = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min((s + 1) / 10, (steps - s) / (steps - 10)))
    done = 0
    while done < steps:
        for batch in batches():
            optimiser.zero_grad()
            model(**batch).loss.backward()
            optimiser.step()
            schedule.step()
            done += 1
            if done == steps:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=demo_path())
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    processor = AutoProcessor.from_pretrained(options.model)
    model: Any = LlavaForConditionalGeneration.from_pretrained(options.model)
    depth = model.config.text_config.num_hidden_layers

    own = family_split(processor, PRETRAINING_FAMILIES, PLAIN, "validation", 1024)
    task = get_task("digits-vqa")
    train, validation, test = (
        task.encode(processor, task.examples(s, n)) for s, n in (("train", None), ("validation", 512), ("test", 2048))
    )
    settings = {
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "rank": 8,
    }
    found: dict[str, Any] = {"settings": settings}
    found["pretraining_families"] = accuracy(model, own)
    found["zero_shot"] = accuracy(model, test)
    print(found)
    found["pretraining_without_one"] = []
    for i in range(depth):
        with deleted(model, [i]):
            found["pretraining_without_one"].append(accuracy(model, own)["all"])
    print(found["pretraining_without_one"], flush=True)

    adapters = add_adapters(model, rank=8)
    generator = torch.Generator().manual_seed(options.seed)
    start = time.perf_counter()
    fine_tune(
        model,
        adapters.parameters(),
        lambda: train.batches(32, generator),
        options.steps,
        options.learning_rate,
    )
    found["fine_tune_seconds"] = round(time.perf_counter() - start, 1)
    found["fine_tuned"] = accuracy(model, test)
    print(found["fine_tune_seconds"], found["fine_tuned"], flush=True)
    singles = []
    for i in range(depth):
        with deleted(model, [i]):
            singles.append(accuracy(model, validation)["all"])
    order = sorted(range(depth), key=lambda i: -singles[i])
    found["fine_tuned_without_one_validation"] = singles
    for k in (2, 4, 6):
        with deleted(model, order[:k]):
            found[f"fine_tuned_without_{k}"] = {"layers": sorted(order[:k]), **accuracy(model, test)}
            print(found[f"fine_tuned_without_{k}"], flush=True)
    print(write_result(options.output, "check", found))


if __name__ == "__main__":
    main()
