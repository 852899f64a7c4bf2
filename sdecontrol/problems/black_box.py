"""``BlackBox``: rewards that are not written in torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import RewardError, check_name, warn
from ..shapes import PerPath, Samples
from ..tensors import as_float, check_count, check_positive
from .plain_calls import INPUTS, Outcome, PlainCall, check_images
from .workers import POOLS, Task, Workers


class BlackBox:
    """A reward as people have them: of images, arrays or single samples, in numpy, PIL or anything else, slow or
    failing now and then, as ``r(x) -> (batch,)`` (``r(x, y)`` with a condition).

    It has no gradient. What it returns may be a tensor, an array or a list, of any precision (the problem's is made of
    it), on any device; of one sample a number.

    Example::

        def size(image):  # a PIL image
            buffer = io.BytesIO()
            image.save(buffer, "jpeg")
            return -len(buffer.getvalue()) / 1000

        problem = sc.ControlProblem(reference, reward=sc.BlackBox(size, inputs="pil", per_sample=True), alpha=0.1)

    Args:
        function: ``f(samples) -> numbers``, one for each; with a condition ``f(samples, conditions)``.
        inputs: what it is given. "torch": a tensor ``(batch, *event)`` on the CPU. "numpy": the same as an array.
            "uint8": images as an array ``(batch, height, width, channels)`` of bytes (without channels where states
            have none). "pil": a list of PIL images.
        per_sample: call it with one sample at a time (and its condition), for one number.
        limits: of "uint8" and "pil": the numbers that are black and white, 0 and 255; what is beyond is clipped. (-1,
            1) as diffusion models have them; (0, 1) where decoded images are in [0, 1].
        workers: so many calls at a time. Of a function of single samples every sample is a call, else every
            ``workers``-th part of the batch (``ControlProblem(reward_batch_size=)`` bounds what it is given at once).
        pool: "thread", for functions that wait, or whose work releases the interpreter's lock; "process", for work in
            Python itself, and what may crash. Processes are started at the first call, import the script again, and end
            with it; ``close()`` ends them before.
        timeout: seconds that a call may take; None: any. A process that takes longer is ended; a thread cannot be: its
            result is not waited for.
        on_failure: "raise", or the reward of a sample at which the function raises, returns nan or inf (-inf is a
            reward: a weight of 0), crashes or is too slow. (Where it has never returned a number it is raised all the
            same.)

    Conditions are the strings of :class:`Prompts` (a list, or one), else numbers as an array, of "torch" a tensor.

    Attributes:
        failures: samples so far that got ``on_failure``.

    Raises:
        TypeError, ValueError: an option, by name; a function that cannot be sent to a process. RewardError: with the
            first sample that failed and the cause.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        inputs: str = "torch",
        per_sample: bool = False,
        limits: tuple[float, float] = (-1.0, 1.0),
        workers: int = 1,
        pool: str = "thread",
        timeout: float | None = None,
        on_failure: str | float = "raise",
    ) -> None:
        if not callable(function):
            raise TypeError(f"function must be callable, samples -> numbers; got {type(function).__name__}.")
        check_name("inputs", inputs, INPUTS)
        check_name("pool", pool, POOLS)
        check_count("workers", workers)
        check_positive("timeout", timeout, optional=True)
        try:
            black, white = (as_float("limits", value) for value in limits)
        except (TypeError, ValueError) as error:
            raise TypeError(f"limits must be two numbers, those of black and white; got {limits!r}.") from error
        if black == white:
            raise ValueError(f"limits must be two different numbers, those of black and white; got {limits!r}.")
        if isinstance(on_failure, str) and on_failure != "raise":
            raise ValueError(f"on_failure must be 'raise' or the reward of samples that fail, got {on_failure!r}.")
        self.function, self.pool = function, pool
        self.on_failure = on_failure if isinstance(on_failure, str) else as_float("on_failure", on_failure)
        self.call = PlainCall(function, inputs, bool(per_sample), (black, white))
        self.count, self.timeout = workers, timeout
        self.failures, self._succeeded, self._told = 0, False, 0
        self._workers: Workers | None = Workers(self.call, workers, pool, timeout)

    def __call__(self, x: Samples, y: Any = None) -> PerPath:
        if self.call.inputs in ("uint8", "pil"):
            check_images(tuple(x.shape[1:]), x.is_floating_point(), self.call.inputs)
        if self._workers is None:
            self._workers = Workers(self.call, self.count, self.pool, self.timeout)
        array = x.detach().cpu().clone().numpy()  # the function's own: states are the path's
        y = y.detach().cpu().clone().numpy() if isinstance(y, Tensor) else y
        single = self.call.per_sample
        size = 1 if single else -(-len(array) // self.count)
        rows = [slice(i, min(i + size, len(array))) for i in range(0, len(array), size)]
        tasks: list[Task] = [(array[i],) if y is None else (array[i], y[i]) for i in rows]
        values = np.full(len(array), np.nan)
        failed: list[tuple[int, str]] = []
        with contextlib.closing(self._workers.run(tasks)) as outcomes:
            for found, i in zip(outcomes, rows):  # in this order the last is followed by an end, not a close
                values[i] = np.nan if found.values is None else found.values
                self._take(i, values, found, failed)
        if failed:
            self._fill(values, failed)
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        return torch.as_tensor(values, dtype=dtype, device=x.device)

    def _take(self, rows: slice, values: np.ndarray, found: Outcome, failed: list[tuple[int, str]]) -> None:
        """Note which samples of a call failed, and why.

        Raises:
            RewardError: for the first of them, where that is to be raised.
        """
        for row in range(rows.start, rows.stop):
            if math.isfinite(values[row]) or values[row] == -math.inf:  # which is for the problem to judge
                self._succeeded = True
                continue
            cause = found.cause if found.values is None else f"it returned {values[row]}"
            if self.on_failure == "raise":
                alone = rows.stop - rows.start == 1 or found.values is not None
                raise RewardError(cause, row, None if alone else rows.stop - 1) from found.error
            failed.append((row, cause))

    def _fill(self, values: np.ndarray, failed: list[tuple[int, str]]) -> None:
        if not self._succeeded:
            raise RewardError(f"{failed[0][1]} (it has never returned a number, so on_failure= is not used)", 0)
        values[[row for row, _ in failed]] = self.on_failure
        self.failures += len(failed)
        if self.failures >= 2 * self._told:  # the first, and ever fewer
            self._told = self.failures
            row, cause = failed[0]
            warn(
                f"reward failed at {self.failures} samples so far, which get on_failure={self.on_failure:g}; now at "
                f"sample {row}: {cause}.",
                stacklevel=3,
            )

    def close(self) -> None:
        """End worker processes; the next call starts new ones."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_workers": None}  # a copy has workers of its own

    def __repr__(self) -> str:
        return f"BlackBox({getattr(self.function, '__name__', type(self.function).__name__)})"
