"""Statistical checks on simulated paths: whole laws where they are known, fixed seeds, a common family-wise error.

The problem drifts far in comparison with its noise, so that with these numbers of paths an error of 1 % in the drift or
in the noise is many standard errors: the negative controls show it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from scipy import stats

import sdecontrol as sc
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.paths.paths import Paths

from ..cases import START_STEPS, LinearCase, affine_map, spoil, tensor
from ..gaussian import Joint, path_law
from ..registry import Measurement, Setting, check, p_value
from ..statistics import GAUSSIAN_TESTS, gaussian_law, projections, z_of_estimate, z_test
from .mixtures import MixtureCase, mixture_cases
from .mixtures import spoil as spoil_mixture

Lines = Iterator[Measurement]
KIND = "statistical"
ENOUGH = 100_000


def drifting(**changes) -> LinearCase:
    """Two dimensions, non-symmetric drift, long ways and little noise."""
    case = LinearCase(
        A=np.array([[-0.5, 0.8], [-0.6, -0.2]]),
        slope=np.zeros((2, 2)),
        offset=np.array([3.0, -2.0]),
        sigma=np.array([[0.5, 0.1], [0.0, 0.4]]),
        mean=np.array([1.0, 0.5]),
        cov=np.array([[0.2, 0.05], [0.05, 0.1]]),
        G=np.array([[0.6, 0.2], [0.2, 0.4]]),
        g=np.array([0.5, 1.0]),
        F=0.1 * np.eye(2),
        alpha=1.2,
        grid=(0.0, 0.2, 0.5, 0.7, 1.0),
        start="controlled",
    )
    return replace(case, **changes)


def _simulate(case: LinearCase, n: int, seed: int, control=None, **options) -> Paths:
    return sc.simulate(
        case.problem(), n, control=control, time_steps=list(case.grid), scheme=case.scheme, seed=seed, **options
    )


def _rows(states: torch.Tensor) -> np.ndarray:
    """Paths ``(K+1, n, d)`` as ``(n, (K+1) d)``."""
    return states.transpose(0, 1).flatten(1).numpy()


@check(
    "sampled-reference",
    "MATH 2: the chain",
    kind=KIND,
    implements=["sdecontrol.simulate"],
    tests=2 * GAUSSIAN_TESTS + 2,
    controls=["drift off by 1 %", "noise off by 1 %", "drift transposed", "offset left out"],
)
def reference_paths(setting: Setting, defect: str) -> Lines:
    """Paths of the reference, from a random start, are draws of the dense law of the whole path: all times and all
    bridges at once; with Euler steps and with exact transitions. Paths are independent of one another."""
    n = setting.count(ENOUGH, 10 * ENOUGH)
    for scheme in ("euler", "exact"):
        case = drifting(start="fixed", F=None, scheme=scheme)
        law = case.reference()
        rows = _rows(_simulate(spoil(case, defect), n, setting.seed + 1).states)
        yield from gaussian_law(f"whole path, {scheme}", rows, law.mean, law.cov, setting.rng(70))
    end = rows[:, -1] - law.mean[-1]
    for lag in (1, 64):
        yield z_test(f"independence of paths i and i + {lag}", end[lag:] * end[:-lag], 0.0)


def controlled_law(case: LinearCase) -> tuple[Joint, list[float]]:
    """The law of the best mean-shift chain from the point before its start, and the KL of each of its steps."""
    answers, h = case.chain(), 1 / START_STEPS
    values, vectors = np.linalg.eigh(case.cov)
    root, steps, gains = (vectors * np.sqrt(values)) @ vectors.T, [], []
    for k in range(START_STEPS):
        U, w = affine_map(lambda x, k=k: answers.exact.control(x, -1 + k * h), case.d)
        gains.append((U, w, h))
        steps.append((np.eye(case.d) + h * root @ U, h * root @ w, np.sqrt(h) * root))
    U, w = answers.control()
    gains += [(U[k], w[k], case.h[k]) for k in range(case.K)]
    law = path_law(case.mean, 0 * case.cov, steps + case.steps((U, w)))
    kls = [
        hk * float(np.trace(V @ law.of(k).cov @ V.T) + ((V @ law.of(k).mean + c) ** 2).sum()) / 2
        for k, (V, c, hk) in enumerate(gains)
    ]
    return law, kls


@check(
    "sampled-control",
    "MATH 2; Girsanov",
    kind=KIND,
    implements=["sdecontrol.simulate", "sdecontrol.exact_solution.control"],
    tests=2 * GAUSSIAN_TESTS,
    controls=["drift off by 1 %", "noise off by 1 %", "alpha off by 5 %", "start left fixed", "last step left out"],
)
def controlled_paths(setting: Setting, defect: str) -> Lines:
    """Paths of the best mean-shift control, the learned start included, are draws of the dense law of that controlled
    path; so is the start that they reach."""
    n, case = setting.count(3 * ENOUGH // 2, 10 * ENOUGH), drifting()
    law, _ = controlled_law(case)
    law = law.of(*range(START_STEPS, law.blocks))
    given = spoil(case, defect)
    paths = _simulate(given, n, setting.seed + 2, given.chain().exact.control)
    states = paths.states[-(case.K + 1) :]
    if defect.startswith("last"):
        states = torch.cat((states[:-1], states[-2:-1]))
    yield from gaussian_law("start", states[0], *(law.of(0).mean, law.of(0).cov), setting.rng(71))
    yield from gaussian_law("whole path", _rows(states), law.mean, law.cov, setting.rng(72))


@check(
    "sampled-optimum",
    "Theorems 1-3",
    kind=KIND,
    implements=["sdecontrol.exact_solution.sample", "sdecontrol.exact_solution.kernel"],
    tests=3 * GAUSSIAN_TESTS,
    controls=["start left fixed", "alpha off by 5 %", "noise off by 1 %", "drift off by 1 %", "last step left out"],
)
def optimum(setting: Setting, defect: str) -> Lines:
    """``sample`` draws from p_r; running the soft-optimal kernels draws whole paths of Q_fine; and their residuals
    x_0 - E_pre[x_0 | x_K] are the reference's bridge, independent of the end."""
    n, case = setting.count(ENOUGH, 10 * ENOUGH), drifting(F=None)
    best, _ = case.optimum()
    answers = spoil(case, defect).chain()
    yield from gaussian_law(
        "sample", answers.exact.sample(3 * n, seed=setting.seed + 3), best.of(-1).mean, best.of(-1).cov, setting.rng(73)
    )
    noise = setting.rng(74)
    law = answers.exact.initial
    states = [noise.multivariate_normal(law.mean.numpy(), law.covariance_matrix.numpy(), size=n)]
    for k in range(case.K - (defect.startswith("last"))):
        kernel = answers.exact.kernel(tensor(states[-1]), k + answers.before)
        root = np.linalg.cholesky(kernel.covariance_matrix[0].numpy())
        states.append(kernel.mean.numpy() + noise.normal(size=(n, 2)) @ root.T)
    states += [states[-1]] * (case.K + 1 - len(states))
    yield from gaussian_law(
        "whole path of the kernels", np.concatenate(states, 1), best.mean, best.cov, setting.rng(75)
    )
    M, b, Q = case.reference().regression([0], [case.K])
    yield from gaussian_law(
        "residual of x_0 given x_K", states[0] - states[-1] @ M.T - b, np.zeros(2), Q, setting.rng(76)
    )


@check(
    "sampled-fixed-start",
    "MATH 1: the initial law",
    kind=KIND,
    implements=["sdecontrol.exact_solution.sample", "sdecontrol.exact_solution.marginal"],
    tests=GAUSSIAN_TESTS,
    controls=["called p_r all the same", "sign of g flipped"],
)
def fixed_start(setting: Setting, defect: str) -> Lines:
    """With the start left fixed, draws of the optimum have the biased end law that is known in closed form, and not
    p_r."""
    case = drifting(F=None, start="fixed")
    best, _ = case.optimum()
    M, b, Q = best.regression([case.K], [0])
    mean, cov = M @ case.mean + b, M @ case.cov @ M.T + Q
    if defect.startswith("called"):
        mean, cov = best.of(-1).mean, best.of(-1).cov
    exact = spoil(case, defect).chain().exact
    yield from gaussian_law(
        "end", exact.sample(setting.count(ENOUGH, 10 * ENOUGH), seed=setting.seed + 4), mean, cov, setting.rng(77)
    )


@check(
    "sampled-weights",
    "MATH 2: log w; Theorem 1",
    kind=KIND,
    implements=["sdecontrol.evaluation.evaluate.log_weights", "sdecontrol.paths.paths.Paths.log_ratio"],
    tests=7,
    controls=[
        "alpha off by 5 %",
        "KL of the start dropped",
        "half square dropped",
        "running cost left out",
        "drift off by 1 %",
    ],
)
def weights(setting: Setting, defect: str) -> Lines:
    """Weighted paths of a sub-optimal control obey the theorems exactly: E[w] = Z, E[w phi(x_K)] = Z E_{Q_fine}[phi]
    for the events {a.x_K <= c}, also for the start's; and the reference's paths satisfy E[dP^u/dQ0] = 1."""
    n, case = setting.count(ENOUGH, 10 * ENOUGH), drifting()
    best, log_z = case.optimum()
    true = case.chain().exact.control
    problem = spoil(case, defect).problem()
    paths = sc.simulate(problem, n, control=StartShifted(true, 0.8), time_steps=list(case.grid), seed=setting.seed + 5)
    log_w = log_weights(problem, paths).numpy()
    if defect.startswith("KL of the start"):
        log_w = log_w + paths.log_ratio(per_step=True)[:START_STEPS].sum(0).numpy()
    if defect.startswith("half"):
        log_w = log_w + paths.kl().numpy()
    w = np.exp(log_w - log_z)
    yield z_test("E[w]/Z", w, 1.0)
    for name, k in (("start", 0), ("end", case.K)):
        law, x = best.of(k), paths.states[-(case.K + 1) + k].numpy()
        for direction in (np.array([1.0, 0.0]), np.array([0.6, -0.8])):
            centre, spread = direction @ law.mean, np.sqrt(direction @ law.cov @ direction)
            yield z_test(
                f"E[w 1(a.x <= c)]/Z at the {name}",
                w * (x @ direction <= centre + 0.5 * spread),
                float(stats.norm.cdf(0.5)),
            )
    x = paths.end.numpy()
    yield z_test(
        "E[w |x_K|^2]/Z", w * (x**2).sum(-1), float(np.trace(best.of(-1).cov) + best.of(-1).mean @ best.of(-1).mean)
    )
    reference = sc.simulate(problem, n, time_steps=list(case.grid), seed=setting.seed + 6)
    yield z_test("E_Q0[dP/dQ0]", reference.log_ratio(StartShifted(true, 0.1)).exp(), 1.0)


class StartShifted:
    """A multiple of an exact control, before time 0 and after."""

    def __init__(self, control, factor: float) -> None:
        self.control, self.factor, self.settings = control, factor, control.settings

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.factor * self.control(x, t)

    def on_chain(self, chain):
        inner = self.control.on_chain(chain)
        return lambda k, x, y: self.factor * inner(k, x, y)


@check(
    "sampled-evaluation",
    "[18], MATH 2",
    kind=KIND,
    implements=[
        "sdecontrol.evaluation.evaluate.evaluate",
        "sdecontrol.exact_solution.evaluate",
        "sdecontrol.exact_solution.elbo",
    ],
    tests=9,
    controls=[
        "alpha off by 5 %",
        "noise off by 1 %",
        "KL of the start dropped",
        "running cost left out",
        "standard errors halved",
    ],
)
def evaluation(setting: Setting, defect: str) -> Lines:
    """``evaluate`` estimates E r, E int f, KL(P^u || Q0), J, the ELBO, log Z and the gap without bias (dense laws
    beside them), and its standard errors are right: over 100 repetitions the squared z-scores are chi-square."""
    case = drifting()
    law, size = controlled_law(case)
    kl = sum(size[START_STEPS:] if defect.startswith("KL of the start") else size)
    P, q = case.total_reward()
    whole = law.of(*range(START_STEPS, law.blocks))
    end_P, end_q = np.zeros_like(P), q
    end_P[-2:, -2:] = P[-2:, -2:]
    reward = case.alpha * whole.expect_quadratic(end_P, end_q)
    cost = reward - case.alpha * whole.expect_quadratic(P, q)
    _, log_z = case.optimum()
    exact = spoil(case, defect).chain().exact
    ev = exact.evaluate(setting.count(ENOUGH, 10 * ENOUGH), seed=setting.seed + 7)
    elbo = (reward - cost) / case.alpha - kl
    for name, got, want in (
        ("E r", ev.reward, reward),
        ("E int f", ev.running_cost, cost),
        ("KL", ev.kl, kl),
        ("ELBO", ev.elbo, elbo),
        ("J", ev.objective, case.alpha * elbo),
        ("log Z", ev.log_z, log_z),
        ("gap", ev.gap, log_z - elbo),
    ):
        yield z_of_estimate(name, got, want)
    if defect not in ("", "standard errors halved"):
        return
    exact = case.chain().exact
    repeats = [exact.evaluate(256, seed=1000 + setting.seed + i) for i in range(100)]
    scale = 2.0 if defect.startswith("standard") else 1.0
    for name, want in (("reward", reward), ("elbo", elbo)):
        z = np.array([(getattr(r, name).value - want) / getattr(r, name).stderr for r in repeats]) * scale
        total = float((z**2).sum())
        yield p_value(
            f"standard error of {name} (chi-square)",
            2 * min(float(stats.chi2.sf(total, 100)), float(stats.chi2.cdf(total, 100))),
        )


@check(
    "sampled-mixture",
    "Theorem 1, Table 2 (Q_fine ends in p_r)",
    kind=KIND,
    implements=["sdecontrol.exact_solution.sample", "sdecontrol.GaussianMixture"],
    tests=12,
    controls=["alpha off by 5 %", "data off by 1 %", "the data's law called the target", "sign of g flipped"],
)
def mixture(setting: Setting, defect: str) -> Lines:
    """Draws of a mixture's optimum have the tilted mixture's law at the end, and at the start; random projections
    against exact distribution functions."""
    n = setting.count(2 * ENOUGH, 10 * ENOUGH)
    for case in mixture_cases(setting, dims=(2, 3)):
        given = spoil_mixture(case, defect)
        for t in (1.0, 0.0):
            logs, parts, _ = case.optimum((t,))
            shares, parts = np.exp(logs), [p.of(1) for p in parts]
            if defect.startswith("the data's"):
                shares, parts = case.weights, [j.of(1) for j in case.joints((t,))]
            x = _draw(given, t, n, setting.seed + 8)
            cdf = lambda v, a, shares=shares, parts=parts: np.stack(  # noqa: E731
                [s * stats.norm.cdf(v, a @ p.mean, np.sqrt(a @ p.cov @ a)) for s, p in zip(shares, parts)]
            ).sum(0)
            yield from projections(f"X_{t:g}, d={case.d}", x, cdf, setting.rng(78))
        if setting.thorough and case.d == 3:
            break


def _draw(case: MixtureCase, t: float, n: int, seed: int) -> np.ndarray:
    if t == 1.0:
        return case.exact.sample(n, seed=seed).numpy()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return case.exact.initial.sample((n,)).numpy()


@check(
    "sampled-initial-laws",
    "MATH 8",
    kind=KIND,
    implements=["sdecontrol.Gaussian", "sdecontrol.GaussianMixture", "sdecontrol.simulate"],
    tests=3 * GAUSSIAN_TESTS,
    controls=["noise off by 1 %", "mean off by 1 %"],
)
def initial_laws(setting: Setting, defect: str) -> Lines:
    """Starts are draws of the initial law: a full covariance, a diagonal one, a mixture of one."""
    n, size = setting.count(3 * ENOUGH, 10 * ENOUGH), 1.01**2 if defect.startswith("noise") else 1.0
    mean, cov = np.array([3.0, -4.0]), np.array([[0.5, 0.3], [0.3, 0.4]])
    given = mean * (1.01 if defect.startswith("mean") else 1.0)
    diagonal = np.diag(np.diag(cov))
    for name, law, want in (
        ("full", sc.Gaussian(tensor(given), size * tensor(cov)), cov),
        ("diagonal", sc.Gaussian(tensor(given), size * tensor(np.diag(cov))), diagonal),
        ("mixture of one", sc.GaussianMixture(tensor([1.0]), tensor(given[None]), size * tensor(cov[None])), cov),
    ):
        problem = sc.ControlProblem(drifting().sde(), law, start="fixed")
        x = sc.simulate(problem, n, time_steps=1, seed=setting.seed + 9).states[0]
        yield from gaussian_law(f"start, {name}", x, mean, want, setting.rng(79))
