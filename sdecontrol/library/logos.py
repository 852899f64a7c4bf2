"""Sequence logos (Schneider & Stephens 1990), by logomaker."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..processes.finite import check_tokens


def information(tokens: Tensor, letters: int) -> Tensor:
    """Heights of letters in a logo, ``(L, letters)`` in bits: shares times what is known of the place, ``log2 letters``
    less the entropy, at least 0; without the correction for few sequences.

    Args:
        tokens: ``(n, L)`` int64, n >= 1.
    """
    check_tokens("tokens", tokens, letters)
    if tokens.ndim != 2 or not len(tokens):
        raise ValueError(f"tokens must have shape (n, L), n >= 1, got {tuple(tokens.shape)}.")
    shares = torch.nn.functional.one_hot(tokens, letters).double().mean(0)
    entropy = -torch.xlogy(shares, shares).sum(1) / math.log(2)
    return shares * (math.log2(letters) - entropy).clamp(min=0).unsqueeze(1)


def draw_logo(tokens: Tensor, alphabet: str, ax: Any) -> None:
    """The logo of sequences ``(n, L)`` on matplotlib's axes.

    Raises:
        ImportError: logomaker is missing; names the extra that has it.
    """
    try:
        import logomaker
        from pandas import DataFrame
    except ImportError as error:
        raise ImportError("logos are drawn by logomaker: pip install 'sdecontrol[bio]'.") from error
    heights = information(tokens, len(alphabet)).numpy()
    logomaker.Logo(DataFrame(heights, columns=list(alphabet)), ax=ax, show_spines=False)
    ax.set_ylim(0, math.log2(len(alphabet)))
    ax.set_ylabel("bits")
