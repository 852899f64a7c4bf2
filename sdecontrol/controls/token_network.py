"""The default networks of tokens: a control, the tilt of their log-probabilities, and a value.

Both embed the tokens of all positions, flatten them, and send them through hidden layers that see the time and the
condition; beside them is a part that is linear in the embedded tokens, which holds all pairs of positions. Both start
at zero (a value at its level): training starts from the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..problems.problem import ControlProblem
from ..randomness import Place, generator_for
from ..shapes import Controls, NoisePaths, StatePaths, TokensOrRelaxed
from .base import Control
from .log_value import LogValue
from .network import FEATURES, Layers, layers_for, time_features, uniform
from .saved import CONTROLS, VALUES

_ONE_HOT = 32  # most tokens that are embedded one-hot; more of them as so many numbers, which are learned
_PAIRS = 1 << 21  # most parameters of the part that is linear in the tokens
_HIDDEN = (128, 128)


class TokenLayers(nn.Module):
    """Embedded tokens, time and condition to the last hidden layer, and to a linear part.

    Args:
        positions: of a state, flattened. values: number of tokens.
        outputs: of the linear part; it is left out where it would be too large.
    """

    one_hot: Tensor

    def __init__(
        self, positions: int, values: int, outputs: int, layers: Layers, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.layers, self.width = layers, min(values, _ONE_HOT)
        if values <= _ONE_HOT:
            self.register_buffer("one_hot", torch.eye(values), persistent=False)
            self.embedding = None
        else:
            rows = torch.randn(values, self.width, generator=generator) / math.sqrt(self.width)
            self.embedding = nn.Parameter(rows)
        seen = positions * self.width
        widths = (seen, *layers.hidden)
        self.weights = nn.ParameterList(uniform(b, a, generator) for a, b in pairwise(widths))
        with torch.no_grad():  # of all that the first layer sees one number a position is not zero
            self.weights[0].mul_(math.sqrt(self.width))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(b)) for b in widths[1:])
        self.time = uniform(widths[1], FEATURES, generator)
        self.condition = uniform(widths[1], layers.condition_size, generator) if layers.condition_size else None
        self.pairs = nn.Parameter(torch.zeros(outputs, seen)) if outputs * seen <= _PAIRS else None

    def forward(self, x: TokensOrRelaxed, phi: Tensor, y: Any = None) -> tuple[Tensor, Tensor | float]:
        """The last hidden layer ``(batch, width)`` and the linear part ``(batch, outputs)``, at time features ``(batch
        | 1, FEATURES)``; x tokens, or their probabilities ``(batch, *shape, values)``."""
        table = self.one_hot if self.embedding is None else self.embedding
        if x.is_floating_point():
            z = (x.flatten(1, -2) @ table).flatten(1)
        else:
            z = nn.functional.embedding(x.flatten(1), table).flatten(1)
        hidden = nn.functional.linear(z, self.weights[0]) + (phi @ self.time.mT + self.biases[0])
        if self.condition is not None:
            hidden = hidden + self.layers.condition(y, z.dtype) @ self.condition.mT
        hidden = nn.functional.silu(hidden)
        for W, b in zip(list(self.weights)[1:], list(self.biases)[1:]):
            hidden = nn.functional.silu(nn.functional.linear(hidden, W, b))
        return hidden, 0.0 if self.pairs is None else nn.functional.linear(z, self.pairs)


def token_layers(problem: ControlProblem) -> Layers:
    """Hidden layers that see a problem's conditions."""
    return replace(layers_for(problem), hidden=_HIDDEN)


@CONTROLS.register("token-network", lambda saved, to: TokenControl.of(to.problem, saved.settings(Layers)))
class TokenControl(Control):
    """A network ``(tokens, t) -> (batch, *shape, V)``, the tilt of the log-probabilities; zero at the start."""

    learning_rate = 5e-3
    most_times = 4.0

    def __init__(self, problem: ControlProblem, layers: Layers, generator: torch.Generator | None = None) -> None:
        super().__init__(problem.event_shape, problem.control_shape, 0.0, problem.horizon)
        self.belongs_to(problem)
        self.layers = layers
        n, V = self.event_shape.numel(), self.control_shape[-1]
        self.trunk = TokenLayers(n, problem.reference.values, n * V, layers, generator)
        width = layers.hidden[-1]
        # of many tokens, few directions
        self.wide = V > _ONE_HOT
        self.last = nn.Parameter(torch.zeros(n * _ONE_HOT if self.wide else n * V, width))
        self.spread = uniform(V, _ONE_HOT, generator) if self.wide else None
        self.offset = nn.Parameter(torch.zeros(FEATURES, n * V))

    @classmethod
    def of(cls, problem: ControlProblem, layers: Layers, seed: int = 0) -> TokenControl:
        """The network for a problem, in the dtype of its numbers and on its device."""
        generator = generator_for("cpu", seed, Place.TOKEN_CONTROL_WEIGHTS)
        return cls(problem, layers, generator).to(device=problem.device, dtype=problem.dtype)

    @property
    def configuration(self) -> dict[str, Any]:
        return asdict(self.layers)

    def _features(self, t: Tensor) -> Tensor:
        return time_features((t.reshape(-1) / self.last_time).clamp(0.0, 1.0))

    def _tilt(self, x: TokensOrRelaxed, phi: Tensor, y: Any) -> Controls:
        hidden, linear = self.trunk(x, phi, y)
        u = nn.functional.linear(hidden, self.last)
        if self.spread is not None:
            u = (u.unflatten(1, (-1, _ONE_HOT)) @ self.spread.mT).flatten(1)
        return (u + linear + phi @ self.offset).unflatten(1, self.control_shape)

    def at(self, x: TokensOrRelaxed, t: Tensor, y: Any = None) -> Controls:
        return self._tilt(x, self._features(t), y)

    def tables(self, chain: Chain) -> tuple[Tensor, ...]:
        return (self._features(chain.times[:-1]),)

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        (phi,) = self.tables(chain) if tables is None or len(tables) == 0 else tables
        return lambda k, x, y: chain.shift_at(k, x, self._tilt(x, phi[k].unsqueeze(0), y), y)

    def along(self, chain: Chain, states: StatePaths, y: Any = None, first: int = 0) -> NoisePaths:
        count, batch = states.shape[:2]
        phi = self._features(chain.times[first : first + count]).repeat_interleave(batch, 0)
        y_all = None if y is None else y.repeat(count, *(1 for _ in y.shape[1:]))
        u = self._tilt(states.flatten(0, 1), phi, y_all).unflatten(0, (count, batch))
        return chain.shifts_at(range(first, first + count), states, u, y)


@VALUES.register("token-network", lambda saved, to: TokenValue.of(to.problem, to.chain, saved.settings(Layers)))
class TokenValue(LogValue):
    """A network for ``v/alpha`` of tokens.

    Args:
        span: first and last time.
        level, size: typical value of ``v/alpha`` and of its variation: what the network starts from, and its unit.
    """

    learning_rate = 5e-3
    own_end: ClassVar[bool] = False

    def __init__(
        self,
        problem: ControlProblem,
        span: tuple[float, float],
        layers: Layers,
        level: float = 0.0,
        size: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.first_time, self.last_time = span
        self.layers = layers
        self.trunk = TokenLayers(problem.event_shape.numel(), problem.reference.values, 1, layers, generator)
        self.scale = nn.Buffer(torch.tensor([level, size]))
        self.constant = nn.Parameter(torch.zeros(FEATURES))
        self.last = nn.Parameter(torch.zeros(layers.hidden[-1]))

    @classmethod
    def of(cls, problem: ControlProblem, chain: Chain, layers: Layers, seed: int = 0, **unit: float) -> TokenValue:
        """The network for a problem, in the dtype of its numbers and on its device; ``unit``: ``level`` and
        ``size``."""
        generator, span = generator_for("cpu", seed, Place.TOKEN_VALUE_WEIGHTS), (chain.clock[0], chain.clock[-1])
        network = cls(problem, span, layers, **unit, generator=generator)
        return network.to(device=problem.device, dtype=problem.dtype)

    @property
    def configuration(self) -> dict[str, Any]:
        return asdict(self.layers)

    def along(self, states: Tensor, times: Tensor, y: Any = None) -> Tensor:
        """``v/alpha`` at states ``(K, batch, *event)`` of times ``(K,)``: ``(K, batch)``."""
        count, batch = states.shape[:2]
        s = (times - self.first_time) / (self.last_time - self.first_time)
        phi = time_features(s.clamp(0.0, 1.0)).repeat_interleave(batch, 0)
        y = None if y is None else y.repeat(count, *(1 for _ in y.shape[1:]))
        hidden, linear = self.trunk(states.flatten(0, 1), phi, y)
        linear = linear.squeeze(1) if isinstance(linear, Tensor) else linear
        value = phi @ self.constant + hidden @ self.last + linear
        return (self.scale[0] + self.scale[1] * value).unflatten(0, (count, batch))

    def at(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        return self.along(x.unsqueeze(0), t.reshape(1), y)[0]
