"""A solution's estimated values, against exact ones, and its figure: what is drawn is what the paths are."""

import math

import numpy as np
import pytest
import torch
from cases import F64, random_lq

import sdecontrol as sc
from sdecontrol.problems.simulate import simulate_chain
from sdecontrol.problems.simulation_options import SimulationOptions


def solved(alpha: float = 0.5, **options) -> sc.ControlProblem:
    sde = sc.LinearSDE(A=-torch.eye(2, dtype=F64), sigma=torch.eye(2, dtype=F64), offset=None, horizon=1.0)
    return sc.ControlProblem(
        sde,
        initial=sc.Dirac(torch.zeros(2, dtype=F64)),
        reward=sc.Quadratic(G=torch.eye(2, dtype=F64), g=torch.tensor([1.0, -2.0], dtype=F64)),
        running_cost=sc.QuadraticCost(F=0.5 * torch.eye(2, dtype=F64)),
        alpha=alpha,
        **options,
    )


@pytest.mark.parametrize("t", [0.0, 0.45, 0.9])
def test_values_are_those_of_the_chain(t):
    """Of a control that is not the optimum, so that weights matter; standard errors by the delta method."""
    problem = solved()
    solution = sc.solve(problem, sc.RewardBackprop(), time_steps=20, iterations=5, batch_size=64, seed=0)
    x, n = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-1.5, 0.3]], dtype=F64), 4_000
    found, exact = solution.value(x, t, n, seed=1), sc.exact_solution(problem, like=solution).value(x, t)
    k = solution.chain.step_at(t)
    how = SimulationOptions(state=x.repeat_interleave(n, 0), step=k)
    paths = simulate_chain(problem, solution.chain, 3 * n, solution.control, seed=1, keep="end", how=how)
    w = (paths.towards(problem).log_weights().unflatten(0, (3, n)) - exact[:, None] / 0.5).exp()
    error = 0.5 * w.std(1) / w.mean(1) / math.sqrt(n)
    assert bool(((found - exact).abs() < 4 * error).all()) and float(error.max()) < 0.05


def test_a_condition_is_each_rows_own():
    sde = sc.LinearSDE(A=-torch.eye(1, dtype=F64), sigma=torch.eye(1, dtype=F64), offset=None, horizon=1.0)
    aims = torch.tensor([-1.0, 0.0, 2.0], dtype=F64)
    problem = sc.ControlProblem(
        sde, sc.Dirac(torch.zeros(1, dtype=F64)), reward=lambda x, y: y * x[:, 0], alpha=1.0, condition=aims
    )
    solution = sc.solve(problem, sc.PathIntegralGuidance(num_paths=32), time_steps=4, seed=0)
    values = solution.value(torch.zeros(3, 1, dtype=F64), 0.0, 2000, seed=0, condition=aims)
    spread = sum(0.25 * 0.75 ** (2 * k) for k in range(4))
    torch.testing.assert_close(values, aims**2 * spread / 2, atol=0.1, rtol=0)


def test_the_figure_shows_the_paths_the_control_and_what_is_spent():
    problem = solved()
    solution = sc.solve(problem, sc.RewardBackprop(), time_steps=20, iterations=5, batch_size=64, seed=0)
    figure, axes = solution.plot(128, seed=3, title="of a test")
    assert figure.get_suptitle() == "of a test" and len(axes) == 5
    paths = solution.simulate(128, 3).towards(problem)
    for i in range(2):
        drawn = {line.get_label(): line.get_ydata() for line in axes[i].get_lines()}
        median = np.quantile(paths.states[:, :, i].numpy(), 0.5, axis=1)
        np.testing.assert_allclose(drawn["controlled"], median, atol=1e-12)
        free = sc.simulate(problem, 128, time_steps=20, seed=3).states[:, :, i]
        np.testing.assert_allclose(drawn["reference"], np.quantile(free.numpy(), 0.5, axis=1), atol=1e-12)
    drawn = {line.get_label(): line.get_ydata() for line in axes[2].get_lines()}
    np.testing.assert_allclose(drawn["u2"], np.quantile(paths.controls[:, :, 1].numpy(), 0.5, axis=1), atol=1e-12)
    spent = {line.get_label().split(",")[0]: line.get_ydata() for line in axes[3].get_lines()}
    assert spent["alpha KL"][-1] == pytest.approx(0.5 * float(paths.kl().mean()))
    assert spent["running cost"][-1] == pytest.approx(float(paths.running_cost.mean()))
    assert spent["reward at the end"][0] == pytest.approx(float(paths.reward.mean()))
    values = axes[4].get_lines()[0].get_ydata()
    assert values[-1] == pytest.approx(float(paths.reward[0]))
    first = solution.value(paths.states[0][:8], 0.0, 128, 3)
    assert values[0] == pytest.approx(float(first[0]))


def test_the_coordinates_that_are_moved_are_shown():
    sde = sc.LinearSDE(A=-torch.eye(6), sigma=torch.eye(6), offset=None, horizon=1.0)
    aim = torch.tensor([0.0, 3.0, 0.0, 0.0, -3.0, 2.0])
    problem = sc.ControlProblem(sde, sc.Dirac(torch.zeros(6)), reward=sc.Linear(aim), alpha=1.0)
    solution = sc.solve(problem, sc.PathIntegralGuidance(num_paths=128), time_steps=3, seed=0)
    with pytest.warns(RuntimeWarning, match="effective"):
        _, axes = solution.plot(64)
    assert [a.get_title() for a in axes[:3]] == [f"state, coordinate {i}" for i in (2, 5, 6)]


def test_a_learned_start_and_images_are_drawn():
    for problem in (random_lq(2, start="controlled"),):
        solution = sc.solve(problem, sc.RewardBackprop(), time_steps=6, iterations=2, batch_size=64, seed=0)
        _, axes = solution.plot(64)
        assert min(axes[0].get_lines()[0].get_xdata()) == -1.0
    sde = sc.SDE(lambda x, t: -x, diffusion=torch.tensor(1.0), shape=(1, 2, 2), horizon=1.0)
    start = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(1, 2, 2), 1.0), 3)
    problem = sc.ControlProblem(sde, start, reward=lambda x: x.flatten(1).sum(1), alpha=1.0)
    _, axes = sc.solve(problem, sc.RewardBackprop(), time_steps=4, iterations=2, batch_size=64, seed=0).plot(64)
    assert len(axes) == 6


def test_tokens_have_no_such_figure():
    chain = sc.masked_diffusion(lambda x, s: torch.zeros(*x.shape, 2), length=2, vocabulary=2, steps=4)
    problem = sc.ControlProblem(chain, reward=lambda x: x.sum(1).float(), alpha=1.0)
    solution = sc.solve(problem, sc.PathIntegralGuidance(num_paths=8), seed=0)
    with pytest.raises(ValueError, match="plot is of states that are numbers"):
        solution.plot()
