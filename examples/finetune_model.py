"""Train a small diffusion model on data, then fine-tune it towards a reward, staying close to it.

python examples/finetune_model.py [--quick]
"""

import argparse

import torch

import sdecontrol as sc


def moons(n: int) -> torch.Tensor:
    """Two half circles in the plane, ``(n, 2)``."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.pi * torch.rand(n, generator=generator)
    upper = torch.arange(n) % 2 == 0
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return 2 * torch.stack((x - 0.5, y - 0.25), 1) + 0.1 * torch.randn(n, 2, generator=generator)


def reward(x: torch.Tensor) -> torch.Tensor:
    """Prefer the right-hand side."""
    return x[:, 0]


def main(quick: bool = False) -> None:
    schedule = sc.VP()
    model = sc.fit_score(moons(4096), schedule, prediction="noise", iterations=50 if quick else 2000, seed=0)

    sde = sc.generative_sde(model, schedule, prediction="noise", shape=(2,))
    problem = sc.ControlProblem(sde, reward=reward, alpha=1.0)
    solution = sc.solve(
        problem, sc.RewardBackprop(), time_steps=20 if quick else 50, iterations=5 if quick else 100, seed=0
    )
    print(solution.evaluate(512 if quick else 2048, seed=1))

    before = sc.simulate(problem, 1000, time_steps=50, seed=2).samples
    after = solution.sample(1000, seed=2)
    print(f"\nmean of the first coordinate: {before[:, 0].mean():.2f} before, {after[:, 0].mean():.2f} after")
    tuned = solution.model  # an nn.Module like the one that went in
    print(f"tuned model: {type(tuned).__name__}, {sum(p.numel() for p in tuned.parameters())} parameters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny settings")
    main(parser.parse_args().quick)
