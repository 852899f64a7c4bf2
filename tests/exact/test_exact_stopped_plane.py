"""Exact solutions of chains of two coordinates that stop, or whose reward is -inf somewhere: against chains of one
coordinate, closed forms and weighted paths."""

import math

import numpy as np
import pytest
import torch
from cases import F64
from scipy.special import ndtr
from scipy.stats import multivariate_normal

import sdecontrol as sc
from sdecontrol.errors import NoExactSolution
from sdecontrol.evaluation.estimates import log_mean_weight

TURN = torch.tensor([[math.cos(0.6), -math.sin(0.6)], [math.sin(0.6), math.cos(0.6)]], dtype=F64)
INF = math.inf


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)


def pull(x, t):
    return -0.5 * x * (1 + t)  # steps differ


def line(dim=1, turn=None, drift=pull, **options):
    """One coordinate that stops above 0.8, a second one that changes nothing, and both turned."""
    first = lambda x: (x if turn is None else x @ turn)[:, 0]  # noqa: E731
    given = {"reward": lambda x: first(x).sin(), "running_cost": lambda x, t: 0.3 * first(x) ** 2}
    given |= {"stop": lambda x: 0.8 - first(x), "alpha": 0.7, **options}
    start = given.pop("initial", sc.Dirac(torch.zeros(dim)))
    return sc.ControlProblem(sc.SDE(drift, torch.tensor(1.0), dim=dim, horizon=1.0), start, **given)


@pytest.mark.parametrize("turn", [pytest.param(None, marks=pytest.mark.slow), TURN], ids=["along an axis", "turned"])
def test_a_second_coordinate_changes_nothing(turn):
    one, two = sc.exact_solution(line(), 5), sc.exact_solution(line(2, turn), 5)
    assert two.error < 3e-3
    for name in ("log_z", "elbo"):
        assert abs(float(getattr(one, name) - getattr(two, name))) < 1.5 * two.error + 1e-3 * (name == "elbo")
    x = torch.tensor([[-0.5, 0.2], [0.3, 0.1], [0.75, -0.4], [0.9, 0.3]])
    y = x if turn is None else x @ turn.mT
    torch.testing.assert_close(two.value(y, 0.4), one.value(x[:, :1], 0.4), rtol=0, atol=3e-3)
    u = two.control(y, 0.4) if turn is None else two.control(y, 0.4) @ turn
    torch.testing.assert_close(u[:, :1], one.control(x[:, :1], 0.4), rtol=0, atol=0.02)
    torch.testing.assert_close(u[:, 1], torch.zeros(4), rtol=0, atol=0.005)
    assert not bool(u[3].any())  # it has stopped


@pytest.mark.slow
def test_the_stated_error_falls_with_the_cells(monkeypatch):
    import sdecontrol.exact.stopped_plane as module

    truth = float(sc.exact_solution(line(), 3).log_z)
    off = []
    for fineness in ((1.2, 1.8), (2.4, 3.6)):
        monkeypatch.setattr(module, "FINENESS", fineness)
        found = sc.exact_solution(line(2, TURN), 3)
        off.append(abs(float(found.log_z) - truth))
        assert off[-1] < 1.5 * found.error + 1e-5
    assert off[1] < 0.4 * off[0]


def test_an_event_of_correlated_noise():
    """P(X_1 > 1.5 and Y_1 > 1) of a Gaussian, as the log Z of a reward that is -inf elsewhere."""
    mixed = torch.tensor([[1.0, 0.0, 0.3], [0.8, 0.6, 0.0]])  # three noises
    event = lambda x: torch.where((x[:, 0] > 1.5) & (x[:, 1] > 1.0), 0.0, -INF)  # noqa: E731
    sde = sc.SDE(lambda x, t: torch.zeros_like(x), mixed, dim=2)
    solution = sc.exact_solution(sc.ControlProblem(sde, sc.Dirac(torch.zeros(2)), reward=event), 4)
    cov = (mixed @ mixed.mT).numpy()
    both = multivariate_normal(np.zeros(2), cov).cdf([1.5, 1.0])
    want = math.log(1 - ndtr(1.5 / cov[0, 0] ** 0.5) - ndtr(1.0 / cov[1, 1] ** 0.5) + both)
    assert abs(float(solution.log_z) - want) < 1.5 * solution.error + 1e-4 < 0.01
    assert solution.elbo == -INF
    u = solution.control(torch.tensor([[0.0, 0.0]]), 0.0)
    assert u.shape == (1, 3) and float((mixed @ u[0]).min()) > 0.5  # towards the event


def bent(**options):
    """Noise that depends on the state, a disc to stop in, and a start that is spread."""
    sde = sc.SDE(
        lambda x, t: torch.stack((x[:, 1], -x[:, 0]), 1),
        lambda x, t: 0.6 + 0.2 * x.cos(),
        dim=2,
        horizon=0.8,
    )
    given = {"stop": lambda x: (x - 0.7).norm(dim=1) - 0.4, "reward": lambda x: -((x - 0.7) ** 2).sum(1), **options}
    start = sc.Gaussian(torch.zeros(2), torch.tensor([0.3, 0.2]))
    return sc.ControlProblem(sde, start, running_cost=lambda x, t: 0.5 * x[:, 0] ** 2, **given)


@pytest.mark.slow
def test_weighted_paths_agree():
    """Of the reference and, with less spread, of the control; 4 standard errors."""
    problem = bent()
    solution = sc.exact_solution(problem, 4)
    paths = sc.simulate(problem, 1 << 16, time_steps=4, seed=0)
    found, spread = log_mean_weight(paths.log_weights().double()), paths.log_weights().std()
    assert abs(found.value - float(solution.log_z)) < 4 * found.stderr + solution.error
    paths = sc.simulate(problem, 1 << 13, control=solution.control, time_steps=4, seed=1)
    weights = paths.log_weights().double() - solution.value(paths.states[0], 0.0)
    assert float(weights.std()) < 0.5 * float(spread)
    assert abs(float(weights.mean() + solution.start_log_z - solution.elbo)) < 4 * float(weights.std()) / 90 + 2e-3


def beyond(a):
    return lambda x: torch.where(x[:, 0] > a, 0.0, -INF)


@pytest.mark.parametrize(
    "problem, says",
    [
        (lambda: line(2, drift=lambda x, t: x**3 * 400), "more than 60000 cells"),
        (
            lambda: sc.ControlProblem(
                sc.SDE(pull, torch.tensor([[0.0], [1.0]]), dim=2),
                sc.Dirac(torch.zeros(2)),
                stop=lambda x: 1 - x[:, 0],
                reward=lambda x: x[:, 0],
            ),
            "no noise in some direction",
        ),
        (lambda: line(3), "one or two coordinates"),
        (lambda: line(2, stop=None, reward=lambda x: torch.where(x[:, 0] > 6, 0.0, -INF)), "use more time steps"),
        (
            lambda: line(2, stop=None, reward=lambda x: torch.where(x[:, 0] > 20, 0.0, -INF)),
            "more time steps|every range",
        ),
    ],
    ids=["too far", "degenerate", "three coordinates", "far", "too far to see"],
)
def test_refusals(problem, says):
    with pytest.raises(NoExactSolution, match=says):
        sc.exact_solution(problem(), 5)
