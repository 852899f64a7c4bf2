"""Enhancer-like DNA that the project makes: motifs planted in a background, a model of it, and an activity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..files.bundles import register_bundle
from ..randomness import Place, generator_for, global_rng
from ..tensors import check_count
from ..training.fit_masked import fit_masked_diffusion
from .cache import read_cached, write_cached
from .markov_letters import MarkovLetters
from .motifs import Motifs, jaspar_counts, probabilities

ENHANCER_LENGTH = 200
RECIPE = 1  # raised whenever sequences, model or training change: older caches are then passed over
_KIND = register_bundle("enhancer model", "recipe")

_GATA1, _TAL1, _KLF1, _NFE2, _REST = "MA0035.5", "MA0091.2", "MA0493.3", "MA0841.2", "MA0138.3"
_WEIGHTS = {_GATA1: 1.0, _TAL1: 1.0, _KLF1: 0.8, _NFE2: 0.8, _REST: -1.5}
_SITES = (2, 8)  # of a sequence, beside a pair
_BONUS, _GAPS = 1.5, (6, 7, 8, 9, 10)  # of TAL1 before GATA1, bases between them
_FIRST = (0.29, 0.21, 0.21, 0.29)
_MOVE = ((0.34, 0.17, 0.26, 0.23), (0.34, 0.27, 0.05, 0.34), (0.27, 0.22, 0.27, 0.24), (0.2, 0.21, 0.26, 0.33))
ITERATIONS = 1000  # of the model's training
_SEQUENCES, _BATCH, _RATE = 8192, 64, 4e-3
_CHANNELS, _WIDTH, _DILATIONS = 48, 7, (1, 2, 4, 1)


# ---------------------------------------------------------------- sequences


def enhancer_sequences(n: int, seed: int) -> Tensor:
    """Tokens ``(n, 200)``: a Markov background, in which half of the sequences have a site of TAL1 with one of GATA1 6
    to 10 bases behind it, and each has two to eight more sites, of either strand, of GATA1, KLF1, NFE2 or (one in ten)
    REST. Sites are drawn from JASPAR's matrices; a later one may cover an earlier."""
    check_count("n", n)
    x = MarkovLetters(torch.tensor(_FIRST), torch.tensor(_MOVE), ENHANCER_LENGTH).sample(n, seed)
    generator = generator_for("cpu", seed, Place.ENHANCERS)
    laws = {name: probabilities(jaspar_counts(name)) for name in _WEIGHTS}

    def whole(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (n,), generator=generator)

    def site(name: str, turned: Tensor) -> Tensor:
        letters = torch.multinomial(laws[name], n, replacement=True, generator=generator).mT
        return torch.where(turned[:, None], 3 - letters.flip(1), letters)

    def plant(letters: Tensor, at: Tensor, rows: Tensor) -> None:
        places = at[:, None] + torch.arange(letters.shape[1])
        x[rows] = x.scatter(1, places, letters)[rows]

    sites = whole(_SITES[0], _SITES[1] + 1)
    for turn in range(_SITES[1]):
        kind = whole(0, 10)
        for name, first, last in ((_GATA1, 0, 3), (_KLF1, 3, 6), (_NFE2, 6, 9), (_REST, 9, 10)):
            letters = site(name, whole(0, 2) == 1)
            at = whole(0, ENHANCER_LENGTH - letters.shape[1] + 1)
            plant(letters, at, (sites > turn) & (kind >= first) & (kind < last))
    straight, pair = torch.zeros(n, dtype=torch.bool), whole(0, 2) == 1
    tal, gata, gap = site(_TAL1, straight), site(_GATA1, straight), whole(_GAPS[0], _GAPS[-1] + 1)
    at = whole(0, ENHANCER_LENGTH - tal.shape[1] - gata.shape[1] - _GAPS[-1] + 1)
    plant(tal, at, pair)
    plant(gata, at + tal.shape[1] + gap, pair)
    return x


# ---------------------------------------------------------------- the activity


class Grammar(nn.Module):
    """The activity of bases' probabilities ``(batch, L, 4)``, ``(batch,)``: ``sum_m w_m log(1 + sites_m)``, sites
    counted softly, ``sum sigmoid(log-odds - 0.75 of the best site's)``, and 1.5 ``log(1 + pairs)`` of TAL1 and GATA1,
    both forward and 6 to 10 bases apart. The numbers are made up."""

    def __init__(self) -> None:
        super().__init__()
        self.motifs = Motifs(list(_WEIGHTS))

    def forward(self, z: Tensor) -> Tensor:
        scores = zip(self.motifs(z), self.motifs.highest)
        found = [torch.sigmoid(score - 0.75 * highest) for score, highest in scores]
        total = z.new_zeros(len(z))
        for weight, sites in zip(_WEIGHTS.values(), found):
            total = total + weight * sites.sum((1, 2)).log1p()
        gata, tal = (found[list(_WEIGHTS).index(name)][:, 0] for name in (_GATA1, _TAL1))
        pairs = z.new_zeros(len(z))
        for gap in _GAPS:
            behind = gata[:, self.motifs.widths[1] + gap :]
            pairs = pairs + (tal[:, : behind.shape[1]] * behind).sum(1)
        return total + _BONUS * pairs.log1p()


# ---------------------------------------------------------------- the model


class EnhancerModel(nn.Module):
    """``(tokens (batch, L), s) -> logits (batch, L, 4)`` by convolutions with gaps, the same at every place; it does
    not look at s. x may be probabilities of tokens ``(batch, L, 5)``, the mask's the last."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Conv1d(5, _CHANNELS, _WIDTH, padding=_WIDTH // 2)
        self.blocks = nn.ModuleList(
            nn.Conv1d(_CHANNELS, _CHANNELS, _WIDTH, padding=d * (_WIDTH // 2), dilation=d) for d in _DILATIONS
        )
        self.norms = nn.ModuleList(nn.GroupNorm(1, _CHANNELS) for _ in _DILATIONS)
        self.outlet = nn.Conv1d(_CHANNELS, 4, 1)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        z = x if x.is_floating_point() else nn.functional.one_hot(x, 5)
        h = self.inlet(z.to(self.outlet.weight).mT)
        for norm, block in zip(self.norms, self.blocks):
            h = h + block(nn.functional.silu(norm(h)))
        return self.outlet(nn.functional.silu(h)).mT


def enhancer_model() -> EnhancerModel:
    """The task's masked diffusion, in evaluation mode: trained on 8192 sequences at the first call (a minute or two of
    one core), then from the package's cache.

    Raises:
        ImportError: pyjaspar is missing.
    """
    name = f"enhancer-model-{RECIPE}"
    model = EnhancerModel()
    found = read_cached(name, _KIND)
    if found is not None and found[1].get("recipe") == RECIPE:
        model.load_state_dict(found[0])
        return model.eval()
    with global_rng("cpu", 0, Place.ENHANCER_WEIGHTS):
        model = EnhancerModel().float()
    data = enhancer_sequences(_SEQUENCES, 1)
    trained = fit_masked_diffusion(
        data, 4, model, iterations=ITERATIONS, batch_size=_BATCH, learning_rate=_RATE, seed=0
    )
    assert isinstance(trained, EnhancerModel)
    write_cached(name, _KIND, trained.state_dict(), {"recipe": RECIPE})
    return trained
