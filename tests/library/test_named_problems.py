"""The named problems: their constants, and that making one leaves the global generator alone."""

from __future__ import annotations

import math

import pytest
import torch
from cases import but_slow

import sdecontrol as sc
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.library.problems import problem_card

CARD = ["double-well", "ou-linear", "ou-quadratic-easy", "ou-quadratic-hard"]
OTHERS = [
    "allen-cahn",
    "cart-pole",
    "committor-mueller-brown",
    "double-well-1d",
    "double-slit",
    "double-well-2d",
    "epidemic",
    "first-exit",
    "kuramoto",
    "mixture-steering",
    "non-symmetric-quadratic",
    "obstacles",
    "pendulum-swing-up",
    "pendulum-torque",
    "ring-steering",
    "stable-quadratic",
    "unicycle",
    "unstable-quadratic",
]
HORIZONS = {"committor-mueller-brown": 0.4, "double-slit": 2, "kuramoto": 2, "pendulum-swing-up": 2, "cart-pole": 2}
HORIZONS |= {"pendulum-torque": 3, "epidemic": 4, "first-exit": 4, "stable-quadratic": 4, "unstable-quadratic": 4}


def test_names() -> None:
    assert sc.library.problem_names() == sorted([*CARD, *OTHERS])
    with pytest.raises(ValueError, match="unknown problem 'ou-quadratic-eazy'; did you mean 'ou-quadratic-easy'"):
        sc.library.named_problem("ou-quadratic-eazy")


@pytest.mark.parametrize("name", [*CARD, *OTHERS])
def test_global_generator_untouched_and_same_every_time(name: str) -> None:
    state = torch.get_rng_state()
    problem, again = sc.library.named_problem(name), sc.library.named_problem(name)
    assert torch.equal(state, torch.get_rng_state())
    assert problem.fingerprint() == again.fingerprint()
    assert problem_card(name).version == 1 and problem_card(name).definition
    assert problem.alpha == (0.5 if name == "pendulum-torque" else 1)
    assert problem.horizon == pytest.approx(HORIZONS.get(name, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_start_is_that_of_the_published_seed(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    start = sc.library.named_problem("ou-quadratic-hard").initial.mean
    torch.manual_seed(0)
    assert start.dtype == dtype
    assert torch.equal(start, 0.5 * torch.randn(20, dtype=torch.float32).to(dtype))
    assert float(start.square().sum()) == pytest.approx(6.0257, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "steps", "size"),
    but_slow(
        [("ou-quadratic-easy", 50, 1.995), ("ou-quadratic-hard", 50, 31.30), ("ou-quadratic-hard", 150, 30.99)],
        ("ou-quadratic-hard", 150, 30.99),
    ),
)
def test_mean_square_of_the_optimal_control(name: str, steps: int, size: float) -> None:
    """``E T^-1 int |u*|^2 dt`` of the continuous-time control on its Euler paths, as published."""
    torch.set_default_dtype(torch.float64)
    problem = sc.library.named_problem(name)
    exact = sc.exact_solution(problem)
    paths = sc.simulate(problem, 8192, control=exact.control, time_steps=steps, seed=0)
    per_path = (paths.shifts**2).sum((0, 2))  # sum_k h |u|^2
    error = float(per_path.std()) / len(per_path) ** 0.5
    assert abs(float(per_path.mean()) - size) < 4 * error + 0.005


@pytest.mark.parametrize("name", [*CARD, *OTHERS])
def test_every_row_is_a_state_of_its_own(name: str) -> None:
    """Rewards, costs and steps of a batch are those of its rows; so many rows as coordinates too."""
    problem = sc.library.named_problem(name)
    chain, cost = problem.chain(10), problem.running_cost_function
    for rows in {5, *problem.event_shape}:
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, *problem.event_shape, generator=generator)
        xi = torch.randn(rows, *chain.noise_shape, generator=generator)
        for function in (
            lambda x, xi: problem.reward(x),
            lambda x, xi: chain.step(3, x, xi),
            lambda x, xi: problem.reward(x) if cost is None else cost(x, chain.times[3]),
        ):
            alone = torch.cat([function(x[i : i + 1], xi[i : i + 1]) for i in range(rows)])
            torch.testing.assert_close(function(x, xi), alone)


def test_the_ring_is_of_radius_two() -> None:
    x = torch.tensor([[2.0, 0.0], [0.0, -2.0], [0.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(
        sc.library.named_problem("ring-steering").reward(x), torch.tensor([0.0, 0.0, -4.0, -1.0])
    )


def test_double_well_by_hand() -> None:
    problem = sc.library.named_problem("double-well")
    x = torch.full((1, 10), 2.0)
    assert float(problem.reward(x)) == -9 * (3 * 3 + 7)
    drift = problem.reference.drift(x, torch.zeros(()))
    assert drift[0, 0] == -5 * 4 * 2 * 3 and drift[0, 9] == -1 * 4 * 2 * 3


def scalar_riccati(drift: float, running: float, terminal: float, square: float) -> float:
    """log Z of 20 equal coordinates, ``P' = -2 a P + P^2 - F``, by its own integration."""
    from scipy.integrate import solve_ivp

    slope = lambda s, y: [2 * drift * y[0] - y[0] ** 2 + 2 * running, -0.5 * y[0]]  # noqa: E731
    P, c = solve_ivp(slope, (0, 1), [2 * terminal, 0.0], rtol=1e-13, atol=1e-14, method="DOP853").y[:, -1]
    return 20 * c - 0.5 * P * square


@pytest.mark.parametrize(
    "name, parts", [("ou-quadratic-easy", (0.2, 0.2, 0.1)), ("ou-quadratic-hard", (1.0, 1.0, 0.5))]
)
def test_log_z_of_the_quadratic_cards(name: str, parts: tuple[float, ...]) -> None:
    torch.set_default_dtype(torch.float64)
    problem = sc.library.named_problem(name)
    want = scalar_riccati(*parts, float(problem.initial.mean.square().sum()))
    assert float(sc.exact_solution(problem).log_z) == pytest.approx(want, abs=1e-8)


@pytest.mark.parametrize("name, drift", [("unstable-quadratic", 1.0), ("stable-quadratic", -1.0)])
def test_log_z_of_the_long_horizons(name: str, drift: float) -> None:
    """The chain's recursion of one of 20 equal coordinates: average over the noise, pull back, pay the running cost."""
    torch.set_default_dtype(torch.float64)
    problem, steps = sc.library.named_problem(name), problem_card(name).time_steps
    h, P, c = 4 / steps, 1.0, 0.0
    for _ in range(steps):
        c -= 0.5 * math.log(1 + h * P)
        P = (1 + drift * h) ** 2 * P / (1 + h * P) + 2 * h
    want = 20 * c - 0.5 * P * float(problem.initial.mean.square().sum())
    assert float(sc.exact_solution(problem, steps).log_z) == pytest.approx(want, abs=1e-8)
    assert drift < 0 or want == pytest.approx(-109.471, abs=1e-3)  # as published with the bar


def test_where_paths_stop_on_the_mueller_brown_surface() -> None:
    """At both minima, which are none of the ridge; and forces are slopes of the potential there: none."""
    problem = sc.library.named_problem("committor-mueller-brown")
    minima = torch.tensor([[-0.558, 1.442], [0.623, 0.028]])
    assert (
        problem.reward(minima).tolist() == [-torch.inf, 0.0]
        and problem.reference.drift(minima, torch.zeros(())).abs().max() < 0.5
    )
    begun = lambda x: sc.simulate(problem, len(x), state=x, time_steps=1, seed=0).stopping_steps  # noqa: E731
    assert not begun(minima).any() and begun(torch.tensor([[-0.82, 0.62], [-0.05, 0.467]])).all()


def test_log_z_of_the_linear_card() -> None:
    """``E exp(-sum X_T)`` of a Gaussian."""
    torch.set_default_dtype(torch.float64)
    problem = sc.library.named_problem("ou-linear")
    law = problem.reference.transition(0.0, 1.0)
    assert float(sc.exact_solution(problem).log_z) == pytest.approx(0.5 * float(law.covariance.sum()), abs=1e-8)


def test_log_z_of_the_steering_problem_is_zero() -> None:
    """In continuous time, and on chains with exact transitions, whatever the step."""
    torch.set_default_dtype(torch.float64)
    problem = sc.library.named_problem("mixture-steering")
    assert float(sc.exact_solution(problem).log_z) == pytest.approx(0, abs=1e-8)
    assert float(sc.exact_solution(problem, 7).log_z) == pytest.approx(
        0, abs=1e-8
    )  # Euler is exact for Brownian motion


@pytest.mark.parametrize("name", ["ou-quadratic-easy", "ou-linear", "double-well-1d"])
def test_noise_is_the_published_lam(name: str) -> None:
    """With noise lam and control ``u`` in published units the process moves by ``sigma u`` and pays ``|u|^2/2``."""
    torch.set_default_dtype(torch.float64)
    lam = 0.36
    one, other = sc.library.named_problem(name), sc.library.named_problem(name, lam)
    x, t = torch.randn(4, *one.event_shape, generator=torch.Generator().manual_seed(0)), torch.zeros(())
    u = torch.randn(4, *one.control_shape, generator=torch.Generator().manual_seed(1))
    push = lambda p, v: sc.simulate(p, 4, control=lambda x, t: v, time_steps=1, seed=0, state=x).states[1]  # noqa: E731
    still = torch.zeros_like(u)
    torch.testing.assert_close(push(other, u / lam**0.5) - push(other, still), push(one, u) - push(one, still))
    assert other.alpha == lam and torch.equal(other.reward(x), one.reward(x))
    assert torch.equal(one.reference.drift(x, t), other.reference.drift(x, t))
    with pytest.raises(ValueError, match="noise must be > 0"):
        sc.library.named_problem(name, 0.0)


@pytest.mark.parametrize("name", ["cart-pole", "pendulum-swing-up", "unicycle"])
def test_problems_without_an_exact_solution_simulate_and_say_so(name: str) -> None:
    problem, card = sc.library.named_problem(name), problem_card(name)
    assert problem.control_shape[0] < problem.event_shape[0]  # fewer noises than states
    paths = sc.simulate(problem, 256, time_steps=card.time_steps, seed=0)
    assert torch.isfinite(log_weights(problem, paths)).all()
    with pytest.raises(sc.NoExactSolution):
        sc.exact_solution(problem, card.time_steps)
