"""Models by name, and the pictures that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.hub import native
from fewstep.hub.adapters import Adapter, as_adapter
from fewstep.hub.places import BUNDLED as BUNDLED
from fewstep.hub.places import bundled_models as bundled_models
from fewstep.hub.places import locate as locate


def load(name: str | Path, size: tuple[int, int] | None = None) -> Any:
    """A model: a bundled name ("digits", "fashion", "fashion-1step"), a fewstep folder (or a run folder, whose model
    is taken), or a folder with a diffusers pipeline, or with a causal language model of transformers.  Nothing is
    downloaded.

    ``size`` is the height and width in pixels of the pictures that a pipeline is to make (default: its own size).
    Returns a denoiser, a student or another of :data:`fewstep.models.KINDS`; what a latent model samples becomes
    pictures by :func:`pictures`.  Raises FileNotFoundError or ValueError naming what is wrong.
    """
    folder = locate(name)
    if (folder / "config.json").is_file():
        if size is not None:
            raise ValueError(f"size={size[0]}x{size[1]}: '{name}' is not a pipeline, it has the size it was made with")
        from fewstep.hub.language import is_language_model, load_language_model

        return load_language_model(folder) if is_language_model(folder) else native.load(folder)
    from fewstep.hub.diffusers import load_pipeline

    return load_pipeline(folder, size=size).denoiser


def adapter_of(model: nn.Module) -> Adapter | None:
    """The diffusers network inside a model, of several out of one pipeline (experts) the first; None when there is
    none, or there are others."""
    found = [net for module in model.modules() if (net := as_adapter(module)) is not None]
    pipelines = {(net.size, None if net.origin is None else net.origin.pipe.name_or_path or net) for net in found}
    return found[0] if len(pipelines) == 1 else None


@torch.no_grad()
def pictures(model: nn.Module, samples: Tensor) -> Tensor:
    """What a model sampled, as pictures in [-1, 1] (not clipped): decoded by the autoencoder of the pipeline that its
    network came from, as they are where there is none.

    Raises ValueError when the samples are latents and their pipeline is not where it was.
    """
    net = adapter_of(model)
    return samples if net is None else net.decode(samples)
