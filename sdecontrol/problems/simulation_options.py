"""How paths are begun: states, conditions and noise, and the checks that every simulation shares."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..chains.base import Chain
from ..errors import check_name
from ..paths.integrator import KEEP
from ..randomness import Place, SeededNoise, SuppliedNoise, derive_seed
from ..shapes import States
from ..tensors import check_tensor
from .problem import ControlProblem
from .prompts import encoded


@dataclass(frozen=True)
class SimulationOptions:
    """How paths are begun and driven: arguments of :func:`simulate`."""

    keep: str = "all"
    condition: Tensor | None = None
    noise: Any = None
    antithetic: bool = False
    state: States | None = None
    step: int = 0
    tolerance: float | None = None
    chunk: int | None = None
    weigh: bool = True  # False: log-ratios are not asked for, at least not at once

    def begin(
        self, problem: ControlProblem, chain: Chain, num_paths: int, control: Any, seed: int
    ) -> tuple[States, Any]:
        """The states and conditions to begin with, and checks of the arguments that every simulation shares."""
        state, step, condition = self.state, self.step, encoded(problem.condition, self.condition)
        check_name("keep", self.keep, KEEP)
        if control is not None and not callable(control):
            raise TypeError(
                f"control must be callable (x, t) -> u, or None for the reference; got {type(control).__name__}."
            )
        if not 0 <= step < chain.steps:
            raise ValueError(f"step must be from 0 to {chain.steps - 1}, got {step}.")
        if step and state is None:
            raise ValueError("step without state: pass the states to resume from as state=paths.states[step].")
        if state is None:
            state = problem.draw_start(num_paths, seed)
        else:
            check_tensor("state", state, shape=(num_paths, *chain.event_shape), dtype=chain.state_dtype)
            chain.reference.check_states("state", state)
            state = state.clone() if state.is_inference() else state
        if condition is None:
            condition = problem.draw_condition(num_paths, seed)
        elif problem.condition is None:
            raise ValueError(
                "condition given, but the problem has none; make it with ControlProblem(..., condition=...)."
            )
        elif condition.shape[0] != num_paths:
            raise ValueError(f"condition must have {num_paths} rows, one per path; got {tuple(condition.shape)}.")
        return state, condition

    def sources(self, chain: Chain, num_paths: int, seed: int, count: int = 1) -> list[Any]:
        """The noise of this seed (or the user's); with ``count`` 2 that of the space-time integrals beside it."""
        if self.noise is None:
            shape = num_paths, chain.steps, chain.noise_shape
            like: dict[str, Any] = {"dtype": chain.times.dtype, "device": chain.times.device}
            seeds = (seed, derive_seed(seed, Place.SPACE_TIME_INTEGRALS))[:count]
            return [SeededNoise(s, *shape, antithetic=self.antithetic, **like) for s in seeds]
        if self.antithetic:
            raise ValueError("antithetic does not go with supplied noise; negate half of the noise yourself.")
        given = self.noise if isinstance(self.noise, (tuple, list)) else (self.noise,)
        if len(given) != count:
            wanted = "a pair (increments, space-time integrals)" if count == 2 else "one tensor"
            raise ValueError(f"noise for this scheme must be {wanted}.")
        shape = (chain.steps, num_paths, *chain.noise_shape)
        return [SuppliedNoise(check_tensor("noise", part, shape=shape)) for part in given]
