"""The closed-form start against least squares and singular vectors computed another way."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eas_search.architectures import attention_sites
from eas_search.conditions import AS_IT_IS
from eas_search.objective import make_student
from eas_search.pia import Pia, PiaShape, copy_slice
from eas_search.pooling import PoolSession
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.skipping import adapter_parameters, apply_skips
from eas_search.supernet import Supernet
from eas_search.training import FineTuneConfig
from eas_search.warm_start import SiteMoments, calibrate, write_closed_form

WIDTH, GROUPS = 8, 2
Array = np.ndarray


def sample(noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """16 sequences of 12 tokens, and targets that depend on each token and on its sequence's mean, with noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 12, WIDTH, generator=generator, dtype=torch.float64) + 0.5
    own, pooled = (torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    y = x @ own + x.mean(1, keepdim=True) @ pooled + 2.0
    return x, y + noise * torch.randn(y.shape, generator=generator, dtype=torch.float64)


def features(x: Tensor) -> Tensor:
    return torch.cat([x, x.mean(1, keepdim=True).expand_as(x)], dim=-1)


def fitted(x: Tensor, y: Tensor, rank: int, ridge: float = 0.0, **shape: Any) -> tuple[Pia, float]:
    moments = SiteMoments()
    for part in (slice(0, 5), slice(5, 16)):  # moments add up over batches
        moments.add(features(x[part]).flatten(0, 1), {"stream": y[part].flatten(0, 1)})
    pia = Pia(PiaShape(WIDTH, rank, GROUPS, **shape)).double()
    return pia, write_closed_form(pia, moments, "stream", ridge)


def by_lstsq_and_svd(x: Tensor, y: Tensor, rank: int) -> tuple[Array, float]:
    """Ordinary least squares with an intercept; each half of the outputs keeps its rank / 2 leading directions."""
    f, target = features(x).flatten(0, 1).numpy(), y.flatten(0, 1).numpy()
    design = np.hstack([f, np.ones((len(f), 1))])
    values = design @ np.linalg.lstsq(design, target, rcond=None)[0]
    centred = values - values.mean(0)
    reduced = np.zeros_like(values)
    for half in (slice(0, WIDTH // 2), slice(WIDTH // 2, WIDTH)):
        u, s, v = np.linalg.svd(centred[:, half], full_matrices=False)
        s[rank // GROUPS :] = 0
        reduced[:, half] = (u * s) @ v
    r_squared = (centred**2).sum() / ((target - target.mean(0)) ** 2).sum()
    return reduced + values.mean(0), r_squared


@pytest.mark.parametrize("shape", [{}, {"scale": 0.4, "mix": 1.0}, {"router": "routed", "temperature": 2.0}], ids=str)
@pytest.mark.parametrize("rank", [2, 4, 6, 8])
def test_the_fit_is_reduced_rank_least_squares(rank: int, shape: dict[str, Any]) -> None:
    x, y = sample()
    pia, explained = fitted(x, y, rank, **shape)
    expected, r_squared = by_lstsq_and_svd(x, y, rank)
    with torch.no_grad():
        actual = pia(x, PoolSession("all")).flatten(0, 1).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-8)  # normal equations square the condition number
    assert explained == pytest.approx(r_squared, abs=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_a_leading_slice_is_the_fit_of_smaller_rank(ridge: float) -> None:
    x, y = sample()
    wide, _ = fitted(x, y, 8, ridge)
    for rank in (2, 4, 6):
        slice_, direct = Pia(PiaShape(WIDTH, rank, GROUPS)).double(), fitted(x, y, rank, ridge)[0]
        copy_slice(wide, slice_)
        with torch.no_grad():
            one, other = (pia(x, PoolSession("all")) for pia in (slice_, direct))
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0.0)


def test_what_is_linear_is_recovered_exactly() -> None:
    x, y = sample(noise=0.0)
    pia, explained = fitted(x, y, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(pia(x, PoolSession("all")), y, atol=1e-8, rtol=0.0)
    assert explained == pytest.approx(1.0, abs=1e-9)


class MeanAttention(nn.Module):
    """A linear stand-in for an attention: x̂ → V x̂ + P mean(x̂), over the tokens of the prompt."""

    is_causal = True

    def __init__(self, original: nn.Module, prompt: int) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):  # the pattern knows an attention by these
            setattr(self, name, getattr(original, name))
        self.prompt = prompt
        generator = torch.Generator().manual_seed(3)
        self.own, self.pooled = (torch.randn(32, 32, generator=generator) * 0.1 for _ in range(2))

    def forward(self, hidden_states: Tensor, **ignored: object) -> tuple[Tensor, None]:
        mean = hidden_states[:, : self.prompt].mean(1, keepdim=True)
        return hidden_states @ self.own + mean @ self.pooled, None


def batches_of(rows: int = 24, prompt: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    batches = []
    for _ in range(4):
        ids = torch.randint(3, 60, (rows, 10), generator=generator)
        labels = ids.clone()
        labels[:, :prompt] = -100
        batches.append({"input_ids": ids, "labels": labels})
    return batches


@pytest.mark.parametrize("placement", ["residual", "parallel"])
def test_a_linear_attention_is_replaced_without_loss(llama: Any, placement: str) -> None:
    """What the PIA adds to the stream is what the attention added; 1e-3, the ridge being 1e-6 of the features."""
    model, batches = copy.deepcopy(llama), batches_of()
    block = model.model.layers[1]
    block.self_attn = MeanAttention(block.self_attn, prompt=6)
    sites = attention_sites(model)
    config = SkipConfig(pia_dim=32, placement=placement, pooling="prompt")
    supernet = Supernet(model, sites, config)
    moments = calibrate(supernet.model, sites[1:2], batches)
    write_closed_form(pia := supernet.pias(sites[1])["stream"], moments[sites[1].name], "stream", ridge=1e-6)
    seen: list[Tensor] = []
    handle = block.input_layernorm.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=batches[0]["input_ids"], use_cache=False)
        handle.remove()
        expected, _ = block.self_attn(seen[0])
        mask = (torch.arange(10) < 6).expand(24, -1)
        actual = pia(seen[0], PoolSession("prompt", mask))
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0.0)


def gradient_weights(model: Any, layer: Any, batch: dict[str, Tensor], kept: Tensor) -> Tensor:
    """‖∂L/∂(x + attention)‖ of the pooled tokens, mean 1, by a backward pass through the original model."""
    streams: list[Tensor] = []
    trainable = copy.deepcopy(model).requires_grad_(True)
    twin = trainable.get_submodule(next(name for name, module in model.named_modules() if module is layer))
    twin.post_attention_layernorm.register_forward_pre_hook(lambda module, args: streams.append(args[0]))
    loss = trainable(**batch, use_cache=False).loss
    norms = torch.autograd.grad(loss, streams)[0].norm(dim=-1)[kept]
    return norms / norms.mean()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", ["stream", "ffn"])
def test_moments_are_those_of_the_pooled_tokens_only(llama: Any, target: str, weighted: bool) -> None:
    """Answers and padding must not enter; recomputed from the recorded activations of the original model.

    With labels a token weighs as much as the loss depends on it; without, all weigh the same.
    """
    batch = batches_of(rows=3)[0]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, :2] = 0
    kept = batch["attention_mask"].bool() & (torch.arange(10) < 6)
    sites = attention_sites(llama)
    supernet = Supernet(llama, sites, SkipConfig(pia_dim=4, pooling="prompt"))
    unlabelled = {name: value for name, value in batch.items() if name != "labels"} | {"prompt_mask": kept}
    moments = calibrate(supernet.model, sites, [batch if weighted else unlabelled])[sites[2].name]
    layer, seen = llama.model.layers[2], {}
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda m, args, out: seen.update(x=args[0], x_hat=out)),
        layer.self_attn.register_forward_hook(lambda m, args, out: seen.update(attention=out[0])),
    ]
    with torch.no_grad():
        llama(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    for hook in hooks:
        hook.remove()
    weights = gradient_weights(llama, layer, batch, kept) if weighted else torch.ones(16)
    rms = lambda v: v / (v.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    y = seen["attention"] if target == "stream" else rms(seen["x"] + seen["attention"]) - rms(seen["x"])
    rows = []
    for row in range(3):
        own = seen["x_hat"][row][kept[row]]
        rows.append(torch.cat([own, own.mean(0).expand_as(own)], dim=-1))
    f, y, w = torch.cat(rows).double(), y[kept].double(), weights.double().unsqueeze(1)
    assert kept.sum() == 16
    assert moments.count == pytest.approx(16.0)
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)  # noqa: E731  float32 activations
    close(moments.ff, f.T @ (w * f))
    close(moments.fy[target], f.T @ (w * y))


@pytest.mark.parametrize("pooling", ["prompt", "prefix", "none"])
@pytest.mark.parametrize("placement", ["ffn", "residual", "parallel"])
def test_a_warm_start_is_nearer_to_the_model_than_deletion(llama: Any, placement: str, pooling: str) -> None:
    batches = batches_of()
    sites = attention_sites(llama)
    config = SkipConfig(pia_dim=32, placement=placement, pooling=pooling)
    supernet = Supernet(llama, sites, config)
    explained = supernet.warm_start(calibrate(supernet.model, sites, batches[:3]))
    assert all(0.0 < value <= 1.0 for value in explained.values())
    student = apply_skips(llama, config.model_copy(update={"skip": (1, 2)}))
    held_out = batches[3]
    with torch.no_grad():
        intact = llama(**held_out).logits[:, :6]
        deleted = student.eval()(**held_out).logits[:, :6]
        supernet.inherit(student)
        started = student(**held_out).logits[:, :6]
    error = [(logits - intact).pow(2).mean().item() for logits in (deleted, started)]
    assert error[1] < 0.95 * error[0]


def test_a_refit_is_least_squares_behind_the_sites_already_replaced(llama: Any) -> None:
    """Site 3, with 0 and 2 replaced before it: ridge regression in float64 on what such a student shows there.

    The rank is full, so that nothing but the regression is compared. The other sites' and, in the end, all PIAs stay.
    """
    sites, batches = attention_sites(llama), batches_of()
    config = SkipConfig(pia_dim=32, placement="residual", pooling="prompt")
    supernet = Supernet(llama, sites, config)
    calibration = [
        {"input_ids": batch["input_ids"], "prompt_mask": torch.ones_like(batch["input_ids"])} for batch in batches
    ]
    supernet.warm_start(calibrate(supernet.model, sites, calibration))
    before = {name: tensor.clone() for name, tensor in supernet.adapters().items()}
    with supernet.refitted(config.model_copy(update={"skip": (0, 2, 3)}), calibration):
        pia = copy.deepcopy(supernet.pias(sites[3])["stream"])
        first = copy.deepcopy(supernet.pias(sites[0])["stream"])
        student = apply_skips(llama, config.model_copy(update={"skip": (0, 2)})).eval()
        supernet.inherit(student)
    after = supernet.adapters()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(first.down.weight, supernet.pias(sites[0])["stream"].down.weight)  # nothing is before it
    seen: dict[str, list[Tensor]] = {"x": [], "y": []}
    layer = student.model.layers[3]
    layer.input_layernorm.register_forward_hook(lambda module, args, output: seen["x"].append(output))
    layer.self_attn.register_forward_hook(lambda module, args, output: seen["y"].append(output[0]))
    with torch.no_grad():
        for batch in calibration:
            student(**batch, use_cache=False)
        x, y = torch.cat(seen["x"]).double(), torch.cat(seen["y"]).double()
        actual = pia.double()(x, PoolSession("all")).flatten(0, 1).numpy()
    f, target = features(x).flatten(0, 1).numpy(), y.flatten(0, 1).numpy()
    centred = f - f.mean(0)
    strength = 1e-2 * (centred**2).mean() * len(f)
    padded = np.vstack([centred, np.sqrt(strength) * np.eye(f.shape[1])])
    weights = np.linalg.lstsq(padded, np.vstack([target - target.mean(0), np.zeros((f.shape[1], 32))]))[0]
    np.testing.assert_allclose(actual, centred @ weights + target.mean(0), atol=1e-4)
    assert not torch.equal(pia.down.weight.float(), supernet.pias(sites[3])["stream"].down.weight)


def test_a_vision_tower_warm_starts_over_all_its_tokens(llava: Any, image_prompt: dict[str, Tensor]) -> None:
    sites = [site for site in attention_sites(llava) if site.tower == "vision"][:2]
    supernet = Supernet(llava, sites, SkipConfig(pia_dim=4, pooling="prompt"))
    moments = calibrate(supernet.model, sites, [image_prompt])
    assert all(moments[site.name].count == pytest.approx(2 * 17) for site in sites)


class Split:
    """As many rows as asked for, in batches."""

    def __init__(self, rows: dict[str, Tensor]) -> None:
        self.rows = rows

    def subset(self, n: int) -> Split:
        return Split({name: value[:n] for name, value in self.rows.items()})

    def batches(self, size: int, generator: torch.Generator | None = None) -> Any:
        count = len(self.rows["labels"])
        yield from ({n: v[i : i + size] for n, v in self.rows.items()} for i in range(0, count, size))

    def __len__(self) -> int:
        return len(self.rows["labels"])


@pytest.mark.parametrize(("steps", "refit"), [(0, 24), (0, 0), (80, 24)])
def test_only_students_of_an_untrained_supernet_are_refitted(llama: Any, steps: int, refit: int) -> None:
    """And the refitted ones are nearer to the intact model than those that took the joint start."""
    train, held_out = batches_of()[0], batches_of()[3]
    supernet = Supernet(llama, attention_sites(llama), SkipConfig(pia_dim=32, pooling="prompt"))
    supernet.warm_start(calibrate(supernet.model, supernet.sites, [train]))
    settings = SearchSettings(supernet={"training": {"steps": steps}, "refit": refit})
    splits, make = {"train": Split(train)}, lambda one: apply_skips(llama, one)
    bench: Any = SimpleNamespace(splits=splits, settings=settings, conditions=AS_IT_IS, student=make)
    config = supernet.config.model_copy(update={"skip": (0, 1, 2)})
    student, inherited = make_student(bench, supernet, config, FineTuneConfig(steps=0)), apply_skips(llama, config)
    supernet.inherit(inherited)
    theirs, mine = (adapter_parameters(model) for model in (inherited, student))
    changed = {name.split(".")[2] for name in theirs if not torch.equal(theirs[name], mine[name])}
    if steps or not refit:
        assert not changed
        return
    assert changed == {"1", "2"}  # nothing is replaced in front of the first one, and the samples are the same
    with torch.no_grad():
        intact, refitted, joint = (m.eval()(**held_out).logits[:, :6] for m in (llama, student, inherited))
    assert (refitted - intact).pow(2).mean() < (joint - intact).pow(2).mean()
