"""Keep the outcome of a finished run as a result of this study.

python studies/digits_vqa/record.py runs/digits-vqa-demo
"""

from __future__ import annotations

import sys
from pathlib import Path

from eas_search.study.outputs import read_json

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from record import write_result  # noqa: E402

run = Path(sys.argv[1])
summary = read_json(run / "summary.json")
hardware = summary.pop("hardware")
content = {"seed": summary["seed"], "summary": summary, "finalists": read_json(run / "pareto.json")}
print("wrote", write_result(HERE, "search", content, hardware).name)
