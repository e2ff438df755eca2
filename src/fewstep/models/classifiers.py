"""Models that make no samples: classifiers, and small data sets that stand for large ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fewstep.classifiers import NetworkClassifier
from fewstep.data.condensed import NOTE, Condensed
from fewstep.data.dataset import Samples
from fewstep.models.model import Config, Silent
from fewstep.models.networks import CLASSIFIER_NETWORK
from fewstep.schemas import Count, Map, Size

#: The types of tensors that a data set may hold.
KINDS = {str(kind).removeprefix("torch."): kind for kind in (
    torch.uint8, torch.int64, torch.int32, torch.bool, torch.float16, torch.float32, torch.float64,
)}  # fmt: skip
TENSOR = {"shape": tuple[Count, ...], "type": Literal[tuple(KINDS)]}


class ClassifierModel(Silent):
    """A network that tells classes."""

    kind = "classifier"
    wraps: ClassVar[type[nn.Module]] = NetworkClassifier
    holds: ClassVar[dict[str, Any]] = {"network": CLASSIFIER_NETWORK, "shape": tuple[Size, ...], "classes": Size}
    called = "a classifier"
    task = "classification"

    def accepts(self, data: Samples) -> Samples:
        made: NetworkClassifier = self.module
        if tuple(data.shape) != made.shape:
            raise ValueError(
                f"data '{data.name}' has samples {list(data.shape)}, the classifier reads {list(made.shape)}"
            )
        if data.classes is None:
            raise ValueError(f"data '{data.name}' has no labels, from which a classifier could learn")
        if data.classes > made.classes:
            raise ValueError(f"data '{data.name}' has {data.classes} classes, the classifier knows {made.classes}")
        return data

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        made: NetworkClassifier = self.module
        return {
            "kind": self.kind, "network": network(made.net), "shape": list(made.shape), "classes": made.classes,
        }  # fmt: skip

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        inside = config["network"]
        for field in ("shape", "classes"):
            if inside[field] != config[field]:
                raise ValueError(f"the classifier's {field} is {config[field]}, that of its network {inside[field]}")
        return NetworkClassifier(network(inside), config["shape"], config["classes"])


class CondensedModel(Silent):
    """A small data set that stands for a large one."""

    kind = "condensed"
    wraps = Condensed
    holds: ClassVar[dict[str, Any]] = {
        "tensors": Map(r"x|labels|note_\w+", "x, labels or a note", TENSOR), "classes": Size, "views": str,
        "class_names": list[str], "stored": Count | None,
    }  # fmt: skip
    called = "a condensed data set"
    task = "data"

    def teacher(self) -> Any:
        raise ValueError(f"{self.called}: train on it, with --data")

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        made: Condensed = self.module
        told = {
            name: {"shape": list(tensor.shape), "type": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in made.named_buffers()
        }
        return {
            "kind": self.kind, "tensors": told, "classes": made.classes, "views": str(made.views),
            "class_names": list(made.class_names), "stored": made.stored,
        }  # fmt: skip

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        if missing := {"x", "labels"} - set(config["tensors"]):
            raise ValueError(f"tensors: {', '.join(sorted(missing))} missing")
        # without memory: whether a file has so much is found out before any is taken
        empty = {
            name: torch.zeros((), dtype=KINDS[told["type"]]).expand(told["shape"])
            for name, told in config["tensors"].items()
        }
        notes = {name.removeprefix(NOTE): tensor for name, tensor in empty.items() if name.startswith(NOTE)}
        return Condensed(
            empty["x"], empty["labels"], config["class_names"], classes=config["classes"], views=config["views"],
            notes=notes, stored=config["stored"],
        )  # fmt: skip
