"""``evaluate``: how good a control is, each number an estimate with its standard error."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..chains.base import Chain
from ..paths.paths import Paths
from ..paths.weights import effective_number
from ..precision import full_precision
from ..problems.problem import ControlProblem
from ..problems.simulate import simulate_chain
from ..problems.simulation_options import SimulationOptions
from ..randomness import Place, derive_seed, fresh_seed
from ..shapes import PerPath
from ..tensors import check_count
from .estimates import Estimate, as_plain, effective_sample_size, log_mean_weight, mean_estimate, pareto_k

_ESS_FLOOR = 100  # effective samples below which no weight average is trusted
_REPLICAS = 32  # paths per start, where the start is random and fixed
_START_ESS = 0.3  # effective fraction of those below which their log mean weight is biased
_AGREEMENT = 4.0  # standard errors within which two estimates of log Z agree


def log_weights(problem: ControlProblem, paths: Paths) -> PerPath:
    """Log importance weights ``R/alpha - log dP^u/dQ0`` of paths towards the exact law, ``(batch,)``.

    ``mean(exp(log_w))`` is Z without bias at every step size.
    """
    with torch.no_grad(), problem.evaluating():
        return paths.towards(problem).log_weights()


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` returns; prints as a table.

    Attributes:
        reward: ``E r(X_T)``.
        running_cost: ``E sum h f``.
        kl: ``KL(P^u || Q0)``.
        objective: ``J = E[reward - running_cost] - alpha KL``, from the mean log weight: near the optimum its error is
            far below those of its parts, with which it agrees within theirs.
        elbo: ``J / alpha``, a lower bound of log Z.
        log_z: log Z by importance weights (its exponential is unbiased), or the exact one in ``gap``'s stead.
        ess: effective sample size of the weights, a fraction.
        gap: what the objective lacks to its maximum over controls, in units of alpha: ``KL(P^u || Q_fine)`` for a point
            or controlled start; against ``E log Z(X_0)`` where a random start is fixed, and against ``E log Z(y)`` (of
            both: ``E log Z(X_0, y)``) with conditions.
        start_gap: ``log Z - E log Z(X_0)`` (with conditions, of them too), what no control removes; 0 for a point or
            controlled start without conditions.
        reliable: whether ``gap`` and ``log_z`` can be trusted (see ``reliability``).
        reliability: why, in words.
        pareto_k: tail index of the weights.
        exact: whether ``gap`` is measured against an exact log Z; otherwise it is *estimated*, and blind to modes that
            were never visited.
        n: number of paths.
    """

    log_z_from: ClassVar[str] = "by importance weights"

    reward: Estimate
    running_cost: Estimate
    kl: Estimate
    objective: Estimate
    elbo: Estimate
    log_z: Estimate
    ess: Estimate
    gap: Estimate
    start_gap: Estimate
    reliable: bool
    reliability: str
    pareto_k: float
    exact: bool
    n: int

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return as_plain(self)

    def __str__(self) -> str:
        how = "exact" if self.exact else "estimated"
        rows = [("reward", self.reward, "E r(X_T)")]
        if self.running_cost.value or self.running_cost.stderr > 0:
            rows.append(("running cost", self.running_cost, "E sum h f, or of backward kernels"))
        rows += [
            ("KL", self.kl, "KL(P^u || Q0)"),
            ("objective", self.objective, "reward - cost - alpha KL"),
            ("ELBO", self.elbo, "objective / alpha, below log Z"),
            ("log Z", self.log_z, self.log_z_from),
            ("ESS", self.ess, f"fraction of {self.n} paths"),
            ("gap", self.gap, f"KL to the optimum, {how}"),
        ]
        if self.start_gap.value or self.start_gap.stderr > 0:
            rows.append(("start gap", self.start_gap, "left by a fixed random start, or by conditions"))
        rows = [row for row in rows if not math.isnan(row[1].value)]  # particles have no KL
        width = max(len(str(r[1])) for r in rows)
        lines = [f"{name:<13} {value!s:<{width}}  {what}" for name, value, what in rows]
        return "\n".join([*lines, f"{'reliable':<13} {'yes' if self.reliable else 'no':<{width}}  {self.reliability}"])


@full_precision()
def evaluate(
    problem: ControlProblem,
    control: Any,
    chain: Chain,
    n: int = 4096,
    seed: int | None = None,
    *,
    log_z: float | None = None,
    start_log_z: float | None = None,
    start_value: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Evaluate a control on fresh paths of the chain.

    Args:
        control: any control; None for the reference.
        log_z, start_log_z: the chain's exact log Z and ``E_nu log Z(X_0)``, where they are known.
        start_value: exact ``x_0 -> log Z(x_0)``, ``(batch,)``: a random fixed start then adds no noise to the gap.
    """
    check_count("n", n, 64, why="paths to estimate from")
    seed = fresh_seed(seed)
    paths = simulate_chain(problem, chain, n, control, seed=seed, keep="end")
    reward, cost, kl = paths.reward.double(), paths.cost.double(), paths.kl().double()
    log_w = paths.log_weights(dtype=torch.float64)
    elbo = mean_estimate(log_w)  # its mean is J/alpha too, and its spread vanishes at the optimum
    estimated = log_mean_weight(log_w)
    tail = pareto_k(log_w)
    second = None
    if control is not None:
        reference = simulate_chain(problem, chain, n, seed=derive_seed(seed, Place.EVALUATION_REFERENCE), keep="end")
        second = log_weights(problem, reference).double()
    reliable, why = _reliability(log_w, tail, estimated, second)
    start_gap = Estimate(0.0, 0.0)
    if not problem.random_start and problem.condition is None:
        gap = Estimate(log_z, 0.0) - elbo if log_z is not None else _gap(log_w)
    else:
        if start_log_z is not None and start_value is not None:
            top, gap = (
                Estimate(start_log_z, 0.0),
                mean_estimate(start_value(problem.draw_start(n, seed)).double() - log_w),
            )
        else:
            top, gap, effective = _per_start(problem, control, chain, n, seed)
            if effective < _START_ESS * _REPLICAS and reliable:
                reliable = False
                why = f"only {effective:.1f} effective of {_REPLICAS} paths per start: log Z(X_0) is biased low there"
        start_gap = (Estimate(log_z, 0.0) if log_z is not None else estimated) - top
    return Evaluation(
        reward=mean_estimate(reward),
        running_cost=mean_estimate(cost),
        kl=mean_estimate(kl),
        objective=Estimate(problem.alpha * elbo.value, problem.alpha * elbo.stderr),
        elbo=elbo,
        log_z=estimated,
        ess=_ess(log_w),
        gap=gap,
        start_gap=start_gap,
        reliable=reliable,
        reliability=why,
        pareto_k=tail,
        exact=log_z is not None and (not problem.random_start or start_value is not None),
        n=n,
    )


def _gap(log_w: Tensor) -> Estimate:
    """``log mean w - mean log w``, with the error of the difference (both come from the same paths)."""
    level = log_mean_weight(log_w).value
    influence = (log_w - level).exp() - log_w
    return Estimate(level - float(log_w.mean()), float(influence.std()) / math.sqrt(len(log_w)))


def _ess(log_w: Tensor) -> Estimate:
    """The effective sample size with a jackknife error over 16 groups."""
    groups = 16
    kept = len(log_w) // groups * groups
    parts = log_w[:kept].reshape(groups, -1)
    left_out = [effective_sample_size(torch.cat((parts[:j], parts[j + 1 :])).flatten()) for j in range(groups)]
    spread = torch.tensor(left_out, dtype=torch.float64)
    return Estimate(effective_sample_size(log_w), float(((groups - 1) * spread.var(correction=0)).sqrt()))


def _reliability(log_w: Tensor, tail: float, estimate: Estimate, second: Tensor | None) -> tuple[bool, str]:
    effective = effective_sample_size(log_w) * len(log_w)
    if not tail < 0.7:
        return False, f"heavy-tailed weights (Pareto k = {tail:.2f}, must be < 0.7)"
    if effective < _ESS_FLOOR:
        return False, f"only {effective:.0f} effective samples (at least {_ESS_FLOOR} wanted)"
    if second is None:
        return True, f"Pareto k = {tail:.2f}; these are the reference's own paths"
    return confirmed_by_reference(f"Pareto k = {tail:.2f}", estimate, second)


def confirmed_by_reference(facts: str, log_z: Estimate, log_w: Tensor) -> tuple[bool, str]:
    """Whether log weights of the reference's paths leave an estimate of log Z standing, and why, after the facts that
    speak for it."""
    if not pareto_k(log_w) < 0.7 or effective_sample_size(log_w) * len(log_w) < _ESS_FLOOR:
        return True, f"{facts}; unconfirmed: the reference's paths give no second estimate of log Z"
    other = log_mean_weight(log_w)
    if not agree(other, log_z):
        return False, f"the reference's paths disagree: log Z = {other} there (a mode may be missing here)"
    return True, f"{facts}; confirmed by the reference's paths (log Z = {other})"


def agree(a: Estimate, b: Estimate) -> bool:
    """Whether two estimates are within four standard errors of one another."""
    return not abs(a.value - b.value) > _AGREEMENT * math.hypot(a.stderr, b.stderr) + 1e-6


def _per_start(
    problem: ControlProblem, control: Any, chain: Chain, n: int, seed: int
) -> tuple[Estimate, Estimate, float]:
    """``E_nu log Z(X_0)`` and ``E_nu[log Z(X_0) - E log w]`` from replicated paths per start, and the mean effective
    number of paths per start. The bias of the logarithm is removed by the jackknife, to second order."""
    starts = max(8, n // _REPLICAS)
    place = derive_seed(seed, Place.EVALUATION_STARTS)
    x0 = problem.draw_start(starts, place).repeat_interleave(_REPLICAS, 0)
    y = problem.draw_condition(starts, place)
    y = None if y is None else y.repeat_interleave(_REPLICAS, 0)
    paths = simulate_chain(
        problem,
        chain,
        starts * _REPLICAS,
        control,
        seed=derive_seed(seed, Place.EVALUATION_REPLICAS),
        keep="end",
        condition=y,
        how=SimulationOptions(state=x0),
    )
    log_w = log_weights(problem, paths).double().reshape(starts, _REPLICAS)
    whole = torch.logsumexp(log_w, 1) - math.log(_REPLICAS)
    without = torch.stack(
        [torch.logsumexp(torch.cat((log_w[:, :j], log_w[:, j + 1 :]), 1), 1) for j in range(_REPLICAS)]
    ).mean(0) - math.log(_REPLICAS - 1)
    level = _REPLICAS * whole - (_REPLICAS - 1) * without
    effective = effective_number(log_w, 1).mean()
    return mean_estimate(level), mean_estimate(level - log_w.mean(1)), float(effective)
