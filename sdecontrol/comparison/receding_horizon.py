"""``RecedingHorizon``: plan from where the system is, act, look again, plan again (model predictive control)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import AllRows, ShiftFunction, shift_function
from ..controls.bounded import check_bounds
from ..controls.given import ZeroControl, given_control
from ..evaluation.solution import Solution
from ..methods.base import Method, find_method
from ..methods.path_integral import PathIntegralGuidance
from ..paths.integrator import integrate
from ..paths.weights import effective_number, self_normalised
from ..problems.problem import ControlProblem, check_problem
from ..processes.modules import out_of_inference_mode
from ..randomness import Place, derive_seed, fresh_seed, generator_for
from ..shapes import Controls, Noises, States
from ..tensors import as_float, check_count
from ..training.solve import solve

_TRUST = 2.0  # nats


@dataclass(frozen=True)
class _Plan:
    """Shifts ``(steps, batch, *noise)`` that do not depend on the state, of the chain's steps from ``first`` on.

    Attributes:
        begun: when it was made, in steps of the system.
        log_w: log weights of the paths that made it, ``(batch, num_paths)``.
    """

    shifts: Tensor
    first: int
    begun: int
    log_w: Tensor | None = None

    def later(self, begun: int, steps: range) -> _Plan:
        """What is left of it when the system has come to ``begun``, for these steps: nothing where it did not reach."""
        left = self.shifts[begun - self.begun :][: len(steps)]
        missing = left.new_zeros(len(steps) - len(left), *self.shifts.shape[1:])
        return _Plan(torch.cat((left, missing)), steps.start, begun)


@dataclass(eq=False)
class RecedingHorizon:
    """Model predictive control of a system that goes on: at every decision a plan from the present state, of which
    the first steps are taken.

    With :class:`PathIntegralGuidance` a plan is a sequence of shifts, one for each state of the batch, that begins
    with what is left of the last one. ``num_paths`` paths are simulated with it, and with self-normalised weights
    ``w = exp(R/alpha) dQ0/dP^plan`` of these paths::

        c_k  <-  c_k + sum_i (w_i - b) xi_k^i

    which is ``E[xi_k + c_k]`` under the target path law from there, the open-loop sequence of the smallest
    ``KL(P* || P^plan)`` (Williams et al. 2017, "Model predictive path integral control"; the temperature is the
    problem's alpha, the effort weight ``alpha (sigma sigma^T)^{-1}``). A feedback law that was trained once, for many
    starts, is its ``proposal``; a plan is then what is added to it. Any other method solves the problem anew at every
    plan, from one state at a time and from no control: what a network has learned around one state misleads it
    around the next.

    A plan's end: with ``horizon=None`` every plan is the whole problem, from its time 0 on, begun at the present
    state: costs must not depend on when it is, and the problem's horizon is how far a plan looks. With a number the
    problem is one long task on its own clock, a plan covers ``[t, t + horizon]`` of it, no further than its end, and
    the reward is asked for where a plan ends.

    Args:
        problem: the model of the system, its costs and its temperature; where it starts does not matter.
        method: or its name.
        horizon: how far a plan looks, on the problem's clock; None: see above.
        replan: steps of the grid between two plans.
        rounds: updates of a plan at a decision, each with fresh paths.
        bounds: ``(low, high)``, numbers or tensors like a control: plans are projected to them, and their likelihoods
            are those of the projected shifts. The noise of the problem is not: where the system's input is bounded,
            clip it in the model, too.
        trust_region: the largest KL of the weights from equal ones, in nats; where it is exceeded weights are
            ``w^beta``, beta < 1, and the plan goes a part of the way. None: beta = 1.
        iterations: of a method that trains, at every plan.
        time_steps, scheme: as in ``solve``.
        seed: None draws one from torch's global generator. Each decision has noise of its own.

    Attributes:
        ess: ``(batch,)`` effective number of paths of the last plan's last round.
        log_z: ``(batch,)`` from these paths, ``log mean w``: alpha times it estimates the value at the state where the
            plan began, from below in the mean.
        model_steps: steps of the model that plans have simulated, counted per path.
        solution: of the last plan, where a method solved it.
    """

    problem: ControlProblem
    method: Method | str = field(default_factory=PathIntegralGuidance)
    horizon: float | None = None
    replan: int = 1
    rounds: int = 1
    bounds: tuple[Any, Any] | None = None
    trust_region: float | None = _TRUST
    iterations: int | None = None
    time_steps: Any = None
    scheme: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_problem(self.problem)
        self.method = find_method(self.method)
        check_count("replan", self.replan)
        check_count("rounds", self.rounds)
        check_count("iterations", self.iterations, optional=True)
        self.seed = fresh_seed(self.seed)
        self._chain = chain = self.problem.chain(self.time_steps, self.scheme)
        _check_chain(self.problem, chain)
        if self.trust_region is not None:
            self.trust_region = as_float("trust_region", self.trust_region, positive=True)
        if self.horizon is not None:
            self.horizon = as_float("horizon", self.horizon, positive=True)
        elif max(chain.step_sizes) - min(chain.step_sizes) > 1e-6 * max(chain.step_sizes):
            raise ValueError(
                "horizon=None moves a plan along the grid, whose steps must be equal; pass a number of steps."
            )
        self._bounds = None if self.bounds is None else check_bounds(self.bounds, chain)
        if isinstance(self.method, PathIntegralGuidance):
            self._proposal = given_control(self.problem, self.method.proposal)
            self._plans_alone = isinstance(self._proposal, ZeroControl)
            if self.iterations is not None:
                raise ValueError("iterations is for methods that train; plans of PathIntegralGuidance have rounds=.")
        else:
            self._check_trained()
        self.model_steps = self._rounds_done = 0
        self.reset()

    def _check_trained(self) -> None:
        changed = None if self.trust_region == _TRUST else self
        for name, given in (("horizon", self.horizon), ("bounds", self.bounds), ("trust_region", changed)):
            if given is not None:
                raise ValueError(
                    f"{name} is for plans of PathIntegralGuidance; {self.method} solves the whole problem."
                )
        if self.rounds != 1:
            raise ValueError("rounds is for plans of PathIntegralGuidance; other methods have iterations=.")

    def reset(self) -> None:
        """Forget the last plan: a new run of the system begins, at any time. Noise goes on as it would have."""
        self.ess: Tensor | None = None
        self.log_z: Tensor | None = None
        self.solution: Solution | None = None
        self._plan: _Plan | None = None
        self._began: float | None = None
        self._now = self._solved_at = 0

    def act(self, x: States, t: float, condition: Tensor | None = None) -> Controls:
        """``u (batch, *control_shape)`` at states x ``(batch, *event)`` and time t, the system's own.

        The first step of a plan that was made now, or a later one of the last plan. Times go forward by steps of the
        grid; after :meth:`reset` from anywhere.

        Raises:
            ValueError, TypeError: naming x, t or condition.
        """
        self._check(x, condition)
        now = self._steps_gone(as_float("t", t))
        with torch.no_grad(), out_of_inference_mode(), self.problem.evaluating():
            if not isinstance(self.method, PathIntegralGuidance):
                return self._by_solving(x, now, condition)
            plan = self._plan
            if plan is None or now - plan.begun >= min(self.replan, len(plan.shifts)):
                plan = self._plan = self._replanned(x, now, condition)
                assert plan.log_w is not None
                self.ess = effective_number(plan.log_w, 1)
                self.log_z = plan.log_w.logsumexp(1) - math.log(plan.log_w.shape[1])
            k = plan.first + now - plan.begun
            return self._chain.control(k, self._shift(plan, 1)(k, x, condition))

    # ---------------------------------------------------------------- time and arguments

    def _steps_gone(self, t: float) -> int:
        """Steps of the system until t: since the first decision, or on the problem's clock.

        Raises:
            ValueError: t is not on the grid, goes back, or is no time of the problem.
        """
        chain = self._chain
        if self.horizon is not None:
            if not chain.clock[0] <= t < chain.clock[-1]:
                raise ValueError(
                    f"t must be in [{chain.clock[0]:g}, {chain.clock[-1]:g}), the problem's time, got {t:g}."
                )
            now = chain.step_at(t)
        else:
            began, h = t if self._began is None else self._began, chain.step_sizes[0]
            now = round((t - began) / h)
            if abs((t - began) / h - now) > 1e-3:
                raise ValueError(
                    f"t must be a number of steps of {h:g} after {began:g}, the first decision's; got {t:g}."
                )
        if now < self._now:
            raise ValueError(f"t went back to {t:g}: call reset() where a new run of the system begins.")
        self._began, self._now = t if self._began is None else self._began, now
        return now

    def _check(self, x: Any, y: Any) -> None:
        problem = self.problem
        if not isinstance(x, Tensor):
            raise TypeError(
                f"x must be a tensor (batch, *event), got {type(x).__name__}; use torch.as_tensor(x)[None]."
            )
        if x.ndim == 0 or x.shape[1:] != problem.event_shape or not len(x):
            raise ValueError(
                f"x must have shape (batch, {', '.join(map(str, problem.event_shape))}), got {tuple(x.shape)}."
            )
        if x.dtype != problem.dtype:
            raise TypeError(f"x has dtype {x.dtype}, the problem {problem.dtype}; use x.to({problem.dtype}).")
        if x.device != problem.device:
            raise ValueError(f"x is on {x.device}, the problem on {problem.device}; use x.to({str(problem.device)!r}).")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"x is not finite in {int((~torch.isfinite(x.flatten(1)).all(1)).sum())} of {len(x)} rows."
            )
        problem.reference.check_states("x", x)
        if self._plan is not None and self._plan.shifts.shape[1] != len(x):
            raise ValueError(
                f"x has {len(x)} rows, the last plan {self._plan.shifts.shape[1]}: call reset() where others begin."
            )
        if (y is None) != (problem.condition is None) or (y is not None and len(y) != len(x)):
            raise ValueError(
                "condition must be given where the problem has one, with as many rows as x, and only there."
            )

    # ---------------------------------------------------------------- plans

    def _bounded(self, k: int, x: States, c: Noises, y: Any) -> Noises:
        if self._bounds is None:
            return c
        return self._chain.shift_at(k, x, self._chain.control(k, c).clamp(*self._bounds), y)

    def _shift(self, plan: _Plan, each: int) -> ShiftFunction:
        """The proposal's shift and the plan's for ``each`` paths from each state, within bounds."""
        chain, ahead = self._chain, shift_function(self._chain, self._proposal)
        planned = plan.shifts.repeat_interleave(each, 1).unbind()
        if self._plans_alone and not chain.reference.tangential:  # they are within bounds
            return lambda k, x, y: planned[k - plan.first]

        def shift(k: int, x: States, y: Any) -> Noises:
            return chain.tangent(x, self._bounded(k, x, ahead(k, x, y) + planned[k - plan.first], y))

        return shift

    def _replanned(self, x: States, now: int, condition: Any) -> _Plan:
        chain, method = self._chain, self.method
        assert isinstance(method, PathIntegralGuidance)
        first = 0 if self.horizon is None else now
        end = chain.steps
        if self.horizon is not None:
            end = min(end, chain.step_at(chain.clock[first] + self.horizon - 0.5 * chain.step_sizes[first]) + 1)
        steps = range(first, end)
        none = _Plan(chain.times.new_zeros(0, len(x), *chain.noise_shape), first, now)
        plan = (self._plan or none).later(now, steps)
        for _ in range(self.rounds):
            plan = self._updated(plan, steps, x, condition)
        return plan

    def _updated(self, plan: _Plan, steps: range, x: States, condition: Any) -> _Plan:
        """One round: the plan moved by the weighted mean of the noise of fresh paths."""
        chain, problem, method = self._chain, self.problem, self.method
        assert isinstance(method, PathIntegralGuidance)
        n = method.num_paths
        noise = self._noise(len(steps), len(x) * n, method.antithetic)
        drawn = dict(zip(steps, noise.unbind()))
        y = None if condition is None else condition.repeat_interleave(n, 0)
        f, begin = problem.running_cost_or_none, x.repeat_interleave(n, 0)
        options: dict[str, Any] = {"condition": y, "running_cost": f, "keep": "end", "steps": steps}
        paths = integrate(chain, begin, drawn, AllRows(self._shift(plan, n)), **options).towards(problem)
        log_w = paths.log_weights()
        w = self_normalised(log_w, n, self.trust_region).weights.unflatten(0, (-1, n)) / n
        centred = w - 1 / n if method.control_variate else w
        self.model_steps += len(begin) * len(steps)
        shifts = plan.shifts + torch.einsum("bn,kbn...->kb...", centred, noise.unflatten(1, (-1, n)))
        if self._plans_alone:  # else it would go on beyond a bound, and take as long to come back
            shifts = torch.stack([self._bounded(k, x, c, condition) for k, c in zip(steps, shifts)])
        return _Plan(shifts, plan.first, plan.begun, log_w.unflatten(0, (-1, n)))

    def _noise(self, steps: int, rows: int, antithetic: bool) -> Tensor:
        """``(steps, rows, *noise)``, a function of the seed and of how many rounds were before."""
        chain, assumed = self._chain, self.seed or 0
        generator = generator_for(chain.times.device, assumed, Place.RECEDING_HORIZON, self._rounds_done)
        self._rounds_done += 1
        shape = (steps, rows // 2 if antithetic else rows, *chain.noise_shape)
        z = torch.randn(shape, generator=generator, dtype=chain.times.dtype, device=chain.times.device)
        return torch.stack((z, -z), 2).flatten(1, 2) if antithetic else z

    def _by_solving(self, x: States, now: int, condition: Any) -> Controls:
        """The problem solved from the state by a method that trains; its control, until the next plan."""
        if len(x) != 1:
            raise ValueError(
                f"x has {len(x)} rows: {find_method(self.method).name} plans for one state at a time; use "
                "PathIntegralGuidance, or a RecedingHorizon for each."
            )
        last = self.solution
        if last is None or now - self._solved_at >= min(self.replan, self._chain.steps):
            options: dict[str, Any] = {"time_steps": self.time_steps, "scheme": self.scheme, "progress": False}
            options["iterations"] = self.iterations
            seed = derive_seed(self.seed or 0, Place.RECEDING_HORIZON_SOLVE, self._rounds_done)
            self._rounds_done += 1
            started = self.problem.started_at(x[0])
            self.solution = last = solve(started, self.method, seed=seed, **options)
            self._solved_at = now
        shift = shift_function(self._chain, last.control)
        k = now - self._solved_at
        return self._chain.control(k, shift(k, x, condition))


def _check_chain(problem: ControlProblem, chain: Chain) -> None:
    if not chain.of_noise or chain.reverse is not None:
        raise ValueError(
            f"problem: plans shift the noise of its steps, which a {type(problem.reference).__name__} has not."
        )
    if chain.start:
        raise ValueError("problem has a learned start, and a plan begins where the system is; make it of sc.Dirac(x0).")
