"""The gradient modes against the exact gradient, and against one another."""

import pytest
import torch
from cases import F64, SmallControl, nonlinear, random_lq
from runs import gradient, perturbed_default

import sdecontrol as sc
from sdecontrol.chains.shifts import shift_function
from sdecontrol.controls.build import build_control
from sdecontrol.methods.base import Run
from sdecontrol.paths.gradients import Objective, backpropagate
from sdecontrol.paths.integrator import integrate

MODES = ["full", "checkpoint", "adjoint"]


PROBLEMS = {
    "linear-quadratic": lambda: random_lq(2, seed=1),
    "controlled start": lambda: random_lq(2, m=3, seed=1, start="controlled"),
    "state-dependent 2x3 noise": nonlinear,
    "mixture model": lambda: sc.ControlProblem(
        sc.generative_sde(sc.GaussianMixture(torch.ones(2, dtype=F64), torch.eye(2, dtype=F64), 0.5), sc.VP(1.0, 1.0)),
        reward=sc.Linear(torch.ones(2, dtype=F64)),
        alpha=0.5,
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("whose", ["default", "user's"])
def test_full_checkpointed_and_adjoint_gradients_agree_to_rounding(name, whose):
    problem = PROBLEMS[name]()
    chain = problem.chain(17)
    control = perturbed_default(problem, chain)
    if whose == "user's":
        control = build_control(problem, chain, SmallControl(2, problem.control_shape[0]))
        if name == "controlled start":
            control = perturbed_default(problem, chain)
    cost, want = gradient(problem, chain, control, "full")
    assert max(float(g.abs().max()) for g in want) > 1e-3
    for mode in ("checkpoint", "adjoint"):
        other, have = gradient(problem, chain, control, mode)
        assert torch.allclose(other.kl, cost.kl, atol=1e-13)
        assert torch.allclose(other.cost, cost.cost, atol=1e-13)
        for a, b in zip(have, want):
            assert (a - b).abs().max() <= 1e-12 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_the_derivative_of_the_cost(mode):
    """Central differences of the mean cost in a random direction."""
    problem = nonlinear()
    chain = problem.chain(9)
    control = perturbed_default(problem, chain)
    _, grads = gradient(problem, chain, control, mode)
    direction = [torch.randn(p.shape, dtype=F64) for p in control.parameters()]
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(control.parameters(), direction):
                p.add_(sign * 1e-5 * d)
        cost, _ = gradient(problem, chain, control, mode)
        values.append(float((cost.terminal + cost.cost / problem.alpha + cost.kl).mean()))
        with torch.no_grad():
            for p, d in zip(control.parameters(), direction):
                p.sub_(sign * 1e-5 * d)
    slope = (values[0] - values[1]) / 2e-5
    assert slope == pytest.approx(sum(float((g * d).sum()) for g, d in zip(grads, direction)), rel=1e-6)


@pytest.mark.parametrize("mode", [*MODES, 2])
def test_states_that_are_asked_for_are_those_of_the_paths(mode):
    problem = random_lq(2, seed=2)
    chain = problem.chain(7)
    control = perturbed_default(problem, chain)
    batch = Run(problem, chain, 8, 1, seed=1).batch()
    with torch.no_grad():
        paths = integrate(chain, batch.x0, batch.noise, shift_function(chain, control))
    rows = slice(1, None, 3)
    objective = Objective(lambda x: x.square().sum(1), seen=rows)
    cost = backpropagate(
        chain, control, batch.x0, batch.noise, objective, parameters=list(control.parameters()), mode=mode
    )
    torch.testing.assert_close(cost.states, paths.states[:-1, rows], rtol=0, atol=1e-12)
    assert gradient(problem, chain, control, mode)[0].states is None


def test_the_last_k_steps_give_the_full_gradient_when_k_is_all_of_them_and_another_one_otherwise():
    problem = random_lq(2, seed=1)
    chain = problem.chain(12)
    control = perturbed_default(problem, chain)
    cost, want = gradient(problem, chain, control, "full")
    for k in (12, 50):
        _, have = gradient(problem, chain, control, k)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(have, want))
    few, have = gradient(problem, chain, control, 3)
    assert torch.allclose(few.kl, cost.kl, atol=1e-13) and torch.allclose(few.end, cost.end)
    assert not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(have, want))


@pytest.mark.parametrize("method", [sc.RewardBackprop(), sc.LogVariance(), sc.AdjointMatching(), sc.SoftPPO()])
def test_nothing_but_the_control_receives_gradients(method):
    model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2)).double()

    class Predict(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x, s):
            return self.net(x)

    reference, classifier = Predict(), torch.nn.Linear(2, 3).double()
    reference.train()
    marker = torch.ones_like(classifier.weight)
    classifier.weight.grad = marker
    problem = sc.ControlProblem(sc.generative_sde(reference, sc.VP(), shape=(2,)), reward=sc.LogProb(classifier, 1))
    before = {n: p.detach().clone() for n, p in reference.named_parameters()}
    during = []

    class Look:
        def on_step_end(self, state):
            during.extend(p.grad is None and not p.requires_grad for p in reference.parameters())

    solution = sc.solve(
        problem, method, time_steps=5, iterations=3, batch_size=64, seed=0, callbacks=[Look()], progress=False
    )
    assert len(during) == 12 and all(during)  # no backward pass through the pre-trained model's parameters, either
    assert all(
        torch.equal(before[n], p) and p.grad is None and p.requires_grad for n, p in reference.named_parameters()
    )
    assert classifier.weight.grad is marker and torch.equal(marker, torch.ones_like(marker))
    assert reference.training and all(m.training for m in reference.modules())
    assert any(not torch.equal(a, b) for a, b in zip(solution.model.parameters(), reference.parameters()))
    assert all(p.requires_grad for p in solution.model.parameters())


def test_default_network_evaluated_along_stored_states_equals_its_step_by_step_shifts():
    problem = random_lq(3, m=2, seed=2)
    chain = problem.chain(6)
    control = perturbed_default(problem, chain)
    control.langevin = None
    states = torch.randn(6, 5, 3, dtype=F64)
    step = control.on_chain(chain)
    want = torch.stack([step(k, states[k], None) for k in range(6)])
    assert torch.allclose(control.along(chain, states), want, atol=1e-12)
    assert torch.allclose(chain.control(3, want[3]), control(states[3], float(chain.times[3])), atol=1e-12)
    times = torch.tensor([0.0, 0.5, 0.5, 1.0, 0.25], dtype=F64)
    rows = torch.stack([control(states[0, i : i + 1], float(times[i]))[0] for i in range(5)])
    assert torch.allclose(control(states[0], times), rows, atol=1e-12)


def test_the_default_network_starts_at_zero():
    for problem in (random_lq(2, seed=1), random_lq(2, seed=1, start="controlled")):
        control = build_control(problem, problem.chain(8), seed=0)
        assert sc.simulate(problem, 9, control=control, time_steps=8, seed=0).shifts.abs().max() == 0
