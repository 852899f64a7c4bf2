"""The exact solution of masked diffusions, against enumeration of the ``(V+1)^L`` states."""

import math

import pytest
import torch
from cases import F64, randn
from tokens import Joint, Net

import sdecontrol as sc


@pytest.mark.parametrize("order, steps", [("independent", 3), ("independent", 6), ("random", None)])
@pytest.mark.parametrize("net", [False, True], ids=["of a joint law", "a network"])
def test_log_z_laws_and_the_control_against_enumeration(order, steps, net):
    joint = Joint(length=3, vocabulary=2, size=1.5)
    model = Net(3, 2).requires_grad_(False) if net else joint.model
    problem = joint.problem(model, order=order, steps=steps)
    exact, chain = sc.exact_solution(problem), problem.chain()
    letters = [joint.letters(chain.model, 1 - s) for s in chain.clock[:-1]]
    plain = joint.chain_of(letters, chain.steps, order)
    assert float(exact.log_z) == pytest.approx(joint.log_z(plain), abs=1e-12)
    at = joint.at(joint.points)
    assert torch.allclose(exact.marginal(1.0).probs[at], joint.tilted(plain), atol=1e-12)
    assert float(exact.marginal(1.0).probs.sum()) == pytest.approx(1.0)
    samples = exact.sample(64, seed=0)
    assert samples.dtype == torch.int64 and bool((samples < 2).all())
    gap = joint.gap_of(problem, exact.control)
    assert float(exact.floor) == pytest.approx(gap, abs=1e-11)
    with torch.no_grad():  # no nearby tilt is better, and some are worse by far more than rounding
        for seed in range(3):
            table = 0.3 * randn(len(joint.states), 3, 2, seed=seed)
            other = lambda x, t, table=table: exact.control(x, t) + table[joint.at(x)]  # noqa: E731
            assert joint.gap_of(problem, other) > gap + 1e-4
    ev = exact.evaluate(1024, seed=1)
    assert abs(ev.gap.value - gap) < 4 * ev.gap.stderr + 1e-9


def test_in_random_order_a_consistent_model_has_no_floor_and_another_one_has():
    joint = Joint(length=3, vocabulary=2, size=1.5)
    assert abs(float(sc.exact_solution(joint.problem(order="random")).floor)) < 1e-9
    assert float(sc.exact_solution(joint.problem(Net(3, 2).requires_grad_(False), order="random")).floor) > 1e-6


@pytest.mark.slow
def test_the_floor_is_that_of_the_page_on_mathematics():
    """Four tokens of three letters: the floor falls as 1/K."""
    floors = [float(sc.exact_solution(Joint(size=1.5).problem(steps=K)).floor) for K in (8, 16, 32)]
    assert 0.4 < floors[1] / floors[0] < 0.65 and 0.4 < floors[2] / floors[1] < 0.65, floors


def test_rewards_are_asked_of_states_without_a_mask_only():
    joint = Joint(length=2, vocabulary=3)

    def reward(x):
        assert bool((x < 3).all())
        return joint.reward(x)

    problem = sc.ControlProblem(sc.masked_diffusion(joint.model, 2, 3, steps=3, dtype=F64), reward=reward)
    exact = sc.exact_solution(problem)
    assert math.isfinite(float(exact.log_z)) and exact.value(joint.states, 0.0).isfinite().all()
    start = torch.full((1, 2), 3)
    assert exact.kernel(start, 0).probs.shape == (1, 16) and exact.bridge(0.5, 1.0, joint.points).probs.shape == (9, 16)
    with pytest.raises(ValueError, match="x has tokens from 4 to 4"):
        exact.value(start + 1, 0.0)


def test_one_masked_position_is_solved_too():
    joint = Joint(length=1, vocabulary=3, size=2.0)
    exact = sc.exact_solution(joint.problem(steps=2))
    assert abs(float(exact.floor)) < 1e-12 and abs(exact.evaluate(64, seed=0).gap.value) < 1e-12
