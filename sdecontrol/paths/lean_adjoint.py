"""The lean adjoint along stored paths, and the regression targets it gives a control.

A step is ``x_{k+1} = mean_k(x_k) + scale_k(x_k) (c_k + xi_k)``. With ``a = -grad V`` the best mean-shift control of the
chain satisfies ``c_k(x) = E[scale_k^T a_{k+1} | x_k = x]``, and the envelope theorem gives the recursion in which the
shift is held fixed (Domingo-Enrich et al. 2409.08861; here for any chain, so that the chain's own optimum is the exact
fixed point)::

    a_K = grad r(x_K)/alpha,    a_k = (d x_{k+1}/d x_k at fixed c_k, xi_k)^T a_{k+1} - h_k grad f(x_k, t_k)/alpha.

Where a step is any smooth map of its noise, ``x_{k+1} = F_k(x_k, c_k + xi_k)`` (manifolds, simulators), the same holds
with ``(dF/dz)^T`` in the place of ``scale_k^T``: ``c_k(x) = E[(dF/dz)^T a_{k+1} | x_k = x]``. On a manifold an adjoint
is a cotangent vector: a normal part that autograd returns is not seen by the step before, which leads along the
manifold.

**Zero variance.** On a linear-quadratic chain at the optimum ``a_{k+1}`` depends on the noise of its own step through
``z_k = J_k^{-T} (d c_k/d x)^T xi_k`` alone, ``J_k = d(mean_k + scale_k c_k)/dx`` the step's Jacobian with the control
in it. Its mean given x_k is 0, so ``a_{k+1} - z_k`` in a_{k+1}'s place, in the target and in the recursion, changes no
expectation and leaves no variance at all there (after 2410.00345, which subtracts the later steps' part only). Of a map
it is pulled back by the derivatives of the noiseless step ``F_k(x_k, c_k)``, which know nothing of xi: what is
subtracted then is linear in xi, as before, and its mean 0.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..chains.base import Chain
from ..chains.blocks import LARGE_ROW, LEAST, bytes_per_row, parts_of, room_for
from ..chains.shifts import ShiftFunction, shift_function, shifts_along
from ..memory import remembering
from ..shapes import NoisePaths, Noises, Scale, StatePaths, States
from ..tensors import apply_scale, apply_scale_transposed, is_matrix_scale, nonfinite_rows
from .closed_loop import ClosedLoop
from .integrator import RunningCost
from .paths import Paths

#: of chains whose model is large; None where scales depend on x
_scales: weakref.WeakKeyDictionary[Chain, list[Scale] | None] = weakref.WeakKeyDictionary()

ENOUGH = 0.5  # of the tolerance: a first guess whose residual is below it will do


class StepJacobians:
    """Transposed Jacobians of the chain's steps at the states of stored paths, at fixed shifts.

    Known matrices where the chain is linear. Else the graph of every step's kernel is kept, of its own leaf, and
    products are taken: one pass backwards for an adjoint through all steps, whatever the dimension, where matrices
    would take one for each coordinate. Of a large model (``again``) none is kept: each product makes its step's. Of
    steps that are maps of their noise (``maps``) that of the noiseless step is kept beside it.
    """

    def __init__(self, paths: Paths) -> None:
        chain = paths.chain
        self.paths, self.chain, self.ndim = paths, chain, chain.event_ndim
        self.first, self.count = paths.first, paths.last - paths.first
        self.matrices: Tensor | None = None  # (K, d, d), of mean_k and so of x_{k+1}
        self.again = False  # whether no graph is kept
        self.moving = False  # whether the scale depends on x
        self.maps = not chain.gaussian
        self.stacked: Tensor | None = None  # all scales, where they are the same for all rows
        if self.maps:
            self._keep_maps()
            return
        if chain.linear_steps is not None:
            matrices, scales = chain.linear_steps
            self.matrices, self.scales = matrices[self.first : paths.last], scales[self.first : paths.last]
            if all(scale.shape == self.scales[0].shape for scale in self.scales):
                self.stacked = torch.stack(self.scales)
            return
        found = self._large()
        self.again = found is not None
        if found is not None:
            self.scales = found
        else:
            self._keep_graphs()

    @torch.enable_grad()
    def _large(self) -> list[Scale] | None:
        """All scales, each of a single row, where the steps' model is large and they do not depend on x; else None."""
        paths, chain = self.paths, self.chain
        model = next(iter(chain.reference.modules()), None)
        if model is None or len(paths) < LEAST:
            return None
        y = paths.condition

        def mean(rows: int) -> States:
            x = paths.states[-2, :rows].detach().requires_grad_(True)
            return chain.kernel(paths.last - 1, x, None if y is None else y[:rows])[0]

        if bytes_per_row(model, "mean", mean, chain.reference.modules()) < LARGE_ROW:
            return None
        if chain not in _scales:
            x = paths.states[0, :1].detach().requires_grad_(True)
            some = [chain.kernel(k, x, None if y is None else y[:1])[1] for k in range(chain.steps)]
            _scales[chain] = None if any(s.requires_grad for s in some) else [s.detach() for s in some]
        scales = _scales[chain]
        return None if scales is None else scales[self.first : paths.last]

    @torch.enable_grad()
    def _keep_graphs(self) -> None:
        """One graph a step, each of its own leaf: a product with one of them must not run through the others."""
        paths = self.paths
        self.leaves = [x.detach().requires_grad_(True) for x in paths.states[:-1].unbind(0)]
        kernels = [self.chain.kernel(self.first + j, x, paths.condition) for j, x in enumerate(self.leaves)]
        means, scales = zip(*kernels)
        self.moving = any(scale.requires_grad for scale in scales)
        randoms = means  # of x_{j+1}, but for what does not depend on x_j
        if self.moving:
            means = tuple(
                mean + apply_scale(scale, c.detach(), self.ndim) for mean, scale, c in zip(means, scales, paths.shifts)
            )
            randoms = tuple(
                mean + apply_scale(scale, xi, self.ndim) for mean, scale, xi in zip(means, scales, paths.noises)
            )
        self.outputs = means, randoms
        self.scales = [scale.detach() for scale in scales]

    @torch.enable_grad()
    def _keep_maps(self) -> None:
        paths, chain = self.paths, self.chain
        self.leaves = [x.detach().requires_grad_(True) for x in paths.states[:-1].unbind(0)]
        self.shifts = [c.detach().requires_grad_(True) for c in paths.shifts.unbind(0)]
        nothing = torch.zeros_like(self.shifts[0])
        parts = list(enumerate(zip(self.leaves, self.shifts)))
        step = lambda j, x, xi, c: chain.step(self.first + j, x, xi, c, paths.condition)  # noqa: E731
        self.moving = True
        self.outputs = (
            tuple(step(j, x, nothing, c) for j, (x, c) in parts),
            tuple(step(j, x, paths.noises[j], c) for j, (x, c) in parts),
        )

    def pulled_back(self, a: StatePaths, z: StatePaths | None) -> NoisePaths:
        """``(d x_{j+1}/d c_j)^T a_j``, less the same of the noiseless step with z, of all steps."""
        if not self.maps:
            return self.scales_transposed(a if z is None else a - z)
        found = torch.autograd.grad(self.outputs[1], self.shifts, list(a.unbind(0)), retain_graph=True)
        return torch.stack(found) if z is None else torch.stack(found) - self.scales_transposed(z)

    def scale_transposed(self, j: int, v: States) -> Noises:
        """``scale_j^T v``, of a map that of the noiseless step."""
        if self.maps:
            return torch.autograd.grad(self.outputs[0][j], self.shifts[j], v, retain_graph=True)[0]
        return apply_scale_transposed(self.scales[j], v, self.ndim)

    def scales_transposed(self, v: StatePaths) -> NoisePaths:
        """The same for all steps at once."""
        scales = self.stacked
        if scales is None:
            return torch.stack([self.scale_transposed(j, v[j]) for j in range(self.count)])
        if is_matrix_scale(self.scales[0], self.ndim):
            return v @ scales.squeeze(1)
        return v * scales.reshape(len(scales), *(1,) * (v.ndim - scales.ndim), *scales.shape[1:])

    def per_step(self, costs: StatePaths | None, alpha: float) -> StatePaths | None:
        """``h_k grad f / alpha`` of :func:`running_cost_gradients`."""
        if costs is None:
            return None
        steps = self.chain.step_sizes[self.first : self.first + self.count]
        return costs * (costs.new_tensor(steps) / alpha).reshape(-1, *(1,) * (costs.ndim - 1))

    def step(self, j: int, a: States, z: States | None) -> States:
        """``(d x_{j+1}/d x_j)^T a - (d (mean_j + scale_j c_j)/d x_j)^T z``.

        Where the scale depends on x the two Jacobians differ: z is linear in the noise, and times the noise it would
        have a mean.
        """
        if self.matrices is not None:
            return (a if z is None else a - z) @ self.matrices[j]
        if self.again:
            return self._product_again(j, a if z is None else a - z)
        mean, random = (outputs[j] for outputs in self.outputs)
        if z is None or not self.moving:
            outputs, sides = [random], [a if z is None else a - z]
        else:
            outputs, sides = [random, mean], [a, -z]
        return torch.autograd.grad(outputs, self.leaves[j], sides, retain_graph=True)[0]

    def mean_products(self, v: StatePaths) -> StatePaths:
        """``(d (mean_j + scale_j c_j)/d x_j)^T v_j`` for all steps at once."""
        if self.matrices is not None:
            return v @ self.matrices
        if self.again:
            return torch.stack([self._product_again(j, v[j]) for j in range(self.count)])
        return self._products(self.outputs[0], v)

    def _product_again(self, j: int, v: States) -> States:
        """``(d mean_j/d x)^T v`` of a graph that is made for it."""
        x = self.paths.states[j].detach().requires_grad_(True)
        with torch.enable_grad():
            mean = self.chain.kernel(self.first + j, x, self.paths.condition)[0]
        return torch.autograd.grad(mean, x, v)[0]

    def _products(self, outputs: tuple[Tensor, ...], v: StatePaths) -> StatePaths:
        return torch.stack(torch.autograd.grad(outputs, self.leaves, list(v.unbind(0)), retain_graph=True))

    def nonfinite_rows(self) -> int:
        """In how many paths a derivative of some step is not finite: the products with ones say it of all its entries
        at once."""
        if self.matrices is not None:
            return 0
        ones = torch.ones_like(self.paths.states[1:])
        if self.again:
            return nonfinite_rows(self.mean_products(ones), 1)
        return nonfinite_rows(self._products(self.outputs[1], ones), 1)


def with_a_first_slope(
    chain: Chain, control: Any, states: StatePaths, shifts: NoisePaths, condition: Any
) -> NoisePaths:
    """The shifts, the first replaced by the next step's control at the same states where all paths start at one point.

    No regression sees how a control varies around a point at which it is always taken; the next step's slope, taken
    there, is off by O(h) only, and as much a function of the start alone.
    """
    first = states[0].detach()
    if len(states) < 2 or ranks.anywhere(bool((first != first[:1]).any()), "the starts"):
        return shifts
    ratio = (chain.step_sizes[0] / chain.step_sizes[1]) ** 0.5
    return torch.cat((ratio * shifts_along(chain, control, states[:1], condition, first=1), shifts[1:]))


def own_noise(
    jacobians: StepJacobians,
    states: StatePaths,
    shifts: NoisePaths,
    loop: ClosedLoop,
    *,
    tolerance: float,
    most: int,
) -> tuple[StatePaths, float]:
    """``z_k = J_k^{-T} (d c_k/d x)^T xi_k``: how the own step's noise enters the adjoint after it; and the relative
    residual of the first guess (nan where it was not looked at). Where steps are maps, ``z_k = (d c_k/d x)^T xi_k``, of
    tangent parts alone: O(h) from its whole.

    The vector-Jacobian products of the control do not depend on the adjoint, so they are taken for all steps in one
    call. The systems are solved by iteration, ``z <- z + A_k^{-T} (w - J_k^T z)``, with A_k the affine fit of the
    closed loop (the exact Jacobian where everything is linear); iterates that do not lower a step's residual are not
    taken. z stays linear in the noise given the states, whatever the number of iterations, so no stop biases anything.

    Args:
        states: a leaf that requires grad; shifts: the control's shifts there, with their graph.
        loop: the fit, perhaps of former paths; made anew of these where its guess will not do.
        tolerance: of the relative residual.
        most: products with J^T at most; with 0 the first guess is not looked at.
    """
    paths = jacobians.paths
    products = _control_products(states, shifts)
    if jacobians.maps:
        project, at = jacobians.chain.tangent, states.detach()
        return project(at, products(project(at, paths.noises))).detach(), math.nan
    w = products(paths.noises)
    z, best = loop.inverse_transposed(w), torch.zeros_like(w)
    if not most:
        return z.detach(), math.nan
    lowest = _sizes(w)
    whole, guess = float(lowest.norm()), math.nan
    aim = tolerance * whole
    for _ in range(most):
        rest = w - jacobians.mean_products(z) - products(jacobians.scales_transposed(z))
        sizes = _sizes(rest)
        if math.isnan(guess):
            guess = float(sizes.norm()) / max(whole, 1e-300)
            if not guess < ENOUGH * tolerance:
                loop.fit(paths, jacobians.scales)
        better = sizes < lowest
        chosen = better.reshape(-1, *(1,) * (w.ndim - 1))
        moved = z + loop.inverse_transposed(rest)
        # the last correction comes for nothing: its residual is smaller again by the factor of this one
        best = torch.where(chosen, moved, best)
        shrink = sizes.square() / lowest.clamp(min=torch.finfo(w.dtype).tiny)
        if float(torch.where(better, shrink, lowest).norm()) <= aim or not bool(better.any()):
            break
        lowest = torch.where(better, sizes, lowest)
        z = torch.where(chosen, moved, z)
    return best.detach(), guess


def _sizes(v: StatePaths) -> Tensor:
    """Norms of all paths' vectors at each step, ``(K,)``."""
    own = v.flatten(1).norm(dim=1)
    return own if ranks.parts() == 1 else ranks.whole_sum(own.square()).sqrt()


def _control_products(states: StatePaths, shifts: NoisePaths) -> Callable[[NoisePaths], StatePaths]:
    """``v -> (d c/d x)^T v`` for all steps at once."""
    if not shifts.requires_grad:
        return lambda v: torch.zeros_like(states)

    def product(v: Tensor) -> Tensor:
        grad = torch.autograd.grad(shifts, states, v, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(states) if grad is None else grad

    return product


def lean_targets(
    jacobians: StepJacobians,
    slope: States,
    *,
    costs: StatePaths | None = None,
    alpha: float = 1.0,
    noise_part: StatePaths | None = None,
    own_step: bool = True,
) -> NoisePaths:
    """Regression targets ``scale_k^T a_{k+1}`` of the shifts.

    Args:
        slope: ``grad r(x_K)/alpha``.
        costs: :func:`running_cost_gradients`, or None.
        noise_part: :func:`own_noise`'s z, subtracted in both places; None for the plain lean adjoint.
        own_step: pair c_k with a_{k+1} (the chain's optimum is the fixed point); False: with a_k (O(h) nearer to the
            control in continuous time).
    """
    costs = jacobians.per_step(costs, alpha)
    if jacobians.matrices is not None:
        source = None if costs is None else -costs
        if noise_part is not None:
            own = jacobians.mean_products(noise_part)
            source = -own if source is None else source - own
        whole = linear_adjoints(slope, jacobians.matrices, source)
    else:
        a = slope
        adjoints = [a]
        for j in reversed(range(jacobians.count)):
            a = jacobians.step(j, a, None if noise_part is None else noise_part[j])
            if costs is not None:
                a = a - costs[j]
            adjoints.append(a)
        whole = torch.stack(adjoints[::-1])
    if not own_step:
        return jacobians.scales_transposed(whole[:-1])
    return jacobians.pulled_back(whole[1:], noise_part)


def lean_targets_again(
    jacobians: StepJacobians,
    control: Any,
    slope: States,
    *,
    costs: StatePaths | None = None,
    alpha: float = 1.0,
    zero_variance: bool = True,
    own_step: bool = True,
    learn: Callable[[int, Noises, Noises], object] | None = None,
) -> NoisePaths:
    """:func:`lean_targets` of a large model, one step's graph at a time, in which kernel and control share the model's
    call.

    With ``zero_variance`` the own step's noise is taken as ``z_k = (d c_k/d x)^T xi_k``, the first guess of
    :func:`own_noise`: of mean zero as well, O(h) from its whole, for one product with the control's Jacobian.

    Args:
        learn: what to do with step j's shifts, which still have their graph, and targets: ``learn(j, shifts,
            targets)``, the last step first. Only with ``zero_variance``, and only where a step's graph of all paths is
            small enough to be held.
    """
    paths, chain, costs = jacobians.paths, jacobians.chain, jacobians.per_step(costs, alpha)
    shift, a, found = shift_function(chain, control), slope, []
    most = _rows_at_once(jacobians, shift if zero_variance else None)
    for j in reversed(range(jacobians.count)):
        parts, c = [], None
        if learn is not None:  # what depends on time alone has a graph, too, and each step goes through its own
            shift = shift_function(chain, control)
        for rows in parts_of(len(paths), most):
            c = None  # lets the last part's graph go before the next is made
            *adjoints, c = _step_again(jacobians, j, rows, shift if zero_variance else None, a[rows])
            parts.append(adjoints)
        before, after = (torch.cat(each) for each in zip(*parts))
        a = before if costs is None else before - costs[j]
        found.append(jacobians.scale_transposed(j, after if own_step else a))
        if learn is not None and c is not None and len(parts) == 1:
            learn(j, c, found[-1])
    return torch.stack(found[::-1])


def _rows_at_once(jacobians: StepJacobians, shift: ShiftFunction | None) -> int:
    """How many rows' graph of one step is small enough to be held."""
    paths, chain = jacobians.paths, jacobians.chain
    model, k = next(iter(chain.reference.modules())), paths.last - 1

    def step(rows: int) -> list[Tensor]:
        x = paths.states[-2, :rows].detach().requires_grad_(True)
        y = None if paths.condition is None else paths.condition[:rows]
        return [chain.kernel(k, x, y)[0]] + ([] if shift is None else [shift(k, x, y)])

    per_row = bytes_per_row(model, "mean" if shift is None else "mean and shift", step, chain.reference.modules())
    return ranks.least(max(1, int(room_for(paths.end.device) / max(per_row, 1.0))), "the room for graphs")


@torch.enable_grad()
def _step_again(
    jacobians: StepJacobians, j: int, rows: slice, shift: ShiftFunction | None, a: States
) -> tuple[States, States, Noises | None]:
    """``J^T (a - z)`` and ``a - z`` of step j at some rows, and the shifts there with their graph."""
    paths, k = jacobians.paths, jacobians.first + j
    y = None if paths.condition is None else paths.condition[rows]
    x = paths.states[j, rows].detach().requires_grad_(True)
    with remembering():
        mean = jacobians.chain.kernel(k, x, y)[0]
        c = None if shift is None else shift(k, x, y)
    if c is not None and c.requires_grad:
        z = torch.autograd.grad(c, x, paths.noises[j, rows], retain_graph=True, allow_unused=True)[0]
        a = a if z is None else a - z
    # of the shifts' graph nothing may be freed that is the mean's, too
    return torch.autograd.grad(mean, x, a, retain_graph=c is not None)[0], a, c


def linear_adjoints(end: Tensor, factors: Tensor, source: Tensor | None) -> Tensor:
    """``a_j = a_{j+1} N_j + drive_j`` back from ``a_K = end``, ``(K+1, batch, d)``.

    Args:
        factors: N, ``(K, d, d)``, or what multiplies elementwise, ``(K, d)`` or ``(K, 1)``. source: ``(K, batch, d)``;
            None: 0.
    """
    a, found = end, [end]
    matrix, each = factors.ndim == 3, factors.unbind(0)
    for j in reversed(range(len(each))):
        if source is None:
            a = a @ each[j] if matrix else a * each[j]
        else:
            a = torch.addmm(source[j], a, each[j]) if matrix else torch.addcmul(source[j], a, each[j])
        found.append(a)
    return torch.stack(found[::-1])


def running_cost_gradients(paths: Paths, running_cost: RunningCost | None) -> StatePaths | None:
    """``grad f(x_k, t_k)`` at every stored state (0 before time 0), or None where there is no running cost.

    A cost that has its gradients in closed form, as ``cost.gradients(states, times)``, is asked for them.
    """
    if running_cost is None:
        return None
    chain, states = paths.chain, paths.states[:-1]
    begin, out = max(0, chain.start - paths.first), torch.zeros_like(states)
    if begin >= len(states):
        return out
    if (known := getattr(running_cost, "gradients", None)) is not None:
        found = known(states[begin:], chain.times[paths.first + begin : paths.last])
        return found if begin == 0 else torch.cat((out[:begin], found))
    leaves, values = [], []
    with torch.enable_grad():
        for j in range(begin, len(states)):
            leaf = states[j].detach().requires_grad_(True)
            value = running_cost(leaf, chain.times[paths.first + j], paths.condition).sum()
            if value.requires_grad:
                leaves.append((j, leaf))
                values.append(value)
    if values:
        for (j, _), gradient in zip(leaves, torch.autograd.grad(values, [leaf for _, leaf in leaves])):
            out[j] = gradient
    return out
