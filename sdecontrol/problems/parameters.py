"""The parameters of a density as its user states them: names, shapes, supports and priors; and the unconstrained
coordinates that samplers move in.

Each parameter v is ``v = T(x)`` of some of the coordinates x, T from torch's registry
(``torch.distributions.biject_to`` of its support: exp for positive numbers, a logistic function for intervals, stick
breaking for the simplex). The density of x is that of v times ``|dv/dx|``, so that its integral, the evidence, is that
of the user's own density.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, biject_to, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from ..errors import check_name
from ..randomness import Place, global_rng
from ..tensors import as_float

#: supports that have a name
SUPPORTS = ("real", "positive", "nonnegative", "unit_interval", "simplex", "corr_cholesky", "lower_cholesky")
_PAIR = "a pair (low, high) with None for an open end"


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        name: empty where the whole vector is one. shape: of its value, () a number.
        support: where it lives. prior: its law, or None. transform: from coordinates to values.
        coordinates: shape of its coordinates.
    """

    name: str
    shape: torch.Size
    support: Constraint
    prior: Distribution | None = None
    transform: Any = field(init=False)
    coordinates: torch.Size = field(init=False)

    def __post_init__(self) -> None:
        called = f"support of {self.name}" if self.name else "support"
        if getattr(self.support, "is_discrete", False):
            raise ValueError(f"{called} is discrete, and samplers move in continuous coordinates: sum it out.")
        try:
            transform = biject_to(self.support)
            coordinates = torch.Size(transform.inverse_shape(self.shape))
            x = torch.zeros(1, *coordinates, dtype=torch.float64)
            value = transform(x)
            transform.log_abs_det_jacobian(x, value)
            fits = value.shape[1:] == self.shape and bool(self.support.check(value).all())
        except NotImplementedError:
            raise ValueError(
                f"{called}: torch has no transform (torch.distributions.biject_to), or none with a Jacobian, to "
                f"{self.support}."
            ) from None
        except (ValueError, RuntimeError, IndexError) as error:
            raise ValueError(
                f"{called}: {self.support} does not fit values of shape {tuple(self.shape)} ({error})."
            ) from None
        if not fits or coordinates.numel() == 0:
            raise ValueError(f"{called}: {self.support} does not fit values of shape {tuple(self.shape)}.")
        object.__setattr__(self, "transform", transform)
        object.__setattr__(self, "coordinates", coordinates)

    @property
    def free(self) -> bool:
        """Whether its coordinates are its values."""
        return self.support is constraints.real or self.support is constraints.real_vector

    @property
    def labels(self) -> list[str]:
        """Of its numbers: ``theta`` or ``theta[0]``, ``theta[1]``, ..."""
        if not self.shape:
            return [self.name]
        places = torch.cartesian_prod(*(torch.arange(n) for n in self.shape)).reshape(-1, len(self.shape)).tolist()
        return [f"{self.name or 'x'}[{','.join(map(str, place))}]" for place in places]


class Parameters:
    """What a density is a function of.

    Attributes:
        parts: the parameters. named: whether functions take, and samples are, dictionaries of them by name.
        dim: number of coordinates. size: of numbers in the values. labels: of these numbers, ``(size,)`` names.
        identity: whether values are coordinates.
    """

    def __init__(self, parts: Sequence[Parameter], named: bool, labels: Sequence[str] | None = None) -> None:
        self.parts, self.named = tuple(parts), named
        self.dim = sum(p.coordinates.numel() for p in parts)
        self.size = sum(p.shape.numel() for p in parts)
        own = [label for p in parts for label in p.labels]
        self.labels: tuple[str, ...] = tuple(own if labels is None else labels)
        self.identity = not named and all(p.free for p in parts)
        self.has_priors = any(p.prior is not None for p in parts)
        self.complete_prior = all(p.prior is not None for p in parts)

    def to(self, like: Tensor) -> Parameters:
        """With priors and supports whose numbers have the dtype and device of ``like``: torch's laws give float32 for
        values of float64 where their own numbers are of float32."""
        parts = [Parameter(p.name, p.shape, _cast(p.support, like), _cast(p.prior, like)) for p in self.parts]
        return Parameters(parts, self.named, self.labels)

    def constrained(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Values ``(n, *shape)`` of each parameter at coordinates ``(n, dim)``; ``log |dv/dx|`` ``(n,)``; and which
        rows lie in the supports, ``(n,)``: far out an exponential overflows. The values of others are those of 0."""
        values, ladj = self._transformed(x)
        inside = torch.ones(len(x), dtype=torch.bool, device=x.device)
        with torch.no_grad():
            for part, value in zip(self.parts, values):
                finite = value.flatten(1).isfinite().all(1) if value.ndim > 1 else value.isfinite()
                held = part.support.check(value)
                inside = inside & finite & held.reshape(len(x), -1).all(1)
            inside = inside & ladj.isfinite()
        if not bool(inside.all()):
            values, ladj = self._transformed(torch.where(inside.unsqueeze(1), x, torch.zeros_like(x)))
        return values, ladj, inside

    def _transformed(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        values, ladj, low = [], x.new_zeros(len(x)), 0
        for part in self.parts:
            high = low + part.coordinates.numel()
            own = x[:, low:high].reshape(len(x), *part.coordinates)
            value = own if part.free else part.transform(own)
            if not part.free:
                ladj = ladj + part.transform.log_abs_det_jacobian(own, value).reshape(len(x), -1).sum(1)
            values.append(value)
            low = high
        return values, ladj

    def log_prior(self, values: Sequence[Tensor]) -> Tensor:
        """The priors' log densities at values, ``(n,)``."""
        total = values[0].new_zeros(len(values[0]))
        for part, value in zip(self.parts, values):
            if part.prior is not None:
                total = total + part.prior.log_prob(value).reshape(len(value), -1).sum(1)
        return total

    def as_argument(self, values: Sequence[Tensor]) -> Any:
        """Values as the user's functions take them: a dictionary, or a tensor ``(n, size)``."""
        if self.named:
            return {part.name: value for part, value in zip(self.parts, values)}
        if len(self.parts) == 1 and values[0].ndim == 2:
            return values[0]
        return torch.cat([value.reshape(len(value), -1) for value in values], 1)

    def __call__(self, x: Tensor) -> Any:
        """Values at coordinates ``(n, dim)``: a tensor ``(n, size)``, or a dictionary of tensors ``(n, *shape)``."""
        return x if self.identity else self.as_argument(self._transformed(x)[0])

    def flat(self, x: Tensor) -> Tensor:
        """All numbers of the values side by side, ``(n, size)``, in the order of :attr:`labels`."""
        if self.identity:
            return x
        return torch.cat([value.reshape(len(value), -1) for value in self._transformed(x)[0]], 1)

    def coordinates(self, values: Any) -> Tensor:
        """The coordinates ``(n, dim)`` of values given in the form of :meth:`__call__`.

        Raises:
            ValueError: a parameter that is missing, or a value outside of its support.
        """
        parts, low = [], 0
        for part in self.parts:
            if self.named:
                if part.name not in values:
                    raise ValueError(f"values lack the parameter {part.name!r}.")
                value = torch.as_tensor(values[part.name])
            else:
                value = values[:, low : low + part.shape.numel()]
                low += part.shape.numel()
            value = value.reshape(-1, *part.shape)
            if not bool(part.support.check(value).all()):
                raise ValueError(f"values of {part.name or 'x'} are outside of their support, {part.support}.")
            parts.append((value if part.free else part.transform.inv(value)).reshape(len(value), -1))
        return torch.cat(parts, 1)

    def draw_prior(self, n: int, seed: int, like: Tensor) -> Tensor:
        """Coordinates ``(n, dim)`` of draws of the priors, all of which are given."""
        with global_rng(like.device, seed, Place.PRIOR):
            values = [part.prior.sample((n,)) for part in self.parts]  # type: ignore[union-attr]
        parts = [
            (v.to(like) if p.free else p.transform.inv(v.to(like))).reshape(n, -1) for p, v in zip(self.parts, values)
        ]
        return torch.cat(parts, 1)


def _cast(thing: Any, like: Tensor) -> Any:
    """A copy of a law, transform or support with other numbers; what has none is itself."""
    if isinstance(thing, Tensor):
        return thing.detach().to(like) if thing.is_floating_point() else thing.to(like.device)
    if isinstance(thing, (list, tuple)):
        return type(thing)(_cast(v, like) for v in thing)
    if not isinstance(thing, (Distribution, Transform, Constraint)) or not vars(thing):
        return thing
    made = copy.copy(thing)
    for name, value in vars(made).items():
        setattr(made, name, None if name == "_inv" else _cast(value, like))  # a transform's inverse, remembered
    return made


# ---------------------------------------------------------------- as they are stated


def parameters_of(dim: int | None, names: Any, support: Any, prior: Any) -> Parameters:
    """The parameters that a user has stated; see :func:`gibbs_problem`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    for name, value in (("names", names), ("support", support), ("prior", prior)):
        if isinstance(value, Mapping) and not value:
            raise ValueError(f"{name} is empty: name at least one parameter.")
    if isinstance(names, Mapping) or isinstance(prior, Mapping) or (isinstance(support, Mapping) and not names):
        return _named(dim, names, support, prior)
    return _vector(dim, names, support, prior)


def _named(dim: int | None, names: Any, support: Any, prior: Any) -> Parameters:
    """Parameters by name: of priors, shapes and supports."""
    given: dict[str, tuple[str, Any]] = {"prior": ("laws", prior), "support": ("supports", support)}
    for name, (what, value) in given.items():
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a dictionary, name -> {what}, as the parameters are named; got {value!r}.")
    prior, support = dict(prior or {}), dict(support or {})
    if names is None:
        shapes: dict[str, Any] = dict.fromkeys((*prior, *support))
    elif isinstance(names, Mapping):
        shapes = {**dict.fromkeys(prior), **names}
    else:
        shapes = dict.fromkeys(_labels(names, None))
    for name, stated in (("prior", prior), ("support", support)):
        for key in stated:
            check_name(f"parameter in {name}", key, list(shapes))
    parts = [_one(name, shape, support.get(name), prior.get(name)) for name, shape in shapes.items()]
    found = Parameters(parts, True)
    if dim is not None and dim != found.dim:
        raise ValueError(f"dim={dim}, but the parameters have {found.dim} coordinates; leave dim out.")
    return found


def _one(name: str, shape: Any, support: Any, prior: Any) -> Parameter:
    if not isinstance(name, str) or not name:
        raise TypeError(f"names must be strings, got {name!r}.")
    if prior is None:
        return Parameter(name, _shape(name, () if shape is None else shape), as_support(name, support))
    if not isinstance(prior, Distribution):
        raise TypeError(f"prior of {name} must be a torch distribution, got {type(prior).__name__}.")
    own = torch.Size(prior.batch_shape) + torch.Size(prior.event_shape)
    if shape is not None and _shape(name, shape) != own:
        raise ValueError(
            f"names has {name} of shape {tuple(_shape(name, shape))}, its prior has {tuple(own)}; use "
            "prior.expand(...)."
        )
    return Parameter(name, own, _support_of(name, prior) if support is None else as_support(name, support), prior)


def _support_of(name: str, prior: Distribution) -> Constraint:
    try:
        found: Any = prior.support
    except NotImplementedError:
        found = None
    if found is None:
        raise ValueError(f"prior of {name}: {type(prior).__name__} does not say its support; give support= too.")
    return found


def _shape(name: str, value: Any) -> torch.Size:
    try:
        shape = torch.Size((value,)) if isinstance(value, int) else torch.Size(tuple(value))
    except TypeError:
        raise TypeError(f"names: the shape of {name} must be a number or a tuple of numbers, got {value!r}.") from None
    if any(n < 1 for n in shape):
        raise ValueError(f"names: the shape of {name} must have numbers >= 1, got {tuple(shape)}.")
    return shape


def _labels(names: Any, size: int | None) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) and n for n in names):
        raise TypeError(f"names must be a list of strings, or a dictionary name -> shape; got {names!r}.")
    if size is not None and len(names) != size:
        raise ValueError(f"names has {len(names)} names, but there are {size} parameters.")
    if len(set(names)) < len(names):
        raise ValueError(f"names has {next(n for n in names if names.count(n) > 1)!r} twice.")
    return list(names)


def _vector(dim: int | None, names: Any, support: Any, prior: Any) -> Parameters:
    """A vector: of a support and prior for all of it, or of one for each entry."""
    if isinstance(support, Mapping):  # names is a list then
        labels = _labels(names, dim)
        for key in support:
            check_name("parameter in support", key, labels)
        support = [support.get(name) for name in labels]
    many = {"support": _listed(support), "prior": _listed(prior)}
    sizes = {name: len(value) for name, value in many.items() if value is not None}
    if isinstance(prior, Distribution):
        shape = torch.Size(prior.batch_shape) + torch.Size(prior.event_shape)
        if len(shape) != 1:
            raise ValueError(f"prior must be a law of vectors (dim,), got one of shape {tuple(shape)}; or name them.")
        sizes["prior"] = shape.numel()
    if names is not None:
        sizes["names"] = len(_labels(names, None))
    if dim is not None:
        sizes["dim"] = dim
    if not sizes:
        raise TypeError("dim is missing: the number of parameters; or give names, support or prior, one for each.")
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} has {n}" if name != "dim" else f"dim is {n}" for name, n in sizes.items())
        raise ValueError(f"names, support, prior and dim speak of different numbers of parameters: {told}.")
    size = next(iter(sizes.values()))
    labels = [f"x[{i}]" for i in range(size)] if names is None else _labels(names, size)
    if many["support"] is None and many["prior"] is None:
        if prior is not None and not isinstance(prior, Distribution):
            raise TypeError(
                "prior must be a torch distribution of the whole vector, a list of them, or a dictionary name -> law; "
                f"got {type(prior).__name__}."
            )
        bound = as_support("x", support) if prior is None or support is not None else _support_of("x", prior)
        return Parameters([Parameter("", torch.Size((size,)), bound, prior)], False, labels)
    if isinstance(prior, Distribution):
        raise TypeError("prior must be a list, one law for each parameter, where support is a list.")
    if support is not None and many["support"] is None:
        raise TypeError("support must be a list, one for each parameter, where prior is a list.")
    each = zip(labels, many["support"] or [None] * size, many["prior"] or [None] * size)
    parts = [_one(name, (), bound, law) for name, bound, law in each]
    return Parameters(parts, False, labels)


def _listed(value: Any) -> list[Any] | None:
    """A list of one thing for each parameter, or None where it is one for all."""
    if isinstance(value, tuple) and len(value) == 2 and all(v is None or isinstance(v, (int, float)) for v in value):
        return None  # a pair of bounds
    return list(value) if isinstance(value, (list, tuple)) else None


def as_support(name: str, value: Any) -> Constraint:
    """A support from torch's constraint, its name, or a pair of bounds.

    Raises:
        TypeError, ValueError: it is none of these; bounds out of order.
    """
    if value is None:
        return constraints.real
    if isinstance(value, Constraint):
        return value
    if isinstance(value, str):
        check_name(f"support of {name}", value, SUPPORTS)
        return getattr(constraints, value)
    if isinstance(value, (tuple, list)) and len(value) == 2:
        low, high = (
            sign * math.inf if v is None else as_float(f"support of {name}", v, finite=False)
            for v, sign in zip(value, (-1, 1))
        )
        if not low < high:
            raise ValueError(f"support of {name} must have its low end below its high end, got {tuple(value)}.")
        if low == -math.inf:
            return constraints.real if high == math.inf else constraints.less_than(high)
        return constraints.greater_than(low) if high == math.inf else constraints.interval(low, high)
    raise TypeError(
        f"support of {name} must be {_PAIR}, a torch constraint (an instance: greater_than(0.0)), or one of "
        f"{', '.join(SUPPORTS)}; got {value!r}."
    )
