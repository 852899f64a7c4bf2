"""Chains of mixtures that fall apart once they are turned: against their parts, each solved by itself."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import sdecontrol as sc
from sdecontrol.exact.turned import TurnedSolution, axes_of

F64 = torch.float64


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _problem(mixture, reward, start=None):
    return sc.ControlProblem(
        sc.generative_sde(mixture, sc.VP(0.5, 2.0)), None if start is None else sc.Dirac(start), reward, alpha=0.7
    )


class Case(NamedTuple):
    """A problem ``whole``, and those of its first coordinates and of the others along the columns of ``turn``."""

    turn: torch.Tensor
    plane: sc.ControlProblem
    rest: sc.ControlProblem
    whole: sc.ControlProblem


def _case(components: int, from_point: bool, quadratic: bool, d: int = 5) -> Case:
    """The means differ in ``components - 1`` directions; a covariance and a G with common axes outside of them."""
    n, weights = components - 1, torch.tensor([0.5, 0.3, 0.2], dtype=F64)[:components]
    turn = torch.linalg.qr(_normal(d, d, seed=1)).Q
    where = 1.2 * _normal(components, n, seed=2)
    variances = torch.linspace(0.2, 0.5, d, dtype=F64) if quadratic else torch.full((d,), 0.3, dtype=F64)
    first, others = variances[:n].diag(), variances[n:].diag()
    centre, g = _normal(d - n, seed=3), 0.4 * _normal(d, seed=4)
    G = torch.linspace(0.6, 0.1, d, dtype=F64).diag() if quadratic else torch.zeros(d, d, dtype=F64)
    start = 0.5 * _normal(d, seed=5)
    reward = lambda rows: sc.Quadratic(G[rows, rows], g[rows]) if quadratic else sc.Linear(g[rows])  # noqa: E731
    put = lambda a, b: torch.cat((a, b), -1) @ turn.mT  # noqa: E731
    means = put(where, centre.expand(components, -1))
    cov = turn @ variances.diag() @ turn.mT
    rewards = sc.Quadratic(turn @ G @ turn.mT, turn @ g) if quadratic else sc.Linear(turn @ g)
    from_ = (start[:n], start[n:], turn @ start) if from_point else (None, None, None)
    plane = sc.GaussianMixture(weights, where, first.expand(components, n, n))
    rest = sc.GaussianMixture(torch.ones(1, dtype=F64), centre[None], others[None])
    whole = sc.GaussianMixture(weights, means, cov.expand(components, d, d))
    return Case(
        turn,
        _problem(plane, reward(slice(0, n)), from_[0]),
        _problem(rest, reward(slice(n, d)), from_[1]),
        _problem(whole, rewards, from_[2]),
    )


CASES = [
    pytest.param(2, False, False),
    pytest.param(2, True, True),
    pytest.param(3, True, False, marks=pytest.mark.slow),
    pytest.param(3, False, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("components", "from_point", "quadratic"), CASES)
def test_value_control_log_z_and_laws_are_those_of_the_parts(components, from_point, quadratic):
    case, n = _case(components, from_point, quadratic), components - 1
    grid = [0.0, 0.3, 0.5, 0.8, 1.0]
    whole, plane, rest = (sc.exact_solution(p, grid, scheme="exponential") for p in (case.whole, case.plane, case.rest))
    assert isinstance(whole, TurnedSolution)
    fine = 1e-5 if n == 1 else 2e-4  # grids of a plane are coarser, where few paths go above all
    close, loose = {"rtol": fine, "atol": fine}, {"rtol": 10 * fine, "atol": 10 * fine}
    z = 0.6 * _normal(7, 5, seed=6)
    for t in (0.0, 0.5, 0.8):
        a, b = z[:, :n], z[:, n:]
        torch.testing.assert_close(whole.value(z @ case.turn.mT, t), plane.value(a, t) + rest.value(b, t), **close)
        u = torch.cat((plane.control(a, t), rest.control(b, t)), 1)
        torch.testing.assert_close(whole.control(z @ case.turn.mT, t), u @ case.turn.mT, **loose)
    torch.testing.assert_close(whole.log_z, plane.log_z + rest.log_z, **close)
    if from_point:
        torch.testing.assert_close(whole.elbo, plane.elbo + rest.elbo, **close)
        torch.testing.assert_close(whole.floor, plane.floor + rest.floor, **close)
    if n == 1:
        laws = [s.marginal(0.8) for s in (plane, rest)]
        mean = torch.cat([law.mean for law in laws])
        torch.testing.assert_close(whole.marginal(0.8).mean, case.turn @ mean, **close)
        x = whole.sample(20_000, seed=1)
        ends = [s.marginal(1.0).mean for s in (plane, rest)]
        assert bool(((x.mean(0) - case.turn @ torch.cat(ends)).abs() < 5 * x.std(0) / 20_000**0.5).all())
    else:
        with pytest.raises(sc.NoExactSolution, match="two coupled coordinates"):
            whole.marginal(0.8)


def test_a_law_along_turned_axes():
    """Density and moments of independent coordinates along other axes."""
    case = _case(2, True, True)
    whole = sc.exact_solution(case.whole, [0.0, 0.4, 1.0], scheme="exponential")
    law, x = whole.marginal(1.0), whole.sample(40_000, seed=2)
    axes = whole.axes
    assert law.mean.shape == (5,) and torch.allclose(axes.mT @ axes, torch.eye(5, dtype=F64))
    torch.testing.assert_close(x.var(0), law.variance, rtol=0.05, atol=0.0)
    step = 1e-4 * axes[:, 1]  # outside of W the law is Gaussian: the slope of its log density falls linearly
    slope = lambda y: (law.log_prob(y + step) - law.log_prob(y - step)) / 2e-4  # noqa: E731
    along = (x @ axes)[:, 1]
    torch.testing.assert_close(slope(x[:50]), (law.mean @ axes[:, 1] - along[:50]) / along.var(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("why", "means", "covariances", "reward"),
    [
        ("means in space", _normal(4, 3), 0.3, sc.Linear(torch.ones(3, dtype=F64))),
        ("two variances", _normal(2, 3), torch.tensor([0.2, 0.4], dtype=F64), sc.Linear(torch.ones(3, dtype=F64))),
        ("a reward that is not quadratic", _normal(2, 3), 0.3, lambda x: -((x.norm(dim=1) - 1) ** 2)),
        (
            "no common axes",
            torch.eye(4, dtype=F64)[:2],
            torch.tensor([0.2, 0.2, 0.3, 0.4], dtype=F64).diag().expand(2, 4, 4),
            sc.Quadratic(torch.eye(4, dtype=F64) + 0.3 * torch.eye(4, dtype=F64)[[0, 1, 3, 2]]),
        ),
    ],
)
def test_what_does_not_fall_apart_is_refused(why, means, covariances, reward):
    weights = torch.ones(len(means), dtype=F64)
    problem = _problem(sc.GaussianMixture(weights, means, covariances), reward)
    assert axes_of(problem) is None
    if why != "no common axes":  # there a pair of coordinates is left, which a grid of the plane takes
        with pytest.raises(sc.NoExactSolution, match="act on each other"):
            sc.exact_solution(problem, 4)
