"""Soft PPO: ratios, clipping, its epochs, and the readings of Algorithm 1 that are wrong."""

from dataclasses import replace

import pytest
import torch
from cases import F64, random_lq
from gaussian_gradients import GaussianChain, agree, gradient_of, gradients, lq, perturbed

import sdecontrol as sc
from sdecontrol.methods.base import Run
from sdecontrol.methods.on_paths import collect

K = 4


def first_batch(method, problem, control, K=K, batch=256):
    run = Run(problem, problem.chain(K), batch, 1, 3, control)
    state = method.setup(run)
    return state, run, method.advantages(state, run, collect(state, run, 0, method.group_size))


@pytest.mark.parametrize("start", ["dirac", "controlled"])
def test_ratios_of_the_unchanged_control_are_one(start):
    problem = random_lq(2, m=3, seed=1, start=start)
    control = sc.solve(problem, "reward-backprop", time_steps=8, iterations=3, batch_size=64, seed=0).control
    state, run, _ = first_batch(sc.SoftPPO(), problem, None, 8)
    state.control.load_state_dict(control.state_dict())
    batch = sc.SoftPPO().advantages(state, run, collect(state, run, 0))
    _, ratios = sc.SoftPPO().surrogate(state, batch)
    assert float((ratios - 1).abs().max()) < 1e-12
    solution = sc.solve(problem, sc.SoftPPO(epochs=1), time_steps=8, iterations=3, batch_size=64, seed=0)
    assert all(m["clip_fraction"] == 0 and m["ratio_std"] < 1e-12 for m in solution.history)


def test_ratios_are_those_of_the_densities_summed_over_dimensions():
    """Against torch's Gaussian densities of the states themselves."""
    problem = lq()
    chain = problem.chain(K)
    best = GaussianChain(problem, K).optimum()
    state, _, batch = first_batch(sc.SoftPPO(), problem, perturbed(best, 0.2))
    old = [p.detach().clone() for p in state.control.parameters()]
    new = perturbed(best, 0.4, seed=20)
    densities = []
    for module in (new, None):
        with torch.no_grad():
            for p, q in zip(state.control.parameters(), new.parameters() if module else old):
                p.copy_(q)
        if module is not None:
            _, ratios = sc.SoftPPO().surrogate(state, batch)
        rows = []
        for k in range(K):
            x, y = batch.paths.states[k], batch.paths.states[k + 1]
            mean, scale = chain.kernel(k, x)
            with torch.no_grad():
                c = chain.shift_at(k, x, state.control(x, torch.full((len(x),), k / K, dtype=F64)))
            law = torch.distributions.MultivariateNormal(mean + c @ scale[0].mT, scale[0] @ scale[0].mT)
            rows.append(law.log_prob(y))
        densities.append(torch.stack(rows))
    assert torch.allclose(ratios, (densities[0] - densities[1]).exp(), rtol=1e-9)


def test_what_is_clipped_has_no_gradient_and_the_rest_the_plain_one():
    """``max`` for a cost: nothing is gained by going on where a cheap step became likelier than 1 + clip, or a dear one
    rarer than 1 - clip; going back is free. With ``min`` it would be the other way round."""
    problem = lq()
    best = GaussianChain(problem, K).optimum()
    method = sc.SoftPPO(clip=0.1, baseline="per-time")
    state, _, batch = first_batch(method, problem, perturbed(best, 0.2))
    with torch.no_grad():
        for p, q in zip(state.control.parameters(), perturbed(best, 0.6, seed=20).parameters()):
            p.copy_(q)
    loss, ratios = method.surrogate(state, batch)
    loss.backward()
    have = [p.grad.clone() for p in state.control.parameters()]
    A = batch.advantages
    stopped = ((A < 0) & (ratios > 1.1)) | ((A > 0) & (ratios < 0.9))
    assert 0.1 < float(stopped.double().mean()) < 0.9
    for p in state.control.parameters():
        p.grad = None
    laws = batch.paths.under(state.control)
    log_ratios, kls = laws.log_ratio, laws.kl
    ((torch.where(stopped, 0.0, A * ratios).detach() * log_ratios + kls).sum(0).mean()).backward()
    assert all(torch.allclose(a, p.grad, atol=1e-12) for a, p in zip(have, state.control.parameters()))


class OwnKL(sc.SoftPPO):
    """The print's cost: the reward and the step's own KL."""

    def advantages(self, state, run, paths):
        batch = super().advantages(state, run, paths)
        cost = paths.kl(per_step=True) - paths.reward / run.problem.alpha
        return replace(batch, advantages=cost - cost.mean(1, keepdim=True))


class NoDirectKL(sc.SoftPPO):
    """All KLs in the cost, the own one too, and no direct derivative."""

    def surrogate(self, state, batch, steps=None):
        loss, ratios = super().surrogate(state, batch, steps)
        return loss - batch.paths.under(state.control).kl.sum(0).mean(), ratios


@pytest.mark.parametrize("wrong", [OwnKL, NoDirectKL])
def test_wrong_readings_of_the_algorithm_do_not_have_the_objectives_gradient(wrong):
    problem = lq()
    chain = GaussianChain(problem, K)
    control = perturbed(chain.optimum(), 0.5)
    want = gradient_of(chain.cost(control), control)
    have = gradients(problem, wrong(baseline="per-time", epochs=1), control, K, repeats=10, batch=8192)
    with pytest.raises(AssertionError, match=r"times the exact|an entry"):
        agree(have, want, power=0.05)


def test_the_cost_still_to_come_is_that_of_the_definition():
    """Step by step, with running costs and a controlled start, as ``-R_k/alpha`` plus the log-ratios of later steps."""
    problem = random_lq(2, seed=1, start="controlled")
    chain = problem.chain(8)
    run = Run(problem, chain, 64, 1, 3)
    state = sc.SoftPPO().setup(run)
    batch = sc.SoftPPO().advantages(state, run, collect(state, run, 0))
    x = batch.paths.states
    for k in range(chain.steps):
        want = -problem.reward(x[-1]) / problem.alpha + batch.log_ratios[k + 1 :].sum(0)
        for j in range(max(k + 1, chain.start), chain.steps):
            want = want + chain.step_sizes[j] * problem.running_cost(x[j], chain.times[j]) / problem.alpha
        assert torch.allclose(batch.to_come[k], want, atol=1e-12)


def test_several_epochs_change_the_ratios_and_minibatches_see_every_path():
    problem = random_lq(2, seed=1)
    options = {"time_steps": 6, "iterations": 4, "batch_size": 96, "seed": 0, "learning_rate": 0.05}
    solution = sc.solve(problem, sc.SoftPPO(epochs=3, minibatches=3, clip=0.02), **options)
    assert all(m["ratio_std"] > 1e-3 for m in solution.history[:-1])  # the last step of a run has size 0
    assert any(m["clip_fraction"] > 0.05 for m in solution.history)
    method, run = sc.SoftPPO(minibatches=3), Run(problem, problem.chain(6), 96, 1, 0)
    parts = method.order(run, 0, 0)
    assert sorted(torch.cat(parts).tolist()) == list(range(96))
    assert method.order(run, 1, 0)[0].tolist() != parts[0].tolist()


@pytest.mark.parametrize("baseline", ["batch", "per-time"])
def test_group_normalised_advantages_keep_the_optimum(baseline):
    """GRPO: starts and conditions are shared within groups, and a group's whole loss is scaled, KL and all."""
    problem = lq(start="fixed")
    method = sc.SoftPPO(baseline=baseline, group_size=8)
    chain = GaussianChain(problem, K)
    _, _, batch = first_batch(method, problem, chain.optimum(), batch=64)
    advantages = batch.advantages
    x0 = batch.paths.states[0].unflatten(0, (-1, 8))
    assert bool((x0 == x0[:, :1]).all()) and not torch.equal(x0[0], x0[1])
    costs = -batch.paths.log_weights().unflatten(0, (-1, 8))
    scale = batch.scale.unflatten(0, (-1, 8))[:, 0]
    assert torch.allclose(scale, 1 / costs.std(1))
    state, _, batch = first_batch(method, problem, perturbed(chain.optimum(), 0.2), batch=64)
    with torch.no_grad():
        for p, q in zip(state.control.parameters(), perturbed(chain.optimum(), 0.3).parameters()):
            p.copy_(q)
    groups = [batch.rows(torch.arange(8 * g, 8 * g + 8)) for g in range(8)]
    alone = [method.surrogate(state, replace(g, scale=torch.ones(8, dtype=F64)))[0] * g.scale[0] for g in groups]
    assert torch.allclose(method.surrogate(state, batch)[0], torch.stack(alone).mean(), rtol=1e-12)
    if baseline == "per-time":
        assert torch.allclose(advantages.unflatten(1, (-1, 8)).mean(2), torch.zeros(K, 8, dtype=F64), atol=1e-12)


def test_no_gradient_of_the_reward_is_asked_for():
    calls = []

    def reward(x):
        calls.append(torch.is_grad_enabled() and x.requires_grad)
        return torch.as_tensor((x.detach() > 0.5).double().sum(1))

    problem = sc.ControlProblem(
        sc.BrownianMotion(2, torch.eye(2, dtype=F64)),
        initial=sc.Dirac(torch.zeros(2, dtype=F64)),
        reward=reward,
        alpha=0.5,
    )
    calls.clear()
    before = sc.simulate(problem, 2048, time_steps=10, seed=9).samples
    solution = sc.solve(problem, sc.SoftPPO(), time_steps=10, iterations=40, batch_size=128, seed=0)
    assert float(reward(solution.sample(2048, seed=9)).mean()) > float(reward(before).mean()) + 0.3
    assert not any(calls)
