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
from fewstep.hub.adapters import ADAPTERS, Adapter, Origin, TextAdapter, adapt
from fewstep.hub.exporting import Exported, export, export_with_code
from fewstep.hub.requires import require
from fewstep.hub.schedulers import Reading, read_scheduler
from fewstep.randomness import Rng
from fewstep.schedules import DiscreteVP, FlowMatching

__all__ = [
    "Exported", "LoadedPipeline", "export", "export_with_code", "from_pipeline", "load_model", "load_pipeline", "wrap"
]  # fmt: skip

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
        if not isinstance(net, TextAdapter) or not _has_text_encoder(self.pipe):
            raise ValueError(f"{type(self.pipe).__name__}: this pipeline has no text encoder to embed prompts with")
        with torch.no_grad():
            return net.embed(self.pipe, prompts)

    @torch.no_grad()
    def encode(self, images: Tensor, rng: Rng | None = None) -> Tensor:
        """Pictures ``[B, C, H, W]`` in [-1, 1] as the latents that the denoiser works on (themselves for a pixel
        model): the mean of the autoencoder's law, or a draw from it when ``rng`` is given."""
        vae = self.pipe.components.get("vae")
        if vae is None:
            return images
        coded = vae.encode(images)
        if type(vae).__name__ == "AutoencoderDC":
            return coded.latent * vae.config.scaling_factor
        law = coded.latent_dist
        latents = law.mean if rng is None else law.mean + law.std * rng.normal_like(law.mean)
        mean, scale = _latent_units(vae, latents)
        return (latents - mean) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [-1, 1] (not clipped) from latents."""
        vae = self.pipe.components.get("vae")
        if vae is None:
            return latents
        mean, scale = _latent_units(vae, latents)
        return vae.decode(latents / scale + mean, return_dict=False)[0]


def _latent_units(vae: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """``(mean, scale)``: the denoiser's latents are ``(autoencoder's latents - mean) scale``."""
    config = vae.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (torch.tensor(v).to(latents)[:, None, None] for v in (config.latents_mean, config.latents_std))
        return mean, config.scaling_factor / std
    return config.get("shift_factor") or 0.0, config.scaling_factor


def _has_text_encoder(pipe: Any) -> bool:
    return pipe.components.get("text_encoder") is not None and pipe.components.get("tokenizer") is not None


def load_pipeline(
    path_or_id: str | Path,
    local_only: bool = True,
    *,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoadedPipeline:
    """Read a diffusers pipeline from a folder or, by its hub id, from the local cache.

    ``local_only=False`` lets diffusers download what is missing.  ``size`` is the height and width of one sample (in
    latents), for networks whose config names none or for another size.  Raises FileNotFoundError when there is no such
    folder or cached pipeline, ValueError for pickled weights, unknown network or scheduler classes.
    """
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
    loaded = from_pipeline(pipe.to(dtype), size=size)
    if "solver" in pipe.scheduler.config:  # saved with one of ours
        from fewstep.hub.solver_scheduler import SolverScheduler

        pipe.scheduler = SolverScheduler.from_config(pipe.scheduler.config)
    return loaded


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
    """A diffusers pipeline that is in memory already, read; its network is shared, not copied."""
    name = next((n for n in ("unet", "transformer") if pipe.components.get(n) is not None), None)
    if name is None:
        raise ValueError(f"{type(pipe).__name__}: no unet or transformer among its components")
    net = adapt(pipe.components[name], Origin(pipe, name), size)
    if isinstance(net, TextAdapter) and _has_text_encoder(pipe):
        with torch.no_grad():
            net.set_null(net.embed(pipe, [""]))
    reading = read_scheduler(pipe.scheduler)
    return LoadedPipeline(_denoiser(net, reading), reading, pipe)


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
