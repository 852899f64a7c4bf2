"""Files: tensors as safetensors, settings as JSON, nothing unpickled, written so that a torn write is never read.

A bundle is ``NAME.safetensors`` and ``NAME.json``. The JSON is written last, by an atomic rename, and holds the
checksum of the tensors and its own: a bundle counts only if all agree. It also names its kind, whose fields are
registered here by who writes it, and the schema number of its layout (:mod:`.migrations`).
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import BadFileError, MissingFileError
from .migrations import SCHEMA, migrated

FORMAT, _FIRST_FORMAT = "sdecontrol", "sdecontrol-1"  # the first one had no schema number

_FIELDS: dict[str, tuple[str, ...]] = {}


def register_bundle(kind: str, *fields: str) -> str:
    """Register a kind of bundle by the fields that its settings must have; returns the kind."""
    _FIELDS[kind] = fields
    return kind


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


def checksum(body: dict[str, Any]) -> str:
    """Of everything in a JSON file but the checksum itself."""
    plain = {key: value for key, value in body.items() if key != "settings_sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, allow_nan=True).encode()).hexdigest()


def write_bundle(
    folder: str | os.PathLike[str], name: str, tensors: dict[str, Tensor], settings: dict[str, Any]
) -> Path:
    """Write a bundle of the kind in its settings; what was there before is intact until the new one is complete."""
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = save({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    # the tensors of an older bundle of this name stay until the new JSON points to the new ones
    tensor_file = folder / f"{name}-{digest[:12]}.safetensors"
    body = {"format": FORMAT, "schema": SCHEMA, "tensors": tensor_file.name, "sha256": digest, **settings}
    body["settings_sha256"] = checksum(body)
    path = folder / f"{name}.json"
    _write_atomically(tensor_file, content)
    _write_atomically(path, json.dumps(body, indent=1, allow_nan=True).encode())
    for old in set(folder.glob(f"{name}-*.safetensors")) - {tensor_file}:
        old.unlink(missing_ok=True)
    return path


def read_bundle(folder: str | os.PathLike[str], name: str, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a bundle of a registered kind back, in the present layout.

    Raises:
        MissingFileError: there is none.
        BadFileError: it is corrupt, truncated, or not of this package, this kind or a known schema; the message says
            which.
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
    if not isinstance(settings, dict) or settings.get("format") not in (FORMAT, _FIRST_FORMAT):
        raise BadFileError(f"{path} was not written by this package (no format {FORMAT!r} in it).")
    schema = settings.get("schema") if settings["format"] == FORMAT else 1
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise BadFileError(
            f"{path} has the schema number {schema!r}, and this version of the package reads 1 to {SCHEMA}: read it "
            "with the version that wrote it, or a later one."
        )
    if settings.get("kind") != kind:
        raise BadFileError(f"{path} holds a {settings.get('kind')!r}, not a {kind!r}.")
    file_name = settings.get("tensors")
    if not isinstance(file_name, str) or Path(file_name).name != file_name:
        raise BadFileError(f"{path} names no tensor file beside it.")
    if settings.get("settings_sha256") != checksum(settings):
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
        tensors = load(content)
    except Exception as error:  # safetensors raises its own kinds
        raise BadFileError(f"{tensor_file} is not a safetensors file ({error}).") from error
    tensors, settings = migrated(schema, tensors, settings)
    for field in _FIELDS[kind]:
        if field not in settings:
            raise BadFileError(f"{path} has no field {field!r}: it was not written by this version of the package.")
    return tensors, settings
