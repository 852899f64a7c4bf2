"""The code of the README and of the site's first pages runs as written (with one iteration of training instead of
hundreds)."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from cases import slow_but
from torch import Tensor, nn

import sdecontrol as sc
from sdecontrol.methods import find_method

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/index.md",
    "docs/getting_started.md",
    "docs/control_problems.md",
    "docs/fine_tuning.md",
    "docs/diffusers.md",
    "docs/densities.md",
    "docs/sequences.md",
    "docs/unknown_rewards.md",
    "docs/design_study.md",
    "docs/which.md",
    "docs/howto/problems.md",
    "docs/howto/runs.md",
)
QUICK = ("docs/index.md", "docs/getting_started.md", "docs/control_problems.md", "docs/sequences.md")


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


class Model(nn.Module):
    """A pre-trained noise prediction, of sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return self.gain * s.reshape(-1, 1, 1, 1) * x


def of_diffusers() -> dict[str, object]:
    """What a user of diffusers has."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1}
    unet = UNet2DModel(block_out_channels=(8, 16), norm_num_groups=4, **blocks, **sizes)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D",) * 2}
    sizes |= {"block_out_channels": (8, 8), "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 6}
    texts = UNet2DConditionModel(**blocks, **sizes)
    scheduler = DDPMScheduler()
    DDPMPipeline(unet, scheduler).save_pretrained("model")

    def encode(prompts: list[str]) -> Tensor:
        return torch.tensor([[[len(text), text.count("a"), 1.0, 0.0, 0.0, 0.0]] for text in prompts])

    return {"text_unet": texts, "encode": encode}


@pytest.mark.parametrize("page", slow_but(PAGES, *QUICK))
def test_python_blocks(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # what a page writes
    solve = sc.solve

    @functools.wraps(solve)
    def short(problem, method, **kwargs):
        return solve(
            problem, method, **{**kwargs, **({"iterations": 1} if find_method(method).default_iterations else {})}
        )

    monkeypatch.setattr(sc, "solve", short)
    distill = sc.distill
    monkeypatch.setattr(sc, "distill", lambda solution, **kwargs: distill(solution, **{**kwargs, "iterations": 1}))
    names = {"model": Model(), "my_reward": lambda x: -x.square().flatten(1).sum(1), "torch": torch, "sc": sc}
    if page == "docs/diffusers.md":
        names |= of_diffusers()
    for block in blocks("python", page):
        exec(block, names)


def test_toml_block(tmp_path: Path) -> None:
    from sdecontrol.cli.problem_file import read_problem_file

    (block,) = blocks("toml", "docs/command_line.md")
    (tmp_path / "problem.toml").write_text(block)
    problem, settings = read_problem_file(tmp_path / "problem.toml")
    assert problem.alpha == 0.5 and settings == {"time_steps": 50, "iterations": 500}
