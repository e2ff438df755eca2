"""The pipeline that exported students carry when no pipeline of diffusers calls their network.

This file is copied, as it stands, into the exported folder and runs there without fewstep.  It draws noise, plays
the scheduler's plan on the network, decodes latents where there is an autoencoder, and returns samples.
"""

# mypy: disable-error-code="attr-defined,misc"

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class StudentPipeline(DiffusionPipeline):
    """Unconditional or class-conditional samples of ``shape`` (one sample, without the batch).

    Where there is a ``vae``, the network's latents are ``(its latents - latents_mean) latents_scale``, both one number
    or one a channel.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(
        self, unet, scheduler, vae=None, shape: list | tuple = (), classes: int = 0,
        latents_mean: list | tuple = (0.0,), latents_scale: list | tuple = (1.0,),
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(
            shape=list(shape), classes=classes, latents_mean=list(latents_mean), latents_scale=list(latents_scale)
        )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels=None,
        num_inference_steps: int | None = None,
        generator=None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """``batch_size`` samples in ``num_inference_steps`` network calls (default: the fewest there is a plan for).

        ``class_labels`` is a list or tensor of labels; they are cycled when a conditional student gets None.
        ``latents`` is standard normal noise ``[batch_size, *shape]``, drawn from ``generator`` when None.
        ``output_type``: "pil", "np" and "pt" are pictures in [0, 1], "latent" the raw samples, before decoding.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} must be 'pil', 'np', 'pt' or 'latent'")
        device = self._execution_device
        shape = (batch_size, *self.config.shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents has the shape {tuple(latents.shape)}, expected {shape}")
        sample = latents.to(device=device, dtype=self.unet.dtype)
        if self.config.classes:
            if class_labels is None:
                class_labels = torch.arange(batch_size) % self.config.classes
            class_labels = torch.as_tensor(class_labels, device=device).reshape(batch_size)
        elif class_labels is not None:
            raise ValueError("class_labels were given to an unconditional student")
        self.scheduler.set_timesteps(num_inference_steps or min(self.scheduler.plans), device=device)
        for t in self.progress_bar(self.scheduler.timesteps):
            inputs = self.scheduler.scale_model_input(sample, t)
            told = {"class_labels": class_labels, **self.scheduler.inputs}
            output = self.unet(inputs, t, return_dict=False, **told)[0][:, : inputs.shape[1]]
            sample = self.scheduler.step(output, t, sample, generator=generator, return_dict=False)[0]
        if output_type != "latent":
            if self.vae is not None:
                mean, scale = (
                    torch.tensor(values, device=device, dtype=sample.dtype)[:, None, None]
                    for values in (self.config.latents_mean, self.config.latents_scale)
                )
                sample = self.vae.decode(sample / scale + mean, return_dict=False)[0]
            sample = (sample / 2 + 0.5).clamp(0, 1)
        if output_type in ("np", "pil"):
            sample = sample.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            sample = self.numpy_to_pil(sample)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=sample) if return_dict else (sample,)
