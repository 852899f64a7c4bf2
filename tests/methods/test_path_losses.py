"""At u_old = u the gradient of every loss on paths is, in expectation, the exact gradient that it claims
(linear-quadratic chains)."""

import pytest
import torch
from cases import F64, SmallControl, randn, random_lq
from gaussian_gradients import AffineControl, GaussianChain, agree, gradient_of, gradients, lq, perturbed, vanishes

import sdecontrol as sc
from sdecontrol.chains.bridges import ChainBridge
from sdecontrol.methods import on_paths
from sdecontrol.methods.base import Run
from sdecontrol.methods.reward_weighted_mle import RewardWeightedMLE
from sdecontrol.paths.gradients import Objective, backpropagate
from sdecontrol.paths.weights import leave_one_out
from sdecontrol.problems.simulate import roll_out

K = 4


@pytest.fixture(scope="module")
def setting():
    problem = lq()
    chain = GaussianChain(problem, K)
    return problem, chain, perturbed(chain.optimum(), 0.2)


def test_the_exact_gradients_of_these_tests_are_those_of_the_package(setting):
    """The helper's own dynamic programming against ``exact_solution``, and its objective against the exact one."""
    problem, chain, _ = setting
    best, exact = chain.optimum(), sc.exact_solution(problem, time_steps=K)
    x = randn(5, 2, seed=3)
    for k in range(K):
        t = torch.tensor(k / K, dtype=F64)
        assert torch.allclose(best(x, t.expand(5)), exact.control(x, t), atol=1e-12)
    assert gradient_of(chain.cost(best), best).abs().max() < 1e-13
    assert gradient_of(chain.forward_kl(best), best).abs().max() < 1e-13
    assert float(chain.cost(best).detach()) == pytest.approx(-float(exact.elbo), abs=1e-12)
    P, q, c = chain.policy_values(best)[0]
    x0 = problem.initial.mean
    assert float(-0.5 * x0 @ P @ x0 + q @ x0 + c) == pytest.approx(float(exact.elbo), abs=1e-12)


# ---------------------------------------------------------------- the objective's gradient

OBJECTIVE = {
    "log-variance": (sc.LogVariance(), 24),
    "soft-ppo, per-time": (sc.SoftPPO(baseline="per-time", epochs=1), 24),
}
OBJECTIVE_SLOW = {
    "reinforce": (sc.Reinforce(), 40),
    "backpropagation": (sc.RewardBackprop(), 16),
    "log-variance, groups": (sc.LogVariance(group_size=16), 40),
    "trajectory balance": (sc.PathConsistency(n="all"), 40),
    "soft-ppo, batch": (sc.SoftPPO(baseline="batch", epochs=1), 40),
    "reinforce without baseline": (sc.Reinforce(baseline="none"), 120),
}


@pytest.mark.parametrize("name", [*OBJECTIVE, *(pytest.param(n, marks=pytest.mark.slow) for n in OBJECTIVE_SLOW)])
def test_on_policy_gradients_are_that_of_the_objective(setting, name):
    problem, chain, control = setting
    method, repeats = {**OBJECTIVE, **OBJECTIVE_SLOW}[name]
    agree(gradients(problem, method, control, K, repeats=repeats), gradient_of(chain.cost(control), control))


@pytest.mark.slow
def test_ppo_with_a_value_baseline_has_the_gradient_of_the_objective(setting):
    """The network away from its start, so that the baseline is a function of state and time."""
    problem, chain, control = setting

    class Method(sc.SoftPPO):
        def setup(self, run):
            state = super().setup(run)
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for p in state.value.parameters():
                    p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=F64))
            return state

    have = gradients(problem, Method(baseline="value", epochs=1), control, K, repeats=40, batch=8192)
    agree(have, gradient_of(chain.cost(control), control), power=0.007)


@pytest.mark.slow
def test_conditional_variance_over_a_fixed_random_start_has_the_gradient_of_the_objective():
    """And the variance over all starts has it too in expectation at v = u: only its noise is larger."""
    problem = lq(start="fixed")
    chain = GaussianChain(problem, K)
    control = perturbed(chain.optimum(), 0.2)
    agree(
        gradients(problem, sc.LogVariance(), control, K, repeats=30), gradient_of(chain.cost(control), control), 0.006
    )


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_path_consistency_with_the_value_of_its_control_has_the_gradient_of_the_objective(setting, n):
    """Step k's score meets the residuals of the ``min(n, k+1)`` windows that it is in, of n."""
    problem, chain, control = setting
    values = chain.policy_values(control)

    class Exact(torch.nn.Module):
        def along(self, states, times, y=None):
            rows = [-0.5 * ((x @ P) * x).sum(1) + x @ q + c for x, (P, q, c) in zip(states, values)]
            return torch.stack(rows)

    class Method(sc.PathConsistency):
        def setup(self, run):
            state = super().setup(run)
            state.value = Exact()
            return state

    want = [p.grad for p in _filled(chain.cost(control), control)]
    share = torch.tensor([min(n, k + 1) / n for k in range(K)], dtype=F64)
    want = torch.cat([(share.reshape(-1, *(1,) * (g.ndim - 1)) * g).flatten() for g in want])
    agree(gradients(problem, Method(n=n), control, K, repeats=60), want)


@pytest.mark.parametrize("n", [1, 3])
def test_path_consistency_leaves_the_value_of_its_control_where_it_is(setting, n):
    """The residuals have mean 0 in every window: the gradient of a constant added to the value, step by step."""
    problem, chain, control = setting
    values = chain.policy_values(control)

    class Shifted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(K, 1, dtype=F64))

        def along(self, states, times, y=None):
            rows = [-0.5 * ((x @ P) * x).sum(1) + x @ q + c for x, (P, q, c) in zip(states, values)]
            return torch.stack(rows) + self.bias

    found = []
    run = Run(problem, problem.chain(K), 8192, 1, 3, control)
    state = sc.PathConsistency(n=n).setup(run)
    state.value = Shifted()
    for i in range(12):
        run.iteration, state.value.bias.grad = i, None
        sc.PathConsistency(n=n).step(state, run)
        found.append(state.value.bias.grad.flatten() * n)
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    assert float(error.max()) < 0.02  # nats; the running costs alone are ten times that
    assert float((found.mean(0) / error).abs().max()) < 5


def _filled(value, control):
    for p in control.parameters():
        p.grad = None
    value.backward()
    return list(control.parameters())


# ---------------------------------------------------------------- the forward KL's gradient

FORWARD = {"cross-entropy": (sc.CrossEntropy(), 16), "reference paths": (RewardWeightedMLE(roll_in="none"), 12)}
FORWARD_SLOW = {
    "cross-entropy, reference": (sc.CrossEntropy(paths="reference"), 30),
    "cross-entropy, another control": (sc.CrossEntropy(paths=SmallControl(2, 2)), 60),
}


@pytest.mark.parametrize("name", [*FORWARD, *(pytest.param(n, marks=pytest.mark.slow) for n in FORWARD_SLOW)])
def test_weighted_likelihood_has_the_gradient_of_the_forward_kl(setting, name):
    problem, chain, _ = setting
    # on other paths than its own farther off: their noise does not grow with that
    control = perturbed(chain.optimum(), 0.2 if name == "cross-entropy" else 0.6)
    method, repeats = {**FORWARD, **FORWARD_SLOW}[name]
    agree(gradients(problem, method, control, K, repeats=repeats), gradient_of(chain.forward_kl(control), control))


def test_cross_entropy_on_paths_of_the_reference_is_reward_weighted_mle_without_a_roll_in(setting):
    problem, _, control = setting
    pair = [one_step(problem, m, control, K) for m in (sc.CrossEntropy(paths="reference"), RewardWeightedMLE("none"))]
    assert torch.allclose(*pair, atol=1e-12)


@pytest.mark.parametrize("first", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_roll_in_up_to_step_k_gives_the_forward_kl_of_the_rest(setting, first, monkeypatch):
    """x_k is drawn from the current control and tilted by ``exp(v_k/alpha)``; from there the path is soft-optimal."""
    problem, chain, _ = setting
    control = perturbed(chain.optimum(), 0.6)
    monkeypatch.setattr(RewardWeightedMLE, "first_step", lambda *_: first)
    want = chain.forward_kl(control, first, chain.marginals(control)[first])
    agree(
        gradients(problem, RewardWeightedMLE(), control, K, repeats=60 if first == 3 else 32),
        gradient_of(want, control),
    )


def test_bridge_matching_has_the_gradient_of_the_forward_kl():
    problem = lq(running=False)
    chain = GaussianChain(problem, K)
    control = perturbed(chain.optimum(), 0.6)
    want = gradient_of(chain.forward_kl(control), control)
    agree(gradients(problem, sc.BridgeMatching(), control, K, repeats=12), want)


# ---------------------------------------------------------------- zero at the optimum

ZERO = {"log-variance": sc.LogVariance(), "cross-entropy": sc.CrossEntropy()}


@pytest.mark.parametrize("name", ["log-variance", pytest.param("cross-entropy", marks=pytest.mark.slow)])
def test_on_policy_gradients_vanish_at_the_best_mean_shift_control(setting, name):
    """Against the gradient that a control 2 % off (of its norm) would have."""
    problem, chain, _ = setting
    best = chain.optimum()
    off = AffineControl(1.02 * best.gain.detach(), 1.02 * best.offset.detach())
    scale = float(gradient_of(chain.cost(off), off).norm())
    vanishes(gradients(problem, ZERO[name], best, K, repeats=16), scale)


@pytest.mark.slow
def test_off_policy_log_variance_is_off_by_the_order_of_the_step():
    """The gradient on paths of the reference at the best mean-shift control, as the relative shift of the minimiser
    that a Newton step in the metric of the reference's states makes of it: not zero, and falling with h."""
    problem = lq()
    shifts = []
    for steps in (5, 20):
        chain = GaussianChain(problem, steps)
        best = chain.optimum()
        have = gradients(problem, sc.LogVariance(paths="reference"), best, steps, repeats=60, batch=8192)
        error = have.std(0) / len(have) ** 0.5
        mean = have.mean(0)
        assert float((mean / error).abs().max()) > 8  # not zero
        # step by step |grad_k|^2 over h is the squared shift of u_k, in the metric of one state
        shifts.append(float((mean.square() - error.square()).sum()) / (1 / steps))
    assert 0 < shifts[1] < 0.5 * shifts[0]


# ---------------------------------------------------------------- unbiased to rounding


def one_step(problem, method, control, K, **options):
    return gradients(problem, method, control, K, repeats=1, batch=64, **options)[0]


@pytest.mark.parametrize(
    "make",
    [sc.LogVariance, sc.Reinforce, sc.CrossEntropy, lambda **o: sc.SoftPPO(baseline="per-time", epochs=1, **o)],
    ids=["log-variance", "reinforce", "cross-entropy", "soft-ppo"],
)
def test_the_mean_over_all_choices_of_steps_is_the_whole_gradient(setting, make, monkeypatch):
    from sdecontrol.methods import cross_entropy, log_variance, reinforce, soft_ppo

    problem, _, control = setting
    whole = one_step(problem, make(), control, K)
    parts = []
    for chosen in ([0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]):
        for module in (cross_entropy, log_variance, reinforce, soft_ppo):
            monkeypatch.setattr(module, "steps_of", lambda *_, chosen=chosen: chosen)
        parts.append(one_step(problem, make(steps=2), control, K))
    assert torch.allclose(torch.stack(parts).mean(0), whole, atol=1e-12)
    assert not torch.allclose(parts[0], whole, atol=1e-3)


def test_off_policy_log_variance_of_some_steps_keeps_the_whole_coefficient(setting, monkeypatch):
    from sdecontrol.methods import log_variance

    problem, _, control = setting
    whole = one_step(problem, sc.LogVariance(paths="reference"), control, K)
    parts = []
    for k in range(K):
        monkeypatch.setattr(log_variance, "steps_of", lambda *_, k=k: [k])
        parts.append(one_step(problem, sc.LogVariance(paths="reference", steps=1), control, K))
    assert torch.allclose(torch.stack(parts).mean(0), whole, atol=1e-12)


def test_steps_are_drawn_uniformly_without_repetition():
    problem = lq()
    run = Run(problem, problem.chain(6), 64, 1, 5)
    counts = torch.zeros(6)
    for i in range(3000):
        run.iteration = i
        steps = on_paths.steps_of(run, 2)
        assert len(set(steps)) == 2
        counts[steps] += 1
    # binomial(3000, 1/3): standard deviation 26
    assert float((counts - 1000).abs().max()) < 4 * 26
    assert on_paths.steps_of(run, 6) is None


def _pathwise(problem, chain, control, mode, **more):
    run = Run(problem, chain, 32, 1, 3)
    batch = run.batch()
    for p in control.parameters():
        p.grad = None
    backpropagate(
        chain,
        control,
        batch.x0,
        batch.noise,
        Objective(lambda x: -problem.reward(x) / problem.alpha, problem.running_cost_or_none, problem.alpha),
        parameters=list(control.parameters()),
        mode=mode,
        **more,
    )
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in control.parameters()]
    )


@pytest.mark.parametrize("steps", [5, 16, 37])
def test_randomly_truncated_backpropagation_is_unbiased(steps):
    """The mean over all lengths that can be drawn is the whole gradient, to rounding; a single one is not."""
    problem, control = lq(), SmallControl(2, 2)
    chain = problem.chain(steps)
    whole = _pathwise(problem, chain, control, "full")
    size = max(1, min(16, steps // 8))
    count = -(-steps // size)
    parts = [_pathwise(problem, chain, control, "random", truncation=(i + 0.5) / count) for i in range(count)]
    assert torch.allclose(torch.stack(parts).mean(0), whole, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(parts[0], whole, rtol=0.1)


def test_truncated_backpropagation_is_the_whole_gradient_of_the_last_steps_and_nothing_of_the_others(setting):
    """Its documented difference: exact where it goes, 0 before."""
    problem, chain, control = setting
    want = gradient_of(chain.cost(control, detached=2), control)
    have = gradients(problem, sc.RewardBackprop(gradient=2), control, K, repeats=24)
    agree(have, want)
    assert bool((have[:, : 2 * 4] == 0).all())  # the gains of the first two steps


# ---------------------------------------------------------------- pieces


def test_paths_to_learn_from_are_those_of_simulate():
    problem = random_lq(2, m=3, seed=1, start="controlled")
    chain = problem.chain(8)
    run = Run(problem, chain, 96, 1, 3)
    batch = run.batch()
    state = on_paths.path_state(run)
    stored = roll_out(problem, chain, state.control, batch.x0, batch.noise)
    paths = sc.simulate(problem, 96, state.control, time_steps=8, seed=batch.seed)
    ends = sc.simulate(problem, 96, state.control, time_steps=8, seed=batch.seed, keep="end")
    assert torch.equal(stored.states, paths.states)
    for get in (lambda p: p.log_ratio(), lambda p: p.kl(), lambda p: p.running_cost, lambda p: p.log_weights()):
        assert torch.equal(get(stored), get(paths))
        assert torch.allclose(get(stored), get(ends), atol=1e-13)
    reward = problem.reward(paths.samples)
    want = (reward - paths.running_cost) / problem.alpha - paths.log_ratio(per_step=True).sum(0)
    assert torch.allclose(stored.log_weights(), want, atol=1e-12)
    gained = reward / problem.alpha + stored.log_target().sum(0)
    assert torch.allclose(gained, (reward - paths.running_cost) / problem.alpha, atol=1e-12)
    assert bool((stored.log_target()[: chain.start] == 0).all()) and bool(
        (stored.log_target()[chain.start :] < 0).any()
    )
    other = sc.solve(problem, "reward-backprop", time_steps=8, iterations=2, batch_size=64, seed=0).control
    some = stored.under(other, [0, 3, 9])
    assert torch.allclose(some.log_ratio, paths.log_ratio(other, per_step=True)[[0, 3, 9]], atol=1e-12)
    assert torch.allclose(some.kl, stored.under(other).kl[[0, 3, 9]], atol=1e-12)
    assert torch.allclose(stored.under(other).log_ratio, paths.log_ratio(other, per_step=True), atol=1e-12)
    for keep in ("states", "end"):
        part = sc.simulate(problem, 96, state.control, time_steps=8, seed=batch.seed, keep=keep)
        assert torch.equal(part.log_target(), stored.log_target())
        assert torch.allclose(part.log_weights(other), stored.log_weights(other), atol=1e-12)
        assert torch.allclose(part.under(None, [2, 5]).kl, stored.kl(per_step=True)[[2, 5]], atol=1e-12)
    few = stored.rows(torch.arange(5))
    assert torch.equal(few.log_weights(), stored.log_weights()[:5])
    assert torch.allclose(few.log_weights(other), stored.log_weights(other)[:5], atol=1e-12)
    half = roll_out(problem, chain, other, batch.x0, batch.noise, until=4)
    assert bool((half.shifts[4:] == 0).all()) and bool((half.shifts[:4] != 0).any())


def test_paths_of_a_group_share_start_and_condition_but_not_noise():
    problem = sc.ControlProblem(
        sc.BrownianMotion(2, torch.eye(2, dtype=F64)),
        initial=sc.Gaussian(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)),
        reward=lambda x, y: x[:, 0] * y,
        condition=torch.arange(1.0, 65.0, dtype=F64),
    )
    run = Run(problem, problem.chain(3), 64, 1, 3)
    stored = on_paths.collect(on_paths.path_state(run, group_size=8), run, 0, 8)
    starts, y = stored.states[0].unflatten(0, (8, 8)), stored.condition.unflatten(0, (8, 8))
    assert bool((starts == starts[:, :1]).all()) and bool((y == y[:, :1]).all())
    assert len(set(y[:, 0].tolist())) > 1 and len(set(starts[:, 0, 0].tolist())) == 8
    assert len(set(stored.states[1, :, 0].tolist())) == 64
    assert torch.allclose(stored.reward, stored.states[-1][:, 0] * stored.condition)


def test_leave_one_out_is_the_difference_to_the_mean_of_the_others():
    values = randn(3, 8, seed=2)
    want = values.clone()
    for g in range(2):
        for i in range(4):
            others = [4 * g + j for j in range(4) if j != i]
            want[:, 4 * g + i] -= values[:, others].mean(1)
    assert torch.allclose(leave_one_out(values, 4), want, atol=1e-13)


@pytest.mark.parametrize("scheme", ["euler", "exact"])
@pytest.mark.parametrize("start", ["dirac", "controlled"])
def test_bridges_are_the_conditional_laws_of_the_chain(start, scheme):
    """Against the dense joint Gaussian of all states and noises of the chain, conditioned by the textbook formula."""
    problem = random_lq(2, m=2 if scheme == "exact" else 3, seed=3, start=start, running=False)
    chain = problem.chain(5, scheme)
    bridge, n = ChainBridge(chain), chain.noise_shape[0]
    size = chain.steps * n
    x0 = problem.draw_start(1, 0)
    unit = torch.cat((torch.zeros(1, size, dtype=F64), torch.eye(size, dtype=F64)))  # states are affine in all noises
    states = [x0.expand(size + 1, 2)]
    for k in range(chain.steps):
        mean, scale = chain.kernel(k, states[-1])
        xi = unit[:, k * n : (k + 1) * n]
        states.append(mean + (xi @ scale[0].mT if scale.ndim == 3 else scale * xi))
    base = torch.stack([x[0] for x in states])
    slopes = torch.stack([(x[1:] - x[0]).mT for x in states])  # (K+1, d, noises)
    end = randn(1, 2, seed=5)
    inverse = torch.linalg.inv(slopes[-1] @ slopes[-1].mT)
    for k in range(chain.steps):
        cross = slopes[k] @ slopes[-1].mT @ inverse
        mean = base[k] + cross @ (end[0] - base[-1])
        cov = slopes[k] @ slopes[k].mT - cross @ slopes[-1] @ slopes[k].mT
        zero = torch.zeros(chain.steps, 1, 2, dtype=F64)
        assert torch.allclose(bridge.between(x0, end, zero)[k, 0], mean, atol=1e-9)
        root = torch.stack([bridge.between(x0, end, zero + e)[k, 0] - mean for e in torch.eye(2, dtype=F64)], 1)
        assert torch.allclose(root @ root.mT, cov, atol=1e-9)
    # xi_k given x_k and x_K: regress on both
    x = randn(chain.steps, 1, 2, seed=6)
    target = bridge.noise_given_end(x, end)
    for k in range(1, chain.steps):
        both = torch.cat((slopes[k], slopes[-1]))
        pick = torch.zeros(n, size, dtype=F64)
        pick[:, k * n : (k + 1) * n] = torch.eye(n, dtype=F64)
        gain = pick @ both.mT @ torch.linalg.pinv(both @ both.mT, hermitian=True, rtol=1e-10)
        want = gain @ (torch.cat((x[k, 0], end[0])) - torch.cat((base[k], base[-1])))
        assert torch.allclose(target[k, 0], want, atol=1e-7)
