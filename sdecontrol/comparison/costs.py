"""What a piece of work costs: calls of the reward, of its gradient and of the control, seconds, and peak memory."""

import contextlib
import ctypes
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..chains.base import Chain
from ..counting import Calls, counting
from ..problems.problem import ControlProblem
from ..processes.laws import draw

_MIB = 2.0**20
_ROWS = 2


@dataclass
class Costs(Calls):
    """Of one piece of work: its calls, and

    Attributes:
        seconds: CPU seconds of this process, all threads together.
        memory: peak above what was in use at the beginning, MiB: of the allocator on CUDA; on the CPU of the process's
            resident memory (which sees every allocation, in pages); nan where the system does not tell (it does on
            Linux).
    """

    seconds: float = math.nan
    memory: float = math.nan


@contextlib.contextmanager
def measuring(device: torch.device) -> Iterator[Costs]:
    """What happens inside is counted, timed and its memory on the device watched; the costs are complete on leaving."""
    costs, peak = Costs(), _peak_memory(device)
    began = time.process_time()
    try:
        with counting(costs):
            yield costs
    finally:
        costs.seconds = time.process_time() - began
        costs.memory = peak()


def _peak_memory(device: torch.device) -> Callable[[], float]:
    """What gives, later, the high-water mark of memory from here on, above what is in use now, MiB; nan where it is not
    known."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        in_use = torch.cuda.memory_allocated(device)
        return lambda: (torch.cuda.max_memory_allocated(device) - in_use) / _MIB
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would serve again, unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the mark to what is resident now
        before = _high_water_mark()
    except OSError:
        return lambda: math.nan
    return lambda: max(_high_water_mark() - before, 0.0)


def _high_water_mark() -> float:
    """Of this process's resident memory, MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return math.nan if found is None else int(found[1]) / 1024


def step_flops(problem: ControlProblem, chain: Chain) -> float:
    """Floating-point operations of a step of one path of the reference, those of matrix products, convolutions and
    attention (``torch.utils.flop_counter``): the same on any machine. 0 where the model is not made of these."""
    x, y = draw(problem.initial, _ROWS, 0), problem.draw_condition(_ROWS, 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), problem.evaluating():
        chain.kernel(chain.start, x, y)
    return counter.get_total_flops() / _ROWS
