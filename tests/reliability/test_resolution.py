"""Float32 and the pilot's assumptions: what cannot be resolved, or was looked for elsewhere, is said by name; whether a
density is proper does not depend on its unit and origin."""

import pytest
import torch

import sdecontrol as sc
from sdecontrol.particles.resolution import resolution_problems

F32, F64 = torch.float32, torch.float64


def gaussian(mean, sd):
    def log_density(x):
        return torch.distributions.Normal(x.new_tensor(mean), x.new_tensor(sd)).log_prob(x).sum(1)

    return log_density


def moved(log_density, a, s):
    """The same density of ``a + s x``, up to a constant."""
    return lambda x: log_density((x - a) / s)


def flat(x):  # constant along (1, -1)
    return -0.5 * x.sum(1).square()


def rising(x):
    return x[:, 0] - 0.5 * x[:, 1].square()


def pole(x):
    return -3 * x.norm(dim=1).log() - 0.5 * x.square().sum(1)


MOVES = [(a * s, s) for s in (1e-6, 1e-3, 1.0, 1e3, 1e6) for a in (0.0, 30.0, 1e6)]


@pytest.mark.parametrize("a, s", MOVES)
def test_whether_a_density_is_proper_depends_on_no_unit_and_no_origin(a, s):
    problem = sc.gibbs_problem(moved(gaussian([0.0, 1.0], [1.0, 1.0]), a, s), 2, seed=0, dtype=F64)
    assert float(problem.scale.min()) / s > 1 and float(problem.scale.max()) / s < 8
    for improper in (flat, rising):
        with pytest.raises(sc.ImproperTarget):
            sc.gibbs_problem(moved(improper, a, s), 2, seed=0, dtype=F64).settle()


@pytest.mark.parametrize("s", [1e-6, 1.0, 1e6])
def test_a_pole_that_cannot_be_integrated_is_improper_in_every_unit(s):
    with pytest.raises(sc.ImproperTarget):
        sc.gibbs_problem(moved(pole, 0.0, s), 2, seed=0, dtype=F64).settle()


def test_float64_is_used_where_float32_cannot_resolve_the_target():
    """A time near day 2454833.5, known to 0.002: float32 numbers are 0.25 apart there."""
    problem = sc.gibbs_problem(gaussian([2454833.5], [0.002]), 1, seed=0)
    assert problem.dtype == F64
    evaluation = sc.solve(problem, sc.TemperedSMC(num_particles=256), seed=0, progress=False).evaluate(4096, seed=1)
    assert abs(evaluation.log_z.value) < 4 * evaluation.log_z.stderr + 0.02
    x = sc.solve(problem, sc.TemperedSMC(num_particles=256), seed=0, progress=False).sample(1000, seed=2)
    assert abs(float(x.mean()) - 2454833.5) < 5 * 0.002 / 1000**0.5 * 2 and 0.8 < float(x.std()) / 0.002 < 1.2
    assert sc.gibbs_problem(gaussian([0.5], [0.1]), 1, seed=0).dtype == F32  # where there is no need, nothing changes


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(sc.TemperedSMC(num_particles=64), id="smc", marks=pytest.mark.slow),
        pytest.param(sc.MALA(num_chains=64), id="mala"),
    ],
)
@pytest.mark.parametrize(
    "mean, sd, worst",
    [
        ([0.5, 2000.0], [1e-3, 1e3], 1),
        pytest.param([0.5, 0.0, 2000.0], [1e-3, 1.0, 1e3], 2, marks=pytest.mark.slow),
    ],
)
def test_a_target_outside_of_what_the_pilot_found_is_not_reliable(mean, sd, worst, method):
    problem = sc.gibbs_problem(gaussian(mean, sd), len(mean), seed=0)
    evaluation = sc.solve(problem, method, seed=0, progress=False).evaluate(4096, seed=1)
    assert not evaluation.reliable and f"x[{worst}] has mean" in evaluation.reliability
    assert "outside of the reference" in evaluation.reliability
    if isinstance(method, sc.TemperedSMC):  # the particles of a certificate are no better
        certificate = sc.certify(
            sc.solve(problem, sc.BestOfN(n=1, selection="softmax"), seed=0, progress=False), n=512, seed=2
        )
        assert any(f"x[{worst}] has mean" in alarm for alarm in certificate.alarms)


def test_the_words_are_those_of_the_case():
    problem = sc.gibbs_problem(gaussian([0.0, 0.0], [1.0, 1.0]), 2, centre=0.0, scale=1.5, seed=0)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 2, generator=generator)
    assert resolution_problems(problem, z) == []
    assert resolution_problems(problem, z, torch.randn(4000, generator=generator)) == []
    for x, log_w, word in [
        (z * torch.tensor([1.0, 40.0]), None, r"x[1] has mean"),
        (z + torch.tensor([20.0, 0.0]), None, r"x[0] has mean 20"),
        (z * torch.tensor([1e-3, 1.0]), None, r"times less than the reference's scale 1.5"),
        (z * 1e-3 + 1e5, None, r"numbers are 0.01 apart: use dtype=torch.float64"),
        (torch.ones(64, 2), None, r"numbers are 1e-07 apart"),
        (torch.cat((z, z + 20)), torch.cat((torch.full((4000,), -50.0), torch.zeros(4000))), r"has mean 20"),
    ]:
        assert word in resolution_problems(problem, x, log_w)[0]
    assert resolution_problems(problem, torch.zeros(4, 2, dtype=torch.int64)) == []
