"""``compare``: counts that are exact, numbers that are those of the solutions, refusals as rows, the exact frontier."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from cases import F64, SmallControl, nonlinear, random_lq

import sdecontrol as sc
from sdecontrol.chains.shifts import shift_function, shifts_along
from sdecontrol.comparison.costs import measuring
from sdecontrol.comparison.frontier import exact_frontier
from sdecontrol.controls.base import Control
from sdecontrol.methods.base import Method
from sdecontrol.paths.equations import control_at

I, B, K = 3, 64, 7
PROBE = 2 + 4  # rows on which a control's graph is measured, once, where stored states are to be learned from


@pytest.mark.parametrize(
    ("method", "gradients", "evaluations"),
    [
        (sc.RewardBackprop(), 1, 1),  # differentiable paths: one evaluation per step
        (sc.LogVariance(), 0, 2),  # paths without a graph, then once at all stored states
        (sc.Reinforce(), 0, 2),
    ],
)
def test_calls_are_counted_in_rows_and_nothing_changes(method: Method, gradients: int, evaluations: int) -> None:
    problem = nonlinear()
    settings = {"control": SmallControl(2, 3), "iterations": I, "batch_size": B, "time_steps": K, "seed": 0}
    settings["max_kl_step"] = None
    plain = sc.solve(problem, method, **settings)
    with measuring(problem.device) as costs:
        counted = sc.solve(problem, method, **settings)
    assert costs.reward_calls == I * B
    assert costs.gradient_calls == gradients * I * B
    assert costs.network_calls == evaluations * I * B * K + PROBE * (evaluations - 1)
    assert costs.seconds > 0
    before, after = plain.control.state_dict(), counted.control.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_default_network_s_own_reward_gradients_are_counted() -> None:
    """Its Langevin term takes ``grad r`` at every state of every step, on the paths and again at the stored states."""
    problem = nonlinear()
    with measuring(problem.device) as costs:
        sc.solve(problem, sc.LogVariance(), iterations=I, batch_size=B, time_steps=K, seed=0, max_kl_step=None)
    looks = 32 * min(8, K + 1)  # at the reward's slope, before training: 32 paths at 8 times
    assert costs.gradient_calls == 2 * I * B * K + looks + PROBE
    assert costs.reward_calls == 2 * I * B * K + I * B + looks + PROBE


def test_evaluations_inside_an_evaluation_count_once() -> None:
    problem = random_lq(start="controlled")  # two controls behind one
    solution = sc.solve(problem, sc.RewardBackprop(), iterations=1, batch_size=B, time_steps=20, seed=0)
    with measuring(problem.device) as costs:
        solution.sample(B, seed=0)
    assert costs.network_calls == B * solution.chain.steps and solution.chain.steps == 25
    with measuring(problem.device) as costs:
        shifts_along(solution.chain, solution.control, torch.zeros(25, B, 2, dtype=F64))
    assert costs.network_calls == B * 25 + PROBE


class Own(Control):
    """A user's subclass that overrides every way to be evaluated, with nothing of the base's."""

    def __init__(self) -> None:
        super().__init__(torch.Size((2,)), torch.Size((2,)), 0.0, 1.0)

    def forward(self, x, t, y=None):
        return -x

    def at(self, x, t, y=None):
        return -x

    def on_chain(self, chain, tables=None):
        return lambda k, x, y: chain.shift_at(k, x, -x)

    def along(self, chain, states, y=None, first=0):
        return chain.shifts_at(range(first, first + len(states)), states, -states)


def test_a_user_s_control_is_counted_whatever_it_overrides() -> None:
    problem, control = random_lq(), Own()
    paths = sc.simulate(problem, B, control=control, time_steps=K, seed=0)
    x = torch.zeros(5, 2, dtype=F64)
    for work, rows in (
        (lambda: sc.simulate(problem, B, control=control, time_steps=K, seed=0), B * K),
        (lambda: paths.log_ratio(control), B * K),
        (lambda: control(x, 0.5), 5),
        (lambda: control(x=x, t=0.5), 5),
        (lambda: control_at(control, x, torch.tensor(0.5), None, x.shape[1:]), 5),
        (lambda: sc.simulate(problem, B, control=Doubled(), time_steps=K, seed=0), B * K),
    ):
        with measuring(problem.device) as costs:
            work()
        assert costs.network_calls == rows
    with measuring(problem.device) as costs, pytest.raises(TypeError):
        control()  # what is no call is none
    assert costs.network_calls == 0


class Doubled(Own):
    """Evaluates another control, and its own base's, inside its own evaluation."""

    def on_chain(self, chain, tables=None):
        other, base = shift_function(chain, Own()), super().on_chain(chain)
        return lambda k, x, y: other(k, x, y) + base(k, x, y)


@pytest.mark.parametrize("annealed", [False, True])
def test_nothing_of_the_user_s_is_touched_while_counting(annealed: bool) -> None:
    """Classes, problem and reference are the same objects with the same attributes during a run as before it."""
    classes = {Control}
    while more := {c for cls in classes for c in cls.__subclasses__()} - classes:
        classes |= more
    seen: list[dict] = []

    def now() -> dict:
        reference = problem.reference
        return {o: {n: id(v) for n, v in vars(o).items()} for o in (*classes, problem, reference)}

    def reward(x):
        if before:
            seen.append(now())
        return -0.5 * (x**2).sum(1)

    before: dict = {}
    if annealed:
        problem = sc.gibbs_problem(reward, 2, reference="annealed", seed=0)
    else:
        problem = sc.ControlProblem(sc.BrownianMotion(2), sc.Dirac(torch.zeros(2)), reward, alpha=1.0)
    methods, settings = [sc.LogVariance(), sc.SMC(8)], {"iterations": 2, "batch_size": B, "time_steps": K, "n": 64}
    sc.compare(problem, methods, seed=0, **settings)  # what a problem computes once is there
    before = now()
    result = sc.compare(problem, methods, seed=0, **settings)
    assert all(row.reason is None for row in result.rows)
    assert result.rows[0].estimates["reward_calls"].value > 0
    assert len(seen) > 2 and all(during == before for during in seen)


def test_counting_ends_with_its_block_and_blocks_count_apart() -> None:
    problem, x = random_lq(), torch.zeros(3, 2, dtype=F64)
    with pytest.raises(KeyError), measuring(problem.device) as broken:
        problem.reward(x)
        raise KeyError
    problem.reward(x)
    with measuring(problem.device) as outer:
        problem.reward(x[:2])
        with measuring(problem.device) as inner:
            problem.reward(x[:1])
    assert (broken.reward_calls, outer.reward_calls, inner.reward_calls) == (3, 2, 1)


def test_two_compares_in_two_threads_count_for_themselves() -> None:
    """The one's reward waits for the other's in the middle of their trainings: counts are those of each alone."""

    def run(size: int, meet: threading.Barrier | None) -> dict:
        calls = [0]

        def reward(x):
            calls[0] += 1
            if meet is not None and calls[0] in (20, 30, 40):
                meet.wait(60)
            return x.cos().sum(1)

        problem = sc.ControlProblem(sc.BrownianMotion(5), sc.Dirac(torch.zeros(5)), reward, alpha=1.0)
        result = sc.compare(problem, ["log-variance"], iterations=I, batch_size=size, time_steps=K, n=64, seed=0)
        names = ("reward_calls", "gradient_calls", "network_calls", "sampling_network_calls")
        assert calls[0] > 40, calls
        return {name: result.rows[0].estimates[name].value for name in names}

    alone = [run(64, None), run(128, None)]
    meet = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        together = [job.result(120) for job in [pool.submit(run, size, meet) for size in (64, 128)]]
    assert together == alone
    bounded = I * 2 * (64 // 4) * 2  # before and after a step, a quarter of the paths, every fourth step
    assert 2 * I * 64 * K < alone[0]["network_calls"] <= 2 * I * 64 * K + PROBE + bounded


def test_peak_memory_sees_what_is_freed_again() -> None:
    torch.ones(100_000_000)  # 381 MiB, freed: must not hide the next
    with measuring(torch.device("cpu")) as costs:
        x = torch.ones(50_000_000)  # 191 MiB
        del x
    if math.isnan(costs.memory):
        pytest.skip("this system does not tell the resident memory's peak")
    assert 185 < costs.memory < 260
    with measuring(torch.device("cpu")) as costs:
        torch.ones(1000)
    assert costs.memory < 20


_SMALL_PIECES = """
import torch
from sdecontrol.comparison.costs import measuring
from sdecontrol.comparison.frontier import exact_frontier

# 183 MiB in small pieces: freed, they stay with the process for their next use
held = [torch.ones(8_000) for _ in range(6000)]
last = held[-1]
del held
with measuring(torch.device("cpu")) as costs:
    held = [torch.ones(8_000) for _ in range(6000)]
print(costs.memory)
"""


@pytest.mark.slow
def test_peak_memory_counts_what_the_process_had_kept_for_reuse() -> None:
    """In a process of its own: what other tests have left in this one's heap would be used first."""
    done = subprocess.run([sys.executable, "-c", _SMALL_PIECES], capture_output=True, text=True, check=True)
    memory = float(done.stdout)
    if math.isnan(memory):
        pytest.skip("this system does not tell the resident memory's peak")
    assert 150 < memory < 260


@dataclass(frozen=True)
class Diverges(Method):
    """A method whose loss becomes infinite."""

    def step(self, state, run):
        raise sc.NonFiniteError("the loss is not finite.", what="loss")


def test_numbers_are_those_of_the_solutions_and_refusals_are_rows() -> None:
    problem = random_lq()
    methods = [sc.AdjointMatching(), sc.ClassifierGuidance(), sc.BestOfN(4), Diverges()]
    result = sc.compare(problem, methods, iterations=I, batch_size=B, time_steps=K, n=512, seed=5)
    assert [row.label for row in result.rows] == [
        "adjoint-matching",
        "classifier-guidance",
        "best-of-n(n=4)",
        "diverges",
    ]
    row = result["adjoint-matching"]
    (solution,) = row.solutions
    assert solution.problem is problem and row.reason is None
    again = sc.solve(problem, sc.AdjointMatching(), iterations=I, batch_size=B, time_steps=K, seed=5)
    x = torch.zeros(3, 2, dtype=F64)
    assert torch.equal(solution.control(x, 0.3), again.control(x, 0.3))
    exact = sc.exact_solution(problem, like=solution)
    error = sc.control_error(solution, exact, n=4096, seed=1).relative
    assert row.estimates["control_error"].value == pytest.approx(error.value, rel=0.2)
    assert row.estimates["reward_calls"].value == I * B == row.estimates["gradient_calls"].value
    assert row.estimates["sampling_network_calls"].value == K and row.estimates["sampling_reward_calls"].value == 0
    assert result.exact == "of the chain" and 0 < result.distance_floor < 0.2
    gap = solution.evaluate(512, seed=3).gap
    assert abs(row.estimates["gap"].value - gap.value) < 5 * math.hypot(gap.stderr, row.estimates["gap"].stderr)
    best = result["best-of-n(n=4)"]
    assert "control_error" not in best.estimates and best.estimates["reward_calls"].value == 0
    assert best.estimates["sampling_reward_calls"].value == 4
    for label, what in (
        ("classifier-guidance", "classifier is missing"),
        ("diverges", "diverged: the loss is not finite"),
    ):
        assert result[label].estimates == {} and what in str(result[label].reason)
    text, markdown = str(result), result.table()
    assert "classifier is missing" in text and text.count("\n") < 20 and markdown.count("| ") > 20
    head, ruler, *body = (line.split("|")[1:-1] for line in markdown.splitlines() if line.startswith("|"))
    assert {len(line) for line in (ruler, *body)} == {len(head)} and len(body) == len(result.rows)
    assert ruler[0] == "---" and set(ruler[1:]) == {"---:"}
    plain = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert plain["rows"][1]["reason"] and plain["rows"][0]["kl"]["value"] == row.estimates["kl"].value


def test_errors_over_seeds_and_partial_failures() -> None:
    @dataclass(frozen=True)
    class Sometimes(sc.RewardBackprop):
        def step(self, state, run):
            if run.seed == 8:
                raise sc.NonFiniteError("the loss is not finite.", what="loss")
            return super().step(state, run)

    result = sc.compare(random_lq(), [Sometimes()], seeds=[7, 8, 9], iterations=2, batch_size=B, time_steps=K, n=256)
    (row,) = result.rows
    assert row.failed == [8] and len(row.solutions) == 2 and "1 of 3 seeds" in str(result)
    one, two = (s.evaluate(256, seed=0).kl.value for s in row.solutions)
    kl = row.estimates["kl"]
    parts = [
        sc.compare(random_lq(), ["reward-backprop"], seeds=[s], iterations=2, batch_size=B, time_steps=K, n=256)
        for s in (7, 9)
    ]
    a, b = (p.rows[0].estimates["kl"].value for p in parts)
    assert kl.value == pytest.approx((a + b) / 2) and kl.stderr == pytest.approx(abs(a - b) / 2)
    assert one != two


def test_a_method_s_own_bug_is_not_hidden() -> None:
    @dataclass(frozen=True)
    class Broken(Method):
        def step(self, state, run):
            raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        sc.compare(random_lq(), [Broken()], iterations=1, time_steps=K, n=64)


def brownian_linear(dtype: torch.dtype, alpha: float = 0.5) -> sc.ControlProblem:
    g = torch.tensor([1.0, -2.0], dtype=dtype)
    sde = sc.BrownianMotion(2, 0.7 * torch.eye(2, dtype=dtype), horizon=1.5)
    return sc.ControlProblem(sde, sc.Dirac(torch.tensor([0.3, 0.1], dtype=dtype)), sc.Linear(g), alpha=alpha)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_frontier_of_a_linear_reward_in_closed_form(dtype: torch.dtype) -> None:
    """r = g'x on Brownian motion: ``E r = g'm + beta v``, ``KL = beta^2 v / 2`` with ``v = |g|^2 sigma^2 T``, also on
    chains."""
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    v, mean = 5.0 * 0.49 * 1.5, 0.1
    for steps in (None, 10):
        points = exact_frontier(brownian_linear(dtype), steps, factor=4.0, points=5)
        assert [p.alpha for p in points] == pytest.approx([2.0, 1.0, 0.5, 0.25, 0.125])
        for p in points:
            assert p.reward == pytest.approx(mean + v / p.alpha, rel=tolerance)
            assert p.kl == pytest.approx(0.5 * v / p.alpha**2, rel=tolerance)


def test_no_law_beats_the_frontier_and_it_touches_the_exact_objective() -> None:
    problem = random_lq(running=True)
    points = exact_frontier(problem, 10, points=5)
    exact = sc.exact_solution(problem, time_steps=10)
    middle = points[2]
    assert middle.alpha == problem.alpha
    assert middle.reward - problem.alpha * middle.kl == pytest.approx(problem.alpha * float(exact.log_z), abs=1e-8)
    for p in points:  # at temperature alpha every other law of the family is worse
        assert p.reward - problem.alpha * p.kl <= middle.reward - problem.alpha * middle.kl + 1e-9


def test_frontier_of_a_mixture_and_none_where_it_is_unknown() -> None:
    mixture = sc.GaussianMixture(torch.tensor([0.6, 0.4]), torch.tensor([[-1.5, 0.0], [1.5, 0.5]]), 0.1)
    problem = sc.ControlProblem(
        sc.generative_sde(mixture, sc.VP(), shape=(2,)), reward=sc.Linear(torch.ones(2)), alpha=0.7
    )
    middle = exact_frontier(problem, points=3)[1]
    x = sc.exact_solution(problem).sample(200_000, seed=0)
    r = x.sum(1).double()
    assert middle.reward == pytest.approx(float(r.mean()), abs=4 * float(r.std()) / math.sqrt(200_000))
    assert exact_frontier(nonlinear()) == []


@pytest.mark.filterwarnings("ignore:smc. only")
def test_figure() -> None:
    result = sc.compare(
        random_lq(), ["adjoint-matching", "smc"], iterations=2, batch_size=B, time_steps=K, n=256, seed=0
    )
    figure, axes = result.figure()
    labels = [t.get_text() for t in axes.get_legend().get_texts()]
    assert labels == ["exact frontier", "exact, alpha = 0.7", "smc (KL not known)", "adjoint-matching"]
    assert figure.axes == [axes] and axes.get_xlabel().startswith("KL")
    nothing = sc.compare(random_lq(), [sc.ClassifierGuidance()], time_steps=K, n=64, seed=0)
    nothing.frontier = []
    assert nothing.figure()[1].get_legend() is None


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"problem": 3}, TypeError, "problem must be a ControlProblem"),
        ({"methods": "adjoint-matching"}, TypeError, "methods must be a list"),
        ({"methods": []}, ValueError, "methods is empty"),
        ({"methods": ["adjoint-maching"]}, ValueError, "adjoint-matching"),
        ({"methods": ["smc", sc.SMC()]}, ValueError, "smc twice"),
        ({"seeds": 0}, ValueError, "seeds must be an int >= 1"),
        ({"seeds": [1, 1]}, ValueError, "different"),
        ({"seeds": [1], "seed": 2}, ValueError, "leave it out"),
        ({"iterations": 0}, ValueError, "iterations must be"),
        ({"n": 10}, ValueError, "n must be an int >= 64"),
        ({"time_steps": 0}, ValueError, "time_steps"),
    ],
)
def test_bad_input(change: dict, kind: type, match: str) -> None:
    arguments = {"problem": random_lq(), "methods": ["smc"], "time_steps": 5, **change}
    with pytest.raises(kind, match=match), warnings.catch_warnings():
        sc.compare(arguments.pop("problem"), arguments.pop("methods"), **arguments)
