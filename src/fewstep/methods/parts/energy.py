"""The energy distance between features of samples and of data: an adversary that needs no training.

``2 E|f - g| - E|f - f'| - E|g - g'|`` for features ``f, f'`` of samples and ``g, g'`` of data is zero where both have
one law and positive elsewhere (Szekely & Rizzo 2013).  With the features of a frozen diffusion network it is what a
discriminator on them is for, without one that must be learned (generative moment matching, Li et al. 2015; Cramer GAN,
Bellemare et al. 2017).
"""

from __future__ import annotations

import math
from collections.abc import Generator

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.denoisers import Denoiser
from fewstep.methods.method import Batch, Rows

#: Noise levels ``sigma / alpha`` at which features are compared: low, so that the picture is in them.
LEVELS = (0.05, 0.1, 0.25, 0.5)
#: Places on a side of the coarse grids that features are averaged to.
SIDE = 4


def energy_distance(x: Tensor, y: Tensor, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of samples from data, both ``[B, D]`` and over the mean distance of two data, without bias.

    ``x, y`` are the rows of this part and ``xs, ys`` those of the whole batch (:class:`~fewstep.methods.method.Rows`).
    The first number has the gradient of the distance in ``x``, averaged over parts; the second is the distance, as this
    part sees it.  ValueError for a batch of one.
    """
    if min(len(xs), len(ys)) < 2:
        raise ValueError("the energy distance compares pairs: the batch needs at least two samples")
    # a row's distance from itself is 0 and no pair
    across = torch.cdist(x, ys).mean()
    within = torch.cdist(x, xs).sum() / (len(x) * (len(xs) - 1))
    of_data = torch.cdist(y, ys).sum() / (len(y) * (len(ys) - 1))
    scale = torch.cdist(ys, ys).sum().clamp_min(torch.finfo(ys.dtype).tiny) / (len(ys) * (len(ys) - 1))
    return 2 * (across - within) / scale, ((2 * across - within - of_data) / scale).detach()


def summaries(features: Tensor) -> list[Tensor]:
    """Features ``[B, C, ...]`` of grids as their means and standard deviations over places, ``[B, C]`` each, and as
    means over a coarse grid; tokens ``[B, L, D]`` as the first two; vectors ``[B, D]``, and a single place or token, as
    they are.

    Distances between few numbers tell more of two samples than those between very many, which all are about the same.
    """
    if features.ndim == 2:
        return [features]
    places = features.mT if features.ndim == 3 else features.flatten(2)
    if places.shape[2] == 1:
        return [places.flatten(1)]
    if features.ndim == 3:
        return [places.mean(2), places.std(2)]
    pool = functional.adaptive_avg_pool2d if features.ndim == 4 else functional.adaptive_avg_pool3d
    return [places.mean(2), places.std(2), pool(features, SIDE).flatten(1)]


def feature_energy(teacher: Denoiser, x: Tensor, batch: Batch) -> Generator[Rows, Tensor, tuple[Tensor, Tensor]]:
    """The mean :func:`energy_distance` of samples ``x`` ``[B, ...]`` from the batch's data, under the same conditions,
    between the :func:`summaries` of the teacher's bottleneck at one noise level for all::

        loss, distance = yield from feature_energy(nets.teacher, x, batch)
    """
    level = LEVELS[batch.rng.shared_integer(0, len(LEVELS))]
    t = teacher.schedule.time_at(torch.full((len(x),), -math.log(level), dtype=torch.float64, device=x.device))

    def features(clean: Tensor) -> list[Tensor]:
        x_t = teacher.schedule.add_noise(clean, batch.rng.normal_like(clean), t)
        hidden = teacher.features(x_t, t, batch.cond)
        return summaries(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))

    of_samples = features(x)
    with torch.no_grad():
        of_data = features(batch.x)
    losses, distances = [], []
    for f, g in zip(of_samples, of_data, strict=True):
        everyone = yield Rows(f)
        data = yield Rows(g)
        loss, distance = energy_distance(f, g, everyone, data)
        losses.append(loss)
        distances.append(distance)
    return torch.stack(losses).mean(), torch.stack(distances).mean()
