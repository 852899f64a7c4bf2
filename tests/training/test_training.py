"""solve: reproducible, resumable, stopped early where something is not finite, and undisturbed by callbacks."""

import math
import subprocess
import sys

import pytest
import torch
from cases import SmallControl, randn, random_lq
from runs import F32, TESTS, quick, same

import sdecontrol as sc
from sdecontrol.methods.base import Regression, Run, parameters_of
from sdecontrol.training.optimiser import Descent
from sdecontrol.training.schedule import LearningRateSchedule


def test_the_same_seed_gives_the_same_solution_bit_for_bit():
    assert same(quick(), quick())
    assert not same(quick(), quick(seed=4))


def test_training_does_not_touch_the_global_generator():
    state = torch.get_rng_state()
    quick()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("iterations", [12, None])
def test_a_stopped_run_resumes_to_the_numbers_of_an_uninterrupted_one(tmp_path, iterations, monkeypatch):
    for name, value in {"step": 5, "least": 20}.items():  # so that something is decided within the test
        monkeypatch.setattr(LearningRateSchedule, name, value)
    monkeypatch.setattr(sc.RewardBackprop, "default_iterations", 60)

    class Stop:
        def __init__(self, at):
            self.at = at

        def on_step_end(self, state):
            if state.iteration == self.at:
                raise KeyboardInterrupt

    options = {"iterations": iterations, "checkpoint_every": 3}
    whole = quick(**options, checkpoint_dir=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        quick(**options, checkpoint_dir=tmp_path / "part", callbacks=[Stop(7 if iterations else 31)])
    resumed = quick(**options, checkpoint_dir=tmp_path / "part", resume=True)
    assert same(whole, resumed)
    assert resumed.history == whole.history


@pytest.mark.parametrize(
    "name, change, word",
    [
        ("iterations", {"iterations": 10}, "iterations=10 .*learning rate's course .*the checkpoint 5"),
        ("iterations", {"iterations": None}, "iterations=None"),
        ("learning_rate", {"learning_rate": 1e-4}, "learning_rate=0.0001, the checkpoint None"),
        ("optimizer", {"optimizer": torch.optim.SGD}, "optimizer='SGD', the checkpoint 'Adam'"),
        ("batch_size", {"batch_size": 128}, "batch_size=128"),
    ],
    ids=["iterations", "no iterations", "learning rate", "optimiser", "batch size"],
)
def test_a_run_is_not_resumed_as_another_one(tmp_path, name, change, word):
    """What is refused are the arguments that numbers depend on; a run of the same ones is resumed."""
    options = {"iterations": 5, "checkpoint_every": 5, "checkpoint_dir": tmp_path}
    quick(**options)
    with pytest.raises(ValueError, match=rf"{word}.*resume with the same arguments, or use another checkpoint_dir"):
        quick(**{**options, **change}, resume=True)
    assert same(quick(**options, resume=True), quick(iterations=5))


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from runs import quick


class Kill:
    def on_step_end(self, state):
        if state.iteration == 7:
            os._exit(9)


quick(checkpoint_every=3, checkpoint_dir={folder!r}, callbacks=[Kill()])
"""


def test_a_killed_process_resumes_to_the_same_bits(tmp_path):
    """A process that ends without a handler between two checkpoints. At any other moment: the slow test of random
    kills, in tests/reliability."""
    code = KILLED.format(tests=TESTS, folder=str(tmp_path / "killed"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert sorted(p.name for p in (tmp_path / "killed").glob("*.json"))[-1] == "checkpoint-00000006.json"
    resumed = quick(checkpoint_every=3, checkpoint_dir=tmp_path / "killed", resume=True)
    assert same(resumed, quick())


def test_accumulated_gradients_are_those_of_the_larger_batch():
    """The gradient that the optimiser is given of 2 x 64 paths is the mean of those of both batches, which are
    different ones."""
    problem = random_lq(2, seed=1)
    method, found = sc.RewardBackprop(), []
    for part in range(2):
        run = Run(problem, problem.chain(6), 64, 1, 3, SmallControl(2, 2))
        drawn = run.batch(part)
        run.batch = lambda *_, drawn=drawn: drawn
        state = method.setup(run)
        method.step(state, run)
        found.append([p.grad.clone() for p in state.control.parameters()])
    assert not torch.allclose(found[0][0], found[1][0], rtol=1e-2)
    seen = []

    class Seen(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
            return super().step(closure)

    options = {"iterations": 1, "batch_size": 64, "accumulate": 2, "seed": 3, "max_kl_step": None}
    optimizer = lambda p: Seen(p, lr=0.01)  # noqa: E731
    sc.solve(problem, method, time_steps=6, control=SmallControl(2, 2), optimizer=optimizer, **options)
    for together, a, b in zip(seen[0], *found, strict=True):
        shape = together / (0.5 * (a + b))  # gradients are shortened, all by one factor, where they are long
        assert torch.allclose(shape, shape.flatten()[0].expand_as(shape), rtol=1e-9) and float(shape.max()) < 1 + 1e-12


def test_a_tolerance_stops_training_once_the_gap_is_below_it(monkeypatch):
    from sdecontrol.training.solve import Trainer

    monkeypatch.setattr(Trainer, "evaluate_every", 50)
    seen = []

    class Watch:
        def on_evaluate(self, state):
            seen.append(state.evaluation.gap.value)

    solution = quick(iterations=2000, tolerance=0.2, callbacks=[Watch()])
    assert seen and seen[-1] < 0.2 and all(g >= 0.2 for g in seen[:-1]) and solution.iterations < 2000


def test_a_time_budget_marks_the_result_as_not_reproducible():
    solution = quick(iterations=None, budget="1s")
    assert not solution.reproducible and solution.iterations > 1


@pytest.mark.slow
def test_without_a_number_of_iterations_training_gets_near_the_optimum_untouched():
    problem = random_lq(2, seed=4, dtype=F32)
    solution = sc.solve(problem, "reward-backprop", time_steps=20, batch_size=128, seed=0)
    exact = sc.exact_solution(problem, like=solution)
    assert solution.evaluate(4096, seed=1).gap.value < 2 * float(exact.floor)
    assert solution.iterations < sc.RewardBackprop.default_iterations


# ------------------------------------------------------------------------------------------------ things that go wrong


@pytest.mark.parametrize("what", ["drift", "reward", "running cost", "gradient"])
def test_the_first_non_finite_value_stops_training_and_keeps_the_last_good_solution(what, tmp_path):
    calls = {"n": 0}

    def poisoned(value, x):
        calls["n"] += 1
        return torch.where(torch.arange(len(x)) == 3, torch.nan, value) if calls["n"] > calls["allowed"] else value

    def reward(x):
        if what == "gradient":  # finite values, infinite slope
            calls["n"] += 1
            floor = 0.0 if calls["n"] > calls["allowed"] else 1.0
            return -((x * 0).abs().sum(1) + floor).sqrt() - (x**2).sum(1)
        value = -(x**2).sum(1)
        return poisoned(value, x) if what == "reward" else value

    def drift(x, t):
        return poisoned(-x[:, 0], x)[:, None].expand(-1, 1) if what == "drift" else -x

    def cost(x, t):
        return poisoned(x[:, 0] ** 2, x) if what == "running cost" else x[:, 0] ** 2

    calls["allowed"] = 10**9
    problem = sc.ControlProblem(
        sc.SDE(drift, 1.0, dim=1), initial=sc.Dirac(torch.zeros(1)), reward=reward, running_cost=cost
    )
    control = SmallControl(1, 1, dtype=F32)

    class Poison:
        def on_step_end(self, state):
            if state.iteration == 4:
                calls["allowed"] = calls["n"]

    with pytest.raises(sc.NonFiniteError) as caught:
        quick(problem, control=control, callbacks=[Poison()], checkpoint_dir=tmp_path)
    error = caught.value
    assert error.what == what and "iteration 4" in str(error)
    if what != "gradient":
        assert error.rows == 1
    if what in ("drift", "running cost"):
        assert error.step == 0 and "step 0" in str(error)
    assert all(torch.isfinite(p).all() for p in error.solution.control.parameters())
    calls["allowed"] = 10**9
    assert error.solution.iterations == 4
    assert quick(problem, control=control, checkpoint_dir=tmp_path, resume=True).iterations == 12


def test_a_callback_that_raises_gives_a_warning_and_changes_nothing():
    class Broken:
        def on_step_end(self, state):
            raise KeyError("oops")

    with pytest.warns(RuntimeWarning, match="KeyError"):
        disturbed = quick(callbacks=[Broken()])
    assert same(disturbed, quick())


def test_callbacks_see_every_event(tmp_path):
    events = []

    class Record:
        def __getattr__(self, name):
            if name.startswith("on_"):
                return lambda state: events.append((name, state.iteration))
            raise AttributeError(name)

    quick(iterations=4, callbacks=[Record()], checkpoint_dir=tmp_path, checkpoint_every=3)
    names = [name for name, _ in events]
    assert names[0] == "on_train_begin" and names[-1] == "on_train_end"
    assert names.count("on_step_end") == 4 and names.count("on_save") == 2


def test_the_users_own_control_is_copied_and_its_training_is_saved(tmp_path):
    control = SmallControl(2, 2, dtype=F32)
    before = {n: p.detach().clone() for n, p in control.named_parameters()}
    problem = random_lq(2, seed=1, dtype=F32)
    solution = quick(problem, control=control)
    assert all(torch.equal(before[n], p) for n, p in control.named_parameters())
    solution.save(tmp_path)
    with pytest.raises(TypeError, match=r"load\(..., control=module\)"):
        sc.load(tmp_path, problem)
    again = sc.load(tmp_path, problem, control=SmallControl(2, 2, seed=9, dtype=F32))
    assert same(again, solution)


# ---------------------------------------------------------------- steps that are taken back


def descended(objectives):
    """A descent after one regression's step per batch of objectives, with the parameter before each."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    descent, places, taken = Descent([parameter], None, 0.1, 0.1), [], []
    for objective in objectives:
        places.append(parameter.detach().clone())
        descent.begin(1.0)
        parameter.grad = torch.ones(3)
        taken.append(descent.step(Regression(None, parameter, None, 1.0, objective=objective)))
    return descent, [*places, parameter.detach().clone()], taken


def test_a_regressions_step_that_has_lowered_the_objective_is_taken_back_and_the_next_ones_are_smaller():
    good, fallen = randn(512, seed=1), randn(512, seed=2) - 0.5  # 0.5 is eight standard errors
    descent, places, taken = descended([good, fallen, good, good])
    assert taken == [True, False, True, True]
    assert torch.equal(places[2], places[0])  # not only the step, but no half of it
    first, after = (float((places[i + 1] - places[i]).abs().max()) for i in (0, 2))
    assert after == pytest.approx(0.5 * first, rel=1e-3)  # a quarter in KL
    assert descent.taken_back == 1 and 0.25 < descent.radius < 0.35  # and may grow again


def test_noise_in_the_objective_takes_nothing_back():
    """Four standard errors below the best, itself slowly forgotten: hardly ever where nothing has changed."""
    descent, _, _ = descended([randn(256, seed=s) for s in range(1000)])
    assert descent.taken_back <= 6


def test_an_objective_that_wears_away_bit_by_bit_goes_back_to_the_best_ten_batches():
    """By 0.05 standard deviations a batch: none is clearly below one before it, and the best is slowly forgotten."""
    _, places, taken = descended([randn(256, seed=s) - 0.05 * max(0, s - 20) for s in range(60)])
    worn = taken.index(False)
    assert 25 < worn < 45
    assert any(torch.equal(places[worn + 1], place) for place in places[5:25])


def test_paths_that_run_away_now_and_again_go_back_and_a_single_one_does_not():
    batches = [randn(256, seed=s) for s in range(25)]
    for i in (13, 16):
        batches[i][7] = -1e7
    _, places, taken = descended(batches)
    assert [i for i, step in enumerate(taken) if not step] == [16]
    assert torch.equal(places[17], places[9])  # after the window of ten


def test_one_wild_path_neither_takes_a_step_back_nor_hides_a_fall():
    wild = randn(512, seed=1)
    wild[0] = -1e30
    _, _, taken = descended([randn(512, seed=2), wild, randn(512, seed=3) - 0.5])
    assert taken == [True, True, False]
    many = randn(512, seed=4)
    many[:26] = -1e30  # five per cent are a fall
    assert descended([randn(512, seed=2), many])[2] == [True, False]


def test_a_regression_s_gradient_that_overflows_takes_the_last_step_back():
    descent, places, _ = descended([randn(512, seed=1)])
    parameter = descent.parameters[0]

    def again(size):
        descent.begin(1.0)
        parameter.grad = torch.full_like(parameter, size)
        return descent.step(Regression(None, parameter, None, 1.0, objective=randn(512, seed=2)))

    assert not again(1e200 if parameter.dtype == torch.float64 else 1e30)
    assert torch.equal(parameter, places[0]) and descent.radius == 0.25
    with pytest.raises(sc.NonFiniteError, match="overflows"):  # nor with the parameters that were good: no step's fault
        again(1e200 if parameter.dtype == torch.float64 else 1e30)
    descent, _, _ = descended([randn(512, seed=1)])
    descent.parameters[0].grad = torch.full((3,), math.nan)
    with pytest.raises(
        sc.NonFiniteError, match="3 of 3 entries"
    ):  # a derivative that is not finite is an error of the problem's
        descent.step(Regression(None, descent.parameters[0], None, 1.0, objective=randn(512, seed=2)))


@pytest.mark.parametrize("method", [sc.AdjointMatching(), sc.SOCM()])
def test_paths_that_leave_the_numbers_take_a_regression_s_step_back(method):
    problem = random_lq(2, seed=1)
    run = Run(problem, problem.chain(6), 64, 1, 0, SmallControl(2, 2))
    state = method.setup(run)
    parameters = parameters_of(state)
    descent = Descent(parameters, None, 0.01, 0.01)
    run.descend, run.take_back = descent.step, descent.take_back

    def step():
        descent.begin(1.0)
        metrics = method.step(state, run)
        run.iteration += 1
        return metrics

    for _ in range(5):
        step()
    best = [p.clone() for p in descent.kept]
    with torch.no_grad():
        parameters[-1].fill_(1e200)  # what one step too far does
    assert step()["kl"] < 100
    assert descent.taken_back == 1 and int(state.since_taken_back) == 1
    assert all((p - q).abs().max() < 0.0075 for p, q in zip(parameters, best))  # one step from there
    infinite = sc.ControlProblem(problem.reference, problem.initial, reward=lambda x: x.sum(1) * math.inf)
    with pytest.raises(sc.NonFiniteError, match="reward"):  # the first batch has nothing to go back to
        sc.solve(infinite, method, iterations=2, batch_size=64, time_steps=6, progress=False)


def test_what_decides_on_taking_back_is_part_of_a_checkpoint():
    def other():
        return Descent([torch.nn.Parameter(torch.ones(3))], None, 0.1, 0.1)

    good, fallen = randn(512, seed=1), randn(512, seed=2) - 0.5
    descent, places, _ = descended([good, fallen, good])
    again = other()
    again.restore(*descent.tensors())
    again.begin(1.0)
    again.parameters[0].grad = torch.ones(3)
    assert again.radius == descent.radius and again.taken_back == 1
    assert not again.step(Regression(None, again.parameters[0], None, 1.0, objective=fallen))
    assert torch.equal(again.parameters[0], places[2])
    worn = [randn(256, seed=s) - 0.05 * max(0, s - 20) for s in range(60)]
    descent, _, _ = descended(worn[:24])
    again.restore(*descent.tensors())
    for objective in worn[24 : descended(worn)[2].index(False) + 1]:
        for one in (descent, again):
            one.begin(1.0)
            one.parameters[0].grad = torch.ones(3)
            one.step(Regression(None, one.parameters[0], None, 1.0, objective=objective))
    assert again.taken_back == descent.taken_back == 1
    assert torch.equal(again.parameters[0], descent.parameters[0])
