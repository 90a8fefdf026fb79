"""`apply_skips`: what a student computes and shares, and that the caller's model does not notice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eas_search.architectures import attention_sites
from eas_search.exceptions import ConfigError
from eas_search.skip_config import SkipConfig
from eas_search.skipping import adapter_parameters, apply_skips, load_adapters
from eas_search.training import FineTuneConfig, fine_tune

PLACEMENTS = ["ffn", "residual", "parallel"]
ROUNDING = 2e-5  # float32 outputs of size ~10 through three or four layers, computed in another order

Inputs = dict[str, Tensor]


@pytest.fixture
def inputs(tokens: Tensor, pixels: Tensor, image_prompt: Inputs) -> dict[str, Inputs]:
    images = {"pixel_values": pixels}
    return {"llama": {"input_ids": tokens}, "clip": images, "vit": images, "llava": image_prompt}


@pytest.fixture(params=["llama", "clip", "vit", "llava"])
def case(request: pytest.FixtureRequest, inputs: dict[str, Inputs]) -> tuple[Any, Inputs]:
    return request.getfixturevalue(request.param), inputs[request.param]


@torch.no_grad()
def first_output(model: nn.Module, inputs: Inputs) -> Tensor:
    return model(**inputs)[0]


def pooling_of(model: nn.Module) -> str:
    return "prompt" if hasattr(model, "lm_head") else "all"


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("rank", [0, 4])
def test_a_zero_pia_equals_deleting_the_attention(
    case: tuple[Any, Inputs], placement: str, rank: int, without_attention: Callable[..., nn.Module]
) -> None:
    model, inputs = case
    sites = attention_sites(model)
    skip = {0, 2, len(sites) - 1}
    config = SkipConfig(skip=tuple(skip), pia_dim=rank, placement=placement, pooling=pooling_of(model), identity="noop")
    expected = first_output(without_attention(model, [sites[i].name for i in skip]), inputs)
    actual = first_output(apply_skips(model, config), inputs)
    torch.testing.assert_close(actual, expected, atol=ROUNDING, rtol=1e-5)
    assert (expected - first_output(model, inputs)).abs().max() > 0.1  # deleting it shows


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_callers_model_is_untouched(
    case: tuple[Any, Inputs], placement: str, randomise: Callable[..., nn.Module]
) -> None:
    model, inputs = case
    before = copy.deepcopy(model.state_dict())
    tree, flags = repr(model), [p.requires_grad for p in model.parameters()]
    assert all(flags)  # no test before this one has frozen the shared model
    output = first_output(model, inputs)
    config = SkipConfig(skip=(0, 1), pia_dim=4, placement=placement, pooling=pooling_of(model), adapter_dim=4)
    if config.pooling == "prompt":  # the stack with a loss: train it a little
        student = randomise(apply_skips(model, config)).train()
        student(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        torch.optim.SGD(adapter_parameters(student).values(), lr=1.0).step()
    else:
        first_output(randomise(apply_skips(model, config)), inputs)
    assert repr(model) == tree
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(first_output(model, inputs), output)


def test_weights_are_shared_and_only_adapters_train(llama: Any) -> None:
    student = apply_skips(llama, SkipConfig(skip=(1,), pia_dim=4, adapter_dim=2))
    theirs = {p.data_ptr() for p in llama.parameters()}
    own = {name: p for name, p in student.named_parameters() if p.data_ptr() not in theirs}
    assert own.keys() == adapter_parameters(student).keys()
    assert {name.split(".")[4] for name in own if ".layers.1." not in name} == {"eas_adapter"}
    assert all(".pia_ffn." in name or ".pia_stream." in name for name in own if ".layers.1." in name)
    assert not any(".layers.1.self_attn" in name for name, _ in student.named_parameters())


def test_tied_weights_stay_tied(build_llama: Callable[..., Any]) -> None:
    student = apply_skips(build_llama(tie_word_embeddings=True), SkipConfig(skip=(0,), pia_dim=4))
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_a_deep_copy_of_a_student_is_a_student_of_its_own(
    llama: Any, tokens: Tensor, randomise: Callable[..., nn.Module]
) -> None:
    config = SkipConfig(skip=(0, 2), pia_dim=4, adapter_dim=2, router="routed", pooling="prompt")
    student = randomise(apply_skips(llama, config))
    twin = copy.deepcopy(student)
    expected = first_output(student, {"input_ids": tokens})
    assert torch.equal(first_output(twin, {"input_ids": tokens}), expected)
    assert torch.equal(twin.generate(tokens, max_new_tokens=4), student.generate(tokens, max_new_tokens=4))
    randomise(twin, seed=2)
    assert torch.equal(first_output(student, {"input_ids": tokens}), expected)
    assert not torch.equal(first_output(twin, {"input_ids": tokens}), expected)


class Pictures:
    """A training split of eight pictures of five classes, brighter than those that the model has seen."""

    def __len__(self) -> int:
        return 8

    def batches(self, size: int, generator: torch.Generator) -> Any:
        order = torch.randperm(8, generator=generator)
        pixels = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1)) + 1
        for rows in order.split(size):
            yield {"pixel_values": pixels[rows], "labels": rows % 5}


def plain_loop(student: Any) -> None:
    optimizer = torch.optim.AdamW(adapter_parameters(student).values(), lr=1e-2)
    student.train()
    for batch in Pictures().batches(4, torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        student(**batch).loss.backward()
        optimizer.step()
    student.eval()


def own_loop(student: Any) -> None:
    fine_tune(student, Pictures(), FineTuneConfig(steps=3, batch_size=4, learning_rate=1e-2), seed=0)


@pytest.fixture
def mobilevit() -> Any:
    """A vision tower with batch norms whose running statistics are those of its weights."""
    from transformers import MobileViTConfig, MobileViTForImageClassification

    torch.manual_seed(0)
    sizes = {"image_size": 64, "hidden_sizes": [32, 40, 48], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64]}
    config = MobileViTConfig(**sizes, num_labels=5, hidden_dropout_prob=0.0, classifier_dropout_prob=0.0)
    model = MobileViTForImageClassification(config).train()
    with torch.no_grad():
        for weight in (parameter for parameter in model.parameters() if parameter.dim() > 1):
            weight.normal_(std=weight[0].numel() ** -0.5)
        for _ in range(50):
            model(torch.randn(8, 3, 64, 64))
    return model.eval()


@pytest.mark.parametrize("train", [plain_loop, own_loop])
@pytest.mark.parametrize("model_mode", ["eval", "train"])
def test_training_a_student_moves_no_running_statistics(mobilevit: Any, train: Any, model_mode: str) -> None:
    """Bit-equal: neither the model, nor another student, nor what the student itself stands on has changed."""
    images = {"pixel_values": torch.randn(4, 3, 64, 64)}
    expected = first_output(mobilevit, images)
    state = {name: value.clone() for name, value in mobilevit.state_dict().items()}
    assert any("running_mean" in name for name in state)
    mobilevit.train(model_mode == "train")
    config = SkipConfig(skip=(0,), pia_dim=4, pooling="all")
    student, twin, other = (apply_skips(mobilevit, config) for _ in range(3))
    mobilevit.eval()
    untrained = first_output(other.eval(), images)
    train(student)
    assert torch.equal(first_output(mobilevit, images), expected)
    assert torch.equal(first_output(other, images), untrained)
    assert all(torch.equal(value, state[name]) for name, value in mobilevit.state_dict().items())
    trained = first_output(student, images)
    assert not torch.equal(trained, untrained)
    load_adapters(twin, {name: value.detach() for name, value in adapter_parameters(student).items()})
    assert torch.equal(first_output(twin.eval(), images), trained)
    # Without dropout there is nothing left in which the two modes differ, also in a copy.
    for one in (student, copy.deepcopy(student)):
        assert torch.equal(first_output(one.train(), images), trained)


def test_the_dropout_of_the_base_is_on_while_a_student_trains(mobilevit: Any) -> None:
    images = {"pixel_values": torch.randn(4, 3, 64, 64)}
    student = apply_skips(mobilevit, SkipConfig(skip=(0,), pia_dim=4, pooling="all")).train()
    dropouts = [module for module in student.modules() if isinstance(module, nn.Dropout)]
    assert dropouts
    for module in dropouts:
        assert module.training
        module.p = 0.5
    assert not torch.equal(first_output(student, images), first_output(student, images))
    student.eval()
    assert torch.equal(first_output(student, images), first_output(student, images))


def test_names_and_indexes_mean_the_same_sites(llava: Any, image_prompt: Inputs) -> None:
    sites = attention_sites(llava)
    by_index = apply_skips(llava, SkipConfig(skip=(5, 1), pia_dim=0))
    by_name = apply_skips(llava, SkipConfig(skip=(sites[5].name, sites[1].name), pia_dim=0))
    assert by_index.eas.skipped == by_name.eas.skipped == (sites[1], sites[5])
    assert torch.equal(first_output(by_index, image_prompt), first_output(by_name, image_prompt))


def test_hidden_states_are_recorded_through_skipped_sites(
    llava: Any, image_prompt: Inputs, without_attention: Callable[..., nn.Module]
) -> None:
    """LLaVA reads a hidden state of its vision tower by number: a block that is not recorded shifts that number."""
    sites = attention_sites(llava)
    skip = [site for site in sites if site.layer == 1]
    assert [site.tower for site in skip] == ["text", "vision"]
    deleted = without_attention(llava, [site.name for site in skip])
    student = apply_skips(llava, SkipConfig(skip=[site.index for site in skip], pia_dim=0))
    for model in (deleted.model.vision_tower, deleted):
        twin = student.model.vision_tower if model is not deleted else student
        batch = {"pixel_values": image_prompt["pixel_values"]} if model is not deleted else image_prompt
        with torch.no_grad():
            expected, actual = (m(**batch, output_hidden_states=True).hidden_states for m in (model, twin))
        assert len(actual) == len(expected)
        for mine, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=ROUNDING, rtol=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradient_checkpointing_gives_the_same_gradients(
    llama: Any, tokens: Tensor, placement: str, randomise: Callable[..., nn.Module]
) -> None:
    config = SkipConfig(skip=(0, 2), pia_dim=4, placement=placement, adapter_dim=4, router="routed")
    labels = tokens.clone()
    labels[:, :6] = -100
    gradients = []
    for checkpointing in (False, True):
        student = randomise(apply_skips(llama, config)).train()
        if checkpointing:
            name = "activation_checkpointing_enable"  # its name from transformers 5.23 on
            getattr(student, name if hasattr(student, name) else "gradient_checkpointing_enable")()
        student(input_ids=tokens, labels=labels, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(student).items()})
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"skip": (4,)}, "expected an index from 0 to 3"),
        ({"skip": (-1,)}, "skip names site -1"),
        ({"skip": ("model.layers.0.mlp",)}, "a name like 'model.layers.0.self_attn'"),
        ({"skip": (1, 1)}, "names a site twice; name each site once"),
        ({"skip": (1,), "pooling": "all"}, "expected 'prompt', 'prefix' or 'none'"),
        ({"adapter_dim": 4, "router": "routed", "pooling": "all"}, "expected 'prompt', 'prefix' or 'none'"),
        ({"pia_dim": 5}, "expected a multiple of groups = 2"),
        ({"skip": (1,), "pia_dim": 6, "adapter_dim": 0, "groups": 3}, "expected a divisor of the model's width 32"),
        ({"pia_dim": 0, "adapter_dim": 6, "groups": 3}, "expected a divisor of the model's width 32"),
        ({"adapter_dim": -2}, "adapter_dim is -2, expected 0 or more"),
        ({"temperature": 0.0}, "expected more than 0"),
        ({"placement": "beside"}, "placement = 'beside'"),
    ],
)
def test_a_wrong_configuration_is_one_line_with_the_cure(llama: Any, config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_skips(llama, SkipConfig(**config))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_student_is_refused_as_an_original(llama: Any) -> None:
    with pytest.raises(ConfigError, match="expected an original model"):
        apply_skips(apply_skips(llama, SkipConfig(skip=(1,))), SkipConfig(skip=(2,)))
