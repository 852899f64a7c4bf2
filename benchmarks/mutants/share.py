"""How much of the package the theory suite runs: statements in bodies of functions, room by room."""

from __future__ import annotations

import ast
from pathlib import Path

from .draw import SHARED, rooms
from .traces import Traces

__all__ = ["ROOMS", "executed_share"]

#: rooms of which the suite is to run most
ROOMS = ("processes", "chains", "paths", "problems", "controls", "methods", "particles", "evaluation", "exact")


def executed_share(tree: Path, traces: Traces) -> dict[str, dict[str, dict[str, int]]]:
    """Of each room's files: statements in functions, and how many of them some check executed.

    Statements that an import runs (definitions, constants) are not counted, nor docstrings."""
    package = tree / "sdecontrol"
    found = {}
    for room in rooms(package):
        folder = package if room == SHARED else package / room
        found[room] = {}
        for file in sorted(folder.glob("*.py")):
            known = statements(file.read_text())
            lines = traces.lines(file.relative_to(tree).as_posix())
            ran = sum(any(lines.get(row, set()) - {""} for row in range(first, last + 1)) for first, last in known)
            if known:
                found[room][file.stem] = {"statements": len(known), "executed": ran}
    return found


def statements(source: str) -> list[tuple[int, int]]:
    """First and last lines of the statements in functions; of one that holds others, its head."""
    found: dict[tuple[int, int], None] = {}
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in function.body:
                for part in ast.walk(node):
                    if isinstance(part, ast.stmt) and not _says(part):
                        inside = [s.lineno for s in ast.walk(part) if isinstance(s, ast.stmt) and s is not part]
                        last = min([part.end_lineno or part.lineno, *(max(part.lineno, i - 1) for i in inside)])
                        found[part.lineno, last] = None
    return sorted(found)


def _says(node: ast.stmt) -> bool:
    """Is it a docstring, or nothing that runs?"""
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant or isinstance(node, (ast.Pass, ast.Global, ast.Nonlocal))
