"""The cost of one iteration of each method, against the network calls that it must make."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import sdecontrol as sc
from sdecontrol.controls.guidance import ValueControl, value_network
from sdecontrol.controls.values import learned_value
from sdecontrol.library.problems import problem_card

from .timing import cost_row, interleaved, iteration
from .tuning_cost import NUMBERS, STEPS, tuning_rows

RESULTS = Path(__file__).parent / "results" / "methods.json"
PAGE = Path(__file__).parents[1] / "docs" / "tables" / "iteration_cost.md"


# What an iteration must call, in units of `_calls`: "roll" K calls of the control on the batch, without a graph;
# "learn" one on all K B states and its backward pass; "product" a vector-Jacobian product by the states, on the graph
# of "learn"; "through" K calls with their graph, and backward through all of them; "value look", "value learn": the
# same of the method's value network; "value roll" K gradients of it.
METHODS: dict[str, tuple[sc.Method, dict[str, float]]] = {
    "reward-backprop": (sc.RewardBackprop(), {"through": 1}),
    "adjoint-matching": (sc.AdjointMatching(), {"roll": 1, "learn": 1, "product": 1}),
    "adjoint-matching, plain": (sc.AdjointMatching(zero_variance=False), {"roll": 1, "learn": 1}),
    "socm, full M": (sc.SOCM(matrices="full"), {"roll": 1, "learn": 1}),
    "socm, closed loop": (sc.SOCM(), {"roll": 1, "learn": 1}),
    "log-variance": (sc.LogVariance(), {"roll": 1, "learn": 1}),
    "log-variance, 5 of 50 steps": (sc.LogVariance(steps=5), {"roll": 1, "learn": 0.1}),
    "cross-entropy": (sc.CrossEntropy(trust_region=1.0), {"roll": 1, "learn": 1}),
    "reward-weighted-mle": (sc.RewardWeightedMLE(roll_in="none"), {"learn": 1}),
    "reinforce": (sc.Reinforce(), {"roll": 1, "learn": 1}),
    "path-consistency, n=all": (sc.PathConsistency(n="all"), {"roll": 1, "learn": 1}),
    "path-consistency, n=1": (sc.PathConsistency(n=1), {"roll": 1, "learn": 1, "value learn": 1}),
    "soft-ppo, 4 epochs": (sc.SoftPPO(), {"roll": 1, "learn": 4, "value look": 1, "value learn": 1}),
    "soft-ppo, per-time baseline": (sc.SoftPPO(baseline="per-time"), {"roll": 1, "learn": 4}),
    "value guidance, monte-carlo": (sc.ValueGuidance("monte-carlo"), {"value roll": 1, "value learn": 1}),
    "value guidance, soft-q": (sc.ValueGuidance("soft-q"), {"value roll": 1, "value look": 1, "value learn": 1}),
}


#: the network of the card's source, and one of sixteen times the work
SIZES = {"256-128-64": (256, 128, 64), "1024-512-256": (1024, 512, 256)}
_SMALL, _LARGE = SIZES


class Network(nn.Module):
    """A user's own network, time as one more input."""

    def __init__(self, dim: int, noises: int, name: str = _SMALL) -> None:
        super().__init__()
        sizes = (dim + 1, *SIZES[name])
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], noises))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat((x, t.unsqueeze(1)), 1))


def _calls(problem: sc.ControlProblem, network: nn.Module, batch: int, steps: int) -> dict[str, Callable[[], None]]:
    """The network calls that iterations are made of."""
    dim = problem.event_shape[0]
    x, t = torch.randn(batch, dim), torch.zeros(batch)
    states, times = torch.randn(steps, batch, dim), problem.chain(steps).times[:-1]
    whole, clock = states.flatten(0, 1), t.repeat(steps)
    chain = problem.chain(steps)
    value = learned_value(problem, chain, 0)
    guided = value_network(problem, chain, 0)
    guide = ValueControl(guided, problem, chain).on_chain(chain)

    def roll() -> None:
        with torch.no_grad():
            for _ in range(steps):
                network(x, t)

    def value_roll() -> None:
        with torch.no_grad():
            for k in range(steps):
                guide(k, x, None)

    def learn(share: float = 1.0) -> None:
        rows = round(share * len(whole))
        network(whole[:rows], clock[:rows]).square().sum().backward()

    def product() -> None:  # less what "learn" has already
        leaf = whole.clone().requires_grad_(True)
        torch.autograd.grad(network(leaf, clock), leaf, ones)

    def forward() -> None:
        network(whole.clone().requires_grad_(True), clock)

    def through() -> None:
        here, total = x, x.new_zeros(())
        for _ in range(steps):
            here = network(here, t)
            total = total + here.sum()
        total.backward()

    def value_look() -> None:
        with torch.no_grad():
            value.along(states, times, None)

    def value_learn() -> None:
        value.along(states, times, None).square().sum().backward()

    ones = torch.ones(len(whole), problem.control_shape[0])
    return {
        "roll": roll,
        "learn": learn,
        "learn, a tenth": lambda: learn(0.1),
        "product and forward": product,
        "forward": forward,
        "through": through,
        "value roll": value_roll,
        "value look": value_look,
        "value learn": value_learn,
    }


def _must(seconds: dict[str, list[float]], counts: dict[str, float], round_: int) -> float:
    """CPU-seconds of the calls that an iteration must make, in one round."""
    at = {name: values[round_] for name, values in seconds.items()}
    at["product"] = max(0.0, at["product and forward"] - at["forward"])
    return sum(at["learn, a tenth"] if (name, n) == ("learn", 0.1) else n * at[name] for name, n in counts.items())


def _iteration(
    problem: sc.ControlProblem, method: sc.Method, steps: int, batch: int, network: str = _SMALL
) -> Callable[[], None]:
    torch.manual_seed(0)
    return iteration(problem, method, steps, batch, Network(problem.event_shape[0], problem.control_shape[0], network))


def _quadratic(dim: int) -> sc.ControlProblem:
    eye = torch.eye(dim)
    return sc.ControlProblem(
        sc.LinearSDE(0.2 * eye, eye),
        sc.Dirac(0.5 * torch.ones(dim)),
        sc.Quadratic(0.2 * eye),
        sc.QuadraticCost(0.4 * eye),
    )


def _scaling(rounds: int) -> dict[str, dict[str, float]]:
    """CPU-seconds of an iteration of adjoint matching and of the network calls alone, as steps, batch and dimension
    double."""
    out: dict[str, dict[str, float]] = {}
    sizes = (
        [(k, 128, 20) for k in (25, 50, 100, 200)]
        + [(50, b, 20) for b in (256, 512)]
        + [(50, 128, d) for d in (10, 40, 80)]
    )
    name = "adjoint-matching"
    method, counts = METHODS[name]
    for steps, batch, dim in sizes:
        problem = _quadratic(dim)
        calls = _calls(problem, Network(dim, dim), batch, steps)
        cases = {c: calls[c] for c in ("roll", "learn", "learn, a tenth", "product and forward", "forward")}
        seconds = interleaved({**cases, name: _iteration(problem, method, steps, batch)}, rounds, warm=2)
        must = [_must(seconds, counts, i) for i in range(rounds)]
        ratio = statistics.median(a / b for a, b in zip(seconds[name], must))
        out[f"{steps} steps, batch {batch}, d = {dim}"] = {
            name: statistics.median(seconds[name]),
            "network calls": statistics.median(must),
            "ratio": ratio,
        }
    return out


def _rows(problem: sc.ControlProblem, steps: int, batch: int, network: str, rounds: int) -> dict[str, dict[str, Any]]:
    """CPU-seconds of an iteration of every method, and of the calls that it must make."""
    calls = _calls(problem, Network(problem.event_shape[0], problem.control_shape[0], network), batch, steps)
    acts = {n: _iteration(problem, m, steps, batch, network) for n, (m, _) in METHODS.items()}
    seconds = interleaved({**calls, **acts}, rounds, warm=2)
    return {
        name: cost_row(seconds[name], [_must(seconds, counts, i) for i in range(rounds)], counts)
        for name, (_, counts) in METHODS.items()
    }


def methods(
    problem: Annotated[str, typer.Option(help="A named problem.")] = "ou-quadratic-easy",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; the median counts.")] = 15,
) -> None:
    """One iteration of each method with a user's own network, against the network calls it must make.

    Example: python -m benchmarks methods
    """
    torch.set_num_threads(1)
    card = problem_card(problem)
    made, few = card.make(), max(3, rounds // 3)
    found: dict[str, Any] = {
        "problem": problem,
        "time_steps": card.time_steps,
        "batch_size": card.batch_size,
        "rounds": rounds,
        "rows": {n: _rows(made, card.time_steps, card.batch_size, n, rounds if n == _SMALL else few) for n in SIZES},
        "tuning": tuning_rows(few),
        "scaling": _scaling(few),
        "versions": {"sdecontrol": sc.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "command": "python -m benchmarks methods",
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(text := _page(found))
    print(text, end="")


def _page(found: dict[str, Any]) -> str:
    small, large = found["rows"][_SMALL], found["rows"][_LARGE]
    lines = [
        "# The cost of an iteration",
        "",
        f"`OMP_NUM_THREADS=1 python -m benchmarks methods`: {found['problem']}, {found['time_steps']} steps, batch "
        f"{found['batch_size']}, a user's own network (so no tables of times, no linear parts), {_SMALL} and {_LARGE}, "
        f"one thread, medians of {found['rounds']} interleaved rounds (a third of them for the larger). Every "
        "iteration stands beside the network calls that it must make: *roll*, K calls on the batch without a graph; "
        "*learn*, one call on all K·B states and its backward pass; *product*, a vector-Jacobian product of that "
        "call; *through*, K calls with their graph and backward through all; *value* look, learn and roll "
        "(gradients), the same of the method's own value network. All else (noise, kernels, rewards, running costs, "
        "adjoints, weights, metrics, Adam) is what the ratio has above 1.",
        "",
        f"| | must call | CPU-s, {_SMALL} | of these calls | ratio | CPU-s, {_LARGE} | ratio |",
        "|---|---|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {_said(r['calls'])} | {r['cpu_seconds']:.4f} | {r['network_calls']:.4f} | "
            f"{r['against_network_calls']:.2f} | {large[name]['cpu_seconds']:.3f} | "
            f"{large[name]['against_network_calls']:.2f} |"
            for name, r in small.items()
        ),
        "",
        f"A pre-trained model of {NUMBERS} numbers that is tuned (the size of the digits', 319 360 parameters; {STEPS} "
        "steps, batch 128): *roll*, K calls of the model and of its tuned copy without a graph; *learn*, the same "
        "with the copy's graph and a backward pass; *adjoint*, K calls of the model and a product with its Jacobian "
        "each; *product*, such products of model and copy; *through*, K calls of both and backward through all.",
        "",
        "| | must call | CPU-s | of these calls | ratio |",
        "|---|---|---:|---:|---:|",
        *(
            f"| {name} | {_said(r['calls'])} | {r['cpu_seconds']:.3f} | {r['network_calls']:.3f} | "
            f"{r['against_network_calls']:.2f} |"
            for name, r in found["tuning"].items()
        ),
        "",
        "How an iteration of adjoint matching grows with steps, batch and dimension, beside its network calls:",
        "",
        "| | adjoint matching, CPU-s | network calls, CPU-s | ratio |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {r['adjoint-matching']:.4f} | {r['network calls']:.4f} | {r['ratio']:.2f} |"
            for name, r in found["scaling"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _said(counts: dict[str, float]) -> str:
    return " + ".join(name if n == 1 else f"{n:g} {name}" for name, n in counts.items())
