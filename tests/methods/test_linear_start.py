"""Regulators by which controls begin where the drift is unstable."""

from __future__ import annotations

import pytest
import torch

import sdecontrol as sc
from sdecontrol.controls.feedback import AffineFeedback
from sdecontrol.methods.linear_start import linear_start

STEPS, D = 40, 3


def unstable(rate: float = 1.0, *, told: bool = True, bend: float = 0.0) -> sc.ControlProblem:
    """A drift that grows by e^(4 rate) and is not normal, fewer noises than states; as a function unless ``told``."""
    A, sigma = rate * (torch.eye(D) + torch.diag(torch.ones(D - 1), 1)), torch.eye(D)[:, 1:] + 0.1
    sde = (
        sc.LinearSDE(A=A, sigma=sigma, horizon=4.0)
        if told
        else sc.SDE(lambda x, t: x @ A.mT.to(x) + bend * x.sin(), diffusion=sigma, dim=D, horizon=4.0)
    )
    start = sc.Dirac(torch.tensor([0.5, -0.3, 0.2]))
    if not told:  # nothing of it is known
        cost = lambda x, t: (x - 0.1).square().sum(1)  # noqa: E731
        return sc.ControlProblem(sde, start, reward=lambda x: -0.5 * x.square().sum(1), running_cost=cost, alpha=0.7)
    return sc.ControlProblem(
        sde, start, reward=sc.Quadratic(G=torch.eye(D)), running_cost=sc.QuadraticCost(F=2 * torch.eye(D)), alpha=0.7
    )


def begun(problem: sc.ControlProblem) -> AffineFeedback:
    found = linear_start(problem, problem.chain(STEPS), 0)
    assert found is not None
    return found


def test_the_regulator_of_a_quadratic_problem_is_its_optimum() -> None:
    torch.set_default_dtype(torch.float64)
    problem = unstable()
    chain, exact = problem.chain(STEPS), sc.exact_solution(problem, time_steps=STEPS)
    x = torch.randn(16, D, generator=torch.Generator().manual_seed(0))
    mine, best = begun(problem).on_chain(chain), exact.control.on_chain(chain)
    for k in (0, 7, STEPS - 1):
        torch.testing.assert_close(mine(k, x, None), best(k, x, None), rtol=1e-4, atol=1e-4)


def test_fits_of_functions_give_what_is_known_of_a_quadratic_problem() -> None:
    """Also where cost and reward have their minima apart."""
    torch.set_default_dtype(torch.float64)
    problem, told = unstable(told=False), unstable()
    found, known = begun(problem), begun(told)
    after = slice(4, None)  # where no noise has come to, slopes are not seen
    torch.testing.assert_close(found.gains[after], known.gains[after], rtol=1e-3, atol=1e-3)
    assert (found.offsets[after] - known.offsets[after]).abs().max() > 0.01


@pytest.mark.parametrize("rate, told", [(0.2, True), (-1.0, True), (-1.0, False)])
def test_a_drift_that_is_not_unstable_begins_with_no_control(rate: float, told: bool) -> None:
    problem = unstable(rate, told=told)
    assert linear_start(problem, problem.chain(STEPS), 0) is None


@pytest.mark.parametrize("method", [sc.AdjointMatching(), sc.SOCM(), sc.LogVariance(), sc.RewardBackprop()])
def test_what_learns_begins_near_the_optimum(method: sc.Method) -> None:
    if isinstance(method, sc.SOCM):
        sde = sc.LinearSDE(A=torch.eye(D) + torch.diag(torch.ones(D - 1), 1), sigma=torch.eye(D), horizon=4.0)
        problem = sc.ControlProblem(sde, sc.Dirac(torch.ones(D)), reward=sc.Quadratic(G=torch.eye(D)), alpha=1.0)
    else:
        problem = unstable()
    solution = sc.solve(problem, method, time_steps=STEPS, iterations=2, batch_size=64, seed=0)
    error = sc.control_error(solution, sc.exact_solution(problem, time_steps=STEPS), n=256).relative.value
    assert error < 1e-2, error


@pytest.mark.parametrize("bend", [0.5, -0.5])
def test_a_bent_drift_that_is_unstable_begins_in_reach(bend: float) -> None:
    problem = unstable(0.7, told=False, bend=bend)
    none, found = (sc.simulate(problem, 512, control=c, time_steps=STEPS, seed=1) for c in (None, begun(problem)))
    objectives = [float((p.reward - p.cost - p.alpha * p.kl()).mean()) for p in (none, found)]
    assert 20 * objectives[1] > objectives[0], objectives  # both below 0
