"""Which samples every skip set of the demo answers rightly, with closed-form PIAs and no training per set.

    python studies/bench_tabular/build.py [--table deletion] [--free 8 --output FOLDER]

With the default four thousand sets it takes about a quarter of an hour on two quiet cores; run again, it goes on behind
the chunks of samples that are finished.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

from eas_search.joint_training import one_shot_scores
from eas_search.plugins import load_plugins
from eas_search.redundancy import Passes
from eas_search.redundancy.bandit import bandit_scores
from eas_search.settings import SearchSettings
from eas_search.supernet import Supernet
from eas_search.training import sample_scores, seeded
from eas_search.workbench import Workbench

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from record import load_config, write_result  # noqa: E402
from supernets import start as start_supernet  # noqa: E402
from tree import as_tree  # noqa: E402

SPLITS = ("validation", "selection", "test")
BANDIT_UPDATES, BANDIT_BATCH = 60, 32
_opened: list[tuple[Workbench, Supernet]] = []  # of a worker process, which scores many chunks of one table


def open_bench(config: dict[str, Any], table: dict[str, Any]) -> tuple[Workbench, Supernet]:
    """The model with its samples, and a supernet of the wanted rank."""
    samples = {name: config[name] for name in SPLITS}
    load_plugins([str(HERE / "families.py")])
    task = table.get("task", config["task"])
    space = {"towers": table.get("towers", ["text"])}
    settings = SearchSettings(model=config["model"], task=task, seed=table["seed"], samples=samples, space=space)
    bench = Workbench.open(settings)
    student = bench.space.student.model_copy(update={"pia_dim": table["pia_dim"]})
    with seeded(settings.seed):
        return bench, Supernet(bench.model, bench.sites, student)


def prepare(bench: Workbench, supernet: Supernet, kept: Path) -> None:
    """Light adapters of the adapter-only baseline, and the closed-form start of PIAs beside them; or what is kept."""
    if kept.exists():
        supernet.load_adapters(load_tensors(kept))
        return
    start_supernet(bench, supernet)
    temporary = kept.with_suffix(".tmp")
    save_tensors(supernet.adapters(), temporary)
    temporary.rename(kept)


@torch.no_grad()
def score_chunk(config: dict[str, Any], table: dict[str, Any], free: int, work: Path, split: str, start: int) -> None:
    """Score the samples from `start` on under all skip sets and keep the result."""
    file = work / f"{split}-{start:05d}.safetensors"
    if file.exists():
        return
    torch.set_num_threads(1)
    if not _opened:
        _opened.append(open_bench(config, table))
        prepare(*_opened[0], work / "adapters.safetensors")
    bench, supernet = _opened[0]
    samples = list(bench.splits[split].batches(config["chunk"]))[start // config["chunk"]]
    supernet.model.eval()
    others, right = [supernet.host(site) for site in supernet.sites if site.tower != "text"], []
    with as_tree(supernet, free - len(others)) as tree:
        for number in range(2 ** len(others)):  # the decoder's whole tree for every skip set of the other towers
            for bit, host in enumerate(others):
                host.skipping = bool(number >> bit & 1)
            tree.expect(samples["labels"])
            supernet.model(**samples, use_cache=False)
            right.append(tree.right.numpy())
    temporary = file.with_suffix(".tmp")
    # Packed along the sets; safetensors takes an array's memory as it lies, whatever its strides say.
    save_file({"right": np.ascontiguousarray(np.packbits(np.concatenate(right, axis=1), axis=1))}, temporary)
    temporary.rename(file)


def rankings(bench: Workbench, supernet: Supernet) -> dict[str, dict[str, Any]]:
    """Every redundancy metric: its scores by site, and the samples that it saw (forward passes times batch).

    A backward pass counts as two forward passes.
    """
    sites, seen = len(bench.sites), bench.settings.supernet.bandit_batch
    split = bench.splits["validation"].subset(seen)
    scores = one_shot_scores(bench, supernet)
    made = {"leave_one_out": sites + 1, "kl": sites + 1, "taylor": 3, "last_k": 0, "random": 0}
    found = {name: {"scores": values, "samples": seen * made.get(name, 1)} for name, values in scores.items()}
    batches = list(split.batches(BANDIT_BATCH))
    passes = Passes(supernet, batches)
    bandit = bandit_scores(passes, bench.settings.supernet.bandit, BANDIT_UPDATES, bench.settings.seed)
    drawn = BANDIT_UPDATES * bench.settings.supernet.bandit.candidates
    return {**found, "bandit": {"scores": bandit, "samples": drawn * BANDIT_BATCH}}


def digest(bench: Workbench) -> str:
    """Of the model's weights: finished chunks of another model are not taken."""
    sha = hashlib.sha256()
    for name, tensor in bench.model.state_dict().items():
        sha.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:12]


def check(bench: Workbench, supernet: Supernet, right: dict[str, np.ndarray], count: int, free: int) -> None:
    """Compare some skip sets with the ordinary scoring, which knows nothing of shared prefixes."""
    rng = np.random.default_rng(0)
    for number in rng.choice(2**free, size=count, replace=False).tolist():
        fixed = len(bench.sites) - free
        supernet.set_skips(bench.sites[fixed + bit].index for bit in range(free) if number >> bit & 1)
        plain = sample_scores(supernet.model, bench.splits["validation"]).numpy()
        different = int((plain != right["validation"][number].astype(bool)).sum())
        # Batches of another size are rounded differently; a near tie may turn.
        assert different <= len(plain) // 200, f"set {number}: {different} of {len(plain)} answers differ"
    supernet.set_skips(())


def main() -> None:
    """Build a table and write it beside its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config = load_config(HERE)
    parser.add_argument("--table", choices=list(config["tables"]), default=next(iter(config["tables"])))
    parser.add_argument("--free", type=int, default=12, help="only the last FREE sites may be skipped: 2^FREE sets")
    parser.add_argument("--output", type=Path, default=HERE, help="whose results folder gets the table")
    options = parser.parse_args()
    table, begin = config["tables"][options.table], time.perf_counter()
    bench, supernet = open_bench(config, table)
    others = sum(site.tower != "text" for site in bench.sites)
    if not others <= options.free <= len(bench.sites):
        parser.error(f"--free is {options.free}; expected {others} to {len(bench.sites)} for table {options.table!r}")
    work = options.output / "work" / f"{options.table}-{options.free}-{digest(bench)}"
    work.mkdir(parents=True, exist_ok=True)
    prepare(bench, supernet, work / "adapters.safetensors")
    metrics = rankings(bench, supernet)
    chunks = [(split, start) for split in SPLITS for start in range(0, config[split], config["chunk"])]
    jobs = (delayed(score_chunk)(config, table, options.free, work, *chunk) for chunk in chunks)
    for done, _ in enumerate(Parallel(config["jobs"], return_as="generator_unordered")(jobs), start=1):
        print(f"{done}/{len(chunks)} chunks of samples, {time.perf_counter() - begin:.0f} s", flush=True)
    kept = {chunk: load_file(work / f"{chunk[0]}-{chunk[1]:05d}.safetensors")["right"] for chunk in chunks}
    right = {
        split: np.unpackbits(np.concatenate([kept[chunk] for chunk in chunks if chunk[0] == split]), axis=1).T
        for split in SPLITS
    }
    check(bench, supernet, right, config["checked_sets"], options.free)
    content = {
        "seed": table["seed"],
        "table": {**table, "name": options.table, "free": options.free},
        "samples": {split: config[split] for split in SPLITS},
        "sites": [site.name for site in bench.sites],
        "towers": [site.tower for site in bench.sites],
        "rankings": metrics,
        "weights": digest(bench),
        "seconds": time.perf_counter() - begin,
    }
    (options.output / "results").mkdir(parents=True, exist_ok=True)
    record = write_result(options.output, f"table-{options.table}", content, bench.hardware)
    save_file(
        {split: np.ascontiguousarray(np.packbits(bits, axis=1)) for split, bits in right.items()},
        record.with_suffix(".safetensors"),
    )
    shutil.rmtree(work)
    print("wrote", record.name, "and", record.with_suffix(".safetensors").name)


if __name__ == "__main__":
    main()
