"""Keep an epidemic small: an SIR model steered at the least cost in KL divergence, with the exact answer beside it.

States are numbered, and there are many of them; the rates are sparse, since a person is infected or recovers at a time.

python examples/jump_process.py [--quick]
"""

import argparse

import numpy as np
import torch
from scipy import sparse

import sdecontrol as sc


def sir_rates(people: int, infection: float, recovery: float) -> sparse.csr_array:
    """Rates between the states (S, I), numbered ``S (people + 1) + I``: S -> S - 1, I -> I + 1 at the rate
    ``infection S I / people``, and I -> I - 1 at ``recovery I``."""
    s, i = np.meshgrid(np.arange(people + 1), np.arange(people + 1), indexing="ij")
    real = (s + i <= people).ravel()
    s, i = s.ravel(), i.ravel()
    state = s * (people + 1) + i
    infected, recovered = real * infection * s * i / people, real * recovery * i
    size = (people + 1) ** 2
    rows, columns, rates = [], [], []
    for rate, move in ((infected, -people), (recovered, -1)):
        some = rate > 0
        rows.append(state[some])
        columns.append(state[some] + move)
        rates.append(rate[some])
    jumps = sparse.csr_array((np.concatenate(rates), (np.concatenate(rows), np.concatenate(columns))), (size, size))
    return sparse.csr_array(jumps - sparse.diags_array(jumps.sum(1)))


def main(quick: bool = False) -> None:
    people, ill = (12, 2) if quick else (40, 3)
    process = sc.JumpProcess(
        sir_rates(people, infection=2.0, recovery=1.0), horizon=2.0, initial=(people - ill) * (people + 1) + ill
    )

    def infected(x: torch.Tensor) -> torch.Tensor:
        return (x[:, 0] % (people + 1)).to(process.dtype)

    # a cost for each person who is ill, as long as they are, and once more at the end
    problem = sc.ControlProblem(
        process, reward=lambda x: -0.2 * infected(x), running_cost=lambda x, t: 0.2 * infected(x), alpha=1.0
    )
    exact = sc.exact_solution(problem)  # in continuous time
    print(f"{process.values} states, {problem.control_shape[-1]} moves: infection, recovery, nothing")
    print(f"log Z in continuous time  {float(exact.log_z):.4f}")

    steps = 160 if quick else 400
    chain = sc.exact_solution(problem, time_steps=steps)
    print(f"log Z in {steps} steps        {float(chain.log_z):.4f}")
    found = sc.solve(problem, sc.SMC(num_particles=256), time_steps=steps, seed=0, progress=False)
    print(f"log Z by particles        {found.evaluate(1024, seed=1).log_z}")

    for name, control in (("left alone", None), ("steered", exact.control)):
        paths = sc.simulate(problem, 512 if quick else 2048, control, time_steps=steps, seed=2, keep="end")
        print(f"ill at the end, {name:<11}{float(infected(paths.end).mean()):.2f}   KL {float(paths.kl().mean()):.3f}")

    x = torch.tensor([[(people - ill) * (people + 1) + ill]])
    infection, recovery, _ = exact.control(x, 0.0)[0, 0].exp().tolist()  # in the order of process.moves
    print(f"rates at the start, times  {infection:.3f} (infection), {recovery:.3f} (recovery)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small population")
    main(parser.parse_args().quick)
