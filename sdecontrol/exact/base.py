"""``ExactSolution``: what every closed form offers, whatever it is made of."""

import bisect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..errors import NoExactSolution
from ..memory import Remembered
from ..problems.problem import ControlProblem
from ..processes.laws import Dirac, Gaussian, draw
from ..processes.linear import moments
from ..randomness import Place, derive_seed, fresh_seed
from ..shapes import Controls, PerPath, Scalar, States
from ..tensors import check_count


class ExactSolution:
    """The optimum of a control problem in closed form. Made by :func:`exact_solution`.

    Everything is computed in float64 on the CPU and returned in the problem's dtype and on its device.

    Attributes:
        problem: the :class:`ControlProblem`.
        settings: ``{"time_steps", "scheme"}`` of the chain it is exact for; empty in continuous time.
        chain: that chain, or None in continuous time.
        control: the optimal control, ``control(x, t) -> (batch, m)``; of a chain, the best mean-shift control. At times
            in [-1, 0) of a controlled start it is the learned start's control ``(batch, d)``, in coordinates
            ``dX = S^(1/2) dW``.
        log_z: ``log E_{Q0}[exp(R/alpha)]``, 0-d; the expectation includes the start, fixed or controlled.
        start_log_z: ``E_nu[v(X_0, 0)]/alpha``, the largest ELBO that a fixed start allows; log_z where the start is a
            point or controlled.
        elbo: ``J/alpha`` of ``control``; floor: ``start_log_z - elbo >= 0``, what no mean-shift control removes.
        initial: the law of X_0 under the optimum.
    """

    kind: str
    log_z: Scalar
    start_log_z: Scalar

    def __init__(self, problem: ControlProblem, settings: dict[str, Any], chain: Chain | None = None) -> None:
        self.problem, self.settings, self.chain = problem, settings, chain
        first = [-1.0, 0.0] if problem.start == "controlled" else [0.0]
        self._marks = list(chain.clock) if chain is not None else [*first, problem.horizon]
        self.control = ExactControl(self)

    # ---------------------------------------------------------------- what each closed form provides

    def _value_at(self, x: States, time: float) -> PerPath:
        """``v(x, time)`` for x ``(rows, d)`` in float64."""
        raise NotImplementedError

    def _control_at(self, x: States, time: float) -> Controls:
        """``u*(x, time)`` for x ``(rows, d)`` in float64."""
        raise NotImplementedError

    def _shift_function(self, chain: Chain) -> ShiftFunction:
        """The control's shifts on a chain, with all work on times done beforehand."""
        raise NotImplementedError

    def _kernel_at(self, x: Tensor, k: int) -> Any:
        """:meth:`kernel` of a chain, at x in float64."""
        raise NotImplementedError

    def marginal(self, t: float) -> Any:
        """The law of X_t under the optimum."""
        raise NotImplementedError

    def bridge(self, s: float, t: float, x_t: Tensor) -> Gaussian:
        """The law of X_s given ``X_t = x_t`` under the optimum, s < t; x_t ``(d,)`` or ``(batch, d)``."""
        raise NotImplementedError

    def kernel(self, x: Tensor, k: int) -> Any:
        """The law of ``x_{k+1}`` given ``x_k = x`` under the soft-optimal chain p*; x ``(d,)`` or ``(batch, d)``.

        Raises:
            NoExactSolution: in continuous time, which has no steps.
        """
        if self.chain is None:
            raise NoExactSolution(
                "kernel(x, k) is the law of one step of a chain; ask for exact_solution(problem, "
                "time_steps=K). In continuous time use control, marginal or bridge."
            )
        if not 0 <= k < self.chain.steps:
            raise ValueError(f"k must be a step from 0 to {self.chain.steps - 1}, got {k}.")
        return self._kernel_at(self._in("x", x), k)

    @property
    def initial(self) -> Any:
        return self.marginal(0.0) if self.problem.start == "controlled" else self.problem.initial

    @property
    def elbo(self) -> Scalar:
        return self.start_log_z  # in continuous time nothing is lost

    # ---------------------------------------------------------------- what all share

    def value(self, x: States, t: float | Tensor) -> PerPath:
        """``v(x, t) = alpha log E_{Q0}[exp((r - int_t f)/alpha) | X_t = x]``; of a chain, the soft value.

        Args:
            t: a float or a tensor of shape () or (batch,).
        """
        return self._by_time(x, t, self._value_at)

    def sample(self, n: int, seed: int | None = None) -> States:
        """``n`` exact draws of X_T under the optimum."""
        check_count("n", n)
        return draw(self.marginal(self.problem.horizon), n, derive_seed(fresh_seed(seed), Place.EXACT_SAMPLES))

    def weighted_sample(self, n: int, seed: int | None = None) -> tuple[States, PerPath]:
        """:meth:`sample` with its log importance weights, all 0: the draws are exact."""
        x = self.sample(n, seed)
        return x, x.new_zeros(n)

    def evaluate(self, n: int = 4096, seed: int | None = None) -> Any:
        """Simulate ``n`` paths with ``control`` and estimate what ``Solution.evaluate`` does, with the exact log Z
        beside.

        In continuous time the control is simulated with 100 steps, so the gap shows the discretisation.
        """
        from ..evaluation.evaluate import evaluate

        chain = self.chain if self.chain is not None else self.problem.chain(100)
        return evaluate(self.problem, self.control, chain, n, seed, known=self.known_values())

    def known_values(self) -> dict[str, Any]:
        """What ``evaluate`` compares with: "log_z", "start_log_z" (floats or None), "start_value"
        (``x_0 -> log Z(x_0)``)."""
        return {
            "log_z": self._known("log_z"),
            "start_log_z": self._known("start_log_z"),
            "start_value": lambda x: self.value(x, 0.0) / self.problem.alpha,
        }

    @property
    def floor(self) -> Scalar:
        """``start_log_z - elbo``, 0-d: the KL to the optimum that no mean-shift control removes."""
        return self.start_log_z - self.elbo

    def _known(self, name: str) -> float | None:
        try:
            return float(getattr(self, name))
        except NoExactSolution:
            return None

    def _first_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the first state, in float64.

        Raises:
            NoExactSolution: a start that is neither a point nor Gaussian.
        """
        law = self.problem.origin
        if not isinstance(law, (Dirac, Gaussian)):
            raise NoExactSolution(
                "what depends on the start (log_z, elbo, marginal(t), sample(n), ...) is not known for a "
                f"{type(law).__name__} start; use Dirac or Gaussian. (value and control are exact.)"
            )
        return moments(law)

    @staticmethod
    def _controlled_law(problem: ControlProblem) -> Gaussian:
        """The law that a controlled start reaches at time 0, where it must be Gaussian."""
        if not isinstance(problem.initial, Gaussian):
            raise NoExactSolution(
                f"initial: a controlled {type(problem.initial).__name__} start has no exact solution with a linear "
                "reference, nor on a grid in continuous time; use a Gaussian start."
            )
        return problem.initial

    def _state(self, time: float) -> int:
        """Index of the chain's state at a (snapped) time: on the grid, or the left end of the step that contains it."""
        return max(bisect.bisect_right(self._marks, time) - 1, 0)

    def _step_at(self, time: float) -> int:
        """The step that begins there; at the horizon, the last one."""
        return min(self._state(time), len(self._marks) - 2)

    def _out(self, value: Tensor) -> Tensor:
        return value.to(device=self.problem.device, dtype=self.problem.dtype)

    def _in(self, name: str, x: Tensor, ranks: tuple[int, ...] = (1, 2)) -> Tensor:
        """States in float64 on the CPU, checked."""
        d = self.problem.event_shape[0]
        if not isinstance(x, Tensor) or x.ndim not in ranks or x.shape[-1] != d or not x.is_floating_point():
            got = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a floating-point tensor of states (batch, {d}), got {got}.")
        return x.to(device="cpu", dtype=torch.float64)

    def _gaussian(self, mean: Tensor, cov: Tensor) -> Gaussian:
        return Gaussian(self._out(mean), self._out(0.5 * (cov + cov.mT)).expand(*mean.shape, mean.shape[-1]))

    def _snap(self, t: float, relative: float = 1e-9) -> float:
        """``t`` on the nearest marked time within ``relative`` of the time span; an error outside the span."""
        span = self._marks[-1] - self._marks[0]
        mark = min(self._marks, key=lambda m: abs(m - t))
        if abs(mark - t) <= relative * span:
            return mark
        if not self._marks[0] <= t <= self._marks[-1]:
            raise ValueError(f"t must be from {self._marks[0]:g} to {self._marks[-1]:g}, got {t:g}.")
        return t

    def _ordered(self, s: float, t: float) -> tuple[float, float]:
        """The two times of a bridge, checked."""
        s, t = self._snap(float(s)), self._snap(float(t))
        if not s < t:
            raise ValueError(
                f"bridge(s, t, x_t) is the law of X_s given a later X_t: it needs s < t, got {s:g}, {t:g}."
            )
        return s, t

    def _by_time(self, x: Tensor, t: float | Tensor, function: Callable[[Tensor, float], Tensor]) -> Tensor:
        """Apply ``function`` to the rows of each distinct time, and put the rows back in order."""
        states = self._in("x", x, ranks=(2,))
        time = torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, Tensor) else t.detach()
        # a float32 time off the grid by its rounding still means the grid
        relative = 1e-9 if time.dtype == torch.float64 else 2 * float(torch.finfo(time.dtype).eps)
        if time.ndim == 0:
            return self._out(function(states, self._snap(float(time), relative)))
        if time.shape != x.shape[:1]:
            raise ValueError(f"t must be a number or have shape () or ({x.shape[0]},), got {tuple(time.shape)}.")
        distinct, index = torch.unique(time.cpu().double(), return_inverse=True)
        rows = [(index == i).nonzero()[:, 0] for i in range(len(distinct))]
        parts = [function(states[r], self._snap(float(v), relative)) for r, v in zip(rows, distinct)]
        if len({part.shape[1:] for part in parts}) > 1:
            raise ValueError(
                "t mixes times before and after 0, where the controls have different shapes; ask separately."
            )
        return self._out(torch.cat(parts)[torch.cat(rows).argsort()])

    def __repr__(self) -> str:
        steps = (
            f"{self.chain.steps} steps, {self.settings['scheme']!r}" if self.chain is not None else "continuous time"
        )
        log_z = self._known("log_z")
        return (
            f"ExactSolution({self.kind}, {steps}, d={self.problem.event_shape[0]}, start={self.problem.start!r}, "
            f"log_z={'unknown' if log_z is None else format(log_z, '.6g')})"
        )


class ExactControl:
    """The control of an exact solution: ``control(x, t) -> (batch, m)``, t a float or a tensor of shape () or (batch,).

    Goes wherever a control goes, e.g. ``simulate(problem, n, control=exact.control)``; ``settings`` says on which
    chain.
    """

    def __init__(self, solution: ExactSolution) -> None:
        self._solution = solution
        self._shift_function = Remembered(solution._shift_function, 1)

    @property
    def settings(self) -> dict[str, Any]:
        return self._solution.settings

    def __call__(self, x: States, t: float | Tensor) -> Controls:
        return self._solution._by_time(x, t, self._solution._control_at)

    def on_chain(self, chain: Chain) -> ShiftFunction:
        """``(k, x, condition) -> c_k`` on a chain, its own or another of the same problem."""
        return self._shift_function(chain)

    def __repr__(self) -> str:
        return f"ExactControl(of {self._solution!r})"
