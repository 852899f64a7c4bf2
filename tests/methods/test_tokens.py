"""Methods on tokens: each finds the exact tilted law of 4 tokens of 3 letters, known by enumeration."""

import math

import pytest
import torch
from cases import F64, randn, slow_but
from tokens import Joint, Net, chi_square_is_fine
from torch import nn

import sdecontrol as sc
from sdecontrol.chains.categorical import CategoricalChain
from sdecontrol.chains.masking import MaskingBridge
from sdecontrol.chains.shifts import shifts_along
from sdecontrol.controls.guidance import GivenValue
from sdecontrol.controls.token_guidance import TokenValueControl
from sdecontrol.methods import ratio_fit, ratio_tokens
from sdecontrol.methods.base import find_method, method_names

JOINT = Joint(size=1.5, seed=3)
START = 1.0  # nats: the untuned model's gap


def exact_value(joint):
    """``v(x, t)`` of a model with the conditionals of a joint law: of the letters that are there alone."""
    V = joint.vocabulary
    given = ((joint.states.unsqueeze(1) == joint.points) | (joint.states.unsqueeze(1) == V)).all(2).to(F64)
    psi = (given @ (joint.law * (joint.r / joint.alpha).exp())) / (given @ joint.law)
    return lambda x, t: joint.alpha * psi.log()[joint.at(x)]


def free(x, t):
    return torch.zeros(*x.shape, JOINT.vocabulary, dtype=F64)


def tilt_of(joint, problem, solution, n=1 << 12):
    """Samples against the exact tilted law."""
    order = "independent" if problem.chain().independent else "random"
    law = joint.tilted(joint.chain_of(joint.letters(joint.model), problem.chain().steps, order))
    x = solution.sample(n, seed=5)
    return joint.counts(x), law


def test_the_untuned_model_is_a_nat_away():
    assert JOINT.gap_of(JOINT.problem(order="random"), free) > START


class Table(nn.Module):
    """A tilt for each state: all that a control of tokens can be."""

    def __init__(self):
        super().__init__()
        self.tilt = nn.Parameter(torch.zeros(len(JOINT.states), 4, 3, dtype=F64))

    def forward(self, x, t):
        return self.tilt[JOINT.at(x)]


TRAINED = {
    "soft-ppo": (sc.SoftPPO(epochs=2), 100),
    "log-variance": (sc.LogVariance(), 100),
    "path-consistency": (sc.PathConsistency(), 100),
    "reward-weighted-mle": (sc.RewardWeightedMLE(), 150),
    "cross-entropy": (sc.CrossEntropy(trust_region=1.0), 100),
    "reinforce": (sc.Reinforce(), 100),
    "bridge-matching": (sc.BridgeMatching(), 100),
    "particle-matching": (sc.ParticleMatching(num_particles=4096, refresh=50), 100),
}
OPTIONS = {"batch_size": 256, "learning_rate": 0.1, "seed": 0, "progress": False}


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(TRAINED, "log-variance", "path-consistency", "bridge-matching"))
def test_trained_methods_come_to_the_exact_tilt(name):
    """The exact gap, by enumeration, from more than a nat."""
    problem, (method, iterations) = JOINT.problem(order="random"), TRAINED[name]
    solution = sc.solve(problem, method, iterations=iterations, control=Table(), **OPTIONS)
    assert JOINT.gap_of(problem, solution.control) < 0.05


class Fast(Table):
    """The same, which moves ten times as far in a step."""

    def forward(self, x, t):
        return 10 * super().forward(x, t)


@pytest.mark.parametrize(
    ("method", "options", "most"),
    [
        pytest.param(
            sc.PathConsistency(1),
            {"iterations": 300, "learning_rate": 0.003, "batch_size": 128},
            0.4,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            sc.PathConsistency(2),
            {"iterations": 200, "learning_rate": 0.01, "batch_size": 128},
            0.1,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            sc.SoftPPO(group_size=64, baseline="per-time"),
            {"iterations": 150, "learning_rate": 0.003},
            0.1,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["path-consistency-1", "path-consistency-2", "soft-ppo-groups"],
)
def test_slower_methods_come_to_the_exact_tilt(method, options, most):
    """Of short sub-trajectories the value is learned with the control, and at its rate; groups divide by their own
    spread."""
    problem = JOINT.problem(order="random")
    solution = sc.solve(problem, method, control=Fast(), **{**OPTIONS, **options})
    assert JOINT.gap_of(problem, solution.control) < most


@pytest.mark.slow
@pytest.mark.parametrize("value", ["monte-carlo", "soft-q"])
def test_trained_values_guide_to_the_exact_tilt(value):
    problem = JOINT.problem(order="random")
    solution = sc.solve(problem, sc.ValueGuidance(value), iterations=300, batch_size=128, seed=0, progress=False)
    assert JOINT.gap_of(problem, solution.control) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "most"), [({"order": "random"}, 0.01), pytest.param({"steps": 16}, 0.05, marks=pytest.mark.slow)]
)
def test_a_density_ratio_guides_to_the_exact_tilt_by_rounds_on_its_own_paths(options, most):
    """Above the floor; the first regression, on paths of the reference, is farther."""
    problem, gaps = JOINT.problem(**options), []
    floor = float(sc.exact_solution(problem).floor)
    for iterations in (1, 3):
        method = sc.ValueGuidance("ratio", num_paths=4096)
        solution = sc.solve(problem, method, iterations=iterations, seed=0, progress=False)
        gaps.append(JOINT.gap_of(problem, solution.control) - floor)
    assert -1e-9 < gaps[1] < min(most, 0.5 * gaps[0])


@pytest.mark.parametrize(
    "method, most",
    [
        (sc.LogVariance(), 0.04),
        pytest.param(sc.SoftPPO(), 0.04, marks=pytest.mark.slow),
        pytest.param(sc.PathConsistency(1), 0.04, marks=pytest.mark.slow),
        pytest.param(sc.CrossEntropy(), 0.06, marks=pytest.mark.slow),
    ],
    ids=["log-variance", "soft-ppo", "path-consistency", "cross-entropy"],
)
def test_a_controlled_start_is_learned_with_the_rest(method, most, tmp_path):
    """Against the exact tilted start, which a fixed one is 0.13 nats from."""
    q = 0.3 * randn(5, 5, seed=1).exp()
    q = q - torch.diag(q.sum(1))
    process = sc.JumpProcess(q, initial=torch.tensor([0.1, 0.2, 0.0, 0.4, 0.3], dtype=F64))
    problem = sc.ControlProblem(process, reward=lambda x: 0.7 * (x[:, 0] - 1.0).abs().to(F64), start="controlled")
    exact = sc.exact_solution(problem, time_steps=6)
    options = {"iterations": 80, "batch_size": 256, "seed": 0, "progress": False}
    solution = sc.solve(problem, method, time_steps=6, **options)
    assert solution.evaluate(4096, seed=1).gap.value < most
    drawn = torch.bincount(solution.initial.sample((8192,), seed=2)[:, 0], minlength=5) / 8192
    assert float((drawn - exact.initial.probs).abs().sum()) < 0.12 and drawn[2] == 0
    solution.save(tmp_path / "it.sdc")
    again = sc.load(tmp_path / "it.sdc", problem=problem)
    assert torch.equal(again.sample(64, seed=3), solution.sample(64, seed=3))


@pytest.mark.slow
def test_a_density_ratio_of_a_jump_process_is_the_value():
    """``v/alpha`` at all states and times, in closed form."""
    rates = torch.tensor([[-1.0, 1.0, 0.0], [0.5, -1.5, 1.0], [0.0, 2.0, -2.0]], dtype=F64)
    r = torch.tensor([0.0, 0.5, 2.0], dtype=F64)
    process = sc.JumpProcess(rates, horizon=1.0, initial=torch.tensor([0.4, 0.3, 0.3], dtype=F64))
    problem = sc.ControlProblem(process, reward=lambda x: r[x[:, 0]], alpha=0.8)
    method = sc.ValueGuidance("ratio", num_paths=4096)
    solution = sc.solve(problem, method, iterations=2, time_steps=8, seed=0, progress=False)
    exact, x = sc.exact_solution(problem, like=solution), torch.tensor([[0], [1], [2]])
    for t in (0.125, 0.5, 0.875):
        found = solution.control.value.at(x, torch.tensor(t, dtype=F64))
        assert torch.allclose(found, exact.value(x, t) / 0.8, atol=0.1)
    assert float(sc.control_error(solution, exact, n=512).relative.value) < 0.02


def test_a_density_ratio_of_a_steep_reward_goes_down_in_temperature():
    joint = Joint(size=8.0, seed=3)
    problem = joint.problem(order="random")
    with pytest.warns(RuntimeWarning, match="are effective: the value is for temperature"):
        solution = sc.solve(problem, sc.ValueGuidance("ratio", num_paths=1024), iterations=1, seed=0, progress=False)
    assert solution.history[-1]["temperature"] > 1.2


def test_rounds_of_a_density_ratio_of_tokens_go_on_while_they_gain(monkeypatch):
    """Short regressions, each of which leaves a good part of the value to the next: a round that seems worse by chance
    is no reason to go back. The exact gap falls."""
    monkeypatch.setattr(ratio_tokens, "STEPS", 40)
    problem, method, gaps = JOINT.problem(order="random"), sc.ValueGuidance("ratio", num_paths=1024), []
    for iterations in (1, 3):
        solution = sc.solve(problem, method, iterations=iterations, seed=0, progress=False)
        gaps.append(JOINT.gap_of(problem, solution.control))
    assert all(math.isfinite(row["loss"]) for row in solution.history) and len(solution.history) == 3
    assert gaps[1] < gaps[0] - 0.03


@pytest.mark.parametrize(("length", "kept"), [(1.0, 1.0), (-30.0, 0.0)], ids=["good", "wrong"])
def test_a_round_of_tokens_that_makes_the_guidance_worse_is_taken_back_the_last_one_too(length, kept, monkeypatch):
    """A round in the wrong direction, which is the last: without a measurement after it, it stands as it is."""
    found, step = [], ratio_tokens.regress_ratio
    monkeypatch.setattr(ratio_tokens, "STEPS", 40)

    def scaled(state, run, drawn, beta):
        before = {k: v.clone() for k, v in state.value.state_dict().items()}
        loss = step(state, run, drawn, beta)
        found.append(before)
        if len(found) == 2:
            for name, now in state.value.state_dict().items():
                if now.is_floating_point():
                    now.copy_(before[name] + length * (now - before[name]))
        return loss

    monkeypatch.setattr(ratio_tokens, "regress_ratio", scaled)
    method = sc.ValueGuidance("ratio", num_paths=1024)
    solution = sc.solve(JOINT.problem(order="random"), method, iterations=2, seed=0, progress=False)
    assert solution.history[-1]["kept"] == kept
    state = solution.control.value.state_dict()
    same = all(torch.equal(state[name], value) for name, value in found[1].items())
    assert same == (kept == 0)


def test_a_density_ratio_of_tokens_is_resumed_and_loaded_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(ratio_tokens, "STEPS", 20)
    monkeypatch.setattr(ratio_fit, "ROWS", 2)  # of four steps: which ones is drawn
    problem, method = JOINT.problem(order="random"), sc.ValueGuidance("ratio", num_paths=512)
    options = {"seed": 0, "progress": False, "checkpoint_every": 1}
    whole = sc.solve(problem, method, iterations=3, checkpoint_dir=tmp_path / "whole", **options)

    class Stop:
        def on_step_end(self, state):
            if state.iteration == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sc.solve(problem, method, iterations=3, checkpoint_dir=tmp_path / "parts", callbacks=[Stop()], **options)
    again = sc.solve(problem, method, iterations=3, checkpoint_dir=tmp_path / "parts", resume=True, **options)
    again.save(tmp_path / "saved")
    loaded = sc.load(tmp_path / "saved", problem)
    for other in (again, loaded):
        assert all(
            torch.equal(a, b) for a, b in zip(whole.control.state_dict().values(), other.control.state_dict().values())
        )


@pytest.mark.slow
def test_a_tuned_copy_comes_to_the_exact_tilt():
    problem = JOINT.problem(Net(), order="random")
    before = JOINT.gap_of(problem, free)
    solution = sc.solve(
        problem, sc.LogVariance(), iterations=400, batch_size=128, learning_rate=1e-2, seed=0, progress=False
    )
    assert before > 0.8 and JOINT.gap_of(problem, solution.control) < 0.25


def test_f_divergences_are_rewards_of_tokens_too():
    """Chi-squared: the law of the end is its own tilt, ``p max(0, 1 + (r - lam)/(2 alpha))``."""
    joint = Joint(size=0.5, seed=3)
    plain = joint.problem(order="random")
    x = sc.simulate(plain, 1 << 14, seed=1, keep="end").samples
    reward = sc.FDivergence(joint.reward, "chi-squared", alpha=1.0, samples=x)
    problem = sc.ControlProblem(plain.reference, reward=reward, alpha=1.0)
    solution = sc.solve(problem, sc.LogVariance(), iterations=100, control=Table(), **OPTIONS)
    tilt = (1 + (joint.r - (joint.law * joint.r).sum()) / 2).clamp(min=0) * joint.law
    x = solution.sample(1 << 12, seed=2)
    found = joint.counts(x) / len(x)
    assert 0.5 * float((found - tilt / tilt.sum()).abs().sum()) < 0.08


# ---------------------------------------------------------------- nothing trained


def test_the_exact_value_guides_exactly_one_position_a_step_and_to_order_h_several():
    problem = JOINT.problem(order="random")
    solution = sc.solve(problem, sc.ValueGuidance(exact_value(JOINT)), seed=0)
    assert abs(JOINT.gap_of(problem, solution.control)) < 1e-9
    counts, law = tilt_of(JOINT, problem, solution)
    assert chi_square_is_fine(counts, law)
    log_w = solution.weighted_sample(64, seed=1)[1]
    assert torch.allclose(
        log_w, torch.full_like(log_w, JOINT.log_z(JOINT.chain_of(JOINT.letters(JOINT.model), 4, "random")))
    )
    gaps = []
    for steps in (8, 16):
        several = JOINT.problem(steps=steps)
        gaps.append(JOINT.gap_of(several, sc.solve(several, sc.ValueGuidance(exact_value(JOINT)), seed=0).control))
    assert 0.35 < gaps[1] / gaps[0] < 0.65 and gaps[1] < 0.3 * START


def test_one_variable_is_guided_by_the_value_of_the_next_state():
    """A chain on three tokens with a running cost: ``u(x, y) = v_{k+1}(y)/alpha``."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(4, 3, 3, generator=generator, dtype=F64).log_softmax(-1)
    r, f = torch.randn(3, generator=generator, dtype=F64), torch.rand(3, generator=generator, dtype=F64)
    chain = CategoricalChain(lambda k, x: table[k][x], 4, 3, torch.zeros(1, dtype=torch.int64), dtype=F64)
    problem = sc.ControlProblem(chain, reward=lambda x: r[x[:, 0]], running_cost=lambda x, t: f[x[:, 0]], alpha=0.7)
    values = [r / 0.7]
    for k in reversed(range(4)):
        values.insert(0, -f / (4 * 0.7) + (table[k].exp() @ values[0].exp()).log())
    value = torch.stack(values)
    solution = sc.solve(problem, sc.ValueGuidance(lambda x, t: 0.7 * value[(t * 4).round().long(), x[:, 0]]), seed=0)
    log_w = solution.weighted_sample(64, seed=1)[1]
    assert torch.allclose(log_w, torch.full_like(log_w, float(value[0, 0])), atol=1e-12)


def test_path_integral_guidance_comes_to_the_tilt_with_its_paths():
    """The gap falls as 1/num_paths."""
    problem, gaps = JOINT.problem(order="random"), []
    for n in (64, 512):
        solution = sc.solve(problem, sc.PathIntegralGuidance(num_paths=n), seed=0)
        gaps.append(JOINT.gap_of(problem, solution.control))
    assert gaps[1] < 0.05 and 0.05 < gaps[1] / gaps[0] < 0.4


def test_path_integral_guidance_of_a_chain_with_a_cost():
    """Generic kernels: tokens that change at every step, weighted by what comes after."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3, 3, 3, generator=generator, dtype=F64).log_softmax(-1)
    r = 2 * torch.randn(3, generator=generator, dtype=F64)
    chain = CategoricalChain(lambda k, x: table[k][x], 3, 3, torch.zeros(1, dtype=torch.int64), dtype=F64)
    problem = sc.ControlProblem(chain, reward=lambda x: r[x[:, 0]], alpha=1.0)
    ev = sc.solve(problem, sc.PathIntegralGuidance(num_paths=512), seed=0).evaluate(256, seed=1, confirm=False)
    plain = sc.simulate(problem, 4096, seed=1)
    assert ev.gap.value < 0.02 < 0.2 < float(plain.log_weights().exp().mean().log() - plain.log_weights().mean())


def test_classifier_guidance_by_an_exact_classifier_of_masked_tokens_is_exact():
    """``log p(label | x_s)`` by enumeration; the target is the conditional law."""
    joint = Joint(seed=4)
    logits = torch.randn(81, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    p_label = logits.softmax(1)
    given = ((joint.states.unsqueeze(1) == joint.points) | (joint.states.unsqueeze(1) == 3)).all(2).to(F64) * joint.law
    noisy = ((given / given.sum(1, keepdim=True)) @ p_label).log()
    clean = lambda x: logits[(x * 3 ** torch.arange(3, -1, -1)).sum(-1)]  # noqa: E731
    joint.r = p_label[:, 1].log()
    chain = sc.masked_diffusion(joint.model, 4, 3, order="random", dtype=F64)
    problem = sc.ControlProblem(chain, reward=sc.LogProb(clean, 1), alpha=1.0)
    exact = sc.solve(problem, sc.ClassifierGuidance(lambda x, s: noisy[joint.at(x)], label=1, noisy=True), seed=0)
    assert abs(joint.gap_of(problem, exact.control)) < 1e-9
    # of clean tokens, filled in by what the model expects
    denoised = sc.solve(problem, sc.ClassifierGuidance(), seed=0)
    assert joint.gap_of(problem, denoised.control) < 0.5 * joint.gap_of(problem, free)


def test_classifier_free_guidance_samples_the_conditional_model():
    joint = Joint(seed=4)
    joint.r = torch.randn(81, generator=torch.Generator().manual_seed(2), dtype=F64)
    tilted = Joint(seed=4)
    tilted.law = joint.law * joint.r.exp() / (joint.law * joint.r.exp()).sum()
    given = ((joint.states.unsqueeze(1) == joint.points) | (joint.states.unsqueeze(1) == 3)).all(2).to(F64) * tilted.law
    each = torch.einsum("sp,plv->slv", given, nn.functional.one_hot(joint.points, 3).to(F64))
    conditional = (each / given.sum(1)[:, None, None]).clamp(min=1e-12).log()
    problem = joint.problem(order="random")
    options = {"conditional": lambda x, s, y: conditional[joint.at(x)], "label": 0}
    solution = sc.solve(problem, sc.ClassifierFreeGuidance(weight=0.0, **options), seed=0)
    assert abs(joint.gap_of(problem, solution.control)) < 1e-9
    u = sc.solve(problem, sc.ClassifierFreeGuidance(weight=1.0, **options), seed=0).control(joint.states, 0.5)
    wanted = (2 * conditional - joint.logits).log_softmax(-1) - joint.logits.log_softmax(-1)
    masked = joint.states == 3
    assert torch.allclose(u[masked], wanted[masked], atol=1e-9)


@pytest.mark.parametrize(
    "method",
    [
        sc.SMC(num_particles=64),
        sc.SMC(num_particles=64, twist=exact_value(JOINT)),
        sc.SMC(num_particles=64, twist="tweedie"),
        sc.SMC(num_particles=16, proposal=sc.ValueGuidance("tweedie"), twist="proposal"),
        sc.TemperedSMC(num_particles=256),
        pytest.param(sc.BestOfN(n=32, selection="softmax"), marks=pytest.mark.slow),
    ],
    ids=["smc", "exact-twist", "denoised-twist", "denoised-guidance", "tempered-smc", "best-of-n"],
)
def test_particles_have_the_exact_log_z_and_the_tilted_law(method):
    problem = JOINT.problem(order="random")
    solution = sc.solve(problem, method, seed=0, progress=False)
    found, exact = solution.evaluate(2048, seed=1), JOINT.log_z(JOINT.chain_of(JOINT.letters(JOINT.model), 4, "random"))
    assert abs(found.log_z.value - exact) < 4 * found.log_z.stderr + 2e-3
    counts, law = tilt_of(JOINT, problem, solution)
    assert 0.5 * float((counts / counts.sum() - law).abs().sum()) < 0.12


def test_the_denoised_value_is_the_log_mean_over_ends_filled_in():
    problem = JOINT.problem(order="random")
    value = sc.solve(problem, sc.ValueGuidance("tweedie"), seed=0).control.value
    x = JOINT.points[:5]
    assert torch.allclose(value.at(x, torch.tensor(1.0, dtype=F64)), JOINT.reward(x))  # nothing is masked
    masked = JOINT.states[-1:]
    assert JOINT.r.min() < float(value.at(masked, torch.tensor(0.0, dtype=F64))) < JOINT.r.max()
    assert torch.equal(*(value.at(masked, torch.tensor(0.0, dtype=F64)) for _ in range(2)))


def test_guidance_by_values_asks_for_all_neighbours_and_no_more():
    asked = []

    def value(x, t):
        asked.append(x)
        return torch.zeros(len(x), dtype=F64)

    problem = JOINT.problem(order="random")
    control = TokenValueControl(GivenValue(value, 1.0), problem, problem.chain())
    x = torch.tensor([[0, 3, 1, 3], [2, 2, 2, 2]])
    u = control(x, 0.5)
    assert len(asked) == 1 and asked[0].tolist() == [
        [0, 0, 1, 3], [0, 1, 1, 3], [0, 2, 1, 3], [0, 3, 1, 0], [0, 3, 1, 1], [0, 3, 1, 2]
    ]  # fmt: skip
    assert u.shape == (2, 4, 3)


# ---------------------------------------------------------------- bridges


@pytest.mark.parametrize("order", ["independent", "random"])
def test_bridges_mask_the_end_as_the_chain_unmasks_it(order):
    """States given the end: of the chain's own paths to it, and drawn by the bridge."""
    joint = Joint(length=3, spread=0.0)
    problem = joint.problem(order=order, steps=3)
    chain = problem.chain()
    paths = sc.simulate(problem, 1 << 13, seed=1)
    noise = torch.randn(1, len(paths), 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    drawn = MaskingBridge(chain).between(paths.states[0], paths.end, noise)
    for k in range(1, 3):
        own, bridged = (
            torch.bincount(((x[k] == 3) * 2 ** torch.arange(3)).sum(1), minlength=8) for x in (paths.states, drawn)
        )
        assert float((own - bridged).abs().max()) < 5 * math.sqrt(2 * len(paths) / 8)
    opened = (drawn[:-1] != 3) & (drawn[1:] == 3)
    assert not bool(opened.any()) and bool((drawn[0] == 3).all())
    assert bool(((drawn == 3) | (drawn == paths.end)).all())


def test_the_misfit_of_a_bridge_is_the_mean_of_minus_the_log_ratio():
    """Over the steps of paths to their ends, 2^13 of each: 5 standard errors."""
    problem = JOINT.problem(steps=4)
    control = sc.solve(problem, sc.ValueGuidance(exact_value(JOINT)), seed=0).control
    paths = sc.simulate(problem, 1 << 13, seed=1)
    with torch.no_grad():
        ratio = -paths.under(control).log_ratio
        chain, before = problem.chain(), paths.states[:-1]
        found = MaskingBridge(chain).misfit(shifts_along(chain, control, before), before, paths.end)
    error = (ratio - found).std(1) / math.sqrt(len(paths))
    assert bool(((ratio - found).mean(1).abs() < 5 * error + 1e-12).all())
    assert float(found.var(1).mean()) < 0.7 * float(ratio.var(1).mean())  # the times are averaged out


# ---------------------------------------------------------------- what cannot work


REFUSED = ("adjoint-matching", "socm", "reward-backprop", "mala", "hmc", "nuts", "auto")


@pytest.mark.parametrize("name", [n for n in method_names() if n in REFUSED])
def test_what_cannot_work_on_tokens_refuses_by_name(name):
    with pytest.raises((ValueError, TypeError)) as error:
        sc.solve(JOINT.problem(), name, iterations=None, progress=False)
    assert name in str(error.value)


def test_a_density_ratio_of_tokens_takes_no_conditions():
    chain = sc.masked_diffusion(lambda x, s, y: JOINT.model(x, s), 4, 3, dtype=F64)
    problem = sc.ControlProblem(chain, reward=lambda x, y: JOINT.reward(x), condition=torch.zeros(8, 1, dtype=F64))
    with pytest.raises(ValueError, match="takes no conditions where states are tokens"):
        find_method(sc.ValueGuidance("ratio")).check(problem)
