"""Steer a linear stochastic system to high reward at low effort, with the exact solution beside it.

python examples/control_problem.py [--quick]
"""

import argparse

import torch

import sdecontrol as sc


def main(quick: bool = False) -> None:
    # dX = -X dt + dW; reward -|x|^2/2 + 1'x at the end, a running cost on the way, temperature 0.5
    sde = sc.LinearSDE(A=-torch.eye(2), sigma=torch.eye(2), horizon=1.0)
    problem = sc.ControlProblem(
        sde,
        initial=sc.Dirac(torch.zeros(2)),
        reward=sc.Quadratic(G=torch.eye(2), g=torch.ones(2)),
        running_cost=sc.QuadraticCost(F=0.1 * torch.eye(2)),
        alpha=0.5,
    )
    solution = sc.solve(problem, sc.AdjointMatching(), time_steps=50, iterations=20 if quick else 100, seed=0)
    print(solution.evaluate(512 if quick else 4096, seed=1))

    exact = sc.exact_solution(problem, like=solution)  # of the same 50 steps
    print(f"\nexact log Z    {float(exact.log_z):.4f}")
    print(f"control error  {sc.control_error(solution, exact)}")

    x = torch.zeros(1, 2)
    print(f"u(0, 0)        learned {solution.control(x, 0.0)[0].tolist()}, exact {exact.control(x, 0.0)[0].tolist()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few iterations only")
    main(parser.parse_args().quick)
