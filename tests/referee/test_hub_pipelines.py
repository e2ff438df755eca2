"""What fewstep makes of the pipelines of diffusers: the same pictures, or one line that says what is in the way."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from tiny_pipelines import (  # noqa: E402
    EXACT,
    autoencoder,
    clip_text,
    ddim,
    flux,
    gap,
    inpainting,
    kandinsky,
    last_sample,
    latent_diffusion,
    ours,
    sana,
    sd3,
    seed_weights,  # noqa: F401
    stable_diffusion,
    unet2d,
    unet2d_condition,
    vq_model,
)

from fewstep.guidance import Guided  # noqa: E402
from fewstep.hub.diffusers import from_pipeline, wrap  # noqa: E402


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(latents: Tensor) -> Tensor:
    return (latents / 2 + 0.5).clamp(0, 1)


# --- autoencoders of other names --------------------------------------------------------------------------------


def test_ldm_decodes_with_its_vqvae() -> None:
    """LDMPipeline: the latents are its own, and decode makes its pictures."""
    pipe = latent_diffusion()
    loaded, start = from_pipeline(pipe), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    theirs = torch.from_numpy(pipe(2, num_inference_steps=4, output_type="np").images).permute(0, 3, 1, 2)
    mine = loaded.decode(ours(loaded.denoiser, start, loaded.grid(4).tolist()))
    assert mine.shape == (2, 3, 16, 16) and gap(pictures(mine), theirs) < 1e-5


def test_ldm_reads_prompts_with_its_bert() -> None:
    """LDMTextToImagePipeline: prompts are embedded as its call embeds them, under guidance too."""
    text = clip_text(projected=False)
    unet = unet2d_condition()
    pipe = diffusers.LDMTextToImagePipeline(autoencoder(), text["text_encoder"], text["tokenizer"], unet, ddim())
    pipe = pipe.to(torch.float64)
    loaded, start = from_pipeline(pipe), noise(2, 4, 2, 2)
    call = {"prompt": ["a b", "c"], "latents": start, "num_inference_steps": 4, "height": 16, "width": 16}
    theirs = last_sample(pipe, **call, guidance_scale=3.0)
    guided = Guided(loaded.denoiser, 3.0)
    assert gap(ours(guided, start, loaded.grid(4).tolist(), loaded.embed(["a b", "c"])), theirs) < EXACT


def test_kandinsky_takes_image_embeddings_and_decodes_with_its_movq() -> None:
    """KandinskyV22Pipeline under guidance: the same latents, the same pictures; without embeddings one line."""
    pipe = kandinsky().to(torch.float64)
    loaded, start, good, bad = from_pipeline(pipe), noise(2, 4, 16, 16), noise(2, 5, seed=2), noise(2, 5, seed=3)
    call = {
        "image_embeds": good, "negative_image_embeds": bad, "latents": start, "num_inference_steps": 4,
        "guidance_scale": 3.0, "height": 32, "width": 32, "output_type": "pt",
    }  # fmt: skip
    guided = Guided(loaded.denoiser, 3.0, {"image_embeds": bad})
    mine = ours(guided, start, loaded.grid(4).tolist(), {"image_embeds": good})
    assert gap(mine, last_sample(pipe, **call)) < EXACT
    assert gap(loaded.decode(mine), pipe(**call).images) < EXACT
    with torch.no_grad():
        images = noise(1, 3, 16, 16).clamp(-1, 1)
        assert torch.equal(loaded.encode(images), pipe.movq.encode(images).latents)
    with pytest.raises(ValueError, match=r"needs image_embeds \[B, 5\]"):
        loaded.denoiser(start, 500.0, {})
    with pytest.raises(ValueError, match=r"image_embeds has the shape \[2, 4\]"):
        loaded.denoiser(start, 500.0, {"image_embeds": good[:, :4]})
    with pytest.raises(ValueError, match=r"knows no empty prompt: pass cond, a dict of image_embeds \[B, 5\]"):
        loaded.denoiser(start, 500.0)
    with pytest.raises(ValueError, match="no text encoder"):
        loaded.embed(["a"])


def test_latents_are_in_the_units_of_each_autoencoder() -> None:
    """Scaled by LDM, as they are in LDM's upscaler and in Kandinsky: decoding undoes encoding's scale."""
    vq, images = vq_model().double(), noise(1, 3, 16, 16)
    with torch.no_grad():
        coded = vq.encode(images).latents
        unet = unet2d(in_channels=4, out_channels=4).double()
        small = unet2d(in_channels=7, out_channels=4).double()
        ldm = from_pipeline(diffusers.LDMPipeline(vq, unet, ddim()))
        upscaler = from_pipeline(diffusers.LDMSuperResolutionPipeline(vq, small, ddim()))
        assert torch.allclose(ldm.encode(images), coded * vq.config.scaling_factor, atol=1e-12)
        assert torch.allclose(upscaler.encode(images), coded, atol=1e-12)
        for loaded in (ldm, upscaler):
            assert torch.allclose(loaded.decode(loaded.encode(images)), vq.decode(coded).sample, atol=1e-9)


# --- conditions on pictures --------------------------------------------------------------------------------------


def test_inpainting_takes_mask_and_masked_latents() -> None:
    """StableDiffusionInpaintPipeline's 9 channels: what it puts beside the latents is the condition concat."""
    unet = unet2d_condition(in_channels=9)
    pipe = inpainting(unet).to(torch.float64)
    loaded, start, prompt = from_pipeline(pipe), noise(2, 4, 8, 8), noise(2, 7, 6, seed=2)
    seen: list[Tensor] = []
    handle = unet.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    mask = torch.zeros(2, 1, 16, 16, dtype=torch.float64)
    mask[:, :, :, 8:] = 1
    theirs = last_sample(
        pipe, prompt_embeds=prompt, image=noise(2, 3, 16, 16).clamp(-1, 1), mask_image=mask, latents=start,
        num_inference_steps=4, guidance_scale=1.0, height=16, width=16, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    handle.remove()
    beside = seen[0][:, 4:]
    assert torch.equal(beside[:, :1], mask[:, :, ::2, ::2])
    mine = ours(loaded.denoiser, start, loaded.grid(4).tolist(), {"prompt_embeds": prompt, "concat": beside})
    assert loaded.denoiser.shape == (4, 8, 8) and gap(mine, theirs) < EXACT
    with pytest.raises(ValueError, match=r"concat \[B, 5, any, any\] \(the mask, then the masked picture's latents\)"):
        loaded.denoiser(start, 500.0, prompt)
    with pytest.raises(ValueError, match=r"concat is \[4, 4\] large, the samples are \[8, 8\]"):
        loaded.denoiser(start, 500.0, {"prompt_embeds": prompt, "concat": beside[:, :, ::2, ::2]})


def test_upscalers_take_the_small_picture_and_its_noise_level() -> None:
    """StableDiffusionUpscalePipeline: 7 channels and class labels."""
    unet = unet2d_condition(in_channels=7, num_class_embeds=50)
    pipe = diffusers.StableDiffusionUpscalePipeline(
        vae=autoencoder(), text_encoder=None, tokenizer=None, unet=unet, low_res_scheduler=diffusers.DDPMScheduler(),
        scheduler=ddim(prediction_type="v_prediction"),
    ).to(torch.float64)  # fmt: skip
    loaded, start, prompt = from_pipeline(pipe), noise(2, 4, 8, 8), noise(2, 7, 6, seed=2)
    cond = {"prompt_embeds": prompt, "concat": noise(2, 3, 8, 8, seed=3), "class_labels": torch.tensor([20, 20])}
    with torch.no_grad():
        out = unet(torch.cat([start, cond["concat"]], dim=1), 500.0, prompt, cond["class_labels"]).sample
        mine = loaded.denoiser.raw(start, 500.0, cond)
    assert gap(mine, out) < EXACT
    with pytest.raises(ValueError, match=r"class_labels \[B\], concat"):
        loaded.denoiser(start, 500.0, prompt)


def test_flux_with_a_control_picture() -> None:
    """FluxControlPipeline: the control's latents are the second half of every token."""
    pipe = flux(in_channels=32, out_channels=16, kind="FluxControlPipeline")
    loaded, start, control = from_pipeline(pipe, size=(16, 16)), noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=4)
    cond = {"prompt_embeds": noise(2, 7, 6, seed=2), "pooled_prompt_embeds": noise(2, 5, seed=3), "concat": control}
    seen: list[Tensor] = []
    handle = loaded.denoiser.net.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["hidden_states"]), with_kwargs=True
    )
    loaded.denoiser(start, 0.5, cond)
    handle.remove()
    packed = [pipe._pack_latents(x, 2, 4, 8, 8) for x in (start, control)]
    assert loaded.denoiser.shape == (4, 8, 8) and torch.equal(seen[0], torch.cat(packed, dim=2))


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("StableDiffusionImg2ImgPipeline", True),
        ("TextToVideoZeroPipeline", True),
        ("LatentConsistencyModelPipeline", True),
        ("LEditsPPPipelineStableDiffusion", False),
        ("SemanticStableDiffusionPipeline", False),
    ],
)
def test_relatives_of_stable_diffusion_are_read_as_it(name: str, reads: bool) -> None:
    """Editing and video pipelines on the same network; where encode_prompt takes no prompt, the condition is given."""
    taken = inspect.signature(attrgetter(name)(diffusers)).parameters
    scheduler = diffusers.LCMScheduler if name.startswith("Latent") else ddim
    text = clip_text(projected=False)
    parts = {**CHECKED, **text, "unet": unet2d_condition(), "scheduler": scheduler}
    made = {part: make() if part in ("vae", "scheduler") else make for part, make in parts.items() if part in taken}
    loaded = from_pipeline(attrgetter(name)(diffusers)(**made))
    twin = from_pipeline(stable_diffusion(made["unet"], made["scheduler"]).to(torch.float32))
    twin.pipe.register_modules(**text)
    cond, x = twin.embed(["a b"]), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.denoiser(x, 500.0, cond), twin.denoiser(x, 500.0, cond))
    if reads:
        assert torch.equal(loaded.embed(["a b"])["prompt_embeds"], cond["prompt_embeds"])
    else:
        with pytest.raises(ValueError, match="no text encoder"):
            loaded.embed(["a b"])


# --- the guidance scale as an input -------------------------------------------------------------------------------


def lcm() -> Any:
    return stable_diffusion(unet2d_condition(time_cond_proj_dim=16), diffusers.LCMScheduler())


def test_lcm_takes_the_guidance_scale() -> None:
    """As a condition, and by default the pipeline's own: StableDiffusionPipeline's is 7.5, LCM's 8.5."""
    pipe = lcm()
    loaded, start, prompt = from_pipeline(pipe), noise(2, 4, 8, 8), noise(2, 7, 6, seed=2)
    call = {"prompt_embeds": prompt, "latents": start, "num_inference_steps": 1}
    given = {"prompt_embeds": prompt, "guidance_scale": torch.tensor([3.0, 3.0])}
    for cond, scale in ((given, {"guidance_scale": 3.0}), (prompt, {})):
        assert gap(loaded.denoiser(start, 999.0, cond), last_sample(pipe, **call, **scale)) < 2e-6
    own = diffusers.LatentConsistencyModelPipeline(**pipe.components, requires_safety_checker=False)
    assert from_pipeline(own).denoiser.net.guidance == 8.5
    assert wrap(pipe.unet, pipe.scheduler).net.guidance == 8.5
    with pytest.raises(ValueError, match="takes no 'guidance_scale', only prompt_embeds"):
        from_pipeline(stable_diffusion(unet2d_condition(), ddim())).denoiser(start, 500.0, given)


def test_flux_takes_the_guidance_scale() -> None:
    """A distilled Flux is given another guidance scale as a condition; the pipeline's own is the default."""
    pipe = flux()
    loaded, start = from_pipeline(pipe, size=(16, 16)), noise(2, 4, 8, 8)
    cond = {"prompt_embeds": noise(2, 7, 6, seed=2), "pooled_prompt_embeds": noise(2, 5, seed=3)}
    theirs = last_sample(
        pipe, **cond, latents=pipe._pack_latents(start, 2, 4, 8, 8), num_inference_steps=4, guidance_scale=2.0,
        height=16, width=16,
    )  # fmt: skip
    mine = ours(loaded.denoiser, start, loaded.grid(4).tolist(), {**cond, "guidance_scale": torch.full((2,), 2.0)})
    assert gap(pipe._pack_latents(mine, 2, 4, 8, 8), theirs) < EXACT
    assert gap(mine, ours(loaded.denoiser, start, loaded.grid(4).tolist(), cond)) > 1e-4


# --- sizes --------------------------------------------------------------------------------------------------------


def test_size_is_that_of_the_pictures_in_pixels() -> None:
    """Flux at another height and width equals its pipeline; what the network cannot make is refused."""
    pipe = flux()
    loaded, start = from_pipeline(pipe, size=(16, 24)), noise(2, 4, 8, 12)
    cond = {"prompt_embeds": noise(2, 7, 6, seed=2), "pooled_prompt_embeds": noise(2, 5, seed=3)}
    theirs = last_sample(
        pipe, **cond, latents=pipe._pack_latents(start, 2, 4, 8, 12), num_inference_steps=2, height=16, width=24
    )
    mine = ours(loaded.denoiser, start, loaded.grid(2).tolist(), cond)
    assert loaded.denoiser.shape == (4, 8, 12) and loaded.decode(mine).shape == (2, 3, 16, 24)
    assert gap(pipe._pack_latents(mine, 2, 4, 8, 12), theirs) < EXACT
    for size in ((16, 22), (0, 16), (-4, 16)):
        with pytest.raises(ValueError, match=r"height and width in pixels must be multiples of 4"):
            from_pipeline(pipe, size=size)
    assert from_pipeline(latent_diffusion(), size=(32, 16)).denoiser.shape == (4, 16, 8)


def test_sdxl_is_told_its_size() -> None:
    """The sizes that SDXL sees are those of the pictures asked for."""
    unet = unet2d_condition(
        cross_attention_dim=11, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 5,
    )  # fmt: skip
    first, second = clip_text(projected=False), clip_text(projected=True)
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(), unet=unet, scheduler=ddim(), **first, text_encoder_2=second["text_encoder"],
        tokenizer_2=second["tokenizer"], add_watermarker=False,
    ).to(torch.float64)  # fmt: skip
    loaded, start = from_pipeline(pipe, size=(16, 32)), noise(1, 4, 8, 16)
    theirs = last_sample(pipe, prompt=["a"], latents=start, num_inference_steps=2, height=16, width=32)
    guided = Guided(loaded.denoiser, 5.0)  # the pipeline's default
    assert gap(ours(guided, start, loaded.grid(2).tolist(), loaded.embed(["a"])), theirs) < EXACT


# --- what is refused ----------------------------------------------------------------------------------------------


SD = {"vae": autoencoder, "text_encoder": None, "tokenizer": None, "scheduler": ddim}
CHECKED = {**SD, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def unet(**changes: Any) -> Callable[[], Any]:
    return lambda: unet2d_condition(**changes)


def pixart() -> Any:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        cross_attention_dim=8, caption_channels=6, use_additional_conditions=False,
    )  # fmt: skip


def controlnet() -> Any:
    return diffusers.ControlNetModel.from_unet(unet2d_condition(), conditioning_embedding_out_channels=(8, 8))


def image_normalizer() -> Any:
    return diffusers.pipelines.stable_diffusion.StableUnCLIPImageNormalizer(5)


#: What is said, the pipeline's class, and its components (made by a call where they are functions).
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "its component 'controlnet' takes part": (
        "StableDiffusionControlNetPipeline", {**CHECKED, "unet": unet(), "controlnet": controlnet}
    ),
    "its component 'image_normalizer' takes part": (
        "StableUnCLIPImg2ImgPipeline",
        {**SD, "unet": unet(class_embed_type="projection", projection_class_embeddings_input_dim=10),
         "feature_extractor": None, "image_encoder": None, "image_normalizer": image_normalizer,
         "image_noising_scheduler": diffusers.DDPMScheduler},
    ),
    "takes 8 channels for samples of 4; fewstep does not know": (
        "MarigoldDepthPipeline", {**SD, "unet": unet(in_channels=8)}
    ),
    "takes 8 channels for samples of 4; fewstep does": (
        "StableDiffusionLatentUpscalePipeline", {**SD, "unet": unet(in_channels=8, out_channels=5)}
    ),
    "'PixArtTransformer2DModel' is unknown": ("PixArtAlphaPipeline", {**SD, "transformer": pixart}),
    "addition_embed_type 'image_hint' is not read": (
        "KandinskyV22ControlnetPipeline",
        {"unet": unet(in_channels=8, out_channels=8, encoder_hid_dim=5, encoder_hid_dim_type="image_proj",
                      addition_embed_type="image_hint"), "scheduler": ddim, "movq": vq_model},
    ),
    "its latents have 4": ("StableDiffusionPipeline", {**CHECKED, "unet": unet(in_channels=3, out_channels=3)}),
    "class_embed_type 'timestep' is not read": (
        "DDPMPipeline", {"unet": lambda: unet2d(class_embed_type="timestep"), "scheduler": diffusers.DDPMScheduler}
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_other_pipelines_are_refused_in_one_line(line: str) -> None:
    """Whatever else the pipeline feeds its network, or does to it, is named before anything is sampled."""
    name, components = REFUSED[line]
    made = {part: make() if callable(make) else make for part, make in components.items()}
    pipe = attrgetter(name)(diffusers)(**made)
    with pytest.raises(ValueError, match=line) as found:
        from_pipeline(pipe)
    assert "\n" not in str(found.value) and len(str(found.value)) < 300


def test_loaded_image_adapters_are_refused() -> None:
    """An IP-Adapter changes the network's conditions; it is to be unloaded first."""
    pipe = stable_diffusion(unet2d_condition(), ddim())
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(ValueError, match="'ip_image_proj' is not read"):
        from_pipeline(pipe)
    with pytest.raises(ValueError, match="SANA-Sprint"):
        wrap(diffusers.SanaTransformer2DModel(**{**sana().transformer.config, "guidance_embeds": True}), ddim())


def test_conditions_are_checked() -> None:
    """Unknown names, wrong widths and counts are named, before the network is called."""
    loaded = from_pipeline(sd3())
    start, prompt, pooled = noise(2, 4, 8, 8), noise(2, 7, 6, seed=2), noise(2, 5, seed=3)
    wrong = {
        r"needs pooled_prompt_embeds \[B, 5\] as well": {"prompt_embeds": prompt},
        "takes no 'pooled', only prompt_embeds, pooled_prompt_embeds": {
            "prompt_embeds": prompt, "pooled_prompt_embeds": pooled, "pooled": pooled
        },
        r"prompt_embeds has the shape \[2, 7, 5\], this SD3Transformer2DModel needs \[B, any, 6\] for 2": {
            "prompt_embeds": prompt[..., :5], "pooled_prompt_embeds": pooled
        },
        r"pooled_prompt_embeds has the shape \[1, 5\]": {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled[:1]},
    }  # fmt: skip
    for line, cond in wrong.items():
        with pytest.raises(ValueError, match=line):
            loaded.denoiser(start, 0.5, cond)
