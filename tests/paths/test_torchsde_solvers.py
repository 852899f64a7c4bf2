"""torchsde's solvers behind ``simulate``: steps, noise, noise types, refusals."""

import math
from itertools import pairwise

import pytest
import torch
from cases import F64, SmallControl, nonlinear, randn, random_lq

import sdecontrol as sc
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.paths.brownian import GridBrownian, coarsen
from sdecontrol.paths.equations import ControlledSDE, noise_kind
from sdecontrol.paths.solvers import SOLVERS
from sdecontrol.randomness import SeededNoise

ALL = sorted(SOLVERS)
CALLS = {"milstein": 1, "srk": 3, "heun": 2, "midpoint": 2, "euler-heun": 1, "reversible-heun": 1}


def scalar(drift, diffusion, x0=1.0, dtype=F64, **more):
    start = sc.Dirac(torch.tensor([x0], dtype=dtype))
    return sc.ControlProblem(sc.SDE(drift, diffusion, dim=1), initial=start, **more)


@pytest.mark.parametrize("scheme", ALL)
@pytest.mark.parametrize("steps", [50, 100, 200, 400, 1000])
def test_a_float32_grid_takes_exactly_its_steps(scheme, steps):
    calls = []

    def drift(x, t):
        calls.append(float(t))
        return -x

    problem = scalar(drift, torch.tensor(0.5), dtype=torch.float32)
    calls.clear()
    paths = sc.simulate(problem, 2, time_steps=steps, scheme=scheme, seed=0)
    extra = 1 if scheme == "reversible-heun" else 0
    assert len(calls) == CALLS[scheme] * steps + extra
    assert paths.states.shape == (steps + 1, 2, 1) and max(calls) <= 1.0
    assert torch.equal(paths.times, problem.chain(steps).times)


@pytest.mark.parametrize("scheme", ALL)
def test_grids_that_are_not_uniform(scheme):
    """A deterministic part that is linear in t is integrated exactly whatever the steps; the noise has the steps'
    size."""
    problem = scalar(lambda x, t: torch.ones_like(x), torch.tensor(0.7, dtype=F64), x0=0.0)
    grid = [0.0, 0.1, 0.15, 0.6, 1.0]
    paths = sc.simulate(problem, 3, time_steps=grid, scheme=scheme, seed=2)
    noise = SeededNoise(2, 3, 4, (1,), dtype=F64, device="cpu").all()
    h = torch.tensor(grid, dtype=F64).diff().reshape(-1, 1, 1)
    want = torch.tensor(grid[1:], dtype=F64).reshape(-1, 1, 1) + 0.7 * (h.sqrt() * noise).cumsum(0)
    assert torch.allclose(paths.states[1:], want, atol=1e-13)


@pytest.mark.parametrize("scheme", ["milstein", "euler-heun"])
def test_with_additive_noise_the_path_is_the_euler_chains(scheme):
    problem, u = random_lq(2, m=3, seed=4), SmallControl(2, 3)
    mine = sc.simulate(problem, 70, control=u, time_steps=30, scheme=scheme, seed=5)
    euler = sc.simulate(problem, 70, control=u, time_steps=30, seed=5)
    assert torch.allclose(mine.states, euler.states, atol=1e-13)
    f = torch.stack([problem.running_cost(x, t) for x, t in zip(euler.states, euler.times)])
    assert torch.allclose(mine.running_cost, (f[1:] + f[:-1]).sum(0) / 60, atol=1e-13)  # the trapezoidal rule


@pytest.mark.parametrize("scheme", ALL)
def test_every_solver_converges_to_the_same_controlled_process(scheme):
    """Matrix noise, a control, a controlled start, a running cost: near a fine Euler path of the same Brownian
    motion."""
    problem, u = random_lq(2, m=3, seed=1, start="controlled"), SmallControl(2, 3)
    chain = problem.chain(400)
    euler = sc.simulate(problem, 50, control=u, time_steps=400, seed=3)
    mine = sc.simulate(problem, 50, control=u, time_steps=400, scheme=scheme, seed=3)
    # the learned start is the chain
    assert torch.equal(mine.states[: chain.start + 1], euler.states[: chain.start + 1])
    assert (mine.end - euler.end).abs().max() < 0.02
    assert (mine.running_cost - euler.running_cost).abs().max() < 0.02
    assert torch.equal(mine.times, euler.times) and torch.equal(mine.samples, mine.end)


def geometric_error(scheme, steps, noise, areas, clock):
    a, s = 0.5, 0.6
    problem = scalar(lambda x, t: a * x, lambda x, t: s * x)
    coarse, xi, eta = coarsen(clock, noise, areas, every=(len(clock) - 1) // steps)
    given = (xi, eta) if scheme == "srk" else xi
    end = sc.simulate(problem, noise.shape[1], time_steps=coarse, scheme=scheme, noise=given).end
    w = noise.sum(0) / math.sqrt(len(clock) - 1)
    return float((end - ((a - s**2 / 2) + s * w).exp()).abs().mean())


@pytest.mark.parametrize("scheme, order", [("euler", 0.5), ("milstein", 1), ("heun", 1), ("midpoint", 1), ("srk", 1.5)])
def test_sde_strong_order(scheme, order):
    """Geometric Brownian motion against its closed form, refined grids of the same Brownian paths."""
    noise, areas = randn(256, 1000, 1, seed=1), randn(256, 1000, 1, seed=2)
    clock = [k / 256 for k in range(257)]
    errors = [geometric_error(scheme, k, noise, areas, clock) for k in (16, 64, 256)]
    slopes = [math.log2(a / b) / 2 for a, b in pairwise(errors)]
    assert abs(slopes[1] - order) < 0.12, slopes


def test_one_noise_of_two_states_keeps_its_order():
    """torchsde's own Milstein uses the transposed Jacobian here (order 1/2 for an asymmetric one); ours does not."""

    def diffusion(x, t):
        return torch.stack((x[:, 1], 0.2 * x[:, 0]), 1).unsqueeze(2)

    problem = sc.ControlProblem(
        sc.SDE(lambda x, t: torch.zeros_like(x), diffusion, dim=2), initial=sc.Dirac(torch.ones(2, dtype=F64))
    )
    assert noise_kind(problem.reference, problem.draw_start(3, 0), torch.tensor(0.5, dtype=F64)).name == "scalar"
    noise, clock = randn(256, 500, 1, seed=1), [k / 256 for k in range(257)]
    B = torch.tensor([[0.0, 1.0], [0.2, 0.0]], dtype=F64)
    w = (noise.sum(0) / 16).reshape(-1, 1, 1)
    exact = (torch.linalg.matrix_exp(B * w - 0.5 * B @ B) @ torch.ones(2, dtype=F64)).reshape(-1, 2)
    for scheme, order in (("milstein", 1.0), ("srk", 1.5), ("heun", 1.0)):
        errors = []
        for steps in (32, 128):
            coarse, xi, eta = coarsen(clock, noise, randn(256, 500, 1, seed=3), every=256 // steps)
            given = (xi, eta) if scheme == "srk" else xi
            end = sc.simulate(problem, 500, time_steps=coarse, scheme=scheme, noise=given).end
            errors.append(float((end - exact).abs().mean()))
        assert math.log2(errors[0] / errors[1]) / 2 > order - 0.2, scheme


def test_coarse_noise_is_the_sum_of_the_fine_one_with_the_right_joint_law():
    clock = [0.0, 0.1, 0.4, 0.5, 1.0]
    noise, areas = randn(4, 200_000, seed=1), randn(4, 200_000, seed=2)
    coarse, xi, eta = coarsen(clock, noise, areas)
    assert coarse == [0.0, 0.4, 1.0]
    h = torch.tensor([0.1, 0.3, 0.1, 0.5], dtype=F64)
    w = noise * h.sqrt()[:, None]
    assert torch.allclose(xi[0] * math.sqrt(0.4), w[0] + w[1]) and torch.allclose(xi[1] * math.sqrt(0.6), w[2] + w[3])
    both = torch.cat((xi, eta))
    assert (torch.cov(both) - torch.eye(4, dtype=F64)).abs().max() < 4 * math.sqrt(2 / 200_000)
    one = coarsen(clock, noise, areas, every=4)  # in one go or in two
    two = coarsen(coarse, xi, eta)
    assert torch.allclose(one[1], two[1]) and torch.allclose(one[2], two[2])


def test_the_space_time_integral_has_the_right_joint_law():
    n, h = 200_000, 0.3
    source = randn(2, n, 1, seed=1)
    bm = GridBrownian([0.0, h], source[:1], n, 1, source, area=source[1:])
    W, U = bm(torch.tensor(0.0), torch.tensor(h, dtype=F64), return_U=True)
    cov = torch.cov(torch.stack((W.flatten(), U.flatten())))
    want = torch.tensor([[h, h**2 / 2], [h**2 / 2, h**3 / 3]], dtype=F64)
    assert ((cov - want).abs() / want).max() < 0.015
    with pytest.raises(RuntimeError, match="steps of the grid"):
        bm(torch.tensor(0.0), torch.tensor(0.1))


KINDS = {
    "additive": (lambda x, t: 0.5 + 0 * t, False),
    "diagonal": (lambda x, t: 1 + x**2, False),
    "general": (lambda x, t: 1 + x.sum(1, keepdim=True).expand_as(x) ** 2, False),
    "scalar": (lambda x, t: (1 + x**2).unsqueeze(2), True),
    "additive matrix": (lambda x, t: torch.ones(2, 3, dtype=x.dtype), True),
    "general matrix": (lambda x, t: (1 + x**2).unsqueeze(2).expand(-1, -1, 2), True),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_of_noise_is_seen(name):
    diffusion, matrix = KINDS[name]
    problem = sc.ControlProblem(sc.SDE(lambda x, t: -x, diffusion, dim=2), initial=sc.Dirac(torch.zeros(2, dtype=F64)))
    kind = noise_kind(problem.reference, problem.draw_start(2, 0), torch.tensor(0.5, dtype=F64))
    assert (kind.name, kind.matrix) == (name.split()[0], matrix)


@pytest.mark.parametrize("name", ["diagonal", "general", "scalar", "general matrix"])
def test_the_correction_is_the_sum_of_column_derivatives(name):
    diffusion, matrix = KINDS[name]
    sde = sc.SDE(lambda x, t: torch.zeros_like(x), diffusion, dim=2)
    x, t = randn(4, 2, seed=1), torch.tensor(0.5, dtype=F64)
    sde.probe(F64, torch.device("cpu"))
    equation = ControlledSDE(sde, noise_kind(sde, x, t), stratonovich=True)

    def dense(row):
        sigma = sde.diffusion(row[None], t)[0]
        return sigma if matrix else torch.diag(sigma)

    want = []
    for row in x:
        J = torch.autograd.functional.jacobian(dense, row)  # (d, m, d)
        want.append(torch.einsum("ijl,lj->i", J, dense(row)))
    assert torch.allclose(equation.f(t, x), -0.5 * torch.stack(want), atol=1e-12)


def test_the_same_seed_gives_the_same_path_and_leaves_the_global_generators_alone():
    problem = nonlinear()
    before, state = torch.get_rng_state(), torch.random.initial_seed()
    a = sc.simulate(problem, 130, time_steps=10, scheme="heun", seed=3)
    b = sc.simulate(problem, 130, time_steps=10, scheme="heun", seed=3, keep="end")
    assert torch.equal(a.end, b.end) and torch.equal(b.states, a.states)
    assert torch.allclose(sc.simulate(problem, 20, time_steps=10, scheme="heun", seed=3).end, a.end[:20], atol=1e-12)
    c = sc.simulate(random_lq(2, seed=1), 5, time_steps=4, scheme="srk", seed=3, tolerance=1e-2)
    assert torch.equal(
        c.end, sc.simulate(random_lq(2, seed=1), 5, time_steps=4, scheme="srk", seed=3, tolerance=1e-2).end
    )
    assert torch.equal(before, torch.get_rng_state()) and state == torch.random.initial_seed()
    rest = sc.simulate(problem, 130, time_steps=10, scheme="heun", seed=3, state=a.states[4], step=4)
    assert torch.equal(rest.states, a.states[4:])


@pytest.mark.parametrize("scheme", ["srk", "heun", "milstein"])
def test_adaptive_steps_reach_the_tolerance(scheme):
    """Against the same Brownian tree at a much finer tolerance; and time is never interpolated: grid times are
    steps."""
    problem = scalar(lambda x, t: -20 * (x - torch.cos(6 * t)), lambda x, t: 0.3 * torch.cos(x), x0=0.0)
    fine = sc.simulate(problem, 8, time_steps=5, scheme=scheme, seed=1, tolerance=1e-3)
    loose = sc.simulate(problem, 8, time_steps=5, scheme=scheme, seed=1, tolerance=3e-2)
    assert fine.states.shape == (6, 8, 1)
    assert 0 < (fine.end - loose.end).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(3, 4), (1, 8, 8)])
@pytest.mark.parametrize("scheme", ALL)
def test_solvers_with_states_of_any_rank(shape, scheme):
    problem = sc.ControlProblem(
        sc.SDE(lambda x, t: -x, lambda x, t: 0.5 + 0.1 * torch.tanh(x), shape=shape),
        initial=sc.Gaussian(torch.zeros(shape, dtype=F64), 1.0),
    )
    u = lambda x, t: 0.1 * x  # noqa: E731
    paths = sc.simulate(problem, 7, control=u, time_steps=100, scheme=scheme, seed=1)
    assert paths.states.shape == (101, 7, *shape)
    euler = sc.simulate(problem, 7, control=u, time_steps=100, seed=1)
    assert (paths.end - euler.end).abs().max() < 0.05
    assert not torch.equal(paths.end, euler.end)


def test_conditions_and_generative_references():
    labels = torch.tensor([[0.0], [1.0], [2.0]], dtype=F64)
    problem = sc.ControlProblem(
        sc.SDE(lambda x, t, y: y - x, 0.5, dim=1), initial=sc.Dirac(torch.zeros(1, dtype=F64)), condition=labels
    )
    mine = sc.simulate(problem, 30, control=lambda x, t, y: y, time_steps=20, scheme="srk", seed=0)
    euler = sc.simulate(problem, 30, control=lambda x, t, y: y, time_steps=20, seed=0)
    assert torch.equal(mine.condition, euler.condition) and (mine.end - euler.end).abs().max() < 0.1
    mixture = sc.GaussianMixture(torch.ones(2, dtype=F64), torch.eye(2, dtype=F64), 0.5)
    tuned = sc.ControlProblem(sc.generative_sde(mixture, sc.VP()), reward=sc.Linear(torch.ones(2, dtype=F64)))
    solution = sc.solve(tuned, "reward-backprop", time_steps=10, iterations=2, batch_size=64, seed=0)
    paths = sc.simulate(tuned, 10, control=solution.control, scheme="heun", seed=0)
    assert paths.states.shape == (11, 10, 2)  # the steps that it was solved with


# ------------------------------------------------------------------------------------------------ refusals


def test_likelihoods_are_refused_by_name():
    paths = sc.simulate(random_lq(2, seed=1), 4, time_steps=4, scheme="srk", seed=0)
    for ask in (paths.log_ratio, paths.kl, lambda: paths.noises, lambda: paths.shifts, lambda: paths.controls):
        with pytest.raises(sc.NoLikelihood, match=r"srk.*scheme='euler'"):
            ask()
    with pytest.raises(TypeError, match="srk"):
        log_weights(random_lq(2, seed=1), paths)
    for scheme in ("srk", "probability-flow"):
        with pytest.raises(TypeError, match=f"{scheme}.*no Gaussian kernels.*simulate"):
            sc.solve(random_lq(2, seed=1), "reward-backprop", scheme=scheme, iterations=1)
        with pytest.raises(TypeError, match=scheme):
            sc.exact_solution(random_lq(2, seed=1), time_steps=5, scheme=scheme)


REFUSED = {
    "srk with general noise": (lambda: run(nonlinear(), "srk"), ValueError, "general noise.*heun"),
    "milstein with general noise": (lambda: run(nonlinear(), "milstein"), ValueError, "general noise"),
    "adaptive general noise": (lambda: run(nonlinear(), "heun", tolerance=0.1), ValueError, "tolerance"),
    "tolerance of euler": (lambda: run(nonlinear(), "euler", tolerance=0.1), ValueError, "fixed steps"),
    "tolerance <= 0": (lambda: run(random_lq(), "srk", tolerance=0.0), ValueError, "tolerance must be > 0"),
    "one noise for srk": (lambda: run(random_lq(), "srk", noise=randn(4, 3, 2, seed=0)), ValueError, "pair"),
    "noise with tolerance": (
        lambda: run(random_lq(), "heun", noise=randn(4, 3, 2, seed=0), tolerance=0.1),
        ValueError,
        "adaptive",
    ),
    "wrong noise": (lambda: run(random_lq(), "heun", noise=randn(3, 3, 2, seed=0)), ValueError, "noise must have"),
    "probability flow of an SDE": (lambda: run(random_lq(), "probability-flow"), TypeError, "generative_sde"),
    "misspelt": (lambda: run(random_lq(), "mlistein"), ValueError, "unknown scheme"),
    "no derivative": (lambda: run(no_gradient(), "heun"), TypeError, "Ito|derivative"),
}


def run(problem, scheme, **more):
    return sc.simulate(problem, 3, time_steps=4, scheme=scheme, seed=0, **more)


def no_gradient():
    return scalar(lambda x, t: -x, lambda x, t: torch.from_numpy(1 + x.detach().numpy() ** 2))


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_solver_cannot_do_is_a_named_error(name):
    call, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        call()


def test_milstein_needs_no_derivative():
    with_graph = scalar(lambda x, t: -x, lambda x, t: 1 + x**2)
    a, b = (sc.simulate(p, 5, time_steps=50, scheme="milstein", seed=0).end for p in (no_gradient(), with_graph))
    assert torch.equal(a, b)


@pytest.mark.parametrize("keep", ["all", "end"])
@pytest.mark.parametrize("where", ["drift", "diffusion", "control", "running cost"])
def test_what_is_not_finite_is_located(where, keep):
    bad = lambda name, x, t: torch.nan if name == where and t > 0.45 else 0.0  # noqa: E731
    problem = scalar(
        lambda x, t: -x + bad("drift", x, t),
        lambda x, t: 0.5 + 0.1 * x.tanh() + bad("diffusion", x, t),
        running_cost=lambda x, t: x[:, 0] ** 2 + bad("running cost", x, t),
    )
    control = lambda x, t: 0.1 * x + bad("control", x, t[0])  # noqa: E731
    with pytest.raises(sc.NonFiniteError, match=where) as caught:
        sc.simulate(problem, 3, control=control, time_steps=10, scheme="milstein", seed=0, keep=keep)
    assert caught.value.step == 5


# ----------------------------------------------------------------------------------------------- torchsde's own objects


class Theirs(torch.nn.Module):
    def __init__(self, noise_type, sde_type="ito", d=2, m=3):
        super().__init__()
        self.noise_type, self.sde_type = noise_type, sde_type
        self.net = torch.nn.Linear(d, d).double()
        self.d, self.m = d, m

    def f(self, t, y):
        return -y + 0.1 * self.net(y) * t

    def g(self, t, y):
        one = 0.5 + 0.1 * torch.tanh(y)
        if self.noise_type == "diagonal":
            return one
        if self.noise_type == "additive":
            return torch.ones(len(y), self.d, self.m, dtype=y.dtype)
        return one.unsqueeze(2).expand(-1, -1, 1 if self.noise_type == "scalar" else self.m)


@pytest.mark.parametrize("noise_type", ["diagonal", "additive", "scalar", "general"])
def test_torchsde_objects_are_references(noise_type):
    """Our Euler chain of one is torchsde's Euler on the same increments."""
    import torchsde

    theirs = Theirs(noise_type)
    sde = sc.SDE.from_torchsde(theirs, dim=2)
    problem = sc.ControlProblem(sde, initial=sc.Dirac(torch.ones(2, dtype=F64)))
    assert theirs in [m for module in problem.modules() for m in module.modules()]
    paths = sc.simulate(problem, 6, time_steps=8, seed=1)
    bm = GridBrownian([k / 8 for k in range(9)], paths.noises, 6, sde.control_shape[0], paths.end)
    ys = torchsde.sdeint(
        theirs, torch.ones(6, 2, dtype=F64), torch.linspace(0, 1, 9, dtype=F64), bm=bm, method="euler", dt=1 / 8
    )
    assert torch.allclose(paths.states, ys, atol=1e-12)
    kind = noise_kind(sde, problem.draw_start(2, 0), torch.tensor(0.5, dtype=F64)).name
    assert kind == noise_type


def test_other_objects_are_refused():
    with pytest.raises(ValueError, match=r"stratonovich.*Ito"):
        sc.SDE.from_torchsde(Theirs("diagonal", "stratonovich"), dim=2)
    with pytest.raises(ValueError, match="noise_type"):
        sc.SDE.from_torchsde(Theirs("diagnal"), dim=2)
    with pytest.raises(TypeError, match=r"protocol.*lacks"):
        sc.SDE.from_torchsde(torch.nn.Linear(2, 2), dim=2)
