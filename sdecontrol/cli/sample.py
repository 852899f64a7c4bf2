"""``sdecontrol sample``: an unnormalised density, named or a user's own function."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    FIGURES,
    DebugOption,
    JsonOption,
    SaveOption,
    SeedOption,
    check_file,
    given,
    handles_errors,
    note,
    print_json,
    print_text,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation.certificates import Certificate
    from ..evaluation.evaluate import Evaluation
    from ..evaluation.solution import Solution
    from ..library.target_base import Target

_FILES = (".npy", ".pt", ".safetensors")
_DENSE = 20_000  # exact samples of the figure
_MOST_RANKED = 100_000  # samples of quantiles
_MOST_NOISES = 1000  # of a path, up to which a certificate without exact samples is made unasked


@handles_errors
def sample(
    target: Annotated[
        str,
        typer.Argument(metavar="NAME|module:function", help="A named target, or a log density of your own."),
    ],
    dim: Annotated[
        int | None, typer.Option(min=1, help="Dimension of the states; needed for a function of your own.")
    ] = None,
    names: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Names of the parameters of a function of your own.")
    ] = None,
    support: Annotated[
        str | None,
        typer.Option(
            metavar="S,S,...",
            help="Where each lives: low:high, with an open end left out (0:), or real, positive, unit_interval; one "
            "for all, or one for each.",
        ),
    ] = None,
    one_point: Annotated[
        bool, typer.Option("--one-point", help="Your function takes one point, (dim,), and gives a number.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that call it at once; with --one-point.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="The method.", show_default="recommend's first: auto")] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Stop solving there: 60s, 5m; of auto the estimate is within it, too."),
    ] = None,
    evaluations: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the log density at most, for auto and adaptive-importance.", show_default="no bound"
        ),
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Exactly so many, or rounds of auto.", show_default="the method's")
    ] = None,
    time_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the chain that a control steers.", show_default="100")
    ] = None,
    reference: Annotated[str, typer.Option(help="ou, brownian or annealed.")] = "ou",
    scale: Annotated[
        float | None, typer.Option(help="Standard deviation of the reference's end.", show_default="from a pilot run")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=64, help="Samples drawn, and paths of the evaluation.")] = 4096,
    samples: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write samples and log weights: .npy (two files), .pt or .safetensors."),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write a figure: samples, marginals, bounds of log Z.")
    ] = None,
    save: SaveOption = None,
    certificate: Annotated[
        bool | None,
        typer.Option(
            "--certificate/--no-certificate",
            help="Bound log Z from both sides by paths of the control.",
            show_default="where it is cheap",
        ),
    ] = None,
    reference_samples: Annotated[
        bool,
        typer.Option(
            "--reference-samples",
            help="For a named target without an exact sampler: compare with long tempered runs (minutes, once; then "
            "cached).",
        ),
    ] = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Sample an unnormalised density, estimate its normalising constant, and hold both against what is known exactly.

    Named targets: gmm9, gmm40-2d, gmm40-50d, funnel, many-well-5,
    many-well-32, many-well-50, dw-4, lj-13, logistic-regression, phi4-8. Or a function module:function of your own,
    (batch, dim) -> (batch,), the log density up to a constant, of torch's tensors or numpy's arrays, in a module in
    this folder or importable (its code runs); or a gibbs_problem that your module has made, with priors and all.

    Samples are in your own parameters; --figure is a corner plot where they have names or bounds.

    Log weights of samples are towards the density: the mean of their exponentials estimates Z. A .npy file holds the
    samples, and a second one beside it, FILE-log-weights.npy, their log weights.

    Example: [bold]sdecontrol sample gmm9 --figure gmm9.png[/bold]

    Example: [bold]sdecontrol sample funnel --method particle-matching --budget 60s[/bold]

    Example: [bold]sdecontrol sample my_model:log_density --dim 10 --samples draws.npy[/bold]

    Example: [bold]sdecontrol sample my_model:log_density --names a,b --support 0:,0:1[/bold]
    """
    from ..problems.gibbs import gibbs_problem
    from ..training import solve as training

    check_file("--figure", figure, FIGURES)
    check_file("--samples", samples, _FILES)
    density, known, dim, name = _density(target, dim, names is not None or support is not None)
    stated = _stated(names, support, one_point, workers)
    if reference_samples and known is None:
        raise ValueError("--reference-samples: only for named targets; a function of your own has no long runs.")
    began = time.monotonic()
    how = {"reference": reference, "scale": scale, "seed": seed}
    problem = density if _is_made(density) else gibbs_problem(density, dim, **how, **stated)
    if (stated and known is not None) or (_is_made(density) and (stated or scale is not None)):
        raise ValueError("--names, --support, --one-point, --workers and --scale: for a log density of your own.")
    chosen = method if evaluations is None else _within(method, evaluations)
    settings: dict[str, Any] = {"method": chosen, "seed": seed, "time_steps": time_steps}
    settings.update(given(iterations=iterations, budget=budget))
    solution = training.solve(problem, progress=True, **settings)
    seconds, spent = time.monotonic() - began, problem.density.evaluations
    found = _judge(solution, known, n, seed, certificate, reference_samples)
    total = {"seconds": time.monotonic() - began, "evaluations": problem.density.evaluations}
    if samples is not None:
        x, log_w = found.weighted
        _write(samples, problem.parameters.flat(x), log_w)
    if figure is not None:
        found.figure(f"{name}: {solution.method}", seed).savefig(figure, facecolor="white")
    if save is not None:
        solution.save(save)
    files = {"samples": samples, "figure": figure, "saved": save}
    if as_json:
        print_json(
            {
                "target": name,
                "version": None if known is None else known.version,
                "dim": problem.dim,
                "settings": {
                    **settings,
                    "method": solution.method,
                    "evaluations": evaluations,
                    "reference": problem.kind,
                    "scale": scale,
                },
                "reason": solution.details.get("reason"),
                "iterations": solution.iterations,
                "reproducible": solution.reproducible,
                "seconds": seconds,
                "evaluations": spent,
                "with_evaluation": total,
                **found.as_dict(),
                **{key: None if path is None else str(path) for key, path in files.items()},
            }
        )
        return
    print(f"{name}, d = {problem.dim}, {solution.method}, {solution.iterations} iterations, {seconds:.1f} s")
    print(f"{spent} evaluations of the log density, {total['evaluations']} with those of what follows\n")
    found.show()
    for what, path in files.items():
        if path is not None:
            note(f"{what} in {path}" if what != "saved" else f"saved in {path}")


@dataclass(frozen=True)
class _Judged:
    """A solution, what is known of the target, and what holds the one against the other.

    Attributes:
        weighted: samples and their log weights. own: the sampler's samples, all of the same weight.
        exact: samples to compare with, or None. why_not: there is no certificate.
    """

    solution: Solution
    known: Target | None
    evaluation: Evaluation
    weighted: tuple[Tensor, Tensor]
    own: Tensor
    exact: Any
    certificate: Certificate | None
    why_not: str
    distances: dict[str, Any]

    @property
    def log_z(self) -> float | None:
        return None if self.known is None else self.known.log_z

    @property
    def deviation(self) -> dict[str, float] | None:
        found, log_z = self.evaluation.log_z, self.log_z
        if log_z is None:
            return None
        return {"nats": found.value - log_z, "standard_errors": (found.value - log_z) / found.stderr}

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        """Moments and quantiles of each number of the parameters, by the sampler's samples."""
        import torch

        parameters: Any = self.solution.problem.parameters  # type: ignore[attr-defined]
        x = parameters.flat(self.own).double()
        low, middle, high = torch.quantile(x[:_MOST_RANKED], torch.tensor([0.05, 0.5, 0.95], dtype=x.dtype), dim=0)
        columns = {"mean": x.mean(0), "sd": x.std(0), "5%": low, "50%": middle, "95%": high}
        return {
            label: {name: float(values[i]) for name, values in columns.items()}
            for i, label in enumerate(parameters.labels)
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            "report": self.solution.details.get("report"),
            "parameters": self.summary,
            "evaluation": self.evaluation.as_dict(),
            "exact_log_z": self.log_z,
            "deviation": self.deviation,
            "distances": self.distances or None,
            "certificate": None if self.certificate is None else self.certificate.as_dict(),
        }

    def figure(self, title: str, seed: int) -> Any:
        from ..evaluation.sample_figure import sample_figure
        from ..randomness import Place, derive_seed

        if not _unnamed(self.solution.problem):
            figure = self.solution.plot_corner(len(self.own), derive_seed(seed, Place.SAMPLE_CORNER))[0]
            figure.suptitle(title, fontsize=10)
            return figure
        exact, name = None if self.exact is None else self.exact.x, "long tempered runs"
        if self.known is not None and self.known.has_samples:
            exact, name = self.known.sample(_DENSE, derive_seed(seed, Place.SAMPLE_FIGURE)), "exact samples"
        more: dict[str, Any] = {"evaluation": self.evaluation, "certificate": self.certificate, "title": title}
        return sample_figure(self.solution, self.own, exact=exact, exact_name=name, log_z=self.log_z, **more)[0]

    def show(self) -> None:
        """Print it."""
        report = self.solution.details.get("report")
        if report is not None:
            print(f"{report}\n")
        print_text(str(self.evaluation))
        off, distances = self.deviation, self.distances
        exact = self.exact
        known = "not known"
        if off is not None:
            known = f"{self.log_z:.6g}; found {off['nats']:+.3g} from it, {off['standard_errors']:+.1f} standard errors"
        print(f"\nexact log Z   {known}")
        if exact is not None and not exact.exact:
            print(f"long runs     {exact.log_z}  log Z by {exact.source}")
        for key, title in (("sliced_wasserstein", "sliced W1"), ("energy_wasserstein", "energy W1")):
            if exact is not None and (d := distances.get(key)) is not None:
                floor = "two sets of exact samples" if exact.exact else "the halves of the long runs"
                print(f"{title:<13} {d['value']:.4g}  to the {distances['reference']}; {floor}: {d['floor']:.4g}")
        if (modes := distances.get("modes")) is not None:
            print(f"modes         {modes['hit']} of {modes['of']} hit (a tenth of their share or more)")
        if (left := distances.get("left_share")) is not None:
            shares = f"{left['smallest']:.3f} to {left['largest']:.3f} of the samples; exact {left['true']:.3f}"
            print(f"left of wells {shares}")
        if self.known is not None and exact is None and self.known.name:
            print("reference     no exact sampler; --reference-samples compares with long tempered runs")
        if not _unnamed(self.solution.problem):
            width = max(len(label) for label in self.summary)
            print(f"\n{'':<{width}}  {'mean':>10} {'sd':>10} {'5%':>10} {'50%':>10} {'95%':>10}")
            for label, row in self.summary.items():
                print(f"{label:<{width}}  " + " ".join(f"{value:>10.4g}" for value in row.values()))
        if self.certificate is not None:
            of = "the control's paths" if _particles(self.solution) else "the sampler's paths"
            print(f"\ncertificate of {of}\n{self.certificate}")
        elif self.why_not:
            print(f"\nno certificate: {self.why_not}")


def _judge(
    solution: Solution, known: Target | None, n: int, seed: int, certificate: bool | None, long_runs: bool
) -> _Judged:
    from ..randomness import Place, derive_seed

    note("evaluating ...")
    evaluation = solution.evaluate(n, seed=derive_seed(seed, Place.SAMPLE_EVALUATION))
    x, log_w = solution.weighted_sample(n, seed=derive_seed(seed, Place.SAMPLE_WEIGHTED), raw=True)
    exact = _reference(known, n, seed, long_runs)
    certified, why_not = _certificate(solution, known, n, seed, certificate)
    own = _drawn(solution, x, log_w, seed)
    distances = {} if known is None else _distances(known, exact, own, n, seed)
    return _Judged(solution, known, evaluation, (x, log_w), own, exact, certified, why_not, distances)


def _within(method: str | None, evaluations: int) -> Any:
    """The method with so many evaluations."""
    from dataclasses import replace

    from ..methods.base import find_method

    chosen: Any = find_method(method or "auto")
    if not hasattr(chosen, "evaluations"):
        raise ValueError(f"--evaluations: {chosen.name} has no such setting; auto and adaptive-importance have.")
    return replace(chosen, evaluations=evaluations)


def _stated(names: str | None, support: str | None, one_point: bool, workers: int | None) -> dict[str, Any]:
    """What the options say of a function's parameters, as arguments of gibbs_problem."""
    found: dict[str, Any] = {"vectorised": False} if one_point else {}
    if workers is not None:
        found["workers"] = workers
    if names is not None:
        found["names"] = [name.strip() for name in names.split(",")]
    if support is not None:
        each = [_support(part.strip()) for part in support.split(",")]
        found["support"] = each if len(each) > 1 or names is not None else each[0]
        if len(each) == 1 and names is not None:
            found["support"] = each * len(found["names"])
    return found


def _support(text: str) -> Any:
    if ":" not in text:
        return text
    try:
        low, high = (float(end) if end.strip() else None for end in text.split(":"))
    except ValueError:
        raise ValueError(f"--support: {text!r} is no low:high; an open end is left out, as in 0: .") from None
    return low, high


def _is_made(found: Any) -> bool:
    """Whether it is a whole problem, and no function."""
    from ..problems.gibbs import GibbsProblem

    return isinstance(found, GibbsProblem)


def _density(text: str, dim: int | None, stated: bool) -> tuple[Any, Target | None, int | None, str]:
    """The log density (or a whole problem), the target if it is one, its dimension and name; of a function whose
    parameters are ``stated`` otherwise the dimension may be missing."""
    from ..library.target_base import Target
    from ..library.targets import named_target
    from .objects import import_object

    if ":" not in text:
        found: Any = named_target(text)
    else:
        try:
            found = import_object(text, Path.cwd())
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from error
    if _is_made(found):
        if dim is not None:
            raise ValueError(f"--dim: {text} has been made already, with {found.dim} coordinates; leave it out.")
        return found, None, None, text
    if not isinstance(found, Target):
        if not callable(found):
            raise TypeError(f"{text} is a {type(found).__name__}, not a log density x -> (batch,).")
        if dim is None and not stated:
            raise ValueError(f"--dim is missing: the dimension of the states of {text}, e.g. --dim 2.")
        return found, None, dim, text
    if dim is not None and dim != found.dim:
        raise ValueError(f"--dim: {text} has dimension {found.dim}, not {dim}; leave it out.")
    return found, found, found.dim, found.name or text


def _unnamed(problem: Any) -> bool:
    """Whether its parameters are plain numbers without names of their own."""
    return problem.parameters.identity and problem.parameters.labels[0] == "x[0]"


def _particles(solution: Solution) -> bool:
    """Whether samples are particles or chains at the density, and no ends of the control's paths."""
    from ..evaluation.solution import Solution as Plain

    return type(solution) is not Plain


def _drawn(solution: Solution, x: Tensor, log_w: Tensor, seed: int) -> Tensor:
    """The sampler's samples, all of the same weight: particles are drawn by theirs, the ends of paths are what they
    are."""
    from ..particles.smc import resample
    from ..randomness import Place, generator_for

    if not _particles(solution):
        return x
    generator = generator_for(log_w.device, seed, Place.SAMPLE_DRAWN)
    return x[resample(log_w.unsqueeze(0), len(x), "systematic", generator)[0]]


def _reference(known: Target | None, n: int, seed: int, long_runs: bool) -> Any:
    """Samples to compare with, or None."""
    from ..library.samples import reference_samples
    from ..randomness import Place, derive_seed

    if known is None or not (known.has_samples or long_runs):
        return None
    if not known.has_samples:
        note("reference samples: from the cache, or made now by long tempered runs (minutes, once) ...")
        return reference_samples(known)
    return reference_samples(known, n, derive_seed(seed, Place.SAMPLE_EXACT))


def _certificate(
    solution: Solution, known: Target | None, n: int, seed: int, wanted: bool | None
) -> tuple[Certificate | None, str]:
    """The certificate, or why there is none."""
    from ..controls.given import ZeroControl
    from ..evaluation.certificates import certify
    from ..randomness import Place, derive_seed

    if wanted is False:
        return None, ""
    exact = known is not None and known.has_samples
    if isinstance(solution.control, ZeroControl):
        if wanted:
            raise ValueError(f"--certificate: {solution.method} has learned no control whose paths it could weigh.")
        return None, f"{solution.method} has no control here whose paths it could weigh"
    noises = solution.chain.steps * math.prod(solution.chain.noise_shape)
    if wanted is None and not exact and noises > _MOST_NOISES:
        return None, f"without exact samples it needs particles in {noises} dimensions; --certificate makes one"
    note("certificate ...")
    place = derive_seed(seed, Place.SAMPLE_CERTIFICATE_EXACT)
    samples = known.sample(n, place) if known is not None and exact else None
    modes = None if known is None or known.modes is None else known.modes.to(solution.problem.dtype)
    return certify(solution, samples, modes=modes, n=n, seed=derive_seed(seed, Place.SAMPLE_CERTIFICATE)), ""


def _distances(known: Target, exact: Any, x: Tensor, n: int, seed: int) -> dict[str, Any]:
    """From the samples to those of the reference, and what two sets of exact samples score; the modes that are
    covered."""
    from ..evaluation.metrics import energy_wasserstein, mode_coverage, sliced_wasserstein
    from ..randomness import Place, derive_seed

    out: dict[str, Any] = {}
    if exact is not None:
        place = derive_seed(seed, Place.SAMPLE_FLOOR)
        other = known.sample(n, place) if known.has_samples else exact.x[len(exact.x) // 2 :]
        truth = exact.x if known.has_samples else exact.x[: len(exact.x) // 2]
        out["reference"] = exact.source
        for name, distance in (
            ("sliced_wasserstein", sliced_wasserstein),
            ("energy_wasserstein", lambda a, b: energy_wasserstein(a, b, known)),
        ):
            out[name] = {"value": distance(x, truth), "floor": distance(other, truth)}
    if known.modes is not None:
        covered = mode_coverage(x, known.modes)
        out["modes"] = {"hit": covered.hit, "of": len(covered.shares), "missed": covered.missed}
    if hasattr(known, "left_shares"):
        shares: Tensor = known.left_shares(x)  # type: ignore[attr-defined]
        out["left_share"] = {
            "true": float(known.left_share),  # type: ignore[attr-defined]
            "smallest": float(shares.min()),
            "largest": float(shares.max()),
        }
    return out


def _write(path: Path, x: Tensor, log_w: Tensor) -> None:
    tensors = {"samples": x.detach().cpu().contiguous(), "log_weights": log_w.detach().cpu().contiguous()}
    if path.suffix.lower() == ".npy":
        import numpy as np

        np.save(path, tensors["samples"].numpy())
        np.save(path.with_name(f"{path.stem}-log-weights.npy"), tensors["log_weights"].numpy())
    elif path.suffix.lower() == ".pt":
        import torch

        torch.save(tensors, path)
    else:
        from safetensors.torch import save_file

        save_file(tensors, path)
