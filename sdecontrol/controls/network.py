"""The default network of a control.

Beside its hidden layers it has an affine path in x whose coefficients are functions of time, time features that resolve
both ends of the horizon, where the reward has a gradient a Langevin term, a learned multiple of
``sigma^T grad r / alpha`` (which is the exact control at the end), and, where the problem is not linear-quadratic, a
function of one coordinate for each output: radial basis functions of x_i with coefficients that are functions of time.
It starts at zero output: training starts from the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..problems.problem import ControlProblem
from ..randomness import Place, generator_for
from ..shapes import Controls, NoisePaths, Noises, StatePaths, States
from ..tensors import apply_scale_transposed
from .base import Control, at_each_time
from .feedback import AffineFeedback
from .langevin_term import LangevinTerm
from .linear_part import Gram, LinearPart, gram_of_features
from .saved import CONTROLS

_FULL_AFFINE = 128  # largest state for which the affine path is a full matrix rather than a diagonal
_MOST_RADIAL = 32  # largest state that gets a function per coordinate
_CENTRES = 10  # radial basis functions per coordinate
_OUTERMOST = 2.5  # spreads from the centre to the outermost of them
_RESOLUTIONS = tuple(2.0**-j for j in range(1, 8))


class Denoiser(Protocol):
    """What knows the mean of the end given the state, as :class:`sdecontrol.processes.generative.GenerativeSDE`
    does."""

    def denoised(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor: ...

    def denoiser_on_grid(self, times: Tensor) -> Callable[[int, Tensor, Any], Tensor]: ...


def time_features(s: Tensor) -> Tensor:
    """Features ``(..., 16)`` of relative time s in [0, 1]: polynomials and waves for the middle, and rational functions
    that resolve the ends down to 1/128 of the horizon (solutions of Riccati equations are rational in what remains)."""
    left = 1 - s
    parts = [torch.ones_like(s), s, s * s]
    parts += [left / (left + e) for e in _RESOLUTIONS]
    parts += [s / (s + e) for e in _RESOLUTIONS[2::3]]
    parts += [torch.cos(math.pi * k * s) for k in (1, 2)] + [torch.sin(math.pi * k * s) for k in (1, 2)]
    return torch.stack(parts, dim=-1)


FEATURES = time_features(torch.zeros(1)).shape[-1]


def radial_basis(z: Tensor) -> Tensor:
    """Gaussian radial basis functions ``(..., 10)`` of each coordinate of the standardised state z, their centres on a
    uniform grid whose step is their width.

    They vanish far out, where the affine path is left.
    """
    half = 0.5 * (_CENTRES - 1)  # in widths: the outermost centre
    s = (z * (half / _OUTERMOST)).unsqueeze(-1) - torch.linspace(-half, half, _CENTRES, dtype=z.dtype, device=z.device)
    return torch.exp(s * s * -0.5)


@dataclass(frozen=True)
class Layers:
    """The hidden layers of a network.

    Attributes:
        hidden: their widths.
        condition_size: size of a flattened condition that they see (0: none); ``classes`` > 0 where conditions are
            integer labels.
    """

    hidden: tuple[int, ...]
    condition_size: int = 0
    classes: int = 0

    def condition(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """A condition as the layers see it, ``(batch, condition_size)``."""
        if self.classes:
            return nn.functional.one_hot(y.long().reshape(-1), self.classes).to(dtype)
        return (y.flatten(1) if y.ndim > 1 else y.unsqueeze(1)).to(dtype)


@dataclass(frozen=True)
class Architecture(Layers):
    """What a file says of a :class:`DefaultControl`.

    Attributes:
        langevin: whether it has a Langevin term, a learned multiple of the reward's gradient.
        langevin_scale: by which that is multiplied, so that one step of Adam on it moves the control no further than a
            step on what else it has.
        radial_basis: add a function of x_i to output i (where controls have the shape of states, at most 32 of them).
        denoised: whether the hidden layers see the denoised state beside x.
        start: whether it is the control of a learned start, on [-1, 0).
    """

    langevin: bool = False
    langevin_scale: float = 1.0
    radial_basis: bool = False
    denoised: bool = False
    start: bool = False


@dataclass(frozen=True)
class Scales:
    """What a network is normalised by: it sees ``(x - centre) / spread``, ``(*event)`` each, and a denoised state in
    its own; None: 0 and 1. Of ``angles`` it sees cosines and sines, ``(2 *event)`` in all, and these are theirs."""

    centre: Tensor | None = None
    spread: Tensor | None = None
    data_centre: Tensor | None = None
    data_spread: Tensor | None = None
    angles: bool = False

    @classmethod
    def of(cls, problem: ControlProblem, states: Tensor) -> Scales:
        """From states ``(n, *event)`` of the reference; where states are embedded, of all that there are."""
        reference = problem.reference
        if reference.coordinate_spread is None:
            flat = states.flatten(1)
            return cls(flat.mean(0), floored(flat.std(0)))
        n = problem.event_shape.numel() * (2 if reference.angles else 1)
        return cls(spread=torch.full((n,), reference.coordinate_spread), angles=reference.angles)


def seen_coordinates(flat: Tensor, angles: bool) -> Tensor:
    """States ``(..., n)`` as networks see them."""
    return torch.cat((flat.cos(), flat.sin()), -1) if angles else flat


def layers_for(problem: ControlProblem) -> Layers:
    """Hidden layers for states of the problem's size, that see its conditions.

    Raises:
        ValueError: integer conditions that are no labels.
    """
    hidden = (64, 64) if problem.event_shape.numel() <= 32 else (128, 128)
    if problem.condition is None:
        return Layers(hidden)
    y = problem.draw_condition(1024, 0)
    if y.is_floating_point():
        return Layers(hidden, y[0].numel())
    if y[0].numel() != 1:
        raise ValueError(
            "integer conditions must be labels, one per row; pass other conditions as floating-point tensors."
        )
    classes = int(y.max()) + 1
    return Layers(hidden, classes, classes)


@CONTROLS.register("network", lambda saved, context: DefaultControl.of(context.problem, saved.settings(Architecture)))
class DefaultControl(Control):
    """See the module's docstring.

    Args:
        span: its first and last time.
        architecture: its ``langevin`` and ``denoised`` follow what is given below.
        term: what the Langevin coefficients multiply; None: no Langevin term.
        denoiser: a generative reference (or a mixture's control) whose mean of the data given x, ``x0^(x, t)``, the
            hidden layers see beside x: what a control towards a reward depends on most (its value is nearly a function
            of x0^). Inside a chain it costs nothing, since the step has called the model at x.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        control_shape: Sequence[int],
        span: tuple[float, float],
        architecture: Architecture,
        scales: Scales = Scales(),
        *,
        term: LangevinTerm | None = None,
        denoiser: Denoiser | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(torch.Size(event_shape), torch.Size(control_shape), *span)
        self.angles = scales.angles
        n, m = self.event_shape.numel() * (2 if scales.angles else 1), self.control_shape.numel()
        self.has_radial = architecture.radial_basis and n == m and n <= _MOST_RADIAL
        self.architecture = replace(
            architecture, langevin=term is not None, radial_basis=self.has_radial, denoised=denoiser is not None
        )
        self.term, self.denoiser, self.langevin_scale = term, denoiser, architecture.langevin_scale
        self.full = n <= _FULL_AFFINE and m <= _FULL_AFFINE
        self.centre = nn.Buffer(flat_or(scales.centre, torch.zeros(n)))
        self.spread = nn.Buffer(flat_or(scales.spread, torch.ones(n)))
        if denoiser is not None:
            self.seen_centre = nn.Buffer(torch.cat((self.centre, flat_or(scales.data_centre, torch.zeros(n)))))
            self.seen_spread = nn.Buffer(torch.cat((self.spread, flat_or(scales.data_spread, torch.ones(n)))))
        widths = ((n if denoiser is None else 2 * n) + architecture.condition_size, *architecture.hidden)
        self.weights = nn.ParameterList(uniform(b, a, generator) for a, b in pairwise(widths))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(b)) for b in widths[1:])
        self.time_weight = uniform(widths[1], FEATURES, generator)
        self.last = nn.Parameter(torch.zeros(m, widths[-1]))
        # the affine path: u += A(t) x + a(t), A(t) = sum_j features_j(t) A_j
        self.affine = nn.Parameter(torch.zeros(FEATURES, m, n) if self.full else torch.zeros(FEATURES, m))
        self.offset = nn.Parameter(torch.zeros(FEATURES, m))
        self.langevin = nn.Parameter(torch.zeros(FEATURES, m)) if term is not None else None
        self.radial = nn.Parameter(torch.zeros(FEATURES, m, _CENTRES)) if self.has_radial else None
        matrix, offset = (term.affine if term is not None and self.full else None) or (None, None)
        self.langevin_matrix: Tensor | None
        self.langevin_offset: Tensor | None
        self.register_buffer("langevin_matrix", matrix, persistent=False)
        self.register_buffer("langevin_offset", offset, persistent=False)
        self._level = None if term is None or matrix is None else term.level
        # whether the reward's gradient is asked for at every step
        self._uses_gradient = term is not None and term.sde is not None and matrix is None

    @classmethod
    def of(
        cls,
        problem: ControlProblem,
        architecture: Architecture,
        scales: Scales = Scales(),
        denoiser: Denoiser | None = None,
        seed: int = 0,
    ) -> DefaultControl:
        """The network of an architecture for a problem, in its dtype and on its device.

        Args:
            denoiser: default: the reference, where the architecture has one.
        """
        start = architecture.start
        scales = replace(scales, angles=problem.reference.angles and not start)
        network = cls(
            problem.event_shape,
            problem.event_shape if start else problem.control_shape,
            (-1.0, 0.0) if start else (0.0, problem.horizon),
            architecture,
            scales,
            term=LangevinTerm.of(problem) if architecture.langevin else None,
            denoiser=problem.reference if denoiser is None and architecture.denoised else denoiser,  # type: ignore[arg-type]
            generator=generator_for("cpu", seed, Place.CONTROL_WEIGHTS),
        )
        return network.to(device=problem.device, dtype=problem.dtype)

    @property
    def configuration(self) -> dict[str, Any]:
        return asdict(self.architecture)

    # ------------------------------------------------------------ pieces

    def _features(self, t: Tensor) -> Tensor:
        s = (t - self.first_time) / (self.last_time - self.first_time)
        return time_features(s.clamp(0.0, 1.0))

    def tables_at(self, t: Tensor) -> tuple[Tensor, ...]:
        """Everything that depends on time, at times ``(K,)``, with the normalisation of x folded in; the first table is
        the same at all times and has one row."""
        phi = self._features(t)
        inverse = 1 / self.spread
        if self.denoiser is None:
            first, centre = self.weights[0][:, : len(inverse)] * inverse, self.centre
        else:
            first, centre = self.weights[0][:, : 2 * len(inverse)] / self.seen_spread, self.seen_centre
        time_part = phi @ self.time_weight.mT + (self.biases[0] - first @ centre)
        affine = torch.einsum("kf,f...->k...", phi, self.affine) * inverse[: self.affine.shape[-1]]
        centre = affine @ self.centre if self.full else affine * self.centre[: affine.shape[1]]
        offset = phi @ self.offset - centre
        langevin = phi @ self.langevin * self.langevin_scale if self.langevin is not None else t.new_zeros(len(t), 1)
        langevin = langevin if self._level is None else langevin * self._level(t).unsqueeze(1)
        if self.langevin_matrix is not None and self.langevin_offset is not None and self.langevin is not None:
            affine = affine + langevin.unsqueeze(2) * self.langevin_matrix
            offset = offset + langevin * self.langevin_offset
        radial = torch.einsum("kf,fij->kij", phi, self.radial) if self.radial is not None else t.new_zeros(len(t), 1, 1)
        return first.unsqueeze(0), time_part, affine, offset, langevin, radial

    def tables(self, chain: Chain) -> tuple[Tensor, ...]:
        return self.tables_at(chain.times[:-1])

    def _flat(self, x: Tensor) -> Tensor:
        """The coordinates of x, flattened."""
        return seen_coordinates(x.flatten(x.ndim - len(self.event_shape)), self.angles)

    def _seen(self, x: Tensor, x0: Tensor | None) -> Tensor:
        """What the hidden layers see, flattened: x, and where there is a denoiser x0^."""
        dim = x.ndim - len(self.event_shape)
        return self._flat(x) if x0 is None else torch.cat((x.flatten(dim), x0.flatten(dim)), dim)

    def _denoised_along(self, chain: Chain, states: Tensor, y: Any, first: int = 0) -> Tensor | None:
        if self.denoiser is None:
            return None
        denoise = self.denoiser.denoiser_on_grid(chain.times)
        return torch.stack([denoise(first + k, x, y) for k, x in enumerate(states.unbind(0))])

    def _hidden(self, z: Tensor, y: Any) -> Tensor:
        """The last hidden layer, from what the first one makes of all but the condition."""
        if size := self.architecture.condition_size:
            z = z + self.architecture.condition(y, z.dtype) @ self.weights[0][:, -size:].mT
        z = torch.nn.functional.silu(z)
        for W, b in zip(list(self.weights)[1:], list(self.biases)[1:]):
            z = torch.nn.functional.silu(torch.nn.functional.linear(z, W, b))
        return z

    def _langevin_diffusion(self, times: Tensor) -> Callable[[int, Tensor], Tensor]:
        """``sigma(x, t_k)`` of the Langevin term at given times, faded."""
        assert self.term is not None and self.term.sde is not None
        diffusion = self.term.sde.diffusion_on_grid(times)
        if self.term.fade is None:
            return diffusion
        factors = [self.term.fade(t) for t in times.tolist()]
        return lambda k, x: diffusion(k, x) * factors[k]

    def _value(
        self, x: Tensor, tables: Sequence[Any], k: int, sigma: Tensor | None, y: Any, x0: Tensor | None = None
    ) -> Tensor:
        first, time_part, affine, offset, langevin, radial = (p[k if len(p) > 1 else 0] for p in tables)
        flat = self._flat(x)
        z = torch.addmm(time_part, self._seen(x, x0), first.mT)
        u = (
            torch.addmm(offset, flat, affine.mT)
            if self.full
            else torch.addcmul(offset, flat[:, : affine.shape[0]], affine)
        )
        u = torch.addmm(u, self._hidden(z, y), self.last.mT)
        if self.has_radial:
            u = u + (radial_basis((flat - self.centre) / self.spread) * radial).sum(-1)
        if sigma is not None and self.term is not None:
            gradient = self.term.gradient(x, y, torch.is_grad_enabled() and x.requires_grad)
            u = u + langevin * apply_scale_transposed(sigma, gradient, len(self.event_shape)).flatten(1)
        return u.unflatten(1, self.control_shape)

    @torch.no_grad()
    def follow(self, chain: Chain, feedback: AffineFeedback) -> None:
        """Let the affine path be nearest to a feedback, over the chain's steps."""
        gains, offsets = feedback.controls(chain)
        spread, centre = self.spread.double().cpu(), self.centre.double().cpu()
        wanted = torch.cat((gains * spread, (offsets + gains @ centre).unsqueeze(2)), 2)
        phi = self._features(chain.times[:-1]).double().cpu()
        found = torch.linalg.lstsq(phi, wanted.flatten(1), driver="gelsd", rcond=1e-10).solution
        found = found.unflatten(1, wanted.shape[1:]).to(self.offset)
        self.affine.copy_(found[..., :-1])
        self.offset.copy_(found[..., -1])

    # ------------------------------------------------------------ linear parameters

    def linear_parts(self) -> list[LinearPart]:
        return [NetworkLinearPart(self)] if self.full and not self.architecture.condition_size else []

    # ------------------------------------------------------------ Control

    def at(self, x: States, t: Tensor, y: Any = None) -> Controls:
        if t.ndim:
            return at_each_time(self.at, x, t, y)
        sigma = self._langevin_diffusion(t.reshape(1))(0, x) if self._uses_gradient else None
        x0 = None if self.denoiser is None else self.denoiser.denoised(x, t, y)
        return self._value(x, self.tables_at(t.reshape(1)), 0, sigma, y, x0)

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        tables = self.tables(chain) if tables is None or len(tables) == 0 else tables
        # one unbind: indexing step by step would cost K^2 in backward
        rows = [p.unbind(0) if isinstance(p, Tensor) else p for p in tables]
        diffusion = self._langevin_diffusion(chain.times) if self._uses_gradient else None
        denoise = self.denoiser.denoiser_on_grid(chain.times) if self.denoiser is not None else None

        def shift(k: int, x: States, y: Any) -> Noises:
            sigma = None if diffusion is None else diffusion(k, x)
            x0 = None if denoise is None else denoise(k, x, y)
            return chain.shift_at(k, x, self._value(x, rows, k, sigma, y, x0))

        return shift

    def along(self, chain: Chain, states: StatePaths, y: Any = None, first: int = 0) -> NoisePaths:
        W, *rest = self.tables(chain)
        time_part, affine, offset, langevin, radial = (p[first : first + len(states)] for p in rest)
        flat = self._flat(states)
        z = self._seen(states, self._denoised_along(chain, states, y, first)) @ W[0].mT + time_part.unsqueeze(1)
        if self.full:
            u = torch.baddbmm(offset.unsqueeze(1), flat, affine.mT)
        else:
            u = offset.unsqueeze(1) + flat[..., : affine.shape[1]] * affine.unsqueeze(1)
        u = u + self._hidden(z, y) @ self.last.mT
        if self.has_radial:
            u = u + (radial_basis((flat - self.centre) / self.spread) * radial.unsqueeze(1)).sum(-1)
        if self._uses_gradient:
            u = u + langevin.unsqueeze(1) * self._langevin_along(chain, states, y, first)
        return chain.shifts_at(range(first, first + len(states)), states, u.unflatten(2, self.control_shape), y)

    def _langevin_along(self, chain: Chain, states: Tensor, y: Any, first: int) -> Tensor:
        """``sigma^T grad r / alpha`` at stored states, flattened: one call of the reward for all of them."""
        assert self.term is not None
        if self.langevin_matrix is not None and self.langevin_offset is not None and self._level is not None:
            levels = self._level(chain.times)[first : first + len(states)]
            return (states.flatten(2) @ self.langevin_matrix.mT + self.langevin_offset) * levels.view(-1, 1, 1)
        many = None if y is None else y.repeat(len(states), *(1 for _ in y.shape[1:]))
        gradient = self.term.gradient(states.flatten(0, 1), many, torch.is_grad_enabled() and states.requires_grad)
        diffusion, ndim = self._langevin_diffusion(chain.times), len(self.event_shape)
        pairs = enumerate(zip(states, gradient.unflatten(0, states.shape[:2])))
        terms = [apply_scale_transposed(diffusion(first + k, x), g, ndim).flatten(1) for k, (x, g) in pairs]
        return torch.stack(terms)


class NetworkLinearPart(LinearPart):
    """The parameters in which a :class:`DefaultControl` is linear: affine path, last layer, and what belongs to one
    output alone (its function of one coordinate and its Langevin coefficients)."""

    def __init__(self, control: DefaultControl) -> None:
        self.control = control
        # a term that is affine in x, at a level that changes with time, is a function of its own
        self.langevin = control._uses_gradient or control._level is not None
        own = [p for p in (control.radial, control.langevin if self.langevin else None) if p is not None]
        self.own = bool(own)
        self.parameters = [control.offset, control.affine, control.last, *own]
        # a Langevin term that is folded into the affine path adds nothing to it
        self.redundant = [control.langevin] if control.langevin is not None and not self.langevin else []

    def features(self, chain: Chain, states: Tensor, y: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        control = self.control
        flat = control._flat(states)
        normal = (flat - control.centre) / control.spread
        W, time_part, *_ = control.tables(chain)
        seen = control._seen(states, control._denoised_along(chain, states, y))
        hidden = control._hidden(seen @ W[0].mT + time_part.unsqueeze(1), y)
        parts = [radial_basis(normal)] if control.has_radial else []
        if self.langevin:
            parts.append(control.langevin_scale * control._langevin_along(chain, states, y, 0).unsqueeze(3))
        own = torch.cat(parts, 3) if parts else None
        modulated = torch.cat((torch.ones_like(normal[..., :1]), normal), 2)
        return control._features(chain.times[:-1]), modulated, hidden, own

    @torch.no_grad()
    def gram(
        self,
        chain: Chain,
        states: Tensor,
        y: Any = None,
        weights: Tensor | None = None,
        step_weights: Tensor | None = None,
    ) -> Gram:
        return gram_of_features(chain, *self.features(chain, states, y), weights, step_weights)

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        offset, affine, last, *own = parts
        shared = torch.cat((offset.unsqueeze(2), affine), 2).permute(0, 2, 1).flatten(0, 1)  # (F (1 + n), m)
        shared = torch.cat((shared, last.mT))
        if not self.own:
            return shared
        mine = torch.cat([p if p.ndim == 3 else p.unsqueeze(2) for p in own], 2)  # (F, m, J)
        return torch.cat((shared, mine.permute(0, 2, 1).flatten(0, 1)))

    def scatter(self, values: Tensor) -> list[Tensor]:
        control = self.control
        m, n, h = control.last.shape[0], control.affine.shape[2], control.last.shape[1]
        size = FEATURES * (1 + n) + h
        shared = values[:size]
        first = shared[:-h].reshape(FEATURES, 1 + n, m).permute(0, 2, 1)
        out = [first[:, :, 0], first[:, :, 1:], shared[-h:].mT]
        if self.own:
            mine = values[size:].reshape(FEATURES, -1, m).permute(0, 2, 1)
            if control.has_radial:
                out.append(mine[..., :_CENTRES])
            if self.langevin:
                out.append(mine[..., -1])
        return out


def flat_or(given: Tensor | None, default: Tensor) -> Tensor:
    """A scale as networks keep it."""
    return default if given is None else given.detach().float().flatten()


def floored(spread: Tensor) -> Tensor:
    """Spreads of coordinates, those far below the largest lifted: what hardly moves is not blown up."""
    return spread.clamp(min=1e-3 * float(spread.max()) + 1e-12)


def uniform(rows: int, columns: int, generator: torch.Generator | None, unit: float = 1.0) -> nn.Parameter:
    """The weights of a layer that sees ``columns`` numbers of this size."""
    bound = 1 / (unit * math.sqrt(columns))
    return nn.Parameter((torch.rand(rows, columns, generator=generator) * 2 - 1) * bound)
