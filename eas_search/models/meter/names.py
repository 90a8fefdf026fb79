"""Names of the tensors in checkpoints of published METER, and what they are called here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from eas_search.exceptions import UnsupportedModelError

# Pattern of a published name → our name; `\1` … are the pattern's groups. The first that fits counts.
RENAMED: tuple[tuple[str, str], ...] = (
    (r"vit_model\.visual\.class_embedding", r"meter.vision_model.embeddings.class_embedding"),
    (r"vit_model\.visual\.conv1\.weight", r"meter.vision_model.embeddings.patch_embedding.weight"),
    (r"vit_model\.visual\.positional_embedding", r"meter.vision_model.embeddings.position_embedding.weight"),
    (r"vit_model\.visual\.ln_pre\.(\w+)", r"meter.vision_model.pre_layrnorm.\1"),
    (r"vit_model\.visual\.ln_post\.(\w+)", r"meter.vision_model.post_layernorm.\1"),
    (
        r"vit_model\.visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)",
        r"meter.vision_model.encoder.layers.\1.layer_norm\2.\3",
    ),
    (
        r"vit_model\.visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)",
        r"meter.vision_model.encoder.layers.\1.mlp.fc1.\2",
    ),
    (
        r"vit_model\.visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)",
        r"meter.vision_model.encoder.layers.\1.mlp.fc2.\2",
    ),
    (
        r"vit_model\.visual\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)",
        r"meter.vision_model.encoder.layers.\1.self_attn.out_proj.\2",
    ),
    (
        r"vit_model\.visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)",
        r"meter.vision_model.encoder.layers.\1.self_attn.{qkv}_proj.\2",
    ),
    (r"text_transformer\.(embeddings|encoder)\.(.+)", r"meter.text_model.\1.\2"),
    (r"(cross_modal_\w+|token_type_embeddings)\.(.+)", r"meter.\1.\2"),
    (r"(?:vqa|nlvr2)_classifier\.(.+)", r"classifier.\1"),
    (r"itm_score\.fc\.(\w+)", r"itm_score.\1"),
    (r"rank_output\.(\w+)", r"rank_output.\1"),
)
# What a METER model has no use for: RoBERTa's own pooler, heads of pretraining and of other tasks, counters, and CLIP's
# projection and text side.
UNUSED = re.compile(
    r"text_transformer\.pooler\.|.*\.position_ids$|.*\.token_type_ids$|mlm_score\.|mim_|snli_classifier\.|"
    r"vit_model\.visual\.proj$|vit_model\.(?!visual\.)|(train|val|dev|test)_\w+\."
)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a published checkpoint under our names; CLIP's stacked query, key and value are taken apart.

    Raises:
        UnsupportedModelError: a name that METER does not have.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if UNUSED.match(name):
            continue
        ours = next((match.expand(new) for old, new in RENAMED if (match := re.fullmatch(old, name))), None)
        if ours is None:
            raise UnsupportedModelError(
                f"checkpoint holds {name!r}, which METER with CLIP's vision transformer and RoBERTa does not have; "
                "expected the names of meter_clip16_288_roberta_pretrain.ckpt: choose that kind of checkpoint"
            )
        if "{qkv}" in ours:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                found[ours.replace("{qkv}", letter)] = part
        else:
            found[ours] = tensor
    return found
