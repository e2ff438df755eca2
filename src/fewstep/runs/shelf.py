"""Where a run keeps the stores that its stages train on.

In a run folder a store is ``stores/<name>-<digest>/`` in parts of some batches each: a run that was killed makes the
parts that are missing, of several processes each makes its share, and stages that ask for the same find it made.
"""

from __future__ import annotations

from pathlib import Path

from fewstep.data.dataset import Dataset
from fewstep.files import load_tensors, save_tensors
from fewstep.methods.parts.stores import Store, Tensors, joined
from fewstep.training.parallel import Parallel
from fewstep.training.progress import Bar

#: The parts of a large store.
PARTS = 64


class Shelf:
    """The stores of one run, in its folder or (without one) in memory; ``shelf(what, seed)`` is a store as data.

    The seed counts when a store is made; the run's stages share it, whichever asked first.
    """

    def __init__(self, folder: Path | None, parallel: Parallel, show: bool) -> None:
        self.folder, self.parallel, self.show = folder, parallel, show and parallel.main
        self.held: dict[str, Dataset] = {}

    def __call__(self, what: Store, seed: int) -> Dataset:
        digest = what.digest()
        if self.folder is None:
            if digest not in self.held:
                self.held[digest] = what.together(list(self.made(what, seed, range(what.batches)).values()))
            return self.held[digest]
        # weights that processes have trained together may differ in last bits: the main one's count
        key = int(self.parallel.agree(int(digest[:12], 16)))
        place = self.folder / "stores" / f"{what.name}-{key:012x}"
        self.fill(place, what, seed)
        self.parallel.barrier()
        return what.together([load_tensors(file) for file in files(place, what).values()])

    def fill(self, place: Path, what: Store, seed: int) -> None:
        """Make this process's share of the parts that are missing."""
        mine = list(files(place, what).items())[self.parallel.rank :: self.parallel.world]
        missing = {batches: file for batches, file in mine if not file.is_file()}
        place.mkdir(parents=True, exist_ok=True)
        done: dict[int, Tensors] = {}
        bar = Bar(what.name, self.show)
        wanted = {i for batches in missing for i in batches}
        bar.update(min(wanted, default=0) / what.batches)
        for i, tensors in what.make(seed, wanted):
            done[i] = tensors
            for batches, file in missing.items():
                if i == batches[-1]:
                    save_tensors(file, joined([done.pop(j) for j in batches]))
            bar.update((i + 1) / what.batches)
        bar.close()

    def made(self, what: Store, seed: int, wanted: range) -> dict[int, Tensors]:
        """Batches in memory."""
        bar = Bar(what.name, self.show)
        done: dict[int, Tensors] = {}
        bar.update(0.0)
        for i, tensors in what.make(seed, wanted):
            done[i] = tensors
            bar.update((i + 1) / what.batches)
        bar.close()
        return done


def files(place: Path, what: Store) -> dict[range, Path]:
    """The parts of a store: which batches, in which file."""
    size = -(-what.batches // PARTS)
    starts = range(0, what.batches, size)
    return {range(i, min(i + size, what.batches)): place / f"part-{i // size:03d}.safetensors" for i in starts}
