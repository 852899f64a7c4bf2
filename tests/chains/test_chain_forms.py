"""What a chain says of itself: its scheme, its affine steps in float64, its copy in float64; and where a problem's
paths start."""

import pytest
import torch

import sdecontrol as sc

F32, F64 = torch.float32, torch.float64
A = torch.tensor([[-0.7, 0.2], [0.1, -0.3]])


def linear(start="fixed", initial=None, m=1):
    sde = sc.LinearSDE(A, torch.ones(2, m), torch.tensor([0.3, -0.1]), horizon=1.3)
    return sc.ControlProblem(sde, initial or sc.Gaussian(torch.ones(2), torch.tensor([0.2, 0.5])), start=start)


def stiff():
    return sc.ControlProblem(sc.SemilinearSDE(A, lambda x, t: x.sin(), 0.8), sc.Dirac(torch.zeros(2)))


def model(start):
    mixture = sc.GaussianMixture(
        torch.tensor([0.6, 0.4]).double(), torch.tensor([[-1.0, 0.0], [1.0, 0.5]]).double(), 0.3
    )
    return sc.ControlProblem(sc.generative_sde(mixture, schedule=sc.VP()), start=start)


def gaussian_model(start):
    cov = torch.tensor([[[0.5, 0.1], [0.1, 0.3]]], dtype=F64)
    law = sc.GaussianMixture(torch.ones(1, dtype=F64), torch.tensor([[0.5, -0.2]], dtype=F64), cov)
    return sc.ControlProblem(sc.generative_sde(law, schedule=sc.VP()), start=start)


CHAINS = {
    "euler": (linear().chain(4), "euler", True),
    "exact, noise of one dimension": (linear().chain(4, "exact"), "exact", True),
    "after a learned start": (linear("controlled").chain(4), "euler", True),
    "exact after a learned start": (linear("controlled", m=2).chain(4, "exact"), "exact", True),
    "exponential": (stiff().chain(4, "exponential"), "exponential", False),
    "exponential of a linear process": (linear().chain(4, "exponential"), "exact", True),
    "a mixture model": (model("fixed").chain(4), "exponential", False),
    "a mixture model, its start learned": (model("controlled").chain(4), "exponential", False),
    "a mixture model, Euler": (model("fixed").chain(4, "euler"), "euler", False),
    "a Gaussian model": (gaussian_model("fixed").chain(4), "exponential", True),
    "a Gaussian model, Euler": (gaussian_model("fixed").chain(4, "euler"), "euler", True),
    "a Gaussian model, exact, its start learned": (gaussian_model("controlled").chain(4, "exact"), "exact", True),
    "annealed": (
        sc.gibbs_problem(lambda x: -(x**4).sum(-1), 2, reference="annealed").chain(4, "euler"),
        "euler",
        False,
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_knows_its_scheme_and_its_affine_steps(name):
    chain, scheme, affine = CHAINS[name]
    assert chain.scheme == chain.main.scheme == scheme
    twin = chain.double()
    assert twin.clock == chain.clock and twin.times.dtype == F64 and twin.noise_shape == chain.noise_shape
    steps = chain.affine_steps()
    assert (steps is not None) == affine and len(steps or chain.clock[1:]) == chain.steps
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    close = lambda a, b, tol: torch.testing.assert_close(a.double(), b.double(), rtol=tol, atol=tol)  # noqa: E731
    for k in range(chain.steps):
        (mean, scale), (twin_mean, twin_scale) = chain.kernel(k, x.to(chain.times)), twin.kernel(k, x)
        assert mean.dtype == chain.times.dtype and twin_mean.dtype == F64
        close(mean, twin_mean, 1e-5)
        close(scale, twin_scale, 1e-6)
        if steps is None:
            continue
        matrix, shift, L, gain = steps[k]
        close(x @ matrix.mT + shift, twin_mean, 1e-6)
        whole = scale if scale.ndim == 3 else torch.diag_embed(scale.expand(1, 2))
        close((whole @ whole.mT)[0], L @ L.mT, 1e-6)
        u = torch.ones(len(x), gain.shape[1], dtype=F64)  # a learned start may have more controls than the process
        c = chain.shift_at(k, x, u.to(chain.times))
        close(c[:, : len(gain)], u @ gain.mT, 1e-5)


def test_a_chain_with_a_model_of_its_own_has_no_copy_in_float64():
    chain = sc.diffusion_chain(lambda x, n: x, torch.linspace(0.99, 0.01, 20), shape=(2,), steps=5)
    assert chain.scheme == "" and chain.affine_steps() is None
    with pytest.raises(TypeError, match="no copy in float64"):
        chain.double()


def test_linear_processes_say_so():
    sde = linear().reference
    assert sde.as_linear() is sde and sc.SDE(lambda x, t: -x, 1.0, dim=2).as_linear() is None
    assert model("fixed").reference.as_linear() is None and gaussian_model("fixed").reference.as_linear() is not None


@pytest.mark.parametrize(
    ("problem", "from_point", "random_start"),
    [
        (linear(initial=sc.Dirac(torch.zeros(2))), True, False),
        (linear("fixed"), False, True),
        (linear("controlled"), True, False),
        (model("controlled"), True, False),
        (model("memoryless"), False, False),
    ],
)
def test_a_problem_says_where_its_paths_start(problem, from_point, random_start):
    assert (problem.from_point, problem.random_start) == (from_point, random_start)
    states = problem.draw_start(64, 0)
    assert bool((states == states[0]).all()) == from_point
    torch.testing.assert_close(problem.origin.mean, problem.initial.mean)
