"""Optional packages, imported when they are needed and named when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(name: str, purpose: str) -> ModuleType:
    """The module ``name``; ModuleNotFoundError with the extra to install when the package is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # a package that is there but fails on one of its own imports must not be reported as missing
        if error.name != name.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"{purpose} needs {name.partition('.')[0]}: pip install 'fewstep[hub]'", name=error.name
        ) from None
