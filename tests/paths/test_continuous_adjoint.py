"""Gradients by adjoint equations against the exact gradient of the chain; and the measured orders."""

import itertools
import math
from itertools import pairwise

import pytest
import torch
from cases import F64, SmallControl, nonlinear, random_lq, slow_but

import sdecontrol as sc
from sdecontrol.controls.build import build_control
from sdecontrol.methods.base import Run
from sdecontrol.paths.brownian import coarsen
from sdecontrol.paths.continuous_adjoint import CONTINUOUS_MODES, Backwards, backpropagate_continuous
from sdecontrol.paths.gradients import Objective, backpropagate
from sdecontrol.randomness import SuppliedNoise


def perturbed(problem, chain, control=None):
    control = build_control(problem, chain, control, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in control.named_parameters():
            size = (
                0.1 / p.shape[1] ** 0.5 if name.endswith("langevin") else 0.1
            )  # one Langevin coefficient an output, of the same size together
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=F64).to(p.dtype))
    return control


def objective(problem):
    return Objective(lambda x: -problem.reward(x) / problem.alpha, problem.running_cost_or_none, problem.alpha)


def gradient(problem, chain, control, mode, x0, noise):
    parameters = [p for p in control.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = None
    function = backpropagate_continuous if mode in CONTINUOUS_MODES else backpropagate
    cost = function(
        chain,
        control,
        x0,
        noise,
        objective(problem),
        parameters=parameters,
        mode=mode,
    )
    return cost, torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2)).double()

    def forward(self, x, s):
        return self.net(x) * s[:, None]


PROBLEMS = {
    "linear-quadratic": (lambda: random_lq(2, m=3, seed=1), None),
    "a user's control": (lambda: random_lq(2, m=3, seed=1), lambda: SmallControl(2, 3)),
    "controlled start": (lambda: random_lq(2, m=3, seed=1, start="controlled"), None),
    "state-dependent 2x3 noise": (nonlinear, lambda: SmallControl(2, 3)),
    "tuned model": (
        lambda: sc.ControlProblem(
            sc.generative_sde(Tiny(), sc.VP(1.0, 1.0), shape=(2,)),
            initial=sc.Dirac(torch.ones(2, dtype=F64)),
            reward=sc.Linear(torch.ones(2, dtype=F64)),
        ),
        None,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=() if (i + j) % 2 else pytest.mark.slow)
        for (i, name), (j, mode) in itertools.product(enumerate(PROBLEMS), enumerate(CONTINUOUS_MODES))
    ],
)
def test_the_gradients_error_is_of_order_one(name, mode):
    """Against the exact gradient of the Euler chain on the same Brownian paths (order 1/2 at least for the noise that
    depends on the state; the slope is then between)."""
    make, module = PROBLEMS[name]
    problem = make()

    def euler(steps):
        return problem.chain([k / steps * problem.horizon for k in range(steps)] + [problem.horizon], "euler")

    control = perturbed(problem, euler(16), None if module is None else module())
    finest, errors = 128, []
    fine = Run(problem, euler(finest), 16, 1, seed=1).batch()
    for steps in (16, 32, 64, 128):
        chain = euler(steps)
        noise = Run(problem, chain, 16, 1, seed=1).batch().noise
        if not chain.start:
            noise = SuppliedNoise(coarsen(euler(finest).clock, fine.noise.all(), every=finest // steps)[1])
        _, want = gradient(problem, chain, control, "adjoint", fine.x0, noise)
        _, have = gradient(problem, chain, control, mode, fine.x0, noise)
        errors.append(float((have - want).norm() / want.norm()))
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[0] < 0.5 and sum(slopes) / 3 == pytest.approx(
        1.0, abs=0.15 if name != "state-dependent 2x3 noise" else 0.5
    )


@pytest.mark.parametrize("name", ["linear-quadratic", "state-dependent 2x3 noise", "elementwise", "uneven grid"])
def test_reversible_heuns_gradient_is_that_of_its_own_forward_pass(name):
    if name == "elementwise":
        sde = sc.SDE(lambda x, t: torch.sin(x) - x, lambda x, t: 0.5 + 0.2 * torch.sin(x), shape=(2, 2))
        problem = sc.ControlProblem(
            sde, initial=sc.Gaussian(torch.zeros(2, 2, dtype=F64), 1.0), reward=lambda x: -(x**2).flatten(1).sum(1)
        )
        control = build_control(problem, problem.chain(9), seed=0)
    else:
        problem = nonlinear() if name.startswith("state") else random_lq(2, m=3, seed=1)
        control = build_control(problem, problem.chain(9), SmallControl(2, 3))
    chain = problem.chain([0.0, 0.05, 0.3, 0.35, 1.0] if name == "uneven grid" else 12)
    if name == "elementwise":
        control = perturbed(problem, chain)
    batch = Run(problem, chain, 8, 1, seed=1).batch()
    cost, have = gradient(problem, chain, control, "reversible-heun", batch.x0, batch.noise)
    parameters = list(control.parameters())
    own = Backwards(chain, control, batch.noise, 0, batch.x0, objective(problem), parameters, "reversible-heun")
    y = own.y0
    extra = own.stepper.init_extra_solver_state(own.times[0], y)
    for s, t in pairwise(own.times):
        y, extra = own.stepper.step(s, t, y, extra)
    d = problem.event_shape.numel()
    terminal = -problem.reward(y[:, :d].unflatten(1, problem.event_shape)) / problem.alpha
    loss = (terminal + y[:, d] / problem.alpha + y[:, d + 1]).mean()
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    assert float((have - want).norm() / want.norm()) < 1e-11
    assert torch.allclose(cost.terminal, terminal) and torch.allclose(cost.kl, y[:, d + 1])


def test_the_forward_path_of_the_continuous_adjoint_is_the_euler_chains_for_additive_noise():
    problem = random_lq(2, m=3, seed=1)
    chain = problem.chain(12)
    control = perturbed(problem, chain)
    batch = Run(problem, chain, 8, 1, seed=1).batch()
    exact, _ = gradient(problem, chain, control, "adjoint", batch.x0, batch.noise)
    mine, _ = gradient(problem, chain, control, "continuous-adjoint", batch.x0, batch.noise)
    for part in ("end", "terminal", "cost", "kl"):
        assert torch.allclose(getattr(mine, part), getattr(exact, part), atol=1e-12)


@pytest.mark.parametrize("mode", slow_but(CONTINUOUS_MODES, "continuous-adjoint"))
def test_training_with_it_reaches_the_optimum(mode):
    problem = random_lq(2, seed=1)
    solution = sc.solve(problem, sc.RewardBackprop(gradient=mode), time_steps=8, iterations=40, batch_size=64, seed=0)
    exact = sc.exact_solution(problem, like=solution)
    before = float(exact.elbo) - sc.simulate(problem, 4096, time_steps=8, seed=1).log_weights().mean()
    left = float(exact.elbo) - solution.evaluate(4096, seed=1).elbo.value
    assert before > 0.3 and left < 0.25 * before, (before, left)


class OfCondition(torch.nn.Module):
    """``a + b y + c x``, of the condition y, or of y = 0.7 where there is none."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Parameter(torch.full((1,), v, dtype=F64)) for v in (0.3, -0.4, 0.2))

    def forward(self, x, t, y=0.7):
        return self.a + self.b * y + self.c * x


@pytest.mark.parametrize("mode", CONTINUOUS_MODES)
def test_conditions_reach_the_adjoint(mode):
    """With one condition, 0.7, the gradient is that of the problem in which 0.7 is written; with another it is not."""
    start = sc.Dirac(torch.zeros(1, dtype=F64))

    def conditional(y):
        return sc.ControlProblem(
            sc.SDE(lambda x, t, y: y - x, 0.5, dim=1),
            start,
            lambda x, y: -((x - 2 * y) ** 2).sum(1),
            lambda x, t, y: 0.3 * (x * y)[:, 0] ** 2,
            condition=torch.tensor([[y]], dtype=F64),
        )

    plain = sc.ControlProblem(
        sc.SDE(lambda x, t: 0.7 - x, 0.5, dim=1),
        start,
        lambda x: -((x - 1.4) ** 2).sum(1),
        lambda x, t: 0.3 * (0.7 * x)[:, 0] ** 2,
    )
    found = []
    for problem in (conditional(0.7), plain, conditional(0.2)):
        run = Run(problem, problem.chain(4), 64, 1, 0, OfCondition())
        method = sc.RewardBackprop(gradient=mode)
        state = method.setup(run)
        method.step(state, run)
        found.append(torch.cat([p.grad for p in state.control.parameters()]))
    assert torch.allclose(found[0], found[1], rtol=1e-9) and not torch.allclose(found[2], found[1], rtol=0.1)


def test_other_chains_are_refused_and_names_are_known():
    problem = random_lq(2, seed=1)
    with pytest.raises(ValueError, match=r"continuous-adjoint.*scheme='euler'.*TransitionChain"):
        sc.solve(problem, sc.RewardBackprop(gradient="continuous-adjoint"), scheme="exact", iterations=1)
    with pytest.raises(ValueError, match="did you mean 'continuous-adjoint'"):
        sc.RewardBackprop(gradient="continous-adjoint")


@pytest.mark.slow
@pytest.mark.parametrize("scheme, case", [("euler", "geometric"), ("srk", "geometric"), ("exponential", "semilinear")])
def test_measured_orders_are_those_of_theory(scheme, case):
    orders = pytest.importorskip("benchmarks.orders")
    r = orders.measure(scheme, case, paths=1 << 16)
    for kind in ("strong", "weak"):
        assert abs(r[f"{kind}_order"] - r["theory"][kind]) <= 0.1
    assert orders.exact_scheme_error() < 1e-12
