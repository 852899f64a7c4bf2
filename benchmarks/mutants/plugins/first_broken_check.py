"""Run checks of the theory suite until one does not hold, and write what was seen as JSON.

python first_broken_check.py FILE CHECK ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def main(file: Path, names: list[str]) -> None:
    seen: dict[str, Any] = {"passed": 0, "running": "import", "by": "", "how": ""}
    file.write_text(json.dumps(seen))
    from theory_checks import Setting, all_checks, run_check

    torch.set_num_threads(1)
    for check in sorted((c for c in all_checks() if c.name in names), key=lambda c: names.index(c.name)):
        seen["running"] = check.name
        file.write_text(json.dumps(seen))
        outcome = run_check(check, Setting(), controls=False)
        if not outcome.holds:
            seen.update(by=check.name, how=(outcome.error or f"worst: {outcome.worst}")[:160])
            break
        seen["passed"] += 1
    file.write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
