"""What a reward looks at: the numbers that its module computes on the way to ``r``, where they can be seen.

A value is nearly a function of the reward's own view of the denoised state. A classifier's view are its logits; that of
a network whose output is one number is what its last layer with parameters is given (a linear read-out then makes r of
it). A forward hook on that one layer, present during the call alone, sees both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..precision import full_precision
from .problem import ControlProblem
from .rewards import Linear, Quadratic

_LARGEST = 512  # numbers in a view


class RewardView:
    """``view(x, y) -> (features (batch, size), r/alpha (batch,))`` at clean states, with their graph.

    Attributes:
        size: numbers in the features; 0 where nothing but r can be seen, or r has no gradient.
        gradient: whether r has one. Without it r is not called: features are empty, and r/alpha is 0.
        simple: whether r is linear or quadratic: it costs nothing, and there is no more to see.
        hidden: why nothing but r can be seen, in a few words; "" where there is no more to see (r is linear, quadratic
            or None), or r has no gradient.
    """

    def __init__(self, problem: ControlProblem) -> None:
        self.problem, self.gradient = problem, problem.has_gradient and problem.reward_function is not None
        self.size, self.hidden, self._layer, self._of_output = 0, "", None, False
        reward = problem.reward_function
        self.simple = isinstance(reward, (Linear, Quadratic))
        if not self.gradient or self.simple:
            return
        module = reward if isinstance(reward, nn.Module) else getattr(reward, "classifier", None)
        if not isinstance(module, nn.Module):
            self.hidden = f"the reward is a {type(reward).__name__}, no nn.Module"
            return
        reference = problem.reference
        x = reference.probe_ends(reference.probe_states(3, problem.dtype, problem.device))
        with torch.no_grad(), problem.evaluating():
            self._find(module, reference.decode(x, problem.draw_condition(3, 0)), problem.draw_condition(3, 0))

    def __deepcopy__(self, memo: Any) -> RewardView:
        return self  # a definition: a copied value looks at the same reward

    def _find(self, module: nn.Module, x: Tensor, y: Any) -> None:
        """The layer to look at."""
        seen: list[tuple[nn.Module, Any, Any]] = []
        note = lambda m, given, out: seen.append((m, given, out))  # noqa: E731
        handles = [m.register_forward_hook(note) for m in module.modules()]
        try:
            self.problem.reward(x, y)
        finally:
            for handle in handles:
                handle.remove()
        for m, given, out in reversed(seen):  # whole modules end after their parts
            if m is module and isinstance(out, Tensor) and out.ndim == 2 and 1 < out.shape[1] <= _LARGEST:
                self._layer, self._of_output, self.size = m, True, out.shape[1]
                return
            own = next(m.parameters(recurse=False), None) is not None and m is not module
            if own and given and isinstance(given[0], Tensor) and given[0].shape[0] == len(x):
                size = given[0].flatten(1).shape[1]
                if size <= _LARGEST:
                    self._layer, self.size = m, size
                    return
                break
        self.hidden = f"no layer of the reward's {type(module).__name__} with at most {_LARGEST} inputs is its last one"

    @full_precision()
    def __call__(self, x: Tensor, y: Any = None) -> tuple[Tensor, Tensor]:
        if not self.gradient:
            return x.new_zeros(x.shape[0], 0), x.new_zeros(x.shape[0])
        x = self.problem.reference.data_of(x, y)
        if self._layer is None:
            return x.new_zeros(x.shape[0], 0), self.problem.reward(x, y) / self.problem.alpha
        seen: list[Tensor] = []

        def look(module: nn.Module, given: Any, out: Any) -> None:
            seen.append(out if self._of_output else given[0])

        handle = self._layer.register_forward_hook(look)
        try:
            r = self.problem.reward(x, y)
        finally:
            handle.remove()
        features = torch.cat([part.flatten(1) for part in seen]).to(r.dtype)  # a piece for each part of the batch
        return features, r / self.problem.alpha


class InnerLayer:
    """What a pre-trained model computes before its last layer with parameters: of images, means over their pixels.

    Attributes:
        name: of the layer in the model. size: how many numbers a row.
    """

    def __init__(self, name: str) -> None:
        self.name, self.size = name, 0

    @classmethod
    def of(cls, problem: ControlProblem) -> InnerLayer | None:
        """That of the problem's model; None where it is no module, or its layer is given no numbers a row."""
        model = problem.reference.model
        if not isinstance(model, nn.Module):
            return None
        x, y = problem.reference.probe_states(3, problem.dtype, problem.device), problem.draw_condition(3, 0)
        called: list[tuple[nn.Module, Any]] = []
        note = lambda m, given, out: called.append((m, given))  # noqa: E731
        handles = [m.register_forward_hook(note) for m in model.modules() if not list(m.children())]
        try:
            with torch.no_grad(), problem.evaluating():
                problem.reference.predict(model, x, 0.5 * problem.horizon, y)
        finally:
            for handle in handles:
                handle.remove()
        for m, given in reversed(called):
            if next(m.parameters(), None) is not None:
                if not given or not isinstance(given[0], Tensor) or given[0].ndim < 2 or len(given[0]) != len(x):
                    return None
                found = cls(next(name for name, part in model.named_modules() if part is m))
                found.size = found._rows(given[0]).shape[1]
                return found if found.size <= _LARGEST else None
        return None

    def _rows(self, given: Tensor) -> Tensor:
        return given.flatten(2).mean(2) if given.ndim > 2 else given

    def watching(self, model: nn.Module, function: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """What a function that calls the model gives, and what the layer is given."""
        seen: list[Tensor] = []
        handle = model.get_submodule(self.name).register_forward_hook(lambda m, given, out: seen.append(given[0]))
        try:
            value = function()
        finally:
            handle.remove()
        return value, self._rows(seen[-1]).to(value.dtype)
