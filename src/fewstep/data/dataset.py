"""What training draws from: an array of samples with labels, read by index."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fewstep.randomness import Rng


@dataclass(frozen=True)
class Dataset:
    """Samples in memory.

    ``x`` is ``[N, ...]``: uint8 pictures ``[N, C, H, W]`` (read as floats in [-1, 1]) or float tensors, read as they
    are.  ``labels`` are int64 ``[N]`` or None; ``noise`` is the paired noise of a pair store or None.
    """

    name: str
    x: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    noise: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x.ndim < 2 or len(self.x) == 0:
            raise ValueError(f"data '{self.name}': need samples [N, ...], got shape {list(self.x.shape)}")
        if self.x.is_floating_point() and not bool(torch.isfinite(self.x).all()):
            bad = int((~torch.isfinite(self.x.flatten(1)).all(1)).nonzero()[0])
            raise ValueError(f"data '{self.name}': sample {bad} holds NaN or infinity; clean the data first")
        if self.labels is not None:
            if self.labels.shape != (len(self.x),):
                raise ValueError(
                    f"data '{self.name}': {len(self.x)} samples but labels of shape {list(self.labels.shape)}"
                )
            if int(self.labels.min()) < 0:
                raise ValueError(f"data '{self.name}': labels start at 0, found {int(self.labels.min())}")
            if self.class_names and int(self.labels.max()) >= len(self.class_names):
                raise ValueError(
                    f"data '{self.name}': label {int(self.labels.max())} but only {len(self.class_names)} class names"
                )

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.x.shape[1:])

    @property
    def classes(self) -> int | None:
        """The number of class labels, None when there are no labels."""
        if self.labels is None:
            return None
        return len(self.class_names) or int(self.labels.max()) + 1

    def read(self, indices: Tensor | slice) -> Tensor:
        """Samples as floats, pictures in [-1, 1]."""
        chosen = self.x[indices]
        return chosen.float() / 127.5 - 1 if chosen.dtype == torch.uint8 else chosen

    def subset(self, indices: Tensor | slice, name: str | None = None) -> Dataset:
        """The chosen samples as a data set."""
        labels = None if self.labels is None else self.labels[indices]
        noise = None if self.noise is None else self.noise[indices]
        return Dataset(name or self.name, self.x[indices], labels, self.class_names, noise)


def epoch_indices(n: int, start: int, count: int, seed: int) -> Tensor:
    """The indices that training reads from position ``start`` on: every epoch is its own permutation of ``n``.

    A pure function of the position, so a resumed run reads exactly what the killed one would have read.
    """
    chosen: list[Tensor] = []
    while count > 0:
        epoch, offset = divmod(start, n)
        order = epoch_order(n, epoch, seed)[offset : offset + count]
        chosen.append(order)
        start, count = start + len(order), count - len(order)
    return torch.cat(chosen)


@lru_cache(maxsize=2)
def epoch_order(n: int, epoch: int, seed: int) -> Tensor:
    """The permutation of one epoch, kept while it is read: it takes 10 ms to draw for a million samples."""
    return Rng(seed, "epoch", epoch).shuffled(n)
