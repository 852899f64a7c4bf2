"""``SOCM``: stochastic optimal control matching (Domingo-Enrich et al. 2312.02027, Theorem 1), exact on the chain."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..chains.base import Chain
from ..chains.shifts import shifts_along
from ..controls.network import time_features
from ..errors import check_name
from ..paths.closed_loop import ClosedLoop
from ..paths.lean_adjoint import StepJacobians, lean_targets, linear_adjoints, running_cost_gradients
from ..paths.weights import self_normalised, warn_where_few
from ..problems.problem import ControlProblem
from ..tensors import check_count, check_positive, is_matrix_scale
from .base import Method, Run, path_metrics, register
from .on_paths import steps_of
from .regression import RegressionState, controlled_paths, descend, longest_residuals, regress

MATRICES = ("closed-loop", "full", "diagonal", "scalar", "identity", "adjoint")


class SOCMState(RegressionState):
    """The learned step matrices are ``N_j = I + h_j L(t_j)``, L a combination of time features."""

    def __init__(self, run: Run, kind: str) -> None:
        super().__init__(run)
        chain, d = run.chain, run.chain.event_shape[0]
        clock = chain.times[:-1]
        self.phi: Tensor
        self.register_buffer("phi", time_features((clock - clock[0]) / (chain.times[-1] - clock[0])), persistent=False)
        shape = {"full": (d, d), "diagonal": (d,), "scalar": (1,)}.get(kind)
        self.loop = ClosedLoop(chain) if kind == "closed-loop" else None
        self.slopes = None if shape is None else nn.Parameter(chain.times.new_zeros(self.phi.shape[1], *shape))

    def step_matrices(self, chain: Chain) -> Tensor:
        """``N_j``, ``(K, d, d)``, ``(K, d)`` or ``(K, 1)``, as of :func:`linear_adjoints`."""
        if self.slopes is not None:
            rates = torch.einsum("kf,f...->k...", self.phi, self.slopes)
            moves = rates * rates.new_tensor(chain.step_sizes).reshape(-1, *(1,) * (rates.ndim - 1))
        elif self.loop is not None and self.loop.moves is not None:
            moves = self.loop.moves
        else:
            return chain.times.new_ones(chain.steps, 1)
        return 1 + moves if moves.ndim < 3 else moves + torch.eye(moves.shape[1]).to(moves)


@register
@dataclass(frozen=True)
class SOCM(Method):
    """Importance-weighted regression of every shift on ``scale_k^T a_{k+1}``, a the gradient of log psi in
    reparametrised form.

    Moving the state at step k by e and the later ones by ``M_k(j) e``, with ``M_k(k) = I`` and the noises changed to
    match, gives for any products ``M_k(j) = N_{j-1} ... N_k`` of step matrices (adapted to the path) exactly, at every
    step size::

        a_K = grad r(x_K)/alpha,
        a_j = N_j^T a_{j+1} - (N_j - d mean_j)^T scale_j^{-T} (c_j + xi_j) - h_j grad f(x_j)/alpha,

    and ``E[w scale_k^T a_{k+1} | x_k] / E[w | x_k]``, ``w = exp(R/alpha) dQ0/dP^v``, is the mean shift of the
    soft-optimal chain p* (the best mean-shift control of linear-quadratic chains; O(h) from it elsewhere). The matrices
    change the variance only. Theorem 1 of the source has general M_t(s); as products they cost K and not K^2, need no
    derivative in s, and contain the noiseless choice of linear-quadratic problems.

    Args:
        matrices: "full", "diagonal", "scalar": learned with the control, by the same loss, as functions of time.
            "identity": M = I. "adjoint": the reference's own Jacobians along the path, which gives the lean adjoint.
            "closed-loop": the Jacobian of the controlled step, fitted over the batch, nothing to learn.
        weighted: half of each path's weight is w, half 1 (defensive: Hesterberg 1995, Technometrics 37): paths that
            have gone where the target has no mass, whose w is 0, must be led back. False: all 1. The fixed point is the
            same, since w is constant there.
        trust_region: largest ``KL(weighted || unweighted)`` in nats, to which the weights are tempered: between the two
            regressions, whose fixed point they share. None: whole weights.
        steps: regress on so many randomly drawn steps (unbiased); None: all.
        huber: residuals longer than so many times their step's median (and than the slope at the end alone accounts
            for) count linearly, as in adjoint matching; None: squares.

    Raises:
        NotDifferentiable: a black-box reward. ValueError: a diffusion that depends on x or has no inverse, or states
            that are no vectors.
    """

    matrices: str = "closed-loop"
    weighted: bool = True
    trust_region: float | None = 1.0
    steps: int | None = None
    huber: float | None = 10.0

    gaussian: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = True
    residual: ClassVar[bool] = True
    averaging: ClassVar[float] = 0.9
    splits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_name("matrices", self.matrices, MATRICES)
        check_positive("trust_region", self.trust_region, optional=True)
        check_count("steps", self.steps, 1, optional=True)
        check_positive("huber", self.huber, optional=True)

    def check(self, problem: ControlProblem) -> None:
        super().check(problem)
        if len(problem.event_shape) != 1 or problem.control_shape != problem.event_shape:
            raise ValueError(
                "socm needs vector states and as many noises as states; this problem has states "
                f"{tuple(problem.event_shape)} and controls {tuple(problem.control_shape)}. Use adjoint-matching."
            )

    def setup(self, run: Run) -> nn.Module:
        return SOCMState(run, self.matrices)

    def step(self, state: SOCMState, run: Run) -> dict[str, float]:
        problem, chain = run.problem, run.chain
        parts, means, found, mixed = [], [], [], []
        for part in range(run.accumulate):
            paths, slope = controlled_paths(state, run, part)
            weights = None
            if self.weighted:
                found.append(self_normalised(paths.log_weights(), None, self.trust_region))
                weights = 0.5 * (1 + found[-1].weights)
                mixed.append(weights)
            jacobians = StepJacobians(paths)
            if jacobians.moving:
                raise ValueError("diffusion: socm needs one that does not depend on x; use adjoint-matching.")
            costs = running_cost_gradients(paths, problem.running_cost_or_none)
            if state.loop is not None:  # to these paths: an older fit leads astray where the reward is steep
                state.loop.fit(paths, jacobians.scales)
            targets = self.targets(state, jacobians, slope, costs, problem.alpha)
            shifts = shifts_along(chain, state.control, paths.states[:-1], paths.condition, known=paths.shifts)
            longest = longest_residuals(
                shifts - targets, jacobians, slope, costs, problem.alpha, state.outlying(self.huber)
            )
            steps = steps_of(run, self.steps, part)
            means.append(regress(state, run, shifts, targets, weights=weights, steps=steps, most=longest))
            parts.append(paths)
        loss = descend(state, run, parts, means, torch.cat(mixed) if mixed else None)
        metrics = {**path_metrics(parts), "loss": loss}
        if found:
            metrics["ess"] = sum(f.ess for f in found) / len(found)
            metrics["exponent"] = sum(f.exponent for f in found) / len(found)
            if run.iteration % 100 == 0:
                warn_where_few(self.name, metrics["ess"], run.batch_size, "Use trust_region=1.0, or a larger batch.")
        return metrics

    def targets(
        self, state: SOCMState, jacobians: StepJacobians, slope: Tensor, costs: Tensor | None, alpha: float
    ) -> Tensor:
        if self.matrices == "adjoint":
            return lean_targets(jacobians, slope, costs=costs, alpha=alpha)
        paths, costs = jacobians.paths, jacobians.per_step(costs, alpha)
        # what a step's noise says of the state before it: scale^{-T} (c + xi)
        noises = inverse_transposed(jacobians, paths.noises)
        drawn = noises + inverse_transposed(jacobians, paths.shifts)
        factors = state.step_matrices(jacobians.chain)
        moved = drawn @ factors if factors.ndim == 3 else drawn * factors.unsqueeze(1)
        source = jacobians.mean_products(drawn) - moved
        adjoints = linear_adjoints(slope, factors, source if costs is None else source - costs)[1:]
        if state.loop is not None:
            # the step's own noise, A^{-T} (A - d mean)^T scale^{-T} xi with A the closed loop: its mean vanishes (with
            # weights: at the fixed point), and with it all variance on a linear-quadratic chain at its optimum
            own = noises - state.loop.inverse_transposed(jacobians.mean_products(noises))
            adjoints = adjoints - own
        return jacobians.scales_transposed(adjoints)


def inverse_transposed(jacobians: StepJacobians, v: Tensor) -> Tensor:
    """``scale_k^{-T} v_k`` of all steps, v ``(K, batch, d)``, for scales that are the same for all rows.

    Raises:
        ValueError: a scale without inverse.
    """
    scales = jacobians.scales
    if not is_matrix_scale(scales[0], 1):
        # as (K, 1 | batch, 1 | d); a learned start may have a scale per coordinate where the process has one for all
        rows = [s.reshape(*(1,) * (2 - s.ndim), *s.shape) for s in scales]
        stacked = torch.stack(torch.broadcast_tensors(*rows))
        if bool((stacked == 0).any()):
            raise ValueError(
                "diffusion: socm needs an invertible one; this one is 0 in a coordinate. Use adjoint-matching."
            )
        return v / stacked
    matrix = torch.stack([s[0] for s in scales])
    if matrix.shape[1] != matrix.shape[2] or float(torch.linalg.cond(matrix.double()).max()) > 1e6:
        raise ValueError("diffusion: socm needs an invertible one; use adjoint-matching.")
    return torch.linalg.solve(matrix, v, left=False)
