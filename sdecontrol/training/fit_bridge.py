"""``fit_bridge``: a process from one law to another, by bridge matching ([42]-[45], tutorial Section 9), and flow
matching, its limit."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..processes.laws import Dirac, Gaussian, GaussianMixture, draw
from ..processes.linear import LinearSDE
from ..processes.schedules import FlowMatching
from ..randomness import Place, derive_seed, fresh_seed, generator_for, global_rng
from ..shapes import States
from ..tensors import check_tensor, symmetric
from .fitting import ResidualNetwork, check_data, descend, trained_copy

_KEPT = 1024  # times whose closed forms are at hand where the drift is used
_TIMES = 256  # different times of training, one in each of so many equal parts of the horizon
_LAST = 1e-3  # of the horizon: training and use stop so much before the end, where the drift is singular
_SAMPLES = 1 << 14  # of a start whose moments are not known
_LARGEST = 2048


def fit_bridge(
    data: States,
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
    """Train the drift of a process that carries ``initial`` to the data along the reference's bridges (Peluchetti
    2312.14589; Shi et al. 2303.16852), or a velocity along straight lines (Lipman et al. 2210.02747).

    Pairs of ends are drawn independently, ``x_t`` from the bridge between them, and the drift is regressed on that of
    the reference conditioned on its end ``x_T``::

        b(x_t, t) + sigma sigma^T grad_x log p(x_T | x_t)        ((x_T - x_t)/(T - t) for Brownian motion),

    whose conditional mean is the drift of a Markov process with the same marginals at all times (the minimiser of the
    forward KL, [45]). For a point start it is the optimum of the control problem whose tilted end is the data's law.
    The loss is divided by the target's variance left by a linear prediction, which moves nothing but the noise of
    training.

    Args:
        data: ``(n, *event)``; ``(n, d)`` for a linear SDE.
        reference: a linear SDE (``BrownianMotion``, ``OrnsteinUhlenbeck``, ``LinearSDE``); or ``sc.FlowMatching()``,
            the limit of no noise, straight lines ``(1-t) x_0 + t x_1`` with the target ``x_1 - x_0``.
        initial: the law of X_0: ``Dirac``, ``Gaussian``, ``GaussianMixture``, any torch distribution, or samples
            ``(m, *event)``. None: for ``FlowMatching`` a standard Gaussian.
        model: your own nn.Module ``model(x, t) -> (batch, *event)``, t ``(batch,)`` from 0 (start) to the horizon
            (data; 1 for ``FlowMatching``) (a copy of it is trained); None: a residual network on top of the best linear
            prediction.
        iterations, batch_size, learning_rate: of Adam, with a warm-up, a cosine decay and averaged weights.
        seed: the same seed gives the same weights; None draws one from torch's global generator, which is otherwise
            left alone.
        progress: show a progress bar; None: if the terminal can.

    Returns:
        The trained module in evaluation mode. For a linear SDE a drift:
        ``sc.SDE(module, diffusion=sigma, dim=d, horizon=T)`` with ``initial`` has the data's law at T. For
        ``FlowMatching`` a velocity: ``sc.generative_sde(module, sc.FlowMatching(), prediction="velocity", shape=...)``
        where ``initial`` is the standard Gaussian; else the velocity of an ordinary differential equation.

    Raises:
        ValueError, TypeError: bad arguments. NonFiniteError: the loss is not finite.
    """
    check_data(data, 2, iterations, batch_size)
    law = _start_law(data, reference, initial)
    seed = fresh_seed(seed)
    generator = generator_for(data.device, seed, Place.BRIDGE_BATCH)

    def loss(i: int) -> Tensor:
        rows = torch.randint(len(data), (batch_size,), generator=generator, device=data.device)
        x0 = _starts(law, batch_size, derive_seed(seed, Place.BRIDGE_STARTS, i), generator).to(data)
        index = torch.randint(_TIMES, (batch_size,), generator=generator, device=data.device)
        noise = torch.randn(batch_size, bridge.size, generator=generator, dtype=data.dtype, device=data.device)
        at = Moments(*(part[index] for part in table))
        x, target = at.pair(x0.flatten(1), data[rows].flatten(1), noise)
        x = x.reshape(-1, *data.shape[1:])
        found = network.at(x, at) if isinstance(network, BridgeNetwork) else network(x, at.time)
        return (at.weight.unsqueeze(1) * (found.flatten(1) - target) ** 2).mean()

    with global_rng(data.device, seed, Place.BRIDGE_NETWORK):
        moments = _moments(law, data, derive_seed(seed, Place.BRIDGE_MOMENTS))
        bridge = Bridge(reference, *moments, *_empirical(data))
        network = _network(data, bridge, model)
        times = (torch.arange(_TIMES, dtype=torch.float64) + torch.rand(_TIMES, dtype=torch.float64)) / _TIMES
        table = bridge.table((times * bridge.horizon * (1 - _LAST)).tolist(), data)
        return descend(network, loss, iterations, learning_rate, "fit-bridge", progress)


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
    standardiser: Tensor  #: ``standardiser (x_t - centre)`` has unit variances (0 where x_t has none)
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
        self.known: dict[Any, tuple[Tensor, ...]] = {}

    def __deepcopy__(self, memo: Any) -> Bridge:
        return self

    def table(self, times: list[float], like: Tensor) -> Moments:
        """At a list of times, in the dtype and on the device of ``like``."""
        return Moments(*map(torch.stack, zip(*(self._row(t, like) for t in times))))

    def at(self, t: Tensor) -> Moments:
        """At times ``(n,)``, in their dtype; the last ``_KEPT`` different ones are at hand."""
        distinct, inverse = torch.unique(t.detach(), return_inverse=True)
        rows = []
        for time in distinct.tolist():
            key = time, t.dtype, t.device
            row = self.known.pop(key, None)
            rows.append(self._row(time, t) if row is None else row)
            self.known[key] = rows[-1]  # the last used are the last of the dictionary
        while len(self.known) > _KEPT:
            self.known.pop(next(iter(self.known)), None)
        return Moments(*(torch.stack(parts)[inverse] for parts in zip(*rows)))

    def _row(self, t: float, like: Tensor) -> tuple[Tensor, ...]:
        clock = torch.tensor(t, dtype=torch.float64)
        return tuple(part.to(like) for part in (clock, *self._at(min(t, self.horizon * (1 - 1e-6)))))

    def _at(self, t: float) -> tuple[Tensor, ...]:
        path, shift, cov, here, ends, more = (
            self._flow(t) if isinstance(self.reference, FlowMatching) else self._bridge(t)
        )
        values, vectors = torch.linalg.eigh(symmetric(path @ self.cov @ path.mT + cov))
        good = values > 1e-12 * values.max().clamp(min=1e-300)
        standardiser = (vectors * torch.where(good, values.clamp(min=1e-300).rsqrt(), 0.0)) @ vectors.mT
        gain = self.cov @ path.mT @ standardiser @ standardiser
        kept = torch.eye(2 * self.size, dtype=torch.float64) - gain @ path
        left_z = kept @ self.cov @ kept.mT + gain @ cov @ gain.mT
        left = symmetric(ends @ left_z @ ends.mT)
        centre = path @ self.mean + shift
        slope = here + ends @ gain
        level = ends @ (self.mean - gain @ centre) + more
        weight = 1 / left.diagonal().mean().clamp(min=1e-12)
        return path, shift, _root(cov), here, ends, more, slope, level, centre, standardiser, _root(left), weight

    def _flow(self, t: float) -> tuple[Tensor, ...]:
        eye = torch.eye(self.size, dtype=torch.float64)
        none = torch.zeros(self.size, dtype=torch.float64)
        return torch.cat(((1 - t) * eye, t * eye), 1), none, 0 * eye, 0 * eye, torch.cat((-eye, eye), 1), none

    def _bridge(self, t: float) -> tuple[Tensor, ...]:
        sde = self.reference
        assert isinstance(sde, LinearSDE)
        first, second = sde.transition(0.0, t), sde.transition(t, self.horizon)
        eye, C, M = torch.eye(self.size, dtype=torch.float64), first.covariance, second.matrix
        innovation = symmetric(M @ C @ M.mT + second.covariance)
        gain = C @ M.mT @ torch.linalg.pinv(innovation, hermitian=True)
        keep = eye - gain @ M
        cov = symmetric(keep @ C @ keep.mT + gain @ second.covariance @ gain.mT)
        path = torch.cat((keep @ first.matrix, gain), 1)
        A, a, root = (torch.from_numpy(c) for c in sde.coefficients(t))
        end_gain = root @ root.mT @ M.mT @ torch.linalg.pinv(second.covariance, hermitian=True)
        ends = torch.cat((0 * eye, end_gain), 1)
        return path, keep @ first.shift - gain @ second.shift, cov, A - end_gain @ M, ends, a - end_gain @ second.shift


def _root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric(cov))
    return (vectors * values.clamp(min=0.0).sqrt()) @ vectors.mT


class BridgeNetwork(ResidualNetwork):
    """A drift ``(x, t) -> (batch, *event)``: the best linear prediction for laws of the same means and covariances,
    plus a residual network's output scaled by what that leaves. Untrained it carries a Gaussian to a Gaussian; t a
    float or a tensor of shape () or (batch,)."""

    def __init__(self, bridge: Bridge) -> None:
        super().__init__(bridge.size)
        self.bridge = bridge

    def forward(self, x: Tensor, t: Any) -> Tensor:
        """The drift at states ``(batch, *event)``."""
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        if t.ndim and t.stride(0) == 0:
            t = t[0]  # the whole batch is at one time
        return self.at(x, self.bridge.at(t.reshape(-1)))

    def at(self, x: Tensor, at: Moments) -> Tensor:
        """The drift at states whose closed forms are known."""
        flat = x.flatten(1)
        left = self.correction(_apply(at.standardiser, flat - at.centre), at.time.unsqueeze(1) / self.bridge.horizon)
        return (_apply(at.slope, flat) + at.level + _apply(at.left, left)).reshape(x.shape)


# ---------------------------------------------------------------- arguments


def _start_law(data: Tensor, reference: Any, initial: Any) -> Any:
    """The start's law, or samples of it, where that and the reference suit the data."""
    if not isinstance(reference, (LinearSDE, FlowMatching)):
        raise TypeError(
            "reference must be a linear SDE (sc.BrownianMotion, sc.OrnsteinUhlenbeck, sc.LinearSDE), whose bridges "
            f"are known, or sc.FlowMatching(); got {type(reference).__name__}."
        )
    if isinstance(reference, LinearSDE) and data.shape[1:] != reference.event_shape:
        raise ValueError(
            f"data has events of shape {tuple(data.shape[1:])}, the reference states of shape "
            f"{tuple(reference.event_shape)}."
        )
    if data[0].numel() > _LARGEST:
        raise ValueError(
            f"data has events of {data[0].numel()} numbers; covariances of more than {_LARGEST} are not kept. Use "
            "sc.fit_score(data, sc.FlowMatching(), 'velocity')."
        )
    if initial is None:
        if isinstance(reference, LinearSDE):
            raise TypeError(
                "initial is missing: pass sc.Dirac(x0), sc.Gaussian(mean, cov), any torch distribution, or samples (m, "
                "*event)."
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
        return BridgeNetwork(bridge).to(data)
    t = torch.full((3,), 0.5 * bridge.horizon, dtype=data.dtype, device=data.device)
    return trained_copy(model, "(x, t)", data[torch.arange(3) % len(data)], t)
