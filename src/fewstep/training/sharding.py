"""Networks that do not fit in one process: every process holds a part of every tensor (PyTorch's FSDP2).

:class:`Sharded` cuts each network of a method into groups (the members of its outermost module lists, then the
rest) that are gathered when they are used and freed afterwards, frozen weights too.  Gradients, optimizer moments and
averages stay cut; sums over the processes are the only new arithmetic.  Checkpoints go through
``torch.distributed.checkpoint`` in its safetensors form, every process writing its own part, and can be read by another
number of processes.

What this does not do: every process makes the whole network in main memory before it is cut (there is no building on
the meta device), and the finished model is put together on every process.  Networks are entered through ``forward``
or ``features``; a method that reads weights in other ways, or owns parameters outside its networks, is refused or
fails, and one that changes a network's output in place gets wrong gradients (PyTorch warns).  Gathering follows
PyTorch's defaults; there is no CPU offload and no tensor parallelism.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from fewstep.denoisers import networks_in
from fewstep.files import write_atomically
from fewstep.methods.method import Networks
from fewstep.schemas import read_json
from fewstep.training.checkpoint import Checkpoint, checked_counters
from fewstep.training.parallel import Parallel


@dataclass(frozen=True)
class Sharded(Parallel):
    """Several processes of which every one holds a part."""

    def place(self, nets: Networks, device: torch.device) -> None:
        """Cut every network; ValueError when a module has parameters outside the networks that it calls."""
        nets.to(device)
        for parameter in nets.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP takes no channels-last weights
        mesh = init_device_mesh(device.type, (self.world,))
        for name, module in nets.named_children():
            inner = [denoiser.net for denoiser in networks_in(module)]
            for net in inner or [module]:
                cut(net, mesh)
            for key, parameter in module.named_parameters():
                if not isinstance(parameter, DTensor):
                    raise ValueError(f"shard=True: parameter {name}.{key} lies outside the network, it cannot be cut")

    def settle(self, nets: Networks) -> None:
        """Free what passes without a backward left gathered: weights must not move under a gathered copy."""
        for module in nets.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def checkpoint(self, folder: Path) -> Checkpoint:
        return Parts(folder, self)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Nothing: the backward pass of a cut network has averaged its gradients."""

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        square = super().norm(gradients).double().square()
        dist.all_reduce(square)
        return square.sqrt()


def cut(net: nn.Module, mesh: DeviceMesh) -> None:
    """Cut one network into groups, in place; a network that plays two roles is cut once."""
    if isinstance(net, FSDPModule) or not has_parameters(net):
        return
    for block in blocks_in(net):
        if has_parameters(block):
            fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    with suppress(ValueError):  # a network without features
        register_fsdp_forward_method(net, "features")


def blocks_in(net: nn.Module) -> Iterator[nn.Module]:
    """The members of module lists, but not of lists inside them."""
    for module in net.children():
        yield from module if isinstance(module, nn.ModuleList) else blocks_in(module)


def has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


class Parts(Checkpoint):
    """``checkpoint.json`` (counters, and which folder is valid), replaced when all parts of a new
    ``checkpoint-<step>/`` are on disk.  Files that are missing or cut short are noticed, flipped bits are not."""

    file = "checkpoint.json"
    other = "checkpoint.safetensors"
    hint = "this run was started without shard=True; go on without"

    def __init__(self, folder: Path, parallel: Parallel) -> None:
        super().__init__(folder)
        self.parallel = parallel

    def write(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        parts = self.path.parent / f"checkpoint-{counters['steps']:09d}"
        if self.parallel.main:
            shutil.rmtree(parts, ignore_errors=True)
        self.parallel.barrier()
        plain = {name: tensor.detach() for name, tensor in tensors.items()}
        dcp.save(plain, storage_writer=HuggingFaceStorageWriter(str(parts), save_distributed=True))
        self.parallel.barrier()
        if self.parallel.main:
            sizes = {file.name: file.stat().st_size for file in sorted(parts.iterdir())}
            whole = {"parts": parts.name, "bytes": sizes, **counters}
            write_atomically(self.path, (json.dumps(whole) + "\n").encode())
            for old in self.path.parent.glob("checkpoint-*"):
                if old != parts:
                    shutil.rmtree(old, ignore_errors=True)

    def counters(self) -> dict[str, Any]:
        try:
            counters = checked_counters(read_json(self.path, {"parts": str, "bytes": dict, ...: Any}))
            for name, size in counters["bytes"].items():
                part = self.path.parent / counters["parts"] / name
                if not part.is_file() or part.stat().st_size != size:
                    raise ValueError(f"{counters['parts']}/{name} is missing or cut short")
        except (KeyError, ValueError) as error:
            raise self.damaged(error) from None
        return counters

    def tensors(self, like: dict[str, Tensor]) -> dict[str, Tensor]:
        reader = HuggingFaceStorageReader(str(self.path.parent / self.counters()["parts"]))
        try:
            saved = reader.read_metadata().state_dict_metadata
            found = {name: tensor.detach() for name, tensor in like.items() if name in saved}
            dcp.load(found, storage_reader=reader)
        except (SafetensorError, RuntimeError, dcp.CheckpointException) as error:
            raise self.damaged(error) from None
        return found
