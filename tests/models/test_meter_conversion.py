"""From a published checkpoint of METER to a model folder, by `eas-search convert meter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import meter_reference
import pytest
import torch
from meter_reference import State, answers, classified, official_checkpoint, pooled
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from eas_search import conversion
from eas_search.cli import app
from eas_search.conversion import MeterSource, convert_meter
from eas_search.exceptions import ConfigError, StorageError, UnsupportedModelError, VerificationError
from eas_search.models.loading import load_model
from eas_search.models.options import LoadOptions

WIDTH = 64  # heads of 64 channels, as in the published sizes
CPU = LoadOptions(device="cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RoBERTa's kind of tokenizer with single bytes as its only tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaTokenizer

    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    folder = tmp_path_factory.mktemp("roberta")
    RobertaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    return folder


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> State:
    """A pretrained checkpoint with one head per attention and 300 words."""
    for name in ("VISION", "TEXT", "FUSION", "HEAD"):
        monkeypatch.setattr(meter_reference, name, WIDTH)
    monkeypatch.setattr(meter_reference, "WORDS", 300)
    return official_checkpoint(layers=1)


def written(state: State, folder: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": state}, folder / "meter.ckpt")
    return folder / "meter.ckpt"


def command(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["convert", "meter", *map(str, words)])


def asked(processor: Any) -> tuple[Tensor, Tensor, Tensor]:
    pictures = [Image.new("RGB", (30, 20), colour) for colour in ("red", "teal")]
    inputs = processor(text=["what?", "is it so?"], images=pictures, padding=True, return_tensors="pt")
    return inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]


@torch.no_grad()
def test_a_fine_tuned_model_answers_as_the_formulas_say(official: State, tokenizer: Path, tmp_path: Path) -> None:
    state = official | answers("vqa_classifier", images=1, labels=7)
    output = tmp_path / "vqa"
    flags = ("--head", "vqa", "--tokenizer", tokenizer, "--output", output)
    result = command("--checkpoint", written(state, tmp_path), *flags)
    assert result.exit_code == 0, result.output
    assert "".join(result.output.split()) == f"Wrote{output}"  # a long path is wrapped
    model, processor = load_model(str(output), CPU, "visual-question-answering")
    ids, mask, pixels = asked(processor)
    expected = classified(state, "vqa_classifier", pooled(state, ids, mask, pixels))
    torch.testing.assert_close(model(ids, pixels, mask).logits, expected, atol=1e-4, rtol=0.0)
    assert expected.std() > 0.05


@torch.no_grad()
def test_a_pretrained_model_ranks_as_it_matches(official: State, tokenizer: Path, tmp_path: Path) -> None:
    output = tmp_path / "retrieval"
    convert_meter(MeterSource(written(official, tmp_path), "retrieval", None, str(tokenizer)), output)
    model, processor = load_model(str(output), CPU, "image-text-retrieval")
    ids, mask, pixels = asked(processor)
    match = (
        pooled(official, ids, mask, pixels) @ official["itm_score.fc.weight"][1:].T + official["itm_score.fc.bias"][1]
    )
    torch.testing.assert_close(model(ids, pixels, mask).logits, match, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize(("factor", "match"), [(1 + 1e-6, "is not what was converted"), (1.0, "differs .* by")])
def test_a_folder_that_answers_otherwise_is_refused(
    official: State, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, match: str
) -> None:
    load = conversion.load_model

    def altered(*arguments: Any) -> Any:
        model, processor = load(*arguments)
        bias = model.rank_output.bias
        bias.data *= factor
        if factor == 1.0:  # right weights, wrong use of them
            model.rank_output.register_forward_hook(lambda module, inputs, output: output + 0.01)
        return model, processor

    monkeypatch.setattr(conversion, "load_model", altered)
    with pytest.raises(VerificationError, match=match):
        convert_meter(MeterSource(written(official, tmp_path), "retrieval", None, str(tokenizer)), tmp_path / "new")


def test_two_images_at_another_resolution(official: State, tokenizer: Path, tmp_path: Path) -> None:
    output = tmp_path / "nlvr2"
    flags = ("--head", "nlvr2", "--image-size", "20", "--tokenizer", tokenizer, "--output", output)
    result = command("--checkpoint", written(official, tmp_path), *flags)
    assert result.exit_code == 0, result.output
    model, processor = load_model(str(output), CPU, "sequence-classification")
    config: Any = model.config
    assert (config.num_images, config.num_labels, config.vision_config.image_size) == (2, 2, 20)
    ids, mask, pixels = asked(processor)
    assert pixels.shape == (2, 3, 20, 20)
    assert model(ids, torch.stack([pixels, pixels], dim=1), mask).logits.shape == (2, 2)


def test_what_is_refused(official: State, tokenizer: Path, tmp_path: Path) -> None:
    checkpoint, output = written(official, tmp_path), tmp_path / "new"

    def refused(kind: type[Exception], match: str, source: MeterSource) -> None:
        with pytest.raises(kind, match=match) as raised:
            convert_meter(source, output)
        assert "\n" not in str(raised.value)
        assert not output.exists()

    words = str(tokenizer)
    refused(ConfigError, "cannot be read", MeterSource(tmp_path / "nowhere.ckpt", "vqa", None, words))
    refused(ConfigError, "image_size is 13", MeterSource(checkpoint, "vqa", 13, words))
    refused(
        ConfigError,
        "tokenizer .*nothing.* cannot be loaded",
        MeterSource(checkpoint, "vqa", None, str(tmp_path / "nothing")),
    )
    few = official | {"text_transformer.embeddings.word_embeddings.weight": torch.ones(60, WIDTH)}
    refused(
        ConfigError, "has 261 tokens .* the text encoder 60", MeterSource(written(few, tmp_path), "vqa", None, words)
    )
    adapter = official | {"cross_modal_text_layers.0.adapter_self_attn.conv_A.weight": torch.ones(2)}
    refused(UnsupportedModelError, "also holds", MeterSource(written(adapter, tmp_path), "vqa", None, words))
    with pytest.raises(StorageError, match="not empty"):
        convert_meter(MeterSource(checkpoint, "vqa", None, words), tmp_path)


def test_an_unknown_head_is_one_line(tmp_path: Path) -> None:
    result = command("--checkpoint", tmp_path / "meter.ckpt", "--head", "caption", "--output", tmp_path / "new")
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == "head is 'caption'; expected one of vqa, nlvr2, retrieval"
