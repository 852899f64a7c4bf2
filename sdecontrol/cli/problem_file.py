"""Control problems written in a TOML file.

    alpha = 0.5                    # temperature; dtype = "float64" beside it for double precision

    [sde]                          # dX = (A X + offset) dt + sigma dW on [0, horizon]
    A = [[-1.0, 0.5], [0.0, -1.0]]
    sigma = 1.0                    # a number, or a (d, m) matrix
    offset = [0.0, 0.0]            # optional
    horizon = 1.0                  # optional, 1 by default

    [initial]                      # a point, or mean and cov (a number, d variances or a matrix)
    point = [0.0, 0.0]

    [reward]                       # r(x) = -x'Gx/2 + g'x; linear without G
    G = [[1.0, 0.0], [0.0, 1.0]]
    g = [1.0, 1.0]

    [running_cost]                 # optional: f(x) = x'Fx/2
    F = [[0.1, 0.0], [0.0, 0.1]]

    [solve]                        # optional: method, time_steps, iterations, batch_size, learning_rate, scheme, seed
    time_steps = 50

Or, for any other problem, ``[problem] function = "module:object"`` in the place of all but [solve]: a ControlProblem,
or a function that returns one, in a module beside the file or importable.
"""

import contextlib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import check_name
from ..problems.problem import ControlProblem
from ..problems.rewards import Linear, Quadratic, QuadraticCost
from ..processes.laws import Dirac, Gaussian
from ..processes.linear import LinearSDE
from .objects import import_object

SOLVE_KEYS: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "time_steps": int,
    "iterations": int,
    "batch_size": int,
    "learning_rate": (int, float),
    "scheme": str,
    "seed": int,
}
_TABLES = {
    "": ("alpha", "dtype", "start", "sde", "initial", "reward", "running_cost", "problem", "solve"),
    "sde": ("A", "sigma", "offset", "horizon"),
    "initial": ("point", "mean", "cov"),
    "reward": ("G", "g"),
    "running_cost": ("F",),
    "problem": ("function",),
    "solve": tuple(SOLVE_KEYS),
}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def read_problem_file(path: Path) -> tuple[ControlProblem, dict[str, Any]]:
    """The problem of a TOML file, and its ``[solve]`` settings.

    Raises:
        FileNotFoundError, ValueError, TypeError: naming the file, the table and the key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from error
    with _located(str(path)):
        _check_keys(content)
        settings = _solve_settings(content.get("solve", {}))
        if "problem" in content:
            others = [k for k in content if k not in ("problem", "solve")]
            if others:
                raise ValueError(f"[problem] makes the whole problem; leave out {', '.join(others)}.")
            return _from_function(content["problem"], path), settings
        return _from_tables(content), settings


@contextlib.contextmanager
def _located(place: str) -> Iterator[None]:
    """Say where in the file an error comes from."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        inside = ", " if str(error).startswith("[") else ": "
        separator = " " if place.startswith("[") else inside
        raise kind(f"{place}{separator}{error}") from error


def _check_keys(content: dict[str, Any]) -> None:
    for key, value in content.items():
        check_name("key", key, _TABLES[""])
        if key in _TABLES:
            if not isinstance(value, dict):
                raise TypeError(f"{key} must be a table [{key}], got {value!r}.")
            with _located(f"[{key}]"):
                for inner in value:
                    check_name("key", inner, _TABLES[key])


def _solve_settings(table: dict[str, Any]) -> dict[str, Any]:
    for key, value in table.items():
        if not isinstance(value, SOLVE_KEYS[key]) or isinstance(value, bool):
            kind = SOLVE_KEYS[key]
            name = kind.__name__ if isinstance(kind, type) else "number"
            raise TypeError(f"[solve] {key} must be of type {name}, got {value!r}.")
    return dict(table)


def _from_function(table: dict[str, Any], path: Path) -> ControlProblem:
    spec = table.get("function")
    with _located("[problem] function"):
        problem = import_object(spec, path.resolve().parent)
    problem = problem() if callable(problem) and not isinstance(problem, ControlProblem) else problem
    if not isinstance(problem, ControlProblem):
        raise TypeError(f"[problem] function: {spec} gives a {type(problem).__name__}, not a ControlProblem.")
    return problem


def _tensor(
    table: dict[str, Any], key: str, ndims: tuple[int, ...], what: str, dtype: torch.dtype, d: int | None = None
) -> Tensor:
    """Numbers of a table as a tensor; of length d in every dimension, where that is given."""
    if key not in table:
        raise ValueError(f"{key} is missing: {what}.")
    try:
        value = torch.tensor(table[key], dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{key} must be {what}, got {table[key]!r}.") from error
    if value.ndim not in ndims:
        raise ValueError(f"{key} must be {what}, got an array with {value.ndim} dimensions.")
    if d is not None and any(n != d for n in value.shape):
        raise ValueError(f"{key} has shape {tuple(value.shape)}, but A is {d} x {d}.")
    return value


def _from_tables(content: dict[str, Any]) -> ControlProblem:
    if "sde" not in content:
        raise ValueError("[sde] is missing: give A and sigma, or a [problem] function.")
    dtype = torch.get_default_dtype()
    if "dtype" in content:
        check_name("dtype", content["dtype"], _DTYPES)
        dtype = _DTYPES[content["dtype"]]
    table, reward, cost = content["sde"], None, None
    with _located("[sde]"):
        A = _tensor(table, "A", (2,), "a d x d matrix", dtype)
        sigma = _tensor(table, "sigma", (0, 2), "a number or a d x m matrix", dtype)
        offset = _tensor(table, "offset", (1,), "a list of d numbers", dtype) if "offset" in table else None
        sde = LinearSDE(A, sigma, offset, horizon=table.get("horizon", 1.0))
    with _located("[initial]"):
        initial = _initial(content.get("initial", {}), dtype, len(A))
    if "reward" in content:
        with _located("[reward]"):
            reward = _reward(content["reward"], dtype, len(A))
    if "running_cost" in content:
        with _located("[running_cost]"):
            cost = QuadraticCost(_tensor(content["running_cost"], "F", (2,), "a d x d matrix", dtype, len(A)))
    return ControlProblem(sde, initial, reward, cost, content.get("alpha", 1.0), content.get("start"))


def _initial(table: dict[str, Any], dtype: torch.dtype, d: int) -> Dirac | Gaussian:
    if "point" in table:
        if "mean" in table or "cov" in table:
            raise ValueError("has both a point and a mean or cov; give one.")
        return Dirac(_tensor(table, "point", (1,), "a list of d numbers", dtype, d))
    mean = _tensor(table, "mean", (1,), "a list of d numbers, or give a point", dtype, d)
    cov = _tensor(table, "cov", (0, 1, 2), "a number, d variances or a d x d matrix", dtype)
    return Gaussian(mean, float(cov) if cov.ndim == 0 else torch.diag(cov) if cov.ndim == 1 else cov)


def _reward(table: dict[str, Any], dtype: torch.dtype, d: int) -> Quadratic | Linear:
    g = _tensor(table, "g", (1,), "a list of d numbers", dtype, d) if "g" in table else None
    if "G" in table:
        return Quadratic(_tensor(table, "G", (2,), "a d x d matrix", dtype, d), g)
    if g is None:
        raise ValueError("is empty: give G (d x d), g (d numbers), or both.")
    return Linear(g)
