"""SDE objects of torchsde as plain functions."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import check_name

_NOISE_TYPES = ("additive", "diagonal", "general", "scalar")


class _Term(nn.Module):
    """``(x, t) -> value`` of a method ``(t, y)``; a module, so that the object's own modules are found (and put in
    evaluation mode)."""

    def __init__(self, owner: Any, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.owner, self.call = owner, call

    def forward(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:  # the protocol knows no condition
        return self.call(t, x)


def _one_of(both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], index: int, t: Tensor, y: Tensor) -> Tensor:
    return both(t, y)[index]


def torchsde_functions(sde: Any) -> tuple[_Term, _Term]:
    """Drift and diffusion ``(x, t)`` of an object with torchsde's protocol.

    Raises:
        TypeError: it lacks the protocol. ValueError: an unknown noise type, or a Stratonovich equation.
    """
    both = getattr(sde, "f_and_g", None)
    f = getattr(sde, "f", None) or (None if both is None else partial(_one_of, both, 0))
    g = getattr(sde, "g", None) or (None if both is None else partial(_one_of, both, 1))
    lacks = [n for n in ("noise_type", "sde_type") if not hasattr(sde, n)]
    lacks += [n for n, v in (("f", f), ("g", g)) if v is None]
    if f is None or g is None or lacks:
        raise TypeError(
            f"sde must have torchsde's protocol: f(t, y), g(t, y), noise_type, sde_type; {type(sde).__name__} lacks "
            f"{', '.join(lacks)}."
        )
    check_name("noise_type", sde.noise_type, _NOISE_TYPES)
    if sde.sde_type != "ito":
        raise ValueError(
            f"sde_type={sde.sde_type!r}: control problems are stated for Ito equations (the chain's steps and the "
            "likelihood ratios are Ito's). Add half of sum_j (dg_j/dy) g_j over the columns of g to f and declare "
            "sde_type='ito'."
        )
    return _Term(sde, f), _Term(sde, g)
