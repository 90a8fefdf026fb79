"""Models with several towers: whose tokens a mask, a label or the length of a prompt is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from eas_search.architectures import attention_sites
from eas_search.exceptions import UnsupportedModelError
from eas_search.merging import merge
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips

Fill = Callable[..., nn.Module]
SMALL_VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
IMAGE_TOKEN = 60
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    return transformers.BartForConditionalGeneration(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=64,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=5,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return transformers.WhisperForConditionalGeneration(config)


@pytest.fixture(scope="module")
def git(randomise: Fill) -> Any:
    """It puts the image's five tokens in front of the text's, inside the model."""
    config = transformers.GitConfig(
        vision_config=SMALL_VISION,
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = randomise(transformers.GitForCausalLM(config), seed=0, std=0.2)
    return randomise(apply_skips(model, SkipConfig(skip=(1, 2), pia_dim=4, placement="residual")))


@pytest.fixture(scope="module")
def blip2(randomise: Fill) -> Any:
    """Its `generate` takes the image first, and leaves the decoding to its language model."""
    config = transformers.Blip2Config(
        vision_config=SMALL_VISION,
        qformer_config={
            "vocab_size": 64,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 40,
            "encoder_hidden_size": 24,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": 64,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        num_query_tokens=4,
        image_token_index=IMAGE_TOKEN,
    )
    model = randomise(transformers.Blip2ForConditionalGeneration(config), seed=0, std=0.2)
    return randomise(apply_skips(model, SkipConfig(skip=(1, 2), pia_dim=4)))


@pytest.fixture(scope="module", params=["student", "merged"])
def seq2seq(request: pytest.FixtureRequest, randomise: Fill) -> Callable[[Callable[[], Any]], Any]:
    """A function: a student without the decoder's last self-attentions, or its merged form."""

    def make(build: Callable[[], Any]) -> Any:
        model: Any = randomise(build(), seed=0, std=0.2)
        decoder = [site.index for site in attention_sites(model) if site.causal and site.kind == "self"]
        student = randomise(apply_skips(model, SkipConfig(skip=tuple(decoder[1:]), pia_dim=4)))
        return merge(student) if request.param == "merged" else student

    return make


@torch.no_grad()
@pytest.mark.parametrize("build", [bart, t5])
def test_a_decoder_s_means_take_nothing_from_the_encoder_s_padding(
    seq2seq: Callable[..., Any], tokens: Tensor, build: Callable[[], Any]
) -> None:
    """Both streams are equally long here; one more column of padding in the source must change nothing.

    2e-5: the same sums over keys, of other shapes.
    """
    model = seq2seq(build)
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0
    target = tokens.flip(1)
    nothing = torch.zeros(len(tokens), 1, dtype=torch.long)
    short = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=target, use_cache=False).logits
    wide = {"input_ids": torch.cat([tokens, nothing], 1), "attention_mask": torch.cat([mask, nothing], 1)}
    longer = model(**wide, decoder_input_ids=target, use_cache=False).logits
    torch.testing.assert_close(short, longer, atol=2e-5, rtol=1e-5)
    cache, steps = None, []
    encoded = model.get_encoder()(input_ids=tokens, attention_mask=mask)
    for step in target.split(1, dim=1):
        out = model(
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_input_ids=step,
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), short, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_decoder_s_own_mask_counts(seq2seq: Callable[..., Any], tokens: Tensor) -> None:
    """The content of its padding changes no logit of a real token."""
    model, mask = seq2seq(bart), torch.ones_like(tokens)
    mask[:, :3] = 0
    found = []
    for filler in (5, 9):
        target = torch.where(mask.bool(), tokens.flip(1), filler)
        inputs = {"input_ids": tokens, "decoder_input_ids": target, "decoder_attention_mask": mask}
        found.append(model(**inputs, use_cache=False).logits[:, 3:])
    torch.testing.assert_close(*found, atol=1e-5, rtol=0.0)


@torch.no_grad()
def test_a_mask_of_audio_frames_says_nothing_of_the_decoder_s_tokens(
    seq2seq: Callable[..., Any], tokens: Tensor
) -> None:
    """Whisper's encoder ignores the mask, and so must a decoder with as many tokens as there are frames."""
    model, mask = seq2seq(whisper), torch.ones_like(tokens)
    mask[0, 6:] = 0
    sound = torch.randn(4, 8, 10, generator=torch.Generator().manual_seed(2))
    inputs = {"input_features": sound, "decoder_input_ids": tokens, "use_cache": False}
    assert torch.equal(model(**inputs, attention_mask=mask).logits, model(**inputs).logits)


@torch.no_grad()
def test_tokens_that_a_model_adds_itself_belong_to_the_prompt(git: Any, tokens: Tensor, pixels: Tensor) -> None:
    """1e-5: both passes are over the same tokens, in kernels of their own."""
    prompt = {"input_ids": tokens[:2], "pixel_values": pixels[:2], "attention_mask": torch.ones_like(tokens[:2])}
    expected = git(**prompt).logits[:, -1]
    for cached in (True, False):
        made = git.generate(**prompt, **GREEDY, use_cache=cached, output_logits=True, return_dict_in_generate=True)
        torch.testing.assert_close(made.logits[0], expected, atol=1e-5, rtol=0.0)
        # The second token by the definition: one pass that is told where the prompt ends.
        longer = {**prompt, "input_ids": made.sequences[:, :11], "attention_mask": torch.ones(2, 11, dtype=torch.long)}
        second = git(**longer, prompt_mask=(torch.arange(11) < 10).expand(2, -1)).logits[:, -1]
        torch.testing.assert_close(made.logits[1], second, atol=1e-5, rtol=0.0)


@torch.no_grad()
def test_labels_tell_the_prompt_also_where_the_model_adds_tokens(git: Any, tokens: Tensor, pixels: Tensor) -> None:
    """Five image tokens stand in front; the answer begins with the text's sixth token."""
    inputs: dict[str, Any] = {"pixel_values": pixels[:2], "attention_mask": torch.ones_like(tokens[:2])}
    changed = tokens.clone()
    changed[:, -1] = tokens[:, -1] % 50 + 5
    by_labels, by_mask, later = (
        git(input_ids=ids[:2], **inputs, **told).logits
        for ids, told in (
            (tokens, {"labels": tokens[:2].masked_fill(torch.arange(10) < 6, -100)}),
            (tokens, {"prompt_mask": (torch.arange(10) < 6).expand(2, -1)}),
            (changed, {"prompt_mask": (torch.arange(10) < 6).expand(2, -1)}),
        )
    )
    assert torch.equal(by_labels, by_mask)
    assert torch.equal(by_mask[:, :-1], later[:, :-1])
    # Without an answer all tokens are the prompt's: the logits before it then are others.
    assert (git(input_ids=tokens[:2], **inputs).logits - by_mask)[:, 6:10].abs().max() > 1e-4


@torch.no_grad()
def test_a_mask_that_fits_no_tokens_is_refused_in_one_line(git: Any, tokens: Tensor, pixels: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match=r"\(2, 15\), one of its masks over \(2, 12\)") as caught:
        git(input_ids=tokens[:2], pixel_values=pixels[:2], prompt_mask=torch.ones(2, 7))
    assert "\n" not in str(caught.value)


def test_a_caption_without_a_text_begins_with_one_token(git: Any, pixels: Tensor) -> None:
    """With and without a cache; compared by logits, because random weights repeat one token."""
    options: dict[str, Any] = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (git.generate(pixel_values=pixels[:2], use_cache=use, **options).logits for use in (True, False))
    torch.testing.assert_close(torch.stack(cached), torch.stack(uncached), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("text", ["with image tokens", "without", "none"])
def test_the_prompt_of_a_model_that_decodes_through_a_part_of_it(
    blip2: Any, tokens: Tensor, pixels: Tensor, text: str
) -> None:
    """By name or by place, with a cache or without: the same logits."""
    image = torch.full((2, 4), IMAGE_TOKEN)
    ids = {"with image tokens": torch.cat([image, tokens[:2, :4]], dim=1), "without": tokens[:2, :4], "none": None}[
        text
    ]
    options: dict[str, Any] = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    found = [
        torch.stack(call(use_cache=cached, **options).logits)
        for cached in (True, False)
        for call in (
            lambda **how: blip2.generate(pixels[:2], ids, **how),
            lambda **how: blip2.generate(pixel_values=pixels[:2], input_ids=ids, **how),
        )
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    torch.testing.assert_close(found[0], found[2], atol=2e-5, rtol=1e-5)
    if text == "with image tokens":
        with torch.no_grad():
            first = blip2(pixel_values=pixels[:2], input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        torch.testing.assert_close(found[0][0], first, atol=2e-5, rtol=1e-5)
