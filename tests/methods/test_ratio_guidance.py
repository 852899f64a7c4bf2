"""Guidance by a log density ratio: the regressions against closed forms, what it sees, and what it costs."""

import copy
import itertools
import pickle

import pytest
import torch
from cases import linear, mixture, nonlinear, randn, random_lq
from torch import nn

import sdecontrol as sc
from sdecontrol.controls.guidance import ValueControl
from sdecontrol.controls.ratio_value import RatioValue
from sdecontrol.methods import ratio_guidance
from sdecontrol.methods.base import Run
from sdecontrol.methods.ratio_fit import exponent_for, fit_values, to_come, value_rows
from sdecontrol.methods.ratio_slopes import fit_slopes, observed
from sdecontrol.problems.reward_view import RewardView
from sdecontrol.problems.simulate import simulate_chain

K = 6


@pytest.fixture
def few_steps(monkeypatch):
    """Of the regression, where nothing is said of how good its value is."""
    monkeypatch.setattr(ratio_guidance, "STEPS", 20)


def guided(problem, iterations=3, num_paths=2048, **options):
    options = {"time_steps": K, "seed": 0, "progress": False, **options}
    if not problem.reference.continuous:
        options.pop("time_steps")
    return sc.solve(problem, sc.ValueGuidance("ratio", num_paths=num_paths), iterations=iterations, **options)


def fresh(problem, chain, seed=0, shaken=0.0):
    value = RatioValue.of(problem, chain, (16, 16), seed)
    with torch.no_grad():
        for i, p in enumerate(value.parameters()):
            p += shaken * randn(*p.shape, seed=i, dtype=p.dtype)
    return value


class Classifier(nn.Module):
    """Of two classes, with a hidden layer."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 5, dtype=dtype), nn.SiLU())
        self.head = nn.Linear(5, 2, dtype=dtype)

    def forward(self, x):
        return self.head(self.body(x))


class Score(Classifier):
    """A reward of one number a row."""

    def forward(self, x):
        return self.head(self.body(x))[:, 0]


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(2, 2), 0

    def forward(self, x, s):
        self.calls += 1
        return self.layer(x) * s.reshape(-1, 1)


def generative(reward=None, alpha=0.5):
    torch.manual_seed(0)
    sde = sc.generative_sde(Denoiser(), sc.VP(), prediction="noise", shape=(2,))
    return sc.ControlProblem(sde, reward=sc.LogProb(Classifier(), 1) if reward is None else reward, alpha=alpha)


# ------------------------------------------------------------------------------------------------ what is regressed on


def test_what_is_to_come_at_the_first_step_is_the_log_weight_and_is_exact_for_any_control():
    """With the sign of the cost or of the log-ratio wrong, or a step left out, it is not."""
    problem = random_lq(2, seed=1)
    chain = problem.chain(K)
    paths = simulate_chain(problem, chain, 64, lambda x, t: 0.3 - x, seed=0)
    gains, ratios = to_come(paths)
    assert torch.allclose(gains[0] - ratios[0], paths.log_weights(), atol=1e-12)
    steps = paths.log_target()
    later = paths.reward / problem.alpha + steps[4:].sum(0) - paths.log_ratio(per_step=True)[4:].sum(0)
    assert torch.allclose(gains[4] - ratios[4], later, atol=1e-12)


@pytest.mark.parametrize("make", [lambda: random_lq(2, 3, seed=1), nonlinear], ids=["matrix", "state-dependent"])
@pytest.mark.parametrize("scheme", [None, "exponential"])
def test_a_displacement_is_the_adjoint_of_making_a_shift_of_a_gradient(make, scheme):
    """``grad . A^T xi = c . xi``: with sigma or the gain left out, or transposed, not."""
    problem = make()
    if scheme is not None and problem.reference.as_linear() is None:
        pytest.skip("no linear part")
    chain = problem.chain(K, scheme)
    g = randn(2, seed=4)
    value = lambda x, t: problem.alpha * (x * g).sum(1)  # noqa: E731
    control = sc.solve(problem, sc.ValueGuidance(value), time_steps=K, scheme=scheme, seed=0).control
    x, xi = randn(5, 2, seed=5), randn(5, chain.noise_shape[0], seed=6)
    c = control.on_chain(chain)(3, x, None)
    moved = control.displacement(chain)(3, x, xi, None)
    assert torch.allclose((moved * g).sum(1), (c * xi).sum(1), atol=1e-12)


def test_values_are_the_logarithm_of_the_expected_weight_with_their_level():
    """On a linear-quadratic chain ``v_k/alpha`` is known, running costs and all; one constant for all times, so that
    the level is log Z. With a weight of the whole path in place of what is to come, or weights normalised at each time,
    values at later steps are off by tenths."""
    problem = random_lq(2, seed=1, dtype=torch.float32)
    exact = sc.exact_solution(random_lq(2, seed=1), time_steps=K)
    chain = problem.chain(K)
    run, value = Run(problem, chain, 64, 1, 0), fresh(problem, chain)
    rows, whole, _ = value_rows(run, value, None, 8192)
    value.level.copy_((whole[0] - whole[1]).logsumexp(0) - torch.tensor(float(whole.shape[1])).log())
    before, after = fit_values(run, value, rows, 1.0, 400)
    assert after < before - 0.01
    states = simulate_chain(problem, chain, 2000, seed=5).states
    for k in (1, 3, 5):
        truth = exact.value(states[k].double(), chain.clock[k]) / problem.alpha
        found = value.at(states[k], chain.times[k]).double()
        error = (found - truth)[truth > truth.median()]  # weights say little of states that hardly count
        assert float(error.mean().abs()) < 0.1 and float(error.std()) < 0.2


def test_one_round_of_least_squares_finds_the_optimal_control_where_features_hold_it():
    """A linear reward without curvature: the optimal shift is a function of time, and r/alpha at the state times a
    coefficient of time has it but for the drift. From zero, on paths of the reference; half a step, a missing factor of
    the steps that are not stored, or shifts in place of their difference, and it is not reached."""
    problem = linear()
    exact = sc.exact_solution(problem, time_steps=K)
    chain = problem.chain(K)
    value = fresh(problem, chain)
    control = ValueControl(value, problem, chain)
    gain, _ = fit_slopes(value, observed(Run(problem, chain, 64, 1, 0), control, 16384))
    paths = simulate_chain(problem, chain, 4096, control, seed=3)
    best = simulate_chain(problem, chain, 4096, exact.control, seed=3)
    gap = float(exact.log_z - paths.log_weights().mean())
    zero = float(exact.log_z - simulate_chain(problem, chain, 4096, seed=3).log_weights().mean())
    assert float(exact.log_z - best.log_weights().mean()) == pytest.approx(0, abs=1e-9)
    assert 0 < gap < 0.03 * zero and gain == pytest.approx(zero, rel=0.1)


def test_the_exponent_keeps_as_many_effective_paths_as_asked_for():
    gains, ratios = 20 * randn(4000, seed=1), 0.1 * randn(4000, seed=2)
    whole = torch.stack((gains, ratios))
    beta = exponent_for(whole, 500.0, 0.0)
    w = (beta * gains - ratios).softmax(0)
    assert 0 < beta < 1 and float(1 / w.square().sum()) == pytest.approx(500, rel=1e-3)
    assert exponent_for(0.01 * whole, 500.0, 0.0) == 1.0
    assert exponent_for(whole, 3999.9, 0.4) == 0.4  # never below where it was


# ------------------------------------------------------------------------------------------------ what is seen


def test_a_classifiers_view_are_its_logits_and_a_networks_its_last_layers_input():
    x = randn(7, 2, seed=1, dtype=torch.float32)
    for make, sees in (
        (lambda: sc.LogProb(Classifier(), 1), lambda r, x: r.classifier(x)),
        (Score, lambda r, x: r.body(x)),
    ):
        torch.manual_seed(1)
        reward = make()
        problem = generative(reward)
        view = RewardView(problem)
        features, r = view(x)
        assert view.hidden == "" and view.size == features.shape[1]
        assert torch.equal(features, sees(reward, x)) and torch.allclose(r, reward(x) / problem.alpha)
        module = reward if isinstance(reward, nn.Module) else reward.classifier
        assert not any(vars(m)["_forward_hooks"] for m in module.modules())  # the user's module is as it was


def test_the_layers_see_x_and_where_there_is_a_denoiser_x0_but_neither_of_what_is_too_large():
    def images(size):
        sde = sc.generative_sde(lambda x, s: x, sc.VP(), prediction="noise", shape=(size,))
        return sc.ControlProblem(sde, reward=lambda x: x[:, 0], alpha=0.5)

    for problem, state, denoised in (
        (linear(), True, False),
        (images(1 << 14), True, True),
        (images((1 << 14) + 1), False, False),
    ):
        value = RatioValue.of(problem, problem.chain(2), (8,), 0)
        n = problem.event_shape.numel()
        assert (value.layers.state, value.layers.denoised) == (state, denoised)
        x = problem.reference.probe_states(2, problem.dtype, problem.device, seed=1)
        seen = value.seeing(problem.chain(2))(0, x, None)
        assert seen.shape[1] == n * (state + denoised) + int(not value.layers.student)  # r/alpha where no student is
        assert not state or torch.equal(seen[:, :n], x)


@pytest.mark.usefixtures("few_steps")
def test_of_a_function_its_number_alone_is_seen_and_said_and_of_a_black_box_nothing():
    plain = RewardView(generative(lambda x: -x.square().sum(1)))
    assert plain.size == 0 and "function" in plain.hidden and plain.gradient
    black = RewardView(generative(lambda x: torch.tensor(x.detach().numpy()[:, 0] > 0).float()))
    features, r = black(torch.zeros(3, 2))
    assert not black.gradient and features.shape == (3, 0) and not r.any()
    with pytest.warns(RuntimeWarning, match=r"sees r\(x0\^\) alone, since the reward is a function"):
        guided(generative(lambda x: -x.square().sum(1)), iterations=1, num_paths=256)


@pytest.mark.usefixtures("few_steps")
def test_a_guided_step_calls_the_model_once_and_the_reward_never():
    """The gradient's prediction is handed on to the kernel; without that there are two calls a step."""
    problem = generative()
    solution = guided(problem, iterations=1, num_paths=256)
    model = problem.reference.model
    model.calls, classifier = 0, problem.reward_function.classifier
    asked = []
    handle = classifier.register_forward_hook(lambda *a: asked.append(1))
    solution.sample(64, seed=1)
    handle.remove()
    assert model.calls == K and not asked


# ------------------------------------------------------------------------------------------------ the method


@pytest.mark.slow
def test_guidance_reaches_the_tilt_of_a_mixture():
    """Two modes, a reward that prefers one: from a gap of more than a nat to less than a tenth."""
    problem = mixture(dtype=torch.float32, alpha=0.5)
    steps = 40  # at 20 guidance by the exact value leaves nearly a tenth, since it is constant over a step
    solution = guided(problem, iterations=3, time_steps=steps, num_paths=2048)
    log_w = simulate_chain(problem, solution.chain, 65536, seed=1, keep="end").log_weights().double()
    log_z = float(log_w.logsumexp(0) - torch.tensor(65536.0).log())
    assert log_z - float(log_w.mean()) > 1.0
    assert abs(log_z - solution.evaluate(2048, seed=1, confirm=False).elbo.value) < 0.1


@pytest.mark.parametrize(("length", "kept"), [(1.0, 1.0), (2.5, 0.5), (-3.0, 0.0)], ids=["good", "long", "wrong"])
def test_a_round_that_makes_the_guidance_worse_is_halved_or_taken_back_the_last_one_too(length, kept, monkeypatch):
    """A step two and a half times too long is worse than none, and half of it better; of one in the wrong direction
    nothing is kept. In the first round, which is the last: without a measurement after it, it stands as it is."""

    def scaled(value, slopes, past, least):
        before = value.slopes.clone()
        gain, moments = fit_slopes(value, slopes, past, least)
        with torch.no_grad():
            value.slopes.copy_(before + length * (value.slopes - before))
        return max(gain, 1.0), moments  # what it promises is false

    monkeypatch.setattr(ratio_guidance, "STEPS", 1)
    problem = linear()
    first = guided(problem, iterations=1, num_paths=2048)
    monkeypatch.setattr(ratio_guidance, "fit_slopes", scaled)
    last = guided(problem, iterations=2, num_paths=2048)
    assert last.history[-1]["kept"] == kept
    one, other = (s.evaluate(4096, seed=1, confirm=False).elbo.value for s in (first, last))
    assert other > one + 0.01 if kept else other == one
    assert abs(last.history[-1]["elbo"] - other) < 5 * last.history[-1]["elbo_stderr"] + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fixed", "controlled"])
def test_conditions_and_learned_starts_are_taken(start):
    problem = mixture(dtype=torch.float32, start="controlled" if start == "controlled" else None)
    if start == "fixed":
        sde = problem.reference
        problem = sc.ControlProblem(
            sde, reward=lambda x, y: (x * y).sum(1), condition=torch.tensor([[-1.0], [1.0]]), alpha=1.0
        )
    with pytest.warns(RuntimeWarning) if start == "fixed" else _nothing():
        solution = guided(problem, iterations=3, num_paths=1024)
    untuned = simulate_chain(problem, solution.chain, 1024, seed=1).log_weights().mean()
    assert solution.evaluate(1024, seed=1, confirm=False).elbo.value > float(untuned) + 0.1


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


@pytest.mark.slow
def test_a_discrete_sampler_is_guided():
    abar = torch.linspace(0.999, 0.01, 20)
    torch.manual_seed(0)
    chain = sc.diffusion_chain(Denoiser(), abar, shape=(2,), steps=8)
    problem = sc.ControlProblem(chain, reward=sc.LogProb(Classifier(), 1), alpha=0.2)
    solution = guided(problem, iterations=2, num_paths=1024)
    untuned = simulate_chain(problem, solution.chain, 1024, seed=1).log_weights().mean()
    assert solution.evaluate(1024, seed=1, confirm=False).elbo.value > float(untuned)


@pytest.mark.slow
def test_uneven_weights_go_to_a_ladder_of_temperatures_with_the_numbers():
    problem = mixture(sc.Linear(torch.ones(1)), dtype=torch.float32, alpha=0.15)
    with pytest.warns(RuntimeWarning, match=r"of the weights of 1024 paths .* are effective: .* temperature"):
        solution = guided(problem, iterations=4, time_steps=10, num_paths=1024)
    temperatures = [m["temperature"] for m in solution.history]
    assert temperatures[0] > 0.2 and temperatures[-1] == pytest.approx(0.15)
    assert all(a >= b for a, b in itertools.pairwise(temperatures))


@pytest.mark.usefixtures("few_steps")
def test_a_run_resumes_bit_for_bit_and_is_saved_and_pickled(tmp_path):
    problem = generative()
    whole = guided(problem, iterations=3, num_paths=256)

    class Stop(Exception):
        pass

    class Breaker:
        def on_step_end(self, state):
            if state.iteration == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guided(problem, iterations=3, num_paths=256, checkpoint_dir=tmp_path, checkpoint_every=1, callbacks=[Breaker()])
    resumed = guided(problem, iterations=3, num_paths=256, checkpoint_dir=tmp_path, checkpoint_every=1, resume=True)
    assert len(resumed.history) == len(whole.history)
    want = whole.sample(64, seed=3)
    assert torch.equal(resumed.sample(64, seed=3), want)
    whole.save(tmp_path / "solution")
    again = sc.load(tmp_path / "solution", problem)
    assert torch.equal(again.sample(64, seed=3), want)
    assert torch.equal(pickle.loads(pickle.dumps(again)).sample(64, seed=3), want)
    assert torch.equal(copy.deepcopy(again).sample(64, seed=3), want)


@pytest.mark.slow
def test_it_is_proposal_and_twist_of_particles_and_the_base_of_a_trained_control():
    problem = mixture(dtype=torch.float32)
    steps = 12  # of 6, the last one is too long for weights of finite variance
    base = guided(problem, iterations=2, num_paths=1024, time_steps=steps)
    smc = sc.solve(problem, sc.SMC(32, proposal=base, twist="proposal"), time_steps=steps, seed=0)
    particles = smc.evaluate(1024, seed=1, confirm=False).log_z
    log_w = simulate_chain(problem, base.chain, 32768, seed=1, keep="end").log_weights().double()
    log_z = float(log_w.logsumexp(0) - torch.tensor(32768.0).log())
    assert particles.stderr < 0.04 and abs(particles.value - log_z) < 4 * particles.stderr
    trained = sc.solve(
        problem, "log-variance", control=base, time_steps=steps, iterations=2, batch_size=64, seed=0, progress=False
    )
    frozen = trained.control.base.state_dict()
    assert all(torch.equal(v, frozen[name]) for name, v in base.control.state_dict().items())
    assert not torch.equal(trained.sample(64, seed=1), base.sample(64, seed=1))
