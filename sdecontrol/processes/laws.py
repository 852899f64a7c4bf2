"""Laws of a state: ``Dirac``, ``Gaussian`` and ``GaussianMixture`` as torch distributions, and seeded draws from any
law.

They serve as initial laws and as the marginals, kernels and bridges that exact solutions return. torch's own
``MultivariateNormal`` needs a positive definite covariance; here degenerate ones are allowed (a noise of rank m < d,
time 0 of a fixed start).
"""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..precision import at_least_single, full_precision
from ..randomness import BLOCK, Place, generator_for, global_rng
from ..tensors import check_tensor, symmetric

_LOG_2PI = 1.8378770664093453


@full_precision()
def factor(covariance: Tensor) -> Tensor:
    """A symmetric factor ``L`` with ``L L^T = covariance``, for any positive semi-definite ``(..., d, d)`` matrix."""
    values, vectors = torch.linalg.eigh(symmetric(covariance))
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


def check_alike(name: str, value: Tensor, other: str, like: Tensor) -> None:
    """Raise unless ``value`` has the dtype of ``like`` and is on its device."""
    if value.dtype != like.dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, {other} has {like.dtype}; make them agree.")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, {other} on {like.device}; move one of them.")


def _check_covariance(name: str, covariance: Tensor) -> Tensor:
    if not torch.allclose(covariance, covariance.mT, rtol=1e-5, atol=1e-7 * float(covariance.abs().max())):
        raise ValueError(f"{name} must be symmetric.")
    values = torch.linalg.eigvalsh(symmetric(covariance))
    if bool((values < -1e-5 * values.abs().amax().clamp(min=1e-30)).any()):
        raise ValueError(
            f"{name} must be positive semi-definite; its smallest eigenvalue is {float(values.min()):.3g}."
        )
    return symmetric(covariance)


class Dirac(Distribution):
    """A point mass at ``point`` of shape ``(*event)``, of numbers or of int64 tokens: every path starts there."""

    def __init__(self, point: Tensor) -> None:
        tokens = isinstance(point, Tensor) and point.dtype == torch.int64
        self.point = (
            point
            if tokens
            else at_least_single(
                check_tensor("Dirac(point)", point, hint="pass the start of one path, shape (*event).")
            )
        )
        if point.ndim == 0:
            raise ValueError("Dirac(point) must have at least one dimension; use torch.tensor([x]) for a scalar state.")
        super().__init__(event_shape=point.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.point

    @property
    def variance(self) -> Tensor:
        return torch.zeros_like(self.point)

    @property
    def covariance_matrix(self) -> Tensor:
        return self.point.new_zeros((self.point.numel(),) * 2)

    def __repr__(self) -> str:
        return f"Dirac(point of shape {tuple(self.point.shape)})"

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.point.expand(torch.Size(sample_shape) + self.event_shape)

    rsample = sample


class Gaussian(Distribution):
    """A Gaussian ``N(mean, cov)``, possibly degenerate.

    Args:
        mean: ``(*event)``, or ``(batch, d)`` for a batch of laws of vectors.
        cov: a number (isotropic variance), variances of the shape of an event, or a ``(d, d)`` covariance for vectors
            (``(batch, d, d)`` for a batch of laws).

    Attributes:
        is_diagonal: whether it was given by variances.
        scale_root: the symmetric root of the covariance: a ``(d, d)`` matrix, or standard deviations of the event's
            shape.
    """

    def __init__(self, mean: Tensor, cov: Tensor | float) -> None:
        mean = at_least_single(check_tensor("Gaussian(mean)", mean))
        if mean.ndim == 0:
            raise ValueError(
                "Gaussian(mean) must have at least one dimension; use torch.tensor([m]) for a scalar state."
            )
        cov = check_tensor(
            "Gaussian(cov)",
            torch.as_tensor(cov, dtype=mean.dtype, device=mean.device) if not isinstance(cov, Tensor) else cov,
        )
        cov = at_least_single(cov)
        check_alike("Gaussian(cov)", cov, "the mean", mean)
        self.loc = mean
        d = mean.shape[-1]
        self.is_diagonal = not (cov.ndim == mean.ndim + 1 and cov.shape == (*mean.shape, d))
        if not self.is_diagonal:
            event = mean.shape[-1:]
            shared = cov.ndim == 3 and cov.stride(0) == 0  # one covariance, expanded over a batch of laws
            self._cov = _check_covariance("Gaussian(cov)", cov[:1] if shared else cov).expand(cov.shape)
            self.scale_root = factor(self._cov[:1] if shared else self._cov).expand(cov.shape)
        else:
            event = mean.shape
            if cov.ndim and cov.shape != mean.shape:
                raise ValueError(
                    f"Gaussian(cov) must be a number, variances of shape {tuple(mean.shape)}, or a ({d}, {d}) matrix "
                    f"for a vector mean; got shape {tuple(cov.shape)}."
                )
            if bool((cov < 0).any()):
                raise ValueError("Gaussian(cov) has a negative variance.")
            self._cov = cov.expand(mean.shape)
            self.scale_root = self._cov.sqrt()
        super().__init__(mean.shape[: mean.ndim - len(event)], event, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def covariance_matrix(self) -> Tensor:
        """``(..., n, n)``, n the number of entries of an event."""
        if self.is_diagonal:
            return torch.diag_embed(self._cov.flatten(self.loc.ndim - len(self.event_shape)))
        return self._cov

    @property
    def variance(self) -> Tensor:
        return self._cov if self.is_diagonal else self._cov.diagonal(dim1=-2, dim2=-1).expand(self.loc.shape)

    def __repr__(self) -> str:
        kind = "independent entries" if self.is_diagonal else "full covariance"
        return f"Gaussian(batch {tuple(self.batch_shape)}, event {tuple(self.event_shape)}, {kind})"

    @full_precision()
    def shape_noise(self, z: Tensor) -> Tensor:
        """``cov^(1/2) z`` for standard normal ``z`` of shape ``(..., *event)``."""
        return self.scale_root * z if self.is_diagonal else (self.scale_root @ z.unsqueeze(-1)).squeeze(-1)

    def rsample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        z = torch.randn(shape, generator=generator, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.shape_noise(z)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def _draw_block(self, rows: int, generator: torch.Generator) -> Tensor:
        return self.rsample((rows,), generator)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density ``(...)``; raises where the covariance is singular (there is no density)."""
        difference = value - self.loc
        if self.is_diagonal:
            if bool((self._cov == 0).any()):
                raise ValueError("this Gaussian is degenerate (a variance is 0) and has no density.")
            terms = -0.5 * (difference**2 / self._cov + self._cov.log() + _LOG_2PI)
            return terms.flatten(terms.ndim - len(self.event_shape)).sum(-1)
        root, info = torch.linalg.cholesky_ex(self._cov)
        if bool((info != 0).any()):
            raise ValueError("this Gaussian is degenerate (its covariance is singular) and has no density.")
        standard = torch.linalg.solve_triangular(root, difference.unsqueeze(-1), upper=False).squeeze(-1)
        half_log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (standard**2).sum(-1) - half_log_det - 0.5 * difference.shape[-1] * _LOG_2PI

    def entropy(self) -> Tensor:
        n = self.event_shape.numel()
        return 0.5 * (n * (1 + _LOG_2PI) + torch.linalg.slogdet(self.covariance_matrix).logabsdet)


class _Mixture(Distribution):
    """What mixtures share; weights sum to one over the last dimension."""

    means: Tensor
    variances: Tensor
    log_weights: Tensor

    @property
    def weights(self) -> Tensor:
        return self.log_weights.exp()

    def widened(self, factor: float) -> Self:
        """The same with all (co)variances times ``factor``."""
        law = copy.copy(self)
        law.variances = factor * self.variances
        return law

    def noised(self, mu: Tensor | float, std: Tensor | float) -> Self:
        """The law of ``mu X + std eps``."""
        law = copy.copy(self)
        law.means, law.variances = mu * self.means, mu**2 * self.variances + std**2
        return law

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both, for little more than one."""
        raise NotImplementedError

    def score(self, x: Tensor) -> Tensor:
        """``grad log p(x)``, of the shape of x."""
        return self.log_prob_and_score(x)[1]


class GaussianMixture(_Mixture):
    """``sum_i weights_i N(means_i, covariances_i)`` on vectors, with its score and its noised versions in closed form.

    Args:
        weights: ``(k,)``, > 0; normalised here.
        means: ``(k, d)``.
        covariances: a number, ``(k,)`` or ``(k, d)`` variances, or ``(k, d, d)`` matrices.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor | float) -> None:
        means = at_least_single(check_tensor("GaussianMixture(means)", means, shape=("k", "d")))
        weights = at_least_single(check_tensor("GaussianMixture(weights)", weights, shape=(means.shape[0],)))
        check_alike("GaussianMixture(weights)", weights, "the tensor of means", means)
        if bool((weights <= 0).any()):
            raise ValueError("GaussianMixture(weights) must all be > 0; leave out components of weight 0.")
        k, d = means.shape
        self.means, self.log_weights = means, (weights / weights.sum()).log()
        if not isinstance(covariances, Tensor):
            covariances = torch.as_tensor(covariances, dtype=means.dtype, device=means.device)
        cov = at_least_single(check_tensor("GaussianMixture(covariances)", covariances))
        check_alike("GaussianMixture(covariances)", cov, "the tensor of means", means)
        self._vectors = None  # the axes of each component, where they are not those of the coordinates
        if cov.shape == (k, d, d):
            cov = _check_covariance("GaussianMixture(covariances)", cov)
            self.variances = cov.diagonal(dim1=-2, dim2=-1).contiguous()
            if not torch.equal(cov, torch.diag_embed(self.variances)):
                self.variances, self._vectors = torch.linalg.eigh(cov)
        elif cov.ndim <= 1 and cov.numel() in (1, k):
            self.variances = cov.reshape(-1, 1).expand(k, d)
        elif cov.shape == (k, d):
            self.variances = cov
        else:
            raise ValueError(
                f"GaussianMixture(covariances) must be a number, ({k},), ({k}, {d}) or ({k}, {d}, {d}); "
                f"got {tuple(cov.shape)}."
            )
        if bool((self.variances <= 0).any()):
            raise ValueError("GaussianMixture(covariances) must be positive definite.")
        super().__init__(event_shape=torch.Size((d,)), validate_args=False)

    @classmethod
    def _from_parts(
        cls, log_weights: Tensor, means: Tensor, variances: Tensor, vectors: Tensor | None
    ) -> GaussianMixture:
        self = cls.__new__(cls)
        self.log_weights, self.means, self.variances, self._vectors = log_weights, means, variances, vectors
        Distribution.__init__(self, event_shape=means.shape[-1:], validate_args=False)
        return self

    def to(self, like: Tensor) -> GaussianMixture:
        """The same in the dtype and on the device of a tensor."""
        vectors = None if self._vectors is None else self._vectors.to(like)
        return self._from_parts(self.log_weights.to(like), self.means.to(like), self.variances.to(like), vectors)

    @property
    def covariances(self) -> Tensor:
        """``(k, d, d)``."""
        if self._vectors is None:
            return torch.diag_embed(self.variances)
        return (self._vectors * self.variances.unsqueeze(-2)) @ self._vectors.mT

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def covariance_matrix(self) -> Tensor:
        centred = self.means - self.mean
        return (
            torch.einsum("k,kij->ij", self.weights, self.covariances) + (centred * self.weights[:, None]).mT @ centred
        )

    @property
    def variance(self) -> Tensor:
        return self.covariance_matrix.diagonal()

    def __repr__(self) -> str:
        return f"GaussianMixture({len(self.means)} components, d={self.means.shape[1]})"

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Joint log densities ``(..., k)`` and differences in each component's own axes ``(..., k, d)``."""
        difference = x.unsqueeze(-2) - self.means
        if self._vectors is not None:
            difference = torch.einsum("...kd,kde->...ke", difference, self._vectors)
        log_det = self.variances.log().sum(-1)
        square = (difference**2 / self.variances).sum(-1)
        return self.log_weights - 0.5 * (square + log_det + x.shape[-1] * _LOG_2PI), difference

    def log_prob(self, value: Tensor) -> Tensor:
        return self.terms(value)[0].logsumexp(-1)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        joint, difference = self.terms(x)
        return joint.logsumexp(-1), self._score(joint, difference)

    def score(self, x: Tensor) -> Tensor:
        return self._score(*self.terms(x))

    def _score(self, joint: Tensor, difference: Tensor) -> Tensor:
        scaled = difference / self.variances
        if self._vectors is not None:
            scaled = torch.einsum("...ke,kde->...kd", scaled, self._vectors)
        return -(joint.softmax(-1).unsqueeze(-1) * scaled).sum(-2)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Posterior probabilities of the components, ``(..., k)``."""
        return self.terms(x)[0].softmax(-1)

    def component(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """For each of ``(n, d)`` a component drawn with its probability given x: mean and standard deviations
        ``(n, d)`` in its axes, and the axes ``(n, d, d)``, or None where they are those of the coordinates."""
        edges = self.responsibilities(x).cumsum(1)
        u = torch.rand((len(x), 1), generator=generator, dtype=x.dtype, device=x.device) * edges[:, -1:]
        index = torch.searchsorted(edges, u).squeeze(1).clamp(max=edges.shape[1] - 1)
        axes = None if self._vectors is None else self._vectors[index]
        return self.means[index], self.variances[index].sqrt(), axes

    def _shape(self, index: Tensor, z: Tensor) -> Tensor:
        y = z * self.variances[index].sqrt()
        if self._vectors is not None:
            y = (self._vectors[index] @ y.unsqueeze(-1)).squeeze(-1)
        return self.means[index] + y

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        index = torch.multinomial(self.weights, max(1, shape.numel()), replacement=True)
        z = torch.randn((index.numel(), *self.event_shape), dtype=self.means.dtype, device=self.means.device)
        return self._shape(index, z).reshape(shape + self.event_shape)

    def _draw_block(self, rows: int, generator: torch.Generator) -> Tensor:
        options: dict[str, Any] = {"dtype": self.means.dtype, "device": self.means.device, "generator": generator}
        edges = self.weights.cumsum(0)
        index = torch.searchsorted(edges, torch.rand(rows, **options)).clamp(max=len(edges) - 1)
        return self._shape(index, torch.randn((rows, *self.event_shape), **options))


class ProductMixture(_Mixture):
    """Independent coordinates, each of a mixture of Gaussians in one dimension:
    ``prod_j sum_i weights_ji N(x_j; means_ji, variances_ji)``.

    Args:
        weights: ``(d, k)``, > 0; normalised here over k. means, variances: ``(d, k)``.
    """

    def __init__(self, weights: Tensor, means: Tensor, variances: Tensor) -> None:
        means = check_tensor("ProductMixture(means)", means, shape=("d", "k"))
        weights = check_tensor("ProductMixture(weights)", weights, shape=tuple(means.shape))
        variances = check_tensor("ProductMixture(variances)", variances, shape=tuple(means.shape))
        for name, value in (("weights", weights), ("variances", variances)):
            check_alike(f"ProductMixture({name})", value, "the tensor of means", means)
            if bool((value <= 0).any()):
                raise ValueError(f"ProductMixture({name}) must all be > 0.")
        self.means, self.variances = means, variances
        self.log_weights = (weights / weights.sum(1, keepdim=True)).log()
        super().__init__(event_shape=means.shape[:1], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return (self.weights * self.means).sum(1)

    @property
    def variance(self) -> Tensor:
        return (self.weights * (self.variances + self.means**2)).sum(1) - self.mean**2

    def __repr__(self) -> str:
        return f"ProductMixture(d={self.means.shape[0]}, {self.means.shape[1]} components in each coordinate)"

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Joint log densities of each coordinate and its component, and differences from the means, ``(..., d, k)``."""
        difference = x.unsqueeze(-1) - self.means
        square = difference**2 / self.variances + self.variances.log() + _LOG_2PI
        return self.log_weights - 0.5 * square, difference

    def log_prob(self, value: Tensor) -> Tensor:
        return self.terms(value)[0].logsumexp(-1).sum(-1)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        joint, difference = self.terms(x)
        return joint.logsumexp(-1).sum(-1), -(joint.softmax(-1) * difference / self.variances).sum(-1)

    def component(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, None]:
        """For each of ``(n, d)`` a component of every coordinate drawn with its probability given x: means and standard
        deviations ``(n, d)``; the axes are those of the coordinates."""
        edges = self.terms(x)[0].softmax(-1).cumsum(-1)
        u = torch.rand((*x.shape, 1), generator=generator, dtype=x.dtype, device=x.device) * edges[..., -1:]
        index = torch.searchsorted(edges, u).clamp(max=edges.shape[-1] - 1)
        pick = lambda v: v.expand(len(x), *v.shape).gather(2, index).squeeze(2)  # noqa: E731
        return pick(self.means), pick(self.variances.sqrt()), None

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        return self._draw_block(max(1, shape.numel()), None).reshape(shape + self.event_shape)

    def _draw_block(self, rows: int, generator: torch.Generator | None) -> Tensor:
        options: dict[str, Any] = {"dtype": self.means.dtype, "device": self.means.device, "generator": generator}
        edges, d = self.weights.cumsum(1), self.means.shape[0]
        index = torch.searchsorted(edges, torch.rand((d, rows), **options)).clamp(max=edges.shape[1] - 1)
        z = torch.randn((d, rows), **options)
        return (self.means.gather(1, index) + self.variances.gather(1, index).sqrt() * z).mT.contiguous()


def draw(law: Any, n: int, seed: int) -> Tensor:
    """``n`` seeded draws from a law, ``(n, *event)``: block by block, so that row i does not depend on n.

    A law is one of this module, any ``torch.distributions.Distribution``, a tensor ``(N, *event)`` of values to draw
    from with replacement, or a function ``n -> (n, *event)`` that draws from torch's global generator.
    """
    if isinstance(law, Dirac):
        return law.sample((n,))
    parts = []
    device = law.device if isinstance(law, Tensor) else _device_of(law)
    for block in range(-(-n // BLOCK)):
        place = device, seed, Place.LAW, block
        if isinstance(law, (Gaussian, GaussianMixture, ProductMixture)):
            parts.append(law._draw_block(BLOCK, generator_for(*place)))
        elif isinstance(law, Tensor):
            parts.append(law[torch.randint(law.shape[0], (BLOCK,), generator=generator_for(*place), device=device)])
        else:
            with global_rng(*place):
                parts.append(law.sample((BLOCK,)) if isinstance(law, Distribution) else law(BLOCK))
    return torch.cat(parts)[:n]


def mixture_tensors(law: GaussianMixture | ProductMixture) -> dict[str, Tensor]:
    """What files hold of a mixture, bit for bit what it is made of."""
    if isinstance(law, ProductMixture):
        return {"log_weights": law.log_weights, "means": law.means, "variances": law.variances}
    parts = {"log_weights": law.log_weights, "means": law.means, "values": law.variances}
    return parts if law._vectors is None else {**parts, "vectors": law._vectors}


def mixture_of(parts: dict[str, Tensor]) -> GaussianMixture | ProductMixture:
    """The mixture of :func:`mixture_tensors`."""
    if "variances" in parts:
        return ProductMixture(parts["log_weights"].exp(), parts["means"], parts["variances"])
    return GaussianMixture._from_parts(parts["log_weights"], parts["means"], parts["values"], parts.get("vectors"))


def _device_of(law: Any) -> torch.device:
    for name in ("loc", "means", "point", "mean"):
        try:
            value = getattr(law, name, None)
        except NotImplementedError:
            continue
        if isinstance(value, Tensor):
            return value.device
    return torch.device("cpu")
