"""Particle samplers: unbiased Z at every step size, resampling, twists, best of n, rejection, against closed forms."""

import itertools
import math

import pytest
import torch
from cases import F64, linear, mixture, randn, random_lq

import sdecontrol as sc
from sdecontrol.controls.guidance import GivenValue
from sdecontrol.evaluation.estimates import mean_estimate
from sdecontrol.particles.smc import RESAMPLING, ParticleSettings, Proposal, resample, run_particles

# few particles on purpose: the warning about it is tested where it is asked for
pytestmark = pytest.mark.filterwarnings("ignore:.*effective of:RuntimeWarning")

F32 = torch.float32
K = 6


def lq(**options):
    return random_lq(2, seed=1, **{"alpha": 1.5, **options})


def other(x, t):
    """A control that is not the optimal one."""
    return 0.4 - 0.3 * x


def wrong(x, t):
    """A twist that is not the value, and depends on time and state."""
    return 1.6 * torch.sin(2 * x[:, 0]) - 0.5 * t * x[:, 1] ** 2


def close(estimate, truth, most):
    """Within 4 standard errors, which are at most ``most``."""
    assert estimate.stderr < most, estimate
    assert abs(estimate.value - float(truth)) < 4 * estimate.stderr + 1e-9, (estimate, float(truth))


# ------------------------------------------------------------------------------------------------ the recursion


WAYS = {"none": (None, None), "proposal": (other, None), "twist": (None, wrong), "both": (other, wrong)}
SCHEMES = [(0.0, "systematic"), *((t, scheme) for t in (0.6, 1.0) for scheme in RESAMPLING)]


@pytest.mark.parametrize(
    ("way", "threshold", "scheme"),
    [
        pytest.param(way, *how, marks=() if way == "both" or how == (0.6, "systematic") else pytest.mark.slow)
        for way, how in itertools.product(WAYS, SCHEMES)
    ],
)
def test_z_is_unbiased_whatever_the_proposal_the_twist_and_the_resampling(scheme, threshold, way):
    """E Z^ = Z and E[Z^ sum_i W_i x_i] = Z E_p*[x_T]: a dropped increment, a normaliser left out at resampling, weights
    not reset after it, or a biased resampling shift one or the other by far more than four standard errors."""
    problem = lq()
    exact = sc.exact_solution(problem, time_steps=K)
    proposal, twist = WAYS[way]
    value = None if twist is None else GivenValue(twist, problem.alpha).at
    settings = ParticleSettings(8, ess_threshold=threshold, resampling=scheme)
    found = run_particles(problem, exact.chain, Proposal(proposal, value), 10_000, settings, 3)
    relative = (found.log_z - exact.log_z).exp()
    close(mean_estimate(relative), 1.0, 0.015)
    means = (relative.unsqueeze(1) * (found.log_weights.exp().unsqueeze(2) * found.end).sum(1)).T
    for mean, truth in zip(means, exact.marginal(1.0).mean):
        close(mean_estimate(mean), truth, 0.02)
    assert torch.allclose(found.log_weights.logsumexp(1), torch.zeros(10_000, dtype=F64), atol=1e-12)
    often = float(found.resampled.sum())
    assert (often == 0) if threshold == 0 else (often > 0.2) if twist is not None or proposal is not None else True


@pytest.mark.parametrize("start", ["fixed", "controlled"])
def test_starts_are_part_of_what_is_weighed(start):
    """A random start is tilted too: samples have the exact law, which no control of a fixed start reaches."""
    problem = lq(start=start)
    exact = sc.exact_solution(problem, time_steps=K)
    solution = sc.solve(problem, sc.SMC(64, twist=exact.value, proposal=exact), time_steps=K, seed=0)
    found = solution.run(300, seed=1)
    close(mean_estimate((found.log_z - exact.log_z).exp()), 1.0, 0.02)
    x = solution.sample(10_000, seed=2)
    law = exact.marginal(1.0) if start == "controlled" else None
    if law is not None:
        assert torch.allclose(x.mean(0), law.mean, atol=0.05)


def test_with_exact_proposal_and_twist_all_weights_are_constant():
    problem = linear()
    exact = sc.exact_solution(problem, time_steps=K)
    solution = sc.solve(
        problem, sc.SMC(16, proposal=exact, twist=exact.value, ess_threshold=0.999), time_steps=K, seed=0
    )
    found = solution.run(5, seed=1)
    assert torch.allclose(found.log_weights, torch.full((5, 16), -math.log(16), dtype=F64), atol=1e-10)
    assert torch.allclose(found.log_z, exact.log_z.expand(5), atol=1e-10)
    assert found.resampled.sum() == 0 and torch.allclose(found.ess, torch.ones(K, dtype=F64))


@pytest.mark.parametrize("scheme", RESAMPLING)
def test_resampling_copies_each_particle_in_proportion_to_its_weight(scheme):
    log_w = randn(1, 7, seed=0).expand(40_000, 7)
    index = resample(log_w, 5, scheme, torch.Generator().manual_seed(0))
    copies = torch.nn.functional.one_hot(index, 7).sum(1).double()
    want = 5 * log_w[0].softmax(0)
    stderr = copies.std(0) / 200
    assert (copies.mean(0) - want).abs().le(4 * stderr + 1e-12).all()
    if scheme == "systematic":
        assert (copies - want).abs().max() < 1
    variance = copies.var(0).sum()
    assert variance < {"systematic": 1.5, "stratified": 2.0, "multinomial": 5.0}[scheme]
    none = torch.tensor([[-torch.inf, 0.0, -torch.inf]], dtype=F64)
    assert (resample(none, 4, scheme, torch.Generator().manual_seed(0)) == 1).all()


def test_a_good_twist_and_resampling_lower_the_variance_of_z():
    problem = lq(alpha=0.1)
    exact = sc.exact_solution(problem, time_steps=20)

    def spread(**options):
        solution = sc.solve(problem, sc.SMC(64, **options), time_steps=20, seed=0)
        return float(solution.run(200, seed=1).log_z.std())

    plain = spread(ess_threshold=0.0)
    assert spread(twist=exact.value) < 0.5 * plain
    assert spread(twist=exact.value, proposal=exact) < 0.25 * plain


# ------------------------------------------------------------------------------------------------ solutions


@pytest.mark.parametrize(("particles", "independent"), [(32, False), (2, False), (32, True)])
def test_samples_have_the_exact_law_and_weights_the_exact_z(particles, independent):
    """With two particles to a system almost all of the weight is in the systems' Z^."""
    problem = lq()
    exact = sc.exact_solution(problem, time_steps=K)
    solution = sc.solve(problem, sc.SMC(particles, twist=wrong, independent=independent), time_steps=K, seed=0)
    n = 6010  # no multiple of 32
    x = solution.sample(n, seed=1)
    law = exact.marginal(1.0)
    stderr = 3 * law.variance.sqrt() / math.sqrt(n)  # samples of one system depend on one another
    bias = 0.02  # O(1/32) for one sample of every system
    assert x.shape == (n, 2) and ((x.mean(0) - law.mean).abs() < 4 * stderr + bias * independent).all()
    assert ((x.var(0) / law.variance - 1).abs() < 0.12).all()
    assert len(x[:50].unique(dim=0)) > 40  # and its first rows are like any others
    x, log_w = solution.weighted_sample(n, seed=2)
    relative = (log_w - exact.log_z).exp()
    if independent:
        close(mean_estimate(relative), 1.0, 0.02)
        close(mean_estimate(relative * x[:, 0]), law.mean[0], 0.03)
    else:
        assert abs(float(relative.mean()) - 1) < 0.05
        assert ((relative.unsqueeze(1) * x).mean(0) - law.mean).abs().max() < 0.08
    assert torch.equal(solution.sample(100, seed=1), solution.sample(100, seed=1))


@pytest.mark.slow
def test_any_n_weighted_samples_estimate_z_without_bias():
    """n = 1 of a system of 8, resampled at every step: slots of a system are not alike (the first alone has a mean
    weight of 1.37 Z here), so the one must be drawn fairly."""
    problem = lq()
    exact = sc.exact_solution(problem, time_steps=2)
    solution = sc.solve(problem, sc.SMC(8, twist=wrong, ess_threshold=1.0), time_steps=2, seed=0)
    found = torch.cat([solution.weighted_sample(1, seed=s)[1] for s in range(1500)])
    close(mean_estimate((found - exact.log_z).exp()), 1.0, 0.07)


def test_evaluation_of_particles():
    problem = lq(alpha=0.7)
    exact = sc.exact_solution(problem, time_steps=K)
    solution = sc.solve(problem, sc.SMC(64, proposal=exact, twist=exact.value), time_steps=K, seed=0)
    ev = solution.evaluate(16_384, seed=1)
    close(ev.log_z, exact.log_z, 0.01)
    assert math.isnan(ev.kl.value) and ev.exact and ev.reliable and "confirmed" in ev.reliability
    # the gap itself is >= 0 (here 0.003); its estimate with an error of 0.005 is within four of them
    assert ev.gap.value == pytest.approx(float(exact.log_z) - ev.elbo.value)
    assert ev.gap.stderr < 0.006 and -4 * ev.gap.stderr <= ev.gap.value < 0.003 + 4 * ev.gap.stderr
    assert ev.objective.value == pytest.approx(problem.alpha * ev.elbo.value) and ev.n == 16_384
    law = exact.marginal(1.0)
    G, g = problem.reward_function.G, problem.reward_function.g
    truth = g @ law.mean - 0.5 * law.mean @ G @ law.mean - 0.5 * (G * law.covariance_matrix).sum()
    close(ev.reward, truth, 0.02)
    str(ev), repr(solution), ev.as_dict()
    poor = sc.solve(lq(alpha=0.05), sc.SMC(4), time_steps=K, seed=0).evaluate(256, seed=1)
    assert not poor.reliable and "more particles" in poor.reliability


def test_any_method_can_be_the_proposal(tmp_path):
    problem = lq(dtype=F32)
    exact = sc.exact_solution(problem, time_steps=K)
    trained = sc.solve(problem, sc.SMC(32, proposal=sc.RewardBackprop()), time_steps=K, iterations=5, seed=0)
    alone = sc.solve(problem, sc.RewardBackprop(), time_steps=K, iterations=5, seed=0)
    assert trained.iterations == 5 and torch.equal(trained.simulate(64, seed=1).end, alone.simulate(64, seed=1).end)
    guided = sc.solve(problem, sc.SMC(32, sc.ValueGuidance(exact.value), twist="proposal"), time_steps=K, seed=0)
    assert float(guided.run(50, seed=1).log_z.std()) < 0.2
    learned = sc.solve(
        problem, sc.SMC(32, sc.ValueGuidance("soft-q"), twist="proposal"), time_steps=K, iterations=3, seed=0
    )
    later = sc.solve(problem, sc.SMC(32, proposal=alone, twist=wrong), time_steps=K, seed=0)
    path = sc.solve(problem, sc.SMC(8, proposal=sc.PathIntegralGuidance(num_paths=8)), time_steps=K, seed=0)
    given = {"guided": {"value": exact.value}, "later": {"value": wrong}}
    cases = {"trained": trained, "guided": guided, "learned": learned, "later": later, "path": path}
    for name, solution in cases.items():
        close(solution.evaluate(4096, seed=1).log_z, exact.log_z, 0.1)
        solution.save(tmp_path / name)
        again = sc.load(tmp_path / name, problem, **given.get(name, {}))
        assert type(again) is type(solution)
        assert torch.equal(solution.sample(100, seed=2), again.sample(100, seed=2)), name
        assert str(solution.evaluate(256, seed=1)) == str(again.evaluate(256, seed=1))


def test_a_run_whose_proposal_is_trained_resumes(tmp_path):
    problem = lq(dtype=F32)
    method = sc.SMC(8, proposal=sc.ValueGuidance("soft-q"))
    options = {"time_steps": K, "iterations": 6, "batch_size": 64, "seed": 0}
    whole = sc.solve(problem, method, **options)
    part = sc.solve(problem, method, **options, checkpoint_dir=tmp_path, checkpoint_every=2)
    resumed = sc.solve(problem, method, **options, checkpoint_dir=tmp_path, checkpoint_every=2, resume=True)
    assert torch.equal(resumed.sample(64, seed=1), whole.sample(64, seed=1)) and part.history == whole.history
    with pytest.raises(ValueError, match="method_settings"):
        sc.solve(problem, sc.SMC(9, proposal=method.proposal), **options, checkpoint_dir=tmp_path, resume=True)


def test_particles_of_a_mixture_with_a_tweedie_twist():
    """Over 12 seeds the mean of 6000 samples was off by 0.02 (standard deviation 0.02) with particles and by 0.146
    (0.008) without: 0.1 is more than four standard deviations from both."""
    problem = mixture()
    exact = sc.exact_solution(problem)
    solution = sc.solve(problem, sc.SMC(64, sc.ValueGuidance("tweedie"), twist="tweedie"), time_steps=50, seed=0)
    plain = sc.solve(problem, sc.ValueGuidance("tweedie"), time_steps=50, seed=0)
    truth = exact.marginal(1.0).mean
    assert abs(solution.sample(6000, seed=1).mean() - truth) < 0.1 < abs(plain.sample(6000, seed=1).mean() - truth)
    assert abs(solution.evaluate(8192, seed=1).log_z.value - float(exact.log_z)) < 0.1


def test_with_a_condition_every_sample_has_its_own_system():
    sde = sc.LinearSDE(A=-torch.eye(1, dtype=F64), sigma=torch.eye(1, dtype=F64))
    values = torch.tensor([-1.0, 1.0], dtype=F64)
    problem = sc.ControlProblem(
        sde, initial=sc.Dirac(torch.zeros(1, dtype=F64)), reward=lambda x, y: y * x[:, 0], condition=values
    )
    y = values.repeat(1000)
    one = sc.ControlProblem(sde, initial=problem.initial, reward=sc.Linear(torch.ones(1, dtype=F64)))
    truth = sc.exact_solution(one, time_steps=K).marginal(1.0).mean
    for method in (sc.SMC(16), sc.BestOfN(16, selection="softmax"), sc.BestOfN(8, "rejection", bound=4.0)):
        solution = sc.solve(problem, method, time_steps=K, seed=0)
        x = solution.sample(2000, seed=1, condition=y)[:, 0]
        assert abs(x[1::2].mean() - truth) < 0.1 and abs(x[::2].mean() + truth) < 0.1
        x, log_w = solution.weighted_sample(2000, seed=1, condition=y)
        assert abs((log_w[1::2].exp() * x[1::2, 0]).mean() / log_w[1::2].exp().mean() - truth) < 0.1
        assert solution.evaluate(256, seed=0).n >= 256


# ------------------------------------------------------------------------------------------------ best of n


def test_best_of_n_has_its_known_kl_and_law():
    """Brownian motion and a linear reward: R ~ N(0, 1), so the best of n is the largest of n normals."""
    problem = sc.ControlProblem(
        sc.BrownianMotion(1), initial=sc.Dirac(torch.zeros(1)), reward=sc.Linear(torch.ones(1)), alpha=1.0
    )
    n = 8
    solution = sc.solve(problem, sc.BestOfN(n), time_steps=2, seed=0)
    ev = solution.evaluate(65_536, seed=1)
    largest = randn(400_000, n, seed=0).max(1)[0]
    close(ev.reward, largest.mean(), 0.01)
    # KL of the largest: its density is n F^(n-1) times the reference's
    normal = torch.distributions.Normal(0.0, 1.0)
    kl = math.log(n) + (n - 1) * float(normal.cdf(largest).log().mean())
    assert ev.kl.value == pytest.approx(kl, abs=0.01) and ev.kl.stderr == 0
    assert ev.objective.value == pytest.approx(ev.reward.value - ev.kl.value, abs=1e-9)
    assert ev.elbo.value < 0.5 and ev.gap.value == pytest.approx(0.5 - ev.elbo.value, abs=1e-6)  # log Z = 1/2
    x = solution.sample(20_000, seed=2)[:, 0]
    assert abs(float(x.mean() - largest.mean())) < 4 * float(x.std()) / math.sqrt(20_000)
    x, log_w = solution.weighted_sample(20_004, seed=3)
    close(mean_estimate((log_w - 0.5).exp()), 1.0, 0.02)


def test_the_best_of_a_controls_paths_counts_the_controls_kl():
    problem = lq()
    exact = sc.exact_solution(problem, time_steps=K)
    one = sc.solve(problem, sc.BestOfN(1, proposal=exact), time_steps=K, seed=0).evaluate(4096, seed=1)
    plain = exact.evaluate(4096, seed=1)
    assert abs(one.kl.value - plain.kl.value) < 4 * math.hypot(one.kl.stderr, plain.kl.stderr)
    assert abs(one.elbo.value - plain.elbo.value) < 4 * math.hypot(one.elbo.stderr, plain.elbo.stderr)
    more = sc.solve(problem, sc.BestOfN(4, proposal=exact), time_steps=K, seed=0).evaluate(4096, seed=1)
    assert more.reward.value - more.running_cost.value > one.reward.value - one.running_cost.value
    assert more.elbo.value < float(exact.log_z)


def test_softmax_of_many_and_rejection_have_the_exact_law():
    problem = lq(alpha=0.7)
    exact = sc.exact_solution(problem, time_steps=K)
    law = exact.marginal(1.0)
    G, g = problem.reward_function.G, problem.reward_function.g
    bound = float(0.5 * g @ torch.linalg.solve(G, g)) + 1e-9  # the largest reward; the running cost is >= 0
    n = 3000
    rejection = sc.solve(problem, sc.BestOfN(4, "rejection", bound=bound), time_steps=K, seed=0)
    softmax = sc.solve(problem, sc.BestOfN(64, "softmax"), time_steps=K, seed=0)
    for solution, bias in ((rejection, 0.0), (softmax, 0.02)):
        x = solution.sample(n, seed=1)
        assert ((x.mean(0) - law.mean).abs() < 4 * law.variance.sqrt() / math.sqrt(n) + bias).all()
        error = (x.T.cov() - law.covariance_matrix).abs()
        assert (error < 4 * 1.5 * law.variance.max() / math.sqrt(n) + bias).all()
    ev = rejection.evaluate(4096, seed=2)
    assert ev.gap.value == 0 and ev.elbo.value == float(exact.log_z)
    close(softmax.evaluate(8192, seed=2).log_z, exact.log_z, 0.03)
    few = sc.solve(problem, sc.BestOfN(2, "softmax"), time_steps=K, seed=0).evaluate(4096, seed=1)
    assert few.gap.value > 0.05  # E log Z^ of two candidates is far below log Z, and says so


def test_rejection_takes_the_bound_in_units_of_the_reward():
    """R/alpha - bound would accept some candidates with a probability above 1."""
    eye = torch.eye(1)
    start = sc.Dirac(torch.zeros(1))
    peak = sc.ControlProblem(sc.BrownianMotion(1), initial=start, reward=lambda x: 1 - x[:, 0] ** 2, alpha=0.3)
    same = sc.ControlProblem(sc.BrownianMotion(1), initial=start, reward=sc.Quadratic(2 * eye), alpha=0.3)
    x = sc.solve(peak, sc.BestOfN(4, "rejection", bound=1.0), time_steps=1, seed=0).sample(4000, seed=0)
    truth = sc.exact_solution(same, time_steps=1).marginal(1.0).variance
    assert abs(float(x.var() / truth) - 1) < 4 * math.sqrt(2 / 4000)


def test_rejection_says_when_its_bound_is_none_or_hopeless(monkeypatch):
    from sdecontrol.evaluation import particle_solution as weighted

    problem = lq()
    with pytest.raises(ValueError, match=r"bound=-5 is none: a path has the total reward"):
        sc.solve(problem, sc.BestOfN(4, "rejection", bound=-5.0), time_steps=K, seed=0).sample(100, seed=0)
    monkeypatch.setattr(weighted, "ROUNDS", 3)
    with pytest.raises(RuntimeError, match=r"not found \d+ of 5 samples in \d+ candidates"):
        sc.solve(problem, sc.BestOfN(4, "rejection", bound=500.0), time_steps=K, seed=0).sample(5, seed=0)


@pytest.mark.parametrize("selection", ["best", "softmax", "rejection"])
def test_best_of_n_is_saved_and_loads_to_the_same_numbers(tmp_path, selection):
    problem = lq(dtype=F32)
    bound = 3.0 if selection == "rejection" else None
    solution = sc.solve(problem, sc.BestOfN(16, selection, bound=bound), time_steps=K, seed=0)
    solution.save(tmp_path)
    again = sc.load(tmp_path, problem)
    assert torch.equal(solution.sample(30, seed=1), again.sample(30, seed=1))
    assert str(solution.evaluate(256, seed=1)) == str(again.evaluate(256, seed=1))
    assert solution.control(torch.zeros(3, 2), 0.5).abs().max() == 0 and solution.initial is problem.initial


def test_few_effective_particles_warn_with_their_number_and_bad_settings_are_refused():
    problem = lq(alpha=0.01)
    for method in (sc.SMC(64, ess_threshold=0.0), sc.BestOfN(64, "softmax")):
        with pytest.warns(RuntimeWarning, match=r"only \d+\.\d effective of 64 particles"):
            sc.solve(problem, method, time_steps=K, seed=0).sample(10, seed=0)
    with pytest.raises(ValueError, match="num_particles must be"):
        sc.SMC(0)
    with pytest.raises(ValueError, match="ess_threshold must be"):
        sc.SMC(ess_threshold=1.5)
    with pytest.raises(ValueError, match="did you mean 'systematic'"):
        sc.SMC(resampling="sistematic")
    with pytest.raises(ValueError, match="unknown twist"):
        sc.SMC(twist="value")
    with pytest.raises(ValueError, match="this proposal has none"):
        sc.solve(problem, sc.SMC(twist="proposal"), time_steps=K)
    with pytest.raises(ValueError, match="needs a denoiser"):
        sc.solve(problem, sc.SMC(twist="tweedie"), time_steps=K)
    with pytest.raises(ValueError, match="bound"):
        sc.BestOfN(4, "rejection")
    with pytest.raises(ValueError, match="iterations: smc trains nothing"):
        sc.solve(problem, sc.SMC(), time_steps=K, iterations=3)
    with pytest.raises(ValueError, match="n must be an int >= 64"):
        sc.solve(problem, sc.SMC(), time_steps=K).evaluate(10)
