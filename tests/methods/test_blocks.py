"""Gradients through stored paths block by block: those of the whole, in one block's memory, for every method."""

import weakref
from typing import Any

import pytest
import torch
from cases import F64, nonlinear, randn, random_lq

import sdecontrol as sc
from sdecontrol.chains import blocks
from sdecontrol.chains.blocks import blocks_of
from sdecontrol.chains.shifts import shifts_along
from sdecontrol.controls.build import build_control
from sdecontrol.methods import adjoint_matching
from sdecontrol.methods.base import Run
from sdecontrol.methods.regression import RegressionState
from sdecontrol.paths import gradients, lean_adjoint
from sdecontrol.paths.closed_loop import ClosedLoop
from sdecontrol.paths.lean_adjoint import StepJacobians, lean_targets, lean_targets_again, own_noise
from sdecontrol.problems.simulate import roll_out
from sdecontrol.randomness import SeededNoise

pytestmark = pytest.mark.filterwarnings("ignore:.*weighted paths are effective:RuntimeWarning")

ABAR = torch.cumprod(1 - torch.linspace(1e-3, 0.25, 40, dtype=F64), 0)
K, B = 6, 16


COUNTS, MOST = weakref.WeakKeyDictionary(), weakref.WeakKeyDictionary()


class Net(torch.nn.Module):
    """A conditional model that says how many rows of activations with a graph were alive at once, and whether it was
    in training mode."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Parameter(0.3 * randn(5, 16, seed=0))
        self.last = torch.nn.Parameter(0.3 * randn(16, 3, seed=1))
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x, n, y):
        hidden = torch.tanh(torch.cat((x, n.to(x)[:, None] / 40, y[:, None]), 1) @ self.first)
        if hidden.requires_grad:
            COUNTS.setdefault(self, []).append(weakref.ref(hidden))
            alive = [h() for h in COUNTS[self]]
            MOST[self] = max(MOST.get(self, 0), sum(len(h) for h in alive if h is not None))
        return 0.8 * x + self.drop(hidden) @ self.last


def conditional():
    chain = sc.diffusion_chain(Net(), ABAR, shape=(3,), steps=K + 1)
    draw = lambda n, generator=None: torch.randn(n, generator=generator, dtype=F64)  # noqa: E731
    return sc.ControlProblem(chain, reward=lambda x, y: x[:, 0] * y - x[:, 1] ** 2, alpha=0.7, condition=draw)


PROBLEMS = {
    "conditions": conditional,
    "learned start": lambda: random_lq(2, m=3, seed=1, start="controlled"),
    "nonlinear": nonlinear,
}
METHODS = {
    "log-variance": sc.LogVariance(group_size=4),
    "log-variance of other paths": sc.LogVariance(paths="reference"),
    "log-variance of some steps": sc.LogVariance(steps=3),
    "cross-entropy": sc.CrossEntropy(trust_region=1.0),
    "cross-entropy of other paths": sc.CrossEntropy(paths="reference"),
    "reinforce": sc.Reinforce(),
    "trajectory-balance": sc.PathConsistency(n="all"),
    "path-consistency, replay": sc.PathConsistency(n=2, replay=2),
    "soft-ppo": sc.SoftPPO(epochs=1),
    "soft-ppo of some steps, grouped": sc.SoftPPO(epochs=1, steps=3, group_size=4, baseline="per-time"),
    "soft-ppo, minibatches": sc.SoftPPO(epochs=2, minibatches=2, baseline="batch"),
    "reward-weighted-mle": sc.RewardWeightedMLE(),
    "reward-backprop": sc.RewardBackprop(gradient="adjoint"),
    "adjoint-matching": sc.AdjointMatching(zero_variance=False),
    "adjoint-matching, zero variance": sc.AdjointMatching(),
}


def first_gradients(method, problem):
    """Of all parameters, after everything that the first iteration adds; and its metrics."""
    run = Run(problem, problem.chain(K if problem.reference.continuous else None), B, 1, 3)
    with problem.evaluating():
        state = method.setup(run)
        torch.manual_seed(0)
        with torch.no_grad():  # not at the reference, where much vanishes
            for p in state.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype))
        found = []

        def descend(*_) -> bool:
            found.append([None if p.grad is None else p.grad.clone() for p in state.parameters()])
            return True

        run.descend = descend
        metrics = method.step(state, run)
    return [g for gradients in found for g in gradients if g is not None], metrics


@pytest.mark.parametrize("rows", [40, 5], ids=["steps", "parts"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", PROBLEMS)
def test_gradients_in_blocks_are_those_of_the_whole(kind, name, rows, monkeypatch):
    method, problem = METHODS[name], PROBLEMS[kind]()
    whole, metrics = first_gradients(method, problem)
    in_blocks(monkeypatch, rows)
    parts, again = first_gradients(method, problem)
    assert len(parts) == len(whole) > 0 and max(float(g.abs().max()) for g in whole) > 1e-6
    for a, b in zip(parts, whole):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12 * float(b.abs().max()) + 1e-14)
    for key, value in metrics.items():
        assert again[key] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), key


def in_blocks(monkeypatch, rows):
    """Let blocks hold so many rows, whatever is measured."""
    for module in (blocks, gradients, lean_adjoint):
        monkeypatch.setattr(module, "bytes_per_row", lambda *_: 1.0)
    for room in (blocks.BLOCK_BYTES, blocks.WHOLE_BYTES):
        monkeypatch.setitem(room, "cpu", rows)


ON_A_MODEL = ["log-variance", "cross-entropy of other paths", "trajectory-balance", "soft-ppo", "reward-weighted-mle"]


@pytest.mark.parametrize("name", [*ON_A_MODEL, "adjoint-matching", "adjoint-matching, zero variance"])
def test_no_more_than_one_blocks_activations_are_alive(name, monkeypatch):
    problem = conditional()
    in_blocks(monkeypatch, 2 * B)
    monkeypatch.setattr(lean_adjoint, "LARGE_ROW", 0)
    model = problem.reference.model
    seen = []
    original = torch.nn.Module.__call__

    def call(self, *arguments, **named):
        out = original(self, *arguments, **named)
        if isinstance(self, Net) and self is not model:
            seen.append(self)
        return out

    monkeypatch.setattr(torch.nn.Module, "__call__", call)
    first_gradients(METHODS[name], problem)
    assert 0 < max(MOST[net] for net in seen) <= 2 * B


@pytest.mark.parametrize("own_step", [True, False])
@pytest.mark.parametrize("rows", [B, 5], ids=["a step", "parts of a step"])
def test_lean_targets_one_step_at_a_time_are_those_of_all_graphs(rows, own_step, monkeypatch):
    """Without the own step's noise, and with it as the first guess of the solve has it."""
    problem = conditional()
    chain = problem.chain(None)
    control: Any = build_control(problem, chain, None, seed=0)
    with torch.no_grad():
        control.main.model.last.add_(0.2 * randn(16, 3, seed=5))
    noise, y = SeededNoise(1, B, chain.steps, (3,), dtype=F64, device="cpu"), problem.draw_condition(B, 1)
    with problem.evaluating():
        paths = roll_out(problem, chain, control, problem.draw_start(B, 1), noise, y)
        slope, kept = randn(B, 3, seed=7), StepJacobians(paths)
        states = paths.states[:-1].detach().requires_grad_(True)
        shifts = shifts_along(chain, control, states, y)
        z, _ = own_noise(kept, states, shifts, ClosedLoop(chain), tolerance=0.1, most=0)
        monkeypatch.setattr(lean_adjoint, "LARGE_ROW", 0)
        in_blocks(monkeypatch, rows)
        again = StepJacobians(paths)
        assert again.again and not kept.again and float(z.abs().max()) > 1e-2
        for part in (None, z):
            want = lean_targets(kept, slope, noise_part=part, own_step=own_step)
            have = lean_targets_again(again, control, slope, zero_variance=part is not None, own_step=own_step)
            assert torch.allclose(have, want, rtol=1e-10, atol=1e-12)
        v = randn(chain.steps, B, 3, seed=8)
        assert torch.allclose(again.mean_products(v), kept.mean_products(v), atol=1e-12)
        assert torch.allclose(again.step(2, v[0], v[1]), kept.step(2, v[0], v[1]), atol=1e-12)


@pytest.mark.parametrize("pairing", ["chain", "continuous"])
def test_steps_learn_in_their_adjoints_graph_what_they_learn_in_one_of_their_own(pairing, monkeypatch):
    """Once the weights of the steps are known, and a step's graph of all paths can be held."""
    method = sc.AdjointMatching(pairing=pairing)
    monkeypatch.setattr(RegressionState, "knows_weights", property(lambda self: True))
    monkeypatch.setattr(
        RegressionState, "step_weights", lambda self: torch.linspace(0.5, 1.5, len(self.residuals), dtype=F64)
    )
    monkeypatch.setattr(lean_adjoint, "LARGE_ROW", 0)
    in_blocks(monkeypatch, 5)
    want, metrics = first_gradients(method, conditional())
    in_blocks(monkeypatch, 2 * B)
    monkeypatch.setattr(adjoint_matching, "regress", None)  # of all steps together, which is not to be called
    have, again = first_gradients(method, conditional())
    assert len(have) == len(want) > 0 and max(float(g.abs().max()) for g in want) > 1e-6
    for a, b in zip(have, want):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12 * float(b.abs().max()))
    assert again["loss"] == pytest.approx(metrics["loss"], rel=1e-9)


def test_blocks_are_all_states_once_and_no_larger_than_allowed():
    for steps, batch, most in [
        (7, 5, 100),
        (7, 5, 35),
        (7, 5, 34),
        (7, 5, 10),
        (7, 5, 5),
        (7, 5, 4),
        (7, 5, 1),
        (1, 1, 0),
    ]:
        count = torch.zeros(steps, batch)
        found = blocks_of(steps, batch, most)
        for block in found:
            assert block.of(count).numel() <= max(1, most)
            block.of(count).add_(1)
        assert bool((count == 1).all()), (steps, batch, most)
        assert len(found) == 1 or most < steps * batch


def test_what_a_graph_keeps_is_measured():
    """A tanh layer keeps its input and its output; parameters are there anyway."""
    x = randn(16, 4, seed=0).requires_grad_()
    hidden, other = 64, 100
    layer = torch.nn.Sequential(
        torch.nn.Linear(4, hidden, dtype=F64), torch.nn.Tanh(), torch.nn.Linear(hidden, 4, dtype=F64)
    )
    constant = randn(other, seed=1).requires_grad_()
    found = blocks.graph_bytes(lambda rows: layer(x[:rows] * 1.0) + (constant**2).sum(), (*layer.parameters(),))
    assert found == 8 * (4 + hidden)


def test_samples_and_evaluations_in_batches_are_those_of_all_paths_at_once():
    """And no call of a model, that of the decoding among them, sees more rows than a batch."""
    problem, rows = conditional(), []
    solution = sc.solve(problem, sc.LogVariance(), iterations=2, batch_size=16, seed=0)
    whole, evaluation = solution.sample(200, seed=1), solution.evaluate(256, seed=2, confirm=False)
    models = [problem.reference.model, solution.control.main.model]  # pyright: ignore[reportAttributeAccessIssue]
    handles = [model.register_forward_pre_hook(lambda _, given: rows.append(len(given[0]))) for model in models]
    assert torch.allclose(solution.sample(200, seed=1, batch_size=64), whole, atol=1e-13)
    again = solution.evaluate(256, seed=2, confirm=False, batch_size=64)
    for handle in handles:
        handle.remove()
    assert max(rows) == 64
    assert again.elbo.value == pytest.approx(evaluation.elbo.value, abs=1e-12)
    assert again.gap.value == pytest.approx(evaluation.gap.value, abs=1e-12)
    with pytest.raises(ValueError, match="multiple of 64"):
        solution.sample(200, batch_size=100)


def test_a_tuned_copy_is_called_once_a_step_and_the_model_for_decoding_alone():
    problem, calls = conditional(), {}
    solution = sc.solve(problem, sc.LogVariance(), iterations=20, batch_size=64, seed=0, learning_rate=1e-2)
    wanted = solution.simulate(64, seed=1).samples
    tuned: Any = solution.control.main.model  # pyright: ignore[reportAttributeAccessIssue]
    models = {"tuned": tuned, "pre-trained": problem.reference.model}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    found = solution.sample(64, seed=1)
    assert torch.allclose(found, wanted, atol=1e-12) and calls == {"tuned": K, "pre-trained": 1}
    assert float((sc.simulate(problem, 64, seed=1).samples - wanted).detach().abs().max()) > 1e-3
