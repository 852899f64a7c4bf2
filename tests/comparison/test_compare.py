"""``compare``: counts that are exact, numbers that are those of the solutions, refusals as rows, the exact frontier."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch
from problems import F64, SmallControl, nonlinear, random_lq

import sdecontrol as sc
from sdecontrol.comparison.compare import exact_frontier
from sdecontrol.comparison.costs import Meter
from sdecontrol.controls.base import Control
from sdecontrol.controls.network import DefaultControl
from sdecontrol.methods.base import Method

I, B, K = 3, 64, 7


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
    plain = sc.solve(problem, method, **settings)
    meter = Meter(problem)
    with meter.measuring() as costs:
        counted = sc.solve(meter.problem, method, **settings)
    assert costs.reward_calls == I * B
    assert costs.gradient_calls == gradients * I * B
    assert costs.network_calls == evaluations * I * B * K
    assert costs.seconds > 0
    before, after = plain.control.state_dict(), counted.control.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_default_network_s_own_reward_gradients_are_counted() -> None:
    """Its gate takes ``grad r`` at every state of every step, on the paths and again at the stored states."""
    meter = Meter(nonlinear())
    with meter.measuring() as costs:
        sc.solve(meter.problem, sc.LogVariance(), iterations=I, batch_size=B, time_steps=K, seed=0)
    looks = 32 * min(8, K + 1)  # at the reward's slope, before training: 32 paths at 8 times
    assert costs.gradient_calls == 2 * I * B * K + looks
    assert costs.reward_calls == 2 * I * B * K + I * B + looks


def test_evaluations_inside_an_evaluation_count_once() -> None:
    problem = random_lq(start="controlled")  # two controls behind one
    meter = Meter(problem)
    solution = sc.solve(meter.problem, sc.RewardBackprop(), iterations=1, batch_size=B, time_steps=20, seed=0)
    with meter.measuring() as costs:
        solution.sample(B, seed=0)
    assert costs.network_calls == B * solution.chain.steps and solution.chain.steps == 25
    with meter.measuring() as costs:
        solution.control.along(solution.chain, torch.zeros(25, B, 2, dtype=F64))
    assert costs.network_calls == B * 25


def test_nothing_is_watched_outside_of_a_measurement() -> None:
    originals = [vars(cls).get(name) for cls in (Control, DefaultControl) for name in ("at", "along", "on_chain")]
    meter = Meter(random_lq())
    with pytest.raises(KeyError), meter.measuring():
        assert vars(Control)["on_chain"] is not originals[2]
        raise KeyError
    assert originals == [
        vars(cls).get(name) for cls in (Control, DefaultControl) for name in ("at", "along", "on_chain")
    ]
    meter.problem.reward(torch.zeros(3, 2, dtype=F64))
    with meter.measuring() as costs:
        pass
    assert costs.reward_calls == 0


def test_peak_memory_sees_what_is_freed_again() -> None:
    meter = Meter(random_lq())
    torch.ones(100_000_000)  # 381 MiB, freed: must not hide the next
    with meter.measuring() as costs:
        x = torch.ones(50_000_000)  # 191 MiB
        del x
    if math.isnan(costs.memory):
        pytest.skip("this system does not tell the resident memory's peak")
    assert 185 < costs.memory < 260
    with meter.measuring() as costs:
        torch.ones(1000)
    assert costs.memory < 20


_SMALL_PIECES = """
import torch
import sdecontrol as sc
from sdecontrol.comparison.costs import Meter

meter = Meter(sc.ControlProblem(sc.BrownianMotion(1), sc.Dirac(torch.zeros(1)), alpha=1.0))
held = [torch.ones(8_000) for _ in range(6000)]  # 183 MiB in small pieces: freed, they stay with the process for their next use
last = held[-1]
del held
with meter.measuring() as costs:
    held = [torch.ones(8_000) for _ in range(6000)]
print(costs.memory)
"""


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
    """r = g'x on Brownian motion: ``E r = g'm + beta v``, ``KL = beta^2 v / 2`` with ``v = |g|^2 sigma^2 T``, also on chains."""
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
