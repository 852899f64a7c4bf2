"""Small changes of a source file, each such as a programmer makes by mistake.

A change replaces the text of one expression or statement, so that everything else stays as it was written. Left out is
what no test should pin: annotations, decorators, texts and what makes them (errors, warnings, ``__repr__``, prints),
and what is read by type checkers only.
"""

from __future__ import annotations

import ast
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["KINDS", "Change", "changes", "is_program"]

#: what a change does, by its kind
KINDS = {
    "operator": "another arithmetic operator: + and -, * and /, ** and *, // and %",
    "sign": "a minus dropped, or put before a product or quotient",
    "constant": "a number one larger, a fraction doubled, True for False",
    "comparison": "the bound in or out, the direction turned, equal and unequal, in and not in",
    "condition": "a condition negated, and for or",
    "term": "a term or a factor dropped",
    "axis": "another dimension",
    "function": "min for max, sum for mean, floor for ceil and their like; `detach` left out",
    "statement": "a call whose value is not used, or a change in place, left out",
}
_BINARY: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.Pow: ("**", "*"),
    ast.FloorDiv: ("//", "%"),
    ast.Mod: ("%", "//"),
}
_COMPARED: dict[type[ast.cmpop], tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">")),
    ast.LtE: ("<=", ("<", ">=")),
    ast.Gt: (">", (">=", "<")),
    ast.GtE: (">=", (">", "<=")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
}
_PAIRS = (
    ("min", "max"),
    ("amin", "amax"),
    ("argmin", "argmax"),
    ("minimum", "maximum"),
    ("clamp_min", "clamp_max"),
    ("floor", "ceil"),
    ("any", "all"),
    ("sum", "mean"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
    ("sin", "cos"),
)
_FUNCTIONS = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
#: methods and functions of tensors whose first number after the tensor is a dimension
_OVER_AXES = frozenset(
    """sum mean cumsum cumprod prod logsumexp softmax log_softmax amax amin argmax argmin any all std var unsqueeze
    squeeze flatten unflatten cat stack movedim transpose flip sort argsort index_select gather norm""".split()  # noqa: SIM905
)
_TEXT = ("print", "echo", "warn", "warn_where_few", "secho")
_TEXT_FUNCTIONS = ("__repr__", "__str__", "_repr_html_", "_repr_mimebundle_", "__rich__", "__format__")


@dataclass(frozen=True, order=True)
class Change:
    """One change of a file: its bytes ``start`` to ``end`` replaced by ``text``.

    Attributes:
        line: where it begins, from 1.
        kind: one of :data:`KINDS`.
        first, last: lines of the statement, less those of statements in it.
        function: dotted name of the function or class around it; "" in the module itself.
        scope: "body" where functions run it; "default", "class" or "module" where the import does.
    """

    line: int
    start: int
    end: int
    text: str
    kind: str
    first: int
    last: int
    function: str
    scope: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]


def changes(source: bytes) -> list[Change]:
    """All changes of a file, in their order; :func:`is_program` says of each whether it leaves a program."""
    return sorted(set(_Finder(source).run(ast.parse(source))))


def is_program(change: Change, source: bytes) -> bool:
    """Does a change leave valid Python, and another program?"""
    try:
        changed = ast.parse(change.apply(source))
    except SyntaxError:
        return False
    return ast.dump(changed) != ast.dump(ast.parse(source))


class _Finder:
    """Walks a module and lists changes; knows in which function and statement it is."""

    def __init__(self, source: bytes) -> None:
        self._source = source
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self._names: list[str] = []
        self._scope = "module"
        self._rows = (1, 1)

    def run(self, tree: ast.Module) -> Iterator[Change]:
        for node in tree.body:
            yield from self._statement(node)

    # where things are

    def _at(self, line: int, column: int) -> int:
        return self._lines[line - 1] + column

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return self._at(node.lineno, node.col_offset), self._at(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self._source[start:end].decode()

    def _change(self, kind: str, start: int, end: int, text: str) -> Change:
        line = bisect_right(self._lines, start)
        first, last = self._rows
        return Change(line, start, end, text, kind, first, last, ".".join(self._names), self._scope)

    def _replaced(self, kind: str, node: ast.AST, text: str) -> Change:
        return self._change(kind, *self._span(node), text)

    def _between(self, left: ast.AST, right: ast.AST, old: str, new: str, kind: str) -> Iterator[Change]:
        """The operator between two operands, replaced."""
        start, end = self._span(left)[1], self._span(right)[0]
        place = self._source.find(old.encode(), start, end)
        if place >= 0:
            yield self._change(kind, place, place + len(old.encode()), new)

    # statements

    def _statement(self, node: ast.stmt) -> Iterator[Change]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from self._definition(node)
            return
        if isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom, ast.Assert)) or _for_type_checkers(node):
            return
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return
        if isinstance(node, ast.Expr) and (isinstance(node.value, ast.Constant) or _is_text(node.value)):
            return
        bodies = [v for name in ("body", "orelse", "finalbody") for v in getattr(node, name, [])]
        bodies += [s for handler in getattr(node, "handlers", []) for s in handler.body]
        bodies += [s for case in getattr(node, "cases", []) for s in case.body]
        last = node.end_lineno if not bodies else max(node.lineno, min(s.lineno for s in bodies) - 1)
        self._rows = (node.lineno, last or node.lineno)
        if isinstance(node, (ast.AugAssign, ast.Expr)) and self._scope == "body" and not _is_yield(node):
            yield self._replaced("statement", node, "pass")
        if isinstance(node, ast.AugAssign) and type(node.op) in _BINARY:
            old, new = _BINARY[type(node.op)]
            yield from self._between(node.target, node.value, f"{old}=", f"{new}=", "operator")
        if isinstance(node, (ast.If, ast.While)):
            yield from self._negated(node.test)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr) and child is not getattr(node, "annotation", None):
                yield from self._expression(child)
            elif isinstance(child, ast.withitem):
                yield from self._expression(child.context_expr)
        for statement in bodies:
            yield from self._statement(statement)

    def _definition(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> Iterator[Change]:
        if node.name in _TEXT_FUNCTIONS:
            return
        scope, self._names = self._scope, [*self._names, node.name]
        if isinstance(node, ast.ClassDef):
            self._scope = "class"
        else:
            if scope != "body":
                self._scope = "default"
            self._rows = (node.lineno, max(node.lineno, node.body[0].lineno - 1))
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                if default is not None:
                    yield from self._expression(default)
            self._scope = "body"
        for statement in node.body:
            yield from self._statement(statement)
        self._scope, self._names = scope, self._names[:-1]

    def _negated(self, test: ast.expr) -> Iterator[Change]:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            yield self._replaced("condition", test, f"({self._text(test.operand)})")
        else:
            yield self._replaced("condition", test, f"(not ({self._text(test)}))")

    # expressions

    def _expression(self, node: ast.expr) -> Iterator[Change]:
        if isinstance(node, ast.JoinedStr) or _is_text(node):
            return
        yield from self._here(node)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                if not self._is_axis(node, child):
                    yield from self._expression(child)
            elif isinstance(child, ast.keyword):
                if child.arg not in ("dim", "dims", "axis") or not _number(child.value):
                    yield from self._expression(child.value)
            elif isinstance(child, ast.comprehension):
                yield from self._expression(child.iter)
                for test in child.ifs:
                    yield from self._negated(test)
                    yield from self._expression(test)
            elif isinstance(child, ast.arguments):  # of a lambda
                for default in [*child.defaults, *child.kw_defaults]:
                    if default is not None:
                        yield from self._expression(default)

    def _here(self, node: ast.expr) -> Iterator[Change]:
        match node:
            case ast.BinOp():
                yield from self._binary(node)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                yield self._replaced("sign", node, f"({self._text(operand)})")
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield self._replaced("condition", node, f"bool({self._text(operand)})")
            case ast.Constant(value=value):
                yield from self._constant(node, value)
            case ast.Compare(ops=[op], comparators=[right]) if type(op) in _COMPARED:
                old, others = _COMPARED[type(op)]
                for new in others:
                    yield from self._between(node.left, right, old, new, "comparison")
            case ast.BoolOp(op=op, values=values):
                old, new = ("and", "or") if isinstance(op, ast.And) else ("or", "and")
                parts = f" {new} ".join(f"({self._text(v)})" for v in values)
                yield self._replaced("condition", node, f"({parts})")
            case ast.IfExp(test=test):
                yield from self._negated(test)
            case ast.Call():
                yield from self._call(node)
            case _:
                pass

    def _binary(self, node: ast.BinOp) -> Iterator[Change]:
        sides = (node.left, node.right)
        if type(node.op) not in _BINARY or any(
            isinstance(s, (ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp, ast.Starred))
            or (isinstance(s, ast.Constant) and isinstance(s.value, str))
            for s in sides
        ):
            return
        old, new = _BINARY[type(node.op)]
        left, right = (self._text(s) for s in sides)
        yield from self._between(*sides, old, new, "operator")
        if isinstance(node.op, (ast.Add, ast.Sub)):
            yield self._replaced("term", node, f"({left})")
            yield self._replaced("term", node, f"({right})" if isinstance(node.op, ast.Add) else f"(-({right}))")
        if isinstance(node.op, (ast.Mult, ast.Div)):
            yield self._replaced("sign", node, f"(-({self._text(node)}))")
            yield self._replaced("term", node, f"({left})")
            if isinstance(node.op, ast.Mult):
                yield self._replaced("term", node, f"({right})")

    def _constant(self, node: ast.expr, value: object) -> Iterator[Change]:
        if isinstance(value, bool):
            yield self._replaced("constant", node, str(not value))
        elif isinstance(value, int):
            yield self._replaced("constant", node, str(value + 1))
        elif isinstance(value, float):
            yield self._replaced("constant", node, repr(2.0 * value) if value else "1.0")

    def _call(self, node: ast.Call) -> Iterator[Change]:
        for axis in self._axes(node):
            value = ast.literal_eval(axis)
            yield self._replaced("axis", axis, "-1" if value == 0 else "0")
            if abs(value) > 1:
                yield self._replaced("axis", axis, str(value - 1 if value > 0 else value + 1))
        name = node.func
        if isinstance(name, ast.Attribute):
            if name.attr in _FUNCTIONS:
                end = self._span(name)[1]
                yield self._change("function", end - len(name.attr), end, _FUNCTIONS[name.attr])
            if name.attr == "detach" and not node.args:
                yield self._replaced("function", node, self._text(name.value))
        elif isinstance(name, ast.Name) and name.id in ("min", "max", "any", "all"):
            yield self._replaced("function", name, _FUNCTIONS[name.id])

    def _axes(self, node: ast.Call) -> list[ast.expr]:
        """The dimensions among a call's arguments that are written as numbers."""
        found = [k.value for k in node.keywords if k.arg in ("dim", "axis") and _number(k.value)]
        if isinstance(node.func, ast.Attribute) and node.func.attr in _OVER_AXES:
            of_module = isinstance(node.func.value, ast.Name) and node.func.value.id in ("torch", "np")
            place = 1 if of_module else 0
            found += [a for a in node.args[place : place + 1] if _number(a)]
        return found

    def _is_axis(self, parent: ast.expr, child: ast.expr) -> bool:
        return isinstance(parent, ast.Call) and child in self._axes(parent)


def _number(node: ast.expr) -> bool:
    """Is it a whole number, as it is written?"""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) is int


def _is_text(node: ast.expr) -> bool:
    """Does it say something to a reader: a print, a warning, an error?"""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    return name in _TEXT or name.endswith(("Error", "Warning"))


def _is_yield(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, (ast.Yield, ast.YieldFrom, ast.Await))


def _for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
