"""NaN and infinity injected at every stage: named with what, step and rows, and never in the parameters."""

import pytest
import torch
from cases import SmallControl

import sdecontrol as sc

STEPS, BATCH = 12, 64
MODES = ["full", "checkpoint", "adjoint", 4]
METHODS: dict[object, sc.Method] = {mode: sc.RewardBackprop(mode) for mode in MODES}
METHODS.update({method.name: method for method in (sc.AdjointMatching(), sc.SOCM())})


class Injected:
    """A problem of which one part gives ``value`` at one step in the first ``rows`` rows, once armed."""

    def __init__(self, where, value=float("nan"), step=0, rows=1):
        self.where, self.value, self.step, self.rows, self.armed = where, value, step, rows, False
        self.problem = sc.ControlProblem(
            sc.SDE(
                lambda x, t: self.at("drift", -x, t),
                lambda x, t: self.at("diffusion", torch.ones_like(x), t),
                dim=2,
            ),
            initial=sc.Dirac(torch.zeros(2)),
            reward=self.reward,
            running_cost=lambda x, t: self.at("running cost", 0.1 * (x * x).sum(1), t),
        )

    def at(self, where, x, t):
        t = t if t.ndim == 0 else t[0]
        if not self.armed or where != self.where or round(float(t) * STEPS) != self.step:
            return x
        bad = (torch.arange(len(x)) < self.rows).reshape(-1, *(1,) * (x.ndim - 1))
        return torch.where(bad, self.value, x)

    def reward(self, x):
        value = -(x * x).sum(1)
        if self.armed and self.where == "reward":
            value = torch.where(torch.arange(len(x)) < self.rows, self.value, value)
        if self.armed and self.where == "gradient":  # a finite value with an infinite slope: sqrt at 0
            value = value - torch.sqrt(torch.where(torch.arange(len(x)) < self.rows, 0.0, 1.0) * x[:, 0].abs())
        return value

    def control(self, net):
        outer = self

        class Control(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, x, t):
                outer.live = self
                return outer.at("control", self.net(x, t), t)

        return Control()


@pytest.mark.parametrize("where", ["drift", "diffusion", "control", "running cost"])
@pytest.mark.parametrize("step", [0, STEPS // 2, STEPS - 1])
@pytest.mark.parametrize("rows", [1, BATCH])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("keep", ["all", "end"])
def test_a_simulation_names_what_was_not_finite(where, step, rows, value, keep):
    made = Injected(where, value, step, rows)
    control = made.control(SmallControl(2, 2, dtype=torch.float32))
    made.armed = True
    with pytest.raises(sc.NonFiniteError) as caught:
        sc.simulate(made.problem, BATCH, control=control, time_steps=STEPS, seed=0, keep=keep)
    assert (caught.value.what, caught.value.step, caught.value.rows) == (where, step, rows)
    assert where in str(caught.value) and f"step {step} of {STEPS}" in str(caught.value)


@pytest.mark.parametrize("where", ["drift", "diffusion", "control", "running cost", "reward", "gradient"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, BATCH])
def test_training_stops_by_name_and_no_parameter_is_touched(where, method, rows):
    made = Injected(where, step=STEPS - 2, rows=rows)
    control = made.control(SmallControl(2, 2, dtype=torch.float32))
    saved = {}

    class Arm:
        def on_step_end(self, state):
            if state.iteration == 2:
                made.armed = True
                saved.update({n: p.detach().clone() for n, p in made.live.named_parameters()})

    with pytest.raises(sc.NonFiniteError) as caught:
        sc.solve(
            made.problem, METHODS[method], control=control, time_steps=STEPS, iterations=5, batch_size=BATCH,
            seed=0, callbacks=[Arm()],
        )  # fmt: skip
    error = caught.value
    assert error.what == where and "iteration 2" in str(error)
    if where not in ("gradient", "reward"):
        assert error.step == STEPS - 2
    if where != "gradient":
        assert error.rows == rows
    assert saved and all(torch.equal(saved[n], p) for n, p in made.live.named_parameters())
    assert all(torch.isfinite(p).all() for p in error.solution.control.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_initial_law_that_draws_something_not_finite_is_named(value):
    class Law(torch.distributions.Distribution):
        arg_constraints = {}  # noqa: RUF012
        armed = False

        def __init__(self):
            super().__init__(torch.Size(), torch.Size((2,)), validate_args=False)

        def sample(self, sample_shape=torch.Size()):  # noqa: B008
            x = torch.randn(*sample_shape, 2)
            if self.armed:
                x[0] = value
            return x

    law = Law()
    problem = sc.ControlProblem(sc.SDE(lambda x, t: -x, 1.0, dim=2), initial=law, reward=lambda x: -(x * x).sum(1))
    law.armed = True
    with pytest.raises(sc.NonFiniteError) as caught:
        sc.simulate(problem, 64, time_steps=5, seed=0)
    assert caught.value.what == "initial state" and caught.value.rows == 1
    for mode in MODES:
        with pytest.raises(sc.NonFiniteError, match="initial state"):
            sc.solve(problem, sc.RewardBackprop(mode), time_steps=5, iterations=2, batch_size=64, seed=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_control_so_large_that_its_likelihood_overflows_is_named(mode):
    """States stay finite where sigma is tiny, but |c|^2 does not: the loss must not be taken."""

    class Huge(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(1e25))

        def forward(self, x, t):
            return self.a * torch.ones_like(x)

    problem = sc.ControlProblem(
        sc.SDE(lambda x, t: -x, 1e-20, dim=1), initial=sc.Dirac(torch.zeros(1)), reward=lambda x: x[:, 0]
    )
    with pytest.raises(sc.NonFiniteError, match=r"control|likelihood|gradient"):
        sc.solve(problem, sc.RewardBackprop(mode), control=Huge(), time_steps=5, iterations=2, batch_size=64, seed=0)
