# %% [markdown]
# # A posterior, its evidence, and ArviZ
#
# Ten measurements of a response to a dose, and two models of it: does it saturate or not? Each model's posterior is
# sampled; the ratio of their normalising constants answers the question. Nothing is differentiated, and the density is
# a function of numpy's arrays. `pip install 'sdecontrol[arviz]'`.

# %% tags=["parameters"] small={"evaluations": 1000, "n": 256}
evaluations = 12000  # of the log density, in all
n = 2000

# %%
import matplotlib.pyplot as plt
import numpy as np

import sdecontrol as sc

dose = np.array([0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0])
seen = np.array([0.11, 0.17, 0.35, 0.42, 0.55, 0.58, 0.72, 0.70, 0.83, 0.79])
noise = 0.05


def log_normal(residual):
    return (-0.5 * (residual / noise) ** 2 - np.log(noise * np.sqrt(2 * np.pi))).sum(1)


def saturating(v):  # (batch, 2) -> (batch,): flat prior of top on (0, 2), exponential of half
    top, half = v[:, :1], v[:, 1:]
    return log_normal(seen - top * dose / (half + dose)) - np.log(2) - half[:, 0]


def straight(v):  # (batch, 2): flat priors on (0, 1) and (0, 1)
    return log_normal(seen - v[:, :1] - v[:, 1:] * dose)


# %% [markdown]
# ## Sample
#
# Names and bounds are all that is stated. Z is the integral over your own parameters, so log Z is the evidence.

# %%
curve = sc.gibbs_problem(saturating, names=["top", "half"], support=[(0, 2), (0, None)])
line = sc.gibbs_problem(straight, names=["offset", "slope"], support=[(0, 1), (0, 1)])
solutions = {
    name: sc.solve(problem, sc.Auto(evaluations=evaluations), seed=0, progress=False)
    for name, problem in (("saturating", curve), ("straight", line))
}
found = {name: solution.evaluate(n, seed=1) for name, solution in solutions.items()}
for name, evaluation in found.items():
    print(f"{name}: log evidence {evaluation.log_z}, {evaluation.verdict}: {evaluation.reliability}")
print(f"log Bayes factor for saturation: {found['saturating'].log_z.value - found['straight'].log_z.value:.1f}")

# %%
figure, axes = solutions["saturating"].plot_corner(n, seed=2)

# %% [markdown]
# ## Check
#
# The budget was spent in full, so no second look was taken, and the verdict says that: *unconfirmed*. Two parameters
# can be integrated on a grid, which settles it here.

# %%
top, half = np.meshgrid(np.linspace(0.5, 1.5, 801), np.linspace(0.01, 4, 801), indexing="ij")
values = saturating(np.stack([top.ravel(), half.ravel()], 1))
cell = (1.0 / 800) * (3.99 / 800)
print("log evidence by a grid:", round(float(values.max() + np.log(np.exp(values - values.max()).sum() * cell)), 3))

# %% [markdown]
# ## Go on elsewhere
#
# `to_arviz` gives ArviZ's own object, with draws, weights and diagnostics; `to_dataframe` a pandas table.

# %%
tree = solutions["saturating"].to_arviz(n, seed=3, evaluation=found["saturating"])
print({name: float(tree["posterior"][name].mean()) for name in ("top", "half")})
print({name: tree.attrs[name] for name in sorted(tree.attrs)[:6]})

# %%
figure, panel = plt.subplots(figsize=(5, 3.2), layout="constrained")
grid = np.linspace(0, 6, 100)
draws = solutions["saturating"].to_dataframe(200, seed=4)
panel.plot(
    grid, (draws["top"].values * grid[:, None]) / (draws["half"].values + grid[:, None]), color="tab:blue", alpha=0.04
)
panel.errorbar(dose, seen, noise, fmt="o", color="black", markersize=4)
panel.set(xlabel="dose", ylabel="response", xlim=(0, 6), ylim=(0, 1.2))

# %% [markdown]
# Priors as distributions, one point at a time, worker processes, Pyro models: [densities](../densities.md).
