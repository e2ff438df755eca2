"""Distillation: the methods, each a short file that reads like its paper.

``RECIPES`` maps the names that the command line knows to classes (import path ``module:class``, imported on demand, so
that the names are known without torch).
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.distill.method import Recipe

RECIPES: dict[str, str] = {
    "denoising": "fewstep.distill.denoising:Denoising",
    "flow-matching": "fewstep.distill.denoising:FlowMatchingTraining",
    "discrete-denoising": "fewstep.distill.discrete_denoising:DiscreteDenoising",
    "score-entropy": "fewstep.distill.discrete_denoising:ScoreEntropy",
    "lsd": "fewstep.distill.lsd:LSD",
    "lsd-plus": "fewstep.distill.lsd:LSDPlus",
    "lowdiff": "fewstep.distill.lowdiff:LowDiff",
    "analog-bits": "fewstep.distill.analog_bits:AnalogBits",
    "cm": "fewstep.distill.consistency.cm:ConsistencyDistillation",
    "cm-training": "fewstep.distill.consistency.cm:ConsistencyTraining",
    "scm": "fewstep.distill.consistency.scm:ContinuousConsistencyDistillation",
    "scm-training": "fewstep.distill.consistency.scm:ContinuousConsistencyTraining",
    "dmd2": "fewstep.distill.matching.dmd2:DMD2",
    "reflow": "fewstep.distill.flow_map.rectified_flow:Reflow",
    "instaflow": "fewstep.distill.flow_map.rectified_flow:InstaFlow",
    "pd": "fewstep.distill.flow_map.progressive:ProgressiveLadder",
    "pd-halving": "fewstep.distill.flow_map.progressive:ProgressiveDistillation",
}


def recipe_class(name: str) -> type[Recipe]:
    """The class behind a name; ValueError naming the choices when there is none."""
    if name not in RECIPES:
        raise ValueError(f"method '{name}' is unknown; choose from {', '.join(RECIPES)}")
    module, _, attribute = RECIPES[name].partition(":")
    return getattr(import_module(module), attribute)


class _Callable(ModuleType):
    """``fs.distill(...)`` is :func:`fewstep.api.distill`: importing a sub-package binds its name in the package, where
    it would hide the function of the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return import_module("fewstep.api").distill(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

__all__ = ["RECIPES", "recipe_class"]
