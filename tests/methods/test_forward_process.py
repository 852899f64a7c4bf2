"""Forward-process methods: bridges of discrete models, the laws that are their fixed points, anchors, and published
forms."""

import pytest
import torch
from cases import F64, randn
from torch import nn

import sdecontrol as sc
from sdecontrol.chains.bridges import NoisingBridge
from sdecontrol.methods.base import Run, find_method
from sdecontrol.methods.forward_process import WARM_UP, noised
from sdecontrol.methods.on_paths import collect
from sdecontrol.tensors import event_sum

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

    def __init__(self, K):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(K, dtype=F64))

    def forward(self, x, t):
        k = (t * len(self.gain)).round().long().clamp(max=len(self.gain) - 1)
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


def test_some_steps_are_those_of_all_steps():
    problem = linear_problem(lambda x: x[:, 0])
    bridge = NoisingBridge(problem.chain(7))
    end, noise = randn(3, 1, seed=1, dtype=torch.float32), randn(7, 3, 1, seed=2, dtype=torch.float32)
    states, some = bridge.between(end, end, noise), [1, 4]
    assert torch.equal(bridge.between(end, end, noise[some], some), states[some])
    whole = bridge.noise_given_end(states, end)
    assert torch.equal(bridge.noise_given_end(states[some], end, None, some), whole[some])


# ---------------------------------------------------------------- which law

FIXED_POINTS = {  # of the end's variance, data N(0, 1), r = -x^2/2: p_r, or V exp(V) = 1
    "reward-weighted-denoising": 0.5,
    "reinforce-adjoint-matching": 0.5,
    "diffusion-nft": 0.567,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXED_POINTS)
def test_fixed_points_on_a_gaussian_model(name):
    """Variance of the end, corrected by what 40 Euler steps make of N(0, 1); .02 is a third of the laws'
    difference."""
    problem, K = gaussian_problem(), 40
    solution = sc.solve(
        problem, name, control=Steps(K), time_steps=K, batch_size=1024, iterations=300, learning_rate=0.03, seed=0
    )
    untuned = float(sc.simulate(problem, 100_000, time_steps=K, seed=1).samples.var())
    found = float(solution.sample(100_000, seed=1).var())
    want = FIXED_POINTS[name] if name == "diffusion-nft" else 1 / (1 / untuned + 1)
    assert abs(found - want) < 0.02, (found, want, untuned)


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
            control=Offsets(30),
            time_steps=30,
            batch_size=512,
            iterations=250,
            learning_rate=0.03,
            seed=0,
        )
        assert abs(float(solution.sample(50_000, seed=1).mean()) - want) < 0.05


# ---------------------------------------------------------------- the anchor


@pytest.mark.parametrize("target", ["weighted", "reinforce"])
@pytest.mark.parametrize("path_cost", [True, False])
def test_equal_rewards_leave_the_pretrained_model(target, path_cost):
    """Not nearly: no gradient reaches the control, though the model is wrong and the anchor is not trained yet."""
    if target == "weighted" and not path_cost:
        pytest.skip("weights need the whole reward")
    problem = linear_problem(lambda x: torch.full_like(x[:, 0], 0.3), factor=1.3)
    method = sc.BridgeMatching(target=target, path_cost=path_cost)
    state, _, _ = one_step(problem, method, time_steps=8)
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
        solution = sc.solve(problem, method, time_steps=30, iterations=400, batch_size=256, learning_rate=0.01, seed=0)
        evaluation = solution.evaluate(8192, seed=1)
        gaps.append(evaluation.log_z.value - evaluation.elbo.value)
    assert gaps[0] < 0.03 and gaps[1] > 5 * gaps[0], gaps


def test_anchor_and_baseline_come_to_what_they_stand_for():
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
    states = noised(state, run, paths, 0, None)
    z = state.bridge.noise_given_end(states, paths.end)
    with torch.no_grad():
        a = torch.stack([state.anchor.on_chain(run.chain)(k, x, None) for k, x in enumerate(states)])
    explained = (z.square() - (z - a).square()).sum()
    slope = (z * states).sum(1) / states.square().sum(1)
    possible = ((slope.unsqueeze(1) * states) ** 2).sum()
    assert float(explained / possible) > 0.8, float(explained / possible)


# ---------------------------------------------------------------- published forms


def test_on_fresh_ends_the_gradients_of_published_losses_are_this_ones():
    """DiffusionNFT with its KL term, and advantage-weighted matching with its own, differentiated as they are
    published at v_theta = v_old; shifts stand for predictions, of which they are multiples at every step."""
    problem, beta = gaussian_problem(), 0.4
    alpha, K, control = problem.alpha, 6, Steps(6)
    with torch.no_grad():
        control.gain.copy_(0.2 * randn(6, seed=5))
    method = find_method("diffusion-nft")
    run = Run(problem, problem.chain(K), batch_size=64, accumulate=1, seed=4, control=control)
    state = method.setup(run)
    method.step(state, run)
    ours = next(state.control.parameters()).grad.clone()

    paths = collect(state, run, 0)
    states = noised(state, run, paths, 0, None)
    z = state.bridge.noise_given_end(states, paths.end)
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
    with pytest.raises(ValueError, match=r"running cost.*cross-entropy"):
        sc.solve(linear_problem(reward, running_cost=lambda x, t: x.sum(1)), "reinforce-adjoint-matching")
    for wrong, match in (
        ({"target": "softmax"}, "target"),
        ({"target": "reinforce", "trust_region": 1.0}, "trust_region tempers weights"),
        ({"target": "reinforce", "paths": "reference"}, "paths='current'"),
        ({"normalise": True}, "weights need the whole reward"),
        ({"path_cost": False}, "weights need the whole reward"),
    ):
        with pytest.raises(ValueError, match=match):
            sc.BridgeMatching(**wrong)
