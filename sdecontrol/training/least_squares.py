"""Damped least-squares steps for the parameters in which a control is linear."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ranks
from ..controls.linear_part import Gram, LinearPart
from ..errors import BadFileError
from ..methods.base import Regression


class LinearSteps:
    """Levenberg-Marquardt steps ``theta <- theta - s/2 (G + damping D)^{-1} grad``, s the step size, D the diagonal of
    G and a tenth of its mean.

    For a regression on fixed targets a full, undamped step is its least-squares solution. The targets move with the
    control, and may be noisy:

    * steps are damped by the square of what the loss has fallen to (its running geometric mean against the first
      value): cautious while it is large, full least squares as it vanishes, cautious again at once where it rises; and
      not below a hundred-thousandth as long as the loss is above a nat: features that cancel on the batch to less than
      three thousandths of what each is do not beyond it, and single paths would run away there;
    * the step size grows while successive steps agree in direction (in the metric G) and falls while they do not (after
      Kesten 1958, Ann. Math. Statist. 29): without noise it stays at 1, and where noise dominates it falls like 1/t.
      Other steps follow it (``adam_scale``);
    * no step moves the path law by more than half the control's own KL (or half a nat).

    The moments G are averaged over iterations.
    """

    decay = 0.8
    least, most = 1e-8, 10.0  # damping
    cancelling = 1e-5  # damping at a loss of a nat or more
    gain, agreement = 0.5, 0.2  # the step size is 1/(1 + n), n moving by gain (agreement - cosine)
    part_kl = 0.5

    def __init__(self, parts: Sequence[LinearPart]) -> None:
        self.parts = list(parts)
        self.grams: list[Gram] = []
        self.directions: list[Tensor] = []
        self.first = self.level = 0.0  # logarithms of the loss
        self.disagreements = 0.0
        self.count = 0

    @property
    def step_size(self) -> float:
        return 1 / (1 + self.disagreements)

    @property
    def damping(self) -> float:
        fallen = math.exp(min(100.0, 2 * (self.level - self.first)))
        return min(self.most, max(self.least, fallen, self.cancelling * math.exp(min(0.0, self.level))))

    @property
    def adam_scale(self) -> float:
        """Factor for steps whose size does not vanish with the gradient (Adam's): the step size, and the root of what
        the loss has fallen to."""
        return self.step_size * math.exp(0.5 * min(0.0, self.level - self.first))

    def observe(self, batch: Regression) -> None:
        """Take in the states of a batch and the loss there."""
        level = math.log(max(batch.loss, 1e-300))
        if not self.count:
            self.first = self.level = level
        self.level += (1 - self.decay) * (level - self.level)
        new = [
            part.gram(batch.chain, batch.states, batch.condition, batch.weights, batch.step_weights)
            for part in self.parts
        ]
        ranks.mean_([block for gram in new for block in gram.blocks])
        self.grams = [old.lerp_(g, 1 - self.decay) for old, g in zip(self.grams, new)] if self.count else new
        self.count += 1

    @torch.no_grad()
    def step(self, factor: float, radius: float = 1.0) -> None:
        """One step from the parameters' gradients, which are then set to None, so that no other optimiser takes them.

        Args:
            factor: of the step. radius: of the largest change of the path law, in KL.
        """
        gradients = [
            part.gather([torch.zeros_like(p) if p.grad is None else p.grad for p in part.parameters]).double()
            for part in self.parts
        ]
        factors = [gram.damped(self.damping, g.shape[1]) for gram, g in zip(self.grams, gradients)]
        # contiguous as a checkpoint gives it back: sums have an order
        directions = [(-damped.solve(g)).contiguous() for damped, g in zip(factors, gradients)]
        # G of a direction, without a product: (G + D) direction = -gradient
        images = [-g - damped.added * d for damped, g, d in zip(factors, gradients, directions)]
        self._follow(directions, images)
        for part, gram, direction, image in zip(self.parts, self.grams, directions, images):
            length = 0.5 * self.step_size * factor
            kl = 0.5 * length**2 * max(0.0, _dot(direction, image))
            most = radius * self.part_kl
            if kl > most:
                now = part.gather(part.parameters).double()
                most *= max(1.0, 0.5 * _dot(now, gram.product(now)))
                length *= min(1.0, math.sqrt(most / kl))
            step = length * direction
            for p, move in zip(part.parameters, part.scatter(step.to(part.parameters[0].dtype))):
                p.add_(move)
            for p in (*part.parameters, *part.redundant):
                p.grad = None

    def _follow(self, directions: list[Tensor], images: list[Tensor]) -> None:
        """Set the step size by the cosine between this direction and the last, in the metric G.

        Args:
            images: G of the directions.
        """
        if self.directions:
            across = sum(map(_dot, self.directions, images))
            own = sum(map(_dot, directions, images))
            last = sum(_dot(d, gram.product(d)) for d, gram in zip(self.directions, self.grams))
            size = math.sqrt(max(0.0, own) * max(0.0, last))  # rounding can make them negative
            cosine = across / size if size > 0 else 0.0
            self.disagreements = max(0.0, self.disagreements + self.gain * (self.agreement - cosine))
        self.directions = directions

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        plain = torch.tensor([self.first, self.level, self.disagreements, float(self.count)], dtype=torch.float64)
        out = {"linear.state": plain}
        for i, gram in enumerate(self.grams):
            out.update({f"linear.gram.{i}.{j}": block for j, block in enumerate(gram.blocks)})
        out.update({f"linear.direction.{i}": direction for i, direction in enumerate(self.directions)})
        return out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.first, self.level, self.disagreements, count = tensors["linear.state"].tolist()
        self.count = int(count)
        if self.count:
            like = [part.parameters[0].device for part in self.parts]
            names = [[name for name in tensors if name.startswith(f"linear.gram.{i}.")] for i in range(len(like))]
            if not all(names):
                raise BadFileError(
                    "the checkpoint is of a version that kept least-squares matrices another way. Start the run anew, "
                    "with control=sc.load(...) of its last solution, or resume it with the version that wrote it."
                )
            self.grams = [Gram(*(tensors[n].to(d) for n in sorted(group))) for group, d in zip(names, like)]
            self.directions = [tensors[f"linear.direction.{i}"].to(d) for i, d in enumerate(like)]


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())
