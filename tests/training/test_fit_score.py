"""``fit_score``: the fitted predictions against the exact ones of a Gaussian; seeds; bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import slow_but
from torch import Tensor, nn

import sdecontrol as sc
from sdecontrol.processes.generative import noise_coefficients

COV = torch.tensor([[1.0, 0.6], [0.6, 0.5]])
MEAN = torch.tensor([1.0, -0.5])
SCHEDULES = {"vp": sc.VP(), "cosine": sc.CosineVP(), "ve": sc.VE(0.01, 20.0), "flow": sc.FlowMatching()}
PREDICTIONS = ("noise", "sample", "score", "v", "velocity")


def gaussian_data(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return MEAN + torch.randn(n, 2, generator=generator) @ torch.linalg.cholesky(COV).mT


def exact_noise(x: Tensor, s: float, schedule) -> Tensor:
    time = torch.tensor(s, dtype=torch.float64)
    mu, std = float(schedule.mu(time)), float(schedule.std(time))
    return std * torch.linalg.solve(mu**2 * COV + std**2 * torch.eye(2), (x - mu * MEAN).mT).mT


def error_against_exact(model: nn.Module, schedule, prediction: str) -> float:
    """Largest root mean square error of the noise that the prediction implies, over noise levels, on states there."""
    worst = 0.0
    for s in (0.02, 0.1, 0.3, 0.6, 0.9):
        time = torch.tensor([s], dtype=torch.float64)
        mu, std = schedule.mu(time), schedule.std(time)
        generator = torch.Generator().manual_seed(2)
        x = float(mu) * gaussian_data(2000) + float(std) * torch.randn(2000, 2, generator=generator)
        clock = schedule.model_time(time).float().expand(2000)
        a, b = noise_coefficients(
            prediction, mu, std, schedule.log_mu_slope(time), schedule.forward_variance_rate(time)
        )
        with torch.no_grad():
            eps = float(a) * x + float(b) * model(x, clock)
        worst = max(worst, float((eps - exact_noise(x, s, schedule)).square().mean().sqrt()))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        pytest.param(schedule, prediction, marks=() if schedule == "vp" or prediction == "noise" else pytest.mark.slow)
        for schedule, prediction in itertools.product(SCHEDULES, PREDICTIONS)
    ],
)
def test_default_model_recovers_the_noise_of_a_gaussian(schedule: str, prediction: str) -> None:
    model = sc.fit_score(gaussian_data(4096), SCHEDULES[schedule], prediction, iterations=100, seed=0)
    assert not model.training
    assert error_against_exact(model, SCHEDULES[schedule], prediction) < 0.1


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("copies", [1, 7])
def test_one_datum_is_what_its_model_samples(prediction: str, copies: int) -> None:
    data = torch.tensor([[1.0, -2.0]]).expand(copies, 2)
    model = sc.fit_score(data, sc.VP(), prediction, iterations=2, seed=0)
    problem = sc.ControlProblem(sc.generative_sde(model, sc.VP(), prediction, shape=(2,)))
    x = sc.simulate(problem, 256, seed=1, keep="end").samples
    # the last of 100 steps adds noise of variance beta_min/100 = 0.03^2 and of its slope
    assert float((x - data[0]).mean(0).abs().max()) < 0.02 and float(x.std()) > 0.01
    assert float((x - data[0]).abs().max()) < 0.4


@pytest.mark.parametrize(
    "schedule, mean, sd", slow_but([("ve", 50.0, 1.0), ("vp", -2e3, 1e2), ("flow", 500.0, 60.0)], ("vp", -2e3, 1e2))
)
def test_data_that_do_not_suit_the_schedule_are_named(schedule: str, mean: float, sd: float) -> None:
    """Generation starts from N(0, start_std^2); with the start that the warning names samples are right."""
    noise, kind = SCHEDULES[schedule], "velocity" if schedule == "flow" else "noise"
    data = mean + sd * torch.randn(1024, 2, generator=torch.Generator().manual_seed(3))
    with pytest.warns(UserWarning, match=r"do not suit the schedule.*nats from N\(0, "):
        model = sc.fit_score(data, noise, kind, iterations=1, seed=0)  # the Gaussian of mean and covariance
    sde = sc.generative_sde(model, noise, kind, shape=(2,))
    end = torch.tensor(noise.noise_end, dtype=torch.float64)
    mu, std = float(noise.mu(end)), float(noise.std(end))
    start = sc.Gaussian(mu * data.mean(0), mu**2 * data.var(0) + std**2)
    off = {}
    for name, initial in (("own", None), ("named", start)):
        problem = sc.ControlProblem(sde, initial, start="fixed")
        x = sc.simulate(problem, 1024, time_steps=50, scheme="probability-flow", seed=1, keep="end").samples
        off[name] = max(float((x.mean(0) - mean).abs().max()) / sd, float((x.std(0) / sd - 1).abs().max()))
    assert off["named"] < 0.15 < off["own"]  # 1024 draws: 0.15 is 4.8 standard errors of a mean


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_data_that_suit_the_schedule_are_not(schedule: str, recwarn: pytest.WarningsRecorder) -> None:
    generator = torch.Generator().manual_seed(3)
    for data in (gaussian_data(64), torch.rand(64, 1, 8, 8, generator=generator), torch.zeros(2, 3)):
        sc.fit_score(data, SCHEDULES[schedule], iterations=1, seed=0)
    assert not [w for w in recwarn if "do not suit" in str(w.message)]


class Plain(nn.Module):
    """A network without any preconditioning, as a user might write it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        assert s.shape == (len(x),)
        return self.layers(torch.cat((x, s[:, None]), 1))


@pytest.mark.parametrize("prediction", slow_but(["noise", "velocity", "v"], "noise"))
def test_a_users_model_learns_and_a_copy_is_trained(prediction: str) -> None:
    mine = Plain()
    before = [p.clone() for p in mine.parameters()]
    model = sc.fit_score(gaussian_data(4096), sc.VP(), prediction, mine, iterations=1500, learning_rate=5e-3, seed=0)
    assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), before)) and isinstance(model, Plain)
    limit = 0.25 if prediction == "noise" else 0.35
    assert error_against_exact(model, sc.VP(), prediction) < limit


def test_same_seed_same_weights_and_the_global_generator_is_left_alone() -> None:
    data, state = gaussian_data(256), torch.get_rng_state()
    runs = [sc.fit_score(data, sc.VP(), iterations=20, seed=s).state_dict() for s in (3, 3, 4)]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    assert any(not torch.equal(runs[0][k], runs[2][k]) for k in runs[0])


def test_events_of_any_shape_and_float64() -> None:
    data = torch.randn(128, 2, 3, dtype=torch.float64)
    model = sc.fit_score(data, sc.VP(), iterations=2, batch_size=16, seed=0)
    sde = sc.generative_sde(model, sc.VP(), shape=(2, 3))
    problem = sc.ControlProblem(sde, reward=lambda x: x.flatten(1).sum(1))
    assert sc.simulate(problem, 4, time_steps=5, seed=0).samples.shape == (4, 2, 3)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    mixed = model(x, torch.full((5,), 0.3, dtype=torch.float64))  # a time per row, or one for all: the same
    assert torch.allclose(mixed, model(x, torch.tensor(0.3, dtype=torch.float64).expand(5)), atol=1e-12)


@pytest.mark.slow
def test_samples_have_the_law_of_the_data() -> None:
    data = gaussian_data(4096)
    model = sc.fit_score(data, sc.VP(), iterations=100, seed=0)
    problem = sc.ControlProblem(sc.generative_sde(model, sc.VP(), shape=(2,)), reward=lambda x: x[:, 0])
    x = sc.simulate(problem, 2048, time_steps=100, seed=0, keep="end").samples
    assert (x.mean(0) - MEAN).abs().max() < 4 / math.sqrt(2048) + 0.03
    assert (torch.cov(x.mT) - COV).abs().max() < 0.12


def labelled_data(n: int) -> tuple[Tensor, Tensor]:
    """Two Gaussian classes of shares 1/4 and 3/4, means -2 and 2 in the first coordinate, and covariance 0.25 I."""
    generator = torch.Generator().manual_seed(3)
    y = (torch.rand(n, generator=generator) < 0.75).long()
    x = 0.5 * torch.randn(n, 2, generator=generator)
    x[:, 0] += 4.0 * y - 2
    return x, y


def noise_of_labelled(x: Tensor, s: float, y: int | None) -> Tensor:
    means = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
    index = [0, 1] if y is None else [y]
    weights = torch.tensor([0.25, 0.75])[index]
    law = sc.GaussianMixture(weights / weights.sum(), means[index], 0.25 * torch.eye(2).expand(len(index), 2, 2))
    time = torch.tensor(s, dtype=torch.float64)
    mu, std = float(sc.VP().mu(time)), float(sc.VP().std(time))
    return -std * law.noised(mu, std).score(x)


class PlainConditional(Plain):
    """Labels 0 and 1, and 2 for none, as a user might write it."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(3, 3)

    def forward(self, x: Tensor, s: Tensor, y: Tensor) -> Tensor:
        return self.layers(torch.cat((x, s[:, None]), 1) + self.labels(y))


@pytest.mark.slow
@pytest.mark.parametrize("own", slow_but([False, True], False), ids=["default network", "a user's"])
def test_with_dropped_labels_one_model_is_the_conditional_and_the_unconditional_one(own: bool) -> None:
    """Root mean square errors of the noise, of size 1, at every label and without one; unconditional noise in a label's
    place is off by 0.6 (label 0) and 0.3 (label 1) at these times."""
    x, y = labelled_data(4096)
    given = PlainConditional() if own else None
    iterations, rate = (2000, 5e-3) if own else (300, 2e-3)
    model = sc.fit_score(
        x, sc.VP(), model=given, condition=y, drop=0.3, iterations=iterations, learning_rate=rate, seed=0
    )
    for label in (0,) if own else (0, 1, None):
        for s in (0.3, 0.4):
            time = torch.tensor(s, dtype=torch.float64)
            some = x[y == label][:500] if label is not None else x[:1000]
            generator = torch.Generator().manual_seed(5)
            noisy = float(sc.VP().mu(time)) * some + float(sc.VP().std(time)) * torch.randn(
                some.shape, generator=generator
            )
            clock = torch.full((len(some),), s)
            with torch.no_grad():
                found = model(noisy, clock, torch.full((len(some),), 2 if label is None else label))
                if label is None and not own:
                    assert torch.equal(found, model(noisy, clock))
            assert (found - noise_of_labelled(noisy, s, label)).square().mean().sqrt() < (0.3 if own else 0.15)


@pytest.mark.slow
def test_numbers_as_conditions() -> None:
    """Data ``y + N(0, 1/4)``: without y its noise is another."""
    generator = torch.Generator().manual_seed(0)
    y = 2 * torch.randn(4096, 1, generator=generator)
    x = y + 0.5 * torch.randn(4096, 1, generator=generator)
    model = sc.fit_score(x, sc.VP(), condition=y, iterations=300, seed=0)
    s = torch.tensor(0.3, dtype=torch.float64)
    mu, std = float(sc.VP().mu(s)), float(sc.VP().std(s))
    noisy = mu * x + std * torch.randn(x.shape, generator=generator)
    with torch.no_grad():
        found = model(noisy, torch.full((4096,), 0.3), y)
    exact = std * (noisy - mu * y) / (mu**2 / 4 + std**2)
    assert (found - exact).square().mean().sqrt() < 0.15
    with pytest.raises(ValueError, match="no unconditional part"):
        model(noisy, torch.full((4096,), 0.3))


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"data": torch.zeros(5)}, ValueError, "data must have shape"),
        ({"data": torch.full((5, 2), float("nan"))}, ValueError, "data has 10 non-finite"),
        ({"data": torch.zeros(5, 2, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"schedule": "vp"}, TypeError, "schedule must be a noise schedule"),
        ({"prediction": "nois"}, ValueError, "'noise'"),
        ({"iterations": 0}, ValueError, "iterations must be an int >= 1"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be > 0"),
        ({"model": nn.Flatten()}, ValueError, "no trainable parameters"),
        ({"model": lambda x, s: x}, TypeError, "model must be an nn.Module"),
        ({"drop": 0.1}, ValueError, "there is no condition"),
        ({"condition": torch.arange(5), "drop": 1.0}, ValueError, "below 1"),
        ({"condition": torch.zeros(5), "drop": 0.1}, ValueError, "integer labels"),
        ({"condition": torch.arange(4)}, ValueError, "one for each"),
        ({"condition": torch.arange(5) - 1}, ValueError, "labels 0, 1"),
        ({"condition": [0, 1, 2, 3, 4]}, TypeError, "condition must be a tensor"),
        ({"condition": torch.full((5,), float("nan"))}, ValueError, "condition has 5 non-finite"),
    ],
)
def test_bad_input(change: dict, kind: type, match: str) -> None:
    arguments = {"data": torch.randn(5, 2), "schedule": sc.VP(), "iterations": 1, **change}
    with pytest.raises(kind, match=match):
        sc.fit_score(arguments.pop("data"), arguments.pop("schedule"), **arguments)
