"""The quality of a set of samples, in one record."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.metrics.classes import accuracy, diversity
from fewstep.metrics.estimates import Estimate, jackknife, real_against_real
from fewstep.metrics.features import Features
from fewstep.metrics.frechet import frechet_distance, principal_directions
from fewstep.metrics.kernel import kernel_estimate
from fewstep.metrics.manifold import density_coverage, precision_recall
from fewstep.metrics.memorisation import Memorisation, memorisation
from fewstep.randomness import Rng

FLOOR_SETS = 5  # the floor is the mean over up to so many sets of real samples


@dataclass(frozen=True)
class Quality:
    """What :class:`Evaluator` found.

    ``frechet`` and ``kernel`` carry the standard error of drawing other samples; ``floor`` is the Fréchet distance
    of as many real training samples from the reference, which a perfect model scores.  ``diversity`` is that of the
    samples over that of the reference.  ``accuracy`` is None without labels or without a classifier,
    ``directions`` None where the Fréchet distance was taken in all features.
    """

    frechet: Estimate
    floor: Estimate
    kernel: Estimate
    precision: float
    recall: float
    density: float
    coverage: float
    diversity: float
    accuracy: float | None
    memorisation: Memorisation
    n: int
    features: str
    directions: int | None
    reference: str

    def to_json(self) -> str:
        """One JSON object; NaN and infinity are refused."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Quality:
        """What :meth:`to_json` wrote."""
        fields = json.loads(text)
        for name in ("frechet", "floor", "kernel"):
            fields[name] = Estimate(**fields[name])
        return cls(**fields | {"memorisation": Memorisation(**fields["memorisation"])})


class Evaluator:
    """Measures any number of sample sets against held-out data ``reference`` in ``features``; what depends on real
    data alone is computed once.

    Features of more than ``directions`` dimensions are projected on so many principal directions of the reference for
    the Fréchet distance.  Memorisation is measured in the samples' own values (pixels), against ``train``.  ``seed``
    draws the jackknife groups and the real samples of the floor.
    """

    def __init__(
        self, reference: Dataset, train: Dataset, features: Features, directions: int = 64, seed: int = 0
    ) -> None:
        self.reference, self.train, self.features, self.seed = reference, train, features, seed
        self.real = features(reference)
        self.basis: Tensor | None = None
        if self.real.shape[1] > directions:
            self.basis = principal_directions(self.real, directions)
        self.floors: dict[int, Estimate] = {}

    def __call__(self, samples: Tensor, labels: Tensor | None = None) -> Quality:
        """The quality of ``samples [n, ...]``; ``labels [n]`` are the classes that were asked for, or None.

        Samples of uint8 data are clamped to [-1, 1], as saving them would do.
        """
        check_samples(samples, labels, self.reference)
        samples = samples.cpu().clamp(-1, 1) if self.reference.x.dtype == torch.uint8 else samples.cpu()
        labels = None if labels is None else labels.cpu()
        n, real, ours = len(samples), self.real, self.features(samples)
        logits = self.features.classify(ours)
        target = self.project(real)
        precision, recall = precision_recall(ours, real)
        density, coverage = density_coverage(ours, real)
        spread = diversity(real, None if labels is None else self.reference.labels)
        return Quality(
            frechet=jackknife(
                lambda rows: frechet_distance(rows, target), self.project(ours), Rng(self.seed, "jackknife")
            ),
            floor=self.floor(n),
            kernel=kernel_estimate(ours, real),
            precision=precision,
            recall=recall,
            density=density,
            coverage=coverage,
            diversity=diversity(ours, labels) / spread,
            accuracy=None if labels is None or logits is None else accuracy(logits, labels),
            memorisation=memorisation(samples, self.train.read(slice(None)), self.reference.read(slice(0, n))),
            n=n,
            features=self.features.id,
            directions=None if self.basis is None else self.basis.shape[1],
            reference=f"{self.reference.name} ({len(self.reference)})",
        )

    def floor(self, n: int) -> Estimate:
        """The Fréchet distance of ``n`` real training samples from the reference, over up to five sets of them."""
        if n not in self.floors:
            rng = Rng(self.seed, "floor", n)
            fresh = self.features(self.train.subset(rng.shuffled(len(self.train))[: FLOOR_SETS * n]))
            self.floors[n] = real_against_real(frechet_distance, self.project(fresh), self.project(self.real), n, rng)
        return self.floors[n]

    def project(self, features: Tensor) -> Tensor:
        """Features as the Fréchet distance takes them."""
        return features if self.basis is None else features @ self.basis


def evaluate(
    samples: Tensor,
    labels: Tensor | None,
    reference: Dataset,
    train: Dataset,
    features: Features,
    directions: int = 64,
    seed: int = 0,
) -> Quality:
    """One call of an :class:`Evaluator`; keep the Evaluator to measure several sets of samples."""
    return Evaluator(reference, train, features, directions, seed)(samples, labels)


def check_samples(samples: Tensor, labels: Tensor | None, reference: Dataset) -> None:
    """Raises ValueError for samples that cannot be measured."""
    if tuple(samples.shape[1:]) != reference.shape:
        raise ValueError(f"samples of shape {list(samples.shape[1:])}, '{reference.name}' has {list(reference.shape)}")
    if len(samples) < 20:
        raise ValueError(f"{len(samples)} samples: at least 20 are needed, a few thousand for numbers worth comparing")
    if not bool(torch.isfinite(samples).all()):
        bad = int((~torch.isfinite(samples.flatten(1)).all(dim=1)).nonzero()[0])
        raise ValueError(f"sample {bad} holds NaN or infinity: nothing to measure")
    if labels is not None and labels.shape != (len(samples),):
        raise ValueError(f"{len(samples)} samples need labels [{len(samples)}], got shape {list(labels.shape)}")
