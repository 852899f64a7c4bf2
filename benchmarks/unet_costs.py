"""Memory and time of one iteration on diffusers' U-Net, beside loops written by hand; and of adjoint matching against
backpropagation on coupled oscillators. One memory figure: ``python -m benchmarks.unet_costs JOB STEPS``."""

from __future__ import annotations

import copy
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import sdecontrol as sc
from sdecontrol.comparison.costs import measuring
from sdecontrol.library.digits import DIGIT_SHAPE

from .timing import interleaved, iteration
from .unet_problem import LABEL, UNet, alphas_cumprod, classifier

__all__ = ["MEMORY_STEPS", "cost_cell", "memory_cell"]

MEMORY_STEPS, _BATCH, _ROUNDS = (20, 50), 32, 3
_RATE = 1e-4
_METHODS: dict[str, sc.Method] = {
    "reward-backprop": sc.RewardBackprop(),
    "reward-backprop, checkpoint": sc.RewardBackprop(gradient="checkpoint"),
    "reward-backprop, adjoint": sc.RewardBackprop(gradient="adjoint"),
    "adjoint-matching, plain": sc.AdjointMatching(zero_variance=False),
    "adjoint-matching": sc.AdjointMatching(),
    "log-variance": sc.LogVariance(),
    "soft-ppo, one epoch": sc.SoftPPO(epochs=1, baseline="per-time"),
}


def _problem(steps: int) -> sc.ControlProblem:
    """Of the size of the trained one; an untrained network costs the same."""
    torch.manual_seed(0)
    chain = sc.diffusion_chain(
        UNet().eval(), alphas_cumprod(), prediction="noise", shape=DIGIT_SHAPE, sampler="ddpm", steps=steps, clip=1.0
    )
    return sc.ControlProblem(chain, reward=sc.LogProb(classifier(), LABEL))


def _ddpm(a: float, b: float) -> tuple[float, float, float]:
    """DDPM's posterior from abar = a to abar = b: parts of x0^ and x in its mean, and its standard deviation."""
    beta = 1 - a / b
    return math.sqrt(b) * beta / (1 - a), math.sqrt(a / b) * (1 - b) / (1 - a), math.sqrt((1 - b) / (1 - a) * beta)


class ByHand:
    """The same two gradients as a user would write them for this chain: states are kept, and the graph of one step at a
    time is made.

    Args:
        ppo: the surrogate of one epoch, whose gradient is a sum over steps; else the pathwise gradient, backwards
            through the steps.
    """

    def __init__(self, problem: sc.ControlProblem, batch: int, ppo: bool) -> None:
        self.problem, self.batch, self.ppo = problem, batch, ppo
        self.chain: Any = problem.chain().main
        self.model: Any = self.chain.model.requires_grad_(False)
        self.tuned = copy.deepcopy(self.model).requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.tuned.parameters(), _RATE, fused=True)
        abar = alphas_cumprod().double()[self.chain.levels].tolist()
        self.coefficients = [_ddpm(a, b) for a, b in pairwise(abar)]

    def _step(self, k: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reference's mean and scale of step k, and the shift of the tuned model."""
        chain, level = self.chain, self.chain.levels[k]
        n = torch.full((len(x),), level)
        x0_part, x_part, scale = self.coefficients[k]
        ours, theirs = (chain.to_x0(k, x, model(x, n)) for model in (self.tuned, self.model))
        return x_part * x + x0_part * theirs, torch.tensor(scale), (ours - theirs) * (x0_part / scale)

    def _rollout(self) -> tuple[list[Tensor], list[Tensor]]:
        states, noises = [torch.randn(self.batch, *DIGIT_SHAPE)], []
        with torch.no_grad():
            for k in range(self.chain.steps):
                mean, scale, c = self._step(k, states[-1])
                noises.append(torch.randn_like(mean) + (c if self.ppo else 0))
                states.append(mean + scale * (noises[-1] + (0 if self.ppo else c)))
        return states, noises

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        states, noises = self._rollout()
        end = states[-1].requires_grad_(not self.ppo)
        with torch.set_grad_enabled(not self.ppo):
            loss = -self.problem.reward(self.chain.decode(end)) / self.problem.alpha
        if self.ppo:
            self._surrogate(states, noises, loss)
        else:
            (a,) = torch.autograd.grad(loss.mean(), end)
            for k in reversed(range(self.chain.steps)):
                x = states[k].requires_grad_(True)
                mean, scale, c = self._step(k, x)
                out = mean + scale * (noises[k] + c)
                total = 0.5 * c.square().sum() / self.batch + (a * out).sum()
                parameters = list(self.tuned.parameters())
                a, *found = torch.autograd.grad(total, [x, *parameters])
                for p, g in zip(parameters, found):
                    p.grad = g if p.grad is None else p.grad + g
        self.optimizer.step()

    def _surrogate(self, states: list[Tensor], draws: list[Tensor], loss: Tensor) -> None:
        advantage = (loss - loss.mean()).detach()
        for k, (x, draw) in enumerate(zip(states, draws)):
            _, _, c = self._step(k, x)
            log_p = (c * (draw - 0.5 * c)).flatten(1).sum(1)
            ratio = (log_p - log_p.detach()).exp()
            worst = torch.maximum(advantage * ratio, advantage * ratio.clamp(0.8, 1.2))
            (worst + 0.5 * c.square().flatten(1).sum(1)).mean().backward()


def _jobs(problem: sc.ControlProblem) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What makes a function that does one iteration, by name."""

    def library(method: sc.Method) -> Callable[[], None]:
        act = iteration(problem, method, None, _BATCH)
        problem.reference.model.requires_grad_(False)  # type: ignore[union-attr]  # as `solve` has it while it trains
        return act

    made: dict[str, Callable[[], Callable[[], Any]]] = {
        "by hand, pathwise": lambda: ByHand(problem, _BATCH, ppo=False),
        "by hand, surrogate": lambda: ByHand(problem, _BATCH, ppo=True),
    }
    return made | {name: lambda m=method: library(m) for name, method in _METHODS.items()}


def memory_cell(steps: int) -> dict[str, Any]:
    """MiB that one iteration adds to the resident memory of a process of its own, by method."""
    found: dict[str, Any] = {}
    for name in ("by hand, pathwise", "by hand, surrogate", *_METHODS):
        command = [sys.executable, "-m", "benchmarks.unet_costs", name, str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return {"steps": steps, "batch": _BATCH, "memory": found}


def kuramoto(oscillators: int) -> sc.ControlProblem:
    """Phases of coupled oscillators with natural frequencies from -1 to 1, spread evenly over the circle at first; the
    reward is 12 times the squared order parameter at the end, T = 2."""
    own = torch.linspace(-1, 1, oscillators)
    first = torch.arange(oscillators) * (2 * math.pi / oscillators)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        sine, cosine = x.sin(), x.cos()
        return own + 1.5 * (sine.mean(1, keepdim=True) * cosine - cosine.mean(1, keepdim=True) * sine)

    def order(x: Tensor) -> Tensor:
        return 12 * (x.sin().mean(1).square() + x.cos().mean(1).square())

    sde = sc.SDE(drift, torch.tensor(0.5), dim=oscillators, horizon=2.0)
    return sc.ControlProblem(sde, sc.Dirac(first), reward=order, alpha=1.0)


def cost_cell() -> dict[str, Any]:
    """CPU-seconds of an iteration, medians of interleaved rounds, and ratios to backpropagation within a round."""
    torch.set_num_threads(1)
    names = ("by hand, pathwise", "by hand, surrogate", *_METHODS)
    jobs = {n: _jobs(_problem(20))[n]() for n in names}  # one freezes the model, and no other would tune a copy then
    seconds = interleaved(jobs, _ROUNDS)
    found: dict[str, Any] = {"steps": 20, "batch": _BATCH, "rows": _against(seconds, "reward-backprop"), "kuramoto": {}}
    few = {n: _METHODS[n] for n in ("reward-backprop", "adjoint-matching, plain", "adjoint-matching")}
    for oscillators in (25, 50, 100):
        coupled = kuramoto(oscillators)
        cases = {name: iteration(coupled, method, 40, 256) for name, method in few.items()}
        found["kuramoto"][oscillators] = _against(interleaved(cases, _ROUNDS), "reward-backprop")
    return found


def _against(seconds: dict[str, list[float]], floor: str) -> dict[str, dict[str, float]]:
    return {
        name: {
            "cpu_seconds": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, seconds[floor])),
        }
        for name, values in seconds.items()
    }


def main() -> None:
    torch.set_num_threads(1)
    job, steps = sys.argv[1], int(sys.argv[2])
    _jobs(_problem(4))[job]()()  # what the libraries need once
    act = _jobs(_problem(steps))[job]()
    with measuring(torch.device("cpu")) as costs:
        act()
    print(json.dumps({"mib": costs.memory, "cpu_seconds": costs.seconds}))


if __name__ == "__main__":
    main()
