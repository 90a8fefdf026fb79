"""Recall at 1, 5 and 10 of an exported model over all pairs of the test split, as it is published.

python studies/flickr30k_meter/recall.py runs/flickr30k_meter/export data/flickr30k [images]
"""

from __future__ import annotations

import sys
from pathlib import Path

import eas_search
from eas_search.models.loading import load_processor
from eas_search.tasks.flickr30k import Flickr30k
from eas_search.tasks.pictures import picture_tensor
from eas_search.tasks.retrieval import recalls, score_matrix
from eas_search.tasks.texts import encode_texts

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from record import print_json, write_result  # noqa: E402


def measure(export: Path, data: Path, limit: int | None) -> dict[str, float]:
    """Recalls of the first `limit` images (None: all) and all of their captions."""
    images = Flickr30k(data, {"pool": 2}).captioned()["test"][:limit]
    model, processor = eas_search.load_pretrained(export), load_processor(str(export))
    captions = [(caption, None) for _, said in images for caption in said]
    texts = encode_texts(processor, captions, 50)
    pictures = picture_tensor(processor, [image for image, _ in images])
    owners = [row for row, (_, said) in enumerate(images) for _ in said]
    return {"images": len(images), "captions": len(captions), **recalls(score_matrix(model, texts, pictures), owners)}


if __name__ == "__main__":
    found = measure(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
    print_json(found)
    print("wrote", write_result(HERE, "recall", found, {"device": "cpu"}).name)
