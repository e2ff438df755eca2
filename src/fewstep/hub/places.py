"""Where models lie: those that ship with the package, and folders of any kind."""

from __future__ import annotations

from pathlib import Path

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
    check_buildable(folder)
    if (folder / "recipe.json").is_file():
        raise FileNotFoundError(f"{folder}: this run has no model yet; the command that started it finishes it")
    raise FileNotFoundError(
        f"model '{name}': neither a bundled model ({', '.join(bundled_models())}) nor a folder with config.json or "
        "model_index.json"
    )


def check_buildable(folder: Path) -> None:
    """FileNotFoundError for a run whose model is weights alone, because its network is its user's own."""
    if (folder / "model" / "model.safetensors").is_file() and not (folder / "model" / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: its network is not one of fewstep's, so that model/model.safetensors holds weights alone: "
            "build the network yourself and load them with load_state_dict"
        )


def lasting_name(folder: Path) -> str:
    """What a file says to find a model folder again: the name of a bundled one, the whole path of another."""
    whole = folder.resolve()
    return whole.name if whole.parent == BUNDLED.resolve() else str(whole)
