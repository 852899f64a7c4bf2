"""Gradients through chains of every kind, tuned models, and guidance of tokens: against graphs of the whole path,
differences, and enumeration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from scipy.linalg import expm
from torch import nn

import sdecontrol as sc
from sdecontrol.chains.blocks import blocks_of, in_blocks
from sdecontrol.chains.shifts import shift_function
from sdecontrol.methods.base import Run
from sdecontrol.paths.lean_adjoint import StepJacobians, lean_targets, running_cost_gradients
from sdecontrol.paths.paths import Paths

from ..cases import tensor
from ..finite import FiniteAnswers, finite_cases, masked_case, spoil
from ..registry import Measurement, Setting, check, compare, within

Lines = Iterator[Measurement]
KIND = "estimator"
POINT = tensor([0.3, -0.2])


def reward(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x).sum(1) - 0.1 * x.square().sum(1)


def cost(x: torch.Tensor, t: Any) -> torch.Tensor:
    return 0.3 * (x.square().sum(1) + t * x[:, 0])


def push(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.3 * torch.cos(x + t[:, None])


def _kinds() -> dict[str, tuple[sc.ControlProblem, dict[str, Any]]]:
    dim: dict[str, Any] = {"dim": 2}
    alpha: dict[str, Any] = {"alpha": 0.7}
    drift = lambda x, t: torch.sin(x.flip(1)) - x * (1 + t)  # noqa: E731
    size = lambda x, t: 0.4 + 0.2 * torch.sin(x)  # noqa: E731
    half = torch.tensor(0.5, dtype=torch.float64)
    point = sc.Dirac(POINT)
    sphere = sc.ManifoldSDE(sc.Sphere(2), None, 0.8)
    up = sc.Dirac(tensor([0.0, 0.6, 0.8]))
    simulator = sc.discrete_dynamics(lambda x, w, k: torch.tanh(x + 0.3 * w) + 0.1 * w**2, 4, dim=2, noises=2)
    semilinear = sc.SemilinearSDE(-2 * torch.eye(2, dtype=torch.float64), lambda x, t: torch.sin(x.flip(1)), 0.5)
    steps: dict[str, Any] = {"time_steps": [0.0, 0.2, 0.3, 0.7, 1.0]}
    return {
        "additive noise": (sc.ControlProblem(sc.SDE(drift, half, **dim), point, reward, cost, **alpha), steps),
        "noise of the state": (sc.ControlProblem(sc.SDE(drift, size, **dim), point, reward, cost, **alpha), steps),
        "exponential": (
            sc.ControlProblem(semilinear, point, reward, cost, **alpha),
            {**steps, "scheme": "exponential"},
        ),
        "simulator": (sc.ControlProblem(simulator, point, reward, cost, **alpha), {}),
        "sphere": (sc.ControlProblem(sphere, up, lambda x: torch.exp(x[:, 2]), cost, **alpha), steps),
    }


def _by_one_graph(problem: sc.ControlProblem, paths: Paths, defect: str) -> torch.Tensor:
    """``d/dc_k (r/alpha - sum h f/alpha)`` along the path with the later shifts held, by a graph of all of it."""
    chain = paths.chain
    c = paths.shifts.detach().clone().requires_grad_(True)
    x, total = paths.states[0], torch.zeros(len(paths), dtype=torch.float64)
    for k in range(chain.steps):
        here = x.detach() if defect.startswith("later") and k == 2 else x
        at = chain.step_sizes[k] if not defect.startswith("costs") else 0.0
        total = total - at * problem.running_cost(x, chain.times[k]) / problem.alpha
        x = chain.step(k, here, paths.noises[k], c[k])
    alpha = problem.alpha * (1.05 if defect.startswith("alpha") else 1.0)
    total = total + problem.reward(chain.decode(x)) / alpha
    return torch.autograd.grad(total.sum(), c)[0]


@check(
    "lean-adjoints",
    "MATH 3: the lean adjoint",
    kind=KIND,
    implements=["sdecontrol.paths.lean_adjoint.lean_targets", "sdecontrol.paths.lean_adjoint.StepJacobians"],
    controls=["later steps left out", "costs left out", "alpha off by 5 %"],
)
def lean(setting: Setting, defect: str) -> Lines:
    """The regression target scale_k^T a_{k+1} of a shift is the derivative of what is still to come by that shift, the
    later shifts held: the recursion backwards, one step's Jacobian at a time, against one graph through the whole path;
    of noise that depends on the state, exponential steps, a simulator's smooth map and the sphere."""
    for name, (problem, steps) in _kinds().items():
        control = (lambda x, t: 0.3 * x.roll(1, 1)) if name == "sphere" else push
        paths = sc.simulate(problem, 6, control, seed=setting.seed, **steps)
        end = paths.end.detach().requires_grad_(True)
        slope = torch.autograd.grad(problem.reward(paths.chain.decode(end)).sum(), end)[0] / problem.alpha
        costs = running_cost_gradients(paths, problem.running_cost_or_none)
        got = lean_targets(StepJacobians(paths), slope, costs=costs, alpha=problem.alpha)
        want = _by_one_graph(problem, paths, defect)
        if name == "sphere":  # normal parts of a shift move nothing
            got, want = (torch.stack([paths.chain.tangent(x, v) for x, v in zip(paths.states, u)]) for u in (got, want))
        yield compare(f"targets, {name}", got, want, 1e-9)


class Small(nn.Module):
    """A user's control of two dimensions."""

    def __init__(self, way: torch.Tensor | None = None, size: float = 0.0) -> None:
        super().__init__()
        start = torch.linspace(-0.5, 0.6, 10, dtype=torch.float64).reshape(5, 2)
        self.A = nn.Parameter(start if way is None else start + size * way)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        ones = torch.ones_like(x[:, :1])
        return torch.tanh(torch.cat((x, x.sin(), t[:, None] * ones), 1) @ self.A)


@check(
    "continuous-adjoints",
    "Section 5.2; Li et al. 2001.01328",
    kind="continuous",
    implements=["sdecontrol.RewardBackprop", "sdecontrol.paths.continuous_adjoint.backpropagate_continuous"],
    controls=["through the last step only", "alpha off by 5 %"],
)
def continuous_adjoints(setting: Setting, defect: str) -> Lines:
    """The reversible scheme's adjoint is the exact gradient of that scheme's own cost (central differences of what it
    reports, the noise held); the adjoint equation's is the chain's own up to O(h): it differs by less on 160 steps
    than on 20; and the chain's adjoint and checkpoints are its gradient exactly."""
    problem, _ = _kinds()["additive noise"]
    way = torch.linspace(1, -1, 10, dtype=torch.float64).reshape(5, 2)

    def once(mode: Any, K: int, size: float = 0.0) -> tuple[float, float]:
        run = Run(problem, problem.chain(K), 64, 1, setting.seed, Small(way, size))
        method = sc.RewardBackprop(1 if defect.startswith("through") else mode)
        state: Any = method.setup(run)
        found = method.step(state, run)
        slope = float((next(state.control.parameters()).grad * way).sum())  # type: ignore[operator]
        alpha = problem.alpha * (1.05 if defect.startswith("alpha") else 1.0)
        return -found["objective"] / alpha, slope

    e = 1e-4
    for mode, K in (("reversible-heun", 6), ("full", 6), ("checkpoint", 6), ("adjoint", 6)):
        if defect.startswith("through") and mode == "reversible-heun":
            continue
        difference = (once(mode, K, e)[0] - once(mode, K, -e)[0]) / (2 * e)
        yield compare(f"directional derivative, {mode}", once(mode, K)[1], difference, 1e-6)
    if defect:
        return
    errors = [abs(once("continuous-adjoint", K)[1] / once("full", K)[1] - 1) for K in (20, 160)]
    yield within("continuous adjoint, 20 steps", errors[0], 0.5)
    yield within("160 steps over 20", errors[1] / errors[0], 0.6)


@check(
    "tuned-models",
    "[27], [26]: the model's own parametrisation",
    implements=["sdecontrol.controls.tuned.TunedControl", "sdecontrol.controls.reward_network.RewardNetwork"],
    controls=["prediction off by 5 %", "guidance left out"],
)
def tuned(setting: Setting, defect: str) -> Lines:
    """A control of a pre-trained model and the model that it makes are one: a chain of the tuned model has the mean of
    the controlled chain at every state, for a tuned copy, a network beside the frozen model that sees the reward, and
    both; at the start all of them are the model."""
    schedule, scale = sc.VP(0.5, 8.0), 1.05 if defect.startswith("prediction") else 1.0
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(tensor(np.random.default_rng((5, i)).normal(size=tuple(p.shape)) * 0.4))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            return self.net(torch.cat((x, s.reshape(-1, 1).to(x).expand(len(x), 1)), 1))

    problem = sc.ControlProblem(
        sc.generative_sde(Model(), schedule, shape=(2,)), reward=reward, start="fixed", alpha=0.5
    )
    x = tensor(setting.rng(181).normal(size=(5, 2)))
    for way in ("tuned", "frozen", "both"):
        options: dict[str, Any] = {"time_steps": 5, "iterations": 3, "batch_size": 32, "seed": 0, "progress": False}
        solution = sc.solve(problem, "reward-backprop", control=way, learning_rate=0.05, **options)
        chain = problem.chain(5)
        other = sc.ControlProblem(sc.generative_sde(solution.model, schedule, shape=(2,)), start="fixed").chain(5)
        shift, moved = shift_function(chain, solution.control), 0.0
        for k in (0, 2, 4):
            with torch.no_grad():
                mean, root = chain.kernel(k, x)
                c = shift(k, x, None) * (0.0 if defect.startswith("guidance") else scale)
                moved = max(moved, float(c.abs().max()))
                yield compare(f"mean of step {k}, {way}", other.kernel(k, x)[0], mean + root * c, 1e-7)
        yield within(f"1e-3 less the largest shift, {way}", 1e-3 - moved, 0.0)


@check(
    "guided-tokens",
    "[27], MATH 11: value guidance on tokens",
    kind=KIND,
    implements=["sdecontrol.ValueGuidance", "sdecontrol.controls.token_guidance.TokenValueControl"],
    controls=["alpha off by 5 %", "sign of r flipped", "kernels off by 1 %", "value of the step before"],
)
def guided_tokens(setting: Setting, defect: str) -> Lines:
    """On tokens guidance by the exact value, v_{k+1}(y)/alpha for each neighbour y, is the soft-optimal kernel where
    one variable moves a step: every log weight is log Z; for jump processes and masked diffusions in random order."""
    cases = [c for c in finite_cases(setting, single=True) if c.single]
    for case in cases:
        answers = FiniteAnswers(spoil(case, defect))
        late = -1 if defect.startswith("value of") else 0
        tables = torch.zeros(case.K + 1, case.n, dtype=torch.float64)
        for k in range(case.K + 1):
            tables[k][case.reached(k)] = tensor(answers.value(k))
        clock = tensor(case.clock)

        def value(x: torch.Tensor, t: torch.Tensor, tables=tables, clock=clock, case=case, late=late) -> torch.Tensor:
            k = (clock[None] <= t.double()[:, None] + 1e-9).sum(1) - 1
            return tables[(k + late).clamp(min=0), case.index(x)]

        options = case.steps
        solution = sc.solve(case.problem(), sc.ValueGuidance(value), progress=False, **options)
        paths = sc.simulate(case.problem(), 64, solution.control, seed=setting.seed, **options)
        _, log_z = case.optimum()
        yield compare(f"log weights, {case.label}", paths.log_weights().detach(), np.full(64, log_z), 1e-8)


@check(
    "learned-tokens",
    "MATH 11: masked diffusion",
    kind="solver",
    implements=[
        "sdecontrol.CrossEntropy",
        "sdecontrol.ParticleMatching",
        "sdecontrol.RewardBackprop",
        "sdecontrol.PathIntegralGuidance",
        "sdecontrol.BridgeMatching",
    ],
    controls=["not trained", "sign of r flipped"],
)
def learned_tokens(setting: Setting, defect: str) -> Lines:
    """Of a masked diffusion whose model has the conditionals of a joint law, the library's token network comes within
    70 % of the reference's KL to Q_fine in few iterations by weighted paths, by remasked ends, by particles, and by
    path integrals without training: KLs by the paths' weights and the enumerated log Z."""
    case = replace(masked_case(setting.rng(182), 3, 2), alpha=0.7)
    given = spoil(case, defect)
    _, log_z = case.optimum()
    plain = sc.simulate(case.problem(), 4096, seed=1)
    whole = log_z - float(plain.log_weights().mean())
    ways: tuple[tuple[str, Any, int | None], ...] = (
        ("path integrals", sc.PathIntegralGuidance(256), None),
        ("cross-entropy", sc.CrossEntropy(trust_region=1.0), 25),
        ("bridge matching", sc.BridgeMatching(trust_region=1.0), 25),
        ("particle matching", sc.ParticleMatching(num_particles=256), 25),
        *((("log-variance", sc.LogVariance(), 100),) if setting.thorough else ()),
    )
    for name, method, iterations in ways:
        if defect == "not trained" and iterations is None:
            continue
        count: dict[str, Any] = (
            {} if iterations is None else {"iterations": 1 if defect == "not trained" else iterations}
        )
        rate: dict[str, Any] = (
            {} if iterations is None else {"learning_rate": 1e-9 if defect == "not trained" else 0.02}
        )
        solution = sc.solve(given.problem(), method, batch_size=128, seed=setting.seed, progress=False, **count, **rate)
        with torch.no_grad():
            paths = sc.simulate(case.problem(), 2048, solution.control, seed=3)
        yield within(f"KL over the reference's, {name}", (log_z - float(paths.log_weights().mean())) / whole, 0.7)
    if not defect:
        yield from _relaxed(setting)


def _relaxed(setting: Setting) -> Lines:
    """Backpropagation through relaxed tokens, of a linear reward, goes where the exact gradient would."""
    table = tensor(setting.rng(183).normal(size=(2, 3)))
    model = sc.masked_diffusion(_Letters(), 2, 3, 4, dtype=torch.float64)
    problem = sc.ControlProblem(model, reward=sc.OneHot(lambda p: (p * table).sum((1, 2)), 3, torch.float64), alpha=0.8)
    plain = float(sc.simulate(problem, 4096, seed=1).log_weights().mean())
    options: dict[str, Any] = {"iterations": 14, "batch_size": 128, "seed": 0, "learning_rate": 0.05, "progress": False}
    solution = sc.solve(problem, sc.RewardBackprop(temperature=0.3), **options)
    exact = sc.exact_solution(problem)
    with torch.no_grad():
        found = float(sc.simulate(problem, 4096, solution.control, seed=1).log_weights().mean())
    left = (float(exact.elbo) - found) / (float(exact.elbo) - plain)
    yield within("KL over the reference's, relaxed tokens", left, 0.7)


class _Letters(nn.Module):
    """Logits of two positions of three letters, of tokens or of their probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(tensor([[0.2, -0.1, 0.4], [0.0, 0.3, -0.2]]))

    def forward(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        p = x if x.is_floating_point() else nn.functional.one_hot(x, 4).double()
        return self.bias + 0.5 * p.flip(1)[..., :3]


@check(
    "conditional-gradients",
    "[38], Corollary 2: conditions",
    kind=KIND,
    implements=[
        "sdecontrol.AdjointMatching",
        "sdecontrol.RewardBackprop",
        "sdecontrol.SoftPPO",
        "sdecontrol.Reinforce",
    ],
    controls=["another condition", "alpha off by 5 %"],
)
def conditional(setting: Setting, defect: str) -> Lines:
    """With a single condition y a method's gradient is that of the problem in which y is written down, on the same
    noise."""
    y = 0.7 + (0.1 if defect.startswith("another") else 0.0)
    alpha = 0.8 * (1.05 if defect.startswith("alpha") else 1.0)

    def problem(written: bool) -> sc.ControlProblem:
        drift: Callable[..., torch.Tensor] = (lambda x, t: 0.7 - x) if written else (lambda x, t, y: y - x)
        aim: Callable[..., torch.Tensor] = (
            (lambda x: -((x[:, 0] - 1.4) ** 2)) if written else (lambda x, y: -((x - 2 * y) ** 2)[:, 0])
        )
        more: dict[str, Any] = {} if written else {"condition": tensor([[y]])}
        sde = sc.SDE(drift, torch.tensor(0.5, dtype=torch.float64), dim=1)
        return sc.ControlProblem(sde, sc.Dirac(tensor([0.1])), aim, alpha=0.8 if written else alpha, **more)

    class Control(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(tensor([0.3, -0.4, 0.2]))

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: Any = 0.7) -> torch.Tensor:
            return self.a[0] + self.a[1] * y + self.a[2] * x

    for method in (
        sc.AdjointMatching(), sc.RewardBackprop("adjoint"), sc.SoftPPO(epochs=1, baseline="per-time"), sc.Reinforce(),
        sc.LogVariance(group_size=16), sc.CrossEntropy(),
    ):  # fmt: skip
        found = []
        for written in (True, False):
            run = Run(problem(written), problem(written).chain(4), 64, 1, setting.seed, Control())
            state: Any = method.setup(run)
            method.step(state, run)
            found.append(next(p.grad for p in state.control.parameters() if p.grad is not None))
        yield compare(f"gradient, {method.name}", found[1], found[0], 1e-9)


@check(
    "ratios-of-tokens",
    "MATH 10: a value is a log density ratio; Remark 1",
    kind="solver",
    implements=["sdecontrol.ValueGuidance", "sdecontrol.methods.ratio_tokens.token_ratio_step"],
    controls=["not trained", "sign of r flipped", "alpha off by 50 %"],
)
def token_ratios(setting: Setting, defect: str) -> Lines:
    """The log density ratio that logistic regression finds between weighted and plain paths of a process on a finite
    space is its value, alpha log psi, by the matrix exponential, at all states and times."""
    Q = np.array([[-1.0, 1.0, 0.0], [0.5, -1.5, 1.0], [0.0, 2.0, -2.0]])
    r, alpha = np.array([0.0, 0.5, 2.0]), 0.8
    sign = -1.0 if defect.startswith("sign") else 1.0
    process = sc.JumpProcess(tensor(Q), horizon=1.0, initial=tensor([0.4, 0.3, 0.3]))
    used = alpha * (1.5 if defect.startswith("alpha") else 1.0)
    problem = sc.ControlProblem(process, reward=lambda x: sign * tensor(r)[x[:, 0]], alpha=used)
    count = 256 if defect == "not trained" else 4096
    method = sc.ValueGuidance("ratio", num_paths=count)
    options: dict[str, Any] = {"time_steps": 8, "seed": setting.seed, "progress": False}
    solution = sc.solve(problem, method, iterations=1, **options)
    value, x = cast(Any, solution.control).value, torch.tensor([[0], [1], [2]])
    if defect == "not trained":
        value = cast(Any, sc.solve(problem, sc.ValueGuidance(num_paths=256), iterations=1, **options).control).value
        for p in value.parameters():
            p.data.zero_()
    for t in (0.125, 0.5, 0.875):
        psi = expm((1 - t) * Q) @ np.exp(r / alpha)
        found = value.at(x, tensor(t)).detach().numpy()
        yield within(f"v/alpha at t = {t}", float(np.abs(found - np.log(psi)).max()), 0.12)


@check(
    "gradients-in-blocks",
    "MATH 3: losses of stored paths",
    implements=["sdecontrol.chains.blocks.in_blocks", "sdecontrol.chains.blocks.blocks_of"],
    controls=["a block left out", "rows of another block"],
)
def in_blocks_(setting: Setting, defect: str) -> Lines:
    """A loss of a control at all steps of all paths has the same gradient whether its activations are held at once or
    some steps, or some rows of one step, at a time: sum_k v_k' A s_k in closed form, v_k s_k' summed."""
    rng = setting.rng(203)
    states, slopes = rng.normal(size=(4, 6, 2)), rng.normal(size=(4, 6, 3))
    A = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    A.data = tensor(rng.normal(size=(3, 2)))
    want = np.einsum("kbi,kbj->ij", slopes, states)
    for most in (24, 12, 7, 3):
        blocks = blocks_of(4, 6, most)
        rows = sum((b.steps.stop - b.steps.start) * (b.rows.stop - b.rows.start) for b in blocks)
        yield compare(f"states in blocks of {most}", float(rows), 24.0, 0.0)

        def evaluate(block: Any) -> torch.Tensor:
            return block.of(tensor(states)) @ A.T

        values = in_blocks(evaluate, blocks, [A], None)
        yield compare(f"values, blocks of {most}", values.detach(), states @ A.detach().numpy().T)
        given = tensor(slopes)
        if defect.startswith("a block"):
            given = given.clone()
            blocks[-1].of(given).zero_()
        if defect.startswith("rows"):
            given = given.roll(1, 1)
        (found,) = torch.autograd.grad((values * given).sum(), [A])
        yield compare(f"gradient, blocks of {most}", found, want)
