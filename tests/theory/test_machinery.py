"""The machinery cannot be fooled: no check without a control, no nan that passes, no control that slips through."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sdecontrol as sc
from theory_checks import Measurement, Setting, check, registry, run_check, runner
from theory_checks.command import main, verify_command
from theory_checks.executed import codes_of
from theory_checks.gaussian import Joint, gaussian_kl, path_law
from theory_checks.page import EQUATIONS, page
from theory_checks.record import Record, run_of
from theory_checks.registry import compare, order, p_value, select, within
from theory_checks.report import as_dict, check_as_dict, markdown, outcome_of, problems


@pytest.fixture
def own_registry(monkeypatch):
    registry.all_checks()
    monkeypatch.setattr(registry, "CHECKS", dict(registry.CHECKS))


def _register(controls=("broken",), function=None, **options):
    def holds(setting, defect):
        """Zero is zero."""
        yield within("zero", 1.0 if defect == "broken" else 0.0, 0.5)

    check("own", "own", controls=controls, **options)(function or holds)
    return registry.CHECKS["own"]


@pytest.mark.parametrize("controls", [(), ("",)])
def test_a_check_without_a_control_is_refused(own_registry, controls):
    with pytest.raises(ValueError, match="no negative control"):
        _register(controls)


def test_a_check_without_a_statement_is_refused(own_registry):
    with pytest.raises(ValueError, match="no docstring"):
        _register(function=lambda setting, defect: iter(()))


def test_what_a_check_says_that_it_tests_must_have_run(own_registry):
    names = ("sdecontrol.LinearSDE", "sdecontrol.simulate", "sdecontrol.exact_solution.value", "sdecontrol.LogVariance")

    def settings_alone(setting, defect):
        """A process and a method are made; nothing is simulated, and no value asked for."""
        process = sc.LinearSDE(torch.eye(2), torch.eye(2))
        assert sc.LogVariance() and process
        yield within("zero", float(bool(defect)), 0.5)

    outcome = run_check(_register(function=settings_alone, implements=names), Setting())
    assert (
        not outcome.holds
        and "tests sdecontrol.simulate, sdecontrol.exact_solution.value, sdecontrol.LogVariance" in (outcome.error)
    )


def test_watching_ends_with_the_check(own_registry):
    def breaks(setting, defect):
        """Breaks down."""
        raise ValueError("oh")
        yield

    assert "oh" in run_check(_register(function=breaks, implements=("sdecontrol.simulate",)), Setting()).error
    assert sys.getprofile() is None


@pytest.mark.parametrize("name", sorted({n for c in registry.all_checks() for n in c.implements}))
def test_every_name_has_code(name):
    assert codes_of(name)


def test_a_name_is_taken_once(own_registry):
    _register()
    with pytest.raises(ValueError, match="two checks"):
        _register()


def test_a_control_that_passes_fails_the_check(own_registry):
    outcome = run_check(_register(("broken", "harmless")), Setting())
    assert outcome.holds and not outcome.passed
    assert problems([outcome]) == ["own: the negative control 'harmless' passes"]


def test_a_control_that_breaks_down_is_no_failure_of_the_statement(own_registry):
    def fragile(setting, defect):
        """Breaks down on its control."""
        if defect:
            raise RuntimeError("oh")
        yield within("zero", 0.0, 0.5)

    outcome = run_check(_register(function=fragile), Setting())
    assert outcome.holds and not outcome.passed and "oh" in problems([outcome])[0]


def test_a_check_that_breaks_down_does_not_hold(own_registry):
    def broken(setting, defect):
        """Always breaks down."""
        raise RuntimeError("oh")
        yield

    assert not run_check(_register(function=broken), Setting()).holds


def test_statistical_tests_are_counted(own_registry):
    def tests(setting, defect):
        """Two where one is declared."""
        yield p_value("a", 0.5)
        yield p_value("b", 0.5)

    assert "declares 1" in run_check(_register(function=tests, tests=1), Setting()).error


def test_p_values_share_the_family_wise_error():
    total = sum(c.tests for c in registry.all_checks())
    checks = [c for c in registry.all_checks() if c.name == "sampled-fixed-start"]
    shares = {m.tolerance for m in checks[0].measure(Setting()) if m.kind == "p"}
    assert shares == {registry.FAMILY_WISE_ERROR / total}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_fails(value):
    assert not Measurement("x", value, 1.0).passed
    assert not compare("x", torch.tensor([value]), [1.0]).passed
    assert not Measurement("x", float("nan"), 1e-6, "p").passed


def test_order_is_a_slope():
    h = np.array([0.1, 0.05, 0.025, 0.0125])
    assert order("o", h, 3 * h).passed and not order("o", h, 3 * h**1.3).passed and not order("o", h, 3 + h).passed


def test_only_must_fit_something():
    assert [c.name for c in select(["theorem-2-chain"])] == ["theorem-2-chain"]
    with pytest.raises(ValueError, match="no check is named like 'theorem-9'"):
        select(["theorem-9"])


def test_dense_gaussians_agree_with_sampling():
    rng = np.random.default_rng(0)
    A = rng.normal(size=(2, 2))
    law = path_law(np.ones(2), np.eye(2), [(A, np.zeros(2), 0.5 * np.eye(2))])
    x0 = 1 + rng.normal(size=(400_000, 2))
    x1 = x0 @ A.T + 0.5 * rng.normal(size=x0.shape)
    assert np.abs(np.cov(np.concatenate([x0, x1], 1).T) - law.cov).max() < 0.05
    P = 0.3 * np.eye(2)
    tilted, log_z = law.of(1).tilted(P, np.ones(2))
    w = np.exp(-0.15 * (x1**2).sum(1) + x1.sum(1))
    assert abs(np.log(w.mean()) - log_z) < 0.05 and np.abs(w @ x1 / w.sum() - tilted.mean).max() < 0.05
    assert gaussian_kl(tilted, tilted) == pytest.approx(0, abs=1e-12)
    assert gaussian_kl(Joint(np.zeros(1), np.eye(1), 1), Joint(np.ones(1), np.eye(1), 1)) == pytest.approx(0.5)


def _command(*arguments):
    import typer

    app = typer.Typer()
    app.command()(verify_command)
    return CliRunner().invoke(app, list(arguments))


def test_command_reports_and_exits(tmp_path):
    target = tmp_path / "table.md"
    result = _command("--only", "erratum-3-variance", "--markdown", str(target), "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert answer["passed"] and answer["checks"][0]["controls"][0]["caught"]
    assert "erratum-3-variance" in target.read_text()
    assert callable(main)


def test_command_fails_with_a_broken_library(monkeypatch):
    import sdecontrol as sc

    monkeypatch.setattr(sc.VP, "std", lambda self, s: torch.sqrt(1 - torch.exp(-0.5 * self._integral(s))))
    result = _command("--only", "erratum-3-variance")
    assert result.exit_code == 1 and "FAIL" in result.stdout


def test_command_refuses_unknown_checks():
    assert _command("--only", "theorem-9").exit_code == 2


TWO = ("--only", "erratum-3-variance", "--only", "erratum-27-exponent")


def test_a_recorded_run_goes_on_where_it_was(tmp_path, monkeypatch):
    """What passed is not run again; what failed, or was cut off while it was written, is; the report is of all."""
    file, table, ran = tmp_path / "run.jsonl", tmp_path / "table.md", []
    assert _command(*TWO, "--workers", "1", "--record", str(file)).exit_code == 0
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    failed = json.dumps({**second, "passed": False}) + "\n"
    file.write_text(json.dumps(first) + "\n" + failed + json.dumps(second)[:99])
    true = runner.run_check
    monkeypatch.setattr(runner, "run_check", lambda check, *a: ran.append(check.name) or true(check, *a))
    result = _command(*TWO, "--record", str(file), "--markdown", str(table), "--json")
    assert result.exit_code == 0 and ran == [second["name"]]
    assert [json.loads(line)["name"] for line in file.read_text().splitlines()] == [first["name"], second["name"]]
    checks = json.loads(result.stdout)["checks"]
    assert checks[[c["name"] for c in checks].index(first["name"])] == {k: v for k, v in first.items() if k != "run"}
    assert first["name"] in table.read_text() and first["run"]["sources"] in table.read_text()


@pytest.mark.parametrize("other", [{"seed": 3}, {"thorough": True}, {"sources": "0"}, {"controls": False}])
def test_a_record_of_another_run_is_refused(tmp_path, other):
    file = tmp_path / "run.jsonl"
    mine = run_of(Setting(), True)
    outcome = run_check(select(["erratum-3-variance"])[0], Setting())
    Record(file, mine).add(outcome)
    assert Record(file, mine).known == {outcome.name: outcome}
    with pytest.raises(ValueError, match=f"another run.*{next(iter(other))}.*another file, or delete"):
        Record(file, {**mine, **other})
    if "seed" in other:
        assert _command("--seed", "3", "--only", "erratum-3-variance", "--record", str(file)).exit_code == 2


def test_what_broke_down_or_is_not_finite_is_so_after_it_was_kept(own_registry):
    def one(setting, defect):
        """A number that is not finite, and a control that breaks down."""
        if defect:
            raise RuntimeError("oh")
        yield within("nothing", float("inf"), 0.5)

    outcome = run_check(_register(function=one), Setting())
    again = outcome_of(json.loads(json.dumps(check_as_dict(outcome))))
    assert not again.passed and again.controls == outcome.controls and again.worst and again.worst.severity == np.inf


KILLED = """
import os, signal
from theory_checks import Setting, select
from theory_checks.runner import run
if __name__ == "__main__":
    kill = lambda outcome: os.kill(os.getpid(), signal.SIGKILL)
    run(select(["erratum-3-variance", "erratum-27-exponent", "markov-chains"]), Setting(), workers=2, progress=kill)
"""


@pytest.mark.slow
def test_no_worker_outlives_its_run(tmp_path):
    """They hold its standard output: the pipe ends when the last of them has."""
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr


def test_report_formats(own_registry):
    outcome = run_check(_register(), Setting())
    assert "| ok |" in markdown([outcome])
    assert json.dumps(as_dict([outcome], 0))


def test_figure(tmp_path):
    from theory_checks.figure import draw

    _, axes = draw(tmp_path / "f.png")
    assert len(axes) == 3 and (tmp_path / "f.png").stat().st_size > 10_000


def test_page_is_up_to_date_and_complete():
    from pathlib import Path

    text = page()
    assert "**no check**" not in text
    for number in range(1, 46):
        assert f"[{number}]" in EQUATIONS
    committed = Path(__file__).parents[2] / "docs" / "theory.md"
    assert committed.read_text(encoding="utf-8").rstrip() == text.rstrip(), (
        "docs/theory.md is stale: python -m theory_checks --docs docs/theory.md"
    )
