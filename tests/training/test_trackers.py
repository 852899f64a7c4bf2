"""Where metrics go beside the history."""

import json
import sys
import types
from typing import ClassVar

import pytest
import torch
from runs import quick, same

import sdecontrol as sc


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def images(**options):
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x, s):
            return self.gain * x

    sde = sc.generative_sde(Model(), sc.VP(), shape=(1, 4, 4))
    problem = sc.ControlProblem(sde, reward=lambda x: x.flatten(1).mean(1), start="fixed")
    return quick(problem, **{"time_steps": 3, "batch_size": 8, "iterations": 100, "control": "tuned", **options})


def test_a_line_for_each_iteration_says_what_the_history_says(tmp_path):
    solution = quick(iterations=4, report_to=f"jsonl:{tmp_path}")
    found = lines(tmp_path / "metrics.jsonl")
    assert [line.pop("iteration") for line in found] == [1, 2, 3, 4]
    for line, metrics in zip(found, solution.history):
        assert set(line) == set(metrics)
        assert all(line[n] == v or (line[n] is None and v != v) for n, v in metrics.items())


def test_of_a_resumed_run_every_iteration_has_one_line(tmp_path):
    class Stop:
        def on_step_end(self, state):
            if state.iteration == 5:
                raise KeyboardInterrupt

    saving = {"iterations": 8, "checkpoint_dir": tmp_path, "checkpoint_every": 2, "report_to": "jsonl"}
    with pytest.raises(KeyboardInterrupt):
        quick(callbacks=[Stop()], **saving)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"iteration": 6, "objective": 1.0}\n{"iterat')  # of a run that was killed later
    solution = quick(resume=True, **saving)
    assert [line["iteration"] for line in lines(path)] == [*range(1, 9)]
    assert [line["objective"] for line in lines(path)] == [metrics["objective"] for metrics in solution.history]


def test_lines_of_another_run_are_not_lost(tmp_path):
    quick(iterations=2, report_to=f"jsonl:{tmp_path}")
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="is of another run"):
        quick(iterations=2, report_to=f"jsonl:{tmp_path}")
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("name", ["log", "log_metrics"])
def test_trackers_of_one_s_own_get_all_metrics(name):
    seen = []

    class Own:
        def __getattr__(self, asked):
            if asked == name:
                return lambda metrics, step: seen.append((step, metrics))
            raise AttributeError(asked)

    solution = quick(iterations=3, report_to=Own())
    assert seen == [(k + 1, metrics) for k, metrics in enumerate(solution.history)]


def test_a_tracker_that_raises_warns_once_and_changes_nothing(tmp_path):
    class Broken:
        calls = 0

        def log(self, metrics, step):
            self.calls += 1
            metrics.clear()
            if step == 2:
                raise OSError("no space left")

    broken, plain = Broken(), quick(iterations=5)
    with pytest.warns(RuntimeWarning, match="Broken raised OSError: no space left") as caught:
        found = quick(iterations=5, report_to=[broken, f"jsonl:{tmp_path}"])
    assert len(caught) == 1 and broken.calls == 2
    assert same(plain, found) and plain.history == found.history and len(lines(tmp_path / "metrics.jsonl")) == 5


class Sbi:
    """The protocol of sbi's trackers."""

    log_dir = None

    def __init__(self, several=True):
        self.metrics, self.params, self.figures, self.flushed = {}, [], [], 0
        if several:
            self.log_metrics = lambda metrics, step=None: [self.log_metric(n, v, step) for n, v in metrics.items()]

    def log_metric(self, name, value, step=None):
        self.metrics[step, name] = value

    def log_params(self, params):
        self.params.append(params)

    def add_figure(self, name, figure, step=None):
        self.figures.append((name, figure, step))

    def flush(self):
        self.flushed += 1


@pytest.mark.parametrize("several", [True, False])
def test_sbi_s_trackers_get_settings_metrics_and_figures(several):
    tracker, plain = Sbi(several), images(iterations=4)
    solution = images(iterations=4, report_to=tracker, images_every=2)
    assert same(plain, solution) and plain.history == solution.history
    assert tracker.metrics == {(k + 1, n): v for k, m in enumerate(solution.history) for n, v in m.items()}
    assert [(name, step) for name, _, step in tracker.figures] == [("samples", 2), ("samples", 4)]
    shown = [axes.images[0].get_array() for axes in tracker.figures[-1][1].axes]
    wanted = (solution.sample(16, seed=0) / 2 + 0.5).clamp(0, 1)[:, 0]
    assert len(shown) == 16 and all(torch.allclose(torch.as_tensor(a.data), b) for a, b in zip(shown, wanted))
    (params,) = tracker.params
    assert params["method"] == "reward-backprop" and params["seed"] == solution.seed and params["batch_size"] == 8
    assert tracker.flushed == 1
    json.dumps(params)


def test_images_of_prompts_have_their_text_and_none_are_made_where_none_are_wanted():
    prompts = sc.Prompts(["dark", "bright"], lambda texts: torch.tensor([float(t == "bright") for t in texts]))

    def run(every):
        model = torch.nn.Module()
        model.forward = lambda x, s, y: x * (0.5 + 0 * y).reshape(-1, 1, 1, 1)
        sde = sc.generative_sde(model, sc.VP(), shape=(3, 4, 4))
        problem = sc.ControlProblem(sde, reward=lambda x, texts: x.flatten(1).mean(1), condition=prompts, start="fixed")
        tracker = Sbi()
        solution = quick(problem, sc.LogVariance(), time_steps=2, iterations=2, report_to=tracker, images_every=every)
        return tracker, solution

    tracker, solution = run(2)
    titles = [axes.get_title() for axes in tracker.figures[0][1].axes]
    assert titles == prompts.texts_of(solution.problem.draw_condition(16, 0)) and len(set(titles)) == 2
    assert not run(None)[0].figures
    assert {(1, "prompt/dark"), (2, "prompt/bright")} <= set(tracker.metrics)


def test_several_rewards_have_lines_of_their_own(tmp_path):
    parts = {"size": (0.5, lambda x: x[:, 0]), "shape": lambda x: -x.square().sum(1)}
    problem = sc.ControlProblem(sc.BrownianMotion(2), sc.Dirac(torch.zeros(2)), reward=sc.WeightedRewards(parts))
    solution = quick(problem, iterations=3, report_to=f"jsonl:{tmp_path}")
    for line, metrics in zip(lines(tmp_path / "metrics.jsonl"), solution.history):
        assert line["reward/size"] == metrics["reward/size"]
        assert 0.5 * line["reward/size"] + line["reward/shape"] == pytest.approx(line["reward"], abs=1e-5)


class Writer:
    """In place of TensorBoard's."""

    made: ClassVar[list] = []

    def __init__(self, folder):
        self.folder, self.scalars, self.pictures, self.closed = folder, [], [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def add_images(self, name, images, step):
        self.pictures.append((name, images, step))

    def close(self):
        self.closed = True


def test_tensorboard_gets_scalars_and_images(monkeypatch, tmp_path):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    plain, solution = images(), images(report_to="tensorboard", checkpoint_dir=tmp_path)
    assert same(plain, solution)
    writer = Writer.made.pop()
    assert writer.folder == str(tmp_path) and writer.closed
    assert writer.scalars == [(n, v, k + 1) for k, m in enumerate(solution.history) for n, v in m.items()]
    ((name, pictures, step),) = writer.pictures
    assert (name, step, pictures.shape) == ("samples", 100, (16, 1, 4, 4))
    assert float(pictures.min()) >= 0 and float(pictures.max()) <= 1


def test_wandb_is_offline_unless_asked(monkeypatch, tmp_path):
    calls = []
    run = types.SimpleNamespace(
        log=lambda metrics, step: calls.append((step, metrics)), finish=lambda: calls.append("finished")
    )
    module = types.ModuleType("wandb")
    module.init = lambda **options: calls.append(options) or run
    module.Image = lambda array, caption: (array.shape, caption)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    solution = images(report_to=f"wandb:{tmp_path / 'w'}")
    assert calls[0] == {"dir": str(tmp_path / "w"), "mode": "offline"} and (tmp_path / "w").is_dir()
    assert calls[1] == (1, solution.history[0]) and calls[-1] == "finished"
    assert (100, {"samples": [((4, 4, 1), None)] * 16}) in calls


BAD = {
    "an unknown name": ("mlflow", ValueError, "report_to 'mlflow'"),
    "no folder": ("jsonl", ValueError, "say where, 'jsonl:folder'"),
    "an object without a log": (object(), TypeError, "report_to must be one of jsonl"),
    "no tracker": (3, TypeError, "report_to must be one of jsonl"),
    "a package that is not there": ("wandb:x", ImportError, "pip install wandb"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_tracker_is_refused_before_the_run(name, monkeypatch):
    report_to, error, match = BAD[name]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(error, match=match):
        quick(iterations=1, report_to=report_to)
