"""Train a small U-Net of diffusers on handwritten digits, tilt it to bold ones, and sample from a stock pipeline.

pip install 'sdecontrol[diffusers,examples]'
python examples/diffusers_model.py [--quick] [--lora]
"""

import argparse
import tempfile
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits

import sdecontrol as sc

STEPS = 20


def digits() -> torch.Tensor:
    """Handwritten digits, ``(1797, 1, 8, 8)`` in [-1, 1]."""
    data: Any = load_digits()
    return torch.tensor(data.images / 8 - 1, dtype=torch.float32).unsqueeze(1)


def trained(scheduler: Any, iterations: int) -> UNet2DModel:
    """A noise-prediction network, trained as diffusers' own examples train one."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    images, optimizer = digits(), torch.optim.AdamW(unet.parameters(), 2e-3)
    for _ in range(iterations):
        x, t = images[torch.randint(len(images), (64,))], torch.randint(1000, (64,))
        noise = torch.randn_like(x)
        loss = (unet(scheduler.add_noise(x, noise, t), t).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return unet.eval()


def boldness(x: torch.Tensor) -> torch.Tensor:
    """The reward, ``(batch, 1, 8, 8) -> (batch,)``: the mean of the pixels, in units that matter."""
    return 10 * x.flatten(1).mean(1)


def main(quick: bool = False, lora: bool = False) -> None:
    scheduler = DDPMScheduler(timestep_spacing="leading")
    unet = trained(scheduler, 20 if quick else 800)

    adapters = sc.LoRA(4) if lora else None
    reference = sc.from_diffusers(unet, scheduler, steps=STEPS, lora=adapters)  # everything else is read from it
    # a stock pipeline begins at untilted noise: no learned start
    problem = sc.ControlProblem(reference, reward=boldness, alpha=1.0, start="fixed")
    solution = sc.solve(
        problem, sc.RewardBackprop(), control="tuned", iterations=4 if quick else 40, batch_size=64, seed=0
    )
    print(solution.evaluate(256 if quick else 2048, seed=1, confirm=False))

    with tempfile.TemporaryDirectory() as folder:
        solution.save_pretrained(folder)  # diffusers' own format; of adapters, PEFT's
        pipeline: Any = solution.pipeline() if lora else DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(256, num_inference_steps=STEPS, output_type="np", generator=torch.manual_seed(2))[0]
    print(f"mean pixel of digits {float(digits().mean()):.3f}, of the stock pipeline's {images.mean() * 2 - 1:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few iterations and samples only")
    parser.add_argument("--lora", action="store_true", help="train low-rank adapters in place of a copy of the network")
    arguments = parser.parse_args()
    main(arguments.quick, arguments.lora)
