"""``fit_score``: a diffusion or flow model from data, by denoising score matching."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import check_name, warn
from ..processes.generative import PREDICTIONS, noise_coefficients
from ..processes.schedules import Schedule
from ..randomness import Place, fresh_seed, generator_for, global_rng
from ..shapes import States
from ..tensors import as_float, batch_like, check_tensor
from .fitting import check_data, descend, trained_copy
from .score_network import ConditionalScoreNetwork, ScoreNetwork

_FIRST_TIME = 1e-3  # noising times are drawn from here on: below, every prediction of noise is singular
_FLOOR = 0.05
_APART = 0.02  # nats between the noised data and the law that generation starts from: more is said


def fit_score(
    data: States,
    schedule: Schedule,
    prediction: str = "noise",
    model: nn.Module | None = None,
    *,
    iterations: int = 8000,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    seed: int | None = None,
    progress: bool | None = None,
    condition: Tensor | None = None,
    drop: float = 0.0,
) -> nn.Module:
    """Train a model on data by denoising score matching (Vincent 2011; Ho et al. 2006.11239), ready for
    ``generative_sde``.

    The loss is the squared error of the prediction, ``w(s) |model(mu x0 + std eps, s) - target|^2``. The weight makes
    it the same for every parametrisation: the squared error of the noise, divided by the part of the noise's variance
    that cannot be known from x (plus 0.05), which lifts the noisy end, where little is left to learn but decides
    between modes.

    Args:
        data: ``(n, *event)``.
        schedule: ``sc.VP()``, ``sc.CosineVP()``, ``sc.VE()``, ``sc.FlowMatching()``.
        prediction: what the model predicts: "noise", "sample", "score", "v" or "velocity".
        model: your own nn.Module ``model(x, s) -> (batch, *event)`` on its own clock, s ``(batch,)`` (a copy of it is
            trained); None: a residual network on top of the best linear prediction, in the data's principal components.
        iterations, batch_size, learning_rate: of Adam, with a warm-up, a cosine decay and averaged weights.
        seed: the same seed gives the same weights; None draws one from torch's global generator, which is otherwise
            left alone.
        progress: show a progress bar; None: if the terminal can.
        condition: y of each datum: integer labels ``(n,)``, or numbers ``(n, ...)``. The model is then
            ``model(x, s, y)``.
        drop: share of the data whose label is replaced by the number of classes while training, so that the same model
            is an unconditional one too, as classifier-free guidance needs (Ho & Salimans 2207.12598): the default
            network is that when called as ``model(x, s)``. For labels only.

    Returns:
        The trained model, in evaluation mode.

    Raises:
        ValueError, TypeError: each naming the argument. NonFiniteError: a loss that is not finite.

    Warns:
        UserWarning: the noised data's law is not the one that generation starts from (data far from mean 0 and unit
            variance, for the schedule's noise).
    """
    check_data(data, 1, iterations, batch_size)
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a noise schedule such as sc.VP(), got {type(schedule).__name__}.")
    check_name("prediction", prediction, PREDICTIONS)
    drop = check_condition(data, condition, drop)
    _warn_where_starts_differ(data, schedule)
    seed = fresh_seed(seed)
    variance = float(data.flatten(1).double().var(0).mean()) if len(data) > 1 else 1.0
    generator = generator_for(data.device, seed, Place.SCORE_BATCH)
    strata = torch.arange(batch_size, device=data.device, dtype=torch.float64) / batch_size

    def loss(i: int) -> Tensor:
        rows = torch.randint(len(data), (batch_size,), generator=generator, device=data.device)
        x0, y = data[rows], None if condition is None else condition[rows]
        u = torch.rand((), generator=generator, device=data.device, dtype=torch.float64)
        s = _FIRST_TIME + (schedule.noise_end - _FIRST_TIME) * ((strata + u) % 1.0)
        eps = torch.randn(x0.shape, generator=generator, dtype=data.dtype, device=data.device)
        if y is not None and drop > 0:
            dropped = torch.rand(len(y), generator=generator, device=data.device) < drop
            y = y.masked_fill(dropped, classes_of(condition))
        mu, std = schedule.mu(s), schedule.std(s)  # coefficients in float64
        a, b = noise_coefficients(prediction, mu, std, schedule.log_mu_slope(s), schedule.forward_variance_rate(s))
        signal = mu**2 * variance
        weight = b**2 / (signal / (signal + std**2) + _FLOOR)
        mu, std, a, b, weight = (batch_like(c.to(x0.dtype), x0) for c in (mu, std, a, b, weight))
        x, clock = mu * x0 + std * eps, schedule.model_time(s).to(x0.dtype)
        error = (network(x, clock) if y is None else network(x, clock, y)) - (eps - a * x) / b
        return (weight * error**2).mean()

    with global_rng(data.device, seed, Place.SCORE_NETWORK):  # initial weights, and dropout in a user's model
        network = _network(data, schedule, prediction, model, condition, drop)
        return descend(network, loss, iterations, learning_rate, "fit-score", progress)


def _warn_where_starts_differ(data: Tensor, schedule: Schedule) -> None:
    """Generation starts from ``N(0, start_std^2)``, that of noised data of mean 0 and unit variance; say where these
    data's is another one: what they differ by stays in the samples (for the probability flow all of it)."""
    x, s = data.flatten(1).double(), torch.tensor(schedule.noise_end, dtype=torch.float64)
    mu, std, start = float(schedule.mu(s)), float(schedule.std(s)), schedule.start_std()
    mean, ratio = mu * x.mean(0) / start, (mu**2 * x.var(0, correction=0) + std**2) / start**2
    apart = 0.5 * float((mean.square() + ratio - 1 - ratio.log()).sum())
    if apart > _APART:
        warn(
            f"data (mean {float(x.mean()):.3g}, standard deviation {float(x.std(correction=0)):.3g}) do not suit the "
            f"schedule: noised, their law is {apart:.2g} nats from N(0, {start:.3g}^2), which generation starts from, "
            "and samples keep what that is off. Standardise the data, use a schedule with more noise, or start "
            f"problems from initial=sc.Gaussian({mu:.3g} * data.mean(0), {mu:.3g}**2 * data.var(0) + {std:.3g}**2).",
            UserWarning,
            stacklevel=3,
        )


def check_condition(data: Tensor, condition: Any, drop: Any) -> float:
    """``drop`` as a float, where it and the condition suit the data.

    Raises:
        TypeError, ValueError: otherwise.
    """
    drop = as_float("drop", drop)
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be a share of the data, at least 0 and below 1; got {drop:g}.")
    if condition is None:
        if drop > 0:
            raise ValueError("drop is the share of dropped labels, but there is no condition; pass condition=labels.")
        return drop
    if not isinstance(condition, Tensor):
        raise TypeError(
            f"condition must be a tensor (n, ...) of one condition per datum, got {type(condition).__name__}."
        )
    if condition.ndim < 1 or len(condition) != len(data):
        raise ValueError(f"condition has shape {tuple(condition.shape)}, but data has {len(data)} rows; one for each.")
    if condition.is_floating_point():
        check_tensor("condition", condition)
        if drop > 0:
            raise ValueError(
                "drop replaces labels, but this condition has a floating-point dtype; pass integer labels."
            )
    elif condition.ndim > 1 or condition.dtype == torch.bool or int(condition.min()) < 0:
        raise ValueError("condition must be labels 0, 1, ... of shape (n,), or numbers of a floating-point dtype.")
    return drop


def classes_of(condition: Tensor | None) -> int:
    """How many labels there are; 0 for numbers."""
    return 0 if condition is None or condition.is_floating_point() else int(condition.max()) + 1


def _network(
    data: Tensor, schedule: Schedule, prediction: str, model: nn.Module | None, condition: Tensor | None, drop: float
) -> nn.Module:
    if model is None:
        if condition is None:
            network = ScoreNetwork(data.shape[1:], schedule, prediction)
        else:
            classes = classes_of(condition)
            size = classes + 1 if classes else condition[0].numel()
            network = ConditionalScoreNetwork(data.shape[1:], schedule, prediction, classes, size, drop > 0)
        network.to(data).fit_statistics(data)
        return network
    rows = torch.arange(3) % len(data)
    s = torch.full((3,), 0.5, dtype=data.dtype, device=data.device)
    more = () if condition is None else (condition[rows],)
    return trained_copy(model, f"(x, s{', y' if more else ''})", data[rows], s, *more)
