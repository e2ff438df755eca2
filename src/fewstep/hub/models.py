"""Models by name: those that ship with the package, and folders of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.hub import native

BUNDLED = Path(__file__).parents[1] / "assets" / "models"


def bundled_models() -> list[str]:
    """The names of the models that ship with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def locate(name: str | Path) -> Path:
    """The folder that holds a model: a bundled one, a fewstep or diffusers folder, or the model of a run folder.

    Raises FileNotFoundError when there is none.
    """
    folder = BUNDLED / str(name)
    if not (folder / "config.json").is_file():
        folder = Path(name)
    for place in (folder / "model", folder):
        if (place / "config.json").is_file() or (place / "model_index.json").is_file():
            return place
    if (folder / "recipe.json").is_file():
        raise FileNotFoundError(f"{folder}: this run has no model yet; the command that started it finishes it")
    raise FileNotFoundError(
        f"model '{name}': neither a bundled model ({', '.join(bundled_models())}) nor a folder with config.json or "
        "model_index.json"
    )


def load(name: str | Path) -> Any:
    """A model: a bundled name ("digits", "fashion", "fashion-1step"), a fewstep folder (or a run folder, whose model
    is taken), or a folder with a diffusers pipeline.  Nothing is downloaded.

    Returns a :class:`~fewstep.denoisers.Denoiser` or a :class:`~fewstep.sampling.Student`.  Raises FileNotFoundError
    or ValueError naming what is wrong.
    """
    folder = locate(name)
    if (folder / "config.json").is_file():
        return native.load(folder)
    from fewstep.hub.diffusers import load_pipeline

    return load_pipeline(folder).denoiser
