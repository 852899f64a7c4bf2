"""Every bad input of token, jump and curved state spaces is an early error that names the argument."""

import pytest
import torch

import sdecontrol as sc

L, V = 4, 3
RATES = torch.tensor([[-1.0, 1.0], [30.0, -30.0]])
ROWS = torch.randint(V, (64, L), generator=torch.Generator().manual_seed(0))
FITTED = {"iterations": 1, "progress": False}


def logits(x, s):
    return torch.zeros(*x.shape, V)


def counted(x):
    return x.sum(1).float()


def masked(model=logits, **options):
    return sc.ControlProblem(sc.masked_diffusion(model, L, V, 8), reward=counted, **options)


def solved(problem, method):
    return sc.solve(problem, method, iterations=1, batch_size=64, seed=0, progress=False)


def on_sphere(drift):
    reference = sc.ManifoldSDE(sc.Sphere(2), drift)
    return sc.ControlProblem(reference, sc.Dirac(torch.tensor([0.0, 0.0, 1.0])), reward=lambda x: x[:, 0])


BAD = {
    "data: a token out of range": (lambda: sc.fit_masked_diffusion(ROWS + 1, V, **FITTED), "data"),
    "data: a negative token": (lambda: sc.fit_masked_diffusion(ROWS - 1, V, **FITTED), "data"),
    "data: float tokens": (lambda: sc.fit_masked_diffusion(ROWS.float(), V, **FITTED), "data"),
    "data: the mask": (lambda: sc.fit_masked_diffusion(ROWS.where(ROWS > 0, V), V, **FITTED), "data"),
    "start: a token out of range": (
        lambda: sc.ControlProblem(sc.JumpProcess(RATES), sc.Dirac(torch.tensor([2])), reward=counted),
        "initial",
    ),
    "start: a float token": (
        lambda: sc.ControlProblem(sc.JumpProcess(RATES), sc.Dirac(torch.zeros(1)), reward=counted),
        "initial",
    ),
    "model: another shape": (lambda: masked(lambda x, s: torch.zeros(*x.shape, V + 1)), "model"),
    "model: no positions": (lambda: masked(lambda x, s: torch.zeros(len(x), V)), "model"),
    "model: not a number": (lambda: masked(lambda x, s: torch.full((*x.shape, V), float("nan"))), "model"),
    "model: infinite": (lambda: masked(lambda x, s: torch.full((*x.shape, V), float("inf"))), "model"),
    "rates: negative": (lambda: sc.JumpProcess(-RATES), "rates"),
    "rates: rows that do not sum to zero": (lambda: sc.JumpProcess(RATES.clamp(min=0.0)), "rates"),
    "rates: not a number": (lambda: sc.JumpProcess(RATES * float("nan")), "rates"),
    "I + hQ negative": (
        lambda: sc.ControlProblem(sc.JumpProcess(RATES, initial=0), reward=counted).chain(20, "euler"),
        "I + h Q has a negative entry",
    ),
    "drift: off the sphere": (lambda: on_sphere(lambda x, t: x), "drift leaves the tangent space"),
    **{
        f"{method.name}: a reward of tokens": (lambda method=method: solved(masked(), method), method.name)
        for method in (sc.RewardBackprop(), sc.AdjointMatching(), sc.SOCM())
    },
}


@pytest.mark.wrong_shapes
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_early_error_that_names_the_argument(case):
    call, named = BAD[case]
    with pytest.raises((ValueError, TypeError, RuntimeError)) as found:
        call()
    assert named in str(found.value), str(found.value)
