"""Losses between features: against their definitions written out, what leaves them unchanged, and where they are 0."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fewstep.students.relations import (
    GAMMA,
    RELATIONS,
    activation_weights,
    attention,
    channels,
    correlation,
    distances,
    hints,
    probabilities,
    semantic,
    similarity,
)

F64 = torch.float64


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


F, G = maps(0, 5, 3, 4, 4), maps(1, 5, 3, 4, 4)


@pytest.mark.parametrize("name", RELATIONS)
def test_what_sees_the_same_is_at_no_distance(name: str) -> None:
    """Exactly 0, positive for others, with gradients that are numbers: none at 0 (but for the 1e-7 in the logarithms of
    pkt), some elsewhere."""
    loss = RELATIONS[name]
    student = F.clone().requires_grad_(True)
    assert float(loss(student, F)) == 0
    assert float(loss(G, F)) > 1e-6
    for other in (F, G):
        (grad,) = torch.autograd.grad(loss(student, other), student)
        assert bool(grad.isfinite().all())
        assert bool((grad.abs() > 1e-9).any()) == (other is G)


def test_similarity_is_its_definition() -> None:
    """Rows of ``F F^T`` one by one, ``B^2`` terms."""
    total = 0.0
    for i in range(5):
        ours, theirs = (torch.stack([(f[i] * f[j]).sum() for j in range(5)]) for f in (F, G))
        total += float((ours / ours.norm() - theirs / theirs.norm()).square().sum())
    assert float(similarity(F, G)) == pytest.approx(total / 25, rel=1e-12)


def test_similarity_knows_neither_scale_nor_axes() -> None:
    """Features of any width, scaled, rotated as a whole, and the batch in another order."""
    rotation = torch.linalg.qr(maps(2, 48, 48)).Q
    order = torch.tensor([3, 1, 4, 0, 2])
    base = float(similarity(F, G))
    for student, teacher in ((3.7 * F, G), (F.flatten(1) @ rotation, G), (F[order], G[order])):
        assert float(similarity(student, teacher)) == pytest.approx(base, rel=1e-12)
    assert abs(float(similarity(F[order], G)) - base) > 1e-3  # in one of the two it matters
    assert similarity(maps(3, 5, 7), G) > 0


def test_channels_are_their_definition() -> None:
    total = 0.0
    for b in range(5):
        for i in range(3):
            ours, theirs = (torch.stack([(f[b, i] * f[b, j]).sum() for j in range(3)]) for f in (F, G))
            total += float((ours / ours.norm() - theirs / theirs.norm()).square().sum())
    assert float(channels(F, G)) == pytest.approx(total / 15, rel=1e-12)
    with pytest.raises(ValueError, match="channels 3, the teacher 2"):
        channels(F, G[:, :2])


def test_attention_is_its_definition() -> None:
    """And the larger map is pooled to the smaller."""
    ours, theirs = (torch.stack([(m**2).mean(0).flatten() / (m**2).mean(0).norm() for m in f]) for f in (F, G))
    assert float(attention(F, G)) == pytest.approx(float((ours - theirs).square().mean()), rel=1e-12)
    coarse = G.reshape(5, 3, 2, 2, 2, 2).mean((3, 5))
    assert float(attention(F, coarse)) == pytest.approx(
        float(attention(F.reshape(5, 3, 2, 2, 2, 2).mean((3, 5)), coarse)), rel=1e-12
    )
    with pytest.raises(ValueError, match=r"maps \[B, c, h, w\]"):
        attention(F.flatten(1), G)


def test_probabilities_are_a_divergence_of_laws() -> None:
    """``sum_ij t_ij log(t_ij / s_ij) / B^2``; 1e-7 keeps the logarithms finite."""
    ours, theirs = (((normalize(f.flatten(1)) @ normalize(f.flatten(1)).mT) + 1) / 2 for f in (F, G))
    ours, theirs = ours / ours.sum(1, keepdim=True), theirs / theirs.sum(1, keepdim=True)
    exact = float((theirs * (theirs / ours).log()).sum() / 25)
    assert float(probabilities(F, G)) == pytest.approx(exact, rel=1e-4)


def test_correlation_is_the_kernel_to_its_second_order() -> None:
    """The error of the series is at most that of its first missing term, (2 gamma)^3 / 3! in the exponential."""
    near = F + 0.1 * G
    cosine = [normalize(f.flatten(1)) @ normalize(f.flatten(1)).mT * 2 * GAMMA for f in (F, near)]
    series = [math.exp(-2 * GAMMA) * (1 + c + c**2 / 2) for c in cosine]
    assert float(correlation(F, near)) == pytest.approx(float((series[0] - series[1]).square().mean()), rel=1e-10)
    exact = [torch.exp(-GAMMA * torch.cdist(normalize(f.flatten(1)), normalize(f.flatten(1))) ** 2) for f in (F, near)]
    missing = (2 * GAMMA) ** 3 / 6 * math.exp(2 * GAMMA) * math.exp(-2 * GAMMA)
    found = float(correlation(F, near)) ** 0.5
    assert abs(found - float((exact[0] - exact[1]).square().mean() ** 0.5)) < 2 * missing
    assert found == pytest.approx(float((exact[0] - exact[1]).square().mean() ** 0.5), rel=0.2)


def test_distances_know_neither_scale_nor_place_nor_axes() -> None:
    rotation = torch.linalg.qr(maps(2, 48, 48)).Q
    moved = (2.5 * F.flatten(1) @ rotation + 0.7).reshape(F.shape)
    assert float(distances(moved, F)) < 1e-20
    assert float(distances(moved, G)) == pytest.approx(float(distances(F, G)), rel=1e-10)


def test_distances_are_their_definition() -> None:
    """Three points in a plane: the distances over their mean, and the cosine of every angle."""
    a = torch.tensor([[0.0, 0], [3, 0], [0, 4]], dtype=F64)
    b = torch.tensor([[0.0, 0], [1, 0], [0, 1]], dtype=F64)

    def huber(x: float) -> float:
        return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5

    far = [3 / 4 - 1 / ((2 + math.sqrt(2)) / 3), 4 / 4 - 1 / ((2 + math.sqrt(2)) / 3), 5 / 4 - math.sqrt(2) / (
        (2 + math.sqrt(2)) / 3)]  # fmt: skip
    bend = [0.0, 3 / 5 - math.sqrt(0.5), 4 / 5 - math.sqrt(0.5)]  # at each corner, twice in 27 cosines
    expected = 25 * 2 * sum(map(huber, far)) / 9 + 50 * 2 * sum(map(huber, bend)) / 27
    assert float(distances(a, b)) == pytest.approx(expected, rel=1e-9)


def test_hints_are_the_features() -> None:
    assert float(hints(F, G)) == pytest.approx(float((F - G).square().mean()), rel=1e-14)
    with pytest.raises(ValueError, match=r"features \[3, 4, 4\], the teacher \[3, 2, 2\]"):
        hints(F, G[:, :, ::2, ::2])


def test_activation_weights_are_the_gradient_of_the_cross_entropy() -> None:
    head, labels = nn.Linear(6, 4).double(), torch.tensor([0, 3, 1, 1, 2])
    features = maps(4, 5, 6)
    cross_entropy(head(features), labels).backward()
    found = activation_weights(head(features), features, labels).detach()
    assert torch.allclose(found, head.weight.grad, rtol=0, atol=1e-15)


def test_the_semantic_blocks_have_rank_one() -> None:
    """The short form is the full one in float64, classes as samples of one pixel: its gradient too; and of float32
    weights to half a unit in the last place, 6e-8, since it is rounded once: near networks and opposite ones too."""

    def full(student: Tensor, teacher: Tensor) -> Tensor:
        return channels(student.double()[..., None, None], teacher.double()[..., None, None])

    for seed in range(20):
        a, b = maps(2 * seed, 10, 32), maps(2 * seed + 1, 10, 32)
        for one, other in ((a, b), (a, a + 1e-2 * b), (a, 1e-2 * b - a), (a, b * (b > 0))):
            assert float(semantic(one, other)) == pytest.approx(float(full(one, other)), rel=1e-13)
            short = semantic(one.float(), other.float())
            assert short.dtype == torch.float32
            assert float(short) == pytest.approx(float(full(one.float(), other.float())), rel=6e-8)
    a, b = maps(5, 10, 32).requires_grad_(True), maps(6, 10, 32)
    (short,) = torch.autograd.grad(semantic(a, b), a)
    (long,) = torch.autograd.grad(full(a, b), a)
    assert torch.allclose(short, long, rtol=0, atol=1e-15)


def test_semantic_of_a_channel_that_no_class_uses() -> None:
    """A weight of exactly 0 (a dead ReLU) has an empty row in the full form: so it is in the short one."""
    a, b = maps(5, 4, 8), maps(6, 4, 8)
    a[:, 3], b[1] = 0, 0
    full = float(channels(a[..., None, None], b[..., None, None]))
    assert float(semantic(a, b)) == pytest.approx(full, rel=1e-14)
    assert float(semantic(a, a)) == float(semantic(a, -a)) == 0  # a block does not know the sign of its row


def test_semantic_knows_neither_scale_nor_the_order_of_classes() -> None:
    a, b = maps(5, 10, 32), maps(6, 10, 32)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    base = float(semantic(a, b))
    assert float(semantic(a[order], b[order])) == pytest.approx(base, rel=1e-12)
    assert float(semantic(5 * a, b)) == pytest.approx(base, rel=1e-12)
    assert abs(float(semantic(a[order], b)) - base) > 1e-4
    with pytest.raises(ValueError, match=r"penultimate widths \[10, 16\], the teacher \[10, 32\]"):
        semantic(a[:, :16], b)
