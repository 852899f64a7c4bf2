"""``ParticleSolution``: a solution that is a way of sampling, with a proposal, and no trained control of its own."""

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..controls.given import ZeroControl
from ..controls.guidance import LogValue
from ..controls.saved import VALUES, Context, Saved
from ..errors import NonFiniteError, warn
from ..files.contents import load_tensors, part_of, with_part
from ..particles.resolution import resolution_problems
from ..particles.smc import Particles, ParticleSettings, Proposal, resample, run_particles
from ..paths.chunks import check_chunk
from ..paths.rows import between_ranks
from ..problems.simulate import simulate_chain
from ..problems.simulation_options import SimulationOptions
from ..randomness import Place, derive_seed, fresh_seed, generator_for
from ..shapes import PerPath
from ..tensors import check_count
from .estimates import Estimate, effective_sample_size, log_mean_weight, mean_estimate, pareto_k, weighted_mean
from .evaluate import Evaluation, budget_of, gap_estimate, log_weights
from .sample_agreement import bonferroni, shares_of
from .second_look import ESS_FLOOR, HEAVY, Ways, look_again, search_cost
from .solution import SOLUTIONS, Solution
from .verdict import CONFIRMED, SIGMAS, UNCONFIRMED, UNRELIABLE, compared, searched

_FEW = 10  # effective particles below which samples are not to be trusted
_SYSTEMS = 16  # of an evaluation, at least: its standard errors are over systems
_SPREAD = 1.0  # standard deviation of log Z^ above which its mean over so few systems is not to be trusted
ROUNDS = 1000  # of rejection sampling
_APART = 0.05  # of a share of the samples, that is worth a word


@SOLUTIONS.register("particles")
class ParticleSolution(Solution):
    """A :class:`Solution` whose samples are chosen among weighted particles; ``control``, ``simulate``, ``initial`` and
    ``model`` are the proposal's.

    ``sample`` and ``weighted_sample`` approach the exact law (the tilted start
    included) as ``num_particles`` grows, whatever the proposal; ``mean(exp(log_w))`` is Z without bias for any number.
    With a condition every sample has a system of its own.
    """

    parts = ("twist",)

    def __init__(self, *args: Any, particles: ParticleSettings, twist: LogValue | None = None, **facts: Any) -> None:
        super().__init__(*args, **facts)
        self.particles, self.twist = particles, twist

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {self.particles.num_particles} particles)"

    def run(
        self, systems: int, seed: int | None = None, *, condition: Any = None, batch_size: int | None = None
    ) -> Particles:
        """``systems`` independent systems of particles, with everything known of them.

        Args:
            batch_size: call models and rewards with so many particles at a time (a multiple of 64), in the memory of
                these: the particles are the same.
        """
        check_count("n", systems)
        return run_particles(
            self.problem,
            self.chain,
            Proposal(self.control, None if self.twist is None else self.twist.at),
            systems,
            self.particles,
            fresh_seed(seed),
            condition=self._condition(systems, condition),
            batch_size=batch_size,
        )

    # ---------------------------------------------------------------- samples

    @property
    def _one_each(self) -> bool:
        return self.particles.independent or self.problem.condition is not None

    def _decode(self, x: Tensor, condition: Any, batch_size: int | None, raw: bool) -> Any:
        with torch.no_grad(), self.problem.evaluating():
            decoded = between_ranks(lambda x, y: [self.chain.decode(x, y)], batch_size, x, condition)[0]
            return decoded if raw else self.problem.as_stated(decoded)

    def _pick(self, found: Particles, seed: int) -> Tensor:
        """The particle of each system that is its sample, ``(M,)``."""
        if self.particles.selection == "best":
            return (found.reward - found.running_cost).argmax(1)
        generator = generator_for(found.log_z.device, seed, Place.PARTICLE_PICK)
        return resample(found.log_weights, 1, "multinomial", generator)[:, 0]

    def _shuffled(self, count: int, seed: int, device: torch.device) -> Tensor:
        return torch.randperm(count, generator=generator_for(device, seed, Place.PARTICLE_ORDER), device=device)

    def sample(
        self,
        n: int,
        seed: int | None = None,
        *,
        condition: Any = None,
        batch_size: int | None = None,
        raw: bool = False,
    ) -> Any:
        """``(n, *event)`` decoded samples, all of the same weight; of a density in the user's own parameters, as of
        :meth:`Solution.sample`.

        Warns where they come from few effective particles: they are then not what they stand for.

        Args:
            batch_size: call models and rewards with so many particles at a time (a multiple of 64), in the memory of
                these: the samples are the same.
            raw: of a density, the unconstrained coordinates ``(n, dim)`` instead.
        """
        if batch_size is not None:
            check_chunk(batch_size, "end", name="batch_size")
        seed, settings = fresh_seed(seed), self.particles
        if settings.selection == "rejection":
            accepted = self._accepted(n, seed, condition, batch_size)
            return accepted if raw else self.problem.as_stated(accepted)
        systems = n if self._one_each else -(-n // settings.num_particles)
        found = self.run(systems, seed, condition=condition, batch_size=batch_size)
        if self._one_each:
            if settings.selection == "weights":
                self._warn_where_few(1 / (2 * found.log_weights).exp().sum(1).mean(), settings.num_particles)
            rows = torch.arange(n, device=found.end.device)
            return self._decode(found.end[rows, self._pick(found, seed)], found.condition, batch_size, raw)
        log_w = (found.log_weights + found.log_z.unsqueeze(1)).flatten()
        self._warn_where_few(effective_sample_size(log_w) * len(log_w), len(log_w))
        generator = generator_for(log_w.device, seed, Place.PARTICLE_RESAMPLING)
        index = resample(log_w.unsqueeze(0), n, "systematic", generator)[0]
        index = index[self._shuffled(n, seed, index.device)]  # copies of a particle are neighbours before
        return self._decode(found.end.flatten(0, 1)[index], None, batch_size, raw)

    def weighted_sample(
        self,
        n: int,
        seed: int | None = None,
        *,
        condition: Any = None,
        batch_size: int | None = None,
        raw: bool = False,
    ) -> tuple[Any, PerPath]:
        """Samples ``(n, *event)``, as of :meth:`sample`, with log weights ``(n,)`` towards the exact law:
        ``mean(exp(log_w))`` is Z without bias.

        Particles of one system depend on one another. Where samples are chosen as the best, or accepted, these are the
        candidates instead, since what is chosen so has no weight.

        Args:
            batch_size, raw: as of :meth:`sample`.
        """
        seed, N = fresh_seed(seed), self.particles.num_particles
        if self._one_each and self.particles.selection == "weights":
            found = self.run(n, seed, condition=condition, batch_size=batch_size)
            rows = torch.arange(n, device=found.end.device)
            picked = found.end[rows, self._pick(found, seed)]
            return self._decode(picked, found.condition, batch_size, raw), found.log_z.to(found.end)
        each = 1 if self.problem.condition is not None else N
        found = self.run(-(-n // each), seed, condition=condition, batch_size=batch_size)
        log_w = found.log_weights + found.log_z.unsqueeze(1) + math.log(N)
        if self.problem.condition is not None:  # nothing is resampled here, so that all candidates are alike
            return self._decode(found.end[:, 0], found.condition, batch_size, raw), log_w[:, 0].to(found.end)
        some = self._shuffled(log_w.numel(), seed, log_w.device)[:n]  # any n of them: unbiased whatever their order
        return self._decode(found.end.flatten(0, 1)[some], None, batch_size, raw), log_w.flatten()[some].to(found.end)

    def _accepted(self, n: int, seed: int, condition: Any, batch_size: int | None) -> Tensor:
        """Rejection sampling: exact draws of the target law.

        Raises:
            ValueError: a total reward above the bound. RuntimeError: hardly anything is accepted.
        """
        assert self.particles.bound is not None
        problem, chain = self.problem, self.chain
        y = self._condition(n, condition)
        y = problem.draw_condition(n, seed) if y is None else y
        missing, how = torch.arange(n, device=problem.device), SimulationOptions(chunk=batch_size)
        out: Tensor | None = None
        tried = 0
        for turn in range(ROUNDS):
            place, count = derive_seed(seed, Place.CANDIDATES, turn), len(missing) * self.particles.num_particles
            repeated = None if y is None else y[missing].repeat_interleave(self.particles.num_particles, 0)
            paths = simulate_chain(problem, chain, count, None, seed=place, keep="end", condition=repeated, how=how)
            tried += count
            log_accept = log_weights(problem, paths).double() - self.particles.bound / problem.alpha
            if bool((log_accept > 1e-6).any()):
                most = float(log_accept.max()) * problem.alpha + self.particles.bound
                raise ValueError(
                    f"bound={self.particles.bound:g} is none: a path has the total reward {most:g}. Pass an upper "
                    "bound of reward - running cost."
                )
            generator = generator_for(problem.device, seed, Place.ACCEPTANCE, turn)
            uniform = torch.rand(count, generator=generator, dtype=torch.float64, device=problem.device)
            accepted = (uniform.log() < log_accept).reshape(len(missing), -1)
            # the first that is accepted, of each sample's own candidates
            has, index = accepted.any(1), accepted.int().argmax(1)
            rows = torch.arange(len(missing), device=problem.device)[has]
            chosen = paths.samples.unflatten(0, accepted.shape)[rows, index[has]]
            out = chosen.new_empty((n, *chosen.shape[1:])) if out is None else out
            out[missing[has]] = chosen
            missing = missing[~has]
            if len(missing) == 0:
                return out
        raise RuntimeError(
            f"rejection sampling has not found {len(missing)} of {n} samples in {tried} candidates: the acceptance "
            "rate is Z exp(-bound/alpha), which is too small here. Use a tighter bound, or SMC."
        )

    def _warn_where_few(self, effective: Any, total: int) -> None:
        if float(effective) < _FEW <= total:
            warn(
                f"{self.method}: only {float(effective):.1f} effective of {total} particles; the samples are nearly "
                "copies of so few and biased. Use more particles, a better proposal or a twist.",
                RuntimeWarning,
                stacklevel=3,
            )

    # ---------------------------------------------------------------- evaluation

    def evaluate(
        self, n: int = 4096, seed: int | None = None, *, confirm: bool | int = True, batch_size: int | None = None
    ) -> Evaluation:
        """As :meth:`Solution.evaluate`, from n particles (and 16 systems) at least, standard errors over systems.

        ``elbo`` is ``E log Z^``, a lower bound of log Z: the gap bounds the KL from a sample's law to the exact one,
        and ``kl`` is nan. For the best of n candidates ``kl`` is known: ``log n - (n-1)/n`` above the proposal's paths
        (Beirami et al. 2401.01879; exact where no two rewards are equal), and ``elbo`` is J/alpha as ever. For
        rejection the law is exact.
        """
        check_count("n", n, 64, why="particles to estimate from")
        seed, settings, alpha = fresh_seed(seed), self.particles, self.problem.alpha
        found = self.run(max(_SYSTEMS, -(-n // settings.num_particles)), seed, batch_size=batch_size)
        if not bool((found.log_z < math.inf).all()):  # nan too
            raise NonFiniteError("the weights of a system are not finite.", what="weights")
        log_z = self._log_z(found)
        exact_z = (self._exact_values() or {}).get("log_z")
        top = log_z if exact_z is None else Estimate(exact_z, 0.0)
        if settings.selection == "best":
            best = self._pick(found, seed).unsqueeze(1)
            picked = (v.gather(1, best)[:, 0] for v in (found.reward, found.running_cost, found.log_ratio))
            best_reward, best_cost, best_ratio = picked
            above = math.log(settings.num_particles) - (settings.num_particles - 1) / settings.num_particles
            reward, cost = mean_estimate(best_reward), mean_estimate(best_cost)
            kl = mean_estimate(best_ratio + above)
            below = (best_reward - best_cost) / alpha - best_ratio - above
        else:
            reward, cost = (self._expected(found, v) for v in (found.reward, found.running_cost))
            kl, below = Estimate(math.nan), found.log_z
        elbo = mean_estimate(below)
        gap = gap_estimate(found.log_z, below) if exact_z is None else top - elbo
        if settings.selection == "rejection":
            mean = self._expected(found, found.reward - found.running_cost, independent=False)
            kl = Estimate(mean.value / alpha - top.value, math.hypot(mean.stderr / alpha, top.stderr))
            elbo, gap = top, Estimate(0.0, 0.0)
        log_w = (found.log_weights + found.log_z.unsqueeze(1)).flatten()
        tail = pareto_k(found.log_z) if len(found.log_z) >= 64 else float("nan")
        budget = budget_of(confirm, self._rows(found))
        verdict, why = self._verdict(found, log_z, tail, budget, seed, batch_size)
        return Evaluation(
            reward=reward,
            running_cost=cost,
            kl=kl,
            objective=Estimate(alpha * elbo.value, alpha * elbo.stderr),
            elbo=elbo,
            log_z=log_z,
            ess=Estimate(effective_sample_size(log_w)),
            gap=gap,
            start_gap=Estimate(0.0, 0.0),
            verdict=verdict,
            reliability=why,
            pareto_k=tail,
            exact=exact_z is not None,
            n=found.log_weights.numel(),
        )

    def _log_z(self, found: Particles) -> Estimate:
        """With its error, over systems."""
        return log_mean_weight(found.log_z)

    def _expected(self, found: Particles, values: Tensor, independent: bool | None = None) -> Estimate:
        """Expectation of a sample's ``values`` (M, N): the mean over systems, or weighted by their Z^."""
        weights = found.log_weights.exp()
        counts = (weights > 0) & (found.log_z.unsqueeze(1) > -math.inf)
        each = torch.where(counts, weights * values, 0.0).sum(1)
        if self._one_each if independent is None else independent:
            return mean_estimate(each)
        return weighted_mean(each, found.log_z)

    def _verdict(
        self, found: Particles, log_z: Estimate, tail: float, budget: int, seed: int, batch_size: int | None
    ) -> tuple[str, str]:
        if lost := int((found.log_z == -math.inf).sum()):
            return UNRELIABLE, (
                f"{lost} of {len(found.log_z)} systems have no particle of a weight above 0: use more particles, or "
                "tempered-smc, which finds the way to where the reward is a number"
            )
        end, log_w = found.end.flatten(0, 1), (found.log_weights + found.log_z.unsqueeze(1)).flatten()
        if unresolved := resolution_problems(self.problem, end, log_w):
            return UNRELIABLE, unresolved[0]
        spread = float(found.log_z.std())
        if tail >= HEAVY:
            return UNRELIABLE, f"heavy-tailed Z^ over systems (Pareto k = {tail:.2f}, must be < {HEAVY})"
        if spread > _SPREAD and self.particles.num_particles > 1:
            return (
                UNRELIABLE,
                f"log Z^ varies by {spread:.2f} between systems (at most {_SPREAD:g} wanted): use more particles",
            )
        facts = f"log Z^ varies by {spread:.2g} between systems"
        shares = None
        if not self._one_each and self.particles.selection == "weights":
            shares = shares_of(found)
            name, effective = shares.worst()
            if effective < ESS_FLOOR:
                few = f"only {effective:.0f} effective draws (at least {ESS_FLOOR} wanted)"
                return UNRELIABLE, f"{facts}, but of {name} there are {few} between them"
        if (exact := (self._exact_values() or {}).get("log_z")) is not None:
            return compared(facts, log_z, Estimate(exact, 0.0), "the exact log Z")
        if not budget:
            return UNCONFIRMED, f"{facts}; no second estimate of log Z was asked for"
        place = derive_seed(seed, Place.PARTICLE_LOOK)
        look = look_again(self.problem, self.chain, None, budget, place, batch_size=batch_size, ways=self._other_ways())
        if look.log_z is None:
            return UNCONFIRMED, f"{facts}; {look.why}: no second estimate of log Z"
        verdict, why = compared(facts, log_z, look.log_z, look.source)
        if verdict == CONFIRMED and shares is not None and look.ends is not None and look.log_w is not None:
            name, apart, sigmas = shares.against(look.ends, look.log_w.flatten())
            if sigmas > bonferroni(SIGMAS, shares.share.numel()) and apart > _APART:
                return UNCONFIRMED, f"{why}, but samples differ: the share of {name} is {apart:.0%} off"
        if verdict == CONFIRMED and self.problem.density is not None and budget >= search_cost(self.problem):
            return searched(verdict, why, self.problem, end, log_w, log_z, seed)
        return verdict, why

    def _rows(self, found: Particles) -> int:
        """Rewards that an evaluation has asked for."""
        return found.log_weights.numel()

    def _other_ways(self) -> Ways:
        """Which looks at the target are others than this solution's own (:func:`look_again`)."""
        proposed = not isinstance(self.control, ZeroControl)
        return Ways(proposed or self.problem.running_cost_function is not None, proposed)

    # ---------------------------------------------------------------- files

    @property
    def configuration(self) -> dict[str, Any]:
        return {"particles": asdict(self.particles), "twist": VALUES.describe(self.twist)}

    def _tensors(self) -> dict[str, Tensor]:
        return {} if self.twist is None else with_part("twist", self.twist.state_dict())

    @classmethod
    def from_saved(cls, saved: Saved, context: Context, tensors: dict[str, Tensor]) -> dict[str, Any]:
        twist = VALUES.make(saved["twist"], context)
        if twist is not None:
            load_tensors(twist, part_of(tensors, "twist"), context.path)
        return {"particles": Saved(saved["particles"], saved.where).settings(ParticleSettings), "twist": twist}
