"""Tiny random pipelines of diffusers, made in memory, and what is done with them in several files of tests."""

from __future__ import annotations

from functools import wraps
from itertools import pairwise
from operator import attrgetter
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fewstep.denoisers import Denoiser
from fewstep.flow_maps import ddim_move

#: Of float64 models; what is left is the float32 of the schedulers' tables.
EXACT = 1e-6


@pytest.fixture(autouse=True)
def seed_weights() -> None:
    """Imported where every test is to begin with the same weights."""
    torch.manual_seed(0)


@torch.no_grad()
def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the size of the images where that is above 1: an untrained network at
    alpha = 0.006 makes images of size 100."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1))


def unet2d(**changes: Any) -> Any:
    config = {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1,
        "norm_num_groups": 4, "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DModel(**{**config, **changes})


def unet2d_condition(**changes: Any) -> Any:
    config = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 6,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**config, **changes})


def autoencoder(**changes: Any) -> Any:
    config = {
        "block_out_channels": (4, 8), "latent_channels": 4, "norm_num_groups": 2, "sample_size": 16,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    return diffusers.AutoencoderKL(**{**config, **changes})


def stable_diffusion(unet: Any, scheduler: Any) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(), unet=unet, scheduler=scheduler, text_encoder=None, tokenizer=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).to(torch.float64)  # fmt: skip


def clip_text(projected: bool) -> dict[str, Any]:
    """A text encoder and its tokenizer for the letters a to c."""
    transformers = pytest.importorskip("transformers")
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "c</w>", "a", "b", "c"]
    tokenizer = transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)
    config = transformers.CLIPTextConfig(
        vocab_size=8, hidden_size=6 if not projected else 5, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=1, max_position_embeddings=77, projection_dim=5, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return {"text_encoder": kind(config), "tokenizer": tokenizer}


def ddim(spacing: str = "trailing", **changes: Any) -> Any:
    return diffusers.DDIMScheduler(
        **{"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": spacing, **changes}
    )


def last_sample(pipe: Any, **call: Any) -> Tensor:
    """What the pipeline's last scheduler step gave, before it is clipped to pictures or decoded."""
    seen: list[Tensor] = []
    plain = pipe.scheduler.step

    @wraps(plain)  # pipelines look at the arguments that step takes
    def step(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        seen.append(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out

    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.step = step
    pipe(**call)
    del pipe.scheduler.step  # the class's own is behind it
    return seen[-1]


@torch.no_grad()
def ours(denoiser: Denoiser, x: Tensor, times: list[float], cond: Any = None) -> Tensor:
    """DDIM along ``times``: on flow matching that is Euler's method."""
    grid = torch.tensor(times, dtype=torch.float64)
    for t, s in pairwise(grid):
        x = ddim_move(x, denoiser(x, t, cond), t, s, denoiser.schedule)
    return x


def dit() -> Any:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip


def sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=5, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.3),
        text_encoder=None, text_encoder_2=None, text_encoder_3=None, tokenizer=None, tokenizer_2=None, tokenizer_3=None,
    ).to(torch.float64)  # fmt: skip


def sd3_with_text() -> Any:
    """With two CLIP text encoders; the pipeline puts zeros in the place of the third."""
    pipe, clip = sd3(), clip_text(projected=True)
    pipe.register_modules(**clip, text_encoder_2=clip["text_encoder"], tokenizer_2=clip["tokenizer"])
    pipe.transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=8, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    return pipe.to(torch.float64)


def flux(kind: str = "FluxPipeline", **changes: Any) -> Any:
    config = {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 6, "pooled_projection_dim": 5, "axes_dims_rope": (4, 2, 2), "guidance_embeds": True,
    }  # fmt: skip
    return attrgetter(kind)(diffusers)(
        transformer=diffusers.FluxTransformer2DModel(**{**config, **changes}), vae=autoencoder(shift_factor=0.3),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0),
        text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
    ).to(torch.float64)  # fmt: skip


def sana() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=6,
        sample_size=8, timestep_scale=0.5,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock",) * 2, encoder_layers_per_block=(1, 1),
        decoder_block_types=("ResBlock",) * 2, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.4,
    )  # fmt: skip
    return diffusers.SanaPipeline(
        transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None
    ).to(torch.float64)


def sana_with_text(timestep_scale: float = 0.001) -> Any:
    """With an encoder of the letters a to c, and queries and keys under RMS norms; told t in [0, 1] as SANA-Sprint's
    teachers are, unless another scale is given."""
    transformers = pytest.importorskip("transformers")
    pipe, clip = sana(), clip_text(projected=False)
    # the pipeline writes an instruction of some hundred letters before every prompt
    config = {**clip["text_encoder"].config.to_dict(), "max_position_embeddings": 2048}
    pipe.register_modules(
        tokenizer=clip["tokenizer"], text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    )
    pipe.transformer = diffusers.SanaTransformer2DModel.from_config(
        {**pipe.transformer.config, "timestep_scale": timestep_scale, "qk_norm": "rms_norm_across_heads"}
    )
    return pipe


def vq_model(**changes: Any) -> Any:
    config = {
        "latent_channels": 4, "block_out_channels": (4, 8), "norm_num_groups": 2, "num_vq_embeddings": 16,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    return diffusers.VQModel(**{**config, **changes})


def latent_diffusion(**changes: Any) -> Any:
    """LDM: a U-Net on the latents of a VQ model."""
    unet = unet2d(in_channels=4, out_channels=4, **changes)
    return diffusers.LDMPipeline(vq_model(), unet, ddim(prediction_type="v_prediction"))


def kandinsky() -> Any:
    """Kandinsky 2.2: a U-Net conditional on image embeddings, with a learned variance, on the latents of a MoVQ."""
    unet = unet2d_condition(
        out_channels=8, encoder_hid_dim=5, encoder_hid_dim_type="image_proj", addition_embed_type="image"
    )
    movq = vq_model(norm_type="spatial", vq_embed_dim=4, block_out_channels=(32, 32))
    return diffusers.KandinskyV22Pipeline(unet, ddim(prediction_type="v_prediction"), movq)


def inpainting(unet: Any) -> Any:
    return diffusers.StableDiffusionInpaintPipeline(
        vae=autoencoder(), unet=unet, scheduler=ddim(prediction_type="v_prediction"), text_encoder=None, tokenizer=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
