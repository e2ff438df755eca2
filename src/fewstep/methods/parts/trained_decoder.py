"""A discriminator that trains more than its heads: low-rank weights in the decoder of its body, as in SCott (Liu et al.
2024) and in the trained discriminator of Hyper-SD (Ren et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser
from fewstep.methods.parts.adversary import Adversary, Discriminator
from fewstep.methods.start import Start
from fewstep.networks.lora import LowRank, add_factors, frozen, layers_for
from fewstep.networks.taps import bottleneck, only_network, tappable_layers


def body_and_heads(
    rules: Adversary, body: Denoiser, rank: int, start: Start
) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """The networks "body" and "discriminator" of a game, and the names of those that train: the discriminator alone, or
    with a ``rank`` a copy of the body too, at whose end the discriminator looks."""
    trained: tuple[str, ...] = ("discriminator",)
    if rank:
        body, last = with_trained_decoder(body, rank, start.seed, start.condition())
        rules, trained = replace(rules, layers=(last,)), ("discriminator", "body")
    return {"body": body, "discriminator": Discriminator(rules, body, start.condition())}, trained


def with_trained_decoder(body: Denoiser, rank: int, seed: int, cond: Cond = None) -> tuple[Denoiser, str]:
    """A copy of a denoiser that trains low-rank weights on the layers behind its bottleneck, where that is the last one
    on the second half of all, on the memory of the others; and the name of the last layer.

    ``cond`` as for :func:`~fewstep.networks.taps.tappable_layers`.  ValueError where none of them can have such
    weights.
    """
    layers, middle = list(tappable_layers(body, cond)), bottleneck(body, cond)
    behind = (layers[layers.index(middle) + 1 :] if middle in layers else []) or layers[len(layers) // 2 :]
    copy = frozen(body)
    net = only_network(copy).net
    inside = tuple(f"{layer}." for layer in behind)
    targets = tuple(n for n in layers_for(net, None, rank) if n in behind or n.startswith(inside))
    if not targets:
        raise ValueError(f"rank={rank}: none of the layers {', '.join(behind)} is larger, or could train")
    add_factors(copy, LowRank(rank, targets=targets), seed)
    return copy, behind[-1]
