"""When a run without a number of iterations ends: a decision with an error rate, on scores of known law."""

import math

import pytest
import torch

import sdecontrol as sc
from sdecontrol.methods.base import metrics_of
from sdecontrol.training.schedule import Gain, LearningRateSchedule, Score

F64 = torch.float64
STUDENT_99 = 2.681  # one-sided, 12 degrees of freedom


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def scores(gap, noise=0.0, seed=0, residual=None, spread=0.0):
    """Of iterations whose gap is a function of their number, an array of them."""
    i = torch.arange(1, 2001, dtype=F64)
    values = 5 - gap(i) + noise * normal(2000, seed=seed)
    residuals = torch.full_like(values, math.nan) if residual is None else residual(i)
    return [Score(10 * v, v, r, spread) for v, r in zip(values.tolist(), residuals.tolist())]


def ended(found, most=2000, same_paths=1):
    """At what iteration the decay begins, and the last one."""
    schedule = LearningRateSchedule(most, adaptive=True, same_paths=same_paths)
    for i in range(most):
        schedule.observe(i, found[: i + 1])
        if schedule.decay_from is not None:
            return schedule.decay_from, schedule.last
    raise AssertionError("never")


@pytest.mark.parametrize("length", [50, 240], ids=["blocks of three", "blocks of fifteen"])
def test_a_gain_over_its_error_is_students_t(length):
    """Of 3000 series about a line: quantiles of the ratio, so that 99 % of the bounds hold."""
    series = normal(3000, length, seed=1) + 0.02 * torch.arange(length)
    true = 0.02 * (length // 2)
    gains = [Gain.of(row) for row in series]
    ratios = torch.tensor([(g.value - true) / g.stderr for g in gains])
    assert float(ratios.mean()) == pytest.approx(0, abs=0.08)
    assert float(ratios.square().mean()) == pytest.approx(12 / 10, abs=0.12)  # 2.681 of a normal would be 0.4 %
    for sign in (1, -1):
        assert 0.004 < float((sign * ratios > STUDENT_99).double().mean()) < 0.016


def test_what_neighbouring_iterations_share_is_seen():
    """Autoregressive noise of which 60 % are its neighbour's: the error is that of their means, twice the naive one."""
    series = normal(800, 240, seed=1)
    for i in range(1, 240):
        series[:, i] = 0.6 * series[:, i - 1] + 0.8 * series[:, i]
    gains = [Gain.of(row) for row in series]
    errors = torch.tensor([g.value for g in gains])
    assert math.sqrt(sum(g.stderr**2 for g in gains) / 800) == pytest.approx(float(errors.std()), rel=0.12)
    assert sum(g.at_most < 0 for g in gains) == 0
    assert sum(g.value + STUDENT_99 * g.stderr < 0 for g in gains) < 0.025 * 800


def test_a_run_whose_gap_falls_like_one_over_its_length_ends_where_a_quarter_gains_a_tenth():
    """Between the quarters it gains ``c/n (4 log 3/2 - 4 log 4/3) = 0.471 c/n``."""
    begin, last = ended(scores(lambda i: 100 / i))
    assert 471 <= begin <= 1.25 * 471 and last == begin + begin // 2


def test_a_short_run_ends_where_a_hundred_iterations_gain_a_tenth():
    """Quarters of 25 iterations that differ by 0.471 c/n gain four times that in a hundred: c = 30 is 0.1 at 237."""
    begin, _ = ended(scores(lambda i: 30 / i))
    assert 237 <= begin <= 1.2 * 237


@pytest.mark.parametrize("looked_at, rate", [(100, 0.00105), (400, 0.00105), (800, 0.000525)])
def test_a_gain_of_a_tenth_that_lasts_is_rarely_taken_for_less(looked_at, rate):
    """A step of work gains 0.105 nats: of 300 runs with one look few end at it, whatever the noise."""
    early = 0
    for seed in range(300):
        found = scores(lambda i: -rate * i, noise=0.002 * looked_at**0.5, seed=seed)[:looked_at]
        schedule = LearningRateSchedule(2000, adaptive=True)
        schedule.observe(looked_at - 1, found)
        early += schedule.decay_from is not None
    assert early <= 9  # 1 % are expected


def test_no_gain_ends_a_run_as_soon_as_its_noise_allows():
    """With noise of s an iteration 99 % say so of a tenth where 2.681 s (8/n)^(1/2) <= 0.1 n/400 or so."""
    assert [ended(scores(lambda i: 0 * i, noise=noise))[0] <= most for noise, most in ((0.01, 110), (0.3, 900))] == [
        True,
        True,
    ]
    assert ended(scores(lambda i: 0 * i, noise=3.0))[0] == 1400  # of a tenth of a nat nothing can be said: as many


def test_what_is_worth_it_goes_with_the_spread_of_the_weights():
    """Noise of 3 nats in means of 256 paths: log-weights of sd 48, of which a twentieth is worth a step of work."""
    flat = scores(lambda i: 0 * i, noise=3.0, spread=48.0)
    assert ended(flat)[0] <= 400
    steady = scores(lambda i: -0.05 * i, noise=3.0, spread=48.0)
    assert ended(steady)[0] == 1400  # 5 nats in a hundred iterations
    wild = [Score(*s[:3], spread=1e6 if i % 3 == 0 else 0.0) for i, s in enumerate(scores(lambda i: 100 / i))]
    assert ended(wild) == ended(scores(lambda i: 100 / i))
    assert ended([Score(*s[:3], spread=math.nan) for s in wild]) == ended(wild)  # batches of one path


def test_the_less_noisy_estimate_decides():
    """The objective, of the same mean as the mean log-weight, is too noisy to say anything."""
    gap, rough = (lambda i: 3 / i), normal(2000, seed=3).tolist()
    found = [Score(s.elbo + 3 * r, s.elbo) for s, r in zip(scores(gap, 0.01), rough)]
    assert ended(found)[0] <= 300
    assert ended([Score(s.objective) for s in found])[0] == 1400
    assert ended([Score(s.elbo, s.objective) for s in found])[0] <= 300


def test_a_residual_that_goes_on_halving_is_no_end():
    """As on linear-quadratic chains, where the objective is there long before the control."""
    falls = ended(scores(lambda i: 0.01 / i, residual=lambda i: (0.05 * i).clamp(max=0.05 * 300)))
    assert 300 < falls[0] < 600
    assert ended(scores(lambda i: 0.01 / i, residual=lambda i: 0 * i))[0] == 100


@pytest.mark.parametrize(
    ("value", "stderr", "at", "ends"),
    [
        (0.02, 0.02, 100, True),
        (0.12, 0.001, 100, False),  # a gain
        (-0.12, 0.001, 100, False),  # new particles that are not those learned from
        (0.02, 0.04, 100, False),  # nothing is sure
        (0.02, 0.001, 99, False),
        (0.09, 0.001, 100, True),
        (0.09, 0.001, 800, False),  # of half a step of work
        (0.04, 0.001, 800, True),
    ],
)
def test_what_a_method_measures_itself_ends_a_run(value, stderr, at, ends):
    """A hundred iterations of a gain; scores that would end a run say nothing then. A step of work after 800 is 200."""
    schedule = LearningRateSchedule(2000, adaptive=True, measured=True)
    flat = scores(lambda i: 0 * i)
    for i in range(at + 50):
        known = Gain(value, stderr) if i == at else Gain(1.0, 0.01) if i == at - 100 else None
        schedule.observe(i, flat[: i + 1], known)
    assert schedule.decay_from == (at + 1 if ends else None)
    assert schedule.last == (at + 1 + max(50, (at + 1) // 2) if ends else 2000)
    again = LearningRateSchedule(2000, adaptive=True, measured=True)
    again.restore(schedule.state())
    assert again.state() == schedule.state() and schedule.state()["measured_at"] == at


def test_iterations_of_the_same_paths_count_once():
    """Scores that are repeated twenty times: within a block of few iterations there is no noise."""

    def ends(same_paths):
        each = [scores(lambda i: -0.04 * i, noise=0.1, seed=seed)[:100] for seed in range(30)]  # 0.2 in a hundred
        return [ended([s for s in e for _ in range(20)], same_paths=same_paths)[0] for e in each]

    assert sum(end < 1400 for end in ends(1)) >= 6  # what would go wrong
    assert sum(end < 1400 for end in ends(20)) <= 1
    flat = [s for s in scores(lambda i: 0 * i, noise=0.01) for _ in range(20)]
    assert ended(flat, same_paths=20)[0] == 640


def test_methods_say_how_many_iterations_see_the_same_paths():
    assert sc.LogVariance().same_paths == sc.LogVariance(replay=4).same_paths == sc.AdjointMatching().same_paths == 1
    assert sc.LogVariance(replay=3, trust_region=1.0).same_paths == 12
    assert sc.AdjointMatching(reciprocal=True, refresh=7).same_paths == 7


def test_iterations_that_say_nothing_of_the_objective_are_judged_by_their_loss():
    nothing = [Score(math.nan, math.nan, s.residual) for s in scores(lambda i: i, residual=lambda i: 0.1 * i)]
    assert ended(nothing)[0] == 1400
    flat = [Score(math.nan, math.nan, 0.01 * v) for v in normal(2000).tolist()]
    assert ended(flat)[0] <= 400


def test_a_number_of_iterations_is_kept_and_a_budget_is_not_cut_short():
    flat = scores(lambda i: 0 * i)
    fixed = LearningRateSchedule(500, adaptive=False)
    timed = LearningRateSchedule(10**7, adaptive=False)
    timed.decay_from = None
    for i in range(500):
        for schedule in (fixed, timed):
            schedule.observe(i, flat[: i + 1])
    assert (fixed.decay_from, fixed.last) == (125, 500)
    assert (timed.decay_from, timed.last) == (None, 10**7)


FIRST = "reward-backprop"
MEASURED = {
    FIRST: sc.RewardBackprop(),
    "adjoint": sc.RewardBackprop(gradient="adjoint"),
    "two steps": sc.RewardBackprop(gradient=2),
    "soft-ppo": sc.SoftPPO(),
    "adjoint-matching": sc.AdjointMatching(),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == FIRST else pytest.mark.slow) for n in MEASURED])
def test_the_mean_log_weight_is_the_objective_in_nats_without_its_noise(name):
    start = sc.Dirac(torch.zeros(2))
    problem = sc.ControlProblem(sc.BrownianMotion(dim=2), start, reward=lambda x: x.sum(1), alpha=0.5)
    options = {"iterations": 200, "time_steps": 4, "seed": 0, "batch_size": 64, "progress": False}
    last = sc.solve(problem, MEASURED[name], **options).history[-1]
    error = math.hypot(last["elbo_stderr"], last["objective_stderr"] / 0.5)
    assert abs(last["elbo"] - last["objective"] / 0.5) < 4 * error
    if name != "two steps":  # that gradient is not there yet
        assert last["elbo_stderr"] < 0.3 * last["objective_stderr"] / 0.5


@pytest.mark.parametrize("backward_control", [True, False])
def test_the_mean_log_weight_of_annealed_langevin_is_its_objective(backward_control):
    """There a reverse law is a part of the reward, and the control may be a part of that."""
    problem = sc.gibbs_problem(
        lambda x: -((x - 1) ** 2).sum(1), dim=2, reference="annealed", backward_control=backward_control
    )
    options = {"iterations": 30, "time_steps": 6, "seed": 0, "anneal": False, "progress": False}
    found = sc.solve(problem, sc.RewardBackprop(), **options).history[3:]
    assert min(m["kl"] for m in found) > 0
    differences = torch.tensor([m["elbo"] - m["objective"] for m in found])
    assert abs(float(differences.mean())) < 4 * float(differences.std()) / 27**0.5


def test_metrics_without_log_ratios_have_no_mean_log_weight():
    assert "elbo" not in metrics_of(*(torch.ones(4) for _ in range(3)), 1.0)
