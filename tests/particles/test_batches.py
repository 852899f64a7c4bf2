"""Particles and evaluations a batch at a time: the same numbers, bit for bit, and models and rewards called with no
more."""

from dataclasses import fields

import pytest
import torch
from cases import F64, but_slow

import sdecontrol as sc
from sdecontrol.evaluation.second_look import look_again

pytestmark = pytest.mark.filterwarnings("ignore:.*(effective|confirmed|particles):RuntimeWarning")

ROWS: list[int] = []


def seen(x):
    """x; how many rows it has is remembered."""
    ROWS.append(len(x))
    return x


class Net(torch.nn.Module):
    def forward(self, x, n, y):
        return 0.8 * torch.tanh(seen(x) + y[:, None])


def conditional(alpha=0.7):
    chain = sc.diffusion_chain(
        Net(), torch.cumprod(1 - torch.linspace(1e-3, 0.25, 40, dtype=F64), 0), shape=(3,), steps=6
    )
    draw = lambda n, generator=None: torch.randn(n, generator=generator, dtype=F64)  # noqa: E731
    return sc.ControlProblem(chain, reward=lambda x, y: seen(x)[:, 0] * y - x[:, 1] ** 2, alpha=alpha, condition=draw)


def with_costs(steepness=1.0, cost=0.3):
    return sc.ControlProblem(
        sc.SDE(lambda x, t: seen(x).sin() - x, torch.tensor(0.7, dtype=F64), dim=2),
        initial=sc.Gaussian(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)),
        reward=lambda x: -steepness * (seen(x) - steepness + 1).square().sum(1),
        running_cost=(lambda x, t: cost * x.square().sum(1)) if cost else None,
        alpha=0.8,
    )


def gibbs():
    return sc.gibbs_problem(lambda x: -0.5 * (seen(x) - 1).square().sum(1), dim=2, dtype=F64)


SOLUTIONS = {
    "smc, costs": lambda: (with_costs(), sc.SMC(num_particles=100), 6),
    "smc, twisted, conditions": lambda: (conditional(), sc.SMC(num_particles=50, twist="tweedie"), None),
    "smc, independent": lambda: (with_costs(), sc.SMC(num_particles=10, independent=True), 6),
    "best-of-n": lambda: (conditional(), sc.BestOfN(8), None),
    "best-of-n, softmax": lambda: (with_costs(), sc.BestOfN(8, selection="softmax"), 6),
    "best-of-n, rejection": lambda: (with_costs(), sc.BestOfN(8, selection="rejection", bound=0.0), 6),
    "tempered, states": lambda: (gibbs(), sc.TemperedSMC(num_particles=100), 6),
    "tempered, paths": lambda: (with_costs(), sc.TemperedSMC(num_particles=100, space="noises"), 6),
}


def most_rows(act):
    ROWS.clear()
    found = act()
    return found, max(ROWS)


def estimates(evaluation):
    """All numbers of an evaluation, and its words."""
    values = [getattr(evaluation, f.name) for f in fields(evaluation)]
    return [str((v.value, v.stderr) if hasattr(v, "stderr") else v) for v in values]


@pytest.mark.parametrize("name", but_slow(SOLUTIONS, "smc, twisted, conditions"))
def test_particles_in_batches_are_those_of_all_at_once_bit_for_bit(name):
    problem, method, steps = SOLUTIONS[name]()
    solution = sc.solve(problem, method, time_steps=steps, seed=0, progress=False)
    n = 300
    for draw in (
        lambda **how: (solution.sample(n, seed=1, **how),),
        lambda **how: solution.weighted_sample(n, seed=2, **how),
    ):
        whole, at_once = most_rows(draw)
        parts, in_batches = most_rows(lambda draw=draw: draw(batch_size=128))
        assert in_batches <= 128 < at_once
        assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))
    with pytest.raises(ValueError, match="batch_size must be a multiple of 64"):
        solution.sample(n, batch_size=100)


@pytest.mark.parametrize("name", ["smc, costs", "best-of-n", "tempered, paths"])
def test_evaluations_of_particles_in_batches_are_those_of_all_at_once(name):
    problem, method, steps = SOLUTIONS[name]()
    solution = sc.solve(problem, method, time_steps=steps, seed=0, progress=False)
    whole, at_once = most_rows(lambda: solution.evaluate(1600, seed=3))
    parts, in_batches = most_rows(lambda: solution.evaluate(1600, seed=3, batch_size=128))
    assert in_batches <= 128 < at_once
    assert estimates(parts) == estimates(whole)


LOOKS = {
    "the reference's paths": with_costs,
    "the reference's paths, conditions": lambda: conditional(200.0),
    "particles of the reference": lambda: with_costs(3.0, cost=20.0),
    "tempered particles": lambda: with_costs(3.0, cost=0.0),
}


@pytest.mark.parametrize("controlled", [True, False])
@pytest.mark.parametrize("name", LOOKS)
def test_a_second_look_in_batches_is_that_of_all_paths_at_once(name, controlled):
    """Of every kind."""
    problem = LOOKS[name]()
    chain = problem.chain(6 if problem.reference.continuous else None)
    control = (lambda x, t, y: -0.1 * x) if problem.condition is not None else lambda x, t: -0.1 * x
    control = control if controlled else None
    whole, at_once = most_rows(lambda: look_again(problem, chain, control, 12000, 3))
    parts, in_batches = most_rows(lambda: look_again(problem, chain, control, 12000, 3, batch_size=128))
    assert whole.source == name.split(",")[0] and whole.log_z is not None
    assert in_batches <= 128 < at_once
    for one, other in zip(vars(parts).values(), vars(whole).values(), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else str(one) == str(other)


@pytest.mark.parametrize("make", [with_costs, conditional])
def test_an_evaluation_in_batches_calls_nothing_with_more_rows(make):
    problem = make()
    steps = 6 if problem.reference.continuous else None
    solution = sc.solve(problem, "log-variance", time_steps=steps, iterations=3, batch_size=64, seed=0, progress=False)
    whole, at_once = most_rows(lambda: solution.evaluate(1500, seed=3))
    parts, in_batches = most_rows(lambda: solution.evaluate(1500, seed=3, batch_size=128))
    assert in_batches <= 128 < at_once
    assert estimates(parts) == estimates(whole)
