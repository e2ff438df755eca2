"""Averages kept along a run, and averages of other widths made from them afterwards.

How long to average is hard to know before a run.  EDM2 (Karras et al. 2024, section 3.2) stores two averages of
different width every so often and combines them to any width between (and a little beyond) after the fact.  Here a run
whose settings have at least two :class:`~fewstep.training.ema.Power` averages writes ``snapshots/<step>.safetensors``
eight times, and :func:`reconstruct_model` puts a chosen width into a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.files import save_tensors
from fewstep.schemas import Count, Place, check, parse_json
from fewstep.training.ema import reconstruct

AnyModule = TypeVar("AnyModule", bound=nn.Module)

#: How many snapshots a run writes, at equal parts of its budget.
PER_RUN = 8
COUNTERS = {"step": Count, "updates": Count, "sigma_rel": list[float]}


def due(before: float, after: float) -> bool:
    """Whether a part of the budget ended between two fractions of it."""
    return int(before * PER_RUN) < int(after * PER_RUN)


def write(folder: Path, step: int, updates: int, averages: Mapping[float, Mapping[str, Tensor]]) -> None:
    """Store averages ``sigma_rel -> parameter name -> tensor`` after ``updates`` updates at ``step``."""
    folder.mkdir(exist_ok=True)
    widths = list(averages)
    tensors = {f"{i}/{name}": t for i, width in enumerate(widths) for name, t in averages[width].items()}
    counters = {"step": step, "updates": updates, "sigma_rel": widths}
    save_tensors(folder / f"{step:09d}.safetensors", tensors, {"counters": json.dumps(counters)})


def forget_after(folder: Path, step: int) -> None:
    """Delete the snapshots that a resumed run will write again, perhaps at other steps."""
    for path in folder.glob("[0-9]*.safetensors"):
        if int(path.stem) > step:
            path.unlink()


def read(folder: Path) -> list[tuple[int, float, dict[str, Tensor]]]:
    """``(updates, sigma_rel, parameters)`` of every average in a run folder or its ``snapshots/``.

    FileNotFoundError when there is none, ValueError naming a damaged file.
    """
    place = folder / "snapshots" if (folder / "snapshots").is_dir() else folder
    found: list[tuple[int, float, dict[str, Tensor]]] = []
    for path in sorted(place.glob("[0-9]*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                counters = check(parse_json((file.metadata() or {})["counters"], path), COUNTERS, Place(path))
                names = list(file.keys())
                for i, width in enumerate(counters["sigma_rel"]):
                    mine = [n for n in names if n.startswith(f"{i}/")]
                    tensors = {n.removeprefix(f"{i}/"): file.get_tensor(n) for n in mine}
                    found.append((counters["updates"], width, tensors))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: damaged snapshot ({error}); delete it to use the others") from None
    if not found:
        raise FileNotFoundError(
            f"{folder}: no snapshots of averages; train with at least two Power averages in Settings.averages, "
            "for example (Power(0.05), Power(0.1))"
        )
    return found


@torch.no_grad()
def reconstruct_model(model: AnyModule, folder: Path, sigma_rel: float, updates: int | None = None) -> AnyModule:
    """Put the average of width ``sigma_rel`` into ``model``, in place, and return it.

    ``folder`` is the run folder that ``model`` (its student or teacher) came from; ``updates`` is the moment at which
    the average ends (default: the last snapshot).  Widths between the stored ones are accurate; far outside them the
    error grows.  Parameters that the run did not average stay as they are.  ValueError when the names do not fit.
    """
    snapshots = read(folder)
    names = list(snapshots[0][2])
    own = dict(model.named_parameters())
    for name in names:
        if name not in own or own[name].shape != snapshots[0][2][name].shape:
            raise ValueError(f"{folder}: the snapshots hold parameter '{name}', which does not fit this model")
    end = max(s[0] for s in snapshots) if updates is None else updates
    columns: Sequence[tuple[int, float, list[Tensor]]] = [(n, w, [t[k] for k in names]) for n, w, t in snapshots]
    for name, tensor in zip(names, reconstruct(columns, end, sigma_rel), strict=True):
        own[name].copy_(tensor)
    return model
