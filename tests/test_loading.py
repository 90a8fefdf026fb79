"""Loading models from folders: heads, labels, precision, placement, and code that is not run unasked."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, LlamaForCausalLM, ViTConfig, ViTImageProcessor
from transformers import ViTModel as PlainViT

import eas_search as eas
from eas_search.exceptions import ConfigError, EasSearchError, UnsupportedModelError
from eas_search.models import placement
from eas_search.models.loading import load_model
from eas_search.models.options import Head, LoadOptions
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.skipping import adapter_parameters, apply_skips, load_adapters
from eas_search.supernet import Supernet
from eas_search.training import FineTuneConfig, fine_tune

CPU = LoadOptions(device="cpu")
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + i) for i in range(26))]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)})


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A masked language model: no pooler, no classifier."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertForMaskedLM(BertConfig(vocab_size=31, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, llama: Any, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    PlainViT(ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}), encoding="utf-8")


@pytest.mark.parametrize(
    ("folder", "head", "kind", "trained"),
    [
        ("bert", "sequence-classification", "BertForSequenceClassification", {"bert.pooler.dense", "classifier"}),
        ("bert", "multiple-choice", "BertForMultipleChoice", {"bert.pooler.dense", "classifier"}),
        ("llama_folder", "sequence-classification", "LlamaForSequenceClassification", {"score"}),
        ("llama_folder", "causal-lm", "LlamaForCausalLM", set()),
        ("llama_folder", "generation", "LlamaForCausalLM", set()),
        ("vit_folder", "image-classification", "ViTForImageClassification", {"classifier"}),
    ],
)
def test_a_head_that_the_checkpoint_lacks_is_new_reproducible_and_announced(
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    folder: str,
    head: Head,
    kind: str,
    trained: set[str],
) -> None:
    path = str(request.getfixturevalue(folder))
    labels = COLOURS if "classification" in head else None
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        model, _ = load_model(path, CPU, head, labels)
    assert torch.equal(torch.get_rng_state(), state), "loading used the caller's random state"
    assert type(model).__name__ == kind
    assert {name.rpartition(".")[0] for name in model.eas_trainable} == trained
    said = [record.getMessage() for record in caplog.records if record.name.startswith("eas_search")]
    assert len(said) == bool(trained)
    assert all(path in line and "is trained with the adapters" in line and "\n" not in line for line in said)
    if labels:
        assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}
        assert model.config.label2id["blue"] == 2
        assert model.num_labels == 3
    torch.manual_seed(2)
    again, _ = load_model(path, CPU, head, labels)
    theirs = again.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def test_a_head_made_for_these_labels_is_kept_and_one_for_others_is_trained(llama_folder: Path, tmp_path: Path) -> None:
    first, processor = load_model(str(llama_folder), CPU, "sequence-classification", COLOURS)
    with torch.no_grad():
        first.score.weight.fill_(0.25)
    first.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for labels in (COLOURS, None):
        same, _ = load_model(str(tmp_path), CPU, "sequence-classification", labels)
        assert same.eas_trainable == ()
        assert torch.equal(same.score.weight, torch.full((3, 32), 0.25))
        assert same.config.id2label[1] == "green"
    swapped, _ = load_model(str(tmp_path), CPU, "sequence-classification", ("green", "red", "blue"))
    assert swapped.eas_trainable == ("score.weight",)
    fewer, _ = load_model(str(tmp_path), CPU, "sequence-classification", ("yes", "no"))
    assert fewer.eas_trainable == ("score.weight",)
    assert fewer.score.weight.shape == (2, 32)
    assert fewer.score.weight.std() > 0, "a new head is drawn at random"


@pytest.mark.parametrize("head", ["generation", "causal-lm", "sequence-classification"])
@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_body_that_is_not_whole_is_refused(llama_folder: Path, tmp_path: Path, head: Head, lost: str) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=f"lacks 1 of the weights .* '{lost}'") as error:
        load_model(str(folder), CPU, head)
    assert "\n" not in str(error.value)


def test_a_language_head_is_never_made_up(llama_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="lm_head"):
        load_model(str(folder), CPU, "causal-lm")


def test_a_head_that_the_kind_of_model_cannot_have_is_refused(vit_folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"of type 'vit'.*no AutoModelForMultipleChoice"):
        load_model(str(vit_folder), CPU, "multiple-choice")


class Sentences:
    """Four sentences of two classes that only a trained head can tell apart."""

    def __init__(self) -> None:
        self.ids = torch.tensor([[2, 5, 6, 3], [2, 7, 8, 3], [2, 5, 9, 3], [2, 7, 10, 3]])
        self.labels = torch.tensor([0, 1, 0, 1])

    def __len__(self) -> int:
        return 4

    def batches(self, size: int, generator: object = None) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": self.ids, "labels": self.labels}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter_dim", [0, 4])
def test_a_new_head_is_trained_inherited_merged_and_saved(
    llama_folder: Path, tmp_path: Path, same_model: Callable[..., None], dtype: Any, adapter_dim: int
) -> None:
    model, _ = load_model(str(llama_folder), LoadOptions(device="cpu", dtype=dtype), "sequence-classification", COLOURS)
    model.requires_grad_(False)
    drawn, split = model.score.weight.clone(), Sentences()
    config = SkipConfig(adapter_dim=adapter_dim, pia_dim=4, pooling="none")
    training: Any = FineTuneConfig(steps=30, learning_rate=1e-2)

    baseline: Any = apply_skips(model, config)
    assert adapter_parameters(baseline)["score.weight"].dtype == torch.float32
    losses = fine_tune(baseline, split, training, seed=0)
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(baseline.score.weight, drawn)
    assert torch.equal(model.score.weight, drawn), "the original model was trained"

    supernet = Supernet(model, eas.attention_sites(model), config)
    supernet.take_light_adapters(baseline)
    assert torch.equal(supernet.model.score.weight, baseline.score.weight)
    assert "score.weight" in supernet.adapters()

    student: Any = apply_skips(model, config.model_copy(update={"skip": (1,)}))
    supernet.inherit(student)
    assert torch.equal(student.score.weight, baseline.score.weight)
    kept = {name: tensor.clone() for name, tensor in adapter_parameters(student).items()}
    student.score.weight.data.zero_()
    load_adapters(student, kept)
    assert torch.equal(student.score.weight, baseline.score.weight)

    merged: Any = eas.merge(student.eval())
    assert {parameter.dtype for parameter in merged.parameters()} == {getattr(torch, dtype)}
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    eas.verify_merge(student, merged, {"input_ids": split.ids})
    eas.save_pretrained(merged, tmp_path / "export")
    loaded = eas.load_pretrained(tmp_path / "export")
    same_model(loaded, merged, input_ids=split.ids)
    assert loaded.config.id2label[2] == "blue"


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({sentinel!r}).write_text("this code ran")

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(folder of a checkpoint that brings its own classes, file that appears when they are run)."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, ran = Path(shutil.copytree(llama_folder, tmp_path / "own")), tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(sentinel=str(ran)), encoding="utf-8")
    autos = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change(folder, architectures=["OwnModel"], model_type="own_llama", auto_map=autos)
    return folder, ran


@pytest.mark.parametrize("head", ["generation", "causal-lm"])
def test_code_of_a_checkpoint_runs_only_when_a_person_says_so(own_code: tuple[Path, Path], head: Head) -> None:
    folder, ran = own_code
    change(folder, trust_remote_code=True)  # a checkpoint cannot say it
    with pytest.raises(UnsupportedModelError, match="--trust-remote-code") as error:
        load_model(str(folder), CPU, head)
    assert "\n" not in str(error.value)
    assert not ran.exists()
    model, _ = load_model(str(folder), LoadOptions(device="cpu", trust_remote_code=True), head)
    assert ran.exists()
    assert type(model).__name__ == "OwnModel"
    assert isinstance(model, LlamaForCausalLM)


def test_code_of_a_known_kind_of_model_is_refused_too(own_code: tuple[Path, Path]) -> None:
    folder, ran = own_code
    change(folder, model_type="llama", auto_map={"AutoModelForCausalLM": "own.OwnModel"})
    with pytest.raises(UnsupportedModelError, match="--trust-remote-code"):
        load_model(str(folder), CPU)
    assert not ran.exists()


@pytest.mark.parametrize("key", ["trust_remote_code", "_trust_remote_code"])
def test_no_file_can_ask_for_it(tmp_path: Path, key: str) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(f"{key}: true\n", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        SearchSettings.from_file(study, {})
    assert "\n" not in str(error.value)
    if key == "trust_remote_code":
        assert "expected the flag --trust-remote-code" in str(error.value)
    with pytest.raises(ConfigError):
        SearchSettings(**{key: True})


def test_leave_to_run_code_reaches_workers_but_no_file() -> None:
    settings = SearchSettings(dtype="bfloat16", gradient_checkpointing=True)
    assert not settings.loading.trust_remote_code
    trusting = settings.trusting_remote_code()
    assert not settings.loading.trust_remote_code
    assert pickle.loads(pickle.dumps(trusting)).loading == LoadOptions(
        dtype="bfloat16", gradient_checkpointing=True, trust_remote_code=True
    )
    assert "trust" not in trusting.model_dump_json()
    assert trusting.fingerprint() == settings.fingerprint()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_precision_that_was_asked_for(llama_folder: Path, dtype: Any) -> None:
    model, _ = load_model(str(llama_folder), LoadOptions(device="cpu", dtype=dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training


def test_a_device_map_places_modules(
    llama_folder: Path, llama: Any, tokens: torch.Tensor, same_model: Callable[..., None]
) -> None:
    model, _ = load_model(str(llama_folder), LoadOptions(device_map='{"": "cpu"}'))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    same_model(model, llama, input_ids=tokens % 31)


@pytest.mark.parametrize("text", ["everywhere", "{", "[1]", '{"": null}', '{"": [0]}', '{"": true}', ""])
def test_a_device_map_that_is_none_is_refused(llama_folder: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="expected one of auto") as error:
        load_model(str(llama_folder), LoadOptions(device_map=text))
    assert "\n" not in str(error.value)


def test_weights_that_fit_no_device_are_refused(llama_folder: Path) -> None:
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": "disk" if i == 3 else "cpu" for i in range(4)}
    with pytest.raises(ConfigError, match=r"9 weights would stay outside.*layers\.3") as error:
        load_model(str(llama_folder), LoadOptions(device_map=json.dumps(places)))
    assert "\n" not in str(error.value)


def test_device_and_device_map_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        SearchSettings(device="cpu", device_map="auto")


def test_gradient_checkpointing_is_on_where_asked_for(llama_folder: Path, tokens: torch.Tensor) -> None:
    calls: list[int] = []
    for on in (False, True):
        model: Any
        model, _ = load_model(str(llama_folder), LoadOptions(device="cpu", gradient_checkpointing=on))
        student: Any = apply_skips(model.requires_grad_(False), SkipConfig(skip=(1,), pia_dim=4, adapter_dim=4))
        student.model.layers[2].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        student.train()
        student(tokens % 31, labels=tokens % 31, use_cache=False).loss.backward()
        calls.append(0)
    assert calls == [1, 0, 1, 1, 0]


def test_a_model_that_cannot_recompute_says_so() -> None:
    class Rigid(nn.Linear):
        def activation_checkpointing_enable(self, _: object) -> None:
            raise ValueError("Rigid does not support activation checkpointing.")

    with pytest.raises(UnsupportedModelError, match="Rigid cannot recompute"):
        placement.settle(Rigid(2, 2), "rigid", LoadOptions(device="cpu", gradient_checkpointing=True))


@pytest.mark.parametrize(
    ("installed", "cuda", "match"),
    [(False, True, r"not installed.*pip install 'eas-search\[4bit\]'"), (True, False, "needs a CUDA device")],
)
def test_four_bits_say_what_is_missing(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, cuda: bool, match: str
) -> None:
    found: Callable[[str], object] = lambda name: object() if installed else None  # noqa: E731
    monkeypatch.setattr("eas_search.models.placement.importlib.util.find_spec", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with pytest.raises(ConfigError, match=match) as error:
        load_model(str(llama_folder), LoadOptions(quantization="4bit"))
    assert "\n" not in str(error.value)


def test_a_head_is_not_quantised(bert: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from eas_search.models.loading import load_config, trained_parts

    config = load_config(str(bert), "bert")
    parts = trained_parts(AutoModelForSequenceClassification, config, CPU)
    assert set(parts) == {"dropout", "classifier", "pooler"}


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SearchSettings]:
    """A function: the settings that a command line comes to, without the search."""
    from typer.testing import CliRunner

    import eas_search.study
    from eas_search.cli import app

    class Stop(Exception):
        pass

    def settle(*arguments: str) -> SearchSettings:
        seen: list[SearchSettings] = []

        def stop(settings: SearchSettings, *_: object) -> None:
            seen.append(settings)
            raise Stop

        monkeypatch.setattr(eas_search.study, "create_study", stop)
        result = CliRunner().invoke(app, ["run", *arguments])
        if isinstance(result.exception, EasSearchError):
            raise result.exception
        assert isinstance(result.exception, Stop), result.output
        return seen[0]

    return settle


def test_flags_reach_the_settings(settled: Callable[..., SearchSettings]) -> None:
    flags = ("--device", "cpu", "--dtype", "bfloat16", "--gradient-checkpointing", "--trust-remote-code")
    expected = LoadOptions(device="cpu", dtype="bfloat16", gradient_checkpointing=True, trust_remote_code=True)
    assert settled(*flags).loading == expected
    assert settled("--device-map", "balanced").loading == LoadOptions(device_map="balanced")
    assert settled().loading == LoadOptions()


def test_flags_win_over_the_study_file(settled: Callable[..., SearchSettings], tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("gradient_checkpointing: true\ndtype: float16\ndevice: cpu\n", encoding="utf-8")
    loading = settled("--config", str(study), "--no-gradient-checkpointing").loading
    assert loading == LoadOptions(device="cpu", dtype="float16")


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--device-map", "anywhere"), "device_map is 'anywhere'"),
        (("--device", "abacus"), "device 'abacus'"),
        (("--dtype", "int3"), "dtype"),
        (("--quantization", "2bit"), "quantization"),
        (("--quantization", "4bit"), r"bitsandbytes|CUDA"),
        (("--device-map", "auto", "--device", "cpu"), "give one of them"),
    ],
)
def test_an_unusable_flag_is_said_before_any_work(
    settled: Callable[..., SearchSettings], monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], match: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=match) as error:
        settled(*flags)
    assert "\n" not in str(error.value)


def test_sites_of_a_model_with_code_of_its_own(own_code: tuple[Path, Path]) -> None:
    from typer.testing import CliRunner

    from eas_search.cli import app

    folder, ran = own_code
    refused = CliRunner().invoke(app, ["sites", "--model", str(folder)])
    assert isinstance(refused.exception, UnsupportedModelError)
    assert not ran.exists()
    listed = CliRunner().invoke(app, ["sites", "--model", str(folder), "--trust-remote-code"])
    assert "4 attention sites of OwnModel" in listed.output
    assert ran.exists()
