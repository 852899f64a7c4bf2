"""The Gaussian-mixture inverse problem: all methods against the exact posterior.

Each finished cell (row, observations, budget, seed) is a JSON file under ``benchmarks/results/mixture/``; a cell that
exists is not run again, so that a table is filled over several sessions. A seed is that of the problem and of the
method alike. What diverges, or refuses, is a cell with its reason.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import sdecontrol as sc
from sdecontrol.comparison.costs import measuring
from sdecontrol.controls.base import Control
from sdecontrol.controls.saved import CONTROLS
from sdecontrol.evaluation.solution import Solution
from sdecontrol.exact.mixtures import MixtureSolution
from sdecontrol.library.inverse import mixture_observation
from sdecontrol.processes.generative import GenerativeSDE
from sdecontrol.randomness import Place, derive_seed, generator_for

from .cells import store, versions
from .mixture_page import write_figure, write_page

RESULTS = Path(__file__).parent / "results" / "mixture"

OBSERVATIONS = (1, 2, 4)
VERSION = 1  # of the problem's definition
SECONDS = 60.0
TIME_STEPS = 100
_FAR = 30.0  # of a coordinate: the outermost means are at 16, with unit covariance
_SAMPLES, _EXACT, _EVALUATE, _METHOD = range(1, 5)  # indices of Place.OUTSIDE

#: (problem, CPU-seconds or nan, seed) -> a solution: what has ``sample`` and ``evaluate``
Pipeline = Callable[[sc.ControlProblem, float, int], Any]


@dataclass(frozen=True)
class Row:
    """A row of the table: a method, or a named pipeline of several.

    Attributes:
        run: a method, solved with its defaults; or a pipeline.
        trained: it takes a budget; else nothing is trained. None: as the method says.
        seeds: problems per number of observations, unless the command says otherwise.
        samples, paths: that are drawn, and that ``evaluate`` is given (at least 64).
    """

    run: sc.Method | Pipeline
    trained: bool | None = None
    seeds: int = 20
    samples: int = 1000
    paths: int = 1024

    @property
    def takes_budget(self) -> bool:
        if self.trained is not None:
            return self.trained
        return isinstance(self.run, sc.Method) and self.run.default_iterations > 0


def _exact(problem: sc.ControlProblem, budget: float, seed: int) -> Any:
    return sc.exact_solution(problem)


def _exact_value(problem: sc.ControlProblem, budget: float, seed: int) -> Solution:
    value = sc.exact_solution(problem).value
    return sc.solve(problem, sc.ValueGuidance(value), time_steps=TIME_STEPS, seed=seed, progress=False)


class _Classifier(nn.Module):
    """Logits ``(batch, 2)`` of a noisy state and its noising time."""

    def __init__(self, dim: int, centre: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.centre, self.spread = nn.Buffer(centre), nn.Buffer(spread)
        self.layers = nn.Sequential(
            nn.Linear(dim + 8, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1)
        )

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        waves = math.pi * s.sqrt().unsqueeze(1) * torch.arange(4, device=x.device)
        z = (x - self.centre) / self.spread
        logit = self.layers(torch.cat((z, waves.cos(), waves.sin()), 1))
        return torch.cat((torch.zeros_like(logit), logit), 1)


def _classifier_guidance(problem: sc.ControlProblem, budget: float, seed: int) -> Solution:
    """A classifier of noisy states is trained on noised draws of the prior, then guides. Its label is "accepted", of
    probability ``p(y | x) / max p(y | .)``: the classifier that is right at every time has the exact value, up to a
    constant, as its log-probability."""
    reference, reward, d = problem.reference, problem.reward_function, problem.event_shape[0]
    assert isinstance(reference, GenerativeSDE) and reference.mixture is not None and isinstance(reward, sc.Quadratic)
    prior, schedule = reference.mixture, reference.schedule
    generator = generator_for("cpu", seed, Place.OUTSIDE, _METHOD)
    data = prior._draw_block(100_000, generator)
    # the largest log-likelihood that any x has: r is -|y - Ax|^2/(2 noise^2) + c
    best = torch.linalg.lstsq(reward.G.double(), reward.g.double()).solution
    top = float(problem.reward(best.to(data).unsqueeze(0)))
    label = (problem.reward(data) - top).exp().clamp(max=1.0)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, Place.OUTSIDE, _METHOD, 1))
        classifier = _Classifier(d, data.mean(0), data.std(0))
    optimiser = torch.optim.Adam(classifier.parameters(), lr=2e-3)
    began, loss_of = time.process_time(), nn.functional.binary_cross_entropy_with_logits
    while (spent := (time.process_time() - began) / budget) < 1:
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, 2 * (1 - spent)) + 1e-6
        rows = torch.randint(len(data), (1024,), generator=generator)
        s = torch.rand(1024, generator=generator)
        mu, std = schedule.mu(s).unsqueeze(1), schedule.std(s).unsqueeze(1)
        x = mu * data[rows] + std * torch.randn(1024, d, generator=generator)
        loss = loss_of(classifier(x, s)[:, 1], label[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    guidance = sc.ClassifierGuidance(classifier.requires_grad_(False), label=1, noisy=True)
    return sc.solve(problem, guidance, time_steps=TIME_STEPS, seed=seed, progress=False)


_TWEEDIE = sc.ValueGuidance("tweedie")

#: in the order in which cells are filled
ROWS: dict[str, Row] = {
    "exact samples": Row(_exact, paths=1024),
    "reference": Row(sc.BestOfN(n=1)),
    "exact value": Row(_exact_value),
    "Tweedie guidance": Row(_TWEEDIE),
    "SMC, 256": Row(sc.SMC(256)),
    "SMC, 1024, Tweedie twist": Row(sc.SMC(1024, twist="tweedie")),
    "tempered-smc, 4096": Row(sc.TemperedSMC(4096), seeds=3),
    "best of 16": Row(sc.BestOfN(16)),
    "best of 16, softmax": Row(sc.BestOfN(16, selection="softmax")),
    "SMC, 32 each, Tweedie twist": Row(sc.SMC(32, twist="tweedie", independent=True)),
    "SMC, 32 each, Tweedie guidance and twist": Row(
        sc.SMC(32, proposal=_TWEEDIE, twist="tweedie", independent=True), seeds=8
    ),
    "adjoint-matching": Row(sc.AdjointMatching(), seeds=3),
    "particle-matching": Row(
        lambda problem, budget, seed: _particle_matching(problem, budget, seed), trained=True, seeds=3
    ),
    "particle-matching, exponential": Row(
        lambda problem, budget, seed: _particle_matching(problem, budget, seed, "exponential"), trained=True, seeds=3
    ),
    "socm": Row(sc.SOCM(), seeds=3),
    "log-variance": Row(sc.LogVariance(), seeds=3),
    "reward-backprop": Row(sc.RewardBackprop(), seeds=3),
    "soft-ppo": Row(sc.SoftPPO(), seeds=3),
    "cross-entropy": Row(sc.CrossEntropy(), seeds=3),
    "cross-entropy, trust region 1": Row(sc.CrossEntropy(trust_region=1.0), seeds=3),
    "path-consistency": Row(sc.PathConsistency(), seeds=3),
    "reward-weighted-mle": Row(sc.RewardWeightedMLE(), seeds=3),
    "bridge-matching": Row(sc.BridgeMatching(), seeds=3),
    "reinforce": Row(sc.Reinforce(), seeds=3),
    "value guidance, Monte Carlo": Row(sc.ValueGuidance("monte-carlo"), seeds=3),
    "value guidance, soft Q": Row(sc.ValueGuidance("soft-q"), seeds=3),
    "classifier guidance": Row(_classifier_guidance, trained=True, seeds=3),
    # K^2/2 times num_paths steps for a sample: fewer samples, and fewer problems
    "path integral, 32 paths": Row(sc.PathIntegralGuidance(num_paths=32), seeds=3, samples=250, paths=64),
}


def _particle_matching(problem: sc.ControlProblem, budget: float, seed: int, scheme: Any = None) -> Solution:
    """With its defaults, and as many iterations as the budget pays for: a run of few particles and one of ten
    iterations more are timed."""
    method, few, costs = sc.ParticleMatching(), 256, []
    settings: dict[str, Any] = {"time_steps": TIME_STEPS, "scheme": scheme, "seed": seed, "progress": False}
    for iterations in (1, 11):
        began = time.process_time()
        trial = sc.ParticleMatching(num_particles=few)
        sc.solve(problem, trial, iterations=iterations, **settings)
        costs.append(time.process_time() - began)
    particles = costs[0] * method.num_particles / few
    each = max(1e-3, (costs[1] - costs[0]) / 10) + 0.4 * particles / method.refresh  # later there is less to temper
    most = max(20, int((budget - 0.6 * particles) / each))
    return sc.solve(problem, method, iterations=most, **settings)


def _iterations(problem: sc.ControlProblem, method: sc.Method, budget: float) -> int:
    """How many iterations the budget pays for, from ten of them: with their number given, a schedule ends with the
    budget."""
    settings: dict[str, Any] = {"time_steps": TIME_STEPS, "seed": 9, "progress": False}
    sc.solve(problem, method, iterations=2, **settings)
    began = time.process_time()
    sc.solve(problem, method, iterations=10, **settings)
    return max(20, int(budget / ((time.process_time() - began) / 10)))


def _distances(samples: Tensor, exact: MixtureSolution, seed: int) -> dict[str, Any]:
    """How far samples are from the posterior as a whole, in the shares of its modes, and within them.

    All components of the posterior have the same covariance, so that residuals from the mean of one's own component
    have one law for all: that of the exact samples' residuals.
    """
    posterior = exact.marginal(exact.problem.horizon)
    assert isinstance(posterior, sc.GaussianMixture)
    truth = exact.sample(len(samples), seed=derive_seed(seed, Place.OUTSIDE, _EXACT))
    resp, own = posterior.responsibilities(samples).nan_to_num(0.0), posterior.responsibilities(truth)
    residual = samples - posterior.means[resp.argmax(1)]
    return {
        "sliced_w1": sc.metrics.sliced_wasserstein(samples, truth, seed=seed),
        "modes_tv": 0.5 * float((resp.mean(0) - posterior.weights).abs().sum()),
        "within_w1": sc.metrics.sliced_wasserstein(residual, truth - posterior.means[own.argmax(1)], seed=seed),
        "escaped": float((samples.abs().amax(1) > _FAR).float().mean()),
        "shares": {
            str(i): [float(posterior.weights[i]), float(resp.mean(0)[i])]
            for i in posterior.weights.argsort(descending=True).tolist()
            if posterior.weights[i] > 0.01 or resp.mean(0)[i] > 0.01
        },
    }


def run_cell(label: str, observations: int, seed: int, budget: float) -> dict[str, Any]:
    """Solve one problem by one row, and measure; ``failed`` says why there is nothing to measure."""
    row = ROWS[label]
    problem = sc.library.mixture_inverse_problem(observations, seed)
    exact = sc.exact_solution(problem)
    assert isinstance(exact, MixtureSolution)
    method = row.run if isinstance(row.run, sc.Method) else None
    out: dict[str, Any] = {
        "row": label,
        "observations": observations,
        "dim": 8,
        "seed": seed,
        "version": VERSION,
        "settings": None
        if method is None
        else {"name": method.name, **{k: repr(v) for k, v in asdict(method).items()}},
        "time_steps": TIME_STEPS,
        "samples": row.samples,
        "budget_cpu_seconds": budget if row.takes_budget else None,
        "noise": mixture_observation(observations, seed).noise,
        "exact_log_z": float(exact.log_z),
        "versions": versions(),
        "command": f"python -m benchmarks mixture --method '{label}' --dy {observations}"
        + (f" --cpu-seconds {budget:g}" if row.takes_budget else ""),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if method is None:
                with measuring(problem.device) as training:
                    solution = row.run(problem, budget, seed)  # type: ignore[operator]
            else:
                more: dict[str, Any] = {"time_steps": TIME_STEPS, "seed": seed, "progress": False}
                if row.takes_budget:
                    more["iterations"] = out["iterations"] = _iterations(problem, method, budget)
                with measuring(problem.device) as training:
                    solution = sc.solve(problem, method, **more)
            out["training"] = asdict(training)
            if isinstance(control := getattr(solution, "control", None), Control):
                out["control"] = CONTROLS.describe(control)
            with measuring(problem.device) as sampling:
                samples = solution.sample(row.samples, seed=derive_seed(seed, Place.OUTSIDE, _SAMPLES))
            out["sampling"] = asdict(sampling)
            if not bool(torch.isfinite(samples).all()):
                raise RuntimeError("samples are not finite.")
            out.update(_distances(samples, exact, seed))
        except (ValueError, RuntimeError) as error:  # a method that diverges or refuses is a result
            out["failed"] = " ".join(str(error).split())
        else:
            try:
                evaluation = solution.evaluate(row.paths, seed=derive_seed(seed, Place.OUTSIDE, _EVALUATE))
                out["evaluation"] = evaluation.as_dict()
                gap = out["exact_log_z"] - evaluation.elbo.value
                out["gap"] = {"value": gap, "stderr": evaluation.elbo.stderr}  # to the log Z of continuous time
            except (ValueError, RuntimeError) as error:
                out["evaluation_failed"] = " ".join(str(error).split())
    out["warnings"] = sorted({" ".join(str(w.message).split()) for w in caught})
    return out


def _cell_path(results: Path, label: str, observations: int, seed: int, budget: float) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in label.lower()).replace("--", "-")
    seconds = f"--{budget:g}s" if ROWS[label].takes_budget else ""
    return results / f"{name}--dy{observations}{seconds}--{seed}.json"


def _warm_up() -> None:
    """Else the first cell would pay for code that is loaded on its first use."""
    problem = sc.library.mixture_inverse_problem(1, 0)
    with contextlib.suppress(ValueError, RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = sc.solve(problem, sc.ValueGuidance("tweedie"), time_steps=2, seed=0, progress=False).sample(64, 0)
        sc.metrics.sliced_wasserstein(samples, samples)


def mixture(
    method: Annotated[list[str] | None, typer.Option(help="Rows of the table; all if not given.")] = None,
    dy: Annotated[list[int] | None, typer.Option(help="Numbers of observations; 1, 2 and 4 if not given.")] = None,
    cpu_seconds: Annotated[float, typer.Option(min=1, help="Of rows that train.")] = SECONDS,
    seeds: Annotated[int | None, typer.Option(min=1, show_default="20, or 3 of rows that train")] = None,
    results: Annotated[Path, typer.Option(help="Where finished cells are kept.")] = RESULTS,
    again: Annotated[bool, typer.Option("--again", help="Run finished cells again.")] = False,
    page: Annotated[
        bool, typer.Option("--page", help="Only write docs/tables/mixture.md and its figure from what is there.")
    ] = False,
) -> None:
    """The Gaussian-mixture inverse problem: distance to the exact posterior, per row, number of observations and seed.

    Example: python -m benchmarks mixture --method 'Tweedie guidance' --dy 1
    """
    labels, numbers = method or list(ROWS), dy or list(OBSERVATIONS)
    for label in labels:
        if label not in ROWS:
            raise typer.BadParameter(f"{label!r}; known are {', '.join(ROWS)}.", param_hint="--method")
    torch.set_num_threads(1)
    if not page:
        _warm_up()
    for label in [] if page else labels:
        for seed in range(ROWS[label].seeds if seeds is None else seeds):
            for observations in numbers:
                path = _cell_path(results, label, observations, seed, cpu_seconds)
                if path.exists() and not again:
                    continue
                cell = run_cell(label, observations, seed, cpu_seconds)
                store(path, cell)
                said = cell.get("failed", "")[:90] or f"sliced W1 {cell['sliced_w1']:.3g}"
                print(f"{label:<42} dy {observations} seed {seed}: {said}", flush=True)
    found = [json.loads(p.read_text()) for p in sorted(results.glob("*--dy*--*.json"))]
    write_figure(found, list(ROWS))
    print(write_page(found, list(ROWS)))
