"""Image features from memory: the same answers as without, whatever the order, padding, number of images and cap."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eas_search.architectures import attention_sites
from eas_search.fingerprints import fingerprint, fingerprints
from eas_search.latency.forward import TimedModel
from eas_search.merging import merge
from eas_search.reuse import Caches, attach_caches, reusing
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips

IMAGE_TOKEN, PATCHES = 60, 16
MIB = 2**20


def cached(model: nn.Module, probe: dict[str, Tensor], limit: int = MIB, **student: Any) -> tuple[Any, Caches]:
    """A copy of the model with a feature cache and without shared prefixes."""
    twin = copy.deepcopy(model)
    config = SkipConfig(**{"pia_dim": 2, "adapter_dim": 2, "pooling": "none", **student})
    students = [apply_skips(twin, config), apply_skips(twin, config.model_copy(update={"skip": ()}))]
    return twin, attach_caches(twin, students, attention_sites(twin), probe, (limit, 0), tolerance=1e-5)


def batch(rows: list[list[int]], pictures: Tensor, words: int = 5) -> dict[str, Tensor]:
    """Rows with the pictures of these numbers in front of words, padded on the right to the longest."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest * PATCHES + words, dtype=torch.long)
    for i, row in enumerate(rows):
        text = torch.arange(3 + i, 3 + i + words)
        ids[i, : len(row) * PATCHES + words] = torch.cat([torch.full((len(row) * PATCHES,), IMAGE_TOKEN), text])
    numbers = torch.tensor(list(itertools.chain(*rows)))
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pictures[numbers]}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor], cache: bool = True) -> Tensor:
    if not cache:
        return model(**inputs, use_cache=False).logits
    with reusing(model):
        return model(**inputs, use_cache=False).logits


class Count:
    """How many images a tower has encoded."""

    def __init__(self, tower: nn.Module) -> None:
        self.images = 0
        tower.register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.images += len(args[0])


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.float64])
def test_fingerprints_differ_exactly_where_contents_do(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 2, (4000, 9), generator=generator).to(dtype)
    found: dict[tuple[int, int], tuple[float, ...]] = {}
    for key, row in zip(fingerprints(rows), rows.tolist(), strict=True):
        assert found.setdefault(key, tuple(row)) == tuple(row)
    assert len(found) == len(set(map(tuple, rows.tolist())))
    # Whatever was hashed in between, a longer row begins like a shorter one: zeros behind it change nothing.
    longer = torch.cat([rows, torch.zeros(4000, 700).to(dtype)], dim=1)
    assert fingerprints(longer) == fingerprints(rows)
    assert fingerprint([rows]) != fingerprint([rows.T]) == fingerprint([rows.T.contiguous()])


def test_one_changed_bit_of_a_picture_changes_its_fingerprint(pictures: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    twins = pictures[:1].repeat(2000, 1, 1, 1).flatten(1)
    where = torch.randperm(twins.shape[1], generator=generator)[:2000]
    bits = twins.view(torch.int32)
    bits[torch.arange(2000), where] ^= 1 << torch.randint(0, 31, (2000,), generator=generator, dtype=torch.int32)
    assert len({*fingerprints(twins), *fingerprints(pictures[:1])}) == 2001


@pytest.mark.parametrize("training", [False, True])
def test_shuffled_batches_answer_as_without_a_cache(
    llava: Any, image_prompt: dict[str, Tensor], pictures: Tensor, randomise: Callable[..., Any], training: bool
) -> None:
    model, caches = cached(llava, image_prompt, skip=(0, 2))
    student = randomise(apply_skips(model, SkipConfig(skip=(0, 2), pia_dim=2, adapter_dim=2, pooling="none")))
    student.train(training)
    count, generator = Count(student.model.vision_tower), torch.Generator().manual_seed(2)
    for _ in range(3):
        for numbers in torch.randperm(24, generator=generator).split(7):
            inputs = batch([[n] for n in numbers.tolist()], pictures, words=int(numbers[0]) % 4 + 2)
            expected, before = logits(student, inputs, cache=False), count.images
            assert (logits(student, inputs) - expected).abs().max() < 1e-5 * expected.abs().max()
            count.images = before
    assert caches.features.encoded == 24
    assert caches.features.served == 48
    assert caches.features.held == (24 + len(image_prompt["pixel_values"])) * PATCHES * 32 * 4


def test_a_known_image_is_not_encoded_and_what_it_gives_does_not_depend_on_history(
    llava: Any, image_prompt: dict[str, Tensor], pictures: Tensor
) -> None:
    inputs = batch([[3], [7], [3], [11]], pictures)
    seen = []
    for history in ([], [[7], [0], [1]], [[n] for n in range(24)]):
        model, _ = cached(llava, image_prompt)
        if history:
            logits(model, batch(history, pictures))
        seen.append(logits(model, inputs))
        count = Count(model.model.vision_tower)
        assert torch.equal(logits(model, inputs), seen[-1])
        assert count.images == 0
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_features_are_never_of_mixed_precision(llava: Any, image_prompt: dict[str, Tensor], pictures: Tensor) -> None:
    inputs = batch([[3], [7]], pictures)
    expected = logits(cached(llava, image_prompt)[0], inputs)
    model, _ = cached(llava, image_prompt)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(logits(model, inputs).float(), expected)
    count = Count(model.model.vision_tower)
    assert torch.equal(logits(model, inputs), expected)  # of features that were made in the midst of it
    assert count.images == 0


def test_samples_may_have_several_images(llava: Any, image_prompt: dict[str, Tensor], pictures: Tensor) -> None:
    model, caches = cached(llava, image_prompt)
    for rows in ([[0, 1], [2, 0]], [[1], [2, 3, 0]], [[3, 1, 2, 0]]):
        inputs = batch(rows, pictures)
        expected = logits(llava, inputs, cache=False)
        assert (logits(model, inputs) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert caches.features.encoded == 4
    assert caches.features.served == 8  # image 0, met twice in the first batch, and then the known ones: 1 + 3 + 4


@pytest.mark.parametrize("room", [0, 3])
def test_the_cap_is_kept_and_what_does_not_fit_is_computed(
    llava: Any, image_prompt: dict[str, Tensor], pictures: Tensor, room: int
) -> None:
    limit = (2 + room) * PATCHES * 32 * 4 + 100  # two images of the probe
    model, caches = cached(llava, image_prompt, limit=limit)
    inputs = batch([[n] for n in range(8)], pictures)
    expected = logits(llava, inputs, cache=False)
    for _ in range(2):
        assert (logits(model, inputs) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert caches.features.held <= limit
    assert caches.features.full
    assert (caches.features.served, caches.features.encoded) == (room, 16 - room)
    assert any("did not fit" in note for note in caches.notes()) == (room > 0)


def test_what_is_timed_or_merged_encodes_its_images(llava: Any, image_prompt: dict[str, Tensor]) -> None:
    model, _ = cached(llava, image_prompt)
    student = apply_skips(model, SkipConfig(skip=(1,), pia_dim=2, pooling="none"))
    logits(student, image_prompt)
    for candidate in (model, student, merge(student)):
        count = Count(candidate.model.vision_tower)
        with torch.inference_mode():
            TimedModel(candidate.eval(), image_prompt, 0, timer=lambda: 0.0).prefill()
        assert count.images == 2


def test_generation_takes_features_from_memory(llava: Any, image_prompt: dict[str, Tensor], pictures: Tensor) -> None:
    model, caches = cached(llava, image_prompt)
    inputs = batch([[0], [1]], pictures)
    for search in ({}, {"num_beams": 2}):
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **search}
        expected = llava.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options), expected)
        with reusing(model):
            assert torch.equal(model.generate(**inputs, **options), expected)
    assert (caches.features.encoded, caches.features.served) == (2, 2)


def test_it_does_not_apply_where_there_is_nothing_to_keep(llava: Any, llama: Any, tokens: Tensor) -> None:
    inputs = batch([[0], [1]], torch.randn(2, 3, 32, 32))
    assert "no image features" in cached(llama, {"input_ids": tokens})[1].features.why_not
    vision = next(site.index for site in attention_sites(llava) if site.tower == "vision")
    searched = cached(llava, inputs, skip=(vision,), pia_dim=0)
    trained = cached(llava, inputs, skip=(0,), adapter_towers=("text", "vision"))
    noisy = copy.deepcopy(llava)
    for layer in noisy.model.vision_tower.modules():
        if hasattr(layer, "dropout"):
            layer.dropout = 0.5
    random = cached(noisy, inputs)
    for (model, caches), reason in ((searched, "searched"), (trained, "trained"), (random, "random in training")):
        assert reason in caches.features.why_not
        count = Count(model.model.vision_tower)
        for _ in range(2):
            logits(model, inputs)
        assert count.images == 4
        assert caches.features.held == caches.features.served == 0


def packed() -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """A tiny Qwen2-VL with two images of different sizes in one list of patches, and with one of them alone."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text |= {"num_key_value_heads": 2, "vocab_size": 64, "rope_parameters": rope}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={**text, "pad_token_id": 0},
        vision_config={**vision, "in_channels": 3, "temporal_patch_size": 1},
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    model = Qwen2VLForConditionalGeneration(config).eval()
    grids, patches = torch.tensor([[1, 4, 4], [1, 2, 4]]), torch.randn(24, 48)
    ids = torch.zeros(2, 10, dtype=torch.long)
    ids[0] = torch.tensor([3, 62, *[60] * 4, 63, 5, 6, 7])
    ids[1, :7] = torch.tensor([3, 62, 60, 60, 63, 8, 9])
    kinds = (ids == 60).long()
    both = {"input_ids": ids, "attention_mask": (ids != 0).long(), "mm_token_type_ids": kinds}
    alone = {name: value[1:, :7] for name, value in both.items()}
    return (
        model,
        {**both, "pixel_values": patches, "image_grid_thw": grids},
        {**alone, "pixel_values": patches[16:], "image_grid_thw": grids[1:]},
    )


def test_images_whose_patches_form_one_list_are_told_apart_by_their_grids() -> None:
    model, both, alone = packed()
    twin, caches = cached(model, both)
    assert caches.features.why_not == ""
    for inputs in (both, alone):
        expected = logits(model, inputs, cache=False)
        assert (logits(twin, inputs) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (caches.features.served, caches.features.encoded) == (3, 0)  # the probe was the batch
