"""A skip configuration as Optuna parameters and back, and as a file and back."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import IntDistribution

from eas_search.exceptions import ConfigError
from eas_search.search_space import SearchSpace
from eas_search.setting_groups import SpaceSettings
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips

INDEXES = (0, 1, 2, 3, 4, 7)


@given(
    skip=st.sets(st.sampled_from(INDEXES), min_size=1),
    dim=st.integers(0, 2),
    placement=st.integers(0, 1),
)
def test_a_configuration_survives_the_way_through_parameters(
    small_space: SearchSpace, skip: set[int], dim: int, placement: int
) -> None:
    config = small_space.config(sorted(skip, reverse=True), dim, placement)
    params = small_space.to_params(config)
    assert small_space.to_config(params) == config
    assert config.skip == tuple(sorted(skip))
    assert (config.pia_dim, config.placement) == ((2, 4, 8)[dim], ("parallel", "ffn")[placement])
    assert config.adapter_dim == small_space.student.adapter_dim


@given(
    bits=st.lists(st.integers(0, 1), min_size=6, max_size=6),
    dim=st.integers(0, 2),
    placement=st.integers(0, 1),
)
def test_parameters_survive_the_way_through_a_configuration_unless_nothing_is_skipped(
    small_space: SearchSpace, bits: list[int], dim: int, placement: int
) -> None:
    params = dict(zip([f"skip_{i:02d}" for i in INDEXES], bits, strict=True))
    params |= {"pia_dim_choice": dim, "placement_choice": placement}
    back = small_space.to_params(small_space.to_config(params))
    assert back == (params if any(bits) else dict.fromkeys(params, 0))


@given(dim=st.integers(0, 2), placement=st.integers(0, 1))
def test_skipping_nothing_is_one_configuration_whatever_the_choices(
    small_space: SearchSpace, dim: int, placement: int
) -> None:
    nothing = dict.fromkeys(small_space.distributions(), 0)
    config = small_space.to_config({**nothing, "pia_dim_choice": dim, "placement_choice": placement})
    assert config == small_space.config(()) == small_space.to_config(nothing)
    assert hash(config) == hash(small_space.config(()))


@pytest.mark.parametrize("identity", ["noop", "paper"])
def test_rank_0_is_the_same_model_in_every_placement(llama: Any, identity: str) -> None:
    """Why its placement is no choice: with rank 0 the attention's block computes what it does without attention."""
    tokens, logits = torch.arange(3, 12).view(1, -1), []
    for placement in ("parallel", "ffn", "residual"):
        config = SkipConfig(skip=(0, 2), pia_dim=0, placement=placement, pooling="none", identity=identity)
        with torch.no_grad():
            logits.append(apply_skips(llama, config).eval()(input_ids=tokens).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(
    ("dims", "forms"),
    [
        ((0,), {(0, "parallel")}),
        ((0, 8), {(0, "parallel"), (8, "parallel"), (8, "ffn")}),
        ((8, 0), {(0, "parallel"), (8, "parallel"), (8, "ffn")}),
        ((4, 8), {(4, "parallel"), (4, "ffn"), (8, "parallel"), (8, "ffn")}),
    ],
)
def test_plain_deletion_is_one_configuration_whatever_the_placement(
    small_space: SearchSpace, dims: tuple[int, ...], forms: set[tuple[int, str]]
) -> None:
    space = replace(small_space, choices=SpaceSettings(pia_dims=dims, placements=("parallel", "ffn")))
    every = [(config.skip, config.pia_dim, config.placement) for config in space.every()]
    skips = [skip for size in range(1, 7) for skip in combinations(INDEXES, size)]
    assert space.size == len(every) == 63 * len(forms)
    assert set(every) == {(skip, *form) for skip in skips for form in forms}
    for config in space.every():
        assert space.to_config(space.to_params(config)) == config
    for dim in range(len(dims)):
        for placement in range(2):
            params = {**space.to_params(space.config([1, 4])), "pia_dim_choice": dim, "placement_choice": placement}
            config = space.to_config(params)
            assert (config.pia_dim, config.placement) == (dims[dim], ("parallel", "ffn")[placement if dims[dim] else 0])
            assert space.to_config(space.to_params(config)) == config


def test_every_parameter_is_an_integer(small_space: SearchSpace) -> None:
    space = small_space.distributions()
    assert all(isinstance(one, IntDistribution) and one.low == 0 for one in space.values())
    assert [one.high for one in space.values()] == [1] * 6 + [2, 1]
    assert all(type(value) is int for value in small_space.to_params(small_space.config([7, 1])).values())


def test_the_description_of_the_space_is_stable(small_space: SearchSpace) -> None:
    """Stored studies refer to these names; a change makes them unreadable."""
    first, second = small_space.distributions(), small_space.distributions()
    assert first == second
    assert list(first) == [*(f"skip_{i:02d}" for i in INDEXES), "pia_dim_choice", "placement_choice"]


@pytest.mark.parametrize(
    "config",
    [
        SkipConfig(),
        SkipConfig(skip=(4, 7), pia_dim=8, placement="ffn", pooling="none", router="routed", identity="paper"),
        SkipConfig(skip=("model.layers.1.self_attn", 3), adapter_dim=4, groups=1, scale=0.5, temperature=2.0),
    ],
    ids=["default", "indexes", "names"],
)
def test_a_saved_configuration_loads_equal(config: SkipConfig, tmp_path: Path) -> None:
    config.save(tmp_path / "c.json")
    assert SkipConfig.load(tmp_path / "c.json") == config


BAD_VALUES = [
    ({"skip": [1, 1]}, "[1, 1]"),
    ({"pia_dim": 7}, "pia_dim is 7"),
    ({"pia_dim": -2}, "pia_dim is -2"),
    ({"groups": 0}, "groups is 0"),
    ({"temperature": 0}, "temperature is 0"),
    ({"placement": "before"}, "'before'"),
    ({"pooling": "max"}, "'max'"),
    ({"rank": 8}, "rank"),
]


@pytest.mark.parametrize(("values", "named"), BAD_VALUES, ids=[str(values) for values, _ in BAD_VALUES])
def test_an_unusable_value_is_refused_in_one_line_that_names_it(
    values: dict[str, object], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as direct:
        SkipConfig(**values)
    (tmp_path / "bad.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ConfigError) as loaded:
        SkipConfig.load(tmp_path / "bad.json")
    for error in (direct, loaded):
        assert named in str(error.value)
        assert "\n" not in str(error.value)
    assert "bad.json" in str(loaded.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b'{"skip": "1 2"}'])
def test_a_file_that_holds_no_configuration_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.json") as error:
        SkipConfig.load(tmp_path / "bad.json")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json"):
        SkipConfig.load(tmp_path / "none.json")
