"""Section 4 of the tutorial on linear-Gaussian chains: exact at every step size, to rounding.

On the left of every comparison stands the library; on the right a dense Gaussian law of the whole path. Chains have a
controlled start, so that their first "step" is the choice of the start, as in the tutorial.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..cases import ChainAnswers, LinearCase, linear_cases, spoil, tensor
from ..gaussian import Joint, gaussian_kl, log_density, path_law
from ..registry import Measurement, Setting, check, compare, within

EXACT = "sdecontrol.exact_solution"
Lines = Iterator[Measurement]


def tweedie_value(case: LinearCase, k: int, x: np.ndarray) -> np.ndarray:
    """``r(E[x_K | x_k = x])``, what [31] puts in the value's place."""
    origin = case.reference(k, np.zeros(case.d)).of(-1).mean
    flow = np.stack([case.reference(k, e).of(-1).mean - origin for e in np.eye(case.d)])
    means = origin + x @ flow
    return -0.5 * np.einsum("ni,ij,nj->n", means, case.G, means) + means @ case.g


def _value(answers: ChainAnswers, defect: str, k: int, x: np.ndarray) -> np.ndarray:
    """The library's value at step k, or what a negative control puts in its place."""
    return tweedie_value(answers.case, k, x) if defect == "Tweedie's value" else answers.value(k, x)


@check(
    "eq-10-target",
    "[9], [10]",
    implements=[f"{EXACT}.log_z", f"{EXACT}.sample"],
    controls=["alpha off by 5 %", "sign of g flipped"],
)
def target(setting: Setting, defect: str) -> Lines:
    """The law p_r = exp(r/alpha) p_pre / Z maximises E_q[r] - alpha KL(q || p_pre) [9], and the maximum is alpha log Z:
    the end law of the library's optimum attains it, and every other Gaussian tried stays below by alpha KL(q ||
    p_r)."""
    rng = setting.rng(1)
    for case in linear_cases(setting):
        end = case.reference().of(-1)
        P, q = case.G / case.alpha, case.g / case.alpha
        target, log_z = end.tilted(P, q)
        mean, cov = spoil(case, defect).chain().marginal(case.K)
        for name, law in (
            ("p_r", Joint(mean, cov, case.d)),
            ("another law", Joint(rng.normal(size=case.d), 0.8 * cov, case.d)),
        ):
            objective = law.expect_quadratic(P, q) - gaussian_kl(law, end)
            short = gaussian_kl(law, target) if name != "p_r" else 0.0
            yield compare(f"E r/alpha - KL of {name}, d={case.d}", objective, log_z - short)


@check(
    "eq-20-soft-bellman",
    "[20], [16], [17]",
    implements=[f"{EXACT}.value"],
    controls=["alpha off by 5 %", "noise off by 1 %", "running cost left out", "Tweedie's value"],
)
def soft_bellman(setting: Setting, defect: str) -> Lines:
    """exp(v_k(x)/alpha) = exp(-h f(x)/alpha) E_pre[exp(v_{k+1}(x_{k+1})/alpha) | x_k = x], with v_K = r: the library's
    values at one step and the next, the expectation by a Gaussian integral of the fitted quadratic v_{k+1}."""
    for case in (*linear_cases(setting), *linear_cases(setting, cost=True)):
        d, a, answers = case.d, case.alpha, spoil(case, defect).chain()
        for k in range(case.K):
            x = case.points(setting.rng(2))
            P, q, c = _quadratic(lambda y, k=k: _value(answers, defect, k + 1, y) / a, d)
            want = []
            for row in x:
                _, log_mean = case.reference(k, row).of(1).tilted(P, q)
                cost = 0.0 if case.F is None else case.h[k] * case.cost(case.grid[k], row[None])[0]
                want.append(a * (log_mean + c) - cost)
            yield compare(
                f"v_{k}, d={d}{', running cost' if case.F is not None else ''}", _value(answers, defect, k, x), want
            )
        yield compare(
            f"v_K = r, d={d}",
            _value(answers, defect, case.K, x),
            -0.5 * np.einsum("ni,ij,nj->n", x, case.G, x) + x @ case.g,
        )


def _quadratic(f, d: int) -> tuple[np.ndarray, np.ndarray, float]:
    """``(P, q, c)`` of a quadratic function ``-x'Px/2 + q'x + c``, from its values."""
    unit = np.eye(d)
    centre = f(np.zeros((1, d)))[0]
    plus, minus = f(unit) - centre, f(-unit) - centre
    P = -np.array([[f((unit[i] + unit[j])[None])[0] - centre - plus[i] - plus[j] for j in range(d)] for i in range(d)])
    P[np.diag_indices(d)] = -(plus + minus)
    return P, 0.5 * (plus - minus), float(centre)


@check(
    "eq-19-optimal-kernel",
    "[13], [14], [15], [19]",
    implements=[f"{EXACT}.kernel"],
    controls=["alpha off by 5 %", "noise off by 1 %", "drift off by 1 %", "reference's covariance kept"],
)
def optimal_kernel(setting: Setting, defect: str) -> Lines:
    """The soft-optimal kernel is p*(y|x) = exp(v_{k+1}(y)/alpha) p_pre(y|x) / exp(v_k(x)/alpha): the library's kernel
    against the conditional law of x_{k+1} given x_k in the dense tilted path law, running cost included."""
    for case in (*linear_cases(setting), *linear_cases(setting, cost=True)):
        best, _ = case.optimum()
        answers = spoil(case, defect).chain()
        for k in range(case.K):
            M, b, Q = best.regression([k + 1], [k])
            got_M, got_b, root = answers.kernel(k)
            cov = (
                root @ root.T if defect != "reference's covariance kept" else case.steps()[k][2] @ case.steps()[k][2].T
            )
            for name, got, want in (("slope", got_M, M), ("offset", got_b, b), ("covariance", cov, Q)):
                yield compare(f"{name} of p* at step {k}, d={case.d}", got, want)


@check(
    "value-definition",
    "Section 4.1",
    implements=[f"{EXACT}.value", f"{EXACT}.kernel"],
    controls=["alpha off by 5 %", "last step left out", "sign of the KL flipped"],
)
def value_definition(setting: Setting, defect: str) -> Lines:
    """The soft value is the best objective still to be had: v_k(x) = E_{p*}[R_k - alpha sum_{j>=k} KL(p*_j || p_pre_j)
    | x_k = x], with the library's kernels put in for p*."""
    for case in linear_cases(setting, cost=True):
        answers = spoil(case, defect).chain()
        last = case.K - 1 if defect == "last step left out" else case.K
        for x in case.points(setting.rng(3), 2):
            point = np.zeros((case.d, case.d))
            reference = case.reference(0, x)
            best = path_law(x, point, [answers.kernel(k) for k in range(case.K)])
            total = case.alpha * best.expect_quadratic(*case.total_reward())
            kl = gaussian_kl(best.of(*range(1, last + 1)), reference.of(*range(1, last + 1)))
            sign = 1.0 if defect == "sign of the KL flipped" else -1.0
            yield compare(f"v_0, d={case.d}", answers.value(0, x[None])[0], total + sign * case.alpha * kl)


@check(
    "theorem-1-chain",
    "Theorem 1",
    implements=[f"{EXACT}.kernel", f"{EXACT}.initial", f"{EXACT}.marginal"],
    controls=[
        "start left fixed",
        "alpha off by 5 %",
        "last step left out",
        "noise off by 1 %",
        "sign of g flipped",
        "drift transposed",
    ],
)
def theorem_1(setting: Setting, defect: str) -> Lines:
    """Running the soft-optimal kernels from the optimal start gives x_K the law p_r = exp(r/alpha) p_pre / Z. The
    library's own kernels are composed step by step; its ``marginal`` and ``log_z`` must say the same."""
    for scheme in ("euler", "exact"):
        for case in linear_cases(setting, scheme=scheme):
            p_r, log_z = case.reference().of(-1).tilted(case.G / case.alpha, case.g / case.alpha)
            answers = spoil(case, defect).chain()
            end = answers.induced(case.K - 1 if defect == "last step left out" else None).of(-1)
            mean, cov = answers.marginal(case.K)
            label = f"d={case.d}, {scheme}"
            yield compare(f"mean of x_K by the kernels, {label}", end.mean, p_r.mean)
            yield compare(f"covariance of x_K by the kernels, {label}", end.cov, p_r.cov)
            yield compare(f"mean of marginal(T), {label}", mean, p_r.mean)
            yield compare(f"covariance of marginal(T), {label}", cov, p_r.cov)
            yield compare(f"log Z, {label}", float(answers.exact.log_z), log_z)


@check(
    "theorem-2-chain",
    "Theorem 2",
    implements=[f"{EXACT}.value", f"{EXACT}.marginal", f"{EXACT}.log_z"],
    controls=[
        "start left fixed",
        "alpha off by 5 %",
        "Tweedie's value",
        "noise off by 1 %",
        "alpha missing in the value",
    ],
)
def theorem_2(setting: Setting, defect: str) -> Lines:
    """Every marginal of the optimum is p*_t(x) = exp(v_t(x)/alpha) p_pre_t(x) / C with one and the same C at every t,
    and C = Z: the library's marginal against its value and the reference's marginal, pointwise."""
    for case in linear_cases(setting):
        answers, reference = spoil(case, defect).chain(), case.reference()
        alpha = 1.0 if defect == "alpha missing in the value" else case.alpha
        _, log_z = case.optimum()
        for k in range(case.K + 1):
            x = case.points(setting.rng(4))
            log_ratio = log_density(x, *answers.marginal(k)) - reference.of(k).log_prob(x)
            log_c = _value(answers, defect, k, x) / alpha - log_ratio
            yield compare(f"log C at step {k}, d={case.d}", log_c, np.full(len(x), log_z))


@check(
    "theorem-3-chain",
    "Theorem 3",
    implements=[f"{EXACT}.bridge", f"{EXACT}.kernel"],
    controls=["start left fixed", "noise off by 1 %", "drift off by 1 %", "offset left out"],
)
def theorem_3(setting: Setting, defect: str) -> Lines:
    """The backward conditionals of the optimum are those of the reference, p*(x_s | x_t) = p_pre(x_s | x_t), for
    adjacent and for distant times: the library's bridges, and the conditionals of the path law that its kernels
    induce."""
    for case in linear_cases(setting):
        answers, reference = spoil(case, defect).chain(), case.reference()
        induced = answers.induced()
        for j, k in [(k - 1, k) for k in range(1, case.K + 1)] + [(0, case.K), (1, case.K)]:
            M, b, Q = reference.regression([j], [k])
            for how, parts in (("bridge", answers.bridge(j, k)), ("kernels", induced.regression([j], [k]))):
                for name, got, want in zip(("slope", "offset", "covariance"), parts, (M, b, Q)):
                    yield compare(f"{name} of x_{j} | x_{k} by the {how}, d={case.d}", got, want)


@check(
    "theorems-need-f-zero",
    "MATH 1: f = 0",
    implements=[f"{EXACT}.marginal", f"{EXACT}.value", f"{EXACT}.bridge"],
    controls=["running cost left out", "alpha off by 5 %"],
)
def with_running_cost(setting: Setting, defect: str) -> Lines:
    """With a running cost the optimum is Q_fine with dQ_fine/dQ0 = exp(R/alpha)/Z on whole paths: marginals, bridges,
    value and log Z are those of the dense tilted path law (and no longer those of Theorems 1 to 3)."""
    for case in (*linear_cases(setting, cost=True), *linear_cases(setting, cost=True, scheme="exact")):
        answers = spoil(case, defect).chain()
        best, log_z = case.optimum()
        yield compare(f"log Z, d={case.d}", float(answers.exact.log_z), log_z)
        x = case.points(setting.rng(5))
        for k in range(case.K + 1):
            mean, cov = answers.marginal(k)
            yield compare(f"mean at step {k}, d={case.d}", mean, best.of(k).mean)
            yield compare(f"covariance at step {k}, d={case.d}", cov, best.of(k).cov)
            if k < case.K:
                yield compare(f"v_{k}, d={case.d}", answers.value(k, x), case.value(k, x))
        for name, got, want in zip(
            ("slope", "offset", "covariance"), answers.bridge(0, case.K), best.regression([0], [case.K])
        ):
            yield compare(f"{name} of x_0 | x_K, d={case.d}", got, want)


@check(
    "controlled-start",
    "MATH 1: the initial law",
    implements=["sdecontrol.ControlProblem", f"{EXACT}.kernel", f"{EXACT}.initial"],
    controls=["start left fixed", "alpha off by 5 %", "covariance of the start off by 1 %"],
)
def controlled_start(setting: Setting, defect: str) -> Lines:
    """A Gaussian start N(m, S) is the end of a Brownian motion of covariance S run for a time of 1 from m. Controlling
    it there turns the start into steps of the chain: the optimal start is nu* = exp(v_0/alpha) nu / Z, reached through
    the learned start's own soft-optimal kernels, and log Z is that of a chain that begins in the point m."""
    for case in linear_cases(setting, cost=True):
        given = replace(case, cov=1.01 * case.cov) if defect.startswith("covariance") else spoil(case, defect)
        answers = given.chain()
        best, log_z = case.optimum()
        yield compare(f"log Z, d={case.d}", float(answers.exact.log_z), log_z)
        if answers.before == 0:
            mean, cov = answers.exact.initial.mean.numpy(), answers.exact.initial.covariance_matrix.numpy()
        else:
            kernels = [answers.kernel(k) for k in range(-answers.before, 0)]
            start = path_law(case.mean, np.zeros((case.d, case.d)), kernels).of(-1)
            mean, cov = start.mean, start.cov
        yield compare(f"mean of nu*, d={case.d}", mean, best.of(0).mean)
        yield compare(f"covariance of nu*, d={case.d}", cov, best.of(0).cov)
        initial = answers.exact.initial
        yield compare(f"`initial`, d={case.d}", initial.covariance_matrix.numpy(), best.of(0).cov)


@check(
    "fixed-start-bias",
    "MATH 1: the initial law",
    implements=[f"{EXACT}.marginal", f"{EXACT}.start_log_z"],
    controls=["called p_r all the same", "alpha off by 5 %"],
)
def fixed_start(setting: Setting, defect: str) -> Lines:
    """Where the start is left fixed and is not forgotten, the optimum's end law is not p_r but
    p_pre(x) exp(r/alpha) E[exp(-v_0(X_0)/alpha) | X_T = x]: nu(x_0) times the tilted conditional path law. The best
    ELBO is E_nu[v_0]/alpha < log Z."""
    for case in linear_cases(setting, start="fixed"):
        best, log_z = case.optimum()
        M, b, Q = best.regression([case.K], [0])
        mean, cov = M @ case.mean + b, M @ case.cov @ M.T + Q
        if defect == "called p_r all the same":
            mean, cov = best.of(-1).mean, best.of(-1).cov
        answers = spoil(case, defect).chain()
        got_mean, got_cov = answers.marginal(case.K)
        yield compare(f"mean of X_T, d={case.d}", got_mean, mean)
        yield compare(f"covariance of X_T, d={case.d}", got_cov, cov)
        induced = answers.induced().of(-1)
        yield compare(f"covariance of X_T by the kernels, d={case.d}", induced.cov, cov)
        top = log_z - gaussian_kl(Joint(case.mean, case.cov, case.d), best.of(0))
        yield compare(f"largest ELBO, d={case.d}", float(answers.exact.start_log_z), top)


@check(
    "lemma-1-value-weighted-mle",
    "Lemma 1",
    implements=[f"{EXACT}.kernel", f"{EXACT}.value"],
    controls=["alpha off by 5 %", "weights left out", "Tweedie's value"],
)
def lemma_1(setting: Setting, defect: str) -> Lines:
    """p*_t = argmax_p E_{x ~ u, y ~ p_pre(.|x)}[exp(v_{t-1}(y)/alpha) log p(y|x)]: weighted maximum likelihood over
    Gaussian regressions, with a roll-in law u of one's own and the library's value in the weights, gives the library's
    kernel."""
    rng = setting.rng(6)
    for case in linear_cases(setting):
        answers = spoil(case, defect).chain()
        for k in range(case.K):
            roll_in = path_law(rng.normal(size=case.d), 0.5 * np.eye(case.d), case.steps()[k : k + 1])
            P, q, _ = _quadratic(lambda y, k=k: _value(answers, defect, k + 1, y) / case.alpha, case.d)
            on = 0.0 if defect == "weights left out" else 1.0
            weighted, _ = roll_in.tilted(on * np.kron(np.diag([0, 1]), P), on * np.concatenate([0 * q, q]))
            M, b, root = answers.kernel(k)
            for name, got, want in zip(
                ("slope", "offset", "covariance"), weighted.regression([1], [0]), (M, b, root @ root.T)
            ):
                yield compare(f"{name} of the regression at step {k}, d={case.d}", got, want)


@check(
    "lemma-2-value",
    "Lemma 2, [23], [30]",
    implements=[f"{EXACT}.value"],
    controls=["alpha off by 5 %", "Tweedie's value", "noise off by 1 %", "drift off by 1 %", "last step left out"],
)
def lemma_2(setting: Setting, defect: str) -> Lines:
    """exp(v_t(x)/alpha) = E_pre[exp(r(x_0)/alpha) | x_t = x], with a running cost inside the exponential where there is
    one: the library's value against the normalising constant of the dense path law from the point x, fewer noises than
    states included."""
    for case in _and_degenerate(setting):
        answers = spoil(case, defect).chain()
        for k in range(case.K):
            x = case.points(setting.rng(7))
            at = k + 1 if defect == "last step left out" else k
            yield compare(f"v_{k}, d={case.d}, m={case.m}", _value(answers, defect, at, x), case.value(k, x))


def _and_degenerate(setting: Setting) -> Iterator[LinearCase]:
    """The usual cases, and one whose noise does not reach every direction of the state."""
    yield from linear_cases(setting)
    yield from linear_cases(setting, cost=True)
    for case in linear_cases(setting, dims=(3,), linear_reward=False):
        yield replace(case, sigma=case.sigma[:, :2])


@check(
    "lemma-3-reward-weighted-mle",
    "Lemma 3, [24], [25]",
    implements=[f"{EXACT}.kernel"],
    controls=["alpha off by 5 %", "the reward of x_k in place of the end's", "weights left out"],
)
def lemma_3(setting: Setting, defect: str) -> Lines:
    """p*_t = argmax_p E[exp(r(x_0)/alpha) log p(x_{t-1}|x_t)], x_t ~ u and then the reference to the end: the same
    regression, weighted by the reward of the end alone, gives the library's kernel, with no value function."""
    rng = setting.rng(8)
    for case in linear_cases(setting):
        answers, d = spoil(case, defect).chain(), case.d
        for k in range(case.K):
            path = path_law(rng.normal(size=d), 0.5 * np.eye(d), case.steps()[k:])
            P, q = np.zeros_like(path.cov), np.zeros_like(path.mean)
            where = slice(0, d) if defect.startswith("the reward of x_k") else slice(-d, None)
            if defect != "weights left out":
                P[where, where], q[where] = case.G / case.alpha, case.g / case.alpha
            weighted, _ = path.tilted(P, q)
            M, b, root = answers.kernel(k)
            for name, got, want in zip(
                ("slope", "offset", "covariance"), weighted.regression([1], [0]), (M, b, root @ root.T)
            ):
                yield compare(f"{name} of the regression at step {k}, d={d}", got, want)


def _kernel_log_ratio(answers, case: LinearCase, path: np.ndarray, k: int) -> float:
    """``log p*(x_{k+1}|x_k) - log p_pre(x_{k+1}|x_k)`` on one path ``(K+1, d)``."""
    optimum, reference = _kernel_log_densities(answers, case, path, k)
    return optimum - reference


def _kernel_log_densities(answers, case: LinearCase, path: np.ndarray, k: int) -> tuple[float, float]:
    """``log p*(x_{k+1}|x_k)`` and ``log p_pre(x_{k+1}|x_k)`` on one path ``(K+1, d)``."""
    (M, b, root), (A, a, C) = answers.kernel(k), case.steps()[k]
    optimum = log_density(path[k + 1], M @ path[k] + b, root @ root.T)
    return float(optimum), float(log_density(path[k + 1], A @ path[k] + a, C @ C.T))


@check(
    "lemma-4-path-consistency",
    "Lemma 4, [33], [34]",
    implements=[f"{EXACT}.kernel", f"{EXACT}.value"],
    controls=["alpha off by 5 %", "sign of the value flipped", "running cost left out", "Tweedie's value"],
)
def lemma_4(setting: Setting, defect: str) -> Lines:
    """v_t(x_t)/alpha + log p*(x_{t-1}|x_t) = v_{t-1}(x_{t-1})/alpha + log p_pre(x_{t-1}|x_t) on every pair of states
    [33] (with h f/alpha where there is a running cost), and its sum over n steps (the n-step form), on arbitrary
    paths."""
    sign = -1.0 if defect == "sign of the value flipped" else 1.0
    for case in (*linear_cases(setting), *linear_cases(setting, cost=True)):
        answers = spoil(case, defect).chain()
        path = setting.rng(9).normal(size=(case.K + 1, case.d))
        values = np.array([_value(answers, defect, k, path[k][None])[0] for k in range(case.K + 1)]) / case.alpha
        costs = np.array([h * case.cost(t, x[None])[0] for t, h, x in zip(case.grid, case.h, path)])
        logs = np.array([_kernel_log_densities(answers, case, path, k) for k in range(case.K)])
        deltas = sign * (values[:-1] - values[1:]) + logs[:, 0] - logs[:, 1] + costs / case.alpha
        scale = max(1.0, float(np.abs(logs).max()))  # rounding is that of the densities, not of their ratio
        yield within(f"1-step residuals, d={case.d}", float(np.abs(deltas).max()) / scale, 1e-9)
        yield within(f"2-step residuals, d={case.d}", float(np.abs(deltas[1:] + deltas[:-1]).max()) / scale, 1e-9)


@check(
    "corollary-1-t-step",
    "Corollary 1, [35], [36]",
    implements=[f"{EXACT}.kernel", f"{EXACT}.log_z", f"{EXACT}.initial"],
    controls=["log Z left out", "KL of the start dropped", "alpha off by 5 %", "last step left out"],
)
def corollary_1(setting: Setting, defect: str) -> Lines:
    """On every path, sum_t log p*(x_{t-1}|x_t) + log p*(x_T) = r(x_0)/alpha - log Z + sum_t log p_pre + log p_pre(x_T):
    the identity [35] with the log Z that its print omits, the start's log-ratio included."""
    for case in linear_cases(setting):
        answers = spoil(case, defect).chain()
        path = 1.5 * setting.rng(10).normal(size=(case.K + 1, case.d))
        initial = answers.exact.initial
        start = log_density(path[0], initial.mean.numpy(), initial.covariance_matrix.numpy()) - log_density(
            path[0], case.mean, case.cov
        )
        last = case.K - 1 if defect == "last step left out" else case.K
        total = sum(_kernel_log_ratio(answers, case, path, k) for k in range(last))
        total += 0.0 if defect == "KL of the start dropped" else start
        log_z = 0.0 if defect == "log Z left out" else float(answers.exact.log_z)
        reward = -0.5 * path[-1] @ case.G @ path[-1] + case.g @ path[-1]
        yield compare(f"log p*/p_pre of a path, d={case.d}", total, reward / case.alpha - log_z)


@check(
    "corollary-2-conditional",
    "Corollary 2, [37], [38]",
    implements=[f"{EXACT}.marginal", f"{EXACT}.kernel"],
    controls=["alpha = 2 in place of 1", "start left fixed", "noise off by 1 %"],
)
def corollary_2(setting: Setting, defect: str) -> Lines:
    """With r(x) = log p(y|x) and alpha = 1 the optimum's end law is the conditional law p(x|y) ∝ p(y|x) p_pre(x): for
    y = H x + noise, the library's end law against conditioning of the dense joint law of (x_K, y)."""
    rng = setting.rng(11)
    for case in linear_cases(setting, linear_reward=False):
        H, y, precision = rng.normal(size=(1, case.d)), rng.normal(size=1), 1 / 0.6
        case = replace(case, G=precision * H.T @ H, g=precision * H.T @ y, alpha=1.0)
        given = replace(case, alpha=2.0) if defect.startswith("alpha = 2") else spoil(case, defect)
        end = case.reference().of(-1)
        innovation = H @ end.cov @ H.T + 0.6
        gain = end.cov @ H.T / innovation
        mean, cov = given.chain().marginal(case.K)
        yield compare(f"mean of x given y, d={case.d}", mean, end.mean + gain @ (y - H @ end.mean))
        yield compare(f"covariance of x given y, d={case.d}", cov, end.cov - gain @ H @ end.cov)


def _affine_control(case: LinearCase, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return 0.5 * rng.normal(size=(case.K, case.m, case.d)), rng.normal(size=(case.K, case.m))


def _square_noise(setting: Setting, **options) -> Iterator[LinearCase]:
    """Cases with as many noises as states, on which every step has a density and a control is seen by its law."""
    yield from linear_cases(setting, extra_noise=False, **options)


@check(
    "eq-18-objective",
    "[18], [12], Table 2 (fine-tuning)",
    implements=[f"{EXACT}.log_z", f"{EXACT}.elbo", f"{EXACT}.floor", f"{EXACT}.control"],
    controls=["KL of the start dropped", "sign of the KL flipped", "alpha off by 5 %", "running cost left out"],
)
def objective_identity(setting: Setting, defect: str) -> Lines:
    """J(u) = E[R] - alpha KL(P^u || Q0) = alpha log Z - alpha KL(P^u || Q_fine) for every control u and every start:
    for random affine u by dense laws with the library's log Z, and for the library's best mean-shift control, whose
    J/alpha is its ``elbo``, with ``floor`` = KL(P^u || Q_fine)."""
    rng = setting.rng(12)
    sign = -1.0 if defect == "sign of the KL flipped" else 1.0
    for case in (*_square_noise(setting), *_square_noise(setting, cost=True)):
        answers, reference = spoil(case, defect).chain(), case.reference()
        best, _ = case.optimum()
        start = Joint(rng.normal(size=case.d), 0.7 * case.cov, case.d)
        path = path_law(start.mean, start.cov, case.steps(_affine_control(case, rng)))
        kl = gaussian_kl(path, reference)
        if defect == "KL of the start dropped":
            kl -= gaussian_kl(start, reference.of(0))
        objective = path.expect_quadratic(*case.total_reward()) - sign * kl
        yield compare(
            f"J/alpha of a random control, d={case.d}", objective, float(answers.exact.log_z) - gaussian_kl(path, best)
        )
        path = case.reference(0, case.mean, answers.control())
        best = case.reference(0, case.mean).tilted(*case.total_reward())[0]
        after = tuple(range(1, case.K + 1))
        floor = gaussian_kl(path.of(*after), best.of(*after))
        point = replace(spoil(case, defect), cov=0 * case.cov, start="fixed").chain().exact
        yield compare(
            f"`elbo` from a point, d={case.d}",
            float(point.elbo),
            case.value(0, case.mean[None])[0] / case.alpha - floor,
        )
        yield compare(f"`floor` from a point, d={case.d}", float(point.floor), floor)


@check(
    "mean-shift-optimum",
    "MATH 2: the floor",
    implements=[f"{EXACT}.control", f"{EXACT}.elbo", f"{EXACT}.floor"],
    controls=["alpha off by 5 %", "gradient of v_k in place of the best shift", "noise off by 1 %"],
)
def mean_shift_optimum(setting: Setting, defect: str) -> Lines:
    """Among controls, which shift means and keep the covariance, the library's is best: the derivative of
    KL(P^u || Q_fine) vanishes there in every random direction; and its floor is
    sum_k [tr(S_k P_{k+1}) - log det(I + S_k P_{k+1})]/2, what the covariance alone costs."""
    rng = setting.rng(13)
    for case in _square_noise(setting, cost=True):
        answers, after = spoil(case, defect).chain(), tuple(range(1, case.K + 1))
        U, w = answers.control()
        if defect.startswith("gradient"):
            for k in range(case.K):
                P, q, _ = _quadratic(lambda x, k=k: case.value(k, x) / case.alpha, case.d)
                U[k], w[k] = -case.sigma_at(case.grid[k]).T @ P, case.sigma_at(case.grid[k]).T @ q
        best = case.reference(0, case.mean).tilted(*case.total_reward())[0].of(*after)
        V, y = _affine_control(case, rng)

        def kl(s: float) -> float:
            return gaussian_kl(case.reference(0, case.mean, (U + s * V, w + s * y)).of(*after), best)

        e = 2e-3  # five points: exact but for terms of order e^4
        slope = (8 * (kl(e) - kl(-e)) - (kl(2 * e) - kl(-2 * e))) / (12 * e)
        yield within(f"derivative of the KL, d={case.d}", abs(slope) * e**2 / (kl(e) + kl(-e) - 2 * kl(0.0)), 1e-9)
        floor = 0.0
        for k in range(case.K):
            P, _, _ = _quadratic(lambda x, k=k: case.value(k + 1, x) / case.alpha, case.d)
            SP = case.steps()[k][2] @ case.steps()[k][2].T @ P
            floor += 0.5 * (np.trace(SP) - np.linalg.slogdet(np.eye(case.d) + SP)[1])
        point = replace(spoil(case, defect), cov=0 * case.cov, start="fixed").chain().exact
        yield compare(f"floor, d={case.d}", float(point.floor), floor if not defect.startswith("gradient") else kl(0.0))


@check(
    "value-clock",
    "MATH 2: the grid",
    implements=[f"{EXACT}.value", f"{EXACT}.control"],
    controls=["read one step late"],
)
def value_clock(setting: Setting, defect: str) -> Lines:
    """The value and the control of a chain belong to grid times; asked with one time per row, rows keep their own
    step."""
    for case in linear_cases(setting, cost=True):
        answers = case.chain()
        x, late = case.points(setting.rng(14), case.K), int(defect != "")
        steps = np.arange(case.K)[::-1].copy()
        t = tensor(np.asarray(case.grid)[np.minimum(steps + late, case.K)])
        yield compare(
            f"values by row, d={case.d}",
            answers.exact.value(tensor(x), t),
            [case.value(k, row[None])[0] for k, row in zip(steps, x)],
        )
        U, w = answers.control()
        t = tensor(np.asarray(case.grid)[np.minimum(steps + late, case.K - 1)])
        yield compare(
            f"controls by row, d={case.d}",
            answers.exact.control(tensor(x), t),
            np.stack([U[k] @ row + w[k] for k, row in zip(steps, x)]),
        )
