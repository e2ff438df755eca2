"""Diffusers pipelines as denoisers: read from a folder, from the hub's local cache, or from memory.

Only safetensors weights are read: nothing is unpickled, no code of a repository is run, and no host is asked unless
``local_only=False`` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.denoisers import Clipped, Denoiser, NetworkDenoiser
from fewstep.files import headers
from fewstep.hub import autoencoders
from fewstep.hub.adapter_kinds import adapt, adapter_class
from fewstep.hub.adapters import BESIDE, Adapter
from fewstep.hub.exporting import Exported, export, export_with_code
from fewstep.hub.folders import check_component, check_pipeline, offline
from fewstep.hub.origins import Origin
from fewstep.hub.requires import require
from fewstep.hub.schedulers import Reading, read_scheduler
from fewstep.hub.weights import no_larger_than
from fewstep.randomness import Rng
from fewstep.schemas import Place, blaming, check, read_json

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
        return self.reading.grid(steps)

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """The condition for a list of prompts, from the pipeline's text encoders; ValueError when it has none."""
        net = self.denoiser.net
        if not net.reads_prompts:
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
    pipe = open_pipeline(path_or_id, local_only, dtype)
    with blaming(Path(path_or_id)):
        loaded = from_pipeline(pipe, size=size)
        if "solver" in pipe.scheduler.config:  # saved with one of ours
            from fewstep.hub.solver_scheduler import SolverScheduler

            pipe.scheduler = SolverScheduler.from_config(pipe.scheduler.config)
    return loaded


def open_pipeline(path_or_id: str | Path, local_only: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """The diffusers pipeline in a folder or in the local cache, as :func:`load_pipeline` finds it."""
    diffusers = require("diffusers", "reading diffusers pipelines")
    folder = Path(path_or_id)
    if not folder.is_dir():
        folder = _cached(str(path_or_id), local_only)
    classes = check_pipeline(folder)
    # diffusers wants to be told which components the folder was written without
    given: dict[str, Any] = {name: None for name, kind in classes.items() if kind is None}
    with offline(), no_larger_than(_tensors(folder)), blaming(folder):
        given |= {
            name: _read_model(folder / name, kind)
            for name, kind in classes.items()
            if kind is not None and _reads_weights(kind)
        }
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, **given
        )
    for name, tokenizer in pipe.components.items():
        encoder = pipe.components.get(name.replace("tokenizer", "text_encoder"))
        if name.startswith("tokenizer") and tokenizer is not None and encoder is not None:
            _check_vocabulary(folder / name, tokenizer, encoder)
    # not an argument above: its name differs between versions of diffusers
    return pipe.to(dtype)


def _reads_weights(kind: Any) -> bool:
    """Whether a component is a model of diffusers or of transformers."""
    return issubclass(kind, nn.Module) and hasattr(kind, "from_pretrained")


def _read_model(folder: Path, kind: Any) -> Any:
    """A model of diffusers or transformers with the weights in its folder.

    Both libraries draw at random what the weights lack, and leave aside what the model has no place for; here each is
    a ValueError.  Of transformers' models only whole layers must not be left aside: weights of text encoders often come
    with a vision model, or with buffers of old versions.
    """
    model, told = kind.from_pretrained(
        str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"{folder}: its weights lack the tensor '{missing[0]}' ({len(missing)} in all)")
    more = sorted(told["unexpected_keys"])
    if not isinstance(model, require("diffusers", "reading diffusers models").ModelMixin):
        more = [key for key in more if _is_of_a_layer(key, model)]
    if more and getattr(model.config, "quantization_config", None) is None:
        raise ValueError(
            f"{folder}: the model that its config.json describes has no tensor '{more[0]}', which is in its weights "
            f"({len(more)} in all)"
        )
    return model


def _is_of_a_layer(key: str, model: nn.Module) -> bool:
    """Whether a tensor is of a layer in one of the lists of layers that a model has."""
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    parts = key.split(".")
    return any(part.isdigit() and ".".join(parts[:i]) in lists for i, part in enumerate(parts))


def _check_vocabulary(folder: Path, tokenizer: Any, encoder: Any) -> None:
    """ValueError for a tokenizer without most of its words (transformers makes one without a vocabulary, too), or with
    some that its text encoder does not know.  Numbers without a word are usual."""
    size = getattr(encoder.config, "vocab_size", None)
    if size is None or not hasattr(tokenizer, "get_vocab"):
        return
    ids = set(tokenizer.get_vocab().values())
    if max(ids, default=-1) >= size or len(ids) < size // 2:
        raise ValueError(
            f"{folder}: its vocabulary has {len(ids)} words, numbered up to {max(ids, default=0)}, the text encoder "
            f"knows {size}"
        )


def _cached(name: str, local_only: bool) -> Path:
    """The folder in the local cache that holds a pipeline of the hub."""
    if name.startswith((".", "/")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name}: no such folder (a hub id has the form owner/name)")
    diffusers = require("diffusers", "reading diffusers pipelines")
    try:
        with offline(local_only):
            return Path(diffusers.DiffusionPipeline.download(name, use_safetensors=True, local_files_only=local_only))
    except OSError as error:
        hint = "; pass local_only=False to download it" if local_only else ""
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"{name}: not in the local hub cache{hint} ({first})") from None


def _tensors(folder: Path) -> int:
    """How many tensors the safetensors files in a folder and those below it hold."""
    return sum(len(headers(file)) for file in (*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")))


def from_pipeline(pipe: Any, *, size: tuple[int, int] | None = None) -> LoadedPipeline:
    """A diffusers pipeline that is in memory already, read; its network is shared, not copied.

    ``size`` is the height and width of the pictures in pixels.
    """
    if pipe.components.get("scheduler") is None:
        raise ValueError(
            f"{type(pipe).__name__}: no scheduler among its components, which says what the network predicts"
        )
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
    net.read_null()
    return net


def load_model(
    path: str | Path, scheduler: Any, *, size: tuple[int, int] | None = None, dtype: torch.dtype = torch.float32
) -> NetworkDenoiser:
    """A bare diffusers model (a folder with ``config.json`` and safetensors weights) as a denoiser.

    ``scheduler`` is a diffusers scheduler object: it says which noise schedule and prediction the model belongs to.
    """
    diffusers = require("diffusers", "reading diffusers models")
    folder, config = Path(path), Path(path) / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{path}: no diffusers model here (config.json is missing)")
    name = check(read_json(config), dict, Place(config)).get("_class_name")
    adapter_class(check(name, str, Place(config, "_class_name")))
    model_class = attrgetter(name)(diffusers)
    check_component(folder, model_class)
    with offline(), no_larger_than(_tensors(folder)), blaming(folder):
        model = _read_model(folder, model_class)
    return wrap(model.to(dtype), scheduler, size=size)


def wrap(model: Any, scheduler: Any, *, size: tuple[int, int] | None = None) -> NetworkDenoiser:
    """A diffusers model in memory as a denoiser, on the schedule of a diffusers scheduler object."""
    return _denoiser(adapt(model, size=size), read_scheduler(scheduler))


def _denoiser(net: Adapter, reading: Reading) -> NetworkDenoiser:
    shape = (net.channels, *net.size)
    return NetworkDenoiser(net, reading.schedule, reading.prediction, shape, net.classes, net.empty(1)).eval()
