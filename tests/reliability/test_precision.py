"""The chain's arithmetic is float32 at least: under autocast, and whatever precision models, controls and rewards are
in."""

import math

import pytest
import torch
from cases import linear, nonlinear, random_lq

import sdecontrol as sc

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
HALVES = [BF16, F16]


def autocast():
    return torch.autocast("cpu", dtype=BF16)


class Net(torch.nn.Module):
    """A user's module of state and time, which notes how it is called."""

    def __init__(self, out=2, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = torch.nn.Linear(3, 16), torch.nn.Linear(16, out)
        self.seen, self.given = [], set()

    def forward(self, x, t):
        self.given |= {x.dtype, t.dtype}
        h = self.first(torch.cat((x, t.reshape(-1, 1).expand(len(x), 1)), 1))
        self.seen.append(h.dtype)
        return self.last(h.tanh())


class Reward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.seen = torch.nn.Linear(2, 1), []

    def forward(self, x):
        value = self.linear(x)
        self.seen.append(value.dtype)
        return value[:, 0]


# ------------------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_process_of_half_precision_moves_and_ends_where_it_should(dtype):
    """In bfloat16 1000 steps of dX = -X dt + dW from 1 end at mean 1.009, and many times coincide."""
    sde = sc.LinearSDE(-torch.eye(2, dtype=dtype), torch.eye(2, dtype=dtype), offset=torch.zeros(2, dtype=dtype))
    for reference in (sde, sc.SDE(lambda x, t: -x, torch.ones(2, dtype=dtype), dim=2)):
        problem = sc.ControlProblem(
            reference,
            sc.Dirac(torch.ones(2, dtype=dtype)),
            reward=sc.Quadratic(torch.eye(2, dtype=dtype), torch.ones(2, dtype=dtype)),
            running_cost=sc.QuadraticCost(torch.eye(2, dtype=dtype)),
        )
        assert problem.dtype == F32
        paths = sc.simulate(problem, 2000, time_steps=1000, seed=0)
        assert {part.dtype for part in (paths.states, paths.times, paths.noises, paths.log_weights())} == {F32}
        assert bool((paths.times.diff() > 0).all())
        stderr = math.sqrt((1 - math.exp(-2)) / 2 / 2000)
        assert float((paths.samples.mean(0) - math.exp(-1)).abs().max()) < 4 * stderr


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_law_of_half_precision_is_one_of_float32(dtype):
    mean, means = torch.zeros(2, dtype=dtype), torch.ones(2, 2, dtype=dtype)
    laws = [
        sc.Dirac(mean),
        sc.Gaussian(mean, 1.0),
        sc.Gaussian(mean, torch.eye(2, dtype=dtype)),
        sc.GaussianMixture(torch.ones(2, dtype=dtype), means, torch.ones(2, 2, dtype=dtype)),
        torch.distributions.Independent(torch.distributions.Normal(mean, 1 + mean), 1),
    ]
    for law in laws:
        problem = sc.ControlProblem(sc.BrownianMotion(2), law, reward=lambda x: -x.square().sum(1))
        paths = sc.simulate(problem, 64, time_steps=4, seed=0)
        assert (problem.dtype, paths.states.dtype, paths.log_weights().dtype) == (F32, F32, F32)
    with pytest.raises(TypeError, match=r"initial law torch\.float32"):
        sc.ControlProblem(sc.BrownianMotion(2, torch.eye(2, dtype=F64)), laws[0])


def half_cases(dtype):
    """What of half precision, as a problem and a control; the same in float32."""

    def model(net):  # under a schedule whose states stay of one size, and with them the weights' rounding
        return sc.ControlProblem(sc.generative_sde(net, sc.VP(1, 1), shape=(2,)), reward=first, start="fixed"), None

    def chain(net):
        made = sc.diffusion_chain(net, torch.linspace(0.99, 0.02, 20), shape=(2,), steps=8)
        return sc.ControlProblem(made, reward=first, start="fixed"), None

    def drift(net):
        return sc.ControlProblem(sc.SDE(net, 1.0, dim=2), sc.Dirac(torch.zeros(2)), reward=first), None

    def control(net):
        return sc.ControlProblem(sc.BrownianMotion(2), sc.Dirac(torch.zeros(2)), reward=first), net

    def reward(net):
        start = sc.Dirac(torch.zeros(2))
        return sc.ControlProblem(sc.BrownianMotion(2), start, reward=Reward().to(net.first.weight.dtype)), None

    return {"model": model, "chain": chain, "drift": drift, "control": control, "reward": reward}


def first(x):
    return x[:, 0]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("what", ["model", "chain", "drift", "control", "reward"])
def test_modules_of_half_precision_are_called_in_it_and_the_chain_is_not(what, dtype):
    make = half_cases(dtype)[what]
    found = {}
    for kind in (F32, dtype):
        net = Net().to(kind)
        problem, control = make(net)
        steps = 8 if problem.reference.continuous else None
        paths = sc.simulate(problem, 256, control=control, time_steps=steps, seed=0)
        parts = (paths.states, paths.shifts, paths.log_ratio(), paths.reward, paths.log_weights(), paths.samples)
        assert problem.dtype == F32 and {part.dtype for part in parts} == {F32}
        if what in ("model", "drift", "control"):
            assert net.given == {kind} and set(net.seen) == {kind}
        found[kind] = paths
    near, far = found[F32], found[dtype]
    rounding = 16 * torch.finfo(dtype).eps  # of a network of two layers, over eight steps
    assert float((near.samples - far.samples).detach().abs().max()) < rounding * float(
        near.samples.detach().abs().max()
    )
    assert float((near.log_weights() - far.log_weights()).abs().max()) < 4 * rounding
    assert what in ("model", "chain") or not torch.equal(near.log_weights(), far.log_weights())


def test_training_parameters_of_half_precision_is_said_to_lose_steps():
    problem = sc.ControlProblem(sc.BrownianMotion(2), sc.Dirac(torch.zeros(2)), reward=first)
    options = {"iterations": 2, "time_steps": 4, "seed": 0, "progress": False}
    with pytest.warns(UserWarning, match=r"parameters of torch.bfloat16 .* are lost"):
        solution = sc.solve(problem, sc.RewardBackprop(), control=Net().to(BF16), **options)
    u = solution.control(torch.zeros(3, 2), 0.5)
    assert u.dtype == F32 and bool(u.isfinite().all())


# ------------------------------------------------------------------------------------------------ autocast


def bowl(x):
    return -(x - 1).square().sum(1)


def numbers(*parts):
    return torch.cat([torch.as_tensor(part).detach().double().flatten() for part in parts])


def lq(**options):
    return random_lq(2, seed=1, dtype=F32, **options)


def trained(method, **options):
    def run(made):
        options_ = {"iterations": 3, "time_steps": 8, "batch_size": 64, "seed": 3, "progress": False, **options}
        solution = sc.solve(made, method, **options_)
        ev = solution.evaluate(128, seed=1)
        return numbers(
            solution.sample(16, seed=0), ev.log_z.value, ev.elbo.value, solution.control(torch.ones(2, 2), 0.5)
        )

    return run


def sampled(method):
    def run(_):
        solution = sc.solve(sc.gibbs_problem(bowl, 2, seed=0), method, seed=0, progress=False)
        x, log_w = solution.weighted_sample(64, seed=1)
        return numbers(x, log_w, solution.evaluate(64, seed=2).log_z.value)

    return run


def simulated(**options):
    def run(problem):
        paths = sc.simulate(problem, 64, seed=0, **options)
        rest = () if "scheme" in options else (paths.log_ratio(), paths.log_weights())
        return numbers(paths.states, paths.samples, *rest)

    return run


def mixture_problem():
    law = sc.GaussianMixture(torch.ones(2), torch.tensor([[-2.0, 0.5], [1.5, 0.1]]), 0.3)
    return sc.ControlProblem(sc.generative_sde(law, sc.VP()), reward=first)


def exact(problem):
    solution = sc.exact_solution(problem, time_steps=8)
    x = torch.ones(3, 2)
    paths = sc.simulate(solution.problem, 64, control=solution.control, time_steps=8, seed=0)
    return numbers(solution.log_z, solution.control(x, 0.5), solution.value(x, 0.5), paths.log_ratio(), paths.states)


def likelihood(problem):
    return numbers(sc.log_likelihood(problem, torch.ones(3, 2)).value)


def learned_start():
    return lq(start="controlled")


def nonlinear_single():
    return nonlinear(dtype=F32)


# verb -> the problem, made outside of autocast (a user's own tensors are theirs), and what is asked of it
VERBS = {
    "simulate, linear": (lq, simulated(time_steps=8)),
    "simulate, exact": (lq, simulated(time_steps=8, scheme="exact")),
    "simulate, nonlinear": (nonlinear_single, simulated(time_steps=8)),
    "simulate, learned start": (learned_start, simulated(time_steps=8)),
    "simulate, mixture": (mixture_problem, simulated(time_steps=8)),
    "simulate, heun": (lq, simulated(time_steps=8, scheme="heun")),
    "simulate, flow": (mixture_problem, simulated(time_steps=8, scheme="probability-flow")),
    "simulate, float64": (linear, simulated(time_steps=8)),
    "reward backprop": (lq, trained(sc.RewardBackprop())),
    "adjoint": (lq, trained(sc.RewardBackprop(gradient="adjoint"))),
    "adjoint matching": (lq, trained(sc.AdjointMatching())),
    "log-variance": (learned_start, trained(sc.LogVariance())),
    "soft PPO": (lq, trained(sc.SoftPPO())),
    "guided": (lq, trained(sc.PathIntegralGuidance(num_paths=16), iterations=None)),
    "particles": (lq, trained(sc.SMC(num_particles=32), iterations=None)),
    "tempered": (lq, sampled(sc.TemperedSMC(num_particles=64))),
    "chains": (lq, sampled(sc.MALA(num_chains=32, warm_up=30))),
    "exact solution": (lq, exact),
    "likelihood": (mixture_problem, likelihood),
}


@pytest.mark.filterwarnings("ignore:.*effective of:RuntimeWarning")
@pytest.mark.parametrize("verb", VERBS)
def test_without_modules_autocast_changes_no_bit(verb):
    make, ask = VERBS[verb]
    outside, problem = ask(make()), make()
    with autocast():
        inside = ask(problem)
    assert torch.equal(outside, inside) and bool(outside.isfinite().any())


def test_autocast_reaches_modules_and_nothing_else():
    """Of a model, a control and a reward that are modules: theirs is in bfloat16, the chain's arithmetic is not."""
    net, reward, control, inside = Net(), Reward(), Net(seed=2), []

    def cost(x, t):
        inside.append((x @ torch.eye(2)).dtype)
        return x.square().sum(1)

    sde = sc.generative_sde(net, sc.VP(), shape=(2,))
    problem = sc.ControlProblem(sde, reward=reward, running_cost=cost, start="fixed")
    plain = sc.simulate(problem, 64, control=control, time_steps=8, seed=0)
    for module in (net, reward, control):
        module.seen.clear()
    inside.clear()
    with autocast():
        paths = sc.simulate(problem, 64, control=control, time_steps=8, seed=0)
        parts = (paths.states, paths.times, paths.shifts, paths.log_ratio(), paths.log_ratio(control), paths.reward)
        assert {part.dtype for part in (*parts, paths.log_weights(), paths.running_cost)} == {F32}
        assert torch.is_autocast_enabled("cpu")
    for module in (net, reward, control):
        assert module.seen and set(module.seen) == {BF16}
    assert inside and set(inside) == {F32}
    assert 0 < float((paths.states - plain.states).abs().max()) < 0.05 * float(plain.states.abs().max())


def test_weights_trained_inside_one_autocast_block_are_the_ones_that_are_used():
    """torch keeps cast copies of weights to the end of a block: after a step they would be stale."""
    problem = sc.ControlProblem(sc.BrownianMotion(2), sc.Dirac(torch.zeros(2)), reward=bowl)
    options = {"iterations": 30, "time_steps": 4, "batch_size": 64, "seed": 0, "progress": False}
    outside = sc.solve(problem, sc.RewardBackprop(), control=Net(), learning_rate=1e-2, **options)
    with autocast():
        inside = sc.solve(problem, sc.RewardBackprop(), control=Net(), learning_rate=1e-2, **options)
    gained = outside.history[-1]["objective"] - outside.history[0]["objective"]
    assert gained > 1
    assert abs(inside.history[-1]["objective"] - outside.history[-1]["objective"]) < 0.05 * gained
