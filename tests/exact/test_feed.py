"""What training reads is a function of the iteration alone, whoever reads it: data in memory, items read by the
training process, by two others, and by a run that was killed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.data import Dataset, Draw, Prior, Samples, Streamed, load
from fewstep.data.dataset import Unlabelled
from fewstep.denoisers import NetworkDenoiser
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.networks import MLP
from fewstep.predictions import EDMPrediction
from fewstep.schedules import EDM
from fewstep.training.budget import Budget
from fewstep.training.feed import Feed
from fewstep.training.parallel import Parallel
from fewstep.training.trainer import Run, Settings, train

N = 30


class Pictures(torch.utils.data.Dataset):
    """uint8 pictures with labels, one by one."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return pictures().x[index], index % 3


class Noisy(Pictures):
    """Pictures in which something is drawn from every generator that there is."""

    def __getitem__(self, index: int) -> Any:
        x = super().__getitem__(index)[0].float() / 255
        return x + torch.rand(1) + float(np.random.rand()) + random.random(), index % 3


def pictures() -> Dataset:
    x = torch.randint(0, 256, (N, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Dataset("pictures", x, torch.arange(N) % 3)


def teacher() -> NetworkDenoiser:
    torch.manual_seed(1)
    net = MLP((1, 2, 2), 16, 2, classes=3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return NetworkDenoiser(net, EDM(), EDMPrediction(), (1, 2, 2), 3)


def weights(data: Samples, steps: int = 12, folder: Path | None = None, **changes: Any) -> Tensor:
    """What training leaves, all weights in a row."""
    settings = Settings(Budget(steps), **{"batch": 8, "accumulate": 2, "precision": "fp32", **changes})
    model = train(Denoising(), Start(teacher(), data), settings, folder, show=False).model
    return torch.cat([p.flatten() for p in model.parameters()])


@pytest.mark.parametrize("workers", [0, 2])
def test_items_train_as_the_same_data_in_memory(workers: int) -> None:
    """The same weights to the last bit: the order, the floats made of bytes, the labels."""
    assert torch.equal(weights(Streamed(Pictures(), classes=3, workers=workers)), weights(pictures()))


def test_draws_of_items_do_not_depend_on_who_reads() -> None:
    """Three kinds of random numbers inside the items: equal weights with 0 and 2 processes, others with other seeds."""
    found = [weights(Streamed(Noisy(), classes=3, workers=workers)) for workers in (0, 2)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], weights(Streamed(Noisy(), classes=3), seed=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_runs_end_with_the_same_bits(workers: int, tmp_path: Path) -> None:
    """Twelve iterations at once, and in two parts, with draws inside the items."""
    data = Streamed(Noisy(), classes=3, workers=workers)
    whole = weights(data)
    settings = Settings(Budget(12), batch=8, accumulate=2, precision="fp32", save_seconds=0)
    run = Interrupting(5, data)
    with pytest.raises(KeyboardInterrupt):
        train(Denoising(), Start(teacher(), run), settings, tmp_path, show=False)
    assert torch.equal(weights(data, folder=tmp_path), whole)


class Interrupting(Samples):
    """Data that break off a run when an iteration begins."""

    def __init__(self, step: int, inner: Samples) -> None:
        self.step, self.inner, self.name, self.class_names = step, inner, inner.name, ()

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def classes(self) -> int | None:
        return self.inner.classes

    def rows(self, indices: Any) -> Any:
        return self.inner.rows(indices)

    def sha256(self) -> str:
        return self.inner.sha256()

    def feed(self, draws: Any) -> Iterator[Any]:
        yield from islice(self.inner.feed(draws), 2 * self.step)
        raise KeyboardInterrupt


def test_the_same_item_is_drawn_anew_in_every_epoch() -> None:
    """Draws are a function of the seed, the item and the epoch, and of nothing else: not of what is read before."""
    data = Streamed(Noisy(), classes=3)

    def read(index: int, epoch: int, seed: int) -> Tensor:
        x = next(data.feed([Draw(torch.tensor([4, index]), torch.tensor([0, epoch]), seed)])).x
        assert x is not None
        return x[1]

    first = read(7, 0, 0)
    assert torch.equal(first, read(7, 0, 0))
    for other in (read(7, 1, 0), read(7, 0, 1)):
        assert not torch.equal(first, other)


def test_generators_stand_where_they_stood() -> None:
    """Items may draw and are seeded; the generators of the program do not notice."""

    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]  # type: ignore[index]

    before = states()
    Streamed(Noisy(), classes=3).rows(slice(0, 4))
    for workers in (0, 1):
        next(Streamed(Noisy(), classes=3, workers=workers).feed([Draw(torch.arange(4), torch.zeros(4), 0)]))
    assert states() == before


def test_draws_name_their_epochs() -> None:
    """A batch over the end of an epoch, cut into parts: every index once an epoch, the epochs beside them."""
    feed = Feed({"data": pictures()}, 8, 0, range(1, 2), 2)
    drawn = list(islice(feed.draws("data", 0), 15))  # the second half of 15 batches: 60 of 120 samples
    assert drawn[3].epochs.tolist() == [0, 0, 1, 1] and [len(draw.indices) for draw in drawn] == [4] * 15
    other = list(islice(Feed({"data": pictures()}, 8, 0, range(1), 2).draws("data", 0), 15))
    for epoch in range(4):
        seen = [int(i) for draw in drawn + other for i in draw.indices[draw.epochs == epoch]]
        assert sorted(seen) == list(range(N))


@pytest.mark.parametrize(
    ("item", "cond", "columns"),
    [
        (torch.ones(2), None, {}),
        (np.ones(2), None, {}),
        ((torch.ones(2), 1), 1, {}),
        ((torch.ones(2), np.int32(1)), 1, {}),
        ([torch.ones(2), torch.ones(3)], torch.ones(3), {}),
        ((torch.ones(2), {"prompt_embeds": torch.ones(3)}), {"prompt_embeds": torch.ones(3)}, {}),
        ({"image": torch.ones(2), "label": 1, "noise": torch.ones(2)}, 1, {"noise": torch.ones(2)}),
        ({"x": torch.ones(2), "cond": {"a": torch.ones(1)}}, {"a": torch.ones(1)}, {}),
    ],
)
def test_forms_of_items(item: Any, cond: Any, columns: dict[str, Tensor]) -> None:
    """Tensors, pairs and dicts; the batch leads every tensor."""
    data = Streamed([item] * 3, classes=2)
    rows = data.rows(slice(0, 2))
    assert torch.equal(rows.x, torch.ones(2, 2)) and rows.x.dtype == torch.float32
    assert data.shape == (2,) and len(data) == 3 and data.classes == (2 if isinstance(cond, int) else None)
    if isinstance(cond, dict):
        assert {name: leaf.tolist() for name, leaf in rows.cond.items()} == {
            name: [leaf.tolist()] * 2 for name, leaf in cond.items()
        }
    elif cond is None:
        assert rows.cond is None
    else:
        expected = torch.as_tensor(cond)
        assert torch.equal(rows.cond, torch.stack([expected] * 2)) and rows.cond.dtype == expected.dtype
    assert {name: column.tolist() for name, column in rows.columns.items()} == {
        name: [column.tolist()] * 2 for name, column in columns.items()
    }


def test_distill_takes_a_data_set_of_pytorch() -> None:
    """As it is, with its labels for a teacher that knows classes and without them for one that does not."""
    options: dict[str, Any] = {"budget": "4steps", "batch": 8, "show": False, "precision": "fp32"}
    found = [fs.distill(teacher(), fs.ConsistencyDistillation(), data, **options) for data in (Pictures(), pictures())]
    assert all(torch.equal(*pair) for pair in zip(*(f.state_dict().values() for f in found), strict=True))
    net = MLP((1, 2, 2), 16, 2)
    plain = NetworkDenoiser(net, EDM(), EDMPrediction(), (1, 2, 2))
    fs.distill(plain, fs.ConsistencyDistillation(), Pictures(), **options)


def test_reading_processes_end_with_the_run() -> None:
    """Also when the run fails."""
    run = Run(Denoising(), Denoising().networks(Start(teacher())), Settings(Budget(3), batch=8), Parallel())
    run.step(Streamed(Pictures(), classes=3, workers=2))
    assert len(torch.multiprocessing.active_children()) == 2
    assert run.feed is not None
    run.feed.close()
    assert not torch.multiprocessing.active_children()
    with pytest.raises(ValueError):
        weights(Streamed(Failing(), classes=3, workers=2))
    assert not torch.multiprocessing.active_children()


class Failing(Pictures):
    """One item cannot be read."""

    def __getitem__(self, index: int) -> Any:
        if index == 17:
            raise KeyError("no such\nfile")
        return super().__getitem__(index)


def test_identities() -> None:
    """Equal data, equal digest; another sample, label, column, class or condition, another."""
    base = pictures()
    x = base.x.clone()
    x[3] += 1
    others: list[Samples] = [
        Dataset("pictures", x, base.cond),
        Dataset("pictures", base.x, torch.zeros(N, dtype=torch.long)),
        Dataset("pictures", base.x, base.cond, columns={"noise": torch.ones(N)}),
        Dataset("pictures", base.x, {"a": torch.ones(N, 2)}),
        Dataset("pictures", base.x, {"b": torch.ones(N, 2)}),
        Unlabelled(base),
        Prior((1, 2, 2)),
        Prior((1, 2, 2), torch.arange(3)),
        Streamed(Pictures(), classes=3),
        Streamed(Failing(), classes=3, identity="listing"),
        Streamed([torch.zeros(1, 2, 2)] * N),
    ]
    assert len({base.sha256(), *(other.sha256() for other in others)}) == len(others) + 1
    assert pictures().sha256() == base.sha256()
    assert Streamed(Noisy(), classes=3).sha256() == Streamed(Noisy(), classes=3, workers=2).sha256()
    # what recipe.json of runs made before says of this set
    assert load("digits").sha256() == "719244476d957c3819e4b5e3d19cede14d81b7be4a6fed221708c3c8af2022b8"


#: Read item by item from a file that is larger than memory, so that pages of it are not counted as the process's own.
LARGE = """
    import os, resource, sys
    import torch
    from fewstep.data import Streamed
    from fewstep.predictions import EDMPrediction
    from fewstep.denoisers import NetworkDenoiser
    from fewstep.methods.start import Start
    from fewstep.methods.teachers.denoising import Denoising
    from fewstep.schedules import EDM
    from fewstep.training.budget import Budget
    from fewstep.training.trainer import Settings, train

    path, steps, shape = sys.argv[1], int(sys.argv[2]), (3, 128, 128)
    size = 3 * 128 * 128

    class Sparse:
        def __init__(self): self.file = os.open(path, os.O_RDONLY)
        def __len__(self): return os.fstat(self.file).st_size // size
        def __getitem__(self, index):
            return torch.frombuffer(bytearray(os.pread(self.file, size, index * size)), dtype=torch.uint8).view(shape)

    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))
        def forward(self, x, t, cond=None): return self.scale * x

    teacher = NetworkDenoiser(Scale(), EDM(), EDMPrediction(), shape)
    def peak(who): return resource.getrusage(who).ru_maxrss
    for workers in (0, 1):
        data = Streamed(Sparse(), workers=workers)
        def run(steps):
            train(Denoising(), Start(teacher, data), Settings(Budget(steps), 32, precision="fp32"), show=False)
        run(10)
        before, children = peak(resource.RUSAGE_SELF), peak(resource.RUSAGE_CHILDREN)
        run(steps)
        print(len(data), peak(resource.RUSAGE_SELF) - before, peak(resource.RUSAGE_CHILDREN) - children)
"""


def test_memory_does_not_grow_with_what_is_read(tmp_path: Path) -> None:
    """Of 20 GB of pictures 75 MB are read, by the training process and by another: none grows by more than the order of
    an epoch, drawn twice, and 8 MB for the rest (0.5 MB were measured, 2.3 MB in the other process).  The C library is
    told to give large blocks back at once, else what it keeps is measured."""
    path, steps = tmp_path / "sparse", 48
    with path.open("wb") as file:
        file.truncate(20 * 10**9)
    words = [sys.executable, "-c", textwrap.dedent(LARGE), str(path), str(steps)]
    given = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=given)
    for line in done.stdout.splitlines():
        count, grown, children = map(int, line.split())
        bound = 2 * 8 * count + (8 << 20)
        assert count == 20 * 10**9 // 49152 and steps * 32 * 49152 > 5 * bound
        assert max(grown, children) << 10 < bound, (grown, children)
