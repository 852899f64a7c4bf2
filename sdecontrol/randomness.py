"""Seeds and noise: every random number of the package comes from a seed and a place, never from a hidden state.

A place (:class:`Place`) names what numbers are for, and indices (iteration, block, ...) tell its draws apart. Seed,
place and indices are hashed together, so that two purposes share no draw under one seed, however they are numbered.

Noise is drawn in blocks of 64 paths, each block in segments of steps, each segment from a generator of its own whose
seed is derived from (seed, block, segment). So the noise of path i at step k does not depend on the batch size, on
chunking in multiples of 64, on what is kept, or on the order in which steps are asked for; and it can be drawn again
at any place, which is how a backward pass and a resumed run find the noise of the forward pass.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .ranks import agreed

BLOCK = 64
_SEGMENT_NUMBERS = 1 << 16


@enum.unique
class Place(enum.IntEnum):
    """What random numbers are for, each written at one call; in brackets its indices.

    The numbers go into the seeds: a new place takes a new number, and none is used again for another purpose.
    """

    OUTSIDE = 0  # code outside of the package, such as benchmarks and tests, which numbers its own places [any]

    # randomness, processes, chains
    NOISE = 1  # of paths [block, segment]
    LAW = 2  # draws from a law [block]
    PROBE_STATES = 3  # states to try functions with
    PROBE_TOKENS = 4  # the same, tokens
    LIKELY_ENDS = 6  # by which masked tokens are filled in
    PROBE_ENDS = 5  # tokens as a path may end with
    PROBE_POINTS = 7  # states to try functions with, on a manifold

    # paths
    REPLAY = 101  # stored paths that are learned from again [iteration, part]
    SOLVER_TREE = 102  # Brownian paths of adaptive solvers
    SOLVER_PROBE = 103  # what torchsde draws to try functions with
    FLOW_DIRECTIONS = 104  # of Hutchinson's estimate of a divergence
    DIFFUSION_ENTRIES = 105  # entries of the state that are moved to see which the diffusion depends on

    # problems
    START = 201  # of paths
    CONDITION = 202
    SPACE_TIME_INTEGRALS = 203  # of the Brownian paths whose increments are NOISE
    FLOW_START = 204  # of the probability flow of a problem with a learned start
    GIBBS_PROBE = 210  # states to try a log density with
    GIBBS_PROBE_CONDITION = 211
    GIBBS_PILOT = 212  # the pilot run of a Gibbs problem
    GIBBS_END = 213  # draws of the reference's end at which the density is tried
    GIBBS_END_CONDITION = 214
    PRIOR = 215  # draws of a density's priors
    PILOT_SCAN = 220  # [count]
    PILOT_SCAN_CONDITION = 221  # [count]
    PILOT_CHAINS = 222
    PILOT_CHAINS_CONDITION = 223
    PILOT_LINES = 224  # along which a density must fall
    PILOT_AXES = 225
    PILOT_AGAIN = 227  # [run] from further out
    SEARCH = 226  # distances at which the chains of a search for modes begin
    GRADIENT_DIRECTIONS = 230  # along which gradients are compared with values
    GRADIENT_STATES = 231  # where those of a log density are

    # controls
    CONTROL_WEIGHTS = 301  # of the default network
    VALUE_WEIGHTS = 302  # of a value network
    CONTROL_NETWORK = 303  # weights and pilot paths of the default network
    CONTROL_START = 304  # weights of the control of a learned start
    CORRECTION = 305  # weights and pilot paths of a network beside a mixture's control
    MIXTURE_ENDS = 306
    RATIO_WEIGHTS = 308  # of a network for a log density ratio
    RATIO_PILOT = 309  # paths that normalise what it sees
    REWARD_NETWORK = 320  # weights and pilot paths of the network beside a pre-trained model
    REWARD_NETWORK_WEIGHTS = 321
    TOKEN_CONTROL_WEIGHTS = 330  # of the default network of tokens
    TOKEN_VALUE_WEIGHTS = 331
    PATH_INTEGRAL = 307  # paths that a path-integral control averages [step, group of rows]

    # particles
    SYSTEMS = 401  # of sequential Monte Carlo: starts, conditions, noise, resampling [group]
    RESAMPLING = 402
    POINTS = 410  # what tempered particles and chains begin with
    POINTS_START = 411  # the same, where the start of their paths is not among the coordinates
    LADDER = 412  # moves and resampling while a ladder is chosen
    LADDER_POINTS = 413
    TEMPERED = 414  # moves and resampling on a given ladder
    TEMPERED_GROUP = 415  # systems that are run at once [first]
    EVENT_POINTS = 416  # noises of the first particles of a ladder to a rare event
    EVENT_START = 417  # the same, starts of their paths
    EVENT_SCALE = 418  # particles by which such a ladder finds its first noise scale [power]
    EVENT_LADDER = 419  # its moves and resampling while it is chosen
    EVENT_GROUP = 426  # systems that are run at once [first]
    EVENTS = 427  # moves and resampling on a given one
    WARM_UP = 420  # moves of Markov chains while their kernel is adapted
    WARM_UP_POINTS = 421
    CHAINS = 422  # moves of warm chains
    NUTS_WARM_UP = 423  # [chain]
    NUTS_WARM_UP_POINTS = 424
    NUTS = 425  # [chain]
    IMPORTANCE_BATCH = 440  # draws of adaptive importance sampling [batch]
    IMPORTANCE_FIT = 441  # [batch]
    IMPORTANCE_FINAL = 442  # [batch]
    IMPORTANCE_WIDE = 443  # [factor]
    IMPORTANCE_ORDER = 444
    IMPORTANCE_LOCATED = 445
    IMPORTANCE_LAW = 446
    MIXTURE_SPLIT = 430  # which samples choose a mixture and which judge it
    MIXTURE_FIT = 431  # means to begin with [size, kind]
    MIXTURE_LAST_FIT = 432

    # evaluation
    EVALUATION_LOOK = 501  # the second look at the target
    EVALUATION_STARTS = 502  # starts and conditions from which several paths are run
    EVALUATION_REPLICAS = 503  # these paths
    PARTICLE_PICK = 510  # the sample of each system
    PARTICLE_RESAMPLING = 511  # samples among all particles
    PARTICLE_ORDER = 512
    PARTICLE_LOOK = 513  # as EVALUATION_LOOK
    CANDIDATES = 514  # of rejection sampling [round]
    ACCEPTANCE = 515  # [round]
    POSTERIOR_EVALUATION = 518  # what is said beside draws
    POSTERIOR_WEIGHTED = 516  # weighted draws
    POSTERIOR_DRAWN = 517  # draws among these
    CHAIN_ORDER = 520  # of draws of Markov chains
    CHAIN_LOG_Z = 521  # a run for log Z alone
    BRIDGE_FIT = 522  # the mixture of bridge sampling
    BRIDGE_DRAWS = 523
    PATHS_TO_ENDS = 530  # of the target, given where they end
    PATHS_BACKWARDS = 531  # the same, by backward kernels
    CERTIFICATE_PARTICLES = 532  # tempered particles in place of samples
    CERTIFICATE_ENDS = 533  # ends among these particles
    CERTIFICATE_PARTICLES_BACKWARDS = 534
    CERTIFICATE_SAMPLES = 535  # paths to given samples
    LOOK_FIRST = 540  # paths of the reference that show whether these reach
    LOOK_REST = 541
    LOOK_PART = 542  # paths of the reference that are held at once [part]
    LOOK_PARTICLES = 543
    LOOK_TEMPERED = 544
    LOOK_TEMPERED_PATHS = 545  # to the ends of tempered particles
    CHAINS_LOOK = 546  # as EVALUATION_LOOK
    LOOK_SEARCH = 547  # chains that begin far out
    LOOK_KEPT = 548  # samples beside their ends
    LOOK_FIT = 549
    LOOK_DRAWS = 550  # of the mixture fitted to both

    # exact
    EXACT_SAMPLES = 551
    GRID_WALK = 552  # paths that show where a grid must reach
    STOPPED_WALK = 555  # of chains that stop: paths that say where panels must be
    PLANE_WALK = 556  # optimal paths of those, whose shifts are looked at
    GRID_PROBES = 553
    GRID_CHECK = 554  # paths on which a solution is tried

    # methods
    LINEAR_START = 650  # paths of the reference by which a regulator begins
    LINEAR_START_ROUND = 651  # [round]
    BATCH = 601  # starts, noise and conditions of a batch of training [iteration, part]
    LEARNED_STEPS = 602  # the steps of a batch that are learned from [iteration, part]
    ROLL_IN = 603  # of reward-weighted MLE [iteration, part]
    CONSISTENCY_VALUE = 605  # of path consistency: the value or log Z
    PPO_VALUE = 606
    PPO_ORDER = 607  # [iteration, epoch, part]
    RECIPROCAL = 608  # ends and bridges of reciprocal adjoint matching [iteration]
    BACKPROP_TRUNCATION = 609  # [iteration, part]
    BRIDGES = 610  # of bridge matching [iteration, part]
    PATH_INTEGRAL_CONTROL = 611  # the seed of a path-integral control
    GUIDANCE_VALUE = 612
    GUIDANCE_ROLL = 613  # perturbed starts and guided steps of value guidance
    RATIO_VALUE = 614  # the network of a log density ratio
    RATIO_PATHS = 615  # paths on which it is fitted, or measured [draw, chunk]
    RATIO_ROWS = 616  # steps of each path that are stored [draw, chunk]
    RATIO_BATCH = 617  # rows of the regression's batches [iteration]
    DISTILLED_PATHS = 640  # [round, part]
    DISTILLED_STATES = 641  # stored ones that are learned from [iteration, part]
    DISTILLED_VISITED = 642  # stored paths at which a step is measured [iteration]
    MATCHING_START = 620  # particle matching: the first mixture
    MATCHING_PARTICLES = 621  # [iteration]
    MATCHING_PICK = 622
    MATCHING_OWN = 623  # own paths of the control
    MATCHING_OWN_START = 624
    MATCHING_BATCH = 625  # [iteration, part]
    MATCHING_JUDGE = 626  # bridges on which a correction is judged [iteration, part]
    MATCHING_GAIN = 643  # bridges to new particles on which the last iterations are judged [iteration, part]
    MATCHING_TOKENS = 627  # rows of particles of tokens, and where their ends are masked [iteration, part]
    BRIDGE_ANCHOR = 628  # the anchor of bridges, where it is a network of its own
    MATCHING_UNTUNED = 629  # ends of the untuned model
    MATCHING_ANCHORED = 634  # rows of particles and untuned ends, and the noise between [iteration, part]
    FIRST_MIXTURE = 630  # particles of the first mixtures [turn]
    FIRST_MIXTURE_FIT = 631  # [turn]
    FIRST_MIXTURE_DRAWS = 632  # independent draws that begin with the second one [block]
    FIRST_MIXTURE_LAST_FIT = 633

    # training
    GOOD_ENOUGH = 701  # evaluations that may end a run [iteration]
    SCORE_NETWORK = 710  # fit_score: weights and dropout
    SCORE_BATCH = 711
    MASKED_NETWORK = 712  # fit_masked_diffusion: weights and dropout
    MASKED_BATCH = 713
    BRIDGE_NETWORK = 720  # fit_bridge: weights, dropout and times
    BRIDGE_BATCH = 721
    BRIDGE_MOMENTS = 722
    BRIDGE_STARTS = 723  # [iteration]

    REWARD_MEMBER = 730  # fit_reward: weights and dropout [member]
    REWARD_ROWS = 731  # which rows a member sees, and its batches [member]
    REWARD_HELD_OUT = 732  # rows that none sees

    # models
    SCHEDULER_STEPS = 750  # states at which a scheduler's own steps are compared with its numbers
    PYRO_TRACE = 752  # a run of a model that shows its variables
    LAST_STEP = 751  # paths at whose ends a stock sampler's last step is compared with this one

    # library
    TARGET_SAMPLES = 801
    REFERENCE_PROBLEM = 802  # long runs for reference samples
    REFERENCE_LADDER = 803
    REFERENCE_PARTICLES = 804
    REFERENCE_MOVES = 805
    CLASSIFIER_WEIGHTS = 810
    CLASSIFIER_BATCH = 811
    LETTERS = 820  # draws of a Markov chain of letters
    ENHANCERS = 821  # sequences with planted motifs
    ENHANCER_WEIGHTS = 823  # of their model
    MASKED_BOUND = 822  # which letters are masked, where a likelihood is bounded

    # comparison
    COMPARISON_EVALUATION = 901  # compare
    COMPARISON_SAMPLES = 902
    COMPARISON_EXACT = 903
    COMPARISON_FLOOR = 904  # a second set of exact samples
    AUTO_SEARCH = 910  # auto: for modes, before the first round
    AUTO_ROUND = 911  # [iteration]
    AUTO_FIT = 912  # [rounds]
    AUTO_TRIED = 913  # draws of its last mixture, by which it decides how to estimate
    AUTO_ESTIMATE = 914  # [first system]
    AUTO_COVERED = 916  # the mixture on a reference that was put where the particles are
    AUTO_PLAIN_FIT = 918  # of the coordinates themselves, beside one of non-centred ones [rounds]
    AUTO_UNMOVED = 915  # particles of a run that was over before its first round
    RECEDING_HORIZON = 920  # paths by which a plan is updated [rounds before]
    RECEDING_HORIZON_SOLVE = 921  # plans by methods that train [plans before]
    WAYS = 940  # recommend: paths of the reference, and particles, by which it looks for several ways
    WAYS_PARTICLES = 941
    DESIGN_FIT = 931  # design [round]
    DESIGN_SOLVE = 932  # [round]
    DESIGN_SAMPLES = 933  # among which the next batch is [round, turn]

    # cli
    SAMPLE_EVALUATION = 1001  # sdecontrol sample
    SAMPLE_WEIGHTED = 1002
    SAMPLE_DRAWN = 1003  # samples of equal weight among weighted ones
    SAMPLE_EXACT = 1004
    SAMPLE_FLOOR = 1005  # a second set of exact samples
    SAMPLE_FIGURE = 1006
    SAMPLE_CERTIFICATE = 1007
    SAMPLE_CERTIFICATE_EXACT = 1008
    SAMPLE_CORNER = 1009
    DEMO_SPLIT = 1020  # sdecontrol demo: digits to train on and to test with
    DEMO_CLASSIFIER = 1021
    DEMO_MODEL = 1022
    DEMO_SOLVE = 1023
    DEMO_BEFORE = 1024
    DEMO_AFTER = 1025
    DEMO_TILT = 1026
    DEMO_TILT_PATHS = 1027  # [chunk]
    DEMO_GUIDED = 1028
    DEMO_SAMPLES = 1029
    DEMO_RESAMPLED = 1030
    DEMO_RESAMPLING = 1031
    DEMO_DISTILLED = 1032


def fresh_seed(seed: int | None) -> int:
    """The seed itself, or a new one from torch's global generator where it is None (so ``torch.manual_seed`` fixes
    it); of several processes the first one's.

    Raises:
        TypeError, ValueError: it is not an int from 0 to 2^64 - 1.
    """
    if seed is None:
        return agreed(int(torch.randint(2**63 - 1, ()).item()), "a seed")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed must be an int or None, got {type(seed).__name__}; pass e.g. seed=0.")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2^64 - 1, got {seed}.")
    return int(seed)


def derive_seed(seed: int, place: Place, *index: int) -> int:
    """A 63-bit seed for one place under ``seed``; different seeds, places and indices give independent ones.

    It is a hash (BLAKE2b) of all of them as 64-bit integers, so that their number counts too: ``(5, 1)`` and
    ``(5, 1, 0)`` are different messages.
    """
    if not isinstance(place, Place):
        raise TypeError(f"place must be a Place, got {place!r}; code outside of the package has Place.OUTSIDE.")
    message = struct.pack(f"<{2 + len(index)}Q", seed, place, *index)
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") >> 1


def generator_for(device: torch.device | str, seed: int, place: Place, *index: int) -> torch.Generator:
    """A generator on ``device`` for one place under ``seed``.

    On the CPU torch's Mersenne twister takes 32 bits of its seed: two of n generators agree by chance with probability
    n^2/2^33, whatever they are for.
    """
    return torch.Generator(device=device).manual_seed(derive_seed(seed, place, *index))


@contextlib.contextmanager
def global_rng(device: torch.device | str, seed: int, place: Place, *index: int) -> Iterator[None]:
    """Run code that draws from torch's global generator (a user's distribution or sampler) from a seed and a place,
    and leave the global state as it was."""
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, place, *index))
        yield


def published_generator(seed: int) -> torch.Generator:
    """A CPU generator with torch's own seed, as published definitions of problems have it
    (``torch.manual_seed(seed)``): for numbers that define a problem, never for those that solve one."""
    return torch.Generator().manual_seed(seed)


class SeededNoise:
    """Standard normal noise ``xi_k`` of ``batch`` paths over ``steps`` steps, a function of the seed alone.

    ``noise[k]`` is ``(batch, *shape)``; ``noise.all()`` is ``(steps, batch, *shape)``. With ``antithetic`` the paths
    2i and 2i+1 have opposite noise.
    """

    def __init__(
        self,
        seed: int,
        batch: int,
        steps: int,
        shape: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        antithetic: bool = False,
        first_block: int = 0,
    ) -> None:
        self.seed, self.batch, self.steps, self.shape = seed, batch, steps, tuple(shape)
        self.dtype, self.device, self.antithetic, self.first_block = (
            dtype,
            torch.device(device),
            antithetic,
            first_block,
        )
        per_step = BLOCK * max(1, int(np.prod(self.shape, dtype=np.int64)))
        self.segment = max(1, min(BLOCK, _SEGMENT_NUMBERS // per_step))
        self._held: tuple[int, Tensor, tuple[Tensor, ...]] | None = None

    def _draw(self, index: int) -> tuple[int, Tensor, tuple[Tensor, ...]]:
        """Segment ``index``: whole, and step by step."""
        if self._held is None or self._held[0] != index:
            rows = BLOCK // 2 if self.antithetic else BLOCK
            parts = []
            for block in range(-(-self.batch // BLOCK)):
                generator = generator_for(self.device, self.seed, Place.NOISE, self.first_block + block, index)
                part = torch.randn(
                    (self.segment, rows, *self.shape), generator=generator, dtype=self.dtype, device=self.device
                )
                if self.antithetic:
                    part = torch.stack((part, -part), dim=2).flatten(1, 2)
                parts.append(part)
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            whole = whole[:, : self.batch]
            self._held = (index, whole, whole.unbind(0))
        return self._held

    def __getitem__(self, k: int) -> Tensor:
        return self._draw(k // self.segment)[2][k % self.segment]

    def rows(self, low: int, high: int) -> SeededNoise:
        """The noise of paths ``low .. high-1``; low a multiple of 64."""
        return SeededNoise(
            self.seed,
            high - low,
            self.steps,
            self.shape,
            dtype=self.dtype,
            device=self.device,
            antithetic=self.antithetic,
            first_block=self.first_block + low // BLOCK,
        )

    def all(self) -> Tensor:
        """All steps at once, ``(steps, batch, *shape)``."""
        count = -(-self.steps // self.segment)
        return torch.cat([self._draw(i)[1] for i in range(count)])[: self.steps]


class SuppliedNoise:
    """Noise given by the user: ``(steps, batch, *shape)``."""

    def __init__(self, noise: Tensor) -> None:
        self._noise = noise
        self.steps, self.batch = noise.shape[0], noise.shape[1]

    def __getitem__(self, k: int) -> Tensor:
        return self._noise[k]

    def rows(self, low: int, high: int) -> SuppliedNoise:
        """The noise of paths ``low .. high-1``."""
        return SuppliedNoise(self._noise[:, low:high])

    def all(self) -> Tensor:
        return self._noise
