"""Jump processes: rates as given, kernels against scipy's exponentials, simulation against exact laws, bad input."""

import math

import numpy as np
import pytest
import torch
from cases import F64
from scipy import sparse
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from scipy.stats import chi2

import sdecontrol as sc
from sdecontrol.chains.categorical import CategoricalChain
from sdecontrol.processes.finite import FiniteLaw, StateSpace
from sdecontrol.processes.rates import exponential, exponential_action, moves_between, time_ordered

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
N = 6


def birth_death(n=N, birth=2.0, death=0.7):
    rates = torch.zeros(n, n, dtype=F64)
    for x in range(n):
        if x + 1 < n:
            rates[x, x + 1] = birth
        if x:
            rates[x, x - 1] = death * x
    return rates - torch.diag(rates.sum(1))


def random_rates(n, seed=0, share=1.0):
    rng = np.random.default_rng(seed)
    rates = rng.exponential(size=(n, n)) * (rng.random((n, n)) < share)
    np.fill_diagonal(rates, 0.0)
    return torch.from_numpy(rates - np.diag(rates.sum(1)))


def problem(rates, initial=2, alpha=0.7, cost=False, **options):
    process = sc.JumpProcess(rates, horizon=1.5, initial=initial, **options)
    r = torch.randn(process.values, dtype=F64, generator=torch.Generator().manual_seed(0)).to(process.dtype)
    f = (lambda x, t: 0.3 * (1 + t) * (x[:, 0] % 3).to(process.dtype)) if cost else None
    return sc.ControlProblem(process, reward=lambda x: r[x[:, 0]], running_cost=f, alpha=alpha)


def tilted(p, size=0.7):
    """A control with a random tilt of every value at every state, the same at all times."""
    n, m = p.reference.values, p.control_shape[-1]
    table = size * torch.randn(n, 1, m, dtype=F64, generator=torch.Generator().manual_seed(3)).to(p.dtype)
    return lambda x, t: table[x[:, 0]]


# ---------------------------------------------------------------- exponentials


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_exponentials_of_rates_are_scipys(kind):
    dense = random_rates(12, seed=1).numpy()
    given = dense if kind == "dense" else sparse.csr_array(dense)
    y = np.random.default_rng(0).random((12, 3))
    for time in (0.01, 1.0, 30.0):
        want = expm(time * dense)
        assert np.allclose(exponential(given, time), want, rtol=1e-12, atol=1e-15)
        assert np.allclose(exponential_action(given, time, y), want @ y, rtol=1e-12)
        killed = dense - np.diag(y[:, 0])
        assert np.allclose(exponential_action(killed, time, y[:, 1]), expm(time * killed) @ y[:, 1], rtol=1e-11)


def test_small_probabilities_keep_their_digits():
    """Pure births at rate 1 are Poisson counts: ten jumps in 1e-3 have probability e^-h h^10/10!, 3e-37."""
    n, h = 12, 1e-3
    rates = np.diag(np.ones(n - 1), 1) - np.diag(np.r_[np.ones(n - 1), 0.0])
    want = np.exp(-h + 10 * np.log(h) - np.log(np.arange(1, 11)).sum())
    assert exponential(rates, h)[0, 10] == pytest.approx(want, rel=1e-12)
    assert exponential_action(rates, h, np.eye(n)[10])[0] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_time_ordered_exponentials_solve_kolmogorovs_equations(kind):
    one, two = random_rates(5, seed=1).numpy(), random_rates(5, seed=2).numpy()
    rates = lambda t: one * (1 + np.sin(3 * t)) + two * t**2  # noqa: E731
    given = rates if kind == "dense" else lambda t: sparse.csr_array(rates(t))
    forward = lambda t, p: (p.reshape(5, 5) @ rates(t)).ravel()  # noqa: E731
    want = solve_ivp(forward, (0.2, 1.7), np.eye(5).ravel(), "DOP853", rtol=1e-12, atol=1e-14).y[:, -1].reshape(5, 5)
    y = np.random.default_rng(0).random(5)
    assert np.allclose(time_ordered(given, 0.2, 1.7, np.eye(5)), want, atol=1e-11)
    assert np.allclose(time_ordered(given, 0.2, 1.7, y, forward=True), want.T @ y, atol=1e-11)


def test_rates_may_jump_in_time():
    one, two = random_rates(5, seed=1).numpy(), random_rates(5, seed=2).numpy()
    found = time_ordered(lambda t: one if t < 0.3 else two, 0.0, 1.0, np.eye(5))
    assert np.allclose(found, expm(0.3 * one) @ expm(0.7 * two), atol=1e-8)


# ---------------------------------------------------------------- kernels and paths


def test_exact_kernels_do_not_depend_on_the_grid():
    p = problem(birth_death())
    whole, parts = p.chain(1).transition(0).toarray(), p.chain(7)
    assert np.allclose(whole, expm(1.5 * birth_death().numpy()), atol=1e-14)
    made = np.linalg.multi_dot([parts.transition(k).toarray() for k in range(7)])
    assert np.allclose(made, whole, atol=1e-14)
    uneven = p.chain([0.0, 0.1, 0.7, 1.5])
    assert np.allclose(np.linalg.multi_dot([uneven.transition(k).toarray() for k in range(3)]), whole, atol=1e-14)


def test_euler_kernels_are_i_plus_hq_dense_and_sparse():
    rates = birth_death()
    want = np.eye(N) + 0.1 * rates.numpy()
    for given in (rates, rates.to_sparse(), rates.to_sparse_csr(), sparse.csr_matrix(rates.numpy())):
        chain = problem(given).chain(15, "euler")
        assert np.allclose(chain.transition(3).toarray(), want, atol=1e-15)
        x = torch.arange(N).unsqueeze(1)
        probs, to = chain.log_probs(3, x)[:, 0].double().exp(), chain.following(x)[:, 0]
        rows = torch.zeros(N, N, dtype=F64)
        for j in range(to.shape[1]):
            inside = to[:, j] >= 0
            rows[x[inside, 0], to[inside, j]] += probs[inside, j]
        assert np.allclose(rows.numpy(), want, atol=1e-7)


def test_moves_of_few_differences_mean_the_same_from_every_state():
    assert moves_between(sparse.csr_array(birth_death(4).numpy())).tolist() == [
        [-1, 0, 1],
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, -1],
    ]
    few = sparse.csr_array(random_rates(40, seed=1, share=0.05).numpy())
    table = moves_between(few)
    for x in range(40):
        assert sorted(table[x][table[x] >= 0]) == sorted({x, *few[[x]].indices.tolist()})


CASES = {
    "exact": lambda: (problem(birth_death()), {}),
    "euler": lambda: (problem(birth_death()), {"scheme": "euler"}),
    "sparse": lambda: (problem(birth_death().to_sparse()), {}),
    "of time": lambda: (problem(lambda t: (1 + t) * birth_death()), {}),
    "single precision": lambda: (problem(birth_death().float()), {}),
}


def dense_chain(p, chain, control):
    """``(n, n)`` kernels of the reference and of the control, by the chain's own tables."""
    x = torch.arange(p.reference.values).unsqueeze(1)
    n, to = len(x), chain.following(x)[:, 0]
    index = torch.where(to < 0, n, to)
    c, out = chain.shift_at(0, x, control(x, None)), []
    for k in range(chain.steps):
        c = chain.shift_at(k, x, control(x, None))
        logits = chain.log_probs(k, x)
        for weights in (logits, logits + c):
            rows = torch.zeros(n, n + 1, dtype=F64).scatter_add_(1, index, weights[:, 0].double().exp())
            out.append(rows[:, :n].numpy())
    return out[::2], out[1::2]


@pytest.mark.parametrize("case", CASES)
def test_paths_have_the_kernels_law_and_log_ratios(case):
    """Ends against the product of tilted kernels (chi-square, p >= 1e-5), log-ratios to rounding."""
    p, options = CASES[case]()
    control = tilted(p)
    chain = p.chain(12, options.get("scheme"))
    plain, moved = dense_chain(p, chain, control)
    assert np.allclose(plain[3], chain.transition(3).toarray(), atol=1e-6)
    n = 1 << 14
    paths = sc.simulate(p, n, control, time_steps=12, seed=1, **options)
    assert paths.states.dtype == torch.int64 and paths.states.shape == (13, n, 1)
    x = paths.states[..., 0].numpy()
    ratio = sum(np.log(moved[k] / np.where(plain[k] > 0, plain[k], 1))[x[k], x[k + 1]] for k in range(12))
    tolerance = 1e-10 if p.dtype == F64 else 1e-4
    assert np.allclose(paths.log_ratio(), ratio, atol=tolerance)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = [np.nansum(m * np.log(m / q), 1) for q, m in zip(plain, moved)]
    assert np.allclose(paths.kl(), sum(kl[k][x[k]] for k in range(12)), atol=tolerance)
    law = np.linalg.multi_dot([np.eye(1, N, 2), *moved])[0]
    counts = np.bincount(x[-1], minlength=N)
    assert chi2.sf(((counts - n * law) ** 2 / (n * law)).sum(), N - 1) > 1e-5
    ends = sc.simulate(p, n, control, time_steps=12, seed=1, keep="end", **options)
    assert torch.allclose(ends.log_ratio(), paths.log_ratio(), atol=tolerance)
    assert torch.allclose(ends.kl(), paths.kl(), atol=tolerance)
    assert torch.allclose(paths.log_ratio(control), paths.log_ratio(), atol=tolerance)


@pytest.mark.parametrize("case", ["exact", "sparse", "of time"])
def test_weights_of_any_control_have_the_mean_z(case):
    """4 standard errors each (false alarm 6e-5)."""
    p, _ = CASES[case]()
    known = float(sc.exact_solution(p, time_steps=12).log_z)
    for control in (None, tilted(p, 0.4)):
        ratio = (sc.simulate(p, 1 << 13, control, time_steps=12, seed=4).log_weights() - known).exp()
        assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / 2**6.5


def test_the_default_scheme_follows_the_rates():
    few = problem(birth_death())
    assert few.chain(4).scheme == "exact" and problem(birth_death().to_sparse()).chain(12).scheme == "euler"
    many = problem(sparse.diags_array([np.ones(1999), -np.r_[np.ones(1999), 0.0]], offsets=[1, 0]).tocsr())
    assert many.chain(12).scheme == "euler" and many.control_shape == (1, 2) and many.dtype == torch.float32


def test_a_random_start_is_drawn_with_its_probabilities():
    probs = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.25, 0.0], dtype=F64)
    p = problem(birth_death(), initial=probs)
    n = 1 << 13
    counts = torch.bincount(sc.simulate(p, n, time_steps=2, seed=0).states[0, :, 0], minlength=N).double()
    assert bool((counts[probs == 0] == 0).all())
    some = probs > 0
    assert chi2.sf(float(((counts - n * probs).square() / (n * probs))[some].sum()), 2) > 1e-5
    torchs = torch.distributions.Categorical(probs.expand(1, N))
    again = sc.ControlProblem(sc.JumpProcess(birth_death(), initial=torchs), reward=p.reward_function)
    same = sc.ControlProblem(sc.JumpProcess(birth_death(), initial=probs), reward=p.reward_function)
    # two products of one matrix by vectors at other addresses may differ in their last bit
    assert float(sc.exact_solution(again).log_z) == pytest.approx(float(sc.exact_solution(same).log_z), rel=1e-14)


def two_tokens():
    flat = lambda k, x: torch.zeros(*x.shape, N).log_softmax(-1)  # noqa: E731
    return CategoricalChain(flat, 2, N, torch.zeros(2, dtype=torch.int64))


class Short(FiniteLaw):
    """Whose probabilities sum to a half."""

    def log_prob(self, value):
        return super().log_prob(value) - math.log(2.0)


@pytest.mark.parametrize(
    ("reference", "law", "match"),
    [
        (lambda: sc.JumpProcess(birth_death().to_sparse()), lambda p: FiniteLaw(p), r"has the shape \(1, 3\)"),
        (two_tokens, lambda p: FiniteLaw(torch.ones(N * N), StateSpace(N, (2,))), r"has the shape \(2, 6\)"),
        (lambda: sc.JumpProcess(birth_death()), lambda p: torch.distributions.Independent(Short(p), 0), "sum to 0.5"),
    ],
)
def test_a_start_that_no_control_tilts_is_refused_by_name(reference, law, match):
    with pytest.raises(ValueError, match=match):
        sc.ControlProblem(reference(), law(torch.ones(N, dtype=F64)), start="controlled")


def test_laws_on_finite_spaces():
    space = StateSpace(3, (2,))
    states = space.states(torch.arange(9))
    assert torch.equal(space.index(states), torch.arange(9)) and states[5].tolist() == [1, 2]
    law = FiniteLaw(torch.stack([torch.arange(9.0), torch.ones(9)]), space)
    assert law.sample((5,)).shape == (5, 2, 2) and law.log_prob(states[4]).exp().tolist() == pytest.approx([1 / 9] * 2)
    assert torch.allclose(law.mean[1], torch.ones(2))
    torch.manual_seed(0)
    point = FiniteLaw(torch.eye(9)[7], space)
    assert bool((point.sample((64,)) == states[7]).all())


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda q: q[:, :5], ValueError, r"rates must have shape \(n, n\)"),
        (lambda q: q.long(), TypeError, "rates must have a floating-point dtype"),
        (lambda q: q.tolist(), TypeError, "rates must be a torch tensor"),
        (lambda q: q * float("nan"), ValueError, "rates has 36 non-finite"),
        (lambda q: -q, ValueError, r"rates must be >= 0 off the diagonal: the rate from state 5 to state 4 is -3.5"),
        (lambda q: -q.to_sparse(), ValueError, r"the rate from state 5 to state 4 is -3.5"),
        (lambda q: q - torch.diag(q.diagonal()), ValueError, "rows that sum to zero: row 4 sums to 4.8"),
        (lambda q: lambda t: -q * t, ValueError, r"rates\(t = 0.25\) must be >= 0 off the diagonal"),
        (lambda q: lambda t: q if t < 0.5 else q.to_sparse(), TypeError, "sparse at all times or dense at all times"),
    ],
)
def test_bad_rates_are_named(make, error, match):
    with pytest.raises(error, match=match):
        sc.JumpProcess(make(birth_death()), initial=0)


@pytest.mark.parametrize(
    ("initial", "error", "match"),
    [
        (6, ValueError, "initial must be a state from 0 to 5, got 6"),
        (torch.ones(4), ValueError, r"initial must be probabilities of shape \(6,\)"),
        (-torch.ones(6), ValueError, "must be >= 0"),
        (torch.tensor([1]), TypeError, "initial must be a state"),
    ],
)
def test_bad_starts_are_named(initial, error, match):
    with pytest.raises(error, match=match):
        sc.JumpProcess(birth_death(), initial=initial)


def test_a_start_of_numbers_is_refused():
    with pytest.raises(TypeError, match=r"initial gives states of dtype torch.float32"):
        sc.ControlProblem(sc.JumpProcess(birth_death()), sc.Dirac(torch.zeros(1)))
    with pytest.raises(TypeError, match="initial is missing"):
        sc.ControlProblem(sc.JumpProcess(birth_death()))


def test_steps_that_are_too_long_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"I \+ h Q has a negative entry at step \d of 5 .* Use 8 time steps or more, or"
    ):
        problem(birth_death()).chain(5, "euler")
    assert problem(birth_death()).chain(8, "euler").transition(0).toarray().min() >= 0
    growing = problem(lambda t: (1 + t) * birth_death())
    with pytest.raises(ValueError, match="negative entry at step 11 of 12"):
        growing.chain(12, "euler")
    with pytest.raises(ValueError, match="the rates are sparse"):
        problem(birth_death().to_sparse()).chain(5, "exact")
    with pytest.raises(ValueError, match="has the schemes 'exact' and 'euler'"):
        problem(birth_death()).chain(5, "exponential")
    with pytest.raises(sc.NoLikelihood):
        problem(birth_death()).chain(5, "heun")
    with pytest.raises(ValueError, match="4097 states is not held"):
        sc.JumpProcess(torch.zeros(4097, 4097))


def test_a_pattern_that_changes_is_refused():
    base, extra = birth_death(), torch.zeros(N, N, dtype=F64)
    extra[0, 5], extra[0, 0] = 1.0, -1.0
    process = sc.JumpProcess(lambda t: (base + (extra if 0.6 < t < 0.7 else 0)).to_sparse(), initial=0)
    with pytest.raises(ValueError, match="a rate from state 0 to state 5"):
        process.rates_at(0.65)
