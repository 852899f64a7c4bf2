"""Masked diffusion as a chain, its controls and its tuned models, against enumeration of all states."""

import itertools
import math

import pytest
import torch
from cases import F64, but_slow, randn
from tokens import Joint, Net, chi_square_is_fine
from torch import nn

import sdecontrol as sc
from sdecontrol.chains.masked import MaskSchedule
from sdecontrol.chains.shifts import AllRows, shift_function
from sdecontrol.controls.base import Control
from sdecontrol.controls.build import build_control
from sdecontrol.controls.given import given_control
from sdecontrol.paths.integrator import integrate
from sdecontrol.randomness import SeededNoise

ORDERS = ("independent", "random")
TWICE = ("frozen", "independent"), ("both", "independent"), ("user", "independent")


class Tilt(nn.Module):
    """A user's module: a table of tilts, one for each position's token and time."""

    def __init__(self, length=4, vocabulary=3, seed=5, dtype=F64):
        super().__init__()
        self.table = nn.Parameter(0.7 * randn(length, vocabulary + 1, length * vocabulary, seed=seed).to(dtype))
        self.shape = (length, vocabulary)

    def forward(self, x, t):
        rows = self.table[torch.arange(x.shape[1]), x].sum(1)
        return (rows * (0.5 + t.unsqueeze(1))).unflatten(1, self.shape)


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("order", ORDERS)
def test_ends_have_the_enumerated_law(order):
    joint, steps = Joint(), 3 if order == "independent" else 4
    problem = joint.problem(order=order, steps=steps)
    x = sc.simulate(problem, 1 << 14, seed=1, keep="end").samples
    assert x.dtype == torch.int64 and int(x.max()) < 3
    law = joint.end(joint.chain_of(joint.letters(joint.model), steps, order))
    assert chi_square_is_fine(joint.counts(x), law)
    if order == "random":  # one position at a time: the joint law itself
        assert torch.allclose(law, joint.law, atol=1e-9)
    else:
        assert not chi_square_is_fine(joint.counts(x), joint.law)


def test_the_end_comes_to_the_joint_law_with_the_steps():
    joint = Joint()
    letters, apart = joint.letters(joint.model), {}
    for steps in (8, 16, 32):
        apart[steps] = 0.5 * float((joint.end(joint.chain_of(letters, steps, "independent")) - joint.law).abs().sum())
    assert 0.4 < apart[16] / apart[8] < 0.6 and 0.4 < apart[32] / apart[16] < 0.6


@pytest.mark.parametrize("schedule", ["linear", "cosine", lambda s: (1 - s) ** 2])
def test_tokens_stay_masked_as_the_schedule_says(schedule):
    """The share of masks at every time of 2^13 x 4 tokens, within 5 standard errors, and all of them in the end."""
    chain = sc.masked_diffusion(lambda x, s: torch.zeros(len(x), 4, 3), 4, 3, steps=6, schedule=schedule)
    problem = sc.ControlProblem(chain, reward=lambda x: x.float().sum(1))
    states = sc.simulate(problem, 1 << 13, seed=0).states
    a = MaskSchedule(schedule).kept(1 - torch.arange(7, dtype=F64) / 6)
    share = (states != 3).double().mean((1, 2))
    assert float((share - a).abs().max()) < 5 * 0.5 / math.sqrt(1 << 15)
    assert bool((states[0] == 3).all()) and not bool((states[-1] == 3).any())
    stays = (states[:-1] != 3) & (states[1:] != states[:-1])
    assert not bool(stays.any())
    kept = torch.linspace(0.01, 0.99, 99, dtype=F64)
    assert torch.allclose(MaskSchedule(schedule).kept(MaskSchedule(schedule).time(kept)), kept, atol=1e-9)


def test_in_random_order_each_step_unmasks_one_position_and_any_is_as_likely():
    joint = Joint()
    states = sc.simulate(joint.problem(order="random"), 1 << 13, seed=2).states
    changed = states[1:] != states[:-1]
    assert bool((changed.sum(2) == 1).all())
    first = changed[0].double().mean(0)
    assert float((first - 0.25).abs().max()) < 5 * math.sqrt(0.25 * 0.75 / (1 << 13))


def test_the_model_is_called_on_its_own_clock_and_once_a_step():
    seen = []

    def model(x, s):
        seen.append((s.clone(), s.shape))
        return torch.zeros(*x.shape, 3)

    problem = sc.ControlProblem(
        sc.masked_diffusion(model, (2, 3), 3, steps=4), reward=lambda x: x.flatten(1).sum(1).float()
    )
    for keep in ("all", "states", "end"):
        seen.clear()
        paths = sc.simulate(problem, 64, seed=0, keep=keep)
        assert [float(s[0]) for s, _ in seen] == [1.0, 0.75, 0.5, 0.25] and all(shape == (64,) for _, shape in seen)
        paths.log_weights()
        assert len(seen) == 4 and paths.end.shape == (64, 2, 3)


def test_given_tokens_stay_and_the_rest_is_filled_in():
    """Infilling: the law of two letters given two others, from the joint law."""
    joint = Joint()
    start = torch.tensor([3, 1, 3, 2])
    for order in ORDERS:
        chain = sc.masked_diffusion(joint.model, 4, 3, order=order, dtype=F64, steps=None if order == "random" else 64)
        problem = sc.ControlProblem(chain, sc.Dirac(start), reward=joint.reward)
        x = sc.simulate(problem, 1 << 13, seed=3, keep="end").samples
        assert bool((x[:, [1, 3]] == start[[1, 3]]).all()) and int(x.max()) < 3
        fits = (joint.points[:, 1] == 1) & (joint.points[:, 3] == 2)
        if order == "random":
            assert chi_square_is_fine(joint.counts(x), joint.law * fits / (joint.law * fits).sum())


# ---------------------------------------------------------------- controls


@pytest.mark.parametrize("order", ORDERS)
def test_log_ratios_and_kls_are_those_of_the_enumerated_kernels(order):
    joint, control = Joint(), Tilt()
    problem = joint.problem(order=order, steps=4)
    paths = sc.simulate(problem, 64, control, seed=2)
    x = joint.at(paths.states)
    plain = joint.chain_of(joint.letters(joint.model), 4, order)
    tuned = joint.chain_of(
        joint.tuned_letters(problem, lambda z, t: control(z, torch.full((len(z),), t, dtype=F64))), 4, order
    )
    kls, chain = joint.kls(tuned, plain), problem.chain()
    with torch.no_grad():
        shifts = torch.stack([shift_function(chain, control)(k, z, None) for k, z in enumerate(paths.states[:-1])])
        every = chain.kl(shifts, paths.states[:-1], range(4))
        given = chain.path_kl(shifts, paths.states[:-1], paths.states[1:], range(4))
        for laws in (paths.under(), paths.under(control), paths.under(given_control(problem, control))):
            for k in range(4):
                ratio = (tuned[k] / plain[k]).log()[x[k], x[k + 1]]
                assert torch.allclose(laws.log_ratio[k], ratio, atol=1e-10)
                assert torch.allclose(every[k], kls[k][x[k]], atol=1e-10)
                assert torch.allclose(laws.kl[k], given[k], atol=1e-10)
    ends = sc.simulate(problem, 64, control, seed=2, keep="end", chunk=64)
    for get in (lambda p: p.log_ratio(), lambda p: p.kl(), lambda p: p.log_weights()):
        assert torch.allclose(get(ends), get(paths), atol=1e-10)
    law = joint.end(tuned)
    assert chi_square_is_fine(joint.counts(sc.simulate(problem, 1 << 13, control, seed=3, keep="end").samples), law)
    ratio = (sc.simulate(problem, 1 << 13, control, seed=4).log_weights() - joint.log_z(plain)).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / math.sqrt(len(ratio))


def test_the_kl_given_what_is_unmasked_has_the_kernels_as_its_mean():
    """Exactly, over all sets of masked positions that a step may unmask."""
    joint, control, k = Joint(), Tilt(), 2
    chain = joint.problem(steps=4).chain()
    x = torch.tensor([[3, 3, 3, 3], [0, 3, 3, 1], [3, 2, 1, 3], [0, 1, 2, 3]])
    with torch.no_grad():
        c, q, mean = shift_function(chain, control)(k, x, None), chain.unmasked[k], 0.0
        for opened in itertools.product((False, True), repeat=4):
            opened = torch.tensor(opened)
            weight = torch.where(x == 3, torch.where(opened, q, 1 - q), torch.where(opened, 0.0, 1.0)).prod(1)
            after = torch.where((x == 3) & opened, 0, x)
            mean = mean + weight * chain.path_kl(c[None], x[None], after[None], [k])[0]
        assert torch.allclose(mean, chain.kl(c[None], x[None], [k])[0], atol=1e-12) and float(mean.min()) > 0


@pytest.mark.parametrize("keep", ["all", "end"])
def test_model_and_control_are_asked_for_rows_in_which_a_token_is_drawn_alone(keep):
    """And all that is drawn, weighed and learned from is what it is where all rows are asked for."""
    joint, tilt, rows, asked = Joint(), Tilt(), [], []
    problem = joint.problem(lambda x, s: (rows.append(len(x)), joint.model(x, s))[1], steps=32)
    control = lambda x, t: (asked.append(len(x)), tilt(x, t))[1]  # noqa: E731
    chain = problem.chain()
    rows.clear()
    with torch.no_grad():
        paths = sc.simulate(problem, 512, control, seed=1, keep=keep)
        ratio, kl = paths.log_ratio(), paths.kl()
        assert rows == asked and len(rows) == 32 and sum(rows) < 512 * 32 / 3 and all(n % 64 == 0 for n in rows)
        noise = SeededNoise(1, 512, 32, chain.noise_shape, dtype=F64, device="cpu")
        whole = integrate(chain, problem.draw_start(512, 1), noise, AllRows(shift_function(chain, control)))
        assert asked[-1] == 512 and torch.equal(paths.states, whole.states)
        moved = (whole.states[1:] != whole.states[:-1]).any(2)
        for found, all_rows in ((ratio, whole.log_ratio()), (kl, whole.kl())):
            assert torch.allclose(found, all_rows, atol=1e-12)
        assert torch.allclose(paths.shifts[moved], whole.shifts[moved], atol=1e-12)
        assert not bool(paths.shifts[~moved].any()) and bool(whole.shifts[~moved].any())
    half = lambda x, t: 0.5 * tilt(x, t)  # noqa: E731
    for steps in (None, [3, 17, 31]):
        laws = paths.under(half, steps)
        every = [shift_function(chain, half)(k, whole.states[k], None) for k in steps or range(32)]
        every = chain.log_ratio(torch.stack(every), whole.draws if steps is None else whole.draws[steps])
        assert torch.allclose(laws.log_ratio, every, atol=1e-12)
        grads = [torch.autograd.grad(v.cos().sum(), tilt.table)[0] for v in (laws.log_ratio, every)]
        assert torch.allclose(*grads, atol=1e-10) and laws.shifts.shape == (len(every), 512, 4, 4)


def test_a_path_costs_one_call_of_each_model_and_learning_from_it_none_of_the_reference():
    joint, net = Joint(), Net()
    problem = joint.problem(net, steps=5)
    control = build_control(problem, problem.chain())
    for p in control.parameters():
        p.data += 0.1
    net.calls = control.model.calls = 0
    with torch.no_grad():
        paths = sc.simulate(problem, 64, control, seed=0)
    assert (net.calls, control.model.calls) == (5, 5)
    paths.kl(), paths.log_ratio(), paths.log_weights()
    laws = paths.under(control)
    laws.log_ratio, laws.kl, paths.under(control, [1, 3]).kl, paths.rows(slice(0, 8)).under(control).kl
    assert net.calls == 5
    solution = sc.solve(problem, sc.LogVariance(), iterations=1, batch_size=64, seed=0, progress=False)
    solution.control.model.calls = net.calls = 0
    solution.sample(64, seed=1)
    assert (net.calls, solution.control.model.calls) == (0, 5)
    solution.evaluate(64, seed=1, confirm=False)  # asks, once, for the exact log Z of so few states
    solution.control.model.calls = net.calls = 0
    solution.evaluate(64, seed=1, confirm=False)
    assert (net.calls, solution.control.model.calls) == (5, 5)


def foreign_sampler(model, joint, n, steps, order, seed):
    """Somebody else's ancestral sampler of a masked diffusion model with the linear schedule."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((n, joint.length), joint.vocabulary)
    for i in range(steps):
        s = torch.full((n,), 1 - i / steps, dtype=F64)
        with torch.no_grad():
            p = model(x, s).softmax(-1)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(n, -1)
        masked = x == joint.vocabulary
        if order == "random":
            score = torch.rand(x.shape, generator=generator).masked_fill(~masked, -1.0)
            opened = torch.zeros_like(masked).scatter(1, score.argmax(1, keepdim=True), True)
        else:
            opened = torch.rand(x.shape, generator=generator) < 1 / (steps - i)
        x = torch.where(masked & opened, drawn, x)
    return x


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "order"),
    but_slow(list(itertools.product(("tuned", "frozen", "both", "user"), ORDERS)), *TWICE),
)
def test_solution_model_has_the_same_law_in_a_foreign_sampler(order, way):
    joint = Joint()
    problem = joint.problem(Net(), order=order, steps=4)
    control = Tilt() if way == "user" else way
    solution = sc.solve(problem, sc.LogVariance(), control=control, iterations=5, batch_size=64, seed=0, progress=False)
    with torch.no_grad():
        for p in solution.control.parameters():
            p += 0.3 * randn(*p.shape, seed=len(p)).to(p)
    tuned = joint.chain_of(joint.tuned_letters(problem, solution.control), 4, order)
    law = joint.end(tuned)
    plain = joint.end(joint.chain_of([joint.letters(problem.chain().model, 1 - k / 4) for k in range(4)], 4, order))
    assert float((law - plain).abs().sum()) > 0.2
    for x in (foreign_sampler(solution.model, joint, 1 << 13, 4, order, 7), solution.sample(1 << 13, seed=1)):
        assert chi_square_is_fine(joint.counts(x), law)


@pytest.mark.parametrize("way", ["tuned", "frozen", "both", "user"])
def test_controls_are_saved_loaded_and_resumed_bit_for_bit(way, tmp_path):
    joint = Joint()
    problem = joint.problem(Net(), steps=4)
    control = lambda: Tilt() if way == "user" else way  # noqa: E731
    options = {"batch_size": 64, "seed": 0, "progress": False}
    method = sc.PathConsistency(replay=2)
    whole = sc.solve(problem, method, control=control(), iterations=6, **options)
    folder = tmp_path / "run"

    class Stop:
        def on_step_end(self, state):
            if state.iteration == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sc.solve(
            problem,
            method,
            control=control(),
            iterations=6,
            checkpoint_dir=folder,
            checkpoint_every=2,
            callbacks=[Stop()],
            **options,
        )
    again = sc.solve(problem, method, control=control(), iterations=6, checkpoint_dir=folder, resume=True, **options)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.control.state_dict().values(), again.control.state_dict().values())
    )
    whole.save(tmp_path / "saved")
    loaded = sc.load(tmp_path / "saved", problem, control=Tilt() if way == "user" else None)
    assert torch.equal(whole.sample(64, seed=1), loaded.sample(64, seed=1))
    assert torch.equal(whole.weighted_sample(64, seed=1)[1], loaded.weighted_sample(64, seed=1)[1])
    x, s = joint.states, torch.full((len(joint.states),), 0.5, dtype=F64)
    assert torch.equal(whole.model(x, s), loaded.model(x, s))


def test_the_default_network_starts_at_zero_and_sees_tokens_time_and_conditions():
    joint = Joint(dtype=torch.float32)
    chain = sc.masked_diffusion(lambda x, s, y: joint.model(x, s), 4, 3, steps=4)
    problem = sc.ControlProblem(chain, reward=lambda x, y: joint.reward(x) * y, condition=torch.randint(3, (64,)))
    control = build_control(problem, problem.chain())
    x, y = torch.tensor([[0, 1, 2, 3], [0, 1, 1, 3]]), torch.tensor([0, 1])
    assert isinstance(control, Control) and not bool(control(x, 0.5, y).any())
    with torch.no_grad():
        for p in control.parameters():
            p += 0.1 * randn(*p.shape, seed=1).to(p)
        u = control(x, 0.5, y)
        assert u.shape == (2, 4, 3)
        for other in (control(x.roll(1, 1), 0.5, y), control(x, 0.7, y), control(x, 0.5, y.flip(0))):
            assert not torch.allclose(u, other)
        paths = sc.simulate(problem, 64, control, seed=0)
        stepwise = torch.stack(
            [control.on_chain(problem.chain())(k, paths.states[k], paths.condition) for k in range(4)]
        )
        assert torch.allclose(control.along(problem.chain(), paths.states[:-1], paths.condition), stepwise, atol=1e-5)


def test_many_tokens_are_embedded_in_few_numbers():
    chain = sc.masked_diffusion(lambda x, s: torch.zeros(*x.shape, 1000), 16, 1000, steps=4)
    problem = sc.ControlProblem(chain, reward=lambda x: (x == 3).float().sum(1))
    solution = sc.solve(problem, sc.LogVariance(), iterations=2, batch_size=32, seed=0, progress=False)
    assert sum(p.numel() for p in solution.control.parameters()) < 1_500_000
    assert solution.sample(4, seed=0).shape == (4, 16)


# ---------------------------------------------------------------- bad input


def uniform(x, s):
    return torch.zeros(*x.shape, 3)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: sc.masked_diffusion(3, 4, 3), TypeError, "model must be an nn.Module or a function"),
        (lambda: sc.masked_diffusion(uniform, 0, 3), ValueError, "length must be an int >= 1"),
        (lambda: sc.masked_diffusion(uniform, (), 3), ValueError, "length must be"),
        (lambda: sc.masked_diffusion(uniform, 4, 1), ValueError, "vocabulary must be an int >= 2"),
        (lambda: sc.masked_diffusion(uniform, 4, 3, steps=0), ValueError, "steps must be an int >= 1"),
        (lambda: sc.masked_diffusion(uniform, 4, 3, schedule="lienar"), ValueError, "schedule"),
        (lambda: sc.masked_diffusion(uniform, 4, 3, schedule=lambda s: s), ValueError, "must fall strictly from a"),
        (lambda: sc.masked_diffusion(uniform, 4, 3, order="first"), ValueError, "order"),
        (lambda: sc.masked_diffusion(uniform, 4, 3, steps=9, order="random"), ValueError, "takes 4 steps here"),
    ],
)
def test_wrong_settings_are_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (lambda x, s: torch.zeros(len(x), 4, 4), ValueError, r"model must return shape \(3, 4, 3\), got \(3, 4, 4\)"),
        (lambda x, s: torch.zeros(len(x), 4, 3, dtype=F64), TypeError, "model returned dtype"),
        (lambda x, s: torch.full((len(x), 4, 3), math.nan), RuntimeError, "logits of the model are not finite"),
        (lambda x, s: torch.full((len(x), 4, 3), -math.inf), RuntimeError, "large negative logit"),
        (lambda x: torch.zeros(len(x), 4, 3), TypeError, r"model failed when called as model\(x, s\)"),
        (lambda x, s: torch.rand(len(x), 4, 3), ValueError, "random numbers of its own"),
    ],
    ids=["shape", "dtype", "nan", "-inf", "arguments", "random"],
)
def test_wrong_models_are_named_when_a_problem_is_made(model, error, match):
    with pytest.raises(error, match=match):
        sc.ControlProblem(sc.masked_diffusion(model, 4, 3), reward=lambda x: x.float().sum(1))


@pytest.mark.wrong_shapes
def test_states_that_are_no_tokens_are_named():
    problem = sc.ControlProblem(sc.masked_diffusion(uniform, 4, 3), reward=lambda x: x.float().sum(1))
    chain = problem.reference
    with pytest.raises(TypeError, match=r"state must have dtype torch\.int64"):
        sc.simulate(problem, 2, state=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="state has tokens from 0 to 4; they are 0 to 3"):
        sc.simulate(problem, 2, state=torch.tensor([[0, 1, 2, 4], [0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="initial has tokens from 0 to 7"):
        sc.ControlProblem(chain, sc.Dirac(torch.tensor([0, 1, 7, 3])), reward=lambda x: x.float().sum(1))
    with pytest.raises(TypeError, match=r"initial gives states of dtype torch\.float32"):
        sc.ControlProblem(chain, sc.Dirac(torch.zeros(4)), reward=lambda x: x.float().sum(1))
    solution = sc.solve(problem, sc.LogVariance(), iterations=1, batch_size=8, seed=0, progress=False)
    with pytest.raises(TypeError, match="states are tokens"):
        solution.control(torch.zeros(2, 4), 0.0)
    with pytest.raises(ValueError, match="x has tokens from 0 to 9"):
        solution.control(torch.tensor([[0, 0, 0, 9]]), 0.0)
    with pytest.raises(ValueError, match="time_steps and scheme do not apply"):
        sc.solve(problem, sc.LogVariance(), time_steps=5)


def test_a_control_that_is_not_a_number_is_named_with_its_step():
    problem = sc.ControlProblem(sc.masked_diffusion(uniform, 4, 3), reward=lambda x: x.float().sum(1))
    wrong = lambda x, t: torch.where(t > 0.4, math.nan, 0.0).reshape(-1, 1, 1).expand(-1, 4, 3)  # noqa: E731
    for keep in ("all", "end"):
        with pytest.raises(sc.NonFiniteError, match="control is not a number at step 2 of 4"):
            sc.simulate(problem, 8, wrong, seed=0, keep=keep)


def test_rewards_see_no_mask():
    seen = []

    def reward(x):
        seen.append(int(x.max()))
        return x.float().sum(1)

    problem = sc.ControlProblem(sc.masked_diffusion(uniform, 4, 3), reward=reward)
    problem.fingerprint()
    sc.solve(problem, sc.SoftPPO(), iterations=2, batch_size=8, seed=0, progress=False).evaluate(64, seed=1)
    assert max(seen) == 2


@pytest.mark.slow
def test_the_face_runs_as_written():
    data = torch.randint(4, (64, 50), generator=torch.Generator().manual_seed(0))
    my_reward = lambda x: (x == 2).float().mean(1)  # noqa: E731
    model = sc.fit_masked_diffusion(data, vocabulary=4, iterations=2, seed=0, progress=False)
    chain = sc.masked_diffusion(model, length=50, vocabulary=4, steps=50)
    problem = sc.ControlProblem(chain, reward=my_reward, alpha=0.1)
    solution = sc.solve(problem, sc.SoftPPO(), iterations=1, batch_size=8, seed=0, progress=False)
    x = solution.sample(8, seed=1)
    assert x.shape == (8, 50) and solution.model(x, torch.zeros(8)).shape == (8, 50, 4)


@pytest.mark.slow
def test_recommend_and_compare_know_tokens():
    problem = sc.ControlProblem(sc.masked_diffusion(uniform, 4, 3), reward=lambda x: x.float().sum(1), alpha=1.0)
    found = sc.recommend(problem)
    names = [suggestion.method.name for suggestion in found]
    assert found[1].method == sc.ValueGuidance("ratio")
    assert names[0] == "log-variance" and not {"adjoint-matching", "socm", "reward-backprop"} & set(names)
    assert "smc" in [suggestion.method.name for suggestion in sc.recommend(problem, one_off=True)]
    table = sc.compare(problem, [sc.SMC(num_particles=16), sc.BestOfN(), sc.AdjointMatching()], n=64, seeds=[0])
    assert [row.reason is None for row in table.rows] == [True, True, False]
