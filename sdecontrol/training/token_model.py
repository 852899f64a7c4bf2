"""The default network of ``fit_masked_diffusion``: a small transformer without causal masks."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WIDTH, _HEADS, _BLOCKS, _INNER = 64, 4, 3, 128


class AttentionBlock(nn.Module):
    """Attention among all positions, then two layers at each; both are added to what comes in, and 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_mix, self.norm_each = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.inlet, self.outlet = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.expand, self.contract = nn.Linear(_WIDTH, _INNER), nn.Linear(_INNER, _WIDTH)
        for layer in (self.outlet, self.contract):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor) -> Tensor:
        parts = self.inlet(self.norm_mix(h)).unflatten(-1, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        h = h + self.outlet(mixed.transpose(1, 2).flatten(2))
        return h + self.contract(F.silu(self.expand(self.norm_each(h))))


class TokenModel(nn.Module):
    """``(tokens (batch, *shape), s (batch,), y) -> logits (batch, *shape, V)``; token V is the mask.

    It does not look at s: given the tokens, the law of those that are masked does not depend on the time (Ou et al.
    2406.03736). Untrained it gives the frequencies of each position.

    Args:
        classes: number of labels y ``(batch,)``; the label ``classes``, or no y at all, is the unconditional model
            (where it was trained: ``unconditional``). 0: y are numbers ``(batch, ...)``, ``features`` of them.
        features: how many numbers a condition is seen as; 0: there is none.
    """

    def __init__(
        self, shape: Sequence[int], vocabulary: int, classes: int = 0, features: int = 0, unconditional: bool = True
    ) -> None:
        super().__init__()
        self.shape, self.vocabulary = tuple(shape), vocabulary
        self.classes, self.unconditional = classes, unconditional
        self.token = nn.Embedding(vocabulary + 1, _WIDTH)
        self.position = nn.Parameter(torch.randn(math.prod(shape), _WIDTH))
        self.condition = nn.Linear(features, _WIDTH) if features else None
        self.blocks = nn.ModuleList(AttentionBlock() for _ in range(_BLOCKS))
        self.norm = nn.LayerNorm(_WIDTH)
        self.last = nn.Linear(_WIDTH, vocabulary)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.level = nn.Parameter(torch.zeros(math.prod(shape), vocabulary))

    @torch.no_grad()
    def fit_statistics(self, data: Tensor) -> None:
        """Begin with the tokens' frequencies at each position of data ``(n, *shape)``, one more counted of each."""
        counts = F.one_hot(data.flatten(1), self.vocabulary).sum(0) + 1.0
        self.level.copy_((counts / counts.sum(-1, keepdim=True)).log())

    def forward(self, x: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        """The logits; those of positions that are not masked mean nothing. x may be probabilities of tokens
        ``(batch, *shape, V+1)``, the mask's the last, at which the logits have a gradient by them.

        Raises:
            ValueError: without y, where no unconditional model was trained.
        """
        tokens = x.flatten(1, -2) @ self.token.weight if x.is_floating_point() else self.token(x.flatten(1))
        h = tokens + self.position
        if self.condition is not None:
            h = h + self._seen(y, len(x), h).unsqueeze(1)
        for block in self.blocks:
            h = block(h)
        return (self.last(self.norm(h)) + self.level).unflatten(1, self.shape)

    def _seen(self, y: Tensor | None, rows: int, like: Tensor) -> Tensor:
        assert self.condition is not None
        if y is None:
            if not self.unconditional:
                raise ValueError(
                    "y is missing: a model trained with drop=0 has no unconditional part; call model(x, s, y)."
                )
            y = torch.full((rows,), self.classes, device=like.device)
        if self.classes:
            return self.condition(F.one_hot(y.long().reshape(-1), self.classes + 1).to(like.dtype))
        return self.condition(y.to(like.dtype).reshape(rows, -1))
