"""The verdict on an evaluation, and the second look at the target that it rests on.

Importance weights of a control's own paths are blind to what these never visit: on one of two equal modes they look
perfect, and log Z lacks log 2. A second look (``second_look.py``) draws paths of the target without the control. It
gives a second log Z, and the control's weights along paths that the control has not chosen: the share of the target
beyond a level of the weights must be the same from both sides.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..problems.problem import ControlProblem
from .estimates import Estimate, effective_sample_size
from .second_look import ESS_FLOOR, HEAVY, SecondLook, search_beyond

CONFIRMED, UNCONFIRMED, UNRELIABLE = "confirmed", "unconfirmed", "unreliable"
SIGMAS = 4.0  # standard errors within which two estimates agree
_ROUNDING = 1e-5  # of log Z in single precision, relative to 1 + |log Z|
_COARSE = 0.15  # standard error of a second log Z above which half of the target may be missed unseen
_VAGUE = 0.05  # of the share of the target that may be missed unseen: a fifth is seen
_RARE = 0.01  # share of the target whose absence is worth a word
_TAIL, _MARGIN = 0.05, 0.25  # share of the target above the level of the weights that is compared; nats beyond it


def missed_share(log_w: Tensor, look: SecondLook) -> Estimate | None:
    """The share of the target where the control's weights are beyond what its own paths show, less what they do show:
    0 in the mean for a control that reaches all of it.

    Args:
        log_w: ``(n,)`` log weights of the control's own paths.
    """
    if look.along is None or look.log_w is None:
        return None
    own, order = log_w.softmax(0), log_w.argsort(descending=True)
    count = int((own[order].cumsum(0) < _TAIL).sum())
    level = float(log_w[order[count]]) + _MARGIN
    above = (log_w > level).double()
    expected = float((own * above).sum())
    here = float((own.square() * (above - expected).square()).sum())
    weights = look.log_w.flatten().softmax(0).reshape(look.log_w.shape)
    shares = weights.sum(1)
    beyond = (weights * (look.along > level)).sum(1)
    share = float(beyond.sum())
    there = float((beyond - shares * share).square().sum())
    one = float(shares.square().sum())  # of so few effective systems one more or less is not seen
    return Estimate(share - expected, math.sqrt(here + there + one**2))


def judge(
    log_w: Tensor, tail: float, log_z: Estimate, elbo: Estimate, look: SecondLook | None, exact: float | None
) -> tuple[str, str]:
    """The verdict on a control's weights, and why, in words.

    Args:
        log_w: ``(n,)`` of its own paths. tail: their Pareto k. log_z, elbo: by them.
        look: None where none was asked for.
        exact: log Z, where it is known.
    """
    lead = None if look is None or look.reference_elbo is None else look.reference_elbo - elbo
    worse = ""
    if look is not None and lead is not None and lead.value > SIGMAS * lead.stderr + _ROUNDING:
        worse = f"worse than no control, whose ELBO is {look.reference_elbo}; "
    if not bool((log_w > -math.inf).any()):
        return UNRELIABLE, (
            f"none of {len(log_w)} paths has a weight above 0 (a reward of -inf at all of them): tempered-smc and "
            "particle-matching find where it is a number"
        )
    effective = effective_sample_size(log_w) * len(log_w)
    if not tail < HEAVY:
        return UNRELIABLE, f"{worse}heavy-tailed weights (Pareto k = {tail:.2f}, must be < {HEAVY})"
    if effective < ESS_FLOOR:
        return UNRELIABLE, f"{worse}only {effective:.0f} effective samples (at least {ESS_FLOOR} wanted)"
    facts = f"{worse}Pareto k = {tail:.2f}"
    if exact is not None:
        return compared(facts, log_z, Estimate(exact, 0.0), "the exact log Z")
    if look is None:
        return UNCONFIRMED, f"{facts}; no second estimate of log Z was asked for"
    if look.log_z is None:
        return UNCONFIRMED, f"{facts}; {look.why}: no second estimate of log Z"
    missed = missed_share(log_w, look)
    if missed is not None and missed.value > max(_RARE, SIGMAS * missed.stderr):
        return UNRELIABLE, (
            f"{facts}; about {missed.value:.0%} of the target, by {look.source}, has weights that the control's own "
            "paths never show (a mode may be missing here)"
        )
    verdict, why = compared(facts, log_z, look.log_z, look.source, None if missed is None else missed.stderr)
    if verdict == UNRELIABLE and missed is not None and missed.stderr < _VAGUE:
        return UNCONFIRMED, (
            f"{facts}; {look.source} find more (log Z = {look.log_z}), but nothing that the control's own paths lack"
        )
    return verdict, why


def compared(facts: str, log_z: Estimate, other: Estimate, source: str, vague: float | None = None) -> tuple[str, str]:
    """The verdict from two estimates of log Z that do not share their blindness, after the facts that speak for the
    first.

    Args:
        vague: standard error of the share of the target that was looked for and not found missing; None: log Z alone
            was compared, and must tell a half from the whole.
    """
    apart, rounding = other - log_z, _ROUNDING * (1 + abs(log_z.value))
    if apart.value > SIGMAS * apart.stderr + rounding:
        lost = 1 - math.exp(-apart.value)
        return UNRELIABLE, (
            f"{facts}; {source} disagree: log Z = {other} there, so that about {lost:.0%} of the target is missing here"
        )
    if apart.value < -SIGMAS * apart.stderr - rounding:
        if other.stderr == 0:
            return UNRELIABLE, f"{facts}; log Z is too large: {source} is {other}"
        return UNCONFIRMED, f"{facts}; {source} find less (log Z = {other}), so they confirm nothing"
    if other.stderr > _COARSE and (vague is None or vague > _VAGUE):
        return UNCONFIRMED, f"{facts}; {source} are too few to tell (log Z = {other})"
    return CONFIRMED, f"{facts}; confirmed by {source} (log Z = {other})"


def searched(
    verdict: str, why: str, problem: ControlProblem, samples: Tensor, log_w: Tensor, log_z: Estimate, seed: int
) -> tuple[str, str]:
    """The verdict on samples of a density after a search for what they lack."""
    found = search_beyond(problem, samples, log_w, seed)
    if found is None or not (lacking := found - log_z).value > max(_VAGUE, SIGMAS * lacking.stderr):
        return verdict, why
    lost = 1 - math.exp(-lacking.value)
    return UNRELIABLE, f"a search from far out finds modes that are missing here (log Z = {found}): about {lost:.0%}"
