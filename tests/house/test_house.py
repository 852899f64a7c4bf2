"""The house's own rules: which rooms may import which, no circles, nothing private carried from file to file, short
bodies and signatures."""

import ast
import functools
import re

import pytest
from rooms import FLOORS, IMPORTS, MODULES, ROOT

LONGEST, MOST = 60, 8
#: verbs that users call, whose options are their signature
VERBS = {"compare", "distill", "gibbs_problem", "simulate", "fit_bridge", "fit_masked_diffusion", "fit_score", "solve"}
VERBS |= {"design", "fit_reward", "sample", "diffusion_chain", "from_diffusers"}
#: and a constructor: what a control problem is made of
CONSTRUCTORS = {"problems.problem.__init__"}


def test_rooms_import_from_the_rooms_before_them() -> None:
    floor = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for name, targets in IMPORTS.items():
        room = name.split(".")[0]
        for target in targets:
            other = target.split(".")[0]
            if room != other and room in floor and floor.get(other, -1) >= floor[room]:
                wrong.append(f"{name} imports {target}")
    assert not wrong, wrong


def test_every_folder_is_a_room() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders <= set().union(*FLOORS), folders


def test_no_circle_of_imports() -> None:
    open_, done, circles = [], set(), []

    def visit(name: str) -> None:
        if name in open_:
            circles.append(" -> ".join([*open_[open_.index(name) :], name]))
        elif name not in done:
            open_.append(name)
            for target in IMPORTS.get(name, ()):
                visit(target)
            open_.pop()
            done.add(name)

    for name in MODULES:
        if name != "__init__":
            visit(name)
    assert not circles, circles


def test_no_private_name_is_imported_from_another_file() -> None:
    private = [
        f"{name}: {target}.{what}"
        for name, targets in IMPORTS.items()
        for target, names in targets.items()
        for what in names
        if what.startswith("_") and not what.startswith("__")
    ]
    assert not private, private


@functools.cache
def _functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (name, node) for name, tree in MODULES.items() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    ]


def _body(node: ast.FunctionDef) -> int:
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def _parameters(node: ast.FunctionDef) -> int:
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len(names) - (bool(names) and names[0] in ("self", "cls"))


@pytest.mark.parametrize("room", sorted(set().union(*FLOORS)))
def test_bodies_and_signatures_are_short(room: str) -> None:
    long = [
        f"{name}.{node.name}: {_body(node)} lines, {_parameters(node)} parameters"
        for name, node in _functions()
        if name.startswith(f"{room}.")
        and f"{name}.{node.name}" not in CONSTRUCTORS
        and (_body(node) > LONGEST or (_parameters(node) > MOST and node.name not in VERBS and room != "cli"))
    ]
    assert not long, long


#: kinds of chains, references and problems, and the names they go by
KINDS = re.compile(
    r"\b(\w*Chain|\w*SDE|\w*Langevin|\w*Problem|TimeChanged|Reference|Pretrained|LearnedStart|\w*Bridge)\b"
)
SUBJECTS = re.compile(r"\b(chain|main|reference|sde|problem|model)\b")


def test_few_ask_which_class_a_chain_a_reference_or_a_problem_is() -> None:
    """They ask the object instead: 112 asked for the class before a step was a law, and at most a third of that may."""
    asked = []
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 2:
                subject, kind = map(ast.unparse, node.args)
                if (node.func.id == "isinstance" and KINDS.search(kind)) or (
                    node.func.id == "hasattr" and SUBJECTS.search(subject)
                ):
                    asked.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    assert len(asked) <= 37, "\n".join(asked)
