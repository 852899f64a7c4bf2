"""``fit_masked_diffusion``: a masked diffusion model from sequences, by denoising cross-entropy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..chains.masked import MaskSchedule
from ..processes.modules import copied
from ..randomness import Place, fresh_seed, generator_for, global_rng
from ..tensors import check_count, check_output, probing
from .fit_score import check_condition, classes_of
from .fitting import descend
from .token_model import TokenModel


def fit_masked_diffusion(
    data: Tensor,
    vocabulary: int,
    model: nn.Module | None = None,
    *,
    schedule: str | Callable[[Tensor], Tensor] = "linear",
    iterations: int = 2000,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    seed: int | None = None,
    progress: bool | None = None,
    condition: Tensor | None = None,
    drop: float = 0.0,
) -> nn.Module:
    """Train a masked diffusion model on sequences, ready for :func:`masked_diffusion`.

    The loss bounds the data's negative log-likelihood (Sahoo et al. 2406.07524, eq. 10; Shi et al. 2406.04329): with s
    drawn and tokens masked with probability ``1 - a(s)``, the cross-entropy of the masked tokens, weighted by
    ``-a'(s)/(1 - a(s))``. The number m of masked tokens is drawn first, uniformly, which gives the same expectation for
    any schedule with the bounded weight ``1/m`` (Ou et al. 2406.03736); s then has its law given m.

    Args:
        data: ``(n, *shape)`` int64 tokens ``0 .. vocabulary-1``.
        vocabulary: V, the number of tokens; the mask is token V, and not in the data.
        model: your own nn.Module ``model(x, s) -> logits (batch, *shape, V)``, s ``(batch,)`` (a copy of it is
            trained); None: a small transformer, which does not look at s.
        schedule: of the chain that it is for; it matters for models that look at s alone.
        iterations, batch_size, learning_rate: of Adam, with a warm-up, a cosine decay and averaged weights.
        seed: the same seed gives the same weights; None draws one from torch's global generator, which is otherwise
            left alone.
        progress: show a progress bar; None: if the terminal can.
        condition: y of each datum: integer labels ``(n,)``, or numbers ``(n, ...)``. The model is then
            ``model(x, s, y)``.
        drop: share of the data whose label is replaced by the number of classes while training, so that the same model
            is an unconditional one too (for classifier-free guidance): the default network is that when called as
            ``model(x, s)``. For labels only.

    Returns:
        The trained model, in evaluation mode.

    Raises:
        ValueError, TypeError: each naming the argument. NonFiniteError: a loss that is not finite.
    """
    _check_tokens(data, vocabulary)
    check_count("iterations", iterations)
    check_count("batch_size", batch_size)
    masks, drop = MaskSchedule(schedule), check_condition(data, condition, drop)
    seed = fresh_seed(seed)
    generator = generator_for(data.device, seed, Place.MASKED_BATCH)

    def loss(i: int) -> Tensor:
        rows = torch.randint(len(data), (batch_size,), generator=generator, device=data.device)
        x0, y = data[rows], None if condition is None else condition[rows]
        if y is not None and drop > 0:
            dropped = torch.rand(len(y), generator=generator, device=data.device) < drop
            y = y.masked_fill(dropped, classes_of(condition))
        masked, s = draw_masks(x0, masks, generator)
        x, s = x0.masked_fill(masked, vocabulary), s.to(like.dtype)
        logits = network(x, s) if y is None else network(x, s, y)
        surprisal = -logits.log_softmax(-1).gather(-1, x0.unsqueeze(-1)).squeeze(-1)
        each = (surprisal * masked).flatten(1).sum(1) / masked.flatten(1).sum(1)
        return each.mean()  # nats a token

    with global_rng(data.device, seed, Place.MASKED_NETWORK):  # initial weights, and dropout in a user's model
        network = _network(data, vocabulary, model, condition, drop)
        like = next(network.parameters())
        return descend(network, loss, iterations, learning_rate, "fit-masked", progress)


def draw_masks(x0: Tensor, masks: MaskSchedule, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which positions are masked, ``(batch, *shape)``: so many that each number from one to all is as likely, any of
    them; and a time of noising ``(batch,)`` from its law given that number."""
    batch, positions = len(x0), x0[0].numel()
    order = torch.rand(batch, positions, generator=generator, device=x0.device).argsort(1)
    count = torch.randint(1, positions + 1, (batch, 1), generator=generator, device=x0.device)
    # the share that is masked, given so many: the m-th of as many uniform numbers as there are positions
    uniform = torch.rand(batch, positions, generator=generator, device=x0.device, dtype=torch.float64).sort(1).values
    share = uniform.gather(1, count - 1).squeeze(1)
    return (order < count).unflatten(1, x0.shape[1:]), masks.time(1 - share)


def _check_tokens(data: Any, vocabulary: Any) -> None:
    """Raise unless these are tokens ``0 .. vocabulary-1``."""
    check_count("vocabulary", vocabulary, 2)
    if not isinstance(data, Tensor):
        raise TypeError(f"data must be a torch tensor (n, *shape) of int64 tokens, got {type(data).__name__}.")
    if data.dtype != torch.int64:
        raise TypeError(f"data must be int64 tokens, got {data.dtype}; use data.long() if they are whole numbers.")
    if data.ndim < 2 or not data.numel():
        raise ValueError(f"data must have shape (n, *shape) with n >= 1, got {tuple(data.shape)}.")
    low, high = int(data.min()), int(data.max())
    if high == vocabulary:
        raise ValueError(f"data has the token {vocabulary}, which is the mask; tokens are 0 to {vocabulary - 1}.")
    if low < 0 or high > vocabulary:
        raise ValueError(
            f"data has tokens from {low} to {high}; with vocabulary={vocabulary} they are 0 to {vocabulary - 1}."
        )


def _network(
    data: Tensor, vocabulary: int, model: nn.Module | None, condition: Tensor | None, drop: float
) -> nn.Module:
    if model is None:
        classes = classes_of(condition)
        features = 0 if condition is None else classes + 1 if classes else condition[0].numel()
        network = TokenModel(data.shape[1:], vocabulary, classes, features, drop > 0 or condition is None)
        network.to(data.device).fit_statistics(data)
        return network
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module (x, s) -> logits or None, got {type(model).__name__}.")
    like = next((p for p in model.parameters() if p.requires_grad), None)
    if like is None:
        raise ValueError("model has no trainable parameters.")
    rows = torch.arange(3) % len(data)
    s, more = torch.full((3,), 0.5).to(like), () if condition is None else (condition[rows],)
    called = f"model(x, s{', y' if more else ''}), x {tuple(data[rows].shape)} int64, s (batch,)"
    with torch.no_grad(), probing("model", called):
        out = copied(model).eval()(data[rows], s, *more)
    check_output("model", out, (3, *data.shape[1:], vocabulary), s, f"It is called as {called}.")
    return copied(model).train()
