"""``gibbs_problem``: sampling of an unnormalised density as a control problem (docs/mathematics.md section 6).

``pi = rho / Z`` with ``rho = exp(log_density)`` known up to Z. The reference ends in a known Gaussian
``p0_T = N(centre, scale^2)``; with alpha = 1 and the reward ``log rho - log p0_T`` the tilted end is ``pi``, and
``E_{p0_T}[exp r] = Z``. Since the references' chains have exact transitions (``TimeChanged``), ``p0_T`` is the chain's
own end at every step size, and so Z is the target's on every grid.

Published samplers are combinations of such a reference and a method of this package:

* path integral sampler, PIS (2111.15141): "brownian", ``RewardBackprop()`` (relative entropy);
* Foellmer drift by Schroedinger-Foellmer (2106.05274): "brownian", ``PathIntegralGuidance()``, nothing trained;
* denoising diffusion sampler, DDS (2302.13834): "ou", ``RewardBackprop()``;
* time-reversed diffusion sampler, DIS (2211.01364): "ou", ``RewardBackprop()``;
* PIS-LV, DIS-LV, log-variance (2307.01198, 2005.05409): either, ``LogVariance()``, off-policy with
  ``paths="reference"``;
* trajectory balance, TB (2210.00580, 2402.05098): either, ``PathConsistency(n="all")``;
* sub-trajectory and detailed balance (2402.05098): either, ``PathConsistency(n=k)`` and ``PathConsistency(n=1)``;
* cross-entropy, reweighted maximum likelihood: either, ``CrossEntropy()``;
* adjoint matching (2409.08861): either, ``AdjointMatching()``;
* adjoint sampling (2504.11713): "brownian", ``AdjointMatching(reciprocal=True)``;
* particle denoising, twisted SMC: "ou", ``SMC()``;
* controlled Monte Carlo diffusions, CMCD (2307.01050): "annealed", ``RewardBackprop()`` (CMCD-KL), ``LogVariance()``
  (CMCD-LV);
* annealed importance sampling, unadjusted Langevin (9803008; ULA, 2208.07698): "annealed",
  ``BestOfN(selection="softmax")`` or ``SMC(ess_threshold=0)``; nothing trained, ``log_z`` by ``evaluate``;
* annealed sequential Monte Carlo (Del Moral et al. 2006): "annealed", ``SMC()``; with a learned control
  ``SMC(proposal=solution)`` (2412.07081).

The published references run at constant speed (PIS) or on a schedule chosen by hand (DDS, DIS); these run at a
geometrically falling one.

Annealed Langevin has no reference with a known end. Its target is made of backward kernels from pi, in which the
control has a part too (``chains/reverse.py``): there is no value function of the state alone, so methods that use or
learn one refuse it, as do those that use the reference's bridges or adjoint.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ImproperTarget, NonFiniteError, NotDifferentiable, check_name, warn
from ..precision import at_least_single, full_precision
from ..processes.annealed import AnnealedLangevin
from ..processes.laws import Dirac, Gaussian, draw
from ..processes.modules import evaluating
from ..processes.time_changed import KINDS, TimeChanged
from ..randomness import Place, derive_seed, fresh_seed, generator_for
from ..shapes import PerPath, Samples, States
from ..tensors import as_float, check_recording, check_tensor, probing
from .density import LogDensity
from .parameters import Parameters, parameters_of
from .pilot import Pilot, check_rays, run_pilot
from .problem import ControlProblem, draw_conditions

REFERENCES = (*KINDS, "annealed")

FLOOR_DEPTH = 1e4  #: a density of zero counts as the highest log density that was met, less this
_CHECKED = 256  # draws of the reference's end at which the density is tried
_RARE = 0.01
_SPACING = 0.01  # of the scale, which is about a standard deviation
_LOG_2PI = math.log(2 * math.pi)


class GibbsReward:
    """``log rho(x) - log p0_T(x)``, ``(batch,)``; where ``log rho = -inf``, a constant ``floor - log p0_T(centre)``
    without a gradient."""

    def __init__(self, density: LogDensity, centre: Tensor, scale: Tensor, floor: float) -> None:
        self.density, self.centre, self.scale, self.floor = density, centre, scale, floor
        self.log_peak = -float(scale.double().log().expand(centre.shape).sum()) - 0.5 * centre.numel() * _LOG_2PI

    @property
    def lowest(self) -> float:
        """The reward of states whose log density is the floor or less."""
        return self.floor - self.log_peak

    def log_density(self, x: States, y: Any = None) -> PerPath:
        """``log rho`` with its zeros floored."""
        value = self.density(x, y)
        outside = value.detach() == -math.inf
        if not bool(outside.any()):
            return value
        if not value.requires_grad:
            return torch.where(outside, torch.full_like(value, self.floor), value)
        inside = (~outside).nonzero().flatten()  # again, without those rows: a gradient of 0 times inf would be NaN
        out = value.detach().new_full(value.shape, self.floor)
        if len(inside) == 0:
            return out + 0.0 * x.flatten(1).sum(1)
        return out.index_copy(0, inside, self.density(x[inside], None if y is None else y[inside]))

    def __call__(self, x: States, y: Any = None) -> PerPath:
        return self.of(self.log_density(x, y), x)

    def of(self, value: Tensor, x: States) -> PerPath:
        """The reward at states whose log density is known, its zeros floored or not."""
        value = value.clamp(min=self.floor) if not value.requires_grad else value
        square = 0.5 * ((x - self.centre) / self.scale).square().sum(1)
        floored = value.detach() == self.floor
        if bool(floored.any()):
            square = torch.where(floored, torch.zeros_like(square), square)
        return value + square - self.log_peak


@dataclass(frozen=True)
class Statement:
    """How a Gibbs problem was stated, by which its reference is made when it is first needed.

    Attributes:
        centre: ``(dim,)`` the guess, or as given (``keep_centre``). scale: as given, 0-d or ``(dim,)``; None: by a
            pilot run. highest: the largest log density known, where the problem needs no look at its end. guessed:
            whether centre and scale stand for what is to be found yet.
        finer: whether states may be of double precision, where the pilot shows that they must be.
    """

    kind: str
    centre: Tensor
    scale: Tensor | None
    keep_centre: bool
    horizon: float
    resolution: float
    backward_control: bool
    seed: int
    finer: bool
    condition: Any = None
    reward_batch_size: int | None = None
    highest: float | None = None
    guessed: bool = False


#: what a problem has once its reference is made
_LATER = ("reference", "initial", "start", "origin", "from_point", "random_start", "dtype", "centre", "scale")
_LATER += ("pilot", "floor", "terminal_law", "reward_function", "running_cost_function", "control_shape", "_chains")


class GibbsProblem(ControlProblem):
    """What :func:`gibbs_problem` makes: a :class:`ControlProblem` whose tilted end is a density known up to its
    integral.

    Its reference is made when it is first asked for, by the pilot run where no scale was given (:meth:`settle`).

    Attributes:
        dim: dimension of the states. kind: "ou", "brownian" or "annealed".
        parameters: what the density is a function of (:class:`Parameters`): ``parameters(x)`` are the user's own, of
            states x. log_density: the user's function. score: the user's, or None.
        centre: ``(dim,)``. scale: 0-d or ``(dim,)``.
        terminal_law: the reference's end ``N(centre, scale^2)``, a :class:`Gaussian`; the chain's own, at every step
            size. ("annealed": its start.)
        pilot: what the pilot run found and cost (:class:`Pilot`), or None where the scale was given.
        floor: the log density that stands for -inf.
        spent: evaluations by what they were for ("probe", "pilot"); a value with its gradient counts as two.
        has_gradient: whether the log density has one; without, methods that need it refuse, and ``LogVariance``,
            ``PathConsistency``, ``CrossEntropy``, ``SoftPPO``, ``PathIntegralGuidance`` and ``SMC`` are those that do
            not.
    """

    reference: TimeChanged | AnnealedLangevin
    dtype: torch.dtype
    pilot: Pilot | None
    floor: float
    terminal_law: Gaussian

    def __init__(self, density: LogDensity, parameters: Parameters, statement: Statement) -> None:
        self.density, self.parameters, self.statement = density, parameters, statement
        self.log_density, self.score = density.function, density.score
        self.dim, self.kind, self.has_gradient = parameters.dim, statement.kind, density.differentiable
        self.condition, self.reward_batch_size = statement.condition, statement.reward_batch_size
        self.event_shape, self.horizon, self.alpha = torch.Size((self.dim,)), statement.horizon, 1.0
        self.device = statement.centre.device
        if not statement.finer:
            self.dtype = statement.centre.dtype
        self.spent = {"probe": density.evaluations}
        self.settled = self._settling = False

    def __getattr__(self, name: str) -> Any:
        # asked for what is not there yet
        if name not in _LATER or self.__dict__.get("_settling", True) or self.settled:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.settle()
        return getattr(self, name)

    @full_precision()
    def settle(self) -> GibbsProblem:
        """Make the reference now, by the pilot run where no scale was given (about 3e4 evaluations, or 1.4e5 of a
        density without a gradient); itself.

        Raises:
            NonFiniteError: the density is NaN or +inf where the reference ends.
            ImproperTarget: the integral looks infinite. ValueError: no state with density was found.

        Warns:
            UserWarning: the density vanishes in nearly all of the reference's end; or, where the scale was given, it
                looks improper.
        """
        if self.settled:
            return self
        check_recording("gibbs_problem(...)")
        before, self._settling = self.density.evaluations, True
        try:
            with evaluating(self.density.modules()):
                self._settle(self.statement)
            self.settled = True
        finally:
            self._settling = False
        if self.density.evaluations > before:
            self.spent["pilot"] = self.density.evaluations - before
        return self

    def _settle(self, s: Statement) -> None:
        density, conditions = self.density, functools.partial(draw_conditions, s.condition)
        pilot, roughness, middle, width = None, 1.0, s.centre, s.scale
        if width is None or s.kind == "annealed":
            pilot = _located(density, s, conditions)
            if pilot is None:
                return self._settle(replace(s, centre=s.centre.double(), finer=False))
            roughness = pilot.roughness
            if width is None:
                middle, width = pilot.centre, pilot.scale
            roughness *= float((width.double() / pilot.scale.double()).log().mean().exp())
        highest = s.highest
        if highest is None:
            highest = _check_end(density, middle, width, conditions, s.seed, pilot)
        reference = _process(s, middle, width, density.gradient, roughness)
        self.centre, self.scale = middle, width
        self.pilot, self.floor = pilot, highest - FLOOR_DEPTH
        self.terminal_law = Gaussian(middle, width.square())
        point = s.kind == "brownian"
        super().__init__(
            reference,
            initial=Dirac(middle) if point else self.terminal_law,
            reward=GibbsReward(density, middle, width, self.floor),
            alpha=1.0,
            start=None if point else "memoryless",
            condition=s.condition,
            reward_batch_size=s.reward_batch_size,
        )
        return None

    def located(self, centre: Tensor, scale: Tensor, highest: float, guessed: bool = False) -> GibbsProblem:
        """The same density with a reference that ends in ``N(centre, scale^2)``, made without an evaluation.

        Args:
            highest: the largest log density known. guessed: whether these stand for what is to be found yet.
        """
        known: dict[str, Any] = {"keep_centre": True, "finer": False, "highest": highest, "guessed": guessed}
        statement = replace(self.statement, centre=centre, scale=scale, **known)
        made = GibbsProblem(self.density, self.parameters, statement)
        made.spent = dict(self.spent)
        return made.settle()

    def as_stated(self, samples: Samples) -> Any:
        """States as the user's own parameters: ``(n, size)``, or a dictionary of ``(n, *shape)`` where these have
        names."""
        return self.parameters(samples)

    def coordinates_of(self, samples: Any) -> Samples:
        """The states ``(n, dim)`` of values of the parameters.

        Raises:
            ValueError: a parameter is missing, or a value outside of its support.
        """
        return samples if self.parameters.identity else self.parameters.coordinates(samples).to(self.centre)

    def _choose_start(self, start: str | None) -> str:
        # backward kernels lead back to the start, so that tilting the end is all there is to do
        return "memoryless" if self.reference.reverse_target else super()._choose_start(start)

    def _probe_reward(self, x: Tensor, y: Any) -> bool:
        return self.density.differentiable  # probed when it was made, at states of its own scale

    @functools.cached_property
    def roughness(self) -> float:
        """Size of an entry of the target's score in units of 1/scale: the pilot's root mean square at the target, or
        where the scale was given the median over the reference's end."""
        if self.reference.reverse_target:
            return self.reference.roughness  # type: ignore[union-attr]
        if self.pilot is not None and math.isfinite(self.pilot.roughness):
            return max(1.0, self.pilot.roughness)
        x = draw(self.terminal_law, _CHECKED, 0)
        with torch.enable_grad(), self.evaluating():
            leaf = x.clone().requires_grad_(True)
            value = self.density(leaf, self.draw_condition(_CHECKED, 0))
            slope = torch.autograd.grad(torch.where(value > -math.inf, value, 0.0).sum(), leaf)[0]
        sizes = (self.scale * slope).norm(dim=1).nan_to_num(0.0, 0.0, 0.0)
        return max(1.0, float(sizes.median()) / self.dim**0.5)

    def modules(self) -> list[nn.Module]:
        return [*(super().modules() if self.settled else ()), *self.density.modules()]

    def rewards(self, x: Samples, condition: Any = None) -> tuple[PerPath, Tensor | None]:
        try:
            return super().rewards(x, condition)
        except NonFiniteError as error:
            raise bad_values(error.rows or 0, x) from None

    def __repr__(self) -> str:
        if not self.settled:
            return f"GibbsProblem({self.density.__name__}, dim={self.dim}, reference={self.kind!r}, not yet located)"
        low, high = float(self.scale.min()), float(self.scale.max())
        width = f"{low:.3g}" if low == high else f"{low:.3g}..{high:.3g}"
        return f"GibbsProblem({self.density.__name__}, dim={self.dim}, reference={self.kind!r}, scale={width})"


@full_precision()
def gibbs_problem(
    log_density: Callable[..., Any] | None = None,
    dim: int | None = None,
    reference: str = "ou",
    scale: float | Sequence[float] | Tensor | None = None,
    centre: float | Sequence[float] | Tensor | None = None,
    *,
    log_likelihood: Callable[..., Any] | None = None,
    prior: Any = None,
    support: Any = None,
    names: Any = None,
    arrays: str | None = None,
    vectorised: bool = True,
    workers: int | Executor | None = None,
    score: Callable[..., Any] | None = None,
    condition: Any = None,
    horizon: float = 1.0,
    resolution: float = 0.03,
    backward_control: bool = True,
    seed: int | None = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    reward_batch_size: int | None = None,
) -> GibbsProblem:
    """The control problem whose tilted end is ``exp(log_density) / Z``, and whose Z is that integral.

    It costs a few evaluations, to see what the function takes and gives. Where the density is and how wide is found
    when that is first needed, by a pilot run or by the method (``problem.spent`` counts).

    Args:
        log_density: ``(batch, dim) -> (batch,)``; ``(x, y)`` with a condition. Unnormalised; -inf where the density is
            0 (a hard constraint) is allowed: there the reward is that of the highest log density met while the problem
            was made less 1e4, without a gradient. NaN and +inf are errors. A function without a gradient is allowed,
            and one of numpy's arrays. Where parameters have names (``prior`` or ``support`` is a dictionary, or
            ``names`` is one) it is called with a dictionary of arrays ``(batch, *shape)``.
        dim: number of the parameters; not needed where names, support or prior say it.
        reference: "ou": the stationary Ornstein-Uhlenbeck process with law ``N(centre, scale^2)``, from 0 to a
            memoryless end (correlation 0.005); "brownian": Brownian motion from ``centre`` to ``N(centre, scale^2)``.
            Both on a clock that slows down towards the end. "annealed": annealed Langevin dynamics from
            ``N(centre, scale^2)`` along ``p0^(1-beta) rho^beta``, with the backward kernels of CMCD
            (:class:`AnnealedLangevin <sdecontrol.processes.annealed.AnnealedLangevin>`; needs a gradient). Its
            reference alone is annealed importance sampling. Losses of whole weights and SMC take it.
        scale: the reference's standard deviation, of the unconstrained coordinates: a number or ``(dim,)``, wide enough
            to cover the target. None: found by a pilot run (:meth:`GibbsProblem.settle`), on the wide side ("annealed"
            makes it in any case, for its step sizes).
        centre: a number or ``(dim,)``, of the same coordinates. None: by the pilot run, or 0 where the scale is given.
        log_likelihood: in log_density's place, where ``prior`` is given: their sum is the log density, and Z the
            evidence.
        prior: torch distributions, ``{"mu": Normal(0.0, 5.0), "tau": HalfCauchy(5.0)}``; without names a list, one for
            each parameter, or one law of the whole vector. A prior says its parameter's support and shape too.
        support: where parameters live: a pair (low, high) with None for an open end, a torch constraint, or "positive",
            "unit_interval", "simplex", ...; a list or dictionary of these, or one for the whole vector. None: all
            real numbers. Samples come in the parameters themselves; samplers move in coordinates without bounds, with
            the transform's Jacobian in the density (``problem.parameters``).
        names: of the numbers of the vector, as labels; or ``{"theta": 8, "tau": ()}``, name -> shape.
        arrays: "torch" or "numpy" (double precision): what the function takes. None: found by trying.
        vectorised: False: the function takes one point, ``(dim,)`` or a dictionary of arrays ``shape``, and gives one
            number (``(x, y)``: one condition).
        workers: of a function of one point: processes that call it at once, or an executor
            (:class:`Pool <sdecontrol.problems.pool.Pool>`).
        score: ``grad log_density`` in the parameters, ``(batch, dim) -> (batch, dim)``, where you have a cheaper or
            safer one than autograd's.
        condition: what y is drawn from, as in :class:`ControlProblem`: one control then samples all of
            ``exp(log_density(., y)) / Z(y)``, and the reference covers their union.
        horizon: end time; a mere unit, since the clock's total is fixed.
        resolution: the finest detail of the target, as a fraction of the scale: how far the clock slows down.
        backward_control: "annealed": whether the control has its part in the backward kernels (CMCD), or they are plain
            Langevin steps.
        seed: of the pilot run and the checks; None draws one from torch's global generator.
        dtype, device: of the states. Default: those of ``centre`` or ``scale`` where they are tensors. Else float64 for
            functions of numpy's arrays, functions that give it, and parameters with supports, priors or names, where
            the function takes it; torch's dtype for all others (float64 where float32 numbers at the target are too
            far apart for its width, and the density takes them). On the CPU.
        reward_batch_size: call the density on at most so many states at once while solving.

    Raises:
        TypeError, ValueError: naming the argument, what was wrong with it, and what to do. What is wrong with the
            density elsewhere is raised by :meth:`GibbsProblem.settle`, when the problem is first used.
    """
    check_recording("gibbs_problem(...)")
    function, name = _the_function(log_density, log_likelihood, prior)
    _check_dim(dim)
    parameters = parameters_of(dim, names, support, prior)
    density = LogDensity(
        function, score, parameters=parameters, arrays=arrays, vectorised=vectorised, workers=workers, name=name
    )
    check_name("reference", reference, REFERENCES)
    if not backward_control and reference != "annealed":
        raise ValueError(
            f"backward_control goes with reference='annealed' and only with it; got reference={reference!r}."
        )
    given = [v for v in (centre, scale) if isinstance(v, Tensor) and v.is_floating_point()]
    open_ = dtype is None and not given
    dtype = at_least_single(dtype or (given[0].dtype if given else torch.get_default_dtype()))
    device = torch.device(device) if device is not None else given[0].device if given else torch.device("cpu")
    like: dict[str, Any] = {"dim": parameters.dim, "device": device}
    middle = _vector("centre", 0.0 if centre is None else centre, dtype=dtype, **like).expand(parameters.dim)
    width = None if scale is None else _vector("scale", scale, dtype=dtype, positive=True, **like)
    statement = Statement(
        reference, middle.contiguous(), width, centre is not None, horizon, resolution, bool(backward_control),
        fresh_seed(seed), open_, condition, reward_batch_size,
    )  # fmt: skip
    _process(statement, middle, middle.new_ones(()), density.gradient, 1.0)  # says what is wrong with its settings
    with evaluating(density.modules()):
        dtype, finer = _probed(density, statement, open_)
    if reference == "annealed" and not density.differentiable:
        raise NotDifferentiable(
            "reference='annealed' moves by the gradient of log_density, which has none (it returned a tensor "
            "without a graph). Pass score=, write it in torch operations, or use reference='ou'."
        )
    statement = replace(
        statement,
        centre=statement.centre.to(dtype),
        scale=None if width is None else width.to(dtype),
        finer=finer,
    )
    density.parameters = parameters = parameters.to(statement.centre)
    return GibbsProblem(density, parameters, statement)


def _the_function(log_density: Any, log_likelihood: Any, prior: Any) -> tuple[Any, str]:
    """The user's function and its name."""
    if log_likelihood is None:
        if log_density is None:
            raise TypeError("log_density is missing: a function x -> (batch,); or log_likelihood, with prior=.")
        if prior is not None:
            raise TypeError(
                "prior goes with log_likelihood: pass the log likelihood alone by that name, and the priors are added. "
                "A log_density has its prior in it, and support= says where parameters live."
            )
        return log_density, "log_density"
    if log_density is not None:
        raise TypeError("log_density and log_likelihood are both given; pass one of them.")
    if prior is None:
        raise TypeError("log_likelihood needs prior=; what has its prior in it is a log_density.")
    return log_likelihood, "log_likelihood"


def _check_dim(dim: Any) -> None:
    if dim is None:
        return
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, the dimension of the states; got {dim!r}.")
    if dim < 1:
        raise ValueError(f"dim must be >= 1, got {dim}.")


def _process(
    s: Statement, centre: Tensor, scale: Tensor, gradient: Callable[..., Tensor], roughness: float
) -> TimeChanged | AnnealedLangevin:
    if s.kind == "annealed":
        how = {"backward_control": s.backward_control}
        return AnnealedLangevin(gradient, centre, scale, roughness, s.horizon, **how)
    return TimeChanged(s.kind, centre, scale, s.horizon, s.resolution)


def _probed(density: LogDensity, s: Statement, open_: bool) -> tuple[torch.dtype, bool]:
    """Try the density on a few states; the dtype that states have, and whether they may be of double precision where
    they are not."""
    x = _states_to_try(s.centre, s.scale, s.seed)
    rows = len(x)
    with probing("condition", "condition(n)"):
        y = draw_conditions(s.condition, rows, derive_seed(s.seed, Place.GIBBS_PROBE_CONDITION))
    if s.condition is not None and (not isinstance(y, Tensor) or y.ndim < 1 or y.shape[0] != rows):
        raise ValueError("condition must draw a tensor (n, ...) of n conditions.")
    found = density.probe(x, y)
    if not open_ or found == torch.float64 or x.dtype == torch.float64:
        return torch.float64 if open_ else x.dtype, False
    as_people_have_it = not (density.plain and density.user.vectorised)
    if not as_people_have_it and s.scale is not None and s.kind != "annealed":  # no pilot run, which alone would ask
        return x.dtype, False
    few = slice(None if density.user.vectorised else 1)
    takes = density.takes(x[few].double(), _few(y, few))
    return (torch.float64, False) if takes and as_people_have_it else (x.dtype, takes)


def _few(y: Any, rows: slice) -> Any:
    return None if y is None else y[rows]


def _states_to_try(centre: Tensor, scale: Tensor | None, seed: int) -> Tensor:
    """A few states to call the density on, ``(rows, dim)``, their number different from the dimension."""
    dim = len(centre)
    rows = next(n for n in range(6, 64) if n != dim)
    z = torch.randn(rows, dim, generator=generator_for("cpu", seed, Place.GIBBS_PROBE), dtype=torch.float64)
    return centre + (1.0 if scale is None else scale) * z.to(centre)


def _located(density: LogDensity, s: Statement, conditions: Callable[[int, int], Any]) -> Pilot | None:
    """The pilot run; None where its states may be finer, and it shows that they must be: numbers at the target are too
    far apart for its width."""
    try:
        pilot = run_pilot(density, s.centre, s.keep_centre, conditions, derive_seed(s.seed, Place.GIBBS_PILOT))
    except ImproperTarget:
        if not s.finer:
            raise
        return None
    coarse = torch.finfo(s.centre.dtype).eps * pilot.centre.abs() > _SPACING * pilot.scale
    return None if s.finer and bool(coarse.any()) else pilot


def _vector(
    name: str, value: Any, dim: int, dtype: torch.dtype, device: torch.device, positive: bool = False
) -> Tensor:
    """A number or ``(dim,)`` numbers as a tensor, 0-d or ``(dim,)``."""
    if isinstance(value, Tensor):
        out = value.detach().to(device, dtype)
    else:
        many = isinstance(value, (list, tuple))
        numbers = [as_float(name, v) for v in value] if many else as_float(name, value)
        out = torch.tensor(numbers, dtype=dtype, device=device)
    check_tensor(name, out)
    if out.shape not in ((), (dim,)):
        raise ValueError(
            f"{name} must be a number or have shape ({dim},), one entry per dimension; got {tuple(out.shape)}."
        )
    if positive and not bool((out > 0).all()):
        raise ValueError(f"{name} must be > 0 (a standard deviation), got {float(out.min()):g}.")
    return out


def _check_end(
    density: LogDensity,
    centre: Tensor,
    scale: Tensor,
    conditions: Callable[[int, int], Any],
    seed: int,
    pilot: Pilot | None,
) -> float:
    """Try the density where the reference ends; the highest value met.

    Raises:
        NonFiniteError, ValueError, ImproperTarget: see :meth:`GibbsProblem.settle`.
    """
    x = draw(Gaussian(centre, scale.square()), _CHECKED, derive_seed(seed, Place.GIBBS_END))
    y = conditions(_CHECKED, derive_seed(seed, Place.GIBBS_END_CONDITION))
    values = density.value(x, y)
    bad = int((values.isnan() | (values == math.inf)).sum())
    if bad:
        raise bad_values(bad, x)
    inside = values.isfinite()
    if not bool(inside.any()) and pilot is None:
        raise ValueError(
            f"log_density is -inf at all {_CHECKED} states drawn from the reference's end, so no path could find the "
            "target: pass another centre and scale (a law that covers the density), or leave scale out for a pilot "
            "run."
        )
    if float(inside.double().mean()) < _RARE:
        warn(
            f"log_density is -inf at {_CHECKED - int(inside.sum())} of {_CHECKED} states drawn from the reference's "
            "end: hard to learn from. Give a smaller scale, or change variables so that the constraint goes away.",
            UserWarning,
            stacklevel=3,
        )
    if pilot is None:
        best = values.argsort(descending=True)[:4]
        best = best[inside[best]]
        try:
            further = check_rays(density, x[best], scale, None if y is None else y[best], seed)
        except ImproperTarget as error:
            warn(f"improper target? {error}", UserWarning, stacklevel=3)
        else:
            if further is not None:
                what = f"the log density falls only at distances of {further:.2g} and more"
                warn(f"{what}: give a larger scale, or leave it out for a pilot run.", UserWarning, stacklevel=3)
    return max(float(values.max()), -math.inf if pilot is None else pilot.highest)


def bad_values(rows: int, x: Tensor) -> NonFiniteError:
    """The error for a log density that is NaN or +inf in so many of the rows x."""
    return NonFiniteError(
        f"log_density is NaN or +inf in {rows} of {len(x)} rows (largest |x|: {float(x.detach().abs().max()):.3g}). It "
        "must be a number wherever the process can go; where the density is 0, return -inf (e.g. torch.where(x > 0, "
        "x.clamp(min=1e-30).log(), -math.inf)).",
        what="log_density",
        rows=rows,
    )
