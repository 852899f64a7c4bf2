"""Checkpoints of a run: two are kept, each complete or not there at all; resuming takes the newest good one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import BadFileError, warn
from ..files.bundles import read_bundle, register_bundle, write_bundle
from ..files.contents import check_fingerprint

_KIND = register_bundle("checkpoint", "identity", "done", "schedule", "annealing", "optimizer", "history", "problem")
_KEPT = 2


class Checkpoints:
    """The checkpoints in a folder."""

    def __init__(self, folder: Any) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"checkpoint_dir {self.folder} is a file; pass a folder.")

    def names(self) -> list[str]:
        """Oldest first."""
        return sorted(p.stem for p in self.folder.glob("checkpoint-*.json")) if self.folder.is_dir() else []

    def path(self, iteration: int) -> Path:
        return self.folder / f"checkpoint-{iteration:08d}.json"

    def write(self, iteration: int, tensors: dict[str, Tensor], settings: dict[str, Any]) -> Path:
        path = write_bundle(self.folder, self.path(iteration).stem, tensors, {"kind": _KIND, **settings})
        for old in self.names()[:-_KEPT]:
            (self.folder / f"{old}.json").unlink(missing_ok=True)  # first: without it the tensors do not count
            for tensors_file in self.folder.glob(f"{old}-*.safetensors"):
                tensors_file.unlink(missing_ok=True)
        return path

    def newest(self, fingerprint: Callable[[bool], dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest good checkpoint of this problem, or None where the folder has none.

        A damaged newest one is passed over with a warning.

        Args:
            fingerprint: of the problem at hand (``ControlProblem.fingerprint``).

        Raises:
            BadFileError: all are damaged, or they belong to another problem.
        """
        damaged = None
        for name in reversed(self.names()):
            try:
                tensors, settings = read_bundle(self.folder, name, _KIND)
            except BadFileError as error:
                damaged = error
                warn(f"passing over a damaged checkpoint: {error}", RuntimeWarning, stacklevel=3)
                continue
            check_fingerprint(settings["problem"], fingerprint, self.folder / name)
            return tensors, settings
        if damaged is not None:
            raise damaged
        return None
