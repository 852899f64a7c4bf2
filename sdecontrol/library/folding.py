"""How RNA folds: minimum free energies and pairs, by ViennaRNA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_RNA = frozenset("ACGU")


def _folded(sequences: Sequence[str]) -> list[tuple[str, float]]:
    try:
        import RNA
    except ImportError as error:
        raise ImportError("folding needs ViennaRNA: pip install 'sdecontrol[bio]'.") from error
    fold: Any = RNA.fold  # type: ignore[attr-defined]
    for i, sequence in enumerate(sequences):
        if not sequence or set(sequence) - _RNA:  # the package takes any letter, and pairs it with none
            raise ValueError(f"sequences[{i}] must be letters A, C, G, U, got {sequence!r}.")
    return [fold(sequence) for sequence in sequences]


def folding_energies(sequences: Sequence[str]) -> list[float]:
    """The minimum free energy of each sequence's secondary structures at 37 degrees, kcal/mol, 0 where it is open.

    Raises:
        ImportError: ViennaRNA is missing; names the extra that has it. ValueError: a letter that is no base of RNA.
    """
    return [energy for _, energy in _folded(sequences)]


def paired_shares(sequences: Sequence[str]) -> list[float]:
    """The share of each sequence's bases that are paired in its structure of least free energy.

    Raises:
        ImportError, ValueError: as :func:`folding_energies`.
    """
    return [1 - structure.count(".") / len(structure) for structure, _ in _folded(sequences)]
