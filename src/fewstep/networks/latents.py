"""Networks whose samples are latents, and the pictures behind them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from fewstep.denoisers import networks_in


class Latent(ABC):
    """A network that knows how its samples become pictures."""

    @abstractmethod
    def decode(self, samples: Tensor) -> Tensor:
        """Pictures in [-1, 1] (not clipped), with a gradient in the samples and none in the decoder; ValueError where
        the samples are latents and their decoder is out of reach."""


def decode(model: nn.Module, samples: Tensor) -> Tensor:
    """What a model sampled, as pictures in [-1, 1] (not clipped), differentiable: decoded where its networks make
    latents, the samples themselves where not."""
    for part in networks_in(model):
        if isinstance(part.net, Latent):
            return part.net.decode(samples)
    return samples
