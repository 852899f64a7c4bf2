"""Which control a problem gets: a tuned copy of its model, the default network, or the user's own module."""

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from ..chains.base import Chain
from ..chains.shifts import shift_function
from ..errors import check_name
from ..problems.problem import ControlProblem
from ..problems.rewards import Linear, Quadratic, QuadraticCost
from ..problems.simulate import simulate_chain
from ..processes.modules import copied, load_plain_state, plain_state
from ..randomness import Place, derive_seed
from .base import Control, StartedControl, as_control, check_shapes
from .feedback import AffineFeedback
from .langevin_term import langevin_scale
from .mixture import CorrectedControl, MixtureControl
from .network import Architecture, DefaultControl, Scales, floored, layers_for
from .reward_network import SumControl, reward_network
from .saved import CONTROLS, Context
from .token_network import TokenControl, token_layers
from .tuned import TunedControl

_PILOT_PATHS = 256
WAYS = ("tuned", "frozen", "both")  # of controlling a pre-trained model
_OWN = ("user", "given")  # kinds of controls that are, or hold, a user's own module


def build_control(
    problem: ControlProblem,
    chain: Chain,
    control: Any = None,
    *,
    seed: int = 0,
    scale_langevin: bool = True,
    feedback: AffineFeedback | None = None,
) -> Control:
    """The control to train: ``control`` if given, else a tuned copy of the model, else the default network.

    Args:
        control: an nn.Module; or one of :data:`WAYS` of controlling a pre-trained model: "tuned", a copy of it;
            "frozen", the model as it is and a small network beside it that sees the reward at the denoised state (of
            tokens: the default network);
            "both", that network beside a tuned copy.
        scale_langevin: whether the default network's Langevin term is scaled down where the reward is steep (at the
            price of 256 calls of its gradient).
        feedback: what the default network begins with; None: with no control.

    Raises:
        TypeError, ValueError: a module of the wrong output size, shape or dtype.
    """
    if isinstance(control, str):
        main = _of_model(problem, chain, control, derive_seed(seed, Place.REWARD_NETWORK))
    elif control is not None:
        main = as_control(problem, chain.main, control)
    elif problem.reference.trainable:
        main = TunedControl(problem.reference)  # type: ignore[arg-type]
    else:
        place = derive_seed(seed, Place.CONTROL_NETWORK)
        main = _network(problem, chain, place, scale_langevin=scale_langevin, feedback=feedback)
    if not chain.start or isinstance(main, StartedControl):
        return main
    place = derive_seed(seed, Place.CONTROL_START)
    if problem.reference.state_dtype is not None:
        return StartedControl(TokenControl.of(problem, token_layers(problem), place), main)
    law = problem.initial
    scales = Scales(law.mean, law.variance.sqrt().clamp(min=1e-12))
    architecture = Architecture(**asdict(layers_for(problem)), start=True)
    return StartedControl(DefaultControl.of(problem, architecture, scales, seed=place), main)


def continued(problem: ControlProblem, chain: Chain, given: Any, *, seed: int = 0) -> Any:
    """A copy of what a user gives to be trained: an nn.Module, or a control that was trained before, a solution's.

    A control of the library is made anew for this problem, as files make it, with the parameters that it has. What of
    it is the problem's own (the reward and alpha of the Langevin term, the pre-trained model) is then this problem's,
    and on the same problem it is the same function. Of a learned start the process's part alone goes on where this
    problem's start is not learned; a mixture's control, and guidance by a value, stay as they are and get a network
    beside them.

    Raises:
        TypeError, ValueError: nothing in it that could be trained, or it does not fit this problem.
    """
    control = given if isinstance(given, nn.Module) else getattr(given, "control", given)
    if isinstance(control, str):
        return control
    if not isinstance(control, Control):
        return copied(control)
    if isinstance(control, StartedControl) and not chain.start:
        control = control.main
    check_shapes(problem, control)
    kinds = [(m, CONTROLS.describe(m)["kind"]) for m in control.modules() if isinstance(m, Control)]
    own = next((m for m, kind in kinds if kind in _OWN), None)
    home = chain if isinstance(control, StartedControl) else chain.main
    x, y = problem.reference.probe_states(3, problem.dtype, problem.device, seed=3), problem.draw_condition(3, 0)
    try:
        made = CONTROLS.make(CONTROLS.describe(control), Context(problem, home, copied(own)))
        load_plain_state(made, plain_state(control))
        for old, new in zip(control.modules(), made.modules()):
            if isinstance(old, MixtureControl) and isinstance(new, MixtureControl):
                new.move_law(old)
        with torch.no_grad():
            shift_function(chain, made)(chain.start, x, y)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"control: that of the other run does not fit this problem ({error})") from error
    if isinstance(made, MixtureControl) or not made.differentiable:
        made = corrected(problem, home, made, seed=seed)
    if not any(p.requires_grad for p in made.parameters()):
        raise ValueError(
            "control: that of the other run has nothing to train (particles without a control, or one that was given); "
            "start from a solution whose control was trained."
        )
    return made


def _of_model(problem: ControlProblem, chain: Chain, way: str, seed: int) -> Control:
    """The control of a pre-trained model that a user names.

    Raises:
        ValueError: an unknown name, no pre-trained model, or one without parameters that are trained.
    """
    check_name("control", way, WAYS)
    reference: Any = problem.reference
    if not reference.pretrained:
        raise ValueError(
            f"control={way!r} is for pre-trained models (generative_sde, diffusion_chain, masked_diffusion), and the "
            f"reference is a {type(reference).__name__}; leave control out for the default network."
        )
    if way != "frozen" and not reference.trainable:
        raise ValueError(
            f"control={way!r} tunes a copy of the model, and this one has no parameters to train (none at all, or all "
            "with requires_grad=False). Use control='frozen', or leave it out."
        )
    if way == "tuned":
        return TunedControl(reference)
    if reference.state_dtype is not None:
        network: Control = TokenControl.of(problem, token_layers(problem), seed)
    else:
        network = reward_network(problem, chain.main, seed)
    return network if way == "frozen" else SumControl(TunedControl(reference), network)


def corrected(problem: ControlProblem, chain: Chain, base: Control, *, seed: int = 0) -> CorrectedControl:
    """A default network beside a control that is not trained, at zero output; beside a mixture's it sees the mixture's
    ``E[x_T | x_t]``."""
    denoiser = base if isinstance(base, MixtureControl) else None
    return CorrectedControl(base, _network(problem, chain, derive_seed(seed, Place.CORRECTION), denoiser))


def _network(
    problem: ControlProblem,
    chain: Chain,
    seed: int,
    denoiser: Any = None,
    scale_langevin: bool = True,
    feedback: AffineFeedback | None = None,
) -> Control:
    """The default network, normalised by a few paths of the reference, or of the feedback that it begins with; of
    tokens, one that embeds them."""
    sde = problem.reference
    if sde.state_dtype is not None:
        return TokenControl.of(problem, token_layers(problem), seed)
    langevin = problem.has_gradient and problem.reward_function is not None and sde.continuous
    if sde.pretrained and sde.continuous:
        # a mixture's control is near the optimal one: a raw gradient of a sharp reward would throw it far off
        langevin, denoiser = langevin and denoiser is None, denoiser or sde
    with torch.no_grad():
        pilot = simulate_chain(problem, chain, _PILOT_PATHS, feedback, seed=seed)
        scales = Scales.of(problem, pilot.states.flatten(0, 1))
        scaled = langevin and scale_langevin and problem.density is None
        scale = langevin_scale(problem, pilot) if scaled else 1.0
        if isinstance(denoiser, MixtureControl):
            ends = denoiser.ends(_PILOT_PATHS, seed)
            scales = replace(scales, data_centre=ends.mean(0), data_spread=ends.std(0).clamp(min=1e-12))
        elif denoiser is not None:
            ends = pilot.states[-1]
            scales = replace(scales, data_centre=ends.mean(0), data_spread=floored(ends.std(0)))
    affine = (  # is the optimal control, in x
        sde.as_linear() is sde
        and isinstance(problem.reward_function, (Quadratic, Linear, type(None)))
        and isinstance(problem.running_cost_function, (QuadraticCost, type(None)))
    )
    architecture = Architecture(
        **asdict(layers_for(problem)),
        langevin=langevin,
        langevin_scale=scale,
        radial_basis=not affine,
        denoised=denoiser is not None,
    )
    network = DefaultControl.of(problem, architecture, scales, denoiser, seed)
    if feedback is not None:
        network.follow(chain, feedback)
    return network
