"""What every kind of chain and method must do alike: steps that know their own ends only, costs that are integrals,
noise that nothing shares, groups, stored paths, temperatures."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cases import F64, SmallControl, nonlinear, randn, random_lq

import sdecontrol as sc
from sdecontrol.methods.base import Batch, Run
from sdecontrol.methods.on_paths import collect, path_state
from sdecontrol.particles.smc import ParticleSettings, Proposal, run_particles
from sdecontrol.paths.replay import ReplayBuffer
from sdecontrol.problems.simulate import simulate_chain

POINT = sc.Dirac(torch.tensor([0.3, -0.2], dtype=F64))
GRIDS = ([0.0, 0.1, 0.4, 1.0], [0.0, 0.25, 0.4, 1.0])  # which share their last step


def sin(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x).sum(1)


def semilinear() -> sc.ControlProblem:
    A = torch.tensor([[-3.0, 0.4], [0.2, -1.0]], dtype=F64)
    return sc.ControlProblem(sc.SemilinearSDE(lambda t: A * (1 + t), lambda x, t: torch.sin(x) * t, 0.7), POINT, sin)


def generative() -> sc.ControlProblem:
    mixture = sc.GaussianMixture(torch.tensor([0.4, 0.6], dtype=F64), randn(2, 2, seed=1), 0.3)
    return sc.ControlProblem(sc.generative_sde(mixture, schedule=sc.VP(0.5, 3.0)), reward=sin)


def jumps() -> sc.ControlProblem:
    Q = torch.tensor([[-1.0, 0.6, 0.4], [0.3, -0.5, 0.2], [0.1, 0.8, -0.9]], dtype=F64)
    return sc.ControlProblem(sc.JumpProcess(lambda t: (1 + t) * Q, 1.0, 0), reward=lambda x: x[:, 0].double())


def sphere() -> sc.ControlProblem:
    start = sc.Dirac(torch.tensor([0.0, 0.6, 0.8], dtype=F64))
    return sc.ControlProblem(sc.ManifoldSDE(sc.Sphere(2), None, lambda t: 0.5 + t), start, lambda x: x[:, 2])


def gibbs() -> sc.ControlProblem:
    return sc.gibbs_problem(lambda x: -x.square().sum(1), 2, scale=1.0, centre=0.0, dtype=F64)


def stopped() -> sc.ControlProblem:
    problem = nonlinear()
    return sc.ControlProblem(
        problem.reference, problem.initial, problem.reward_function, stop=lambda x: 5.0 - x[:, 0].abs()
    )


KINDS: dict[str, tuple[Any, str | None]] = {
    "euler": (nonlinear, "euler"),
    "exact": (lambda: random_lq(2, seed=1), "exact"),
    "exponential": (semilinear, "exponential"),
    "generative, euler": (generative, "euler"),
    "generative, exponential": (generative, "exponential"),
    "jump, exact": (jumps, None),
    "manifold": (sphere, None),
    "density on its clock": (gibbs, None),
    "stopped": (stopped, "euler"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_depends_on_its_own_ends_alone(kind: str) -> None:
    """From one state, with one noise and one control: the same step of two grids gives the same next state and the same
    log-ratio, and a step of other ends gives another."""
    make, scheme = KINDS[kind]
    problem = make()
    T = problem.horizon
    grids = [[T * t for t in grid] for grid in GRIDS]
    chains = [problem.chain(grid, scheme) for grid in grids]
    x = problem.draw_start(5, 0)
    shape = problem.control_shape  # of tokens a constant is no tilt
    u = torch.linspace(-0.4, 0.6, shape.numel(), dtype=F64).reshape(shape).expand(5, *shape)
    found = []
    for chain, k in ((chains[0], chains[0].steps - 1), (chains[1], chains[1].steps - 1), (chains[0], chains[0].start)):
        c = chain.shift_at(k, x, u)
        xi = randn(5, *chain.noise_shape, seed=3)
        to = chain.step(k, x, xi, c)
        draws = chain.draws(xi[None], c[None], to[None], x[None])
        found.append((to.double(), chain.log_ratio(c[None], draws)[0]))
    for a, b in zip(*found[:2]):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[0][1], found[2][1], rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_uniform_and_an_uneven_grid_of_as_many_steps_are_two_chains(kind: str) -> None:
    make, scheme = KINDS[kind]
    problem = make()
    uneven = [problem.horizon * t for t in GRIDS[0]]
    even = [problem.horizon * k / 3 for k in range(4)]
    for _ in range(2):
        for asked in (even, uneven):
            clock = problem.chain(asked, scheme).clock
            assert clock[-4:] == pytest.approx(asked, abs=1e-12)
            paths = sc.simulate(problem, 4, time_steps=asked, **({} if scheme is None else {"scheme": scheme}), seed=0)
            assert paths.times.tolist() == clock
    assert problem.chain(3, scheme).clock != problem.chain(uneven, scheme).clock


@pytest.mark.parametrize("scheme", ["euler", "exact"])
def test_costs_and_control_errors_are_integrals_on_any_grid(scheme: str) -> None:
    """``int (2 + t) dt`` by left ends, and ``T^-1 int |u - u*|^2 dt`` of a control that is off by a function of t."""
    sde = sc.LinearSDE(-torch.eye(2, dtype=F64), 0.5)
    cost = lambda x, t: 2 + t + 0 * x[:, 0]  # noqa: E731
    grid = [0.0, 0.05, 0.4, 0.45, 1.0]
    h = torch.tensor(grid, dtype=F64).diff()
    problem = sc.ControlProblem(sde, POINT, sc.Linear(torch.ones(2, dtype=F64)), cost)
    paths = sc.simulate(problem, 3, time_steps=grid, scheme=scheme, seed=0)
    want = float((h * (2 + torch.tensor(grid[:-1], dtype=F64))).sum())
    assert torch.allclose(paths.running_cost, torch.full((3,), want, dtype=F64), rtol=1e-12)
    free = sc.ControlProblem(sde, POINT, sc.Linear(torch.ones(2, dtype=F64)))
    exact = sc.exact_solution(free, grid, scheme=scheme)

    class Off(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            star = torch.stack([exact.control(row[None], float(s))[0] for row, s in zip(x, t)])
            return star + (1 + t[:, None]) * torch.tensor([0.3, -0.1], dtype=F64)

    solution = type("Solved", (), {"problem": free, "chain": free.chain(grid, scheme), "control": Off()})()
    error = sc.control_error(solution, exact, n=4).absolute.value
    assert error == pytest.approx(0.1 * float((h * (1 + torch.tensor(grid[:-1], dtype=F64)) ** 2).sum()), rel=1e-9)


# ---------------------------------------------------------------- noise


def test_no_two_paths_of_batches_parts_iterations_and_stored_batches_share_a_draw() -> None:
    """Every number of every path of 3 iterations with 3 parts each is another one: 9 x 96 paths of 4 steps."""
    problem = random_lq(2, seed=1, start="fixed")
    seen: list[float] = []
    for iteration, part in itertools.product(range(3), range(3)):
        run = Run(problem, problem.chain(4), 96, 3, 7, None, iteration)
        batch = run.batch(part)
        seen += torch.cat([batch.noise[k].flatten() for k in range(4)]).tolist() + batch.x0.flatten().tolist()
    assert len(set(seen)) == len(seen) == 9 * 96 * (4 * 2 + 2)


def test_systems_of_particles_and_chunks_of_paths_share_no_draw() -> None:
    """Of 6 systems of 2048, in two groups of at most 8192 particles; and of 300 paths simulated 64 at a time, which are
    those of one call."""
    problem = random_lq(2, seed=1)
    chain = problem.chain(3)
    found = run_particles(problem, chain, Proposal(), 6, ParticleSettings(2048, ess_threshold=0.0), 5)
    ends = found.end.reshape(-1, 2)[:, 0].tolist()
    assert len(set(ends)) == len(ends) == 6 * 2048
    whole = simulate_chain(problem, chain, 300, None, seed=5)
    parts = sc.simulate(problem, 300, time_steps=3, seed=5, chunk=64, keep="end")
    assert torch.allclose(whole.end, parts.end, atol=1e-12)
    assert len(set(whole.end[:, 0].tolist())) == 300


# ---------------------------------------------------------------- groups, stored paths


class Fixed(Run):
    """A run whose batch is these rows of one noise."""

    rows: slice = slice(None)
    noise: Any = None

    def batch(self, part: int = 0, group_size: int = 1) -> Batch:
        noise: Any = self.noise[:, self.rows]
        return Batch(self.problem.draw_start(noise.shape[1], 0), noise, None, 0)


def gradient(problem: Any, method: Any, noise: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
    run = Fixed(problem, problem.chain(4), noise[:, rows].shape[1], 1, 3, SmallControl(2, 2))
    run.rows, run.noise = rows, noise
    state = method.setup(run)
    method.step(state, run)
    return torch.cat([p.grad.flatten() for p in state.control.parameters()])


GROUPED = {
    "log-variance": lambda group: sc.LogVariance(group_size=group),
    "cross-entropy": lambda group: sc.CrossEntropy(group_size=group),
    "soft-ppo, per time": lambda group: sc.SoftPPO(epochs=1, baseline="per-time", group_size=group),
    "soft-ppo, batch": lambda group: sc.SoftPPO(epochs=1, baseline="batch", group_size=group),
}


@pytest.mark.filterwarnings("ignore:.*effective:RuntimeWarning")
@pytest.mark.parametrize("name", GROUPED)
def test_the_gradient_of_groups_is_the_mean_of_those_of_each_alone(name: str) -> None:
    problem, noise = random_lq(2, seed=1), randn(4, 48, 2, seed=4)
    make = GROUPED[name]
    whole = gradient(problem, make(16), noise)
    alone = [gradient(problem, make(16), noise, slice(i, i + 16)) for i in (0, 16, 32)]
    assert torch.allclose(whole, torch.stack(alone).mean(0), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(whole, gradient(problem, make(48), noise), rtol=1e-3)


def test_a_buffer_gives_exactly_the_last_paths_it_was_given() -> None:
    problem = random_lq(2, seed=1, running=True)
    chain = problem.chain(4)
    buffer = ReplayBuffer(chain, 96, None, costs=True)
    drawn = []
    for iteration in range(3):
        run = Run(problem, chain, 64, 1, 7, SmallControl(2, 2), iteration)
        drawn.append(collect(path_state(run), run, 0).towards(problem))
        buffer.add(drawn[-1])
    given = torch.cat([p.end for p in drawn])[-96:]
    out = buffer.draw(96, torch.Generator().manual_seed(0), drawn[0].target)  # type: ignore[arg-type]
    order = {tuple(row.tolist()): i for i, row in enumerate(given)}
    index = torch.tensor([order.pop(tuple(row.tolist())) for row in out.end])
    assert not order  # each once, and no other
    for name in ("log_weights", "log_ratio", "kl"):
        stored = torch.cat([getattr(p, name)().detach() for p in drawn])[-96:][index]
        assert torch.allclose(getattr(out, name)().detach(), stored, rtol=1e-12)


# ---------------------------------------------------------------- resumed paths, clocks, temperatures


def test_paths_that_go_on_with_another_control_have_its_log_ratio_from_there() -> None:
    """Steps 2 and 3 of a chain of 4, from given states: of the control that drew them and of the one before, by
    Gaussian densities."""
    problem, first, second = random_lq(2, seed=1), SmallControl(2, 2, seed=1), SmallControl(2, 2, seed=5)
    grid = [0.0, 0.2, 0.3, 0.7, 1.0]
    begun = sc.simulate(problem, 6, first, time_steps=grid, seed=0)
    x = begun.states[2]
    gone = sc.simulate(problem, 6, second, time_steps=grid, seed=1, state=x, step=2)
    assert torch.equal(gone.states[0], x) and len(gone.states) == 3
    chain = problem.chain(grid)
    for control in (second, first):
        total = torch.zeros(6, dtype=F64)
        for j, k in enumerate((2, 3)):
            a, b = gone.states[j], gone.states[j + 1]
            mean, scale = chain.kernel(k, a)
            h = grid[k + 1] - grid[k]
            c = math.sqrt(h) * control(a, torch.full((6,), grid[k], dtype=F64))
            z = torch.linalg.solve(scale, (b - mean)[..., None])[..., 0] if scale.ndim == 3 else (b - mean) / scale
            total += (c * z).sum(1) - 0.5 * c.square().sum(1)
        found = gone.log_ratio(None if control is second else first)
        assert torch.allclose(found, total.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "schedule", [sc.FlowMatching(), sc.VP(0.5, 3.0), sc.VE(0.1, 5.0)], ids=lambda s: type(s).__name__
)
def test_a_classifier_of_noisy_states_is_asked_on_the_clock_of_the_model(schedule: Any) -> None:
    asked: dict[str, list[float]] = {"model": [], "classifier": []}

    def model(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        asked["model"].append(float(s[0]))
        return -0.5 * x

    def classifier(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        asked["classifier"].append(float(s[0]))
        return torch.cat((x, -x), 1)

    prediction = "velocity" if isinstance(schedule, sc.FlowMatching) else "noise"
    reference = sc.generative_sde(model, schedule, prediction, shape=(1,), noise_level=0.7)
    problem = sc.ControlProblem(reference, reward=lambda x: x[:, 0], start="fixed")
    solution = sc.solve(problem, sc.ClassifierGuidance(classifier, 1, noisy=True), time_steps=5, progress=False)
    for times in asked.values():
        times.clear()
    solution.simulate(2, seed=0)
    model_s, classifier_s = (sorted({round(s, 5) for s in times}) for times in asked.values())
    assert len(classifier_s) == 5 and set(classifier_s) <= set(model_s)
    assert asked["classifier"][0] == pytest.approx(asked["model"][0], abs=1e-6)


TEMPERED = {
    "backpropagation": sc.RewardBackprop("adjoint"),
    "adjoint matching": sc.AdjointMatching(),
    "socm": sc.SOCM(),
    "log-variance": sc.LogVariance(),
    "log-variance, reference": sc.LogVariance(paths="reference"),
    "path-consistency": sc.PathConsistency("all", paths="reference"),
    "path-consistency, 2": sc.PathConsistency(2),
    "cross-entropy": sc.CrossEntropy(),
    "reward-weighted mle": sc.RewardWeightedMLE(roll_in="none"),
    "reinforce": sc.Reinforce(),
    "soft-ppo": sc.SoftPPO(epochs=1, baseline="per-time"),
    "bridge matching": sc.BridgeMatching(),
}


@pytest.mark.filterwarnings("ignore:.*effective:RuntimeWarning")
@pytest.mark.parametrize("name", TEMPERED)
def test_reward_cost_and_temperature_scaled_alike_are_the_same_problem(name: str) -> None:
    """alpha is in every weight, residual and adjoint: of 2.5 r, 2.5 f, 2.5 alpha the gradient is that of r, f, alpha;
    of r, f and 2.5 alpha it is another."""
    sde = sc.LinearSDE(torch.tensor([[-0.5, 0.3], [0.1, -0.4]], dtype=F64), 0.8)
    cost = None if name == "bridge matching" else (lambda x, t: 0.3 * x.square().sum(1))

    def problem(size: float, alpha: float) -> sc.ControlProblem:
        f = None if cost is None else (lambda x, t: size * cost(x, t))
        return sc.ControlProblem(sde, POINT, lambda x: size * sin(x), f, alpha=alpha)

    noise = randn(4, 64, 2, seed=4)
    scheme: Any = TEMPERED[name]
    want = gradient(problem(1.0, 0.7), scheme, noise)
    assert torch.allclose(gradient(problem(2.5, 1.75), scheme, noise), want, rtol=1e-7, atol=1e-10)
    assert not torch.allclose(gradient(problem(1.0, 1.75), scheme, noise), want, rtol=1e-2)
