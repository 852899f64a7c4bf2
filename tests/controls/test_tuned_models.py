"""Pre-trained models: tuned copies, solution.model in the model's own parametrisation, discrete chains, decoding."""

import math

import pytest
import torch
from cases import F64, randn

import sdecontrol as sc
from sdecontrol.controls.tuned import ControlledModel

ABAR = torch.cumprod(1 - torch.linspace(1e-3, 0.25, 40, dtype=F64), 0)


class Net(torch.nn.Module):
    """A small model of any parametrisation; asserts how it is called."""

    def __init__(self, seed=0, integer=False, scale=0.3, out=0.0, dtype=F64):
        super().__init__()
        self.integer = integer
        self.first = torch.nn.Parameter(scale * randn(4, 16, seed=seed, dtype=dtype))
        self.last = torch.nn.Parameter(scale * randn(16, 3, seed=seed + 1, dtype=dtype))

    def forward(self, x, s):
        assert s.shape == (x.shape[0],) and s.is_floating_point() != self.integer
        s = s.to(x.dtype) / (40 if self.integer else 1)
        return x * 0.8 + torch.tanh(torch.cat((x, s[:, None]), 1) @ self.first) @ self.last


REWARD = sc.Linear(torch.tensor([1.0, -0.5, 0.2], dtype=F64))


def sde_problem(prediction="noise", schedule=None, **options):
    return sc.ControlProblem(
        sc.generative_sde(Net(), schedule or sc.VP(), prediction=prediction, shape=(3,)), reward=REWARD, **options
    )


@pytest.mark.parametrize("prediction", ["noise", "sample", "score", "v", "velocity"])
@pytest.mark.parametrize("schedule", [sc.VP(), sc.FlowMatching(0.005)], ids=["vp", "flow"])
def test_a_tuned_model_in_the_references_place_is_the_controlled_process(prediction, schedule):
    """Foreign samplers may use solution.model: its own reverse SDE is the controlled one, step by step."""
    problem = sde_problem(prediction, schedule)
    solution = sc.solve(
        problem, "reward-backprop", time_steps=6, iterations=3, batch_size=64, seed=0, learning_rate=1e-2
    )
    tuned = sc.ControlProblem(
        sc.generative_sde(solution.model, schedule, prediction=prediction, shape=(3,)),
        reward=REWARD,
        start=problem.start,
    )
    ours = solution.simulate(8, seed=1)
    theirs = sc.simulate(tuned, 8, time_steps=6, noise=ours.noises, state=ours.states[0])
    assert torch.allclose(ours.states, theirs.states, atol=1e-9)
    assert ours.shifts.abs().max() > 1e-3
    u = solution.control(ours.states[2], float(ours.times[2]))
    assert torch.allclose(u, ours.controls[2], atol=1e-9)


def test_any_control_becomes_a_model_in_the_models_parametrisation():
    """A model without parameters (a mixture): solution.model is it plus the control."""
    gm = sc.GaussianMixture(torch.ones(2, dtype=F64), randn(2, 3, seed=4), 0.5)
    problem = sc.ControlProblem(sc.generative_sde(gm, sc.VP()), reward=REWARD)
    solution = sc.solve(problem, "reward-backprop", time_steps=6, iterations=3, batch_size=64, seed=0)
    model = solution.model
    assert isinstance(model, ControlledModel)
    tuned = sc.ControlProblem(
        sc.generative_sde(model, sc.VP(), prediction="noise", shape=(3,)), reward=REWARD, initial=problem.initial
    )
    ours = solution.simulate(8, seed=1)
    theirs = sc.simulate(tuned, 8, time_steps=6, noise=ours.noises, state=ours.states[0])
    assert torch.allclose(ours.states, theirs.states, atol=1e-8) and ours.shifts.abs().max() > 1e-3


@pytest.mark.parametrize("prediction", ["noise", "sample", "v"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_tuned_discrete_model_is_the_controlled_chain_and_decodes_with_the_reference(prediction, clip):
    net = Net(integer=True)
    make = lambda model: sc.diffusion_chain(model, ABAR, prediction, shape=(3,), eta=0.8, steps=8, clip=clip)  # noqa: E731
    problem = sc.ControlProblem(make(net), reward=REWARD, start="fixed")
    solution = sc.solve(problem, "reward-backprop", iterations=3, batch_size=64, seed=0, learning_rate=1e-2)
    ours = solution.simulate(8, seed=1)
    theirs = sc.simulate(
        sc.ControlProblem(make(solution.model), reward=REWARD, start="fixed"),
        8,
        noise=ours.noises,
        state=ours.states[0],
    )
    assert torch.allclose(ours.states, theirs.states, atol=1e-9) and ours.shifts.abs().max() > 1e-3
    x = ours.end
    assert torch.allclose(solution.model(x, torch.zeros(8, dtype=torch.long)), net(x, torch.zeros(8, dtype=torch.long)))
    assert torch.allclose(ours.samples, theirs.samples) and torch.allclose(ours.samples, problem.chain().decode(x))
    if clip is None:
        eps = {"noise": net(x, torch.zeros(8, dtype=torch.long))}.get(prediction)
        if eps is not None:
            assert torch.allclose(ours.samples, (x - (1 - ABAR[0]).sqrt() * eps) / ABAR[0].sqrt(), atol=1e-12)


def test_log_ratios_of_a_tuned_chain_are_ratios_of_gaussian_kernels():
    """c = (mean of the tuned - mean of the reference)/scale, also under clipping."""
    net = Net(integer=True)
    chain = sc.diffusion_chain(net, ABAR, "noise", shape=(3,), eta=1.0, steps=8, clip=1.0)
    problem = sc.ControlProblem(chain, reward=REWARD, start="fixed")
    solution = sc.solve(problem, "reward-backprop", iterations=3, batch_size=64, seed=0, learning_rate=1e-2)
    tuned = sc.diffusion_chain(solution.model, ABAR, "noise", shape=(3,), eta=1.0, steps=8, clip=1.0)
    with torch.no_grad():
        paths, total = solution.simulate(8, seed=1), 0.0
        for k in range(chain.steps):
            x, nxt = paths.states[k], paths.states[k + 1]
            for kernel, sign in ((tuned, 1), (chain, -1)):
                mean, scale = kernel.kernel(k, x)
                total = total + sign * torch.distributions.Normal(mean, scale).log_prob(nxt).sum(1)
    assert torch.allclose(paths.log_ratio(), total, atol=1e-10)


def test_the_memory_of_a_chain_is_the_correlation_of_its_ends_for_gaussian_data():
    """x0^ = sqrt(abar) x is exact for standard normal data."""

    for abar in (ABAR, ABAR[:15]):

        class Cut(torch.nn.Module):
            def forward(self, x, n, abar=abar):
                return abar.to(x)[n][:, None].sqrt() * x

        chain = sc.diffusion_chain(Cut(), abar, "sample", shape=(1,), steps=len(abar))
        problem = sc.ControlProblem(chain, initial=sc.Gaussian(torch.zeros(1, dtype=F64), 1.0), start="fixed")
        paths = sc.simulate(problem, 50_000, seed=1)
        correlation = float(torch.corrcoef(torch.stack((paths.states[0, :, 0], paths.end[:, 0])))[0, 1])
        assert correlation == pytest.approx(chain.memory, abs=0.02)


@pytest.mark.parametrize("start", ["controlled", "memoryless"])
def test_saving_a_tuned_model(tmp_path, start):
    problem = sde_problem(start=start)
    solution = sc.solve(problem, "reward-backprop", time_steps=8, iterations=2, batch_size=64, seed=0)
    solution.save(tmp_path)
    again = sc.load(tmp_path, problem)
    assert torch.equal(again.sample(50, seed=3), solution.sample(50, seed=3))
    assert (type(solution.initial).__name__ == "TiltedStart") == (start == "controlled")
    assert solution.initial.sample((5,)).shape == (5, 3)


def test_default_starts_of_generative_references():
    assert sde_problem().start == "memoryless"
    assert sde_problem(schedule=sc.VP(1.0, 1.0)).start == "controlled"
    assert sde_problem(schedule=sc.VE(sigma_max=5.0)).start == "controlled"


def test_conditional_models_take_their_condition():
    class Conditional(Net):
        def forward(self, x, s, y):
            assert y.shape == (x.shape[0],)
            return super().forward(x, s) + 0.1 * y[:, None].to(x.dtype)

    classifier = torch.nn.Linear(3, 4).double()
    problem = sc.ControlProblem(
        sc.generative_sde(Conditional(), sc.VP(), shape=(3,)),
        reward=sc.LogProb(classifier, None),
        condition=torch.arange(4),
    )
    solution = sc.solve(problem, "reward-backprop", time_steps=5, iterations=2, batch_size=64, seed=0)
    assert solution.sample(10, condition=2).shape == (10, 3)
    assert solution.sample(10, condition=torch.arange(10) % 4).shape == (10, 3)
    assert math.isfinite(solution.evaluate(128, seed=0).gap.value)
    tuned = solution.model(randn(4, 3, seed=1), torch.full((4,), 0.5, dtype=F64), torch.arange(4))
    assert tuned.shape == (4, 3)


def test_models_in_float32_and_images():
    class Image(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x, s):
            return self.conv(x) * s[:, None, None, None]

    net = Image()
    for reference in (
        sc.generative_sde(net, sc.VP(), shape=(1, 8, 8)),
        sc.diffusion_chain(net, ABAR.float(), shape=(1, 8, 8), sampler="ddpm", steps=6),
    ):
        problem = sc.ControlProblem(reference, reward=lambda x: x.flatten(1).sum(1), alpha=0.1)
        steps = {} if reference is not problem.reference or hasattr(reference, "levels") else {"time_steps": 5}
        for start in ("fixed", "controlled"):
            problem = sc.ControlProblem(reference, reward=lambda x: x.flatten(1).sum(1), alpha=0.1, start=start)
            solution = sc.solve(problem, "reward-backprop", iterations=2, batch_size=64, seed=0, **steps)
            assert solution.sample(3).shape == (3, 1, 8, 8)
            assert solution.model(torch.randn(2, 1, 8, 8), torch.ones(2)).shape == (2, 1, 8, 8)
