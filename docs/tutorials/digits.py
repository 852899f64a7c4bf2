# %% [markdown]
# # Tuning a digit model, and reading its verdict
#
# A small diffusion model is trained on handwritten digits. Then it is tilted towards a reward, here ink. Anybody can
# raise a reward; the question is how far the result is from the law that was wanted, the model's own law times
# `exp(reward/alpha)`. Every solution says so itself, and says whether it can be trusted.

# %% tags=["parameters"] small={"pre_training": 20, "paths": 512, "iterations": 2, "n": 128}
pre_training = 1500  # iterations
paths = 4096  # of the model, from which the value is learned
iterations = 60  # of training
n = 1024  # samples of an evaluation

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import sdecontrol as sc

images = torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32).unsqueeze(1)  # (1797, 1, 8, 8) in [-1, 1]
model = sc.fit_score(images, sc.VP(), prediction="noise", iterations=pre_training, seed=0, progress=False)


def ink(x):  # (batch, 1, 8, 8) -> (batch,): any function of images
    return 20 * x.flatten(1).mean(1)


# %% [markdown]
# `model` is an `nn.Module`, called as `model(x, s)`; your own would stand in its place.

# %%
sde = sc.generative_sde(model, schedule=sc.VP(), prediction="noise", shape=(1, 8, 8))
problem = sc.ControlProblem(sde, reward=ink, alpha=1.0)
before = sc.simulate(problem, n, time_steps=30, seed=1, keep="end").samples
print("ink before:", round(float(ink(before).mean()), 2))

# %% [markdown]
# ## Guidance
#
# `ValueGuidance("ratio")` asks for no gradient of the reward and leaves the model as it is: it learns from the model's
# own samples where each path is heading.

# %%
guided = sc.solve(
    problem, sc.ValueGuidance("ratio", num_paths=paths), time_steps=30, iterations=2, seed=0, progress=False
)
first = guided.evaluate(n, seed=2)
print(first)

# %% [markdown]
# ## One network
#
# `distill` puts the guidance into a tuned copy of the model, which samples without it.

# %%
tuned = sc.distill(guided, iterations=4 * iterations, seed=0, progress=False)
second = tuned.evaluate(n, seed=2)
print(second.reward, second.kl, second.gap, second.verdict, sep=" | ")

# %% [markdown]
# ## What goes wrong, and how one sees it
#
# The same model with a reward worth five times as much, tuned by a few steps: ink goes up, and so it would look like
# success. The weights of its paths say that it is far from the law that was asked for.

# %%
greedy = sc.ControlProblem(sde, reward=ink, alpha=0.2)
hasty = sc.solve(
    greedy, sc.RewardBackprop(), time_steps=30, iterations=max(2, iterations // 6), batch_size=64, seed=0,
    progress=False,
)  # fmt: skip
third = hasty.evaluate(n, seed=2)
print(third)

# %%
found = {
    "before": before,
    f"guided: {first.verdict}": guided.sample(n, seed=3),
    f"one network: {second.verdict}": tuned.sample(n, seed=3),
    f"alpha = 0.2: {third.verdict}": hasty.sample(n, seed=3),
}
figure, panels = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
for panel, (name, x) in zip(panels, found.items()):
    tiles = torch.nn.functional.pad(x[:25, 0].detach(), (1, 1, 1, 1), value=-1).reshape(5, 5, 10, 10)
    tiles = tiles.permute(0, 2, 1, 3).reshape(50, 50).numpy()
    panel.imshow(-tiles, cmap="gray", vmin=-1, vmax=1)
    panel.set_title(f"{name}\nink {ink(x).mean():.1f}", fontsize=9)
    panel.axis("off")

# %% [markdown]
# What to do about a verdict: [why "unreliable"?](../howto/runs.md#why-unreliable). The full demonstration, with the
# exactly tilted law beside it, is `sdecontrol demo`.
