"""Low-rank weights: a copy of any network that trains little of itself and shares the memory of the rest.

A linear or convolution layer ``W`` becomes ``W + (alpha / rank) B A``, where ``A`` maps to ``rank`` features and ``B``
back; only ``A`` and ``B`` train.  ``B`` starts at zero, so that the copy is the original, bit for bit, until it is
trained.  What a layer adds is computed beside it: the layer itself, its name and its class stay as they are.

The other weights are :class:`Frozen`: parameters that no ``requires_grad_`` wakes, and that copies of the network
share.  So a teacher, its student, the student's target network and a critic cost one network, and methods train,
average and save what moves without being told.  Sharding cuts them with the rest.

Hu et al. 2021 (arXiv 2106.09685); the first factor is drawn as in their code and in peft.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from fewstep.randomness import derive_seed

Net = TypeVar("Net", bound=nn.Module)

#: Attention projections as diffusers names them: the default targets in networks that have them.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
#: The name under which a layer holds its low-rank weights.
NAME = "low_rank"
#: Where no rank is said: the largest power of two up to this one at which less than that share of the weights trains.
LARGEST, SHARE = 64, 0.05
_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d,
}  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """What :func:`low_rank` is asked for: ``rank`` (None: chosen so that less than 5% of the weights train), ``alpha``
    (None: the rank) and the endings of the names of the ``targets`` (None: see :func:`layers_for`)."""

    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank}: low-rank weights need a rank of at least 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha:g} must be positive and finite")


class Frozen(nn.Parameter):
    """A weight that is never trained, on memory that copies of it share."""

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Self:
        return super().__new__(cls, data.detach(), False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        if id(self) not in memo:
            memo[id(self)] = Frozen(self.data)
        made: Frozen = memo[id(self)]
        return made


class Factors(nn.Module):
    """``scale (alpha / rank) B A x``, added to what a layer gives for ``x``.

    ``A`` is a layer of the same kind to ``rank`` features, ``B`` one of a point each; both without a bias, in float32
    where the layer is in half precision.  With ``scale`` 0 nothing is computed.
    """

    def __init__(self, layer: Any, rank: int, alpha: float) -> None:
        super().__init__()
        weight: Tensor = layer.weight
        kind = torch.promote_types(weight.dtype, torch.float32)
        options: dict[str, Any] = {"bias": False, "device": weight.device, "dtype": kind}
        if weight.ndim == 2:
            self.lora_A: Any = nn.utils.skip_init(nn.Linear, layer.in_features, rank, **options)
            self.lora_B: Any = nn.utils.skip_init(nn.Linear, rank, layer.out_features, **options)
        else:
            window = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
            made = _CONVOLUTIONS[weight.ndim]
            self.lora_A = nn.utils.skip_init(made, layer.in_channels, rank, layer.kernel_size, **window, **options)
            self.lora_B = nn.utils.skip_init(made, rank, layer.out_channels, 1, **options)
        nn.init.zeros_(self.lora_A.weight)
        nn.init.zeros_(self.lora_B.weight)
        self.rank, self.alpha, self.scale = rank, float(alpha), 1.0

    def draw(self, seed: int) -> None:
        """The first factor as it starts."""
        first: Tensor = self.lora_A.weight
        drawn = torch.empty(first.shape, device="cpu")
        generator = torch.Generator().manual_seed(seed)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        first.data.copy_(drawn)

    def add(self, layer: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
        if self.scale == 0:
            return out
        x: Tensor = given[0]
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.weight.dtype)
        added: Tensor = self.lora_B(self.lora_A(x)) * (self.scale * self.alpha / self.rank)
        return out.add_(added.to(out.dtype))  # in place: a sum may have another layout, and then other last bits

    def product(self) -> Tensor:
        """``(alpha / rank) B A``, of the shape of the layer's weight."""
        first, second = self.lora_A.weight, self.lora_B.weight
        whole: Tensor = (second.flatten(1) @ first.flatten(1)).view(len(second), *first.shape[1:])
        return whole * (self.alpha / self.rank)


def low_rank(
    net: Net,
    rank: int | None = None,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    trained: Sequence[str] = (),
) -> Net:
    """A copy of a network (or of a denoiser or another module made of networks) that trains ``W + (alpha / rank) B A``
    on the layers ``targets``, names or endings of names, and the weights of the names ``trained`` in full; see
    :class:`LowRank` for what None stands.

    ValueError when the rank or alpha is not positive, no layer has such a name, or there are low-rank weights already.
    """
    asked = LowRank(rank, alpha, None if targets is None else tuple(targets))
    made = frozen(net, trained)
    add_factors(made, asked, seed)
    return made


def frozen(net: Net, trained: Sequence[str] = ()) -> Net:
    """A copy of a network whose weights are :class:`Frozen` on the same memory, but for those of the names
    ``trained``, which are copied."""
    shared = {id(p): Frozen(p) for name, p in net.named_parameters() if name not in trained}
    return copy.deepcopy(net, dict(shared))


def add_factors(net: nn.Module, asked: LowRank, seed: int = 0) -> None:
    """Put low-rank weights on the layers of a network that is :func:`frozen`, in place; errors as for
    :func:`low_rank`."""
    if factors_in(net):
        raise ValueError("the network holds low-rank weights already: merge them first")
    rank = rank_for(net, asked.targets) if asked.rank is None else asked.rank
    found = layers_for(net, asked.targets, rank)
    if not found:
        named = f"targets={asked.targets}: no linear or convolution layer of this network has such a name"
        raise ValueError(f"rank={rank}: no layer of this network is larger" if asked.targets is None else named)
    for name, layer in found.items():
        put(layer, rank, asked.alpha).draw(derive_seed("lora", seed, name))


def put(layer: nn.Module, rank: int, alpha: float | None = None) -> Factors:
    """Factors of zero on a layer."""
    made = Factors(layer, rank, rank if alpha is None else alpha)
    layer.add_module(NAME, made)
    layer.register_forward_hook(made.add)
    return made


def layers_for(net: nn.Module, targets: Sequence[str] | None, rank: int) -> dict[str, Any]:
    """The layers, by name, that low-rank weights go on: those whose names end in ``targets``; where None are said the
    attention projections of networks of diffusers, and of others all linear and convolution layers that have more
    weights than their factors."""
    takes = {name: module for name, module in net.named_modules() if takes_factors(module)}
    asked = ATTENTION if targets is None else tuple(targets)
    found = {n: layer for n, layer in takes.items() if any(n == t or n.endswith(f".{t}") for t in asked)}
    if found or targets is not None:
        return found
    return {name: layer for name, layer in takes.items() if size(layer, rank) < layer.weight.numel()}


def takes_factors(module: nn.Module) -> bool:
    """Whether low-rank weights can stand beside a layer: not on grouped convolutions, whose weight is no matrix, not on
    layers of which others read the weight alone, and not on those that train in full."""
    if isinstance(module, nn.Linear):
        alone = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        return is_frozen(module.weight) and not alone
    kinds = nn.Conv1d | nn.Conv2d | nn.Conv3d
    return isinstance(module, kinds) and module.groups == 1 and is_frozen(module.weight)


def size(layer: Any, rank: int) -> int:
    """How many numbers the low-rank weights of a layer are: ``rank (d_in + d_out)``, with the window counted in."""
    weight: Tensor = layer.weight
    return rank * (weight[0].numel() + len(weight))


def rank_for(net: nn.Module, targets: Sequence[str] | None = None) -> int:
    """The largest power of two up to 64 at which less than 5% as many numbers train as the network has."""
    whole, rank = sum(p.numel() for p in net.parameters()), LARGEST
    while rank > 1:
        trained = sum(size(layer, rank) for layer in layers_for(net, targets, rank).values())
        if 0 < trained < SHARE * whole:
            break
        rank //= 2
    return rank


def factors_in(net: nn.Module) -> dict[str, Factors]:
    """The low-rank weights of a network by the name of their layer."""
    found = {name: module for name, module in net.named_modules() if isinstance(module, Factors)}
    return {name.removesuffix(f".{NAME}"): module for name, module in found.items()}


def factors(net: nn.Module) -> dict[str, Tensor]:
    """The low-rank weights of a network by name: ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``."""
    return {
        f"{name}.{letter}.weight": held.get_submodule(letter).get_parameter("weight")
        for name, held in factors_in(net).items()
        for letter in ("lora_A", "lora_B")
    }


def is_frozen(weight: Tensor) -> bool:
    """Whether a weight is part of the base of low-rank weights."""
    return type(weight) is Frozen


def moving(net: nn.Module) -> list[nn.Parameter]:
    """The weights of a network but for the frozen ones of low-rank copies."""
    return [p for p in net.parameters() if not is_frozen(p)]


@contextmanager
def scaled(net: nn.Module, scale: float) -> Iterator[None]:
    """A block in which the low-rank weights count ``scale`` times: 0 is the base, exactly, 1 the network as it is.

    ValueError for a network without any.
    """
    held = list(factors_in(net).values())
    if not held:
        raise ValueError("the network holds no low-rank weights to scale")
    before = [each.scale for each in held]
    for each in held:
        each.scale = scale * each.scale
    try:
        yield
    finally:
        for each, own in zip(held, before, strict=True):
            each.scale = own


@torch.no_grad()
def merged(net: Net) -> Net:
    """A copy with the low-rank weights added to the layers' own: an ordinary network, on memory of its own."""
    plain = copy.deepcopy(net)
    for name, held in factors_in(plain).items():
        layer: Any = plain.get_submodule(name)
        weight: Tensor = layer.weight
        total = weight.to(held.lora_A.weight.dtype) + held.scale * held.product()
        layer.weight = nn.Parameter(total.to(weight.dtype), requires_grad=False)
        remove(layer, held)
    for path, weight in list(plain.named_parameters(remove_duplicate=False)):
        if is_frozen(weight):
            replace(plain, path, nn.Parameter(weight.detach().clone(), requires_grad=False))
    return plain


def remove(layer: nn.Module, held: Factors) -> None:
    """Take low-rank weights off a layer."""
    delattr(layer, NAME)
    for key, hook in list(layer._forward_hooks.items()):
        if getattr(hook, "__self__", None) is held:
            del layer._forward_hooks[key]


def replace(net: nn.Module, path: str, weight: nn.Parameter) -> None:
    """Put another parameter in the place of the one called ``path``."""
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, weight)


def freeze(net: nn.Module, trained: Sequence[str] = ()) -> None:
    """Make the weights of a network :class:`Frozen`, in place, but for those of the names ``trained``."""
    for path, weight in list(net.named_parameters(remove_duplicate=False)):
        if path not in trained:
            replace(net, path, Frozen(weight))


def carry_over(source: nn.Module, target: nn.Module) -> None:
    """Give ``target``, a network that has the layers of ``source`` and more, the frozen weights of ``source`` and
    low-rank weights of zero where that has some."""
    for path, weight in source.named_parameters(remove_duplicate=False):
        if is_frozen(weight):
            replace(target, path, Frozen(weight))
    for name, held in factors_in(source).items():
        put(target.get_submodule(name), held.rank, held.alpha)


def frozen_names(modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """The names of the frozen weights in named modules, ``<module>.<name>``."""
    return frozenset(
        f"{name}.{path}"
        for name, module in modules.items()
        for path, weight in module.named_parameters(remove_duplicate=False)
        if is_frozen(weight)
    )
