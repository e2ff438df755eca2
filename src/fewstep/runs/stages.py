"""The stages of a recipe in order, each in a folder of its own, each starting from what those before handed on.

A finished stage has a checkpoint at the end of its budget and is not trained again, so the same call resumes a recipe
anywhere.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from fewstep.hub import native
from fewstep.methods.method import Recipe, Stage
from fewstep.methods.start import Start
from fewstep.networks.lora import moving
from fewstep.randomness import derive_seed
from fewstep.runs.record import Seeds
from fewstep.runs.shelf import Shelf
from fewstep.training.budget import Budget
from fewstep.training.parallel import Parallel
from fewstep.training.trainer import Result, Settings, train_held

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def stages_of(recipe: Recipe, given: Container[str] = ()) -> list[Stage]:
    """The stages that get a share of the budget, where models in the roles ``given`` are brought; ValueError when none
    does."""
    stages = [stage for stage in recipe.stages() if stage.share and (not stage.needs or stage.needs in given)]
    if not stages:
        raise ValueError(f"{recipe.name}: no stage has a share of the budget")
    return stages


def stage_seed(seed: int, k: int, seeds: Seeds = "derived") -> int:
    """The seed of stage ``k`` of a run: the run's own in the first, unrelated ones later.

    "counted" is how earlier versions had it, ``seed + k``, by which a run shared draws with that of the next seed.
    """
    if seeds == "counted":
        return seed + k
    return seed if k == 0 else derive_seed(seed, "stage", k)


def borrowed(model: AnyModule, device: torch.device) -> AnyModule:
    """A frozen twin of somebody's model on a device, which shares its memory where that is there: what is done to the
    twin (moved, frozen, set to training) is not done to the model."""
    parameters = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in moving(model)}
    twin = copy.deepcopy(model, {**parameters, **{id(b): b for b in model.buffers()}})
    return twin.to(device).requires_grad_(False).eval()


def run_stages(
    recipe: Recipe,
    start: Start,
    settings: Settings,
    folder: Path | None = None,
    *,
    seeds: Seeds = "derived",
    show: bool = True,
) -> Result:
    """Train every stage with its share of the budget; the last stage's :class:`Result`, with the cost of all.

    With a ``folder`` (which the caller holds) every stage leaves ``stage-<k>-<name>/`` there, records, checkpoint and
    its model; a recipe of one stage trains in the folder itself.
    """
    stages = stages_of(recipe, {*start.given, *start.made})
    whole = sum(stage.share for stage in stages)
    parallel = Parallel.from_environment(torch.device(settings.device))
    shelf = Shelf(folder, parallel, show)
    made: Mapping[str, nn.Module] = start.made
    results: list[Result] = []
    for k, stage in enumerate(stages):
        place = folder
        if folder is not None and len(stages) > 1:
            place = folder / f"stage-{k}-{stage.method.name}"
        seed = stage_seed(settings.seed, k, seeds)
        budget = Budget(settings.budget.amount * stage.share / whole, settings.budget.unit)
        begin = dataclasses.replace(start, seed=seed, made=made, keep=shelf)
        here = dataclasses.replace(settings, budget=budget, seed=seed)
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
        result = train_held(stage.method, begin, here, place, show=show and parallel.main)
        if place is not None and len(stages) > 1 and parallel.main:
            native.keep(result.model, place / "model", cost(stage.method.name, result))
        results.append(result)
        made = {**made, **result.made}
    return dataclasses.replace(
        results[-1],
        steps=sum(r.steps for r in results),
        images=sum(r.images for r in results),
        seconds=sum(r.seconds for r in results),
        choosing=sum(r.choosing for r in results),
        records=[{**record, "stage": k} for k, result in enumerate(results) for record in result.records],
        made=made,
    )


def cost(method: str, result: Result) -> dict[str, object]:
    """What a model's card says of how long it took."""
    seconds = {"seconds": round(result.seconds, 1), "choosing": round(result.choosing, 4)}
    return {"method": method, "steps": result.steps, "images": result.images, **seconds}
