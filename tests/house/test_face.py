"""The public face: flat names are what users write, and names that were flat before still lead to where they are."""

import ast
import importlib
import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import sdecontrol as sc

#: the flat names of 0.1.0 that are flat no more, and where a user finds them
MOVED = {
    "comparison.compare": ("Comparison",),
    "comparison.recommend": ("Advice",),
    "evaluation.certificates": ("Certificate",),
    "evaluation.estimates": ("Estimate",),
    "evaluation.evaluate": ("Evaluation", "log_weights"),
    "evaluation.solution": ("Solution",),
    "library": (
        "ReferenceSamples",
        "mixture_inverse_problem",
        "named_problem",
        "named_target",
        "problem_names",
        "reference_samples",
        "target_card",
        "target_names",
    ),
    "metrics": ("energy_wasserstein", "mmd", "mode_coverage", "sinkhorn", "sliced_wasserstein", "wasserstein"),
    "paths.paths": ("Paths",),
    "paths.solvers": ("SolvedPaths",),
    "problems.gibbs": ("GibbsProblem",),
    "training.callbacks": ("Callback",),
}
_METRICS = ("metrics", "sequence_metrics", "symmetric_metrics")  # files of sc.metrics
PLACES = [(name, f"sdecontrol.{place}") for place, names in MOVED.items() for name in names]


def test_dir_is_what_users_write_and_every_name_is_there() -> None:
    # 66 of numbers; of sequences a chain and a fit; JumpProcess; from_diffusers and LoRA; ManifoldSDE, Sphere, Torus;
    # OneHot, by which a reward of tokens has a gradient; RecedingHorizon; from_pyro; Region, where a process stops;
    # BlackBox, WeightedRewards and Prompts, which are rewards and conditions as people have them, and RewardError,
    # which a failing one raises; AdaptiveImportance; fit_reward and design
    assert dir(sc) == sorted([*sc.__all__, "__version__"]) and len(set(sc.__all__)) == len(sc.__all__) <= 85
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(getattr(sc, name) is not None for name in sc.__all__)


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_a_name_that_moved_leads_to_its_place(name: str, place: str) -> None:
    assert name not in sc.__all__
    with pytest.warns(DeprecationWarning, match=f"sdecontrol.{name} has moved: use {place}.{name}") as caught:
        found = getattr(sc, name)
    assert found is getattr(importlib.import_module(place), name)
    assert Path(caught[0].filename) == Path(__file__)  # of the caller, who can change it


def test_a_name_that_never_was_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sdecontrol' has no attribute 'sovle'"):
        sc.sovle  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'sovle'"):
        exec("from sdecontrol import sovle")


def test_metrics_and_library_are_modules_under_their_short_names() -> None:
    """In a fresh interpreter: as attributes, imported, and imported from; the library only when it is used."""
    code = (
        "import sys, sdecontrol as sc\n"
        "assert 'sdecontrol.library' not in sys.modules\n"
        "assert sc.library.problem_names() and callable(sc.metrics.mmd)\n"
        "import sdecontrol.metrics\n"
        "from sdecontrol.metrics import mmd\n"
        "from sdecontrol.library import named_target\n"
        "assert sdecontrol.metrics.mmd is mmd is sc.metrics.mmd and sc.control_error is sc.metrics.control_error\n"
    )
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", code], check=True)


@pytest.mark.parametrize("module", ["metrics", "library"])
def test_their_lists_are_what_they_have_and_the_page_of_the_library_names_it(module: str) -> None:
    found = getattr(sc, module)
    assert all(hasattr(found, name) for name in found.__all__)
    if module == "metrics":
        files = [sys.modules[f"sdecontrol.evaluation.{name}"] for name in _METRICS]
        functions = {n for file in files for n, f in inspect.getmembers(file, inspect.isfunction)}
        own = {n for n in functions if not n.startswith("_") and getattr(found, n, None) is not None}
        assert own == {n for n in found.__all__ if n.islower()}
    else:
        assert not [name for name in found.__all__ if name not in found.__doc__ and name not in ("Card", "ProblemCard")]


def test_our_own_code_uses_the_new_names() -> None:
    """No flat use of a name that moved in what we write: package, checks, benchmarks, examples and tests."""
    root, moved, found = Path(sc.__file__).parents[1], {name for name, _ in PLACES}, []
    for folder in ("sdecontrol", "theory_checks", "benchmarks", "examples", "tests"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                attribute = isinstance(node, ast.Attribute) and node.attr in moved
                if attribute and isinstance(node.value, ast.Name) and node.value.id in ("sc", "sdecontrol"):
                    found.append(f"{path.name}:{node.lineno} {node.attr}")
    assert not found, found
