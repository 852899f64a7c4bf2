"""The trust-region ladder of the losses on paths: its targets, the gradient of a rung, its fixed point, and where it
goes that the plain loss does not."""

import copy
import math

import pytest
import torch
from cases import F64, linear, randn, random_lq
from gaussian_gradients import AffineControl, GaussianChain, agree, gradient_of, lq, perturbed, vanishes

import sdecontrol as sc
from sdecontrol.methods import on_paths
from sdecontrol.methods.base import Run
from sdecontrol.methods.ladder import Ladder
from sdecontrol.paths.weights import largest_exponent, self_normalised

K, REPLAY = 4, 3
LADDERS = {
    "log-variance": sc.LogVariance(trust_region=0.5, replay=REPLAY),
    "cross-entropy": sc.CrossEntropy(trust_region=0.5, replay=REPLAY),
    "trajectory balance": sc.PathConsistency(trust_region=0.5, replay=REPLAY),
}


class Steps:
    """A method's iterations one by one, their gradients in the place of a descent."""

    def __init__(self, problem, method, control, steps=K, batch=64, seed=11):
        self.run = Run(problem, problem.chain(steps), batch, 1, seed, copy.deepcopy(control))
        self.method, self.state, self.found = method, method.setup(self.run), []
        self.parameters = list(self.state.control.parameters())
        self.run.iteration = -1
        self.run.descend = self.keep

    def __call__(self):
        self.run.iteration += 1
        for p in self.state.parameters():
            p.grad = None
        metrics = self.method.step(self.state, self.run)
        return self.found[-1], metrics

    def keep(self, *_):
        self.found.append(torch.cat([p.grad.flatten().clone() for p in self.parameters]))
        return True

    def move_to(self, control):
        with torch.no_grad():
            for mine, other in zip(self.parameters, control.parameters()):
                mine.copy_(other)


# ---------------------------------------------------------------- the target


def linear_target():
    """A linear reward: every target of a ladder from the reference has kernels of the reference's covariance. And the
    exact KL of the whole target."""
    problem = linear(2)
    best = sc.exact_solution(problem, time_steps=K)
    control = AffineControl(
        torch.zeros(K, 2, 2, dtype=F64),
        torch.cat([best.control(torch.zeros(1, 2, dtype=F64), k / K) for k in range(K)]),
    )
    return problem, control, float(0.5 * control.offset.detach().square().sum() / K)


def test_a_rung_is_as_many_nats_high_as_is_stated():
    """With a linear reward ``(P^0)^{1-beta} Q^beta`` is beta times the optimal shifts, and its KL beta^2 that of all of
    them; with a bound above that the rung goes all the way."""
    problem, _, kl = linear_target()
    zero = AffineControl(torch.zeros(K, 2, 2, dtype=F64), torch.zeros(K, 2, dtype=F64))
    for bound in (0.02 * kl, 0.25 * kl, 4 * kl):
        steps = Steps(problem, sc.LogVariance(trust_region=bound, replay=4), zero, batch=4096)
        steps()
        assert steps.state.exponent == pytest.approx(min(1.0, (bound / kl) ** 0.5), rel=0.03)


def test_one_exponent_for_all_groups_has_the_mean_of_their_divergences():
    log_w = 3 * randn(64, seed=1) + 5 * randn(8, seed=2).repeat_interleave(8)
    beta = largest_exponent(log_w, 8, 0.3)
    shares = (beta * log_w).reshape(-1, 8).softmax(1)
    assert float((shares * (shares * 8).log()).sum(1).mean()) == pytest.approx(0.3, abs=1e-6)
    assert largest_exponent(log_w, None, 0.3) == pytest.approx(self_normalised(log_w, None, 0.3).exponent)
    assert largest_exponent(log_w, 8, 10.0) == 1.0


def test_all_paths_of_a_rung_are_of_the_control_at_its_foot_and_the_next_of_the_one_it_ends_at():
    problem, best, _ = linear_target()
    first, second = perturbed(best), perturbed(best, seed=9)
    steps = Steps(problem, sc.LogVariance(trust_region=0.02, replay=REPLAY), first)
    rung = 4 * REPLAY
    states, shifts = [], []
    for i in range(2 * rung):
        steps()
        states.append(steps.state.replay.states.clone())
        shifts.append(steps.state.replay.shifts[0].clone())
        if i == 2:
            steps.move_to(second)
    assert all(torch.equal(states[0], s) for s in states[:rung])
    assert all(torch.equal(states[rung], s) for s in states[rung:]) and not torch.equal(states[0], states[rung])
    x0 = problem.initial.mean
    for shift, control in ((shifts[0], first), (shifts[rung], second)):
        at = control(x0.expand(len(shift), 2), torch.zeros(len(shift), dtype=F64)) / K**0.5
        assert torch.allclose(shift, at, atol=1e-12)


def test_within_the_trust_region_of_the_target_every_batch_is_new_and_learned_from_once():
    """The plain loss from there on."""
    problem, best, _ = linear_target()
    near = perturbed(best, 0.02)
    ladder, plain = (Steps(problem, m, near) for m in (LADDERS["log-variance"], sc.LogVariance()))
    for _ in range(3):
        (have, metrics), (want, _) = ladder(), plain()
        assert metrics["exponent"] == 1.0
        assert torch.allclose(have, want, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- the gradient of a rung


@pytest.mark.parametrize("name", LADDERS)
def test_at_its_foot_a_rungs_gradient_is_the_tempered_one_of_the_plain_loss(name, monkeypatch):
    """On the same paths to rounding: beta times that of log-variance and of trajectory balance (with its log Z where it
    is), and the tempered cross-entropy."""
    problem = lq()
    control = perturbed(GaussianChain(problem, K).optimum())
    steps = Steps(problem, LADDERS[name], control)
    have, _ = steps()
    beta = steps.state.exponent
    assert 0.05 < beta < 0.95
    seen = steps.state.replay.again(steps.run, 0)  # the same draw
    monkeypatch.setattr(on_paths, "collect", lambda *_: seen)
    plain = {"log-variance": sc.LogVariance(), "trajectory balance": sc.PathConsistency()}
    if name in plain:
        want = beta * Steps(problem, plain[name], control)()[0]
    else:
        weights = self_normalised(beta * seen.log_weights()).weights
        log_ratios = seen.under(control).log_ratio.sum(0)
        want = gradient_of(((1 - weights) * log_ratios).mean(), control)
    assert torch.allclose(have, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LADDERS)
def test_on_its_way_up_a_rungs_gradient_is_that_of_the_stated_loss(name):
    """By automatic differentiation of the loss as it is defined, at a control that the paths are not of."""
    problem = lq()
    control = perturbed(GaussianChain(problem, K).optimum())
    steps = Steps(problem, LADDERS[name], control)
    steps()
    steps.move_to(perturbed(control, 0.3, seed=5))
    log_z = float(steps.state.log_z.level) if name == "trajectory balance" else 0.0
    have, _ = steps()
    paths, beta = steps.state.replay.again(steps.run, 0), steps.state.exponent
    moved = paths.log_ratio(steps.state.control.module) - paths.log_ratio()
    residual = moved - beta * paths.log_weights()
    if name == "log-variance":
        loss = 0.5 * residual.var()
    elif name == "trajectory balance":
        loss = 0.5 * (residual + beta * log_z).square().mean()
    else:  # KL(Q || P^u) up to a constant; the second term estimates log 1
        loss = moved.logsumexp(0) - (beta * paths.log_weights()).softmax(0) @ moved
    want = gradient_of(loss, steps.state.control)
    assert torch.allclose(have, want, rtol=1e-9, atol=1e-12)


def test_a_rung_of_cross_entropy_from_the_reference_is_a_forward_kl_at_a_higher_temperature():
    """``(Q0)^{1-beta} Q_fine^beta`` is the target at alpha/beta: the exact gradient at another control, off-policy."""
    problem = lq()
    zero = AffineControl(torch.zeros(K, 2, 2, dtype=F64), torch.zeros(K, 2, dtype=F64))
    method = sc.CrossEntropy(trust_region=0.2, replay=1)
    beta = 0.5
    other = perturbed(zero, 0.3)
    found = []
    for seed in range(12):
        steps = Steps(problem, method, zero, batch=8192, seed=seed)
        steps()
        steps.move_to(other)
        steps.state.replay.exponent.fill_(beta)
        found.append(steps()[0])
    chain = GaussianChain(problem.at_temperature(problem.alpha / beta), K)
    agree(torch.stack(found), gradient_of(chain.forward_kl(other), other), power=0.015)


@pytest.mark.parametrize("name", LADDERS)
def test_at_a_rungs_own_target_no_path_has_a_gradient(name):
    """Where mean shifts reach it (linear rewards) every path of the rung agrees: zero to rounding, without noise."""
    problem, best, _ = linear_target()
    zero = AffineControl(torch.zeros(K, 2, 2, dtype=F64), torch.zeros(K, 2, dtype=F64))
    steps = Steps(problem, LADDERS[name], zero)
    far, _ = steps()
    beta = steps.state.exponent
    steps.move_to(AffineControl(beta * best.gain, beta * best.offset))
    if name == "trajectory balance":  # its constant: log E w^beta of the rung over beta
        hot = sc.exact_solution(problem.at_temperature(problem.alpha / beta), time_steps=K)
        steps.state.log_z.level.fill_(hot.log_z / beta)
    have, _ = steps()
    assert float(have.norm()) < 1e-9 < 1e-3 < float(far.norm())


# ---------------------------------------------------------------- the fixed point


@pytest.mark.parametrize("name", ["log-variance", pytest.param("cross-entropy", marks=pytest.mark.slow)])
def test_at_the_best_mean_shift_control_a_rung_begins_with_no_gradient(name):
    """So the ladder stays there: its paths are then the control's own, and nothing moves the minimiser by O(h)."""
    problem = lq()
    chain = GaussianChain(problem, K)
    best = chain.optimum()
    off = AffineControl(1.02 * best.gain.detach(), 1.02 * best.offset.detach())
    method = type(LADDERS[name])(trust_region=0.5, replay=1)
    found = []
    for seed in range(16):
        steps = Steps(problem, method, best, batch=4096, seed=seed)
        found.append(steps()[0] / steps.state.exponent)
    vanishes(torch.stack(found), float(gradient_of(chain.cost(off), off).norm()))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LADDERS, "detailed balance"])
def test_a_ladder_ends_at_the_optimum(name):
    """As near to it as the plain loss ends in as many steps; and the exponent is 1 there."""
    problem = random_lq(2, seed=1, dtype=torch.float32)
    method = {**LADDERS, "detailed balance": sc.PathConsistency(n=1, trust_region=0.5, replay=REPLAY)}[name]
    solution = sc.solve(problem, method, time_steps=10, iterations=600, batch_size=256, seed=0)
    exact = sc.exact_solution(problem, like=solution)
    bound = 3e-2 if name == "detailed balance" else 3e-3
    assert sc.control_error(solution, exact, n=1024, seed=1).relative.value < bound
    assert solution.history[-1]["exponent"] == 1.0


# ---------------------------------------------------------------- far from the reference


@pytest.mark.slow
@pytest.mark.parametrize("name", ["log-variance", "cross-entropy", "plain"])
def test_a_ladder_comes_to_wells_that_are_lost_without(name):
    """Two equal wells in each of five coordinates, the reward of the reference's paths spread over hundreds of nats: a
    ladder keeps both of every coordinate; the plain loss, straight at the target, loses one of some, and more nats."""
    target = sc.library.named_target("many-well-5")
    problem = sc.gibbs_problem(target, target.dim, seed=0)
    method = {"log-variance": sc.LogVariance(trust_region=0.3, replay=4), "plain": sc.LogVariance()}.get(name)
    solution = sc.solve(
        problem,
        method or sc.CrossEntropy(trust_region=1.0, replay=2),
        time_steps=20,
        iterations=120 if name == "plain" else 300,  # as long: no paths twice
        batch_size=128,
        seed=0,
        anneal=False,
    )
    gap = target.log_z - solution.evaluate(2048, seed=1, confirm=False).elbo.value
    left = (solution.sample(4096, seed=2) < 0).double().mean(0)
    rarer = float(torch.minimum(left, 1 - left).min())
    assert (rarer < 0.15 and gap > 12) if name == "plain" else (rarer > 0.2 and gap < 9), (rarer, gap)


# ---------------------------------------------------------------- stored paths


def test_stored_groups_stay_together():
    problem = random_lq(2, seed=1, start="fixed")
    run = Run(problem, problem.chain(K), 64, 1, 3)
    method = sc.LogVariance(trust_region=0.5, replay=2)
    state = method.setup(run)
    method.step(state, run)
    paths = state.replay.again(run, 0)
    starts = paths.states[0].unflatten(0, (-1, 8))
    assert bool((starts == starts[:, :1]).all()) and len(starts[:, 0].unique(dim=0)) == 8


def test_replay_without_a_trust_region_keeps_the_last_batches():
    problem = random_lq(2, seed=1)
    run = Run(problem, problem.chain(K), 64, 1, 3)
    state = on_paths.path_state(run)
    replay = Ladder(run, 2, None)
    kept = []
    for i in range(3):
        run.iteration = i
        kept.append(on_paths.collect(state, run, 0))
        replay.add(kept[-1])
    assert replay.asks and not replay.far(kept)
    have = replay.draw(128, torch.Generator().manual_seed(0), problem).end.sum(1).sort().values
    assert torch.equal(have, torch.cat((kept[1].end, kept[2].end)).sum(1).sort().values)


def test_a_trust_region_that_does_nothing_or_leads_nowhere_is_refused():
    for make in (sc.LogVariance, sc.PathConsistency):
        with pytest.raises(ValueError, match="without replay"):
            make(trust_region=1.0)
    for make in (sc.LogVariance, sc.PathConsistency, sc.CrossEntropy):
        with pytest.raises(ValueError, match="current control"):
            make(trust_region=1.0, replay=2, paths="reference")
        with pytest.raises(ValueError, match="replay"):
            make(replay=-1)
        with pytest.raises(ValueError, match="trust_region"):
            make(trust_region=math.nan, replay=2)
    for paths in ("current", "reference"):  # without replay it tempers the weights of every batch: there is no ladder
        method = sc.CrossEntropy(trust_region=1.0, paths=paths)
        assert not method.rungs and method.same_paths == 1
