"""Pages of runs whose product makes no samples: a picture that a person understands, by the name of the recipe.

A system's pictures are a function ``figures(course, model, data)`` in a module of this package; its line in
:data:`FIGURES` is all that the page asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from fewstep.data import Samples
from fewstep.report.runs import RunCourse
from fewstep.report.tasks.figure import Figure

#: Recipe -> the module with its pictures.
FIGURES: dict[str, str] = {
    **dict.fromkeys(("supervised", "soft-supervised", "kd"), "fewstep.report.tasks.supervised"),
    "pca": "fewstep.report.tasks.pca",
    "dq": "fewstep.report.tasks.dq",
    "cv-dd": "fewstep.report.tasks.cv_dd",
    "distill-spec": "fewstep.report.tasks.distill_spec",
    "redi": "fewstep.report.tasks.redi",
    "ast": "fewstep.report.tasks.ast",
    "rad": "fewstep.report.tasks.rad",
    "diswot": "fewstep.report.tasks.diswot",
}

Draw = Callable[[RunCourse, Any, Samples], Sequence[Figure]]


def figures_of(course: RunCourse, model: Any, data: Samples) -> Sequence[Figure]:
    """The pictures of a run; none for a recipe that has none of its own."""
    if course.recipe not in FIGURES:
        return ()
    draw: Draw = import_module(FIGURES[course.recipe]).figures
    return draw(course, model, data)


__all__ = ["FIGURES", "Figure", "figures_of"]
