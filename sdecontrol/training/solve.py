"""``solve``: one verb for every method."""

import contextlib
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .. import ranks
from ..chains.base import Chain
from ..controls.base import Control
from ..controls.bounded import bounded
from ..controls.build import continued
from ..errors import NoExactSolution, NonFiniteError, RewardError, renamed, warn
from ..evaluation import solution as solutions
from ..evaluation.solution import Solution
from ..files.contents import load_tensors, part_of, plain_settings, with_part
from ..methods.base import Method, Run, find_method, parameters_of, suggested
from ..precision import full_precision
from ..problems.problem import ControlProblem, check_problem
from ..processes.modules import copied, held_fixed, plain_state
from ..randomness import Place, derive_seed, fresh_seed
from ..tensors import as_float, check_count, check_recording
from .annealing import Annealing
from .callbacks import TrainingState, notify
from .checkpoints import Checkpoints
from .least_squares import LinearSteps
from .optimiser import Descent
from .path_law import PathLaw
from .progress import ProgressBar
from .schedule import Gain, LearningRateSchedule, Score
from .several import Interrupts, check_split, same_numbers, same_problem
from .trackers import reporting

_BATCH = 256  # paths per gradient


@renamed(cooling="anneal")
@full_precision()
def solve(
    problem: ControlProblem,
    method: Method | str | None = None,
    *,
    time_steps: Any = None,
    scheme: str | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    control: nn.Module | Solution | str | None = None,
    bounds: tuple[Any, Any] | None = None,
    learning_rate: float | None = None,
    optimizer: Any = None,
    max_kl_step: float | None = 0.5,
    accumulate: int = 1,
    anneal: bool = True,
    tolerance: float | None = None,
    budget: str | float | None = None,
    checkpoint_dir: Any = None,
    checkpoint_every: int = 100,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    report_to: Any = None,
    images_every: int | None = 100,
    progress: bool | None = None,
) -> Solution:
    """Solve a control problem, ``min_u KL(P^u || Q_fine)``.

    Args:
        method: a method such as ``sc.RewardBackprop()``, or its name in kebab case; None: the first choice of
            ``recommend``, its settings where you give none, and its reason in ``solution.details["reason"]`` and above
            the progress bar.
        time_steps: number of steps (default 100) or a grid from 0 to the horizon; not with a chain. A number means
            equal steps, for generative references steps that are finer where noise and data are of one size
            (``reference.default_grid``).
        scheme: "euler" (default), "exact" (linear references) or "exponential" (semi-linear and generative ones; the
            default of the latter).
        iterations: exactly so many; None: the method's default at most, and where a ``budget`` is given that, to its
            end. Else the run ends once another step of work, a quarter of the iterations so far or a hundred, is not
            worth it: with 99 % confidence the last one gained less than 0.1 nats, or less than a twentieth of the
            standard deviation of the paths' log-weights where that is more (and, of a method whose loss is a residual,
            less than half of that). Then the learning rate falls to 0 over half as many iterations as have passed, and
            the run is over. It looks from a hundred iterations on; a run that stands still before it finds more, such
            as a mode that no path has reached yet, ends there: give it ``iterations``. Particle matching asks new
            particles instead.
        batch_size: paths per gradient (default 256, or what ``recommend`` says with a method that it chose);
            ``accumulate`` such gradients make one step. Of all processes together where ``torchrun`` has started
            several: a multiple of 64 times their number.
        seed: of parameters and noise; None draws one from torch's global generator. The same seed gives the same
            result, bit for bit, on the same machine and thread count.
        control: your own nn.Module ``(x, t) -> (batch, m)``, or a solution to go on from, of this problem or of one
            with another alpha, reward or number of steps (a copy of its control is trained, and sees this problem's
            reward and alpha); for pre-trained models "tuned" (a copy of the model, one network and no reward in
            sampling), "frozen" (the model as it is, and beside it a small network that sees the reward at the denoised
            state) or "both" (that network beside a tuned copy); None: a copy of the pre-trained model if it is
            trainable, else the default network.
        bounds: ``(low, high)``, numbers or tensors like a control, on either side of 0, infinite ones too: the control
            is squashed into them by tanh (:class:`~sdecontrol.controls.bounded.BoundedControl`), and log-ratios,
            weights and log Z are exactly its own. ``RewardBackprop``, ``SoftPPO`` and ``Reinforce`` minimise the KL
            among bounded controls; methods that fit the unbounded optimum's shifts (``AdjointMatching``,
            ``BridgeMatching``, ``ParticleMatching``) come near what of it is within bounds. Where bounds act, the gap
            to log Z stays.
        learning_rate: of Adam; None: as it is found in the first 50 steps, such that one moves the path law by about
            0.1 nats: a thousandth of the control's own default at least, and at most four times it for a tuned copy, a
            network beside a model or a module of yours, the default itself for a default network.
        optimizer: a function parameters -> optimiser.
        max_kl_step: no step of the optimiser moves the path law by more nats, ``KL(P^new || P^old)`` measured on a
            sixteenth of the batch's states; where the control's own KL is above 1, by more than this part of it. Longer
            steps are shortened. After fifty steps those are measured that may come near it, and every eighth
            ("kl_step" in the history). None: not measured, and no rate is found.
        anneal: train at higher temperatures first, where the method gains from it (``Method.anneals``), the reward
            spreads over many nats, and no control of your own is given; a quarter of the run at most. False: at the
            problem's own from the first iteration.
        tolerance: stop once the gap is confirmed and below this.
        budget: seconds, or "300s", "5m": stop there; the result is then marked as not reproducible.
        checkpoint_dir: write a checkpoint there every ``checkpoint_every`` iterations and at the end; with
            ``resume=True`` go on from the newest good one, to the same numbers as an uninterrupted run. All that the
            numbers depend on must be the same, ``iterations`` too: the learning rate falls over all of them, so a
            longer run is another one from its first step.
        callbacks: objects with on_train_begin, on_step_end, on_evaluate, on_save, on_exception, on_train_end.
        report_to: where metrics go, beside the history: "jsonl" (``metrics.jsonl``), "tensorboard" or "wandb" (offline
            unless WANDB_MODE says otherwise), in ``checkpoint_dir`` or in a folder after a colon, "jsonl:runs/first";
            an object with ``log(metrics, step=)``, or of sbi's protocol (``log_metrics(metrics, step=)`` or
            ``log_metric(name, value, step=)``, and where it has them ``log_params``, ``add_figure``, ``flush``); or
            several. One that raises warns once.
        images_every: where samples are images, 16 of them go to the trackers but "jsonl" after every so many
            iterations, of prompts with their text; None: never.
        progress: show a progress bar; None: if the terminal can.

    Returns:
        :class:`Solution`.

    Raises:
        NonFiniteError: naming the quantity, the iteration and the rows; its ``solution`` is the last good one.
        RewardError: of a :class:`BlackBox`, naming the sample and the cause; likewise.
    """
    check_problem(problem)
    check_count("batch_size", batch_size, optional=True)
    check_count("accumulate", accumulate)
    check_count("checkpoint_every", checkpoint_every)
    check_count("iterations", iterations, optional=True)
    check_count("images_every", images_every, optional=True)
    same_problem(problem)
    reason, beside = None, dict[str, Any]()
    if method is None:
        size = _BATCH if batch_size is None else batch_size
        first = suggested(problem, time_steps=time_steps, batch_size=size, control=control)[0]
        chosen, reason, beside = first.method, first.reason, first.settings
    else:
        chosen = find_method(method)
    control = beside.get("control") if control is None else control
    batch_size = int(beside.get("batch_size", _BATCH)) if batch_size is None else batch_size
    training = {
        "iterations": iterations,
        "budget": budget,
        "tolerance": tolerance,
        "control": control,
        "bounds": bounds,
    }
    for name, value in training.items():
        if value is not None and chosen.default_iterations == 0:
            raise ValueError(f"{name}: {chosen.name} trains nothing, so leave {name} out.")
    if control is not None and not chosen.takes_control:
        raise ValueError(f"control: {chosen.name} trains no control, so leave control out.")
    if bounds is not None and not chosen.takes_control:
        raise ValueError(f"bounds: {chosen.name} trains no control that could be bounded, so leave bounds out.")
    chosen, problem = chosen.prepare(problem)
    chosen.check(problem)
    check_split(chosen, batch_size)
    plan = _Plan(
        settings={"time_steps": time_steps, "scheme": scheme},
        batch_size=batch_size,
        accumulate=accumulate,
        seed=seed,
        control=control,
        bounds=bounds,
        learning_rate=learning_rate,
        optimizer=optimizer,
        max_kl_step=as_float("max_kl_step", max_kl_step, positive=True) if max_kl_step is not None else None,
        anneal=bool(anneal),
        iterations=iterations,
        tolerance=tolerance,
        budget=_seconds(budget),
        checkpoint_every=checkpoint_every,
        callbacks=[*callbacks, *reporting(report_to, checkpoint_dir, resume, images_every)],
        progress=progress,
        reason=reason,
    )
    check_recording("solve(...)")
    with ranks.together(), torch.enable_grad(), problem.evaluating():  # called under no_grad, too
        return Trainer(problem, chosen, plan, checkpoint_dir, resume).train()


def _plain_method(method: Method) -> dict[str, Any]:
    """A method's settings as JSON can hold them; of what is not plain (a proposal, a function), what it is."""
    found: dict[str, Any] = {}
    for field in fields(method):
        value = getattr(method, field.name)
        if isinstance(value, Method):
            value = {"method": value.name, **_plain_method(value)}
        elif isinstance(value, tuple):
            value = list(value)
        elif not isinstance(value, (str, int, float, bool, list, dict, type(None))):
            value = type(value).__name__
        found[field.name] = value
    return found


def _seconds(budget: str | float | None) -> float | None:
    if budget is None:
        return None
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*(s|m|min|h)?\s*", budget)
        if match is None:
            raise ValueError(f"budget must be seconds or a string such as '300s', '5m' or '1h', got {budget!r}.")
        budget = float(match[1]) * {"s": 1, None: 1, "m": 60, "min": 60, "h": 3600}[match[2]]
    if not budget > 0:
        raise ValueError(f"budget must be > 0 seconds, got {budget}.")
    return float(budget)


@dataclass(frozen=True)
class _Plan:
    """How a run goes and when it ends; fields as :func:`solve` has them, ``budget`` in seconds; ``reason``: why the
    method was chosen, where the user named none."""

    settings: dict[str, Any]
    batch_size: int
    accumulate: int
    seed: int | None
    control: nn.Module | Solution | str | None
    bounds: tuple[Any, Any] | None
    learning_rate: float | None
    optimizer: Any
    max_kl_step: float | None
    anneal: bool
    iterations: int | None
    tolerance: float | None
    budget: float | None
    checkpoint_every: int
    callbacks: Sequence[Any]
    progress: bool | None
    reason: str | None

    @property
    def by_time(self) -> bool:
        return self.iterations is None and self.budget is not None

    def schedule(self, method: Method) -> LearningRateSchedule:
        most = 10**7 if self.by_time else method.default_iterations if self.iterations is None else self.iterations
        adaptive = self.iterations is None and self.budget is None and not method.steady
        schedule = LearningRateSchedule(most, adaptive, method.same_paths, method.measures_gain)
        if self.by_time:
            schedule.decay_from = None
        return schedule

    def descent(self, method: Method, state: nn.Module, chain: Chain) -> Descent:
        control = getattr(state, "control", None)
        parts = control.linear_parts() if isinstance(control, Control) and self.optimizer is None else []
        law = None
        if control is not None and self.max_kl_step is not None:
            given = self.learning_rate is not None or self.optimizer is not None
            law = PathLaw(chain, control, self.max_kl_step, find=not given)
        return Descent(
            parameters_of(state) or [chain.times.new_zeros(1)],  # an optimiser wants one even where nothing is trained
            self.optimizer,
            self.learning_rate,
            getattr(control, "learning_rate", 1e-3),
            linear=LinearSteps(parts) if parts else None,
            law=law,
            decay=method.averaging,
        )


class Trainer:
    """One run of the loop."""

    evaluate_every = 200

    def __init__(self, problem: ControlProblem, method: Method, plan: _Plan, folder: Any, resume: bool) -> None:
        self.problem, self.method, self.plan = problem, method, plan
        self.began = time.monotonic()  # before anything is asked of the problem, such as a pilot run
        chain = problem.chain(**plan.settings)
        self.settings = plain_settings(plan.settings)
        self.checkpoints = Checkpoints(folder) if folder is not None else None
        self.fingerprint = problem.fingerprint() if self.checkpoints is not None else {}
        saved = self._find_checkpoint(resume)
        self.seed = fresh_seed(saved[1]["identity"]["seed"] if saved is not None and plan.seed is None else plan.seed)
        given = control = continued(problem, chain, plan.control, seed=self.seed)
        if plan.bounds is not None:
            control = bounded(problem, chain, given, plan.bounds, self.seed)
        self.run = Run(problem, chain, plan.batch_size, plan.accumulate, self.seed, control)
        self.run.elapsed = None if plan.budget is None else self.elapsed
        with ranks.split_batches(method.splits):
            self.state = method.setup(self.run)
        same_numbers(self.state)
        self.descent, self.schedule = plan.descent(method, self.state, chain), plan.schedule(method)
        self.run.descend, self.run.take_back = self.descent.step, self.descent.take_back
        # a control that is given may be near its optimum already; backward kernels say what a whole reward is
        self.annealing = Annealing(
            plan.anneal
            and method.anneals
            and (given is None or isinstance(given, str))
            and not problem.reference.reverse_target
        )
        self.target = problem if method.zero_weights else problem.with_numbers()
        self.history: list[dict[str, float]] = []
        self.scores: list[Score] = []  # of the iterations at the problem's own temperature
        self.done = 0
        self.out_of_time = False
        self.whole = True
        self.interrupts = Interrupts()
        if saved is not None:
            self._restore(*saved)
        ranks.check_same("the run", {**self.identity, "iterations done": self.done})

    # ------------------------------------------------------------ checkpoints

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it resumes."""
        return {
            "method": self.method.name,
            "method_settings": _plain_method(self.method),
            "settings": self.settings,
            "seed": self.seed,
            "batch_size": self.run.batch_size,
            "accumulate": self.run.accumulate,
            "iterations": self.plan.iterations,
            "learning_rate": self.plan.learning_rate,
            "optimizer": type(self.descent.optimizer).__name__,
            "anneal": self.plan.anneal,
            "max_kl_step": self.plan.max_kl_step,
            "bounds": None if self.plan.bounds is None else [torch.as_tensor(b).tolist() for b in self.plan.bounds],
        }

    def _find_checkpoint(self, resume: bool) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if self.checkpoints is None and resume:
            raise ValueError("resume=True needs checkpoint_dir, the folder to resume from.")
        if self.checkpoints is not None and not resume and self.checkpoints.names():
            raise ValueError(
                f"checkpoint_dir {self.checkpoints.folder} already has checkpoints; pass resume=True to go "
                "on from them, or another folder."
            )
        return self.checkpoints.newest(self.problem.fingerprint) if self.checkpoints is not None and resume else None

    def _save(self, stopped: bool = False) -> None:
        """Write a checkpoint: of several processes the first does, and all wait for it (unless they have stopped)."""
        assert self.checkpoints is not None
        if not stopped:
            ranks.once(self._write, "a checkpoint")
        elif ranks.leads():
            self._write()
        self._notify("on_save", path=self.checkpoints.path(self.done))

    def _write(self) -> None:
        assert self.checkpoints is not None
        tensors, plain = self.descent.tensors()
        tensors.update(with_part("state", plain_state(self.state)))
        self.checkpoints.write(
            self.done,
            tensors,
            {
                "identity": self.identity,
                "done": self.done,
                "schedule": self.schedule.state(),
                "annealing": self.annealing.state(),
                "optimizer": plain,
                "history": self.history,
                "problem": self.fingerprint,
            },
        )

    def _restore(self, tensors: dict[str, Tensor], saved: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            found = saved["identity"].get(name, value)  # older checkpoints do not say all of it
            found = {**value, **found} if isinstance(value, dict) and isinstance(found, dict) else found
            if found != value:
                why = " (the learning rate's course is laid over all of them)" if name == "iterations" else ""
                raise ValueError(
                    f"this run has {name}={value!r}{why}, the checkpoint {found!r}; resume with "
                    "the same arguments, or use another checkpoint_dir."
                )
        assert self.checkpoints is not None
        load_tensors(self.state, part_of(tensors, "state"), self.checkpoints.folder, finite_buffers=False)
        self.descent.restore(tensors, saved["optimizer"])
        self.schedule.restore(saved["schedule"])
        self.annealing.restore(saved["annealing"])
        self.history, self.done = saved["history"], saved["done"]
        self.scores = [self._score(metrics) for metrics in self.history[self.annealing.iterations :]]
        self.run.iteration = max(0, self.done - 1)  # as it was when the checkpoint was written

    # ------------------------------------------------------------ the loop

    def train(self) -> Solution:
        self._notify("on_train_begin")
        try:
            # by time alone, no number of iterations is known
            known = None if self.plan.by_time else self.schedule.last
            measure, fresh = self.method.estimates or "objective", self.method.estimates is not None
            shown = self.plan.progress if ranks.leads() else False
            made = ProgressBar(known, self.method.name, shown, measure, latest=fresh)
            fixed = held_fixed(_fixed(self.problem, parameters_of(self.state)))
            with ranks.together(), self.interrupts, made as bar, fixed:
                if self.plan.reason is not None:
                    bar.note(f"{self.method.name}, chosen by recommend: {self.plan.reason}")
                finished = self.done > 0 and self.method.finished(self.state, self.run)  # resumed after its end
                while self.done < self.schedule.last and not finished:
                    elapsed = self.elapsed()
                    if elapsed >= 1:
                        self.out_of_time = True
                        break
                    self._iterate(elapsed)
                    bar.update(self.done, known if known is None else self.schedule.last, self.history[-1])
                    finished = self.method.finished(self.state, self.run) or self._good_enough()
        except BaseException as error:
            self._stop(error)
            if (found := self._interrupted(error)) is not None:
                return found
            raise
        if self.checkpoints is not None and self.done % self.plan.checkpoint_every:
            self._save()
        self._notify("on_train_end")
        return self._solution()

    def elapsed(self) -> float:
        """The part of the budget of time that has passed, by one clock; 0 where there is none."""
        if self.plan.budget is None:
            return 0.0
        return ranks.agreed((time.monotonic() - self.began) / self.plan.budget, "the time")

    def _iterate(self, elapsed: float) -> None:
        self.run.iteration = self.done
        self.whole = False
        self.descent.begin(self.schedule.factor(self.done, elapsed))
        annealing = self.annealing.active
        self.run.problem = self.target.at_temperature(self.problem.alpha / self.annealing.beta)
        with ranks.split_batches(self.method.splits):
            metrics = ranks.mean_numbers(self.method.step(self.state, self.run))
        if annealing:
            self._lower_temperature(metrics, elapsed)
        metrics["gradient_norm"] = self.descent.norm
        if not math.isnan(self.descent.farthest):
            metrics["kl_step"] = self.descent.farthest
        if self.method.residual:
            metrics["taken_back"] = float(self.descent.taken_back)
        self.history.append(metrics)
        if not annealing:
            self.scores.append(self._score(metrics))
            gain = Gain(metrics["gain"], metrics["gain_stderr"]) if "gain" in metrics else None
            self.schedule.observe(self.done, self.scores, gain)
        self.done += 1
        self.whole = True
        self.interrupts.check()
        self._notify("on_step_end")
        if self.checkpoints is not None and self.done % self.plan.checkpoint_every == 0:
            self._save()

    def _lower_temperature(self, metrics: dict[str, float], elapsed: float) -> None:
        """Anneal, and let the metrics of the iteration be those at the problem's own temperature."""
        alpha, paths = self.problem.alpha, self.run.batch_size * self.run.accumulate
        spread = metrics["objective_stderr"] * math.sqrt(paths) / alpha
        metrics["temperature"] = alpha / self.annealing.beta
        metrics["objective"] = metrics["reward"] - metrics["running_cost"] - alpha * metrics["kl"]
        for name in ("elbo", "elbo_stderr"):  # of the target at this temperature
            metrics.pop(name, None)
        self.annealing.observe(spread, max(elapsed, (self.done + 1) / self.schedule.last))
        if self.annealing.iterations == 1:  # gradients are as much larger as the reward is
            self.descent.level = None

    def _score(self, metrics: dict[str, float]) -> Score:
        alpha, paths = self.problem.alpha, self.run.batch_size * self.run.accumulate
        residual = -math.log(max(metrics["loss"], 1e-300)) if self.method.residual else math.nan
        objective, error = (metrics.get(name, math.nan) / alpha for name in ("objective", "objective_stderr"))
        spread = metrics.get("elbo_stderr", error) * math.sqrt(paths)
        elbo = metrics.get("elbo", math.nan)
        known = [v if math.isfinite(v) else math.nan for v in (objective, elbo)]  # paths of weight 0: none
        return Score(known[0], known[1], residual, spread)

    def _good_enough(self) -> bool:
        if self.plan.tolerance is None or self.done % self.evaluate_every:
            return False
        evaluation = self._solution().evaluate(seed=derive_seed(self.seed, Place.GOOD_ENOUGH, self.done))
        self._notify("on_evaluate", evaluation=evaluation)
        return evaluation.reliable and evaluation.gap.value < self.plan.tolerance

    def _stop(self, error: BaseException) -> None:
        """Keep the last good state: parameters change only after a whole iteration, so they are good."""
        self._notify("on_exception", exception=error)
        stopped = isinstance(error, (NonFiniteError, RewardError))
        if stopped:
            with contextlib.suppress(NonFiniteError):  # of a run that has nothing yet
                error.solution = self._solution()
        if isinstance(error, (NonFiniteError, RewardError)) and error.solution is not None:
            note = (
                f" Training stopped at iteration {self.done}; the last good solution is in this error's .solution"
                + (" and in the checkpoint." if self.checkpoints is not None else ".")
            )
            if isinstance(error, RewardError):
                error.note = note
            else:
                error.args = (f"{error.args[0]}{note}",)
        # an interrupt may come between the steps of one iteration, which a resumed run would take twice
        whole = self.whole or self.method.anytime
        good = stopped or (isinstance(error, KeyboardInterrupt) and whole)
        if self.checkpoints is not None and self.done and good:
            self._save(stopped=True)

    def _interrupted(self, error: BaseException) -> Solution | None:
        """What there is when a run is interrupted, where its method can say; else None."""
        if not (isinstance(error, KeyboardInterrupt) and self.method.anytime):
            return None
        self.out_of_time = True
        with contextlib.suppress(ValueError, RuntimeError):  # of too little
            found = self._solution()
            found.details["interrupted"] = True
            warn(
                f"{self.method.name} was interrupted after {self.done} iterations; this is the solution of what was "
                "done." + (" resume=True goes on with it." if self.checkpoints else ""),
                UserWarning,
                stacklevel=4,
            )
            return found
        return None

    def _notify(self, event: str, **more: Any) -> None:
        latest = self.history[-1] if self.history else {}
        done = self.done, self.schedule.last, latest, self.history
        state = TrainingState(*done, self._solution, self.identity, **more)
        notify(self.plan.callbacks, event, state)

    def _solution(self) -> Solution:
        """The solution so far: a copy, with the averaged weights."""
        state = copied(self.state)
        with torch.no_grad():
            for p, mean in zip(parameters_of(state), self.descent.averaged()):
                p.copy_(mean)
                p.grad = None
        made = self.method.solution(
            state,
            self.run,
            self.problem,
            method=self.method.name,
            settings=self.settings,
            history=list(self.history),
            seed=self.seed,
            reproducible=not self.out_of_time,
        )
        if self.plan.reason is not None:
            made.details["reason"] = self.plan.reason
        return _with_exact_values(made)


def _fixed(problem: ControlProblem, trained: Sequence[Tensor]) -> list[Tensor]:
    """The parameters of the user's modules but those that are ``trained``: a pre-trained model that is called beside
    its tuned copy would cost a backward pass of its own."""
    own = {id(p) for p in trained}
    return [p for module in problem.modules() for p in module.parameters() if id(p) not in own]


@dataclass
class _ExactValues:
    """What ``evaluate`` compares a solution with, in closed form, where its chain has one; looked for once."""

    solution: Solution
    found: tuple[dict[str, Any] | None] | None = None

    def __call__(self) -> dict[str, Any] | None:
        from ..exact import exact_solution

        if self.found is None:
            problem, known = self.solution.problem, {}
            with contextlib.suppress(NoExactSolution):
                known |= exact_solution(problem, like=self.solution, grids=False).known_values()
            if problem.reference.mixture is not None:
                with contextlib.suppress(NoExactSolution):
                    known["continuous_log_z"] = float(exact_solution(problem, grids=False).log_z)
            self.found = (known or None,)
        return self.found[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return _ExactValues, (self.solution,)


def _with_exact_values(solution: Solution) -> Solution:
    """Let ``evaluate`` measure the gap against the exact log Z of the solution's chain, where that is known in closed
    form."""
    solution._exact_values = _ExactValues(solution)
    return solution


def load(folder: Any, problem: ControlProblem, control: Any = None, value: Any = None) -> Solution:
    """Load a solution that ``solution.save`` wrote; see :func:`sdecontrol.evaluation.solution.load`."""
    return _with_exact_values(solutions.load(folder, problem, control, value))
