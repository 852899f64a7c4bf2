"""Damped least-squares steps for the parameters in which a control is linear."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..controls.linear_part import LinearPart
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
        self.grams: list[Tensor] = []
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
        self.grams = [old.lerp_(g, 1 - self.decay) for old, g in zip(self.grams, new)] if self.count else new
        self.count += 1

    @torch.no_grad()
    def step(self, factor: float, radius: float = 1.0) -> None:
        """One step from the parameters' gradients, which are then set to None, so that no other optimiser takes them.

        Args:
            factor: of the step. radius: of the largest change of the path law, in KL.
        """
        directions = []
        for part, gram in zip(self.parts, self.grams):
            gradient = part.gather(
                [torch.zeros_like(p) if p.grad is None else p.grad for p in part.parameters]
            ).double()
            size = gram.diagonal(dim1=1, dim2=2)
            size = size + 0.1 * size.mean(1, keepdim=True)
            direction = -torch.cholesky_solve(gradient, _factor(gram, size, self.damping))
            directions.append(direction.contiguous())  # as a checkpoint gives it back: sums have an order
        self._follow(directions)
        for part, gram, direction in zip(self.parts, self.grams, directions):
            step = 0.5 * self.step_size * factor * direction
            now = part.gather(part.parameters).double()
            kl, own = (0.5 * float((v * (gram @ v)).sum()) for v in (step, now))
            most = radius * self.part_kl * max(1.0, own)
            if kl > most:
                step *= math.sqrt(most / kl)
            for p, move in zip(part.parameters, part.scatter(step.to(part.parameters[0].dtype))):
                p.add_(move)
            for p in (*part.parameters, *part.redundant):
                p.grad = None

    def _follow(self, directions: list[Tensor]) -> None:
        """Set the step size by the cosine between this direction and the last, in the metric G."""
        if self.directions:
            products = [
                sum(float((a * (g @ b)).sum()) for a, g, b in zip(one, self.grams, other))
                for one, other in (
                    (directions, self.directions),
                    (directions, directions),
                    (self.directions, self.directions),
                )
            ]
            size = math.sqrt(max(0.0, products[1]) * max(0.0, products[2]))  # rounding can make them negative
            cosine = products[0] / size if size > 0 else 0.0
            self.disagreements = max(0.0, self.disagreements + self.gain * (self.agreement - cosine))
        self.directions = directions

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        plain = torch.tensor([self.first, self.level, self.disagreements, float(self.count)], dtype=torch.float64)
        out = {"linear.state": plain}
        for name, parts in (("gram", self.grams), ("direction", self.directions)):
            out.update({f"linear.{name}.{i}": part for i, part in enumerate(parts)})
        return out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.first, self.level, self.disagreements, count = tensors["linear.state"].tolist()
        self.count = int(count)
        if self.count:
            like = [part.parameters[0].device for part in self.parts]
            self.grams = [tensors[f"linear.gram.{i}"].to(d) for i, d in enumerate(like)]
            self.directions = [tensors[f"linear.direction.{i}"].to(d) for i, d in enumerate(like)]


def _factor(gram: Tensor, size: Tensor, damping: float) -> Tensor:
    """Cholesky factor of ``G + damping diag(size)`` ``(groups, p, p)``, with as much more damping as rounding makes
    necessary."""
    while True:
        root, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(damping * size))
        if not bool(info.any()):
            return root
        damping = max(10 * damping, 1e-7)
