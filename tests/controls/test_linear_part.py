"""The linear parameters of the default network: their Fisher information, and steps of least squares."""

import math

import pytest
import torch
from cases import F64, nonlinear, randn, random_lq

import sdecontrol as sc
from sdecontrol.chains.shifts import shifts_along
from sdecontrol.controls.build import build_control
from sdecontrol.controls.linear_part import Gram
from sdecontrol.controls.network import radial_basis
from sdecontrol.methods.base import Regression
from sdecontrol.training.least_squares import LinearSteps


def wells(dtype=F64):
    return sc.ControlProblem(
        sc.SDE(lambda x, t: -4 * x * (x**2 - 1), torch.tensor(0.8, dtype=dtype), dim=2),
        initial=sc.Dirac(torch.zeros(2, dtype=dtype)),
        reward=lambda x: -((x**2 - 1) ** 2).sum(1) + 0.1 * x.prod(1),
        alpha=0.9,
    )


def posterior(reward=None):
    """The diffusion is a number that changes with time, the reward's gradient affine."""
    prior = sc.GaussianMixture(torch.tensor([0.4, 0.6], dtype=F64), randn(2, 2, seed=4), torch.tensor(0.3, dtype=F64))
    G, g = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64), torch.tensor([0.7, -0.2], dtype=F64)
    reward = sc.Quadratic(G, g) if reward is None else reward(G, g)
    return sc.ControlProblem(sc.generative_sde(prior, schedule=sc.VP()), reward=reward, alpha=0.7)


CASES = {
    "affine Langevin term at a level that changes": posterior,
    "affine path": lambda: random_lq(2, m=3),
    "radial basis and Langevin term": wells,
    "controlled start": lambda: random_lq(2, seed=3, start="controlled"),
    "Langevin term, as many noises as not states": nonlinear,
}


def dense(gram, output):
    """The matrix of one output, and whether it is all outputs'."""
    if gram.border is None:
        return gram.shared
    border = gram.border[:, output]
    return torch.cat((torch.cat((gram.shared, border), 1), torch.cat((border.mT, gram.own[output]), 1)))


def setting(name, steps=4, batch=9):
    problem = CASES[name]()
    chain = problem.chain(steps)
    control = build_control(problem, chain, seed=1)
    with torch.no_grad():
        for i, p in enumerate(control.parameters()):
            p += 0.3 * randn(*p.shape, seed=i)
    states = 0.7 * randn(chain.steps, batch, *chain.event_shape, seed=50)
    return problem, chain, control, states


@pytest.mark.parametrize("name", CASES)
def test_the_gram_matrix_is_that_of_the_shifts_derivatives(name):
    """Against every derivative by automatic differentiation, with weights of paths and of steps, for each output."""
    _, chain, control, states = setting(name)
    weights = torch.linspace(0.5, 1.5, states.shape[1], dtype=F64)
    by_step = torch.linspace(0.2, 1.8, chain.steps, dtype=F64)
    c = shifts_along(chain, control, states)
    for part in control.linear_parts():
        gram = part.gram(chain, states, None, weights, by_step)
        for o in range(c.shape[2]):
            rows = []
            for k in range(chain.steps):
                for b in range(states.shape[1]):
                    grads = torch.autograd.grad(c[k, b, o], part.parameters, retain_graph=True, allow_unused=True)
                    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(part.parameters, grads)]
                    rows.append(part.gather(grads)[:, o] * (weights[b] * by_step[k] / states.shape[1]).sqrt())
            want = torch.stack(rows).mT @ torch.stack(rows)
            torch.testing.assert_close(dense(gram, o), want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("damping", [1e-3, 10.0])
def test_blocks_multiply_and_solve_as_matrices(name, damping):
    _, chain, control, states = setting(name, batch=40)
    for part in control.linear_parts():
        gram, v = part.gram(chain, states), part.gather(part.parameters).double()
        damped = gram.damped(damping, v.shape[1])
        product, solution = gram.product(v), damped.solve(v)
        for o in range(v.shape[1]):
            G = dense(gram, o)
            torch.testing.assert_close(product[:, o], G @ v[:, o], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(damped.added[:, o], damping * gram.scale(v.shape[1])[:, o])
            want = torch.linalg.solve(G + torch.diag(damped.added[:, o]), v[:, o])
            torch.testing.assert_close(solution[:, o], want, rtol=1e-6, atol=1e-9 * float(want.abs().max()))


def test_damping_is_relative_to_each_feature_and_to_a_tenth_of_their_mean():
    """Of one output the mean is that of all its features; of several the shared features have the geometric mean."""
    gram = Gram(torch.diag(torch.tensor([4.0, 2.0], dtype=F64)))
    torch.testing.assert_close(gram.scale(3)[:, 2], torch.tensor([4.3, 2.3], dtype=F64))
    own = torch.tensor([[[9.0]], [[3.0]]], dtype=F64)
    gram = Gram(gram.shared, torch.zeros(2, 2, 1, dtype=F64), own)
    middle = 0.1 * math.sqrt(5.0 * 3.0)
    want = torch.tensor([[4 + middle, 4 + middle], [2 + middle, 2 + middle], [9.5, 3.3]], dtype=F64)
    torch.testing.assert_close(gram.scale(2), want)


def test_a_matrix_that_rounding_leaves_indefinite_is_damped_until_it_has_a_factor():
    gram = Gram(torch.diag(torch.tensor([1.0, -1e-5], dtype=F64)))
    damped = gram.damped(1e-9, 1)
    assert 1e-4 <= float(damped.added[1, 0] / gram.scale(1)[1, 0]) <= 1e-3
    gram = Gram(torch.eye(1, dtype=F64), torch.ones(1, 2, 1, dtype=F64), torch.full((2, 1, 1), 1 - 1e-5, dtype=F64))
    assert bool(gram.damped(1e-9, 2).solve(torch.ones(2, 2, dtype=F64)).isfinite().all())


@pytest.mark.parametrize("name", CASES)
def test_scatter_is_the_inverse_of_gather(name):
    _, _, control, _ = setting(name)
    for part in control.linear_parts():
        parts = [randn(*p.shape, seed=i) for i, p in enumerate(part.parameters)]
        for a, b in zip(part.scatter(part.gather(parts)), parts):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["affine path", "radial basis and Langevin term"])
def test_full_steps_solve_a_regression(name):
    """With fixed targets and hardly any damping, full steps end where the gradient vanishes."""
    _, chain, control, states = setting(name, batch=400)
    targets = randn(chain.steps, 400, *chain.noise_shape, seed=9)
    steps = LinearSteps(control.linear_parts())
    steps.decay = steps.part_kl = math.inf
    steps.decay = steps.cancelling = 0.0
    sizes = []
    for _ in range(60):
        for p in control.parameters():
            p.grad = None
        loss = 0.5 * ((shifts_along(chain, control, states) - targets) ** 2).sum((0, 2)).mean()
        loss.backward()
        sizes.append(sum(float(p.grad.square().sum()) for part in steps.parts for p in part.parameters) ** 0.5)
        steps.observe(Regression(chain, states, None, 1.0))
        steps.first = 100.0  # as if the loss had fallen by far
        steps.step(1.0)
        assert all(p.grad is None for part in steps.parts for p in part.parameters)
    assert sizes[-1] < 1e-4 * sizes[0]


def test_damping_is_that_of_cancelling_features_until_the_loss_is_below_a_nat():
    _, chain, control, states = setting("affine path", batch=64)
    for loss, least in ((1e4, 1e-5), (1.0, 1e-5), (1e-2, 1e-7), (1e-9, 1e-8)):
        steps = LinearSteps(control.linear_parts())
        steps.observe(Regression(chain, states, None, loss))
        steps.first = steps.level + 100  # as if it had fallen by far
        assert steps.damping == pytest.approx(least)


def test_the_pace_stays_without_noise_and_falls_where_steps_disagree():
    _, chain, control, states = setting("affine path", batch=64)
    for noisy in (False, True):
        steps = LinearSteps(control.linear_parts())
        for i in range(80):
            for j, p in enumerate(p for part in steps.parts for p in part.parameters):
                p.grad = 1e-3 * (randn(*p.shape, seed=1000 * i + j) if noisy else torch.ones_like(p))
            steps.observe(Regression(chain, states, None, 1.0))
            steps.step(1.0)
        assert steps.step_size < 0.4 if noisy else steps.step_size == 1.0


def test_bumps_are_gaussians_on_a_uniform_grid():
    z = torch.linspace(-4.7, 4.7, 25, dtype=F64)
    centres = torch.linspace(-2.5, 2.5, 10, dtype=F64)
    width = 5 / 9
    want = torch.exp(-0.5 * ((z[:, None] - centres) / width) ** 2)
    torch.testing.assert_close(radial_basis(z), want, rtol=1e-4, atol=1e-7)
    assert float(radial_basis(torch.tensor([-8.0, 8.0], dtype=F64)).max()) < 1e-3
    assert bool(torch.isfinite(radial_basis(torch.tensor([-1e30, 1e30]))).all())


@pytest.mark.parametrize("name", CASES)
def test_all_stored_states_at_once_give_what_single_steps_do(name):
    _, chain, control, states = setting(name)
    shift = control.on_chain(chain)
    want = torch.stack([shift(k, x, None) for k, x in enumerate(states)])
    torch.testing.assert_close(control.along(chain, states), want, rtol=1e-10, atol=1e-12)
    for first in (2, chain.steps - 1):
        torch.testing.assert_close(
            control.along(chain, states[first:], None, first), want[first:], rtol=1e-10, atol=1e-12
        )


def test_an_affine_langevin_term_is_the_reward_s_gradient_without_asking_for_it():
    """The same parameters for the same reward as a function of the user's: at one time, on a chain and along paths."""
    asked = posterior(lambda G, g: lambda x: x @ g - 0.5 * (x @ G * x).sum(1))
    (_, chain, folded, states), control = setting(next(iter(CASES))), build_control(asked, asked.chain(4), seed=1)
    control.load_state_dict(folded.state_dict())
    assert float(folded.langevin.detach().abs().min()) > 0 and folded.langevin_matrix is not None
    assert control.langevin_matrix is None
    for steps in (None, [0, 3]):
        some = states if steps is None else states[steps]
        found, want = (shifts_along(c, u, some, steps=steps) for c, u in ((chain, folded), (asked.chain(4), control)))
        torch.testing.assert_close(found, want)
    torch.testing.assert_close(folded(states[0], 0.3), control(states[0], 0.3))
