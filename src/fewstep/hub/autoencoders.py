"""The autoencoder of a diffusers pipeline, whatever its component is called, and the units of its latents.

==========  ============================================  =============================================
component   pipelines                                     latents of the network
==========  ============================================  =============================================
``vae``     Stable Diffusion, Flux, Sana, DiT ...         times the scaling factor, shifted or whitened
``vqvae``   LDM (super-resolution: neither of the two)    times the scaling factor; decoding quantises
``movq``    Kandinsky                                     as they are; decoding does not quantise
==========  ============================================  =============================================
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fewstep.randomness import Rng

#: Names of the component that decodes latents.
AUTOENCODERS = ("vae", "vqvae", "movq")
#: The lists of widths, one a resolution, that the configs of autoencoders hold.
WIDTHS = ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels")


def autoencoder_name(pipe: Any) -> str | None:
    """The name of a pipeline's autoencoder among its components; None for a pixel model."""
    return next((name for name in AUTOENCODERS if pipe.components.get(name) is not None), None)


def latent_channels(pipe: Any) -> int | None:
    """The channels of the latents; None for a pixel model."""
    name = autoencoder_name(pipe)
    return None if name is None else int(pipe.components[name].config.latent_channels)


def picture_channels(pipe: Any) -> int | None:
    """The channels of decoded pictures (LDM3D's hold a depth map, too); None for a pixel model."""
    name = autoencoder_name(pipe)
    return None if name is None else int(pipe.components[name].config.get("out_channels", 3))


def pixels_per_latent(pipe: Any) -> int:
    """The side of the square of pixels that one place of the latents stands for; 1 for a pixel model."""
    name = autoencoder_name(pipe)
    if name is None:
        return 1
    config = pipe.components[name].config
    widths = next(config[key] for key in WIDTHS if key in config)
    return int(2 ** (len(widths) - 1))


def step_of_sides(pipe: Any, patch: int) -> int:
    """What the sides of pictures must be multiples of, in pixels, for a network of patches of ``patch`` latents."""
    scale = pixels_per_latent(pipe)
    # Kandinsky rounds its latents to multiples of the scale
    return scale * (scale if autoencoder_name(pipe) == "movq" else patch)


def latent_units(pipe: Any) -> tuple[list[float], list[float]]:
    """``(mean, scale)``, one number or one a channel: the network sees ``(the autoencoder's latents - mean) scale``."""
    name = autoencoder_name(pipe)
    if name in (None, "movq") or type(pipe).__name__ == "LDMSuperResolutionPipeline":
        return [0.0], [1.0]
    config = pipe.components[name].config
    if name == "vqvae":
        return [0.0], [config.scaling_factor]
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return list(mean), [config.scaling_factor / value for value in std]
    return [config.get("shift_factor") or 0.0], [config.scaling_factor]


def encode(pipe: Any, images: Tensor, rng: Rng | None = None) -> Tensor:
    """Pictures ``[B, C, H, W]`` in [-1, 1] as the network's latents: the mean of the autoencoder's law, or a draw from
    it when ``rng`` is given (autoencoders without a law have no draws)."""
    name = autoencoder_name(pipe)
    if name is None:
        return images
    coded = pipe.components[name].encode(images)
    if "latent_dist" in coded:
        law = coded.latent_dist
        latents = law.mean if rng is None else law.mean + law.std * rng.normal_like(law.mean)
    else:
        latents = coded[0]
    mean, scale = _units(pipe, latents)
    return (latents - mean) * scale


def decode(pipe: Any, latents: Tensor, autoencoder: Any = None) -> Tensor:
    """Pictures in [-1, 1] (not clipped) from the network's latents, by the pipeline's autoencoder or a copy of it."""
    name = autoencoder_name(pipe)
    if name is None:
        return latents
    autoencoder = pipe.components[name] if autoencoder is None else autoencoder
    latents = latents.to(autoencoder.device, autoencoder.dtype)
    mean, scale = _units(pipe, latents)
    how = {"force_not_quantize": True} if name == "movq" else {}
    pictures: Tensor = autoencoder.decode(latents / scale + mean, return_dict=False, **how)[0]
    return pictures


def _units(pipe: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    mean, scale = (latents.new_tensor(values)[:, None, None] for values in latent_units(pipe))
    return mean, scale
