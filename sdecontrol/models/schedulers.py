"""diffusers' schedulers as numbers of a sampler.

What a scheduler says is read, not guessed, and its own ``step`` is asked in the end: where the numbers do not reproduce
it, it is refused.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chains.diffusion import DiffusionChain, SamplerSteps, Thresholding
from ..randomness import Place, generator_for
from ..tensors import as_float, check_count

PREDICTIONS = {"epsilon": "noise", "sample": "sample", "v_prediction": "v", "flow_prediction": "flow"}
_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
_NONE = 1e-9  # a noise of no size: DDPM's variances are at least 1e-20
#: of a step against the scheduler's own, whose coefficients are differences in float32: a root of one that vanishes
#: (eta = 1 after zero terminal SNR) is up to 3e-4
_TOLERANCE = 1e-3


class Sampler(NamedTuple):
    """A scheduler with its steps set, and what it does."""

    scheduler: Any
    steps: SamplerSteps
    prediction: str
    limit: float | Thresholding | None
    of_limited: bool
    #: what its ``step`` is given beside prediction, time, state and generator
    options: dict[str, Any]
    #: the numbers of its own ``step``, where noise is added to it
    own: SamplerSteps | None = None


def read_scheduler(
    scheduler: Any, steps: int | None, timesteps: Sequence[int] | None, eta: float, use_clipped_model_output: bool
) -> Sampler:
    """What a scheduler does in so many steps.

    Raises:
        TypeError: it is none that is understood. ValueError: a setting of it that is not, by name.
    """
    names = [kind.__name__ for kind in type(scheduler).__mro__]
    read = next((_READERS[name] for name in names if name in _READERS), None)
    if read is None:
        raise TypeError(
            f"scheduler {names[0]} is not understood: its steps must be Gaussian kernels of the last state alone, as "
            f"those of {', '.join(_READERS)} are. For a multistep, ancestral or deterministic one use "
            "DDIMScheduler.from_config(scheduler.config) of the same model."
        )
    eta = as_float("eta", eta)
    if not 0 < eta <= 1:
        raise ValueError(f"eta must be within (0, 1], got {eta:g}: without noise there are no likelihood ratios.")
    if use_clipped_model_output and read is not _ddim:
        raise ValueError(
            f"use_clipped_model_output is DDIMScheduler's, and means nothing for {names[0]}: leave it out (DDPM's mean "
            "is made of the clipped x0^ anyway)."
        )
    own = type(scheduler).from_config(scheduler.config)
    if timesteps is not None and steps is not None:
        raise ValueError("steps or timesteps, not both: timesteps say how many they are.")
    if timesteps is None:
        check_count("steps", steps, 2)
    return read(own, steps, timesteps, eta, use_clipped_model_output)


def _set(scheduler: Any, steps: int | None, timesteps: Sequence[int] | None) -> list[float]:
    if timesteps is None:
        scheduler.set_timesteps(steps)
    else:
        try:
            scheduler.set_timesteps(timesteps=list(timesteps))
        except TypeError as error:
            raise ValueError(
                f"{type(scheduler).__name__} takes no timesteps of one's own; give steps, or use a DDPMScheduler."
            ) from error
    return scheduler.timesteps.tolist()


def _prediction(scheduler: Any, known: Sequence[str]) -> str:
    kind = scheduler.config.prediction_type
    if kind not in known:
        raise ValueError(f"prediction_type={kind!r} of {type(scheduler).__name__} is not one of {', '.join(known)}.")
    return PREDICTIONS[kind]


def _limit(config: Any) -> float | Thresholding | None:
    if config.thresholding:
        return Thresholding(float(config.dynamic_thresholding_ratio), float(config.sample_max_value))
    return float(config.clip_sample_range) if config.clip_sample else None


def _sizes(abar: Sequence[float]) -> list[tuple[float, float]]:
    return [(math.sqrt(a), math.sqrt(1 - a)) for a in abar]


def _check_reachable(prediction: str, times: Sequence[float], abar: Sequence[float]) -> None:
    if prediction == "noise" and min(abar) < 1e-12:
        raise ValueError(
            f"at timestep {times[abar.index(min(abar))]:g} nothing of the data is left (rescale_betas_zero_snr), and a "
            "prediction of noise says nothing of it: such a model predicts v or sample."
        )


def _with_noise(times: Sequence[float], scales: Sequence[float], name: str) -> int:
    """How many steps have noise: all, or all but the last."""
    count = len(scales) if scales[-1] > _NONE else len(scales) - 1
    silent = [times[k] for k in range(count) if not scales[k] > _NONE]
    if silent:
        raise ValueError(
            f"{name}'s step from timestep {silent[0]:g} has no noise with these settings, and so no likelihood ratio: "
            "other steps or timesteps, or another timestep_spacing."
        )
    return count


def _ddpm(scheduler: Any, steps: int | None, timesteps: Sequence[int] | None, eta: float, clipped: bool) -> Sampler:
    config = scheduler.config
    if eta != 1.0:
        raise ValueError(
            f"eta={eta:g}: DDPMScheduler's noise is its own. For another: DDIMScheduler.from_config(scheduler.config)."
        )
    if config.variance_type not in _VARIANCES:
        raise ValueError(
            f"variance_type={config.variance_type!r} is not understood ({', '.join(_VARIANCES)} are): where a model "
            "says its variance, a control would change that, too."
        )
    prediction, times = _prediction(scheduler, ("epsilon", "sample", "v_prediction")), _set(scheduler, steps, timesteps)
    every = scheduler.alphas_cumprod.double().tolist()
    before = [int(scheduler.previous_timestep(t)) for t in times]
    abar, ends = [every[t] for t in times], [every[n] if n >= 0 else 1.0 for n in before]
    _check_reachable(prediction, times, abar)
    whole = SamplerSteps.implicit(times, _sizes(abar), _sizes(ends), 1.0)  # DDPM's mean is that of eta = 1
    if config.variance_type == "fixed_large":
        whole = replace(whole, scale=[math.sqrt(1 - a / b) for a, b in zip(abar, ends)])
    whole = replace(whole, scale=[scale if t > 0 else 0.0 for t, scale in zip(times, whole.scale)])
    count = _with_noise(times, whole.scale, "DDPMScheduler")
    return Sampler(scheduler, whole.noisy(count), prediction, _limit(config), True, {})


def _ddim(scheduler: Any, steps: int | None, timesteps: Sequence[int] | None, eta: float, clipped: bool) -> Sampler:
    config = scheduler.config
    prediction, times = _prediction(scheduler, ("epsilon", "sample", "v_prediction")), _set(scheduler, steps, timesteps)
    every = scheduler.alphas_cumprod.double().tolist()
    before = [int(t) - config.num_train_timesteps // len(times) for t in times]  # whatever the next timestep is
    abar = [every[t] for t in times]
    ends = [every[n] if n >= 0 else float(scheduler.final_alpha_cumprod) for n in before]
    _check_reachable(prediction, times, abar)
    whole = SamplerSteps.implicit(times, _sizes(abar), _sizes(ends), eta)
    count = _with_noise(times, whole.scale, "DDIMScheduler")
    options = {"eta": eta, "use_clipped_model_output": clipped}
    return Sampler(scheduler, whole.noisy(count), prediction, _limit(config), clipped, options)


def _flow(scheduler: Any, steps: int | None, timesteps: Sequence[int] | None, eta: float, clipped: bool) -> Sampler:
    """Euler's steps of a flow, with the noise of an implicit sampler beside them (eta = 0 is the scheduler's own); or,
    where the scheduler itself draws noise (``stochastic_sampling``), its own."""
    config = scheduler.config
    for name in ("use_dynamic_shifting", "invert_sigmas"):
        if getattr(config, name, False):
            raise ValueError(f"{name}=True of {type(scheduler).__name__} is not understood; use a fixed shift.")
    own = bool(getattr(config, "stochastic_sampling", False))
    if own and eta != 1.0:
        raise ValueError(f"eta={eta:g}: with stochastic_sampling the scheduler's noise is its own; leave out eta.")
    times = _set(scheduler, steps, timesteps)
    sizes = [(1 - s, s) for s in scheduler.sigmas.double().tolist()]
    whole, quiet = (SamplerSteps.implicit(times, sizes[:-1], sizes[1:], noise) for noise in (eta, 0.0))
    if own:
        ends = [list(part) for part in zip(*sizes[1:])]
        whole = replace(whole, x0_part=ends[0], eps_part=[0.0] * len(times), scale=ends[1])
    count = _with_noise(times, whole.scale, type(scheduler).__name__)
    return Sampler(scheduler, whole.noisy(count), "flow", None, True, {}, None if own else quiet.noisy(count))


_READERS: dict[str, Callable[..., Sampler]] = {
    "DDPMScheduler": _ddpm,
    "DDIMScheduler": _ddim,
    "FlowMatchEulerDiscreteScheduler": _flow,
}


def own_step(sampler: Sampler, k: int, x: Tensor, prediction: Tensor, generator: torch.Generator) -> Tensor:
    """The scheduler's own k-th step."""
    scheduler = copy.copy(sampler.scheduler)
    if hasattr(scheduler, "set_begin_index"):  # a flow's counts its steps itself
        scheduler.set_begin_index(k)
    time = scheduler.timesteps[k]
    return scheduler.step(prediction, time, x, generator=generator, return_dict=False, **sampler.options)[0]


def check_steps(sampler: Sampler) -> None:
    """Raise where the numbers are not those of the scheduler's own steps.

    Raises:
        ValueError: with the step and how far they are apart.
    """
    shape, numbers = (2, 1, 4), sampler.own or sampler.steps
    like = torch.zeros((), dtype=torch.float64)
    chain = DiffusionChain(
        lambda x, n: x, numbers, sampler.prediction, shape[1:], like, sampler.limit, sampler.of_limited
    )
    generator = generator_for("cpu", 0, Place.SCHEDULER_STEPS)
    for k, time in enumerate(numbers.levels):
        x, prediction = (torch.randn(shape, generator=generator) for _ in range(2))
        before = generator.get_state()
        with torch.no_grad():
            theirs = own_step(sampler, k, x, prediction, generator)
            ours = chain.mean_of(k, x.double(), prediction.double())
        if k < chain.steps:
            generator.set_state(before)  # the same noise
            ours += numbers.scale[k] * torch.randn(shape, generator=generator)
        if not bool(theirs.isfinite().all()):
            raise ValueError(
                f"{type(sampler.scheduler).__name__}'s own step from timestep {time:g} is not finite with its settings."
            )
        apart = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))
        if not apart < _TOLERANCE:
            raise ValueError(
                f"{type(sampler.scheduler).__name__}'s own step from timestep {time:g} is {apart:.2g} away from what "
                "its settings say: it is of a kind of its own, which is not understood."
            )
