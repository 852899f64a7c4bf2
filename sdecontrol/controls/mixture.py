"""``MixtureControl``: the control of a reference with a known end towards a mixture of Gaussians, and a network beside
it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..memory import recall
from ..problems.problem import ControlProblem
from ..processes.laws import GaussianMixture, ProductMixture, draw, mixture_of, mixture_tensors
from ..randomness import Place, derive_seed
from ..shapes import Controls, NoisePaths, StatePaths, States
from .base import Control, at_each_time
from .ends import ends_of
from .linear_part import LinearPart
from .network import Architecture, DefaultControl
from .saved import CONTROLS, Context, Saved

_NOTHING = 1e-6  # of the end's size in a state, below which the state says nothing of it


@CONTROLS.register("mixture")
class MixtureControl(Control):
    """The control that carries a reference to a mixture of Gaussians instead of its own end, in closed form. It trains
    nothing.

    Given its end the reference is a bridge, ``z_t = a_t z_T + sqrt(l_t) eps`` (``controls/ends.py``), so that the
    mixture stays one at all times, and ``E[z_T | z_t]`` follows from its score (Tweedie). For the references of Gibbs
    problems, on a chain of their exact transitions, ``c_k = E[xi_k | x_k]`` is that of the chain at every step size:
    Doob's transform, as :class:`sdecontrol.chains.bridges.ChainBridge` has it for one end. For a generative reference,
    whose bridge is the noising process, ``u = g (score of the noised mixture - score of the model)``: Doob's transform
    of continuous time. It calls the model once at a state, as the reference's own step does.

    Args:
        problem: of :func:`gibbs_problem` on "ou" or "brownian", or with a memoryless generative reference.
        law: of the end z_T, ``(d,)``: ``(x_T - centre)/scale`` of a Gibbs problem, the flattened state of a generative
            reference. A :class:`GaussianMixture` or :class:`ProductMixture` in the states' dtype.

    Raises:
        TypeError: another problem.
    """

    means: Tensor
    variances: Tensor
    values: Tensor

    def __init__(self, problem: ControlProblem, law: GaussianMixture | ProductMixture) -> None:
        self._ends = ends_of(problem)
        super().__init__(problem.event_shape, problem.control_shape, 0.0, problem.horizon)
        for name, value in mixture_tensors(law).items():
            self.register_buffer(name, value.detach().clone())
        self._laws: dict[float, GaussianMixture | ProductMixture] = {}

    @property
    def configuration(self) -> dict[str, Any]:
        """The shapes of its law."""
        return {"shapes": {name: list(value.shape) for name, value in self.named_buffers()}}

    @classmethod
    def from_saved(cls, saved: Saved, context: Context) -> MixtureControl:
        problem = context.problem
        like: dict[str, Any] = {"dtype": problem.dtype, "device": problem.device}
        return cls(problem, mixture_of({name: torch.ones(shape, **like) for name, shape in saved["shapes"].items()}))

    @torch.no_grad()
    def move_law(self, other: MixtureControl) -> None:
        """Where the coordinates z of ``other``'s problem have another centre or scale: its law, at the same states."""
        like, d = self.means, self.event_shape.numel()
        zero, one = (self._ends.standardised(other._ends.states(like.new_full((1, d), v)))[0] for v in (0.0, 1.0))
        here = [self._ends.standardised(self._ends.states(like.new_full((1, d), v)))[0] for v in (0.0, 1.0)]
        if torch.equal(zero, here[0]) and torch.equal(one, here[1]):
            return
        factor = float((one - zero).mean())  # one scale for all coordinates
        product = isinstance(other.law, ProductMixture)  # whose means are (d, components)
        self.means.mul_(factor).add_(zero.unsqueeze(1) if product else zero)
        (self.variances if product else self.values).mul_(factor**2)
        self._laws.clear()

    @property
    def law(self) -> GaussianMixture | ProductMixture:
        """Of the end, in coordinates z."""
        return mixture_of(dict(self.named_buffers()))

    def _expected(self, z: Tensor, t: float) -> Tensor:
        """``E[z_T | z_t]``, ``(batch, d)``."""
        a, variance = self._ends.between(t)
        if a < _NOTHING:
            return self.law.mean.expand_as(z)
        return (z + variance * self._law_at(t).score(z)) / a

    def _law_at(self, t: float) -> GaussianMixture | ProductMixture:
        """The mixture's marginal, of z_t."""
        if t not in self._laws:
            if len(self._laws) > 4096:
                self._laws.clear()
            a, variance = self._ends.between(t)
            self._laws[t] = self.law.noised(a, math.sqrt(variance))
        return self._laws[t]

    def _load_from_state_dict(self, *args: Any, **more: Any) -> None:
        self._laws.clear()
        super()._load_from_state_dict(*args, **more)

    def _apply(self, *args: Any, **more: Any) -> Any:
        self._laws.clear()
        return super()._apply(*args, **more)

    # ------------------------------------------------------------ Control

    def at(self, x: States, t: Tensor, y: Any = None) -> Controls:
        if t.ndim:
            return at_each_time(self.at, x, t, y)
        ends, time, z = self._ends, float(t), self._ends.standardised(x)
        if ends.between(time)[0] < _NOTHING:
            u = ends.end_rate(time) * (self._expected(z, time) - ends.expected(x, time))
        else:  # E[z_T | z_t] - z_t would drown in rounding at the end
            u = ends.rate(time) * (self._law_at(time).score(z) - ends.score(x, time))
        return u.reshape(x.shape)

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        shift = self._ends.on_grid(chain)
        if shift is None:
            return super().on_chain(chain, tables)
        denoise = self.denoiser_on_grid(chain.times)
        return lambda k, x, y: shift(k, x, self._ends.standardised(denoise(k, x, y)))

    # ------------------------------------------------------------ E[x_T | x_t], as networks see it

    def denoised(self, x: Tensor, t: Tensor | float, condition: Any = None) -> Tensor:
        """``E[x_T | x_t]`` at a 0-d t, of x's shape."""
        return self._ends.states(self._expected(self._ends.standardised(x), float(t)))

    def ends(self, n: int, seed: int) -> Tensor:
        """Draws of the mixture, ``(n, *event)``."""
        return self._ends.states(draw(self.law, n, derive_seed(seed, Place.MIXTURE_ENDS)))

    def denoiser_on_grid(self, times: Tensor) -> Callable[[int, Tensor, Any], Tensor]:
        """``(k, x, y) -> E[x_T | x_k]``; what was asked last is remembered, since control and network both ask."""
        clock = times.double().tolist()

        def denoise(k: int, x: Tensor, y: Any) -> Tensor:
            return recall(self, (clock[k], torch.is_grad_enabled()), x, lambda: self.denoised(x, clock[k]))

        return denoise


@CONTROLS.register("corrected")
class CorrectedControl(Control):
    """A control that is not trained, and a network beside it that is: ``c = c_base + c_network``."""

    def __init__(self, base: Control, correction: Control) -> None:
        super().__init__(correction.event_shape, correction.control_shape, correction.first_time, correction.last_time)
        self.base, self.correction = base.requires_grad_(False), correction
        self.learning_rate = correction.learning_rate

    @property
    def configuration(self) -> dict[str, Any]:
        return {"base": CONTROLS.describe(self.base), "network": CONTROLS.describe(self.correction)}

    @classmethod
    def from_saved(cls, saved: Saved, context: Context) -> CorrectedControl:
        base, network = CONTROLS.make(saved["base"], context), Saved(saved["network"], saved.where)
        if network["kind"] != "network":
            return cls(base, CONTROLS.make(network, context))
        denoiser = base if isinstance(base, MixtureControl) else None
        return cls(base, DefaultControl.of(context.problem, network.settings(Architecture), denoiser=denoiser))

    def at(self, x: States, t: Tensor, y: Any = None) -> Controls:
        return self.base.at(x, t, y) + self.correction.at(x, t, y)

    def tables(self, chain: Chain) -> tuple[Tensor, ...]:
        return self.correction.tables(chain)

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        base, correction = self.base.on_chain(chain), self.correction.on_chain(chain, tables)
        return lambda k, x, y: chain.together(k, x, base(k, x, y), correction(k, x, y), y)

    def along(self, chain: Chain, states: StatePaths, y: Any = None, first: int = 0) -> NoisePaths:
        parts = [control.along(chain, states, y, first) for control in (self.base, self.correction)]
        if chain.of_noise:
            return parts[0] + parts[1]
        pairs = enumerate(zip(states, *parts))
        return torch.stack([chain.together(first + k, x, base, more, y) for k, (x, base, more) in pairs])

    def linear_parts(self) -> list[LinearPart]:
        return self.correction.linear_parts()
