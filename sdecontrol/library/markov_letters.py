"""A Markov chain of letters as a masked diffusion model: its conditionals, likelihoods and draws are exact."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..processes.finite import check_tokens
from ..randomness import Place, generator_for
from ..tensors import check_count, check_tensor


class MarkovLetters(nn.Module):
    """``p(x) = first(x_1) prod_j move(x_j | x_{j-1})`` on L letters out of V.

    Called as a model of :func:`masked_diffusion` it gives ``log p(letter | all others that are not masked)`` of
    each position, by forward and backward messages (Baum et al. 1970): the conditionals of one joint law, so that in
    random order the end has the law p, and tilts of tokens reach the optimum. It has no parameters and does
    not look at s.

    Args:
        first: ``(V,)`` probabilities of the first letter. move: ``(V, V)``, rows those of the next one. length: L.

    Raises:
        TypeError, ValueError: probabilities that are negative or do not sum to 1, or shapes that do not fit.
    """

    first: Tensor
    move: Tensor

    def __init__(self, first: Tensor, move: Tensor, length: int) -> None:
        super().__init__()
        check_count("length", length)
        first = check_tensor("first", first, shape=("letters",), hint="first: (V,) probabilities.")
        move = check_tensor("move", move, shape=(len(first), len(first)), hint="move: (V, V) probabilities.")
        for name, p in (("first", first), ("move", move)):
            if bool((p < 0).any()) or float((p.sum(-1) - 1).abs().max()) > 1e-6:
                raise ValueError(f"{name} must be probabilities that sum to 1; they sum to {p.sum(-1).tolist()}.")
        self.register_buffer("first", first.double() / first.double().sum())
        self.register_buffer("move", move.double() / move.double().sum(1, keepdim=True))
        self.length, self.vocabulary = length, len(first)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        """``(batch, L)`` tokens, V the mask, to log-probabilities ``(batch, L, V)``. x may be probabilities of tokens
        ``(batch, L, V+1)``: evidence that is not certain, with a gradient."""
        first, move = self.first.to(s), self.move.to(s)
        allowed = torch.cat((torch.eye(self.vocabulary).to(s), torch.ones(1, self.vocabulary).to(s)))
        seen = x.to(s) @ allowed if x.is_floating_point() else allowed[x]
        ahead, behind = [first.expand(len(seen), -1)], [torch.ones_like(seen[:, 0])]
        for j in range(self.length - 1):
            ahead.append(_scaled((ahead[-1] * seen[:, j]) @ move))
            behind.append(_scaled((behind[-1] * seen[:, self.length - 1 - j]) @ move.mT))
        mass = torch.stack(ahead, 1) * torch.stack(behind[::-1], 1)
        return mass.clamp(min=1e-30).log().log_softmax(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p(x)`` of tokens ``(n, L)``, ``(n,)`` float64."""
        check_tokens("x", x, self.vocabulary)
        first, move = self.first.log().to(x.device), self.move.log().to(x.device)
        return first[x[:, 0]] + move[x[:, :-1], x[:, 1:]].sum(1)

    def sample(self, n: int, seed: int) -> Tensor:
        """Exact draws ``(n, L)``, on the CPU."""
        check_count("n", n)
        generator = generator_for("cpu", seed, Place.LETTERS)
        u = torch.rand(n, self.length, generator=generator, dtype=torch.float64)
        first, move = self.first.cpu().cumsum(0), self.move.cpu().cumsum(1)
        letters = [(u[:, 0, None] > first[:-1]).sum(1)]
        for j in range(1, self.length):
            letters.append((u[:, j, None] > move[letters[-1], :-1]).sum(1))
        return torch.stack(letters, 1)


def _scaled(mass: Tensor) -> Tensor:
    """Messages that do not vanish in long sequences."""
    return mass / mass.sum(1, keepdim=True)
