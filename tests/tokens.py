"""Masked diffusions small enough to know everything of: a joint law of L letters, the model that has its conditionals,
and all numbers of a control by enumeration of the ``(V+1)^L`` states."""

import itertools
import math

import torch
from cases import F64, randn
from torch import nn

import sdecontrol as sc


class Joint:
    """A random joint law of ``length`` letters out of ``vocabulary``, and a random reward."""

    def __init__(self, length=4, vocabulary=3, *, alpha=1.0, size=1.0, spread=1.0, seed=0, dtype=F64):
        L, V = length, vocabulary
        self.length, self.vocabulary, self.alpha, self.dtype = L, V, alpha, dtype
        self.points = torch.tensor(list(itertools.product(range(V), repeat=L)))
        self.states = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))
        self.law = (spread * randn(len(self.points), seed=seed)).softmax(0)
        self.r = size * randn(len(self.points), seed=seed + 1)
        # of every state: the law of each letter given those that are not masked
        given = (self.states.unsqueeze(1) == self.points) | (self.states.unsqueeze(1) == V)
        weight = given.all(2).to(F64) * self.law
        conditionals = torch.einsum("sp,plv->slv", weight, nn.functional.one_hot(self.points, V).to(F64))
        self.logits = (conditionals / weight.sum(1)[:, None, None]).clamp(min=1e-12).log().to(dtype)

    def at(self, x):
        """The number of a state."""
        return (x * (self.vocabulary + 1) ** torch.arange(self.length - 1, -1, -1)).sum(-1)

    def counts(self, x):
        """How often each point is among samples."""
        at = (x * self.vocabulary ** torch.arange(self.length - 1, -1, -1)).sum(-1)
        return torch.bincount(at, minlength=len(self.points))

    def model(self, x, s):
        return self.logits[self.at(x)]

    def reward(self, x):
        return self.r[(x * self.vocabulary ** torch.arange(self.length - 1, -1, -1)).sum(-1)].to(self.dtype)

    def problem(self, model=None, **options):
        chain = sc.masked_diffusion(model or self.model, self.length, self.vocabulary, dtype=self.dtype, **options)
        return sc.ControlProblem(chain, reward=self.reward, alpha=self.alpha)

    # ---------------------------------------------------------------- by enumeration

    def letters(self, model, s=0.5):
        """Log-probabilities ``(states, L, V)`` of a model."""
        with torch.no_grad():
            return model(self.states, torch.full((len(self.states),), s, dtype=self.dtype)).log_softmax(-1).to(F64)

    def transitions(self, letters, k, steps, order):
        """``(states, states)`` of step k of a linear schedule, or in random order, written down from the letters."""
        x, V = self.states, self.vocabulary
        masked, n = x == V, len(x)
        each = torch.zeros(n, self.length, V + 1, dtype=F64).scatter(2, x.unsqueeze(2), 1.0)  # the own token stays
        p = letters.exp()
        if order == "independent":
            q = 1 / (steps - k)
            moves = torch.cat((q * p, torch.full((n, self.length, 1), 1 - q, dtype=F64)), 2)
            each = torch.where(masked.unsqueeze(2), moves, each)
            return torch.stack([each[:, j, x[:, j]] for j in range(self.length)]).prod(0)
        T = torch.zeros(n, n, dtype=F64)
        for i in range(n):
            left = masked[i].nonzero().flatten().tolist()
            if not left:
                T[i, i] = 1.0
            for j in left:
                for v in range(V):
                    new = x[i].clone()
                    new[j] = v
                    T[i, self.at(new)] = p[i, j, v] / len(left)
        return T

    def chain_of(self, letters, steps, order):
        """Transitions of all steps; ``letters`` of each, or the same."""
        each = letters if isinstance(letters, list) else [letters] * steps
        return [self.transitions(each[k], k, steps, order) for k in range(steps)]

    def end(self, transitions):
        """The law of the end ``(points,)``."""
        law = torch.zeros(len(self.states), dtype=F64)
        law[-1] = 1.0  # all masked
        for T in transitions:
            law = law @ T
        return law[self.at(self.points)]

    def log_z(self, transitions):
        return float((self.end(transitions) * (self.r / self.alpha).exp()).sum().log())

    def tilted(self, transitions):
        """The law of the end of the optimum."""
        weight = self.end(transitions) * (self.r / self.alpha).exp()
        return weight / weight.sum()

    def kls(self, tuned, plain):
        """``KL`` of each step's law at every state ``(K, states)``."""
        return torch.stack(
            [
                torch.where(a > 0, a * (a.clamp(min=1e-300) / b.clamp(min=1e-300)).log(), 0.0).sum(1)
                for a, b in zip(tuned, plain)
            ]
        )

    def gap(self, tuned, plain):
        """``KL(P^u || Q_fine)`` of transitions."""
        law, total = torch.zeros(len(self.states), dtype=F64), self.log_z(plain)
        law[-1] = 1.0
        for T, kl in zip(tuned, self.kls(tuned, plain)):
            total += float(law @ kl)
            law = law @ T
        return total - float(law[self.at(self.points)] @ self.r) / self.alpha

    def tuned_letters(self, problem, control):
        """Log-probabilities of letters under a control, at all states of every step, from its call ``control(x,
        t)``."""
        chain, found = problem.chain(), []
        with torch.no_grad():
            for k in range(chain.steps):
                plain = self.letters(chain.model, 1 - chain.clock[k])
                rows = torch.ones(len(self.states), dtype=torch.bool)
                if not chain.independent:  # only these are on paths
                    rows = (self.states == self.vocabulary).sum(1) == self.length - k
                plain[rows] += control(self.states[rows], float(chain.clock[k])).to(F64)
                found.append(plain.log_softmax(-1))
        return found

    def gap_of(self, problem, control):
        """``KL(P^u || Q_fine)`` of a control."""
        chain = problem.chain()
        order = "independent" if chain.independent else "random"
        plain = self.chain_of([self.letters(chain.model, 1 - s) for s in chain.clock[:-1]], chain.steps, order)
        tuned = self.chain_of(self.tuned_letters(problem, control), chain.steps, order)
        return self.gap(tuned, plain)


class Net(nn.Module):
    """A small model of tokens, which looks at s."""

    def __init__(self, length=4, vocabulary=3, seed=0, dtype=F64):
        super().__init__()
        torch.manual_seed(seed)
        self.length, self.vocabulary = length, vocabulary
        self.token = nn.Embedding(vocabulary + 1, 6)
        self.layers = nn.Sequential(nn.Linear(6 * length + 1, 32), nn.SiLU(), nn.Linear(32, length * vocabulary))
        self.calls = 0
        self.to(dtype)

    def forward(self, x, s):
        self.calls += 1
        z = torch.cat((self.token(x).flatten(1), s.unsqueeze(1)), 1)
        return self.layers(z).unflatten(1, (self.length, self.vocabulary))


def chi_square_is_fine(counts, law):
    """Of counts against a law: within four standard deviations of its mean (rare cells together)."""
    n = float(counts.sum())
    common = n * law >= 5
    parts = torch.cat((counts[common].double(), counts[~common].sum().double().reshape(1)))
    expected = torch.cat((n * law[common], (n * law[~common].sum()).reshape(1))).clamp(min=1e-300)
    freedom = len(parts) - 1
    return float(((parts - expected).square() / expected).sum()) < freedom + 4 * math.sqrt(2 * freedom)
