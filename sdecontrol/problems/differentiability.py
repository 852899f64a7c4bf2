"""Is what autograd says of a function its gradient? One probe for everything that carries gradients.

A function without a graph, or with a part of it cut off, makes a gradient method optimise something else without a
word. :func:`gradient_fault` finds out by values alone, at states of the process:

* **no graph**: the value requires no grad though it varies from state to state (numpy, ``.detach()``,
  ``torch.no_grad``). A value that is the same everywhere has the gradient 0, which is right.
* **another gradient**: the directional derivative of autograd against a central difference, in float64 where the
  function takes it. A difference across a kink (abs, relu, clamp) disagrees, but a kink lies within the step of a state
  with probability of order the step: 1e-5 of the states' spread (in float32 5e-4, 2e-3 and 8e-3, all of which must
  disagree: the longer for rounding's sake). Only a disagreement by 10 % at more than a quarter of the 16 states counts:
  if a kink is that near a state with probability 0.02, that is 1 false alarm in 100 000 probes.
* **a jump**: values that change more along a line than their gradient accounts for are bisected, 30 times in float64
  (12 in float32). A continuous function changes ever less, one that jumps by 0.1 % of its range (2 %) does not. Kinks
  do not do that, nor steep slopes: only what is steeper than 1e7 times its range over the states' spread (6e2).
  Or its values change along most of these lines where its gradient is 0.

Random functions have no difference to compare with: they are looked at for a graph alone.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..precision import own_precision
from ..processes.laws import draw
from ..randomness import Place, derive_seed, generator_for
from .problem import ControlProblem
from .rewards import takes_probabilities
from .simulate import simulate_chain

#: a function of states alone, ``(batch, *event) -> (batch, ...)``
Function = Callable[[Tensor], Tensor]

_ROWS, _PIECES = 16, 8  # states tried; pieces of the line from each to the next
_SHARE = 0.25  # of the states at which derivatives must disagree
_AGREE = 0.1  # relative, of derivatives

NO_GRAPH = "it returns a tensor without a graph for an input that requires one (numpy, .detach(), .item(), no_grad)"
CUT = "its gradient is not that of its values: finite differences disagree, so a part of it is cut off by .detach(), "
CUT += "no_grad or numpy, or stands for another"
TOKENS = "it is made of tokens, by which there are no derivatives"
STOPS = "a step over the boundary of the region ends a path, and how that depends on the control is not in its graph"
JUMPS = "its values jump (a comparison, rounding, sign), which no gradient sees"


def gradient_fault(function: Function, x: Tensor, *, values: bool = True) -> str | None:
    """What is wrong with the gradient of a function at states x ``(batch, *event)``, in a few words; None if nothing.

    Args:
        values: compare the gradient with values too (some 15 calls); else look for a graph alone (one).
    """
    with torch.inference_mode(False), torch.enable_grad(), own_precision() as halves:
        x = x.detach().clone()
        if not x.is_floating_point():
            return NO_GRAPH
        value, slope = _slope(function, x)
        if slope is None:
            return NO_GRAPH if _varies(value) else None
        if not values:
            return None
        wide = x.double()
        try:
            in_double = function(wide.clone())
            x = wide if in_double.dtype == torch.float64 else x
        except Exception:  # parameters in float32, say: then in the dtype that it does take
            pass
        if halves:
            return None  # differences of values of 8 or 11 bits say nothing
        with torch.no_grad():
            if not torch.equal(*(function(x.clone()).detach().nan_to_num() for _ in range(2))):
                return None
        return _compare(_Projected(function, x), x)


def _slope(function: Function, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The value, and its gradient by x: None where there is no graph from one to the other."""
    leaf = x.clone().requires_grad_(True)
    try:
        value = function(leaf * 1)  # no leaf: in-place changes are not this probe's business
    except RuntimeError as error:
        if "requires grad" not in str(error) and "detach()" not in str(error):
            raise
        return function(x.clone()), None  # .numpy() refuses tensors with a graph
    if not value.requires_grad:
        return value, None
    return value.detach(), torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0]


def _varies(value: Tensor) -> bool:
    return bool((value.detach().nan_to_num() != value.detach()[:1].nan_to_num()).any())


class _Projected:
    """One number a row, ``w . f(x)`` with random weights, and its gradient; rows that are not finite are 0."""

    def __init__(self, function: Function, x: Tensor) -> None:
        self.function, self.generator = function, generator_for("cpu", 0, Place.GRADIENT_DIRECTIONS)
        with torch.no_grad():
            shape = function(x.clone()).shape[1:]
        self.weights = torch.ones(shape) if not shape else self.normal(shape)
        self.weights = self.weights.to(x)

    def normal(self, shape: Any) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def value(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._number(x)

    def _number(self, x: Tensor) -> Tensor:
        return (self.function(x).to(x.dtype) * self.weights).reshape(len(x), -1).sum(1)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_(True)
        value = self._number(leaf * 1)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def _compare(f: _Projected, x: Tensor) -> str | None:
    double = x.dtype == torch.float64
    spread = x.std(0) if len(x) > 1 else torch.ones_like(x[0])
    spread = torch.where(spread > 1e-6 * x.abs().amax(0), spread, x.abs().amax(0).clamp(min=1.0) * 1e-2)
    along = spread * f.normal(x.shape).to(x)
    value, slope = f.both(x)
    told = (slope * along).flatten(1).sum(1)
    wrong = torch.isfinite(told) & bool((slope != 0).any())  # a slope of 0 everywhere is what jumps have
    good = int(wrong.sum())
    for step in (1e-5,) if double else (5e-4, 2e-3, 8e-3):
        seen = (f.value(x + step * along) - f.value(x - step * along)) / (2 * step)
        rounding = 10 * torch.finfo(x.dtype).eps * value.nan_to_num().abs().max() / step
        size = torch.maximum(seen.abs(), told.abs())
        wrong &= torch.isfinite(seen) & ((seen - told).abs() > _AGREE * size + rounding)
    if int(wrong.sum()) > _SHARE * max(1, good):
        return CUT
    return JUMPS if _jumps(f, x, value, slope, *((1e-3, 30) if double else (2e-2, 12))) else None


def _jumps(f: _Projected, x: Tensor, value: Tensor, slope: Tensor, least: float, halvings: int) -> bool:
    """Whether values jump on a line from one state to the next, by ``least`` of their range."""
    chord = (x.roll(-1, 0) - x) / _PIECES
    ends, values, slopes = [x], [value], [slope]
    for i in range(1, _PIECES + 1):
        at = x + i * chord
        value, slope = f.both(at)
        ends, values, slopes = [*ends, at], [*values, value], [*slopes, slope]
    v = torch.stack(values)
    finite = v.isfinite()
    if int(finite.sum()) < 2:
        return False
    span = float(v[finite].max() - v[finite].min())
    told = torch.stack([(0.5 * (a + b) * chord).flatten(1).sum(1) for a, b in pairwise(slopes)])
    change = v.diff(dim=0).nan_to_num(0.0, 0.0, 0.0)
    odd = (change - told).abs().nan_to_num(0.0, 0.0, 0.0)
    flat = (change != 0) & (told.abs() < 1e-3 * change.abs())
    if float(flat.double().mean()) > 0.5:  # steps too many and too small to be found one by one
        return True
    piece = odd.argmax(0)
    floor = max(least * span, 1e3 * torch.finfo(x.dtype).eps * float(v[finite].abs().max()))
    if not bool((odd.amax(0) > floor).any()):
        return False
    rows = torch.arange(len(x), device=x.device)
    a, b = torch.stack(ends)[piece, rows], torch.stack(ends)[piece + 1, rows]
    low, high = v[piece, rows], v[piece + 1, rows]
    for _ in range(halvings):
        middle = a + 0.5 * (b - a)
        here = f.value(middle)
        first = (here - low).abs() >= (high - here).abs()
        mask = first.reshape(-1, *(1,) * (x.ndim - 1))
        a, b = torch.where(mask, a, middle), torch.where(mask, middle, b)
        low, high = torch.where(first, low, here), torch.where(first, here, high)
    left = (high - low).abs()
    return bool((left[left.isfinite()] > floor).any())


# ---------------------------------------------------------------- of a problem

_known: WeakKeyDictionary[ControlProblem, dict[str, str]] = WeakKeyDictionary()  # functions do not change their kind


def missing_gradients(problem: ControlProblem) -> dict[str, str]:
    """What of a problem has no gradient, or another than its values have: name -> why, in a few words.

    Looked for once, when a method that needs gradients or ``recommend`` asks; empty where gradient methods see all.
    The functions are looked at one by one, and the reward together with the model that decodes the state for it.
    """
    if (found := _known.get(problem)) is None:
        found = {} if problem.reference.differentiable else {"step": NO_GRAPH}
        if problem.reference.state_dtype is not None:
            found = _known[problem] = {"state": TOKENS}
            return found
        if problem.stop is not None:
            found["stop"] = STOPS
        with problem.evaluating():
            for name, function, x, values in _functions(problem):
                if name not in found and (why := gradient_fault(function, x, values=values)) is not None:
                    found[name] = why
        _known[problem] = found
    return found


def missing_relaxations(problem: ControlProblem) -> dict[str, str]:
    """The same of a masked diffusion on relaxed tokens, their probabilities: name -> why."""
    reference, found = problem.reference, {}
    y = problem.draw_condition(_ROWS, 1)
    x = reference.probe_states(_ROWS, problem.dtype, problem.device, seed=1)
    near = torch.nn.functional.one_hot(x, reference.values).to(problem.dtype)
    z = 0.7 * near + 0.3 * near.roll(1, 0)
    with problem.evaluating():
        try:
            why = gradient_fault(lambda z: reference.predict(reference.model, z, 0.5, y), z, values=False)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            why = f"called with probabilities of tokens {tuple(z.shape)}, the mask's the last, it says: {error}"
        if why is not None:
            found["model"] = why
        if problem.running_cost_function is not None:
            found["running_cost"] = TOKENS
        if (r := problem.reward_function) is not None and not takes_probabilities(r):
            found["reward"] = (
                "it is a function of tokens (one of their probabilities is sc.OneHot(function, vocabulary))"
            )
        elif r is not None:
            ends = z[..., : reference.vocabulary]
            ends = ends + (1 - ends.sum(-1, keepdim=True)) / reference.vocabulary  # the mask's part, as any token
            if (why := gradient_fault(lambda z: r(z, *problem.for_reward(y)), ends)) is not None:
                found["reward"] = why
    return found


def _functions(problem: ControlProblem) -> Iterator[tuple[str, Function, Tensor, bool]]:
    """Name, function of the state, states, and whether to compare with values."""
    reference, density, rows = problem.reference, problem.density, _ROWS
    if problem.reward_batch_size is not None:
        rows = min(rows, problem.reward_batch_size)
    y = problem.draw_condition(_ROWS, 1)
    more = () if y is None else (y,)
    few = () if y is None else (y[:rows],)
    if density is not None:
        if density.score is None:  # what a user gives for the gradient is taken as it is
            x = draw(problem.terminal_law, rows, derive_seed(1, Place.GRADIENT_STATES))  # type: ignore[attr-defined]
            yield "log_density", lambda x: density(x, *few), x, True
        return
    states, onto = process_states(problem), reference.onto
    if reference.angles:  # every other row a turn away: between them lies the cut, where a function may jump
        turns = 2 * math.pi * (torch.arange(len(states[0][1])) % 2)
        states = [(t, x + turns.to(x).unsqueeze(1)) for t, x in states]
    for t, x in states[:-1]:
        for name, function in reference.differentiated(t).items():
            yield name, lambda x, f=function: f(x, *more), x, not reference.pretrained
        if (f := problem.running_cost_function) is not None:
            yield "running_cost", lambda x, f=f, t=t: f(onto(x), x.new_tensor(t), *more), x, True
    if (r := problem.reward_function) is not None:
        end, told = states[-1][1][:rows], problem.for_reward(few[0] if few else None)
        if not reference.decodes:
            yield "reward", lambda x: r(onto(x), *told), reference.decode(end, *few), True
        else:
            with torch.no_grad():
                data = reference.decode(end, *few)
            yield "reward", lambda x: r(x, *told), data, True
            yield "decode", lambda x: reference.decode(x, *few), end, False


def process_states(problem: ControlProblem) -> list[tuple[float, Tensor]]:
    """Times and states ``(16, *event)`` where the process goes without a control; the last is the end's."""
    reference, horizon = problem.reference, problem.horizon
    if reference.differentiable and not reference.pretrained:
        try:
            chain = problem.chain()
            states = simulate_chain(problem, chain, _ROWS, seed=1, keep="states").states
            steps = sorted({chain.start + round(part * (chain.main.steps - 1)) for part in (0.3, 0.7, 1.0)})
            return [*((chain.clock[k], states[k]) for k in steps), (chain.clock[-1], states[-1])]
        except NonFiniteError:  # too few steps for it, perhaps: not this probe's business
            pass
    x = reference.probe_states(_ROWS, problem.dtype, problem.device, seed=1)
    return [(0.3 * horizon, x), (0.7 * horizon, x), (horizon, x)]
