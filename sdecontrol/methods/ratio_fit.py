"""How a log density ratio is fitted: weighted logistic regression on rows, states of stored paths at some of their
steps. No gradient of the reward is asked for.

On paths of any control, with ``w`` the weight of what is still to come, ``E[w softplus(-f) + softplus(f)]``
is least at ``f = log E[w | x_t]``; with ``g = f - f_old`` and weights ``w exp(-f_old)`` that is the same minimum with
weights near 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..controls.ratio_value import RatioValue
from ..errors import warn
from ..memory import remembering
from ..paths.paths import Paths
from ..paths.weights import effective_number
from ..problems.simulate import simulate_chain
from ..randomness import Place, derive_seed, generator_for
from .base import Run

_HELD = 0.2  # of the paths: they choose, and are not fitted to
_NUMBERS = 1 << 26  # stored at most
#: steps of a path that are stored for values
ROWS = 16
_BATCH = 2048  # rows at most
_LOOKS = 6  # at the held-out rows
_AVERAGE = 0.99
_RATE = 3e-3  # of the logistic regression of a value
_NOISE = 0.3  # added to what the layers see, in standard deviations
_FLOOR = 100.0  # effective paths below which a higher temperature comes first


@dataclass
class Rows:
    """States of stored paths, ``(paths, steps stored)`` each.

    Attributes:
        seen: ``(..., seen)``, what the network sees. s: relative times.
        asked: where a student learns, view and r/alpha at x0^; ends: of a black box, what is seen of the paths' ends,
            and r/alpha there.
        gains, ratios: of what is still to come, the reward less running costs over alpha, and ``log dP^u/dQ0``.
    """

    seen: Tensor
    s: Tensor
    gains: Tensor
    ratios: Tensor
    asked: Tensor | None = None
    ends: tuple[Tensor, Tensor] | None = None

    @property
    def held(self) -> int:
        return max(1, round(_HELD * len(self.s)))


def to_come(paths: Paths) -> tuple[Tensor, Tensor]:
    """``gains`` and ``ratios`` of :class:`Rows` at all steps, ``(K, batch)``."""
    costs, ratios = (part.flip(0).cumsum(0).flip(0) for part in (paths.log_target(), paths.log_ratio(per_step=True)))
    return paths.reward / paths.alpha + costs, ratios


def drawn(run: Run, control: Any, n: int, number: int) -> Iterator[tuple[int, Paths]]:
    """About n paths in chunks, at least four: the ``number``-th ones of a run."""
    most = (1 << 24) // max(1, run.chain.steps * run.problem.event_shape.numel())
    size = max(64, min(1024, most, n // 4) // 64 * 64)
    for chunk in range(max(4, round(n / size))):
        seed = derive_seed(run.seed, Place.RATIO_PATHS, number, chunk)
        yield chunk, simulate_chain(run.problem, run.chain, size, control, seed=seed)


def steps_stored(run: Run, paths: Paths, draw: tuple[int, int], width: int, n: int) -> Tensor:
    """Which steps of each path are stored, ``(batch, S)``, in order; ``draw``: its number and the chunk's."""
    count = max(1, min(ROWS, run.chain.steps, _NUMBERS // max(1, n * width)))
    generator = generator_for("cpu", run.seed, Place.RATIO_ROWS, *draw)
    places = torch.rand(len(paths), run.chain.steps, generator=generator).argsort(1)[:, :count]
    return places.sort(1).values.to(paths.end.device)


# ---------------------------------------------------------------- values


def value_rows(run: Run, value: RatioValue, control: Any, n: int, number: int = 0) -> tuple[Rows, Tensor, list[Paths]]:
    """Rows of paths of a control (None: the reference), gains and ratios of whole paths ``(2, paths)``, and the paths
    without their steps."""
    see, ask, s = value.seeing(run.chain), value.asking(run.chain), value.relative(run.chain.times)
    learned = bool(value.layers.student) and not value.black_box
    parts: list[tuple[Tensor, ...]] = []
    kept: list[Paths] = []
    for chunk, paths in drawn(run, control, n, number):
        k = steps_stored(run, paths, (number, chunk), len(value.centre), n)
        (gains, ratios), x, y = to_come(paths), paths.states, paths.condition
        seen = x.new_zeros(*k.shape, len(value.centre))
        asked = x.new_zeros(*k.shape, len(value.target_centre) * learned)
        for step in range(run.chain.steps):
            rows, column = (k == step).nonzero(as_tuple=True)
            if len(rows):
                here, condition = x[step, rows], None if y is None else y[rows]
                with remembering():  # one call of the model for both
                    seen[rows, column] = see(step, here, condition)
                    if learned:
                        asked[rows, column] = ask(step, here, condition)
        index = torch.arange(len(k), device=k.device).unsqueeze(1)
        whole = torch.stack((gains[0], ratios[0]), 1)
        end = value.of_ends(paths.samples, y) if value.black_box else seen[:, 0]
        r = paths.reward.unsqueeze(1) / paths.alpha
        parts.append((seen, s[k], gains[k, index], ratios[k, index], asked, whole, end, r))
        kept.append(paths.without_steps())
    seen, times, gains, ratios, asked, whole, *ends = (torch.cat(part) for part in zip(*parts))
    clean = (ends[0], ends[1]) if value.black_box else None
    return Rows(seen, times, gains, ratios, asked if learned else None, clean), whole.mT, kept


def exponent_for(whole: Tensor, least: float, beta: float) -> float:
    """The largest exponent from ``beta`` to 1 with which so many paths are effective, of weights ``exp(beta gains -
    ratios)``; ``beta`` where that has not as many."""
    gains, ratios = whole.double()
    low, high = beta, 1.0
    if float(effective_number(gains - ratios)) >= least:
        return 1.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        enough = float(effective_number(middle * gains - ratios)) >= least
        low, high = (middle, high) if enough else (low, middle)
    return low


def weighted_exponent(run: Run, whole: Tensor, n: int, past: float) -> float:
    """The exponent, from ``past`` on, that gains and ratios of whole paths ``(2, paths)`` allow where n of them were
    asked for; with a warning where that is below 1."""
    beta = exponent_for(whole, min(_FLOOR, n / 16), past)
    if beta < 1:
        few, alpha = float(effective_number((whole[0] - whole[1]).double())), run.problem.alpha
        warn(
            f"of the weights of {whole.shape[1]} paths {few:.1f} are effective: the value is for temperature "
            f"{alpha / max(beta, 1e-12):.3g} so far, not {alpha:.3g}, and lowered in the next iterations."
        )
    return beta


def fit_values(run: Run, value: RatioValue, rows: Rows, beta: float, steps: int) -> tuple[float, float]:
    """Logistic regression of the whole network at temperature alpha/beta, kept where the held-out paths' loss is least.

    Returns:
        That loss before and after.
    """
    spread = _NOISE * value.spread

    def away(seen: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(seen), len(spread), generator=generator, dtype=torch.float32)
        return seen + noise.to(spread) * spread

    def beside(path: Tensor, column: Tensor) -> Tensor | float:
        if rows.ends is not None:
            return value.student_error(rows.ends[0][path], rows.ends[1][path])
        return 0.0 if rows.asked is None else value.student_error(rows.seen[path, column], rows.asked[path, column])

    hidden = len(value.last)

    def frozen() -> None:
        if value.slopes.grad is not None:
            # those of hidden features, and of the model's own, are for the second regression
            value.slopes.grad[:, :hidden] = 0.0
            value.slopes.grad[:, value.slopes.shape[1] - value.layers.inner :] = 0.0

    return logistic(run, value, value.ratio, float(value.level), rows, beta, (steps, _RATE), (away, beside, frozen))


def logistic(
    run: Run,
    value: nn.Module,
    ratio: Callable[[Tensor, Tensor], Tensor],
    level: float,
    rows: Rows,
    beta: float,
    how: tuple[int, float],
    more: tuple[Any, Any, Any] | None = None,
) -> tuple[float, float]:
    """Logistic regression of a log density ratio on stored rows at temperature alpha/beta.

    Args:
        ratio: ``(seen, s) -> f`` of a module, ``value``. how: its steps and their rate.
        more: ``(seen, generator) -> seen``, by which rows are perturbed; a loss beside it of the rows ``(path,
            column)``; what is done to the gradients.

    Returns:
        The held-out paths' loss before and after.
    """
    seen, s, held = rows.seen, rows.s, rows.held
    away, beside, adjust = more or (lambda x, _: x, lambda *_: 0.0, lambda: None)
    with torch.no_grad():
        f_old = torch.stack([ratio(seen[:, j], s[:, j]) for j in range(s.shape[1])], 1)
        weight = (beta * rows.gains - rows.ratios - level - f_old).clamp(max=30.0).exp()

    def loss(path: Tensor, column: Tensor, x: Tensor) -> Tensor:
        g = ratio(x, s[path, column]) - f_old[path, column]
        return (weight[path, column] * F.softplus(-g) + F.softplus(g)).mean()

    generator = generator_for("cpu", run.seed, Place.RATIO_BATCH, run.iteration)
    size = _batch_of(s)

    def batch() -> Tensor:
        path, column = _picked(generator, held, s, size)
        return loss(path, column, away(seen[path, column], generator)) + beside(path, column)

    every = torch.arange(held, device=s.device).repeat_interleave(s.shape[1])
    columns = torch.arange(s.shape[1], device=s.device).repeat(held)
    before, after = descend(value, batch, lambda: -float(loss(every, columns, seen[every, columns])), *how, adjust)
    return -before, -after


def descend(
    value: nn.Module,
    loss: Callable[[], Tensor],
    score: Callable[[], float],
    steps: int,
    rate: float,
    adjust: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Adam with a cosine decay on the network; the averaged parameters where their score is highest, those of the
    beginning among them.

    Returns:
        The score before and after.
    """
    parameters: list[Tensor] = list(value.parameters())
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99))
    average = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        first = score()
    best, kept = first, [p.detach().clone() for p in parameters]
    value.requires_grad_(True)
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (i + 1) / 30) * 0.5 * (1 + math.cos(math.pi * i / steps))
        with torch.enable_grad():
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
        adjust()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(_AVERAGE, (i + 1) / (i + 10)))
            if (i + 1) % max(1, steps // _LOOKS) == 0:
                now = [p.detach().clone() for p in parameters]
                _put(parameters, average)
                if (reached := score()) > best:
                    best, kept = reached, [p.clone() for p in average]
                _put(parameters, now)
    value.requires_grad_(False)
    _put(parameters, kept)
    for p in parameters:
        p.grad = None
    return first, best


@torch.no_grad()
def _put(parameters: list[Any], values: list[Tensor]) -> None:
    for p, new in zip(parameters, values):
        p.copy_(new)


def _batch_of(s: Tensor) -> int:
    return min(_BATCH, max(64, s.numel() // 32))


def _picked(generator: torch.Generator, held: int, s: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Paths and columns of n rows that are not held out."""
    path = torch.randint(held, len(s), (n,), generator=generator)
    return path.to(s.device), torch.randint(s.shape[1], (n,), generator=generator).to(s.device)
