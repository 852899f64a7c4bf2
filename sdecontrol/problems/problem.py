"""``ControlProblem``: a reference process, a start, a reward, a running cost and a temperature."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..chains.base import Chain
from ..chains.build import chain_of, make_grid
from ..chains.finite_start import FiniteStart, StartedTokens, tilts_starts
from ..chains.segments import LearnedStart, SegmentedChain
from ..chains.stopped import StoppedChain
from ..counting import count_reward
from ..errors import NonFiniteError, NotDifferentiable, RewardError, check_name, warn
from ..precision import at_least_single, call, full_precision
from ..processes.finite import StateSpace, probabilities
from ..processes.laws import Dirac, Gaussian, GaussianMixture, draw
from ..processes.modules import Definition, evaluating
from ..processes.reference import Reference
from ..processes.region import Region, as_region
from ..processes.sde import MEMORYLESS, check_memoryless
from ..randomness import Place, derive_seed, published_generator
from ..shapes import PerPath, Samples, Scalar, States
from ..tensors import (
    as_float,
    ask,
    check_count,
    check_not_random,
    check_output,
    check_recording,
    differ,
    nonfinite_rows,
    probing,
)
from .prompts import Prompts
from .rewards import Linear, Quadratic, QuadraticCost, WeightedRewards, modules_of

DEFAULT_TIME_STEPS = 100
#: what can be done about a reward of -inf
ZERO_WEIGHTS = (
    "Methods of weights take it as it is (tempered-smc, particle-matching, cross-entropy, smc, best-of-n, "
    "reward-weighted-mle); for others floor it (e.g. torch.clamp)."
)
STARTS = ("fixed", "controlled", "memoryless")
_PROBED = 64  # states at which a region is tried


def draw_conditions(condition: Any, n: int, seed: int) -> Any:
    """``n`` conditions, or None."""
    if condition is None:
        return None
    prompts = isinstance(condition, Prompts)
    found = draw(condition.rows if prompts else condition, n, derive_seed(seed, Place.CONDITION))
    return condition.embeddings[found] if prompts else found


def _warn_if_random(value: Tensor, again: Tensor) -> None:
    if differ(value, again):
        warn(
            "reward gave two values for the same states: it is random, even in evaluation mode. All estimates include "
            "its noise, log Z is that of E[exp(reward/alpha)] over it, no seed repeats a run, and its gradient is not "
            "compared with its values. Average over its noise inside it, or fix its seed.",
            UserWarning,
            stacklevel=5,
        )


class ControlProblem(Definition):
    """``max_u E_{P^u}[ r(X_T) - int f dt ] - alpha KL(P^u || Q0)``, which is ``min_u KL(P^u || Q_fine)``.

    Args:
        reference: an :class:`SDE`, :class:`LinearSDE`, :func:`generative_sde`, :func:`diffusion_chain` or
            :func:`masked_diffusion`.
        initial: law of X_0: ``Dirac``, ``Gaussian``, ``GaussianMixture`` or any torch distribution over states; None
            for the reference's own (generative references).
        reward: ``r(x) -> (batch,)`` (``r(x, y)`` with a condition), or None for 0. Any function of tensors, with a
            gradient or without; :class:`BlackBox` of others, :class:`WeightedRewards` of several. It may be -inf where
            paths are to have the weight 0 (an event, a payoff's logarithm): log Z is then that of what remains, and
            methods of weights take it as it is.
        running_cost: ``f(x, t) -> (batch,)`` with t a 0-d tensor (``f(x, t, y)`` with a condition), or None.
        alpha: temperature of the entropy (KL) cost, > 0.
        start: "fixed" (X_0 keeps its law), "controlled" (a learned start: time before 0 makes it part of the
            control; of a Gaussian law or a mixture of them, or of a law on the states of a process on one token),
            "memoryless" (fixed, and verified to have been forgotten at the end). Default for generative
            references: memoryless if they are, else controlled; fixed for all others.
        condition: what y is drawn from: a torch distribution, a tensor ``(N, ...)`` of values, or ``n -> (n, ...)``.
            Reward, running cost, drift, model and control are then all given y, as their last positional argument.
            Of :class:`Prompts` the reward gets strings, all others embeddings.
        reward_batch_size: call the reward on at most so many states at once.
        stop: where the process stops: a function ``x -> (batch,)`` of booleans, or a level function that is <= 0
            there, or a :class:`Region`. A path then ends at its first state inside, with its running costs and its
            log-ratio (``sum_{k < kappa}``), and its reward is that of the state in which it stopped, or of X_T where it
            never did. None: it never stops.

    Attributes:
        event_shape, control_shape, horizon: the reference's. dtype, device: of the states.
        origin: the law of the chain's first state: the point before a controlled start, else ``initial``.
        from_point: whether all paths leave from one point.
        random_start: whether the start is random and keeps its law, so that log Z differs from path to path.
        has_gradient: whether the reward has one, as far as its graph says; ``missing_gradients`` compares it with its
            values (``problems/differentiability.py``).

    Raises:
        ValueError, TypeError: each naming the argument, what was wrong with it, and what to do.
    """

    #: the unnormalised log density that a Gibbs problem is about, where it is and how wide and rough; None for all
    #: other problems
    density: Any = None
    #: whether the reward may be -inf, where paths have the weight 0
    zero_weights: bool = True
    #: whether it is, at some of the states it was tried at
    vanishes: bool = False
    centre: Any
    scale: Any
    roughness: float
    dim: int

    @full_precision()
    def __init__(
        self,
        reference: Reference,
        initial: Any = None,
        reward: Callable[..., Tensor] | None = None,
        running_cost: Callable[..., Tensor] | None = None,
        alpha: float = 1.0,
        start: str | None = None,
        condition: Any = None,
        reward_batch_size: int | None = None,
        stop: Callable[[Tensor], Tensor] | Region | None = None,
    ) -> None:
        check_recording("ControlProblem(...)")
        if not isinstance(reference, Reference):
            raise TypeError(
                "reference must be an SDE, LinearSDE, generative_sde(...), diffusion_chain(...), "
                f"masked_diffusion(...) or discrete_dynamics(...), got {type(reference).__name__}."
            )
        self.reference: Any = reference
        self.event_shape, self.horizon = reference.event_shape, reference.horizon
        self.alpha = as_float("alpha", alpha, positive=True)
        self.initial = self._check_initial(initial)
        sample = draw(self.initial, 1, 0)
        if (kind := reference.state_dtype) is not None and sample.dtype != kind:
            raise TypeError(f"initial gives states of dtype {sample.dtype}, the reference has states of dtype {kind}.")
        reference.check_states("initial", sample)
        own = sample.dtype if kind is None else reference.dtype or torch.get_default_dtype()
        self.dtype: torch.dtype = at_least_single(own)
        self.device = sample.device
        self._check_agreement("reference", reference.dtype, reference.device)
        check_count("reward_batch_size", reward_batch_size, optional=True)
        self.reward_function, self.running_cost_function = reward, running_cost
        self.reward_batch_size = reward_batch_size
        if isinstance(condition, (str, list, tuple)):
            raise TypeError(
                "condition must be a tensor (N, ...), a torch distribution or n -> (n, ...), got a "
                f"{type(condition).__name__}; of strings: sc.Prompts(texts, encoder), of numbers: torch.tensor(values)."
            )
        self.condition = condition
        self.start = self._choose_start(start)
        self.origin = Dirac(self._before(sample[0])) if self.start == "controlled" else self.initial
        self.from_point = isinstance(self.origin, Dirac)
        self.random_start = self.start == "fixed" and not self.from_point
        self.stop = as_region(stop)
        self._chains: dict[Any, Chain] = {}
        with self.evaluating():
            if self.stop is not None:
                self._probe_stop(self.stop)
            self._probe()
        self.control_shape: torch.Size = self.reference.control_shape

    # ---------------------------------------------------------------- checks

    def _check_initial(self, initial: Any) -> Any:
        initial = self.reference.own_initial if initial is None else initial
        if initial is None:
            raise TypeError(
                f"initial is missing: a {type(self.reference).__name__} has no start of its own. Pass "
                "initial=sc.Dirac(x0), sc.Gaussian(mean, cov), or any torch distribution."
            )
        if isinstance(initial, Tensor):
            raise TypeError("initial must be a law; for a fixed start pass sc.Dirac(x0).")
        if not isinstance(initial, Distribution):
            raise TypeError(
                f"initial must be sc.Dirac, sc.Gaussian or a torch distribution, got {type(initial).__name__}."
            )
        shape = torch.Size(initial.batch_shape) + torch.Size(initial.event_shape)
        if shape != self.reference.event_shape:
            raise ValueError(
                f"initial gives states of shape {tuple(shape)}, the reference has states of shape "
                f"{tuple(self.reference.event_shape)}."
            )
        return initial

    def _check_agreement(self, name: str, dtype: torch.dtype | None, device: torch.device | None) -> None:
        if dtype is not None and dtype != self.dtype:
            raise TypeError(
                f"{name} has dtype {dtype}, the initial law {self.dtype}; make them agree (e.g. x0.to({dtype}))."
            )
        if device is not None and device != self.device:
            raise ValueError(f"{name} is on {device}, the initial law on {self.device}; move one of them.")

    def _choose_start(self, start: str | None) -> str:
        if start is not None:
            check_name("start", start, STARTS)
        if isinstance(self.initial, Dirac) or (start is None and not self.reference.pretrained):
            return "fixed"
        if start is None:
            memory = self.memory
            start = "memoryless" if memory is not None and memory <= MEMORYLESS else "controlled"
        if start == "memoryless":
            check_memoryless(self.memory)
        if start == "controlled" and self.reference.state_dtype is not None:
            self._check_finite_start()
        elif start == "controlled" and not isinstance(self.initial, (Gaussian, GaussianMixture)):
            raise ValueError(
                f"start='controlled' needs a Gaussian (or Gaussian mixture) start, got "
                f"{type(self.initial).__name__}; pass initial=sc.Gaussian(mean, cov) or start='fixed'."
            )
        return start

    def _check_finite_start(self) -> None:
        """Raise unless a single step can draw X_0 from its law and a control tilt all of it."""
        if not tilts_starts(self.reference):
            raise ValueError(
                "start='controlled' of tokens tilts the start of a process on one token, whose control has a number "
                f"for each state; here a control has the shape {tuple(self.reference.control_shape)}. Pass the rates "
                "of a JumpProcess dense (rates.to_dense()), or start='fixed'."
            )
        probabilities(StateSpace(self.reference.values, (1,)), self.initial)

    def _before(self, state: Tensor) -> Tensor:
        """The point before a learned start: the mean, or of tokens any one, which the start does not depend on."""
        return self.initial.mean if self.reference.state_dtype is None else torch.zeros_like(state)

    @property
    def memory(self) -> float | None:
        """Correlation of X_0 and X_T under the reference (largest canonical one), or None where it is not known."""
        return self.reference.memory_from(self.initial)

    def _probe_stop(self, region: Region) -> None:
        if self.reference.pretrained or self.start == "controlled":
            what = "a pre-trained model" if self.reference.pretrained else "a learned start (start='controlled')"
            raise ValueError(f"stop goes with processes whose time is their own, and not with {what}; leave stop out.")
        region.probe(self.reference.probe_states(_PROBED, self.dtype, self.device))
        with torch.no_grad():
            inside = region.contains(draw(self.initial, 1 if self.from_point else _PROBED, 0), len(self.event_shape))
        if bool(inside.all()):
            where = "the start" if self.from_point else f"all of {_PROBED} starts drawn"
            raise ValueError(
                f"stop contains {where}: every path stops before its first step. A level function is <= 0 inside and "
                "> 0 outside, and booleans are True inside; has it the wrong sign?"
            )

    def _probe(self) -> None:
        rows = next(n for n in range(6, 64) if n not in self.event_shape)
        x, y = self.reference.probe_states(rows, self.dtype, self.device), self.draw_condition(rows, 0)
        if self.condition is not None and (not isinstance(y, Tensor) or y.ndim < 1 or y.shape[0] != rows):
            raise ValueError("condition must draw a tensor (n, ...) of n conditions.")
        self.reference.probe(self.dtype, self.device, y)
        t = torch.zeros((), dtype=self.dtype, device=self.device)
        with torch.no_grad():
            decoded = self.reference.decode(self.reference.probe_ends(x), y)
            if self.running_cost_function is not None:
                if not callable(self.running_cost_function):
                    raise TypeError(
                        "running_cost must be a function (x, t) -> (batch,) or None, got "
                        f"{type(self.running_cost_function).__name__}."
                    )
                more, alone = ("", "") if y is None else (", y", "x, t")
                with probing("running_cost", f"running_cost(x, t{more}), x {tuple(x.shape)}, t 0-d", alone, (x, t, y)):
                    cost, again = (self.running_cost(x, t, y) for _ in range(2))
                check_output("running_cost", cost, (rows,), t, "One number per row.")
                check_not_random("running_cost", cost, again)
        self.has_gradient = self._probe_reward(decoded, y)

    def _probe_reward(self, x: Tensor, y: Any) -> bool:
        """Check the reward's output, and find out whether it has a gradient."""
        if self.reward_function is None:
            return True
        if not callable(self.reward_function):
            raise TypeError(
                f"reward must be a function x -> (batch,) or None, got {type(self.reward_function).__name__}."
            )
        for name in ("G", "g"):
            part = getattr(self.reward_function, name, None)
            if isinstance(self.reward_function, (Quadratic, Linear)) and part is not None:
                self._check_agreement(f"reward.{name}", part.dtype, part.device)
                if part.shape[-len(self.event_shape) :] != self.event_shape:
                    raise ValueError(
                        f"reward.{name} has shape {tuple(part.shape)}, which does not fit states of shape "
                        f"{tuple(self.event_shape)}."
                    )
        smooth = x.is_floating_point()
        with torch.enable_grad():
            leaf = x.clone().requires_grad_(smooth)
            try:
                more, alone = ("", "") if y is None else (", y", "x")
                with probing("reward", f"reward(x{more}), x {tuple(x.shape)}", alone, (leaf, y)):
                    value = self._call_reward(leaf, y)
            except RuntimeError as error:
                if "requires grad" not in str(error) and "detach()" not in str(error):
                    raise
                with probing("reward", f"reward(x{more})", alone, (x, y)):  # a black box that leaves torch
                    value = self._call_reward(x, y)
            hint = "A reward gives one number per row, shape (batch,)."
            if not isinstance(value, Tensor):
                hint += " sc.BlackBox(function) takes functions of arrays, images or single samples."
            if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == 1:
                hint += " Use .squeeze(-1)."
            elif isinstance(value, Tensor) and value.ndim == 0:
                hint += " Do not average over the batch."
            check_output("reward", value, (x.shape[0],), self._number(x), hint)
            self.vanishes = bool((value == -torch.inf).any()) and bool((value < torch.inf).all())
            with torch.no_grad():
                _warn_if_random(value, self._call_reward(x, y))
            if not value.requires_grad or not smooth or self.vanishes:
                return False
            gradient = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0]
        return gradient is not None

    # ---------------------------------------------------------------- what the rest of the package asks

    def as_stated(self, samples: Samples) -> Any:
        """Samples in the form in which the problem was stated: as they are, but for densities of named or bounded
        parameters (:class:`GibbsProblem`)."""
        return samples

    def coordinates_of(self, samples: Any) -> Samples:
        """The states of samples in the form of :meth:`as_stated`."""
        return samples

    def at_temperature(self, alpha: float) -> ControlProblem:
        """The same problem with another alpha, on the same chains."""
        if alpha == self.alpha:
            return self
        other = copy.copy(self)
        other._chains = self._chains
        other.alpha = as_float("alpha", alpha, positive=True)
        return other

    def started_at(self, x: Tensor) -> ControlProblem:
        """The same problem from a point ``x (*event)``, on the same chains."""
        other = copy.copy(self)
        other.initial = other.origin = Dirac(x)
        other.start, other.from_point, other.random_start = "fixed", True, False
        other._chains = {} if self.start == "controlled" else self._chains
        return other

    def with_numbers(self) -> ControlProblem:
        """The same problem, on the same chains, whose reward must not be -inf."""
        other = copy.copy(self)
        other._chains, other.zero_weights = self._chains, False
        return other

    def chain(self, time_steps: Any = None, scheme: str | None = None) -> Chain:
        """The chain that simulates this problem: the reference's, after the learned start.

        Args:
            time_steps: number of steps (default 100; ``reference.default_grid``), or a grid of times from 0 to the
                horizon.
            scheme: "euler", "exact" or "exponential"; default: ``reference.default_scheme``.
        """
        reference: Any = self.reference
        key: Any = "own"
        if reference.continuous:
            time_steps = DEFAULT_TIME_STEPS if time_steps is None else time_steps
            scheme = reference.default_scheme if scheme is None else scheme
            counted = isinstance(time_steps, Integral) and not isinstance(time_steps, bool)
            key = (int(time_steps) if counted else tuple(make_grid(time_steps, reference)), scheme)
        elif time_steps is not None or scheme is not None:
            raise ValueError(
                f"time_steps and scheme do not apply: the reference is a chain with its own {reference.steps} steps."
            )
        key = key, self.dtype, self.device
        if key not in self._chains:
            main = chain_of(reference, time_steps, scheme or "own", self.dtype, self.device)
            main = main if self.stop is None else self._stopped(main, self.stop)
            if self.start == "controlled":
                main = self._started(main)
            self._chains[key] = main
        return self._chains[key]

    def _started(self, main: Chain) -> Chain:
        """After a learned start: of tokens in one step, of numbers in several."""
        if self.reference.state_dtype is not None:
            return StartedTokens(FiniteStart(self.initial, self.reference.values, self.dtype, self.device), main)
        return SegmentedChain(LearnedStart(self.initial, max(5, main.steps // 4), self.dtype, self.device), main)

    def _stopped(self, main: Chain, region: Region) -> Chain:
        chain = StoppedChain(main, region)
        if region.boundary_correction and self.from_point and bool(chain.inside(self.draw_start(1, 0)).any()):
            raise ValueError(
                f"boundary_correction: the start lies within the enlarged region of {main.steps} steps; use more "
                "time_steps."
            )
        return chain

    def draw_start(self, n: int, seed: int) -> States:
        """``n`` states to start the chain from: draws of ``initial``, or the point before a controlled start."""
        return at_least_single(draw(self.origin, n, derive_seed(seed, Place.START)))

    def draw_condition(self, n: int, seed: int) -> Any:
        """``n`` conditions, or None."""
        return draw_conditions(self.condition, n, seed)

    def _call_reward(self, x: Tensor, condition: Any) -> Tensor:
        return self._ask_reward(x, condition)[0]

    def _ask_reward(self, x: Tensor, condition: Any) -> tuple[Tensor, Tensor | None]:
        """The reward, and of several each without its weight, ``(batch, rewards)``."""
        function: Any = self.reward_function
        several = isinstance(function, WeightedRewards)
        found = ask("reward", function.parts if several else function, x, *self.for_reward(condition))
        value = function.total(found) if several else found
        count_reward(value, len(x))
        return value, found if several else None

    def for_reward(self, condition: Any) -> tuple[Any, ...]:
        """What the reward is given beside states: conditions, of :class:`Prompts` their strings; nothing without."""
        if isinstance(self.condition, Prompts) and condition is not None:
            condition = self.condition.texts_of(condition)
        return () if condition is None else (condition,)

    def reward(self, x: Samples, condition: Any = None) -> PerPath:
        """``r`` at decoded states, checked; in pieces of ``reward_batch_size``.

        Raises:
            NonFiniteError: with the number of rows. RewardError: of a :class:`BlackBox`, with the sample and the cause.
        """
        return self.rewards(x, condition)[0]

    @full_precision()
    def rewards(self, x: Samples, condition: Any = None) -> tuple[PerPath, Tensor | None]:
        """The same, and of :class:`WeightedRewards` each without its weight, ``(batch, rewards)``, detached; else
        None."""
        if self.reward_function is None:
            return self._with_graph("reward", x, self._number(x).new_zeros(x.shape[0])), None
        if not x.shape[0]:  # a function of the user's may not take an empty batch
            return self._number(x).new_zeros(0), None
        size = self.reward_batch_size or x.shape[0]
        pieces, parts = [], []
        for i in range(0, x.shape[0], size):
            y = None if condition is None else condition[i : i + size]
            try:
                piece, several = self._ask_reward(x[i : i + size], y)
            except RewardError as error:
                error.moved(i)
                raise
            pieces.append(
                check_output("reward", piece, (min(size, x.shape[0] - i),), self._number(x), "One number per row.")
            )
            parts.append(several if several is None else several.detach())
        value = self._with_graph("reward", x, pieces[0] if len(pieces) == 1 else torch.cat(pieces))
        if not bool(torch.isfinite(value).all()):
            self._check_reward(x, value)
        return value, None if parts[0] is None else torch.cat(parts)

    def _check_reward(self, x: Samples, value: PerPath) -> None:
        """Raise where a reward is nan or +inf, or -inf for a method that cannot take that."""
        rows, zero = nonfinite_rows(value), int((value == -torch.inf).sum())
        if rows == zero and self.zero_weights:
            return
        large = float(x.detach().abs().max())
        raise NonFiniteError(
            f"reward is not finite in {rows} of {len(value)} rows (largest |x|: {large:.3g}). "
            + (
                "It may be -inf where paths are to have the weight 0, but nothing else that is not finite."
                if rows > zero
                else f"It is -inf there, and this method needs numbers. {ZERO_WEIGHTS}"
            ),
            what="reward",
            rows=rows,
        )

    def _with_graph(self, name: str, x: Tensor, value: Tensor) -> Tensor:
        """A value that is the same in all rows has gradient 0; where rows differ, a value without a graph has none.

        Raises:
            NotDifferentiable: it was asked for with a gradient, and has none here.
        """
        if value.requires_grad or not (x.requires_grad and torch.is_grad_enabled()):
            return value
        if bool((value != value[:1]).any()):
            raise NotDifferentiable(
                f"{name} was asked for with its gradient, but returned a tensor without a graph whose rows differ. "
                "Write it in torch operations, or use a method without gradients (sc.recommend says which)."
            )
        return value + 0.0 * x.flatten(1).sum(1)

    def _number(self, x: Tensor) -> Tensor:
        """Of the dtype and on the device that functions of states x return numbers in."""
        return x if x.is_floating_point() else torch.zeros((), dtype=self.dtype, device=x.device)

    def running_cost(self, x: States, t: Scalar, condition: Any = None) -> PerPath:
        """``f(x, t)``."""
        f: Any = self.running_cost_function
        value = call(f, x, t) if condition is None else call(f, x, t, condition)
        return self._with_graph("running_cost", x, value)

    @property
    def running_cost_or_none(self) -> Callable[[States, Scalar, Any], PerPath] | None:
        f = self.running_cost_function
        return f if f is None or isinstance(f, QuadraticCost) else self.running_cost

    def modules(self) -> list[nn.Module]:
        """The user's modules: they leave every call with their gradients, modes and flags untouched."""
        own = [self.running_cost_function, None if self.stop is None else self.stop.function]
        others = [part for part in own if isinstance(part, nn.Module)]
        return [*self.reference.modules(), *modules_of(self.reward_function), *others]

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """The user's modules in evaluation mode (a reference with dropout would be no fixed law), restored
        afterwards."""
        return evaluating(self.modules())

    def fingerprint(self, former: bool = False) -> dict[str, Any]:
        """Plain facts and a few numbers by which a saved file recognises its problem.

        Args:
            former: with numbers as files of schema 2 have them, as far as they can be had: at states of torch's own
                seed, for problems without conditions, and without draws of the start.
        """
        with torch.no_grad(), self.evaluating():
            x, y = self.reference.probe_states(3, self.dtype, self.device, seed=1), self.draw_condition(3, 1)
            if former and x.is_floating_point():
                x = torch.randn(x.shape, generator=published_generator(1), dtype=torch.float64).to(x)
            t = torch.tensor(0.5 * self.horizon, dtype=self.dtype, device=self.device)
            numbers = self.reference.numbers(x, t, y)
            if self.reward_function is not None:
                ends = x if former else self.reference.probe_ends(x, seed=1)
                decoded = self.reference.decode(ends, y)
                first, again = self._call_reward(decoded, y), self._call_reward(decoded, y)
                if torch.equal(first, again):  # a random reward has no fingerprint
                    numbers["reward"] = first
            if self.running_cost_function is not None:
                numbers["running_cost"] = self.running_cost(x, t, y)
            if self.stop is not None:
                probes = self.reference.probe_states(16, self.dtype, self.device, seed=1)
                numbers["stop"] = self.stop.numbers(probes)
            numbers["initial"] = draw(self.initial, 2, 1)
            if former:
                known = y is None and x.is_floating_point()
                numbers = {name: v for name, v in numbers.items() if name != "initial"} if known else {}
        return {
            "reference": self.reference.describe(),
            "alpha": self.alpha,
            "start": self.start,
            "initial": type(self.initial).__name__,
            "conditional": self.condition is not None,
            "numbers": {name: v.detach().double().cpu().flatten()[:64].tolist() for name, v in numbers.items()},
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chains": {}}  # chains are made again where they are asked for

    def forget(self) -> None:
        self._chains = {}

    def __repr__(self) -> str:
        reward = getattr(self.reward_function, "__name__", type(self.reward_function).__name__)
        return (
            f"ControlProblem({type(self.reference).__name__}{tuple(self.event_shape)}, horizon={self.horizon:g}, "
            f"start={self.start!r}, reward={reward}, alpha={self.alpha:g})"
        )


def check_problem(problem: Any) -> None:
    """Raise TypeError unless it is one."""
    if not isinstance(problem, ControlProblem):
        raise TypeError(f"problem must be a ControlProblem, got {type(problem).__name__}.")
