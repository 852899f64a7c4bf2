"""Networks of diffusers with their schedulers' own steps, and the way back."""

import copy
import math
import warnings
from itertools import product

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)

import sdecontrol as sc
from sdecontrol.controls.tuned import ControlledModel

SHAPE = (2, 4, 4)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")


class StandIn(torch.nn.Module):
    """A smooth function of state and time, with x0^ inside and outside of [-1, 1]."""

    def __init__(self, size=1.4):
        super().__init__()
        self.size = torch.nn.Parameter(torch.tensor(size))

    def forward(self, sample, timestep, class_labels=None):
        t = (timestep.to(sample) / 700).reshape(-1, 1, 1, 1)
        shift = 0.0 if class_labels is None else 0.3 * class_labels.reshape(-1, 1, 1, 1)
        return (self.size * torch.sin(1.7 * sample + t + shift) + 0.2 * sample,)


def network(seed=0, **options):
    torch.manual_seed(seed)
    options = {"sample_size": 4, "in_channels": 2, "out_channels": 2, "norm_num_groups": 4, **options}
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    return UNet2DModel(layers_per_block=1, block_out_channels=(8, 8), **blocks, **options).eval()


def theirs(scheduler, t, x, prediction, **options):
    """Mean and standard deviation of the scheduler's own step from timestep t: its step with noise 0 and 1."""
    if isinstance(scheduler, DDIMScheduler):
        zero, one = (torch.full_like(x, v) for v in (0.0, 1.0))
        steps = [
            scheduler.step(prediction, t, x, variance_noise=z, return_dict=False, **options)[0] for z in (zero, one)
        ]
        return steps[0], steps[1] - steps[0]
    noise, found = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype), []
    for size in (0.0, 1.0):
        own = copy.copy(scheduler)  # a flow's counts its steps
        found.append(own.step(prediction, t, x, generator=Fixed(noise * size), return_dict=False)[0])
    return found[0], (found[1] - found[0]) / noise


class Fixed:
    """In a generator's place: what diffusers draws is this noise."""

    device = torch.device("cpu")

    def __init__(self, noise):
        self.noise = noise


@pytest.fixture
def fixed_noise(monkeypatch):
    import diffusers.schedulers.scheduling_ddpm as ddpm
    import diffusers.schedulers.scheduling_flow_match_euler_discrete as flow

    for module in (ddpm, flow):
        real = module.randn_tensor
        draw = lambda *a, generator, real=real, **b: (  # noqa: E731
            generator.noise if isinstance(generator, Fixed) else real(*a, generator=generator, **b)
        )
        monkeypatch.setattr(module, "randn_tensor", draw)


def check(chain, scheduler, times, atol=1e-8, **options):
    """All steps of a chain, the last one with them, are the scheduler's own (in float64: in float32 its differences of
    coefficients are off by up to 1e-4)."""
    x = 1.3 * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=chain.dtype)
    for name in ("alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    for k, t in enumerate(times):
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(k)
        clock = torch.as_tensor(t).expand(3)
        with torch.no_grad():
            mean, scale = theirs(scheduler, t, x, chain.model.network(x, clock)[0], **options)
            if k < chain.steps:
                own, own_scale = chain.kernel(k, x)
            else:
                own, own_scale = chain.decode(x), torch.zeros((), dtype=x.dtype)
        size = max(1.0, float(mean.abs().max()))
        assert float((own - mean).abs().max()) < atol * size, (k, t)
        assert float((scale - own_scale).abs().max()) < atol * size, (k, t)
    assert len(times) == chain.steps + chain.decodes
    assert chain.decodes or torch.equal(chain.decode(x), x)


LIMITS = {
    "none": {"clip_sample": False},
    "clipped": {"clip_sample": True, "clip_sample_range": 0.8},
    "thresholded": {"thresholding": True, "sample_max_value": 1.3, "dynamic_thresholding_ratio": 0.9},
    "thresholded below 1": {"thresholding": True, "sample_max_value": 0.7},
}
#: each spacing without limits and each limit with one spacing by default
PAIRS = [
    pytest.param(spacing, limit, marks=() if spacing == "leading" or limit == "none" else pytest.mark.slow)
    for spacing, limit in product(SPACINGS, LIMITS)
]


@pytest.mark.parametrize(("spacing", "limit"), PAIRS)
def test_steps_are_ddpm_s_own(spacing, limit, fixed_noise):
    count = 0
    for prediction, variance, offset, steps in product(
        PREDICTIONS, ("fixed_small", "fixed_small_log", "fixed_large"), (0, 1), (7, 20)
    ):
        settings = {"prediction_type": prediction, "variance_type": variance, "steps_offset": offset}
        scheduler = DDPMScheduler(
            timestep_spacing=spacing, beta_schedule="squaredcos_cap_v2", **settings, **LIMITS[limit]
        )
        chain = sc.from_diffusers(StandIn().double(), scheduler, steps=steps, shape=SHAPE)
        scheduler.set_timesteps(steps)
        check(chain, scheduler, scheduler.timesteps)
        count += 1
    assert count == 36


@pytest.mark.parametrize(("spacing", "limit"), PAIRS)
def test_steps_are_ddim_s_own(spacing, limit):
    for prediction, clipped, eta, one, steps in product(PREDICTIONS, (False, True), (0.3, 1.0), (False, True), (7, 20)):
        settings = {"prediction_type": prediction, "set_alpha_to_one": one, "steps_offset": int(not one)}
        scheduler = DDIMScheduler(timestep_spacing=spacing, **settings, **LIMITS[limit])
        options = {"eta": eta, "use_clipped_model_output": clipped}
        chain = sc.from_diffusers(StandIn().double(), scheduler, steps=steps, shape=SHAPE, **options)
        scheduler.set_timesteps(steps)
        check(chain, scheduler, scheduler.timesteps, **options)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_steps_after_zero_terminal_snr_are_the_scheduler_s_own(kind, prediction, fixed_noise):
    scheduler = kind(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type=prediction)
    options = {"eta": 0.5} if kind is DDIMScheduler else {}
    chain = sc.from_diffusers(StandIn().double(), scheduler, steps=10, shape=SHAPE, **options)
    scheduler.set_timesteps(10)
    check(chain, scheduler, scheduler.timesteps, **options)
    assert kind is DDIMScheduler or chain.memory < 1e-3  # nothing of the start is left


def test_timesteps_of_one_s_own(fixed_noise):
    scheduler, times = DDPMScheduler(), [900, 500, 499, 20, 3]
    chain = sc.from_diffusers(StandIn().double(), scheduler, timesteps=times, shape=SHAPE)
    scheduler.set_timesteps(timesteps=times)
    check(chain, scheduler, scheduler.timesteps)
    assert chain.levels[: len(times)] == times
    plain = sc.diffusion_chain(
        lambda x, n: chain.model(x, n),
        scheduler.alphas_cumprod,
        "noise",
        SHAPE,
        timesteps=[900, 500, 499, 20],
        clip=1.0,
    )
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for k in range(3):
        (mean, scale), (own, own_scale) = chain.kernel(k, x), plain.kernel(k, x)
        assert torch.allclose(mean, own, atol=1e-12) and torch.allclose(scale, own_scale, atol=1e-12)


SIGMAS = {
    "plain": {},
    "shifted": {"shift": 3.0},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}


@pytest.mark.parametrize("sigmas", SIGMAS)
def test_a_flow_with_its_own_noise_has_its_scheduler_s_steps(sigmas, fixed_noise):
    scheduler = FlowMatchEulerDiscreteScheduler(**SIGMAS[sigmas], stochastic_sampling=True)
    chain = sc.from_diffusers(StandIn(), scheduler, steps=8, shape=SHAPE)
    scheduler.set_timesteps(8)
    check(chain, scheduler, scheduler.timesteps, atol=1e-5)  # its step is in float32


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_without_noise_is_the_limit_of_its_scheduler_s_steps(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(8)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    for eta in (1e-3, 0.5, 1.0):
        chain = sc.from_diffusers(StandIn(), scheduler, steps=8, shape=SHAPE, eta=eta)
        for k, t in enumerate(scheduler.timesteps[:-1]):
            scheduler.set_begin_index(k)
            s, s_end = (float(v) for v in scheduler.sigmas[k : k + 2])
            with torch.no_grad():
                velocity = chain.model.network(x, t.expand(3))[0]
                mean, scale = chain.kernel(k, x)
            euler = copy.copy(scheduler).step(velocity, t, x, return_dict=False)[0]
            # the noising's posterior, from its joint Gaussian law: x_s given x_{s'} has the mean (1-s)/(1-s') x_{s'}
            forward = s**2 - ((1 - s) / (1 - s_end) * s_end) ** 2
            assert float(scale) == pytest.approx(eta * s_end / s * math.sqrt(forward), rel=1e-5)
            # what is taken from eps^ is drawn: the mean square of the noise in the step stays
            eps = x + (1 - s) * velocity
            kept = math.sqrt(max(s_end**2 - float(scale) ** 2, 0.0))
            assert torch.allclose(mean, euler - (s_end - kept) * eps, atol=1e-5)


# ---------------------------------------------------------------------------------------- controls


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_model_of_a_control_inverts_the_clip(prediction, clipped):
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=True)
    chain = sc.from_diffusers(StandIn(), scheduler, steps=6, shape=SHAPE, eta=0.7, use_clipped_model_output=clipped)
    chain = chain.on(torch.float32, torch.device("cpu"))
    direction = 0.2 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))

    class Pushed(sc.Control):
        def at(self, x, t, y=None):
            return direction.expand_as(x)

    control = Pushed(chain.event_shape, chain.control_shape, 0.0, 1.0)
    model = ControlledModel(chain, control)
    x = 1.2 * torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(3))
    outside = 0
    for k in range(chain.steps):
        with torch.no_grad():
            predicted = model(x, torch.tensor(chain.levels[k]).expand(5))
            mean, scale = chain.kernel(k, x)
            wanted = mean + scale * chain.shift_at(k, x, direction.expand_as(x))
            reached = chain.mean_of(k, x, predicted)
            own = chain.mean_of(k, x, chain.model(x, torch.tensor(chain.levels[k]).expand(5)))
        assert torch.allclose(own, mean, atol=1e-6)
        if not clipped:
            assert torch.allclose(reached, wanted, atol=2e-4)
            continue
        within = chain.steps_of.x0_part[k] != 0
        x0 = chain.to_x0(k, x, chain.model(x, torch.tensor(chain.levels[k]).expand(5)))
        change = (wanted - mean) / chain.parts[k][0]
        reachable = (x0 + change).abs() <= 1
        outside += int((~reachable).sum())
        assert within and torch.allclose(reached[reachable], wanted[reachable], atol=2e-4)
        beyond = chain.to_x0(k, x, predicted)[~reachable]
        assert torch.allclose(beyond.abs(), torch.ones_like(beyond), atol=1e-5)
    assert not clipped or outside > 20


TUNED = {"control": "tuned", "iterations": 1, "batch_size": 4, "seed": 1, "progress": False}


def tuned(scheduler, seed=0, model=None, reward=None, **options):
    """A problem, and a solution whose copy of the model has moved."""
    chain = sc.from_diffusers(network(seed) if model is None else model, scheduler, steps=5, **options)
    problem = sc.ControlProblem(chain, reward=reward or (lambda x: x.flatten(1).sum(1)), start="fixed")
    solution = sc.solve(
        problem, sc.RewardBackprop(), control="tuned", iterations=2, batch_size=8, seed=1, progress=False
    )
    with torch.no_grad():
        for p in solution.control.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
    return problem, solution


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_a_stock_pipeline_draws_the_solution_s_samples(kind):
    """With the same noise, sample by sample."""
    scheduler = kind(timestep_spacing="trailing")
    options = {"eta": 0.8} if kind is DDIMScheduler else {}
    problem, solution = tuned(scheduler, **options)
    pipeline = solution.pipeline()
    assert type(pipeline) is (DDPMPipeline if kind is DDPMScheduler else DDIMPipeline)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        4, generator=torch.Generator().manual_seed(3), num_inference_steps=5, output_type="np", **options
    ).images
    generator, chain = torch.Generator().manual_seed(3), solution.chain
    x = torch.randn(4, *SHAPE, generator=generator)
    with torch.no_grad():
        for k in range(chain.steps):
            xi = torch.randn(4, *SHAPE, generator=generator)
            c = chain.shift_at(k, x, solution.control(x, chain.times[k]))
            x = chain.step(k, x, xi, c)
        x = chain.decode(x)
        assert float((problem.reference.to_x0(4, x, problem.reference.model(x, torch.zeros(4))) - x).abs().max()) > 0.1
    ours = (x / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert float((ours - torch.as_tensor(images)).abs().max()) < 2e-4


def test_a_tuned_model_is_saved_in_diffusers_format_and_says_what_the_last_step_does(tmp_path):
    _, solution = tuned(DDPMScheduler(timestep_spacing="trailing"))
    with pytest.warns(RuntimeWarning, match="last, noiseless step asks the tuned network"):
        solution.save_pretrained(tmp_path / "tuned")
    found = DDPMPipeline.from_pretrained(tmp_path / "tuned")
    for name, value in solution.control.model.network.state_dict().items():
        assert torch.equal(found.unet.state_dict()[name], value), name
    assert found.scheduler.config.timestep_spacing == "trailing"
    again = sc.from_diffusers(found, steps=5)
    assert again.steps_of == solution.problem.reference.steps_of
    _, quiet = tuned(DDPMScheduler(timestep_spacing="leading"))  # its last step is at timestep 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        quiet.save_pretrained(tmp_path / "quiet")


def test_a_network_without_a_stock_pipeline_is_saved_by_itself(tmp_path):
    _, solution = tuned(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="diffusers has no pipeline of a UNet2DModel with a FlowMatch"):
        solution.pipeline()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        solution.save_pretrained(tmp_path)
    found = UNet2DModel.from_pretrained(tmp_path)
    for name, value in solution.control.model.network.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_what_cannot_be_exported_says_what_can():
    problem, _ = tuned(DDPMScheduler())
    guided = sc.solve(problem, sc.ValueGuidance("monte-carlo"), iterations=1, batch_size=8, seed=1, progress=False)
    with pytest.raises(ValueError, match=r"sc.distill\(solution\)"):
        guided.pipeline()
    other = sc.ControlProblem(sc.BrownianMotion(2), initial=sc.Dirac(torch.zeros(2)), reward=lambda x: x.sum(1))
    with pytest.raises(ValueError, match="of no other library"):
        sc.solve(other, sc.RewardBackprop(), iterations=1, seed=0, progress=False).pipeline()


def test_a_solution_is_saved_and_loaded(tmp_path):
    problem, solution = tuned(DDPMScheduler())
    solution.save(tmp_path / "solution")
    again = sc.load(tmp_path / "solution", problem)
    assert torch.equal(again.sample(4, seed=1), solution.sample(4, seed=1))
    other = sc.from_diffusers(network(), DDPMScheduler(variance_type="fixed_large"), steps=5)
    with pytest.raises(sc.BadFileError):
        sc.load(tmp_path / "solution", sc.ControlProblem(other, reward=problem.reward_function, start="fixed"))


# ---------------------------------------------------------------------------------------- conditions and latents


def test_class_labels_reach_the_network():
    model = network(num_class_embeds=3)
    chain = sc.from_diffusers(model, DDPMScheduler(), steps=4)
    x, y = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1, 0])
    clock = torch.tensor(chain.levels[1]).expand(5)
    with torch.no_grad():
        assert torch.equal(chain.prediction_at(1, x, y), model(x, clock, class_labels=y).sample)
    problem = sc.ControlProblem(
        chain, reward=lambda x, y: x.flatten(1).mean(1) * y, condition=torch.tensor([0, 1, 2]), start="fixed"
    )
    solution = sc.solve(problem, sc.SoftPPO(), control="tuned", iterations=1, batch_size=8, seed=0, progress=False)
    assert solution.sample(6, seed=0, condition=torch.tensor([0, 1, 2, 0, 1, 2])).shape == (6, *SHAPE)


def test_embeddings_and_guidance_reach_a_conditional_network():
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()
    null = torch.zeros(3, 6)
    chain = sc.from_diffusers(model, DDIMScheduler(), steps=4, guidance=2.5, null_condition=null)
    x, y = (torch.randn(5, *s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate((SHAPE, (3, 6))))
    clock = torch.tensor(chain.levels[2]).expand(5)
    with torch.no_grad():
        given = model(x, clock, encoder_hidden_states=y).sample
        nothing = model(x, clock, encoder_hidden_states=null.expand(5, -1, -1)).sample
        assert torch.allclose(chain.prediction_at(2, x, y), nothing + 2.5 * (given - nothing), atol=1e-5)
    reward = lambda x, y=None: x.flatten(1).sum(1)  # noqa: E731
    with pytest.raises(ValueError, match="guidance needs a condition to guide to"):
        sc.ControlProblem(chain, reward=reward, start="fixed")
    with pytest.raises(ValueError, match=r"null_condition must have the shape of one y, \(2, 6\)"):
        sc.ControlProblem(chain, reward=reward, start="fixed", condition=torch.zeros(4, 2, 6))
    with pytest.raises(ValueError, match="null_condition is for guidance="):
        sc.from_diffusers(model, DDIMScheduler(), null_condition=null)
    with pytest.raises(ValueError, match="guidance needs null_condition"):
        sc.from_diffusers(model, DDIMScheduler(), guidance=2.0)


def test_several_conditions_stand_side_by_side():
    seen = {}

    class Several(StandIn):
        def forward(self, sample, timestep, prompts, added=None):
            seen.update(prompts=prompts, added=added)
            return super().forward(sample, timestep)

    named = {"prompts": (2, 3), "added.text": (4,), "added.size": ()}
    chain = sc.from_diffusers(Several(), DDPMScheduler(), steps=3, shape=SHAPE, condition_kwarg=named)
    y = torch.arange(2 * 11.0).reshape(2, 11)
    chain.model(torch.zeros(2, *SHAPE), torch.zeros(2), y)
    assert torch.equal(seen["prompts"], y[:, :6].reshape(2, 2, 3))
    assert torch.equal(seen["added"]["text"], y[:, 6:10]) and torch.equal(seen["added"]["size"], y[:, 10])
    with pytest.raises(ValueError, match=r"condition must be \(batch, 11\)"):
        chain.model(torch.zeros(2, *SHAPE), torch.zeros(2), y[:, :5])


def test_rewards_and_samples_of_latents_are_images():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(
        **blocks, block_out_channels=(8, 8), latent_channels=2, norm_num_groups=4, scaling_factor=0.3, shift_factor=0.1
    ).eval()
    seen = []

    def reward(x):
        seen.append(tuple(x.shape[1:]))
        return x.flatten(1).mean(1)

    chain = sc.from_diffusers(network(), DDPMScheduler(clip_sample=False), steps=4, decode=vae)
    problem = sc.ControlProblem(chain, reward=reward, start="fixed")
    solution = sc.solve(
        problem, sc.RewardBackprop(), control="tuned", iterations=1, batch_size=4, seed=0, progress=False
    )
    guided = sc.solve(problem, sc.ValueGuidance("tweedie"), progress=False)
    images = solution.sample(3, seed=0)
    assert images.shape == (3, 3, 8, 8) and guided.sample(3, seed=0).shape == (3, 3, 8, 8)
    assert set(seen) == {(3, 8, 8)}
    z = chain.denoised(solution.simulate(3, seed=0, keep="end").end, 1.0)
    with torch.no_grad():
        assert torch.allclose(images, vae.decode(z / 0.3 + 0.1).sample, atol=1e-5)


# ---------------------------------------------------------------------------------------- errors

BAD = {
    "a multistep scheduler": ((DPMSolverMultistepScheduler(),), {}, TypeError, "DPMSolverMultistepScheduler is not"),
    "a scheduler of no noise": (
        (type("EulerDiscreteScheduler", (), {})(),),
        {},
        TypeError,
        r"DDIMScheduler.from_config",
    ),
    "no scheduler": ((), {}, TypeError, "scheduler is needed"),
    "a learned variance": ((DDPMScheduler(variance_type="learned"),), {}, ValueError, "variance_type='learned'"),
    "noise that is no number": (
        (DDPMScheduler(variance_type="fixed_large_log"),),
        {},
        ValueError,
        "variance_type='fixed_large_log'",
    ),
    "a noise prediction at zero SNR": (
        (DDPMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),),
        {},
        ValueError,
        "rescale_betas_zero_snr",
    ),
    "another eta of DDPM": ((DDPMScheduler(),), {"eta": 0.5}, ValueError, "DDPMScheduler's noise is its own"),
    "no noise": ((DDIMScheduler(),), {"eta": 0.0}, ValueError, r"eta must be within \(0, 1\]"),
    "too much noise": ((DDIMScheduler(),), {"eta": 1.1}, ValueError, r"eta must be within \(0, 1\]"),
    "timesteps of DDIM": ((DDIMScheduler(),), {"timesteps": [9, 5, 1]}, ValueError, "takes no timesteps"),
    "both": ((DDPMScheduler(),), {"timesteps": [9, 5, 1], "steps": 3}, ValueError, "steps or timesteps"),
    "one step": ((DDPMScheduler(),), {"steps": 1}, ValueError, "steps"),
    "a shift that depends on the size": (
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),),
        {},
        ValueError,
        "use_dynamic_shifting",
    ),
    "clipping of another sampler": (
        (DDPMScheduler(),),
        {"use_clipped_model_output": True},
        ValueError,
        "use_clipped_model_output is DDIMScheduler's",
    ),
    "an unknown condition": ((DDPMScheduler(),), {"condition_kwarg": "prompt"}, ValueError, "condition_kwarg='prompt'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_understood_is_refused_by_name(name):
    given, options, error, match = BAD[name]
    with pytest.raises(error, match=match):
        sc.from_diffusers(network(), *given, **options)


def test_a_scheduler_with_steps_of_its_own_is_found_out():
    class Louder(DDPMScheduler):
        def step(self, *a, **b):
            return (1.1 * super().step(*a, **b)[0],)

    with pytest.raises(ValueError, match="Louder's own step from timestep"):
        sc.from_diffusers(network(), Louder())


def test_networks_that_are_none_are_refused():
    with pytest.raises(TypeError, match="must be a network of diffusers"):
        sc.from_diffusers(torch.nn.Linear(2, 2), DDPMScheduler(), shape=SHAPE)
    with pytest.raises(TypeError, match="a network of diffusers or a pipeline"):
        sc.from_diffusers("google/ddpm-cat-256", DDPMScheduler())
    with pytest.raises(TypeError, match="shape is needed"):
        sc.from_diffusers(StandIn(), DDPMScheduler())

    class Odd(StandIn):
        def forward(self, sample, timestep):
            return {"noise": sample}

    chain = sc.from_diffusers(Odd(), DDPMScheduler(), shape=SHAPE)
    with pytest.raises(TypeError, match=r"a tensor, a tuple or an object with .sample, got dict"):
        sc.ControlProblem(chain, reward=lambda x: x.flatten(1).sum(1), start="fixed")
