"""Motifs of transcription factors: JASPAR's matrices (pyjaspar ships them), and how well sequences fit, with a
gradient."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadFileError

RELEASE = "JASPAR2024"
LETTERS = "ACGT"


@lru_cache
def jaspar_counts(matrix: str) -> Tensor:
    """How often each base was seen at each place of a motif's sites, ``(width, 4)`` float64, A C G T: a profile of
    JASPAR 2024 (Rauluseviciute et al. 2024), read offline from the package pyjaspar.

    Args:
        matrix: its identifier with version, such as "MA0035.5".

    Raises:
        ImportError: pyjaspar is missing; names the extra that has it. ValueError: no such matrix.
    """
    try:
        from pyjaspar import jaspardb
    except ImportError as error:
        raise ImportError("motifs come with pyjaspar: pip install 'sdecontrol[bio]'.") from error
    with warnings.catch_warnings():  # Biopython's, where there is none
        warnings.simplefilter("ignore")
        found: Any = jaspardb(release=RELEASE).fetch_motif_by_id(matrix)
    if found is None:
        raise ValueError(f"matrix: {RELEASE} has no {matrix!r}; an identifier is like 'MA0035.5'.")
    counts = torch.tensor([list(found.counts[letter]) for letter in LETTERS], dtype=torch.float64).mT
    if not bool((counts.sum(1) > 0).all()):
        raise BadFileError(f"{matrix} of pyjaspar's {RELEASE} has a place without counts.")
    return counts


def probabilities(counts: Tensor) -> Tensor:
    """Of the bases of a site, ``(width, 4)``: counts with a pseudocount of ``sqrt(n)/4``, n the sites (Wasserman &
    Sandelin 2004)."""
    n = counts.sum(1, keepdim=True)
    return (counts + n.sqrt() / 4) / (n + n.sqrt())


class Motifs(nn.Module):
    """Log-odds of motifs against equal bases, at every place of a sequence and on both strands, in nats.

    Called with probabilities of bases ``(batch, L, 4)`` it gives, for each motif, ``(batch, 2, L - width + 1)``:
    forward strand, then reverse complement; linear in the probabilities.

    Args:
        matrices: identifiers of :func:`jaspar_counts`.
    """

    def __init__(self, matrices: Sequence[str]) -> None:
        super().__init__()
        self.matrices = tuple(matrices)
        for name in self.matrices:
            odds = (4 * probabilities(jaspar_counts(name))).log()
            both = torch.stack((odds, odds.flip(0, 1)))  # complement: A C G T backwards
            self.register_buffer(name.replace(".", "_"), both.mT.contiguous())  # (strands, 4, width)

    def odds(self) -> list[Tensor]:
        """``(2, 4, width)`` of each motif, strand after strand."""
        return [self.get_buffer(name.replace(".", "_")) for name in self.matrices]

    @property
    def widths(self) -> list[int]:
        return [odds.shape[2] for odds in self.odds()]

    @property
    def highest(self) -> list[float]:
        """The log-odds of each motif's best site."""
        return [float(odds[0].amax(0).sum()) for odds in self.odds()]

    def forward(self, z: Tensor) -> list[Tensor]:
        x = z.mT
        return [nn.functional.conv1d(x, odds.to(x)) for odds in self.odds()]


class Occupancy(nn.Module):
    """``log sum exp(log-odds)`` over all places, strands and motifs, ``(batch,)`` in nats of ``z (batch, L, 4)``: of
    factors at low concentration, the logarithm of how often one is bound (Berg & von Hippel 1987)."""

    def __init__(self, matrices: Sequence[str]) -> None:
        super().__init__()
        self.motifs = Motifs(matrices)

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([scores.flatten(1) for scores in self.motifs(z)], 1).logsumexp(1)
