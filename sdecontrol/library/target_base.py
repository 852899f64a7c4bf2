"""What a named target is, and the register of the library's."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import NoExactSolution
from ..randomness import Place, generator_for
from ..tensors import check_count, check_tensor


class Target:
    """An unnormalised log density ``(batch, dim) -> (batch,)`` with what is known of it.

    Attributes:
        name, version, definition: of its card (empty for a target that is not in the library).
        dim: of the states.
        log_z: log of its integral, or None where it is not known.
        modes: ``(modes, dim)``, or None where they are not isolated, not known, or too many to list.
    """

    name: str = ""
    version: int = 0
    definition: str = ""
    dim: int
    log_z: float | None = None
    modes: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def has_samples(self) -> bool:
        """Whether :meth:`sample` gives exact samples."""
        return type(self)._draw is not Target._draw

    def sample(self, n: int, seed: int) -> Tensor:
        """``n`` independent exact samples ``(n, dim)`` in torch's default dtype, on the CPU.

        Raises:
            NoExactSolution: there is no exact sampler.
        """
        check_count("n", n)
        return self._draw(n, generator_for("cpu", seed, Place.TARGET_SAMPLES)).to(torch.get_default_dtype())

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        raise NoExactSolution(
            f"{self.name or type(self).__name__} has no exact sampler; take long Monte Carlo runs as a reference and "
            "give their error."
        )

    def _check(self, x: Tensor) -> None:
        check_tensor("x", x, shape=("batch", self.dim))

    def __repr__(self) -> str:
        return f"Target({self.name}, version {self.version}, dim={self.dim}, log_z={self.log_z})"


@dataclass(frozen=True)
class Card:
    """A named target, or a named problem. ``version`` is raised whenever the definition changes; ``make()`` makes
    it."""

    name: str
    version: int
    make: Callable[..., Any]

    @property
    def definition(self) -> str:
        """The definition in words."""
        return " ".join((self.make.__doc__ or "").split())


CARDS: dict[str, Card] = {}


def register(cards: dict[str, Any], kind: type[Card], name: str, **facts: Any) -> Callable:
    """Add a card of a kind to others; the docstring of the function that makes what it names is the definition."""

    def add(make: Callable[..., Any]) -> Callable[..., Any]:
        cards[name] = kind(name, make=make, **facts)
        return make

    return add


register_target = partial(register, CARDS, Card)
