"""What a sample is asked to show: ``--class``, ``--prompt``, ``--cond``, and the seeds that it is made from."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fewstep.cli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.hub.adapters import Adapter


def declares_guidance(model: Any) -> bool:
    """Whether a student has an input that is declared to be the guidance weight."""
    from fewstep.extras import guidance_weight
    from fewstep.models import model_of

    return guidance_weight(model_of(model).inputs) is not None


def takes_guidance(model: Any) -> bool:
    """Whether the model's network takes the guidance scale as an input: one that is declared, or as a condition."""
    from fewstep.hub.models import adapter_of

    net = adapter_of(model)
    return declares_guidance(model) or (net is not None and net.takes_guidance)


def seeds(chosen: argparse.Namespace) -> list[int] | None:
    """``--seeds``, one a sample; None when it was not given."""
    if chosen.seeds is None:
        return None
    try:
        return [int(word) for word in chosen.seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds {chosen.seeds}: give one whole number a sample, such as 3,5,7") from None


def condition(chosen: argparse.Namespace, model: Any) -> Any:
    """What to make: an embedded ``--prompt``, or labels, or None for whatever comes."""
    from fewstep.hub.models import adapter_of

    return labels(chosen, model.classes) if chosen.prompt is None else prompted(chosen, adapter_of(model))


def conditions(chosen: argparse.Namespace, model: Any) -> tuple[Any, Any]:
    """What to make, and what ``--guidance`` leads away from: ``--prompt``, ``--cond`` and a guidance scale that the
    network takes as dicts of tensors, else labels, or None for whatever comes."""
    import torch

    from fewstep.cli.runs import device_of
    from fewstep.hub.models import adapter_of

    net = adapter_of(model)
    declared = declares_guidance(model)
    scale = chosen.guidance if takes_guidance(model) and not declared and chosen.guide is None else None
    if net is None or (chosen.prompt is None and chosen.cond is None and scale is None):
        if chosen.cond is not None:
            raise UserError(f"--cond: '{chosen.model}' is not a pipeline, it takes class numbers at most")
        return condition(chosen, model), None
    null = net.empty(chosen.n) or {}
    if model.classes:
        null = {"class_labels": torch.full((chosen.n,), -1)}
    given, negative = from_file(chosen)
    asked = labels(chosen, model.classes)
    if asked is not None:
        given["class_labels"] = asked
    cond = {**null, **({} if chosen.prompt is None else prompted(chosen, net)), **given}
    if scale is not None:
        cond["guidance_scale"] = torch.full((chosen.n,), scale)
    away = {**cond, **null, **negative}
    if chosen.guidance is not None and scale is None and not declared and not null and not negative:
        raise UserError(
            f"--guidance: '{chosen.model}' has no empty prompt; put negative_{next(iter(given))} into --cond"
        )
    device = device_of(chosen.device)
    cond, away = ({name: value.to(device) for name, value in part.items()} for part in (cond, away))
    return cond, away


def prompted(chosen: argparse.Namespace, net: Adapter | None) -> dict[str, Tensor]:
    """``--prompt``, embedded once for every sample."""
    import torch

    if net is None or not net.reads_prompts:
        raise UserError(f"--prompt: '{chosen.model}' has no text encoder to read it")
    with torch.no_grad():
        return net.embed([chosen.prompt] * chosen.n)


def from_file(chosen: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``--cond``: the conditions in the file, and the negative ones, one row a sample."""
    from fewstep.files import load_tensors

    given: dict[str, Tensor] = {}
    negative: dict[str, Tensor] = {}
    if chosen.cond is None:
        return given, negative
    for name, value in load_tensors(chosen.cond).items():
        if value.ndim == 0 or len(value) not in (1, chosen.n):
            raise UserError(
                f"--cond {chosen.cond}: {name} has the shape {list(value.shape)}, for --n {chosen.n} samples"
            )
        part = negative if name.startswith("negative_") else given
        part[name.removeprefix("negative_")] = value.expand(chosen.n, *value.shape[1:])
    return given, negative


def labels(chosen: argparse.Namespace, classes: int | None) -> Tensor | None:
    """``--class`` as labels ``[n]``, cycled; None when it was not given."""
    import torch

    if chosen.labels is None:
        return None
    if not classes:
        raise UserError(f"--class {chosen.labels}: '{chosen.model}' is unconditional, it has no classes")
    try:
        asked = [int(word) for word in chosen.labels.split(",")]
    except ValueError:
        raise UserError(f"--class {chosen.labels}: give class numbers such as 3 or 0,1,2") from None
    for label in asked:
        if not 0 <= label < classes:
            raise UserError(f"--class {label}: '{chosen.model}' has the classes 0 to {classes - 1}")
    return torch.tensor(asked).repeat(-(-chosen.n // len(asked)))[: chosen.n]
