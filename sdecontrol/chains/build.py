"""The chain of an SDE: grids of times, and schemes by name."""

from collections.abc import Callable
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..errors import NoLikelihood, unknown_name
from ..processes.annealed import AnnealedLangevin
from ..processes.generative import GenerativeSDE
from ..processes.jump import JumpProcess
from ..processes.linear import LinearSDE
from ..processes.manifolds import ManifoldSDE
from ..processes.reference import Reference
from ..processes.sde import SDE
from ..processes.semilinear import SemilinearSDE
from ..tensors import check_tensor
from .annealed import AnnealedChain
from .base import Chain
from .exponential import ExponentialChain, GenerativeExponentialChain
from .gaussian import EulerChain, TransitionChain
from .jump import JumpChain
from .manifold import ManifoldChain


def make_grid(time_steps: Any, reference: Reference) -> list[float]:
    """A grid of times from a number of steps (the reference's own grid of so many, ``Reference.default_grid``), or from
    an increasing sequence ``0 = t_0 < ... < t_K = horizon``."""
    horizon = reference.horizon
    if isinstance(time_steps, bool) or time_steps is None:
        raise TypeError(f"time_steps must be a number of steps or a grid of times, got {time_steps!r}.")
    if isinstance(time_steps, Integral):
        time_steps = int(time_steps)
        if time_steps < 1:
            raise ValueError(f"time_steps must be >= 1, got {time_steps}.")
        return reference.default_grid(time_steps)
    if isinstance(time_steps, (float, str)):
        raise TypeError(f"time_steps must be an int (or a grid of times), got {time_steps!r}.")
    grid = time_steps if isinstance(time_steps, Tensor) else torch.as_tensor(list(time_steps), dtype=torch.float64)
    check_tensor("time_steps", grid.double(), shape=("K+1",), hint="a grid of times from 0 to the horizon.")
    values = [float(t) for t in grid]
    if len(values) < 2:
        raise ValueError("time_steps as a grid needs at least two times.")
    if any(b <= a for a, b in pairwise(values)):
        k = next(i for i, (a, b) in enumerate(pairwise(values)) if b <= a)
        raise ValueError(
            f"time_steps must be strictly increasing; entry {k + 1} ({values[k + 1]:g}) is not above "
            f"entry {k} ({values[k]:g})."
        )
    if abs(values[0]) > 1e-6 * horizon or abs(values[-1] - horizon) > 1e-6 * horizon:
        raise ValueError(f"time_steps must go from 0 to the horizon {horizon:g}, got {values[0]:g} to {values[-1]:g}.")
    values[0], values[-1] = 0.0, horizon
    return values


SCHEMES = ("euler", "exact", "exponential")


#: schemes of ``simulate`` that have no Gaussian kernels, and so are no chains (``solvers.py``, ``flow.py``)
SAMPLING_SCHEMES = ("milstein", "srk", "heun", "midpoint", "euler-heun", "reversible-heun", "probability-flow")


#: ``(sde, clock, dtype, device) -> chain`` by the class of a process (or one above it) and the name of a scheme
_MAKERS: dict[type[Reference], dict[str, Callable[..., Chain]]] = {
    SDE: {"euler": EulerChain},
    LinearSDE: {"exponential": TransitionChain},  # nothing is left to approximate
    ManifoldSDE: {"euler": ManifoldChain},
    SemilinearSDE: {"exponential": ExponentialChain},
    GenerativeSDE: {"exponential": GenerativeExponentialChain},
    AnnealedLangevin: {
        scheme: lambda sde, clock, dtype, device, scheme=scheme: AnnealedChain(sde, clock, scheme, dtype, device)
        for scheme in ("euler", "exponential")
    },
    JumpProcess: {
        scheme: lambda process, clock, dtype, device, scheme=scheme: JumpChain(process, clock, scheme, dtype, device)
        for scheme in ("euler", "exact")
    },
}


def chain_of(reference: Any, time_steps: Any, scheme: str, dtype: torch.dtype, device: torch.device) -> Chain:
    """The chain of a reference on a grid, by the scheme "euler", "exact" (linear references, jump processes) or
    "exponential" (semi-linear and generative ones); or the reference, where it is a chain of its own.

    Raises:
        NoLikelihood: a scheme that samples but has no Gaussian kernels. ValueError: an unknown scheme, or one that the
        reference does not have.
    """
    if not reference.continuous:
        return reference.on(dtype, device)
    if scheme in SAMPLING_SCHEMES:
        raise NoLikelihood(
            f"scheme={scheme!r} has no Gaussian kernels, so no likelihood ratios, which solving, weights and exact "
            f"solutions need. Use scheme='euler' there; simulate(..., scheme={scheme!r}) samples with it."
        )
    if scheme not in SCHEMES:
        raise unknown_name("scheme", scheme, SCHEMES)
    clock, kind = make_grid(time_steps, reference), type(reference).__name__
    for known in type(reference).__mro__:
        if (make := _MAKERS.get(known, {}).get(scheme)) is not None:
            return make(reference, clock, dtype, device)
    if reference.state_dtype is not None:
        raise ValueError(f"scheme={scheme!r}: a {kind} has the schemes 'exact' and 'euler'.")
    if reference.tangential:
        raise ValueError(f"scheme={scheme!r}: a {kind} has the scheme 'euler' alone, whose steps are geodesics.")
    if scheme == "exact":
        linear = reference.as_linear()
        if linear is None:
            raise ValueError(
                "scheme='exact' needs a linear reference (LinearSDE, BrownianMotion, OrnsteinUhlenbeck); "
                f"{kind} has no exact transitions. Use scheme='euler'."
            )
        return TransitionChain(linear, clock, dtype, device)
    raise ValueError(
        f"scheme={scheme!r} needs to know the linear part of the drift, which a {kind} does not say. "
        "Write it as sc.SemilinearSDE(A, nonlinearity, sigma), or use scheme='euler'."
    )
