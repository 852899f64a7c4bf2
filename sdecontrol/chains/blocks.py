"""Controls at many stored states a block at a time: gradients through all steps of all paths in one block's memory.

What a loss keeps for its backward pass is the control's activations at all ``steps x batch`` states. Of a small network
that is nothing; of a tuned copy of a large model it is what decides. So a control's activations are measured once, on a
few rows, and where those of all states are more than a block may hold, they are evaluated block by block: some steps of
all paths, or some paths of one step. Gradients are the same to rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..memory import remembering
from ..shapes import NoisePaths, StatePaths

_MIB = 2**20
#: what a block may hold: enough that a call's own cost vanishes in it
BLOCK_BYTES = {"cpu": 24 * _MIB, "cuda": 512 * _MIB}
#: what is held at once where blocks would cost a second evaluation
WHOLE_BYTES = {"cpu": 256 * _MIB, "cuda": 4096 * _MIB}
#: bytes of one row's graph from which on a model is so large that its calls are counted
LARGE_ROW = 64 * 2**10
_ROWS = 2  # of the smaller of the two calls that measure
#: paths of which no more is measured than is there
LEAST = 2 * _ROWS

_measured: weakref.WeakKeyDictionary[nn.Module, dict[str, float]] = weakref.WeakKeyDictionary()


def graph_bytes(evaluate: Callable[[int], Any], own: Iterable[Tensor]) -> float:
    """Bytes of one more row that autograd keeps of ``evaluate(rows)``, which returns what it made with its graph.

    The difference of two calls: what does not grow with the batch is kept once, not once per row.

    Args:
        own: parameters and buffers, which are there anyway.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in own}

    def bytes_of(rows: int) -> int:
        kept: dict[int, Tensor] = {}  # alive until counted: else addresses are used again

        def keep(x: Tensor) -> Tensor:
            address = x.untyped_storage().data_ptr()
            if address not in known:
                kept[address] = x
            return x

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with torch.enable_grad(), hooks, remembering():
            held = evaluate(rows)
        total = sum(x.untyped_storage().nbytes() for x in kept.values())
        del held
        kept.clear()  # what was saved knows its hooks, and they know it
        return total

    return max(0.0, (bytes_of(2 * _ROWS) - bytes_of(_ROWS)) / _ROWS)


@dataclass(frozen=True)
class Block:
    """Some of the steps ``(positions among the stored ones)``, and some of the paths."""

    steps: slice
    rows: slice

    def of(self, stored: Tensor) -> Tensor:
        """This part of ``(K, batch, ...)``."""
        return stored[self.steps, self.rows]


def blocks_of(steps: int, batch: int, most: int) -> list[Block]:
    """``steps x batch`` states in blocks of at most ``most`` rows, as equal as they go: of whole steps where one of
    them fits, else of parts of a step."""
    if most >= steps * batch:
        return [Block(slice(0, steps), slice(0, batch))]
    if most >= batch:
        return [Block(part, slice(0, batch)) for part in parts_of(steps, most // batch)]
    return [Block(slice(k, k + 1), rows) for k in range(steps) for rows in parts_of(batch, max(1, most))]


def parts_of(count: int, most: int) -> list[slice]:
    """As few equal parts as go with ``most`` in each."""
    number = -(-count // most)
    ends = [count * i // number for i in range(number + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


def bytes_per_row(
    owner: nn.Module, what: str, evaluate: Callable[[int], Any], beside: Iterable[nn.Module] = ()
) -> float:
    """:func:`graph_bytes` of something that is evaluated with a module, measured once.

    Args:
        what: its name. beside: modules that take part, too.
    """
    known = _measured.setdefault(owner, {})
    if what not in known:
        modules = (owner, *beside)
        known[what] = graph_bytes(evaluate, [t for m in modules for t in (*m.parameters(), *m.buffers())])
    return known[what]


def room_for(device: torch.device, again: bool = False) -> int:
    """Bytes that a block's activations may take; ``again``: where more than one block would cost a second
    evaluation."""
    rooms = WHOLE_BYTES if again else BLOCK_BYTES
    return rooms.get(device.type, rooms["cuda"])


def blocks_for(
    owner: nn.Module, states: StatePaths, evaluate: Callable[[Block], Tensor], again: bool = False
) -> list[Block]:
    """Blocks in which a module may be evaluated and differentiated at stored states, one after another; a single one
    where that has no graph, or a small one.

    Args:
        again: where more than one block would cost a second evaluation.
    """
    steps, batch = states.shape[:2]
    most, trained = steps * batch, any(p.requires_grad for p in owner.parameters())
    if trained and torch.is_grad_enabled() and batch >= LEAST:
        # the last step: a learned start has a network of its own
        last = lambda rows: evaluate(Block(slice(steps - 1, steps), slice(0, rows)))  # noqa: E731
        most = min(most, int(room_for(states.device, again) / max(bytes_per_row(owner, "values", last), 1.0)))
    return blocks_of(steps, batch, most)


class _InBlocks(torch.autograd.Function):
    """The values of a control, whose gradient in its parameters is taken block by block, each evaluated anew."""

    @staticmethod
    def forward(
        ctx: Any, evaluate: Callable[[Block], Tensor], blocks: list[Block], values: Tensor, *parameters: Tensor
    ) -> Any:
        ctx.evaluate, ctx.blocks, ctx.inside = evaluate, blocks, copy_context()  # autocast as it is here
        ctx.save_for_backward(*parameters)  # which says so where they have changed before the backward pass
        return values.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        (slope,), parameters = slopes, ctx.saved_tensors
        sums: list[Any] = [None] * len(parameters)
        for block in ctx.blocks:
            with torch.enable_grad():
                values = ctx.inside.run(ctx.evaluate, block)
            found = torch.autograd.grad(values, parameters, block.of(slope), allow_unused=True)
            sums = [a if b is None else b if a is None else a.add_(b) for a, b in zip(sums, found)]
        return None, None, None, *sums


def in_blocks(
    evaluate: Callable[[Block], NoisePaths],
    blocks: list[Block],
    parameters: Sequence[Tensor],
    known: NoisePaths | None,
) -> NoisePaths:
    """The values at all blocks, with a graph to ``parameters`` that holds one block's activations at a time.

    Args:
        known: the values, where they are; else they are evaluated, once more than with a whole graph.
    """
    if known is None:
        with torch.no_grad():
            parts = [evaluate(block) for block in blocks]
        if blocks[0].rows == blocks[-1].rows:  # whole steps
            known = torch.cat(parts)
        else:
            by_step: dict[int, list[Tensor]] = {}
            for block, part in zip(blocks, parts):
                by_step.setdefault(block.steps.start, []).append(part)
            known = torch.cat([torch.cat(rows, 1) for rows in by_step.values()])
    return _InBlocks.apply(evaluate, blocks, known, *parameters)  # type: ignore[return-value]
