"""``Solution``: what ``solve`` returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..chains.base import Chain
from ..controls.base import Control, StartedControl
from ..controls.build import control_from_configuration
from ..controls.guidance import value_from_configuration
from ..controls.tuned import as_model
from ..errors import BadFileError
from ..files.bundles import check_fingerprint, read_bundle, require, write_bundle
from ..paths.paths import Paths
from ..problems.problem import ControlProblem
from ..problems.simulate import simulate_chain
from ..tensors import check_tensor
from .evaluate import Evaluation, evaluate, log_weights

__all__ = ["Solution", "TiltedStart", "load"]


class TiltedStart:
    """The start that a controlled stretch has learned; ``sample((n,), seed=None)`` gives ``(n, *event)``."""

    def __init__(self, solution: Solution) -> None:
        self._solution = solution
        self.event_shape = solution.problem.event_shape

    def sample(self, sample_shape: Any = (), seed: int | None = None) -> Tensor:
        shape = torch.Size(sample_shape if not isinstance(sample_shape, int) else (sample_shape,))
        solution = self._solution
        chain = solution.chain
        paths = simulate_chain(
            solution.problem, chain, max(1, shape.numel()), solution.control, seed=seed, keep="states"
        )
        return paths.states[chain.start].reshape(shape + self.event_shape)

    def __repr__(self) -> str:
        return f"TiltedStart(of {self._solution.problem.initial})"


class Solution:
    """A control that solves a problem, and what can be done with it.

    Attributes:
        problem, method: what was solved, and how (a name or a method).
        control: ``u(x, t)``: x ``(batch, *event)``, t a float or a tensor of shape () or (batch,).
        settings: {"time_steps", "scheme"}: the chain it was solved on, used by all that follows.
        history: one dict of metrics per iteration of training.
        seed, iterations, reproducible: of the run; not reproducible where a time budget ended it.
    """

    def __init__(
        self,
        problem: ControlProblem,
        control: Control,
        *,
        method: str,
        settings: dict[str, Any],
        history: list[dict[str, float]] | None = None,
        seed: int | None = None,
        reproducible: bool = True,
        details: dict[str, Any] | None = None,
        exact_values: Callable[[], dict[str, Any] | None] | None = None,
    ) -> None:
        self.problem, self.control, self.method, self.settings = problem, control, method, settings
        self.history = history or []
        self.seed, self.reproducible, self.details = seed, reproducible, details or {}
        control.settings = settings
        self._exact_values = exact_values

    @property
    def chain(self) -> Chain:
        return self.problem.chain(self.settings.get("time_steps"), self.settings.get("scheme"))

    @property
    def iterations(self) -> int:
        return len(self.history)

    def __repr__(self) -> str:
        return f"Solution({self.method}, {self.iterations} iterations, {self.chain.steps} steps, of {self.problem!r})"

    def simulate(self, n: int, seed: int | None = None, *, condition: Tensor | None = None, keep: str = "all") -> Paths:
        """Paths of the controlled process."""
        return simulate_chain(self.problem, self.chain, n, self.control, seed=seed, keep=keep, condition=condition)

    def _condition(self, n: int, condition: Any) -> Any:
        if condition is None:
            return None
        drawn = self.problem.draw_condition(1, 0)
        like = None if isinstance(condition, Tensor) or drawn is None else drawn.dtype  # of numbers: the problem's own
        y = torch.as_tensor(condition, dtype=like, device=self.problem.device)
        return y.expand(n, *y.shape[1:]) if y.ndim and y.shape[0] == 1 else y.expand(n) if y.ndim == 0 else y

    def sample(self, n: int, seed: int | None = None, *, condition: Any = None) -> Tensor:
        """``(n, *event)`` decoded samples of the controlled process."""
        paths = self.simulate(n, seed, condition=self._condition(n, condition), keep="end")
        with torch.no_grad(), self.problem.evaluating():
            return paths.samples

    def weighted_sample(self, n: int, seed: int | None = None, *, condition: Any = None) -> tuple[Tensor, Tensor]:
        """Samples ``(n, *event)`` with log importance weights ``(n,)`` towards the exact law.

        The weights are not normalised: ``mean(exp(log_w))`` estimates Z.
        """
        paths = self.simulate(n, seed, condition=self._condition(n, condition), keep="end")
        with torch.no_grad(), self.problem.evaluating():
            return paths.samples, log_weights(self.problem, paths)

    def evaluate(self, n: int = 4096, seed: int | None = None) -> Evaluation:
        """Reward, KL, objective, ELBO, log Z, ESS, gap: each an estimate with its standard error; prints as a table.

        Where the chain has an exact solution in closed form, the gap is against it; else it is an estimate.
        """
        known = self._exact_values() if self._exact_values is not None else None
        return evaluate(self.problem, self.control, self.chain, n, seed, **(known or {}))

    @property
    def initial(self) -> Any:
        """The law of X_0: the tilted start where it is controlled, else the problem's."""
        return TiltedStart(self) if self.problem.start == "controlled" else self.problem.initial

    @property
    def model(self) -> nn.Module:
        """The tuned model, an nn.Module in the pre-trained model's own parametrisation and on its own clock.

        Raises:
            ValueError: the problem's reference is no pre-trained model.
        """
        reference = self.problem.reference
        if not reference.pretrained:
            raise ValueError(
                "solution.model needs a pre-trained model as reference (generative_sde or diffusion_chain); "
                "use solution.control here."
            )
        main = self.control.main if isinstance(self.control, StartedControl) else self.control
        return as_model(reference, main)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the solution to a folder: tensors as safetensors, settings as JSON."""
        write_bundle(
            folder,
            "solution",
            self._tensors(),
            {
                "kind": "solution",
                **self._saved(),
                "method": self.method,
                "settings": plain_settings(self.settings),
                "seed": self.seed,
                "reproducible": self.reproducible,
                "control": self.control.configuration,
                "history": self.history,
                "details": self.details,
                "problem": self.problem.fingerprint(),
            },
        )

    def _tensors(self) -> dict[str, Tensor]:
        """What a saved file holds of tensors."""
        return self.control.state_dict()

    def _saved(self) -> dict[str, Any]:
        """What a saved file says beyond what all solutions have."""
        return {}


def plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON can hold them (a grid as a list)."""
    steps = settings.get("time_steps")
    if steps is not None:
        steps = int(steps) if isinstance(steps, Integral) else [float(t) for t in steps]
    return {"time_steps": steps, "scheme": settings.get("scheme")}


def load(folder: str | os.PathLike[str], problem: ControlProblem, control: Any = None, value: Any = None) -> Solution:
    """Load a solution that ``solution.save`` wrote.

    Args:
        problem: the problem it solves; a file of another problem is refused.
        control: your own control or proposal, where the solution has one (the parameters of a module are overwritten).
        value: your own value function or classifier, where the solution has one (by which it is guided or twisted).

    Raises:
        BadFileError: no such file; or corrupt, truncated, foreign, or of another problem.
    """
    tensors, saved = read_bundle(folder, "solution", "solution")
    require(saved, folder, "problem", "settings", "control", "method", "history", "seed", "reproducible")
    check_fingerprint(saved.get("problem"), problem.fingerprint(), folder)
    settings = saved["settings"]
    chain = problem.chain(settings.get("time_steps"), settings.get("scheme"))
    module = control_from_configuration(problem, chain, saved["control"], control, value)
    twisting = {name.removeprefix("twist."): tensors.pop(name) for name in list(tensors) if name.startswith("twist.")}
    ladder = {name.removeprefix("ladder."): tensors.pop(name) for name in list(tensors) if name.startswith("ladder.")}
    chains = {name.removeprefix("chains."): tensors.pop(name) for name in list(tensors) if name.startswith("chains.")}
    load_tensors(module, tensors, folder)
    kind: Any = Solution
    more: dict[str, Any] = {}
    if saved.get("particles") is not None:
        from .particle_solution import ParticleSettings, ParticleSolution

        kind, more = ParticleSolution, {"particles": ParticleSettings(**saved["particles"])}
        if saved["twist"] is not None:
            more["twist"] = value_from_configuration(problem, chain, saved["twist"], value)
            load_tensors(more["twist"], twisting, folder)
    if ladder:
        from .tempered_solution import Ladder, TemperedSettings, TemperedSolution

        kind = TemperedSolution
        more |= {"tempering": TemperedSettings(**saved["tempering"]), "ladder": Ladder(**ladder)}
    if chains:
        from .chain_solution import ChainSettings, ChainSolution, WarmChains

        kind, more = ChainSolution, {"chains": ChainSettings(**saved["chains"]), "warm": WarmChains(**chains)}
    return kind(
        problem,
        module,
        **more,
        method=saved["method"],
        settings=settings,
        history=saved["history"],
        seed=saved["seed"],
        reproducible=saved["reproducible"],
        details=saved.get("details"),
    )


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], path: Any, *, finite_buffers: bool = True) -> None:
    """Fill a module from saved tensors, all names and shapes matching.

    Args:
        finite_buffers: whether buffers must be finite, as parameters must; what training keeps of its course need not be.

    Raises:
        BadFileError: naming what does not fit.
    """
    wanted = module.state_dict()
    free = set() if finite_buffers else {name for name, _ in module.named_buffers()}
    for name in wanted.keys() | tensors.keys():
        if name not in tensors or name not in wanted:
            raise BadFileError(
                f"{path} does not fit this control: {name!r} is {'missing' if name not in tensors else 'extra'}."
            )
        if tensors[name].shape != wanted[name].shape or tensors[name].dtype != wanted[name].dtype:
            raise BadFileError(
                f"{path} does not fit this control: {name!r} is {tensors[name].dtype} "
                f"{tuple(tensors[name].shape)}, wanted {wanted[name].dtype} {tuple(wanted[name].shape)}."
            )
        if tensors[name].is_floating_point() and name not in free:
            check_tensor(name, tensors[name])
    module.load_state_dict(tensors)
