"""Measures that use class labels."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of samples that a classifier with ``logits [N, classes]`` takes for the class they were asked for."""
    if labels.shape != (len(logits),):
        raise ValueError(f"{len(logits)} samples need labels [{len(logits)}], got shape {list(labels.shape)}")
    return float((logits.argmax(dim=1) == labels.to(logits.device)).double().mean())


def diversity(features: Tensor, labels: Tensor | None = None) -> float:
    """The mean distance between two samples of one class, over the classes with at least two samples.

    ``features`` is ``[N, d]``; without labels all samples are one class.  A model that has collapsed to one picture a
    class has diversity 0.
    """
    if labels is None:
        labels = torch.zeros(len(features), dtype=torch.long)
    groups = [features[(labels == c).to(features.device)].double() for c in labels.unique()]
    distances = [torch.pdist(group).mean() for group in groups if len(group) > 1]
    if not distances:
        raise ValueError("diversity needs a class with at least two samples")
    return float(torch.stack(distances).mean())
