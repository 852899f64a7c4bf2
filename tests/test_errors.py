"""Misuse: each an early error that names the argument and the remedy."""

import pytest
import torch

import sdecontrol as sc

E, Z = torch.eye(2), torch.zeros(2)
NAN = float("nan")


def linear(**changes):
    return sc.LinearSDE(**{"A": -E, "sigma": E, **changes})


def problem(sde=None, **changes):
    options = {"initial": sc.Dirac(Z), "reward": sc.Quadratic(E, torch.ones(2)), "alpha": 0.5, **changes}
    return sc.ControlProblem(linear() if sde is None else sde, **options)


def solve(*method, made=None, **changes):
    options = {"iterations": 2, "time_steps": 5, "seed": 0, "batch_size": 64, **changes}
    return sc.solve(problem() if made is None else made, *(method or (sc.RewardBackprop(),)), **options)


def general(drift=lambda x, t: -x, diffusion=1.0, **changes):
    return sc.SDE(drift, diffusion, **{"dim": 2, **changes})


def net(x, s):
    return x


class Model(torch.nn.Module):
    def __init__(self, out=2):
        super().__init__()
        self.net = torch.nn.Linear(2, out)

    def forward(self, x, s):
        return self.net(x)


MIXTURE = sc.GaussianMixture(torch.ones(2), torch.eye(2), 1.0)

CASES = {
    # linear SDEs
    "A not square": (lambda: linear(A=torch.zeros(2, 3)), ValueError, r"A must be a square"),
    "A a list": (lambda: linear(A=[[1.0]]), TypeError, "A must be a torch tensor or a function of time"),
    "A of integers": (
        lambda: linear(A=torch.eye(2, dtype=torch.long)),
        TypeError,
        r"A must have a floating-point dtype",
    ),
    "A with nan": (lambda: linear(A=E * NAN), ValueError, "A has 4 non-finite"),
    "A and sigma of two dtypes": (
        lambda: linear(A=E.double()),
        TypeError,
        "sigma has dtype torch.float32, A has torch.float64",
    ),
    "sigma of another size": (lambda: linear(sigma=torch.eye(3)), ValueError, r"sigma must be a number or a \(2, m\)"),
    "sigma a vector": (lambda: linear(sigma=torch.ones(2)), ValueError, "torch.diag"),
    "sigma zero": (lambda: linear(sigma=0.0), ValueError, "sigma is 0"),
    "offset of another size": (lambda: linear(offset=torch.zeros(3)), ValueError, "offset must have shape"),
    "horizon zero": (lambda: linear(horizon=0.0), ValueError, "horizon must be > 0"),
    # general SDEs
    "drift not callable": (lambda: general(drift=E), TypeError, "drift must be callable"),
    "drift of another shape": (lambda: problem(general(lambda x, t: x[:, :1])), ValueError, "drift must return shape"),
    "drift of another dtype": (
        lambda: problem(general(lambda x, t: x.double())),
        TypeError,
        "drift returned dtype torch.float64",
    ),
    "drift of nothing": (lambda: problem(general(lambda x, t: None)), TypeError, "drift must return a torch tensor"),
    "drift of one argument": (
        lambda: problem(general(lambda x: x)),
        TypeError,
        r"drift failed when called as drift\(x, t\)",
    ),
    "diffusion zero": (lambda: general(diffusion=0.0), ValueError, "diffusion is 0"),
    "diffusion of another size": (lambda: general(diffusion=torch.ones(3)), ValueError, "does not fit a state"),
    "diffusion function of another size": (
        lambda: problem(general(diffusion=lambda x, t: torch.ones(3))),
        ValueError,
        "diffusion must return a number or 0-d",
    ),
    "neither dim nor shape": (lambda: sc.SDE(net, 1.0), TypeError, "exactly one of dim"),
    # starts
    "start missing": (lambda: problem(initial=None), TypeError, "initial is missing"),
    "start of another shape": (
        lambda: problem(initial=sc.Dirac(torch.zeros(3))),
        ValueError,
        "initial gives states of shape",
    ),
    "start of another dtype": (lambda: problem(initial=sc.Dirac(Z.double())), TypeError, "initial law torch.float64"),
    "start a tensor": (lambda: problem(initial=Z), TypeError, r"sc.Dirac\(x0\)"),
    "start of negative variance": (lambda: sc.Gaussian(Z, -E), ValueError, "positive semi-definite"),
    "start unknown": (lambda: problem(start="fix"), ValueError, "unknown start 'fix'; did you mean 'fixed'"),
    "start not memoryless": (
        lambda: problem(initial=sc.Gaussian(Z, E), start="memoryless"),
        ValueError,
        "correlation is 0.488",
    ),
    "short schedule not memoryless": (
        lambda: sc.ControlProblem(sc.generative_sde(MIXTURE, sc.VP(1.0, 1.0)), start="memoryless"),
        ValueError,
        "0.607",
    ),
    "memoryless noise that is not": (
        lambda: sc.generative_sde(MIXTURE, sc.VP(1.0, 1.0), noise_level="memoryless"),
        ValueError,
        "correlation is 0.607",
    ),
    # rewards and costs
    "reward (batch, 1)": (
        lambda: problem(reward=lambda x: x[:, :1]),
        ValueError,
        r"reward must return shape .*squeeze\(-1\)",
    ),
    "reward a scalar": (lambda: problem(reward=lambda x: x.sum()), ValueError, "Do not average over the batch"),
    "reward of another dtype": (
        lambda: problem(reward=lambda x: x.sum(1).double()),
        TypeError,
        "reward returned dtype",
    ),
    "reward a number": (lambda: problem(reward=lambda x: 1.0), TypeError, "reward must return a torch tensor"),
    "reward not callable": (lambda: problem(reward="high"), TypeError, "reward must be a function"),
    "reward of another size": (lambda: problem(reward=sc.Quadratic(torch.eye(3))), ValueError, "reward.G has shape"),
    "reward of another dtype G": (lambda: problem(reward=sc.Quadratic(E.double())), TypeError, "reward.G has dtype"),
    "G not symmetric": (
        lambda: sc.Quadratic(torch.tensor([[1.0, 2.0], [0.0, 1.0]])),
        ValueError,
        "G must be symmetric",
    ),
    "running cost of another shape": (
        lambda: problem(running_cost=lambda x, t: x),
        ValueError,
        "running_cost must return shape",
    ),
    "alpha zero": (lambda: problem(alpha=0), ValueError, "alpha must be > 0"),
    "alpha nan": (lambda: problem(alpha=NAN), ValueError, "alpha must be finite"),
    "alpha a word": (lambda: problem(alpha="warm"), TypeError, "alpha must be a number"),
    "detached reward": (
        lambda: solve(made=problem(reward=lambda x: -(x.detach() ** 2).sum(1))),
        TypeError,
        "has no gradient",
    ),
    "numpy reward": (
        lambda: solve(made=problem(reward=lambda x: torch.from_numpy((x.numpy() ** 2).sum(1)))),
        TypeError,
        "has no gradient",
    ),
    "step reward": (
        lambda: solve(made=problem(reward=lambda x: (x[:, 0] > 0).float())),
        TypeError,
        r"needs none \(log-variance",
    ),
    # solve
    "no problem": (lambda: sc.solve(3), TypeError, "problem must be a ControlProblem"),
    "unknown method": (
        lambda: solve("reward-backprob"),
        ValueError,
        "unknown method .* did you mean 'reward-backprop'",
    ),
    "method a number": (lambda: solve(3), TypeError, "method must be"),
    "unknown gradient mode": (lambda: sc.RewardBackprop("ful"), ValueError, "did you mean 'full'"),
    "no last steps": (lambda: sc.RewardBackprop(0), ValueError, "last steps >= 1"),
    "grid not increasing": (
        lambda: solve(time_steps=[0.0, 0.5, 0.4, 1.0]),
        ValueError,
        "entry 2 .* is not above entry 1",
    ),
    "grid repeated": (lambda: solve(time_steps=[0.0, 0.5, 0.5, 1.0]), ValueError, "strictly increasing"),
    "grid too short": (lambda: solve(time_steps=[0.0, 0.5, 0.9]), ValueError, "must go from 0 to the horizon"),
    "no steps": (lambda: solve(time_steps=0), ValueError, "time_steps must be >= 1"),
    "half steps": (lambda: solve(time_steps=5.0), TypeError, "time_steps must be an int"),
    "unknown scheme": (lambda: solve(scheme="eular"), ValueError, "did you mean 'euler'"),
    "exact scheme of a nonlinear SDE": (
        lambda: solve(made=problem(general()), scheme="exact"),
        ValueError,
        "needs a linear reference",
    ),
    "no batch": (lambda: solve(batch_size=0), ValueError, "batch_size must be an int >= 1"),
    "no iterations": (lambda: solve(iterations=-1), ValueError, "iterations must be an int >= 1"),
    "seed negative": (lambda: solve(seed=-1), ValueError, "seed must be from 0 to"),
    "seed a float": (lambda: solve(seed=1.5), TypeError, "seed must be an int"),
    "budget in words": (lambda: solve(budget="soon"), ValueError, "budget must be seconds"),
    "no budget": (lambda: solve(budget="0s"), ValueError, "budget must be > 0 seconds, got 0"),
    "negative budget": (lambda: solve(budget=-1.0), ValueError, "budget must be > 0 seconds, got -1"),
    "control of one argument": (
        lambda: solve(control=torch.nn.Linear(2, 2)),
        TypeError,
        "control failed when called as",
    ),
    "control of another size": (
        lambda: solve(control=Model(3)),
        ValueError,
        r"control must return shape \(3, 2\), got \(3, 3\)",
    ),
    "control a function": (lambda: solve(control=lambda x, t: x), TypeError, "must be an nn.Module"),
    "optimizer made": (
        lambda: solve(optimizer=torch.optim.Adam([torch.zeros(1, requires_grad=True)])),
        TypeError,
        "must be a function",
    ),
    # simulate
    "no paths": (lambda: sc.simulate(problem(), 0), ValueError, "num_paths must be an int >= 1"),
    "unknown keep": (lambda: sc.simulate(problem(), 5, keep="alles"), ValueError, "unknown keep"),
    "noise of another shape": (
        lambda: sc.simulate(problem(), 5, noise=torch.zeros(3, 5, 2)),
        ValueError,
        r"noise must have shape \(100, 5, 2\)",
    ),
    "control returns another shape": (
        lambda: sc.simulate(problem(), 5, control=lambda x, t: x[:, :1], time_steps=3),
        ValueError,
        "control must return shape",
    ),
    "step without state": (lambda: sc.simulate(problem(), 5, step=3), ValueError, "step without state"),
    # models
    "unknown prediction": (
        lambda: sc.generative_sde(Model(), sc.VP(), "nois", shape=(2,)),
        ValueError,
        "did you mean 'noise'",
    ),
    "schedule a word": (lambda: sc.generative_sde(Model(), "vp", shape=(2,)), TypeError, "schedule must be"),
    "shape missing": (lambda: sc.generative_sde(Model(), sc.VP()), TypeError, "shape is needed"),
    "model of one argument": (
        lambda: sc.ControlProblem(sc.generative_sde(torch.nn.Linear(2, 2), sc.VP(), shape=(2,))),
        TypeError,
        "model failed when called",
    ),
    "model of another size": (
        lambda: sc.ControlProblem(sc.generative_sde(Model(3), sc.VP(), shape=(2,))),
        ValueError,
        "model must return shape",
    ),
    "noise level zero": (
        lambda: sc.generative_sde(Model(), sc.VP(), shape=(2,), noise_level=0.0),
        ValueError,
        "noise_level must be > 0",
    ),
    "deterministic sampler": (
        lambda: sc.diffusion_chain(Model(), torch.linspace(0.9, 0.1, 9), shape=(2,), eta=0.0, steps=5),
        ValueError,
        "eta must be > 0",
    ),
    "alphas increasing": (
        lambda: sc.diffusion_chain(Model(), torch.linspace(0.1, 0.9, 9), shape=(2,), steps=5),
        ValueError,
        "decrease strictly",
    ),
    "time steps for a chain": (
        lambda: solve(
            made=sc.ControlProblem(sc.diffusion_chain(Model(), torch.linspace(0.99, 0.001, 9), shape=(2,), steps=5))
        ),
        ValueError,
        "the reference is a chain with its own",
    ),
    "mixture weights": (lambda: sc.GaussianMixture(torch.ones(2), torch.zeros(3, 2), 1.0), ValueError, "weights"),
    # exact solutions
    "no exact solution": (
        lambda: sc.exact_solution(problem(general(lambda x, t: -x.roll(1, 1), lambda x, t: 1 + 0.1 * x.sin())), 10),
        ValueError,
        "does not depend on the state",
    ),
    "reward too convex": (lambda: sc.exact_solution(problem(reward=sc.Quadratic(-9 * E))), ValueError, "too convex"),
    "reward too convex on the chain": (
        lambda: sc.exact_solution(problem(reward=sc.Quadratic(-9 * E)), time_steps=50),
        ValueError,
        "too convex",
    ),
}


@pytest.mark.wrong_shapes
@pytest.mark.parametrize("case", CASES)
def test_misuse_is_named_early(case):
    act, kind, message = CASES[case]
    with pytest.raises(kind, match=message):
        act()


@pytest.fixture(scope="module")
def solution():
    return solve()


ASKED = {
    "x of another shape": (lambda s: s.control(torch.zeros(3), 0.5), ValueError, "x must have shape"),
    "x of another dtype": (lambda s: s.control(torch.zeros(3, 2).double(), 0.5), TypeError, "x has dtype"),
    "x a list": (lambda s: s.control([0.0], 0.5), TypeError, "x must be a torch tensor"),
    "t beyond the horizon": (lambda s: s.control(torch.zeros(3, 2), 1.5), ValueError, "t must be within"),
    "t of another length": (lambda s: s.control(torch.zeros(3, 2), torch.zeros(4)), ValueError, "t must be a float or"),
    "too few paths": (lambda s: s.evaluate(3), ValueError, "n must be an int >= 64"),
    "no model": (lambda s: s.model, ValueError, "needs a pre-trained model"),
}


@pytest.mark.wrong_shapes
@pytest.mark.parametrize("case", ASKED)
def test_misuse_of_a_solution_is_named_early(case, solution):
    act, kind, message = ASKED[case]
    with pytest.raises(kind, match=message):
        act(solution)


@pytest.mark.parametrize("step", [0, 3, 6])
@pytest.mark.parametrize("rows", [1, 5])
def test_nan_from_the_drift_is_located(step, rows):
    def drift(x, t):
        bad = (torch.arange(len(x)) < rows)[:, None] & (t >= step / 7 - 1e-6)
        return torch.where(bad, torch.nan, -x)

    with pytest.raises(sc.NonFiniteError) as caught:
        sc.simulate(problem(general(drift)), 70, time_steps=7, seed=0, keep="end")
    assert (caught.value.what, caught.value.step, caught.value.rows) == ("drift", step, rows)
    assert f"step {step} of 7" in str(caught.value)


def test_nan_from_the_reward_is_counted():
    bad = problem(reward=lambda x: torch.where(x[:, 0] > 0, torch.nan, x[:, 0]))
    with pytest.raises(sc.NonFiniteError, match=r"reward is not finite in \d+ of 64 rows"):
        solve(made=bad, control=Model())


def test_a_reward_that_is_not_finite_on_the_way_but_at_the_end_trains():
    """The default network looks at the reward's gradient at every step: there a logarithm may be infinite."""
    made = sc.ControlProblem(
        sc.SDE(lambda x, t: torch.full_like(x, 8.0), 0.1, dim=1),
        initial=sc.Dirac(torch.full((1,), -1.0)),
        reward=lambda x: x[:, 0].log(),
    )
    solve(made=made)


def test_a_black_box_reward_is_evaluated_without_a_gradient():
    made = problem(reward=lambda x: torch.from_numpy(-(x.numpy() ** 2).sum(1)), reward_batch_size=50)
    assert not made.has_gradient
    solution = solve(made=problem())
    solution.problem = made
    assert solution.evaluate(128, seed=0).reward.value < 0


def test_rewards_are_called_in_pieces_where_asked():
    sizes = []

    def reward(x):
        sizes.append(len(x))
        return x[:, 0]

    solve(made=problem(reward=reward, reward_batch_size=10), control=Model(), iterations=1)
    assert max(sizes) <= 10 and sum(sizes) >= 64
