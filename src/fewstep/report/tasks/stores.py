"""What a run's methods kept in its folder: the stores of one name."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fewstep.files import load_tensors
from fewstep.methods.parts.stores import joined
from fewstep.report.runs import RunCourse


def stores(course: RunCourse, name: str) -> list[dict[str, Tensor]]:
    """The tensors of every store of a name, in no order; none where the folder holds none."""
    places = sorted(Path(course.folder).glob(f"stores/{name}-*"))
    return [joined([load_tensors(file) for file in sorted(place.glob("part-*.safetensors"))]) for place in places]
