"""Methods on manifolds, against exact solutions: all learn, gradients go through the exponential map, and what is
learned is saved and resumed."""

import itertools

import pytest
import torch
from cases import F64, slow_but

import sdecontrol as sc
from sdecontrol.chains.shifts import shifts_along
from sdecontrol.paths.closed_loop import ClosedLoop
from sdecontrol.paths.lean_adjoint import StepJacobians, own_noise
from sdecontrol.paths.paths import Paths, Record, Totals

K, ALPHA = 16, 0.7
AXES = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])


def modes(x):
    return ALPHA * torch.logsumexp(3 * x @ AXES.to(x).mT, 1)


def wave(x):
    return (x - 1).cos().sum(1) + 0.4 * (2 * x[:, 0] + x[:, -1]).sin()


def drift(x, t):
    return 0.5 * x.flip(1).sin() + 0.3


def sphere(dtype=torch.float32, cost=None):
    start = sc.Dirac(torch.tensor([0.0, 0.6, -0.8], dtype=dtype))
    return sc.ControlProblem(sc.ManifoldSDE(sc.Sphere(2), sigma=0.9), start, modes, cost, ALPHA)


def torus(dtype=torch.float32, cost=None):
    start = sc.Dirac(torch.tensor([2.9, -1.0], dtype=dtype))
    return sc.ControlProblem(sc.ManifoldSDE(sc.Torus(2), drift, sigma=0.9), start, wave, cost, ALPHA)


PROBLEMS = {"sphere": sphere, "torus": torus}
#: relative control errors that these reach in the iterations; the reference's is 1
METHODS = {
    "adjoint-matching": (sc.AdjointMatching(), 40, 0.02),
    "adjoint-matching, plain": (sc.AdjointMatching(zero_variance=False), 30, 0.04),
    "reward-backprop": (sc.RewardBackprop(), 60, 0.1),
    "reward-backprop, adjoint": (sc.RewardBackprop(gradient="adjoint"), 60, 0.1),
    "log-variance": (sc.LogVariance(), 60, 0.1),
    "cross-entropy": (sc.CrossEntropy(), 60, 0.1),
    "soft-ppo": (sc.SoftPPO(), 40, 0.1),
    "soft-ppo, groups": (sc.SoftPPO(group_size=16, baseline="per-time"), 40, 0.1),
    "path-consistency": (sc.PathConsistency(), 60, 0.1),
    "path-consistency, 1 step": (sc.PathConsistency(1), 400, 0.35),
    "path-consistency, 3 steps": (sc.PathConsistency(3), 120, 0.2),
    "reinforce": (sc.Reinforce(), 60, 0.2),
    "reward-weighted-mle": (sc.RewardWeightedMLE(), 60, 0.2),
    "particle-matching": (sc.ParticleMatching(num_particles=512), 60, 0.15),
    "value-guidance": (sc.ValueGuidance("monte-carlo"), 120, 0.2),
    "value-guidance, soft-q": (sc.ValueGuidance("soft-q"), 400, 0.1),
    "path-integral-guidance": (sc.PathIntegralGuidance(num_paths=512), None, 0.1),
}
FIRST = ("sphere", "adjoint-matching"), ("torus", "log-variance")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), slow_but(list(itertools.product(PROBLEMS, METHODS)), *FIRST))
def test_methods_come_near_the_exact_control(kind, name):
    problem, (method, iterations, bound) = PROBLEMS[kind](), METHODS[name]
    options = {} if iterations is None else {"iterations": iterations, "batch_size": 128}
    solution = sc.solve(problem, method, time_steps=K, seed=0, progress=False, **options)
    error = sc.control_error(solution, sc.exact_solution(problem, like=solution), n=256)
    assert error.relative.value < bound, error


@pytest.mark.parametrize("method", [sc.SMC(), sc.TemperedSMC(num_particles=256), sc.BestOfN(selection="softmax")])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_particles_have_the_exact_log_z_or_mean_reward(kind, method):
    """4.5 standard errors; the softmax of 64 draws has the law of the target up to O(1/64)."""
    problem = PROBLEMS[kind]()
    exact = sc.exact_solution(problem, time_steps=K)
    if isinstance(method, sc.BestOfN):
        method = sc.BestOfN(n=64, selection="softmax")
    solution = sc.solve(problem, method, time_steps=K, seed=0, progress=False)
    if isinstance(method, sc.BestOfN):
        ours, best = (problem.reward(s.sample(1024, seed=1)) for s in (solution, exact))
        error = float((ours.var() + best.var()).sqrt()) / 32
        assert abs(float(ours.mean() - best.mean())) < 4.5 * error + 0.02
        return
    found = solution.evaluate(2048, seed=1).log_z
    assert abs(found.value - float(exact.log_z)) < 4.5 * found.stderr < 0.5


@pytest.mark.parametrize("kind", PROBLEMS)
def test_what_is_subtracted_from_the_adjoint_is_odd_in_the_steps_noise(kind):
    """So its mean is 0 at every state, at any step size; and near the optimum it leaves little."""
    problem = PROBLEMS[kind](F64)
    chain, exact = problem.chain(K), sc.exact_solution(problem, time_steps=K)
    paths = sc.simulate(problem, 256, exact.control, time_steps=K, seed=1)
    network = sc.solve(
        problem, sc.AdjointMatching(), time_steps=K, iterations=3, batch_size=128, seed=0, progress=False
    )

    def subtracted(noises):
        record = Record(paths.states, noises, paths.shifts)
        shifted = Paths(chain, 0, K, paths.end, None, Totals(torch.zeros(256, dtype=F64)), record)
        jacobians = StepJacobians(shifted)
        states = shifted.states[:-1].clone().requires_grad_(True)
        c = shifts_along(chain, network.control, states)
        z, _ = own_noise(jacobians, states, c, ClosedLoop(chain), tolerance=0.1, most=0)
        return jacobians.scales_transposed(z)

    with torch.enable_grad():
        above, below = subtracted(paths.noises), subtracted(-paths.noises)
    assert torch.allclose(above, -below, atol=1e-12) and float(above.abs().mean()) > 1e-3


#: the torus, whose maps are sums; the sphere with the slow tests
TORUS_FIRST = [pytest.param(kind, marks=() if kind == "torus" else pytest.mark.slow) for kind in PROBLEMS]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TORUS_FIRST)
def test_the_variance_of_the_adjoint_nearly_vanishes_at_the_optimum(kind):
    """To a fifth of the plain lean adjoint's residual, where no curvature of the manifold is in the way."""
    found = []
    for zero_variance in (True, False):
        method = sc.AdjointMatching(zero_variance=zero_variance)
        options = {"time_steps": 20, "iterations": 25, "batch_size": 128, "seed": 0, "progress": False}
        found.append(sc.solve(torus() if kind == "torus" else sphere(), method, **options).history[-1]["loss"])
    assert found[0] < found[1] / (5 if kind == "torus" else 2)


class Stop:
    def on_step_end(self, state):
        if state.iteration == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("method", [sc.LogVariance(), sc.ValueGuidance("monte-carlo"), sc.PathConsistency(2)])
def test_solutions_are_saved_loaded_and_resumed(kind, method, tmp_path):
    problem = PROBLEMS[kind]()
    options = {"time_steps": K, "batch_size": 64, "seed": 0, "progress": False}
    whole = sc.solve(problem, method, iterations=6, **options)
    whole.save(tmp_path / "run")
    again = sc.load(tmp_path / "run", PROBLEMS[kind]())
    x = problem.reference.manifold.draw((9,), torch.Generator().manual_seed(0))
    assert torch.equal(whole.control(x, 0.4), again.control(x, 0.4))
    assert torch.equal(whole.sample(64, seed=1), again.sample(64, seed=1))
    options |= {"iterations": 6, "checkpoint_dir": tmp_path / "part", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        sc.solve(problem, method, callbacks=[Stop()], **options)
    resumed = sc.solve(problem, method, resume=True, **options)
    assert torch.equal(whole.sample(64, seed=1), resumed.sample(64, seed=1))
    other = sc.ControlProblem(
        sc.ManifoldSDE(sc.Sphere(1) if kind == "torus" else sc.Torus(3), sigma=0.9),
        (sc.Sphere(1) if kind == "torus" else sc.Torus(3)).uniform(),
        lambda x: x[:, 0].cos(),
        alpha=ALPHA,
    )
    with pytest.raises(sc.BadFileError, match="another problem"):
        sc.load(tmp_path / "run", other)


@pytest.mark.parametrize("kind", TORUS_FIRST)
def test_compare_and_recommend_know_them(kind):
    problem = PROBLEMS[kind]()
    advice = sc.recommend(problem, time_steps=K)
    assert isinstance(advice[0].method, sc.AdjointMatching) and "a reference on a manifold" in str(advice)
    assert not any(isinstance(s.method, sc.SOCM) for s in advice)
    table = sc.compare(
        problem, [sc.LogVariance(), sc.SMC()], time_steps=K, iterations=5, batch_size=64, n=256, seed=0, progress=False
    )
    assert all("control_error" in row.estimates for row in table.rows if row.label == "log-variance")


@pytest.mark.parametrize("curved", [pytest.param("sphere, a cost", marks=pytest.mark.slow), "torus, a drift"])
def test_compare_finds_the_exact_solution_of_a_plain_reward(curved):
    if curved.startswith("sphere"):
        reference, start = sc.ManifoldSDE(sc.Sphere(2), sigma=0.8), torch.tensor([0.0, 0.0, 1.0])
        cost = lambda x, t: x[:, 2]  # noqa: E731
    else:
        reference, start, cost = sc.ManifoldSDE(sc.Torus(1), lambda x, t: x.sin()), torch.zeros(1), None
    problem = sc.ControlProblem(reference, sc.Dirac(start), reward=lambda x: 2 * x[:, 0].cos(), running_cost=cost)
    options = {"iterations": 1, "time_steps": 5, "seed": 0, "progress": False}
    text = str(sc.compare(problem, ["log-variance"], **options))
    assert "Exact solution of the chain" in text and "rel. control error" in text
