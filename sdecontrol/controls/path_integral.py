"""The path-integral control: at every step and state, an average over paths simulated from there to the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.masking import probabilities_of
from ..chains.shifts import ShiftFunction, shift_function
from ..errors import warn
from ..paths.integrator import integrate
from ..paths.weights import effective_fraction
from ..problems.problem import ControlProblem
from ..randomness import Place, generator_for
from ..shapes import Controls, Noises, States
from .base import Control
from .given import ZeroControl
from .saved import CONTROLS, Context, Saved

_ROWS = 8192  # simulated at once
_FEW = 10  # effective paths below which the average is not to be trusted


class _Draws:
    """Noise of the steps ``first, first+1, ...`` in that order, for ``used`` of ``rows`` paths: a function of the seed
    and the group of rows alone. All rows are drawn, so that the first ones do not depend on how many are used."""

    def __init__(self, seed: int, group: int, first: int, rows: int, used: int, chain: Chain, antithetic: bool) -> None:
        self.seed, self.group, self.first, self.used, self.antithetic = seed, group, first, used, antithetic
        self.shape = (rows // 2 if antithetic else rows, *chain.noise_shape)
        self.options: dict[str, Any] = {"dtype": chain.times.dtype, "device": chain.times.device}

    def __getitem__(self, k: int) -> Tensor:
        if k == self.first:
            self.generator = generator_for(
                self.options["device"], self.seed, Place.PATH_INTEGRAL, self.first, self.group
            )
        z = torch.randn(self.shape, generator=self.generator, **self.options)
        return (torch.stack((z, -z), 1).flatten(0, 1) if self.antithetic else z)[: self.used]


@CONTROLS.register("path-integral")
class PathIntegralControl(Control):
    """``c_k(x) = E[xi_k | x_k = x]`` under the target path law, estimated from ``num_paths`` paths of a proposal v.

    With ``w_i`` the self-normalised weights ``exp(R/alpha) dQ0/dP^v`` of the paths from x on::

        c_k(x) = c^v_k(x) + sum_i (w_i - b) xi_k^i,      b = 1/num_paths with the control variate, else 0

    (tutorial [32], with the constants of docs/mathematics.md sections 4 and 9). The limit of many paths is the mean
    shift of the chain's soft-optimal kernel; the error is of order 1/sqrt(num_paths), the bias of order 1/num_paths.

    It is a random control: its draws are a function of the seed, the step and the row of the batch, never of the noise
    of the paths that it drives. So the same call gives the same numbers, paths are independent of one another, and
    given the draws it is a control like any other, whose likelihood ratios and weights are exact.

    Attributes:
        ess: ``(K,)`` the effective fraction of the paths at each step, mean over the rows of the last use; nan where
            unused.
    """

    _options = ("num_paths", "antithetic", "control_variate", "seed")

    def __init__(
        self,
        problem: ControlProblem,
        chain: Chain,
        proposal: Control | None = None,
        *,
        num_paths: int = 256,
        antithetic: bool = False,
        control_variate: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(problem.event_shape, problem.control_shape, chain.clock[0], chain.clock[-1])
        self._problem, self._chain = problem, chain
        self.proposal = None if isinstance(proposal, ZeroControl) else proposal
        self.num_paths, self.antithetic, self.control_variate = num_paths, antithetic, control_variate
        self.seed = seed
        self.ess = torch.full((chain.steps,), float("nan"), dtype=torch.float64)
        self._warned = False

    @property
    def configuration(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in self._options}
        return {**options, "proposal": CONTROLS.describe(self.proposal)}

    @classmethod
    def from_saved(cls, saved: Saved, context: Context) -> PathIntegralControl:
        proposal = CONTROLS.make(saved["proposal"], context)
        return cls(context.problem, context.chain, proposal, **{name: saved[name] for name in cls._options})

    def at(self, x: States, t: Tensor, y: Any = None) -> Controls:
        """``u(x, t)``: t means the step of the chain that contains it."""
        chain = self._chain
        shift = self.on_chain(chain)
        steps = torch.tensor([chain.step_at(float(time)) for time in t.reshape(-1)]).expand(x.shape[0])
        out = chain.times.new_empty((x.shape[0], *self.control_shape))  # x may be tokens
        for k in steps.unique().tolist():
            rows = (steps == k).nonzero().flatten().to(x.device)
            out[rows] = chain.control(k, shift(k, x[rows], None if y is None else y[rows])).to(out)
        return out

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        ahead = None if self.proposal is None else shift_function(chain, self.proposal)
        self._warned = False  # once in every use
        if len(self.ess) != chain.steps:
            self.ess = torch.full((chain.steps,), float("nan"), dtype=torch.float64)

        @torch.no_grad()
        def shift(k: int, x: States, y: Any) -> Noises:
            size = max(1, _ROWS // self.num_paths)
            parts, effective = [], 0.0
            for index, low in enumerate(range(0, len(x), size)):
                part = x[low : low + size]
                y_part = None if y is None else y[low : low + size]
                n = self.num_paths
                noise = _Draws(self.seed, index, k, size * n, len(part) * n, chain, self.antithetic)
                c, ess = self._average(chain, k, part, y_part, noise, ahead)
                parts.append(c)
                effective += float(ess.sum())
            self.ess[k] = effective / len(x)
            few = effective / len(x) * self.num_paths
            if few < _FEW <= self.num_paths and not self._warned:
                self._warned = True
                warn(
                    f"path-integral guidance has {few:.1f} effective of {self.num_paths} paths at step {k} (t = "
                    f"{chain.clock[k]:.3g}): its control is noisy and biased there. Use more num_paths, or paths of a "
                    "better control: PathIntegralGuidance(proposal=...). control.ess has the fraction at every step.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            return torch.cat(parts)

        return shift

    def _average(
        self, chain: Chain, k: int, x: Tensor, y: Any, noise: _Draws, ahead: ShiftFunction | None
    ) -> tuple[Tensor, Tensor]:
        """The shift at states x, and the effective fraction of the paths there."""
        problem, n = self._problem, self.num_paths
        paths = integrate(
            chain,
            x.repeat_interleave(n, 0),
            noise,
            ahead,
            condition=None if y is None else y.repeat_interleave(n, 0),
            running_cost=problem.running_cost_or_none,
            keep="end" if chain.of_noise or chain.reference.keeps_tokens else "states",
            steps=range(k, chain.steps),
        ).towards(problem)
        weights = paths.log_weights().unflatten(0, (-1, n)).softmax(1)
        if not chain.of_noise:
            xi = noise[k].unsqueeze(0)
            drawn = lambda: chain.draws(xi, xi, paths.states[1:2], paths.states[:1])[0]  # noqa: E731
            seen = paths.end if chain.reference.keeps_tokens else drawn()
            return self._kernel(chain, k, x, y, seen.unflatten(0, (-1, n)), weights), effective_fraction(weights, 1)
        centred = weights - 1 / n if self.control_variate else weights
        c = chain.tangent(x, torch.einsum("bn,bn...->b...", centred, noise[k].unflatten(0, (-1, n))))
        if ahead is not None:
            c = c + ahead(k, x, y)
        return c, effective_fraction(weights, 1)

    def _kernel(self, chain: Any, k: int, x: Tensor, y: Any, seen: Tensor, weights: Tensor) -> Tensor:
        """The shift to the weighted frequencies of tokens ``seen (batch, n, *shape)``; so that what no path has seen
        may still be, the reference counts as one path."""
        letters = chain.letters(k, x, y).exp()
        number = (1 / weights.square().sum(1)).reshape(-1, *(1,) * (letters.ndim - 1))
        found = (number * probabilities_of(seen, weights, letters.shape[-1]) + letters) / (number + 1)
        return chain.shift_at(k, x, torch.where(letters > 0, found / letters, 1.0).log(), y)
