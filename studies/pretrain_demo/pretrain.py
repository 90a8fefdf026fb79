"""Pretrain the embedded demo model from scratch: `python studies/pretrain_demo/pretrain.py`.

Two phases: the vision tower and the projector learn to read single cells (cheap), then everything learns to
answer questions. Attention sublayers are dropped at random, deeper ones more often, so that many become
dispensable, as they are in large pretrained models. Writes the model folder and one file into results/.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from batches import PackedBatch, PackedShape, draw_packed, normalise, packed_layout
from build import build_model, build_processor, build_tokenizer
from evaluate import accuracy, family_split, write_result
from stochastic_depth import dropped_attention
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eas_search.models.demo import demo_path
from eas_search.tasks.digit_scenes import draw_scenes
from eas_search.tasks.digits_vqa import (
    COLOURS,
    DIGITS,
    DOWNSTREAM_FAMILIES,
    PLAIN,
    PRETRAINING_FAMILIES,
    SHIFTED,
)

HERE = Path(__file__).parent
SHARPNESS = 20.0  # inverse temperature of cosine similarities


def vocabulary(reserved: list[str]) -> list[str]:
    """All words of both wordings, the answers and the reserved words."""
    words = [*DIGITS, *COLOURS, "yes", "no", *reserved]
    for wording in (PLAIN, SHIFTED):
        words += [*wording.rows, *wording.columns, *wording.colours]
    for family in (*PRETRAINING_FAMILIES, *DOWNSTREAM_FAMILIES):
        words += [word for text in family.templates for word in text.split() if not word.startswith("{")]
    return words


def fit(
    parameters: list[nn.Parameter],
    loss_of: Callable[[float], Tensor],
    phase: dict[str, Any],
    save: Callable[[], None],
    decayed: Sequence[nn.Parameter] = (),
) -> None:
    """AdamW with 5 % warm-up and a cosine decay, gradient norm clipped at 1.

    Args:
        parameters: all that are trained.
        loss_of: the loss of one step, given the share of the steps that is done.
        phase: name, steps, peak learning rate and weight decay.
        save: called every 50 steps.
        decayed: the only ones that `weight_decay` shrinks. Embeddings must not be among them: it would shrink the
            words that pretraining never shows.
    """
    steps, peak = phase["steps"], phase["learning_rate"]
    shrinking = {id(parameter) for parameter in decayed}
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) not in shrinking], "weight_decay": 0.0}]
    if shrinking:
        groups.append({"params": list(decayed), "weight_decay": phase["weight_decay"]})
    optimiser = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, peak, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    start, losses = time.perf_counter(), []
    for step in range(1, steps + 1):
        loss = loss_of(step / steps)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps:
            save()
            seconds = time.perf_counter() - start
            print(f"{phase['name']} {step}/{steps} loss {np.mean(losses[-50:]):.4f} {seconds:.0f} s", flush=True)


def vision_loss(model: Any, ids: dict[str, int], images: int, rng: np.random.Generator) -> Tensor:
    """Contrast of every projected patch with the (fixed) embeddings of the words that describe its cell.

    Sum of four cross-entropies over cosine similarities: digit, tint, row and column. Afterwards an image token lies
    near the sum of its words' embeddings, much as image-text contrastive pretraining prepares a large model.
    """
    scenes = draw_scenes("pretraining", images, rng)
    features = torch.stack(model.get_image_features(normalise(scenes.pixels)).pooler_output)  # [B, 16, d]
    words = model.get_input_embeddings().weight.detach()
    cell = torch.tensor([(p // 4 // 2) * 2 + p % 4 // 2 for p in range(16)])  # the cell of each patch
    described = [
        (DIGITS, torch.from_numpy(scenes.digits)[:, cell]),
        (PLAIN.colours, torch.from_numpy(scenes.colours)[:, cell]),
        (PLAIN.rows, (cell // 2).expand(images, 16)),
        (PLAIN.columns, (cell % 2).expand(images, 16)),
    ]
    losses = []
    for choices, wanted in described:
        options = torch.nn.functional.normalize(words[[ids[word] for word in choices]], dim=-1)
        similarity = torch.nn.functional.normalize(features, dim=-1) @ options.T
        losses.append(cross_entropy(SHARPNESS * similarity.flatten(0, 1), wanted.flatten()))
    return torch.stack(losses).sum()


def language_loss(model: Any, batch: PackedBatch, bos: int) -> Tensor:
    """Cross-entropy on the batch's targets, all blocks of an image packed into one sequence."""
    features = torch.stack(model.get_image_features(batch.pixels).pooler_output)
    embed = model.get_input_embeddings()
    start = embed(torch.full((len(features), 1), bos))
    sequence = torch.cat([start, features, embed(batch.blocks.flatten(1))], dim=1)
    prefix = 1 + features.shape[1]
    position, mask = packed_layout(prefix, *batch.blocks.shape[1:])
    hidden = model.model.language_model(
        inputs_embeds=sequence, position_ids=position, attention_mask=mask, use_cache=False
    ).last_hidden_state[:, prefix:]
    targets = batch.targets.flatten(1)
    labelled = targets != -100
    return cross_entropy(model.lm_head(hidden[labelled]), targets[labelled])


@torch.no_grad()
def scale_features(model: Any, size: float, rng: np.random.Generator) -> None:
    """Scale the projector so that image tokens have the root mean square `size`, that of word embeddings."""
    scenes = draw_scenes("pretraining", 64, rng)
    features = torch.stack(model.get_image_features(normalise(scenes.pixels)).pooler_output)
    for parameter in model.model.multi_modal_projector.linear_2.parameters():
        parameter.mul_(size / features.square().mean().sqrt())


def match_unseen_norms(model: Any, seen: Tensor) -> None:
    """Scale the embeddings of words that pretraining never showed to the mean norm of those it did."""
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[~seen] *= (weight[seen].norm(dim=1).mean() / weight[~seen].norm(dim=1, keepdim=True)).clamp(0.1, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--output", type=Path, default=demo_path(), help="model folder to write")
    options = parser.parse_args()
    settings = yaml.safe_load(options.config.read_text())
    torch.manual_seed(settings["seed"])
    torch.set_num_threads(settings["threads"])
    rng = np.random.default_rng(settings["seed"])
    start = time.perf_counter()

    tokenizer = build_tokenizer(vocabulary(settings["reserved_words"]))
    processor = build_processor(tokenizer)
    model = build_model(settings["model"], tokenizer).train()
    ids = tokenizer.get_vocab()
    initial = model.get_input_embeddings().weight.detach().clone()

    def save() -> None:  # also every 50 steps, so that an interrupted run leaves a model
        model.save_pretrained(options.output)
        processor.save_pretrained(options.output)

    phase = {"name": "vision", **settings["vision_phase"]}
    seeing = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    fit(seeing, lambda _: vision_loss(model, ids, phase["images"], rng), phase, save)

    phase = {"name": "joint", **settings["joint_phase"]}
    shape = PackedShape(phase["images"], phase["blocks_per_image"], phase["length"])
    highest = [0.0]

    def joint_loss(progress: float) -> Tensor:
        # Captions teach to look things up, which is learnt late from answers alone; then questions take over.
        highest[0] = phase["attention_drop"] * min(1.0, 2 * progress)
        captions = phase["captions"] * max(0.0, 1 - 2 * progress)
        return language_loss(model, draw_packed(ids, shape, captions, rng), ids["<bos>"])

    scale_features(model, model.get_input_embeddings().weight.detach().square().mean().sqrt().item(), rng)
    layers = model.model.language_model.layers
    # Without decay the matrices keep much of their random start, and a token that training never showed makes every
    # block amplify what reaches it: rounding errors, too.
    matrices = [parameter for parameter in layers.parameters() if parameter.dim() == 2]
    with dropped_attention(layers, highest):
        fit(list(model.parameters()), joint_loss, phase, save, matrices)
    match_unseen_norms(model, (model.get_input_embeddings().weight != initial).any(dim=1))
    save()
    model.eval()
    seconds = round(time.perf_counter() - start)
    held_out = family_split(processor, PRETRAINING_FAMILIES, PLAIN, "validation", settings["evaluation"]["examples"])
    result = {"seconds": seconds, "accuracy": accuracy(model, held_out), "settings": settings}
    print(result["accuracy"], write_result(HERE / "results", "pretrain", result))


if __name__ == "__main__":
    main()
