"""``ChainSolution``: a solution whose samples are draws of parallel Markov chains on the density of a Gibbs problem."""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..controls.saved import Context, Saved
from ..errors import NonFiniteError
from ..files.contents import part_of, with_part
from ..particles.diagnostics import Diagnostics, diagnose
from ..particles.markov import Draws, WarmChains, log_density_of, run_chains, warm_up_chains
from ..particles.mixture_fit import fit_mixture
from ..particles.nuts import run_nuts, warm_up_nuts
from ..particles.resolution import resolution_problems
from ..particles.tempering import StateTarget, points_at
from ..problems.problem import ControlProblem
from ..processes.laws import draw
from ..randomness import Place, derive_seed, fresh_seed, generator_for
from ..shapes import PerPath
from ..tensors import check_count
from .estimates import Estimate, bridge_log_z, chain_mean, log_mean_weight, pareto_k
from .evaluate import Evaluation, budget_of
from .second_look import HEAVY, look_again, search_cost
from .solution import SOLUTIONS, Solution
from .tempered_solution import TemperedSettings, tempered_target
from .verdict import CONFIRMED, UNCONFIRMED, UNRELIABLE, compared, searched

_LEAST_DRAWS = 64  # of each chain, where they are judged
_MOST_RHAT = 1.05
_FEW = 400.0  # effective draws below which means and R-hat itself are not to be trusted (Vehtari et al. 1903.08008)


@dataclass(frozen=True)
class ChainSettings:
    """How chains are run.

    Attributes:
        kernel: "mala", "hmc" or "nuts". num_chains: at once, or for NUTS one after another.
        warm_up: moves of each chain before its kernel is frozen.
        thin: moves between two draws; None: as many as make them nearly independent, by the end of the warm-up; 1 for
            NUTS.
        leapfrog_steps: of a move of "hmc"; None: as many as turn the trajectory far enough.
        width: of the Gaussian that chains start from, in units of the reference's end.
        max_tree_depth: for NUTS.
    """

    kernel: str
    num_chains: int
    warm_up: int
    thin: int | None = None
    leapfrog_steps: int | None = None
    width: float = 2.0
    max_tree_depth: int = 10


class ChainEvaluation(Evaluation):
    """An :class:`Evaluation` from chains."""

    log_z_from: ClassVar[str] = "by bridge sampling"


def chain_target(problem: ControlProblem, settings: ChainSettings) -> StateTarget:
    """The density in coordinates in which N(0, I) is the law of the starts.

    Raises:
        ValueError: no Gibbs problem; or one with conditions.
    """
    target = tempered_target(problem, problem.chain(), None, TemperedSettings("states", True, settings.width))
    assert isinstance(target, StateTarget)
    return target


@SOLUTIONS.register("chains")
class ChainSolution(Solution):
    """A :class:`Solution` whose samples are draws of Markov chains; ``control``, ``simulate`` and ``initial`` are the
    reference's.

    Chains are warmed up once, when the solution is made. Every call goes on from their warm states with noise of its
    own seed and the frozen kernel, so that it has the target's law as far as the warm-up had reached it: what
    :meth:`diagnostics` judges. Nothing tells of modes that no chain has found.

    Attributes:
        warm: states and kernel after the warm-up.
        evaluations: of the log density so far, all runs together: with its gradient in moves, without in bridge
            sampling.
    """

    parts = ("chains",)

    def __init__(self, *args: Any, chains: ChainSettings, warm: WarmChains | None = None, **facts: Any) -> None:
        super().__init__(*args, **facts)
        self.chains, self.evaluations = chains, 0
        self.target = chain_target(self.problem, chains)
        if warm is None:
            seed, target = fresh_seed(self.seed), self.target
            with self.problem.evaluating():
                if chains.kernel == "nuts":
                    warm, work = warm_up_nuts(
                        target, chains.num_chains, chains.warm_up, seed, chains.max_tree_depth, chains.thin
                    )
                else:
                    leapfrog_steps = 1 if chains.kernel == "mala" else chains.leapfrog_steps
                    warm, work = warm_up_chains(
                        target, chains.num_chains, chains.warm_up, seed, leapfrog_steps, chains.thin
                    )
            self.evaluations += work
        self.warm = warm

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {self.chains.num_chains} chains)"

    def run(self, draws: int, seed: int | None = None) -> Draws:
        """``draws`` of each chain, with everything known of them."""
        check_count("n", draws)
        seed = fresh_seed(seed)
        with self.problem.evaluating():
            if self.chains.kernel == "nuts":
                found = run_nuts(self.target, self.warm, draws, seed, self.chains.max_tree_depth)
            else:
                found = run_chains(self.target, self.warm, draws, seed)
        self.evaluations += found.evaluations
        return found

    # ---------------------------------------------------------------- samples

    def sample(self, n: int, seed: int | None = None, *, condition: Any = None, raw: bool = False) -> Any:
        """n draws in random order, as many of each chain as are needed, in the user's own parameters
        (:meth:`Solution.sample`). Draws of one chain depend on one another."""
        if condition is not None:
            raise ValueError("condition: chains sample one density, which has none.")
        seed = fresh_seed(seed)
        found = self.run(-(-n // self.chains.num_chains), seed)
        flat = found.z.flatten(0, 1)
        generator = generator_for(flat.device, seed, Place.CHAIN_ORDER)
        x = self.target.states(flat[torch.randperm(len(flat), generator=generator, device=flat.device)[:n]])
        return x if raw else self.problem.as_stated(x)

    def coordinates_by_chain(self, n: int, seed: int) -> torch.Tensor:
        """As many draws of each chain as n need, in order: ``(chains, draws, dim)``, unconstrained coordinates."""
        return self.target.states(self.run(-(-n // self.chains.num_chains), seed).z)

    @cached_property
    def log_z(self) -> Estimate:
        """log Z by bridge sampling (:meth:`evaluate`), from a run of its own at the solution's seed, made once."""
        seed = derive_seed(fresh_seed(self.seed), Place.CHAIN_LOG_Z)
        return self._bridge(self.run(_LEAST_DRAWS, seed), seed)[0]

    def weighted_sample(
        self, n: int, seed: int | None = None, *, condition: Any = None, raw: bool = False
    ) -> tuple[Any, PerPath]:
        """:meth:`sample` with equal log weights ``(n,)``, each :attr:`log_z`: draws of chains know no Z of their own,
        and all stand for the same share of the target."""
        x = self.sample(n, seed, condition=condition, raw=True)
        return x if raw else self.problem.as_stated(x), torch.full_like(x[:, 0], self.log_z.value)

    # ---------------------------------------------------------------- evaluation

    def _diagnose(self, found: Draws) -> Diagnostics:
        quantities = torch.cat((self.target.states(found.z).double(), found.log_density.unsqueeze(2)), 2)
        return diagnose(quantities, [*(f"x[{i}]" for i in range(self.target.dim)), "log density"])

    def diagnostics(self, n: int = 4096, seed: int | None = None) -> Diagnostics:
        """R-hat and effective sample size of every coordinate and of the log density, from n draws and 64 of each chain
        at least."""
        return self._diagnose(self.run(self._draws(n), seed))

    def _draws(self, n: int) -> int:
        check_count("n", n, 64, why="draws to estimate from")
        return max(_LEAST_DRAWS, -(-n // self.chains.num_chains))

    def _bridge(self, found: Draws, seed: int) -> tuple[Estimate, Tensor]:
        """log Z between the later half of all chains and a mixture fitted to the earlier one; and the log weights of
        the mixture's draws."""
        half = found.z.shape[1] // 2
        later, density = found.z[:, half:], found.log_density[:, half:]
        proposal = fit_mixture(found.z[:, :half].flatten(0, 1).double(), seed=derive_seed(seed, Place.BRIDGE_FIT))
        z = draw(proposal, density.numel(), derive_seed(seed, Place.BRIDGE_DRAWS)).to(found.z)
        target = StateTarget(self.target.log_density, self.target.centre, self.target.scale, smooth=False)
        with self.problem.evaluating():
            phi = points_at(target, z, target.draw_origin(len(z), seed)).phi
        self.evaluations += len(z)
        reverse = log_density_of(z, phi) - proposal.log_prob(z.double())
        if not bool((reverse > -math.inf).any()):
            raise NonFiniteError(
                "the log density is -inf at all draws of the mixture fitted to the chains.", what="weights"
            )
        return bridge_log_z(reverse, density - proposal.log_prob(later.double())), reverse

    def evaluate(self, n: int = 4096, seed: int | None = None, *, confirm: bool | int = True) -> Evaluation:
        """As :meth:`Solution.evaluate`, from n draws and 64 of each chain at least.

        ``reward`` is a mean over the chains, its error by their effective number. ``log_z`` is the bridge estimate
        (Meng & Wong 1996) between the later half of the chains' draws and independent draws of a Gaussian mixture
        fitted to the earlier half (:func:`fit_mixture`); its error counts the chains' effective draws, and is that of
        chains which have reached the target. ``ess`` is the smallest bulk effective sample size of a coordinate or the
        log density, as a fraction. The law of a draw is not known, hence no ``kl``, ``elbo``, ``objective`` or ``gap``:
        nan.

        Unreliable: an R-hat above 1.05, fewer than 400 effective draws, or importance weights of the fitted mixture
        (where those have an error) that give another log Z. Confirmed: the reference's paths, or tempered particles of
        at most as many evaluations as the chains took, agree.
        """
        seed, before = fresh_seed(seed), self.evaluations
        found = self.run(self._draws(n), seed)
        facts = self._diagnose(found)
        log_z, reverse = self._bridge(found, seed)
        law = self.problem.terminal_law  # type: ignore[attr-defined]
        density = found.log_density - float(self.target.scale.double().log().sum())
        reward = density - law.log_prob(self.target.states(found.z)).double()
        budget = budget_of(confirm, self.evaluations - before)
        verdict, why = self._verdict(found, facts, log_z, reverse, budget, seed)
        exact_z = (self._exact_values() or {}).get("log_z")
        nan, size = Estimate(float("nan")), found.phi.numel()
        return ChainEvaluation(
            reward=chain_mean(reward),
            running_cost=Estimate(0.0, 0.0),
            kl=nan,
            objective=nan,
            elbo=nan,
            log_z=log_z,
            ess=Estimate(min(1.0, facts.worst_ess[1] / size)),
            gap=nan,
            start_gap=Estimate(0.0, 0.0),
            verdict=verdict,
            reliability=why,
            pareto_k=float("nan"),
            exact=exact_z is not None,
            n=size,
        )

    def _verdict(
        self, found: Draws, facts: Diagnostics, log_z: Estimate, reverse: Tensor, budget: int, seed: int
    ) -> tuple[str, str]:
        """From R-hat, effective draws, and a second estimate of log Z."""
        flat = self.target.states(found.z).flatten(0, 1)
        if unresolved := resolution_problems(self.problem, flat):
            return UNRELIABLE, unresolved[0]
        (loose, rhat), (slow, ess) = facts.worst_rhat, facts.worst_ess
        if not rhat <= _MOST_RHAT:
            wanted = f"(at most {_MOST_RHAT} wanted): chains disagree, or are too short"
            return UNRELIABLE, f"R-hat of {loose} is {rhat:.3g} {wanted}"
        if ess < _FEW:
            return UNRELIABLE, f"only {ess:.0f} effective draws of {slow} (at least {_FEW:.0f} wanted)"
        mixed = f"R-hat at most {rhat:.3f}, {ess:.0f} effective draws at least"
        if pareto_k(reverse) < HEAVY:
            # the mixture was fitted to the chains: it shares their blindness, and can only speak against them
            own, why = compared(mixed, log_z, log_mean_weight(reverse), "importance weights of the fitted mixture")
            if own == UNRELIABLE:
                return own, why
        if (exact := (self._exact_values() or {}).get("log_z")) is not None:
            return compared(mixed, log_z, Estimate(exact, 0.0), "the exact log Z")
        if not budget:
            return UNCONFIRMED, f"{mixed}; no second estimate of log Z was asked for"
        look = look_again(self.problem, self.chain, None, budget, derive_seed(seed, Place.CHAINS_LOOK))
        if look.log_z is None:
            return UNCONFIRMED, f"{mixed}; {look.why}: no second estimate of log Z"
        verdict, why = compared(mixed, log_z, look.log_z, look.source)
        if verdict == CONFIRMED and budget >= search_cost(self.problem):
            return searched(verdict, why, self.problem, flat, torch.zeros_like(flat[:, 0]), log_z, seed)
        return verdict, why

    # ---------------------------------------------------------------- files

    @property
    def configuration(self) -> dict[str, Any]:
        return {"chains": asdict(self.chains)}

    def _tensors(self) -> dict[str, Tensor]:
        return with_part("chains", vars(self.warm))

    @classmethod
    def from_saved(cls, saved: Saved, context: Context, tensors: dict[str, Tensor]) -> dict[str, Any]:
        warm = Saved(part_of(tensors, "chains"), f"{saved.where}'s chains").settings(WarmChains)
        return {"chains": Saved(saved["chains"], saved.where).settings(ChainSettings), "warm": warm}
