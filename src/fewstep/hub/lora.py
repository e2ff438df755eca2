"""LoRA students: low-rank weights on a frozen network, written so that plain diffusers loads them.

``attach`` gives a trainable copy of a denoiser whose only parameters are the low-rank ones.  The frozen weights become
buffers that share the memory of the original's, so any method can train the copy as it trains any denoiser, and a
teacher and its LoRA student (and critic) cost one network.  The second factor starts at zero: the copy starts as the
original, exactly.  Where the network is given further inputs, their own small layers are trained in full beside the
low-rank weights and saved with them.

In a run such a student is saved as its factors, where the frozen weights are those of a pipeline that lies in a folder
(``fewstep.load`` opens it there), and whole where they are not.

Hu et al. 2021 (arXiv 2106.09685); the layers are peft's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.denoisers import Denoiser
from fewstep.digests import tensors_sha256
from fewstep.files import load_tensors, save_tensors
from fewstep.hub.adapters import Adapter, as_adapter, pipeline_folder
from fewstep.hub.requires import require
from fewstep.hub.tables import network_of
from fewstep.randomness import derive_seed
from fewstep.sampling.rollout import Student

#: Attention projections, the usual targets in diffusers models.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
#: The file name that ``load_lora_weights`` of the pipelines looks for.
WEIGHTS = "pytorch_lora_weights.safetensors"


def attach(
    denoiser: Denoiser, rank: int, alpha: float | None = None, targets: tuple[str, ...] = ATTENTION, seed: int = 0
) -> Denoiser:
    """A copy of ``denoiser`` that trains ``W + (alpha / rank) B A`` on the layers whose names end in ``targets``.

    ``alpha`` defaults to ``rank``.  Raises ValueError when the rank is not positive, no layer has such a name, or
    there are LoRA layers already.
    """
    require("peft", "LoRA students")
    if rank < 1:
        raise ValueError(f"rank={rank}: LoRA needs a rank of at least 1")
    if _layers(_adapter(denoiser)):
        raise ValueError("the network holds LoRA layers already: merge them first with lora.merged(model)")
    own = {id(tensor) for tensor in _of_inputs(_adapter(denoiser))}
    tensors = (*denoiser.parameters(), *denoiser.buffers())
    shared = {id(tensor): tensor for tensor in tensors if id(tensor) not in own}
    student = copy.deepcopy(denoiser, dict(shared))
    adapter = _adapter(student)
    net = adapter.model
    names = [n for n, m in net.named_modules() if any(n == t or n.endswith(f".{t}") for t in targets) and _plain(m)]
    if not names:
        raise ValueError(f"targets={targets}: no linear or convolution layer of this network has such a name")
    inject(
        adapter, rank, float(rank if alpha is None else alpha), names, kept_in_folder(adapter), seed, adapter.trained
    )
    return student


def _of_inputs(adapter: Adapter) -> list[Tensor]:
    """The weights of the further inputs."""
    modules: list[nn.Module | None] = [adapter.further, adapter.second]
    held = [module for module in modules if module is not None]
    tensors = [tensor for module in held for tensor in (*module.parameters(), *module.buffers())]
    return [*tensors, *(adapter.model.get_parameter(name) for name in adapter.trained)]


def inject(
    adapter: Adapter,
    rank: int,
    alpha: float,
    names: Sequence[str],
    base: str | None,
    seed: int = 0,
    trained: Sequence[str] = (),
) -> None:
    """Put low-rank weights on the layers of these names, in place, and freeze all weights but the ``trained`` ones.

    With a ``base``, the digest of weights that lie in a folder, those are no part of the model's state: checkpoints and
    model folders hold the factors only.
    """
    net = adapter.model
    adapter.frozen = tuple(name for name, _ in net.named_parameters(remove_duplicate=False) if name not in trained)
    adapter.trained, adapter.base = tuple(trained), base
    for path in adapter.frozen:
        # parameters of its own on the same memory: peft is going to freeze them
        module, name = _owner(net, path)
        setattr(module, name, nn.Parameter(module.get_parameter(name).detach(), requires_grad=False))
    peft = require("peft", "LoRA students")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names))
    with torch.random.fork_rng(devices=[]):
        peft.inject_adapter_in_model(config, net)
    for path in trained:
        net.get_parameter(path).requires_grad_(True)
    for path, parameter in list(net.named_parameters(remove_duplicate=False)):
        if not parameter.requires_grad:
            module, name = _owner(net, path)
            delattr(module, name)
            module.register_buffer(name, parameter.detach(), persistent=base is None)
    for name, layer in _layers(net).items():
        generator = torch.Generator().manual_seed(derive_seed("lora", seed, name))
        first = layer.lora_A["default"].weight
        drawn = torch.empty(first.shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        first.data.copy_(drawn)


def kept_in_folder(adapter: Adapter) -> str | None:
    """The digest of a network's weights when they are those in its pipeline's folder; None when they lie nowhere."""
    folder = pipeline_folder(adapter)
    if folder is None:
        return None
    named = adapter.model.named_parameters(remove_duplicate=False)
    own = {name: parameter for name, parameter in named if name not in adapter.trained}
    found: dict[str, Tensor] = {}
    for file in sorted((folder / adapter.component).glob("*.safetensors")):
        found |= load_tensors(file)
    same = all(n in found and torch.equal(found[n].float(), p.detach().float().cpu()) for n, p in own.items())
    return _digest(adapter, adapter.trained) if same else None


def _digest(adapter: Adapter, without: Sequence[str] = ()) -> str:
    named = sorted(adapter.model.named_parameters(remove_duplicate=False))
    return tensors_sha256((n, p.float()) for n, p in named if n not in without)


def described(adapter: Adapter) -> dict[str, Any]:
    """Low-rank weights as plain data, see :data:`fewstep.models.networks.LOW_RANK`."""
    layers = _layers(adapter.model)
    layer = next(iter(layers.values()))
    return {
        "rank": layer.r["default"], "alpha": float(layer.lora_alpha["default"]), "targets": list(layers),
        "base": adapter.base, **({"trained": list(adapter.trained)} if adapter.trained else {}),
    }  # fmt: skip


def factored(adapter: Any, low_rank: dict[str, Any]) -> Any:
    """A network with the low-rank weights that were :func:`described`, untrained, in place; ValueError for layers and
    weights that it has not."""
    trained = low_rank.get("trained", ())
    if unknown := sorted(set(trained) - {name for name, _ in adapter.model.named_parameters()}):
        raise ValueError(f"low_rank.trained: '{unknown[0]}' is no weight of this network")
    inject(adapter, low_rank["rank"], low_rank["alpha"], low_rank["targets"], low_rank["base"], trained=trained)
    if missing := sorted(set(low_rank["targets"]) ^ set(_layers(adapter.model))):
        raise ValueError(f"low_rank.targets: '{missing[0]}' is not a layer that takes low-rank weights")
    return adapter


def with_low_rank(adapter: Adapter, network: dict[str, Any]) -> Adapter:
    """:func:`factored` on the base that a network's description names; ValueError when that is not what it was."""
    low_rank, folder = network["low_rank"], network["pipeline"]
    if low_rank["base"] is not None:
        if pipeline_folder(adapter) is None:
            raise ValueError(f"the pipeline {folder} is not there any more, on whose weights these are low-rank ones")
        if _digest(adapter, low_rank.get("trained", ())) != low_rank["base"]:
            raise ValueError(f"the pipeline {folder} has other weights than when these low-rank ones were trained")
    made: Adapter = factored(adapter, low_rank)
    return made


def _plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _owner(net: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the tensor called ``path``, and the tensor's name in it."""
    parent, _, name = path.rpartition(".")
    return net.get_submodule(parent), name


def _adapter(model: nn.Module) -> Adapter:
    net = network_of(model).net
    adapter = as_adapter(net)
    if adapter is None:
        raise ValueError(f"a {type(net).__name__} is not a diffusers model: LoRA students are made of those")
    return adapter


def _layers(net: nn.Module) -> dict[str, Any]:
    """The LoRA layers by name."""
    layer = require("peft.tuners.tuners_utils", "LoRA students").BaseTunerLayer
    return {name: module for name, module in net.named_modules() if isinstance(module, layer)}


def merged(model: Student | Denoiser) -> Any:
    """A copy of a LoRA student or denoiser with the low-rank weights added to the network's own."""
    plain = copy.deepcopy(model)
    adapter = _adapter(plain)
    for name, layer in _layers(adapter.model).items():
        layer.merge()
        adapter.model.set_submodule(name, layer.get_base_layer())
    for path in adapter.frozen:
        module, name = _owner(adapter.model, path)
        weight = nn.Parameter(module.get_buffer(name), requires_grad=False)
        delattr(module, name)
        module.register_parameter(name, weight)
    adapter.frozen, adapter.trained, adapter.base = (), (), None
    return plain


def save(model: Student | Denoiser, folder: str | Path) -> Path:
    """Write the low-rank weights of a student on a diffusers network to ``folder / pytorch_lora_weights.safetensors``,
    for ``pipe.load_lora_weights(folder)``; where a pipeline has no such method (Kandinsky, LDM) for
    ``pipe.unet.load_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors", prefix="unet")``.

    ``alpha / rank`` is multiplied into the second factor, so that the file means the same to every version of
    diffusers, with or without metadata.  Raises ValueError for a network into which diffusers loads no LoRA weights
    (``UNet2DModel``, DiT): export the student merged; and for one with layers of further inputs, which such a file
    does not hold.
    """
    net = _adapter(model)
    layers = _layers(net.model)
    if not layers:
        raise ValueError("the network holds no LoRA layers: make the student with lora.attach")
    if not isinstance(net.model, require("diffusers.loaders.peft", "LoRA students").PeftAdapterMixin):
        raise ValueError(
            f"diffusers loads no LoRA weights into a {type(net.model).__name__}: write the whole student with "
            "export(lora.merged(student), folder)"
        )
    if _of_inputs(net):
        inputs = ", ".join([*net.extra_inputs, *(["beside"] if net.beside_channels else [])])
        apart = net.further is not None or net.second is not None
        remedy = "write the whole student with export(lora.merged(student), folder)"
        raise ValueError(
            f"a file of LoRA weights has no place for the layers of the further inputs {inputs}: "
            f"{'keep the student in a folder of fewstep' if apart else remedy}"
        )
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{net.component}.{name}.lora_A.weight"] = layer.lora_A["default"].weight
        tensors[f"{net.component}.{name}.lora_B.weight"] = layer.lora_B["default"].weight * layer.scaling["default"]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    return folder / WEIGHTS


def load(denoiser: Denoiser, folder: str | Path) -> Denoiser:
    """A copy of ``denoiser`` with the low-rank weights that :func:`save` wrote; ValueError when they do not fit."""
    path = Path(folder) / WEIGHTS
    tensors = load_tensors(path)
    prefix, suffix = f"{_adapter(denoiser).component}.", ".lora_A.weight"
    names = sorted(key.removeprefix(prefix).removesuffix(suffix) for key in tensors if key.endswith(suffix))
    ranks = {len(value) for key, value in tensors.items() if key.endswith(suffix)}
    if len(ranks) != 1:
        raise ValueError(f"{path}: LoRA weights of ranks {sorted(ranks)}; exactly one rank is read")
    student = attach(denoiser, ranks.pop(), targets=tuple(names))
    layers = _layers(_adapter(student).model)
    if set(layers) != set(names):
        missing = sorted(set(names) - set(layers))
        raise ValueError(f"{path}: the network has no layer '{missing[0]}'")
    for name, layer in layers.items():
        for factor in ("lora_A", "lora_B"):
            weight, found = layer.get_submodule(factor)["default"].weight, tensors[f"{prefix}{name}.{factor}.weight"]
            if weight.shape != found.shape:
                raise ValueError(f"{path}: '{name}' has shape {list(found.shape)}, the network {list(weight.shape)}")
            weight.data.copy_(found)
    return student
