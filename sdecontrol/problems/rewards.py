"""Rewards ``r(x) -> (batch,)`` and running costs ``f(x, t) -> (batch,)`` with a structure that exact solutions know."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, RewardError
from ..precision import at_least_single, call
from ..processes.finite import check_tokens
from ..shapes import PerPath, PerStep, Samples, Scalar, StatePaths, States, Times
from ..tensors import as_float, check_count, check_output, check_tensor, symmetric
from .black_box import BlackBox


def _check_symmetric(name: str, matrix: Tensor) -> Tensor:
    check_tensor(name, matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name} must be a square (d, d) matrix, got shape {tuple(matrix.shape)}.")
    if not torch.allclose(matrix, matrix.mT, rtol=1e-5, atol=1e-6 * float(matrix.abs().max().clamp(min=1e-30))):
        raise ValueError(
            f"{name} must be symmetric; only its symmetric part enters x'{name}x, so pass ({name} + {name}.T)/2."
        )
    return at_least_single(symmetric(matrix))


class Quadratic:
    """``r(x) = -x'Gx/2 + g'x + c``. G symmetric ``(d, d)``, not necessarily positive; g ``(d,)`` or None for zero; c a
    finite number (0 if left out), which changes no optimum and adds ``c/alpha`` to log Z: with it r can be a
    log-likelihood."""

    def __init__(self, G: Tensor, g: Tensor | None = None, c: float = 0.0) -> None:
        self.G = _check_symmetric("G", G)
        none = G.new_zeros(G.shape[0])
        self.g = at_least_single(none if g is None else check_tensor("g", g, shape=(G.shape[0],)))
        if self.g.dtype != self.G.dtype:
            raise TypeError(f"g has dtype {self.g.dtype}, G has {self.G.dtype}; make them agree.")
        self.c = as_float("c", c)

    def __call__(self, x: Samples, y: Any = None) -> PerPath:  # whatever the condition
        return ((self.g - 0.5 * (x @ self.G)) * x).sum(-1) + self.c


class Linear:
    """``r(x) = g'x`` for vectors, or ``sum(g * x)`` for events of any shape."""

    def __init__(self, g: Tensor) -> None:
        self.g = at_least_single(check_tensor("g", g))
        if g.ndim == 0:
            raise ValueError("g must have the shape of a state; got a 0-d tensor.")

    def __call__(self, x: Samples, y: Any = None) -> PerPath:  # whatever the condition
        return (x * self.g).flatten(x.ndim - self.g.ndim).sum(-1)


class LogProb:
    """``r(x) = log p(label | x)`` of a classifier that returns logits ``(batch, classes)``.

    With alpha = 1 the tilted law is the conditional law p(x | label) (tutorial Section 8). With ``label=None`` the
    problem's condition is the label: ``r(x, y) = log p(y | x)``, y ``(batch,)`` integers.
    """

    def __init__(self, classifier: nn.Module | Callable[[Tensor], Tensor], label: int | None) -> None:
        if not callable(classifier):
            raise TypeError(
                f"classifier must be callable, x -> logits (batch, classes); got {type(classifier).__name__}."
            )
        self.classifier, self.label = classifier, label

    def __call__(self, x: Samples, y: Tensor | None = None) -> PerPath:
        logits = call(self.classifier, x)
        if logits.ndim != 2 or logits.shape[0] != x.shape[0]:
            raise ValueError(f"the classifier must return logits (batch, classes), got {tuple(logits.shape)}.")
        log_probs = logits.log_softmax(-1)
        if self.label is not None:
            if not 0 <= self.label < logits.shape[1]:
                raise ValueError(f"label {self.label} is not one of the classifier's {logits.shape[1]} classes.")
            return log_probs[:, self.label]
        if y is None:
            raise ValueError(
                "LogProb(label=None) needs the problem's condition: ControlProblem(..., condition=labels)."
            )
        if not isinstance(y, Tensor):
            raise TypeError(
                "LogProb(label=None) needs labels as the problem's condition, (batch,) integers; got a "
                f"{type(y).__name__}."
            )
        return log_probs.gather(1, y.long().reshape(-1, 1))[:, 0]


class OneHot(nn.Module):
    """A function of tokens that is written for their probabilities: ``function(z) -> (batch, ...)``, z
    ``(batch, *shape, V)`` floats, ``function(z, y)`` where it is given a condition.

    Called with int64 tokens it encodes them one-hot; called with probabilities it hands them on, and so has a gradient
    by them. It is how a reward of tokens says that :class:`RewardBackprop` may go through it: ``OneHot(reward, V)``, or
    ``LogProb(OneHot(classifier, V), label)``.

    Args:
        vocabulary: V. dtype: of the one-hot numbers; None: the function's parameters', else torch's default.

    Raises:
        TypeError, ValueError: no function, no count, or tokens out of range.
    """

    takes_probabilities = True

    def __init__(self, function: Callable[..., Tensor], vocabulary: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(f"function must be callable, probabilities -> numbers; got {type(function).__name__}.")
        check_count("vocabulary", vocabulary, 2)
        self.function, self.vocabulary, self.dtype = function, vocabulary, dtype

    def forward(self, x: Samples, y: Any = None) -> Tensor:
        if not x.is_floating_point():
            check_tokens("x", x, self.vocabulary)
            like = next(self.parameters(), None)
            own = torch.get_default_dtype() if like is None else at_least_single(like.dtype)
            x = nn.functional.one_hot(x, self.vocabulary).to(self.dtype or own)
        return call(self.function, x) if y is None else call(self.function, x, y)


class WeightedRewards:
    """``r(x) = sum_i w_i r_i(x)``, each reward reported by its name.

    The means of the ``r_i`` without their weights are in the history and in what trackers get as "reward/NAME", and in
    ``solution.evaluate().details``.

    Args:
        rewards: name -> ``(weight, reward)``, or the reward alone, of weight 1. Each is what a problem's reward may be:
            ``r(x) -> (batch,)`` (``r(x, y)`` with a condition), a module, a :class:`BlackBox`.

    Attributes:
        names, weights, rewards: in the order given.

    The sum has a gradient where each of them has one, or is the same in all rows: a gradient of some of them would be
    that of another reward.

    Raises:
        TypeError, ValueError: no rewards, or a weight or function that is none. NonFiniteError, RewardError: naming the
            reward.
    """

    def __init__(self, rewards: Mapping[str, Any]) -> None:
        if not isinstance(rewards, Mapping) or not rewards:
            raise TypeError("rewards must be a dictionary, name -> (weight, reward), with one reward at least.")
        pairs = {name: one if isinstance(one, (tuple, list)) else (1.0, one) for name, one in rewards.items()}
        for name, pair in pairs.items():
            if not isinstance(name, str):
                raise TypeError(f"rewards must have strings as names, got {name!r}.")
            if len(pair) != 2 or not callable(pair[1]):
                raise TypeError(f"rewards[{name!r}] must be (weight, reward) or a reward, x -> (batch,); got {pair!r}.")
        self.names = tuple(pairs)
        self.weights = tuple(as_float(f"the weight of reward {name!r}", weight) for name, (weight, _) in pairs.items())
        self.rewards: tuple[Callable[..., Tensor], ...] = tuple(reward for _, reward in pairs.values())

    def parts(self, x: Samples, *y: Any) -> Tensor:
        """Each reward without its weight, ``(batch, rewards)``."""
        found: list[Tensor] = []
        for name, reward in zip(self.names, self.rewards):
            try:
                value = call(reward, x, *y)
            except RewardError as error:
                error.name = name
                raise
            like = x if x.is_floating_point() else found[0] if found else value
            check_output(f"reward {name!r}", value, (len(x),), like, "A reward gives one number per row.")
            rows = int((value.isnan() | (value == torch.inf)).sum())
            if rows:  # -inf, a weight of 0, is for the problem to judge
                raise NonFiniteError(
                    f"reward {name!r} is nan or infinite in {rows} of {len(x)} rows. It must be a number wherever the "
                    "process can go; bound it (e.g. torch.clamp).",
                    what="reward",
                    rows=rows,
                )
            found.append(value)
        cut = any(not v.requires_grad and bool((v != v[:1]).any()) for v in found)
        stacked = torch.stack(found, 1)
        return stacked.detach() if cut else stacked

    def total(self, parts: Tensor) -> PerPath:
        """Their weighted sum, of :meth:`parts`."""
        return parts @ parts.new_tensor(self.weights)

    def __call__(self, x: Samples, *y: Any) -> PerPath:
        return self.total(self.parts(x, *y))

    def __repr__(self) -> str:
        terms = (f"{weight:g} {name}" for name, weight in zip(self.names, self.weights))
        return f"WeightedRewards({' + '.join(terms)})"


def modules_of(reward: Any) -> list[nn.Module]:
    """The modules that a reward is, or is made of."""
    if isinstance(reward, WeightedRewards):
        return [module for part in reward.rewards for module in modules_of(part)]
    inner = reward.function if isinstance(reward, BlackBox) else getattr(reward, "classifier", None)
    return [part for part in (reward, inner) if isinstance(part, nn.Module)]


def takes_probabilities(reward: Any) -> bool:
    """Whether a reward of tokens takes their probabilities too."""
    if isinstance(reward, WeightedRewards):
        return all(map(takes_probabilities, reward.rewards))
    return any(getattr(r, "takes_probabilities", False) for r in (reward, getattr(reward, "classifier", None)))


class QuadraticCost:
    """``f(x, t) = x'F(t)x/2``. F symmetric ``(d, d)``, or a function of time (0-d tensor) returning one."""

    def __init__(self, F: Tensor | Callable[[Tensor], Tensor]) -> None:
        self._F = F if callable(F) and not isinstance(F, Tensor) else _check_symmetric("F", F)  # type: ignore[arg-type]
        if not isinstance(self._F, Tensor):
            _check_symmetric("F(0)", self.F_at(torch.zeros((), dtype=torch.get_default_dtype())))

    def F_at(self, t: Any) -> Tensor:
        """``F(t)``, ``(d, d)``."""
        if isinstance(self._F, Tensor):
            return self._F
        value = self._F(t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64))
        return symmetric(value)

    def __call__(self, x: States, t: Scalar, y: Tensor | None = None) -> PerPath:
        return 0.5 * ((x @ self.F_at(t).to(x.dtype)) * x).sum(-1)

    def gradients(self, states: StatePaths, times: Times) -> StatePaths:
        """``F(t_k) x_k``."""
        if isinstance(self._F, Tensor):
            return states @ self._F.to(states.dtype)
        return states @ torch.stack([self.F_at(t).to(states.dtype) for t in times])

    def along(self, states: StatePaths, times: Times) -> PerStep:
        """``f(x_k, t_k)``."""
        return 0.5 * (self.gradients(states, times) * states).sum(-1)
