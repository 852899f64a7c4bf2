# %% [markdown]
# # A model of diffusers, with LoRA
#
# A U-Net and its scheduler, as diffusers users have them; low-rank adapters of it are tuned to a reward, saved in
# PEFT's format, and used by a stock pipeline. `pip install 'sdecontrol[diffusers,examples]'`.

# %% tags=["parameters"] small={"pre_training": 5, "iterations": 2, "n": 64}
pre_training = 250  # iterations
iterations = 150
n = 512

# %%
import tempfile

import matplotlib.pyplot as plt
import torch
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits

import sdecontrol as sc

images = torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32).unsqueeze(1)
torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
scheduler = DDPMScheduler(timestep_spacing="leading")
optimiser = torch.optim.AdamW(unet.parameters(), 2e-3)
for _ in range(pre_training):  # as diffusers' own examples train; with a trained model in a folder, leave this out
    x, t = images[torch.randint(len(images), (64,))], torch.randint(1000, (64,))
    noise = torch.randn_like(x)
    loss = (unet(scheduler.add_noise(x, noise, t), t).sample - noise).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
unet.eval()

# %% [markdown]
# ## Three lines
#
# Steps, variances, clipping and the kind of prediction are read from the scheduler. `start="fixed"`: a stock pipeline
# begins at untilted noise.


# %%
def bold(x):  # images (batch, 1, 8, 8) in [-1, 1] -> (batch,)
    return 15 * x.flatten(1).mean(1)


reference = sc.from_diffusers(unet, scheduler, steps=10, lora=sc.LoRA(4))
problem = sc.ControlProblem(reference, reward=bold, alpha=0.5, start="fixed")
solution = sc.solve(
    problem,
    sc.RewardBackprop(),
    control="tuned",
    iterations=iterations,
    batch_size=64,
    learning_rate=1e-2,
    seed=0,
    progress=False,
)
trained = sum(p.numel() for p in solution.control.parameters() if p.requires_grad)
print(f"{trained} numbers are trained, of {sum(p.numel() for p in unet.parameters())}")
print(solution.evaluate(n, seed=1))

# %% [markdown]
# The KL says what the reward has cost: `alpha` reward points a nat. The gap and the verdict say whether this is the law
# that was asked for: particles agree on log Z, and half a nat is left to be gained.
#
# ## Back to diffusers

# %%
with tempfile.TemporaryDirectory() as folder:
    solution.save_pretrained(folder)  # adapters alone, PEFT's own format
    pipeline = solution.pipeline()
pipeline.set_progress_bar_config(disable=True)
after = pipeline(25, num_inference_steps=10, output_type="np", generator=torch.manual_seed(2)).images[..., 0]
before = sc.simulate(problem, 25, seed=2, keep="end").samples[:, 0].detach().numpy() / 2 + 0.5

# %%
figure, panels = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for panel, name, x in zip(panels, ("before", "tuned, by the stock pipeline"), (before, after)):
    panel.imshow(1 - x.reshape(5, 5, 8, 8).transpose(0, 2, 1, 3).reshape(40, 40), cmap="gray", vmin=0, vmax=1)
    panel.set_title(name, fontsize=9)
    panel.axis("off")
panels[2].plot([row["reward"] for row in solution.history], label="reward")
panels[2].plot([row["kl"] for row in solution.history], label="KL")
panels[2].set(xlabel="iteration")
panels[2].legend()

# %% [markdown]
# Rewards of PIL images, prompts, precision and memory: [Models of diffusers](../diffusers.md).
