"""The shapes in signatures: ``--shapes`` finds what is planted here, and without it nothing is checked.

Each planted call goes through without an error where nothing is checked, by broadcasting: that is what the checks are
for."""

import pytest
import torch
from jaxtyping import TypeCheckError

import sdecontrol as sc
from sdecontrol.chains.base import Chain
from sdecontrol.paths.integrator import integrate
from sdecontrol.paths.paths import Paths, Totals
from sdecontrol.paths.weights import self_normalised

PROBLEM = sc.ControlProblem(sc.BrownianMotion(2), initial=sc.Dirac(torch.zeros(2)), reward=lambda x: x.sum(1))
CHAIN = PROBLEM.chain(4)
X = torch.zeros(3, 2)


def paths() -> Paths:
    return sc.simulate(PROBLEM, 3, time_steps=4, seed=0)


PLANTED = {
    "a noise for each path instead of each coordinate": lambda: CHAIN.step(0, X, torch.ones(3, 1)),
    "a shift of one row for all": lambda: CHAIN.step(0, X, torch.ones(3, 2), torch.ones(1, 2)),
    "shifts of the wrong event": lambda: CHAIN.log_ratio(torch.ones(4, 3, 1), torch.ones(4, 3, 2)),
    "a control of one row for all": lambda: CHAIN.shift_at(0, X, torch.ones(1, 2)),
    "a cost with a dimension too many": lambda: (
        integrate(CHAIN, X, torch.ones(4, 3, 2), running_cost=lambda x, t, y: x[:, :1]).running_cost
    ),
    "a reward with a dimension too many": lambda: paths().towards(PROBLEM, torch.ones(3, 1)).log_weights(),
    "totals of two batches": lambda: Totals(torch.zeros(3), kl=torch.zeros(1)),
    "log weights with a dimension too many": lambda: self_normalised(torch.zeros(3, 1)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_shapes_are_found_with_the_option_alone(name: str, pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("shapes"):
        with pytest.raises(TypeCheckError):
            PLANTED[name]()
    else:
        PLANTED[name]()


def test_nothing_is_put_around_functions_without_the_option(pytestconfig: pytest.Config) -> None:
    assert hasattr(Chain.step, "__wrapped__") == pytestconfig.getoption("shapes")
