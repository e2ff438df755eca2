"""The data that a method chooses from, beside the networks that help it choose."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from fewstep.data.dataset import Samples, class_labels
from fewstep.methods.start import Start
from fewstep.randomness import Rng

#: So many samples are read at a time.
CHUNK = 256


class Whole(nn.Module):
    """All data of a run among its networks; it has no weights."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.start = start

    @property
    def data(self) -> Samples:
        return self.start.data

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.data.classes or 0

    def labels(self) -> Tensor:
        """All labels ``[N]``; ValueError for data without."""
        return class_labels(self.data)

    def chunks(self, index: Tensor) -> Iterator[Tensor]:
        """The samples at ``index``, as training reads them, some at a time; ValueError for data without samples."""
        for part in index.split(CHUNK):
            x = self.data.rows(part).x
            if x is None:
                raise ValueError(f"data '{self.data.name}' holds no samples")
            yield x

    def rng(self, *name: str) -> Rng:
        """What random choices are drawn from, a source by name."""
        return Rng(self.start.seed, *name)
