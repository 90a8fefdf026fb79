"""What other libraries make of an export: transformers and PEFT alone, onnxruntime, torch, and a reader of DeciLM."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import eas_search as eas
from eas_search.exceptions import ConfigError, StorageError, UnsupportedModelError
from eas_search.export.formats.torch_export import check_archive

WITHOUT_US = """
import sys, torch
from safetensors.torch import load_file, save_file
inputs = load_file(sys.argv[2])
{load}
with torch.no_grad():
    logits = model(**inputs, use_cache=False).logits
save_file({{"logits": logits[inputs["attention_mask"].bool()]}}, sys.argv[3])
assert "eas_search" not in sys.modules
"""


@pytest.fixture
def without_us(python: Callable[..., str], prompts: dict[str, Tensor], tmp_path: Path) -> Callable[..., Tensor]:
    """A function: logits of the model that Python code loads as `model`, in a process without eas_search."""

    def answer(load: str, folder: Path) -> Tensor:
        save_file(prompts, tmp_path / "prompts.safetensors")
        python(WITHOUT_US.format(load=load), folder, tmp_path / "prompts.safetensors", tmp_path / "logits.safetensors")
        return load_file(tmp_path / "logits.safetensors")["logits"]

    return answer


@pytest.mark.parametrize("name", ["ffn", "parallel", "paper"])
def test_stock_needs_only_transformers(  # noqa: RUF100
    llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], write: Callable[..., Any],
    without_us: Callable[..., Tensor], logits: Callable[..., Tensor], name: str,
) -> None:  # fmt: skip
    student = student_of(llama, name)
    folder, _ = write(student, prompts, "stock")
    found = without_us("from transformers import LlamaForCausalLM as M; model = M.from_pretrained(sys.argv[1])", folder)
    torch.testing.assert_close(found, logits(student, prompts), atol=1e-4, rtol=0)
    width = json.loads((folder / "config.json").read_text(encoding="utf-8"))["intermediate_size"]
    assert width == (48 + 4 if name == "parallel" else 48)


@pytest.mark.parametrize("cls", ["Qwen2", "Qwen3", "Phi3"])
def test_stock_of_other_classes(
    prompts: dict[str, Tensor], student_of: Callable[..., Any], write: Callable[..., Any], cls: str
) -> None:
    """None of these classes has biases in its FFN, so only plain deletion fits."""
    import transformers

    from eas_search.export import Verdict

    values = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
              "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{cls}Config")(**values)
    base = getattr(transformers, f"{cls}ForCausalLM")(config).eval()
    _, result = write(student_of(base, "deleted"), prompts, "stock")
    assert result.report.largest <= 1e-4
    verdict: Verdict = eas.plan_formats(student_of(base, "ffn"))["stock"]
    assert verdict.kind == "impossible"
    assert "biases" in verdict.reason


def test_a_fused_gate_and_a_wider_ffn_are_padded_in_both_halves(clip: Any, pixels: Tensor, write: Any,
                                                                student_of: Callable[..., Any]) -> None:  # fmt: skip
    """CLIP's plain FFN gets ± neurons: width 40 + 2 · 4 in every block of the tower."""
    folder, result = write(student_of(clip, "parallel"), {"pixel_values": pixels}, "stock")
    assert result.report.largest <= 1e-4
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["intermediate_size"] == 48


LORA_BASE = """
from transformers import LlamaForCausalLM
from peft import PeftModel
base = LlamaForCausalLM.from_pretrained(sys.argv[1] + "/../base")
for i in (0, 2):
    torch.nn.init.zeros_(base.model.layers[i].self_attn.o_proj.weight)
model = PeftModel.from_pretrained(base, sys.argv[1]).eval()
"""


def test_lora_on_the_plain_base_with_peft_alone(
    llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], write: Callable[..., Any],
    without_us: Callable[..., Tensor], logits: Callable[..., Tensor], tmp_path: Path,
) -> None:  # fmt: skip
    student = student_of(llama, "ffn")
    folder, _ = write(student, prompts, "lora", base=llama)
    llama.save_pretrained(tmp_path / "base")
    torch.testing.assert_close(without_us(LORA_BASE, folder), logits(student, prompts), atol=1e-4, rtol=0)


def test_lora_is_the_formula(
    llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], write: Callable[..., Any]
) -> None:
    """W (g2 ⊙ (u + Δ)) computed from the PIA and W + B A on g2 ⊙ u, at one layer and random u."""
    student = student_of(llama, "ffn", adapter_dim=0)
    folder, _ = write(student, prompts, "lora", base=llama)
    tensors = load_file(folder / "adapter_model.safetensors")
    block = student.model.layers[0]
    u = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    pia, gain1, gain2 = block.pia_ffn, block.input_layernorm.weight, block.post_attention_layernorm.weight
    with torch.no_grad():
        z = 0.5 * (gain1 * u @ pia.down.weight.T + pia.down.bias)
        w = torch.softmax(pia.router_bias / 10.0, dim=0)
        up = sum(w[k] * torch.block_diag(*pia.ups[k].weight.chunk(2)) for k in range(2))
        delta = z @ up.T + w[0] * pia.ups[0].bias + w[1] * pia.ups[1].bias
        for name in ("gate_proj", "up_proj"):
            prefix = f"base_model.model.model.layers.0.mlp.{name}"
            base = getattr(block.mlp, name).weight
            a, b = tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"]
            n = gain2 * u
            found = n @ base.T + n @ a.T @ b.T + tensors[f"{prefix}.lora_B.bias"]
            torch.testing.assert_close(found, (gain2 * (u + delta)) @ base.T, atol=1e-4, rtol=0)


def test_a_gain_of_zero_is_no_lora(build_llama: Callable[..., Any], student_of: Callable[..., Any]) -> None:
    base = build_llama()
    with torch.no_grad():
        base.model.layers[2].post_attention_layernorm.weight[7] = 0.0
    verdict = eas.plan_formats(student_of(base, "ffn"))["lora"]
    assert verdict.kind == "impossible"
    assert "layers.2.post_attention_layernorm has a gain of zero" in verdict.reason


def test_an_adapter_goes_onto_its_own_base_only(
    llama: Any, build_llama: Callable[..., Any], clip: Any, prompts: dict[str, Tensor], write: Callable[..., Any],
    student_of: Callable[..., Any], logits: Callable[..., Tensor],
) -> None:  # fmt: skip
    student = student_of(llama, "parallel")
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    folder, _ = write(student, prompts, "adapter", base=llama)
    loaded = eas.load_adapter(llama, folder)
    torch.testing.assert_close(logits(eas.merge(loaded), prompts), logits(student, prompts), atol=1e-4, rtol=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert size < 0.2 * sum(tensor.nbytes for tensor in before.values())
    for other in (build_llama(num_hidden_layers=2), build_llama(hidden_size=64), clip):
        with pytest.raises(ConfigError):
            eas.load_adapter(other, folder)
    with pytest.raises(ConfigError, match="names no base model"):
        eas.verify(folder)


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def decilm(folder: Path, ids: Tensor) -> Tensor:
    """Logits [n, V] of one row of tokens [n], from a folder alone: a reader of `block_configs` in plain torch."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    w = load_file(folder / "model.safetensors")
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert len(config["block_configs"]) == config["num_hidden_layers"]
    assert not config["block_configs"][0]["attention"]["no_op"]
    heads, eps, n = config["num_attention_heads"], config["rms_norm_eps"], len(ids)
    used: set[str] = set()

    def take(name: str) -> Tensor:
        used.add(name)
        return w[name]

    def linear(x: Tensor, name: str, biased: bool) -> Tensor:
        return F.linear(x, take(f"{name}.weight"), take(f"{name}.bias") if biased else None)

    x = take("model.embed_tokens.weight")[ids]
    for i, block in enumerate(config["block_configs"]):
        prefix = f"model.layers.{i}"
        if not block["attention"]["no_op"]:
            v = rms(x, eps) * take(f"{prefix}.input_layernorm.weight")
            q, k, u = (linear(v, f"{prefix}.self_attn.{p}_proj", config["attention_bias"]) for p in "qkv")
            group = block["attention"]["n_heads_in_group"]
            size = q.shape[1] // heads
            q = q.view(n, heads, size)
            k, u = (t.view(n, heads // group, size).repeat_interleave(group, dim=1) for t in (k, u))
            angle = torch.arange(n)[:, None] * config["rope_theta"] ** (-torch.arange(0, size, 2) / size)
            cos, sin = angle.cos().repeat(1, 2)[:, None], angle.sin().repeat(1, 2)[:, None]
            turn = lambda t: t * cos + torch.cat([-t[..., size // 2 :], t[..., : size // 2]], -1) * sin  # noqa: B023, E731
            scores = torch.einsum("nhd,mhd->hnm", turn(q), turn(k)) / math.sqrt(size)
            scores = scores + torch.full((n, n), float("-inf")).triu(1)
            mixed = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), u).reshape(n, -1)
            x = x + linear(mixed, f"{prefix}.self_attn.o_proj", config["attention_bias"])
        v = rms(x, eps) * take(f"{prefix}.post_attention_layernorm.weight")
        gate, up = (linear(v, f"{prefix}.mlp.{p}_proj", config["mlp_bias"]) for p in ("gate", "up"))
        assert gate.shape[1] == block["ffn"]["intermediate_size"]
        x = x + linear(F.silu(gate) * up, f"{prefix}.mlp.down_proj", config["mlp_bias"])
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    result = (rms(x, eps) * take("model.norm.weight")) @ take(head).T
    assert used == set(w)  # nothing in the file is left over
    return result


@pytest.mark.parametrize("skip", [(0, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("name", ["ffn", "parallel", "deleted"])
def test_a_reader_of_block_configs_gets_the_student(
    build_llama: Callable[..., Any], prompts: dict[str, Tensor], student_of: Callable[..., Any],
    write: Callable[..., Any], name: str, skip: tuple[int, ...],
) -> None:  # fmt: skip
    student = student_of(build_llama(tie_word_embeddings=name == "ffn"), name, skip=skip)
    folder, _ = write(student, prompts, "decilm")
    ids = prompts["input_ids"][1]
    with torch.no_grad():
        expected = student(ids[None, 1:], use_cache=False).logits[0]
    torch.testing.assert_close(decilm(folder, ids[1:]), expected, atol=1e-4, rtol=0)
    blocks = json.loads((folder / "config.json").read_text(encoding="utf-8"))["block_configs"]
    assert [block["attention"]["no_op"] for block in blocks] == [i in skip and i > 0 for i in range(4)]
    wide = 52 if name == "parallel" else 48
    assert [block["ffn"]["intermediate_size"] for block in blocks] == [wide if i in skip else 48 for i in range(4)]


def test_qwen2_has_the_same_layers(prompts: dict[str, Tensor], student_of: Callable[..., Any], write: Any) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=2)  # fmt: skip
    student = student_of(Qwen2ForCausalLM(config).eval(), "parallel", skip=(1,))
    folder, _ = write(student, prompts, "decilm")
    ids = prompts["input_ids"][1]
    with torch.no_grad():
        expected = student(ids[None], use_cache=False).logits[0]
    torch.testing.assert_close(decilm(folder, ids), expected, atol=1e-4, rtol=0)


def test_onnxruntime_reads_the_graph(
    llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], write: Callable[..., Any],
    logits: Callable[..., Tensor],
) -> None:  # fmt: skip
    onnxruntime = pytest.importorskip("onnxruntime")
    student = student_of(llama, "pooled")
    folder, result = write(student, prompts, "onnx")
    assert result.generated_equal is None
    assert set(result.left_out.values()) == {"prefill only: no KV cache"}
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    ids = torch.randint(
        3, 60, (3, 17), generator=torch.Generator().manual_seed(9)
    )  # other sizes than it was traced for
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (found,) = session.run(None, {name: np.asarray(tensor) for name, tensor in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(found).flatten(0, 1), logits(student, inputs), atol=1e-4, rtol=0)


def test_onnx_without_its_packages_is_impossible_in_one_line(
    llama: Any, student_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eas_search.export.formats.onnx.find_spec", lambda name: None)
    verdict = eas.plan_formats(student_of(llama, "ffn"))["onnx"]
    assert (verdict.kind, verdict.reason) == (
        "impossible", "needs onnx, onnxscript, onnxruntime: pip install 'eas-search[onnx]'",
    )  # fmt: skip


def test_torch_reads_its_archive_and_a_pickle_in_it_is_refused(
    llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], write: Callable[..., Any],
    logits: Callable[..., Tensor], tmp_path: Path,
) -> None:  # fmt: skip
    student = student_of(llama, "routed")
    folder, result = write(student, prompts, "torch-export")
    assert set(result.left_out.values()) == {"prefill only: no KV cache"}
    path = folder / "model.pt2"
    run: Any = torch.export.load(path).module()
    (found,) = run(prompts["input_ids"], prompts["attention_mask"])
    expected = logits(student, prompts)
    torch.testing.assert_close(found[prompts["attention_mask"].bool()], expected, atol=1e-4, rtol=0)
    for change in ("sample inputs", "weights"):
        forged = tmp_path / "forged.pt2"
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(forged, "w") as target:
            for entry in source.namelist():
                content = source.read(entry)
                if change == "sample inputs" and entry.endswith("sample_inputs/model.pt"):
                    content = b"cos\nsystem\n(S'true'\ntR."
                if change == "weights" and entry.endswith("weights_config.json"):
                    content = content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
                target.writestr(entry, content)
        with pytest.raises(StorageError, match="would unpickle"):
            check_archive(forged)
    (tmp_path / "none.pt2").write_text("no archive", encoding="utf-8")
    with pytest.raises(StorageError, match="no readable archive"):
        check_archive(tmp_path / "none.pt2")


def test_a_model_that_cannot_be_traced_is_refused_in_one_line(
    llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], write: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a branch\nthat depends on data")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(UnsupportedModelError, match=r"cannot be traced .* a branch that depends on data"):
        write(student_of(llama, "ffn"), prompts, "torch-export")
