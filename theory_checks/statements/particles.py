"""Particles, tempered particles, importance sampling and Markov chains: unbiased for Z whatever moves them, against
closed forms of Gaussian chains and of densities whose integral is known."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy import stats

import sdecontrol as sc
from sdecontrol.evaluation.estimates import Estimate
from sdecontrol.particles.diagnostics import bulk_ess, chain_ess, split_rhat
from sdecontrol.particles.mixture_fit import fit_mixture
from sdecontrol.particles.smc import RESAMPLING, resample
from sdecontrol.processes.laws import GaussianMixture, ProductMixture, draw

from ..cases import LinearCase, spoil, tensor
from ..registry import Measurement, Setting, check, compare, within
from .sampling import drifting

Lines = Iterator[Measurement]
KIND = "statistical"
SIGMAS = 5.0  #: standard errors, of estimates from a few systems


def agrees(what: str, found: Estimate, value: float, most: float) -> Lines:
    """An estimate within its own standard errors of a number, and those no larger than ``most``."""
    yield within(f"{what}, in standard errors", abs(found.value - value) / max(found.stderr, 1e-12), SIGMAS)
    yield within(f"standard error of {what}", found.stderr, most)


def moments(what: str, x: Any, mean: np.ndarray, cov: np.ndarray, most: float) -> Lines:
    """Mean and covariance of samples, relative to the standard deviations, for samples that depend on one another."""
    v = np.asarray(x, dtype=np.float64)
    root = np.linalg.inv(np.linalg.cholesky(cov))
    yield within(f"{what}: mean, in standard deviations", float(np.abs(root @ (v.mean(0) - mean)).max()), most)
    spread = root @ np.cov(v.T).reshape(cov.shape) @ root.T
    yield within(f"{what}: covariance", float(np.abs(spread - np.eye(len(mean))).max()), 3 * most)


def point_case(**changes: Any) -> LinearCase:
    return drifting(cov=np.zeros((2, 2)), start="fixed", **changes)


def solved(case: LinearCase, method: Any, **options: Any) -> Any:
    return sc.solve(case.problem(), method, time_steps=list(case.grid), progress=False, seed=0, **options)


@check(
    "particles-log-z",
    "MATH 4: sequential Monte Carlo",
    kind=KIND,
    implements=["sdecontrol.SMC", "sdecontrol.particles.smc.resample", "sdecontrol.ValueGuidance"],
    controls=["alpha off by 5 %", "running cost left out", "sign of g flipped", "drift off by 10 %"],
)
def smc(setting: Setting, defect: str) -> Lines:
    """Whatever moves the particles and whatever weighs them on the way, E Z^ = Z, on a linear-quadratic chain with a
    running cost; samples have the law of the tilted end; and where the reward is linear and the proposal the optimum,
    with its value as the twist, every system has Z^ = Z, with no noise."""
    case = point_case(alpha=1.6)
    given = replace(case, A=1.1 * case.A) if defect.startswith("drift") else spoil(case, defect)
    best, log_z = case.optimum()
    exact = given.chain().exact
    value = lambda x, t: exact.value(x, t[0])  # noqa: E731
    half = lambda x, t: 0.5 * value(x, t)  # noqa: E731
    ways = (
        ("reference", sc.SMC(1024)),
        ("reference, half the value as twist", sc.SMC(1024, twist=half, resampling="stratified", ess_threshold=0.9)),
        ("optimum, multinomial", sc.SMC(512, proposal=exact.control, resampling="multinomial", ess_threshold=1.0)),
        ("guidance and its value", sc.SMC(512, proposal=sc.ValueGuidance(value), twist="proposal")),
    )
    for name, method in ways:
        solution = solved(given, method)
        yield from agrees(f"log Z, {name}", solution.evaluate(16_384, seed=setting.seed).log_z, log_z, 0.03)
        if name.startswith("guidance"):
            end = best.of(-1)
            yield from moments("end", solution.sample(20_000, seed=setting.seed), end.mean, end.cov, 0.06)
    linear = point_case(G=np.zeros((2, 2)), F=None)
    given, (_, log_z) = spoil(linear, defect), linear.optimum()
    exact = given.chain().exact
    for name, twist, threshold in (("with its value", lambda x, t: exact.value(x, t[0]), 1.0), ("alone", None, 0.0)):
        method = sc.SMC(16, proposal=exact.control, twist=twist, ess_threshold=threshold, independent=True)
        if defect.startswith("drift"):
            method = replace(method, proposal=lambda x, t: 1.1 * exact.control(x, t))
        solution = solved(given, method)
        found = solution.run(4, seed=setting.seed)
        yield compare(f"log Z of each system, the optimum {name}", found.log_z, np.full(4, log_z))
        yield compare(f"evaluated, the optimum {name}", solution.evaluate(64, seed=1, confirm=False).elbo.value, log_z)


@check(
    "resampling",
    "MATH 4: sequential Monte Carlo",
    kind=KIND,
    implements=["sdecontrol.particles.smc.resample"],
    controls=["weights not normalised", "multinomial draws"],
)
def resampling(setting: Setting, defect: str) -> Lines:
    """Each scheme makes n w_i copies of particle i on average; of the systematic one no number of copies is one or more
    away from n w_i, of the stratified one two or more."""
    rng = setting.rng(141)
    w = rng.dirichlet(np.ones(7))
    logs = tensor(np.log(w) + 3.0).expand(4000, 7)
    want = w**2 if defect.startswith("weights") else w
    for scheme in RESAMPLING:
        used = "multinomial" if defect.startswith("multinomial") else scheme
        chosen = resample(logs, 10, used, torch.Generator().manual_seed(setting.seed + 1)).numpy()
        copies = np.stack([(chosen == i).sum(1) for i in range(7)], 1)
        errors = np.sqrt(10 * w * (1 - w) / 4000)
        yield within(
            f"copies, {scheme}, in standard errors", float(np.abs((copies.mean(0) - 10 * want) / errors).max()), 6.0
        )
        if scheme != "multinomial":
            most = 1.0 if scheme == "systematic" else 2.0
            yield within(f"copies away from n w, {scheme}", float(np.abs(copies - 10 * w).max()), most)


@check(
    "best-of-n",
    "MATH 4; Beirami et al. 2401.01879",
    kind=KIND,
    implements=["sdecontrol.BestOfN"],
    controls=["n off by one", "sign of g flipped", "alpha off by 5 %"],
)
def best_of_n(setting: Setting, defect: str) -> Lines:
    """The best of n has the reward of the largest of n Gaussian numbers, where the reward is linear, and a KL of
    log n - (n - 1)/n; one chosen in proportion to exp(R/alpha) has log Z as the mean of its weights; and rejection by a
    bound of the reward is the tilted law itself."""
    n, linear = 6, point_case(G=np.zeros((2, 2)), F=None)
    given = spoil(linear, defect)
    law = linear.reference(0, linear.mean).of(-1)
    mean, sd = linear.g @ law.mean, math.sqrt(linear.g @ law.cov @ linear.g)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    z = 9 * nodes
    top = 9 * float((weights * z * n * stats.norm.pdf(z) * stats.norm.cdf(z) ** (n - 1)).sum())
    solution = solved(given, sc.BestOfN(n + defect.startswith("n off")))
    found = solution.evaluate(60_000, seed=setting.seed)
    yield from agrees("reward of the best", found.reward, float(mean + sd * top), 0.01)
    yield compare("KL of the best", found.kl.value, math.log(n) - (n - 1) / n)
    x = solution.sample(4000, seed=setting.seed).numpy() @ linear.g
    share = stats.kstest(x, lambda v: stats.norm.cdf((v - mean) / sd) ** n).pvalue
    yield within("1e-6 less the p-value of the best's reward", 1e-6 - float(share), 0.0)
    case = point_case(F=None, g=np.array([0.3, 0.2]))
    best, log_z = case.optimum()
    given = spoil(case, defect)
    found = solved(given, sc.BestOfN(32, selection="softmax")).evaluate(20_000, seed=setting.seed)
    yield from agrees("log Z, softmax", found.log_z, log_z, 0.03)
    bound = 0.5 * float(given.g @ np.linalg.solve(given.G, given.g))
    if defect.startswith("sign"):
        bound += 1.0
    method = sc.BestOfN(16, selection="rejection", bound=bound)
    rejected = solved(given, method)
    end = best.of(-1)
    yield from moments("rejection", rejected.sample(8000, seed=setting.seed), end.mean, end.cov, 0.05)
    yield from agrees("log Z, rejection", rejected.evaluate(20_000, seed=setting.seed).log_z, log_z, 0.03)


DENSITY_MEAN, DENSITY_COV = np.array([1.0, -2.0]), np.array([[0.5, 0.4], [0.4, 0.8]])


def density(defect: str, level: float = 1.7) -> tuple[Any, float]:
    """A correlated Gaussian density times ``e^level`` in two dimensions."""
    size = 1 + float(defect.split()[3]) / 100 if defect.startswith("covariance") else 1.0
    cov = tensor(DENSITY_COV * size)
    law = torch.distributions.MultivariateNormal(tensor(DENSITY_MEAN), cov)
    shift = level + (0.1 if defect.startswith("constant") else 0.0)
    # the density itself is off, its integral known
    return (lambda x: law.log_prob(x) + shift), level


@check(
    "tempered-particles",
    "MATH 6 and 12: tempering",
    kind=KIND,
    implements=["sdecontrol.TemperedSMC", "sdecontrol.gibbs_problem"],
    controls=["constant left out of the density", "covariance off by 15 %"],
)
def tempered(setting: Setting, defect: str) -> Lines:
    """Particles tempered to the target, in states with a gradient and without, and in the noises of paths, have E Z^ =
    Z and samples of the target: a Gaussian density, and a linear-quadratic chain."""
    log_density, log_z = density(defect)
    problem = sc.gibbs_problem(log_density, 2, dtype=torch.float64, seed=0)
    for name, method in (
        ("gradient", sc.TemperedSMC(512)),
        ("no gradient", sc.TemperedSMC(512, gradient=False)),
    ):
        solution = sc.solve(problem, method, progress=False, seed=0)
        yield from agrees(
            f"log Z, {name}", solution.evaluate(4096, seed=setting.seed + 1, confirm=False).log_z, log_z, 0.04
        )
        x = solution.sample(8192, seed=setting.seed + 1)
        yield from moments(f"samples, {name}", x, DENSITY_MEAN, DENSITY_COV, 0.08)
    case = point_case(alpha=0.25)
    given = replace(case, sigma=1.05 * case.sigma) if defect.startswith("covariance") else case
    given = replace(given, F=None) if defect.startswith("constant") else given
    best, log_z = case.optimum()
    solution = solved(given, sc.TemperedSMC(512))
    yield from agrees("log Z, noises", solution.evaluate(8192, seed=setting.seed + 1, confirm=False).log_z, log_z, 0.08)
    x = solution.sample(8192, seed=setting.seed + 1)
    yield from moments("ends, noises", x, best.of(-1).mean, best.of(-1).cov, 0.12)


@check(
    "rare-events",
    "MATH 13: rewards that are -inf",
    kind=KIND,
    implements=["sdecontrol.TemperedSMC", "sdecontrol.particles.levels.run_events", "sdecontrol.exact_solution.log_z"],
    controls=["level off by 5 %", "noise off by 5 %"],
)
def rare(setting: Setting, defect: str) -> Lines:
    """With r = -inf outside of {x > a} log Z is the log probability of the event on the chain, 1e-6 here: particles on
    a ladder of noise scales, or of levels of the user's own, have it without bias, and so has the exact solution."""
    K, variance = 8, 0.0
    for _ in range(K):
        variance = (1 - 1 / K) ** 2 * variance + 1 / K
    a = 4.75 * math.sqrt(variance)
    log_p = float(stats.norm.logsf(4.75))
    edge, size = a * (1.05 if defect.startswith("level") else 1.0), 1.05 if defect.startswith("noise") else 1.0
    sde = sc.LinearSDE(tensor([[-1.0]]), tensor([[size]]))
    event = lambda x: torch.where(x[:, 0] > edge, 0.0, -torch.inf).double()  # noqa: E731
    problem = sc.ControlProblem(sde, sc.Dirac(tensor([0.0])), event)
    for name, level in (("noise scales", None), ("levels", lambda x: edge - x[:, 0])):
        solution = sc.solve(problem, sc.TemperedSMC(512, level=level), time_steps=K, progress=False, seed=0)
        found = solution.evaluate(8192, seed=setting.seed + 1, confirm=False)
        yield from agrees(f"log P, {name}", found.log_z, log_p, 0.12)
    plain = sc.ControlProblem(
        sc.SDE(lambda x, t: -x, torch.tensor(size, dtype=torch.float64), dim=1), sc.Dirac(tensor([0.0])), event
    )
    yield compare("log P, exact on a grid", float(sc.exact_solution(plain, K).log_z), log_p, 1e-3)


@check(
    "adaptive-importance",
    "MATH 6: densities",
    kind=KIND,
    implements=["sdecontrol.AdaptiveImportance"],
    controls=["constant left out of the density", "covariance off by 15 %"],
)
def importance(setting: Setting, defect: str) -> Lines:
    """Importance sampling from laws that are fitted to its own weighted draws is unbiased for the integral of a density
    within a given number of evaluations, and its weighted draws have the moments; parameters with supports and priors
    (a positive one, a log-normal law; the evidence of a Gaussian) keep the integral."""
    log_density, log_z = density(defect)
    problem = sc.gibbs_problem(log_density, 2, dtype=torch.float64, seed=0)
    solution = sc.solve(problem, sc.AdaptiveImportance(4000), progress=False, seed=setting.seed)
    yield from agrees("log Z", solution.evaluate(seed=1, confirm=False).log_z, log_z, 0.05)
    yield from moments("samples", solution.sample(8000, seed=1), DENSITY_MEAN, DENSITY_COV, 0.12)
    # y ~ N(mu, s^2), mu ~ N(0, 2^2), log s ~ N(0, 0.3^2): the evidence, by quadrature over log s
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    spread = np.exp(0.3 * nodes)
    y = 1.3
    evidence = (weights / weights.sum() * stats.norm.pdf(y, 0, np.sqrt(4 + spread**2))).sum()
    prior: dict[str, Any] = {
        "mu": torch.distributions.Normal(torch.tensor(0.0).double(), 2.0),
        "s": torch.distributions.LogNormal(torch.tensor(0.0).double(), 0.3 * (1.3 if defect else 1.0)),
    }
    seen = y + (0.3 if defect else 0.0)
    posterior = sc.gibbs_problem(
        log_likelihood=lambda v: torch.distributions.Normal(v["mu"], v["s"]).log_prob(torch.tensor(seen).double()),
        prior=prior,
        seed=0,
    )
    solution = sc.solve(posterior, sc.AdaptiveImportance(4000), progress=False, seed=setting.seed)
    yield from agrees("log evidence", solution.evaluate(seed=1, confirm=False).log_z, math.log(evidence), 0.05)


@check(
    "markov-chains",
    "MATH 6: densities",
    kind=KIND,
    implements=["sdecontrol.MALA", "sdecontrol.HMC", "sdecontrol.evaluation.estimates.bridge_log_z"],
    controls=["constant left out of the density", "covariance off by 60 %"],
)
def markov(setting: Setting, defect: str) -> Lines:
    """Chains of Langevin and Hamiltonian moves keep a density's law (moments), and the bridge between their draws and a
    fitted law has its integral; NUTS where pyro is installed."""
    log_density, log_z = density(defect)
    problem = sc.gibbs_problem(log_density, 2, dtype=torch.float64, seed=0)
    methods: list[Any] = [sc.MALA(32), sc.HMC(32)]
    if importlib.util.find_spec("pyro") and not defect:
        methods.append(sc.NUTS(2, warm_up=setting.count(60, 300)))
    for method in methods:
        solution = sc.solve(problem, method, progress=False, seed=0)
        n = 8192 if method.name != "nuts" else setting.count(400, 2000)
        most = 0.13 if method.name != "nuts" else setting.count(30, 13) / 100
        yield from moments(method.name, solution.sample(n, seed=setting.seed + 1), DENSITY_MEAN, DENSITY_COV, most)
        yield from agrees(
            f"log Z, {method.name}", solution.evaluate(n, seed=setting.seed, confirm=False).log_z, log_z, 0.05
        )


@check(
    "diagnostics-of-chains",
    "Vehtari et al. 1903.08008",
    kind=KIND,
    implements=[
        "sdecontrol.particles.diagnostics.chain_ess",
        "sdecontrol.particles.diagnostics.bulk_ess",
        "sdecontrol.particles.diagnostics.split_rhat",
    ],
    controls=["correlation off by 0.1", "draws taken for independent"],
)
def diagnostics(setting: Setting, defect: str) -> Lines:
    """Of autoregressive chains of correlation rho the effective number of draws is S (1 - rho)/(1 + rho), monotone maps
    change nothing in the ranks, and R-hat is 1; of two chains d standard deviations apart R-hat^2 is 1 + d^2/2 in the
    moments, 2 at least here."""
    rng = setting.rng(142)
    for rho in (-0.4, 0.5, 0.9):
        own = rho + 0.05 if defect.startswith("correlation") else rho
        noise, x = rng.normal(size=(8, 20_000)), np.zeros((8, 20_000))
        x[:, 0] = noise[:, 0]
        for t in range(1, 20_000):
            x[:, t] = own * x[:, t - 1] + math.sqrt(1 - own**2) * noise[:, t]
        rho_ = 0.0 if defect.startswith("draws") else rho
        wanted = x.size * (1 - rho_) / (1 + rho_)
        chains = tensor(x)
        for name, found in (
            ("chain_ess", chain_ess(chains)),
            ("bulk_ess", bulk_ess(chains)),
            ("bulk_ess of exp", bulk_ess(chains.exp())),
        ):
            yield within(f"{name}, rho={rho}", abs(float(found) / wanted - 1), 0.1)
        yield within(f"R-hat less 1, rho={rho}", abs(float(split_rhat(chains)) - 1), 0.01)
    far = tensor(rng.normal(size=(2, 1000)) + np.array([[0.0], [6.0]]))
    yield within("1.4 less R-hat of chains apart", 1.4 - float(split_rhat(far)), 0.0)


@check(
    "mixture-fit",
    "MATH 8: mixtures",
    kind=KIND,
    implements=["sdecontrol.particles.mixture_fit.fit_mixture", "sdecontrol.GaussianMixture"],
    controls=["data off by 0.2", "spread off by 10 %"],
)
def mixture_fit(setting: Setting, defect: str) -> Lines:
    """A mixture that is fitted to 4000 draws of a mixture, weighted or not, lacks hardly a nat of it on fresh draws:
    joint ones, and products where coordinates are independent with many modes."""
    joint = GaussianMixture(
        tensor([0.2, 0.5, 0.3]),
        tensor([[-3.0, 0.0], [2.0, 2.0], [1.0, -3.0]]),
        tensor([[[0.5, 0.3], [0.3, 0.4]], [[0.2, 0.0], [0.0, 1.0]], [[1.0, -0.6], [-0.6, 0.5]]]),
    )
    product = ProductMixture(*(v.expand(3, 2).contiguous() for v in tensor([[0.3, 0.7], [-2.0, 1.5], [0.2, 0.1]])))
    for name, truth in (("joint", joint), ("product", product)):
        x = draw(truth, 6000, setting.seed + 1).double()
        given = x + 0.2 if defect.startswith("data") else 1.1 * x if defect.startswith("spread") else x
        tilt = 0.5 * x[:, 0] if name == "joint" else None
        law = fit_mixture(given, None if tilt is None else tilt, seed=setting.seed)
        fresh = draw(truth, 20_000, setting.seed + 2).double()
        lack = truth.log_prob(fresh) - law.log_prob(fresh)
        if tilt is not None:  # fitted to exp(x_1/2) times the truth
            w = (0.5 * fresh[:, 0]).softmax(0)
            level = torch.logsumexp(0.5 * fresh[:, 0], 0) - math.log(len(fresh))
            lack = w @ (truth.log_prob(fresh) + 0.5 * fresh[:, 0] - level - law.log_prob(fresh))
        yield within(f"KL to the fit, {name}", abs(float(lack.mean())), 0.03)
