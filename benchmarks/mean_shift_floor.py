"""What no control that shifts the means of a chain's steps can gain, estimated from the chain's own paths.

The soft-optimal chain ``p*_k(y | x) ∝ p0(y | x) exp(v_{k+1}(y))`` (v in units of alpha) has kernels of another
covariance than the model's, so that the best mean-shift control is a distance from it. With any control c,

    v_k(x) - { E_c v_{k+1} - |c|^2/2 } = KL( N(m + s c, S) || p*_k(. | x) ),

so the floor is ``min_c E_{P^c} sum_k KL(N(m_k + s_k c_k, S_k) || p*_k)``. Estimated is the sum of the smallest KL of
every step at states of the optimal chain. That is the floor but for terms of the second order in it: the sum's own
gradient moves the minimiser, and the states are those of p*, not of P^c.

Of one step: let ``l(xi) = v_{k+1}(m + s xi)`` less what is linear in it, which the best c takes away. Then
``KL = log E e^l - E l = int_0^1 (1 - q) Var_q(l) dq`` with the variance under the law tilted by ``e^{q l}``; two Gauss
points in q, which for quadratic v are within 3 % of ``1/2 [tr A - log det(I + A)]``, ``A = -S hess v <= 2``.
``v_{k+1}(y)`` is ``log E[exp(R/alpha) | y]``, the mean over M weighted paths from y: no value is fitted. Its
noise does not bias the variance, since that is taken between two independent sets of paths, tilted by a third one; the
noise within a set is common to all y, so that it hardly varies with y. What is left is the bias of the logarithm,
O(1/M^2) by a jackknife. Pairs (xi, -xi) split l into its even part, curvature, which has nothing linear; and its odd
part, from which ``|E l xi|^2`` is subtracted by a U-statistic: third derivatives, an order of the step size less where
v is smooth, and noisier, so it is given apart and is no part of the total.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sdecontrol as sc
from sdecontrol.evaluation.estimates import Estimate

__all__ = ["Floor", "mean_shift_floor", "step_floor"]


class Floor(NamedTuple):
    """In nats: the total, half the variance alone, what odd parts would add; and per step that was looked at."""

    total: Estimate
    half_variance: Estimate
    odd: Estimate
    steps: list[int]
    by_step: list[Estimate]


#: nodes and weights of ``int_0^1 (1 - q) f(q) dq``
_GAUSS = (((4 - math.sqrt(6)) / 10, 0.25 + math.sqrt(6) / 36), ((4 + math.sqrt(6)) / 10, 0.25 - math.sqrt(6) / 36))


def _variance(values: Tensor, tilt: Tensor) -> Tensor:
    """Of a function over its last dimension but for the noise of its two estimates ``(2, batch, n)``, tilted by
    ``exp(tilt)``, ``(batch,)``."""
    w = tilt.softmax(1)
    values = values - (w * values).sum(2, keepdim=True)
    return (w * values.prod(0)).sum(1) / (1 - w.square().sum(1))


def step_floor(values: Tensor, xi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The KL of one step, half its variance alone, and what odd parts would add, ``(batch,)`` each.

    Args:
        values: ``(3, 2, batch, n)``, three independent estimates of the function at xi and at -xi.
        xi: ``(batch, n, d)`` standard normal.
    """
    n = xi.shape[1]
    even, odd = (values[:, 0] + values[:, 1]) / 2, (values[:, 0] - values[:, 1]) / 2
    pairs = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    kl = sum(
        weight * _variance(even[[a, b]], q * (even[c] - even[c].mean(1, keepdim=True))) / 3
        for q, weight in _GAUSS
        for a, b, c in pairs
    )
    half = sum(_variance(even[[a, b]], torch.zeros_like(even[c])) for a, b, c in pairs) / 6
    two = torch.stack((odd[0], odd[1:].mean(0)))
    weighted = two.unsqueeze(3) * xi  # (2, batch, n, d)
    linear = (weighted.sum(2).prod(0).sum(1) - weighted.prod(0).sum((1, 2))) / (n * (n - 1))
    return torch.as_tensor(kl), torch.as_tensor(half), (two.prod(0).mean(1) - linear) / 2


def _values(chain: Any, problem: sc.ControlProblem, shift: Any, k: int, y: Tensor, noises: Tensor) -> Tensor:
    """``log E[exp(R/alpha)]`` over M paths from y at step k, ``(batch, n)``; less its bias of the order 1/M, by the
    jackknife of two halves.

    Args:
        shift: ``(k, x, y) -> c`` of the control whose paths they are, with their weights; None: the reference's.
        y: ``(batch, n, *event)``. noises: ``(K - k, batch, M, *event)``, the same for all n.
    """
    batch, n, many = *y.shape[:2], noises.shape[2]
    event = y.shape[2:]
    x = y.unsqueeze(2).expand(batch, n, many, *event).flatten(0, 2)
    log_ratio = torch.zeros(len(x), dtype=torch.float64)
    for j, noise in zip(range(k, chain.steps), noises):
        mean, scale = chain.kernel(j, x)
        xi = noise.unsqueeze(1).expand(batch, n, many, *event).flatten(0, 2)
        if shift is not None:
            c = shift(j, x, None)
            log_ratio += (c * (xi + 0.5 * c)).flatten(1).sum(1)
            xi = xi + c
        x = mean + scale * xi
    log_w = problem.reward(chain.decode(x)).double() / problem.alpha - log_ratio
    halves = log_w.reshape(batch, n, 2, many // 2).logsumexp(3) - math.log(many // 2)
    return 2 * (halves.logsumexp(2) - math.log(2)) - halves.mean(2)


def optimal_states(problem: sc.ControlProblem, time_steps: Any, paths: int, keep: int, seed: int) -> Tensor:
    """``(K + 1, keep, *event)``: paths of the optimal chain, drawn from the reference's in proportion to their
    weights."""
    found = sc.simulate(problem, paths, time_steps=time_steps, seed=seed, keep="states")
    log_w = problem.reward(found.samples).double() / problem.alpha
    generator = torch.Generator().manual_seed(seed)
    return found.states[:, torch.multinomial(log_w.softmax(0), keep, generator=generator)]


@torch.no_grad()
def mean_shift_floor(
    problem: sc.ControlProblem,
    time_steps: Any = None,
    *,
    states: int = 16,
    directions: int = 16,
    inner: int = 16,
    every: int = 4,
    control: Any = None,
    seed: int = 0,
) -> Floor:
    """The floor of a problem with Gaussian steps and no running cost.

    Args:
        states: of optimal paths at each step that is looked at. directions: pairs (xi, -xi) at each. inner: M.
        every: one step of so many is looked at; it stands for the others.
        control: of a solution: the inner paths are its, with weights; None: the reference's.
    """
    chain = problem.chain(time_steps)
    generator = torch.Generator().manual_seed(seed)
    steps = list(range(min(every // 2, chain.steps - 1), chain.steps, every))
    optimal = optimal_states(problem, time_steps, 128 * states, states, seed)
    shift = None if control is None else control.on_chain(chain)
    parts = []
    for k in steps:
        x, event = optimal[k], optimal.shape[2:]
        mean, scale = chain.kernel(k, x)
        xi = torch.randn(states, directions, *event, generator=generator)
        both = torch.stack((xi, -xi)).flatten(1, 2)  # (2, states * directions, *event)
        y = (mean.repeat_interleave(directions, 0) + scale * both).reshape(2, states, directions, *event)
        y = y.transpose(0, 1).flatten(1, 2)
        found = []
        for _ in range(3):
            noises = torch.randn(chain.steps - k - 1, states, inner, *event, generator=generator)
            values = _values(chain, problem, shift, k + 1, y, noises)
            found.append(values.reshape(states, 2, directions).transpose(0, 1))
        parts.append(torch.stack(step_floor(torch.stack(found), xi.flatten(2).double())))
    weight = chain.steps / len(steps)
    made = torch.stack(parts)  # (steps, 3, states)
    total, half, odd = (_estimate(weight * made[:, i].sum(0)) for i in range(3))
    return Floor(total, half, odd, steps, [_estimate(part[0]) for part in made])


def _estimate(values: Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(len(values)))
