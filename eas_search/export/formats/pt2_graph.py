"""Whether a serialized graph of `torch.export` can only compute with tensors.

Loading `models/model.json` evaluates its size expressions with `sympy.sympify` (Python's `eval`), looks its operators
up as attributes of `torch`, and writes its names into the source of a Python function that is then executed; guards are
executed too. So every string of it is held against a list of what may stand there, and what the list does not know is
refused. What an operator of torch does with the tensors it is given is left to torch.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

_IDENTIFIER = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]*|")
_DOTTED = re.compile(r"(?!__)[A-Za-z0-9_@+-]+(\.(?!__)[A-Za-z0-9_@+-]+)*|")
_ATEN = re.compile(r"torch\.ops\.aten\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)")
_OTHERS = re.compile(
    r"_operator\.(add|and_|eq|floordiv|ge|getitem|gt|le|lshift|lt|mod|mul|ne|neg|or_|pos|pow|rshift|sub|truediv)"
    r"|math\.trunc|torch\.(_sym_sqrt|sym_float|sym_int|sym_ite|sym_max|sym_min|sym_not)"
    r"|torch\.ops\.higher_order\.(cond|wrap_with_autocast|wrap_with_set_grad_enabled)"
    # Mixtures of experts on processors: tensors in, a tensor out, in Python of the installed transformers.
    r"|torch\.ops\.transformers\.grouped_mm_fallback\.default"
)
_CHARACTERS = re.compile(r"[A-Za-z0-9_ ().,='*+/<>%&|!-]*")
_SYMBOL = re.compile(r"(s|u|zf|zuf)[0-9]+")
_NUMBER = re.compile(r"[0-9.e+-]+")
_INPUT_SIZE = re.compile(r"L(\['[A-Za-z0-9_]+'\]|\[[0-9]+\])+\.(size|stride)\(\)\[[0-9]+\]")
_PYTHON = re.compile(r"\b(min|max)(?=\()")
_NAMES = frozenset({"oo", "int_oo", "true", "false"})
# As `sympy.srepr` writes them; the last lines are those of torch.utils._sympy.functions.
_FUNCTIONS = re.compile(
    "Integer|Float|Rational|Add|Mul|Pow|Max|Min|Abs|floor|ceiling|sqrt|And|Or|Not|ITE|Piecewise|ExprCondPair"
    "|Equality|Unequality|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|Eq|Ne|Lt|Le|Gt|Ge"
    "|FloorDiv|ModularIndexing|Where|PythonMod|Mod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|IntTrueDiv|FloatTrueDiv"
    "|LShift|RShift|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat|FloatPow|PowByNatural|Identity"
)
# Text about a node, which is kept as text.
_ABOUT_A_NODE = frozenset({"stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom"})
_EMPTY = frozenset({"custom_obj_values", "treespec_namedtuple_fields"})
_REFUSED = frozenset({"as_custom_obj", "custom_obj"})


def first_refused_string(program: Any) -> str | None:
    """The first thing in a serialized program that is more than computing with tensors, in words; None: there is none.

    Args:
        program: content of `models/model.json`.
    """
    return next(_refused(program, ""), None)


def _refused(value: Any, key: str) -> Iterator[str]:
    """What is refused in the value of `key`; a list has the key of its owner."""
    if isinstance(value, dict):
        for name, content in value.items():
            if not _DOTTED.fullmatch(name) or name in _REFUSED or (name in _EMPTY and content):
                yield _said("key", name)
            elif name == "metadata":
                yield from _refused_metadata(content)
            else:
                yield from _refused(content, name)
    elif isinstance(value, list):
        for content in value:
            yield from _refused(content, key)
    elif isinstance(value, str):
        if not _RULES.get(key, _is_dotted)(value):
            yield _said(key, value)
    elif not (value is None or isinstance(value, (bool, int, float))):
        yield _said(key, str(value))


def _refused_metadata(content: Any) -> Iterator[str]:
    for name, text in content.items():
        if name not in _ABOUT_A_NODE or not isinstance(text, str):
            yield _said("metadata", str(name))


def _said(key: str, value: str) -> str:
    return f"{key or 'entry'} {value[:80]!r}"


def _is_dotted(text: str) -> bool:
    return _DOTTED.fullmatch(text) is not None


def _is_identifier(text: str) -> bool:
    return _IDENTIFIER.fullmatch(text) is not None


@cache
def _operators() -> frozenset[str]:
    """Operators that torch dispatches on tensors, such as `aten::add.Tensor`; not those of TorchScript alone."""
    return frozenset(torch._C._dispatch_get_all_op_names())


def _is_operator(text: str) -> bool:
    """Whether it is an operator of aten that touches no file, or one of the known others."""
    if (found := _ATEN.fullmatch(text)) is None:
        return _OTHERS.fullmatch(text) is not None
    name, overload = found.groups()
    return name != "from_file" and f"aten::{name}{'' if overload == 'default' else '.' + overload}" in _operators()


@cache
def _is_expression(text: str) -> bool:
    """Whether it is arithmetic of sizes and numbers, with known functions only."""
    if not _CHARACTERS.fullmatch(text):
        return False
    try:
        return _is_arithmetic(ast.parse(text, mode="eval").body)
    except SyntaxError:
        return False


def _is_arithmetic(node: ast.AST) -> bool:
    parts: list[Any]
    match node:
        case ast.Constant(value=value):
            return isinstance(value, (bool, int, float))
        case ast.Name(id=name):
            return name in _NAMES or _SYMBOL.fullmatch(name) is not None
        case ast.UnaryOp(operand=operand):
            parts = [operand]
        case ast.BinOp(left=left, right=right):
            parts = [left, right]
        case ast.Compare(left=left, comparators=others):
            parts = [left, *others]
        case ast.BoolOp(values=values):
            parts = values
        # sympy evaluates the strings that any other function is given.
        case ast.Call(func=ast.Name(id="Symbol" | "Float" as name), args=[ast.Constant(value=str(text))]):
            pattern = _SYMBOL if name == "Symbol" else _NUMBER
            return pattern.fullmatch(text) is not None and all(map(_is_option, node.keywords))
        case ast.Call(func=ast.Name(id=name), args=args) if _FUNCTIONS.fullmatch(name):
            parts = [*args, *node.keywords]
        case ast.keyword():
            return _is_option(node)
        case _:
            return False
    return all(map(_is_arithmetic, parts))


def _is_option(option: ast.keyword) -> bool:
    return option.arg is not None and isinstance(option.value, ast.Constant) and isinstance(option.value.value, int)


def _is_guard(text: str) -> bool:
    """Whether it compares sizes of inputs. Guards are Python, in which sympy's Min and Max are `min` and `max`."""
    return _is_expression(_PYTHON.sub(lambda found: found[0].capitalize(), _INPUT_SIZE.sub("s0", text)))


def _is_tree(text: str) -> bool:
    """Whether it is torch's JSON of nested tuples without keyword arguments: the other types may name modules."""
    try:
        protocol, tree = json.loads(text)
    except (ValueError, TypeError):
        return False
    return protocol == 1 and _is_tuple(tree)


def _is_tuple(tree: Any) -> bool:
    match tree:
        case {"type": None, "context": None, "children_spec": [], **rest}:
            return not rest
        case {"type": "builtins.tuple", "context": "null", "children_spec": list(children), **rest}:
            return not rest and all(map(_is_tuple, children))
        case {"type": "builtins.dict", "context": "[]", "children_spec": [], **rest}:
            return not rest
    return False


def _is_anything(_: str) -> bool:
    return True


_RULES: dict[str, Callable[[str], bool]] = {
    "target": _is_operator,
    "as_operator": _is_operator,
    "expr_str": _is_expression,
    "guards_code": _is_guard,
    "in_spec": _is_tree,
    "out_spec": _is_tree,
    "name": _is_identifier,
    "as_name": _is_identifier,
    "forward_arg_names": _is_identifier,
    # An option of an operator, which is quoted wherever it is written into source.
    "as_string": _is_anything,
    "as_strings": _is_anything,
}
