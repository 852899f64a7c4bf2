"""Chains: kernels that keep their law, diagnostics against closed forms, log Z from a bridge, and what is refused."""

import math
import sys

import numpy as np
import pytest
import torch
from cases import F64, Counted, randn, slow_but, spd
from scipy.signal import lfilter

import sdecontrol as sc
from sdecontrol.evaluation.estimates import bridge_log_z, chain_mean, mean_estimate
from sdecontrol.particles.diagnostics import bulk_ess, chain_ess, split_rhat
from sdecontrol.particles.markov import WarmChains, run_chains, warm_up_chains
from sdecontrol.particles.tempering import StateTarget


def close(estimate, truth, most):
    """Within 4 standard errors, which are at most ``most``."""
    assert estimate.stderr < most, estimate
    assert abs(estimate.value - float(truth)) < 4 * estimate.stderr + 1e-9, (estimate, float(truth))


def gaussian(dim=5, log_z=1.7):
    """A correlated Gaussian, its log Z given: problem, mean, covariance."""
    mean, cov = randn(dim, seed=1), spd(dim, 2)
    law = torch.distributions.MultivariateNormal(mean, cov)
    problem = sc.gibbs_problem(lambda x: law.log_prob(x) + log_z, dim, scale=torch.full((dim,), 2.5, dtype=F64))
    return problem, mean, cov


def curved(x):
    """A banana: x0 ~ N(0, 1), x1 - x0^2/2 ~ N(0, 0.5); log Z = 0."""
    return -0.5 * x[:, 0] ** 2 - (x[:, 1] - x[:, 0] ** 2 / 2) ** 2 - 0.5 * math.log(2 * math.pi**2)


# ---------------------------------------------------------------- diagnostics


def autoregressive(rho, chains, draws, seed=0):
    """``x_t = rho x_{t-1} + sqrt(1 - rho^2) xi_t``, each of variance one, ``(chains, draws)``."""
    noise = randn(draws, chains, seed=seed).mT.numpy()
    scaled = np.concatenate([noise[:, :1], math.sqrt(1 - rho**2) * noise[:, 1:]], 1)
    return torch.from_numpy(lfilter([1.0], [1.0, -rho], scaled))


@pytest.mark.parametrize("rho", [-0.4, 0.0, 0.5, 0.9])
def test_effective_draws_of_an_autoregressive_chain(rho):
    """ESS = S (1 - rho)/(1 + rho), more than S for chains that swing; the error of the mean is sd/sqrt(ESS)."""
    x = autoregressive(rho, 8, 20_000)
    wanted = x.numel() * (1 - rho) / (1 + rho)
    for found in (chain_ess(x), bulk_ess(x), bulk_ess(x.exp())):  # ranks do not feel a monotone map
        assert abs(float(found) / wanted - 1) < 0.1
    errors = [chain_mean(autoregressive(rho, 4, 500, seed)) for seed in range(300)]
    scores = torch.tensor([e.value / e.stderr for e in errors])
    assert 0.85 < float(scores.std()) < 1.15


def test_rhat_is_one_where_chains_agree_and_large_where_they_differ():
    """In position, in scale (the folded ranks), in time (the split), and for Cauchy draws without moments."""
    x = randn(4, 1000, seed=3)
    assert float(split_rhat(x)) < 1.01 and float(split_rhat(torch.tan(1.5 * x.erf()))) < 1.01
    offset, scale = torch.zeros(4, 1, dtype=F64), torch.ones(4, 1, dtype=F64)
    offset[0], scale[1] = 2.0, 5.0
    assert float(split_rhat(x + offset)) > 1.2 and float(split_rhat(x * scale)) > 1.1
    assert float(split_rhat(x + torch.linspace(-1, 1, 1000, dtype=F64))) > 1.1
    assert float(split_rhat(torch.ones(4, 100))) == math.inf and float(bulk_ess(torch.ones(4, 100))) == 0
    both = torch.stack((x, x + offset), 2)
    assert torch.equal(split_rhat(both), torch.cat((split_rhat(x), split_rhat(x + offset))))


def test_rhat_and_ess_are_those_of_the_paper_by_hand():
    """The formulas of 1903.08008, written out for small chains with ties."""
    from scipy.stats import norm, rankdata

    x = torch.randint(0, 6, (3, 11), generator=torch.Generator().manual_seed(0)).double().cumsum(1) % 7
    halves = torch.cat((x[:, :5], x[:, -5:]))

    def scores(v):
        return torch.from_numpy(norm.ppf((rankdata(v.numpy()).reshape(v.shape) - 0.375) / (v.numel() + 0.25)))

    def rhat(v):
        n, within = v.shape[1], v.var(1).mean()
        return math.sqrt(float(((n - 1) / n * within + v.mean(1).var()) / within))

    folded = (halves - halves.flatten().median()).abs()
    assert abs(float(split_rhat(x)) - max(rhat(scores(halves)), rhat(scores(folded)))) < 1e-12
    y = autoregressive(0.6, 3, 24)
    halves = torch.cat((y[:, :12], y[:, 12:]))
    n, centred = 12, halves - halves.mean(1, keepdim=True)
    within = halves.var(1).mean()
    total = (n - 1) / n * within + halves.mean(1).var()
    lags = [float(1 - (within - (centred[:, t:] * centred[:, : n - t]).sum(1).mean() / n) / total) for t in range(n)]
    pairs, tau = [1 + lags[1], *(lags[t] + lags[t + 1] for t in range(2, n, 2))], -1.0
    for k, pair in enumerate(pairs):
        if pair <= 0:
            break
        tau += 2 * min(pairs[: k + 1])
    assert abs(float(chain_ess(y)) - 72 / tau) < 1e-9 and tau > 1.5


# ---------------------------------------------------------------- the kernels


@pytest.mark.parametrize("moves", [40, 60])
def test_where_the_law_is_the_kernels_gaussian_a_move_of_the_warm_up_is_one_quarter_turn(moves):
    """Nothing is to be adapted: every step, from the first on, is accepted, and as long as it may be."""
    target = StateTarget(lambda x: -0.5 * x.square().sum(1), torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))
    warm, evaluations = warm_up_chains(target, 64, moves, 0)
    assert evaluations == 64 * (1 + moves) and float(warm.step_size) == math.pi / 2 and int(warm.leapfrog_steps) == 1


@pytest.mark.parametrize("leapfrog_steps", [1, 3])
def test_moves_keep_a_law_that_is_no_gaussian(leapfrog_steps):
    """Chains from exact draws of a banana have its moments after moves with a badly fitted Gaussian and steps so large
    that a third and more are rejected. Without rejections, or with a wrong energy, all of these are off by tens of
    standard errors."""
    n = 40_000
    x = randn(n, 2, seed=1)
    start = torch.stack((x[:, 0], (x[:, 0] ** 2) / 2 + 0.5**0.5 * x[:, 1]), 1)
    target = StateTarget(curved, torch.tensor([0.3, 0.5], dtype=F64), torch.tensor([1.5, 2.0], dtype=F64))
    number = lambda v: torch.tensor(v, dtype=F64)  # noqa: E731
    warm = WarmChains(
        (start - target.centre) / target.scale,
        number(1.5),
        randn(2, seed=4) / 4,
        torch.linalg.cholesky(spd(2, 5)),
        torch.tensor(leapfrog_steps),
        torch.tensor(3),
    )
    found = run_chains(target, warm, 2, 7)
    assert 0.1 < found.accepted < 0.7 and float((found.z[:, -1] - warm.states).abs().mean()) > 0.1
    end = target.states(found.z[:, -1])
    across = 2**0.5 * (end[:, 1] - end[:, 0] ** 2 / 2)
    for value, truth in ((end[:, 0], 0), (end[:, 0] ** 2, 1), (across, 0), (across**2, 1), (across * end[:, 0], 0)):
        close(mean_estimate(value), truth, 0.02)
    assert torch.allclose(found.log_density[:, -1], curved(end) + target.scale.log().sum(), atol=1e-10)
    assert found.evaluations == n * (1 + 2 * 3 * leapfrog_steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(sc.MALA(64, 200), id="mala", marks=pytest.mark.slow),
        pytest.param(sc.HMC(64, 200, leapfrog_steps=3), id="hmc"),
    ],
)
def test_moments_and_log_z_of_a_correlated_gaussian(method):
    problem, mean, cov = gaussian()
    solution = sc.solve(problem, method, seed=0)
    found = solution.run(200, 1)
    x = solution.target.states(found.z)
    for i in range(5):
        close(chain_mean(x[..., i]), mean[i], 0.06)
        close(chain_mean((x[..., i] - mean[i]) ** 2), cov[i, i], 0.2)
    close(chain_mean((x[..., 0] - mean[0]) * (x[..., 1] - mean[1])), cov[0, 1], 0.1)
    evaluation = solution.evaluate(4096, seed=2)
    close(evaluation.log_z, 1.7, 0.02)
    assert evaluation.reliable and evaluation.ess.value > 0.2, evaluation
    truth = 1.7 + sc.Gaussian(mean, cov).log_prob(x) - problem.terminal_law.log_prob(x)
    close(evaluation.reward - chain_mean(truth), 0.0, 0.1)
    assert all(math.isnan(v.value) for v in (evaluation.kl, evaluation.elbo, evaluation.gap))
    assert "by bridge sampling" in str(evaluation)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(sc.MALA(128, 300), id="mala"),
        pytest.param(sc.HMC(128, 300, leapfrog_steps=5), id="hmc", marks=pytest.mark.slow),
    ],
)
def test_a_banana_in_single_precision(method):
    problem = sc.gibbs_problem(curved, 2, seed=0)
    solution = sc.solve(problem, method, seed=1)
    found = solution.run(80, 1)
    x = solution.target.states(found.z)
    assert x.dtype == torch.float32 and solution.sample(10, seed=0).dtype == torch.float32
    across = 2**0.5 * (x[..., 1] - x[..., 0] ** 2 / 2)
    for value, truth in ((x[..., 0], 0), (x[..., 0] ** 2, 1), (x[..., 1], 0.5), (across**2, 1)):
        close(chain_mean(value), truth, 0.06)
    close(solution.evaluate(seed=3).log_z, 0.0, 0.05)


def test_chains_in_separate_modes_are_found_out():
    """gmm9: no chain leaves its mode often enough; R-hat says so, by coordinate and number, and the log density alone
    would not."""
    target = sc.library.named_target("gmm9")
    solution = sc.solve(sc.gibbs_problem(target, 2, seed=0), sc.MALA(64, warm_up=200, thin=2), seed=0)
    facts = solution.diagnostics(seed=1)
    assert facts.worst_rhat[0].startswith("x[") and facts.worst_rhat[1] > 1.2
    assert float(facts.rhat[2]) < 1.05 and facts.names[2] == "log density"
    evaluation = solution.evaluate(seed=1)
    assert not evaluation.reliable and "R-hat of x[" in evaluation.reliability
    table = str(facts)
    assert "bulk ESS" in table and "64 chains of 64 draws" in table


def test_a_chain_far_out_comes_home():
    """The quartic wells of many-well-5 at 5 deviations: log densities of -1e4 and worse at the start, none after the
    warm-up."""
    target = sc.library.named_target("many-well-5")
    problem = sc.gibbs_problem(target, 5, scale=2.0)
    solution = sc.solve(problem, sc.MALA(256, warm_up=200, thin=1), seed=0)
    begun = 4 * torch.randn(1000, 5)
    assert float(target(begun).min()) < -1e4
    # 5 wells of curvature 32: log density about 5 log 2 - 5/2 at the truth
    assert float(target(solution.target.states(solution.warm.states)).min()) > -25


# ---------------------------------------------------------------- log Z


def test_the_error_of_a_bridge_counts_autocorrelation():
    """log Z of a Gaussian from slow chains: the standard error is that of repetitions, not that of as many independent
    draws."""
    proposal = torch.distributions.Normal(torch.tensor(1.5, dtype=F64), 1.0)
    truth = torch.distributions.Normal(torch.tensor(0.0, dtype=F64), 1.0)
    ratio = lambda x: truth.log_prob(x) + 3.0 - proposal.log_prob(x)  # noqa: E731
    found, naive = [], []
    for seed in range(150):
        x = autoregressive(0.9, 4, 500, seed)
        reverse = ratio(1.5 + randn(2000, seed=seed + 1000))
        found.append(bridge_log_z(reverse, ratio(x)))
        if seed < 20:
            naive.append(bridge_log_z(reverse, ratio(x).flatten()).stderr)
    values, errors = torch.tensor([e.value for e in found]), torch.tensor([e.stderr for e in found])
    assert 0.8 < float(values.std() / errors.mean()) < 1.2 and float(errors.mean()) > 1.4 * sum(naive) / len(naive)
    close(mean_estimate(values), 3.0, 0.01)
    some = torch.cat((reverse, torch.full((3,), -math.inf, dtype=F64)))  # where the target vanishes
    assert math.isfinite(bridge_log_z(some, ratio(x)).value)


@pytest.mark.slow
def test_log_z_of_a_box():
    """A density that vanishes outside: -inf at some starts and at some of the mixture's draws."""
    problem = sc.gibbs_problem(
        lambda x: torch.where((x.abs() < 1).all(1), 0.2 * x.sum(1), -math.inf), 2, scale=1.0, dtype=F64
    )
    solution = sc.solve(problem, sc.MALA(64), seed=0)
    close(solution.evaluate(8192, seed=1).log_z, 2 * math.log(10 * math.sinh(0.2)), 0.05)
    assert bool((solution.sample(1000, seed=2).abs() < 1).all())


@pytest.mark.slow
def test_log_z_of_a_posterior_agrees_with_tempered_particles():
    target = sc.library.named_target("logistic-regression")
    problem = sc.gibbs_problem(target, target.dim, seed=0)
    other = sc.solve(problem, sc.TemperedSMC(), seed=0).evaluate(32768, seed=1).log_z
    for method in (sc.MALA(), sc.HMC()):
        found = sc.solve(problem, method, seed=0).evaluate(8192, seed=1)
        assert found.reliable and found.log_z.stderr < 0.02
        assert abs(found.log_z.value - other.value) < 4 * math.hypot(found.log_z.stderr, other.stderr)


@pytest.mark.slow
def test_a_funnel_is_reported_for_what_it_is():
    """Its neck is not reached: log Z is too low, by more than its error, and the evaluation says not reliable."""
    problem = sc.gibbs_problem(sc.library.named_target("funnel"), 10, seed=0)
    for method in (sc.MALA(), sc.HMC()):
        found = sc.solve(problem, method, seed=0).evaluate(seed=1)
        assert not found.reliable and "R-hat" in found.reliability and -3 < found.log_z.value < 0.1


# ---------------------------------------------------------------- seeds, files, counts


def nuts(*args, **more):
    pytest.importorskip("pyro")
    return sc.NUTS(*args, **more)


def made(name):
    return {"mala": lambda: sc.MALA(32, 40), "hmc": lambda: sc.HMC(32, 40), "nuts": lambda: nuts(2, 25)}[name]()


@pytest.mark.parametrize("name", slow_but(["mala", "hmc", "nuts"], "hmc"))
def test_seeds_files_and_counts(name, tmp_path):
    """The same seed gives the same bits, from a file too; every row of the density is counted; torch's global generator
    is left alone."""
    density = Counted(curved)
    problem = sc.gibbs_problem(density, 2, scale=1.5, dtype=F64).settle()
    method = made(name)
    began, state = density.rows, torch.random.get_rng_state()
    solution = sc.solve(problem, method, seed=3)
    assert solution.evaluations == density.rows - began > method.num_chains * method.warm_up
    x = solution.sample(50, seed=1)
    evaluation = solution.evaluate(128, seed=1)
    assert solution.evaluations == density.rows - began
    x_again, log_w = solution.weighted_sample(50, seed=1)
    assert torch.equal(x, x_again) and bool((log_w == log_w[0]).all()) and abs(float(log_w[0])) < 0.7
    assert solution.evaluations == density.rows - began
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(x, sc.solve(problem, method, seed=3).sample(50, seed=1))
    assert not torch.equal(x, solution.sample(50, seed=2)) and x.shape == (50, 2) and x.dtype == F64
    solution.save(tmp_path / "run")
    loaded = sc.load(tmp_path / "run", problem)
    assert loaded.evaluations == 0  # no warm-up again
    assert loaded.chains == solution.chains and torch.equal(x, loaded.sample(50, seed=1))
    assert str(loaded.evaluate(128, seed=1)) == str(evaluation) and loaded.method == name
    assert repr(loaded) == repr(solution) and f"{method.num_chains} chains" in repr(loaded)


@pytest.mark.slow
def test_no_u_turn_chains_have_the_moments_of_a_gaussian():
    problem, mean, cov = gaussian(3)
    solution = sc.solve(problem, nuts(4, 150), seed=0)
    found = solution.run(200, 1)
    x = solution.target.states(found.z)
    for i in range(3):
        close(chain_mean(x[..., i]), mean[i], 0.2)
        close(chain_mean((x[..., i] - mean[i]) ** 2), cov[i, i], 0.5)
    assert torch.allclose(
        found.log_density, problem.density(x.flatten(0, 1)).reshape(4, 200) + solution.target.scale.log().sum()
    )
    assert split_rhat(x).max() < 1.05


@pytest.mark.slow
def test_no_u_turn_chains_keep_the_law_of_a_banana():
    solution = sc.solve(sc.gibbs_problem(curved, 2, seed=0), nuts(4, 200), seed=0)
    evaluation = solution.evaluate(2000, seed=1)
    close(evaluation.log_z, 0.0, 0.1)
    x = solution.target.states(solution.run(500, 2).z)
    close(chain_mean(x[..., 1]), 0.5, 0.2)
    close(chain_mean(2 * (x[..., 1] - x[..., 0] ** 2 / 2) ** 2), 1.0, 0.2)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("method", [sc.MALA, sc.HMC, sc.NUTS])
def test_what_is_refused(method, monkeypatch):
    linear = sc.ControlProblem(sc.BrownianMotion(1), sc.Dirac(torch.zeros(1)), sc.Quadratic(torch.eye(1)))
    with pytest.raises(ValueError, match=r"gibbs_problem.*TemperedSMC"):
        sc.solve(linear, method())
    flat = sc.gibbs_problem(lambda x: -x.detach().abs().sum(1), 2, scale=1.0)
    with pytest.raises(sc.NotDifferentiable, match=r"has none.*\(auto, log-variance, .*TemperedSMC.*Crank-Nicolson"):
        sc.solve(flat, method())
    conditional = sc.gibbs_problem(lambda x, y: -((x - y) ** 2).sum(1), 1, scale=1.0, condition=torch.zeros(5, 1))
    with pytest.raises(ValueError, match="condition: chains need one target"):
        sc.solve(conditional, method())
    for name, bad in (("num_chains", 1), ("warm_up", 3), ("thin", 0), ("width", -1.0)):
        with pytest.raises(ValueError, match=name):
            method(**{name: bad})
    with pytest.raises(ValueError, match="leapfrog_steps"):
        sc.HMC(leapfrog_steps=0)
    with pytest.raises(ValueError, match="max_tree_depth"):
        sc.NUTS(max_tree_depth=0)
    good = sc.gibbs_problem(curved, 2, scale=1.0)
    if method is sc.NUTS:
        monkeypatch.setitem(sys.modules, "pyro.infer.mcmc", None)
        with pytest.raises(ModuleNotFoundError, match=r"sdecontrol\[mcmc\]"):
            sc.solve(good, method())
        return
    with pytest.raises(ValueError, match="trains nothing"):
        sc.solve(good, method(), iterations=3)
    solution = sc.solve(good, method(8, 20), seed=0)
    with pytest.raises(ValueError, match="n must be an int >= 64"):
        solution.evaluate(10)
    with pytest.raises(ValueError, match="condition"):
        solution.sample(3, condition=torch.zeros(1))


def test_densities_that_fail():
    """-inf at all starts, and a NaN that only chains meet."""
    problem = sc.gibbs_problem(lambda x: -0.5 * x.square().sum(1), 2, scale=1.0).settle()
    target = problem.density.user
    target.function = lambda x: torch.where(x[:, 0] > 1e9, x.sum(1), -math.inf)
    with pytest.raises(sc.NonFiniteError, match="-inf at all 256"):
        sc.solve(problem, sc.MALA(), seed=0)
    target.function = lambda x: torch.where(x[:, 0] > 1, math.nan, -0.5 * x.square().sum(1))
    with pytest.raises(sc.NonFiniteError, match=r"nan or \+inf in \d+ of"):
        sc.solve(problem, sc.HMC(), seed=0)
