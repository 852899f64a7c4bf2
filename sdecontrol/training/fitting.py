"""What the fits share: checks of data and model, the descent, and the residual network."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import NonFiniteError
from ..processes.modules import copied
from ..tensors import as_float, check_count, check_output, check_tensor
from .progress import ProgressBar

_WARMUP = 200
_AVERAGE = 0.999
_WIDTH, _INNER, _BLOCKS, TIME_WIDTH = 128, 256, 3, 64  # of the residual network


def check_data(data: Any, least: int, iterations: Any, batch_size: Any) -> None:
    """Raise unless ``data`` is ``(n, *event)`` with n of at least ``least``, and the numbers are counts."""
    check_tensor("data", data, hint="data: (n, *event).")
    if data.ndim < 2 or len(data) < least:
        raise ValueError(
            f"data must have shape (n, *event) with n >= {least}, got {tuple(data.shape)}; use data.unsqueeze(-1) for "
            "numbers."
        )
    check_count("iterations", iterations)
    check_count("batch_size", batch_size)


def trained_copy(model: Any, called: str, x: Tensor, *rest: Tensor) -> nn.Module:
    """A copy of a user's model to train, which gives the shape of x when it is called with x and the rest, as
    ``called`` says.

    Raises:
        TypeError, ValueError: otherwise.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module {called} -> (batch, *event) or None, got {type(model).__name__}.")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model has no trainable parameters.")
    with torch.no_grad():
        out = copied(model).eval()(x, *rest)
    check_output("model", out, x.shape, x, f"It is called as model{called}, {called[4]} (batch,).")
    return copied(model).train()


class _Best:
    """The averaged weights that were best by a judge so far, which looks twenty times."""

    def __init__(self, network: nn.Module, parameters: list[Tensor], judge: Callable[[], Tensor], count: int) -> None:
        self.network, self.parameters, self.judge, self.every = network, parameters, judge, max(1, count // 20)
        self.least, self.kept = math.inf, [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def look(self, i: int, average: list[Tensor]) -> None:
        if (i + 1) % self.every:
            return
        own = [p.detach().clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, average)
        mode = self.network.training
        error = float(self.network.eval() and self.judge())
        self.network.train(mode)
        if error < self.least:
            self.least, self.kept = error, [p.detach().clone() for p in average]
        torch._foreach_copy_(self.parameters, own)


def descend(
    network: nn.Module,
    loss: Callable[[int], Tensor],
    iterations: int,
    rate: Any,
    title: str,
    progress: bool | None,
    judge: Callable[[], Tensor] | None = None,
) -> nn.Module:
    """Adam on ``loss(i)`` with a warm-up and a cosine decay, clipped gradients, and at the end an average of the
    weights; with a ``judge``, an error on data that are not learned from, the average at which that was least.

    Returns:
        The network, in evaluation mode.

    Raises:
        NonFiniteError: the loss is not finite. ValueError: ``rate``, the learning rate, is not positive.
    """
    rate = as_float("learning_rate", rate, positive=True)
    parameters: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    best = None if judge is None else _Best(network, parameters, judge, iterations)
    fused = parameters[0].device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99), fused=fused)
    with ProgressBar(iterations, title, progress, measure="loss") as bar:
        for i in range(iterations):
            value = loss(i)
            number = float(value.detach())
            if not math.isfinite(number):
                raise NonFiniteError(
                    f"the loss is not finite at iteration {i}: the model's prediction is {number}; "
                    "try a smaller learning_rate.",
                    what="loss",
                    step=i,
                )
            warm = min(1.0, (i + 1) / max(1.0, min(_WARMUP, 0.1 * iterations)))
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * i / iterations))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - min(_AVERAGE, (i + 1) / (i + 10)))
            if best is not None:
                best.look(i, average)
            bar.update(i + 1, iterations, {"loss": number})
    with torch.no_grad():
        for p, mean in zip(parameters, average if best is None else best.kept):
            p.copy_(mean)
    return network.eval()


class ResidualBlock(nn.Module):
    """Residual block: norm, linear, scale and shift by the time features, SiLU, linear (zero at the start)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.expand = nn.Linear(_WIDTH, _INNER)
        self.film = nn.Linear(TIME_WIDTH, 2 * _INNER)
        self.contract = nn.Linear(_INNER, _WIDTH)
        for layer in (self.film, self.contract):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        scale, shift = self.film(features).chunk(2, dim=-1)
        return h + self.contract(F.silu(torch.addcmul(shift, self.expand(self.norm(h)), 1 + scale)))


class ResidualNetwork(nn.Module):
    """``size`` numbers to as many through residual blocks that see a time; untrained it gives 0."""

    frequencies: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 0.5 * math.pi * torch.arange(TIME_WIDTH // 2))
        self.time = nn.Sequential(nn.Linear(TIME_WIDTH, TIME_WIDTH), nn.SiLU())
        self.inlet = nn.Linear(size, _WIDTH)
        self.blocks = nn.ModuleList(ResidualBlock() for _ in range(_BLOCKS))
        self.norm = nn.LayerNorm(_WIDTH)
        self.outlet = nn.Linear(_WIDTH, size)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)

    def correction(self, z: Tensor, time: Tensor, more: Tensor | None = None) -> Tensor:
        """At numbers ``(batch, size)`` of unit variance and a time ``(batch | 1, 1)`` within about [0, pi/2]; ``more``:
        features ``(batch, TIME_WIDTH)`` beside those of time."""
        angles = time * self.frequencies
        features = self.time(torch.cat((angles.sin(), angles.cos()), 1))
        features = features if more is None else features + more
        h = self.inlet(z)
        for block in self.blocks:
            h = block(h, features)
        return self.outlet(F.silu(self.norm(h)))
