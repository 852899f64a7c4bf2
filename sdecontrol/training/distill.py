"""``distill``: any control or guidance into one tuned copy of the model."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..controls.given import ZeroControl, given_control
from ..evaluation.solution import Solution
from ..methods.distillation import Distillation
from .solve import solve


def distill(
    solution: Solution,
    *,
    paths: str = "both",
    iterations: int | None = None,
    batch_size: int = 256,
    seed: int | None = None,
    control: nn.Module | Solution | str | None = None,
    learning_rate: float | None = None,
    optimizer: Any = None,
    max_kl_step: float | None = 0.5,
    accumulate: int = 1,
    budget: str | float | None = None,
    checkpoint_dir: Any = None,
    checkpoint_every: int = 100,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    progress: bool | None = None,
) -> Solution:
    """One tuned copy of the pre-trained model that does what a solution's control does: sampling then asks for no
    reward and no gradient, and ``model`` is one network in the pre-trained model's own parametrisation.

    A regression of the copy's shifts on the control's, ``E sum_k |c_k - c_k'|^2/2``, along paths that are drawn anew in
    rounds: it minimises KL(P^solution || P^copy), which ``history`` has as ``loss``, on the solution's paths, and the
    reverse on the copy's own. What it ends at can be trained further, ``solve(problem, method, control=distilled)``.

    Args:
        solution: whose control is learned, on its own chain: of value or classifier guidance, of a frozen model with a
            network beside it, of any method. Of :class:`SMC` it is the proposal's, without the particles.
        paths: "both": half of them follow the solution, half the copy, which so learns to come back from where it goes;
            "teacher" and "student": one of these alone.
        batch_size: states per gradient, spread over the steps.
        control: what learns, as in :func:`solve`; None: a tuned copy of the model, or the default network where the
            model has nothing to train.

    The other arguments are those of :func:`solve`.

    Returns:
        :class:`Solution` of the same problem, whose ``evaluate`` gives its gap.

    Raises:
        TypeError: no solution. ValueError: its samples come from no control.
    """
    if not isinstance(solution, Solution):
        raise TypeError(f"solution must be what solve returns, got {type(solution).__name__}.")
    problem = solution.problem
    teacher = given_control(problem, solution.control, "solution")
    if isinstance(teacher, ZeroControl):
        raise ValueError(
            f"solution: the samples of {solution.method} come from no control that a model could learn; "
            "sc.ParticleMatching() and sc.BridgeMatching() fit one to weighted samples."
        )
    if control is None and problem.reference.trainable:
        control = "tuned"
    return solve(
        problem,
        Distillation(teacher, paths),
        **solution.settings,
        iterations=iterations,
        batch_size=batch_size,
        seed=seed,
        control=control,
        learning_rate=learning_rate,
        optimizer=optimizer,
        max_kl_step=max_kl_step,
        accumulate=accumulate,
        budget=budget,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        resume=resume,
        callbacks=callbacks,
        progress=progress,
    )
