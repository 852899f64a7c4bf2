"""``fit_reward``: an unknown reward from measurements, as a bootstrap ensemble."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..precision import at_least_single, call
from ..problems.learned_reward import Calibration, LearnedReward
from ..processes.finite import check_tokens
from ..processes.modules import copied
from ..randomness import Place, fresh_seed, generator_for, global_rng
from ..tensors import as_float, check_count, check_output, probing
from .fitting import descend
from .reward_network import RewardNetwork


def fit_reward(
    x: Tensor,
    r: Tensor,
    model: nn.Module | None = None,
    *,
    vocabulary: int | None = None,
    members: int = 5,
    held_out: float = 0.1,
    iterations: int = 500,
    batch_size: int = 128,
    learning_rate: float = 1e-2,
    weight_decay: float = 1e-5,
    seed: int | None = None,
    progress: bool | None = None,
) -> LearnedReward:
    """Learn a reward from measurements (tutorial, section 7.3): a bootstrap ensemble of regressors.

    Each member begins with weights of its own and learns from as many rows as there are, drawn with replacement
    (Efron 1979; as an ensemble Lakshminarayanan et al. 1612.01474); it keeps the weights that did best on the third of
    the rows that it did not draw. ``reward(x)`` is the members' mean, ``reward.pessimistic(beta)`` and
    ``reward.optimistic(beta)`` are the mean less or plus beta spreads: their standard deviations, which are too small,
    times a number that makes them right on rows that no member has seen; ``reward.calibration`` has it, and what else
    these rows say. Each is a reward as any other, with a gradient.

    Args:
        x: ``(n, *event)`` numbers, or int64 tokens with ``vocabulary`` V. r: ``(n,)``.
        model: your own regressor ``model(x) -> (batch,)`` (of tokens x are one-hot ``(batch, *shape, V)``); every
            member is a copy whose layers are drawn anew where they know how (``reset_parameters``). None: a line and
            two hidden layers, beside convolutions for images ``(channels, height, width)`` and tokens.
        members: of the ensemble, >= 2. held_out: share of the rows that no member sees; 0: none, and no calibration.
        iterations, batch_size, learning_rate, weight_decay: of each, on standardised r.
        seed: the same seed gives the same weights; None draws one from torch's global generator.
        progress: show a progress bar; None: if the terminal can.

    Returns:
        :class:`LearnedReward`, an nn.Module in evaluation mode without trainable parameters.

    Raises:
        ValueError, TypeError: each naming the argument. NonFiniteError: a loss that is not finite.
    """
    x, r = _checked(x, r, vocabulary, members)
    for name, value in (("iterations", iterations), ("batch_size", batch_size)):
        check_count(name, value)
    held = as_float("held_out", held_out)
    if not 0 <= held < 1:
        raise ValueError(f"held_out must be a share of the rows, from 0 to 1, got {held}.")
    decay = as_float("weight_decay", weight_decay)
    seed = fresh_seed(seed)
    order = torch.randperm(len(x), generator=generator_for("cpu", seed, Place.REWARD_HELD_OUT)).to(x.device)
    apart, rows = order[: int(held * len(x))], order[int(held * len(x)) :]
    if len(rows) < members:
        raise ValueError(f"x has {len(rows)} rows to learn from beside the held-out ones, for {members} members.")
    centre, scale = float(r[rows].mean()), float(r[rows].std()) or 1.0
    z, y = _seen(x, vocabulary, r.dtype), (r - centre) / scale
    made: list[nn.Module] = []
    for index in range(members):
        with global_rng(x.device, seed, Place.REWARD_MEMBER, index):
            network = _member(model, x, z[rows], vocabulary)
            options = {"iterations": iterations, "rate": learning_rate, "progress": progress}
            generator = generator_for(x.device, seed, Place.REWARD_ROWS, index)
            made.append(_fitted(network, (z[rows], y[rows]), batch_size, decay, generator, options))
    reward = LearnedReward(made, centre, scale, None, vocabulary).eval().requires_grad_(False)
    if len(apart):
        reward.calibration = _calibration(reward, x[apart], r[apart])
    return reward


def _checked(x: Any, r: Any, vocabulary: int | None, members: Any) -> tuple[Tensor, Tensor]:
    check_count("members", members, 2, why="one has no spread")
    for name, value in (("x", x), ("r", r)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; use torch.as_tensor({name}).")
    if x.ndim < 2 or not len(x):
        raise ValueError(f"x must have shape (n, *event), n >= 1, got {tuple(x.shape)}.")
    if r.shape != x.shape[:1]:
        raise ValueError(f"r must have shape ({len(x)},), one for each row of x, got {tuple(r.shape)}.")
    if not r.is_floating_point():
        r = r.to(torch.get_default_dtype())
    if vocabulary is not None:
        check_count("vocabulary", vocabulary, 2)
        check_tokens("x", x, vocabulary)
    elif not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}: of tokens say vocabulary=V; of numbers use x.float().")
    elif not bool(torch.isfinite(x).all()):
        raise ValueError("x is not finite everywhere; drop these rows.")
    if not bool(torch.isfinite(r).all()):
        bad = int((~torch.isfinite(r)).sum())
        raise ValueError(
            f"r is not finite in {bad} of {len(r)} rows; drop what was not measured: keep = r.isfinite(); "
            "fit_reward(x[keep], r[keep])."
        )
    if len(x) < members:
        raise ValueError(f"x has {len(x)} rows, fewer than members={members}.")
    own = at_least_single(r.dtype if vocabulary is not None else x.dtype)
    return x if vocabulary is not None else x.to(own), r.to(own).detach()


def _seen(x: Tensor, vocabulary: int | None, dtype: torch.dtype) -> Tensor:
    return x if vocabulary is None else nn.functional.one_hot(x, vocabulary).to(dtype)


def _member(model: nn.Module | None, x: Tensor, z: Tensor, vocabulary: int | None) -> nn.Module:
    if model is None:
        network = RewardNetwork(x.shape[1:], vocabulary).to(z)
        network.fit_statistics(z)
        return network.train()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module x -> (batch,) or None, got {type(model).__name__}.")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model has no trainable parameters.")
    some = z[torch.arange(3, device=z.device) % len(z)]
    with torch.no_grad(), probing("model", f"model(x), x {tuple(some.shape)}"):
        out = call(copied(model).eval(), some)
    check_output("model", out, (3,), some, "A regressor gives one number per row.")
    network = copied(model)
    for part in network.modules():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
    return network.train()


def _fitted(
    network: nn.Module,
    data: tuple[Tensor, Tensor],
    batch_size: int,
    decay: float,
    generator: torch.Generator,
    options: dict[str, Any],
) -> nn.Module:
    """A member that has learned from its rows, judged by those it did not draw."""
    z, y = data
    drawn = torch.randint(len(z), (len(z),), generator=generator, device=z.device)
    left = torch.ones(len(z), dtype=torch.bool, device=z.device).index_fill(0, drawn, False)
    weights = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]

    def loss(i: int) -> Tensor:
        rows = drawn[torch.randint(len(drawn), (min(batch_size, len(z)),), generator=generator, device=z.device)]
        return (call(network, z[rows]) - y[rows]).square().mean() + decay * sum(p.square().sum() for p in weights)

    def judge() -> Tensor:
        pieces = zip(z[left].split(1024), y[left].split(1024))
        return torch.cat([(call(network, a) - b).square() for a, b in pieces]).mean()

    seen = judge if bool(left.any()) else None
    return descend(network, loss, title="fit-reward", judge=seen, **options)


@torch.no_grad()
def _calibration(reward: LearnedReward, x: Tensor, r: Tensor) -> Calibration:
    values = torch.cat([reward.each(part) for part in x.split(1024)], 1).double()
    r, error = r.double(), values.mean(0) - r.double()
    scale = float((error / reward.spread(x).double()).square().mean().sqrt())
    spread = scale * reward.spread(x).double()
    ranks = [v.argsort().argsort().double() for v in (spread, error.abs())]
    order = torch.corrcoef(torch.stack(ranks))[0, 1] if len(r) > 1 else torch.tensor(float("nan"))
    variance = float(r.var(correction=0))
    return Calibration(
        rows=len(r),
        rmse=float(error.square().mean().sqrt()),
        r2=1 - float(error.square().mean()) / variance if variance else float("nan"),
        scale=scale,
        within_one=float((error.abs() <= spread).double().mean()),
        within_two=float((error.abs() <= 2 * spread).double().mean()),
        order=float(order),
    )
