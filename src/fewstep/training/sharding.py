"""Networks that do not fit in one process: every process holds a part of every tensor (PyTorch's FSDP2).

:func:`shard` cuts each network of a method into groups (the members of its module lists, then the rest) that are
gathered when they are used and freed afterwards.  Gradients, optimiser moments and averages stay cut; sums over the
processes are the only new arithmetic.  Checkpoints go through ``torch.distributed.checkpoint`` in its safetensors
form, every process writing its own part, and can be read by another number of processes.

What this does not do: every process makes the whole network in main memory before it is cut (there is no building on
the meta device), and the finished model is put together on every process.  Networks are entered through ``forward``
or ``features``; a method that reads weights in other ways, or owns parameters outside its networks, is refused or
fails.  Gathering follows PyTorch's defaults: no prefetching beyond it, no CPU offload, no tensor parallelism.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from fewstep.denoisers import NetworkDenoiser
from fewstep.distill.method import Networks
from fewstep.hub.native import write_atomically
from fewstep.training.parallel import Parallel


def shard(nets: Networks, parallel: Parallel, device: torch.device) -> None:
    """Cut every network of a method over the processes, in place.

    ValueError when a module has parameters outside the networks that it calls.
    """
    mesh = init_device_mesh(device.type, (parallel.world,))
    # FSDP takes contiguous weights only, in the plain layout
    nets.to(memory_format=torch.contiguous_format)
    for name, module in nets.named_children():
        inner = [m.net for m in module.modules() if isinstance(m, NetworkDenoiser)]
        whole = inner or ([module] if any(True for _ in module.parameters()) else [])
        for net in whole:
            if isinstance(net, FSDPModule):
                continue  # two roles of one network
            for group in net.modules():
                if isinstance(group, nn.ModuleList):
                    for block in group:
                        if any(True for _ in block.parameters()):
                            fully_shard(block, mesh=mesh)
            fully_shard(net, mesh=mesh)
            register_fsdp_forward_method(net, "features")
        for key, parameter in module.named_parameters():
            if not isinstance(parameter, DTensor):
                raise ValueError(f"shard=True: parameter {name}.{key} lies outside the network, it cannot be sharded")


def reshard(nets: Networks) -> None:
    """Free what forward passes without a backward left gathered: weights must not move under a gathered copy."""
    for module in nets.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together on every process; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class ShardedCheckpoint:
    """A checkpoint in parts: ``checkpoint.json`` (counters, and which folder is valid) is replaced when all parts of a
    new ``checkpoint-<step>/`` are on disk, so that a kill at any moment leaves the old one or the new one."""

    def __init__(self, folder: Path, parallel: Parallel) -> None:
        self.path = folder / "checkpoint.json"
        self.parallel = parallel

    def exists(self) -> bool:
        return self.path.exists()

    def write(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Save the state of all processes; all of them must call."""
        parts = self.path.parent / f"checkpoint-{counters['steps']:09d}"
        if self.parallel.main:
            shutil.rmtree(parts, ignore_errors=True)
        self.parallel.barrier()
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        writer = HuggingFaceStorageWriter(str(parts), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, no_dist=self.parallel.world == 1)
        self.parallel.barrier()
        if self.parallel.main:
            write_atomically(self.path, (json.dumps({"parts": parts.name, **counters}) + "\n").encode())
            for old in self.path.parent.glob("checkpoint-*"):
                if old != parts:
                    shutil.rmtree(old, ignore_errors=True)

    def read(self, like: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Fill the tensors of ``like`` that were saved; ValueError naming the file when something is damaged."""
        try:
            counters = json.loads(self.path.read_text())
            parts = self.path.parent / str(counters.pop("parts"))
            if not parts.is_dir():
                raise ValueError(f"{parts.name} is missing")
            reader = HuggingFaceStorageReader(str(parts))
            saved = reader.read_metadata().state_dict_metadata
            found = {name: tensor for name, tensor in like.items() if name in saved}
            for name, tensor in found.items():
                if tuple(saved[name].size) != tuple(tensor.shape):
                    raise ValueError(f"{name} has shape {list(saved[name].size)}, not {list(tensor.shape)}")
            dcp.load(found, storage_reader=reader)
        except (OSError, ValueError, KeyError, RuntimeError, dcp.CheckpointException) as error:
            raise ValueError(f"{self.path}: damaged checkpoint ({error}); delete it to start this run again") from None
        return found, counters
