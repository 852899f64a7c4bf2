"""``ClassifierGuidance``: value guidance with ``v = log p(label | x)`` (tutorial Section 8.1)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..controls.guidance import ClassifierValue, TweedieValue
from ..controls.token_guidance import guided_by
from ..problems.problem import ControlProblem
from ..problems.rewards import LogProb
from .base import ControlState, Method, Run, register


@register
@dataclass(frozen=True)
class ClassifierGuidance(Method):
    """``u = sigma^T grad_x log p(label | x_t)``: value guidance with ``r = log p(label | x)`` and alpha = 1; nothing is
    trained.

    It is :class:`ValueGuidance` with a value that a classifier makes, under the name that users of diffusion models
    know: both have the same control, of another value. With a ``LogProb`` reward, alpha = 1 and no classifier given it
    is ``ValueGuidance("tweedie")``; beyond that it takes a classifier that is not the reward, and one of noisy states.

    The problem says what is sampled: with ``reward=sc.LogProb(classifier, label)`` and alpha = 1 the target is the
    conditional law, and ``evaluate`` and the weights are towards the problem's own target, whatever the guidance.

    Args:
        classifier: logits ``(batch, classes)``. With ``noisy=True`` a classifier of noisy states, ``classifier(x, s)``
            on the clock of the reference's model, s ``(batch,)`` (Dhariwal & Nichol 2105.05233): if it is calibrated at
            every time this is the exact value function. With ``noisy=False`` a classifier of clean data,
            ``classifier(x)``, applied to the denoised state, with the error of Tweedie's formula [31].
            None: the classifier and label of the problem's own reward, where that is a ``LogProb``.
        label: the class; None: the problem's condition is the label.
        noisy: see above.
    """

    classifier: Callable[..., Tensor] | None = None
    label: int | None = None
    noisy: bool = False

    gaussian: ClassVar[bool] = True
    tokens: ClassVar[bool] = True
    default_iterations: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.classifier is not None and not callable(self.classifier):
            raise TypeError(
                f"classifier must be callable, x -> logits (batch, classes); got {type(self.classifier).__name__}."
            )

    def check(self, problem: ControlProblem) -> None:
        super().check(problem)
        if self.classifier is None and (self.noisy or not isinstance(problem.reward_function, LogProb)):
            raise ValueError(
                "classifier is missing: without one, classifier-guidance takes that of the problem's reward, which "
                "must be sc.LogProb(classifier, label) of clean states (noisy=False)."
            )
        if self.classifier is not None and self.label is None and problem.condition is None:
            raise ValueError(
                "label is missing: classifier-guidance(label=None) takes the label from the problem's condition, and "
                "this problem has none."
            )

    def setup(self, run: Run) -> nn.Module:
        given: Any = run.problem.reward_function if self.classifier is None else self
        if self.noisy:
            value = ClassifierValue(run.problem, given.classifier, given.label)
        else:
            value = TweedieValue(run.problem, run.chain, given.classifier, given.label)
        return ControlState(guided_by(value, run.problem, run.chain))
