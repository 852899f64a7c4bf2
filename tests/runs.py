"""Trainings and gradients that several tests run."""

from pathlib import Path

import torch
from cases import F64, random_lq

import sdecontrol as sc
from sdecontrol.controls.build import build_control
from sdecontrol.methods.base import Run
from sdecontrol.paths.gradients import Objective, backpropagate

TESTS = str(Path(__file__).parent)
F32 = torch.float32
QUICK = {"time_steps": 8, "batch_size": 64, "seed": 3}


def quick(problem=None, method=None, **options):
    problem = random_lq(2, seed=1, dtype=F32) if problem is None else problem
    return sc.solve(problem, method or sc.RewardBackprop(), **{**QUICK, "iterations": 12, **options})


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.control.state_dict().values(), b.control.state_dict().values()))


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from cases import random_lq
import sdecontrol as sc
problem = random_lq(2, seed=1, dtype=torch.float32)
saving = dict(checkpoint_dir={folder!r}, checkpoint_every=2, resume=True)
s = sc.solve(problem, "reward-backprop", time_steps=8, batch_size=64, seed=3, iterations=150, **saving)
s.save({folder!r} + "/done")
"""


def perturbed_default(problem, chain, seed=0):
    """The default network away from its zero output, so that every parameter has a gradient."""
    control = build_control(problem, chain, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in control.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=F64).to(p.dtype))
    return control


def gradient(problem, chain, control, mode, batch=8):
    run = Run(problem, chain, batch, 1, seed=1)
    start = run.batch()
    parameters = [p for p in control.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = None
    cost = backpropagate(
        chain,
        control,
        start.x0,
        start.noise,
        Objective(
            lambda x: -problem.reward(chain.decode(x)) / problem.alpha, problem.running_cost_or_none, problem.alpha
        ),
        parameters=parameters,
        mode=mode,
    )
    return cost, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
