"""``RatioValue``: v/alpha as a log density ratio, a network on what the reward sees of the denoised state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..chains.base import Chain
from ..problems.problem import ControlProblem
from ..problems.reward_view import InnerLayer, RewardView
from ..problems.simulate import simulate_chain
from ..randomness import Place, derive_seed, generator_for
from .guidance import LogValue, denoised_state, denoiser_on_chain
from .network import FEATURES, Layers, floored, layers_for, time_features
from .saved import VALUES, Context, Saved

_PILOT_PATHS = 256
_STILL = 0.2  # of the mean spread, added to all
_STUDENT = (96, 96)
_PIECES = 8  # of time, in each of which coefficients are linear
_LARGEST = 16384  # numbers in a state that the layers see whole


@dataclass(frozen=True)
class RatioLayers(Layers):
    """The layers of a :class:`RatioValue`.

    Attributes:
        state: whether they see x itself. denoised: whether they see x0^ beside it.
        view: size of the reward's view; reward: whether they see r/alpha.
        inner: how many numbers they see of what the model computes before its last layer.
        student: widths of a network that learns view and r/alpha from x0^, in place of calling the reward; (): none.
        knots: in relative time, of the hat functions by which what is linear in the last layer changes with time.
    """

    state: bool = True
    denoised: bool = False
    view: int = 0
    reward: bool = False
    inner: int = 0
    student: tuple[int, ...] = ()
    knots: tuple[float, ...] = (0.0, 1.0)


@VALUES.register("ratio")
class RatioValue(LogValue):
    """``v/alpha = level + f``, where ``f(x, t) = log E[w | x_t]`` of weights of mean 1 is a log density ratio.

    ``f = a(t) + b(t).phi``: phi are the last hidden layer, the reward's view of the denoised state x0^, r(x0^)/alpha,
    and what the model computes before its last layer; a and b are piecewise linear in time, and the layers see x, x0^,
    the view, r(x0^)/alpha and t. At the end ``f = r/alpha - level`` is among these functions. A linear or quadratic
    reward is asked; of any other a small network learns view and r from x0^ while f is fitted, so that sampling calls
    no reward; of a black box it learns r, at the ends of the paths alone. Where there is no denoiser x stands for x0^.
    It starts at the constant ``level``. States of more than 16384 numbers are seen through reward and model alone.
    """

    def __init__(self, problem: ControlProblem, chain: Chain, layers: RatioLayers, seed: int = 0) -> None:
        super().__init__()
        self._problem, self._chain, self.layers = problem, chain, layers
        self._view = RewardView(problem)
        self.unseen = self._view.hidden
        n, like = problem.event_shape.numel(), {"dtype": problem.dtype, "device": problem.device}
        self.first_time, self.last_time = chain.clock[0], chain.clock[-1]
        self._phi = layers.view + layers.reward
        own = layers.state * n + layers.denoised * n + layers.condition_size
        self._from = layers.state * n if layers.denoised else 0  # where what the student sees begins
        seen = (own if layers.student else own + self._phi) + layers.inner
        self._inner = InnerLayer.of(problem) if layers.inner else None
        self.centre, self.spread = nn.Buffer(torch.zeros(seen, **like)), nn.Buffer(torch.ones(seen, **like))
        self.knots = nn.Buffer(torch.tensor(layers.knots, **like))
        self.level = nn.Buffer(torch.zeros((), **like))
        self.target_centre = nn.Buffer(torch.zeros(self._phi, **like))  # of view and r/alpha, where they are learned
        self.target_spread = nn.Buffer(torch.ones(self._phi, **like))
        generator = generator_for("cpu", seed, Place.RATIO_WEIGHTS)
        widths = (own + self._phi + FEATURES, *layers.hidden)
        self.hidden = _layers(widths, generator).to(**like)  # type: ignore[arg-type]
        learned = (own - self._from, *layers.student, self._phi) if layers.student else ()
        self.student = _layers(learned, generator).to(**like)  # type: ignore[arg-type]
        self.last = nn.Parameter(torch.zeros(widths[-1], **like))
        self.constant = nn.Parameter(torch.zeros(len(layers.knots), **like))
        self.slopes = nn.Parameter(torch.zeros(len(layers.knots), widths[-1] + self._phi + layers.inner, **like))
        self.requires_grad_(False)  # but while it is fitted

    @classmethod
    def of(cls, problem: ControlProblem, chain: Chain, hidden: Sequence[int], seed: int) -> RatioValue:
        """The network for a problem, normalised by a few paths of the reference."""
        view, known, pretrained = RewardView(problem), layers_for(problem), problem.reference.pretrained
        small = problem.event_shape.numel() <= _LARGEST
        learned = small and problem.reward_function is not None and not view.simple
        inner = InnerLayer.of(problem) if pretrained else None
        span = chain.clock[-1] - chain.clock[0]
        places = sorted({round(i * chain.steps / _PIECES) for i in range(_PIECES + 1)})
        layers = RatioLayers(
            tuple(hidden),
            known.condition_size,
            known.classes,
            state=small,
            denoised=small and pretrained,
            view=view.size,
            reward=view.gradient or learned,
            inner=0 if inner is None else inner.size,
            student=_STUDENT if learned else (),
            knots=tuple((chain.clock[k] - chain.clock[0]) / span for k in places),
        )
        value = cls(problem, chain, layers, seed)
        pilot = simulate_chain(problem, chain, _PILOT_PATHS, seed=derive_seed(seed, Place.RATIO_PILOT))
        with torch.no_grad(), problem.evaluating():
            see = value.seeing(chain)
            found = torch.cat([see(k, x, pilot.condition) for k, x in enumerate(pilot.states[:-1])])
            value._normalise(found)
            if layers.student:
                found = pilot.reward.unsqueeze(1) / problem.alpha
                if view.gradient:
                    ask = value.asking(chain)
                    found = torch.cat([ask(k, x, pilot.condition) for k, x in enumerate(pilot.states[:-1])])
                value.target_centre.copy_(found.mean(0))
                value.target_spread.copy_(found.std(0) + 1e-6)
        return value

    def _normalise(self, found: Tensor) -> None:
        """From what is seen on a few paths: states and denoised states, coordinate by coordinate, and the view."""
        layers, n, begin = self.layers, self._problem.event_shape.numel(), 0
        for size, moves in (
            (layers.state * n, True),
            (layers.denoised * n, True),
            (layers.condition_size, False),
            (0 if layers.student else layers.view, True),
            (0 if layers.student else int(layers.reward), False),
            (layers.inner, True),
        ):
            block = slice(begin, begin + size)
            if size and moves:
                spread = found[:, block].std(0)
                self.centre[block] = found[:, block].mean(0)
                # what hardly moves says little, and would rule the gradient
                self.spread[block] = floored(spread + _STILL * spread.mean())
            begin += size

    @property
    def configuration(self) -> dict[str, Any]:
        return asdict(self.layers)

    @classmethod
    def from_saved(cls, saved: Saved, context: Context) -> RatioValue:
        return cls(context.problem, context.chain, saved.settings(RatioLayers))

    # ------------------------------------------------------------ what is seen

    def _see(self, x: Tensor, x0: Tensor, y: Any) -> Tensor:
        """What the layers see, as it is, ``(batch, seen)``."""
        parts = [x.flatten(1)] if self.layers.state else []
        parts += [x0.flatten(1)] if self.layers.denoised else []
        parts += [self.layers.condition(y, x.dtype)] if self.layers.condition_size else []
        return torch.cat(parts if self.layers.student else [*parts, self._asked(x0, y)], 1)

    def _asked(self, x0: Tensor, y: Any) -> Tensor:
        """The view and r/alpha, as the reward gives them, ``(batch, view + reward)``."""
        features, r = self._view(x0, y)
        return torch.cat((features, r.unsqueeze(1)), 1) if self.layers.reward else features

    def seeing(self, chain: Chain) -> Callable[[int, Tensor, Any], Tensor]:
        """``(k, x, y) -> (batch, seen)`` at step k of a chain; the model is called once for it and the step itself."""
        denoise = self._denoiser(chain)
        return lambda k, x, y: self._seen_by(lambda: denoise(k, x, y), x, y)

    def _seen_by(self, denoise: Callable[[], Tensor], x: Tensor, y: Any) -> Tensor:
        if self._inner is None:
            return self._see(x, denoise(), y)
        x0, inner = self._inner.watching(self._problem.reference.model, denoise)
        return torch.cat((self._see(x, x0, y), inner), 1)

    def asking(self, chain: Chain) -> Callable[[int, Tensor, Any], Tensor]:
        """The same of what the student learns."""
        denoise = self._denoiser(chain)
        return lambda k, x, y: self._asked(denoise(k, x, y), y)

    def _denoiser(self, chain: Chain) -> Callable[[int, Tensor, Any], Tensor]:
        return denoiser_on_chain(chain.reference, chain) if chain.reference.pretrained else lambda k, x, y: x

    # ------------------------------------------------------------ the function

    def relative(self, times: Tensor) -> Tensor:
        """Relative time, in [0, 1]."""
        return ((times - self.first_time) / (self.last_time - self.first_time)).clamp(0.0, 1.0)

    def hats(self, s: Tensor) -> Tensor:
        """Hat functions at the knots, ``(..., knots)``: of sum 1, piecewise linear in relative time."""
        gaps = self.knots.diff()
        rising = (s.unsqueeze(-1) - self.knots[:-1]) / gaps
        rising = rising.clamp(0.0, 1.0)
        one = torch.ones_like(rising[..., :1])
        return torch.cat((one, rising), -1) - torch.cat((rising, 0 * one), -1)

    def features(self, seen: Tensor, s: Tensor) -> Tensor:
        """phi ``(rows, J)``: the last hidden layer, the view and r/alpha, at relative times ``(rows,)``."""
        own = len(self.centre) - self.layers.inner
        normal, inner = ((seen - self.centre) / self.spread).split((own, self.layers.inner), 1)
        asked = normal[:, normal.shape[1] - self._phi :]
        if self.layers.student:
            asked = self.learned(normal)
            normal = torch.cat((normal, asked), 1)
            asked = torch.cat((asked[:, :-1], asked[:, -1:] * self.target_spread[-1] + self.target_centre[-1]), 1)
        hidden = torch.cat((normal, time_features(s).expand(len(seen), -1)), 1)
        for layer in self.hidden:
            hidden = nn.functional.silu(layer(hidden))
        return torch.cat((hidden, asked, inner), 1)

    def learned(self, normal: Tensor) -> Tensor:
        """What the student says of view and r/alpha, standardised."""
        out = normal[:, self._from :]
        for layer in list(self.student)[:-1]:
            out = nn.functional.silu(layer(out))
        return self.student[-1](out)

    @property
    def black_box(self) -> bool:
        """Whether the student learns r from the ends of paths alone: a black box is not asked elsewhere."""
        return bool(self.layers.student) and not self._view.gradient

    def of_ends(self, x: Tensor, y: Any) -> Tensor:
        """What is seen of clean states, with them in the place of x0^."""
        seen = self._see(x, x, y)
        return torch.cat((seen, seen.new_zeros(len(seen), self.layers.inner)), 1)

    def student_error(self, seen: Tensor, asked: Tensor) -> Tensor:
        """Mean square of what the student misses, in standard deviations."""
        out = self.learned(((seen - self.centre) / self.spread)[:, : len(self.centre) - self.layers.inner])
        return (out - (asked - self.target_centre) / self.target_spread).square().mean()

    def read(self, phi: Tensor, hats: Tensor) -> Tensor:
        """``f`` from the features and the hat functions, ``(rows,)``."""
        slopes = hats @ self.slopes
        slopes = torch.cat((slopes[..., : len(self.last)] + self.last, slopes[..., len(self.last) :]), -1)
        return (phi * slopes).sum(-1) + hats @ self.constant

    def ratio(self, seen: Tensor, s: Tensor) -> Tensor:
        """``f`` at relative times ``(rows,)``."""
        return self.read(self.features(seen, s), self.hats(s))

    def at(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        reference = self._problem.reference
        denoise = lambda: denoised_state(reference, self._chain, x, t, y) if reference.pretrained else x  # noqa: E731
        return self.ratio(self._seen_by(denoise, x, y), self.relative(t.to(x)).reshape(1)) + self.level

    def on_chain(self, chain: Chain) -> Callable[[int, Tensor, Any], Tensor]:
        see, s = self.seeing(chain), self.relative(chain.times)
        return lambda k, x, y: self.ratio(see(k, x, y), s[k : k + 1]) + self.level


def _layers(widths: Sequence[int], generator: torch.Generator) -> nn.ModuleList:
    made = [nn.Linear(a, b) for a, b in pairwise(widths)]
    with torch.no_grad():
        for layer in made:
            bound = layer.in_features**-0.5
            for p in (layer.weight, layer.bias):
                p.copy_(torch.rand(p.shape, generator=generator) * 2 * bound - bound)
    return nn.ModuleList(made)
