"""Guidance by a value function: ``u = sigma^T grad v / alpha`` (tutorial [27], Algorithm 4), and the values it can use.

A value is kept as ``v/alpha``, the logarithm of ``psi``: a function of the state and of the process's time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..errors import NotDifferentiable
from ..memory import hand_on
from ..problems.problem import ControlProblem
from ..problems.rewards import LogProb
from ..problems.simulate import simulate_chain
from ..randomness import Place, generator_for
from ..tensors import apply_scale, apply_scale_transposed, check_output
from .base import Control, at_each_time
from .log_value import LogValue
from .network import FEATURES, Layers, Scales, flat_or, layers_for, seen_coordinates, time_features
from .saved import CONTROLS, VALUES, Context, Saved
from .token_network import TokenValue, token_layers

_PILOT_PATHS = 256
_DRAWS = 8  # ends by which masked tokens are valued
_FULL = 32  # largest state whose value has a full matrix for its quadratic part, rather than a diagonal


@VALUES.register("annealed", lambda saved, context: AnnealedValue(context.problem))
class AnnealedValue(LogValue):
    """``beta(t) r(x)``, ``log pi_t - log p0``: what particles of annealed Langevin are weighed by on their way."""

    def __init__(self, problem: ControlProblem) -> None:
        super().__init__()
        self.problem = problem
        self._reference: Any = problem.reference

    def at(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        return self._reference.beta(float(t)) * self.problem.reward(x, y)


@CONTROLS.register("value", lambda saved, to: ValueControl(VALUES.make(saved["value"], to), to.problem, to.chain))
class ValueControl(Control):
    """``u(x, t) = sigma(x, t)^T grad v(x, t) / alpha``, by automatic differentiation of a value.

    On a discrete diffusion model and in the learned start the scale of the step stands for ``sqrt(h) sigma``. On a
    chain it differs from the best mean shift, ``E*[grad v_{k+1}]``, by O(h).
    """

    differentiable = False  # the value is trained by a regression of its own

    def __init__(self, value: LogValue, problem: ControlProblem, chain: Chain) -> None:
        super().__init__(problem.event_shape, problem.control_shape, chain.clock[0], chain.clock[-1])
        self.value = value
        self._chain = chain

    @property
    def configuration(self) -> dict[str, Any]:
        return {"value": VALUES.describe(self.value)}

    def gradient(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        """``grad v / alpha`` at a 0-d t, of x's shape; with its graph where x has one."""
        return self._slope(lambda leaf: self.value.at(leaf, t, y), x)

    def _slope(self, value_at: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        graph = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            leaf = x if graph else x.detach().requires_grad_(True)
            value = value_at(leaf)
            if not value.requires_grad:
                raise NotDifferentiable(
                    "guidance differentiates its value function, but this one returned a tensor without a graph for a "
                    "state that requires one. Use path-integral-guidance (no gradients), or write the value in torch "
                    "operations."
                )
            slope = torch.autograd.grad(value.sum(), leaf, create_graph=graph)[0]
        hand_on(self._chain.reference, leaf, x)  # the model's prediction: the step asks for it next
        return slope

    def at(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        if t.ndim:
            return at_each_time(self.at, x, t, y)
        chain = self._chain
        if chain.reference.continuous and float(t) >= 0:
            return apply_scale_transposed(chain.reference.diffusion(x, t), self.gradient(x, t, y), x.ndim - 1)
        k = chain.step_at(float(t))
        return chain.control(k, self._scaled(chain, k, x, self.gradient(x, t, y), y))

    def _scaled(self, chain: Chain, k: int, x: Tensor, gradient: Tensor, y: Any) -> Tensor:
        with torch.no_grad():
            return apply_scale_transposed(chain.kernel(k, x, y)[1], gradient, x.ndim - 1)

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        reference, start = chain.reference, chain.start
        sigma = reference.diffusion_on_grid(chain.main.times[:-1]) if reference.continuous else None
        value = self.value.on_chain(chain)

        def shift(k: int, x: Tensor, y: Any) -> Tensor:
            gradient = self._slope(lambda leaf: value(k, leaf, y), x)
            if k < start or sigma is None:
                return self._scaled(chain, k, x, gradient, y)
            return chain.shift_at(k, x, apply_scale_transposed(sigma(k - start, x), gradient, x.ndim - 1))

        return shift

    def displacement(self, chain: Chain) -> Callable[[int, Tensor, Tensor, Any], Tensor]:
        """``(k, x, xi, y) -> e`` with ``grad . e = c . xi`` for every gradient and the shift c that it makes."""
        reference, start = chain.reference, chain.start
        sigma = reference.diffusion_on_grid(chain.main.times[:-1]) if reference.continuous else None

        def displace(k: int, x: Tensor, xi: Tensor, y: Any) -> Tensor:
            if k < start or sigma is None:
                return apply_scale(chain.kernel(k, x, y)[1], xi, x.ndim - 1)
            gain = chain.gain(k)
            z = xi @ gain if isinstance(gain, Tensor) else xi * gain
            return apply_scale(sigma(k - start, x), z, x.ndim - 1)

        return displace


def denoised_state(reference: Any, chain: Chain, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
    """``x0^``, what a pre-trained reference's model expects the data to be; in a learned start, at the mean of X_0."""
    time = float(t)
    if time < 0:
        first = chain.segments[0]
        k = first.step_at(time)
        mean = first.kernel(k, x, y)[0]
        x, time = x + (mean - x) * (-time / first.step_sizes[k]), 0.0
    return reference.denoised(x, time, y, on_clock=True)


def denoiser_on_chain(reference: Any, chain: Chain, on_clock: bool = False) -> Callable[[int, Tensor, Any], Tensor]:
    """``(k, x, y) -> x0^`` at step k of a chain, of the prediction that the step makes itself."""
    start, denoise = chain.start, reference.denoiser_on_grid(chain.main.times, on_clock)

    def denoised(k: int, x: Tensor, y: Any) -> Tensor:
        return denoised_state(reference, chain, x, chain.times[k], y) if k < start else denoise(k - start, x, y)

    return denoised


@VALUES.register("given", lambda saved, to: GivenValue(to.own_value("value function"), to.problem.alpha))
class GivenValue(LogValue):
    """A function ``v(x, t) -> (batch,)`` of yours, or an exact solution's ``value``, with t ``(batch,)``. Saved files
    do not hold it: it is given again to ``load``."""

    def __init__(self, function: Callable[..., Tensor], alpha: float) -> None:
        super().__init__()
        self._function, self.alpha = [function], alpha  # in a list: it is the user's, not a part of this module

    def at(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        times = t.expand(x.shape[0])
        v = self._function[0](x, times) if y is None else self._function[0](x, times, y)
        like = x if x.is_floating_point() else t  # x may be tokens
        check_output(
            "value", v, (x.shape[0],), like, "A value is called as value(x, t), t (batch,): one number per row."
        )
        return v / self.alpha


@VALUES.register("tweedie")
class TweedieValue(LogValue):
    """``v(x, t) ~ r(x0^(x, t))``, ``x0^ = (x - std eps^)/mu`` the denoiser's mean of the data [31].

    Its error does not vanish with anything: it is zero in the gradient where r is linear and the data Gaussian, and
    otherwise the reward of a mean stands for a log-mean of rewards. In the learned start the mean of X_0 is noised
    data. Of masked tokens it is the log-mean of ``exp(r/alpha)`` over 8 ends, each masked position filled in by itself
    as the model expects it (Li et al. 2408.08252 take one).

    Args:
        classifier: ``x0 -> logits``: its ``log p(label | x0)`` in the place of ``r/alpha``.

    Raises:
        ValueError: a reference without a denoiser, a clipped one, or a running cost.
    """

    def __init__(self, problem: ControlProblem, chain: Chain, classifier: Any = None, label: int | None = None) -> None:
        super().__init__()
        reference = problem.reference
        if not reference.pretrained:
            raise ValueError(
                "Tweedie's formula needs a denoiser, the reference being a pre-trained model (generative_sde or "
                f"diffusion_chain); a {type(reference).__name__} has none. Use value='monte-carlo' or 'soft-q'."
            )
        if reference.clip is not None:
            raise ValueError(
                f"the reference clips its prediction of x0 to {reference.clip}: it is then not the posterior mean that "
                "Tweedie's formula needs. Make the chain with clip=None."
            )
        if problem.running_cost_function is not None:
            raise ValueError(
                "Tweedie's value is the reward of the denoised state and knows no running cost. Use "
                "value='monte-carlo' or 'soft-q'."
            )
        self._problem, self._chain, self.label = problem, chain, label
        self._log_prob = [None if classifier is None else LogProb(classifier, label)]  # in a list: as of GivenValue

    @property
    def configuration(self) -> dict[str, Any]:
        return {"classifier": self._log_prob[0] is not None, "label": self.label}

    @classmethod
    def from_saved(cls, saved: Saved, context: Context) -> TweedieValue:
        classifier = context.own_value("classifier") if saved["classifier"] else None
        return cls(context.problem, context.chain, classifier, saved["label"])

    def denoised(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        """``x0^``, what the reference's model expects the data to be."""
        return denoised_state(self._problem.reference, self._chain, x, t, y)

    def at(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        reference = self._problem.reference
        if reference.state_dtype is None:
            return self._of_data(self.denoised(x, t, y), y)
        ends = reference.likely_ends(x, float(t), y, _DRAWS)
        y = None if y is None else y.repeat(_DRAWS, *(1 for _ in y.shape[1:]))
        values = self._of_data(ends.flatten(0, 1), y).unflatten(0, (_DRAWS, -1))
        return values.logsumexp(0) - math.log(_DRAWS)

    def on_chain(self, chain: Chain) -> Callable[[int, Tensor, Any], Tensor]:
        if chain.state_dtype is not None:
            return super().on_chain(chain)
        denoise = denoiser_on_chain(self._problem.reference, chain, on_clock=True)
        return lambda k, x, y: self._of_data(denoise(k, x, y), y)

    def _of_data(self, x0: Tensor, y: Any) -> Tensor:
        log_prob, x0 = self._log_prob[0], self._problem.reference.data_of(x0, y)
        return log_prob(x0, y) if log_prob is not None else self._problem.reward(x0, y) / self._problem.alpha


@VALUES.register(
    "classifier", lambda saved, to: ClassifierValue(to.problem, to.own_value("classifier"), saved["label"])
)
class ClassifierValue(LogValue):
    """``v/alpha = log p(label | x_t, t)`` of a classifier of noisy states, called on the clock of the reference's
    model: ``classifier(x, s) -> logits (batch, classes)``, s ``(batch,)``."""

    def __init__(self, problem: ControlProblem, classifier: Callable[..., Tensor], label: int | None) -> None:
        super().__init__()
        self._problem, self._classifier, self.label = problem, [classifier], label

    @property
    def configuration(self) -> dict[str, Any]:
        return {"label": self.label}

    def at(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        clock = self._problem.reference.model_time(max(float(t), 0.0), x)
        return LogProb(lambda z: self._classifier[0](z, clock.expand(z.shape[0])), self.label)(x, y)


@VALUES.register("network", lambda saved, to: NetworkValue.of(to.problem, to.chain, saved.settings(Layers), Scales()))
class NetworkValue(LogValue):
    """A network for ``v/alpha``: a quadratic form in x whose coefficients are functions of time, beside hidden layers,
    both with time features that resolve the ends of the horizon.

    Args:
        n: size of a state. span: first and last time.
        level, size: typical value of ``v/alpha`` and of its variation: what the network starts from, and its unit.
    """

    learning_rate = 5e-3

    def __init__(
        self,
        n: int,
        span: tuple[float, float],
        architecture: Layers,
        scales: Scales,
        level: float = 0.0,
        size: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.first_time, self.last_time = span
        self.architecture, self.angles = architecture, scales.angles
        self.centre = nn.Buffer(flat_or(scales.centre, torch.zeros(n)))
        self.spread = nn.Buffer(flat_or(scales.spread, torch.ones(n)))
        self.scale = nn.Buffer(torch.tensor([level, size]))
        widths = (n + architecture.condition_size + FEATURES, *architecture.hidden)
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        with torch.no_grad():
            for layer in layers:
                bound = 1 / math.sqrt(layer.in_features)
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.zero_()
        self.layers = nn.ModuleList(layers)
        self.constant = nn.Parameter(torch.zeros(FEATURES))
        self.slope = nn.Parameter(torch.zeros(FEATURES, n))
        self.square = nn.Parameter(torch.zeros(FEATURES, n, n) if n <= _FULL else torch.zeros(FEATURES, n))
        self.last = nn.Parameter(torch.zeros(widths[-1]))

    @classmethod
    def of(
        cls, problem: ControlProblem, chain: Chain, architecture: Layers, scales: Scales, seed: int = 0, **unit: float
    ) -> NetworkValue:
        """The network for a problem, in its dtype and on its device; ``unit``: ``level`` and ``size``."""
        scales = replace(scales, angles=problem.reference.angles)
        n, span = problem.event_shape.numel() * (2 if scales.angles else 1), (chain.clock[0], chain.clock[-1])
        generator = generator_for("cpu", seed, Place.VALUE_WEIGHTS)
        network = cls(n, span, architecture, scales, **unit, generator=generator)
        return network.to(device=problem.device, dtype=problem.dtype)

    @property
    def configuration(self) -> dict[str, Any]:
        return asdict(self.architecture)

    def along(self, states: Tensor, times: Tensor, y: Any = None) -> Tensor:
        """``v/alpha`` at states ``(K, batch, *event)`` of times ``(K,)``: ``(K, batch)``."""
        s = (times - self.first_time) / (self.last_time - self.first_time)
        phi = time_features(s.clamp(0.0, 1.0))
        z = (seen_coordinates(states.flatten(2), self.angles) - self.centre) / self.spread
        parts = [z, phi.unsqueeze(1).expand(-1, z.shape[1], -1)]
        if self.architecture.condition_size:
            parts.append(self.architecture.condition(y, z.dtype).expand(len(z), -1, -1))
        hidden = torch.cat(parts, 2)
        for layer in self.layers:
            hidden = nn.functional.silu(layer(hidden))
        square = torch.einsum("kf,f...->k...", phi, self.square)
        quadratic = (z @ square) * z if square.ndim == 3 else square.unsqueeze(1) * z * z
        value = (phi @ self.constant).unsqueeze(1) + hidden @ self.last
        value = value + (z * (phi @ self.slope).unsqueeze(1)).sum(2) + 0.5 * quadratic.sum(2)
        return self.scale[0] + self.scale[1] * value

    def at(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        return self.along(x.unsqueeze(0), t.reshape(1), y)[0]


def value_network(problem: ControlProblem, chain: Chain, seed: int) -> NetworkValue | TokenValue:
    """A value network for a problem, normalised by a few paths of the reference; of tokens, one that embeds them."""
    paths = simulate_chain(problem, chain, _PILOT_PATHS, seed=seed)
    with torch.no_grad():
        total = (paths.reward - paths.cost).double() / problem.alpha
        unit = {
            "level": float(total.logsumexp(0)) - math.log(len(total)),
            "size": min(max(float(total.std()), 1.0), 100.0),
        }
        if problem.reference.state_dtype is not None:
            return TokenValue.of(problem, chain, token_layers(problem), seed, **unit)
        scales = Scales.of(problem, paths.states.flatten(0, 1))
        return NetworkValue.of(problem, chain, layers_for(problem), scales, seed, **unit)
