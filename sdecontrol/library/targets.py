"""Named targets: fixed, versioned unnormalised densities to sample, with what is known of them exactly.

The names of the literature do not fix a density (there are several mixtures of 40 Gaussians, two funnels and a factor 2
between two Lennard-Jones clusters); a :class:`Target` does: definition, version, log Z, exact samples and modes where
they exist. A target is a log density itself, ``target(x)``, so it goes straight into
``sc.gibbs_problem(target, target.dim)``.

Constants are kept in float64 and follow the input's dtype and device; random parts of a definition come from a
generator of their own.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import check_name
from ..randomness import published_generator
from . import particle_systems  # noqa: F401  (adds its targets to the library)
from .target_base import CARDS, Card, Target, register_target

_LOG_2PI = math.log(2 * math.pi)
_LOWEST = -60.0  # of the funnel's x1 in its exponential: 20 standard deviations out


_ALIASES = {"gmm40": "gmm40-2d"}


def target_names() -> list[str]:
    """The names that :func:`named_target` knows ("gmm40" is another name of "gmm40-2d")."""
    return sorted(CARDS)


def target_card(name: str) -> Card:
    """The card of a named target: version and definition.

    Raises:
        ValueError: unknown name, with the nearest ones.
    """
    name = _ALIASES.get(name, name)
    check_name("target", name, CARDS)
    return CARDS[name]


def named_target(name: str) -> Target:
    """A benchmark target by its name (:func:`target_names`). Definitions: ``target_card(name).definition``.

    Raises:
        ValueError: unknown name, with the nearest ones. ModuleNotFoundError: data that need an extra, naming it.
    """
    card = target_card(name)
    target: Target = card.make()
    target.name, target.version, target.definition = card.name, card.version, card.definition
    return target


# ---------------------------------------------------------------- mixtures and the funnel


class Mixture(Target):
    """An equal mixture of ``N(mean_i, variance I)``, normalised.

    Args:
        modes: the means, ``(k, d)``, in float64.
    """

    log_z = 0.0

    def __init__(self, modes: Tensor, variance: float) -> None:
        self.modes: Tensor = modes
        self.variance, self.dim = variance, modes.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        self._check(x)
        square = (x.unsqueeze(1) - self.modes.to(x)).square().sum(2)
        constant = math.log(len(self.modes)) + 0.5 * self.dim * (_LOG_2PI + math.log(self.variance))
        return torch.logsumexp(square * (-0.5 / self.variance), 1) - constant

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(len(self.modes), (n,), generator=generator)
        noise = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        return self.modes[which] + math.sqrt(self.variance) * noise


@register_target("gmm9", version=1)
def _gmm9() -> Target:
    """d = 2: equal mixture of nine N(m, 0.3 I), m in {-5, 0, 5}^2, normalised; log Z = 0."""
    grid = torch.tensor([-5.0, 0.0, 5.0], dtype=torch.float64)
    return Mixture(torch.cartesian_prod(grid, grid), 0.3)


def _forty(dim: int) -> Tensor:
    generator = published_generator(0)
    return ((torch.rand(40, dim, generator=generator, dtype=torch.float32) - 0.5) * 80).double()


@register_target("gmm40-2d", version=1)
def _gmm40_2d() -> Target:
    """d = 2: equal mixture of 40 Gaussians of standard deviation softplus(1) = 1.3133, means (torch.rand(40, 2) - 0.5)
    * 80 as torch.manual_seed(0) gives them on CPU in float32, normalised; log Z = 0."""
    return Mixture(_forty(2), math.log1p(math.e) ** 2)


@register_target("gmm40-50d", version=1)
def _gmm40_50d() -> Target:
    """d = 50: equal mixture of 40 Gaussians of standard deviation 1, means (torch.rand(40, 50) - 0.5) * 80 as
    torch.manual_seed(0) gives them on CPU in float32, normalised; log Z = 0."""
    return Mixture(_forty(50), 1.0)


class Funnel(Target):
    """Neal's funnel, normalised. In the exponential x1 is held above -60 (20 standard deviations), so that values stay
    finite."""

    log_z = 0.0

    def __init__(self, dim: int, variance: float) -> None:
        self.dim, self.variance = dim, variance

    def __call__(self, x: Tensor) -> Tensor:
        self._check(x)
        first, others = x[:, 0], x[:, 1:]
        across = 0.5 * others.square().sum(1) * (-first.clamp(min=_LOWEST)).exp()
        constant = 0.5 * (self.dim * _LOG_2PI + math.log(self.variance))
        return -first.square() / (2 * self.variance) - 0.5 * (self.dim - 1) * first - across - constant

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        first = math.sqrt(self.variance) * x[:, :1]
        return torch.cat((first, x[:, 1:] * (0.5 * first).exp()), 1)


@register_target("funnel", version=1)
def _funnel() -> Target:
    """d = 10: x1 ~ N(0, 9), and x2, ..., x10 given x1 independent N(0, exp(x1)), normalised; log Z = 0."""
    return Funnel(10, 9.0)


# ---------------------------------------------------------------- many wells


class ManyWell(Target):
    """A product of equal one-dimensional double wells and of standard normal factors ``exp(-x^2/2)``, unnormalised.

    log Z is a sum of one-dimensional integrals (trapezoidal rule on a fine grid, exact to rounding for such densities),
    samples come from the inverse of the wells' distribution function on that grid (exact to 1e-8).

    Args:
        wells: which coordinates are double wells.
        log_factor: the log density of one, ``(...) -> (...)``.
        bottoms: positions of its two maxima, where listing all of them as modes makes sense.

    Attributes:
        wells: ``(wells,)`` indices. left_share: probability of a well's negative side.
    """

    _GRID, _REACH = 1 << 17, 6.0

    def __init__(
        self,
        dim: int,
        wells: Tensor,
        log_factor: Callable[[Tensor], Tensor],
        bottoms: tuple[float, float] | None = None,
    ) -> None:
        self.dim, self.wells, self.log_factor = dim, wells, log_factor
        self._plain = torch.ones(dim, dtype=torch.bool).index_fill(0, wells, False).nonzero().flatten()
        self._grid = torch.linspace(-self._REACH, self._REACH, self._GRID + 1, dtype=torch.float64)
        density = log_factor(self._grid)
        weight = (density - density.max()).exp()
        mass = torch.cat((weight.new_zeros(1), (0.5 * (weight[1:] + weight[:-1])).cumsum(0)))
        self._distribution = mass / mass[-1]
        integral = float(density.max() + (mass[-1] * 2 * self._REACH / self._GRID).log())
        self.log_z = len(wells) * integral + 0.5 * len(self._plain) * _LOG_2PI
        self.left_share = float(self._distribution[self._GRID // 2])
        if bottoms is not None:
            corners = torch.cartesian_prod(*[torch.tensor(bottoms, dtype=torch.float64)] * len(wells))
            self.modes = corners.new_zeros(len(corners), dim).index_copy(1, wells, corners)

    def __call__(self, x: Tensor) -> Tensor:
        self._check(x)
        value = self.log_factor(x[:, self.wells.to(x.device)]).sum(1)
        return value - 0.5 * x[:, self._plain.to(x.device)].square().sum(1)

    def left_shares(self, x: Tensor) -> Tensor:
        """Share of the samples ``(n, dim)`` on the negative side of each well, ``(wells,)``; truth: ``left_share``."""
        return (x[:, self.wells.to(x.device)] < 0).double().mean(0)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        u = torch.rand(n, len(self.wells), generator=generator, dtype=torch.float64)
        right = torch.searchsorted(self._distribution, u).clamp(1, self._GRID)
        low, high = self._distribution[right - 1], self._distribution[right]
        part = (u - low) / (high - low)
        return x.index_copy(1, self.wells, self._grid[right - 1] + part * (2 * self._REACH / self._GRID))


@register_target("many-well-32", version=1)
def _many_well_32() -> Target:
    """d = 32: 16 pairs (x1, x2) with log density -x1^4 + 6 x1^2 + x1/2 - x2^2/2 each, x1 the even coordinates (from 0),
    unnormalised; log Z = 164.695675, and 0.1557 of a well's mass is on its left. 65 536 modes."""
    return ManyWell(32, torch.arange(0, 32, 2), lambda x: x * (0.5 + x * (6 - x.square())))


@register_target("many-well-5", version=1)
def _many_well_5() -> Target:
    """d = 5: log density -sum_i (x_i^2 - 4)^2, unnormalised; log Z = -0.541056, 32 modes at +-2."""
    return ManyWell(5, torch.arange(5), lambda x: -(x.square() - 4).square(), (-2.0, 2.0))


@register_target("many-well-50", version=1)
def _many_well_50() -> Target:
    """d = 50: log density -sum_{i<=5} (x_i^2 - 2)^2 - sum_{i>5} x_i^2/2, unnormalised; log Z = 42.817243, 32 modes at
    +-sqrt(2)."""
    return ManyWell(50, torch.arange(5), lambda x: -(x.square() - 2).square(), (-math.sqrt(2), math.sqrt(2)))


# ---------------------------------------------------------------- a posterior and a lattice


class LogisticRegression(Target):
    """Posterior of a Bayesian logistic regression: log likelihood plus ``log N(beta; 0, I)`` with its constant, so that
    Z is the evidence.

    Args:
        features: ``(n, dim)``, with a column of ones if there is an intercept. labels: ``(n,)`` of 0 and 1.
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels, self.dim = features, labels, features.shape[1]
        # softplus((1 - 2 y) x'beta): no cancellation where a row is predicted with confidence
        self._signed = features * (1 - 2 * labels).unsqueeze(1)

    def __call__(self, x: Tensor) -> Tensor:
        self._check(x)
        misfit = torch.nn.functional.softplus(x @ self._signed.to(x).mT).sum(1)
        return -misfit - 0.5 * x.square().sum(1) - 0.5 * self.dim * _LOG_2PI


@register_target("logistic-regression", version=1)
def _logistic_regression() -> Target:
    """d = 31: posterior of a logistic regression on scikit-learn's breast cancer data (569 rows, 30 features
    standardised with the population deviation, label 1 = benign), coefficients after the intercept, prior N(0, I) on
    all of them with its constant; log Z is the log evidence, not known exactly."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the target 'logistic-regression' needs scikit-learn: pip install 'sdecontrol[examples]'."
        ) from error
    data, labels = (torch.from_numpy(v).double() for v in load_breast_cancer(return_X_y=True))
    features = (data - data.mean(0)) / data.std(0, correction=0)
    return LogisticRegression(torch.cat((torch.ones(len(data), 1, dtype=torch.float64), features), 1), labels)


class PhiFour(Target):
    """Scalar field on a periodic square lattice: ``-S``, ``S = sum_x [sum_mu (phi_{x+mu} - phi_x)^2 + mass phi_x^2 +
    coupling phi_x^4]``.

    States are fields, flattened row by row.
    """

    def __init__(self, side: int, mass: float, coupling: float) -> None:
        self.side, self.mass, self.coupling, self.dim = side, mass, coupling, side * side

    def field(self, x: Tensor) -> Tensor:
        """``(batch, side, side)``."""
        return x.unflatten(1, (self.side, self.side))

    def __call__(self, x: Tensor) -> Tensor:
        self._check(x)
        phi = self.field(x)
        bonds = sum((phi.roll(-1, axis) - phi).square().flatten(1).sum(1) for axis in (1, 2))
        square = x.square()
        return -(bonds + (square * (self.mass + self.coupling * square)).sum(1))

    def magnetisation(self, x: Tensor) -> Tensor:
        """Mean of the field, ``(batch,)``; its law is even."""
        return x.mean(1)


@register_target("phi4-8", version=1)
def _phi4() -> Target:
    """d = 64: phi^4 theory on a periodic 8 x 8 lattice, action sum_x [sum_mu (phi_{x+mu} - phi_x)^2 + m^2 phi_x^2 + lam
    phi_x^4] with m^2 = -4, lam = 6.008 (ensemble E2 of Albergo, Kanwar & Shanahan 1904.12072), unnormalised; log Z is
    not known exactly."""
    return PhiFour(8, -4.0, 6.008)
