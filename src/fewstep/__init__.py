"""fewstep: generative models in a handful of network calls.

>>> import fewstep as fs
>>> teacher = fs.load("digits")
>>> student = fs.distill(teacher, fs.DMD2(steps=1), data="digits", budget="2min")
>>> images = student.sample(64)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fewstep.methods import RECIPES

__version__ = "0.1.0"

#: What the package offers at top level, imported when first asked for: ``import fewstep`` itself is instant.
_EXPORTS = {
    "load": "fewstep.api",
    "distill": "fewstep.api",
    "condense_data": "fewstep.api",
    "compare": "fewstep.api",
    "save": "fewstep.api",
    "pictures": "fewstep.api",
    "sample": "fewstep.sampling",
    "solver_for": "fewstep.sampling.search",
    "load_settings": "fewstep.hub.settings",
    "LowRank": "fewstep.networks.lora",
    "Student": "fewstep.sampling",
    "Plan": "fewstep.sampling",
    **{place.partition(":")[2]: place.partition(":")[0] for place in RECIPES.values()},
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fewstep' has no attribute '{name}'")
    return getattr(import_module(_EXPORTS[name]), name)


if TYPE_CHECKING:
    from fewstep.api import compare as compare
    from fewstep.api import condense_data as condense_data
    from fewstep.api import distill as distill
    from fewstep.api import load as load
    from fewstep.api import pictures as pictures
    from fewstep.api import save as save
    from fewstep.hub.settings import load_settings as load_settings
    from fewstep.networks.lora import LowRank as LowRank
    from fewstep.sampling import Plan as Plan
    from fewstep.sampling import Student as Student
    from fewstep.sampling.sample import sample as sample
    from fewstep.sampling.search import solver_for as solver_for
