"""``fit_bridge``: a process from one law to another, by bridge matching ([42]-[45], tutorial Section 9), and flow matching, its limit."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..processes.laws import Dirac, Gaussian, GaussianMixture, draw
from ..processes.linear import LinearSDE
from ..processes.schedules import FlowMatching
from ..randomness import derive_seed, fresh_seed, generator_for, global_rng
from ..tensors import as_float, check_output, check_tensor, symmetric
from .fit_score import FitDescent
from .progress import ProgressBar
from .score_network import ResidualBlock

__all__ = ["BridgeNetwork", "fit_bridge"]

_TIMES = 256  # different times of training, one in each of so many equal parts of the horizon
_LAST = 1e-3  # of the horizon: training and use stop so much before the end, where the pull is singular
_SAMPLES = 1 << 14  # of a start whose moments are not known
_LARGEST = 2048


def fit_bridge(
    data: Tensor,
    reference: LinearSDE | FlowMatching,
    initial: Any = None,
    model: nn.Module | None = None,
    *,
    iterations: int = 4000,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    seed: int | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Train the drift of a process that carries ``initial`` to the data along the reference's bridges (Peluchetti 2312.14589; Shi et al.
    2303.16852), or a velocity along straight lines (Lipman et al. 2210.02747).

    Pairs of ends are drawn independently, ``x_t`` from the bridge between them, and the drift is regressed on that of the reference
    conditioned on its end ``x_T``::

        b(x_t, t) + sigma sigma^T grad_x log p(x_T | x_t)        ((x_T - x_t)/(T - t) for Brownian motion),

    whose conditional mean is the drift of a Markov process with the same marginals at all times (the minimiser of the forward KL, [45]). For a
    point start it is the optimum of the control problem whose tilted end is the data's law. The loss is divided by the target's
    variance left by a linear prediction, which moves nothing but the noise of training.

    Args:
        data: ``(n, *event)``; ``(n, d)`` for a linear SDE.
        reference: a linear SDE (``BrownianMotion``, ``OrnsteinUhlenbeck``, ``LinearSDE``); or ``sc.FlowMatching()``, the limit of no noise, straight
            lines ``(1-t) x_0 + t x_1`` with the target ``x_1 - x_0``.
        initial: the law of X_0: ``Dirac``, ``Gaussian``, ``GaussianMixture``, any torch distribution, or samples ``(m, *event)``. None: for
            ``FlowMatching`` a standard Gaussian.
        model: your own nn.Module ``model(x, t) -> (batch, *event)``, t ``(batch,)`` from 0 (start) to the horizon (data; 1 for
            ``FlowMatching``) (a copy of it is trained); None: a residual network on top of the best linear prediction.
        iterations, batch_size, learning_rate: of Adam, with a warm-up, a cosine decay and averaged weights.
        seed: the same seed gives the same weights; None draws one from torch's global generator, which is otherwise left alone.
        progress: show a progress bar; None: if the terminal can.

    Returns:
        The trained module in evaluation mode. For a linear SDE a drift: ``sc.SDE(module, diffusion=sigma, dim=d, horizon=T)`` with ``initial`` has
        the data's law at T. For ``FlowMatching`` a velocity: ``sc.generative_sde(module, sc.FlowMatching(), prediction="velocity", shape=...)``
        where ``initial`` is the standard Gaussian; else the velocity of an ordinary differential equation.

    Raises:
        ValueError, TypeError: bad arguments. NonFiniteError: the loss is not finite.
    """
    law = _check(data, reference, initial, iterations, batch_size)
    rate = as_float("learning_rate", learning_rate, positive=True)
    seed = fresh_seed(seed)
    with global_rng(derive_seed(seed, 1), data.device):
        bridge = Bridge(reference, *_moments(law, data, derive_seed(seed, 3)), *_empirical(data))
        network = _network(data, bridge, model)
        times = (torch.arange(_TIMES, dtype=torch.float64) + torch.rand(_TIMES, dtype=torch.float64)) / _TIMES
        table = bridge.table((times * bridge.horizon * (1 - _LAST)).tolist(), data)
        if isinstance(network, BridgeNetwork):
            network.remember(table, table.time.tolist())
        descent = FitDescent(network, rate, iterations)
        generator = generator_for(data.device, derive_seed(seed, 2))
        with ProgressBar(iterations, "fit-bridge", progress, measure="loss") as bar:
            for i in range(iterations):
                rows = torch.randint(len(data), (batch_size,), generator=generator, device=data.device)
                x0 = _starts(law, batch_size, derive_seed(seed, 4, i), generator).to(data)
                index = torch.randint(_TIMES, (batch_size,), generator=generator, device=data.device)
                noise = torch.randn(batch_size, bridge.size, generator=generator, dtype=data.dtype, device=data.device)
                at = Moments(*(part[index] for part in table))
                x, target = at.pair(x0.flatten(1), data[rows].flatten(1), noise)
                error = network(x.reshape(-1, *data.shape[1:]), at.time).flatten(1) - target
                loss = (at.weight.unsqueeze(1) * error**2).mean()
                descent.step(loss, i)
                bar.update(i + 1, iterations, {"loss": float(loss.detach())})
        descent.use_average()
    if isinstance(network, BridgeNetwork):
        network.forget()
    return network.eval()


class Moments(NamedTuple):
    """What is known in closed form at given times, each with a leading dimension of times. With ``z = (x_0, x_T)``::

    x_t = path z + shift + root xi,        target = here x_t + ends z + more,
    E[target | x_t] = slope x_t + level  for Gaussian z of the same moments,   cov(target | x_t) = left left^T.
    """

    time: Tensor
    path: Tensor
    shift: Tensor
    root: Tensor
    here: Tensor
    ends: Tensor
    more: Tensor
    slope: Tensor
    level: Tensor
    centre: Tensor  #: mean of x_t
    whiten: Tensor  #: ``whiten (x_t - centre)`` has unit variances (0 where x_t has none)
    left: Tensor
    weight: Tensor  #: 1 / mean variance of the target given x_t

    def pair(self, x0: Tensor, end: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``x_t`` and its target for one time per row, ``(batch, d)`` each."""
        z = torch.cat((x0, end), 1)
        x = _apply(self.path, z) + self.shift + _apply(self.root, noise)
        return x, _apply(self.here, x) + _apply(self.ends, z) + self.more


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


class Bridge:
    """The reference's bridges between two laws of known means and covariances (float64), drawn independently."""

    def __init__(
        self, reference: LinearSDE | FlowMatching, mean0: Tensor, cov0: Tensor, mean1: Tensor, cov1: Tensor
    ) -> None:
        self.reference, self.size = reference, len(mean0)
        self.horizon = reference.horizon if isinstance(reference, LinearSDE) else 1.0
        self.mean, self.cov = torch.cat((mean0, mean1)), torch.block_diag(cov0, cov1)

    def __deepcopy__(self, memo: Any) -> Bridge:
        return self

    def table(self, times: list[float], like: Tensor) -> Moments:
        """At a list of times, in the dtype and on the device of ``like``."""
        rows = [self._at(min(t, self.horizon * (1 - 1e-6))) for t in times]
        clock = torch.tensor(times, dtype=torch.float64)
        return Moments(*(part.to(like) for part in (clock, *(torch.stack(parts) for parts in zip(*rows)))))

    def _at(self, t: float) -> tuple[Tensor, ...]:
        d = self.size
        path, shift, cov, here, ends, more = (
            self._flow(t) if isinstance(self.reference, FlowMatching) else self._bridge(t)
        )
        spread = symmetric(path @ self.cov @ path.mT + cov)
        values, vectors = torch.linalg.eigh(spread)
        good = values > 1e-12 * values.max().clamp(min=1e-300)
        inverse_root = torch.where(good, values.clamp(min=1e-300).rsqrt(), 0.0)
        whiten = (vectors * inverse_root) @ vectors.mT
        gain = self.cov @ path.mT @ whiten @ whiten
        kept = torch.eye(2 * d, dtype=torch.float64) - gain @ path
        left_z = kept @ self.cov @ kept.mT + gain @ cov @ gain.mT
        left = symmetric(ends @ left_z @ ends.mT)
        centre = path @ self.mean + shift
        slope = here + ends @ gain
        level = ends @ (self.mean - gain @ centre) + more
        variance = left.diagonal().mean()
        weight = 1 / variance.clamp(min=1e-12)
        return path, shift, _root(cov), here, ends, more, slope, level, centre, whiten, _root(left), weight

    def _flow(self, t: float) -> tuple[Tensor, ...]:
        eye = torch.eye(self.size, dtype=torch.float64)
        none = torch.zeros(self.size, dtype=torch.float64)
        return torch.cat(((1 - t) * eye, t * eye), 1), none, 0 * eye, 0 * eye, torch.cat((-eye, eye), 1), none

    def _bridge(self, t: float) -> tuple[Tensor, ...]:
        sde, d = self.reference, self.size
        assert isinstance(sde, LinearSDE)
        first, second = sde.transition(0.0, t), sde.transition(t, self.horizon)
        eye, C, M = torch.eye(d, dtype=torch.float64), first.covariance, second.matrix
        innovation = symmetric(M @ C @ M.mT + second.covariance)
        gain = C @ M.mT @ torch.linalg.pinv(innovation, hermitian=True)
        keep = eye - gain @ M
        cov = symmetric(keep @ C @ keep.mT + gain @ second.covariance @ gain.mT)
        path = torch.cat((keep @ first.matrix, gain), 1)
        A, a, root = (torch.from_numpy(c) for c in sde.coefficients(t))
        pull = root @ root.mT @ M.mT @ torch.linalg.pinv(second.covariance, hermitian=True)
        ends = torch.cat((0 * eye, pull), 1)
        return path, keep @ first.shift - gain @ second.shift, cov, A - pull @ M, ends, a - pull @ second.shift


def _root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric(cov))
    return (vectors * values.clamp(min=0.0).sqrt()) @ vectors.mT


class BridgeNetwork(nn.Module):
    """A drift ``(x, t) -> (batch, *event)``: the best linear prediction for laws of the same means and covariances, plus a residual network's output
    scaled by what that leaves. Untrained it carries a Gaussian to a Gaussian; t a float or a tensor of shape () or (batch,)."""

    frequencies: Tensor

    def __init__(
        self,
        bridge: Bridge,
        shape: torch.Size,
        width: int = 128,
        inner: int = 256,
        blocks: int = 3,
        time_width: int = 64,
    ) -> None:
        super().__init__()
        self.bridge, self.shape, self.horizon = bridge, shape, bridge.horizon
        size = bridge.size
        self.register_buffer("frequencies", 0.5 * math.pi * torch.arange(time_width // 2))
        self.time = nn.Sequential(nn.Linear(time_width, time_width), nn.SiLU())
        self.inlet = nn.Linear(size, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, inner, time_width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.outlet = nn.Linear(width, size)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)
        self._known: dict[float, int] = {}
        self._table: Moments | None = None

    def remember(self, table: Moments, added: list[float]) -> None:
        """Have the closed forms of a table at hand, whose last rows are those of ``added`` times."""
        first = len(table.time) - len(added)
        self._table = table
        self._known.update({t: first + i for i, t in enumerate(added)})

    def forget(self) -> None:
        self._known, self._table = {}, None

    def _moments(self, t: Tensor, like: Tensor) -> Moments:
        distinct, inverse = torch.unique(t.detach(), return_inverse=True)
        clock = distinct.tolist()
        if self._table is not None and (self._table.slope.dtype, self._table.slope.device) != (like.dtype, like.device):
            self.forget()
        missing = [s for s in clock if s not in self._known]
        if missing:
            if len(self._known) > 4 * _TIMES:
                self.forget()
                missing = clock
            new = self.bridge.table(missing, like)
            self.remember(new if self._table is None else Moments(*map(torch.cat, zip(self._table, new))), missing)
        table = self._table
        assert table is not None
        where = torch.tensor([self._known[s] for s in clock], device=t.device)
        return Moments(*(part[where[inverse]] for part in table))

    def forward(self, x: Tensor, t: Any) -> Tensor:
        """The drift at states ``(batch, *event)``."""
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        if t.ndim and t.stride(0) == 0:
            t = t[0]  # the whole batch is at one time
        at = self._moments(t.reshape(-1), x)
        flat = x.flatten(1)
        angles = at.time.unsqueeze(1) / self.horizon * self.frequencies
        features = self.time(torch.cat((angles.sin(), angles.cos()), 1))
        h = self.inlet(_apply(at.whiten, flat - at.centre))
        for block in self.blocks:
            h = block(h, features)
        out = self.outlet(F.silu(self.norm(h)))
        return (_apply(at.slope, flat) + at.level + _apply(at.left, out)).reshape(x.shape)


# ---------------------------------------------------------------- arguments


def _check(data: Any, reference: Any, initial: Any, iterations: Any, batch_size: Any) -> Any:
    """The start's law, or samples of it."""
    check_tensor("data", data, hint="data: (n, *event).")
    if data.ndim < 2 or len(data) < 2:
        raise ValueError(
            f"data must have shape (n, *event) with n >= 2, got {tuple(data.shape)}; use data.unsqueeze(-1) for numbers."
        )
    if not isinstance(reference, (LinearSDE, FlowMatching)):
        raise TypeError(
            "reference must be a linear SDE (sc.BrownianMotion, sc.OrnsteinUhlenbeck, sc.LinearSDE), whose bridges are known, or sc.FlowMatching(); "
            f"got {type(reference).__name__}."
        )
    if isinstance(reference, LinearSDE) and data.shape[1:] != reference.event_shape:
        raise ValueError(
            f"data has events of shape {tuple(data.shape[1:])}, the reference states of shape {tuple(reference.event_shape)}."
        )
    if data[0].numel() > _LARGEST:
        raise ValueError(
            f"data has events of {data[0].numel()} numbers; covariances of more than {_LARGEST} are not kept. Use sc.fit_score(data, "
            "sc.FlowMatching(), 'velocity')."
        )
    for name, value in (("iterations", iterations), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int >= 1, got {value!r}.")
    if initial is None:
        if isinstance(reference, LinearSDE):
            raise TypeError(
                "initial is missing: pass sc.Dirac(x0), sc.Gaussian(mean, cov), any torch distribution, or samples (m, *event)."
            )
        initial = Gaussian(torch.zeros_like(data[0]), 1.0)
    if isinstance(initial, Tensor):
        check_tensor("initial", initial)
        shape = initial.shape[1:]
    elif isinstance(initial, torch.distributions.Distribution):
        shape = torch.Size(initial.batch_shape) + torch.Size(initial.event_shape)
    else:
        raise TypeError(f"initial must be a law or samples (m, *event), got {type(initial).__name__}.")
    if shape != data.shape[1:]:
        raise ValueError(f"initial gives states of shape {tuple(shape)}, the data {tuple(data.shape[1:])}.")
    return initial


def _moments(law: Any, data: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    if isinstance(law, (Dirac, Gaussian, GaussianMixture)):
        return law.mean.detach().double().cpu().flatten(), law.covariance_matrix.detach().double().cpu()
    return _empirical(law if isinstance(law, Tensor) else draw(law, _SAMPLES, seed))


def _empirical(samples: Tensor) -> tuple[Tensor, Tensor]:
    x = samples.detach().flatten(1).double().cpu()
    cov = torch.cov(x.mT) if len(x) > 1 else torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    return x.mean(0), cov.reshape(x.shape[1], x.shape[1])


def _starts(law: Any, n: int, seed: int, generator: torch.Generator) -> Tensor:
    if isinstance(law, Tensor):
        return law[torch.randint(len(law), (n,), generator=generator, device=generator.device).to(law.device)]
    return draw(law, n, seed)


def _network(data: Tensor, bridge: Bridge, model: nn.Module | None) -> nn.Module:
    if model is None:
        return BridgeNetwork(bridge, data.shape[1:]).to(data)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module (x, t) -> (batch, *event) or None, got {type(model).__name__}.")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model has no trainable parameters.")
    x = data[torch.arange(3) % len(data)]
    with torch.no_grad():
        t = torch.full((3,), 0.5 * bridge.horizon, dtype=data.dtype, device=data.device)
        check_output("model", copy.deepcopy(model).eval()(x, t), x.shape, x, "It is called as model(x, t), t (batch,).")
    return copy.deepcopy(model).train()
