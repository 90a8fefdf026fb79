"""The study `latency_lavin7b` times what it says: its published merge against the recording, and all forms alike."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lavin_golden import close, golden
from test_lavin_blocks import HEADS, REP, TOLERANCE, additive, block_outputs, one_layer, student_of_block

from eas_search.latency import LatencyConfig, measure_latency
from eas_search.merging import verify_merge
from eas_search.models.lavin.llama_weights import half_split
from eas_search.pia import Pia

STUDY = Path(__file__).parents[2] / "studies" / "latency_lavin7b"
SHAPE = {
    "dtype": "float32",
    "text": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 60,
    },
    "vision": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    },
    "skip": [1, 3],
}
CONFIG = {"seed": 0, "adapters": {"adapter_dim": 4, "pia_dim": 8, "groups": 2}}


@pytest.fixture(scope="module")
def study() -> Any:
    """The study's modules."""
    sys.path.insert(0, str(STUDY))
    try:
        import published
        import rows
        import variants
    finally:
        sys.path.remove(str(STUDY))
    return {"published": published, "rows": rows, "variants": variants}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["kept", "skipped"])
def test_the_published_merge_is_the_recorded_one(study: Any, kind: str) -> None:
    data, _ = golden("lavin_rep")
    prefix, config = REP[kind]
    student = student_of_block(data, prefix, **config)
    adapter = next(part for part in student.modules() if isinstance(part, Pia))
    plain = one_layer(data, prefix)
    original = plain.model.layers[0]
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    plain.model.layers[0] = study["published"].RemergedLayer(original, adapter, kind == "skipped")
    inputs = {"inputs_embeds": data["in__x"], "attention_mask": additive(data["in__mask"], 1), "use_cache": False}
    seen = block_outputs(plain)
    plain(**inputs)
    plain(**inputs)  # the second prompt is merged into the original weights, not into the first one's
    for output in seen:
        close(output, data[f"out__{kind}_rep_intended_prefill"], TOLERANCE)
    names = {"kept": ("wq", "wk", "wv"), "skipped": ("w1", "w3")}[kind]
    for name, ours in zip(names, plain.model.layers[0].names, strict=True):
        layer = plain.model.layers[0].layer.get_submodule(ours)
        group = "layers.0.attention" if kind == "kept" else "layers.1.feed_forward"
        wanted = [data[f"out__merged__{group}.{name}.{part}"] for part in ("weight", "bias_intended")]
        if name in ("wq", "wk"):
            wanted = [half_split(tensor, HEADS) for tensor in wanted]
        close(layer.weight, wanted[0], TOLERANCE)
        close(layer.bias, wanted[1], TOLERANCE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


def test_the_forms_of_one_student_answer_alike(study: Any) -> None:
    forms = study["variants"]
    model = forms.build_model(CONFIG, SHAPE, "cpu")
    built = forms.build_variants(model, CONFIG, SHAPE)
    inputs = forms.build_inputs(model, 1, 12, 0)
    assert inputs["input_ids"].shape == (1, 12)
    for name in (forms.PUBLISHED, forms.ROUTED):
        verify_merge(built["routed, not merged"], built[name], inputs)
    with torch.no_grad():
        logits = {name: one(**inputs).logits for name, one in built.items()}
    assert torch.equal(logits[forms.BOUND], logits[f"{forms.BOUND}, A/A"])
    assert (logits[forms.BOUND] - logits[forms.ROUTED]).abs().max() > 1e-3  # the adapters do something
    with pytest.raises(ValueError, match="2 prompts; expected one"):
        built[forms.PUBLISHED](**forms.build_inputs(model, 2, 12, 0))


def test_rows_are_the_ratios_of_the_samples(study: Any) -> None:
    """A clock on which our form takes 1 s, the bound 2 s and the published one 8 s."""
    forms, rows = study["variants"], study["rows"]
    model = forms.build_model(CONFIG, SHAPE, "cpu")
    now, cost = [0.0], {forms.BOUND: 2.0, forms.STATIC: 1.0, forms.PUBLISHED: 8.0}

    class Clocked(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, **_: Any) -> None:
            now[0] += cost[self.name]

    timed = {name: Clocked(name) for name in (forms.STATIC, forms.PUBLISHED)}
    config = LatencyConfig(rounds=5, blocks=2, decode_tokens=0, time_limit_s=None)
    report = measure_latency(timed, {}, baseline=Clocked(forms.BOUND), config=config, timer=lambda: now[0])
    found = rows.compare(report, answers=(6,))
    assert found[f"{forms.STATIC} / {forms.BOUND}, prefill"]["estimate"] == pytest.approx(0.5)
    published = found[f"{forms.STATIC} / {forms.PUBLISHED}, prefill"]
    assert (published["estimate"], published["verdict"]) == (pytest.approx(0.125), "missed")
    # 4 layers of 32 and 48, 2 skipped: 2·32²·(3·32·2 + 2·48·2) for the merge, by hand.
    text = model.config.text_config
    assert study["published"].remerge_flops(text, 2) == 2048 * 384
    assert study["published"].prompt_flops(text, 2, 1) == 2 * (3 * 32 * 48 * 4 + (4 * 32 * 32 + 32) * 2)
