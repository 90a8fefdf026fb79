"""`lora`: the student's adapters as a PEFT LoRA, exact for static PIAs at the FFN's input.

With n = norm2(x) = g2 ⊙ u + b2, which a layer W of the FFN reads, and Δ = U (R u + r) + u0, the student computes
    W (g2 ⊙ (u + Δ) + b2) = W n + W G2 U (R G2⁻¹ n + r − R G2⁻¹ b2) + W G2 u0,
so lora_A = R G2⁻¹, lora_B = W G2 U, and a bias on B takes the rest. A light adapter reads the attention's own input x̂:
lora_A = C, lora_B = W U. LoRA only adds; that the attentions are not computed must be done to the base model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eas_search.architectures.norms import split_norm
from eas_search.architectures.recompose import ffn_of
from eas_search.export.files import read_json, write_json
from eas_search.export.formats.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_model
from eas_search.export.formats.base import Format, Verdict, Writing
from eas_search.export.formats.plain import Misfit, check_plain, sizes_only
from eas_search.ffn_folding import dense
from eas_search.folding import fold_pia
from eas_search.lora import lora_layers
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips


class LoraFormat(Format):
    """For `peft.PeftModel.from_pretrained` on the base model without the skipped attentions."""

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "a PEFT LoRA for the base model without the skipped attentions"
    library: ClassVar[str] = "peft"
    usage: ClassVar[str] = (
        "import eas_search as eas\nfrom peft import PeftModel\n\n"
        "# The base model without the attentions of `skip` (see eas_config.json): with eas_search, which is fast, …\n"
        "bare = eas.apply_skips(base_model, eas.SkipConfig(skip=skip, pia_dim=0))\n"
        "# … or with `transformers` alone: set the output projections of these attentions to zero.\n"
        'model = PeftModel.from_pretrained(bare, "path/to/this/folder")'
    )

    def plan(self, student: Any) -> Verdict:
        """See the module."""
        try:
            import peft  # noqa: F401
        except ImportError:
            return Verdict("impossible", "needs peft: pip install peft")
        try:
            check_plain(sizes_only(student)[1])
            layers = list(_layers(student))
        except Misfit as misfit:
            return Verdict("impossible", str(misfit))
        if getattr(student, "eas_trainable", ()):
            return Verdict("impossible", "a new head was trained, which a LoRA does not hold; adapter would fit")
        if not layers:
            return Verdict("impossible", "the student has no adapters")
        return Verdict("exact", "on the base without these attentions; unmerged (the LoRA has biases)")

    def write(self, job: Writing) -> dict[str, Any]:
        """PEFT's two files."""
        import peft

        tensors, ranks, biased = {}, {}, False
        for path, down, up, bias in _layers(job.student):
            ranks[path] = len(down)
            tensors[f"base_model.model.{path}.lora_A.weight"] = down
            tensors[f"base_model.model.{path}.lora_B.weight"] = up
            tensors[f"base_model.model.{path}.lora_B.bias"] = bias
            biased = biased or bool(bias.any())
        rank = max(ranks.values())
        differing = {path: r for path, r in ranks.items() if r != rank}
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=sorted(ranks),
            rank_pattern=differing,
            alpha_pattern=dict(differing),
            lora_bias=biased,
            inference_mode=True,
            base_model_name_or_path=job.base_name,
        )
        config.save_pretrained(str(job.folder))
        kept = {n: t.to(torch.float32).cpu().contiguous() for n, t in tensors.items() if biased or "bias" not in n}
        save_file(kept, job.folder / ADAPTER_WEIGHTS)
        content = read_json(job.folder, ADAPTER_CONFIG)
        # Layers by their whole names: PEFT sorts them into sets, whose order changes from run to run.
        content["target_modules"] = sorted(ranks)
        write_json(job.folder / ADAPTER_CONFIG, content)
        return {}

    def load(self, folder: Path, content: Mapping[str, Any], base: nn.Module | None) -> nn.Module:
        """PEFT's model on the base model without the skipped attentions."""
        import peft

        skip = SkipConfig(skip=tuple(content["skip_config"]["skip"]), pia_dim=0)
        bare: Any = apply_skips(base_model(folder, content, base), skip)
        with warnings.catch_warnings():
            # Layers without a bias of their own: the LoRA's can be applied but not merged.
            warnings.filterwarnings("ignore", message=".*lora_bias=True.*")
            warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
            return peft.PeftModel.from_pretrained(bare, str(folder)).eval()


def _layers(student: Any) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(path, lora_A [r, in], lora_B [out, r], bias of B [out]) of every layer, float64.

    Raises:
        Misfit: the configuration is no LoRA.
    """
    config, skipped = student.eas.config, {site.name for site in student.eas.skipped}
    if skipped and config.pia_dim > 0:
        if config.placement != "ffn":
            raise Misfit(f"placement {config.placement!r} also writes to the residual stream; 'ffn' would fit")
        if config.identity != "noop":
            raise Misfit("identity 'paper' rescales what the FFN reads, which is of full rank; 'noop' would fit")
    for site in student.eas.sites:
        if site.name not in skipped:
            yield from _kept(student, site)
        elif config.pia_dim > 0:
            yield from _skipped(student.get_submodule(site.block), site)
    for path, layer in lora_layers(student).items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        yield path, down.double(), up.double() * layer.scaling["default"], up.new_zeros(len(up))


def _kept(student: Any, site: Any) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    attention = student.get_submodule(site.name)
    if (adapter := getattr(attention, "eas_adapter", None)) is None:
        return
    folded = fold_pia(adapter, torch.ones_like(adapter.down.weight[0]), None, pooled=False)
    constant = folded.ups[0] @ folded.down_bias + folded.up_biases[0]
    for name in site.qkv:
        weight, _ = dense(attention.get_submodule(name))
        yield f"{site.name}.{name}", folded.down, weight @ folded.ups[0], weight @ constant


def _skipped(block: Any, site: Any) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    pattern = site.pattern
    _, gain1, shift1 = split_norm(getattr(block, pattern.norm1), site.width)
    _, gain2, shift2 = split_norm(getattr(block, pattern.norm2), site.width)
    folded = fold_pia(block.pia_ffn, gain1, shift1, pooled=False)
    g2 = gain2.double()
    if g2.device.type != "meta" and bool((g2 == 0).any()):
        raise Misfit(f"norm {site.block}.{pattern.norm2} has a gain of zero, by which the LoRA would have to divide")
    down = folded.down / g2
    inner = folded.down_bias if shift2 is None else folded.down_bias - down @ shift2.double()
    up, constant = g2.unsqueeze(1) * folded.ups[0], g2 * (folded.ups[0] @ inner + folded.up_biases[0])
    holder = ffn_of(block, pattern.ffn)
    prefix = site.block if pattern.ffn == "." else f"{site.block}.{pattern.ffn}"
    for name in site.ffn.first:
        weight, _ = dense(getattr(holder, name))
        yield f"{prefix}.{name}", down, weight @ up, weight @ constant
