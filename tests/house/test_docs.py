"""The pages on the house and on extending it: their code runs, and every file and name that they walk through
exists."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rooms import FLOORS, IMPORTS

import sdecontrol as sc
from sdecontrol.controls.saved import CONTROLS
from sdecontrol.methods import base

PACKAGE = Path(sc.__file__).parent
DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("architecture.md", "extending.md")
HOUSE = (DOCS / "architecture.md").read_text(encoding="utf-8")
TABLE = HOUSE[HOUSE.index("| room |") : HOUSE.index("Beside the rooms")].partition("|---|---|---|\n")[2]
#: ``room/file.py: name`` or ``room/file.py: Class.name``
STOP = re.compile(r"`([\w/]+\.py): ([\w.]+)`")


def run_page(page: str) -> dict:
    """All python blocks of a page, in order, in one namespace; tracebacks have the page's own line numbers."""
    text = (DOCS / page).read_text(encoding="utf-8")
    names = {"__name__": "page"}
    for block in re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        before = text[: block.start(1)].count("\n")
        exec(compile("\n" * before + block[1], f"docs/{page}", "exec"), names)
    return names


@pytest.fixture
def _own_registries(tmp_path, monkeypatch):
    """What a page registers and writes is gone afterwards."""
    monkeypatch.setattr(base, "METHODS", dict(base.METHODS))
    monkeypatch.setattr(CONTROLS, "classes", dict(CONTROLS.classes))
    monkeypatch.setattr(CONTROLS, "makers", dict(CONTROLS.makers))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_own_registries")
def test_the_code_of_the_page_on_the_house_runs():
    run_page("architecture.md")


def test_the_page_on_jump_processes_runs_and_tells_the_truth():
    made = run_page("jump_processes.md")
    assert float(made["chain"].floor) == 0.0 and made["many"].moves[1].tolist() == [0, 1, 2]
    assert abs(float(made["chain"].log_z) - float(made["exact"].log_z)) < 0.02
    found = made["solution"].evaluate(1024, seed=1).log_z
    assert abs(found.value - float(made["chain"].log_z)) < 4 * found.stderr


@pytest.mark.slow
def test_the_page_on_manifolds_runs_and_tells_the_truth():
    made = run_page("manifolds.md")
    error = sc.control_error(made["solution"], made["exact"], n=512)
    assert error.relative.value < 0.02, error
    assert float(made["moved"][0, 0]) == pytest.approx(4 - 2 * torch.pi, abs=1e-5)
    assert float((made["flat"] * torch.eye(3)).sum(1).abs().max()) < 1e-6
    x = made["exact"].sample(8, seed=0)
    u = made["solution"].control(x, 0.5).detach()
    assert float((u * x).sum(1).abs().max()) < 1e-5 < float(u.norm(dim=1).max())


@pytest.mark.slow
@pytest.mark.usefixtures("_own_registries")
def test_the_examples_of_extending_run_and_do_what_the_page_says():
    made = run_page("extending.md")
    errors = {row.label: row.estimates["control_error"].value for row in made["table"].rows}
    assert list(errors) == ["log-variance", "pair-variance(bound=5.0)"]
    assert max(errors.values()) < 0.05, errors
    assert made["solution"].method == "pair-variance"
    assert made["swung"].evaluate(1024, seed=2).gap.value < 0.5
    assert float(made["difference"].abs().max()) < 1e-4
    assert abs(made["found"].log_z.value - made["known"]) < 4 * made["found"].log_z.stderr < 0.1
    assert made["critic"].training and not made["black_box"].has_gradient
    assert torch.equal(made["again"].sample(64, seed=1), made["trained"].sample(64, seed=1))


def definitions(path: Path) -> set[str]:
    """Names that a file defines: its functions, classes and variables, and ``Class.name`` of what classes hold."""

    def of(body: list[ast.stmt]) -> set[str]:
        found = set()
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found |= {t.id for target in targets for t in ast.walk(target or ast.Pass()) if isinstance(t, ast.Name)}
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{name}" for name in of(node.body)}
        return found

    return of(ast.parse(path.read_text(encoding="utf-8")).body)


def missing(text: str) -> list[str]:
    """The stops of a page that are not there."""
    stops = STOP.findall(text)
    known = {file: definitions(PACKAGE / file) if (PACKAGE / file).is_file() else set() for file, _ in stops}
    return [f"{file}: {name}" for file, name in stops if name not in known[file]]


@pytest.mark.parametrize("page", PAGES)
def test_every_stop_is_a_file_and_a_name_in_it(page):
    assert not missing((DOCS / page).read_text(encoding="utf-8"))


def test_the_walks_have_stops_at_every_number():
    walks = HOUSE[HOUSE.index("## Three walks") :]
    numbered = re.split(r"^\d+\. ", walks, flags=re.MULTILINE)[1:]
    assert len(numbered) >= 25 and all(STOP.search(item) for item in numbered)


def test_a_stop_that_was_renamed_is_found():
    stop = "`paths/paths.py: Paths.log_weights`"
    assert stop in HOUSE
    for other in ("`paths/paths.py: Paths.weights`", "`paths/path.py: Paths.log_weights`"):
        assert missing(HOUSE.replace(stop, other)) == [other.strip("`")]


def test_the_table_of_rooms_is_the_house():
    told: dict[str, set[str]] = {}
    for room, files in re.findall(r"^\| (?:`(\w+)/` )?\| [^|]+ \| ([^|]+) \|$", TABLE, flags=re.MULTILINE):
        last = told.setdefault(room or next(reversed(told)), set())  # a row without a room goes on with the one above
        last |= set(re.findall(r"`(\w+)`", files))
    there = {
        path.name: {file.stem for file in path.glob("*.py")} - {"__init__"}
        for path in PACKAGE.iterdir()
        if list(path.glob("*.py"))
    }
    assert told == there
    floor = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
    assert [floor[room] for room in told] == sorted(floor[room] for room in told)
    beside = set(re.findall(r"^\| `(\w+)\.py` \|", HOUSE, flags=re.MULTILINE))
    doors, visitors = {"metrics", "public"}, {"__init__", "public", "cli.common"}  # the face: it imports rooms
    assert beside == {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"} - doors
    assert not [name for name, targets in IMPORTS.items() if doors & set(targets) and name not in visitors]
    assert not [f"{name} imports {target}" for name in beside for target in IMPORTS.get(name, ()) if "." in target]


def test_the_drawing_has_every_room_and_no_arrow_back():
    (drawing,) = re.findall(r"```mermaid\n(.*?)```", HOUSE, flags=re.DOTALL)
    floor = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
    lines = [line.split(" --> ") for line in map(str.strip, drawing.splitlines()) if "-->" in line]
    arrows = [pair for line in lines for pair in pairwise(line)]
    assert {room for pair in arrows for room in pair} == {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert all(floor[one] < floor[other] for one, other in arrows)


@pytest.mark.slow
def test_posteriors_on_the_page_of_densities():
    """From numpy's function with names and bounds to evidence, samples, figure, ArviZ object and data frame."""
    text = (DOCS / "densities.md").read_text(encoding="utf-8")
    section = text[text.index("## Posteriors as you have them") : text.index("## Where every evaluation is dear")]
    names = {"__name__": "page", "sc": sc}
    for block in re.findall(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/densities.md", "exec"), names)
    assert names["x"].shape == (1000, 2) and names["solution"].problem.parameters.labels == ("top", "half")
    assert list(names["tree"]["posterior"].data_vars) == ["top", "half"]
    assert list(names["frame"].columns) == ["top", "half"] and names["axes"].shape == (2, 2)
    assert set(names["draws"]) == {"mu", "tau"} and float(names["draws"]["tau"].min()) > 0
    assert abs(float(names["x"][:, 0].mean()) - 0.9) < 0.1
