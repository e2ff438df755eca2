"""Scores of labelled examples: how hard is each for a classifier?

A classifier is any callable that gives logits ``z`` ``[B, K]`` for pictures ``x`` ``[B, *shape]``; with ``p =
softmax(z)``, ``y`` the label as a unit vector and ``h`` what the last linear layer reads (``classifier.features(x)``)::

    EL2N        ||p - y||_2                            Paul et al. 2021 (arXiv 2107.07075), a mean over several nets
    GraNd       ||[p - y ; (p - y) (x) h]||_2          the same, of the last layer: the norm of its gradient
    margin      p_(1) - p_(2)                          the largest less the second largest
    entropy     -sum p log p
    AUM         mean over training of z_y - max_{k != y} z_k         Pleiss et al. 2020 (arXiv 2001.10528)
    forgetting  how often training lost an example it had right      Toneva et al. 2019 (arXiv 1812.05159)

The first four are of a classifier as it stands (in evaluation mode, where that makes a difference); the last two are
counted while one trains.  All are float64 ``[N]``; a hard example has large EL2N, GraNd, entropy and forgetting, and
small margin and AUM.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.data.dataset import Dataset, Samples, labels_of
from fewstep.digests import model_sha256
from fewstep.methods.parts.stores import Store, Tensors

#: What a score computes for a batch: classifier, pictures ``[B, *shape]`` and labels ``[B]`` -> ``[B]`` or ``[B, D]``.
Score = Callable[[Any, Tensor, Tensor], Tensor]


def softmax_error(logits: Tensor, labels: Tensor) -> Tensor:
    """``p - y`` ``[B, K]`` float64: the gradient of the cross-entropy in the logits."""
    p = logits.double().softmax(-1)
    return p - nn.functional.one_hot(labels, p.shape[-1])


def softmax_twice_error(logits: Tensor, labels: Tensor) -> Tensor:
    """The gradient in the logits of the cross-entropy of ``softmax(p)``, as if the probabilities ``p`` were logits
    again: ``J^T (softmax(p) - y)`` with the softmax's Jacobian ``J = diag(p) - p p^T``; ``[B, K]`` float64.

    DeepCore and what was copied from it compute this; it is here to compare with them.
    """
    p = logits.double().softmax(-1)
    inner = p * softmax_error(p, labels)
    return inner - p * inner.sum(-1, keepdim=True)


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """``||p - y||_2`` ``[B]``, in ``[0, sqrt 2]``."""
    return softmax_error(logits, labels).norm(dim=-1)


def grand(logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """The norm of :func:`gradient_features` ``[B]``, without making them: ``||p - y|| sqrt(1 + ||h||^2)``."""
    return el2n(logits, labels) * (1 + features.double().square().sum(-1)).sqrt()


def gradient_features(
    logits: Tensor, features: Tensor, labels: Tensor, error: Callable[[Tensor, Tensor], Tensor] = softmax_error
) -> Tensor:
    """``[dL/dz ; dL/dz (x) h]`` ``[B, K + K d]`` float64: the loss's gradient in the last layer's bias and, row by row,
    weight ``[K, d]``.  ``error`` is ``dL/dz``: that of the cross-entropy, or :func:`softmax_twice_error`."""
    dz = error(logits, labels)
    return torch.cat([dz, (dz[:, :, None] * features.double()[:, None]).flatten(1)], 1)


def margin(logits: Tensor) -> Tensor:
    """The largest probability less the second largest ``[B]``, in [0, 1]."""
    first, second = logits.double().softmax(-1).topk(2, -1).values.unbind(-1)
    return first - second


def entropy(logits: Tensor) -> Tensor:
    """The entropy of the probabilities in nats ``[B]``, in ``[0, log K]``."""
    log_p = logits.double().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def label_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of the label less the largest other one ``[B]`` float64; negative where the answer is wrong."""
    z = logits.double()
    own = z.gather(-1, labels[:, None])[:, 0]
    others = z.scatter(-1, labels[:, None], -torch.inf)
    return own - others.amax(-1)


#: Scores by name.
SCORES: dict[str, Score] = {
    "el2n": lambda net, x, y: el2n(net(x), y),
    "grand": lambda net, x, y: grand(net(x), net.features(x), y),
    "margin": lambda net, x, y: margin(net(x)),
    "entropy": lambda net, x, y: entropy(net(x)),
    "gradients": lambda net, x, y: gradient_features(net(x), net.features(x), y),
    "gradients-softmax-twice": lambda net, x, y: gradient_features(net(x), net.features(x), y, softmax_twice_error),
}


class AUM(nn.Module):
    """The area under the margin of ``n`` examples: the mean of :func:`label_margin` over the times that each was seen.

    Its sums are buffers: held by a method's networks and named in ``moved``, they are saved and resumed with them.
    """

    total: Tensor
    seen: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(n, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(n, dtype=torch.int64))

    @torch.no_grad()
    def update(self, index: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count examples ``index`` ``[B]``, each once, as training sees them."""
        self.total[index] += label_margin(logits, labels)
        self.seen[index] += 1

    def scores(self) -> Tensor:
        """``[n]``; NaN for what was never seen."""
        return self.total / self.seen


class Forgetting(nn.Module):
    """How often each of ``n`` examples was forgotten: right when it was seen last, and wrong now.

    Its counts are buffers, as those of :class:`AUM`.
    """

    right: Tensor
    learned: Tensor
    events: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("right", torch.zeros(n, dtype=torch.bool))
        self.register_buffer("learned", torch.zeros(n, dtype=torch.bool))
        self.register_buffer("events", torch.zeros(n, dtype=torch.int64))

    @torch.no_grad()
    def update(self, index: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count examples ``index`` ``[B]``, each once, as training sees them."""
        right = logits.argmax(-1) == labels
        self.events[index] += self.right[index] & ~right
        self.learned[index] |= right
        self.right[index] = right

    def scores(self) -> Tensor:
        """``[n]``; infinite for what was never right, which is harder than all that was forgotten."""
        return self.events.double().masked_fill(~self.learned, torch.inf)


def check_score(score: str, classifiers: int) -> None:
    """ValueError for a score of another name, for no classifier, and for several whose gradients have no mean."""
    if score not in SCORES:
        raise ValueError(f"score='{score}' is not one of {', '.join(SCORES)}")
    if classifiers == 0 or (classifiers > 1 and score.startswith("gradients")):
        need = "one" if score.startswith("gradients") else "at least one"
        raise ValueError(f"score='{score}' of {classifiers} classifiers: {need} is needed")


@torch.no_grad()
def score_batch(classifiers: tuple[Any, ...], data: Samples, score: str, part: slice, device: torch.device) -> Tensor:
    """The scores of a part of the data, a mean over the classifiers; on the CPU."""
    rows = data.rows(part)
    labels = labels_of(rows.cond)
    if rows.x is None or labels is None or bool((labels < 0).any()):
        raise ValueError(f"data '{data.name}': the score '{score}' needs pictures and a label for each")
    x, y = rows.x.to(device), labels.to(device)
    total = SCORES[score](classifiers[0], x, y)
    for classifier in classifiers[1:]:
        total = total + SCORES[score](classifier, x, y)
    return (total / len(classifiers)).cpu()


@dataclass(frozen=True)
class Scores(Store):
    """A score of every example, a mean over ``classifiers``: ``start.store(Scores(nets, data)).x`` is ``[N, 1]``, and
    ``[N, K + K d]`` for gradients.

    As a store it is kept by the digests of classifiers and data, so that a run that asks again finds it.  ValueError as
    :func:`check_score`.
    """

    name: ClassVar[str] = "scores"

    classifiers: tuple[nn.Module, ...]
    data: Samples
    score: str = "el2n"
    batch: int = 256

    def __post_init__(self) -> None:
        check_score(self.score, len(self.classifiers))

    @property
    def batches(self) -> int:
        return -(-len(self.data) // self.batch)

    def digest(self) -> str:
        nets = " ".join(model_sha256(classifier) for classifier in self.classifiers)
        said = f"{self.name} {self.score} {self.batch} {self.data.sha256()} {nets}"
        return hashlib.sha256(said.encode()).hexdigest()

    def make(self, seed: int, wanted: Container[int]) -> Iterator[tuple[int, Tensors]]:
        device = next(self.classifiers[0].parameters(), torch.zeros(())).device
        for i in range(self.batches):
            if i in wanted:
                part = slice(i * self.batch, min((i + 1) * self.batch, len(self.data)))
                found = score_batch(self.classifiers, self.data, self.score, part, device)
                yield i, {"scores": found.reshape(len(found), -1)}

    def dataset(self, tensors: Tensors) -> Dataset:
        return Dataset("scores", tensors["scores"])


def scores_of(
    classifiers: tuple[Any, ...],
    data: Samples,
    score: str = "el2n",
    batch: int = 256,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A score of every example ``[N]`` (gradients ``[N, K + K d]``), made now and kept nowhere; of any callables, which
    take pictures on ``device``.  ValueError as :class:`Scores`."""
    check_score(score, len(classifiers))
    parts = [slice(i, min(i + batch, len(data))) for i in range(0, len(data), batch)]
    return torch.cat([score_batch(classifiers, data, score, part, torch.device(device)) for part in parts])
