"""What users hand in and what they take out: objects of other libraries, functions in other processes, models of half
precision, files, frames and figures, each against numbers that are known without them."""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import stats

import sdecontrol as sc
from sdecontrol.controls.given import given_control
from sdecontrol.evaluation.sample_figure import sample_figure, telling_coordinates
from sdecontrol.evaluation.solution import Solution
from sdecontrol.problems.reward_view import InnerLayer, RewardView
from sdecontrol.processes.adapters import as_reference, tunable_copy
from sdecontrol.processes.masters import MasterWeights

from ..cases import LinearCase, tensor
from ..iterations import AffineModule
from ..registry import Measurement, Setting, check, compare, within
from .particles import point_case

Lines = Iterator[Measurement]


class _Theirs:
    """``dY = (A y + t) dt + g(y) dW`` in torchsde's protocol, with functions of its own or both in one."""

    sde_type = "ito"

    def __init__(self, noise_type: str, both: bool, A: np.ndarray, defect: str) -> None:
        self.noise_type, self.A, self.late = noise_type, tensor(A), 0.0 if defect.startswith("time") else 1.0
        if both:
            self.f_and_g = lambda t, y: (self._f(t, y), self._g(t, y))
        else:
            self.f, self.g = self._f, self._g

    def _f(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y @ self.A.T + self.late * t

    def _g(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        own = 0.3 + 0.1 * torch.cos(y)
        return own if self.noise_type == "diagonal" else torch.diag_embed(own) + 0.2 * t


@check(
    "objects-of-torchsde",
    "MATH 2: the chain",
    implements=["sdecontrol.SDE.from_torchsde", "sdecontrol.simulate"],
    controls=["time left out", "drift off by 1 %", "noise of the next step"],
)
def torchsde_objects(setting: Setting, defect: str) -> Lines:
    """An SDE written for torchsde, with f and g or with both in one, diagonal noise or a matrix, is the same SDE: its
    paths are those that Euler's recursion makes of the same noise, with time and state in their own places."""
    rng = setting.rng(191)
    A = rng.normal(size=(2, 2))
    grid, n = [0.0, 0.25, 0.4, 1.0], 3
    noise = rng.normal(size=(3, n, 2))
    for kind in ("diagonal", "general"):
        for both in (False, True):
            size = 1.01 if defect.startswith("drift") else 1.0
            sde = sc.SDE.from_torchsde(_Theirs(kind, both, size * A, defect), dim=2)
            problem = sc.ControlProblem(sde, sc.Dirac(tensor([0.5, -1.0])), reward=lambda x: x[:, 0])
            paths = sc.simulate(problem, n, time_steps=grid, noise=tensor(noise))
            x = np.tile([0.5, -1.0], (n, 1))
            for k, (t, h) in enumerate(zip(grid, np.diff(grid))):
                xi = noise[(k + int(defect.startswith("noise"))) % 3]
                own = 0.3 + 0.1 * np.cos(x)
                move = own * xi + (0.2 * t * xi.sum(1, keepdims=True) if kind == "general" else 0.0)
                x = x + h * (x @ A.T + t) + math.sqrt(h) * move
                name = "f_and_g" if both else "f and g"
                yield compare(f"state {k + 1}, {kind} noise, {name}", paths.states[k + 1], x)


@check(
    "solutions-in-files",
    "files",
    implements=[
        "sdecontrol.load",
        "sdecontrol.evaluation.solution.Solution.save",
        "sdecontrol.controls.saved.Kinds",
    ],
    controls=["a weight moved by 1e-6", "weights of another temperature"],
)
def saved(setting: Setting, defect: str) -> Lines:
    """A solution that is written and read again is the same function, to the bit: controls that are networks, guidance
    with a value, a module of the user's, particles with a proposal and a twist, tempered particles; with a module that
    is the optimum its ELBO is log Z less the floor, before and after."""
    case = point_case(F=None)
    problem, options = case.problem(), {"time_steps": list(case.grid), "seed": setting.seed, "progress": False}
    U, w = case.chain().control()
    exact = case.chain().exact
    density = sc.gibbs_problem(lambda x: -0.5 * x.square().sum(1), 2, scale=1.0, centre=0.0, dtype=torch.float64)
    module = AffineModule(case, U, w)
    ways: tuple[tuple[str, Any, Any, dict[str, Any], dict[str, Any]], ...] = (
        ("a user's module", problem, "reward-backprop", {"control": module, "iterations": 1, "learning_rate": 1e-12},
         {"control": AffineModule(case)}),
        ("a network", problem, sc.LogVariance(), {"iterations": 2, "batch_size": 64}, {}),
        ("guidance", problem, sc.ValueGuidance(num_paths=256), {"iterations": 1, "batch_size": 64}, {}),
        ("particles", problem, sc.SMC(16, proposal=sc.ValueGuidance(num_paths=256), twist="proposal"),
         {"iterations": 1, "batch_size": 64}, {}),
        ("tempered particles", density, sc.TemperedSMC(num_particles=64), {"time_steps": None}, {}),
    )  # fmt: skip
    for name, given, method, more, own in ways:
        solution = sc.solve(given, method, **{**options, **more})
        with tempfile.TemporaryDirectory() as folder:
            solution.save(folder)
            found = sc.load(folder, given, **own)
        if defect.startswith("a weight") and isinstance(found.control, torch.nn.Module):
            with torch.no_grad():
                for p in found.control.parameters():
                    p.add_(1e-6)
        yield compare(f"samples, {name}", found.sample(64, seed=1), solution.sample(64, seed=1), 0.0)
        weights = [s.weighted_sample(64, seed=2)[1] for s in (found, solution)]
        if defect.startswith("weights"):
            weights[0] = weights[0] / 1.01
        yield compare(f"log weights, {name}", weights[0], weights[1], 0.0)
        if name == "a user's module":
            elbo = found.evaluate(4096, seed=1, confirm=False).elbo
            off = abs(elbo.value - float(exact.log_z) + float(exact.floor)) / elbo.stderr
            yield within("ELBO less log Z and floor, in standard errors", off, 5.0)


@check(
    "functions-in-other-processes",
    "MATH 6: densities; Section 7.3",
    implements=["sdecontrol.BlackBox", "sdecontrol.problems.workers.Workers", "sdecontrol.problems.pool.Pool"],
    controls=["rows exchanged", "another mean"],
)
def elsewhere(setting: Setting, defect: str) -> Lines:
    """A reward or a density whose values are computed in worker processes, or threads, has the values that it has here,
    each at its own row, for more rows than there are workers."""
    mean = np.array([0.5, -1.0])
    told = mean + 0.01 * defect.startswith("another")
    x = setting.rng(192).normal(size=(11, 2))
    logpdf: Any = stats.multivariate_normal.logpdf
    want = logpdf(x, mean, np.diag([1.0, 4.0]))
    if defect.startswith("rows"):
        x = x[np.r_[1:11, 0]]
    function = functools.partial(logpdf, mean=told, cov=np.diag([1.0, 4.0]))
    for pool in ("thread", "process"):
        reward = sc.BlackBox(function, inputs="numpy", per_sample=True, workers=2, pool=pool)
        yield compare(f"reward, {pool}", reward(tensor(x)), want)
        reward.close()
    for name, workers in (("here", None), ("two processes", 2)):
        problem: Any = sc.gibbs_problem(
            function, 2, arrays="numpy", vectorised=False, workers=workers, scale=1.0, centre=0.0, dtype=torch.float64
        )
        yield compare(f"density, {name}", problem.density(tensor(x)), want)


@check(
    "rewards-of-texts",
    "[37], [38]: conditions",
    kind="statistical",
    implements=["sdecontrol.Prompts", "sdecontrol.simulate"],
    controls=["two texts exchanged", "a text twice as often"],
)
def prompts(setting: Setting, defect: str) -> Lines:
    """Conditions that are texts for the reward and numbers for everything else: each path has one text, all as often;
    the reward of a path is that of its own text; the mean of each text is that of its own law, N(a y, s^2) at the end
    of a linear process towards its number y; and samples that are asked for by a text, in the list or not, have that
    law."""
    aims = {"low": -1.0, "high": 2.0, "middle": 0.5, "far": -3.0}
    names = [name for name in aims if name != "far"]
    listed = [*names, "low"] if defect.startswith("a text") else names
    told = dict(zip(names, (names[1], names[0], names[2]))) if defect.startswith("two") else dict(zip(names, names))
    encoder = lambda texts: tensor([[aims[text], 1.0] for text in texts])  # noqa: E731
    sde = sc.SDE(lambda x, t, y: y[:, :1] - x, torch.tensor(0.5, dtype=torch.float64), dim=1)
    reward = lambda x, texts: x[:, 0] * tensor([aims[told[text]] for text in texts])  # noqa: E731
    problem = sc.ControlProblem(
        sde, sc.Dirac(tensor([0.0])), reward, condition=sc.Prompts(listed, encoder, batch_size=2), alpha=0.7
    )
    K, n = 4, 6000
    settings = {"time_steps": K, "scheme": None}
    free = Solution(problem, given_control(problem, None), method="none", settings=settings)
    paths = sc.simulate(problem, n, time_steps=K, seed=setting.seed)
    a = 1 - (1 - 1 / K) ** K  # x_{k+1} = x_k + (y - x_k)/K + noise
    s = math.sqrt(0.25 / K * sum((1 - 1 / K) ** (2 * k) for k in range(K)))
    found = problem.condition.texts_of(paths.condition)
    for name in names:
        y = aims[name]
        rows = torch.tensor([text == name for text in found])
        share = float(rows.double().mean())
        yield within(f"share of {name!r} less 1/3, in standard errors", abs(share - 1 / 3) / math.sqrt(2 / 9 / n), 5.0)
        yield compare(f"reward of {name!r}", paths.reward[rows], y * paths.end[rows][:, 0])
        error = abs(y) * s / math.sqrt(n / 3)
        mean = float(paths.reward[rows].mean())
        yield within(f"mean reward of {name!r}, in standard errors", abs(mean - a * y * y) / error, 5.0)
    for name in aims:
        x = free.sample(n, seed=1, condition=name)
        off = abs(float(x.mean()) - a * aims[told.get(name, name)]) / s * math.sqrt(n)
        yield within(f"mean of samples of {name!r}, in standard errors", off, 5.0)
    details = free.evaluate(2048, seed=2, confirm=False).details
    for name in names:
        y = aims[name]
        off = abs(details[f"prompt/{name}"].value - a * y * aims[told[name]]) / details[f"prompt/{name}"].stderr
        yield within(f"mean reward of {name!r} in an evaluation, in standard errors", off, 5.0)


@check(
    "weights-of-half-precision",
    "[22]: gradient steps",
    implements=["sdecontrol.processes.masters.MasterWeights"],
    controls=["steps of the rounded weights", "rate off by 5 %"],
)
def half(setting: Setting, defect: str) -> Lines:
    """A model of bfloat16 that is tuned is called with its weights rounded, and moves by every step: a hundred steps of
    size 1e-5 with the slope 1 take each weight by 1e-3, which is less than half of what bfloat16 tells apart there; its
    copy in its own precision is the rounded result."""
    start = tensor(setting.rng(193).uniform(0.6, 0.9, size=(1, 4))).to(torch.bfloat16)
    model = torch.nn.Linear(4, 1, bias=False).to(torch.bfloat16)
    model.weight.data = start.clone()
    masters = MasterWeights(model)
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    yield compare("the call", masters(x).float(), model(x).float(), 0.0)
    (weight,) = masters.parameters()
    rate = 1e-5 * (1.05 if defect.startswith("rate") else 1.0)
    for _ in range(100):
        masters.zero_grad()
        masters(x).sum().backward()
        with torch.no_grad():
            weight.sub_(rate * weight.grad)  # type: ignore[operator]
            if defect.startswith("steps"):
                weight.copy_(weight.to(torch.bfloat16).float())
    want = start.double() - 1e-3
    yield compare("weights after a hundred steps", weight, want, 2e-6)
    yield compare("the copy in its own precision", masters.whole().weight.float(), want.to(torch.bfloat16).float(), 0.0)


class _LowRank(torch.nn.Module):
    """A layer with low-rank adapters, as PEFT makes them: ``W x + B A x``, or W x where they are left out."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, W: np.ndarray, A: np.ndarray, B: np.ndarray) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(tensor(W), requires_grad=False)
        self.lora_A, self.lora_B = (torch.nn.Linear(*v.T.shape, bias=False, dtype=torch.float64) for v in (A, B))
        self.lora_A.weight.data, self.lora_B.weight.data = tensor(A), tensor(B)
        self._disable_adapters, self.merged_adapters = False, []

    def forward(self, x: torch.Tensor, s: Any = None) -> torch.Tensor:
        plain = x @ self.weight.T
        return plain if self._disable_adapters else plain + self.lora_B(self.lora_A(x))


@check(
    "models-with-adapters",
    "[22]; Hu et al. 2106.09685: low-rank adapters",
    implements=["sdecontrol.processes.adapters.WithoutAdapters", "sdecontrol.processes.adapters.Adapters"],
    controls=["adapters left in", "step of the whole model", "rate off by 5 %"],
)
def adapters(setting: Setting, defect: str) -> Lines:
    """A model with low-rank adapters is, as a reference, W x; what is tuned is (W + B A) x, of which a gradient step
    moves A and B by the derivatives by hand and leaves W; the result in its user's own form is (W + B' A') x, and the
    given model is as it was."""
    rng = setting.rng(194)
    W, A, B = rng.normal(size=(2, 3)), rng.normal(size=(1, 3)), rng.normal(size=(2, 1))
    x, v, rate = rng.normal(size=(5, 3)), rng.normal(size=(5, 2)), 0.1 * (1.05 if defect.startswith("rate") else 1.0)
    given = torch.nn.Sequential(_LowRank(W, A, B))
    reference = as_reference(given)
    own = tunable_copy(reference)
    yield compare("the reference", (given if defect.startswith("adapters") else reference)(tensor(x)), x @ W.T)
    yield compare("the tuned model before", own(tensor(x)), x @ (W + B @ A).T)
    parameters = list(own.parameters())
    yield compare("numbers that are trained", float(sum(p.numel() for p in parameters)), 5.0, 0.0)
    (own(tensor(x)) * tensor(v)).sum().backward()
    with torch.no_grad():
        for p in parameters:
            p.sub_(rate * p.grad)  # type: ignore[operator]
    A2, B2 = A - 0.1 * B.T @ v.T @ x, B - 0.1 * v.T @ x @ A.T
    W2 = W - 0.1 * v.T @ x if defect.startswith("step") else W
    want = x @ (W2 + B2 @ A2).T
    for name, model in (("the tuned model", own), ("a copy of it", copy.deepcopy(own)), ("its own form", own.whole())):  # type: ignore[operator]
        yield compare(name, model(tensor(x)), want)
    yield compare("the reference afterwards", reference(tensor(x)), x @ W.T)
    yield compare("the given model afterwards", given(tensor(x)), x @ (W + B @ A).T)


class _Score(torch.nn.Module):
    """``tanh(V x)`` and a linear read-out of it; several of them: logits."""

    def __init__(self, V: np.ndarray, read: np.ndarray) -> None:
        super().__init__()
        self.first, self.last = (torch.nn.Linear(*v.T.shape, bias=False, dtype=torch.float64) for v in (V, read))
        self.first.weight.data, self.last.weight.data = tensor(V), tensor(read)

    def forward(self, x: torch.Tensor, s: Any = None) -> torch.Tensor:
        out = self.last(torch.tanh(self.first(x)))
        return out[:, 0] if out.shape[1] == 1 else out


@check(
    "what-rewards-see",
    "MATH 10: a value is a function of what the reward sees",
    implements=["sdecontrol.problems.reward_view.RewardView", "sdecontrol.problems.reward_view.InnerLayer"],
    controls=["features before the layer", "alpha off by 5 %"],
)
def views(setting: Setting, defect: str) -> Lines:
    """What a reward's module computes before its last layer is tanh(V x), of which r is the linear read-out; of a
    classifier it is the logits; a linear reward has nothing more to see; and what a model computes before its own last
    layer is as well at hand."""
    rng = setting.rng(195)
    V, read, x = rng.normal(size=(4, 2)), rng.normal(size=(1, 4)), rng.normal(size=(6, 2))
    classes = rng.normal(size=(3, 4))
    alpha = 0.7 * (1.05 if defect.startswith("alpha") else 1.0)
    model = _Score(V, rng.normal(size=(2, 4)))
    sde = sc.generative_sde(model, schedule=sc.VP(), prediction="noise", shape=(2,))
    inner = np.tanh(x @ V.T)
    logits = inner @ classes.T
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ways: tuple[tuple[str, Any, Any, np.ndarray], ...] = (
        ("a module", _Score(V, read), x @ V.T if defect.startswith("features") else inner, inner @ read[0]),
        ("a classifier", sc.LogProb(_Score(V, classes), 1), logits, log_p[:, 1]),
        ("a function", lambda y: torch.sin(y[:, 0]), np.zeros((6, 0)), np.sin(x[:, 0])),
    )
    for name, reward, features, value in ways:
        problem = sc.ControlProblem(sde, reward=reward, alpha=alpha)
        found, r = RewardView(problem)(tensor(x), None)
        if features.size:
            yield compare(f"features, {name}", found.detach(), features)
        yield compare(f"how many they are, {name}", float(found.shape[1]), float(features.shape[1]), 0.0)
        yield compare(f"r/alpha, {name}", r.detach(), value / 0.7)
    simple = RewardView(sc.ControlProblem(sde, reward=sc.Linear(tensor([1.0, 2.0])), alpha=alpha))
    yield within("a linear reward has more to see", float(not simple.simple or simple.size), 0.0)
    layer = InnerLayer.of(problem)
    assert layer is not None
    out, seen = layer.watching(model, lambda: model(tensor(x)))
    yield compare("what a model's last layer is given", seen.detach(), x @ V.T if defect.startswith("fe") else inner)
    yield compare("what the model gives", out.detach(), inner @ model.last.weight.detach().numpy().T)


def _normal_density(defect: str) -> Any:
    """mu ~ N(0, 2^2), log tau ~ N(0.1, 0.5^2), three data of N(mu, 1), and 0.8 on top; their exact law and log Z."""
    data = np.array([1.0, 2.0, 0.5])
    prior = {
        "mu": torch.distributions.Normal(tensor(0.0), tensor(2.0)),
        "tau": torch.distributions.LogNormal(tensor(0.1), tensor(0.5)),
    }
    moved = 0.3 if defect.startswith("data") else 0.0
    extra = 0.8 + (0.2 if defect.startswith("constant") else 0.0)
    log_likelihood = lambda v: (  # noqa: E731
        -0.5 * (v["mu"][:, None] - tensor(data) - moved).square().sum(1) - 1.5 * math.log(2 * math.pi) + extra
    )
    problem = sc.gibbs_problem(log_likelihood=log_likelihood, prior=prior, scale=1.0, centre=0.0, seed=0)
    precision = 0.25 + 3
    mean, sd = data.sum() / precision, precision**-0.5
    cov = np.eye(3) + 4.0
    logpdf: Any = stats.multivariate_normal.logpdf
    return problem, (mean, sd), 0.8 + float(logpdf(data, np.zeros(3), cov))


@check(
    "posteriors-as-others-read-them",
    "MATH 6: densities",
    kind="statistical",
    implements=[
        "sdecontrol.evaluation.solution.Solution.plot_corner",
        "sdecontrol.evaluation.posterior.posterior_of",
        "sdecontrol.TemperedSMC",
    ],
    controls=["data moved", "constant off by 0.2", "parameters exchanged"],
)
def posteriors(setting: Setting, defect: str) -> Lines:
    """Draws of a density in its user's parameters have the law of these, exp of a coordinate too: quantiles of a
    conjugate posterior and of a log-normal prior, in the titles of a corner plot; in a frame, and as an ArviZ object
    with weights whose mean is Z, where these libraries are installed."""
    problem, (mean, sd), log_z = _normal_density(defect)
    solution: Any = sc.solve(problem, sc.TemperedSMC(num_particles=1024), seed=setting.seed, progress=False)
    levels = stats.norm.ppf([0.16, 0.5, 0.84])
    truth = {"mu": mean + sd * levels, "tau": np.exp(0.1 + 0.5 * levels)}
    names = ["tau", "mu"]
    _, axes = solution.plot_corner(8192, seed=1, names=names, truth=[float(truth[n][1]) for n in names])
    for i, name in enumerate(names):
        want = truth[names[1 - i] if defect.startswith("parameters") else name]
        lines = [line.get_xdata()[0] for line in axes[i, i].get_lines()]
        width = want[2] - want[0]
        yield within(f"quantiles of {name}, in widths", float(np.abs((np.array(lines[:3]) - want) / width).max()), 0.05)
        middle, above, below = (float(v) for v in re.findall(r"[=+-] ?([\d.]+)", axes[i, i].get_title()))
        told = np.array([middle - below, middle, middle + above])
        yield within(f"title of {name}, in widths", float(np.abs((told - want) / width).max()), 0.06)
        yield compare(f"the truth's mark, {name}", lines[3], want[1])
    log_w = solution.weighted_sample(8192, seed=2)[1].double()
    yield within("log of the mean weight", abs(float(log_w.logsumexp(0)) - math.log(8192) - log_z), 0.08)
    if importlib.util.find_spec("pandas"):
        frame = solution.to_dataframe(8192, seed=3)
        yield within("mean of log tau in a frame", abs(float(np.log(frame["tau"]).mean()) - 0.1), 0.03)
        yield within("mean of mu in a frame", abs(float(frame["mu"].mean()) - mean) / sd, 0.06)
    if importlib.util.find_spec("arviz_base"):
        evaluation = solution.evaluate(4096, seed=1, confirm=False)
        tree = solution.to_arviz(8192, seed=2, evaluation=evaluation)
        w = np.exp(tree["weighted_sample_stats"]["log_weight"].values[0])
        yield within("log of ArviZ's mean weight", abs(math.log(w.mean()) - log_z), 0.08)
        weighted = float(np.average(tree["weighted_posterior"]["mu"].values[0], weights=w))
        yield within("ArviZ's weighted mean of mu", abs(weighted - mean) / sd, 0.08)
        yield within("ArviZ's log Z", abs(tree.attrs["log_z"] - log_z), 0.08)


def _curve(axes: Any, label: str) -> np.ndarray:
    return next(np.asarray(line.get_ydata()) for line in axes.get_lines() if line.get_label().startswith(label))


@check(
    "figures",
    "figures",
    kind="statistical",
    implements=[
        "sdecontrol.evaluation.solution.Solution.plot",
        "sdecontrol.evaluation.sample_figure.sample_figure",
        "sdecontrol.evaluation.sample_figure.telling_coordinates",
    ],
    controls=["noise off by 10 %", "alpha off by 5 %", "control off by 5 %"],
)
def figures(setting: Setting, defect: str) -> Lines:
    """What figures draw are the numbers: of a linear-quadratic optimum the median path, the median control, alpha KL
    and the running cost spent until each time, the mean reward and the mean value along paths; of a sampler, histograms
    of its marginals beside exact ones, log Z, and of many coordinates the two that depend on each other."""
    case = point_case(F=np.array([[0.3, 0.0], [0.0, 0.1]]))
    given = case
    if defect.startswith("noise"):
        given = point_case(F=case.F, sigma=1.1 * case.sigma)
    if defect.startswith("alpha"):
        given = point_case(F=case.F, alpha=1.05 * case.alpha)
    size = 1.05 if defect.startswith("control") else 1.0
    U, w = case.chain().control()
    options: dict[str, Any] = {"time_steps": list(case.grid), "seed": 0, "progress": False}
    solution: Any = sc.solve(
        given.problem(), "reward-backprop", control=AffineModule(given, size * U, size * w), iterations=1,
        learning_rate=1e-14, **options,
    )  # fmt: skip
    n = 4096
    _, axes = solution.plot(n, seed=setting.seed)
    law = case.reference(0, case.mean, (U, w))
    means, covs = [law.of(k).mean for k in range(case.K + 1)], [law.of(k).cov for k in range(case.K + 1)]
    error = lambda cov: math.sqrt(math.pi / 2 * cov / n)  # noqa: E731  of a median
    for i, panel in enumerate(axes[:2]):
        drawn = _curve(panel, "controlled")
        z = [abs(drawn[k] - means[k][i]) / error(covs[k][i, i]) for k in range(1, case.K + 1)]
        yield within(f"median of coordinate {i + 1}, in standard errors", max(z), 5.0)
    for i in range(2):
        drawn = _curve(axes[2], f"u{i + 1}")
        for k in range(case.K):
            middle, spread = (U[k] @ means[k] + w[k])[i], (U[k] @ covs[k] @ U[k].T)[i, i]
            yield within(f"median of u{i + 1} at step {k}", abs(drawn[k] - middle), 5 * error(spread) + 1e-6)
    yield from _spent(case, axes[3], (U, w), means, covs, n)
    first = float(_values(axes[4])[0])
    yield within("value at the start", abs(first - float(case.value(0, case.mean[None])[0])), 0.05)
    yield from _of_samples(defect)


def _values(axes: Any) -> np.ndarray:
    """The mean value along paths: the line with dots."""
    return next(np.asarray(line.get_ydata()) for line in axes.get_lines() if line.get_marker() == ".")


def _second(P: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> float:
    return float(mean @ P @ mean + np.trace(P @ cov))


def _spent(case: LinearCase, axes: Any, control: Any, means: Any, covs: Any, n: int) -> Lines:
    """alpha KL and the running cost until each time, and the reward."""
    kl, cost = [0.0], [0.0]
    for k, h in enumerate(case.h):
        U, w = control[0][k], control[1][k]
        u = U @ means[k] + w
        kl.append(kl[-1] + 0.5 * case.alpha * h * (u @ u + float(np.trace(U @ covs[k] @ U.T))))
        cost.append(cost[-1] + 0.5 * h * _second(case.F_at(case.grid[k]), means[k], covs[k]))
    yield within("alpha KL until t, relative", float(np.abs(_curve(axes, "alpha KL") - kl).max()) / kl[-1], 0.02)
    yield within("cost until t, relative", float(np.abs(_curve(axes, "running") - cost).max()) / cost[-1], 0.03)
    reward = case.g @ means[-1] - 0.5 * _second(case.G, means[-1], covs[-1])
    yield within("mean reward", abs(float(_curve(axes, "reward")[0]) - reward), 6 * 1.5 / math.sqrt(n))


def _of_samples(defect: str) -> Lines:
    """A Gaussian in four coordinates, two of which depend on each other."""
    width = 1.1 if defect.startswith("noise") else 1.0
    cov = np.eye(4)
    cov[1, 3] = cov[3, 1] = 0.9
    log_density = lambda x: -0.5 * (x * (x @ tensor(np.linalg.inv(cov)))).sum(1) / width**2  # noqa: E731
    problem = sc.gibbs_problem(log_density, 4, scale=1.0, centre=0.0, dtype=torch.float64, seed=0)
    solution: Any = sc.solve(problem, sc.TemperedSMC(num_particles=2048), seed=0, progress=False)
    rng, log_z = np.random.default_rng(0), 2 * math.log(2 * math.pi) + 0.5 * math.log(np.linalg.det(cov))
    exact = tensor(rng.multivariate_normal(np.zeros(4), cov, size=20_000))
    (i, j), _ = telling_coordinates(exact)
    yield compare("the coordinates that depend", np.array([i, j], dtype=float), [1.0, 3.0])
    evaluation = solution.evaluate(4096, seed=1, confirm=False)
    x = solution.sample(20_000, seed=2)
    _, (plane, margins, bounds) = sample_figure(solution, x, exact=exact, log_z=log_z, evaluation=evaluation)
    yield compare("the plane's coordinates", float(plane.get_xlabel() == "x2" and plane.get_ylabel() == "x4"), 1.0)
    for panel in margins:
        for what, patch in zip(("samples", "exact samples"), panel.patches):
            heights, edges, _ = patch.get_data()
            want = np.diff(stats.norm.cdf(edges)) / np.diff(edges)
            yield within(f"histogram of {what}, {panel.get_ylabel()}", float(np.abs(heights - want).max()), 0.06)
    line = next(ln for ln in bounds.get_lines() if str(ln.get_label()).startswith("exact"))
    yield within("log Z's line from the estimate", abs(line.get_ydata()[0] - evaluation.log_z.value), 0.1)
