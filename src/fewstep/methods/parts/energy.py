"""The energy distance between features of samples and of data: an adversary that needs no training.

``2 E|f - g| - E|f - f'| - E|g - g'|`` for features ``f, f'`` of samples and ``g, g'`` of data is zero where both have
one law and positive elsewhere (Szekely & Rizzo 2013).  With the features of a frozen diffusion network it is what a
discriminator on them is for, without one that must be learned (generative moment matching, Li et al. 2015; Cramer GAN,
Bellemare et al. 2017).
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from fewstep.denoisers import Denoiser
from fewstep.methods.method import Batch, Rows

#: Noise levels at which features are compared, in the half of the family's own index that lies next to the data.
LEVELS = 8


def energy_distance(x: Tensor, y: Tensor, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of samples from data, both ``[B, D]`` and over the mean distance of two data, without bias.

    ``x, y`` are the rows of this part and ``xs, ys`` those of the whole batch (:class:`~fewstep.methods.method.Rows`).
    The first number has the gradient of the distance in ``x``, averaged over parts; the second is the distance, as this
    part sees it.  ValueError for a batch of one.
    """
    n = len(ys)
    if n < 2:
        raise ValueError("the energy distance compares pairs: the batch needs at least two samples")
    across = torch.cdist(x, ys).mean()
    within = torch.cdist(x, xs).sum() / (len(x) * (n - 1))  # a row's distance from itself is 0
    of_data = torch.cdist(y, ys).sum() / (len(y) * (n - 1))
    scale = torch.cdist(ys, ys).sum().clamp_min(torch.finfo(ys.dtype).tiny) / (n * (n - 1))
    return 2 * (across - within) / scale, ((2 * across - within - of_data) / scale).detach()


def feature_energy(teacher: Denoiser, x: Tensor, batch: Batch) -> Generator[Rows, Tensor, tuple[Tensor, Tensor]]:
    """:func:`energy_distance` of samples ``x`` ``[B, ...]`` from the batch's data, under the same conditions, by the
    teacher's bottleneck features at one noise level for all::

        loss, distance = yield from feature_energy(nets.teacher, x, batch)
    """
    level = (batch.rng.shared_integer(0, LEVELS) + 0.5) / (2 * LEVELS)
    t = teacher.schedule.own_time(torch.full((len(x),), level, dtype=torch.float64, device=x.device))

    def features(clean: Tensor) -> Tensor:
        x_t = teacher.schedule.add_noise(clean, batch.rng.normal_like(clean), t)
        return teacher.features(x_t, t, batch.cond).flatten(1).float()

    f = features(x)
    with torch.no_grad():
        g = features(batch.x)
    everyone = yield Rows(f)
    data = yield Rows(g)
    return energy_distance(f, g, everyone, data)
