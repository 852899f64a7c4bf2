"""Bounds of log Z from both sides, and the alarm: against closed forms, and on samplers that have collapsed."""

import math
import re

import pytest
import torch
from cases import F64, randn, random_lq, slow_but

import sdecontrol as sc
from sdecontrol.chains.bridges import ChainBridge
from sdecontrol.evaluation.estimates import bridge_log_z
from sdecontrol.evaluation.solution import Solution

MODES = torch.cartesian_prod(torch.tensor([-5.0, 0.0, 5.0]), torch.tensor([-5.0, 0.0, 5.0])).double()
VARIANCE = 0.3


def nine_modes(x):
    square = -0.5 * torch.cdist(x, MODES.to(x)).square() / VARIANCE
    return square.logsumexp(1) - math.log(9 * 2 * math.pi * VARIANCE)


def nine_samples(n, seed):
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(9, (n,), generator=generator)
    return MODES[which] + math.sqrt(VARIANCE) * torch.randn(n, 2, generator=generator, dtype=F64)


def gibbs(reference="ou"):
    return sc.gibbs_problem(nine_modes, 2, reference=reference, centre=torch.zeros(2, dtype=F64), scale=4.5)


def sampler_of(problem, mean, variance, time_steps=60):
    """The exact control towards ``N(mean, variance)`` as a solution of ``problem``."""
    law = problem.terminal_law
    precision = torch.diag(1 / law.variance)
    towards = sc.Quadratic(torch.eye(2, dtype=F64) / variance - precision, mean / variance - precision @ law.mean)
    easier = sc.ControlProblem(problem.reference, problem.initial, towards, alpha=1.0, start=problem.start)
    exact = sc.exact_solution(easier, time_steps=time_steps)
    settings = {"time_steps": time_steps, "scheme": None}
    from sdecontrol.controls.given import given_control

    return Solution(problem, given_control(problem, exact), method="exact", settings=settings, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("reference", slow_but(["ou", "brownian"], "ou"))
def test_a_sampler_on_one_of_nine_modes_is_off_by_log_nine_and_found_out(reference):
    """The fingerprint of collapse: log Z^ is log 9 = 2.197 too low with a reverse ESS of 0.7 and more; the alarm fires
    from exact samples and from particles."""
    problem = gibbs(reference)
    collapsed = sampler_of(problem, MODES[8], VARIANCE)
    found = sc.certify(collapsed, nine_samples(4096, 1), modes=MODES, seed=2)
    assert abs(found.log_z.value + math.log(9)) < 0.05 and found.reverse_ess.value > 0.6
    assert found.collapsed and found.forward_ess.value < 0.01
    assert int((found.coverage > 0.01).sum()) == 1 and "8 of 9 modes" in str(found)
    assert found.elbo.value < found.log_z_two_sided.value < found.eubo.value
    blind = sc.certify(collapsed, seed=2)
    assert blind.collapsed and blind.source == "tempered particles"


def test_a_collapsed_sampler_raises_three_alarms_that_say_how_much_is_missed():
    """One of nine equal modes: 8/9 of the target is missed, by log Z from both sides and by the modes' shares."""
    collapsed = sampler_of(gibbs(), MODES[8], VARIANCE, time_steps=30)
    low, few, missed = sc.certify(collapsed, nine_samples(4096, 1), modes=MODES, seed=2).alarms
    for text in (low, missed):
        assert abs(int(re.search(r"(\d+)%", text)[1]) - 100 * 8 / 9) < 2
    assert "its reverse ESS" in low and "forward ESS" in few and "8 of 9 modes" in missed


def test_a_good_sampler_raises_no_alarm_and_its_bounds_hold():
    """On a Gaussian target: ELBO <= log Z <= EUBO with gaps that are the two KLs, and both effective sizes agree."""
    law = torch.distributions.MultivariateNormal(torch.tensor([0.5, -1.0], dtype=F64), 0.4 * torch.eye(2, dtype=F64))
    problem = sc.gibbs_problem(
        lambda x: law.log_prob(x.double()).to(x) + 1.5, 2, centre=torch.zeros(2, dtype=F64), scale=1.5
    )
    good = sampler_of(problem, law.mean, 0.4)
    found = sc.certify(good, law.sample((4096,)), seed=1)
    assert not found.collapsed, str(found)
    assert found.elbo.value - 4 * found.elbo.stderr < 1.5 < found.eubo.value + 4 * found.eubo.stderr
    assert abs(found.log_z_two_sided.value - 1.5) < 4 * found.log_z_two_sided.stderr + 1e-9
    assert found.log_z_two_sided.stderr < 0.01
    assert abs(found.forward_ess.value - found.reverse_ess.value) < 0.05


def test_paths_to_exact_ends_have_the_law_of_the_exact_chain():
    """Whole paths of the reference given draws of the exact chain's end are paths of the exact chain (Theorem 3): their
    moments at every step, within five standard errors. Noises that ignore the end, or its covariance, miss them."""
    problem = random_lq(2, 3, seed=1, start="fixed", running=False, alpha=1.0)
    plain = sc.ControlProblem(problem.reference, problem.initial, alpha=1.0)
    chain = plain.chain(6)
    bridge = ChainBridge(chain)
    n, target = 40_000, sc.exact_solution(plain, time_steps=6)
    end = target.sample(n, seed=1)  # of the reference itself: then the paths are the reference's
    start = bridge.start_given_end(plain.initial, end, randn(n, 2, seed=2))
    states = bridge.path_given_end(start, end, randn(6, n, 3, seed=3))
    for k in range(7):
        law = target.marginal(k / 6)
        standard = torch.linalg.solve(torch.linalg.cholesky(law.covariance_matrix), (states[k] - law.mean).T).T
        assert float(standard.mean(0).abs().max()) < 5 / math.sqrt(n)
        assert float((standard.T @ standard / n - torch.eye(2, dtype=F64)).abs().max()) < 5 * math.sqrt(2 / n)
    pairs = torch.cat((states[2], states[3]), 1)
    mean, scale = chain.kernel(2, states[2])
    rest = states[3] - mean
    assert float((rest.T @ states[2] / n).abs().max()) < 5 * float(scale.abs().max() * pairs.std()) / math.sqrt(n)


def test_the_bridge_estimate_is_exact_for_gaussian_weights():
    """log w ~ N(-s^2/2, s^2) on one side and N(s^2/2, s^2) on the other: log Z = 0 for different numbers of both; the
    stated error covers it in 95 of 100 repetitions or so."""
    inside = 0
    for seed in range(100):
        s = 1.5
        a, b = s * randn(400, seed=seed) - s * s / 2, s * randn(900, seed=1000 + seed) + s * s / 2
        found = bridge_log_z(a, b)
        inside += abs(found.value) < 1.96 * found.stderr
    assert 86 <= inside <= 100
    assert abs(bridge_log_z(a + 7.0, b + 7.0).value - found.value - 7.0) < 1e-9


def test_bad_input():
    problem = gibbs()
    solution = sampler_of(problem, MODES[4], VARIANCE)
    with pytest.raises(ValueError, match="at least 64 draws"):
        sc.certify(solution, torch.zeros(100, 3))
    with pytest.raises(ValueError, match="n must be an int >= 64"):
        sc.certify(solution, n=3)
