"""Several rewards with weights: their sum, and each by its name."""

import json

import pytest
import torch
from runs import quick, same

import sdecontrol as sc


def height(x):
    return x[:, 0]


def bowl(x):
    return -(x - 1).square().sum(1)


TWO = {"height": (2.0, height), "bowl": (0.5, bowl)}


def problem(reward, alpha=0.5, **options):
    return sc.ControlProblem(sc.OrnsteinUhlenbeck(2), sc.Dirac(torch.zeros(2)), reward=reward, alpha=alpha, **options)


def test_the_sum_and_its_gradient_are_those_of_the_function_written_by_hand():
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reward = sc.WeightedRewards({**TWO, "ones": lambda x: torch.ones(len(x))})  # a constant has the gradient 0
    by_hand = 2 * height(x) + 0.5 * bowl(x) + 1
    assert torch.allclose(reward(x), by_hand)
    slope, wanted = (torch.autograd.grad(v.sum(), x)[0] for v in (reward(x), by_hand))
    assert torch.allclose(slope, wanted)
    assert torch.equal(reward.parts(x), torch.stack((height(x), bowl(x), torch.ones(6)), 1))
    assert repr(reward) == "WeightedRewards(2 height + 0.5 bowl + 1 ones)"


METHODS = [
    sc.RewardBackprop(),
    sc.RewardBackprop(gradient="adjoint"),
    sc.AdjointMatching(),
    sc.SOCM(),
    sc.SoftPPO(),
    sc.LogVariance(),
    sc.CrossEntropy(),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name} {getattr(m, 'gradient', '')}".strip())
@pytest.mark.parametrize("pieces", [None, 24])
def test_each_is_reported_by_its_name_and_the_run_is_that_of_their_sum(method, pieces):
    several = problem(sc.WeightedRewards(TWO), reward_batch_size=pieces)
    alone = problem(lambda x: sc.WeightedRewards(TWO)(x), reward_batch_size=pieces)
    found, plain = (quick(made, method, iterations=2, accumulate=2) for made in (several, alone))
    assert same(found, plain)
    for metrics, without in zip(found.history, plain.history):
        total = 2 * metrics["reward/height"] + 0.5 * metrics["reward/bowl"]
        assert total == pytest.approx(metrics["reward"], abs=1e-5) and metrics["reward/bowl"] < 0
        assert {n: v for n, v in metrics.items() if "/" not in n} == without


def test_an_evaluation_has_each_with_its_error(tmp_path):
    solution = quick(problem(sc.WeightedRewards(TWO)), sc.RewardBackprop(), iterations=20)
    for options in ({}, {"batch_size": 192}):  # not a divisor: the last chunk is padded
        found = solution.evaluate(1000, seed=1, confirm=False, **options)
        x = solution.sample(1000, seed=1)
        for name, (_, reward) in TWO.items():
            mean = found.details[f"reward/{name}"]
            assert mean.value == pytest.approx(float(reward(x).mean()), abs=1e-5)
            assert mean.stderr == pytest.approx(float(reward(x).std()) / 1000**0.5, rel=1e-4)
    assert "  height" in str(found) and "of which" in str(found)
    assert json.loads(json.dumps(found.as_dict()))["details"]["reward/height"]["value"] > 0


def test_a_part_without_a_gradient_leaves_none_of_the_sum():
    """A gradient of the others alone would be that of another reward."""
    steps = sc.BlackBox(lambda x: (x[:, 0] > 0).float())
    made = problem(sc.WeightedRewards({"bowl": bowl, "steps": (3.0, steps)}))
    assert not made.has_gradient
    with pytest.raises(sc.NotDifferentiable):
        quick(made, sc.RewardBackprop())
    metrics = quick(made, sc.SoftPPO(), iterations=1).history[0]
    assert metrics["reward/bowl"] + 3 * metrics["reward/steps"] == pytest.approx(metrics["reward"], abs=1e-5)


def test_modules_among_them_are_called_in_evaluation_mode_and_stay_as_they_were():
    class Critic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))

        def forward(self, x):
            assert not self.training
            return self.layers(x)[:, 0]

    critic, boxed = Critic(), Critic()
    made = problem(sc.WeightedRewards({"critic": critic, "boxed": sc.BlackBox(boxed), "half": Critic().bfloat16()}))
    quick(made, sc.SoftPPO(), iterations=2)
    assert critic.training and boxed.training and all(p.grad is None for p in critic.parameters())
    assert len(made.modules()) == 3


def test_a_reward_of_minus_infinity_is_a_weight_of_0_here_too():
    outside = sc.BlackBox(lambda x: [-float("inf") if one[0] < 0 else 0.0 for one in x])
    made = problem(sc.WeightedRewards({"outside": outside, "bowl": bowl}))
    solution = quick(made, sc.SMC(num_particles=64), iterations=None, batch_size=256)
    assert float(solution.sample(64, seed=0)[:, 0].min()) >= 0
    with pytest.raises(ValueError, match="soft-ppo needs a reward that is a number everywhere"):
        quick(made, sc.SoftPPO())


def test_what_fails_among_them_is_named():
    bad = {
        "infinite": (lambda x: x[:, 0] / 0, sc.NonFiniteError, "reward 'infinite' is nan or infinite in 3 of 3 rows"),
        "short": (lambda x: x[:2, 0], ValueError, r"reward 'short' must return shape \(3,\), got \(2,\)"),
        "failing": (
            sc.BlackBox(lambda x: {}[0]),
            sc.RewardError,
            "reward 'failing' failed at samples 0 to 2: Key",
        ),
    }
    for name, (function, error, match) in bad.items():
        with pytest.raises(error, match=match):
            sc.WeightedRewards({"height": height, name: function})(torch.ones(3, 2))


BAD = {
    "nothing": ({}, TypeError, "one reward at least"),
    "a list": ([height], TypeError, "must be a dictionary"),
    "a name that is none": ({1: height}, TypeError, "strings as names"),
    "the wrong way round": ({"height": (height, 1.0)}, TypeError, r"rewards\['height'\] must be \(weight, reward\)"),
    "no function": ({"height": 1.0}, TypeError, r"rewards\['height'\] must be"),
    "no weight": ({"height": ("much", height)}, TypeError, "the weight of reward 'height' must be a number"),
    "an infinite one": ({"height": (float("inf"), height)}, ValueError, "the weight of reward 'height' must be finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_weights_are_refused_by_name(name):
    rewards, error, match = BAD[name]
    with pytest.raises(error, match=match):
        sc.WeightedRewards(rewards)
