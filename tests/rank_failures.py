"""What goes wrong in one of several processes, or is seen by one alone; and the script that ``test_ranks.py`` starts
with torchrun's variables: ``python rank_failures.py FOLDER NAME ...``, each a case, "failures" (all that a script
survives), "nonfinite" or "killed" (what it does not)."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from rank_cases import BATCH, CASES, STEPS, numbers, quadratic, two_modes

import sdecontrol as sc
from sdecontrol import ranks

RUN: dict[str, Any] = {"time_steps": STEPS, "batch_size": BATCH, "seed": 1, "iterations": 6}


class Faulty:
    """A reward that does something else in the second process, once so many iterations are done (it is told as a
    callback): ``then(value, calls)``, the number of its calls since then."""

    def __init__(self, after: int, then: Any) -> None:
        self.after, self.then, self.done, self.calls = after, then, 0, 0

    def on_step_end(self, state: Any) -> None:
        self.done = state.iteration

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        value = -(x - 1).square().sum(1)
        if ranks.rank() == 0 or ranks.parts() == 1 or self.done < self.after:
            return value
        self.calls += 1
        return self.then(value, self.calls)

    def run(self, method: Any = "log-variance", **options: Any) -> Any:
        return run(problem(self), method, callbacks=[self], **options)


def uneven() -> sc.ControlProblem:
    return problem(lambda x: -(x - 1).square().sum(1))


def problem(reward: Any) -> sc.ControlProblem:
    sde = sc.SDE(lambda x, t: -x, 1.0, dim=2, horizon=1.0)
    return sc.ControlProblem(sde, initial=sc.Dirac(torch.zeros(2).double()), reward=reward, alpha=0.3)


def run(problem: sc.ControlProblem, method: Any = "log-variance", **options: Any) -> Any:
    return sc.solve(problem, method, **{**RUN, **options})


def raised(call: Any) -> dict[str, Any]:
    try:
        call()
    except BaseException as error:
        return {"kind": type(error).__name__, "message": str(error), "solution": getattr(error, "solution", None)}
    return {}


def nan(value: torch.Tensor, calls: int) -> torch.Tensor:
    return value * float("nan")


def not_finite() -> dict[str, Any]:
    """Both stop at the same iteration, with the same last good solution, which both can evaluate."""
    found = raised(lambda: Faulty(3, nan).run())
    solution = found.pop("solution")
    return {**found, **numbers(solution), "elbo": solution.evaluate(128, seed=1, confirm=False).elbo.value}


def an_error_of_the_users() -> dict[str, Any]:
    def broken(value: torch.Tensor, calls: int) -> torch.Tensor:
        raise LookupError("no such model")

    return raised(lambda: Faulty(1, broken).run())


def other_ways() -> dict[str, Any]:
    return raised(lambda: sc.simulate(two_modes(), 128, time_steps=STEPS + ranks.rank(), seed=1, keep="end"))


def other_problems() -> dict[str, Any]:
    at = torch.full((2,), float(ranks.rank())).double()
    return raised(lambda: run(problem(lambda x: -(x - at).square().sum(1))))


def other_settings() -> dict[str, Any]:
    return raised(lambda: run(two_modes(), seed=ranks.rank()))


def a_batch_that_does_not_go() -> dict[str, Any]:
    return raised(lambda: run(two_modes(), batch_size=100)) | {"groups": raised(lambda: groups())["message"]}


def groups() -> Any:
    return run(two_modes(), sc.LogVariance(group_size=128), batch_size=128)


def interrupted(folder: Path) -> dict[str, Any]:
    """Ctrl-C in the second process, in the midst of an iteration, ends both after it, with a checkpoint."""

    def interrupt(value: torch.Tensor, calls: int) -> torch.Tensor:
        if calls == 1:
            signal.raise_signal(signal.SIGINT)
        return value

    found = raised(lambda: Faulty(3, interrupt).run(checkpoint_dir=folder / "run"))
    ranks.agreed(None, "what was written")
    (name,) = (folder / "run").glob("*.json")
    return {"kind": found["kind"], "done": int(name.stem.split("-")[1])}


def step_taken_back() -> dict[str, Any]:
    """Paths of the second process alone are not finite once: both go back."""

    def once(value: torch.Tensor, calls: int) -> torch.Tensor:
        return value * float("nan") if calls <= STEPS + 1 else value  # the control asks at each step

    return numbers(Faulty(4, once).run(sc.AdjointMatching()))


def budget() -> dict[str, Any]:
    """The time is that of one clock."""
    slow = sum(range(10**6)) if ranks.rank() else 0  # the second comes later
    found = run(two_modes(), iterations=None, budget=0.5 + 0 * slow)
    return {"iterations": found.iterations, **numbers(found)}


def reports(folder: Path) -> dict[str, Any]:
    """One writes; the user's callbacks are called in both."""
    calls: list[int] = []

    class Own:
        def on_step_end(self, state: Any) -> None:
            calls.append(state.iteration)

    solution = run(two_modes(), report_to=f"jsonl:{folder / 'report'}", callbacks=[Own()])
    solution.save(folder / "saved")
    again = sc.load(folder / "saved", two_modes())
    lines = (folder / "report" / "metrics.jsonl").read_text().splitlines()
    return {"lines": len(lines), "calls": calls, "same": numbers(again)["control"] == numbers(solution)["control"]}


def work_of_its_own() -> dict[str, Any]:
    """A sweep: each process solves another problem."""
    with ranks.alone():
        return numbers(run(quadratic(), seed=ranks.rank() + int(os.environ["RANK"])))


def survived(folder: Path) -> dict[str, Any]:
    alone = (not_finite, an_error_of_the_users, other_ways, other_problems, other_settings, a_batch_that_does_not_go)
    found = {f.__name__: f() for f in (*alone, step_taken_back, budget, work_of_its_own)}
    return found | {f.__name__: f(folder) for f in (interrupted, reports)}


#: how a script ends that does not survive it
ENDS = {
    "nonfinite": lambda: Faulty(2, nan).run(),
    "killed": lambda: Faulty(2, lambda value, calls: os._exit(9)).run(),
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, *names = sys.argv[1:]
    runs = {**CASES, "failures": lambda: survived(Path(folder))}
    results = {name: runs[name]() for name in names if name in runs}
    Path(folder, f"found.{ranks.rank()}").write_text(json.dumps(results, default=str))
    for name in names:
        if name in ENDS:
            ENDS[name]()
