"""One script for one process or several: tune a model with each of them doing a part of the work.

torchrun --nproc-per-node=2 examples/torchrun.py [--quick]
python examples/torchrun.py [--quick]                       # the same numbers, to rounding
"""

import argparse
import os

import torch

import sdecontrol as sc


class Model(torch.nn.Module):
    """A diffusion model's noise prediction; yours is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))

    def forward(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return 0.1 * self.net(torch.cat([x, s[:, None]], 1)) + x


def main(quick: bool = False) -> None:
    torch.manual_seed(0)  # the weights of all processes are the same; solve gives all of them the first one's
    sde = sc.generative_sde(Model(), schedule=sc.VP(), prediction="noise", shape=(2,))
    problem = sc.ControlProblem(sde, reward=lambda x: -(x - 1).square().sum(1), alpha=0.5)
    solution = sc.solve(
        problem,
        sc.RewardBackprop(),
        time_steps=20,
        iterations=5 if quick else 200,
        batch_size=256,  # of all processes together: a multiple of 64 times their number
        seed=0,
    )
    evaluation = solution.evaluate(512 if quick else 4096, seed=1)  # every process gets the whole result ...
    if int(os.environ.get("RANK", "0")) == 0:  # ... and one is enough to print it
        print(evaluation)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few iterations only")
    main(parser.parse_args().quick)
