"""Small faults of input that were silent or named another culprit."""

import warnings

import pytest
import torch

import sdecontrol as sc

E, EMPTY = torch.eye(2), torch.zeros(0, 2)
START = sc.Dirac(torch.zeros(2))
QUICK = {"iterations": 1, "time_steps": 5, "batch_size": 64, "seed": 0}


def problem(reference=None, **options):
    reference = sc.SDE(lambda x, t: -x, 1.0, dim=2) if reference is None else reference
    return sc.ControlProblem(reference, START, **{"reward": lambda x: -x.square().sum(1), **options})


def mixture():
    law = sc.GaussianMixture(torch.ones(2), 2 * E, 1.0)
    return sc.ControlProblem(sc.generative_sde(law, sc.VP()), reward=lambda x: x[:, 0])


KINDS = {
    "linear": lambda: problem(sc.LinearSDE(-E, E), reward=sc.Quadratic(E)),
    "general": problem,
    "generative": mixture,
}


# ---------------------------------------------------------------- random functions


def noise(x):
    return 0.1 * torch.randn(len(x))


def test_a_random_reward_is_noticed_each_time_and_a_fixed_one_is_not():
    for _ in range(2):  # of two problems with the same fault, both
        with pytest.warns(UserWarning, match="reward gave two values for the same states: it is random"):
            problem(reward=lambda x: x.sum(1) + noise(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem(reward=lambda x: x.sum(1))
        problem(reward=lambda x: (x @ torch.randn(2, 1000)).sum(1) * 0 + 1)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("drift", lambda: problem(sc.SDE(lambda x, t: -x + noise(x)[:, None], 1.0, dim=2))),
        ("nonlinearity", lambda: problem(sc.SemilinearSDE(-E, lambda x, t: torch.dropout(x, 0.5, True), 1.0))),
        ("diffusion", lambda: problem(sc.SDE(lambda x, t: -x, lambda x, t: 1 + noise(x)[:, None] * E[0], dim=2))),
        ("diffusion", lambda: problem(sc.SDE(lambda x, t: -x, lambda x, t: float(torch.rand(())), dim=2))),
        ("running_cost", lambda: problem(running_cost=lambda x, t: noise(x))),
        ("model", lambda: sc.ControlProblem(sc.generative_sde(lambda x, s: torch.rand_like(x), sc.VP(), shape=(2,)))),
    ],
)
def test_a_step_that_draws_random_numbers_of_its_own_is_refused(name, make):
    with pytest.raises(ValueError, match=f"^{name} gave two values for the same states"):
        make()


# ---------------------------------------------------------------- warnings


def test_a_warning_is_shown_for_each_problem_and_the_users_filters_come_first():
    def shown():
        with warnings.catch_warnings(record=True) as found:
            for _ in range(3):
                problem(reward=lambda x: x.sum(1) + noise(x))
        return len(found)

    with warnings.catch_warnings():
        warnings.simplefilter("default")  # once for each line of code
        assert shown() == 3
        warnings.simplefilter("ignore")
        assert shown() == 0


def test_path_integrals_warn_in_each_use():
    made = problem(reward=lambda x: -100 * (x - 2).square().sum(1))
    solution = sc.solve(made, sc.PathIntegralGuidance(num_paths=16), time_steps=3, seed=0)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="effective of 16 paths") as found:
            solution.sample(4, seed=1)
        assert len(found) == 1  # not one for each step


# ---------------------------------------------------------------- lists, integers, empty batches


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda s: sc.SDE(lambda x, t: x, s, dim=2), "diffusion must be a number, a tensor .* got {}"),
        (lambda s: problem(sc.SDE(lambda x, t: x, lambda x, t: s, dim=2)), "diffusion must return .* got {}"),
        (lambda s: sc.LinearSDE(-E, s), "sigma must be a number, a torch tensor or a function of time, got {}"),
        (lambda s: sc.BrownianMotion(2, s), "sigma must be a number, a torch tensor or a function of time, got {}"),
        (lambda s: sc.SemilinearSDE(-E, lambda x, t: x, s), "sigma must be a number, a torch tensor .* got {}"),
    ],
)
@pytest.mark.parametrize("sigma", [[1.0, 2.0], [[1.0, 0.0], [0.0, 1.0]], (1.0,)])
def test_a_list_as_sigma_is_named(make, name, sigma):
    with pytest.raises(TypeError, match=name.format(type(sigma).__name__)):
        make(sigma)


@pytest.mark.parametrize("kind", KINDS)
def test_integer_states_are_named_and_tokens_are_taken(kind):
    solution = sc.solve(KINDS[kind](), "log-variance", **QUICK)
    with pytest.raises(TypeError, match=r"x has dtype torch.int64, and states are numbers; use x.float\(\)"):
        solution.control(torch.zeros(3, 2, dtype=torch.long), 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches(kind):
    made = KINDS[kind]()
    solution = sc.solve(made, "log-variance", **QUICK)
    assert solution.control(EMPTY, 0.5).shape == solution.control(EMPTY, torch.zeros(0)).shape == (0, 2)
    assert made.reward(EMPTY).shape == (0,)
    none = solution.simulate(4, seed=0).rows(slice(0, 0))
    assert none.log_weights().shape == none.log_ratio(solution.control).shape == (0,)
    for ask in (solution.sample, solution.weighted_sample):
        with pytest.raises(ValueError, match="n must be an int >= 1, got 0"):
            ask(0)


def test_empty_batches_elsewhere():
    exact, particles = sc.exact_solution(KINDS["linear"]()), sc.solve(problem(), sc.SMC(16), time_steps=3, seed=0)
    chains = sc.solve(sc.gibbs_problem(lambda x: -x.square().sum(1), 2, scale=1.0), sc.MALA(num_chains=8), seed=0)
    for solution in (exact, particles, chains):
        with pytest.raises(ValueError, match="n must be an int >= 1, got 0"):
            solution.sample(0)
    with pytest.raises(ValueError, match="x must have at least one row"):
        sc.log_likelihood(mixture(), EMPTY)
    for distance in (sc.metrics.wasserstein, sc.metrics.sliced_wasserstein, sc.metrics.sinkhorn):
        with pytest.raises(ValueError, match="samples on both sides, got 0 and 5"):
            distance(EMPTY, torch.zeros(5, 2))
