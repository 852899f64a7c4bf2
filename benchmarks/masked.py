"""Masked diffusion: how near every method comes to the exact tilt, on models that have the conditionals of a known law.

Letters are those of a Markov chain, whose conditionals given any of them are known by forward and backward messages.
Rewards are sums over words of three letters, scaled such that the tilt of the letters' law is two nats. Two orders: one
position a step, in random order, where the floor of tilts of tokens is 0; and each by itself, in 8 steps a position,
where the floor is that of products, found by ``exact_solution`` for the small size. log Z of the chain's tilt and the
gap of a control are exact, by a recursion over all ``(V+1)^L`` states. Each finished cell is a JSON file under
``benchmarks/results/masked/``; a cell that exists is not run again.
"""

from __future__ import annotations

import itertools
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import sdecontrol as sc
from sdecontrol.chains.shifts import shift_function
from sdecontrol.chains.transitions import product_transition

from .cells import store, versions
from .masked_page import write_page

__all__ = ["masked"]

RESULTS = Path(__file__).parent / "results" / "masked"
SIZES = {"4x3": (4, 3), "8x4": (8, 4)}
ORDERS = ("random", "independent")
_STEPS = 8  # a position, where each is unmasked by itself
_TILT = 2.0  # nats
METHODS: dict[str, sc.Method] = {
    "log-variance": sc.LogVariance(),
    "soft-ppo": sc.SoftPPO(),
    "path-consistency, all": sc.PathConsistency(),
    "path-consistency, n=1": sc.PathConsistency(1),
    "reward-weighted-mle": sc.RewardWeightedMLE(),
    "cross-entropy, trust region 1": sc.CrossEntropy(trust_region=1.0),
    "reinforce": sc.Reinforce(),
    "bridge-matching": sc.BridgeMatching(),
    "particle-matching": sc.ParticleMatching(),
    "value guidance, Monte Carlo": sc.ValueGuidance("monte-carlo"),
    "value guidance, soft Q": sc.ValueGuidance("soft-q"),
    "value guidance, density ratio": sc.ValueGuidance("ratio"),
}


class Letters:
    """A Markov chain of L letters out of V, a reward, and the model of its conditionals as a table over all masked
    states."""

    def __init__(self, length: int, vocabulary: int) -> None:
        L, V = self.length, self.vocabulary = length, vocabulary
        generator = torch.Generator().manual_seed(11)
        randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        first, move = randn(V).softmax(0), (1.5 * randn(V, V)).softmax(1)
        self.states = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))
        self.powers = (V + 1) ** torch.arange(L - 1, -1, -1)
        allowed = torch.cat((torch.eye(V), torch.ones(1, V))).double()  # letters that a token allows
        seen = allowed[self.states]
        ahead, behind = [first.expand(len(seen), V)], [torch.ones(len(seen), V, dtype=torch.float64)]
        for j in range(L - 1):
            ahead.append((ahead[-1] * seen[:, j]) @ move)
            behind.insert(0, (behind[0] * seen[:, L - 1 - j]) @ move.mT)
        each = torch.stack([a * b * seen[:, j] for j, (a, b) in enumerate(zip(ahead, behind))], 1)
        self.mass = each[:, 0].sum(-1)  # probability of the letters that are there
        self.logits = (each / self.mass[:, None, None]).clamp(min=1e-30).log().float()
        words = randn(V, V, V)
        whole = (self.states < V).all(1)
        points = self.states[whole]
        r = sum(words[points[:, j], points[:, j + 1], points[:, j + 2]] for j in range(L - 2))
        law = self.mass[whole] / self.mass[whole].sum()
        low, high = 0.0, 20.0
        for _ in range(60):  # the tilt's KL grows with the scale
            scale = 0.5 * (low + high)
            log_q = (law.log() + scale * r).log_softmax(0)
            low, high = (scale, high) if float(log_q.exp() @ (log_q - law.log())) < _TILT else (low, scale)
        self.reward_of = torch.zeros(len(seen), dtype=torch.float64)
        self.reward_of[whole] = scale * (r - law @ r)

    def at(self, x: Tensor) -> Tensor:
        return (x * self.powers).sum(-1)

    def problem(self, order: str) -> sc.ControlProblem:
        r, model = self.reward_of.float(), lambda x, s: self.logits[self.at(x)]
        steps = None if order == "random" else _STEPS * self.length
        chain = sc.masked_diffusion(model, self.length, self.vocabulary, steps, order=order)
        return sc.ControlProblem(chain, reward=lambda x: r[self.at(x)], alpha=1.0)

    def total_variations(self, problem: sc.ControlProblem, samples: Tensor) -> dict[str, float]:
        """Of samples from the exact tilt, and of as many draws of it, the mean of twenty."""
        chain: Any = problem.chain()
        if chain.independent:
            probs = sc.exact_solution(problem).marginal(1.0).probs.double()
        else:
            whole = (self.states < self.vocabulary).all(1)
            probs = torch.where(whole, self.mass.log() + self.reward_of, -torch.inf).softmax(0)
        generator, n = torch.Generator().manual_seed(1), len(samples)

        def away(index: Tensor) -> float:
            return 0.5 * float((torch.bincount(index, minlength=len(probs)) / n - probs).abs().sum())

        draws = [away(torch.multinomial(probs, n, replacement=True, generator=generator)) for _ in range(20)]
        return {"tv": away(self.at(samples)), "tv_exact": sum(draws) / 20}

    # ------------------------------------------------------------ exactly, over all states

    def averaged(self, f: Tensor, letters: Tensor) -> Tensor:
        """``E[f(x_{k+1}) | x_k]`` of a function ``(states,)`` under probabilities of letters ``(states, L, V)``, one
        masked position unmasked, each as likely."""
        V, masked = self.vocabulary, self.states == self.vocabulary
        index, left = torch.arange(len(self.states)), masked.sum(1).clamp(min=1)
        total = torch.where(masked.any(1), 0.0, f)
        for j in range(self.length):
            for v in range(V):
                there = (index - (V - v) * self.powers[j]).clamp(min=0)  # the mask is the largest token
                total = total + torch.where(masked[:, j], letters[:, j, v] * f[there] / left, 0.0)
        return total

    def log_z(self) -> float:
        """Of the chain in random order, whose end has the law of the letters."""
        whole = (self.states < self.vocabulary).all(1)
        law = self.mass[whole] / self.mass[whole].sum()
        return float((law.log() + self.reward_of[whole]).logsumexp(0))

    @torch.no_grad()
    def gap(self, problem: sc.ControlProblem, control: Any) -> float:
        """``KL(P^u || Q_fine)`` of a control, by its cost to go from every state."""
        chain: Any = problem.chain()
        V = self.vocabulary
        if chain.independent:
            return self._gap_of_products(problem, control)
        masked = self.states == V
        cost = -self.reward_of.clone()
        plain = self.logits.double().log_softmax(-1)
        for k in reversed(range(chain.steps)):
            rows = (masked.sum(1) == self.length - k).nonzero().flatten()
            u = torch.zeros(len(self.states), self.length, V, dtype=torch.float64)
            for part in rows.split(1 << 14):
                u[part] = control(self.states[part], float(chain.clock[k])).double()
            tuned = (plain + u).log_softmax(-1)
            kl = ((tuned.exp() * (tuned - plain)).sum(-1) * masked).sum(1) / masked.sum(1).clamp(min=1)
            here = self.averaged(cost, tuned.exp()) + kl
            cost[rows] = here[rows]
        return self.log_z() + float(cost[-1])  # the last state is all masks

    def _gap_of_products(self, problem: sc.ControlProblem, control: Any) -> float:
        """The same where positions are unmasked by themselves, by the matrices between all states."""
        chain: Any = problem.chain()
        states = self.states
        shift, cost = shift_function(chain, control), -self.reward_of.numpy().copy()
        for k in reversed(range(chain.steps)):
            c = shift(k, states, None)
            kl = chain.kl(c.unsqueeze(0), states.unsqueeze(0), [k])[0].double().numpy()
            tuned = (chain.log_probs(k, states) + c).double()
            cost = kl + product_transition(chain.space, lambda x, tuned=tuned: tuned[self.at(x)]) @ cost
        return float(sc.exact_solution(problem).log_z) + float(cost[-1])


class _Clock:
    """CPU-seconds at the end of every iteration."""

    def __init__(self) -> None:
        self.at = [time.process_time()]

    def on_step_end(self, state: Any) -> None:
        self.at.append(time.process_time())


def _affordable(problem: sc.ControlProblem, method: sc.Method, seconds: float, options: dict[str, Any]) -> int:
    """Iterations: the first fifty look for a learning rate, and are dearer."""
    clock, first, some = _Clock(), 55, 80
    sc.solve(problem, method, iterations=some, callbacks=[clock], **options)
    each = sorted(b - a for a, b in pairwise(clock.at[first:]))[(some - first) // 2]
    return max(24, first + int((seconds - clock.at[first] + clock.at[0]) / each))


def _solve(letters: Letters, order: str, method: sc.Method, seconds: float, seed: int, batch: int) -> dict[str, Any]:
    problem = letters.problem(order)
    options: dict[str, Any] = {"batch_size": batch, "seed": seed, "progress": False}

    # of the ratio each iteration is a whole regression
    count = method.default_iterations if method.steady else _affordable(problem, method, seconds, options)
    began = time.process_time()
    solution = sc.solve(problem, method, iterations=count, **options)
    spent = time.process_time() - began
    floor = 0.0 if order == "random" else float(sc.exact_solution(problem).floor)
    return {
        "iterations": count,
        "cpu_seconds": round(spent, 1),
        "gap": letters.gap(problem, solution.control),
        **letters.total_variations(problem, solution.sample(4096, seed=1)),
        "floor": floor,
        "untuned": letters.gap(problem, lambda x, t: torch.zeros(*x.shape, letters.vocabulary)),
    }


def masked(
    size: Annotated[str, typer.Option(help="4x3 or 8x4: letters and their number")] = "4x3",
    order: Annotated[str, typer.Option(help="random or independent (4x3 alone)")] = "random",
    method: Annotated[str, typer.Option(help="one of the table's methods; empty: all")] = "",
    seconds: Annotated[float, typer.Option(help="CPU-seconds of training")] = 60.0,
    seed: Annotated[int, typer.Option(help="of the training")] = 0,
    batch: Annotated[int, typer.Option(help="paths of a gradient")] = 256,
    page: Annotated[bool, typer.Option("--page", help="Only write docs/tables/masked.md from what is there.")] = False,
) -> None:
    """Gaps of the methods on masked diffusion, exactly, above the floor of tilts of tokens.

    Example: python -m benchmarks masked --page
    """
    if page:
        typer.echo(write_page([json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]))
        return
    if order not in ORDERS or size not in SIZES or (order == "independent" and size != "4x3"):
        raise typer.BadParameter(f"sizes {', '.join(SIZES)}; orders {', '.join(ORDERS)}, the second with 4x3 alone")
    torch.set_num_threads(1)
    letters = Letters(*SIZES[size])
    for name in [method] if method else METHODS:
        short = name.replace(", ", "-").replace(" ", "-").replace("=", "")
        larger = "" if batch == 256 else f"-b{batch}"
        path = RESULTS / f"{size}-{order}-{short}-{seconds:g}s-{seed}{larger}.json"
        if not path.exists():
            cell = _solve(letters, order, METHODS[name], seconds, seed, batch)
            described = {"size": size, "order": order, "method": name, "seconds": seconds, "seed": seed}
            described["batch_size"] = batch
            store(path, {**described, **cell, **versions()})
        cell = json.loads(path.read_text())
        spent = f"in {cell['cpu_seconds']:.0f} CPU-s"
        typer.echo(f"{size} {name:32s} gap {cell['gap']:8.4f} of {cell['untuned']:.3f} {spent}")
