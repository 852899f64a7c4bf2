"""The work of ``sdecontrol demo``: models, tuning, evaluation, and the exactly tilted law by importance sampling."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import (
    VP,
    ControlProblem,
    LogProb,
    ValueGuidance,
    distill,
    fit_score,
    generative_sde,
    solve,
)
from ..chains.base import Chain
from ..errors import BadFileError
from ..evaluation.estimates import Estimate, effective_sample_size, log_mean_weight, mean_estimate, weighted_mean
from ..evaluation.evaluate import Evaluation, evaluate, log_weights
from ..evaluation.metrics import sliced_wasserstein
from ..evaluation.solution import Solution
from ..files.bundles import register_bundle
from ..files.contents import load_tensors, part_of, with_part
from ..library.cache import read_cached, write_cached
from ..library.digits import DIGIT_SHAPE, DigitClassifier, digits, fit_digit_classifier
from ..problems.simulate import simulate_chain
from ..randomness import Place, derive_seed, generator_for
from ..training.score_network import ScoreNetwork
from .common import note

RECIPE = 2  # raised whenever the models' training changes: older caches are then passed over
_KIND = register_bundle("demo models", "accuracy")
_TRAINED_ON = 1400  # digits that the classifier is trained on; the others test it
_CHUNK = 4096
_SHOWN = ("reward", "kl", "log_z", "ess", "gap")  # of an evaluation, in the table


@dataclass(frozen=True)
class DemoSettings:
    """How much work the demo does: the models' training; paths of the guidance's first fit and rounds after it;
    iterations of the distillation; steps; samples that are measured; untuned ones that give the exact tilt."""

    model_iterations: int
    classifier_iterations: int
    guidance_paths: int
    rounds: int | None
    iterations: int
    time_steps: int
    evaluation_paths: int
    tilt_paths: int


FULL = DemoSettings(6000, 1500, 16384, None, 1000, 40, 4096, 16384)
QUICK = DemoSettings(100, 100, 512, 2, 4, 10, 256, 1024)


@dataclass(frozen=True)
class DemoModels:
    """The pre-trained model, the classifier, its accuracy on digits it has not seen, and the seconds of training."""

    noise: nn.Module
    classifier: nn.Module
    accuracy: float
    seconds: float
    cached: bool


@dataclass(frozen=True)
class Tilt:
    """The exactly tilted law: samples of the untuned model with log weights towards it."""

    samples: Tensor
    log_w: Tensor
    reward: Estimate
    kl: Estimate
    log_z: Estimate
    ess: float
    share: Estimate
    seconds: float

    def resampled(self, n: int, seed: int) -> Tensor:
        """``(n, ...)`` samples of the tilted law."""
        generator = generator_for("cpu", seed, Place.DEMO_RESAMPLING)
        return self.samples[torch.multinomial(self.log_w.softmax(0), n, generator=generator)]


@dataclass(frozen=True)
class Sampler:
    """The untuned model, the guided one, or the one network that the guidance was distilled into.

    Attributes:
        share: of samples whose most probable class is the label.
        distance: sliced W1 of the samples to the exact tilt.
        cost: CPU time of a sample over that of the untuned model's.
    """

    samples: Tensor
    evaluation: Evaluation
    share: Estimate
    distance: float
    cost: float

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        more = {"share": asdict(self.share), "sliced_wasserstein": self.distance, "sampling_over_untuned": self.cost}
        return {**self.evaluation.as_dict(), **more}


@dataclass(frozen=True)
class DemoResult:
    """Everything that the table, the figure and the JSON file show."""

    label: int
    seed: int
    settings: DemoSettings
    models: DemoModels
    before: Sampler
    guided: Sampler
    network: Sampler
    tilt: Tilt
    tilted: Tensor
    floor: float
    history: list[dict[str, float]]
    seconds: dict[str, float]

    @property
    def samplers(self) -> tuple[Sampler, Sampler, Sampler]:
        """In the order of the table."""
        return self.before, self.guided, self.network

    def rows(self) -> list[tuple[str, ...]]:
        """The table's rows as text."""
        tilt, took = self.tilt, self.seconds
        of = {name: [str(getattr(s.evaluation, name)) for s in self.samplers] for name in _SHOWN}
        untuned_kl = ["0", *of["kl"][1:]]
        seconds = [_seconds(took[name]) for name in ("models", "guidance", "distillation")]
        return [
            ("reward", *of["reward"], str(tilt.reward)),
            ("KL to the pre-trained", *untuned_kl, str(tilt.kl)),
            ("log Z (estimated)", *of["log_z"], str(tilt.log_z)),
            ("ESS of the weights", *of["ess"], f"{tilt.ess:.3f}"),
            ("gap (estimated, nats)", *of["gap"], "0"),
            (f"classified as {self.label}", *(str(s.share) for s in self.samplers), str(tilt.share)),
            ("sliced W1 to the tilt", *(f"{s.distance:.4f}" for s in self.samplers), f"{self.floor:.4f}"),
            ("cost of a sample", *(f"{s.cost:.1f}" for s in self.samplers), "-"),
            ("time", *seconds, _seconds(tilt.seconds)),
        ]

    def notes(self) -> list[str]:
        """What the table's numbers are."""
        trained = "from the cache" if self.models.cached else f"trained in {self.seconds['models']:.0f} s"
        ends = self.network.evaluation
        return [
            f"Models {trained}; the classifier is right on {self.models.accuracy:.1%} of {1797 - _TRAINED_ON} digits "
            "it has not seen.",
            "Guided: the pre-trained model, guided by a value that was fitted to its own samples; one network: the "
            "same in one tuned copy of the model, which asks for no reward.",
            f"Exact tilt: {len(self.tilt.samples)} samples of the untuned model, importance weighted; its sliced W1 is "
            "the sampling floor, between two independent halves.",
            f"Gap = KL to the exactly tilted path law; of the one network {ends.verdict} ({ends.reliability}).",
            f"In all {self.seconds['total']:.0f} s.",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        tilt = self.tilt
        return {
            "label": self.label,
            "seed": self.seed,
            "settings": asdict(self.settings),
            "classifier_accuracy": self.models.accuracy,
            "models_cached": self.models.cached,
            "before": self.before.as_dict(),
            "guided": self.guided.as_dict(),
            "one_network": self.network.as_dict(),
            "exact_tilt": {
                "reward": asdict(tilt.reward),
                "kl": asdict(tilt.kl),
                "log_z": asdict(tilt.log_z),
                "ess": tilt.ess,
                "share": asdict(tilt.share),
                "sliced_wasserstein": self.floor,
                "n": len(tilt.samples),
            },
            "seconds": self.seconds,
            "history": self.history,
        }


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 1 else f"{value:.1f} s"


def run_demo(label: int, seed: int, settings: DemoSettings, threads: int = 1) -> DemoResult:
    """Train or load the models, guide and tune, and compare with the exactly tilted law."""
    before_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _run(label, seed, settings)
    finally:
        torch.set_num_threads(before_threads)


def _run(label: int, seed: int, settings: DemoSettings) -> DemoResult:
    began = time.monotonic()
    models = demo_models(seed, settings)
    problem = ControlProblem(
        generative_sde(models.noise, VP(), prediction="noise", shape=DIGIT_SHAPE),
        reward=LogProb(models.classifier, label),
        alpha=1.0,
    )
    marks = [time.monotonic()]
    guidance = solve(
        problem,
        ValueGuidance("ratio", num_paths=settings.guidance_paths),
        time_steps=settings.time_steps,
        iterations=settings.rounds,
        seed=derive_seed(seed, Place.DEMO_SOLVE),
        progress=True,
    )
    marks.append(time.monotonic())
    place = derive_seed(seed, Place.DEMO_DISTILLED)
    network = distill(guidance, iterations=settings.iterations, seed=place, progress=True)
    marks.append(time.monotonic())
    note("importance sampling the exactly tilted law ...")
    tilt = _tilt(problem, models.classifier, label, guidance.chain, settings, derive_seed(seed, Place.DEMO_TILT))
    note("evaluating ...")
    seeds = (Place.DEMO_BEFORE, Place.DEMO_GUIDED, Place.DEMO_AFTER)
    half = len(tilt.samples) // 2
    (first, second), (w1, w2) = tilt.samples.split(half), tilt.log_w.split(half)
    far = partial(sliced_wasserstein, directions=200, log_weights_b=w1)
    drawn = [
        _drawn(problem, guidance.chain, solution, settings.evaluation_paths, derive_seed(seed, place))
        for solution, place in zip((None, guidance, network), seeds)
    ]
    samplers = [
        Sampler(x, ev, _share(models.classifier, x, label), far(x, first), cost / drawn[0][2]) for x, ev, cost in drawn
    ]
    return DemoResult(
        label,
        seed,
        settings,
        models,
        samplers[0],
        samplers[1],
        samplers[2],
        tilt,
        tilt.resampled(256, derive_seed(seed, Place.DEMO_RESAMPLED)),
        far(second, first, log_weights_a=w2),
        network.history,
        {
            "models": models.seconds,
            "guidance": marks[1] - marks[0],
            "distillation": marks[2] - marks[1],
            "total": time.monotonic() - began,
        },
    )


# ---------------------------------------------------------------------------------------- models


def demo_models(seed: int, settings: DemoSettings) -> DemoModels:
    """The pre-trained model and the classifier, from the cache or trained (and then cached)."""
    began = time.monotonic()
    name = f"digits-{RECIPE}-{settings.model_iterations}-{settings.classifier_iterations}-{seed}"
    cached = read_cached(name, _KIND, note)
    if cached is not None:
        tensors, saved = cached
        noise, classifier = ScoreNetwork(DIGIT_SHAPE, VP(), "noise").eval(), DigitClassifier().eval()
        try:
            load_tensors(noise, part_of(tensors, "noise"), name)
            load_tensors(classifier, part_of(tensors, "classifier"), name)
            return DemoModels(noise, classifier, float(saved["accuracy"]), time.monotonic() - began, True)
        except (BadFileError, KeyError, TypeError) as error:
            note(f"the cache is damaged and will be made again: {error}")
    images, labels = digits()
    order = torch.randperm(len(images), generator=generator_for("cpu", seed, Place.DEMO_SPLIT))
    train, test = order[:_TRAINED_ON], order[_TRAINED_ON:]
    classifier = fit_digit_classifier(
        images[train],
        labels[train],
        iterations=settings.classifier_iterations,
        seed=derive_seed(seed, Place.DEMO_CLASSIFIER),
        progress=True,
    )
    with torch.no_grad():
        accuracy = float((classifier(images[test]).argmax(1) == labels[test]).double().mean())
    place = derive_seed(seed, Place.DEMO_MODEL)
    noise = fit_score(images, VP(), "noise", iterations=settings.model_iterations, seed=place, progress=True)
    tensors = with_part("noise", noise.state_dict()) | with_part("classifier", classifier.state_dict())
    write_cached(name, _KIND, tensors, {"accuracy": accuracy, "recipe": RECIPE, "seed": seed}, note)
    return DemoModels(noise, classifier, accuracy, time.monotonic() - began, False)


# ---------------------------------------------------------------------------------------- comparison


def _share(classifier: nn.Module, x: Tensor, label: int, log_w: Tensor | None = None) -> Estimate:
    """Share of samples whose most probable class is the label."""
    with torch.no_grad():
        hits = (classifier(x).argmax(1) == label).double()
    return mean_estimate(hits) if log_w is None else weighted_mean(hits, log_w)


def _drawn(
    problem: ControlProblem, chain: Chain, solution: Solution | None, n: int, seed: int
) -> tuple[Tensor, Evaluation, float]:
    """Samples, an evaluation on paths of its own, and the CPU-seconds that the samples took."""
    control = None if solution is None else solution.control
    evaluation = evaluate(problem, control, chain, n, seed)
    began, place = time.process_time(), derive_seed(seed, Place.DEMO_SAMPLES)
    if solution is None:
        x = simulate_chain(problem, chain, n, seed=place, keep="end").samples.detach()
    else:
        x = solution.sample(n, seed=place)
    return x, evaluation, time.process_time() - began


def _tilt(
    problem: ControlProblem, classifier: nn.Module, label: int, chain: Chain, settings: DemoSettings, seed: int
) -> Tilt:
    """The exactly tilted law of the chain: samples of the untuned model, weighted."""
    began = time.monotonic()
    samples, log_ws = [], []
    for i in range(-(-settings.tilt_paths // _CHUNK)):
        n = min(_CHUNK, settings.tilt_paths - i * _CHUNK)
        paths = simulate_chain(problem, chain, n, seed=derive_seed(seed, Place.DEMO_TILT_PATHS, i), keep="end")
        samples.append(paths.samples)
        log_ws.append(log_weights(problem, paths))
    x, log_w = torch.cat(samples), torch.cat(log_ws).double()
    log_z = log_mean_weight(log_w)
    return Tilt(
        x,
        log_w,
        weighted_mean(log_w, log_w),  # alpha = 1 and no running cost: the log weight is the reward
        weighted_mean(log_w - log_z.value, log_w),
        log_z,
        effective_sample_size(log_w),
        _share(classifier, x, label, log_w),
        time.monotonic() - began,
    )
