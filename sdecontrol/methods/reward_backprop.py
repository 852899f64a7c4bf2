"""``RewardBackprop``: the gradient of the objective through the simulation (tutorial Algorithm 2, [22])."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..chains.relaxed import RelaxedMasking
from ..chains.shifts import shift_function
from ..controls.base import Control
from ..controls.reward_network import SumControl
from ..controls.tuned import TunedControl
from ..errors import NotDifferentiable, check_name
from ..paths.continuous_adjoint import CONTINUOUS_MODES, backpropagate_continuous, check_continuous
from ..paths.gradients import GRADIENT_MODES, Objective, backpropagate
from ..paths.integrator import integrate
from ..problems.differentiability import JUMPS, gradient_fault, missing_relaxations, process_states
from ..problems.problem import ControlProblem
from ..randomness import Place, generator_for
from ..shapes import StatePaths
from ..tensors import check_positive
from .base import (
    ControlState,
    Method,
    Run,
    Visited,
    few_of,
    gradient_free,
    metrics_of,
    named_means,
    not_differentiable,
    parameters_of,
    register,
    spread,
)

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
        temperature: of a masked diffusion, whose steps are made differentiable by the Gumbel-softmax relaxation
            (:mod:`~sdecontrol.chains.relaxed`; Wang et al. 2410.13643 go through the last steps of it). The model must
            take probabilities of tokens ``(batch, *shape, V+1)`` in the place of tokens, as the default one does, and
            the reward those of the V tokens: :class:`OneHot`. The gradient is biased, less at a lower temperature, at
            which it has more noise.
        straight_through: run the chain's own tokens, with the slopes of relaxed ones, for rewards and models that
            mean something at one-hot tokens alone; what it reports is then the chain's. False: relaxed tokens, with the
            gradient of their own objective, less biased at the same temperature.
    """

    anneals: ClassVar[bool] = True
    reference_steps: ClassVar[bool] = False
    fixed_target: ClassVar[bool] = False
    masked_tokens: ClassVar[bool] = True
    gradient: str | int = "full"
    temperature: float = 0.2
    straight_through: bool = False

    needs_gradient: ClassVar[bool] = True
    splits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.gradient, str):
            check_name("gradient", self.gradient, _MODES)
        elif isinstance(self.gradient, bool) or not isinstance(self.gradient, int) or self.gradient < 1:
            raise ValueError(
                f"gradient must be one of {', '.join(_MODES)} or a number of last steps >= 1, got {self.gradient!r}."
            )

        check_positive("temperature", self.temperature)

    def check(self, problem: ControlProblem) -> None:
        super().check(problem)
        if problem.reference.state_dtype is None:
            return
        if self.gradient in CONTINUOUS_MODES:
            raise ValueError(f"gradient={self.gradient!r} is for SDEs, and tokens have steps; use 'full' or 'adjoint'.")
        if missing := missing_relaxations(problem):
            raise not_differentiable(self.name, problem, missing)

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
        relaxed = self._relaxed(run)
        x = x if relaxed is None else relaxed.relaxed(x)
        try:
            fault = gradient_fault(lambda z: control.at(z, z.new_tensor(t), y), x, values=relaxed is None)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if relaxed is None:
                raise
            fault = f"called with probabilities of tokens {tuple(x.shape)} it says: {error}"
        if fault is not None and fault != JUMPS:
            raise NotDifferentiable(
                f"{self.name} differentiates the control by the state, and cannot here: {fault}. Use adjoint-matching, "
                f"which does not, or one of {', '.join(gradient_free(run.problem))}; or mend the control."
            )

    def _relaxed(self, run: Run) -> RelaxedMasking | None:
        """The chain with differentiable steps, where the problem's has none."""
        if run.problem.reference.state_dtype is None:
            return None
        return RelaxedMasking(run.chain, self.temperature, self.straight_through)  # type: ignore[arg-type]

    def _visited(self, run: Run, control: Control, states: StatePaths | None) -> Visited:
        """The states of a few paths of this iteration, drawn again where they were not kept."""
        batch = run.batch()
        few = spread(len(batch.x0), few_of(len(batch.x0)))
        y = None if batch.condition is None else batch.condition[few]
        if states is None:
            noise = [batch.noise[k][few] for k in range(run.chain.steps)]
            with torch.no_grad():
                paths = integrate(run.chain, batch.x0[few], noise, shift_function(run.chain, control), condition=y)
            states = paths.states
        return Visited(states, y)

    def step(self, state: ControlState, run: Run) -> dict[str, float]:
        problem, relaxed = run.problem, self._relaxed(run)
        chain: Any = relaxed or run.chain
        parameters = parameters_of(state)
        found, seen = [], []
        for part in range(run.accumulate):
            batch = run.batch(part)

            def terminal(x: Tensor, y: Tensor | None = batch.condition) -> Tensor:
                reward, several = problem.rewards(chain.decode(x, y), y)
                seen.append((reward.detach(), several, y))
                return -reward / problem.alpha

            backward: Any = backpropagate_continuous if self.gradient in CONTINUOUS_MODES else backpropagate
            options: dict[str, Any] = {"parameters": parameters, "mode": self.gradient}
            if self.gradient == "random":
                generator = generator_for("cpu", run.seed, Place.BACKPROP_TRUNCATION, run.iteration, part)
                options["truncation"] = float(torch.rand((), generator=generator, dtype=torch.float64))
            few = None if part else spread(len(batch.x0), few_of(len(batch.x0)))
            common = {"condition": batch.condition, "weight": 1 / run.accumulate, "seen": few}
            objective = Objective(terminal, problem.running_cost_or_none, problem.alpha, **common)
            start = batch.x0 if relaxed is None else relaxed.relaxed(batch.x0)
            found.append(backward(chain, state.control, start, batch.noise, objective, **options))
        states = found[0].states
        if relaxed is not None and states is not None:
            states = relaxed.nearest(states)
        run.descend(self._visited(run, state.control, states))
        terminals, costs, kls = map(torch.cat, zip(*((c.terminal, c.cost, c.kl) for c in found)))
        # relaxed tokens have no likelihood, and so no lower bound of log Z
        ratios = [] if relaxed is not None else [c.log_ratio for c in found if c.log_ratio is not None]
        ratio = torch.cat(ratios) if ratios else None
        metrics = metrics_of(-problem.alpha * terminals, costs, kls, problem.alpha, ratio)
        return {**metrics, **named_means(problem, seen)}
