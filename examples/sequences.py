"""Fit a masked diffusion model to sequences, tilt it towards a motif, and compare with what is known of the law.

python examples/sequences.py [--quick]
"""

import argparse

import torch

import sdecontrol as sc

LENGTH, LETTERS = 12, 4
MOVE = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7], [0.25, 0.25, 0.25, 0.25]])
MOTIF = torch.tensor([2, 3, 0])


def chains(n: int, seed: int) -> torch.Tensor:
    """Sequences of a Markov chain on four letters, ``(n, 12)`` int64."""
    generator = torch.Generator().manual_seed(seed)
    letters = [torch.randint(LETTERS, (n,), generator=generator)]
    for _ in range(LENGTH - 1):
        letters.append(torch.multinomial(MOVE[letters[-1]], 1, generator=generator)[:, 0])
    return torch.stack(letters, 1)


def motifs(x: torch.Tensor) -> torch.Tensor:
    """How often the motif occurs: the reward, a black box."""
    return (x.unfold(1, 3, 1) == MOTIF).all(2).sum(1).float()


def main(quick: bool = False) -> None:
    data = chains(4096, seed=0)
    model = sc.fit_masked_diffusion(data, LETTERS, iterations=30 if quick else 1000, batch_size=64, seed=0)
    chain = sc.masked_diffusion(model, length=LENGTH, vocabulary=LETTERS, order="random")
    problem = sc.ControlProblem(chain, reward=motifs, alpha=0.5)

    # nothing trained: particles of the model, judged by what it expects of the masked letters
    n = 128 if quick else 1024
    print(sc.solve(problem, sc.SMC(num_particles=64, twist="tweedie"), seed=0).evaluate(n, seed=1, confirm=False))

    # a copy of the model, tuned; or the model as it is, and a small network beside it
    for control in ("tuned", "frozen"):
        iterations = 4 if quick else 150
        solution = sc.solve(problem, sc.LogVariance(), control=control, iterations=iterations, batch_size=64, seed=0)
        found = solution.evaluate(n, seed=1, confirm=False)
        print(f"{control}: log Z {found.log_z}, gap {found.gap}, motifs a sequence {found.reward}")

    exact = chains(1 << 16, seed=1)  # the data's own law, reweighted
    weights = (motifs(exact) / problem.alpha).softmax(0)
    print(f"of the data's law: log Z {float((motifs(exact) / problem.alpha).exp().mean().log()):.3f}, tilted ", end="")
    print(f"{float(weights @ motifs(exact)):.3f} motifs a sequence, untilted {float(motifs(exact).mean()):.3f}")
    tuned = solution.model  # (tokens, s) -> logits, as the model: any sampler of masked diffusion takes it
    print("logits of the tuned model:", tuple(tuned(data[:2], torch.tensor([0.5, 0.5])).shape))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few iterations and samples only")
    main(parser.parse_args().quick)
