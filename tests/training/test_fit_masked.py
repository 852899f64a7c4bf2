"""``fit_masked_diffusion``: conditionals of a known joint law are learned, by the default network and a user's own."""

import pytest
import torch
from cases import F64, slow_but
from tokens import Joint, Net
from torch import nn

import sdecontrol as sc
from sdecontrol.chains.masked import MaskSchedule
from sdecontrol.training.fit_masked import draw_masks

JOINT = Joint(length=3, vocabulary=3, spread=1.5)


def sequences(n=1 << 14, seed=0):
    rows = torch.multinomial(JOINT.law, n, replacement=True, generator=torch.Generator().manual_seed(seed))
    return JOINT.points[rows]


def excess(model, s=0.5):
    """Nats a masked letter by which a model's conditionals are worse than the law's, mean over masked states, weighted
    as the loss weighs them."""
    V, states = 3, JOINT.states
    masked = states == V
    exact = JOINT.letters(JOINT.model)
    with torch.no_grad():
        found = model(states, torch.full((len(states),), s)).log_softmax(-1).to(F64)
    kl = ((exact.exp() * (exact - found)).sum(-1) * masked).sum(1) / masked.sum(1).clamp(min=1)
    given = (states.unsqueeze(1) == JOINT.points) | masked.unsqueeze(1)
    weight = (given.all(2).to(F64) * JOINT.law).sum(1)  # of each set of masks as likely as its letters
    number = masked.sum(1)
    weight = torch.where(number > 0, weight / torch.tensor([1.0, 3, 3, 1], dtype=F64)[number], 0.0)
    return float((weight * kl).sum() / weight.sum())


@pytest.mark.parametrize("own", slow_but([False, True], True), ids=["default", "own"])
def test_the_conditionals_of_the_data_are_learned(own):
    """Frequencies alone are 0.15 nats from them."""
    model = Net(3, 3, dtype=torch.float32) if own else None
    untrained = sc.fit_masked_diffusion(sequences(), 3, iterations=1, seed=0, progress=False)
    found = sc.fit_masked_diffusion(
        sequences(),
        3,
        model,
        iterations=800,
        batch_size=64,
        learning_rate=1e-2 if own else 2e-3,
        seed=0,
        progress=False,
    )
    assert excess(untrained) > 0.1
    assert excess(found) < 0.01
    if own:  # a copy was trained
        assert not torch.equal(model.layers[0].weight, found.layers[0].weight)
    assert not found.training


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (sc.fit_masked_diffusion(sequences(256), 3, iterations=3, seed=1, progress=False) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_masks_and_times_have_the_joint_law_of_noising(schedule):
    """Of all numbers m of masks equally many; given s the masks are independent with probability 1 - a(s): m has mean
    L (1 - a) near any s, weighed by the 1/m of the loss against the law of s that weighs by -a'/(1 - a)."""
    masks, generator = MaskSchedule(schedule), torch.Generator().manual_seed(0)
    x0 = torch.zeros(1 << 16, 5, dtype=torch.int64)
    masked, s = draw_masks(x0, masks, generator)
    m = masked.sum(1)
    assert torch.allclose(torch.bincount(m, minlength=6)[1:] / len(x0), torch.full((5,), 0.2), atol=0.01)
    share = 1 - masks.kept(s)
    # the density of (share, m) is (1/share) Binomial(m; 5, share) up to a constant: E[share | m] = m/6
    for count in range(1, 6):
        assert abs(float(share[m == count].mean()) - count / 6) < 0.01
    assert torch.allclose(masked.double().mean(0), torch.full((5,), 0.6, dtype=F64), atol=0.01)


@pytest.mark.slow
def test_a_conditional_model_is_conditional_and_dropped_labels_make_it_unconditional_too():
    data = sequences()
    labels = data[:, 0]
    model = sc.fit_masked_diffusion(
        data, 3, condition=labels, drop=0.2, iterations=300, batch_size=64, seed=0, progress=False
    )
    x, s = torch.full((3, 3), 3), torch.full((3,), 1.0)
    with torch.no_grad():
        p = model(x, s, torch.arange(3)).softmax(-1)
        assert float(p[torch.arange(3), 0, torch.arange(3)].min()) > 0.9
        marginal = torch.bincount(labels, minlength=3) / len(labels)
        assert torch.allclose(model(x, s).softmax(-1)[0, 0], marginal, atol=0.05)
    only = sc.fit_masked_diffusion(
        data, 3, condition=labels.double().unsqueeze(1), iterations=2, seed=0, progress=False
    )
    with pytest.raises(ValueError, match="y is missing"):
        only(x, s)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("data", "options", "error", "match"),
    [
        (torch.zeros(5, 3), {}, TypeError, r"data must be int64 tokens, got torch\.float32"),
        ([[0, 1]], {}, TypeError, "data must be a torch tensor"),
        (torch.tensor([[0, 3]]), {}, ValueError, "data has the token 3, which is the mask"),
        (torch.tensor([[0, 9]]), {}, ValueError, "data has tokens from 0 to 9"),
        (torch.tensor([[0, -1]]), {}, ValueError, "data has tokens from -1 to 0"),
        (torch.tensor([0, 1]), {}, ValueError, "data must have shape"),
        (torch.tensor([[0, 1]]), {"vocabulary": 1}, ValueError, "vocabulary must be an int >= 2"),
        (torch.tensor([[0, 1]]), {"model": lambda x, s: x}, TypeError, "model must be an nn.Module"),
        (torch.tensor([[0, 1]]), {"model": nn.Identity()}, ValueError, "no trainable parameters"),
        (torch.tensor([[0, 1]]), {"model": Net(2, 4, dtype=torch.float32)}, ValueError, "model must return shape"),
        (torch.tensor([[0, 1]]), {"schedule": "exponential"}, ValueError, "schedule"),
        (torch.tensor([[0, 1]]), {"drop": 0.5}, ValueError, "there is no condition"),
        (torch.tensor([[0, 1]]), {"iterations": 0}, ValueError, "iterations must be an int >= 1"),
    ],
)  # fmt: skip
def test_bad_input_is_named(data, options, error, match):
    with pytest.raises(error, match=match):
        sc.fit_masked_diffusion(data, **{"vocabulary": 3, "seed": 0, "progress": False, **options})
