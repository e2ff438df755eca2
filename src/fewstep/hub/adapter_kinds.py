"""The adapter of every diffusers model class that fewstep reads."""

from __future__ import annotations

from typing import Any

from fewstep.hub.adapters import Adapter
from fewstep.hub.label_adapters import DiT, UNet2D
from fewstep.hub.origins import Origin
from fewstep.hub.text_adapters import SD3, Flux, Sana, UNet2DCondition

#: The adapter of every diffusers model class that fewstep reads.
ADAPTERS: dict[str, type[Adapter]] = {
    "UNet2DModel": UNet2D,
    "UNet2DConditionModel": UNet2DCondition,
    "DiTTransformer2DModel": DiT,
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": Flux,
    "SanaTransformer2DModel": Sana,
}


def adapter_class(name: str) -> type[Adapter]:
    """The adapter of a diffusers model class; ValueError names those that are known."""
    if name not in ADAPTERS:
        raise ValueError(f"diffusers model class '{name}' is unknown; fewstep reads {', '.join(ADAPTERS)}")
    return ADAPTERS[name]


def adapt(model: Any, origin: Origin | None = None, size: tuple[int, int] | None = None) -> Adapter:
    """The adapter around a diffusers model; ValueError when its class is not known."""
    name = type(model).__name__
    return adapter_class(name)(model, origin, size)
