"""A controlled SDE in torchsde's protocol, and what kind of noise it has."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..counting import counted_control
from ..processes.sde import SDE
from ..randomness import Place, generator_for
from ..shapes import Controls, Scalar, Scale, States
from ..tensors import apply_scale, check_output, is_matrix_scale


@dataclass(frozen=True)
class NoiseKind:
    """The noise of an SDE, in torchsde's words.

    Attributes:
        name: "additive" (does not depend on the state), "diagonal" (each state has its own noise, whose strength
            depends on that state alone), "scalar" (one noise for all states), "general".
        matrix: the diffusion is a matrix ``(batch, d, m)``; else it multiplies elementwise.
    """

    name: str
    matrix: bool


def noise_kind(sde: SDE, x: States, t: Scalar) -> NoiseKind:
    """Find the kind of noise by evaluating the diffusion around states x at time t."""
    few = x[:8] if len(x) >= 8 else x[:1].expand(8, *x.shape[1:])  # a few distinct states, all starts being perhaps one
    steps = torch.linspace(0.0, 0.2, 8, dtype=x.dtype, device=x.device).reshape(-1, *(1,) * (x.ndim - 1))
    x = few + steps * (1 + few.abs())
    leaf = x.detach().requires_grad_(True)
    with torch.enable_grad():
        sigma = sde.diffusion(leaf, t)
        reached = sigma.requires_grad and torch.autograd.grad(sigma.sum(), leaf, allow_unused=True)[0] is not None
    matrix = is_matrix_scale(sigma, sde.event_ndim)
    with torch.no_grad():
        moved = sde.diffusion(x + 0.1 * (1 + x.abs()), t)
        if not reached and _close(sigma.detach(), moved):
            return NoiseKind("additive", matrix)
        if matrix:
            return NoiseKind("scalar" if sigma.shape[-1] == 1 else "general", True)
        return NoiseKind("diagonal" if _own(sde, x, t) else "general", False)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=1e-6, atol=0.0, equal_nan=True).all())


def _own(sde: SDE, x: States, t: Scalar) -> bool:
    """Whether entry i of an elementwise diffusion depends on entry i of the state alone: moving other entries (a random
    half of them, several times) leaves it as it is."""
    base = sde.diffusion(x, t)
    if base.shape != x.shape:
        return x[0].numel() == 1
    generator = generator_for(x.device, 0, Place.DIFFUSION_ENTRIES)
    for _ in range(8):
        moved = torch.rand(x.shape, generator=generator, device=x.device) < 0.5
        there = sde.diffusion(torch.where(moved, x + 0.1 * (1 + x.abs()), x), t)
        if not _close(there[~moved], base[~moved]):
            return False
    return True


def control_at(control: Any, x: States, t: Scalar, condition: Any, shape: torch.Size) -> Controls:
    """``u(x, t)`` of any control at a time t, which need not be on a grid."""
    if hasattr(control, "at"):
        return counted_control(control, control.at, lambda *_: len(x))(x, t, condition)
    t = t.expand(x.shape[0])
    u = control(x, t) if condition is None else control(x, t, condition)
    return check_output("control", u, (x.shape[0], *shape), x, "A control is called as control(x, t), t (batch,).")


class ControlledSDE:
    """``dX = (b + sigma u) dt + sigma dW`` in torchsde's protocol, on flattened states ``(batch, d)``.

    With ``stratonovich`` the drift is that of the Stratonovich equation of the same process, ``b + sigma u - c/2``,
    ``c = sum_j (d sigma_j/dx) sigma_j`` over the columns of sigma, by autograd.

    Args:
        control: any control, or None.
        diagonal: give elementwise noise as ``(batch, d)`` under torchsde's name "diagonal" (which is how its products
            with the noise are formed), whatever its kind.
    """

    def __init__(
        self,
        sde: SDE,
        kind: NoiseKind,
        control: Any = None,
        condition: Any = None,
        *,
        stratonovich: bool = False,
        diagonal: bool = False,
    ) -> None:
        self.sde, self.kind, self.control, self.condition = sde, kind, control, condition
        self.sde_type = "stratonovich" if stratonovich else "ito"
        self.noise_type = "diagonal" if diagonal and not kind.matrix else kind.name
        self.corrected = stratonovich and kind.name != "additive"

    def state(self, y: Tensor) -> Tensor:
        """``(batch, d)`` as ``(batch, *event)``."""
        return y.unflatten(1, self.sde.event_shape)

    def terms(self, t: Scalar, x: States) -> tuple[States, Scale, Controls | None]:
        """Drift, diffusion and control at states x."""
        t = t.to(x)
        drift, sigma, u = self.sde.drift(x, t, self.condition), self.sde.diffusion(x, t), None
        if self.control is not None:
            u = control_at(self.control, x, t, self.condition, self.sde.control_shape)
            drift = drift + apply_scale(sigma, u, self.sde.event_ndim)
        if self.corrected:
            drift = drift - 0.5 * self._correction(x, t)
        return drift, sigma, u

    def _correction(self, x: States, t: Scalar) -> States:
        create = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = x if create and x.requires_grad else x.detach().requires_grad_(True)
            sigma = self.sde.diffusion(leaf, t)
            if not sigma.requires_grad:
                raise TypeError(
                    "diffusion depends on the state but has no gradient (it left torch): Stratonovich solvers need its "
                    "derivative. Write it in torch operations, or use scheme='euler' or 'milstein'."
                )
            if self.kind.matrix:
                return _column_derivatives(sigma, leaf, create)
            if self.kind.name == "diagonal":  # the Jacobian is diagonal: its product with sigma is one product
                return torch.autograd.grad(sigma, leaf, sigma, create_graph=create)[0]
            flat = sigma.expand(leaf.shape).flatten(1)
            rows = [
                torch.autograd.grad(s.sum(), leaf, create_graph=create, retain_graph=True)[0].flatten(1)[:, i] * s
                for i, s in enumerate(flat.unbind(1))
            ]
            return torch.stack(rows, 1).reshape(leaf.shape)

    def product(self, sigma: Tensor, v: Tensor) -> Tensor:
        """``sigma v`` for flattened v ``(batch, m)``, flattened."""
        v = v if self.kind.matrix else self.state(v)
        return apply_scale(sigma, v, self.sde.event_ndim).flatten(1)

    # torchsde's protocol

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.terms(t, self.state(y))[0].flatten(1)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        x = self.state(y)
        return self._layout(self.sde.diffusion(x, t.to(x)), x)

    def _layout(self, sigma: Tensor, x: Tensor) -> Tensor:
        if self.kind.matrix:
            return sigma.expand(x.shape[0], *sigma.shape[1:])
        return sigma.expand(x.shape).flatten(1)

    def g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        x = self.state(y)
        return self.product(self.sde.diffusion(x, t.to(x)), v)

    def f_and_g(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self.state(y)
        drift, sigma, _ = self.terms(t, x)
        return drift.flatten(1), self._layout(sigma, x)

    def f_and_g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        drift, sigma, _ = self.terms(t, self.state(y))
        return drift.flatten(1), self.product(sigma, v)


def _column_derivatives(sigma: Tensor, x: Tensor, create: bool) -> Tensor:
    """``sum_j (d sigma_j/dx) sigma_j`` over the columns of a matrix ``(batch, d, m)``: a Jacobian-vector product each,
    as the derivative of a vector-Jacobian product in its vector."""
    total: Any = 0
    for column in sigma.unbind(-1):
        v = torch.zeros_like(column, requires_grad=True)
        product = torch.autograd.grad(column, x, v, create_graph=True, retain_graph=True)[0]
        if product.requires_grad:
            one = torch.autograd.grad(product, v, column, create_graph=create, retain_graph=True, allow_unused=True)[0]
            total = total if one is None else total + one
    return total if isinstance(total, Tensor) else torch.zeros_like(x)
