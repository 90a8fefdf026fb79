"""`eas-search sites`: structure, cost and proof of a model's attentions without its weights."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eas_search import cli, run, twin_proof
from eas_search.architectures import attention_sites
from eas_search.costs import block_flops, site_cost, visible_pairs
from eas_search.exceptions import UnsupportedModelError
from eas_search.models.loading import empty_model
from eas_search.models.twin import tiny_twin
from eas_search.models.twin_inputs import twin_inputs
from eas_search.site_survey import survey
from eas_search.sites_table import print_survey, spans

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def config_of(name: str, **changes: object) -> Any:
    config = getattr(transformers, f"{name}Config")(**changes)
    causal = hasattr(transformers, f"{name.removesuffix('Text')}ForCausalLM") and name != "Bert"
    config.architectures = [f"{name.removesuffix('Text')}ForCausalLM" if causal else f"{name}Model"]
    return config


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return getattr(transformers, config.architectures[0])._from_config(config)


def llava_7b() -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=transformers.LlamaConfig(vocab_size=32064, max_position_embeddings=4096),
        image_token_id=32000,
        image_seq_length=576,
        architectures=["LlavaForConditionalGeneration"],
    )


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that types `eas-search sites …` into a terminal of 80 columns: (exit code, output, error)."""

    def typed(*words: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["eas-search", "sites", *map(str, words)])
        monkeypatch.setattr(run.console, "width", 80)
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code, *capsys.readouterr())

    return typed


def folder_of(config: Any, place: Path) -> Path:
    config.save_pretrained(place)
    assert [path.name for path in place.iterdir()] == ["config.json"]
    return place


def test_costs_of_a_llama_block_by_hand(llama: nn.Module) -> None:
    """Width 32, 4 heads of 8, 2 of keys and values, FFN 48, 10 tokens, of which each sees itself and those before."""
    site = attention_sites(llama)[0]
    cost = site_cost(llama, site)
    assert (cost.heads.heads, cost.heads.kv_heads, cost.heads.key_width) == (4, 2, 8)
    assert cost.parameters == 32 * 32 + 2 * 32 * 16 + 32 * 32 == 3072
    assert cost.flops(10) == 2 * 3072 * 10 + 55 * 4 * 2 * (8 + 8) == 61440 + 7040
    assert block_flops(llama, site.block, 10) == 61440 + 2 * 3 * 32 * 48 * 10
    entry = survey(llama, context=10).sites[0]
    assert entry.share == pytest.approx(68480 / (68480 + 92160))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {"num_key_value_heads": 2, "intermediate_size": 48}),
        ("GPT2", {}),
        ("Bert", {"intermediate_size": 48}),
        ("GPTNeoX", {"intermediate_size": 48}),
        ("Falcon", {"multi_query": True}),
        ("Phi3", {"intermediate_size": 48, "pad_token_id": 0, "num_key_value_heads": 2}),
        ("Qwen3", {"intermediate_size": 48, "head_dim": 16, "num_key_value_heads": 1}),
        (
            "DeepseekV3",
            {
                "intermediate_size": 48,
                "first_k_dense_replace": 2,
                "q_lora_rank": 24,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 12,
                "num_key_value_heads": 4,
            },
        ),
    ],
)
def test_costs_equal_what_torch_counts(name: str, changes: dict[str, Any]) -> None:
    """Torch counts the scores of all pairs, also of those that a mask hides."""
    config = config_of(name, **{**TINY, **changes})
    model = getattr(transformers, config.architectures[0])._from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(12).view(2, 6))
    for site in attention_sites(model):
        cost = site_cost(model, site)
        counts = counter.get_flop_counts()
        found = {key.partition(".")[2]: sum(value.values()) for key, value in counts.items()}
        scores = cost.heads.score_flops(6 * 6)
        writer = found[f"{site.block}.{site.pattern.writer}"] if site.pattern.writer else 0
        assert 2 * (cost.flops_per_token * 6 + scores) == found[site.name] + writer
        assert 2 * (block_flops(model, site.block, 6) + scores) == found[site.block]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_visible_pairs_are_those_of_the_mask(causal: bool, window: int | None) -> None:
    query, key = torch.arange(9).view(-1, 1), torch.arange(9).view(1, -1)
    seen = torch.ones(9, 9, dtype=torch.bool)
    if causal:
        seen = (key <= query) & (key > query - (window or 9))
    assert visible_pairs(9, causal, window) == int(seen.sum())


def test_experts_count_as_often_as_a_token_uses_them() -> None:
    config = config_of("Mixtral", **TINY, intermediate_size=48, num_key_value_heads=4, num_local_experts=8)
    model = on_meta(config)  # two of eight experts per token
    site = attention_sites(model)[0]
    experts, router, attention = 2 * 3 * 32 * 48, 8 * 32, 4 * 32 * 32
    assert block_flops(model, site.block, 5) == 2 * 5 * (experts + router + attention)


def test_a_7b_model_is_surveyed_from_its_configuration_alone(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder_of(llava_7b(), tmp_path / "llava")
    assert {p.device.type for p in empty_model(str(place)).parameters()} == {"meta"}
    read: list[str] = []
    monkeypatch.setattr("safetensors.safe_open", lambda *a, **k: read.append("safetensors"))
    monkeypatch.setattr(torch, "load", lambda *a, **k: read.append("torch"))
    code, out, err = call("--model", place)
    assert (code, err, read) == (0, "", [])
    assert out.startswith("56 attention sites of LlavaForConditionalGeneration")
    rows = [line for line in out.splitlines() if line.startswith(("0–31 ", "32–55 "))]
    assert rows[0].split()[-8:] == ["text", "llama", "pre", "32×128", "67.1M", "35", "%", "all"]
    assert rows[1].split()[-8:] == ["vision", "clip", "pre", "16×64", "4.2M", "43", "%", "all"]
    assert len(rows) == 2
    assert max(map(len, out.splitlines())) <= 80
    assert "56 attentions can be skipped, 56 of them can be merged" in out
    assert "proved on a tiny twin with random weights." in out


def test_all_gives_every_site_its_row_and_json_every_figure(call: Any, tmp_path: Path) -> None:
    place = folder_of(llava_7b(), tmp_path / "llava")
    code, out, _ = call(
        "--model", place, "--all", "--towers", "vision", "--context", 577, "--json", tmp_path / "s.json"
    )
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if "clip pre" in line] == [str(i) for i in range(32, 56)]
    assert max(map(len, out.splitlines()[:-1])) <= 80
    kept = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    first = kept["sites"][0]
    assert (first["index"], first["heads"], first["kv_heads"], first["head_width"]) == (32, 16, 16, 64)
    assert first["parameters"] == 4 * (1024 * 1024 + 1024)
    scores, weights = 4 * 577 * 577 * 1024, 2 * 577 * 1024 * 1024
    assert first["block_flops_share"] == pytest.approx((4 * weights + scores) / (12 * weights + scores))
    assert call("--towers", "sight")[0] == 2
    assert call("--model", place, "--json", tmp_path / "no" / "s.json")[0] == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model_type": "foo", "architectures": ["FooForCausalLM"]}, "model type `foo`"),
        (
            {"model_type": "foo", "architectures": ["Foo"], "auto_map": {"AutoConfig": "configuration_foo.FooConfig"}},
            "--trust-remote-code",
        ),
        (
            {"model_type": "resnet", "architectures": ["ResNetForImageClassification"]},
            "no attention that can be skipped",
        ),
        ({"model_type": "llama", "architectures": ["Nothing"]}, "'Nothing'"),
        ({"model_type": "falcon_h1", "architectures": ["FalconH1ForCausalLM"]}, "recurrent mixer"),
    ],
)
def test_a_model_without_sites_is_one_line(call: Any, tmp_path: Path, content: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    code, out, err = call("--model", tmp_path)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert words in err


def test_t5_names_the_attentions_that_others_need(call: Any, tmp_path: Path) -> None:
    config = transformers.T5Config(architectures=["T5ForConditionalGeneration"])
    code, out, _ = call("--model", folder_of(config, tmp_path / "t5"))
    flat = " ".join(out.split())
    assert code == 0
    assert "no site: encoder.block.0.layer.0.SelfAttention, decoder.block.0.layer.0.SelfAttention" in flat
    assert "position_bias" in flat
    assert "text cross" in flat
    assert "attentions can be skipped, 0 of them can be merged" in flat


def test_a_block_that_is_only_half_understood_says_why(call: Any, tmp_path: Path) -> None:
    code, out, _ = call("--model", folder_of(config_of("Bert"), tmp_path / "bert"))
    assert code == 0
    assert "bert post 12×64 2.36M 45 % residual [1]" in " ".join(out.split())
    assert "[1] only its attention is declared" in out


def test_a_hybrid_has_sites_where_its_attentions_are() -> None:
    found = survey(on_meta(config_of("Jamba", num_hidden_layers=16, use_mamba_kernels=False)))
    assert [entry.site.name for entry in found.sites] == ["model.layers.4.self_attn", "model.layers.12.self_attn"]
    assert not any(entry.refused or entry.unproved for entry in found.sites)


def test_the_twin_corrects_what_names_suggest() -> None:
    """Granite's blocks are named like Llama's and scale their residuals."""
    empty = on_meta(config_of("Granite", residual_multiplier=0.22, num_hidden_layers=3))
    assert {site.whole for site in attention_sites(empty)} == {True}
    for entry in survey(empty).sites:
        assert not entry.site.whole
        assert "plain residuals" in str(entry.site.merge_refusal)


class Peeking(transformers.LlamaForCausalLM):
    """A Llama whose logits also depend on a weight of the second attention."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        result = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        result.logits = result.logits + self.model.layers[1].self_attn.q_proj.weight.sum()
        return result


def test_an_attention_that_the_twin_cannot_do_without_is_refused() -> None:
    config = config_of("Llama", **{**TINY, "num_hidden_layers": 4}, intermediate_size=48)
    with torch.device("meta"):
        empty = Peeking._from_config(config)
    found = survey(empty)
    assert [bool(entry.refused) for entry in found.sites] == [False, True, False, False]
    assert "without this attention the model fails" in found.sites[1].refused
    assert found.verdict.startswith("3 of 4 attentions can be skipped, 3 of them")
    page = io.StringIO()
    print_survey(Console(width=80, file=page), found)
    assert "none [1]" in page.getvalue()
    assert "[1] without this attention the model fails" in page.getvalue()


def test_without_a_twin_sites_are_only_declared(monkeypatch: pytest.MonkeyPatch, llama: nn.Module) -> None:
    def fails(twin: nn.Module) -> None:
        raise IndexError("no such\nsize")

    monkeypatch.setattr(twin_proof, "twin_inputs", fails)
    found = survey(llama)
    reason = "no tiny twin of it runs: IndexError: no such size"
    assert {entry.unproved for entry in found.sites} == {reason}
    assert found.verdict.endswith(f"not yet proved: proved when the weights are loaded ({reason}).")


def test_sites_that_the_twins_inputs_miss_are_not_called_proved(
    monkeypatch: pytest.MonkeyPatch, llava: nn.Module, tokens: Tensor
) -> None:
    monkeypatch.setattr(twin_proof, "twin_inputs", lambda twin: {"input_ids": tokens})  # no image
    found = survey(llava)
    assert [entry.site.tower for entry in found.sites if entry.unproved] == ["vision"] * 3
    assert "but 3 of them only declared, not yet proved" in found.verdict


def test_a_model_of_which_every_site_is_refused_is_an_error(monkeypatch: pytest.MonkeyPatch, llama: nn.Module) -> None:
    def refuse(twin: nn.Module, sites: Any, inputs: Any) -> dict[str, str]:
        return {site.name: "other parts must depend on it" for site in sites}

    monkeypatch.setattr(twin_proof, "prove_deletion", refuse)
    with pytest.raises(UnsupportedModelError, match="no attention of LlamaForCausalLM can be skipped"):
        survey(llama)


@pytest.mark.parametrize(
    ("name", "changes", "inputs"),
    [
        ("Llama", {}, {"input_ids", "attention_mask"}),
        ("Gemma3Text", {}, {"input_ids", "attention_mask"}),
        ("ViT", {}, {"pixel_values"}),
        ("Qwen3Moe", {"num_hidden_layers": 6}, {"input_ids", "attention_mask"}),
    ],
)
def test_a_twin_has_the_same_sites_and_is_tiny(name: str, changes: dict[str, Any], inputs: set[str]) -> None:
    empty = on_meta(config_of(name, **changes))
    twin = tiny_twin(empty)
    assert sum(p.numel() for p in twin.parameters()) < 4e6
    assert [site.name for site in attention_sites(twin)] == [site.name for site in attention_sites(empty)]
    assert set(twin_inputs(twin)) == inputs


def test_numbers_are_listed_shortly() -> None:
    assert spans([0, 1, 2, 3]) == "0–3"
    assert spans([6, 8, 10, 12]) == "6, 8 … 12"
    assert spans([1, 2, 3, 7]) == "1–3, 7"
    assert spans([4]) == "4"
