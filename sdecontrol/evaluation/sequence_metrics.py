"""Of sets of token sequences: total variation where states can be listed, spectra of k-mers, diversity by edits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..processes.finite import FiniteLaw, StateSpace, check_tokens
from ..tensors import check_count

_MOST = 1 << 24  # numbers of a spectrum


def _tokens(name: str, x: Any, values: int) -> Tensor:
    """Sequences ``(n, L)`` int64, n >= 1.

    Raises:
        TypeError, ValueError: another dtype or shape, or tokens out of range.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be int64 tokens (n, L), got {type(x).__name__}.")
    check_tokens(name, x, values)
    if x.ndim < 2 or not len(x):
        raise ValueError(f"{name} must have shape (n, *shape), n >= 1, got {tuple(x.shape)}.")
    return x.flatten(1)


def total_variation(samples: Tensor, law: FiniteLaw) -> float:
    """``sum_x |share of x among the samples - p(x)|/2``, between 0 and 1, for a law whose states can be listed.

    Of n exact draws it is no 0 but about ``sum_x sqrt(p(1 - p)/(2 pi n))``: hold samples against as many draws,
    ``total_variation(law.sample((n,)), law)``.

    Args:
        samples: ``(n, *shape)`` int64 tokens. law: on one space, of one law: an exact solution's ``marginal(t)``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(law, FiniteLaw) or law.batch_shape:
        raise TypeError("law must be a single FiniteLaw, such as exact.marginal(t) of a problem on tokens.")
    index = law.space.index(law.space.check("samples", samples, True))
    if not len(index):
        raise ValueError("samples must have at least one row.")
    counts = torch.bincount(index.flatten().cpu(), minlength=law.space.size).double()
    return float(0.5 * (counts / len(index) - law.probs.double().cpu()).abs().sum())


def kmer_spectrum(samples: Tensor, vocabulary: int, k: int = 3) -> Tensor:
    """The shares of all words of k tokens among those of all places of the samples, ``(vocabulary ** k,)`` float64; the
    last token runs fastest.

    Args:
        samples: ``(n, L)`` int64 tokens, L >= k. vocabulary: number of tokens.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_count("vocabulary", vocabulary, 2)
    check_count("k", k)
    x = _tokens("samples", samples, vocabulary)
    if k > x.shape[1] or vocabulary**k > _MOST:
        raise ValueError(
            f"k must be {x.shape[1]} at most, the length of a sequence, and {vocabulary}^k no more than {_MOST}; "
            f"got {k}."
        )
    words = StateSpace(vocabulary, (k,)).index(x.unfold(1, k, 1))
    return torch.bincount(words.flatten().cpu(), minlength=vocabulary**k).double() / words.numel()


def kmer_distance(a: Tensor, b: Tensor, vocabulary: int, k: int = 3) -> float:
    """Total variation between the k-mer spectra of two sets of sequences ``(n, L)``, ``(m, L')``, between 0 and 1."""
    return float(0.5 * (kmer_spectrum(a, vocabulary, k) - kmer_spectrum(b, vocabulary, k)).abs().sum())


def kmer_correlation(a: Tensor, b: Tensor, vocabulary: int, k: int = 3) -> float:
    """Pearson's correlation between the k-mer spectra of two sets of sequences ``(n, L)``, ``(m, L')``: how alike they
    are as papers on DNA models say it (Wang et al. 2410.13643). It sees no order beyond k: :func:`kmer_distance` and a
    model's likelihood beside it.

    Raises:
        TypeError, ValueError: naming the argument; a spectrum in which all words are equally frequent has none.
    """
    x, y = (kmer_spectrum(sequences, vocabulary, k) for sequences in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    if size < 1e-12:
        raise ValueError(f"k={k}: all words are equally frequent on one side, so that there is no correlation.")
    return float(x @ y) / size


def edit_diversity(samples: Tensor, most: int = 1024) -> float:
    """The mean Levenshtein distance (insertions, deletions, substitutions) between two of the samples, over their
    length: 0 where all are alike. Of independent uniform letters it is less than the share of places that differ, since
    sequences are aligned: hold it against that of exact samples, or of the untuned model's.

    Args:
        samples: ``(n, L)`` int64 tokens, n >= 2. most: compare the first so many only, in the time of their square.

    Raises:
        TypeError, ValueError: naming the argument. ImportError: the extra "sequences" is missing.
    """
    check_count("most", most, 2)
    values = int(samples.max()) + 1 if isinstance(samples, Tensor) and samples.numel() else 1
    x = _tokens("samples", samples, values)[:most]
    if len(x) < 2:
        raise ValueError("samples must have at least two rows: diversity is of pairs.")
    if not x.shape[1]:
        raise ValueError("samples must have at least one token a row.")
    try:
        from rapidfuzz.distance import Levenshtein
        from rapidfuzz.process import cdist
    except ImportError as error:
        raise ImportError("edit_diversity needs rapidfuzz: pip install 'sdecontrol[sequences]'.") from error
    rows = ["".join(map(chr, row)) for row in x.tolist()]
    total = int(cdist(rows, rows, scorer=Levenshtein.distance, workers=1).sum())
    return total / (len(rows) * (len(rows) - 1) * x.shape[1])
