"""Parquet files of encoded pictures, listed by their row groups and read group by group."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from fewstep.data.captions import TEXTS
from fewstep.data.labels import as_labels
from fewstep.data.pictures import PARTS, decode
from fewstep.data.stored import Stored, Strings
from fewstep.data.tables import arrow_errors, class_names, columns_of, integers

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

#: So many bytes of encoded pictures does a process keep of the row groups that it read last.
KEPT = 256 << 20


def list_parquet_file(path: Path) -> ParquetRows:
    """One parquet file."""
    return ParquetRows([path], path.stem)


def list_parquet_folder(path: Path, split: Literal["train", "test"]) -> ParquetRows:
    """The parquet files of a folder whose names say ``split``; files without a part in their names are training."""
    parts: dict[str, list[Path]] = {}
    for file in sorted(path.glob("*.parquet")):
        words = re.split(r"[^a-z]+", file.stem.lower())
        named = [name for names in PARTS.values() for name in names if name in words]
        parts.setdefault(named[0] if named else "train", []).append(file)
    for name in PARTS[split]:
        if name in parts:
            return ParquetRows(parts[name], path.name)
    raise FileNotFoundError(f"'{path}' has no parquet file with '{split}' in its name, only parts {sorted(parts)}")


class ParquetRows(Stored):
    """The rows of parquet files, listed by their row groups, which are what can be read of a file: files with small
    groups (100 rows, as Hugging Face writes pictures) are read faster in a random order than files with large ones.

    Each process keeps the groups that it read last, up to :data:`KEPT` bytes of encoded pictures.
    """

    def __init__(self, paths: list[Path], name: str) -> None:
        self.paths, self.name = paths, name
        self.groups: list[tuple[int, int]] = []
        counts: list[int] = []
        for number, path in enumerate(paths):
            with parquet(path) as file:
                if number == 0:
                    self.schema = file.schema_arrow
                    self.columns = columns_of(self.schema, path)
                elif columns_of(file.schema_arrow, path) != self.columns:
                    theirs = list(columns_of(file.schema_arrow, path))
                    raise ValueError(f"'{paths[0]}' and the files beside it differ: {list(self.columns)} and {theirs}")
                for group in range(file.num_row_groups):
                    self.groups.append((number, group))
                    counts.append(file.metadata.row_group(group).num_rows)
        self.starts = np.cumsum([0, *counts])
        numbers = [number for number, _ in self.groups]
        self.firsts = [
            int(self.starts[numbers.index(number)]) if number in numbers else 0 for number in range(len(paths))
        ]
        if not self.starts[-1]:
            raise ValueError(f"'{paths[0]}' has no rows")
        labelled = len(self.columns) == 2
        self.known_labels = as_labels(self.label_column(), len(self), paths[0]) if labelled else None
        self.class_names = class_names(self.schema, self.columns[1]) if labelled else ()
        self.kept: OrderedDict[int, list[bytes | None]] = OrderedDict()

    @property
    def labels(self) -> Tensor | None:
        return self.known_labels

    def __len__(self) -> int:
        return int(self.starts[-1])

    def label_column(self) -> np.ndarray:
        """The labels of all rows, as they are written."""
        return np.concatenate([integers(column, path) for column, path in self.whole_column(self.columns[1])])

    def whole_column(self, name: str) -> Iterator[tuple[pa.ChunkedArray, Path]]:
        """A column, file by file."""
        for path in self.paths:
            with parquet(path) as file:
                yield file.read(columns=[name], use_threads=False).column(0), path

    def picture(self, index: int) -> tuple[str, np.ndarray]:
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        number, _ = self.groups[group]
        where = f"row {index - self.firsts[number]} of {self.paths[number]}"
        encoded = self.encoded(group)[index - int(self.starts[group])]
        if encoded is None:
            kind = self.schema.field(self.columns[0]).type
            raise ValueError(f"{where} holds no encoded picture: column '{self.columns[0]}' is {kind}")
        return where, decode(BytesIO(encoded), where)

    def encoded(self, group: int) -> list[bytes | None]:
        """The encoded pictures of a row group, read or kept; None for what is none."""
        if group in self.kept:
            self.kept.move_to_end(group)
            return self.kept[group]
        number, within = self.groups[group]
        with parquet(self.paths[number]) as file:
            # the threads of a library do not live on in a process that was forked
            cells = file.read_row_group(within, columns=[self.columns[0]], use_threads=False).column(0).to_pylist()
        if len(cells) != int(self.starts[group + 1] - self.starts[group]):
            raise ValueError(
                f"'{self.paths[number]}' is not a readable table: row group {within} has {len(cells)} rows"
            )
        found = [cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells]
        self.kept[group] = [cell if isinstance(cell, bytes) else None for cell in found]
        while len(self.kept) > 1 and sum(map(size, self.kept.values())) > KEPT:
            self.kept.popitem(last=False)
        return self.kept[group]

    def identity(self) -> str:
        """Over the names and sizes of the files, and what they say of their row groups."""
        digest = hashlib.sha256()
        for path in self.paths:
            with parquet(path) as file:
                rows = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
            digest.update(f"{path.name} {path.stat().st_size} {rows}\n".encode())
        return digest.hexdigest()

    @property
    def captions(self) -> Strings | None:
        name = next((name for name in TEXTS if name in self.schema.names), None)
        if name is None:
            return None
        found: list[str] = []
        for column, path in self.whole_column(name):
            for caption in column.to_pylist():
                if not isinstance(caption, str):
                    raise ValueError(f"row {len(found)} of '{path}' has no caption: column '{name}' is {column.type}")
                found.append(" ".join(caption.split()))
        return Strings(found)


def size(encoded: list[bytes | None]) -> int:
    return sum(len(picture) for picture in encoded if picture is not None)


@contextmanager
def parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """A parquet file, open; complaints about it in one line."""
    with arrow_errors(path):
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            yield file
