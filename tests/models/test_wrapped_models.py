"""Models of half precision with weights in float32, checkpointed layers, and models that are compiled or
data-parallel."""

import copy
import pickle
import warnings

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

import sdecontrol as sc
from sdecontrol.controls.tuned import TunedControl
from sdecontrol.files.bundles import read_bundle
from sdecontrol.processes.masters import MasterWeights

BF16 = torch.bfloat16
RUN = {"control": "tuned", "batch_size": 8, "seed": 0, "progress": False}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 16), nn.Linear(16, 2)

    def forward(self, x, s):
        return self.second(torch.tanh(self.first(torch.cat((x, s[:, None]), 1))))


def unet(dtype=torch.float32, checkpointed=False):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 4, "in_channels": 2, "out_channels": 2, "norm_num_groups": 4, "attention_head_dim": 4}
    made = UNet2DModel(layers_per_block=1, block_out_channels=(8, 8), **blocks, **sizes).eval().to(dtype)
    if checkpointed:
        made.enable_gradient_checkpointing()
    return made


def problem_of(model):
    sde = sc.generative_sde(model, sc.VP(), shape=(2,))
    return sc.ControlProblem(sde, reward=lambda x: x.sum(1), alpha=0.5, start="fixed")


def images_of(model, **options):
    chain = sc.from_diffusers(model, DDPMScheduler(timestep_spacing="leading"), steps=3, **options)
    return sc.ControlProblem(chain, reward=lambda x: x.flatten(1).mean(1), alpha=0.1, start="fixed")


def solved(problem, iterations=3, **options):
    steps = {"time_steps": 4} if problem.reference.continuous else {}
    return sc.solve(problem, sc.RewardBackprop(), iterations=iterations, **{**RUN, **steps, **options})


# ------------------------------------------------------------------------------------------------ half precision


def test_a_tuned_copy_of_half_precision_begins_as_the_model_and_keeps_small_steps():
    """At a learning rate of 1e-5 a weight of 0.5 moves by less than the rounding of bfloat16, 2e-3, for 100 steps."""
    model = Net().to(BF16)
    problem = problem_of(model)
    control = TunedControl(problem.reference)
    x, s = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)), torch.full((5,), 0.4)
    assert torch.equal(control.predicted(x, s), model(x.to(BF16), s.to(BF16)).float())
    assert {p.dtype for p in control.parameters()} == {torch.float32}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solved(problem, 20, learning_rate=1e-5, max_kl_step=None)
    for (name, p), (_, own) in zip(solution.control.model.network.named_parameters(), model.named_parameters()):
        assert 0 < float((p.detach() - own.float()).abs().max()) < 3e-4, name
        assert own.dtype == BF16 and own.grad is None
    assert solution.history[-1]["kl"] >= 0 and solution.sample(4, seed=0).dtype == torch.float32


def test_gradients_are_those_of_the_rounded_weights_added_up_in_float32():
    model = Net().to(BF16)
    masters, plain = MasterWeights(model), copy.deepcopy(model)
    x = torch.randn(7, 5, 2, generator=torch.Generator().manual_seed(1)).to(BF16)
    s = torch.full((5,), 0.4, dtype=BF16)
    wanted = {name: torch.zeros(p.shape) for name, p in plain.named_parameters()}
    for part in x:
        plain.zero_grad()
        plain(part, s).float().square().sum().backward()
        for name, p in plain.named_parameters():
            wanted[name] += p.grad.float()
    sum(masters(part, s).float().square().sum() for part in x).backward()
    for name, p in masters.network.named_parameters():
        assert torch.allclose(p.grad, wanted[name], atol=1e-6), name
    for again in (copy.deepcopy(masters), pickle.loads(pickle.dumps(masters))):
        assert torch.equal(again(x[0], s), masters(x[0], s)) and {p.dtype for p in again.whole().parameters()} == {BF16}
    tied = Net()
    tied.second = nn.Linear(16, 2, bias=False)
    tied.third = nn.Linear(16, 2, bias=False)
    tied.third.weight = tied.second.weight
    assert len(list(MasterWeights(tied.to(BF16)).parameters())) == len(list(tied.parameters())) == 3


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_checkpointed_layers_are_computed_again_and_give_the_same_gradients(dtype, adapters):
    options = {"lora": sc.LoRA(2, ("to_q", "to_v"))} if adapters else {}
    x, n = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([900, 500, 20])
    found, calls = {}, {}
    for checkpointed in (False, True):
        problem = images_of(unet(dtype, checkpointed), **options)
        control = TunedControl(problem.reference)
        with torch.no_grad():
            for p in control.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
        count: list[int] = []
        blocks = [m for m in control.modules() if type(m).__name__ == "ResnetBlock2D"]
        for block in blocks:
            block.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        loss = sum(control.predicted(size * x, n).square().sum() for size in (1.0, 0.5))
        with torch.no_grad():
            control.predicted(x, n)  # a look at how far a step goes, in between
        before = len(count)
        loss.backward()
        found[checkpointed] = [p.grad for p in control.parameters()]
        calls[checkpointed] = len(count) - before
    assert calls[False] == 0 and calls[True] > 0
    assert all(torch.equal(a, b) for a, b in zip(found[False], found[True]))
    assert any(float(g.abs().max()) > 0 for g in found[True])
    solution = solved(images_of(unet(dtype, True), **options), 2)  # and a whole run of them
    assert all(bool(p.isfinite().all()) for p in solution.control.parameters())


@pytest.mark.slow
def test_a_model_of_half_precision_is_saved_resumed_and_exported_in_its_own(tmp_path):
    whole = solved(images_of(unet(BF16)), 6)

    class Stop:
        def on_step_end(self, state):
            if state.iteration == 4:
                raise KeyboardInterrupt

    saving = {"checkpoint_dir": tmp_path / "run", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        solved(images_of(unet(BF16)), 6, callbacks=[Stop()], **saving)
    resumed = solved(images_of(unet(BF16)), 6, resume=True, **saving)
    for (name, a), (_, b) in zip(whole.control.named_parameters(), resumed.control.named_parameters()):
        assert torch.equal(a, b) and a.dtype == torch.float32, name
    whole.save(tmp_path / "solution")
    again = sc.load(tmp_path / "solution", images_of(unet(BF16)))
    assert torch.equal(again.sample(4, seed=1), whole.sample(4, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        whole.save_pretrained(tmp_path / "tuned")
    found = DDPMPipeline.from_pretrained(tmp_path / "tuned").to(BF16)
    x, n = torch.randn(3, 2, 4, 4), torch.full((3,), 500)
    with torch.no_grad():
        assert torch.equal(found.unet(x.to(BF16), n).sample.float(), whole.control.predicted(x, n))
        assert torch.equal(whole.pipeline().unet(x.to(BF16), 500).sample.float(), whole.control.predicted(x, n))
    stored = load_file(tmp_path / "tuned" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {BF16}


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["LoRA", "PEFT's, of half precision too"])
def test_adapters_in_float32_on_a_model_of_half_precision(whose, tmp_path):
    options = {"lora": sc.LoRA(2, ("to_q", "to_v"))} if whose == "LoRA" else {}

    def problem():
        network = unet(BF16)
        if not options:
            torch.manual_seed(5)
            settings = LoraConfig(r=2, target_modules=["to_q", "to_v"])
            network = get_peft_model(network, settings, autocast_adapter_dtype=False)
            assert {p.dtype for p in network.parameters()} == {BF16}
        return images_of(network, **options)

    made = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solved(made, 3)
    control = solution.control
    x, n = torch.randn(3, 2, 4, 4), torch.full((3,), 500)
    fresh = TunedControl(made.reference)
    with torch.no_grad():
        assert torch.equal(fresh.predicted(x, n), unet(BF16)(x.to(BF16), n).sample.float())
    assert {p.dtype for p in control.parameters()} == {torch.float32} and len(list(control.parameters())) == 16
    assert any(not torch.equal(a, b) for a, b in zip(control.parameters(), fresh.parameters()))
    solution.save(tmp_path / "solution")
    if not options:  # those of LoRA are drawn anew, and loaded
        again = sc.load(tmp_path / "solution", problem())
        assert torch.equal(again.sample(4, seed=1), solution.sample(4, seed=1))
    solution.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_what_half_precision_cannot_do_is_said():
    class Recurrent(Net):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRU(2, 2)

    with pytest.raises(ValueError, match=r"the model has a GRU of torch.bfloat16.*model.float\(\)"):
        MasterWeights(Recurrent().to(BF16))
    with pytest.warns(RuntimeWarning, match="a model of float16 is tuned: gradients below 6e-8"):
        MasterWeights(Net().half())


# ------------------------------------------------------------------------------------------------ wrappers


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {"compiled": compiled, "data-parallel": nn.DataParallel, "both": lambda m: nn.DataParallel(compiled(m))}


def names(folder):
    tensors, _ = read_bundle(folder, "solution", "solution")
    return set(tensors)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_models_are_saved_and_loaded_under_plain_names(wrap, tmp_path):
    plain, wrapped = solved(problem_of(Net())), solved(problem_of(WRAPPERS[wrap](Net())))
    assert torch.equal(plain.sample(8, seed=1), wrapped.sample(8, seed=1))
    assert any("_orig_mod." in n or "module." in n for n in wrapped.control.state_dict())
    for name, solution in {"plain": plain, "wrapped": wrapped}.items():
        solution.save(tmp_path / name)
        for model in (Net(), WRAPPERS[wrap](Net())):
            again = sc.load(tmp_path / name, problem_of(model))
            assert torch.equal(again.sample(8, seed=1), plain.sample(8, seed=1))
    assert names(tmp_path / "plain") == names(tmp_path / "wrapped") == {f"model.{n}" for n in Net().state_dict()}
    further = solved(problem_of(Net()), 1, control=wrapped)
    assert torch.equal(further.sample(8, seed=1), solved(problem_of(Net()), 1, control=plain).sample(8, seed=1))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_run_of_a_wrapped_model_goes_on_with_the_plain_one(wrap, tmp_path):
    whole, options = solved(problem_of(Net()), 6), {"checkpoint_dir": tmp_path, "checkpoint_every": 2}

    class Stop:
        def on_step_end(self, state):
            if state.iteration == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solved(problem_of(WRAPPERS[wrap](Net())), 6, callbacks=[Stop()], **options)
    resumed = solved(problem_of(Net()), 6, resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.control.parameters(), resumed.control.parameters()))


def test_a_part_of_a_user_s_own_that_is_called_module_keeps_its_name(tmp_path):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = Net()

        def forward(self, x, s):
            return self.module(x, s)

    solved(problem_of(compiled(Holder()))).save(tmp_path)
    assert names(tmp_path) == {f"model.module.{n}" for n in Net().state_dict()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "adapters", "half"])
def test_a_compiled_network_of_diffusers_is_exported_as_the_network(kind, tmp_path):
    options = {"lora": sc.LoRA(2, ("to_q", "to_v"))} if kind == "adapters" else {}
    network = unet(BF16 if kind == "half" else torch.float32)
    torch.manual_seed(7)
    wrapped = solved(images_of(compiled(network), **options), 2)
    torch.manual_seed(7)
    plain = solved(images_of(network, **options), 2)
    assert torch.equal(wrapped.sample(4, seed=1), plain.sample(4, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        wrapped.save_pretrained(tmp_path)
    if kind != "adapters":
        found = DDPMPipeline.from_pretrained(tmp_path).unet
        assert set(found.state_dict()) == set(network.state_dict())
    pipeline = wrapped.pipeline()
    x, n = torch.randn(3, 2, 4, 4).to(network.dtype), torch.full((3,), 500)
    with torch.no_grad():
        assert type(pipeline.unet) is UNet2DModel
        found = pipeline.unet(x, 500).sample
        assert torch.allclose(found.float(), wrapped.control.predicted(x.float(), n), atol=1e-6)


def test_a_model_under_ddp_is_tuned_as_the_model(tmp_path):
    """Gradients are this package's own to sum; the wrapper's hooks count calls, of which a chain makes many."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel
        wrapped, plain = solved(problem_of(parallel(Net()))), solved(problem_of(Net()))
        assert torch.equal(wrapped.sample(8, seed=1), plain.sample(8, seed=1))
        wrapped.save(tmp_path / "solution")
        assert names(tmp_path / "solution") == {f"model.{n}" for n in Net().state_dict()}
        images = solved(images_of(parallel(unet())), 1)
        assert torch.equal(images.sample(2, seed=1), solved(images_of(unet()), 1).sample(2, seed=1))
    finally:
        torch.distributed.destroy_process_group()
