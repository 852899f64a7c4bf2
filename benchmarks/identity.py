"""A guard for refactorings that must change no number: many small cases through the public face, compared bit by bit.

``--write FILE`` keeps, for every quantity of every case, a hash of its bytes and a summary (its sum in float64, or a
text); ``--against FILE`` runs the cases again and names those that differ. A file is good for one machine, one version
of torch and one thread. What a case measures of time and memory is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import io
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor, nn

import sdecontrol as sc
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.evaluation.solution import Solution
from sdecontrol.paths.paths import Paths
from sdecontrol.problems.gibbs import GibbsProblem
from sdecontrol.training.callbacks import Callback

F32, F64 = torch.float32, torch.float64
STEPS, BATCH, PATHS, SAMPLES = 4, 32, 128, 16
_LEFT_OUT = re.compile(r"second|memory|version|cached")  # of a machine or a moment, and no numbers of a case

Case = Callable[[], Any]
#: name -> what it returns, in any nesting of dictionaries, lists, dataclasses, tensors, numbers and texts
CASES: dict[str, Case] = {}
#: cases that must raise
REFUSED: set[str] = set()


def case(name: str) -> Callable[[Case], Case]:
    """Register a case."""

    def register(function: Case) -> Case:
        assert name not in CASES, name
        CASES[name] = function
        return function

    return register


# ---------------------------------------------------------------- problems


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


class Net(nn.Module):
    """A small network ``(x, t) -> (batch, *shape)`` with weights of its own seed; t may be an integer step."""

    def __init__(self, dim: int, out: int | None = None, *, seed: int = 0, dtype: torch.dtype = F32, unit: float = 1.0):
        super().__init__()
        self.unit = unit
        self.layers = nn.Sequential(nn.Linear(dim + 1, 8), nn.Tanh(), nn.Linear(8, out or dim)).to(dtype)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(0.5 * normal(*p.shape, seed=100 * seed + i))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        flat = x.flatten(1)
        out = self.layers(torch.cat((flat, t.to(x.dtype).reshape(-1, 1).expand(len(x), 1) / self.unit), 1))
        return out.reshape(x.shape) if out.shape == flat.shape else out


class LabelledNet(Net):
    """The same with a label or number y."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x, t) + 0.3 * torch.sin(y.to(x.dtype)).reshape(-1, *[1] * (x.ndim - 1))


def well(x: Tensor) -> Tensor:
    return -((x - 0.7) ** 2).flatten(1).sum(1) + 0.3 * torch.sin(2 * x).flatten(1).sum(1)


def black_box(x: Tensor) -> Tensor:
    return torch.as_tensor(-np.abs(x.detach().numpy() - 0.5).sum(1), dtype=x.dtype)


def cost(x: Tensor, t: Tensor) -> Tensor:
    return 0.2 * (1 + t) * (x**2).flatten(1).sum(1)


def drift(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(x.flip(1)) - x + 0.2 * t


def mixture(dtype: torch.dtype = F64, dim: int = 2, components: int = 3) -> sc.GaussianMixture:
    spread = torch.tensor([0.2, 0.3, 0.15], dtype=dtype)[:components, None, None] * torch.eye(dim, dtype=dtype)
    weights = torch.tensor([0.3, 0.5, 0.2], dtype=dtype)[:components]
    return sc.GaussianMixture(weights / weights.sum(), 1.2 * normal(components, dim, seed=3, dtype=dtype), spread)


def density(x: Tensor) -> Tensor:
    means = torch.tensor([[-1.5, 0.5], [1.0, -0.5], [0.5, 2.0]], dtype=x.dtype)
    return torch.logsumexp(-2.5 * (x.unsqueeze(1) - means[:, : x.shape[1]]).square().sum(2), 1)


def labels(n: int) -> Tensor:
    return torch.arange(n) % 3


def numbers() -> torch.distributions.Distribution:
    return torch.distributions.Normal(torch.tensor(0.3, dtype=F64), 0.8)


def lq(dtype: torch.dtype = F64, start: str = "dirac", alpha: float = 0.5, running: bool = True) -> sc.ControlProblem:
    """Linear-quadratic in two dimensions."""
    like: dict[str, Any] = {"dtype": dtype}
    sde = sc.LinearSDE(
        torch.tensor([[-1.0, 0.3], [0.1, -0.5]], **like),
        torch.tensor([[0.8, 0.0], [0.2, 0.6]], **like),
        torch.tensor([0.1, -0.2], **like),
        horizon=1.2,
    )
    mean = torch.tensor([0.4, -0.3], **like)
    spread = torch.tensor([[0.5, 0.1], [0.1, 0.3]], **like)
    return sc.ControlProblem(
        sde,
        sc.Dirac(mean) if start == "dirac" else sc.Gaussian(mean, spread),
        sc.Quadratic(torch.tensor([[1.0, 0.2], [0.2, 0.7]], **like), torch.tensor([1.0, -0.5], **like), 0.3),
        sc.QuadraticCost(0.2 * torch.eye(2, **like)) if running else None,
        alpha=alpha,
        start=None if start == "dirac" else start,
    )


def plain(diffusion: Any = 0.7, dtype: torch.dtype = F64, reward: Any = well, dim: int = 2, **options: Any) -> Any:
    """A nonlinear drift from a point."""
    options.setdefault("running_cost", cost)
    return sc.ControlProblem(
        sc.SDE(drift, diffusion, dim, 0.9), sc.Dirac(torch.linspace(-0.5, 0.5, dim, dtype=dtype)), reward, **options
    )


def learned_start(noises: int) -> sc.ControlProblem:
    """A controlled start before a process with more or fewer noises than states."""
    sde = sc.SDE(drift, 0.6 * normal(2, noises, seed=4), 2, 0.9)
    start = sc.Gaussian(torch.tensor([0.2, -0.1], dtype=F64), 0.4)
    return sc.ControlProblem(sde, start, well, cost, 0.7, "controlled")


def _by_state(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 + 0.3 * torch.cos(x) + 0.1 * t


def _matrix_by_state(x: Tensor, t: Tensor) -> Tensor:
    return torch.stack((torch.stack((x[:, 0].cos(), x[:, 1].sin()), 1), torch.ones_like(x)), 2) * 0.6


def _matrix_by_time(x: Tensor, t: Tensor) -> Tensor:
    return torch.tensor([[0.7, 0.1, 0.0], [0.0, 0.5, 0.3]], dtype=x.dtype) * (1 + 0.5 * t)


def semilinear() -> sc.ControlProblem:
    A = torch.tensor([[-8.0, 1.0], [0.0, -3.0]], dtype=F64)
    sde = sc.SemilinearSDE(A, lambda x, t: torch.sin(x) + 0.1 * t, 0.8, torch.tensor([0.1, 0.2], dtype=F64), 1.0)
    return sc.ControlProblem(sde, sc.Dirac(torch.tensor([0.5, -0.5], dtype=F64)), well, cost, 0.8)


def model_problem(
    schedule: Any, prediction: str, dtype: torch.dtype = F32, shape: Sequence[int] = (2,), **options: Any
) -> sc.ControlProblem:
    """A network in the model's place."""
    size, level = math.prod(shape), options.pop("noise_level", "reverse")
    net: Any = LabelledNet if "condition" in options else Net
    sde = sc.generative_sde(net(size, dtype=dtype), schedule, prediction, shape, level)
    return sc.ControlProblem(sde, reward=options.pop("reward", well), alpha=options.pop("alpha", 0.8), **options)


def chain_problem(
    prediction: str = "noise", last: float = 0.02, dtype: torch.dtype = F32, shape: Sequence[int] = (2,), **options: Any
) -> sc.ControlProblem:
    """A discrete model with its own sampler."""
    made = {name: options.pop(name) for name in ("sampler", "eta", "clip") if name in options}
    net: Any = LabelledNet if "condition" in options else Net
    abar = torch.linspace(0.9995, last, 20, dtype=F64).pow(1.2)
    model = net(math.prod(shape), dtype=dtype, unit=20.0)
    reference = sc.diffusion_chain(model, abar, prediction, shape, steps=STEPS + 1, **made)
    return sc.ControlProblem(reference, reward=options.pop("reward", well), alpha=0.8, **options)


def gibbs(reference: str = "ou", dtype: torch.dtype = F64, **options: Any) -> GibbsProblem:
    options = {"scale": 1.8, "centre": 0.2, **options}
    log_density = options.pop("density", density)
    return sc.gibbs_problem(log_density, options.pop("dim", 2), reference, dtype=dtype, **options)


def mixture_problem(schedule: Any = None, dtype: torch.dtype = F64, **options: Any) -> sc.ControlProblem:
    sde = sc.generative_sde(mixture(dtype), schedule or sc.VP(), noise_level=options.pop("noise_level", "reverse"))
    reward = sc.Quadratic(0.5 * torch.eye(2, dtype=dtype), torch.tensor([0.6, -0.4], dtype=dtype))
    return sc.ControlProblem(sde, reward=options.pop("reward", reward), alpha=0.7, **options)


def observed() -> sc.ControlProblem:
    """A linear SDE, conditioned on a number."""
    H = torch.tensor([1.0, 0.5], dtype=F64)
    sde = sc.OrnsteinUhlenbeck(2, 0.7, torch.eye(2, dtype=F64), torch.tensor([0.2, 0.1], dtype=F64))
    return sc.ControlProblem(
        sde, sc.Dirac(torch.zeros(2, dtype=F64)), lambda x, y: -((x @ H - y) ** 2), alpha=0.8, condition=numbers()
    )


def conditional_density(x: Tensor, y: Tensor) -> Tensor:
    return -1.5 * (x - torch.stack((y, -0.5 * y), 1)).square().sum(1)


PROBLEMS: dict[str, Callable[[], sc.ControlProblem]] = {
    "lq": lq,
    "lq-float32": lambda: lq(F32),
    "lq-controlled": lambda: lq(start="controlled"),
    "lq-fixed": lambda: lq(start="fixed"),
    "lq-no-cost": lambda: lq(running=False),
    "scalar": plain,
    "scalar-float32": lambda: plain(dtype=F32),
    "diagonal": lambda: plain(torch.tensor([0.5, 0.9], dtype=F64)),
    "matrix": lambda: plain(torch.tensor([[0.7, 0.1, 0.0], [0.0, 0.5, 0.3]], dtype=F64)),
    "by-state": lambda: plain(_by_state),
    "wide-controlled": lambda: learned_start(3),
    "narrow-controlled": lambda: learned_start(1),
    "matrix-by-state": lambda: plain(_matrix_by_state),
    "matrix-by-time": lambda: plain(_matrix_by_time),
    "number-by-time": lambda: plain(lambda x, t: 0.5 + 0.4 * float(t)),
    "black-box": lambda: plain(reward=black_box),
    "no-reward": lambda: plain(reward=None),
    "image": lambda: sc.ControlProblem(
        sc.SDE(lambda x, t: -x, 0.6, shape=(1, 2, 2)), sc.Gaussian(torch.zeros(1, 2, 2), 0.3), well, start="controlled"
    ),
    "semilinear": semilinear,
    "observed": observed,
    "mixture": mixture_problem,
    "mixture-float32": lambda: mixture_problem(dtype=F32, reward=well),
    "mixture-flow": lambda: mixture_problem(sc.FlowMatching(), reward=well),
    "mixture-controlled": lambda: mixture_problem(sc.VP(0.1, 4.0)),
    "mixture-memoryless": lambda: mixture_problem(sc.CosineVP(), noise_level="memoryless", reward=well),
    "mixture-level": lambda: mixture_problem(noise_level=1.5, reward=well),
    "mixture-ve": lambda: mixture_problem(sc.VE(0.05, 6.0), reward=well),
    "model-noise": lambda: model_problem(sc.VP(), "noise"),
    "model-score": lambda: model_problem(sc.VE(0.05, 6.0), "score", F64),
    "model-v": lambda: model_problem(sc.CosineVP(), "v", shape=(1, 2, 2)),
    "model-sample": lambda: model_problem(sc.VP(), "sample", noise_level=lambda t: 0.5 + t),
    "model-velocity": lambda: model_problem(sc.FlowMatching(), "velocity", start="controlled"),
    "model-condition": lambda: model_problem(sc.VP(), "noise", condition=labels),
    "chain-ddpm": lambda: chain_problem(sampler="ddpm"),
    "chain-ddim": lambda: chain_problem(eta=0.5, clip=1.5),
    "chain-sample": lambda: chain_problem("sample", 1e-4, F64, sampler="ddpm"),
    "chain-v": lambda: chain_problem("v", shape=(1, 2, 2), clip=2.0),
    "chain-condition": lambda: chain_problem(condition=labels, reward=lambda x, y: -((x.sum(1) - y) ** 2)),
    "chain-fixed": lambda: chain_problem(start="fixed"),
    "gibbs": gibbs,
    "gibbs-float32": lambda: gibbs(dtype=F32),
    "gibbs-brownian": lambda: gibbs("brownian"),
    "gibbs-pilot": lambda: gibbs(scale=None, centre=None, score=lambda x: -x, density=lambda x: -0.5 * (x**2).sum(1)),
    "gibbs-hard": lambda: gibbs(density=lambda x: torch.where(x[:, 0] > -1, density(x), -math.inf)),
    "gibbs-black-box": lambda: gibbs(density=black_box),
    "gibbs-condition": lambda: gibbs(density=conditional_density, condition=numbers()),
    "annealed": lambda: gibbs("annealed"),
    "annealed-plain": lambda: gibbs("annealed", backward_control=False),
    "annealed-condition": lambda: gibbs("annealed", density=conditional_density, condition=numbers()),
}


def steps_of(problem: sc.ControlProblem) -> int | None:
    """The steps of a case; a chain has its own."""
    return None if type(problem.reference).__name__ == "DiffusionChain" else STEPS


def push(problem: sc.ControlProblem) -> Callable[..., Tensor]:
    """A control that differs in x and t."""
    size, shape = problem.control_shape.numel(), problem.control_shape

    def control(x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        flat = x.flatten(1)
        wide = flat.repeat(1, -(-size // flat.shape[1]))[:, :size]
        return (0.4 * torch.sin(wide + 3 * t.unsqueeze(1)) + 0.2).reshape(len(x), *shape)

    return control


# ---------------------------------------------------------------- simulation


def of_paths(paths: Paths, other: Any = None) -> dict[str, Any]:
    """All that is asked of paths with likelihoods."""
    out = {
        "times": paths.times,
        "end": paths.end,
        "samples": paths.samples.detach(),
        "cost": paths.running_cost,
        "log_ratio": paths.log_ratio(),
        "kl": paths.kl(),
        "states": paths.states,
        "noises": paths.noises,
        "shifts": paths.shifts,
        "controls": paths.controls,
        "steps": paths.log_ratio(per_step=True),
        "kl_steps": paths.kl(per_step=True),
        "condition": paths.condition,
    }
    if other is not None:
        out |= {"other": paths.log_ratio(other), "other_steps": paths.log_ratio(other, per_step=True)}
    return out


def simulated(problem: sc.ControlProblem, scheme: str | None = None) -> dict[str, Any]:
    control, steps = push(problem), steps_of(problem)
    given: dict[str, Any] = {"time_steps": steps, "scheme": scheme, "seed": 1}

    def run(n: int = SAMPLES, control: Any = control, **options: Any) -> Paths:
        return sc.simulate(problem, n, control, **{**given, **options})

    weights = lambda paths: log_weights(problem, paths)  # noqa: E731
    whole, ends, reference = run(), run(keep="end"), run(control=None)
    out: dict[str, Any] = {
        "all": of_paths(whole, lambda x, t, *y: 0.5 * control(x, t)),
        "states": of_paths(run(keep="states")),
        "end": {"end": ends.end, "log_ratio": ends.log_ratio(), "kl": ends.kl(), "cost": ends.running_cost},
        "end_again": ends.states,
        "reference": of_paths(reference, control),
        "log_weights": weights(whole),
        "log_weights_reference": weights(reference),
        "reward": problem.reward(whole.samples, whole.condition),
        "antithetic": of_paths(run(antithetic=True)),
    }
    chunked = run(150, keep="end", chunk=64)
    out["chunks"] = {"end": chunked.end, "log_ratio": chunked.log_ratio(), "kl": chunked.kl(), "states": chunked.states}
    own = {} if problem.condition is None else {"condition": whole.condition}
    out["noise"] = run(control=None, noise=whole.noises.flip(0), **own).end
    out["resumed"] = run(state=whole.states[2], step=2, **own).states
    if whole.chain.reverse is not None:
        out["backward"] = {"draws": whole.recorded("back_draws"), "shifts": whole.recorded("back_shifts")}
    if steps is not None:
        grid = torch.tensor([0.0, 0.1, 0.35, 0.7, 1.0], dtype=F64) * problem.horizon
        out["grid"] = of_paths(run(time_steps=grid))
    return out


def _simulations() -> None:
    for name, make in PROBLEMS.items():
        CASES[f"simulate/{name}"] = lambda make=make: simulated(make())
    schemes = {
        "exact": ("lq", "lq-float32", "lq-controlled", "lq-no-cost", "observed", "gibbs", "gibbs-brownian"),
        "exponential": ("semilinear", "mixture", "mixture-controlled", "mixture-flow", "model-noise", "model-v"),
        "euler": ("gibbs", "annealed", "annealed-plain", "mixture"),
    }
    for scheme, names in schemes.items():
        for name in names:
            CASES[f"simulate/{scheme}/{name}"] = lambda name=name, scheme=scheme: simulated(PROBLEMS[name](), scheme)


_simulations()

SOLVERS = {
    "milstein": ("scalar", "diagonal", "by-state", "mixture"),
    "srk": ("scalar", "diagonal", "by-state", "lq-controlled", "model-noise"),
    "heun": ("scalar", "matrix-by-state", "by-state", "observed"),
    "midpoint": ("scalar-float32", "matrix-by-state", "matrix-by-time"),
    "euler-heun": ("scalar", "matrix-by-state"),
    "reversible-heun": ("scalar", "by-state", "matrix"),
    "probability-flow": ("mixture", "mixture-controlled", "model-noise", "model-condition", "model-velocity"),
}


def solved_paths(problem: sc.ControlProblem, scheme: str, tolerance: float | None = None) -> dict[str, Any]:
    control = None if scheme == "probability-flow" else push(problem)
    out: dict[str, Any] = {}
    for keep in ("all", "end"):
        paths = sc.simulate(problem, SAMPLES, control, STEPS, scheme, 2, keep, tolerance=tolerance)
        out[keep] = [paths.states, paths.end, paths.samples, paths.running_cost, paths.times]
    if scheme != "probability-flow" and tolerance is None:
        out["antithetic"] = sc.simulate(problem, SAMPLES, control, STEPS, scheme, 2, antithetic=True).states
    return out


def _solvers() -> None:
    for scheme, names in SOLVERS.items():
        for name in names:
            CASES[f"solver/{scheme}/{name}"] = lambda name=name, s=scheme: solved_paths(PROBLEMS[name](), s)
    for scheme, name in (("srk", "scalar"), ("heun", "diagonal"), ("probability-flow", "mixture")):
        CASES[f"solver/{scheme}-adaptive/{name}"] = lambda name=name, s=scheme: solved_paths(PROBLEMS[name](), s, 1e-2)


_solvers()


# ---------------------------------------------------------------- solutions


def history_of(solution: Solution) -> dict[str, Any]:
    names = sorted({name for row in solution.history for name in row if not _LEFT_OUT.search(name)})
    return {n: torch.tensor([row.get(n, math.nan) for row in solution.history], dtype=F64) for n in names}


def file_of(folder: Path) -> dict[str, Any]:
    """What a saved file holds: names of tensors, their values, and its settings."""
    tensors = load_file(next(folder.glob("*.safetensors")))
    settings = json.loads(next(folder.glob("solution*.json")).read_text())
    for name in ("sha256", "settings_sha256", "tensors", "history", "format"):
        settings.pop(name, None)
    names = sorted(tensors)
    return {
        "names": ", ".join(f"{n} {tensors[n].dtype} {tuple(tensors[n].shape)}" for n in names),
        "tensors": [tensors[n] for n in names],
        "settings": json.dumps(settings, sort_keys=True),
    }


def of_solution(solution: Solution, brief: bool = False) -> dict[str, Any]:
    problem = solution.problem
    out: dict[str, Any] = {
        "facts": [solution.method, solution.iterations, solution.seed, solution.reproducible, dict(solution.settings)],
        "history": history_of(solution),
        "details": solution.details,
        "evaluate": solution.evaluate(PATHS, seed=11).as_dict(),
        "sample": solution.sample(SAMPLES, seed=12),
        "weighted": solution.weighted_sample(SAMPLES, seed=13),
    }
    if brief:
        return out
    x = 0.7 * normal(5, *problem.event_shape, seed=7, dtype=problem.dtype)
    if problem.condition is None:
        for t in (0.0, 0.4 * problem.horizon, torch.linspace(0.05, 0.9, 5, dtype=problem.dtype) * problem.horizon):
            with torch.no_grad():
                out[f"control at {t if isinstance(t, float) else 'times'}"] = solution.control(x, t)
        if hasattr(problem.reference, "model") and problem.start != "fixed":
            with contextlib.suppress(ValueError):  # of controls that are no change of the model
                model = solution.model
                clock = torch.linspace(0.1, 0.9, 5, dtype=problem.dtype)
                at = (10 * clock).long() if steps_of(problem) is None else clock
                with torch.no_grad():
                    out["model"] = model(x, at)
    if problem.start == "controlled":
        out["start"] = solution.initial.sample((5,), seed=3)
    if problem.condition is not None:
        y = problem.draw_condition(1, 0)
        out["conditional sample"] = solution.sample(SAMPLES, seed=14, condition=y)
    paths = solution.simulate(SAMPLES, seed=15, keep="end")
    out["paths"] = [paths.end, paths.log_ratio(), paths.kl(), paths.running_cost]
    return out


def solved(problem: sc.ControlProblem, method: Any, **options: Any) -> dict[str, Any]:
    """Solve, evaluate, sample, save and load."""
    trains = not (isinstance(method, sc.Method) and method.default_iterations == 0)
    settings: dict[str, Any] = {"time_steps": steps_of(problem), "batch_size": BATCH, "seed": 5, "progress": False}
    if trains:
        settings["iterations"] = 2
    again = {name: options.pop(name) for name in ("loaded_control", "loaded_value") if name in options}
    solution = sc.solve(problem, method, **{**settings, **options})
    out = of_solution(solution)
    with tempfile.TemporaryDirectory() as folder:
        solution.save(folder)
        out["file"] = file_of(Path(folder))
        loaded = sc.load(folder, problem, again.get("loaded_control"), again.get("loaded_value"))
    before, after = flat(out), flat(of_solution(loaded, brief=True))
    out["changed by loading"] = ", ".join(name for name in after if after[name] != before.get(name))
    return out


METHODS: dict[str, Callable[[], Any]] = {
    "reward-backprop": sc.RewardBackprop,
    "reward-backprop/checkpoint": lambda: sc.RewardBackprop("checkpoint"),
    "reward-backprop/adjoint": lambda: sc.RewardBackprop("adjoint"),
    "reward-backprop/random": lambda: sc.RewardBackprop("random"),
    "reward-backprop/last-2": lambda: sc.RewardBackprop(2),
    "reward-backprop/continuous-adjoint": lambda: sc.RewardBackprop("continuous-adjoint"),
    "reward-backprop/reversible-heun": lambda: sc.RewardBackprop("reversible-heun"),
    "adjoint-matching": sc.AdjointMatching,
    "adjoint-matching/plain": lambda: sc.AdjointMatching(zero_variance=False, pairing="continuous", steps=2),
    "adjoint-matching/squares": lambda: sc.AdjointMatching(huber=None),
    "adjoint-matching/reciprocal": lambda: sc.AdjointMatching(reciprocal=True, buffer_size=64, refresh=2),
    "socm": sc.SOCM,
    "socm/full": lambda: sc.SOCM("full", trust_region=None),
    "socm/adjoint": lambda: sc.SOCM("adjoint", weighted=False, steps=2),
    "log-variance": sc.LogVariance,
    "log-variance/steps": lambda: sc.LogVariance(steps=2),
    "log-variance/reference": lambda: sc.LogVariance(paths="reference", group_size=4),
    "path-consistency": sc.PathConsistency,
    "path-consistency/n-1": lambda: sc.PathConsistency(1),
    "path-consistency/n-2": lambda: sc.PathConsistency(2, replay=2),
    "path-consistency/reference": lambda: sc.PathConsistency("all", paths="reference"),
    "cross-entropy": sc.CrossEntropy,
    "cross-entropy/trust": lambda: sc.CrossEntropy(trust_region=0.5, steps=2),
    "cross-entropy/reference": lambda: sc.CrossEntropy("reference", group_size=4),
    "reward-weighted-mle": sc.RewardWeightedMLE,
    "reward-weighted-mle/none": lambda: sc.RewardWeightedMLE("none"),
    "reinforce": sc.Reinforce,
    "reinforce/none": lambda: sc.Reinforce("none", steps=2),
    "soft-ppo": lambda: sc.SoftPPO(epochs=2),
    "soft-ppo/per-time": lambda: sc.SoftPPO(epochs=2, minibatches=2, baseline="per-time", steps=2),
    "soft-ppo/groups": lambda: sc.SoftPPO(epochs=2, baseline="batch", group_size=4),
    "bridge-matching": sc.BridgeMatching,
    "bridge-matching/reference": lambda: sc.BridgeMatching("reference", 0.5),
    "bridge-matching/reinforce": lambda: sc.BridgeMatching(target="reinforce", steps=2),
    "bridge-matching/simple": lambda: sc.BridgeMatching(target="reinforce", path_cost=False, normalise=True),
    "bridge-matching/adjoint": lambda: sc.BridgeMatching(target="adjoint"),
    "particle-matching": lambda: sc.ParticleMatching(64, 2),
    "value-guidance": sc.ValueGuidance,
    "value-guidance/soft-q": lambda: sc.ValueGuidance("soft-q", 0.3),
    "value-guidance/tweedie": lambda: sc.ValueGuidance("tweedie"),
    "path-integral-guidance": lambda: sc.PathIntegralGuidance(16),
    "path-integral-guidance/antithetic": lambda: sc.PathIntegralGuidance(16, None, True, False),
    "smc": lambda: sc.SMC(16),
    "smc/tweedie": lambda: sc.SMC(16, twist="tweedie", ess_threshold=1.0, resampling="stratified"),
    "smc/method": lambda: sc.SMC(16, sc.CrossEntropy(), resampling="multinomial", independent=True),
    "smc/guided": lambda: sc.SMC(16, sc.ValueGuidance("tweedie"), twist="proposal"),
    "tempered-smc": lambda: sc.TemperedSMC(64),
    "tempered-smc/noises": lambda: sc.TemperedSMC(32, "noises", gradient=True),
    "best-of-n": lambda: sc.BestOfN(4),
    "best-of-n/softmax": lambda: sc.BestOfN(4, "softmax"),
    "best-of-n/rejection": lambda: sc.BestOfN(8, "rejection", bound=2.0),
    "auto": lambda: sc.Auto(64, 200_000, 4),
    "mala": lambda: sc.MALA(16, 20, 1),
    "hmc": lambda: sc.HMC(16, 20, None, leapfrog_steps=3),
    "nuts": lambda: sc.NUTS(2, 20, 1, max_tree_depth=3),
}


_OTHERS = (
    "lq scalar lq-controlled by-state matrix observed mixture-flow model-noise model-velocity chain-ddpm chain-ddim "
    "chain-condition gibbs annealed annealed-condition"
)
_FEW = "lq scalar lq-controlled observed model-noise chain-ddim gibbs annealed"  # for the variants of a method
_MODELS = "mixture-flow mixture-controlled model-noise model-velocity chain-ddpm chain-condition"
_BRIDGES = "lq-no-cost observed mixture-flow model-noise gibbs gibbs-brownian gibbs-condition"
_DENSITIES = "gibbs gibbs-pilot annealed"
_ANNEALED = {"annealed", "annealed-condition", "annealed-plain"}
#: methods with problems of their own, by the beginnings of their names
_OWN = {
    "adjoint-matching/reciprocal": "lq-no-cost gibbs gibbs-brownian gibbs-pilot",
    "socm/adjoint": "lq scalar lq-controlled observed mixture-flow model-noise model-velocity chain-ddim gibbs",
    "socm": "lq scalar lq-controlled observed mixture-flow model-noise gibbs",
    "bridge-matching/reference": _BRIDGES,
    "bridge-matching/": "mixture-flow model-noise chain-ddpm chain-condition",  # those that noise ends anew
    "bridge-matching": _BRIDGES,
    "particle-matching": "lq scalar lq-controlled by-state mixture-flow model-velocity chain-ddim gibbs gibbs-brownian",
    "value-guidance/tweedie": _MODELS,
    "smc/tweedie": _MODELS,
    "smc/guided": _MODELS,
    "tempered-smc/noises": "lq lq-controlled gibbs",
    "tempered-smc": "lq scalar lq-controlled model-velocity gibbs gibbs-hard annealed",
    "best-of-n/rejection": "lq scalar lq-controlled observed mixture-flow",
    "auto": "gibbs gibbs-pilot gibbs-black-box",
    "mala": _DENSITIES,
    "hmc": _DENSITIES,
    "nuts": "gibbs",
}
#: methods that take the annealed reference
_TAKE_ANNEALED = re.compile(
    r"(reward-backprop(/checkpoint|/adjoint|/random|/last-2)?|log-variance.*|path-consistency(/reference)?|reinforce.*|smc|"
    r"best-of-n(/softmax)?|tempered-smc|mala|hmc)$"
)
#: adjoint equations in continuous time are for Euler chains alone
_EULER = re.compile(r"reward-backprop/(continuous-adjoint|reversible-heun)")
#: what else a few methods do on one problem
_MORE = {
    "reward-backprop": "lq-float32 scalar-float32 wide-controlled narrow-controlled matrix-by-state matrix-by-time "
    "diagonal semilinear image no-reward mixture-ve mixture-memoryless mixture-level model-score model-v model-sample "
    "model-condition chain-sample chain-v chain-fixed gibbs-float32 gibbs-brownian gibbs-pilot gibbs-hard "
    "gibbs-condition annealed-plain lq-fixed number-by-time",
    "adjoint-matching": "lq-float32 wide-controlled narrow-controlled matrix-by-state matrix-by-time diagonal "
    "semilinear image mixture-memoryless model-score model-v model-condition chain-sample chain-v gibbs-float32 "
    "gibbs-condition lq-fixed gibbs-brownian",
    "log-variance": "lq-float32 wide-controlled narrow-controlled lq-fixed black-box image model-v model-condition "
    "chain-v gibbs-black-box gibbs-condition annealed-plain",
    "soft-ppo": "lq-float32 black-box image model-v chain-v gibbs-black-box gibbs-condition",
    "cross-entropy": "lq-fixed black-box matrix-by-state semilinear image chain-v gibbs-black-box",
    "smc": "lq-fixed black-box matrix-by-state image model-v chain-v gibbs-black-box annealed-plain",
    "path-consistency/n-1": "lq-fixed image chain-v gibbs-condition",
    "reward-weighted-mle": "lq-fixed image chain-v",
    "value-guidance": "lq-fixed image chain-v gibbs-condition",
    "path-integral-guidance": "lq-fixed black-box image chain-v",
    "socm": "lq-float32 diagonal semilinear number-by-time",
}


def problems_of(method: str) -> list[str]:
    own = next((names for start, names in _OWN.items() if method.startswith(start)), None)
    names = (own if own is not None else _FEW if "/" in method else _OTHERS).split()
    if own is None and not _TAKE_ANNEALED.match(method):
        names = [name for name in names if name not in _ANNEALED]
    if _EULER.match(method):
        names = [name for name in names if not name.startswith(("chain", "gibbs"))]
    if method in _MORE:
        names += [name for name in _MORE[method].split() if name not in names]
    return names


def _methods() -> None:
    for method, make in METHODS.items():
        for name in problems_of(method):
            CASES[f"solve/{method}/{name}"] = lambda name=name, make=make: solved(PROBLEMS[name](), make())
    schemes = (
        ("exact", "lq reward-backprop adjoint-matching socm log-variance smc tempered-smc"),
        ("exact", "lq-controlled reward-backprop adjoint-matching soft-ppo cross-entropy"),
        ("exponential", "semilinear reward-backprop adjoint-matching log-variance socm"),
        ("exponential", "model-noise reward-backprop/adjoint adjoint-matching log-variance value-guidance/tweedie"),
        ("exponential", "mixture-controlled reward-backprop adjoint-matching"),
        ("euler", "gibbs reward-backprop reward-backprop/continuous-adjoint log-variance"),
        ("euler", "annealed reward-backprop log-variance"),
    )
    for scheme, words in schemes:
        name, *methods = words.split()
        for m in methods:
            CASES[f"solve/{m}/{scheme}/{name}"] = lambda m=m, n=name, s=scheme: solved(
                PROBLEMS[n](), METHODS[m](), scheme=s
            )
    refused = (
        "adjoint-matching/annealed cross-entropy/annealed soft-ppo/annealed adjoint-matching/black-box "
        "adjoint-matching/reciprocal/lq bridge-matching/lq auto/lq mala/lq tempered-smc/observed "
        "particle-matching/observed value-guidance/tweedie/lq value-guidance/tweedie/chain-ddim socm/by-state "
        "reward-backprop/black-box reward-backprop/reversible-heun/chain-ddpm"
    )
    for words in refused.split():
        method, name = words.rsplit("/", 1)
        REFUSED.add(f"refused/{words}")
        CASES[f"refused/{words}"] = lambda m=method, n=name: solved(PROBLEMS[n](), METHODS[m]())


_methods()

# ---------------------------------------------------------------- further ways to solve


class Affine(nn.Module):
    """A user's own control, linear in x and in time."""

    def __init__(self, dim: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * normal(dim, dim, seed=1))
        self.bias = nn.Parameter(0.3 * normal(dim, seed=2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x @ self.weight.mT) * (1 + t.unsqueeze(1)) + self.bias


class Noted(Callback):
    """The events of a run, in order."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_train_begin(self, state: Any) -> None:
        self.events.append(("begin", state.iteration, state.iterations))

    def on_step_end(self, state: Any) -> None:
        sample = state.solution().sample(4, seed=1)
        self.events.append(("step", state.iteration, state.metrics, sample))

    def on_evaluate(self, state: Any) -> None:
        self.events.append(("evaluate", state.iteration, state.evaluation.as_dict()))

    def on_save(self, state: Any) -> None:
        self.events.append(("save", state.iteration))

    def on_train_end(self, state: Any) -> None:
        self.events.append(("end", state.iteration))


WAYS: dict[str, Callable[[], Any]] = {
    "accumulate": lambda: solved(plain(), sc.RewardBackprop(), accumulate=2, learning_rate=0.02),
    "accumulate-ppo": lambda: solved(plain(), sc.SoftPPO(epochs=2, minibatches=2), accumulate=2),
    "accumulate-adjoint": lambda: solved(lq(), sc.AdjointMatching(), accumulate=2),
    "optimizer": lambda: solved(
        lq(), sc.LogVariance(), optimizer=lambda p: torch.optim.SGD(p, 0.05), learning_rate=0.05, iterations=3
    ),
    "optimizer-adjoint": lambda: solved(plain(), sc.AdjointMatching(), optimizer=torch.optim.Adam, iterations=3),
    "no-annealing": lambda: solved(plain(reward=lambda x: 40 * well(x)), sc.LogVariance(), anneal=False, iterations=3),
    "annealing": lambda: solved(plain(reward=lambda x: 40 * well(x)), sc.LogVariance(), iterations=12),
    "annealing-gibbs": lambda: solved(gibbs(scale=6.0), sc.RewardBackprop(), iterations=12),
    "many-iterations": lambda: solved(lq(), sc.AdjointMatching(), iterations=40),
    "many-iterations-nonlinear": lambda: solved(plain(), sc.AdjointMatching(), iterations=25),
    "many-iterations-ppo": lambda: solved(plain(), sc.SoftPPO(epochs=2), iterations=15),
    "many-iterations-socm": lambda: solved(plain(), sc.SOCM(), iterations=25),
    "many-iterations-particles": lambda: solved(gibbs(), sc.ParticleMatching(128, 5), iterations=12),
    "many-iterations-auto": lambda: solved(gibbs(), sc.Auto(256, 400_000, 8), iterations=4),
    "taken-back": lambda: solved(plain(), sc.AdjointMatching(), learning_rate=3.0, iterations=12),
    "name": lambda: solved(lq(), "log-variance"),
    "own-control": lambda: solved(plain(), sc.RewardBackprop(), control=Affine(), loaded_control=Affine()),
    "own-control-adjoint": lambda: solved(lq(), sc.AdjointMatching(), control=Affine(), loaded_control=Affine()),
    "own-control-annealed": lambda: solved(
        gibbs("annealed"), sc.LogVariance(), control=Affine(), loaded_control=Affine()
    ),
    "own-control-ppo": lambda: solved(gibbs(), sc.SoftPPO(epochs=2), control=Affine(), loaded_control=Affine()),
    "own-control-learned-start": lambda: solved(
        lq(start="controlled"), "cross-entropy", control=Affine(), loaded_control=Affine()
    ),
    "reward-batch-size": lambda: solved(plain(reward_batch_size=10), sc.RewardBackprop()),
    "grid": lambda: solved(lq(), sc.AdjointMatching(), time_steps=[0.0, 0.1, 0.3, 0.6, 1.2]),
    "grid-model": lambda: solved(model_problem(sc.VP(), "noise"), sc.RewardBackprop(), time_steps=[0.0, 0.5, 0.8, 1.0]),
    "until-good": lambda: solved(lq(), sc.AdjointMatching(), iterations=None, tolerance=0.5),
    "until-still": lambda: solved(lq(F32), sc.LogVariance(), iterations=260, tolerance=0.01),
}
for _name, _way in WAYS.items():
    CASES[f"way/{_name}"] = _way


@case("way/callbacks")
def _callbacks() -> Any:
    noted = Noted()
    with tempfile.TemporaryDirectory() as folder:
        sc.solve(
            lq(),
            "log-variance",
            time_steps=STEPS,
            iterations=3,
            batch_size=BATCH,
            seed=5,
            callbacks=[noted],
            checkpoint_dir=folder,
            checkpoint_every=2,
            progress=False,
        )
    return noted.events


@case("way/proposals")
def _proposals() -> Any:
    """Paths, particles and candidates of a solution or a function."""
    problem = lq()
    given: dict[str, Any] = {"time_steps": STEPS, "batch_size": BATCH, "seed": 5, "progress": False}
    first = sc.solve(problem, sc.RewardBackprop(), iterations=3, **given)
    control = push(problem)
    trained = (
        sc.LogVariance(paths=first),
        sc.PathConsistency("all", paths=control),
        sc.PathConsistency("all", paths=first),
        sc.PathConsistency(1, paths=control),
        sc.CrossEntropy(first, 1.0),
        sc.CrossEntropy(control),
    )
    untrained = (
        sc.SMC(16, first),
        sc.SMC(16, control, lambda x, t: -0.2 * x.square().sum(1)),
        sc.BestOfN(4, "softmax", proposal=first),
        sc.BestOfN(4, proposal=control),
        sc.PathIntegralGuidance(16, first),
        sc.PathIntegralGuidance(16, control, True),
        sc.TemperedSMC(32, proposal=first),
        sc.ValueGuidance(lambda x, t: -0.2 * (1 - t) * x.square().sum(1)),
    )
    out = [of_solution(sc.solve(problem, m, iterations=2, **given), brief=True) for m in trained]
    return out + [of_solution(sc.solve(problem, m, **given), brief=True) for m in untrained]


@case("way/bridges-of-a-solution")
def _bridge_proposals() -> Any:
    problem = lq(running=False)
    given: dict[str, Any] = {"time_steps": STEPS, "batch_size": BATCH, "seed": 5, "progress": False, "iterations": 2}
    first = sc.solve(problem, sc.RewardBackprop(), **given)
    return [of_solution(sc.solve(problem, sc.BridgeMatching(p), **given)) for p in (first, push(problem))]


@case("way/a-given-value-saved")
def _given_value() -> Any:
    value = lambda x, t: -0.2 * (1 - t) * x.square().sum(1)  # noqa: E731
    guided = solved(lq(), sc.ValueGuidance(value), loaded_value=value)
    return [guided, solved(lq(), sc.SMC(16, twist=value), loaded_value=value)]


RESUMED = {
    "reward-backprop": "lq model-noise annealed",
    "adjoint-matching": "lq chain-ddpm",
    "adjoint-matching/reciprocal": "lq-no-cost gibbs-pilot",
    "socm/full": "lq",
    "log-variance": "scalar lq-controlled",
    "log-variance/moment": "observed",
    "path-consistency/n-1": "scalar",
    "path-consistency/n-2": "lq-controlled",
    "cross-entropy": "chain-ddim",
    "soft-ppo": "scalar",
    "value-guidance/soft-q": "lq",
    "particle-matching": "gibbs lq",
    "reward-weighted-mle": "lq",
    "auto": "gibbs",
    "smc/method": "lq",
}


class _Interrupt(Callback):
    def on_step_end(self, state: Any) -> None:
        if state.iteration == 2:
            raise KeyboardInterrupt


def resumed(problem: sc.ControlProblem, method: sc.Method) -> Any:
    """4 iterations at once, and interrupted after 2 of them and resumed."""
    given: dict[str, Any] = {
        "time_steps": steps_of(problem),
        "batch_size": BATCH,
        "seed": 5,
        "progress": False,
        "checkpoint_every": 2,
    }
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        whole = sc.solve(problem, method, iterations=4, checkpoint_dir=one, **given)
        with contextlib.suppress(KeyboardInterrupt):
            sc.solve(problem, method, iterations=4, checkpoint_dir=two, callbacks=[_Interrupt()], **given)
        again = sc.solve(problem, method, iterations=4, checkpoint_dir=two, resume=True, **given)
        newest = max(Path(one).glob("*.safetensors"), key=lambda p: p.name)
        files = [re.sub(r"-[0-9a-f]{12}", "", p.name) for p in sorted(Path(two).iterdir())]
        tensors = load_file(newest)
    out = of_solution(whole)
    before, after = flat(out), flat(of_solution(again, brief=True))
    changed = ", ".join(name for name in after if after[name] != before.get(name))
    out |= {"changed by resuming": changed, "files": files}
    names = sorted(tensors)
    return {**out, "names": ", ".join(names), "tensors": [tensors[n] for n in names]}


for _method, _names in RESUMED.items():
    for _name in _names.split():
        CASES[f"resume/{_method}/{_name}"] = lambda m=_method, n=_name: resumed(PROBLEMS[n](), METHODS[m]())


# ---------------------------------------------------------------- guidance by classifiers


def classify(x: Tensor) -> Tensor:
    return 1.5 * x @ torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.8, -1.0]], dtype=x.dtype)


@case("guidance/classifier")
def _classifier() -> Any:
    reward = sc.LogProb(classify, 1)
    noisy = lambda x, s: classify(x) * (1 - s).unsqueeze(1)  # noqa: E731
    own = mixture_problem(reward=sc.LogProb(classify, None), condition=labels)
    return [
        solved(mixture_problem(reward=reward), sc.ClassifierGuidance(), loaded_value=classify),
        solved(mixture_problem(reward=reward), sc.ClassifierGuidance(noisy, 2, True), loaded_value=noisy),
        solved(own, sc.ClassifierGuidance(classify), loaded_value=classify),
        solved(chain_problem(dtype=F64, reward=reward), sc.ClassifierGuidance(classify, 0), loaded_value=classify),
        solved(mixture_problem(reward=reward), sc.SMC(16, sc.ClassifierGuidance(), "proposal"), loaded_value=classify),
    ]


@case("guidance/classifier-free")
def _classifier_free() -> Any:
    given: dict[str, Any] = {"time_steps": STEPS, "batch_size": BATCH, "seed": 5, "progress": False}
    net, out = LabelledNet(2, seed=4), []
    for problem in (model_problem(sc.VP(), "noise"), model_problem(sc.FlowMatching(), "velocity", reward=None)):
        for weight in (0.0, 1.5):
            method = sc.ClassifierFreeGuidance(net, weight, 1)
            out.append(of_solution(sc.solve(problem, method, **given)))
    out.append(
        of_solution(sc.solve(PROBLEMS["model-noise"](), sc.SMC(16, sc.ClassifierFreeGuidance(net, 1.0, 2)), **given))
    )
    chain = sc.ClassifierFreeGuidance(LabelledNet(2, seed=4, unit=20.0), 1.0, 1)
    return [*out, of_solution(sc.solve(chain_problem(), chain, **{**given, "time_steps": None}))]


# ---------------------------------------------------------------- exact solutions


def of_exact(exact: Any, times: Sequence[float] | None = None, bridge: bool = True) -> dict[str, Any]:
    problem = exact.problem
    x = 0.6 * normal(5, *problem.event_shape, seed=8, dtype=problem.dtype)
    end = problem.horizon
    out: dict[str, Any] = {
        "settings": {
            k: v if v is None or isinstance(v, (str, int)) else list(map(float, v)) for k, v in exact.settings.items()
        },
        "repr": repr(exact),
        "numbers": [exact.log_z, exact.start_log_z],
        "sample": exact.sample(SAMPLES, seed=3),
        "weighted": exact.weighted_sample(SAMPLES, seed=4),
        "evaluate": exact.evaluate(PATHS, seed=5).as_dict(),
        "error": getattr(exact, "error", None),
    }
    with contextlib.suppress(sc.NoExactSolution):
        out["elbo"] = [exact.elbo, exact.floor]
    for t in times or (0.0, 0.25 * end, 0.5 * end, 0.75 * end):
        out[f"value at {t:g}"], out[f"control at {t:g}"] = exact.value(x, t), exact.control(x, t)
        law = exact.marginal(t)
        out[f"marginal at {t:g}"] = [law.mean, getattr(law, "covariance_matrix", None)]
    if bridge:
        law = exact.bridge(0.25 * end, 0.75 * end, x)
        out["bridge"] = [law.mean, law.covariance_matrix]
    if exact.chain is not None:
        law = exact.kernel(x, 1)
        out["kernel"] = [law.mean, law.covariance_matrix]
    paths = sc.simulate(problem, SAMPLES, exact.control, None if exact.chain else STEPS, seed=6)
    return {**out, "paths": [paths.end, paths.log_ratio()]}


def one(**options: Any) -> sc.ControlProblem:
    """A nonlinear reward of one coordinate, whose solution is on a grid."""
    A, sigma, offset = (torch.tensor(v, dtype=F64) for v in ([[-0.7]], [[0.9]], [0.2]))
    sde = sc.LinearSDE(A, sigma, offset)
    start = options.pop("initial", sc.Dirac(torch.tensor([0.3], dtype=F64)))
    bumps = lambda x: -1.5 * ((x**2 - 1) ** 2).sum(-1) + 0.4 * torch.sin(3 * x).sum(-1)  # noqa: E731
    return sc.ControlProblem(sde, start, options.pop("reward", bumps), alpha=0.8, **options)


def apart() -> sc.ControlProblem:
    """Two coordinates that do not act on each other."""
    sde = sc.SDE(lambda x, t: x - x**3, torch.tensor([0.8, 0.6], dtype=F64), 2, 0.5)
    return sc.ControlProblem(sde, sc.Dirac(torch.tensor([0.3, -0.2], dtype=F64)), well, alpha=0.7)


EXACT: dict[str, Callable[[], Any]] = {
    "continuous": lambda: of_exact(sc.exact_solution(lq())),
    "continuous-float32": lambda: of_exact(sc.exact_solution(lq(F32))),
    "continuous-controlled": lambda: of_exact(sc.exact_solution(lq(start="controlled")), (-1.0, -0.4, 0.0, 0.7)),
    "continuous-fixed": lambda: of_exact(sc.exact_solution(lq(start="fixed"))),
    "continuous-no-cost": lambda: of_exact(sc.exact_solution(lq(running=False))),
    "chain": lambda: of_exact(sc.exact_solution(lq(), STEPS)),
    "chain-exact-scheme": lambda: of_exact(sc.exact_solution(lq(), STEPS, scheme="exact")),
    "chain-grid-of-times": lambda: of_exact(sc.exact_solution(lq(), [0.0, 0.3, 0.6, 0.9, 1.2])),
    "chain-controlled": lambda: of_exact(sc.exact_solution(lq(start="controlled"), STEPS), (-1.0, -0.4, 0.0, 0.6)),
    "chain-fixed": lambda: of_exact(sc.exact_solution(lq(start="fixed"), STEPS)),
    "mixture": lambda: of_exact(sc.exact_solution(mixture_problem())),
    "mixture-flow": lambda: of_exact(sc.exact_solution(mixture_problem(sc.FlowMatching()))),
    "mixture-controlled": lambda: of_exact(sc.exact_solution(PROBLEMS["mixture-controlled"]()), (-1.0, -0.4, 0.0, 0.7)),
    "mixture-ve": lambda: of_exact(sc.exact_solution(mixture_problem(sc.VE(0.05, 6.0)))),
    "mixture-one": lambda: of_exact(
        sc.exact_solution(
            sc.ControlProblem(
                sc.generative_sde(mixture(components=1), sc.VP()), reward=sc.Linear(torch.tensor([0.5, 0.2], dtype=F64))
            ),
            STEPS,
        )
    ),
    "inverse": lambda: of_exact(sc.exact_solution(sc.library.mixture_inverse_problem(1, 0, 2))),
}
for _name, _way in EXACT.items():
    CASES[f"exact/{_name}"] = _way


def of_grid(exact: Any, times: Sequence[float]) -> Any:
    x = torch.linspace(-0.8, 0.9, 5, dtype=F64)[:, None].expand(5, exact.problem.event_shape[0]).contiguous()
    out: dict[str, Any] = {"log_z": exact.log_z, "start": exact.start_log_z, "error": exact.error, "repr": repr(exact)}
    out |= {f"at {t:g}": [exact.value(x, t), exact.control(x, t)] for t in times}
    if exact.chain is not None:
        out["sample"] = exact.sample(SAMPLES, seed=3)
    return {**out, "evaluate": exact.evaluate(PATHS, seed=5).as_dict()}


def pair() -> sc.ControlProblem:
    """Two coordinates that act on each other."""
    sde = sc.SDE(lambda x, t: -x + 0.3 * x.flip(1), 0.7, 2, 0.3)
    reward = lambda x: well(x) + 0.3 * x.prod(1)  # noqa: E731
    return sc.ControlProblem(sde, sc.Dirac(torch.tensor([0.3, -0.2], dtype=F64)), reward, alpha=1.5)


GRIDS: dict[str, Callable[[], Any]] = {
    "one": lambda: of_grid(sc.exact_solution(one()), (0.0, 0.3, 0.9)),
    "one-cost": lambda: of_grid(sc.exact_solution(one(running_cost=cost)), (0.0, 0.3)),
    "one-controlled": lambda: of_grid(
        sc.exact_solution(one(initial=sc.Gaussian(torch.tensor([0.3], dtype=F64), 0.4), start="controlled")),
        (-1.0, 0.0, 0.5),
    ),
    "one-chain": lambda: of_grid(sc.exact_solution(one(), STEPS), (0.0, 0.5)),
    "apart": lambda: of_grid(sc.exact_solution(apart()), (0.0, 0.2)),
    "pair": lambda: of_grid(sc.exact_solution(pair()), (0.0, 0.1)),
    "apart-chain": lambda: of_grid(sc.exact_solution(apart(), STEPS), (0.0, 0.25)),
}
for _name, _way in GRIDS.items():
    CASES[f"exact/grid/{_name}"] = _way


@case("exact/control-error")
def _control_error() -> Any:
    given: dict[str, Any] = {"time_steps": STEPS, "iterations": 3, "batch_size": BATCH, "seed": 5, "progress": False}
    out = []
    for problem in (lq(), lq(start="controlled"), mixture_problem()):
        solution = sc.solve(problem, sc.AdjointMatching(), **given)
        out.append(sc.control_error(solution, sc.exact_solution(problem), PATHS))
        if not problem.reference.pretrained:
            out.append(sc.control_error(solution, sc.exact_solution(problem, like=solution), PATHS, seed=3))
    return out


for _words in ("observed", "annealed", "chain-ddpm", "scalar"):
    REFUSED.add(f"refused/exact/{_words}")
    CASES[f"refused/exact/{_words}"] = lambda n=_words: repr(sc.exact_solution(PROBLEMS[n](), grids=False))


# ---------------------------------------------------------------- certificates, comparison, advice


@case("certify")
def _certify() -> Any:
    given: dict[str, Any] = {"time_steps": STEPS, "batch_size": BATCH, "seed": 5, "progress": False}
    modes = torch.tensor([[-1.5, 0.5], [1.0, -0.5], [0.5, 2.0]], dtype=F64)
    problem, linear = gibbs(), lq(running=False)
    found = [sc.solve(problem, m, iterations=3, **given) for m in ("reward-backprop", sc.ParticleMatching(64, 2))]
    own = sc.solve(linear, sc.AdjointMatching(), iterations=3, **given)
    truth = sc.exact_solution(linear, like=own).sample(64, seed=2)
    out = [sc.certify(s, modes=modes, n=PATHS, seed=1) for s in found]
    out += [sc.certify(own, truth, n=PATHS, seed=1), sc.certify(own, n=PATHS, seed=1)]
    annealed = sc.solve(gibbs("annealed"), "reward-backprop", iterations=2, **given)
    out.append(sc.certify(annealed, n=PATHS, seed=1))
    return [[c.as_dict(), str(c), c.collapsed] for c in out]


@case("compare")
def _compare() -> Any:
    out = []
    for problem, methods in (
        (lq(), ["adjoint-matching", sc.SMC(16), sc.SoftPPO(epochs=1), sc.BridgeMatching()]),
        (mixture_problem(), {"first": sc.RewardBackprop(), "second": sc.BestOfN(4)}),
        (gibbs("annealed"), ["log-variance", sc.TemperedSMC(64)]),
    ):
        made = sc.compare(problem, methods, seeds=1, seed=3, time_steps=STEPS, iterations=2, batch_size=BATCH, n=PATHS)
        out += [[row.as_dict() for row in made.rows], made.as_dict(), [r.failed for r in made.rows], made.frontier]
        out.append([made.exact, made.distance_floor, made.seeds, made.notes()])
    return out


@case("recommend")
def _recommend() -> Any:
    names = [n for n in PROBLEMS if not n.startswith(("number", "gibbs-float", "mixture-float"))]
    out: dict[str, Any] = {}
    for name in names:
        problem = PROBLEMS[name]()
        advice = sc.recommend(problem, time_steps=steps_of(problem), batch_size=BATCH)
        out[name] = [str(advice), [repr(m) for m in advice.methods]]
    out["one-off"] = str(sc.recommend(mixture_problem(), one_off=True))
    return out


@case("callable/metrics")
def _metrics() -> Any:
    a, b, w = normal(40, 2, seed=1), 0.8 * normal(30, 2, seed=2) + 0.3, normal(40, seed=3)
    modes = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=F64)
    return {
        "wasserstein": [sc.metrics.wasserstein(a, b), sc.metrics.wasserstein(a, b, w)],
        "sinkhorn": sc.metrics.sinkhorn(a, b),
        "sliced": [
            sc.metrics.sliced_wasserstein(a, b, directions=50),
            sc.metrics.sliced_wasserstein(a, b, order=2, seed=1, log_weights_a=w),
        ],
        "mmd": [sc.metrics.mmd(a, b), sc.metrics.mmd(a, b, 0.7, w)],
        "energy": [sc.metrics.energy_wasserstein(a, b, density), sc.metrics.energy_wasserstein(a, b, density, w)],
        "coverage": [
            sc.metrics.mode_coverage(a, modes, radius=1.0),
            sc.metrics.mode_coverage(a, modes, log_weights=w, weights=modes[:, 1] + 1),
        ],
    }


# ---------------------------------------------------------------- likelihoods, divergences, training of references


@case("log-likelihood")
def _log_likelihood() -> Any:
    x = 0.7 * normal(6, 2, seed=2)
    network = model_problem(sc.VP(), "noise", F64)
    labelled = model_problem(sc.VP(), "noise", F64, condition=labels)
    return [
        sc.log_likelihood(mixture_problem(), x),
        sc.log_likelihood(network, x, tolerance=1e-3),
        sc.log_likelihood(network, x, divergence="hutchinson", probes=4, seed=3, tolerance=1e-3),
        sc.log_likelihood(labelled, x, condition=labels(6), tolerance=1e-3),
        sc.log_likelihood(PROBLEMS["model-velocity"](), x.float(), tolerance=1e-3),
    ]


@case("f-divergence")
def _f_divergence() -> Any:
    base = lq(running=False)
    samples = sc.simulate(base, 256, None, STEPS, seed=1, keep="end").samples
    out = []
    options: list[tuple[Any, dict[str, Any]]] = [(n, {}) for n in ("kl", "reverse-kl", "hellinger", "jensen-shannon")]
    options += [
        ("alpha-divergence", {"order": 0.3}),
        ("chi-squared", {"floor": -10.0}),
        (lambda y: (1 + 0.5 * y).clamp(min=0.0), {"floor": -20.0}),
    ]
    for phi, more in options:
        reward = sc.FDivergence(well, phi, alpha=0.5, samples=samples, **more)
        facts = [reward.multiplier, reward.multiplier_stderr, reward.normalisation_stderr, reward.clipped]
        out.append([*facts, reward(samples)])
        if phi in ("chi-squared", "hellinger"):
            problem = sc.ControlProblem(base.reference, base.initial, reward, alpha=0.5)
            out.append(solved(problem, sc.RewardBackprop()))
    return out


def _data() -> Tensor:
    return mixture(F32).sample((64,))


@case("fit-score")
def _fit_score() -> Any:
    torch.manual_seed(4)
    data, x = _data(), normal(5, 2, seed=1, dtype=F32)
    options: dict[str, Any] = {"iterations": 3, "batch_size": BATCH, "seed": 2, "progress": False}
    out: list[Any] = []
    kinds = [
        (sc.VP(), "noise"),
        (sc.FlowMatching(), "velocity"),
        (sc.VE(0.05, 6.0), "score"),
        (sc.CosineVP(), "v"),
        (sc.VP(), "sample"),
    ]
    for schedule, prediction in kinds:
        model = sc.fit_score(data, schedule, prediction, **options)
        out.append([model(x, torch.linspace(0.1, 0.9, 5)), list(model.parameters())])
    own = sc.fit_score(data, sc.VP(), model=Net(2), **options)
    out.append([own(x, torch.linspace(0.1, 0.9, 5)), list(own.parameters())])
    labelled = sc.fit_score(data, sc.VP(), condition=torch.arange(64) % 3, drop=0.2, **options)
    out += [labelled(x, torch.full((5,), 0.4), torch.arange(5) % 3), labelled(x, torch.full((5,), 0.4))]
    out.append(
        solved(
            sc.ControlProblem(sc.generative_sde(own, sc.VP(), shape=(2,)), reward=well), sc.RewardBackprop("adjoint")
        )
    )
    return out


@case("fit-bridge")
def _fit_bridge() -> Any:
    torch.manual_seed(4)
    data, x = _data(), normal(5, 2, seed=1, dtype=F32)
    options: dict[str, Any] = {"iterations": 3, "batch_size": BATCH, "seed": 2, "progress": False}
    ou = sc.OrnsteinUhlenbeck(2, 0.7, torch.eye(2), horizon=1.0)
    made = [
        sc.fit_bridge(data, sc.BrownianMotion(2, torch.eye(2)), sc.Gaussian(torch.zeros(2), 1.0), **options),
        sc.fit_bridge(data, ou, sc.Dirac(torch.zeros(2)), **options),
        sc.fit_bridge(data, sc.FlowMatching(), **options),
        sc.fit_bridge(data, sc.FlowMatching(), model=Net(2), **options),
    ]
    with torch.no_grad():
        out: list[Any] = [[m(x, torch.linspace(0.1, 0.9, 5)), list(m.parameters())] for m in made]
    learned = sc.SDE(made[0], torch.eye(2), dim=2, horizon=1.0)
    problem = sc.ControlProblem(learned, sc.Gaussian(torch.zeros(2), 1.0), well)
    return [*out, solved(problem, sc.RewardBackprop()), solved(problem, sc.AdjointMatching())]


# ---------------------------------------------------------------- laws, processes, the library


@case("laws")
def _laws() -> Any:
    x = normal(5, 2, seed=1)
    law, spread = mixture(), torch.tensor([[0.5, 0.1], [0.1, 0.3]], dtype=F64)
    out: list[Any] = []
    for made in (
        sc.Gaussian(x[0], spread),
        sc.Gaussian(x[0], 0.4),
        sc.Gaussian(x[0], spread.diagonal()),
        law,
        law.noised(0.6, 0.8),
    ):
        torch.manual_seed(3)
        out.append(
            [made.sample((7,)), made.log_prob(x), made.mean, made.variance, getattr(made, "covariance_matrix", None)]
        )
    out += [
        law.score(x),
        law.log_prob_and_score(x),
        law.responsibilities(x),
        law.entropy() if hasattr(law, "log_z") else None,
    ]
    return [*out, sc.Dirac(x[0]).sample((3,))]


@case("schedules")
def _schedules() -> Any:
    s = torch.tensor([0.01, 0.2, 0.5, 0.9], dtype=F64)
    out = {}
    for schedule in (sc.VP(), sc.VP(0.2, 5.0), sc.CosineVP(), sc.VE(), sc.VE(0.1, 3.0), sc.FlowMatching()):
        out[repr(schedule)] = [
            schedule.mu(s),
            schedule.std(s),
            schedule.log_mu_slope(s),
            schedule.forward_variance_rate(s),
            schedule.model_time(s),
            schedule.noising_time(s),
            schedule.start_std(),
            schedule.noise_end,
        ]
    return out


@case("processes")
def _processes() -> Any:
    x, t = normal(5, 2, seed=1), torch.tensor(0.3, dtype=F64)
    out: list[Any] = []
    varying = sc.LinearSDE(
        lambda t: torch.tensor([[-1.0, 0.2], [0.0, -0.5]], dtype=F64) * (1 + t), torch.eye(2, dtype=F64)
    )
    for sde in (lq().reference, varying, sc.BrownianMotion(2, torch.eye(2, dtype=F64)), observed().reference):
        assert isinstance(sde, sc.LinearSDE)
        law = sde.transition(0.2, 0.9)
        out.append([sde.drift(x, t), sde.diffusion(x, t), law.matrix, law.shift, law.covariance])
        laws = [sde.kernel(0.2, 0.7, x), sde.marginal(0.6, sc.Gaussian(x[0], 0.3)), sde.bridge(0.4, x, x.flip(0))]
        out.append([[law.mean, law.covariance_matrix] for law in laws])
        out.append(sde.conditioned_drift(x, 0.3, x.flip(0)))
    for name, make in PROBLEMS.items():
        problem = make()
        out.append([name, problem.memory, problem.start, problem.reference.describe(), problem.draw_start(3, 1)])
        out.append([problem.has_gradient, str(problem.dtype), problem.horizon, repr(problem)])
        if isinstance(problem, GibbsProblem):
            out.append(
                [
                    problem.centre,
                    problem.scale,
                    problem.roughness if problem.has_gradient else None,
                    problem.floor,
                    repr(problem),
                ]
            )
    return out


class _Foreign:
    """torchsde's protocol."""

    noise_type, sde_type = "diagonal", "ito"

    def f(self, t: Any, y: Tensor) -> Tensor:
        return torch.sin(y) - y

    def g(self, t: Any, y: Tensor) -> Tensor:
        return 0.5 + 0.2 * torch.cos(y)


@case("solver/noise-and-states-of-ones-own")
def _own_noise() -> Any:
    problem = plain()
    control, noise, area = push(problem), normal(STEPS, SAMPLES, 2, seed=1), normal(STEPS, SAMPLES, 2, seed=2)
    given: dict[str, Any] = {"time_steps": STEPS}
    first = sc.simulate(problem, SAMPLES, control, scheme="heun", seed=3, **given)
    return [
        sc.simulate(problem, SAMPLES, control, scheme="srk", noise=(noise, area), **given).states,
        sc.simulate(problem, SAMPLES, control, scheme="milstein", noise=noise, **given).states,
        sc.simulate(problem, SAMPLES, control, scheme="heun", seed=3, state=first.states[2], step=2, **given).states,
    ]


@case("errors")
def _errors() -> Any:
    """What is said of numbers that are not finite, and of paths without likelihoods."""
    late = lambda x, t: torch.where(t > 0.4, math.nan, 0.0) - x  # noqa: E731
    start = sc.Dirac(torch.zeros(2, dtype=F64))
    broken = {
        "drift": lambda: sc.ControlProblem(sc.SDE(late, 0.7, 2, 0.9), start, well),
        "reward": lambda: plain(reward=lambda x: torch.where(x[:, 0] > 0.5, math.nan, well(x))),
        "cost": lambda: plain(running_cost=lambda x, t: torch.where(x[:, 0] > 0.3, math.inf, cost(x, t))),
        "gradient": lambda: plain(reward=lambda x: -(x - x).norm(dim=1)),
    }
    calls: dict[str, Callable[[Any], Any]] = {
        "solve": lambda p: sc.solve(
            p, "reward-backprop", time_steps=STEPS, iterations=2, batch_size=BATCH, seed=5, progress=False
        ),
        "adjoint": lambda p: sc.solve(
            p, sc.AdjointMatching(), time_steps=STEPS, iterations=2, batch_size=BATCH, seed=5, progress=False
        ),
        "particles": lambda p: sc.solve(p, sc.SMC(16), time_steps=STEPS, seed=5).evaluate(PATHS, seed=1),
        "simulate": lambda p: sc.simulate(p, SAMPLES, push(p), STEPS, seed=1, keep="end"),
        "solver": lambda p: sc.simulate(p, SAMPLES, push(p), STEPS, "heun", seed=1, keep="end"),
    }
    out: dict[str, Any] = {}
    for name, make in broken.items():
        for what, call in calls.items():
            try:
                call(make())
                out[f"{name} {what}"] = None
            except Exception as error:
                facts = [getattr(error, part, None) for part in ("what", "step", "rows")]
                out[f"{name} {what}"] = [type(error).__name__, *facts]
    paths = sc.simulate(plain(), SAMPLES, None, STEPS, "heun", seed=1)
    for name in ("noises", "shifts"):
        try:
            getattr(paths, name)
        except Exception as error:
            out[name] = type(error).__name__
    return out


@case("foreign")
def _foreign() -> Any:
    sde = sc.SDE.from_torchsde(_Foreign(), 2, 0.8)
    problem = sc.ControlProblem(sde, sc.Dirac(torch.zeros(2)), well, cost)
    return [simulated(problem), solved(problem, sc.AdjointMatching())]


@case("library/problems")
def _library() -> Any:
    out: dict[str, Any] = {"names": sc.library.problem_names()}
    for name in sc.library.problem_names():
        for noise in (1.0, 0.5):
            problem = sc.library.named_problem(name, noise)
            paths = sc.simulate(problem, 8, None, STEPS, seed=1)
            out[f"{name} {noise}"] = [paths.states, paths.running_cost, problem.reward(paths.samples), problem.alpha]
    return out


@case("library/targets")
def _targets() -> Any:
    out: dict[str, Any] = {"names": sc.library.target_names()}
    for name in sc.library.target_names():
        target, card = sc.library.named_target(name), sc.library.target_card(name)
        x = normal(6, target.dim, seed=2)
        out[name] = [target(x), target(x.float()), target.dim, target.log_z, card.definition, card.version]
    for name in ("gmm9", "many-well-5"):
        found = sc.library.reference_samples(name, 50, 1, systems=4, particles=64, moves=2)
        out[f"samples of {name}"] = [found.x, found.mean, found.mean_stderr, found.log_density, found.log_z]
    return out


@case("library/solved")
def _library_solved() -> Any:
    names = ("ou-linear", "double-well-1d", "pendulum-swing-up", "unicycle", "ring-steering")
    out = {name: solved(sc.library.named_problem(name), sc.RewardBackprop("adjoint")) for name in names}
    target = sc.library.named_target("funnel")
    return {**out, "funnel": solved(sc.gibbs_problem(target, target.dim, seed=0), sc.LogVariance())}


# ---------------------------------------------------------------- the command line

_TOML = """
alpha = 0.5
[sde]
A = [[-1.0, 0.5], [0.0, -1.0]]
sigma = 1.0
horizon = 1.0
[initial]
point = [0.0, 0.0]
[reward]
G = [[1.0, 0.0], [0.0, 1.0]]
g = [1.0, 1.0]
[running_cost]
F = [[0.1, 0.0], [0.0, 0.1]]
[solve]
time_steps = 6
iterations = 3
batch_size = 32
"""


def said(*arguments: str) -> Any:
    """What a command prints with ``--json``; its exit code in front."""
    from sdecontrol.cli import main

    sys.argv = ["sdecontrol", *arguments]
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    text = out.getvalue()
    return [code, json.loads(text) if code == 0 and "--json" in arguments else text]


@case("command/solve")
def _command_solve() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "problem.toml"
        file.write_text(_TOML)
        own = said("solve", str(file), "--paths", "128", "--json")
    own[1].pop("problem")
    named = said(
        "solve",
        "ou-linear",
        "--iterations",
        "2",
        "--time-steps",
        "5",
        "--paths",
        "64",
        "--method",
        "log-variance",
        "--json",
    )
    return [own, named, said("solve", "no-such-problem", "--json")]


@case("command/sample")
def _command_sample() -> Any:
    quick = ("--method", "log-variance", "--iterations", "2", "--time-steps", "5", "--n", "128", "--json")
    return [
        said("sample", "gmm9", *quick),
        said("sample", "funnel", "--method", "tempered-smc", "--n", "64", "--no-certificate", "--json"),
    ]


@case("command/compare")
def _command_compare() -> Any:
    return said(
        "compare",
        "ou-linear",
        "--methods",
        "adjoint-matching,log-variance",
        "--iterations",
        "2",
        "--time-steps",
        "4",
        "--paths",
        "128",
        "--json",
    )


# ---------------------------------------------------------------- comparing


def flat(value: Any, name: str = "") -> dict[str, dict[str, Any]]:
    """All quantities in ``value`` by their paths, each with its hash and a summary."""
    below = f"{name}." if name else ""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "_asdict"):
        value = value._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, Mapping):
        kept = [(str(k), v) for k, v in value.items() if not _LEFT_OUT.search(str(k))]
        return {key: leaf for k, v in kept for key, leaf in flat(v, below + k).items()}
    if isinstance(value, (list, tuple)):
        return {key: leaf for i, v in enumerate(value) for key, leaf in flat(v, f"{below}{i}").items()}
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, (np.floating, np.integer, np.bool_)):
        value = value.item()
    if isinstance(value, Tensor):
        x = value.detach().cpu().contiguous()
        content = f"{x.dtype} {tuple(x.shape)} ".encode() + x.numpy().tobytes()
        return {name: _leaf(content, float(x.double().sum()))}
    if isinstance(value, float):
        return {name: _leaf(b"float " + np.float64(value).tobytes(), value)}
    if value is None or isinstance(value, (bool, int, str)):
        return {name: _leaf(f"{type(value).__name__} {value}".encode(), value if value is None else str(value)[:400])}
    raise TypeError(f"{name} is a {type(value).__name__}, which has no bytes to compare.")


def _leaf(content: bytes, summary: float | str | None) -> dict[str, Any]:
    plain = repr(summary) if isinstance(summary, float) and not math.isfinite(summary) else summary
    return {"sha256": hashlib.sha256(content).hexdigest()[:32], "summary": plain}


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """What one case leaves behind does not reach the next: the generators, the default dtype, the cache, warnings,
    output."""
    dtype, threads, state = torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state()
    cache, arguments = os.environ.get("SDECONTROL_CACHE"), sys.argv
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            os.environ["SDECONTROL_CACHE"] = folder
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.pop("SDECONTROL_CACHE", None)
        if cache is not None:
            os.environ["SDECONTROL_CACHE"] = cache
        sys.argv = arguments
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def run_case(name: str) -> dict[str, dict[str, Any]]:
    """The quantities of a case; of one that must be refused, the name of the exception."""
    with _alone():
        try:
            found = flat(CASES[name]())
        except Exception as error:
            if name not in REFUSED:
                error.add_note(f"in the case {name}")
                raise
            return {"refused": _leaf(type(error).__name__.encode(), type(error).__name__)}
        # what a case draws from torch's global generator, whoever draws it
        found["global generator"] = flat(torch.rand(2), "g")["g"]
    return found


def differences(found: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """The quantities that differ, each with how far."""
    out = []
    for name in sorted(found.keys() | known.keys()):
        if name not in found or name not in known:
            out.append(f"{name} is {'gone' if name not in found else 'new'}")
            continue
        a, b = known[name], found[name]
        if a["sha256"] == b["sha256"]:
            continue
        x, y = a["summary"], b["summary"]
        if isinstance(x, float) and isinstance(y, float):
            out.append(f"{name} {x:.10g} -> {y:.10g} ({y - x:+.1e})")
        else:
            out.append(f"{name} {str(x)[:60]!r} -> {str(y)[:60]!r}")
    return out


def identity(
    write: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Keep all numbers here.")] = None,
    against: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Compare with these numbers.")] = None,
    only: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Cases whose name has this, or matches it (* and ?).")
    ] = None,
    slowest: Annotated[int, typer.Option(help="Name so many of the slowest cases.")] = 0,
    most: Annotated[int, typer.Option(help="Quantities named of a case that differs.")] = 4,
) -> None:
    """Many small cases through the public face, bit by bit as they were: for refactorings that must change no
    number.

    Example: python -m benchmarks identity --write before.json --only solver
    """
    if (write is None) == (against is None):
        raise typer.BadParameter("give one of --write and --against.")
    pattern = only if only is not None and any(c in only for c in "*?[") else f"*{only or ''}*"
    chosen = fnmatch.filter(CASES, pattern)
    machine = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    saved: dict[str, Any] = {} if against is None else json.loads(against.read_text())
    known: dict[str, Any] = saved.get("cases", {})
    if against is not None and saved["made with"] != machine:
        typer.echo(f"note: made with {saved['made with']}, here is {machine}", err=True)
    found: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    bad = 0
    for name in chosen:
        began = time.perf_counter()
        try:
            found[name] = run_case(name)
        except Exception as error:
            if against is None:
                raise
            bad += 1
            typer.echo(f"{name}: raised {type(error).__name__}: {str(error)[:200]}")
            continue
        seconds[name] = time.perf_counter() - began
        if against is not None and (
            wrong := differences(found[name], known[name]) if name in known else ["not in the file"]
        ):
            bad += 1
            more = f"; {len(wrong) - most} more" if len(wrong) > most else ""
            typer.echo(f"{name}: {'; '.join(wrong[:most])}{more}")
    for name in fnmatch.filter([n for n in known if n not in CASES], pattern):
        bad += 1
        typer.echo(f"{name}: in the file, but no longer a case")
    for name in sorted(seconds, key=lambda n: -seconds[n])[:slowest]:
        typer.echo(f"{seconds[name]:6.1f} s  {name}")
    total = sum(seconds.values())
    if write is not None:
        write.write_text(json.dumps({"made with": machine, "cases": found}, indent=0, sort_keys=True) + "\n")
        typer.echo(f"{len(found)} cases written, {sum(map(len, found.values()))} quantities, {total:.0f} s")
        return
    if bad:
        typer.echo(f"{bad} of {len(chosen)} cases differ")
        raise typer.Exit(1)
    typer.echo(f"{len(chosen)} cases identical, {total:.0f} s")
