"""Students as folders that plain diffusers opens, without fewstep.

Two ways, chosen by comparing numbers (:mod:`fewstep.hub.tables`), never by guessing:

* *plain*: the network is a diffusers model, and one of diffusers' own schedulers makes the calls of every plan with
  the plan's own coefficients.  The folder holds weights and configs only.
* *with code*: everything else.  The folder also holds :mod:`fewstep.hub.student_scheduler` (a table of numbers), for
  pictures without text :mod:`fewstep.hub.student_pipeline`, for pipelines that start from unit noise where the student
  does not a subclass of five lines, and for our own networks their source, made self-contained.  Diffusers runs such
  files after ``trust_remote_code=True`` only.

A README in the folder says how to call it: the numbers of steps that there are plans for, and the arguments.
:mod:`fewstep.hub.export_ways` chooses the way, :mod:`fewstep.hub.export_files` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from torch import nn

from fewstep.hub.export_files import Exported, write
from fewstep.hub.export_ways import way_for, way_with_code

__all__ = ["Exported", "export", "export_with_code", "foretold"]


def export(model: nn.Module, folder: str | Path, *, extras: Mapping[str, float] = MappingProxyType({})) -> Exported:
    """Write ``model`` to a new folder that ``diffusers.DiffusionPipeline.from_pretrained`` opens.

    A denoiser that came from a pipeline goes back into it with the pipeline's own scheduler; any other denoiser is
    exported with deterministic plans of 10, 20 and 50 steps.  Plain where a scheduler of diffusers has the plans'
    coefficients (and its start is within 1% of the student's), else with code.

    Further inputs of a student are constant: those that its plans set, and those in ``extras``.  The guidance weight
    that a network of diffusers takes follows the pipeline's ``guidance_scale``, and ``extras`` say what the card calls
    it with.

    Raises FileExistsError when ``folder`` is not empty, ValueError when the model has no place in diffusers, and for a
    further input that nothing sets.
    """
    target = new_folder(folder)
    return write(way_for(model, extras), model, target)


def export_with_code(
    model: nn.Module, folder: str | Path, *, extras: Mapping[str, float] = MappingProxyType({})
) -> Exported:
    """Like :func:`export`, always with the student's own scheduler: the same pictures from the same noise, the start
    included."""
    target = new_folder(folder)
    return write(way_with_code(model, extras), model, target)


def foretold(model: nn.Module) -> str:
    """What :func:`export` would write, on one line; ValueError saying why when it could not write the model."""
    way = way_for(model)
    kind = "with code" if way.code else "plain"
    return f"{kind}, a {way.pipeline_name} with {type(way.scheduler).__name__}"


def new_folder(folder: str | Path) -> Path:
    """The path of a folder that is new or empty; FileExistsError when there is something in it."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: not an empty folder; choose a new one or remove it first")
    return folder
