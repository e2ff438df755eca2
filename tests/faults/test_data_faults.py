"""Bad data of every kind: one line that names the file and says what would be right."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from fewstep.data import Dataset, held_out, load


def fails(source: str | Path, *words: str, split: str = "train", error: type[Exception] = ValueError) -> None:
    """Loading raises ``error`` with one line that holds all ``words``."""
    with pytest.raises(error) as caught:
        load(source, split)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300, message
    for word in words:
        assert word in message, f"'{word}' not in: {message}"


def encoded(mode: str = "L", size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    buffer = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, size[::-1], dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


IMAGES = idx(np.arange(5 * 4 * 4, dtype=np.uint8).reshape(5, 4, 4))
LABELS = idx(np.arange(5, dtype=np.uint8))


def test_png_files_are_whole_to_the_last_byte(tmp_path: Path) -> None:
    """A decoder forgives an end that is missing and checksums that are not the data's; this does not."""
    whole = encoded()
    path = tmp_path / "x.png"
    path.write_bytes(whole)
    assert load(tmp_path).x.shape == (1, 1, 8, 8)
    for cut in (8, 12, 20):
        path.write_bytes(whole[:-cut])
        fails(tmp_path, "x.png", "not a picture, damaged or cut short")
    for at in range(8, len(whole) - 12, 3):
        path.write_bytes(bytes(b ^ (0x10 if i == at else 0) for i, b in enumerate(whole)))
        fails(tmp_path, "x.png", "damaged or cut short")


def test_pictures_that_would_take_all_memory_are_refused(tmp_path: Path) -> None:
    """By what their headers say, before they are decoded."""
    Image.new("L", (13000, 13000)).save(tmp_path / "x.png")
    fails(tmp_path, "x.png", "13000 x 13000 pixels", "8192 x 8192")


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 8, 8)])
def test_float_pictures_of_bytes_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Numbers from 0 to 255, whole or not, would train a model at 100 times the scale of its noise."""
    x = np.random.default_rng(0).random(shape).astype(np.float32) * 255
    for found in (x, x.round()):
        np.savez(tmp_path / "x.npz", images=found)
        fails(tmp_path / "x.npz", "x.npz' array 'images' is float32", "as uint8, or scale them to [-1, 1]")
    for fine in (x / 255, x / 127.5 - 1, x - 100):
        np.savez(tmp_path / "x.npz", images=fine)
        assert load(tmp_path / "x.npz").x.dtype == torch.float32


def test_gz_files_are_read_as_far_as_their_header_goes(tmp_path: Path) -> None:
    """What would unpack to gigabytes behind a small header, or a header that promises them, takes no memory."""
    path = tmp_path / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(IMAGES)
        for _ in range(16):
            file.write(bytes(1 << 24))
    tracemalloc.start()
    fails(path, "but more follow")
    path.write_bytes(gzip.compress(struct.pack(">4I", 0x0803, 1 << 30, 28, 28)))
    fails(path, "the header promises", "but fewer follow")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


# --- the source itself --------------------------------------------------------------------------------------------


def test_sources_that_are_nothing(tmp_path: Path):
    """No such name or path, an unknown part, an unknown kind of file, an empty folder."""
    fails("digitz", "no data at 'digitz'", "'digits', 'fashion'", error=FileNotFoundError)
    fails("digits", "split='validation'", "'train' and 'test'", split="validation")
    (tmp_path / "data.csv").write_text("1,2")
    fails(tmp_path / "data.csv", "data.csv", ".parquet")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "no pictures in", "empty", error=FileNotFoundError)


def test_sources_without_a_held_out_part(tmp_path: Path):
    """Every kind says so, and says what would have one."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(encoded())
    fails(tmp_path / "a", "no held-out part", "'test'", split="test")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(IMAGES)
    fails(tmp_path / "train-images-idx3-ubyte", "one file", "its folder", split="test")
    fails(tmp_path, "t10k-images-idx3-ubyte", split="test", error=FileNotFoundError)
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 4, 4), np.uint8))
    fails(tmp_path / "x.npz", "no array 'test_images'", "['images']", split="test")
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"img": [encoded()]}), tmp_path / "p" / "train.parquet")
    fails(tmp_path / "p", "'test' in its name", split="test", error=FileNotFoundError)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    fails(tmp_path / "s", "no part 'test'", "['train']", split="test")


@pytest.mark.parametrize("count", [0, 1297, -1])
def test_held_out_counts(count: int):
    """At least one, not all."""
    with pytest.raises(ValueError, match=f"count={count}: .* 1297 samples of 'digits'"):
        held_out(load("digits"), count)


# --- IDX ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (LABELS, LABELS, ("train-images", "magic number 2049, expected 2051")),
        (IMAGES, IMAGES, ("train-labels", "magic number 2051, expected 2049")),
        (IMAGES[:50], LABELS, ("train-images", "[5, 4, 4] = 80 bytes, but 34 follow")),
        (IMAGES + b"x", LABELS, ("train-images", "but more follow")),
        (IMAGES[:9], LABELS, ("train-images", "ends inside its header")),
        (b"", LABELS, ("train-images", "magic number 0")),
        (IMAGES[:4] + b"\xff" * 12 + IMAGES[16:], LABELS, ("train-images", "but fewer follow")),
        (IMAGES, idx(np.arange(4, dtype=np.uint8)), ("train-labels", "5 pictures need 5 labels", "[4]")),
    ],
)
def test_idx_files(tmp_path: Path, images: bytes, labels: bytes, words: tuple[str, ...]):
    """Exchanged, cut short, too long, a damaged header, too few labels."""
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    fails(tmp_path, *words)


def test_idx_gz_files(tmp_path: Path):
    """Cut short, damaged inside, and not compressed at all."""
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(LABELS)
    whole = gzip.compress(IMAGES, mtime=0)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (whole[:-20], bytes(flipped), IMAGES, b""):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
        fails(tmp_path, "train-images-idx3-ubyte.gz")


def test_idx_folder_without_labels(tmp_path: Path):
    """A folder must hold both files of a part."""
    (tmp_path / "train-images-idx3-ubyte").write_bytes(IMAGES)
    fails(tmp_path, str(tmp_path), "train-labels-idx1-ubyte", error=FileNotFoundError)


# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not a picture", ("b.png", "not a picture")),
        (encoded()[:60], ("b.png", "cut short")),
        (b"", ("b.png", "not a picture")),
        (encoded(size=(8, 9)), ("b.png", "9x8 but", "a.png", "8x8", "one size")),
        (encoded("I;16"), ("b.png", "mode I;16", "8-bit")),
    ],
)
def test_picture_files(tmp_path: Path, content: bytes, words: tuple[str, ...]):
    """The picture that is wrong is named."""
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "a.png").write_bytes(encoded())
    (tmp_path / "class" / "b.png").write_bytes(content)
    fails(tmp_path, str(tmp_path / "class"), *words)


def test_picture_folders(tmp_path: Path):
    """Pictures beside class folders, an empty class, a class that the training part does not have."""
    for name in ("one/train/a", "one/test/b", "two/a", "three/a", "three/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.png").write_bytes(encoded())
    fails(tmp_path / "one", "no class 'b'", split="test")
    (tmp_path / "two" / "loose.png").write_bytes(encoded())
    fails(tmp_path / "two", "loose.png", "class folder")
    (tmp_path / "three" / "b" / "x.png").unlink()
    fails(tmp_path / "three", "no pictures in the class folder", str(tmp_path / "three" / "b"), error=FileNotFoundError)


# --- tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"picture": [b"1"], "label": [1]}, ("no column 'img' or 'image'", "['picture', 'label']")),
        ({"img": [encoded(), b"junk"], "label": [0, 1]}, ("row 1 of", "not a picture")),
        ({"img": [encoded(), None], "label": [0, 1]}, ("row 1 of", "no encoded picture")),
        ({"img": [[1, 2], [3, 4]]}, ("row 0 of", "list<")),
        ({"img": [encoded(), encoded(size=(4, 8))]}, ("row 1 of", "8x4 but", "8x8")),
        ({"img": [encoded()], "label": ["cat"]}, ("labels must be integers",)),
        ({"img": [encoded()], "label": [0.5]}, ("labels must be integers", "float64")),
        ({"img": [encoded()] * 2, "label": [1, None]}, ("1 rows have no label",)),
        ({"img": [encoded()], "label": [-1]}, ("labels start at 0, found -1",)),
        ({"img": pa.array([], pa.binary())}, ("no rows",)),
    ],
)
def test_parquet_files(tmp_path: Path, columns: dict[str, list], words: tuple[str, ...]):
    """Wrong columns, unreadable rows, labels that are no class numbers."""
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    fails(tmp_path / "x.parquet", str(tmp_path / "x.parquet"), *words)


def test_damaged_tables(tmp_path: Path):
    """Cut short, not parquet at all, shards that differ, a saved data set with a missing or damaged part."""
    pq.write_table(pa.table({"img": [encoded()] * 20, "label": [0] * 20}), tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    for content in (whole[:-10], whole[: len(whole) // 2], b"PAR1", b"", whole.replace(b"label", b"\x80abel")):
        (tmp_path / "x.parquet").write_bytes(content)
        fails(tmp_path / "x.parquet", "x.parquet", "damaged or cut short")
    (tmp_path / "x.parquet").write_bytes(whole)
    pq.write_table(pa.table({"img": [encoded()]}), tmp_path / "y.parquet")
    fails(tmp_path, "differ", "['img', 'label'] and ['img']")
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    fails(saved, "data.arrow", "missing", error=FileNotFoundError)
    (saved / "data.arrow").write_bytes(b"junk" * 100)
    fails(saved, "data.arrow", "damaged")
    (saved / "state.json").write_text("{")
    fails(saved, "state.json", "not valid JSON")
    (saved / "state.json").write_text("{}")
    fails(saved, "state.json", "'_data_files' is missing")
    (saved / "state.json").write_text('{"_data_files": []}')
    fails(saved, "state.json", "names no data files")
    (saved / "dataset_dict.json").write_text('{"splits": ["train"]}')
    fails(saved, str(saved / "train" / "state.json"), error=FileNotFoundError)


# --- arrays -------------------------------------------------------------------------------------------------------

GREY = np.zeros((3, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pixels": GREY}, ("no array 'images'", "['pixels']")),
        ({"images": GREY, "labels": np.array(["a", "b", "c"])}, ("labels must be integers", "<U1")),
        ({"images": GREY, "labels": np.array([0.0, 1.0, 2.0])}, ("labels must be integers", "float64")),
        ({"images": GREY, "labels": np.array([0, 1])}, ("3 pictures need 3 labels", "[2]")),
        ({"images": GREY, "labels": np.array([0, -1, 2])}, ("labels start at 0, found -1",)),
        ({"images": GREY.astype(np.int32)}, ("int32", "uint8")),
        ({"images": GREY[0]}, ("[N, C, H, W]", "[4, 4]")),
        ({"images": 255 * np.ones((2, 1, 4, 4), np.float32)}, ("float32", "0..255", "uint8")),
        ({"images": np.full((2, 3), np.nan)}, ("sample 0 holds NaN",)),
        ({"images": GREY[:0]}, ("need samples",)),
        ({"images": np.array([{}, {}], dtype=object)}, ("not unpickled",)),
    ],
)
def test_npz_files(tmp_path: Path, arrays: dict[str, np.ndarray], words: tuple[str, ...]):
    """Wrong names, wrong types, wrong shapes; pickled objects are never opened."""
    np.savez(tmp_path / "x.npz", **arrays)
    fails(tmp_path / "x.npz", "x", *words)


def test_damaged_array_files(tmp_path: Path):
    """Cut short, another kind of file under the name, a damaged member."""
    np.savez_compressed(tmp_path / "x.npz", images=np.arange(8000, dtype=np.uint8).reshape(20, 20, 20))
    whole = (tmp_path / "x.npz").read_bytes()
    np.save(tmp_path / "y.npy", GREY)
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        middle = archive.getinfo("images.npy").header_offset + 100
    flipped = whole[:middle] + bytes(255 - b for b in whole[middle : middle + 20]) + whole[middle + 20 :]
    version = whole.index(b"PK\1\2") + 6
    newer = whole[:version] + b"\xff" + whole[version + 1 :]  # asks for a ZIP version that no reader has
    for content in (whole[:-30], (tmp_path / "y.npy").read_bytes(), b"", flipped, newer):
        (tmp_path / "x.npz").write_bytes(content)
        fails(tmp_path / "x.npz", str(tmp_path / "x.npz"))
    save_file({"images": torch.zeros(3, 1, 4, 4)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for content in (whole[:-1], whole[:5], b"{}" * 30):
        (tmp_path / "x.safetensors").write_bytes(content)
        fails(tmp_path / "x.safetensors", str(tmp_path / "x.safetensors"), "damaged or cut short")


def test_more_labels_than_class_names():
    """A label without a name is refused when the data set is made."""
    with pytest.raises(ValueError, match="label 2 but only 2 class names"):
        Dataset("x", torch.zeros(3, 1), torch.tensor([0, 1, 2]), ("a", "b"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((torch.zeros(3, 1), torch.arange(3)), r"Dataset\(Tensor, ...\): a name comes first"),
        (("x", np.zeros((3, 1))), "data 'x': x must be a tensor, got ndarray"),
        (("x", torch.zeros(3, 1), [0, 1, 2]), "data 'x': cond must be a tensor, got list"),
        (("x", torch.zeros(3, 1), {"text": np.zeros((3, 1))}), "data 'x': text must be a tensor, got ndarray"),
        (("x", torch.zeros(3, 1), None, (), {"noise": [1]}), "data 'x': noise must be a tensor, got list"),
    ],
)
def test_what_is_no_tensor_is_refused_by_its_name(given: tuple[Any, ...], said: str):
    """In one line, where arrays, lists and a name left out used to end in an error of their own or a printed tensor."""
    with pytest.raises(ValueError, match=f"^{said}.*$"):
        Dataset(*given)


# --- anything at all ----------------------------------------------------------------------------------------------


def write_png(folder: Path, content: bytes) -> Path:
    (folder / "p").mkdir(exist_ok=True)
    (folder / "p" / "x.png").write_bytes(content)
    return folder / "p"


def write_as(name: str) -> Callable[[Path, bytes], Path]:
    def write(folder: Path, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def whole_files() -> list[tuple[Callable[[Path, bytes], Path], bytes]]:
    npz, parquet = BytesIO(), BytesIO()
    np.savez_compressed(npz, images=np.arange(80, dtype=np.uint8).reshape(5, 4, 4), labels=np.arange(5))
    pq.write_table(pa.table({"img": [encoded()] * 3, "label": [0, 1, 2]}), parquet)
    return [
        (write_png, encoded()),
        (write_png, encoded(kind="JPEG")),
        (write_png, encoded(kind="GIF")),
        (write_png, encoded(kind="TIFF")),
        (write_png, encoded(kind="WEBP")),
        (write_png, encoded(kind="BMP")),
        (write_as("train-images-idx3-ubyte.gz"), gzip.compress(IMAGES, mtime=0)),
        (write_as("x.npz"), npz.getvalue()),
        (write_as("x.parquet"), parquet.getvalue()),
    ]


@pytest.mark.filterwarnings("ignore")  # Pillow remarks on damaged TIFF and EXIF entries and on absurd sizes
@pytest.mark.parametrize("which", range(9))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_anywhere_gives_data_or_one_line(tmp_path: Path, which: int, data: st.DataObject):
    """Cut a good file anywhere or change any of its bytes: it loads, or a ValueError names it; nothing else happens."""
    write, whole = whole_files()[which]
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    source = write(tmp_path, bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]))
    try:
        assert load(source).x.dtype in (torch.uint8, torch.float32)
    except ValueError as error:
        assert source.name in str(error) and "\n" not in str(error)


def test_a_parquet_column_shorter_than_its_footer_says(tmp_path: Path):
    """A page whose header gives fewer values than the footer has rows."""
    write, whole = whole_files()[8]
    content = bytearray(whole)
    content[166] = 1
    source = write(tmp_path, bytes(content))
    with pytest.raises(ValueError, match=r"x\.parquet' is not a readable table"):
        load(source)


@pytest.mark.parametrize("kind", [2, 5])
def test_a_tiff_whose_entry_has_another_type(tmp_path: Path, kind: int):
    """The offset of its rows as a text or as a fraction, which Pillow meets with a TypeError."""
    content = bytearray(encoded(kind="TIFF"))
    content[72] = kind
    source = write_png(tmp_path, bytes(content))
    with pytest.raises(ValueError, match="not a picture, damaged or cut short"):
        load(source)


@pytest.mark.parametrize(
    ("missing", "name", "cure"), [("PIL", "p", "install pillow"), ("pyarrow", "x.parquet", "fewstep[data]")]
)
def test_missing_packages(tmp_path: Path, missing: str, name: str, cure: str):
    """Without Pillow or pyarrow the error says what to install."""
    write_png(tmp_path, encoded())
    pq.write_table(pa.table({"img": [encoded()]}), tmp_path / "x.parquet")
    code = (
        f"import sys; sys.modules['{missing}'] = None\n"
        "from fewstep.data import load\n"
        f"try: load({str(tmp_path / name)!r})\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert cure in done.stdout and done.stdout.count("\n") == 1
