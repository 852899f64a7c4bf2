"""``LogValue``: the base of value functions, kept as ``v/alpha``, the logarithm of ``psi``."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from ..chains.base import Chain


class LogValue(nn.Module):
    """Base of the value functions: ``at(x, t, y)`` is ``v(x, t)/alpha``, ``(batch,)``, for a 0-d t."""

    #: whether its value at the end is its own; else that is the reward's
    own_end: ClassVar[bool] = True

    @property
    def configuration(self) -> dict[str, Any]:
        """What a saved file says of it beside its kind, for ``from_saved``."""
        return {}

    def at(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        raise NotImplementedError

    def on_chain(self, chain: Chain) -> Callable[[int, Tensor, Any], Tensor]:
        """``(k, x, y) -> v/alpha`` at step k of a chain."""
        return lambda k, x, y: self.at(x, chain.times[k], y)
