"""``Solution``: what ``solve`` returns."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ranks
from ..chains.base import Chain
from ..controls.base import Control, StartedControl
from ..controls.saved import CONTROLS, Context, Kinds, Saved
from ..controls.tuned import TunedControl, as_model
from ..errors import warn
from ..files.bundles import read_bundle, register_bundle, write_bundle
from ..files.contents import check_fingerprint, check_finite, load_tensors, plain_settings
from ..paths.paths import Paths
from ..paths.rows import between_ranks
from ..problems.problem import ControlProblem
from ..problems.prompts import encoded
from ..problems.simulate import simulate_chain
from ..problems.simulation_options import SimulationOptions
from ..processes.modules import numbers_of, plain_state
from ..randomness import Place, derive_seed
from ..shapes import PerPath, States
from ..tensors import check_count
from . import posterior
from .evaluate import Evaluation, evaluate

SOLUTIONS = Kinds("solution")
_FACTS = ("method", "settings", "seed", "reproducible", "history", "details")
_KIND = register_bundle("solution", *_FACTS, "control", "solution", "problem")


def _unknown() -> None:
    """No exact values."""


class TiltedStart:
    """The law of the learned start; ``sample((n,), seed=None)`` gives ``(n, *event)``."""

    def __init__(self, solution: Solution) -> None:
        self._solution = solution
        self.event_shape = solution.problem.event_shape

    def sample(self, sample_shape: Any = (), seed: int | None = None) -> Tensor:
        shape = torch.Size(sample_shape if not isinstance(sample_shape, int) else (sample_shape,))
        paths = self._solution.simulate(max(1, shape.numel()), seed, keep="states")
        return paths.states[paths.chain.start].reshape(shape + self.event_shape)

    def __repr__(self) -> str:
        return f"TiltedStart(of {self._solution.problem.initial})"


@SOLUTIONS.register("control")
class Solution:
    """A control that solves a problem, and what can be done with it.

    Attributes:
        problem, method: what was solved, and how (a name or a method).
        control: ``u(x, t)``: x ``(batch, *event)``, t a float or a tensor of shape () or (batch,). The user's modules
            stay the problem's: where their parameters or buffers have changed since, control and all that samples
            raise RuntimeError.
        settings: {"time_steps", "scheme"}: the chain it was solved on, used by all that follows.
        history: one dict of metrics per iteration of training.
        seed, iterations, reproducible: of the run; not reproducible where a time budget ended it.
        parts: of a file's tensors that are not the control's, as their names begin.

    With one seed :meth:`simulate`, :meth:`sample`, :meth:`weighted_sample`, :meth:`evaluate` and :func:`certify` look
    at the same paths, which share no draw with the training, whatever its seed.
    """

    parts: ClassVar[tuple[str, ...]] = ()

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
    ) -> None:
        self.problem, self._control, self.method, self.settings = problem, control, method, settings
        self._solved_with = numbers_of(problem.modules())
        self.history = history or []
        self.seed, self.reproducible, self.details = seed, reproducible, details or {}
        control.settings, control.within = settings, problem.evaluating
        control.belongs_to(problem)
        self._exact_values: Callable[[], dict[str, Any] | None] = _unknown

    def _check_unchanged(self) -> None:
        if not torch.equal(self._solved_with.nan_to_num(), numbers_of(self.problem.modules()).nan_to_num()):
            raise RuntimeError(
                "parameters or buffers of the problem's modules (its model, reward, ...) have changed since this "
                "solution was made, so that it no longer solves the problem. Give them back their values, solve again, "
                "or work on copies: copy.deepcopy(problem) has modules of its own."
            )

    @property
    def control(self) -> Control:
        self._check_unchanged()
        return self._control

    @control.setter
    def control(self, control: Control) -> None:
        self._control = control

    @property
    def chain(self) -> Chain:
        self._check_unchanged()
        return self.problem.chain(self.settings.get("time_steps"), self.settings.get("scheme"))

    @property
    def iterations(self) -> int:
        return len(self.history)

    def __repr__(self) -> str:
        steps = self.problem.chain(self.settings.get("time_steps"), self.settings.get("scheme")).steps
        return f"Solution({self.method}, {self.iterations} iterations, {steps} steps, of {self.problem!r})"

    def simulate(self, n: int, seed: int | None = None, *, condition: Tensor | None = None, keep: str = "all") -> Paths:
        """Paths of the controlled process."""
        check_count("n", n)
        return simulate_chain(self.problem, self.chain, n, self.control, seed=seed, keep=keep, condition=condition)

    def _condition(self, n: int, condition: Any) -> Any:
        if condition is None:
            return None
        condition = encoded(self.problem.condition, condition)
        drawn = self.problem.draw_condition(1, 0)
        like = None if isinstance(condition, Tensor) or drawn is None else drawn.dtype  # of numbers: the problem's own
        y = torch.as_tensor(condition, dtype=like, device=self.problem.device)
        return y.expand(n, *y.shape[1:]) if y.ndim and y.shape[0] == 1 else y.expand(n) if y.ndim == 0 else y

    def sample(
        self,
        n: int,
        seed: int | None = None,
        *,
        condition: Any = None,
        batch_size: int | None = None,
        raw: bool = False,
    ) -> Any:
        """n decoded samples of the controlled process, ``(n, *event)``. Of a density in the user's own parameters:
        ``(n, size)``, or a dictionary of ``(n, *shape)`` where they have names.

        Args:
            condition: on which, one for all or one for each; of :class:`Prompts` a string or a list of them.
            batch_size: draw so many at a time (a multiple of 64), in the memory of these: the samples are the same.
            raw: of a density, the unconstrained coordinates ``(n, dim)`` instead.
        """
        check_count("n", n)
        y, how = self._condition(n, condition), SimulationOptions(chunk=batch_size, weigh=False)
        paths = simulate_chain(self.problem, self.chain, n, self.control, seed=seed, keep="end", condition=y, how=how)
        with torch.no_grad(), self.problem.evaluating():
            return paths.samples if raw else self.problem.as_stated(paths.samples)

    def weighted_sample(
        self, n: int, seed: int | None = None, *, condition: Any = None, raw: bool = False
    ) -> tuple[Any, PerPath]:
        """n samples, as of :meth:`sample`, with log importance weights towards the exact law.

        The weights are not normalised: ``mean(exp(log_w))`` estimates Z.
        """
        paths = self.simulate(n, seed, condition=self._condition(n, condition), keep="end")
        with torch.no_grad(), self.problem.evaluating():
            samples = paths.samples  # the last step of a discrete model calls it
            (reward,) = between_ranks(lambda x, y: [self.problem.reward(x, y)], None, samples, paths.condition)
            log_w = paths.towards(self.problem, reward).log_weights()
            return samples if raw else self.problem.as_stated(samples), log_w

    def value(
        self, x: States, t: float, n: int = 256, seed: int | None = None, *, condition: Tensor | None = None
    ) -> PerPath:
        """``v(x, t) = alpha log E_{Q0}[exp((r - int_t f)/alpha) | X_t = x]``, ``(batch,)``, estimated by n weighted
        paths of the control from each state: ``alpha log mean w``, too small in the mean by about
        ``alpha var(w/E w)/(2 n)``, the less the better the control.

        Args:
            x: ``(batch, *event)``. t: the step of the chain that contains it. condition: of each row, where the problem
                has one.
        """
        check_count("n", n)
        chain, alpha = self.chain, self.problem.alpha
        y = None if condition is None else condition.repeat_interleave(n, 0)
        how = SimulationOptions(state=x.repeat_interleave(n, 0), step=chain.step_at(float(t)))
        options: dict[str, Any] = {"seed": seed, "keep": "end", "condition": y, "how": how}
        paths = simulate_chain(self.problem, chain, len(x) * n, self.control, **options).towards(self.problem)
        with torch.no_grad():
            return alpha * (paths.log_weights().unflatten(0, (-1, n)).logsumexp(1) - math.log(n))

    def plot(self, n: int = 256, seed: int = 0, title: str = "") -> tuple[Any, Any]:
        """Paths beside the reference's, the control, what is spent until t and the value, in panels: matplotlib's
        ``(figure, axes)``, neither shown nor written (``figure.savefig("solution.png")``).

        Args:
            n: paths of the control, and as many of the reference. seed: of both. title: of the figure.

        Raises:
            ValueError: states are tokens.
        """
        from .path_figure import path_figure

        if not self.chain.of_noise:
            raise ValueError("plot is of states that are numbers; of tokens look at solution.sample(n).")
        own = self.simulate(n, seed).towards(self.problem)
        free = simulate_chain(self.problem, self.chain, n, None, seed=seed, keep="states")
        return path_figure(own, free, lambda x, t, m, y: self.value(x, t, m, seed, condition=y), title)

    def evaluate(
        self, n: int = 4096, seed: int | None = None, *, confirm: bool | int = True, batch_size: int | None = None
    ) -> Evaluation:
        """Reward, KL, objective, ELBO, log Z, ESS, gap: each an estimate with its standard error; prints as a table.

        Where the chain has an exact solution in closed form, the gap is against it; else it is an estimate.

        Args:
            n: paths.
            confirm: look for a second estimate of log Z, on which the verdict rests, from as many paths and rewards
                again at most (a number: from so many); False: the verdict is "unconfirmed" at best.
            batch_size: simulate so many of its paths at a time (a multiple of 64), in the memory of these.
        """
        known = self._exact_values()
        options: dict[str, Any] = {"confirm": confirm, "known": known, "batch_size": batch_size}
        return evaluate(self.problem, self.control, self.chain, n, seed, **options)

    # ---------------------------------------------------------------- a density's draws, for other programs

    def to_arviz(self, n: int = 4096, seed: int | None = None, *, evaluation: Evaluation | None = None) -> Any:
        """Draws of a density as an ArviZ ``DataTree``: "posterior", n draws of equal weight; "weighted_posterior" and
        "weighted_sample_stats", the n weighted ones that they are drawn among, with log weights towards the density
        (of Markov chains these are the draws, of weight 0). Attributes of the root and of "posterior": log Z and its
        error, Pareto k, the verdict, method, seed and evaluations.

        Args:
            evaluation: what :meth:`evaluate` has returned, whose numbers are told; None: one is made.

        Raises:
            ImportError: arviz-base is missing. ValueError: the problem is no density.
        """
        return posterior.to_arviz(self, n, seed, evaluation)

    def to_dataframe(self, n: int = 4096, seed: int | None = None) -> Any:
        """n draws of a density, all of the same weight, as a pandas data frame with one column for each number of its
        parameters.

        Raises:
            ImportError: pandas is missing. ValueError: the problem is no density.
        """
        return posterior.to_dataframe(self, n, seed)

    def plot_corner(
        self,
        n: int = 4096,
        seed: int | None = None,
        *,
        names: Sequence[str] | None = None,
        truth: Sequence[float] | None = None,
    ) -> tuple[Any, Any]:
        """Marginals of a density's parameters with median and central 68 per cent, and pairs with contours that hold
        39, 68 and 95 per cent of the draws; ``(figure, axes)``, nothing is shown or written.

        Args:
            names: which numbers of the parameters; None: the first twelve. truth: a number for each, to be marked.

        Raises:
            ValueError: the problem is no density; an unknown name.
        """
        return posterior.plot_corner(self, n, seed, names, truth)

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

    def _exported(self) -> tuple[Any, nn.Module]:
        """Who writes the tuned copy in its library's format, and the copy."""
        exporter = self.problem.reference.exporter
        if exporter is None:
            raise ValueError(
                "the reference is of no other library (from_diffusers makes one that is): use solution.save and "
                "solution.model."
            )
        control = self.control
        if isinstance(control, StartedControl):
            warn("a stock sampler begins at the untilted start: the learned start is left out.")
            control = control.main
        if not isinstance(control, TunedControl):
            raise ValueError(
                f"the control is a {type(control).__name__} beside the model: sc.distill(solution) makes one network "
                "of both, which can be exported."
            )
        return exporter, control.model

    def pipeline(self) -> Any:
        """The tuned model in a stock pipeline of its library, whose samples have the law of :meth:`sample` (with as
        many steps and the same eta): at the last, noiseless step the network is the pre-trained one, as here.

        Raises:
            ValueError: the reference is of no other library, or the control no tuned copy of its model.
        """
        exporter, model = self._exported()
        return exporter.pipeline_of(model)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the tuned model in its own library's format: of diffusers a pipeline's folder where there is one,
        else the network's, its scheduler beside it.

        A stock sampler asks the tuned network at its last, noiseless step too; where that moves samples by more than
        a hundredth, a warning says by how much.

        Raises:
            ValueError: the reference is of no other library, or the control no tuned copy of its model.
        """
        exporter, model = self._exported()
        paths = self.simulate(64, derive_seed(0, Place.LAST_STEP), keep="end")
        if ranks.leads():
            exporter.save_pretrained(model, folder, paths.end, paths.condition)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the solution to a folder: tensors as safetensors, settings as JSON. Of several processes the first
        writes; :func:`load` waits for it.

        Raises:
            ValueError: a parameter that is not finite, or a buffer that is NaN, which :func:`load` would refuse.
        """
        settings = {
            "kind": _KIND,
            **{name: getattr(self, name) for name in _FACTS},
            "settings": plain_settings(self.settings),
            "control": CONTROLS.describe(self.control),
            "solution": SOLUTIONS.describe(self),
            "problem": self.problem.fingerprint(),
        }
        tensors = plain_state(self.control)
        check_finite(self.control, tensors)
        if ranks.leads():
            write_bundle(folder, _KIND, tensors | self._tensors(), settings)

    @property
    def configuration(self) -> dict[str, Any]:
        """What a saved file says beyond what all solutions have."""
        return {}

    def _tensors(self) -> dict[str, Tensor]:
        """What a saved file holds of tensors beside the control's, by parts."""
        return {}

    @classmethod
    def problem_of(cls, problem: Any, tensors: dict[str, Tensor]) -> Any:
        """The problem that a saved solution is of, where it has found a part of it: of the user's."""
        return problem

    @classmethod
    def from_saved(cls, saved: Saved, context: Context, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """What a solution of this class is made of beyond what all have: keyword arguments."""
        return {}


def load(folder: str | os.PathLike[str], problem: ControlProblem, control: Any = None, value: Any = None) -> Solution:
    """Load a solution that ``solution.save`` wrote.

    Args:
        problem: the problem it solves; a file of another problem is refused.
        control: your own control or proposal, where the solution has one (the parameters of a module are overwritten).
        value: your own value function or classifier, where the solution has one (by which it is guided or twisted).

    Raises:
        BadFileError: no such file; or corrupt, truncated, foreign, or of another problem.
    """
    ranks.agreed(None, "sc.load")  # what the first process saves is there
    tensors, saved = read_bundle(folder, _KIND, _KIND)
    kind = SOLUTIONS.find(Saved(saved["solution"], f"{folder}: the solution")["kind"], folder)
    problem = kind.problem_of(problem, tensors)
    check_fingerprint(saved["problem"], problem.fingerprint, folder)
    chain = problem.chain(**saved["settings"])
    context = Context(problem, chain, control, value, folder)
    module = CONTROLS.make(saved["control"], context)
    own = Saved(saved["solution"], f"{folder}: the solution")
    load_tensors(module, {n: v for n, v in tensors.items() if n.split(".")[0] not in kind.parts}, folder)
    return kind(problem, module, **{name: saved[name] for name in _FACTS}, **kind.from_saved(own, context, tensors))
