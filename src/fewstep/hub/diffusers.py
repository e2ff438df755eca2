"""Diffusers pipelines as denoisers: read from a folder, from the hub's local cache, or from memory.

Only safetensors weights are read: nothing is unpickled, and no code of a repository is run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import grids
from fewstep.denoisers import Clipped, Denoiser, NetworkDenoiser
from fewstep.hub import autoencoders
from fewstep.hub.adapters import ADAPTERS, BESIDE, Adapter, Origin, TextAdapter, adapt
from fewstep.hub.exporting import Exported, export, export_with_code
from fewstep.hub.requires import require
from fewstep.hub.schedulers import Reading, read_scheduler
from fewstep.randomness import Rng
from fewstep.schedules import DiscreteVP, FlowMatching

__all__ = [
    "Exported", "LoadedPipeline", "export", "export_with_code", "from_pipeline", "load_model", "load_pipeline", "wrap"
]  # fmt: skip

#: The components of pipelines whose part in the sampling is known: what is sampled, what makes conditions of texts and
#: pictures (which are given as they are), and what looks at finished pictures.
PARTS = frozenset({
    "unet", "transformer", "scheduler", *autoencoders.AUTOENCODERS,
    "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3", "bert",
    "image_encoder", "feature_extractor", "depth_estimator", "low_res_scheduler",
    "safety_checker", "watermarker", "inverse_scheduler",
})  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class LoadedPipeline:
    """A diffusers pipeline, read.

    ``denoiser`` is the network on the schedule it was trained on (in latent space where there is an autoencoder),
    ``reading`` what the scheduler's config said, ``pipe`` the diffusers pipeline itself.
    """

    denoiser: NetworkDenoiser
    reading: Reading
    pipe: Any

    @property
    def clipped(self) -> Denoiser:
        """The denoiser as the pipeline samples from it: data predictions clipped where its scheduler clips them."""
        clip = self.reading.clip
        return self.denoiser if clip is None else Clipped(self.denoiser, -clip, clip)

    def grid(self, steps: int) -> Tensor:
        """The times that few-step sampling should visit: the pipeline's own shift of a uniform grid for flow matching,
        trailing integer times for a table of betas, Karras' levels else."""
        schedule = self.denoiser.schedule
        if isinstance(schedule, DiscreteVP):
            return grids.trailing(schedule, steps)
        if isinstance(schedule, FlowMatching):
            return grids.shifted(schedule, steps, self.reading.shift)
        return grids.karras(schedule, steps)

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """The condition for a list of prompts, from the pipeline's text encoders; ValueError when it has none."""
        net = self.denoiser.net
        if not isinstance(net, TextAdapter) or not net.reads_prompts:
            raise ValueError(f"{type(self.pipe).__name__}: this pipeline has no text encoder to embed prompts with")
        with torch.no_grad():
            return net.embed(prompts)

    @torch.no_grad()
    def encode(self, images: Tensor, rng: Rng | None = None) -> Tensor:
        """Pictures ``[B, C, H, W]`` in [-1, 1] as the latents that the denoiser works on (themselves for a pixel
        model): the mean of the autoencoder's law, or a draw from it when ``rng`` is given."""
        return autoencoders.encode(self.pipe, images, rng)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [-1, 1] (not clipped) from latents."""
        return autoencoders.decode(self.pipe, latents)


def load_pipeline(
    path_or_id: str | Path,
    local_only: bool = True,
    *,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoadedPipeline:
    """Read a diffusers pipeline from a folder or, by its hub id, from the local cache.

    ``local_only=False`` lets diffusers download what is missing.  ``size`` is the height and width of the pictures in
    pixels (default: the network's own size).  Raises FileNotFoundError when there is no such folder or cached pipeline,
    ValueError for pickled weights, unknown network or scheduler classes, pipelines with parts that fewstep does not
    know, and sizes that the network cannot make.
    """
    return from_pipeline(open_pipeline(path_or_id, local_only, dtype), size=size)


def open_pipeline(path_or_id: str | Path, local_only: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """The diffusers pipeline in a folder or in the local cache, as :func:`load_pipeline` finds it."""
    diffusers = require("diffusers", "reading diffusers pipelines")
    folder = Path(path_or_id)
    absent: dict[str, None] = {}
    if folder.is_dir():
        absent = _check_folder(folder)
    elif folder.is_absolute() or str(path_or_id).startswith(".") or str(path_or_id).count("/") != 1:
        raise FileNotFoundError(f"{path_or_id}: no such folder (a hub id has the form owner/name)")
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(path_or_id), use_safetensors=True, local_files_only=local_only, **absent
        )
    except OSError as error:
        if folder.is_dir():
            raise ValueError(f"{folder}: {_first_line(error)}") from None
        hint = "; pass local_only=False to download it" if local_only else ""
        raise FileNotFoundError(f"{path_or_id}: not in the local hub cache{hint} ({_first_line(error)})") from None
    # not an argument above: its name differs between versions of diffusers
    return pipe.to(dtype)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_folder(folder: Path) -> dict[str, None]:
    """One clear line for what would fail later: no pipeline here, code to run, or weights that only a pickle holds.

    Gives the components that the folder was written without, which diffusers wants to be told of.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        if (folder / "config.json").is_file():
            raise ValueError(f"{folder}: a bare model, no model_index.json; read it with load_model(path, scheduler)")
        raise FileNotFoundError(f"{folder}: no diffusers pipeline here (model_index.json is missing)")
    try:
        components = json.loads(index.read_text())
    except ValueError as error:
        raise ValueError(f"{index}: not valid JSON ({error})") from None
    for name, value in components.items():
        if isinstance(value, list):
            code = folder / ("." if name == "_class_name" else name) / f"{value[0]}.py"
            if code.is_file():
                raise ValueError(f"{code}: a pipeline with code of its own is not read, because that code would be run")
        refuse_pickles(folder / name)
    return {name: None for name, value in components.items() if value == [None, None]}


def refuse_pickles(folder: Path) -> None:
    """ValueError when the weights in ``folder`` are pickled, with no safetensors file beside them."""
    files = list(folder.glob("*")) if folder.is_dir() else []
    pickled = [file for file in files if file.suffix in PICKLES]
    if pickled and not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"{pickled[0]}: pickled weights are never read; convert them to safetensors first")


def from_pipeline(pipe: Any, *, size: tuple[int, int] | None = None) -> LoadedPipeline:
    """A diffusers pipeline that is in memory already, read; its network is shared, not copied.

    ``size`` is the height and width of the pictures in pixels.
    """
    scale = autoencoders.pixels_per_latent(pipe)
    net = network_in(pipe, None if size is None else (size[0] // scale, size[1] // scale))
    if size is not None:
        net.sides(size)  # refuses what the division above rounded
    reading = read_scheduler(pipe.scheduler)
    return LoadedPipeline(_denoiser(net, reading), reading, pipe)


def network_in(pipe: Any, size: tuple[int, int] | None = None) -> Adapter:
    """The network of a pipeline; ``size`` is that of its samples.

    ValueError when the pipeline does with it what fewstep does not know, or feeds it what nobody could give.
    """
    kind = type(pipe).__name__
    name = next((n for n in ("unet", "transformer") if pipe.components.get(n) is not None), None)
    if name is None:
        raise ValueError(f"{kind}: no unet or transformer among its components")
    unknown = [part for part, value in pipe.components.items() if value is not None and part not in PARTS]
    if unknown:
        raise ValueError(
            f"{kind}: its component '{unknown[0]}' takes part in the sampling, which fewstep does not know; "
            f"wrap(pipe.{name}, pipe.scheduler) reads the network alone"
        )
    net = adapt(pipe.components[name], Origin(pipe, name), size)
    if net.takes < net.channels or net.gives < net.channels:
        raise ValueError(
            f"{kind}: its {name} takes {net.takes} and gives {net.gives} channels, its latents have {net.channels}"
        )
    if net.takes > net.channels and kind not in BESIDE:
        raise ValueError(
            f"{kind}: its {name} takes {net.takes} channels for samples of {net.channels}; fewstep does not know what "
            "this pipeline puts into the others"
        )
    if isinstance(net, TextAdapter) and net.reads_prompts:
        with torch.no_grad():
            net.set_null(net.embed_null())
    return net


def load_model(
    path: str | Path, scheduler: Any, *, size: tuple[int, int] | None = None, dtype: torch.dtype = torch.float32
) -> NetworkDenoiser:
    """A bare diffusers model (a folder with ``config.json`` and safetensors weights) as a denoiser.

    ``scheduler`` is a diffusers scheduler object: it says which noise schedule and prediction the model belongs to.
    """
    diffusers = require("diffusers", "reading diffusers models")
    config = Path(path) / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{path}: no diffusers model here (config.json is missing)")
    refuse_pickles(Path(path))
    name = json.loads(config.read_text()).get("_class_name")
    if name not in ADAPTERS:
        raise ValueError(f"{config}: model class '{name}' is unknown; fewstep reads {', '.join(ADAPTERS)}")
    model_class = attrgetter(name)(diffusers)
    model = model_class.from_pretrained(str(path), use_safetensors=True, local_files_only=True)
    return wrap(model.to(dtype), scheduler, size=size)


def wrap(model: Any, scheduler: Any, *, size: tuple[int, int] | None = None) -> NetworkDenoiser:
    """A diffusers model in memory as a denoiser, on the schedule of a diffusers scheduler object."""
    return _denoiser(adapt(model, size=size), read_scheduler(scheduler))


def _denoiser(net: Adapter, reading: Reading) -> NetworkDenoiser:
    shape = (net.channels, *net.size)
    return NetworkDenoiser(net, reading.schedule, reading.prediction, shape, net.classes).eval()
