"""Pre-trained diffusion and flow models as SDEs: ``generative_sde``.

All parametrisations are linear in the state and in one another (docs/mathematics.md section 5). With
``x = mu x0 + std eps`` at noising time s, ``score = -eps / std``, the forward rate
``g_f^2 = 2 std (std' - (log mu)' std)``, and any noise level g, generation in ``ds -> -ds`` has the drift
``-(log mu)' x - (g_f^2 + g^2) / (2 std) eps`` (ordinary reversal: g = g_f). Process time runs over [0, 1] with
``s = noise_end (1 - t)``.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import check_name, unknown_name
from ..memory import Remembered, recall
from ..precision import at_least_single, full_precision
from ..tensors import as_float, batch_like
from .adapters import as_reference
from .laws import Gaussian, GaussianMixture
from .linear import LinearSDE
from .pretrained import ControlFunction, Model, Pretrained, call_model
from .schedules import Schedule
from .sde import SDE, StepFunction, check_memoryless

PREDICTIONS = ("noise", "sample", "score", "v", "velocity")
_S_MIN = 1e-5  # models are not trained at noising time 0, and predictions of noise are singular there


def noise_coefficients(
    prediction: str, mu: Tensor, std: Tensor, log_mu_slope: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor]:
    """``(a, b)`` with ``eps = a x + b prediction``, elementwise in the noising times (float64 tensors)."""
    zero = torch.zeros_like(mu)
    if prediction == "noise":
        return zero, zero + 1
    if prediction == "score":
        return zero, -std
    if prediction == "sample":
        return 1 / std, -mu / std
    if prediction == "v":  # v = mu eps - std x0 (Salimans & Ho 2202.00512)
        norm = mu**2 + std**2
        return std / norm, mu / norm
    if prediction == "velocity":  # of the probability flow towards the data: -(log mu)' x - rate/(2 std) eps
        return -2 * std * log_mu_slope / rate, -2 * std / rate
    raise unknown_name("prediction", prediction, PREDICTIONS)


class MixtureNoise(nn.Module):
    """The exact noise prediction of a Gaussian mixture under a schedule: ``(x, s) -> -std score``, whatever the
    condition. No parameters."""

    def __init__(self, mixture: GaussianMixture, schedule: Schedule) -> None:
        super().__init__()
        self.mixture, self.schedule = mixture, schedule
        self._noised = Remembered(self._noised_at, 1024)

    def _noised_at(self, clock: float) -> tuple[float, GaussianMixture]:
        s = self.schedule.noising_time(torch.tensor(clock, dtype=torch.float64))
        std = float(self.schedule.std(s))
        return std, self.mixture.noised(float(self.schedule.mu(s)), std)

    @full_precision()  # exact: no model of the user's
    def forward(self, x: Tensor, s: Tensor, y: Any = None) -> Tensor:
        if not len(x):
            return torch.zeros_like(x)
        if s.numel() > 1 and s.stride(0) and bool((s != s.reshape(-1)[0]).any()):
            return torch.stack([self(row[None], time[None])[0] for row, time in zip(x, s)])
        std, law = self._noised(float(s.reshape(-1)[0]))
        return -std * law.score(x)


def memory_of(schedule: Schedule, noise_level: Callable[[float], float]) -> float:
    """Correlation of ``X_0`` and ``X_T`` for standardised Gaussian data: the memory that the noise level leaves."""
    import numpy as np
    from scipy.integrate import quad

    def slope(s: float) -> float:  # of log X in generation time, for data N(0, 1)
        at = torch.tensor(s, dtype=torch.float64)
        variance = float(schedule.mu(at) ** 2 + schedule.std(at) ** 2)
        rate = float(schedule.forward_variance_rate(at))
        return -float(schedule.log_mu_slope(at)) - (rate + noise_level(s) ** 2) / (2 * variance)

    end = schedule.noise_end
    total = quad(slope, 0.0, end, limit=400, points=[1e-3 * end, 0.5 * end, 0.99 * end])[0]
    ends = torch.tensor([end, 0.0], dtype=torch.float64)
    start, last = (schedule.mu(ends) ** 2 + schedule.std(ends) ** 2).tolist()
    return float(np.exp(min(total, 50.0)) * math.sqrt(start / last))


class Coefficients(NamedTuple):
    """Of a generative SDE at given process times, ``(K,)`` float64: ``drift = -(log mu)' x + eps_part eps`` in process
    time, with ``eps = eps_of_x x + eps_of_prediction prediction``."""

    log_mu: Tensor  #: log mu
    std: Tensor  #: of the noise
    log_mu_slope: Tensor  #: d log mu / dt, in process time
    eps_part: Tensor  #: of the SDE's drift: ``-(g_f^2 + g^2) / (2 std)``
    flow_part: Tensor  #: of the probability flow's velocity: ``-g_f^2 / (2 std)``
    level: Tensor  #: g
    eps_of_x: Tensor
    eps_of_prediction: Tensor
    clock: Tensor  #: what the model calls these times
    mu: Tensor  #: exp(log mu)
    #: drift = drift_of_x x + drift_of_prediction prediction
    drift_of_x: Tensor
    drift_of_prediction: Tensor
    gain: Tensor  #: ``du / d prediction``: ``u = gain (tuned - pre-trained prediction)``
    clock_std: (
        Tensor  #: std at the time that the clock says: the same but for the rounding of a clock that runs backwards
    )


class GenerativeSDE(Pretrained, SDE):
    """The reverse-time SDE of a pre-trained model. Made by :func:`generative_sde`."""

    default_scheme = "exponential"

    def __init__(
        self,
        model: Callable[..., Tensor],
        schedule: Schedule,
        prediction: str,
        shape: Sequence[int],
        noise_level: Any,
        mixture: GaussianMixture | None,
    ) -> None:
        check_name("prediction", prediction, PREDICTIONS)
        self.model, self.schedule, self.prediction, self.mixture = as_reference(model), schedule, prediction, mixture
        self.event_shape = torch.Size(int(n) for n in shape)
        self.control_shape = self.event_shape
        self.horizon = 1.0
        self._remembered, self._on_grids = Remembered(self._at, 4096), Remembered(self._coefficients, 8)
        if isinstance(noise_level, str) and noise_level not in ("reverse", "memoryless"):
            raise unknown_name("noise_level", noise_level, ("reverse", "memoryless"))
        if not isinstance(noise_level, str) and not callable(noise_level):
            noise_level = as_float("noise_level", noise_level, positive=True)
        self.noise_level = noise_level
        #: the process is the exact time reversal of the noising (then and only then exact bridges are the noising's)
        self.reversal = isinstance(noise_level, str)
        self.memory = memory_of(schedule, self._level)
        parameter = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
        like = mixture.means if mixture is not None else parameter
        self.dtype = at_least_single(like.dtype if like is not None else torch.get_default_dtype())
        self.device = like.device if like is not None else torch.device("cpu")
        zero = torch.zeros(self.event_shape, dtype=self.dtype, device=self.device)
        self.own_initial = Gaussian(zero, schedule.start_std() ** 2)
        if mixture is not None:
            start = self.marginal(0.0)
            self.own_initial = Gaussian(start.means[0], start.covariances[0]) if len(start.means) == 1 else start

    def _level(self, s: float) -> float:
        """The noise level at noising time s, per unit of noising time."""
        at = torch.tensor(s, dtype=torch.float64)
        if self.reversal:
            return math.sqrt(max(float(self.schedule.forward_variance_rate(at)), 0.0))
        if not callable(self.noise_level):
            return float(self.noise_level) / math.sqrt(self.schedule.noise_end)
        value = float(self.noise_level(torch.tensor(self.process_time(s), dtype=torch.float64)))  # pyright: ignore[reportArgumentType]
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"noise_level must be finite and > 0 at every time, got {value} at t={self.process_time(s):.4g}."
            )
        return value / math.sqrt(self.schedule.noise_end)

    def process_time(self, s: float | Tensor) -> Any:
        """Process time t of noising time s."""
        return 1.0 - s / self.schedule.noise_end

    def noising_time(self, t: float | Tensor) -> Any:
        """Noising time s of process time t."""
        return self.schedule.noise_end * (1.0 - t)

    def default_grid(self, steps: int) -> list[float]:
        """Equal steps in the cube root of ``log(1 + sigma^2)``, sigma the ratio of noise to data at a time.

        ``log(1 + sigma^2)/2`` is what one coordinate of the state still hides of data of unit variance, in nats: the
        steps are finest where sigma is of the order of 1 and end near ``K^(-3/2)``. The levels do not depend on the
        schedule; under the usual linear VP they are those of ``s = (1 - t)^1.5``. Chosen by measurement, with the
        exponential scheme (docs/tables/grids.md).
        """
        end = self.schedule.noise_end
        ends = self._hidden(torch.tensor([end, _S_MIN], dtype=torch.float64)) ** (1 / 3)
        levels = (ends[0] + (ends[1] - ends[0]) * torch.arange(1, steps, dtype=torch.float64) / steps) ** 3
        low, high = torch.full_like(levels, _S_MIN), torch.full_like(levels, end)
        for _ in range(60):  # by bisection: schedules are monotone, and may be a user's own
            middle = (low + high) / 2
            above = self._hidden(middle) > levels
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return [0.0, *self.process_time((low + high) / 2).tolist(), self.horizon]

    def _hidden(self, s: Tensor) -> Tensor:
        """``log(1 + (std/mu)^2)`` at noising times."""
        return torch.log1p((self.schedule.std(s) / self.schedule.mu(s)) ** 2)

    def coefficients(self, times: Tensor) -> Coefficients:
        """All coefficients at process times ``(K,)``, in float64; remembered, since every iteration asks."""
        return self._on_grids(tuple(times.detach().double().tolist()))

    def _coefficients(self, times: tuple[float, ...]) -> Coefficients:
        s = self.noising_time(torch.tensor(times, dtype=torch.float64)).clamp(min=_S_MIN)
        end = self.schedule.noise_end
        mu, std = self.schedule.mu(s), self.schedule.std(s)
        slope, rate = self.schedule.log_mu_slope(s), self.schedule.forward_variance_rate(s)
        level = torch.tensor([self._level(float(v)) for v in s], dtype=torch.float64)
        a, b = noise_coefficients(self.prediction, mu, std, slope, rate)
        log_mu, eps_part, level = mu.log(), -end * (rate + level**2) / (2 * std), level * math.sqrt(end)
        of_prediction, mu = eps_part * b, log_mu.exp()
        return Coefficients(
            log_mu=log_mu,
            std=std,
            log_mu_slope=-end * slope,
            eps_part=eps_part,
            flow_part=-end * rate / (2 * std),
            level=level,
            eps_of_x=a,
            eps_of_prediction=b,
            clock=self.schedule.model_time(s),
            mu=mu,
            drift_of_x=-end * slope + eps_part * a,
            drift_of_prediction=of_prediction,
            gain=of_prediction / level,
            clock_std=self.schedule.std(self.schedule.noising_time(self.schedule.model_time(s))),
        )

    def at(self, t: Tensor | float) -> Any:
        """:class:`Coefficients` at one process time, as floats; remembered, since every step asks."""
        return self._remembered(float(t))

    def _at(self, time: float) -> Any:
        found = self.coefficients(torch.tensor([time], dtype=torch.float64))
        return Coefficients(*(float(v) for v in found))  # type: ignore[arg-type]

    def model_time(self, t: float, x: Tensor) -> Tensor:
        return torch.tensor(self.at(t).clock, dtype=x.dtype, device=x.device)

    def drift(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        c = self.at(t)
        return c.drift_of_x * x + c.drift_of_prediction * self.predict(self.model, x, t, condition)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.as_tensor(self.at(t).level, dtype=x.dtype, device=x.device)

    def on_grid(self, times: Tensor) -> StepFunction:
        c = self.coefficients(times)
        clocks, levels = (v.to(device=times.device, dtype=times.dtype) for v in (c.clock, c.level))
        of_x, of_prediction = c.drift_of_x.tolist(), c.drift_of_prediction.tolist()

        def terms(k: int, x: Tensor, y: Any) -> tuple[Tensor, Tensor]:
            prediction = self.prediction_at(k, x, clocks[k], y)
            return torch.add(of_x[k] * x, prediction, alpha=of_prediction[k]), levels[k]

        return terms

    def levels(self, times: Tensor) -> Tensor:
        """The number that the diffusion is at times ``(K,)``, in their dtype."""
        return self.coefficients(times).level.to(device=times.device, dtype=times.dtype)

    def diffusion_on_grid(self, times: Tensor) -> Callable[[int, Tensor], Tensor]:
        levels = self.levels(times)
        return lambda k, x: levels[k]

    def denoised(self, x: Tensor, t: Tensor | float, condition: Any = None, on_clock: bool = False) -> Tensor:
        """``x0^ = (x - std eps^)/mu``, the model's mean of the data given x at process time t (0-d)."""
        c = self.at(t)
        std = c.clock_std if on_clock else c.std
        a, b = (1 - std * c.eps_of_x) / c.mu, -std * c.eps_of_prediction / c.mu
        return a * x + b * self.predict(self.model, x, t, condition)

    def denoiser_on_grid(self, times: Tensor, on_clock: bool = False) -> Callable[[int, Tensor, Any], Tensor]:
        """``(k, x, y) -> x0^`` at the k-th time; within a step of a chain the model is not called again."""
        c = self.coefficients(times)
        std = c.clock_std if on_clock else c.std
        a, b = ((1 - std * c.eps_of_x) / c.mu).tolist(), (-std * c.eps_of_prediction / c.mu).tolist()
        clocks = c.clock.to(device=times.device, dtype=times.dtype)
        return lambda k, x, y: torch.add(a[k] * x, self.prediction_at(k, x, clocks[k], y), alpha=b[k])

    def control_towards(
        self, model: Model, x: Tensor, t: Tensor, condition: Any = None, strength: float = 1.0
    ) -> Tensor:
        change = self.predict(model, x, t, condition) - self.predict(self.model, x, t, condition)
        return change * (strength * self.at(t).gain)

    def shifts_towards(
        self, model: Model, chain: Any, strength: float | None = None, beside: bool = True
    ) -> Callable[[int, Tensor, Any], Tensor]:
        c = self.coefficients(chain.times[:-1])
        clocks, gains = c.clock.to(chain.times), c.gain.tolist()
        # a tuned model is asked for at every step of training: one multiplication
        at_once = strength is None and not isinstance(chain.gain(0), Tensor)
        whole = [gain * chain.gain(k) for k, gain in enumerate(gains)] if at_once else None

        def shift(k: int, x: Tensor, y: Any) -> Tensor:
            before = self.prediction_at(k, x, clocks[k], y) if beside else 0.0
            change = call_model(model, x, clocks[k], y) - before
            if whole is not None:
                return change * whole[k]
            c = chain.shift_at(k, x, change * gains[k])
            return c if strength is None else strength * c

        return shift

    def controlled(self, clock: Tensor) -> Tensor:
        return self.schedule.noising_time(clock.double()) <= self.schedule.noise_end * (1 + 1e-6)

    def prediction_change(self, control: ControlFunction, x: Tensor, clock: Tensor, condition: Any = None) -> Tensor:
        t = self.process_time(self.schedule.noising_time(clock.double())).clamp(0.0, 1.0)
        return control(x, t.to(x.dtype), condition) * batch_like(1 / self.coefficients(t).gain.to(x), x)

    def prediction_at(self, k: int, x: Tensor, clock: Tensor, condition: Any) -> Tensor:
        """The pre-trained prediction at step k (the model's own time ``clock``): once a step, though controls ask for
        it too."""
        return recall(self, k, x, lambda: call_model(self.model, x, clock, condition))

    def marginal(self, t: float) -> GaussianMixture:
        """The exact law of X_t (a mixture in the model's place only)."""
        if self.mixture is None:
            raise ValueError("marginal(t) is known for a GaussianMixture in the model's place only.")
        s = torch.tensor(self.noising_time(t), dtype=torch.float64)
        return self.mixture.noised(float(self.schedule.mu(s)), float(self.schedule.std(s)))

    def as_linear(self) -> LinearSDE | None:
        """The same process as a linear SDE, where the model is a single Gaussian; else None."""
        if self.mixture is None or len(self.mixture.means) != 1:
            return None
        return LinearSDE(*(partial(self._linear_part, i) for i in range(3)), horizon=self.horizon)

    def _linear_part(self, i: int, t: Tensor) -> Tensor:
        """A, sigma or offset of :meth:`as_linear` at t."""
        assert self.mixture is not None
        mean, cov = self.mixture.means[0].double(), self.mixture.covariances[0].double()
        eye = torch.eye(len(mean), dtype=torch.float64, device=mean.device)
        s = torch.as_tensor(self.noising_time(t), dtype=torch.float64).cpu().clamp(min=_S_MIN)
        mu, std, end = float(self.schedule.mu(s)), float(self.schedule.std(s)), self.schedule.noise_end
        rate, level = float(self.schedule.forward_variance_rate(s)), self._level(float(s))
        if i == 1:
            return (level * math.sqrt(end) * eye).to(t.dtype)
        score_matrix = end * (rate + level**2) / 2 * torch.linalg.inv(mu**2 * cov + std**2 * eye)
        part = score_matrix @ (mu * mean) if i else -end * float(self.schedule.log_mu_slope(s)) * eye - score_matrix
        return part.to(t.dtype)

    def describe(self) -> dict[str, Any]:
        level = self.noise_level if isinstance(self.noise_level, (str, float, int)) else "callable"
        return {
            **super().describe(),
            "schedule": repr(self.schedule),
            "prediction": self.prediction,
            "noise_level": level,
        }


def generative_sde(
    model: nn.Module | GaussianMixture,
    schedule: Schedule,
    prediction: str = "noise",
    shape: Sequence[int] | None = None,
    noise_level: str | float | Callable[[Tensor], float] = "reverse",
) -> GenerativeSDE:
    """The SDE that samples from a pre-trained diffusion or flow model, ready to be controlled.

    Args:
        model: any nn.Module ``model(x, s) -> (batch, *shape)`` (``model(x, s, y)`` for a conditional one) on its own
            clock: s of shape (batch,) is the noising time, 0 = data, 1 = noise; for :class:`FlowMatching` the model's
                own
            t, 1 = data. Or a :class:`GaussianMixture`: the data law itself, whose score is exact.
        schedule: :class:`VP`, :class:`CosineVP`, :class:`VE`, :class:`FlowMatching`.
        prediction: what the model predicts: "noise", "sample", "score", "v" or "velocity".
        shape: shape of one state (not needed for a mixture).
        noise_level: "reverse" (the ordinary time reversal), "memoryless" (``g^2 = 2 eta``; the same noise, since
            ``2 eta`` is the rate of the noising process, with the claim that it forgets the start, which is checked),
            a number, or a function of process time t (0-d tensor, 0 = noise) giving g > 0. The marginals are the
            model's for every level.

    Raises:
        ValueError: unknown prediction or noise level; "memoryless" for a schedule that keeps memory of its start.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a noise schedule such as sc.VP(), got {type(schedule).__name__}.")
    if isinstance(model, GaussianMixture):
        if shape is not None and tuple(shape) != tuple(model.event_shape):
            raise ValueError(
                f"shape {tuple(shape)} does not fit a mixture on {tuple(model.event_shape)}; leave it out."
            )
        sde = GenerativeSDE(MixtureNoise(model, schedule), schedule, "noise", model.event_shape, noise_level, model)
    else:
        if not callable(model):
            raise TypeError(f"model must be an nn.Module or a GaussianMixture, got {type(model).__name__}.")
        if shape is None:
            raise TypeError("shape is needed: the shape of one state, e.g. shape=(1, 8, 8).")
        if isinstance(shape, int):
            shape = (shape,)
        sde = GenerativeSDE(model, schedule, prediction, shape, noise_level, None)
    if noise_level == "memoryless":
        check_memoryless(sde.memory)
    return sde
