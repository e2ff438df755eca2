"""The course of a run, from its record to its card: what the library, the command line and the demonstration call."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.data import Samples
from fewstep.denoisers import NetworkDenoiser
from fewstep.files import write_atomically
from fewstep.hub import native
from fewstep.methods.method import Recipe
from fewstep.methods.start import Start, teacher_in
from fewstep.models import model_of
from fewstep.runs.conditions import as_read_by, check_readable
from fewstep.runs.record import Record, data_source, model_source, record_of
from fewstep.runs.resume import begun, enter, held, stage_seeds
from fewstep.runs.stages import borrowed, cost, run_stages, stages_of
from fewstep.sampling.search import half_level
from fewstep.schemas import read_records
from fewstep.training.parallel import Parallel
from fewstep.training.progress import LOGGED
from fewstep.training.settings import Settings
from fewstep.training.trainer import Result


def run_recipe(
    recipe: Recipe,
    teacher: nn.Module,
    data: Samples,
    settings: Settings,
    folder: Path | None = None,
    *,
    given: Mapping[str, nn.Module] | None = None,
    record: Record | None = None,
    further: bool = False,
    show: bool = True,
) -> Result:
    """Run a recipe, from the start or from where it stopped; the caller's models stay as they are.

    ``given`` are models for the recipe's roles.  With a ``folder`` the run is recorded there and resumed by the same
    call; ``record`` says what the models and the data are called (by default nothing, and the data's own name), and
    with ``further`` the budget may be another than before.  ValueError for models and data that do not fit, and for a
    folder that holds another run or is held by one.
    """
    teacher, given = teacher_in(teacher), given or {}
    kind = model_of(teacher)
    recipe.check_task(kind.task, kind.called)
    recipe.check_given(given)
    check_readable(teacher, data)
    device = torch.device(settings.device)

    def start(stores: Path | None, show: bool) -> Start:
        models = {role: borrowed(model, device) for role, model in (given or {}).items()}
        read = as_read_by(teacher, data, stores, show)
        return Start(borrowed(teacher, device), read, settings.seed, given=models)

    parallel = Parallel.from_environment(device)
    for line in ignored(recipe, settings) if show and parallel.main else ():
        print(line)
    if folder is None:
        return run_stages(recipe, start(None, show), settings, show=show)
    if not parallel.main:
        parallel.barrier()  # the main process has made the folder, or found there what it is to go on with
        seeds = stage_seeds(folder)
        return run_stages(recipe, start(folder / "stores", False), settings, folder, seeds=seeds, show=False)
    if record is None:
        sources = {role: model_source(None, model) for role, model in {"teacher": teacher, **given}.items()}
        record = record_of(recipe, sources, data_source(data.name, data), settings)
    with held(folder):
        resumed = begun(folder)
        record = enter(folder, record, further)
        parallel.barrier()
        if show and resumed:
            print(f"{folder}: going on where this run stopped")
        settings = dataclasses.replace(settings, precision=record.settings["precision"])
        begin = start(folder / "stores", show)
        result = run_stages(recipe, begin, settings, folder, seeds=record.stage_seeds, show=show)
        if record.command == "train" and model_of(result.model).task == "generation":
            keep_half_level(result.model)
        if not native.keep(result.model, folder / "model", card(record, recipe, result)) and show:
            print(f"{folder / 'model'}: weights alone, for load_state_dict: a network of your own is yours to build")
        join_logs(folder)
    return result


def ignored(recipe: Recipe, settings: Settings) -> list[str]:
    """A line for every setting that means nothing to a recipe and is not the usual one."""
    usual, given = vars(Settings()), vars(settings)
    changed = {name: said for name, said in recipe.unused.items() if given[name] != usual[name]}
    return [f"{name}={given[name]} means nothing to {recipe.name}: {said}" for name, said in changed.items()]


def keep_half_level(model: nn.Module) -> None:
    """Measure what samplers want to know of a teacher, and keep it there; None where nothing was learned yet, nothing
    in a student that is no teacher."""
    try:
        teacher: NetworkDenoiser = model_of(model).teacher()
    except ValueError:
        return
    try:
        teacher.half_level = half_level(teacher)
    except ValueError:
        teacher.half_level = None


def card(record: Record, recipe: Recipe, result: Result) -> dict[str, Any]:
    """How the model was made, for its card."""
    return {
        **cost(stages_of(recipe, record.start)[-1].method.name, result),
        "recipe": record.method,
        "hyper_parameters": record.hyper_parameters,
        "teacher": record.start["teacher"] if record.command == "distill" else None,
        "data": record.data,
        "versions": record.versions,
    }


def join_logs(folder: Path) -> None:
    """The logs of the stages as one ``log.jsonl``: the stage in each line, steps, images and seconds going on."""
    stages = sorted(folder.glob("stage-*/log.jsonl"), key=lambda path: int(path.parent.name.split("-")[1]))
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
    write_atomically(folder / "log.jsonl", ("\n".join(lines) + "\n").encode())
