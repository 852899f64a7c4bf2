"""The optimiser's side of the loop: step sizes, averaged weights, finite gradients, and all of it as a state to save."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..methods.base import Regression
from ..tensors import as_float
from .least_squares import LinearSteps

__all__ = ["Descent", "Pace"]


class Pace:
    """The factor on the learning rate, and when to stop.

    With a fixed number of iterations: a short warm-up, a stretch at full step, a cosine decay to 0. Without one: at full
    step until the objective stops improving (or 70 % of the most iterations allowed have passed), then the same decay.
    """

    window = 100

    def __init__(self, iterations: int, adaptive: bool) -> None:
        self.iterations, self.adaptive = iterations, adaptive
        self.decay_from: int | None = None if adaptive else int(0.25 * iterations)
        self.last = iterations

    def factor(self, i: int, elapsed: float = 0.0) -> float:
        """Factor at iteration i; ``elapsed`` is the part of a time budget that is spent."""
        warm = min(1.0, (i + 1) / max(1.0, min(50.0, 0.05 * self.iterations)))
        part = elapsed
        if self.decay_from is not None and i >= self.decay_from:
            part = max(part, (i - self.decay_from + 1) / max(1, self.last - self.decay_from))
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))

    def observe(self, i: int, scores: Sequence[float]) -> None:
        """Look at the last scores (objectives, or negative logarithms of a residual); start the decay where they have stopped
        rising."""
        if self.decay_from is not None:
            return
        done = i + 1
        if done % 50 == 0 and done >= 2 * self.window:
            new = torch.tensor(scores[-self.window :], dtype=torch.float64)
            old = torch.tensor(scores[-2 * self.window : -self.window], dtype=torch.float64)
            noise = math.sqrt(float(new.var() + old.var()) / self.window)
            if float(new.mean() - old.mean()) < 2 * noise:
                self.decay_from = done
        if self.decay_from is None and done >= 0.7 * self.iterations:
            self.decay_from = done
        if self.decay_from is not None:
            self.last = min(self.iterations, done + max(self.window, done // 2))

    def state(self) -> dict[str, Any]:
        return {"decay_from": self.decay_from, "last": self.last}

    def restore(self, state: dict[str, Any]) -> None:
        if self.adaptive:
            self.decay_from, self.last = state["decay_from"], state["last"]


class Descent:
    """An optimiser over the trainable parameters, with an exponential average of them (bias-corrected).

    Args:
        linear: least-squares steps for the parameters they know, in iterations whose method gives them a regression.
        decay: of the average.
    """

    clip = 4.0

    def __init__(
        self,
        parameters: list[Tensor],
        optimizer: Any,
        learning_rate: float | None,
        default_rate: float,
        *,
        linear: LinearSteps | None = None,
        decay: float = 0.99,
    ) -> None:
        self.parameters, self.linear, self.decay = parameters, linear, decay
        self.factor = 1.0
        self.level: float | None = None  # running mean of the logarithm of the gradient's norm
        rate = default_rate if learning_rate is None else as_float("learning_rate", learning_rate, positive=True)
        self.optimizer = _make(parameters, optimizer, rate)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average = [torch.zeros_like(p) for p in parameters]
        self.weight = 0.0
        self.norm = float("nan")

    def begin(self, factor: float) -> None:
        self.factor = factor
        for group, rate in zip(self.optimizer.param_groups, self.base_rates):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, regression: Regression | None = None) -> None:
        """One step, unless a gradient is not finite: then nothing reaches the parameters.

        Args:
            regression: what the gradients are those of, where that is a regression of the shifts.

        Raises:
            NonFiniteError: with the number of entries concerned.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            raise RuntimeError("no gradient reached any parameter of the control; does its output depend on them?")
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(torch.isfinite(norm)):
            bad = sum(int((~torch.isfinite(g)).sum()) for g in gradients)
            total = sum(g.numel() for g in gradients)
            where = f"is not finite in {bad} of {total} entries" if bad else "overflows: its norm is not finite"
            cause = (
                "look at the derivative of the reward, drift or control (sqrt or norm at 0, for instance)"
                if bad
                else "training has diverged; use a smaller learning rate, or a reward that is less steep where paths go"
            )
            raise NonFiniteError(
                f"gradient {where}. Reward and paths were finite, so {cause}.",
                what="gradient",
                rows=bad,
            )
        self.norm = float(norm)
        self._clip(gradients)
        if self.linear is not None and regression is not None:
            self.linear.observe(regression)
            self.linear.step(self.factor)  # leaves its parameters without gradient
            for group in self.optimizer.param_groups:
                group["lr"] *= self.linear.slowing
        self.optimizer.step()
        torch._foreach_lerp_(self.average, list(self.parameters), 1 - self.decay)
        self.weight += (1 - self.decay) * (1 - self.weight)

    def _clip(self, gradients: list[Tensor]) -> None:
        """Scale gradients far above their running size down to ``clip`` times it: one path in a million that lingers at a saddle would else
        undo a hundred steps."""
        level = math.log(max(self.norm, 1e-300))
        if self.level is None:
            self.level = level
        if level > self.level + math.log(self.clip):
            torch._foreach_mul_(gradients, math.exp(self.level - level) * self.clip)
            level = self.level + math.log(self.clip)
        self.level += 0.1 * (level - self.level)

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the averaged parameters in place."""
        if self.weight > 0:
            for p, mean in zip(self.parameters, self.average):
                p.copy_(mean / self.weight)

    def averaged(self) -> list[Tensor]:
        return (
            [mean / self.weight for mean in self.average]
            if self.weight > 0
            else [p.detach().clone() for p in self.parameters]
        )

    # ------------------------------------------------------------ saving

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything as named tensors and plain values."""
        state = self.optimizer.state_dict()
        tensors: dict[str, Tensor] = {f"average.{i}": a for i, a in enumerate(self.average)}
        if self.linear is not None:
            tensors.update(self.linear.tensors())
        plain: dict[str, Any] = {}
        for index, entries in state["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    plain[f"{index}.{name}"] = value
        groups = [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]
        return tensors, {"state": plain, "groups": groups, "weight": self.weight, "level": self.level}

    def restore(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        state = self.optimizer.state_dict()
        entries: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                entries.setdefault(int(index), {})[key] = value
        for name, value in plain["state"].items():
            index, key = name.split(".", 1)
            entries.setdefault(int(index), {})[key] = value
        groups = [{**saved, "params": now["params"]} for saved, now in zip(plain["groups"], state["param_groups"])]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        for i, mean in enumerate(self.average):
            mean.copy_(tensors[f"average.{i}"])
        self.weight, self.level = plain["weight"], plain["level"]
        if self.linear is not None:
            self.linear.restore(tensors)


def _make(parameters: list[Tensor], optimizer: Any, rate: float) -> torch.optim.Optimizer:
    if optimizer is None:
        return torch.optim.Adam(parameters, lr=rate)
    if isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optimizer must be a function that makes one, parameters -> torch.optim.Optimizer (the parameters "
            "do not exist yet), e.g. optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3)."
        )
    if not callable(optimizer):
        raise TypeError(
            f"optimizer must be a function parameters -> torch.optim.Optimizer, got {type(optimizer).__name__}."
        )
    made = optimizer(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer(parameters) must return a torch.optim.Optimizer, got {type(made).__name__}.")
    return made
