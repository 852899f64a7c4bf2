# %% [markdown]
# # A method of your own, in thirty lines
#
# The package's methods are losses on simulated paths. A new one needs its loss and nothing else: it then runs on every
# kind of process, resumes, is evaluated, and stands in a table beside the others.
#
# ## The idea
#
# At the optimum `Y = log dP^u/dQ0 - R/alpha` is the same number on every path. `LogVariance` minimises its variance, so
# a single path with a huge `Y` rules a batch. Here deviations from the *median* count, and beyond a few median absolute
# deviations they count linearly.

# %% tags=["parameters"] small={"iterations": 3, "n": 256}
iterations = 60
n = 2048

# %%
from dataclasses import dataclass
from typing import ClassVar

import matplotlib.pyplot as plt
import torch

import sdecontrol as sc
from sdecontrol.methods.base import register
from sdecontrol.methods.on_paths import PathMethod, add_scores
from sdecontrol.tensors import check_positive


@register
@dataclass(frozen=True)
class RobustVariance(PathMethod):
    """Huber's loss of ``Y`` around its median.

    Args:
        bound: in median absolute deviations; beyond it deviations count linearly.
    """

    anneals: ClassVar[bool] = True  # begin at higher temperatures: the target is far from the first paths
    bound: float = 3.0  # annotated: a setting of the user's

    def __post_init__(self):
        check_positive("bound", self.bound)

    def learn(self, state, run, part, paths):
        y = -paths.log_weights()  # (batch,), of paths of the current control; without a graph
        deviation = y - y.median()
        limit = self.bound * deviation.abs().median().clamp_min(1e-6)
        pull = deviation.clamp(-limit, limit)
        log_ratios = paths.under(state.control).log_ratio  # (steps, batch), with the control's graph
        add_scores(run, log_ratios, pull - pull.mean())  # the gradient: E[pull * grad log P^u]
        return {"loss": float(pull.square().mean() / 2)}


# %% [markdown]
# `paths.log_weights()` and `paths.under(control).log_ratio` are all it knows of the process.
#
# ## Against the others
#
# Two wells and a reward beyond the barrier: the first batches have a few paths with large weights. The state has one
# coordinate, so that the error of each control is known.

# %%
sde = sc.SDE(lambda x, t: 2 * (x - x**3), diffusion=torch.tensor(0.8), dim=1, horizon=1.0)
problem = sc.ControlProblem(sde, sc.Dirac(-torch.ones(1)), reward=lambda x: -2 * (x[:, 0] - 1).square(), alpha=0.5)
methods = [RobustVariance(), sc.LogVariance(), sc.CrossEntropy(trust_region=1.0), sc.AdjointMatching()]
table = sc.compare(problem, methods, time_steps=40, iterations=iterations, n=n, seed=0)
for row in table.rows:
    error = row.estimates.get("control_error")
    print(f"{row.label:40} control error {error}   gap {row.estimates.get('gap')}")

# %%
figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
labels = [row.label for row in table.rows]
axes.barh(labels[::-1], [row.estimates["control_error"].value for row in table.rows][::-1], color="tab:blue")
axes.set(xscale="log", xlabel="relative control error on optimal paths")

# %% [markdown]
# One seed says little; `sc.compare(..., seeds=5)` has the error between seeds. What else a method may declare, and how
# to write chains, rewards and controls: [extending](../extending.md).
