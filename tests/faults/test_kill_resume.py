"""Kill a run anywhere: the same command makes the weights of the run that was never killed, bit for bit."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from child_processes import CONTEXT
from torch import Tensor

from fewstep import files as writer
from fewstep.data.dataset import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.files import save_tensors, write_atomically
from fewstep.hub import native
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import EDMPrediction
from fewstep.schedules import EDM
from fewstep.training.budget import Budget
from fewstep.training.profiles import Power
from fewstep.training.progress import Records
from fewstep.training.trainer import Interrupted, Settings, train

STEPS = 120
METHOD = DMD2(critic_steps=3, gan_weight=0.1, lr=1e-3, critic_lr=1e-3)  # three networks, two optimisers, a GAN


@dataclass(frozen=True)
class Told(Dataset):
    """Data that say on ``line`` that a step begins."""

    line: Connection | None = None

    def read(self, indices: Tensor | slice) -> Tensor:
        if self.line is not None:
            self.line.send_bytes(b".")
        return super().read(indices)


def teacher() -> NetworkDenoiser:
    gen = torch.Generator().manual_seed(3)
    net = MLP((2,), 16, 2, classes=3)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=gen))
    return NetworkDenoiser(net, EDM(), EDMPrediction(), (2,), 3)


def points(line: Connection | None = None) -> Dataset:
    gen = torch.Generator().manual_seed(4)
    return Told("points", torch.randn(50, 2, generator=gen), torch.arange(50) % 3, line=line)


def train_in(folder: Path, steps: int, line: Connection | None = None) -> None:
    """The command: train, save after every step, leave the model."""
    torch.set_num_threads(1)
    settings = Settings(
        Budget(steps), 8, accumulate=2, precision="fp32", averages=(Power(0.1), Power(0.05)), save_seconds=0
    )
    result = train(METHOD, Start(teacher(), points(line)), settings, folder, show=False)
    native.save(result.model, folder / "model")


def child(folder: Path, steps: int, line: Connection, sabotage: Callable[[], None] | None) -> None:
    if sabotage is not None:
        sabotage()
    try:
        train_in(folder, steps, line)
    except Interrupted as stopped:
        (folder / "said").write_text(f"{stopped.number} {stopped}")


def begin(
    folder: Path, steps: int = STEPS, sabotage: Callable[[], None] | None = None
) -> tuple[BaseProcess, Connection]:
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=child, args=(folder, steps, there, sabotage))
    process.start()
    there.close()
    return process, here


def wait_for_steps(line: Connection, n: int) -> None:
    """Return when ``n`` steps have begun (two micro-batches each)."""
    for _ in range(2 * n):
        assert line.poll(60), "the run does not move"
        line.recv_bytes()


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "model" / name).read_bytes() for name in ("model.safetensors", "config.json")}


def log(folder: Path) -> list[dict[str, float]]:
    """The log without its clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    process, _ = begin(folder)
    process.join(120)
    assert process.exitcode == 0
    return folder


@pytest.fixture(scope="module")
def twelve_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twelve")
    train_in(folder, 12)
    return folder


def test_twenty_kills_leave_no_trace(never_killed: Path, tmp_path: Path) -> None:
    """SIGKILL at 20 random moments, from the start-up on and inside checkpoint writing, then resume: same model, same
    log, same snapshots, and nothing half-written is left."""
    draw = random.Random(0)
    for _ in range(20):
        process, line = begin(tmp_path)
        wait_for_steps(line, draw.randrange(5))
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process, _ = begin(tmp_path)
    process.join(120)
    assert process.exitcode == 0
    assert files(tmp_path) == files(never_killed)
    assert log(tmp_path) == log(never_killed)
    kept = {p.name: p.read_bytes() for p in (never_killed / "snapshots").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "snapshots").iterdir()} == kept
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in never_killed.iterdir()}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written() -> None:
    """The sixth tensor file is cut in the middle by the kill."""
    real, calls = writer.save_file, [0]

    def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        calls[0] += 1
        real(tensors, path, metadata)
        if calls[0] == 6:
            os.truncate(path, path.stat().st_size // 2)
            die()

    writer.save_file = save


def before_rename() -> None:
    """The kill comes when the new checkpoint is whole but not yet in place."""
    calls = [0]
    real = os.replace

    def replace(source: str, target: str) -> None:
        calls[0] += 1
        if calls[0] == 6:
            die()
        real(source, target)

    os.replace = replace


def after_rename() -> None:
    """The kill comes right after the new checkpoint is in place, before the log's next line."""
    calls = [0]
    real = os.replace

    def replace(source: str, target: str) -> None:
        calls[0] += 1
        real(source, target)
        if calls[0] == 6:
            die()

    os.replace = replace


def half_a_line() -> None:
    """The kill cuts a line of the log."""
    real = Records.write

    def write(self: Records, record: dict[str, float]) -> None:
        if record["step"] == 10:
            assert self._file is not None
            self._file.write('{"step": 10, "ima')
            self._file.flush()
            die()
        real(self, record)

    Records.write = write


@pytest.mark.parametrize("moment", [half_written, before_rename, after_rename, half_a_line])
def test_a_kill_inside_writing(moment: Callable[[], None], twelve_steps: Path, tmp_path: Path) -> None:
    """A kill at the worst moments of writing leaves a run that resumes to the same model and the same log."""
    process, _ = begin(tmp_path, 12, moment)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    train_in(tmp_path, 12)
    assert files(tmp_path) == files(twelve_steps)
    assert log(tmp_path) == log(twelve_steps)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in twelve_steps.iterdir()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_stop_saves_and_says_so(number: signal.Signals, never_killed: Path, tmp_path: Path) -> None:
    """SIGTERM and Ctrl-C end the step, save, say what to do; the same command goes on to the same model."""
    process, line = begin(tmp_path)
    wait_for_steps(line, 3)
    os.kill(process.pid or 0, number)
    process.join(60)
    assert process.exitcode == 0
    said = (tmp_path / "said").read_text()
    assert said.startswith(f"{number.value} stopped after ")
    assert said.endswith(f"steps, saved in {tmp_path}; the same command resumes")
    assert 3 <= int(said.split()[3]) < STEPS
    (tmp_path / "said").unlink()
    train_in(tmp_path, STEPS)
    assert files(tmp_path) == files(never_killed)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    """While a process trains in a folder, another is told so; the first one is not disturbed."""
    process, line = begin(tmp_path)
    wait_for_steps(line, 2)
    with pytest.raises(ValueError, match=r"another run is training in this folder; wait for it"):
        train_in(tmp_path, STEPS)
    assert process.is_alive()
    wait_for_steps(line, 2)
    process.kill()
    process.join()


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    """By the next writer of the same file; what another process is writing stays, and so do files of other names."""
    path, living = tmp_path / "weights.safetensors", os.getppid()
    names = [f".weights.safetensors.{2**22 + 1}", f".weights.safetensors.{os.getpid()}"]  # one no process can have
    kept = [f".weights.safetensors.{living}", f".other.safetensors.{2**22 + 1}", ".weights.safetensors.old"]
    for name in [*names, *kept]:
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmpA").touch()
    save_tensors(path, {"x": torch.zeros(1)})
    assert {p.name for p in tmp_path.iterdir()} == {path.name, *kept}
    write_atomically(path, b"new")
    assert {p.name for p in tmp_path.iterdir()} == {path.name, *kept}
    assert path.read_bytes() == b"new"
