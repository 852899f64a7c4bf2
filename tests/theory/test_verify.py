"""``theory_checks.verify`` on solutions of one's own."""

from __future__ import annotations

import pytest
import torch

import sdecontrol as sc
from sdecontrol.paths.paths import Paths
from theory_checks import verify

DOUBLE = torch.float64


def _problem(start="point", alpha=1.0, reward=None):
    sde = sc.LinearSDE(
        torch.tensor([[-0.5, 0.4], [-0.3, -0.2]], dtype=DOUBLE), 0.7, torch.tensor([0.5, 0.0], dtype=DOUBLE)
    )
    mean = torch.tensor([0.3, -0.2], dtype=DOUBLE)
    law = sc.Dirac(mean) if start == "point" else sc.Gaussian(mean, 0.3 * torch.eye(2, dtype=DOUBLE))
    reward = reward or sc.Quadratic(0.5 * torch.eye(2, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE))
    return sc.ControlProblem(sde, law, reward, alpha=alpha, start=None if start == "point" else start)


class Own:
    """A solution that is nothing but a control."""

    def __init__(self, control, **settings):
        self.control, self.settings = control, settings


@pytest.mark.parametrize("start", ["point", "fixed", "controlled"])
def test_the_exact_control_passes(start):
    problem = _problem(start)
    report = verify(problem, sc.exact_solution(problem, time_steps=10), n=4096)
    assert report.passed, str(report)
    assert report.exact == "of the chain"
    assert {f.statement for f in report.findings} >= {
        "Theorem 1",
        "Theorem 2",
        "Theorem 3",
        "E_P[w] = Z",
        "change of measure",
    }


def test_a_bad_control_still_has_right_weights():
    report = verify(_problem(), Own(lambda x, t: 0.3 - 0.2 * x, time_steps=10), n=4096)
    assert report.passed and not report.reliable


def test_an_unbounded_black_box_has_no_exact_answer():
    problem = _problem(reward=lambda x: torch.cos(x).sum(-1))
    report = verify(problem, Own(lambda x, t: 0.2 * x, time_steps=10), n=1024)
    assert report.passed and "none" in report.exact
    assert "Theorem 1" not in {f.statement for f in report.findings}


def test_wrong_weights_are_found(monkeypatch):
    problem = _problem()
    exact = sc.exact_solution(problem, time_steps=10)
    true = Paths.log_ratio
    monkeypatch.setattr(Paths, "log_ratio", lambda self, *a, **k: 0.5 * true(self, *a, **k))
    report = verify(problem, exact, n=4096)
    assert not report.passed
    assert {f.statement for f in report.findings if f.passed is False} >= {"Theorem 1", "KL = E[log dP/dQ0]"}


def test_report_is_plain():
    import json

    problem = _problem()
    report = verify(problem, sc.exact_solution(problem, time_steps=5), n=512)
    assert json.dumps(report.as_dict())
    assert "Theorem 1" in str(report) and "all statements hold" in str(report)


@pytest.mark.parametrize(
    ("argument", "error"), [({"n": 10}, ValueError), ({"solution": 3}, TypeError), ({"problem": 3}, TypeError)]
)
def test_bad_arguments_are_named(argument, error):
    problem = _problem()
    arguments = {"problem": problem, "solution": Own(lambda x, t: x), **argument}
    with pytest.raises(error, match=next(iter(argument))):
        verify(**arguments)


def test_a_trained_solution_passes():
    problem = _problem()
    solution = sc.solve(
        problem, sc.RewardBackprop(), time_steps=8, iterations=40, batch_size=64, seed=0, progress=False
    )
    report = verify(problem, solution, n=2048)
    assert report.passed, str(report)
