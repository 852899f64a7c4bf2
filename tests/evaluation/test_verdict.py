"""The verdict: what is missed is found by a second look, what is whole is confirmed, within the stated budget."""

import math

import pytest
import torch
from cases import F64, random_lq

import sdecontrol as sc
from sdecontrol.controls.mixture import MixtureControl
from sdecontrol.counting import Calls, counting
from sdecontrol.evaluation.evaluate import evaluate
from sdecontrol.evaluation.sample_agreement import bonferroni, shares_of
from sdecontrol.evaluation.second_look import SecondLook, Ways, look_again
from sdecontrol.evaluation.solution import Solution
from sdecontrol.evaluation.verdict import compared, missed_share
from sdecontrol.particles.smc import Particles

Estimate = type(sc.exact_solution(random_lq(1, seed=0), time_steps=2).evaluate(64, seed=0).log_z)


def density(weights, at=2.0, sd=0.5, d=2):
    """A mixture of two Gaussians, and the exact control towards components of it."""
    means = torch.zeros(2, d)
    means[:, 0] = torch.tensor([-at, at])
    law = sc.GaussianMixture(torch.tensor(weights), means, sd**2)
    problem = sc.gibbs_problem(law.log_prob, d, scale=2.0)

    def towards(kept):
        part = sc.GaussianMixture(torch.tensor(weights)[kept], means[kept] / 2.0, (sd / 2.0) ** 2)
        settings = {"time_steps": 10, "scheme": None}
        return Solution(problem, MixtureControl(problem, part), method="given", settings=settings)

    return towards


@pytest.mark.parametrize("weight", [0.5, 0.1])
def test_a_missing_mode_is_found_and_its_share_named(weight):
    towards = density([1 - weight, weight])
    whole, half = (towards(kept).evaluate(4096, seed=1) for kept in ([0, 1], [0]))
    assert whole.verdict == "confirmed" and whole.reliable and abs(whole.log_z.value) < 4 * whole.log_z.stderr
    assert half.verdict == "unreliable" and "mode may be missing" in half.reliability
    assert half.ess.value > 0.3 and half.pareto_k < 0.7  # its own paths show nothing
    said = float(half.reliability.split("about ")[1].split("%")[0]) / 100
    assert abs(said - weight) < 0.04


def test_the_share_beyond_has_mean_zero_and_an_error_that_is_not_too_small_where_nothing_is_missed():
    """40 repetitions on a whole target; false alarms 1 in 1e5 for the mean, and for the spread of a normal number."""
    towards = density([0.5, 0.5])([0, 1])
    problem, chain, control = towards.problem, towards.chain, towards.control
    z = []
    for seed in range(40):
        own = towards.simulate(1024, seed=1000 + seed).log_weights().double()
        found = missed_share(own, look_again(problem, chain, control, 2048, seed))
        assert found is not None and found.stderr > 0
        z.append(found.value / found.stderr)
    z = torch.tensor(z)
    assert abs(float(z.mean())) < 4.4 * float(z.std()) / math.sqrt(len(z))
    assert 0.25 < float(z.std()) < 1.5


def test_the_second_look_asks_for_no_more_rewards_and_control_calls_than_the_first():
    solution = density([0.5, 0.5])([0, 1])
    for n in (1024, 4096):
        alone, both = Calls(), Calls()
        with counting(alone):
            solution.evaluate(n, seed=0, confirm=False)
        with counting(both):
            solution.evaluate(n, seed=0)
        assert alone.reward_calls == n and alone.network_calls == 10 * n
        assert n / 2 < both.reward_calls - n <= n
        assert n < both.network_calls - alone.network_calls <= alone.network_calls


def test_without_a_second_look_nothing_is_confirmed():
    ev = density([0.5, 0.5])([0, 1]).evaluate(1024, seed=0, confirm=False)
    assert ev.verdict == "unconfirmed" and not ev.reliable and "asked for" in ev.reliability
    assert ev.as_dict()["reliable"] is False and ev.as_dict()["verdict"] == "unconfirmed"
    with pytest.raises(ValueError, match="confirm"):
        density([0.5, 0.5])([0, 1]).evaluate(1024, seed=0, confirm=3)


def test_a_control_worse_than_none_is_said_to_be_so():
    problem = random_lq(3, seed=2)
    wrong = evaluate(problem, lambda x, t: torch.full_like(x, 3.0), problem.chain(10), 4096, 0)
    assert "worse than no control" in wrong.reliability
    right = evaluate(problem, sc.exact_solution(problem, time_steps=10).control, problem.chain(10), 4096, 0)
    assert "worse" not in right.reliability


def test_running_costs_tell_particles_apart_where_the_references_paths_do_not_reach():
    """A narrow way along the whole horizon: paths of the reference leave it, resampled ones do not."""
    cost = lambda x, t: 40 * (x[:, 0] - torch.sin(6 * t)) ** 2  # noqa: E731
    sde = sc.SDE(lambda x, t: torch.zeros_like(x), torch.ones((), dtype=F64), dim=1)
    problem = sc.ControlProblem(sde, sc.Dirac(torch.zeros(1, dtype=F64)), running_cost=cost)
    exact = sc.exact_solution(problem, time_steps=40)
    found = evaluate(problem, exact.control, problem.chain(40), 4096, 0)
    assert found.verdict == "confirmed" and "particles of the reference" in found.reliability
    assert abs(found.log_z.value - float(exact.log_z)) < 4 * found.log_z.stderr + 1e-6


def test_paths_that_are_all_too_low_to_have_a_reward_do_not_reach():
    """A density far narrower than the reference: the rewards of its paths are all the same, the least there is, which
    is no evenness of weights."""
    problem = sc.gibbs_problem(lambda x: -0.5 * (x / 1e-5).square().sum(1), 2)
    problem = problem.located(torch.zeros(2), torch.tensor(1.0), 0.0)
    chain = problem.chain(4)
    rewards = sc.simulate(problem, 64, time_steps=4, seed=0).towards(problem).reward
    assert float(rewards.min()) == float(rewards.max())
    look = look_again(problem, chain, None, 4000, 0, ways=Ways(True, False, None))
    assert look.log_z is None and "do not reach the target" in look.why


def test_words_of_the_comparison():
    one = Estimate(0.0, 0.01)
    assert compared("", one, Estimate(0.02, 0.01), "others")[0] == "confirmed"
    assert compared("", one, Estimate(0.5, 0.01), "others")[0] == "unreliable"
    assert compared("", one, Estimate(-0.5, 0.01), "others")[0] == "unconfirmed"
    assert compared("", one, Estimate(-0.5, 0.0), "the exact log Z")[0] == "unreliable"
    assert compared("", one, Estimate(0.1, 0.5), "others")[0] == "unconfirmed"  # would not see a half
    assert compared("", one, Estimate(0.1, 0.25), "others", vague=0.03)[0] == "confirmed"
    assert missed_share(torch.zeros(100), SecondLook("nothing")) is None


def systems(shift, count=16, number=512, d=3, seed=0):
    """Systems of particles of a standard normal, each moved by ``shift`` of its own in the last coordinate."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, number, d, generator=generator, dtype=F64)
    x[..., -1] += shift * torch.randn(count, 1, generator=generator, dtype=F64)
    flat = torch.full((count, number), -math.log(number), dtype=F64)
    nothing = torch.zeros(count, number, dtype=F64)
    return Particles(x, flat, torch.zeros(count, dtype=F64), nothing, nothing, nothing, None, flat[0], flat[0])


def test_systems_that_disagree_in_a_coordinate_are_told_apart_and_it_is_named():
    name, effective = shares_of(systems(0.0)).worst()
    assert effective > 1000
    name, effective = shares_of(systems(0.8)).worst()
    assert effective < 100 and name.startswith("x[2]")


def test_atoms_and_coordinates_that_never_move_are_no_disagreement():
    """Tokens have no quantile with a tenth above the last of them."""
    found = systems(0.0)
    found.end[..., 0] = 2.0
    found.end[..., 1] = (found.end[..., 1] > 0).double()
    assert shares_of(found).worst()[1] > 1000


def test_samples_of_another_law_are_told_apart():
    shares = shares_of(systems(0.0))
    x = torch.randn(4096, 3, generator=torch.Generator().manual_seed(5), dtype=F64)
    same = shares.against(x, torch.zeros(4096, dtype=F64))
    assert same[2] < bonferroni(4.0, 9)
    x[:, 1] *= 1.5
    name, apart, sigmas = shares.against(x, torch.zeros(4096, dtype=F64))
    assert name.startswith("x[1]") and apart > 0.05 and sigmas > bonferroni(4.0, 9)
    assert bonferroni(4.0, 1) == pytest.approx(4.0) and bonferroni(4.0, 100) > 4.9
