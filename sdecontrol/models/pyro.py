"""Pyro's models as densities of their latent variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..problems.gibbs import GibbsProblem, gibbs_problem
from ..randomness import Place, global_rng

_TRIED = 3  # points at which many at once are compared with one at a time


def from_pyro(model: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """A Pyro model as a :func:`gibbs_problem`: its latent variables are the named parameters, with the supports of
    their laws, and Z is the evidence of what the model observes (by ``obs=``, or by ``pyro.condition``).

    The model is called with one point at a time, or, where ``torch.func.vmap`` can and gives the same, with many.

    Args:
        model: as Pyro has it, ``model(*args, **kwargs)``, every latent variable continuous, its shape and support the
            same at every call.
        options: of :func:`gibbs_problem` (``reference``, ``centre``, ``workers``, ...).

    Raises:
        ImportError: Pyro is missing. ValueError: a latent variable that is discrete; or there is none.
    """
    try:
        import pyro
        from pyro import poutine
    except ImportError as error:
        raise ImportError("from_pyro needs Pyro: pip install 'sdecontrol[mcmc]'.") from error
    with global_rng("cpu", 0, Place.PYRO_TRACE), torch.no_grad():
        trace: Any = poutine.trace(poutine.block(model, hide_types=["param"])).get_trace(*args, **kwargs)
    latent = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and _is_latent(s)}
    if not latent:
        raise ValueError("the model has no latent variable: nothing is sampled that is not observed.")
    for name, site in latent.items():
        if site["fn"].has_enumerate_support or getattr(site["fn"].support, "is_discrete", False):
            raise ValueError(
                f"the latent variable {name!r} is discrete, and samplers move in continuous coordinates: sum it out in "
                "the model."
            )

    def log_joint(values: dict[str, Tensor]) -> Tensor:
        with pyro.validation_enabled(False):
            held: Any = poutine.condition(model, data=values)
            found: Any = poutine.trace(held).get_trace(*args, **kwargs)
            return found.log_prob_sum()

    log_joint.__name__ = getattr(model, "__name__", type(model).__name__)
    stated: dict[str, Any] = {
        "names": {name: tuple(site["value"].shape) for name, site in latent.items()},
        "support": {name: site["fn"].support for name, site in latent.items()},
        "arrays": "torch",
    }
    one = gibbs_problem(log_joint, vectorised=False, **stated, **(options or {}))
    if one.density.user.pool.workers is not None:
        return one
    many = torch.func.vmap(log_joint, randomness="different")
    many.__name__ = log_joint.__name__
    return gibbs_problem(many, **stated, **(options or {})) if _agree(one, many) else one


def _is_latent(site: dict[str, Any]) -> bool:
    return not site["is_observed"] and type(site["fn"]).__name__ != "_Subsample"  # of plates, whose rows are all taken


def _agree(problem: GibbsProblem, many: Callable[..., Tensor]) -> bool:
    """Whether the model of many points at once runs, and gives what it gives of one at a time."""
    x = torch.linspace(-1, 1, _TRIED * problem.dim, dtype=torch.float64).reshape(_TRIED, problem.dim)
    values, _, _ = problem.parameters.constrained(x)
    try:
        with torch.no_grad():
            found = many(problem.parameters.as_argument(values))
        one = problem.density.user(problem.parameters.as_argument(values))
    except Exception:  # vmap refuses many things, each with an error of its own
        return False
    return found.shape == one.shape and torch.allclose(found.to(one), one, rtol=1e-4, atol=1e-4)
