"""Steps of the optimiser are bounded in the KL of the path law, and their rate is found by it."""

import math
from itertools import pairwise

import pytest
import torch
from cases import F64, SmallControl, randn, random_lq

import sdecontrol as sc
from sdecontrol.chains.categorical import CategoricalChain
from sdecontrol.chains.shifts import shifts_along
from sdecontrol.methods.base import Visited, spread
from sdecontrol.training.optimiser import Descent
from sdecontrol.training.path_law import PathLaw

METHODS = [
    sc.RewardBackprop(),
    sc.RewardBackprop(gradient="adjoint"),
    sc.SoftPPO(),
    sc.LogVariance(),
    sc.PathConsistency(n=1),
    sc.CrossEntropy(),
    sc.Reinforce(),
    sc.RewardWeightedMLE(),
    sc.AdjointMatching(),
    sc.SOCM(),
    sc.BridgeMatching(),
    sc.ParticleMatching(num_particles=64),
]


def steep():
    return random_lq(2, seed=1, running=False)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'gradient', '')}".rstrip("-"))
def test_no_step_of_any_method_moves_the_path_law_by_more_than_the_bound(method):
    """With a learning rate of 10 the first whole step is thousands of nats."""
    options = {"iterations": 3, "time_steps": 8, "batch_size": 64, "seed": 0, "progress": False, "learning_rate": 10.0}
    found = sc.solve(steep(), method, control=SmallControl(2, 2), max_kl_step=0.01, **options)
    assert found.history[0]["kl_step"] > 0.005
    for entry in found.history:
        assert entry["kl_step"] <= 0.01 * max(1.0, 1.5 * entry["kl"] if math.isfinite(entry["kl"]) else 100.0)


def looked(chain, control, most, states):
    law = PathLaw(chain, control, most, find=False)
    return law, law.look(Visited(states, None))


def test_the_measured_kl_is_that_of_the_kernels_and_the_shortened_step_is_on_the_line():
    """Of a constant change of the shifts by v the KL is K |v|^2/2: exactly quadratic, so one shortening is enough."""
    problem = sc.ControlProblem(sc.BrownianMotion(dim=2), sc.Dirac(torch.zeros(2)), reward=lambda x: x.sum(1))

    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.u = torch.nn.Parameter(torch.zeros(2))

        def forward(self, x, t):
            return self.u.expand(len(x), 2)

    chain, control = problem.chain(8), Constant()
    law, look = looked(chain, control, 0.5, torch.zeros(8, 3, 2))
    with torch.no_grad():
        control.u += torch.tensor([3.0, 4.0])
    assert look.bound([control.u], [torch.zeros(2)]) == pytest.approx(12.5)
    assert law.moved == pytest.approx(0.5 * 0.81)
    torch.testing.assert_close(control.u.detach(), torch.tensor([3.0, 4.0]) * 0.9 * (0.5 / 12.5) ** 0.5)


def test_kl_between_two_controls_of_categorical_kernels_is_that_of_the_probabilities():
    logits = randn(3, 5, 2, 4, seed=1).log_softmax(-1)
    chain = CategoricalChain(lambda k, x: logits[k], 3, 4, torch.zeros(2, dtype=torch.int64), F64)
    states = torch.zeros(3, 5, 2, dtype=torch.int64)
    p, q = ((logits + randn(3, 5, 2, 4, seed=s)).log_softmax(-1) for s in (2, 3))
    want = (p.exp() * (p - q)).sum((-1, -2))
    torch.testing.assert_close(chain.kl(p - logits, states, range(3), None, q - logits), want)


def test_a_control_that_jumps_stops_with_the_last_good_state_and_numbers():
    class Jumping(SmallControl):
        def forward(self, x, t):
            return super().forward(x, t) + 100 * (self.last != START).any()

    control = Jumping(2, 2)
    global START
    START = control.last.detach().clone()
    options = {"iterations": 3, "time_steps": 8, "batch_size": 64, "seed": 0, "progress": False}
    with pytest.raises(sc.NonFiniteError, match=r"no step is small enough.*nats.*max_kl_step") as caught:
        sc.solve(steep(), sc.RewardBackprop(), control=control, **options)
    assert caught.value.what == "step" and caught.value.solution is not None


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_rate_is_found_whatever_a_step_of_the_default_rate_does(scale):
    """A control whose output is a thousand times as steep in its parameters: the first whole steps are a million times
    as far, the found ones are not."""

    class Scaled(SmallControl):
        def forward(self, x, t):
            return scale * super().forward(x, t) / 10

    problem, options = steep(), {"time_steps": 8, "batch_size": 64, "seed": 0, "progress": False, "iterations": 60}
    control = Scaled(2, 2)
    with torch.no_grad():
        control.last.mul_(1 / scale)
    history = sc.solve(problem, sc.RewardBackprop(), control=control, **options).history
    steps = [entry.get("kl_step", 0.0) for entry in history]
    assert max(steps[30:]) < 0.4 and max(entry["kl"] for entry in history) < 100


@pytest.mark.parametrize(("size", "ends"), [(0.4, 0.5), (10.0, 0.1), (1e-3, 1.0), (1e12, 1e-3)])
def test_the_rate_comes_to_where_a_step_moves_the_law_by_the_aim(size, ends):
    """Of steps with KL ``size rate^2`` that is ``(aim/size)^(1/2)``: within the control's own rate and a thousandth of
    it, by a factor of two a step at most. A KL that is not finite is too large."""
    law, rates = PathLaw(steep().chain(8), SmallControl(2, 2), 0.5, True), [1.0]
    for i in range(40):
        law.learn(math.inf if i == 0 else size * law.rate**2, 1.0)
        rates.append(law.rate)
    assert law.aim == 0.1 and law.rate == pytest.approx(ends, rel=1e-6)
    assert rates[1] == 0.5 and all(0.5 <= b / a <= 2 for a, b in pairwise(rates))


def test_what_was_found_is_part_of_a_checkpoint(tmp_path):
    options = {"iterations": 12, "time_steps": 4, "batch_size": 16, "seed": 0, "progress": False}
    problem, whole = steep(), []
    whole = sc.solve(problem, sc.RewardBackprop(), checkpoint_dir=tmp_path / "a", checkpoint_every=5, **options)

    class Stop:
        def on_step_end(self, state):
            if state.iteration == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sc.solve(problem, sc.RewardBackprop(), checkpoint_dir=tmp_path / "b", callbacks=[Stop()], **options)
    again = sc.solve(problem, sc.RewardBackprop(), checkpoint_dir=tmp_path / "b", resume=True, **options)
    assert [e["kl_step"] for e in again.history] == [e["kl_step"] for e in whole.history]
    for a, b in zip(again.control.parameters(), whole.control.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("steps", "each", "looks"), [(8, 4, 4), (20, 4, 4)])
def test_all_steps_of_a_quarter_of_the_paths_at_hand_are_looked_at_others_each_time(steps, each, looks):
    problem, control = steep(), SmallControl(2, 2)
    chain, states = problem.chain(steps), randn(steps + 1, 64, 2, seed=1)
    law, at, seen = PathLaw(chain, control, 0.5, find=False), Visited.of(states, None), []
    for _ in range(looks):
        look = law.look(at)
        assert look.states.shape == (steps, each, 2)
        rows = [int((states[0] == x).all(1).nonzero()) for x in look.states[0]]
        torch.testing.assert_close(look.states, states[:steps, rows])
        torch.testing.assert_close(look.before, shifts_along(chain, control, states[:steps, rows]))
        seen += rows
    assert sorted(seen) == list(range(0, 64, 4))


@pytest.mark.parametrize(("count", "few"), [(128, 32), (320, 80), (1024, 13), (192, 4)])
def test_each_part_of_a_batch_has_its_share_of_the_rows_that_are_looked_at(count, few):
    """The same ones as of the whole batch, in each 64 rows."""
    whole = spread(count, few, 5)
    rows = range(count)[whole]
    assert len(rows) >= few
    each = [[row + i for row in range(64)[whole]] for i in range(0, count, 64)]
    assert [row for part in each for row in part] == list(rows)


@pytest.mark.parametrize(("steps", "paths", "few"), [(100, 64, 8), (1000, 64, 4), (8, 3, 3)])
def test_of_long_chains_fewer_paths_are_looked_at(steps, paths, few):
    chain = sc.ControlProblem(sc.BrownianMotion(dim=1), sc.Dirac(torch.zeros(1)), reward=lambda x: x[:, 0]).chain(steps)
    law = PathLaw(chain, lambda x, t: x, 0.5, find=False)
    assert law.look(Visited(torch.zeros(steps, paths, 1), None)).states.shape == (steps, few, 1)


@pytest.mark.parametrize("step", range(6))
def test_a_change_in_one_step_alone_is_seen_whichever_it_is(step):
    """As in the last step of a sampler, where the noise is small and the same change of a prediction far."""

    class Alone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.u = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t):
            return self.u * ((t * 6).round() == step)[:, None]

    problem = sc.ControlProblem(sc.BrownianMotion(dim=1), sc.Dirac(torch.zeros(1)), reward=lambda x: x.sum(1))
    control, options = Alone(), {"iterations": 5, "time_steps": 6, "seed": 0, "learning_rate": 3.0, "progress": False}
    assert sc.solve(problem, sc.RewardBackprop(), control=control, **options).history[0]["kl_step"] == pytest.approx(
        0.5 * 0.81
    )


def test_after_fifty_looks_every_eighth_step_is_looked_at_and_each_that_may_come_near_the_bound():
    law = PathLaw(steep().chain(8), SmallControl(2, 2), 0.5, find=False)
    states = Visited(randn(9, 4, 2, seed=1), None)
    for _ in range(50):
        assert law.due(1e-9)
        law.look(states)
        law.saw(0.02, 1e-4)  # 200 nats per squared length: 0.5/4 nats at 6.25e-4
    due = []
    for _ in range(24):
        due.append(law.due(6e-4))
        if due[-1]:
            law.look(states)
    assert due == 3 * [*7 * [False], True]
    assert law.due(6.5e-4)
    law.look(states)
    law.saw(1e-4, 1e-4)  # a short step of small effect: what was seen before fades, and is not forgotten at once
    assert law.per_length == pytest.approx(140)
    law.saw(math.inf, 1e-2)  # a control that is not finite: as far as a thousand bounds
    assert law.per_length == pytest.approx(5e4) and law.due(1e-5)


def test_a_step_between_two_looks_that_would_go_far_is_still_bounded():
    """The learning rate, constant so far, is a thousand times as large in one step in which no look is due."""
    begin, found = Descent.begin, []
    options = {"iterations": 64, "time_steps": 8, "batch_size": 64, "seed": 0, "progress": False}

    def begun(self, factor):
        begin(self, factor)
        found.append(self)
        if len(found) == 62:
            for group in self.optimizer.param_groups:
                group["lr"] *= 1e6

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Descent, "begin", begun)
        history = sc.solve(
            steep(),
            sc.RewardBackprop(),
            control=SmallControl(2, 2),
            max_kl_step=0.01,
            optimizer=lambda p: torch.optim.SGD(p, lr=1e-6),
            **options,
        ).history
    assert "kl_step" not in history[60] and "kl_step" not in history[62]
    assert 0.005 < history[61]["kl_step"] <= 0.01 * max(1.0, 1.5 * history[61]["kl"])
