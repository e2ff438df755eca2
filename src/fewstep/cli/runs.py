"""A training run of the command line: its folder, its record, and what happens in between.

A run folder holds ``recipe.json``, ``log.jsonl``, ``checkpoint.safetensors`` and ``model/``; the stages of a recipe of
several lie in ``stage-<k>-<name>/`` beside the finished ``model/``.  The same recipe in the same folder is the same
run, resumed; another one is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fewstep.cli import records
from fewstep.cli.errors import Stopped, UserError
from fewstep.cli.flags import from_json
from fewstep.cli.records import NAME, Record
from fewstep.cli.settings import FREE, SETTINGS
from fewstep.data import Dataset
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.files import write_atomically
from fewstep.hub import native
from fewstep.methods.method import Recipe
from fewstep.sampling.search import half_level
from fewstep.schemas import read_records
from fewstep.training.nonfinite import NonFiniteError
from fewstep.training.precision import resolve
from fewstep.training.progress import LOGGED
from fewstep.training.settings import Settings
from fewstep.training.stages import run_recipe
from fewstep.training.trainer import Interrupted, Result


def main_process() -> bool:
    """Whether this is the process (of several that ``torchrun`` started) that writes files and talks."""
    return os.environ.get("RANK", "0") == "0"


def device_of(name: str) -> torch.device:
    """A device that is there; :class:`UserError` when it is not.  Under ``torchrun`` "cuda" is the process's own."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device '{name}' is not a device: write cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        found = torch.cuda.device_count()
        if int(device.index or 0) >= found:
            raise UserError(f"--device {name}: this machine has {found} CUDA devices that PyTorch can use")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: PyTorch has no Metal device here")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f"--device '{name}' is not supported: write cpu, cuda, cuda:1 or mps")
    return device


def settings_of(values: dict[str, Any], where: str) -> Settings:
    """Trainer settings from plain data; ValueError naming ``where`` for what cannot work."""
    settings = Settings(**from_json(SETTINGS, values, where))
    return dataclasses.replace(settings, device=str(device_of(settings.device)))


def check_fit(model: Denoiser, data: Dataset) -> None:
    """What the trainer would refuse later, before anything is written."""
    if tuple(data.shape) != tuple(model.shape):
        raise UserError(f"data '{data.name}' has samples {list(data.shape)}, the model makes {list(model.shape)}")
    if model.classes and (data.classes or 0) > model.classes:
        raise UserError(f"data '{data.name}' has {data.classes} classes, the model knows {model.classes}")


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Make the folder and hold it against other commands; :class:`UserError` when another has it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--out {out}: a file is in the way; choose another folder") from None
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{out}: another run is working in this folder; wait for it or choose another --out") from None
    else:
        yield
    finally:
        os.close(handle)


def begun(out: Path) -> bool:
    """Whether training has left anything in the folder."""
    return any(entry.name != NAME and not entry.name.startswith(".") for entry in out.iterdir())


def enter(out: Path, record: Record) -> Record:
    """Write the record into the folder, or find the same one there; the record to run, its precision resolved.

    Raises :class:`UserError` when the folder holds another run or somebody's files.
    """
    path = out / NAME
    if begun(out):
        if not path.is_file():
            raise UserError(f"--out {out} is not empty and holds no {NAME}: choose a new folder")
        old = records.read(path)
        if record.settings["precision"] == "auto":
            record = with_precision(record, old.settings.get("precision"))
        if differs := records.difference(old, record):
            raise UserError(
                f"{out} holds another run: {differs}; choose another --out, or give what is there to resume it"
            )
        return record
    if record.settings["precision"] == "auto":
        record = with_precision(record, resolve("auto", device_of(record.settings["device"])))
    write_atomically(path, record.to_json().encode())
    return record


def with_precision(record: Record, precision: Any) -> Record:
    return dataclasses.replace(record, settings=record.settings | {"precision": precision})


@contextmanager
def told_by_trainer(out: Path) -> Iterator[None]:
    """What the trainer raises about the user's business, as what the command line shows."""
    try:
        yield
    except Interrupted as stopped:
        raise Stopped(stopped.number, str(stopped)) from None
    except NonFiniteError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(out)) from None
        raise


def execute(record: Record, recipe: Recipe, model: Denoiser, data: Dataset, out: Path, show: bool) -> Result:
    """Run a record in its folder, from the start or from where it stopped."""
    settings = settings_of(record.settings, "settings")
    check_fit(model, data)
    with told_by_trainer(out):
        if not main_process():
            return run_recipe(recipe, model.to(settings.device), data, settings, out, show=False)
        with held(out):
            resumed = begun(out)
            record = enter(out, record)
            settings = settings_of(record.settings, str(out / NAME))
            if show and resumed:
                print(f"{out}: going on where this run stopped")
            result = run_recipe(recipe, model.to(settings.device), data, settings, out, show=show)
            if record.command == "train" and isinstance(result.model, NetworkDenoiser):
                result.model.half_level = measured_half_level(result.model)
            native.save(result.model, out / "model", card(record, recipe, result))
            join_logs(out)
    return result


def measured_half_level(teacher: NetworkDenoiser) -> float | None:
    """What samplers want to know of a teacher; None where nothing was learned yet."""
    try:
        return half_level(teacher)
    except ValueError:
        return None


def join_logs(out: Path) -> None:
    """The logs of the stages as one ``log.jsonl``: the stage in each line, steps, images and seconds going on."""
    stages = sorted(out.glob("stage-*/log.jsonl"), key=lambda path: int(path.parent.name.split("-")[1]))
    if not stages:
        return
    lines: list[str] = []
    before = {"step": 0, "images": 0, "seconds": 0.0}
    for stage, path in enumerate(stages):
        written = read_records(path, LOGGED)
        for entry in written:
            counted = {name: round(entry[name] + before[name], 3) for name in before}
            lines.append(json.dumps({**entry, **counted, "stage": stage}))
        if written:
            before = {name: before[name] + written[-1][name] for name in before}
    write_atomically(out / "log.jsonl", ("\n".join(lines) + "\n").encode())


def reopened(path: Path, command: str, chosen: argparse.Namespace) -> Record:
    """The record in a file with what the command line may change of it: where the data lie and the free settings."""
    record = records.read(path)
    if record.command != command:
        raise UserError(f"{path} is a recipe for 'fewstep {record.command}', not for 'fewstep {command}'")
    free = {name: value for name, value in vars(chosen).items() if name in FREE}
    data = record.data | ({"source": chosen.data} if chosen.data else {})
    now = records.versions()
    for name, version in record.versions.items():
        if now.get(name, version) != version:
            print(f"note: recorded with {name} {version}, this is {now[name]}: results may differ in the last bits")
    return dataclasses.replace(record, data=data, settings=record.settings | free, versions=now)


def check_source(what: str, name: str, recorded: str, found: str) -> None:
    """:class:`UserError` when a recipe's teacher or data are not what they were."""
    if recorded != found:
        raise UserError(
            f"the recipe was made with another {what} than '{name}': sha256 {recorded[:12]}, found {found[:12]}"
        )


def folder_for(chosen: argparse.Namespace, name: str) -> Path:
    """``--out``; of a recipe that lies in a run folder, that folder; else ``runs/<name>``."""
    if chosen.out is not None:
        return Path(chosen.out)
    if chosen.recipe is not None and chosen.recipe.name == NAME and begun(chosen.recipe.parent):
        return chosen.recipe.parent
    return Path("runs") / name


def tell(result: Result, out: Path) -> None:
    """What the run made and what to do with it."""
    if not main_process():
        return
    losses = {k: v for k, v in (result.records[-1] if result.records else {}).items() if k.endswith("/loss")}
    last = "".join(f", {name} {value:.4g}" for name, value in losses.items())
    print(f"{result.steps} steps, {result.images} samples, {result.seconds:.1f} s{last}")
    print(f"the model is in {out / 'model'}; look at it:  fewstep sample {out}")
    print(f"measure it:  fewstep evaluate {out}")


def card(record: Record, recipe: Recipe, result: Result) -> dict[str, Any]:
    """How the model was made, for its card."""
    return {
        "method": recipe.stages()[-1].name,
        "recipe": record.method,
        "hyper_parameters": record.hyper_parameters,
        "teacher": record.start if record.command == "distill" else None,
        "data": record.data,
        "steps": result.steps,
        "images": result.images,
        "seconds": round(result.seconds, 1),
        "versions": record.versions,
    }
