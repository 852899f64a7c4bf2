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

import functools
import math
from collections.abc import Callable, Sequence
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
        value = self.log_density(x, y)
        square = 0.5 * ((x - self.centre) / self.scale).square().sum(1)
        floored = value.detach() == self.floor
        if bool(floored.any()):
            square = torch.where(floored, torch.zeros_like(square), square)
        return value + square - self.log_peak


class GibbsProblem(ControlProblem):
    """What :func:`gibbs_problem` makes: a :class:`ControlProblem` whose tilted end is a density known up to its
    integral.

    Attributes:
        dim: dimension of the states. kind: "ou", "brownian" or "annealed".
        log_density: the user's function. score: the user's, or None.
        centre: ``(dim,)``. scale: 0-d or ``(dim,)``.
        terminal_law: the reference's end ``N(centre, scale^2)``, a :class:`Gaussian`; the chain's own, at every step
            size. ("annealed": its start.)
        pilot: what the pilot run found and cost (:class:`Pilot`), or None where the scale was given.
        floor: the log density that stands for -inf.
        has_gradient: whether the log density has one; without, methods that need it refuse, and ``LogVariance``,
            ``PathConsistency``, ``CrossEntropy``, ``SoftPPO``, ``PathIntegralGuidance`` and ``SMC`` are those that do
            not.
    """

    reference: TimeChanged | AnnealedLangevin

    def __init__(
        self,
        density: LogDensity,
        reference: TimeChanged | AnnealedLangevin,
        *,
        condition: Any = None,
        pilot: Pilot | None = None,
        floor: float = -FLOOR_DEPTH,
        reward_batch_size: int | None = None,
    ) -> None:
        self.density, self.log_density, self.score = density, density.function, density.score
        self.dim, self.kind = reference.event_shape[0], reference.kind
        self.centre, self.scale = reference.centre, reference.scale
        self.pilot, self.floor = pilot, floor
        self.terminal_law = Gaussian(self.centre, self.scale.square())
        point = reference.kind == "brownian"
        super().__init__(
            reference,
            initial=Dirac(self.centre) if point else self.terminal_law,
            reward=GibbsReward(density, self.centre, self.scale, floor),
            alpha=1.0,
            start=None if point else "memoryless",
            condition=condition,
            reward_batch_size=reward_batch_size,
        )

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
        return [*super().modules(), *self.density.modules()]

    def reward(self, x: Samples, condition: Any = None) -> PerPath:
        try:
            return super().reward(x, condition)
        except NonFiniteError as error:
            raise _bad_values(error.rows or 0, x) from None

    def __repr__(self) -> str:
        low, high = float(self.scale.min()), float(self.scale.max())
        width = f"{low:.3g}" if low == high else f"{low:.3g}..{high:.3g}"
        return f"GibbsProblem({self.density.__name__}, dim={self.dim}, reference={self.kind!r}, scale={width})"


@full_precision()
def gibbs_problem(
    log_density: Callable[..., Tensor],
    dim: int,
    reference: str = "ou",
    scale: float | Sequence[float] | Tensor | None = None,
    centre: float | Sequence[float] | Tensor | None = None,
    *,
    score: Callable[..., Tensor] | None = None,
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

    Args:
        log_density: ``(batch, dim) -> (batch,)``; ``(x, y)`` with a condition. Unnormalised; -inf where the density is
            0 (a hard constraint) is allowed: there the reward is that of the highest log density met while the problem
            was made less 1e4, without a gradient. NaN and +inf are errors. A function without a gradient is allowed.
        reference: "ou": the stationary Ornstein-Uhlenbeck process with law ``N(centre, scale^2)``, from 0 to a
            memoryless end (correlation 0.005); "brownian": Brownian motion from ``centre`` to ``N(centre, scale^2)``.
            Both on a clock that slows down towards the end. "annealed": annealed Langevin dynamics from
            ``N(centre, scale^2)`` along ``p0^(1-beta) rho^beta``, with the backward kernels of CMCD
            (:class:`AnnealedLangevin <sdecontrol.processes.annealed.AnnealedLangevin>`; needs a gradient). Its
            reference alone is annealed importance sampling. Losses of whole weights and SMC take it.
        scale: the reference's standard deviation: a number or ``(dim,)``, wide enough to cover the target. None: found
            by a pilot run of about 3e4 evaluations (:mod:`sdecontrol.problems.pilot`), on the wide side ("annealed"
            makes it in any case, for its step sizes).
        centre: a number or ``(dim,)``. None: by the pilot run, or 0 where the scale is given.
        score: ``grad log_density`` in x, ``(batch, dim) -> (batch, dim)``, where you have a cheaper or safer one than
            autograd's.
        condition: what y is drawn from, as in :class:`ControlProblem`: one control then samples all of
            ``exp(log_density(., y)) / Z(y)``, and the reference covers their union.
        horizon: end time; a mere unit, since the clock's total is fixed.
        resolution: the finest detail of the target, as a fraction of the scale: how far the clock slows down.
        backward_control: "annealed": whether the control has its part in the backward kernels (CMCD), or they are plain
            Langevin steps.
        seed: of the pilot run and the checks; None draws one from torch's global generator.
        dtype, device: of the states. Default: those of ``centre`` or ``scale`` where they are tensors, else torch's
            dtype (float64 where float32 numbers at the target are too far apart for its width, and the density
            takes them), on the CPU.
        reward_batch_size: call the density on at most so many states at once while solving.

    Raises:
        TypeError, ValueError: naming the argument, what was wrong with it, and what to do.
        NonFiniteError: the density is NaN or +inf where the reference ends.
        ImproperTarget: the integral looks infinite.

    Warns:
        UserWarning: the density vanishes in nearly all of the reference's end; or, where the scale was given, it looks
            improper.
    """
    arguments = {**locals(), "dtype": torch.float64}
    check_recording("gibbs_problem(...)")
    density = LogDensity(log_density, score)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, the dimension of the states; got {dim!r}.")
    if dim < 1:
        raise ValueError(f"dim must be >= 1, got {dim}.")
    check_name("reference", reference, REFERENCES)
    annealed = reference == "annealed"
    if not backward_control and not annealed:
        raise ValueError(
            f"backward_control goes with reference='annealed' and only with it; got reference={reference!r}."
        )
    given = [v for v in (centre, scale) if isinstance(v, Tensor) and v.is_floating_point()]
    finer = dtype is None and not given and torch.get_default_dtype() != torch.float64
    dtype = at_least_single(dtype or (given[0].dtype if given else torch.get_default_dtype()))
    device = torch.device(device) if device is not None else given[0].device if given else torch.device("cpu")
    middle = _vector("centre", 0.0 if centre is None else centre, dim, dtype, device).expand(dim).contiguous()
    width = None if scale is None else _vector("scale", scale, dim, dtype, device, positive=True)
    seed = fresh_seed(seed)
    conditions = functools.partial(draw_conditions, condition)
    with evaluating(density.modules()):
        x = _states_to_try(middle, width, seed)
        rows = len(x)
        with probing("condition", "condition(n)"):
            y = conditions(rows, derive_seed(seed, Place.GIBBS_PROBE_CONDITION))
        if condition is not None and (not isinstance(y, Tensor) or y.ndim < 1 or y.shape[0] != rows):
            raise ValueError("condition must draw a tensor (n, ...) of n conditions.")
        density.probe(x, y)
        if annealed and not density.differentiable:
            raise NotDifferentiable(
                "reference='annealed' moves by the gradient of log_density, which has none (it returned a tensor "
                "without a graph). Pass score=, write it in torch operations, or use reference='ou'."
            )
        pilot, roughness = None, 1.0
        if width is None or annealed:
            finer = finer and density.takes(x.double(), y)
            pilot = _located(
                density, middle, centre is not None, conditions, derive_seed(seed, Place.GIBBS_PILOT), finer
            )
            if pilot is None:
                return gibbs_problem(**arguments)
            if width is None:
                middle, width = pilot.centre, pilot.scale
            roughness = pilot.roughness * float((width.double() / pilot.scale.double()).log().mean().exp())
        highest = _check_end(density, middle, width, conditions, seed, pilot)
    if annealed:
        process = AnnealedLangevin(
            density.gradient, middle, width, roughness, horizon, backward_control=backward_control
        )
    else:
        process = TimeChanged(reference, middle, width, horizon, resolution)
    return GibbsProblem(
        density,
        process,
        condition=condition,
        pilot=pilot,
        floor=highest - FLOOR_DEPTH,
        reward_batch_size=reward_batch_size,
    )


def _states_to_try(centre: Tensor, scale: Tensor | None, seed: int) -> Tensor:
    """A few states to call the density on, ``(rows, dim)``, their number different from the dimension."""
    dim = len(centre)
    rows = next(n for n in range(6, 64) if n != dim)
    z = torch.randn(rows, dim, generator=generator_for("cpu", seed, Place.GIBBS_PROBE), dtype=torch.float64)
    return centre + (1.0 if scale is None else scale) * z.to(centre)


def _located(
    density: LogDensity,
    guess: Tensor,
    keep_centre: bool,
    conditions: Callable[[int, int], Any],
    seed: int,
    finer: bool,
) -> Pilot | None:
    """The pilot run; None where its states may be finer, and it shows that they must be: numbers at the target are too
    far apart for its width."""
    try:
        pilot = run_pilot(density, guess, keep_centre, conditions, seed)
    except ImproperTarget:
        if not finer:
            raise
        return None
    coarse = torch.finfo(guess.dtype).eps * pilot.centre.abs() > _SPACING * pilot.scale
    return None if finer and bool(coarse.any()) else pilot


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
        NonFiniteError, ValueError, ImproperTarget: see :func:`gibbs_problem`.
    """
    x = draw(Gaussian(centre, scale.square()), _CHECKED, derive_seed(seed, Place.GIBBS_END))
    y = conditions(_CHECKED, derive_seed(seed, Place.GIBBS_END_CONDITION))
    values = density.value(x, y)
    bad = int((values.isnan() | (values == math.inf)).sum())
    if bad:
        raise _bad_values(bad, x)
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
            check_rays(density, x[best], scale, None if y is None else y[best], seed)
        except ImproperTarget as error:
            warn(f"improper target? {error}", UserWarning, stacklevel=3)
    return max(float(values.max()), -math.inf if pilot is None else pilot.highest)


def _bad_values(rows: int, x: Tensor) -> NonFiniteError:
    return NonFiniteError(
        f"log_density is NaN or +inf in {rows} of {len(x)} rows (largest |x|: {float(x.detach().abs().max()):.3g}). It "
        "must be a number wherever the process can go; where the density is 0, return -inf (e.g. torch.where(x > 0, "
        "x.clamp(min=1e-30).log(), -math.inf)).",
        what="log_density",
        rows=rows,
    )
