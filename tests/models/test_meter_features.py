"""METER's image stream is kept while its fusion layers are searched."""

from __future__ import annotations

import torch
from meter_tiny import batch, tiny_meter

from eas_search.architectures import attention_sites
from eas_search.reuse import attach_caches, reusing
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips


@torch.no_grad()
def test_the_image_stream_is_kept_while_fusion_layers_are_searched() -> None:
    model, inputs = tiny_meter(), batch()
    expected = model(**inputs).logits
    sites = attention_sites(model)
    fusion = tuple(site.index for site in sites if site.tower == "fusion")
    towers = {"placement": "residual", "pooling": "all", "adapter_dim": 2, "adapter_towers": ("fusion",)}
    students = [apply_skips(model, SkipConfig(skip=skip, pia_dim=2, **towers)) for skip in ((), fusion)]
    caches = attach_caches(model, students, sites, inputs, (2**20, 0), tolerance=1e-5)
    assert caches.features.why_not == ""
    encoded: list[int] = []
    model.meter.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    with reusing(model):
        kept = model(**inputs).logits
        assert (kept - expected).abs().max() < 1e-5 * expected.abs().max()
        assert encoded == []
        inputs["pixel_values"] = inputs["pixel_values"].flip(0)
        swapped = model(**inputs).logits
    assert (swapped - model(**inputs).logits).abs().max() < 1e-5 * expected.abs().max()
    assert (swapped - expected).abs().max() > 1e-3
    assert encoded == [2]  # the plain pass of the comparison
