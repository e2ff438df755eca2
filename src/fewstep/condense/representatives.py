"""Real samples that stand for their class."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.condense.select import members
from fewstep.randomness import Rng


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
