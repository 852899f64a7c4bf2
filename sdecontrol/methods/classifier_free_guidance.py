"""``ClassifierFreeGuidance``: a conditional model, with weight, in the place of a reward (Ho & Salimans 2207.12598)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..controls.tuned import ModelControl
from ..problems.problem import ControlProblem
from ..processes.modules import copied
from ..processes.pretrained import call_model
from ..tensors import as_float, probing
from .base import ControlState, Method, Run, register


@register
@dataclass(frozen=True)
class ClassifierFreeGuidance(Method):
    """``eps = (1 + w) eps(x, s, y) - w eps(x, s)``, as a control of the unconditional model eps(x, s); nothing is
    trained.

    The problem's reference is the unconditional model, so this is
    ``u = (1 + w) g^-1 (drift of the conditional - drift of the reference)``: its KL, log-ratios and weights are towards
    the problem's own target, and ``SMC`` takes it as a proposal. (The mean of every step is the guided model's,
    exactly.) For w = 0 the samples are the
    conditional model's; then and only then, with exact models, their law is ``p(x | y)``, the target of
    ``r = log p(y | x)`` at alpha = 1. For w > 0 they are those of no tilted law in particular (of
    ``p(x) p(y | x)^(1+w)`` it would be if noising commuted with the power: Bradley & Nakkiran 2408.09000). The start is
    the reference's.

    Args:
        conditional: ``model(x, s, y) -> (batch, *shape)`` on the clock and in the parametrisation of the reference's
            model, y ``(batch, ...)``; such as ``sc.fit_score(data, schedule, condition=labels, drop=0.1)``, which
            serves as the reference too (as ``lambda x, s, y: model(x, s)`` in a problem with a condition). An nn.Module
            is copied, and put into evaluation mode. Saved files do not hold it: ``sc.load(...,
            control=solution.control)``.
        weight: w, any finite number. 0: the conditional model; -1: the reference.
        label: y, a number or a tensor (of one row); None: the problem's condition.

    Raises:
        ValueError: a reference that is no pre-trained model, clips its prediction, or takes the condition itself; no
            label; outputs of another shape. TypeError: a conditional model that cannot be called so.
    """

    conditional: Callable[..., Tensor] | None = None
    weight: float = 1.0
    label: Any = None

    default_iterations: ClassVar[int] = 0

    def __post_init__(self) -> None:
        as_float("weight", self.weight)
        if self.conditional is None or not callable(self.conditional):
            raise TypeError(
                "conditional must be a model (x, s, y) -> (batch, *shape), such as sc.fit_score(data, schedule, "
                f"condition=labels); got {type(self.conditional).__name__}."
            )

    def check(self, problem: ControlProblem) -> None:
        reference = problem.reference
        if not reference.pretrained:
            raise ValueError(
                "classifier-free-guidance needs a pre-trained model as reference (generative_sde, diffusion_chain or "
                f"masked_diffusion), got {type(reference).__name__}."
            )
        if reference.clip is not None:
            raise ValueError(
                f"the reference clips its prediction of x0 to {reference.clip}, which does not commute with the "
                "weight. Make the chain with clip=None."
            )
        if problem.condition is None and self.label is None:
            raise ValueError(
                "label is missing: classifier-free-guidance(label=None) takes the label from the problem's "
                "condition, and this problem has none."
            )

    def setup(self, run: Run) -> nn.Module:
        return ControlState(_Guided(run.problem, self.conditional, float(self.weight), self.label))


class _Guided(ModelControl):
    """The shift towards the conditional model's mean, times 1 + w; nothing on the learned start."""

    def __init__(self, problem: ControlProblem, conditional: Any, weight: float, label: Any) -> None:
        super().__init__(problem.reference)
        model = copied(conditional).eval() if isinstance(conditional, nn.Module) else conditional
        self._model = [model]  # in a list: not a part of this module
        self.strength, self.label = 1.0 + weight, label
        # one call, so that what is wrong with the model is said before anything is simulated
        x, y = problem.draw_start(3, 0), problem.draw_condition(3, 0)
        called = f"conditional(x, s, y), x {tuple(x.shape)}, y {tuple(self._condition(x, y).shape)}"
        with torch.no_grad(), probing("conditional", called):
            out = self.reference.predict(self.predicted, x, 0.5, y)
        self.reference.check_prediction("conditional", out, x, f"It is called as {called}.")
        if y is not None:
            self._check_unconditional(x, y, out)

    @torch.no_grad()
    def _check_unconditional(self, x: Tensor, y: Tensor, conditional: Tensor) -> None:
        """Raise where the reference depends on y, or is the conditional model itself.

        Raises:
            ValueError: saying how to pass the model without its condition.
        """
        plain, moved = (self.reference.predict(self.reference.model, x, 0.5, z) for z in (y, y.roll(1, 0)))
        if torch.equal(plain, conditional) or not torch.equal(plain, moved):
            raise ValueError(
                "the reference must be the unconditional model, but it depends on the problem's condition: pass "
                "generative_sde(lambda x, s, y: model(x, s), ...)."
            )

    def _condition(self, x: Tensor, y: Any) -> Any:
        if self.label is None:
            return y
        label = torch.as_tensor(self.label, device=x.device)
        return label.expand(len(x), *label.shape)

    def predicted(self, x: Tensor, s: Tensor, y: Any = None) -> Tensor:
        return call_model(self._model[0], x, s, self._condition(x, y))
