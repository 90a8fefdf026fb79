"""An export loads through the Auto classes once eas_search is imported, and `transformers` alone refuses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import eas_search as eas
from eas_search.exceptions import ConfigError, StorageError
from eas_search.export import write_manifest
from eas_search.export.files import describe, read_json, write_json

LOAD = """
import json, sys, torch
from safetensors.torch import load_file
model = {auto}.from_pretrained(sys.argv[1])
inputs = load_file(sys.argv[2])
with torch.no_grad():
    logits = model(**inputs, use_cache=False).logits
print(type(model).__name__, model.eas.merged, logits[inputs["attention_mask"].bool()].double().sum().item())
"""
ORDERS = {
    "eas_search first": "import eas_search\nfrom transformers import {auto}",
    "transformers first": "from transformers import {auto}\nimport eas_search",
    "transformers first, used later": "import transformers, eas_search\n{auto} = transformers.{auto}",
    "through a model of its own": "import eas_search\nfrom transformers import LlamaForCausalLM, {auto}",
    "by its own name": "import eas_search\nfrom transformers.models.auto.modeling_auto import {auto}",
}


@pytest.fixture
def export(llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], write: Callable[..., Any]) -> Path:
    folder, _ = write(student_of(llama, "pooled"), prompts)
    save_file(prompts, folder.parent / "prompts.safetensors")
    return folder


@pytest.mark.parametrize("order", ORDERS)
def test_either_import_order(
    export: Path, prompts: dict[str, Tensor], python: Callable[..., str], logits: Callable[..., Tensor], order: str
) -> None:
    code = (ORDERS[order] + LOAD).replace("{auto}", "AutoModelForCausalLM")
    name, merged, total = python(code, export, export.parent / "prompts.safetensors").split()
    assert (name, merged) == ("LlamaForCausalLM", "True")
    assert float(total) == pytest.approx(logits(eas.load_pretrained(export), prompts).double().sum().item(), abs=1e-3)


def test_the_demo_model_with_its_processor(
    demo: SimpleNamespace, student_of: Callable[..., Any], write: Callable[..., Any], python: Callable[..., str]
) -> None:
    folder, _ = write(student_of(demo.model, "pooled"), demo.prompts, processor=demo.processor)
    code = (
        "import sys, eas_search, transformers as t\n"
        "model = t.AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype='float32', device_map='cpu')\n"
        "processor = t.AutoProcessor.from_pretrained(sys.argv[1])\n"
        "print(type(model).__name__, type(processor).__name__)"
    )
    assert python(code, folder) == f"LlavaForConditionalGeneration {type(demo.processor).__name__}"


@pytest.mark.parametrize("loader", ["AutoModelForCausalLM", "AutoModel", "AutoConfig", "LlamaForCausalLM"])
def test_transformers_alone_refuses(export: Path, python: Callable[..., str], loader: str) -> None:
    """Whichever way it is tried: no weights that nobody trained."""
    code = (
        f"import sys\nfrom transformers import {loader}\n"
        f"try:\n    {loader}.from_pretrained(sys.argv[1])\n"
        "except (ValueError, OSError) as error:\n    print('refused:', str(error)[:300])\n"
        "assert 'eas_search' not in sys.modules"
    )
    said = python(code, export)
    assert "refused" in said
    assert "eas_student" in said or "model.safetensors" in said


def test_importing_the_package_imports_neither_torch_nor_transformers(python: Callable[..., str]) -> None:
    assert python("import sys, eas_search; print({'torch', 'transformers'} & set(sys.modules))") == "set()"


def test_transformers_is_imported_as_it_would_be_without_us(python: Callable[..., str]) -> None:
    code = (
        "import sys, importlib.util\nif len(sys.argv) > 1: import eas_search\n"
        "import transformers.models.auto.modeling_auto as m\n"
        "print(m.__spec__.name, type(m.__loader__).__name__, type(m.__spec__.loader).__name__, m.__file__)\n"
        "print([type(f).__name__ for f in sys.meta_path if 'eas' in type(f).__module__])"
    )
    assert python(code) == python(code, "with")


def test_a_module_that_is_only_looked_for_is_still_watched(python: Callable[..., str]) -> None:
    code = (
        "import eas_search, importlib.util\nimport transformers\n"
        "importlib.util.find_spec('transformers.models.auto.modeling_auto')\n"
        "from transformers import AutoModelForCausalLM as auto\n"
        "print([config.model_type for config in auto._model_mapping._extra_content])"
    )
    assert python(code) == "['eas_student']"


def test_another_head_is_refused(export: Path) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    for auto in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(ConfigError, match=rf"is a LlamaForCausalLM, which {auto.__name__} does not load"):
            auto.from_pretrained(export)


def test_options_are_followed_or_refused(export: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(export, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(export, dtype="auto", device_map={"": "cpu"}).dtype == torch.float32
    eager = AutoModelForCausalLM.from_pretrained(export, attn_implementation="eager")
    assert eager.model.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"quantization_config = .* cannot be followed"):
        AutoModelForCausalLM.from_pretrained(export, quantization_config={"load_in_4bit": True})
    with pytest.raises(ConfigError, match=r"device_map = .* cannot be followed"):
        AutoModelForCausalLM.from_pretrained(export, device_map={"model": 0, "lm_head": 1})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_precision_is_that_of_the_base_model(
    build_llama: Callable[..., Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    """Nothing is skipped, so at a long prompt every bit is that of the base model as `transformers` loads it."""
    from transformers import AutoModelForCausalLM

    base = build_llama(max_position_embeddings=1024)
    base.save_pretrained(tmp_path / "base")
    eas.save_pretrained(eas.merge(eas.apply_skips(base, eas.SkipConfig(skip=()))), tmp_path / "export")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=dtype)
    tables = dict(expected.named_buffers())
    assert any(name.endswith("inv_freq") and table.dtype == torch.float32 for name, table in tables.items())
    for name, table in found.named_buffers():
        assert table.dtype == tables[name].dtype
        assert torch.equal(table, tables[name])
    ids = torch.randint(3, 60, (1, 600), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)
    assert torch.equal(eas.load_pretrained(tmp_path / "export", dtype=dtype)(ids).logits, found(ids).logits)


@pytest.mark.parametrize("name", ["pooled", "parallel"])
def test_only_what_is_saved_is_cast(
    llama: Any, student_of: Callable[..., Any], prompts: dict[str, Tensor], write: Callable[..., Any], name: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder, _ = write(student_of(llama, name), prompts)
    expected: Any = eas.load_pretrained(folder)
    for parameter in expected.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    found = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(found(**prompts).logits, expected(**prompts).logits)


def test_what_a_class_keeps_in_float32_is_kept(tmp_path: Path) -> None:
    """T5 keeps its `wo` in float32 when loaded in float16; so do the export of such a model and a cast export."""
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8,
                                   decoder_start_token_id=0)  # fmt: skip
    full = transformers.T5ForConditionalGeneration(config).eval()
    full.save_pretrained(tmp_path / "base")
    half = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float16).eval()
    kept = {name for name, parameter in half.named_parameters() if parameter.dtype == torch.float32}
    assert len(kept) == 4
    for base, dtype in ((half, None), (full, torch.float16)):
        student = eas.merge(eas.apply_skips(base, eas.SkipConfig(skip=(1,), pia_dim=0)))
        folder = eas.save_pretrained(student, tmp_path / "export")
        found = eas.load_pretrained(folder, dtype=dtype)
        assert {name for name, parameter in found.named_parameters() if parameter.dtype == torch.float32} == kept
        for name, parameter in found.named_parameters():
            assert torch.equal(parameter, dict(student.named_parameters())[name].to(parameter.dtype))


@pytest.mark.parametrize("dtype", ["int8", torch.int64])
def test_a_precision_that_is_none_is_refused(export: Path, dtype: Any) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(ConfigError, match=r"dtype = .* cannot be followed"):
        AutoModelForCausalLM.from_pretrained(export, dtype=dtype)


def test_an_export_names_the_precision_of_most_of_its_weights(build_llama: Callable[..., Any]) -> None:
    """The first weight of a model may be one that was kept in float32."""
    model = build_llama().half()
    model.model.embed_tokens.float()
    student = eas.apply_skips(model, eas.SkipConfig(skip=(1,), pia_dim=2))
    assert describe(student, "student")["dtype"] == "float16"


def test_an_export_of_the_former_layout_says_what_to_do(export: Path) -> None:
    content = read_json(export, "eas_config.json")
    write_json(export / "eas_config.json", {**content, "format": 1})
    for load in (eas.load_pretrained, eas.verify):
        with pytest.raises(StorageError, match=r"folder format 1; expected 3: export it again from its search"):
            load(export)
    write_json(export / "eas_config.json", {**content, "format": 4})
    with pytest.raises(StorageError, match="update eas_search"):
        eas.load_pretrained(export)


def test_the_configuration_names_no_path_of_this_machine(export: Path) -> None:
    config = (export / "config.json").read_text(encoding="utf-8")
    assert str(Path.home()) not in config
    assert "/tmp" not in config
    assert set(json.loads(config)) == {"model_type", "architectures", "base_config"}


def test_other_formats_are_not_taken_for_a_student(
    llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], write: Callable[..., Any]
) -> None:
    folder, _ = write(student_of(llama, "ffn"), prompts, "stock")
    with pytest.raises(StorageError, match="has format 'stock'; expected 'eas'"):
        eas.load_pretrained(folder)
    with pytest.raises(StorageError, match="has format 'stock'; expected 'adapter'"):
        eas.load_adapter(llama, folder)


@pytest.mark.parametrize(
    "base",
    [None, [], {}, {"model_type": "of-a-stranger"}, {"model_type": "llama", "hidden_size": "wide"}],
    ids=str,
)
def test_a_base_configuration_that_is_none_is_refused_in_one_line(export: Path, base: object) -> None:
    content = read_json(export, "config.json")
    write_json(export / "config.json", {**content, "base_config": base})
    write_manifest(export)
    with pytest.raises(StorageError, match=r"config\.json") as error:
        eas.load_pretrained(export)
    assert "\n" not in str(error.value)
