"""What ``python -m build`` makes runs without the repository, and the lower bounds of the dependencies are true."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = ("sdecontrol", "theory_checks")

#: the library's own data, files and figures, and a problem from end to end
SCRIPT = """
import json, sys
import sdecontrol as sc
import theory_checks
import torch
task = sc.library.sequence_task("dna-8mer")
cards = [sc.library.problem_card(name).name for name in sc.library.problem_names()]
targets = [sc.library.target_card(name).name for name in sc.library.target_names()]
problem = sc.library.named_problem("ou-quadratic-easy")
solution = sc.solve(problem, "log-variance", time_steps=5, iterations=2, batch_size=64, seed=0, progress=False)
solution.save("saved")
same = torch.equal(solution.sample(8, seed=1), sc.load("saved", problem).sample(8, seed=1))
figure, _ = solution.plot(n=64, seed=0)
figure.savefig("paths.png")
x, y = torch.randn(64, 2), torch.randn(64, 2)
distances = [float(f(x, y)) for f in (sc.metrics.sliced_wasserstein, sc.metrics.sinkhorn, sc.metrics.wasserstein)]
print(json.dumps({
    "from": [sc.__file__, theory_checks.__file__], "tasks": task.naturalness(task.natural(64, seed=0)).kmer_correlation,
    "cards": len(cards) + len(targets), "same": same, "distances": distances,
}))
"""


def call(*command: object, cwd: Path, **environment: str) -> str:
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    own |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "COLUMNS": "80", "SDECONTROL_CACHE": str(cwd / "cache")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**own, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment that has the wheel, made from the source distribution, and for all else the
    packages that are here."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in OURS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    make = "from setuptools.build_meta import build_sdist; import sys; build_sdist(sys.argv[1])"
    call(sys.executable, "-c", make, folder, cwd=source)
    (packed,) = folder.glob("*.tar.gz")
    quiet = ("--quiet", "--no-deps", "--disable-pip-version-check")
    pip = (sys.executable, "-m", "pip")
    call(*pip, "wheel", *quiet, "--no-build-isolation", "--wheel-dir", folder, packed, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    binaries = environment / "bin"
    call(*pip, "--python", binaries / "python", "install", *quiet, wheel, cwd=folder)
    (site,) = environment.glob("lib/*/site-packages")
    # a line of a .pth file is a folder alone: the editable install of this repository is not followed
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return binaries


@pytest.mark.slow
def test_the_wheel_runs_without_the_repository(installed: Path, tmp_path: Path) -> None:
    assert PROJECT["version"] in call(installed / "sdecontrol", "--version", cwd=tmp_path)
    told = call(installed / "sdecontrol", "--help", cwd=tmp_path)
    assert all(command in told for command in ("demo", "solve", "sample", "compare", "design", "verify"))
    small = ("--method", "adjoint-matching", "--iterations", "2", "--time-steps", "5", "--paths", "64", "--json")
    solved = json.loads(call(installed / "sdecontrol", "solve", "ou-quadratic-easy", *small, cwd=tmp_path))
    assert solved["iterations"] == 2 and solved["exact"]["discretised"]["log_z"] < 0
    (tmp_path / "script.py").write_text(SCRIPT)
    made = json.loads(call(installed / "python", "script.py", cwd=tmp_path).splitlines()[-1])
    assert all(str(installed.parent) in place for place in made["from"]), made["from"]
    assert made["cards"] > 20 and made["same"] and (tmp_path / "paths.png").stat().st_size > 10_000
    checked = call(installed / "python", "-m", "theory_checks", "--only", "theorem-1-chain", cwd=tmp_path)
    assert "1 check" in checked


def lowest() -> dict[str, str]:
    """The oldest version of each dependency that ``pyproject.toml`` allows, but torch's."""
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in PROJECT["dependencies"])  # type: ignore
    bounds.pop("torch")  # gigabytes; tried by hand when its bound changes
    return bounds


@pytest.mark.slow
def test_the_oldest_dependencies_allowed_are_enough(installed: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    pins = [f"{name}=={version}" for name, version in lowest().items()]
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    try:
        call(*pip, "--no-deps", "--only-binary", ":all:", "--target", old, *pins, cwd=tmp_path)
    except AssertionError as error:
        if "ConnectionError" in str(error) or "NewConnectionError" in str(error):
            pytest.skip("no package registry is reached")
        raise
    (tmp_path / "script.py").write_text(SCRIPT)
    made = json.loads(call(installed / "python", "script.py", cwd=tmp_path, PYTHONPATH=str(old)).splitlines()[-1])
    assert made["same"] and len(made["distances"]) == 3
    for command in ("--help", "solve --help", "sample --help", "verify --help"):
        call(installed / "sdecontrol", *command.split(), cwd=tmp_path, PYTHONPATH=str(old))
    small = ("--iterations", "2", "--time-steps", "5", "--paths", "64", "--figure", "found.png")
    told = call(installed / "sdecontrol", "compare", "ou-quadratic-easy", "--methods", "adjoint-matching,smc", *small,
                cwd=tmp_path, PYTHONPATH=str(old))  # fmt: skip
    assert "adjoint-matching" in told
