"""``python -m benchmarks imports``: CPU-seconds of importing the package, beside torch's, and of the command's help."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

CODES = {
    "import torch": "import torch",
    "import sdecontrol": "import sdecontrol",
    "sdecontrol, the first name": "import sdecontrol as sc; sc.solve",
    "from sdecontrol import *": "from sdecontrol import *",
    "sdecontrol --help": "import sys; sys.argv = ['sdecontrol', '--help']; from sdecontrol.cli import main; main()",
}
_AROUND = "import atexit, sys, time\natexit.register(lambda: print(time.process_time(), file=sys.stderr))\n"


def imports(rounds: int = 9) -> None:
    """The least of ``rounds`` fresh interpreters for each, interleaved; start-up and exit of Python included.

    Byte code is cached, as after an installation: the first round writes it (in a temporary folder) and does not count.

    Example: python -m benchmarks imports --rounds 3
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        seconds: dict[str, list[float]] = {name: [] for name in CODES}
        for _ in range(rounds + 1):
            for name, code in CODES.items():
                call = [sys.executable, "-c", _AROUND + code]
                done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
                seconds[name].append(float(done.stderr.splitlines()[-1]))
    least = {name: min(found[1:]) for name, found in seconds.items()}
    for name, value in least.items():
        print(f"{name:<28} {value:6.3f} s  {value / least['import torch']:5.2f} of torch")
