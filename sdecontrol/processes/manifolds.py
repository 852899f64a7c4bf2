"""``ManifoldSDE`` on ``Sphere(d)`` and ``Torus(d)``: processes whose states are points of a curved or closed space."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..precision import at_least_single, call
from ..randomness import Place, generator_for
from ..tensors import as_float, check_count, nonfinite_rows
from .sde import SDE

_OFF = 1e-4  # how far from a manifold its points may be: a start given with five digits is one
_SMALL = 0.03  # |v|^2 below which cos|v| and sin|v|/|v| are taken from their series


def cos_and_sinc(s: Tensor) -> tuple[Tensor, Tensor]:
    """``cos(sqrt(s))`` and ``sin(sqrt(s))/sqrt(s)`` for s >= 0, with all derivatives at 0: there the series, to
    rounding of float64, takes the place of the root."""
    small = s < _SMALL
    r = torch.where(small, 1.0, s).sqrt()
    near, sinc = torch.zeros_like(s), torch.zeros_like(s)
    for n in range(6, -1, -1):
        near = near * s + (-1) ** n / math.factorial(2 * n)
        sinc = sinc * s + (-1) ** n / math.factorial(2 * n + 1)
    return torch.where(small, near, r.cos()), torch.where(small, sinc, r.sin() / r)


@dataclass(frozen=True)
class Manifold:
    """Base of the manifolds. Functions of states and vectors take any leading dimensions.

    Attributes:
        dim: d, that of the manifold. angles: whether states are angles; else they are points of Euclidean space.
    """

    dim: int
    angles = False

    def __post_init__(self) -> None:
        check_count("dim", self.dim)

    @property
    def event_shape(self) -> torch.Size:
        """Of a state, and of a vector at it."""
        raise NotImplementedError

    @property
    def volume(self) -> float:
        raise NotImplementedError

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """The orthogonal projection of v to the tangent space at x."""
        raise NotImplementedError

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Where the geodesic from x with the tangent velocity v is after one unit of time; v of any length."""
        raise NotImplementedError

    def onto(self, x: Tensor) -> Tensor:
        """The nearest state."""
        raise NotImplementedError

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None, **like: Any) -> Tensor:
        """Uniform draws, ``(*shape, *event)``."""
        raise NotImplementedError

    def uniform(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> UniformLaw:
        """The uniform law on it, as initial law; dtype, device: of its draws, by default torch's."""
        return UniformLaw(self, dtype or torch.get_default_dtype(), device or torch.get_default_device())

    def check(self, name: str, x: Tensor) -> None:
        """Raise unless x are states, to four digits.

        Raises:
            ValueError: with how far off they are, and the nearest states as remedy.
        """
        off = (x - self.onto(x)).detach().norm(dim=-1)
        if not bool((off <= _OFF).all()):
            kind, furthest = type(self).__name__, float(off.nan_to_num(torch.inf).max())
            raise ValueError(
                f"{name} is off the {kind.lower()}, by up to {furthest:.3g} in {int((~(off <= _OFF)).sum())} of "
                f"{off.numel()} states: they are {'angles in [-pi, pi)' if self.angles else 'unit vectors'}. Use "
                f"sc.{kind}({self.dim}).onto({name})."
            )


class Sphere(Manifold):
    """The unit sphere S^d of R^{d+1}, ``sc.Sphere(2)`` the usual one: states are unit vectors ``(batch, d+1)``."""

    @property
    def event_shape(self) -> torch.Size:
        return torch.Size((self.dim + 1,))

    @property
    def volume(self) -> float:
        half = 0.5 * (self.dim + 1)
        return 2 * math.pi**half / math.gamma(half)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        return v - (x * v).sum(-1, keepdim=True) * x

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        cos, sinc = cos_and_sinc((v * v).sum(-1, keepdim=True))
        return self.onto(cos * x + sinc * v)  # rounding does not add up over the steps

    def onto(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None, **like: Any) -> Tensor:
        return self.onto(torch.randn((*shape, self.dim + 1), generator=generator, **like))


class Torus(Manifold):
    """The flat torus of d angles, ``sc.Torus(1)`` a circle of circumference 2 pi: states are angles ``(batch, d)``,
    wrapped to [-pi, pi). Networks see their cosines and sines."""

    angles = True

    @property
    def event_shape(self) -> torch.Size:
        return torch.Size((self.dim,))

    @property
    def volume(self) -> float:
        return (2 * math.pi) ** self.dim

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        return v

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        return self.onto(x + v)

    def onto(self, x: Tensor) -> Tensor:
        return x - 2 * math.pi * torch.round(x / (2 * math.pi))  # no rounding of angles that are in range

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None, **like: Any) -> Tensor:
        return (2 * torch.rand((*shape, self.dim), generator=generator, **like) - 1) * math.pi


class UniformLaw(Distribution):
    """The uniform law on a manifold. Made by ``sc.Sphere(2).uniform()``."""

    def __init__(self, manifold: Manifold, dtype: torch.dtype, device: torch.device) -> None:
        self.manifold, self.like = manifold, torch.zeros((), dtype=at_least_single(dtype), device=device)
        super().__init__(event_shape=manifold.event_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Of the numbers, ``(*event)``: 0."""
        return self.like.expand(self.event_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.manifold.draw(tuple(sample_shape), dtype=self.like.dtype, device=self.like.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to the manifold's volume."""
        return value.new_full(value.shape[:-1], -math.log(self.manifold.volume))

    def __repr__(self) -> str:
        return f"UniformLaw({self.manifold})"


class ManifoldSDE(SDE):
    """``dX = (drift(X, t) + sigma u) dt + sigma o dW`` on a manifold, W its Brownian motion: without drift the
    generator is ``sigma^2/2`` times the Laplace-Beltrami operator.

    Its chain is the geodesic random walk ``x' = exp_x(h drift + sqrt(h) sigma (P xi + c))``, P the projection to the
    tangent space at x, of weak order 1; on a torus the exact transitions where the drift is constant. Noise xi and
    controls u have the shape of a state. Of a control's output the tangent part acts, and the rest is projected away:
    the shift is ``c = sqrt(h) P u``. So the log-ratio ``<c, xi> + |c|^2/2`` and the KL ``|c|^2/2`` of a step are those
    of the Gaussian in the tangent space, exactly, at every step size (extrinsic form of the geodesic random walk:
    Jorgensen 1975, Z. Wahrscheinlichkeitstheorie 32; log-ratios: docs/manifolds.md).

    Args:
        manifold: ``sc.Sphere(d)`` or ``sc.Torus(d)``.
        drift: ``(x, t) -> (batch, *event)``, tangent at x; ``(x, t, y)`` where the problem has a condition y; None: 0.
        sigma: a number > 0, or a function ``t -> number`` of a 0-d tensor.
        horizon: the end time T > 0.
        initial: law of X_0 (``Dirac``, ``manifold.uniform()``, any torch distribution over states); None: it is given
            to :class:`ControlProblem`.

    Raises:
        TypeError, ValueError: naming the argument. Where a problem is made of it also: a drift that leaves the tangent
        space, a start off the manifold.
    """

    gaussian = False
    tangential = True

    def __init__(
        self,
        manifold: Manifold,
        drift: Callable[..., Tensor] | None = None,
        sigma: Any = 1.0,
        horizon: float = 1.0,
        initial: Any = None,
    ) -> None:
        if not isinstance(manifold, Manifold):
            raise TypeError(f"manifold must be sc.Sphere(d) or sc.Torus(d), got {type(manifold).__name__}.")
        if not callable(sigma):
            sigma = torch.tensor(as_float("sigma", sigma, positive=True), dtype=torch.float64)
        self.manifold, self.angles = manifold, manifold.angles
        super().__init__(_still if drift is None else drift, sigma, shape=manifold.event_shape, horizon=horizon)
        self._drift = drift
        self.additive = True  # sigma is no function of the state
        # of the coordinates that networks see, on a uniform law
        self.coordinate_spread = 2**-0.5 if self.angles else (manifold.dim + 1) ** -0.5
        self.own_initial = initial

    @property
    def still(self) -> bool:
        """Whether there is no drift."""
        return self._drift is None

    def drift(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        return torch.zeros_like(x) if self.still else super().drift(x, t, condition)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """sigma at time t, 0-d."""
        return x.new_tensor(self.level(t))

    def level(self, t: Any) -> float:
        """sigma at time t, as a number.

        Raises:
            TypeError, ValueError: of a function of time, naming it.
        """
        if self.constant_diffusion is not None:
            return float(self.constant_diffusion)
        t = torch.as_tensor(t, dtype=torch.float64)
        return as_float(f"sigma(t = {float(t):.4g})", call(self._diffusion_function, t), positive=True)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        return self.manifold.tangent(x, v)

    def onto(self, x: Tensor) -> Tensor:
        return self.manifold.onto(x)

    # ---------------------------------------------------------------- what a problem asks of a reference

    def check_states(self, name: str, x: Tensor) -> None:
        self.manifold.check(name, x)

    def probe_states(self, rows: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
        generator = generator_for("cpu", seed, Place.PROBE_POINTS)
        return self.manifold.draw((rows,), generator, dtype=torch.float64).to(device=device, dtype=dtype)

    def _probe_diffusion(self, x: Tensor, t: Tensor) -> None:
        for part in (0.0, 0.5, 1.0):
            self.level(part * self.horizon)

    def probe(self, dtype: torch.dtype, device: torch.device, condition: Any = None) -> None:
        """As of an SDE; and that the drift is tangent.

        Raises:
            ValueError: a drift that leaves the tangent space.
        """
        super().probe(dtype, device, condition)
        if self.still:
            return
        x = self.probe_states(16, dtype, device)
        y = None if condition is None else condition[torch.arange(16, device=condition.device) % len(condition)]
        with torch.no_grad():
            for part in (0.0, 0.5, 1.0):
                v = self.drift(x, x.new_tensor(part * self.horizon), y)
                normal, size = (v - self.tangent(x, v)).norm(dim=-1), v.norm(dim=-1)
                if nonfinite_rows(v) == 0 and bool((normal > _OFF * (1 + size)).any()):
                    at = int(normal.argmax())
                    raise ValueError(
                        f"drift leaves the tangent space: at one of 16 random states its normal part is "
                        f"{float(normal[at]):.3g} long, of {float(size[at]):.3g} in all. Project it: return "
                        f"sc.{type(self.manifold).__name__}({self.manifold.dim}).tangent(x, v)."
                    )

    def differentiated(self, t: float) -> dict[str, Callable[..., Tensor]]:
        if self.still:
            return {}
        return {"drift": lambda x, y=None: self.drift(self.onto(x), x.new_tensor(t), y)}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "manifold": type(self.manifold).__name__, "dim": self.manifold.dim}


def _still(x: Tensor, t: Tensor) -> Tensor:
    return torch.zeros_like(x)
