"""The page that maps the tutorial's equations to the functions that implement them and the checks that test them.

Generated from the registry (``python -m theory_checks --docs docs/theory.md``); names of functions are resolved, so
that none can go stale.
"""

from __future__ import annotations

import re
from typing import Any

from .registry import Check, all_checks

__all__ = ["EQUATIONS", "page", "resolves"]

#: numbered items of the tutorial (2407.13734): what each says, and where the library implements it
EQUATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "[1]": ("variance-preserving forward process", ("sdecontrol.VP",)),
    "[2]": ("time-reversed SDE", ("sdecontrol.generative_sde",)),
    "[3]": ("conditional score and its moments", ("sdecontrol.VP",)),
    "[4]": ("score matching", ("sdecontrol.GaussianMixture.score", "sdecontrol.fit_score")),
    "[5]": ("noise prediction", ("sdecontrol.generative_sde", "sdecontrol.fit_score")),
    "[6]": ("noise prediction from data", ("sdecontrol.fit_score",)),
    "[7]": ("discretised reversal; DDPM", ("sdecontrol.diffusion_chain", "sdecontrol.generative_sde")),
    "[8]": ("reward maximisation without a KL", ()),
    "[9]": ("reward less KL to the pre-trained law", ("sdecontrol.ControlProblem",)),
    "[10]": ("the target law p_r", ("sdecontrol.exact_solution.sample",)),
    "[11]": ("objective of an MDP", ()),
    "[12]": ("entropy-regularised objective", ("sdecontrol.ControlProblem",)),
    "[13]": ("soft Q-function", ("sdecontrol.exact_solution.value",)),
    "[14]": ("policy from the soft Q-function", ("sdecontrol.exact_solution.kernel",)),
    "[15]": ("soft-optimal policy", ("sdecontrol.exact_solution.kernel",)),
    "[16]": ("soft Bellman equation of Q", ("sdecontrol.exact_solution.value",)),
    "[17]": ("soft value", ("sdecontrol.exact_solution.value",)),
    "[18]": (
        "the RL problem of fine-tuning",
        ("sdecontrol.ControlProblem", "sdecontrol.solve", "sdecontrol.evaluation.evaluate.Evaluation"),
    ),
    "[19]": ("soft-optimal kernel", ("sdecontrol.exact_solution.kernel",)),
    "[20]": ("soft Bellman equation", ("sdecontrol.exact_solution.value",)),
    "Remark 1": (
        "all of it on discrete spaces",
        ("sdecontrol.JumpProcess", "sdecontrol.masked_diffusion", "sdecontrol.exact_solution"),
    ),
    "Theorem 1": (
        "the optimum's end law is p_r",
        ("sdecontrol.exact_solution.marginal", "sdecontrol.exact_solution.sample"),
    ),
    "Theorem 2": ("its marginals", ("sdecontrol.exact_solution.marginal",)),
    "Theorem 3": ("its backward conditionals", ("sdecontrol.exact_solution.bridge",)),
    "Remark 4": ("continuous time", ("sdecontrol.exact_solution",)),
    "[21]": ("soft PPO, Algorithm 1", ("sdecontrol.SoftPPO", "sdecontrol.paths.paths.Paths.log_ratio")),
    "[22]": ("reward backpropagation, Algorithm 2", ("sdecontrol.RewardBackprop", "sdecontrol.paths.paths.Paths.kl")),
    "Lemma 1": ("value-weighted MLE", ("sdecontrol.RewardWeightedMLE",)),
    "Lemma 2": ("value as a conditional expectation", ("sdecontrol.exact_solution.value",)),
    "[23]": ("the same", ("sdecontrol.exact_solution.value",)),
    "Lemma 3": ("reward-weighted MLE", ("sdecontrol.RewardWeightedMLE",)),
    "[24]": (
        "reward-weighted MLE, Algorithm 3",
        ("sdecontrol.RewardWeightedMLE", "sdecontrol.evaluation.evaluate.log_weights"),
    ),
    "[25]": ("the same, as a population loss", ("sdecontrol.RewardWeightedMLE",)),
    "[26]": ("the same for noise predictions", ("sdecontrol.RewardWeightedMLE",)),
    "[27]": ("value-weighted sampling, Algorithm 4", ("sdecontrol.ValueGuidance", "sdecontrol.exact_solution.control")),
    "Remark 5": ("its continuous-time form", ("sdecontrol.exact_solution.control",)),
    "[28]": ("Monte-Carlo regression of the value", ("sdecontrol.ValueGuidance",)),
    "[29]": ("soft Q-learning", ("sdecontrol.ValueGuidance",)),
    "Remark 6": ("why soft Q-learning alone gives no policy", ()),
    "[30]": ("the value as an integral over the posterior", ("sdecontrol.exact_solution.value",)),
    "[31]": ("Tweedie's approximation", ("sdecontrol.ValueGuidance",)),
    "[32]": ("path integral control", ("sdecontrol.PathIntegralGuidance",)),
    "Lemma 4": ("one-step consistency", ("sdecontrol.PathConsistency",)),
    "[33]": ("the same", ("sdecontrol.PathConsistency",)),
    "[34]": ("path consistency learning, Algorithm 5", ("sdecontrol.PathConsistency",)),
    "Corollary 1": ("T-step consistency", ("sdecontrol.PathConsistency",)),
    "[35]": ("the same", ("sdecontrol.PathConsistency", "sdecontrol.LogVariance")),
    "[36]": ("two factorisations of the path law", ("sdecontrol.exact_solution.bridge",)),
    "[37]": ("conditional target", ("sdecontrol.LogProb", "sdecontrol.ClassifierGuidance")),
    "[38]": ("conditional RL problem", ("sdecontrol.ControlProblem",)),
    "Corollary 2": ("its end law is the conditional law", ("sdecontrol.LogProb",)),
    "[39]": ("score training as a KL divergence", ("sdecontrol.fit_score",)),
    "[40]": ("its loss", ("sdecontrol.fit_score",)),
    "Table 2": ("three trainings, three divergences", ("sdecontrol.exact_solution",)),
    "[41]": ("Brownian reference of bridges", ("sdecontrol.BrownianMotion",)),
    "[42]": ("bridge training as a KL divergence", ("sdecontrol.fit_bridge",)),
    "[43]": (
        "Brownian bridge, Doob's h-transform",
        ("sdecontrol.LinearSDE.conditioned_drift", "sdecontrol.LinearSDE.bridge"),
    ),
    "[44]": ("bridge model", ("sdecontrol.fit_bridge",)),
    "[45]": ("bridge matching", ("sdecontrol.fit_bridge", "sdecontrol.BridgeMatching")),
    "Remark 7": ("f-divergences", ("sdecontrol.FDivergence",)),
}

_NOT_CHECKED = {
    "[8]": "a goal, not a statement",
    "[11]": "a definition",
}


def resolves(name: str) -> bool:
    """Whether a dotted name leads to something in the library as it is."""
    import sdecontrol as sc

    parts = name.split(".")
    if parts[:2] == ["sdecontrol", "exact_solution"] and len(parts) == 3:
        from sdecontrol.exact import ExactSolution

        return hasattr(ExactSolution, parts[2]) or parts[2] in ExactSolution.__annotations__ or parts[2] == "control"
    found: Any = sc
    for part in parts[1:]:
        if hasattr(found, part):
            found = getattr(found, part)
        else:
            return part in getattr(found, "__annotations__", {}) or part in ("end", "running_cost")
    return True


def _numbers(statement: str) -> list[str]:
    """The items of a statement's label: "[9], [10]" or "Theorems 1-3, Remark 4"."""
    found = re.findall(r"\[\d+\]|(?:Theorem|Lemma|Corollary|Remark|Table) \d+(?! of)", statement)
    if "Theorems 1-3" in statement:
        found += ["Theorem 1", "Theorem 2", "Theorem 3"]
    return found


def _code(name: str) -> str:
    return "`" + re.sub(r"^sdecontrol\.(?:(?:paths|evaluation|chains)\.[a-z_]+\.)?", "", name) + "`"


def _where(names: tuple[str, ...]) -> str:
    here = [_code(n) for n in names if resolves(n)]
    later = [_code(n) for n in names if not resolves(n)]
    text = ", ".join(here)
    if later:
        text += ("; " if text else "") + ", ".join(later) + " (not in the library yet; the check computes it)"
    return text or "—"


def _anchor(check: Check) -> str:
    return f"[{check.name}](#{check.name})"


def page() -> str:
    """The page in Markdown."""
    checks = all_checks()
    by_item: dict[str, list[Check]] = {}
    for check in checks:
        for item in _numbers(check.statement):
            by_item.setdefault(item, []).append(check)
    lines = [
        "# Theory: equations, code, checks",
        "",
        "Generated by `python -m theory_checks --docs docs/theory.md`; do not edit.",
        "",
        "Numbers are those of the tutorial, *Understanding RL-based fine-tuning of diffusion models* (arXiv "
        "2407.13734). Each check measures",
        "its statement on problems with known answers, must have run the code that it lists, and must fail on the "
        "broken variants listed with it. Run them with",
        "`python -m theory_checks` or `sdecontrol verify`; check a solution of your own with "
        "`theory_checks.verify(problem, solution)`.",
        "",
        "## The tutorial's numbered items",
        "",
        "| item | says | in the library | checked by |",
        "|---|---|---|---|",
    ]
    for item, (says, names) in EQUATIONS.items():
        tests = ", ".join(_anchor(c) for c in by_item.get(item, [])) or _NOT_CHECKED.get(item, "")
        lines.append(f"| {item} | {says} | {_where(names)} | {tests or '**no check**'} |")
    lines += ["", "## The checks", ""]
    for check in checks:
        lines += [
            f"### {check.name}",
            "",
            f"{check.statement} · {check.kind}",
            "",
            check.doc,
            "",
            f"* runs: {_where(check.implements) if check.implements else 'the equation itself'}",
            *([f"* about: {_where(check.about)}, by lines of its own"] if check.about else []),
            "* must fail on: " + "; ".join(check.controls),
            "",
        ]
    return "\n".join(lines)
