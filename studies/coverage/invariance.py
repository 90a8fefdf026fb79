"""What must not matter: other samples, the content of padding, later tokens for earlier ones, logits not asked for."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from checks import SINGLE, Case, NotApplicable, Wrong, merged_student
from feeds import ordinary_tokens
from torch import Tensor
from watch import difference, outputs


def first_sample(values: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
    """The first sample's share of everything, packed or not."""
    return {name: value[: value.shape[0] // batch] for name, value in values.items()}


def alone(model: Any, inputs: dict[str, Tensor]) -> float:
    """How the first sample's outputs change when the other samples of the batch are left out."""
    batch = 2
    together = outputs(model, inputs)
    single = outputs(model, first_sample(inputs, batch))
    shares = {k: v for k, v in first_sample(together, batch).items() if k in single and v.shape == single[k].shape}
    if not shares:
        raise ValueError("outputs have no batch dimension")
    return difference(shares, single)


def padded(model: Any, inputs: dict[str, Tensor]) -> float:
    """How the outputs of visible tokens change with the content of right padding."""
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    mask[:, -3:] = 0
    results = []
    for seed in (0, 1):
        ids[:, -3:] = ordinary_tokens(model.config, (len(ids), 3), torch.Generator().manual_seed(seed))
        results.append(outputs(model, {**inputs, "input_ids": ids, "attention_mask": mask}))
    n = ids.shape[1]
    cut = [{k: v[:, :-3] if v.dim() > 1 and v.shape[1] == n else v for k, v in one.items()} for one in results]
    return difference(*cut)


def earlier(model: Any, inputs: dict[str, Tensor]) -> float:
    """How earlier logits change with the last token."""
    name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    ids = inputs[name].clone()
    before = outputs(model, inputs)["logits"]
    ids[:, -1] = ordinary_tokens(model.config, (len(ids),), torch.Generator().manual_seed(9))
    ids[:, -1] += (ids[:, -1] == inputs[name][:, -1]).long()
    after = outputs(model, {**inputs, name: ids})["logits"]
    if before.dim() != 3 or before.shape[1] < 2:
        raise ValueError("no logits per token")
    return difference({"logits": before[:, :-1]}, {"logits": after[:, :-1]})


def last(model: Any, inputs: dict[str, Tensor]) -> float:
    """How the last position's logits change when no others are asked for."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ValueError("always gives all logits")
    every = outputs(model, inputs)["logits"][:, -1:]
    return difference({"logits": every}, {"logits": outputs(model, {**inputs, "logits_to_keep": 1})["logits"]})


def invariance(case: Case) -> dict[str, Any]:
    """What leaves the intact model's answers alone must leave the student's alone."""
    pooled = merged_student(case)
    questions: dict[str, tuple[Any, Any]] = {"batch": (alone, pooled)}
    if {"input_ids", "attention_mask"} <= case.inputs.keys():
        questions["padding"] = (padded, pooled)
    if any(site.causal for site in case.sites):
        causal = [site for site in case.chosen() if site.causal]
        questions["causality"] = (earlier, merged_student(case, causal, pooling="prefix"))
        every = [site for site in case.sites if site.causal]  # as many blocks as can compute the last token alone
        questions["last token"] = (last, merged_student(case, every, pooling="none"))
    found: dict[str, Any] = {}
    for name, (question, student) in questions.items():
        try:
            intact = question(case.model, case.inputs)
        except Exception as error:  # the intact model, not the code under test
            found[name] = f"n/a: {type(error).__name__}: {str(error)[:80]}"
            continue
        if intact > SINGLE:
            found[name] = f"n/a: the intact model changes by {intact:.1g}"
            continue
        found[name] = question(student, case.inputs)
        if not found[name] <= SINGLE:
            raise Wrong(f"{name}: the student changes by {found[name]:.2g}, the intact model by {intact:.1g}")
    if all(isinstance(value, str) for value in found.values()):
        raise NotApplicable("; ".join(f"{name} {value}" for name, value in found.items()))
    return found
