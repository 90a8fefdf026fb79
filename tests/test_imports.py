"""Imports point down only, importing the package is light, and nothing in it runs code that it reads from a file."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import eas_search

ROOT = Path(eas_search.__file__).parent

# Top to bottom. A name is a module or a folder of the package; it may import names of lower lines and itself, and names
# of one line do not know each other. Below the package's own __init__ is only what runs when it is imported.
LAYERS = [
    "cli",
    "run",
    "study | sites_table | break_even",
    "finalists | racing | prediction",
    "objective | stages | conversion",
    "joint_training",
    "workbench | redundancy | samplers | report | export",
    "search_space | supernet | site_survey | origin | asked_proof",
    "twin_proof",
    "settings | warm_start | merging | proof | rungs | cost_book | kept_adapters",
    "setting_groups",
    "skipping | training | latency | measures | ffn_folding | costs | front_statistics | expected_front",
    "blocks | folding | tasks | reuse",
    "stand_ins | feature_cache | prefix_sharing | conditions",
    "parts",
    "hooks",
    "context | pia | lora | plain_attention",
    "cache | architectures | models",
    "distillation | asked",
    "pooling | masks",
    "skip_config | head | dispatch | bandit | fingerprints",
    "__init__",
    "auto_classes | plugins | stage_folder | study_file | full_disk",
    "exceptions | import_hook | names | copying",
]
LEVEL = {name: level for level, line in enumerate(LAYERS) for name in line.split(" | ")}
FORBIDDEN = {
    "pickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "joblib.load",
    "torch.load",
    "pandas.read_pickle",
    "pd.read_pickle",
    "eval",
    "exec",
    "compile",
}
READER = "models.official"  # reads published checkpoints, restricted to tensors


def modules() -> dict[str, Path]:
    """Dotted name below the package → file; a folder's __init__ is the folder."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            names |= {
                full if full.removeprefix("eas_search.") in MODULES else node.module or ""
                for full in (f"{node.module}.{alias.name}" for alias in node.names)
            }
    own = {name for name in names if name.split(".")[0] == "eas_search"}
    return {name.removeprefix("eas_search").removeprefix(".") or "__init__" for name in own}


GRAPH = {name: imported(path) for name, path in MODULES.items()}


def unit(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def test_every_module_has_its_layer() -> None:
    assert {unit(module) for module in MODULES} == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    own = unit(module)
    upward = {name for name in GRAPH[module] if unit(name) != own and LEVEL[unit(name)] <= LEVEL[own]}
    assert not upward, f"{module} imports {sorted(upward)}, which is not below it"


def test_modules_import_in_no_cycle() -> None:
    TopologicalSorter(GRAPH).prepare()  # raises CycleError with the cycle


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = (
        "import sys, eas_search; print([m for m in ('torch', 'transformers', 'plotly', 'optuna') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    for name in eas_search.__all__:
        assert getattr(eas_search, name) is not None
    assert set(eas_search.__all__) <= set(dir(eas_search))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = eas_search.nothing


def only_tensors(call: ast.Call) -> bool:
    """Whether a call of torch.load says weights_only=True."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}.get("weights_only")
    return isinstance(given, ast.Constant) and given.value is True


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("module", MODULES)
def test_no_module_executes_what_it_reads(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        used: set[str] = set()
        if isinstance(node, ast.Import):
            used = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used = {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call):
            used = {dotted(node.func)}
            if module == READER and used == {"torch.load"} and only_tensors(node):
                continue
        assert not used & FORBIDDEN, f"{module}:{getattr(node, 'lineno', '?')} uses {sorted(used & FORBIDDEN)}"
