"""Guidance: path-integral, by values (given, regressed, Tweedie) and by classifiers, against closed forms."""

import math

import pytest
import torch
from cases import F64, linear, mixture, randn, random_lq, slow_but

import sdecontrol as sc
from sdecontrol.controls.guidance import NetworkValue, value_network
from sdecontrol.controls.network import Layers, Scales, time_features
from sdecontrol.evaluation.estimates import Estimate, mean_estimate
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.methods.base import Run
from sdecontrol.methods.value_guidance import ValueState, itakura_saito, roll

# few particles on purpose: the warning about it is tested where it is asked for
pytestmark = pytest.mark.filterwarnings("ignore:.*effective of:RuntimeWarning")

F32 = torch.float32
K = 6


def lq(**options):
    return random_lq(2, seed=1, **options)


def optimal_shift(problem, exact, k, x):
    """The mean shift of p* in noise coordinates, for a constant square sigma."""
    mean, scale = exact.chain.kernel(k, x)
    move = exact.kernel(x, k).mean - mean
    return torch.linalg.solve(scale[0], move.mT).mT if scale.ndim == 3 else move / scale


def shifts(problem, method, rows, k=2, seed=0, steps=K):
    """Shifts at one state, as many independent draws as rows."""
    solution = sc.solve(problem, method, time_steps=steps, seed=seed)
    x = randn(1, 2, seed=9).expand(rows, 2)
    return solution.control.on_chain(solution.chain)(k, x, None), x[:1], solution


# ------------------------------------------------------------------------------------------------ path integral


def test_the_path_integral_is_unbiased_to_order_1_over_n_for_the_mean_shift_of_the_optimal_kernel():
    """Error of a draw ~ n^(-1/2); bias ~ 1/n. Wrong by a factor alpha, h or sigma, or without its first noise, it has
    neither."""
    problem = lq()
    exact = sc.exact_solution(problem, time_steps=K)
    found = {}
    for n, rows in ((16, 30_000), (64, 8000), (256, 2000)):
        c, x, _ = shifts(problem, sc.PathIntegralGuidance(num_paths=n), rows)
        error = c - optimal_shift(problem, exact, 2, x)
        found[n] = error.mean(0), error.std(0) / math.sqrt(rows), error.square().sum(1).mean().sqrt()
    assert all(found[a][2] / found[b][2] == pytest.approx(2, rel=0.15) for a, b in ((16, 64), (64, 256)))
    small = found[16]
    assert (small[0].abs() > 6 * small[1]).any()  # there is a bias, so that the next line has power
    for n in (64, 256):
        assert (found[n][0].abs() < 4 * found[n][1] + 2 * 16 / n * small[0].abs()).all()


def test_the_limit_of_the_path_integral_is_the_best_mean_shift_and_o_h_from_the_gradient_of_the_value():
    problem, gaps = lq(), []
    for steps in (20, 40, 80):
        exact = sc.exact_solution(problem, time_steps=steps)
        x, k = randn(50, 2, seed=4), steps // 2
        c = optimal_shift(problem, exact, k, x)
        assert torch.allclose(c, exact.control.on_chain(exact.chain)(k, x, None), atol=1e-10)
        guided = sc.solve(problem, sc.ValueGuidance(exact.value), time_steps=steps, seed=0)
        u = guided.control(x, 0.5)
        gaps.append((exact.chain.control(k, c) - u).norm())
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.1) and gaps[1] / gaps[2] == pytest.approx(2, rel=0.1)


def test_with_the_exact_control_as_proposal_all_weights_are_equal_and_the_path_integral_is_exact():
    problem = linear()
    exact = sc.exact_solution(problem, time_steps=K)
    c, x, solution = shifts(problem, sc.PathIntegralGuidance(num_paths=8, proposal=exact), 20)
    assert torch.allclose(c, optimal_shift(problem, exact, 2, x).expand_as(c), atol=1e-10)
    assert float(solution.control.ess[2]) == pytest.approx(1.0, abs=1e-10)
    assert solution.control.ess.isnan().sum() == K - 1  # nothing is said of steps that were not used


def spread(problem, rows=2000, **options):
    c, *_ = shifts(problem, sc.PathIntegralGuidance(num_paths=32, **options), rows)
    return float(c.var(0).sum())


def test_proposals_antithetic_pairs_and_the_control_variate_lower_the_variance():
    problem, mild = lq(), linear(alpha=4.0)
    exact = sc.exact_solution(problem, time_steps=K)
    assert spread(problem, proposal=exact) < 0.5 * spread(problem)
    plain = spread(mild, control_variate=False)
    assert plain == pytest.approx(2 / 32, rel=0.25)  # nearly that of plain xi
    assert spread(mild, control_variate=False, antithetic=True) < 0.2 * plain
    assert spread(mild) < 0.2 * plain


def test_a_proposal_changes_no_limit():
    """The weights carry dQ0/dP^v and xi becomes xi + c^v: without either the mean is elsewhere."""
    problem = lq()
    exact = sc.exact_solution(problem, time_steps=K)

    def other(x, t):
        return 0.5 - 0.4 * x

    c, x, _ = shifts(problem, sc.PathIntegralGuidance(num_paths=512, proposal=other), 1500)
    error = c - optimal_shift(problem, exact, 2, x)
    assert (error.mean(0).abs() < 4 * error.std(0) / math.sqrt(1500) + 3e-3).all()


@pytest.mark.parametrize("options", [{}, {"antithetic": True}, {"control_variate": False}])
@pytest.mark.parametrize("start", ["dirac", "fixed", "controlled"])
def test_given_its_draws_the_weights_of_a_noisy_path_integral_are_exact(options, start):
    """E w = Z with sixteen paths per average. A draw that knows the noise of its own path breaks this."""
    problem = lq(start=start, alpha=2.0)
    exact = sc.exact_solution(problem, time_steps=K)
    solution = sc.solve(problem, sc.PathIntegralGuidance(num_paths=16, **options), time_steps=K, seed=0)
    _, log_w = solution.weighted_sample(8192, seed=0)  # the solution's seed: its draws are still not those of the paths
    relative = mean_estimate((log_w - exact.log_z).exp())
    assert abs(relative.value - 1) < 4 * relative.stderr and relative.stderr < 0.1


def test_the_draws_are_a_function_of_seed_step_and_row():
    problem = lq()
    solution = sc.solve(problem, sc.PathIntegralGuidance(num_paths=16), time_steps=K, seed=0)
    paths = solution.simulate(600, seed=1)
    assert torch.allclose(paths.log_ratio(), paths.log_ratio(solution.control))
    t = solution.chain.times[3]
    u = solution.control(paths.states[3], t)
    assert torch.allclose(paths.controls[3], u) and torch.equal(u[:70], solution.control(paths.states[3, :70], t))
    assert torch.allclose(solution.control(paths.states[3], t.expand(600)), u)
    assert not torch.allclose(u[:1], solution.control(paths.states[3, 1:2].clone(), t))
    other = sc.solve(problem, sc.PathIntegralGuidance(num_paths=16), time_steps=K, seed=1)
    assert not torch.equal(other.sample(10, seed=1), solution.sample(10, seed=1))
    assert torch.equal(solution.sample(10, seed=1), solution.sample(10, seed=1))


def test_a_path_integral_needs_no_gradient_and_says_when_its_weights_degenerate():
    sde = sc.SDE(lambda x, t: -x, 1.0, dim=2)
    black = sc.ControlProblem(
        sde, initial=sc.Dirac(torch.zeros(2)), reward=lambda x: torch.from_numpy(-(x.numpy() ** 2).sum(1)), alpha=1.0
    )
    solution = sc.solve(black, sc.PathIntegralGuidance(num_paths=64), time_steps=K, seed=0)
    assert solution.sample(20, seed=0).shape == (20, 2)
    assert (solution.control.ess > 0.3).all()
    steep = sc.ControlProblem(sde, initial=sc.Dirac(torch.zeros(2)), reward=sc.Linear(torch.ones(2)), alpha=0.1)
    with pytest.warns(RuntimeWarning, match=r"effective of 64 paths at step 0"):
        sc.solve(steep, sc.PathIntegralGuidance(num_paths=64), time_steps=K, seed=0).sample(20, seed=0)


# ------------------------------------------------------------------------------------------------ values that are given


@pytest.mark.parametrize("start", [None, "controlled"])
def test_guidance_by_the_exact_value_is_the_exact_control(start):
    for problem in (mixture(start=start), random_lq(3, m=2, seed=3, start="controlled" if start else "dirac")):
        exact = sc.exact_solution(problem)
        solution = sc.solve(problem, sc.ValueGuidance(exact.value), time_steps=10, seed=0)
        x = randn(40, *problem.event_shape, seed=1)
        for t in (0.0, 0.35, 0.9):
            assert torch.allclose(solution.control(x, t), exact.control(x, t), atol=1e-9)
        t = torch.linspace(0, 0.9, 40, dtype=F64)
        assert torch.allclose(solution.control(x, t), exact.control(x, t), atol=1e-9)
        if start:  # in the learned start: the same, up to the coordinates of its noise
            assert torch.allclose(solution.control(x, -0.4), exact.control(x, -0.4), atol=1e-9)
        chain, y = solution.chain, solution.control.on_chain(solution.chain)
        for k in range(chain.steps):  # on the chain: the same again, as a shift
            time = float(chain.clock[k])
            assert torch.allclose(y(k, x, None), chain.shift_at(k, x, solution.control(x, time)), atol=1e-9)


def test_guidance_by_the_exact_value_samples_the_exact_law():
    problem = mixture()
    exact = sc.exact_solution(problem)
    solution = sc.solve(problem, sc.ValueGuidance(exact.value), time_steps=100, seed=0)
    ours, theirs = solution.sample(4000, seed=0)[:, 0], exact.sample(4000, seed=1)[:, 0]
    assert abs((ours > 0).double().mean() - (theirs > 0).double().mean()) < 4 * math.sqrt(2 * 0.25 / 4000)
    assert sc.metrics.wasserstein(ours[:1000, None], theirs[:1000, None]) < 0.15
    assert solution.evaluate(2048, seed=1).gap.value < 0.05


def test_tweedie_is_exact_for_linear_rewards_of_gaussian_data_and_nowhere_else():
    """v_t is then linear in x0^ up to a constant; for any other data or reward its error does not fall with the
    step."""
    x = randn(64, 1, seed=2)

    def error(problem, t=0.6):
        exact = sc.exact_solution(problem)
        u = sc.solve(problem, sc.ValueGuidance("tweedie"), time_steps=10, seed=0).control(x, t)
        return float((u - exact.control(x, t)).norm() / exact.control(x, t).norm())

    assert error(mixture(components=1, start="controlled")) < 1e-3  # models end at noising time 1e-5, not 0
    assert error(mixture(components=1, start="controlled"), t=-0.3) < 1e-3
    curved = sc.Quadratic(2.0 * torch.eye(1, dtype=F64), torch.ones(1, dtype=F64))
    assert error(mixture(components=1, reward=curved)) > 0.05
    assert error(mixture()) > 0.05
    relative = [
        sc.control_error(
            sc.solve(mixture(), sc.ValueGuidance("tweedie"), time_steps=n), sc.exact_solution(mixture()), 512
        )
        for n in (25, 100)
    ]
    assert relative[1].relative.value > 0.8 * relative[0].relative.value > 0.05


def test_guided_diffusion_chains_have_exact_weights():
    """Tweedie on a discrete model: whatever its error, E w = Z, here known for Gaussian data under DDPM."""

    class Gaussian(torch.nn.Module):  # the exact noise prediction for data N(1, 0.25)
        def forward(self, x, n):
            a = abar[n].unsqueeze(1)
            return (1 - a).sqrt() * (x - a.sqrt()) / (0.25 * a + 1 - a)

    abar = torch.cumprod(1 - torch.linspace(1e-3, 0.1, 100, dtype=F64), 0)
    chain = sc.diffusion_chain(Gaussian(), abar, prediction="noise", shape=(1,), steps=20)
    problem = sc.ControlProblem(chain, reward=lambda x: x[:, 0], alpha=0.5)
    plain = sc.simulate(problem, 200_000, seed=0, keep="end")
    truth = Estimate(*_log_mean(log_weights(problem, plain)))
    twisted = sc.SMC(32, sc.ValueGuidance("tweedie"), twist="tweedie")
    for method in (sc.ValueGuidance("tweedie"), sc.PathIntegralGuidance(num_paths=8), twisted):
        solution = sc.solve(problem, method, seed=0)
        ev = solution.evaluate(4096, seed=1)
        assert abs(ev.log_z.value - truth.value) < 4 * math.hypot(ev.log_z.stderr, truth.stderr)
        assert ev.log_z.stderr < 0.05
    assert sc.solve(problem, sc.ValueGuidance("tweedie"), seed=0).evaluate(2048, seed=1).ess.value > 0.9


def _log_mean(log_w):
    value = log_w.logsumexp(0) - math.log(len(log_w))
    return float(value), float((log_w - value).exp().std()) / math.sqrt(len(log_w))


# ------------------------------------------------------------------------------------------------ classifiers


def test_a_calibrated_classifier_of_noisy_states_is_the_exact_value():
    """p(label | x_t) of two Gaussian classes is closed form: guidance by it is the control towards the class."""
    problem = mixture()
    law = problem.reference.mixture

    def noisy(x, s):
        s0 = s[0].double()
        schedule = problem.reference.schedule
        return law.noised(float(schedule.mu(s0)), float(schedule.std(s0))).terms(x)[0]

    def clean(x):
        return law.terms(x)[0]

    target = sc.ControlProblem(problem.reference, reward=sc.LogProb(clean, 1), alpha=1.0)
    solution = sc.solve(target, sc.ClassifierGuidance(noisy, 1, noisy=True), time_steps=100, seed=0)
    x = solution.sample(2000, seed=0)
    assert (x > 0).double().mean() > 0.995 and abs(float(x.mean()) - 1.5) < 0.06 and abs(float(x.var()) - 0.3) < 0.05
    ev = solution.evaluate(2048, seed=1)
    assert abs(ev.log_z.value - math.log(0.6)) < 4 * ev.log_z.stderr + 0.01 and ev.gap.value < 0.05
    tweedie = sc.solve(target, sc.ClassifierGuidance(clean, 1), time_steps=100, seed=0)
    same = sc.solve(target, sc.ValueGuidance("tweedie"), time_steps=100, seed=0)
    own = sc.solve(target, "classifier-guidance", time_steps=100, seed=0)
    assert torch.equal(same.sample(50, seed=3), tweedie.sample(50, seed=3))
    assert torch.equal(same.sample(50, seed=3), own.sample(50, seed=3))


def test_classifier_guidance_takes_the_label_from_the_condition():
    problem = mixture()
    law = problem.reference.mixture
    clean = lambda x: law.terms(x)[0]  # noqa: E731
    target = sc.ControlProblem(problem.reference, reward=sc.LogProb(clean, None), condition=torch.tensor([0, 1]))
    solution = sc.solve(target, sc.ClassifierGuidance(clean), time_steps=30, seed=0)
    y = torch.tensor([0, 1]).repeat(200)
    x = solution.sample(400, seed=0, condition=y)[:, 0]
    assert (x[y == 0] < 0).double().mean() > 0.9 and (x[y == 1] > 0).double().mean() > 0.9
    with pytest.raises(ValueError, match="label is missing"):
        sc.solve(problem, sc.ClassifierGuidance(clean), time_steps=10)
    with pytest.raises(ValueError, match="classifier is missing"):
        sc.solve(problem, sc.ClassifierGuidance(), time_steps=10)


# ---------------------------------------------------------------------------------------------- values that are learned


def test_the_regression_is_minimal_at_the_log_mean_and_its_gradient_is_bounded():
    log_y = randn(3, 500, seed=0)
    g = (log_y.logsumexp(1) - math.log(500)).requires_grad_(True)
    use = torch.ones(3, 500, dtype=torch.bool)
    itakura_saito(log_y - g.unsqueeze(1), use).backward()
    assert g.grad.abs().max() < 1e-12
    far = torch.zeros(3, requires_grad=True)
    itakura_saito(800 * log_y - far.unsqueeze(1), use).backward()
    assert far.grad.isfinite().all() and far.grad.norm() < 2
    # steps before a path is guided count for nothing, whatever they are: not even as 0 times infinity
    kept, whole = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    use[:, 250:] = False
    itakura_saito(torch.where(use, log_y, torch.tensor(5000.0)) - kept.unsqueeze(1), use).backward()
    itakura_saito(log_y[:, :250] - whole.unsqueeze(1), use[:, :250]).backward()
    assert torch.allclose(kept.grad, whole.grad, atol=1e-12)


@pytest.mark.parametrize("start", ["dirac", "fixed", "controlled"])
def test_what_a_path_has_to_come_has_the_value_as_its_log_mean(start):
    """E[exp(aim_k - v_k/alpha) | x_k] = 1 at every step for any guidance: running cost, likelihood ratio and reward all
    count."""
    problem = lq(start=start, alpha=2.0)
    chain = problem.chain(K)
    exact = sc.exact_solution(problem, time_steps=K)
    state = sc.ValueGuidance("monte-carlo").setup(Run(problem, chain, 256, 1, seed=0))
    assert isinstance(state, ValueState)
    with torch.no_grad():
        state.control.value.slope[0].add_(0.3)  # some guidance, far from the right one
    run = Run(problem, chain, 32_768, 1, seed=5)
    paths, guided = roll(run, state.control, run.batch())
    gains = paths.log_target() - paths.log_ratio(per_step=True)
    aim = problem.reward(paths.samples) / problem.alpha + gains.flip(0).cumsum(0).flip(0)
    part = torch.arange(guided.shape[1]) % 4
    assert guided[:, part != 3].all() and guided[-1].all()  # three of four from the first step on
    share = guided[:, part == 3].double().mean(1)
    want = torch.arange(1, chain.steps + 1) / chain.steps  # the fourth from a uniform step
    assert float((share - want).abs().max()) < 5 * 0.5 / (guided.shape[1] / 4) ** 0.5
    for k in range(chain.steps):
        d = aim[k] - exact.value(paths.states[k], float(chain.times[k])) / problem.alpha
        mean = mean_estimate(d[guided[k]].exp())
        assert abs(mean.value - 1) < 4 * mean.stderr and mean.stderr < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("value", slow_but(["monte-carlo", "soft-q"], "soft-q"))
def test_learned_values_reach_the_exact_one_on_a_linear_quadratic_chain(value):
    problem = lq(dtype=F32)
    exact = sc.exact_solution(problem, time_steps=K)
    solution = sc.solve(problem, sc.ValueGuidance(value), time_steps=K, seed=0, iterations=300, batch_size=64)
    guided = sc.solve(problem, sc.ValueGuidance(exact.value), time_steps=K, seed=0)
    assert sc.control_error(solution, guided, 1024).relative.value < 3e-2
    x = sc.simulate(problem, 512, control=exact.control, time_steps=K, seed=5).states
    for k in range(K):
        t = solution.chain.times[k]
        error = solution.control.value.at(x[k], t) - exact.value(x[k], t) / problem.alpha
        assert error.detach().square().mean().sqrt() < 0.1
    assert "loss" in solution.history[-1] and solution.evaluate(2048, seed=1).gap.value < 2 * float(exact.floor)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["monte-carlo", "soft-q"])
def test_learned_values_guide_a_mixture_near_its_exact_law(value):
    problem = mixture(dtype=F32)
    exact = sc.exact_solution(problem)
    solution = sc.solve(problem, sc.ValueGuidance(value), time_steps=40, seed=0, iterations=2000)
    assert sc.control_error(solution, exact, 1024).relative.value < 0.05
    tweedie = sc.solve(problem, sc.ValueGuidance("tweedie"), time_steps=40, seed=0)
    assert (
        sc.control_error(solution, exact, 1024).relative.value < sc.control_error(tweedie, exact, 1024).relative.value
    )


def test_conditional_values_are_learned_for_all_conditions():
    sde = sc.LinearSDE(A=-torch.eye(1), sigma=torch.eye(1))
    problem = sc.ControlProblem(
        sde, initial=sc.Dirac(torch.zeros(1)), reward=lambda x, y: 2 * y * x[:, 0], condition=torch.tensor([-1.0, 1.0])
    )
    solution = sc.solve(problem, sc.ValueGuidance(), time_steps=K, seed=0, iterations=200, batch_size=64)
    x = solution.sample(400, seed=0, condition=torch.tensor([-1.0, 1.0]).repeat(200))[:, 0]
    assert x[::2].mean() < -0.4 and x[1::2].mean() > 0.4


def test_a_network_for_values_is_normalised_and_starts_at_log_z():
    problem = lq()
    chain = problem.chain(K)
    network = value_network(problem, chain, 3)
    x = randn(5, 2, seed=0)
    exact = sc.exact_solution(problem, time_steps=K)
    level = network.at(x, chain.times[0]).detach()
    assert torch.allclose(level, level[:1].expand(5)) and abs(float(level[0] - exact.log_z)) < 0.5
    along = network.along(x.expand(4, 5, 2), chain.times[:4])
    assert torch.allclose(along[2], network.at(x, chain.times[2]))


def test_a_network_for_values_begins_as_its_coefficients_say():
    """Without its hidden layers it is a quadratic form about the centre, in units of the spread, with coefficients that
    are functions of time: its derivatives there are known. The layers begin with a variance of 1/3 a unit."""
    scales = Scales(centre=randn(2, seed=1), spread=randn(2, seed=2).exp())
    network = (
        NetworkValue(2, (0.5, 2.0), Layers((400, 300)), scales, level=0.7, size=3.0).double().requires_grad_(False)
    )
    for layer in network.layers:
        unit = layer.weight * math.sqrt(layer.in_features)
        assert 0.99 < float(unit.abs().max()) <= 1 + 1e-6 and abs(float(unit.square().mean()) - 1 / 3) < 0.01
    for i, part in enumerate((network.constant, network.slope, network.square)):
        part.copy_(randn(*part.shape, seed=3 + i))
    phi, t = time_features(torch.tensor([1 / 3], dtype=F64))[0], torch.tensor(1.0, dtype=F64)

    def value(x):
        return network.at(x.unsqueeze(0), t)[0]

    spread, square = network.spread, torch.einsum("f,fij->ij", phi, network.square)
    gradient, curvature = torch.func.grad(value)(network.centre), torch.func.hessian(value)(network.centre)
    assert float(value(network.centre)) == pytest.approx(0.7 + 3 * float(phi @ network.constant))
    assert torch.allclose(gradient, 3 * (phi @ network.slope) / spread)
    assert torch.allclose(curvature, 1.5 * (square + square.mT) / torch.outer(spread, spread))


# ------------------------------------------------------------------------------------------------ files, refusals


def test_guidance_is_saved_and_loads_to_the_same_numbers(tmp_path):
    problem = lq(dtype=F32)
    exact = sc.exact_solution(problem)

    def proposal(x, t):
        return -x

    trained = sc.solve(problem, "reward-backprop", time_steps=K, iterations=3, batch_size=64, seed=0)
    cases = {
        "plain": (sc.PathIntegralGuidance(num_paths=8), {}),
        "trained": (sc.PathIntegralGuidance(num_paths=8, proposal=trained, antithetic=True), {}),
        "given": (sc.PathIntegralGuidance(num_paths=8, proposal=proposal), {"control": proposal}),
        "learned": (sc.ValueGuidance("soft-q"), {}),
        "value": (sc.ValueGuidance(exact.value), {"value": exact.value}),
    }
    for name, (method, given) in cases.items():
        options = {"iterations": 3} if name == "learned" else {}
        solution = sc.solve(problem, method, time_steps=K, batch_size=64, seed=0, **options)
        solution.save(tmp_path / name)
        again = sc.load(tmp_path / name, problem, **given)
        assert torch.equal(solution.sample(50, seed=1), again.sample(50, seed=1)), name
        assert str(solution.evaluate(64, seed=1)) == str(again.evaluate(64, seed=1))
        if given:
            with pytest.raises(TypeError, match=r"give it again as load"):
                sc.load(tmp_path / name, problem)


def test_tweedie_and_classifiers_are_saved(tmp_path):
    problem = mixture(dtype=F32)
    law = problem.reference.mixture
    clean = lambda x: law.terms(x)[0]  # noqa: E731
    for name, method in (("t", sc.ValueGuidance("tweedie")), ("c", sc.ClassifierGuidance(clean, 1))):
        solution = sc.solve(problem, method, time_steps=K, seed=0)
        solution.save(tmp_path / name)
        again = sc.load(tmp_path / name, problem, value=clean if name == "c" else None)
        assert torch.equal(solution.sample(50, seed=1), again.sample(50, seed=1))
    with pytest.raises(TypeError, match="classifier of your own"):
        sc.load(tmp_path / "c", problem)
    assert solution.model(torch.randn(4, 1), torch.full((4,), 0.5)).shape == (4, 1)


@pytest.mark.parametrize("value", ["monte-carlo", "soft-q"])
def test_a_stopped_regression_resumes_to_the_same_numbers(tmp_path, value):
    problem = lq(dtype=F32)
    options = {"time_steps": K, "batch_size": 64, "seed": 3, "iterations": 8, "checkpoint_every": 4}
    whole = sc.solve(problem, sc.ValueGuidance(value), **options)
    with pytest.raises(KeyboardInterrupt):
        sc.solve(problem, sc.ValueGuidance(value), **options, checkpoint_dir=tmp_path, callbacks=[_Interrupt(6)])
    resumed = sc.solve(problem, sc.ValueGuidance(value), **options, checkpoint_dir=tmp_path, resume=True)
    assert resumed.history == whole.history
    assert torch.equal(resumed.sample(64, seed=1), whole.sample(64, seed=1))


class _Interrupt:
    def __init__(self, at):
        self.at = at

    def on_step_end(self, state):
        if state.iteration == self.at:
            raise KeyboardInterrupt


def test_what_guidance_cannot_do_is_refused_by_name():
    problem = lq()
    with pytest.raises(ValueError, match="needs a denoiser"):
        sc.solve(problem, sc.ValueGuidance("tweedie"), time_steps=K)
    abar = torch.linspace(0.99, 0.01, 20)
    clipped = sc.diffusion_chain(lambda x, n: x, abar, shape=(1,), steps=5, clip=1.0)
    with pytest.raises(ValueError, match="clips its prediction"):
        sc.solve(sc.ControlProblem(clipped, reward=lambda x: x[:, 0]), sc.ValueGuidance("tweedie"))
    costly = sc.ControlProblem(
        mixture().reference, reward=sc.Linear(torch.ones(1, dtype=F64)), running_cost=lambda x, t: x[:, 0] ** 2
    )
    with pytest.raises(ValueError, match="no running cost"):
        sc.solve(costly, sc.ValueGuidance("tweedie"), time_steps=K)
    black = sc.ControlProblem(mixture().reference, reward=lambda x: x[:, 0].detach())
    with pytest.raises(sc.NotDifferentiable, match="log-variance, cross-entropy, soft-ppo"):
        sc.solve(black, sc.ValueGuidance("tweedie"), time_steps=K)
    with pytest.raises(sc.NotDifferentiable, match="without a graph"):
        sc.solve(problem, sc.ValueGuidance(lambda x, t: x[:, 0].detach()), time_steps=K)
    with pytest.raises(ValueError, match="value must return shape"):
        sc.solve(problem, sc.ValueGuidance(lambda x, t: x), time_steps=K)
    for name, value in (("iterations", 5), ("budget", "1s"), ("tolerance", 0.1)):
        with pytest.raises(ValueError, match=f"{name}: path-integral-guidance trains nothing"):
            sc.solve(problem, sc.PathIntegralGuidance(), time_steps=K, **{name: value})
    with pytest.raises(ValueError, match="even for antithetic"):
        sc.PathIntegralGuidance(num_paths=7, antithetic=True)
    with pytest.raises(ValueError, match="num_paths must be"):
        sc.PathIntegralGuidance(num_paths=1)
    with pytest.raises(ValueError, match="did you mean"):
        sc.ValueGuidance("montecarlo")
    with pytest.raises(TypeError, match="proposal must be"):
        sc.solve(problem, sc.PathIntegralGuidance(proposal=3), time_steps=K)


def test_classifier_guidance_of_the_reward_is_tweedie_value_guidance_at_alpha_one():
    """Bit for bit, as the docstring says; at another alpha the value is divided by it and the classifier's is not."""
    law = sc.GaussianMixture(torch.tensor([0.6, 0.4]), torch.tensor([[-1.5, 0.0], [1.5, 0.5]]), 0.1)
    reward = sc.LogProb(lambda x: torch.stack((x[:, 0], -x[:, 0]), 1), 1)

    def ends(method, alpha):
        problem = sc.ControlProblem(sc.generative_sde(law, sc.VP(), shape=(2,)), reward=reward, alpha=alpha)
        return sc.solve(problem, method, time_steps=5, seed=0).sample(64, seed=1)

    value, classifier = sc.ValueGuidance("tweedie"), sc.ClassifierGuidance()
    assert torch.equal(ends(classifier, 1.0), ends(value, 1.0))
    assert torch.equal(ends(classifier, 0.5), ends(classifier, 1.0))
    assert not torch.equal(ends(value, 0.5), ends(value, 1.0))
