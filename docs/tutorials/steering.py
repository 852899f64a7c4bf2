# %% [markdown]
# # A control problem and its exact answer
#
# A particle sits in the left one of two wells and is shaken by noise. It is to be in the right one at time 1. How hard
# must it be pushed, when, and how sure can one be that no other way of pushing does better? In one dimension all of
# this is known exactly, so the answer can be checked and not only believed.

# %% tags=["parameters"] small={"iterations": 4, "n": 256}
iterations = 150
n = 4096

# %%
import matplotlib.pyplot as plt
import torch

import sdecontrol as sc


def drift(x, t):  # x (batch, 1), t a number: two wells, at -1 and 1
    return 2 * (x - x**3)


sde = sc.SDE(drift, diffusion=torch.tensor(0.8), dim=1, horizon=1.0)
problem = sc.ControlProblem(
    sde,
    initial=sc.Dirac(-torch.ones(1)),
    reward=lambda x: -2 * (x[:, 0] - 1).square(),  # at the end: near 1
    alpha=0.5,  # the price of control: reward points for a nat of KL divergence
)
print(sc.recommend(problem))

# %% [markdown]
# ## Solve it
#
# The control `u(x, t)` adds `sigma u` to the drift. What is maximised is reward less `alpha` times the KL divergence
# between the laws of controlled and free paths, here `E int |u|^2 / 2 dt`.

# %%
solution = sc.solve(problem, sc.AdjointMatching(), time_steps=50, iterations=iterations, seed=0, progress=False)
evaluation = solution.evaluate(n, seed=1)
print(evaluation)

# %% [markdown]
# The *gap* is the distance to the optimum in nats, and the verdict in the last line says whether that number can be
# trusted. [What the lines mean](../concepts.md#the-gap-and-the-verdict).
#
# ## Look at it

# %%
figure, axes = solution.plot(seed=2)

# %% [markdown]
# ## Hold it against the truth
#
# A state of one coordinate can be put on a grid, and the value function, the control and log Z follow from it without
# sampling. `like=solution` asks for the same chain of 50 steps.

# %%
exact = sc.exact_solution(problem, like=solution)
print("log Z: exact", round(float(exact.log_z), 4), "estimated", evaluation.log_z)
print("control error on optimal paths, relative:", sc.control_error(solution, exact, n=n).relative)

# %%
x = torch.linspace(-2, 2, 81).unsqueeze(1)
figure, panels = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True, layout="constrained")
for panel, t in zip(panels, (0.0, 0.5, 0.9)):
    panel.plot(x, exact.control(x, t).detach(), color="black", label="exact")
    panel.plot(x, solution.control(x, t).detach(), color="tab:orange", linestyle="--", label="learned")
    panel.set(title=f"t = {t}", xlabel="x", xlim=(-2, 2), ylim=(-2, 8))
panels[0].set_ylabel("u(x, t)")
panels[0].legend()

# %% [markdown]
# Where paths go, the two agree. Far to the right at early times they need not: optimal paths are hardly ever there, and
# the error above does not count such states.
#
# ## What a control costs
#
# A smaller `alpha` makes control cheap. Each run begins with the last one's control, near its own optimum.

# %%
start = solution
for alpha in (0.5, 0.25):
    cheaper = sc.ControlProblem(sde, sc.Dirac(-torch.ones(1)), problem.reward_function, alpha=alpha)
    start = sc.solve(
        cheaper, sc.AdjointMatching(), control=start, time_steps=50, iterations=iterations // 3, seed=0, progress=False
    )
    found = start.evaluate(n, seed=1)
    print(f"alpha {alpha}: reward {found.reward}, KL {found.kl}, gap {found.gap}, {found.verdict}")

# %% [markdown]
# Next: [your own system](../howto/problems.md#a-system-of-your-own), or
# [a method of your own](own_method.md) against these.
