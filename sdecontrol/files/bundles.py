"""Files: tensors as safetensors, settings as JSON, nothing unpickled, written so that a torn write is never read.

A bundle is ``NAME.safetensors`` and ``NAME.json``. The JSON is written last, by an atomic rename, and holds the checksum
of the tensors and its own: a bundle counts only if all agree.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadFileError, MissingFileError

__all__ = ["FORMAT", "check_fingerprint", "read_bundle", "require", "write_bundle"]

FORMAT = "sdecontrol-1"


def _write_atomically(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _checksum(body: dict[str, Any]) -> str:
    """Of everything in a JSON file but the checksum itself."""
    plain = {key: value for key, value in body.items() if key != "settings_sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, allow_nan=True).encode()).hexdigest()


def write_bundle(
    folder: str | os.PathLike[str], name: str, tensors: dict[str, Tensor], settings: dict[str, Any]
) -> Path:
    """Write a bundle; what was there before is intact until the new one is complete."""
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = save({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    # the tensors of an older bundle of this name stay until the new JSON points to the new ones
    tensor_file = folder / f"{name}-{digest[:12]}.safetensors"
    body = {"format": FORMAT, "tensors": tensor_file.name, "sha256": digest, **settings}
    body["settings_sha256"] = _checksum(body)
    text = json.dumps(body, indent=1, allow_nan=True)
    _write_atomically(tensor_file, content)
    _write_atomically(folder / f"{name}.json", text.encode())
    for old in folder.glob(f"{name}-*.safetensors"):
        if old != tensor_file:
            old.unlink(missing_ok=True)
    return folder / f"{name}.json"


def read_bundle(folder: str | os.PathLike[str], name: str, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a bundle back.

    Raises:
        MissingFileError: there is none.
        BadFileError: it is corrupt, truncated, or not of this package; the message says which.
    """
    from safetensors.torch import load

    path = Path(folder) / f"{name}.json"
    if not path.exists():
        raise MissingFileError(
            f"there is no {path}; expected a folder written by solution.save or solve(checkpoint_dir=...)."
        )
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # not text, not JSON, absurd numbers or nesting
        raise BadFileError(f"{path} is not readable JSON ({error}); the file is corrupt or truncated.") from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise BadFileError(f"{path} was not written by this package (no format {FORMAT!r} in it).")
    if settings.get("kind") != kind:
        raise BadFileError(f"{path} holds a {settings.get('kind')!r}, not a {kind!r}.")
    file_name = settings.get("tensors")
    if not isinstance(file_name, str) or Path(file_name).name != file_name:
        raise BadFileError(f"{path} names no tensor file beside it.")
    if settings.get("settings_sha256") != _checksum(settings):
        raise BadFileError(f"{path} does not have the checksum in it: it is corrupt or was edited.")
    tensor_file = path.parent / file_name
    if not tensor_file.is_file():
        raise BadFileError(f"{tensor_file} is missing beside {path.name}.")
    content = tensor_file.read_bytes()
    if hashlib.sha256(content).hexdigest() != settings.get("sha256"):
        raise BadFileError(
            f"{tensor_file} does not have the checksum in {path.name}: it is corrupt, truncated or foreign."
        )
    try:
        return load(content), settings
    except Exception as error:  # safetensors raises its own kinds
        raise BadFileError(f"{tensor_file} is not a safetensors file ({error}).") from error


def require(settings: dict[str, Any], path: Any, *names: str) -> None:
    """Raise unless a file has these fields.

    Raises:
        BadFileError: naming the first that is missing.
    """
    for name in names:
        if name not in settings:
            raise BadFileError(f"{path} has no field {name!r}: it was not written by this version of the package.")


def check_fingerprint(saved: Any, current: dict[str, Any], path: Any) -> None:
    """Raise if a file belongs to another problem.

    Raises:
        BadFileError: naming what differs.
    """
    if not isinstance(saved, dict):
        raise BadFileError(f"{path} has no fingerprint of its problem.")
    for key in ("reference", "alpha", "start", "initial", "conditional"):
        if saved.get(key) != json.loads(json.dumps(current[key])):
            raise BadFileError(
                f"{path} belongs to another problem: its {key} is {saved.get(key)!r}, this problem's {current[key]!r}."
            )
    for name, now in current["numbers"].items():
        then = saved.get("numbers", {}).get(name)
        if then is None:
            raise BadFileError(f"{path} belongs to another problem: it had no {name}.")
        a, b = torch.tensor(then, dtype=torch.float64), torch.tensor(now, dtype=torch.float64)
        if a.shape != b.shape or not torch.allclose(
            a, b, rtol=1e-3, atol=1e-5 * max(1.0, float(b.abs().max())), equal_nan=True
        ):
            raise BadFileError(f"{path} belongs to another problem: its {name} differs from this one's.")
    for name in saved.get("numbers", {}):
        if name not in current["numbers"]:
            raise BadFileError(f"{path} belongs to another problem: it had a {name}, this one has none.")
