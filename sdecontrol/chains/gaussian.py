"""Euler-Maruyama, and the exact transitions of linear SDEs, as chains."""

import math
from typing import Any

import torch
from torch import Tensor

from ..processes.laws import factor
from ..processes.linear import LinearSDE
from ..processes.sde import SDE
from ..shapes import Scale, States
from .base import AffineStep, Chain


class EulerChain(Chain):
    """Euler-Maruyama: ``mean = x + h b(x, t_k)``, ``scale = sqrt(h) sigma(x, t_k)``, ``c = sqrt(h) u``. Weak order 1,
    strong order 1/2 (1 for additive noise)."""

    scheme = "euler"

    def __init__(self, sde: SDE, clock: list[float], dtype: torch.dtype, device: torch.device) -> None:
        self.reference = sde
        self.set_times(clock, dtype, device)
        self.event_shape, self.control_shape = sde.event_shape, sde.control_shape
        self.noise_shape = sde.control_shape
        self.forget()
        self._roots = [math.sqrt(h) for h in self.step_sizes]
        constant = sde.constant_diffusion
        self._scales = None
        if constant is not None:
            made: dict[float, Tensor] = {}
            constant = constant.to(dtype=dtype, device=device) if constant.ndim == 0 else constant
            self._scales = [made.setdefault(root, constant * root) for root in self._roots]

    def __reduce__(self) -> tuple[Any, ...]:  # the terms of the grid are closures, made again
        return type(self), (self.reference, self.clock, self.times.dtype, self.times.device)

    def forget(self) -> None:
        self._terms = self.reference.on_grid(self.times[:-1])

    def kernel(self, k: int, x: States, condition: Any = None) -> tuple[States, Scale]:
        drift, sigma = self._terms(k, x, condition)
        scale = self._scales[k] if self._scales is not None else sigma * self._roots[k]
        return torch.add(x, drift, alpha=self.step_sizes[k]), scale

    def mean_matrix(self, k: int) -> Tensor | None:
        if not isinstance(self.reference, LinearSDE):
            return None
        A = self.reference.A_at(self.times[k]).to(self.times)
        return torch.eye(len(A), dtype=A.dtype, device=A.device) + self.step_sizes[k] * A

    def affine_steps(self) -> list[AffineStep] | None:
        linear = self.reference.as_linear()
        if linear is None:
            return None
        eye = torch.eye(linear.event_shape[0], dtype=torch.float64)
        steps = []
        for t, h in zip(self.clock, self.step_sizes):
            A, a, sigma = (torch.from_numpy(c) for c in linear.coefficients(t))
            noise = torch.eye(sigma.shape[1], dtype=torch.float64)
            steps.append(AffineStep(eye + h * A, h * a, h**0.5 * sigma, h**0.5 * noise))
        return steps

    def gain(self, k: int) -> float:
        return self._roots[k]


class TransitionChain(Chain):
    """The exact transitions of a linear SDE, the control held constant over each step.

    The noise is d-dimensional, ``scale`` the symmetric root of the transition covariance, and ``c = C u`` with
    ``scale C = int Phi sigma dr``; where m != d the inverse gives the control of minimum norm.
    """

    scheme = "exact"

    def __init__(self, sde: LinearSDE, clock: list[float], dtype: torch.dtype, device: torch.device) -> None:
        self.reference = sde
        self.set_times(clock, dtype, device)
        self.event_shape, self.control_shape = sde.event_shape, sde.control_shape
        self.noise_shape = sde.event_shape

        def made(s: float, t: float) -> tuple[AffineStep, AffineStep]:
            matrix, shift, cov, effect = sde.transition_and_gain(s, t)
            root = factor(cov)
            step = AffineStep(matrix, shift, root, torch.linalg.pinv(root, hermitian=True) @ effect)
            return step, AffineStep(*(p.to(device=device, dtype=dtype) for p in step))

        self._steps, self._cast = map(list, zip(*sde.by_step(clock, made)))

    def kernel(self, k: int, x: States, condition: Any = None) -> tuple[States, Scale]:
        matrix, shift, root, _ = self._cast[k]
        return x @ matrix.mT + shift, root.unsqueeze(0)

    def mean_matrix(self, k: int) -> Tensor | None:
        return self._cast[k][0]

    def affine_steps(self) -> list[AffineStep]:
        return self._steps

    def gain(self, k: int) -> Tensor:
        return self._cast[k][3]
