"""Remark 1: Section 4 of the tutorial on finite state spaces, exact to rounding.

On the left of every comparison stands the library; on the right the law of whole paths by enumeration. States are
those of jump processes (exact kernels, rates that depend on time, sparse ones), of one token or two, and of masked
diffusions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm

import sdecontrol as sc

from ..cases import tensor
from ..finite import (
    FiniteAnswers,
    FiniteCase,
    Jumps,
    Masked,
    PathTable,
    TableControl,
    every_path,
    finite_cases,
    iteration,
    masked_case,
    path_table,
    quarters_case,
    spoil,
    tokens_case,
)
from ..registry import Measurement, Setting, check, compare, within
from .estimators import KIND

EXACT = "sdecontrol.exact_solution"
JUMPS, TOKENS, MASKED = (
    "sdecontrol.JumpProcess",
    "sdecontrol.chains.categorical.CategoricalChain",
    "sdecontrol.chains.masked.MaskedDiffusionChain",
)
Lines = Iterator[Measurement]


def expected_reward(answers: FiniteAnswers, k: int) -> np.ndarray:
    """``E[r(x_K) | x_k]`` where the value should stand."""
    case = answers.case
    ends = [case.reference(k, int(x)) for x in case.reached(k)]
    return np.array([p.weights @ case.reward[p.paths[:, -1]] for p in ends])


def _value(answers: FiniteAnswers, defect: str, k: int) -> np.ndarray:
    """The library's value at the states of step k, or what a negative control puts in its place."""
    return expected_reward(answers, k) if defect == "E r in the value's place" else answers.value(k)


@check(
    "finite-theorem-1",
    "Theorem 1, Remark 1",
    implements=[f"{EXACT}.kernel", f"{EXACT}.marginal", f"{EXACT}.log_z", JUMPS, TOKENS, MASKED],
    controls=[
        "alpha off by 5 %",
        "sign of r flipped",
        "kernels off by 1 %",
        "states in another order",
        "last step left out",
        "another start",
    ],
)
def theorem_1(setting: Setting, defect: str) -> Lines:
    """From a point, the soft-optimal kernels lead to p_r = exp(r/alpha) p_pre/Z. The library's kernels are composed
    over all paths; its ``marginal`` and ``log_z`` must say the same."""
    for case in finite_cases(setting):
        best, log_z = case.optimum()
        answers = spoil(case, defect).answers()
        kernels = case.K - 1 if defect == "last step left out" else None
        yield compare(f"x_K by the kernels, {case.label}", answers.induced(kernels).marginal(-1), best.marginal(-1))
        yield compare(f"marginal(T), {case.label}", answers.marginal(case.K), best.marginal(-1))
        yield compare(f"log Z, {case.label}", float(answers.exact.log_z), log_z)


@check(
    "finite-theorem-2",
    "Theorem 2, Remark 1",
    implements=[f"{EXACT}.value", f"{EXACT}.marginal", f"{EXACT}.log_z"],
    controls=["alpha off by 5 %", "kernels off by 1 %", "E r in the value's place", "alpha missing in the value"],
)
def theorem_2(setting: Setting, defect: str) -> Lines:
    """Every marginal of the optimum is exp(v_t/alpha) p_pre_t/Z, with one Z at every t: the library's marginal against
    its value and the enumerated marginal of the reference, state by state."""
    for case in finite_cases(setting):
        answers, reference, (_, log_z) = spoil(case, defect).answers(), case.reference(), case.optimum()
        alpha = 1.0 if defect == "alpha missing in the value" else case.alpha
        for k in range(case.K + 1):
            at = case.reached(k)
            log_c = _value(answers, defect, k) / alpha - np.log(answers.marginal(k)[at] / reference.marginal(k)[at])
            yield compare(f"log C at step {k}, {case.label}", log_c, np.full(len(at), log_z))


@check(
    "finite-theorem-3",
    "Theorem 3, [36], Remark 1",
    implements=[f"{EXACT}.bridge", f"{EXACT}.kernel"],
    controls=["kernels off by 1 %", "states in another order", "bridges of other times"],
)
def theorem_3(setting: Setting, defect: str) -> Lines:
    """The backward conditionals of the optimum are those of the reference, at adjacent and distant times: the library's
    bridges, and the conditionals of the path law that its kernels induce."""
    for case in finite_cases(setting):
        answers, reference = spoil(case, defect).answers(), case.reference()
        induced = answers.induced()
        for j, k in [(k - 1, k) for k in range(2, case.K + 1)] + [(1, case.K)]:
            from_ = j - 1 if defect == "bridges of other times" else j
            yield compare(f"bridge x_{j} | x_{k}, {case.label}", answers.bridge(from_, k), reference.given(j, k))
            yield compare(f"x_{j} | x_{k} by the kernels, {case.label}", induced.given(j, k), reference.given(j, k))


@check(
    "finite-running-cost",
    "MATH 1: f = 0, Remark 1",
    implements=[f"{EXACT}.marginal", f"{EXACT}.value", f"{EXACT}.bridge", f"{EXACT}.kernel"],
    controls=["running cost left out", "alpha off by 5 %", "kernels off by 1 %"],
)
def running_cost(setting: Setting, defect: str) -> Lines:
    """With a running cost the optimum is Q_fine, dQ_fine/dQ0 = exp(R/alpha)/Z on whole paths: marginals, kernels,
    bridges, values and log Z are those of the enumerated tilted path law."""
    for case in finite_cases(setting, cost=True):
        answers, (best, log_z) = spoil(case, defect).answers(), case.optimum()
        yield compare(f"log Z, {case.label}", float(answers.exact.log_z), log_z)
        yield compare(f"x_0 | x_K, {case.label}", answers.bridge(1, case.K), best.given(1, case.K))
        for k in range(case.K):
            yield compare(f"marginal of step {k}, {case.label}", answers.marginal(k), best.marginal(k))
            yield compare(f"v_{k}, {case.label}", answers.value(k), case.value(k, case.reached(k)))
            yield compare(f"kernel of step {k}, {case.label}", answers.kernel(k), best.given(k + 1, k))


@check(
    "finite-fixed-start",
    "MATH 1: the initial law, Remark 1",
    implements=[f"{EXACT}.marginal", f"{EXACT}.start_log_z", "sdecontrol.simulate", f"{EXACT}.control"],
    controls=["called p_r all the same", "alpha off by 5 %", "sign of r flipped"],
)
def fixed_start(setting: Setting, defect: str) -> Lines:
    """A random start that keeps its law nu leaves another end law than p_r, nu(x_0) times the tilted conditional path
    law; the largest ELBO is E_nu[v_0]/alpha; and on the library's optimal paths every log weight is v_0(x_0)/alpha."""
    for case in finite_cases(setting, random_start=True):
        answers, (best, _) = spoil(case, defect).answers(), case.optimum()
        kept = best.weighted((case.start / np.maximum(best.marginal(0), 1e-300))[best.paths[:, 0]])
        end = best.marginal(-1) if defect == "called p_r all the same" else kept.marginal(-1)
        yield compare(f"end law, {case.label}", answers.marginal(case.K), end)
        v = case.value(0, np.arange(case.n)) / case.alpha
        yield compare(f"largest ELBO, {case.label}", float(answers.exact.start_log_z), case.start @ v)
        paths = sc.simulate(case.problem(), 64, answers.exact.control, seed=setting.seed, **case.steps)
        yield compare(f"log weights, {case.label}", paths.log_weights(), v[path_table(paths, case)[:, 0]])


@check(
    "finite-lemma-1",
    "Lemma 1, Remark 1",
    implements=[
        f"{EXACT}.kernel",
        f"{EXACT}.value",
        f"{EXACT}.control",
        "sdecontrol.chains.categorical.CategoricalKernels.shift_at",
        "sdecontrol.chains.categorical.CategoricalKernels.log_ratio",
    ],
    controls=["alpha off by 5 %", "weights left out", "E r in the value's place", "states in another order"],
)
def lemma_1(setting: Setting, defect: str) -> Lines:
    """p*_t = argmax_p E_{x ~ u, y ~ p_pre(.|x)}[exp(v_{t-1}(y)/alpha) log p(y|x)], u a law of one's own, the library's
    value in the weights: the maximiser over all kernels is the library's; and of the library's log-ratios, weighted so,
    the gradient in the tilts vanishes at its control."""
    rng = setting.rng(33)
    for case in finite_cases(setting, single=True):
        answers = spoil(case, defect).answers()
        chain, tilts = answers.chain, answers.tilts()
        for k in range(case.K):
            at, after = case.reached(k), case.reached(k + 1)
            gained = np.zeros(case.n)
            gained[after] = 0.0 if defect == "weights left out" else _value(answers, defect, k + 1) / case.alpha
            joint = np.zeros((case.n, case.n))
            joint[at] = rng.dirichlet(np.ones(len(at)))[:, None] * case.kernels[k][at] * np.exp(gained)
            joint = joint / joint.sum()
            total = joint.sum(1, keepdims=True)
            best = joint / np.where(total > 0, total, 1.0)
            yield compare(f"maximiser at step {k}, {case.label}", best, answers.kernel(k))
            x, y = np.nonzero(joint)
            states = case.states[torch.from_numpy(np.stack((x, y)))]
            control = TableControl(case, tilts)
            c = chain.shift_at(k, states[0], control.tilts[k, torch.from_numpy(x)])
            draws = chain.draws(c[None], c[None], states[1:], states[:1])
            loss = (tensor(joint[x, y]) * chain.log_ratio(c[None], draws)[0]).sum()
            slope = torch.autograd.grad(loss, control.tilts)[0]
            yield within(f"gradient at step {k}, {case.label}", float(slope.abs().max()), 1e-9)


@check(
    "finite-lemma-2",
    "Lemma 2, [23], [20], Remark 1",
    implements=[f"{EXACT}.value"],
    controls=[
        "alpha off by 5 %",
        "sign of r flipped",
        "E r in the value's place",
        "kernels off by 1 %",
        "step read late",
    ],
)
def lemma_2(setting: Setting, defect: str) -> Lines:
    """exp(v_t(x)/alpha) = E_pre[exp(r(x_0)/alpha) | x_t = x], with a running cost inside the exponential: the library's
    value, made backwards by soft Bellman steps, against a sum over all paths from x."""
    for case in (*finite_cases(setting), *finite_cases(setting, cost=True)):
        answers, late = spoil(case, defect).answers(), defect == "step read late"
        for k in range(case.K):
            x = case.reached(k)
            if late:
                got = answers.exact.value(case.states[x], case.clock[k + 1]).numpy()
                got = np.where(np.isfinite(got), got, 0.0)
            else:
                got = _value(answers, defect, k)
            yield compare(f"v_{k}, {case.label}", got, case.value(k, x))


@check(
    "finite-lemma-3",
    "Lemma 3, [24], [25], Remark 1",
    kind=KIND,
    implements=["sdecontrol.RewardWeightedMLE", f"{EXACT}.kernel", f"{EXACT}.control"],
    controls=["alpha off by 5 %", "sign of r flipped", "kernels off by 1 %", "control left out"],
)
def lemma_3(setting: Setting, defect: str) -> Lines:
    """p*_t = argmax_p E[exp(r(x_0)/alpha) log p(x_{t-1}|x_t)] with no value function: the enumerated law weighted by
    exp(R/alpha) has the library's kernels as its transitions; and one iteration of the library's reward-weighted MLE on
    all paths of the reference, each as often as it is likely, has no gradient at the library's control."""
    for cost in (False, True):
        case = quarters_case(setting.rng(34), cost)
        answers, (best, _) = spoil(case, defect).answers(), case.optimum()
        strength = 0.0 if defect == "control left out" else 1.0
        for k in range(case.K):
            yield compare(f"kernel of step {k}, {case.label}", answers.kernel(k), best.given(k + 1, k))
        method = sc.RewardWeightedMLE(roll_in="none")
        metrics, slope = iteration(case, method, answers.tilts(strength), every_path(case))
        yield within(f"gradient, {case.label}", float(slope.abs().max()), 1e-9)
        table = case.reference()
        w = np.exp(case.gains(table.paths))
        ess = (table.weights @ w) ** 2 / (table.weights @ w**2)
        yield compare(f"effective sample size of the weights, {case.label}", metrics["ess"], ess)


def _residuals(case: FiniteCase, answers: FiniteAnswers, n: int, defect: str, seed: int) -> Lines:
    values, tilts = answers.values(), answers.tilts(0.99 if defect == "control off by 1 %" else 1.0)
    if defect == "sign of the value flipped":
        values = -values
    if defect == "E r in the value's place":
        for k in range(case.K):
            values[k][case.reached(k)] = tensor(expected_reward(answers, k) / case.alpha)
    metrics, slope = iteration(case, sc.PathConsistency(n, paths="reference"), tilts, values=values, seed=seed)
    yield within(f"{n}-step residual, {case.label}", (2 * metrics["loss"]) ** 0.5, 1e-9)
    yield within(f"gradient of the {n}-step loss, {case.label}", float(slope.abs().max()), 1e-9)


@check(
    "finite-lemma-4",
    "Lemma 4, [33], [34], Remark 1",
    kind=KIND,
    implements=["sdecontrol.PathConsistency", f"{EXACT}.value", f"{EXACT}.control"],
    controls=[
        "alpha off by 5 %",
        "sign of the value flipped",
        "running cost left out",
        "control off by 1 %",
        "E r in the value's place",
        "kernels off by 1 %",
    ],
)
def lemma_4(setting: Setting, defect: str) -> Lines:
    """v_t/alpha + log p* = v_{t-1}/alpha + log p_pre on every pair of states [33]: at the library's value and control
    the loss of its path consistency, n = 1 and n = 2, is 0 with its gradients on any paths, since one categorical
    variable has no floor; here on those of the reference, running cost included."""
    for case in (*finite_cases(setting, single=True), *finite_cases(setting, single=True, cost=True)):
        answers = spoil(case, defect).answers()
        for n in (1, 2):
            yield from _residuals(case, answers, n, defect, setting.seed)


@check(
    "finite-corollary-1",
    "Corollary 1, [35], Remark 1",
    kind=KIND,
    implements=["sdecontrol.PathConsistency", "sdecontrol.LogVariance", f"{EXACT}.log_z", f"{EXACT}.control"],
    controls=["log Z left out", "alpha off by 5 %", "last step left out", "sign of r flipped", "kernels off by 1 %"],
)
def corollary_1(setting: Setting, defect: str) -> Lines:
    """On every path sum log p*/p_pre = r/alpha - log Z, with the log Z that the print omits: on paths of the reference
    the T-step loss of the library's path consistency is 0 at its control and log Z, a variance of log weights (the loss
    of its log-variance) is 0 at its control, and the gradients of both are."""
    for case in (*finite_cases(setting, single=True), *finite_cases(setting, single=True, cost=True)):
        answers = spoil(case, defect).answers()
        tilts, log_z = answers.tilts(), 0.0 if defect == "log Z left out" else float(answers.exact.log_z)
        if defect == "last step left out":
            tilts[-1] = 0.0
        for method in (sc.PathConsistency("all", paths="reference"), sc.LogVariance(paths="reference")):
            level = log_z if isinstance(method, sc.PathConsistency) else None
            metrics, slope = iteration(case, method, tilts, log_z=level, seed=setting.seed)
            yield within(f"loss, {method.name}, {case.label}", abs(metrics["loss"]), 1e-12)
            yield within(f"gradient, {method.name}, {case.label}", float(slope.abs().max()), 1e-9)


@check(
    "finite-corollary-2",
    "Corollary 2, [37], [38], Remark 1",
    implements=["sdecontrol.LogProb", f"{EXACT}.marginal", f"{EXACT}.log_z"],
    controls=["alpha = 2 in place of 1", "kernels off by 1 %", "another label"],
)
def corollary_2(setting: Setting, defect: str) -> Lines:
    """With r(x) = log p(y|x) and alpha = 1 the optimum's end law is p(x|y) ∝ p(y|x) p_pre(x), and Z is p(y): the
    library's LogProb of a random classifier, against Bayes' rule."""
    rng = setting.rng(35)
    for case in finite_cases(setting):
        p_y = rng.dirichlet(np.ones(3), size=case.n)
        joint = p_y * case.reference().marginal(-1)[:, None]
        given = replace(spoil(case, defect), alpha=2.0 if defect.startswith("alpha = 2") else 1.0)
        logits, label = tensor(np.log(p_y)), 2 if defect == "another label" else 1
        problem = given.problem(sc.LogProb(lambda x: logits[case.index(x)], label))
        exact = sc.exact_solution(problem, **given.steps)
        end = exact.marginal(case.clock[-1]).probs
        yield compare(f"law of x given y, {case.label}", end, joint[:, 1] / joint[:, 1].sum())
        yield compare(f"p(y), {case.label}", float(exact.log_z.exp()), joint[:, 1].sum())


@check(
    "finite-no-floor",
    "MATH 11: no floor, Remark 1",
    implements=[
        f"{EXACT}.control",
        f"{EXACT}.floor",
        "sdecontrol.simulate",
        "sdecontrol.paths.paths.Paths.log_weights",
        JUMPS,
        TOKENS,
        MASKED,
    ],
    controls=["alpha off by 5 %", "control off by 1 %", "two tokens a step", "running cost left out"],
)
def no_floor(setting: Setting, defect: str) -> Lines:
    """Where a step is one categorical variable the soft-optimal kernel is a tilt: the library's control makes it, its
    floor is 0, and every log weight of its paths is log Z."""
    cases = [*finite_cases(setting, single=True), *finite_cases(setting, single=True, cost=True)]
    if defect == "two tokens a step":
        cases = [tokens_case(setting.rng(36), values=2, length=2, K=4)]
    for case in cases:
        answers, (_, log_z) = spoil(case, defect).answers(), case.optimum()
        control = TableControl(case, answers.tilts(0.99 if defect == "control off by 1 %" else 1.0))
        paths = sc.simulate(case.problem(), 64, control, seed=setting.seed, **case.steps)
        yield compare(f"log weights, {case.label}", paths.log_weights().detach(), np.full(64, log_z))
        yield within(f"floor, {case.label}", abs(float(answers.exact.floor)), 1e-9)


def _product_law(case: FiniteCase, tilts: torch.Tensor) -> PathTable:
    """The path law of tilts of independent positions, by enumeration."""
    logits = torch.log(tensor(case.probs)) + tilts  # type: ignore[attr-defined]
    return replace(case, probs=logits.softmax(-1).numpy()).reference()  # type: ignore[call-arg]


@check(
    "finite-product-floor",
    "MATH 11: the floor of products, Remark 1",
    implements=[f"{EXACT}.control", f"{EXACT}.elbo", f"{EXACT}.floor", f"{EXACT}.log_z"],
    controls=["alpha off by 5 %", "marginals of p* in place of the best product", "kernels off by 1 %"],
)
def product_floor(setting: Setting, defect: str) -> Lines:
    """Where two positions move in a step, independently given the state, the optimum is no product: the library's
    control is where KL(P^u || Q_fine) is flat among products, and its floor is that KL, above 0."""
    rng = setting.rng(37)
    for cost in (False, True):
        case = tokens_case(rng, values=2, length=2, K=4, cost=cost)
        answers, (best, log_z) = spoil(case, defect).answers(), case.optimum()
        tilts = answers.tilts()
        if defect.startswith("marginals"):
            x = case.states.numpy()
            for k in range(case.K):
                margins = np.stack([[answers.kernel(k) @ (x[:, j] == v) for v in range(2)] for j in range(2)], 1)
                at = case.reached(k)
                tilts[k][at] = tensor(np.log(margins.transpose(2, 1, 0)[at] / case.probs[k][at]))
        kl, e = lambda u: _product_law(case, u).kl(best), 2e-3
        way = tensor(rng.normal(size=tilts.shape))
        up, down = kl(tilts + e * way), kl(tilts - e * way)
        slope = (8 * (up - down) - (kl(tilts + 2 * e * way) - kl(tilts - 2 * e * way))) / (12 * e)
        yield within(f"derivative of the KL, {case.label}", abs(slope), 1e-9)
        yield compare(f"floor, {case.label}", float(answers.exact.floor), kl(tilts))
        yield compare(f"ELBO, {case.label}", float(answers.exact.elbo), log_z - kl(tilts))
        yield within(f"1e-3 less the floor, {case.label}", 1e-3 - kl(tilts), 0.0)


@check(
    "masked-random-order",
    "MATH 11: masked diffusion, Remark 1",
    implements=[MASKED, f"{EXACT}.control", f"{EXACT}.floor", f"{EXACT}.marginal", "sdecontrol.simulate"],
    controls=["several positions a step", "an inconsistent model", "alpha off by 5 %", "sequences read backwards"],
)
def masked_random_order(setting: Setting, defect: str) -> Lines:
    """A masked diffusion in random order whose model has the conditionals of a joint law ends in that law, at K = L
    steps; and tilts of its tokens alone reach the tilted law with no floor: Z = E[exp(r/alpha)], the same log weight on
    every path."""
    for length, vocabulary in ((2, 3), (3, 2)):
        case = masked_case(setting.rng(38), length, vocabulary)
        weights = case.law * np.exp(case.reward / case.alpha)
        given = spoil(case, "states in another order" if defect == "sequences read backwards" else defect)
        assert isinstance(given, Masked)
        if defect == "several positions a step":
            given = replace(given, order="independent")
        if defect == "an inconsistent model":
            given = replace(given, tilts=0.3 * setting.rng(39).normal(size=given.tilts.shape))
        problem = given.problem()
        exact = sc.exact_solution(problem)
        plain = sc.exact_solution(sc.ControlProblem(problem.reference, reward=lambda x: torch.zeros(len(x)).double()))
        label = f"{length} tokens of {vocabulary}"
        yield compare(f"end law of the reference, {label}", plain.marginal(1.0).probs, case.law)
        yield compare(f"end law of the optimum, {label}", exact.marginal(1.0).probs, weights / weights.sum())
        yield within(f"floor, {label}", abs(float(exact.floor)), 1e-9)
        paths = sc.simulate(problem, 64, exact.control, seed=setting.seed)
        yield compare(f"log weights, {label}", paths.log_weights(), np.full(64, np.log(weights.sum())))


@check(
    "masked-inconsistent-floor",
    "MATH 11: masked diffusion, Remark 1",
    implements=[MASKED, f"{EXACT}.floor", f"{EXACT}.log_z"],
    controls=["alpha off by 5 %", "the more likely order alone", "sign of r flipped"],
)
def masked_inconsistent(setting: Setting, defect: str) -> Lines:
    """Of a model whose conditionals are those of no joint law, tilts of tokens keep a floor, which for two tokens in
    random order is log((psi_1 + psi_2)/2) - (log psi_1 + log psi_2)/2, psi_j = E[exp(r/alpha) | position j first]."""
    case = masked_case(setting.rng(40), 2, 3)
    case = replace(case, tilts=setting.rng(41).normal(size=case.tilts.shape))
    table, exact = case.reference(), spoil(case, defect).answers().exact
    first = case.states.numpy()[table.paths[:, 1]] < case.values - 1  # which position has a letter after a step
    gained = table.weights * np.exp(case.gains(table.paths))
    psi = np.array([gained[first[:, j]].sum() / table.weights[first[:, j]].sum() for j in range(2)])
    log_z = float(np.log(psi.mean()))
    floor = log_z - float(np.log(psi).max() if defect.startswith("the more likely") else np.log(psi).mean())
    yield compare("log Z", float(exact.log_z), log_z)
    yield compare("floor", float(exact.floor), floor)


@check(
    "finite-soft-ppo",
    "Algorithm 1, [21], Remark 1",
    kind=KIND,
    implements=["sdecontrol.SoftPPO", "sdecontrol.paths.paths.Paths.log_ratio"],
    controls=["alpha off by 5 %", "sign of r flipped", "running cost left out", "kernels off by 1 %"],
)
def soft_ppo(setting: Setting, defect: str) -> Lines:
    """At theta = theta_old = the reference, the gradient of the library's surrogate on all paths of the reference, each
    as often as it is likely, is the gradient of -J/alpha, by differentiation of the enumerated path law. (Costs to come
    and the direct derivative of the step's own KL are in it.)"""
    for cost in (False, True):
        case = quarters_case(setting.rng(42), cost)
        given = spoil(case, defect)
        tilts = torch.zeros(case.K, case.n, 1, case.values, dtype=torch.float64)
        ways = tensor(setting.rng(43).normal(size=(4, *tilts.shape)))
        method = sc.SoftPPO(epochs=1, minibatches=1)
        paths = every_path(case)
        slope = iteration(given, method, tilts, paths)[1][: tilts.numel()]

        def loss(u: torch.Tensor) -> float:
            law = _product_law(case, u)
            return law.kl(case.reference()) - float(law.weights @ case.gains(law.paths))

        e = 2e-3
        want = []
        for way in ways:
            near, far = (loss(s * way) - loss(-s * way) for s in (e, 2 * e))
            want.append((8 * near - far) / (12 * e))
        yield compare(f"directional derivatives, {case.label}", ways.flatten(1) @ slope, want)


def _flow(case: Jumps, s: float, t: float) -> np.ndarray:
    """Transition probabilities from s to t in continuous time: an exponential, or the forward equation's solution."""
    if not case.slope.any():
        return expm((t - s) * case.rates)
    slope = lambda u, y: (y.reshape(case.n, -1) @ (case.rates + u * case.slope)).ravel()  # noqa: E731
    found = solve_ivp(slope, (s, t), np.eye(case.n).ravel(), "Radau", rtol=1e-12, atol=1e-14)
    return found.y[:, -1].reshape(case.n, -1)


@check(
    "jump-process-theorems",
    "Theorems 1-3, Remark 4, Remark 1",
    implements=[JUMPS, f"{EXACT}.value", f"{EXACT}.marginal", f"{EXACT}.bridge", f"{EXACT}.control", f"{EXACT}.log_z"],
    controls=[
        "alpha off by 5 %",
        "sign of r flipped",
        "kernels off by 1 %",
        "states in another order",
        "another start",
    ],
)
def jump_theorems(setting: Setting, defect: str) -> Lines:
    """In continuous time a jump process has psi_t = P_{t,T} exp(r/alpha), v = alpha log psi, marginals p_pre_t psi_t/Z,
    the reference's bridges, and tilts of its rates u*(x, y) = (v(y) - v(x))/alpha: the library's solution against
    transition matrices of scipy's."""
    for case in (c for c in finite_cases(setting) if isinstance(c, Jumps)):
        exact, T = sc.exact_solution(spoil(case, defect).problem()), case.clock[-1]
        s, t, states, start = 0.3 * T, 0.7 * T, case.states, case.start
        gained = np.exp(case.reward / case.alpha)
        psi, p, before = _flow(case, t, T) @ gained, start @ _flow(case, 0.0, t), start @ _flow(case, 0.0, s)
        yield compare(f"value, {case.label}", exact.value(states, t), case.alpha * np.log(psi))
        yield compare(f"log Z, {case.label}", float(exact.log_z), np.log(p @ psi))
        yield compare(f"marginal(t), {case.label}", exact.marginal(t).probs, p * psi / (p @ psi))
        yield compare(f"marginal(T), {case.label}", exact.marginal(T).probs, p @ _flow(case, t, T) * gained / (p @ psi))
        bridge = (before[:, None] * _flow(case, s, t) / p).T
        yield compare(f"bridge, {case.label}", exact.bridge(s, t, states).probs, bridge)  # type: ignore[attr-defined]
        u = exact.control(states, t)[:, 0].numpy()
        ratio = np.log(psi)[None] - np.log(psi)[:, None]
        if case.sparse:
            moves = exact.problem.reference.moves.numpy()
            ratio = np.where(moves < 0, 0.0, np.take_along_axis(ratio, np.maximum(moves, 0), 1))
        yield compare(f"tilts of the rates, {case.label}", u, ratio)


@check(
    "finite-log-ratios",
    "MATH 11; MATH 2: log w, Remark 1",
    implements=[
        "sdecontrol.simulate",
        "sdecontrol.paths.paths.Paths.log_ratio",
        "sdecontrol.paths.paths.Paths.kl",
        "sdecontrol.paths.paths.Paths.log_weights",
    ],
    controls=["alpha off by 5 %", "normalisation of the tilt left out", "kernels off by 1 %", "last step left out"],
)
def log_ratios(setting: Setting, defect: str) -> Lines:
    """Of any control u the log-ratio of a path is sum_k log p^u/p_pre, p^u ∝ p_pre exp(u), and the KL of a step is
    sum_y p^u log(p^u/p_pre): the library's paths, of tilts at random, against their probabilities under both laws."""
    rng = setting.rng(44)
    for case in finite_cases(setting, cost=True, masked=False):
        given = spoil(case, defect)
        chain = given.problem().chain(**case.steps) if case.steps else given.problem().chain()
        control = TableControl(case, tensor(0.7 * rng.normal(size=(case.K, case.n, *chain.control_shape))))
        paths = sc.simulate(given.problem(), 64, control, seed=setting.seed, **case.steps)
        table, tilts = path_table(paths, case), control.tilts.detach().numpy()
        ratios, kls = np.zeros((case.K, 64)), np.zeros((case.K, 64))
        for k in range(case.K - (defect == "last step left out")):
            u, p = _tilts_of_states(case, chain, tilts[k]), case.kernels[k]
            tilted = p * np.exp(u)
            norm = 1.0 if defect.startswith("normalisation") else tilted.sum(1, keepdims=True)
            with np.errstate(divide="ignore", invalid="ignore"):
                log_ratio = np.where(p > 0, np.log(tilted / norm / p), 0.0)
            ratios[k] = log_ratio[table[:, k], table[:, k + 1]]
            kls[k] = ((tilted / norm) * log_ratio).sum(1)[table[:, k]]
        yield compare(f"log-ratios, {case.label}", paths.log_ratio(per_step=True).detach(), ratios)
        yield compare(f"KLs, {case.label}", paths.kl(per_step=True).detach(), kls)
        want = case.gains(table) - ratios.sum(0)
        yield compare(f"log weights, {case.label}", paths.log_weights().detach(), want)


def _tilts_of_states(case: FiniteCase, chain, tilts: np.ndarray) -> np.ndarray:
    """What a control adds to ``log p(y|x)``, ``(n, n)``, from its tilts of values, moves or tokens."""
    u, x = np.zeros((case.n, case.n)), case.states.numpy()
    if case.length > 1:
        return np.sum([tilts[:, j][:, x[:, j]] for j in range(case.length)], 0)
    if isinstance(case, Jumps) and case.sparse:
        moves = chain.moves.numpy()
        for i, row in enumerate(moves):
            u[i, row[row >= 0]] = tilts[i, 0, row >= 0]
        return u
    return tilts[:, 0]
