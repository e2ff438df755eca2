"""What a diffusers folder may hold, checked before diffusers opens it.

diffusers and transformers do what the files of a folder say: which library a class comes from, which files hold the
weights, what an adapter belongs to.  A folder that would have code run, a pickle opened or a host asked is refused
here, and configs are checked against the annotations of the classes that they are for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from operator import or_
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from fewstep.files import Map, Maybe, Place, Range, check, read_json
from fewstep.hub.requires import require

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
#: The JSON files that say what a component is, and what else they may not say.
CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
ELSEWHERE = {"auto_map": "code, which would be run", "transformers_weights": "other weights than those of the folder"}
INDEX = {"metadata": Maybe(dict), "weight_map": Map(r"[^\0]+", "the name of a tensor", str)}
#: A scheduler's table is no longer than this, a network's layer no wider than that.
MOST_STEPS, WIDEST = 100_000, 2**31 - 1


def check_pipeline(folder: Path) -> dict[str, None]:
    """One clear line for what is no pipeline, is damaged, or would run code, open a pickle or ask a host.

    Gives the components that the folder was written without, which diffusers wants to be told of.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        if (folder / "config.json").is_file():
            raise ValueError(f"{folder}: a bare model, no model_index.json; read it with load_model(path, scheduler)")
        raise FileNotFoundError(f"{folder}: no diffusers pipeline here (model_index.json is missing)")
    index = check(read_json(path), dict, Place(path))
    for name, value in index.items():
        if isinstance(value, list) and value and isinstance(value[0], str):
            refuse_code(folder if name == "_class_name" else folder / name, value[0])
    diffusers = require("diffusers", "reading diffusers pipelines")
    place = Place(path, "_class_name")
    pipeline = named_class(diffusers, index.get("_class_name"), place)
    if not issubclass(pipeline, diffusers.DiffusionPipeline) or pipeline._load_connected_pipes:
        raise place.wrong(index["_class_name"], "a pipeline that needs no other one")
    absent: dict[str, None] = {}
    for name in inspect.signature(pipeline.__init__).parameters:
        value = index.get(name)
        if value == [None, None]:
            absent[name] = None
        elif isinstance(value, list):
            place = Place(path, name)
            library, kind = check(value, tuple[str, str], place)
            check_component(folder / name, named_class(library_of(library, place), kind, place))
    return absent


def refuse_code(folder: Path, module: str) -> None:
    """ValueError when a folder brings the module that its index names."""
    code = folder / f"{module}.py"
    if code.name == f"{module}.py" and code.is_file():
        raise ValueError(f"{code}: a pipeline with code of its own is not read, because that code would be run")


def library_of(name: str, place: Place) -> ModuleType:
    """What a component's class may come from: diffusers, its pipelines, transformers, our own schedulers."""
    purpose = "reading diffusers pipelines"
    pipelines = require("diffusers.pipelines", purpose)
    if name in ("diffusers", "transformers", "fewstep.hub.solver_scheduler"):
        return require(name, purpose)
    if name in pipelines._import_structure:
        return require(f"diffusers.pipelines.{name}", purpose)
    raise place.wrong(name, "diffusers, transformers or a part of diffusers.pipelines")


def named_class(library: ModuleType, name: Any, place: Place) -> Any:
    """A public class of a library; ValueError when there is none of that name."""
    if isinstance(name, str) and name.isidentifier() and not name.startswith("_"):
        found = getattr(library, name, None)
        if isinstance(found, type):
            return found
    raise place.wrong(name, f"the name of a class of {library.__name__}")


def check_component(folder: Path, cls: Any) -> None:
    """One line for a component that is missing, damaged, or belongs to something that is not in its folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, and model_index.json names it")
    for name in CONFIGS:
        if (folder / name).is_file():
            config = check(read_json(folder / name), dict, Place(folder / name))
            for key, what in ELSEWHERE.items():
                if key in config:
                    raise ValueError(f"{folder / name}: '{key}' names {what}; take it out")
            check_config(config, cls, Place(folder / name))
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: an adapter (adapter_config.json) of a model that is elsewhere; merge it first")
    check_weights(folder)


def check_weights(folder: Path) -> None:
    """ValueError when the weights that would be read are pickled, or an index names anything but safetensors files in
    this folder."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        for tensor, shard in read_json(index, INDEX)["weight_map"].items():
            if not shard.endswith(".safetensors") or "/" in shard or not (folder / shard).is_file():
                raise Place(index, f"weight_map.{tensor}").wrong(shard, "a .safetensors file beside it")
    pickled = [file for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
    if pickled and not any((folder / f"{name}{end}").exists() for name in WEIGHTS for end in ("", ".index.json")):
        raise ValueError(f"{pickled[0]}: pickled weights are never read; convert them to safetensors first")


def check_config(config: dict[str, Any], cls: Any, place: Place) -> dict[str, Any]:
    """The config of a diffusers class when each value is of a kind that the class's annotations name.

    They say more about kinds than about shapes: a list is let pass for a number, and null for anything.  What the class
    does not take, other versions and libraries may.
    """
    diffusers = require("diffusers", "reading diffusers models")
    if not issubclass(cls, diffusers.ConfigMixin):
        return config
    most = MOST_STEPS if issubclass(cls, diffusers.SchedulerMixin) else WIDEST
    for name, hint in get_type_hints(cls.__init__).items():
        if name in config:
            check(config[name], loosely(hint, most), place.inside(name))
    return config


def loosely(hint: Any, most: int) -> Any:
    """The schema of values, and lists of values, of the kinds in an annotation."""
    number, real = Annotated[int, Range(-most, most)], Annotated[float, Range(-float("inf"), float("inf"))]
    known: dict[Any, Any] = {bool: bool, int: number, float: real, str: str}
    kinds = tuple(known[kind] for kind in known if kind in leaves(hint))
    if not kinds:
        return Any
    leaf: Any = reduce(or_, (*kinds, None))
    return leaf | list[leaf] | list[list[leaf]]


def leaves(hint: Any) -> set[Any]:
    """The plain types in an annotation."""
    if get_origin(hint) is None:
        return {hint}
    return {kind for part in get_args(hint) for kind in (leaves(part) if not isinstance(part, str) else {str})}


@contextmanager
def offline(local_only: bool = True) -> Iterator[None]:
    """Whatever the files inside name, no host is asked for it (unless ``local_only`` is false).

    transformers and diffusers hand no ``local_files_only`` down to a pipeline's parts; they all go through
    huggingface_hub, which has one switch for the whole process.
    """
    constants: Any = require("huggingface_hub.constants", "reading diffusers pipelines")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = local_only or before
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
