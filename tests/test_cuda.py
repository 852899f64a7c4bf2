"""Everything stays on the device of its inputs, and one seed gives the same bits twice: on CUDA, and on the CPU as what
the same tests should say there."""

import pytest
import torch
from cases import randn

import sdecontrol as sc
from sdecontrol.chains.categorical import CategoricalChain

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
F32 = torch.float32


def control_problem(device):
    here = {"device": device, "dtype": F32}
    sde = sc.LinearSDE(A=-torch.eye(2, **here), sigma=torch.eye(2, **here))
    start = sc.Gaussian(torch.zeros(2, **here), 0.3 * torch.eye(2, **here))
    reward = sc.Quadratic(torch.eye(2, **here), torch.ones(2, **here))
    return sc.ControlProblem(
        sde, initial=start, reward=reward, running_cost=sc.QuadraticCost(0.1 * torch.eye(2, **here)), start="controlled"
    )


class Noise(torch.nn.Module):
    """A pre-trained prediction of noise, of sorts."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x, s):
        return torch.tanh(self.layer(torch.cat((x, s.reshape(-1, 1).to(x).expand(len(x), 1)), 1)))


def generative_model(device):
    torch.manual_seed(0)
    sde = sc.generative_sde(Noise().to(device), sc.VP(), prediction="noise", shape=(2,))
    return sc.ControlProblem(sde, reward=lambda x: x[:, 0])


def gibbs_target(device):
    scale, centre = torch.ones(2, device=device), torch.zeros(2, device=device)
    return sc.gibbs_problem(lambda x: -0.5 * (x - 1).square().sum(1), 2, scale=scale, centre=centre)


def token_chain(device):
    table = randn(3, 4, 4, seed=1, dtype=F32).log_softmax(-1).to(device)
    start = torch.zeros(5, dtype=torch.int64, device=device)
    chain = CategoricalChain(lambda k, x: table[k][x], 3, 4, start, dtype=F32)
    return sc.ControlProblem(chain, reward=lambda x: (x == 2).to(F32).sum(1))


class Letters(torch.nn.Module):
    """A masked diffusion model, of sorts."""

    def __init__(self):
        super().__init__()
        self.token, self.layer = torch.nn.Embedding(5, 8), torch.nn.Linear(8, 4)

    def forward(self, x, s):
        z = self.token(x)
        return self.layer(z + z.mean(1, keepdim=True))


def masked_model(device):
    torch.manual_seed(0)
    chain = sc.masked_diffusion(Letters().to(device), 5, 4, steps=3)
    return sc.ControlProblem(chain, reward=lambda x: (x == 2).to(F32).sum(1))


class Tilt(torch.nn.Module):
    """A user's control of tokens."""

    def __init__(self):
        super().__init__()
        self.tilt = torch.nn.Parameter(0.1 * randn(4, 4, seed=2, dtype=F32))

    def forward(self, x, t):
        return self.tilt[x] * t[:, None, None]


TRAINED = {"iterations": 3, "batch_size": 64}
CASES = {
    "control problem, reward-backprop": (control_problem, sc.RewardBackprop(), {"time_steps": 5, **TRAINED}),
    "control problem, adjoint-matching": (control_problem, sc.AdjointMatching(), {"time_steps": 5, **TRAINED}),
    "generative model, log-variance": (generative_model, sc.LogVariance(), {"time_steps": 5, **TRAINED}),
    "density, tempered particles": (gibbs_target, sc.TemperedSMC(num_particles=128), {}),
    "density, particle-matching": (gibbs_target, sc.ParticleMatching(num_particles=128), {"time_steps": 5, **TRAINED}),
    "tokens, soft-ppo": (token_chain, sc.SoftPPO(), TRAINED),
    "tokens, a module of mine": (token_chain, sc.SoftPPO(), TRAINED),
    "masked diffusion, log-variance": (masked_model, sc.LogVariance(), TRAINED),
    "tokens, particles": (token_chain, sc.SMC(num_particles=256), {}),
}


@pytest.mark.cuda
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_solutions_live_on_the_device_and_repeat_their_bits(case, device, tmp_path):
    make, method, options = CASES[case]
    problem = make(device)
    if case == "tokens, a module of mine":
        options = {**options, "control": Tilt().to(device)}
    solutions = [sc.solve(problem, method, seed=1, progress=False, **options) for _ in range(2)]
    first, second = (s.sample(128, seed=2) for s in solutions)
    assert first.device.type == device and torch.equal(first, second)
    found = [s.evaluate(256, seed=3) for s in solutions]
    assert str(found[0]) == str(found[1])
    solutions[0].save(tmp_path)
    again = sc.load(tmp_path, problem, control=options.get("control"))
    assert again.sample(8, seed=2).device.type == device and torch.equal(again.sample(128, seed=2), first)
    x, log_w = solutions[0].weighted_sample(128, seed=2)
    assert x.device.type == log_w.device.type == device and bool(torch.isfinite(log_w).all())


@pytest.mark.cuda
@pytest.mark.parametrize("device", DEVICES)
def test_paths_live_on_the_device_and_chunks_repeat_their_bits(device):
    problem = control_problem(device)
    whole = sc.simulate(problem, 200, time_steps=6, seed=1, keep="end")
    parts = sc.simulate(problem, 200, time_steps=6, seed=1, keep="end", chunk=64)
    assert whole.end.device.type == device and torch.allclose(whole.end, parts.end, atol=1e-6)
    assert whole.running_cost.device.type == whole.log_ratio().device.type == device
