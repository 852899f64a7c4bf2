"""``auto`` on densities with known log Z: what it finds, keeps, says and counts; and that stopping and going on changes
nothing."""

import copy
import dataclasses
import importlib
import math
import types

import pytest
import torch
from cases import F64, Counted, slow_but

import sdecontrol as sc
from sdecontrol.comparison import auto
from sdecontrol.controls.given import ZeroControl
from sdecontrol.controls.mixture import MixtureControl
from sdecontrol.evaluation.estimates import mean_estimate
from sdecontrol.evaluation.tempered_solution import TemperedSettings, tempered_target
from sdecontrol.methods.base import Run
from sdecontrol.particles.adaptive_importance import SYSTEMS
from sdecontrol.particles.ascent import Ascent
from sdecontrol.particles.tempering import run_tempered
from sdecontrol.problems.density import LogDensity
from sdecontrol.problems.pilot import search

SMALL = sc.Auto(num_particles=512)


def banana(x):
    return -0.5 * (x[:, 0] / 1.5).square() - 0.5 * ((x[:, 1] - 0.7 * x[:, 0].square() + 1) / 0.3).square()


def ring(x):
    return -0.5 * ((x.norm(dim=1) - 3) / 0.2).square()


def unequal(x):
    """Two correlated Gaussians twelve standard deviations apart, 0.9 of the mass in one."""
    first = -0.5 * ((x - 3) / torch.tensor([0.5, 0.3]).to(x)).square().sum(1) + math.log(0.9 / (0.5 * 0.3))
    u, v = x[:, 0] + x[:, 1] + 6, x[:, 0] - x[:, 1]
    second = -0.5 * ((u / 0.8).square() + (v / 0.3).square()) + math.log(0.1 * 2 / (0.8 * 0.3))
    return torch.logaddexp(first, second)


def annulus(x):
    """A hard constraint with no density at the centre."""
    r = x.norm(dim=1)
    return torch.where((r > 2) & (r < 3), -x[:, 0], -math.inf)


def quadrature(density, reach=12.0, points=3001):
    line = torch.linspace(-reach, reach, points, dtype=torch.float64)
    step = float(line[1] - line[0])
    return float(
        torch.stack(
            [density(torch.stack((torch.full_like(line, float(a)), line), 1)).logsumexp(0) for a in line]
        ).logsumexp(0)
    ) + 2 * math.log(step)


def told(solution):
    """All numbers of all rounds (some are nan), and the report."""
    return repr((solution.history, solution.details))


def close(estimate, truth, most=0.02):
    assert estimate.stderr < most, estimate
    assert abs(estimate.value - truth) < 4 * estimate.stderr, (estimate, truth)


@pytest.mark.slow
@pytest.mark.parametrize("density", slow_but([ring, unequal, banana, annulus], unequal))
def test_log_z_of_densities_in_the_plane(density):
    """Within four standard errors of the integral on a grid; the report has a line for every round and one for what was
    kept; samples lie where the density does."""
    problem = sc.gibbs_problem(density, 2)
    solution = sc.solve(problem, SMALL, seed=0)
    evaluation = solution.evaluate(8192, seed=1)
    close(evaluation.log_z, quadrature(density))
    lines = solution.details["report"].splitlines()
    assert len(lines) == solution.iterations + 1 and lines[-1].startswith("kept: ")
    assert "a wide Gaussian" in lines[0] and all("from the mixture" in line for line in lines[1:-1])
    assert ("Mixture(" in lines[-1]) == isinstance(solution.control, MixtureControl) == solution.tempering.mixture
    x = solution.sample(4096, seed=2)
    assert bool(torch.isfinite(density(x)).all())
    if density is unequal:
        assert abs(float((x[:, 0] > 0).double().mean()) - 0.9) < 0.02
    if density is annulus:
        assert abs(float(x[:, 0].mean()) - annulus_mean()) < 0.15


def annulus_mean():
    line = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    x = torch.cartesian_prod(line, line)
    return float((annulus(x).softmax(0) * x[:, 0]).sum())


@pytest.mark.slow
def test_all_nine_modes_and_what_that_cost():
    """gmm9: log Z = 0, every mode with its ninth, a control whose own paths agree, and evaluations that are exactly the
    density's rows, spent on better beginnings: no round after the first costs more than it."""
    target = sc.library.named_target("gmm9")
    density = Counted(target)
    problem = sc.gibbs_problem(density, 2).settle()
    before, counted = density.rows, problem.density.evaluations
    solution = sc.solve(problem, SMALL, seed=0)
    own = problem.density.evaluations - counted  # a value with its gradient as two
    assert own == int(solution.history[-1]["evaluations"]) + 2 * solution.evaluations
    known, before = solution.evaluations, density.rows
    x = solution.sample(4096, seed=2)
    assert density.rows - before == solution.evaluations - known > 4096
    shares = torch.bincount(torch.cdist(x.double(), target.modes).argmin(1), minlength=9) / 4096
    assert float((shares - 1 / 9).abs().max()) < 0.03
    close(solution.evaluate(8192, seed=1).log_z, 0.0)
    assert isinstance(solution.control, MixtureControl)
    found = sc.certify(solution, target.sample(2048, 3), modes=target.modes, n=2048, seed=4)
    assert not found.collapsed, str(found)
    costs = [row["cost"] for row in solution.history]
    assert max(costs[1:]) < costs[0] and min(costs) < 0.1 * costs[0], costs
    assert solution.iterations < SMALL.default_iterations  # two rounds without a change end it


def test_where_learning_does_not_pay_the_gaussian_is_kept(tmp_path):
    """A target that is nearly the Gaussian that particles begin with; and the same where only one round is made."""
    problem = sc.gibbs_problem(lambda x: -0.5 * (x / 1.99).square().sum(1), 3, scale=1.0)
    for settings in ({}, {"iterations": 1}):
        solution = sc.solve(problem, SMALL, seed=0, **settings)
        assert isinstance(solution.control, ZeroControl) and not solution.tempering.mixture
        assert "learning did not pay" in solution.details["report"]
        close(solution.evaluate(4096, seed=1).log_z, 3 * math.log(1.99 * math.sqrt(2 * math.pi)))
    solution.save(tmp_path / "run")
    loaded = sc.load(tmp_path / "run", problem)
    assert loaded.details == solution.details
    assert torch.equal(loaded.sample(100, seed=1), solution.sample(100, seed=1))


@pytest.mark.slow
def test_the_same_seed_a_saved_one_and_another_reference(tmp_path):
    """The same numbers, bit for bit; the kind of reference matters to the control alone."""
    problem = sc.gibbs_problem(unequal, 2, scale=4.0)
    a, b = (sc.solve(problem, SMALL, iterations=2, seed=5) for _ in range(2))
    assert told(a) == told(b)
    x = a.sample(200, seed=1)
    assert torch.equal(x, b.sample(200, seed=1))
    a.save(tmp_path / "run")
    loaded = sc.load(tmp_path / "run", problem)
    assert torch.equal(x, loaded.sample(200, seed=1)) and loaded.details == a.details
    assert torch.equal(loaded.control.means, a.control.means) and loaded.method == "auto"
    again = loaded.evaluate(4096, seed=3)
    assert again.log_z.value == a.evaluate(4096, seed=3).log_z.value
    other = sc.solve(sc.gibbs_problem(unequal, 2, "brownian", 4.0), SMALL, iterations=2, seed=5)
    assert torch.equal(x, other.sample(200, seed=1))
    assert sc.solve(problem, SMALL, iterations=1, seed=6).history[0]["log_z"] != a.history[0]["log_z"]


@pytest.mark.parametrize("stop", [1, 3])
def test_stopped_and_resumed_it_ends_with_the_same_numbers(tmp_path, stop):
    problem = sc.gibbs_problem(ring, 2, scale=2.5)
    method = sc.Auto(num_particles=128)
    whole = sc.solve(problem, method, iterations=3, seed=0)

    class Stop:
        def on_step_end(self, state):
            if state.iteration == stop:
                raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="auto was interrupted after"):
        there = sc.solve(problem, method, iterations=3, seed=0, checkpoint_dir=tmp_path, callbacks=[Stop()])
    assert there.iterations == stop and not there.reproducible and there.details["interrupted"]
    resumed = sc.solve(problem, method, iterations=3, seed=0, checkpoint_dir=tmp_path, resume=True)
    assert told(resumed) == told(whole)
    assert torch.equal(whole.sample(64, seed=1), resumed.sample(64, seed=1))


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path):
    """Its rounds had ended by themselves: none is added."""
    problem = sc.gibbs_problem(unequal, 2, scale=4.0)
    settings = {"seed": 0, "checkpoint_dir": tmp_path}
    whole = sc.solve(problem, SMALL, **settings)
    assert whole.iterations < SMALL.default_iterations
    again = sc.solve(problem, SMALL, resume=True, **settings)
    assert told(again) == told(whole)
    assert torch.equal(whole.sample(64, seed=1), again.sample(64, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("density", "evaluations"), slow_but([(ring, 310_000), (banana, 400_000), (unequal, 2_000_000)], (ring, 310_000))
)
def test_evaluations_bound_everything(density, evaluations, monkeypatch):
    """Pilot, search, rounds, estimate and whatever is asked of the solution after them: no more than was said, with
    a value and its gradient as two, all of them told, and log Z within four standard errors."""
    monkeypatch.setattr(auto, "FEW_DIMENSIONS", 0)
    problem = sc.gibbs_problem(density, 2)
    solution = sc.solve(problem, sc.Auto(1024, evaluations), seed=0)
    counted = solution.details["evaluations"]
    assert set(counted) == {"probe", "pilot", "search", "rounds", "estimate", "total"}
    assert counted["total"] == problem.density.evaluations <= evaluations
    assert sum(n for name, n in counted.items() if name != "total") == counted["total"]
    close(solution.evaluate(4096, seed=1).log_z, quadrature(density))
    solution.sample(4096, seed=1)
    assert problem.density.evaluations == counted["total"]
    found = solution.evaluate(4096, seed=1)  # a mixture's tails are lighter than those of the banana's ends
    assert len(solution.draws.log_w) == SYSTEMS
    assert found.verdict == "unconfirmed" or (
        density is banana and found.reliability.startswith("heavy-tailed weights")
    )


class Interrupted:
    """A density that is interrupted (Ctrl-C) at one of its calls."""

    def __init__(self, density, at):
        self.density, self.at, self.calls = density, at, 0

    def __call__(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.density(x)


def interrupted_at(density, at, method, **settings):
    function = Interrupted(density, at)
    problem = sc.gibbs_problem(function, 2, scale=2.5)
    with pytest.warns(UserWarning, match="auto was interrupted after"):
        return function, problem, sc.solve(problem, method, seed=0, **settings)


@pytest.mark.parametrize("evaluations", [None, 400_000])
def test_interrupted_in_its_first_round_it_gives_the_particles_on_their_way(evaluations, monkeypatch):
    """In the midst of a level: their weights towards the target, an error, and the word that it is no estimate yet."""
    monkeypatch.setattr(auto, "FEW_DIMENSIONS", 0)
    rows = Counted(ring)
    function, _, there = interrupted_at(rows, 214, sc.Auto(1024, evaluations))
    assert function.calls == 214 and there.iterations == 0 and there.details["interrupted"]
    found = there.evaluate(seed=1)
    assert found.verdict == "unreliable" and "before the estimate began" in found.reliability
    # weights in the midst of a level have tails for which the stated error is larger
    assert abs(found.log_z.value - quadrature(ring)) < 6 * found.log_z.stderr and found.log_z.stderr < 2
    before = rows.rows
    assert bool(torch.isfinite(ring(there.sample(100, seed=1))).all()) and rows.rows == before


@pytest.mark.slow
def test_interrupted_in_its_estimate_it_gives_the_systems_there_are_and_goes_on_to_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "FEW_DIMENSIONS", 0)
    method, settings = sc.Auto(256, 400_000), {"checkpoint_every": 1}
    whole = sc.solve(sc.gibbs_problem(ring, 2, scale=2.5), method, seed=0)
    rounds = sum("levels" in row for row in whole.history)
    assert whole.iterations == rounds + 4 and [row["systems"] for row in whole.history[rounds:]] == [4, 8, 12, 16]

    class Stop:
        def on_step_end(self, state):
            if state.iteration == rounds + 2:
                raise KeyboardInterrupt

    problem = sc.gibbs_problem(ring, 2, scale=2.5)
    with pytest.warns(UserWarning, match="auto was interrupted after"):
        there = sc.solve(problem, method, seed=0, checkpoint_dir=tmp_path, callbacks=[Stop()], **settings)
    assert torch.equal(there.draws.log_w, whole.draws.log_w[:8])
    close(there.evaluate(seed=1).log_z, quadrature(ring), 0.05)
    resumed = sc.solve(problem, method, seed=0, checkpoint_dir=tmp_path, resume=True, **settings)
    assert told(resumed) == told(whole)
    assert torch.equal(resumed.draws.log_w, whole.draws.log_w) and torch.equal(resumed.draws.x, whole.draws.x)


def test_a_round_that_its_evaluations_end_goes_to_the_target_at_once():
    """With weights that say how far that was; levels and moves within what was allowed."""
    problem = sc.gibbs_problem(sc.library.named_target("gmm9"), 2, scale=4.0)
    target = tempered_target(problem, problem.chain(5), None, TemperedSettings("states", True))
    whole = Ascent(target, 256, 0)
    whole.climb()
    for most in (300, 3000, 10**9):
        ascent = Ascent(target, 256, 0)
        ascent.climb(lambda work, own=ascent, most=most: own.work + work <= most)
        ladder, found = ascent.result()
        assert found.evaluations == ascent.work <= most
        assert float(ladder.betas[-1]) == 1.0 and bool((ladder.betas.diff() > 0).all())
        assert int(ladder.moves[-1]) == 0 or most == 10**9
        fixed = run_tempered(target, ladder, 400, 64, 1)  # such a ladder is one like any other
        assert fixed.evaluations == 400 * 64 * ladder.work
        close(mean_estimate(fixed.log_z.exp()), 1.0, 0.2)
    assert torch.equal(found.log_z, whole.result()[1].log_z)


def test_a_budget_that_is_over_at_once_gives_something_and_says_what_that_is():
    solution = sc.solve(sc.gibbs_problem(ring, 2, scale=2.5), sc.Auto(256), budget=1e-6, seed=0)
    found = solution.evaluate(seed=1)
    assert solution.iterations == 0 and found.verdict == "unreliable" and math.isfinite(found.log_z.value)
    assert bool(torch.isfinite(ring(solution.sample(10, seed=1))).all())


def test_what_is_left_for_the_estimate_makes_fewer_systems_or_none(monkeypatch):
    """Systems have 16 particles at least and are 4 at least; where that is more than is left there is no estimate, and
    the particles of the last round say so."""
    monkeypatch.setattr(auto, "FEW_DIMENSIONS", 0)
    problem, method = sc.gibbs_problem(ring, 2, scale=2.5), sc.Auto(256, 400_000)
    run = Run(problem, problem.chain(10), 64, 1, 0)
    begun = method.setup(run)
    for run.iteration in range(2):
        method.step(begun, run)
    begun.ready.fill_(1)
    made = []
    for left in (10, 100, 10_000, 1_000_000):
        state = copy.deepcopy(begun)
        state.allowance = dataclasses.replace(begun.allowance, evaluations=begun.used + auto.TRIED + left)
        run.iteration, rows = 2, problem.density.evaluations
        while not method.finished(state, run):
            method.step(state, run)
            run.iteration += 1
        systems, each = int(state.drawn), int(state.each)
        made.append(systems)
        assert systems == 0 or (systems >= 4 and each >= 16)
        assert problem.density.evaluations - rows <= auto.TRIED + left
        assert state.has_estimate == (systems > 0)
    assert made[0] == 0 and made[-1] == SYSTEMS and made == sorted(made) and 0 < made[1] < SYSTEMS, made


@pytest.mark.slow
def test_particles_in_coordinates_whose_scales_depend_on_none(tmp_path):
    """A funnel: particles begin with a law of its own coordinates, the control with a mixture that comes near; from a
    file they are the same, also where the reference had to be put elsewhere."""

    def funnel(x):
        power = x[:, :1] - 5
        given = -0.5 * (x[:, 1:].square() * (-power).exp() + power + math.log(2 * math.pi))
        return torch.distributions.Normal(5.0, 3.0).log_prob(x[:, 0]) + given.sum(1)

    problem = sc.gibbs_problem(funnel, 4, dtype=F64)
    solution = sc.solve(problem, SMALL, iterations=4, seed=0)
    assert solution.mapped is not None and "whose scales depend on none" in solution.details["report"]
    assert isinstance(solution.control, MixtureControl)
    close(solution.evaluate(8192, seed=1).log_z, 0.0, 0.03)
    x = solution.sample(8192, seed=2)
    assert abs(float(x[:, 0].mean()) - 5) < 0.15 and abs(float(x[:, 0].std()) / 3 - 1) < 0.05
    solution.save(tmp_path / "run")
    loaded = sc.load(tmp_path / "run", problem)
    assert torch.allclose(loaded.sample(100, seed=3), solution.sample(100, seed=3), atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "particles"), [(4.0, 1024), (20.0, 4096)])  # which rounds of so many can use
def test_a_budget_of_time_bounds_the_estimate_too(seconds, particles, monkeypatch):
    """By a clock that a row of the density moves by 20 microseconds (twice that with its gradient): pilot, search,
    rounds and estimate end in time, but for one move."""
    problem = sc.gibbs_problem(ring, 2)
    clock = types.SimpleNamespace(monotonic=lambda: 2e-5 * problem.density.evaluations)
    monkeypatch.setattr(importlib.import_module("sdecontrol.training.solve"), "time", clock)
    solution = sc.solve(problem, sc.Auto(particles), budget=seconds, seed=0)
    assert 0.5 * seconds < clock.monotonic() < 1.05 * seconds
    assert solution.history[-1]["systems"] >= 8
    found = solution.evaluate(seed=1)
    assert abs(found.log_z.value - quadrature(ring)) < 4 * found.log_z.stderr < 0.2, found.log_z


def test_few_evaluations_are_all_there_are():
    """In few dimensions importance sampling takes the place of particles, and none is asked for beyond them."""
    density = Counted(ring)
    solution = sc.solve(sc.gibbs_problem(density, 2), sc.Auto(evaluations=6000), seed=0)
    assert solution.method == "adaptive-importance"
    close(solution.evaluate(4096, seed=1).log_z, quadrature(ring), 0.05)
    solution.sample(4096, seed=1)
    assert density.rows <= 6000 == solution.details["evaluations"]["total"]


@pytest.mark.slow
def test_densities_without_a_gradient_or_with_a_score():
    """A black box is moved by values alone; a user's own score is used and never autograd's."""

    def black_box(x):
        return torch.from_numpy(unequal(x.detach()).numpy().copy())

    problem = sc.gibbs_problem(black_box, 2, scale=4.0)
    assert not problem.has_gradient
    solution = sc.solve(problem, SMALL, seed=0)
    truth = quadrature(unequal)
    close(solution.evaluate(8192, seed=1).log_z, truth)

    def score(x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            return torch.autograd.grad(unequal(leaf).sum(), leaf)[0]

    scored = sc.gibbs_problem(lambda x: unequal(x).detach(), 2, scale=4.0, score=score)
    solution = sc.solve(scored, SMALL, iterations=3, seed=0)
    close(solution.evaluate(8192, seed=1).log_z, truth)


@pytest.mark.parametrize(("dim", "scale"), slow_but([(1, 1e3), (3, 1e-3)], (1, 1e3)))
def test_any_scale_and_one_dimension(dim, scale):
    """Two wells in each coordinate, far from 0 and of size ``scale``, in float32, with nothing said of it."""

    def wells(x):
        z = x / scale - 20
        return torch.logaddexp(-2 * (z - 2).square(), math.log(2) - 2 * (z + 2).square()).sum(1)

    truth = dim * (math.log(3 * scale) + 0.5 * math.log(math.pi / 2))
    solution = sc.solve(sc.gibbs_problem(wells, dim), SMALL, seed=0)
    evaluation = solution.evaluate(8192, seed=1)
    close(evaluation.log_z, truth)
    x = solution.sample(4096, seed=2)
    assert float(((x / scale > 20).double().mean(0) - 1 / 3).abs().max()) < 0.04


@pytest.mark.slow
def test_scales_six_orders_apart_far_from_0(tmp_path):
    """Where the pilot's reference does not cover what the particles find, the solution has one that does: log Z,
    moments, a verdict that does not complain of it, a control whose paths end there, and the same from a file."""
    mean, sd = torch.tensor([0.5, 0.0, 2000.0], dtype=F64), torch.tensor([1e-3, 1.0, 1e3], dtype=F64)
    law = torch.distributions.Normal(mean, sd)
    problem = sc.gibbs_problem(lambda x: law.log_prob(x).sum(1), 3)
    solution = sc.solve(problem, sc.Auto(1024), seed=0)
    found = solution.evaluate(8192, seed=1)
    close(found.log_z, 0.0)
    assert found.verdict != "unreliable", found.reliability
    x = solution.sample(16384, seed=2).double()
    assert float(((x.mean(0) - mean) / sd).abs().max()) < 0.04 and float((x.std(0) / sd - 1).abs().max()) < 0.03
    assert bool(((solution.problem.scale.double() / sd - 1.25).abs() < 0.3).all())
    solution.save(tmp_path / "run")
    loaded = sc.load(tmp_path / "run", problem)
    assert torch.equal(loaded.sample(100, seed=3), solution.sample(100, seed=3))
    assert torch.equal(loaded.problem.scale, solution.problem.scale)
    own = sc.simulate(loaded.problem, 512, control=loaded.control, seed=4).log_weights()
    assert abs(float(own.double().logsumexp(0)) - math.log(512)) < 0.2


@pytest.mark.slow
def test_a_support_that_hardly_any_chain_meets():
    """A density that vanishes at the centre and nearly everywhere; and one that the search does not find at all, which
    is no error of the search."""

    def speck(x):
        return torch.where((x - 3).abs().amax(1) < 0.5, 0.0, -math.inf)

    problem = sc.gibbs_problem(speck, 2, centre=0.0, scale=3.0)
    solution = sc.solve(problem, sc.Auto(num_particles=1024), iterations=3, seed=0)
    close(solution.evaluate(8192, seed=1).log_z, 0.0, 0.05)
    x = search(LogDensity(lambda x: torch.where(x[:, 0] > 1e9, 0.0, -math.inf)), torch.zeros(2), torch.ones(()), 16, 0)
    assert x.shape == (0, 2)


def test_the_search_finds_wells_from_near_and_from_far():
    """Wells at 0.5 and at 20 reference scales from the centre: chains end in both, and each coordinate of an end is in
    a well."""
    problem = sc.gibbs_problem(lambda x: 0.0 * x[:, 0] - x.square().sum(1), 2, scale=1.0)
    centres = torch.tensor([[0.5, 0.0], [20.0, 0.0]])
    density = LogDensity(lambda x: (-50 * torch.cdist(x, centres).square()).logsumexp(1))
    density.probe(torch.randn(7, 2), None)
    known = density.values
    x = search(density, problem.centre, torch.tensor(1.0), 512, 0)
    distance, nearest = torch.cdist(x, centres).min(1)
    assert set(nearest.tolist()) == {0, 1} and float((distance < 0.5).double().mean()) > 0.9
    assert density.values - known <= 1 + 512 * 202


def test_the_search_begins_from_half_of_the_scale_to_eight_times_it():
    """In 200 dimensions the length of a Gaussian's draw says its scale, which is uniform in octaves from -1 to 3."""
    seen, n = [], 128

    def log_density(x):
        seen.append(x.detach())
        return -0.5 * x.square().sum(1)

    density = LogDensity(log_density)
    density.probe(torch.randn(7, 200), None)
    seen.clear()
    search(density, torch.zeros(200), torch.tensor(3.0), n, 0)
    octaves = (next(x for x in seen if len(x) == n).square().mean(1).sqrt() / 3).log2()
    assert -1.3 < float(octaves.min()) < -0.7 and 2.7 < float(octaves.max()) < 3.3
    assert abs(float(octaves.mean()) - 1) < 5 * 4 / (12 * n) ** 0.5


def test_a_round_that_loses_mass_is_not_kept(monkeypatch):
    """The mixture is kept where it is cheaper, unless its log Z is lower than the Gaussian's beyond half a nat and ten
    errors of both; every round has a seed of its own, and particles begin with the mixture a fifth wider than the
    control's."""
    problem, method, seeds = sc.gibbs_problem(unequal, 2, scale=4.0), sc.Auto(num_particles=512), []
    sizes = []

    def recorded(target, size, seed, **settings):
        seeds.append(seed)
        sizes.append(size)
        return Ascent(target, size, seed, **settings)

    monkeypatch.setattr(auto, "Ascent", recorded)
    run = Run(problem, problem.chain(10), 64, 1, 0)
    state = method.setup(run)
    for run.iteration in range(3):
        method.step(state, run)
    assert len(set(seeds)) == 3 and sizes == [128, 512, 512]
    state.cost[:] = torch.tensor([100.0, 1.0, 2.0])
    state.seen[2:] = 0.1
    for loss, kept in ((-1.0, True), (1.4, True), (1.45, False), (5.0, False)):  # 10 sqrt(0.02) = 1.41
        state.seen[0] = state.log_z[0] + loss
        assert isinstance(method.finish(state, run), MixtureControl if kept else ZeroControl), loss
    state.seen[0], state.cost[0] = state.log_z[0], 0.5
    assert isinstance(method.finish(state, run), ZeroControl)
    control = MixtureControl(problem, state.law(run, 8).law)
    settings = TemperedSettings("states", True, mixture=True)
    law = tempered_target(problem, run.chain, control, settings).law
    x = torch.randn(20, 2)
    assert torch.allclose(law.log_prob(x), control.law.widened(1.2).log_prob(x))


def test_other_problems_are_refused():
    condition = torch.randn(5, 1)
    conditional = sc.gibbs_problem(lambda x, y: -0.5 * (x - y).square().sum(1), 1, scale=2.0, condition=condition)
    plain = sc.ControlProblem(sc.BrownianMotion(2), sc.Dirac(torch.zeros(2)), lambda x: -x.square().sum(1))
    annealed = sc.gibbs_problem(ring, 2, "annealed", 2.0)
    for problem, match in ((plain, "auto is for gibbs_problem"), (conditional, "condition"), (annealed, "annealed")):
        with pytest.raises(ValueError, match=match):
            sc.solve(problem, "auto")
    for name, value in (("num_particles", 8), ("evaluations", 0), ("components", 0)):
        with pytest.raises(ValueError, match=name):
            sc.Auto(**{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gmm40-2d", "many-well-5", "many-well-32", "funnel"])
def test_targets_of_the_library(name):
    """log Z within 4 standard errors, or 0.1 where the error is smaller than that."""
    target = sc.library.named_target(name)
    solution = sc.solve(sc.gibbs_problem(target, target.dim), sc.Auto(num_particles=4096), seed=0)
    found = solution.evaluate(32768, seed=1).log_z
    assert abs(found.value - target.log_z) < max(0.1, 4 * found.stderr), (found, target.log_z)
