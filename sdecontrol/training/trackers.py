"""Where the metrics of a run go beside its history: files of JSON lines, TensorBoard, Weights & Biases, or a tracker of
yours. A run is the same to the bit with and without them."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from torch import Tensor

from .. import ranks
from ..errors import check_name, warn
from ..problems.prompts import Prompts
from .callbacks import Callback, TrainingState

TRACKERS = ("jsonl", "tensorboard", "wandb")
_IMAGES = 16


class JsonLines:
    """A line ``{"iteration": ..., "loss": ..., ...}`` for each iteration in ``metrics.jsonl``; a number that is not
    finite is null. A resumed run begins with the lines of its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def begin(self, history: Sequence[dict[str, float]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(self._line(m, k + 1) for k, m in enumerate(history)), encoding="utf-8")

    def _line(self, metrics: dict[str, float], step: int) -> str:
        plain = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        return json.dumps({"iteration": step, **plain}) + "\n"

    def log(self, metrics: dict[str, float], step: int) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(metrics, step))


class TensorBoard:
    """Scalars and images in a folder that ``tensorboard --logdir`` reads."""

    def __init__(self, folder: Path) -> None:
        self._writer = _imported("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder))

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def images(self, images: Tensor, titles: Sequence[str], step: int) -> None:
        self._writer.add_images("samples", images, step)

    def finish(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, offline unless WANDB_MODE says otherwise."""

    def __init__(self, folder: Path) -> None:
        self._wandb = _imported("wandb", "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        self._run = self._wandb.init(dir=str(folder), mode=os.environ.get("WANDB_MODE", "offline"))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def images(self, images: Tensor, titles: Sequence[str], step: int) -> None:
        pairs = zip(images, titles or [None] * len(images))
        pictures = [self._wandb.Image(image.movedim(0, -1).numpy(), caption=title) for image, title in pairs]
        self._run.log({"samples": pictures}, step=step)

    def finish(self) -> None:
        self._run.finish()


def _imported(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"report_to={package!r} needs it; pip install {package}.") from error


def picture_figure(images: Tensor, titles: Sequence[str] = ()) -> Any:
    """Images ``(n, 1 or 3, height, width)`` in [0, 1] side by side, as a figure of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = math.ceil(math.sqrt(len(images)))
    figure: Any = Figure(figsize=(1.5 * across, 1.6 * math.ceil(len(images) / across)), layout="constrained")
    FigureCanvasAgg(figure)
    for i, image in enumerate(images):
        axes = figure.add_subplot(math.ceil(len(images) / across), across, i + 1)
        axes.imshow(image.movedim(0, -1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_axis_off()
        if titles:
            axes.set_title(shorten(titles[i], 24), fontsize=7)
    return figure


class Reporting(Callback):
    """Hands metrics to a tracker, and images of samples every so many iterations; one that raises is told of once, and
    not asked again."""

    def __init__(self, tracker: Any, images_every: int | None) -> None:
        self.tracker, self._log, self._every = tracker, _log_function(tracker), images_every
        self._failed = False
        self._pictures = _image_function(tracker)  # None where it takes none, or samples are none

    def _show(self, state: TrainingState) -> None:
        assert state.solution is not None
        solution = state.solution()
        y = solution.problem.draw_condition(_IMAGES, 0)
        x = solution.sample(_IMAGES, seed=0, condition=y)
        if not (x.is_floating_point() and x.ndim == 4 and x.shape[1] in (1, 3)):
            self._pictures = None
            return
        prompts = solution.problem.condition
        titles = prompts.texts_of(y) if isinstance(prompts, Prompts) else ()
        self._try(self._pictures, (x.float().cpu() / 2 + 0.5).clamp(0, 1), titles, state.iteration)

    def _try(self, function: Any, *arguments: Any, **named: Any) -> None:
        if self._failed or function is None:
            return
        try:
            function(*arguments, **named)
        except Exception as error:
            self._failed = True
            warn(
                f"report_to: {type(self.tracker).__name__} raised {type(error).__name__}: {error}; it gets no more of "
                "this run, which goes on."
            )

    def on_train_begin(self, state: TrainingState) -> None:
        self._try(getattr(self.tracker, "begin", None), state.history)
        self._try(getattr(self.tracker, "log_params", None), dict(state.settings))

    def on_step_end(self, state: TrainingState) -> None:
        self._try(self._log, dict(state.metrics), step=state.iteration)
        due = self._every is not None and state.iteration % self._every == 0
        if due and self._pictures is not None and not self._failed:
            with ranks.alone():  # of several processes, one reports
                self._show(state)

    def on_exception(self, state: TrainingState) -> None:
        self._try(getattr(self.tracker, "finish", None))

    def on_train_end(self, state: TrainingState) -> None:
        self._try(getattr(self.tracker, "finish", None) or getattr(self.tracker, "flush", None))


def _log_function(tracker: Any) -> Any:
    """``(metrics, step=)`` of accelerate's and wandb's protocol, or of sbi's."""
    for name in ("log", "log_metrics"):
        if callable(getattr(tracker, name, None)):
            return getattr(tracker, name)
    one = getattr(tracker, "log_metric", None)
    if callable(one):
        return lambda metrics, step: [one(name, value, step=step) for name, value in metrics.items()]
    raise TypeError(
        f"report_to must be one of {', '.join(TRACKERS)}, with a folder after a colon ('jsonl:runs/first'), or an "
        f"object with log(metrics, step=) or log_metrics(metrics, step=), got {type(tracker).__name__}."
    )


def _image_function(tracker: Any) -> Any:
    """``(images, titles, step)``, by the tracker's own ``images`` or sbi's ``add_figure``; None where it takes none."""
    if callable(getattr(tracker, "images", None)):
        return tracker.images
    add = getattr(tracker, "add_figure", None)
    if not callable(add):
        return None
    return lambda images, titles, step: add("samples", picture_figure(images, titles), step=step)


def reporting(report_to: Any, checkpoint_dir: Any, resume: bool, images_every: int | None) -> list[Reporting]:
    """Callbacks that hand a run's metrics to what ``report_to`` names; of several processes, in the first.

    Raises:
        ValueError: an unknown name, no folder, or one with the lines of another run. TypeError: no tracker.
        ImportError: its package is not installed.
    """
    if report_to is None:
        return []
    several = report_to if isinstance(report_to, Sequence) and not isinstance(report_to, str) else [report_to]
    made = {"jsonl": JsonLines, "tensorboard": TensorBoard, "wandb": Wandb}
    found = []
    for one in several:
        if isinstance(one, str):
            name, _, folder = one.partition(":")
            check_name("report_to", name, TRACKERS)
            if not folder and checkpoint_dir is None:
                raise ValueError(f"report_to={one!r}: say where, '{one}:folder', or give checkpoint_dir.")
            if not ranks.leads():
                continue
            one = made[name](Path(folder or checkpoint_dir))
            if isinstance(one, JsonLines) and one.path.exists() and not resume:
                raise ValueError(
                    f"report_to={report_to!r}: {one.path} is of another run; give another folder, or move it."
                )
        found.append(Reporting(one, images_every))
    return found if ranks.leads() else []
