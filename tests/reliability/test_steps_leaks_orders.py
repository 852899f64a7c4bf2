"""Steps taken, leaks, strong orders, one noise for one seed."""

import gc
import itertools
import math

import numpy as np
import pytest
import torch
from cases import F64, SmallControl, nonlinear, randn, random_lq
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import gradient, perturbed_default

import sdecontrol as sc

DTYPES = [torch.float32, torch.float64]


def counting(dtype, calls):
    def drift(x, t):
        calls.append(float(t))
        return -x

    return sc.ControlProblem(sc.SDE(drift, 1.0, dim=1), initial=sc.Dirac(torch.zeros(1, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 100, 200, 400, 1000, 9999, 10_000])
def test_the_drift_is_called_exactly_once_a_step_at_increasing_times(steps, dtype):
    calls = []
    problem = counting(dtype, calls)
    problem.chain(steps)
    calls.clear()
    sc.simulate(problem, 1, time_steps=steps, seed=0, keep="end")
    assert len(calls) == steps and calls[0] == 0.0 and calls[-1] < 1.0
    assert all(b > a for a, b in itertools.pairwise(calls))


@pytest.mark.slow
def test_every_grid_from_1_to_10000_steps_has_that_many_steps_in_both_dtypes():
    for steps in range(1, 10_001):
        grid = np.array(sc.BrownianMotion(1).default_grid(steps))
        assert len(grid) == steps + 1 and grid[0] == 0 and grid[-1] == 1
        assert (np.diff(grid) > 0).all() and (np.diff(grid.astype(np.float32)) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_steps_keep_nothing(steps):
    """No recursion, no graph, no state kept: late in a run there are as many objects as early in it, and as many after
    a second run as after a first."""
    during = {}

    def drift(x, t):
        k = round(float(t) * steps)
        if k in (steps // 5, steps - 1):
            gc.collect()
            during[k] = len(gc.get_objects())
        assert not x.requires_grad
        return -x

    problem = sc.ControlProblem(sc.SDE(drift, 1.0, dim=1), initial=sc.Dirac(torch.zeros(1, dtype=F64)))
    control, after = SmallControl(1, 1), []
    for _ in range(3):
        sc.simulate(problem, 1, control=control, time_steps=steps, seed=0, keep="end")
        gc.collect()
        after.append(len(gc.get_objects()))
    early, late = during.values()
    assert late - early < 100 and after[2] - after[1] < 100


@pytest.mark.slow
def test_training_leaves_no_objects_behind():
    problem = random_lq(2, seed=1, dtype=torch.float32)
    counts = []
    for _ in range(3):
        sc.solve(problem, sc.RewardBackprop("adjoint"), time_steps=20, iterations=3, batch_size=64, seed=0)
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert abs(counts[2] - counts[1]) < 100


# ------------------------------------------------------------------------------------------------ orders


def strong_errors(drift, diffusion, exact, levels, paths=4000):
    """E|X_T - X^h_T| for grids of 2^level steps, all driven by one Brownian path (coarse increments are sums of fine
    ones)."""
    problem = sc.ControlProblem(sc.SDE(drift, diffusion, dim=1), initial=sc.Dirac(torch.ones(1, dtype=F64)))
    finest = max(levels)
    noise = randn(2**finest, paths, 1, seed=7)
    brownian = noise.sum(0) / math.sqrt(2**finest)
    errors = []
    for level in levels:
        factor = 2 ** (finest - level)
        coarse = noise.unflatten(0, (2**level, factor)).sum(1) / math.sqrt(factor)
        end = sc.simulate(problem, paths, time_steps=2**level, noise=coarse, keep="end").end
        errors.append(float((end - exact(noise, brownian)).abs().mean()))
    return np.polyfit([-level * math.log(2) for level in levels], np.log(errors), 1)[0]


def test_euler_has_strong_order_one_half_for_multiplicative_noise():
    geometric = lambda _, w: torch.exp(0.5 - 0.5 * 0.8**2 + 0.8 * w)  # noqa: E731
    order = strong_errors(lambda x, t: 0.5 * x, lambda x, t: 0.8 * x, geometric, range(5, 11))
    assert abs(order - 0.5) <= 0.1


def test_euler_has_strong_order_one_for_additive_noise():
    def exact(noise, _):
        """An Euler run on a grid so fine that its own error is below a thirtieth of the smallest one measured."""
        x, h = torch.ones(noise.shape[1], 1, dtype=F64), 1 / len(noise)
        for xi in noise:
            x = x + h * torch.sin(x) + math.sqrt(h) * xi
        return x

    problem_drift = lambda x, t: torch.sin(x)  # noqa: E731
    finest = 12
    noise = randn(2**finest, 500, 1, seed=3)
    reference = exact(noise, None)
    errors, levels = [], range(2, 7)
    problem = sc.ControlProblem(sc.SDE(problem_drift, 1.0, dim=1), initial=sc.Dirac(torch.ones(1, dtype=F64)))
    for level in levels:
        factor = 2 ** (finest - level)
        coarse = noise.unflatten(0, (2**level, factor)).sum(1) / math.sqrt(factor)
        end = sc.simulate(problem, 500, time_steps=2**level, noise=coarse, keep="end").end
        errors.append(float((end - reference).abs().mean()))
    order = np.polyfit([-level * math.log(2) for level in levels], np.log(errors), 1)[0]
    assert abs(order - 1.0) <= 0.1


# ------------------------------------------------------------------------------------------------ one seed, one path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("antithetic", [False, True])
def test_chunks_of_paths_give_the_same_bits_as_all_paths_at_once(dtype, antithetic):
    problem, control = nonlinear(dtype), SmallControl(2, 3, dtype=dtype)
    options = {"control": control, "time_steps": 12, "seed": 5, "keep": "end", "antithetic": antithetic}
    whole = sc.simulate(problem, 300, **options)
    for chunk in (64, 128, 192, 320):
        parts = sc.simulate(problem, 300, **options, chunk=chunk)
        assert torch.equal(parts.end, whole.end)
        assert torch.equal(parts.running_cost, whole.running_cost)
        assert torch.equal(parts.log_ratio(), whole.log_ratio()) and torch.equal(parts.kl(), whole.kl())
        assert torch.equal(parts.noises, whole.noises)  # drawn again, for all paths


def test_chunks_of_random_starts_conditions_and_supplied_noise():
    problem = random_lq(2, seed=2, start="fixed")
    noise = randn(6, 150, 2, seed=1)
    for options in ({"seed": 3}, {"seed": 3, "noise": noise}):
        whole = sc.simulate(problem, 150, time_steps=6, keep="end", **options)
        parts = sc.simulate(problem, 150, time_steps=6, keep="end", chunk=64, **options)
        assert torch.allclose(parts.end, whole.end, rtol=0, atol=1e-14)
    labelled = sc.ControlProblem(
        sc.SDE(lambda x, t, y: y - x, 0.5, dim=1),
        initial=sc.Dirac(torch.zeros(1)),
        reward=lambda x, y: -((x - y) ** 2).sum(1),
        condition=torch.tensor([[0.0], [1.0]]),
    )
    whole = sc.simulate(labelled, 150, time_steps=6, keep="end", seed=1)
    parts = sc.simulate(labelled, 150, time_steps=6, keep="end", seed=1, chunk=64)
    assert torch.equal(parts.end, whole.end) and torch.equal(parts.condition, whole.condition)


@pytest.mark.parametrize("chunk", [0, 63, 100, 64.0, True])
def test_a_chunk_is_a_multiple_of_64(chunk):
    with pytest.raises(ValueError, match="multiple of 64"):
        sc.simulate(random_lq(2), 100, chunk=chunk, keep="end")


def test_a_chunk_keeps_ends_only():
    with pytest.raises(ValueError, match="keep='end'"):
        sc.simulate(random_lq(2), 100, chunk=64)


def test_a_non_finite_path_in_a_chunk_is_located():
    drift = lambda x, t: torch.where((x > 2.5) & (t > 0.5), torch.nan, -x)  # noqa: E731
    problem = sc.ControlProblem(sc.SDE(drift, 2.0, dim=1), initial=sc.Dirac(torch.zeros(1)))
    with pytest.raises(sc.NonFiniteError) as caught:
        sc.simulate(problem, 640, time_steps=10, seed=0, keep="end", chunk=64)
    assert caught.value.what == "drift" and caught.value.step is not None and caught.value.step > 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gradient_mode_simulates_the_same_paths_bit_for_bit(dtype):
    problem = nonlinear(dtype)
    chain = problem.chain(33)
    control = perturbed_default(problem, chain)
    ends = [gradient(problem, chain, control, mode, batch=70)[0].end for mode in ("full", "checkpoint", "adjoint", 5)]
    simulated = sc.simulate(problem, 70, control=control, time_steps=33, seed=0, keep="end")
    assert all(torch.equal(end, ends[0]) for end in ends) and simulated.end.shape == ends[0].shape


@given(batch=st.integers(1, 300), extra=st.integers(0, 300), steps=st.integers(1, 30), seed=st.integers(0, 2**40))
@settings(max_examples=20, deadline=None)
def test_elementwise_paths_do_not_depend_on_the_batch_or_on_what_is_kept(batch, extra, steps, seed):
    problem = sc.ControlProblem(sc.SDE(lambda x, t: -x, 0.7, dim=3), initial=sc.Gaussian(torch.zeros(3), 1.0))
    small = sc.simulate(problem, batch, time_steps=steps, seed=seed)
    large = sc.simulate(problem, batch + extra, time_steps=steps, seed=seed, keep="end")
    chunked = sc.simulate(problem, batch + extra, time_steps=steps, seed=seed, keep="end", chunk=64)
    assert torch.equal(small.end, large.end[:batch]) and torch.equal(large.end, chunked.end)
