"""PCA: prune, combine, augment (Xiao et al. 2025, arXiv 2502.06434), a small training set with hard labels only.

*Prune*: every example is scored by EL2N, ``s = mean over nets of ||softmax(z(x)) - y||_2`` early in training, and of
every class the ``k^2 per_class`` examples with the lowest scores are kept, ranked among all of the class.  *Combine*:
``k^2`` whole pictures of one class are shrunk and tiled into one canvas of the original size.  *Augment*: training
looks at a random crop of one cell of a canvas at a time, so that a canvas costs a step what a picture does.

With few pictures a class easy ones are best, with many the hard ones: ``keep`` says which.  Pictures that have a
canvas to themselves (``k=1``) are looked at whole; chosen at random, they are the random subset that others must beat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import nn

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.canvases import check_cells, combine
from fewstep.condense.scores import Scores
from fewstep.condense.select import class_sizes, members, select
from fewstep.condense.supervised import accuracy_of, labels_in, nll
from fewstep.condense.whole import Whole
from fewstep.data.condensed import Condensed, to_pictures
from fewstep.data.views import Views
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.start import Start
from fewstep.ranges import Count, NonNegative


@dataclass(frozen=True)
class PCA(Method):
    """Easy pictures, several on a canvas, seen one at a time."""

    name: ClassVar[str] = "pca"
    paper: ClassVar[Paper] = Paper(
        "Rethinking Large-scale Dataset Compression: Shifting Focus From Labels to Images", "2502.06434",
        "reconstructed",
        ("the authors' code holds their benchmark and not this method, which is built from notes on the paper's second "
         "version",
         "how many cells a canvas has is not published where we could read it: two by two, as in RDED, beside which "
         "it is shown",
         "how long and how many networks train before they score is not published where we could read it: three of "
         "four epochs, with which easy and hard were told apart on digits",
         "the networks train together, each batch in all of them, from weights of their own",
         "crops show at least half of a cell's area; the paper's share is not known"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "PCA", 2025, "condense", "labelled data", "-",
        "keeps easy pictures, several on a canvas, and trains on one at a time with hard labels", real="pca_real",
    )  # fmt: skip
    task = "classification"
    healthy: ClassVar[dict[str, str]] = {
        "scorers/loss": "a sum over the networks: falls; near 0 in the end, small differences tell what is easy",
        "scorers/accuracy": "rises far above chance; below that all examples look alike and the choice is a random one",
    }

    per_class: Annotated[Count, "canvases of each class"] = 10
    k: Annotated[Count, "cells along a side of a canvas; 1 keeps pictures as they are"] = 2
    keep: Annotated[Literal["easy", "hard", "random"], "which pictures of a class are kept"] = "easy"
    upright: Annotated[bool, "training never mirrors what it looks at, as digits and letters must not be"] = False
    epochs: Annotated[Count, "passes over the data before the networks score them, within the budget"] = 4
    nets: Annotated[Count, "networks whose scores are averaged"] = 3
    lr: Annotated[NonNegative, "learning rate of the networks that score"] = 0.1

    def networks(self, start: Start) -> Networks:
        whole = Whole(start)
        check_cells(self.k, start.data.shape)
        class_sizes(whole.labels())
        members(whole.labels(), whole.classes, self.per_class * self.k**2)
        like: Any = start.teacher
        kind = next(like.parameters()).dtype
        scorers = nn.ModuleList(
            NetworkClassifier(start.fresh(like.net, i).to(kind), like.shape, like.classes) for i in range(self.nets)
        )
        group = Optimizer(("scorers",), self.lr, kind="sgd", momentum=0.9, nesterov=True)
        return Networks({"scorers": scorers, "whole": whole}, {"scorers": group})

    def enough(self, nets: Networks, progress: Progress) -> bool:
        return progress.samples >= self.epochs * len(nets.whole.data)

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        labels = labels_in(batch)
        logits = [net(batch.x) for net in nets.scorers]
        right = torch.stack([accuracy_of(z, labels) for z in logits]).mean()
        # a sum: no network's gradient depends on how many there are
        yield Update("scorers", torch.stack([nll(z, labels) for z in logits]).sum(), {"accuracy": right})

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        """Nothing: no stage comes after, and :meth:`student` is not to be made twice."""
        return {}

    def student(self, nets: Networks) -> Condensed:
        """The canvases.  Notes: ``index`` ``[M, k * k]``, where in the data the cells come from, and ``scores``
        ``[N]`` of all of the data."""
        whole: Whole = nets.whole
        scores = whole.start.store(Scores(tuple(nets.scorers), whole.data, "el2n")).x[:, 0]
        rng, count = whole.rng("random subset"), self.per_class * self.k**2
        chosen = select(scores, whole.labels(), count, self.keep, rng, whole.classes)
        index = chosen.reshape(-1, self.k**2)
        cells = whole.data.rows(index.flatten()).x
        assert cells is not None, "scored data have pictures"
        canvases = combine(to_pictures(cells).unflatten(0, index.shape))
        return Condensed(
            canvases,
            torch.arange(whole.classes).repeat_interleave(self.per_class),
            whole.data.class_names,
            views=Views("cells", self.k, self.upright) if self.k > 1 else Views(),
            notes={"index": index, "scores": scores.float()},
        )
