"""A training run of the command line: its settings, its recipe read again, its folder, and what is told of it."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.cli.errors import Stopped, UserError
from fewstep.cli.flags import from_json
from fewstep.cli.settings import SETTINGS
from fewstep.data import Samples
from fewstep.denoisers import Denoiser
from fewstep.methods.method import Recipe
from fewstep.models import model_of
from fewstep.runs import record as records
from fewstep.runs.course import run_recipe
from fewstep.runs.record import NAME, Record
from fewstep.runs.resume import OtherRun, begun
from fewstep.training.nonfinite import NonFiniteError
from fewstep.training.settings import FREE, Settings
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
    elif device.type == "cpu" and device.index:
        raise UserError(f"--device {name}: there is one CPU; write cpu")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f"--device '{name}' is not supported: write cpu, cuda, cuda:1 or mps")
    return device


def settings_of(values: dict[str, Any], where: str) -> Settings:
    """Trainer settings from plain data; ValueError naming ``where`` for what cannot work."""
    settings = Settings(**from_json(SETTINGS, values, where))
    return dataclasses.replace(settings, device=str(device_of(settings.device)))


def begin(command: str, recipe: Recipe, start: dict[str, Any], data: dict[str, Any], values: dict[str, Any]) -> Record:
    """The record of a new run; its device as it was asked for, which processes of several understand each their way."""
    record = records.record_of(recipe, start, data, settings_of(values, "settings"), command)
    return dataclasses.replace(record, settings=record.settings | {"device": values["device"]})


@contextmanager
def told_by_run(out: Path) -> Iterator[None]:
    """What a run raises about the user's business, as what the command line shows."""
    try:
        yield
    except Interrupted as stopped:
        raise Stopped(stopped.number, str(stopped)) from None
    except OtherRun as error:
        flag = f"--{error.difference.name.replace('_', '-')}" if error.difference.setting else error.difference.name
        raise UserError(
            f"{error.folder} holds another run: {dataclasses.replace(error.difference, name=flag)}; choose another "
            "--out, or give what is there to resume it"
        ) from None
    except NonFiniteError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(out)) from None
        raise


def execute(
    record: Record,
    recipe: Recipe,
    model: Denoiser,
    data: Samples,
    out: Path,
    show: bool,
    given: Mapping[str, nn.Module] | None = None,
) -> Result:
    """Run a record in its folder, from the start or from where it stopped."""
    settings = settings_of(record.settings, "settings")
    with told_by_run(out):
        return run_recipe(recipe, model, data, settings, out, given=given, record=record, show=show)


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


def check_source(what: str, name: str, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """:class:`UserError` when a recipe's model or data are not what they were."""
    before, now = records.named(recorded), records.named(found)
    if not before.agrees(now):
        raise UserError(
            f"the recipe was made with another {what} than '{name}': with {before.shown}, this is {now.shown}"
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
    kind = model_of(result.model)
    look = "report" if kind.task != "generation" else "sample"
    print(f"the {kind.noun} is in {out / 'model'}; look at it:  fewstep {look} {out}")
    if kind.tokens is None or kind.task == "language":
        print(f"measure it:  fewstep evaluate {out}")
