"""A user's log density: checked, counted, in unconstrained coordinates, with its score where it has one."""

import math
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import warn
from ..shapes import PerPath, States
from ..tensors import ask, check_output, probing
from .parameters import Parameters
from .user_function import UserFunction

_MUCH_NOISE = 2.0  # standard deviation, from which weights are too uneven
_SHAPE = "A log density gives one number per row, shape (batch,)."


class LogDensity:
    """``log_density(v)`` or ``log_density(v, y)`` as a function of the coordinates x of the parameters v, and its
    gradient in x: by autograd, or by the user's ``score`` (in v).

    With parameters that have supports, ``log |dv/dx|`` is added, and where x is so far out that v is not in its support
    (an exponential overflows) the log density is -inf and the user's function is not asked; with priors, their log
    density is added.

    Args:
        function: the user's. score: its gradient in v, ``(batch, size) -> (batch, size)``.
        parameters: what it is a function of; None: of the coordinates themselves.
        arrays, vectorised, workers: of :class:`UserFunction`.
        name: of the function, for errors.

    Attributes:
        differentiable: whether there is a gradient (settled by :meth:`probe`).
        values, gradients: rows at which the function was asked for so far, and those with a gradient.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        score: Callable[..., Any] | None = None,
        *,
        parameters: Parameters | None = None,
        arrays: str | None = None,
        vectorised: bool = True,
        workers: int | Executor | None = None,
        name: str = "log_density",
    ) -> None:
        self.user = UserFunction(function, name, arrays=arrays, vectorised=vectorised, workers=workers)
        if score is not None and not callable(score):
            raise TypeError(f"score must be a function x -> (batch, dim), got {type(score).__name__}.")
        if score is not None and parameters is not None and parameters.named:
            raise ValueError("score goes with a vector of parameters, not with a dictionary of them; leave it out.")
        self.function, self.score, self.parameters = function, score, parameters
        self.plain = parameters is None or (parameters.identity and not parameters.has_priors)
        self.differentiable = score is not None
        self.values = self.gradients = 0

    @property
    def __name__(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def evaluations(self) -> int:
        """So far; a value with its gradient counts as two."""
        return self.values + self.gradients

    def modules(self) -> list[nn.Module]:
        """Those of the user's functions that are modules."""
        return [p for p in (self.function, self.score) if isinstance(p, nn.Module)]

    def __call__(self, x: States, y: Any = None) -> PerPath:
        """``(batch,)``, with its graph where x wants one; its gradient is the user's score where there is one."""
        wanted = torch.is_grad_enabled() and x.requires_grad
        self.values += x.shape[0]
        self.gradients += x.shape[0] if wanted and self.differentiable else 0
        if self.plain:
            return self._inner(x, y, wanted).to(x.dtype)
        assert self.parameters is not None
        values, ladj, inside = self.parameters.constrained(x)
        level = self._inner(self.parameters.as_argument(values), y, wanted).to(x.dtype)
        if self.parameters.has_priors:
            level = level + self.parameters.log_prior(values)
        total = level + ladj
        return total if bool(inside.all()) else torch.where(inside, total, -math.inf)

    def _inner(self, values: Any, y: Any, wanted: bool) -> Tensor:
        if wanted and self.score is not None:
            return _Scored.apply(values, self, y)  # type: ignore[no-any-return]
        if wanted and not self.user.graph:
            with torch.no_grad():
                return self.user(values, y)
        return self.user(values, y)

    def scores(self, values: Tensor, y: Any) -> Tensor:
        """The user's score, ``(batch, size)``, from numpy's arrays where it is of these."""
        rest = () if y is None else (y,)
        if self.user.arrays == "numpy" and not isinstance(self.score, nn.Module):
            given = (values.detach().cpu().double().numpy(), *(v.detach().cpu().numpy() for v in rest))
            return torch.as_tensor(self.score(*given), device=values.device).to(values.dtype)  # type: ignore[misc]
        return ask("score", self.score, values, *rest)  # type: ignore[arg-type]

    def probe(self, x: Tensor, y: Any) -> torch.dtype:
        """Call it on a few states: check what it returns and find out whether it has a gradient; the dtype that it
        gives for that of x.

        Raises:
            TypeError, ValueError: naming the function, what it returned and what it should.
        """
        name, more, alone = self.user.name, *(("", "") if y is None else (", y", "x"))
        form = f"x {tuple(x.shape)}" if self.plain else "x its parameters"
        called = f"{name}(x{more}), {form}"
        leaf = x.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            values = leaf if self.parameters is None else self.parameters(leaf)
            value = self.user.settle(values, y, called, alone)
            self.values += self.user.asked
            hint = _SHAPE
            if value.ndim == 2 and value.shape[1] == 1:
                hint += " Use .squeeze(-1)."
            elif value.ndim == 2:
                hint += " Sum over the last dimension."
            elif value.ndim == 0:
                hint += " Do not sum or average over the batch; a function of one point goes with vectorised=False."
            if not value.is_floating_point():
                hint = f"Return torch.as_tensor(v, dtype=x.dtype). {hint}"
            rows = x.shape[0] if self.user.vectorised else len(value)
            like = x if not value.is_floating_point() else x.to(value.dtype)
            check_output(name, value, (rows,), like, hint)
            if self.score is not None:
                with probing("score", called.replace(name, "score"), alone, (x, y)):
                    score = self.scores(values.detach(), y)
                check_output("score", score, values.shape, x, f"It is the gradient of {name} in its argument.")
                self.differentiable = True
            elif value.requires_grad:
                self.differentiable = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] is not None
                self.gradients += rows
        self.user.settled = True
        if self.user.noise:
            self._say_noisy()
        if self.user.graph and not self.differentiable:
            self.user.graph = False
        return value.dtype

    def _say_noisy(self) -> None:
        """Gradients of noise lead nowhere, and no value is asked for again where it decides: then values that are
        estimates do (Andrieu & Roberts 2009)."""
        self.differentiable = False
        noise = self.user.noise
        much = f" Few draws would carry all weight: bring it below {_MUCH_NOISE:g}." if noise > _MUCH_NOISE else ""
        warn(
            f"{self.user.name} is noisy: two calls at the same points differ, by a standard deviation of {noise:.2g}. "
            "Samplers then move by its values alone, each of them asked for once (pseudo-marginal): log Z and samples "
            "are right where exp(log_density) is an unbiased estimate, as a particle filter's likelihood is, and only "
            f"there. If it should not be random, fix its seed, or put its model in evaluation mode.{much}",
            UserWarning,
            stacklevel=4,
        )

    def takes(self, x: States, y: Any) -> bool:
        """Whether the function gives numbers of the dtype of x for it."""
        if self.user.arrays == "numpy":
            return True
        self.values += len(x)
        try:
            with torch.no_grad():
                values = x if self.parameters is None else self.parameters(x)
                return self.user(values, y).dtype == x.dtype
        except (RuntimeError, TypeError):  # a module of another precision
            return False

    def value(self, x: States, y: Any = None) -> PerPath:
        """Values ``(n,)`` without a graph; NaN and +inf as they come."""
        with torch.no_grad():
            return self(x.detach(), y)

    def value_and_score(self, x: States, y: Any = None) -> tuple[PerPath, States]:
        """Values ``(n,)`` and scores ``(n, dim)``, without a graph; a score that is not finite is 0."""
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
    """The value of the user's function with the user's score as its gradient (and the score's own derivatives
    beyond)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, density: LogDensity, y: Any) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(values)
        ctx.density, ctx.y = density, y
        return density.user(values, y).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (values,) = ctx.saved_tensors
        return gradient.unsqueeze(1) * ctx.density.scores(values, ctx.y), None, None
