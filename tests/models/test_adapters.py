"""Models with adapters of PEFT: these alone are trained and saved, and the reference is the model without them."""

import copy
import warnings

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import sdecontrol as sc
from sdecontrol.controls.tuned import TunedControl

RUN = {"control": "tuned", "batch_size": 16, "seed": 0, "progress": False}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 32), nn.Linear(32, 2)

    def forward(self, x, s):
        return self.second(torch.tanh(self.first(torch.cat((x, s[:, None]), 1))))


def adapted(seed=0, size=0.3):
    """A network and the same with adapters, which say something already."""
    torch.manual_seed(seed)
    base = Net()
    plain = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["first", "second"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, size)
    return plain, model


def problem_of(model):
    sde = sc.generative_sde(model, sc.VP(), shape=(2,))
    return sc.ControlProblem(sde, reward=lambda x: x.sum(1), alpha=0.5, start="fixed")


def solved(problem, iterations=3, **options):
    return sc.solve(problem, sc.RewardBackprop(), time_steps=6, iterations=iterations, **{**RUN, **options})


def test_the_reference_is_the_model_without_its_adapters_and_they_alone_are_trained():
    plain, model = adapted()
    x, s = torch.randn(5, 2), torch.full((5,), 0.4)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    with_adapters = model(x, s)
    problem = problem_of(model)
    assert torch.equal(problem.reference.model(x, s), plain(x, s)) and not torch.allclose(plain(x, s), with_adapters)
    solution = solved(problem)
    control = solution.control
    assert isinstance(control, TunedControl)
    own = dict(control.named_parameters())
    assert len(own) == 4 and all("lora_" in name for name in own)
    for name, (p, flag) in before.items():
        now = dict(model.named_parameters())[name]
        assert torch.equal(now, p) and now.requires_grad == flag and now.grad is None, name
    assert torch.equal(model(x, s), with_adapters)  # the user's model still has its own
    moved = [name for name, p in own.items() if not torch.equal(p, dict(model.named_parameters())[name[14:]])]
    assert len(moved) == 4


def test_there_is_no_second_copy_of_the_weights():
    _, model = adapted()
    control = solved(problem_of(model)).control
    weights = {p.data_ptr() for n, p in model.named_parameters() if "lora_" not in n}
    first = control.model.network.get_base_model().first
    assert first.base_layer.weight.data_ptr() in weights and first.lora_A["default"].weight.data_ptr() not in weights
    again = copy.deepcopy(control).model.network.get_base_model().first
    assert again.base_layer.weight.data_ptr() in weights
    assert again.lora_A["default"].weight.data_ptr() != first.lora_A["default"].weight.data_ptr()
    assert set(control.state_dict()) == set(dict(control.named_parameters()))


def test_gradients_are_those_of_the_adapters_of_the_whole_model():
    _, model = adapted()
    control = TunedControl(problem_of(model).reference)
    x, s = torch.randn(5, 2), torch.full((5,), 0.4)
    control.predicted(x, s).square().sum().backward()
    model(x, s).square().sum().backward()
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = {n.removeprefix("model.network."): p.grad for n, p in control.named_parameters()}
    assert set(found) == set(theirs) and all(torch.allclose(found[n], theirs[n], atol=1e-6) for n in found)


def test_adapters_are_saved_loaded_and_resumed_bit_for_bit(tmp_path):
    _, model = adapted()
    whole = solved(problem_of(model), 6)

    class Stop:
        def on_step_end(self, state):
            if state.iteration == 4:
                raise KeyboardInterrupt

    saving = {"checkpoint_dir": tmp_path / "run", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        solved(problem_of(model), 6, callbacks=[Stop()], **saving)
    resumed = solved(problem_of(model), 6, resume=True, **saving)
    for (name, a), (_, b) in zip(whole.control.named_parameters(), resumed.control.named_parameters()):
        assert torch.equal(a, b), name
    whole.save(tmp_path / "solution")
    again = sc.load(tmp_path / "solution", problem_of(model))
    assert torch.equal(again.sample(8, seed=1), whole.sample(8, seed=1))
    size = sum(f.stat().st_size for f in (tmp_path / "solution").rglob("*.safetensors"))
    assert size < 4 * sum(p.numel() for p in whole.control.parameters()) + 1500


def unet(**options):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 4, "in_channels": 2, "out_channels": 2, "norm_num_groups": 4, "attention_head_dim": 4}
    return UNet2DModel(layers_per_block=1, block_out_channels=(8, 8), **blocks, **sizes).eval()


def test_low_rank_adapters_are_added_trained_and_saved_by_themselves(tmp_path):
    network = unet()
    flags, weights = [p.requires_grad for p in network.parameters()], [p.clone() for p in network.parameters()]
    chain = sc.from_diffusers(network, DDPMScheduler(), steps=4, lora=sc.LoRA(2, ("to_q", "to_v")))
    problem = sc.ControlProblem(chain, reward=lambda x: x.flatten(1).sum(1), start="fixed")
    solution = sc.solve(problem, sc.RewardBackprop(), iterations=2, **RUN)
    assert [p.requires_grad for p in network.parameters()] == flags
    assert all(torch.equal(p, w) for p, w in zip(network.parameters(), weights))
    assert all("lora_" in name for name, _ in solution.control.named_parameters())
    with torch.no_grad():
        for p in solution.control.parameters():
            p.add_(0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        solution.save_pretrained(tmp_path)
    names = {f.name for f in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    whole = sum(p.numel() for p in network.parameters()) * 4
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < whole / 4
    found = PeftModel.from_pretrained(unet(), tmp_path)
    x, n = torch.randn(3, 2, 4, 4), torch.full((3,), 500)
    with torch.no_grad():
        assert torch.allclose(found(x, n).sample, solution.control.predicted(x, n), atol=1e-5)
        assert not torch.allclose(network(x, n).sample, solution.control.predicted(x, n), atol=1e-2)
        pipeline = solution.pipeline()
        assert torch.allclose(pipeline.unet(x, 500).sample, solution.control.predicted(x, n), atol=1e-5)


def test_adapters_that_cannot_be_trained_are_refused():
    _, model = adapted()
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="none of the model's adapters takes gradients"):
        problem_of(model)
    _, model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        problem_of(model)
    with pytest.raises(ValueError, match="rank"):
        sc.LoRA(0)
    with pytest.raises(ValueError, match="alpha"):
        sc.LoRA(2, alpha=0.0)
    with pytest.raises(TypeError, match="targets must be several names"):
        sc.LoRA(2, "to_q")
    with pytest.raises(ValueError, match="to_nothing"):
        sc.from_diffusers(unet(), DDPMScheduler(), lora=sc.LoRA(2, ("to_nothing",)))
