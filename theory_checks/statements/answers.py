"""What solutions say of themselves: values and weights by paths, evaluations at random starts, second looks at a
target, verdicts, and the tables in which all of it is printed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import sdecontrol as sc
from sdecontrol.controls.given import given_control
from sdecontrol.evaluation.estimates import Estimate
from sdecontrol.evaluation.second_look import SecondLook, Ways, look_again
from sdecontrol.evaluation.solution import Solution
from sdecontrol.evaluation.verdict import compared, missed_share

from ..cases import LinearCase, spoil, tensor
from ..iterations import AffineModule
from ..registry import Measurement, Setting, check, compare, within
from .particles import agrees, point_case
from .sampling import drifting

Lines = Iterator[Measurement]
KIND = "statistical"


def of_module(case: LinearCase, **options: Any) -> Solution:
    """A solution of a case whose control is its best mean shift."""
    U, w = case.chain().control()
    problem = case.problem()
    control = given_control(problem, AffineModule(case, U, w))
    settings = {"time_steps": list(case.grid), "scheme": None}
    return Solution(problem, control, method="by hand", settings=settings, **options)


@check(
    "values-by-paths",
    "Lemma 2, [23]: by the weighted paths of a control",
    kind=KIND,
    implements=[
        "sdecontrol.evaluation.solution.Solution.value",
        "sdecontrol.evaluation.solution.Solution.weighted_sample",
        "sdecontrol.evaluation.solution.TiltedStart",
    ],
    controls=["alpha off by 50 %", "sign of g flipped", "step read late"],
)
def values_by_paths(setting: Setting, defect: str) -> Lines:
    """v(x, t) = alpha log E[exp(R/alpha) dQ0/dP] over the paths of a control from x at t, from each step on; weighted
    samples have the law of the optimum's end; and where the start is controlled, the solution's start is the optimum's:
    against dense laws."""
    case = point_case()
    solution = of_module(replace(case, alpha=1.5 * case.alpha) if defect.startswith("alpha") else spoil(case, defect))
    x, n = case.points(setting.rng(201)) * 0.5 + case.mean, 4096
    for k in (0, 2, case.K - 1):
        at = case.grid[max(0, k - int(defect.startswith("step")))]
        want = case.value(k, x)
        found = solution.value(tensor(x), at, n=n, seed=setting.seed)
        yield within(f"v_{k}", float(np.abs(found.numpy() - want).max()), 0.02)
    best, _ = case.optimum()
    ends, log_w = solution.weighted_sample(60_000, seed=setting.seed)
    weights = log_w.softmax(0)
    root = np.linalg.inv(np.linalg.cholesky(best.of(-1).cov))
    off = root @ ((weights[:, None] * ends).sum(0).numpy() - best.of(-1).mean)
    yield within("mean of weighted samples, in standard deviations", float(np.abs(off).max()), 0.05)
    if defect.startswith("step"):
        return
    held = drifting(F=None, G=np.zeros((2, 2)), alpha=0.5)
    given = spoil(held, defect)
    learned = sc.solve(
        given.problem(), "reward-backprop", time_steps=list(given.grid), iterations=40, seed=0, batch_size=256,
        progress=False,
    )  # fmt: skip
    start = learned.initial.sample((4000,), seed=1).numpy()
    law = held.chain().exact.initial
    off = np.abs(start.mean(0) - law.mean.numpy()) / np.sqrt(np.diag(law.covariance_matrix.numpy()))
    yield within("mean of the learned start, in standard deviations", float(off.max()), 0.2)


@check(
    "evaluations-at-random-starts",
    "MATH 1: the initial law",
    kind=KIND,
    implements=["sdecontrol.evaluation.evaluate.evaluate", "sdecontrol.exact_solution.start_log_z"],
    controls=["alpha off by 5 %", "start twice as wide", "sign of g flipped"],
)
def random_starts(setting: Setting, defect: str) -> Lines:
    """Of a fixed random start an evaluation has log Z, the part of it that no control removes, log Z - E log Z(X_0),
    and the gap that is left to the control, by many paths from each start or by the exact values there: all three from
    dense laws."""
    case = drifting(F=None, start="fixed", alpha=2.0)
    given = spoil(case, defect)
    if defect.startswith("start"):
        given = drifting(F=None, start="fixed", alpha=2.0, cov=4 * case.cov)
    log_z = case.optimum()[1]
    nodes, masses = np.polynomial.hermite_e.hermegauss(12)
    points = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2) @ np.linalg.cholesky(case.cov).T + case.mean
    masses = np.outer(masses, masses).ravel() / masses.sum() ** 2
    top = float(masses @ case.value(0, points)) / case.alpha
    solution = of_module(given)
    exact = given.chain().exact
    floor = top - float(exact.elbo)
    for name in ("estimated", "exact"):
        if name == "exact":
            solution._exact_values = exact.known_values
        found = solution.evaluate(16_384, seed=setting.seed, confirm=False)
        yield within(f"start gap, {name}", abs(found.start_gap.value - (log_z - top)), 0.03)
        yield within(f"gap of the best mean shift, {name}", abs(found.gap.value - floor), 0.02)
        yield within(f"log Z, {name}", abs(found.log_z.value - log_z), 0.03)


@check(
    "second-looks",
    "MATH 2: weights that can be trusted",
    kind=KIND,
    implements=["sdecontrol.evaluation.second_look.look_again"],
    controls=["alpha off by 20 %", "cost left out", "density off by 0.3"],
)
def looks(setting: Setting, defect: str) -> Lines:
    """Every second look at a target has its log Z: by the reference's paths, by particles where there is a running
    cost, by tempered particles of noises and of a density, at once or some paths at a time; and the weights that a
    control has along them, E_{Q*}[1/w] = 1/Z: of the optimum of a linear reward all of them Z."""
    n = 4096
    linear = point_case(G=np.zeros((2, 2)), F=None, alpha=2.0)
    cases = {
        "the reference's paths": (linear, Ways()),
        "tempered noises": (linear, Ways(reference=False)),
        "particles": (point_case(alpha=2.0), Ways(reference=False)),
    }
    for name, (case, ways) in cases.items():
        given = replace(case, alpha=1.2 * case.alpha) if defect.startswith("alpha") else case
        if defect.startswith("cost"):
            given = replace(given, F=None)
            ways = Ways(reference=False) if name == "particles" else ways
        problem = given.problem()
        chain, log_z = problem.chain(list(case.grid)), case.optimum()[1]
        control = given_control(problem, AffineModule(case, *case.chain().control()))
        for size in (None, 256):
            found = look_again(problem, chain, control, n, setting.seed, ways=ways, batch_size=size)
            assert found.log_z is not None and found.along is not None and found.log_w is not None
            yield from agrees(f"log Z by {name}, {size} at a time", found.log_z, log_z, 0.1)
            w = found.log_w.double().flatten().softmax(0)
            inverse = float((w * (log_z - found.along.double().flatten()).exp()).sum())
            yield within(f"E[Z/w] of a control by {name}, {size} at a time", abs(inverse - 1), 0.1)
            if name != "particles":
                yield compare(f"weights of the optimum by {name}", found.along.double(), 0 * found.along + log_z, 1e-4)
    law = torch.distributions.MultivariateNormal(tensor([0.5, -0.3]), tensor([[0.5, 0.2], [0.2, 0.4]]))
    off = 0.3 if defect.startswith("density") else 0.0
    density = sc.gibbs_problem(lambda x: law.log_prob(x) + 0.7 + off, 2, scale=1.0, centre=0.0, dtype=torch.float64)
    found = look_again(density, density.chain(20), None, 8192, setting.seed, ways=Ways(reference=False))
    assert found.log_z is not None
    yield from agrees("log Z by tempered states", found.log_z, 0.7, 0.1)


@check(
    "verdicts-of-estimates",
    "MATH 2: weights that can be trusted",
    implements=["sdecontrol.evaluation.verdict.compared", "sdecontrol.evaluation.verdict.missed_share"],
    controls=["another number of standard errors", "shares exchanged"],
)
def verdicts_of_estimates(setting: Setting, defect: str) -> Lines:
    """Two estimates of log Z confirm each other up to four standard errors of their difference; a second one that is
    larger says which share is missing, 1 - exp of the difference; a smaller one confirms nothing, unless it is exact;
    one that could not tell a half from the whole neither. Weights that a control's own paths never show, on a given
    share of the target, are a missing share of that size."""
    own = Estimate(1.0, 0.03)
    bound = 4.0 if not defect.startswith("another") else 3.0
    error = math.hypot(0.03, 0.04)
    ways = (
        (bound - 0.1, 0.04, "confirmed"),
        (bound + 0.1, 0.04, "unreliable"),
        (-bound + 0.1, 0.04, "confirmed"),
        (-bound - 0.1, 0.04, "unconfirmed"),
    )
    for sigmas, spread, want in ways:
        other = Estimate(1.0 + sigmas * error, spread)
        verdict, why = compared("", own, other, "it")
        yield within(f"{sigmas:+.1f} standard errors: not {want}", float(verdict != want), 0.0)
        if want == "unreliable":
            share = float(re.findall(r"about (\d+)%", why)[0]) / 100  # type: ignore[arg-type]
            yield within("share that is said to be missing", abs(share - (1 - math.exp(-sigmas * error))), 0.0051)
    exact = compared("", own, Estimate(1.0 - 0.13, 0.0), "it")[0]
    yield within("an exact one that is smaller: not unreliable", float(exact != "unreliable"), 0.0)
    vague = compared("", own, Estimate(1.0, 0.2), "it")[0]
    yield within("one that is too vague: not unconfirmed", float(vague != "unconfirmed"), 0.0)
    known = compared("", own, Estimate(1.0, 0.2), "it", 0.01)[0]
    yield within("unless a share was looked for: not confirmed", float(known != "confirmed"), 0.0)
    n, share = 20_000, 0.3
    rng = np.random.default_rng(0)
    level = tensor(0.05 * rng.normal(size=n))
    count = round((1 - share if defect.startswith("shares") else share) * n)
    along = level.clone()
    along[:count] += 3.0  # where the control's own paths do not go
    look = SecondLook("it", Estimate(0.0, 0.01), torch.zeros(1, n, dtype=torch.float64), along[None])
    found = missed_share(level, look)
    assert found is not None
    yield within("missing share", abs(found.value - share), 0.02)


def _rows(text: str) -> dict[str, tuple[float, float]]:
    """The numbers of a table, by the name before them, with their errors."""
    found = re.findall(r"^(.+?)\s+(-?[\d.e+-]+)(?: ± ([\d.e+-]+))?", text, re.MULTILINE)
    return {name.strip(): (float(value), float(error or 0.0)) for name, value, error in found}


@check(
    "tables-of-numbers",
    "tables",
    kind=KIND,
    implements=[
        "sdecontrol.evaluation.evaluate.Evaluation.__str__",
        "sdecontrol.evaluation.certificates.Certificate.__str__",
        "sdecontrol.particles.diagnostics.Diagnostics.__str__",
    ],
    controls=["alpha off by 5 %", "cost off by 5 %", "control off by 10 %"],
)
def tables(setting: Setting, defect: str) -> Lines:
    """What is printed are the numbers: reward, running cost, KL, objective, ELBO, log Z and gap of a linear-quadratic
    optimum, ELBO and log Z of a certificate, means and deviations of chains; each within the error beside it, and as
    plain numbers for files."""
    case = point_case()
    given = spoil(case, defect)
    if defect.startswith("cost"):
        given = point_case(F=1.05 * np.asarray(case.F))
    size = 0.9 if defect.startswith("control") else 1.0
    U, w = case.chain().control()
    problem = given.problem()
    control = given_control(problem, AffineModule(case, size * U, size * w))
    solution = Solution(problem, control, method="by hand", settings={"time_steps": list(case.grid), "scheme": None})
    law, log_z = case.reference(0, case.mean, (U, w)), case.optimum()[1]
    second = lambda P, k: float(law.of(k).mean @ P @ law.of(k).mean + np.trace(P @ law.of(k).cov))  # noqa: E731
    kl = sum(
        h * 0.5 * float(((U[k] @ law.of(k).mean + w[k]) ** 2).sum() + np.trace(U[k] @ law.of(k).cov @ U[k].T))
        for k, h in enumerate(case.h)
    )
    cost = sum(0.5 * h * second(case.F_at(t), k) for k, (t, h) in enumerate(zip(case.grid, case.h)))
    reward = float(case.g @ law.of(-1).mean) - 0.5 * second(case.G, case.K)
    objective = reward - cost - case.alpha * kl
    evaluation = solution.evaluate(40_000, seed=setting.seed)
    shown, plain = _rows(str(evaluation)), evaluation.as_dict()
    wanted = {
        "reward": reward,
        "running cost": cost,
        "KL": kl,
        "objective": objective,
        "ELBO": objective / case.alpha,
        "log Z": log_z,
        "gap": log_z - objective / case.alpha,
    }
    for name, value in wanted.items():
        got, error = shown[name]
        slack = 6 * error + 0.006 * abs(value)  # three digits are printed
        yield within(f"{name}, of what is allowed", abs(got - value) / slack, 1.0)
        told = plain[name.replace(" ", "_").lower()]["value"]
        yield within(f"{name} for files, off what is printed", abs(told - got), 0.006 * abs(told) + 1e-9)
    shown = _rows(str(sc.certify(solution, n=4096, seed=setting.seed)))
    for name, value in {"ELBO": objective / case.alpha, "log Z": log_z}.items():
        got, error = shown[name]
        yield within(f"{name} of a certificate", abs(got - value), 6 * error + 0.006 * abs(value))
    if defect:
        return
    density = sc.gibbs_problem(unequal, 2, scale=1.0, centre=0.0, dtype=torch.float64)
    chains: Any = sc.solve(density, sc.MALA(16, warm_up=200), seed=0, progress=False)
    rows = [line.split() for line in str(chains.diagnostics(8192)).splitlines() if line.startswith("x[")]
    rows.sort()
    told = np.array([[float(v) for v in row[1:3]] for row in rows])
    yield within("means of chains, in deviations", float(np.abs((told[:, 0] - [1.0, -2.0]) / [0.5, 2.0]).max()), 0.12)
    yield within("deviations of chains, relative", float(np.abs(told[:, 1] / [0.5, 2.0] - 1).max()), 0.12)


def unequal(x: torch.Tensor) -> torch.Tensor:
    return -0.5 * ((x[:, 0] - 1) / 0.5) ** 2 - 0.5 * ((x[:, 1] + 2) / 2) ** 2
