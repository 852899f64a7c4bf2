"""``MixtureControl``: the exact control of a Gibbs problem's reference towards a mixture of Gaussians, and a network beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..problems.gibbs import GibbsProblem
from ..processes.laws import GaussianMixture, ProductMixture, draw
from ..processes.time_changed import TimeChanged
from ..randomness import derive_seed
from ..simulation.chains import Chain, TransitionChain
from ..simulation.shifts import ShiftFunction
from .base import Control
from .linear_part import LinearPart

__all__ = ["CorrectedControl", "MixtureControl"]

_NOTHING = 1e-6  # of the end's size in a state, below which the state says nothing of it


class MixtureControl(Control):
    """The mean shift of the chain that carries a Gibbs problem's reference to a mixture of Gaussians instead, in closed form.

    Given its end the reference is a bridge, ``x_t = centre + a_t (x_T - centre) + scale sqrt(l_t) eps``, so that the mixture stays one at all times,
    and ``E[x_T | x_t]`` follows from its score (Tweedie). On a chain of exact transitions ``c_k = E[xi_k | x_k]`` is that of the chain at every
    step size: Doob's transform, as :class:`sdecontrol.simulation.bridges.ChainBridge` has it for one end. It trains nothing.

    Args:
        law: of ``(x_T - centre)/scale``: a :class:`GaussianMixture` or :class:`ProductMixture` in the states' dtype.

    Raises:
        TypeError: another problem than one of :func:`gibbs_problem` on a reference with a known end.
    """

    def __init__(self, problem: GibbsProblem, law: GaussianMixture | ProductMixture) -> None:
        reference = getattr(problem, "reference", None)
        if not isinstance(problem, GibbsProblem) or not isinstance(reference, TimeChanged):
            raise TypeError("a mixture's control needs a gibbs_problem with reference='ou' or 'brownian'.")
        super().__init__(problem.event_shape, problem.control_shape, 0.0, problem.horizon)
        self._reference, self.product = [reference], isinstance(law, ProductMixture)
        for name, value in _tensors_of(law).items():
            self.register_buffer(name, value.detach().clone())
        self._laws: dict[float, GaussianMixture | ProductMixture] = {}
        self._last: tuple[Any, ...] | None = None

    @property
    def configuration(self) -> dict[str, Any]:
        """What makes the same control again, for a saved file: the kind and the shapes of its law."""
        shapes = {name: list(value.shape) for name, value in self.named_buffers()}
        return {"kind": "mixture", "product": self.product, "shapes": shapes}

    @classmethod
    def from_configuration(cls, problem: GibbsProblem, kind: dict[str, Any]) -> MixtureControl:
        """A control of the same shapes, to be filled by ``load_state_dict``."""
        like: dict[str, Any] = {"dtype": problem.dtype, "device": problem.device}
        return cls(problem, _law_of({name: torch.ones(shape, **like) for name, shape in kind["shapes"].items()}))

    @property
    def law(self) -> GaussianMixture | ProductMixture:
        """Of ``(x_T - centre)/scale``."""
        return _law_of(dict(self.named_buffers()))

    def _between(self, left: float) -> tuple[float, float]:
        """``a`` and ``l`` of the state with this much clock time left, given its end."""
        if self._reference[0].kind == "ou":
            return math.exp(-0.5 * left), -math.expm1(-left)
        return 1 - left, left * (1 - left)

    def _onwards(self, left: float) -> tuple[float, float]:
        """Decay and variance of the end given the state, in units of the scale."""
        return (math.exp(-0.5 * left), -math.expm1(-left)) if self._reference[0].kind == "ou" else (1.0, left)

    def _left(self, t: float) -> float:
        reference = self._reference[0]
        return min(max(float(reference.left(t)), 0.0), reference.total)

    def _white(self, x: Tensor) -> Tensor:
        return (x - self._reference[0].centre) / self._reference[0].scale

    def _expected(self, z: Tensor, left: float) -> Tensor:
        """``E[z_T | z_t]``, ``(batch, d)``."""
        a, variance = self._between(left)
        if a < _NOTHING:
            return self.law.mean.expand_as(z)
        return (z + variance * self._law_at(left).score(z)) / a

    def _law_at(self, left: float) -> GaussianMixture | ProductMixture:
        """The mixture's marginal, of the state over its scale."""
        if left not in self._laws:
            if len(self._laws) > 4096:
                self._laws.clear()
            a, variance = self._between(left)
            self._laws[left] = self.law.noised(a, math.sqrt(variance))
        return self._laws[left]

    def _load_from_state_dict(self, *args: Any, **more: Any) -> None:
        self._laws.clear()
        super()._load_from_state_dict(*args, **more)

    def _apply(self, *args: Any, **more: Any) -> Any:
        self._laws.clear()
        return super()._apply(*args, **more)

    # ------------------------------------------------------------ Control

    def at(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        if t.ndim == 1:
            out = x.new_empty((x.shape[0], *self.control_shape))
            for time in t.unique():
                rows = (t == time).nonzero().flatten()
                out[rows] = self.at(x[rows], time, y)
            return out
        left, z = self._left(float(t)), self._white(x)
        speed = math.sqrt(float(self._reference[0].speed(float(t))))
        a = self._between(left)[0]
        if a < _NOTHING:
            decay, variance = self._onwards(left)
            return speed * decay / variance * (self._expected(z, left) - decay * z)
        # score of the mixture's marginal less the reference's; E[x_T | x_t] - x_t would drown in rounding at the end
        return speed * (self._law_at(left).score(z) + (z if self._reference[0].kind == "ou" else z / a))

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        if not isinstance(chain, TransitionChain) or chain.reference is not self._reference[0]:
            return super().on_chain(chain, tables)
        left = [self._left(t) for t in chain.clock]
        denoise = self.denoiser_on_grid(chain.times)
        gains = []
        for k in range(chain.steps):
            (first, variance), (last, after) = self._onwards(left[k]), self._onwards(left[k + 1])
            step = variance - after if self._reference[0].kind == "brownian" else -math.expm1(left[k + 1] - left[k])
            gains.append((math.sqrt(step) * last / variance, first))

        def shift(k: int, x: Tensor, y: Any) -> Tensor:
            gain, decay = gains[k]
            return gain * (self._white(denoise(k, x, y)) - decay * self._white(x))

        return shift

    # ------------------------------------------------------------ E[x_T | x_t], as networks see it

    def denoised(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """``E[x_T | x_t]`` at a 0-d t, of x's shape."""
        return self._coloured(self._expected(self._white(x), self._left(float(t))))

    def ends(self, n: int, seed: int) -> Tensor:
        """Draws of the mixture, ``(n, d)``."""
        return self._coloured(draw(self.law, n, derive_seed(seed, 51)))

    def _coloured(self, z: Tensor) -> Tensor:
        return self._reference[0].centre + self._reference[0].scale * z

    def denoiser_on_grid(self, times: Tensor) -> Callable[[int, Tensor, Any], Tensor]:
        """``(k, x, y) -> E[x_T | x_k]``; what was asked last is remembered, since control and network both ask."""
        left = [self._left(float(t)) for t in times.double()]

        def denoise(k: int, x: Tensor, y: Any) -> Tensor:
            key = (left[k], x, torch.is_grad_enabled())
            if (
                self._last is None
                or any(a is not b for a, b in zip(self._last[1:3], key[1:]))
                or self._last[0] != key[0]
            ):
                self._last = (*key, self._coloured(self._expected(self._white(x), left[k])))
            return self._last[3]

        return denoise

    def forget(self) -> None:
        """Drop what was remembered."""
        self._last = None

    def __deepcopy__(self, memo: Any) -> MixtureControl:
        self.forget()
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        nn.Module.__init__(made)
        for name, value in self.__dict__.items():
            if name not in ("_buffers", "_reference", "_laws"):
                made.__dict__[name] = value
        made._reference, made._laws, made.settings = self._reference, {}, dict(self.settings)
        for name, value in self.named_buffers():
            made.register_buffer(name, value.clone())
        return made


class CorrectedControl(Control):
    """A control that is not trained, and a network beside it that is: ``c = c_base + c_network``."""

    def __init__(self, base: Control, correction: Control) -> None:
        super().__init__(correction.event_shape, correction.control_shape, correction.first_time, correction.last_time)
        self.base, self.correction = base, correction
        self.learning_rate = correction.learning_rate

    def at(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        return self.base.at(x, t, y) + self.correction.at(x, t, y)

    def tables(self, chain: Chain) -> tuple[Tensor, ...]:
        return self.correction.tables(chain)

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        base, correction = self.base.on_chain(chain), self.correction.on_chain(chain, tables)
        return lambda k, x, y: base(k, x, y) + correction(k, x, y)

    def along(self, chain: Chain, states: Tensor, y: Any = None, first: int = 0) -> Tensor:
        return self.base.along(chain, states, y, first) + self.correction.along(chain, states, y, first)

    def linear_parts(self) -> list[LinearPart]:
        return self.correction.linear_parts()


def _tensors_of(law: GaussianMixture | ProductMixture) -> dict[str, Tensor]:
    if isinstance(law, ProductMixture):
        return {"log_weights": law.log_weights, "means": law.means, "variances": law.variances}
    parts = {"log_weights": law.log_weights, "means": law.means, "values": law._values}
    return parts if law._vectors is None else {**parts, "vectors": law._vectors}


def _law_of(parts: dict[str, Tensor]) -> GaussianMixture | ProductMixture:
    if "variances" in parts:
        return ProductMixture(parts["log_weights"].exp(), parts["means"], parts["variances"])
    return GaussianMixture._from_parts(parts["log_weights"], parts["means"], parts["values"], parts.get("vectors"))
