"""A merged model computes what its student computes, with nothing but plain weights where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eas_search.exceptions import ConfigError, VerificationError
from eas_search.export import load_pretrained, save_pretrained
from eas_search.merging import MergedBlock, merge, verify_merge
from eas_search.pooling import PoolSession
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips

PROMPT = 6
# float32 folded weights round once more per layer; the logits are of size 10. Norms of Llama models compute in float32
# whatever the weights are, so only vision towers can be compared in double precision.
SINGLE, DOUBLE = 5e-5, 1e-9
ROUTERS, PLACEMENTS, IDENTITIES = ["static", "routed"], ["ffn", "residual", "parallel"], ["noop", "paper"]


def agree(actual: Tensor, expected: Tensor, tolerance: float = SINGLE) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0.0)


class TokenBatchNorm(nn.BatchNorm1d):
    """Over the features of tokens [B, n, d]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def padded(side: str) -> Tensor:
    mask = torch.ones(4, PROMPT, dtype=torch.long)
    mask[1, slice(0, 3) if side == "left" else slice(3, None)] = 0
    return mask


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["prompt", "prefix", "none"])
@pytest.mark.parametrize(
    ("router", "placement", "identity", "adapters"), list(product(ROUTERS, PLACEMENTS, IDENTITIES, [0, 4]))
)
def test_merged_llama_equals_the_student(
    llama: Any,
    tokens: Tensor,
    randomise: Callable[..., nn.Module],
    pooling: str,
    router: str,
    placement: str,
    identity: str,
    adapters: int,
) -> None:
    config = SkipConfig(
        skip=(0, 2),
        pia_dim=4,
        adapter_dim=adapters,
        placement=placement,
        pooling=pooling,
        router=router,
        identity=identity,
        scale=0.7,
        temperature=2.0,
    )
    student = randomise(apply_skips(llama, config))
    merged = merge(student)
    prompt, tail = tokens[:, :PROMPT], torch.ones(4, 2, dtype=torch.long)
    for rows, padding in ((1, torch.ones_like(prompt)), (4, padded("left")), (4, padded("right"))):
        mask, outputs = padding[:rows], []
        both = torch.cat([mask, tail[:rows]], dim=1)
        for model in (student, merged):
            first = model(input_ids=prompt[:rows], attention_mask=mask, use_cache=True)
            second = model(
                tokens[:rows, PROMPT : PROMPT + 2], attention_mask=both, past_key_values=first.past_key_values
            )
            whole = model(input_ids=prompt[:rows], attention_mask=mask, use_cache=False)
            outputs.append((first.logits[mask.bool()], second.logits, whole.logits[mask.bool()]))
        for actual, expected in zip(*reversed(outputs), strict=True):
            agree(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "vit"])
@pytest.mark.parametrize("pooling", ["all", "none"])
@pytest.mark.parametrize(("router", "placement", "identity"), list(product(ROUTERS, PLACEMENTS, IDENTITIES)))
def test_merged_vision_tower_equals_the_student_in_double_precision(
    request: pytest.FixtureRequest,
    pixels: Tensor,
    randomise: Callable[..., nn.Module],
    name: str,
    pooling: str,
    router: str,
    placement: str,
    identity: str,
) -> None:
    import copy

    tower = copy.deepcopy(request.getfixturevalue(name)).double()
    config = SkipConfig(
        skip=(0, 2), pia_dim=4, adapter_dim=2, placement=placement, pooling=pooling, router=router, identity=identity
    )
    student = randomise(apply_skips(tower, config).double())
    merged = merge(student)
    for rows in (4, 1):
        images = pixels[:rows].double()
        expected = student(pixel_values=images, output_hidden_states=True)
        actual = merged(pixel_values=images, output_hidden_states=True)
        agree(actual.last_hidden_state, expected.last_hidden_state, DOUBLE)
        assert len(actual.hidden_states) == len(expected.hidden_states) == 4
        for mine, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
            agree(mine, theirs, DOUBLE)


@torch.no_grad()
def test_merged_llava_equals_the_student(
    llava: Any, image_prompt: dict[str, Tensor], randomise: Callable[..., nn.Module]
) -> None:
    student = randomise(apply_skips(llava, SkipConfig(skip=(0, 3, 4), pia_dim=4, adapter_dim=4, router="static")))
    report = verify_merge(student, merged := merge(student), image_prompt)
    assert report.largest < SINGLE
    states = [model(**image_prompt, output_hidden_states=True).hidden_states for model in (student, merged)]
    assert len(states[0]) == len(states[1]) == 5


@settings(max_examples=25, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.integers(1, 3),
    width=st.sampled_from([8, 16]),
    form=st.tuples(*map(st.sampled_from, (ROUTERS, PLACEMENTS, IDENTITIES, ["all", "none"]))),
    scale=st.floats(-2, 2),
    temperature=st.floats(0.1, 20),
    act=st.sampled_from(["gelu", "gelu_pytorch_tanh", "relu", "silu", "quick_gelu"]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_any_shape_merges(
    build_clip: Callable[..., Any],
    randomise: Callable[..., nn.Module],
    pixels: Tensor,
    groups: int,
    per_group: int,
    width: int,
    form: tuple[str, ...],
    scale: float,
    temperature: float,
    act: str,
    seed: int,
) -> None:
    names = dict(zip(("router", "placement", "identity", "pooling"), form, strict=True))
    tower = build_clip(seed, hidden_size=width, intermediate_size=width + 3, num_hidden_layers=2, hidden_act=act)
    config = SkipConfig(
        skip=(0, 1), pia_dim=groups * per_group, groups=groups, scale=scale, temperature=temperature, **names
    )
    student = randomise(apply_skips(tower.double(), config).double(), seed)
    images = pixels.double()
    expected, actual = (model(pixel_values=images)[0] for model in (student, merge(student)))
    agree(actual, expected, DOUBLE)


@pytest.mark.parametrize(("tower", "extra"), [("llama", 4), ("clip", 8)])
@pytest.mark.parametrize("placement", ["ffn", "parallel"])
def test_without_pooling_a_merged_layer_has_only_plain_ffn_weights(
    request: pytest.FixtureRequest, randomise: Callable[..., nn.Module], tower: str, extra: int, placement: str
) -> None:
    """Width d_ff + r for a gated FFN, d_ff + 2r for a plain one, when the PIA also writes to the stream."""
    model = request.getfixturevalue(tower)
    config = SkipConfig(skip=(1,), pia_dim=4, pooling="none", router="static", placement=placement)
    merged = merge(randomise(apply_skips(model, config)))
    block = next(module for path, module in merged.named_modules() if path.endswith("layers.1"))
    width, hidden = (32, 48) if tower == "llama" else (24, 40)
    hidden += extra if placement == "parallel" else 0
    first, last = (("gate_proj", "up_proj"), "down_proj") if tower == "llama" else (("fc1",), "fc2")
    shapes = {name: tuple(value.shape) for name, value in block.state_dict().items()}
    wanted = {f"mlp.{name}.weight": (hidden, width) for name in first} | {f"mlp.{last}.weight": (width, hidden)}
    assert {name: shape for name, shape in shapes.items() if name.endswith("weight")} == wanted
    assert set(shapes) - set(wanted) <= {f"mlp.{name}.bias" for name in (*first, last)}
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_the_student_survives_its_merge(llama: Any, tokens: Tensor, randomise: Callable[..., nn.Module]) -> None:
    student = randomise(apply_skips(llama, SkipConfig(skip=(0, 2), pia_dim=4, adapter_dim=4)))
    state, tree = {name: value.clone() for name, value in student.state_dict().items()}, repr(student)
    with torch.no_grad():
        before = student(tokens).logits
        merge(student)
        assert torch.equal(student(tokens).logits, before)
    assert repr(student) == tree
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())


@torch.no_grad()
def test_a_merged_model_in_train_mode_moves_no_running_statistics(
    build_llama: Callable[..., Any], tokens: Tensor, randomise: Callable[..., nn.Module]
) -> None:
    model = build_llama()
    model.model.norm = TokenBatchNorm(32).eval()
    expected = model(tokens).logits
    student = randomise(apply_skips(model, SkipConfig(skip=(0, 2), pia_dim=4, adapter_dim=4)))
    merged = merge(student)
    before = merged(tokens).logits
    assert torch.equal(merged.train()(tokens).logits, before)
    assert torch.equal(merged.eval()(tokens).logits, before)
    assert torch.equal(model(tokens).logits, expected)
    agree(before, student(tokens).logits)


def test_plain_deletion_merges_to_itself(llama: Any, tokens: Tensor) -> None:
    student = apply_skips(llama, SkipConfig(skip=(0, 2), pia_dim=0))
    assert verify_merge(student, merge(student), {"input_ids": tokens}, tolerance=0.0).largest == 0.0


@pytest.mark.parametrize("damage", [0.01, float("nan"), float("inf")])
def test_verify_merge_refuses_a_model_that_differs(
    llama: Any, tokens: Tensor, randomise: Callable[..., nn.Module], damage: float
) -> None:
    student = randomise(apply_skips(llama, SkipConfig(skip=(0,), pia_dim=4))).train()
    merged = merge(student)
    verify_merge(student, merged, {"input_ids": tokens})
    assert student.training  # the mode is given back
    with torch.no_grad():
        merged.model.layers[0].mlp.up_proj.bias += damage
    with pytest.raises(VerificationError, match=r"logits differs by .* expected at most 0\.0001") as caught:
        verify_merge(student, merged, {"input_ids": tokens})
    assert "\n" not in str(caught.value)
    assert caught.value.report.tolerance == 1e-4
    assert not caught.value.report.differences["logits"] <= 1e-4


def test_only_an_unmerged_student_merges(llama: Any) -> None:
    with pytest.raises(ConfigError, match="not a student"):
        merge(llama)
    merged = merge(apply_skips(llama, SkipConfig(skip=(0,), pia_dim=4)))
    with pytest.raises(ConfigError, match="already merged"):
        merge(merged)


@pytest.mark.parametrize(("act", "gated"), [("tanh", False), ("leaky_relu", False), ("sigmoid", True), ("tanh", True)])
def test_without_linear_neurons_the_stream_pia_stays_two_thin_products(
    build_clip: Callable[..., Any],
    build_llama: Callable[..., Any],
    pixels: Tensor,
    tokens: Tensor,
    randomise: Callable[..., nn.Module],
    act: str,
    gated: bool,
) -> None:
    model, inputs = (
        (build_llama(hidden_act=act), {"input_ids": tokens})
        if gated
        else (build_clip(hidden_act=act), {"pixel_values": pixels})
    )
    values = {"skip": (0,), "pia_dim": 4, "pooling": "none"}
    for placement, thin in (("parallel", True), ("ffn", False)):
        student = randomise(apply_skips(model, SkipConfig(**values, placement=placement)))
        merged = merge(student)
        assert verify_merge(student, merged, inputs).largest < SINGLE
        (block,) = [part for part in merged.modules() if isinstance(part, MergedBlock)]
        assert (block.thin_stream is not None) == thin


@pytest.mark.parametrize("placement", ["ffn", "parallel"])
def test_pooled_terms_are_vectors_as_wide_as_the_stream(
    llama: Any, tokens: Tensor, randomise: Callable[..., nn.Module], placement: Any
) -> None:
    """The FFN is the one without pooling: per sample one vector more goes in, and one is added behind it."""
    config = SkipConfig(skip=(1,), pia_dim=4, placement=placement, pooling="prompt")
    student = randomise(apply_skips(llama, config), std=0.1)
    merged = merge(student)
    unpooled = apply_skips(llama, config.model_copy(update={"pooling": "none"}))
    unpooled.load_state_dict(student.state_dict(), strict=False)  # but for the pooled terms
    plain = merge(unpooled)
    ffn, same = merged.model.layers[1].mlp, plain.model.layers[1].mlp
    count, width = (1, 2)[placement == "parallel"], llama.config.hidden_size
    assert ffn.spread.weight.shape == (count * width, count * 4)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert torch.equal(getattr(ffn, name).weight, getattr(same, name).weight)
    assert verify_merge(student, merged, {"input_ids": tokens}).largest < SINGLE


@pytest.mark.parametrize("placement", ["ffn", "parallel"])
@torch.no_grad()
def test_a_pia_that_cancels_its_input_keeps_two_thin_products(
    build_llama: Callable[..., Any],
    tokens: Tensor,
    randomise: Callable[..., nn.Module],
    same_model: Callable[..., None],
    placement: Any,
    tmp_path: Path,
) -> None:
    """M = I - E Eᵀ is singular: what the PIA takes away cannot be brought back by a vector in front of it."""
    model = build_llama()
    model.model.layers[1].input_layernorm.weight.fill_(1.0)
    for pooling, thin in (("prompt", True), ("none", False)):
        config = SkipConfig(skip=(1,), pia_dim=2, groups=1, placement=placement, pooling=pooling)
        student = randomise(apply_skips(model, config))
        pia = student.model.layers[1].pia_ffn
        eye = torch.eye(llama_width := model.config.hidden_size)[:, :2]
        assert pia.down.weight.shape == (2, llama_width)
        for up in pia.experts():
            up.weight.copy_(eye)
        pia.down.weight.copy_(-eye.T / pia.shape.mix)
        merged = merge(student)
        assert verify_merge(student, merged, {"input_ids": tokens}).largest < SINGLE
        assert (merged.model.layers[1].thin_ffn is not None) == thin
        assert merged.eas.thin == (("model.layers.1.self_attn",) if thin else ())
        # Reloaded, the structure is made before the weights are there.
        again = load_pretrained(save_pretrained(merged, tmp_path / pooling))
        same_model(again, merged, input_ids=tokens)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["prompt", "all", "prefix", "none"])
def test_a_mean_of_scaled_tokens_is_the_mean_of_their_products(mode: Any, masked: bool) -> None:
    torch.manual_seed(0)
    x, scale, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 5, 8), (3, 5, 1), (2, 8)))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]]) if masked else None
    scaled = PoolSession(mode, mask).mean("pool", x, weight, torch.tanh, scale)
    torch.testing.assert_close(scaled, PoolSession(mode, mask).mean("pool", x * scale, weight, torch.tanh))
