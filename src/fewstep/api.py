"""The few functions most users need: load, train, distill, compare, save."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.data import Samples, Streamed
from fewstep.data import load as load_data
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
from fewstep.sampling.rollout import Student
from fewstep.training.budget import Budget
from fewstep.training.stages import run_recipe
from fewstep.training.trainer import Settings

if TYPE_CHECKING:
    from fewstep.report import Comparison


def _data(data: str | Path | Samples | Items, teacher: Denoiser) -> Samples:
    if isinstance(data, str | Path):
        return load_data(data)
    if isinstance(data, Samples):
        return data
    items = Streamed(data, type(data).__name__, classes=teacher.classes)
    return Unlabelled(items) if items.labelled and teacher.classes is None and teacher.null is None else items


def distill(
    teacher: Denoiser | str,
    recipe: Recipe,
    data: str | Path | Samples | Items,
    budget: str | Budget = "2min",
    *,
    folder: str | Path | None = None,
    batch: int = 64,
    seed: int = 0,
    show: bool = True,
    **settings: Any,
) -> Student | Denoiser:
    """Train ``recipe`` from ``teacher`` and give back what it made.

    ``budget`` is steps, images or time ("500steps", "20k images", "2min"); with a ``folder`` the run is recorded there
    and the same call resumes it.  ``settings`` are further fields of :class:`~fewstep.training.trainer.Settings`.
    """
    model: Any = load(teacher) if isinstance(teacher, str) else teacher
    amount = Budget.parse(budget) if isinstance(budget, str) else budget
    chosen = Settings(budget=amount, batch=batch, seed=seed, **settings)
    place = None if folder is None else Path(folder)
    return run_recipe(recipe, model, _data(data, model), chosen, place, show=show).model


def save(model: Student | Denoiser, folder: str | Path, card: dict[str, Any] | None = None) -> Path:
    """Write a fewstep folder (config.json and model.safetensors) that :func:`load` reads."""
    return native.save(model, folder, card)


def compare(teacher: Denoiser | str, *students: Student | str, data: str, n: int = 500, seed: int = 0) -> Comparison:
    """Teacher and students on the same seeds and features: quality, cost and pictures; ``.save("report.html")``."""
    from fewstep.report import compare_models

    models: list[Any] = [load(m) if isinstance(m, str) else m for m in (teacher, *students)]
    return compare_models(models[0], models[1:], data=data, n=n, seed=seed)
