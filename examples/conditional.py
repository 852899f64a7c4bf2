"""One control for all observations: sample p(x | y) of a Gaussian mixture for any y, and compare with the exact
posteriors.

python examples/conditional.py [--quick]
"""

import argparse

import torch

import sdecontrol as sc

WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
MEANS = torch.tensor([[-2.0, 0.0], [2.0, 1.0], [1.0, -2.0]])
VARIANCE = 0.3  # of each component, in each direction
NOISE = 0.5  # of the observation y = x_1 + noise


def posterior(y: float) -> sc.GaussianMixture:
    """``p(x | y)``: every component by Bayes' formula for Gaussians, reweighted by how well it explains y."""
    gain = VARIANCE / (VARIANCE + NOISE**2)
    means = MEANS + torch.tensor([gain, 0.0]) * (y - MEANS[:, :1])
    covariances = torch.diag(torch.tensor([VARIANCE * (1 - gain), VARIANCE])).expand(3, 2, 2)
    evidence = torch.distributions.Normal(MEANS[:, 0], (VARIANCE + NOISE**2) ** 0.5).log_prob(torch.tensor(y))
    return sc.GaussianMixture((WEIGHTS.log() + evidence).softmax(0), means, covariances)


def log_likelihood(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The reward ``log p(y | x)``: with alpha = 1 the target is the posterior."""
    return torch.distributions.Normal(x[:, 0], NOISE).log_prob(y)


def main(quick: bool = False) -> None:
    prior = sc.GaussianMixture(WEIGHTS, MEANS, VARIANCE * torch.eye(2).expand(3, 2, 2))
    generator = torch.Generator().manual_seed(0)
    component = torch.multinomial(WEIGHTS, 4096, replacement=True, generator=generator)
    observed = MEANS[component, 0] + (VARIANCE + NOISE**2) ** 0.5 * torch.randn(4096, generator=generator)

    # y is drawn from its own law, and given to the reward and the control beside x
    problem = sc.ControlProblem(sc.generative_sde(prior, sc.VP()), reward=log_likelihood, condition=observed, alpha=1.0)
    solution = sc.solve(problem, sc.LogVariance(), time_steps=50, iterations=10 if quick else 400, seed=0)
    n = 512 if quick else 4096
    elbo = solution.evaluate(n, seed=1).elbo
    evidence = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(WEIGHTS),
        torch.distributions.Normal(MEANS[:, 0], (VARIANCE + NOISE**2) ** 0.5),
    )
    print(f"mean of log Z(y) = log p(y): {float(evidence.log_prob(observed).mean()):.3f}; the control's ELBO {elbo}")

    untuned = sc.simulate(problem, n, time_steps=50, seed=2, keep="end").samples
    print("sliced W1 to the exact posterior    untuned   control   two exact samples")
    for y in (-2.0, 0.0, 1.5):
        torch.manual_seed(3)
        exact, again = posterior(y).sample((n,)), posterior(y).sample((n,))
        tuned = solution.sample(n, seed=4, condition=y)
        distances = (sc.metrics.sliced_wasserstein(x, exact) for x in (untuned, tuned, again))
        print(f"  y = {y:<31g}" + "".join(f"{d:10.3f}" for d in distances))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few iterations and samples only")
    main(parser.parse_args().quick)
