"""The embedded demo model: a 12-layer LLaVA that answers questions about four handwritten digits.

Pretrained from scratch by `studies/pretrain_demo`; shipped in the usual Hugging Face layout.
"""

from __future__ import annotations

from pathlib import Path

DEMO = "demo"


def demo_path() -> Path:
    """Folder with the demo's config, float32 weights, tokenizer and processor."""
    return Path(__file__).parent / "demo_model"
