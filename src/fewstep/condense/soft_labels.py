"""Stored soft labels: what a teacher said of views of pictures, with all that makes the same views again.

A view is cheap to make and dear to label, so its draws are kept beside its logits (fast knowledge distillation, Shen
and Xing 2022): which pictures, the box and the flip of each, whom it was mixed with and how.  Views are kept by the
batch, because what is mixed, and whose statistics a teacher used, are those of one batch; ``S`` batches of ``B``::

    view = mix(crop(x[index], boxes, flips), partner),      logits = teacher(view)      kept as float16

Logits of samples as they are need no view: a plain column, whose batches are of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.data.condensed import Condensed
from fewstep.data.dataset import Dataset, Rows, Samples, as_floats, digest_of, epoch_indices, number_of_classes
from fewstep.data.views import crop, cutmix, mixup, random_boxes, random_flips, random_mixing_box
from fewstep.files import load_tensors, save_tensors
from fewstep.randomness import Rng

Mix = Literal["cutmix", "mixup", "none"]
#: What the names of these tensors begin with among the notes of a condensed set.
PREFIX = "soft_"


class View(NamedTuple):
    """The draws behind one batch of views, or behind several, stacked; None for what is not done.

    ``boxes`` ``[B, 4]`` and ``flips`` ``[B]`` of the crops, then ``partner`` ``[B]``, the place in the batch of the
    view that each is mixed with: a box ``cut`` ``[4]`` of it is pasted (CutMix), or it is blended in with ``1 - own``
    (MixUp, ``own`` a scalar).
    """

    boxes: Tensor | None = None
    flips: Tensor | None = None
    partner: Tensor | None = None
    cut: Tensor | None = None
    own: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The views of pictures ``[B, C, H, W]``: the same numbers whenever and from wherever the draws come back."""
        if self.boxes is not None:
            x = crop(x, self.boxes, self.flips)
        if self.partner is None:
            return x
        partner = self.partner.to(x.device).long()
        if self.cut is not None:
            top, left, high, wide = self.cut.tolist()
            return cutmix(x, partner, (top, left, high, wide))[0]
        return x if self.own is None else mixup(x, partner, float(self.own))

    def of_batch(self, k: int) -> View:
        """The draws of one batch out of several."""
        return View(*(None if part is None else part[k] for part in self))


@dataclass(frozen=True)
class RandomView:
    """How views are drawn: boxes of at least ``scale`` of the area, flips, and a mixture of the batch with itself in
    another order whose share of its own is uniform in [0, 1]."""

    scale: float = 0.08
    mix: Mix = "cutmix"

    def __call__(self, n: int, rng: Rng) -> View:
        boxes = random_boxes(n, rng, (self.scale, 1.0)).float()  # as they are kept
        view = View(boxes, random_flips(n, rng))
        if self.mix == "none":
            return view
        partner = rng.shuffled(n).int()
        if self.mix == "cutmix":
            return view._replace(partner=partner, cut=torch.tensor(random_mixing_box(rng)))
        return view._replace(partner=partner, own=rng.uniform(1).float()[0])


CUTMIX = RandomView()
AS_THEY_ARE = View()


@dataclass(frozen=True)
class SoftLabels:
    """``S`` batches of ``B`` soft labels: the samples' ``index`` int32 ``[S, B]``, float16 ``logits`` ``[S, B, K]``,
    and the draws of their ``views``, each with S in front.  ValueError for lengths that differ and for logits that
    float16 cannot hold."""

    index: Tensor
    logits: Tensor
    views: View = AS_THEY_ARE

    def __post_init__(self) -> None:
        if self.index.ndim != 2 or self.logits.ndim != 3 or self.logits.shape[:2] != self.index.shape:
            raise ValueError(
                f"soft labels: index {list(self.index.shape)} and logits {list(self.logits.shape)} must be [S, B] and "
                "[S, B, K]"
            )
        if self.logits.dtype != torch.float16 or not bool(self.logits.isfinite().all()):
            raise ValueError("soft labels: logits must be float16 and finite: above 65504 it has no numbers")
        for name, part in self.views._asdict().items():
            if part is not None and len(part) != len(self.index):
                raise ValueError(f"soft labels: {len(part)} batches of '{name}', {len(self.index)} of logits")

    @classmethod
    def column(cls, logits: Tensor, index: Tensor | None = None) -> SoftLabels:
        """Logits ``[n, K]`` of samples as they are, the first n of their data or those of ``index`` ``[n]``."""
        index = torch.arange(len(logits)) if index is None else index
        return cls(index.int()[:, None], logits.half()[:, None])

    @property
    def batches(self) -> int:
        return len(self.index)

    @property
    def batch(self) -> int:
        return self.index.shape[1]

    @property
    def bytes(self) -> int:
        """What they take: indices, draws and logits."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def of_samples(self, n: int) -> Tensor:
        """The logits ``[n, K]`` float32 of the n samples of a data set, where each was labelled once, as it is;
        ValueError where that is not so."""
        index = self.index.flatten().long()
        if any(part is not None for part in self.views):
            raise ValueError("these soft labels are of views: each belongs to a crop, not to a sample")
        if not torch.equal(index.sort().values, torch.arange(n)):
            raise ValueError(f"these soft labels are of {len(index.unique())} samples, not one of each of {n}")
        found = torch.empty(n, self.logits.shape[-1])
        found[index] = self.logits.flatten(0, 1).float()
        return found

    def made(self, pictures: Tensor, k: int) -> Tensor:
        """The views of batch ``k`` of the pictures ``[M, C, H, W]``, uint8 or floats, that were labelled."""
        return self.views.of_batch(k)(as_floats(pictures[self.index[k].long()]))

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a file or beside other tensors."""
        draws = {name: part for name, part in self.views._asdict().items() if part is not None}
        return {PREFIX + name: part for name, part in {"index": self.index, "logits": self.logits, **draws}.items()}

    @staticmethod
    def among(tensors: Mapping[str, Tensor]) -> bool:
        """Whether there are soft labels of this kind among tensors by name."""
        return {PREFIX + "index", PREFIX + "logits"} <= tensors.keys()

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> SoftLabels:
        """What :meth:`tensors` named, out of these and others; ValueError where there are none."""
        if not cls.among(tensors):
            raise ValueError(f"no soft labels among {', '.join(sorted(tensors)) or 'no tensors'}")
        mine = {name.removeprefix(PREFIX): part for name, part in tensors.items() if name.startswith(PREFIX)}
        return cls(mine.pop("index"), mine.pop("logits"), View(**mine))

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_tensors(path, self.tensors())

    @classmethod
    def load(cls, path: Path) -> SoftLabels:
        """Read a file back; FileNotFoundError, or ValueError naming a file that is damaged or holds none."""
        try:
            return cls.of(load_tensors(path))
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


@torch.no_grad()
def label_views(
    pictures: Tensor,
    labeller: Callable[[Tensor], Tensor],
    batches: int,
    batch: int,
    seed: int,
    draw: Callable[[int, Rng], View] = CUTMIX,
) -> SoftLabels:
    """What ``labeller`` (views to logits) says of ``batches`` batches of views of ``pictures`` ``[M, C, H, W]``, uint8
    or floats.

    The pictures are read in epochs, each a permutation of its own; no batch is short, so that one may begin in one
    epoch and end in the next.  Batch k is a function of ``seed`` and k.
    """
    indices, logits, views = [], [], []
    for k in range(batches):
        index = epoch_indices(len(pictures), k * batch, batch, seed)
        view = draw(batch, Rng(seed, "view", k))
        indices.append(index.int())
        views.append(view)
        logits.append(labeller(view(as_floats(pictures[index]))).half().cpu())
    stacked = (None if parts[0] is None else torch.stack(parts) for parts in zip(*views, strict=True))
    return SoftLabels(torch.stack(indices), torch.stack(logits), View(*stacked))


class Replay(Samples):
    """The labelled views of pictures as a data set, one sample a view, in the order in which they were labelled.

    Conditions are the hard ``labels`` ``[M]`` of the pictures, the column "logits" holds the soft ones.  They are read
    in sequence, so that batches of training are those that were labelled.  ValueError for labels of other pictures.
    """

    in_sequence = True

    def __init__(
        self,
        pictures: Tensor,
        labels: Tensor,
        soft: SoftLabels,
        name: str = "soft labels",
        class_names: tuple[str, ...] = (),
    ) -> None:
        self.name, self.pictures, self.labels, self.soft = name, pictures, labels, soft
        self.class_names = class_names
        if len(pictures) != len(labels) or int(soft.index.max()) >= len(pictures):
            raise ValueError(
                f"data '{name}': {len(pictures)} pictures, {len(labels)} labels, and soft labels of picture "
                f"{int(soft.index.max())}: they do not belong together"
            )

    def __len__(self) -> int:
        return self.soft.index.numel()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.pictures.shape[1:])

    @property
    def classes(self) -> int | None:
        return number_of_classes(self.labels, self.class_names)

    def rows(self, indices: Tensor | slice) -> Rows:
        places = torch.arange(len(self))[indices]
        which, slot = places // self.soft.batch, places % self.soft.batch
        x = as_floats(self.pictures[:1]).new_empty(len(places), *self.shape)
        for k in which.unique().tolist():
            mine = which == k
            x[mine] = self.soft.made(self.pictures, k)[slot[mine]]
        return Rows(x, self.conditions(indices), {"logits": self.soft.logits[which, slot].float()})

    def conditions(self, indices: Tensor | slice) -> Tensor:
        return self.labels[self.soft.index.flatten()[indices].long()]

    @classmethod
    def of(cls, condensed: Condensed, name: str = "soft labels") -> Replay:
        """The labelled views of a condensed set that has some among its notes; ValueError where there are none."""
        soft = SoftLabels.of(condensed.notes)
        return cls(condensed.x, condensed.labels, soft, name, condensed.class_names)

    def sha256(self) -> str:
        return digest_of([self.pictures, self.labels], self.soft.tensors())


class Relabelled(Dataset):
    """Samples with hard labels, of which labelled views were kept."""

    def __init__(self, condensed: Condensed, name: str) -> None:
        super().__init__(name, condensed.x, condensed.labels, condensed.class_names)
        object.__setattr__(self, "labelled_views", Replay.of(condensed, name))


def data_of(condensed: Condensed, name: str) -> Dataset:
    """A condensed set as data to train on, with its labelled views where there are any."""
    return Relabelled(condensed, name) if SoftLabels.among(condensed.notes) else condensed.dataset(name)
