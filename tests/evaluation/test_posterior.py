"""Draws of a density in the forms that other programs read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import linear
from torch.distributions import HalfNormal, Normal

import sdecontrol as sc

PRIOR = {"mu": Normal(torch.tensor([1.0, -2.0]), 0.5), "tau": HalfNormal(2.0)}


@pytest.fixture(scope="module")
def solution() -> Any:
    """A log likelihood of 0, so that the posterior is the prior; Z = 1."""
    problem = sc.gibbs_problem(log_likelihood=lambda v: 0 * v["tau"], prior=PRIOR, scale=1.5)
    return sc.solve(problem, sc.TemperedSMC(num_particles=1024), seed=0)


def test_arviz_has_draws_weights_log_z_and_the_verdict(solution: Any) -> None:
    evaluation = solution.evaluate(4096, seed=1)
    tree = solution.to_arviz(4096, seed=2, evaluation=evaluation)
    posterior, weighted = tree["posterior"], tree["weighted_posterior"]
    assert posterior["mu"].shape == (1, 4096, 2) and posterior["tau"].shape == (1, 4096)
    assert np.abs(posterior["mu"].mean(("chain", "draw")).values - [1.0, -2.0]).max() < 0.06
    assert abs(float(posterior["tau"].mean()) - 2 * math.sqrt(2 / math.pi)) < 0.1
    log_w = tree["weighted_sample_stats"]["log_weight"].values[0]
    assert log_w.shape == (4096,) and abs(np.log(np.exp(log_w).mean())) < 0.1
    mean = np.average(weighted["mu"].values[0], axis=0, weights=np.exp(log_w))
    assert np.abs(mean - [1.0, -2.0]).max() < 0.06
    told = posterior.attrs
    assert told["log_z"] == evaluation.log_z.value and told["log_z_stderr"] == evaluation.log_z.stderr
    assert told["verdict"] == evaluation.verdict and told["method"] == "tempered-smc"
    assert told["evaluations"] == solution.problem.density.evaluations > solution.evaluations
    assert tree.attrs["log_z"] == told["log_z"]


def test_the_same_draws_in_a_frame_and_in_arviz(solution: Any) -> None:
    frame = solution.to_dataframe(500, seed=3)
    tree = solution.to_arviz(500, seed=3, evaluation=solution.evaluate(1024, seed=1))
    assert list(frame.columns) == ["mu[0]", "mu[1]", "tau"] and len(frame) == 500
    np.testing.assert_array_equal(frame["mu[1]"], tree["posterior"]["mu"].values[0, :, 1])
    np.testing.assert_array_equal(frame["tau"], tree["posterior"]["tau"].values[0])
    assert abs(frame["mu[1]"].mean() + 2) < 0.15 and abs(frame["mu[0]"].mean() - 1) < 0.15


def test_chains_stay_chains() -> None:
    problem = sc.gibbs_problem(lambda x: -0.5 * (x - 3).square().sum(1), names=["a", "b"], scale=2.0, centre=3.0)
    solution = sc.solve(problem, sc.MALA(num_chains=4, warm_up=200), seed=0)
    tree = solution.to_arviz(400, seed=1)
    assert tree["posterior"]["a"].shape == (4, 100) and tree["posterior"]["b"].shape == (4, 100)
    assert abs(float(tree["posterior"]["a"].mean()) - 3) < 0.4
    assert not tree["weighted_sample_stats"]["log_weight"].values.any()
    drawn = solution.coordinates_by_chain(400, 5)
    assert torch.equal(drawn, solution.coordinates_by_chain(400, 5)) and drawn.shape == (4, 100, 2)


def test_numbers_without_names_are_one_variable(solution: Any) -> None:
    problem = sc.gibbs_problem(lambda x: -0.5 * x.square().sum(1), 3, scale=1.0)
    tree = sc.solve(problem, sc.TemperedSMC(num_particles=64), seed=0).to_arviz(64, seed=0)
    assert tree["posterior"]["x"].shape == (1, 64, 3)


def test_corner_plot(solution: Any) -> None:
    """Its panels are those of the parameters asked for, at their own places; nothing is shown."""
    import matplotlib

    before = matplotlib.rcParams["backend"]
    figure, axes = solution.plot_corner(2000, seed=1, names=["tau", "mu[1]"], truth=[1.6, -2.0])
    assert axes.shape == (2, 2) and not axes[0, 1].get_visible() and matplotlib.rcParams["backend"] == before
    assert axes[1, 0].get_xlabel() == "tau" and axes[1, 0].get_ylabel() == "mu[1]"
    (low, high), (bottom, top) = axes[1, 0].get_xlim(), axes[1, 0].get_ylim()
    assert low < 0.1 and 3 < high < 12 and -5 < bottom < -3 < -1 < top < 1
    assert axes[1, 0].collections  # contours
    assert "mu[1] = -2.0" in axes[1, 1].get_title() or "mu[1] = -1.9" in axes[1, 1].get_title()
    figure.canvas.draw()
    assert solution.plot_corner(200, seed=1)[1].shape == (3, 3)
    with pytest.raises(ValueError, match=r"unknown parameter 'mu\[2\]'"):
        solution.plot_corner(200, names=["mu[2]"])
    with pytest.raises(ValueError, match="truth has 1 numbers, but 3"):
        solution.plot_corner(200, truth=[0.0])


def test_other_problems_have_no_posterior() -> None:
    solution = sc.solve(linear(), sc.LogVariance(), iterations=1, batch_size=64, time_steps=5, seed=0)
    for ask in (solution.to_arviz, solution.to_dataframe, solution.plot_corner):
        with pytest.raises(ValueError, match="only solutions of gibbs_problem have a posterior"):
            ask(64)
