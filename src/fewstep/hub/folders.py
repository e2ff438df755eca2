"""What a diffusers folder may hold, checked before diffusers opens it.

diffusers and transformers do what the files of a folder say: which library a class comes from, which files hold the
weights, what an adapter belongs to.  A folder that would have code run, a pickle opened or a host asked is refused
here, and configs are checked against the annotations of the classes that they are for.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from operator import or_
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from numpy import ndarray

from fewstep.files import headers
from fewstep.hub.requires import require
from fewstep.schemas import Map, Maybe, Place, Range, check, read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
#: The JSON files that say what a component is, and what else they may not say.
CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
ELSEWHERE = {"auto_map": "code, which would be run", "transformers_weights": "other weights than those of the folder"}
INDEX = {"metadata": Maybe(dict), "weight_map": Map(r"[^\0]+", "the name of a tensor", str)}
#: A scheduler's table is no longer than this, a network's layer no wider than that.
MOST_STEPS, WIDEST = 100_000, 2**31 - 1
#: What schedulers take without a word and cannot mean.
POSITIVE = Annotated[float, Range(1e-9)]
SETTINGS: dict[str, Any] = {
    "clip_sample_range": POSITIVE,
    "sample_max_value": POSITIVE,
    "dynamic_thresholding_ratio": Annotated[float, Range(0, 1)],
    "timestep_spacing": Literal["linspace", "leading", "trailing"],
}
#: CLIP reads 77 tokens.
LONGEST = Annotated[int, Range(1, 1000)]


def check_pipeline(folder: Path) -> dict[str, Any]:
    """One clear line for what is no pipeline, is damaged, or would run code, open a pickle or ask a host.

    Gives the classes of its components by name, None for those that the folder was written without.
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
    classes: dict[str, Any] = {}
    for name in inspect.signature(pipeline.__init__).parameters:
        value = index.get(name)
        if value == [None, None]:
            classes[name] = None
        elif isinstance(value, list):
            place = Place(path, name)
            library, kind = check(value, tuple[str, str], place)
            classes[name] = named_class(library_of(library, place), kind, place)
            check_component(folder / name, classes[name])
    return classes


def refuse_code(folder: Path, module: str) -> None:
    """ValueError when a folder brings the module that its index names."""
    code = folder / f"{module}.py"
    if code.name == f"{module}.py" and code.is_file():
        raise ValueError(f"{code}: a pipeline with code of its own is not read, because that code would be run")


def refuse_elsewhere(folder: Path, more: Mapping[str, str] | None = None) -> None:
    """ValueError when a config of a folder names what lies elsewhere (:data:`ELSEWHERE`, and what is in ``more``)."""
    for name in CONFIGS:
        path = folder / name
        config = check(read_json(path), dict, Place(path)) if path.is_file() else {}
        for key, what in {**ELSEWHERE, **(more or {})}.items():
            if key in config:
                raise ValueError(f"{path}: '{key}' names {what}; take it out")


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
    quantised = False
    for name in CONFIGS:
        if (folder / name).is_file():
            config = check(read_json(folder / name), dict, Place(folder / name))
            for key, what in ELSEWHERE.items():
                if key in config:
                    raise ValueError(f"{folder / name}: '{key}' names {what}; take it out")
            check_config(config, cls, Place(folder / name))
            quantised |= "quantization_config" in config
            if cls.__name__.startswith("CLIPTokenizer") and "model_max_length" in config:  # prompts are padded to it
                check(config["model_max_length"], LONGEST, Place(folder / name, "model_max_length"))
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: an adapter (adapter_config.json) of a model that is elsewhere; merge it first")
    check_weights(folder, quantised)


def check_weights(folder: Path, quantised: bool) -> None:
    """ValueError when the weights that would be read are pickled or no floating-point numbers, or an index names
    anything but safetensors files in this folder."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        for tensor, shard in read_json(index, INDEX)["weight_map"].items():
            if not shard.endswith(".safetensors") or "/" in shard or not (folder / shard).is_file():
                raise Place(index, f"weight_map.{tensor}").wrong(shard, "a .safetensors file beside it")
    pickled = [file for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
    if pickled and not any((folder / f"{name}{end}").exists() for name in WEIGHTS for end in ("", ".index.json")):
        raise ValueError(f"{pickled[0]}: pickled weights are never read; convert them to safetensors first")
    for file in sorted(folder.glob("*.safetensors")):
        for name, header in headers(file).items():
            if name.endswith((".weight", ".bias")) and not (header.floating or quantised):
                raise ValueError(
                    f"{file}: tensor '{name}' is of type {header.dtype}, weights are floating-point numbers"
                )


def check_config(config: dict[str, Any], cls: Any, place: Place) -> dict[str, Any]:
    """The config of a diffusers class when each value is of a kind that the class's annotations name.

    What the class does not take, other versions and libraries may.  Texts and switches may be null, as in many configs.
    """
    diffusers = require("diffusers", "reading diffusers models")
    if not issubclass(cls, diffusers.ConfigMixin):
        return config
    scheduler = issubclass(cls, diffusers.SchedulerMixin)
    most = MOST_STEPS if scheduler else WIDEST
    name = check(config.get("_class_name", cls.__name__), str, place.inside("_class_name"))
    if name != cls.__name__ and not hasattr(diffusers, name.removeprefix("Flax")):
        raise place.inside("_class_name").wrong(name, f"{cls.__name__}, or another class of diffusers")
    defaults = inspect.signature(cls.__init__).parameters
    if scheduler and not config.keys() & defaults.keys():
        raise ValueError(f"{place.file}: it holds no setting of {cls.__name__}, such as {list(defaults)[1]}")
    for name, hint in get_type_hints(cls.__init__).items():
        if name in config and not (config[name] is None and defaults[name].default is None):
            check(config[name], loosely(hint, most), place.inside(name))
            if isinstance(config[name], float) and not (scheduler or math.isfinite(config[name])):
                raise place.inside(name).wrong(config[name], "finite")
    for name, schema in (SETTINGS if scheduler else {}).items():
        if config.get(name) is not None:
            check(config[name], schema, place.inside(name))
    return config


def loosely(hint: Any, most: int) -> Any:
    """The schema of an annotation: lists of any length for tuples, whole numbers up to ``most``, and anything for what
    JSON has no word for."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return reduce(or_, (loosely(member, most) for member in members if member is not ndarray))
    if origin in (list, tuple):
        element: Any = reduce(or_, (loosely(member, most) for member in members if member is not Ellipsis))
        return list[element]
    if origin is Literal:
        return str | None
    known: dict[Any, Any] = {
        bool: bool | None, int: Annotated[int, Range(0, most)], float: Annotated[float, Range(-math.inf, math.inf)],
        str: str | None, NoneType: None, list: list, tuple: list, dict: dict,
    }  # fmt: skip
    return known.get(hint, Any)


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
