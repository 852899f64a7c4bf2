"""``recommend``: what it says of what a problem offers, and (slow) whether measured figures bear it out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import nonlinear, random_lq

import sdecontrol as sc
import sdecontrol.comparison.compare as compare_room
from sdecontrol.methods.base import METRICS, Suggestion


def mixture(reward=None) -> sc.ControlProblem:
    law = sc.GaussianMixture(torch.tensor([0.6, 0.4]), torch.tensor([[-1.5, 0.0], [1.5, 0.5]]), 0.1)
    reward = sc.Quadratic(0.3 * torch.eye(2), torch.tensor([1.0, 0.5])) if reward is None else reward
    return sc.ControlProblem(sc.generative_sde(law, sc.VP(), shape=(2,)), reward=reward, alpha=0.7)


def black_box(problem: sc.ControlProblem) -> sc.ControlProblem:
    reward = problem.reward_function
    return sc.ControlProblem(
        problem.reference, problem.initial, lambda x: reward(x).detach(), alpha=problem.alpha, start=problem.start
    )


def black_box_with_cost(problem: sc.ControlProblem) -> sc.ControlProblem:
    blind = black_box(problem)
    return sc.ControlProblem(
        blind.reference,
        blind.initial,
        blind.reward_function,
        problem.running_cost_function,
        problem.alpha,
        problem.start,
    )


def test_with_a_gradient_and_without() -> None:
    with_gradient, without = sc.recommend(random_lq(running=False)), sc.recommend(black_box(random_lq(running=False)))
    assert with_gradient[0].method == sc.AdjointMatching()
    assert not any(m.needs_gradient for m in without.methods) and len(without) == 4
    assert "black box" in str(without) and "closed form" in str(with_gradient)
    assert all(s.reason for s in (*with_gradient, *without))
    assert "modes" in str(with_gradient) and "modes" in str(without)


class Zero(torch.nn.Module):
    """A control of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.gain * x


def test_a_network_of_ones_own_is_guided_first_then_tuned() -> None:
    """The density ratio first, with a gradient or without, unless a control of one's own is to be trained; then the
    objective's gradient. A model in closed form, which has nothing to train, is begun with its mixture."""
    net = sc.fit_score(torch.arange(128.0).reshape(64, 2).sin(), sc.VP(), iterations=1, seed=0, progress=False)
    problem = sc.ControlProblem(
        sc.generative_sde(net, sc.VP(), shape=(2,)), reward=sc.Quadratic(torch.eye(2)), alpha=0.7
    )
    advice = sc.recommend(problem, time_steps=20)
    assert advice.methods[:2] == [sc.ValueGuidance("ratio"), sc.RewardBackprop()]
    assert "sc.distill" in advice[0].reason
    assert sc.recommend(black_box(problem), time_steps=20).methods[0] == sc.ValueGuidance("ratio")
    given = sc.recommend(problem, time_steps=20, control=Zero())
    assert all(m.takes_control for m in given.methods) and given[0].method == sc.RewardBackprop()
    assert sc.recommend(mixture()).methods[0] == sc.ParticleMatching()


class Wide(torch.nn.Module):
    """A noise prediction whose call takes ``8 width + 2 width^2`` floating-point operations a row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.body = torch.nn.Linear(2, width), torch.nn.Linear(width, width)
        self.out = torch.nn.Linear(width, 2)

    def forward(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return 1e-3 * self.out(self.body(self.into(x)).tanh())


def wide(width: int = 8) -> sc.ControlProblem:
    torch.manual_seed(0)
    sde = sc.generative_sde(Wide(width), sc.VP(), prediction="noise", shape=(2,))
    return sc.ControlProblem(sde, reward=sc.Quadratic(torch.eye(2)), alpha=0.7)


def test_of_an_expensive_model_a_small_network_is_trained_or_a_value_fitted_to_fewer_paths() -> None:
    """By floating-point operations, of which there are as many as the layers' sizes say, on any machine; with a
    gradient and without; the line is where paths of the reference take as many as they may."""
    problem, steps = wide(), 20
    one = steps * (8 * 8 + 2 * 8**2)
    enough = sc.recommend(problem, time_steps=steps, work=16384 * one)
    assert enough.methods[:2] == [sc.ValueGuidance("ratio"), sc.RewardBackprop()] and not enough[0].settings
    assert f"takes {one:.2g} floating-point operations" in str(enough)
    less = sc.recommend(problem, time_steps=steps, work=16384 * one - 1)
    assert less.methods[:3] == [
        sc.RewardBackprop(),
        sc.ValueGuidance("ratio", num_paths=8192),
        sc.RewardBackprop(),
    ]
    assert less[0].settings == {"control": "frozen", "batch_size": 64} and not less[2].settings
    assert "control='frozen'" in str(less) and f"{16384 * one:.2g} floating-point" in less[0].reason
    blind = sc.recommend(black_box(problem), time_steps=steps, work=2047 * one)
    assert blind.methods[0] == sc.ValueGuidance("ratio", num_paths=1024)
    none = sc.recommend(black_box(problem), time_steps=steps, work=1023 * one)
    assert not any(isinstance(m, sc.ValueGuidance) for m in none.methods)


def test_solve_takes_the_settings_of_what_is_recommended_unless_others_are_given(monkeypatch) -> None:
    seen: list[tuple[str, int]] = []

    def step(self, state, run) -> dict[str, float]:
        seen.append((type(state.control).__name__, run.batch_size))
        return dict.fromkeys(("loss", *METRICS), 0.0)

    monkeypatch.setattr(sc.RewardBackprop, "step", step)
    problem, more = wide(2800), {"time_steps": 4, "iterations": 1, "seed": 0, "progress": False}
    solution = sc.solve(problem, **more)
    sc.solve(problem, batch_size=192, **more)
    sc.solve(problem, control="tuned", **more)
    sc.solve(problem, "reward-backprop", **more)
    assert seen == [("RewardNetwork", 64), ("RewardNetwork", 192), ("TunedControl", 256), ("TunedControl", 256)]
    assert "floating-point operations" in solution.details["reason"]


def test_compare_takes_the_way_of_controlling_a_model_that_is_recommended(monkeypatch) -> None:
    """One method in two ways: two rows, told apart by their labels, each with its reason."""
    advice = [
        Suggestion(sc.RewardBackprop(), "beside it", {"control": "frozen"}),
        Suggestion(sc.RewardBackprop(), "it"),
    ]
    monkeypatch.setattr(compare_room, "suggested", lambda *_, **__: advice)
    found = sc.compare(wide(), time_steps=3, iterations=1, batch_size=64, n=64, seed=0)
    assert [row.label for row in found.rows] == ["reward-backprop, control='frozen'", "reward-backprop"]
    assert [row.chosen for row in found.rows] == ["beside it", "it"]
    kinds = [type(row.solutions[0].control).__name__ for row in found.rows]
    assert kinds == ["RewardNetwork", "TunedControl"]


def test_little_memory_means_no_graph_of_all_steps() -> None:
    advice = sc.recommend(nonlinear(), time_steps=100, memory=1e-3)
    assert [m.name for m in sc.recommend(mixture()).methods[:2]] == ["particle-matching", "socm"]
    found = {m.name: m for m in advice.methods}
    assert found["reward-backprop"].gradient == "adjoint" and 1 <= found["adjoint-matching"].steps < 100
    assert sc.recommend(nonlinear(), time_steps=100).methods[0] == sc.AdjointMatching()


def test_the_graph_s_size_is_near_what_backpropagation_keeps() -> None:
    """The estimate against all that autograd saves on one differentiable batch, each tensor once: within a factor
    1.5."""
    from sdecontrol.chains.shifts import shift_function
    from sdecontrol.comparison.recommend import backward_graph
    from sdecontrol.controls.build import build_control

    problem = random_lq(d=8)
    chain = problem.chain(20)
    estimate, _ = backward_graph(problem, chain, 256)
    control = build_control(problem, chain, seed=0)
    own = {p.data_ptr() for p in control.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in own:
            kept[x.data_ptr()] = x
        return x

    x = problem.draw_start(256, 0).requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        shift = shift_function(chain, control)
        for k in range(20):
            mean, scale = chain.kernel(k, x)
            c = shift(k, x, None)
            x = mean + (scale @ (c + torch.randn_like(c)).unsqueeze(-1)).squeeze(-1)
    measured = sum(t.numel() * t.element_size() for t in kept.values()) / 2**30
    assert measured / 1.5 < estimate < 1.5 * measured


def test_one_off_trains_nothing() -> None:
    for problem in (mixture(), black_box(mixture()), nonlinear()):
        advice = sc.recommend(problem, one_off=True, time_steps=20)
        assert len(advice) >= 3 and all(m.default_iterations == 0 for m in advice.methods)
    classifier = sc.LogProb(torch.nn.Linear(2, 3), 1)
    names = [m.name for m in sc.recommend(mixture(classifier), one_off=True).methods]
    assert "classifier-guidance" in names


def test_no_method_that_would_refuse() -> None:
    for problem in (nonlinear(), random_lq(m=3, d=2), mixture(), random_lq(start="controlled")):
        for one_off in (False, True):
            for suggestion in sc.recommend(problem, one_off=one_off, time_steps=5):
                suggestion.method.check(problem)
    assert "socm" not in [m.name for m in sc.recommend(nonlinear()).methods]


def test_a_start_that_keeps_its_law_is_named() -> None:
    assert "keeps its law" in str(sc.recommend(random_lq(start="fixed")))
    assert "keeps its law" not in str(sc.recommend(random_lq(start="controlled")))


def test_rewards_that_were_learned_or_are_missing_are_spoken_of():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=generator)
    learned = sc.fit_reward(x, x.sum(1), iterations=3, seed=0, progress=False)
    sde, start = sc.SDE(lambda x, t: -x, diffusion=1.0, dim=2), sc.Dirac(torch.zeros(2))

    def said(reward):
        return str(sc.recommend(sc.ControlProblem(sde, start, reward=reward), time_steps=5))

    assert "a reward that was learned (5 members, beta=0;" in said(learned)
    assert "a mean, right near its data alone" in said(learned) and "sc.design" in said(learned)
    assert "a bound for proposals" in said(learned.optimistic(1.0))
    assert "sc.design" not in said(learned.pessimistic(1.0)) and "was learned (" in said(learned.pessimistic(1.0))
    assert "sc.design asks for few measurements" in said(None)
    assert "learned" not in said(lambda x: x.sum(1))
    blind = dataclasses.replace(learned.calibration, order=-0.2)
    learned.calibration = blind
    assert "rank correlation -0.20 on 4 held-out rows" in said(learned)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="problem must be a ControlProblem"):
        sc.recommend(3)
    with pytest.raises(ValueError, match="memory must be > 0"):
        sc.recommend(random_lq(), memory=0)


def errors(problem: sc.ControlProblem, methods: list, column: str, **settings) -> list[float]:
    result = sc.compare(problem, methods, seed=0, n=2048, **settings)
    assert all(row.reason is None for row in result.rows), str(result)
    return [row.estimates[column].value for row in result.rows]


@pytest.mark.slow
def test_first_choice_is_among_the_best_on_a_linear_quadratic_problem() -> None:
    """Equal time on ou-quadratic-easy, by the control's error (a gap has the floor of the chain under it): with a
    gradient the first choice is ten times better than two others; without, within a factor 2 of the best."""
    problem = sc.library.named_problem("ou-quadratic-easy")
    settings = {"column": "control_error", "budget": "12s", "time_steps": 50, "batch_size": 128}
    methods = [sc.recommend(problem)[0].method, sc.RewardBackprop(), sc.LogVariance()]
    first, *others = errors(problem, methods, **settings)
    assert first < 1e-4 and first < 0.1 * min(others)
    assert not sc.recommend(black_box_with_cost(problem))[0].method.needs_gradient
    methods = [sc.recommend(black_box_with_cost(problem))[0].method, sc.SoftPPO(), sc.Reinforce()]
    first, *others = errors(problem, methods, **settings)
    assert first <= 2 * min(others)


@pytest.mark.slow
def test_first_choice_is_among_the_best_on_a_mixture() -> None:
    """Equal CPU time: with a gradient the first choice has the smallest gap of three (10 % for noise); as a black box
    within a factor 1.5 of the best of three."""
    problem = mixture()
    methods = [sc.recommend(problem)[0].method, sc.AdjointMatching(), sc.RewardBackprop()]
    first, *others = errors(problem, methods, column="gap", budget="12s", time_steps=50)
    assert first <= 1.1 * min(others)
    problem = black_box(problem)
    first, *others = errors(
        problem,
        [sc.recommend(problem)[0].method, sc.SoftPPO(), sc.RewardWeightedMLE()],
        column="gap",
        budget="12s",
        time_steps=50,
    )
    assert first <= 1.5 * min(others)
