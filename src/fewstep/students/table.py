"""A table of trained students, by which scores of untrained ones are judged: 27 residual networks on Fashion-MNIST,
from labels alone and distilled, made by ``benchmarks/make_student_table.py``.

Chance alone gives Kendall's tau of 27 students a standard deviation of 0.14.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from fewstep.classifiers import NetworkClassifier
from fewstep.networks.classifiers import ResNet
from fewstep.schemas import Count, Size, read_json

DEPTHS = tuple[Size, ...]
SCHEMA = {
    "about": {
        "data": str, "shape": tuple[Size, ...], "classes": Size, "learned": Count, "tested": Count, "steps": Count,
        "batch": Count, "lr": float,
        "teacher": {"width": Size, "depths": DEPTHS, "learned": Count, "steps": Count, "accuracy": float},
    },
    "students": list[dict],
}  # fmt: skip


@dataclass(frozen=True)
class StudentTable:
    """Students by their channels ``widths`` ``[n]`` and the blocks of their three stages ``depths`` ``[n, 3]``, their
    accuracies from labels alone (``vanilla``) and ``distilled``, ``[n, seeds]`` float64, ``parameters`` and ``flops``
    ``[n]``; ``about`` says how they were trained."""

    widths: Tensor
    depths: Tensor
    vanilla: Tensor
    distilled: Tensor
    parameters: Tensor
    flops: Tensor
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.depths)

    def student(self, k: int) -> NetworkClassifier:
        """The ``k``-th student, with some first weights."""
        return self.build(int(self.widths[k]), self.depths[k].tolist())

    @property
    def teacher(self) -> NetworkClassifier:
        """A network as the teacher's, with some first weights."""
        return self.build(self.about["teacher"]["width"], self.about["teacher"]["depths"])

    def build(self, width: int, depths: list[int]) -> NetworkClassifier:
        """A residual network for the pictures of the table."""
        shape, classes = tuple(self.about["shape"]), self.about["classes"]
        return NetworkClassifier(ResNet(shape, classes, width, tuple(depths)), shape, classes)


def student_table() -> StudentTable:
    """The bundled table."""
    with resources.as_file(resources.files("fewstep") / "assets" / "students-fashion.json") as path:
        read = read_json(path, SCHEMA)
    rows = read["students"]
    names = {"widths": "width", "depths": "depths", "parameters": "parameters", "flops": "flops"}
    columns = {field: torch.tensor([row[name] for row in rows]) for field, name in names.items()}
    accuracies = {
        field: torch.tensor([row[name] for row in rows], dtype=torch.float64)
        for field, name in (("vanilla", "vanilla"), ("distilled", "kd"))
    }
    return StudentTable(**columns, **accuracies, about=read["about"])
