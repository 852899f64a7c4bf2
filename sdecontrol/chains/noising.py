"""The noising process as a bridge: of generative references that forget their start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..shapes import NoisePaths, Noises, PerStep, StatePaths, States
from ..tensors import event_sum
from .base import Chain


class GaussianBridge:
    """What the bridges of Gaussian kernels share. ``steps`` are those whose states are given; None: all."""

    def noise_given_end(
        self, states: StatePaths, end: States, condition: Any = None, steps: Sequence[int] | None = None
    ) -> NoisePaths:
        """``E[xi_k | x_k, x_K]``."""
        raise NotImplementedError

    def misfit(
        self,
        c: NoisePaths,
        states: StatePaths,
        end: States,
        condition: Any = None,
        steps: Sequence[int] | None = None,
    ) -> PerStep:
        """``|c_k - E[xi_k | x_k, x_K]|^2/2`` of shifts c: minimal in the mean at the optimum."""
        return event_sum(0.5 * (c - self.noise_given_end(states, end, condition, steps)) ** 2, c.ndim - 2)


def at_steps(rows: Tensor, steps: Sequence[int] | None) -> Tensor:
    """Of one row a step those of these steps; None: all."""
    return rows if steps is None else rows[list(steps)]


class NoisingBridge(GaussianBridge):
    """The bridge of a generative reference that forgets its start, whatever that was: the noising process from its end,
    ``x_k = m_k x_K + s_k eps``.

    That is the reference's own where the model's score is exact, in continuous time (on the chain up to O(h)); for
    another model what it gives has a mean that is not zero under the reference, see ``methods/forward_process.py``. For
    a ``generative_sde`` ``E[xi_k | x_k, x_K]`` is ``-gain_k g (eps - eps^(x_k))/std``: what the score of the noising
    kernel has beyond the model's own [26], [45]. For a discrete diffusion model it is
    ``(E[x_{k+1} | x_k, x_K] - mean_k(x_k))/scale_k`` with the Gaussian posterior of its noising (DDPM's).

    Raises:
        ValueError: another reference, a controlled start, or another noise level than that of the reversal (for a
            discrete model, another eta than 1), under which state and end have another joint law.
    """

    def __init__(self, chain: Chain) -> None:
        reference = chain.reference
        if chain.start or (reference.schedule is None and chain.noising_levels is None):
            raise ValueError(
                "the noising process is the bridge of a generative_sde or diffusion_chain without a controlled start."
            )
        if not reference.reversal:
            raise ValueError(
                "the noising process is the bridge of a generative_sde with noise_level='reverse' only, and of a "
                "diffusion_chain with eta=1: with another level state and end have another joint law."
            )
        self._chain, self._shape = chain, (-1, 1, *(1,) * chain.event_ndim)
        self._denoise = reference.denoiser_on_grid(chain.times)
        self._posterior: Tensor | None = None
        self._pairs: Tensor | None = None
        if chain.noising_levels is not None:
            self._discrete(*chain.noising_levels)
            return
        c = reference.coefficients(chain.times[:-1])
        self._mu, self._std, self._levels = self._rows(c.mu), self._rows(c.std), (c.mu, c.std)
        gains = torch.tensor([float(chain.gain(k)) for k in range(chain.steps)], dtype=torch.float64)
        self._units = gains * c.level  # the mean noise over the score of the noising kernel
        self._of_end = self._rows(self._units * c.mu / c.std**2)

    def _rows(self, values: Tensor) -> Tensor:
        return values.to(self._chain.times).reshape(self._shape)

    def _discrete(self, mu: Tensor, std: Tensor) -> None:
        """From ``mu`` and ``std`` of all K + 1 levels, float64: to x_K, which is a little noisy itself, and the mean of
        x_{k+1} given x_k and x_K as a sum of both."""
        m, var = mu / mu[-1], std**2 - (mu / mu[-1] * std[-1]) ** 2  # of x_k given x_K
        a = mu[:-1] / mu[1:]  # of x_k given x_{k+1}, with variance own
        own = std[:-1] ** 2 - (a * std[1:]) ** 2
        of_end, of_state = m[1:] * own / var[:-1], a * var[1:] / var[:-1]
        self._mu, self._std = self._rows(m[:-1]), self._rows(var[:-1].sqrt())
        self._posterior = torch.stack((self._rows(of_end), self._rows(of_state)))
        self._levels, self._units = (mu, std), std[:-1] / (std[1:] * own.sqrt())  # the mean noise over that of x_{k+1}
        self._of_end = self._rows(of_end * self._units)

    def between(self, start: States, end: States, noise: StatePaths, steps: Sequence[int] | None = None) -> StatePaths:
        """States of all steps (or of these) given the end, each of its own law; the start is forgotten."""
        return at_steps(self._mu, steps) * end + at_steps(self._std, steps) * noise

    def path_given_end(
        self, start: States, end: States, noise: NoisePaths, steps: Sequence[int] | None = None
    ) -> StatePaths:
        """The same of one path each, noised from step to step; ``steps`` in rising order."""
        mu, std = at_steps(self._mu, steps), at_steps(self._std, steps)
        x, states = mu[-1] * end + std[-1] * noise[-1], []
        states.append(x)
        for k in range(len(mu) - 2, -1, -1):
            a = mu[k] / mu[k + 1]
            x = a * x + (std[k] ** 2 - (a * std[k + 1]) ** 2).clamp(min=0.0).sqrt() * noise[k]
            states.append(x)
        return torch.stack(states[::-1])

    def noise_given_later(
        self,
        states: StatePaths,
        end: States,
        noise: NoisePaths,
        values: PerStep,
        steps: Sequence[int] | None = None,
    ) -> NoisePaths:
        """``sum_{j > k} value_j E[xi_k | x_k, x_j]`` at all steps, or among these: what the noise of a step has to do
        with functions of later states.

        Given x_j the noising has ``x_k = a x_j + q eps``, so that the score of its kernel, ``a (x_j - x_k/a)/q^2``,
        stands where ``(mu x_K - x_k)/std^2`` does given the end.

        Args:
            states: of one path each, ``(steps, batch, *event)``. noise: :meth:`noise_given_end` of them. values:
                ``(steps, batch)``.
        """
        rows = list(range(self._chain.steps) if steps is None else steps)
        of_later, of_state = (v[rows][:, rows].to(states) for v in self._given_later())
        of_end = self._of_end if steps is None else self._of_end[rows]
        wide = (..., *(None,) * (states.ndim - 2))
        later = torch.einsum("kj,j...->k...", of_later, values[wide] * states)
        total = torch.ones_like(of_later).triu(1) @ values
        return later + (of_state @ values)[wide] * states + total[wide] * (noise - of_end * end)

    def _given_later(self) -> Tensor:
        """``(2, K, K)`` float64: what x_j and x_k are multiplied by in ``E[xi_k | x_k, x_j]``, j > k; of x_k what is
        more than given the end."""
        pairs = self._pairs
        if pairs is None:
            (mu, std), K = self._levels, self._chain.steps
            k, j = torch.triu_indices(K, K, 1)
            variance = lambda i, j: std[i] ** 2 - (mu[i] / mu[j] * std[j]) ** 2  # noqa: E731  of x_i given x_j
            if self._posterior is None:
                later = mu[k] / mu[j] / variance(k, j)
                state = 1 / std[k] ** 2 - 1 / variance(k, j)
            else:
                next, last = k + 1, torch.full_like(k, K)
                later = mu[next] / mu[j] * variance(k, next) / variance(k, j)
                given = lambda j: mu[k] / mu[next] * variance(next, j) / variance(k, j)  # noqa: E731
                state = given(j) - given(last)
            pairs = self._pairs = std.new_zeros(2, K, K)
            pairs[:, k, j] = self._units[k] * torch.stack((later, state))
        return pairs

    @torch.no_grad()
    def noise_given_slope(
        self, states: StatePaths, slope: States, condition: Any = None, steps: Sequence[int] | None = None
    ) -> NoisePaths:
        """The noise whose mean given x_k is that of a tilt ``N(0, I) exp(h)`` of ``x_K``, from ``slope = grad h(x_K)``,
        at all steps, or at these: ``E[xi_k | x_k, x_K]`` with ``(m x_k + s^2 slope)/(m^2 + s^2)`` for x_K, since the
        score of the tilt, noised, is ``-x_k/(m^2 + s^2) + m E[slope | x_k]/(m^2 + s^2)``."""
        every = range(self._chain.steps) if steps is None else steps
        mu, var = self._mu, self._std**2
        means = ((mu[k] * x + var[k] * slope) / (mu[k] ** 2 + var[k]) for k, x in zip(every, states.unbind(0)))
        return torch.stack([self.noise_at(k, x, m, condition) for k, x, m in zip(every, states.unbind(0), means)])

    def noise_of_slope(self, slope: States, steps: Sequence[int] | None = None) -> NoisePaths:
        """By how much a slope moves :meth:`noise_given_slope`."""
        var = self._std**2
        return at_steps(self._of_end * var / (self._mu**2 + var), steps) * slope

    @torch.no_grad()
    def end_score(self, end: States, condition: Any = None) -> States:
        """The model's score at x_K: exact for a mixture in its place; of a discrete model, whose x_K is a little noisy
        itself, its own; of a network under a ``generative_sde`` that at the level of the last step, since a prediction
        of noise says nothing where there is none."""
        mixture = self._chain.reference.mixture
        if mixture is not None:
            return mixture.score(end)
        if self._posterior is not None:
            mu, std = (float(v[-1]) for v in self._levels)
            return (mu * self._denoise(self._chain.steps, end, condition) - end) / std**2
        k = self._chain.steps - 1
        return (self._mu[k] * self._denoise(k, end, condition) - end) / self._std[k] ** 2

    @torch.no_grad()
    def noise_given_end(
        self, states: StatePaths, end: States, condition: Any = None, steps: Sequence[int] | None = None
    ) -> NoisePaths:
        every = range(self._chain.steps) if steps is None else steps
        return torch.stack([self.noise_at(k, x, end, condition) for k, x in zip(every, states.unbind(0))])

    def noise_at(self, k: int, x: States, end: States, condition: Any = None) -> Noises:
        """The same at one step."""
        if self._posterior is None:
            return self._of_end[k] * (end - self._denoise(k, x, condition))
        mean, scale = self._chain.kernel(k, x, condition)
        return (self._posterior[0, k] * end + self._posterior[1, k] * x - mean) / scale
