"""Annealing of the temperature: how it falls, that it ends at the problem's own, and what it is
good for."""

import dataclasses
import math

import pytest
import torch
from cases import SmallControl, random_lq

import sdecontrol as sc
from sdecontrol.training.annealing import Annealing
from sdecontrol.training.schedule import LearningRateSchedule

QUICK = {"time_steps": 8, "batch_size": 64, "seed": 3, "progress": False}


def steep():
    """A reward that spreads over hundreds of nats under the reference."""
    problem = random_lq(2, seed=1, dtype=torch.float32)
    return sc.ControlProblem(
        problem.reference,
        problem.initial,
        reward=lambda x: 300 * torch.tanh(x).sum(1),
        alpha=0.5,
        running_cost=lambda x, t: x.square().sum(1),
    )


@dataclasses.dataclass(frozen=True)
class Spy(sc.Reinforce):
    """Notes the problem that every iteration is given."""

    seen: list = dataclasses.field(default_factory=list)

    def step(self, state, run):
        self.seen.append(run.problem)
        return super().step(state, run)


def temperatures(solution):
    return [h["temperature"] for h in solution.history if "temperature" in h]


def test_the_target_moves_by_the_same_distance_every_time():
    """Between neighbours ``beta R/alpha`` has a standard deviation of 0.3: half its square in nats."""
    annealing = Annealing(True)
    annealing.observe(spread=50.0, part=0.0)
    assert annealing.beta == pytest.approx(0.3 / 50)
    before = annealing.beta
    annealing.observe(spread=20.0, part=0.0)
    assert (annealing.beta - before) * 20.0 == pytest.approx(0.3)


def test_a_mild_reward_is_taken_whole_after_one_iteration():
    annealing = Annealing(True)
    annealing.observe(0.2, 0.0)
    assert annealing.beta == 1.0 and not annealing.active and annealing.iterations == 1


@pytest.mark.parametrize("spread", [1e3, 1e9, math.inf])
def test_annealing_ends_with_the_first_quarter_whatever_the_spread(spread):
    annealing, betas = Annealing(True), []
    for i in range(400):
        if annealing.active:
            annealing.observe(spread, (i + 1) / 400)
        betas.append(annealing.beta)
    assert betas == sorted(betas) and betas[99] == 1.0
    assert math.isinf(spread) or betas[90] < 1.0


def test_an_unknown_spread_takes_the_reward_whole():
    """Paths that are not the control's own say nothing of it."""
    annealing = Annealing(True)
    annealing.observe(math.nan, 0.0)
    assert annealing.beta == 1.0


def test_what_is_trained_in_the_end_is_the_problem_itself():
    problem, spy = steep(), Spy()
    sc.solve(problem, spy, iterations=40, **QUICK)
    alphas = [p.alpha for p in spy.seen]
    assert alphas[1:] == sorted(alphas[1:], reverse=True) and alphas[0] == pytest.approx(1e3 * problem.alpha)
    assert 3 < sum(a > problem.alpha for a in alphas) <= 10
    assert all(p.reward_function is problem.reward_function for p in spy.seen)
    assert all(p.alpha == problem.alpha for p in spy.seen[10:]) and problem.alpha == 0.5


def test_history_is_of_the_problem_at_its_own_temperature():
    problem = steep()
    solution = sc.solve(problem, sc.RewardBackprop(), iterations=24, **QUICK)
    assert len(temperatures(solution)) > 3
    for h in solution.history:
        assert h["objective"] == pytest.approx(h["reward"] - h["running_cost"] - 0.5 * h["kl"], rel=1e-5)


@pytest.mark.parametrize("method", ["log-variance", "path-consistency", "soft-ppo", "reinforce", "reward-backprop"])
def test_methods_that_see_the_target_through_few_paths_anneal(method):
    assert temperatures(sc.solve(steep(), method, iterations=6, **QUICK))


def test_nothing_is_annealed_unasked():
    """Regressions do not need it, a control that is given may be near its optimum, and ``anneal=False`` says no."""
    problem = steep()
    assert not temperatures(sc.solve(problem, sc.AdjointMatching(), iterations=3, **QUICK))
    assert not temperatures(
        sc.solve(problem, sc.LogVariance(), iterations=3, control=SmallControl(2, 2, dtype=torch.float32), **QUICK)
    )
    assert not temperatures(sc.solve(problem, sc.LogVariance(), iterations=3, anneal=False, **QUICK))
    annealed = sc.gibbs_problem(lambda x: -0.5 * x.square().sum(1), 2, reference="annealed", scale=1.0)
    assert not temperatures(sc.solve(annealed, sc.LogVariance(), iterations=3, **QUICK))


def test_the_former_name_of_the_option_leads_to_the_present_one():
    with pytest.raises(TypeError, match="solve: cooling= is now called anneal="):
        sc.solve(steep(), sc.LogVariance(), cooling=False)  # type: ignore[call-arg]


def test_off_policy_paths_anneal_for_one_iteration_only():
    solution = sc.solve(steep(), sc.LogVariance(paths="reference"), iterations=4, **QUICK)
    assert len(temperatures(solution)) == 1


@pytest.mark.parametrize("stop", [3, 9])
def test_a_run_stopped_while_it_anneals_resumes_to_the_same_numbers(tmp_path, stop):
    class Stop:
        def on_step_end(self, state):
            if state.iteration == stop:
                raise KeyboardInterrupt

    options = {**QUICK, "iterations": 40, "checkpoint_every": 2}
    whole = sc.solve(steep(), sc.LogVariance(), **options)
    with pytest.raises(KeyboardInterrupt):
        sc.solve(steep(), sc.LogVariance(), **options, checkpoint_dir=tmp_path, callbacks=[Stop()])
    resumed = sc.solve(steep(), sc.LogVariance(), **options, checkpoint_dir=tmp_path, resume=True)
    assert resumed.history == whole.history and len(temperatures(whole)) == 10
    with pytest.raises(ValueError, match="anneal=False"):
        sc.solve(steep(), sc.LogVariance(), **options, checkpoint_dir=tmp_path, resume=True, anneal=False)


def test_a_plateau_is_looked_for_after_annealing_only(monkeypatch):
    """The objective falls while a hot target moves: that is no reason to stop."""
    seen = []
    monkeypatch.setattr(LearningRateSchedule, "observe", lambda self, i, scores, *_: seen.append((i, len(scores))))
    monkeypatch.setattr(sc.RewardBackprop, "default_iterations", 60)
    solution = sc.solve(steep(), sc.RewardBackprop(), **QUICK)
    annealed = len(temperatures(solution))
    assert seen == [(i, 1 + i - annealed) for i in range(annealed, 60)]
    assert all(("elbo" in entry) == (i >= annealed) for i, entry in enumerate(solution.history))


def test_gradients_of_the_first_whole_step_are_not_shortened(monkeypatch):
    """The first iteration's reward is a thousandth: its gradient is no measure of what is usual."""
    from sdecontrol.training.optimiser import Descent

    sizes, shorten = [], Descent.shorten

    def seen(self, gradients):
        before = torch.nn.utils.get_total_norm(gradients)
        shorten(self, gradients)
        sizes.append((float(before), float(torch.nn.utils.get_total_norm(gradients))))

    monkeypatch.setattr(Descent, "shorten", seen)
    mild = random_lq(2, seed=1, dtype=torch.float32)
    sc.solve(mild, sc.Reinforce(), iterations=20, **QUICK)
    assert sizes[1][0] > 5 * sizes[0][0] and sizes[1][1] == sizes[1][0]


@pytest.mark.slow
def test_annealing_pays_where_the_reward_is_steep():
    """ou-quadratic-hard, 150 iterations of log-variance: control error with and without (measured 0.007 and 0.038)."""
    problem = sc.library.named_problem("ou-quadratic-hard")
    exact = sc.exact_solution(problem, 50)
    errors = []
    for anneal in (True, False):
        options = {"time_steps": 50, "iterations": 150, "seed": 0, "progress": False}
        solution = sc.solve(problem, sc.LogVariance(), anneal=anneal, **options)
        errors.append(sc.control_error(solution, exact, n=4096, seed=1).relative.value)
    assert errors[0] < 0.5 * errors[1]
