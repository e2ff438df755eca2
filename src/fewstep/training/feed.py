"""What every iteration reads: a function of its number alone, so that a resumed run reads what the killed one would
have read, whoever fetches it and however far ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from time import perf_counter as clock

from torch import nn

from fewstep.data.dataset import Draw, Rows, Samples
from fewstep.models import model_of
from fewstep.randomness import derive_seed
from fewstep.training.orders import Epochs, InSequence, Order

#: The source that everything but further columns comes from.
MAIN = "data"


class Feed:
    """The rows of this process's micro-batches, from one source or several by name.

    Micro-batch ``part`` of ``parts`` reads its share of the global ``batch`` of every source.  Each source has an order
    of its own; that of the main one depends on the ``seed`` only, and may be another ``order`` than epochs.
    ``choosing`` are the seconds that the orders took to say what to read; reading it is not counted.
    """

    def __init__(
        self,
        sources: Mapping[str, Samples],
        batch: int,
        seed: int,
        mine: range,
        parts: int,
        order: Order | None = None,
    ) -> None:
        self.sources, self.batch, self.seed, self.mine, self.parts = dict(sources), batch, seed, mine, parts
        self.order = order or Epochs()
        self.choosing = 0.0
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
        own = InSequence() if self.sources[name].in_sequence else None
        order = own or (self.order if name == MAIN else Epochs())
        before = clock()
        read = order.reader(self.sources[name], seed)
        while True:
            reading = read(step * self.batch, self.batch)
            self.choosing += clock() - before
            whole, epochs = reading.indices.chunk(self.parts), reading.epochs.chunk(self.parts)
            yield from (Draw(whole[part], epochs[part], seed) for part in self.mine)
            step, before = step + 1, clock()

    def close(self) -> None:
        """Read no further, and end the processes that read ahead."""
        self.ahead, self.step = {}, None


def fitted(data: Samples, model: nn.Module) -> Samples:
    """The data as a model is trained on them; ValueError when they are of another kind or shape."""
    return model_of(model).accepts(data)
