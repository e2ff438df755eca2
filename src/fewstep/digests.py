"""SHA-256 of what a run is made of: tensors, and models whatever file they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fewstep.denoisers import denoisers_in

#: Numbers on a denoiser that do not change what it computes.
OTHER = ("training", "half_level", "calls")


def tensors_sha256(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes, types and bytes, in the order given; of a tensor on any device."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_sha256(model: nn.Module) -> str:
    """SHA-256 of a model: its weights, and the schedules and scales that say what they mean.

    Two models with the same digest compute the same, but for settings of modules that are not of this package.
    """
    said = [type(model).__name__]
    for part in denoisers_in(model):
        numbers = {k: v for k, v in vars(part).items() if isinstance(v, int | float) and k not in OTHER}
        said.append(f"{type(part).__name__} {part.schedule} {vars(part).get('prediction')} {numbers}")
    digest = hashlib.sha256("\n".join(said).encode())
    digest.update(tensors_sha256(model.state_dict().items()).encode())
    return digest.hexdigest()
