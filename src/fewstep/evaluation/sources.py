"""Which data a model is measured on: those that a small set stands for, where it was made from one."""

from __future__ import annotations

from pathlib import Path

from fewstep.hub import native
from fewstep.hub.places import locate
from fewstep.models.kinds import SAVED


def whole_of(source: str) -> str:
    """The data that the condensed set in a folder was made from; any other source itself.  ValueError for a set that
    does not say it."""
    if not any((Path(source) / place / "config.json").is_file() for place in (".", "model")):
        return source
    folder = locate(source)
    if SAVED[native.kind(folder)].task != "data":
        return source
    told = native.card(folder).get("data")
    named = told.get("source") if isinstance(told, dict) else told
    if named is None:
        raise ValueError(f"'{source}' does not say which data it was made from: name them with --data")
    return whole_of(str(named))
