"""The pictures behind the samples of networks that make latents."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.denoisers import networks_in
from fewstep.networks.inputs import taking_inputs


def decode(model: nn.Module, samples: Tensor) -> Tensor:
    """What a model sampled, as pictures in [-1, 1] (not clipped), differentiable: decoded where its network makes
    latents, the samples themselves where not.  ValueError where their decoder is out of reach."""
    for part in networks_in(model):
        found = taking_inputs(part.net)
        if found is not None:
            return found.decode(samples)
    return samples
