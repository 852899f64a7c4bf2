"""Design DNA of 8 bases whose activity must be measured, and hold what was found against the exact optimum.

pip install 'sdecontrol[bio]'
python examples/design.py [--quick]
"""

import argparse
import itertools

import torch

import sdecontrol as sc


def main(quick: bool = False) -> None:
    task = sc.library.sequence_task("dna-8mer")
    print(f"{task.card.definition}\nReal: {task.card.real}.\nMade: {task.card.made}.")

    # the activity is a laboratory's: asked for what is proposed, and for nothing else
    found = sc.design(
        sc.ControlProblem(task.reference, alpha=task.card.alpha),
        oracle=task.reward,
        rounds=2 if quick else 4,
        batch=32 if quick else 96,
        method=sc.LogVariance(),
        seed=0,
        fit={"iterations": 50 if quick else 500},
        train={"iterations": 4 if quick else 100, "batch_size": 64 if quick else 128},
    )
    print(found)
    print("best:", ", ".join(task.decode(found.best(3)[0])))

    # what no laboratory could say: all 65 536 sequences, so the exact optimum of the same temperature
    everything = torch.tensor(list(itertools.product(range(4), repeat=8)))
    log_p, r = task.log_likelihood(everything), task.reward(everything).double()
    log_q = log_p + r / task.card.alpha
    log_z = log_q.logsumexp(0)
    best = float((log_q - log_z).exp() @ r)
    assert found.solution is not None
    x = found.solution.sample(64 if quick else 1024, seed=1)
    print(
        f"log Z of the true activity {float(log_z):.3f}; mean activity: natural {float(log_p.exp() @ r):.2f}, ", end=""
    )
    print(f"tuned to the learned one {float(task.reward(x).mean()):.2f}, of the exact optimum {best:.2f}")
    print("drawn:", task.naturalness(x))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few iterations and samples only")
    main(parser.parse_args().quick)
