"""The suite's power: bugs planted in the library, one at a time, are caught by the check that is about them."""

from __future__ import annotations

import math

import pytest
import torch

import sdecontrol as sc
from sdecontrol.chains.categorical import CategoricalKernels
from sdecontrol.chains.gaussian import EulerChain
from sdecontrol.chains.jump import JumpChain
from sdecontrol.chains.segments import LearnedStart
from sdecontrol.evaluation import evaluate as evaluation
from sdecontrol.exact import base, discrete, finite, quadratic, riccati
from sdecontrol.exact.quadratic import Form
from sdecontrol.paths.paths import Paths
from sdecontrol.processes.linear import Transition
from sdecontrol.processes.schedules import VP
from sdecontrol.tensors import event_sum, symmetric
from theory_checks import Setting, all_checks, run_check


def _fails(name: str) -> bool:
    check = next(c for c in all_checks() if c.name == name)
    return not all(m.passed for m in check.measure(Setting()))


def _gain_is_h(patch):
    patch.setattr(EulerChain, "gain", lambda self, k: self.step_sizes[k])


def _half_square_dropped(patch):
    def log_ratio(self, control=None, per_step=False):
        steps = event_sum(self.shifts * self.noises, len(self.chain.noise_shape))
        return steps if per_step else steps.sum(0)

    patch.setattr(Paths, "log_ratio", log_ratio)


def _wrong_sign_of_q(patch):
    def through(self, matrix, shift):
        return Form(symmetric(matrix.mT @ self.P @ matrix), matrix.mT @ (self.q + self.P @ shift), self.at(shift))

    patch.setattr(Form, "through", through)


def _covariance_of_the_kernel_kept(patch):
    true = discrete.soft_step

    def soft_step(form, step, where):
        new, kernel = true(form, step, where)
        return new, Transition(kernel.matrix, kernel.shift, step.scale @ step.scale.mT)

    patch.setattr(discrete, "soft_step", soft_step)


def _start_two_per_cent_wide(patch):
    true = LearnedStart.__init__

    def init(self, *args):
        true(self, *args)
        self._scales = [1.01 * s for s in self._scales]

    patch.setattr(LearnedStart, "__init__", init)


def _variance_as_printed(patch):
    patch.setattr(VP, "std", lambda self, s: torch.sqrt(-torch.expm1(-0.5 * self._integral(s))))


def _alpha_missing(patch):
    patch.setattr(quadratic.LinearQuadraticSolution, "_value_at", lambda self, x, time: self._form(time).at(x))


def _weights_without_cost(patch):
    from theory_checks.statements import paths as statements

    true = statements.log_weights
    patch.setattr(
        statements, "log_weights", lambda problem, paths: true(problem, paths) + paths.running_cost / problem.alpha
    )


def _bridge_ignores_the_offset(patch):
    true = quadratic.LinearQuadraticSolution.bridge

    def bridge(self, s, t, x_t):
        law = true(self, s, t, x_t)
        return type(law)(law.mean * 1.0 + 0.01, law.covariance_matrix)

    patch.setattr(quadratic.LinearQuadraticSolution, "bridge", bridge)


def _drift_transposed(patch):
    true = riccati.LinearSDE.coefficients

    def coefficients(self, t):
        A, a, sigma = true(self, t)
        return A.T, a, sigma

    patch.setattr(riccati.LinearSDE, "coefficients", coefficients)


def _log_z_without_the_start(patch):
    patch.setattr(quadratic.LinearQuadraticSolution, "log_z", property(lambda self: self.start_log_z - 0.01))


def _standard_errors_halved(patch):
    true = evaluation.mean_estimate

    def mean_estimate(values):
        estimate = true(values)
        return type(estimate)(estimate.value, 0.5 * estimate.stderr)

    patch.setattr(evaluation, "mean_estimate", mean_estimate)


def _noise_one_per_cent_wide(patch):
    true = EulerChain.kernel

    def kernel(self, k, x, condition=None):
        mean, scale = true(self, k, x, condition)
        return mean, scale * math.sqrt(1.02)

    patch.setattr(EulerChain, "kernel", kernel)


def _rows_of_the_transition_rolled(patch):
    true = CategoricalKernels.transition
    patch.setattr(CategoricalKernels, "transition", lambda self, k: true(self, max(k - 1, 0)))


def _tilt_not_normalised(patch):
    patch.setattr(CategoricalKernels, "shift_at", lambda self, k, x, u, condition=None: u)


def _cost_of_the_right_end(patch):
    def charged(self, k, w):
        costs = self._costs(self.chain.clock[k + 1])
        return w if costs is None else w - self.chain.step_sizes[k] * costs

    patch.setattr(finite.FiniteChainSolution, "_charged", charged)


def _kernel_without_alpha(patch):
    true = finite.FiniteSolution._rewards
    patch.setattr(finite.FiniteSolution, "_rewards", lambda self, ends=None: self.problem.alpha * true(self, ends))


def _moves_shifted(patch):
    patch.setattr(JumpChain, "draws", lambda self, noises, shifts, states, before=None: torch.zeros_like(states))


def _residual_without_the_cost(patch):
    patch.setattr(Paths, "log_target", lambda self: torch.zeros_like(self.log_ratio(per_step=True)))


PLANTED = [
    (_rows_of_the_transition_rolled, "finite-theorem-1"),
    (_tilt_not_normalised, "finite-log-ratios"),
    (_cost_of_the_right_end, "finite-lemma-2"),
    (_kernel_without_alpha, "finite-theorem-2"),
    (_moves_shifted, "finite-no-floor"),
    (_residual_without_the_cost, "finite-lemma-4"),
    (_gain_is_h, "path-equation"),
    (_half_square_dropped, "path-log-ratio"),
    (_wrong_sign_of_q, "theorem-1-chain"),
    (_covariance_of_the_kernel_kept, "eq-19-optimal-kernel"),
    (_start_two_per_cent_wide, "path-law-of-the-start"),
    (_variance_as_printed, "eq-1-noising"),
    (_alpha_missing, "theorem-2-chain"),
    (_weights_without_cost, "weights-are-unbiased"),
    (_bridge_ignores_the_offset, "theorem-3-chain"),
    (_drift_transposed, "theorem-1-continuous"),
    (_log_z_without_the_start, "corollary-1-t-step"),
    (_noise_one_per_cent_wide, "path-equation"),
    (_standard_errors_halved, "sampled-evaluation"),
    (_noise_one_per_cent_wide, "sampled-reference"),
]
SLOW = {"sampled-evaluation", "sampled-reference"}


@pytest.mark.parametrize(
    ("plant", "name"),
    [pytest.param(p, n, marks=pytest.mark.slow if n in SLOW else (), id=f"{p.__name__[1:]}-{n}") for p, n in PLANTED],
)
def test_planted_bug_is_caught(monkeypatch, plant, name):
    plant(monkeypatch)
    assert _fails(name)


def test_without_bugs_they_pass():
    assert not any(_fails(name) for name in {n for _, n in PLANTED} - SLOW)
    assert base is not None


#: checks that once held equations against one another only, and what each of them now runs
ABOUT_METHODS = [
    ("algorithm-1-soft-ppo", "SoftPPO"),
    ("algorithm-2-backpropagation", "RewardBackprop"),
    ("on-policy-fixed-points", "LogVariance"),
    ("on-policy-fixed-points", "PathConsistency"),
    ("eq-32-path-integral", "PathIntegralGuidance"),
    ("eq-31-tweedie", "ValueGuidance"),
    ("eq-31-tweedie-mixture", "ValueGuidance"),
    ("adjoint-matching", "AdjointMatching"),
    ("remark-7-f-divergence", "FDivergence"),
    ("erratum-21-clip", "SoftPPO"),
    ("erratum-21-cost", "SoftPPO"),
]


@pytest.mark.parametrize(("name", "method"), ABOUT_METHODS)
def test_a_method_that_raises_fails_its_check(monkeypatch, name, method):
    def raises(self, *arguments, **options):
        raise RuntimeError("planted")

    monkeypatch.setattr(getattr(sc, method), "__init__", raises)
    check = next(c for c in all_checks() if c.name == name)
    assert f"sdecontrol.{method}" in check.implements
    outcome = run_check(check, Setting(), controls=False)
    assert not outcome.passed and "planted" in outcome.error
