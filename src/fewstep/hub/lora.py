"""LoRA students of diffusers models: the file that plain diffusers loads.

``attach`` gives a copy of a denoiser, on any network, that trains low-rank weights on the memory of the original
(:mod:`fewstep.networks.lora`); any method trains it as it trains any denoiser, and ``merged`` makes an ordinary model
of it.  Where a network of diffusers was given further inputs, their own small layers are trained in full beside the
low-rank weights.

``save`` and ``load`` are diffusers' file format; folders of fewstep's own are :mod:`fewstep.hub.saved_low_rank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from fewstep.denoisers import Denoiser
from fewstep.files import load_tensors, save_tensors
from fewstep.hub.adapters import Adapter, as_adapter
from fewstep.hub.requires import require
from fewstep.hub.tables import network_of
from fewstep.networks.lora import factors, factors_in, low_rank
from fewstep.networks.lora import merged as merged
from fewstep.sampling.rollout import Student

#: The file name that ``load_lora_weights`` of the pipelines looks for.
WEIGHTS = "pytorch_lora_weights.safetensors"


def attach(
    denoiser: Denoiser,
    rank: int | None = None,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
) -> Denoiser:
    """A copy of ``denoiser`` that trains ``W + (alpha / rank) B A`` on the layers whose names end in ``targets``, and
    the layers of further inputs; arguments and errors are those of :func:`~fewstep.networks.lora.low_rank`."""
    named = ((name, as_adapter(module)) for name, module in denoiser.named_modules())
    inputs = [f"{name}.{path}" for name, net in named if net is not None for path in input_weights(net)]
    return low_rank(denoiser, rank, alpha, targets, seed, inputs)


def input_weights(net: Adapter) -> list[str]:
    """The names of the weights of the further inputs."""
    named = net.named_parameters()
    own = [name for name, _ in named if name.startswith(("further.", "second."))]
    return [*own, *(f"model.{name}" for name in net.trained)]


def _adapter(model: nn.Module) -> Adapter:
    net = network_of(model).net
    adapter = as_adapter(net)
    if adapter is None:
        raise ValueError(
            f"a {type(net).__name__} is not a diffusers model: keep its low-rank weights in a folder of fewstep's own"
        )
    return adapter


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
    held = factors_in(net.model)
    if not held:
        raise ValueError("the network holds no LoRA layers: make the student with lora.attach")
    if not isinstance(net.model, require("diffusers.loaders.peft", "LoRA students").PeftAdapterMixin):
        raise ValueError(
            f"diffusers loads no LoRA weights into a {type(net.model).__name__}: write the whole student with "
            "export(lora.merged(student), folder)"
        )
    if input_weights(net):
        inputs = ", ".join([*net.extra_inputs, *(["beside"] if net.beside_channels else [])])
        apart = net.further is not None or net.second is not None
        remedy = "write the whole student with export(lora.merged(student), folder)"
        raise ValueError(
            f"a file of LoRA weights has no place for the layers of the further inputs {inputs}: "
            f"{'keep the student in a folder of fewstep' if apart else remedy}"
        )
    tensors: dict[str, Tensor] = {}
    for name, layer in held.items():
        tensors[f"{net.component}.{name}.lora_A.weight"] = layer.lora_A.weight
        tensors[f"{net.component}.{name}.lora_B.weight"] = layer.lora_B.weight * (layer.alpha / layer.rank)
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
    student = attach(denoiser, ranks.pop(), targets=names)
    core = _adapter(student).model
    if missing := sorted(set(names) - set(factors_in(core))):
        raise ValueError(f"{path}: the network has no layer '{missing[0]}'")
    for name, weight in factors(core).items():
        found = tensors[f"{prefix}{name}"]
        if weight.shape != found.shape:
            raise ValueError(f"{path}: '{name}' has shape {list(found.shape)}, the network {list(weight.shape)}")
        weight.data.copy_(found)
    return student
