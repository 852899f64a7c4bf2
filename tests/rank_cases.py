"""Small runs that several processes must do as one does: each a name and what it gives, as numbers."""

from collections.abc import Callable
from typing import Any

import torch

import sdecontrol as sc
from sdecontrol import ranks

Numbers = dict[str, Any]
CASES: dict[str, Callable[[], Numbers]] = {}
STEPS, BATCH = 8, 128
#: what the default tests run; the rest is for the slow ones
FIRST = [
    "adjoint matching, linear-quadratic",
    "reward backprop",
    "soft ppo, minibatches",
    "log variance, groups",
    "log variance, ladder",
    "cross-entropy, replay",
    "path consistency, values",
    "evaluation",
    "particles",
    "seeds_of_their_own",
]
#: for three processes
OF_THREE = ["evaluation", "particles", "batches of three"]


def case(function: Callable[[], Numbers]) -> Callable[[], Numbers]:
    CASES[function.__name__] = function
    return function


def quadratic(start: Any = None, condition: Any = None) -> sc.ControlProblem:
    eye = torch.eye(2, dtype=torch.float64)
    sde = sc.LinearSDE(A=-0.5 * eye, sigma=eye, horizon=1.0)
    return sc.ControlProblem(
        sde,
        initial=sc.Dirac(torch.zeros(2, dtype=torch.float64)) if start is None else start,
        reward=sc.Quadratic(G=eye, g=torch.ones(2, dtype=torch.float64)),
        running_cost=sc.QuadraticCost(F=0.1 * eye),
        alpha=0.5,
    )


def two_modes(start: Any = None) -> sc.ControlProblem:
    sde = sc.SDE(lambda x, t: -x, 1.0, dim=2, horizon=1.0)
    start = sc.Dirac(torch.zeros(2, dtype=torch.float64)) if start is None else start

    def reward(x: torch.Tensor) -> torch.Tensor:
        return (2 * x).cos().sum(1) - 0.5 * x.square().sum(1) + 0.3 * x[:, 0]

    return sc.ControlProblem(sde, initial=start, reward=reward, alpha=0.3)


def generative() -> sc.ControlProblem:
    eye = torch.eye(2, dtype=torch.float64)
    law = sc.GaussianMixture(
        torch.tensor([0.4, 0.6]).double(), torch.stack((-eye[0], eye[1])), 0.3 * eye.expand(2, 2, 2)
    )
    return sc.ControlProblem(sc.generative_sde(law, schedule=sc.VP()), reward=sc.Linear(torch.ones(2).double()))


def network() -> sc.ControlProblem:
    """A pre-trained model that is no exact one, with trainable parameters and weights of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)).double()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.layers(torch.cat((x, t.reshape(-1, 1).expand(len(x), 1)), 1))

    sde = sc.generative_sde(Model(), schedule=sc.VP(), prediction="noise", shape=(2,))
    return sc.ControlProblem(sde, reward=sc.Linear(0.2 * torch.ones(2).double()), alpha=0.5)


def spread_start() -> Any:
    return sc.Gaussian(torch.zeros(2, dtype=torch.float64), 0.5 * torch.eye(2, dtype=torch.float64))


def numbers(solution: Any) -> Numbers:
    """The metrics of all iterations, and what the control has become."""
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
    history = {k: [m.get(k) for m in solution.history] for k in sorted({k for m in solution.history for k in m})}
    return {**history, "control": solution.control(x, 0.4).flatten().tolist()}


def solved(problem: sc.ControlProblem, method: Any, iterations: int | None = 4, **options: Any) -> Any:
    options = {"time_steps": STEPS, "batch_size": BATCH, "seed": 1, **options}
    return sc.solve(problem, method, iterations=iterations, **options)


def trained(name: str, method: Any, problem: Callable[[], sc.ControlProblem] = two_modes, **options: Any) -> None:
    CASES[name] = lambda: numbers(solved(problem(), method(), **options))


trained("adjoint matching", sc.AdjointMatching)
trained("adjoint matching, linear-quadratic", sc.AdjointMatching, quadratic, iterations=12)
trained("adjoint matching, two parts", lambda: sc.AdjointMatching(steps=3), accumulate=2)
trained("socm", sc.SOCM)
trained("reward backprop", sc.RewardBackprop)
trained("reward backprop, adjoint", lambda: sc.RewardBackprop(gradient="adjoint"))
trained("soft ppo", sc.SoftPPO)
trained("soft ppo, minibatches", lambda: sc.SoftPPO(minibatches=3, epochs=2, baseline="per-time"))
trained("soft ppo, groups", lambda: sc.SoftPPO(group_size=8, baseline="batch"), lambda: two_modes(spread_start()))
trained("log variance", sc.LogVariance)
trained("log variance, groups", sc.LogVariance, lambda: two_modes(spread_start()))
trained("log variance, ladder", lambda: sc.LogVariance(replay=2, trust_region=0.5), iterations=6)
trained("cross-entropy", lambda: sc.CrossEntropy(trust_region=0.5))
trained("cross-entropy, replay", lambda: sc.CrossEntropy(replay=3))
trained("reward-weighted mle", sc.RewardWeightedMLE)
trained("reinforce", sc.Reinforce)
trained("path consistency", sc.PathConsistency)
trained("path consistency, values", lambda: sc.PathConsistency(n=1), lambda: two_modes(spread_start()))
trained("smc of a trained proposal", lambda: sc.SMC(proposal=sc.RewardBackprop()))
trained("batches of three", lambda: sc.CrossEntropy(replay=2), batch_size=192)
trained("bridge matching", sc.BridgeMatching, lambda: generative())
trained("bridge matching, scored", lambda: sc.BridgeMatching(target="reinforce", normalise=True), lambda: network())
trained("bridge matching, anchored", sc.BridgeMatching, lambda: network(), iterations=22)
trained("value guidance, not split", sc.ValueGuidance, iterations=2)


@case
def looks_at_many_states() -> Numbers:
    """More steps of the optimiser than are looked at one by one, with a bound that shortens them."""
    return numbers(solved(two_modes(), sc.LogVariance(), 60, max_kl_step=1e-3, learning_rate=1e-2))


@case
def plateau_stop() -> Numbers:
    """When to stop is decided by what all have seen."""
    found = solved(quadratic(), sc.AdjointMatching(), None)
    return {"iterations": found.iterations, "control": numbers(found)["control"]}


@case
def evaluation() -> Numbers:
    """Of paths whose last block is not full, and of replicated starts."""
    found = {}
    for name, problem in (("fixed", two_modes()), ("spread", two_modes(spread_start()))):
        solution = solved(problem, sc.RewardBackprop(), 2, batch_size=384)  # into three, too
        ev = solution.evaluate(n=200, seed=3).as_dict()
        samples, weights = solution.weighted_sample(150, seed=4)
        found[name] = [flat(ev), samples.tolist(), weights.tolist(), solution.sample(130, seed=5).tolist()]
        found[f"{name}, in chunks"] = solution.sample(400, seed=5, batch_size=64).tolist()
        found[f"{name}, few"] = solution.sample(3, seed=5).tolist()
        paths = sc.simulate(problem, 192, solution.control, seed=6)
        found[f"{name}, whole paths"] = paths.states.mean((1, 2)).tolist()
    return found


@case
def particles() -> Numbers:
    found = {}
    rejection = sc.BestOfN(n=8, selection="rejection", bound=2.5)
    methods = (("best of n", sc.BestOfN(n=8)), ("smc", sc.SMC(num_particles=64)), ("rejection", rejection))
    for name, method in methods:
        solution = sc.solve(two_modes(), method, time_steps=STEPS, seed=1)
        found[name] = [flat(solution.evaluate(n=256, seed=2).as_dict()), solution.sample(70, seed=3).tolist()]
        if name == "smc":
            found["chunks"] = solution.sample(70, seed=3, batch_size=64).tolist()
    return found


@case
def tempered() -> Numbers:
    def log_density(x: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(torch.stack((-2 * (x - 1.5).square().sum(1), -2 * (x + 1.5).square().sum(1))), 0)

    target = sc.gibbs_problem(log_density, dim=2, dtype=torch.float64)
    found = {}
    for name, problem in (("states", target), ("noises", two_modes())):
        solution = sc.solve(problem, sc.TemperedSMC(num_particles=256), time_steps=STEPS, seed=1)
        found[name] = [flat(solution.evaluate(n=512, seed=2).as_dict()), solution.sample(50, seed=3).tolist()]
    return found


@case
def seeds_of_their_own() -> Numbers:
    """Without a seed, and with weights of the user's that each process has drawn for itself."""
    torch.manual_seed(7 if ranks.rank() == 0 else 8)
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.network(torch.cat((x, t.unsqueeze(1).expand(-1, 1)), 1))

    solution = solved(two_modes(), sc.LogVariance(), control=Own(), seed=None)
    return {**numbers(solution), "seed": solution.seed, "samples": solution.sample(128).tolist()}


def flat(found: Any) -> Any:
    """Without what is no number."""
    if isinstance(found, dict):
        return {k: flat(v) for k, v in found.items() if not isinstance(v, str)}
    return found
