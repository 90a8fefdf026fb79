"""The page and its plots, on an invented study: what it says, that it is honest, that nothing breaks out."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from plotly.offline import get_plotlyjs

from eas_search.exceptions import StorageError
from eas_search.report import figures, labels
from eas_search.report.axes import Axes
from eas_search.report.close_up import close_up
from eas_search.report.front import hypervolume, knee_point, non_dominated
from eas_search.report.headline import chosen_point, headline
from eas_search.report.page import PageData, render_page, write_page
from eas_search.report.skip_map import skip_map


def invented_study(
    layers: int = 12, finalists: int = 7, towers: tuple[str, ...] = ("text",), gain: float = 0.6
) -> PageData:
    """A study whose accuracy falls slowly, then fast; `gain` is the share of time attention takes."""
    rng = np.random.default_rng(layers)
    total = layers * len(towers)
    sites = [
        {
            "index": t * layers + i,
            "name": f"{tower}_model.layers.{i}.self_attn",
            "tower": tower,
            "redundancy": float(np.exp(-((i / layers - 0.6) ** 2) / 0.06) + 0.15 * rng.random()),
        }
        for t, tower in enumerate(towers)
        for i in range(layers)
    ]
    redundancy = np.array([site["redundancy"] for site in sites])
    order = np.argsort(-redundancy)

    def measure(skip: tuple[int, ...], noise: float, spread: float) -> dict[str, Any]:
        share = (1.3 - redundancy)[list(skip)].sum() / (1.3 - redundancy).sum()
        latency = 1 - gain * len(skip) / total + noise * 0.4 * rng.normal()
        accuracy = 0.842 - 0.6 * share**2 - 0.02 * share + noise * rng.normal()
        return {
            "skip": skip,
            "skip_names": tuple(sites[i]["name"] for i in skip),
            "placement": "parallel",
            "pia_dim": int(rng.choice([16, 32, 64])),
            "accuracy": float(np.clip(accuracy, 0, 1)),
            "latency": latency,
            "latency_low": latency - spread,
            "latency_high": latency + spread,
            "kv_bytes": 1024 * (total - len(skip)),
        }

    rows = []
    for number in range(50):
        count = 1 + number % (total - 2) if number < total else int(rng.integers(1, total - 1))
        keys = redundancy + (rng.normal(scale=0.35, size=total) if number >= total else 0)
        skip = tuple(sorted(int(i) for i in (np.argsort(-keys) if number >= total else order)[:count]))
        origin = "ranking prefix" if number < total else rng.choice(["front: swap", "random"])
        rows.append(
            {
                "number": number,
                "state": "COMPLETE",
                **measure(skip, 0.01, 0.02),
                "seconds": 21.5,
                "redundancy": float(redundancy[list(skip)].mean()),
                "origin": str(origin),
            }
        )
    trials = pd.DataFrame(rows)
    failed = {
        "number": 50,
        "state": "FAIL",
        "skip": (0,),
        "skip_names": (sites[0]["name"],),
        "pia_dim": 32,
        "placement": "parallel",
        "kv_bytes": 0,
        "seconds": 1.0,
        "origin": "random",
    }
    trials = pd.concat([trials, pd.DataFrame([failed])], ignore_index=True)

    picked = trials[non_dominated(trials["accuracy"], trials["latency"])].sort_values("latency")
    picked = picked.iloc[np.unique(np.linspace(0, len(picked) - 1, finalists).astype(int))] if finalists else picked[:0]
    front = pd.DataFrame(
        [
            {
                "number": row["number"],
                **measure(row["skip"], 0.004, 0.012 if gain else 0.03),
                "parameters": 162_000_000 - 2_400_000 * len(row["skip"]),
            }
            for row in picked.to_dict("records")
        ]
    )
    if not front.empty:
        for side, sign in (("low", -1), ("high", 1)):
            front[f"accuracy_{side}"] = front["accuracy"] + sign * 0.011
        front["decode_latency"] = 1 - 0.8 * (1 - front["latency"])
        front["decode_latency_low"], front["decode_latency_high"] = (
            front["decode_latency"] - 0.02,
            front["decode_latency"] + 0.02,
        )
        front["on_front"] = non_dominated(front["accuracy"], front["latency"])
        front["chosen"] = np.arange(len(front)) == knee_point(front["accuracy"], front["latency"])
        front["config"] = [
            {
                "skip": list(row["skip_names"]),
                "pia_dim": row["pia_dim"],
                "placement": "parallel",
                "pooling": "prompt",
                "router": "static",
                "adapter_dim": 0,
                "identity": "noop",
            }
            for row in front.to_dict("records")
        ]
    baseline = {
        "zero_shot_accuracy": 0.61,
        "accuracy": 0.846,
        "accuracy_low": 0.835,
        "accuracy_high": 0.857,
        "prefill_ms": 41.3,
        "decode_ms": 9.87,
        "kv_bytes": 1024 * total,
        "parameters": 162_000_000,
        "latency": 1.0,
    }
    summary = {
        "study_name": "demo-colours",
        "model": "embedded demo",
        "task": "objects in pictures",
        "seed": 0,
        "budget": 50,
        "completed": 50,
        "hypervolume": hypervolume(trials["accuracy"], trials["latency"]),
        "wall_clock": {"baseline": 12.1, "supernet": 181.0, "trials": 1075.0, "front": 244.0, "export": 6.2},
        "versions": {"eas-search": "0.1.0", "python": "3.13.5", "torch": "2.10.0", "transformers": "5.3.0"},
        "hardware": {"processor": "Example CPU, 8 cores", "accelerator": "none", "memory": "16 GiB"},
        "conditions": {
            "precision": "float32",
            "batch size": "8",
            "prompt length": "96 tokens",
            "threads": "8",
        },
    }
    notes = (
        "Accuracy: 95 % Wilson interval over the held-out samples.",
        "Latency: 95 % bootstrap interval of the median ratio over interleaved runs.",
    )
    return PageData(trials, front, baseline, sites, summary, "runs/demo colours", notes)


class Reader(HTMLParser):
    """Collects the tags with their attributes, the visible text and the contents of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text.append(data)
        elif self._inside[-1] == "script":
            self.scripts.append(data)

    def payload(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def page_headline(data: PageData) -> str:
    return headline(data.front, data.baseline, len(data.sites), data.summary).replace("\u00a0", " ")


@pytest.fixture(scope="module")
def study() -> PageData:
    return invented_study()


@pytest.fixture(scope="module")
def page(study: PageData) -> Reader:
    return Reader(render_page(study))


def with_chosen(data: PageData, **values: Any) -> PageData:
    front = data.front.copy()
    for key, value in values.items():
        front.loc[front["chosen"], key] = value
    return dataclasses.replace(data, front=front)


def test_headline_claims_a_significant_speedup(study: PageData) -> None:
    data = with_chosen(study, latency=0.8, latency_low=0.78, latency_high=0.82, accuracy=0.84 * 0.846)
    count = len(chosen_point(data.front)["skip"])  # type: ignore[index]
    assert page_headline(data) == (
        f"Skipping {count} of 12 attentions keeps 84 % of the baseline's accuracy and makes prefill 1.25× faster."
    )


def test_headline_claims_nothing_within_the_noise(study: PageData) -> None:
    data = with_chosen(invented_study(gain=0.0), accuracy=0.84599)
    assert page_headline(data).startswith("No significant speed-up was found. Skipping ")
    assert "keeps 99.9 % of" in page_headline(data)  # rounded down
    assert "not significant" in " ".join(Reader(render_page(data)).text)
    noisy = page_headline(with_chosen(study, latency=0.9, latency_low=0.7, latency_high=1.0))
    assert "without a significant speed-up; other points of the front reach" in noisy


def test_headline_of_unusual_studies(study: PageData) -> None:
    lost = {"accuracy_change_low": -0.03, "accuracy_change_high": -0.01}
    assert "of the baseline's accuracy (a significant loss)" in page_headline(with_chosen(study, accuracy=0.8, **lost))
    unsure = {"accuracy_change_low": -0.03, "accuracy_change_high": 0.01}
    assert "accuracy (no significant loss)" in page_headline(with_chosen(study, accuracy=0.8, **unsure))
    assert labels.trainings([0.948, 0.942, 0.951]) == "3 trainings: 94.7 ± 0.5\u00a0%"
    assert labels.trainings([0.948]) == labels.trainings(None) == ""
    assert labels.points(-0.012, -0.023, 0.001) == "−1.2 (−2.3 to +0.1) points"
    assert "costs no accuracy (85.0 % against 84.6 %)" in page_headline(with_chosen(study, accuracy=0.85))
    assert page_headline(invented_study(finalists=0)) == ("No finalist was measured yet: 50 of 50 trials are done.")


def test_knee_is_described_when_nothing_is_marked(study: PageData) -> None:
    front = study.front.assign(chosen=False)
    knee = front.iloc[knee_point(front["accuracy"], front["latency"])]
    assert chosen_point(front)["number"] == knee["number"]  # type: ignore[index]


def test_panel_has_the_configuration_of_every_finalist(study: PageData, page: Reader) -> None:
    payload = page.payload()
    points = payload["points"]
    for row in study.front.to_dict("records"):
        point = points[str(row["number"])]
        assert json.loads(point["config"]) == row["config"]
        assert point["complete"]
        assert shlex.split(point["command"]) == [
            "eas-search", "export", "runs/demo colours", "--trial", str(row["number"])
        ]  # fmt: skip
    assert points[payload["selected"]]["kind"] == "chosen"
    assert "50" not in points  # the failed trial


def test_panel_of_a_trial_has_the_fields_that_were_searched(study: PageData, page: Reader) -> None:
    others = study.trials[~study.trials["number"].isin(study.front["number"])]
    row = others.iloc[0]
    point = page.payload()["points"][str(row["number"])]
    expected = {"skip": list(row["skip"]), "pia_dim": row["pia_dim"], "placement": "parallel"}
    assert json.loads(point["config"]) == expected
    assert not point["complete"]


def test_every_point_of_the_plots_can_be_clicked(page: Reader) -> None:
    payload = page.payload()
    for themes in payload["figures"].values():
        for trace in themes["light"]["data"]:
            for number in np.ravel(trace.get("customdata", []) if isinstance(trace.get("customdata"), list) else []):
                assert str(number) in payload["points"]


def test_page_requests_nothing(page: Reader) -> None:
    addresses = {"src", "href", "srcset", "action", "data", "poster", "background", "formaction"}
    found = [value for _, attrs in page.tags for key, value in attrs.items() if key in addresses]
    assert found == ["data:,"]
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy


@pytest.mark.parametrize("axes", [Axes(), Axes(costs=("kv_bytes",))])
def test_the_close_up_shows_what_keeps_most_of_the_score_and_its_bars(study: PageData, axes: Axes) -> None:
    found = close_up(study.trials, study.front, study.baseline, axes)
    assert found is not None
    (left, right), (low, high) = found["x"], found["y"]
    assert (left < right) == (axes.cost == "latency")  # less is further right
    whole, kept = study.baseline["accuracy"], 0
    for table, ends in ((study.trials[study.trials["state"] == "COMPLETE"], ("",)), (study.front, ("_low", "_high"))):
        for row in table.to_dict("records"):
            if row["accuracy"] < 0.9 * whole:
                continue
            kept += 1
            assert all(low < row[f"accuracy{end}"] < high for end in ends)
            x = [1 / row[f"latency{end}"] for end in ends]
            x = x if axes.cost == "latency" else [row["kv_bytes"] / study.baseline["kv_bytes"]]
            assert all(min(left, right) < one < max(left, right) for one in x)
    assert 1 < kept < len(study.trials)
    assert low > study.trials["accuracy"].min()


def test_there_is_no_close_up_where_it_would_be_everything_or_nothing(study: PageData) -> None:
    def buttons(data: PageData) -> int:
        return sum(attrs.get("id") == "near" for _, attrs in Reader(render_page(data)).tags)

    assert buttons(study) == 1
    good = study.trials["accuracy"] >= 0.9 * study.baseline["accuracy"]
    front = study.front[study.front["accuracy"] >= 0.9 * study.baseline["accuracy"]]
    assert buttons(dataclasses.replace(study, trials=study.trials[good], front=front)) == 0
    poor = study.front[study.front["accuracy"] < 0.9 * study.baseline["accuracy"]]
    assert buttons(dataclasses.replace(study, front=poor)) == 0
    assert buttons(dataclasses.replace(study, front=pd.DataFrame())) == 0


def test_names_are_never_markup(study: PageData) -> None:
    attack = "<script>alert(1)</script>"
    summary = {**study.summary, "study_name": attack, "model": attack, "task": "</script><img src=x>",
               "hardware": {attack: attack}}  # fmt: skip
    sites = [{**site, "name": f"{attack}.{site['index']}", "tower": attack} for site in study.sites]
    front = study.front.copy()
    front["config"] = [{"skip": [attack, "</script>"]} for _ in range(len(front))]
    data = dataclasses.replace(
        study, summary=summary, sites=sites, front=front, trials=study.trials.assign(origin=attack),
        run_dir="$(touch x) </script>", interval_notes=(attack,),
    )  # fmt: skip
    text = render_page(data)
    read = Reader(text)
    assert attack not in text
    assert [tag for tag, _ in read.tags].count("script") == 3
    assert "img" not in [tag for tag, _ in read.tags]
    assert attack in read.text  # shown, as text
    payload = read.payload()
    point = payload["points"][payload["selected"]]
    assert json.loads(point["config"]) == {"skip": [attack, "</script>"]}
    assert shlex.split(point["command"])[2] == "$(touch x) </script>"
    assert "<script" not in json.dumps(payload["figures"])  # plotly reads some markup in its labels


@pytest.mark.parametrize(
    "data",
    [
        invented_study(finalists=1),
        invented_study(finalists=0),
        invented_study(layers=12, towers=("vision", "text")),
        dataclasses.replace(invented_study(finalists=0), front=pd.DataFrame(), trials=pd.DataFrame()),
        dataclasses.replace(invented_study(), trials=invented_study().trials.query("state == 'FAIL'")),
    ],
    ids=["one finalist", "no finalist", "24 sites", "nothing", "all failed"],
)
def test_unusual_studies_have_a_page(data: PageData) -> None:
    payload = Reader(render_page(data)).payload()
    assert ("skip-map" in payload["figures"]) == (not data.front.empty)
    assert (payload["selected"] is None) == data.front.empty


def test_missing_values_become_a_dash(study: PageData) -> None:
    front = study.front.assign(decode_latency=np.nan, decode_latency_low=np.nan, decode_latency_high=np.nan)
    baseline = {**study.baseline, "kv_bytes": 0, "decode_ms": None, "zero_shot_accuracy": None}
    sites = [{**site, "redundancy": None} for site in study.sites]
    data = dataclasses.replace(
        study, front=front, baseline=baseline, sites=sites, trials=study.trials.assign(redundancy=None)
    )
    text = " ".join(Reader(render_page(data)).text)
    assert "nan" not in text.lower().split()
    assert "KV cache saved" not in text


def test_write_page_replaces_whole_files(study: PageData, tmp_path: Path) -> None:
    target = tmp_path / "new" / "pareto.html"
    write_page(study, target)
    write_page(study, target)
    assert [p.name for p in target.parent.iterdir()] == ["pareto.html"]
    assert target.read_text(encoding="utf-8").endswith("</html>")
    with pytest.raises(StorageError, match=r"cannot write the page .*--output"):
        write_page(study, target / "below-a-file.html")


def test_front_is_drawn_as_steps_in_speedup(study: PageData) -> None:
    steps = next(t for t in figures.trade_off(study.trials, study.front, study.baseline, study.sites).data
                 if t.mode == "lines")  # fmt: skip
    expected = study.front[study.front["on_front"]].sort_values("latency", ascending=False)
    assert np.allclose(steps.x, 1 / expected["latency"])
    assert (np.diff(steps.x) > 0).all()
    assert (np.diff(steps.y) < 0).all()


def test_skip_map_shows_the_skip_sets(study: PageData) -> None:
    heat = skip_map(study.front, study.sites).data[1]
    ordered = study.front[study.front["on_front"]].sort_values("latency")
    shown = [tuple(int(i) for i in np.flatnonzero(row)) for row in heat.z]
    assert shown == ordered["skip"].tolist()


def test_skip_map_shows_a_chosen_point_that_is_off_the_front(study: PageData) -> None:
    off = study.front.index[study.front["on_front"] & study.front["chosen"]][0]
    front = study.front.assign(on_front=study.front["on_front"] & (study.front.index != off))
    assert np.array_equal(skip_map(front, study.sites).data[1].z, skip_map(study.front, study.sites).data[1].z)


def test_progress_ends_at_the_hypervolume_of_all_trials(study: PageData) -> None:
    values = figures.progress(study.trials).data[0].y
    assert values[-1] == pytest.approx(study.summary["hypervolume"])
    assert (np.diff(values) >= 0).all()


def test_labels() -> None:
    assert labels.speedup(0.8) == "1.25×"
    assert labels.speedup(0.998) == "1.002×"
    assert labels.speedup_interval(0.8, 1.0) == "1.00–1.25×"
    assert labels.percent(0.8125).replace("\u00a0", " ") == "81.2 %"
    assert [labels.size(n).replace("\u00a0", " ") for n in (0, 1023, 14336, 3 << 30)] == [
        "0 B", "1023 B", "14.0 KiB", "3.0 GiB"
    ]  # fmt: skip
    assert [labels.duration(s).replace("\u00a0", " ") for s in (59.9, 59.96, 3725)] == [
        "59.9 s", "1 min 0 s", "1 h 2 min"
    ]  # fmt: skip
    assert {f(None) for f in (labels.percent, labels.speedup, labels.size, labels.duration, labels.quantity)} == {"–"}


def test_site_labels_are_unique_within_a_tower() -> None:
    names = [
        "encoder.layer.0.attention",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.encoder_attn",
        "pool",
    ]
    towers = ["image", "text", "text", "text"]
    sites = [{"index": i, "name": n, "tower": t} for i, (n, t) in enumerate(zip(names, towers, strict=True))]
    assert labels.site_labels(sites) == ["0", "0a", "0b", "3"]
    assert labels.skip_text((0, 2), sites) == "image 0 · text 0b"
    assert labels.skip_text((), sites) == "none"
    plain = [{"index": i, "name": f"layers.{i}.attn", "tower": "text"} for i in range(9)]
    assert labels.skip_text((0, 2, 3, 5, 6, 7), plain) == "0, 2, 3, 5–7"
    assert labels.skip_text((3, 5, 6, 7), plain[3:]) == "3, 5–7"  # the first sites of the model were not searched


def test_site_labels_count_layers_where_names_hold_further_numbers() -> None:
    """T5 numbers the parts of a block as well; Swin's blocks start at 0 in every stage."""
    names = [f"encoder.block.{i}.layer.0.SelfAttention" for i in range(24)]
    names += [
        f"decoder.block.{i}.layer.{j}.{kind}"
        for i in range(24)
        for j, kind in enumerate(("SelfAttention", "EncDecAttention"))
    ]
    sites = [{"index": i, "name": name, "tower": "text"} for i, name in enumerate(names)]
    expected = [f"{i}a" for i in range(24)] + [f"{i}{letter}" for i in range(24) for letter in "bc"]
    assert labels.site_labels(sites) == expected
    assert labels.skip_text((1, 3, 5, 24, 27), sites) == "1a, 3a, 5a, 0b, 1c"
    # Without the first decoder block's own attention its other one is still called as those below it.
    assert labels.site_labels([*sites[:24], *sites[25:28]])[24:] == ["0b", "1c", "1b"]
    swin = [
        f"encoder.layers.{stage}.blocks.{i}.attention" for stage, blocks in enumerate((2, 3)) for i in range(blocks)
    ]
    rows = [{"index": i, "name": name, "tower": "image"} for i, name in enumerate(swin)]
    assert labels.site_labels(rows) == ["0.0", "0.1", "1.0", "1.1", "1.2"]
    assert labels.site_labels(rows[2:]) == ["0", "1", "2"]
    many = [{"index": i, "name": f"layers.{k}.kind_{i % 40}", "tower": "text"} for k in (0, 1) for i in range(40)]
    assert len(set(labels.site_labels(many))) == 80
    assert all(label.isalnum() and label.isascii() for label in labels.site_labels(many))


def test_sites_that_were_not_searched_have_no_place_on_the_page(study: PageData) -> None:
    moved = [{**site, "index": site["index"] + 4} for site in study.sites]
    front = study.front.assign(skip=[tuple(i + 4 for i in skip) for skip in study.front["skip"]])
    assert np.array_equal(skip_map(front, moved).data[1].z, skip_map(study.front, study.sites).data[1].z)
    trials = study.trials.assign(skip=[tuple(i + 4 for i in skip) for skip in study.trials["skip"]])
    page = render_page(dataclasses.replace(study, trials=trials, front=front, sites=moved))
    assert "layers.0.self_attn" in page


def test_the_page_speaks_of_the_tasks_own_score(study: PageData) -> None:
    name = "token <likelihood>"
    data = dataclasses.replace(study, summary={**study.summary, "metric": name, "conditions": {}}, interval_notes=())
    page = render_page(data)
    text = page.replace(get_plotlyjs(), "")
    assert "Token &lt;likelihood&gt; against speed" in text
    assert "of the baseline&#39;s token &lt;likelihood&gt;" in text
    assert name not in text  # neither as markup nor in a label of plotly, which reads some
    payload = json.loads(re.search(r'id="page-data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    plot = payload["figures"]["trade-off"]["light"]
    assert plot["layout"]["yaxis"]["title"]["text"].startswith("Token &lt;likelihood&gt;")
    assert any("held-out token &lt;likelihood&gt;" in str(trace.get("hovertext")) for trace in plot["data"])
    shown = {name for point in payload["points"].values() for name, _ in point["facts"]}
    assert {
        "Token <likelihood>, held-out",
        "Token <likelihood>, validation",
    } < shown  # set as text by the page's script
    plain = render_page(study).replace(get_plotlyjs(), "")
    spoken, usual = (re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S) for page in (text, plain))
    assert "ccuracy" not in spoken
    assert "Accuracy after skipping" in usual
