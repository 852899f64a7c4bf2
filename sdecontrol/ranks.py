"""Several processes: which rows are whose, what is put together of them, and how an error of one ends all.

``torchrun --nproc-per-node=N script.py`` runs N copies of a script ("ranks"). Each of them calls the same functions
with the same arguments, and each gets the whole result; inside, the work on rows that do not know of one another
(paths, particles, rewards) is split, in blocks of 64. Whatever is decided is decided from what was put together of all
of them, so that no rank goes another way than the rest. With one process every function here is the identity.

There are two ways to split. :func:`shares` splits rows that all ranks know, for one call, whose results all of them get
(:func:`gathered`). A training step keeps its rows apart: inside ``with split_batches(True)`` a tensor of paths is that
of the own rows; :func:`whole` puts such tensors together, :func:`own` takes the own rows of a whole one, and
:func:`mean` and :func:`mean_` average what is a mean over the rows of each.

Each exchange begins with a word of every rank: what it is about to exchange, or that it has failed. So an error in one
is raised in all (:func:`together`), and ranks that have gone different ways are told so in place of waiting for ever.
Numbers go through ``torch.distributed`` (gloo; nccl for tensors of several CUDA devices). No number is changed on its
way: rows are exchanged as bytes, sums are torch's.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import NonFiniteError, RankError, RewardError, show_warnings

_T = TypeVar("_T")
_HEAD = struct.Struct("<qqq")  # of a word
_WORD = 4096  # bytes that go with it
_MARK = "SDECONTROL_RANK_OF"  # the process that is this rank: its children inherit torchrun's variables


@dataclass(frozen=True)
class _World:
    """The ranks: this one, how many, the group that exchanges numbers on the CPU, and whether nccl has its own."""

    rank: int
    size: int
    group: Any
    nccl: bool
    process: int


_known: _World | None = None
_alone = 0  # depth of :func:`alone`
_split = False


def _world() -> _World | None:
    """The ranks this process is one of; None where there is but one, or it works alone."""
    global _known
    if _alone or not dist.is_available():
        return None
    if not dist.is_initialized():
        if _known is not None or int(os.environ.get("WORLD_SIZE") or 1) < 2:
            return None  # a group that was ended stays ended
        if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() or _MARK in os.environ:
            return None
        if multiprocessing.parent_process() is not None:
            return None  # a worker of a rank, which inherits its variables
        _begin()
    if _known is None or _known.process != os.getpid():
        if os.environ.get(_MARK, str(os.getpid())) != str(os.getpid()) or dist.get_world_size() < 2:
            return None  # a child of a rank, or one process
        _known = _joined()
    return _known


def _begin() -> None:
    """The group that torchrun's variables describe."""
    backend = "cpu:gloo,cuda:nccl" if use_own_device() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend)
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)


def use_own_device() -> bool:
    """Let "cuda" mean the device of this rank, where each rank of this machine has one; whether that is so."""
    local = int(os.environ.get("LOCAL_RANK") or 0)
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or local + 1)
    if not torch.cuda.is_available() or torch.cuda.device_count() < here:
        return False
    torch.cuda.set_device(local)
    return True


def _joined() -> _World:
    backends = dist.get_backend_config()  # type: ignore[attr-defined]
    group = dist.group.WORLD if "cpu:gloo" in backends else dist.new_group(backend="gloo")
    os.environ[_MARK] = str(os.getpid())
    show_warnings(dist.get_rank() == 0)
    return _World(dist.get_rank(), dist.get_world_size(), group, "cuda:nccl" in backends, os.getpid())


def size() -> int:
    """How many ranks share the work: 1 where there is one process, or inside :func:`alone`."""
    world = _world()
    return 1 if world is None else world.size


def rank() -> int:
    """Which of them this is: 0 where there is one."""
    world = _world()
    return 0 if world is None else world.rank


def leads() -> bool:
    """Whether this process shows progress and writes files."""
    return rank() == 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works for itself and exchanges nothing: for rows that were split already, for what one rank
    does and the others do not, and for scripts that give each process a problem of its own."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


# ---------------------------------------------------------------- what every exchange begins with


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """An interrupt between the parts of an exchange would leave the others in the middle of it."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exchange(world: _World, what: str, own: bytes = b"", send: Callable[[], object] | None = None) -> list[bytes]:
    """What all ranks say, ``own`` each; and ``send()`` on all of them at once, where that is too much for a word.

    Raises:
        RankError: they are not at the same exchange, or one is gone. What another rank has raised.
    """
    try:
        with _uninterrupted():
            words = _words(world, 0, zlib.crc32(what.encode()), own)
            if any(failed for failed, _, _ in words):
                raise _told(world, _long_words(world, b""))
            if len({about for _, about, _ in words}) > 1:
                places = [place.decode() for place in _long_words(world, what.encode())]
                said = "; ".join(f"process {i} is at {place}" for i, place in enumerate(places))
                raise known_to_all(
                    RankError(
                        f"the processes have gone different ways: {said}. Each must call the same functions with the "
                        "same arguments (a seed, or torch.manual_seed, makes random ones the same); work for one "
                        "process goes inside sc.ranks.alone()."
                    )
                )
            if send is not None:
                send()
            return [said for _, _, said in words]
    except (RankError, NonFiniteError, RewardError, KeyboardInterrupt):
        raise
    except RuntimeError as error:  # a connection that was closed, a time that is over
        other = f"process {1 - world.rank}" if world.size == 2 else "another one"
        why = str(error).partition(". ")[0][:300]
        raise known_to_all(
            RankError(
                f"process {world.rank} of {world.size} has lost {other} at {what}: it has ended, or was killed ({why})."
            )
        ) from error


def _words(world: _World, failed: int, about: int, own: bytes) -> list[tuple[int, int, bytes]]:
    """A word of every rank: whether it has failed, what it is about, and what it says."""
    packed = _HEAD.pack(failed, about, len(own)) + own
    sent = torch.frombuffer(bytearray(packed.ljust(_HEAD.size + _WORD, b"\0")), dtype=torch.uint8)
    found = sent.new_empty(world.size, len(sent))
    dist.all_gather(list(found.unbind(0)), sent, group=world.group)
    words = []
    for word in found.numpy():
        failed, about, length = _HEAD.unpack(word[: _HEAD.size].tobytes())
        words.append((failed, about, word[_HEAD.size : _HEAD.size + length].tobytes()))
    return words


def _long_words(world: _World, own: bytes) -> list[bytes]:
    """What all ranks say, however much."""
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, own, group=world.group)
    return found


def _said(what: str, value: _T) -> list[_T]:
    """Any picklable object, of every rank."""
    world = _world()
    if world is None:
        return [value]
    own = pickle.dumps(value)
    if max(found := [int(n) for n in _exchange(world, f"the size of {what}", str(len(own)).encode())]) > _WORD:
        longer: list[bytes] = []
        _exchange(world, what, send=lambda: longer.extend(_long_words(world, own)))
        return [pickle.loads(each) for each in longer]
    return [pickle.loads(each) for each in _exchange(world, f"{what} of {found}", own)]


def known_to_all(error: Any) -> Any:
    """The error, which all ranks raise by themselves: nobody is told of it."""
    error._all_know = True
    return error


def _told(world: _World, said: list[bytes]) -> BaseException:
    """The error of the first rank that has failed, for one that has not."""
    index, word = next((i, s) for i, s in enumerate(said) if s)
    kind, message, facts = pickle.loads(word)
    if kind == "KeyboardInterrupt":
        return known_to_all(KeyboardInterrupt())
    where = f"process {index} of {world.size}: {message}"
    if facts is not None:
        return known_to_all({"NonFiniteError": NonFiniteError, "RewardError": RewardError}[kind](where, **facts))
    return known_to_all(RankError(f"{kind} in {where}"))


def _tell(error: BaseException) -> None:
    """Answer the next exchange of the other ranks with an error."""
    world = _world()
    if world is None or getattr(error, "_all_know", False):
        return
    kind, message, facts = type(error).__name__, str(error), None
    if isinstance(error, NonFiniteError):
        kind, facts = "NonFiniteError", {"what": error.what, "step": error.step, "rows": error.rows}
    elif isinstance(error, RewardError):
        kind, message = "RewardError", error.cause
        facts = {"index": error.index, "last": error.last, "name": error.name}
    with contextlib.suppress(Exception), _uninterrupted():  # it is raised here whatever the others do
        known_to_all(error)
        _words(world, 1, 0, b"")
        _long_words(world, pickle.dumps((kind, message, facts)))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is raised inside by one rank is raised by all, at their next exchange."""
    try:
        yield
    except BaseException as error:
        _tell(error)
        raise


# ---------------------------------------------------------------- rows that all know, split for one call


def shares(count: int, block: int) -> list[range] | None:
    """Which of ``count`` rows are each rank's: whole blocks, the last perhaps not full. None: all of them are
    everybody's, since there is one process, or a block for each is not there."""
    ranks, blocks = size(), -(-count // block)
    if ranks == 1 or blocks < ranks:
        return None
    edges = [min(count, block * (blocks * i // ranks)) for i in range(ranks + 1)]
    return [range(low, high) for low, high in pairwise(edges)]


def gathered(rows: Tensor, counts: Sequence[int], what: str = "rows") -> Tensor:
    """The rows of all ranks, one rank's after the other's; ``counts`` says how many each has."""
    world = _world()
    if world is None:
        return rows
    flat, row_shape = rows.detach().contiguous(), rows.shape[1:]
    name, most = f"{what} {list(counts)} x {list(row_shape)} {rows.dtype}", max(counts)
    numbers = most * row_shape.numel() * rows.element_size()
    if numbers <= _WORD:
        words = _exchange(world, name, flat.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        joined = torch.frombuffer(bytearray(b"".join(words)), dtype=rows.dtype)
        return joined.reshape(sum(counts), *row_shape).to(rows.device)
    if len(flat) < most:
        flat = torch.cat((flat, flat.new_zeros(most - len(flat), *row_shape)))
    sent = flat.reshape(most, -1).view(torch.uint8)
    sent = sent if world.nccl else sent.cpu()
    found = sent.new_empty(world.size, *sent.shape)
    group = None if sent.is_cuda else world.group
    _exchange(world, name, send=lambda: dist.all_gather(list(found.unbind(0)), sent, group=group))
    joined = torch.cat([part[:n] for part, n in zip(found, counts)]).to(rows.device)
    return joined.view(rows.dtype).reshape(sum(counts), *row_shape)


# ---------------------------------------------------------------- batches that stay split


@contextlib.contextmanager
def split_batches(active: bool) -> Iterator[None]:
    """Inside, a batch of paths has its rows on all ranks, in order and equally many (:func:`own_rows`)."""
    global _split
    before, _split = _split, active
    try:
        yield
    finally:
        _split = before


def parts() -> int:
    """On how many ranks a batch has its rows: 1 where batches are not split."""
    return size() if _split else 1


def own_rows(count: int) -> slice:
    """Those of a batch of so many rows that this rank has."""
    if (n := parts()) == 1:
        return slice(0, count)
    each = count // n
    return slice(rank() * each, (rank() + 1) * each)


def own(rows: Tensor, dim: int = 0) -> Tensor:
    """The own rows of a whole batch."""
    if parts() == 1:
        return rows
    some = own_rows(rows.shape[dim])
    return rows.narrow(dim, some.start, some.stop - some.start)


def whole(rows: Tensor, dim: int = 0) -> Tensor:
    """The batch whose own rows these are, without a graph."""
    if (n := parts()) == 1:
        return rows
    return gathered(rows.movedim(dim, 0), [rows.shape[dim]] * n, "a batch").movedim(0, dim)


def wholes(*rows: Tensor) -> tuple[Tensor, ...]:
    """:func:`whole` of several numbers of each path, ``(batch,)``, in one exchange."""
    if parts() == 1:
        return rows
    found = whole(torch.stack([v.double() for v in rows], 1))  # exact, and back
    return tuple(column.to(v.dtype) for column, v in zip(found.unbind(1), rows))


def largest(values: Tensor) -> Tensor:
    """The elementwise maximum over the ranks, where batches are split."""
    return values if parts() == 1 else whole(values.unsqueeze(0)).amax(0)


def own_normals(shape: Sequence[int], dim: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal numbers of a generator that all ranks have, of the own rows: ``shape`` has so many along
    ``dim``."""
    wide = [n * parts() if axis == dim else n for axis, n in enumerate(shape)]
    return own(torch.randn(wide, generator=generator, dtype=like.dtype, device=like.device), dim)


def first_rows(rows: Tensor, dim: int = 0) -> Tensor:
    """Of own rows, those of the first rank: the first of the batch."""
    return rows if parts() == 1 else whole(rows, dim).narrow(dim, 0, rows.shape[dim])


def whole_sum(values: Tensor) -> Tensor:
    """The sum over the ranks, where batches are split."""
    if parts() == 1:
        return values
    found = values.detach().clone()
    _sum_(found)
    return found


def mean(values: Tensor) -> Tensor:
    """The mean over the ranks of what is a mean over the rows of each."""
    return values if (n := parts()) == 1 else whole_sum(values) / n


def mean_numbers(values: dict[str, float]) -> dict[str, float]:
    """:func:`mean` of numbers with names."""
    if parts() == 1:
        return values
    found = mean(torch.tensor(list(values.values()), dtype=torch.float64))
    return dict(zip(values, found.tolist()))


def mean_(tensors: Sequence[Tensor]) -> None:
    """:func:`mean` of many tensors (gradients), in place and in one exchange for each kind of them."""
    if (n := parts()) == 1:
        return
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for some in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in some])
        _sum_(flat)
        flat /= n
        for tensor, part in zip(some, flat.split([t.numel() for t in some])):
            tensor.copy_(part.view_as(tensor))


def _sum_(values: Tensor) -> None:
    world = _world()
    assert world is not None
    if values.numel() * values.element_size() <= _WORD:
        values.copy_(gathered(values.unsqueeze(0), [1] * world.size, "a sum").sum(0))
        return
    sent = values if world.nccl else values.cpu()
    group, name = None if sent.is_cuda else world.group, f"a sum of {list(values.shape)} {values.dtype}"
    _exchange(world, name, send=lambda: dist.all_reduce(sent, group=group))
    if sent is not values:
        values.copy_(sent)


# ---------------------------------------------------------------- decisions


def agreed(value: _T, what: str) -> _T:
    """The first rank's value, which any picklable object may be: of clocks and random numbers."""
    return _said(what, value)[0]


def anywhere(flag: bool, what: str) -> bool:
    """Whether it is so on any rank."""
    world = _world()
    return flag if world is None else any(word == b"1" for word in _exchange(world, what, b"1" if flag else b"0"))


def first_error(error: NonFiniteError | None) -> NonFiniteError | None:
    """The own error, or a copy of the first rank's that has one: all of them then decide what to do about it."""
    facts = None if error is None else (str(error), error.what, error.step, error.rows)
    found = _said("what is not finite", facts)
    if error is not None or (index := next((i for i, f in enumerate(found) if f is not None), None)) is None:
        return known_to_all(error) if error is not None and len(found) > 1 else error
    message, what, step, rows = found[index]  # type: ignore[misc]
    return known_to_all(NonFiniteError(f"process {index} of {len(found)}: {message}", what=what, step=step, rows=rows))


def least(number: int, what: str) -> int:
    """The smallest of the ranks' numbers."""
    world = _world()
    return number if world is None else min(int(word) for word in _exchange(world, what, str(number).encode()))


def check_same(what: str, facts: Any) -> None:
    """Raise unless all ranks have the same facts: dictionaries, numbers, texts.

    Raises:
        RankError: naming the first that differs.
    """
    found = _said(what, facts)
    for index, other in enumerate(found):
        if other != found[0]:
            names = [k for k in found[0] if other.get(k) != found[0][k]] if isinstance(facts, dict) else []
            which = f" in {names[0]} ({found[0][names[0]]!r} and {other.get(names[0])!r})" if names else ""
            raise known_to_all(
                RankError(
                    f"{what} of process {index} differs from that of process 0{which}. Each process must make the "
                    "same one: call torch.manual_seed before random numbers are drawn, and read the same data."
                )
            )


def same_(tensors: Sequence[Tensor], what: str) -> None:
    """Give all ranks the first one's tensors, in place."""
    world = _world()
    if world is None:
        return
    for tensor in tensors:
        sent = tensor.detach().cpu().contiguous()
        flat = sent.reshape(-1).view(torch.uint8)

        def send(flat: Tensor = flat) -> None:
            dist.broadcast(flat, group=world.group, group_src=0)

        _exchange(world, f"{what} {list(sent.shape)} {sent.dtype}", send=send)
        if world.rank:
            with torch.no_grad():
                tensor.copy_(flat.view(sent.dtype).reshape(sent.shape))


def once(function: Callable[[], _T], what: str) -> _T | None:
    """Let the first rank call a function (which writes a file), and all wait for it; its result there."""
    if (world := _world()) is None:
        return function()
    found = None
    with together():
        if world.rank == 0:
            with alone():
                found = function()
    _exchange(world, what)
    return found
