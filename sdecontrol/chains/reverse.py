"""A reverse law: kernels backwards of which the target is made, ``pi(x_K) prod_k B_k(x_k | x_{k+1})``, as annealed
Langevin has them.

With the same scale as the forward kernel, ``B_k: x_k = mean'_k(x_{k+1}) + scale_k (xi' - b_k)``, ``xi' ~ N(0, I)``; the
control enters forward with + and backward with -, ``b_k`` being its shift at ``(x_{k+1}, t_{k+1})`` (Vargas et al.
2307.01050, Controlled Monte Carlo Diffusions; at the last step its time is ``t_{K-1}``, the last at which a chain has a
control). The target's part of a path is then the logarithm of::

    p0(x_K) prod_k B_k(x_k | x_{k+1}) / ( p0(x_0) prod_k F^0_k(x_{k+1} | x_k) ),

F^0 the forward kernels without control: 0 for a reference that is reversible with respect to p0, as Ornstein-Uhlenbeck
is. With the reward ``log rho - log p0`` the total is ``R`` with ``E[exp(R) dQ0/dP^u] = Z`` exactly, for any control and
any number of steps, since all kernels are normalised.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..shapes import NoisePaths, Noises, Scale, States
from ..tensors import event_sum


class ReverseLaw:
    """The kernels backwards of a chain.

    Args:
        gains: of the chain's controls at every step, numbers.
        noise_ndim: dimensions of one noise.
        controlled: whether the target depends on the control: it enters the kernels backwards, too.
    """

    def __init__(self, gains: list[float], noise_ndim: int, controlled: bool) -> None:
        after = [*gains[1:], gains[-1]]
        #: from the shift of the step that begins where step k ends to one of step k
        self.ratios = [own / later for own, later in zip(gains, after)]
        self.noise_ndim, self.controlled = noise_ndim, controlled

    def kernel(self, k: int, end: States, condition: Any = None) -> tuple[States, Scale]:
        """Mean and scale (elementwise, the forward one) of ``x_k`` given ``x_{k+1} = end``, without control."""
        raise NotImplementedError

    def log_origin(self, x: Tensor) -> Tensor:
        """Log density of the law that the chain starts from, up to a constant, ``(..., batch)``."""
        raise NotImplementedError

    def draw(self, k: int, x: States, end: States, condition: Any = None) -> Noises:
        """``(x_k - mean'_k(x_{k+1})) / scale_k``: what would have made the step backwards without control."""
        mean, scale = self.kernel(k, end, condition)
        return (x - mean) / scale

    def shift(self, k: int, end: States, shift: Callable[[int, States, Any], Noises], condition: Any = None) -> Noises:
        """``b_k = gain_k u(x_{k+1}, t_{k+1})`` of a control with these shifts."""
        return shift(min(k + 1, len(self.ratios) - 1), end, condition) * self.ratios[k]

    def shifts(self, forward: NoisePaths, last: Noises) -> NoisePaths:
        """``b_k`` of all steps from the forward shifts and the last step's at ``x_K``."""
        after = torch.cat((forward[1:], last.unsqueeze(0)))
        return after * after.new_tensor(self.ratios).reshape(-1, *(1,) * (after.ndim - 1))

    def log_step(self, x: Tensor, end: Tensor, draw: Tensor, back: Tensor, b: Tensor | None) -> Tensor:
        """``log p0(x_{k+1}) B_k(x_k | x_{k+1}) / (p0(x_k) F^0_k(x_{k+1} | x_k))``, ``(..., batch)``.

        Args:
            x, end: ``x_k`` and ``x_{k+1}``. draw: ``c_k + xi_k``. back: :meth:`draw` of it. b: the control's ``b_k``;
                None: without.
        """
        back = back if b is None else back + b
        return (
            event_sum(0.5 * (draw.square() - back.square()), self.noise_ndim)
            + self.log_origin(end)
            - self.log_origin(x)
        )

    def log_control(self, back: Tensor, b: Tensor) -> Tensor:
        """``log B^u_k/B^0_k``, ``(..., batch)``."""
        return -event_sum(b * (back + 0.5 * b), self.noise_ndim)
