"""Rewards from measurements: what an ensemble learns, what its spread says, and that it is a reward as any other."""

import math

import pytest
import torch
from cases import F64
from torch import nn

import sdecontrol as sc

QUICK = {"iterations": 150, "members": 3, "seed": 0, "progress": False}


def vectors(n: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=F64)


def truth(x: torch.Tensor) -> torch.Tensor:
    return 3 * x[:, 0] - x[:, 1] ** 2 + 5


def test_a_reward_is_learned_and_its_spread_grows_away_from_the_data():
    x = vectors(600)
    noise = 0.1 * torch.randn(600, generator=torch.Generator().manual_seed(1), dtype=F64)
    reward = sc.fit_reward(x, truth(x) + noise, **QUICK | {"iterations": 400})
    near, far = vectors(200, 2), vectors(200, 3, 4.0)
    assert float((reward(near) - truth(near)).square().mean().sqrt()) < 0.6  # of a standard deviation of 3.3
    assert float(reward.spread(far).mean()) > 3 * float(reward.spread(near).mean())
    held = reward.calibration
    assert held.rows == 60 and held.r2 > 0.95 and 0.5 < held.within_one < 0.95 and held.within_two > 0.85
    assert "on 60 held-out rows" in repr(reward)


def test_bounds_are_the_mean_and_so_many_spreads():
    x = vectors(100)
    reward = sc.fit_reward(x, truth(x), **QUICK)
    each = reward.each(x)
    assert each.shape == (3, 100) and reward(x).dtype == F64
    spread = reward.calibration.scale * each.std(0)
    torch.testing.assert_close(reward.spread(x), spread, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reward.pessimistic(2.0)(x), each.mean(0) - 2 * reward.spread(x))
    torch.testing.assert_close(reward.optimistic(0.5)(x), each.mean(0) + 0.5 * reward.spread(x))
    torch.testing.assert_close(reward.member(1)(x), each[1])
    again = sc.fit_reward(x, truth(x), **QUICK)
    torch.testing.assert_close(again(x), reward(x), rtol=0, atol=0)
    assert len({round(float(v), 9) for v in each[:, 0]}) == 3  # members differ


def test_the_rows_of_the_calibration_teach_nobody():
    """Whatever was measured at half of the rows, members are the same to the bit; the calibration is not."""
    x, options = vectors(12), QUICK | {"iterations": 2, "held_out": 0.5}
    r, unseen = truth(x), 0
    plain = sc.fit_reward(x, r, **options)
    for row in range(12):
        other = sc.fit_reward(x, r.index_add(0, torch.tensor([row]), torch.ones(1, dtype=F64)), **options)
        unseen += torch.equal(other.each(x), plain.each(x))
        assert other.calibration.rmse != plain.calibration.rmse
    assert unseen == 6


@pytest.mark.slow
def test_of_pure_noise_nothing_is_explained_and_errors_are_of_one_spread():
    x, r = vectors(200), torch.randn(200, generator=torch.Generator().manual_seed(5), dtype=F64)
    held = sc.fit_reward(x, r, **QUICK | {"iterations": 600, "held_out": 0.5}).calibration
    assert held.r2 < 0.1 and held.rmse > 0.8 and 0.5 < held.within_one < 0.9
    assert sc.fit_reward(x, r, **QUICK | {"held_out": 0.0}).calibration is None


@pytest.mark.slow
def test_the_third_of_the_rows_that_a_member_did_not_draw_ends_its_learning_in_time():
    """Of pure noise the best is the mean; learned by heart, it is far off everywhere else (2.7 to 8 variances)."""
    x = vectors(60, 6)
    r = torch.randn(60, generator=torch.Generator().manual_seed(7), dtype=F64)
    reward = sc.fit_reward(x, r, **QUICK | {"iterations": 2000, "held_out": 0.0})
    assert float((reward(vectors(2000, 99)) - r.mean()).square().mean()) < r.var()


@pytest.mark.slow
def test_tokens_are_learned_wherever_a_motif_stands_and_probabilities_have_a_gradient():
    x = torch.randint(4, (800, 12), generator=torch.Generator().manual_seed(0))
    motif = (x.unfold(1, 2, 1) == torch.tensor([1, 2])).all(2).sum(1).float()
    reward = sc.fit_reward(x, motif, vocabulary=4, **QUICK | {"iterations": 300})
    assert reward.calibration.r2 > 0.7
    z = nn.functional.one_hot(x[:5], 4).float().requires_grad_(True)
    torch.testing.assert_close(reward(z), reward(x[:5]))
    assert torch.autograd.grad(reward.pessimistic()(z).sum(), z)[0].abs().sum() > 0
    chain = sc.masked_diffusion(lambda x, s: torch.zeros(*x.shape[:2], 4), 12, 4, steps=12)
    problem = sc.ControlProblem(chain, reward=reward.optimistic(), alpha=0.5)
    solution = sc.solve(problem, sc.RewardBackprop(), iterations=2, batch_size=64, seed=0, progress=False)
    assert solution.iterations == 2


@pytest.mark.slow
def test_images_and_a_regressor_of_your_own():
    x = torch.randn(120, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    reward = sc.fit_reward(x, x[:, 0, 0].sum(1), **QUICK)
    assert reward(x).shape == (120,) and torch.isfinite(reward.spread(x)).all()
    line = nn.Sequential(nn.Flatten(), nn.Linear(36, 1), nn.Flatten(0))
    before = [p.clone() for p in line.parameters()]
    own = sc.fit_reward(x, x[:, 0, 0].sum(1), line, **QUICK | {"iterations": 400, "learning_rate": 0.05})
    assert own.calibration.r2 > 0.9
    assert all(torch.equal(a, b) for a, b in zip(before, line.parameters()))  # copies were trained
    first = [m[1].weight for m in own.members]
    assert not torch.equal(first[0], first[1])


def test_a_learned_reward_is_tuned_to_with_and_without_gradients():
    x = vectors(200).float()
    reward = sc.fit_reward(x, truth(x).float(), **QUICK)
    sde = sc.SDE(lambda x, t: -x, diffusion=torch.tensor(1.0), dim=2, horizon=1.0)
    problem = sc.ControlProblem(sde, sc.Dirac(torch.zeros(2)), reward=reward.pessimistic(), alpha=1.0)
    for method in (sc.AdjointMatching(), sc.SoftPPO()):
        solution = sc.solve(problem, method, time_steps=5, iterations=3, batch_size=64, seed=0, progress=False)
        assert solution.iterations == 3
    assert not any(p.requires_grad for p in reward.parameters())


def test_bad_input_is_named():
    x, tokens = vectors(20), torch.zeros(20, 3, dtype=torch.int64)
    r = truth(x)
    for arguments, kind, message in (
        (((x.numpy(), r), {}), TypeError, "x must be a tensor, got ndarray"),
        (((x, r[:3]), {}), ValueError, r"r must have shape \(20,\), one for each row of x, got \(3,\)"),
        (((x, r), {"members": 1}), ValueError, r"members must be an int >= 2 \(one has no spread\)"),
        (((x[:2], r[:2]), {}), ValueError, "x has 2 rows, fewer than members=5"),
        (((x[:5], r[:5]), {"held_out": 0.5}), ValueError, "x has 3 rows to learn from beside the held-out ones"),
        (((x, r), {"held_out": 1.0}), ValueError, "held_out must be a share"),
        (((x, torch.where(r > 5, math.nan, r)), {}), ValueError, "r is not finite in .* drop what was not measured"),
        (((x * math.inf, r), {}), ValueError, "x is not finite everywhere"),
        (((tokens, r), {}), TypeError, "of tokens say vocabulary=V"),
        (((tokens + 9, r), {"vocabulary": 4}), ValueError, "x has tokens from 9 to 9"),
        (((x, r, nn.Flatten()), {}), ValueError, "model has no trainable parameters"),
        (((x, r, nn.Linear(2, 2).double()), {}), ValueError, r"model must return shape \(3,\), got \(3, 2\)"),
        (((x, r, len), {}), TypeError, "model must be an nn.Module"),
    ):
        given, more = arguments
        with pytest.raises(kind, match=message):
            sc.fit_reward(*given, **{"seed": 0, "iterations": 2, **more})
    reward = sc.fit_reward(x, r, **QUICK | {"iterations": 2})
    with pytest.raises(ValueError, match="index must be below 3"):
        reward.member(3)
    with pytest.raises(ValueError, match="beta must be > 0"):
        reward.pessimistic(-1.0)
