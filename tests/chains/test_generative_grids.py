"""Grids and the exponential scheme of generative references."""

import itertools

import pytest
import torch
from cases import F64, spd

import sdecontrol as sc

SCHEDULES = [sc.VP(), sc.CosineVP(), sc.VE(), sc.FlowMatching()]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def gaussian(schedule, mean=(0.7, -0.4), level="reverse"):
    one = sc.GaussianMixture(torch.ones(1, dtype=F64), torch.tensor([mean], dtype=F64), 0.3 * spd(2, 1)[None])
    return sc.generative_sde(one, schedule, noise_level=level)


@each_schedule
@pytest.mark.parametrize("steps", [1, 2, 7, 100, 2000])
def test_a_number_of_steps_is_equal_steps_in_the_cube_root_of_what_noise_hides(schedule, steps):
    grid = gaussian(schedule).default_grid(steps)
    assert len(grid) == steps + 1 and grid[0] == 0 and grid[-1] == 1
    assert all(b > a for a, b in itertools.pairwise(grid))
    s = (schedule.noise_end * (1 - torch.tensor(grid, dtype=F64))).clamp(min=1e-5)
    level = torch.log1p((schedule.std(s) / schedule.mu(s)) ** 2) ** (1 / 3)
    assert torch.allclose(level.diff(), level.diff().mean().expand(steps), atol=1e-6)


@each_schedule
def test_chains_and_exact_solutions_take_them_where_no_scheme_is_said(schedule):
    sde = gaussian(schedule)
    problem = sc.ControlProblem(sde, reward=sc.Linear(torch.ones(2, dtype=F64)), start="controlled")
    own, said = problem.chain(9), problem.chain(sde.default_grid(9), "exponential")
    assert own.main.clock == said.main.clock and own.scheme == said.scheme == "exponential"
    solution = sc.solve(problem, sc.BestOfN(2), time_steps=9, seed=0)
    exact = sc.exact_solution(problem, time_steps=9)
    assert torch.equal(exact.log_z, sc.exact_solution(problem, like=solution).log_z)
    assert torch.equal(exact.log_z, sc.exact_solution(problem, time_steps=sde.default_grid(9)).log_z)


@each_schedule
def test_the_affine_steps_of_a_gaussian_model_are_its_kernels(schedule):
    chain = sc.ControlProblem(gaussian(schedule), start="fixed").chain(6)
    x = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    for k, step in enumerate(chain.affine_steps()):
        mean, scale = chain.kernel(k, x)
        assert torch.allclose(mean, x @ step.matrix.mT + step.shift, atol=1e-10)
        assert torch.allclose(step.scale, scale * torch.eye(2, dtype=F64))
        assert torch.allclose(step.gain, chain.gain(k) * torch.eye(2, dtype=F64))


@each_schedule
def test_any_noise_level_has_the_scheme_of_the_reversal_where_it_is_the_reversals(schedule):
    def level(t):
        s = (schedule.noise_end * (1 - torch.as_tensor(t, dtype=F64))).clamp(min=1e-5)
        return float((schedule.noise_end * schedule.forward_variance_rate(s)).sqrt())

    grid = [0.0, 0.3, 0.6, 0.9, 0.95, 1.0]
    one, other = (
        sc.ControlProblem(gaussian(schedule, level=kind), start="fixed").chain(grid, "exponential")
        for kind in ("reverse", level)
    )
    x = torch.ones(1, 2, dtype=F64)
    for k in range(1, 4):  # near both ends coefficients are singular, and quadrature is not to rounding
        for a, b in zip((*one.kernel(k, x), one.gain(k)), (*other.kernel(k, x), other.gain(k))):
            assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-6)


@each_schedule
@pytest.mark.parametrize("prediction", ["noise", "sample", "v", "velocity", "score"])
def test_the_chain_of_a_tuned_model_is_the_same_scheme_of_that_model(schedule, prediction):
    class Model(torch.nn.Module):
        def __init__(self, c):
            super().__init__()
            self.c = torch.nn.Parameter(torch.tensor(c, dtype=F64))

        def forward(self, x, s):
            return self.c * torch.tanh(x) * (1 + s[:, None])

    first, tuned = Model(0.5), Model(0.7)
    made = [sc.generative_sde(m, schedule, prediction, shape=(2,)) for m in (first, tuned)]
    chains = [sc.ControlProblem(sde, start="fixed").chain(5) for sde in made]
    shift = made[0].shifts_towards(tuned, chains[0])
    x = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    for k in range(5):
        (mean, scale), (other, same) = (chain.kernel(k, x) for chain in chains)
        assert torch.equal(scale, same)
        assert torch.allclose(mean + scale * shift(k, x, None), other, rtol=1e-9, atol=1e-12)


def test_the_default_is_nearer_to_continuous_time_than_equal_euler_steps():
    """log Z of a tilted Gaussian at 50 steps: 6e-3 off, equal Euler steps 1.5e-2, equal exponential ones 2.4e-2."""
    reward = sc.Quadratic(G=2 * torch.eye(2, dtype=F64), g=torch.ones(2, dtype=F64))
    problem = sc.ControlProblem(gaussian(sc.VP()), reward=reward, start="controlled")
    truth, equal = sc.exact_solution(problem).log_z, [k / 50 for k in range(51)]
    ours = abs(sc.exact_solution(problem, time_steps=50).log_z - truth)
    for scheme in ("euler", "exponential"):
        assert ours < 0.6 * abs(sc.exact_solution(problem, time_steps=equal, scheme=scheme).log_z - truth)


def test_evaluate_says_how_far_the_chain_is_from_continuous_time():
    reward = sc.Linear(torch.ones(2, dtype=F64))
    problem = sc.ControlProblem(gaussian(sc.VP()), reward=reward, start="controlled")
    found = sc.solve(problem, sc.BestOfN(2), time_steps=9, seed=0).problem
    solution = sc.solve(found, sc.RewardBackprop(), time_steps=9, iterations=1, batch_size=64, seed=0)
    ev = solution.evaluate(64, seed=0, confirm=False)
    off = sc.exact_solution(problem, time_steps=9).log_z - sc.exact_solution(problem).log_z
    assert abs(ev.discretisation.value - float(off)) < 1e-9 and ev.discretisation.stderr == 0
    assert "discretised" in str(ev)
    two = sc.GaussianMixture(torch.full((2,), 0.5), torch.tensor([[-1.0], [1.0]]), 0.25)
    mixed = sc.ControlProblem(sc.generative_sde(two, sc.VP()), reward=sc.Linear(torch.ones(1)))
    ev = sc.solve(mixed, sc.RewardBackprop(), time_steps=9, iterations=1, batch_size=64, seed=0).evaluate(64, seed=0)
    assert ev.discretisation.stderr == ev.log_z.stderr > 0 and not ev.exact
