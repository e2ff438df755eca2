"""Data as a teacher reads them: captions as conditions by its text encoders, pictures as latents by its autoencoder,
text as tokens by its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.condense.soft_labels import data_of
from fewstep.conditions import leaves
from fewstep.data.captions import Captioned
from fewstep.data.dataset import First, Prior, Samples
from fewstep.data.encoded import Embed, Latents, Tell
from fewstep.data.sources import load_samples
from fewstep.hub.autoencoders import autoencoder_name, encode, picture_channels, pixels_per_latent
from fewstep.hub.models import adapter_of, load
from fewstep.language_models import Tokenizer
from fewstep.models import model_of
from fewstep.training.feed import fitted
from fewstep.training.progress import Bar

#: What stands for a data set where there is none.
NO_DATA = "none"


def without_data(teacher: Any) -> Prior:
    """What a run without data draws: the classes of the teacher in turn, or nothing.

    ValueError for a teacher of other conditions, which must be given, and for one of tokens.
    """
    found = model_of(teacher)
    if found.tokens is not None or found.task == "language":
        raise ValueError(f"data '{NO_DATA}': {found.called} learns from text, give some")
    if found.task != "generation":
        raise ValueError(f"data '{NO_DATA}': {found.called} learns from labelled samples, give some")
    if teacher.classes:
        return Prior(tuple(teacher.shape), torch.arange(teacher.classes), NO_DATA)
    if teacher.null is not None:
        raise ValueError(
            f"data '{NO_DATA}': this teacher takes {', '.join(leaves(teacher.null))}, not classes: give a text file of "
            "prompts, one a line"
        )
    return Prior(tuple(teacher.shape), name=NO_DATA)


def embed_of(model: nn.Module) -> Embed | None:
    """The text encoders that a model came with, as a function of prompts; None where it has none."""
    net = adapter_of(model)
    return net.embed if net is not None and net.reads_prompts else None


def tokenizer_of(model: nn.Module) -> Tokenizer | None:
    """How a model reads text; None for one that reads none, or does not say."""
    return model_of(model).tokenizer


def pictures_of(teacher: Any) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]] | None:
    """How the autoencoder that a teacher came with makes latents of pictures in [-1, 1], and the shape of one picture;
    None where there is none."""
    net = adapter_of(teacher)
    if net is None or net.origin is None or not net.latent:
        return None
    pipe = net.origin.pipe
    weights = next(pipe.components[autoencoder_name(pipe)].parameters())
    scale = pixels_per_latent(pipe)
    shape = (picture_channels(pipe) or 0, *(side * scale for side in teacher.shape[1:]))
    return lambda x: encode(pipe, x.to(weights)).to(torch.get_default_dtype()), shape


def check_readable(teacher: Any, data: Samples) -> None:
    """ValueError for data that the teacher cannot be trained on, before any of them is read."""
    samples = data.uncaptioned
    if data.captions is not None and embed_of(teacher) is None:
        raise ValueError(f"data '{data.name}' has captions, and the teacher came with no text encoder to read them")
    if data.bare or needs_latents(teacher, samples):
        return
    latents = pictures_of(teacher)
    if latents is not None and len(samples.shape) == 3 and samples.shape != tuple(teacher.shape):
        raise ValueError(
            f"data '{data.name}' has samples {list(samples.shape)}, the teacher's autoencoder reads pictures "
            f"{list(latents[1])}, and its latents are {list(teacher.shape)}"
        )
    fitted(samples, teacher)


def needs_latents(teacher: Any, samples: Samples) -> bool:
    """Whether samples are the pictures of which the teacher knows the latents."""
    latents = pictures_of(teacher)
    return latents is not None and tuple(samples.shape) == latents[1] != tuple(teacher.shape)


def as_read_by(
    teacher: Any, data: Samples, folder: Path | None = None, show: bool = False, most: int | None = None
) -> Samples:
    """The data with what the teacher's pipeline makes of them, once: latents of pictures, conditions of captions.

    What is large is kept in ``folder``, for this teacher; with ``most`` only the first samples are taken.
    """
    samples = data.uncaptioned
    latents = pictures_of(teacher)
    if most is not None and most < len(samples):
        samples = First(samples, most)
    if latents is not None and needs_latents(teacher, samples):
        place = None if folder is None else folder / f"latents-{samples.sha256()[:16]}"
        samples = Latents.of(samples, latents[0], place, shown("latents", show))
    embed = embed_of(teacher)
    if data.captions is None or embed is None:
        return samples
    words = Captioned(data.captions[:most], None if data.bare else samples, data.name)
    return words.encoded(embed, tuple(teacher.shape), folder=folder, tell=shown("captions", show))


def shown(title: str, show: bool) -> Tell:
    """A progress bar for what is encoded."""
    bar = Bar(title, show)

    def tell(done: int, of: int) -> None:
        bar.update(done / of)
        if done == of:
            bar.close()

    return tell


def samples_of(source: str | Path, captions: bool = False, tokenizer: Tokenizer | None = None) -> Samples:
    """The training part of a data set by name or path, with its captions where they are asked for, its text in the
    tokens of a ``tokenizer``; of a run that made a small data set, that set."""
    if (Path(source) / "config.json").is_file() or (Path(source) / "model" / "config.json").is_file():
        found = model_of(load(source))
        if found.task == "data":
            return data_of(found.module, Path(source).name)
    return load_samples(source, captions=captions, tokenizer=tokenizer)
