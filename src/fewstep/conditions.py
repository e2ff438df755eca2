"""Conditions: what a sample is made under, as a tree of tensors.

A condition is None (unconditional), a tensor (class labels ``[B]``, or an embedding ``[B, ...]``), or tensors by name
(``prompt_embeds``, ``prompt_attention_mask``, a picture, a camera).  Every leaf leads with the batch, so a condition is
cut, joined and moved like a tensor.  "No condition" of a model is a condition of one row, its ``null``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Cond = Tensor | Mapping[str, Tensor] | None


def each(change: Callable[[Tensor], Tensor], cond: Cond) -> Cond:
    """``change`` applied to every leaf."""
    if cond is None or isinstance(cond, Tensor):
        return None if cond is None else change(cond)
    return {name: change(leaf) for name, leaf in cond.items()}


def leaves(cond: Cond) -> dict[str, Tensor]:
    """The leaves by name; that of a condition without names is ``cond``."""
    if cond is None:
        return {}
    return {"cond": cond} if isinstance(cond, Tensor) else dict(cond)


def count(cond: Cond) -> int | None:
    """How many samples a condition is for; None when there is no condition.  ValueError when its leaves disagree, or
    one has no rows."""
    rows = {name: len(leaf) if leaf.ndim else None for name, leaf in leaves(cond).items()}
    if not rows:
        return None
    first = next(iter(rows.values()))
    if first is None or any(n != first for n in rows.values()):
        raise ValueError("cond: every part needs one row a sample, got " + _listed(rows))
    return first


def _listed(rows: Mapping[str, int | None]) -> str:
    return ", ".join(f"{name} {'one number' if n is None else f'{n} rows'}" for name, n in rows.items())


def rows(cond: Cond, index: Tensor | slice) -> Cond:
    """The chosen rows."""
    return each(lambda leaf: leaf[index], cond)


def to(cond: Cond, device: torch.device | str) -> Cond:
    """The same on another device."""
    return each(lambda leaf: leaf.to(device), cond)


def expand(cond: Cond, n: int) -> Cond:
    """A condition of one row for ``n`` samples, without copies."""
    return each(lambda leaf: leaf.expand(n, *leaf.shape[1:]), cond)


def repeat(cond: Cond, times: int) -> Cond:
    """The whole condition, copy behind copy: ``[times B, ...]``."""
    return each(lambda leaf: leaf.repeat(times, *[1] * (leaf.ndim - 1)), cond)


def join(conds: Sequence[Cond]) -> Cond:
    """Conditions of several batches as that of one, in their order; ValueError when they are not of one kind."""
    first = conds[0]
    kinds = {tuple(leaves(cond)) for cond in conds}
    if len(kinds) > 1:
        raise ValueError(
            "cond: conditions of different kinds cannot be joined: " + " and ".join(map(str, sorted(kinds)))
        )
    if first is None:
        return None
    parts = {name: torch.cat([leaves(cond)[name] for cond in conds]) for name in leaves(first)}
    return parts["cond"] if isinstance(first, Tensor) else parts


def without(null: Cond, cond: Cond, n: int) -> Cond:
    """The condition of ``n`` samples with what ``null`` names put at "no condition": of a prompt and a picture, the
    picture stays where ``null`` has the prompt only."""
    if isinstance(null, Mapping) and isinstance(cond, Mapping):
        device = next(iter(cond.values())).device
        return {**cond, **leaves(expand(to(null, device), n))}
    return expand(null, n)


def where(gone: Tensor, null: Cond, cond: Cond) -> Cond:
    """``cond`` with the rows in which ``gone`` ``[B]`` is true put at ``null``, which has one row; what ``null`` does
    not name stays.

    ValueError when ``null`` is None or of another kind, or when its rows have another shape (prompts of other lengths).
    """
    new, old = leaves(null), leaves(cond)
    if not new or set(new) - set(old):
        raise ValueError(f"cond: no condition is {sorted(new) or 'unknown'} here, the condition holds {sorted(old)}")

    def mixed(name: str, leaf: Tensor) -> Tensor:
        if name not in new:
            return leaf
        if new[name].shape[1:] != leaf.shape[1:]:
            raise ValueError(
                f"cond: {name} has rows of shape {list(leaf.shape[1:])}, no condition {list(new[name].shape[1:])}: pad "
                "them to one length"
            )
        return torch.where(gone.reshape(-1, *[1] * (leaf.ndim - 1)), new[name].to(leaf), leaf)

    parts = {name: mixed(name, leaf) for name, leaf in old.items()}
    return parts["cond"] if isinstance(cond, Tensor) else parts
