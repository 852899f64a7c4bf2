"""The optimiser's side of the loop: steps, averaged weights, finite gradients, and all of it as a state to save."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..errors import NonFiniteError
from ..methods.base import Regression
from ..precision import at_least_single
from ..tensors import as_float
from .least_squares import LinearSteps
from .path_law import PathLaw

_SMALLEST = 1e-8  # radius below which no step is taken back: it cannot be what goes wrong
_WINDOW = 10  # batches
_WILD = 1e3  # spreads below the median: a path that has left all that the others are in


class Descent:
    """An optimiser over the trainable parameters, with an exponential average of them (bias-corrected).

    Args:
        linear: least-squares steps for the parameters they know, in iterations whose method gives them a regression.
        law: of the control, whose steps it measures and bounds. decay: of the average.
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
        law: PathLaw | None = None,
        decay: float = 0.99,
    ) -> None:
        if coarse := next((p.dtype for p in parameters if at_least_single(p.dtype) != p.dtype), None):
            warnings.warn(
                f"parameters of {coarse} are trained: steps smaller than their rounding are lost. Train them in "
                "float32 (module.float()); for mixed precision call solve inside torch.autocast.",
                stacklevel=4,
            )
        self.parameters, self.linear, self.law, self.decay = parameters, linear, law, decay
        self.farthest = math.nan  # KL of the largest step since begin()
        self.factor = 1.0
        self.level: float | None = None  # running mean of the logarithm of the gradient's norm
        rate = default_rate if learning_rate is None else as_float("learning_rate", learning_rate, positive=True)
        self.optimizer = _make(parameters, optimizer, rate)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average = [torch.zeros_like(p) for p in parameters]
        self.weight = 0.0
        self.norm = float("nan")
        self.radius = 1.0  # of regressions' steps, in KL: smaller after one that was taken back
        self.taken_back = 0
        self.returned = False  # whether the parameters are the kept ones again
        self.kept: list[Tensor] = []
        #: of the objective with the kept parameters: mean and its error, cut off, median and spread
        self.score = torch.full((4,), math.nan, dtype=torch.float64)
        self.best: list[Tensor] = []  # parameters after the best window of batches
        #: of that window: mean and variance of the mean; of the present one: batches, sums of both, and wild ones
        self.windows = torch.tensor([math.nan, math.nan, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)

    def begin(self, factor: float) -> None:
        self.factor, self.farthest = factor, math.nan
        found = 1.0 if self.law is None else self.law.rate
        for group, rate in zip(self.optimizer.param_groups, self.base_rates):
            group["lr"] = rate * factor * found * math.sqrt(self.radius)
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, at: Any = None) -> bool:
        """One step, shortened where it would move the path law too far; unless a gradient is not finite: then nothing
        reaches the parameters; or unless a regression's objective has clearly fallen, or its gradient has overflowed:
        then the parameters go back to the best so far instead.

        Args:
            at: what the gradients are those of, where that is a regression of the shifts; or anything with the
                ``states`` ``(>= K, batch, *event)`` of all steps of some paths and their ``condition``, where the path
                law before and after the step is compared. None: where nothing trained is a control.

        Returns:
            Whether a step was taken.

        Raises:
            NonFiniteError: with the number of entries concerned.
        """
        regression = at if isinstance(at, Regression) else None
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            raise RuntimeError("no gradient reached any parameter of the control; does its output depend on them?")
        ranks.mean_(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(torch.isfinite(norm)):
            bad = sum(int((~torch.isfinite(g)).sum()) for g in gradients)
            if not bad and regression is not None and self.take_back() is not None:
                return False
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
        if regression is not None and regression.objective is not None:
            if self._fallen(regression.objective) and self.take_back() is not None:
                return False
            self._keep(regression.objective)
            if self._worn(regression.objective) and self.take_back() is not None:
                return False
        self.shorten(gradients)
        before = [] if self.law is None or at is None else [p.detach().clone() for p in self.parameters]
        self._move(regression)
        if before:
            self._bound(at, before, regression)
        torch._foreach_lerp_(self.average, list(self.parameters), 1 - self.decay)
        self.weight += (1 - self.decay) * (1 - self.weight)
        return True

    def _move(self, regression: Regression | None) -> None:
        if self.linear is not None and regression is not None:
            self.linear.observe(regression)
            self.linear.step(self.factor, self.radius)  # leaves its parameters without gradient
            for group in self.optimizer.param_groups:
                group["lr"] *= self.linear.adam_scale
        self.optimizer.step()

    def _bound(self, at: Any, before: list[Tensor], regression: Regression | None) -> None:
        """Shorten the step from ``before`` where it has moved the path law too far, if it is looked at."""
        assert self.law is not None
        length = float(torch.nn.utils.get_total_norm(torch._foreach_sub(list(self.parameters), before))) ** 2
        if not self.law.due(length):
            return
        after = [p.clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, before)
        look = self.law.look(at)
        torch._foreach_copy_(self.parameters, after)
        whole = look.bound(self.parameters, before)
        self.law.saw(whole, length)
        self.farthest = self.law.moved if math.isnan(self.farthest) else max(self.farthest, self.law.moved)
        if self.linear is None or regression is None:  # least squares has a step size of its own
            found = self.law.rate
            self.law.learn(whole, self.factor)
            for group in self.optimizer.param_groups:
                group["lr"] *= self.law.rate / found

    def _keep(self, objective: Tensor) -> None:
        """Remember the best parameters so far and what they have reached; the next steps may be larger again."""
        self.radius = min(1.0, 1.1 * self.radius)
        scores = objective.double()
        low, middle, high = scores.quantile(scores.new_tensor([0.1, 0.5, 0.9])).tolist()
        mean, error = _cut_off(scores, middle, high - low)
        if self.kept:
            best, _, centre, spread = self.score.tolist()
            again, _ = _cut_off(scores, centre, spread)
            if self.returned or again < best:
                # the best of many is lucky: that is forgotten slowly, or by half where this batch is of the same
                # parameters
                self.score[0] += (0.5 if self.returned else 0.1) * (again - best)
                self.returned = False
                return
        self.kept = [p.detach().clone() for p in self.parameters]
        self.score.copy_(scores.new_tensor([mean, error, middle, high - low]))

    def _fallen(self, objective: Tensor) -> bool:
        """Whether the objective is clearly below the best so far, by four standard errors.

        Least-squares steps go far where targets are noisy; what one has done is seen in the next batch's objective,
        which costs nothing. Not the last one but the best is what it is compared with: many small falls make a large
        one. A single path may fall without bound, so objectives are cut off five spreads (between the outer deciles)
        from the median.
        """
        if not self.kept or self.returned or not bool(self.score.isfinite().all()):
            return False
        mean, error, middle, spread = self.score.tolist()
        now, its_error = _cut_off(objective.double(), middle, spread)
        return now < mean - 4 * math.hypot(error, its_error)

    def _worn(self, objective: Tensor) -> bool:
        """Whether the objective has worn away bit by bit, each bit too small to be seen in one batch: the mean of ten
        batches is clearly below that of the best ten, or single paths have run away in two of them. Then the parameters
        after the best ten are what one goes back to.
        """
        _, _, middle, spread = self.score.tolist()
        mean, error = _cut_off(objective.double(), middle, spread)
        wild = float(objective.min()) < middle - _WILD * spread
        self.windows[2:] += self.windows.new_tensor([1.0, mean, error**2, float(wild)])
        best, its_variance, count, total, variance, astray = self.windows.tolist()
        runaway = astray > 1
        if count < _WINDOW and not runaway:
            return False
        mean, variance = total / count, variance / count**2
        self.windows[2:] = 0.0
        if self.best and (runaway or mean < best - 4 * math.sqrt(variance + its_variance)):
            self.kept, self.returned = [p.clone() for p in self.best], False
            self.score[0], self.score[1] = best, math.sqrt(its_variance)
            return True
        if not runaway and not mean <= best:  # of none yet: nan
            self.best = [p.detach().clone() for p in self.parameters]
            self.windows[:2] = self.windows.new_tensor([mean, variance])
        return False

    @torch.no_grad()
    def take_back(self) -> Callable[[], None] | None:
        """Back to the best parameters so far, and smaller steps from there. The next batch tells anew what they reach.

        Returns:
            What undoes it; None, and nothing is done, where there are none, where they are in place, or where steps are
            tiny already.
        """
        if not self.kept or self.returned or self.radius < _SMALLEST:
            return None
        before = [p.detach().clone() for p in self.parameters]
        radius, rates = self.radius, [group["lr"] for group in self.optimizer.param_groups]

        @torch.no_grad()
        def undo() -> None:
            for p, value in zip(self.parameters, before):
                p.copy_(value)
            for group, rate in zip(self.optimizer.param_groups, rates):
                group["lr"] = rate
            self.radius, self.returned = radius, False
            self.taken_back -= 1

        for p, value in zip(self.parameters, self.kept):
            p.copy_(value)
            p.grad = None
        self.returned = True
        self.radius *= 0.25
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5
        self.taken_back += 1
        return undo

    def shorten(self, gradients: list[Tensor]) -> None:
        """Scale gradients far above their running size down to ``clip`` times it: one path in a million that lingers at
        a saddle would else undo a hundred steps."""
        level = math.log(max(self.norm, 1e-300))
        if self.level is None:
            self.level = level
        if level > self.level + math.log(self.clip):
            torch._foreach_mul_(gradients, math.exp(self.level - level) * self.clip)
            level = self.level + math.log(self.clip)
        self.level += 0.1 * (level - self.level)

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
        tensors.update({f"kept.{i}": value for i, value in enumerate(self.kept)})
        tensors.update({f"best.{i}": value for i, value in enumerate(self.best)})
        tensors["score"], tensors["windows"] = self.score, self.windows
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
        return tensors, {
            "state": plain,
            "groups": groups,
            "weight": self.weight,
            "level": self.level,
            "radius": self.radius,
            "rate": None if self.law is None else self.law.state(),
            "taken_back": self.taken_back,
            "returned": self.returned,
        }

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
        if self.law is not None and plain.get("rate") is not None:
            self.law.restore(plain["rate"])
        if "score" in tensors:  # checkpoints of earlier versions have none of it
            self.radius, self.taken_back, self.returned = plain["radius"], plain["taken_back"], plain["returned"]
            self.score.copy_(tensors["score"])
        if "windows" in tensors:
            self.windows.copy_(tensors["windows"])
        self.kept, self.best = (
            [tensors[f"{name}.{i}"].to(p.device) for i, p in enumerate(self.parameters) if f"{name}.{i}" in tensors]
            for name in ("kept", "best")
        )
        if self.linear is not None:
            self.linear.restore(tensors)


def _cut_off(scores: Tensor, middle: float, spread: float) -> tuple[float, float]:
    """Mean of the scores, none further than five spreads from the middle, and its standard error."""
    cut = scores.clamp(middle - 5 * spread, middle + 5 * spread)
    return float(cut.mean()), float(cut.std()) / math.sqrt(len(cut))


def _make(parameters: list[Tensor], optimizer: Any, rate: float) -> torch.optim.Optimizer:
    if optimizer is None:
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
        return torch.optim.Adam(parameters, lr=rate, fused=fused)
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
