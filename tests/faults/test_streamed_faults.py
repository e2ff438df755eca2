"""Data that are read as training goes: a bad item is one line with its number, a lost process one line with a cure, and
a signal to the whole group ends the run as one to the training process alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fewstep.data import Draw, Streamed, load_samples

GOOD = torch.zeros(1, 2, 2, dtype=torch.uint8)


class Broken:
    """Six items of which the fourth is bad."""

    def __init__(self, bad: Any) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        if index != 3:
            return GOOD, index % 2
        if isinstance(self.bad, Exception):
            raise self.bad
        return self.bad


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (KeyError("path\nof two lines"), ("KeyError", "path")),
        (OSError(2, "No such file", "x.png"), ("x.png",)),
        (MemoryError(), ("MemoryError",)),
        ((GOOD[:, :1], 0), ("sample is torch.uint8 [1, 1, 2], that of item 0 torch.uint8 [1, 2, 2]",)),
        ((GOOD.float(), 0), ("torch.float32 [1, 2, 2]", "torch.uint8")),
        (GOOD, ("it has sample, item 0 has sample, condition 'cond'",)),
        ((GOOD, 2), ("label is 2: labels are 0 to 1",)),
        ((GOOD, -2), ("label is -2",)),
        ((GOOD, 1.0), ("torch.float32",)),
        ((GOOD, "cat"), ("is a str: give a tensor",)),
        ((GOOD, 0, 1), ("a sequence of 3",)),
        (None, ("is a NoneType",)),
        ({"pixels": GOOD}, ("a dict without a sample", "['pixels']")),
        ((torch.full((1, 2, 2), float("nan")), 0), ("NaN",)),
        ((np.array(["a"]), 0), ("str",)),
    ],
)
def test_bad_items(bad: Any, words: tuple[str, ...], workers: int) -> None:
    """One line that names the data set and the item, from this process and from another."""
    data = Streamed(Broken(bad), "mine", classes=2, workers=workers)
    draws = [Draw(torch.tensor(chosen), torch.zeros(2, dtype=torch.long), 0) for chosen in ([0, 1], [2, 3])]
    read = data.feed(draws)
    assert next(read).x is not None
    with pytest.raises(ValueError) as caught:
        next(read)
    message = str(caught.value)
    assert message.startswith("data 'mine', item 3: ") and "\n" not in message and len(message) < 300
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("items", "options", "words"),
    [
        ([], {}, "no items"),
        (iter([GOOD]), {}, "has no length"),
        ([GOOD], {"workers": -1}, "workers=-1"),
        ([torch.full((2,), float("inf"))], {}, "item 0: the sample holds NaN"),
    ],
)
def test_what_is_no_data_set(items: Any, options: dict[str, Any], words: str) -> None:
    """Nothing in it, no length, a first item that cannot be."""
    with pytest.raises(ValueError, match=words):
        Streamed(items, **options)


def test_labels_of_unknown_number() -> None:
    """Classes cannot be counted without reading everything."""
    with pytest.raises(ValueError, match="classes=10"):
        _ = Streamed([(GOOD, 1)]).classes


class Deadly(Broken):
    """An item that takes its process with it."""

    def __getitem__(self, index: int) -> Any:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_process_that_dies() -> None:
    """As one does that the system ends for its memory."""
    data = Streamed(Deadly(None), "mine", classes=2, workers=1)
    read = data.feed([Draw(torch.tensor([i]), torch.zeros(1, dtype=torch.long), 0) for i in (0, 3)])
    with pytest.raises(ValueError, match=r"data 'mine': a process that reads it ended .*workers=0"):
        list(read)


def png(size: tuple[int, int] = (4, 4), mode: str = "L") -> bytes:
    encoded = BytesIO()
    Image.new(mode, size).save(encoded, "PNG")
    return encoded.getvalue()


BAD = [
    (b"not a picture", "not a picture, damaged or cut short"),
    (png()[:40], "damaged or cut short"),
    (png((4, 5)), "is 5x4 but"),
    (png(mode="RGB"), "is in colour but"),
]


@pytest.mark.parametrize(("content", "words"), BAD)
def test_bad_pictures_in_a_folder(content: bytes, words: str, tmp_path: Path) -> None:
    """The file is named when its turn comes."""
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(content if i == 2 else png())
    data = load_samples(tmp_path, memory=0, workers=1)
    with pytest.raises(ValueError, match=f"item 2: .*{tmp_path}/2.png.*{words}") as caught:
        list(data.feed([Draw(torch.tensor([0, 2]), torch.zeros(2, dtype=torch.long), 0)]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "words"), [*BAD, (None, "holds no encoded picture")])
def test_bad_pictures_in_parquet(content: bytes | None, words: str, tmp_path: Path) -> None:
    """The file and the row in it are named when its turn comes."""
    for name, cells in (("a", [png()] * 3), ("b", [png(), content])):
        pq.write_table(pa.table({"img": cells}), tmp_path / f"{name}.parquet")
    data = load_samples(tmp_path, memory=0, workers=1)
    with pytest.raises(ValueError, match=f"item 4: .*row 1 of {tmp_path}/b.parquet.*{words}") as caught:
        list(data.feed([Draw(torch.tensor([0, 4]), torch.zeros(2, dtype=torch.long), 0)]))
    assert "\n" not in str(caught.value)


def test_parquet_that_changes_under_the_run(tmp_path: Path) -> None:
    """Cut short after it was listed: one line with its name."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"img": [png()] * 6}), path, row_group_size=2)
    data = load_samples(tmp_path, memory=0, workers=0)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"item 5: '.*a.parquet' is not a readable table"):
        data.rows(slice(5, 6))


RUN = """
    import sys, time
    from pathlib import Path
    import torch
    from fewstep.data import Streamed
    from fewstep.predictions import EDMPrediction
    from fewstep.denoisers import NetworkDenoiser
    from fewstep.methods.start import Start
    from fewstep.methods.teachers.denoising import Denoising
    from fewstep.networks import MLP
    from fewstep.schedules import EDM
    from fewstep.training.budget import Budget
    from fewstep.training.trainer import Interrupted, Settings, train

    class Slow:
        def __len__(self): return 100
        def __getitem__(self, index):
            time.sleep(0.005)
            return torch.zeros(2)

    teacher = NetworkDenoiser(MLP((2,), 8, 1), EDM(), EDMPrediction(), (2,))
    print("begun", flush=True)
    try:
        settings = Settings(Budget(100_000), batch=8, precision="fp32")
        train(Denoising(), Start(teacher, Streamed(Slow(), workers=2)), settings, Path(sys.argv[1]), show=False)
    except Interrupted as stopped:
        print(stopped, stopped.number)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group(number: int, tmp_path: Path) -> None:
    """Ctrl-C reaches the reading processes too, and so does SIGTERM from a scheduler: the step ends, the run is saved,
    nothing is printed and nobody is left."""
    words = [sys.executable, "-c", textwrap.dedent(RUN), str(tmp_path)]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").read_text():
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    os.killpg(run.pid, number)
    said, complaints = run.communicate(timeout=60)
    assert complaints == "" and "saved in" in said and said.endswith(f" {number.value}\n"), (said, complaints)
    assert (tmp_path / "checkpoint.safetensors").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)
