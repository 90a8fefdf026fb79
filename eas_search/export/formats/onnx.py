"""`onnx`: the prefill as an ONNX graph, compared with onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from eas_search.exceptions import UnsupportedModelError
from eas_search.export.formats.base import Verdict, Writing
from eas_search.export.formats.tracing import Graph, GraphFormat, trace

MODEL, PACKAGES = "model.onnx", ("onnx", "onnxscript", "onnxruntime")


class OnnxFormat(GraphFormat):
    """The graph for onnxruntime and everything else that reads ONNX."""

    name: ClassVar[str] = "onnx"
    summary: ClassVar[str] = "the prefill as one graph for onnxruntime"
    library: ClassVar[str] = "onnx"
    usage: ClassVar[str] = (
        "import onnxruntime\n\n"
        'session = onnxruntime.InferenceSession("path/to/this/folder/model.onnx")\n'
        "logits, *_ = session.run(None, {name: array for name, array in inputs.items()})  # prefill only"
    )

    def plan(self, student: Any) -> Verdict:
        """See the class; three further packages are needed."""
        if missing := [name for name in PACKAGES if find_spec(name) is None]:
            return Verdict("impossible", f"needs {', '.join(missing)}: pip install 'eas-search[onnx]'")
        return super().plan(student)

    def write(self, job: Writing) -> dict[str, Any]:
        """`model.onnx` and, beside it, its weights."""
        program, facts = trace(job.merged, job.prompts)
        graph = program.graph_module.graph
        for node in list(graph.nodes):
            if "assert" in str(node.target):  # checks of the traced model, for which ONNX has no operator
                graph.erase_node(node)
        graph.eliminate_dead_code()
        try:
            with _quiet():
                torch.onnx.export(
                    program, (), job.folder / MODEL, dynamo=True, verbose=False,
                    input_names=facts["inputs"], output_names=facts["outputs"],
                )  # fmt: skip
        except Exception as error:  # an operator without a translation, of whatever kind
            reason = " ".join(str(error.__cause__ or error).split())[:160]
            raise UnsupportedModelError(
                f"{type(job.merged).__name__} cannot be written as ONNX ({reason}); choose another format"
            ) from error
        return {"merged": True, **facts}

    def load(self, folder: Path, content: Mapping[str, Any], base: nn.Module | None) -> nn.Module:
        """A session of onnxruntime on the CPU."""
        if find_spec("onnxruntime") is None:
            raise UnsupportedModelError("verifying ONNX needs onnxruntime: pip install 'eas-search[onnx]'")
        import onnxruntime

        session = onnxruntime.InferenceSession(str(folder / MODEL), providers=["CPUExecutionProvider"])
        known = {given.name for given in session.get_inputs()}  # the graph drops inputs that change nothing

        def run(values: list[Tensor]) -> list[Tensor]:
            named = {n: v.cpu().numpy() for n, v in zip(content["inputs"], values, strict=True) if n in known}
            return [torch.from_numpy(array) for array in session.run(None, named)]

        return Graph(run, content)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress, its notes on optional packages and what it deprecates in itself."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
