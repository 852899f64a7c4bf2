"""``AdjointMatching``: regression of the control on the lean adjoint (Domingo-Enrich et al. 2409.08861), and its
reciprocal form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ranks
from ..chains.shifts import shifts_along
from ..errors import check_name
from ..paths.closed_loop import ClosedLoop
from ..paths.lean_adjoint import (
    ENOUGH,
    StepJacobians,
    lean_targets,
    lean_targets_again,
    own_noise,
    running_cost_gradients,
    with_a_first_slope,
)
from ..paths.paths import Paths
from ..problems.problem import ControlProblem
from ..tensors import check_count, check_positive, event_sum
from .base import Method, Run, path_metrics, register
from .on_paths import steps_of
from .reciprocal import EndBuffer, reciprocal_step
from .regression import RegressionState, controlled_paths, descend, longest_residuals, regress, regress_step

PAIRINGS = ("chain", "continuous")
_LOOK_EVERY = 10  # iterations
_UNKNOWN = 1e30
_LOOSEST = 0.1  # relative error of the own-noise solve while the loss is still large


class _State(RegressionState):
    """The sizes of the last loss and of the noise that was subtracted say how well the latter must be known; the
    residual of the first guess at it, looked at now and then, whether that guess will do."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.loop = ClosedLoop(run.chain)
        self.sizes: Tensor
        self.register_buffer("sizes", run.chain.times.new_tensor([1.0, 1.0, _UNKNOWN]))

    def tolerance(self) -> float:
        loss, noise, _ = self.sizes.tolist()
        finest = 1e-7 if self.sizes.dtype == torch.float64 else 1e-3
        return min(_LOOSEST, max(finest, 0.1 * math.sqrt(loss / max(noise, 1e-300))))

    def products(self, iteration: int) -> int:
        """How many products with the Jacobian the solve may take."""
        enough = float(self.sizes[2]) < ENOUGH * self.tolerance() and iteration % _LOOK_EVERY
        return 0 if enough else 8


@register
@dataclass(frozen=True)
class AdjointMatching(Method):
    """Regress every shift ``c_k(x_k)`` on ``scale_k^T a_{k+1}``, a the lean adjoint along paths of the current control.

    The discretised chain's best mean-shift control is the exact fixed point, for any drift, diffusion, reward and
    running cost (a diffusion that depends on x adds its own term to the adjoint; steps may also be smooth maps of their
    noise, on manifolds and of simulators). In the zero-variance form the
    reported "loss" is a residual, ``E sum_k |c_k - T(c)_k|^2/2`` with T the fixed-point map: zero at the optimum only,
    of the order of the squared control error and above it for convex costs. The parameters in which the control is
    linear move by least squares.

    Args:
        zero_variance: subtract the own step's noise from the adjoint (``paths/lean_adjoint.py``); on a linear-quadratic
            chain no variance is left at the optimum. Beside a large model to first order in the step alone, which takes
            one product with the control's Jacobian.
        pairing: "chain": c_k with a_{k+1}. "continuous": with a_k, which moves the fixed point by O(h), nearer to the
            control in continuous time.
        steps: regress on so many randomly drawn steps (unbiased); None: all.
        reciprocal: draw ends from a buffer of past paths, and states between them from the reference's bridge (adjoint
            sampling, 2504.11713): one reward gradient serves many regressions. Linear references without running cost;
            the fixed point is O(h) from the chain's optimum.
        buffer_size, refresh: of the reciprocal form: paths kept, and iterations between new ones.
        clip: of the reciprocal form on a Gibbs problem: slopes of the reward longer than so many times their usual size
            on the target (that a pilot run has seen) are shortened to it, as in 2504.11713; None: as they are. The
            first paths end where a density may be steep beyond any use.
        huber: not of the reciprocal form: residuals longer than so many times their step's median (and than the slope
            at the end alone accounts for) count linearly, as on a ridge between modes, where an adjoint grows without
            bound; light tails have none. The bound grows like the root of the iterations since a step was taken back,
            so the fixed point stays. None: squares.

    Raises:
        NotDifferentiable: a black-box reward. ValueError: ``reciprocal`` with a running cost or without closed-form
            bridges.
    """

    zero_variance: bool = True
    pairing: str = "chain"
    steps: int | None = None
    reciprocal: bool = False
    buffer_size: int = 4096
    refresh: int = 10
    clip: float | None = 5.0
    huber: float | None = 10.0

    of_noise: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = True
    residual: ClassVar[bool] = True
    averaging: ClassVar[float] = 0.9

    def __post_init__(self) -> None:
        check_name("pairing", self.pairing, PAIRINGS)
        check_count("steps", self.steps, 1, optional=True)
        check_count("buffer_size", self.buffer_size, 1)
        check_count("refresh", self.refresh, 1)
        check_positive("clip", self.clip, optional=True)
        check_positive("huber", self.huber, optional=True)

    def check(self, problem: ControlProblem) -> None:
        super().check(problem)
        if self.reciprocal and not problem.reference.gaussian:
            raise ValueError(
                "adjoint-matching with reciprocal=True draws bridges of Gaussian kernels, and the steps of a "
                f"{type(problem.reference).__name__} are none. Use AdjointMatching()."
            )
        if self.reciprocal and problem.running_cost_function is not None:
            raise ValueError(
                "adjoint-matching with reciprocal=True needs a problem without running cost: with one the optimum's "
                "bridges are not the reference's. Use AdjointMatching()."
            )
        if self.reciprocal and problem.condition is not None:
            raise ValueError("adjoint-matching with reciprocal=True does not take conditions; use AdjointMatching().")

    @property
    def splits(self) -> bool:  # type: ignore[override]
        return not self.reciprocal

    @property
    def same_paths(self) -> int:  # type: ignore[override]
        return self.refresh if self.reciprocal else 1

    def setup(self, run: Run) -> nn.Module:
        return EndBuffer(run, max(self.buffer_size, run.batch_size)) if self.reciprocal else _State(run)

    def step(self, state: EndBuffer | _State, run: Run) -> dict[str, float]:
        if isinstance(state, EndBuffer):
            own_step = self.pairing == "chain"
            return reciprocal_step(state, run, self.refresh, self.clip, own_step, steps_of(run, self.steps))
        problem = run.problem
        parts, means, noises = [], [], []
        most = state.products(run.iteration)
        for part in range(run.accumulate):
            paths, slope = controlled_paths(state, run, part)
            jacobians = StepJacobians(paths)
            batch = _Batch(paths, slope, jacobians, running_cost_gradients(paths, problem.running_cost_or_none))
            chosen = steps_of(run, self.steps, part)
            if jacobians.again:
                means.append(self._regress_again(state, run, batch, chosen))
            else:
                mean, noise = self._regress(state, run, batch, chosen, most)
                means.append(mean)
                if noise is not None and most:
                    noises.append(noise)
            parts.append(paths)
        loss = descend(state, run, parts, means)
        state.sizes[0] = loss
        if noises:
            state.sizes[1] = ranks.mean(torch.cat(noises).mean())
        return {**path_metrics(parts), "loss": loss}

    def _options(self, run: Run, batch: _Batch) -> dict[str, Any]:
        return {"costs": batch.costs, "alpha": run.problem.alpha, "own_step": self.pairing == "chain"}

    def _regress(
        self, state: _State, run: Run, batch: _Batch, chosen: list[int] | None, most: int
    ) -> tuple[Tensor, Tensor | None]:
        """Add the gradient; the mean residuals, and half the squares of the noise that was subtracted, ``(batch,)``."""
        paths, jacobians, noise = batch.paths, batch.jacobians, None
        states = paths.states[:-1].detach().requires_grad_(self.zero_variance)
        shifts = shifts_along(run.chain, state.control, states, paths.condition, known=paths.shifts)
        if self.zero_variance:
            sloped = with_a_first_slope(run.chain, state.control, states, shifts, paths.condition)
            noise, guess = own_noise(jacobians, states, sloped, state.loop, tolerance=state.tolerance(), most=most)
            if most:
                state.sizes[2] = guess if math.isfinite(guess) else _UNKNOWN
        targets = lean_targets(jacobians, batch.slope, noise_part=noise, **self._options(run, batch))
        longest = batch.longest(shifts - targets, run, state.outlying(self.huber))
        means = regress(state, run, shifts, targets, steps=chosen, most=longest)
        if noise is None:
            return means, None
        return means, 0.5 * event_sum(jacobians.scales_transposed(noise) ** 2, len(run.chain.noise_shape)).sum(0)

    def _regress_again(self, state: _State, run: Run, batch: _Batch, chosen: list[int] | None) -> Tensor:
        """The same beside a large model: of each step while its graph is there, where the graph of all paths can be."""
        learned: dict[int, Tensor] = {}
        times = state.outlying(self.huber)

        def learn(j: int, shifts: Tensor, targets: Tensor) -> None:
            longest = batch.longest((shifts - targets).detach().unsqueeze(0), run, times, j)
            learned[j] = regress_step(state, run, j, shifts, targets, longest)

        targets = lean_targets_again(
            batch.jacobians,
            state.control,
            batch.slope,
            zero_variance=self.zero_variance,
            learn=learn if chosen is None and state.knows_weights else None,
            **self._options(run, batch),
        )
        if learned:
            return torch.stack([learned[j] for j in sorted(learned)])
        paths = batch.paths
        shifts = shifts_along(run.chain, state.control, paths.states[:-1], paths.condition, known=paths.shifts)
        longest = batch.longest(shifts - targets, run, times)
        return regress(state, run, shifts, targets, steps=chosen, most=longest)


@dataclass(frozen=True)
class _Batch:
    """Paths, ``grad r(x_K)/alpha`` and running costs' gradients along them, and their steps' Jacobians."""

    paths: Paths
    slope: Tensor
    jacobians: StepJacobians
    costs: Tensor | None

    def longest(self, residuals: Tensor, run: Run, times: float | None, step: int | None = None) -> Tensor | None:
        return longest_residuals(residuals, self.jacobians, self.slope, self.costs, run.problem.alpha, times, step)
