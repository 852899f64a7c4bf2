"""The default network's Langevin term on steep rewards: scaled so that a step of Adam cannot throw the control; what it
can represent stays."""

import pytest
import torch
from cases import but_slow, random_lq

import sdecontrol as sc
from sdecontrol.chains.shifts import shifts_along
from sdecontrol.controls.build import build_control

QUICK = {"time_steps": 8, "batch_size": 64, "seed": 3, "progress": False}


def problem_of(steepness):
    problem = random_lq(2, seed=1, dtype=torch.float32)
    return sc.ControlProblem(
        problem.reference, problem.initial, reward=lambda x: -steepness * (x - 2).square().sum(1), alpha=0.5
    )


def control_of(problem):
    return build_control(problem, problem.chain(8), seed=0)


def test_a_mild_reward_leaves_the_term_as_it_is():
    assert control_of(problem_of(1.0)).langevin_scale == 1.0


@pytest.mark.parametrize("steepness", [200.0, 2e4])
def test_the_usual_slope_times_the_scale_is_fifty(steepness):
    """Slopes are linear in the reward: a hundred times the steepness has a hundredth of the scale."""
    scale = control_of(problem_of(steepness)).langevin_scale
    assert scale < 1
    assert scale * steepness == pytest.approx(200.0 * control_of(problem_of(200.0)).langevin_scale, rel=1e-4)
    paths = sc.simulate(problem_of(steepness), 256, time_steps=8, seed=0, keep="states")
    x = paths.states[:, :32].flatten(0, 1)
    assert (4 * steepness * (x - 2)).norm(dim=1).median() * scale == pytest.approx(50, rel=0.3)


def test_the_term_is_as_far_as_its_scale_along_a_path_step_by_step_and_in_least_squares():
    """One over the scale in the constant feature is the whole gradient, ``sigma^T grad r / alpha``, by all three
    ways."""
    problem = problem_of(200.0)
    chain, control = problem.chain(8), control_of(problem)
    with torch.no_grad():
        control.langevin[0] = 1 / control.langevin_scale
        x = sc.simulate(problem, 64, time_steps=8, seed=1, keep="states").states[:-1]
        sigma = problem.reference.diffusion(x[0], chain.times[0])
        sigma = sigma[0] if sigma.ndim == 3 else torch.diag_embed(sigma.expand(2))
        slope = -800 * (x - 2) @ sigma
        first = (
            control.tables(chain)[4] / control.langevin_scale
        )  # phi times the coefficients: its constant feature may not be 1
        want = slope * (first * control.langevin_scale).unsqueeze(1)
        along = shifts_along(chain, control, x)
        size = torch.tensor(chain.step_sizes).sqrt().reshape(-1, 1, 1)
        assert torch.allclose(along, size * want, rtol=1e-4, atol=1e-2)
        step = control.on_chain(chain)
        assert torch.allclose(step(3, x[3], None), along[3], rtol=1e-5)
        part = control.linear_parts()[0]
        own = part.features(chain, x, None)[3]
        assert own is not None and torch.allclose(own[..., -1], control.langevin_scale * slope, rtol=1e-4, atol=1e-3)


def test_a_saved_solution_keeps_its_scale(tmp_path):
    problem = problem_of(200.0)
    solution = sc.solve(problem, sc.LogVariance(), iterations=6, **QUICK)
    solution.save(tmp_path / "run")
    again = sc.load(tmp_path / "run", problem)
    assert again.control.langevin_scale == solution.control.langevin_scale < 1
    assert torch.equal(again.sample(64, seed=1), solution.sample(64, seed=1))


@pytest.mark.parametrize("method", but_slow(["log-variance", "soft-ppo", "path-consistency", "reinforce"], "soft-ppo"))
def test_training_on_a_steep_reward_goes_up_and_not_away(method):
    """Without the scale all four end in a gradient that is not finite within a dozen iterations."""
    solution = sc.solve(problem_of(200.0), method, iterations=40, **QUICK)
    objectives = [h["objective"] for h in solution.history]
    assert max(h["kl"] for h in solution.history) < 1e5
    assert sum(objectives[-5:]) / 5 > objectives[0] + 100


@pytest.mark.parametrize("method", ["adjoint-matching", "socm"])
def test_least_squares_has_the_term_as_it_is(method):
    """Its damping is relative to each feature; a scale let single paths of tuned mixtures go astray."""
    solution = sc.solve(problem_of(200.0), method, iterations=2, **QUICK)
    assert solution.control.langevin_scale == 1.0


def test_the_term_of_a_density_is_bounded_at_five_times_its_usual_size():
    """``z / (1 + |z|/b)``, z the reward's gradient in units of the reference's scale, ``b = 5 rough sqrt(d)``: from
    near to far out along a ray, in closed form (how it fades in time cancels in the ratios)."""
    problem = sc.gibbs_problem(
        lambda x: -8 * x.square().sum(1), 2, centre=torch.zeros(2, dtype=torch.float64), scale=1.0
    )
    chain = problem.chain(8)
    control = build_control(problem, chain, seed=0)
    away = torch.tensor([0.05, 0.5, 5.0, 500.0], dtype=torch.float64)
    x = away.unsqueeze(1) * torch.tensor([0.6, 0.8], dtype=torch.float64)
    with torch.no_grad():
        control.langevin[0] = 1.0
        term = shifts_along(chain, control, x.expand(chain.steps, 4, 2))[5].norm(dim=1)
    z = 15 * away  # -16 x of the density, + x of the reference's end
    bounded = z / (1 + z / (5 * problem.roughness * 2**0.5))
    assert torch.allclose(term / term[0], bounded / bounded[0], rtol=1e-6)
