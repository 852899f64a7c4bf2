"""The cost of one iteration of each method, against the network calls that it must make."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import sdecontrol as sc
from sdecontrol.library.problems import problem_card
from sdecontrol.methods.base import Run, parameters_of

RESULTS = Path(__file__).parent / "results" / "methods.json"
PAGE = Path(__file__).parents[1] / "docs" / "iteration_cost.md"

METHODS: dict[str, sc.Method] = {
    "reward-backprop": sc.RewardBackprop(),
    "adjoint-matching": sc.AdjointMatching(),
    "adjoint-matching, plain": sc.AdjointMatching(zero_variance=False),
    "socm, full M": sc.SOCM(matrices="full"),
    "socm, closed loop": sc.SOCM(),
    "log-variance": sc.LogVariance(),
    "log-variance, 5 of 50 steps": sc.LogVariance(steps=5),
    "cross-entropy": sc.CrossEntropy(trust_region=1.0),
    "reward-weighted-mle": sc.RewardWeightedMLE(),
    "reinforce": sc.Reinforce(),
    "path-consistency, n=all": sc.PathConsistency(n="all"),
}


class Network(nn.Module):
    """The network of the card's source: 256-128-64, time as one more input."""

    def __init__(self, dim: int, noises: int) -> None:
        super().__init__()
        sizes = (dim + 1, 256, 128, 64)
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(64, noises))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat((x, t.unsqueeze(1)), 1))


def _floor(network: nn.Module, batch: int, steps: int, dim: int) -> Callable[[], None]:
    """What every regression on stored paths must do: K calls without graph, then one call on all states and its backward pass."""
    x, t = torch.randn(batch, dim), torch.zeros(batch)
    whole, times = x.repeat(steps, 1), t.repeat(steps)

    def act() -> None:
        with torch.no_grad():
            for _ in range(steps):
                network(x, t)
        network(whole, times).square().sum().backward()

    return act


def _iteration(problem: sc.ControlProblem, method: sc.Method, steps: int, batch: int) -> Callable[[], None]:
    torch.manual_seed(0)
    control = Network(problem.event_shape[0], problem.control_shape[0])
    run = Run(problem, problem.chain(steps), batch, 1, 0, control)
    state = method.setup(run)
    optimizer = torch.optim.Adam(parameters_of(state), lr=1e-4)

    def descend(*_: Any) -> bool:
        optimizer.step()
        return True

    run.descend = descend

    def act() -> None:
        optimizer.zero_grad(set_to_none=True)
        method.step(state, run)
        run.iteration += 1

    return act


def _quadratic(dim: int) -> sc.ControlProblem:
    eye = torch.eye(dim)
    return sc.ControlProblem(
        sc.LinearSDE(0.2 * eye, eye),
        sc.Dirac(0.5 * torch.ones(dim)),
        sc.Quadratic(0.2 * eye),
        sc.QuadraticCost(0.4 * eye),
    )


def _scaling(rounds: int) -> dict[str, dict[str, float]]:
    """CPU-seconds of an iteration of adjoint matching and of the network calls alone, as steps, batch and dimension double."""
    out: dict[str, dict[str, float]] = {}
    sizes = (
        [(k, 128, 20) for k in (25, 50, 100, 200)]
        + [(50, b, 20) for b in (256, 512)]
        + [(50, 128, d) for d in (10, 40, 80)]
    )
    for steps, batch, dim in sizes:
        act = _iteration(_quadratic(dim), sc.AdjointMatching(), steps, batch)
        alone = _floor(Network(dim, dim), batch, steps, dim)
        seconds: tuple[list[float], list[float]] = ([], [])
        for round_ in range(rounds + 2):
            for found, case in zip(seconds, (act, alone)):
                began = time.process_time()
                case()
                if round_ > 1:
                    found.append(time.process_time() - began)
        ours, floor = (statistics.median(found) for found in seconds)
        out[f"{steps} steps, batch {batch}, d = {dim}"] = {"adjoint-matching": ours, "network calls": floor}
    return out


def methods(
    problem: Annotated[str, typer.Option(help="A named problem.")] = "ou-quadratic-easy",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; the median counts.")] = 15,
) -> None:
    """One iteration of each method with a user's own network, against the network calls it must make.

    Example:  OMP_NUM_THREADS=1 python -m benchmarks methods
    """
    torch.set_num_threads(1)
    card = problem_card(problem)
    made = card.make()
    cases = {
        "network calls": _floor(
            Network(made.event_shape[0], made.control_shape[0]), card.batch_size, card.time_steps, made.event_shape[0]
        )
    }
    cases.update({n: _iteration(made, m, card.time_steps, card.batch_size) for n, m in METHODS.items()})
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + 2):
        for name, act in cases.items():
            began = time.process_time()
            act()
            if round_ > 1:
                seconds[name].append(time.process_time() - began)
    rows = {
        name: {
            "cpu_seconds": statistics.median(values),
            "against_network_calls": statistics.median(a / b for a, b in zip(values, seconds["network calls"])),
            "against_reward_backprop": statistics.median(a / b for a, b in zip(values, seconds["reward-backprop"])),
        }
        for name, values in seconds.items()
    }
    scaling = _scaling(max(3, rounds // 3))
    RESULTS.write_text(
        json.dumps(
            {
                "problem": problem,
                "time_steps": card.time_steps,
                "batch_size": card.batch_size,
                "rounds": rounds,
                "rows": rows,
                "scaling": scaling,
                "versions": {
                    "sdecontrol": sc.__version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
                "command": "python -m benchmarks methods",
            },
            indent=1,
        )
        + "\n"
    )
    lines = [
        "# The cost of an iteration",
        "",
        f"`python -m benchmarks methods`: {problem}, {card.time_steps} steps, batch {card.batch_size}, a user's own network 256-128-64 (so no tables of "
        f'times, no linear parts), one thread, median of {rounds} interleaved rounds. "Network calls" are K calls without graph, one call on all K·B states and its '
        "backward pass; adjoint matching without variance has two to four vector-Jacobian products of the network more, which are part of the method.",
        "",
        "| | CPU-s | / network calls | / reward backpropagation |",
        "|---|---|---|---|",
        *(
            f"| {name} | {r['cpu_seconds']:.4f} | {r['against_network_calls']:.2f} | {r['against_reward_backprop']:.2f} |"
            for name, r in rows.items()
        ),
    ]
    lines += [
        "",
        "How an iteration of adjoint matching grows with steps, batch and dimension, beside the network calls:",
        "",
        "| | adjoint matching, CPU-s | network calls, CPU-s | ratio |",
        "|---|---|---|---|",
        *(
            f"| {name} | {r['adjoint-matching']:.4f} | {r['network calls']:.4f} | {r['adjoint-matching'] / r['network calls']:.2f} |"
            for name, r in scaling.items()
        ),
    ]
    PAGE.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
