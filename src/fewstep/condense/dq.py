"""Dataset Quantization (Zhou et al. 2023, arXiv 2308.10524): a subset, and a part of each picture, for any network.

One greedy selection of the most representative examples puts too much weight on where data are dense.  Here the whole
data set is cut into *bins* by such selections, each of what those before left, and an equal share of each bin is kept::

    features   the gradient of the loss in a classifier's last layer, [dL/dz ; dL/dz (x) h]
    bins       greedy selection by GraphCut of (1 + cos) / 2, of each class, N / bins examples at a time
    keep       a share of every bin, uniformly
    patches    the share mask_ratio of a picture's patches where the classifier sees its class least (Grad-CAM++) is
               dropped, and filled in by a masked autoencoder for training

With one bin this is uniform sampling, and with ``1 / keep`` bins of which only the first is kept it would be classical
GraphCut.  Bins and shares need no classifier: any features ``[N, d]`` will do, as in
``across_bins(bins(cosine(features), 10, labels), labels, 0.125, Rng(0))``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.graph_cut import bins, cosine, inner_product
from fewstep.condense.scores import softmax_error, softmax_twice_error
from fewstep.condense.select import budgets, class_sizes, random_counts, stratified
from fewstep.condense.supervised import accuracy_of, labels_in, nll
from fewstep.condense.whole import CHUNK, Whole
from fewstep.data.condensed import Condensed, to_pictures
from fewstep.data.dataset import Samples, as_floats
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.start import Start
from fewstep.networks.cam import class_map, on_grid
from fewstep.networks.mae import MaskedAutoencoder, least_important, number_dropped, random_drops
from fewstep.randomness import Rng
from fewstep.ranges import Count, NonNegative, Positive, Share

CLASSIFIER, AUTOENCODER, WHOLE = "classifier", "autoencoder", "whole"
#: The gradient of a loss in the logits, from logits ``[B, K]`` and labels ``[B]``, by what the loss is of.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"logits": softmax_error, "softmax": softmax_twice_error}


def across_bins(bin_of: Tensor, labels: Tensor, share: float, rng: Rng) -> Tensor:
    """The kept examples, int64, ascending: ``share`` of all, of each class in proportion to its size, spread over the
    bins ``bin_of`` ``[N]`` so that every example of a class has the same chance.

    Of a bin of a class that is its share rounded up or down, at random: there is no rounding that favours some bins.
    """
    wanted, count = budgets(labels, round(share * len(labels))), int(bin_of.max()) + 1
    cells = labels * count + bin_of
    sizes = class_sizes(cells)
    sizes = nn.functional.pad(sizes, (0, count * len(wanted) - len(sizes))).view(-1, count)
    each = torch.cat([random_counts(row, total, rng) for row, total in zip(sizes, wanted.tolist(), strict=True)])
    return stratified(cells, each[: int(cells.max()) + 1], rng).sort().values


def text_bins(texts: Sequence[str], count: int) -> Tensor:
    """The bins ``[N]`` of texts, by the inner products of their TF-IDF vectors over runs of three characters.

    A stand-in for the embeddings by which the paper bins instructions.  ImportError where scikit-learn is missing.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ModuleNotFoundError as error:
        raise ImportError("binning texts needs scikit-learn: pip install fewstep[condense]") from error
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3)).fit_transform(texts)
    return bins(inner_product(torch.from_numpy(vectors.toarray())), count)


@dataclass(frozen=True)
class DatasetQuantization(Method):
    """Keeps a share of every bin, and of each kept picture the patches that show its class."""

    name: ClassVar[str] = "dq"
    paper: ClassVar[Paper] = Paper(
        "Dataset Quantization", "2308.10524", "verified",
        ("the classifier whose gradients are the features is trained on the data themselves for `feature_epochs`; the "
         "official code takes one trained on ImageNet and enlarges the pictures for it; 0 takes the one that is given "
         "as it is",
         "`loss` is the cross-entropy of the logits; the official code computes, as DeepCore does, that of their "
         "softmax taken as logits (`--loss softmax`)",
         "bins of a class differ in size by one at most; the official code rounds, and the last bin takes the slack",
         "how many are kept of a bin whose share is no whole number is drawn at random, so that all examples have the "
         "same chance; the official code rounds",
         "the similarity of a zero gradient with everything is 1/2; the official code divides by 0",
         "the masked autoencoder is small, for small pictures (`patch_size`, `autoencoder_width`, "
         "`autoencoder_depth`), and trained here with as many patches dropped as later, instead of MAE's ViT-L with a "
         "GAN loss; of patches of equal importance any may be dropped",
         "only the kept pictures are reconstructed, and `stored` counts what their patches take"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "Dataset Quantization", 2023, "condense", "labelled data", "-",
        "bins of diverse samples, sampled evenly, with patches dropped", real="dq_real",
    )  # fmt: skip
    task = "classification"
    healthy: ClassVar[dict[str, str]] = {
        "classifier/loss": "falls while it trains, a pass over the data or what `feature_epochs` says",
        "classifier/accuracy": "rises far above chance: the gradients of a network that knows nothing tell little",
        "autoencoder/loss": "falls below the variance of a pixel, which the mean picture has",
    }

    keep: Annotated[Share, "share of the examples that is kept"] = 0.125
    bins: Annotated[Count, "bins that each class is cut into; 1 samples uniformly"] = 10
    mask_ratio: Annotated[Share, "share of the patches of a kept picture that is dropped and filled in again"] = 0.2
    loss: Annotated[
        Literal["logits", "softmax"], "what the loss behind the features is of; softmax as the official code has it"
    ] = "logits"
    feature_epochs: Annotated[
        NonNegative, "passes over the data that the classifier trains for, within the budget; 0 takes it as it is"
    ] = 1.0
    feature_lr: Annotated[Positive, "learning rate of the classifier"] = 0.1
    patch_size: Annotated[Count, "side of a patch, which must divide that of the pictures"] = 4
    autoencoder_width: Annotated[Count, "features of the autoencoder"] = 64
    autoencoder_depth: Annotated[Count, "blocks of its encoder"] = 3
    autoencoder_lr: Annotated[Positive, "learning rate of the autoencoder"] = 3e-3

    def networks(self, start: Start) -> Networks:
        whole, classifier = Whole(start), start.network()
        if not int(budgets(whole.labels(), round(self.keep * len(start.data))).sum()):
            raise ValueError(f"keep={self.keep:g} of {len(start.data)} examples keeps none")
        modules = {CLASSIFIER: classifier, WHOLE: whole}
        # the official code's for a classifier that it trains itself
        groups = {
            CLASSIFIER: Optimizer(
                (CLASSIFIER,), self.feature_lr, kind="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4
            )
        }
        if self.mask_ratio > 0:
            autoencoder = MaskedAutoencoder(
                picture_shape(start.data), self.patch_size, self.autoencoder_width, self.autoencoder_depth
            )
            number_dropped(autoencoder.length, self.mask_ratio)
            importance(classifier, torch.zeros(1, *start.data.shape), autoencoder.grid)
            modules[AUTOENCODER] = autoencoder
            groups[AUTOENCODER] = Optimizer(
                (AUTOENCODER,),
                self.autoencoder_lr,
                kind="adamw",
                betas=(0.9, 0.95),
                weight_decay=0.05,
                warmup=20,
                decay="cosine",
            )
        return Networks(modules, groups)

    def learning(self, nets: Networks, progress: Progress) -> bool:
        """Whether the classifier still trains."""
        return progress.samples < self.feature_epochs * len(nets.whole.data)

    def enough(self, nets: Networks, progress: Progress) -> bool:
        """Without an autoencoder, which trains for all of the budget, there is nothing to do after the classifier."""
        return self.mask_ratio == 0 and not self.learning(nets, progress)

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        if self.learning(nets, progress):
            labels = labels_in(batch)
            logits = nets.classifier(batch.x)
            yield Update(CLASSIFIER, nll(logits, labels), {"accuracy": accuracy_of(logits, labels)})
        if self.mask_ratio > 0:
            length = nets.autoencoder.length
            dropped = random_drops(batch.n, length, number_dropped(length, self.mask_ratio), batch.rng)
            yield Update(AUTOENCODER, nets.autoencoder.loss(batch.x, dropped))

    def bins_of(self, classifier: NetworkClassifier, whole: Whole) -> Tensor:
        """The bin of every example ``[N]``, from the gradients of the classifier's last layer: of ``dL/dz (x) [1 ; h]``
        only the two factors are kept."""
        labels, where = whole.labels(), torch.arange(len(whole.data))
        slopes, hidden = [], []
        for x, y in zip(whole.chunks(where), labels.split(CHUNK), strict=True):
            features, logits = classifier.read(x.to(device_of(classifier)))
            slopes.append(LOSSES[self.loss](logits.cpu(), y))
            hidden.append(nn.functional.pad(features.cpu().double(), (1, 0), value=1.0))
        return bins(cosine(torch.cat(slopes), torch.cat(hidden)), self.bins, labels)

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        """Nothing: no stage comes after, and :meth:`student` is not to be made twice."""
        return {}

    @torch.no_grad()
    def student(self, nets: Networks) -> Condensed:
        """The kept pictures, with their holes filled in.  Notes: ``kept`` ``[M]``, where in the data they are;
        ``bin`` ``[N]`` of every example; ``dropped`` ``[M, L]``, the patches that are not stored."""
        whole: Whole = nets.whole
        labels, bin_of = whole.labels(), self.bins_of(nets.classifier, whole)
        kept = across_bins(bin_of, labels, self.keep, whole.rng("dq", "keep"))
        x, notes = torch.cat([*whole.chunks(kept)]), {"kept": kept, "bin": bin_of}
        shown, share_stored = x, 1.0
        if self.mask_ratio > 0:
            autoencoder: MaskedAutoencoder = nets.autoencoder
            rng, count = whole.rng("dq", "patches"), number_dropped(autoencoder.length, self.mask_ratio)
            filled, dropped = [], []
            for part in x.split(CHUNK):
                there = part.to(device_of(autoencoder))
                rated = importance(nets.classifier, there, autoencoder.grid)
                dropped.append(least_important(rated.flatten(1).cpu(), count, rng))
                filled.append(autoencoder.filled(there, dropped[-1].to(there.device)).cpu())
            shown, notes["dropped"] = torch.cat(filled), torch.cat(dropped)
            share_stored = 1 - count / autoencoder.length
        if torch.equal(as_floats(to_pictures(x)), x):  # pictures that were bytes are bytes again
            shown = to_pictures(shown)
        return Condensed(
            shown, labels[kept], whole.data.class_names, classes=nets.classifier.classes, notes=notes,
            stored=bytes_stored(shown, share_stored, notes, nets.classifier.classes),
        )  # fmt: skip


def importance(classifier: NetworkClassifier, pictures: Tensor, grid: tuple[int, int]) -> Tensor:
    """How much each patch of a ``grid`` shows of the class that the classifier tells: ``[B, rows, columns]``.

    ValueError for a network that shows no map of places.
    """
    try:
        return on_grid(class_map(classifier.net, pictures), grid)
    except ValueError as error:
        raise ValueError(f"{error}: choose another, or mask_ratio=0") from None


def bytes_stored(shown: Tensor, share: float, notes: dict[str, Tensor], classes: int) -> int:
    """What is to be kept of pictures ``[M, *shape]`` of which the ``share`` of patches is stored: those, a bit a patch
    that says which they are, and a byte a label up to 256 classes."""
    pixels = round(share * shown[0].numel()) * shown.element_size()
    mask = math.ceil(notes["dropped"].shape[1] / 8) if "dropped" in notes else 0
    return len(shown) * (pixels + mask + (1 if classes <= 256 else 8))


def picture_shape(data: Samples) -> tuple[int, int, int]:
    """The shape ``(C, H, W)`` of pictures; ValueError for other samples."""
    if len(data.shape) != 3:
        raise ValueError(
            f"data '{data.name}' have samples {list(data.shape)}, which have no patches: choose mask_ratio=0"
        )
    channels, height, width = data.shape
    return channels, height, width


def device_of(net: nn.Module) -> torch.device:
    """Where a network is."""
    return next(net.parameters()).device
