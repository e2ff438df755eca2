"""Features inside a network, taken while it is called: one forward pass gives the denoiser's answer and the
activations of any of its layers.

Layers are named as PyTorch names modules (``"middle.2"``, ``"model.transformer_blocks.9"``), hooks read them, and the
network is entered through its ``forward``: that works on networks of any make, and on one cut into parts among
processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditions import Cond, to
from fewstep.denoisers import Denoiser, NetworkDenoiser, networks_in
from fewstep.networks.inputs import inputs_of


def tapped(
    denoiser: Denoiser, layers: Sequence[str], x: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """``D(x, t, cond)`` and the features of ``layers``, from one call of the network.

    Features are what the layer gives: grids ``[B, C, ...]``, tokens ``[B, L, D]`` or vectors ``[B, D]``; of several
    tensors the last.  Gradients flow through them as through the network.  ValueError for a layer that the network has
    not or does not come through, and where it is called more than once (guidance: tap the model without it).
    """
    with tapping(only_network(denoiser).net, layers) as seen:
        x0 = denoiser(x, t, cond, **extras)
    return x0, once_each(seen)


@contextmanager
def tapping(net: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """A block in which what ``layers`` give is kept, by name, once for each call."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    modules = dict(net.named_modules())
    with ExitStack() as stack:
        for name in layers:
            if name not in modules:
                raise ValueError(
                    f"'{name}' is no layer of this {type(net).__name__}; tappable_layers(denoiser) lists them"
                )

            def keep(module: nn.Module, given: Any, out: Any, name: str = name) -> None:
                if (features := features_of(out)) is not None:
                    seen[name].append(features)

            stack.callback(modules[name].register_forward_hook(keep).remove)
        yield seen


def once_each(seen: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
    """What each layer gave; ValueError unless that was one tensor in the call."""
    for name, given in seen.items():
        if len(given) != 1:
            raise ValueError(f"layer '{name}' gave features {len(given)} times in one call: only once can be tapped")
    return [given[0] for given in seen.values()]


def features_of(out: Any) -> Tensor | None:
    """The features in what a layer gives: itself, or the last tensor of several."""
    found = [part for part in (out if isinstance(out, tuple | list) else (out,)) if isinstance(part, Tensor)]
    return found[-1] if found and found[-1].is_floating_point() else None


def only_network(denoiser: Denoiser) -> NetworkDenoiser:
    """The network in a denoiser; ValueError where there is none, or more than one."""
    found = networks_in(denoiser)
    if len({id(part.net) for part in found}) != 1:
        raise ValueError(
            f"features are those of one network, and this {type(denoiser).__name__} is made of {len(found)}"
        )
    return found[0]


def tappable_layers(denoiser: Denoiser, cond: Cond = None) -> dict[str, tuple[int, ...]]:
    """The layers that a network is a sequence of, in the order in which they run, and the shape of one sample's
    features.

    They are the members of its outermost lists of modules, or without lists its own members, that give features of the
    highest rank (what embeds a time or a condition has a lower one), found by one call on a sample of zeros, under
    ``cond`` of one row where the network needs more than its "no condition" holds (a picture).  ValueError where
    nothing gives any.
    """
    part = only_network(denoiser)
    lists = [name for name, module in part.net.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    names = [f"{name}.{child}" for name in outermost for child, _ in part.net.get_submodule(name).named_children()]
    names = names or [name for name, _ in part.net.named_children()]
    order: list[str] = []
    with tapping(part.net, names) as seen, ExitStack() as stack:
        for name in names:
            hook = part.net.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
            stack.callback(hook.remove)
        trial_call(part, cond)
    shapes = {name: tuple(seen[name][0].shape[1:]) for name in order if len(seen[name]) == 1}
    rank = max(map(len, shapes.values()), default=0)
    found = {name: shape for name, shape in shapes.items() if len(shape) == rank}
    if not found:
        raise ValueError(f"no layer of this {type(part.net).__name__} gives features: name the ones to tap")
    return found


@torch.no_grad()
def bottleneck(denoiser: Denoiser, cond: Cond = None) -> str:
    """The layer that gives what :meth:`Denoiser.features <fewstep.denoisers.Denoiser.features>` gives, found by one
    call; of a network that says no features the middle one of the :func:`tappable_layers` of the fewest places.
    ``cond`` as for those.  ValueError where the features are no layer's own."""
    part = only_network(denoiser)
    if not says_features(part):
        shapes = tappable_layers(denoiser, cond)
        places = {name: math.prod(shape[1:] if len(shape) > 2 else shape[:-1]) for name, shape in shapes.items()}
        fewest = [name for name, count in places.items() if count == min(places.values())]
        return fewest[len(fewest) // 2]
    with tapping(part.net, [name for name, _ in part.net.named_modules() if name]) as seen:
        x, t, _ = trial_input(part)
        told = part.null if cond is None else to(cond, x.device)
        wanted = part.features(x, t, told).untyped_storage().data_ptr()
        own = [n for n, given in seen.items() if given and given[-1].untyped_storage().data_ptr() == wanted]
    if not own:
        raise ValueError(f"the features of this {type(part.net).__name__} are those of no layer: name layers to tap")
    return own[-1]


def says_features(part: NetworkDenoiser) -> bool:
    """Whether a network has a pass that ends at its features."""
    return getattr(part.net, "feature_shape", None) is not None


def stops_at(denoiser: Denoiser, layers: Sequence[str], cond: Cond = None) -> bool:
    """Whether ``layers`` are the bottleneck alone, so that a pass for their features need not go further."""
    if len(layers) != 1 or denoiser.network is None or not says_features(denoiser.network):
        return False
    try:
        return bottleneck(denoiser, cond) == layers[0]
    except (ValueError, TypeError):  # those of no layer, or with further inputs
        return False


def feature_shapes(denoiser: Denoiser, layers: Sequence[str], cond: Cond = None) -> list[tuple[int, ...]]:
    """The shape of one sample's features in each of ``layers``; ``cond`` as for :func:`tappable_layers`."""
    part = only_network(denoiser)
    with tapping(part.net, layers) as seen:
        trial_call(part, cond)
    return [tuple(features.shape[1:]) for features in once_each(seen)]


@torch.no_grad()
def trial_call(part: NetworkDenoiser, cond: Cond = None) -> None:
    """One call on a sample of zeros, with further inputs of 0, under ``cond`` of one row or without a condition."""
    x, t, extras = trial_input(part)
    part(x, t, part.null if cond is None else to(cond, x.device), **extras)


def trial_input(part: NetworkDenoiser) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A sample of zeros, the noisiest time, and further inputs of 0."""
    like = next(part.net.parameters(), torch.zeros(()))
    x = torch.zeros(1, *part.shape, device=like.device, dtype=like.dtype)
    time = torch.tensor([part.schedule.t_max], dtype=torch.float64, device=like.device)
    return x, time, {name: x.new_zeros(1) for name in inputs_of(part.net)}


def spread_layers(denoiser: Denoiser, count: int, cond: Cond = None) -> tuple[str, ...]:
    """``count`` of the :func:`tappable_layers` at equal distances, from a tenth of the depth to the end; all where
    there are fewer."""
    layers = list(tappable_layers(denoiser, cond))
    if count >= len(layers):
        return tuple(layers)
    last = len(layers) - 1
    if count == 1:
        return (layers[last],)
    return tuple(layers[round(last * (0.1 + 0.9 * i / (count - 1)))] for i in range(count))


def grid_shape(shape: tuple[int, ...], picture: tuple[int, ...]) -> tuple[int, ...]:
    """The shape ``(D, h, w)`` of tokens ``(L, D)`` that are the square patches of a ``picture`` ``(C, H, W)``; any
    other shape as it is."""
    if len(shape) != 2 or len(picture) != 3:
        return shape
    tokens, width = shape
    _, high, wide = picture
    side = math.isqrt(high * wide // tokens)
    if not side or side**2 * tokens != high * wide or high % side or wide % side:
        return shape
    return (width, high // side, wide // side)


def as_grid(features: Tensor, picture: tuple[int, ...]) -> Tensor:
    """Tokens ``[B, L, D]`` that are the patches of a picture as its grid ``[B, D, h, w]``; others as they are."""
    shape = grid_shape(tuple(features.shape[1:]), picture)
    return features.mT.unflatten(2, shape[1:]) if len(shape) == features.ndim else features
