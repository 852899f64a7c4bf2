"""Run the theory suite, without its negative controls, and note which lines of the package each check executes.

TRACED=folder OMP_NUM_THREADS=1 python traced_checks.py
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import coverage


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = coverage.Coverage(
        data_file=str(folder / "lines"), source=[str(Path.cwd() / "sdecontrol")], messages=False, config_file=False
    )
    lines.start()  # before the package is imported
    import torch

    from theory_checks import Setting, all_checks, run_check

    torch.set_num_threads(1)
    for check in all_checks():
        lines.switch_context(check.name)
        began = time.process_time()
        outcome = run_check(check, Setting(), controls=False)
        facts = {
            "name": check.name,
            "seconds": round(time.process_time() - began, 4),
            "outcome": "passed" if outcome.holds else f"failed {outcome.error}",
        }
        lines.switch_context("")
        with (folder / "tests.jsonl").open("a") as file:
            file.write(json.dumps(facts) + "\n")
    lines.stop()
    lines.save()


if __name__ == "__main__":
    main(Path(os.environ["TRACED"]))
