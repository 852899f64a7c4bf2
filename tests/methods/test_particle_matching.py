"""Bridges to given ends against closed forms, and particle matching against exact controls and exact laws."""

import dataclasses
import math

import pytest
import torch
from cases import F64, but_slow, nonlinear, randn, random_lq, spd

import sdecontrol as sc
from sdecontrol.chains.bridges import ChainBridge
from sdecontrol.chains.noising import NoisingBridge
from sdecontrol.controls.base import Control
from sdecontrol.controls.mixture import CorrectedControl, MixtureControl
from sdecontrol.controls.tuned import TunedControl
from sdecontrol.methods import mixture_start
from sdecontrol.methods.base import Run
from sdecontrol.randomness import Place

F32 = torch.float32


def test_the_start_given_the_end_is_that_of_the_exact_chain():
    """Mean and covariance of x_0 given x_K against the exact bridge of the reference's own chain, to 1e-10."""
    problem = random_lq(3, 2, seed=2, start="fixed", running=False)
    plain = sc.ControlProblem(problem.reference, problem.initial, alpha=1.0)
    exact = sc.exact_solution(plain, time_steps=7)
    end = randn(4, 3, seed=3)
    bridge = ChainBridge(plain.chain(7))
    law = exact.bridge(0.0, 1.0, end)
    still = bridge.start_given_end(problem.initial, end, torch.zeros(4, 3, dtype=F64))
    assert torch.allclose(still, law.mean, atol=1e-10)
    root = torch.stack(
        [bridge.start_given_end(problem.initial, end, e.expand(4, 3)) - still for e in torch.eye(3, dtype=F64)], 2
    )
    assert torch.allclose(root @ root.mT, law.covariance_matrix.expand(4, 3, 3), atol=1e-10)


def one_gaussian():
    """A generative reference that is a linear SDE: data N(m, S)."""
    law = sc.GaussianMixture(torch.ones(1, dtype=F64), randn(1, 2, seed=1), spd(2, 2).unsqueeze(0))
    return sc.generative_sde(law, schedule=sc.VP())


def test_noising_is_the_bridge_of_a_generative_reference_to_first_order():
    """Its states and its E[xi | x_t, x_T], against the exact bridge of the same linear chain: the error falls like
    1/K."""
    sde = one_gaussian()
    end, errors = randn(2000, 2, seed=4), []
    for K in (100, 200, 400):
        problem, times = sc.ControlProblem(sde, alpha=1.0), sde.default_grid(K)
        noising = NoisingBridge(problem.chain(K))
        initial = sc.Gaussian(problem.initial.mean.float(), problem.initial.covariance_matrix.float())
        linear = sc.ControlProblem(sde.as_linear(), initial, alpha=1.0)
        exact = ChainBridge(linear.chain(times))
        states = noising.between(end, end, randn(K, 2000, 2, seed=5))
        middle = slice(K // 4, 3 * K // 4)
        a = noising.noise_given_end(states, end)[middle]
        b = exact.noise_given_end(states.float(), end.float()).double()[middle]
        errors.append(float((a - b).square().mean().sqrt() / b.square().mean().sqrt()))
        start = exact.start_given_end(initial, end.float(), torch.zeros(2000, 2))
        law = exact.between(start, end.float(), torch.zeros(K, 2000, 2)).double()[middle]
        still = noising.between(end, end, torch.zeros(K, 2000, 2, dtype=F64))[middle]
        errors[-1] = max(errors[-1], float((law - still).square().mean().sqrt() / law.square().mean().sqrt()))
    assert errors[2] < 0.02, errors
    assert 1.6 < errors[0] / errors[1] < 2.6 and 1.6 < errors[1] / errors[2] < 2.6, errors


@pytest.mark.parametrize(
    ("start", "running"), but_slow([("dirac", False), ("controlled", True), ("dirac", True)], ("dirac", True))
)
def test_linear_quadratic_controls_are_found(start, running):
    """With bridges (no running cost) and with whole paths (a cost, a controlled start): the exact control of the chain,
    to 3 % in squared error. Targets with the sign, scale or step of another process leave more than half of it."""
    problem = random_lq(2, seed=1, start=start, running=running, alpha=1.0, dtype=F32)
    method = sc.ParticleMatching(num_particles=1024, refresh=100)
    solution = sc.solve(problem, method, time_steps=6, iterations=200, batch_size=256, seed=0)
    exact = sc.exact_solution(problem, like=solution)
    assert sc.control_error(solution, exact, n=2048, seed=1).relative.value < 0.03
    last = solution.history[-1]
    evaluation = solution.evaluate(4096, seed=2)
    assert abs(last["log_z"] - float(exact.log_z)) < 0.1  # of the particles
    assert abs(last["objective"] - evaluation.objective.value) < 6 * last["objective_stderr"] + 0.05


def test_a_nonlinear_problem_with_its_own_paths():
    """No bridge is known (a drift that is a plain function, noise that depends on the state): the ELBO comes near log Z
    of particles."""
    problem = nonlinear(F32)
    method = sc.ParticleMatching(num_particles=512, refresh=50)
    solution = sc.solve(problem, method, time_steps=10, iterations=100, batch_size=256, seed=0)
    log_z = sc.solve(problem, sc.SMC(256), time_steps=10, seed=0).evaluate(16384, seed=1).log_z.value
    reference = sc.solve(problem, sc.BestOfN(n=1), time_steps=10, seed=0).evaluate(4096, seed=1).elbo.value
    assert log_z - solution.evaluate(4096, seed=1).elbo.value < 0.25 * (log_z - reference)


@pytest.mark.slow
def test_both_wells_of_a_density_get_their_share():
    """Unequal wells six standard deviations apart: shares to 5 %, where log-variance on its own paths may keep one of
    them."""

    def wells(x):
        square = lambda m: -0.5 * ((x - m) / 0.5).square().sum(1)  # noqa: E731
        return torch.logaddexp(square(-1.5), math.log(3) + square(1.5))

    problem = sc.gibbs_problem(wells, 2, seed=0)
    method = sc.ParticleMatching(num_particles=1024, refresh=50)
    solution = sc.solve(problem, method, time_steps=20, iterations=50, batch_size=256, seed=0)
    x = solution.sample(4096, seed=1)
    assert abs(float((x[:, 0] > 0).float().mean()) - 0.75) < 0.05
    evaluation = solution.evaluate(4096, seed=2)
    exact = math.log(4) + math.log(2 * math.pi * 0.25)
    assert abs(evaluation.log_z.value - exact) < 4 * evaluation.log_z.stderr + 0.01
    reference = sc.solve(problem, sc.BestOfN(n=1), time_steps=20, seed=0).evaluate(4096, seed=2)
    assert exact - evaluation.elbo.value < 0.1 * (exact - reference.elbo.value)


def small_inverse():
    """Three modes that a weak reward reweights: cheap to temper."""
    means = torch.tensor([[-4.0, -4.0], [0.0, 3.0], [5.0, 0.0]])
    model = sc.GaussianMixture(torch.tensor([0.5, 0.3, 0.2]), means, 0.5)
    return sc.ControlProblem(
        sc.generative_sde(model, schedule=sc.VP()),
        reward=sc.Quadratic(0.3 * torch.eye(2), torch.tensor([2.0, 0.0])),
        alpha=1.0,
    )


@pytest.mark.slow
def test_a_generative_reference_begins_with_the_mixture():
    """The base is the tilted law's own control up to the fit, whatever little training adds: the shares of its modes, a
    gap near that of the exact control on the same chain. A mixture fitted without the particles' weights, or to the
    reference's ends, has other shares."""
    problem = small_inverse()
    exact = sc.exact_solution(problem)
    solution = sc.solve(problem, sc.ParticleMatching(num_particles=512), time_steps=25, iterations=2, seed=0)
    law = exact.marginal(problem.horizon)
    shares = law.responsibilities(solution.sample(4096, seed=1)).mean(0)
    assert 0.5 * float((shares - law.weights).abs().sum()) < 0.04
    paths = [sc.simulate(problem, 4096, control=c, time_steps=25, seed=2) for c in (solution.control, exact.control)]
    gaps = [float(exact.log_z) - float(p.log_weights().mean()) for p in paths]
    assert gaps[0] < gaps[1] + 0.05, gaps
    base = getattr(solution.control, "base", solution.control)
    assert isinstance(base, MixtureControl)


@pytest.mark.slow
def test_each_mixture_is_fitted_to_more_and_weighted_ends(monkeypatch):
    """A quarter of the particles, all of them, then eight times as many independent draws with weights whose mean is Z;
    where those are few for their weights, or the first mixture saves nothing, they change nothing."""
    problem, seen, fit = small_inverse(), [], mixture_start.fit_mixture

    def recorded(x, log_w, *, seed):
        seen.append((x, log_w, seed))
        return fit(x, log_w, seed=seed)

    monkeypatch.setattr(mixture_start, "fit_mixture", recorded)
    chain, size = problem.chain(50), 512
    control = mixture_start.first_mixture(problem, chain, size, 3)
    assert [len(x) for x, *_ in seen] == [128, 512, 4096] and len({seed for *_, seed in seen}) == 3
    x, log_w, _ = seen[2]
    assert len(torch.unique(x, dim=0)) == 4096
    exact = sc.exact_solution(problem)
    assert abs(float(log_w.logsumexp(0)) - math.log(4096) - float(exact.log_z)) < 0.1
    mean = (log_w.softmax(0).unsqueeze(1) * x).sum(0)
    assert torch.allclose(mean.float(), exact.marginal(problem.horizon).mean, atol=0.15)
    assert torch.allclose(control.law.mean, mean.float(), atol=0.02)
    # draws of which only a few count: the mixture before is kept
    weighted = mixture_start.weighted_ends

    def uneven(*args):
        ends, log_w = weighted(*args)
        return ends, torch.where(torch.arange(len(log_w)) < 100, log_w, log_w - 50)

    monkeypatch.setattr(mixture_start, "weighted_ends", uneven)
    seen.clear()
    mixture_start.first_mixture(problem, chain, size, 3)
    assert len(seen) == 2
    # particles that begin with the mixture and need as much work as before: none is learned, whatever their number
    adapt = mixture_start.adapt

    def idle(target, n, seed):
        ladder, found = adapt(target, n, seed)
        return ladder, dataclasses.replace(found, evaluations=9 * n)

    monkeypatch.setattr(mixture_start, "adapt", idle)
    assert mixture_start.first_mixture(problem, chain, size, 3) is None


@pytest.mark.slow
def test_bridge_matching_takes_a_memoryless_generative_reference():
    """By the noising process: nearly all of the gap is gone, and modes have their shares."""
    problem = small_inverse()
    exact = sc.exact_solution(problem)
    solution = sc.solve(problem, "bridge-matching", time_steps=30, iterations=400, batch_size=128, seed=0)
    law = exact.marginal(problem.horizon)
    shares = law.responsibilities(solution.sample(4096, seed=1)).mean(0)
    assert 0.5 * float((shares - law.weights).abs().sum()) < 0.06
    gap = float(exact.log_z) - solution.evaluate(4096, seed=2).elbo.value
    untuned = (
        float(exact.log_z) - sc.solve(problem, sc.BestOfN(n=1), time_steps=30, seed=0).evaluate(4096, seed=2).elbo.value
    )
    assert gap < 0.05 * untuned, (gap, untuned)


def test_with_another_noise_level_the_noising_process_is_no_bridge():
    """State and end have another joint law then; particle matching learns from whole paths."""
    model = small_inverse().reference.mixture
    problem = sc.ControlProblem(
        sc.generative_sde(model, schedule=sc.VP(), noise_level=6.0),
        reward=lambda x: -0.1 * x.square().sum(1),
        alpha=1.0,
    )
    assert problem.start == "memoryless"
    with pytest.raises(ValueError, match="noise_level='reverse' only"):
        NoisingBridge(problem.chain(5))
    with pytest.raises(ValueError, match="noise_level='reverse' only"):
        sc.solve(problem, "bridge-matching", time_steps=5, iterations=1)
    fixed = sc.ControlProblem(
        sc.generative_sde(model, schedule=sc.VP()), reward=lambda x: -x.square().sum(1), alpha=1.0, start="fixed"
    )
    with pytest.raises(ValueError, match="linear reference"):
        sc.solve(fixed, "bridge-matching", time_steps=5, iterations=1)
    method = sc.ParticleMatching(num_particles=256)
    state = method.setup(Run(problem, problem.chain(5), batch_size=64, accumulate=1, seed=0))
    assert state.bridge is None and not isinstance(state.control, CorrectedControl)


class Difference(Control):
    """What one control has beyond another."""

    def __init__(self, right, wrong):
        super().__init__(right.event_shape, right.control_shape, 0.0, 1.0)
        self.right, self.wrong = right, wrong

    def on_chain(self, chain, tables=None):
        right, wrong = self.right.on_chain(chain), self.wrong.on_chain(chain)
        return lambda k, x, y: right(k, x, y) - wrong(k, x, y)


@pytest.mark.slow
def test_a_correction_is_kept_where_it_lowers_the_loss_and_dropped_where_not(monkeypatch):
    """The loss on new bridges is the forward KL up to a constant: a network that is a little off is left out, one that
    mends a mixture a little off stays."""
    problem = small_inverse()
    chain = problem.chain(20)
    law = sc.exact_solution(problem).marginal(problem.horizon)
    method = sc.ParticleMatching(num_particles=1024, refresh=1000)
    run = Run(problem, chain, batch_size=256, accumulate=1, seed=0)
    state = method.setup(run)
    assert isinstance(state.control, CorrectedControl)
    assert method.finish(state, run) is state.control.base  # nothing was drawn yet
    state.renew(run)
    right = MixtureControl(problem, law)
    off = MixtureControl(problem, sc.GaussianMixture(law.weights, law.means + 0.2, law.covariances))
    places, gains = [], sc.ParticleMatching.gains

    def compared(self, state, run, before, after, place):
        places.append(place)
        return gains(self, state, run, before, after, place)

    monkeypatch.setattr(sc.ParticleMatching, "gains", compared)
    for base, correction, kept in ((right, Difference(off, right), False), (off, Difference(right, off), True)):
        state.control = CorrectedControl(base, correction)
        assert method.finish(state, run) is (state.control if kept else base)
    assert places == 2 * [Place.MATCHING_JUDGE]  # bridges that training has not seen


def test_a_running_cost_a_given_control_and_a_model_to_tune_have_no_mixture():
    class Model(torch.nn.Linear):
        def forward(self, x, s):
            return super().forward(x)

    tuned = sc.ControlProblem(
        sc.generative_sde(Model(2, 2), schedule=sc.VP(), shape=(2,)), reward=lambda x: -x.square().sum(1), alpha=1.0
    )
    cost = sc.ControlProblem(
        small_inverse().reference,
        reward=lambda x: -x.square().sum(1),
        running_cost=lambda x, t: x.square().sum(1),
        alpha=1.0,
    )
    steps = {"time_steps": [k / 5 for k in range(6)], "scheme": "euler"}  # on which a mixture pays with 512 particles
    method, more = sc.ParticleMatching(num_particles=64), {**steps, "iterations": 1, "seed": 0}
    assert isinstance(sc.solve(tuned, method, **more).control, TunedControl)
    assert not isinstance(sc.solve(cost, method, **more).control, (MixtureControl, CorrectedControl))
    run = Run(small_inverse(), small_inverse().chain(**steps), batch_size=64, accumulate=1, seed=0)
    both = sc.ParticleMatching(num_particles=512).setup(run).control
    assert isinstance(both, CorrectedControl)
    assert isinstance(
        sc.solve(small_inverse(), method, control=both, **more).control, CorrectedControl
    )  # the user's own is kept
    given = sc.solve(small_inverse(), "reward-backprop", **more).control
    assert type(sc.solve(small_inverse(), method, control=given, **more).control) is type(given)


def near_its_optimum(steps):
    """A linear-quadratic problem, and a solution that adjoint matching has taken to the chain's optimum."""
    problem = random_lq(2, seed=1, start="dirac", running=False, alpha=1.0, dtype=F32)
    return problem, sc.solve(problem, "adjoint-matching", time_steps=steps, iterations=60, seed=0)


def test_what_is_gained_is_forward_kl():
    """From no control to the chain's optimum on particles of the target: the KL of its paths, in nats."""
    problem, optimal = near_its_optimum(10)
    method = sc.ParticleMatching(num_particles=4096)
    run = Run(problem, problem.chain(10), batch_size=256, accumulate=1, seed=0)
    state = method.setup(run)
    nothing, state.control = method.setup(run).control, optimal.control
    method.step(state, run)  # draws particles, and keeps the control of then; nothing descends
    assert not bool(method.gains(state, run, state.last, state.control, Place.MATCHING_GAIN).any())
    found = method.gains(state, run, nothing, state.control, Place.MATCHING_GAIN)
    kl = float(optimal.evaluate(4096, seed=1).kl.value)
    assert kl > 0.5 and len(found) == 16
    assert float(found.mean()) == pytest.approx(kl, abs=float(found.std()) + 0.05 * kl)
    back = method.gains(state, run, state.control, nothing, Place.MATCHING_GAIN)
    assert torch.allclose(back, -found)


def test_a_run_with_nothing_to_gain_ends_by_itself():
    """From the exact control: at the first new particles a hundred iterations have gained nothing, and half as many
    lower the rate."""
    problem, first = near_its_optimum(5)
    method = sc.ParticleMatching(num_particles=1024)
    solution = sc.solve(problem, method, time_steps=5, batch_size=128, control=first, learning_rate=1e-4, seed=0)
    gains = [i for i, m in enumerate(solution.history) if "gain" in m]
    assert gains == [100] and len(solution.history) == 151


def test_a_resumed_run_ends_with_the_same_numbers(tmp_path):
    problem = random_lq(2, seed=1, alpha=1.0, dtype=F32)
    method = sc.ParticleMatching(num_particles=128, refresh=7)
    settings = {"time_steps": 5, "batch_size": 64, "seed": 0}
    whole = sc.solve(problem, method, iterations=20, **settings)

    class Stop:
        def on_step_end(self, state):
            if state.iteration == 10:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sc.solve(problem, method, iterations=20, checkpoint_dir=tmp_path, callbacks=[Stop()], **settings)
    resumed = sc.solve(problem, method, iterations=20, checkpoint_dir=tmp_path, resume=True, **settings)
    assert torch.equal(whole.sample(64, seed=1), resumed.sample(64, seed=1))


def test_bad_input():
    with pytest.raises(ValueError, match="num_particles must be an int >= 64"):
        sc.ParticleMatching(num_particles=8)
    with pytest.raises(ValueError, match="generative_sde"):
        NoisingBridge(random_lq(2, seed=1).chain(5))
    conditional = sc.ControlProblem(
        sc.BrownianMotion(1), sc.Dirac(torch.zeros(1)), lambda x, y: -((x - y) ** 2).sum(1), condition=torch.randn(5, 1)
    )
    with pytest.raises(ValueError, match="fixed"):
        sc.solve(conditional, sc.ParticleMatching(), iterations=1)


@pytest.mark.slow
@pytest.mark.parametrize("observations", [2, 4])
def test_the_modes_of_an_inverse_problem_are_found_and_learnt(observations):
    """The mixture inverse problem: after 600 iterations the shares of the posterior's modes are within 0.2 in total
    variation (0.8 to 0.9 before), and 95 % of the reference's gap are gone; what is left lies within the modes."""
    problem = sc.library.mixture_inverse_problem(observations, 0)
    exact = sc.exact_solution(problem)
    method = sc.ParticleMatching(num_particles=2048)
    solution = sc.solve(problem, method, time_steps=50, iterations=600, batch_size=64, seed=0)
    posterior = exact.marginal(problem.horizon)
    shares = posterior.responsibilities(solution.sample(2000, seed=1)).mean(0)
    assert 0.5 * float((shares - posterior.weights).abs().sum()) < 0.2
    untuned = sc.solve(problem, sc.BestOfN(n=1), time_steps=50, seed=0)
    gaps = [float(exact.log_z) - s.evaluate(4096, seed=1).elbo.value for s in (solution, untuned)]
    assert gaps[0] < 0.05 * gaps[1], gaps
