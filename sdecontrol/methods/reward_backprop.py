"""``RewardBackprop``: the gradient of the objective through the simulation (tutorial Algorithm 2, [22])."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..chains.shifts import shift_function
from ..controls.base import Control
from ..controls.reward_network import SumControl
from ..controls.tuned import TunedControl
from ..errors import NotDifferentiable, check_name
from ..paths.continuous_adjoint import CONTINUOUS_MODES, backpropagate_continuous, check_continuous
from ..paths.gradients import GRADIENT_MODES, Objective, backpropagate
from ..paths.integrator import integrate
from ..problems.differentiability import JUMPS, gradient_fault, process_states
from ..randomness import Place, generator_for
from ..shapes import StatePaths
from .base import ControlState, Method, Run, Visited, few_of, gradient_free, metrics_of, parameters_of, register

_MODES = (*GRADIENT_MODES, *CONTINUOUS_MODES)


@register
@dataclass(frozen=True)
class RewardBackprop(Method):
    """Minimise ``E_{P^u}[-R/alpha + sum_k |c_k|^2/2]`` by its pathwise gradient, on differentiable paths of P^u.

    It is the relative entropy KL(P^u || Q_fine) less log Z; reference: tutorial Algorithm 2 and eq. [22].

    Args:
        gradient: how the gradient goes through the simulation. "full": ordinary backpropagation. "checkpoint": the same
            gradient with segments recomputed. "adjoint": the same gradient by the exact adjoint of the chain, memory of
            one step's graph (of a part of the paths, where that is large). "random": the adjoint through a random
            number of last steps, drawn in every iteration as AlignProp does (Prabhudesai et al. 2310.03739), weighted
            so that it is unbiased: half the backward pass, more noise. An integer K: through the last K steps only
            (DRaFT-K, Clark et al. 2309.17400): cheaper, biased. "continuous-adjoint": the adjoint equation solved
            backwards by torchsde (Li et al. 2001.01328): memory independent of the number of steps; biased by the
            discretisation, of order 1 in the step for additive noise and 1/2 otherwise, more so for strongly
            contracting drifts. "reversible-heun": an algebraically reversible scheme with its adjoint (Kidger et al.
            2105.13493): the same memory, the exact gradient of that scheme's own cost. Both replace sums over steps by
            integrals, need scheme="euler", and are slower than "adjoint".
    """

    anneals: ClassVar[bool] = True
    reference_steps: ClassVar[bool] = False
    fixed_target: ClassVar[bool] = False
    gradient: str | int = "full"

    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.gradient, str):
            check_name("gradient", self.gradient, _MODES)
        elif isinstance(self.gradient, bool) or not isinstance(self.gradient, int) or self.gradient < 1:
            raise ValueError(
                f"gradient must be one of {', '.join(_MODES)} or a number of last steps >= 1, got {self.gradient!r}."
            )

    def setup(self, run: Run) -> nn.Module:
        if self.gradient in CONTINUOUS_MODES:
            check_continuous(run.chain, str(self.gradient))
        state = super().setup(run)
        # the differences of a tuned copy that is still near the model are rounding
        if run.control is not None and not isinstance(run.control, (str, TunedControl, SumControl)):
            self._check_control(run, state.control)  # type: ignore[arg-type]
        return state

    def _check_control(self, run: Run, control: Control) -> None:
        """The gradient goes through a control of the user's by its states too, from step to step.

        Raises:
            NotDifferentiable: it has no gradient by them, or another than its values have.
        """
        t, x = process_states(run.problem)[0]
        y = run.problem.draw_condition(len(x), 1)
        fault = gradient_fault(lambda z: control.at(z, z.new_tensor(t), y), x)
        if fault is not None and fault != JUMPS:
            raise NotDifferentiable(
                f"{self.name} differentiates the control by the state, and cannot here: {fault}. Use adjoint-matching, "
                f"which does not, or one of {', '.join(gradient_free(run.problem))}; or mend the control."
            )

    def _visited(self, run: Run, control: Control, states: StatePaths | None) -> Visited:
        """The states of this iteration, drawn again for a few paths where they were not kept."""
        batch = run.batch()
        if states is None:
            few = slice(few_of(run.batch_size))
            noise, y = [batch.noise[k][few] for k in range(run.chain.steps)], batch.condition
            y = None if y is None else y[few]
            with torch.no_grad():
                paths = integrate(run.chain, batch.x0[few], noise, shift_function(run.chain, control), condition=y)
            return Visited(paths.states, y)
        return Visited.of(states, batch.condition)

    def step(self, state: ControlState, run: Run) -> dict[str, float]:
        problem, chain = run.problem, run.chain
        parameters = parameters_of(state)
        found = []
        for part in range(run.accumulate):
            batch = run.batch(part)

            def terminal(x: Tensor, y: Tensor | None = batch.condition) -> Tensor:
                return -problem.reward(chain.decode(x, y), y) / problem.alpha

            backward: Any = backpropagate_continuous if self.gradient in CONTINUOUS_MODES else backpropagate
            options: dict[str, Any] = {"parameters": parameters, "mode": self.gradient}
            if self.gradient == "random":
                generator = generator_for("cpu", run.seed, Place.BACKPROP_TRUNCATION, run.iteration, part)
                options["truncation"] = float(torch.rand((), generator=generator, dtype=torch.float64))
            objective = Objective(
                terminal, problem.running_cost_or_none, problem.alpha, batch.condition, weight=1 / run.accumulate
            )
            found.append(backward(chain, state.control, batch.x0, batch.noise, objective, **options))
        run.descend(self._visited(run, state.control, found[0].states))
        terminals, costs, kls = map(torch.cat, zip(*((c.terminal, c.cost, c.kl) for c in found)))
        ratios = [c.log_ratio for c in found if c.log_ratio is not None]
        return metrics_of(-problem.alpha * terminals, costs, kls, problem.alpha, torch.cat(ratios) if ratios else None)
