"""Unknown rewards on 8-mers: learned from few data and tuned exactly, and rounds of measurements beside baselines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sdecontrol as sc

from .sequences_known import exact_law

__all__ = ["BETAS", "COVERAGES", "KLS", "STRATEGIES", "offline_cell", "online_cell"]

WILD, ROWS, NOISE = "GCTAATCA", 256, 0.5
LOSS = 8.0  # of a run of three A or of three T, where these fail
BETAS = (0.0, 0.5, 1.0, 2.0, 4.0)
KLS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
ROUNDS, BATCH = 4, 48
_FIT = {"iterations": 300, "progress": False}
_TRAIN = {"iterations": 100, "batch_size": 128}


# ---------------------------------------------------------------- offline


def mutants(rows: int, seed: int) -> Tensor:
    """Sequences with one to three letters changed of one wild type: all that was measured."""
    generator = torch.Generator().manual_seed(seed)
    x = sc.library.sequence_task("dna-8mer").encode([WILD]).repeat(rows, 1)
    order = torch.rand(rows, 8, generator=generator).argsort(1)
    count = torch.randint(1, 4, (rows, 1), generator=generator)
    by = torch.randint(1, 4, (rows, 8), generator=generator)
    return torch.where(order < count, (x + by) % 4, x)


def has_run(x: Tensor) -> Tensor:
    """Whether there are three A or three T in a row."""
    words = x.unfold(1, 3, 1)
    return ((words == 0).all(2) | (words == 3).all(2)).any(1)


def without_runs(rows: int, seed: int) -> Tensor:
    """Natural sequences in which no run shows that runs fail."""
    x = sc.library.sequence_task("dna-8mer").natural(8 * rows, seed)
    return x[~has_run(x)][:rows]


#: what was measured, and what a run loses
COVERAGES = {"mutants of one sequence": (mutants, 0.0), "runs fail, and none was measured": (without_runs, LOSS)}


def tilted(log_p: Tensor, r: Tensor, kl: float) -> tuple[Tensor, float]:
    """The law in proportion to ``p exp(r/alpha)`` that is so far from p, and its alpha, by bisection."""
    low, high = 1e-3, 1e3
    for _ in range(60):
        alpha = (low * high) ** 0.5
        log_q = (log_p + r / alpha).log_softmax(0)
        low, high = (alpha, high) if float(log_q.exp() @ (log_q - log_p)) > kl else (low, alpha)
    return log_q, alpha


def offline_cell(coverage: str, seed: int) -> dict[str, Any]:
    """Data of limited coverage; the model is tuned exactly (by enumeration) to bounds of the learned reward, at each KL
    and beta, and judged by the true one."""
    began = time.process_time()
    points, log_p, truth = exact_law()
    drawn, loss = COVERAGES[coverage]
    truth, x = truth - loss * has_run(points), drawn(ROWS, seed)
    r = truth[(x * 4 ** torch.arange(7, -1, -1)).sum(1)].float()
    noise = torch.randn(ROWS, generator=torch.Generator().manual_seed(seed + 1))
    learned = sc.fit_reward(x, r + NOISE * noise, vocabulary=4, seed=seed, **_FIT)
    with torch.no_grad():
        mean, spread = learned(points).double(), learned.spread(points).double()
    rows = []
    for beta in BETAS:
        for kl in KLS:
            log_q, alpha = tilted(log_p, mean - beta * spread, kl)
            q = log_q.exp()
            row = {"beta": beta, "kl": kl, "alpha": alpha, "true": float(q @ truth), "believed": float(q @ mean)}
            rows.append({**row, "spread": float(q @ spread)})
    best = [{"kl": kl, "true": float(tilted(log_p, truth, kl)[0].exp() @ truth)} for kl in KLS]
    error = float((log_p.exp() @ (mean - truth).square()).sqrt())
    known = {"rmse_of_natural": error, "calibration": str(learned.calibration)}
    return {**known, "rows": rows, "exact": best, "cpu_seconds": round(time.process_time() - began, 1)}


# ---------------------------------------------------------------- online


def _designed(propose: str, alpha: float | None = None) -> Callable[[int], tuple[list[Tensor], list[Tensor]]]:
    def run(seed: int) -> tuple[list[Tensor], list[Tensor]]:
        task = sc.library.sequence_task("dna-8mer")
        problem = sc.ControlProblem(task.reference, alpha=alpha or task.card.alpha)
        found = sc.design(
            problem, task.reward, rounds=ROUNDS, batch=BATCH, method=sc.LogVariance(), propose=propose, seed=seed,
            fit=_FIT, train=_TRAIN,
        )  # fmt: skip
        return ([part[found.rounds == j] for j in range(ROUNDS)] for part in (found.x, found.r))  # type: ignore[return-value]

    return run


def _sampled(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Untuned samples, as many: the best of n."""
    task = sc.library.sequence_task("dna-8mer")
    x = task.natural(ROUNDS * BATCH, seed)
    return list(x.split(BATCH)), list(task.reward(x).split(BATCH))


def _genetic(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Of the best quarter so far pairs are crossed, and each letter is changed with probability 1/8; only new ones are
    measured."""
    task = sc.library.sequence_task("dna-8mer")
    generator = torch.Generator().manual_seed(seed)
    x = [task.natural(4 * BATCH, seed).unique(dim=0)]
    x = [x[0][torch.randperm(len(x[0]), generator=generator)[:BATCH]]]
    r = [task.reward(x[0])]
    for _ in range(ROUNDS - 1):
        known, values = torch.cat(x), torch.cat(r)
        parents = known[values.argsort(descending=True)[: max(4, len(known) // 4)]]
        seen, new = {tuple(row) for row in known.tolist()}, []
        while len(new) < BATCH:
            a, b = (parents[int(torch.randint(len(parents), (), generator=generator))] for _ in range(2))
            child = torch.where(torch.rand(8, generator=generator) < 0.5, a, b)
            changed = torch.rand(8, generator=generator) < 1 / 8
            child = torch.where(changed, torch.randint(4, (8,), generator=generator), child)
            if tuple(child.tolist()) not in seen:
                seen.add(tuple(child.tolist()))
                new.append(child)
        x.append(torch.stack(new))
        r.append(task.reward(x[-1]))
    return x, r


STRATEGIES: dict[str, Callable[[int], tuple[list[Tensor], list[Tensor]]]] = {
    "optimistic": _designed("optimistic"),
    "optimistic, alpha 0.5": _designed("optimistic", 0.5),
    "mean": _designed("mean"),
    "thompson": _designed("thompson"),
    "genetic algorithm": _genetic,
    "best of n": _sampled,
}


def online_cell(row: str, seed: int) -> dict[str, Any]:
    """Rounds of measurements by one strategy: mean, best tenth and best, after each."""
    began = time.process_time()
    x, r = STRATEGIES[row](seed)
    table, so_far = [], torch.zeros(0)
    for sequences, values in zip(x, r):
        so_far = torch.cat((so_far, values.float()))
        top = so_far.sort(descending=True).values
        table.append(
            {
                "measured": len(so_far),
                "mean": float(values.mean()),
                "best": float(top[0]),
                "best_tenth": float(top[: max(1, len(top) // 10)].mean()),
                "edit_diversity": sc.metrics.edit_diversity(sequences),
            }
        )
    return {"rounds": table, "cpu_seconds": round(time.process_time() - began, 1)}
