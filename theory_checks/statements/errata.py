"""docs/mathematics.md section 9: where the tutorial's print and the page differ, settled with numbers.

In each check the corrected form must hold, on the library's answers or on dense laws; the printed form is the negative
control, and must fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

import sdecontrol as sc
from sdecontrol.methods.on_paths import collect

from ..cases import linear_cases, tensor
from ..gaussian import Joint, gaussian_kl, log_density, path_law
from ..iterations import EIGHT, AffineModule, combinations, iteration, run_on
from ..quadrature import NoiseNodes
from ..registry import Measurement, Setting, check, compare, within
from .estimators import _a_policy, _pathwise_gradient, one_dimensional, soft_ppo_gradient
from .mixtures import gradient, mixture_cases

Lines = Iterator[Measurement]
KIND = "errata"
PRINT = "as printed"


@check(
    "erratum-3-variance",
    "[3]",
    kind=KIND,
    implements=["sdecontrol.VP"],
    controls=["as printed: 1 - exp(-t/2)", "as printed: mu_t contains x_0"],
)
def variance_of_vp(setting: Setting, defect: str) -> Lines:
    """Integrating [1], x_t | x_0 ~ N(exp(-t/2) x_0, 1 - exp(-t)); printed is 1 - exp(-t/2), with an x_0 in mu_t that is
    multiplied by x_0 again. Against an Euler chain of [1] extrapolated to h = 0, and against the library's VP(T, T)."""
    x0, t = 1.7, 0.8
    mean, variance = np.exp(-0.5 * t) * x0, 1 - np.exp(-t)
    if defect.startswith("as printed: 1"):
        variance = 1 - np.exp(-0.5 * t)
    if defect.startswith("as printed: mu"):
        mean = (np.exp(-0.5 * t) * x0) * x0
    levels = []
    for K in (64, 128, 256, 512):
        a, h = 1 - 0.5 * t / K, t / K
        levels.append(np.array([a**K * x0, h * (1 - a ** (2 * K)) / (1 - a * a)]))
    for p in (2, 4, 8):
        levels = [(p * b - a) / (p - 1) for a, b in pairwise(levels)]
    yield compare("mean of the Euler chain", levels[0][0], mean)
    yield compare("variance of the Euler chain", levels[0][1], variance)
    schedule, one = sc.VP(t, t), torch.ones((), dtype=torch.float64)
    yield compare("VP: mean", float(schedule.mu(one)) * x0, mean)
    yield compare("VP: variance", float(schedule.std(one)) ** 2, variance)


@check(
    "erratum-21-clip",
    "[21]",
    kind=KIND,
    implements=["sdecontrol.SoftPPO"],
    controls=["min, as printed", "no clipping", "clipped elsewhere"],
)
def clip(setting: Setting, defect: str) -> Lines:
    """The surrogate of a *cost* is conservative with max{c ratio, c clip(ratio)}: never below the unclipped one, and
    equal to it where the step improves within the region; its slope is zero where a further improvement lies beyond it.
    Printed is min. The library's surrogate of a control that has moved is this one, over dense paths of the old one."""
    ratio = torch.linspace(0.3, 1.9, 33, dtype=torch.float64).requires_grad_()
    rule = torch.minimum if defect.startswith("min") else torch.maximum
    for cost in (2.0, -3.0):
        clipped = ratio.clamp(0.8, 1.2) if defect != "no clipping" else ratio
        surrogate = rule(cost * ratio, cost * clipped)
        yield within(
            f"how far below c ratio, c={cost:g}", float((cost * ratio - surrogate).clamp(min=0).detach().max()), 1e-12
        )
        slope = torch.autograd.grad(surrogate.sum(), ratio)[0]
        beyond = ratio < 0.8 if cost > 0 else ratio > 1.2
        yield within(f"slope beyond the region where cost falls, c={cost:g}", float(slope[beyond].abs().max()), 1e-12)
        worse = ratio > 1.2 if cost > 0 else ratio < 0.8
        yield compare(f"slope back into the region, c={cost:g}", slope[worse], torch.full_like(slope[worse], cost))
    yield from _library_surrogate(setting, defect)


def _library_surrogate(setting: Setting, defect: str) -> Lines:
    """``SoftPPO``'s loss after a step that takes many ratios out of the region, and the ratios."""
    for case in one_dimensional(setting):
        U, w = _a_policy(setting, case)
        module, noise = AffineModule(case, U, w), combinations(EIGHT, case.K, 1)
        run, method = run_on(case, module, noise), sc.SoftPPO(clip=0.1, baseline="per-time")
        state = method.setup(run)
        batch = method.advantages(state, run, collect(state, run, 0))
        module.U.data += 0.3
        module.w.data -= 0.4
        loss, ratios = method.surrogate(state, batch)
        x, xi = batch.paths.states[:-1, :, 0].numpy(), noise[..., 0].numpy()
        root = np.sqrt(case.h)[:, None]
        old, new = (root * (V[:, :, 0] * x + v) for V, v in ((U, w), (U + 0.3, w - 0.4)))
        F = np.array([case.F_at(t)[0, 0] for t in case.grid[:-1]])[:, None]
        steps = old * xi + 0.5 * old**2 + case.h[:, None] * 0.5 * F * x**2 / case.alpha
        reward = case.problem().reward(batch.paths.end).numpy() / case.alpha
        to_come = steps[::-1].cumsum(0)[::-1] - steps - reward
        n = x.shape[1]
        A = (to_come - to_come.mean(1, keepdims=True)) * n / (n - 1)
        ratio = np.exp(0.5 * xi**2 - 0.5 * (xi + old - new) ** 2)
        clipped = (
            ratio if defect == "no clipping" else np.clip(ratio, 0.9, 1.2 if defect.startswith("clipped") else 1.1)
        )
        rule = np.minimum if defect.startswith("min") else np.maximum
        want = (rule(A * ratio, A * clipped) + 0.5 * new**2).sum(0).mean()
        yield compare("ratios of SoftPPO", ratios, ratio)
        yield within("1 less the ratios out of the region", 1.0 - float((np.abs(ratio - 1) > 0.1).sum()), 0.0)
        yield compare("surrogate of SoftPPO", float(loss.detach()), want)


@check(
    "erratum-21-cost",
    "[21]",
    kind=KIND,
    implements=["sdecontrol.SoftPPO"],
    controls=["own KL only, not differentiated", "own KL only, differentiated"],
)
def ppo_cost(setting: Setting, defect: str) -> Lines:
    """The gradient of J needs the KL terms and costs still to come, besides the derivative of the step's own KL. The
    printed cost carries only its own step's KL, which does not depend on the action; both readings of the print fail,
    differentiated or not."""
    for case in one_dimensional(setting, cost=False):
        U, w = _a_policy(setting, case)
        want = _pathwise_gradient(case, U, w)
        yield compare("gradient of -J/alpha", soft_ppo_gradient(case, U, w, defect), want, 1e-8)
        _, slope = iteration(case, sc.SoftPPO(epochs=1), U, w, combinations(EIGHT, case.K, 1))
        yield compare("gradient of SoftPPO", slope, want, 1e-8)


@check(
    "erratum-27-exponent",
    "[27]",
    kind=KIND,
    implements=["sdecontrol.exact_solution.kernel"],
    controls=["0.5 g dt, as printed"],
)
def exponent(setting: Setting, defect: str) -> Lines:
    """The Gaussian density of a step of variance g dt has |y - m|^2 / (2 g dt) in its exponent, where the derivation of
    [27] prints 0.5 g dt: only then is the mean of exp(v/alpha) p_pre shifted by sigma^2 grad v/alpha. By quadrature,
    for a linear reward, and the library's kernel."""
    for case in linear_cases(setting, dims=(1,), start="fixed", extra_noise=False):
        case = replace(case, G=0 * case.G, sigma=np.array([[0.7]]), growth=0.0)
        x, k = np.array([[0.4]]), case.K - 1
        M, b, C = case.steps()[k]
        m, variance = (x @ M.T + b).item(), float(C[0, 0] ** 2)
        width = (0.5 if defect else 2.0) * variance
        y = np.linspace(m - 12, m + 12, 20001)
        log_p = case.g[0] * y / case.alpha - (y - m) ** 2 / width
        p = np.exp(log_p - log_p.max())
        shift = (p * (y - m)).sum() / p.sum()
        yield compare("shift of the mean", shift, variance * case.g[0] / case.alpha)
        law = case.chain().exact.kernel(tensor(x), k)
        yield compare("the library's kernel: mean", law.mean[0, 0], m + shift)
        yield compare(
            "the library's kernel: variance", law.covariance_matrix[0, 0, 0], (p * (y - m - shift) ** 2).sum() / p.sum()
        )


@check(
    "erratum-29-scale", "[29]", kind=KIND, implements=["sdecontrol.exact_solution.value"], controls=["h_t, as printed"]
)
def scale_of_h(setting: Setting, defect: str) -> Lines:
    """The residual that [29] squares is h_t/alpha - log E[exp(v_{t-1}/alpha)], as the line above it has; with h_t, as
    printed, the exact value is no zero."""
    points, masses = np.polynomial.hermite_e.hermegauss(64)
    for case in one_dimensional(setting, cost=False):
        answers, x = case.chain(), np.array([[-0.5], [0.8]])
        for k in range(case.K):
            M, b, C = case.steps()[k]
            y = ((x @ M.T + b) + C[0, 0] * points).reshape(-1, 1)
            target = np.log((np.exp(answers.value(k + 1, y) / case.alpha).reshape(2, -1)) @ (masses / masses.sum()))
            h = answers.value(k, x)
            yield compare(f"residual at step {k}", h if defect else h / case.alpha, target)


@check(
    "erratum-31-score",
    "[31]",
    kind=KIND,
    implements=["sdecontrol.GaussianMixture.score"],
    controls=["grad s, as printed", "score at T - t"],
)
def tweedie_score(setting: Setting, defect: str) -> Lines:
    """Tweedie's formula is E[x_0|x_t] = (x + sigma_t^2 s(x, t))/mu_t with the score s itself, where "grad s" is
    printed, taken at x_t's own time."""
    for case in mixture_cases(setting, dims=(1,)):
        x, t = setting.rng(90).normal(size=(5, 1)), 0.7
        spent = case.beta[0] * (1 - t) + 0.5 * (case.beta[1] - case.beta[0]) * (1 - t) ** 2
        at = case.sde().marginal(1 - t if defect.startswith("score at") else t)
        score = at.score(tensor(x)).numpy()
        if defect.startswith("grad s"):
            score = gradient(lambda y: at.score(tensor(y)).numpy()[:, 0], x)
        yield compare(
            "posterior mean", (x + (1 - np.exp(-spent)) * score) / np.exp(-0.5 * spent), case.posterior_mean(t, x)
        )


@check(
    "erratum-24-weights",
    "[24]",
    kind=KIND,
    controls=["weights not normalised, as printed", "factor 1/2 left out, as printed"],
)
def weights_of_mle(setting: Setting, defect: str) -> Lines:
    """exp(r/alpha) overflows as soon as r/alpha is large (float32: 88), so that [24] needs weights shifted by max r,
    which do not move its minimiser; and -log p is |x - rho|^2/(2 sigma^2), up to a constant, with the 1/2 that is left
    out."""
    r, alpha = torch.tensor([10.0, 12.0, 11.5]), 0.1
    y = torch.tensor([0.2, 1.0, -0.4])
    w = torch.exp(r / alpha) if defect.startswith("weights") else torch.exp((r - r.max()) / alpha)
    minimiser = float((w * y).sum() / w.sum())
    exact = np.exp((r.double().numpy() - 12.0) / alpha)
    yield compare("weighted mean in float32", minimiser, float((exact * y.double().numpy()).sum() / exact.sum()), 1e-5)
    x, rho, cov = setting.rng(91).normal(size=(2, 4, 3)).tolist(), None, 0.3 * np.eye(3)
    x, rho = np.array(x)
    loss = ((x - rho) ** 2).sum(-1) / 0.3 * (1.0 if defect.startswith("factor") else 0.5)
    negative = np.array([-log_density(a, b, cov) for a, b in zip(x, rho)])
    yield compare("differences of -log p", loss - loss[0], negative - negative[0])


@check(
    "erratum-35-log-z",
    "[35]",
    kind=KIND,
    implements=[
        "sdecontrol.exact_solution.kernel",
        "sdecontrol.exact_solution.log_z",
        "sdecontrol.exact_solution.value",
    ],
    controls=["log Z omitted, as printed", "v_0 of a fixed start omitted", "start's log-ratio omitted"],
)
def log_z_of_t_step(setting: Setting, defect: str) -> Lines:
    """The T-step identity is sum log p*/p_pre = r/alpha - log Z, printed without log Z; where a random start stays
    fixed it is r/alpha - v_0(x_0)/alpha, and no constant replaces v_0."""
    for start in ("controlled", "fixed"):
        for case in linear_cases(setting, start=start):
            answers, path = case.chain(), setting.rng(92).normal(size=(case.K + 1, case.d))
            total = 0.0
            for k, (A, a, C) in enumerate(case.steps()):
                M, b, root = answers.kernel(k)
                total += log_density(path[k + 1], M @ path[k] + b, root @ root.T) - log_density(
                    path[k + 1], A @ path[k] + a, C @ C.T
                )
            constant = float(answers.exact.log_z)
            if start == "controlled" and not defect.startswith("start's"):
                law = answers.exact.initial
                total += log_density(path[0], law.mean.numpy(), law.covariance_matrix.numpy()) - log_density(
                    path[0], case.mean, case.cov
                )
            if start == "fixed" and not defect.startswith("v_0"):
                constant = answers.value(0, path[:1])[0] / case.alpha
            constant = 0.0 if defect.startswith("log Z") else constant
            reward = -0.5 * path[-1] @ case.G @ path[-1] + case.g @ path[-1]
            yield compare(f"log p*/p_pre, {start} start, d={case.d}", total, reward / case.alpha - constant)


@check(
    "erratum-32-alpha",
    "[32]",
    kind=KIND,
    implements=["sdecontrol.exact_solution.kernel", "sdecontrol.simulate"],
    controls=["1/alpha on the right, as printed", "sign of the gradient lost"],
)
def alpha_of_path_integral(setting: Setting, defect: str) -> Lines:
    """sigma^2 grad v/alpha is estimated by E[exp(r/alpha) eps]/E[exp(r/alpha)], eps the noise increment, without the
    further 1/alpha of the print: per unit of time it is the mean shift of the library's soft-optimal kernel."""
    for case in one_dimensional(setting, cost=False):
        nodes, x0 = NoiseNodes(case.K, 40), 0.6
        paths = nodes.simulate(case.problem(), state=tensor([[x0]]), time_steps=list(case.grid))
        weight = torch.exp(case.problem().reward(paths.end) / case.alpha)
        M, b, C = case.steps()[0]
        increment = C[0, 0] * paths.noises[0, :, 0]
        estimate = float(nodes.mean(weight * increment) / nodes.mean(weight))
        estimate *= {"1/alpha on the right, as printed": 1 / case.alpha, "sign of the gradient lost": -1.0}.get(
            defect, 1.0
        )
        kernel_M, kernel_b, _ = case.chain().kernel(0)
        yield compare("mean shift of p*", (kernel_M - M)[0, 0] * x0 + (kernel_b - b)[0], estimate)


@check(
    "erratum-26-step",
    "[26]",
    kind=KIND,
    controls=["step size left out, as printed", "sigma squared, as printed", "sign of the difference"],
)
def step_of_noise_form(setting: Setting, defect: str) -> Lines:
    """Put into [24], x' = rho_pre + sqrt(dt) eps leaves |eps - sqrt(dt)(eps_pre - eps_theta)/sigma_t|^2, sigma_t the
    marginal's deviation; [26] prints (eps_pre - eps_theta)/sigma_t^2."""
    rng, dt, sigma = setting.rng(93), 0.05, 0.8
    x, eps, before, after = rng.normal(size=(4, 6, 2))
    step = lambda noise: x + (0.5 * x - noise / sigma) * dt  # noqa: E731
    residual = (step(before) + np.sqrt(dt) * eps - step(after)) / np.sqrt(dt)
    factor = {
        "step size left out, as printed": 1 / sigma,
        "sigma squared, as printed": np.sqrt(dt) / sigma**2,
        "sign of the difference": -np.sqrt(dt) / sigma,
    }.get(defect, np.sqrt(dt) / sigma)
    yield compare("regressed noise", eps - factor * (before - after), residual)


@check(
    "erratum-7-time",
    "[7], [26]",
    kind=KIND,
    implements=["sdecontrol.generative_sde"],
    controls=["score at T - t, as printed"],
)
def time_of_score(setting: Setting, defect: str) -> Lines:
    """With x_t in denoising order the score of [7] is taken at x_t's own noise level; printed is T - t. From Gaussian
    data of variance 0.3 the reversed Euler chain (extrapolated in dt) ends at the data's variance, and so does the
    library's."""
    data, T, ends = 0.3, 2.0, []
    variance = lambda s: data * np.exp(-s) + 1 - np.exp(-s)  # noqa: E731
    for K in (128, 256, 512, 1024):
        dt, V = T / K, variance(T)
        for k in range(K):
            s = T - k * dt
            V = (1 + dt * (0.5 - 1 / variance(T - s if defect else s))) ** 2 * V + dt
        ends.append(V)
    for p in (2, 4, 8):
        ends = [(p * b - a) / (p - 1) for a, b in pairwise(ends)]
    yield compare("variance at the data end", ends[0], data, 1e-6)
    mixture = sc.GaussianMixture(tensor([1.0]), tensor([[0.0]]), tensor([data]))
    reversal: Any = sc.generative_sde(mixture, schedule=sc.VP(T, T)).as_linear()
    law = reversal.marginal(1.0, sc.Gaussian(tensor([0.0]), variance(T)))
    yield compare("variance of the library's reversal", law.variance, [ends[0]], 1e-4)


@check("erratum-40-weight", "[39], [40]", kind=KIND, controls=["weight sigma_t^2, as printed", "weight 1"])
def weight_of_score_loss(setting: Setting, defect: str) -> Lines:
    """KL(Q_time || P_theta) [39] under [1] (unit noise) is E int |s - s_theta|^2/2 dt: weight 1/2, not sigma_t^2. On a
    chain it is exact: for Gaussian data and a wrong affine score, the dense KL of the two path laws against the
    weighted loss."""
    K, T, data = 8, 1.5, np.array([[0.4]])
    h, rng = T / K, setting.rng(94)
    steps, wrong, loss = [], [], 0.0
    for k in range(K):
        s = T - k * h
        precision = 1 / (np.exp(-s) * data[0, 0] + 1 - np.exp(-s))
        steps.append((np.array([[1 + h * (0.5 - precision)]]), np.zeros(1), np.sqrt(h) * np.eye(1)))
        U, w = 0.4 * rng.normal(size=2)
        wrong.append((U, w))
    start = np.array([[np.exp(-T) * data[0, 0] + 1 - np.exp(-T)]])
    law = path_law(np.zeros(1), start, steps)
    model = path_law(np.zeros(1), start, [(M + h * U, b + h * w, C) for (M, b, C), (U, w) in zip(steps, wrong)])
    for k, (U, w) in enumerate(wrong):
        at, s = law.of(k), T - k * h
        weight = {"weight sigma_t^2, as printed": 1 - np.exp(-s), "weight 1": 1.0}.get(defect, 0.5)
        loss += weight * h * (U * U * at.cov[0, 0] + (U * at.mean[0] + w) ** 2)
    yield compare("KL(Q_time || P_theta)", loss, gaussian_kl(law, model))


@check(
    "erratum-table-2",
    "Table 2",
    kind=KIND,
    implements=["sdecontrol.exact_solution.marginal", "sdecontrol.exact_solution.kernel"],
    controls=["ends in the data's law, as printed"],
)
def end_of_q_fine(setting: Setting, defect: str) -> Lines:
    """Q_fine couples the reference's bridges p_pre(x_{T:1}|x_0) with p_r, not with the data's law as Table 2 has it: so
    composed, it is the path law that the library's soft-optimal kernels induce."""
    for case in linear_cases(setting, dims=(1, 2, 3)):
        reference, induced = case.reference(), case.chain().induced()
        end = reference.of(-1)
        if not defect:
            end, _ = end.tilted(case.G / case.alpha, case.g / case.alpha)
        M, b, Q = reference.regression(range(case.K), [case.K])
        whole = np.concatenate([M, np.eye(case.d)])
        coupled = Joint(
            np.concatenate([b, 0 * end.mean]) + whole @ end.mean,
            np.pad(Q, (0, case.d)) + whole @ end.cov @ whole.T,
            case.d,
        )
        yield compare(f"mean of the path, d={case.d}", induced.mean, coupled.mean)
        yield compare(f"covariance of the path, d={case.d}", induced.cov, coupled.cov)
