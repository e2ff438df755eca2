"""Tables of encoded pictures: what their columns mean, and Hugging Face data sets on disk.

Tables are read through pyarrow alone.  A table has a column ``img`` or ``image`` of encoded pictures (bytes, or a
struct with a field ``bytes``, as Hugging Face stores them) and optionally an integer column ``label`` or ``labels``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fewstep.data.dataset import Dataset
from fewstep.data.labels import as_labels
from fewstep.data.pictures import PARTS, decode
from fewstep.data.stored import stack
from fewstep.schemas import Maybe, Place, check, parse_json, read_json

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES = ("img", "image")
LABELS = ("label", "labels")
#: What is read of Hugging Face's ``state.json``, and of what it writes into tables.
FILE: Any = {"filename": str, ...: Any}
STATE = {"_data_files": list[FILE], ...: Any}
METADATA = {"info": Maybe({"features": Maybe(dict), ...: Any}), ...: Any}


@contextmanager
def arrow_errors(path: Path) -> Iterator[None]:
    """Turns a missing pyarrow and pyarrow's own complaints about ``path`` into one clear line."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ImportError(f"reading '{path}' needs pyarrow: pip install 'fewstep[data]'") from error
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise ValueError(f"'{path}' is not a readable table (damaged or cut short)") from error


def read_arrow_folder(path: Path, split: Literal["train", "test"]) -> Dataset:
    """A data set, or a dictionary of data sets, that ``save_to_disk`` of Hugging Face's ``datasets`` wrote."""
    dictionary = path / "dataset_dict.json"
    if dictionary.exists():
        splits = read_json(dictionary, {"splits": list[str], ...: Any})["splits"]
        for name in PARTS[split]:
            if name in splits:
                return read_arrow_part(path / name, path.name)
        raise ValueError(f"'{path}' has no part '{split}': dataset_dict.json names {splits}")
    if split == "test":
        raise ValueError(f"'{path}' is one saved data set without a held-out part: save a DatasetDict with 'test'")
    return read_arrow_part(path, path.name)


def read_arrow_part(path: Path, name: str) -> Dataset:
    names = [entry["filename"] for entry in read_json(path / "state.json", STATE)["_data_files"]]
    files = [path / name for name in names if Path(name).name == name]
    if not files or len(files) < len(names):
        raise ValueError(f"'{path / 'state.json'}' names no data files beside it")
    batches: list[pa.RecordBatch] = []
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"'{file}' is missing: '{path / 'state.json'}' names it")
        with arrow_errors(file):
            import pyarrow as pa

            with pa.OSFile(str(file)) as opened, pa.ipc.open_stream(opened) as stream:
                batches += [batch.select(list(columns_of(batch.schema, file))) for batch in stream]
    return read_batches(batches, name, files[0])


def columns_of(schema: pa.Schema, path: Path) -> tuple[str, ...]:
    """The picture column of a table and, if there is one, its label column."""
    image = next((name for name in IMAGES if name in schema.names), None)
    label = next((name for name in LABELS if name in schema.names), None)
    if image is None:
        raise ValueError(f"'{path}' has no column 'img' or 'image' of pictures: its columns are {schema.names}")
    return (image,) if label is None else (image, label)


def read_batches(batches: list[pa.RecordBatch], name: str, path: Path) -> Dataset:
    """The rows of record batches of one or two columns, pictures first."""
    count = sum(batch.num_rows for batch in batches)
    if not count:
        raise ValueError(f"'{path}' has no rows")
    schema = batches[0].schema
    for batch in batches:
        if batch.schema.names != schema.names:
            raise ValueError(f"'{path}' and the files beside it differ: {schema.names} and {batch.schema.names}")
    x = stack(pictures_in(batches, path))
    if len(schema) == 1:
        return Dataset(name, x)
    labels = np.concatenate([integers(batch.column(1), path) for batch in batches])
    return Dataset(name, x, as_labels(labels, count, path), class_names(schema, schema.names[1]))


def pictures_in(batches: Iterable[pa.RecordBatch], path: Path) -> Iterator[tuple[str, np.ndarray]]:
    row = 0
    for batch in batches:
        for cell in batch.column(0).to_pylist():
            encoded = cell.get("bytes") if isinstance(cell, dict) else cell
            where = f"row {row} of {path}"
            if not isinstance(encoded, bytes):
                kind = batch.schema.field(0).type
                raise ValueError(f"{where} holds no encoded picture: column '{batch.schema.names[0]}' is {kind}")
            yield where, decode(BytesIO(encoded), where)
            row += 1


def integers(column: pa.Array, path: Path) -> np.ndarray:
    """A label column as an array; what is not an integer is left for :func:`as_labels` to refuse."""
    if column.null_count:
        raise ValueError(f"'{path}': {column.null_count} rows have no label")
    return column.to_numpy(zero_copy_only=False)


def class_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """The class names of a column that Hugging Face keeps in the metadata of a table, or none."""
    written = (schema.metadata or {}).get(b"huggingface")
    if written is None:
        return ()
    where = Place("the metadata of a table", "huggingface")
    content = check(parse_json(written, where.file), METADATA, where)
    feature = content.get("info", {}).get("features", {}).get(column)
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return ()
    return tuple(check(feature, {"names": list[str], ...: Any}, where.inside(column))["names"])
