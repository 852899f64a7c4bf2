"""``sc.library``: named problems and targets, fixed and versioned, with what is known of them exactly.

* :func:`named_problem` makes a control problem by its name; :func:`problem_names` lists them, :func:`problem_card` says
  what one is: its definition, version, usual steps and batch.
* :func:`named_target` makes an unnormalised density by its name (a :class:`Target`, to give to ``sc.gibbs_problem``);
  :func:`target_names` lists them, :func:`target_card` says what one is.
* :func:`reference_samples` draws samples of a target to hold a sampler against: exact ones, or those of long tempered
  runs, which the package's cache keeps (:class:`ReferenceSamples`).
* :func:`mixture_inverse_problem` makes linear inverse problems with a Gaussian-mixture prior, of any number and
  dimension; :func:`mixture_observation` says what was observed.
* :class:`Ising` is the Ising model on a rectangle, a Gibbs target on tokens with its exact log Z.
* :func:`sequence_task` makes a task of sequence design by its name, :func:`sequence_task_names` lists them,
  :func:`sequence_card` says what of one is real and what is made: a model of DNA or RNA, an activity, and what is
  natural (:class:`SequenceTask`). :class:`MarkovLetters` is a model of letters whose conditionals are exact.
* :class:`SimplexDiffusion` is a diffusion of letters' probabilities that stays on the simplex.
* ``sdecontrol.library.digits`` has scikit-learn's 8x8 digits and a classifier of them.
"""

from . import systems as systems  # adds its problems
from .inverse import mixture_inverse_problem, mixture_observation
from .ising import Ising
from .markov_letters import MarkovLetters
from .problems import ProblemCard, named_problem, problem_card, problem_names
from .samples import ReferenceSamples, reference_samples
from .sequences import SequenceTask, sequence_card, sequence_task, sequence_task_names
from .simplex import SimplexDiffusion
from .target_base import Card, Target
from .targets import named_target, target_card, target_names

__all__ = [
    "Card",
    "Ising",
    "MarkovLetters",
    "ProblemCard",
    "ReferenceSamples",
    "SequenceTask",
    "SimplexDiffusion",
    "Target",
    "mixture_inverse_problem",
    "mixture_observation",
    "named_problem",
    "named_target",
    "problem_card",
    "problem_names",
    "reference_samples",
    "sequence_card",
    "sequence_task",
    "sequence_task_names",
    "target_card",
    "target_names",
]
