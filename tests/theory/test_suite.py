"""The suite itself: statements hold and negative controls fail; the quick part here, all of it in the slow tests."""

from __future__ import annotations

import pytest

from theory_checks import Setting, all_checks, run_check
from theory_checks.report import problems

QUICK = (
    "theorem-1-chain",
    "theorem-2-chain",
    "theorem-3-chain",
    "lemma-4-path-consistency",
    "corollary-1-t-step",
    "controlled-start",
    "theorem-1-mixture",
    "theorem-3-mixture",
    "path-equation",
    "eq-32-path-integral",
    "algorithm-1-soft-ppo",
    "erratum-35-log-z",
    "finite-theorem-1",
    "finite-theorem-2",
    "finite-theorem-3",
    "finite-lemma-1",
    "finite-lemma-3",
    "finite-no-floor",
    "masked-random-order",
)


@pytest.mark.parametrize("name", QUICK)
def test_statement_holds_and_its_controls_fail(name):
    check = next(c for c in all_checks() if c.name == name)
    assert problems([run_check(check, Setting(seed=3))]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [c.name for c in all_checks() if c.name not in QUICK])
@pytest.mark.parametrize("seed", [0, 7])
def test_every_statement_holds_and_its_controls_fail(name, seed):
    check = next(c for c in all_checks() if c.name == name)
    assert problems([run_check(check, Setting(seed=seed))]) == []


def test_all_theorems_and_errata_are_there():
    names = [c.name for c in all_checks()]
    for stem in (
        "theorem-1-",
        "theorem-2-",
        "theorem-3-",
        "lemma-1",
        "lemma-2",
        "lemma-3",
        "lemma-4",
        "corollary-1",
        "corollary-2",
    ):
        assert any(n.startswith(stem) for n in names), stem
        assert any(n.startswith(f"finite-{stem}".removesuffix("-")) for n in names), stem
    errata = {n.split("-")[1] for n in names if n.startswith("erratum-")}
    assert errata >= {"3", "7", "21", "24", "26", "27", "29", "31", "32", "35", "40", "table"}


def test_every_check_has_a_control_and_a_statement():
    for check in all_checks():
        assert check.controls and check.doc and check.statement
