"""Tilt a Gaussian mixture, whose exact answer is known, and compare the tuned samples with it.

python examples/gaussian_mixture.py [--quick]
"""

import argparse

import torch

import sdecontrol as sc


def main(quick: bool = False) -> None:
    means = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    mixture = sc.GaussianMixture(torch.tensor([0.4, 0.4, 0.2]), means, 0.2 * torch.eye(2).expand(3, 2, 2))

    # the mixture in the model's place: its score is exact, and so is the tilted law
    sde = sc.generative_sde(mixture, sc.VP())
    problem = sc.ControlProblem(sde, reward=sc.Linear(torch.tensor([1.0, 0.5])), alpha=1.0)
    solution = sc.solve(problem, sc.RewardBackprop(), time_steps=50, iterations=10 if quick else 300, seed=0)
    n = 512 if quick else 4096
    evaluation = solution.evaluate(n, seed=1)
    print(evaluation)

    exact = sc.exact_solution(problem)
    target = exact.sample(n, seed=2)
    print(f"\nlog Z  exact {float(exact.log_z):.3f} in continuous time, estimated {evaluation.log_z} with 50 steps")
    untuned = sc.simulate(problem, n, time_steps=50, seed=3, keep="end").samples
    for name, x in (
        ("untuned", untuned),
        ("tuned", solution.sample(n, seed=3)),
        ("exact", exact.sample(n, seed=4)),
    ):
        print(f"sliced W1 to the exact tilt, {name:<8} {sc.metrics.sliced_wasserstein(x, target):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few iterations and samples only")
    main(parser.parse_args().quick)
