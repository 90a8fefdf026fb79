"""The steps of the study, one function each: they raise `Wrong` or return what they measured."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from reference import without
from torch import Tensor, nn
from watch import difference, output_projection, outputs, projections_run, reached, real_double

from eas_search.architectures import AttentionSite, attention_sites, prove_sites
from eas_search.exceptions import EasSearchError, UnsupportedModelError
from eas_search.export import load_pretrained, save_pretrained
from eas_search.merging import merge
from eas_search.skip_config import SkipConfig
from eas_search.skipping import adapter_parameters, apply_skips

SINGLE, DOUBLE = 1e-4, 1e-9


class Wrong(AssertionError):
    """A result that the code under test does not refuse and that is not what it must be."""


class NotApplicable(Exception):
    """The step says nothing about this model; the message says why."""


@dataclass
class Case:
    """One tiny model with its inputs and what is found out about it on the way."""

    model: Any
    inputs: dict[str, Tensor]
    sites: list[AttentionSite] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    def chosen(self) -> list[AttentionSite]:
        """First, middle and last site of every stack (by stack and kind)."""
        stacks: dict[tuple[str, str], list[AttentionSite]] = {}
        for site in self.sites:
            stacks.setdefault((site.stack, getattr(site, "kind", "self")), []).append(site)
        picked = {s.index: s for m in stacks.values() for s in (m[0], m[len(m) // 2], m[-1])}
        return [picked[index] for index in sorted(picked)]

    def firsts(self) -> list[AttentionSite]:
        """The first site of every stack, and the very last site."""
        seen: dict[tuple[str, str], AttentionSite] = {}
        for site in self.sites:
            seen.setdefault((site.stack, getattr(site, "kind", "self")), site)
        return list({site.index: site for site in (*seen.values(), self.sites[-1])}.values())

    def projection(self, site: AttentionSite) -> str:
        """The output projection of a site, found by watching the intact model run."""
        held = f"{site.name}.out_proj"
        if held not in self.order and hasattr(self.model.get_submodule(site.name), "out_proj"):
            return held  # its weight goes to a function, as in torch's own multi-head attention
        return output_projection(self.order, site.name)


def within(value: float, tolerance: float, what: str) -> float:
    """`value`, or `Wrong` when it is above the tolerance or not a number."""
    if not value <= tolerance:
        raise Wrong(f"{what} differs by {value:.2g}, expected at most {tolerance:g}")
    return value


def doubled(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs in double precision."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def skips(sites: list[AttentionSite], **more: Any) -> SkipConfig:
    """A configuration that skips these sites."""
    return SkipConfig(skip=tuple(site.index for site in sites), **more)


def detect(case: Case) -> dict[str, Any]:
    """The sites that the inputs reach."""
    if any(value.isnan().any() for value in outputs(case.model, case.inputs).values()):
        raise NotApplicable("the intact model gives NaN")
    found = attention_sites(case.model)
    case.order = projections_run(case.model, case.inputs)
    counts = reached(case.model, case.inputs, [site.name for site in found])
    case.sites = [site for site in found if counts[site.name] > 0]
    if not case.sites:
        raise NotApplicable("the inputs of the study reach none of the sites")
    kinds = sorted({getattr(site, "kind", "self") for site in case.sites})
    towers = sorted({site.tower for site in case.sites})
    patterns = sorted({site.pattern.name for site in case.sites})
    return {"sites": len(found), "reached": len(case.sites), "kinds": kinds, "towers": towers, "patterns": patterns}


def prove(case: Case) -> dict[str, Any]:
    """The package's own probe on the reached sites."""
    try:
        differences = prove_sites(case.model, case.sites, case.inputs)
    except UnsupportedModelError as refusal:
        proven = []
        for site in case.sites:
            try:
                prove_sites(case.model, [site], case.inputs)
                proven.append(site)
            except UnsupportedModelError as error:
                case.refused.append(f"{site.name}: {error}")
        case.sites = proven
        if not proven:
            raise refusal
        return {"refused": len(case.refused)}
    return {"largest": max(differences.values(), default=0.0), "refused": 0}


def delete(case: Case) -> dict[str, Any]:
    """Plain deletion equals zeroed output projections, in single and double precision, and attention does not run."""
    chosen = case.chosen()
    sets = [[site] for site in case.firsts()] + ([chosen] if len(chosen) > 1 else [])
    intact = outputs(case.model, case.inputs)
    worst, effects = 0.0, []
    for sites in sets:
        student = apply_skips(case.model, skips(sites, pia_dim=0)).eval()
        zeroed = without(case.model, [case.projection(site) for site in sites])
        expected = outputs(zeroed, case.inputs)
        worst = max(worst, within(difference(expected, outputs(student, case.inputs)), SINGLE, "deletion"))
        effects.append(difference(intact, expected))
        _not_run(case, student, zeroed, sites)
    if max(effects) < 1e-4:
        raise NotApplicable(f"deleting these attentions changes the outputs by {max(effects):.1g} only")
    found = {"single": worst, "effect": max(effects)}
    if difference(intact, outputs(case.model, case.inputs)) != 0.0:
        raise Wrong("the caller's model has changed")
    found["double"] = in_double(case, lambda model, inputs: _deleted(case, chosen, model, inputs))
    return found


def _deleted(case: Case, sites: list[AttentionSite], model: nn.Module, inputs: dict[str, Tensor]) -> float:
    student = apply_skips(model, skips(sites, pia_dim=0)).eval()
    zeroed = without(model, [case.projection(site) for site in sites])
    return difference(outputs(zeroed, inputs), outputs(student, inputs))


def in_double(case: Case, question: Callable[[nn.Module, dict[str, Tensor]], float]) -> float | str:
    """A difference measured in double precision throughout; a text when the intact model does not run in it."""
    model, inputs = copy.deepcopy(case.model).double(), doubled(case.inputs)
    with real_double():
        try:
            if any(value.isnan().any() for value in outputs(model, inputs).values()):
                return "n/a: the intact model gives NaN"
        except Exception as error:  # the intact model, not the code under test
            return f"n/a: {_line(error)}"
        return within(question(model, inputs), DOUBLE, "in double precision it")


def _not_run(case: Case, student: nn.Module, zeroed: nn.Module, sites: list[AttentionSite]) -> None:
    """The student runs exactly the projections of the zeroed model (which experts it chooses depends on what it
    computes) less those of the skipped attentions, and holds none of their weights."""
    gone = {case.projection(site) for site in sites}
    gone |= {name for name in case.order if any(name.startswith(site.name + ".") for site in sites)}
    expected = len([name for name in projections_run(zeroed, case.inputs) if name not in gone])
    run = projections_run(student, case.inputs)
    if len(run) != expected:
        raise Wrong(f"the student runs {len(run)} projections, expected {expected} of {len(case.order)}")
    kept = {parameter.data_ptr() for parameter in student.parameters()}
    shared = {
        parameter.data_ptr()
        for n, parameter in case.model.named_parameters(remove_duplicate=False)
        if n.rpartition(".")[0] not in gone
    }
    for name in gone:
        weight = case.model.get_submodule(name).weight.data_ptr()
        if weight in kept and weight not in shared:
            raise Wrong(f"{name} is still allocated in the student")


def randomised(student: nn.Module) -> nn.Module:
    """All adapters with normal weights, so that none is a no-op."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(student).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((0.3 * noise).to(parameter.dtype))
    return student.eval()


def placements(sites: list[AttentionSite]) -> list[str]:
    """Placements that all of these sites allow."""
    every = ("ffn", "residual", "parallel")
    return [name for name in every if all(name in getattr(site, "placements", every) for site in sites)]


def groups_of(case: Case) -> list[list[AttentionSite]]:
    """The chosen sites, those that allow all placements apart from the others."""
    chosen = case.chosen()
    whole = [site for site in chosen if len(placements([site])) == 3]
    part = [site for site in chosen if len(placements([site])) < 3]
    return [group for group in (whole, part) if group]


def pia(case: Case) -> dict[str, Any]:
    """PIAs of every allowed placement change the output, and merging them does not; nor in double precision."""
    found: dict[str, Any] = {}
    for group in groups_of(case):
        deleted = outputs(apply_skips(case.model, skips(group, pia_dim=0)).eval(), case.inputs)
        for placement in placements(group):
            student = randomised(apply_skips(case.model, skips(group, pia_dim=8, placement=placement)))
            result = outputs(student, case.inputs)
            changed = difference(deleted, result)
            if not changed > 1e-5:
                raise Wrong(f"a random PIA placed {placement} changes the output by {changed:.1g} only")
            key = placement if len(group) == len(case.chosen()) else f"{placement} ({len(group)} sites)"
            try:
                gap = difference(result, outputs(merge(student).eval(), case.inputs))
            except UnsupportedModelError as refusal:  # of this placement; the message names another one
                found[key] = {"refused": str(refusal)}
                continue
            config = skips(group, pia_dim=8, placement=placement)
            double = in_double(case, lambda model, inputs, config=config: _merged(model, config, inputs))
            within(gap, SINGLE, f"merge ({placement})")
            found[key] = {"changed": changed, "single": gap, "double": double}
        if all("refused" in found[key] for key in found):
            raise UnsupportedModelError(next(iter(found.values()))["refused"])
    return found


def _merged(model: nn.Module, config: SkipConfig, inputs: dict[str, Tensor]) -> float:
    student = randomised(apply_skips(model, config).double())
    return difference(outputs(student, inputs), outputs(merge(student).eval(), inputs))


def merged_student(case: Case, sites: list[AttentionSite] | None = None, **more: Any) -> nn.Module:
    """The sites (the chosen ones) skipped and merged, with the richest placement that can be merged."""
    sites = case.chosen() if sites is None else sites
    for placement in reversed(placements(sites)):
        student = randomised(apply_skips(case.model, skips(sites, pia_dim=8, placement=placement, **more)))
        try:
            return merge(student).eval()
        except UnsupportedModelError as error:
            refusal = error
    raise refusal


def export(case: Case) -> dict[str, Any]:
    """Saved and loaded, a merged student gives the same outputs."""
    merged = merged_student(case)
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(merged, folder)
            loaded = load_pretrained(folder)
        gap = difference(outputs(merged, case.inputs), outputs(loaded, case.inputs))
        return {"single": within(gap, 1e-6, "loaded model")}
    except (EasSearchError, Wrong) as error:
        if complaint := _not_kept(case):
            raise NotApplicable(f"the intact model does not survive saving: {complaint}") from error
        raise


def _not_kept(case: Case) -> str:
    """Why the intact model itself, saved and loaded by `transformers`, is another one; '' when it is the same."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            case.model.save_pretrained(folder)
            loaded = type(case.model).from_pretrained(folder).eval()
        gap = difference(outputs(case.model, case.inputs), outputs(loaded, case.inputs))
    except Exception as error:
        return _line(error)
    return "" if gap <= 1e-6 else f"it differs by {gap:.1g}"


def _line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:200]
