"""The break-even report: shares by formula and by measurement, KV bytes against real caches, and what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from eas_search import cli, run
from eas_search.break_even import BreakEvenSettings, Gain, GridPoint, break_even, report
from eas_search.break_even.measured import _gain, build_models, model_inputs
from eas_search.break_even.stack import main_stack
from eas_search.break_even.table import integers
from eas_search.break_even.values import BreakEven
from eas_search.exceptions import ConfigError, UnsupportedModelError
from eas_search.models.shallow import period, shallow_model
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips

COUNT = BreakEvenSettings(contexts=(64, 640), batches=(1, 32), measure="never", dtype="bfloat16", device="cpu")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def build(name: str, device: str = "meta", **changes: object) -> Any:
    config = getattr(transformers, f"{name}Config")(**changes)
    kind = next(
        k
        for suffix in ("ForCausalLM", "Model")
        if (k := getattr(transformers, name.removesuffix("Text") + suffix, None))
    )
    torch.manual_seed(0)
    with torch.device(device):
        return kind._from_config(config).eval()


def test_speedup_is_amdahls() -> None:
    gain = Gain.counted(0.5)
    assert [gain.speedup(k / 4) for k in (0, 1, 2, 4)] == pytest.approx([1, 8 / 7, 4 / 3, 2])


def ratio(estimate: float, error: float = 1.0) -> Any:
    return SimpleNamespace(estimate=estimate, low=estimate / error, high=estimate * error)


def test_the_share_of_a_whole_model_follows_from_two_blocks() -> None:
    """The rest takes 1 s, a block 2 s, half of it attention: two blocks 5 and 3 s, twelve 25 and 13 s."""
    exact = {"deleted": ratio(3 / 5), "rest": ratio(1 / 5), "deleted_rest": ratio(1 / 5)}
    gain = _gain(exact, 5.0, (2, 12))
    assert gain.share == gain.low == gain.high == pytest.approx(12 / 25)
    assert (gain.measured, gain.seconds) == (True, 5.0)
    # A student that takes 0.5 s more, once, takes 13.5 s with twelve blocks: not 0.25 s more for each.
    slower = {"deleted": ratio(3.5 / 5), "rest": ratio(1 / 5), "deleted_rest": ratio(1.5 / 5)}
    assert _gain(slower, 5.0, (2, 12)).share == pytest.approx(1 - 13.5 / 25)
    # One token takes 0.25 s in both blocks' FFNs, of 2 s for the whole prompt: at the end of a stack 1.75 s are saved.
    spared = _gain(exact, 5.0, (2, 12), one_token=0.25)
    assert spared.spared == pytest.approx(6 * 1.75 / 25)
    assert spared.speedup_of_last(3, 12) == pytest.approx(25 / (25 - 3 * 1 - 4 * 0.875))
    assert spared.speedup_of_last(12, 12) == pytest.approx(25 / (25 - 12 * 1.875))
    assert gain.spared == 0.0
    # Without attention nothing is left of a block, whatever the noise says about the rest.
    empty = {"deleted": ratio(1 / 5), "rest": ratio(1 / 5), "deleted_rest": ratio(1 / 4)}
    assert _gain(empty, 5.0, (2, 12)).share == pytest.approx(24 / 25)


def test_uncertain_ratios_make_the_share_uncertain() -> None:
    """12 blocks from 2: an error of 0.01 in D moves a by 0.06 / 5, in units of the 25 s / 5 s that the model takes."""
    ratios = {"deleted": ratio(0.6), "rest": ratio(0.2), "deleted_rest": ratio(0.2)}
    ratios["deleted"] = SimpleNamespace(estimate=0.6, low=0.59, high=0.62)
    gain = _gain(ratios, 1.0, (2, 12))
    assert gain.high - gain.share == pytest.approx(0.06 / 5)
    assert gain.share - gain.low == pytest.approx(0.12 / 5)


def test_a_7b_model_by_hand() -> None:
    """d = 4096, FFN 11008, 32 blocks, 32,000 words; half of the scores are masked."""
    found = break_even(build("Llama"), COUNT)
    attention, ffn, head = 4 * 4096 * 4096, 3 * 4096 * 11008, 32000 * 4096
    for point in found.points:
        n, batch = point.context, point.batch
        scores = 4 * 4096 * n * (n + 1) / 2
        flops = 32 * (2 * (attention + ffn) * n + scores) + 2 * head
        assert point.prefill.share == pytest.approx(32 * (2 * attention * n + scores) / flops)
        assert point.prefill.spared == pytest.approx(32 * 2 * ffn * (n - 1) / flops)
        cache = 2 * 2 * 4096 * n * 32
        assert point.kv_bytes == cache
        bytes_read = 2 * (32 * (attention + ffn) + head) + batch * cache
        assert point.decode is not None
        assert point.decode.share == pytest.approx((2 * 32 * attention + batch * cache) / bytes_read)
        assert not point.prefill.measured
    assert [(point.context, point.batch) for point in found.points] == [(64, 1), (64, 32), (640, 1), (640, 32)]
    assert "--measure never" in found.method


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {}),
        ("GPT2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64}),
        ("Gemma3Text", {"head_dim": 16, "sliding_window": 4, "num_hidden_layers": 6}),
        ("Mistral", {"sliding_window": 5}),
        ("Falcon", {"multi_query": True}),
        ("Jamba", {"num_hidden_layers": 8, "use_mamba_kernels": False, "num_experts": 2}),
        (
            "DeepseekV3",
            {
                "q_lora_rank": 24,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 12,
                "num_key_value_heads": 4,
                "first_k_dense_replace": 4,
            },
        ),
    ],
)
@pytest.mark.parametrize("tokens", [3, 11])
def test_kv_bytes_are_those_of_a_real_cache(name: str, changes: dict[str, Any], tokens: int) -> None:
    sizes = changes if name == "GPT2" else {**SMALL, **changes}
    model = build(name, "cpu", **sizes)
    with torch.no_grad():
        cache = model(torch.arange(3, 3 + tokens).view(1, -1), use_cache=True).past_key_values
    kept = [getattr(layer, part, None) for layer in cache.layers for part in ("keys", "values")]
    held = sum(tensor.nbytes for tensor in kept if isinstance(tensor, torch.Tensor))
    assert held > 0
    assert main_stack(model).kv_bytes(tokens, 4) == held


def flops(model: Any, inputs: dict[str, Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, logits_to_keep=1)
    return int(counter.get_total_flops())


def test_what_is_measured_are_blocks_without_attention_and_no_blocks(build_llama: Any) -> None:
    """With attention computed by plain products, torch counts it."""
    full = build_llama(num_hidden_layers=6)
    full.config._attn_implementation = "eager"
    shallow = shallow_model(full, 2, 6, torch.device("cpu"), torch.float32)
    assert len(shallow.model.layers) == 2  # type: ignore[union-attr, arg-type]
    models = build_models(shallow)
    inputs = model_inputs(shallow, "text", 2, 10)
    assert inputs["input_ids"].shape == (2, 10)
    attention = 2 * 10 * 3072 + 4 * 10 * 10 * 32
    ffn, head = 2 * 10 * 3 * 32 * 48, 2 * 32 * 64
    assert flops(models["intact"], inputs) == 2 * (2 * (attention + ffn) + head)
    assert flops(models["deleted"], inputs) == 2 * (2 * ffn + head)
    assert flops(models["rest"], inputs) == flops(models["deleted_rest"], inputs) == 2 * head


@pytest.mark.parametrize("last", [1, 3])
def test_the_last_attentions_save_what_is_counted(build_llama: Any, last: int) -> None:
    """Against what torch counts in a student; its fused attention is counted as nothing on both sides."""
    model = build_llama(num_hidden_layers=6)
    skip = tuple(range(6 - last, 6))
    student = apply_skips(model, SkipConfig(skip=skip, pia_dim=0, pooling="none"))
    inputs = model_inputs(model, "text", 1, 10)
    stack = main_stack(model)
    whole = sum(cost.flops(10) for cost in stack.costs) / stack.prefill_share(10)
    scores = sum(cost.heads.score_flops(cost.pairs(10)) for cost in stack.costs)
    assert flops(model, inputs) == pytest.approx(whole - scores)
    gone = sum(cost.flops_per_token * 10 for cost in stack.costs[:last])
    spared = stack.spared_share(10) * whole * (last + 1) / 6
    assert flops(model, inputs) - flops(student, inputs) == pytest.approx(gone + spared)


def test_only_decoders_asked_for_their_last_token_spare_the_rest(build_llama: Any, vit: nn.Module) -> None:
    assert main_stack(build_llama()).spares
    assert not main_stack(vit).spares
    assert not main_stack(build_llama().model).spares  # without its head nobody asks for a token's logits
    assert not main_stack(build("Jamba", num_hidden_layers=8, use_mamba_kernels=False)).spares


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["llama", "llava", "Bert", "vit"])
def test_small_models_are_measured(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str, whole: bool
) -> None:
    if not whole:
        monkeypatch.setattr(report, "WHOLE_BYTES", 0)
    model = build(name, "cpu", **SMALL) if name == "Bert" else request.getfixturevalue(name)
    told: list[str] = []
    settings = BreakEvenSettings(contexts=(8,), batches=(1, 2), device="cpu", time_limit_s=2, measure="always")
    found = break_even(model, settings, told.append)
    assert len(found.points) == 2
    for point in found.points:
        assert point.context == (17 if name == "vit" else 8)
        assert all(gain.measured and gain.low <= gain.share <= gain.high < 1 for gain in point.gains.values())
        assert 0 <= point.prefill.spared < 1  # so few tokens may take no longer than one
        assert point.prefill.spared == 0 or name in ("llama", "llava")
        assert set(point.gains) == ({"prefill", "decode"} if name in ("llama", "llava") else {"prefill"})
    built = found.layers if whole else 2
    assert f"measured on cpu in float32: {built} of {found.layers} blocks" in found.method
    assert told[0] == f"building {built} of {found.layers} blocks"
    assert [text[:9] for text in told[1:]] == ["measuring"] * 2
    assert any("text tower only" in note for note in found.notes) == (name == "llava")
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["layers"] == found.layers


def test_large_models_are_not_timed_on_a_cpu_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "free_bytes", lambda device: 64 * 2**30)
    found = break_even(build("Llama"), BreakEvenSettings(device="cpu", contexts=(64,)))
    assert not any(point.prefill.measured for point in found.points)
    assert "hold 2.5 GiB, more than is timed on a CPU unasked" in found.method  # 2 blocks, embeddings and head


def test_what_does_not_fit_is_not_built_even_when_asked_for(monkeypatch: pytest.MonkeyPatch, llama: nn.Module) -> None:
    monkeypatch.setattr(report, "free_bytes", lambda device: 20_000)
    found = break_even(llama, BreakEvenSettings(contexts=(8,), batches=(1,), measure="always", device="cpu"))
    assert not found.points[0].prefill.measured
    assert "are free" in found.method


def test_points_beyond_the_time_limit_are_counted(llama: nn.Module) -> None:
    settings = BreakEvenSettings(contexts=(8, 100), batches=(1, 64), device="cpu", time_limit_s=0.01)
    found = break_even(llama, settings)
    assert [point.prefill.measured for point in found.points] == [True, False, False, False]
    assert "not measured within 0.01 s: 3 of 4 points" in found.notes
    assert "the rest counted" in found.method


def test_a_point_that_is_asked_for_twice_is_one_point(build_llama: Any) -> None:
    told: list[str] = []
    settings = BreakEvenSettings(contexts=(8, 4, 8), batches=(2, 1, 2), device="cpu", measure="always", time_limit_s=2)
    found = break_even(build_llama(), settings, told.append)
    assert [(point.context, point.batch) for point in found.points] == [(8, 2), (8, 1), (4, 2), (4, 1)]
    assert all(point.prefill.measured for point in found.points)
    assert sum(text.startswith("measuring") for text in told) == 4
    assert "counted" not in found.method
    # The positions end right where the shortest default context does, with 4 more to decode.
    brief = break_even(build_llama(max_position_embeddings=68), BreakEvenSettings(measure="never", batches=(1,)))
    assert [point.context for point in brief.points] == [64]


def test_blocks_repeat_after_their_period() -> None:
    gemma, deepseek = build("Gemma3Text"), build("DeepseekV3")
    assert period(gemma, main_stack(gemma).blocks) == 6  # five with a sliding window, then one without
    llama = build("Llama")
    assert period(llama, main_stack(llama).blocks) == 2
    with pytest.raises(UnsupportedModelError, match="do not repeat"):
        period(deepseek, main_stack(deepseek).blocks)  # its first three have no experts
    assert "do not repeat within 8" in break_even(deepseek, BreakEvenSettings(device="cpu")).method


def test_a_shallow_model_has_blocks_of_the_real_size() -> None:
    full = build("Gemma3Text")
    made = shallow_model(full, 6, 26, torch.device("meta"), torch.bfloat16)
    for i in range(6):
        first, second = (model.model.layers[i] for model in (made, full))  # type: ignore[union-attr, index]
        assert [p.shape for p in first.parameters()] == [p.shape for p in second.parameters()]
        assert first.self_attn.sliding_window == second.self_attn.sliding_window
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    with pytest.raises(UnsupportedModelError, match="number of layers, 25"):
        shallow_model(full, 6, 25, torch.device("meta"), torch.bfloat16)


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=32)
    with pytest.raises(UnsupportedModelError, match="several stacks"):
        break_even(transformers.T5ForConditionalGeneration(config))


def test_wrong_settings_are_one_line(llama: nn.Module) -> None:
    with pytest.raises(ConfigError, match="context 125 is beyond the model's positions; expected at most 124"):
        break_even(llama, BreakEvenSettings(contexts=(125,), measure="never"))
    with pytest.raises(ConfigError, match="measure = 'maybe'"):
        BreakEvenSettings(measure="maybe")
    with pytest.raises(ConfigError, match="batches are \\[0\\]"):
        BreakEvenSettings(batches=(0,))
    with pytest.raises(ConfigError, match="--contexts is '64;128'"):
        integers("--contexts", "64;128")
    assert [point.context for point in break_even(llama, BreakEvenSettings(measure="never")).points] == [
        64,
        64,
        124,
        124,
    ]


def test_it_says_where_skipping_pays_and_where_not() -> None:
    points = (
        GridPoint(64, 1, Gain.counted(0.05), Gain(0.2, -0.1, 0.5, 0.01), 100),
        GridPoint(64, 8, Gain.counted(0.5), Gain(0.02, 0.01, 0.03, 0.01), 100),
    )
    spared = (
        GridPoint(64, 1, Gain.counted(0.05, 0.8), None, 0),
        GridPoint(64, 8, Gain.counted(0.5, 0.4), None, 0),
        GridPoint(9, 1, Gain.counted(0.02, 0.04), None, 0),
    )
    assert BreakEven("Llama", "text", 4, spared, "", (), {}).verdicts == (
        "Skipping pays in prefill at context×batch 64×1 only at the end of the stack: elsewhere at most 1.05x, with "
        "every attention skipped.",
        "Skipping cannot pay in prefill at context×batch 9×1: at most 1.02x, with every attention skipped.",
        "Most in prefill: at context 64, batch 8, 1.33x with half of the attentions skipped (2.22x if it is the last "
        "half), 2.00x with all.",
    )
    found = BreakEven("Llama", "text", 4, points, "", (), {}).verdicts
    assert found == (
        "Skipping cannot pay in prefill at context×batch 64×1: at most 1.05x, with every attention skipped.",
        "Most in prefill: at context 64, batch 8, 1.33x with half of the attentions skipped, 2.00x with all.",
        "Skipping cannot pay in decode at context×batch 64×8: at most 1.02x, with every attention skipped.",
        "Too noisy to say whether skipping pays in decode at context×batch 64×1: raise --time-limit or measure on a "
        "quieter machine.",
    )


def test_the_command_prints_the_grid_and_writes_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["sites", "--break-even", "--measure", "never", "--contexts", "64", "--json", str(tmp_path / "b.json")]
    monkeypatch.setattr(sys, "argv", ["eas-search", *words])
    monkeypatch.setattr(run.console, "width", 80)
    with pytest.raises(SystemExit) as end:
        cli.main()
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert "The most that skipping k of 12 text attentions can gain" in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("Wrote")) <= 80
    grid = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["break_even"]["grid"]
    assert [(point["context"], point["batch"]) for point in grid] == [(64, 1), (64, 8)]
    # 12 layers, keys and values, width 128, float32; a quarter, half and all of them
    assert grid[0]["kv_bytes_saved_per_sample"] == {"3": 196608, "6": 393216, "12": 12 * 2 * 128 * 64 * 4}
    first = grid[0]["prefill"]
    assert first["speedup"]["12"] == pytest.approx(1 / (1 - first["share"]))
    assert first["speedup_of_last"]["6"] == pytest.approx(1 / (1 - first["share"] / 2 - first["spared"] * 7 / 12))
    assert grid[0]["decode"]["speedup_of_last"] == {}
