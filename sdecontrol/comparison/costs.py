"""What a piece of work costs: calls of the reward, of its gradient and of the control, seconds, and peak memory."""

import contextlib
import ctypes
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..counting import Calls, counting

_MIB = 2.0**20


@dataclass
class Costs(Calls):
    """Of one piece of work: its calls, and

    Attributes:
        seconds: CPU seconds of this process, all threads together.
        memory: peak above what was in use at the beginning, MiB: of the allocator on CUDA; on the CPU of the process's resident memory
            (which sees every allocation, in pages); nan where the system does not tell (it does on Linux).
    """

    seconds: float = math.nan
    memory: float = math.nan


@contextlib.contextmanager
def measuring(device: torch.device) -> Iterator[Costs]:
    """What happens inside is counted, timed and its memory on the device watched; the costs are complete on leaving."""
    costs, memory = Costs(), _PeakMemory(device)
    began = time.process_time()
    try:
        with counting(costs):
            yield costs
    finally:
        costs.seconds = time.process_time() - began
        costs.memory = memory.peak()


class _PeakMemory:
    """The high-water mark of memory from here on, above what is in use now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = math.nan
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device) / _MIB
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would serve again, unseen
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the mark to what is resident now
            self.before = _high_water_mark()

    def peak(self) -> float:
        """MiB; nan where it is not known."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / _MIB - self.before
        return max(_high_water_mark() - self.before, 0.0) if math.isfinite(self.before) else math.nan


def _high_water_mark() -> float:
    """Of this process's resident memory, MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return math.nan if found is None else int(found[1]) / 1024
