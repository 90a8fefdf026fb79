"""What a forward pass leaves behind, and who sees it: interrupts, threads, blocks that are computed again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eas_search.exceptions import UnsupportedModelError
from eas_search.merging import merge
from eas_search.skip_config import SkipConfig
from eas_search.skipping import adapter_parameters, apply_skips

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def bert(randomise: Callable[..., nn.Module]) -> Any:
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return randomise(transformers.BertForSequenceClassification(config), seed=0, std=0.2)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@torch.no_grad()
@pytest.mark.parametrize("form", ["student", "merged"])
def test_an_interrupt_leaves_nothing_for_the_next_pass(
    llama: Any, randomise: Callable[..., nn.Module], tokens: Tensor, form: str
) -> None:
    """An exception of Python's own, unlike an error, calls no hook behind the stack."""
    model: Any = randomise(apply_skips(llama, SkipConfig(skip=(0, 2), pia_dim=4)))
    model = merge(model) if form == "merged" else model
    expected = model(tokens[:1], use_cache=False).logits
    handle = model.model.layers[3].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate(tokens[1:2], max_new_tokens=2)
    handle.remove()
    assert torch.equal(model(tokens[:1], use_cache=False).logits, expected)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # torch's own, about what it does not compile
@pytest.mark.parametrize("form", ["student", "merged"])
@pytest.mark.parametrize("pooling", ["prompt", "prefix", "none"])
def test_a_compiled_model_answers_like_itself(
    llama: Any, randomise: Callable[..., nn.Module], tokens: Tensor, pooling: str, form: str
) -> None:
    config = SkipConfig(skip=(1,), pia_dim=4, router="routed", pooling=pooling)
    model: Any = randomise(apply_skips(llama, config)).eval()
    model = merge(model) if form == "merged" else model
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    expected = model(tokens, attention_mask=mask, use_cache=False).logits
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="eager")
    found = compiled(tokens, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("pooling", ["prompt", "prefix"])
def test_threads_answer_like_one(llama: Any, randomise: Callable[..., nn.Module], tokens: Tensor, pooling: str) -> None:
    config = SkipConfig(skip=(0, 2), pia_dim=4, adapter_dim=4, router="routed", pooling=pooling)
    merged: Any = merge(randomise(apply_skips(llama, config)))
    prompts = [tokens[i % 4 : i % 4 + 1, : 3 + i % 7] for i in range(16)]
    expected = [merged.generate(prompt, **GREEDY) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: merged.generate(prompt, **GREEDY), prompts))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@torch.no_grad()
def test_a_pass_is_not_disturbed_by_one_of_another_thread_inside_it(
    llama: Any, randomise: Callable[..., nn.Module], tokens: Tensor
) -> None:
    """The order that harms most, on purpose: another pass with other masks runs between two blocks."""
    student: Any = randomise(apply_skips(llama, SkipConfig(skip=(0, 2), pia_dim=4)))
    mask = torch.ones_like(tokens)
    mask[:, :4] = 0
    expected = student(tokens, attention_mask=mask).logits

    def meanwhile(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: student(tokens[:2, :5], use_cache=True))
            other.start()
            other.join()

    handle = student.model.layers[1].register_forward_pre_hook(meanwhile)
    assert torch.equal(student(tokens, attention_mask=mask).logits, expected)
    handle.remove()


def gradients(student: Any, inputs: dict[str, Tensor], backward: Callable[[Tensor], None]) -> dict[str, Tensor]:
    """Of the adapters, over two passes with other masks before one backward pass."""
    student.train()
    mask = inputs["attention_mask"]
    first = student(**inputs).loss
    second = student(**{**inputs, "attention_mask": torch.ones_like(mask)}).loss
    student.zero_grad()
    backward(first + second)
    return {name: p.grad.clone() for name, p in adapter_parameters(student).items() if p.grad is not None}


def in_another_thread(loss: Tensor) -> None:
    thread = threading.Thread(target=loss.backward)  # as autograd does for every device but the CPU
    thread.start()
    thread.join()


@pytest.mark.parametrize("backward", [Tensor.backward, in_another_thread], ids=["here", "there"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", ["encoder", "prompt", "prefix"])
def test_a_block_computed_again_sees_the_masks_of_its_own_pass(
    bert: Any,
    llama: Any,
    randomise: Callable[..., nn.Module],
    tokens: Tensor,
    form: str,
    reentrant: bool,
    backward: Callable[[Tensor], None],
) -> None:
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0
    mask[1, 8:] = 0
    labels = torch.tensor([0, 1, 1, 0]) if form == "encoder" else tokens.masked_fill(torch.arange(10) < 4, -100)
    pooling = "prompt" if form == "encoder" else form
    config = SkipConfig(skip=(0, 2), pia_dim=4, placement="residual", pooling=pooling)
    student: Any = randomise(apply_skips(bert if form == "encoder" else llama, config))
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    expected = gradients(student, inputs, Tensor.backward)
    enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    student.enable_input_require_grads()
    again: list[int] = []
    student.get_submodule(student.eas.sites[1].name).register_forward_pre_hook(lambda *_: again.append(1))
    found = gradients(student, inputs, backward)
    assert len(again) == 4  # two passes, each computed twice
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_a_block_computed_again_behind_the_model_s_back_is_refused(
    bert: Any, randomise: Callable[..., nn.Module], tokens: Tensor
) -> None:
    """Its masks are not known then; without means over tokens it needs none."""
    for pooling in ("prompt", "none"):
        config = SkipConfig(skip=(0, 1, 2), pia_dim=4, placement="residual", pooling=pooling)
        student: Any = randomise(apply_skips(bert, config)).train()
        block = student.bert.encoder.layer[1]
        plain = block.forward
        block.forward = lambda *args, plain=plain, **kwargs: checkpoint(plain, *args, use_reentrant=False, **kwargs)
        loss = student(tokens, attention_mask=torch.ones_like(tokens), labels=torch.tensor([0, 1, 1, 0])).loss
        if pooling == "none":
            loss.backward()
        else:
            with pytest.raises(UnsupportedModelError, match="without the masks of its pass") as caught:
                loss.backward()
            assert "\n" not in str(caught.value)
