"""What sampling costs: network calls, seconds, memory."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Cost:
    """The cost of one call of a sampling function.

    ``calls`` counts calls of the network, ``rows`` the samples that went through it (guidance that doubles a batch
    shows in ``rows`` only); ``peak_bytes`` is the tensor memory allocated at the worst moment on top of what was held
    before.
    """

    samples: int
    calls: int
    rows: int
    seconds: float
    peak_bytes: int

    @property
    def calls_per_sample(self) -> float:
        """Network evaluations that one sample costs."""
        return self.rows / self.samples


def measure(sample: Callable[[], Tensor], network: nn.Module, repeats: int = 3) -> Cost:
    """The cost of ``sample()``, which calls ``network`` and returns samples ``[N, ...]``.

    It is called once to count calls and memory, which also warms it up, then ``repeats`` times for the median time.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    parameter = next(network.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    counted: list[int] = []
    handle = network.register_forward_pre_hook(lambda module, inputs: counted.append(len(inputs[0])))
    try:
        samples, peak = _peak_cuda(sample, device) if device.type == "cuda" else _peak_cpu(sample)
    finally:
        handle.remove()
    seconds = statistics.median(_seconds(sample, device) for _ in range(repeats))
    return Cost(len(samples), len(counted), sum(counted), seconds, peak)


def _seconds(sample: Callable[[], Tensor], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    sample()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_cuda(sample: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, int]:
    _wait(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    samples = sample()
    _wait(device)
    return samples, torch.cuda.max_memory_allocated(device) - held


def _peak_cpu(sample: Callable[[], Tensor]) -> tuple[Tensor, int]:
    with LiveBytes() as live:
        samples = sample()
    return samples, live.peak


class LiveBytes(TorchDispatchMode):
    """Adds up the storage that operators allocate while it is active; ``peak`` is the largest sum alive at once.

    PyTorch keeps no statistics of CPU memory, and the resident size of a process never falls back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Storages of the inputs existed before or are known already; what is new in the outputs was allocated here.
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.seen:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size
