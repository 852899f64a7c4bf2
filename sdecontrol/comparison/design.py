"""``design``: rewards that must be measured, a few at a time (lab in the loop)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..errors import NonFiniteError, check_name, warn
from ..evaluation.solution import Solution
from ..files.bundles import read_bundle, register_bundle, write_bundle
from ..files.contents import check_fingerprint
from ..methods.base import Method
from ..problems.learned_reward import LearnedReward
from ..problems.problem import ControlProblem, check_problem
from ..problems.simulate import simulate_chain
from ..randomness import Place, derive_seed, fresh_seed
from ..tensors import as_float, check_count
from ..training.fit_reward import fit_reward
from ..training.solve import solve

PROPOSALS = ("optimistic", "mean", "thompson")
FAILURES = ("raise", "again", "drop")
_TURNS = 8  # of drawing new samples, where most are known already
_KIND = register_bundle("design", "seed", "batch", "problem")

#: ``(n, *event) -> (n,)``, a measurement of each.
Oracle = Callable[[Tensor], Any]


@dataclass
class Design:
    """What :func:`design` returns; prints as a table of its rounds.

    Attributes:
        x, r: all that was measured, in order, ``(n, *event)`` and ``(n,)``; nan where a measurement failed.
        rounds: ``(n,)`` in which round; -1 for what was given.
        reward: learned from all of it. solution: tuned to its mean; its ``sample(n)`` are designs.
    """

    x: Tensor
    r: Tensor
    rounds: Tensor
    reward: LearnedReward | None = None
    solution: Solution | None = None
    calibrations: list[str] = field(default_factory=list)

    def best(self, k: int = 10) -> tuple[Tensor, Tensor]:
        """The k best measured, and their rewards, the best first."""
        check_count("k", k)
        order = self.r.nan_to_num(nan=-math.inf).argsort(descending=True)[:k]
        return self.x[order], self.r[order]

    def table(self) -> list[dict[str, float]]:
        """Of each round: measurements so far, failed ones, mean and best tenth of its rewards, the best so far."""
        rows = []
        for j in sorted(set(self.rounds.tolist())):
            now, so_far = self.r[self.rounds == j], self.r[self.rounds <= j]
            good = now[now.isfinite()].sort(descending=True).values
            tenth = good[: max(1, len(good) // 10)]
            rows.append(
                {
                    "round": j,
                    "measured": len(so_far),
                    "failed": int((~now.isfinite()).sum()),
                    "mean": float(good.mean()),
                    "best_tenth": float(tenth.mean()),
                    "best": float(so_far[so_far.isfinite()].max()),
                }
            )
        return rows

    def __str__(self) -> str:
        lines = [f"{'round':>7}{'measured':>10}{'failed':>8}{'mean':>10}{'best 10 %':>11}{'best so far':>13}"]
        for row in self.table():
            name = "given" if row["round"] < 0 else str(int(row["round"]))
            lines.append(
                f"{name:>7}{row['measured']:>10}{row['failed']:>8}{row['mean']:>10.4g}{row['best_tenth']:>11.4g}"
                f"{row['best']:>13.4g}"
            )
        return "\n".join(lines)


@dataclass
class _Loop:
    """What a round asks for."""

    problem: ControlProblem
    oracle: Oracle
    batch: int
    method: Method | str | None
    beta: float
    propose: str
    failed: str
    seed: int
    fit: dict[str, Any]
    train: dict[str, Any]
    folder: Any
    found: Design

    # ------------------------------------------------------------ measured data, and their file

    def identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "batch": self.batch, "problem": self.problem.fingerprint()}

    def keep(self) -> None:
        if self.folder is not None:
            parts = {"x": self.found.x, "r": self.found.r, "rounds": self.found.rounds}
            write_bundle(self.folder, _KIND, parts, {"kind": _KIND, **self.identity()})

    def restore(self) -> None:
        """What an earlier run measured.

        Raises:
            BadFileError: it is of another problem. ValueError: of another seed or batch.
        """
        tensors, saved = read_bundle(self.folder, _KIND, _KIND)
        check_fingerprint(saved["problem"], self.problem.fingerprint, self.folder)
        for name in ("seed", "batch"):
            if saved[name] != getattr(self, name):
                raise ValueError(f"{self.folder} was begun with {name}={saved[name]}, not {getattr(self, name)}.")
        x, r, rounds = (tensors[name].to(self.problem.device) for name in ("x", "r", "rounds"))
        self.found = Design(x, r, rounds)

    def add(self, x: Tensor, r: Tensor, index: int) -> None:
        found = self.found
        found.x, found.r = torch.cat((found.x, x)), torch.cat((found.r, r))
        found.rounds = torch.cat((found.rounds, torch.full((len(x),), index, device=x.device)))
        self.keep()

    def measured(self, x: Tensor, again: bool = True) -> Tensor:
        """The oracle's answers, nan where it has none.

        Raises:
            TypeError, ValueError: it gives no number for each.
        """
        answer = self.oracle(x)
        r = torch.as_tensor(answer).detach().to(dtype=self.problem.dtype, device=x.device)
        if r.shape != (len(x),):
            raise ValueError(f"oracle must give one number for each of {len(x)} rows, got shape {tuple(r.shape)}.")
        bad = ~torch.isfinite(r)
        if bool(bad.any()) and self.failed == "again" and again:
            r = r.clone()
            r[bad] = self.measured(x[bad], again=False)
        return torch.where(torch.isfinite(r), r, math.nan)

    def check_failed(self) -> None:
        """Raise where measurements failed and that was not allowed for; what was measured is kept."""
        bad = (~torch.isfinite(self.found.r)).nonzero().flatten()
        if self.failed == "raise" and len(bad):
            where = "" if self.folder is None else f" All {len(self.found.r)} answers are in {self.folder}."
            raise NonFiniteError(
                f"oracle gave no finite number for {len(bad)} of {len(self.found.r)} rows (the first: {int(bad[0])})."
                f"{where} failed='drop' goes on without them, failed='again' asks once more first.",
                what="oracle",
                rows=len(bad),
            )

    # ------------------------------------------------------------ a round

    def run(self, index: int) -> None:
        """Learn from what there is, propose, measure."""
        solution = None if not len(self.found.r) else self.tuned(self.learned(index), index)
        x = self.proposed(solution, index)
        self.add(x, self.measured(x), index)
        self.check_failed()

    def learned(self, index: int) -> LearnedReward:
        """The reward from all that was measured.

        Raises:
            ValueError: nothing was.
        """
        good = torch.isfinite(self.found.r)
        if not bool(good.any()):
            raise ValueError("oracle gave no finite number for any row, so that nothing can be learned.")
        reference = self.problem.reference
        vocabulary = None
        if reference.state_dtype is not None:
            vocabulary = getattr(reference, "vocabulary", None) or reference.values
        seed = derive_seed(self.seed, Place.DESIGN_FIT, index)
        options = {"vocabulary": vocabulary, "seed": seed, "progress": False, **self.fit}
        return fit_reward(self.found.x[good], self.found.r[good], **options)

    def tuned(self, reward: LearnedReward, index: int, propose: str | None = None) -> Solution:
        """The model tuned to an acquisition: an upper bound, the mean, or one member's draw."""
        chosen = propose or self.propose
        if chosen == "optimistic" and self.beta > 0:
            reward = reward.optimistic(self.beta)
        elif chosen == "thompson":
            reward = reward.member(index % len(reward.members))
        p = self.problem
        known = ControlProblem(
            p.reference, p.initial, reward, p.running_cost_function, p.alpha, p.start,
            reward_batch_size=p.reward_batch_size, stop=p.stop,
        )  # fmt: skip
        seed = derive_seed(self.seed, Place.DESIGN_SOLVE, index)
        return solve(known, self.method, seed=seed, **{"progress": False, **self.train})

    def proposed(self, solution: Solution | None, index: int) -> Tensor:
        """The next batch: samples that were not measured yet, each once."""
        known = {row.tobytes() for row in self.found.x.cpu().numpy()}
        chosen: list[Tensor] = []
        for turn in range(_TURNS):
            seed = derive_seed(self.seed, Place.DESIGN_SAMPLES, index, turn)
            drawn = self.drawn(solution, seed)
            for row, name in zip(drawn, (row.tobytes() for row in drawn.cpu().numpy())):
                if name not in known and len(chosen) < self.batch:
                    known.add(name)
                    chosen.append(row)
            if len(chosen) == self.batch:
                return torch.stack(chosen)
        if not chosen:
            raise ValueError(
                f"round {index}: all samples were measured before; the tuned model has come to rest on them (a larger "
                "alpha keeps it wider)."
            )
        warn(f"round {index}: {len(chosen)} new samples in place of {self.batch}; all others were measured before.")
        return torch.stack(chosen)

    def drawn(self, solution: Solution | None, seed: int) -> Tensor:
        n = max(64, self.batch)
        if solution is not None:
            return solution.sample(n, seed)
        options: dict[str, Any] = self.train
        chain = self.problem.chain(options.get("time_steps"), options.get("scheme"))
        with torch.no_grad(), self.problem.evaluating():
            return simulate_chain(self.problem, chain, n, None, seed=seed, keep="end").samples


def design(
    problem: ControlProblem,
    oracle: Oracle,
    *,
    rounds: int = 5,
    batch: int = 96,
    method: Method | str | None = None,
    propose: str = "optimistic",
    beta: float = 1.0,
    data: tuple[Tensor, Tensor] | None = None,
    failed: str = "raise",
    folder: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    fit: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
) -> Design:
    """Tune a model to a reward that must be measured, as few times as may be (tutorial, section 7.3, Figure 5; Uehara
    et al. 2402.16359).

    Each round learns the reward from all measurements (:func:`fit_reward`), tunes the model to it with a bonus where it
    is unsure (:func:`solve`, from the untuned model), draws a batch of samples that were not measured yet, and asks the
    oracle. The first batch is of the untuned model, where no data are given. In the end the model is tuned to the mean.

    Args:
        problem: without a reward; its reference, alpha and running cost are those of every round.
        oracle: ``x (n, *event) -> (n,)`` measurements, called once a round with decoded samples.
        rounds: of measuring. batch: measurements of each.
        method: of tuning, or its name; None: ``recommend``'s first choice.
        propose: "optimistic" (the mean and ``beta`` spreads), "mean" (no bonus) or "thompson" (one member of the
            ensemble, in turn).
        data: ``(x, r)`` that are known.
        failed: where the oracle gives nan or inf: "raise", "again" (ask once more for these, then as "drop") or "drop"
            (kept in the result as nan, not learned from).
        folder: where every answer is written at once; a run that finds its own there goes on after its last round, to
            the same numbers.
        seed: of everything but the oracle; None draws one, which with a ``folder`` must be given.
        fit, train: options of ``fit_reward`` and ``solve``.

    Returns:
        :class:`Design`.

    Raises:
        ValueError, TypeError: naming the argument. NonFiniteError: a measurement failed, by ``failed="raise"``; all
            answers, those of its round too, are in the folder.
    """
    check_problem(problem)
    if problem.reward_function is not None:
        raise ValueError("problem has a reward; what is to be measured is the oracle's: make it without one.")
    if problem.condition is not None:
        raise ValueError("problem has a condition; an oracle measures x alone: fix the condition first.")
    if ranks.size() > 1:
        raise ValueError("design would ask the oracle in each of the processes: run it in one.")
    if not callable(oracle):
        raise TypeError(f"oracle must be a function x -> (n,), got {type(oracle).__name__}.")
    check_count("rounds", rounds)
    check_count("batch", batch)
    check_name("propose", propose, PROPOSALS)
    check_name("failed", failed, FAILURES)
    if folder is not None and seed is None:
        raise ValueError("seed must be given with a folder, so that a run can go on where it was.")
    x = problem.draw_start(1, 0)[:0]
    with torch.no_grad(), problem.evaluating():
        x = problem.reference.decode(x, None)
    empty = Design(x, torch.zeros(0, dtype=problem.dtype, device=x.device), torch.zeros(0, dtype=torch.int64))
    loop = _Loop(
        problem, oracle, batch, method, as_float("beta", beta), propose, failed, fresh_seed(seed), fit or {},
        train or {}, folder, empty,
    )  # fmt: skip
    if folder is not None and os.path.exists(os.path.join(folder, f"{_KIND}.json")):
        loop.restore()
    elif data is not None:
        loop.add(*_known(data, problem), -1)
    loop.check_failed()
    done = int(loop.found.rounds.max()) + 1 if len(loop.found.rounds) else 0
    for index in range(max(0, done), rounds):
        loop.run(index)
    loop.found.reward = loop.learned(rounds)
    loop.found.solution = loop.tuned(loop.found.reward, rounds, "mean")
    return loop.found


def _known(data: Any, problem: ControlProblem) -> tuple[Tensor, Tensor]:
    if not isinstance(data, (tuple, list)) or len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
        raise TypeError("data must be a pair (x, r) of tensors.")
    x, r = data
    if len(x) != len(r) or r.ndim != 1:
        raise ValueError(f"data: x has {len(x)} rows, r the shape {tuple(r.shape)}.")
    return x.to(problem.device), r.to(dtype=problem.dtype, device=problem.device)
