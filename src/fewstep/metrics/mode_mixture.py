"""Mode mixture: samples that lie between the classes, as a classifier sees them."""

from __future__ import annotations

from torch import Tensor


def mode_mixture(probabilities: Tensor, threshold: float = 0.4) -> float:
    """The share of samples for which at least two classes have a probability of ``threshold`` or more.

    ``probabilities`` is ``[N, classes]``, rows that sum to 1 (softmax of a classifier's logits, posterior of a
    mixture).  The mode-mixture rate of DPM-OT (Li et al. 2023; 0.4 in their code, which counts 0.3, 0.2 and 0.1 too).
    Above 0.5 no sample could count: ValueError.  Real data have a rate of their own, which belongs beside any other.
    """
    if not 0 < threshold <= 0.5:
        raise ValueError(f"threshold={threshold} must lie in (0, 0.5]: above a half no two classes can both reach it")
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError(f"need probabilities [N, classes] of two classes or more, got {list(probabilities.shape)}")
    off = (probabilities.double().sum(1) - 1).abs().max()
    if not float(probabilities.min()) >= 0 or not float(off) < 1e-3:
        raise ValueError("probabilities: rows must be at least 0 and sum to 1 (softmax the logits first)")
    return float(((probabilities >= threshold).sum(1) >= 2).double().mean())
