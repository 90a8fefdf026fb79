"""Latency: statistics against independent computations, interleaving on a fake clock, the lock with real
processes.
"""

import copy
import gc
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from scipy import stats
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from eas_search.exceptions import ConfigError
from eas_search.latency import LatencyConfig, QuietLock, Timing, measure_latency, quiet
from eas_search.latency.forward import TimedModel
from eas_search.latency.statistics import log_estimate, paired_log_ratios, repeat_interval, run_interval
from eas_search.latency.values import Ratio
from eas_search.models.calling import step_positions, without_cache

# ---------------------------------------------------------------- statistics


def test_paired_log_ratios_are_per_block() -> None:
    logs = paired_log_ratios([[2.0, 1.0], [4.0, 3.0]], [[1.0, 1.0], [2.0, 12.0]])
    np.testing.assert_allclose(logs, np.log([[2.0, 1.0], [2.0, 0.25]]))


@pytest.mark.parametrize(
    ("candidate", "baseline"),
    [([[1.0]], [[1.0, 2.0]]), ([1.0], [1.0]), ([[0.0]], [[1.0]]), ([[1.0]], [[float("nan")]])],
)
def test_paired_log_ratios_refuse_what_cannot_be_paired(candidate: list, baseline: list) -> None:
    with pytest.raises(ValueError, match=r"shape|positive"):
        paired_log_ratios(candidate, baseline)


@pytest.mark.parametrize("rounds", [3, 4, 5, 6, 8, 12, 13])
def test_estimate_is_the_quarter_trimmed_mean_of_round_medians(rounds: int) -> None:
    logs = np.random.default_rng(rounds).normal(size=(rounds, 5))
    share = 0.25 if rounds >= 5 else 0
    assert log_estimate(logs) == pytest.approx(stats.trim_mean(np.median(logs, axis=1), share), abs=1e-12)


@pytest.mark.parametrize("rounds", [5, 8, 12, 13])
def test_repeat_interval_has_yuens_variance_of_a_difference(rounds: int) -> None:
    logs = np.random.default_rng(rounds).standard_t(2, size=(rounds, 4))
    low, high = repeat_interval(logs, 0.95, process_sd=0)
    centres = np.median(logs, axis=1)
    shifted = stats.ttest_ind(centres + 1, centres, equal_var=False, trim=0.25)  # its statistic is 1 / (sqrt(2) SE)
    left = rounds - 2 * (rounds // 4)
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, left - 1) / shifted.statistic)
    assert (low + high) / 2 == pytest.approx(stats.trim_mean(centres, 0.25))


def test_repeat_interval_of_few_rounds_is_students() -> None:
    logs = np.log([[0.8], [0.9], [0.85]])
    low, high = repeat_interval(logs, 0.9, process_sd=0)
    expected = stats.t.interval(0.9, 2, loc=logs.mean(), scale=stats.sem(logs[:, 0]) * 2**0.5)
    np.testing.assert_allclose((low, high), expected)


def test_process_sd_adds_in_quadrature() -> None:
    logs = np.zeros((6, 3))
    assert repeat_interval(logs, 0.95, 0.01)[1] == pytest.approx(1.959964 * 0.01 * 2**0.5)
    with pytest.raises(ValueError, match="at least 2"):
        repeat_interval(np.zeros((1, 3)), 0.95, 0.01)


def test_the_deviation_between_processes_is_judged_from_the_rounds() -> None:
    same = np.zeros((6, 3))
    assert repeat_interval(same, 0.95)[1] == pytest.approx(1.959964 * 0.006 * 2**0.5)
    logs = np.random.default_rng(3).normal(size=(8, 3))
    expected = (0.006**2 + 0.3**2 * np.median(logs, axis=1).var(ddof=1)) ** 0.5
    assert repeat_interval(logs, 0.9) == repeat_interval(logs, 0.9, process_sd=expected)


@pytest.mark.parametrize("rounds", [4, 6, 12])
def test_run_interval_is_yuens_for_one_sample(rounds: int) -> None:
    logs = np.random.default_rng(rounds).standard_t(2, size=(rounds, 3))
    centres = np.median(logs, axis=1)
    trim = 0.25 if rounds > 4 else 0.0  # too few to trim
    # A second sample shifted by 1 gives the statistic 1 / (sqrt(2) SE) of Yuen's test.
    error = 1 / stats.ttest_ind(centres + 1, centres, equal_var=False, trim=trim).statistic / 2**0.5
    left = rounds - 2 * int(trim * rounds)
    expected = stats.t.interval(0.9, left - 1, loc=stats.trim_mean(centres, trim), scale=error)
    np.testing.assert_allclose(run_interval(logs, 0.9), expected)
    with pytest.raises(ValueError, match="at least 2"):
        run_interval(logs[:1], 0.9)


def _simulated(rng: np.random.Generator, rounds: int, blocks: int, process_sd: float) -> np.ndarray:
    """Log ratios of one process: its own shift, rounds with a shift each, blocks with noise and rare spikes."""
    shape = (rounds, blocks)
    spikes = np.where(rng.random(shape) < 0.1, rng.normal(0, 0.3, shape), 0)
    shifts = rng.normal(0, process_sd) + rng.normal(0, 0.01, (rounds, 1))
    return -0.17 + shifts + rng.normal(0, 0.03, shape) + spikes


@pytest.mark.parametrize(("rounds", "blocks"), [(12, 4), (6, 3)])
def test_interval_covers_a_repeated_measurement(rounds: int, blocks: int) -> None:
    rng = np.random.default_rng(7)
    inside = inside_run = 0
    for _ in range(400):
        first, again = (_simulated(rng, rounds, blocks, process_sd=0.005) for _ in range(2))
        low, high = repeat_interval(first, 0.95, process_sd=0.0075)
        inside += low <= log_estimate(again) <= high
        low, high = run_interval(first, 0.95)
        inside_run += low <= log_estimate(again) <= high
    assert inside >= 0.95 * 400
    assert inside_run < 0.9 * 400  # why it is not what a measurement promises


@pytest.mark.parametrize(("rounds", "blocks"), [(12, 3), (6, 3)])
def test_run_interval_covers_the_ratio_of_its_own_process(rounds: int, blocks: int) -> None:
    """As the A/A run of `studies/bench_latency_aa` counts it; with such spikes Yuen's approximation is 1 % short."""
    rng = np.random.default_rng(3)
    intervals = [run_interval(_simulated(rng, rounds, blocks, process_sd=0.0), 0.95) for _ in range(2000)]
    assert np.mean([low <= -0.17 <= high for low, high in intervals]) >= 0.93


@pytest.mark.parametrize("busy", [1.0, 3.0, 10.0])
def test_interval_widens_with_the_load(busy: float) -> None:
    """Processes differ by a quarter of what rounds differ by, from a quiet machine to a very busy one."""
    rng, inside, runs = np.random.default_rng(11), 0, 400

    def measured() -> np.ndarray:
        rounds = rng.normal(scale=0.02 * busy, size=(12, 1))
        return rng.normal(scale=0.005 * busy) + rounds + rng.normal(scale=0.01 * busy, size=(12, 3))

    for _ in range(runs):
        low, high = repeat_interval(measured(), 0.95)
        inside += low <= log_estimate(measured()) <= high
    assert inside >= 0.95 * runs


# ---------------------------------------------------------------- values


def test_timing_percentiles_and_ratio() -> None:
    rows = tuple(tuple(float(10 * r + b + 1) for b in range(4)) for r in range(3))
    timing = Timing(rows)
    assert timing.unit == "s"
    assert (timing.p10, timing.median, timing.p90) == tuple(np.percentile(np.array(rows), [10, 50, 90]))
    half = Timing(tuple(tuple(s / 2 for s in row) for row in rows))
    ratio = Ratio.of(half, timing, confidence=0.95, process_sd=0.0)
    assert (ratio.estimate, ratio.speedup) == (pytest.approx(0.5), pytest.approx(2.0))
    assert ratio.contains(ratio.estimate)
    assert not ratio.contains(0.51)


def test_agreement_counts_both_intervals() -> None:
    def ratio(estimate: float, width: float) -> Ratio:
        return Ratio(estimate, estimate / width, estimate * width, (estimate, estimate), 0.95)

    assert ratio(0.8, 1.05).agrees_with(ratio(0.83, 1.05))
    assert not ratio(0.8, 1.05).agrees_with(ratio(0.85, 1.05))
    precise, vague = ratio(0.8, 1.01), ratio(0.9, 1.3)
    assert not precise.contains(vague.estimate)
    assert precise.agrees_with(vague)
    assert vague.agrees_with(precise)


@pytest.mark.parametrize(
    ("values", "named"),
    [({"rounds": 2}, "rounds = 2"), ({"confidence": 1.0}, "confidence = 1.0"), ({"loops": 3}, "loops = 3")],
)
def test_config_names_what_it_refuses(values: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        LatencyConfig(**values)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- interleaving, on a fake clock


class Clock:
    """Seconds that pass only inside fake models; `drift` makes everything slower as time goes by."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now, self.drift, self.log = 0.0, drift, []

    def __call__(self) -> float:
        return self.now

    def __deepcopy__(self, memo: dict) -> "Clock":
        return self  # copies of a model live in the same time

    def spend(self, seconds: float) -> None:
        self.now += seconds * (1 + self.drift * self.now)


class Fake(nn.Module):
    """Takes `prefill_s` for several tokens and `step_s` for one; logits (B, n, 5) and the number of cached
    tokens.
    """

    def __init__(self, name: str, clock: Clock, prefill_s: float = 1.0, step_s: float | None = None) -> None:
        super().__init__()
        self.name, self.clock, self.prefill_s, self.step_s = name, clock, prefill_s, step_s
        self.weight = nn.Parameter(torch.ones(3))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: int | None = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        assert use_cache
        assert not self.training
        assert torch.is_inference_mode_enabled()
        assert not gc.isenabled()
        step = past_key_values is not None
        width = None if attention_mask is None else attention_mask.shape[1]
        self.clock.log.append((self.name, step, tuple(input_ids.shape), width, self.weight.data_ptr()))
        self.clock.spend(self.step_s if step else self.prefill_s)
        cached = (past_key_values or 0) + input_ids.shape[1]
        logits = torch.zeros(*input_ids.shape, 5)
        return SimpleNamespace(logits=logits, past_key_values=None if self.step_s is None else cached)


TOKENS = {"input_ids": torch.zeros(2, 6, dtype=torch.long), "attention_mask": torch.ones(2, 6)}
PLAIN = {"process_sd": 0.0, "time_limit_s": None}


def test_blocks_hold_every_model_once_in_changing_order() -> None:
    def order(seed: int) -> list[tuple[str, ...]]:
        clock = Clock()
        models = {name: Fake(name, clock) for name in "abc"}
        config = LatencyConfig(rounds=3, blocks=5, warmup=1, seed=seed, **PLAIN)
        measure_latency({"b": models["b"], "c": models["c"]}, TOKENS, models["a"], config, clock)
        names = [entry[0] for entry in clock.log[6:]]  # the first two calls of each are the trial for the repeats
        return [tuple(names[i : i + 3]) for i in range(0, len(names), 3)]

    blocks = order(0)
    assert len(blocks) == 3 * (5 + 1)
    assert all(sorted(block) == ["a", "b", "c"] for block in blocks)
    assert len(set(blocks)) > 3
    assert blocks == order(0) != order(1)


def test_drift_biases_sequential_timing_but_not_ours() -> None:
    clock = Clock(drift=0.01)
    report = measure_latency(Fake("b", clock, 0.8), TOKENS, Fake("a", clock, 1.0), LatencyConfig(**PLAIN), clock)
    assert report.prefill.ratio.estimate == pytest.approx(0.8, rel=0.02)
    assert report.prefill.ratio.contains(0.8)

    clock = Clock(drift=0.01)
    medians = []
    with torch.inference_mode():
        for seconds in (1.0, 0.8):
            samples = []
            for _ in range(48):
                start = clock()
                clock.spend(seconds)
                samples.append(clock() - start)
            medians.append(np.median(samples))
    assert medians[1] / medians[0] > 0.95  # a fifth faster, and it would not show


def test_phases_are_separate_and_every_decode_sample_starts_from_a_prefill() -> None:
    clock = Clock()
    models = [Fake("b", clock, 1.0, step_s=0.25), Fake("a", clock, 2.0, step_s=1.0)]
    config = LatencyConfig(rounds=3, blocks=2, warmup=1, decode_tokens=3, **PLAIN)
    report = measure_latency(models[0], TOKENS, models[1], config, clock)
    assert report.prefill.ratio.estimate == pytest.approx(0.5)
    assert report.decode is not None
    assert report.decode.ratio.estimate == pytest.approx(0.25)
    assert report.decode.timing.median == pytest.approx(0.25)  # seconds per step
    assert np.shape(report.decode.timing.samples) == (3, 2)
    sample = [entry[1:4] for entry in clock.log[-4:]]
    assert sample == [(False, (2, 6), 6), *((True, (2, 1), width) for width in (7, 8, 9))]


def test_short_phases_are_repeated_and_decode_repeats_use_new_caches() -> None:
    clock = Clock()
    slow, quick = Fake("a", clock, 2**-7, step_s=2**-12), Fake("b", clock, 2**-11, step_s=2**-13)
    config = LatencyConfig(rounds=3, blocks=1, warmup=0, decode_tokens=4, min_sample_s=2**-9, **PLAIN)
    report = measure_latency(quick, TOKENS, slow, config, clock)
    assert report.conditions["prefill_repeats"] == 4
    assert report.conditions["decode_repeats"] == 4  # of 4 steps
    assert report.prefill.timing.median == pytest.approx(2**-11)
    assert report.decode is not None
    assert report.decode.timing.median == pytest.approx(2**-13)
    widths = [entry[3] for entry in clock.log[-(4 + 4 + 3 * 5) :]]
    assert widths == [6] * 4 + [7, 8, 9, 10] + [6, 7, 8, 9, 10] * 3


def test_no_decode_when_one_model_has_none_or_it_is_not_wanted() -> None:
    clock = Clock()
    config = LatencyConfig(rounds=3, blocks=1, **PLAIN)
    assert measure_latency(Fake("b", clock), TOKENS, Fake("a", clock, 1, 0.1), config, clock).decode is None
    fast = LatencyConfig.fast(rounds=3)
    assert measure_latency(Fake("b", clock, 1, 0.1), TOKENS, Fake("a", clock, 1, 0.1), fast, clock).decode is None


def test_time_limit_gives_up_blocks_then_rounds_but_keeps_three() -> None:
    def shape(limit: float) -> tuple[int, ...]:
        clock = Clock()
        config = LatencyConfig(rounds=6, blocks=4, warmup=1, time_limit_s=limit)
        report = measure_latency(Fake("b", clock), TOKENS, Fake("a", clock), config, clock)
        assert report.conditions["cut_by_time_limit"] == (limit < 60)
        assert report.conditions["seconds"] <= max(limit, 10)
        return np.shape(report.prefill.timing.samples)

    assert shape(100) == (6, 4)
    assert shape(40) == (6, 2)
    assert shape(15) == (5, 1)
    assert shape(1) == (3, 1)


def test_models_and_global_state_come_back_as_they_were() -> None:
    for fresh in (True, False):
        clock = Clock()
        a, b = Fake("a", clock).train(), Fake("b", clock).eval()
        pointer, state, threads = a.weight.data_ptr(), random.getstate(), torch.get_num_threads()
        torch_state = torch.get_rng_state()
        config = LatencyConfig(rounds=4, blocks=1, threads=1, fresh_copies=fresh, **PLAIN)
        measure_latency(b, TOKENS, a, config, clock)
        assert (a.training, b.training, a.weight.data_ptr()) == (True, False, pointer)
        assert (random.getstate(), torch.get_num_threads(), gc.isenabled()) == (state, threads, True)
        assert torch.equal(torch.get_rng_state(), torch_state)
        places = {entry[4] for entry in clock.log}
        assert (pointer in places) is not fresh
        assert (len(places) > 2) is fresh  # the weights of two models were in more than two places


def test_models_come_back_after_an_error() -> None:
    class Broken(Fake):
        def forward(self, *args: object, **kwargs: object) -> SimpleNamespace:
            raise ZeroDivisionError

    clock = Clock()
    a, b = Fake("a", clock).train(), Broken("b", clock).train()
    with pytest.raises(ZeroDivisionError):
        measure_latency(b, TOKENS, a, LatencyConfig(fresh_copies=False, threads=1), clock)
    assert a.training
    assert b.training
    assert gc.isenabled()


def test_report_is_a_mapping_and_becomes_json() -> None:
    clock = Clock()
    candidates = {"x": Fake("x", clock, 0.5), "y": Fake("y", clock, 2.0)}
    report = measure_latency(candidates, TOKENS, Fake("a", clock), LatencyConfig(rounds=3, **PLAIN), clock)
    assert list(report) == ["x", "y"]
    assert {name: round(latency.prefill.ratio.speedup, 6) for name, latency in report.items()} == {"x": 2, "y": 0.5}
    again = json.loads(report.to_json())
    assert again["candidates"]["x"]["prefill"]["timing"]["unit"] == "s"
    assert again["candidates"]["y"]["decode"] is None
    assert again["conditions"]["inputs"]["input_ids"] == [2, 6]
    with pytest.raises(ConfigError, match="2 candidates"):
        _ = report.prefill


def test_user_errors_are_one_line() -> None:
    clock = Clock()
    a, b = Fake("a", clock, 1, 0.1), Fake("b", clock, 1, 0.1)
    with pytest.raises(ConfigError, match="at least one name"):
        measure_latency({}, TOKENS, a, timer=clock)
    with pytest.raises(ConfigError, match="'baseline'"):
        measure_latency({"baseline": b}, TOKENS, a, timer=clock)
    with pytest.raises(ConfigError, match="attention_mask has 4 dimensions"):
        measure_latency(b, {**TOKENS, "attention_mask": torch.ones(2, 1, 6, 6)}, a, timer=clock)
    b.state = b.weight * 2  # not a leaf: torch refuses to copy it
    with pytest.raises(ConfigError, match=r"'candidate' cannot be copied .* set fresh_copies=False"):
        measure_latency(b, TOKENS, a, timer=clock)


# ---------------------------------------------------------------- real models


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, bos_token_id=None, eos_token_id=None)).eval()


def _llava(**text_changes: object) -> LlavaForConditionalGeneration:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    text = LlamaConfig(**sizes, vocab_size=64, **text_changes)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
    ).eval()


def test_decode_steps_are_greedy_generation() -> None:
    model = _llama()
    tokens = torch.randint(0, 64, (3, 7))
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0  # left padding
    timed = TimedModel(model, {"input_ids": tokens, "attention_mask": mask, "labels": tokens}, 4, time.perf_counter)
    fed = []
    model.register_forward_pre_hook(lambda _, __, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True)
    with torch.inference_mode():
        output = timed.prefill()
        assert output.logits.shape == (3, 1, 64)
        assert timed.time_decode(output, 1) > 0
        expected = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=4, do_sample=False)
    torch.testing.assert_close(torch.cat(fed[1:5], dim=1), expected[:, 7:])


def test_multimodal_and_encoder_models() -> None:
    config = LatencyConfig(rounds=3, blocks=1, warmup=0, decode_tokens=2)
    llava = _llava()
    tokens = torch.cat([torch.full((2, 4), 60), torch.randint(0, 60, (2, 3))], dim=1)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": torch.randn(2, 3, 16, 16)}
    report = measure_latency(copy.deepcopy(llava), inputs, llava, config)
    assert report.decode is not None
    assert report.conditions["device"] == "cpu"

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertForSequenceClassification(BertConfig(**sizes, vocab_size=64))
    report = measure_latency(bert, {"input_ids": tokens % 60}, bert, config)
    assert report.decode is None
    assert bert.training


class Opaque(nn.Module):
    """A wrapper whose forward names nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.wrapped = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(*args, **kwargs)


def _lora(model: nn.Module, task: str | None) -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type=task)
    return peft.get_peft_model(copy.deepcopy(model), config).eval()  # its product is zero before any training


def _prompts(model: nn.Module) -> nn.Module:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # between peft and transformers
@pytest.mark.parametrize(
    ("wrap", "adds"),
    [
        (Opaque, 0),
        (lambda model: Opaque(Opaque(model)), 0),
        (lambda model: torch.compile(model, backend="eager"), 0),
        (lambda model: _lora(model, None), 0),
        (lambda model: _lora(model, "CAUSAL_LM"), 0),
        (_prompts, 3),  # tokens
    ],
    ids=["opaque", "twice", "compiled", "LoRA", "named LoRA", "prompts"],
)
def test_a_wrapped_model_is_timed_as_the_model_itself(wrap: Callable[[nn.Module], Any], adds: int) -> None:
    model = _llama()
    model.config.use_cache = False
    tokens = torch.randint(0, 64, (2, 7))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    timed = TimedModel(wrap(model), inputs, 2, time.perf_counter)
    with torch.inference_mode():
        output = timed.prefill()
        expected = model(**inputs).logits[:, -1:]
        assert output.past_key_values.get_seq_length() == 7 + adds
        assert timed.can_decode(output)
    assert output.logits.shape == (2, 1, 64)
    if not adds:
        torch.testing.assert_close(output.logits, expected)


class AllLogits(nn.Module):
    """A causal model that computes every position's logits, whatever is wanted."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> SimpleNamespace:
        kwargs.pop("logits_to_keep", None)
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **kwargs)
        return SimpleNamespace(logits=self.lm_head(output.last_hidden_state), past_key_values=output.past_key_values)


@pytest.mark.parametrize("candidate", [Opaque, AllLogits])
def test_all_models_of_a_run_compute_the_logits_of_as_many_positions(candidate: Callable[[Any], nn.Module]) -> None:
    """Counted where they are computed: in the heads, through all rounds."""
    computed: dict[str, set[int]] = {"original": set(), "candidate": set()}
    models = {name: _llama() for name in computed}
    for name, model in models.items():
        model.lm_head.register_forward_pre_hook(lambda _, args, name=name: computed[name].add(args[0].shape[1]))
    tokens = torch.randint(0, 64, (2, 7))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    config = LatencyConfig(rounds=3, blocks=1, warmup=0, decode_tokens=2, fresh_copies=False)
    report = measure_latency(candidate(models["candidate"]), inputs, models["original"], config)
    assert report.decode is not None
    positions = {1} if candidate is Opaque else {7, 1}  # a step has one anyway
    assert computed == {"original": positions, "candidate": positions}
    assert report.conditions["logits_to_keep"] == (1 if candidate is Opaque else 0)


def test_a_cache_is_asked_for_whatever_the_configuration_says() -> None:
    llava = _llava(use_cache=False)
    tokens = torch.cat([torch.full((2, 4), 60), torch.randint(0, 60, (2, 3))], dim=1)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.inference_mode():
        assert llava(**inputs).past_key_values is None
        assert TimedModel(llava, inputs, 2, time.perf_counter).prefill().past_key_values.get_seq_length() == 7
    config = LatencyConfig(rounds=3, blocks=1, warmup=0, decode_tokens=2)
    assert measure_latency(Opaque(copy.deepcopy(llava)), inputs, llava, config).decode is not None


def test_what_cannot_decode_has_no_decode_in_a_wrapper_either(vit: Any) -> None:
    config = LatencyConfig(rounds=3, blocks=1, warmup=0, decode_tokens=2)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
    torch.manual_seed(0)
    t5, tokens = T5ForConditionalGeneration(T5Config(**sizes)).eval(), torch.randint(3, 32, (2, 5))
    inputs = {"input_ids": tokens, "decoder_input_ids": tokens}
    assert measure_latency(Opaque(copy.deepcopy(t5)), inputs, t5, config).decode is None
    pixels = {"pixel_values": torch.randn(2, 3, vit.config.image_size, vit.config.image_size)}
    assert TimedModel(Opaque(vit), pixels, 2, time.perf_counter).options == {}
    assert measure_latency(Opaque(copy.deepcopy(vit)), pixels, vit, config).decode is None


def test_a_wrapped_models_cache_and_positions_are_those_of_the_model() -> None:
    class Inner(nn.Module):
        rope_deltas = torch.tensor([[-2], [-1]])  # of two rows with images

        def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> torch.Tensor:
            return input_ids

    assert without_cache(Opaque(Inner())) == {"use_cache": False}
    positions = step_positions(Opaque(Inner()), torch.ones(2, 5, dtype=torch.long))["position_ids"]
    assert positions.tolist() == [[[2], [3]]] * 3  # the fifth token is at 4, less what the images take


# ---------------------------------------------------------------- the lock

# The file is loaded by its path, so that a child is ready in a tenth of a second and does not import torch.
CHILD = f"""
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("quiet", {str(Path(quiet.__file__))!r})
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
path, what = sys.argv[1:3]
lock = module.QuietLock(path)
def hold(manner):
    with getattr(lock, manner)():
        print("in", flush=True)
        sys.stdin.readline()
def work(log):
    while True:
        with lock.shared(), open(log, "ab", 0) as file:
            file.write(b"<")
            time.sleep(0.005)
            file.write(b">")
work(sys.argv[3]) if what == "work" else hold(what)
"""


class Child:
    """Another process that holds the lock, or works in a loop; killed at the end if it still runs."""

    def __init__(self, path: Path, *what: str) -> None:
        root = Path(quiet.__file__).parents[2]
        command = [sys.executable, "-c", CHILD, str(path), *what]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=root)

    def wait_inside(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"in\n"

    def leave(self) -> None:
        self.process.communicate(b"\n", timeout=10)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def _exclusive_within(path: Path, seconds: float) -> bool:
    """Whether a measurement would get its turn; never hangs the test."""
    with Child(path, "exclusive") as child:
        try:
            child.process.communicate(b"\n", timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        return child.process.returncode == 0


def test_shared_holders_work_side_by_side_and_keep_a_measurement_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with QuietLock(path).shared():
        with Child(path, "shared") as child:
            child.wait_inside()
            child.leave()
        assert not _exclusive_within(path, 0.7)
    assert _exclusive_within(path, 10)


def test_a_measurement_gets_its_turn_among_busy_workers_and_is_alone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    logs = [tmp_path / f"log{i}" for i in range(3)]
    with Child(path, "work", str(logs[0])), Child(path, "work", str(logs[1])), Child(path, "work", str(logs[2])):
        deadline = time.monotonic() + 15
        while not all(log.exists() and log.stat().st_size > 4 for log in logs):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for _ in range(3):
            with QuietLock(path).exclusive():
                before = [log.read_bytes() for log in logs]
                time.sleep(0.1)
                assert [log.read_bytes() for log in logs] == before
            assert all(text.endswith(b">") for text in before)
        deadline = time.monotonic() + 15
        while [log.read_bytes() for log in logs] == before:  # and the workers go on
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("manner", ["shared", "exclusive"])
def test_a_killed_holder_releases_the_lock(tmp_path: Path, manner: str) -> None:
    path = tmp_path / "lock"
    with Child(path, manner) as child:
        child.wait_inside()
        child.process.kill()
        child.process.wait()
        assert _exclusive_within(path, 10)


def test_reentrant_use_is_an_error_and_leaves_the_lock_usable(tmp_path: Path) -> None:
    lock = QuietLock(tmp_path / "lock")
    for outer in (lock.shared, lock.exclusive):
        for inner in (QuietLock(tmp_path / "lock").shared, lock.exclusive):
            with outer(), pytest.raises(ConfigError, match="already held by this thread"), inner():
                pass
    reached = []

    def other() -> None:
        with lock.shared():
            reached.append(True)

    with lock.shared():  # another thread is another worker
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(10)
    assert reached
    with pytest.raises(ZeroDivisionError), lock.exclusive():
        raise ZeroDivisionError
    assert _exclusive_within(tmp_path / "lock", 10)


def test_lock_without_path_and_impossible_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with QuietLock(None).exclusive(), QuietLock(None).exclusive():
        pass
    with pytest.raises(ConfigError, match="cannot be opened"):
        QuietLock(tmp_path / "missing" / "lock")
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ConfigError, match="Windows"):
        QuietLock(tmp_path / "lock")
    QuietLock(None)
