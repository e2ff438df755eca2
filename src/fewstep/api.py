"""The few functions most users need: load, train, distill, compare, save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fewstep.data import Captioned, Samples, Streamed
from fewstep.data.dataset import Unlabelled
from fewstep.data.items import Items
from fewstep.denoisers import Denoiser
from fewstep.hub import native
from fewstep.hub.models import BUNDLED as BUNDLED
from fewstep.hub.models import bundled_models as bundled_models
from fewstep.hub.models import load as load
from fewstep.hub.models import locate as locate
from fewstep.hub.models import pictures as pictures
from fewstep.methods.method import Recipe
from fewstep.methods.start import teacher_in
from fewstep.networks.lora import LowRank as LowRank
from fewstep.runs.conditions import NO_DATA, embed_of, samples_of, tokenizer_of, without_data
from fewstep.runs.course import run_recipe
from fewstep.runs.record import Record, data_source, model_source, record_of
from fewstep.sampling.rollout import Student
from fewstep.training.budget import Budget
from fewstep.training.settings import Rank, Settings

if TYPE_CHECKING:
    from fewstep.report import Comparison


def _data(data: str | Path | Samples | Items | None, teacher: Denoiser) -> Samples:
    if data is None or data == NO_DATA:
        return without_data(teacher)
    if isinstance(data, str | Path):
        return samples_of(data, captions=embed_of(teacher) is not None, tokenizer=tokenizer_of(teacher))
    if isinstance(data, Samples):
        return data
    if isinstance(data, list | tuple) and all(isinstance(prompt, str) for prompt in data):
        return Captioned(data)
    items = Streamed(data, type(data).__name__, classes=teacher.classes)
    return Unlabelled(items) if items.labelled and teacher.classes is None and teacher.null is None else items


def distill(
    teacher: nn.Module | str,
    recipe: Recipe,
    data: str | Path | Samples | Items | None = None,
    budget: str | Budget = "2min",
    *,
    folder: str | Path | None = None,
    batch: int = 64,
    seed: int = 0,
    show: bool = True,
    student: nn.Module | str | None = None,
    guide: Denoiser | str | None = None,
    reward: nn.Module | str | None = None,
    target: nn.Module | str | None = None,
    lora: LowRank | int | None = None,
    **settings: Any,
) -> Any:
    """Train ``recipe`` from ``teacher`` and give back what it made; the teacher stays as it is.

    Without ``data`` (or with "none") a method that needs none draws noise, and classes in turn; a teacher of prompts
    takes a list of them, or a text file.
    ``budget`` is steps, images or time ("500steps", "20k images", "2min").  With a ``folder`` the run is recorded there
    as ``fewstep distill`` records it, and the same call or command resumes it; a folder with another run is refused.
    ``student`` is where the student's weights start, a model of any architecture that makes the same samples;
    ``guide``, ``reward`` and ``target`` are for methods that use them.  With ``lora``, a rank or a
    :class:`~fewstep.networks.lora.LowRank`, the student trains low-rank weights on the teacher's.  ``settings`` are
    further fields of :class:`~fewstep.training.settings.Settings`.
    """
    named = {"teacher": teacher, "student": student, "guide": guide, "reward": reward, "target": target}
    asked = {role: model for role, model in named.items() if model is not None}
    models: dict[str, Any] = {role: load(m) if isinstance(m, str) else m for role, m in asked.items()}
    amount = Budget.parse(budget) if isinstance(budget, str) else budget
    if lora is not None:
        ranks = LowRank(lora) if isinstance(lora, int) else lora
        settings |= {"lora_rank": Rank(ranks.rank), "lora_alpha": ranks.alpha, "lora_targets": ranks.targets}
    chosen = Settings(budget=amount, batch=batch, seed=seed, **settings)
    source = _data(data, teacher_in(models["teacher"]))
    record: Record | None = None
    if folder is not None:
        names = {role: m if isinstance(m, str) else None for role, m in asked.items()}
        places = {role: None if name is None else locate(name) for role, name in names.items()}
        start = {role: model_source(names[role], models[role], places[role]) for role in asked}
        name = str(data) if isinstance(data, str | Path) else source.name
        record = record_of(recipe, start, data_source(name, source), chosen)
    given = {role: model for role, model in models.items() if role != "teacher"}
    place = None if folder is None else Path(folder)
    return run_recipe(recipe, models["teacher"], source, chosen, place, given=given, record=record, show=show).model


def condense_data(
    recipe: Recipe,
    data: str | Path | Samples,
    budget: str | Budget = "1min",
    *,
    network: str | nn.Module = "convnet",
    folder: str | Path | None = None,
    batch: int = 64,
    seed: int = 0,
    show: bool = True,
    **settings: Any,
) -> Any:
    """Make a small data set that stands for ``data``, a :class:`~fewstep.data.condensed.Condensed`.

    ``network`` is the classifier that helps to choose or make it, with fresh weights: one of
    :data:`~fewstep.networks.classifiers.CLASSIFIERS` by name, or a network of your own for the shape and classes of the
    data.  Everything else is as in :func:`distill`.  ValueError for data without labels.
    """
    from fewstep.classifiers import NetworkClassifier
    from fewstep.evaluation.classification import fresh_classifier

    source = samples_of(data) if isinstance(data, str | Path) else data
    if source.classes is None:
        raise ValueError(f"data '{source.name}' has no labels, which a small set is made from")
    if isinstance(network, str):
        model = fresh_classifier(network, source, seed)
    else:
        model = NetworkClassifier(network, source.shape, source.classes)
    made: Any = distill(model, recipe, source, budget, folder=folder, batch=batch, seed=seed, show=show, **settings)
    return made


def save(model: nn.Module, folder: str | Path, card: dict[str, Any] | None = None) -> Path:
    """Write a fewstep folder (config.json and model.safetensors) that :func:`load` reads."""
    return native.save(model, folder, card)


def compare(
    teacher: Denoiser | str,
    *students: Student | str,
    data: str,
    n: int = 500,
    seed: int = 0,
    extras: Mapping[str, float] | None = None,
) -> Comparison:
    """Teacher and students on the same seeds and features: quality, cost and pictures; ``.save("report.html")``.
    ``extras`` set further inputs of those students that take them."""
    from fewstep.report import compare_models

    models: list[Any] = [load(m) if isinstance(m, str) else m for m in (teacher, *students)]
    return compare_models(models[0], models[1:], data=data, n=n, seed=seed, extras=extras)
