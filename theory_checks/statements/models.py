"""Sections 1, 8 and 9: noise schedules, pre-trained models in every parametrisation, discrete samplers, bridges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp

import sdecontrol as sc
from sdecontrol.chains.diffusion import DiffusionChain, SamplerSteps, Thresholding
from sdecontrol.chains.masked import MaskSchedule

from ..cases import affine_map, linear_cases, spoil, tensor
from ..gaussian import Joint, gaussian_kl, path_law
from ..registry import Measurement, Setting, check, compare, order
from .mixtures import gradient, mixture_cases, mixture_log_density

Lines = Iterator[Measurement]

#: drift rate and noise rate of the forward SDE ``dx = a(s) x ds + g(s) dw`` of each schedule, written down from its
#: source
FORWARD = {
    "VP, beta = 1 [1]": (sc.VP(1.0, 1.0), lambda s: -0.5, lambda s: 1.0),
    "VP": (sc.VP(), lambda s: -0.5 * (0.1 + 19.9 * s), lambda s: 0.1 + 19.9 * s),
    "VE": (sc.VE(0.05, 8.0), lambda s: 0.0, lambda s: 0.05**2 * 160.0 ** (2 * s) * 2 * np.log(160.0)),
    "flow matching": (sc.FlowMatching(), lambda s: -1 / (1 - s), lambda s: 2 * s / (1 - s)),
    "cosine VP": (
        sc.CosineVP(),
        lambda s: -np.tan((s + 0.008) / 1.008 * np.pi / 2) * np.pi / 2 / 1.008,
        lambda s: 2 * np.tan((s + 0.008) / 1.008 * np.pi / 2) * np.pi / 2 / 1.008,
    ),
}


@check(
    "eq-1-noising",
    "[1], [3]",
    implements=["sdecontrol.VP", "sdecontrol.VE", "sdecontrol.FlowMatching", "sdecontrol.CosineVP"],
    controls=["variance 1 - exp(-t/2) as printed", "mean squared for the slope", "noise off by 1 %"],
)
def noising(setting: Setting, defect: str) -> Lines:
    """Each schedule's mu and std are the moments of its forward SDE: m' = a m, V' = 2 a V + g^2 from data of mean 1,
    variance 0, integrated numerically. For [1] that is mu = exp(-t/2), std^2 = 1 - exp(-t)."""
    for name, (schedule, slope, rate) in FORWARD.items():
        s = np.array([0.1, 0.4, 0.75, 0.95])
        initial = [1.0, float(schedule.std(torch.zeros((), dtype=torch.float64))) ** 2]
        flow = solve_ivp(
            lambda t, y: [slope(t) * y[0], 2 * slope(t) * y[1] + rate(t)],
            (0, s[-1]),
            initial,
            t_eval=s,
            method="DOP853",
            rtol=1e-12,
            atol=1e-14,
        )
        mu, std = (f(tensor(s)).numpy() for f in (schedule.mu, schedule.std))
        if defect.startswith("variance"):
            std = np.sqrt(1 - mu)
        yield compare(f"mu of {name}", mu**2 if defect.startswith("mean") else mu, flow.y[0])
        yield compare(f"std of {name}", std * (1.01 if defect.startswith("noise") else 1.0), np.sqrt(flow.y[1]))


def _as_predictions(
    x: np.ndarray, score: np.ndarray, mu: float, std: float, slope: float, rate: float
) -> dict[str, np.ndarray]:
    """What an exact model of each parametrisation predicts, from the score by its definition."""
    data = (x + std**2 * score) / mu
    noise = -std * score
    return {
        "noise": noise,
        "score": score,
        "sample": data,
        "v": mu * noise - std * data,
        "velocity": -slope * x + 0.5 * rate * score,
    }  # of the probability flow, in generation time


@check(
    "eq-2-time-reversal",
    "[2], [7], MATH 5",
    implements=["sdecontrol.generative_sde"],
    controls=["sign of the score flipped", "score taken at T - t", "noise off by 1 %", "half of the score"],
)
def time_reversal(setting: Setting, defect: str) -> Lines:
    """The reversal of dx = a x ds + g dw is dz = (-a z + g^2 score) dt + g dW [2]; with another noise level l,
    -a z + (g^2 + l^2)/2 score: the drift and diffusion of ``generative_sde`` for every schedule, parametrisation
    (noise, sample, score, v, velocity) and level, from a model that is exact for one Gaussian."""
    rng, mean, cov = setting.rng(61), np.array([0.7, -0.4]), np.array([[0.5, 0.2], [0.2, 0.8]])
    x = rng.normal(size=(4, 2))
    size = {"sign of the score flipped": -1.0, "half of the score": 0.5}.get(defect, 1.0)
    for name, (schedule, slope, rate) in FORWARD.items():
        end = schedule.noise_end
        for t in (0.15, 0.6):
            s = end * (1 - t)
            level = end * t if defect.startswith("score taken") else s
            mu, std = (float(f(torch.tensor(s, dtype=torch.float64))) for f in (schedule.mu, schedule.std))
            at = [float(f(torch.tensor(level, dtype=torch.float64))) for f in (schedule.mu, schedule.std)]
            score = -(x - at[0] * mean) @ np.linalg.inv(at[0] ** 2 * cov + at[1] ** 2 * np.eye(2))
            predictions = _as_predictions(x, size * score, mu, std, slope(s), rate(s))
            true = -(x - mu * mean) @ np.linalg.inv(mu**2 * cov + std**2 * np.eye(2))
            for kind, prediction in predictions.items():
                other = 0.6
                for noise, g2 in (("reverse", end * rate(s)), (other, other**2)):
                    model = Frozen(prediction, 1 - s if name == "flow matching" else s)
                    sde = sc.generative_sde(model, schedule, kind, shape=(2,), noise_level=noise)
                    time = torch.tensor(t, dtype=torch.float64)
                    g = float(sde.diffusion(tensor(x), time)) * (1.01 if defect.startswith("noise") else 1.0)
                    want = -end * slope(s) * x + 0.5 * (end * rate(s) + g2) * true
                    yield compare(f"drift, {name}, {kind}, level {noise}, t={t:g}", sde.drift(tensor(x), time), want)
                    yield compare(f"noise level, {name}, {kind}, level {noise}, t={t:g}", g, np.sqrt(g2))


class Frozen(torch.nn.Module):
    """A model that knows its answer for one state batch and one time, and insists on being asked for that time."""

    def __init__(self, answer: np.ndarray, clock: float) -> None:
        super().__init__()
        self.answer, self.clock = tensor(answer), clock

    def forward(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if abs(float(s[0]) - self.clock) > 1e-6:
            return torch.full_like(x, torch.nan)
        return self.answer


@check(
    "marginals-of-the-reversal",
    "[2], Section 9.1",
    implements=["sdecontrol.generative_sde", "sdecontrol.LinearSDE.transition"],
    controls=["data off by 1 %", "noise off by 1 %"],
)
def marginals(setting: Setting, defect: str) -> Lines:
    """The reversal has the marginals of the noising process, X_t = mu X + s eps, for every noise level: for one
    Gaussian the linear SDE that ``generative_sde`` is, started from its own start, is at every t where the noising
    process is."""
    for noise in ("reverse", 0.9, lambda t: 0.5 + t):
        for case in mixture_cases(setting, dims=(1, 2)):
            one = replace(case, weights=np.ones(1), means=case.means[:1], covs=case.covs[:1])
            given = replace(one, means=1.01 * one.means) if defect.startswith("data") else one
            mixture = sc.GaussianMixture(tensor(given.weights), tensor(given.means), tensor(given.covs))
            sde = sc.generative_sde(mixture, schedule=sc.VP(*one.beta), noise_level=noise)
            start = one.joints((0.0,))[0].of(1)
            linear: Any = sde.as_linear()
            law = linear.marginal(0.65, sc.Gaussian(tensor(start.mean), tensor(start.cov)))
            want = one.joints((0.65,))[0].of(1)
            size = 1.01**2 if defect.startswith("noise") else 1.0
            yield compare(
                f"mean at t=0.65, level {noise if isinstance(noise, (str, float)) else 'l(t)'}, d={one.d}",
                law.mean,
                want.mean,
                1e-8,
            )
            yield compare(f"covariance at t=0.65, d={one.d}", size * law.covariance_matrix, want.cov, 1e-8)


@check(
    "eq-4-score-matching",
    "[3], [4], [5], [6], Tweedie",
    implements=["sdecontrol.GaussianMixture.score", "sdecontrol.GaussianMixture.noised"],
    controls=["sign of the score flipped", "data off by 1 %", "mean squared for the slope"],
)
def score_matching(setting: Setting, defect: str) -> Lines:
    """The minimiser of the score-matching losses [4], [5] is E[conditional score | x_t] = grad log q_t: the library's
    mixture score is (mu E[x_0 | x_t] - x)/s^2 with the posterior mean by conditioning, and the gradient of the dense
    log q_t."""
    for case in mixture_cases(setting):
        given = replace(case, means=1.01 * case.means) if defect.startswith("data") else case
        for t in (0.8, 0.3):
            noised = given.sde().marginal(t)
            x = setting.rng(62).normal(size=(4, case.d))
            spent = case.beta[0] * (1 - t) + 0.5 * (case.beta[1] - case.beta[0]) * (1 - t) ** 2
            mu = np.exp(-spent if defect.startswith("mean") else -0.5 * spent)
            want = (mu * case.posterior_mean(t, x) - x) / (1 - np.exp(-spent))
            got = noised.score(tensor(x)) * (-1 if defect.startswith("sign") else 1)
            yield compare(f"score at t={t:g}, d={case.d}", got, want)
            yield compare(
                f"gradient of log q_t, t={t:g}, d={case.d}", got, gradient(lambda y, t=t: case.log_reference(t, y), x)
            )
            yield compare(f"log q_t, t={t:g}, d={case.d}", noised.log_prob(tensor(x)), case.log_reference(t, x))


def _gaussian_model(mean: np.ndarray, cov: np.ndarray, abar: np.ndarray, kind: str) -> Any:
    """The exact model of N(mean, cov) data at the integer levels of a discrete diffusion."""

    def model(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        a = float(abar[int(n.reshape(-1)[0])])
        score = -(x - tensor(np.sqrt(a) * mean)) @ tensor(np.linalg.inv(a * cov + (1 - a) * np.eye(len(mean))))
        data, noise = (x + (1 - a) * score) / np.sqrt(a), -np.sqrt(1 - a) * score
        return {"sample": data, "noise": noise, "v": np.sqrt(a) * noise - np.sqrt(1 - a) * data}[kind]

    return model


@check(
    "discrete-samplers",
    "Section 1.1.1 (DDPM), MATH 5",
    implements=["sdecontrol.diffusion_chain"],
    controls=["noise off by 1 %", "levels one step late", "eta off by 5 %"],
)
def discrete(setting: Setting, defect: str) -> Lines:
    """A DDIM step from abar to the less noisy abar+ has mean sqrt(abar+) x0^ + sqrt(1 - abar+ - eta^2 var) eps^ and
    variance eta^2 var, var the DDPM posterior's; DDPM (eta = 1) draws from q(x+ | x, x0^) of the noising process: the
    law of a simulated step, by its densities, for every parametrisation."""
    abar = np.cumprod(1 - np.linspace(0.01, 0.25, 12))
    mean, cov, late = np.array([0.5, -1.0]), np.array([[0.6, 0.1], [0.1, 0.3]]), int(defect.startswith("levels"))
    for kind, eta in (("noise", 1.0), ("sample", 0.6), ("v", 1.0), ("noise", 0.4)):
        chain = sc.diffusion_chain(
            _gaussian_model(mean, cov, abar, kind), tensor(abar), kind, shape=(2,), eta=eta, steps=12
        )
        problem = sc.ControlProblem(chain, sc.Gaussian(tensor([0.0, 0.0]), 1.0), alpha=1.0, start="fixed")
        paths = sc.simulate(problem, 5, seed=3)
        x, xi, used = paths.states.numpy(), paths.noises.numpy(), eta * (1.05 if defect.startswith("eta") else 1.0)
        model = _gaussian_model(mean, cov, abar, "sample")
        for k in (0, 4, 10):
            n = 11 - k
            a, b = abar[n - late], abar[n - 1 - late] if n - 1 - late >= 0 else abar[0]
            data = model(tensor(x[k]), torch.tensor([n])).numpy()
            eps = (x[k] - np.sqrt(a) * data) / np.sqrt(1 - a)
            variance = used**2 * (1 - b) / (1 - a) * (1 - a / b)
            size = 1.01 if defect.startswith("noise") else 1.0
            want = np.sqrt(b) * data + np.sqrt(1 - b - variance) * eps + size * np.sqrt(variance) * xi[k]
            yield compare(f"step {k}, {kind}, eta={eta:g}", x[k + 1], want)
            if eta == 1.0:  # the posterior of x+ given x and x0, by conditioning the joint noising law from x0
                for row in range(2):
                    law = path_law(
                        np.sqrt(b) * data[row],
                        (1 - b) * np.eye(2),
                        [(np.sqrt(a / b) * np.eye(2), np.zeros(2), np.sqrt(1 - a / b) * np.eye(2))],
                    )
                    M, shift, Q = law.regression([0], [1])
                    drawn = M @ x[k, row] + shift + size * np.sqrt(Q[0, 0]) * xi[k, row]
                    yield compare(f"DDPM posterior, step {k}, {kind}", x[k + 1, row], drawn)


@check(
    "ddpm-is-euler",
    "[7] and DDPM",
    kind="continuous",
    implements=["sdecontrol.diffusion_chain"],
    controls=["noise level off by 1 %", "score left out of [7]"],
)
def ddpm_is_euler(setting: Setting, defect: str) -> Lines:
    """With alpha_t = 1 - dt the DDPM step [Section 1.1.1] agrees with the Euler step [7] of the reversal to O(dt^2):
    the library's discrete chain against x + (x/2 + score) dt."""
    mean, cov, x = np.array([0.8]), np.array([[0.4]]), tensor([[0.3], [-1.2]])
    sizes, errors = [0.1, 0.05, 0.025, 0.0125], []
    for dt in sizes:
        abar = (1 - dt) ** np.arange(1, int(1.0 / dt) + 2)
        chain = sc.diffusion_chain(
            _gaussian_model(mean, cov, abar, "noise"), tensor(abar), "noise", shape=(1,), steps=len(abar)
        )
        problem = sc.ControlProblem(chain, sc.Gaussian(tensor([0.0]), 1.0), start="fixed")
        k = round(0.4 / dt)
        noise = torch.zeros(chain.steps, 2, 1, dtype=torch.float64)
        got = sc.simulate(problem, 2, noise=noise, state=x, step=k).states[1]
        a = abar[len(abar) - 1 - k]
        score = -(x - np.sqrt(a) * mean[0]) / (a * cov[0, 0] + (1 - a) * (1.01 if defect.startswith("noise") else 1.0))
        want = x + (0.5 * x + score * (0.0 if defect.startswith("score") else 1.0)) * dt
        errors.append(float((got - want).abs().max()))
    yield order("one step of DDPM against [7]", sizes, errors, 2.0)


@check(
    "linear-transitions",
    "MATH 8",
    implements=[
        "sdecontrol.LinearSDE.transition",
        "sdecontrol.LinearSDE.marginal",
        "sdecontrol.OrnsteinUhlenbeck",
        "sdecontrol.BrownianMotion",
    ],
    controls=["drift transposed", "noise off by 1 %", "offset left out", "drift off by 1 %"],
)
def transitions(setting: Setting, defect: str) -> Lines:
    """X_t | X_s is Gaussian with matrix e^{(t-s)A}, shift and covariance by quadrature of the matrix exponential; the
    transition by an ODE, for coefficients that are functions of time, says the same; so do Brownian motion and
    Ornstein-Uhlenbeck."""
    for case in linear_cases(setting, scheme="exact"):
        given, (s, t) = spoil(case, defect), case.grid[1:3]
        M, b, C = case.steps()[1]
        varying = sc.LinearSDE(
            lambda _, A=given.A: tensor(A), tensor(given.sigma), tensor(given.offset), horizon=case.grid[-1]
        )
        for how, sde in (("exponential", given.sde()), ("ODE", varying)):
            law = sde.transition(s, t)
            for name, got, want in (
                ("matrix", law.matrix, M),
                ("shift", law.shift, b),
                ("covariance", law.covariance, C @ C.T),
            ):
                yield compare(f"{name} by the {how}, d={case.d}", got, want)
        end = given.sde().marginal(case.grid[-1], sc.Gaussian(tensor(case.mean), tensor(case.cov)))
        yield compare(f"marginal at T, d={case.d}", end.covariance_matrix, case.reference().of(-1).cov)
    size = 1.01 if defect.startswith(("noise", "drift")) else 1.0
    ou = sc.OrnsteinUhlenbeck(2, rate=0.7 * size, sigma=0.5, mean=tensor([1.0, -1.0])).transition(0.2, 0.9)
    decay = np.exp(-0.49)
    yield compare("Ornstein-Uhlenbeck: shift", ou.shift, (1 - decay) * np.array([1.0, -1.0]))
    yield compare("Ornstein-Uhlenbeck: covariance", ou.covariance, 0.25 * (1 - decay**2) / 1.4 * np.eye(2))
    yield compare(
        "Brownian motion: covariance",
        sc.BrownianMotion(3, sigma=2.0 * size).transition(0.25, 0.75).covariance,
        2 * np.eye(3),
    )


@check(
    "doob-h-transform",
    "[41], [43], [45]",
    implements=["sdecontrol.LinearSDE.conditioned_drift", "sdecontrol.LinearSDE.bridge"],
    controls=["noise off by 1 %", "drift off by 1 %", "h-transform left out", "offset left out"],
)
def doob(setting: Setting, defect: str) -> Lines:
    """Conditioned on its end, X_T = y, a process has the drift b + sigma sigma^T grad_x log p(y | x) (Doob); for
    Brownian motion (y - x)/(T - t) [43]. And X_t given both ends is the regression in the dense law of (X_t, X_T) from
    x."""
    for case in linear_cases(setting, scheme="exact"):
        sde, (k, t) = spoil(case, defect).sde(), (1, case.grid[1])
        x, y = setting.rng(63).normal(size=(2, 3, case.d))
        later = [case.reference(k, row).of(-1) for row in x]
        flow = np.stack(
            [case.reference(k, e).of(-1).mean - case.reference(k, 0 * e).of(-1).mean for e in np.eye(case.d)]
        ).T
        pull = np.stack([np.linalg.solve(law.cov, end - law.mean) for law, end in zip(later, y)]) @ flow
        drift = (
            x @ case.A.T
            + case.offset
            + (0.0 if defect.startswith("h-transform") else 1.0) * pull @ case.sigma @ case.sigma.T
        )
        yield compare(f"conditioned drift, d={case.d}", sde.conditioned_drift(tensor(x), t, tensor(y)), drift)
        for row, end in zip(x, y):
            joint = case.reference(0, row)
            M, b, Q = joint.of(k, case.K).regression([0], [1])
            law = sde.bridge(t, tensor(row), tensor(end))
            yield compare(f"bridge mean, d={case.d}", law.mean, M @ end + b)
            yield compare(f"bridge covariance, d={case.d}", law.covariance_matrix, Q)
    walk = sc.BrownianMotion(
        2, sigma=torch.eye(2, dtype=torch.float64) * (1.01 if defect.startswith("noise") else 1.0), horizon=2.0
    )
    got = walk.conditioned_drift(tensor([[0.3, 1.0]]), 0.5, tensor([[1.0, -1.0]]))
    yield compare("Brownian bridge [43]", got, np.array([[0.7, -2.0]]) / (2.0 if defect.startswith("h-") else 1.5))


@check(
    "table-2-divergences",
    "Table 2, [39], [40], [42], [44], [45]",
    implements=["sdecontrol.LinearSDE.conditioned_drift"],
    controls=["weight sigma_t^2 in place of 1/2", "weight 1", "drift at the right end"],
)
def table_2(setting: Setting, defect: str) -> Lines:
    """Bridge (flow) training minimises KL(Q_doob || P_theta): for every affine model s it is E[h |g^{x_0}(z,t) -
    s(z,t)|^2 / 2] summed over steps plus a constant, g the library's conditioned drift [43], [45]; so differences
    between two models agree with dense KL divergences. The same for the time reversal and the score loss [39], [40]:
    weight 1/2."""
    d, K = 2, 5
    rng, h = setting.rng(64), 1 / K
    data, sde = (
        Joint(np.array([1.0, -0.5]), np.array([[0.4, 0.1], [0.1, 0.6]]), d),
        sc.BrownianMotion(d, sigma=torch.eye(d, dtype=torch.float64)),
    )
    start = np.zeros(d)
    free = path_law(start, np.zeros((d, d)), [(np.eye(d), np.zeros(d), np.sqrt(h) * np.eye(d))] * K)
    M, b, Q = free.regression(range(K), [K])
    whole = np.concatenate([M, np.eye(d)])
    doob = Joint(np.concatenate([b, start]) + whole @ data.mean, np.pad(Q, (0, d)) + whole @ data.cov @ whole.T, d)
    losses, kls = [], []
    for _ in range(2):
        U, w = 0.5 * rng.normal(size=(K, d, d)), rng.normal(size=(K, d))
        model = path_law(
            start, np.zeros((d, d)), [(np.eye(d) + h * u, h * c, np.sqrt(h) * np.eye(d)) for u, c in zip(U, w)]
        )
        after = tuple(range(1, K + 1))
        kls.append(gaussian_kl(doob.of(*after), model.of(*after)))
        losses.append(sum(_matching_loss(sde, doob, k, U[k], w[k], h, defect) for k in range(K)))
    yield compare("difference of two models' losses and KLs", losses[0] - losses[1], kls[0] - kls[1])


def _matching_loss(sde: sc.LinearSDE, law: Joint, k: int, U: np.ndarray, w: np.ndarray, h: float, defect: str) -> float:
    """``weight h E|g^{x_K}(x_k, t_k) - (U x_k + w)|^2``, x_k and x_K from ``law``."""
    d, t = law.d, k * h + (0.5 * h if defect.startswith("drift at") else 0.0)
    g, c = affine_map(lambda z: sde.conditioned_drift(z[:, :d], t, z[:, d:]), 2 * d)
    pair = law.of(k, -1)
    A, a = g - np.pad(U, ((0, 0), (0, d))), c - w
    weight = {"weight sigma_t^2 in place of 1/2": (k + 1) * h, "weight 1": 1.0}.get(defect, 0.5)
    return weight * h * float(np.trace(A @ pair.cov @ A.T) + ((A @ pair.mean + a) ** 2).sum())


@check(
    "laws",
    "[10], MATH 8",
    implements=[
        "sdecontrol.Gaussian",
        "sdecontrol.GaussianMixture",
        "sdecontrol.Quadratic",
        "sdecontrol.Linear",
        "sdecontrol.QuadraticCost",
    ],
    controls=["covariance off by 1 %", "factor 1/2 of the quadratic dropped"],
)
def laws(setting: Setting, defect: str) -> Lines:
    """Densities of Gaussians and mixtures, their moments, and r(x) = -x'Gx/2 + g'x, f(x, t) = x'Fx/2 are what they
    say."""
    rng, size = setting.rng(65), 1.01 if defect.startswith("covariance") else 1.0
    for case in mixture_cases(setting):
        x, half = rng.normal(size=(5, case.d)), 1.0 if defect.startswith("factor") else 0.5
        parts = [Joint(m, C, case.d) for m, C in zip(case.means, case.covs)]
        mixture = sc.GaussianMixture(tensor(case.weights), tensor(case.means), tensor(size * case.covs))
        yield compare(
            f"log density of a mixture, d={case.d}",
            mixture.log_prob(tensor(x)),
            mixture_log_density(x, np.log(case.weights), parts),
        )
        law = sc.Gaussian(tensor(case.means[0]), tensor(size * case.covs[0]))
        yield compare(f"log density of a Gaussian, d={case.d}", law.log_prob(tensor(x)), parts[0].log_prob(x))
        mean = case.weights @ case.means
        second = sum(w * (C + np.outer(m, m)) for w, m, C in zip(case.weights, case.means, case.covs)) - np.outer(
            mean, mean
        )
        yield compare(f"covariance of a mixture, d={case.d}", mixture.covariance_matrix, second)
        G = case.covs[0]
        want = -half * np.einsum("ni,ij,nj->n", x, G, x) + x @ case.g
        yield compare(f"quadratic reward, d={case.d}", sc.Quadratic(tensor(G), tensor(case.g))(tensor(x)), want)
        yield compare(f"linear reward, d={case.d}", sc.Linear(tensor(case.g))(tensor(x)), x @ case.g)
        cost = sc.QuadraticCost(lambda t, G=G: (1 + t) * tensor(G))(tensor(x), torch.tensor(0.5, dtype=torch.float64))
        yield compare(f"running cost, d={case.d}", cost, 1.5 * half * np.einsum("ni,ij,nj->n", x, G, x))


@check(
    "memory-of-the-start",
    "MATH 1: memoryless references",
    implements=["sdecontrol.ControlProblem", "sdecontrol.generative_sde"],
    controls=["noise off by 1 %", "drift off by 1 %"],
)
def memory(setting: Setting, defect: str) -> Lines:
    """A reference is memoryless if X_0 and X_T are independent; what is left is the largest canonical correlation of
    the two in the dense law, and for the reversal of a noising process, with unit-variance data, mu at the noise
    end."""
    for case in linear_cases(setting, scheme="exact", start="fixed"):
        law = case.reference().of(0, case.K)
        roots = [np.linalg.cholesky(law.of(k).cov) for k in (0, 1)]
        cross = law.cov[: case.d, case.d :]
        canonical = np.linalg.solve(roots[1], np.linalg.solve(roots[0], cross).T)
        yield compare(f"memory, d={case.d}", spoil(case, defect).problem().memory, np.linalg.norm(canonical, 2))
    size = 1.02 if defect.startswith("noise") else 1.0
    mixture = sc.GaussianMixture(tensor([1.0]), tensor([[0.0]]), 1.0)
    sde: Any = sc.generative_sde(mixture, schedule=sc.VP(0.5 * size, 2.0 * size))
    yield compare("memory of a VP reversal", sde.memory, np.exp(-0.625), 1e-7)


@check(
    "mixture-start",
    "MATH 1: the initial law",
    implements=["sdecontrol.ControlProblem", "sdecontrol.simulate"],
    controls=["data off by 1 %", "Brownian motion in place of the Foellmer process"],
)
def mixture_start(setting: Setting, defect: str) -> Lines:
    """The start of a mixture reference is a mixture: the learned start before it is the Foellmer process, Brownian
    motion conditioned to end in it, with drift (E[X_0 | X_s = x] - x)/(-s): a noiseless step of the library against the
    dense posterior."""
    for case in mixture_cases(setting):
        given = replace(case, means=1.01 * case.means) if defect.startswith("data") else case
        problem = sc.ControlProblem(given.sde(), reward=sc.Linear(tensor(case.g)), start="controlled")
        x, steps, K = setting.rng(66).normal(size=(4, case.d)), 5, 4
        for k in (1, 3):
            s, h = -1 + k / steps, 1 / steps
            joints = case.joints((0.0, s))
            logs = np.stack([np.log(w) + j.of(2).log_prob(x) for w, j in zip(case.weights, joints)], -1)
            shares = np.exp(logs) / np.exp(logs).sum(-1, keepdims=True)
            means = np.stack([x @ M.T + b for M, b, _ in (j.regression([1], [2]) for j in joints)], -1)
            drift = ((shares[:, None] * means).sum(-1) - x) / -s
            paths = sc.simulate(
                problem,
                4,
                time_steps=K,
                state=tensor(x),
                step=k,
                noise=torch.zeros(steps + K, 4, case.d, dtype=torch.float64),
            )
            want = x + (0.0 if defect.startswith("Brownian") else h) * drift
            yield compare(f"step from s={s:g}, d={case.d}", paths.states[1], want, 1e-8)


@check(
    "predictions-and-limits",
    "Section 1.1.1; Saharia et al. 2205.11487: thresholding",
    implements=[
        "sdecontrol.chains.diffusion.DiffusionChain",
        "sdecontrol.chains.diffusion.Thresholding",
    ],
    controls=["limit off by 5 %", "noise off by 1 %", "prediction off by 1 %"],
)
def predictions(setting: Setting, defect: str) -> Lines:
    """A step of a discrete sampler towards another prediction is a shift by the difference of the means over the noise,
    whatever is predicted, with x0^ clipped, thresholded at a quantile, or as it is, and with eps^ of the limited x0^ or
    the model's own; and from a shift comes the prediction that makes it, where one does."""
    rng = setting.rng(204)
    abar = np.cumprod(1 - np.linspace(0.01, 0.25, 8))
    x, own, other = (rng.normal(size=(5, 2)) for _ in range(3))
    size = 1.01 if defect.startswith("prediction") else 1.0
    quantile = lambda v: np.clip(np.quantile(np.abs(v), 0.9, axis=1, keepdims=True), 1.0, 1.5)  # noqa: E731
    limits: tuple[tuple[str, Any, Any], ...] = (
        ("no limit", None, lambda v: v),
        ("a clip", 0.8 * (1.05 if defect.startswith("limit") else 1.0), lambda v: np.clip(v, -0.8, 0.8)),
        ("a threshold", Thresholding(0.9, 1.5), lambda v: np.clip(v, -quantile(v), quantile(v)) / quantile(v)),
    )
    a, b = abar[::-1][:-1], abar[::-1][1:]
    var = 0.49 * (1 - b) / (1 - a) * (1 - a / b)
    noise = np.sqrt(var) * (1.01 if defect.startswith("noise") else 1.0)
    to_data, to_noise = np.append(np.sqrt(b), 1.0), np.append(np.sqrt(1 - b - var), 0.0)
    lists = (np.sqrt(abar[::-1]), np.sqrt(1 - abar[::-1]), to_data, to_noise, noise)
    steps = SamplerSteps(list(range(7, -1, -1)), *(list(map(float, v)) for v in lists))
    k = 3
    mu, std = math.sqrt(abar[7 - k]), math.sqrt(1 - abar[7 - k])
    for kind in ("sample", "noise", "v"):
        to_x0 = {
            "sample": lambda p: p,
            "noise": lambda p: (x - std * p) / mu,
            "v": lambda p: mu * x - std * p,
        }[kind]
        for name, limit, limited in limits:
            for of_limited in (True, False):
                model = lambda y, n: size * tensor(own)  # noqa: E731
                chain = DiffusionChain(model, steps, kind, (2,), tensor(0.0), limit, of_limited)

                def mean(p: np.ndarray) -> np.ndarray:
                    raw = to_x0(p)
                    x0 = limited(raw)
                    eps = (x - mu * (x0 if of_limited or limit is None else raw)) / std
                    return math.sqrt(b[k]) * x0 + math.sqrt(1 - b[k] - var[k]) * eps

                label = f"{kind}, {name}, eps^ {'of the limited x0^' if of_limited else 'its own'}"
                c = (mean(other) - mean(own)) / math.sqrt(var[k])
                got = chain.shift_towards(k, tensor(x), tensor(other))
                yield compare(f"shift, {label}", got, c)
                if name == "no limit":
                    yield compare(f"change, {label}", chain.change_at(k, tensor(x), got), other - own)
                elif name == "a clip":
                    back = chain.change_at(k, tensor(x), got).numpy() + own
                    yield compare(f"mean by the change, {label}", mean(back), mean(other), 1e-8)


@check(
    "schedules-of-masks",
    "MATH 11: masked diffusion",
    implements=["sdecontrol.chains.masked.MaskSchedule"],
    controls=["another schedule", "inverse of the next time"],
)
def masks(setting: Setting, defect: str) -> Lines:
    """The share of tokens that are kept at a noising time is 1 - s, 1 - cos((1 - s) pi/2), or any function that falls
    from 1 to 0, and the time at which a share is kept is its inverse, by bisection where it is a user's own."""
    s = np.linspace(0.05, 0.95, 7)
    late = 0.01 if defect.startswith("inverse") else 0.0
    ways: dict[str, tuple[Any, np.ndarray]] = {
        "linear": ("linear", 1 - s),
        "cosine": ("cosine", 1 - np.cos(0.5 * math.pi * (1 - s))),
        "a user's": (lambda t: (1 - t) ** 3, (1 - s) ** 3),
    }
    for name, (kind, want) in ways.items():
        schedule = MaskSchedule("linear" if defect.startswith("another") else kind)
        yield compare(f"share kept, {name}", schedule.kept(tensor(s)), want)
        yield compare(f"time of a share, {name}", schedule.time(tensor(want)), s + late, 1e-9)
