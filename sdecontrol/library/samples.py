"""``reference_samples``: samples to hold a sampler against, for targets with an exact sampler and without."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadFileError, warn
from ..evaluation.estimates import Estimate, log_mean_weight, mean_estimate
from ..evaluation.tempered_solution import TemperedSettings, tempered_target
from ..files.bundles import register_bundle
from ..particles.ascent import adapt
from ..particles.smc import resample
from ..particles.tempering import Kernel, StateTarget, points_at, run_tempered
from ..problems.gibbs import gibbs_problem
from ..randomness import Place, derive_seed, fresh_seed, generator_for
from ..tensors import check_count, check_tensor
from .cache import read_cached, write_cached
from .target_base import Target
from .targets import named_target

RECIPE = 2  # raised whenever the way samples are made changes: older caches are then passed over
_KIND = register_bundle("reference samples")
_FEW = 0.5  # of the systems: fewer effective ones, and they do not agree


@dataclass(frozen=True)
class ReferenceSamples:
    """What :func:`reference_samples` returns; prints as a table.

    Attributes:
        x: ``(n, dim)``, all of the same weight, in random order.
        log_z: of the density.
        log_density: mean of the log density over these samples. mean: of each coordinate, ``(dim,)``, with
            ``mean_stderr``. All errors are over independent systems (over draws, where they are exact): what two of
            them share by accident they cannot see.
        exact: whether an exact sampler made them.
        spread: standard deviation of log Z^ between systems; 0 where samples are exact.
        effective_systems: ``(sum Z^)^2 / sum Z^^2``, systems that the samples come from in effect. systems: in all (0
            where samples are exact).
        evaluations: of the log density that they cost when they were made.
        cached: whether they come from the cache.
    """

    x: Tensor
    log_z: Estimate
    log_density: Estimate
    mean: Tensor
    mean_stderr: Tensor
    exact: bool
    spread: float
    effective_systems: float
    systems: int
    evaluations: int
    cached: bool

    @property
    def agree(self) -> bool:
        """Whether the systems agree: at least half of them count in effect (always, where samples are exact)."""
        return self.exact or self.effective_systems >= _FEW * self.systems

    @property
    def source(self) -> str:
        """Where the samples come from, in words."""
        if self.exact:
            return "exact sampler"
        return f"{self.systems} systems of tempered particles, {self.effective_systems:.1f} effective"

    def __str__(self) -> str:
        worst = int(self.mean_stderr.argmax())
        rows = [
            ("samples", str(len(self.x)), self.source),
            ("log Z", str(self.log_z), "" if self.exact else f"log Z^ varies by {self.spread:.2g} between systems"),
            ("log density", str(self.log_density), "mean, error over independent systems"),
            (
                f"mean of x{worst + 1}",
                str(Estimate(float(self.mean[worst]), float(self.mean_stderr[worst]))),
                "the coordinate of the largest error",
            ),
        ]
        width = max(len(r[1]) for r in rows)
        lines = [f"{name:<13} {value:<{width}}  {what}".rstrip() for name, value, what in rows]
        return "\n".join(lines if self.agree else [*lines, "the systems do not agree: do not take these as the truth"])


def reference_samples(
    target: str | Target,
    n: int = 10_000,
    seed: int = 0,
    *,
    systems: int = 16,
    particles: int = 1024,
    moves: int = 24,
    cache: bool = True,
) -> ReferenceSamples:
    """Samples of a named target: exact draws where it has them, else the ends of long tempered runs, with an error.

    Without an exact sampler, ``systems`` independent systems of ``particles`` are tempered from a wide Gaussian to the
    target on one ladder (:class:`TemperedSMC`), n of all particles are drawn, each system in proportion to its ``Z^``,
    and each of these goes on for ``moves`` Hamiltonian moves at the target, in which copies part. Nothing is
    downloaded. It takes minutes for the larger targets, once: the result is kept in the cache folder
    ($SDECONTROL_CACHE, else ~/.cache/sdecontrol) under the target's name and version and all settings, and a damaged
    file is reported and made again.

    Args:
        target: a name, or a :class:`Target` (one that is not in the library is not cached).
        seed: the same seed gives the same samples.
        cache: False: neither read nor write it.

    Raises:
        ValueError: an unknown name, or numbers too small to tell an error from.

    Warns:
        RuntimeWarning: the systems do not agree (fewer than half count in effect); or a damaged cache.
    """
    target = named_target(target) if isinstance(target, str) else target
    if not isinstance(target, Target):
        raise TypeError(f"target must be a name or a Target, got {type(target).__name__}.")
    for name, value, least in (("n", n, 2), ("systems", systems, 4), ("particles", particles, 16), ("moves", moves, 0)):
        check_count(name, value, least)
    seed = fresh_seed(seed)
    if target.has_samples:
        return _exact(target, n, seed)
    settings = {
        "target": target.name,
        "version": target.version,
        "recipe": RECIPE,
        "n": n,
        "seed": seed,
        "systems": systems,
        "particles": particles,
        "moves": moves,
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }
    name = "-".join(str(value) for value in settings.values())
    keep = cache and bool(target.name)
    found = _read(name, settings, target.dim) if keep else None
    if found is None:
        tensors, facts = make_samples(target, n, seed, systems, particles, moves)
        if keep:
            write_cached(name, _KIND, tensors, {**settings, **facts})
        found = _result(tensors, facts, systems, cached=False)
    if not found.agree:
        warn(
            f"reference_samples: {found.source}: the systems do not agree on log Z (they vary by {found.spread:.2g}). "
            "Use more particles.",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


@torch.no_grad()
def _exact(target: Target, n: int, seed: int) -> ReferenceSamples:
    x = target.sample(n, seed)
    log_z = Estimate(math.nan) if target.log_z is None else Estimate(target.log_z, 0.0)
    error = x.double().std(0) / math.sqrt(n)
    return ReferenceSamples(
        x, log_z, mean_estimate(target(x)), x.double().mean(0), error, True, 0.0, math.nan, 0, 0, False
    )


def make_samples(
    target: Target, n: int, seed: int, systems: int, particles: int, moves: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Samples, the systems that they come from, and log Z^ of each system."""
    problem = gibbs_problem(target, target.dim, seed=derive_seed(seed, Place.REFERENCE_PROBLEM))
    tempered = tempered_target(problem, problem.chain(), None, TemperedSettings("states", problem.has_gradient))
    assert isinstance(tempered, StateTarget)
    with torch.no_grad():
        ladder, chosen = adapt(tempered, particles, derive_seed(seed, Place.REFERENCE_LADDER))
        found = run_tempered(tempered, ladder, systems, particles, derive_seed(seed, Place.REFERENCE_PARTICLES))
        generator = generator_for(problem.device, seed, Place.REFERENCE_MOVES)
        log_w = (found.log_weights + found.log_z.unsqueeze(1)).flatten()
        rows = resample(log_w.unsqueeze(0), n, "systematic", generator)[0]
        rows = rows[torch.randperm(n, generator=generator, device=rows.device)]
        p = points_at(tempered, found.z.flatten(0, 1)[rows], tempered.draw_origin(n, seed))
        kernel = Kernel(1.0, ladder.centres[-1], ladder.factors[-1], int(ladder.leapfrog_steps[-1]))
        for _ in range(moves):
            p, _ = kernel.move(tempered, p, float(ladder.angles[-1]), generator)
        x = tempered.states(p.z)
        tensors = {"x": x, "system": rows // particles, "log_z": found.log_z, "log_density": target(x).double()}
    assert problem.pilot is not None
    work = problem.pilot.values + chosen.evaluations + found.evaluations + n * (1 + moves * kernel.leapfrog_steps)
    return tensors, {"evaluations": work}


def _result(tensors: dict[str, Tensor], facts: dict[str, Any], systems: int, cached: bool) -> ReferenceSamples:
    x, log_z = tensors["x"], tensors["log_z"]
    values = torch.cat((x.double(), tensors["log_density"].unsqueeze(1)), 1)
    mean, error = over_systems(values, tensors["system"], systems)
    return ReferenceSamples(
        x=x,
        log_z=log_mean_weight(log_z),
        log_density=Estimate(float(mean[-1]), float(error[-1])),
        mean=mean[:-1],
        mean_stderr=error[:-1],
        exact=False,
        spread=float(log_z.std()),
        effective_systems=1 / float(log_z.softmax(0).square().sum()),
        systems=systems,
        evaluations=int(facts["evaluations"]),
        cached=cached,
    )


def over_systems(values: Tensor, system: Tensor, systems: int) -> tuple[Tensor, Tensor]:
    """Means of ``(n, k)`` values and their errors over the systems that they come from: of a ratio of sums over systems
    (delta method)."""
    mean = values.mean(0)
    beyond = values.new_zeros(systems, values.shape[1]).index_add(0, system, values - mean)
    return mean, (beyond.square().sum(0) * (systems / (systems - 1))).sqrt() / len(values)


def _read(name: str, settings: dict[str, Any], dim: int) -> ReferenceSamples | None:
    """From the cache; None where there is nothing, or nothing whole (which is reported)."""
    cached = read_cached(name, _KIND)
    if cached is None:
        return None
    tensors, saved = cached
    n, systems = settings["n"], settings["systems"]
    shapes = {"x": (n, dim), "system": (n,), "log_z": (systems,), "log_density": (n,)}
    try:
        for key, value in settings.items():
            if saved.get(key) != value:
                raise BadFileError(f"{name}: {key} is {saved.get(key)!r}, wanted {value!r}.")
        for key, shape in shapes.items():
            if key not in tensors or tensors[key].shape != shape:
                raise BadFileError(f"{name}: {key} must have shape {shape}.")
            check_tensor(key, tensors[key].double())
        if tensors["x"].dtype != torch.get_default_dtype():
            raise BadFileError(f"{name}: x is {tensors['x'].dtype}.")
        if not bool(((tensors["system"] >= 0) & (tensors["system"] < systems)).all()):
            raise BadFileError(f"{name}: system is not among the {systems}.")
        return _result(tensors, saved, systems, cached=True)
    except (ValueError, TypeError, KeyError) as error:
        warn(f"the cache is damaged and will be made again: {error}", RuntimeWarning, stacklevel=3)
        return None
