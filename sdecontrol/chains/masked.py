"""Masked (absorbing-state) diffusion of tokens as a chain: every step unmasks some positions, a model says by what.

Noising masks each token with probability ``1 - a(s)``, s the noising time. Backwards, in a step from s to ``s' < s``, a
masked position is unmasked with probability ``(a(s') - a(s))/(1 - a(s))``, its token drawn from the softmax of the
model's logits; unmasked ones stay (Austin et al. 2107.03006; Sahoo et al. 2406.07524; Shi et al. 2406.04329). All
positions are independent given the state: a floor remains that no control removes, O(h) (docs/mathematics.md, section
10). One position a step, in random order (Hoogeboom et al. 2110.02037), has none: the step is then a single categorical
variable.

A control tilts the tokens alone, ``p^u(v) ~ softmax(logits)_v exp(u_v)``: when a position is unmasked stays as it is,
so that the controlled process is the same sampler of another model, ``logits + u``. If the model's conditionals are
those of one joint law, no other tilt is better in continuous time, nor in random order.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, check_name
from ..memory import recall
from ..precision import at_least_single, dtype_of
from ..processes.adapters import as_reference
from ..processes.pretrained import ControlFunction, Model, Pretrained
from ..randomness import Place, generator_for
from ..shapes import (
    ControlPaths,
    Controls,
    NoisePaths,
    Noises,
    PerPath,
    PerStep,
    Scalar,
    StatePaths,
    States,
    TokensOrRelaxed,
)
from ..tensors import check_count, check_output, event_sum, nonfinite_rows
from .categorical import CategoricalChain, gumbel
from .transitions import single_transition

SCHEDULES = ("linear", "cosine")
ORDERS = ("independent", "random")
_HALVINGS = 60  # of [0, 1], where a schedule of the user's is inverted


class MaskSchedule:
    """``a(s)``, the probability that a token is not masked at noising time s: 1 at s = 0, 0 at s = 1, falling.

    Args:
        kind: "linear", ``1 - s``; "cosine", ``1 - cos((1 - s) pi/2)``, which unmasks few positions at first; or a
            function of a float64 tensor of times.

    Raises:
        ValueError: a function that does not fall from 1 to 0. TypeError: no function.
    """

    def __init__(self, kind: str | Callable[[Tensor], Tensor] = "linear") -> None:
        if isinstance(kind, str):
            check_name("schedule", kind, SCHEDULES)
        elif not callable(kind):
            raise TypeError(f"schedule must be one of {', '.join(SCHEDULES)} or a function s -> a(s), got {kind!r}.")
        self.kind = kind
        if callable(kind):
            self._check()

    def _check(self) -> None:
        s = torch.linspace(0, 1, 129, dtype=torch.float64)
        a = self.kept(s)
        if not isinstance(a, Tensor) or a.shape != s.shape or not bool(a.isfinite().all()):
            raise ValueError("schedule must give a finite number a(s) for each time of a float64 tensor.")
        if abs(float(a[0]) - 1) > 1e-6 or abs(float(a[-1])) > 1e-6 or bool((a.diff() >= 0).any()):
            raise ValueError(
                f"schedule must fall strictly from a(0) = 1 to a(1) = 0, the share of tokens that are not masked; it "
                f"goes from {float(a[0]):.6g} to {float(a[-1]):.6g}."
            )

    def kept(self, s: Tensor) -> Tensor:
        """``a(s)``."""
        if self.kind == "linear":
            return 1 - s
        if self.kind == "cosine":
            return 1 - torch.cos(0.5 * math.pi * (1 - s))
        return self.kind(s)  # type: ignore[operator]

    def time(self, kept: Tensor) -> Tensor:
        """The noising time at which so many are not masked: the inverse of :meth:`kept`, in float64."""
        if self.kind == "linear":
            return 1 - kept
        if self.kind == "cosine":
            return 1 - 2 / math.pi * torch.acos(1 - kept)
        low, high = torch.zeros_like(kept), torch.ones_like(kept)
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            above = self.kept(middle) > kept
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return 0.5 * (low + high)


class MaskedDiffusionChain(Pretrained, CategoricalChain):
    """The sampler of a masked diffusion model: tokens ``0 .. V-1``, and V, the mask. Made by :func:`masked_diffusion`.

    Attributes:
        vocabulary: V. mask: the mask token, V. values: V + 1.
        tokens: ``log softmax`` of the model's logits is asked for at every state, by ``prediction_at``.
        independent: whether positions are independent given the state; else one is unmasked a step.
    """

    keeps_tokens = True
    called = ("s", "int64 tokens with V the mask, s (batch,) the noising time, 1 at the start")

    def __init__(
        self,
        model: Model,
        shape: Sequence[int],
        vocabulary: int,
        steps: int,
        schedule: MaskSchedule,
        independent: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        start = torch.full(tuple(shape), vocabulary, dtype=torch.int64, device=device)
        super().__init__(self._law, steps, vocabulary + 1, start, dtype)
        self._laws: list[Any] = []  # under whose name a step's law is remembered, beside the logits it is made of
        self.model, self.vocabulary, self.mask = as_reference(model), vocabulary, vocabulary
        self.schedule_of_masks, self.independent = schedule, independent
        self.control_shape = self.memo_shape = torch.Size((*shape, vocabulary))
        times = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
        kept = schedule.kept(times).clamp(0.0, 1.0)
        kept[0], kept[-1] = 0.0, 1.0
        probs = (kept[1:] - kept[:-1]) / (1 - kept[:-1])
        #: probability that a masked position is unmasked in step k
        self.unmasked = probs.tolist()
        self._below = torch.special.ndtri(probs).tolist()  # standard normal numbers are, as often

    # ---------------------------------------------------------------- the step as a law

    def prediction_at(self, k: int, x: TokensOrRelaxed, condition: Any = None) -> Controls:
        """The pre-trained model's logits ``(batch, *shape, V)`` at step k: once a step, though control, step and KL
        ask for it."""
        return recall(self, k, x, lambda: self.predict(self.model, x, self.clock[k], condition))

    def predict(self, model: Model, x: TokensOrRelaxed, t: Tensor | float, condition: Any = None) -> Tensor:
        """A model's logits.

        Raises:
            NonFiniteError: where they are not finite: no state would show it, since some token is always the largest.
        """
        logits = super().predict(model, x, t, condition)
        if isinstance(logits, Tensor) and not bool(logits.isfinite().all()):
            k, rows = self.step_at(float(t)), nonfinite_rows(logits)
            raise NonFiniteError(
                f"logits of the model are not finite at step {k} of {self.steps} (s = {1 - float(t):.4g}), in {rows} "
                "rows. For tokens that must not occur give a large negative logit, such as -1e4.",
                what="logits",
                step=k,
                rows=rows,
            )
        return logits

    def letters(self, k: int, x: States, condition: Any = None) -> Controls:
        return self.prediction_at(k, x, condition).log_softmax(-1)

    def open(self, x: States) -> Tensor:
        return x == self.mask

    def valued_at(self, k: int) -> int:
        """In random order those that it leads to; else step k itself, where the other positions are still masked: what
        they become is not known yet, and how many of them are unmasked in the step is of order h."""
        return k if self.independent else k + 1

    def likely_ends(self, x: States, t: float, condition: Any, count: int) -> States:
        """Ends ``(count, batch, *shape)``, each masked position drawn by itself from what the model expects it to be:
        by the same Gumbel numbers for all states, so that they are a function of x."""
        logits = self.predict(self.model, x, t, condition)
        generator = generator_for("cpu", 0, Place.LIKELY_ENDS)
        noise = torch.randn((count, 1, *self.control_shape), generator=generator, dtype=torch.float64)
        drawn = (logits + gumbel(noise).to(logits)).argmax(-1)
        return torch.where(x == self.mask, drawn, x)

    def memo(self, k: int, x: States, condition: Any = None) -> Tensor | None:
        return self.prediction_at(k, x, condition)

    def log_probs(self, k: int, x: States, condition: Any = None) -> Noises:
        return recall(self._laws, k, x, lambda: self._law(k, x, condition))

    def _law(self, k: int, x: States, condition: Any = None) -> Noises:
        """``log p0`` of every value at every position; in random order its margins."""
        tokens = self.prediction_at(k, x, condition).log_softmax(-1)
        masked = (x == self.mask).unsqueeze(-1)
        if self.independent:
            q = tokens.new_tensor(self.unmasked[k])
        else:
            q = 1 / masked.flatten(1).sum(1).clamp(min=1).to(tokens)
            q = q.reshape(-1, *(1,) * (tokens.ndim - 1))
        stay = torch.log1p(-q).expand(*tokens.shape[:-1], 1)
        known = torch.zeros_like(stay).expand(*tokens.shape[:-1], self.values)
        known = known.masked_fill(torch.arange(self.values, device=x.device) != x.unsqueeze(-1), -math.inf)
        return torch.where(masked, torch.cat((tokens + q.log(), stay), -1), known)

    def step(self, k: int, x: States, xi: Noises, c: Noises | None = None, condition: Any = None) -> States:
        opened, V = self.opened(k, x == self.mask, xi), self.vocabulary
        tokens = self.prediction_at(k, x, condition)[opened].log_softmax(-1)
        if c is not None:
            tokens = tokens + self.checked(c, k)[opened][:, :V]
        after = x.clone()
        after[opened] = (tokens + gumbel(xi[opened][:, :V])).argmax(-1)
        return after

    def opened(self, k: int, masked: Tensor, xi: Noises) -> Tensor:
        """The positions ``(batch, *shape)`` that step k unmasks, of those that are masked, by noise of their own: no
        control enters it."""
        here = xi[..., self.vocabulary]
        if self.independent:
            return masked & (here < self._below[k])
        # the masked position of the largest noise: all are equally likely
        place = here.masked_fill(~masked, -math.inf).flatten(1).argmax(1, keepdim=True)
        return masked & torch.zeros_like(masked).flatten(1).scatter(1, place, True).unflatten(1, masked.shape[1:])

    def changing(self, k: int, x: States, xi: Noises) -> Tensor | None:
        return self.opened(k, x == self.mask, xi).flatten(1).any(1) if self.independent else None

    def changed(self, before: StatePaths, after: StatePaths) -> Tensor | None:
        return (before != after).flatten(2).any(2) if self.independent else None

    def path_kl(
        self,
        c: NoisePaths,
        before: StatePaths | Sequence[States] | None,
        after: StatePaths | Sequence[States],
        steps: Iterable[int],
        condition: Any = None,
    ) -> PerStep:
        """Where positions are unmasked by themselves, given those that the step unmasks."""
        if not self.independent:
            return self.kl(c, before, steps, condition)
        assert before is not None
        opened = torch.stack([x != then for x, then in zip(before, after)])
        logits = torch.stack([self.prediction_at(k, x, condition) for k, x in zip(steps, before)])
        c = c[..., : self.vocabulary]
        tilted = (logits.log_softmax(-1) + c).exp()
        kl = (tilted * c.where(tilted > 0, 0.0)).sum(-1)
        return event_sum(torch.where(opened, kl, 0.0), self.event_ndim)

    def shift_at(self, k: int, x: TokensOrRelaxed, u: Controls, condition: Any = None) -> Noises:
        tokens = self.prediction_at(k, x, condition).log_softmax(-1)
        return self._shift(x, u - (tokens + u).logsumexp(-1, keepdim=True))

    def shifts_at(self, steps: Sequence[int], states: StatePaths, u: ControlPaths, condition: Any = None) -> NoisePaths:
        logits = torch.stack([self.prediction_at(k, x, condition) for k, x in zip(steps, states)])
        return self._shift(states, u - (logits.log_softmax(-1) + u).logsumexp(-1, keepdim=True))

    def _shift(self, x: Tensor, c: Tensor) -> Tensor:
        """Log-ratios of tokens as shifts, of one step or several: 0 of the mask, and where a position is unmasked; x
        may be relaxed."""
        masked = x[..., self.mask :] > 0 if x.is_floating_point() else (x == self.mask).unsqueeze(-1)
        c = torch.where(masked, c, 0.0)
        return torch.nn.functional.pad(c, (0, 1))

    def control(self, k: int, c: Noises) -> Controls:
        return c[..., : self.vocabulary]

    def transition(self, k: int) -> Any:
        """As of every chain; in random order a masked position, all equally likely, and its token."""
        if self.independent:
            return super().transition(k)
        return single_transition(self.space, lambda x: self._law(k, x.to(self.times.device)))

    # ---------------------------------------------------------------- a pre-trained model

    def model_time(self, t: float, x: Tensor) -> Tensor:
        return torch.tensor(1.0 - t, dtype=self.dtype, device=x.device)

    def check_prediction(self, name: str, value: Any, x: States, hint: str = "") -> Tensor:
        return check_output(name, value, (len(x), *self.control_shape), self.times, hint)

    def denoised(self, x: States, t: Scalar | float, condition: Any = None, on_clock: bool = False) -> States:
        """The most likely token of each masked position by itself."""
        return self._most_likely(x, self.predict(self.model, x, t, condition))

    def denoiser_on_grid(self, times: Tensor, on_clock: bool = False) -> Callable[[int, States, Any], States]:
        return lambda k, x, y: self._most_likely(x, self.prediction_at(k, x, y))

    def _most_likely(self, x: States, logits: Tensor) -> States:
        return torch.where(x == self.mask, logits.argmax(-1), x)

    def control_towards(
        self, model: Model, x: States, t: Scalar, condition: Any = None, strength: float = 1.0
    ) -> Controls:
        k = self.step_at(float(t))
        return self.control(k, self.shifts_towards(model, self, strength)(k, x, condition))

    def shifts_towards(
        self, model: Model, chain: Any, strength: float | None = None, beside: bool = True
    ) -> Callable[[int, States, Any], Noises]:
        def shift(k: int, x: States, y: Any) -> Noises:
            logits = self.predict(model, x, self.clock[k], y)
            if not beside:
                return self._shift(x, logits.log_softmax(-1))
            own = self.prediction_at(k, x, y)
            if strength is None:
                return self._shift(x, logits.log_softmax(-1) - own.log_softmax(-1))
            return self.shift_at(k, x, strength * (logits - own), y)

        return shift

    def controlled(self, clock: Tensor) -> Tensor:
        return torch.ones_like(clock, dtype=torch.bool)

    def prediction_change(self, control: ControlFunction, x: States, clock: PerPath, condition: Any = None) -> Controls:
        return control(x, 1.0 - clock, condition)

    # ---------------------------------------------------------------- what a problem asks of a reference

    def probe_ends(self, x: States, seed: int = 0) -> States:
        generator = generator_for("cpu", seed, Place.PROBE_ENDS)
        return torch.randint(self.vocabulary, x.shape, generator=generator).to(x.device)

    def numbers(self, x: States, t: Scalar, condition: Any = None) -> dict[str, Tensor]:
        return {"logits": self.predict(self.model, x, t, condition)}

    def describe(self) -> dict[str, Any]:
        kind = self.schedule_of_masks.kind
        return {
            "kind": "MaskedDiffusionChain",
            "event_shape": list(self.event_shape),
            "vocabulary": self.vocabulary,
            "steps": self.steps,
            "schedule": kind if isinstance(kind, str) else "given",
            "independent": self.independent,
        }


def masked_diffusion(
    model: Model,
    length: int | Sequence[int],
    vocabulary: int,
    steps: int | None = None,
    schedule: str | Callable[[Tensor], Tensor] = "linear",
    order: str = "independent",
    dtype: torch.dtype | None = None,
) -> MaskedDiffusionChain:
    """A masked (absorbing-state) diffusion model with its own sampler, as a chain of categorical kernels.

    All paths begin with every position masked (``ControlProblem(..., initial=sc.Dirac(tokens))``: with some positions
    given, which stay as they are), and end without a mask. Rewards are functions of tokens ``(batch, *shape)`` int64.

    Args:
        model: ``model(x, s) -> logits (batch, *shape, V)`` with x ``(batch, *shape)`` int64 tokens, V the mask, and s
            ``(batch,)`` the noising time, 1 where generation starts and 0 = data; ``model(x, s, y)`` where the problem
            has a condition y. An nn.Module, or any function.
        length: of a sequence; or the shape of one state, such as ``(8, 8)``.
        vocabulary: V, the number of tokens beside the mask.
        steps: K, of equal length in s; model calls of a sample. None: as many as there are positions.
        schedule: ``a(s)``, the probability that a token is not masked at s: "linear" (1 - s), "cosine", or a function
            that falls from a(0) = 1 to a(1) = 0. What a model was trained with, if it uses s.
        order: "independent": in every step each masked position is unmasked by itself, several at once. "random": one
            position a step, in random order; ``steps`` is then the number of positions.
        dtype: of the logits, and of all else that is no token. None: the model's parameters', else torch's default.

    Raises:
        ValueError, TypeError: naming the argument; what the model returns is checked where a problem is made of it.
    """
    if not callable(model):
        raise TypeError(f"model must be an nn.Module or a function (x, s) -> logits, got {type(model).__name__}.")
    if not isinstance(length, (int, Sequence)) or isinstance(length, str):
        raise TypeError(f"length must be an int, or the shape of one state, got {length!r}.")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, that of the logits, got {dtype}; tokens are int64.")
    shape = (length,) if isinstance(length, int) else tuple(length)
    if not shape:
        raise ValueError("length must be the length of a sequence, or a shape of at least one dimension.")
    for n in shape:
        check_count("length", n)
    check_count("vocabulary", vocabulary, 2)
    check_count("steps", steps, optional=True)
    check_name("order", order, ORDERS)
    positions = math.prod(shape)
    if order == "random" and steps not in (None, positions):
        raise ValueError(
            f"steps: order='random' unmasks one position a step, and takes {positions} steps here; leave steps out."
        )
    if order == "random" and schedule != "linear":
        raise ValueError("schedule: order='random' unmasks one position a step whatever the schedule; leave it out.")
    own = dtype_of(model) if isinstance(model, nn.Module) else None
    like = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return MaskedDiffusionChain(
        model,
        shape,
        vocabulary,
        positions if steps is None else steps,
        MaskSchedule(schedule),
        order == "independent",
        at_least_single(dtype or own or torch.get_default_dtype()),
        torch.device("cpu") if like is None else like.device,
    )
