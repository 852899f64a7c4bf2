"""Chains of categorical kernels, against enumeration of the whole space: every number and every path-based method."""

import itertools
import math

import pytest
import torch
from cases import F64, but_slow, randn
from torch import nn

import sdecontrol as sc
from sdecontrol.chains.categorical import CategoricalChain, gumbel
from sdecontrol.controls.given import given_control
from sdecontrol.methods.base import Run, find_method, method_names
from sdecontrol.problems.simulate import roll_out

K, V = 4, 3


class Space:
    """Random kernels on ``V^L`` tokens, a random reward, a running cost, and everything about them by enumeration."""

    def __init__(self, length, alpha=0.8, size=1.0, seed=0):
        self.length, self.alpha = length, alpha
        self.points = torch.tensor(list(itertools.product(range(V), repeat=length)))
        n = len(self.points)
        self.table = randn(K, n, length, V, seed=seed).log_softmax(-1)
        self.r, self.f = size * randn(n, seed=seed + 1), 0.5 * randn(n, seed=seed + 2).abs()
        self.chain = CategoricalChain(
            lambda k, x: self.table[k][self.index(x)], K, V, torch.zeros(length, dtype=torch.int64), dtype=F64
        )
        self.problem = sc.ControlProblem(
            self.chain,
            reward=lambda x: self.r[self.index(x)],
            running_cost=lambda x, t: self.f[self.index(x)],
            alpha=alpha,
        )

    def index(self, x):
        return (x * V ** torch.arange(self.length - 1, -1, -1)).sum(-1)

    def kernel(self, k, c=0.0):
        """``(n, n)`` probabilities of step k, of the chain tilted by normalised log-ratios c ``(n, L, V)``."""
        rows = (self.table[k] + c).exp()
        return torch.stack([rows[:, j, self.points[:, j]] for j in range(self.length)]).prod(0)

    def log_z(self):
        psi = (self.r / self.alpha).exp()
        for k in reversed(range(K)):
            psi = (-self.f / (K * self.alpha)).exp() * (self.kernel(k) @ psi)
        return float(psi[0].log())

    def shift(self, k, u):
        return u - (self.table[k] + u).logsumexp(-1, keepdim=True)

    def gap(self, tilts):
        """``KL(P^u || Q_fine)`` of tilts ``(K, n, L, V)``, with its graph."""
        law, total = torch.zeros(len(self.points), dtype=F64), torch.tensor(self.log_z(), dtype=F64)
        law[0] = 1.0
        for k in range(K):
            c = self.shift(k, tilts[k])
            kl = ((self.table[k] + c).exp() * c).sum((1, 2))
            total = total + (law * (kl + self.f / (K * self.alpha))).sum()
            law = law @ self.kernel(k, c)
        return total - (law * self.r).sum() / self.alpha

    def soft_optimum(self):
        """For one position: ``u = v_{k+1}(y)/alpha``, ``(K, n, 1, V)``."""
        value, tilts = self.r / self.alpha, []
        for k in reversed(range(K)):
            tilts.append(value.reshape(1, 1, V).expand(V, 1, V))
            value = -self.f / (K * self.alpha) + (self.kernel(k) @ value.exp()).log()
        return torch.stack(tilts[::-1])


class Tilts(nn.Module):
    """A table of tilts as a control ``(x, t) -> (batch, L, V)``."""

    def __init__(self, space, scale=0.0, seed=0):
        super().__init__()
        self.index = space.index
        self.table = nn.Parameter(scale * randn(K, len(space.points), space.length, V, seed=seed))

    def forward(self, x, t):
        return self.table[(t * K).round().long(), self.index(x)]


def test_normal_noise_makes_gumbel_numbers():
    xi = torch.linspace(-5, 5, 101, dtype=F64)
    uniform = 0.5 * (1 + torch.erf(xi / math.sqrt(2)))
    assert torch.allclose(gumbel(xi), -(-uniform.log()).log(), atol=1e-6) and bool((gumbel(xi).diff() > 0).all())
    assert bool(gumbel(torch.tensor([-8.0, 8.0])).isfinite().all())


@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_tokens_are_drawn_with_the_kernels_probabilities(scale):
    """Joint frequencies of the end against enumeration: chi-square of 9 cells, p >= 1e-4."""
    space = Space(2)
    control = Tilts(space, scale, seed=3)
    n = 1 << 15
    paths = sc.simulate(space.problem, n, control if scale else None, seed=1)
    assert paths.states.dtype == torch.int64 and paths.states.shape == (K + 1, n, 2)
    law = torch.zeros(9, dtype=F64)
    law[0] = 1.0
    with torch.no_grad():
        for k in range(K):
            law = law @ space.kernel(k, space.shift(k, control.table[k]))
    counts = torch.bincount(space.index(paths.end), minlength=9).double()
    statistic = float(((counts - n * law).square() / (n * law)).sum())
    assert statistic < 31.8  # the 1e-4 quantile of 8 degrees of freedom


def test_log_ratios_and_kls_are_those_of_the_enumerated_kernels():
    space = Space(2)
    control, other = Tilts(space, 0.7, seed=3), Tilts(space, 0.5, seed=4)
    paths = sc.simulate(space.problem, 64, control, seed=2)
    x = space.index(paths.states)
    with torch.no_grad():
        for who, module in ((None, control), (other, other)):
            laws = paths.under(who)
            for k in range(K):
                c = space.shift(k, module.table[k])
                ratio = (space.kernel(k, c).log() - space.kernel(k).log())[x[k], x[k + 1]]
                assert torch.allclose(laws.log_ratio[k], ratio, atol=1e-12)
                full = (space.kernel(k, c) * (space.kernel(k, c).log() - space.kernel(k).log())).sum(1)
                assert torch.allclose(laws.kl[k], full[x[k]], atol=1e-12)
    ends = sc.simulate(space.problem, 64, control, seed=2, keep="end", chunk=64)
    for get in (lambda p: p.log_ratio(), lambda p: p.kl(), lambda p: p.log_weights()):
        assert torch.allclose(get(ends), get(paths), atol=1e-12)
    some = paths.under(other, [1, 3])
    assert torch.allclose(some.log_ratio, paths.under(other).log_ratio[[1, 3]], atol=1e-12)
    assert torch.allclose(some.kl, paths.under(other).kl[[1, 3]], atol=1e-12)


def test_weights_of_any_control_have_the_mean_z():
    """4 standard errors each (false alarm 6e-5)."""
    space = Space(2)
    for control in (None, Tilts(space, 0.7, seed=3)):
        ratio = (sc.simulate(space.problem, 1 << 14, control, seed=4).log_weights() - space.log_z()).exp()
        assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / 128


def test_one_position_has_no_floor():
    """At the soft-optimal tilt the weight is Z on every path, and the gap 0."""
    space = Space(1, size=1.5)
    control = Tilts(space)
    with torch.no_grad():
        control.table.copy_(space.soft_optimum())
    paths = sc.simulate(space.problem, 256, control, seed=5)
    assert torch.allclose(paths.log_weights(), torch.full((256,), space.log_z(), dtype=F64), atol=1e-12)
    assert abs(float(space.gap(control.table.detach()))) < 1e-12


@pytest.mark.parametrize(
    "method",
    [
        sc.LogVariance(),
        sc.LogVariance(steps=2),
        sc.PathConsistency(),
        sc.Reinforce(),
        sc.SoftPPO(epochs=1, baseline="per-time"),
    ],
    ids=["log-variance", "two of the steps", "path-consistency", "reinforce", "soft-ppo"],
)
def test_score_function_gradients_are_that_of_the_kl(method):
    """Of two positions, away from the optimum, against the exact gradient: chi-square over all entries that are
    visited, p >= 1e-5."""
    space = Space(2)
    control = Tilts(space, 0.3, seed=6)
    (want,) = torch.autograd.grad(space.gap(control.table), control.table)
    found = []
    for part in range(60):
        run = Run(space.problem, space.chain, 256, 1, 100 + part, control)
        state = method.setup(run)
        state.control.module.table.grad = None
        method.step(state, run)
        found.append(state.control.module.table.grad.clone())
    grads = torch.stack(found)
    error = (grads.var(0) / len(grads)).sqrt()
    seen = error > 1e-4 * float(error.max())
    z = ((grads.mean(0) - want) / error)[seen]
    count = int(seen.sum())
    # t statistics of 59 degrees of freedom have variance 59/57
    assert float(z.square().sum()) / (59 / 57) < count + 4.3 * math.sqrt(2 * count * 1.2)
    assert float(want[seen].norm()) > 5 * float(error[seen].norm())


METHODS = {
    "soft-ppo": sc.SoftPPO(),
    "soft-ppo, per time": sc.SoftPPO(baseline="per-time"),
    "log-variance": sc.LogVariance(),
    "log-variance, reference": sc.LogVariance(paths="reference"),
    "path-consistency": sc.PathConsistency(),
    "path-consistency, replay": sc.PathConsistency(replay=4),
    "path-consistency, 1 step": sc.PathConsistency(1),
    "cross-entropy": sc.CrossEntropy(),
    "reward-weighted-mle": sc.RewardWeightedMLE(),
    "reinforce": sc.Reinforce(),
}


def test_the_reference_as_a_control_is_floating_point_on_tokens():
    space = Space(1)
    zero, x = given_control(space.problem, None), torch.zeros(5, 1, dtype=torch.int64)
    assert zero(x, 0.0).is_floating_point()
    assert zero.on_chain(space.problem.chain())(0, x, None).dtype == F64


@pytest.mark.parametrize("name", but_slow(METHODS, "soft-ppo, per time", "path-consistency, 1 step"))
def test_every_path_based_method_comes_to_the_exact_tilt(name):
    """The exact gap of the trained table, by enumeration: 0.01 nats of 0.43. One step at a time a value network has to
    be learned as well."""
    space, iterations = Space(1, size=3.0), 400 if name.endswith("1 step") else 120
    assert float(space.gap(torch.zeros(K, V, 1, V, dtype=F64))) > 0.4
    solution = sc.solve(
        space.problem, METHODS[name], control=Tilts(space), iterations=iterations, batch_size=256, learning_rate=0.05,
        seed=0, progress=False,
    )  # fmt: skip
    assert float(space.gap(solution.control.module.table.detach())) < 0.01
    found = solution.evaluate(1024, seed=1)
    assert abs(found.log_z.value - space.log_z()) < 4 * found.log_z.stderr + 1e-3
    assert solution.sample(64, seed=2).dtype == torch.int64


@pytest.mark.parametrize(
    "method",
    [sc.SMC(num_particles=64), sc.TemperedSMC(num_particles=256), sc.BestOfN(n=16, selection="softmax")],
    ids=["smc", "tempered-smc", "best-of-n"],
)
def test_particles_have_the_exact_log_z(method):
    space = Space(2)
    found = sc.solve(space.problem, method, seed=0, progress=False).evaluate(2048, seed=1)
    assert abs(found.log_z.value - space.log_z()) < 4 * found.log_z.stderr + 1e-3


@pytest.mark.parametrize("name", method_names())
def test_other_methods_refuse_tokens_by_name(name):
    space = Space(1)
    method = sc.ClassifierFreeGuidance(lambda x, s, y: x) if name.startswith("classifier-free") else find_method(name)
    try:
        method.check(space.problem)
    except (ValueError, TypeError, sc.NotDifferentiable) as error:
        assert name in str(error)
        return
    assert method.tokens or not (method.needs_gradient or method.gaussian or method.of_noise)


@pytest.mark.slow
def test_the_default_network_comes_to_the_exact_tilt_too():
    space = Space(1, size=3.0)
    solution = sc.solve(space.problem, sc.LogVariance(), iterations=200, batch_size=128, seed=0, progress=False)
    with torch.no_grad():
        tilts = torch.stack([solution.control(space.points, k / K) for k in range(K)])
    assert float(space.gap(tilts)) < 0.01


def test_runs_on_tokens_are_saved_and_resumed(tmp_path):
    space = Space(2)
    options = {"control": Tilts(space), "batch_size": 64, "seed": 0, "progress": False, "learning_rate": 0.05}
    whole = sc.solve(space.problem, sc.PathConsistency(replay=2), iterations=4, **options)

    reward, calls = space.problem.reward_function, []

    def stopped(x):
        calls.append(len(x))
        if len(calls) > 2:
            raise RuntimeError("stopped here")
        return reward(x)

    folder = tmp_path / "run"
    space.problem.reward_function = stopped
    with pytest.raises(RuntimeError, match="stopped here"):
        sc.solve(
            space.problem, sc.PathConsistency(replay=2), iterations=4, checkpoint_dir=folder, checkpoint_every=1,
            **options,
        )  # fmt: skip
    space.problem.reward_function = reward
    again = sc.solve(
        space.problem, sc.PathConsistency(replay=2), iterations=4, checkpoint_dir=folder, resume=True, **options
    )
    assert torch.equal(whole.control.module.table, again.control.module.table)
    whole.save(tmp_path / "saved")
    loaded = sc.load(tmp_path / "saved", space.problem, control=Tilts(space))
    assert torch.equal(whole.sample(64, seed=1), loaded.sample(64, seed=1))


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("log_probs", "error", "match"),
    [
        (lambda k, x: torch.zeros(len(x), 1, V, dtype=F64), ValueError, "normalised"),
        (lambda k, x: torch.zeros(len(x), V, dtype=F64), ValueError, r"log_probs must return shape \(5, 1, 3\)"),
        (lambda k, x: torch.zeros(len(x), 1, V).log_softmax(-1), TypeError, "log_probs returned dtype"),
    ],
)
def test_wrong_kernels_are_named_at_once(log_probs, error, match):
    chain = CategoricalChain(log_probs, K, V, torch.zeros(1, dtype=torch.int64), dtype=F64)
    with pytest.raises(error, match=match):
        sc.ControlProblem(chain, reward=lambda x: x[:, 0].to(F64))


def test_paths_to_learn_from_keep_tokens():
    space = Space(2)
    run = Run(space.problem, space.chain, 32, 1, 0, Tilts(space, 0.3))
    batch = run.batch()
    paths = roll_out(space.problem, space.chain, Tilts(space, 0.3), batch.x0, batch.noise)
    assert paths.draws.dtype == torch.int64 and torch.equal(paths.draws, paths.states[1:])
    assert paths.reward.dtype == F64 and paths.rows(torch.arange(3)).log_weights().shape == (3,)


def test_paths_resume_from_tokens_only():
    space = Space(2)
    paths = sc.simulate(space.problem, 16, seed=3)
    again = sc.simulate(space.problem, 16, seed=5, step=1, state=paths.states[1])
    assert torch.equal(again.states[0], paths.states[1])
    with pytest.raises(TypeError, match=r"state must have dtype torch\.int64, got torch\.float64"):
        sc.simulate(space.problem, 16, seed=5, step=1, state=paths.states[1].double())
