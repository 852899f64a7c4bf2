"""The house's rules for its tests: short ids, no names that are private to the package, no clock, no signal."""

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))
#: what a test may touch though its name is private, and why
ALLOWED = {
    "os._exit",  # of the standard library: a process that ends without handlers
    "sys._getframe",  # of the standard library: who asked for a random number
}
#: plants bugs inside the package, to see that the theory's checks find them
PLANTING = {"test_power.py"}
#: calls whose outcome depends on how fast the machine is, or on who started the process
CLOCKS = {"time.sleep", "time.monotonic", "time.perf_counter", "time.time", "os.kill"}
#: a real process is killed at a random moment in them: they wait for a file, and are slow tests
WAITING = {"test_damaged_files.py"}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute of a name, else only what follows its dots."""
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def of_others(tree: ast.Module) -> list[str]:
    """Private names of other modules that a file imports, reads, sets or patches: all but those of ``self``, ``cls``
    and what it defines itself."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and dotted(node.value).split(".")[0] not in ("self", "cls"):
            names = [node.attr] if dotted(node) not in ALLOWED else []
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("setattr", "delattr"):  # monkeypatch's
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            names = [part for text in texts for part in text.split(".")]
        if isinstance(node, ast.Attribute) and node.attr == "__setattr__":
            found.append(f"line {node.lineno}: object.__setattr__ (of a frozen object)")
        found += [f"line {node.lineno}: {name}" for name in names if private(name) and name not in own]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_private_name_of_another_module_is_used(path: Path) -> None:
    assert not of_others(parsed(path)) or path.name in PLANTING


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_clock_and_no_signal(path: Path) -> None:
    calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    waits = {dotted(call.func) for call in calls} & CLOCKS
    assert not waits or path.name in WAITING, waits


def test_ids_are_short_and_name_no_object(collected_ids) -> None:
    bad = [name for name in (i.partition("::")[2] for i in collected_ids) if len(name) > 100]
    bad += [name for name in collected_ids if re.search(r"<lambda>|<function|0x[0-9a-f]{6}| object at ", name)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "text",
    [
        "from sdecontrol.methods.socm import _State",
        "control._laws.clear()",
        "held.record._x = 1",
        "monkeypatch.setattr(base, '_REGISTRY', {})",
        "monkeypatch.setattr('sdecontrol.library.samples._make', None)",
        "object.__setattr__(method, 'draw', None)",
    ],
)
def test_a_private_name_is_seen(text: str) -> None:
    assert of_others(ast.parse(text))


def test_own_names_may_be_private() -> None:
    assert not of_others(ast.parse("class A:\n    def f(self):\n        self._x = A._g\n\n    def _g(): ..."))
