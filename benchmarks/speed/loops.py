"""What is timed: ``dX = (-X + u(X, t)) dt + dW`` under a network of two hidden tanh layers, simulated and
differentiated by the network alone, a bare loop, torchsde and this package.

Every forward-and-backward pass here differentiates the same cost, ``mean( |x_K|^2/2 + sum_k h_k |u_k|^2/2 )``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import sdecontrol as sc
from sdecontrol.controls.langevin_term import LangevinTerm
from sdecontrol.controls.network import Architecture, DefaultControl
from sdecontrol.methods.base import Run
from sdecontrol.paths.gradients import Objective, backpropagate

__all__ = ["SETTINGS", "Case", "Setting", "TimeNet", "make_problem"]


@dataclass(frozen=True)
class Setting:
    """State dimension, hidden width, steps, batch."""

    d: int
    hidden: int
    steps: int
    batch: int = 512

    @property
    def name(self) -> str:
        return f"d={self.d}, hidden={self.hidden}, K={self.steps}"


SETTINGS = (Setting(2, 64, 200), Setting(10, 128, 50), Setting(20, 256, 50))


class TimeNet(nn.Module):
    """A user's control: two hidden tanh layers on ``(x, t)``."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(d + 1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, d)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat((x, t.unsqueeze(1)), 1))


class _ForTorchsde(nn.Module):
    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, net: TimeNet, with_cost: bool) -> None:
        super().__init__()
        self.net, self.with_cost = net, with_cost

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        x = y[:, :-1] if self.with_cost else y
        u = self.net(x, t.expand(len(x)))
        return torch.cat((u - x, 0.5 * (u * u).sum(1, keepdim=True)), 1) if self.with_cost else u - x

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        one = torch.ones_like(y)
        if self.with_cost:
            one[:, -1] = 0
        return one


class _Drawn:
    """Brownian increments drawn as they are asked for: torchsde's loop without the cost of its Brownian interval."""

    levy_area_approximation = "none"

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype, self.device = shape, torch.float32, torch.device("cpu")

    def __call__(self, ta: Any, tb: Any, return_U: bool = False, return_A: bool = False) -> Tensor:
        return torch.randn(self.shape) * math.sqrt(float(tb) - float(ta))


def make_problem(d: int, running: bool = False) -> sc.ControlProblem:
    """``dX = (-X + u) dt + dW`` from 0, reward ``-|x|^2/2``, running cost ``|x|^2/10`` where asked for."""
    return sc.ControlProblem(
        sc.SDE(lambda x, t: -x, 1.0, dim=d),
        initial=sc.Dirac(torch.zeros(d)),
        reward=lambda x: -0.5 * (x * x).sum(1),
        running_cost=(lambda x, t: 0.1 * (x * x).sum(1)) if running else None,
    )


class Case:
    """One setting, with everything that is timed in it as methods without arguments."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        torch.manual_seed(0)
        self.net = TimeNet(setting.d, setting.hidden)
        self.x0 = torch.zeros(setting.batch, setting.d)
        self.times = torch.linspace(0, 1, setting.steps + 1)
        self.problem, self.costly = make_problem(setting.d), make_problem(setting.d, running=True)
        self.sde, self.costly_sde = _ForTorchsde(self.net, False), _ForTorchsde(self.net, True)

    @cached_property
    def default(self) -> DefaultControl:
        """The default network with the same hidden layers, without its Langevin term (which is timed apart)."""
        return self._default(False)

    @cached_property
    def langevin(self) -> DefaultControl:
        return self._default(True)

    def _default(self, langevin: bool) -> DefaultControl:
        d, hidden = self.setting.d, self.setting.hidden
        term = LangevinTerm.of(self.problem) if langevin else None
        return DefaultControl((d,), (d,), (0.0, 1.0), Architecture((hidden, hidden)), term=term)

    # ------------------------------------------------------------ forward

    @torch.no_grad()
    def network_alone(self) -> None:
        """The network once a step, and nothing else."""
        x, n = self.x0, self.setting.batch
        for t in self.times[:-1].unbind():
            self.net(x, t.expand(n))

    @torch.no_grad()
    def bare(self) -> Tensor:
        """The shortest loop that simulates: no log-ratios, no costs, nothing checked."""
        x, n, h = self.x0, self.setting.batch, 1 / self.setting.steps
        root = math.sqrt(h)
        for t in self.times[:-1].unbind():
            x = x + h * (self.net(x, t.expand(n)) - x) + root * torch.randn_like(x)
        return x

    @torch.no_grad()
    def torchsde(self) -> Tensor:
        return self._sdeint(self.sde, self.x0)

    @torch.no_grad()
    def torchsde_drawn(self) -> Tensor:
        """torchsde's Euler loop with increments drawn one by one, without its Brownian interval."""
        return self._sdeint(self.sde, self.x0, bm=_Drawn(tuple(self.x0.shape)))

    def ours(self) -> Tensor:
        """``simulate`` with log-ratios and a user's running cost."""
        return self._simulate(self.costly, self.net)

    def ours_without_cost(self) -> Tensor:
        return self._simulate(self.problem, self.net)

    def ours_keeping_all(self) -> Tensor:
        return self._simulate(self.costly, self.net, "all")

    def ours_default(self) -> Tensor:
        return self._simulate(self.costly, self.default)

    def _simulate(self, problem: sc.ControlProblem, control: Any, keep: str = "end") -> Tensor:
        s = self.setting
        paths = sc.simulate(problem, s.batch, control=control, time_steps=s.steps, seed=0, keep=keep)
        return paths.log_ratio() + paths.running_cost

    def _sdeint(self, sde: nn.Module, x0: Tensor, **options: Any) -> Tensor:
        import torchsde

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ends = self.times[[0, -1]]
            return torchsde.sdeint(sde, x0, ends, method="euler", dt=1 / self.setting.steps, **options)[-1]  # type: ignore[index]

    # ------------------------------------------------------------ forward and backward

    def bare_gradient(self) -> None:
        x, n, h = self.x0, self.setting.batch, 1 / self.setting.steps
        root, cost = math.sqrt(h), torch.zeros(n)
        for t in self.times[:-1].unbind():
            u = self.net(x, t.expand(n))
            cost = cost + 0.5 * h * (u * u).sum(1)
            x = x + h * (u - x) + root * torch.randn_like(x)
        self._backward((0.5 * (x * x).sum(1) + cost).mean())

    def torchsde_gradient(self) -> None:
        self._torchsde_gradient()

    def torchsde_drawn_gradient(self) -> None:
        self._torchsde_gradient(bm=_Drawn((self.setting.batch, self.setting.d + 1)))

    def _torchsde_gradient(self, **options: Any) -> None:
        end = self._sdeint(self.costly_sde, torch.cat((self.x0, self.x0[:, :1]), 1), **options)
        self._backward((0.5 * (end[:, :-1] ** 2).sum(1) + end[:, -1]).mean())

    def _backward(self, loss: Tensor) -> None:
        self.net.zero_grad()
        loss.backward()

    def gradient_of(self, control: nn.Module, mode: str = "full") -> Callable[[], None]:
        """The same gradient by this package; the control is the user's module or the default network."""
        s = self.setting
        chain = self.problem.chain(s.steps)
        run = Run(self.problem, chain, s.batch, 1, seed=0)
        parameters = list(control.parameters())
        objective = Objective(lambda x: 0.5 * (x * x).sum(1))

        def act() -> None:
            batch = run.batch()
            control.zero_grad()
            backpropagate(chain, control, batch.x0, batch.noise, objective, parameters=parameters, mode=mode)

        return act
