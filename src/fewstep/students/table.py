"""A table of trained students, by which scores of untrained ones are judged: 27 residual networks on the digits, from
labels alone and distilled, made by ``benchmarks/make_student_table.py``.

Everything in it is small, and chance alone gives Kendall's tau of 27 students a standard deviation of 0.14.
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
        "data": str, "shape": tuple[Size, ...], "classes": Size, "width": Size, "seeds": list[int], "learned": Count,
        "tested": Count, "steps": Count, "batch": Count, "lr": float,
        "teacher": {"width": Size, "depths": DEPTHS, "learned": Count, "accuracy": float},
    },
    "students": list[dict],
}  # fmt: skip


@dataclass(frozen=True)
class StudentTable:
    """Students by the blocks of their three stages ``depths`` ``[n, 3]``, their accuracies from labels alone
    (``vanilla``) and ``distilled``, ``[n, seeds]`` float64, ``parameters`` and ``flops`` ``[n]``; ``about`` says how
    they were trained."""

    depths: Tensor
    vanilla: Tensor
    distilled: Tensor
    parameters: Tensor
    flops: Tensor
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.depths)

    def build(self, depths: tuple[int, ...]) -> NetworkClassifier:
        """A student, or one as its teacher is, with some first weights."""
        shape, classes = tuple(self.about["shape"]), self.about["classes"]
        net = ResNet(shape, classes, self.about["width"], depths)
        return NetworkClassifier(net, shape, classes)

    @property
    def teacher(self) -> NetworkClassifier:
        """A network as the teacher's, with some first weights."""
        return self.build(tuple(self.about["teacher"]["depths"]))


def student_table() -> StudentTable:
    """The bundled table."""
    with resources.as_file(resources.files("fewstep") / "assets" / "students-digits.json") as path:
        read = read_json(path, SCHEMA)
    rows = read["students"]
    columns = {name: torch.tensor([row[name] for row in rows]) for name in ("depths", "parameters", "flops")}
    accuracies = {
        field: torch.tensor([row[name] for row in rows], dtype=torch.float64)
        for field, name in (("vanilla", "vanilla"), ("distilled", "kd"))
    }
    return StudentTable(**columns, **accuracies, about=read["about"])
