"""What is imported, and when: torch at the first use of a name, libraries that few need when they are needed."""

import json
import subprocess
import sys

import pytest

#: what a use of the package may not bring along unasked; torch imports none of them
LATER = (
    "IPython",
    "matplotlib",
    "ot",
    "pyro",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "theory_checks",
    "torchdiffeq",
    "torchsde",
    "typer",
)


def imported(code: str) -> set[str]:
    """Modules that a fresh interpreter has imported after ``code``, which may print to standard output."""
    report = "import json, sys; print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"try:\n    {code}\nexcept SystemExit:\n    pass\n{report}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_the_package_alone_imports_no_torch() -> None:
    found = imported("import sdecontrol; print(sdecontrol.__version__)")
    assert "sdecontrol" in found and not {"torch", "numpy", "sdecontrol.public"} & found


@pytest.mark.parametrize("words", ["--help", "--version", "solve --help", "sample --help", "verify --help"])
def test_help_imports_no_torch(words: str) -> None:
    call = f"import sys; sys.argv = ['sdecontrol', *{words.split()}]; from sdecontrol.cli import main; main()"
    found = imported(call)
    assert "sdecontrol.cli.solve" in found and not {"torch", "numpy", "sdecontrol.public"} & found


def test_a_name_brings_every_method_and_nothing_that_few_need() -> None:
    found = imported("import sdecontrol as sc; sc.solve")
    assert {"torch", "sdecontrol.comparison.auto", "sdecontrol.methods.socm"} <= found
    assert not found.intersection(LATER)


def test_all_names_at_once_bring_nothing_that_few_need() -> None:
    found = imported("exec('from sdecontrol import *; ControlProblem, library.named_problem, metrics.mmd')")
    assert "sdecontrol.library" in found and not found.intersection(LATER)
