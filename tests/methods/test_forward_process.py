"""Forward-process methods: bridges of discrete models, the laws that are their fixed points, anchors, and published
forms."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from cases import F64, but_slow, randn, random_lq
from tokens import Joint
from torch import nn

import sdecontrol as sc
from sdecontrol.chains.bridges import ChainBridge
from sdecontrol.chains.masking import MaskingBridge
from sdecontrol.chains.noising import NoisingBridge
from sdecontrol.chains.shifts import shifts_along
from sdecontrol.methods.base import Run, find_method
from sdecontrol.methods.forward_process import WARM_UP, Ends, ForwardState, Noised, unexpected
from sdecontrol.methods.on_paths import collect, steps_of
from sdecontrol.methods.target_particles import balanced
from sdecontrol.randomness import Place, generator_for
from sdecontrol.tensors import event_sum

JOINT = Joint(size=1.5, seed=3)
ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.12, 200, dtype=F64), 0)


class Linear(nn.Module):
    """Noise prediction ``factor std x``, exact for data N(0, 1) at factor 1, and a little more to be trained at every
    noise level."""

    def __init__(self, factor=1.0, dtype=torch.float32):
        super().__init__()
        self.factor, self.schedule = factor, sc.VP()
        self.more = nn.Parameter(torch.zeros(2, 6, dtype=dtype))

    def forward(self, x, s, y=None):
        angle = torch.stack([(j * 3.0 * s).cos() for j in range(6)], -1).to(x.dtype)
        gain, offset = (angle @ self.more.mT).unbind(-1)
        out = (self.factor * self.schedule.std(s).to(x.dtype) + gain).unsqueeze(1) * x + offset.unsqueeze(1)
        return out if y is None else out + 0.1 * y


class DiscreteExact(nn.Module):
    """The exact noise prediction for data N(0, 1) of a discrete model, and a parameter."""

    def __init__(self):
        super().__init__()
        self.more = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x, n, y=None):
        return (1 - ABAR[n]).sqrt().unsqueeze(1) * x + self.more * (x if y is None else x + y)


class Steps(nn.Module):
    """``u_k(x) = gain_k x``."""

    def __init__(self, times):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(len(times) - 1, dtype=F64))
        self.times = times[:-1]

    def forward(self, x, t):
        k = (t.unsqueeze(1) - self.times).abs().argmin(1)
        return self.gain[k].unsqueeze(1) * x


def gaussian_problem(q=1.0):
    """Data N(0, 1) with its exact score, ``r = -q x^2/2``."""
    model = sc.GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, 1, dtype=F64))
    return sc.ControlProblem(sc.generative_sde(model, sc.VP()), reward=lambda x: -0.5 * q * x[:, 0] ** 2, alpha=1.0)


def linear_problem(reward, factor=1.0, **options):
    sde = sc.generative_sde(Linear(factor), sc.VP(), prediction="noise", shape=(1,))
    return sc.ControlProblem(sde, reward=reward, **options)


def discrete_chain(eta=1.0, steps=12):
    return sc.diffusion_chain(DiscreteExact(), ABAR, shape=(2,), steps=steps, eta=eta)


def one_step(problem, method, iteration=WARM_UP, **options):
    """State and metrics of an iteration whose gradients are kept."""
    run = Run(problem, problem.chain(**options), batch_size=64, accumulate=1, seed=4)
    run.iteration = iteration
    state = method.setup(run)
    return state, run, method.step(state, run)


def noised_ends(state: ForwardState, run, paths):
    """As the method draws them."""
    generator = generator_for(paths.end.device, run.seed, Place.BRIDGES, run.iteration, 0)
    return Noised(state, run, Ends(paths.states[0], paths.end, paths.condition), generator)


# ---------------------------------------------------------------- bridges


def test_the_noise_of_a_discrete_models_bridge_has_mean_zero_given_the_state():
    """For an exact model, at every step and in closed form: ``x_k = m x_K + s eps`` with x_K standard normal gives
    ``E[x_K | x_k] = m x_k``."""
    chain = discrete_chain()
    bridge, x = NoisingBridge(chain), randn(5, 2, seed=1)
    for k in range(chain.steps):
        one, none = torch.ones(1, 5, 2, dtype=F64), torch.zeros(1, 5, 2, dtype=F64)
        m, s = bridge.between(x, one[0], none, [k])[0], bridge.between(x, none[0], one, [k])[0]
        assert torch.allclose(m**2 + s**2, torch.ones_like(m), atol=1e-12)
        assert float(bridge.noise_at(k, x, m * x).detach().abs().max()) < 1e-9


def test_a_discrete_sampler_knows_whether_it_reverses_its_noising():
    """As DDIM's does with eta = 1, clipped or not; with other noise, a part that is off, or noise in the last step, it
    does not."""
    steps = discrete_chain().steps_of
    assert steps.reverses and discrete_chain().reversal and not discrete_chain(eta=0.9).reversal
    assert sc.diffusion_chain(DiscreteExact(), ABAR, shape=(2,), steps=12, clip=1.0).reversal
    for name in ("x0_part", "eps_part", "scale"):
        numbers = list(getattr(steps, name))
        numbers[4] *= 1.001
        assert not replace(steps, **{name: numbers}).reverses
    assert not replace(steps, scale=[*steps.scale, 0.1]).reverses


def test_the_noise_of_a_discrete_models_bridge_is_that_of_its_own_paths():
    """On simulated paths: the slope of the steps' noise on ``E[xi_k | x_k, x_K]`` is 1 up to O(h) (DDPM's variance is
    that of a step given data; near the data a step is never small)."""
    chain = discrete_chain(steps=100)
    problem = sc.ControlProblem(chain, reward=lambda x: x.sum(1))
    paths = sc.simulate(problem, 10_000, seed=3)
    bridge = NoisingBridge(chain)
    for k in (40, 60, 80):
        z = bridge.noise_at(k, paths.states[k], paths.end).detach()
        products = z * paths.noises[k] / z.square().mean()
        error = float(products.std()) / 20_000**0.5
        assert abs(float(products.mean()) - 1) < 4 * error + 0.02, (k, float(products.mean()), error)


BRIDGES = {
    "generative": lambda: NoisingBridge(gaussian_problem().chain(7)),
    "discrete": lambda: NoisingBridge(discrete_chain(steps=8)),
    "linear": lambda: ChainBridge(random_lq(2, seed=3).chain(7)),
}


@pytest.mark.parametrize("kind", BRIDGES)
def test_some_steps_are_those_of_all_steps(kind):
    bridge, some, d = BRIDGES[kind](), [1, 4], 1 if kind == "generative" else 2
    start, end = randn(2, 3, d, seed=1)
    noise, c = randn(7, 3, d, seed=2), randn(7, 3, d, seed=3)
    states = bridge.between(start, end, noise)
    assert torch.equal(bridge.between(start, end, noise[some], some), states[some])
    whole = bridge.noise_given_end(states, end)
    assert torch.allclose(bridge.noise_given_end(states[some], end, None, some), whole[some], rtol=0, atol=1e-12)
    found = bridge.misfit(c[some], states[some], end, None, some)
    assert torch.allclose(found, 0.5 * (c - whole).square().sum(2)[some], rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ["random", "independent"])
def test_some_steps_of_masked_tokens_are_those_of_all_steps(order):
    chain = JOINT.problem(order=order).chain()
    some = [0, chain.steps - 1]
    bridge, end = MaskingBridge(chain), torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    start, noise = torch.full_like(end, chain.mask), randn(1, 2, 4, seed=2)
    states, c = bridge.between(start, end, noise), randn(chain.steps, 2, *chain.control_shape, seed=3)
    assert torch.equal(bridge.between(start, end, noise, some), states[some])
    whole = bridge.misfit(c, states, end)
    assert torch.equal(bridge.misfit(c[some], states[some], end, None, some), whole[some])
    assert not torch.equal(whole[0], whole[-1])


def test_the_noise_given_a_later_state_has_mean_zero_given_the_state():
    """For an exact model and every pair k < j, in closed form: all states have variance 1, so that ``E[x_j | x_k]`` is
    ``a x_k`` with the ``a`` of the noising ``x_k = a x_j + q eps``."""
    for chain in (gaussian_problem().chain(9), discrete_chain(steps=9)):
        bridge, K = NoisingBridge(chain), chain.steps
        ones = torch.ones(1, *chain.event_shape, dtype=F64)
        m = bridge.path_given_end(ones, ones, torch.zeros(K, *ones.shape, dtype=F64)).flatten(1)[:, 0]
        for k in range(K - 1):
            for j in range(k + 1, K):
                x = randn(K, 3, *chain.event_shape, seed=1)
                x[j] = m[k] / m[j] * x[k]
                z = bridge.noise_given_end(x, x[0])
                one = torch.zeros(K, 3, dtype=F64)
                one[j] = 1.0
                found = bridge.noise_given_later(x, x[0], z, one).detach()
                assert float(found[k].abs().max()) < 1e-9 and not bool(found[j:].any())


def test_the_noise_of_a_discrete_step_given_the_next_state_is_the_draw_itself():
    chain = discrete_chain(steps=9)
    K = chain.steps
    bridge, x, end = NoisingBridge(chain), randn(K, 3, 2, seed=1), randn(3, 2, seed=2)
    z = bridge.noise_given_end(x, end)
    for k in range(K - 1):
        one = torch.zeros(K, 3, dtype=F64)
        one[k + 1] = 1.0
        mean, scale = chain.kernel(k, x[k])
        found = bridge.noise_given_later(x, end, z, one)[k]
        assert torch.allclose(found, (x[k + 1] - mean) / scale, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- which law


class Closed:
    """Data N(0, 1), its exact score, ``r = -q x^2/2``, K steps of the default grid and scheme, ``c_k = g_k x_k``."""

    def __init__(self, K, q=1.0):
        self.problem, self.K, self.q = gaussian_problem(q), K, q
        self.chain = self.problem.chain(K)
        c = self.problem.reference.coefficients(self.chain.times[:-1])
        self.gain = torch.tensor([float(self.chain.gain(k)) for k in range(K)], dtype=F64)
        self.m, self.s2, self.unit = c.mu, c.std**2, self.gain * c.level
        one, kernels = torch.ones(1, 1, dtype=F64), []
        for k in range(K):
            mean, scale = self.chain.kernel(k, one)
            kernels.append(torch.stack((mean.detach()[0, 0], scale)))
        self.slope, self.scale = torch.stack(kernels, 1)
        self.of_end = self.unit * self.m / self.s2
        self.tilt = 1 / (1 / self.end_variance(torch.zeros(K, dtype=F64)) + q)

    def end_variance(self, gains):
        v = torch.ones((), dtype=F64)
        for slope, scale, gain in zip(self.slope, self.scale, gains):
            v = (slope + scale * gain) ** 2 * v + scale**2
        return v

    def regressed(self, gains, target):
        """The regression's minimiser among ``g_k x``, from the ends of these gains."""
        V, q = self.tilt if target == "weighted" else self.end_variance(gains), self.q
        D = self.m**2 * V + self.s2  # of x_k
        M, S = self.m * V / D, V - self.m**2 * V**2 / D  # of x_K given x_k
        score = self.of_end * (M - self.m)  # E[z | x_k] over x_k
        if target == "weighted":
            return score
        if target == "adjoint":
            return -self.of_end * self.s2 * q * M
        # E[(x_K^2 - V)(z - g x)| x], in the mean over x_k ~ N(0, D) times x
        rest = 0 * gains if target == "covariance" else score - gains  # of what the anchor leaves
        found = -q / 2 * (2 * self.of_end * M * S + rest * (3 * D * M**2 + S - V))
        for k in range(self.K if target == "path cost" else 0):
            j = torch.arange(k + 1, self.K)
            a = self.m[k] / self.m[j]
            later = self.unit[k] * a / (self.s2[k] - a**2 * self.s2[j])
            Mj, Sj = a * D[j] / D[k], D[j] - a**2 * D[j] ** 2 / D[k]
            each = 2 * later * Mj * Sj + rest[k] * (3 * D[k] * Mj**2 + Sj - D[j])
            found[k] = found[k] - (gains[j] ** 2 / 2 * each).sum()
        return found

    def fixed_point(self, target):
        gains = torch.zeros(self.K, dtype=F64)
        for _ in range(120):
            gains = 0.75 * gains + 0.25 * self.regressed(gains, target)
        assert float((gains - self.regressed(gains, target)).abs().max()) < 1e-8
        return gains


FORMS = {
    "weighted": "reward-weighted-denoising",
    "path cost": "reinforce-adjoint-matching",
    "adjoint": "efficient-adjoint-matching",
    "simple": "diffusion-nft",
}
#: of the end's variance as K grows, where it is not that of p_r: the simple form with its anchor, and as published,
#: with the control in the anchor's place
LIMITS = {"covariance": 0.5457, "simple": 0.5401}


@pytest.mark.parametrize("target", but_slow([*FORMS, "covariance"], "path cost"))
def test_the_fixed_points_law_is_the_stated_one_to_the_order_of_the_step(target):
    """End variance of the fixed point at K = 40, 80, 160: what it is off halves with the step."""
    errors = []
    for K in (40, 80, 160):
        closed = Closed(K)
        limit = LIMITS.get(target, float(closed.tilt))
        errors.append(float(closed.end_variance(closed.fixed_point(target))) - limit)
    assert abs(errors[0]) < 0.01 and abs(errors[2]) < 0.003, errors
    ratios = [a / b for a, b in pairwise(errors)]
    assert 1.55 < ratios[0] < 2.1 and 1.75 < ratios[1] < 2.1, (errors, ratios)


@pytest.mark.parametrize("target", FORMS)
def test_the_gradient_vanishes_at_the_closed_fixed_point(target):
    """The method's own gradient in every gain, over batches, within its standard error; and not at half of it."""
    K, batch = 12, 2048
    closed, method = Closed(K), find_method(FORMS[target])
    gains = closed.fixed_point(target)
    found = []
    for share in (1.0, 0.5):
        control = Steps(closed.chain.times)
        with torch.no_grad():
            control.gain.copy_(share * gains / closed.gain)
        for iteration in range(20):
            run = Run(closed.problem, closed.chain, batch_size=batch, accumulate=1, seed=4, control=control)
            run.iteration = iteration
            state = method.setup(run)
            state.zero_grad()
            method.step(state, run)
            found.append(next(state.control.parameters()).grad.clone())
    own, half = torch.stack(found[:20]), torch.stack(found[20:])
    deviations = own.mean(0) / (own.std(0) / 20**0.5)
    assert float(deviations.abs().max()) < 4.5, deviations
    assert float((half.mean(0) / (half.std(0) / 20**0.5)).abs().max()) > 8


def test_what_a_state_tells_of_the_reward_is_taken_away_by_the_other_paths_regression():
    """Path by path ordinary least squares on all others, whose prediction at the path's own state is subtracted: then
    it does not know the path's own reward, and no mean changes. With the path among them, or one slope for all steps,
    these are other numbers; equal rewards leave exactly nothing."""
    steps, n = 3, 9
    zeta, seen = randn(n, seed=1), randn(steps, n, seed=2)
    found = unexpected(zeta, seen)
    for k in range(steps):
        for i in range(n):
            rest = torch.arange(n) != i
            design = torch.stack([torch.ones(n - 1, dtype=F64), seen[k, rest]], 1)
            a, b = torch.linalg.lstsq(design, zeta[rest].unsqueeze(1)).solution.flatten()
            assert float(found[k, i]) == pytest.approx(float(zeta[i] - a - b * seen[k, i]), abs=1e-12)
    assert torch.equal(unexpected(torch.zeros(n), seen.float()), torch.zeros(steps, n))
    assert torch.equal(unexpected(zeta, 0 * seen)[1], unexpected(zeta, None))


@pytest.mark.slow
def test_normalised_rewards_have_the_fixed_point_of_another_temperature():
    """``r = x/2``: the tilt moves the mean by 1/2, that of ``alpha std(r)`` by 1; std(r) = 1/2 under every shift."""
    model = gaussian_problem().reference.mixture
    problem = sc.ControlProblem(sc.generative_sde(model, sc.VP()), reward=lambda x: 0.5 * x[:, 0], alpha=1.0)

    class Offsets(Steps):
        def forward(self, x, t):
            return super().forward(torch.ones_like(x), t)

    for normalise, want in ((False, 0.5), (True, 1.0)):
        method = sc.BridgeMatching(target="reinforce", path_cost=False, normalise=normalise)
        solution = sc.solve(
            problem,
            method,
            control=Offsets(problem.chain(30).times),
            time_steps=30,
            batch_size=512,
            iterations=250,
            learning_rate=0.03,
            seed=0,
        )
        assert abs(float(solution.sample(50_000, seed=1).mean()) - want) < 0.05


# ---------------------------------------------------------------- the anchor


@pytest.mark.parametrize(
    "settings",
    [{}, {"target": "reinforce"}, {"target": "reinforce", "path_cost": False}],
    ids=["weighted", "re", "simple"],
)
def test_equal_rewards_leave_the_pretrained_model(settings):
    """Not nearly: no gradient reaches the control, though the model is wrong and the anchor is not trained yet."""
    problem = linear_problem(lambda x: torch.full_like(x[:, 0], 0.3), factor=1.3)
    state, _, _ = one_step(problem, sc.BridgeMatching(**settings), time_steps=8)
    assert all(not bool(p.grad.any()) for p in state.control.parameters())
    assert any(bool(p.grad.any()) for p in state.anchor.parameters())
    plain, _, _ = one_step(problem, sc.BridgeMatching(anchor=False), time_steps=8)
    assert any(bool(p.grad.any()) for p in plain.control.parameters())


def test_after_training_the_model_is_still_the_pretrained_one():
    problem = linear_problem(lambda x: torch.zeros_like(x[:, 0]), factor=1.3)
    solution = sc.solve(problem, sc.BridgeMatching(), time_steps=8, iterations=WARM_UP + 8, batch_size=32, seed=0)
    x, s = randn(9, 1, seed=1, dtype=torch.float32), torch.linspace(0.1, 0.9, 9)
    assert torch.allclose(solution.model(x, s), problem.reference.model(x, s), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["weighted", "reinforce"])
def test_the_anchor_takes_away_what_a_wrong_model_costs(target):
    """A score that is 30 % too large: plain regression pays for it, the anchored one comes to the tilt."""
    problem = linear_problem(lambda x: x[:, 0], factor=1.3)
    gaps = []
    for method in (sc.BridgeMatching(target=target), sc.BridgeMatching(anchor=False)):
        solution = sc.solve(problem, method, time_steps=20, iterations=250, batch_size=256, learning_rate=0.02, seed=0)
        evaluation = solution.evaluate(8192, seed=1)
        gaps.append(evaluation.log_z.value - evaluation.elbo.value)
    assert gaps[0] < 0.08 and gaps[1] > 4 * gaps[0], gaps


def test_the_anchor_comes_to_what_it_stands_for():
    """``E[z | x]`` of a wrong model's own ends, against a regression of z on x at one step: the anchor's control."""
    problem = linear_problem(lambda x: torch.zeros_like(x[:, 0]), factor=1.3)
    K = 8
    run = Run(problem, problem.chain(K), batch_size=128, accumulate=1, seed=4)
    method = sc.BridgeMatching()
    state = method.setup(run)
    optimizer = torch.optim.Adam(state.parameters(), lr=0.05)
    for run.iteration in range(WARM_UP - 1):  # the control does not move
        for _ in range(3):
            state.zero_grad()
            method.step(state, run)
            optimizer.step()
    paths = sc.simulate(problem, 4096, time_steps=K, seed=9)
    noised = noised_ends(state, run, paths)
    states, z, a = noised.states, noised.z, noised.a.detach()
    explained = (z.square() - (z - a).square()).sum()
    slope = (z * states).sum(1) / states.square().sum(1)
    possible = ((slope.unsqueeze(1) * states) ** 2).sum()
    assert float(explained / possible) > 0.8, float(explained / possible)


@pytest.mark.parametrize("paths", ["current", "reference"])
def test_the_anchored_gradient_is_that_of_its_two_regressions(paths):
    """By hand, on the same draws: ``w c - (w - m rho)(z - a)`` for the control, ``rho (a - z)`` for the anchor."""
    model = Linear(1.3, F64)
    sde = sc.generative_sde(model, sc.VP(), prediction="noise", shape=(1,))
    problem = sc.ControlProblem(sde, reward=lambda x: x[:, 0], alpha=1.0)
    method = sc.BridgeMatching(paths=paths)
    run = Run(problem, problem.chain(6), batch_size=32, accumulate=1, seed=4, control=None)
    run.iteration = WARM_UP
    state = method.setup(run)
    with torch.no_grad():
        state.control.model.more.copy_(0.1 * randn(2, 6, seed=5))
        state.anchor.model.more.copy_(0.1 * randn(2, 6, seed=6))
    method.step(state, run)
    ours = [m.model.more.grad.clone() for m in (state.control, state.anchor)]

    drawn = collect(state, run, 0)
    w, rho = drawn.log_weights().softmax(0) * 32, (-drawn.log_ratio()).softmax(0) * 32
    noised = noised_ends(state, run, drawn)
    c, a, z = (v.squeeze(-1) for v in (noised.shifts(state.control), noised.a, noised.z))
    by_step, m = state.step_weights(), (w / rho).min()
    half = w * c.square() / 2 - (w - m * rho) * c * (z - a.detach())
    loss = (by_step * (half + rho * (a - z).square() / 2).mean(1)).sum()
    theirs = torch.autograd.grad(loss, [state.control.model.more, state.anchor.model.more])
    for one, other in zip(ours, theirs):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_particle_matching_leaves_a_wrong_model_as_it_is_where_rewards_are_equal():
    problem = linear_problem(lambda x: torch.full_like(x[:, 0], 0.3), factor=1.3)
    method, found = sc.ParticleMatching(num_particles=64, steps=4), {}
    for anchored in (method, sc.ParticleMatching(num_particles=64, anchor=False)):
        solution = sc.solve(problem, anchored, time_steps=8, iterations=WARM_UP + 4, batch_size=32, seed=0)
        x, s = randn(9, 1, seed=1, dtype=torch.float32), torch.linspace(0.1, 0.9, 9)
        found[anchored.anchor] = float((solution.model(x, s) - problem.reference.model(x, s)).abs().max().detach())
    assert found[True] < 1e-6 < 1e-3 < found[False], found


def test_the_adjoints_gradient_is_that_of_its_two_regressions():
    """By hand: the tuned regression on ``z - a`` and the reward's slope, the anchor's on the untuned model's ends."""
    sde = sc.generative_sde(Linear(1.3, F64), sc.VP(), prediction="noise", shape=(1,))
    problem = sc.ControlProblem(sde, reward=lambda x: 2 * x[:, 0], alpha=0.5)
    run = Run(problem, problem.chain(6), batch_size=32, accumulate=1, seed=4)
    run.iteration = WARM_UP
    state = sc.BridgeMatching(target="adjoint").setup(run)
    with torch.no_grad():
        state.control.model.more.copy_(0.1 * randn(2, 6, seed=5))
        state.anchor.model.more.copy_(0.1 * randn(2, 6, seed=6))
    sc.BridgeMatching(target="adjoint").step(state, run)
    ours = [m.model.more.grad.clone() for m in (state.control, state.anchor)]

    drawn, bridge = collect(state, run, 0), state.bridge
    noised = noised_ends(state, run, drawn)
    z = bridge.noise_given_slope(noised.states, bridge.end_score(drawn.end) + drawn.end)
    of_reward = bridge.noise_of_slope(4 * torch.ones_like(drawn.end))
    c, a = noised.shifts(state.control), noised.a
    rho = ((-drawn.log_ratio()).softmax(0) * 32).unsqueeze(1)
    loss = (c - (z - a.detach()) - of_reward).square() / 2 + rho * (a - z).square() / 2
    loss = (state.step_weights() * loss.sum(2).mean(1)).sum()
    theirs = torch.autograd.grad(loss, [state.control.model.more, state.anchor.model.more])
    for one, other in zip(ours, theirs):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["ve", "flow", "discrete"])
def test_the_noise_of_a_slope_is_that_of_the_tilt(kind):
    """``N(0, I) exp(b x)`` is ``N(b, I)``: noised it has the score ``-(x - m b)/(m^2 + s^2)``, and the model, exact for
    data N(0, I), ``-x/(m^2 + s^2)``."""
    if kind == "discrete":
        chain = discrete_chain(steps=9)
    else:
        law = sc.GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), torch.eye(2, dtype=F64)[None])
        sde = sc.generative_sde(law, sc.VE() if kind == "ve" else sc.FlowMatching())
        chain = sc.ControlProblem(sde, reward=lambda x: x.sum(1), start="fixed").chain(8)
    bridge, x, b = NoisingBridge(chain), randn(8, 3, 2, seed=1), randn(3, 2, seed=2)
    one, none = torch.ones(8, 3, 2, dtype=F64), torch.zeros(8, 3, 2, dtype=F64)
    m, s = bridge.between(x[0], one[0], none), bridge.between(x[0], none[0], one)
    # E[xi_k | x_k, x_K] is a multiple of the score of the noising kernel, (m x_K - x_k)/s^2, less the model's
    unit = (bridge.noise_given_end(x, b + 1) - bridge.noise_given_end(x, b)) * s**2 / m
    want = unit * m * b / (m**2 + s**2)
    assert torch.allclose(bridge.noise_given_slope(x, b), want.detach(), rtol=1e-7, atol=1e-9)
    assert torch.allclose(bridge.noise_of_slope(b), want.detach(), rtol=1e-7, atol=1e-9)


def test_particle_matchings_anchored_gradient_is_that_of_its_two_regressions():
    """As of bridge matching, with the weights of both laws relative to their even mixture."""
    sde = sc.generative_sde(Linear(1.3, F64), sc.VP(), prediction="noise", shape=(1,))
    problem = sc.ControlProblem(sde, reward=lambda x: x[:, 0], alpha=1.0)
    method = sc.ParticleMatching(num_particles=64, refresh=WARM_UP)
    run = Run(problem, problem.chain(6), batch_size=32, accumulate=1, seed=4)
    run.iteration = WARM_UP
    state = method.setup(run)
    with torch.no_grad():
        state.anchor.model.more.copy_(0.1 * randn(2, 6, seed=6))
    method.step(state, run)
    ours = [m.model.more.grad.clone() for m in (state.control, state.anchor)]

    generator = generator_for("cpu", run.seed, Place.MATCHING_ANCHORED, run.iteration, 0)
    rows = torch.randint(128, (32,), generator=generator)
    noised = Noised(state, run, Ends(state.states[0, rows], state.states[1, rows]), generator)
    reward = state.states[1, :, 0]
    ratio = state.log_ratios - reward  # -log Z
    assert torch.allclose(ratio, ratio[:1].expand(128), atol=1e-12)
    w = 2 * (state.log_ratios[rows]).sigmoid()
    rho, m = 2 - w, (w / (2 - w)).min()
    c, a, z = (v.squeeze(-1) for v in (noised.shifts(state.control), noised.a, noised.z))
    half = w * c.square() / 2 - (w - m * rho) * c * (z - a.detach())
    loss = (state.step_weights() * (half + rho * (a - z).square() / 2).mean(1)).sum()
    theirs = torch.autograd.grad(loss, [state.control.model.more, state.anchor.model.more])
    for one, other in zip(ours, theirs):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_a_correction_is_judged_on_particles_alone_and_less_the_anchor():
    problem = linear_problem(lambda x: x[:, 0])
    method, run = sc.ParticleMatching(num_particles=64), Run(problem, problem.chain(6), 32, 1, seed=4)
    state = method.setup(run)
    state.states[0], state.states[1, :64], state.states[1, 64:] = 0.0, 1.0, 1e6  # the target's, the untuned model's
    states, targets = method.draw(state, run, Place.MATCHING_JUDGE, 0)
    assert float(states.abs().max()) < 10
    z = state.bridge.noise_given_end(states, torch.ones(32, 1))
    assert torch.allclose(targets, z, atol=1e-6)  # the anchor is 0
    with torch.no_grad():
        state.anchor.model.more.fill_(0.1)
    less = method.draw(state, run, Place.MATCHING_JUDGE, 0)[1]
    assert torch.allclose(less, z - shifts_along(run.chain, state.anchor, states), atol=1e-6)
    assert not torch.allclose(less, z, atol=1e-3)


def test_balanced_weights_are_those_of_the_densities():
    """Ends of ``N(1, 1)`` beside as many of ``N(0, 1)``: ``w/rho = exp(x - 1/2)``, whose constant is found."""
    x = randn(2, 20_000, seed=1)
    ratio = balanced(x[0] + 1.0, x[1])
    assert abs(float((ratio - torch.cat((x[0] + 1.0, x[1]))).mean()) + 0.5) < 0.03
    assert abs(float(2 * ratio.sigmoid().mean()) - 1) < 1e-9


@pytest.mark.parametrize("model", [None, 1.3], ids=["plain", "anchored"])
def test_one_of_the_steps_stands_for_all(model):
    """The gradient is K times that of the step that was drawn."""
    problem = gaussian_problem() if model is None else linear_problem(lambda x: x[:, 0], model)
    method, K = sc.BridgeMatching(steps=1), 5
    control = Steps(problem.chain(K).times).to(problem.chain(K).times.dtype)
    run = Run(problem, problem.chain(K), batch_size=16, accumulate=1, seed=4, control=control)
    run.iteration = WARM_UP
    state = method.setup(run)
    assert (state.anchor is None) == (model is None)
    metrics = method.step(state, run)
    paths, some = collect(state, run, 0), steps_of(run, 1)
    generator = generator_for("cpu", run.seed, Place.BRIDGES, run.iteration, 0)
    noise = torch.randn(1, 16, 1, generator=generator, dtype=paths.end.dtype)
    states = state.bridge.between(paths.end, paths.end, noise, some)
    z, log_w = state.bridge.noise_given_end(states, paths.end, None, some), paths.log_weights()
    w = log_w.softmax(0) * 16
    keep = 1.0 if model is None else (1 - (log_w.min() - log_w).exp()).unsqueeze(1)  # the anchor is 0
    want = K * (w * (keep * z[0]).square().sum(1) / 2).mean()
    assert abs(metrics["loss"] / float(want) - 1) < 1e-5
    gradient = next(state.control.parameters()).grad
    assert gradient.nonzero().flatten().tolist() == some
    slope = -K * run.chain.gain(some[0]) * (w * (keep * z[0] * states[0]).sum(1)).mean()  # of c = gain_k x
    assert abs(float(gradient[some[0]] / slope) - 1) < 1e-5


# ---------------------------------------------------------------- published forms


def test_on_fresh_ends_the_gradients_of_published_losses_are_this_ones():
    """DiffusionNFT with its KL term, and advantage-weighted matching with its own, differentiated as they are
    published at v_theta = v_old; shifts stand for predictions, of which they are multiples at every step."""
    problem, beta = gaussian_problem(), 0.4
    alpha, K = problem.alpha, 6
    control = Steps(problem.chain(K).times)
    with torch.no_grad():
        control.gain.copy_(0.2 * randn(6, seed=5))
    method = find_method("diffusion-nft")
    run = Run(problem, problem.chain(K), batch_size=64, accumulate=1, seed=4, control=control)
    state = method.setup(run)
    method.step(state, run)
    ours = next(state.control.parameters()).grad.clone()

    paths = collect(state, run, 0)
    noised = noised_ends(state, run, paths)
    states, z = noised.states, noised.z
    c = torch.stack([run.chain.shift_at(k, x, control(x, run.chain.times[k].expand(64))) for k, x in enumerate(states)])
    old = c.detach()
    advantage = (paths.reward - paths.reward.mean()) * (64 / 63)
    r, weight = 0.5 + advantage, 2 * alpha * beta
    positive, negative = (1 - beta) * old + beta * c, (1 + beta) * old - beta * c
    square = lambda v: event_sum(v**2, 1)  # noqa: E731
    nft = (r * square(positive - z) + (1 - r) * square(negative - z) + weight * square(c)).sum(0).mean()
    awm = (advantage * square(c - z) + alpha * square(c)).sum(0).mean()
    for loss, factor in ((nft, 2 * weight), (awm, 2 * alpha)):
        (theirs,) = torch.autograd.grad(loss, control.gain, retain_graph=True)
        assert torch.allclose(theirs / factor, ours, rtol=1e-9, atol=1e-12)


def test_methods_are_found_by_their_published_names():
    assert find_method("reinforce-adjoint-matching") == sc.BridgeMatching(target="reinforce")
    assert find_method("efficient-adjoint-matching") == sc.BridgeMatching(target="adjoint")
    assert find_method("diffusion-nft") == sc.BridgeMatching(target="reinforce", path_cost=False)
    assert find_method("advantage-weighted-matching").normalise
    assert find_method("reward-weighted-denoising") == sc.BridgeMatching()


# ---------------------------------------------------------------- where it runs


@pytest.mark.parametrize("target", ["weighted", "reinforce"])
def test_a_discrete_model_with_conditions_and_a_black_box(target):
    """The model gets the condition, and the reward no tensor with a graph."""

    def reward(x, y):
        return torch.from_numpy(-((x.numpy() - y.numpy()) ** 2).sum(1))

    problem = sc.ControlProblem(discrete_chain(), reward=reward, condition=torch.tensor([[0.0], [1.0]], dtype=F64))
    assert problem.start == "memoryless"
    solution = sc.solve(
        problem, sc.BridgeMatching(target=target, steps=4), iterations=WARM_UP + 3, batch_size=32, seed=0
    )
    assert bool(torch.isfinite(solution.sample(8, condition=torch.ones(8, 1, dtype=F64), seed=1)).all())
    assert solution.history[-1]["kl"] > 0


def test_a_resumed_run_has_the_same_numbers(tmp_path):
    problem = linear_problem(lambda x: x[:, 0])
    method = sc.BridgeMatching(target="reinforce", steps=3)
    options = {"time_steps": 8, "iterations": WARM_UP + 6, "batch_size": 32, "seed": 0}
    whole = sc.solve(problem, method, **options)

    class Stop:
        def on_step_end(self, state):
            if state.iteration == WARM_UP + 2:
                raise KeyboardInterrupt

    saving = {"checkpoint_dir": tmp_path / "run", "checkpoint_every": 5}
    with pytest.raises(KeyboardInterrupt):
        sc.solve(problem, method, callbacks=[Stop()], **options, **saving)
    resumed = sc.solve(problem, method, resume=True, **options, **saving)
    assert whole.history == resumed.history
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters()))


def test_what_does_not_apply_is_refused_by_name():
    reward = lambda x: x.sum(1)  # noqa: E731
    with pytest.raises(ValueError, match="diffusion_chain with eta=1"):
        NoisingBridge(discrete_chain(eta=0.5))
    for target in ("reinforce", "adjoint"):
        method = sc.BridgeMatching(target=target)
        for problem in (JOINT.problem(order="random"), random_lq(2, seed=3, running=False)):
            with pytest.raises(ValueError, match=f"target='{target}'.*Linear references and tokens"):
                sc.solve(problem, method, iterations=1)
    with pytest.raises(ValueError, match=r"running cost.*cross-entropy"):
        sc.solve(linear_problem(reward, running_cost=lambda x, t: x.sum(1)), "reinforce-adjoint-matching")
    for wrong, match in (
        ({"target": "softmax"}, "target"),
        ({"target": "reinforce", "trust_region": 1.0}, "trust_region tempers weights"),
        ({"target": "reinforce", "paths": "reference"}, "paths='current'"),
        ({"target": "reinforce", "steps": 1}, "steps"),
        ({"normalise": True}, "need the whole reward"),
        ({"path_cost": False}, "need the whole reward"),
    ):
        with pytest.raises(ValueError, match=match):
            sc.BridgeMatching(**wrong)
