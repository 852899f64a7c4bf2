"""Densities as people have them: numpy, one point at a time, dictionaries, supports, priors, workers. Each form gives
the log density of the plain one, and Z is the evidence in the user's own parameters."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    Categorical,
    Dirichlet,
    Exponential,
    HalfCauchy,
    LogNormal,
    MultivariateNormal,
    Normal,
    Uniform,
    constraints,
)

import sdecontrol as sc
from sdecontrol.problems.parameters import Parameters, parameters_of

F64 = torch.float64
ZEROS = torch.zeros(2)
Z = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=F64)


def plain(x: Tensor) -> Tensor:
    return -0.5 * (x - 0.3).square().sum(1) + torch.sin(x[:, 0])


def by_numpy(x: np.ndarray) -> np.ndarray:
    return -0.5 * np.square(np.asarray(x) - 0.3).sum(1) + np.sin(np.asarray(x)[:, 0])


def of_numpy_alone(x: np.ndarray) -> np.ndarray:
    assert isinstance(x, np.ndarray) and x.dtype == np.float64
    return by_numpy(x)


def of_one_point(x: np.ndarray) -> float:
    return float(-0.5 * np.square(np.asarray(x) - 0.3).sum() + np.sin(np.asarray(x)[0]))


def of_one_tensor(x: Tensor) -> Tensor:
    return -0.5 * (x - 0.3).square().sum() + torch.sin(x[0])


def of_a_dictionary(v: dict[str, Any]) -> Any:
    return (
        -0.5 * (v["a"] - 0.3) ** 2 - 0.5 * (v["b"] - 0.3) ** 2 + (torch if torch.is_tensor(v["a"]) else np).sin(v["a"])
    )


FORMS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "numpy": (by_numpy, {}, False),
    "numpy, which refuses tensors": (of_numpy_alone, {}, False),
    "numpy, said": (of_numpy_alone, {"arrays": "numpy"}, False),
    "numpy, with a score": (of_numpy_alone, {"score": lambda x: 0.3 - x + np.cos(x) * np.array([1.0, 0.0])}, True),
    "one point": (of_one_point, {"vectorised": False}, False),
    "one point, a tensor": (of_one_tensor, {"vectorised": False}, True),
    "float64": (lambda x: plain(x.double()), {}, True),
    "dictionary": (of_a_dictionary, {"names": {"a": (), "b": ()}}, True),
    "dictionary, numpy": (of_a_dictionary, {"names": {"a": (), "b": ()}, "arrays": "numpy"}, False),
    "dictionary, one point": (of_a_dictionary, {"names": {"a": (), "b": ()}, "vectorised": False}, True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_plain_log_density(form: str) -> None:
    function, how, smooth = FORMS[form]
    dim = {} if "names" in how else {"dim": 2}
    problem = sc.gibbs_problem(function, scale=2.0, **dim, **how)
    assert problem.dtype == F64 and problem.dim == 2 and problem.has_gradient == smooth
    torch.testing.assert_close(problem.density.value(Z), plain(Z))
    if smooth:
        leaf = Z.clone().requires_grad_(True)
        wanted = torch.autograd.grad(plain(leaf).sum(), leaf)[0]
        torch.testing.assert_close(problem.density.value_and_score(Z)[1], wanted)


def test_conditions_reach_one_point_with_its_own() -> None:
    def density(x: np.ndarray, y: np.ndarray) -> float:
        return float(-0.5 * np.sum((np.asarray(x) - np.asarray(y)) ** 2))

    law = torch.distributions.Uniform(torch.zeros(2), torch.ones(2))
    problem = sc.gibbs_problem(density, 2, scale=1.0, condition=law, vectorised=False)
    y = torch.rand(9, 2)
    torch.testing.assert_close(problem.density.value(Z, y), -0.5 * (Z - y).square().sum(1))


# ------------------------------------------------------------------ workers


@pytest.mark.parametrize(
    "workers", [ThreadPoolExecutor(3), pytest.param(2, marks=pytest.mark.slow)], ids=["threads", "2"]
)
def test_workers_give_the_same_in_the_same_order(workers: Any) -> None:
    one, many = (sc.gibbs_problem(of_one_point, 2, scale=2.0, vectorised=False, workers=w) for w in (None, workers))
    x = torch.randn(101, 2, dtype=F64)
    assert torch.equal(one.density.value(x), many.density.value(x))
    assert many.density.values == one.density.values - 2  # tried with numpy's arrays at once


def fails_at_large_values(x: np.ndarray) -> float:
    if x[0] > 2.5:
        raise ArithmeticError("too large for the solver")
    return -0.5 * float(x @ x)


@pytest.mark.slow
def test_what_a_worker_raises_is_named() -> None:
    problem = sc.gibbs_problem(fails_at_large_values, 2, scale=2.0, vectorised=False, workers=2)
    assert torch.isfinite(problem.density.value(torch.zeros(9, 2, dtype=F64))).all()
    with pytest.raises(RuntimeError, match="log_density failed in a worker process: ArithmeticError: too large"):
        problem.density.value(3 * torch.ones(9, 2, dtype=F64))


def test_where_it_raises_at_some_points_the_density_counts_as_0() -> None:
    """A law that refuses an infinite scale, a solver that breaks down: said once, with the error; each point of a
    function of one is asked for once, and an error at all points of a batch is one."""
    x = torch.cat((Z, torch.full((2, 2), 4.0, dtype=F64)))

    def strict(x: Tensor) -> Tensor:
        if bool((x > 3).any()):
            raise ValueError("x is too large for the solver.")
        return plain(x)

    problem = sc.gibbs_problem(strict, 2, scale=0.1)
    with pytest.warns(UserWarning, match="log_density raised ValueError at 2 of 11 points: x is too large") as told:
        value, score = problem.density.value_and_score(x)
        problem.density.value(x)
    assert len(told) == 1 and bool((value[9:] == -math.inf).all()) and problem.density.user.refused == 4
    wanted = torch.autograd.grad(plain(leaf := Z.clone().requires_grad_(True)).sum(), leaf)[0]
    torch.testing.assert_close(value[:9], plain(Z))
    torch.testing.assert_close(score[:9], wanted)
    with pytest.raises(ValueError, match="too large for the solver"):
        problem.density.value(x[9:])
    alone = sc.gibbs_problem(fails_at_large_values, 2, scale=0.1, vectorised=False)
    before = alone.density.values
    with pytest.warns(UserWarning, match="raised ArithmeticError at 2 of 11 points"):
        value = alone.density.value(x)
    assert alone.density.values - before == 11 and bool((value[9:] == -math.inf).all())
    torch.testing.assert_close(value[:9], -0.5 * Z.square().sum(1))


def test_what_cannot_go_to_processes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"log_density cannot go to worker processes .* top level of a module"):
        sc.gibbs_problem(lambda x: 0.0, 2, vectorised=False, workers=2)
    with pytest.raises(ValueError, match="workers goes with vectorised=False"):
        sc.gibbs_problem(by_numpy, 2, workers=2)
    with pytest.raises(ValueError, match="workers must be >= 1"):
        sc.gibbs_problem(of_one_point, 2, vectorised=False, workers=0)
    with pytest.raises(TypeError, match="workers must be a number of processes, an executor"):
        sc.gibbs_problem(of_one_point, 2, vectorised=False, workers="many")  # type: ignore[arg-type]


# ------------------------------------------------------------------ supports


#: laws whose density integrates to 1 in their own parameters, whatever coordinates a sampler moves in
LAWS: dict[str, Any] = {
    "positive": LogNormal(0.3, 0.8),
    "interval": Uniform(2.0, 5.0),
    "unit interval": Beta(2.0, 3.0),
    "above a bound": torch.distributions.Pareto(1.5, 6.0),
    "a vector": MultivariateNormal(torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 0.4], [0.4, 0.5]])),
    "the simplex": Dirichlet(torch.tensor([2.0, 1.0, 3.0])),
    "a simplex with poles": Dirichlet(torch.tensor([0.5, 0.5])),
    "a correlation's root": torch.distributions.LKJCholesky(2, 1.5),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("as_prior", [False, True], ids=["support", "prior"])
def test_the_evidence_is_that_of_the_users_own_parameters(name: str, as_prior: bool) -> None:
    """A grid over the coordinates, or 2e5 draws in two dimensions: the integral of a normalised law is 1, and e^2 with
    a log likelihood of 2. Without the Jacobian it is off by tens of per cent."""
    law = LAWS[name]
    shape = tuple(law.batch_shape) + tuple(law.event_shape)
    if as_prior:
        problem = sc.gibbs_problem(
            log_likelihood=lambda v: 0 * v["v"].reshape(len(v["v"]), -1).sum(1) + 2, prior={"v": law}
        )
    else:
        problem = sc.gibbs_problem(lambda v: law.log_prob(v["v"]) + 2, names={"v": shape}, support={"v": law.support})
    assert problem.dtype == F64 or not as_prior  # some of torch's laws give float32 for their own numbers of float32
    if problem.dim == 1:
        x = torch.linspace(-40, 40, 160_001, dtype=problem.dtype).unsqueeze(1)
        total = float(torch.trapezoid(problem.density.value(x).exp(), x[:, 0]))
        assert total == pytest.approx(math.e**2, rel=1e-4)
    else:
        proposal = MultivariateNormal(torch.zeros(2, dtype=F64), 5 * torch.eye(2, dtype=F64))
        x = proposal.sample((200_000,))
        w = (problem.density.value(x.to(problem.dtype)) - proposal.log_prob(x)).exp() / math.e**2
        assert abs(float(w.mean()) - 1) < 4 * float(w.std()) / len(w) ** 0.5 < 0.03


@pytest.mark.parametrize("name", LAWS)
def test_values_and_coordinates_are_inverse(name: str) -> None:
    law = LAWS[name]
    parameters = parameters_of(None, None, None, {"v": law})
    x = torch.randn(7, parameters.dim, dtype=F64)
    value = parameters(x)["v"]
    assert value.shape == (7, *law.batch_shape, *law.event_shape) and bool(law.support.check(value).all())
    torch.testing.assert_close(parameters.coordinates({"v": value}), x)
    drawn = parameters.draw_prior(4000, 0, x)
    again = parameters(drawn)["v"]
    wanted = law.sample((4000,)).double()
    error = (again.std(0) + wanted.std(0)) / 4000**0.5
    assert bool(((again.mean(0) - wanted.mean(0)).abs() < 4 * error + 1e-6).all())


def test_names_go_with_their_numbers() -> None:
    """In the order in which they were stated, whatever the alphabet says; each of its own shape."""
    prior = {"tau": HalfCauchy(5.0), "mu": Normal(0.0, 1.0)}
    stated = parameters_of(None, {"theta": (2, 2)}, {"theta": (0, None)}, prior)
    assert stated.labels == ("tau", "mu", "theta[0,0]", "theta[0,1]", "theta[1,0]", "theta[1,1]")
    x = torch.arange(6, dtype=F64).unsqueeze(0)
    v = stated(x)
    assert float(v["tau"]) == pytest.approx(1.0) and float(v["mu"]) == 1.0
    torch.testing.assert_close(v["theta"][0], torch.tensor([[2.0, 3.0], [4.0, 5.0]], dtype=F64).exp())
    torch.testing.assert_close(stated.flat(x)[0, 2:], v["theta"].flatten())
    values, ladj, _ = stated.constrained(x)
    assert float(ladj) == pytest.approx(0 + 2 + 3 + 4 + 5)
    wanted = prior["tau"].log_prob(torch.tensor(1.0)) + prior["mu"].log_prob(torch.tensor(1.0))
    assert float(stated.log_prior(values)) == pytest.approx(float(wanted))


def test_a_list_of_supports_names_the_columns() -> None:
    def density(x: np.ndarray) -> np.ndarray:
        assert (x[:, 0] > 0).all() and (np.abs(x[:, 1]) <= 1).all()
        return -x[:, 0] + 0 * x[:, 1]

    problem = sc.gibbs_problem(density, names=["rate", "slope"], support=[(0, None), (-1, 1)], arrays="numpy")
    assert problem.parameters.labels == ("rate", "slope") and problem.dim == 2
    solution = sc.solve(problem, sc.TemperedSMC(num_particles=512), seed=0)
    x = solution.sample(4096, seed=1)
    assert (
        isinstance(x, Tensor) and x.shape == (4096, 2) and float(x[:, 0].min()) > 0 and float(x[:, 1].abs().max()) < 1
    )
    assert abs(float(x[:, 0].mean()) - 1) < 0.1 and abs(float(x[:, 1].mean())) < 0.06
    log_z = solution.evaluate(4096, seed=2).log_z
    assert abs(log_z.value - math.log(2.0)) < 4 * log_z.stderr < 0.1
    raw = solution.sample(4096, seed=1, raw=True)
    torch.testing.assert_close(problem.parameters(raw), x)
    torch.testing.assert_close(problem.coordinates_of(x), raw)


def test_the_function_never_sees_what_is_outside_of_the_support() -> None:
    seen = []

    def density(x: np.ndarray) -> np.ndarray:
        seen.append(x.copy())
        return -x.sum(1)

    problem = sc.gibbs_problem(density, 2, support=(0, None), arrays="numpy").settle()  # the pilot goes to 1e6
    asked = np.concatenate(seen)
    assert np.isfinite(asked).all() and (asked >= 0).all() and math.isfinite(float(problem.scale.max()))
    far = problem.density.value(torch.tensor([[1e4, 0.0], [0.0, 0.0]], dtype=F64))
    assert float(far[0]) == -math.inf and float(far[1]) == -2.0


def test_weights_gradients_and_other_methods_work_in_coordinates() -> None:
    """A learned control and its certificate, with samples of the target in the user's form."""
    law = LogNormal(0.0, 0.5)
    problem = sc.gibbs_problem(lambda v: law.log_prob(v["v"]), names={"v": ()}, support={"v": "positive"})
    solution = sc.solve(problem, sc.LogVariance(), iterations=40, batch_size=64, time_steps=20, seed=0)
    v, log_w = solution.weighted_sample(4096, seed=1)
    w = log_w.double().exp()
    assert set(v) == {"v"} and v["v"].shape == (4096,) and float(v["v"].min()) > 0
    assert abs(float(w.mean()) - 1) < 5 * float(w.std()) / 64
    torch.manual_seed(0)
    assert math.isfinite(sc.certify(solution, {"v": law.sample((256,))}, n=256, seed=2).eubo.value)
    with pytest.raises(ValueError, match="values lack the parameter 'v'"):
        sc.certify(solution, {"w": law.sample((256,))}, n=256, seed=2)


def test_a_saved_solution_speaks_the_same_parameters(tmp_path: Any) -> None:
    problem = sc.gibbs_problem(of_a_dictionary, names={"a": (), "b": ()}, support={"a": (0, 1)})
    solution = sc.solve(problem, sc.TemperedSMC(num_particles=64), seed=0)
    solution.save(tmp_path)
    again = sc.load(tmp_path, sc.gibbs_problem(of_a_dictionary, names={"a": (), "b": ()}, support={"a": (0, 1)}))
    for name, value in solution.sample(64, seed=1).items():
        assert torch.equal(value, again.sample(64, seed=1)[name])


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "how, error, message",
    [
        ({"dim": 3, "names": ["a", "b"]}, ValueError, "names has 2, dim is 3"),
        ({"dim": None}, TypeError, "dim is missing: the number of parameters"),
        ({"names": ["a", "a"]}, ValueError, "names has 'a' twice"),
        ({"names": "ab"}, TypeError, "names must be a list of strings"),
        ({"support": "positiv"}, ValueError, "did you mean 'positive'"),
        ({"support": (1, 0)}, ValueError, "low end below its high end"),
        ({"support": constraints.greater_than}, TypeError, r"an instance: greater_than\(0.0\)"),
        ({"support": constraints.boolean}, ValueError, "support is discrete"),
        ({"support": ["simplex", "real"]}, ValueError, r"support of x\[0\]: .* does not fit values of shape \(\)"),
        ({"dim": 1, "support": "simplex"}, ValueError, "does not fit"),
        ({"dim": 2, "support": "corr_cholesky"}, ValueError, "does not fit"),
        ({"support": [(0, 1)]}, ValueError, "support has 1, dim is 2"),
        ({"support": {"a": (0, 1)}, "names": ["b", "c"]}, ValueError, "unknown parameter in support 'a'"),
        ({"prior": Normal(ZEROS, 1.0)}, TypeError, "prior goes with log_likelihood"),
        ({"log_likelihood": by_numpy}, TypeError, "both given"),
        ({"log_density": None, "log_likelihood": by_numpy}, TypeError, "log_likelihood needs prior="),
        ({"log_density": None}, TypeError, "log_density is missing"),
        ({"arrays": "jax"}, ValueError, "unknown arrays 'jax'"),
        ({"vectorised": 1}, TypeError, "vectorised must be True or False"),
        ({"log_density": lambda x: np.zeros(3)}, ValueError, r"log_density must return shape \(6,\), got \(3,\)"),
        ({"log_density": lambda x: 1.0}, TypeError, r"got float.* torch.as_tensor.* vectorised=False"),
        ({"log_density": lambda x: np.zeros((len(x), 1))}, ValueError, r"drop it by \[:, 0\]"),
        ({"log_density": lambda x: np.array(["a"] * len(x))}, TypeError, "must return numbers"),
        (
            {"log_density": lambda x: np.zeros(2), "vectorised": False},
            ValueError,
            "one number for one point",
        ),
        ({"log_density": lambda x: x.std(1)}, ValueError, "say which it is written for by arrays="),
        ({"names": {"a": (), "b": ()}, "score": by_numpy}, ValueError, "score goes with a vector"),
    ],
)
def test_bad_input_is_named(how: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sc.gibbs_problem(**{"log_density": by_numpy, "dim": 2, **how})


@pytest.mark.parametrize(
    "prior, error, message",
    [
        ({"a": 3.0}, TypeError, "prior of a must be a torch distribution"),
        ({"a": Categorical(torch.ones(3))}, ValueError, "support of a is discrete"),
        ({}, ValueError, "prior is empty"),
        (3.0, TypeError, "prior must be a torch distribution of the whole vector"),
        ({3: Normal(0.0, 1.0)}, TypeError, "names must be strings"),
    ],
)
def test_bad_priors_are_named(prior: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sc.gibbs_problem(log_likelihood=lambda v: 0.0, dim=None if isinstance(prior, dict) else 1, prior=prior)


def test_a_list_of_priors_and_one_of_the_whole_vector() -> None:
    both = [
        sc.gibbs_problem(log_likelihood=lambda v: 0 * v.sum(1), prior=prior)
        for prior in ([Normal(0.0, 1.0), Exponential(2.0)], MultivariateNormal(ZEROS, torch.eye(2)))
    ]
    listed = Normal(0.0, 1.0).log_prob(Z[:, 0]) + Exponential(2.0).log_prob(Z[:, 1].exp()) + Z[:, 1]
    torch.testing.assert_close(both[0].density.value(Z), listed)
    torch.testing.assert_close(both[1].density.value(Z), -0.5 * Z.square().sum(1) - math.log(2 * math.pi))


def test_priors_of_single_precision_are_evaluated_in_double() -> None:
    law = MultivariateNormal(ZEROS, torch.tensor([[1.0, 0.4], [0.4, 0.5]]))
    density = sc.gibbs_problem(log_likelihood=lambda v: 0 * v.sum(1), prior=law).density
    exact = MultivariateNormal(law.loc.double(), law.covariance_matrix.double()).log_prob(Z)
    torch.testing.assert_close(density.value(Z), exact, rtol=1e-6, atol=1e-7)
    step = torch.tensor([1e-9, 0.0], dtype=F64)
    assert bool((density.value(Z + step) != density.value(Z)).any())  # in single precision they are the same
    scaled = torch.distributions.TransformedDistribution(
        Normal(0.0, 1.0), [torch.distributions.AffineTransform(torch.tensor(0.1), torch.tensor(3.0))]
    )
    density = sc.gibbs_problem(log_likelihood=lambda v: 0 * v["v"], prior={"v": scaled}).density
    wanted = Normal(float(torch.tensor(0.1)), 3.0).log_prob(Z[:, 0])
    torch.testing.assert_close(density.value(Z[:, :1]), wanted, rtol=1e-6, atol=1e-6)


def test_many_free_numbers_cost_no_transform() -> None:
    assert parameters_of(1000, None, None, None).identity
    assert isinstance(parameters_of(3, ["a", "b", "c"], None, None), Parameters)
