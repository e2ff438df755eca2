"""Scores of architectures that need no training: how alike a student and a teacher see a batch with *random* weights
(DisWOT, Dong et al. 2023), beside scores that know no teacher.  Larger is better for all of them.

    relation  M_r = -|| G - G' ||_F^2 / B^2           G = rows of F F^T, normalised; F the last map before pooling
    semantic  M_s = -|| B - B' ||_F^2 / (C c_h)       B_c = rows of A_c A_c^T, normalised; A the activation weights

Any loss between features gives a proxy, the negative of it (:data:`~fewstep.students.relations.RELATIONS`).

One draw of weights and of a batch says next to nothing: rankings of two draws hardly agree, and ``|M_s|`` is hundreds
of times ``|M_r|``, so that their raw sum is ``M_s`` alone.  So a :class:`Scorer` makes several draws,
:func:`split_half_tau` tells how far they agree, and :func:`rank_sum` or :func:`z_sum` put proxies together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fewstep.classifiers import NetworkClassifier
from fewstep.networks.feature_nets import as_feature_net
from fewstep.networks.norms import batch_norm
from fewstep.randomness import Rng
from fewstep.students.relations import RELATIONS, activation_weights, semantic

#: Layers whose weights are drawn, and those that start as the identity.
DRAWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
IDENTITY = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


class View(NamedTuple):
    """What a classifier sees in a batch: its last map ``[B, c, h, w]`` before pooling, and its activation weights
    ``[C, c_h]``."""

    last: Tensor
    weights: Tensor


Net = TypeVar("Net", bound=nn.Module)
#: A score of a student beside a teacher, and one of a network by itself on a batch.
Beside = Callable[[View, View], Tensor]
Alone = Callable[[nn.Module, Tensor], float]


@torch.no_grad()
def random_weights(net: Net, rng: Rng) -> Net:
    """A copy with weights of convolutions and linear layers from N(0, 1), biases 0, and norms that do nothing."""
    made = copy.deepcopy(net)
    for part in made.modules():
        if isinstance(part, DRAWN):
            part.weight.copy_(rng.normal(*part.weight.shape))
        elif isinstance(part, IDENTITY) and part.weight is not None:
            part.weight.fill_(1)
        if isinstance(part, DRAWN + IDENTITY) and part.bias is not None:
            part.bias.zero_()
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.reset_running_stats()
    return made


@torch.no_grad()
def view(model: NetworkClassifier, x: Tensor, labels: Tensor) -> View:
    """What a classifier sees in a batch, by the batch's own statistics.

    ValueError for a network that has no maps, and where its activations are no finite numbers, as in deep networks
    without norms.
    """
    with batch_norm(model, "batch"):
        last = as_feature_net(model.net).maps(x)[-1]
        features, logits = model.read(x)
    seen = View(last, activation_weights(logits, features, labels))
    if not all(bool(part.isfinite().all()) for part in seen):
        raise ValueError("with weights from N(0, 1) the activations overflow: this network needs norms between layers")
    return seen


def semantic_similarity(student: View, teacher: View) -> Tensor:
    """``M_s``; ValueError for networks of other penultimate widths, which leave ``M_r``."""
    return -semantic(student.weights, teacher.weights)


def negative(loss: Callable[[Tensor, Tensor], Tensor]) -> Beside:
    """The proxy that a loss between last maps gives."""
    return lambda student, teacher: -loss(student.last, teacher.last)


#: Proxies that know the teacher.  "relation" is the negative of the similarity-preserving loss.
BESIDE: Mapping[str, Beside] = {
    "relation": negative(RELATIONS["sp"]),
    "semantic": semantic_similarity,
    **{name: negative(loss) for name, loss in RELATIONS.items() if name != "sp"},
}


def parameters(net: nn.Module, x: Tensor) -> float:
    """The number of parameters."""
    return float(sum(p.numel() for p in net.parameters()))


@torch.no_grad()
def flops(net: nn.Module, x: Tensor) -> float:
    """Floating-point operations of a forward pass of one sample, a multiplication and an addition counted as two."""
    with FlopCounterMode(display=False) as counted, batch_norm(net, "running"):
        net(x[:1])
    return float(counted.get_total_flops())


class Signs(TorchDispatchMode):
    """A block in which it is kept which ReLUs are on, ``[B, units]`` of each layer in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default):
            self.kept.append((out > 0).flatten(1).double())
        return out


@torch.no_grad()
def naswot(net: nn.Module, x: Tensor) -> float:
    """``log |det K|``, ``K_ij`` the number of ReLUs that are alike on samples ``i`` and ``j`` (Mellor et al. 2021)."""
    with Signs() as seen, batch_norm(net, "batch"):
        net(x)
    alike = sum(on @ on.mT + (1 - on) @ (1 - on).mT for on in seen.kept)
    return float(torch.linalg.slogdet(torch.as_tensor(alike)).logabsdet)


def synflow(net: nn.Module, x: Tensor) -> float:
    """``log sum |theta dR/dtheta|`` with ``R`` the sum of the outputs for an input of ones, all weights taken absolute
    (Tanaka et al. 2020); float64, norms by their running statistics."""
    made = copy.deepcopy(net).double().requires_grad_(True)
    with torch.no_grad():
        for p in made.parameters():
            p.abs_()
    with batch_norm(made, "running"):
        total = made(torch.ones_like(x[:1], dtype=torch.float64)).sum()
    found = torch.autograd.grad(total, list(made.parameters()), allow_unused=True)
    pairs = zip(made.parameters(), found, strict=True)
    return float(torch.stack([(p.detach() * g).abs().sum() for p, g in pairs if g is not None]).sum().log())


#: Proxies that know no teacher.
ALONE: Mapping[str, Alone] = {"params": parameters, "flops": flops, "naswot": naswot, "synflow": synflow}


class Scorer:
    """Scores students by proxies of these names, ``names``, beside one teacher: ``scorer(net)`` is float64
    ``[draws, names]``.

    Draw ``d`` gives the teacher and every student weights of its own from ``rng`` and shows them ``batches[d]``, a pair
    of samples ``[B, ...]`` and labels ``[B]``: what a student scores does not depend on which others are scored.
    ValueError for no batch, for a proxy that there is not, and in a call for a score that is no finite number.
    """

    def __init__(
        self, teacher: NetworkClassifier, batches: Sequence[tuple[Tensor, Tensor]], names: Sequence[str], rng: Rng
    ) -> None:
        if not batches:
            raise ValueError("scores need a batch for every draw, and at least one")
        for name in names:
            if name not in (*BESIDE, *ALONE):
                raise ValueError(f"'{name}' is no proxy: those are {', '.join((*BESIDE, *ALONE))}")
        self.batches, self.names, self.rng = list(batches), tuple(names), rng
        self.teacher: list[View] = []
        if any(name in BESIDE for name in names):
            for d, (x, labels) in enumerate(self.batches):
                self.teacher.append(view(random_weights(teacher, rng.stream(f"teacher {d}")), x, labels))

    def __call__(self, student: NetworkClassifier) -> Tensor:
        return torch.tensor([list(self.draw(student, d)) for d in range(len(self.batches))], dtype=torch.float64)

    def draw(self, student: NetworkClassifier, d: int) -> Iterator[float]:
        """The scores of one draw."""
        x, labels = self.batches[d]
        net = random_weights(student, self.rng.stream(f"student {d}"))
        seen = view(net, x, labels) if self.teacher else None
        for name in self.names:
            if seen is not None and name in BESIDE:
                score = float(BESIDE[name](seen, self.teacher[d]))
            else:
                score = ALONE[name](net, x)
            if not math.isfinite(score):
                raise ValueError(
                    f"the score '{name}' of a student is {score}: without norms between layers, weights from N(0, 1) "
                    "give numbers that are too large"
                )
            yield score


def kendall_tau(a: Tensor, b: Tensor) -> float:
    """Kendall's tau-b between two lists of ``n`` numbers: pairs in the same order less those in the other, over the
    pairs that are not tied; NaN where all are tied."""
    one, other = ((v[:, None] - v).sign() for v in (torch.as_tensor(a).double(), torch.as_tensor(b).double()))
    return float((one * other).sum() / (one.square().sum() * other.square().sum()).sqrt())


def split_half_tau(scores: Tensor, rng: Rng, splits: int = 20) -> float:
    """How far the draws agree: Kendall's tau between the mean scores of two halves of them, ``scores`` ``[draws, n]``,
    the mean over random splits.  ValueError for fewer than two draws."""
    half = len(scores) // 2
    if not half:
        raise ValueError(f"{len(scores)} draws cannot be split in two: make at least 2")
    orders = [rng.shuffled(len(scores)) for _ in range(splits)]
    taus = [kendall_tau(scores[o[:half]].mean(0), scores[o[half : 2 * half]].mean(0)) for o in orders]
    return sum(taus) / splits


def ranks(scores: Tensor) -> Tensor:
    """From 0, the lowest, on; ties share the mean of theirs.  Over the last axis."""
    gap = (scores[..., :, None] - scores[..., None, :]).sign()
    return (gap.sum(-1) + scores.shape[-1] - 1) / 2


def rank_sum(scores: Tensor) -> Tensor:
    """The sum of the ranks that proxies ``[proxies, n]`` give: none counts more for its scale."""
    return ranks(scores).sum(0)


def z_sum(scores: Tensor, reference: Tensor | None = None) -> Tensor:
    """The sum over proxies ``[proxies, n]`` of (score - mean) / standard deviation over a reference ``[proxies, m]``,
    by default themselves.  A proxy that is the same for all of the reference counts nothing."""
    known = scores if reference is None else reference
    spread = known.std(1, unbiased=False, keepdim=True)
    z = (scores - known.mean(1, keepdim=True)) / torch.where(spread > 0, spread, torch.inf)
    return z.sum(0)
