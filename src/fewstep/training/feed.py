"""What every iteration reads: a function of its number alone, so that a resumed run reads what the killed one would
have read, whoever fetches it and however far ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from fewstep.conditions import leaves
from fewstep.data.dataset import Draw, Rows, Samples, Unlabelled, epoch_indices
from fewstep.denoisers import Denoiser
from fewstep.randomness import derive_seed

#: The source that everything but further columns comes from.
MAIN = "data"


class Feed:
    """The rows of this process's micro-batches, from one source or several by name.

    Micro-batch ``part`` of ``parts`` reads its share of the global ``batch`` of every source.  Each source has an order
    of its own; that of the main one depends on the ``seed`` only.
    """

    def __init__(self, sources: Mapping[str, Samples], batch: int, seed: int, mine: range, parts: int) -> None:
        self.sources, self.batch, self.seed, self.mine, self.parts = dict(sources), batch, seed, mine, parts
        self.step: int | None = None
        self.ahead: dict[str, Iterator[Rows]] = {}

    def reads(self, sources: Mapping[str, Samples]) -> bool:
        """Whether these are the sources."""
        return [*self.sources] == [*sources] and all(self.sources[name] is data for name, data in sources.items())

    def read(self, step: int) -> Iterator[dict[str, Rows]]:
        """The rows of each micro-batch of iteration ``step``, by source."""
        if self.step != step:
            self.ahead = {name: data.feed(self.draws(name, step)) for name, data in self.sources.items()}
        self.step = step + 1
        for _ in self.mine:
            yield {name: next(rows) for name, rows in self.ahead.items()}

    def draws(self, name: str, step: int) -> Iterator[Draw]:
        """What this process reads from iteration ``step`` on, one micro-batch after the other."""
        seed = self.seed if name == MAIN else derive_seed(self.seed, "source", name)
        n = len(self.sources[name])
        while True:
            first = step * self.batch
            whole = epoch_indices(n, first, self.batch, seed).chunk(self.parts)
            epochs = (torch.arange(first, first + self.batch) // n).chunk(self.parts)
            yield from (Draw(whole[part], epochs[part], seed) for part in self.mine)
            step += 1

    def close(self) -> None:
        """Read no further, and end the processes that read ahead."""
        self.ahead, self.step = {}, None


def fitted(data: Samples, model: Denoiser) -> Samples:
    """The data as a model is trained on them: without labels when it knows no conditions.

    ValueError when the samples are of another shape, or their conditions not of the model's kind.
    """
    if tuple(data.shape) != tuple(model.shape):
        raise ValueError(f"data '{data.name}' has samples {list(data.shape)}, the model makes {list(model.shape)}")
    if model.classes:
        if data.classes is None:
            raise ValueError(
                f"data '{data.name}' has no labels, the model knows {model.classes} classes: give every sample one "
                "(-1 trains its unconditional branch)"
            )
        if data.classes > model.classes:
            raise ValueError(f"data '{data.name}' has {data.classes} classes, the model knows {model.classes}")
        return data
    if data.classes is None:
        return data
    if model.null is not None:
        takes = ", ".join(leaves(model.null))
        raise ValueError(f"data '{data.name}' has class labels, the model takes {takes}")
    return Unlabelled(data)
