"""Classifier-free guidance against closed forms: class-conditional Gaussian mixtures in the model's place. All seeds
are fixed; bounds of 4 standard errors would be passed by a right program with probability 0.9999 each on a fresh
seed."""

import math

import pytest
import torch
from cases import F64, randn

import sdecontrol as sc
from sdecontrol.evaluation.estimates import mean_estimate
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.processes.generative import MixtureNoise

SHARES = torch.tensor([0.3, 0.5, 0.2], dtype=F64)  # of the three components; class 1 has the second and third
CLASSES = ([0], [1, 2])
PRIOR = (0.3, 0.7)
VP = sc.VP()
ABAR = torch.linspace(0.9995, 0.01, 60, dtype=F64).pow(1.2)


def law(components=(0, 1, 2), d=2):
    """The data, or that of one class."""
    means = 1.5 * randn(3, d, seed=3)
    covariances = torch.stack([torch.eye(d, dtype=F64) * v for v in (0.2, 0.3, 0.15)])
    index = torch.tensor(components)
    return sc.GaussianMixture(SHARES[index] / SHARES[index].sum(), means[index], covariances[index])


def conditional(x, s, y):
    """The exact noise prediction of each row's class."""
    noises = torch.stack([MixtureNoise(law(c, x.shape[1]), VP)(x, s) for c in CLASSES])
    return noises[y, torch.arange(len(x))]


def log_posterior(y, d=2):
    """``log p(y | x)``, exact."""
    return lambda x: math.log(PRIOR[y]) + law(CLASSES[y], d).log_prob(x) - law(d=d).log_prob(x)


def problem(y=1, d=2, **options):
    return sc.ControlProblem(
        sc.generative_sde(law(d=d), VP),
        initial=sc.Gaussian(torch.zeros(d, dtype=F64), 1.0),
        reward=log_posterior(y, d) if "condition" not in options else None,
        start="memoryless",
        **options,
    )


class Discrete(torch.nn.Module):
    """A discrete model whose noise predictions are those of the mixture."""

    def __init__(self, components=(0, 1, 2)):
        super().__init__()
        self.law = law(components)

    def forward(self, x, n):
        a = ABAR[n.reshape(-1)[0]]
        return -(1 - a).sqrt() * self.law.noised(float(a.sqrt()), float((1 - a).sqrt())).score(x)


def discrete_conditional(x, n, y):
    return torch.stack([Discrete(c)(x, n) for c in CLASSES])[y, torch.arange(len(x))]


def chains(kind):
    """The problem, the conditional model, and the uncontrolled chains of the two classes."""
    if kind == "ddpm":
        make = [sc.diffusion_chain(Discrete(c), ABAR, shape=(2,), steps=12) for c in ((0, 1, 2), *CLASSES)]
        made = [sc.ControlProblem(c, initial=sc.Gaussian(torch.zeros(2, dtype=F64), 1.0), start="fixed") for c in make]
        return made[0], discrete_conditional, [p.chain() for p in made[1:]], {}
    made = [sc.ControlProblem(sc.generative_sde(law(c), VP), start="fixed") for c in ((0, 1, 2), *CLASSES)]
    grid = {"time_steps": [1 - (1 - k / 12) ** 1.5 for k in range(13)], "scheme": kind}
    return made[0], conditional, [p.chain(**grid) for p in made[1:]], grid


@pytest.mark.parametrize("y", [0, 1])
@pytest.mark.parametrize("kind", ["euler", "ddpm"])
def test_the_shift_is_1_plus_w_times_that_to_the_conditional_chain_s_own_mean(kind, y):
    """At every step, to rounding: so for w = 0 the controlled chain is the conditional model's chain, and for w = -1
    the reference's."""
    made, model, classes, grid = chains(kind)
    for w in (-1.0, 0.0, 2.0):
        solution = sc.solve(made, sc.ClassifierFreeGuidance(model, w, y), seed=0, **grid)
        chain = solution.chain
        shift = solution.control.on_chain(chain)
        for k in range(chain.steps):
            x = 2 * randn(5, 2, seed=k)
            mean, scale = chain.kernel(k, x)
            want = (1 + w) * (classes[y].kernel(k, x)[0] - mean) / scale
            assert torch.allclose(shift(k, x, None), want, rtol=1e-9, atol=1e-9), (k, w)
            # the same by its face, with a time per row
            u = solution.control(x, chain.times[k].expand(5))
            assert torch.allclose(chain.shift_at(k, x, u), want, rtol=1e-9, atol=1e-9), (k, w)


@pytest.mark.slow
def test_w_0_has_the_class_conditional_law_as_its_samples_and_its_kl_is_that_of_the_laws():
    """In continuous time ``KL(P^u || Q0) = KL(p(x|y) || p(x))`` (the noising of both laws is the same), so the gap
    towards ``r = log p(y|x)`` at alpha = 1 vanishes. On the chain both are O(h) away, with h = 0.01 here."""
    y, n = 1, 4096
    x = _exact_draws(y, 50_000)
    want = mean_estimate(log_posterior(y)(x) - math.log(PRIOR[y]))
    solution = sc.solve(problem(y), sc.ClassifierFreeGuidance(conditional, 0.0, y), time_steps=100, seed=0)
    paths = solution.simulate(n, seed=1, keep="end")
    kl, log_w = mean_estimate(paths.kl()), log_weights(solution.problem, paths)
    assert abs(kl.value - want.value) < 4 * math.hypot(want.stderr, kl.stderr) + 0.02
    ratio = mean_estimate(paths.log_ratio() - paths.kl())  # of mean 0: sum c xi
    assert abs(ratio.value) < 4 * ratio.stderr
    z, elbo = mean_estimate(log_w.exp()), mean_estimate(log_w)
    assert abs(z.value - PRIOR[y]) < 4 * z.stderr + 0.02
    assert abs(elbo.value - math.log(PRIOR[y])) < 4 * elbo.stderr + 0.04
    floor = sc.metrics.sliced_wasserstein(_exact_draws(y, n, seed=5), x[:n])
    assert sc.metrics.sliced_wasserstein(paths.samples, x[:n]) < 0.02 + 2 * floor
    assert sc.metrics.sliced_wasserstein(_exact_draws(0, n, seed=5), x[:n]) > 0.5  # what the other class would score


def _exact_draws(y, n, seed=7):
    torch.manual_seed(seed)
    return law(CLASSES[y]).sample((n,))


def test_smc_over_it_has_the_conditional_law_whatever_the_weight():
    """With w = 1.5 the samples are over-guided; as a proposal it changes no limit, and log Z is log p(y)."""
    y = 1
    guidance = sc.ClassifierFreeGuidance(conditional, 1.5, y)
    alone = sc.solve(problem(y), guidance, time_steps=40, seed=0)
    particles = sc.solve(problem(y), sc.SMC(256, proposal=guidance), time_steps=40, seed=0)
    exact = _exact_draws(y, 2048)
    near = sc.metrics.sliced_wasserstein(particles.sample(2048, seed=1), exact)
    assert near < 0.06 < 0.12 < sc.metrics.sliced_wasserstein(alone.sample(2048, seed=1), exact)
    log_z = particles.evaluate(4096, seed=2).log_z
    assert abs(log_z.value - math.log(PRIOR[y])) < 4 * log_z.stderr + 0.03
    _, log_w = alone.weighted_sample(4096, seed=3)
    weights = mean_estimate(log_w.exp())
    assert abs(weights.value - PRIOR[y]) < 4 * weights.stderr + 0.02


def test_labels_from_the_problem_s_condition_and_the_guided_model():
    made = problem(condition=torch.tensor([0, 1]))
    solution = sc.solve(made, sc.ClassifierFreeGuidance(conditional, 0.5), time_steps=20, seed=0)
    y = torch.arange(300) % 2
    mixed = solution.sample(300, seed=1, condition=y)
    for label in (0, 1):
        alone = sc.solve(problem(), sc.ClassifierFreeGuidance(conditional, 0.5, label), time_steps=20, seed=0)
        assert torch.allclose(mixed[y == label], alone.sample(300, seed=1)[y == label], rtol=1e-9, atol=1e-9)
    x, t = randn(6, 2, seed=2), torch.tensor([0.1, 0.7, 0.1, 0.3, 0.7, 0.3], dtype=F64)
    rows = [solution.control(x[i : i + 1], t[i], y[i : i + 1])[0] for i in range(6)]
    assert torch.allclose(solution.control(x, t, y[:6]), torch.stack(rows), rtol=1e-9, atol=1e-9)
    x, s = randn(4, 2, seed=1), torch.full((4,), 0.4, dtype=F64)
    want = 1.5 * conditional(x, s, y[:4]) - 0.5 * MixtureNoise(law(), VP)(x, s)
    assert torch.allclose(solution.model(x, s, y[:4]), want, rtol=1e-9, atol=1e-9)


class Conditional(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2, dtype=F64)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x, s, y):
        return self.dropout(self.layer(torch.cat((x, y[:, None].to(x.dtype)), 1)))


def test_modules_are_left_as_they_are_and_solutions_are_saved_without_them(tmp_path):
    model = Conditional().train()
    solution = sc.solve(problem(), sc.ClassifierFreeGuidance(model, 1.0, 1), time_steps=5, seed=0)
    x = solution.sample(64, seed=1)
    assert model.training and model.layer.weight.requires_grad
    assert torch.equal(x, solution.sample(64, seed=1))  # no dropout
    solution.save(tmp_path)
    again = sc.load(tmp_path, problem(), control=solution.control)
    assert torch.equal(again.sample(64, seed=1), x)
    with pytest.raises(TypeError, match="give it again"):
        sc.load(tmp_path, problem())


def test_a_controlled_start_keeps_its_law():
    made = sc.ControlProblem(sc.generative_sde(law(), sc.VP(0.1, 4.0)), reward=log_posterior(1), start="controlled")
    solution = sc.solve(made, sc.ClassifierFreeGuidance(conditional, 0.0, 1), time_steps=8, seed=0)
    paths = solution.simulate(64, seed=0)
    start = solution.chain.start
    assert bool((paths.shifts[:start] == 0).all()) and bool((paths.shifts[start:] != 0).any())


def linear_problem():
    return sc.ControlProblem(sc.BrownianMotion(2, torch.eye(2)), initial=sc.Dirac(torch.zeros(2)))


def clipped_problem():
    return sc.ControlProblem(sc.diffusion_chain(Discrete(), ABAR, shape=(2,), steps=5, clip=3.0), start="fixed")


def conditional_reference():
    sde = sc.generative_sde(Conditional(), VP, shape=(2,))
    return sc.ControlProblem(sde, condition=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("make", "options", "kind", "match"),
    [
        (problem, {"conditional": None}, TypeError, "conditional must be a model"),
        (problem, {"conditional": lambda x, s: x}, TypeError, r"called as conditional\(x, s, y\)"),
        (problem, {"conditional": lambda x, s, y: x[:, :1]}, ValueError, r"conditional must return shape \(3, 2\)"),
        (problem, {"conditional": lambda x, s, y: x.float()}, TypeError, "conditional returned dtype"),
        (problem, {"conditional": lambda x, s, y: x @ x}, RuntimeError, "conditional failed when called as"),
        (problem, {"weight": float("inf")}, ValueError, "weight must be finite"),
        (problem, {"weight": "much"}, TypeError, "weight must be a number"),
        (problem, {"label": None}, ValueError, "label is missing"),
        (linear_problem, {}, ValueError, "pre-trained model as reference"),
        (clipped_problem, {}, ValueError, "clips its prediction"),
        (conditional_reference, {"label": None}, ValueError, "unconditional model"),
    ],
)
def test_bad_input(make, options, kind, match):
    with pytest.raises(kind, match=match):
        sc.solve(make(), sc.ClassifierFreeGuidance(**{"conditional": conditional, "label": 1, **options}))
    with pytest.raises(ValueError, match="trains nothing"):
        sc.solve(problem(), sc.ClassifierFreeGuidance(conditional, 1.0, 1), iterations=5)
