"""A small data set that stands for a large one, as a model: a run makes it, it is saved, opened and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.dataset import Dataset
from fewstep.data.views import Views

#: What the name of a note begins with in the tensors of a condensed set.
NOTE = "note_"


class Condensed(nn.Module):
    """Samples ``x`` ``[M, *shape]`` (uint8 pictures, or floats, pictures in [-1, 1]) with ``labels`` int64 ``[M]``.

    ``views`` is how training is to look at them.  ``notes`` are tensors that are kept beside them, by name: soft
    labels, what was chosen from the whole, how it was rated.  ``stored`` is what they take in bytes where that is not
    the size of their tensors; ``class_names`` name the classes, whose number is ``classes``.  ValueError for labels of
    another number, and for a note whose name is no plain word.
    """

    x: Tensor
    labels: Tensor

    def __init__(
        self,
        x: Tensor,
        labels: Tensor,
        class_names: Sequence[str] = (),
        *,
        classes: int | None = None,
        views: Views | str = "none",
        notes: Mapping[str, Tensor] | None = None,
        stored: int | None = None,
    ) -> None:
        super().__init__()
        if labels.shape != (len(x),) or labels.is_floating_point():
            raise ValueError(f"{len(x)} samples need whole labels [{len(x)}], got shape {list(labels.shape)}")
        for name in notes or {}:
            if not name.isidentifier():
                raise ValueError(f"the note '{name}' must be called by one word")
        self.register_buffer("x", x.detach())
        self.register_buffer("labels", labels)
        for name, tensor in (notes or {}).items():
            self.register_buffer(NOTE + name, tensor.detach())
        self.class_names = tuple(class_names)
        if classes is None:
            classes = len(self.class_names) or int(labels.max()) + 1
        self.classes = classes
        self.views = Views.parse(views) if isinstance(views, str) else views
        self.stored = stored

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        """Takes over what a file holds: until then the tensors may be shapes without memory."""
        for name in self._buffers:
            self._buffers[name] = state_dict[prefix + name].clone()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.x.shape[1:])

    @property
    def notes(self) -> dict[str, Tensor]:
        """The tensors that are kept beside the samples, by name."""
        return {name.removeprefix(NOTE): b for name, b in self.named_buffers() if name.startswith(NOTE)}

    def dataset(self, name: str = "condensed") -> Dataset:
        """The samples as data to train on; soft labels ``[M, classes]`` among the notes are their column "logits"."""
        logits = {key: note for key, note in self.notes.items() if key == "logits"}
        return Dataset(name, self.x, self.labels, self.class_names, columns=logits)

    def bytes(self) -> int:
        """What samples and labels take (a byte a label up to 256 classes), and soft labels where there are any."""
        if self.stored is not None:
            return self.stored
        label = 1 if self.classes <= 256 else 8
        soft = self.notes.get("logits")
        more = 0 if soft is None else soft.numel() * soft.element_size()
        return self.x.numel() * self.x.element_size() + label * len(self.labels) + more


def to_pictures(x: Tensor) -> Tensor:
    """Floats in [-1, 1] as uint8 pictures, rounded; what is uint8 already as it is."""
    return x if x.dtype == torch.uint8 else ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
