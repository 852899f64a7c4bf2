"""``Prompts``: conditions that are strings for the reward and embeddings for the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..precision import at_least_single
from ..processes.modules import evaluating, modules_in
from ..tensors import check_count, nonfinite_rows

_GOLDEN = 0.6180339887498949


class Prompts:
    """A list of strings as the condition of a problem: ``ControlProblem(..., condition=Prompts(texts, encoder))``.

    With every path one of the texts is drawn, uniformly (one that is listed twice twice as often). The reward is called
    as ``r(x, texts)``, with a list of strings; all else (model, drift, running cost, control) with the embeddings,
    which are computed once. Samples are asked for by string: ``solution.sample(8, condition="a red cat")``, also of a
    text that is not in the list. The mean reward of each text is in the history as "prompt/TEXT" where there are no
    more than 64, and in ``solution.evaluate().details``.

    Args:
        texts: the strings.
        encoder: ``list of n strings -> tensor (n, ...)``: embeddings ``(n, tokens, width)``, say, or integers ``(n,)``
            for a model of class labels. A module is called in evaluation mode, without gradients. Half precision is
            kept as float32, and given to a model of half precision in its own.
        batch_size: texts per call of the encoder.

    Attributes:
        texts: without repetition, in the order given; then those that were asked for since.
        embeddings: ``(len(texts), ...)``. count: of the texts that were given. rows: of each text as listed, where it
            is among :attr:`texts`.

    Raises:
        TypeError, ValueError: no strings, no tensor with a row for each, or two texts with the same embedding.
    """

    def __init__(self, texts: Sequence[str], encoder: Callable[[list[str]], Tensor], batch_size: int = 64) -> None:
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("texts must be a list of strings.")
        if not len(texts):
            raise ValueError("texts must have at least one string.")
        if not callable(encoder):
            raise TypeError(f"encoder must be callable, list of strings -> tensor; got {type(encoder).__name__}.")
        check_count("batch_size", batch_size)
        self.encoder, self.batch_size = encoder, batch_size
        self.texts: list[str] = []
        self.embeddings = torch.empty(0)
        self._remember(list(dict.fromkeys(texts)))
        place = {text: i for i, text in enumerate(self.texts)}
        self.rows = torch.tensor([place[text] for text in texts], device=self.embeddings.device)
        self.count = len(place)

    def _remember(self, texts: list[str]) -> None:
        """Encode texts that are new."""
        found = []
        with torch.no_grad(), evaluating(modules_in(self.encoder)):
            for low in range(0, len(texts), self.batch_size):
                some = texts[low : low + self.batch_size]
                value = self.encoder(list(some))
                if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != len(some):
                    got = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
                    raise TypeError(
                        f"encoder must return a tensor with a row for each of {len(some)} texts, got {got}."
                    )
                if value.is_floating_point() and (rows := nonfinite_rows(value)):
                    raise ValueError(
                        f"encoder returned embeddings that are not finite, of {rows} of {len(some)} texts."
                    )
                found.append(at_least_single(value.detach()))
        table = torch.cat([self.embeddings, *found] if self.texts else found)
        names = [*self.texts, *texts]
        keys = self._keys(table)
        order = keys.argsort()
        for a, b in zip(order.tolist(), order[1:].tolist()):
            if keys[a] == keys[b] and torch.equal(table[a], table[b]):
                raise ValueError(
                    f"encoder gives {names[a]!r} and {names[b]!r} the same embedding: a model cannot tell them apart. "
                    "Leave one of them out."
                )
        self.embeddings, self.texts, self._table_keys = table, names, keys

    @staticmethod
    def _keys(y: Tensor) -> Tensor:
        """A number for each row that differs from row to row, as good as always."""
        flat = y.reshape(len(y), -1).float()
        weights = (torch.arange(1, flat.shape[1] + 1, dtype=torch.float64) * _GOLDEN).frac()
        return flat @ weights.to(flat)

    def indices(self, y: Tensor) -> Tensor:
        """Which of :attr:`texts` rows of embeddings are, ``(batch,)``.

        Raises:
            ValueError: none.
        """
        y = y.to(self.embeddings)
        near = (self._keys(y).unsqueeze(1) - self._table_keys).abs().argmin(1)
        wrong = (self.embeddings[near] != y).reshape(len(y), -1).any(1)
        for i in wrong.nonzero().flatten().tolist():  # two embeddings with one key
            (same,) = (self.embeddings == y[i]).reshape(len(self.texts), -1).all(1).nonzero(as_tuple=True)
            if not len(same):
                raise ValueError(
                    "condition has an embedding that is of none of the prompts; give the strings themselves, or "
                    "prompts.encode(strings)."
                )
            near[i] = same[0]
        return near

    def texts_of(self, y: Tensor) -> list[str]:
        """The strings of rows of embeddings."""
        return [self.texts[i] for i in self.indices(y).tolist()]

    def encode(self, texts: str | Sequence[str]) -> Tensor:
        """Embeddings ``(n, ...)`` of texts; the encoder is asked for those that are new."""
        wanted = [texts] if isinstance(texts, str) else list(texts)
        if new := [text for text in dict.fromkeys(wanted) if text not in self.texts]:
            self._remember(new)
        return self.embeddings[[self.texts.index(text) for text in wanted]]

    def __deepcopy__(self, memo: Any) -> Prompts:
        return self  # a definition, and its encoder may be large

    def __repr__(self) -> str:
        return f"Prompts({self.count} texts, embeddings {tuple(self.embeddings.shape[1:])})"


def encoded(law: Any, condition: Any) -> Any:
    """A condition that is a string, or a list of them, as embeddings of a problem's prompts; any other as it is.

    Raises:
        TypeError: strings, and the problem's conditions are no :class:`Prompts`.
    """
    several = isinstance(condition, (list, tuple)) and all(isinstance(text, str) for text in condition)
    if not isinstance(condition, str) and not several:
        return condition
    if not isinstance(law, Prompts):
        raise TypeError("condition: strings are of a problem with condition=sc.Prompts(texts, encoder).")
    return law.encode(condition)
