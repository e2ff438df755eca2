"""Run a recipe: its stages in order, each in a folder of its own, each starting from what the last one made.

A finished stage has a checkpoint at the end of its budget and is not trained again, so the same command resumes a
recipe anywhere.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from fewstep.data.dataset import Dataset, Samples
from fewstep.denoisers import Denoiser
from fewstep.discrete.learned import LearnedSampler
from fewstep.files import load_tensors, save_tensors
from fewstep.flow_maps import EDMConsistency, Jump
from fewstep.hub import native
from fewstep.methods.method import Method, Recipe
from fewstep.sampling.rollout import Student
from fewstep.training.budget import Budget
from fewstep.training.parallel import Parallel
from fewstep.training.progress import Bar
from fewstep.training.trainer import Result, Settings, train


def as_teacher(model: Student | Denoiser) -> Denoiser:
    """What the next stage calls its teacher: the denoiser inside a student."""
    if isinstance(model, Student):
        if not isinstance(model.flow_map, Jump | EDMConsistency):
            raise TypeError(f"a {type(model.flow_map).__name__} cannot be the teacher of a next stage")
        return model.flow_map.denoiser
    if isinstance(model, LearnedSampler):
        return model.denoiser  # type: ignore[return-value]
    return model


def run_recipe(
    recipe: Recipe,
    teacher: Denoiser,
    data: Samples,
    settings: Settings,
    folder: Path | None = None,
    *,
    show: bool = True,
) -> Result:
    """Train every stage with an equal share of the budget; the last stage's :class:`Result`, with the cost of all.

    With a ``folder`` every stage leaves ``stage-<k>-<name>/`` (records, checkpoint and its model) there; a recipe of
    one stage trains in the folder itself.
    """
    stages = recipe.stages()
    share = Budget(settings.budget.amount / len(stages), settings.budget.unit)
    results: list[Result] = []
    for k, stage in enumerate(stages):
        place = None
        if folder is not None:
            place = folder if len(stages) == 1 else folder / f"stage-{k}-{stage.name}"
        here = dataclasses.replace(settings, budget=share, seed=settings.seed + k)
        results.append(run_stage(stage, teacher, data, here, place, show))
        teacher = as_teacher(results[-1].model)
    records = [{**record, "stage": k} for k, result in enumerate(results) for record in result.records]
    return Result(
        results[-1].model,
        sum(r.steps for r in results), sum(r.images for r in results), sum(r.seconds for r in results), records,
    )  # fmt: skip


def run_stage(
    stage: Method, teacher: Denoiser, data: Samples, settings: Settings, folder: Path | None, show: bool
) -> Result:
    """One stage: prepare its data (once), train, save its model.  Of several processes, the main one writes."""
    main = Parallel.from_environment(torch.device(settings.device)).main
    show = show and main
    if folder is None:
        return train(stage, teacher, prepared(stage, teacher, data, settings.seed, None, show), settings, show=show)
    folder.mkdir(parents=True, exist_ok=True)
    source = prepared(stage, teacher, data, settings.seed, folder / "pairs.safetensors", show, main)
    result = train(stage, teacher, source, settings, folder, show=show)
    cost = {"method": stage.name, "steps": result.steps, "images": result.images, "seconds": round(result.seconds, 1)}
    if main:
        native.save(result.model, folder / "model", cost)
    return result


def prepared(
    stage: Method, teacher: Denoiser, data: Samples, seed: int, store: Path | None, show: bool, keep: bool = True
) -> Samples:
    """The stage's training data; a pair store is kept in the run folder (by the process with ``keep``) and read back on
    resume."""
    if store is not None and store.exists():
        saved = load_tensors(store)
        return Dataset("pairs", saved["x"], saved.get("labels"), columns={"noise": saved["noise"]})
    bar = Bar(f"{stage.name}: pairs", show)
    with torch.no_grad():
        made = stage.prepare(teacher, data, seed, lambda done, total: bar.update(done / total))
    bar.close()
    if store is not None and keep and made is not data and isinstance(made, Dataset):
        tensors = {"x": made.x, **made.columns}
        save_tensors(store, tensors if made.labels is None else tensors | {"labels": made.labels})
    return made
