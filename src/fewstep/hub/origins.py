"""Where a diffusers network came from, and what its samples become there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.denoisers import gradients
from fewstep.hub.autoencoders import autoencoder_name, decode
from fewstep.networks.inputs import TakesInputs


class Origin:
    """The diffusers pipeline that a network was read from, and the name of the network in it.

    Copies of a network share it (a student must not copy its teacher's text encoders), which is all this class adds
    to the pair.
    """

    def __init__(self, pipe: Any, component: str) -> None:
        self.pipe = pipe
        self.component = component

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self


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
        pipe = self.origin.pipe
        decoder = pipe.components[autoencoder_name(pipe)]
        with gradients(decoder, "input"), torch.autocast(samples.device.type, enabled=False):
            return decode(pipe, samples).to(samples.device)
