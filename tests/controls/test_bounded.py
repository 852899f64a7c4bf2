"""Controls within bounds: ``solve(bounds=)`` against a closed form, and what a bounded control is."""

import math

import pytest
import torch

import sdecontrol as sc
from sdecontrol.controls.bounded import BoundedControl
from sdecontrol.controls.build import build_control

PULL, BOUND = 2.0, 0.8


def linear(dim=1, **options):
    """Brownian motion with the reward 2 x: the optimum is u = 2 everywhere, and among |u| <= b it is u = b."""
    given = {"reward": lambda x: PULL * x.sum(1), "alpha": 1.0, **options}
    sde = sc.SDE(lambda x, t: torch.zeros_like(x), torch.tensor(1.0), dim=dim)
    return sc.ControlProblem(sde, sc.Dirac(torch.zeros(dim)), **given)


def trained(method, bounds, iterations=150, **options):
    problem = options.pop("problem", None) or linear()
    settings = {"time_steps": 4, "iterations": iterations, "batch_size": 64, "seed": 0, "progress": False, **options}
    return sc.solve(problem, method, bounds=bounds, **settings)


@pytest.mark.parametrize(
    "method, within",
    [
        (sc.RewardBackprop(), 0.05),
        pytest.param(sc.Reinforce(), 0.05, marks=pytest.mark.slow),
        pytest.param(sc.SoftPPO(), 0.05, marks=pytest.mark.slow),
        pytest.param(sc.AdjointMatching(), 0.05, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_best_bounded_control_is_at_the_bound(method, within):
    """Its gap is ``(2 - b)^2 T / 2``, and log Z = 2 is found by its weights all the same."""
    solution = trained(method, (-BOUND, BOUND), 600 if method.name != "reward-backprop" else 150)
    found = solution.evaluate(8192, seed=1, confirm=False)
    want = 0.5 * (PULL - BOUND) ** 2
    assert want - 4 * found.elbo.stderr < 2.0 - found.elbo.value < want + within
    assert abs(found.log_z.value - 2.0) < 4 * found.log_z.stderr
    u = solution.control(torch.linspace(-30, 30, 101)[:, None], 0.25).detach()
    assert float(u.max()) <= BOUND * (1 + 1e-6) and float(u[50]) > 0.9 * BOUND


def test_two_sides_and_several_inputs():
    """Bounds of each input; where they do not act the control is the free one."""
    low, high = torch.tensor([-0.5, -3.0]), torch.tensor([0.4, 50.0])
    solution = trained(sc.RewardBackprop(), (low, high), problem=linear(2))
    u = solution.control(torch.randn(200, 2) * 5, 0.3).detach()
    assert bool((u >= low).all()) and bool((u <= high).all())
    x = solution.sample(500, seed=1).detach() * 0.5
    assert abs(float(solution.control(x, 0.5).detach()[:, 1].mean()) - PULL) < 0.2


def test_the_squash():
    problem = linear(2)
    chain = problem.chain(4)
    low, high = torch.tensor([-0.5, -3.0]), torch.tensor(2.0)
    control = BoundedControl(build_control(problem, chain, seed=0), low, high).double()
    v = torch.linspace(-9, 9, 181, dtype=torch.float64).unsqueeze(1).expand(-1, 2).clone().requires_grad_()
    u = control.squash(v)
    assert (
        bool((u > control.low).all()) and bool((u < control.high).all()) and float(u[90].detach().abs().max()) < 1e-12
    )
    (slope,) = torch.autograd.grad(u.sum(), v)
    torch.testing.assert_close(slope[90], torch.ones(2, dtype=torch.float64))
    assert bool((u[1:] > u[:-1]).all()) and float(slope.diff(dim=0).abs().max()) < 0.3  # no kink
    torch.testing.assert_close(u[100], high * (v[100] / high).tanh())
    half = BoundedControl(control.inner, low.double(), torch.tensor(math.inf, dtype=torch.float64))
    w = half.squash(v)
    (slope,) = torch.autograd.grad(w.sum(), v)
    assert torch.equal(w[91:], v[91:]) and torch.equal(slope[91:], torch.ones(90, 2).double())
    torch.testing.assert_close(w[:90], u[:90])


def test_a_chain_moves_as_the_control_says():
    """Shifts, with noise that mixes the inputs, are those of ``u(x, t)``."""
    mixing = torch.tensor([[1.0, 0.5], [0.0, 2.0]])
    sde = sc.SDE(lambda x, t: -x, mixing, dim=2)
    problem = sc.ControlProblem(sde, sc.Dirac(torch.zeros(2)), reward=lambda x: 3 * x.sum(1))
    solution = trained(sc.RewardBackprop(), (-1.0, 1.0), 40, problem=problem)
    chain = problem.chain(4)
    x = torch.randn(50, 2)
    for k in range(4):
        shift = solution.control.on_chain(chain)(k, x, None)
        torch.testing.assert_close(
            shift, chain.shift_at(k, x, solution.control(x, chain.clock[k])), rtol=1e-4, atol=1e-5
        )


def test_saved_resumed_and_trained_further(tmp_path):
    whole = trained(sc.RewardBackprop(), (-BOUND, 1.5), 20, checkpoint_dir=tmp_path / "a", checkpoint_every=10)
    whole.save(tmp_path / "solution")
    x = torch.randn(9, 1)
    again = sc.load(tmp_path / "solution", linear())
    assert torch.equal(again.control(x, 0.5), whole.control(x, 0.5))
    with pytest.raises(ValueError, match="bounds"):
        trained(sc.RewardBackprop(), (-BOUND, 1.4), 20, checkpoint_dir=tmp_path / "a", resume=True)
    with pytest.raises(ValueError, match="bounds"):
        trained(sc.RewardBackprop(), None, 20, checkpoint_dir=tmp_path / "a", resume=True)
    further = trained(sc.RewardBackprop(), None, 5, control=whole)  # as bounded as it was
    assert float(further.control(torch.full((1, 1), 99.0), 0.1).detach()) <= 1.5
    wider = trained(sc.RewardBackprop(), (-3.0, 3.0), 150, control=whole)
    assert abs(float(wider.control(0.2 * x, 0.1).detach().mean()) - PULL) < 0.3


def tokens():
    model = lambda x, s: torch.zeros(*x.shape, 3)  # noqa: E731
    chain = sc.masked_diffusion(model, 2, 3, order="random")
    return sc.ControlProblem(chain, reward=lambda x: x.sum(1).float())


@pytest.mark.parametrize(
    "bounds, options, error, says",
    [
        ((0.5, 1.0), {}, ValueError, "must include 0"),
        ((0.0, 1.0), {}, ValueError, "both sides of 0"),
        (1.0, {}, TypeError, "pair"),
        ((None, 1.0), {}, TypeError, "numbers or tensors"),
        (("low", "high"), {}, TypeError, "numbers or tensors"),
        ((-torch.ones(3), torch.ones(3)), {}, ValueError, "shape"),
        ((-math.nan, 1.0), {}, ValueError, "low"),
        ((-1.0, 1.0), {"method": sc.SMC(num_particles=16)}, ValueError, "leave bounds out"),
        (
            (-1.0, 1.0),
            {"problem": tokens, "method": sc.LogVariance(), "time_steps": None},
            ValueError,
            "leave bounds out",
        ),
    ],
    ids=["beside 0", "one side", "a number", "open", "words", "shape", "nan", "no control", "tokens"],
)
def test_bad_bounds(bounds, options, error, says):
    problem, method = options.pop("problem", linear)(), options.pop("method", sc.RewardBackprop())
    iterations = None if method.default_iterations == 0 else 2
    with pytest.raises(error, match=says):
        sc.solve(
            problem, method, bounds=bounds, **{"time_steps": 4, "iterations": iterations, "progress": False, **options}
        )
