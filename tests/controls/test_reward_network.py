"""Controls beside a pre-trained model that see the reward at the denoised state, and the ways a user asks for them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from cases import F64, randn
from torch import Tensor, nn

import sdecontrol as sc
from sdecontrol.chains.shifts import shift_function
from sdecontrol.controls.build import WAYS, build_control
from sdecontrol.controls.reward_network import RewardLayers, RewardNetwork

ABAR = torch.cumprod(1 - torch.linspace(1e-3, 0.25, 40, dtype=F64), 0)
RUN: dict[str, Any] = {"batch_size": 64, "seed": 0, "progress": False}


class Model(nn.Module):
    """Counts its calls; of images of any size, with a condition or without."""

    def __init__(self, unit: float = 1.0) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([0.7, 0.2], dtype=F64)), nn.Parameter(torch.tensor([0.3], dtype=F64))
        self.unit, self.calls = unit, 0

    def forward(self, x: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        s = s.reshape(-1, *(1,) * (x.ndim - 1)).to(x) / self.unit
        shift = 0.0 if y is None else 0.1 * y.reshape(s.shape).to(x)
        return self.a[0] * x + self.a[1] * torch.tanh(x * (1 + s)) + self.b * s + shift


def reward(x: Tensor, y: Tensor | None = None) -> Tensor:
    return x.flatten(1).tanh().sum(1) + (0.0 if y is None else 0.2 * y * x.flatten(1).sum(1))


def sde_problem(shape: tuple[int, ...] = (3,), **more: Any) -> sc.ControlProblem:
    return sc.ControlProblem(sc.generative_sde(Model(), sc.VP(), shape=shape), reward=reward, alpha=0.5, **more)


def chain_problem(shape: tuple[int, ...] = (3,), **more: Any) -> sc.ControlProblem:
    chain = sc.diffusion_chain(Model(40.0), ABAR, "noise", shape=shape, eta=0.8, steps=9)
    return sc.ControlProblem(chain, reward=reward, alpha=0.5, start="fixed", **more)


def labelled(n: int, seed: int | None = None) -> Tensor:
    return torch.arange(n) % 3


def moved(control: nn.Module) -> nn.Module:
    """Its parameters off their start, where it is 0."""
    with torch.no_grad():
        for i, p in enumerate(control.parameters()):
            p += 0.01 * randn(*p.shape, seed=i, dtype=p.dtype)
    return control


PROBLEMS = {"sde": sde_problem, "chain": chain_problem}


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_starts_at_the_reference(kind: str, way: str) -> None:
    problem = PROBLEMS[kind]()
    chain = problem.chain(8 if kind == "sde" else None)
    shift = shift_function(chain, build_control(problem, chain, way, seed=1))
    with torch.no_grad():
        assert all(not shift(k, randn(5, 3, seed=k), None).any() for k in range(chain.steps))


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("shape", [(3,), (2, 3, 3)])
@pytest.mark.parametrize("condition", [None, labelled])
def test_a_control_at_a_time_is_that_of_the_chain(kind: str, shape: tuple[int, ...], condition: Any) -> None:
    problem = PROBLEMS[kind](shape, condition=condition)
    chain, y = problem.chain(8 if kind == "sde" else None), problem.draw_condition(5, 0)
    control = moved(build_control(problem, chain, "both", seed=1))
    shift = shift_function(chain, control)
    for k in (0, 4, chain.steps - 1):
        x = randn(5, *shape, seed=k)
        with torch.no_grad():
            c = shift(k, x, y)
            assert c.abs().max() > 1e-3
            assert torch.allclose(chain.shift_at(k, x, control(x, chain.times[k], y), y), c, atol=1e-12)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_its_langevin_term_is_the_rewards_gradient_at_the_denoised_state(kind: str) -> None:
    """With coefficients 1 and no more: ``u = sigma^T grad r(x0^)/alpha``, by finite differences; on a chain the
    scale of the step times it."""
    problem = PROBLEMS[kind]()
    chain = problem.chain(8 if kind == "sde" else None)
    network: Any = RewardNetwork.of(problem, RewardLayers((8,)), 0)
    x, k, step = randn(4, 3, seed=3), 5, 1e-5
    with torch.no_grad():
        network.langevin[0] = 16 / 80  # of the constant among 16 features, in the unit of its parameters
        c = shift_function(chain, network)(k, x, None)
        x0 = problem.reference.denoised(x, chain.times[k])
        slope = torch.stack([(reward(x0 + step * e) - reward(x0 - step * e)) / (2 * step) for e in torch.eye(3).to(x)])
        slope = slope.mT / problem.alpha
        if kind == "sde":
            want = chain.shift_at(k, x, problem.reference.diffusion(x, chain.times[k]) * slope)
        else:
            want = chain.kernel(k, x)[1] * slope
    assert torch.allclose(c, want, atol=1e-8)


@pytest.mark.parametrize("way", ["frozen", "both"])
def test_backpropagation_knows_that_the_slope_moves_with_the_state(way: str) -> None:
    """``E[-r/alpha + |c|^2/2]`` on fixed noise, by its parameters, against differences of its values."""
    problem = sde_problem()
    chain = problem.chain(5)
    control, noise = moved(build_control(problem, chain, way, seed=1)), randn(5, 16, 3, seed=9)
    x0 = randn(16, 3, seed=8)

    def loss() -> Tensor:
        shift, x, total = shift_function(chain, control), x0, torch.zeros((), dtype=F64)
        for k in range(chain.steps):
            c = shift(k, x, None)
            x, total = chain.step(k, x, noise[k], c), total + 0.5 * c.square().sum()
        return total - reward(x).sum() / problem.alpha

    parameters = [p for p in control.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(), parameters)
    for i, (p, g) in enumerate(zip(parameters, gradients)):
        e, step = randn(*p.shape, seed=50 + i), 1e-5
        with torch.no_grad():
            p += step * e
            above = loss()
            p -= 2 * step * e
            below = loss()
            p += step * e
        assert (g * e).sum() == pytest.approx(float((above - below) / (2 * step)), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_calls_the_model_once_and_its_tuned_copy_once(kind: str, way: str) -> None:
    problem = PROBLEMS[kind]()
    chain = problem.chain(8 if kind == "sde" else None)
    control = build_control(problem, chain, way, seed=1)
    copies = [m for m in control.modules() if isinstance(m, Model)]
    model: Any = problem.reference.model
    for m in (model, *copies):
        m.calls = 0
    sc.simulate(problem, 64, control=control, time_steps=8 if kind == "sde" else None, seed=0)
    assert [m.calls for m in (model, *copies)] == [chain.steps] * (1 if way == "frozen" else 2)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_shifts_at_stored_states_call_the_model_once_a_step(kind: str) -> None:
    """Of a discrete model the step's scale is asked for beside the denoised state: of the same prediction."""
    problem = PROBLEMS[kind]()
    chain = problem.chain(8 if kind == "sde" else None)
    control = moved(build_control(problem, chain, "frozen", seed=1))
    states = sc.simulate(problem, 4, time_steps=8 if kind == "sde" else None, seed=2).states[:-1]
    model = problem.reference.modules()[0]
    model.calls = 0
    with torch.no_grad():
        control.along(chain, states)
    assert model.calls == chain.steps


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_saved_pickled_trained_on_and_a_model(tmp_path: Any, way: str) -> None:
    problem = sde_problem()
    solution = sc.solve(problem, "reward-backprop", time_steps=8, iterations=3, control=way, **RUN)
    x = solution.sample(20, seed=3)
    assert (x - sc.simulate(problem, 20, time_steps=8, seed=3).samples).abs().max() > 1e-4
    solution.save(tmp_path)
    assert torch.equal(sc.load(tmp_path, problem).sample(20, seed=3), x)
    assert torch.equal(pickle.loads(pickle.dumps(solution.control))(x, 0.5), solution.control(x, 0.5))
    again = sc.solve(problem, "log-variance", time_steps=8, iterations=1, control=solution, learning_rate=1e-12, **RUN)
    assert torch.allclose(again.sample(20, seed=3), x, atol=1e-8)
    tuned = sc.ControlProblem(sc.generative_sde(solution.model, sc.VP(), shape=(3,)), reward=reward)
    with torch.no_grad():
        ours = solution.simulate(8, seed=1)
        theirs = sc.simulate(tuned, 8, time_steps=8, noise=ours.noises, state=ours.states[0])
    assert torch.allclose(ours.states, theirs.states, atol=1e-8)


def test_a_run_resumes_to_the_same_bits(tmp_path: Any) -> None:
    how: dict[str, Any] = {"time_steps": 6, "control": "both", "checkpoint_every": 2, "iterations": 5, **RUN}
    whole = sc.solve(sde_problem(), "reward-backprop", **how)

    class Stop:
        def on_step_end(self, state: Any) -> None:
            if state.iteration == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sc.solve(sde_problem(), "reward-backprop", checkpoint_dir=tmp_path, callbacks=[Stop()], **how)
    again = sc.solve(sde_problem(), "reward-backprop", checkpoint_dir=tmp_path, resume=True, **how)
    assert torch.equal(again.sample(20, seed=3), whole.sample(20, seed=3))


def test_of_large_images_no_parameter_grows_with_the_image() -> None:
    problem = sde_problem((3, 64, 64))
    network: Any = build_control(problem, problem.chain(4), "frozen", seed=1)
    assert sum(p.numel() for p in network.parameters()) < 50_000
    with torch.no_grad():
        c = shift_function(problem.chain(4), moved(network))(2, randn(2, 3, 64, 64, seed=1), None)
    assert c.shape == (2, 3, 64, 64) and c.abs().max() > 1e-4


def test_a_black_box_reward_is_not_called_in_sampling() -> None:
    calls = []

    def box(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x.detach().sum(1)

    problem = sc.ControlProblem(sc.generative_sde(Model(), sc.VP(), shape=(3,)), reward=box)
    solution = sc.solve(problem, "soft-ppo", time_steps=5, iterations=2, control="frozen", **RUN)
    calls.clear()
    solution.sample(64, seed=1)
    assert not calls


def test_ways_that_do_not_apply_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown control 'tuend'; did you mean 'tuned'"):
        sc.solve(sde_problem(), "reward-backprop", control="tuend", iterations=1, **RUN)
    plain = sc.ControlProblem(sc.LinearSDE(-torch.eye(2), 1.0), reward=reward, initial=sc.Dirac(torch.zeros(2)))
    with pytest.raises(ValueError, match="control='frozen' is for pre-trained models"):
        sc.solve(plain, "reward-backprop", control="frozen", iterations=1, **RUN)
    law = sc.GaussianMixture(torch.ones(1), torch.zeros(1, 2), 1.0)
    fixed = sc.ControlProblem(sc.generative_sde(law, sc.VP()), reward=reward)
    with pytest.raises(ValueError, match="no parameters to train"):
        sc.solve(fixed, "reward-backprop", control="tuned", iterations=1, **RUN)
