"""Exact solutions on finite spaces, against enumeration of whole paths and against one another."""

import itertools
import math

import numpy as np
import pytest
import torch
from cases import F64, but_slow, randn
from scipy import sparse
from scipy.integrate import solve_ivp

import sdecontrol as sc
from sdecontrol.chains.categorical import CategoricalChain
from sdecontrol.chains.transitions import product_transition
from sdecontrol.controls.given import given_control
from sdecontrol.evaluation.solution import Solution
from sdecontrol.processes.finite import StateSpace

K, V = 3, 3


class Space:
    """Random kernels on ``V^L`` tokens in K steps, reward and running cost, and the law of whole paths."""

    def __init__(self, length=1, alpha=0.8, size=1.0, seed=0, cost=True, holes=False):
        self.length, self.alpha = length, alpha
        self.points = torch.tensor(list(itertools.product(range(V), repeat=length)))
        n = len(self.points)
        logits = randn(K, n, length, V, seed=seed)
        if holes:  # values that cannot follow
            logits[:, ::2, 0, 1] = -math.inf
        self.table = logits.log_softmax(-1)
        self.r, self.f = size * randn(n, seed=seed + 1), float(cost) * 0.5 * randn(n, seed=seed + 2).abs()
        start = torch.zeros(length, dtype=torch.int64)
        self.chain = CategoricalChain(lambda k, x: self.table[k][self.index(x)], K, V, start, dtype=F64)
        self.problem = sc.ControlProblem(
            self.chain,
            reward=lambda x: self.r[self.index(x)],
            running_cost=(lambda x, t: (1 + t) * self.f[self.index(x)]) if cost else None,
            alpha=alpha,
        )

    def index(self, x):
        return (x * V ** torch.arange(self.length - 1, -1, -1)).sum(-1)

    def kernel(self, k):
        rows = self.table[k].exp()
        return torch.stack([rows[:, j, self.points[:, j]] for j in range(self.length)]).prod(0)

    def path_law(self, tilt=True):
        """Weights of all paths ``(n, n, .., n)`` from state 0, times ``exp(R/alpha)``."""
        law = torch.ones((), dtype=F64)
        for k in range(K):
            shape = [1] * k + [len(self.points)] * 2
            factor = self.kernel(k)
            if tilt:
                factor = factor * torch.exp(-(1 + k / K) * self.f / (K * self.alpha))[:, None]
            law = law.unsqueeze(-1) * (factor.reshape(shape) if k else factor[:1].reshape(1, -1))
        return law[0] * torch.exp(self.r / self.alpha) if tilt else law[0]


@pytest.mark.parametrize("length, holes", [(1, False), (2, False), (2, True)])
def test_everything_against_the_law_of_whole_paths(length, holes):
    space = Space(length, holes=holes)
    exact, weights = sc.exact_solution(space.problem), space.path_law()
    z = weights.sum()
    best = weights / z  # of (x_1, x_2, x_3)
    n = len(space.points)
    assert float(exact.log_z) == pytest.approx(float(z.log()), abs=1e-13)
    assert float(exact.value(space.points[:1], 0.0)) == pytest.approx(space.alpha * float(z.log()), abs=1e-13)
    assert float(exact.start_log_z) == pytest.approx(float(z.log()), abs=1e-13)
    for k, keep in enumerate([(0,), (1,), (2,)]):
        other = [i for i in range(K) if i not in keep]
        assert torch.allclose(exact.marginal((k + 1) / K).probs, best.sum(other), atol=1e-13)
    assert torch.equal(exact.marginal(0.0).probs, torch.eye(n, dtype=F64)[0])
    first = best.sum(2)
    met = first.sum(1) > 0
    want = first[met] / first[met].sum(1, keepdim=True)
    assert torch.allclose(exact.kernel(space.points[met], 1).probs, want, atol=1e-12)
    assert torch.allclose(exact.kernel(space.points[0], 0).probs, best.sum((1, 2)), atol=1e-13)
    ends = best.sum(1)
    assert torch.allclose(exact.bridge(1 / K, 1.0, space.points).probs, (ends / ends.sum(0)).T, atol=1e-12)


def test_values_are_conditional_expectations():
    """Of a chain that begins anew at step 1, from every state."""
    space = Space(2)
    exact = sc.exact_solution(space.problem)
    psi = (space.r / space.alpha).exp()
    for k in reversed(range(K)):
        psi = torch.exp(-(1 + k / K) * space.f / (K * space.alpha)) * (space.kernel(k) @ psi)
        assert torch.allclose(exact.value(space.points, k / K), space.alpha * psi.log(), atol=1e-13)
    times = torch.tensor([0.0, 2 / K, 1.0], dtype=F64)
    rows = torch.stack([exact.value(space.points[3:4], float(t))[0] for t in times])
    assert torch.equal(exact.value(space.points[3:4].expand(3, -1), times), rows)


def test_one_position_has_its_kernel_as_control_and_no_floor():
    space = Space(1, size=2.0)
    exact = sc.exact_solution(space.problem)
    assert float(exact.floor) == 0.0
    c = exact.control(space.points, 1 / K)
    assert torch.allclose((space.table[1] + c).exp()[:, 0], exact.kernel(space.points, 1).probs, atol=1e-13)
    paths = sc.simulate(space.problem, 256, exact.control, seed=0)
    assert torch.allclose(paths.log_weights(), exact.log_z.expand(256), atol=1e-12)
    ev = exact.evaluate(256, seed=0)
    assert abs(ev.gap.value) < 1e-12 and ev.verdict == "confirmed"
    far = sc.ControlProblem(space.chain, reward=lambda x: 2000 * space.r[space.index(x)], alpha=0.5)
    again = sc.exact_solution(far)  # in logarithms: no underflow
    assert bool(again.value(space.points, 0.0).isfinite().all()) and abs(again.evaluate(64, seed=0).gap.value) < 1e-9


def gap_of(space, tilts):
    """``KL(P^u || Q_fine)`` of tilts ``(K, n, L, V)``, by enumeration, with its graph."""
    law, total = torch.eye(len(space.points), dtype=F64)[0], space.path_law().sum().log()
    for k in range(K):
        c = tilts[k] - (space.table[k] + tilts[k]).logsumexp(-1, keepdim=True)
        rows = (space.table[k] + c).exp()
        cost = (rows * c).sum((1, 2)) + (1 + k / K) * space.f / (K * space.alpha)
        total = total + (law * cost).sum()
        law = law @ torch.stack([rows[:, j, space.points[:, j]] for j in range(space.length)]).prod(0)
    return total - (law * space.r).sum() / space.alpha


@pytest.mark.parametrize("length", [2, 3])
def test_the_best_product_is_where_the_gap_is_flat_and_the_floor_is_its_gap(length):
    space = Space(length, size=1.5)
    exact = sc.exact_solution(space.problem)
    tilts = torch.stack([exact.control(space.points, k / K) for k in range(K)]).requires_grad_(True)
    gap = gap_of(space, tilts)
    (slope,) = torch.autograd.grad(gap, tilts)
    assert float(slope.abs().max()) < 1e-11
    assert float(exact.floor) == pytest.approx(float(gap), abs=1e-12) and float(gap) > 0.05
    with torch.no_grad():  # no nearby tilt is better
        for seed in range(20):
            assert float(gap_of(space, tilts + 0.1 * randn(*tilts.shape, seed=seed))) > float(gap)
    ev = exact.evaluate(4096, seed=1)
    assert abs(ev.gap.value - float(exact.floor)) < 4 * ev.gap.stderr


def test_the_floor_of_products_is_of_first_order_in_the_step():
    """Two tokens, each of which changes at rate 1, a reward of their pair."""
    r = 1.5 * randn(V * V, seed=5)
    floors = []
    for steps in (8, 16, 32):
        stay = math.exp(-1.0 / steps)
        table = (torch.full((V, V), (1 - stay) / V, dtype=F64) + stay * torch.eye(V, dtype=F64)).log()
        start = torch.zeros(2, dtype=torch.int64)
        chain = CategoricalChain(lambda k, x, table=table: table[x], steps, V, start, dtype=F64)
        floors.append(
            float(sc.exact_solution(sc.ControlProblem(chain, reward=lambda x: r[V * x[:, 0] + x[:, 1]])).floor)
        )
    assert 0.4 < floors[1] / floors[0] < 0.65 and 0.4 < floors[2] / floors[1] < 0.6, floors


def test_control_error_is_the_kl_per_step():
    space = Space(1, size=2.0)
    exact, steps = sc.exact_solution(space.problem), range(K)
    star = torch.stack([exact.control(space.points, k / K) for k in steps])
    law, error = torch.eye(V, dtype=F64)[0], 0.0
    for k in steps:
        best = (space.table[k] + star[k]).exp()[:, 0]
        error += float(law @ (best * (best.log() - space.table[k][:, 0])).sum(1))
        law = law @ best
    control = given_control(space.problem, None)
    zero = Solution(space.problem, control, method="none", settings={"time_steps": None, "scheme": None})
    found = sc.control_error(zero, exact, n=8192)
    assert abs(found.absolute.value - error / K) < 4 * found.absolute.stderr and "KL per step" in str(found)
    assert found.relative.value == pytest.approx(1.0, abs=1e-6)
    control = given_control(space.problem, exact.control)
    same = sc.control_error(Solution(space.problem, control, method="none", settings=zero.settings), exact)
    assert abs(same.absolute.value) < 1e-12


def test_only_values_that_can_follow_are_multiplied_out():
    """Masked tokens: (2V + 1)^L transitions."""
    length, values = 3, 2
    space = StateSpace(values + 1, (length,))

    def log_probs(x):
        rows = torch.full((*x.shape, values + 1), -math.inf, dtype=F64)
        for v in range(values):
            rows[..., v] = torch.where(x == v, 0.0, torch.where(x == values, math.log(0.25), -math.inf))
        rows[..., values] = torch.where(x == values, math.log(0.5), -math.inf)
        return rows

    matrix = product_transition(space, log_probs)
    assert matrix.nnz == (2 * values + 1) ** length and np.allclose(matrix.sum(1), 1.0)
    dense = log_probs(space.states(torch.arange(27))).exp()
    points = space.states(torch.arange(27))
    want = torch.stack([dense[:, j, points[:, j]] for j in range(length)]).prod(0)
    assert np.allclose(matrix.toarray(), want)


def test_too_many_states_and_transitions_are_refused():
    start = torch.zeros(12, dtype=torch.int64)
    flat = lambda k, x: torch.zeros(*x.shape, 5).log_softmax(-1)  # noqa: E731
    chain = CategoricalChain(flat, 2, 5, start)
    with pytest.raises(sc.NoExactSolution, match=r"5\^12 states"):
        sc.exact_solution(sc.ControlProblem(chain, reward=lambda x: x.sum(1).float()))
    chain = CategoricalChain(flat, 2, 5, start[:6])
    with pytest.raises(sc.NoExactSolution, match="more than 5e\\+07 transitions"):
        sc.exact_solution(sc.ControlProblem(chain, reward=lambda x: x.sum(1).float()))


# ---------------------------------------------------------------- jump processes


def rates(n=5, seed=0):
    q = randn(n, n, seed=seed).exp()
    q.fill_diagonal_(0.0)
    return q - torch.diag(q.sum(1))


def jumps(given, cost=None, initial=1, alpha=0.6, horizon=1.3, start=None):
    process = sc.JumpProcess(given, horizon=horizon, initial=initial)
    r = 1.5 * randn(process.values, seed=7)
    return sc.ControlProblem(process, reward=lambda x: r[x[:, 0]], running_cost=cost, alpha=alpha, start=start)


def f_constant(x, t):
    return 0.4 * x[:, 0].to(F64)


def f_of_time(x, t):
    return 0.4 * (1 + t.sin()) * x[:, 0].to(F64)


PROCESSES = {
    "constant": (lambda: jumps(rates()), 1e-12),
    "constant, a cost": (lambda: jumps(rates(), f_constant), 1e-12),
    "a cost of time": (lambda: jumps(rates(), f_of_time), 1e-10),
    "rates of time": (lambda: jumps(lambda t: rates() * (1 + t) + rates(seed=1) * t.cos() ** 2), 1e-10),
    "sparse": (lambda: jumps(rates().to_sparse(), f_constant), 1e-12),
    "sparse, of time": (lambda: jumps(lambda t: (rates() * (1 + t)).to_sparse(), f_of_time), 1e-10),
    "a random start": (lambda: jumps(rates(), f_constant, torch.tensor([0.1, 0.2, 0.0, 0.4, 0.3], dtype=F64)), 1e-12),
}


def by_ode(p, s, t, n=5):
    """``U(s, t)`` of ``Q - f/alpha`` by Kolmogorov's forward equation with killing."""
    x = torch.arange(n).unsqueeze(1)

    def slope(time, y):
        q = p.reference.rates_at(time)
        q = q if isinstance(q, np.ndarray) else q.toarray()
        f = 0.0
        if p.running_cost_function is not None:
            f = p.running_cost(x, torch.tensor(time, dtype=F64)).numpy() / p.alpha
        return (y.reshape(n, n) @ (q - np.diag(np.zeros(n) + f))).ravel()

    return solve_ivp(slope, (s, t), np.eye(n).ravel(), "DOP853", rtol=1e-13, atol=1e-15).y[:, -1].reshape(n, n)


@pytest.mark.slow
@pytest.mark.parametrize("case", but_slow(PROCESSES, "sparse, of time"))
def test_continuous_time_against_kolmogorovs_equation(case):
    make, tolerance = PROCESSES[case]
    p = make()
    exact, horizon, s, t = sc.exact_solution(p), p.horizon, 0.37, 0.9
    x = torch.arange(5).unsqueeze(1)
    end = (p.reward(x) / p.alpha).exp().numpy()
    first = np.eye(5)[1] if p.from_point else p.initial.probs.numpy()
    whole = by_ode(p, 0.0, horizon) @ end
    loose = max(tolerance, 1e-11)
    assert float(exact.log_z) == pytest.approx(math.log(first @ whole), abs=loose)
    assert float(exact.start_log_z) == pytest.approx(first @ np.log(whole), abs=loose)
    at = {time: by_ode(p, time, horizon) @ end for time in (s, t)}
    for time, psi in at.items():
        assert np.allclose(exact.value(x, time), p.alpha * np.log(psi), atol=loose)
        law = (first / whole) @ by_ode(p, 0.0, time) * psi
        assert np.allclose(exact.marginal(time).probs, law, atol=loose)
    between = by_ode(p, s, t)
    joint = ((first / whole) @ by_ode(p, 0.0, s))[:, None] * between * at[t]
    assert np.allclose(exact.bridge(s, t, x).probs, (joint / joint.sum(0)).T, atol=loose)
    u, moves = exact.control(x, s)[:, 0].numpy(), p.reference.moves
    w = np.log(at[s])
    if moves is None:
        assert np.allclose(u, w[None] - w[:, None], atol=loose)
    else:
        want = np.where(moves.numpy() < 0, 0.0, w[moves.numpy()] - w[:, None])
        assert np.allclose(u, want, atol=loose)
    assert np.array_equal(exact.value(x, horizon), p.reward(x))


NU = torch.tensor([0.1, 0.2, 0.0, 0.4, 0.3], dtype=F64)


def f_everywhere(x, t):
    return 0.4 + f_constant(x, t)


@pytest.mark.parametrize("cost", [None, f_everywhere])
def test_a_controlled_start_is_the_reference_law_times_the_exponential_of_the_value(cost):
    """And so log Z is reached, of the same chain and of the same process as where the start is fixed."""
    p, fixed = (jumps(rates(), cost, NU, horizon=0.4, start=start) for start in ("controlled", "fixed"))
    x = torch.arange(5).unsqueeze(1)
    end = (p.reward(x) / p.alpha).exp().numpy()
    for options in ({}, {"time_steps": 6}):
        exact, other = sc.exact_solution(p, **options), sc.exact_solution(fixed, **options)
        v, z = (other.value(x, 0.0) / p.alpha).exp(), float(other.log_z)
        want = NU * v / (NU * v).sum()
        assert torch.allclose(exact.initial.probs, want, atol=1e-13)
        assert torch.allclose(exact.value(x, 0.2), other.value(x, 0.2), atol=1e-13)
        for known in (exact.log_z, exact.start_log_z, exact.elbo, exact.value(x[:1], -1.0)[0] / p.alpha):
            assert float(known) == pytest.approx(z, abs=1e-12)
        assert float(other.start_log_z) < z - 0.01
        tilt = exact.control(x[:2], -1.0)  # of the law, whatever the point before it
        assert torch.allclose(tilt[:, 0].exp() * NU, want.expand(2, -1), atol=1e-13)
        if cost is None:  # of the end too, and of bridges
            kernel = torch.from_numpy(by_ode(p, 0.0, p.horizon)).numpy()
            joint = NU.numpy()[:, None] * kernel * end
            assert np.allclose(exact.marginal(p.horizon).probs, joint.sum(0) / joint.sum(), atol=1e-11)
            assert np.allclose(exact.bridge(0.0, p.horizon, x).probs, (joint / joint.sum(0)).T, atol=1e-11)
    log_w = sc.simulate(p, 256, exact.control, time_steps=6, seed=0).log_weights()
    assert torch.allclose(log_w, exact.log_z.expand(256), atol=1e-12)
    with pytest.raises(sc.NoExactSolution, match="laws from time 0 on"):
        sc.exact_solution(p).marginal(-0.5)


def test_exact_chains_without_costs_have_the_values_of_continuous_time():
    for given in (rates(), lambda t: rates() * (1 + t)):
        p = jumps(given)
        exact, chain = sc.exact_solution(p), sc.exact_solution(p, time_steps=7)
        x = torch.arange(5).unsqueeze(1)
        for k in range(8):
            t = p.horizon * k / 7
            assert torch.allclose(exact.value(x, t), chain.value(x, t), atol=1e-11)
            assert torch.allclose(exact.marginal(t).probs, chain.marginal(t).probs, atol=1e-11)
        few = jumps(rates().to_sparse())
        error = [float(sc.exact_solution(few, time_steps=k).log_z - sc.exact_solution(few).log_z) for k in (40, 80)]
        assert 0.4 < error[1] / error[0] < 0.6


def test_the_continuous_control_on_a_chain_is_of_first_order():
    p = jumps(rates())
    exact = sc.exact_solution(p)
    gaps = []
    for steps in (50, 200):
        found = sc.simulate(p, 4096, exact.control, time_steps=steps, seed=0).log_weights()
        gaps.append(float(exact.log_z) - float(found.mean()))
    assert 0 < gaps[1] < 0.5 * gaps[0] < 0.05
    assert exact.evaluate(64, seed=0).exact


def test_a_large_sparse_space_in_continuous_time():
    """Immigration and death: from x_0, x_T is Binomial(x_0, q) + Poisson(m (1 - q)), with q = exp(-death T) and m =
    birth / death."""
    n = 20000
    up, down = np.full(n - 1, 3.0), 0.001 * np.arange(1, n)
    q = sparse.diags_array([up, down], offsets=[1, -1])
    q = (q - sparse.diags_array(q.sum(1))).tocsr()
    p = sc.ControlProblem(
        sc.JumpProcess(q, horizon=1.0, initial=3000), reward=lambda x: 0.2 * (x[:, 0] - 3000.0).clamp(-1000, 1000)
    )
    exact = sc.exact_solution(p)
    q1, s = math.exp(-0.001), math.exp(0.2)
    want = 3000 * math.log(1 + q1 * (s - 1)) + 3000 * (1 - q1) * (s - 1) - 0.2 * 3000
    assert float(exact.log_z) == pytest.approx(want, abs=1e-4)  # of single precision
    assert exact.control(torch.tensor([[3000]]), 0.5).shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda e: e.value(torch.zeros(2, 1), 0.0), TypeError, "x must be int64 tokens"),
        (lambda e: e.value(torch.tensor([[5]]), 0.0), ValueError, "x has tokens from 5 to 5; they are 0 to 4"),
        (lambda e: e.control(torch.tensor([[-1]]), 0.0), ValueError, "x has tokens from -1"),
        (lambda e: e.value(torch.zeros(2, 2, dtype=torch.int64), 0.0), ValueError, r"x must have shape \(batch, 1\)"),
        (lambda e: e.bridge(0.5, 0.5, torch.tensor([1])), ValueError, "needs s < t"),
        (lambda e: e.kernel(torch.tensor([1]), 0), sc.NoExactSolution, "one step of a chain"),
        (lambda e: e.value(torch.tensor([[1]]), 2.0), ValueError, "t must be from 0 to 1.3"),
    ],
)
def test_bad_questions_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call(sc.exact_solution(jumps(rates())))


def test_a_value_beyond_double_precision_is_refused_in_continuous_time_and_known_on_the_chain():
    p = jumps(rates(), alpha=1e-3)
    with pytest.raises(sc.NoExactSolution, match="Use a larger alpha"):
        sc.exact_solution(p)
    assert math.isfinite(float(sc.exact_solution(p, time_steps=10).log_z))


def test_an_end_that_is_never_reached_has_no_bridge():
    q = torch.tensor([[-1.0, 1.0], [0.0, 0.0]], dtype=F64)
    exact = sc.exact_solution(sc.ControlProblem(sc.JumpProcess(q, initial=1), reward=lambda x: x[:, 0].to(F64)))
    with pytest.raises(ValueError, match="never is in"):
        exact.bridge(0.2, 0.5, torch.tensor([0]))


def test_like_and_settings_find_the_chain():
    p = jumps(rates())
    solution = sc.solve(p, sc.SMC(num_particles=16), time_steps=6, seed=0, progress=False)
    exact = sc.exact_solution(p, like=solution)
    assert exact.settings == {"time_steps": 6, "scheme": "exact"} and exact.chain is p.chain(6)
    assert sc.exact_solution(p, time_steps=20, scheme="euler").chain.scheme == "euler"
    with pytest.raises(ValueError, match="time_steps and scheme do not apply"):
        sc.exact_solution(Space().problem, time_steps=4)
    assert "5 states" in repr(exact) and "continuous time" in repr(sc.exact_solution(p))


def test_rates_of_time_in_single_precision_are_solved_to_it():
    """They are smooth to their rounding only, which tolerances of double precision would chase for ever."""
    process = sc.JumpProcess(lambda t: (rates() * (1 + t)).float(), horizon=1.3, initial=1)
    single = sc.ControlProblem(process, reward=lambda x: 1.5 * randn(5, seed=7).float()[x[:, 0]], alpha=0.6)
    double = sc.exact_solution(jumps(lambda t: rates() * (1 + t)))
    for options in ({}, {"time_steps": 4}):
        assert float(sc.exact_solution(single, **options).log_z) == pytest.approx(float(double.log_z), abs=2e-6)
