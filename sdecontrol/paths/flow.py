"""The probability flow of a generative SDE: the ordinary differential equation with the model's marginals, and with it
exact likelihoods (Song et al. 2011.13456, section 4.3).

``dx/dt = v(x, t) = -(log mu)' x - g_f^2/(2 std) eps(x, t)`` in process time: the SDE's drift with the noise level g =
0. Along it ``d/dt log p_t(x_t) = -div v`` (instantaneous change of variables, Chen et al. 1806.07366, theorem 1).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..processes.generative import GenerativeSDE
from ..processes.pretrained import call_model
from ..processes.sde import SDE
from ..randomness import Place, SeededNoise, derive_seed, fresh_seed
from ..shapes import PerPath, Scalar, States
from ..tensors import check_count, check_tensor, check_tolerance, nonfinite_rows

_MOST_STEPS = 1000  # from one time to the next; a smooth model takes 300 at a tolerance of 1e-14
_EXACT = 32  # largest state whose divergence is exact by default: it costs one product per dimension

Velocity = Callable[[Scalar, States], States]


class LogLikelihood(NamedTuple):
    """``value``: log-densities; ``stderr``: their standard errors from the random divergence (0 where the divergence is
    exact); ``latent``: where the flow brings x at time 0."""

    value: PerPath
    stderr: PerPath
    latent: States


def require_generative(reference: Any, what: str) -> GenerativeSDE:
    """The reference, if it is a generative SDE.

    Raises:
        TypeError: it is not.
    """
    if getattr(reference, "schedule", None) is None:
        kind = type(reference).__name__
        raise TypeError(
            f"{what} needs a generative_sde(...) reference, whose score is known; got {kind}"
            + (", which has none. Use another scheme." if isinstance(reference, SDE) else ".")
        )
    return reference


def flow_velocity(sde: GenerativeSDE, condition: Any = None) -> Velocity:
    """``(t, x) -> v``, t of process time (torchdiffeq's order of arguments)."""

    def velocity(t: Scalar, x: States) -> States:
        c = sde.coefficients(t.reshape(1))
        prediction = call_model(sde.model, x, c.clock[0].to(x), condition)
        of_x = float(c.log_mu_slope + c.flow_part * c.eps_of_x)
        return torch.add(of_x * x, prediction, alpha=float(c.flow_part * c.eps_of_prediction))

    return velocity


def _integrate(rhs: Callable[[Tensor, Any], Any], start: Any, times: Tensor, tolerance: float | None) -> Any:
    """torchdiffeq from each of ``times`` to the next: one step of its "rk4" (order 4) each, or adaptive "dopri5"."""
    from torchdiffeq import odeint

    if tolerance is None:
        return odeint(rhs, start, times, method="rk4")  # fixed-grid methods: exactly one step per interval
    try:
        bounded = {"max_num_steps": _MOST_STEPS}
        return odeint(rhs, start, times, method="dopri5", rtol=tolerance, atol=tolerance, options=bounded)
    except AssertionError as error:  # "underflow in dt", a NaN, or too many steps
        raise NonFiniteError(
            f"the probability flow cannot be integrated to tolerance={tolerance:g} ({error}): the state is not finite, "
            "or the tolerance is below what the model resolves. Use a larger tolerance, float64, or tolerance=None.",
            what="state",
        ) from error


def solve_flow(
    sde: GenerativeSDE, clock: Sequence[float], x: States, condition: Any, tolerance: float | None
) -> list[States]:
    """States at each time of the grid, from x at the first.

    Raises:
        NonFiniteError: naming the step and the number of rows.
    """
    times = torch.tensor(clock, dtype=torch.float64, device=x.device)
    states = list(_integrate(flow_velocity(sde, condition), x, times, tolerance))
    if not bool(torch.isfinite(states[-1]).all()):
        step = next(k for k, s in enumerate(states[1:]) if not bool(torch.isfinite(s).all()))
        rows = nonfinite_rows(states[step + 1])
        raise NonFiniteError(
            f"state is not finite at step {step} of {len(clock) - 1} (t = {clock[step]:.4g}) of "
            f"scheme='probability-flow', in {rows} rows. Check the model there.",
            what="state",
            step=step,
            rows=rows,
        )
    return states


def _with_divergence(velocity: Velocity, probes: Tensor | None) -> Callable[[Tensor, Any], Any]:
    """``(t, (x, l)) -> (v, div v)``: exactly (l ``(batch,)``), or ``probe . J probe`` for each probe (l
    ``(batch, probes)``; Hutchinson's estimator, the same probes all along the flow as in FFJORD, Grathwohl et al.
    1810.01367)."""

    def rhs(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_(True)
            v = velocity(t, x)

            def product(w: Tensor) -> Tensor:
                return torch.autograd.grad(v, x, w, retain_graph=True)[0].flatten(1)

            if probes is not None:
                return v.detach(), torch.stack([(product(w) * w.flatten(1)).sum(1) for w in probes], 1)
            total = torch.zeros_like(state[1])
            for i in range(x[0].numel()):
                unit = torch.zeros_like(x).flatten(1)
                unit[:, i] = 1.0
                total = total + product(unit.reshape(x.shape))[:, i]
        return v.detach(), total

    return rhs


def flow_log_likelihood(
    sde: GenerativeSDE,
    start: Any,
    x: States,
    *,
    condition: Any = None,
    divergence: str | None = None,
    probes: int = 16,
    tolerance: float | None = None,
    seed: int | None = None,
) -> LogLikelihood:
    """See :func:`sdecontrol.log_likelihood`; ``start`` is the law of X_0."""
    check_tensor("x", x, shape=(x.shape[0] if isinstance(x, Tensor) and x.ndim else "n", *sde.event_shape))
    if not x.shape[0]:
        raise ValueError("x must have at least one row, got none.")
    if divergence not in (None, "exact", "hutchinson"):
        raise ValueError(f"divergence must be 'exact', 'hutchinson' or None, got {divergence!r}.")
    check_count("probes", probes, 2, why="a standard error needs two")
    default = 1e-5 if x.dtype == torch.float32 else 1e-7
    tolerance = check_tolerance(default if tolerance is None else tolerance, x.dtype)
    if divergence is None:
        divergence = "exact" if sde.event_shape.numel() <= _EXACT else "hutchinson"
    signs, batch = None, x.shape[0]
    if divergence == "hutchinson":
        seed = derive_seed(fresh_seed(seed), Place.FLOW_DIRECTIONS)
        noise = SeededNoise(seed, batch, probes, sde.event_shape, dtype=x.dtype, device=x.device)
        signs = noise.all().sign()  # Rademacher: the least variance among independent entries
    start_sum = x.new_zeros(batch) if signs is None else x.new_zeros(batch, probes)
    times = torch.tensor([sde.horizon, 0.0], dtype=torch.float64, device=x.device)
    rhs = _with_divergence(flow_velocity(sde, condition), signs)
    with torch.no_grad():
        states, sums = _integrate(rhs, (x.detach(), start_sum), times, tolerance)
        latent, total = states[-1], -sums[-1]  # integrated from T down to 0: the sign turns
        base = start.log_prob(latent)
        if not bool(torch.isfinite(base).all()) or not bool(torch.isfinite(total).all()):
            rows = nonfinite_rows(latent)
            raise NonFiniteError(
                f"log-likelihood is not finite in {rows} rows; check the model.", what="log-likelihood", rows=rows
            )
    if signs is None:
        return LogLikelihood(base - total, torch.zeros_like(base), latent)
    return LogLikelihood(base - total.mean(1), total.std(1) / probes**0.5, latent)
