"""``recommend``: which method, and why, from what a problem offers (the tutorial's Figure 3 and Section 7, with what
was measured)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .. import ranks
from ..chains.base import Chain
from ..chains.blocks import graph_bytes
from ..chains.finite_start import tilts_starts
from ..chains.shifts import shift_function
from ..controls.build import build_control, continued
from ..errors import NoExactSolution
from ..evaluation.solution import Solution
from ..exact import exact_solution
from ..methods import (
    SMC,
    SOCM,
    AdjointMatching,
    BestOfN,
    ClassifierGuidance,
    CrossEntropy,
    LogVariance,
    Method,
    ParticleMatching,
    PathIntegralGuidance,
    RewardBackprop,
    SoftPPO,
    TemperedSMC,
    ValueGuidance,
)
from ..methods.base import Suggestion, advises
from ..methods.mixture_start import ends_for_a_mixture
from ..problems.differentiability import missing_gradients
from ..problems.learned_reward import LearnedReward
from ..problems.problem import ControlProblem, check_problem
from ..problems.rewards import modules_of
from ..processes.laws import draw
from ..tensors import as_float, check_recording
from .auto import Auto
from .compare import suggestion_label
from .costs import step_flops
from .ways import smaller_way

_GIB = 2.0**30
_LEAST_PATHS = 1024  # to which a value is fitted
_FEW = 64  # paths per gradient of what is trained beside an expensive model, in each process


@dataclass(frozen=True)
class Advice:
    """What :func:`recommend` returns: a sequence of :class:`Suggestion`, the first choice first; prints as text.

    Attributes:
        facts: what the problem offers, as it was found.
        suggestions: in order.
        warnings: what is not known, and what would bias the result.
    """

    facts: tuple[str, ...]
    suggestions: tuple[Suggestion, ...]
    warnings: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.suggestions)

    def __getitem__(self, i: int) -> Suggestion:
        return self.suggestions[i]

    def __iter__(self) -> Iterator[Suggestion]:
        return iter(self.suggestions)

    @property
    def methods(self) -> list[Method]:
        """The methods alone, as :func:`compare` takes them."""
        return [s.method for s in self.suggestions]

    def __str__(self) -> str:
        lines = ["The problem: " + "; ".join(self.facts) + "."]
        lines += [f"{i}. {suggestion_label(s)}: {s.reason}" for i, s in enumerate(self.suggestions, 1)]
        lines += [f"Note: {warning}" for warning in self.warnings]
        return "\n".join(lines)


@advises
def recommend(
    problem: ControlProblem,
    *,
    one_off: bool = False,
    time_steps: Any = None,
    batch_size: int = 256,
    control: nn.Module | Solution | None = None,
    memory: float = 4.0,
    work: float = 1e12,
) -> Advice:
    """Which methods to try on a problem, in order, each with its reason. Where none is named, ``solve`` takes the first
    and ``compare`` the first three.

    The order is that of measured errors at equal work where there are such measurements (docs/methods_closer.md), else
    the tutorial's. Where the reference's paths do not reach the target, particles look for several ways to it (some
    seconds; ``comparison/ways.py``), by up to 150 000 rewards, and only where the reward has a gradient.

    Args:
        one_off: samples are wanted once (guidance and particles, nothing trained); else many times, so that training
            pays.
        time_steps, batch_size, control: as they will be in ``solve``.
        memory: GiB that the graph of a backward pass may take; what it would take is measured on one step.
        work: floating-point operations that paths of the reference may take to which a value is fitted, where the
            model is a network to be tuned (the default: about half a minute of one core, and the whole fit some five
            times that; set it higher where there are more cores, or a GPU). Where they take more, a small network
            beside the model is trained (``control="frozen"``) if the reward has a gradient, else the value is fitted to
            fewer paths. They are counted on one step, the same on any machine.

    Returns:
        :class:`Advice`.
    """
    check_problem(problem)
    check_recording("recommend(...)")
    limit, work = as_float("memory", memory, positive=True), as_float("work", work, positive=True)
    chain = problem.chain(time_steps)
    graph, parameters = backward_graph(problem, chain, batch_size, control)
    fits = graph <= limit
    # a method may learn from a random part of the steps: as many as fit
    steps = None if fits else max(1, int(chain.steps * limit / graph))
    found = _trained(problem, chain, fits, steps) if not one_off else _one_off(problem, chain)
    facts = [f"a graph through all {chain.steps} steps takes about {graph:.2g} GiB"]
    if control is None and problem.reference.trainable and problem.reference.gaussian and not one_off:
        flops = step_flops(problem, chain) * chain.steps
        found = [*_for_networks(problem, chain, flops, work, limit), *found]
        facts.append(f"a path of the model takes {flops:.2g} floating-point operations")
    if problem.density is not None and control is None:
        found.insert(0, Suggestion(Auto(), _FOR_DENSITIES))
    if not one_off and control is None and (share := smaller_way(problem, chain)) is not None:
        found.insert(0, _with_ways(share))
    kept = [s for s in found if _accepts(s.method, problem)]
    return Advice(
        (*_facts(problem, chain, parameters), *facts),
        tuple(kept),
        tuple(_warnings(problem, one_off)),
    )


# ---------------------------------------------------------------- what to try


_FOR_DENSITIES = (
    "a density by itself: particles that learn where to begin; on the targets measured more exact for its evaluations "
    "than what is trained on paths (docs/tables/gibbs_table.md)."
)


_FOR_EVENTS = Suggestion(
    TemperedSMC(),
    "the reward is -inf at some states, and nothing is to be learned from paths of weight 0: particles find the way by "
    "a ladder of noise scales (of levels, where level= says which states are nearer), and log Z has an honest error. "
    "Particle matching learns a control from them.",
)


_FAR = Suggestion(
    ParticleMatching(),
    "no gradient needed; particles find modes that the control's own paths never reach, and the control learns "
    "from them: on mixture posteriors with modes far apart, where it begins with a mixture fitted to particles, "
    "nothing else that was trained came as near to the target (docs/tables/mixture.md).",
)


_FOR_NETWORKS = Suggestion(
    ValueGuidance("ratio"),
    "a pre-trained network: a value fitted to its own samples as a log density ratio guides it, nothing of the network "
    "is trained and no gradient of the reward is asked for. On digits it was nearer to the exactly tilted law than "
    "anything trained for as long (docs/tables/digits.md). A sample costs about three of the untuned model's; "
    "sc.distill puts the guidance into one tuned copy of the network, at the cost of one.",
)


_FOR_TOKENS = Suggestion(
    ValueGuidance("ratio"),
    "tokens: a value fitted to the reference's own samples as a log density ratio guides by the value of each "
    "neighbour, and no control is trained; on sequences of 4 tokens it came as near to the exactly tilted law as "
    "what is trained on paths in a third of their time (docs/tables/masked.md). A sample costs a value of every "
    "neighbour at each step.",
)


def _for_networks(problem: ControlProblem, chain: Chain, flops: float, work: float, memory: float) -> list[Suggestion]:
    """Where a path of the model takes so many floating-point operations, and all together may take ``work``."""
    whole = ValueGuidance("ratio")
    if flops * whole.num_paths <= work:
        return [_FOR_NETWORKS]
    dear = f"{whole.num_paths} paths of the model take {flops * whole.num_paths:.2g} floating-point operations"
    num_paths = 2 ** math.floor(math.log2(work / flops))
    fewer = Suggestion(
        ValueGuidance("ratio", num_paths=num_paths),
        f"{dear}, so the value is fitted to fewer, as a log density ratio; no gradient of the reward is asked for. A "
        "sample costs about three of the untuned model's, or after sc.distill one.",
    )
    suggestions = [fewer] if num_paths >= _LEAST_PATHS else []
    if missing_gradients(problem):
        return suggestions
    size = _FEW * ranks.size()
    fits = backward_graph(problem, chain, size, "frozen")[0] <= memory
    frozen = Suggestion(
        RewardBackprop(gradient="full" if fits else "adjoint"),
        f"{dear}, too much for a value fitted to them: the model stays as it is, and a small network beside it that "
        f"sees the reward at the denoised state is trained by the objective's own gradient, on {size} paths at a time. "
        "On a U-Net it was far ahead of a tuned copy at equal time (docs/tables/unet.md). sc.distill puts it into one "
        "network.",
        {"control": "frozen", "batch_size": size},
    )
    return [frozen, *suggestions]


def _with_ways(share: float) -> Suggestion:
    return Suggestion(
        ParticleMatching(),
        "the target has several ways that the reference's paths do not part into: particles find a valley between "
        f"them, with {share:.0%} of the target on one side. A control that learns from its own paths may take one way "
        "and never see the others; this one learns from the particles, and has those that they find "
        "(docs/control_problems.md).",
    )


def _trained(problem: ControlProblem, chain: Chain, fits: bool, steps: int | None) -> list[Suggestion]:
    part = "" if fits else f" {steps} of {chain.steps} steps at a time, so that the graph fits into memory."
    black_box = [
        Suggestion(
            LogVariance(steps=steps),
            "no gradient is asked for; its noise vanishes towards the optimum, and it had the smallest errors of the "
            "methods for black boxes on a linear-quadratic problem near its reference." + part,
        ),
        Suggestion(
            CrossEntropy(trust_region=1.0, steps=steps),
            "no gradient is asked for; mass-covering, and its trust region keeps the weights usable where the target "
            "is far from the reference (there it had the smallest errors)." + part,
        ),
        Suggestion(
            SoftPPO(steps=steps),
            "no gradient is asked for; several optimiser steps on each batch, the fewest reward calls where the "
            "reward is the cost (tutorial Section 7.2)." + part,
        ),
    ]
    if problem.vanishes:
        return [_FOR_EVENTS, _FAR, *black_box]
    if problem.reference.state_dtype is not None:
        black_box.insert(1, _FOR_TOKENS)
    # a model that is not to be tuned itself: the control begins with a mixture
    begun = (
        problem.reference.pretrained and problem.event_shape.numel() <= 64 and ends_for_a_mixture(problem) is not None
    )
    if missing_gradients(problem):
        return [_FAR, *black_box] if begun else [*black_box, _FAR]
    first = [
        Suggestion(
            AdjointMatching(steps=steps),
            "the reward has a gradient: a regression whose noise nearly vanishes at the optimum, without a graph "
            "through the simulation; on linear-quadratic and nonlinear control problems it had the smallest errors of "
            "all methods at equal CPU time." + part,
        )
    ]
    if problem.reference.additive:
        weighted = Suggestion(
            SOCM(steps=steps),
            "the reward has a gradient: the regression of adjoint matching, weighted towards the target, so that modes "
            "that the control has not moved to yet count; on a Gaussian mixture it had little more than half of "
            "adjoint matching's gap at equal CPU time." + part,
        )
        first.insert(0 if problem.reference.pretrained else 1, weighted)
    mode = "full" if fits else "adjoint"
    why = "fits" if fits else "does not fit, so the backward pass stores states only and redoes each step"
    # parameters of a whole network: a regression's many features are worth less than the objective's own gradient
    first.insert(
        0 if problem.reference.trainable else len(first),
        Suggestion(
            RewardBackprop(gradient=mode),
            f"the gradient of the objective itself (tutorial Section 7.1); its graph {why}. It seeks modes: on a "
            "Gaussian mixture it was behind all others here; tuning a network itself, for digits, ahead of them.",
        ),
    )
    known = problem.reference.pretrained and not problem.reference.trainable
    first.insert(0 if begun else 1 if known else len(first), _FAR)
    return [*first, black_box[0]]


def _one_off(problem: ControlProblem, chain: Chain) -> list[Suggestion]:
    if problem.reference.pretrained:
        tokens = chain.state_dtype is not None
        seen = "the reward that each neighbour expects" if tokens else "the reward's gradient at the denoised state"
        particles = [
            Suggestion(
                SMC(twist="tweedie"),
                "nothing is trained; exact as the number of particles grows, with an unbiased Z, and particles are "
                "judged by their denoised state on the way.",
            ),
            Suggestion(
                SMC(proposal=ValueGuidance("tweedie"), twist="proposal"),
                f"the same with particles guided by {seen}: fewer of them, each dearer.",
            ),
        ]
    else:
        why = "nothing is trained; exact as the number of particles grows, with an unbiased Z."
        particles = [Suggestion(SMC(), why)]
    return [
        *particles,
        Suggestion(
            TemperedSMC(),
            "nothing is trained; particles tempered from the reference to the target, for rewards so narrow that "
            "weights of untempered paths degenerate.",
        ),
        Suggestion(
            BestOfN(selection="softmax"),
            "no gradient, no tuning; enough where the reference often comes near the target.",
        ),
        Suggestion(
            ClassifierGuidance(),
            "the reward is a classifier's: cheap guidance, with the error of Tweedie's formula, which does not vanish.",
        ),
        Suggestion(
            PathIntegralGuidance(),
            f"no gradient and no bias in the limit, at {chain.steps**2 // 2 * 256} simulated steps for every sample.",
        ),
    ]


def _accepts(method: Method, problem: ControlProblem) -> bool:
    """A suggestion that the method itself would refuse is none."""
    try:
        method.check(problem)
    except (ValueError, TypeError):
        return False
    return True


# ---------------------------------------------------------------- what the problem offers


def _facts(problem: ControlProblem, chain: Chain, parameters: int) -> list[str]:
    missing = missing_gradients(problem)
    name = "reward" if problem.density is None else "log_density"
    reward = (
        "the reward has a gradient" if name not in missing and "state" not in missing else "the reward is a black box"
    )
    facts = [reward if problem.reward_function is not None else "no terminal reward"]
    facts += [f"a reward that was learned ({learned.extra_repr()})" for learned in _learned(problem)]
    facts += [f"no gradient of {name} ({why})" for name, why in missing.items()]
    if problem.reference.pretrained:
        facts.append(
            "a pre-trained model with trainable parameters"
            if problem.reference.trainable
            else "a fixed pre-trained model"
        )
    elif problem.reference.state_dtype is not None:
        facts.append("a process on tokens")
    elif problem.reference.tangential:
        facts.append("a reference on a manifold")
    elif problem.reference.as_linear() is problem.reference:
        facts.append("a linear reference")
    else:
        facts.append("a nonlinear reference")
    if problem.running_cost_function is not None:
        facts.append("a running cost")
    if problem.condition is not None:
        facts.append("conditions")
    kind = "numbers" if problem.reference.state_dtype is None else "tokens"
    facts.append(
        f"states of {problem.event_shape.numel()} {kind}, {chain.steps} steps, {parameters} parameters to train"
    )
    return facts


def _warnings(problem: ControlProblem, one_off: bool) -> list[str]:
    out = [
        "whether the target has modes that the paths never reach cannot be told from the problem. A training method "
        "learns what its paths visit, and its own estimates do not see the rest: compare its log Z with that of SMC, "
        "or start from several seeds."
    ]
    finite = problem.reference.state_dtype
    if problem.random_start:
        out.append(
            "the random start keeps its law: the end has the tilted law only where it has forgotten the start "
            "(evaluate's start gap says what is left)."
            + (" start='controlled' removes that." if finite is None or tilts_starts(problem.reference) else "")
        )
    out += _unknown(problem)
    if not one_off and problem.condition is not None:
        out.append("one control is trained for all conditions; one condition alone may be cheaper with one_off=True.")
    try:
        exact_solution(problem, grids=False)
        out.append("this problem has a closed form: sc.exact_solution(problem).")
    except NoExactSolution:
        pass
    return out


def _learned(problem: ControlProblem) -> list[LearnedReward]:
    found = modules_of(problem.reward_function) if problem.reward_function is not None else []
    return [reward for reward in found if isinstance(reward, LearnedReward)]


def _unknown(problem: ControlProblem) -> list[str]:
    """What the right half of Figure 3 says of rewards that are known from measurements alone."""
    if problem.reward_function is None and problem.running_cost_function is None:
        return [
            "no reward: where it must be measured, sc.design asks for few measurements, and sc.fit_reward learns it."
        ]
    out = []
    for learned in _learned(problem):
        if learned.beta >= 0:
            kind = "a bound for proposals" if learned.beta else "a mean, right near its data alone"
            out.append(
                f"the reward was learned, and is {kind}: where more can be measured use sc.design; where not, keep the "
                "KL small (a larger alpha) and hold it against reward.pessimistic(beta). Its value is believed, not "
                "true: where a failure was not among the data it was far too high (docs/tables/sequences.md)."
            )
        known = learned.calibration
        if known is not None and not known.order > 0:
            out.append(
                f"the spread of the learned reward does not tell where it is wrong (rank correlation {known.order:.2f} "
                f"on {known.rows} held-out rows): a bound by it is a guess."
            )
    return out


def backward_graph(problem: ControlProblem, chain: Chain, batch_size: int, given: Any = None) -> tuple[float, int]:
    """GiB that autograd keeps for all steps of a batch, from what one step on a few rows keeps; and the control's
    trainable parameters."""
    control = build_control(problem, chain, continued(problem, chain, given), seed=0)
    models = [control, *problem.reference.modules()]
    own = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    k = chain.start  # of the process itself, after the learned start
    shift = shift_function(chain, control)

    def step(rows: int) -> list[Tensor]:
        x = draw(problem.initial, rows, 0).clone()
        x.requires_grad_(x.is_floating_point())
        y = problem.draw_condition(rows, 0)
        return [value for _, value in chain.step_parts(k, x, y)] + [shift(k, x, y)]

    with problem.evaluating():
        per_row = graph_bytes(step, own)
    return per_row * batch_size * chain.steps / _GIB, sum(p.numel() for p in control.parameters() if p.requires_grad)
