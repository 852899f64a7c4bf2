"""What a problem asks of its reference, with the answers of a process that has nothing more to say."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..randomness import Place, generator_for
from .modules import Definition, evaluating


class Reference(Definition):
    """Base of the processes that a problem can have as reference: SDEs, and chains of their own.

    Attributes:
        event_shape: shape of one state.
        dtype, device: of its coefficients, or None where it has none of its own.
        own_initial: law of X_0 that belongs to the process itself, or None.
        memory: correlation of X_0 and X_T, where it is known.
        continuous: a process of continuous time, of which a grid and a scheme make a chain; else it is a chain of its
            own.
        default_scheme: where no scheme is asked for. What grid a number of steps means is in ``default_grid``.
        additive: the noise does not depend on the state, as far as that is known.
        gaussian: its steps are Gaussian kernels. of_noise: a control shifts the noise of its steps, which alone
            log-ratios depend on.
        differentiable: a step has a gradient by state and noise.
        state_dtype: of the states, where they are tokens; else None. keeps_tokens: a position that has one keeps it to
            the end (masked diffusion).
        constant_diffusion: the diffusion where it depends on neither x nor t (matrices as ``(1, d, m)``), else None.
        reverse_target: the target is made of kernels backwards (a chain's reverse law); ``controlled_target``: the
            control has a part in them.
        pretrained: it is a pre-trained model (:class:`sdecontrol.processes.pretrained.Pretrained`). decodes: its
            ``decode`` calls the model.
        tangential: its noises and controls are vectors at the state, of which :meth:`tangent` is what acts, and steps
            are maps of them that need not be affine. angles: states are angles, of which networks see cosines and
            sines. coordinate_spread: by which networks scale what they see, where it is known of all states; else None.
        model, mixture: the pre-trained model, and the mixture in its place.
        exporter: how a tuned copy of the model goes back into another library's format (``pipeline_of(model)`` and
            ``save_pretrained(model, folder, states, condition)``), where it came from one; else None.
        schedule: the noising process, in continuous time, whose marginals it has backwards; ``reversal``: it is the
            time reversal of its noising, exact where the model is (a discrete model's as well).
    """

    event_shape: torch.Size
    horizon: float
    dtype: torch.dtype | None
    device: torch.device | None
    own_initial: Any = None
    memory: float | None = None
    continuous: bool = True
    default_scheme: str = "euler"
    additive: bool = True
    gaussian: bool = True
    of_noise: bool = True
    differentiable: bool = True
    state_dtype: torch.dtype | None = None
    keeps_tokens: bool = False
    constant_diffusion: Any = None
    reverse_target: bool = False
    controlled_target: bool = False
    tangential: bool = False
    angles: bool = False
    coordinate_spread: float | None = None
    pretrained: bool = False
    decodes: bool = False
    model: Any = None
    mixture: Any = None
    exporter: Any = None
    schedule: Any = None
    reversal: bool = False
    drift: Any
    diffusion: Any
    _drift: Any = None
    _diffusion_function: Any = None

    @property
    def trainable(self) -> bool:
        """Whether it is a model with trainable parameters, to be tuned itself."""
        return isinstance(self.model, nn.Module) and any(p.requires_grad for p in self.model.parameters())

    def modules(self) -> list[nn.Module]:
        """The user's modules in it."""
        return [p for p in (self.model, self._drift, self._diffusion_function) if isinstance(p, nn.Module)]

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Its modules in evaluation mode, restored afterwards."""
        return evaluating(self.modules())

    def memory_from(self, initial: Any) -> float | None:
        """:attr:`memory`, from a given law of X_0 (largest canonical correlation)."""
        return self.memory

    def as_linear(self) -> Any:
        """The same process as a linear SDE (itself, if it is one), else None."""
        return None

    def model_time(self, t: float, x: Tensor) -> Tensor:
        """What the reference's model calls process time t: 0-d, for states like x."""
        return torch.tensor(t, dtype=x.dtype, device=x.device)

    def default_grid(self, steps: int) -> list[float]:
        """The times ``0 = t_0 < ... < t_K = horizon`` that a number of steps stands for: equal steps, computed point by
        point, never accumulated, so that K steps are exactly K."""
        return [self.horizon * k / steps for k in range(steps)] + [self.horizon]

    def probe_states(self, rows: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
        """States ``(rows, *event)`` to try functions with."""
        generator = generator_for("cpu", seed, Place.PROBE_STATES)
        x = torch.randn((rows, *self.event_shape), generator=generator, dtype=torch.float64)
        return x.to(device=device, dtype=dtype)

    def probe_ends(self, x: Tensor, seed: int = 0) -> Tensor:
        """For states of :meth:`probe_states`, as many that the last one may be: what is decoded for rewards."""
        return x

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """The part of a control, or of a shift, that acts at x."""
        return v

    def onto(self, x: Tensor) -> Tensor:
        """The state nearest to numbers ``(..., *event)`` that need not be one."""
        return x

    def check_states(self, name: str, x: Tensor) -> None:
        """Raise where these cannot be states, whatever their shape; of tokens by kind and range."""

    def probe(self, dtype: torch.dtype, device: torch.device, condition: Any = None) -> None:
        """Call the user's functions once and check what they return; raises by name."""

    def differentiated(self, t: float) -> dict[str, Callable[..., Tensor]]:
        """The user's functions that a gradient through a step at time t goes through, by name:
        ``(x) -> (batch, ...)``, ``(x, y)`` with a condition."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Plain facts for a saved file."""
        return {"kind": type(self).__name__, "event_shape": list(self.event_shape), "horizon": self.horizon}

    def numbers(self, x: Tensor, t: Tensor, condition: Any = None) -> dict[str, Tensor]:
        """What it makes of some states at time t, by which a saved file recognises it."""
        found = {"drift": self.drift(x, t, condition)}
        return {**found, "diffusion": self.diffusion(x, t)} if self.continuous else found

    def decode(self, x: Tensor, condition: Any = None) -> Tensor:
        """From the last state to what rewards, samples and metrics see."""
        return x

    def data_of(self, x0: Tensor, condition: Any = None) -> Tensor:
        """From a clean state to what rewards see: of a model of latents what these stand for."""
        return x0
