"""Annealed Langevin with backward kernels (CMCD): weights against double loops and joint densities, gradients against
autograd on them, refusals."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from cases import slow_but
from torch import Tensor, nn

import sdecontrol as sc
from sdecontrol.chains.annealed import ReversedChain
from sdecontrol.controls.base import UserControl
from sdecontrol.controls.given import given_control
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.evaluation.solution import Solution
from sdecontrol.methods.base import Run, find_method, method_names
from sdecontrol.methods.on_paths import collect
from sdecontrol.paths.gradients import Objective, backpropagate
from sdecontrol.paths.integrator import integrate
from sdecontrol.problems.gibbs import GibbsProblem
from sdecontrol.problems.simulate import roll_out
from sdecontrol.randomness import Place, SuppliedNoise, derive_seed

F64 = torch.float64
MEANS = torch.tensor([[-1.5, 0.5], [1.0, -0.5], [0.5, 2.0]], dtype=F64)
VARIANCE = 0.2
LOG_Z = math.log(3 * 2 * math.pi * VARIANCE)


def mixture(x: Tensor) -> Tensor:
    return torch.logsumexp(-0.5 * (x.unsqueeze(1) - MEANS.to(x)).square().sum(2) / VARIANCE, 1)


def annealed(
    density: Any = mixture, dim: int = 2, scale: Any = 1.8, dtype: torch.dtype = F64, **options: Any
) -> GibbsProblem:
    return sc.gibbs_problem(density, dim, reference="annealed", scale=scale, centre=0.2, dtype=dtype, **options)


def push(x: Tensor, t: Tensor) -> Tensor:
    """A control that is far from 0, and differs in x and t."""
    return 0.8 * torch.sin(x.flip(1) + 3 * t.unsqueeze(1)) + 0.3


class Affine(nn.Module):
    """``u = A(t) x + a``, A of rank one in t."""

    def __init__(self, dim: int = 2, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(0.4 * torch.randn(dim, dim, generator=generator, dtype=F64))
        self.a = nn.Parameter(0.4 * torch.randn(dim, generator=generator, dtype=F64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x @ self.A.mT) * (1 + t.unsqueeze(1)) + self.a


# ------------------------------------------------------------------ by hand


def by_hand_weights(
    problem: GibbsProblem,
    times: list[float],
    states: Tensor,
    forward: Any,
    backward: Any,
    scheme: str = "exponential",
) -> Tensor:
    """``log rho(x_K) - log p0(x_0) + sum_k log B_k - log F_k`` from the formulas of the class, one normal density at a
    time."""
    process: Any = problem.reference
    r, m, s0, total = process.roughness, process.centre, process.scale, process.relaxations
    K, d = len(times) - 1, states.shape[2]

    def beta(t: float) -> float:
        return (r ** (2 * t) - 1) / (r**2 - 1)

    def score(x: Tensor, t: float) -> Tensor:
        leaf = x if x.requires_grad else x.detach().requires_grad_(True)
        with torch.enable_grad():
            slope = torch.autograd.grad(mixture(leaf).sum(), leaf, create_graph=x.requires_grad)[0]
        bounded = slope / (1 + ((s0 * slope).square().sum(1, keepdim=True) / (100 * r**2 * d)) ** 2) ** 0.25
        return -(1 - beta(t)) * (x - m) / s0**2 + beta(t) * bounded

    def normal(x: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
        return (-0.5 * ((x - mean) / sd) ** 2 - sd.log() - 0.5 * math.log(2 * math.pi)).expand_as(x).sum(1)

    def at(u: Any, x: Tensor, t: float) -> Tensor:
        return torch.zeros_like(x) if u is None else u(x, x.new_full((len(x),), t))

    log_w = mixture(states[-1]) - normal(states[0], m, s0)
    for k in range(K):
        x, y, h = states[k], states[k + 1], times[k + 1] - times[k]
        v, e = s0**2 * r ** (-(times[k] + times[k + 1])), total * h
        a = v * e / 2 if scheme == "euler" else v * (1 - math.exp(-e / 2))
        sd = (v * e if scheme == "euler" else v * (1 - math.exp(-e))).sqrt()
        effect = (
            (v / e).sqrt() * h**0.5 * (e if scheme == "euler" else 2 * (1 - math.exp(-e / 2)))
        )  # of u = 1 held over the step
        u = at(forward, x, times[k])
        b = at(backward, y, times[min(k + 1, K - 1)])
        log_f = normal(y, x + a * score(x, times[k]) + effect * u, sd)
        log_b = normal(x, y + a * score(y, times[k + 1]) - effect * b, sd)
        log_w = log_w + log_b - log_f
    return log_w


@pytest.mark.parametrize("scheme", ["exponential", "euler"])
@pytest.mark.parametrize("grid", [6, [0.0, 0.05, 0.3, 0.45, 1.0]])
@pytest.mark.parametrize("both", [True, False])
def test_log_weights_are_those_of_a_double_loop(both: bool, grid: Any, scheme: str) -> None:
    problem = annealed(backward_control=both)
    paths = sc.simulate(problem, 64, push, time_steps=grid, scheme=scheme, seed=1)
    by_hand = by_hand_weights(problem, paths.chain.clock, paths.states, push, push if both else None, scheme)
    torch.testing.assert_close(log_weights(problem, paths), by_hand, rtol=0, atol=1e-10)
    for keep, chunk in (("states", None), ("end", None), ("end", 64)):
        again = sc.simulate(problem, 64, push, time_steps=grid, scheme=scheme, seed=1, keep=keep, chunk=chunk)
        torch.testing.assert_close(log_weights(problem, again), by_hand, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("control", [push, None])
def test_mean_weight_is_z_on_five_steps(control: Any, both: bool, dtype: torch.dtype) -> None:
    """Within 4 standard errors (false alarm 6e-5), each below 4 per cent, for any control."""
    problem = annealed(dtype=dtype, backward_control=both)
    paths = sc.simulate(problem, 1 << 16, control, time_steps=5, seed=2, keep="end")
    w = (log_weights(problem, paths).double() - LOG_Z).exp()
    error = float(w.std()) / 2**8
    assert error < 0.04 and abs(float(w.mean()) - 1) < 4 * error


def _joint(first_mean: Tensor, first_cov: Tensor, steps: list[tuple[Tensor, Tensor, Tensor]]) -> sc.Gaussian:
    """Joint law of ``x_0, x_1 = M x_0 + v + N(0, S), ...``, as one Gaussian."""
    d, means, K = len(first_mean), [first_mean], len(steps)
    cov = torch.zeros((K + 1) * d, (K + 1) * d, dtype=F64)
    cov[:d, :d] = first_cov
    for k, (M, v, S) in enumerate(steps):
        means.append(M @ means[-1] + v)
        old, here, new = slice(0, (k + 1) * d), slice(k * d, (k + 1) * d), slice((k + 1) * d, (k + 2) * d)
        cov[new, old] = M @ cov[here, old]
        cov[old, new] = cov[new, old].mT
        cov[new, new] = M @ cov[here, here] @ M.mT + S
    return sc.Gaussian(torch.cat(means), cov)


@pytest.mark.parametrize("both", [True, False])
def test_gaussian_weights_are_a_ratio_of_joint_densities(both: bool) -> None:
    """Everything linear: the two path laws are Gaussians of dimension 2 (K + 1), found by propagating moments."""
    mean, var = torch.tensor([0.6, -0.4], dtype=F64), torch.tensor([0.3, 0.7], dtype=F64)
    problem = annealed(sc.Gaussian(mean, var).log_prob, scale=1.4, backward_control=both)
    process: Any = problem.reference
    process.score_bound = 1e12  # a bounded score is not linear
    control, eye, K = Affine(), torch.eye(2, dtype=F64), 4
    r, s0, centre = process.roughness, 1.4, torch.full((2,), 0.2, dtype=F64)
    forward, backward = [], []
    for k in range(K):
        e = process.relaxations / K
        v = s0**2 * r ** (-(2 * k + 1) / K)
        a, S = v * (1 - math.exp(-e / 2)), v * (1 - math.exp(-e)) * eye
        effect = (process.relaxations * v) ** 0.5 / K * (1 - math.exp(-e / 2)) / (e / 2)
        betas = [(r ** (2 * j / K) - 1) / (r**2 - 1) for j in (k, k + 1)]
        slope = [-torch.diag((1 - b) / s0**2 + b / var) for b in betas]
        shift = [(1 - b) * centre / s0**2 + b * mean / var for b in betas]
        A, u, w = control.A.detach(), control.a.detach(), min(k + 1, K - 1) / K
        forward.append((eye + a * slope[0] + effect * (1 + k / K) * A, a * shift[0] + effect * u, S))
        part = effect if both else 0.0
        backward.append((eye + a * slope[1] - part * (1 + w) * A, a * shift[1] - part * u, S))
    P = _joint(centre, s0**2 * eye, forward)
    Q = _joint(mean, torch.diag(var), backward[::-1])  # from x_K to x_0
    with torch.no_grad():
        paths = sc.simulate(problem, 32, control, time_steps=K, seed=3)
    x = paths.states.transpose(0, 1)
    ratio = Q.log_prob(x.flip(1).flatten(1)) - P.log_prob(x.flatten(1))
    torch.testing.assert_close(log_weights(problem, paths), ratio, rtol=0, atol=1e-8)


# ------------------------------------------------------------------ gradients


def _by_hand_paths(problem: GibbsProblem, chain: Any, control: Any, x: Tensor, noise: Tensor) -> Tensor:
    states = [x]
    for k in range(chain.steps):
        mean, scale = chain.kernel(k, states[-1])
        u = control(states[-1], states[-1].new_full((len(x),), chain.clock[k]))
        states.append(mean + scale * (chain.gain(k) * u + noise[k]))
    return torch.stack(states)


def _gradients(module: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    for p in module.parameters():
        p.grad = None
    return found


@pytest.mark.parametrize("both", [True, False])
def test_backprop_has_the_gradient_of_the_elbo_by_hand(both: bool) -> None:
    """Through paths, scores, and both kinds of kernels, the KL of a step in closed form; by all modes that are
    exact."""
    problem, control = annealed(backward_control=both), Affine()
    chain, generator = problem.chain(20), torch.Generator().manual_seed(5)
    x0, noise = problem.draw_start(16, 4), torch.randn(20, 16, 2, generator=generator, dtype=F64)
    states = _by_hand_paths(problem, chain, control, x0, noise)
    log_w = by_hand_weights(problem, chain.clock, states, control, control if both else None)
    u = [control(x, x.new_full((16,), t)) for x, t in zip(states[:-1], chain.clock[:-1], strict=True)]
    martingale = sum(
        chain.gain(k) * (u[k] * noise[k]).sum(1) for k in range(20)
    )  # of mean 0: the KL in closed form goes without
    (-log_w - martingale).mean().backward()
    by_hand = _gradients(control)
    trained = UserControl(control, problem.event_shape, problem.control_shape, 1.0)
    for mode in ("full", "checkpoint", "adjoint"):
        objective = Objective(lambda x: -problem.reward(x))
        cost = backpropagate(
            chain, trained, x0, SuppliedNoise(noise), objective, parameters=list(control.parameters()), mode=mode
        )
        torch.testing.assert_close(_gradients(control), by_hand, rtol=0, atol=1e-10)
        torch.testing.assert_close(
            cost.terminal + cost.cost + cost.kl, _cost(problem, chain, trained, x0, noise), rtol=0, atol=1e-9
        )
    assert len(by_hand) == 2 and all(float(g.norm()) > 0.01 for g in by_hand)


def _cost(problem: GibbsProblem, chain: Any, control: Any, x0: Tensor, noise: Tensor) -> Tensor:
    with torch.no_grad():
        paths = integrate(chain, x0, SuppliedNoise(noise), control.on_chain(chain))
        return paths.towards(problem).cost - problem.reward(paths.end) + paths.kl()


@pytest.mark.parametrize("paths", ["current", "other"])
@pytest.mark.parametrize("method", [sc.LogVariance(), sc.PathConsistency()])
def test_log_variance_has_the_gradient_of_the_variance_of_hand_made_weights(method: Any, paths: str) -> None:
    """On fixed paths, its own or those of another control, with the control in both kinds of kernels. (On its own paths
    it is the gradient of the KL only where the backward kernels are fixed: the target then does not move.)"""
    problem, control = annealed(), Affine()
    method = dataclasses.replace(method, paths=push if paths == "other" else "current")
    run = _run(problem, control)
    state: Any = method.setup(run)
    stored = collect(state, run, 0)
    method.step(state, run)
    module = state.control.module
    found = _gradients(module)
    log_w = by_hand_weights(problem, run.chain.clock, stored.states, module, module)
    if isinstance(method, sc.LogVariance):
        loss = 0.5 * log_w.var()
    else:
        loss = 0.5 * log_w.square().mean()  # its log Z begins at 0
    loss.backward()
    torch.testing.assert_close(found, _gradients(module), rtol=0, atol=1e-10)


def _run(problem: GibbsProblem, control: Any, batch: int = 64, seed: int = 7) -> Run:
    return Run(problem, problem.chain(8), batch, 1, seed, control)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "both"),
    [
        pytest.param(sc.LogVariance(), False, marks=pytest.mark.slow),
        pytest.param(sc.Reinforce(), False, marks=pytest.mark.slow),
        (sc.Reinforce(), True),
    ],
)
def test_score_function_gradients_are_those_of_the_kl_in_expectation(method: Any, both: bool) -> None:
    """Against the pathwise gradient, entry by entry within 4 standard errors (6 entries: false alarm 4e-4)."""
    problem = annealed(backward_control=both)
    found: dict[str, list[Tensor]] = {"score": [], "path": []}
    for part in range(60):
        for name, chosen in (("score", method), ("path", sc.RewardBackprop())):
            run = _run(problem, Affine(), batch=256, seed=derive_seed(11, Place.OUTSIDE, part, name == "path"))
            state: Any = chosen.setup(run)
            chosen.step(state, run)
            found[name].append(torch.cat([g.flatten() for g in _gradients(state.control.module)]))
    score, path = (torch.stack(v) for v in found.values())
    error = ((score.var(0) + path.var(0)) / 60).sqrt()
    assert bool((error < 0.1 * path.mean(0).norm()).all())
    assert bool(((score.mean(0) - path.mean(0)).abs() < 4 * error).all())


def test_stored_paths_give_the_weights_of_any_control() -> None:
    """Of the law that drew the paths, and of any other control; through rows and steps too."""
    problem = annealed()
    chain, control = problem.chain(7), Affine()
    x0, noise = problem.draw_start(16, 4), torch.randn(7, 16, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    paths = roll_out(problem, chain, given_control(problem, push), x0, SuppliedNoise(noise)).rows(
        torch.arange(12, 2, -1)
    )
    trained = UserControl(control, problem.event_shape, problem.control_shape, 1.0)
    with torch.no_grad():
        own = by_hand_weights(problem, chain.clock, paths.states, push, push)
        torch.testing.assert_close(paths.log_weights(), own, rtol=0, atol=1e-10)
        torch.testing.assert_close(paths.log_weights(given_control(problem, push)), own, rtol=0, atol=1e-10)
        laws = paths.under(trained)
        mixed = paths.log_weights(trained) + laws.log_ratio.sum(0)
        mixed = mixed - paths.under(given_control(problem, push)).log_ratio.sum(0)
        torch.testing.assert_close(
            mixed, by_hand_weights(problem, chain.clock, paths.states, push, control), rtol=0, atol=1e-10
        )
        some = paths.under(trained, [1, 6])
        for of in (lambda found: found.less_reverse(found.log_ratio), lambda found: found.less_reverse(found.kl)):
            torch.testing.assert_close(of(some), of(laws)[[1, 6]], rtol=0, atol=1e-12)


# ------------------------------------------------------------------ the user's face


@pytest.mark.slow
def test_training_improves_on_annealed_importance_sampling_and_saves(tmp_path: Any) -> None:
    target = sc.library.named_target("gmm9")
    problem = sc.gibbs_problem(target, 2, reference="annealed", seed=0)
    solution = sc.solve(problem, sc.LogVariance(), time_steps=20, iterations=25, batch_size=256, seed=0, progress=False)
    plain = sc.solve(problem, sc.BestOfN(n=64, selection="softmax"), time_steps=20, seed=0)
    trained, before = (
        solution.evaluate(2048, seed=1),
        Solution(problem, plain.control, method="zero", settings=plain.settings).evaluate(2048, seed=1),
    )
    assert trained.elbo.value - 4 * math.hypot(trained.elbo.stderr, before.elbo.stderr) > before.elbo.value + 0.3
    for found in (trained, before, plain.evaluate(4096, seed=2)):
        assert abs(found.log_z.value) < 4 * found.log_z.stderr + 0.02
    assert trained.start_gap.value == 0 and trained.kl.value > 0
    solution.save(tmp_path / "run")
    again = sc.load(tmp_path / "run", problem)
    for a, b in zip(solution.weighted_sample(64, seed=3), again.weighted_sample(64, seed=3), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(sc.errors.BadFileError, match="reference"):
        sc.load(tmp_path / "run", sc.gibbs_problem(target, 2, reference="annealed", seed=0, backward_control=False))


@pytest.mark.parametrize("both", [True, False])
def test_target_paths_run_backwards_and_certify_from_both_sides(both: bool) -> None:
    """``E_{Q_fine}[1/w] = 1/Z`` from exact samples run backwards (4 standard errors), for a control far from the
    optimum."""
    problem = annealed(backward_control=both)
    solution = Solution(
        problem, given_control(problem, push), method="given", settings={"time_steps": 6, "scheme": None}
    )
    generator = torch.Generator().manual_seed(3)
    n = 1 << 14
    samples = MEANS[torch.randint(3, (n,), generator=generator)] + VARIANCE**0.5 * torch.randn(
        n, 2, generator=generator, dtype=F64
    )
    ends = integrate(ReversedChain(solution.chain, solution.control), samples, _Noise(generator, n)).states.flip(0)
    log_w = by_hand_weights(problem, solution.chain.clock, ends, push, push if both else None)
    inverse = (LOG_Z - log_w).exp()
    assert abs(float(inverse.mean()) - 1) < 4 * float(inverse.std()) / n**0.5
    found = sc.certify(solution, samples, n=1 << 14, seed=4)
    assert found.elbo.value < LOG_Z < found.eubo.value
    assert abs(found.eubo.value - float(log_w.mean())) < 4 * math.sqrt(2) * found.eubo.stderr
    assert abs(found.log_z_two_sided.value - LOG_Z) < 4 * found.log_z_two_sided.stderr
    blind = sc.certify(solution, n=2048, seed=4)
    assert blind.source == "tempered particles" and abs(blind.log_z_two_sided.value - LOG_Z) < 0.2


class _Noise:
    def __init__(self, generator: torch.Generator, n: int) -> None:
        self.generator, self.n = generator, n

    def __getitem__(self, k: int) -> Tensor:
        return torch.randn(self.n, 2, generator=self.generator, dtype=F64)


@pytest.mark.filterwarnings("ignore:smc. only")
@pytest.mark.parametrize("threshold", slow_but([0.0, 0.5, 1.0], 0.5))
def test_particles_are_unbiased_and_twisted_by_the_annealed_density(threshold: float, tmp_path: Any) -> None:
    problem = annealed()
    solution: Any = sc.solve(
        problem, sc.SMC(num_particles=64, proposal=push, ess_threshold=threshold), time_steps=8, seed=0
    )
    found = solution.evaluate(64 * 512, seed=1)
    assert abs(found.log_z.value - LOG_Z) < 4 * found.log_z.stderr and found.log_z.stderr < 0.05
    solution.save(tmp_path / "run")
    again = sc.load(tmp_path / "run", problem, control=push)
    assert torch.equal(solution.sample(64, seed=2), again.sample(64, seed=2))
    x, t = torch.randn(5, 2, dtype=F64), torch.tensor(0.4, dtype=F64)
    r = float(problem.roughness)
    beta = (r**0.8 - 1) / (r**2 - 1)
    centre, scale = problem.centre, problem.scale
    log_p0 = sc.Gaussian(centre, scale.square()).log_prob(x)
    torch.testing.assert_close(solution.twist.at(x, t), beta * (mixture(x) - log_p0))


REFUSED = {
    "adjoint-matching": "adjoint-matching",
    "socm": "socm",
    "value-guidance": "value-guidance",
    "path-integral-guidance": "path-integral-guidance",
    "soft-ppo": "soft-ppo",
    "bridge-matching": "bridge-matching",
    "particle-matching": "particle-matching",
    "classifier-guidance": "classifier-guidance",
    "reward-weighted-mle": "reward-weighted-mle",
}
TAKEN = (
    "reward-backprop",
    "log-variance",
    "path-consistency",
    "reinforce",
    "smc",
    "best-of-n",
    "tempered-smc",
    "mala",
    "hmc",
    "nuts",
)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_methods_that_need_a_value_refuse_by_name(name: str) -> None:
    problem = annealed(backward_control=False)
    with pytest.raises(ValueError, match=f"{name} does not take reference='annealed'.*Use log-variance"):
        sc.solve(problem, name, time_steps=4, iterations=None)


def test_every_method_either_takes_backward_kernels_or_refuses_them() -> None:
    free, fixed = annealed(), annealed(backward_control=False)
    for name in sorted(set(method_names()) - {"classifier-free-guidance"}):  # which needs a model, and says so first
        taken = []
        for problem in (free, fixed):
            try:
                find_method(name).check(problem)
                taken.append(True)
            except ValueError as error:
                assert "annealed" in str(error)
                taken.append(False)
        assert taken == (
            [True, True] if name in TAKEN else [False, True] if name == "cross-entropy" else [False, False]
        ), name
    for n in (1, 3):
        with pytest.raises(ValueError, match="path-consistency does not take"):
            sc.solve(fixed, sc.PathConsistency(n=n), iterations=1)
    with pytest.raises(ValueError, match=r"value-guidance does not take"):
        sc.solve(free, sc.SMC(proposal=sc.ValueGuidance()), time_steps=4)
    with pytest.raises(ValueError, match=r"must not depend on it.*backward_control=False"):
        sc.solve(free, sc.CrossEntropy(), iterations=1)
    with pytest.raises(ValueError, match=r"continuous-adjoint.*needs scheme='euler'"):
        sc.solve(free, sc.RewardBackprop(gradient="continuous-adjoint"), iterations=1)


@pytest.mark.parametrize(
    "method",
    [
        sc.CrossEntropy(),
        sc.PathConsistency(replay=2),
        sc.LogVariance(steps=2),
        sc.RewardBackprop(gradient="adjoint"),
    ],
)
def test_methods_that_take_it_run(method: Any) -> None:
    problem = annealed(backward_control=not isinstance(method, sc.CrossEntropy))
    solution = sc.solve(problem, method, time_steps=5, iterations=3, batch_size=64, seed=0, progress=False)
    assert all(math.isfinite(h["loss" if "loss" in h else "objective"]) for h in solution.history)
    h = solution.history[-1]
    assert h["objective"] == pytest.approx(h["reward"] - h["running_cost"] - h["kl"], abs=1e-8) and h["kl"] >= 0


def test_refusals_of_the_problem() -> None:
    with pytest.raises(sc.errors.NotDifferentiable, match="reference='annealed' moves by the gradient"):
        annealed(lambda x: mixture(x.detach()))
    with pytest.raises(ValueError, match="backward_control goes with"):
        sc.gibbs_problem(mixture, 2, backward_control=False)
    with pytest.raises(sc.errors.NoExactSolution, match="backward kernels"):
        sc.exact_solution(annealed(), time_steps=4)
    with pytest.raises(ValueError, match=r"reference must|did you mean|annealed"):
        sc.gibbs_problem(mixture, 2, reference="anneal")
    with pytest.raises(ValueError, match="exact"):
        annealed().chain(4, "exact")


def test_steep_densities_and_zeros_stay_finite() -> None:
    """A quartic, a density that is 0 on a half-space, and few long steps of either scheme."""

    def steep(x: Tensor) -> Tensor:
        return -1e3 * (x**4).sum(1)

    def half(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 0, 2 * x[:, 0].clamp(min=0).sqrt().log() - x[:, 0] - 0.5 * x[:, 1] ** 2, -math.inf)

    for density in (steep, half):
        problem = sc.gibbs_problem(density, 2, reference="annealed", scale=5.0)
        for steps, scheme in ((2, "exponential"), (3, "euler"), (40, "exponential")):
            paths = sc.simulate(problem, 256, push, time_steps=steps, scheme=scheme, seed=0)
            assert bool(log_weights(problem, paths).isfinite().all()) and float(paths.states.abs().max()) < 1e3
        sc.solve(problem, sc.RewardBackprop(), time_steps=4, iterations=2, batch_size=64, seed=0, progress=False)


def test_conditions_have_targets_of_their_own() -> None:
    def shifted(x: Tensor, y: Tensor) -> Tensor:
        return -0.5 * (x - y).square().sum(1) / 0.25

    problem = sc.gibbs_problem(shifted, 1, reference="annealed", condition=torch.tensor([[-1.0], [2.0]]), seed=0)
    solution = sc.solve(problem, sc.LogVariance(), time_steps=8, iterations=5, batch_size=64, seed=0, progress=False)
    x, log_w = solution.weighted_sample(8192, seed=1, condition=torch.tensor([[2.0]]))
    w = log_w.softmax(0)
    assert abs(float(w @ x[:, 0]) - 2) < 0.1
    assert abs(float(log_w.logsumexp(0)) - math.log(8192) - 0.5 * math.log(2 * math.pi * 0.25)) < 0.1


def test_a_step_costs_one_score_and_one_control() -> None:
    """Backward and forward kernels ask at the same states: K scores (p0's own is known) and K + 1 evaluations of the
    control for K steps."""
    from sdecontrol.comparison.costs import measuring

    problem, settings = annealed(), {"time_steps": 5, "batch_size": 64, "seed": 0, "iterations": 1}
    for own, scores in (
        (Affine(), 5),
        (None, 6),
    ):  # the default control's Langevin term needs the score at the start, too
        solution = sc.solve(problem, sc.LogVariance(), control=own, **settings)
        with measuring(problem.device) as costs:
            solution.simulate(64, seed=1)
        assert costs.gradient_calls == scores * 64 and costs.network_calls == 6 * 64
