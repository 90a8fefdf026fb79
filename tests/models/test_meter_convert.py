"""Published checkpoints of METER, converted, against the formulas written out on the published tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from meter_reference import FUSION, HEAD, PATCH, SIDE, State, answers, classified, official_checkpoint, pooled
from torch import Tensor

from eas_search.exceptions import ConfigError, UnsupportedModelError
from eas_search.models.meter.convert import convert_checkpoint, resized_positions
from eas_search.models.meter.processing import save_folder

PIXELS = PATCH * SIDE


@pytest.fixture(scope="module")
def official() -> State:
    return official_checkpoint()


def written(state: State, folder: Path, **more: Any) -> Path:
    path = folder / "meter.ckpt"
    torch.save({"epoch": 3, "global_step": 100, "state_dict": state, **more}, path)
    return path


def batch(size: int = PIXELS, images: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 60, (2, 6), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 1, 0
    shape = (2, images, 3, size, size) if images else (2, 3, size, size)
    return ids, mask, torch.randn(shape, generator=generator)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0.0)


@torch.no_grad()
def test_a_fine_tuned_vqa_checkpoint(official: State, tmp_path: Path) -> None:
    state = official | answers("vqa_classifier", images=1, labels=7)
    ids, mask, pixels = batch()
    model = convert_checkpoint(written(state, tmp_path), "vqa", head_width=HEAD)
    features = pooled(state, ids, mask, pixels)
    close(model.meter(ids, pixels, mask).pooler_output, features)
    close(model(ids, pixels, mask).logits, classified(state, "vqa_classifier", features))
    assert model.eas_trainable == ()
    assert features.std() > 0.3


@torch.no_grad()
def test_a_fine_tuned_nlvr2_checkpoint_sees_two_images(official: State, tmp_path: Path) -> None:
    state = official | answers("nlvr2_classifier", images=2, labels=2)
    state["token_type_embeddings.weight"] = torch.randn(3, FUSION, generator=torch.Generator().manual_seed(8))
    ids, mask, pixels = batch(images=2)
    model = convert_checkpoint(written(state, tmp_path), "nlvr2", head_width=HEAD)
    both = torch.cat([pooled(state, ids, mask, pixels[:, j], image_type=1 + j) for j in range(2)], dim=-1)
    logits = model(ids, pixels, mask).logits
    close(logits, classified(state, "nlvr2_classifier", both))
    assert (logits - model(ids, pixels.flip(1), mask).logits).abs().max() > 0.01


@torch.no_grad()
def test_a_pretrained_checkpoint_starts_a_retrieval_model(official: State, tmp_path: Path) -> None:
    ids, mask, pixels = batch()
    model = convert_checkpoint(written(official, tmp_path), "retrieval", head_width=HEAD)
    output, features = model(ids, pixels, mask), pooled(official, ids, mask, pixels)
    matches = features @ official["itm_score.fc.weight"].T + official["itm_score.fc.bias"]
    close(output.match_logits, matches)
    close(output.logits, matches[:, 1:])  # the ranking head starts as the matching head's "match"


@torch.no_grad()
def test_a_pretrained_checkpoint_starts_an_nlvr2_model(official: State, tmp_path: Path) -> None:
    ids, mask, pixels = batch(images=2)
    model = convert_checkpoint(written(official, tmp_path), "nlvr2", head_width=HEAD)
    both = torch.cat([pooled(official, ids, mask, pixels[:, j], image_type=1) for j in range(2)], dim=-1)
    close(model.meter(ids, pixels, mask).pooler_output, both)
    assert {name.split(".")[0] for name in model.eas_trainable} == {"classifier"}
    assert model.config.num_labels == 2


@torch.no_grad()
def test_another_resolution(official: State, tmp_path: Path) -> None:
    larger = PIXELS + 2 * PATCH
    ids, mask, pixels = batch(larger)
    model = convert_checkpoint(written(official, tmp_path), "retrieval", image_size=larger, head_width=HEAD)
    positions = official["vit_model.visual.positional_embedding"]
    grid = positions[1:].view(SIDE, SIDE, -1).double().numpy()
    rows = cubic(SIDE, SIDE + 2)
    resized = torch.from_numpy(np.einsum("ai,bj,ijd->abd", rows, rows, grid)).flatten(0, 1).float()
    state = {**official, "vit_model.visual.positional_embedding": torch.cat([positions[:1], resized])}
    close(model.meter(ids, pixels, mask).pooler_output, pooled(state, ids, mask, pixels))
    assert model.config.vision_config.image_size == larger


def cubic(before: int, after: int, a: float = -0.75) -> np.ndarray:
    """Weights [after, before] of cubic convolution (Keys, 1981), borders repeated, pixel centres at i + ½."""
    weights = np.zeros((after, before))
    for i in range(after):
        centre = (i + 0.5) * before / after - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            t = abs(centre - j)
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            weights[i, min(max(j, 0), before - 1)] += near if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4)
    return weights


def test_positions_for_the_resolutions_of_the_paper() -> None:
    """288 → 384 and 576 pixels in patches of 16; a constant stays one, and the class token keeps its own."""
    positions = torch.full((1 + 18**2, 3), 0.5)
    positions[0] = 9.0
    for side in (24, 36):
        resized = resized_positions(positions, side)
        assert resized.shape == (1 + side**2, 3)
        assert torch.equal(resized[0], positions[0])
        torch.testing.assert_close(resized[1:], torch.full((side**2, 3), 0.5))


@torch.no_grad()
def test_a_converted_model_is_a_hugging_face_folder(official: State, tmp_path: Path, roberta_tokenizer: Any) -> None:
    from PIL import Image
    from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

    roberta = official | {
        "text_transformer.embeddings.word_embeddings.weight": torch.randn(len(roberta_tokenizer), 16),
        **answers("vqa_classifier", images=1, labels=7),
    }
    model = convert_checkpoint(written(roberta, tmp_path), "vqa", head_width=HEAD)
    save_folder(model, roberta_tokenizer, tmp_path / "folder")
    loaded = AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path / "folder").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "folder")
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    picture.paste((0, 0, 255), (10, 0, 30, 20))  # the centre is blue
    inputs = processor(text=["what?", "a longer one?"], images=[picture] * 2, return_tensors="pt", padding=True)
    assert inputs["pixel_values"].shape == (2, 3, PIXELS, PIXELS)
    blue = (torch.tensor([0.0, 0.0, 1.0]) - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(inputs["pixel_values"][0, :, 6, 6], blue, atol=1e-4, rtol=0.0)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=0.0, rtol=0.0)


@pytest.fixture(scope="module")
def roberta_tokenizer() -> Any:
    """RoBERTa's kind of tokenizer with single bytes as its only tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaTokenizer

    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    return RobertaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


class Payload:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_what_is_refused(official: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(kind: type[Exception], match: str, state: Any, task: Any = "vqa", **more: Any) -> None:
        with pytest.raises(kind, match=match) as raised:
            convert_checkpoint(written(state, tmp_path, **more.pop("file", {})), task, head_width=HEAD, **more)
        assert "\n" not in str(raised.value)

    refused(ConfigError, "task 'caption' is unknown; expected one of vqa, nlvr2, retrieval", official, "caption")
    refused(ConfigError, "is refused: .* expected a file of tensors", official, file={"callbacks": Payload()})
    assert "run" not in capsys.readouterr().out
    refused(ConfigError, "holds no METER", {})
    refused(
        UnsupportedModelError,
        "holds 'visual_embed.norm.weight'",
        official | {"visual_embed.norm.weight": torch.ones(2)},
    )
    adapter = "cross_modal_text_layers.0.adapter_self_attn.conv_A.weight"
    refused(
        UnsupportedModelError,
        "also holds 'meter.cross_modal_text_layers.0.adapter",
        official | {adapter: torch.ones(2)},
    )
    refused(ConfigError, "image_size is 13, expected a multiple of the patch size 4", official, image_size=13)
    lacking = {name: tensor for name, tensor in official.items() if "ln_post" not in name}
    refused(ConfigError, r"lacks 'meter.vision_model.post_layernorm.bias' in the shape \(24,\)", lacking)
    other_task = official | answers("vqa_classifier", images=1, labels=7)
    refused(ConfigError, r"lacks 'classifier.0.weight' in the shape \(64, 128\)", other_task, "nlvr2")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        convert_checkpoint(tmp_path / "nowhere.ckpt", "vqa")
