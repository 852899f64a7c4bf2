"""Learned solutions: what a solver returns must obey the theory, on problems with a known answer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

import sdecontrol as sc
from sdecontrol.evaluation.solution import Solution

from ..cases import LinearCase, spoil, tensor
from ..iterations import AffineModule
from ..registry import Measurement, Setting, check, compare, within
from ..user import verify
from .sampling import drifting

Lines = Iterator[Measurement]
KIND = "solver"

#: methods that are run where the library has them, by default and in a thorough run
USUAL = ("RewardBackprop", "AdjointMatching")
ALL = (
    "RewardBackprop",
    "AdjointMatching",
    "LogVariance",
    "PathConsistency",
    "CrossEntropy",
    "RewardWeightedMLE",
    "SoftPPO",
    "SOCM",
    "Reinforce",
)


def learnable(**changes) -> LinearCase:
    return drifting(cov=np.zeros((2, 2)), start="fixed", alpha=1.0, grid=tuple(np.linspace(0, 1, 6)), **changes)


def _train(case: LinearCase, method, iterations: int, seed: int) -> Solution:
    return sc.solve(
        case.problem(),
        method,
        time_steps=case.K,
        iterations=iterations,
        batch_size=128,
        seed=seed,
        control=AffineModule(case),
        learning_rate=0.08,
        progress=False,
    )


@check(
    "learned-solutions",
    "[18], Algorithms 1-5",
    kind=KIND,
    implements=["sdecontrol.solve", "sdecontrol.evaluation.solution.Solution", "sdecontrol.control_error"],
    controls=["not trained", "sign of g flipped", "alpha off by 50 %"],
)
def learned(setting: Setting, defect: str) -> Lines:
    """Each solver comes near the best mean-shift control of a linear-quadratic chain: relative control error below 2 %,
    gap to the exact log Z below 0.02 plus the floor, and every statement of ``verify`` holds for it (weights, KL, gap,
    Theorems 1-3)."""
    case = learnable()
    names = [n for n in (ALL if setting.thorough else USUAL) if hasattr(sc, n)]
    for name in names[: 1 if defect else None]:
        given = replace(case, alpha=1.5 * case.alpha) if defect.startswith("alpha") else spoil(case, defect)
        trained = _train(given, getattr(sc, name)(), 1 if defect == "not trained" else 200, setting.seed)
        solution = Solution(case.problem(), trained.control, method=trained.method, settings=trained.settings)
        exact = sc.exact_solution(case.problem(), like=solution)
        yield within(f"{name}: relative control error", sc.control_error(solution, exact, n=1024).relative.value, 0.02)
        gap = float(exact.log_z) - solution.evaluate(4096, seed=1).elbo.value
        yield within(f"{name}: gap less floor", gap - float(exact.floor), 0.02)
        report = verify(case.problem(), solution, n=4096, seed=setting.seed)
        yield within(f"{name}: statements of verify that fail", sum(f.passed is False for f in report.findings), 0.0)


@check(
    "gradient-modes",
    "Section 5.2",
    kind=KIND,
    implements=["sdecontrol.RewardBackprop", "sdecontrol.solve"],
    controls=["through the last step only"],
)
def gradient_modes(setting: Setting, defect: str) -> Lines:
    """Checkpointed backpropagation and the exact adjoint of the chain have the gradient of full backpropagation: after
    four steps of plain gradient descent the controls are the same; truncation is another gradient."""
    case, method = learnable(), cast(Any, sc.RewardBackprop)

    def after_four_steps(mode) -> torch.Tensor:
        solution = sc.solve(
            case.problem(),
            method(mode),
            time_steps=case.K,
            iterations=4,
            batch_size=64,
            seed=setting.seed,
            control=AffineModule(case),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            progress=False,
        )
        return solution.control(tensor([[1.0, -0.5], [0.3, 0.4]]), 0.0)

    full = after_four_steps("full")
    yield within("the steps are none", float(full.abs().max() < 1e-6), 0.0)
    for mode in ("checkpoint", "adjoint"):
        yield compare(f"control after four steps, {mode}", after_four_steps(1 if defect else mode), full)


@check(
    "verify-catches",
    "a solution of your own",
    kind=KIND,
    implements=["sdecontrol.evaluation.evaluate.log_weights"],
    controls=["alpha off by 5 %", "drift off by 1 %", "weights without the KL"],
)
def verify_catches(setting: Setting, defect: str) -> Lines:
    """``verify`` accepts the best mean-shift control of a problem, and rejects weighted paths that belong to another
    problem: the paths of the one, judged with the exact answer of the other."""
    from .. import user

    case = drifting(F=None)
    given = spoil(case, defect)
    settings: dict[str, Any] = {"time_steps": list(case.grid)}
    problem, exact = given.problem(), sc.exact_solution(case.problem(), **settings)
    control = sc.exact_solution(given.problem(), **settings).control
    paths, reference = (
        sc.simulate(problem, 60_000, control=c, seed=setting.seed + i, **settings)
        for i, c in enumerate((control, None))
    )
    if defect.startswith("weights"):
        paths.log_ratio = lambda *a, **k: torch.zeros(60_000, dtype=torch.float64)  # type: ignore[method-assign]
    known = user._Known(exact, tilted=True)
    found = user._judged(
        [*user._weights(problem, control, paths, reference, known), *user._theorems(problem, paths, known)]
    )
    yield within("statements that fail", sum(f.passed is False for f in found), 0.0)


@check(
    "control-error",
    "MATH 3: residuals and errors",
    kind=KIND,
    implements=["sdecontrol.control_error"],
    controls=["control off by 1 %", "KL of the first step dropped"],
)
def control_error(setting: Setting, defect: str) -> Lines:
    """``control_error`` is T^-1 E int |u - u*|^2 dt along optimal paths: a control that is 0.8 u* has the relative
    error 0.04 exactly, and, along paths from a point, an absolute one of 0.08 KL(P* || Q0)/T within its own standard
    errors."""
    case = learnable()
    exact = sc.exact_solution(case.problem(), time_steps=case.K)
    size = 0.8 * (1.01 if defect.startswith("control") else 1.0)
    module = AffineModule(case)
    U, w = case.chain().control()
    module.U.data, module.w.data = tensor(size * U), tensor(size * w)
    solution = sc.solve(
        case.problem(),
        "reward-backprop",
        time_steps=case.K,
        iterations=1,
        control=module,
        learning_rate=1e-14,
        seed=0,
        progress=False,
    )
    error = sc.control_error(solution, exact, n=4096, seed=setting.seed)
    yield compare("relative error of 0.8 u*", error.relative.value, 0.04, 1e-7)
    law = case.reference(0, case.mean, (U, w))
    kls = [
        h * float(np.trace(V @ law.of(k).cov @ V.T) + ((V @ law.of(k).mean + c) ** 2).sum()) / 2
        for k, (V, c, h) in enumerate(zip(U, w, case.h))
    ]
    kl = sum(kls[1:] if defect.startswith("KL") else kls)
    yield within(
        "absolute error, in standard errors", abs(error.absolute.value - 0.08 * kl) / error.absolute.stderr, 6.0
    )


def _left(case: LinearCase, solution: Any, log_z: float, n: int = 2048) -> float:
    """``KL(P^u || Q_fine)`` by its paths."""
    with torch.no_grad():
        paths = sc.simulate(case.problem(), n, solution.control, time_steps=list(case.grid), seed=11)
    return log_z - float(paths.log_weights().mean())


@check(
    "default-controls",
    "[18], Algorithms 1-5",
    kind=KIND,
    implements=[
        "sdecontrol.AdjointMatching",
        "sdecontrol.SOCM",
        "sdecontrol.CrossEntropy",
        "sdecontrol.BridgeMatching",
        "sdecontrol.LogVariance",
        "sdecontrol.distill",
    ],
    controls=["not trained", "sign of g flipped"],
)
def default_controls(setting: Setting, defect: str) -> Lines:
    """With the library's own network, whose affine path least squares fits, regressions come in a few iterations within
    5 % of the KL that the reference has to a linear-quadratic optimum, above its floor, on adjoints; within a tenth, on
    reciprocal ones, on the noise of bridges and on stored paths with ladders of targets; and a student that is
    distilled from such a control comes as near."""
    case = replace(learnable(), F=None)
    given = spoil(case, defect)
    _, log_z = case.optimum()
    plain = sc.simulate(case.problem(), 8192, time_steps=list(case.grid), seed=12)
    floor = float(case.chain().exact.floor)
    whole = log_z - float(plain.log_weights().mean()) - floor
    options: dict[str, Any] = {
        "time_steps": list(case.grid),
        "batch_size": 128,
        "seed": setting.seed,
        "progress": False,
    }
    ways: tuple[tuple[str, Any, int, float], ...] = (
        ("adjoint matching", sc.AdjointMatching(), 8, 0.05),
        ("SOCM", sc.SOCM(), 8, 0.05),
        ("reciprocal adjoint matching", sc.AdjointMatching(reciprocal=True, refresh=2), 15, 0.1),
        ("log-variance, a ladder", sc.LogVariance(trust_region=0.3, replay=4), 60, 0.1),
        ("cross-entropy, a ladder", sc.CrossEntropy(trust_region=0.3, replay=4), 60, 0.1),
        ("bridge matching", sc.BridgeMatching(trust_region=1.0), 60, 0.1),
    )
    for name, method, iterations, most in ways:
        count = 1 if defect == "not trained" else iterations
        rate = 1e-9 if defect == "not trained" else None
        solution = sc.solve(given.problem(), method, iterations=count, learning_rate=rate, **options)
        yield within(f"KL above the floor, {name}", (_left(case, solution, log_z) - floor) / whole, most)
    teacher: Any = sc.solve(case.problem(), "adjoint-matching", iterations=8, **{**options, "seed": 5})
    student = sc.distill(teacher, iterations=150, batch_size=128, seed=1, progress=False)
    yield within("KL above the floor, a student", (_left(case, student, log_z) - floor) / whole, 0.1)


@check(
    "densities-that-are-learned",
    "MATH 6: Gibbs targets",
    kind=KIND,
    implements=["sdecontrol.ParticleMatching", "sdecontrol.AdjointMatching", "sdecontrol.gibbs_problem"],
    controls=["constant off by a tenth", "density moved by half a deviation"],
)
def learned_densities(setting: Setting, defect: str) -> Lines:
    """Of a density with two unequal modes the control that begins with a mixture fitted to tempered particles has log Z
    from both sides; of one Gaussian, the default control with its Langevin term has: estimates within their standard
    errors, gaps in nats below 0.1."""
    off = 0.1 if defect.startswith("constant") else 0.0
    moved = 0.5 * math.sqrt(0.3) if defect.startswith("density") else 0.0
    log_z = 0.7

    def two(x: torch.Tensor) -> torch.Tensor:
        first = -0.5 * (x - tensor([-2.0, 0.0]) - moved).square().sum(1) / 0.3 + math.log(0.25 / 0.3)
        second = -0.5 * (x - tensor([2.0, 1.0]) - moved).square().sum(1) / 0.3 + math.log(0.75 / 0.3)
        return torch.logaddexp(first, second) - math.log(2 * math.pi) + log_z + off

    problem = sc.gibbs_problem(two, 2, scale=2.0, centre=0.0, dtype=torch.float64, seed=0)
    method = sc.ParticleMatching(num_particles=512)
    solution = sc.solve(problem, method, time_steps=40, iterations=2, batch_size=128, seed=setting.seed, progress=False)
    found = solution.evaluate(4096, seed=1, confirm=False)
    yield within("log Z, two modes, in standard errors", abs(found.log_z.value - log_z) / found.log_z.stderr, 5.0)
    yield within("gap, two modes", abs(found.elbo.value - log_z), 0.15)
    x = solution.sample(8000, seed=2)
    yield within("share of the first mode less 1/4", abs(float((x[:, 0] < 0).double().mean()) - 0.25), 0.04)
    yield within("mean of the second", abs(float(x[x[:, 0] > 0][:, 1].mean()) - 1.0), 0.06)
    law = torch.distributions.MultivariateNormal(tensor([0.5, -0.3]) + moved, tensor([[0.5, 0.2], [0.2, 0.4]]))
    one = sc.gibbs_problem(
        lambda x: law.log_prob(x) + log_z + off, 2, scale=1.0, centre=0.0, dtype=torch.float64, seed=0
    )
    options: dict[str, Any] = {"time_steps": 30, "batch_size": 128, "seed": setting.seed, "progress": False}
    for name, method in (
        ("adjoint matching", sc.AdjointMatching()),
        ("reciprocal", sc.AdjointMatching(reciprocal=True)),
    ):
        solution = sc.solve(one, method, iterations=20, **options)
        found = solution.evaluate(4096, seed=1, confirm=False)
        yield within(f"log Z, {name}, in standard errors", abs(found.log_z.value - log_z) / found.log_z.stderr, 5.0)
        yield within(f"gap, {name}", abs(found.elbo.value - log_z), 0.15)
        mean = solution.sample(8000, seed=2).mean(0) - tensor([0.5, -0.3])
        yield within(f"mean, {name}", float(mean.abs().max()), 0.15)
