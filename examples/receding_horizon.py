"""Swing up a pendulum of gymnasium, whose largest torque does not lift it, by planning again at every step.

pip install 'sdecontrol[examples]'
python examples/receding_horizon.py [--quick]
"""

import argparse
import math

import gymnasium
import torch

import sdecontrol as sc

STEPS, LIMIT, EXPLORE = 25, 2.0, 2.0  # of a plan; of the torque; the torque's exploring noise


def model(x: torch.Tensor, w: torch.Tensor, k: int) -> torch.Tensor:
    """The environment's equations, for many states (angle, speed) at once; w is standard normal without control."""
    torque = (EXPLORE * w[:, 0]).clamp(-LIMIT, LIMIT)
    speed = (x[:, 1] + 0.05 * (15.0 * x[:, 0].sin() + 3.0 * torque)).clamp(-8.0, 8.0)
    return torch.stack([x[:, 0] + 0.05 * speed, speed], dim=1)


def cost(x: torch.Tensor, t: torch.Tensor | float = 0.0) -> torch.Tensor:
    return 10.0 * (1.0 - x[:, 0].cos()) + 0.1 * x[:, 1] ** 2


def main(quick: bool = False) -> None:
    chain = sc.discrete_dynamics(model, steps=STEPS, dim=2, noises=1)
    hanging = sc.Dirac(torch.tensor([math.pi, 0.0]))
    problem = sc.ControlProblem(chain, hanging, reward=lambda x: -cost(x), running_cost=cost, alpha=1.0)
    method = sc.PathIntegralGuidance(num_paths=128 if quick else 512)
    bound = LIMIT / EXPLORE
    planner = sc.RecedingHorizon(problem, method, bounds=(-bound, bound), seed=0)

    plant = gymnasium.make("Pendulum-v1")
    seen, _ = plant.reset(seed=0)
    collected = 0.0
    for k in range(100 if quick else 200):
        x = torch.tensor([[math.atan2(seen[1], seen[0]), float(seen[2])]])
        u = planner.act(x, float(k))
        seen, reward, *_ = plant.step((EXPLORE * u[0]).numpy())
        collected += float(reward)
        if k % 20 == 0:
            assert planner.log_z is not None
            torque, log_z = EXPLORE * float(u), float(planner.log_z)
            print(f"step {k:3d}  height {seen[0]:+.2f}  torque {torque:+.2f}  log Z {log_z:8.2f}")
    print(f"\nreward collected {collected:.1f}, height at the end {seen[0]:+.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer paths and steps")
    main(parser.parse_args().quick)
