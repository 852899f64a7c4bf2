"""A user's log density: checked, counted, with its score where it has one, and a finite value where it vanishes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..shapes import PerPath, States
from ..tensors import ask, check_output, probing

_SHAPE = "A log density gives one number per row, shape (batch,)."


class LogDensity:
    """``log_density(x)`` or ``log_density(x, y)``, and its gradient in x: by autograd, or by the user's ``score``.

    Attributes:
        differentiable: whether there is a gradient (settled by :meth:`probe`).
        values, gradients: rows evaluated so far by :meth:`value` and :meth:`value_and_score`.
    """

    def __init__(self, function: Callable[..., Tensor], score: Callable[..., Tensor] | None = None) -> None:
        if not callable(function):
            raise TypeError(f"log_density must be a function x -> (batch,), got {type(function).__name__}.")
        if score is not None and not callable(score):
            raise TypeError(f"score must be a function x -> (batch, dim), got {type(score).__name__}.")
        self.function, self.score = function, score
        self.differentiable = score is not None
        self.values = self.gradients = 0

    @property
    def __name__(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def modules(self) -> list[nn.Module]:
        """Those of the user's functions that are modules."""
        return [p for p in (self.function, self.score) if isinstance(p, nn.Module)]

    def __call__(self, x: States, y: Any = None) -> PerPath:
        """The user's function itself, ``(batch,)``; its gradient is the user's score where there is one."""
        if self.score is not None and torch.is_grad_enabled() and x.requires_grad:
            return _Scored.apply(x, self, y)  # type: ignore[no-any-return]
        return self._call(self.function, x, y)

    @staticmethod
    def _call(function: Callable[..., Tensor], x: Tensor, y: Any) -> Tensor:
        return ask("log_density", function, x, *(() if y is None else (y,)))

    def probe(self, x: Tensor, y: Any) -> None:
        """Call it once: check what it returns and find out whether it has a gradient.

        Raises:
            TypeError, ValueError: naming the function, what it returned and what it should.
        """
        more, alone = ("", "") if y is None else (", y", "x")
        called = f"log_density(x{more}), x {tuple(x.shape)}"
        leaf = x.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            try:
                with probing("log_density", called, alone, (leaf, y)):
                    value = self._call(self.function, leaf, y)
            except RuntimeError as error:
                if "requires grad" not in str(error) and "detach()" not in str(error):
                    raise
                with probing("log_density", called, alone, (x, y)):  # leaves torch: .numpy() refuses a graph
                    value = self._call(self.function, x, y)
            hint = _SHAPE
            if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == 1:
                hint += " Use .squeeze(-1)."
            elif isinstance(value, Tensor) and value.ndim == 2:
                hint += " Sum over the last dimension."
            elif isinstance(value, Tensor) and value.ndim == 0:
                hint += " Do not sum or average over the batch."
            check_output("log_density", value, (x.shape[0],), x, hint)
            if self.score is not None:
                with probing("score", called.replace("log_density", "score"), alone, (x, y)):
                    score = self._call(self.score, x, y)
                check_output("score", score, x.shape, x, "It is the gradient of log_density in x.")
                self.differentiable = True
            elif value.requires_grad:
                self.differentiable = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] is not None

    def takes(self, x: States, y: Any) -> bool:
        """Whether the function gives numbers of the dtype of x for it."""
        try:
            with torch.no_grad():
                return self._call(self.function, x, y).dtype == x.dtype
        except (RuntimeError, TypeError):  # a module of another precision
            return False

    def value(self, x: States, y: Any = None) -> PerPath:
        """Values ``(n,)`` without a graph; NaN and +inf as they come."""
        self.values += x.shape[0]
        with torch.no_grad():
            return self._call(self.function, x.detach(), y)

    def value_and_score(self, x: States, y: Any = None) -> tuple[PerPath, States]:
        """Values ``(n,)`` and scores ``(n, dim)``, without a graph; a score that is not finite is 0."""
        self.values, self.gradients = self.values + x.shape[0], self.gradients + x.shape[0]
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            value = self(leaf, y)
            score = torch.autograd.grad(value.sum(), leaf)[0]
        return value.detach(), torch.nan_to_num(score, nan=0.0, posinf=0.0, neginf=0.0)

    def gradient(self, x: States, y: Any = None) -> States:
        """The gradient ``(batch, dim)``, with its graph where x has one; 0 where it is not finite."""
        graph = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            leaf = x if graph else x.detach().requires_grad_(True)
            value = torch.autograd.grad(self(leaf, y).sum(), leaf, create_graph=graph)[0]
        finite = value.detach().isfinite().all(1)
        if bool(finite.all()):
            return value
        rows = finite.nonzero().flatten()  # again, without the others: 0 times inf would be NaN
        if len(rows) == 0:
            return torch.zeros_like(x)
        return torch.zeros_like(x).index_copy(0, rows, self.gradient(x[rows], None if y is None else y[rows]))


class _Scored(torch.autograd.Function):
    """The value of ``log_density`` with the user's score as its gradient (and the score's own derivatives beyond)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, density: LogDensity, y: Any) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.density, ctx.y = density, y
        return density._call(density.function, x, y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient.unsqueeze(1) * ctx.density._call(ctx.density.score, x, ctx.y), None, None
