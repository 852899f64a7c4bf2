"""The Ising model: log Z by transfer matrices against enumeration and Kaufman's closed form, and particles against
both."""

import itertools
import math

import pytest
import torch

import sdecontrol as sc
from sdecontrol.library import Ising


def by_enumeration(model):
    n = model.rows * model.columns
    x = torch.tensor(list(itertools.product((0, 1), repeat=n))).reshape(-1, model.rows, model.columns)
    total = torch.zeros(len(x), dtype=torch.float64)
    for state, i, j in itertools.product(range(len(x)), range(model.rows), range(model.columns)):
        s = 2.0 * x[state].double() - 1.0
        total[state] += model.field * s[i, j]
        for a, b in ((i + 1, j), (i, j + 1)):
            if model.periodic or (a < model.rows and b < model.columns):
                total[state] += model.coupling * s[i, j] * s[a % model.rows, b % model.columns]
    return x, total


@pytest.mark.parametrize("size", [(1, 4), (2, 2), (3, 2), (2, 3), (3, 3)])
@pytest.mark.parametrize("periodic", [False, True])
def test_log_z_is_that_of_the_sum_over_all_states(size, periodic):
    model = Ising(*size, coupling=0.35, field=-0.2, periodic=periodic)
    x, energies = by_enumeration(model)
    assert torch.allclose(model.log_density(x).double(), energies, atol=1e-5)
    assert model.log_z == pytest.approx(float(energies.logsumexp(0)), abs=1e-12)


def kaufman(m, n, K):
    """log Z of a torus of m x n spins without a field (Kaufman 1949, eq. 73)."""
    gamma = [math.acosh(math.cosh(2 * K) / math.tanh(2 * K) - math.cos(r * math.pi / n)) for r in range(2 * n)]
    gamma[0] = 2 * K + math.log(math.tanh(K))
    parts = [
        math.prod(2 * f(0.5 * m * g) for g in gamma[first::2])
        for first, f in ((1, math.cosh), (1, math.sinh), (0, math.cosh), (0, math.sinh))
    ]
    return 0.5 * m * n * math.log(2 * math.sinh(2 * K)) + math.log(0.5 * sum(parts))


@pytest.mark.parametrize("coupling", [0.2, 0.4407, 0.6])
@pytest.mark.parametrize("size", [(3, 3), (4, 4), (8, 8), (3, 8)])
def test_log_z_of_a_torus_is_kaufmans(size, coupling):
    assert Ising(*size, coupling, periodic=True).log_z == pytest.approx(kaufman(*size, coupling), abs=1e-10)


def test_the_reference_is_uniform_and_the_problem_has_the_targets_z():
    model = Ising(2, 2, coupling=0.5, field=0.1)
    for order, steps in (("independent", None), ("independent", 3), ("random", None)):
        exact = sc.exact_solution(model.problem(order, steps))
        assert float(exact.log_z) == pytest.approx(model.log_z, abs=1e-5)
    assert float(exact.floor) < 1e-5  # one spin a step


@pytest.mark.slow
def test_a_control_in_random_order_finds_log_z():
    model = Ising(4, 4, 0.4)
    options = {"iterations": 200, "batch_size": 128, "seed": 0, "progress": False}
    solution = sc.solve(model.problem("random"), sc.LogVariance(), **options)
    found = solution.evaluate(8192, seed=1, confirm=False).log_z
    error = abs(found.value - model.log_z)
    assert error < 3 * found.stderr and error < 0.01 and found.stderr < 0.006


@pytest.mark.slow
def test_tempered_particles_of_noises_find_log_z_within_their_error():
    """The reference is a product whatever its steps: of one step the noises are fewest."""
    model = Ising(4, 4, 0.4)
    solution = sc.solve(model.problem(steps=1), sc.TemperedSMC(num_particles=2048), seed=0, progress=False)
    found = solution.evaluate(2048, seed=1, confirm=False).log_z
    assert abs(found.value - model.log_z) < 3 * found.stderr and found.stderr < 0.04


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="rows, columns: 13 x 14 has no transfer matrix"):
        Ising(13, 14, 0.4)
    with pytest.raises(ValueError, match="rows"):
        Ising(0, 3, 0.4)
    with pytest.raises(ValueError, match="coupling"):
        Ising(2, 2, math.nan)
