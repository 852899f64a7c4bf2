"""sdecontrol: continuous-time stochastic control in PyTorch.

Fine-tuning a diffusion model, driving a stochastic system and sampling an unnormalised density are one problem,
``min_u KL(P^u || Q_fine)``: state it as a :class:`ControlProblem`, then :func:`solve` it.

Flat names are what users write: problems, processes, rewards, methods, verbs and errors. Distances between samples are
in ``sc.metrics``, named problems and targets in ``sc.library``; types that are only returned live where they are made.

The names are those of :mod:`sdecontrol.public`, which is imported (and torch with it) when the first of them is used:
``import sdecontrol`` alone, and the command line's help, cost nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .public import *  # noqa: F403
else:
    import gc
    import importlib

    def _public() -> Any:
        """The public face, and its names put into this module."""
        collects = gc.isenabled()
        gc.disable()  # all that imports make stays: looking through it for garbage takes a tenth of their time
        try:
            public = importlib.import_module(".public", __name__)  # "from . import public" asks __getattr__ for it
        finally:
            if collects:
                gc.enable()
        if "__all__" not in globals():
            names = vars(public)
            globals().update({key: names[key] for key in ("__all__", *public.__all__) if key in names})
        return public

    def __getattr__(name: str) -> Any:
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "ranks":  # which rooms import while the face is being made
            return importlib.import_module(".ranks", __name__)
        public = _public()
        return globals()[name] if name in globals() else getattr(public, name)

    def __dir__() -> list[str]:
        return [*_public().__all__, "__version__"]
