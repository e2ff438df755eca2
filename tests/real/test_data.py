"""The bundled data, every format that ``load`` reads, and the quality record on real pictures."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fewstep.data import Dataset, Draw, Streamed, held_out, load, load_samples, parquet
from fewstep.data.parquet import list_parquet_file
from fewstep.data.stored import Strings
from fewstep.metrics import Evaluator, Pixels, Quality, evaluate, load_features

ASSETS = resources.files("fewstep") / "assets"


# --- what is bundled ----------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns():
    """The two parts together are load_digits with its values 0..16 on 0..255, none lost, none twice."""
    from sklearn.datasets import load_digits

    train, test = load("digits"), load("digits", "test")
    assert (len(train), len(test), train.shape, train.classes, train.class_names[7]) == (1297, 500, (1, 8, 8), 10, "7")
    ours = torch.cat([torch.cat([d.x.flatten(1), d.labels[:, None]], dim=1) for d in (train, test)])
    scans = load_digits()
    theirs = np.concatenate([np.rint(scans.data * 255 / 16), scans.target[:, None]], axis=1)
    assert sorted(ours.tolist()) == sorted(theirs.astype(int).tolist())
    assert train.read(slice(0, 100)).min() == -1 and train.read(slice(0, 100)).max() == 1


def test_fashion_is_balanced_and_named():
    """600 and 200 pictures of each class, in mixed order, no picture in both parts."""
    train, test = load("fashion"), load("fashion", "test")
    assert train.labels.bincount().tolist() == [600] * 10 and test.labels.bincount().tolist() == [200] * 10
    assert (
        train.shape == (1, 28, 28) and train.class_names[9] == "Ankle boot" and train.labels[:50].unique().numel() > 7
    )
    assert not {bytes(x.numpy()) for x in train.x} & {bytes(x.numpy()) for x in test.x}


def test_bundled_files_are_those_of_their_cards():
    """Every data file and every classifier has the checksum, and the classifier the accuracy, that its card says."""
    cards = json.loads((ASSETS / "data.json").read_text())
    for name, card in cards.items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == card["sha256"]
    for name in ("digits", "fashion"):
        card = json.loads((ASSETS / f"classifier-{name}.json").read_text())
        weights = (ASSETS / f"classifier-{name}.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == card["sha256"]
        features, test = load_features(name), load(name, "test")
        right = features.classify(features(test)).argmax(1) == test.labels
        # The card's fashion accuracy is over all 10,000 test pictures; 2,000 of them have an sd of 0.5 %.
        assert float(right.double().mean()) == pytest.approx(card["accuracy"], abs=0.015 if name == "fashion" else 1e-4)


def test_bundled_data_need_no_other_package():
    """Loading works where scikit-learn, SciPy, Pillow and pyarrow do not exist."""
    code = (
        "import sys\n"
        "for name in ('sklearn', 'scipy', 'PIL', 'pyarrow', 'datasets'): sys.modules[name] = None\n"
        "from fewstep.data import load\n"
        "from fewstep.metrics import load_features\n"
        "print(load_features('digits')(load('digits', 'test')).shape, len(load('fashion')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch.Size([500,", "64])", "6000"]


def test_held_out_puts_samples_aside():
    """Disjoint, complete, seeded."""
    data = load("digits")
    train, test = held_out(data, 100, seed=3)
    assert (len(train), len(test)) == (1197, 100)
    rows = sorted(torch.cat([train.x, test.x]).flatten(1).tolist())
    assert rows == sorted(data.x.flatten(1).tolist())
    assert torch.equal(held_out(data, 100, seed=3)[1].x, test.x) and not torch.equal(held_out(data, 100)[1].x, test.x)


# --- formats ------------------------------------------------------------------------------------------------------

PARTS = {"train": slice(0, 60), "test": slice(60, 70)}


def digits(part: str) -> Dataset:
    return load("digits").subset(PARTS[part])


def png(picture: torch.Tensor) -> bytes:
    encoded = BytesIO()
    Image.fromarray(picture[0].numpy()).save(encoded, "PNG")
    return encoded.getvalue()


def write_idx(path: Path, array: np.ndarray) -> None:
    content = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def idx_folder(folder: Path) -> Path:
    for part, prefix, suffix in (("train", "train", ".gz"), ("test", "t10k", "")):
        data = digits(part)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", data.x[:, 0].numpy())
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", data.labels.byte().numpy())
    return folder


def picture_folder(folder: Path) -> Path:
    for part in PARTS:
        for i, (x, label) in enumerate(zip(digits(part).x, digits(part).labels.tolist(), strict=True)):
            (folder / part / str(label)).mkdir(parents=True, exist_ok=True)
            (folder / part / str(label) / f"{i:03}.png").write_bytes(png(x))
    (folder / "train" / "3" / "notes.txt").write_text("not a picture")
    return folder


def table(part: str, column: str = "image", encoded: Callable[[bytes], object] = lambda b: {"bytes": b, "path": None}):
    data = digits(part)
    names = [str(i) for i in range(10)]
    features = {"features": {column: {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}}
    columns = {"id": list(range(len(data))), column: [encoded(png(x)) for x in data.x], "label": data.labels.tolist()}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": features})})


def parquet_folder(folder: Path) -> Path:
    (folder / "data").mkdir()
    whole = table("train")
    for i in range(3):
        pq.write_table(whole.slice(20 * i, 20), folder / "data" / f"train-0000{i}-of-00003.parquet", row_group_size=4)
    pq.write_table(table("test"), folder / "data" / "test-00000-of-00001.parquet")
    return folder


def saved_folder(folder: Path) -> Path:
    """What ``save_to_disk`` of Hugging Face's datasets 5.2 leaves on disk."""
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for part in PARTS:
        (folder / part).mkdir()
        shards = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
        (folder / part / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in shards]}))
        (folder / part / "dataset_info.json").write_text("{}")
        whole = table(part)
        for i, name in enumerate(shards):
            half = whole.slice(i * len(whole) // 2, len(whole) // 2)
            with pa.OSFile(str(folder / part / name), "wb") as file, pa.ipc.new_stream(file, half.schema) as stream:
                stream.write_table(half, max_chunksize=7)
    return folder


def npz_file(folder: Path) -> Path:
    train, test = digits("train"), digits("test")
    np.savez(
        folder / "digits.npz",
        x_train=train.x.permute(0, 2, 3, 1).numpy(),  # channels last, as Keras keeps them
        y_train=train.labels.numpy()[:, None],
        x_test=test.x[:, 0].numpy(),
        y_test=test.labels.numpy().astype(np.uint8),
        comment="text is no concern of ours",
    )
    return folder / "digits.npz"


def safetensors_file(folder: Path) -> Path:
    arrays = {
        f"{part}_{key}": v for part in PARTS for key, v in (("images", digits(part).x), ("labels", digits(part).labels))
    }
    save_file(arrays, folder / "digits.safetensors")
    return folder / "digits.safetensors"


@pytest.mark.parametrize(
    "write", [idx_folder, picture_folder, parquet_folder, saved_folder, npz_file, safetensors_file]
)
def test_every_format_gives_back_the_pictures(write: Callable[[Path], Path], tmp_path: Path):
    """Sixty training and ten held-out digits, bit by bit, with their labels."""
    source = write(tmp_path)
    for part in PARTS:
        found, expected = load(str(source), part), digits(part)
        order = torch.arange(len(expected))
        if write is picture_folder:  # files are read class by class
            order = torch.tensor(sorted(range(len(expected)), key=lambda i: (int(expected.labels[i]), i)))
        assert torch.equal(found.x, expected.x[order]) and torch.equal(found.labels, expected.labels[order])
        if write in (picture_folder, parquet_folder, saved_folder):
            assert found.class_names == expected.class_names


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("write", [picture_folder, parquet_folder])
def test_what_does_not_fit_in_memory_is_read_as_training_goes(
    write: Callable[[Path], Path], workers: int, tmp_path: Path
):
    """The same numbers, labels and names as in memory, in any order, from this process and from two others."""
    source = write(tmp_path)
    size = 60 * 64
    assert isinstance(load_samples(source, memory=size), Dataset)
    data, held = load_samples(source, memory=size - 1, workers=workers), load(source)
    assert isinstance(data, Streamed) and data.workers == workers
    assert (len(data), data.shape, data.classes) == (60, (1, 8, 8), 10) and data.class_names == held.class_names
    orders = [torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:20] for seed in range(3)]
    draws = [Draw(order, torch.zeros(20, dtype=torch.long), 0) for order in orders]
    for order, read in zip(orders, data.feed(draws), strict=True):
        expected = held.rows(order)
        assert torch.equal(read.x, expected.x) and torch.equal(read.cond, expected.cond)
        assert torch.equal(data.conditions(order), expected.cond)


def test_a_listing_is_known_by_its_files(tmp_path: Path):
    """Another name, byte, label or row group, another digest; the same files elsewhere, the same."""
    (tmp_path / "a").mkdir()
    folder = picture_folder(tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b")

    def digest(path: Path) -> str:
        return load_samples(path, memory=0).sha256()

    digests = [digest(tmp_path / "a")]
    assert digest(tmp_path / "b") == digests[0]
    last = sorted((tmp_path / "b" / "train" / "9").glob("*.png"))[-1]
    for other in (last.with_name("z.png"), last.parents[1] / "8" / "z.png"):
        last.rename(other)
        digests.append(digest(tmp_path / "b"))
        other.rename(last)
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    digests.append(digest(tmp_path / "b"))
    assert len(set(digests)) == 4
    for rows in (4, 5):
        pq.write_table(table("train"), tmp_path / "x.parquet", row_group_size=rows)
        digests.append(digest(tmp_path / "x.parquet"))
    assert len(set(digests)) == 6


def test_row_groups_are_kept_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The last ones, up to so many bytes, and at least one."""
    pq.write_table(table("train"), tmp_path / "x.parquet", row_group_size=4)
    rows = list_parquet_file(tmp_path / "x.parquet")
    monkeypatch.setattr(parquet, "KEPT", 1)
    for index in (0, 3, 59, 1):
        rows.picture(index)
        assert list(rows.kept) == [index // 4]
    monkeypatch.setattr(parquet, "KEPT", 1 << 20)
    for index in (8, 0, 12):
        rows.picture(index)
    assert list(rows.kept) == [2, 0, 3]


def test_paths_by_the_million_are_kept_as_text():
    """Any names, those that are no UTF-8 included; as a sequence."""
    names = ["a.png", "", "ü/ß.png", os.fsdecode(b"\xff.png")]
    strings = Strings(names)
    assert list(strings) == names and strings[1:3] == names[1:3] and strings[-1] == names[-1] and len(strings) == 4
    with pytest.raises(IndexError):
        strings[4]


def test_single_files_and_parts(tmp_path: Path):
    """One IDX file with its labels beside it, one parquet file, bytes columns, one saved data set, float arrays."""
    idx_folder(tmp_path)
    assert torch.equal(load(tmp_path / "train-images-idx3-ubyte.gz").labels, digits("train").labels)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    assert load(tmp_path / "t10k-images-idx3-ubyte").labels is None
    pq.write_table(table("test", "img", lambda b: b), tmp_path / "some.parquet")
    assert torch.equal(load(tmp_path / "some.parquet").x, digits("test").x)
    (tmp_path / "saved").mkdir()
    assert torch.equal(load(saved_folder(tmp_path / "saved") / "test").x, digits("test").x)
    np.savez(tmp_path / "points.npz", x=np.linspace(0, 1, 10).reshape(5, 2))
    points = load(tmp_path / "points.npz")
    assert points.x.dtype == torch.float32 and points.shape == (2,) and points.labels is None


def test_pictures_of_every_kind(tmp_path: Path):
    """Grey beside colour gives colour; transparent is laid on white; palettes, films and EXIF turns are understood."""
    Image.new("L", (4, 4), 100).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "b.png")
    Image.new("RGB", (4, 4), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "c.png")
    frames = [Image.new("RGB", (4, 4), (0, 255, 0)), Image.new("RGB", (4, 4), (255, 0, 0))]
    frames[0].save(tmp_path / "d.gif", save_all=True, append_images=frames[1:])
    (tmp_path / ".hidden.png").write_text("")
    data = load(tmp_path)
    assert data.x[:, :, 0, 0].tolist() == [[100, 100, 100], [255, 255, 255], [10, 20, 30], [0, 255, 0]]
    assert data.labels is None and data.name == tmp_path.name
    wide = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    (tmp_path / "turned").mkdir()
    wide.save(tmp_path / "turned" / "e.png", exif=exif)
    assert load(tmp_path / "turned").x[0, 0].tolist() == np.rot90(np.asarray(wide), -1).tolist()


def test_numbered_classes_keep_their_numbers(tmp_path: Path):
    """Folders 0 to 10 are the labels 0 to 10, not 0, 1, 10, 2, ..."""
    for i in range(11):
        (tmp_path / str(i)).mkdir()
        Image.new("L", (2, 2), i).save(tmp_path / str(i) / "x.png")
    data = load(tmp_path)
    assert data.labels.tolist() == data.x[:, 0, 0, 0].tolist() == list(range(11))


def test_a_folder_named_train_can_be_a_class(tmp_path: Path):
    """Vehicles "plane" and "train" are classes; "train" and "val" are parts, and classes follow the training part."""
    for name in ("plane", "train", "parts/train/b", "parts/train/a", "parts/val/b"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / name / "x.png")
    vehicles = tmp_path / "vehicles"
    vehicles.mkdir()
    for name in ("plane", "train"):
        (tmp_path / name).rename(vehicles / name)
    assert load(vehicles).class_names == ("plane", "train")
    assert load(tmp_path / "parts").class_names == ("a", "b")
    assert load(tmp_path / "parts", "test").labels.tolist() == [1]


def test_the_page_on_data_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The Python of docs/data.md, from top to bottom, says what it should."""
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), {"__name__": "page"})
    said = capsys.readouterr().out
    assert "Streamed 8 (1, 8, 8)" in said and "[10.,  1.]" in said


# --- quality ------------------------------------------------------------------------------------------------------


def test_quality_of_real_and_of_bad_pictures():
    """Real training digits are at the floor with high precision; noise is far away; copies and collapse show."""
    train, test = load("digits"), load("digits", "test")
    judge = Evaluator(test, train, load_features("digits"))
    real = judge(test.read(slice(None)), test.labels)
    # Bit-identical to the reference: distance 0, everything covered, memorises nothing.
    assert real.frechet.value < 1e-10 and real.kernel.value < 0 and real.accuracy == 0.998
    assert real.precision == real.recall == real.coverage == 1.0 and real.diversity == pytest.approx(1, abs=1e-6)
    assert real.memorisation.ratio == 1.0 and real.memorisation.close == pytest.approx(0.05, abs=0.003)

    copies = judge(train.read(slice(0, 500)), train.labels[:500])
    assert copies.memorisation.ratio == 0.0 and copies.memorisation.close == 1.0
    assert copies.frechet.value < copies.floor.value + 3 * copies.frechet.error and copies.precision > 0.8

    noise = judge(torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1, test.labels)
    assert noise.frechet.value > 20 * noise.floor.value and noise.accuracy < 0.2
    assert noise.recall < 0.05 and noise.coverage < 0.3 and noise.memorisation.ratio > 2

    collapsed = judge(train.read(torch.zeros(500, dtype=torch.long)), train.labels[:1].repeat(500))
    assert collapsed.diversity == 0.0 and collapsed.recall < 0.1 and collapsed.coverage < 0.1


def test_quality_record():
    """JSON gives back the same record, the same seed the same numbers, and pixels of 784 dimensions are projected."""
    train, test = load("fashion").subset(slice(0, 300)), load("fashion", "test").subset(slice(0, 200))
    samples = train.read(slice(0, 100)) * 1.1  # out of range, clamped
    found = evaluate(samples, None, test, train, Pixels())
    assert Quality.from_json(found.to_json()) == found == evaluate(samples.clamp(-1, 1), None, test, train, Pixels())
    assert (found.n, found.directions, found.features, found.accuracy) == (100, 64, "pixels", None)
    assert found.reference == "fashion (200)"


def test_unmeasurable_samples_are_refused():
    """One line that names what is wrong."""
    train, test = load("digits"), load("digits", "test")
    good = train.read(slice(0, 50))
    broken = good.clone()
    broken[7, 0, 2, 2] = float("nan")
    for samples, labels, message in (
        (good[:, :, :4], None, r"samples of shape \[1, 4, 8\], 'digits' has \[1, 8, 8\]"),
        (good[:10], None, "10 samples: at least 20"),
        (broken, None, "sample 7 holds NaN"),
        (good, train.labels[:3], r"50 samples need labels \[50\], got shape \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(samples, labels, test, train, Pixels())
