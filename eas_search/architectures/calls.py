"""How a module of `transformers` is called and what it returns, read from its source."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from eas_search.exceptions import UnsupportedModelError

# What attentions return beside their output, when it is asked for: nobody computes with it.
_OBSERVATIONS = re.compile(r"None|weight|prob|score|matrix|attentions?$")
# A projection, dropout or norm gives a tensor; another module of the attention may give anything.
_INNER_CALL = re.compile(r"self\.(?!\w*(proj|out|dense|drop|norm|fc|linear|wo\b|o\b))\w+")


@dataclass(frozen=True)
class CallForm:
    """The form of a module's `forward`.

    Attributes:
        parameters: names of its arguments in order.
        returns: names of the elements of the returned tuple; None when it returns a bare tensor.
    """

    parameters: tuple[str, ...]
    returns: tuple[str, ...] | None

    def argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The value that a call gave to the parameter `name`, or None."""
        if name in kwargs:
            return kwargs[name]
        position = self.parameters.index(name) if name in self.parameters else len(args)
        return args[position] if position < len(args) else None

    def first(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The hidden states: the first argument."""
        value: Tensor = self.argument(self.parameters[0], args, kwargs)
        return value

    def pack(self, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`output` in the form that callers expect; what `forward` only hands on comes from the call itself."""
        if self.returns is None:
            return output
        return (output, *(self.argument(name, args, kwargs) for name in self.returns[1:]))

    @staticmethod
    def unpack(value: Any) -> Tensor:
        """The output proper.

        Raises:
            UnsupportedModelError: it is no tensor.
        """
        first = value[0] if isinstance(value, tuple) else value
        if not isinstance(first, Tensor):
            raise UnsupportedModelError(
                f"a module returns a {type(first).__name__}; expected a tensor, or a tuple that begins with one: "
                "leave its block's sites in"
            )
        return first

    @property
    def provides(self) -> str | None:
        """Name of a returned value that others compute with and that only this module makes, or None."""
        made = (name for name in (self.returns or ())[1:] if name not in self.parameters)
        return next((name for name in made if not _OBSERVATIONS.search(name)), None)


def call_form(kind: Any) -> CallForm:
    """The form of `kind.forward` for a module class, from its signature and its `return` statements.

    Raises:
        UnsupportedModelError: the source cannot be read, or its returns do not agree.
    """
    return _read_form(kind)


@cache
def _read_form(kind: Any) -> CallForm:
    forward: Any = inspect.unwrap(kind.forward)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError) as error:
        raise UnsupportedModelError(
            f"the source of {kind.__name__}.forward cannot be read; expected plain Python: skip only sites of others"
        ) from error
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    parameters = tuple(name for name in inspect.signature(forward).parameters if name not in ("self", "kwargs", "args"))
    forms = {_elements(node.value, function) for node in _own_returns(function)}
    if len({None if form is None else len(form) for form in forms}) != 1:
        raise UnsupportedModelError(
            f"{kind.__name__}.forward returns values of different forms; expected a tensor or tuples of one length: "
            "skip only sites of other blocks"
        )
    # Returns of one length may differ in what they observe; the longest-named one says what is handed on.
    return CallForm(parameters, max(forms, key=lambda form: sum(map(len, form or ()))))


def _own_returns(function: ast.FunctionDef) -> list[ast.Return]:
    """The function's return statements, without those of functions inside it."""
    found: list[ast.Return] = []
    stack: list[ast.AST] = list(function.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Return):
            found.append(node)
        elif not isinstance(node, ast.FunctionDef | ast.Lambda):
            stack.extend(ast.iter_child_nodes(node))
    return found


def _elements(value: ast.expr | None, function: ast.FunctionDef) -> tuple[str, ...] | None:
    """Names of the elements of a returned tuple; None for a single value."""
    if isinstance(value, ast.List):
        raise UnsupportedModelError(f"{function.name} returns a list; expected a tensor or a tuple: leave it in")
    if isinstance(value, ast.Tuple):
        return tuple(ast.unparse(element) for element in value.elts)
    if isinstance(value, ast.Call) and _INNER_CALL.fullmatch(ast.unparse(value.func)):
        called = ast.unparse(value.func)
        raise UnsupportedModelError(
            f"{function.name} returns whatever {called} returns; expected a tensor or a tuple: declare a pattern whose "
            "attention is the inner module"
        )
    if isinstance(value, ast.BinOp) and isinstance(value.left, ast.Tuple):
        raise UnsupportedModelError(f"{function.name} returns a tuple whose length depends on the call: leave it in")
    if isinstance(value, ast.IfExp):
        # `outputs + (weights,) if wanted else outputs`: weights are not asked for while sites are skipped.
        return _elements(value.orelse, function)
    if isinstance(value, ast.Name):
        assigned = [
            node.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and any(ast.unparse(target) == value.id for target in node.targets)
        ]
        # `outputs = outputs + (…)` only happens on request; the first tuple is what callers always get.
        tuples = [node for node in assigned if isinstance(node, ast.Tuple | ast.IfExp)]
        first = tuples[0] if tuples else None
        if isinstance(first, ast.Tuple) or (isinstance(first, ast.IfExp) and isinstance(first.orelse, ast.Tuple)):
            return _elements(first, function)
        joined = [
            node for node in assigned if isinstance(node, ast.BinOp) and isinstance(node.left, ast.Tuple | ast.List)
        ]
        if joined and isinstance(joined[0], ast.BinOp):
            # `outputs = (first,) + rest`: the rest is only there on request.
            return _elements(joined[0].left, function)
    return None
