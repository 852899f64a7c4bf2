"""The network of a control beside a pre-trained model, which sees the reward where the model expects the data to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..problems.problem import ControlProblem
from ..problems.simulate import simulate_chain
from ..randomness import Place, generator_for
from ..shapes import Controls, States
from ..tensors import apply_scale_transposed
from .base import Control, at_each_time
from .langevin_term import reward_and_slope
from .network import FEATURES, Layers, floored, layers_for, time_features, uniform
from .saved import CONTROLS, Context, Saved

_PILOT_PATHS = 256
_FULL = 128  # largest state with a full matrix on the slope
_DENSE = 4096  # largest state that hidden layers see as a whole
#: by which parameters are multiplied, so that beside a tuned model its rate, 3e-4, is theirs too
_UNIT = 10.0
_STEP = 8.0  # features that one step of Adam moves at once, of each linear part


@dataclass(frozen=True)
class RewardLayers(Layers):
    """What a file says of a :class:`RewardNetwork`.

    Attributes:
        slope: whether the reward has a gradient: then the network sees r and its gradient.
    """

    slope: bool = True


@CONTROLS.register("reward-network")
class RewardNetwork(Control):
    """A control that sees x, the denoised state ``x0^(x, t)`` of the pre-trained model, and where the reward has a
    gradient ``r(x0^)`` and ``g = grad r(x0^)/alpha``.

    ``u = hidden layers + sigma^T (a g)``: the second part is the Langevin term at the denoised state, its coefficients
    ``a(t, r, ...)`` made by the hidden layers, one for each index of the state's first dimension (a vector's
    coordinates, an image's channels); for states of 128 numbers at most a matrix ``A(t)`` is added to them. The
    gradient is that of the reward alone: nothing is differentiated through the model, which the step has called anyway.
    All of it is 0 at the start of training.

    States of 4096 numbers at most are seen as a whole. Of larger ones the hidden layers see r, the length of g and the
    time only, and make nothing but the coefficients: no parameter then grows with the state.

    On a discrete diffusion model the scale of the step stands for ``sqrt(h) sigma``, and c for u.
    """

    learning_rate = 1e-3
    most_times = 4.0

    def __init__(
        self, problem: ControlProblem, architecture: RewardLayers, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(problem.event_shape, problem.control_shape, 0.0, problem.horizon)
        self.problem, self.architecture = problem, architecture
        n, slope = self.event_shape.numel(), architecture.slope
        dense = n <= _DENSE
        seen = (2 + slope) * n if dense else 0
        self.centre, self.spread = nn.Buffer(torch.zeros(seen)), nn.Buffer(torch.ones(seen))
        #: mean and spread of r/alpha, and the usual length of g
        self.unit = nn.Buffer(torch.tensor([0.0, 1.0, 1.0]))
        widths = (seen + 2 * slope + architecture.condition_size + FEATURES, *architecture.hidden)
        self.weights = nn.ParameterList(uniform(b, a, generator, _UNIT) for a, b in pairwise(widths))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(b)) for b in widths[1:])
        self.last = _zeros(n, widths[-1]) if dense else None
        self.offset = _zeros(FEATURES, n) if dense else None
        self.modulation = _zeros(self.event_shape[0], widths[-1]) if slope else None
        self.langevin = _zeros(FEATURES, self.event_shape[0]) if slope else None
        self.matrix = _zeros(FEATURES, n, n) if slope and n <= _FULL else None

    @classmethod
    def of(cls, problem: ControlProblem, architecture: RewardLayers, seed: int = 0) -> RewardNetwork:
        """The network for a problem, in its dtype and on its device."""
        generator = generator_for("cpu", seed, Place.REWARD_NETWORK_WEIGHTS)
        return cls(problem, architecture, generator).to(device=problem.device, dtype=problem.dtype)

    @property
    def configuration(self) -> dict[str, Any]:
        return asdict(self.architecture)

    @classmethod
    def from_saved(cls, saved: Saved, context: Context) -> RewardNetwork:
        return cls.of(context.problem, saved.settings(RewardLayers))

    # ------------------------------------------------------------ what it sees

    def inputs(self, x: Tensor, x0: Tensor, y: Any = None) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """States as the hidden layers see them, before they are normalised; ``r/alpha``; and g."""
        whole = [x.flatten(1), x0.flatten(1)]
        if not self.architecture.slope:
            return whole, None, None
        r, g = reward_and_slope(self.problem, x0, y, torch.is_grad_enabled() and x0.requires_grad)
        flat = g.flatten(1)
        return [*whole, flat / (1 + flat.norm(dim=1, keepdim=True) / (3 * self.unit[2]))], r, g

    def _seen(self, x: Tensor, x0: Tensor, phi: Tensor, y: Any) -> tuple[Tensor, Tensor | None]:
        whole, r, g = self.inputs(x, x0, y)
        parts = [(torch.cat(whole, 1) - self.centre) / self.spread] if len(self.centre) else []
        if r is not None and g is not None:
            mean, spread, usual = self.unit
            z = ((r - mean) / spread).unsqueeze(1)
            length = g.flatten(1).norm(dim=1, keepdim=True) / usual
            parts += [z / (1 + z.abs() / 3), length / (1 + length)]
        if self.architecture.condition_size:
            parts.append(self.architecture.condition(y, x.dtype))
        return torch.cat([*parts, phi.expand(len(x), -1)], 1), g

    def _value(self, x: Tensor, x0: Tensor, tables: tuple[Tensor, ...], sigma: Tensor, y: Any) -> Tensor:
        phi, *matrix = tables
        z, g = self._seen(x, x0, phi, y)
        for W, b in zip(self.weights, self.biases):
            z = nn.functional.silu(nn.functional.linear(z, _UNIT * W, _UNIT * b))
        z, phi = (_UNIT * _STEP / z.shape[1]) * z, (_UNIT * _STEP / FEATURES) * phi
        u = torch.zeros_like(x)
        if self.last is not None and self.offset is not None:
            u = (z @ self.last.mT + phi @ self.offset).unflatten(1, self.event_shape)
        if g is not None and self.langevin is not None and self.modulation is not None:
            a = phi @ self.langevin + z @ self.modulation.mT
            term = a.unflatten(1, (-1, *(1,) * (x.ndim - 2))) * g
            if matrix:
                term = term + (g.flatten(1) @ matrix[0].mT).unflatten(1, self.event_shape)
            u = u + apply_scale_transposed(sigma, term, x.ndim - 1)
        return u

    # ------------------------------------------------------------ Control

    def _tables_at(self, t: Tensor) -> tuple[Tensor, ...]:
        phi = time_features((t / self.last_time).clamp(0.0, 1.0))
        if self.matrix is None:
            return (phi,)
        gain = _UNIT * _STEP / (FEATURES * self.matrix.shape[1])
        return phi, torch.einsum("...f,fij->...ij", gain * phi, self.matrix)

    def tables(self, chain: Chain) -> tuple[Tensor, ...]:
        return self._tables_at(chain.times[:-1])

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        tables = self.tables(chain) if tables is None or len(tables) == 0 else tables
        return self._shift(chain, list(zip(*(p.unbind(0) if isinstance(p, Tensor) else p for p in tables))))

    def _shift(self, chain: Chain, rows: Mapping[int, Any] | Sequence[Any]) -> ShiftFunction:
        """``(k, x, y) -> c`` from the tables' rows of step k."""
        reference = self.problem.reference
        denoise = reference.denoiser_on_grid(chain.times)  # type: ignore[attr-defined]
        sigma = reference.diffusion_on_grid(chain.times) if reference.continuous else None

        def shift(k: int, x: States, y: Any) -> Tensor:
            x0 = denoise(k, x, y)
            if sigma is not None:
                return chain.shift_at(k, x, self._value(x, x0, rows[k], sigma(k, x), y), y)
            with torch.no_grad():  # the model has been called, and its prediction is at hand
                scale = chain.kernel(k, x, y)[1]
            return self._value(x, x0, rows[k], scale, y)

        return shift

    def at(self, x: States, t: Tensor, y: Any = None) -> Controls:
        if t.ndim:
            return at_each_time(self.at, x, t, y)
        reference: Any = self.problem.reference
        if reference.continuous:
            return self._value(x, reference.denoised(x, t, y), self._tables_at(t), reference.diffusion(x, t), y)
        k = reference.step_at(float(t))
        return reference.control(k, self._shift(reference, {k: self._tables_at(reference.times[k])})(k, x, y))


@CONTROLS.register("sum")
class SumControl(Control):
    """Two controls whose shifts are added, both trained: a tuned copy of the model and a network beside it."""

    def __init__(self, first: Control, second: Control) -> None:
        super().__init__(first.event_shape, first.control_shape, first.first_time, first.last_time)
        self.first, self.second = first, second
        self.learning_rate = min(first.learning_rate, second.learning_rate)
        self.most_times = min(first.most_times, second.most_times)

    @property
    def configuration(self) -> dict[str, Any]:
        return {"first": CONTROLS.describe(self.first), "second": CONTROLS.describe(self.second)}

    @classmethod
    def from_saved(cls, saved: Saved, context: Context) -> SumControl:
        return cls(CONTROLS.make(saved["first"], context), CONTROLS.make(saved["second"], context))

    def at(self, x: States, t: Tensor, y: Any = None) -> Controls:
        return self.first.at(x, t, y) + self.second.at(x, t, y)

    def tables(self, chain: Chain) -> tuple[Tensor, ...]:
        return (*self.first.tables(chain), *self.second.tables(chain))

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        tables = self.tables(chain) if tables is None else tables
        cut = len(tables) - len(self.second.tables(chain)) if tables else 0
        first, second = self.first.on_chain(chain, tables[:cut]), self.second.on_chain(chain, tables[cut:])
        return lambda k, x, y: chain.together(k, x, first(k, x, y), second(k, x, y), y)


def reward_network(problem: ControlProblem, chain: Chain, seed: int) -> RewardNetwork:
    """The network for a problem, normalised by a few paths of the reference."""
    network = RewardNetwork.of(problem, RewardLayers(**asdict(layers_for(problem)), slope=problem.has_gradient), seed)
    paths = simulate_chain(problem, chain, _PILOT_PATHS, seed=seed)
    denoise, y = problem.reference.denoiser_on_grid(chain.times), paths.condition  # type: ignore[attr-defined]
    with torch.no_grad():
        pairs = [(x, denoise(k, x, y)) for k, x in enumerate(paths.states[:-1].unbind(0))]
        found = [network.inputs(x, x0, y) for x, x0 in pairs]
        if network.architecture.slope:
            r, g = (torch.cat([torch.as_tensor(part[i]) for part in found]) for i in (1, 2))
            usual = g.flatten(1).square().sum(1).mean().sqrt()
            network.unit.copy_(torch.stack((r.mean(), r.std().clamp(min=1e-6), usual.clamp(min=1e-6))))
            found = [network.inputs(x, x0, y) for x, x0 in pairs]
        if len(network.centre):
            whole = torch.cat([torch.cat(part[0], 1) for part in found])
            network.centre.copy_(whole.mean(0))
            network.spread.copy_(torch.cat([floored(s) for s in whole.std(0).split(problem.event_shape.numel())]))
    return network


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))
