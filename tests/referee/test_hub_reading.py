"""Diffusers pipelines read as denoisers: our loops give the pipelines' own images (tiny random models, no download)."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from tiny_pipelines import (  # noqa: E402
    EXACT,
    autoencoder,
    clip_text,
    ddim,
    dit,
    flux,
    gap,
    last_sample,
    ours,
    sana,
    sd3,
    sd3_with_text,
    seed_weights,  # noqa: F401
    stable_diffusion,
    unet2d,
    unet2d_condition,
)

from fewstep.discrete_vp import DiscreteVP  # noqa: E402
from fewstep.guidance import Guided  # noqa: E402
from fewstep.hub.diffusers import LoadedPipeline, from_pipeline, load_model, load_pipeline, wrap  # noqa: E402
from fewstep.hub.schedulers import read_scheduler  # noqa: E402
from fewstep.hub.text_adapters import guidance_embedding  # noqa: E402
from fewstep.randomness import Rng  # noqa: E402
from fewstep.schedules import EDM, FlowMatching  # noqa: E402


@pytest.mark.parametrize(
    ("betas", "kind"),
    [
        ({"beta_schedule": "linear"}, "epsilon"),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, "v_prediction"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "sample"),
        ({"trained_betas": [1e-3 + 1e-5 * i for i in range(200)], "num_train_timesteps": 200}, "epsilon"),
        ({"beta_schedule": "linear", "rescale_betas_zero_snr": True}, "v_prediction"),
    ],
)
def test_unconditional_unet_gives_the_ddim_pipelines_images(betas: dict[str, Any], kind: str) -> None:
    """Every beta table with every prediction: our DDIM on the denoiser equals DDIMPipeline."""
    pipe = diffusers.DDIMPipeline(unet2d(), ddim(prediction_type=kind, **betas)).to(torch.float64)
    loaded = from_pipeline(pipe)
    theirs = last_sample(pipe, batch_size=3, num_inference_steps=5, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert isinstance(loaded.denoiser.schedule, DiscreteVP) and loaded.denoiser.shape == (3, 8, 8)
    assert gap(ours(loaded.denoiser, noise, loaded.grid(5).tolist()), theirs) < EXACT


def test_float32_is_within_the_promise() -> None:
    """In float32, the type that pipelines run in, the images agree to 1e-4 (of their size)."""
    pipe = diffusers.DDIMPipeline(unet2d(), ddim())
    loaded = from_pipeline(pipe)
    theirs = last_sample(pipe, batch_size=3, num_inference_steps=5, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert gap(ours(loaded.denoiser, noise, loaded.grid(5).tolist()), theirs) < 1e-5


def test_class_labels_reach_the_unet() -> None:
    """A class-conditional UNet2DModel equals its pipeline label by label; without a null label None is refused."""
    pipe = diffusers.ConsistencyModelPipeline(unet2d(num_class_embeds=5), ddim()).to(torch.float64)
    loaded = from_pipeline(pipe)
    labels = torch.tensor([4, 0, 2])
    theirs = last_sample(
        pipe, batch_size=3, class_labels=labels, num_inference_steps=4, generator=torch.Generator().manual_seed(1)
    )
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    times = loaded.grid(4).tolist()
    assert loaded.denoiser.classes == 5
    assert gap(ours(loaded.denoiser, noise, times, labels), theirs) < EXACT
    assert gap(ours(loaded.denoiser, noise, times, labels.flip(0)), theirs) > 1e-3
    with pytest.raises(ValueError, match="no null label"):
        loaded.denoiser(noise, 500.0)


def test_text_conditions_and_guidance_give_stable_diffusions_images() -> None:
    """A UNet2DConditionModel with prompt embeddings under guidance equals StableDiffusionPipeline, and so do its
    decoded pictures."""
    pipe = stable_diffusion(unet2d_condition(), ddim("leading", beta_schedule="scaled_linear", steps_offset=1))
    loaded = from_pipeline(pipe)
    noise, prompt, negative = (torch.randn(2, *s, dtype=torch.float64) for s in ((4, 8, 8), (7, 6), (7, 6)))
    call = {
        "prompt_embeds": prompt, "negative_prompt_embeds": negative, "latents": noise, "num_inference_steps": 4,
        "guidance_scale": 3.0,
    }  # fmt: skip
    guided = Guided(loaded.denoiser, 3.0, {"prompt_embeds": negative})
    mine = ours(guided, noise, [751.0, 501.0, 251.0, 1.0, 0.0], {"prompt_embeds": prompt})
    assert gap(mine, last_sample(pipe, **call)) < EXACT
    pictures = pipe(**call, output_type="pt").images
    assert gap((loaded.decode(mine) / 2 + 0.5).clamp(0, 1), pictures) < EXACT
    # a bare tensor is the prompt embedding, too
    assert torch.equal(loaded.denoiser(noise, 500.0, prompt), loaded.denoiser(noise, 500.0, {"prompt_embeds": prompt}))


def test_sdxl_takes_its_added_conditions() -> None:
    """The pooled embedding and the sizes of SDXL reach the network."""
    unet = unet2d_condition(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 5
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(), unet=unet, scheduler=ddim(beta_schedule="scaled_linear"), text_encoder=None,
        text_encoder_2=None, tokenizer=None, tokenizer_2=None, add_watermarker=False,
    ).to(torch.float64)  # fmt: skip
    loaded = from_pipeline(pipe)
    noise, prompt = (torch.randn(2, *s, dtype=torch.float64) for s in ((4, 8, 8), (7, 6)))
    pooled = torch.randn(2, 5, dtype=torch.float64)
    theirs = last_sample(
        pipe, prompt_embeds=prompt, pooled_prompt_embeds=pooled, latents=noise, num_inference_steps=4,
        guidance_scale=1.0, original_size=(16, 16), target_size=(16, 16),
    )  # fmt: skip
    sizes = torch.tensor([[16, 16, 0, 0, 16, 16]], dtype=torch.float64).expand(2, 6)
    cond = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled, "time_ids": sizes}
    assert gap(ours(loaded.denoiser, noise, loaded.grid(4).tolist(), cond), theirs) < EXACT


def test_prompts_are_embedded_as_the_pipeline_embeds_them() -> None:
    """embed(prompts) is the pipeline's own condition, and None is the empty prompt of its guidance."""
    pipe = stable_diffusion(unet2d_condition(), ddim())
    pipe.register_modules(**clip_text(projected=False))
    pipe.to(torch.float64)
    loaded, noise = from_pipeline(pipe), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    theirs = last_sample(pipe, prompt=["a b", "c"], latents=noise, num_inference_steps=4, guidance_scale=5.0)
    cond = loaded.embed(["a b", "c"])
    assert gap(ours(Guided(loaded.denoiser, 5.0), noise, loaded.grid(4).tolist(), cond), theirs) < EXACT


def test_sdxl_prompts_bring_their_pooled_embedding_and_sizes() -> None:
    """The same for SDXL, which guides away from zeros; a prompt that is empty is a prompt all the same."""
    unet = unet2d_condition(
        cross_attention_dim=11, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 5,
    )  # fmt: skip
    first, second = clip_text(projected=False), clip_text(projected=True)
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(), unet=unet, scheduler=ddim(), **first, text_encoder_2=second["text_encoder"],
        tokenizer_2=second["tokenizer"], add_watermarker=False,
    ).to(torch.float64)  # fmt: skip
    loaded, noise = from_pipeline(pipe), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    theirs = last_sample(pipe, prompt=["a b", "c"], latents=noise, num_inference_steps=4, guidance_scale=5.0)
    cond = loaded.embed(["a b", "c"])
    assert gap(ours(Guided(loaded.denoiser, 5.0), noise, loaded.grid(4).tolist(), cond), theirs) < EXACT
    theirs = last_sample(pipe, prompt=["", ""], latents=noise, num_inference_steps=4, guidance_scale=1.0)
    assert gap(ours(loaded.denoiser, noise, loaded.grid(4).tolist(), loaded.embed(["", ""])), theirs) < EXACT
    assert gap(ours(loaded.denoiser, noise, loaded.grid(4).tolist()), theirs) > 1e-3  # zeros make other images


def test_dit_keeps_the_mean_and_drops_the_learned_variance() -> None:
    """DiT with its 8 output channels equals DiTPipeline, guided (label 1000 is the null label) and not."""
    pipe = diffusers.DiTPipeline(dit(), autoencoder(), ddim()).to(torch.float64)
    loaded = from_pipeline(pipe)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels, times = torch.tensor([3, 970]), loaded.grid(4).tolist()
    for weight, denoiser in ((1.0, loaded.denoiser), (4.0, Guided(loaded.denoiser, 4.0))):
        theirs = last_sample(
            pipe, class_labels=[3, 970], guidance_scale=weight, num_inference_steps=4,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        assert gap(ours(denoiser, noise, times, labels), theirs[:2]) < EXACT
    assert loaded.denoiser.classes == 1000 and loaded.denoiser.shape == (4, 8, 8)


def test_dit_does_not_drop_labels_while_training() -> None:
    """In training mode two calls agree: diffusers' own random label dropout is off."""
    denoiser = wrap(dit(), ddim()).train()
    x, labels = torch.randn(64, 4, 8, 8), torch.arange(64)
    assert torch.equal(denoiser(x, 500.0, labels), denoiser(x, 500.0, labels))


FLOW_COND = {"prompt_embeds": torch.randn(2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))}
POOLED = {
    "pooled_prompt_embeds": torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
}


def test_sd3_is_eulers_method_on_straight_lines() -> None:
    """SD3Transformer2DModel: our Euler along the scheduler's shifted times equals StableDiffusion3Pipeline."""
    pipe = sd3()
    loaded, noise = from_pipeline(pipe), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    theirs = last_sample(
        pipe, **FLOW_COND, **POOLED, latents=noise, num_inference_steps=4, guidance_scale=1.0,
        sigmas=[1.0, 0.75, 0.5, 0.25],
    )  # fmt: skip
    mine = ours(loaded.denoiser, noise, loaded.grid(4).tolist(), {**FLOW_COND, **POOLED})
    assert loaded.reading.shift == 3.0 and isinstance(loaded.denoiser.schedule, FlowMatching)
    assert gap(mine, theirs) < EXACT


def test_flux_works_on_plain_latents() -> None:
    """FluxTransformer2DModel: tokens, places and the guidance input are the pipeline's."""
    pipe = flux()
    loaded, noise = from_pipeline(pipe, size=(16, 16)), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    packed = pipe._pack_latents(noise, 2, 4, 8, 8)
    theirs = last_sample(
        pipe, **FLOW_COND, **POOLED, latents=packed, num_inference_steps=4, guidance_scale=3.5, height=16, width=16
    )
    mine = ours(loaded.denoiser, noise, loaded.grid(4).tolist(), {**FLOW_COND, **POOLED})
    assert loaded.denoiser.shape == (4, 8, 8)
    assert gap(pipe._pack_latents(mine, 2, 4, 8, 8), theirs) < EXACT


def test_sana_takes_the_attention_mask_and_the_time_scale() -> None:
    """SanaTransformer2DModel equals SanaPipeline; its usual solver is read as flow matching, too."""
    pipe = sana()
    loaded, noise = from_pipeline(pipe), torch.randn(2, 4, 16, 16, dtype=torch.float64)
    assert (loaded.reading.shift, loaded.denoiser.schedule) == (3.0, FlowMatching())
    # that solver rounds its times to integers, which no exact comparison survives
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    theirs = last_sample(
        pipe, **FLOW_COND, prompt_attention_mask=mask, latents=noise, num_inference_steps=4, guidance_scale=1.0,
        height=32, width=32, use_resolution_binning=False, output_type="latent", sigmas=loaded.grid(4)[:-1].tolist(),
    )  # fmt: skip
    cond = {**FLOW_COND, "prompt_attention_mask": mask}
    assert gap(ours(loaded.denoiser, noise, loaded.grid(4).tolist(), cond), theirs) < EXACT


def test_flow_transformers_take_their_pipelines_prompts() -> None:
    """embed(prompts) of Stable Diffusion 3, Flux and Sana is what their pipelines condition on."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=8, d_model=6, d_kv=3, d_ff=8, num_layers=1, num_heads=2)
    t5 = transformers.T5EncoderModel(config).eval()
    clip = clip_text(projected=True)
    noise = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    call = {"prompt": ["a b", "c"], "num_inference_steps": 2, "sigmas": [1.0, 0.5], "height": 32, "width": 32}

    pipe = sd3_with_text()
    loaded = from_pipeline(pipe)
    theirs = last_sample(pipe, **call, latents=noise, guidance_scale=1.0)
    assert gap(ours(loaded.denoiser, noise, loaded.grid(2).tolist(), loaded.embed(["a b", "c"])), theirs) < EXACT

    pipe = flux()
    clip_only = clip_text(projected=False)
    clip_only["text_encoder"] = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=8, hidden_size=5, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=77, eos_token_id=1, bos_token_id=0,
        )
    )  # fmt: skip
    pipe.register_modules(**clip_only, text_encoder_2=t5, tokenizer_2=clip_only["tokenizer"])
    pipe.to(torch.float64)
    loaded = from_pipeline(pipe)
    packed = pipe._pack_latents(noise, 2, 4, 16, 16)
    theirs = last_sample(pipe, **call, latents=packed, guidance_scale=3.5)
    mine = ours(loaded.denoiser, noise, loaded.grid(2).tolist(), loaded.embed(["a b", "c"]))
    assert gap(pipe._pack_latents(mine, 2, 4, 16, 16), theirs) < EXACT

    pipe = sana()
    pipe.register_modules(text_encoder=t5, tokenizer=clip["tokenizer"])
    pipe.to(torch.float64)
    loaded = from_pipeline(pipe)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    call["sigmas"] = loaded.grid(2)[:-1].tolist()
    theirs = last_sample(
        pipe, **call, latents=noise, guidance_scale=4.5, use_resolution_binning=False, output_type="latent"
    )
    guided = Guided(loaded.denoiser, 4.5)
    assert gap(ours(guided, noise, loaded.grid(2).tolist(), loaded.embed(["a b", "c"])), theirs) < EXACT


def test_features_are_those_of_the_middle() -> None:
    """Discriminators get activations of the promised shape that follow the input, from every kind of network."""
    text = {**FLOW_COND, **POOLED}
    labels = torch.tensor([0, 1])
    networks = [
        (from_pipeline(stable_diffusion(unet2d_condition(), ddim())).denoiser, FLOW_COND),
        (wrap(dit().double(), ddim()), labels),
        (from_pipeline(sd3()).denoiser, text),
        (from_pipeline(flux(), size=(16, 32)).denoiser, text),
        (from_pipeline(sana()).denoiser, FLOW_COND),
        (wrap(unet2d(in_channels=4, out_channels=4, num_class_embeds=2).double(), ddim()), labels),
    ]
    for denoiser, cond in networks:
        x = torch.randn(2, *denoiser.shape, dtype=torch.float64, requires_grad=True)
        features = denoiser.net.features(x, torch.full((2,), 500.0), cond)
        assert features.shape == (2, *denoiser.net.feature_shape), type(denoiser.net)
        (gradient,) = torch.autograd.grad(features.square().sum(), x)
        assert float(gradient.abs().amax(1).min()) > 0  # every place is seen


def test_edm_scheduler_is_read_as_edm() -> None:
    """EDMEulerScheduler's preconditioning and time input are EDMPrediction's on the EDM schedule."""
    scheduler, model = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=20.0), unet2d().double()
    denoiser = wrap(model, scheduler)
    scheduler.set_timesteps(6)
    x = 20.0 * torch.randn(2, 3, 8, 8, dtype=torch.float64)
    mine = ours(denoiser, x, scheduler.sigmas.tolist())
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    assert denoiser.schedule == EDM(0.01, 20.0)
    # the scheduler keeps the state in float32
    assert gap(mine, x.double()) < 1e-5


def test_guidance_embedding_is_diffusers() -> None:
    """The guidance weight that LCM's U-Nets take is embedded as the pipelines embed it."""
    pipe = stable_diffusion(unet2d_condition(time_cond_proj_dim=16), diffusers.LCMScheduler())
    w = torch.tensor([0.0, 3.0, 7.5])
    assert gap(guidance_embedding(w, 16), pipe.get_guidance_scale_embedding(w, 16)) < 1e-6
    loaded = from_pipeline(pipe)
    x, prompt = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 7, 6, dtype=torch.float64)
    theirs = last_sample(pipe, prompt_embeds=prompt, latents=x, num_inference_steps=1, guidance_scale=8.5)
    mine = loaded.denoiser(x, 999.0, prompt, w=torch.full((2,), 7.5, dtype=torch.float64))
    assert gap(mine, theirs) < 2e-6


def test_autoencoder_goes_both_ways() -> None:
    """encode and decode use the autoencoder's scaling and shift; with rng the latents are drawn from its law."""
    pipe = sd3()
    loaded, images = from_pipeline(pipe), torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        law = pipe.vae.encode(images).latent_dist
        expected = (law.mean - 0.3) * pipe.vae.config.scaling_factor
        assert torch.allclose(loaded.encode(images), expected, atol=1e-12)
        assert torch.allclose(loaded.decode(expected), pipe.vae.decode(law.mean).sample, atol=1e-12)
        drawn = (loaded.encode(images, Rng(1)) - expected) / (law.std * pipe.vae.config.scaling_factor)
        assert torch.allclose(drawn, Rng(1).normal(2, 4, 8, 8, dtype=torch.float64), atol=1e-9)
        pipe = sana()
        latents, loaded = torch.randn(2, 4, 8, 8, dtype=torch.float64), from_pipeline(pipe)
        assert torch.allclose(loaded.decode(latents), pipe.vae.decode(latents / 0.4).sample, atol=1e-12)
        assert torch.allclose(loaded.encode(images), pipe.vae.encode(images).latent * 0.4, atol=1e-12)
    assert torch.equal(from_pipeline(diffusers.DDIMPipeline(unet2d(), ddim())).decode(images), images)


def test_folder_round_trip(tmp_path: Any) -> None:
    """A saved pipeline and a saved bare model are read from their folders with the same output."""
    pipe = diffusers.DDPMPipeline(unet2d(), diffusers.DDPMScheduler())
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded: LoadedPipeline = load_pipeline(tmp_path / "pipeline")
    bare = load_model(tmp_path / "pipeline" / "unet", pipe.scheduler)
    x = torch.randn(2, 3, 8, 8)
    expected = from_pipeline(pipe).denoiser(x, 321.0).detach()
    assert torch.equal(loaded.denoiser(x, 321.0), expected) and torch.equal(bare(x, 321.0), expected)
    assert loaded.reading.clip == 1.0  # DDPMScheduler clips by default
    assert float(loaded.clipped(x, 321.0).detach().abs().max()) <= 1 < float(expected.abs().max())


def test_every_scheduler_of_the_family_reads_the_same_table() -> None:
    """Schedulers differ in the solver only: the same betas are read from each."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    config = {**betas, "prediction_type": "v_prediction"}
    expected = read_scheduler(ddim(**config)).schedule
    for name in ("DDPM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LCM", "TCD", "PNDM", "HeunDiscrete"):
        assert read_scheduler(attrgetter(f"{name}Scheduler")(diffusers)(**config)).schedule == expected, name
    for name in ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"):
        reading = read_scheduler(attrgetter(f"{name}Scheduler")(diffusers)(shift=3.0))
        assert (reading.schedule, reading.shift, reading.prediction.time_scale) == (FlowMatching(), 3.0, 1000.0), name
