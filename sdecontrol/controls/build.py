"""Which control a problem gets: a tuned copy of its model, the default network, or the user's own module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..chains.base import Chain
from ..paths.paths import Paths
from ..problems.gibbs import GibbsProblem
from ..problems.problem import ControlProblem
from ..problems.rewards import Linear, Quadratic, QuadraticCost
from ..problems.simulate import simulate_chain
from ..processes.annealed import AnnealedLangevin
from ..randomness import derive_seed, generator_for
from ..tensors import check_output, probing
from .base import Control, StartedControl, UserControl
from .given import given_control
from .guidance import ValueControl, value_from_configuration
from .mixture import CorrectedControl, MixtureControl
from .network import DefaultControl, condition_parts
from .path_integral import PathIntegralControl
from .tuned import TunedControl

__all__ = ["build_control", "control_from_configuration", "corrected"]

_PILOT_PATHS = 256
_LOOKS, _LOOKED_AT = 8, 32  # times, and paths, at which the reward's slope is looked at
_STEEP = 50.0  # of that slope: Adam's steps of 5e-3 then move the control by a quarter


def build_control(
    problem: ControlProblem, chain: Chain, control: Any = None, *, seed: int = 0, scale_gate: bool = True
) -> Control:
    """The control to train: ``control`` if given (an nn.Module), else a tuned copy of the model, else the default network.

    Args:
        scale_gate: whether the default network's gate is scaled down where the reward is steep (at the price of 256 looks at its gradient).

    Raises:
        TypeError, ValueError: a module of the wrong output size, shape or dtype.
    """
    if control is not None:
        main = _users(problem, chain.main, control)
    elif problem.reference.trainable:
        main = TunedControl(problem.reference)  # type: ignore[arg-type]
    else:
        main = _network(problem, chain, derive_seed(seed, 11), normalise=True, scale_gate=scale_gate)
    if not chain.start or isinstance(main, StartedControl):
        return main
    return StartedControl(_start_network(problem, derive_seed(seed, 12)), main)


def corrected(
    problem: ControlProblem, chain: Chain, base: MixtureControl, *, seed: int = 0, **options: Any
) -> CorrectedControl:
    """A default network beside a mixture's control, at zero output; it sees the mixture's ``E[x_T | x_t]``."""
    network = _network(problem, chain, derive_seed(seed, 11), normalise=not options, denoiser=base, **options)
    return CorrectedControl(base, network)


def _users(problem: ControlProblem, chain: Chain, control: Any) -> Control:
    if isinstance(control, Control):
        if control.event_shape != problem.event_shape or control.control_shape != problem.control_shape:
            raise ValueError(
                f"control maps {tuple(control.event_shape)} to {tuple(control.control_shape)}; this problem "
                f"needs {tuple(problem.event_shape)} to {tuple(problem.control_shape)}."
            )
        return control
    if not isinstance(control, nn.Module):
        raise TypeError(
            "control must be an nn.Module (x, t) -> u to be trained (plain functions have no parameters; "
            f"use them with simulate), got {type(control).__name__}."
        )
    x = problem.draw_start(3, 0) + torch.randn(
        (3, *problem.event_shape),
        dtype=problem.dtype,
        device=problem.device,
        generator=generator_for(problem.device, 3),
    )
    t = chain.times[0].expand(3)
    y = problem.draw_condition(3, 0)
    called = f"control(x, t{'' if y is None else ', y'}), x {tuple(x.shape)}, t (3,)"
    with torch.no_grad(), probing("control", called):
        u = control(x, t) if y is None else control(x, t, y)
    check_output("control", u, (3, *problem.control_shape), x, "A control is called as control(x, t), t (batch,).")
    if not any(p.requires_grad for p in control.parameters()):
        raise ValueError("control has no trainable parameters.")
    return UserControl(control, problem.event_shape, problem.control_shape, problem.horizon)


def _reward_gradient(problem: ControlProblem) -> Any:
    def gradient(x: Tensor, y: Any, create_graph: bool) -> Tensor:
        with torch.enable_grad():
            leaf = x if create_graph else x.detach().requires_grad_(True)
            value = problem._call_reward(leaf, y).sum()
            return torch.autograd.grad(value, leaf, create_graph=create_graph)[0] / problem.alpha

    def finite_gradient(x: Tensor, y: Any, create_graph: bool) -> Tensor:
        # before its end a path may be where the reward is not finite (a logarithm): there the gate is closed
        value = gradient(x, y, create_graph)
        if bool(torch.isfinite(value.detach().sum())):
            return value
        good = torch.isfinite(value.detach()).flatten(1).all(1)
        rows = good.nonzero().flatten()
        out = torch.zeros_like(x)
        return (
            out
            if len(rows) == 0
            else out.index_copy(0, rows, gradient(x[rows], None if y is None else y[rows], create_graph))
        )

    return finite_gradient


def _gate_scale(problem: ControlProblem, pilot: Paths) -> float:
    """1 over how many times the reward's usual slope, ``|grad r| / alpha`` on the reference's paths, exceeds ``_STEEP``; 1 where it does not.

    A step of Adam changes the gate by the learning rate, and the control by that times the slope: where that is hundreds, paths are thrown to where it
    is thousands, and training diverges within a few steps. What the gate can represent stays the same.
    """
    steps = sorted({round(i * (len(pilot.states) - 1) / (_LOOKS - 1)) for i in range(_LOOKS)})
    rows = slice(0, _LOOKED_AT)
    x = pilot.states[steps, rows].flatten(0, 1)
    y = (
        None
        if pilot.condition is None
        else pilot.condition[rows].repeat(len(steps), *(1,) * (pilot.condition.ndim - 1))
    )
    slope = float(_reward_gradient(problem)(x, y, False).flatten(1).norm(dim=1).median())
    return min(1.0, _STEEP / max(slope, 1e-300))


def _damped(problem: GibbsProblem, gradient: Any) -> tuple[Any, Callable[[float], float]]:
    """The gate of a Gibbs problem: its reward's gradient, softly bounded at five times its usual size, and how it fades before the end.

    Far from the end the value is smoother than the density by the noise that is left: ``rho^2`` of a Gaussian's curvature becomes
    ``rho^2/(1 + left rho^2)``. Without this one step of Adam on the gate can throw paths out of the region where the density is a number.
    """
    scale, rough, reference = problem.scale, problem.roughness, problem.reference
    if isinstance(reference, AnnealedLangevin):  # bounds the score itself, and has it at hand

        def remembered(x: Tensor, y: Any, create_graph: bool) -> Tensor:
            return reference.score(x, y) + (x - reference.centre) / reference.scale.square()

        return remembered, reference.beta
    bound = 5 * rough * problem.dim**0.5

    def bounded(x: Tensor, y: Any, create_graph: bool) -> Tensor:
        z = scale * gradient(x, y, create_graph)
        return z / (1 + z.norm(dim=1, keepdim=True) / bound) / scale

    return bounded, lambda t: 1 / (1 + max(0.0, float(reference.left(t))) * rough**2)


def _affine_pull(problem: ControlProblem) -> tuple[Tensor, Tensor] | None:
    """``P, p`` with ``sigma^T grad r / alpha = P x + p``, where the reward is quadratic or linear and sigma constant."""
    reward, sde = problem.reward_function, problem.reference
    sigma = sde.constant_diffusion
    if sigma is None or len(problem.event_shape) != 1 or type(reward) not in (Quadratic, Linear):
        return None
    assert isinstance(reward, (Quadratic, Linear))
    n = problem.event_shape[0]
    sigma = sigma.to(reward.g)
    root = sigma[0] if sigma.ndim == 3 else torch.diag_embed(sigma.expand(n))
    slope = -reward.G if isinstance(reward, Quadratic) else torch.zeros_like(root[:, :1]).expand(n, n)
    return root.mT @ slope / problem.alpha, root.mT @ reward.g / problem.alpha


def _linear_quadratic(problem: ControlProblem) -> bool:
    """Whether the optimal control is affine in x."""
    return (
        problem.reference.as_linear() is problem.reference
        and isinstance(problem.reward_function, (Quadratic, Linear, type(None)))
        and isinstance(problem.running_cost_function, (QuadraticCost, type(None)))
    )


def _network(
    problem: ControlProblem,
    chain: Chain,
    seed: int,
    normalise: bool,
    denoiser: Any = None,
    scale_gate: bool = True,
    **options: Any,
) -> DefaultControl:
    sde = problem.reference
    gated = problem.has_gradient and problem.reward_function is not None and sde.continuous
    if sde.pretrained and sde.continuous:
        if denoiser is not None:
            gated = False  # the mixture's control is near the optimal one: a raw gradient of a sharp reward would throw it far off
        elif options.pop("denoised", True):
            denoiser = sde
    if not options:
        options = condition_parts(problem)
    if normalise:
        with torch.no_grad():
            pilot = simulate_chain(problem, chain, _PILOT_PATHS, seed=seed)
            states = pilot.states
            flat = states.flatten(0, 1)
            centre, spread = flat.mean(0), flat.std(0)
            spread = spread.clamp(min=1e-3 * float(spread.max()) + 1e-12)
            options.update(centre=centre, spread=spread)
            if gated and scale_gate and not isinstance(problem, GibbsProblem):
                options.update(gate_scale=_gate_scale(problem, pilot))
            if isinstance(denoiser, MixtureControl):
                ends = denoiser.ends(_PILOT_PATHS, seed)
                options.update(data_centre=ends.mean(0).flatten(), data_spread=ends.std(0).flatten().clamp(min=1e-12))
            elif denoiser is not None:
                ends = states[-1].flatten(1)
                data_spread = ends.std(0)
                floor = 1e-3 * float(data_spread.max()) + 1e-12
                options.update(data_centre=ends.mean(0), data_spread=data_spread.clamp(min=floor))
    pull: Any = _reward_gradient(problem) if gated else None
    fade = None
    if gated and isinstance(problem, GibbsProblem):
        pull, fade = _damped(problem, pull)
    network = DefaultControl(
        problem.event_shape,
        problem.control_shape,
        0.0,
        problem.horizon,
        reward_gradient=pull,
        fade=fade,
        sde=sde if gated else None,
        affine_pull=_affine_pull(problem) if gated else None,
        nonlinear=not _linear_quadratic(problem),
        denoiser=denoiser,
        generator=generator_for("cpu", seed),
        **options,
    )
    return network.to(device=problem.device, dtype=problem.dtype)


def _start_network(problem: ControlProblem, seed: int) -> DefaultControl:
    law = problem.initial
    network = DefaultControl(
        problem.event_shape,
        problem.event_shape,
        -1.0,
        0.0,
        centre=law.mean,
        spread=law.variance.sqrt().clamp(min=1e-12),
        generator=generator_for("cpu", seed),
        **condition_parts(problem),
    )
    return network.to(device=problem.device, dtype=problem.dtype)


def control_from_configuration(
    problem: ControlProblem, chain: Chain, kind: dict[str, Any], given: Any, value: Any = None
) -> Control:
    """The control of a saved file, with fresh parameters.

    Args:
        given: the user's own control, where it is one. value: the user's own value function or classifier.

    Raises:
        TypeError: the control (or value) was the user's own and is not given again.
    """
    if kind["kind"] == "zero":
        return given_control(problem, None)
    if kind["kind"] == "mixture":
        return MixtureControl.from_configuration(problem, kind)  # type: ignore[arg-type]
    if kind["kind"] == "corrected":
        base = MixtureControl.from_configuration(problem, kind["base"])  # type: ignore[arg-type]
        return corrected(problem, chain, base, hidden=kind["network"]["hidden"])
    if kind["kind"] == "value":
        return ValueControl(value_from_configuration(problem, chain, kind["value"], value), problem, chain)
    if kind["kind"] == "path-integral":
        options = {name: setting for name, setting in kind.items() if name not in ("kind", "proposal")}
        inner = kind["proposal"]
        proposal = None if inner is None else control_from_configuration(problem, chain, inner, given, value)
        return PathIntegralControl(problem, chain, proposal, **options)
    if kind["kind"] == "started":
        main = control_from_configuration(problem, chain.main, kind["main"], given)
        return StartedControl(_start_network(problem, 0), main)
    if kind["kind"] == "tuned":
        return TunedControl(problem.reference)  # type: ignore[arg-type]
    if kind["kind"] == "network":
        return _network(
            problem,
            chain,
            0,
            normalise=False,
            hidden=kind["hidden"],
            condition_size=kind["condition_size"],
            classes=kind["classes"],
            gate_scale=kind.get("gate_scale", 1.0),
            **(
                {"denoised": kind.get("denoised", False)}
                if problem.reference.pretrained and problem.reference.continuous
                else {}
            ),
        )
    if given is None:
        raise TypeError("this solution's control is your own module: give it again as load(..., control=module).")
    if kind["kind"] == "given":
        return given_control(problem, given, "control")
    return _users(problem, chain, given)
