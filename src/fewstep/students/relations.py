"""How alike two networks see a batch: losses on features that need no equal architectures.

One family, used twice: as losses that pull a student to a *trained* teacher, and, negated and taken between networks
with *random* weights, as scores of architectures (:mod:`fewstep.students.proxies`).  Features are maps ``[B, c, h, w]``
or vectors ``[B, d]``, the student's first; each loss is a mean that does not grow with the batch, 0 where both see the
same.

=============  ==============================================================================================
similarity     similarity-preserving (Tung & Mori 2019): rows of ``F F^T``, normalised
channels       inter-channel correlation (Liu et al. 2021): rows of ``f f^T`` over channels, normalised
attention      attention transfer (Zagoruyko & Komodakis 2017): where the squared activations lie
probabilities  probabilistic knowledge transfer (Passalis & Tefas 2018): KL between laws over neighbours
correlation    correlation congruence (Peng et al. 2019): Gaussian kernel between samples, by its Taylor series
distances      relational KD (Park et al. 2019): distances between samples, and angles between three of them
hints          FitNets (Romero et al. 2015): the features themselves
=============  ==============================================================================================

:func:`semantic` is DisWOT's: class activation weights, the gradient of the cross entropy in the classifier's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize, smooth_l1_loss

#: A loss of the features of a student and of a teacher, a number.
Relation = Callable[[Tensor, Tensor], Tensor]
#: Kernel width and terms of correlation congruence, and the weights of distances and angles in relational KD.
GAMMA, TERMS = 0.4, 2
DISTANCE_WEIGHT, ANGLE_WEIGHT = 25.0, 50.0


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """``|| G - G' ||_F^2 / B^2`` with ``G = F F^T`` of the flattened features, rows L2-normalised."""
    gap = normalize(gram(student)) - normalize(gram(teacher))
    return gap.square().sum() / len(gap) ** 2


def channels(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean_b || C_b - C'_b ||_F^2 / c`` with ``C_b = f_b f_b^T``, ``[c, c]``, rows L2-normalised; ``[B, c]`` counts
    as maps of one pixel.  ValueError for other numbers of channels."""
    same("channels", student.shape[1], teacher.shape[1])
    ours, theirs = (f.flatten(2) if f.ndim > 2 else f[..., None] for f in (student, teacher))
    gap = normalize(ours @ ours.mT, dim=2) - normalize(theirs @ theirs.mT, dim=2)
    return gap.square().sum() / (gap.shape[0] * gap.shape[1])


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean square between the maps of ``mean_c f^2``, each of norm 1; the larger maps are pooled to the smaller.
    ValueError for vectors, which have no place."""
    if student.ndim != 4 or teacher.ndim != 4:
        raise ValueError(f"attention compares maps [B, c, h, w], got {list(student.shape)} and {list(teacher.shape)}")
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    ours, theirs = (normalize(adaptive_avg_pool2d(f, size).square().mean(1).flatten(1)) for f in (student, teacher))
    return (ours - theirs).square().mean()


def probabilities(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(teacher || student)`` of the laws over the batch that cosines, moved to [0, 1], give every sample; the mean
    over all pairs."""
    small = 1e-7
    ours, theirs = (neighbours(f) for f in (student, teacher))
    return (theirs * torch.log((theirs + small) / (ours + small))).mean()


def correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean square between the matrices ``k(f_i, f_j) = exp(-gamma || f_i - f_j ||^2)`` of features of norm 1, the
    exponential of their product by the first terms of its series."""
    ours, theirs = (kernel(f) for f in (student, teacher))
    return (ours - theirs).square().mean()


def distances(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber losses of the distances between samples over their mean, and of the cosines of the angles at each."""
    ours, theirs = student.flatten(1), teacher.flatten(1)
    far = smooth_l1_loss(relative_distances(ours), relative_distances(theirs))
    return DISTANCE_WEIGHT * far + ANGLE_WEIGHT * smooth_l1_loss(angles(ours), angles(theirs))


def hints(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean square between the features.  ValueError for other shapes."""
    same("features", list(student.shape[1:]), list(teacher.shape[1:]))
    return (student - teacher).square().mean()


#: The family, by the names under which the field knows them.
RELATIONS: dict[str, Relation] = {
    "sp": similarity, "ickd": channels, "at": attention, "pkt": probabilities, "cc": correlation, "rkd": distances,
    "fitnet": hints,
}  # fmt: skip


def activation_weights(logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """The gradient ``[C, c_h]`` of the mean cross entropy in the weights of a linear classifier: ``(p - y)^T f / B``,
    for logits ``[B, C]`` that it gives for ``features`` ``[B, c_h]``.  Differentiable in both."""
    error = logits.softmax(1) - torch.nn.functional.one_hot(labels, logits.shape[1])
    return error.mT @ features / len(features)


def semantic(student: Tensor, teacher: Tensor) -> Tensor:
    """``sum_c || B_c - B'_c ||_F^2 / (C c_h)`` between activation weights ``A`` ``[C, c_h]`` of two networks, where
    ``B_c = A_c A_c^T``, rows L2-normalised: :func:`channels` of classes in the place of samples.

    Every block has rank one, and row ``i`` of it is ``sign(A_ci) A_c / ||A_c||`` after normalisation: so this takes
    ``C c_h`` operations, not ``C c_h^2``; in float64, and rounded once at the end.  ValueError for other widths.
    """
    same("penultimate widths", list(student.shape), list(teacher.shape))
    ours, theirs = normalize(student.double(), dim=1), normalize(teacher.double(), dim=1)
    signs = student.sign(), teacher.sign()
    used = (signs[0].abs() + signs[1].abs()).sum(1, dtype=torch.float64)
    agree = (signs[0] * signs[1]).sum(1, dtype=torch.float64)
    # || s u^T - s' u'^T ||^2 = used - 2 (s.s') (u.u'), written so that it is exactly 0 where u' is u or -u
    gap = torch.addcmul(ours, agree.sign()[:, None], theirs, value=-1)
    rows = used - 2 * agree.abs() + agree.abs() * gap.square().sum(1)
    return (rows.sum() / student.numel()).to(student.dtype)


def gram(features: Tensor) -> Tensor:
    """``F F^T`` ``[B, B]`` of flattened features."""
    flat = features.flatten(1)
    return flat @ flat.mT


def neighbours(features: Tensor) -> Tensor:
    """``[B, B]``, rows sum to 1: how near every sample is by the cosine of flattened features."""
    near = (gram(normalize(features.flatten(1))) + 1) / 2
    return near / near.sum(1, keepdim=True)


def kernel(features: Tensor) -> Tensor:
    """``exp(-2 gamma) sum_p (2 gamma)^p / p! (f_i.f_j)^p`` of flattened features of norm 1."""
    product = gram(normalize(features.flatten(1)))
    series = sum((2 * GAMMA) ** p / math.factorial(p) * product**p for p in range(TERMS + 1))
    return math.exp(-2 * GAMMA) * torch.as_tensor(series)


def relative_distances(flat: Tensor) -> Tensor:
    """Distances between rows ``[B, B]`` over the mean of those between different ones."""
    square = flat.square().sum(1)
    # the root of exactly 0 has no gradient
    apart = (square[:, None] + square - 2 * flat @ flat.mT).clamp_min(1e-12).sqrt()
    apart = apart * (1 - torch.eye(len(flat), dtype=flat.dtype, device=flat.device))
    return apart / (apart.sum() / (len(flat) * (len(flat) - 1)))


def angles(flat: Tensor) -> Tensor:
    """The cosines ``[B, B, B]`` of the angles at the first sample between the directions to two others."""
    direction = normalize(flat - flat[:, None], dim=2)
    return direction @ direction.mT


def same(what: str, ours: object, theirs: object) -> None:
    """ValueError unless student and teacher agree."""
    if ours != theirs:
        raise ValueError(f"the student has {what} {ours}, the teacher {theirs}: this loss needs them equal")
