"""How a function that knows nothing of torch is called: arrays, images and strings in, numbers out.

No torch is imported here: a worker process that is given arrays starts without it.
"""

import contextlib
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

INPUTS = ("torch", "numpy", "uint8", "pil")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
#: in a condition's place, where there is none
NOTHING: tuple[()] = ()


class Outcome(NamedTuple):
    """What a call has come to: numbers, or why there are none, with the exception where it was raised in this
    process."""

    values: list[float] | None
    cause: str = ""
    error: BaseException | None = None


def check_images(shape: tuple[int, ...], floating: bool, inputs: str) -> None:
    """Raise unless states of this shape are images.

    Raises:
        ValueError: naming the option.
    """
    if not floating or not (len(shape) == 2 or (len(shape) == 3 and shape[0] in _MODES)):
        raise ValueError(
            f"inputs={inputs!r} makes images of states (channels, height, width) with 1, 3 or 4 channels, or (height, "
            f"width); these have shape {shape}{'' if floating else ' and are integers'}. Use inputs='numpy'."
        )


def _bytes_of(x: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Images ``(rows, [channels,] height, width)`` as uint8 ``(rows, height, width[, channels])``."""
    black, white = limits
    levels = np.rint((x.astype(np.float64) - black) * (255 / (white - black))).clip(0, 255).astype(np.uint8)
    return levels if levels.ndim == 3 else np.moveaxis(levels, 1, -1)


def _pictures(levels: np.ndarray) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(one[..., 0] if one.ndim == 3 and one.shape[-1] == 1 else one) for one in levels]


def numbers_in(value: Any, rows: int) -> list[float]:
    """What a function returned for ``rows`` samples, as numbers.

    Raises:
        ValueError, TypeError: they are none, or not as many.
    """
    if hasattr(value, "detach"):  # a tensor, on whatever device and of whatever precision
        value = value.detach().cpu().double().numpy()
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"it returned {_shown(value)}, and is to return a number for each sample") from error
    if found.shape not in ((rows,), (rows, 1)) and not (rows == 1 and found.size == 1):
        raise ValueError(f"it returned {_counted(found)} for {rows} samples, and is to return one for each")
    return found.reshape(-1).tolist()


def _counted(found: np.ndarray) -> str:
    return f"{found.size} numbers" if found.ndim == 1 else f"numbers of shape {found.shape}"


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list, dict)) else "")


@dataclass(frozen=True)
class PlainCall:
    """A function with what it is given, and how it is called; fields as of :class:`BlackBox`."""

    function: Callable[..., Any]
    inputs: str
    per_sample: bool
    limits: tuple[float, float]

    def __call__(self, x: np.ndarray, *y: Any) -> list[float]:
        """Numbers of samples ``(rows, *event)``; y their conditions, strings or an array with a row for each."""
        torch = sys.modules.get("torch")
        with contextlib.nullcontext() if torch is None else torch.no_grad():
            samples, rows = self._given(x), len(x)
            conditions = [self._condition(part) for part in y]
            if not self.per_sample:
                return numbers_in(self.function(samples, *conditions), rows)
            own = [[part[i] for part in (samples, *conditions)] for i in range(rows)]
            return [number for one in own for number in numbers_in(self.function(*one), 1)]

    def outcome(self, x: np.ndarray, *y: Any) -> Outcome:
        """The same, with what it raises."""
        try:
            return Outcome(self(x, *y))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = "" if last.filename == __file__ else f" ({last.filename}, line {last.lineno})"
            return Outcome(None, f"{type(error).__name__}: {error}{where}", error)

    def _given(self, x: np.ndarray) -> Any:
        if self.inputs == "torch":
            import torch

            return torch.from_numpy(x)
        if self.inputs == "numpy":
            return x
        levels = _bytes_of(x, self.limits)
        return levels if self.inputs == "uint8" else _pictures(levels)

    def _condition(self, y: Any) -> Any:
        if self.inputs == "torch" and isinstance(y, np.ndarray):
            import torch

            return torch.from_numpy(y)
        return y
