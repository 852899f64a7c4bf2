"""The named problems: their constants, and that making one leaves the global generator alone."""

from __future__ import annotations

import pytest
import torch

import sdecontrol as sc
from sdecontrol.library.problems import problem_card


def test_names() -> None:
    assert sc.problem_names() == ["double-well", "ou-linear", "ou-quadratic-easy", "ou-quadratic-hard"]
    with pytest.raises(ValueError, match="unknown problem 'ou-quadratic-eazy'; did you mean 'ou-quadratic-easy'"):
        sc.named_problem("ou-quadratic-eazy")


@pytest.mark.parametrize("name", ["double-well", "ou-linear", "ou-quadratic-easy", "ou-quadratic-hard"])
def test_global_generator_untouched_and_same_every_time(name: str) -> None:
    state = torch.get_rng_state()
    problem, again = sc.named_problem(name), sc.named_problem(name)
    assert torch.equal(state, torch.get_rng_state())
    assert problem.fingerprint() == again.fingerprint()
    assert problem.alpha == 1 and problem.horizon == 1 and problem_card(name).version == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_start_is_that_of_the_published_seed(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    start = sc.named_problem("ou-quadratic-hard").initial.mean
    torch.manual_seed(0)
    assert start.dtype == dtype
    assert torch.equal(start, 0.5 * torch.randn(20, dtype=torch.float32).to(dtype))
    assert float(start.square().sum()) == pytest.approx(6.0257, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "steps", "size"),
    [("ou-quadratic-easy", 50, 1.995), ("ou-quadratic-hard", 50, 31.30), ("ou-quadratic-hard", 150, 30.99)],
)
def test_mean_square_of_the_optimal_control(name: str, steps: int, size: float) -> None:
    """``E T^-1 int |u*|^2 dt`` of the continuous-time control on its Euler paths, as published."""
    torch.set_default_dtype(torch.float64)
    problem = sc.named_problem(name)
    exact = sc.exact_solution(problem)
    paths = sc.simulate(problem, 8192, control=exact.control, time_steps=steps, seed=0)
    per_path = (paths.shifts**2).sum((0, 2))  # sum_k h |u|^2
    error = float(per_path.std()) / len(per_path) ** 0.5
    assert abs(float(per_path.mean()) - size) < 4 * error + 0.005


def test_double_well_by_hand() -> None:
    problem = sc.named_problem("double-well")
    x = torch.full((1, 10), 2.0)
    assert float(problem.reward(x)) == -9 * (3 * 3 + 7)
    drift = problem.reference.drift(x, torch.zeros(()))
    assert drift[0, 0] == -5 * 4 * 2 * 3 and drift[0, 9] == -1 * 4 * 2 * 3
