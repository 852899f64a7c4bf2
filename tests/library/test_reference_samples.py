"""Reference samples: exact draws where there are any, long tempered runs with honest errors else, and a cache that is
whole or not used."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

import sdecontrol as sc
from sdecontrol.evaluation.estimates import Estimate
from sdecontrol.library import samples
from sdecontrol.library.samples import over_systems
from sdecontrol.library.target_base import Target

TINY: dict = {"systems": 6, "particles": 64, "moves": 2}


class Bell(Target):
    """N(mean, variances), times e^3, that tells nobody its samples."""

    name, version, dim = "bell", 1, 2
    mean, variances = torch.tensor([1.0, -2.0]), torch.tensor([4.0, 0.25])

    def __call__(self, x):
        self._check(x)
        square = ((x - self.mean.to(x)).square() / self.variances.to(x)).sum(1)
        return 3 - 0.5 * square - 0.5 * (2 * torch.pi * self.variances.to(x)).log().sum()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDECONTROL_CACHE", str(tmp_path))
    return tmp_path


def test_exact_draws_where_there_are_any(folder):
    target = sc.library.named_target("funnel")
    found = sc.library.reference_samples("funnel", 400, seed=3)
    assert torch.equal(found.x, target.sample(400, 3))
    assert found.exact and found.agree and found.log_z == Estimate(0.0, 0.0) and found.evaluations == 0
    assert found.log_density.value == pytest.approx(float(target(found.x).mean()), rel=1e-5)
    assert not list(folder.iterdir())  # nothing to keep


def test_long_runs_of_a_gaussian_are_within_their_stated_errors():
    bell = Bell()
    found = sc.library.reference_samples(bell, 2000, systems=12, particles=256, moves=4)
    assert not found.exact and found.agree and found.x.shape == (2000, 2)
    assert len(found.x.unique(dim=0)) == 2000  # copies have parted
    assert abs(found.log_z.value - 3) < 5 * found.log_z.stderr < 0.2
    entropy = 3 - 1 - 0.5 * float((2 * torch.pi * bell.variances).log().sum())  # E log density = 3 - H, H of a Gaussian
    assert abs(found.log_density.value - entropy) < 5 * found.log_density.stderr < 0.3
    assert bool(((found.mean - bell.mean).abs() < 5 * found.mean_stderr).all())
    # errors are about those of independent draws
    iid = (bell.variances / 2000).sqrt()
    assert bool((found.mean_stderr / iid < 3).all()) and bool((found.mean_stderr / iid > 0.4).all())
    assert float(found.x.var(0)[0]) == pytest.approx(4.0, rel=0.2)
    assert float(found.x.var(0)[1]) == pytest.approx(0.25, rel=0.2)


def test_errors_are_over_systems_not_over_draws():
    """n draws of M systems, each system with one value: the error is that of M numbers, however many draws."""
    generator = torch.Generator().manual_seed(0)
    each = torch.randn(40, 1, generator=generator, dtype=torch.float64)
    system = torch.arange(40).repeat_interleave(25)
    mean, error = over_systems(each[system], system, 40)
    assert float(mean) == pytest.approx(float(each.mean()))
    assert float(error) == pytest.approx(float(each.std()) / 40**0.5)
    # and of systems that gave different numbers of draws: the standard error of a ratio
    counts = torch.randint(1, 50, (40,), generator=generator)
    system = torch.arange(40).repeat_interleave(counts)
    mean, error = over_systems(each[system], system, 40)
    w = counts.double() / counts.sum()
    ratio = float((w * each[:, 0]).sum())
    assert float(mean) == pytest.approx(ratio)
    assert float(error) == pytest.approx(float(((w * (each[:, 0] - ratio)).square().sum() * 40 / 39).sqrt()))


def test_the_cache_gives_the_same_samples_for_the_same_settings_only(folder):
    first = sc.library.reference_samples(Bell(), 100, **TINY)
    again = sc.library.reference_samples(Bell(), 100, **TINY)
    assert not first.cached and again.cached
    assert torch.equal(first.x, again.x) and str(first) == str(again) and first.evaluations == again.evaluations > 0
    assert torch.equal(sc.library.reference_samples(Bell(), 100, **TINY, cache=False).x, first.x)  # the seed decides
    for other in ({"seed": 1}, {"n": 101}, {"moves": 3}, {"particles": 65}, {"systems": 7}):
        found = sc.library.reference_samples(Bell(), **{"n": 100, **TINY, **other})
        assert not found.cached and not torch.equal(found.x[:100], first.x)
    assert len(list(folder.glob("*.json"))) == 6


def test_a_named_target_without_a_sampler(folder):
    found = sc.library.reference_samples("dw-4", 64, systems=4, particles=32, moves=1)
    assert found.x.shape == (64, 6) and not found.exact and "tempered particles" in found.source
    (file,) = folder.glob("*.json")
    again = sc.library.reference_samples("dw-4", 64, systems=4, particles=32, moves=1)
    assert file.name.startswith("dw-4-1-") and again.cached


def test_another_version_of_a_target_is_another_file():
    old, new = Bell(), Bell()
    new.version, new.mean = 2, torch.tensor([5.0, 5.0])
    sc.library.reference_samples(old, 200, **TINY)
    found = sc.library.reference_samples(new, 200, **TINY)
    assert not found.cached and float((found.x.mean(0) - new.mean).abs().max()) < 1


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def _another(path: Path) -> None:
    path.write_bytes(bytes(reversed(path.read_bytes())))


@pytest.mark.parametrize(
    ("pattern", "damage"), [("*.safetensors", _cut), ("*.json", _cut), ("*.safetensors", _another)]
)
def test_a_damaged_cache_is_reported_and_made_again(folder, pattern, damage):
    first = sc.library.reference_samples(Bell(), 100, **TINY)
    (path,) = folder.glob(pattern)
    damage(path)
    with pytest.warns(RuntimeWarning, match="cache is damaged"):
        again = sc.library.reference_samples(Bell(), 100, **TINY)
    assert not again.cached and torch.equal(first.x, again.x)
    assert sc.library.reference_samples(Bell(), 100, **TINY).cached


def test_a_whole_file_of_something_else_is_no_cache(folder):
    """Checksums fit, but samples are missing, not finite, or of another target: never silently partial."""
    from sdecontrol.files.bundles import read_bundle, write_bundle

    first = sc.library.reference_samples(Bell(), 100, **TINY)
    (path,) = folder.glob("*.json")
    tensors, settings = read_bundle(folder, path.stem, "reference samples")
    settings = {k: v for k, v in settings.items() if k not in ("format", "tensors", "sha256", "settings_sha256")}
    gone = tensors["x"].clone()
    gone[3] = torch.nan
    for changed, other in (
        ({"x": tensors["x"][:60]}, {}),
        ({"x": gone}, {}),
        ({"log_z": tensors["log_z"][:3]}, {}),
        ({"system": tensors["system"] + 6}, {}),
        ({}, {"version": 2}),
    ):
        write_bundle(folder, path.stem, {**tensors, **changed}, {**settings, **other})
        with pytest.warns(RuntimeWarning, match="cache is damaged"):
            again = sc.library.reference_samples(Bell(), 100, **TINY)
        assert not again.cached and torch.equal(again.x, first.x)
    assert json.loads(path.read_text())["version"] == 1


@pytest.mark.parametrize(("spread", "agree"), [(0.1, True), (3.0, False)])
def test_systems_that_disagree_are_said_to(monkeypatch, spread, agree):
    """One system with all of Z: its samples are returned, and called no truth."""
    tensors = {
        "x": torch.randn(100, 2),
        "system": torch.arange(100) % 6,
        "log_z": spread * torch.tensor([0.0, 0.1, -0.2, 1.0, -1.0, 0.3]).double(),
        "log_density": torch.zeros(100).double(),
    }
    monkeypatch.setattr(samples, "make_samples", lambda *a: (tensors, {"evaluations": 1}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = sc.library.reference_samples(Bell(), 100, **TINY, cache=False)
    assert found.agree == agree and bool(caught) != agree and ("do not agree" in str(found)) != agree
    assert found.spread == pytest.approx(float(tensors["log_z"].std()))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("dw-5",), "dw-4"),
        (("dw-4", 1), "n must be"),
        (("dw-4", 100, -1), "seed"),
        (("dw-4", 100, 0, {"systems": 3}), "systems must be"),
        (("dw-4", 100, 0, {"particles": 8}), "particles must be"),
        (("dw-4", 100, 0, {"moves": -1}), "moves must be"),
    ],
)
def test_bad_input(arguments, what):
    more = arguments[3] if len(arguments) > 3 else {}
    with pytest.raises(ValueError, match=what):
        sc.library.reference_samples(*arguments[:3], **more)
    with pytest.raises(TypeError, match="a name or a Target"):
        sc.library.reference_samples(lambda x: -x.square().sum(1))
