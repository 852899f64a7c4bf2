"""Rewards that are measured: what is asked, what is kept, and that a run goes on where it was."""

import math

import pytest
import torch

import sdecontrol as sc

L, V = 5, 3
OPTIONS = {
    "rounds": 3,
    "batch": 16,
    "method": sc.SoftPPO(),
    "seed": 0,
    "fit": {"iterations": 40, "members": 2},
    "train": {"iterations": 15, "batch_size": 64},
}


def problem(alpha: float = 0.5) -> sc.ControlProblem:
    return sc.ControlProblem(sc.masked_diffusion(lambda x, s: torch.zeros(*x.shape, V), L, V, steps=10), alpha=alpha)


class Oracle:
    """Counts what it is asked; every letter 2 is worth one."""

    def __init__(self, lost: int = 0, broken: int = -1) -> None:
        self.asked: list[torch.Tensor] = []
        self.lost, self.broken = lost, broken

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.asked) == self.broken:
            raise OSError("the plate reader is off")
        self.asked.append(x)
        r = (x == 2).sum(1).float()
        r[: self.lost] = math.nan
        return r


@pytest.mark.slow
def test_rounds_climb_and_every_measurement_is_of_something_new():
    oracle = Oracle()
    options = OPTIONS | {"fit": {"iterations": 100}, "train": {"iterations": 40, "batch_size": 64}}
    found = sc.design(problem(), oracle, **options)
    assert [len(x) for x in oracle.asked] == [16, 16, 16] and found.x.shape == (48, L) and found.r.shape == (48,)
    assert torch.equal(found.x, torch.cat(oracle.asked)) and len({tuple(x) for x in found.x.tolist()}) == 48
    torch.testing.assert_close(found.r, (found.x == 2).sum(1).float())
    table = found.table()
    assert [row["measured"] for row in table] == [16, 32, 48] and table[-1]["mean"] > table[0]["mean"] + 0.8
    best, values = found.best(3)
    assert values[0] == found.r.max() == (best[0] == 2).sum() and values[0] >= values[2]
    mean = float((found.solution.sample(256, seed=1) == 2).sum(1).float().mean())
    assert mean > L / V + 0.8  # the untuned model's is L/V
    assert "best so far" in str(found) and found.reward.calibration is not None


@pytest.mark.slow
@pytest.mark.parametrize("propose", ["mean", "thompson"])
def test_other_proposals(propose):
    found = sc.design(problem(), Oracle(), **OPTIONS | {"propose": propose, "rounds": 2})
    assert len(found.r) == 32 and found.table()[1]["mean"] > found.table()[0]["mean"]


@pytest.mark.slow
def test_a_run_that_was_broken_off_goes_on_to_the_same_measurements(tmp_path):
    options = OPTIONS | {"rounds": 2}
    whole = sc.design(problem(), Oracle(), **options)
    with pytest.raises(OSError, match="plate reader"):
        sc.design(problem(), Oracle(broken=1), folder=tmp_path, **options)
    oracle = Oracle()
    found = sc.design(problem(), oracle, folder=tmp_path, **options)
    assert len(oracle.asked) == 1  # the second round alone
    assert torch.equal(found.x, whole.x) and torch.equal(found.r, whole.r)
    torch.testing.assert_close(found.solution.sample(8, seed=0), whole.solution.sample(8, seed=0))
    with pytest.raises(ValueError, match="was begun with batch=16, not 8"):
        sc.design(problem(), oracle, folder=tmp_path, **OPTIONS | {"batch": 8})
    with pytest.raises(sc.BadFileError):
        sc.design(problem(alpha=1.0), oracle, folder=tmp_path, **OPTIONS)


@pytest.mark.slow
def test_failed_measurements_are_named_dropped_or_asked_again(tmp_path):
    with pytest.raises(sc.NonFiniteError, match=r"2 of 16 rows .*All 16 answers are in .*failed='drop'"):
        sc.design(problem(), Oracle(lost=2), folder=tmp_path, **OPTIONS)
    kept = Oracle()
    found = sc.design(problem(), kept, folder=tmp_path, **OPTIONS | {"failed": "drop", "rounds": 1})
    assert not kept.asked and len(found.r) == 16  # what the failed round measured was not lost
    oracle = Oracle(lost=2)
    found = sc.design(problem(), oracle, **OPTIONS | {"failed": "drop", "rounds": 2})
    assert int(found.r.isnan().sum()) == 4 and [row["failed"] for row in found.table()] == [2, 2]
    assert bool(found.best(5)[1].isfinite().all())
    oracle = Oracle(lost=2)
    found = sc.design(problem(), oracle, **OPTIONS | {"failed": "again", "rounds": 1})
    assert [len(x) for x in oracle.asked] == [16, 2] and torch.equal(oracle.asked[1], oracle.asked[0][:2])


def test_known_data_come_first():
    x = torch.randint(V, (30, L), generator=torch.Generator().manual_seed(0))
    oracle = Oracle()
    found = sc.design(problem(), oracle, data=(x, (x == 2).sum(1).float()), **OPTIONS | {"rounds": 1})
    assert len(oracle.asked) == 1 and found.rounds.tolist() == [-1] * 30 + [0] * 16
    assert not {tuple(v) for v in oracle.asked[0].tolist()} & {tuple(v) for v in x.tolist()}
    assert str(found).splitlines()[1].split()[0] == "given"


@pytest.mark.slow
def test_states_that_are_numbers():
    sde = sc.SDE(lambda x, t: -x, diffusion=torch.tensor(1.0), dim=2, horizon=1.0)
    plain = sc.ControlProblem(sde, sc.Dirac(torch.zeros(2)), alpha=0.5)
    options = OPTIONS | {"method": sc.AdjointMatching(), "rounds": 2, "propose": "mean", "fit": {"iterations": 100}}
    options["train"] = {"iterations": 10, "batch_size": 64, "time_steps": 5}
    found = sc.design(plain, lambda x: (-(x - 1).square().sum(1)).numpy(), **options)
    assert found.x.shape == (32, 2) and found.table()[1]["mean"] > found.table()[0]["mean"]


def test_all_that_there_is_was_measured():
    tiny = sc.ControlProblem(sc.masked_diffusion(lambda x, s: torch.zeros(*x.shape, 2), 2, 2, steps=4), alpha=1.0)
    with (
        pytest.warns(RuntimeWarning, match="4 new samples in place of 16"),
        pytest.raises(ValueError, match="round 1: all samples were measured before"),
    ):
        sc.design(tiny, lambda x: x.sum(1).float(), **OPTIONS | {"rounds": 2})


@pytest.mark.slow
def test_a_process_that_stops_is_tuned_as_one_that_stops():
    walk = sc.SDE(lambda x, t: 0 * x, diffusion=torch.tensor(1.0), dim=1, horizon=1.0)
    stopped = sc.ControlProblem(walk, sc.Dirac(torch.zeros(1)), alpha=1.0, stop=lambda x: x[:, 0] > 0.5)
    options = OPTIONS | {"method": sc.SoftPPO(), "rounds": 1}
    options["train"] = {"iterations": 2, "batch_size": 64, "time_steps": 5}
    found = sc.design(stopped, lambda x: x[:, 0], **options)
    assert found.solution.problem.stop is stopped.stop


def test_bad_input_is_named():
    rewarded = sc.ControlProblem(problem().reference, reward=lambda x: x.sum(1).float(), alpha=1.0)
    chain = sc.masked_diffusion(lambda x, s, y: torch.zeros(*x.shape, V), L, V, steps=10)
    conditional = sc.ControlProblem(chain, alpha=1.0, condition=torch.arange(3))
    for arguments, more, kind, message in (
        ((rewarded, Oracle()), {}, ValueError, "problem has a reward"),
        ((problem(), None), {}, TypeError, "oracle must be a function"),
        ((conditional, Oracle()), {}, ValueError, "problem has a condition"),
        ((problem().reference, Oracle()), {}, TypeError, "problem must be a ControlProblem"),
        ((problem(), Oracle()), {"propose": "ucb"}, ValueError, "propose"),
        ((problem(), Oracle()), {"rounds": 0}, ValueError, "rounds must be an int >= 1"),
        ((problem(), Oracle()), {"data": torch.zeros(3)}, TypeError, r"data must be a pair \(x, r\)"),
        ((problem(), lambda x: torch.zeros(3)), {}, ValueError, "oracle must give one number for each of 16 rows"),
        ((problem(), Oracle()), {"folder": "x", "seed": None}, ValueError, "seed must be given with a folder"),
    ):
        with pytest.raises(kind, match=message):
            sc.design(*arguments, **OPTIONS | more)
