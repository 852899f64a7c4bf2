"""Seeds and noise: every random number of the package comes from a seed and a place, never from a hidden state.

Noise is drawn in blocks of 64 paths, each block in segments of steps, each segment from a generator of its own whose
seed is derived from (seed, block, segment). So the noise of path i at step k does not depend on the batch size, on
chunking in multiples of 64, on what is kept, or on the order in which steps are asked for; and it can be drawn again
at any place, which is how a backward pass and a resumed run find the noise of the forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK = 64
_SEGMENT_NUMBERS = 1 << 16


def fresh_seed(seed: int | None) -> int:
    """The seed itself, or a new one from torch's global generator where it is None (so ``torch.manual_seed`` fixes
    it)."""
    if seed is None:
        return int(torch.randint(2**63 - 1, ()).item())
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed must be an int or None, got {type(seed).__name__}; pass e.g. seed=0.")
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}.")
    return int(seed)


def derive_seed(seed: int, *place: int) -> int:
    """A 63-bit seed for one place (iteration, block, segment, ...) under ``seed``; different places are independent."""
    return int(np.random.SeedSequence((seed, *place)).generate_state(1, np.uint64)[0] >> 1)


def generator_for(device: torch.device | str, seed: int, *place: int) -> torch.Generator:
    """A generator on ``device`` for one place under ``seed``."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *place) if place else seed)


@contextlib.contextmanager
def global_rng(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run code that draws from torch's global generator (a user's distribution or sampler) from a seed, and leave the
    global state as it was."""
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class SeededNoise:
    """Standard normal noise ``xi_k`` of ``batch`` paths over ``steps`` steps, a function of the seed alone.

    ``noise[k]`` is ``(batch, *shape)``; ``noise.all()`` is ``(steps, batch, *shape)``. With ``antithetic`` the paths
    2i and 2i+1 have opposite noise.
    """

    def __init__(
        self,
        seed: int,
        batch: int,
        steps: int,
        shape: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        antithetic: bool = False,
        first_block: int = 0,
    ) -> None:
        self.seed, self.batch, self.steps, self.shape = seed, batch, steps, tuple(shape)
        self.dtype, self.device, self.antithetic, self.first_block = (
            dtype,
            torch.device(device),
            antithetic,
            first_block,
        )
        per_step = BLOCK * max(1, int(np.prod(self.shape, dtype=np.int64)))
        self.segment = max(1, min(BLOCK, _SEGMENT_NUMBERS // per_step))
        self._held: tuple[int, Tensor, tuple[Tensor, ...]] | None = None

    def _draw(self, index: int) -> tuple[int, Tensor, tuple[Tensor, ...]]:
        """Segment ``index``: whole, and step by step."""
        if self._held is None or self._held[0] != index:
            rows = BLOCK // 2 if self.antithetic else BLOCK
            parts = []
            for block in range(-(-self.batch // BLOCK)):
                generator = generator_for(self.device, self.seed, self.first_block + block, index)
                part = torch.randn(
                    (self.segment, rows, *self.shape), generator=generator, dtype=self.dtype, device=self.device
                )
                if self.antithetic:
                    part = torch.stack((part, -part), dim=2).flatten(1, 2)
                parts.append(part)
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            whole = whole[:, : self.batch]
            self._held = (index, whole, whole.unbind(0))
        return self._held

    def __getitem__(self, k: int) -> Tensor:
        return self._draw(k // self.segment)[2][k % self.segment]

    def rows(self, low: int, high: int) -> SeededNoise:
        """The noise of paths ``low .. high-1``; low a multiple of 64."""
        return SeededNoise(
            self.seed,
            high - low,
            self.steps,
            self.shape,
            dtype=self.dtype,
            device=self.device,
            antithetic=self.antithetic,
            first_block=self.first_block + low // BLOCK,
        )

    def all(self) -> Tensor:
        """All steps at once, ``(steps, batch, *shape)``."""
        count = -(-self.steps // self.segment)
        return torch.cat([self._draw(i)[1] for i in range(count)])[: self.steps]


class SuppliedNoise:
    """Noise given by the user: ``(steps, batch, *shape)``."""

    def __init__(self, noise: Tensor) -> None:
        self._noise = noise
        self.steps, self.batch = noise.shape[0], noise.shape[1]

    def __getitem__(self, k: int) -> Tensor:
        return self._noise[k]

    def rows(self, low: int, high: int) -> SuppliedNoise:
        """The noise of paths ``low .. high-1``."""
        return SuppliedNoise(self._noise[:, low:high])

    def all(self) -> Tensor:
        return self._noise
