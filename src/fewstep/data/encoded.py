"""What is computed once for every sample and read many times: the conditions that a text encoder makes of captions, the
latents that an autoencoder makes of pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import tee
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fewstep.conditions import Cond, leaves
from fewstep.data.dataset import Draw, Rows, Samples
from fewstep.files import headers, opened, save_tensors

#: Prompts -> the condition that they are, tensors by name with one row a prompt.
Embed = Callable[[list[str]], Mapping[str, Tensor]]
#: Work done, work in all.
Tell = Callable[[int, int], None]
#: What takes more bytes than these is kept in files, where there is a folder for them.
HELD = 2 << 30
#: Rows of one call of an encoder, and of one file.
CALL, FILE = 32, 1024


class Table:
    """Tensors by name with a row for each of ``count`` things, in parts of ``size`` rows that lie in memory or in
    safetensors files, of which only the rows that are asked for are read.

    Parts may have different lengths in their second dimension (prompts); rows are padded with zeros to the longest.
    ValueError when they are, and no part of the condition is a mask that says so.
    """

    def __init__(self, parts: Sequence[Mapping[str, Tensor] | Path], size: int, count: int) -> None:
        self.parts, self.size, self.count = parts, size, count
        self.lengths: dict[str, int] = {}
        for part in parts:
            shapes = {name: header.shape for name, header in headers(part).items()} if isinstance(part, Path) else {
                name: tuple(tensor.shape) for name, tensor in part.items()
            }  # fmt: skip
            for name, shape in shapes.items():
                if len(shape) < 2:
                    continue
                longest = self.lengths.setdefault(name, shape[1])
                if longest != shape[1] and not any("mask" in other for other in shapes):
                    raise ValueError(
                        f"{name} of some prompts is {shape[1]} long, of others {longest}, and there is no mask: "
                        "pad all to one length where they are encoded"
                    )
                self.lengths[name] = max(longest, shape[1])

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """The rows of these numbers."""
        found = [self.row(index) for index in indices.tolist()]
        return {name: torch.stack([row[name] for row in found]) for name in found[0]}

    def row(self, index: int) -> dict[str, Tensor]:
        """One row, without the dimension of the rows."""
        part, within = self.parts[index // self.size], index % self.size
        if isinstance(part, Path):
            with opened(part), safe_open(part, "pt") as file:
                found = {name: file.get_slice(name)[within : within + 1][0] for name in file.keys()}  # noqa: SIM118
        else:
            found = {name: tensor[within] for name, tensor in part.items()}
        return {name: padded(row, self.lengths[name]) if row.ndim else row for name, row in found.items()}


def padded(row: Tensor, length: int) -> Tensor:
    """A row with zeros after its end."""
    return row if len(row) == length else torch.cat([row, row.new_zeros(length - len(row), *row.shape[1:])])


def slices(end: int, start: int = 0) -> list[slice]:
    """``start .. end`` in the calls of an encoder."""
    return [slice(at, min(at + CALL, end)) for at in range(start, end, CALL)]


@torch.no_grad()
def make_table(
    encode: Callable[[slice], Mapping[str, Tensor]], count: int, folder: Path | None = None, tell: Tell | None = None
) -> Table:
    """The rows ``0 .. count`` that ``encode`` makes for a slice of them, always of the same :data:`CALL` rows, so that
    the bits are the same wherever they are kept: in memory, or in ``folder`` when they take more than :data:`HELD`
    bytes.  Files that are there already are not made again."""
    parts: list[Mapping[str, Tensor] | Path] = []
    for start in range(0, count, FILE):
        path = None if folder is None else folder / f"{start // FILE:06}.safetensors"
        if path is not None and path.is_file():
            parts.append(path)
            continue
        calls = [
            {name: tensor.cpu() for name, tensor in encode(call).items()}
            for call in slices(min(start + FILE, count), start)
        ]
        rows = Table(calls, CALL, count)
        part = rows.rows(torch.arange(min(FILE, count - start)))
        if path is not None and count * sum(t[0].numel() * t.element_size() for t in part.values()) > HELD:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path, part)
            parts.append(path)
        else:
            parts.append(part)
        if tell is not None:
            tell(min(start + FILE, count), count)
    return Table(parts, FILE, count)


class Described(Samples):
    """Samples under conditions from a table: sample ``i`` has the row ``index[i]`` of it.  ``identity`` is what tells
    the conditions from others."""

    def __init__(self, name: str, inner: Samples, table: Table, index: Tensor, identity: str) -> None:
        self.name, self.class_names = name, ()
        self.inner, self.table, self.index, self.identity = inner, table, index, identity

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def classes(self) -> int | None:
        return None

    def conditions(self, indices: Tensor | slice) -> Cond:
        return self.table.rows(self.index[indices])

    def rows(self, indices: Tensor | slice) -> Rows:
        return self.inner.rows(indices)._replace(cond=self.conditions(indices))

    def feed(self, draws: Iterable[Draw]) -> Iterator[Rows]:
        mine, theirs = tee(draws)
        for rows, draw in zip(self.inner.feed(theirs), mine, strict=False):
            yield rows._replace(cond=self.conditions(draw.indices))

    def sha256(self) -> str:
        return hashlib.sha256(f"{self.inner.sha256()} {self.identity}".encode()).hexdigest()


class Latents(Samples):
    """Samples as an encoder made them once, read from a table with all that goes with them."""

    def __init__(self, inner: Samples, table: Table) -> None:
        self.name, self.class_names = inner.name, inner.class_names
        self.inner, self.table = inner, table

    @classmethod
    def of(
        cls, inner: Samples, encode: Callable[[Tensor], Tensor], folder: Path | None = None, tell: Tell | None = None
    ) -> Latents:
        """The samples encoded one by one in their order; what is random in them is drawn once."""
        calls = [torch.arange(len(inner))[call] for call in slices(len(inner))]
        reading = inner.feed(Draw(indices, torch.zeros_like(indices), 0) for indices in calls)

        def made(call: slice) -> dict[str, Tensor]:
            rows = next(reading) if folder is None else inner.rows(call)
            if rows.x is None:
                raise ValueError(f"data '{inner.name}' has no samples to encode")
            beside = {f"column/{name}": column for name, column in rows.columns.items()}
            conditions = {f"cond/{name}": leaf for name, leaf in leaves(rows.cond).items()}
            return {"x": encode(rows.x), **beside, **conditions}

        return cls(inner, make_table(made, len(inner), folder, tell))

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.table.row(0)["x"].shape)

    @property
    def classes(self) -> int | None:
        return self.inner.classes

    def rows(self, indices: Tensor | slice) -> Rows:
        found = self.table.rows(torch.arange(len(self))[indices])
        parts: dict[str, dict[str, Tensor]] = {"cond": {}, "column": {}}
        for name, tensor in found.items():
            kind, _, rest = name.partition("/")
            if rest:
                parts[kind][rest] = tensor
        cond: Cond = parts["cond"] or None
        if list(parts["cond"]) == ["cond"]:
            cond = parts["cond"]["cond"]
        return Rows(found["x"], cond, parts["column"])

    def sha256(self) -> str:
        return hashlib.sha256(f"latents {self.inner.sha256()}".encode()).hexdigest()
