"""METER and its relative BridgeTower: sites of two streams that look at each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from meter_tiny import PATCHES, batch, randomly, tiny_config, tiny_meter
from torch import Tensor, nn

from eas_search.architectures import attention_sites, refused_sites
from eas_search.exceptions import UnsupportedModelError
from eas_search.merging import merge, verify_merge
from eas_search.models.meter import MeterConfig, MeterForImageAndTextRetrieval, gate_names
from eas_search.parts import AdaptedAttention
from eas_search.proof import prove_deletion
from eas_search.redundancy import Supernet, redundancy_scores
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips
from eas_search.warm_start import calibrate

SKIP = {"pia_dim": 4, "placement": "residual", "pooling": "all"}


@pytest.fixture(scope="module")
def meter() -> Any:
    """Two co-attention layers per stream: eight fusion sites. Shared by all tests: nobody may change it."""
    return tiny_meter(num_hidden_layers=2)


@pytest.fixture(scope="module")
def bridge_tower() -> Any:
    from transformers import BridgeTowerConfig, BridgeTowerModel

    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    text = {**sizes, "num_hidden_layers": 3, "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 40}
    vision = {"hidden_size": 64, "num_hidden_layers": 3, "patch_size": 8, "image_size": 32}
    config = BridgeTowerConfig(**sizes, num_hidden_layers=2, text_config=text, vision_config=vision)
    return randomly(BridgeTowerModel(config))


def bridge_batch() -> dict[str, Tensor]:
    return {**batch(), "pixel_mask": torch.ones(2, 32, 32, dtype=torch.long)}


def test_every_attention_is_a_site(meter: Any) -> None:
    sites = attention_sites(meter)
    assert [site.tower for site in sites] == ["text"] * 2 + ["vision"] * 2 + ["fusion"] * 8
    assert not refused_sites(meter)
    fusion = attention_sites(meter, ["fusion"])
    assert {(site.kind, site.placements, site.causal) for site in fusion} == {
        ("self", ("residual",), False),
        ("cross", ("residual",), False),
    }
    assert sorted(site.name for site in fusion) == sorted(gate_names(meter))


def test_every_attention_can_be_deleted(meter: Any) -> None:
    assert prove_deletion(meter, attention_sites(meter), batch()) == {}


def test_bridge_tower(bridge_tower: Any, randomise: Callable[..., nn.Module]) -> None:
    """Its flags say that its text layers are causal, its text encoder is run from outside: neither is in the way."""
    sites = attention_sites(bridge_tower)
    assert [(site.tower, site.causal) for site in sites] == [("text", False)] * 3 + [("fusion", False)] * 8
    assert prove_deletion(bridge_tower, sites, bridge_batch()) == {}
    student = randomise(apply_skips(bridge_tower, SkipConfig(skip=tuple(range(11)), **SKIP)))
    assert "StandIn" in repr(student)
    assert padding_changes(student, bridge_batch()) == (0.0, 0.0)
    verify_merge(student, merge(student), bridge_batch())


def padding_changes(student: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, float]:
    """Largest change of either row's pooled output when other words stand where there is padding."""
    changed = {**inputs, "input_ids": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 1 + 40)}
    with torch.no_grad():
        outputs = [getattr(student, "meter", student)(**kind).pooler_output for kind in (inputs, changed)]
    first, second = (outputs[0] - outputs[1]).abs().amax(dim=-1).tolist()
    return round(first, 6), round(second, 6)


@pytest.mark.parametrize("router", ["static", "routed"])
@pytest.mark.parametrize("words", [7, PATCHES])
def test_no_padding_enters_any_mean(meter: Any, randomise: Callable[..., nn.Module], router: str, words: int) -> None:
    """Also where a text is as long as an image, so that the shape of a mask does not tell whose it is."""
    names = gate_names(meter)
    for skip in (names, names[::2], names[1::2]):
        student = randomise(apply_skips(meter, SkipConfig(skip=tuple(skip), router=router, adapter_dim=4, **SKIP)))
        assert padding_changes(student, batch(words)) == (0.0, 0.0)


def test_all_tokens_of_an_image_enter_the_mean(meter: Any, randomise: Callable[..., nn.Module]) -> None:
    """A text's padding hides nothing of an image of as many tokens."""
    image_self, text_cross = gate_names(meter)[4], gate_names(meter)[2]
    student = randomise(apply_skips(meter, SkipConfig(skip=(image_self, text_cross), **SKIP)))
    seen: dict[str, Tensor] = {}
    for name in (image_self, text_cross):
        stand_in = student.get_submodule(name)

        def keep(module: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            x = kwargs.get("encoder_hidden_states", args[0] if args else kwargs.get("hidden_states"))
            pia = module.pia_stream
            own = args[0] if args else kwargs["hidden_states"]
            z = 0.5 * (pia.down(own) + (pia.pool(x)).mean(dim=1, keepdim=True))
            expected = nn.functional.linear(z, *pia.static_up())
            seen[name] = (output[0] - expected).abs().max()

        stand_in.register_forward_hook(keep, with_kwargs=True)
    student(**batch(PATCHES))
    assert all(difference < 1e-5 for difference in seen.values())
    assert len(seen) == 2


@pytest.mark.parametrize("router", ["static", "routed"])
def test_merged_equals_the_student(meter: Any, randomise: Callable[..., nn.Module], router: str) -> None:
    skip = tuple(gate_names(meter)[::3])
    student = randomise(apply_skips(meter, SkipConfig(skip=skip, router=router, adapter_dim=4, **SKIP)))
    kept = [name for name in gate_names(meter) if name not in skip]
    assert all(isinstance(student.get_submodule(name), AdaptedAttention) for name in kept)
    verify_merge(student, merge(student), batch())


def test_adapters_can_be_confined_to_the_fusion_layers(meter: Any) -> None:
    student = apply_skips(meter, SkipConfig(skip=(), adapter_dim=4, adapter_towers=("fusion",), pooling="all"))
    adapted = [name for name, part in student.named_modules() if isinstance(part, AdaptedAttention)]
    assert sorted(adapted) == sorted(gate_names(meter))


def test_a_closed_form_start_does_not_see_padding(meter: Any) -> None:
    supernet = Supernet(meter, attention_sites(meter, ["fusion"]), SkipConfig(**SKIP))
    short = batch()
    long = {
        **short,
        "input_ids": torch.cat([short["input_ids"], torch.full((2, 3), 33)], dim=1),
        "attention_mask": torch.cat([short["attention_mask"], torch.zeros(2, 3, dtype=torch.long)], dim=1),
    }
    moments = [calibrate(supernet.model, supernet.sites, [inputs]) for inputs in (short, long)]
    tokens = {"text": 12.0, "image": 2.0 * PATCHES}  # of 14 words two are padding
    for site in supernet.sites:
        if site.kind == "self":
            first, second = (each[site.name] for each in moments)
            assert first.count == second.count == tokens["text" if "text_layers" in site.name else "image"]
            torch.testing.assert_close(first.f, second.f, atol=1e-4, rtol=0.0)
    explained = supernet.warm_start(moments[0])
    assert all(0 < share <= 1 for share in explained.values())
    assert len(explained) == 8


def test_the_bandit_scores_the_fusion_sites(meter: Any) -> None:
    batches = [{**batch(), "labels": torch.tensor([1, 4])}]
    scores = redundancy_scores(meter, batches, "bandit", attention_sites(meter, ["fusion"]))
    assert sorted(scores) == sorted(gate_names(meter))
    assert len(set(scores.values())) > 1


def test_losses_of_the_classifier(meter: Any) -> None:
    with torch.no_grad():
        output = meter(**batch(), labels=torch.tensor([1, 4]))
        soft = torch.tensor([[0.0, 1.0, 0.3, 0.0, 0.0], [0.0, 0.0, 0.0, 0.6, 1.0]])
        p = output.logits.sigmoid()
        expected = -(soft * p.log() + (1 - soft) * (1 - p).log()).sum(dim=1).mean()  # summed over the answers
        torch.testing.assert_close(meter(**batch(), labels=soft).loss, expected)
        chosen = output.logits.softmax(-1)[[0, 1], [1, 4]]
        torch.testing.assert_close(output.loss, -chosen.log().mean())


def test_retrieval_ranks_the_candidates_of_a_group() -> None:
    model = tiny_meter(kind=MeterForImageAndTextRetrieval, num_hidden_layers=1)
    with torch.no_grad():
        output = model(**batch(), labels=torch.tensor([1]))  # one group of two pairs, the second fits
    scores = [math.exp(value) for value in output.logits.flatten().tolist()]
    assert output.loss.item() == pytest.approx(-math.log(scores[1] / sum(scores)), abs=1e-5)
    assert output.match_logits.shape == (2, 2)
    assert prove_deletion(model, attention_sites(model), batch()) == {}


def test_each_image_of_a_pair_is_read_with_the_same_text(randomise: Callable[..., nn.Module]) -> None:
    model = tiny_meter(num_hidden_layers=1, num_images=2)
    inputs = batch(images=2)
    with torch.no_grad():
        pooled = model.meter(**inputs).pooler_output
        model.meter.token_type_embeddings.weight[2] = model.meter.token_type_embeddings.weight[1]
        same = {**inputs, "pixel_values": inputs["pixel_values"][:, :1].repeat(1, 2, 1, 1, 1)}
        first, second = model.meter(**same).pooler_output.chunk(2, dim=-1)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, pooled.chunk(2, dim=-1)[0])
    student = randomise(apply_skips(model, SkipConfig(skip=tuple(gate_names(model)), **SKIP)))
    assert padding_changes(student, inputs) == (0.0, 0.0)
    with pytest.raises(ValueError, match="pixel_values has 1 images per text, expected num_images = 2"):
        model(**batch())


def test_gradient_checkpointing_changes_no_gradient(meter: Any, randomise: Callable[..., nn.Module]) -> None:
    gradients, calls = [], [0, 0]
    for checkpointing in (False, True):
        student: Any = randomise(apply_skips(meter, SkipConfig(skip=tuple(gate_names(meter)[::2]), **SKIP))).train()
        for part in student.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        if checkpointing:
            name = "activation_checkpointing_enable"  # its name from transformers 5.23 on
            enable = getattr(student, name, None) or student.gradient_checkpointing_enable
            enable({"use_reentrant": False})

        def count(*_: Any, run: int = int(checkpointing)) -> None:
            calls[run] += 1

        student.get_submodule(gate_names(meter)[0]).register_forward_hook(count)
        student(**batch(), labels=torch.tensor([1, 4])).loss.backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert calls == [1, 2]  # once more for the backward pass
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_auto_classes_know_meter(meter: Any, tmp_path: Path, same_model: Callable[..., None]) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    meter.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MeterConfig)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    same_model(loaded, meter, **batch())


def test_an_export_answers_like_the_student(meter: Any, randomise: Callable[..., nn.Module], tmp_path: Path) -> None:
    from eas_search.export import load_pretrained, save_pretrained

    config = SkipConfig(skip=tuple(gate_names(meter)[1::3]), adapter_dim=4, **SKIP)
    student = randomise(apply_skips(meter, config))
    save_pretrained(merge(student), tmp_path / "export")
    loaded = load_pretrained(tmp_path / "export")
    verify_merge(student, loaded, batch())


def test_what_a_configuration_refuses() -> None:
    with pytest.raises(ValueError, match="skipped_cross_reads is 'both', expected 'attention_input' or 'layer_input'"):
        tiny_config(skipped_cross_reads="both")


def test_the_published_sizes() -> None:
    """METER-CLIP16-RoBERTa: its two encoders (CLIP without its last layer) and 12 co-attention layers."""
    with torch.device("meta"):
        from eas_search.models.meter import MeterForClassification

        model = MeterForClassification(MeterConfig(num_labels=3129))
    assert len(attention_sites(model)) == 12 + 11 + 24
    layer = sum(parameter.numel() for parameter in model.meter.cross_modal_text_layers[0].parameters())
    assert layer == 2 * 4 * (768**2 + 768) + (768 * 3072 + 3072) + (3072 * 768 + 768) + 3 * 2 * 768


def test_placement_ffn_is_refused(meter: Any) -> None:
    config = SkipConfig(**{**SKIP, "skip": (gate_names(meter)[0],), "placement": "ffn"})
    with pytest.raises(
        UnsupportedModelError, match=r"placement 'ffn' at meter.cross_modal_text_layers.0.attention.self"
    ):
        apply_skips(meter, config)
