"""What training for self-conditioning makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fewstep.denoisers import Cond, NetworkDenoiser
from fewstep.sampling.sample import sample
from fewstep.sampling.self_conditioning import SelfConditioning


class SelfConditioned(nn.Module):
    """A network that was trained for self-conditioning with how it is sampled: what Analog Bits gives back.

    It is no denoiser, because a call depends on the calls before it; :attr:`denoiser` is the model without feedback.
    """

    def __init__(self, denoiser: NetworkDenoiser, feedback: SelfConditioning | None = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.feedback = SelfConditioning() if feedback is None else feedback

    @property
    def shape(self) -> tuple[int, ...]:
        return self.denoiser.shape

    @property
    def classes(self) -> int | None:
        return self.denoiser.classes

    def sample(self, n: int, cond: Cond = None, **options: Any) -> Tensor:
        """``n`` samples ``[n, *shape]``; ``options`` are those of :func:`fewstep.sampling.sample`."""
        return sample(self.denoiser, n, cond=cond, self_conditioning=self.feedback, **options)
