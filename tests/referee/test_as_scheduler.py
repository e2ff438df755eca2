"""Every solver as a diffusers scheduler: unmodified pipelines give the images of fewstep's own sampling (tiny random
models in memory)."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from operator import attrgetter
from typing import Any

import pytest
import torch
from test_hub_reading import last_sample
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from fewstep.denoisers import Denoiser, DynamicThreshold  # noqa: E402
from fewstep.grids import karras, trailing  # noqa: E402
from fewstep.guidance import Guided  # noqa: E402
from fewstep.hub import as_scheduler  # noqa: E402
from fewstep.hub.diffusers import LoadedPipeline, from_pipeline  # noqa: E402
from fewstep.hub.solver_scheduler import SolverScheduler  # noqa: E402
from fewstep.randomness import Rng  # noqa: E402
from fewstep.sampling import (  # noqa: E402
    ABM,
    DDIM,
    SOLVERS,
    AdaptiveDPMSolver,
    Churn,
    RungeKutta,
    Solver,
    balanced,
    run,
    solve,
)
from fewstep.sampling.coefficients import Levels  # noqa: E402
from fewstep.sampling.hooks import Hooks  # noqa: E402
from fewstep.sampling.solvers.runge_kutta import HEUN2  # noqa: E402
from fewstep.schedules import FlowMatching, Schedule  # noqa: E402

EXACT = 1e-5  # the network's time input is float32 in pipelines, and so are its weights here
STEPS = 5
FEW = 4  # a warm-up, two full steps and the end


@torch.no_grad()
def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the size of the images where that is above 1."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1))


def normal(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Drawn(Rng):
    """Noise from a generator, as a pipeline draws it; None is PyTorch's own."""

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__(0)
        self.source = generator

    def normal_like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.source, dtype=x.dtype)


def to_data(schedule: Schedule, times: Tensor) -> Levels:
    """The levels of a grid with pure data in the place of its last time."""
    levels = Levels.of(schedule, times)
    return levels if levels.sigma[-1] == 0 else tail(levels, 0, -1).denoised()


def tail(levels: Levels, start: int, stop: int | None = None) -> Levels:
    return replace(levels, **{name: vars(levels)[name][start:stop] for name in ("times", "alpha", "sigma", "log_snr")})


@torch.no_grad()
def sampled(denoiser: Denoiser, x: Tensor, levels: Levels, solver: Solver, cond: Any = None, rng: Any = None) -> Tensor:
    return run(denoiser, x, solver.table(levels), cond, rng)


def unet2d() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(4, 8), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def autoencoder(**changes: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8), latent_channels=4, norm_num_groups=2, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **changes,
    )  # fmt: skip


@cache
def stable_diffusion_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, cross_attention_dim=6, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return {"unet": unet.eval(), "vae": autoencoder().eval()}


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion(scheduler: Any = None, kind: str = "StableDiffusionPipeline") -> Any:
    scheduler = scheduler or diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    return attrgetter(kind)(diffusers)(
        **stable_diffusion_parts(), scheduler=scheduler, text_encoder=None, tokenizer=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@cache
def sd3_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=5, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    return {"transformer": transformer.eval(), "vae": autoencoder(shift_factor=0.3).eval()}


def sd3(scheduler: Any = None, kind: str = "StableDiffusion3Pipeline") -> Any:
    return attrgetter(kind)(diffusers)(
        **sd3_parts(), scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=None, text_encoder_2=None, text_encoder_3=None, tokenizer=None, tokenizer_2=None, tokenizer_3=None,
    )  # fmt: skip


PROMPT = {"prompt_embeds": normal(2, 7, 6)}
FLOW_PROMPT = {**PROMPT, "pooled_prompt_embeds": normal(2, 5)}
PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(8))


@cache
def pixels() -> tuple[Any, LoadedPipeline]:
    pipe = diffusers.DDPMPipeline(unet2d(), diffusers.DDPMScheduler(prediction_type="v_prediction"))
    return pipe, from_pipeline(pipe)


@pytest.mark.parametrize("name", SOLVERS)
def test_pixel_pipeline(name: str) -> None:
    """DDPMPipeline on a table of betas, clipping, stochastic solvers from the pipeline's generator: the image of
    fewstep's own loop, for every solver."""
    pipe, loaded = pixels()
    pipe.scheduler = as_scheduler(name, loaded.pipe.scheduler)
    theirs = last_sample(pipe, batch_size=2, num_inference_steps=FEW, generator=torch.Generator().manual_seed(1))
    source, schedule, solver = torch.Generator().manual_seed(1), loaded.denoiser.schedule, SOLVERS[name]()
    noise = torch.randn(2, 3, 8, 8, generator=source)
    levels = to_data(schedule, solver.grid(schedule, FEW))
    assert gap(sampled(loaded.clipped, noise, levels, solver, rng=Drawn(source)), theirs) < EXACT
    assert len(pipe.scheduler.timesteps) == solver.table(levels).calls and levels.sigma[-1] == 0
    assert float(theirs.abs().max()) <= 1 + 1e-6  # the end is a clipped prediction


@pytest.mark.parametrize("name", SOLVERS)
def test_flow_pipeline(name: str) -> None:
    """StableDiffusion3Pipeline, flow matching with a shift: the image of solve(), for every solver."""
    pipe = sd3()
    loaded, solver = from_pipeline(pipe), SOLVERS[name]()
    pipe.scheduler = as_scheduler(name, pipe)
    latents = normal(2, 4, 8, 8)
    torch.manual_seed(3)
    theirs = last_sample(pipe, **FLOW_PROMPT, latents=latents, num_inference_steps=FEW, guidance_scale=1.0)
    torch.manual_seed(3)
    times = solver.grid(FlowMatching(), FEW, 3.0)
    with torch.no_grad():
        mine = solve(loaded.denoiser, latents, times, solver, FLOW_PROMPT, Drawn(None))
    assert gap(mine, theirs) < EXACT


def test_guidance_latents_and_v_prediction() -> None:
    """StableDiffusionPipeline with guidance on a v-prediction table with zero terminal SNR, down to the decoded
    pictures."""
    original = diffusers.DDIMScheduler(
        **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True, steps_offset=1, clip_sample=False
    )
    pipe = stable_diffusion(original)
    loaded, latents, negative = from_pipeline(pipe), normal(2, 4, 8, 8), normal(2, 7, 6, seed=6)
    schedule = loaded.denoiser.schedule
    for name in ("unipc", "rk4"):
        pipe.scheduler = as_scheduler(name, pipe)
        assert pipe.scheduler.init_noise_sigma == 1.0
        call = {
            **PROMPT, "negative_prompt_embeds": negative, "latents": latents, "num_inference_steps": STEPS,
            "guidance_scale": 3.0,
        }  # fmt: skip
        guided, solver = Guided(loaded.denoiser, 3.0, {"prompt_embeds": negative}), SOLVERS[name]()
        levels = to_data(schedule, solver.grid(schedule, STEPS))
        mine = sampled(guided, latents, levels, solver, PROMPT)
        assert gap(mine, last_sample(pipe, **call)) < EXACT
        pictures = pipe(**call, output_type="pt").images
        assert gap((loaded.decode(mine) / 2 + 0.5).clamp(0, 1), pictures) < EXACT


def test_edm_models_have_their_input_scaled() -> None:
    """A network with EDM's preconditioning behind StableDiffusionPipeline's scale_model_input."""
    pipe = stable_diffusion(diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=20.0))
    loaded, latents = from_pipeline(pipe), normal(2, 4, 8, 8)
    pipe.scheduler = as_scheduler("dpmpp-2m", pipe, grid="karras")
    theirs = last_sample(pipe, **PROMPT, latents=latents, num_inference_steps=STEPS, guidance_scale=1.0)
    # their start: the standard deviation of the state for data of unit variance
    start, schedule = (1 + 20.0**2) ** 0.5, loaded.denoiser.schedule
    levels = to_data(schedule, karras(schedule, STEPS))
    mine = sampled(loaded.denoiser, start * latents, levels, SOLVERS["dpmpp-2m"](), PROMPT)
    assert pipe.scheduler.init_noise_sigma == pytest.approx(start, rel=1e-12)
    assert torch.allclose(pipe.scheduler.sigmas.double(), torch.tensor([*levels.times[:-1], 0.0]).double(), rtol=1e-6)
    assert gap(mine, theirs) < EXACT


def test_churn_lifts_before_the_network_looks() -> None:
    """EDM's stochastic Heun: the network is called at the lifted levels, and the image is solve()'s."""
    pipe, loaded = pixels()
    solver = RungeKutta(HEUN2, churn=Churn(2.0, inflation=1.01))
    pipe.scheduler = as_scheduler(solver, loaded.pipe.scheduler, grid="uniform")
    theirs = last_sample(pipe, batch_size=2, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1))
    source, schedule = torch.Generator().manual_seed(1), loaded.denoiser.schedule
    times = torch.linspace(999, 0, STEPS + 1, dtype=torch.float64)
    levels = to_data(schedule, times)
    noise = torch.randn(2, 3, 8, 8, generator=source)
    assert gap(sampled(loaded.clipped, noise, levels, solver, rng=Drawn(source)), theirs) < EXACT
    starts = torch.tensor([step.stages[0].time for step in solver.table(levels).steps])
    assert bool((starts[1:] > times[1:-1] + 10).all())
    assert torch.equal(pipe.scheduler.timesteps[::2], starts)


def image_latents(loaded: LoadedPipeline) -> Tensor:
    """The mean of the autoencoder's law, which ``image_to_latents`` makes the pipelines take."""
    return loaded.encode(2 * PICTURES - 1)


@pytest.fixture
def _no_encoder_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoencoder gives the mean of its law: the pipelines draw from it otherwise."""
    law = importlib.import_module("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution
    monkeypatch.setattr(law, "sample", lambda self, generator=None: self.mean)


@pytest.mark.parametrize("strength", [0.4, 0.8])
@pytest.mark.parametrize("name", ["ddpm", "dpmpp-2m", "unipc", "heun", "rk4", "dpmpp-3s-fast", "dualfast", "deis"])
@pytest.mark.usefixtures("_no_encoder_noise")
def test_img2img(name: str, strength: float) -> None:
    """StableDiffusionImg2ImgPipeline: the noised picture, moved by the solver along the rest of the grid, with a
    warm-up of its own."""
    pipe = stable_diffusion(kind="StableDiffusionImg2ImgPipeline")
    loaded, solver = from_pipeline(pipe), SOLVERS[name]()
    schedule = loaded.denoiser.schedule
    pipe.scheduler = as_scheduler(name, pipe)
    theirs = last_sample(
        pipe, **PROMPT, image=PICTURES, strength=strength, num_inference_steps=STEPS, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    source = torch.Generator().manual_seed(1)
    rest = tail(to_data(schedule, solver.grid(schedule, STEPS)), STEPS - round(strength * STEPS))
    noise = torch.randn(2, 4, 8, 8, generator=source)
    x = schedule.add_noise(image_latents(loaded), noise, torch.tensor(rest.times[0], dtype=torch.float64))
    assert gap(sampled(loaded.denoiser, x, rest, solver, PROMPT, Drawn(source)), theirs) < EXACT


@pytest.mark.usefixtures("_no_encoder_noise")
def test_img2img_with_churn_keeps_the_levels_of_the_whole_grid() -> None:
    """Beginning inside the grid starts at the lifted level of that step, without a draw of its own."""
    pipe = stable_diffusion(kind="StableDiffusionImg2ImgPipeline")
    loaded, solver = from_pipeline(pipe), RungeKutta(HEUN2, churn=Churn(2.0))
    schedule = loaded.denoiser.schedule
    pipe.scheduler = as_scheduler(solver, pipe)
    theirs = last_sample(
        pipe, **PROMPT, image=PICTURES, strength=0.6, num_inference_steps=STEPS, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    source = torch.Generator().manual_seed(1)
    table = solver.table(to_data(schedule, solver.grid(schedule, STEPS)))
    table.steps = table.steps[2:]
    start = torch.tensor(table.steps[0].stages[0].time, dtype=torch.float64)
    x = schedule.add_noise(image_latents(loaded), torch.randn(2, 4, 8, 8, generator=source), start)
    noise = Drawn(source)
    for i, step in enumerate(table.steps):
        if i:
            x = step.lift.a * x + step.lift.n * noise.normal_like(x)
        outputs: list[Tensor] = []
        base = x
        for stage in step.stages:
            with torch.no_grad():
                outputs.insert(0, loaded.denoiser(x, stage.time, PROMPT))
            x = stage.row.a * base + sum(c * m for c, m in zip(stage.row.c, outputs, strict=True))
    assert gap(x, theirs) < EXACT


@pytest.mark.parametrize("name", ["dpmpp-2m", "heun-native", "heun", "rk4", "dpm2", "dpmpp-sde"])
@pytest.mark.usefixtures("_no_encoder_noise")
def test_flow_img2img(name: str) -> None:
    """StableDiffusion3Img2ImgPipeline.  Solvers of k stages make one call in the step from pure noise, but the pipeline
    counts k: it begins at the last stage of a step, and one exact first-order step goes to its end."""
    pipe = sd3(kind="StableDiffusion3Img2ImgPipeline")
    loaded, solver = from_pipeline(pipe), SOLVERS[name]()
    pipe.scheduler = as_scheduler(name, pipe)
    torch.manual_seed(1)
    theirs = last_sample(
        pipe, **FLOW_PROMPT, image=PICTURES, strength=0.6, num_inference_steps=STEPS, guidance_scale=1.0, height=16,
        width=16,
    )  # fmt: skip
    torch.manual_seed(1)
    source, schedule = Drawn(None), FlowMatching()
    whole = Levels.of(schedule, balanced(schedule, STEPS, 3 * solver.centre))
    begin = solver.table(whole).steps[2].stages[0].time
    stages = [stage.time for step in solver.table(whole).steps for stage in step.stages]
    start = stages[2 * solver.calls(1)]
    inside = len(solver.table(whole).steps[0].stages) < solver.calls(1)
    assert (start != begin) == inside
    latents = image_latents(loaded)
    x = schedule.add_noise(latents, source.normal_like(latents), torch.tensor(start, dtype=torch.float64))
    rest = tail(whole, 3 if inside else 2)
    if inside and start > rest.times[0]:
        bridge = Levels.of(schedule, torch.tensor([start, rest.times[0]], dtype=torch.float64))
        x = sampled(loaded.denoiser, x, bridge, DDIM(), FLOW_PROMPT)
    assert gap(sampled(loaded.denoiser, x, rest, solver, FLOW_PROMPT, source), theirs) < EXACT


@pytest.mark.usefixtures("_no_encoder_noise")
def test_inpainting() -> None:
    """StableDiffusionInpaintPipeline on a text-to-image network: after every call the known part is put back, noised to
    the level of the next."""
    pipe = stable_diffusion(kind="StableDiffusionInpaintPipeline")
    loaded = from_pipeline(pipe)
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., 8:] = 1  # what is to be made
    call = {
        **PROMPT, "image": PICTURES, "mask_image": mask, "num_inference_steps": STEPS, "guidance_scale": 1.0,
        "height": 16, "width": 16,
    }  # fmt: skip
    known, schedule, free = image_latents(loaded), loaded.denoiser.schedule, mask[..., ::2, ::2]
    for name in ("dpmpp-2m", "ddpm"):
        solver = SOLVERS[name]()
        pipe.scheduler = as_scheduler(name, pipe)
        for strength in (1.0, 0.6):
            source = torch.Generator().manual_seed(1)
            decoded = pipe(**call, strength=strength, generator=source, output_type="latent").images
            source = torch.Generator().manual_seed(1)
            noise = torch.randn(2, 4, 8, 8, generator=source)
            levels = to_data(schedule, solver.grid(schedule, STEPS))
            levels = tail(levels, STEPS - round(strength * STEPS))
            times = torch.tensor(levels.times, dtype=torch.float64)

            def blended(i: int, x: Tensor, levels: Levels = levels, noise: Tensor = noise) -> Tensor:
                there = levels.alpha[i + 1] * known + levels.sigma[i + 1] * noise
                return free * x + (1 - free) * there

            x = noise if strength == 1 else schedule.add_noise(known, noise, times[0])
            with torch.no_grad():
                mine = run(
                    loaded.denoiser, x, solver.table(levels), PROMPT, Drawn(source), Hooks(after=blended)
                )  # fmt: skip
            assert gap(mine, decoded) < EXACT, (name, strength)
            assert gap((1 - free) * mine, (1 - free) * known) < EXACT


def test_a_corrector_keeps_what_the_pipeline_changed() -> None:
    """UniPC replaces the state it predicted; what a pipeline has done to that state in between stays."""
    original = diffusers.DDIMScheduler(**BETAS, clip_sample=False, prediction_type="sample")
    scheduler = as_scheduler("unipc", original, clean=False)
    results = []
    for shift in (0.0, 1.0):
        scheduler.set_timesteps(4)
        x = normal(1, 4, 8, 8)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(torch.zeros_like(x), t, x + shift * (i == 1)).prev_sample
        results.append(x)
    # where the data is 0 the flow only rescales
    levels = scheduler.levels
    expected = torch.full((1,), levels.sigma[-1] / levels.sigma[1])
    assert gap(results[1] - results[0], expected) < 1e-6 and float(expected) > 0.02


def test_dpm_solver_of_diffusers() -> None:
    """At diffusers' own times, "dpmpp-2m" makes DPMSolverMultistepScheduler's images, whatever their spacing and
    number, and "unipc" UniPCMultistepScheduler's."""
    latents = normal(2, 4, 8, 8)
    settings = [{"timestep_spacing": spacing, "steps_offset": 1} for spacing in ("leading", "trailing")]
    for steps, setting in zip((4, 16), settings, strict=True):
        for name, kind in (("dpmpp-2m", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler")):
            pipe = stable_diffusion(attrgetter(kind)(diffusers)(**BETAS, **setting))
            call = {**PROMPT, "latents": latents, "num_inference_steps": steps, "guidance_scale": 1.0}
            theirs = last_sample(pipe, **call)
            pipe.scheduler = as_scheduler(name, pipe, grid="original")
            assert gap(last_sample(pipe, **call), theirs) < EXACT, (setting, steps, name)
            assert len(pipe.scheduler.timesteps) == steps and pipe.scheduler.timesteps.dtype == torch.int64


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_ddim_of_diffusers(kind: str, clean: bool) -> None:
    """Our "ddim" at DDIM's own times is DDIMScheduler, for every prediction and both ends, in DDIMPipeline with its own
    arguments."""
    original = diffusers.DDIMScheduler(
        timestep_spacing="trailing", clip_sample=True, set_alpha_to_one=clean, prediction_type=kind
    )
    pipe = diffusers.DDIMPipeline(unet2d(), original)
    call = {"batch_size": 2, "num_inference_steps": STEPS, "use_clipped_model_output": True}
    theirs = last_sample(pipe, **call, generator=torch.Generator().manual_seed(1))
    pipe.scheduler = as_scheduler("ddim", pipe, grid="original", clean=clean)
    assert gap(last_sample(pipe, **call, generator=torch.Generator().manual_seed(1)), theirs) < EXACT
    with pytest.raises(ValueError, match=r"take as_scheduler\('ddim:eta=0.5'"):
        pipe(**call, eta=0.5)


def test_a_first_level_that_is_called_is_not_passed_twice() -> None:
    """The "leading" times without offset end at the first level of the table: its call goes to clean data."""
    original = diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="leading")
    pipe = diffusers.DDPMPipeline(unet2d(), original)
    loaded = from_pipeline(pipe)
    pipe.scheduler = as_scheduler("dpmpp-2m", original, grid="original")
    theirs = last_sample(pipe, batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([750.0, 500.0, 250.0, 0.0])
    levels = Levels.of(loaded.denoiser.schedule, times).denoised()
    assert pipe.scheduler.timesteps.tolist() == times.tolist()
    assert gap(sampled(loaded.denoiser, noise, levels, SOLVERS["dpmpp-2m"]()), theirs) < EXACT


LEVELS = {
    "EulerDiscreteScheduler": {**BETAS, "use_karras_sigmas": True},
    "KDPM2DiscreteScheduler": BETAS,
    "DEISMultistepScheduler": BETAS,
    "UniPCMultistepScheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {"shift": 2.0},
    "EDMDPMSolverMultistepScheduler": {},
}


@pytest.mark.parametrize("kind", LEVELS)
def test_original_levels(kind: str) -> None:
    """The levels of the replaced scheduler, each once, however it writes them down."""
    original = attrgetter(kind)(diffusers)(**LEVELS[kind])
    scheduler = as_scheduler("dpmpp-2m", original, grid="original")
    scheduler.set_timesteps(6)
    original.set_timesteps(6)
    levels = original.sigmas.unique_consecutive()
    assert torch.allclose(scheduler.sigmas[:-1], levels[:-1], rtol=2e-6) and scheduler.sigmas[-1] == 0


def flux(**config: Any) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=6, pooled_projection_dim=5, axes_dims_rope=(4, 2, 2), guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**config),
        vae=autoencoder(shift_factor=0.3), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_flux_and_its_resolution_dependent_shift(kind: str) -> None:
    """FluxPipeline computes mu from our config and passes sigmas that nobody asked for: "original" with Euler's method
    is its own image; our grid takes the shift; sigmas that somebody asked for are used."""
    config = {"use_dynamic_shifting": True, "time_shift_type": kind, "base_shift": 0.9, "max_shift": 1.4}
    pipe = flux(**config)
    latents = pipe._pack_latents(normal(2, 4, 8, 8), 2, 4, 8, 8)
    call = {**FLOW_PROMPT, "latents": latents, "guidance_scale": 3.5, "height": 16, "width": 16}
    theirs = last_sample(pipe, **call, num_inference_steps=STEPS)
    ours = as_scheduler("euler", pipe, grid="original")
    mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(16, base_shift=0.9, max_shift=1.4)
    pipe.scheduler = ours
    assert gap(last_sample(pipe, **call, num_inference_steps=STEPS), theirs) < EXACT

    shift = torch.tensor(mu).exp().item() if kind == "exponential" else mu
    pipe.scheduler = as_scheduler("dpmpp-2m", ours)
    last_sample(pipe, **call, num_inference_steps=STEPS)
    expected = balanced(FlowMatching(), STEPS, shift)[:-1]
    assert torch.allclose(pipe.scheduler.timesteps.double(), 1000 * expected, rtol=1e-6)

    last_sample(pipe, **call, sigmas=[1.0, 0.6, 0.2])
    asked = torch.tensor([1.0, 0.6, 0.2], dtype=torch.float64)
    assert torch.allclose(pipe.scheduler.timesteps.double(), 1000 * shift * asked / (1 + (shift - 1) * asked))


def test_given_times_are_obeyed() -> None:
    """timesteps= and sigmas= of a pipeline's call go before the grid, and end at pure data."""
    pipe = stable_diffusion()
    pipe.scheduler = as_scheduler("dpmpp-2m", pipe)
    call = {**PROMPT, "latents": normal(2, 4, 8, 8), "guidance_scale": 1.0}
    one = last_sample(pipe, **call, timesteps=[999, 600, 250, 20])
    assert pipe.scheduler.timesteps.tolist() == [999, 600, 250, 20]
    sigmas = pipe.scheduler.sigmas
    assert sigmas[-1] == 0 and len(sigmas) == 5
    for grid in (None, "original"):
        pipe.scheduler = as_scheduler("dpmpp-2m", pipe, grid=grid)
        two = last_sample(pipe, **call, sigmas=sigmas[:-1].tolist())
        assert pipe.scheduler.timesteps.tolist() == [999, 600, 250, 20] and torch.equal(one, two)
    given = as_scheduler("dpmpp-2m", pipe, grid=[999, 600, 250, 20, 0])
    given.set_timesteps(4)
    assert torch.equal(given.timesteps, pipe.scheduler.timesteps) and torch.equal(given.sigmas, sigmas)
    first_level = as_scheduler("dpmpp-2m", pipe, grid="trailing", clean=False)
    first_level.set_timesteps(4)
    times = trailing(first_level.reading.schedule, 4)
    assert first_level.timesteps.tolist() == times[:-1].tolist() and first_level.levels.times == tuple(times.tolist())


def every_solver() -> dict[str, Any]:
    from fewstep.sampling import DPMSolverPP2M, UniPC
    from fewstep.sampling.coefficients import NOISE
    from fewstep.sampling.solvers.dualfast import DualFast

    return {
        **{name: name for name in SOLVERS},
        "churn": RungeKutta(HEUN2, churn=Churn(30, low=0.05)),
        "ddim-eta": DDIM(eta=0.3),
        "unipc-noise": UniPC(p=3, variant="bh1", form=NOISE),
        "mixed": DualFast(DPMSolverPP2M(lower_order_final=True), weight=0.1),
    }


@pytest.mark.parametrize("name", every_solver())
def test_configs_are_plain_json(name: str, tmp_path: Any) -> None:
    """Saved and read again: the same solver, and so the same table."""
    given = every_solver()[name]
    scheduler = as_scheduler(given, diffusers.EulerDiscreteScheduler(**BETAS), grid="karras")
    scheduler.save_pretrained(tmp_path)
    text = (tmp_path / "scheduler_config.json").read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not plain JSON"))
    again = SolverScheduler.from_pretrained(tmp_path)
    expected = SOLVERS[name]() if isinstance(given, str) else given
    if isinstance(expected, ABM):
        expected = expected.for_noise_prediction()
    assert again.solver == scheduler.solver == expected
    scheduler.set_timesteps(6)
    again.set_timesteps(6)
    assert again.table.steps == scheduler.table.steps and again.to_json_string() == scheduler.to_json_string()


def test_parameters_and_config_of_the_replaced_scheduler() -> None:
    """Parameters of a named solver; the way back to a scheduler of diffusers and to another solver; a config as a
    source."""
    original = diffusers.DDIMScheduler(**BETAS, prediction_type="v_prediction", steps_offset=1)
    scheduler = as_scheduler("unipc:p=3,variant=bh1", original)
    assert scheduler.solver == SOLVERS["unipc"](p=3, variant="bh1")
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config["beta_end"] == 0.012
    back = diffusers.DDIMScheduler.from_config(scheduler.config)
    assert torch.equal(back.alphas_cumprod, original.alphas_cumprod) and back.config.steps_offset == 1
    twice = SolverScheduler.from_config(scheduler.config)
    assert twice.solver == scheduler.solver and twice.reading == scheduler.reading
    other = as_scheduler("ddim", scheduler)
    assert other.solver == DDIM() and other.reading == scheduler.reading
    plain = json.loads(original.to_json_string())
    assert as_scheduler("ddim", plain).reading == scheduler.reading == as_scheduler("ddim", scheduler.config).reading


@dataclass(frozen=True, eq=False)
class Measured(DDIM):
    """A solver that holds a tensor, as those with empirical statistics do."""

    statistics: Tensor = field(default_factory=lambda: torch.zeros(0))


def test_solvers_that_hold_tensors(tmp_path: Any) -> None:
    """They work as the others, copies included, and are not saved."""
    original = diffusers.DDIMScheduler(**BETAS, clip_sample=False)
    scheduler = as_scheduler(Measured(statistics=torch.ones(3)), original)
    plain = as_scheduler("ddim", scheduler)
    x = normal(1, 4, 8, 8)
    for made in (scheduler, copy.deepcopy(scheduler), plain):
        made.set_timesteps(3)
    for t in plain.timesteps[:1]:
        states = [made.step(x, t, x).prev_sample for made in (scheduler, copy.deepcopy(scheduler), plain)]
    assert torch.equal(states[0], states[2]) and torch.equal(states[1], states[2])
    with pytest.raises(ValueError, match="Measured holds tensors, which a scheduler's config cannot"):
        scheduler.save_pretrained(tmp_path)


def test_thresholding_of_the_replaced_scheduler() -> None:
    """Dynamic thresholding is that of the scheduler's config."""
    original = diffusers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e4, clip_sample=False
    )
    pipe = diffusers.DDPMPipeline(unet2d(), original)
    loaded = from_pipeline(pipe)
    pipe.scheduler = as_scheduler("dpmpp-2m", original)
    theirs = last_sample(pipe, batch_size=2, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1))
    noise, schedule = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), loaded.denoiser.schedule
    levels = to_data(schedule, balanced(schedule, STEPS))
    bounded = DynamicThreshold(loaded.denoiser, 0.9)
    assert gap(sampled(bounded, noise, levels, SOLVERS["dpmpp-2m"]()), theirs) < EXACT
    assert gap(sampled(loaded.denoiser, noise, levels, SOLVERS["dpmpp-2m"]()), theirs) > 0.1


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_types_and_copies(kind: torch.dtype) -> None:
    """States come back in the pipeline's type, half precision is computed in float32, and a copy made in the middle of
    a run goes on as the original does."""
    scheduler = as_scheduler("unipc", diffusers.DDIMScheduler(**BETAS, clip_sample=False))
    scheduler.set_timesteps(6)
    x = normal(2, 4, 8, 8).to(kind)
    outputs = [normal(2, 4, 8, 8, seed=k).to(kind) for k in range(6)]
    for t, output in zip(scheduler.timesteps[:3], outputs, strict=False):
        x = scheduler.step(output, t, x).prev_sample
    other, y = copy.deepcopy(scheduler), x
    for t, output in zip(scheduler.timesteps[3:], outputs[3:], strict=True):
        x = scheduler.step(output, t, x, return_dict=False)[0]
        y = other.step(output, t, y)["prev_sample"]
    assert x.dtype == kind and torch.equal(x, y)


def test_a_level_between_two_steps_opens_the_second() -> None:
    """Pipelines that slice the timesteps without set_begin_index begin where a step begins; Heun's list holds every
    inner level twice."""
    scheduler, x = as_scheduler("heun", diffusers.DDIMScheduler(**BETAS, clip_sample=False)), normal(1, 4, 8, 8)
    scheduler.set_timesteps(4)
    twice = scheduler.timesteps.tolist()
    assert twice[1] == twice[2] and twice[3] == twice[4] and len(twice) == 7 and scheduler.order == 2
    scheduler.step(x, scheduler.timesteps[3], x)
    assert scheduler.step_index == 5


def test_add_noise_is_the_forward_process() -> None:
    """For one timestep or one per sample, on tables and straight lines, as diffusers does it."""
    x, noise = normal(3, 4, 8, 8), normal(3, 4, 8, 8, seed=6)
    original = diffusers.DDPMScheduler(**BETAS)
    scheduler, steps = as_scheduler("unipc", original), torch.tensor([999, 400, 3])
    assert gap(scheduler.add_noise(x, noise, steps), original.add_noise(x, noise, steps)) < 1e-6
    flow = as_scheduler("unipc", diffusers.FlowMatchEulerDiscreteScheduler())
    assert gap(flow.scale_noise(x, torch.tensor([250.0]), noise), 0.75 * x + 0.25 * noise) < 1e-6
    with pytest.raises(ValueError, match="outside"):
        flow.scale_noise(x, torch.tensor([1250.0]), noise)


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra to install is named."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModuleNotFoundError, match=r"as_scheduler needs diffusers: pip install 'fewstep\[hub\]'"):
        as_scheduler("ddim", {"_class_name": "DDIMScheduler"})


def test_errors_name_the_choices() -> None:
    """One clear line each."""
    original = diffusers.DDIMScheduler(**BETAS)
    with pytest.raises(ValueError, match=r"solver='dpmpp-9' is not known; choose one of .*dpmpp-2m"):
        as_scheduler("dpmpp-9", original)
    with pytest.raises(ValueError, match="'q' is not a parameter"):
        as_scheduler("unipc:q=2", original)
    with pytest.raises(ValueError, match="p=0 must be at least 1"):
        as_scheduler("unipc:p=0", original)
    for adaptive in ("dpm-12", "dpm-23:rtol=0.1", AdaptiveDPMSolver(), {"class": "AdaptiveDPMSolver", "p": 2}):
        with pytest.raises(ValueError, match=r"solver=.*finds its steps as it goes.*such as 'abm' or 'dpm3'$"):
            as_scheduler(adaptive, original)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="finds its steps as it goes"):
            SolverScheduler.from_config(original.config, solver=adaptive)
    with pytest.raises(ValueError, match="grid='even' is not known; choose one of balanced, karras"):
        as_scheduler("ddim", original, grid="even")
    with pytest.raises(ValueError, match="num_inference_steps=3 are too few for TAB, which needs 4"):
        as_scheduler("deis", original).set_timesteps(3)
    with pytest.raises(ValueError, match="a function cannot be kept"):
        as_scheduler("ddim", original, grid=karras)
    with pytest.raises(ValueError, match="like=int: give a diffusers scheduler, a pipeline"):
        as_scheduler("ddim", 3)
    with pytest.raises(ValueError, match="no _class_name"):
        as_scheduler("ddim", {"beta_start": 0.1})
    with pytest.raises(ValueError, match="'VQDiffusionScheduler' is unknown; fewstep replaces DDIM"):
        as_scheduler("ddim", {"_class_name": "VQDiffusionScheduler"})
    for unknown in ({"class": "Magic"}, {"class": "DDIM", "theta": 1.0}, {}):
        config = {"solver": unknown, **json.loads(original.to_json_string())}
        with pytest.raises(ValueError, match="which this version does not know"):
            SolverScheduler.from_config(config)
    with pytest.raises(ValueError, match="invert_sigmas=True is not read"):
        as_scheduler("ddim", diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    scheduler, x = as_scheduler("ddim", original, grid=[900, 500, 0]), normal(1, 4, 8, 8)
    with pytest.raises(ValueError, match="steps=3, but the given grid of 3 times has 2 steps"):
        scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"times 1200 .. 500 leave the schedule's range \[0, 999\]"):
        scheduler.set_timesteps(timesteps=[1200, 500])
    with pytest.raises(ValueError, match="strictly decreasing"):
        scheduler.set_timesteps(timesteps=[500, 500])
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"timestep 300 is not one of this run's: \[900, 500\]"):
        scheduler.step(x, 300, x)
    scheduler.step(x, 900, x)
    with pytest.raises(ValueError, match="step\\(\\) at timestep 900, but call 1 of 2 is at 500"):
        scheduler.step(x, 900, x)
    scheduler.step(x, 500, x)
    with pytest.raises(ValueError, match="all 2 calls were made"):
        scheduler.step(x, 500, x)
    scheduler.set_timesteps(2)
    scheduler.set_begin_index(2)
    with pytest.raises(ValueError, match=r"begin_index=2 must lie in 0 \.\. 1"):
        scheduler.step(x, 500, x)
