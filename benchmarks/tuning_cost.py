"""The cost of an iteration where a pre-trained model is tuned, against the calls of the model and of its copy that it
must make."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

import sdecontrol as sc
from sdecontrol.training.score_network import ScoreNetwork

from .timing import cost_row, interleaved, iteration

__all__ = ["NUMBERS", "STEPS", "TUNING", "tuning_rows"]

NUMBERS, STEPS, _BATCH = 64, 50, 128

# In units of `_calls`: "roll" K calls of model and copy on the batch, without a graph; "learn" the same K calls with
# the copy's graph, and a backward pass; "adjoint" K calls of the model, each with a vector-Jacobian product by its
# state; "product" those of model and copy; "through" K calls of both one after another, and backward through all.
TUNING: dict[str, tuple[sc.Method, dict[str, float]]] = {
    "reward-backprop": (sc.RewardBackprop(), {"through": 1}),
    "adjoint-matching": (sc.AdjointMatching(), {"roll": 1, "learn": 1, "adjoint": 1, "product": 1}),
    "adjoint-matching, plain": (sc.AdjointMatching(zero_variance=False), {"roll": 1, "learn": 1, "adjoint": 1}),
    "log-variance": (sc.LogVariance(), {"roll": 1, "learn": 1}),
    "cross-entropy": (sc.CrossEntropy(), {"roll": 1, "learn": 1}),
    "reinforce": (sc.Reinforce(), {"roll": 1, "learn": 1}),
    "path-consistency, n=all": (sc.PathConsistency(n="all"), {"roll": 1, "learn": 1}),
    "soft-ppo, 4 epochs, per-time baseline": (sc.SoftPPO(baseline="per-time"), {"roll": 1, "learn": 4}),
}


def _problem() -> sc.ControlProblem:
    """The digits' model in size, untrained: what it predicts costs the same."""
    schedule = sc.VP()
    model = ScoreNetwork((NUMBERS,), schedule, "noise")
    reward = sc.Quadratic(0.1 * torch.eye(NUMBERS), torch.ones(NUMBERS))
    return sc.ControlProblem(sc.generative_sde(model, schedule, shape=(NUMBERS,)), reward=reward)


def _calls(problem: sc.ControlProblem) -> dict[str, Callable[[], None]]:
    model: Any = copy.deepcopy(problem.reference.model).requires_grad_(False)  # type: ignore[union-attr]
    tuned: Any = copy.deepcopy(problem.reference.model)  # type: ignore[union-attr]
    states, t = torch.randn(STEPS, _BATCH, NUMBERS).unbind(0), torch.tensor(0.5).expand(_BATCH)
    side = torch.ones(_BATCH, NUMBERS)

    def roll() -> None:
        with torch.no_grad():
            for x in states:
                model(x, t)
                tuned(x, t)

    def learn() -> None:
        total = side.new_zeros(())
        for x in states:
            total = total + (tuned(x, t) - model(x, t)).square().sum()
        total.backward()

    def adjoint() -> None:
        for x in states:
            leaf = x.clone().requires_grad_(True)
            torch.autograd.grad(model(leaf, t), leaf, side)

    def product() -> None:  # less what "learn" has already: forward calls
        for x in states:
            leaf = x.clone().requires_grad_(True)
            torch.autograd.grad(tuned(leaf, t) - model(leaf, t), leaf, side)

    def forward() -> None:
        for x in states:
            leaf = x.clone().requires_grad_(True)
            _ = tuned(leaf, t) - model(leaf, t)

    def through() -> None:
        x, total = states[0], side.new_zeros(())
        for _ in states:
            before = model(x, t)
            change = tuned(x, t) - before
            total = total + change.square().sum()
            x = x + 0.02 * (before + change)
        total.backward()

    return {
        "roll": roll,
        "learn": learn,
        "adjoint": adjoint,
        "product": product,
        "forward": forward,
        "through": through,
    }


def tuning_rows(rounds: int) -> dict[str, dict[str, Any]]:
    """CPU-seconds of an iteration of every method of :data:`TUNING`, and of the calls that it must make, medians of
    interleaved rounds."""
    torch.manual_seed(0)
    problem = _problem()
    acts = {f"* {name}": iteration(problem, method, STEPS, _BATCH) for name, (method, _) in TUNING.items()}
    calls = _calls(problem)
    problem.reference.model.requires_grad_(False)  # type: ignore[union-attr]  # as `solve` has it while it trains
    seconds = interleaved({**calls, **acts}, rounds)
    seconds["product"] = [max(0.0, a - b) for a, b in zip(seconds["product"], seconds["forward"])]
    rows = {}
    for name, (_, counts) in TUNING.items():
        must = [sum(n * seconds[call][i] for call, n in counts.items()) for i in range(rounds)]
        rows[name] = cost_row(seconds[f"* {name}"], must, counts)
    return rows
