"""``verify``: what the theory demands of a user's own solution of their own problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

import sdecontrol as sc
from sdecontrol.evaluation.estimates import effective_sample_size, pareto_k
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.exact.grids import GridLaw
from sdecontrol.paths.paths import Paths

from .registry import FAMILY_WISE_ERROR

__all__ = ["Finding", "Verification", "verify"]

_HEAVY = 0.7  # Pareto index from which a mean weight and its error are not to be trusted
_LEVELS = (-0.7, 0.0, 0.7)  # where a projection's distribution function is compared, in standard deviations


@dataclass(frozen=True)
class Finding:
    """One line of a verification.

    Attributes:
        statement: what the theory says; what: what was measured.
        value, expected: the two numbers; effect: their difference on a natural scale.
        p: p-value of a statistical test, or None.
        passed: the verdict, or None where the line only informs (``why`` says so).
    """

    statement: str
    what: str
    value: float
    expected: float | None
    effect: float
    p: float | None
    passed: bool | None
    why: str = ""


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` returns; prints as a table. ``passed``: no line failed."""

    findings: tuple[Finding, ...]
    verdict: str
    reliability: str
    exact: str
    n: int

    @property
    def reliable(self) -> bool:
        """Whether the evaluation's log Z and gap are confirmed."""
        return self.verdict == "confirmed"

    @property
    def passed(self) -> bool:
        return all(f.passed is not False for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        plain = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v  # noqa: E731
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "reliable": self.reliable,
            "reliability": self.reliability,
            "exact": self.exact,
            "n": self.n,
            "findings": [{k: plain(v) for k, v in vars(f).items()} for f in self.findings],
        }

    def __str__(self) -> str:
        rows = [("", "statement", "measured", "value", "expected", "effect", "p", "")]
        for f in self.findings:
            rows.append(
                (
                    "info" if f.passed is None else "ok" if f.passed else "FAIL",
                    f.statement,
                    f.what,
                    f"{f.value:.5g}",
                    "—" if f.expected is None else f"{f.expected:.5g}",
                    f"{f.effect:.2e}",
                    "—" if f.p is None else f"{f.p:.1e}",
                    f.why,
                )
            )
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths)).rstrip() for r in rows]
        verdict = "all statements hold" if self.passed else "SOME STATEMENTS FAIL"
        return "\n".join(
            [
                *lines,
                f"{verdict}; {self.n} paths; exact answer: {self.exact}; log Z and gap: {self.verdict} "
                f"({self.reliability})",
            ]
        )


def verify(problem: sc.ControlProblem, solution: Any, n: int = 8192, seed: int = 0) -> Verification:
    """Check a solution of a control problem against the theory, on fresh paths.

    Always: the path weights are a change of measure (``E_Q0[dP/dQ0] = 1``, ``E_P[dQ0/dP] = 1``), the KL is the mean
    log-ratio and not negative, both estimates of Z agree, the gap is not negative. Where the exact solution of the
    chain is known (:func:`sdecontrol.exact_solution`, on grids and as series too), also: Z itself, the value from the
    middle of the paths on (Lemma 2), and, where it has their laws, Theorems 1 to 3 for the *weighted* paths, which must
    obey them within sampling error whatever the control. The unweighted samples of a learned control are off by what
    its gap allows: their distance is reported and judged against Pinsker's bound, ``distance <= sqrt(gap/2)``. Which of
    these are known depends on the kind of chain: of simulators, discrete diffusion samplers and annealed Langevin only
    what holds always. Of a mixture's chain the optimum is known in one and two dimensions, and in more where it falls
    apart into single coordinates and pairs, turned or not; where three or more coordinates act on each other (means in
    space, components of different variances, a reward that is not quadratic) a step's average over the noise is an
    integral in as many dimensions, which no grid has, and only what holds always is tested. Laws are known along single
    coordinates; of a pair, log Z and the value.

    Args:
        solution: a ``Solution``, an exact solution, or anything with a ``control`` (``control.settings`` says on which
            chain).
        n: number of paths; the family-wise error of all tests together is 1e-6.

    Returns:
        :class:`Verification`, with ``passed``, ``as_dict()`` and a table when printed.
    """
    if not isinstance(problem, sc.ControlProblem):
        raise TypeError(f"problem must be a ControlProblem, got {type(problem).__name__}.")
    if not hasattr(solution, "control"):
        raise TypeError(f"solution must be a solution (with .control), got {type(solution).__name__}.")
    if isinstance(n, bool) or not isinstance(n, int) or n < 256:
        raise ValueError(f"n must be an int >= 256 (paths to test with), got {n!r}.")
    control, settings = solution.control, _settings(solution)
    paths = sc.simulate(problem, n, control=control, seed=seed, **settings)
    reference = sc.simulate(problem, n, seed=seed + 1, **settings)
    exact, note = _exact(problem, settings)
    found = list(_weights(problem, control, paths, reference, exact))
    if exact is not None and exact.tilted:
        found += list(_theorems(problem, paths, exact))
    evaluation = solution.evaluate(n, seed=seed + 2) if hasattr(solution, "evaluate") else None
    if evaluation is not None:
        found += list(_gap(problem, paths, exact, evaluation))
    return Verification(
        _judged(found),
        evaluation.verdict if evaluation is not None else "unconfirmed",
        evaluation.reliability if evaluation is not None else "this solution has no evaluate",
        note,
        n,
    )


def _settings(solution: Any) -> dict[str, Any]:
    settings = getattr(solution, "settings", None) or getattr(solution.control, "settings", None) or {}
    return {k: v for k, v in settings.items() if v is not None}


@dataclass(frozen=True)
class _Known:
    """An exact solution of the chain, and whether its laws are those of Q_fine, its start tilted too, which is what
    weighted paths are drawn from."""

    solution: Any
    tilted: bool


def _exact(problem: sc.ControlProblem, settings: dict[str, Any]) -> tuple[_Known | None, str]:
    """What is known exactly of the chain."""
    if problem.condition is not None:
        return None, "none is known"
    given, tilted = problem, problem.from_point or problem.start == "controlled"
    if not tilted and isinstance(problem.reference, sc.SDE) and not problem.reference.tangential:
        try:
            given = sc.ControlProblem(
                problem.reference,
                problem.initial,
                problem.reward_function,
                problem.running_cost_function,
                alpha=problem.alpha,
                start="controlled",
            )
            tilted = True
        except (ValueError, TypeError):
            given = problem
    known: dict[str, Any] = {"time_steps": 100, **settings} if problem.reference.continuous else {}
    try:
        return _Known(sc.exact_solution(given, **known), tilted), "of the chain"
    except sc.NoExactSolution as error:
        return None, f"none of the chain ({error})"


def _mean_is(statement: str, what: str, values: torch.Tensor, expected: float, heavy: bool = False) -> Finding:
    v = values.detach().double()
    mean, error = float(v.mean()), float(v.std()) / math.sqrt(len(v))
    p = float(2 * stats.norm.sf(abs(mean - expected) / max(error, 1e-12 * max(1.0, abs(expected)))))
    why = "weights too heavy-tailed for a verdict" if heavy else ""
    return Finding(
        statement,
        what,
        mean,
        expected,
        (mean - expected) / max(1e-12, abs(expected) or float(v.std())),
        p,
        None if heavy else True,
        why,
    )


def _heavy(log_w: torch.Tensor) -> bool:
    if float(log_w.max() - log_w.min()) < 1e-6:
        return False
    few = effective_sample_size(log_w) * len(log_w) < 100
    # weights of finitely many values are bounded, and their tail is no Pareto law
    return few or (len(log_w.unique()) > len(log_w) // 2 and not pareto_k(log_w) < _HEAVY)


def _weights(
    problem: sc.ControlProblem, control: Any, paths: Paths, reference: Paths, exact: _Known | None
) -> Iterator[Finding]:
    ratio, other = paths.log_ratio().double(), None
    yield _mean_is("change of measure", "E_P[dQ0/dP]", (-ratio).exp(), 1.0, _heavy(-ratio))
    with torch.no_grad():
        other = reference.log_ratio(control).double()
    yield _mean_is("change of measure", "E_Q0[dP/dQ0]", other.exp(), 1.0, _heavy(other))
    kl = paths.kl().double()
    yield _mean_is("KL = E[log dP/dQ0]", "E[log-ratio] - E[KL terms]", ratio - kl, 0.0)
    yield Finding(
        "KL >= 0", "smallest KL term", float(kl.min()), 0.0, min(0.0, float(kl.min())), None, bool(kl.min() >= 0)
    )
    log_w, log_v = log_weights(problem, paths).double(), log_weights(problem, reference).double()
    level = float(torch.logsumexp(log_w, 0)) - math.log(len(log_w))
    both_heavy = _heavy(log_w) or _heavy(log_v)
    yield _mean_is(
        "Z is one number",
        "Z of the reference's paths / Z of these",
        (log_v - level).exp() - ((log_w - level).exp() - 1.0),
        1.0,
        both_heavy,
    )
    if exact is not None:
        yield _mean_is("E_P[w] = Z", "mean weight / exact Z", (log_w - _log_z(exact)).exp(), 1.0, _heavy(log_w))
        yield from _lemma_2(problem, paths, exact.solution)


def _log_z(exact: _Known) -> float:
    return float(exact.solution.log_z)


def _lemma_2(problem: sc.ControlProblem, paths: Paths, exact: Any) -> Iterator[Finding]:
    """``E[exp(R_k/alpha) dQ0/dP (from step k on) | x_k] = exp(v_k(x_k)/alpha)``, on average and against a function of
    the state: of every kind of chain."""
    clock = [float(t) for t in paths.times]
    main = [k for k, t in enumerate(clock[:-1]) if t >= -1e-9]
    k = main[len(main) // 2]
    with torch.no_grad():
        steps = (paths.log_target() - paths.log_ratio(per_step=True)).double()
        x = paths.states[k]
        rest = (
            paths.reward.double() / problem.alpha + steps[k:].sum(0) - exact.value(x, clock[k]).double() / problem.alpha
        )
    heavy, first = _heavy(rest), torch.tanh(x.flatten(1)[:, 0].double())
    for name, phi in (("", torch.ones_like(rest)), (" tanh(x)", first)):
        values = (rest.exp() - 1) * phi
        yield _mean_is("Lemma 2", f"E[(w/psi - 1){name}] from t={clock[k]:.3g} on", values, 0.0, heavy)


def _cdf(law: Any, direction: np.ndarray) -> Callable[[float], float]:
    """Distribution function of a projection of a Gaussian, a mixture or a point."""
    if hasattr(law, "means"):
        weights, means, covs = (v.double().numpy() for v in (law.weights, law.means, law.covariances))
    else:
        weights, means, covs = np.ones(1), law.mean.double().numpy()[None], law.covariance_matrix.double().numpy()[None]
    centres, spreads = (
        means @ direction,
        np.sqrt(np.maximum(np.einsum("i,kij,j->k", direction, covs, direction), 1e-300)),
    )
    return lambda c: float((weights * stats.norm.cdf((c - centres) / spreads)).sum())


def _directions(d: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    rows = [np.eye(d)[0]] if d == 1 else [v / np.linalg.norm(v) for v in rng.normal(size=(2, d))]
    return rows


def _events(law: Any, x: torch.Tensor, angles: bool = False) -> Iterator[tuple[str, torch.Tensor, float]]:
    """Functions of states ``(n, *event)``, what they are called, and their means under a law."""
    if hasattr(law, "probs"):
        for i in law.probs.topk(min(4, law.space.size)).indices.tolist():
            state = law.space.states(torch.tensor(i))
            name = ",".join(map(str, state.flatten().tolist()))
            yield f"P(X = {name})", (law.space.index(x.cpu()) == i).double(), float(law.probs[i])
        return
    y = x.double().cpu()
    if hasattr(law, "covariance_matrix"):
        for i, direction in enumerate(_directions(y.shape[-1])):
            cdf, a = _cdf(law, direction), torch.as_tensor(direction)
            centre = float(a @ law.mean.double())
            spread = math.sqrt(float(a @ law.covariance_matrix.double() @ a))
            for level in _LEVELS:
                c = centre + level * spread
                yield f"P(a{i + 1}.X <= m{level:+g}s)", (y @ a <= c).double(), cdf(c)
        return
    mean = law.mean.double().cpu()
    for i in range(min(2, mean.numel())):
        if angles:
            yield f"E sin(X_{i + 1} - m)", torch.sin(y[:, i] - mean[i]), 0.0
            continue
        yield f"E X_{i + 1}", y[:, i], float(mean[i])
        if isinstance(law, GridLaw):
            yield f"var X_{i + 1}", (y[:, i] - mean[i]) ** 2, float(law.variance[i])


def _theorems(problem: sc.ControlProblem, paths: Paths, known: _Known) -> Iterator[Finding]:
    """Theorems 1 to 3 for the weighted paths, of chains whose laws are known."""
    exact = known.solution
    log_w = log_weights(problem, paths).double()
    w, heavy = (log_w - _log_z(known)).exp(), _heavy(log_w)
    clock = [float(t) for t in paths.times]
    steps = [k for k, t in enumerate(clock) if t >= -1e-9]
    end, middle = len(clock) - 1, steps[len(steps) // 2]
    for name, k in (("Theorem 1", end), ("Theorem 2", middle)):
        try:
            law = exact.marginal(clock[k])
        except sc.NoExactSolution:
            continue
        for what, values, expected in _events(law, paths.states[k], bool(problem.reference.angles)):
            yield _mean_is(name, f"{what} at t={clock[k]:.3g}, weighted", w * values, expected, heavy)
    if problem.running_cost_function is not None:
        return
    try:
        law = exact.bridge(clock[middle], clock[end], paths.end.cpu())
    except sc.NoExactSolution:
        return
    for what, values in _residuals(law, paths.states[middle].cpu(), paths.end.cpu()):
        yield _mean_is("Theorem 3", f"{what}, weighted", w * values, 0.0, heavy)


def _residuals(law: Any, x: torch.Tensor, end: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What of X_s the reference's bridge to X_T does not foretell."""
    if hasattr(law, "probs"):
        for i in law.probs.mean(0).topk(min(3, law.space.size)).indices.tolist():
            state = ",".join(map(str, law.space.states(torch.tensor(i)).flatten().tolist()))
            yield f"1(X_s = {state}) - P_pre(.|X_T)", (law.space.index(x) == i).double() - law.probs[:, i].double()
        return
    residual = x.double() - law.mean.double()
    for name, phi in (("1", torch.ones(len(x))), ("tanh(X_T)", torch.tanh(end.double()[:, 0]))):
        yield f"E[(X_s - E_pre[X_s|X_T]) {name}]", residual[:, 0] * phi
    variance = residual[:, 0] ** 2 - float(law.covariance_matrix.double()[0, 0, 0])
    yield "variance of X_s given X_T less the reference's", variance


def _gap(problem: sc.ControlProblem, paths: Paths, known: _Known | None, evaluation: Any) -> Iterator[Finding]:
    gap, error = evaluation.gap.value, max(evaluation.gap.stderr, 1e-12)
    p = float(stats.norm.sf(-gap / error))
    yield Finding("J <= alpha log Z", f"gap, {'exact' if evaluation.exact else 'estimated'}", gap, None, gap, p, True)
    if known is None or (problem.start == "fixed" and problem.random_start):
        return
    try:
        law = known.solution.marginal(problem.horizon)
    except sc.NoExactSolution:
        return
    upper, n = max(0.0, gap + 5 * error), len(paths.end)
    allowed = math.sqrt(upper / 2) + math.sqrt(math.log(2 / (FAMILY_WISE_ERROR / 10)) / (2 * n))
    for what, distance in _distances(law, paths.end):
        yield Finding(
            "Theorem 1 and Pinsker",
            f"distance of unweighted {what} to p_r",
            distance,
            None,
            distance,
            None,
            distance <= allowed,
            f"its gap allows {allowed:.3f}",
        )


def _distances(law: Any, end: torch.Tensor) -> Iterator[tuple[str, float]]:
    """Distances of samples from a law that are at most total variation and sampling error."""
    if hasattr(law, "covariance_matrix"):
        x = end.double().cpu().numpy()
        for i, direction in enumerate(_directions(x.shape[-1])):
            cdf = np.vectorize(_cdf(law, direction))
            yield f"a{i + 1}.X_T", float(stats.kstest(x @ direction, cdf).statistic)
    elif hasattr(law, "probs"):
        for what, values, expected in _events(law, end):
            yield what, abs(float(values.mean()) - expected)


def _judged(found: list[Finding]) -> tuple[Finding, ...]:
    """Verdicts of the statistical tests, at equal shares of the family-wise error."""
    share = FAMILY_WISE_ERROR / max(1, sum(f.p is not None for f in found))
    return tuple(
        f if f.p is None or f.passed is None else Finding(**{**vars(f), "passed": bool(f.p >= share)}) for f in found
    )
