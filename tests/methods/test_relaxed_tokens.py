"""Reward backpropagation of masked diffusions, by relaxed tokens: its law, its gradient, its bias, and what it
refuses."""

import pytest
import torch
from cases import F64, randn
from tokens import Joint, Net, chi_square_is_fine
from torch import nn
from torch.nn.functional import one_hot

import sdecontrol as sc
from sdecontrol.chains.relaxed import RelaxedMasking
from sdecontrol.controls.token_network import TokenControl, token_layers
from sdecontrol.methods.base import find_method
from sdecontrol.paths.gradients import Objective, backpropagate
from sdecontrol.randomness import SeededNoise
from sdecontrol.training.token_model import TokenModel

L, V = 2, 3
JOINT = Joint(L, V, seed=3)
ORDERS = [("random", None), ("independent", 4)]


class Table(nn.Module):
    """A function of tokens as a table over all states, multilinear in their probabilities."""

    def __init__(self, table, states, values):
        super().__init__()
        self.table, self.hot = nn.Parameter(table.clone()), one_hot(states, values).double()

    def forward(self, x, *_):
        z = x if x.is_floating_point() else one_hot(x, self.hot.shape[-1]).double()
        weights = torch.stack([z[:, j] @ self.hot[:, j].mT for j in range(z.shape[1])]).prod(0)
        return torch.tensordot(weights, self.table, 1)


def problem_of(order="random", steps=None, joint=JOINT, alpha=1.0, **options):
    model = Table(joint.logits, joint.states, joint.vocabulary + 1).requires_grad_(False)
    chain = sc.masked_diffusion(model, joint.length, joint.vocabulary, steps, order=order, dtype=F64)
    values = Table(joint.r, joint.points, joint.vocabulary).requires_grad_(False)
    reward = sc.OneHot(values, joint.vocabulary, F64)
    return sc.ControlProblem(chain, reward=options.pop("reward", reward), alpha=alpha, **options)


def cost_of(problem, control, n, temperature, straight_through=False, *, gradient=True, mode="full", seed=1):
    """The mean cost of relaxed paths, and its gradient in the control's table."""
    chain = RelaxedMasking(problem.chain(), temperature, straight_through)
    noise = SeededNoise(seed, n, chain.steps, chain.noise_shape, dtype=F64, device="cpu")
    objective = Objective(lambda x: -problem.reward(chain.decode(x)) / problem.alpha, alpha=problem.alpha)
    start, parameters = chain.relaxed(problem.draw_start(n, 0)), list(control.parameters())
    control.zero_grad()
    with torch.enable_grad():
        found = backpropagate(chain, control, start, noise, objective, parameters=parameters, mode=mode)
    return float((found.terminal + found.kl).mean()), parameters[0].grad.clone() if gradient else None


def exact_gradient(problem, table):
    """Of -J/alpha in the table, by the law of all paths."""
    chain, leaf = problem.chain(), table.clone().requires_grad_(True)
    order = "independent" if chain.independent else "random"
    letters = JOINT.letters(chain.model)
    plain = JOINT.chain_of(letters, chain.steps, order)
    tuned = JOINT.chain_of((letters + leaf).log_softmax(-1), chain.steps, order)
    law, total = torch.eye(len(JOINT.states), dtype=F64)[-1], torch.zeros((), dtype=F64)
    for kernel, kl in zip(tuned, JOINT.kls(tuned, plain)):
        total = total + law @ kl
        law = law @ kernel
    total = total - law[JOINT.at(JOINT.points)] @ JOINT.r
    return float(total.detach()), torch.autograd.grad(total, leaf)[0]


def a_table():
    return 0.5 * randn(len(JOINT.states), L, V, seed=7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "steps", "straight"),
    [
        ("random", None, False),
        ("independent", 4, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("random", None, True), ("independent", 4, False))),
    ],
)
def test_the_bias_of_the_gradient_falls_with_the_temperature(order, steps, straight):
    problem, table = problem_of(order, steps), a_table()
    value, want = exact_gradient(problem, table)
    errors, values = [], []
    for temperature in (2.0, 0.7, 0.1):
        found, slope = cost_of(problem, Table(table, JOINT.states, V + 1), 32768, temperature, straight)
        errors.append(float((slope - want).norm() / want.norm()))
        values.append(abs(found - value))
    assert errors[0] > 1.5 * errors[1] and errors[1] > 1.5 * errors[2] and errors[2] < 0.12
    assert values[2] < 0.03  # and so does that of the objective, which of straight-through tokens has none
    assert straight == (max(values) < 0.03)


@pytest.mark.parametrize(("order", "steps"), ORDERS)
def test_the_gradient_is_that_of_the_relaxed_objective(order, steps):
    problem, table = problem_of(order, steps), a_table()
    control, way = Table(table, JOINT.states, V + 1), randn(*table.shape, seed=8)
    _, slope = cost_of(problem, control, 64, 0.4)
    ends = []
    for step in (1e-4, -1e-4):
        moved = Table(table + step * way, JOINT.states, V + 1)
        ends.append(cost_of(problem, moved, 64, 0.4, gradient=False)[0])
    assert float((slope * way).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-6)
    for mode in ("checkpoint", "adjoint"):
        assert torch.allclose(cost_of(problem, control, 64, 0.4, mode=mode)[1], slope, atol=1e-13)
    shorter = cost_of(problem, control, 64, 0.4, mode=1)[1]
    assert not torch.allclose(shorter, slope, atol=1e-3)


@pytest.mark.parametrize(("order", "steps"), ORDERS)
def test_straight_through_tokens_have_the_law_of_the_chain(order, steps):
    problem, table = problem_of(order, steps), a_table()
    chain, n = problem.chain(), 20000
    relaxed = RelaxedMasking(chain, 0.5, True)
    control = Table(table, JOINT.states, V + 1)
    noise = SeededNoise(5, n, chain.steps, chain.noise_shape, dtype=F64, device="cpu")
    x, kls = problem.draw_start(n, 0), torch.zeros(n, dtype=F64)
    z = relaxed.relaxed(x)
    with torch.no_grad():
        for k in range(chain.steps):
            c = relaxed.shift_at(k, z, control(z))
            hard = relaxed.nearest(z)
            assert torch.equal(relaxed.relaxed(hard), z)
            own = chain.shift_at(k, hard, control(hard))
            assert torch.allclose(c, own) and torch.allclose(
                relaxed.kl(c[None], [z], [k]), chain.kl(own[None], hard[None], [k])
            )
            kls += relaxed.kl(c[None], [z], [k])[0]
            z = relaxed.step(k, z, noise[k], c)
    letters = JOINT.letters(chain.model)
    tuned = JOINT.chain_of((letters + table).log_softmax(-1), chain.steps, order)
    ends = relaxed.nearest(z)
    assert int(ends.max()) < V and chi_square_is_fine(JOINT.counts(ends), JOINT.end(tuned))
    value, _ = exact_gradient(problem, table)
    got = kls - problem.reward(ends)
    assert abs(float(got.mean()) - value) < 4 * float(got.std()) / n**0.5


def test_relaxed_states_are_probabilities():
    problem = problem_of("independent", 4)
    relaxed, z = RelaxedMasking(problem.chain(), 0.7, False), None
    z = relaxed.relaxed(problem.draw_start(50, 0))
    noise = SeededNoise(5, 50, 4, relaxed.noise_shape, dtype=F64, device="cpu")
    for k in range(4):
        z = relaxed.step(k, z, noise[k])
        assert bool((z >= 0).all()) and torch.allclose(z.sum(-1), torch.ones(50, L, dtype=F64))
        assert set(z[..., V].unique().tolist()) <= {0.0, 1.0}  # masked or not: never in between
    assert float(z[..., V].max()) == 0.0 and float(z.max()) < 1.0


@pytest.mark.parametrize(
    ("control", "iterations"),
    [(None, 12), *(pytest.param(way, 60, marks=pytest.mark.slow) for way in ("frozen", "both"))],
    ids=["tuned", "frozen", "both"],
)
def test_a_default_model_is_tuned_by_its_gradient(control, iterations):
    joint = Joint(3, 3, size=1.5, seed=5)
    torch.manual_seed(0)
    model = TokenModel((3,), 3).double()
    model.fit_statistics(joint.points)
    chain = sc.masked_diffusion(model, 3, 3, order="random")
    reward = sc.OneHot(Table(joint.r, joint.points, 3).requires_grad_(False), 3, F64)
    problem = sc.ControlProblem(chain, reward=reward)
    options = {"batch_size": 64, "seed": 0, "progress": False, "learning_rate": 1e-2 if control is None else 5e-3}
    solution = sc.solve(problem, "reward-backprop", control=control, iterations=iterations, **options)
    before = joint.gap_of(problem, lambda x, t: torch.zeros(len(x), 3, 3, dtype=F64))
    assert joint.gap_of(problem, solution.control) < (0.8 if control is None else 0.5) * before
    x = solution.sample(64, seed=1)
    assert x.dtype == torch.int64 and int(x.max()) < 3


@pytest.mark.slow
def test_cold_tokens_come_nearer_to_the_optimum_than_warm_ones():
    joint = Joint(3, 3, size=1.5, seed=5)
    problem = problem_of(joint=joint)
    gaps = []
    for temperature in (1.0, 0.2):
        method = sc.RewardBackprop(temperature=temperature)
        solution = sc.solve(problem, method, iterations=150, batch_size=128, seed=0, progress=False)
        gaps.append(joint.gap_of(problem, solution.control))
    assert gaps[1] < 0.12 < gaps[0]


# ---------------------------------------------------------------- functions of probabilities


@pytest.mark.parametrize("values", [4, 40])
def test_networks_take_one_hot_tokens_as_tokens(values):
    torch.manual_seed(0)
    x = torch.randint(values + 1, (6, 3))
    z = one_hot(x, values + 1).double()
    model, s = TokenModel((3,), values).double(), torch.ones(6, dtype=F64)
    nn.init.normal_(model.last.weight)
    assert torch.allclose(model(x, s), model(z, s), atol=1e-13)
    chain = sc.masked_diffusion(model, 3, values)
    problem = sc.ControlProblem(chain)
    control = TokenControl.of(problem, token_layers(problem))
    nn.init.normal_(control.last)
    assert torch.allclose(control.at(x, s[0]), control.at(z, s[0]), atol=1e-12)


def test_one_hot_hands_on_probabilities_and_encodes_tokens():
    weights = randn(2, V, seed=1)
    reward = sc.OneHot(lambda z: (z * weights).sum((1, 2)), V, F64)
    x = torch.tensor([[0, 2], [1, 1]])
    assert torch.equal(reward(x), weights.gather(1, x.mT).sum(0)) and torch.equal(
        reward(one_hot(x, V).double()), reward(x)
    )
    scaled = sc.OneHot(lambda z, y: y * z[:, 0, 0], V)
    assert scaled(torch.tensor([[0, 1]]), torch.tensor([3.0])).tolist() == [3.0]
    net = sc.OneHot(nn.Sequential(nn.Flatten(), nn.Linear(2 * V, 2)), V)
    assert sc.LogProb(net, 1)(x).shape == (2,)
    with pytest.raises(ValueError, match="x has tokens from 0 to 3"):
        reward(torch.tensor([[3, 0]]))
    with pytest.raises(TypeError, match="function must be callable"):
        sc.OneHot(3, V)
    with pytest.raises(ValueError, match="vocabulary"):
        sc.OneHot(net, 1)


def test_a_classifier_of_probabilities_is_a_reward():
    torch.manual_seed(0)
    net = sc.OneHot(nn.Sequential(nn.Flatten(), nn.Linear(L * V, 2)).double(), V)
    find_method("reward-backprop").check(problem_of(reward=sc.LogProb(net, 1)))


class OfProbabilities(Table):
    """Refuses what are no probabilities of tokens, but for the small differences by which derivatives are judged."""

    def forward(self, x, *_):
        if x.is_floating_point() and max(-x.detach().min(), (x.detach().sum(-1) - 1).abs().max()) > 1e-3:
            raise ValueError("no probabilities")
        return super().forward(x)


def test_models_and_rewards_are_asked_at_probabilities_alone():
    model = OfProbabilities(JOINT.logits, JOINT.states, V + 1).requires_grad_(False)
    values = OfProbabilities(JOINT.r, JOINT.points, V).requires_grad_(False)
    problem = sc.ControlProblem(
        sc.masked_diffusion(model, L, V, dtype=F64), reward=sc.OneHot(values, V, F64), alpha=1.0
    )
    check(problem)
    sc.solve(problem, "reward-backprop", iterations=1, batch_size=64, seed=0)


# ---------------------------------------------------------------- what cannot work


def check(problem, **settings):
    find_method(sc.RewardBackprop(**settings)).check(problem)


def test_a_reward_of_tokens_is_refused_with_the_remedy():
    with pytest.raises(sc.NotDifferentiable, match=r"reward-backprop needs.*reward.*sc.OneHot\(function, vocabulary\)"):
        check(JOINT.problem(Table(JOINT.logits, JOINT.states, V + 1)))


def test_a_reward_whose_gradient_is_cut_off_is_refused():
    flat = sc.OneHot(lambda z: z.detach()[:, 0, 0], V, F64)
    with pytest.raises(sc.NotDifferentiable, match="reward has no gradient to go by"):
        check(problem_of(reward=flat))
    jumps = sc.OneHot(lambda z: (z[:, 0, 0] > 0.5) + 0.0 * z.sum((1, 2)), V, F64)
    with pytest.raises(sc.NotDifferentiable, match="reward has no gradient to go by"):
        check(problem_of(reward=jumps))


def test_a_model_of_tokens_alone_is_refused():
    chain = sc.masked_diffusion(Net(L, V), L, V, order="random")
    problem = sc.ControlProblem(chain, reward=sc.OneHot(lambda z: z[:, 0, 0], V, F64))
    with pytest.raises(sc.NotDifferentiable, match="model has no gradient to go by: called with probabilities"):
        check(problem)


def test_a_running_cost_of_tokens_is_refused():
    with pytest.raises(sc.NotDifferentiable, match="running_cost has no gradient to go by: it is made of tokens"):
        check(problem_of(running_cost=lambda x, t: (x == V).sum(1).double()))


def test_jump_processes_are_refused():
    process = sc.JumpProcess(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]), initial=0)
    with pytest.raises(sc.NotDifferentiable, match="reward-backprop"):
        check(sc.ControlProblem(process, reward=sc.OneHot(lambda z: z[:, 0, 0], 2)))


@pytest.mark.parametrize("gradient", ["continuous-adjoint", "reversible-heun"])
def test_gradients_in_continuous_time_are_refused(gradient):
    with pytest.raises(ValueError, match=f"gradient='{gradient}' is for SDEs"):
        check(problem_of(), gradient=gradient)


def test_a_control_of_tokens_alone_is_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(V + 1, V, dtype=F64))

        def forward(self, x, t):
            return self.table[x]

    with pytest.raises(sc.NotDifferentiable, match=r"differentiates the control by the state.*of tokens"):
        sc.solve(problem_of(), "reward-backprop", control=Own(), iterations=1, progress=False)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperatures_are_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        sc.RewardBackprop(temperature=temperature)


@pytest.mark.parametrize("straight_through", [False, True])
def test_no_lower_bound_is_reported_where_there_is_no_likelihood(straight_through):
    """It would be E r/alpha without the KL, which the end of a run is decided by."""
    method = sc.RewardBackprop(straight_through=straight_through)
    control = Table(a_table(), JOINT.states, V + 1)
    options = {"iterations": 2, "batch_size": 64, "seed": 0, "progress": False}
    history = sc.solve(problem_of(), method, control=control, **options).history
    assert all(metrics["kl"] > 0.1 and "elbo" not in metrics for metrics in history)
