"""A convolutional model as users have it: diffusers' ``UNet2DModel``, trained on scikit-learn's digits, with DDPM's
own sampler; tilted to one class."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdecontrol as sc
from sdecontrol.cli.demo_run import FULL, demo_models
from sdecontrol.files.bundles import register_bundle
from sdecontrol.files.contents import load_tensors
from sdecontrol.library.cache import cache_folder, read_cached, write_cached
from sdecontrol.library.digits import DIGIT_SHAPE, digits

__all__ = ["ALPHA", "LABEL", "STEPS", "UNet", "alphas_cumprod", "classifier", "pool", "unet_problem"]

VERSION = 1
LABEL, ALPHA, STEPS = 3, 1.0, 20
LEVELS = 1000  # of DDPM, with betas linear from 1e-4 to 0.02
_ITERATIONS, _BATCH, _RATE = 2000, 128, 2e-3
_KIND, _POOL_KIND = register_bundle("digits U-Net"), register_bundle("digits U-Net pool")
_POOL, _POOL_SEED = 2**14, 77


class UNet(nn.Module):
    """``UNet2DModel`` of 177k parameters as ``model(x, n) -> noise``."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel  # type: ignore[import-not-found]
        except ImportError as error:
            raise ImportError("the U-Net is diffusers'; pip install 'sdecontrol[diffusers]'.") from error
        self.unet = UNet2DModel(
            sample_size=DIGIT_SHAPE[-1],
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=8,
        )

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        return self.unet(x, n).sample


def alphas_cumprod() -> Tensor:
    """``(1000,)``, DDPM's."""
    return (1 - torch.linspace(1e-4, 0.02, LEVELS, dtype=torch.float64)).cumprod(0).float()


def _trained() -> nn.Module:
    """Denoising of the noise at random levels; Adam with a rate that falls to zero, and the average of late weights."""
    torch.manual_seed(0)
    model, images, abar = UNet(), digits()[0], alphas_cumprod()
    mean = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.Adam(model.parameters(), _RATE)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _ITERATIONS)
    for _ in range(_ITERATIONS):
        x, n = images[torch.randint(len(images), (_BATCH,))], torch.randint(LEVELS, (_BATCH,))
        noise, a = torch.randn_like(x), abar[n].reshape(-1, 1, 1, 1)
        loss = F.mse_loss(model(a.sqrt() * x + (1 - a).sqrt() * noise, n), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        mean.update_parameters(model)
    return mean.module.eval()


@cache
def _model() -> nn.Module:
    name = f"digits-unet-{VERSION}-{_ITERATIONS}"
    found = read_cached(name, _KIND)
    model: nn.Module = UNet().eval()
    if found is None:
        model = _trained()
        write_cached(name, _KIND, dict(model.state_dict()), {})
    else:
        load_tensors(model, found[0], cache_folder() / name)
    return model


@cache
def classifier() -> nn.Module:
    """The oracle: the demo's."""
    return demo_models(0, FULL).classifier


def unet_problem(steps: int = STEPS, alpha: float = ALPHA) -> sc.ControlProblem:
    """``log p(3 | x)`` of the classifier as reward; DDPM's sampler, its levels evenly spaced, predictions clipped to
    [-1, 1]. Trains the model (230 CPU-seconds) where it is not in the cache."""
    chain = sc.diffusion_chain(
        _model(), alphas_cumprod(), prediction="noise", shape=DIGIT_SHAPE, sampler="ddpm", steps=steps, clip=1.0
    )
    reward: Any = sc.LogProb(classifier(), LABEL)
    return sc.ControlProblem(chain, reward=reward, alpha=alpha)


@cache
def pool() -> Tensor:
    """``(16384, 1, 8, 8)`` samples of the untuned chain."""
    name = f"digits-unet-pool-{VERSION}-{_ITERATIONS}-{_POOL}-{STEPS}"
    found = read_cached(name, _POOL_KIND)
    if found is not None:
        return found[0]["samples"]
    samples = sc.simulate(unet_problem(), _POOL, seed=_POOL_SEED, keep="end").samples
    write_cached(name, _POOL_KIND, {"samples": samples}, {})
    return samples
