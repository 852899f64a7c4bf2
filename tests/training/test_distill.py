"""``sc.distill``: a control's shifts learned by one tuned copy of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import F64, slow_but
from torch import Tensor, nn

import sdecontrol as sc
from sdecontrol.controls.tuned import TunedControl
from sdecontrol.evaluation.solution import Solution
from sdecontrol.methods.base import Run
from sdecontrol.methods.distillation import Distillation

RUN: dict[str, Any] = {"seed": 0, "progress": False}
STEPS = 20  # more than the steps of one gradient


class Model(nn.Module):
    """Linear in its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7, 0.2, 0.0], dtype=F64))

    def forward(self, x: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        more = 0.0 if y is None else 0.1 * y[:, None].to(x)
        return self.w[0] * x + self.w[1] * torch.tanh(x) + self.w[2] * s[:, None] + more


def reward(x: Tensor, y: Tensor | None = None) -> Tensor:
    return x.sum(1) if y is None else x.sum(1) * y


def problem(**more: Any) -> sc.ControlProblem:
    return sc.ControlProblem(sc.generative_sde(Model(), sc.VP(), shape=(2,)), reward=reward, **more)


def tuned(p: sc.ControlProblem) -> Solution:
    """A control that a tuned copy can be."""
    model = Model()
    with torch.no_grad():
        model.w.add_(torch.tensor([0.1, -0.15, 0.3]))
    return Solution(p, TunedControl(p.reference, model), method="mine", settings={"time_steps": STEPS, "scheme": None})


@pytest.mark.slow
@pytest.mark.parametrize("paths", slow_but(["teacher", "student", "both"], "teacher"))
def test_a_copy_that_can_be_the_control_becomes_it(paths: str) -> None:
    teacher = tuned(problem())
    student = sc.distill(teacher, paths=paths, iterations=500, learning_rate=2e-2, **RUN)
    assert torch.allclose(student.model.w, teacher.model.w, atol=2e-3)  # type: ignore[arg-type]
    assert isinstance(student.model, Model) and student.history[-1]["loss"] < 1e-4 * student.history[0]["loss"]


def test_every_round_draws_the_paths_of_the_student_as_it_then_is() -> None:
    p = problem()
    run = Run(p, p.chain(STEPS), batch_size=64, accumulate=1, seed=0)
    method = Distillation(tuned(p).control, paths="student", num_paths=64)
    state: Any = method.setup(run)
    method.step(state, run)
    first = state.stored[0]
    with torch.no_grad():
        state.control.model.w.add_(0.1)
    run.iteration = round(1.25 * STEPS)  # the next round's first: each state is used 1.25 times
    method.step(state, run)
    assert state.round == 1 and torch.equal(state.behaviour.model.w, state.control.model.w)
    assert state.stored[0].shape == first.shape and not torch.equal(state.stored[0], first)


def test_of_both_every_second_batch_is_of_the_student() -> None:
    p, stored = problem(), {}
    for paths in ("teacher", "student", "both"):
        run = Run(p, p.chain(STEPS), batch_size=64, accumulate=1, seed=0)
        method = Distillation(tuned(p).control, paths=paths, num_paths=256)
        state: Any = method.setup(run)
        method.step(state, run)
        stored[paths] = [part.unflatten(1, (4, 64)) for part in state.stored[:2]]
    for both, teacher, student in zip(*(stored[name] for name in ("both", "teacher", "student"))):
        assert torch.equal(both[:, ::2], teacher[:, ::2]) and torch.equal(both[:, 1::2], student[:, 1::2])
    assert not torch.equal(stored["teacher"][0], stored["student"][0])


@pytest.mark.parametrize("paths", ["teacher", "student"])
def test_the_loss_is_the_divergence_of_the_two_path_laws(paths: str) -> None:
    """While the student is the reference: KL(P^teacher || Q0) or KL(Q0 || P^teacher); mean over draws of the steps."""
    teacher = tuned(problem())
    history = sc.distill(teacher, paths=paths, iterations=60, batch_size=4096, learning_rate=1e-9, **RUN).history
    found = sum(m["loss"] for m in history) / len(history)
    if paths == "teacher":
        kl = teacher.evaluate(8192, seed=5, confirm=False).kl.value
    else:
        drawn = sc.simulate(teacher.problem, 8192, time_steps=STEPS, seed=5)
        kl = -float(drawn.log_ratio(teacher.control).detach().mean())
    assert found == pytest.approx(kl, rel=0.05)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_stopped_run_resumes_to_the_same_bits_within_a_round(tmp_path: Any, accumulate: int) -> None:
    how: dict[str, Any] = {"iterations": 9, "batch_size": 4096, "accumulate": accumulate, "checkpoint_every": 2, **RUN}
    teacher = tuned(problem())
    whole = sc.distill(teacher, **how)

    class Stop:
        def on_step_end(self, state: Any) -> None:
            if state.iteration == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sc.distill(teacher, checkpoint_dir=tmp_path, callbacks=[Stop()], **how)
    again = sc.distill(teacher, checkpoint_dir=tmp_path, resume=True, **how)
    assert torch.equal(again.model.w, whole.model.w) and again.history[-1]["loss"] == whole.history[-1]["loss"]  # type: ignore[arg-type]


def test_guidance_becomes_one_network_that_asks_for_no_reward() -> None:
    """Data that are standard normal under the model and a linear reward: Tweedie's value is exact but for its level,
    and its control is one that a shift of the prediction by ``-std mu g`` makes."""
    calls, g = [], torch.tensor([1.0, -0.5], dtype=F64)

    class Flat(nn.Module):  # E[eps | x] = std x of standard normal data
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, dtype=F64))

        def forward(self, x: Tensor, s: Tensor) -> Tensor:
            std, mu = sc.VP().std(s)[:, None], sc.VP().mu(s)[:, None]
            return std * x + std * mu * self.w

    def counted(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x @ g

    p = sc.ControlProblem(sc.generative_sde(Flat(), sc.VP(), shape=(2,)), reward=counted)
    guided = sc.solve(p, sc.ValueGuidance("tweedie"), time_steps=20, seed=0)
    one = sc.distill(guided, iterations=400, batch_size=64, learning_rate=0.1, **RUN)
    calls.clear()
    one.sample(64, seed=1)
    assert not calls and torch.allclose(one.model.w, -g, atol=5e-3)  # type: ignore[arg-type]


@pytest.mark.slow
def test_conditions_and_learned_starts_are_learned_too() -> None:
    p = problem(condition=lambda n, seed=None: 1.0 + torch.arange(n) % 2, start="controlled")
    teacher = sc.solve(p, "reward-backprop", time_steps=8, iterations=30, batch_size=64, control="tuned", **RUN)
    one = sc.distill(teacher, iterations=300, batch_size=64, learning_rate=2e-2, **RUN)
    assert one.history[-1]["loss"] < 0.1 * one.history[0]["loss"]


def test_the_default_network_learns_where_there_is_no_model_to_tune() -> None:
    sde = sc.LinearSDE(-torch.eye(2), 1.0)
    p = sc.ControlProblem(sde, reward=sc.Linear(torch.ones(2)), initial=sc.Dirac(torch.zeros(2)))
    exact = sc.solve(p, sc.ValueGuidance(sc.exact_solution(p).value), time_steps=10, seed=0)
    one = sc.distill(exact, iterations=300, **RUN)
    assert one.history[-1]["loss"] < 1e-3 * one.history[0]["loss"]


def test_what_has_no_control_to_learn_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="solution must be what solve returns, got Model"):
        sc.distill(Model())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the samples of best-of-n come from no control"):
        sc.distill(sc.solve(problem(), sc.BestOfN(2), time_steps=4, seed=0))
    with pytest.raises(ValueError, match="unknown paths 'theirs'"):
        sc.distill(tuned(problem()), paths="theirs")


@pytest.mark.slow
def test_no_step_of_a_distillation_moves_the_path_law_by_more_than_the_bound():
    """With a learning rate of 10 the first whole step is many nats."""
    problem = sc.ControlProblem(
        sc.generative_sde(
            sc.fit_score(torch.arange(128.0).reshape(64, 2).sin(), sc.VP(), iterations=1, seed=0, progress=False),
            sc.VP(),
            shape=(2,),
        ),
        reward=sc.Quadratic(torch.eye(2)),
        alpha=1.0,
    )
    guided = sc.solve(problem, sc.ValueGuidance("tweedie"), time_steps=8, seed=0)
    steps = {}
    for bound in (0.01, 1e9):
        found = sc.distill(
            guided, iterations=3, batch_size=64, seed=0, progress=False, learning_rate=10.0, max_kl_step=bound
        )
        steps[bound] = max(entry["kl_step"] for entry in found.history)
    assert 0 < steps[0.01] <= 0.01 < 1 < steps[1e9]
