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
    chain is known, too: Z itself, and Theorems 1 to 3 for the *weighted* paths, which must obey them within sampling
    error whatever the control. The unweighted samples of a learned control are off by what its gap allows: their
    distance is reported and judged against Pinsker's bound, ``distance <= sqrt(gap/2)``.

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
    if exact is not None:
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


def _exact(problem: sc.ControlProblem, settings: dict[str, Any]) -> tuple[Any, str]:
    """The exact law Q_fine of the chain: its start tilted too, which is what weighted paths are drawn from."""
    if not isinstance(problem.reference, sc.SDE) or problem.condition is not None:
        return None, "none is known"
    tilted = problem
    if problem.start != "controlled" and not isinstance(problem.initial, sc.Dirac):
        try:
            tilted = sc.ControlProblem(
                problem.reference,
                problem.initial,
                problem.reward_function,
                problem.running_cost_function,
                alpha=problem.alpha,
                start="controlled",
            )
        except ValueError:
            return None, "none is known for this start"
    try:
        known: dict[str, Any] = {"time_steps": 100, **settings}
        return sc.exact_solution(tilted, **known), "of the chain"
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
    return not pareto_k(log_w) < _HEAVY or effective_sample_size(log_w) * len(log_w) < 100


def _weights(problem: sc.ControlProblem, control: Any, paths: Paths, reference: Paths, exact: Any) -> Iterator[Finding]:
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
        yield _mean_is("E_P[w] = Z", "mean weight / exact Z", (log_w - float(exact.log_z)).exp(), 1.0, _heavy(log_w))


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


def _theorems(problem: sc.ControlProblem, paths: Paths, exact: Any) -> Iterator[Finding]:
    """Theorems 1 to 3 for the weighted paths."""
    log_w = log_weights(problem, paths).double()
    w, heavy = (log_w - float(exact.log_z)).exp(), _heavy(log_w)
    clock = [float(t) for t in paths.times]
    steps = [k for k, t in enumerate(clock) if t >= -1e-9]
    end = len(clock) - 1
    for name, k in (("Theorem 1", end), ("Theorem 2", steps[len(steps) // 2])):
        law, x = exact.marginal(clock[k]), paths.states[k].double().cpu()
        for i, direction in enumerate(_directions(x.shape[-1])):
            cdf, y = _cdf(law, direction), x @ torch.as_tensor(direction)
            centre, spread = (
                float(direction @ law.mean.double().numpy()),
                math.sqrt(float(direction @ law.covariance_matrix.double().numpy() @ direction)),
            )
            for level in _LEVELS:
                c = centre + level * spread
                yield _mean_is(
                    name, f"P(a{i + 1}.X <= m{level:+g}s) at t={clock[k]:.3g}, weighted", w * (y <= c), cdf(c), heavy
                )
    if problem.running_cost_function is None:
        s, x = steps[len(steps) // 2], paths.end.double().cpu()
        law = exact.bridge(clock[s], clock[end], paths.end.cpu().to(problem.dtype))
        residual = paths.states[s].double().cpu() - law.mean.double()
        for name, phi in (("1", torch.ones(len(x))), ("tanh(X_T)", torch.tanh(x[:, 0]))):
            yield _mean_is(
                "Theorem 3", f"E[(X_s - E_pre[X_s|X_T]) {name}], weighted", w * residual[:, 0] * phi, 0.0, heavy
            )
        variance = residual[:, 0] ** 2 - float(law.covariance_matrix.double()[0, 0, 0])
        yield _mean_is(
            "Theorem 3", "variance of X_s given X_T less the reference's, weighted", w * variance, 0.0, heavy
        )


def _gap(problem: sc.ControlProblem, paths: Paths, exact: Any, evaluation: Any) -> Iterator[Finding]:
    gap, error = evaluation.gap.value, max(evaluation.gap.stderr, 1e-12)
    p = float(stats.norm.sf(-gap / error))
    yield Finding("J <= alpha log Z", f"gap, {'exact' if evaluation.exact else 'estimated'}", gap, None, gap, p, True)
    if exact is None or (problem.start == "fixed" and not isinstance(problem.initial, sc.Dirac)):
        return
    upper = max(0.0, gap + 5 * error)
    law, x, n = exact.marginal(problem.horizon), paths.end.double().cpu().numpy(), paths.end.shape[0]
    allowed = math.sqrt(upper / 2) + math.sqrt(math.log(2 / (FAMILY_WISE_ERROR / 10)) / (2 * n))
    for i, direction in enumerate(_directions(x.shape[-1])):
        cdf = _cdf(law, direction)
        distance = float(stats.kstest(x @ direction, np.vectorize(cdf)).statistic)
        yield Finding(
            "Theorem 1 and Pinsker",
            f"distance of unweighted a{i + 1}.X_T to p_r",
            distance,
            None,
            distance,
            None,
            distance <= allowed,
            f"its gap allows {allowed:.3f}",
        )


def _judged(found: list[Finding]) -> tuple[Finding, ...]:
    """Verdicts of the statistical tests, at equal shares of the family-wise error."""
    share = FAMILY_WISE_ERROR / max(1, sum(f.p is not None for f in found))
    return tuple(
        f if f.p is None or f.passed is None else Finding(**{**vars(f), "passed": bool(f.p >= share)}) for f in found
    )
