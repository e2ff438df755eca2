"""Real samples that stand for their class, and patches of such."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.condense.select import members
from fewstep.condense.squeeze import pictures_of
from fewstep.data.dataset import Samples
from fewstep.data.views import crop, random_boxes
from fewstep.randomness import Rng

#: How many pictures are tried for one that is kept, how often each is cropped, and the least share of it in a crop.
TRIED, CROPS, LEAST_AREA = 10, 5, 0.5


def representatives(logits: Tensor, labels: Tensor, per_class: int, rng: Rng) -> Tensor:
    """Indices ``[classes * per_class]``, class by class: the samples of every class are clustered by KMeans on their
    ``logits`` ``[N, K]``, or other features, and of every cluster the sample nearest to its centre is taken.

    ``labels`` ``[N]``.  ValueError for a class of fewer samples.  ModuleNotFoundError without scikit-learn.
    """
    kmeans = kmeans_class()
    found = []
    for index in members(labels, int(labels.max()) + 1, per_class):
        points = logits[index].double().cpu()
        state = rng.shared_integer(0, 2**31)
        fitted = kmeans(n_clusters=per_class, n_init=10, random_state=state).fit(points.numpy())
        clusters, centres = torch.from_numpy(fitted.labels_).long(), torch.from_numpy(fitted.cluster_centers_)
        gaps = (points - centres[clusters]).square().sum(1)
        # of its own cluster's samples: the nearest of all could be another cluster's, and be taken twice
        for k in range(per_class):
            found.append(index[gaps.masked_fill(clusters != k, torch.inf).argmin()])
    return torch.stack(found)


@torch.no_grad()
def medium_patches(
    data: Samples, labels: Tensor, per_class: int, classes: int, vote: Callable[[Tensor], Tensor], rng: Rng
) -> tuple[Tensor, Tensor]:
    """Patches of medium difficulty ``[per_class, classes, C, H, W]``, and the indices ``[per_class, classes]`` of the
    pictures that they are of (after RDED, Sun et al. 2024, arXiv 2312.03526).

    Of ``TRIED`` times as many random pictures of a class, as far as there are, each is cropped ``CROPS`` times at
    random.  The crop whose cross-entropy under ``vote`` (pictures to logits) is its middle one stands for a picture,
    and the pictures in the middle of their class are kept.  ValueError for a class of too few.
    """
    chosen, patches = [], []
    for name, index in enumerate(members(labels, classes, per_class)):
        index = index[rng.shuffled(len(index))[: TRIED * per_class]]
        x = pictures_of(data, index).repeat_interleave(CROPS, 0)
        views = crop(x, random_boxes(len(x), rng, (LEAST_AREA, 1.0)))
        losses = -vote(views).log_softmax(1)[:, name].cpu().unflatten(0, (-1, CROPS))
        middle, which = losses.median(1)
        kept = middle.argsort()[(len(index) - per_class) // 2 :][:per_class]
        chosen.append(index[kept])
        patches.append(views.unflatten(0, (-1, CROPS))[kept, which[kept]])
    return torch.stack(patches, 1), torch.stack(chosen, 1)


def kmeans_class() -> type:
    """scikit-learn's KMeans."""
    try:
        from sklearn.cluster import KMeans
    except ModuleNotFoundError as error:
        if error.name != "sklearn":
            raise
        raise ModuleNotFoundError(
            "representative samples need scikit-learn: pip install fewstep[condense], or start from real ones",
            name="sklearn",
        ) from None
    return KMeans
