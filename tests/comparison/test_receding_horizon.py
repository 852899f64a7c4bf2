"""Plans from the present state, against the exact optimum of the chain from there."""

import math

import pytest
import torch
from cases import F64

import sdecontrol as sc

A = torch.tensor([[0.0, 1.0], [-1.0, -0.2]], dtype=F64)
N = 20_000


def quadratic(horizon: float = 1.0, **more) -> sc.ControlProblem:
    sde = sc.LinearSDE(A=A, sigma=torch.tensor([[0.0], [1.0]], dtype=F64), offset=None, horizon=horizon)
    reward = sc.Quadratic(G=torch.eye(2, dtype=F64), g=torch.tensor([1.0, 0.0], dtype=F64))
    cost = sc.QuadraticCost(F=0.5 * torch.eye(2, dtype=F64))
    return sc.ControlProblem(
        sde, initial=sc.Dirac(torch.zeros(2, dtype=F64)), reward=reward, running_cost=cost, alpha=0.5, **more
    )


def states(n: int = 3) -> torch.Tensor:
    return torch.linspace(-1.5, 1.5, 2 * n, dtype=F64).reshape(n, 2).flip(1) ** 3 / 2 + 0.2


def off(u: torch.Tensor, exact: torch.Tensor, h: float) -> float:
    """The largest error of the shifts in standard errors of their averages over N paths of a converged plan."""
    return float((u - exact).abs().max() * math.sqrt(h) * math.sqrt(N))


@pytest.mark.parametrize("antithetic", [False, True])
def test_a_plan_begins_with_the_exact_control(antithetic: bool) -> None:
    problem = quadratic()
    method = sc.PathIntegralGuidance(num_paths=N, antithetic=antithetic)
    planner = sc.RecedingHorizon(problem, method, time_steps=20, rounds=4, seed=0)
    exact, x = sc.exact_solution(problem, time_steps=20), states()
    assert off(planner.act(x, 7.0), exact.control(x, 0.0), 1 / 20) < 4
    assert off(planner.act(x.flip(0), 7.05), exact.control(x.flip(0), 0.0), 1 / 20) < 4
    assert planner.ess is not None and planner.ess.shape == (3,) and float(planner.ess.min()) > N / 2
    values = exact.value(x.flip(0), 0.0) / problem.alpha
    assert planner.log_z is not None and float((planner.log_z - values).abs().max()) < 4 / math.sqrt(N)
    assert planner.model_steps == 2 * 4 * 3 * N * 20


def test_on_the_clock_of_a_task_a_window_is_a_shorter_problem_and_ends_with_it() -> None:
    problem, x = quadratic(), states()
    window = {"time_steps": 20, "rounds": 4, "seed": 0, "horizon": 0.5}
    planner = sc.RecedingHorizon(problem, sc.PathIntegralGuidance(num_paths=N), **window)
    whole, half = sc.exact_solution(problem, time_steps=20), sc.exact_solution(quadratic(0.5), time_steps=10)
    assert off(planner.act(x, 0.25), half.control(x, 0.0), 1 / 20) < 4
    assert planner.model_steps == 4 * 3 * N * 10
    assert off(planner.act(x, 0.8), whole.control(x, 0.8), 1 / 20) < 4  # four steps are left
    assert planner.model_steps == 4 * 3 * N * 14
    assert off(planner.act(x, 0.8), half.control(x, 0.0), 1 / 20) > 8  # the tests have power


def test_a_plan_begins_with_what_is_left_of_the_last_one() -> None:
    """The state stays, so plans are of one problem: each round of few paths goes on from where the last one ended."""
    problem, x = quadratic(), states().repeat_interleave(100, 0)
    exact = sc.exact_solution(problem, time_steps=20).control(x, 0.0)
    errors = []
    planner = sc.RecedingHorizon(problem, sc.PathIntegralGuidance(num_paths=64), time_steps=20, seed=0)
    for k in range(4):
        errors.append(float((planner.act(x, 0.05 * k) - exact).square().mean()))
    planner.reset()
    again = float((planner.act(x, 0.0) - exact).square().mean())
    assert errors[0] > 1.25 * max(errors[2:]) and again > 1.25 * max(errors[2:]), (errors, again)


def test_what_is_left_of_a_plan_is_of_the_steps_to_come() -> None:
    """Of a linear reward and linear dynamics the best plan makes all weights equal, whatever the state: so does what
    is left of it later, and nothing else does."""
    sde = sc.LinearSDE(A=-4 * torch.eye(1, dtype=F64), sigma=torch.eye(1, dtype=F64), offset=None, horizon=1.0)
    start = sc.Dirac(torch.zeros(1, dtype=F64))
    problem = sc.ControlProblem(sde, start, reward=sc.Linear(4 * torch.ones(1, dtype=F64)), alpha=1.0)
    planner = sc.RecedingHorizon(
        problem, sc.PathIntegralGuidance(num_paths=N), horizon=1.0, time_steps=20, rounds=4, seed=0
    )
    planner.act(torch.zeros(1, 1, dtype=F64), 0.0)
    planner.rounds = 1
    planner.act(torch.ones(1, 1, dtype=F64), 0.5)
    assert planner.ess is not None and float(planner.ess) > 0.99 * N


def test_between_plans_the_next_steps_of_the_last_one_are_taken() -> None:
    problem, x = quadratic(), states()
    planner = sc.RecedingHorizon(problem, sc.PathIntegralGuidance(num_paths=64), time_steps=20, replan=3, seed=0)
    acts = [planner.act(x, 0.05 * k) for k in range(3)]
    assert planner.model_steps == 3 * 64 * 20
    whole = sc.RecedingHorizon(problem, sc.PathIntegralGuidance(num_paths=64), time_steps=20, replan=20, seed=0)
    for k, u in enumerate(acts):
        torch.testing.assert_close(whole.act(x.flip(0) if k else x, 0.05 * k), u)  # it does not look at the state
    planner.act(x, 0.15)
    assert planner.model_steps == 2 * 3 * 64 * 20


def test_with_a_policy_to_begin_with_a_plan_is_what_is_added() -> None:
    problem, x = quadratic(), states()
    exact = sc.exact_solution(problem, time_steps=20)
    method = sc.PathIntegralGuidance(num_paths=256, proposal=exact.control)
    planner = sc.RecedingHorizon(problem, method, time_steps=20, seed=0)
    error = (planner.act(x, 0.0) - exact.control(x, 0.0)).abs().max() * math.sqrt(256 / 20)
    # the weights of an optimal control are not all equal on a chain, so that something is added
    assert 0 < float(error) < 1.5
    assert float(planner.ess.min()) > 200  # type: ignore[union-attr]


def test_without_rewards_nothing_is_planned_and_bounds_hold() -> None:
    x = states()
    sde = sc.SDE(lambda x, t: -x, diffusion=torch.tensor(1.0, dtype=F64), dim=2, horizon=1.0)
    nothing = sc.ControlProblem(sde, initial=sc.Dirac(torch.zeros(2, dtype=F64)), alpha=1.0)
    planner = sc.RecedingHorizon(nothing, sc.PathIntegralGuidance(num_paths=64), time_steps=10, seed=0)
    assert float(planner.act(x, 0.0).abs().max()) < 1e-12
    far = sc.ControlProblem(
        sde, initial=sc.Dirac(torch.zeros(2, dtype=F64)), reward=lambda x: 3 * (x[:, 0] - x[:, 1]), alpha=1.0
    )
    method, high = sc.PathIntegralGuidance(num_paths=4096), torch.tensor([0.8, 0.5], dtype=F64)
    planner = sc.RecedingHorizon(far, method, bounds=(-0.25, high), time_steps=10, rounds=5, seed=0)
    u = planner.act(x, 0.0)
    torch.testing.assert_close(u, torch.tensor([[0.8, -0.25]], dtype=F64).expand(3, 2))


def test_each_decision_has_noise_of_its_own_and_a_seed_repeats_a_run() -> None:
    problem, x = quadratic(), states(2).mean(0, keepdim=True).expand(2, 2)
    method = sc.PathIntegralGuidance(num_paths=64)
    runs = []
    for seed in (0, 0, 1):
        planner = sc.RecedingHorizon(problem, method, time_steps=20, seed=seed)
        runs.append(torch.stack([planner.act(x, 0.0), planner.act(x, 0.05)]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert len(runs[0].flatten().unique()) == 4  # of both decisions and of both rows


def test_a_swing_up_by_a_bounded_torque_below_gravity() -> None:
    """A plant without noise, of which the model's noise explores the torque; steps as in discrete time."""

    def step(x, w, k):
        torque = (3.0 * w[:, 0]).clamp(-2.0, 2.0)
        speed = x[:, 1] + 0.05 * (15.0 * x[:, 0].sin() + 3.0 * torque)
        return torch.stack([x[:, 0] + 0.05 * speed, speed], 1)

    def cost(x, t):
        return (1 - x[:, 0].cos()) * 10 + 0.1 * x[:, 1] ** 2

    chain = sc.discrete_dynamics(step, steps=25, dim=2, noises=1)
    problem = sc.ControlProblem(
        chain,
        initial=sc.Dirac(torch.tensor([math.pi, 0.0])),
        running_cost=cost,
        reward=lambda x: -cost(x, 0),
        alpha=1.0,
    )
    planner = sc.RecedingHorizon(problem, sc.PathIntegralGuidance(num_paths=256), seed=0)
    x, upright = torch.tensor([[math.pi, 0.0], [-math.pi, 0.3]]), []
    for k in range(120):
        x = step(x, planner.act(x, float(k)), k)
        upright.append(x[:, 0].cos())
    assert float(torch.stack(upright[-20:]).min()) > 0.95
    still = torch.tensor([[math.pi, 0.0]])
    for k in range(120):
        still = step(still, torch.full((1, 1), 10.0), k)
        assert float(still[0, 0].cos()) < 0.0  # the largest torque alone does not lift it


def test_rows_have_conditions_of_their_own() -> None:
    sde = sc.LinearSDE(A=-torch.eye(1, dtype=F64), sigma=torch.eye(1, dtype=F64), offset=None, horizon=1.0)
    aims = torch.tensor([-1.0, 2.0], dtype=F64)
    problem = sc.ControlProblem(
        sde,
        initial=sc.Dirac(torch.zeros(1, dtype=F64)),
        reward=lambda x, y: y * x[:, 0],
        alpha=1.0,
        condition=aims,
    )
    planner = sc.RecedingHorizon(problem, sc.PathIntegralGuidance(num_paths=N), time_steps=10, rounds=3, seed=0)
    u = planner.act(torch.zeros(2, 1, dtype=F64), 0.0, condition=aims)
    exact = aims[:, None] * (1 - 1 / 10) ** 9  # a linear reward: the chain's factor from the noise to the end
    assert off(u, exact, 1 / 10) < 4


def test_a_method_that_trains_solves_anew_from_the_state() -> None:
    problem, x = quadratic(), states()[:1]
    planner = sc.RecedingHorizon(problem, sc.AdjointMatching(), time_steps=10, iterations=20, replan=2, seed=0)
    exact = sc.exact_solution(problem, time_steps=10)
    assert abs(float(planner.act(x, 0.0) - exact.control(x, 0.0))) < 0.1
    first = planner.solution
    assert first is not None and first.iterations == 20
    later = planner.act(x + 0.1, 0.1)
    assert planner.solution is first
    torch.testing.assert_close(later, first.control(x + 0.1, 0.1).detach())
    planner.act(x - 0.3, 0.2)
    assert planner.solution is not first


def test_bad_input_is_named() -> None:
    problem, x = quadratic(), states()

    def make(**more):
        return sc.RecedingHorizon(more.pop("problem", problem), **{"time_steps": 10, "seed": 0} | more)

    with pytest.raises(TypeError, match="problem must be a ControlProblem"):
        make(problem=problem.reference)
    with pytest.raises(ValueError, match="bounds must include 0"):
        make(bounds=(0.5, 1.0))
    with pytest.raises(TypeError, match="bounds must be a pair"):
        make(bounds=2.0)
    with pytest.raises(ValueError, match=r"bounds: high must be a number or of shape \(1,\)"):
        make(bounds=(-1.0, torch.ones(2)))
    with pytest.raises(ValueError, match="horizon must be > 0"):
        make(horizon=-1.0)
    with pytest.raises(ValueError, match="replan must be an int >= 1"):
        make(replan=0)
    with pytest.raises(ValueError, match="whose steps must be equal"):
        make(time_steps=[0.0, 0.3, 1.0])
    with pytest.raises(ValueError, match="rounds is for plans of PathIntegralGuidance"):
        make(method=sc.AdjointMatching(), rounds=2)
    with pytest.raises(ValueError, match="bounds is for plans of PathIntegralGuidance"):
        make(method="soft-ppo", bounds=(-1, 1))
    with pytest.raises(ValueError, match="trust_region is for plans of PathIntegralGuidance"):
        make(method="soft-ppo", trust_region=None)
    with pytest.raises(ValueError, match="iterations is for methods that train"):
        make(iterations=3)
    planner = make(method=sc.PathIntegralGuidance(num_paths=8))
    with pytest.raises(TypeError, match=r"x must be a tensor .* use torch.as_tensor\(x\)"):
        planner.act(x.numpy(), 0.0)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 2\), got \(2,\)"):
        planner.act(x[0], 0.0)
    with pytest.raises(TypeError, match=r"x has dtype torch\.float32"):
        planner.act(x.float(), 0.0)
    with pytest.raises(ValueError, match="x is not finite in 1 of 3 rows"):
        planner.act(torch.cat((x[:2], x[:1] * math.nan)), 0.0)
    with pytest.raises(ValueError, match="condition must be given where the problem has one"):
        planner.act(x, 0.0, condition=x)
    planner.act(x, 0.0)
    with pytest.raises(ValueError, match="x has 2 rows, the last plan 3"):
        planner.act(x[:2], 0.1)
    with pytest.raises(ValueError, match=r"t must be a number of steps of 0\.1 after 0"):
        planner.act(x, 0.15)
    planner.act(x, 0.2)
    with pytest.raises(ValueError, match=r"t went back to 0\.1"):
        planner.act(x, 0.1)
    planner.reset()
    planner.act(x[:2], 0.1)
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\)"):
        make(horizon=0.5).act(x, 1.0)
    with pytest.raises(ValueError, match="x has 3 rows: adjoint-matching plans for one state"):
        make(method=sc.AdjointMatching(), iterations=1).act(x, 0.0)
