"""Where a diffusers network came from, and what its samples become there."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from fewstep.denoisers import gradients
from fewstep.hub.autoencoders import autoencoder_name, decode
from fewstep.networks.inputs import TakesInputs


class Origin:
    """The diffusers pipeline that a network was read from, and the name of the network in it.

    Copies of a network share it: a student must not copy its teacher's text encoders.
    """

    def __init__(self, pipe: Any, component: str) -> None:
        self.pipe = pipe
        self.component = component
        self._decoder: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self

    def decoder(self, device: torch.device) -> Any:
        """An autoencoder for latents on a device, in float32 or more: the pipeline's own, or a frozen copy, made once,
        where that one has half precision, or lies in main memory and the latents do not."""
        own = self.pipe.components[autoencoder_name(self.pipe)]
        kind = torch.promote_types(own.dtype, torch.float32)
        place = device if own.device.type == "cpu" else own.device
        if (own.device, own.dtype) == (place, kind):
            return own
        if self._decoder is None or self._decoder.device != place:
            self._decoder = copy.deepcopy(own).to(place, kind).requires_grad_(False)
        return self._decoder


class FromPipeline(TakesInputs):
    """A network with the pipeline that it came from, None for a bare one.

    ``latent`` says whether its samples are latents, of an autoencoder that may be out of reach.
    """

    origin: Origin | None
    latent: bool

    def decode(self, samples: Tensor) -> Tensor:
        if not self.latent:
            return samples
        if self.origin is None:
            raise ValueError("the samples are latents, and the pipeline with their autoencoder is not where it was")
        decoder = self.origin.decoder(samples.device)
        with gradients(decoder, "input"), torch.autocast(samples.device.type, enabled=False):
            return decode(self.origin.pipe, samples, decoder).to(samples.device)
