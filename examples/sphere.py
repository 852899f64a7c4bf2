"""Steer Brownian motion on the sphere to a mixture of von Mises-Fisher distributions, with the exact answer beside it.

The reward is the mixture's log density, so that the end has the law of Brownian motion times the mixture. psi is known
as a series in spherical harmonics, in continuous time and on the chain.

python examples/sphere.py [--quick]
"""

import argparse
import math

import torch

import sdecontrol as sc

CENTRES = torch.tensor([[0.0, 0.0, 1.0], [0.8, -0.6, 0.0], [-0.6, -0.8, 0.0]])
CONCENTRATIONS = torch.tensor([5.0, 3.0, 4.0])
SHARES = torch.tensor([0.5, 0.3, 0.2])


def log_density(x: torch.Tensor) -> torch.Tensor:
    """Of the mixture, with respect to the area of the sphere."""
    kappa = CONCENTRATIONS.to(x)
    constant = kappa.log() - math.log(2 * math.pi) - kappa - torch.log1p(-torch.exp(-2 * kappa))
    return torch.logsumexp(kappa * (x @ CENTRES.to(x).mT) + constant + SHARES.to(x).log(), 1)


def shares(x: torch.Tensor) -> list[float]:
    """Of states nearest to each centre."""
    nearest = (x @ CENTRES.mT).argmax(1)
    return [round(float((nearest == j).float().mean()), 3) for j in range(len(CENTRES))]


def main(quick: bool = False) -> None:
    steps, iterations, n = (15, 30, 1024) if quick else (40, 100, 4096)
    sde = sc.ManifoldSDE(sc.Sphere(2), sigma=1.2)
    problem = sc.ControlProblem(sde, sc.Dirac(torch.tensor([0.0, 0.6, -0.8])), reward=log_density)
    exact = sc.exact_solution(problem)
    chain = sc.exact_solution(problem, time_steps=steps)
    print(f"log Z in continuous time  {float(exact.log_z):.4f}")
    print(f"log Z in {steps} steps         {float(chain.log_z):.4f}")

    solution = sc.solve(
        problem,
        sc.AdjointMatching(),
        time_steps=steps,
        iterations=iterations,
        batch_size=128,
        seed=0,
        progress=False,
    )
    print(solution.evaluate(n, seed=1))
    print(f"control error: {sc.control_error(solution, chain, n=n)}")
    left = sc.simulate(problem, n, time_steps=steps, seed=3, keep="end").end
    for name, x in (("left alone", left), ("steered", solution.sample(n, seed=3)), ("exact", chain.sample(n, seed=3))):
        print(f"nearest to each centre, {name:<11}{shares(x)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps and iterations")
    main(parser.parse_args().quick)
