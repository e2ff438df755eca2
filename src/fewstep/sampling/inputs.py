"""What a sampler is given, checked and made ready in one place: how many samples, from which seeds, in which type,
under which conditions.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.conditions import Cond, count, to
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import FlowMap
from fewstep.guidance import MOST_GUIDANCE
from fewstep.randomness import Noise, PerSample, Rng
from fewstep.sampling.brownian import BrownianPath
from fewstep.values import tensor_of, whole

#: The types that a state may have.
KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: More samples than any memory holds.
MOST = 2**31


class Conditional(Protocol):
    """What may take class labels."""

    @property
    def classes(self) -> int | None: ...


Numbers = Tensor | np.ndarray | Sequence[Any]
Generators = torch.Generator | Sequence[torch.Generator]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout and its like off for a while; every submodule gets its own mode back."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


@dataclass(frozen=True)
class Start:
    """Standard normal ``noise`` ``[n, *shape]``, the conditions, and where the noise of later steps comes from."""

    noise: Tensor
    cond: Cond
    fresh: Noise


def start_of(
    model: Denoiser | FlowMap,
    n: int,
    cond: Cond = None,
    *,
    noise: Numbers | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    generator: Generators | None = None,
    one_path: bool = False,
) -> Start:
    """What ``n`` samples of a model start from.  Arguments and errors are those of :func:`~fewstep.sampling.sample`.

    The state has the type of the model's weights; a world, which has none, takes that of ``noise``.
    """
    n = whole("n", n, 1, MOST)
    like = noise if isinstance(noise, Tensor) else weights_of(model, torch.empty(0))
    first, fresh = sources(n, seed, seeds, generator, one_path, like.device)
    if noise is None:
        shape = torch.empty(n, *model.shape, dtype=like.dtype, device=like.device)
        # from a generator as diffusers draws, in half precision too
        start = first.normal_like(shape) if generator is not None else normal_like(first, shape)
    else:
        start = states_for(model, "noise", noise, n)
    return Start(start, conditions(model, n, cond, like.device), fresh)


def weights_of(model: nn.Module, other: Tensor) -> Tensor:
    """The first weight of real numbers in a model, without weights its first such buffer, or ``other``."""
    kept = (*model.parameters(), *model.buffers())
    return next((tensor for tensor in kept if tensor.dtype in KINDS), other)


def states_for(model: Denoiser | FlowMap, name: str, value: Numbers, n: int | None = None) -> Tensor:
    """``n`` states for a model (None: as many as there are), checked, in the type of its weights and on the device of
    ``value``; a world, which has no weights, takes a tensor in its own type."""
    x = tensor_of(name, value)
    if n is None:
        n = len(x) if x.ndim else 0
        if not n:
            raise ValueError(f"{name} of shape {list(x.shape)} holds no samples of {list(model.shape)}")
    x = states(name, x, (n, *model.shape))
    if not isinstance(value, Tensor):
        like = weights_of(model, torch.empty(0))
        return x.to(like.device, like.dtype)
    return x.to(next((p.dtype for p in model.parameters() if p.dtype in KINDS), x.dtype))


def normal_like(source: Noise, x: Tensor) -> Tensor:
    """Standard normal of the shape and type of ``x``; half precision is drawn in float32 and rounded."""
    if not callable(getattr(source, "normal_like", None)):
        raise TypeError(f"rng={source!r} must be a source of noise, such as Rng(0)")
    return source.normal_like(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


def repeated(x: Tensor, times: int) -> Tensor:
    """``[times B, ...]``: the whole batch ``x`` ``[B, ...]``, copy behind copy."""
    return x.repeat(times, *[1] * (x.ndim - 1))


def sources(
    n: int,
    seed: int,
    seeds: Sequence[int] | None,
    generator: Generators | None,
    one_path: bool,
    device: torch.device,
) -> tuple[Noise, Noise]:
    """Where the start noise and the fresh noise of ``n`` samples come from: one source for all, or one a sample."""
    whole("seed", seed)
    if generator is not None and (seeds is not None or seed):
        raise ValueError("generator stands beside seed or seeds: give one of them")
    if seeds is not None and seed:
        raise ValueError(f"seed={seed} stands beside seeds: give one of them")
    if generator is None:
        names = [seed] if seeds is None else [whole(f"seeds[{k}]", s) for k, s in enumerate(listed("seeds", seeds, n))]
        rngs = [Rng(name, "sample", device=device) for name in names]
    else:
        given = [generator] if isinstance(generator, torch.Generator) else listed("generator", generator, n)
        for g in given:
            if not isinstance(g, torch.Generator):
                raise TypeError(f"generator must be a torch.Generator, or one a sample, got {type(g).__name__}")
        rngs = [Rng.of(g, device) for g in given]
        # a path is named by what the generator would draw next, so that the start noise is the same with it
        names = [Rng.of(g.clone_state()).shared_integer(0, 2**62) for g in given]
    paths = [BrownianPath(name, "sample", device=device) for name in names]
    if seeds is None and (generator is None or isinstance(generator, torch.Generator)):
        return rngs[0], paths[0] if one_path else rngs[0]
    return PerSample(rngs), PerSample(paths) if one_path else PerSample(rngs)


def conditions(model: Conditional, n: int, cond: Cond, device: torch.device) -> Cond:
    """``cond`` for ``n`` samples; the model's labels in turn when it is None and the model has any.

    Labels are checked, lists and arrays of them are taken.  What a model without classes takes is its own affair, but
    every tensor must hold one row a sample.
    """
    if cond is None:
        return torch.arange(n, device=device) % model.classes if model.classes else None
    if isinstance(cond, np.ndarray) or (model.classes and isinstance(cond, Sequence)):
        cond = tensor_of("cond", cond)
    if isinstance(cond, Mapping):
        if (held := count(cond)) not in (None, n):
            raise ValueError(f"cond holds {held} conditions for {n} samples")
        return to(cond, device)
    if not isinstance(cond, Tensor):
        if model.classes:
            raise TypeError(f"cond={cond!r} must be labels, one a sample: [{n}] whole numbers")
        return cond
    if cond.ndim == 0 or len(cond) != n:
        raise ValueError(f"cond holds {len(cond) if cond.ndim else 'no'} conditions for {n} samples")
    if not model.classes or (cond.is_floating_point() and cond.ndim > 1):
        return cond.to(device)
    if cond.dtype == torch.bool or cond.is_floating_point() or cond.is_complex():
        raise TypeError(f"cond: labels are whole numbers, got {cond.dtype}")
    if cond.ndim > 1:
        raise ValueError(f"cond of shape {list(cond.shape)}: labels are one number a sample, [{n}]")
    low, high = int(cond.min()), int(cond.max())
    if low < -1 or high >= model.classes:
        raise ValueError(f"cond: labels must lie in 0 .. {model.classes - 1} (-1 for none), got {low} .. {high}")
    return cond.long().to(device)


def given_conditions(model: Denoiser | FlowMap, x: Tensor, cond: Cond) -> Cond:
    """``cond`` for the states ``x``, checked; None stays None, which is no label."""
    return None if cond is None else conditions(model, len(x), cond, x.device)


def guidance_of(scale: float | Numbers, n: int) -> float | Tensor:
    """A guidance weight, a number or one a sample ``[n]``, which must be finite."""
    if isinstance(scale, numbers.Real):
        return scale
    weights = tensor_of("guidance", scale)
    if weights.is_complex() or weights.dtype == torch.bool:
        raise TypeError(f"guidance of type {weights.dtype}: it must be real numbers")
    if weights.shape not in ((), (n,)):
        raise ValueError(f"guidance of shape {list(weights.shape)} for {n} samples: give a number or one a sample")
    if not bool((weights.abs() <= MOST_GUIDANCE).all()):
        raise ValueError(f"guidance={weights.tolist()} must lie in [{-MOST_GUIDANCE:g}, {MOST_GUIDANCE:g}]")
    return weights


def states(name: str, value: Numbers, shape: tuple[int, ...]) -> Tensor:
    """``value`` as a tensor ``[n, *shape]``; TypeError unless it is of real floating point numbers, ValueError unless
    it has that shape and is finite."""
    x = tensor_of(name, value)
    if x.dtype not in KINDS:
        raise TypeError(f"{name} of type {x.dtype}: it must be real floating point numbers, such as torch.float32")
    if x.shape != shape:
        n, *rest = shape
        raise ValueError(f"{name} of shape {list(x.shape)} does not fit {n} samples of {rest}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} holds numbers that are not finite")
    return x


def listed(name: str, values: Sequence[Any], n: int) -> list[Any]:
    """One value a sample, as a list."""
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray | Tensor) or np.ndim(values) == 0:
        raise TypeError(f"{name}={values!r} must be a list, one a sample")
    if len(values) != n:
        raise ValueError(f"{name} holds {len(values)} for {n} samples")
    return values.tolist() if isinstance(values, np.ndarray | Tensor) else list(values)
