"""The way in and out: fewstep's own folders, diffusers pipelines, LoRA weights.

Importing this package imports none of diffusers, peft or transformers; they are needed when a function is called.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Exported": "exporting",
    "LoadedPipeline": "diffusers",
    "SolverScheduler": "solver_scheduler",
    "as_assistant": "language",
    "as_scheduler": "drop_in",
    "export": "exporting",
    "export_with_code": "exporting",
    "from_pipeline": "diffusers",
    "load_language_model": "language",
    "load_model": "diffusers",
    "load_pipeline": "diffusers",
    "save_language_model": "language",
    "wrap": "diffusers",
    "wrap_language_model": "language",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fewstep.hub' has no attribute '{name}'")
    return vars(importlib.import_module(f"fewstep.hub.{_WHERE[name]}"))[name]
