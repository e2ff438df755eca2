"""Data that are read as training goes: a bad item is one line with its number, a lost process one line with a cure, and
a signal to the whole group ends the run as one to the training process alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.data import Draw, Streamed

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


RUN = """
    import sys, time
    from pathlib import Path
    import torch
    from fewstep.data import Streamed
    from fewstep.denoisers import EDMPrediction, NetworkDenoiser
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
