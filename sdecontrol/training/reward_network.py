"""The default regressors of ``fit_reward``, of vectors, images and tokens."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_WIDTH, _CHANNELS, _WORD = 64, 32, 5
_IMAGE = 3  # dimensions of an event that is one: (channels, height, width)


class RewardNetwork(nn.Module):
    """``x (batch, *shape) -> (batch,)``: what a line says, corrected by layers; of tokens x are probabilities
    ``(batch, *shape, V)``.

    The hidden layers see all coordinates standardised; of images beside them two convolutions, averaged over places;
    of tokens words of five, their mean and their largest over places, so that a motif counts wherever it stands.

    Args:
        shape: of an event. vocabulary: V; None: numbers.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, shape: Sequence[int], vocabulary: int | None = None) -> None:
        super().__init__()
        size = math.prod(shape) * (vocabulary or 1)
        self.tokens, self.image = vocabulary is not None, vocabulary is None and len(shape) == _IMAGE
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("spread", torch.ones(size))
        self.words: nn.Module | None = None
        seen = size
        if self.tokens:
            self.words = nn.Sequential(
                nn.Conv1d(vocabulary or 1, _CHANNELS, _WORD, padding=_WORD // 2),
                nn.SiLU(),
                nn.Conv1d(_CHANNELS, _CHANNELS, _WORD, padding=_WORD // 2),
                nn.SiLU(),
            )
            seen += 2 * _CHANNELS
        elif self.image:
            self.words = nn.Sequential(
                nn.Conv2d(shape[0], _CHANNELS, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(_CHANNELS, _CHANNELS, 3, stride=2, padding=1),
                nn.SiLU(),
            )
            seen += _CHANNELS
        self.line = nn.Linear(size, 1)
        self.layers = nn.Sequential(
            nn.Linear(seen, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, 1)
        )

    @torch.no_grad()
    def fit_statistics(self, x: Tensor) -> None:
        """Standardise by data, x as in a call."""
        flat = x.flatten(1)
        self.mean.copy_(flat.mean(0))
        whole = float(flat.var(0).mean().sqrt())
        self.spread.copy_(flat.std(0).clamp(min=1e-2 * whole + 1e-12))

    def forward(self, x: Tensor) -> Tensor:
        z = (x.flatten(1) - self.mean) / self.spread
        seen = [z]
        if self.words is not None and self.tokens:
            words = self.words(x.flatten(1, -2).mT)
            seen += [words.mean(2), words.amax(2)]
        elif self.words is not None:
            seen.append(self.words(z.unflatten(1, x.shape[1:])).mean((2, 3)))
        return (self.line(z) + self.layers(torch.cat(seen, 1))).squeeze(1)
