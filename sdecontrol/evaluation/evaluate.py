"""``evaluate``: how good a control is, each number an estimate with its standard error."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from textwrap import shorten
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..chains.base import Chain
from ..paths.paths import Paths
from ..paths.weights import effective_number
from ..precision import full_precision
from ..problems.problem import ControlProblem
from ..problems.reward_groups import reward_groups
from ..problems.simulate import simulate_chain
from ..problems.simulation_options import SimulationOptions
from ..randomness import Place, derive_seed, fresh_seed
from ..shapes import PerPath
from ..tensors import check_count
from .estimates import Estimate, as_plain, effective_sample_size, jackknife, log_mean_weight, mean_estimate, pareto_k
from .second_look import Ways, look_again
from .verdict import CONFIRMED, UNRELIABLE, judge

_REPLICAS = 32  # paths per start, where the start is random and fixed
_SHOWN = 5  # prompts with the lowest rewards in a table, and as many with the highest
_START_ESS = 0.3  # effective fraction of those below which their log mean weight is biased


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
        verdict: "confirmed": a second estimate of log Z that does not share the first one's blindness agrees.
            "unconfirmed": nothing speaks against the numbers, and nothing else speaks for them. "unreliable": something
            speaks against them.
        reliability: why, in words.
        pareto_k: tail index of the weights.
        exact: whether ``gap`` is measured against an exact log Z; otherwise it is *estimated*, and blind to modes that
            were never visited.
        n: number of paths.
        discretisation: log Z of the chain less that of continuous time, what its grid and scheme make of the problem,
            where the latter is known in closed form (a mixture in a model's place); else None.
        details: of :class:`WeightedRewards` the mean of each without its weight ("reward/NAME"), and of
            :class:`Prompts` the mean reward of each text ("prompt/TEXT").
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
    verdict: str
    reliability: str
    pareto_k: float
    exact: bool
    n: int
    discretisation: Estimate | None = None
    details: dict[str, Estimate] = field(default_factory=dict)

    def _detailed(self) -> list[tuple[str, Estimate, str]]:
        """Rows of a table: each reward, and prompts, of many those with the lowest and the highest rewards."""
        split = [(*name.partition("/")[::2], mean) for name, mean in self.details.items()]
        several = [("  " + name, mean, "of which") for kind, name, mean in split if kind == "reward"]
        prompts = sorted(((name, mean) for kind, name, mean in split if kind == "prompt"), key=lambda p: p[1].value)
        if len(prompts) > 2 * _SHOWN:
            prompts = [*prompts[:_SHOWN], *prompts[-_SHOWN:]]
        return [*several, *(("  " + shorten(text, 30), mean, "reward at this prompt") for text, mean in prompts)]

    @property
    def reliable(self) -> bool:
        """Whether ``gap`` and ``log_z`` are confirmed."""
        return self.verdict == CONFIRMED

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {**as_plain(self), "reliable": self.reliable}

    def __str__(self) -> str:
        how = "exact" if self.exact else "estimated"
        rows = [("reward", self.reward, "E r(X_T)")]
        rows += self._detailed()
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
        if self.discretisation is not None:
            rows.append(("discretised", self.discretisation, "log Z of the chain less that of continuous time"))
        if self.elbo.value == -math.inf:  # then no control has a finite one, or this one has none
            rows = [row for row in rows if row[0] not in ("objective", "gap", "reward")]
            rows[[row[0] for row in rows].index("ELBO")] = ("ELBO", self.elbo, "paths of weight 0: none; log Z alone")
        rows = [row for row in rows if not math.isnan(row[1].value)]  # particles have no KL
        width, first = max(len(str(r[1])) for r in rows), max(13, *(len(r[0]) for r in rows))
        lines = [f"{name:<{first}} {value!s:<{width}}  {what}" for name, value, what in rows]
        return "\n".join([*lines, f"{'verdict':<{first}} {self.verdict:<{width}}  {self.reliability}"])


@full_precision()
def evaluate(
    problem: ControlProblem,
    control: Any,
    chain: Chain,
    n: int = 4096,
    seed: int | None = None,
    *,
    confirm: bool | int = True,
    known: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """Evaluate a control on fresh paths of the chain.

    Args:
        control: any control; None for the reference.
        confirm: look for a second estimate of log Z, from as many paths and rewards again at most (a number: from so
            many); False: the verdict is then "unconfirmed" at best, unless log Z is known.
        known: of an exact solution, where there is one (``known_values()``): the chain's "log_z", "start_log_z"
            ``E_nu log Z(X_0)``, and "start_value" ``x_0 -> log Z(x_0)``, ``(batch,)``, with which a random fixed start
            adds no noise to the gap; and "continuous_log_z".
        batch_size: simulate so many paths at a time, in the second look, too.
    """
    log_z, start_log_z, start_value = ((known or {}).get(name) for name in ("log_z", "start_log_z", "start_value"))
    check_count("n", n, 64, why="paths to estimate from")
    budget = budget_of(confirm, n)
    seed = fresh_seed(seed)
    how = SimulationOptions(chunk=batch_size)
    paths = simulate_chain(problem, chain, n, control, seed=seed, keep="end", how=how)
    reward, cost, kl = paths.reward.double(), paths.cost.double(), paths.kl().double()
    log_w = paths.log_weights(dtype=torch.float64)
    elbo = mean_estimate(log_w)  # its mean is J/alpha too, and its spread vanishes at the optimum
    estimated = log_mean_weight(log_w)
    tail = pareto_k(log_w)
    look = None
    if budget:
        place = derive_seed(seed, Place.EVALUATION_LOOK)
        look = look_again(
            problem, chain, control, budget, place, ways=Ways(reference=control is not None), batch_size=batch_size
        )
    verdict, why = judge(log_w, tail, estimated, elbo, look, log_z)
    start_gap = Estimate(0.0, 0.0)
    if not problem.random_start and problem.condition is None:
        gap = Estimate(log_z, 0.0) - elbo if log_z is not None else gap_estimate(log_w, log_w)
    else:
        if start_log_z is not None and start_value is not None:
            top, gap = (
                Estimate(start_log_z, 0.0),
                mean_estimate(start_value(problem.draw_start(n, seed)).double() - log_w),
            )
        else:
            if bool((log_w == -math.inf).any()):  # of a start with such paths no mean log weight is known
                top, gap, effective = Estimate(math.nan), Estimate(math.inf), float(_REPLICAS)
            else:
                top, gap, effective = _per_start(problem, control, chain, n, seed, how)
            if effective < _START_ESS * _REPLICAS and verdict != UNRELIABLE:
                verdict = UNRELIABLE
                why = f"only {effective:.1f} effective of {_REPLICAS} paths per start: log Z(X_0) is biased low there"
        start_gap = (Estimate(log_z, 0.0) if log_z is not None else estimated) - top
    known_z = estimated if log_z is None else Estimate(log_z, 0.0)
    continuous = (known or {}).get("continuous_log_z")
    groups = reward_groups(problem, reward, paths.reward_parts, paths.condition)
    return Evaluation(
        reward=mean_estimate(reward),
        running_cost=mean_estimate(cost),
        kl=mean_estimate(kl),
        objective=Estimate(problem.alpha * elbo.value, problem.alpha * elbo.stderr),
        elbo=elbo,
        log_z=estimated,
        ess=jackknife(effective_sample_size, log_w),
        gap=gap,
        start_gap=start_gap,
        verdict=verdict,
        reliability=why,
        pareto_k=tail,
        exact=log_z is not None and (not problem.random_start or start_value is not None),
        n=n,
        discretisation=None if continuous is None else known_z - Estimate(continuous, 0.0),
        details={name: mean_estimate(values) for name, values in groups.items() if len(values)},
    )


def budget_of(confirm: bool | int, n: int) -> int:
    """Paths of a second look: ``n`` where it is wanted, or as many as are said."""
    if isinstance(confirm, bool):
        return n if confirm else 0
    check_count("confirm", confirm, 64, why="paths of a second look")
    return int(confirm)


def gap_estimate(log_w: Tensor, below: Tensor) -> Estimate:
    """``log mean w - mean of below``, with the error of the difference: both come from the same paths, ``(n,)``."""
    level = log_mean_weight(log_w).value
    influence = (log_w - level).exp() - below
    return Estimate(level - float(below.mean()), float(influence.std()) / math.sqrt(len(log_w)))


def _per_start(
    problem: ControlProblem, control: Any, chain: Chain, n: int, seed: int, how: SimulationOptions
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
        how=replace(how, state=x0),
    )
    log_w = log_weights(problem, paths).double().reshape(starts, _REPLICAS)
    whole = torch.logsumexp(log_w, 1) - math.log(_REPLICAS)
    without = torch.stack(
        [torch.logsumexp(torch.cat((log_w[:, :j], log_w[:, j + 1 :]), 1), 1) for j in range(_REPLICAS)]
    ).mean(0) - math.log(_REPLICAS - 1)
    level = _REPLICAS * whole - (_REPLICAS - 1) * without
    effective = effective_number(log_w, 1).mean()
    return mean_estimate(level), mean_estimate(level - log_w.mean(1)), float(effective)
