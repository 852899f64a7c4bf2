# %% [markdown]
# # A design loop for DNA
#
# A model of DNA is given, and an activity that only a laboratory can measure. In rounds: propose sequences, have them
# measured, learn, tune the model. The task `dna-8mer` plays the laboratory, and because there are only 65 536 sequences
# of 8 bases, the best that could be done is known. `pip install 'sdecontrol[bio]'`.

# %% tags=["parameters"] small={"rounds": 2, "batch": 16, "fit": 30, "train": 3, "n": 64}
rounds, batch = 4, 64
fit, train = 200, 60  # iterations of a regressor, of a tuning
n = 512

# %%
import itertools

import logomaker
import matplotlib.pyplot as plt
import pandas as pd
import torch

import sdecontrol as sc

task = sc.library.sequence_task("dna-8mer")
print(task.card.definition)
print("Real in it:", task.card.real)
print("Made up:", task.card.made)

# %% [markdown]
# ## The loop
#
# The problem has no reward: the oracle's is to be learned. Proposals come from the model tuned to the mean and one
# spread of an ensemble, so that what might be good is asked for.

# %%
found = sc.design(
    sc.ControlProblem(task.reference, alpha=1.0),
    oracle=task.reward,
    rounds=rounds,
    batch=batch,
    method=sc.LogVariance(),
    seed=0,
    fit={"iterations": fit},
    train={"iterations": train, "batch_size": 128},
)
print(found)
best, activities = found.best(5)
print("best measured:", ", ".join(f"{s} {v:.2f}" for s, v in zip(task.decode(best), activities)))

# %% [markdown]
# ## What was possible
#
# All sequences, their probability under the model and their activity: the exact law that was asked for. In the figure
# the designs show what was learned; the model's own sequences prefer no base at any one place, so their logo is empty.

# %%
everything = torch.tensor(list(itertools.product(range(4), repeat=8)))
log_p, r = task.log_likelihood(everything), task.reward(everything).double()
tilted = (log_p + r / 1.0).softmax(0)
x = found.solution.sample(n, seed=1)
print(f"mean activity: natural {float(log_p.exp() @ r):.2f}, designs {float(task.reward(x).mean()):.2f}, ", end="")
print(f"exact optimum {float(tilted @ r):.2f}, best of all {float(r.max()):.2f}")
print(task.naturalness(x))

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained")
table = found.table()
for name in ("mean", "best_tenth", "best"):
    left.plot(
        [row["round"] + 1 for row in table], [row[name] for row in table], marker="o", label=name.replace("_", " ")
    )
left.axhline(float(r.max()), color="grey", linestyle=":", label="best of all")
left.set(xlabel="round", ylabel="activity measured", xticks=range(1, rounds + 1))
left.legend(fontsize=8)

# how often each base stands at each place, as letters as tall as their information
ways = {"natural": task.natural(n, seed=2), "designs": x}
for panel, (name, sequences) in zip((middle, right), ways.items()):
    shares = pd.DataFrame(torch.nn.functional.one_hot(sequences, 4).double().mean(0).numpy(), columns=list("ACGT"))
    logomaker.Logo(logomaker.transform_matrix(shares, from_type="probability", to_type="information"), ax=panel)
    panel.set(title=name, xlabel="place", ylabel="bits", ylim=(0, 2))

# %% [markdown]
# More tasks, also on the command line (`sdecontrol design`): [Designing DNA and RNA](../design_study.md).
