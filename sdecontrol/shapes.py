"""The shapes of tensors in signatures, by name.

An alias says what a tensor holds and how it is laid out; its dimensions have names (jaxtyping), and a name has one size
within a call: ``step(k, x: States, xi: Noises) -> States`` says that states and noises are of one batch, and that a
step leaves the shape of a state as it is. Nothing is checked when the package is used. ``pytest --shapes`` checks every
call of the rooms it lists (``tests/shape_checks.py``).

Names of dimensions:

* ``batch``: paths side by side. ``K``: steps, one after another. ``times``: their ends, K+1.
* ``*event``, ``*noise``, ``*control``: of one state, one noise (or shift), one control u (a learned start has its own).
  In a method of an object with an ``event_shape`` or a ``noise_shape``, and in a function whose first argument has
  them, the first two are these.
* ``*sample``: of what rewards see, a decoded state. ``others``: samples of another set.
* ``*draw``: of what a step's log-ratio depends on.

States may be tokens (int64); all else is floating point.
"""

from jaxtyping import Float, Num
from torch import Tensor

#: one number
Scalar = Float[Tensor, ""]
#: times of several steps
Times = Float[Tensor, "K"]

#: x of one time
States = Num[Tensor, "batch *event"]
#: tokens of one time, or their probabilities with one dimension more (``chains/relaxed.py``)
TokensOrRelaxed = Num[Tensor, "batch ..."]
#: ``x_k`` of several steps
StatePaths = Num[Tensor, "K batch *event"]
#: the same of some of the paths
SomeStates = Num[Tensor, "K some *event"]
#: ``x_0 .. x_K`` of whole paths
Trajectories = Num[Tensor, "times batch *event"]
#: decoded states, as rewards see them
Samples = Num[Tensor, "batch *sample"]

#: a second set of samples, of another number
OtherSamples = Num[Tensor, "others *sample"]

#: xi of one step, or a shift c
Noises = Float[Tensor, "batch *noise"]
#: ``xi_k`` or ``c_k`` of several steps
NoisePaths = Float[Tensor, "K batch *noise"]
#: what log-ratios of several steps depend on: ``xi_k + c_k``, or tokens
DrawPaths = Num[Tensor, "K batch *draw"]

#: u of one time
Controls = Float[Tensor, "batch *control"]
#: u of several steps
ControlPaths = Float[Tensor, "K batch *control"]

#: one number a path: rewards, costs, log weights
PerPath = Float[Tensor, "batch"]
#: one number a sample of the second set
PerOther = Float[Tensor, "others"]
#: one number a step of each path: log-ratios, KLs
PerStep = Float[Tensor, "K batch"]

#: scale of a step, or a diffusion: a number, ``(batch, *event)``, or a matrix ``(1 | batch, d, m)``
#: (:func:`sdecontrol.tensors.apply_scale`)
Scale = Float[Tensor, "..."]
