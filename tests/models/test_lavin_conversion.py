"""From tiny checkpoints in the published layout to a model folder, against the formulas in float64."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lavin_published import DIM, IMAGE, LAYERS, SKIP, VOCAB, Reference, llama_weights, write_published
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import eas_search as eas
from eas_search.cli import app
from eas_search.conversion import convert_lavin
from eas_search.exceptions import ConfigError, StorageError
from eas_search.models.lavin.convert import Sources
from eas_search.models.loading import load_model
from eas_search.models.options import LoadOptions

TOLERANCE = 1e-4
CPU = LoadOptions(device="cpu")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    write_published(folder)
    return folder


@pytest.fixture(scope="module")
def converted(published: Path) -> Path:
    """The model folder, with `adapters` inside."""
    output = published / "lavin"
    checkpoint = published / "checkpoint-0.pth"
    convert_lavin(Sources(str(published / "llama/7B"), str(published / "clip.pt"), checkpoint, SKIP), output)
    return output


def picture(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (IMAGE, IMAGE, 3), dtype=np.uint8)
    return Image.fromarray(values)


def expected_tokens(folder: Path, text: str, embeddings: Tensor | None) -> list[Any]:
    """[BOS, prefix, image, text] with the tokens of sentencepiece itself."""
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "llama/tokenizer.model"))
    if embeddings is None:
        return [1, *tokenizer.encode("Image: N/A"), *tokenizer.encode(text)]
    return [1, *tokenizer.encode("Image: "), *embeddings, *tokenizer.encode(text)]


@torch.no_grad()
@pytest.mark.parametrize("with_image", [True, False])
def test_the_converted_student_follows_the_formulas(published: Path, converted: Path, with_image: bool) -> None:
    base, processor = load_model(str(converted), CPU)
    student = eas.load_adapter(base, converted / "adapters")
    text = "Question: What is shown? Answer:"
    inputs = processor(text=text, images=picture(0) if with_image else None, return_tensors="pt")
    reference = Reference()
    embeddings = reference.image_embeddings(inputs["pixel_values"][0]) if with_image else None
    tokens = expected_tokens(published, text, embeddings)
    wanted = reference.logits(tokens, with_image, len(tokens) + 1, SKIP)
    for model in (student, eas.merge(student)):
        torch.testing.assert_close(model(**inputs).logits[0].double(), wanted, atol=TOLERANCE, rtol=0)
    if embeddings is not None:
        close = student.model.get_image_features(inputs["pixel_values"])[0].double()
        torch.testing.assert_close(close, embeddings, atol=TOLERANCE, rtol=0)


def weights(folder: Path) -> dict[str, Tensor]:
    model, _ = load_model(str(folder), CPU)
    return model.state_dict()


def test_a_split_llama_becomes_the_same_model(published: Path, converted: Path, tmp_path: Path) -> None:
    write_published(tmp_path, shards=2)
    output = tmp_path / "lavin"
    sources = Sources(str(tmp_path / "llama/7B"), str(published / "clip.pt"), tmp_path / "checkpoint-0.pth")
    convert_lavin(sources, output)
    whole, joined = weights(converted), weights(output)
    assert whole.keys() == joined.keys()
    assert all(torch.equal(whole[name], joined[name]) for name in whole)
    assert torch.equal(whole["lm_head.weight"], llama_weights()["output.weight"])
    # Without skipped layers the light adapters are all there is: LaVIN of 2023.
    adapted = eas.load_adapter(load_model(str(output), CPU)[0], output / "adapters")
    assert adapted.eas.skipped == ()
    assert sum(hasattr(part, "eas_adapter") for part in adapted.modules()) == LAYERS + 8


@torch.no_grad()
@pytest.mark.parametrize("whole_clip", [True, False])
def test_parts_in_the_hugging_face_layout(converted: Path, tmp_path: Path, whole_clip: bool) -> None:
    model, processor = load_model(str(converted), CPU)
    llama = transformers.LlamaForCausalLM(model.config.text_config)
    llama.model.load_state_dict(model.model.language_model.state_dict())
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    llama.save_pretrained(tmp_path / "llama")
    processor.tokenizer.save_pretrained(tmp_path / "llama")
    vision: Any = transformers.CLIPVisionModel(model.config.vision_config)
    vision.load_state_dict(model.model.vision_tower.state_dict())
    if whole_clip:
        text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        config = transformers.CLIPConfig(text_config=text, vision_config=model.config.vision_config.to_dict())
        clip = transformers.CLIPModel(config)
        clip.vision_model.load_state_dict(vision.state_dict())
        vision = clip
    vision.save_pretrained(tmp_path / "clip")
    processor.image_processor.save_pretrained(tmp_path / "clip")
    convert_lavin(Sources(str(tmp_path / "llama"), str(tmp_path / "clip")), tmp_path / "lavin")
    again, other = load_model(str(tmp_path / "lavin"), CPU)
    inputs = processor(text=["the answer is"], images=[picture(1)], return_tensors="pt")
    same = other(text=["the answer is"], images=[picture(1)], return_tensors="pt")
    assert all(torch.equal(inputs[name], same[name]) for name in inputs)
    # Projection and modality embedding are new, everything else is what it was.
    old, new = model.state_dict(), again.state_dict()
    differing = {name for name in old if old[name].shape != new[name].shape or not torch.equal(old[name], new[name])}
    assert differing == set(model.trained_with_adapters) == set(again.trained_with_adapters)
    assert again(**inputs).logits.isfinite().all()


def test_the_tokenizer_is_sentencepieces(published: Path, converted: Path) -> None:
    _, processor = load_model(str(converted), CPU)
    for text in ("Which is brighter?", "the top  or the bottom", "What"):
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        assert ids == expected_tokens(published, text, None)[len(expected_tokens(published, "", None)) :]
    assert processor.tokenizer.convert_tokens_to_ids("<image>") >= VOCAB
    assert processor.tokenizer.pad_token_id == 0


def test_the_command(published: Path, tmp_path: Path) -> None:
    parts = ["--llama", str(published / "llama/7B"), "--clip", str(published / "clip.pt")]
    more = ["--adapters", str(published / "checkpoint-0.pth"), "--skip", "0,2", "--output", str(tmp_path / "lavin")]
    result = CliRunner().invoke(app, ["convert", "lavin", *parts, *more])
    assert result.exit_code == 0, result.output
    adapted = eas.load_adapter(load_model(str(tmp_path / "lavin"), CPU)[0], tmp_path / "lavin" / "adapters")
    assert [site.index for site in adapted.eas.skipped] == [0, 2]
    assert adapted.eas.config.scale == 0.5


class Dangerous:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def test_what_is_refused(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama, clip, checkpoint = (str(published / name) for name in ("llama/7B", "clip.pt", "checkpoint-0.pth"))
    output = tmp_path / "lavin"
    torch.save({"model": Dangerous()}, tmp_path / "evil.pth")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
        archive.writestr("script/code/__torch__.py", b"")
    torch.save({"visual.proj": torch.ones(1)}, tmp_path / "resnet.pt")
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Sources, str]] = [
        (Sources(llama, clip, tmp_path / "evil.pth"), "is refused"),
        (Sources(llama, str(tmp_path / "script.pt")), "TorchScript archive"),
        (Sources(llama, str(tmp_path / "resnet.pt")), "vision transformer"),
        (Sources(llama, clip, tmp_path / "nothing.pth"), "cannot be read"),
        (Sources(str(tmp_path / "empty"), clip), "cannot be loaded"),
        (Sources(llama, clip, Path(clip)), "no adapter_proj"),
        (Sources(llama, clip, Path(checkpoint), skip=(7,)), "layers.7.replaced_adapter"),
        (Sources(llama, clip, skip=(1,)), "without adapters"),
    ]
    for sources, message in cases:
        with pytest.raises(ConfigError, match=message) as error:
            convert_lavin(sources, output)
        assert "\n" not in str(error.value)
        assert not output.exists()
    assert not (tmp_path / "executed").exists()
    with pytest.raises(StorageError, match="not empty"):
        convert_lavin(Sources(llama, clip), published)


def test_width_of_the_parts_must_fit(published: Path, tmp_path: Path) -> None:
    torch.save(llama_weights() | {"output.weight": torch.ones(VOCAB + 1, DIM)}, tmp_path / "consolidated.00.pth")
    for name in ("7B/params.json", "tokenizer.model"):
        (tmp_path / Path(name).name).write_bytes((published / "llama" / name).read_bytes())
    with pytest.raises(ConfigError, match=r"lm_head\.weight is missing, left over, or of another size"):
        convert_lavin(Sources(str(tmp_path), str(published / "clip.pt")), tmp_path / "lavin")
