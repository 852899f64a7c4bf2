"""Tune low-rank adapters of a bfloat16 U-Net by two rewards, one of them a function of PIL images, and take them back.

pip install 'sdecontrol[diffusers,examples]'
python examples/lora.py [--quick]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers_model import boldness, trained
from peft import PeftModel
from PIL import ImageOps

import sdecontrol as sc


def symmetry(image: Any) -> float:
    """Of one PIL image: minus its mean distance from its mirror image, of 255 grey levels, in tens."""
    levels, mirrored = (np.asarray(one, dtype=float) for one in (image, ImageOps.mirror(image)))
    return -np.abs(levels - mirrored).mean() / 10


def main(quick: bool = False) -> None:
    scheduler = DDPMScheduler(timestep_spacing="leading")
    unet = trained(scheduler, 20 if quick else 800).bfloat16()
    size = sum(p.numel() * p.element_size() for p in unet.parameters())

    reward = sc.WeightedRewards(
        {
            "bold": boldness,
            "symmetric": (0.5, sc.BlackBox(symmetry, inputs="pil", per_sample=True, workers=2)),
        }
    )
    reference = sc.from_diffusers(unet, scheduler, steps=5 if quick else 20, lora=sc.LoRA(4))
    problem = sc.ControlProblem(reference, reward=reward, alpha=1.0, start="fixed")
    run: Any = {"iterations": 2, "batch_size": 16} if quick else {"iterations": 30, "batch_size": 64}
    solution = sc.solve(problem, sc.SoftPPO(), control="tuned", seed=0, **run)
    first, last = solution.history[0], solution.history[-1]
    for name in reward.names:
        print(f"{name}: {first[f'reward/{name}']:.2f} in the first iteration, {last[f'reward/{name}']:.2f} in the last")
    print(solution.evaluate(64 if quick else 2048, seed=1, confirm=False))

    with tempfile.TemporaryDirectory() as folder:
        solution.save_pretrained(folder)  # PEFT's own format: the adapters alone
        saved = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        model: Any = PeftModel.from_pretrained(unet, folder)
    print(f"the network has {size / 1e3:.0f} kB, its adapters {saved / 1e3:.0f} kB")
    x, n = torch.randn(4, 1, 8, 8, generator=torch.manual_seed(2)), torch.full((4,), 500)
    control: Any = solution.control
    with torch.no_grad():
        theirs, ours = model(x.bfloat16(), n).sample.float(), control.predicted(x, n)
    print(f"PEFT's model differs from the tuned one by {float((theirs - ours).abs().max()):.2g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few iterations and samples only")
    main(parser.parse_args().quick)
