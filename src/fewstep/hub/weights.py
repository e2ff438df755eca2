"""What a safetensors file says of itself, and a bound on the networks that are built for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.module import register_module_parameter_registration_hook


@contextmanager
def no_larger_than(tensors: int) -> Iterator[None]:
    """ValueError from whatever is built inside once it has many more parameters than there are tensors to fill them:
    a config of ten million layers would take hours and all memory to find that out.

    A parameter may be registered several times (tied, moved, filled): four times, and a thousand, are let pass.
    """
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > 4 * tensors + 1000:
            raise ValueError(f"this network has more than {made - 1} tensors of weights, where {tensors} were expected")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
