"""Python objects named on the command line or in files: ``module:object``, in a module beside the file or
importable."""

import importlib
import sys
from pathlib import Path
from typing import Any

from ..errors import unknown_name


def import_object(spec: Any, folder: Path) -> Any:
    """The object that ``module:object`` names; the module lies in ``folder`` or is importable. Its code runs.

    Raises:
        ValueError: no such module or object, with the nearest names.
    """
    if not isinstance(spec, str) or spec.count(":") != 1 or not all(spec.split(":")):
        raise ValueError(f"must be 'module:object', got {spec!r}.")
    module_name, attribute = spec.split(":")
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"cannot import {module_name!r} ({error}); it must lie in {folder} or be installed."
        ) from error
    finally:
        sys.path.pop(0)
    if not hasattr(module, attribute):
        raise unknown_name(f"object in module {module_name}:", attribute, [n for n in dir(module) if n[0] != "_"])
    return getattr(module, attribute)
