"""The latency predictor against timings that were made up from known costs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from eas_search import prediction
from eas_search.architectures import attention_sites
from eas_search.exceptions import EasSearchError
from eas_search.latency.predictor import SMALL, LatencyPredictor, fit_predictor
from eas_search.latency.terms import ORIGINAL, SiteClasses, site_classes, terms_of
from eas_search.prediction import measured_configs
from eas_search.search_space import SearchSpace
from eas_search.setting_groups import SpaceSettings
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.stage_folder import StageFolder

# Milliseconds: the whole model, one attention of each tower, an FFN for the tokens that nobody asks for, and what a PIA
# costs at each placement and per rank.
MODEL, ATTENTION, FFN = 20.0, {"text": 0.7, "vision": 0.3}, 0.4
PIA = {"parallel": (0.02, 0.004), "ffn": (0.01, 0.003)}
TEXT = range(12)
ORIGINALS = {ORIGINAL: 1.0}


def made_up(config: SkipConfig, texts: int = 12) -> float:
    """Time over the original model's, which has `texts` text sites, no adapters, and takes 1 ms less."""
    time = MODEL + 1.0
    for index in config.skip:
        time -= ATTENTION["text" if index in TEXT else "vision"]
        if config.pia_dim:
            per_site, per_rank = PIA[config.placement]
            time += per_site + per_rank * config.pia_dim
    if any(index < texts for index in config.skip) and (config.pooling == "none" or config.pia_dim == 0):
        last = list(itertools.takewhile(lambda index: index in config.skip, reversed(range(texts))))
        time -= FFN * min(texts, len(last) + 1)
    return time / MODEL


def make_space(
    sites: int = 18, dims: tuple[int, ...] = (4, 8, 16), placements: Any = ("parallel", "ffn"), **student: Any
) -> Any:
    found = tuple(SimpleNamespace(index=i, tower="text" if i in TEXT else "vision") for i in range(sites))
    space = SearchSpace(
        found, SpaceSettings(pia_dims=dims, placements=placements), SkipConfig(adapter_dim=2, **student)
    )  # type: ignore[arg-type]
    ends = (tuple(site.index for site in reversed(found) if site.tower == "text"),)
    return space, SiteClasses({site.index: f"{site.tower} self" for site in found}, ends)


def fit(space: SearchSpace, classes: SiteClasses, noise: float = 0.0, seed: int = 0) -> LatencyPredictor:
    rng, configs, texts = np.random.default_rng(seed), measured_configs(space, classes), len(classes.ends[0])
    ratios = [made_up(config, texts) * float(np.exp(rng.normal(0, noise))) for config in configs]
    return fit_predictor([terms_of(config, classes) for config in configs], ratios)


@pytest.mark.parametrize("sites", [1, 2, 3, 12, 18])
@pytest.mark.parametrize("dims", [(4, 8, 16), (8,), (0,), (0, 8), (0, 4, 16)])
@pytest.mark.parametrize("placements", [("parallel", "ffn"), ("ffn",)])
@pytest.mark.parametrize("pooling", ["prompt", "none"])
def test_a_linear_model_is_recovered_exactly(sites: int, dims: tuple[int, ...], placements: Any, pooling: str) -> None:
    space, classes = make_space(sites, dims, placements, pooling=pooling)
    predictor, rng = fit(space, classes), np.random.default_rng(1)
    assert predictor.leave_one_out < (1e-6 if pooling == "none" and 0 not in dims else 0.02)  # no measurement to spare
    for _ in range(50):
        skip = rng.choice(sites, size=rng.integers(sites + 1), replace=False)
        config = space.config([int(i) for i in skip], int(rng.integers(len(dims))), int(rng.integers(len(placements))))
        ratio, low, high = predictor.predict(terms_of(config, classes))
        assert ratio == pytest.approx(made_up(config, min(sites, 12)), rel=1e-6)
        assert low <= ratio * (1 + 1e-9)
        assert ratio <= high * (1 + 1e-9)


def test_known_costs_come_out_in_their_units() -> None:
    space, classes = make_space(12)
    # 12 sites of 0.7 ms replaced by 16 ranks of 0.003 ms and 0.01 ms, of a model of 20 ms: (21 - 12 · 0.642) / 20
    ratio, _, _ = fit(space, classes).predict(terms_of(space.config(list(TEXT), 2, 1), classes))
    assert ratio == pytest.approx(0.6648)


@pytest.mark.parametrize("pooling", ["prompt", "none"])
def test_few_configurations_are_measured_and_they_reach_the_corners(pooling: str) -> None:
    space, classes = make_space(12, pooling=pooling)
    configs = measured_configs(space, classes)
    assert len(configs) == 9
    assert {(len(c.skip), c.pia_dim, c.placement) for c in configs} == {
        (0, 4, "parallel"),
        *((count, 4, place) for count in (4, 12) for place in ("parallel", "ffn")),
        *((count, 16, place) for count in (8, 12) for place in ("parallel", "ffn")),
    }
    space, classes = make_space(18)
    towers = [{classes.names[int(index)] for index in config.skip} for config in measured_configs(space, classes)]
    assert [towers.count(set(names)) for names in ((), ("text self",), ("vision self",))] == [1, 8, 8]
    assert len(measured_configs(space, classes)[-1].skip) == len(towers) == 18  # the last one skips everything


@pytest.mark.parametrize("noise", [0.01, 0.03])
def test_the_interval_covers_a_new_measurement(noise: float) -> None:
    space, classes = make_space(12)
    inside = total = 0
    for seed in range(40):
        predictor, rng = fit(space, classes, noise, seed), np.random.default_rng([seed, 1])
        for _ in range(10):
            skip = [int(i) for i in rng.choice(12, size=rng.integers(1, 13), replace=False)]
            config = space.config(skip, int(rng.integers(3)), int(rng.integers(2)))
            _, low, high = predictor.predict(terms_of(config, classes))
            inside += low <= made_up(config) * float(np.exp(rng.normal(0, noise))) <= high
            total += 1
    assert stats.binomtest(inside, total).proportion_ci(0.999).high > 0.95
    assert inside / total > 0.9


def test_noise_is_not_taken_for_differences_between_forms() -> None:
    """Against plain least squares with the same nine measurements, each 4 % off."""
    space, classes = make_space(12)
    configs = measured_configs(space, classes)
    rows = [terms_of(config, classes) for config in configs]
    asked = [space.config(range(count), dim, place) for count in (3, 6, 9) for dim in range(3) for place in range(2)]
    terms = sorted({term for row in rows for term in row})
    design, wanted = (
        np.array([[row.get(term, 0.0) for term in terms] for row in some])
        for some in (rows, [terms_of(config, classes) for config in asked])
    )
    truth = np.array([made_up(config) for config in asked])
    ours, plain = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        ratios = np.array([made_up(config) for config in configs]) * np.exp(rng.normal(0, 0.04, len(configs)))
        found = np.linalg.lstsq(design / ratios[:, None], np.ones(len(ratios)), rcond=None)[0]
        plain.append(np.abs(wanted @ found / truth - 1).mean())
        predictor = fit_predictor(rows, ratios.tolist())
        ours.append(np.mean([abs(predictor.predict(terms_of(c, classes))[0] / made_up(c) - 1) for c in asked]))
        assert predictor.effective < len(predictor.coefficients)
    assert np.mean(ours) < 0.85 * np.mean(plain)


def test_noise_that_fits_by_chance_is_not_believed() -> None:
    """Measured as if `ffn` were a quarter faster; the timings' own scatter of 10 % says how little that is.

    The residuals, nearly 0, would have it believed. By Bayes' rule, with the sum of both forms as good as known, the
    difference shrinks by prior variance / (prior variance + that of the measured difference).
    """
    rows = [{"base": 1.0}] * 3
    rows += [{"base": 1.0, "a, parallel": 4.0}] * 2 + [{"base": 1.0, "a, ffn": 4.0}] * 2
    ratios = [1.0, 1.001, 0.999, 0.8, 0.8008, 0.6, 0.6006]
    asked = [{"base": 1.0, "a, ffn": 4.0}, {"base": 1.0, "a, parallel": 4.0}]
    credulous, doubtful = (fit_predictor(rows, ratios, noise=noise) for noise in (0.0, 0.1))
    gaps = [one.predict(asked[1])[0] - one.predict(asked[0])[0] for one in (credulous, doubtful)]
    assert gaps[0] == pytest.approx(0.2, abs=0.002)
    measured = 0.1**2 / 2 * (0.8**2 + 0.6**2)  # two timings of each, errors in proportion to what they measure
    assert gaps[1] == pytest.approx(0.2 * SMALL**2 / (SMALL**2 + measured), rel=0.15)
    assert doubtful.standard_error > 10 * credulous.standard_error


def test_what_all_ratios_of_a_run_share_is_not_believed() -> None:
    """A timing of the original that is off by a few per cent moves every ratio, and no residual shows it."""
    space, classes = make_space(12)
    configs, noise, rng = measured_configs(space, classes), 0.03, np.random.default_rng(0)
    nothing = configs[0]
    rows, whole = [terms_of(config, classes) for config in configs], made_up(nothing)
    asked = [space.config(range(count), dim, place) for count in (3, 6, 9) for dim in range(3) for place in range(2)]
    truth = np.array([made_up(config) / whole for config in asked])
    free, known, claimed = [], [], []
    for _ in range(100):
        times = np.array([1.0, *(made_up(config) / whole for config in configs)])
        times = times * np.exp(rng.normal(0, noise, len(times)))
        ratios = (times / np.exp(rng.normal(0, noise))).tolist()
        credulous = fit_predictor(rows, ratios[1:], noise=noise * 2**0.5)
        anchored = fit_predictor([ORIGINALS, *rows], ratios, noise=noise * 2**0.5)
        assert anchored.predict(ORIGINALS)[0] == pytest.approx(1)
        claimed.append(anchored.standard_error)
        for found, predictor in ((free, credulous), (known, anchored)):
            found.append([predictor.predict(terms_of(config, classes))[0] for config in asked] / truth - 1)
    off = [float(np.sqrt(np.mean(np.square(found)))) for found in (free, known)]
    assert off[1] < 0.6 * off[0]
    assert off[0] > 0.9 * noise  # the original's timing alone is off by as much
    assert off[1] < np.mean(claimed) < 2 * off[1]


def test_the_interval_of_an_anchored_fit_covers_a_new_ratio() -> None:
    """Of two new timings, the candidate's and the original's."""
    rows = [ORIGINALS, *({"base": 1.0, "a, ffn": float(count)} for count in (0, 2, 5, 5, 9, 12))]
    truth = np.array([1 - 0.03 * row.get("a, ffn", 0.0) for row in rows])
    rng, inside = np.random.default_rng(1), []
    for _ in range(400):
        ratios = truth * np.exp(rng.normal(0, 0.02, len(rows)) - rng.normal(0, 0.02))
        predictor = fit_predictor(rows, ratios.tolist())
        _, low, high = predictor.predict({"base": 1.0, "a, ffn": 7.0})
        inside.append(low <= 0.79 * float(np.exp(rng.normal(0, 0.02 * 2**0.5))) <= high)
    assert stats.binomtest(sum(inside), len(inside)).proportion_ci(0.999).low < 0.95
    assert stats.binomtest(sum(inside), len(inside)).proportion_ci(0.999).high > 0.95


def test_the_reported_error_is_that_of_fits_that_did_not_see_the_point() -> None:
    rows = [{"base": 1.0, "a, ffn": float(count)} for count in (0, 2, 5, 5, 9, 12)]
    ratios = [1.0, 0.93, 0.83, 0.86, 0.69, 0.61]
    counts, measured = np.array([row["a, ffn"] for row in rows]), np.array(ratios)
    expected = []
    for i in range(len(rows)):
        others = np.arange(len(rows)) != i
        line = np.polyfit(counts[others], measured[others], 1, w=1 / measured[others])
        expected.append(np.polyval(line, counts[i]) / measured[i] - 1)
    predictor = fit_predictor(rows, ratios)
    assert predictor.errors == pytest.approx(expected)
    assert predictor.leave_one_out == pytest.approx(np.mean(np.abs(expected)))
    assert predictor.freedom == 4
    line = np.polyval(np.polyfit(counts, measured, 1, w=1 / measured), counts)
    assert predictor.residual_sd == pytest.approx(np.sqrt(((line / measured - 1) ** 2).sum() / 4))
    assert predictor.standard_error == pytest.approx(predictor.residual_sd * (2 / 6) ** 0.5)


def test_a_predictor_survives_json() -> None:
    space, classes = make_space(18)
    predictor = fit(space, classes, noise=0.02)
    again = LatencyPredictor.from_dict(json.loads(json.dumps(predictor.to_dict())))
    assert again == predictor
    row = terms_of(space.config([1, 5, 14], 1, 1), classes)
    assert again.predict(row) == predictor.predict(row)


def test_what_cannot_be_predicted_is_refused_in_one_line() -> None:
    space, classes = make_space(12, placements=("ffn",))
    predictor = fit(space, classes)
    other = space.config([3]).model_copy(update={"placement": "residual"})
    with pytest.raises(EasSearchError, match=r"nothing like 'text self, residual' was measured.*--latency measured"):
        predictor.predict(terms_of(other, classes))
    steep = fit_predictor([{"base": 1.0, "a, ffn": float(k)} for k in (0, 1, 2, 3)], [1.0, 0.8, 0.6, 0.4])
    with pytest.raises(EasSearchError, match="the fit gives"):
        steep.predict({"base": 1.0, "a, ffn": 6.0})
    with pytest.raises(ValueError, match="2 measured configurations for 2 terms"):
        fit_predictor([{"base": 1.0}, {"base": 1.0, "a, ffn": 1.0}], [1.0, 0.9])


def test_what_stands_at_the_end_of_a_stack_is_counted() -> None:
    space, classes = make_space(12, pooling="none")
    found = [terms_of(space.config(skip), classes).get("text self, last", 0) for skip in ([0, 1], [11], [3, 10, 11])]
    assert found == [1, 2, 3]  # the FFN of the block in front is spared its tokens, too
    pooled = space.config([10, 11]).model_copy(update={"pooling": "prompt"})
    assert "text self, last" not in terms_of(pooled, classes)  # every token of the prompt enters the means
    assert terms_of(pooled.model_copy(update={"pia_dim": 0}), classes)["text self, last"] == 3
    assert "text self, last" not in terms_of(space.config([]), classes)  # the original model
    assert terms_of(space.config(list(TEXT)), classes)["text self, last"] == 12


def test_the_end_of_a_stack_begins_behind_what_cannot_be_skipped(build_llama: Any) -> None:
    llama = build_llama(num_hidden_layers=4)
    sites = attention_sites(llama)
    assert site_classes(llama, sites).ends == ((3, 2, 1, 0),)
    assert site_classes(llama, [sites[0], sites[2], sites[3]]).ends == ((3, 2),)
    assert site_classes(llama, sites[:3]).ends == ((),)
    assert site_classes(llama.model, attention_sites(llama.model)).ends == ()  # gives hidden states of all tokens


def test_classes_are_towers_shapes_and_windows() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = LlamaConfig(**sizes, num_hidden_layers=3, vocab_size=64)
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=8)
    llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=63))
    found = site_classes(llava, attention_sites(llava))
    assert list(found.names.values()) == ["text self"] * 3 + ["vision self"] * 2
    odd = LlamaForCausalLM(text)
    odd.model.layers[1] = type(odd.model.layers[1])(LlamaConfig(**{**sizes, "intermediate_size": 48}), 1)
    assert list(site_classes(odd, attention_sites(odd)).names.values()) == ["text self", "text self 2", "text self"]
    config = Gemma2Config(**sizes, num_hidden_layers=4, vocab_size=64, head_dim=8, num_key_value_heads=1)
    gemma = Gemma2ForCausalLM(config)  # every other layer has a sliding window
    assert list(site_classes(gemma, attention_sites(gemma)).names.values()) == ["text self", "text self 2"] * 2


@pytest.mark.parametrize(("noise", "passes"), [(0.001, 1), (0.3, 3)])
def test_a_noisy_machine_is_measured_again(
    noise: float, passes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    space, classes = make_space(12)
    settings = SearchSettings(fit_passes=3)
    bench: Any = SimpleNamespace(site_classes=classes, space=space, settings=settings, predictor=None)
    rng, calls = np.random.default_rng(0), list[int]()

    def passes_of(_: Any, configs: list[SkipConfig]) -> Iterator[list[Any]]:
        while True:
            calls.append(len(configs))
            times = [1.0, *(made_up(config) for config in configs)]
            ratios = [time * float(np.exp(rng.normal(0, noise))) for time in times]
            yield [SimpleNamespace(ratio=SimpleNamespace(estimate=ratio), error=noise) for ratio in ratios]

    monkeypatch.setattr(prediction, "_passes", passes_of)
    fitted = prediction.predictor_stage(bench, StageFolder(tmp_path))
    assert calls == [9] * passes
    assert len(fitted.errors) == (1 + 9) * passes  # each pass has timed the original as a candidate
    assert fitted.predict(ORIGINALS)[0] == pytest.approx(1)
    assert prediction.predictor_stage(bench, StageFolder(tmp_path)) == bench.predictor == fitted  # kept, not measured
    assert calls == [9] * passes


def test_a_pass_whose_original_was_disturbed_does_no_harm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The original model was timed a third too slow in one pass of three: by itself that says nothing of the others."""
    space, classes = make_space(12, pooling="none")
    settings, rng = SearchSettings(fit_passes=3), np.random.default_rng(0)
    bench: Any = SimpleNamespace(site_classes=classes, space=space, settings=settings, predictor=None)
    whole = made_up(space.config([]))

    def passes_of(_: Any, configs: list[SkipConfig]) -> Iterator[list[Any]]:
        for disturbed in (0.75, 1.0, 1.01):
            times = [1.0, *(made_up(c) / whole for c in configs)]
            ratios = [time * disturbed * float(np.exp(rng.normal(0, 0.01))) for time in times]
            yield [SimpleNamespace(ratio=SimpleNamespace(estimate=ratio), error=0.01) for ratio in ratios]

    monkeypatch.setattr(prediction, "_passes", passes_of)
    monkeypatch.setattr(prediction, "PRECISE", 0.0)  # or one pass would do
    fitted = prediction.predictor_stage(bench, StageFolder(tmp_path))
    asked = [space.config(range(first, 12), 1) for first in range(12)]
    errors = [fitted.predict(terms_of(config, classes))[0] / made_up(config) * whole - 1 for config in asked]
    assert np.abs(errors).mean() < 0.015
    assert fitted.leave_one_out < 0.05  # 15 % if the passes were not brought together


def test_passes_are_alike_in_what_they_share() -> None:
    assert prediction.alike([[0.5, 1.0]]) == pytest.approx([0.5, 1.0])
    found = prediction.alike([[0.45, 0.9], [0.5, 1.0]])
    assert found == pytest.approx([0.5 * 0.9**0.5, 0.9**0.5] * 2)
