"""Noise schedules: forward noising ``x = mu(s) x_data + std(s) eps`` in noising time s, 0 = data and 1 = noise.

Each schedule gives ``mu`` and ``std`` and their logarithmic slopes; from them follow, for every parametrisation, the
score, the velocity and the memoryless noise (docs/mathematics.md section 5; Song et al. 2011.13456 for VP and VE,
Nichol & Dhariwal 2102.09672 for the cosine, Lipman et al. 2210.02747 for flow matching).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


class Schedule:
    """Base of the noise schedules. All functions take a float64 tensor of noising times s in [0, 1].

    Attributes:
        noise_end: the noising time at which generation starts (< 1 where the schedule is singular at 1).
        clock: "noising" if a model is called with s (0 = data), "generation" if with 1 - s (1 = data).
    """

    noise_end: float = 1.0
    clock: str = "noising"

    def mu(self, s: Tensor) -> Tensor:
        raise NotImplementedError

    def std(self, s: Tensor) -> Tensor:
        raise NotImplementedError

    def log_mu_slope(self, s: Tensor) -> Tensor:
        """``d log mu / ds``."""
        raise NotImplementedError

    def forward_variance_rate(self, s: Tensor) -> Tensor:
        """``g^2`` of the forward noising SDE ``dx = (d log mu/ds) x ds + g dw``:
        ``2 (std std' - (d log mu/ds) std^2)``.

        It is also ``2 eta``, the memoryless noise level, and the one of the ordinary time reversal.
        """
        raise NotImplementedError

    def model_time(self, s: Tensor) -> Tensor:
        """What a model trained under this schedule calls the noising time s."""
        return s if self.clock == "noising" else 1.0 - s

    def noising_time(self, model_time: Tensor) -> Tensor:
        """The inverse of :meth:`model_time`."""
        return model_time if self.clock == "noising" else 1.0 - model_time

    def start_std(self) -> float:
        """Standard deviation of the noise that generation starts from, for data of unit variance."""
        s = torch.tensor(self.noise_end, dtype=torch.float64)
        return math.sqrt(float(self.mu(s) ** 2 + self.std(s) ** 2))


@dataclass(frozen=True)
class VP(Schedule):
    """Variance preserving, ``dx = -beta(s)/2 x ds + sqrt(beta(s)) dw``, ``beta`` linear from beta_min to beta_max.

    The defaults are the usual ones. The tutorial's eq. [1] is ``beta = 1`` over a horizon T: ``VP(T, T)`` here.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not (self.beta_min >= 0 and self.beta_max > 0 and self.beta_max >= self.beta_min):
            raise ValueError(
                f"VP needs 0 <= beta_min <= beta_max and beta_max > 0, got {self.beta_min}, {self.beta_max}."
            )

    def _integral(self, s: Tensor) -> Tensor:
        return self.beta_min * s + 0.5 * (self.beta_max - self.beta_min) * s**2

    def mu(self, s: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(s))

    def std(self, s: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(s)))

    def log_mu_slope(self, s: Tensor) -> Tensor:
        return -0.5 * self.forward_variance_rate(s)

    def forward_variance_rate(self, s: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * s


@dataclass(frozen=True)
class CosineVP(Schedule):
    """Variance preserving with ``mu(s) = cos(a(s)) / cos(a(0))``, ``a(s) = (s + offset)/(1 + offset) pi/2``.

    Its rate is infinite at s = 1, so generation starts at ``noise_end`` (memory left there: mu = 0.0047).
    """

    offset: float = 0.008
    noise_end: float = 0.997

    def __post_init__(self) -> None:
        if not (self.offset > 0 and 0 < self.noise_end < 1):
            raise ValueError("CosineVP needs offset > 0 and 0 < noise_end < 1.")

    def _angle(self, s: Tensor) -> Tensor:
        return (s + self.offset) / (1 + self.offset) * (math.pi / 2)

    def _cos0(self) -> float:
        return math.cos(self.offset / (1 + self.offset) * math.pi / 2)

    def mu(self, s: Tensor) -> Tensor:
        return torch.cos(self._angle(s)) / self._cos0()

    def std(self, s: Tensor) -> Tensor:
        a, a0 = self._angle(s), self.offset / (1 + self.offset) * math.pi / 2
        return torch.sqrt(torch.sin(a - a0) * torch.sin(a + a0)) / self._cos0()  # 1 - mu^2 without cancellation

    def log_mu_slope(self, s: Tensor) -> Tensor:
        return -torch.tan(self._angle(s)) * (math.pi / 2) / (1 + self.offset)

    def forward_variance_rate(self, s: Tensor) -> Tensor:
        return -2 * self.log_mu_slope(s)


@dataclass(frozen=True)
class VE(Schedule):
    """Variance exploding: ``mu = 1``, ``std(s) = sigma_min (sigma_max/sigma_min)^s``.

    The data end keeps a noise of standard deviation ``sigma_min``, as in the published models.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"VE needs 0 < sigma_min < sigma_max, got {self.sigma_min}, {self.sigma_max}.")

    def mu(self, s: Tensor) -> Tensor:
        return torch.ones_like(s)

    def std(self, s: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(s * math.log(self.sigma_max / self.sigma_min))

    def log_mu_slope(self, s: Tensor) -> Tensor:
        return torch.zeros_like(s)

    def forward_variance_rate(self, s: Tensor) -> Tensor:
        return 2 * math.log(self.sigma_max / self.sigma_min) * self.std(s) ** 2


@dataclass(frozen=True)
class FlowMatching(Schedule):
    """The linear interpolant ``x = (1 - s) x_data + s eps``; models use their own clock ``t = 1 - s``, 1 = data.

    The memoryless noise is singular at the noise end, so generation starts at the model's time ``start`` (memory left:
    a correlation of ``start`` for data of unit variance).
    """

    start: float = 0.005
    clock = "generation"

    def __post_init__(self) -> None:
        if not 0 < self.start < 1:
            raise ValueError(f"FlowMatching(start) must be in (0, 1), got {self.start}.")

    @property
    def noise_end(self) -> float:  # type: ignore[override]
        return 1.0 - self.start

    def mu(self, s: Tensor) -> Tensor:
        return 1.0 - s

    def std(self, s: Tensor) -> Tensor:
        return s

    def log_mu_slope(self, s: Tensor) -> Tensor:
        return -1.0 / (1.0 - s)

    def forward_variance_rate(self, s: Tensor) -> Tensor:
        return 2 * s / (1.0 - s)
