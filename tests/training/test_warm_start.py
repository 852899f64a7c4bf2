"""``solve(..., control=solution)``: a run goes on from another's control, of this problem or a neighbour, and leaves it
as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import random_lq
from torch import Tensor, nn

import sdecontrol as sc
from sdecontrol.controls.build import continued
from sdecontrol.controls.mixture import CorrectedControl, MixtureControl
from sdecontrol.controls.tuned import TunedControl
from sdecontrol.evaluation.solution import Solution
from sdecontrol.problems.simulate import simulate_chain

RUN: dict[str, Any] = {"batch_size": 64, "seed": 0, "progress": False}


class Noise(nn.Module):
    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, hidden), nn.SiLU(), nn.Linear(hidden, 2))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return self.body(x)


class Own(nn.Module):
    """A user's control."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x)


def reward(x: Tensor) -> Tensor:
    return -(x - 1).square().sum(1)


def steered(alpha: float = 1.0, r: Any = reward, start: str = "fixed", dim: int = 2) -> sc.ControlProblem:
    sde = sc.LinearSDE(-torch.eye(dim), 1.0)
    return sc.ControlProblem(sde, sc.Gaussian(torch.zeros(dim), torch.eye(dim)), r, alpha=alpha, start=start)


torch.manual_seed(0)
MODEL = Noise()


def tuned(alpha: float = 1.0, model: nn.Module = MODEL) -> sc.ControlProblem:
    return sc.ControlProblem(sc.generative_sde(model, sc.VP(), shape=(2,)), reward=reward, alpha=alpha)


def density(alpha: float = 1.0, scale: float = 1.0) -> sc.ControlProblem:
    return sc.gibbs_problem(lambda x: -(x - 1).square().sum(1) / alpha, 2, scale=scale, seed=0)


def sampled(alpha: float = 1.0) -> sc.ControlProblem:
    law = sc.GaussianMixture(torch.tensor([0.6, 0.4]), torch.tensor([[-1.5, 0.0], [1.5, 0.5]]), 0.1)
    return sc.ControlProblem(sc.generative_sde(law, sc.VP(), shape=(2,)), reward=reward, alpha=alpha)


def matching() -> sc.ParticleMatching:
    return sc.ParticleMatching(num_particles=64)


#: the problem at a temperature, the first method, what it is given, and the second method
KINDS: dict[str, tuple[Any, Any, Any, str]] = {
    "network": (steered, "adjoint-matching", None, "log-variance"),
    "learned start": (lambda a=1.0: steered(a, start="controlled"), "reward-backprop", None, "log-variance"),
    "tuned copy": (tuned, "reward-backprop", None, "soft-ppo"),
    "user's module": (steered, "log-variance", Own, "adjoint-matching"),
    "mixture": (density, "mixture", None, "log-variance"),
    "corrected mixture": (sampled, matching(), None, "log-variance"),
    "proposal": (steered, "proposal", None, "adjoint-matching"),
}


def first_run(kind: str) -> Solution:
    make, method, control, _ = KINDS[kind]
    more = {} if control is None else {"control": control()}
    if method == "mixture":  # as auto's solutions have it
        law = sc.GaussianMixture(torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]), 0.7)
        problem, settings = make(), {"time_steps": 4, "scheme": None}
        return Solution(problem, MixtureControl(problem, law), method="auto", settings=settings)
    if method == "proposal":
        trained = sc.solve(make(), "log-variance", time_steps=4, iterations=2, **RUN)
        return sc.solve(make(), sc.SMC(16, proposal=trained), time_steps=4, **RUN)
    return sc.solve(make(), method, time_steps=4, iterations=2, **more, **RUN)


def frozen(solution: Solution) -> tuple[dict[str, Tensor], Tensor]:
    return {n: v.clone() for n, v in solution.control.state_dict().items()}, solution.simulate(64, seed=1).end


@pytest.mark.parametrize("kind", KINDS)
def test_another_run_goes_on_from_a_solution_and_leaves_it_as_it_was(kind: str, tmp_path) -> None:
    make, _, own, method = KINDS[kind]
    first = first_run(kind)
    before, ends = frozen(first)
    assert sc.recommend(make(), control=first).methods
    again = sc.solve(make(0.5), method, control=first, time_steps=6, iterations=2, **RUN)
    after, same_ends = frozen(first)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(ends, same_ends) and first.settings["time_steps"] == 4
    moved = again.control.state_dict()
    assert any(n not in before or not torch.equal(before[n], v) for n, v in moved.items())
    again.save(tmp_path)
    loaded = sc.load(tmp_path, make(0.5), control=None if own is None else own())
    assert torch.equal(loaded.sample(64, seed=2), again.sample(64, seed=2))


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_same_problem_it_begins_as_the_same_function(kind: str) -> None:
    """Paths are those of the first solution, bit for bit; a mixture gets a network beside it, at zero output."""
    first = first_run(kind)
    begun = continued(first.problem, first.chain, first)
    assert type(begun) is (CorrectedControl if kind == "mixture" else type(first.control))
    paths = simulate_chain(first.problem, first.chain, 64, begun, seed=1)
    assert torch.equal(paths.end, first.simulate(64, seed=1).end)
    assert any(p.requires_grad for p in begun.parameters())
    shared = {p.data_ptr() for p in first.control.parameters()} & {p.data_ptr() for p in begun.parameters()}
    assert not shared


def test_a_learned_start_is_left_behind_where_the_start_is_fixed() -> None:
    first = first_run("learned start")
    again = sc.solve(steered(), "log-variance", control=first, time_steps=4, iterations=1, **RUN)
    assert type(again.control) is type(first.control.main)
    both = sc.solve(steered(start="controlled"), "log-variance", control=again, time_steps=4, iterations=1, **RUN)
    assert type(both.control) is type(first.control)


def test_a_tuned_copy_goes_on_from_its_weights() -> None:
    first, problem = first_run("tuned copy"), tuned(0.5)
    begun = continued(problem, problem.chain(6), first)
    assert isinstance(begun, TunedControl)
    assert all(torch.equal(a, b) for a, b in zip(begun.model.parameters(), first.model.parameters()))
    assert not torch.equal(next(begun.model.parameters()), next(MODEL.parameters()))


def test_a_mixture_stays_where_it_is_where_the_density_has_another_centre_and_scale() -> None:
    first, problem = first_run("mixture"), density(scale=0.5)
    begun = continued(problem, problem.chain(6), first).base
    assert not torch.allclose(begun.means, first.control.means)
    there, here = (
        (where.centre + where.scale * control.law.mean, where.scale * control.law.variance.sqrt())
        for control, where in ((first.control, first.problem), (begun, problem))
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(there, here))


def test_the_langevin_term_is_the_new_problem_s() -> None:
    """Where it is all of the control, half of alpha makes twice the control."""
    first = first_run("network")
    with torch.no_grad():
        for p in first.control.parameters():
            p.zero_()
        first.control.langevin.fill_(0.3)
    problem = steered(0.5)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    begun = continued(problem, problem.chain(4), first)
    assert torch.allclose(begun(x, 0.5), 2 * first.control(x, 0.5)) and bool(begun(x, 0.5).abs().min() > 0)


def test_over_a_sweep_of_alpha_a_warm_start_begins_higher_than_a_cold_one() -> None:
    """The first batch of 1024 paths of each run, against the same seed's cold one."""
    solution = None
    for alpha in (1.0, 0.5, 0.25):
        problem = random_lq(2, seed=1, alpha=alpha, dtype=torch.float32)
        more = {"time_steps": 5, "batch_size": 1024, "seed": 0, "progress": False}
        warm = sc.solve(problem, "adjoint-matching", control=solution, iterations=15, **more)
        cold = sc.solve(problem, "adjoint-matching", iterations=1, **more)
        error = cold.history[0]["objective_stderr"] + warm.history[0]["objective_stderr"]
        gained = warm.history[0]["objective"] - cold.history[0]["objective"]
        assert gained == 0 if solution is None else gained > 5 * error, (alpha, gained, error)
        solution = warm


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "particles without a control": (
        lambda: sc.solve(steered(), sc.SMC(16), time_steps=4, **RUN),
        steered,
        "nothing to",
    ),
    "another size": (lambda: first_run("network"), lambda: steered(r=lambda x: -x.square().sum(1), dim=3), "maps"),
    "a reward without a gradient": (
        lambda: first_run("network"),
        lambda: steered(r=lambda x: (x[:, 0] > 0).float()),
        "does not fit this problem",
    ),
    "another model": (lambda: first_run("tuned copy"), lambda: tuned(model=Noise(5)), "does not fit this problem"),
    "no model": (lambda: first_run("tuned copy"), steered, "does not fit this problem"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_on_is_refused_early(case: str) -> None:
    first, problem, words = REFUSED[case]
    with pytest.raises(ValueError, match=f"control.*{words}"):
        sc.solve(problem(), "log-variance", control=first(), time_steps=4, iterations=1, **RUN)


@pytest.mark.parametrize("method", ["value-guidance", "auto", "smc"])
def test_methods_that_train_no_control_take_none(method: str) -> None:
    first = first_run("network")
    problem = density() if method == "auto" else steered()
    with pytest.raises(ValueError, match=r"control: .* (trains no control|trains nothing), so leave control out"):
        sc.solve(problem, method, control=first, time_steps=4, **RUN)


def test_a_resumed_run_begins_with_the_same_control(tmp_path) -> None:
    first = first_run("network")
    run = {"time_steps": 4, "iterations": 4, "control": first, "checkpoint_every": 2, **RUN}
    sc.solve(steered(0.5), "log-variance", checkpoint_dir=tmp_path, **run)
    for file in tmp_path.glob("checkpoint-*4.*"):
        file.unlink()  # as if it had ended after two iterations
    resumed = sc.solve(steered(0.5), "log-variance", checkpoint_dir=tmp_path, resume=True, **run)
    whole = sc.solve(steered(0.5), "log-variance", **run)
    assert torch.equal(resumed.sample(64, seed=1), whole.sample(64, seed=1))
