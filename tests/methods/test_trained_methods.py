"""Every method that learns from paths: wherever problems differ, resumed, refused, and at the optimum."""

import itertools
import math

import pytest
import torch
from cases import F64, SmallControl, nonlinear, randn, random_lq, slow_but

import sdecontrol as sc
from sdecontrol.paths.weights import self_normalised

F32 = torch.float32
METHODS = {
    "log-variance": sc.LogVariance(),
    "log-variance, some steps": sc.LogVariance(steps=2),
    "log-variance, reference": sc.LogVariance(paths="reference", steps=3),
    "cross-entropy": sc.CrossEntropy(trust_region=1.0),
    "cross-entropy, reference": sc.CrossEntropy(paths="reference"),
    "reward-weighted-mle": sc.RewardWeightedMLE(),
    "reward-weighted-mle, off-policy": sc.RewardWeightedMLE(roll_in="none"),
    "reinforce": sc.Reinforce(),
    "soft-ppo": sc.SoftPPO(epochs=2, minibatches=2),
    "soft-ppo, batch": sc.SoftPPO(epochs=2, baseline="batch", steps=3),
    "soft-ppo, groups": sc.SoftPPO(epochs=2, baseline="per-time", group_size=8),
    "log-variance, ladder": sc.LogVariance(trust_region=0.3, replay=2, steps=3),
    "cross-entropy, ladder": sc.CrossEntropy(trust_region=0.3, replay=2),
    "path-consistency, ladder": sc.PathConsistency(n=2, trust_region=0.3, replay=2),
    "path-consistency, 1": sc.PathConsistency(n=1),
    "path-consistency, 3": sc.PathConsistency(n=3, replay=2),
    "path-consistency, all": sc.PathConsistency(replay=2),
    "backpropagation, random": sc.RewardBackprop(gradient="random"),
}


def conditional():
    return sc.ControlProblem(
        sc.BrownianMotion(2, torch.eye(2)),
        initial=sc.Dirac(torch.zeros(2)),
        reward=lambda x, y: -((x[:, 0] - y) ** 2),
        running_cost=lambda x, t, y: 0.1 * (x[:, 1] - y) ** 2,
        condition=torch.tensor([-1.0, 0.0, 1.0]),
        alpha=0.5,
    )


def diffusion():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(4, 4)

        def forward(self, x, n):
            return self.net(x.flatten(1)).unflatten(1, (1, 2, 2))

    chain = sc.diffusion_chain(Model(), torch.linspace(0.99, 0.01, 40), shape=(1, 2, 2), steps=6)
    return sc.ControlProblem(chain, reward=lambda x: x.flatten(1).sum(1), alpha=2.0)


def black_box():
    return sc.ControlProblem(
        sc.BrownianMotion(2, torch.eye(2)),
        initial=sc.Dirac(torch.zeros(2)),
        reward=lambda x: torch.from_numpy((x.detach().numpy() ** 2).sum(1)).clamp(max=2.0),
        alpha=1.0,
    )


PROBLEMS = {
    "controlled start": lambda: random_lq(2, m=3, seed=1, start="controlled", dtype=F32),
    "fixed random start": lambda: random_lq(2, seed=1, start="fixed", dtype=F32),
    "state-dependent noise": lambda: nonlinear(dtype=F64),
    "conditions": conditional,
    "diffusion chain": diffusion,
    "black box": black_box,
}


@pytest.mark.filterwarnings("ignore:.*weighted paths are effective")
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_method_runs_wherever_problems_differ(problem):
    """Two batches a step: metrics finite and the control moved; what is not known of other paths is nan; and what was
    learned is a change of measure."""
    made = PROBLEMS[problem]()
    options = {} if problem == "diffusion chain" else {"time_steps": 6}
    for name, method in METHODS.items():
        if problem == "black box" and name.startswith("backpropagation"):
            continue
        solution = sc.solve(made, method, iterations=2, batch_size=64, accumulate=2, seed=0, **options)
        last = solution.history[-1]
        own = "reference" not in name and "mle" not in name
        assert all(math.isfinite(v) for k, v in last.items() if own or k in ("loss", "ess")), (name, last)
        assert own or math.isnan(last["objective"])
        paths = solution.simulate(1024, seed=1)
        assert bool((paths.shifts[-1] != 0).any()), name
        inverse = (-paths.log_ratio()).exp().detach()  # dQ0/dP, of mean 1 whatever was learned
        assert abs(float(inverse.mean()) - 1) < 5 * float(inverse.std()) / 32 < 0.5, name
        if problem != "conditions":  # which draw one thing more; the same seed, the same numbers
            continue
        again = sc.solve(made, method, iterations=2, batch_size=64, accumulate=2, seed=0, **options)
        for a, b in zip(solution.control.state_dict().values(), again.control.state_dict().values()):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["log-variance", "cross-entropy", "reinforce", "soft-ppo, groups"])
def test_accumulated_gradients_are_means(name):
    """Of so many batches with a gradient each, no two of them the same."""
    from sdecontrol.methods.base import Run

    problem = random_lq(2, seed=1)

    def gradient(accumulate, batches):
        run = Run(problem, problem.chain(4), 64, accumulate, 3, SmallControl(2, 2))
        if batches is not None:
            original = run.batch
            run.batch = lambda part=0, group_size=1: original(batches, group_size)
        state = METHODS[name].setup(run)
        seen = []
        run.descend = lambda *_: seen.append(torch.cat([p.grad.flatten() for p in state.control.parameters()]).clone())
        METHODS[name].step(state, run)
        return seen[0]

    found = [gradient(1, part) for part in range(3)]
    assert not any(torch.allclose(a, b, rtol=1e-2) for a, b in itertools.combinations(found, 2))
    assert torch.allclose(torch.stack(found).mean(0), gradient(3, None), rtol=1e-9, atol=1e-12)


STATEFUL = {
    "trajectory balance": (sc.PathConsistency(), "fixed"),
    "soft-ppo": (sc.SoftPPO(epochs=2, minibatches=2, steps=3), "dirac"),
    "path-consistency, 1, replay": (sc.PathConsistency(n=1, replay=3), "dirac"),
    "path-consistency, all, replay": (sc.PathConsistency(replay=3), "fixed"),
    "log-variance, ladder": (sc.LogVariance(trust_region=0.05, replay=2), "fixed"),
    "path-consistency, 3, reference": (sc.PathConsistency(n=3, paths="reference"), "controlled"),
    "backpropagation, random": (sc.RewardBackprop(gradient="random"), "dirac"),
    "reward-weighted-mle": (sc.RewardWeightedMLE(), "dirac"),
}


@pytest.mark.filterwarnings("ignore:.*weighted paths are effective")
@pytest.mark.parametrize("name", STATEFUL)
def test_a_stopped_run_resumes_to_identical_numbers(name, tmp_path):
    method, start = STATEFUL[name]
    problem = random_lq(2, seed=1, dtype=F32, start=start)

    class Stop:
        def on_step_end(self, state):
            if state.iteration == 5:
                raise KeyboardInterrupt

    options = {"time_steps": 6, "batch_size": 64, "seed": 3, "iterations": 9, "checkpoint_every": 3}
    whole = sc.solve(problem, method, **options)
    with pytest.raises(KeyboardInterrupt):
        sc.solve(problem, method, **options, checkpoint_dir=tmp_path / "part", callbacks=[Stop()])
    resumed = sc.solve(problem, method, **options, checkpoint_dir=tmp_path / "part", resume=True)
    assert [repr(m) for m in resumed.history] == [repr(m) for m in whole.history]  # repr: nan equals nan
    for a, b in zip(whole.control.state_dict().values(), resumed.control.state_dict().values()):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: sc.LogVariance(loss="mean"), "loss"),
        (lambda: sc.LogVariance(paths="curent"), "current"),
        (lambda: sc.LogVariance(steps=0), "steps"),
        (lambda: sc.LogVariance(group_size=1), "group_size"),
        (lambda: sc.CrossEntropy(trust_region=0.0), "trust_region"),
        (lambda: sc.CrossEntropy(trust_region=math.inf), "trust_region"),
        (lambda: sc.RewardWeightedMLE(roll_in="reference"), "roll_in"),
        (lambda: sc.Reinforce(baseline="value"), "baseline"),
        (lambda: sc.SoftPPO(clip=1.5), "clip"),
        (lambda: sc.SoftPPO(epochs=0), "epochs"),
        (lambda: sc.SoftPPO(baseline="mean"), "baseline"),
        (lambda: sc.SoftPPO(group_size=8), "per-time"),
        (lambda: sc.PathConsistency(n="some"), "n must"),
        (lambda: sc.PathConsistency(n=0), "n must"),
        (lambda: sc.PathConsistency(replay=-1), "replay"),
        (lambda: sc.RewardBackprop(gradient="randm"), "random"),
    ],
)
def test_settings_are_refused_by_name(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_paths_that_are_no_control_are_refused():
    with pytest.raises(TypeError, match="paths"):
        sc.LogVariance(paths=3)
    problem = random_lq(2, seed=1, dtype=F32)
    other = sc.solve(
        random_lq(3, seed=1, dtype=F32), "reward-backprop", time_steps=4, iterations=1, batch_size=64, seed=0
    )
    with pytest.raises(ValueError, match="paths maps"):
        sc.solve(problem, sc.CrossEntropy(paths=other), time_steps=4, iterations=1)


def test_what_a_problem_does_not_offer_is_refused_by_name():
    problem = random_lq(2, seed=1, dtype=F32)
    with pytest.raises(ValueError, match=r"bridge-matching.*running cost"):
        sc.solve(problem, sc.BridgeMatching(), time_steps=4, iterations=1)
    with pytest.raises(ValueError, match="linear reference"):
        sc.solve(black_box_nonlinear(), sc.BridgeMatching(), time_steps=4, iterations=1)
    with pytest.raises(ValueError, match="group_size=7"):
        sc.solve(problem, sc.LogVariance(group_size=7), time_steps=4, iterations=1, batch_size=64)
    with pytest.raises(ValueError, match="minibatches"):
        sc.solve(problem, sc.SoftPPO(minibatches=64), time_steps=4, iterations=1, batch_size=64)
    with pytest.raises(sc.NotDifferentiable):
        sc.solve(black_box(), sc.RewardBackprop(gradient="random"), time_steps=4, iterations=1)


def black_box_nonlinear():
    return sc.ControlProblem(
        sc.SDE(lambda x, t: -(x**3), torch.tensor(1.0), dim=2),
        initial=sc.Dirac(torch.zeros(2)),
        reward=lambda x: x.sum(1),
    )


def test_a_reward_that_is_not_finite_stops_with_its_name():
    problem = sc.ControlProblem(
        sc.BrownianMotion(1, torch.eye(1)), initial=sc.Dirac(torch.zeros(1)), reward=lambda x: (x[:, 0] + 3.0).log()
    )
    for method in (sc.SoftPPO(), sc.LogVariance(), sc.CrossEntropy(), sc.RewardWeightedMLE(), sc.PathConsistency(n=1)):
        with pytest.raises(sc.NonFiniteError, match="reward"):
            sc.solve(problem, method, time_steps=4, iterations=200, batch_size=256, seed=0)


# ---------------------------------------------------------------- weights


def test_a_trust_region_keeps_the_divergence_of_the_weights():
    """The largest exponent: on the bound where the whole weights are outside of it, 1 where they are inside."""
    log_w = 5 * randn(256, seed=1)
    for bound in (0.1, 1.0, 3.0):
        found = self_normalised(log_w, trust_region=bound)
        shares = found.weights / len(log_w)
        assert float((shares * (shares * len(log_w)).log()).sum()) == pytest.approx(bound, rel=1e-6)
        assert torch.allclose(shares, (found.exponent * log_w).softmax(0), rtol=1e-8)
        assert found.ess == pytest.approx(float(1 / shares.square().sum()) / len(log_w))
    assert self_normalised(log_w, trust_region=6.0).exponent == 1.0
    assert float(self_normalised(log_w).weights.mean()) == pytest.approx(1.0)


def test_weights_do_not_overflow_and_are_normalised_in_groups():
    log_w = torch.tensor([1000.0, 999.0, -1e4, -1e4 + 1], dtype=F32)
    w = self_normalised(log_w, group_size=2).weights
    a, b = math.e / (1 + math.e), 1 / (1 + math.e)
    assert torch.allclose(w, 2 * torch.tensor([a, b, b, a]), atol=1e-3)
    equal = self_normalised(torch.zeros(8))
    assert equal.ess == pytest.approx(1.0) and torch.equal(equal.weights, torch.ones(8))


def test_few_effective_paths_are_told():
    problem = sc.ControlProblem(
        sc.BrownianMotion(2, torch.eye(2)), initial=sc.Dirac(torch.zeros(2)), reward=lambda x: 50 * x[:, 0], alpha=1.0
    )
    for method in (sc.CrossEntropy(), sc.RewardWeightedMLE(roll_in="none"), sc.BridgeMatching()):
        with pytest.warns(RuntimeWarning, match=r"only 1\.\d of 128 weighted paths"):
            sc.solve(problem, method, time_steps=4, iterations=1, batch_size=128, seed=0)


# ---------------------------------------------------------------- the optimum

REACHED = {
    "soft-ppo": (sc.SoftPPO(epochs=2), 100, 2e-2),
    "log-variance": (sc.LogVariance(), 200, 2e-2),
}
REACHED_SLOW = {
    "soft-ppo, value": (sc.SoftPPO(), 300, 5e-3),
    "soft-ppo, groups": (sc.SoftPPO(baseline="per-time", group_size=64), 300, 1e-2),
    "log-variance, some steps": (sc.LogVariance(steps=3), 500, 2e-2),
    "trajectory balance": (sc.PathConsistency(), 400, 1e-2),
    "cross-entropy": (sc.CrossEntropy(), 400, 1e-2),
    "cross-entropy, trust region": (sc.CrossEntropy(trust_region=0.5), 400, 1e-2),
    "cross-entropy, reference": (sc.CrossEntropy(paths="reference"), 600, 1e-2),
    "reward-weighted-mle": (sc.RewardWeightedMLE(), 600, 2e-2),
    "reinforce": (sc.Reinforce(), 500, 2e-2),
    "path-consistency, 1": (sc.PathConsistency(n=1), 600, 2e-2),
    "path-consistency, 4": (sc.PathConsistency(n=4), 600, 2e-2),
    "path-consistency, 1, replay": (sc.PathConsistency(n=1, replay=4), 800, 3e-2),
    "path-consistency, all, replay": (sc.PathConsistency(replay=4), 500, 2e-2),
    "backpropagation, random": (sc.RewardBackprop(gradient="random"), 400, 1e-2),
}


@pytest.mark.parametrize("name", slow_but([*REACHED, *REACHED_SLOW], "log-variance"))
def test_each_method_reaches_the_optimum_of_a_linear_quadratic_problem(name):
    method, iterations, error = {**REACHED, **REACHED_SLOW}[name]
    problem = random_lq(2, seed=1, dtype=F32)
    solution = sc.solve(problem, method, time_steps=10, iterations=iterations, batch_size=256, seed=0)
    exact = sc.exact_solution(problem, time_steps=10)
    assert sc.control_error(solution, exact, n=2048, seed=1).relative.value < error


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fixed", "controlled"])
@pytest.mark.parametrize(
    ("method", "iterations"),
    [
        (sc.LogVariance(), 600),
        (sc.SoftPPO(), 150),
        (sc.PathConsistency(), 600),
        (sc.CrossEntropy(), 600),
    ],
    ids=["variance", "soft-ppo", "all", "cross-entropy"],
)
def test_the_optimum_of_random_starts_is_reached_too(method, iterations, start):
    problem = random_lq(2, seed=1, dtype=F32, start=start)
    solution = sc.solve(problem, method, time_steps=10, iterations=iterations, batch_size=256, seed=0)
    exact = sc.exact_solution(problem, time_steps=10)
    assert sc.control_error(solution, exact, n=2048, seed=1).relative.value < 3e-2


@pytest.mark.slow
def test_bridge_matching_reaches_the_optimum():
    problem = random_lq(2, seed=1, dtype=F32, running=False)
    exact = sc.exact_solution(problem, time_steps=10)
    for paths in ("current", "reference"):
        solution = sc.solve(
            problem, sc.BridgeMatching(paths=paths), time_steps=10, iterations=400, batch_size=256, seed=0
        )
        assert sc.control_error(solution, exact, n=2048, seed=1).relative.value < 1e-2


@pytest.mark.slow
def test_the_learned_log_z_settles_at_the_elbo():
    """On paths of the current control it is the ELBO's, below log Z by the floor of mean-shift controls."""
    problem = random_lq(2, seed=1, dtype=F32)
    solution = sc.solve(problem, sc.PathConsistency(), time_steps=10, iterations=400, batch_size=1024, seed=0)
    learned = sum(m["learned_log_z"] for m in solution.history[-50:]) / 50
    exact = sc.exact_solution(problem, time_steps=10)
    assert learned == pytest.approx(float(exact.elbo), abs=0.02)
    assert float(exact.log_z) - float(exact.elbo) > 0.03  # so that the two can be told apart
