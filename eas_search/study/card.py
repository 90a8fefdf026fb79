"""The model card of an export: what was skipped, what it costs, what it gains, and under which conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from eas_search.export import Format
from eas_search.report import labels
from eas_search.report.headline import loss_verdict
from eas_search.skip_config import SkipConfig

_TEMPLATE = """\
---
library_name: {{ kind.library }}
tags: [eas, attention-skipping, efficient-inference]
---

# {{ code(facts.base_model) }} without {{ skipped | length }} of its {{ total }} attentions

{{ code(facts.base_model) }}, adapted to the task {{ code(facts.task) }} by
[EAS](https://arxiv.org/abs/2403.15226). The attention of the layers below is not computed; a small adapter stands
in and is folded into the feed-forward weights.

| | this model | original, adapters only |
|---|---|---|
| held-out {{ facts.metric }} | {{ pct(c.accuracy) }} ({{ pct(c.accuracy_low) }} – {{ pct(c.accuracy_high) }}) | \
{{ pct(b.accuracy) }} ({{ pct(b.accuracy_low) }} – {{ pct(b.accuracy_high) }}) |
{% for name, value in c.breakdown.items() -%}
| {{ code(name) }} | {{ num(value) }} | {{ num(b.breakdown[name]) if name in b.breakdown else "–" }} |
{% endfor -%}
| {{ code(facts.metric) }} against the original, same samples | {{ points(c) }} | |
| prefill time, relative | {{ num(c.latency) }} ({{ num(c.latency_low) }} – {{ num(c.latency_high) }}), \
{{ num(1 / c.latency) }}× faster | 1 |
{% if c.decode_latency is not none -%}
| decode time per token, relative | {{ num(c.decode_latency) }} ({{ num(c.decode_latency_low) }} – \
{{ num(c.decode_latency_high) }}) | 1 |
{% endif -%}
| KV cache, bytes per token | {{ c.kv_bytes }} | {{ b.kv_bytes }} |
| parameters | {{ "{:,}".format(c.parameters) }} | {{ "{:,}".format(b.parameters) }} |

Intervals are 95 %.{{ " There is no significant speed-up." if c.latency_high >= 1 }} \
The latency interval says where a repeated measurement in another process falls.
{% if kind.name != "eas" -%}
Times, KV cache and parameters are those of the merged model (format `eas`).
{% endif %}
## Use

This folder is in the format `{{ kind.name }}`: {{ kind.summary }}.

```python
{{ usage }}
```

{% if kind.generates -%}
`model` is an ordinary `transformers` model: `generate`, KV cache and batching work as usual.
`eas-search evaluate FOLDER` repeats accuracy and latency.
{% endif -%}
`eas-search verify FOLDER` reloads it and compares it with the recorded answers of the trained student.

## What was skipped

{% for name in skipped %}- {{ code(name) }}
{% endfor %}
PIA of rank {{ config.pia_dim }}, placement {{ config.placement }}, router {{ config.router }}, \
pooling {{ config.pooling }}; \
light adapters of rank {{ config.adapter_dim }} on the kept attentions, merged.

## Conditions

{% for name, value in facts.conditions.items() %}- {{ name }}: {{ code(value) }}
{% endfor -%}
{% for name, value in facts.hardware.items() %}- {{ name }}: {{ code(value) }}
{% endfor -%}
- seed: {{ facts.seed }}
- versions: {% for name, value in facts.versions.items() %}{{ name }} {{ value }}{{ ", " if not loop.last }}{% endfor %}

"""


def _code(text: Any) -> str:
    """Text as a Markdown code span: nothing in it is markup, and it cannot leave its line."""
    return "`" + " ".join(str(text).replace("`", "'").split()) + "`"


def _points(claims: Mapping[str, Any]) -> str:
    """The paired difference to the baseline in words."""
    change = labels.points(*(claims[f"accuracy_change{end}"] for end in ("", "_low", "_high")))
    return f"{change}, {loss_verdict(claims)}"


def model_card(
    facts: Mapping[str, Any], skipped: Sequence[str], total: int, config: SkipConfig, kind: Format, usage: str
) -> str:
    """The card as Markdown.

    Args:
        facts: what the export says of itself: base_model, task, claims, baseline, conditions, hardware, versions, seed.
        skipped: names of the skipped sites.
        total: number of searchable sites.
        config: the skip configuration.
        kind: format of the export.
        usage: Python that loads it.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)  # Markdown, see `_code`
    forms = {"code": _code, "points": _points, "pct": lambda share: f"{100 * share:.1f} %", "num": "{:.3f}".format}
    environment.globals.update(forms)
    return environment.from_string(_TEMPLATE).render(
        facts=facts,
        c=facts["claims"],
        b=facts["baseline"],
        skipped=skipped,
        total=total,
        config=config,
        kind=kind,
        usage=usage,
    )
