"""Whether a target has several ways that the reference's paths do not part into."""

from __future__ import annotations

import pytest
import torch

import sdecontrol as sc
from sdecontrol.comparison.ways import smaller_way, valley


def numbers(kind: str, n: int = 512) -> torch.Tensor:
    """Quantiles, so that nothing is left to chance."""
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    normal, count = torch.distributions.Normal(0.0, 1.0), int(0.2 * n)
    both = [
        m + s * normal.icdf((torch.arange(k) + 0.5).double() / k) for m, s, k in ((-3, 0.5, count), (3, 1, n - count))
    ]
    return {
        "normal": normal.icdf(p),
        "exponential": -torch.log1p(-p),
        "uniform": p,
        "heavy": torch.tan(3.0 * (p - 0.5)),
        "two": torch.cat(both),
        "one and a few": torch.cat((normal.icdf(p), torch.full((10,), 9.0, dtype=torch.float64))),
        "nothing": torch.ones(n, dtype=torch.float64),
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "exponential", "uniform", "heavy", "one and a few", "nothing"])
def test_one_peak_has_no_valley(kind: str) -> None:
    values = numbers(kind)
    assert valley(values, torch.ones_like(values) / len(values)) is None


def test_a_valley_parts_the_weights() -> None:
    values = numbers("two")
    even = torch.ones_like(values) / len(values)
    assert valley(values, even) == pytest.approx(0.2, abs=0.01)
    heavy = torch.where(values < 0, 4.0, 1.0).double()
    assert valley(values, heavy / heavy.sum()) == pytest.approx(0.5, abs=0.01)
    assert valley(values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))], even) is not None


def to_both_sides(stiffness: float, end: float) -> sc.ControlProblem:
    """The ends +-end are wanted; a drift with two wells parts paths by itself, one with a single well does not."""
    return sc.ControlProblem(
        sc.SDE(lambda x, t: stiffness * x - x**3, diffusion=torch.tensor(0.6), dim=1, horizon=1.0),
        initial=sc.Dirac(torch.zeros(1)),
        reward=lambda x: -50 * (x[:, 0].abs() - end) ** 2,
    )


def test_ways_into_which_the_reference_parts_are_none() -> None:
    for stiffness, end, some in ((0.0, 2.4, True), (4.0, 2.6, False)):
        problem = to_both_sides(stiffness, end)
        found = smaller_way(problem, problem.chain(40))
        assert found == pytest.approx(0.5, abs=0.25) if some else found is None, (stiffness, found)


def test_the_two_slits_are_found_and_taken() -> None:
    problem, steps = sc.library.named_problem("double-slit"), 80
    share = smaller_way(problem, problem.chain(steps))
    assert share == pytest.approx(0.248, abs=0.08)  # by its exact solution
    advice = sc.recommend(problem, time_steps=steps)
    assert advice[0].method == sc.ParticleMatching() and "ways" in advice[0].reason and f"{share:.0%}" in str(advice)
    assert sc.AdjointMatching() in advice.methods
    assert sc.recommend(problem, time_steps=steps, one_off=True)[0].method == sc.SMC()


def test_a_problem_with_a_closed_form_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = sc.library.named_problem("unstable-quadratic")
    monkeypatch.setattr("sdecontrol.comparison.ways.simulate_chain", None)
    assert smaller_way(problem, problem.chain(20)) is None


def test_a_black_box_is_not_asked_for_ways() -> None:
    """Its calls may be dear: advice takes as many as it did without the look."""
    rows: list[int] = []

    def reward(x):
        rows.append(len(x))
        return (-50 * (abs(x[:, 0]) - 2.4) ** 2).astype("float32")

    plain = to_both_sides(0.0, 2.4)
    problem = sc.ControlProblem(plain.reference, plain.initial, reward=sc.BlackBox(reward, inputs="numpy"))
    assert smaller_way(problem, problem.chain(40)) is None
    sc.recommend(problem, time_steps=40)
    assert sum(rows) < 2000
