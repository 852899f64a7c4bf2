"""Models of diffusers as references, with their own scheduler's steps, and the way back into their own format."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..chains.diffusion import DiffusionChain
from ..errors import warn
from ..processes.adapters import Adapters, WithoutAdapters
from ..processes.masters import MasterWeights
from ..processes.modules import copied, unwrapped
from ..shapes import Samples, States
from ..tensors import as_float
from .lora import LoRA
from .schedulers import Sampler, check_steps, read_scheduler

#: of conditions, in the order in which a model's ``forward`` is searched for them
_CONDITIONS = ("encoder_hidden_states", "class_labels")
_STATES = ("sample", "hidden_states")
_NETWORKS = ("unet", "transformer")
_NOTICED = 0.01  # by which a stock sampler's last step may move clean states without a word


def _inner(network: Any) -> Any:
    """The network that wrappers hold (PEFT's, adapters in its layers; of compiling and data parallelism); others
    themselves."""
    network = unwrapped(network)
    return unwrapped(network.get_base_model()) if hasattr(network, "get_base_model") else network


class DiffusersModel(nn.Module):
    """A network of diffusers as ``model(x, n)`` or ``model(x, n, y)``.

    Attributes:
        network: the network itself.
        named: what y is called; or by what names its numbers ``(batch, sum of sizes)`` are split, with shapes (a name
            within a dictionary: ``"added_cond_kwargs.text_embeds"``).
        guidance: the prediction is ``p(null) + guidance (p(y) - p(null))``, or None for p(y) alone.
    """

    null: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        named: str | Mapping[str, Sequence[int]] | None = None,
        guidance: float | None = None,
        null: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network, self.named, self.guidance = network, named, guidance
        self.null = None if null is None else nn.Buffer(null)
        parameters = inspect.signature(_inner(network).forward).parameters
        self.state_name = next((name for name in _STATES if name in parameters), None)
        if self.state_name is None or "timestep" not in parameters:
            raise TypeError(
                f"model {type(network).__name__} must be a network of diffusers: forward(sample, timestep, ...) or "
                f"forward(hidden_states, timestep, ...), got forward({', '.join(parameters)})."
            )
        if isinstance(named, str) and named not in parameters:
            raise ValueError(
                f"condition_kwarg={named!r} is no argument of {type(network).__name__}.forward; it has "
                f"{', '.join(parameters)}."
            )

    def forward(self, x: Tensor, n: Tensor, y: Tensor | None = None) -> Tensor:
        if self.guidance is None:
            return self._predicted(x, n, y)
        if y is None:
            raise ValueError("guidance needs a condition to guide to: ControlProblem(..., condition=...).")
        assert self.null is not None
        if self.null.shape != y.shape[1:]:
            raise ValueError(
                f"null_condition must have the shape of one y, {tuple(y.shape[1:])}, got {tuple(self.null.shape)}."
            )
        nothing = self.null.to(y).expand_as(y)
        without, given = self._predicted(torch.cat((x, x)), torch.cat((n, n)), torch.cat((nothing, y))).chunk(2)
        return without + self.guidance * (given - without)

    def _predicted(self, x: Tensor, n: Tensor, y: Tensor | None) -> Tensor:
        arguments = {} if y is None else self._arguments(y)
        found = self.network(**{str(self.state_name): x}, timestep=n, **arguments)
        if isinstance(found, Tensor):
            return found
        value = getattr(found, "sample", None)
        value = found[0] if value is None and isinstance(found, tuple) else value
        if not isinstance(value, Tensor):
            raise TypeError(
                f"model must return a tensor, a tuple or an object with .sample, got {type(found).__name__}."
            )
        return value

    def _arguments(self, y: Tensor) -> dict[str, Any]:
        if self.named is None:
            raise ValueError(
                f"{type(self.network).__name__} takes no condition that is known; say its name: condition_kwarg='...'."
            )
        if isinstance(self.named, str):
            return {self.named: y}
        sizes = [prod(shape) for shape in self.named.values()]
        if y.ndim != 2 or y.shape[1] != sum(sizes):
            raise ValueError(
                f"condition must be (batch, {sum(sizes)}), the numbers of {', '.join(self.named)} side by side, got "
                f"{tuple(y.shape)}."
            )
        found: dict[str, Any] = {}
        for (name, shape), part in zip(self.named.items(), y.split(sizes, 1)):
            *outer, last = name.split(".")
            place = found
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = part.unflatten(1, tuple(shape)) if len(shape) else part[:, 0]
        return found


def _network(model: Any) -> nn.Module:
    """The network of diffusers in a pre-trained model, or in a tuned copy of it (with its adapters)."""
    whole: Any = model.whole() if isinstance(model, (Adapters, MasterWeights)) else model
    adapter: Any = whole.base if isinstance(whole, WithoutAdapters) else whole
    return unwrapped(unwrapped(adapter).network)


class DiffusersChain(DiffusionChain):
    """A network of diffusers with a scheduler's steps. Made by :func:`from_diffusers`."""

    def __init__(
        self, model: DiffusersModel, sampler: Sampler, shape: Sequence[int], decoder: Callable[..., Tensor] | None
    ) -> None:
        self.sampler, self.decoder = sampler, decoder
        self.pipeline: Any = None
        steps = sampler.steps
        facts = {name: getattr(steps, name) for name in ("x0_part", "eps_part", "scale")}
        like = torch.zeros((), dtype=torch.get_default_dtype())
        super().__init__(model, steps, sampler.prediction, shape, like, sampler.limit, sampler.of_limited, facts)

    def modules(self) -> list[nn.Module]:
        return [*super().modules(), *([self.decoder] if isinstance(self.decoder, nn.Module) else [])]

    def data_of(self, x0: States, condition: Any = None) -> Samples:
        return x0 if self.decoder is None else self.decoder(x0)

    # ---------------------------------------------------------------- the way back

    @property
    def exporter(self) -> DiffusersChain:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self

    def _pipeline(self, network: nn.Module) -> Any:
        """A stock pipeline with this network in its place; None where there is none."""
        import diffusers  # type: ignore[import-not-found]

        scheduler = type(self.sampler.scheduler).from_config(self.sampler.scheduler.config)
        if self.pipeline is not None:
            parts = self.pipeline.components
            name = next(name for name in _NETWORKS if parts.get(name) is not None)
            return type(self.pipeline)(**{**parts, name: network, "scheduler": scheduler})
        stock = {"DDPMScheduler": diffusers.DDPMPipeline, "DDIMScheduler": diffusers.DDIMPipeline}
        made = stock.get(type(scheduler).__name__)
        return made(network, scheduler) if made is not None and isinstance(network, diffusers.UNet2DModel) else None

    def pipeline_of(self, model: nn.Module) -> Any:
        """A stock pipeline with a tuned copy; its last, noiseless step asks the pre-trained network."""
        network = _inner(_network(model) if isinstance(model, Adapters) else copied(_network(model)))
        if self.decodes:
            tuned, own, last = network.forward, _inner(_network(self.model)).forward, self.levels[-1]

            def forward(states: Tensor, timestep: Any, *rest: Any, **named: Any) -> Any:
                at_end = bool((torch.as_tensor(timestep) == last).all())
                return (own if at_end else tuned)(states, timestep, *rest, **named)

            network.forward = forward
        found = self._pipeline(network)
        if found is None:
            raise ValueError(
                f"diffusers has no pipeline of a {type(network).__name__} with a "
                f"{type(self.sampler.scheduler).__name__} alone: give from_diffusers a pipeline, or use solution.model "
                "in a sampler of your own."
            )
        return found

    def save_pretrained(self, model: nn.Module, folder: Any, states: States, condition: Any) -> None:
        """Write a tuned copy: its adapters alone, where it has some; a pipeline where there is one; else the network
        and its scheduler's settings.

        Args:
            states: ends ``(n, *shape)`` of paths, before the last step.
        """
        self._say_last_step(model, states, condition)
        network: Any = _network(model)
        if isinstance(model, Adapters):
            save = network.save_pretrained if hasattr(network, "get_base_model") else network.save_lora_adapter
            save(folder)
            return
        found = self._pipeline(network)
        if found is not None:
            found.save_pretrained(folder)
            return
        network.save_pretrained(folder)
        self.sampler.scheduler.save_pretrained(folder)

    @torch.no_grad()
    def _say_last_step(self, model: nn.Module, x: States, condition: Any) -> None:
        if not self.decodes:
            return
        ours, theirs = (self.to_x0(self.steps, x, self.predict(m, x, 1.0, condition)) for m in (self.model, model))
        moved = float((ours - theirs).square().mean().sqrt())
        if moved > _NOTICED:
            warn(
                f"a stock sampler's last, noiseless step asks the tuned network, where solution.sample asks the "
                f"pre-trained one: its clean states are {moved:.2g} away (root mean square). solution.pipeline() has "
                "the law of solution.sample; more or later timesteps make the last step smaller."
            )


def _parts(model: Any, scheduler: Any) -> tuple[nn.Module, Any, Any]:
    """Network, scheduler and pipeline (or None) of what was given."""
    if isinstance(model, nn.Module):
        if scheduler is None:
            raise TypeError("scheduler is needed beside a network, such as DDPMScheduler(num_train_timesteps=1000).")
        return model, scheduler, None
    network = next((n for name in _NETWORKS if (n := getattr(model, name, None)) is not None), None)
    if not isinstance(network, nn.Module):
        raise TypeError(
            "model must be a network of diffusers or a pipeline with a unet or a transformer, got "
            f"{type(model).__name__}."
        )
    return network, getattr(model, "scheduler", None) if scheduler is None else scheduler, model


def _shape(network: nn.Module, shape: Sequence[int] | None) -> tuple[int, ...]:
    if shape is not None:
        return tuple(shape)
    config: Any = getattr(_inner(network), "config", {})
    size, channels = config.get("sample_size"), config.get("in_channels")
    if size is None or channels is None:
        raise TypeError("shape is needed: the model's configuration has no sample_size or no in_channels.")
    return (channels, size, size) if isinstance(size, int) else (channels, *size)


def _named(
    network: nn.Module, given: str | Mapping[str, Sequence[int]] | None
) -> str | Mapping[str, Sequence[int]] | None:
    """What the network calls its condition."""
    if given is not None:
        return given
    parameters = inspect.signature(_inner(network).forward).parameters
    return next((name for name in _CONDITIONS if name in parameters), None)


class Decoder(nn.Module):
    """From clean states to data: an autoencoder of diffusers, with its scale and shift, or a user's function."""

    def __init__(self, of: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.of = of
        config: Any = getattr(of, "config", {})
        self.autoencoder = hasattr(of, "config") and hasattr(of, "decode")
        self.scale, self.shift = config.get("scaling_factor", 1.0), config.get("shift_factor") or 0.0

    def forward(self, x0: Tensor) -> Tensor:
        of: Any = self.of
        return of.decode(x0 / self.scale + self.shift, return_dict=False)[0] if self.autoencoder else of(x0)


def from_diffusers(
    model: Any,
    scheduler: Any = None,
    *,
    steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    eta: float = 1.0,
    shape: Sequence[int] | None = None,
    condition_kwarg: str | Mapping[str, Sequence[int]] | None = None,
    guidance: float | None = None,
    null_condition: Tensor | None = None,
    decode: nn.Module | Callable[[Tensor], Tensor] | None = None,
    lora: LoRA | None = None,
    use_clipped_model_output: bool = False,
) -> DiffusersChain:
    """A model of diffusers with its scheduler's own steps, as a reference: the chain's means and variances are those of
    ``scheduler.step``, which is asked (to 1e-4; where it differs, it is refused).

    Args:
        model: a network (``UNet2DModel``, ``UNet2DConditionModel``, a transformer of the same call form) or a pipeline,
            whose scheduler and autoencoder are then taken. In whatever precision: a copy of one of bfloat16 is tuned
            with weights in float32, and saved in its own. It may be compiled; files have its plain names.
        scheduler: ``DDPMScheduler``, ``DDIMScheduler`` or ``FlowMatchEulerDiscreteScheduler``; prediction type,
            spacing, final alpha, variance, zero terminal SNR, clipping, thresholding and shift are read from it. It is
            not changed.
        steps: number of model calls, 50 if not given. timesteps: the scheduler's own instead (DDPM).
        eta: noise of DDIM's and of a flow's steps, in (0, 1] (1: of the noising's posterior). A flow's scheduler has
            none itself, unless it has ``stochastic_sampling``.
        shape: of one state; the model's ``in_channels`` and ``sample_size`` if not given.
        condition_kwarg: what the network calls the problem's condition; "encoder_hidden_states" or "class_labels" if
            not given. Several at once: names with shapes, whose numbers stand side by side in the condition ``(batch,
            D)``; a dot leads into a dictionary, as in ``"added_cond_kwargs.text_embeds"``.
        guidance: weight w of classifier-free guidance as part of the reference: ``p(null) + w (p(y) - p(null))``;
            null_condition: what stands for no condition, of the shape of one y.
        decode: from clean states to data, what rewards and samples are: an autoencoder of diffusers, or a function.
        lora: adapters to train in the network's place; it stays as it is. (A network that has adapters of PEFT already
            trains these, and the reference is the network without them.)
        use_clipped_model_output: as of ``DDIMScheduler.step``: eps^ is made of the clipped x0^.

    Raises:
        TypeError, ValueError: a model, a scheduler or a setting of it that is not understood, by name.
    """
    network, scheduler, pipeline = _parts(model, scheduler)
    if isinstance(network, nn.parallel.DistributedDataParallel):
        network = network.module
    if guidance is not None:
        guidance = as_float("guidance", guidance)
        if null_condition is None:
            raise ValueError("guidance needs null_condition, what stands for no condition (of an empty prompt, say).")
    elif null_condition is not None:
        raise ValueError("null_condition is for guidance=, the weight of classifier-free guidance, which is not given.")
    if steps is None and timesteps is None:
        steps = 50
    if lora is not None:
        network = lora.added_to(network)
    sampler = read_scheduler(scheduler, steps, timesteps, eta, use_clipped_model_output)
    check_steps(sampler)
    if decode is None:
        decode = getattr(pipeline, "vae", None)
    adapter = DiffusersModel(network, _named(network, condition_kwarg), guidance, null_condition).eval()
    chain = DiffusersChain(adapter, sampler, _shape(network, shape), None if decode is None else Decoder(decode))
    chain.pipeline = pipeline
    return chain
