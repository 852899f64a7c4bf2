"""The user's functions, modules and objects: nothing of theirs changes what is ours without a word, and nothing of ours
changes theirs."""

import copy
import threading

import pytest
import torch
from torch import nn

import sdecontrol as sc
from sdecontrol.comparison.frontier import exact_frontier
from sdecontrol.processes.modules import copied, evaluating, held_fixed

START = sc.Dirac(torch.zeros(2))
QUICK = {"iterations": 2, "time_steps": 6, "batch_size": 64, "seed": 0}


def reward(x):
    return -(x - 1).square().sum(1)


def sde(drift=lambda x, t: -x, diffusion=1.0):
    return sc.SDE(drift, diffusion, dim=2)


def problem(reference=None, **options):
    return sc.ControlProblem(sde() if reference is None else reference, START, **{"reward": reward, **options})


# ---------------------------------------------------------------- states that functions change


def torch_in_place(x):
    x.clamp_(-1, 1)


def masked(x):
    x[x > 1e6] = 0.0  # nothing is changed at the states tried, and torch counts it all the same


def by_numpy(x):
    x.detach().numpy()[:] *= 0.5


def by_data(x):
    x.data.mul_(0.5)


def changing(mutate, value):
    def function(x, *rest):
        mutate(x)
        return value(x)

    return function


OWNERS = {
    "drift": lambda f: problem(sde(f(lambda x: -x))),
    "diffusion": lambda f: problem(sde(diffusion=f(lambda x: 1 + 0 * x))),
    "running_cost": lambda f: problem(running_cost=f(reward)),
    "reward": lambda f: problem(reward=f(reward)),
    "log_density": lambda f: sc.gibbs_problem(f(reward), 2, scale=1.0, centre=0.0),
    "model": lambda f: sc.ControlProblem(sc.generative_sde(f(lambda x: -x), sc.VP(), shape=(2,)), reward=reward),
    "step": lambda f: sc.ControlProblem(sc.discrete_dynamics(f(lambda x: 0.5 * x), steps=3, dim=2), START, reward),
}


@pytest.mark.parametrize("mutate", [torch_in_place, masked, by_numpy, by_data])
@pytest.mark.parametrize("owner", OWNERS)
def test_a_function_that_changes_its_states_is_refused_by_name(owner, mutate):
    with pytest.raises(ValueError, match=rf"^{owner} changed the states or the time that it was given, in place"):
        OWNERS[owner](lambda value: changing(mutate, value))


def test_a_function_that_changes_the_time_is_refused():
    def drift(x, t):
        t *= 2
        return -x * t

    with pytest.raises(ValueError, match=r"^drift changed the states or the time .*t = 2 \* t"):
        problem(sde(drift))


def test_what_changes_states_only_far_out_is_refused_where_it_does():
    def far(x, t):
        if bool((x.abs() > 5).any()):
            x.clamp_(-5, 5)
        return 0 * x

    loud = problem(sde(diffusion=10.0), running_cost=lambda x, t: far(x, t).sum(1))
    with pytest.raises(ValueError, match=r"^running cost changed the states"):
        sc.simulate(loud, 64, time_steps=4, seed=0)
    with pytest.raises(ValueError, match=r"^control changed the states"):
        sc.simulate(problem(sde(diffusion=10.0)), 64, far, time_steps=4, seed=0)
    with pytest.raises(ValueError, match=r"^step 1 \(drift, diffusion or model\) changed the states"):
        sc.simulate(problem(sde(far, 10.0)), 64, time_steps=4, seed=0)


# ---------------------------------------------------------------- copies


class Net(nn.Module):
    def __init__(self, noisy=True):
        super().__init__()
        generator = torch.random.get_rng_state()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 2))
        torch.random.set_rng_state(generator)
        if not noisy:
            self.layers[2] = nn.Tanh()
        self.calls = 0

    def forward(self, x, s):
        self.calls += 1
        return self.layers(torch.cat((x, s.expand(len(x)).unsqueeze(1).to(x)), 1))


class Drift(Net):
    def forward(self, x, t):
        return 0.1 * super().forward(x, t)


def fine_tuning(net, **options):
    return sc.ControlProblem(sc.generative_sde(net, sc.VP(), shape=(2,)), reward=reward, alpha=0.5, **options)


def test_a_deep_copy_of_a_problem_or_process_has_a_model_of_its_own():
    net, drift = Net(), Drift()
    for made, module in ((fine_tuning(net), net), (problem(sde(drift)), drift)):
        before = sc.simulate(made, 64, time_steps=4, seed=0).end
        other = copy.deepcopy(made)
        assert not {id(m) for m in other.modules()} & {id(m) for m in made.modules()} and len(other.modules()) == 1
        with torch.no_grad():
            next(module.parameters()).add_(1.0)
        assert torch.equal(sc.simulate(other, 64, time_steps=4, seed=0).end, before)
        assert not torch.equal(sc.simulate(made, 64, time_steps=4, seed=0).end, before)
    reference = copy.deepcopy(fine_tuning(net).reference)
    assert reference.model is not net and reference.at(0.3) == fine_tuning(net).reference.at(0.3)


def test_the_copy_of_a_chain_calls_the_copy_s_drift():
    drift = Drift()
    chain = problem(sde(drift)).chain(4)
    other, x = copy.deepcopy(chain), torch.ones(3, 2)
    with evaluating([drift]), torch.no_grad():
        before = chain.kernel(0, x)[0]
        next(drift.parameters()).add_(1.0)
        assert not torch.equal(chain.kernel(0, x)[0], before)
    with evaluating(other.reference.modules()), torch.no_grad():
        assert torch.equal(other.kernel(0, x)[0], before)


def test_copies_of_controls_share_the_problem():
    solution = sc.solve(fine_tuning(Net()), "log-variance", **QUICK)
    assert copied(solution.control).reference is solution.problem.reference
    alone = copy.deepcopy(solution.control)
    assert alone.reference is not solution.problem.reference
    assert torch.equal(alone(torch.ones(3, 2), 0.5), solution.control(torch.ones(3, 2), 0.5))


def test_the_exact_frontier_of_a_float32_problem_leaves_its_chains_alone():
    made = sc.ControlProblem(
        sc.LinearSDE(-torch.eye(2), torch.eye(2)), START, sc.Quadratic(torch.eye(2), torch.ones(2)), alpha=0.5
    )
    assert exact_frontier(made, time_steps=6, points=3)
    assert made.chain(6).times.dtype == torch.float32
    assert sc.solve(made, "adjoint-matching", **QUICK).sample(3).dtype == torch.float32


# ---------------------------------------------------------------- a model that moves after solve


def _step(net):
    with torch.no_grad():
        next(net.parameters()).add_(0.1)


def _by_data(net):
    next(net.parameters()).data.add_(0.1)


def _load(net):
    net.load_state_dict({n: v + 1 if v.is_floating_point() else v for n, v in net.state_dict().items()})


def _statistics(net):
    net.train()(torch.ones(4, 2), torch.ones(4))


@pytest.mark.parametrize("move", [_step, _by_data, _load, _statistics])
@pytest.mark.parametrize("method", ["log-variance", "smc"])
def test_a_solution_whose_model_has_changed_says_so(method, move):
    net = Net()
    made = fine_tuning(net)
    options = QUICK if method != "smc" else {"time_steps": 6, "seed": 0}
    solution = sc.solve(made, method, **options)
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    before = solution.sample(8, seed=1)
    move(net)
    for use in (
        lambda: solution.sample(8, seed=1),
        lambda: solution.control(torch.zeros(3, 2), 0.5),
        lambda: solution.evaluate(64),
        lambda: solution.model,
    ):
        with pytest.raises(RuntimeError, match="have changed since this solution was made"):
            use()
    assert "Solution(" in repr(solution)
    net.load_state_dict(kept)
    assert torch.equal(solution.sample(8, seed=1), before)


# ---------------------------------------------------------------- threads


def test_concurrent_solves_leave_modes_and_flags_as_they_were():
    net, barrier, failed = Net(), threading.Barrier(2, timeout=60), []
    made = fine_tuning(net)
    grads = [torch.ones_like(p) for p in net.parameters()]
    for p, g in zip(net.parameters(), grads):
        p.grad = g

    class Meet:
        def on_step_end(self, state):
            barrier.wait()  # both are inside, again and again

    def run(iterations):
        try:
            sc.solve(made, "log-variance", **{**QUICK, "iterations": iterations}, callbacks=[Meet()], progress=False)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(3,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(m.training for m in net.modules()) and all(p.requires_grad for p in net.parameters())
    assert all(p.grad is g for p, g in zip(net.parameters(), grads))


def test_a_copy_has_the_modes_and_flags_of_the_module_whoever_is_inside():
    net = Net()
    net.layers[1].eval()
    next(net.parameters()).requires_grad_(False)
    with evaluating([net]), held_fixed(list(net.parameters())):
        made = copied(net)
    assert [m.training for m in made.modules()] == [m.training for m in net.modules()] != [False] * 4
    assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in net.parameters()]
    assert any(p.requires_grad for p in made.parameters())


def test_the_last_to_leave_restores_whatever_the_order():
    net = Net()
    net.layers[1].eval()
    next(net.parameters()).requires_grad_(False)
    first, second = evaluating([net]), evaluating([net])
    fixed, fixed_too = held_fixed(list(net.parameters())), held_fixed(list(net.parameters()))
    first.__enter__(), fixed.__enter__(), second.__enter__(), fixed_too.__enter__()
    first.__exit__(None, None, None), fixed.__exit__(None, None, None)
    assert not any(m.training for m in net.modules()) and not any(p.requires_grad for p in net.parameters())
    second.__exit__(None, None, None), fixed_too.__exit__(None, None, None)
    assert [net.training, net.layers[1].training, net.layers[2].training] == [True, False, True]
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, True, True]


# ---------------------------------------------------------------- dropout and batch statistics in train mode


class OwnControl(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))

    def forward(self, x, t):
        return self.layers(torch.cat((x, t.unsqueeze(1)), 1))


def _uses(net):
    made = fine_tuning(net)
    solution = sc.solve(made, "log-variance", **QUICK)
    x, s, own = torch.linspace(-1, 1, 16).reshape(8, 2), torch.full((8,), 0.5), OwnControl()
    chain = sc.diffusion_chain(net, torch.linspace(0.99, 0.1, 10), shape=(2,), steps=4)
    discrete = sc.ControlProblem(chain, reward=reward)
    paths, ends = sc.simulate(made, 8, time_steps=4, seed=0), sc.simulate(discrete, 8, seed=0)
    exact = sc.solve(made, "log-variance", control=OwnControl(), **QUICK)
    noisy = sc.solve(discrete, "log-variance", iterations=2, batch_size=64, seed=0)
    return {
        "log_ratio of a solution": lambda: paths.log_ratio(solution.control),
        "log_ratio of a module": lambda: paths.log_ratio(own),
        "log_weights": lambda: paths.log_weights(own),
        "simulate with a module": lambda: sc.simulate(made, 8, own, time_steps=4, seed=0).end,
        "simulate with a module, by a solver": lambda: sc.simulate(made, 8, own, 4, scheme="heun", seed=0).end,
        "control": lambda: solution.control(x, 0.3),
        "trained control": lambda: exact.control(x, 0.3),
        "model": lambda: exact.model(x, s),
        "model of a chain": lambda: noisy.model(x, torch.full((8,), 3)),
        "samples": lambda: ends.samples,
        "log_likelihood": lambda: sc.log_likelihood(made.reference, x, tolerance=1e-3).value,
    }, own


def test_modules_in_train_mode_are_one_function_and_keep_their_statistics():
    net = Net()
    uses, own = _uses(net)
    both = nn.ModuleList((net, own))
    before = {name: value.clone() for name, value in both.state_dict().items()}
    for name, use in uses.items():
        with torch.no_grad():
            first, again = use(), use()
            assert torch.equal(first, again), name
            with evaluating([net, own]):
                assert torch.equal(first, use()), name
        assert all(m.training for m in (*net.modules(), *own.modules())), name
        assert all(torch.equal(before[n], v) for n, v in both.state_dict().items()), name


def test_likelihoods_of_a_model_in_train_mode_cost_no_more_calls():
    counts = []
    for mode in (True, False):
        net = Net().train(mode)
        sc.log_likelihood(sc.generative_sde(net, sc.VP(), shape=(2,)), torch.ones(8, 2), tolerance=1e-3)
        counts.append(net.calls)
    assert counts[0] == counts[1] < 150


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_are_made_before_each_call(norm):
    """Old-style weight and spectral norm keep a weight that is no leaf, which torch cannot copy."""
    net = Net(noisy=False)
    norm(net.layers[0])
    net(torch.ones(4, 2), torch.ones(4))
    solution = sc.solve(fine_tuning(net), "log-variance", **QUICK)
    assert solution.sample(4, seed=0).isfinite().all() and len(copy.deepcopy(fine_tuning(net)).modules()) == 1
    own = OwnControl()
    norm(own.layers[0])
    own(torch.ones(4, 2), torch.ones(4))
    made = sc.solve(problem(), "adjoint-matching", control=own, **QUICK)
    assert made.control(torch.ones(3, 2), 0.5).shape == (3, 2)


# ---------------------------------------------------------------- no_grad and inference mode


def test_solve_works_under_no_grad():
    want = sc.solve(problem(), "adjoint-matching", **QUICK).sample(4, seed=1)
    with torch.no_grad():
        assert torch.equal(sc.solve(problem(), "adjoint-matching", **QUICK).sample(4, seed=1), want)


def test_inference_mode_is_named_where_it_is_in_the_way_and_left_where_it_is_not():
    made = problem()
    solution = sc.solve(made, "adjoint-matching", **QUICK)
    want = solution.sample(4, seed=1), solution.control(torch.ones(3, 2), 0.5)
    value = solution.evaluate(256, seed=2).elbo.value
    with torch.inference_mode():
        for call, name in (
            (problem, "ControlProblem"),
            (lambda: sc.gibbs_problem(reward, 2), "gibbs_problem"),
            (lambda: sc.solve(made, "adjoint-matching", **QUICK), "solve"),
            (lambda: sc.recommend(made), "recommend"),
        ):
            with pytest.raises(RuntimeError, match=rf"{name}\(\.\.\.\) was called inside torch.inference_mode"):
                call()
        assert torch.equal(solution.sample(4, seed=1), want[0])
        assert torch.equal(solution.control(torch.ones(3, 2), 0.5), want[1])
        assert solution.evaluate(256, seed=2).elbo.value == value
        paths = sc.simulate(made, 4, state=torch.ones(4, 2), time_steps=3, seed=0)
    assert not paths.end.is_inference()
