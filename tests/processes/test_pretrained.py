"""One protocol for pre-trained references: the same assertions for an SDE, a discrete sampler, and a kind of its own
that the package does not know."""

import math
from itertools import pairwise

import pytest
import torch
from cases import F64, randn

import sdecontrol as sc
from sdecontrol.chains.pretrained import PretrainedChain
from sdecontrol.controls.tuned import ControlledModel, TunedControl

MEAN, VARIANCE = torch.tensor([0.7, -0.4], dtype=F64), 0.3
SIGMAS = [8.0, 4.0, 2.0, 1.0, 0.5, 0.2]
ABAR = torch.linspace(0.9995, 0.01, 60, dtype=F64).pow(1.2)


class Exact(torch.nn.Module):
    """What a model of N(m, v) says of ``mu x0 + std eps``, exactly: x0^, or the noise; ``m = MEAN + shift`` is its
    parameter.

    ``levels``: clock -> (mu, std). It asserts that it is called on that clock.
    """

    def __init__(self, levels, prediction, shift=0.0):
        super().__init__()
        self.levels, self.prediction = levels, prediction
        self.shift = torch.nn.Parameter(torch.full((2,), float(shift), dtype=F64))

    def forward(self, x, s, y=None):
        assert s.shape == (len(x),)
        mu, std = (v.reshape(-1, 1).to(F64) for v in self.levels(s))
        mean = MEAN + self.shift + (0.0 if y is None else 0.1 * y[:, None])
        x0 = mean + mu * VARIANCE / (mu**2 * VARIANCE + std**2) * (x - mu * mean)
        return x0 if self.prediction == "sample" else (x - mu * x0) / std


class Annealed(PretrainedChain):
    """A sampler of its own, with noise of standard deviation sigma, a float, as the model's clock:
    ``x' ~ p(x' | x, x0^)`` of the noising process."""

    def __init__(self, model):
        super().__init__(model, (2,), SIGMAS, torch.zeros((), dtype=F64))
        self.own_initial = sc.Gaussian(MEAN, VARIANCE + SIGMAS[0] ** 2)
        self.parts = [(1 - (b / a) ** 2, b * math.sqrt(1 - (b / a) ** 2)) for a, b in pairwise(SIGMAS)]

    def to_x0(self, k, x, prediction):
        return prediction

    def kernel(self, k, x, condition=None):
        part, scale = self.parts[k]
        return x + part * (self.prediction_at(k, x, condition) - x), x.new_tensor(scale)

    def shift_towards(self, k, x, prediction, condition=None):
        part, scale = self.parts[k]
        return (prediction - self.prediction_at(k, x, condition)) * (part / scale)

    def change_at(self, k, x, c, condition=None):
        part, scale = self.parts[k]
        return c * (scale / part)

    def describe(self):
        return {"kind": "Annealed"}


def discrete(s):
    a = ABAR[s]
    return a.sqrt(), (1 - a).sqrt()


def vp(s):
    return sc.VP().mu(s), sc.VP().std(s)


#: how a reference is made of a model, the model's clock -> (mu, std), what it predicts, and the options of its chain
KINDS = {
    "sde": (lambda m: sc.generative_sde(m, sc.VP(), shape=(2,)), vp, "noise", {"time_steps": 6}),
    "sde-exponential": (
        lambda m: sc.generative_sde(m, sc.VP(), "sample", shape=(2,)),
        vp,
        "sample",
        {"time_steps": 6, "scheme": "exponential"},
    ),
    "ddim": (lambda m: sc.diffusion_chain(m, ABAR, "noise", (2,), eta=0.8, steps=8), discrete, "noise", {}),
    "own": (Annealed, lambda s: (torch.ones_like(s), s), "sample", {}),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def make(kind, shift=0.0):
    return kind[0](Exact(kind[1], kind[2], shift))


def problem(reference, **options):
    options = {"reward": sc.Linear(torch.tensor([1.0, -0.5], dtype=F64)), "start": "fixed", "alpha": 0.5, **options}
    return sc.ControlProblem(reference, **options)


def test_the_denoised_state_and_the_model_s_clock_are_those_of_the_gaussian(kind):
    reference = make(kind)
    chain = problem(reference).chain(**kind[3])
    x = randn(5, 2, seed=1)
    for t in [*chain.clock[:-1], *([1.0] if reference.decodes else [])]:
        s = reference.model_time(t, x)
        assert s.ndim == 0
        mu, std = (v.to(F64) for v in kind[1](s))
        want = MEAN + mu * VARIANCE / (mu**2 * VARIANCE + std**2) * (x - mu * MEAN)
        with torch.no_grad():
            found = reference.denoised(x, t)
            assert torch.allclose(found, want, atol=1e-9)
            assert torch.equal(reference.predict(reference.model, x, t), reference.model(x, s.expand(5)))
    with torch.no_grad():
        decoded = reference.decode(x)
        assert torch.equal(decoded, reference.denoised(x, 1.0) if reference.decodes else x)
        assert torch.equal(chain.decode(x), decoded)


def test_shifts_towards_a_model_are_differences_of_kernels(kind):
    reference, other = make(kind), make(kind, shift=0.3)
    chain, tuned = (problem(r).chain(**kind[3]) for r in (reference, other))
    ours = reference.shifts_towards(other.model, chain)
    own = reference.shifts_towards(reference.model, chain)
    twice = reference.shifts_towards(other.model, chain, 2.0)
    x = randn(5, 2, seed=2)
    with torch.no_grad():
        for k in range(chain.steps):
            mean, scale = chain.kernel(k, x)
            want = (tuned.kernel(k, x)[0] - mean) / scale
            # an exponential scheme holds u over the step, and not the prediction: there the gain says so
            if kind[3].get("scheme") == "exponential":
                c = reference.coefficients(chain.times[k : k + 1])
                change = reference.predict(other.model, x, chain.times[k]) - reference.predict(
                    reference.model, x, chain.times[k]
                )
                want = chain.shift_at(k, x, change * float(c.gain))
            assert want.abs().min() > 1e-4
            assert torch.allclose(ours(k, x, None), want, atol=1e-9)
            assert torch.allclose(twice(k, x, None), 2 * want, atol=1e-9)
            assert not own(k, x, None).any()
            u = reference.control_towards(other.model, x, chain.times[k])
            assert torch.allclose(chain.shift_at(k, x, u), want, atol=1e-9)


def test_a_tuned_copy_is_trained_and_its_model_is_the_controlled_process(kind):
    reference = make(kind)
    solution = sc.solve(
        problem(reference), "reward-backprop", iterations=5, batch_size=64, seed=0, learning_rate=0.05, **kind[3]
    )
    assert isinstance(solution.control, TunedControl)
    assert isinstance(solution.model, ControlledModel) == reference.decodes
    with torch.no_grad():
        ours = solution.simulate(8, seed=1)
        chain, tuned = (problem(r).chain(**kind[3]) for r in (reference, kind[0](solution.model)))
        x = ours.states[2]
        want = (tuned.kernel(2, x)[0] - chain.kernel(2, x)[0]) / chain.kernel(2, x)[1]
    assert ours.shifts.abs().max() > 1e-2
    assert torch.allclose(ours.shifts[2], want, atol=1e-9, rtol=0.1 if "scheme" in kind[3] else 1e-9)


def test_any_control_becomes_a_model(kind):
    """A fixed model: the default network beside it, in the model's own parametrisation at every one of its times."""
    reference = make(kind)
    reference.model.requires_grad_(False)
    p = problem(reference)
    solution = sc.solve(p, "reward-backprop", iterations=3, batch_size=64, seed=0, **kind[3])
    chain, x = p.chain(**kind[3]), randn(6, 2, seed=3)
    with torch.no_grad():
        for k in range(chain.steps):
            s = reference.model_time(chain.clock[k], x).expand(6)
            towards = reference.control_towards(solution.model, x, chain.times[k])
            assert torch.allclose(towards, solution.control(x, chain.times[k]), atol=1e-8)
            assert not torch.equal(solution.model(x, s), reference.model(x, s))
        if reference.decodes:
            last = reference.model_time(1.0, x)
            mixed = torch.stack([s[0], *[last] * 5])
            assert torch.equal(solution.model(x, mixed)[1:], reference.model(x, mixed)[1:])


def test_guidance_takes_every_kind(kind):
    """Classifier-free guidance with w = 0 is the conditional model's chain; Tweedie's value is the reward of the
    denoised state."""
    reference, other = make(kind), make(kind, shift=0.1)
    p = problem(reference)
    conditional = lambda x, s, y: reference.model(x, s, y)  # noqa: E731
    solution = sc.solve(p, sc.ClassifierFreeGuidance(conditional, 0.0, 1), seed=0, **kind[3])
    x = randn(5, 2, seed=4)
    with torch.no_grad():
        chain = solution.chain
        want = reference.shifts_towards(other.model, chain)(1, x, None)
        assert torch.allclose(solution.control.on_chain(chain)(1, x, None), want, atol=1e-9)
    tweedie = sc.solve(p, sc.ValueGuidance(value="tweedie"), seed=0, **kind[3]).control
    want = p.reward(reference.denoised(x, chain.clock[1])) / p.alpha
    assert torch.allclose(tweedie.value.at(x, chain.times[1]), want, atol=1e-9)
    seen = []

    def classifier(x, s):
        seen.append(s)
        return torch.stack((x[:, 0], x[:, 1]), 1)

    sc.solve(p, sc.ClassifierGuidance(classifier, 1, noisy=True), seed=0, **kind[3]).simulate(4, seed=0)
    clocks = torch.stack([reference.model_time(t, x) for t in chain.clock[:-1]])
    assert all(s.shape == (4,) and bool((s[0] == clocks).any()) for s in seen[-chain.steps :])


@pytest.mark.parametrize("start", ["fixed", "controlled"])
def test_a_solution_of_a_kind_of_its_own_is_saved(start, tmp_path):
    p = problem(make(KINDS["own"]), start=start)
    solution = sc.solve(p, "reward-backprop", iterations=2, batch_size=64, seed=0)
    solution.save(tmp_path)
    assert torch.equal(sc.load(tmp_path, p).sample(9, seed=1), solution.sample(9, seed=1))
    assert math.isfinite(solution.evaluate(128, seed=0).elbo.value)
    with pytest.raises(ValueError, match="its own 5 steps"):
        p.chain(10)
