"""Where no method is named: ``solve`` takes recommend's first choice and ``compare`` its first three, on every kind of
problem."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import F64, but_slow, random_lq
from torch import Tensor, nn

import sdecontrol as sc
from sdecontrol.chains.categorical import CategoricalChain

VOCABULARY, LENGTH = 3, 2


class Noise(nn.Module):
    """A noise prediction to be tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return self.layer(x)


class Tilts(nn.Module):
    """A control of tokens: tilts that know neither time nor state."""

    def __init__(self) -> None:
        super().__init__()
        self.tilt = nn.Parameter(torch.zeros(LENGTH, VOCABULARY))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.tilt.expand(len(x), LENGTH, VOCABULARY)


def reward(x: Tensor) -> Tensor:
    return -(x - 1).square().flatten(1).sum(1)


def tokens() -> sc.ControlProblem:
    table = torch.randn(4, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    start = torch.zeros(LENGTH, dtype=torch.int64)
    chain = CategoricalChain(lambda k, x: table[k].expand(len(x), LENGTH, VOCABULARY), 4, VOCABULARY, start)
    return sc.ControlProblem(chain, reward=lambda x: x.sum(1).to(torch.float32), alpha=0.5)


def pretrained(model: Any) -> sc.ControlProblem:
    return sc.ControlProblem(sc.generative_sde(model, sc.VP(), shape=(2,)), reward=reward, alpha=1.0)


def mixture() -> sc.GaussianMixture:
    return sc.GaussianMixture(torch.tensor([0.6, 0.4]), torch.tensor([[-1.5, 0.0], [1.5, 0.5]]), 0.1)


def simulator() -> sc.ControlProblem:
    chain = sc.discrete_dynamics(lambda x, w, k: x + 0.3 * w, steps=4, dim=2, noises=2)
    return sc.ControlProblem(chain, initial=sc.Dirac(torch.zeros(2)), reward=lambda x: reward(x).detach(), alpha=0.5)


def discrete() -> sc.ControlProblem:
    chain = sc.diffusion_chain(Noise(), torch.linspace(0.99, 0.1, 10), shape=(2,), steps=5)
    return sc.ControlProblem(chain, reward=reward, alpha=1.0)


#: problem, what solve is given beside it, and a control where there is no default
KINDS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "linear-quadratic": (lambda: random_lq(2), {"time_steps": 4}, None),
    "simulator": (simulator, {}, None),
    "mixture": (lambda: pretrained(mixture()), {"time_steps": 4}, None),
    "model": (lambda: pretrained(Noise()), {"time_steps": 4}, None),
    "discrete model": (discrete, {}, None),
    "density": (lambda: sc.gibbs_problem(lambda x: -x.square().sum(1) / 2, 2, scale=1.0), {}, None),
    "tokens": (tokens, {}, None),
    "tokens with a control": (tokens, {}, Tilts),
}


@pytest.mark.parametrize("kind", but_slow(KINDS, "mixture", "model", "discrete model"))
def test_solve_takes_the_first_choice_on_every_kind_of_problem(kind: str, tmp_path) -> None:
    make, settings, control = KINDS[kind]
    problem, more = make(), {} if control is None else {"control": control()}
    advice = sc.recommend(problem, **more, **settings, batch_size=64)
    trains = {"iterations": 1} if advice[0].method.default_iterations else {}
    solution = sc.solve(problem, batch_size=64, seed=0, progress=False, **settings, **more, **trains)
    assert solution.method == advice[0].method.name and solution.details["reason"] == advice[0].reason
    assert solution.sample(64, seed=1).shape == (64, *problem.event_shape)
    if kind == "linear-quadratic":
        solution.save(tmp_path)
        assert sc.load(tmp_path, problem).details["reason"] == advice[0].reason
    named = {"density": "auto", "tokens": "log-variance"}.get(kind)
    assert named is None or solution.method == named


def test_a_control_asks_for_a_method_that_trains_it() -> None:
    """A density's first choice is auto, which trains no control of the user's."""
    problem = KINDS["density"][0]()
    net = sc.solve(problem, "log-variance", time_steps=4, iterations=1, batch_size=64, seed=0).control
    again = sc.solve(problem, control=net, time_steps=4, iterations=1, batch_size=64, seed=0)
    assert again.method == sc.recommend(problem, control=net)[0].method.name != "auto"


def test_the_choice_is_printed_with_its_reason_where_progress_is(capsys) -> None:
    problem = random_lq(2)
    (method, reason), *_ = ((s.method.name, s.reason) for s in sc.recommend(problem, time_steps=4, batch_size=64))
    run = {"time_steps": 4, "iterations": 1, "batch_size": 64, "seed": 0}
    sc.solve(problem, progress=True, **run)
    assert capsys.readouterr().err.count(f"{method}, chosen by recommend: {reason}\n") == 1
    sc.solve(problem, progress=False, **run)
    named = sc.solve(problem, method, progress=True, **run)
    assert "chosen" not in capsys.readouterr().err and "reason" not in named.details


def test_choosing_draws_nothing_from_the_global_generator_and_changes_no_result() -> None:
    problem = random_lq(2, dtype=F64)
    run: dict[str, Any] = {"time_steps": 4, "iterations": 2, "batch_size": 64, "progress": False}
    torch.manual_seed(3)
    chosen = sc.solve(problem, **run)
    torch.manual_seed(3)
    named = sc.solve(problem, chosen.method, **run)
    assert chosen.seed == named.seed and torch.equal(chosen.sample(64, seed=1), named.sample(64, seed=1))


def test_compare_puts_the_first_three_side_by_side() -> None:
    problem = random_lq(2)
    advice = sc.recommend(problem, time_steps=4, batch_size=64)
    table = sc.compare(problem, time_steps=4, iterations=1, batch_size=64, n=64, seed=0)
    assert [row.method for row in table.rows] == advice.methods[:3]
    assert [row.chosen for row in table.rows] == [s.reason for s in advice][:3]
    assert all(f"{row.label}, chosen by recommend: {row.chosen}" in str(table) for row in table.rows)
    named = sc.compare(problem, [advice[0].method], time_steps=4, iterations=1, batch_size=64, n=64, seed=0)
    assert named.rows[0].chosen is None and "chosen" not in str(named)
