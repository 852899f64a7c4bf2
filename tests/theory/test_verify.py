"""``theory_checks.verify`` on solutions of one's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import sdecontrol as sc
from sdecontrol.exact.base import ExactSolution
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


def test_coordinates_that_noise_of_the_state_couples_have_no_exact_answer_on_a_chain():
    sde = sc.SDE(lambda x, t: -x.roll(1, 1), lambda x, t: 1 + 0.1 * x.sin(), dim=2)
    problem = sc.ControlProblem(sde, sc.Dirac(torch.zeros(2, dtype=DOUBLE)), lambda x: torch.cos(x).sum(-1))
    report = verify(problem, Own(lambda x, t: 0.2 * x, time_steps=10), n=1024)
    assert report.passed and "none" in report.exact
    assert "Theorem 1" not in {f.statement for f in report.findings}


# ---------------------------------------------------------------- each kind of chain


def _grid(reward=None):
    sde = sc.SDE(lambda x, t: torch.sin(2 * x) - x, lambda x, t: 0.6 + 0.2 * torch.cos(x), dim=1)
    return sc.ControlProblem(sde, sc.Dirac(torch.tensor([0.2], dtype=DOUBLE)), reward or (lambda x: -(x[:, 0] ** 2)))


def _exponential():
    sde = sc.SemilinearSDE(torch.tensor([[-3.0]], dtype=DOUBLE), lambda x, t: torch.sin(x), 0.8)
    start = sc.Dirac(torch.tensor([0.2], dtype=DOUBLE))
    return sc.ControlProblem(sde, start, lambda x: torch.tanh(x[:, 0]))


def _noise_driven():
    chain = sc.discrete_dynamics(lambda x, w, k: 0.8 * x + 0.3 * w.abs(), 6)
    return sc.ControlProblem(chain, sc.Dirac(torch.tensor([0.2], dtype=DOUBLE)), lambda x: -(x[:, 0] ** 2))


def _jumps(start: Any = 0, way: str | None = None):
    rates = torch.tensor([[-1.0, 1.0, 0.0], [0.5, -1.5, 1.0], [0.0, 0.7, -0.7]], dtype=DOUBLE)
    return sc.ControlProblem(sc.JumpProcess(rates, 1.0, start), reward=lambda x: x[:, 0].double(), start=way)


def _masked():
    table = torch.randn(27, 3, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    index = lambda x: (x * torch.tensor([9, 3, 1])).sum(1)  # noqa: E731
    model = sc.masked_diffusion(lambda x, s: table[index(x)], 3, 2, 6, dtype=DOUBLE)
    return sc.ControlProblem(model, reward=lambda x: (x == 1).sum(1).double())


def _sphere():
    point = torch.tensor([0.0, 0.6, -0.8], dtype=DOUBLE)
    return sc.ControlProblem(sc.ManifoldSDE(sc.Sphere(2), None, 0.9), sc.Dirac(point), lambda x: 2 * x[:, 2])


def _circle():
    return sc.ControlProblem(
        sc.ManifoldSDE(sc.Torus(1), None, 0.9), sc.Dirac(torch.tensor([1.0], dtype=DOUBLE)), lambda x: x[:, 0].cos()
    )


def _stopped():
    problem = _grid()
    return sc.ControlProblem(
        problem.reference, problem.initial, problem.reward_function, stop=lambda x: 1.0 - x[:, 0].abs()
    )


def _model(d=1):
    means = torch.tensor([[-1.0], [1.2]], dtype=DOUBLE).expand(2, d).contiguous()
    return sc.GaussianMixture(torch.tensor([0.4, 0.6], dtype=DOUBLE), means, 0.2)


def _generative():
    return sc.ControlProblem(
        sc.generative_sde(_model(), schedule=sc.VP(0.5, 2.0)), reward=sc.Linear(torch.ones(1, dtype=DOUBLE))
    )


def _turned():
    """Along no coordinate does it fall apart; along the line through both means, and across it, it does."""
    means = torch.randn(2, 4, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    sde = sc.generative_sde(sc.GaussianMixture(torch.tensor([0.4, 0.6], dtype=DOUBLE), means, 0.2), sc.VP(0.5, 2.0))
    return sc.ControlProblem(sde, reward=sc.Linear(torch.tensor([0.5, -0.3, 0.2, 0.4], dtype=DOUBLE)))


def _ddpm():
    levels, mixture = torch.linspace(0.99, 0.02, 40, dtype=DOUBLE), _model()

    def noise(x, n):
        mu, std = levels[n[0]].sqrt(), (1 - levels[n[0]]).sqrt()
        return -std * mixture.noised(float(mu), float(std)).score(x)

    model: Any = noise
    return sc.ControlProblem(sc.diffusion_chain(model, levels, shape=(1,), steps=12), reward=lambda x: x[:, 0].tanh())


def _annealed():
    return sc.gibbs_problem(
        lambda x: -0.5 * ((x - 0.5) ** 2).sum(1), 2, reference="annealed", scale=1.5, centre=0.0, dtype=DOUBLE
    )


def _push(x, t):
    return 0.2 * torch.ones_like(x)


def _tilt(shape):
    return lambda x, t: 0.3 * torch.linspace(-1, 1, shape.numel(), dtype=DOUBLE).reshape(shape).expand(len(x), *shape)


KINDS = {
    "Gaussian on a grid": (_grid, _push, {"time_steps": 8}, {"Lemma 2", "Theorem 1", "Theorem 2"}),
    "exponential": (_exponential, _push, {"time_steps": 8, "scheme": "exponential"}, {"Lemma 2", "Theorem 1"}),
    "noise-driven": (_noise_driven, _push, {}, set()),
    "jump": (_jumps, None, {"time_steps": 6}, {"Lemma 2", "Theorem 1", "Theorem 2", "Theorem 3"}),
    "jump, a random start": (
        lambda: _jumps(torch.tensor([0.2, 0.3, 0.5], dtype=DOUBLE)),
        None,
        {"time_steps": 6},
        {"Lemma 2", "E_P[w] = Z"},
    ),
    "jump, a controlled start": (
        lambda: _jumps(torch.tensor([0.2, 0.3, 0.5], dtype=DOUBLE), "controlled"),
        None,
        {"time_steps": 6},
        {"Lemma 2", "Theorem 1", "Theorem 2", "Theorem 3"},
    ),
    "masked": (_masked, None, {}, {"Lemma 2", "Theorem 1", "Theorem 2", "Theorem 3"}),
    "sphere": (_sphere, lambda x, t: 0.3 * x.roll(1, 1), {"time_steps": 4}, {"Lemma 2", "Theorem 1", "Theorem 2"}),
    "circle": (_circle, _push, {"time_steps": 4}, {"Lemma 2", "Theorem 1", "Theorem 2"}),
    "stopped": (_stopped, _push, {"time_steps": 8}, {"Lemma 2", "E_P[w] = Z"}),
    "a mixture's Euler chain": (_generative, _push, {"time_steps": 12}, {"Lemma 2", "Theorem 1", "Theorem 2"}),
    "a mixture's chain in four dimensions": (
        _turned,
        _push,
        {"time_steps": 8},
        {"E_P[w] = Z", "Lemma 2", "Theorem 1", "Theorem 2"},
    ),
    "DDPM": (_ddpm, _push, {}, set()),
    "annealed": (_annealed, _push, {"time_steps": 8}, set()),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow if k.startswith("a mixture") else ()) for k in KINDS]
)
def test_each_kind_of_chain_is_verified_as_far_as_it_is_known(kind):
    make, control, settings, known = KINDS[kind]
    problem = make()
    control = control or _tilt(problem.chain(**settings).control_shape)
    report = verify(problem, Own(control, **settings), n=2048)
    assert report.passed, str(report)
    found = {f.statement for f in report.findings if f.passed is not None}
    assert found >= known | {"change of measure", "Z is one number", "KL = E[log dP/dQ0]"}
    assert bool(known) == (report.exact == "of the chain"), report.exact


SLOW_ONES = ("a mixture's Euler chain", "a mixture's chain in four dimensions", "masked", "sphere")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow if k in SLOW_ONES else ()) for k in KINDS if KINDS[k][3]]
)
def test_another_problem_s_exact_answer_is_seen_in_each_kind(monkeypatch, kind):
    """The exact solution of 1.3 times the temperature, in place of the problem's own."""
    make, control, settings, _ = KINDS[kind]
    problem = make()
    control = control or _tilt(problem.chain(**settings).control_shape)
    true = sc.exact_solution

    def warmer(given, *arguments, **options):
        other = copy.copy(given)
        other.alpha = 1.3 * given.alpha
        return true(other, *arguments, **options)

    monkeypatch.setattr(sc, "exact_solution", warmer)
    report = verify(problem, Own(control, **settings), n=8192)
    assert {f.statement for f in report.findings if f.passed is False} & {"E_P[w] = Z", "Lemma 2"}, str(report)


@pytest.mark.parametrize("kind", [k for k in KINDS if "Lemma 2" in KINDS[k][3] and not k.startswith("a mixture")])
def test_a_value_that_is_off_is_seen_in_each_kind(monkeypatch, kind):
    make, control, settings, _ = KINDS[kind]
    problem = make()
    control = control or _tilt(problem.chain(**settings).control_shape)
    true = ExactSolution.value
    monkeypatch.setattr(ExactSolution, "value", lambda self, x, t: true(self, x, t) + 0.3 * problem.alpha)
    report = verify(problem, Own(control, **settings), n=2048)
    assert "Lemma 2" in {f.statement for f in report.findings if f.passed is False}, str(report)


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
