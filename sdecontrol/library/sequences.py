"""Tasks of sequence design: a generative model of DNA or RNA, an activity, and what says how natural a sequence is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..chains.masked import MaskedDiffusionChain, MaskSchedule, masked_diffusion
from ..errors import check_name
from ..evaluation.sequence_metrics import kmer_correlation
from ..problems.black_box import BlackBox
from ..problems.problem import ControlProblem
from ..problems.rewards import OneHot
from ..processes.finite import check_tokens
from ..randomness import Place, generator_for
from ..tensors import check_count
from ..training.fit_masked import draw_masks
from .enhancers import ENHANCER_LENGTH, Grammar, enhancer_model, enhancer_sequences
from .folding import folding_energies
from .markov_letters import MarkovLetters
from .motifs import Occupancy
from .target_base import Card, register

_ALPHABETS = {"DNA": "ACGT", "RNA": "ACGU"}


@dataclass(frozen=True)
class SequenceCard(Card):
    """A named task. ``real``: what in it was measured, and by whom; ``made``: what this project made up. ``alpha``: the
    usual temperature, at which the optimum is two to three nats from the model where that is known."""

    real: str
    made: str
    alpha: float


@dataclass(frozen=True)
class Naturalness:
    """How like the model's own sequences some are.

    Attributes:
        kmer_correlation: Pearson's, of their spectrum of 3-mers with that of natural ones.
        log_likelihood: of the base model, nats a letter, their mean; exact or a bound, as the task says.
        natural_log_likelihood: the same of natural sequences, to hold it against.
    """

    kmer_correlation: float
    log_likelihood: float
    natural_log_likelihood: float

    def __str__(self) -> str:
        return (
            f"3-mer correlation {self.kmer_correlation:.3f}, log likelihood {self.log_likelihood:.3f} a letter "
            f"(natural {self.natural_log_likelihood:.3f})"
        )


class SequenceTask:
    """What :func:`sequence_task` returns.

    Attributes:
        card: its version and definition, what of it is real and what is made. name: of the task.
        alphabet: its letters, in the order of the tokens 0, 1, 2, 3. length: L.
        reference: the generative model, a masked diffusion chain of ``model``. reward: of tokens ``(batch, L)``.
        exact_likelihood: whether ``log_likelihood`` is exact; else a lower bound (ELBO), estimated.
    """

    card: SequenceCard

    def __init__(
        self,
        kind: str,
        reference: MaskedDiffusionChain,
        reward: Callable[[Tensor], Tensor],
        natural: Callable[[int, int], Tensor],
    ) -> None:
        self.alphabet, self.reference, self.reward = _ALPHABETS[kind], reference, reward
        self.length = reference.event_shape.numel()
        self._natural, self.model = natural, reference.model
        self.exact_likelihood = isinstance(self.model, MarkovLetters)

    @property
    def name(self) -> str:
        return self.card.name

    def __repr__(self) -> str:
        return f"SequenceTask({self.name}, version {self.card.version}, {self.length} letters of {self.alphabet})"

    def problem(self, alpha: float | None = None, reward: Any = None) -> ControlProblem:
        """The control problem. alpha: None: the card's. reward: another one of tokens, such as a learned one; None: the
        task's own."""
        chosen = self.reward if reward is None else reward
        return ControlProblem(self.reference, reward=chosen, alpha=self.card.alpha if alpha is None else alpha)

    # ---------------------------------------------------------------- letters and tokens

    def encode(self, sequences: Sequence[str]) -> Tensor:
        """Tokens ``(n, L)`` int64 of strings of L letters, capital or small.

        Raises:
            ValueError: a letter outside of the alphabet, or another length, with the sequence and the place. TypeError:
                no strings.
        """
        if isinstance(sequences, str):
            raise TypeError("sequences must be a list of strings; write [sequence] for one.")
        if not len(sequences):
            raise ValueError("sequences must have at least one string.")
        rows = []
        for i, sequence in enumerate(sequences):
            if not isinstance(sequence, str):
                raise TypeError(f"sequences must be strings, got {type(sequence).__name__} at {i}.")
            if len(sequence) != self.length:
                raise ValueError(
                    f"sequences[{i}] has {len(sequence)} letters; those of {self.name} have {self.length}."
                )
            row = [self.alphabet.find(letter) for letter in sequence.upper()]
            if -1 in row:
                j = row.index(-1)
                hint = {"U": "; DNA has T in the place of U", "T": "; RNA has U in the place of T"}
                raise ValueError(
                    f"sequences[{i}] has the letter {sequence[j]!r} at {j}; those of {self.name} are "
                    f"{', '.join(self.alphabet)}{hint.get(sequence[j].upper(), '')}."
                )
            rows.append(row)
        return torch.tensor(rows)

    def decode(self, tokens: Tensor) -> list[str]:
        """The strings of tokens ``(n, L)``."""
        self._check(tokens)
        return ["".join(self.alphabet[token] for token in row) for row in tokens.tolist()]

    def _check(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be int64 tokens (n, {self.length}), got {type(x).__name__}; use encode(strings).")
        check_tokens("x", x, len(self.alphabet))
        if x.ndim != 2 or x.shape[1] != self.length or not len(x):
            raise ValueError(f"x must have shape (n, {self.length}), n >= 1, got {tuple(x.shape)}.")

    # ---------------------------------------------------------------- how natural

    def natural(self, n: int, seed: int) -> Tensor:
        """Sequences ``(n, L)`` of the law that the model was made from, or trained on."""
        return self._natural(n, seed)

    @torch.no_grad()
    def log_likelihood(self, x: Tensor, draws: int = 16, seed: int = 0) -> Tensor:
        """Of the untuned model at tokens ``(n, L)``, nats, ``(n,)`` float64: exact where the model is a Markov chain of
        letters, else an estimate without bias of the bound that it was trained by (Sahoo et al. 2406.07524), from so
        many ``draws`` of masked letters."""
        self._check(x)
        check_count("draws", draws)
        if isinstance(self.model, MarkovLetters):
            return self.model.log_prob(x)
        generator, schedule = generator_for("cpu", seed, Place.MASKED_BOUND), MaskSchedule()
        found = torch.zeros(len(x), dtype=torch.float64)
        for _ in range(draws):
            masked, s = draw_masks(x, schedule, generator)
            hidden = x.masked_fill(masked, len(self.alphabet))
            for rows in torch.arange(len(x)).split(256):
                logits = self.model(hidden[rows], s[rows].to(self.reference.dtype)).log_softmax(-1)
                each = logits.gather(-1, x[rows].unsqueeze(-1)).squeeze(-1).double() * masked[rows]
                found[rows] += self.length * each.sum(1) / masked[rows].sum(1)
        return found / draws

    def naturalness(self, x: Tensor, natural: int = 4096, seed: int = 0) -> Naturalness:
        """Of sequences ``(n, L)``, beside so many ``natural`` ones (the likelihood: of 512 of them)."""
        self._check(x)
        own = self.natural(natural, seed)
        return Naturalness(
            kmer_correlation(x, own, len(self.alphabet)),
            float(self.log_likelihood(x).mean()) / self.length,
            float(self.log_likelihood(own[:512]).mean()) / self.length,
        )


# ---------------------------------------------------------------- the tasks

_CARDS: dict[str, SequenceCard] = {}
_card = partial(register, _CARDS, SequenceCard)


def sequence_task_names() -> list[str]:
    """The names that :func:`sequence_task` knows."""
    return sorted(_CARDS)


def sequence_card(name: str) -> SequenceCard:
    """The card of a task: version, definition, what is real and what is made.

    Raises:
        ValueError: unknown name, with the nearest ones.
    """
    check_name("task", name, _CARDS)
    return _CARDS[name]


def sequence_task(name: str) -> SequenceTask:
    """A task of sequence design by its name (:func:`sequence_task_names`): fixed, versioned, and offline.

    Raises:
        ValueError: unknown name, with the nearest ones. ImportError: a package is missing, with the extra that has it.
    """
    card = sequence_card(name)
    task = card.make()
    task.card = card
    return task


def _markov(kind: str, length: int, reward: Callable[[Tensor], Tensor]) -> SequenceTask:
    law = MarkovLetters(torch.tensor(_FIRST), torch.tensor(_MOVE), length)
    chain = masked_diffusion(law, length, 4, order="random", dtype=torch.get_default_dtype())
    return SequenceTask(kind, chain, reward, law.sample)


#: few C before G, as in vertebrates, and a little more A and T; made
_FIRST = (0.28, 0.22, 0.22, 0.28)
_MOVE = ((0.33, 0.18, 0.25, 0.24), (0.34, 0.27, 0.05, 0.34), (0.27, 0.22, 0.26, 0.25), (0.21, 0.22, 0.25, 0.32))


@_card(
    "dna-8mer",
    version=1,
    real="the motifs: JASPAR 2024's GATA1 (MA0035.5, ChIP-seq), FOXA1 (MA0148.5, ChIP-seq), ATF1 (MA0604.1, arrays)",
    made="the model, a Markov chain of letters; the activity, which is computed from the motifs and not measured",
    alpha=1.5,
)
def _dna_8mer() -> SequenceTask:
    """DNA of 8 bases. Model: a Markov chain with few CG, whose conditionals are exact, one base a step. Activity: log
    of the summed odds of all sites of GATA1, FOXA1 and ATF1 on both strands, in nats. All 65 536 sequences can be
    listed, and so log Z and the tilted law are exact."""
    return _markov("DNA", 8, OneHot(Occupancy(("MA0035.5", "MA0148.5", "MA0604.1")), 4))


@_card(
    "dna-enhancer",
    version=1,
    real="the motifs: JASPAR 2024's GATA1, TAL1::TCF3, KLF1, NFE2 (activators) and REST (a repressor)",
    made="the sequences (a Markov background with planted sites), the grammar of the activity, and so both the model, "
    "trained on them, and what counts as natural",
    alpha=0.5,
)
def _dna_enhancer() -> SequenceTask:
    """DNA of 200 bases. Model: a small convolutional masked diffusion, trained on first use on sequences with planted
    motifs, and cached; 50 steps, in which about four bases are unmasked. Activity: soft counts of sites of four
    activators with falling returns, a bonus where TAL1 stands 6 to 10 bases before GATA1, less sites of REST; it has a
    gradient by one-hot bases."""
    chain = masked_diffusion(enhancer_model(), ENHANCER_LENGTH, 4, steps=50)
    return SequenceTask("DNA", chain, OneHot(Grammar(), 4), enhancer_sequences)


@_card(
    "rna-utr",
    version=1,
    real="the folding energies: ViennaRNA's minimum free energies at 37 degrees (Lorenz et al. 2011)",
    made="the model, a Markov chain of letters; that stability is what is wanted",
    alpha=1.5,
)
def _rna_utr() -> SequenceTask:
    """RNA of 50 bases, as a short untranslated region. Model: a Markov chain with few CG. Reward: the stability, less
    the minimum free energy of its folds, kcal/mol, a black box."""
    folding_energies(["ACGU"])  # a missing package is named now
    return _markov("RNA", 50, BlackBox(_stability, inputs="numpy"))


def _stability(x: Any) -> Any:
    return [-energy for energy in folding_energies(["".join("ACGU"[token] for token in row) for row in x.tolist()])]
