"""Forged archives of torch.export: made from a real export by changing one thing each, and none of them runs code.

The expectation is independent of the check: a payload leaves a file behind, and there must be none.
"""

from __future__ import annotations

import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._export.serde.schema import SCHEMA_VERSION

import eas_search as eas
from eas_search.exceptions import StorageError, UnsupportedModelError
from eas_search.export import ExportJob, export_student, write_manifest
from eas_search.export.formats.pt2_graph import first_refused_string
from eas_search.export.formats.torch_export import check_archive

GRAPH, WEIGHTS = "model/models/model.json", "model/data/weights/model_weights_config.json"
CONSTANTS = "model/data/constants/model_constants_config.json"
Entries = dict[str, bytes]


class Touch:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def export(
    llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder of the format."""
    folder = tmp_path_factory.mktemp("torch-export")
    export_student(ExportJob(student_of(llama, "routed"), prompts), folder, "torch-export")
    return folder


@pytest.fixture(scope="module")
def genuine(export: Path) -> Entries:
    """The entries of its archive."""
    with zipfile.ZipFile(export / "model.pt2") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What a payload leaves behind."""
    return tmp_path / "mark"


@pytest.fixture
def refused(tmp_path: Path, mark: Path, export: Path, genuine: Entries) -> Callable[..., None]:
    """A function: an archive with these entries is refused in one line, by `verify` as well, and runs nothing."""

    def check(entries: Entries, *more: tuple[str, bytes], match: str = "do not load it") -> None:
        path = pack(tmp_path / "model.pt2", entries, *more)
        with pytest.raises(StorageError, match=match) as error:
            check_archive(path)
        assert "\n" not in str(error.value)
        content = path.read_bytes()
        original = (export / "model.pt2").read_bytes()
        try:
            (export / "model.pt2").write_bytes(content)
            write_manifest(export)
            with pytest.raises(StorageError):
                eas.verify(export)
        finally:
            (export / "model.pt2").write_bytes(original)
            write_manifest(export)
        assert not mark.exists()

    return check


def pack(path: Path, entries: Entries, *more: tuple[str, bytes]) -> Path:
    """A zip file with entries whose names may be ones that `zipfile` would tidy up."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in [*entries.items(), *more]:
            entry = zipfile.ZipInfo("x")
            entry.filename = name
            archive.NameToInfo.clear()  # it warns of names that are there already
            archive.writestr(entry, content)
    return path


def load_as_torch_does(path: Path) -> None:
    """Without any check; whatever goes wrong."""
    inputs = torch.ones(2, 8, dtype=torch.long)
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.load(path).module()(inputs, inputs)


ENTRIES = """
model/data/weights/model.pt|model/data/constants/model.pt|model/data/weights/weight_0.pt|model/data/sample_inputs/b.pt
model/data/constants/opaque_obj_0|model/data/constants/custom_obj_0|model/data/constants/weight_0
model/data/aotinductor/model/x.wrapper.so|model/data/aotinductor/model/weights_config.json|model/data/aotinductor/
model/models/other.json|model/models/model.json.bak|model/models/model|model/models/|model/models/sub/model.json
model/MODELS/model.json|model/Data/weights/weight_0|MODEL/archive_format|model/Archive_Version|Model/data/weights/model.pt
version|model|serialized_state_dict.json|serialized_constants.pt|serialized_example_inputs.pt|extra_files/x
model/version|model/extra/module_info.json|model/extra/x|model/data/executorch/x.pte|model/data/mtia/x
model/xl_model_weights/model_param_config|model/code/x.py|model/constants.pkl|model/data.pkl|model/.data/x|model/data/x
/model/archive_format|//archive_format|/etc/passwd|C:/x|../x|../model/byteorder|./model/byteorder|model/../byteorder
model/./byteorder|model//byteorder|model/data/weights/../constants/opaque_obj_0|model/data/weights/weight_0/
model/data/weights/weight_-1|model/data/weights/weight_|model/data/weights/weight_٣|model/data/weights/weight_0 x
model\\data\\weights\\weight_0|other/archive_format|other/byteorder|model /byteorder| model/byteorder
"""


@pytest.mark.parametrize("name", [name for line in ENTRIES.strip().splitlines() for name in line.split("|")])
def test_an_entry_that_no_export_has(genuine: Entries, refused: Callable[..., None], mark: Path, name: str) -> None:
    refused(genuine, (name, pickle.dumps(Touch(mark))), match="holds the entry")


@pytest.mark.parametrize("name", ["model/byteorder\0.so", "model/byteorder\n", "model/data/weights/weight_0\r", ""])
def test_an_entry_whose_name_is_cut_off(genuine: Entries, refused: Callable[..., None], mark: Path, name: str) -> None:
    refused(genuine, (name, pickle.dumps(Touch(mark))))


def test_an_entry_that_is_there_twice_or_not_at_all(genuine: Entries, refused: Callable[..., None], mark: Path) -> None:
    for name in (GRAPH, WEIGHTS, "model/data/sample_inputs/model.pt", "model/data/weights/weight_0", "model/byteorder"):
        refused(genuine, (name, pickle.dumps(Touch(mark))), match="twice")
        others = {other: content for other, content in genuine.items() if other != name}
        if name not in ("model/byteorder", "model/data/weights/weight_0"):
            refused(others, match="has no")
    refused({name: c for name, c in genuine.items() if name != "model/data/weights/weight_0"}, match="keeps")
    refused({}, match="has no|no readable")


@pytest.mark.parametrize("content", [b"pt3", b"", b"PT2", b"pt2\n"])
def test_another_layout(genuine: Entries, refused: Callable[..., None], content: bytes) -> None:
    refused({**genuine, "model/archive_format": content}, match="layout")
    refused({**genuine, "model/archive_version": content or b"1"}, match="layout")


def test_the_layout_of_torch_2_7(genuine: Entries, refused: Callable[..., None], mark: Path, tmp_path: Path) -> None:
    """Its state dictionary is a pickle; the lists of tensors that ours has are there to be found."""
    payload = pickle.dumps(Touch(mark))
    former = {
        "version": ".".join(map(str, SCHEMA_VERSION)).encode(),
        "serialized_exported_program.json": genuine[GRAPH],
        "serialized_state_dict.json": payload,
        "serialized_constants.json": b"",
        "serialized_example_inputs.pt": b"",
        "x/weights_config.json": b'{"config": {}}',
        "x/constants_config.json": b'{"config": {}}',
    }
    refused(former)
    for name, content in former.items():
        refused(genuine, (name, content))
    refused({**genuine, GRAPH: b"{}"}, *former.items())
    load_as_torch_does(pack(tmp_path / "former.pt2", former))
    assert mark.exists(), "torch refuses this layout by now: the attack is none"


def changed(content: bytes, change: Callable[[Any], object]) -> bytes:
    """JSON after `change` has been made to it in place."""
    value = json.loads(content)
    change(value)
    return json.dumps(value).encode()


@pytest.mark.parametrize("config", [WEIGHTS, CONSTANTS])
def test_a_tensor_that_is_no_raw_tensor(
    genuine: Entries, refused: Callable[..., None], mark: Path, tmp_path: Path, config: str
) -> None:
    first = next(iter(json.loads(genuine[config])["config"].values()))
    file = f"{config.rpartition('/')[0]}/{first['path_name']}"
    payload = {file: pickle.dumps(Touch(mark))}
    changes: list[dict[str, Any]] = [
        {"use_pickle": value} for value in (True, 1, "false", [0], {"a": 1}, 0, None, "")
    ] + [
        {"path_name": value}
        for value in ("opaque_obj_0", "custom_obj_0", f"../weights/{first['path_name']}", f"/{first['path_name']}",
                      f"./{first['path_name']}", first["path_name"].upper(), "tensor_99", "weight_99", "", "tensor_0/",
                      "model_weights_config.json", ["tensor_0"], None, f"{first['path_name']}\0")
    ]  # fmt: skip
    for change in changes:
        content = changed(genuine[config], lambda value, new=change: next(iter(value["config"].values())).update(new))
        refused({**genuine, **payload, config: content}, match="do not load it|no readable")
    for wrong in (b"", b"[]", b"{}", b'{"config": []}', b'{"config": {"a": {}}}', b'{"config": {"a": 1}}', b"\xff\xfe"):
        refused({**genuine, config: wrong}, match="do not load it|no readable")
    pickled = changed(genuine[config], lambda value: next(iter(value["config"].values())).update(use_pickle=True))
    load_as_torch_does(pack(tmp_path / "pickled.pt2", {**genuine, **payload, config: pickled}))
    assert mark.exists(), "torch refuses pickled tensors by now: the attack is none"


def test_sample_inputs(genuine: Entries, refused: Callable[..., None], mark: Path) -> None:
    refused({**genuine, "model/data/sample_inputs/model.pt": pickle.dumps(Touch(mark))}, match="would unpickle")


def nodes(program: Any) -> Any:
    """The operators of a graph."""
    return program["graph_module"]["graph"]["nodes"]


def call(target: str, *arguments: dict[str, Any]) -> dict[str, Any]:
    """An operator whose result nobody needs."""
    inputs = [{"name": "", "arg": argument, "kind": 1} for argument in arguments]
    return {"target": target, "inputs": inputs, "outputs": [], "metadata": {}, "name": "called"}


def strings(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all strings in JSON, keys included as (…, key, None)."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if isinstance(value, str):
        yield place
    for key, content in items:
        if isinstance(key, str):
            yield (*place, key, None)
        yield from strings(content, (*place, key))


def kind_of(place: tuple[Any, ...]) -> str:
    """The last steps to a place without numbers and without names of tensors and sizes."""
    steps = [
        "*" if before in ("tensor_values", "sym_int_values", "range_constraints") and step is not None else str(step)
        for before, step in zip((None, *place), place, strict=False)
        if not isinstance(step, int)
    ]
    return "/".join(steps[-4:])


# In source: an expression; a statement after a line break; what follows a quoted name.
PAYLOADS = (
    "__import__('pathlib').Path({!r}).touch()",
    "x\n    __import__('pathlib').Path({!r}).touch()\n    y",
    'x"), __import__("pathlib").Path({!r}).touch(), ("',
)


@pytest.mark.parametrize("payload", PAYLOADS, ids=["expression", "statement", "quoted"])
def test_no_string_of_the_graph_becomes_code(genuine: Entries, mark: Path, tmp_path: Path, payload: str) -> None:
    """One string of every kind in turn: refused, or loaded and called as text."""
    code = payload.format(str(mark))
    program = json.loads(genuine[GRAPH])
    kinds: dict[str, tuple[Any, ...]] = {}
    for place in strings(program):
        kinds.setdefault(kind_of(place), place)
    assert len(kinds) > 50
    accepted = []
    for place in kinds.values():
        forged = json.loads(genuine[GRAPH])
        *way, last = place[:-1] if place[-1] is None else place
        owner = forged
        for step in way:
            owner = owner[step]
        if place[-1] is None:
            owner[code] = owner.pop(last)
        else:
            owner[last] = code
        if first_refused_string(forged) is not None:
            continue
        accepted.append(place)
        load_as_torch_does(pack(tmp_path / "model.pt2", {**genuine, GRAPH: json.dumps(forged).encode()}))
        assert not mark.exists(), place
    assert {"metadata", "as_string"} >= {
        next(step for step in reversed(place) if step in ("metadata", "as_string")) for place in accepted
    }


def graph_attacks(mark: Path) -> dict[str, Callable[[Any], object]]:
    """By what they do: changes to a graph that make torch run code while loading or calling it, or nearly."""
    touch, text = f"__import__('pathlib').Path({str(mark)!r}).touch()", {"as_string": str(mark)}
    tree = {"type": "collections.defaultdict", "children_spec": [], "context": json.dumps(
        {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []})}  # fmt: skip

    def first_expression(program: Any, new: str) -> None:
        for values in program["graph_module"]["graph"]["tensor_values"].values():
            for size in values["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = new
                    return

    def root(program: Any) -> Any:
        return program["graph_module"]["module_call_graph"][0]["signature"]

    def expressions() -> Iterator[str]:
        yield touch
        yield f"Max({touch!r}, 1)"
        yield f"Symbol({touch!r})"
        yield f"Symbol('s0', positive={touch})"
        yield f"Add(Symbol('s0'), {touch})"
        yield "Symbol('s0').__class__"
        yield "eval('1')"
        yield "(lambda: 1)()"
        yield "[1 for s0 in (1,)]"
        yield "Max(*s0)"
        yield "Max(**s0)"
        yield "s0[0]"
        yield "S('1')"
        yield "sympify('1')"
        yield "f'{1}'"
        yield "Integer('1')"
        yield "ｅval(1)"

    targets = (
        "torch.os.mkdir", "torch.ops.aten.save.default", "torch.ops.aten.from_file.default", "torch.ops.load_library",
        "torch.ops.aten.__class__.mro", "torch.ops.aten.add.__class__", "torch.ops.aten.add.Tensor.__call__",
        "torch.ops.aten.add", "torch.ops.aten", "torch.ops.aten.add.nothing", "torch.ops.aten.nothing.default",
        "torch.load", "torch.hub.load", "torch.compile", "torch.classes.load_library", "torch._C._jit_pass_inline",
        "_operator.call", "_operator.methodcaller", "_operator.attrgetter", "_operator", "operator.add",
        "math.__loader__.load_module", "math.trunc.__self__", "builtins.eval", "os.system", "#x:y", "",
        "torch.ops.higher_order.triton_kernel_wrapper_mutation", "torch.ops.higher_order.call_torchbind",
        "torch.ops.profiler._record_function_enter.default", "torch.ops.prim.Print.default",
        "torch.ops.aten.add.Tensor ", "torch.ops.aten.add.Tensor\n", "torch/ops/aten/add/Tensor",
        "_operatorx.add", "torchx.os.mkdir",
    )  # fmt: skip
    attacks: dict[str, Callable[[Any], object]] = {
        **{f"target {t!r}": lambda p, t=t: nodes(p).append(call(t, text)) for t in targets},
        **{f"expression {e!r}": lambda p, e=e: first_expression(p, e) for e in expressions()},
        "operator as argument": lambda p: nodes(p).append(call("_operator.getitem", {"as_operator": "torch.os.mkdir"})),
        "operator in a graph of a graph": lambda p: nodes(p).append(
            call("torch.ops.higher_order.cond", {"as_graph": {"name": "g", "graph": {
                **p["graph_module"]["graph"], "nodes": [call("torch.os.mkdir", text)]}}})),
        "custom object": lambda p: p["graph_module"]["graph"]["custom_obj_values"].update(
            x={"name": "x", "class_fqn": "x"}),
        "custom object as argument": lambda p: nodes(p).append(
            call("_operator.getitem", {"as_custom_obj": {"name": "x", "class_fqn": "x"}})),
        "named tuple": lambda p: p["graph_module"]["treespec_namedtuple_fields"].update(x={"field_names": ["a"]}),
        "tree of a module": lambda p: root(p).update(in_spec=json.dumps([1, tree])),
        "tree of outputs": lambda p: root(p).update(out_spec=json.dumps([1, tree])),
        "tree with keyword arguments": lambda p: root(p).update(in_spec=json.dumps([1, {
            "type": "builtins.dict", "context": json.dumps([touch]), "children_spec": []}])),
        "tree of another protocol": lambda p: root(p).update(in_spec=root(p)["in_spec"].replace("[1", "[2", 1)),
        "guard": lambda p: p["guards_code"].append(touch),
        "guard behind an input": lambda p: p["guards_code"].append(f"L['x'].size()[0] == {touch}"),
        "private attribute": lambda p: p["graph_module"]["signature"]["input_specs"][0]["parameter"].update(
            parameter_name="__class__.forward"),
        "metadata": lambda p: nodes(p)[0]["metadata"].update(unknown="x"),
        "metadata that is no text": lambda p: nodes(p)[0]["metadata"].update(stack_trace={"x": "y"}),
    }  # fmt: skip
    return attacks


def test_a_graph_that_is_more_than_operators_on_tensors(
    genuine: Entries, refused: Callable[..., None], mark: Path
) -> None:
    for name, change in graph_attacks(mark).items():
        forged = {**genuine, GRAPH: changed(genuine[GRAPH], change)}
        assert forged[GRAPH] != genuine[GRAPH], name
        try:
            refused(forged, match="in its graph; expected operators of aten|in its graph")
        except pytest.fail.Exception:
            pytest.fail(f"{name} passes")
    for wrong in (b"", b"\xff", b"[" * 10**5, b"[]" * 2, json.dumps({"a": [[]] * 3}).encode("utf-16")):
        refused({**genuine, GRAPH: wrong}, match="no readable")


def test_torch_alone_runs_an_expression(genuine: Entries, mark: Path, tmp_path: Path) -> None:
    """Should a later torch not, the check is stricter than it needs to be."""
    change = next(change for said, change in graph_attacks(mark).items() if said.startswith("expression"))
    load_as_torch_does(pack(tmp_path / "model.pt2", {**genuine, GRAPH: changed(genuine[GRAPH], change)}))
    assert mark.exists()


def test_two_directories_in_one_file(genuine: Entries, mark: Path, tmp_path: Path) -> None:
    """Python finds the directory of a zip file by its size, torch by its offset: here are two, with equal names."""
    attack = next(change for name, change in graph_attacks(mark).items() if name.startswith("expression"))
    pack(tmp_path / "fine", genuine)
    pack(tmp_path / "evil", {**genuine, GRAPH: changed(genuine[GRAPH], attack) + b" " * 1000})
    parts = []
    for name in ("evil", "fine"):
        content = (tmp_path / name).read_bytes()
        size, offset = struct.unpack("<II", content[-10:-2])
        parts.append((content[:offset], content[offset : offset + size], content[-22:]))
    (evil, evil_list, end), (fine, fine_list, _) = parts
    assert len(evil_list) == len(fine_list)
    assert len(evil) >= len(fine)
    moved, at = bytearray(fine_list), 0
    while at < len(moved):  # offsets of local headers, as Python adds the length of what it takes for a prefix
        (place,) = struct.unpack_from("<I", moved, at + 42)
        struct.pack_into("<I", moved, at + 42, place + len(evil) - len(fine))
        at += 46 + sum(struct.unpack_from("<HHH", moved, at + 28))
    path = tmp_path / "model.pt2"
    path.write_bytes(evil + evil_list + fine + bytes(moved) + end)
    with zipfile.ZipFile(path) as archive:
        assert archive.read(GRAPH) == genuine[GRAPH]
    assert torch._C.PyTorchFileReader(str(path)).get_record("models/model.json") != genuine[GRAPH]
    with pytest.raises(StorageError, match=r"in its graph"):
        check_archive(path)
    assert not mark.exists()
    load_as_torch_does(path)
    assert mark.exists()


def test_what_it_wrote_itself_passes(export: Path, genuine: Entries, tmp_path: Path) -> None:
    """Packed anew, under another root, and with guards, as exports made with torch alone have them."""
    check_archive(export / "model.pt2")
    check_archive(pack(tmp_path / "a.pt2", genuine))
    check_archive(pack(tmp_path / "b.pt2", {name.replace("model/", "other-1/", 1): c for name, c in genuine.items()}))
    guards = ["L['tensors'][0].size()[1] == L['tensors'][1].size()[1]", "(-1)*L['tensors'][0].size()[0] >= -8"]
    guards += ["L['tensors'][0].size()[1]*min(32, 32*L['tensors'][0].size()[1]) == 64"]
    content = changed(genuine[GRAPH], lambda program: program.update(guards_code=guards))
    check_archive(pack(tmp_path / "c.pt2", {**genuine, GRAPH: content}))
    assert json.loads(genuine[GRAPH])["guards_code"] == []


def test_a_graph_that_would_be_refused_is_not_written(
    llama: Any, prompts: dict[str, Tensor], student_of: Callable[..., Any], write: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    save = torch.export.save
    monkeypatch.setattr(torch.export, "save", lambda program, path: save(program, path, extra_files={"x": "y"}))
    with pytest.raises(UnsupportedModelError, match=r"archive of LlamaForCausalLM holds the entry .*another format"):
        write(student_of(llama, "ffn"), prompts, "torch-export")


def test_a_graph_that_torch_cannot_read_is_refused_in_one_line(
    genuine: Entries, refused: Callable[..., None], export: Path, tmp_path: Path
) -> None:
    from eas_search.export.formats.torch_export import TorchExportFormat

    content = changed(genuine[GRAPH], lambda program: program["schema_version"].update(major=99))
    pack(tmp_path / "model.pt2", {**genuine, GRAPH: content})
    with pytest.raises(StorageError, match=r"cannot be read by torch .*export again") as error:
        TorchExportFormat().load(tmp_path, {"inputs": [], "outputs": []}, None)
    assert "\n" not in str(error.value)
