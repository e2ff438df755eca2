"""Dataset Quantization: samples across bins, features without making them, and what a condensed set holds."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.dq import LOSSES, DatasetQuantization, Whole, across_bins, importance, text_bins
from fewstep.condense.graph_cut import bins, cosine, greedy, inner_product
from fewstep.condense.scores import gradient_features
from fewstep.condense.select import budgets, stratified
from fewstep.data import Dataset
from fewstep.data.condensed import Condensed
from fewstep.data.dataset import as_floats
from fewstep.methods.method import Batch, Networks, Progress, Update, alone
from fewstep.methods.start import Start
from fewstep.networks.classifiers import ConvNet, MLPClassifier
from fewstep.networks.mae import number_dropped
from fewstep.randomness import Rng
from fewstep.report.pictures import sheet
from fewstep.report.tasks.dq import GREY, figures, spread_of
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "dq.md"

# magic-research/Dataset_Quantization: quantize_sample.py (bins, the training of a classifier for selection),
# quantize_bin.py (0.125 in the README), quantize_pixel.py (mask_ratio) and mae_models.py (patch, width, depth of ViT-L)
PUBLISHED = {
    "keep": 0.125, "bins": 10, "mask_ratio": 0.2, "loss": "softmax", "feature_epochs": 0.0, "feature_lr": 0.1,
    "patch_size": 16, "autoencoder_width": 1024, "autoencoder_depth": 24, "autoencoder_lr": ...,
    "optimizer": dict.fromkeys(("kind", "betas", "eps", "weight_decay", "clip", "warmup", "decay"), ...),
}  # fmt: skip

SHAPE, CLASSES, N = (1, 8, 8), 3, 90
SMALL: dict[str, Any] = {"patch_size": 2, "autoencoder_width": 16, "autoencoder_depth": 1, "bins": 4}
LABELS = torch.arange(N) % CLASSES


def data(cond: Tensor | None = LABELS) -> Dataset:
    gen = torch.Generator().manual_seed(0)
    return Dataset("pictures", torch.randint(0, 256, (N, *SHAPE), generator=gen, dtype=torch.uint8), cond)


def teacher(net: nn.Module | None = None) -> NetworkClassifier:
    torch.manual_seed(0)
    return NetworkClassifier(net or ConvNet(SHAPE, CLASSES, width=4, depth=1), SHAPE, CLASSES).eval()


def networks(method: DatasetQuantization, seed: int = 0) -> Networks:
    torch.manual_seed(1)
    return method.networks(Start(teacher(), data(), seed)).eval()


def made(seed: int = 0, **fields: Any) -> Condensed:
    method = DatasetQuantization(**{**SMALL, **fields})
    return method.student(networks(method, seed))


@pytest.fixture(scope="module")
def usual() -> Condensed:
    return made(keep=0.4)


def test_every_bin_gives_its_share_and_every_example_has_the_same_chance() -> None:
    """2,000 draws: counts of a bin of a class are its share rounded up or down, those of the class exact, and every
    frequency within four and a half standard errors of the share (100 of them)."""
    gen = torch.Generator().manual_seed(2)
    labels, bin_of = torch.arange(100) % 2, torch.randint(0, 7, (100,), generator=gen)
    rng, seen = Rng(0), torch.zeros(100)
    for _ in range(2000):
        kept = across_bins(bin_of, labels, 0.24, rng)
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert torch.bincount(labels[kept]).tolist() == [12, 12]
        for name in range(2):
            sizes, counts = (
                torch.bincount(bin_of[i], minlength=7) for i in (labels == name, kept[labels[kept] == name])
            )
            assert bool(((counts - 0.24 * sizes).abs() < 1).all())
        seen[kept] += 1
    assert float((seen / 2000 - 0.24).abs().max()) < 4.5 * (0.24 * 0.76 / 2000) ** 0.5


def test_one_bin_is_uniform_sampling_and_a_share_of_1_is_everything() -> None:
    gen = torch.Generator().manual_seed(3)
    one, many = torch.zeros(N, dtype=torch.int64), torch.randint(0, 5, (N,), generator=gen)
    for share in (0.0, 0.1, 0.5):
        kept = across_bins(one, LABELS, share, Rng(1))
        expected = stratified(LABELS, budgets(LABELS, round(share * N)), Rng(1)).sort().values
        assert torch.equal(kept, expected)
    assert across_bins(many, LABELS, 1.0, Rng(1)).tolist() == list(range(N))


def test_bins_that_a_class_does_not_reach_give_nothing() -> None:
    """The last class has fewer examples than there are bins."""
    labels, bin_of = torch.tensor([0] * 6 + [1] * 2), torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
    kept = across_bins(bin_of, labels, 0.5, Rng(0))
    assert torch.bincount(labels[kept]).tolist() == [3, 1]


@pytest.mark.parametrize("loss", LOSSES)
def test_bins_are_those_of_the_gradients_in_the_last_layer(loss: str) -> None:
    """Of the gradients themselves, which the method does not make; and of those that autograd finds."""
    method = DatasetQuantization(**SMALL, loss=loss)
    nets = networks(method)
    x, head = data().read(slice(None)), nets.classifier.head
    features, logits = nets.classifier.read(x)
    found = method.bins_of(nets.classifier, nets.whole)
    explicit = gradient_features(logits, features, LABELS, LOSSES[loss])
    assert torch.equal(found, bins(cosine(explicit), 4, LABELS))
    nets.classifier.requires_grad_(True)
    for i in range(3):
        z = nets.classifier(x[i : i + 1])
        told = z if loss == "logits" else z.softmax(1)
        slopes = torch.autograd.grad(nn.functional.cross_entropy(told, LABELS[i : i + 1]), [head.bias, head.weight])
        assert torch.allclose(torch.cat([s.flatten() for s in slopes]).double(), explicit[i], atol=1e-6)


def test_the_losses_bin_otherwise_and_so_does_another_classifier() -> None:
    first, second = (made(mask_ratio=0.0, loss=loss).notes["bin"] for loss in LOSSES)
    assert not torch.equal(first, second)


def test_kept_pixels_are_untouched_and_the_dropped_ones_are_as_many_as_said(usual: Condensed) -> None:
    kept, dropped = usual.notes["kept"], usual.notes["dropped"]
    assert usual.x.dtype == torch.uint8 and len(kept) == 36 and torch.equal(usual.labels, LABELS[kept])
    assert dropped.shape == (36, 16) and bool((dropped.sum(1) == 16 - int(16 * 0.8)).all())
    pixels = dropped.view(36, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    original = data().x[kept]
    assert torch.equal(usual.x[~pixels], original[~pixels]) and bool((usual.x[pixels] != original[pixels]).any())


def test_the_patches_of_least_importance_are_dropped(usual: Condensed) -> None:
    method = DatasetQuantization(**SMALL)
    nets = networks(method)
    rated = importance(nets.classifier, data().read(usual.notes["kept"]), (4, 4)).flatten(1)
    dropped = usual.notes["dropped"]
    highest = torch.where(dropped, rated, -1.0).amax(1)
    assert bool((highest <= torch.where(dropped, torch.inf, rated).amin(1)).all())
    assert float(rated.amax()) > 0


def test_it_takes_the_bytes_of_what_is_stored(usual: Condensed) -> None:
    """12 of 16 patches of 4 pixels, 16 bits that say which, and a label; the whole picture without a mask; floats by
    their size."""
    assert usual.bytes() == 36 * (48 + 2 + 1)
    assert made(mask_ratio=0.0, keep=0.4).bytes() == 36 * (64 + 1)
    method = DatasetQuantization(**SMALL, mask_ratio=0.0)
    floats = dataclasses.replace(data(), x=torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(1)))
    whole = method.student(method.networks(Start(teacher(), floats)))
    assert whole.bytes() == len(whole.x) * (4 * 64 + 1) and torch.equal(whole.x, floats.x[whole.notes["kept"]])


def test_without_a_mask_pictures_are_themselves_and_with_all_kept_the_data_are() -> None:
    assert torch.equal(made(mask_ratio=0.0, keep=1.0).x, data().x)
    one = made(mask_ratio=0.0, keep=0.3, bins=1, seed=4)
    expected = stratified(LABELS, budgets(LABELS, 27), Rng(4, "dq", "keep")).sort().values
    assert torch.equal(one.notes["kept"], expected) and "dropped" not in one.notes


def test_what_is_kept_depends_on_the_seed_and_nothing_else() -> None:
    first, again, other = made(keep=0.4), made(keep=0.4), made(keep=0.4, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), again.buffers(), strict=True))
    assert not torch.equal(first.notes["kept"], other.notes["kept"])
    assert torch.equal(first.notes["bin"], other.notes["bin"])


def groups(method: DatasetQuantization, samples: int) -> list[Update]:
    nets = networks(method)
    batch = Batch(data().read(slice(0, 8)), LABELS[:8], Rng(0))
    return list(alone(method.updates(nets, batch, Progress(samples=samples))))


def test_the_classifier_trains_for_its_epochs_and_the_autoencoder_always() -> None:
    method = DatasetQuantization(**SMALL, feature_epochs=2.0)
    assert [u.group for u in groups(method, 2 * N - 1)] == ["classifier", "autoencoder"]
    assert [u.group for u in groups(method, 2 * N)] == ["autoencoder"]
    assert [u.group for u in groups(dataclasses.replace(method, feature_epochs=0.0), 0)] == ["autoencoder"]


def test_without_an_autoencoder_training_ends_with_the_classifiers() -> None:
    """With one it takes all of the budget."""
    for mask_ratio in (0.0, 0.2):
        method = DatasetQuantization(**SMALL, feature_epochs=2.0, mask_ratio=mask_ratio)
        nets = networks(method)
        ended = [method.enough(nets, Progress(samples=samples)) for samples in (0, 2 * N - 1, 2 * N)]
        assert ended == [False, False, mask_ratio == 0]


def test_with_no_epochs_the_classifier_is_the_one_that_was_given() -> None:
    given = teacher()
    held = DatasetQuantization(**SMALL, feature_epochs=0.0).networks(Start(given, data())).classifier
    assert all(torch.equal(a, b) for a, b in zip(given.parameters(), held.parameters(), strict=True))
    assert all(a is not b for a, b in zip(given.parameters(), held.parameters(), strict=True))


def test_a_given_classifier_is_not_trained_and_the_bins_are_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run without a step: its bins are those of the classifier that was brought, and it can be repeated."""
    method, given, asked = DatasetQuantization(**SMALL, mask_ratio=0.0, feature_epochs=0.0), teacher(), []
    bins_of = DatasetQuantization.bins_of

    def counted(self: DatasetQuantization, classifier: NetworkClassifier, whole: Whole) -> Tensor:
        asked.append(classifier)
        return bins_of(self, classifier, whole)

    monkeypatch.setattr(DatasetQuantization, "bins_of", counted)
    for repeated in range(2):
        settings = Settings(Budget(9), batch=30, precision="fp32")
        done = run_recipe(method, given, data(), settings, tmp_path / "run", show=False)
        assert done.steps == 0 and len(asked) == 1 + repeated
        assert torch.equal(done.model.notes["bin"], bins_of(method, given, Whole(Start(given, data()))))


def test_the_data_are_beside_the_networks_and_not_in_what_is_saved() -> None:
    nets = networks(DatasetQuantization(**SMALL))
    assert not nets.state("whole") and len(nets.whole.data) == N
    assert [len(part) for part in nets.whole.chunks(torch.arange(N))] == [N]


TEXTS = [
    "the cat sat on the mat", "a cat sat on a mat", "the cats sat on mats", "stock prices fell sharply today",
    "prices of stocks fall today", "the price of a stock rose", "rain is expected in the north",
    "expect rain and wind in the north", "wind and rain are expected",
]  # fmt: skip


def test_texts_are_binned_by_their_runs_of_characters() -> None:
    """A partition, whose first bin is what GraphCut picks by the TF-IDF vectors: not three sentences of one kind."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    found = text_bins(TEXTS, 3)
    assert torch.bincount(found).tolist() == [3, 3, 3]
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3)).fit_transform(TEXTS).toarray()
    first = greedy(inner_product(torch.from_numpy(vectors)), 3)
    assert sorted(first.tolist()) == (found == 0).nonzero()[:, 0].tolist()


def test_features_of_any_make_are_binned_as_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    """The example of the page prints what it says: a tenth of the digits, of every class its part."""
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(example, names := {})
    assert capsys.readouterr().out == "".join(f"{said}\n" for said in re.findall(r"# (.*)", example))
    labels, kept = names["labels"], names["kept"]
    assert torch.equal(torch.bincount(labels[kept]), budgets(labels, 130))


@pytest.mark.parametrize(
    ("fields", "start", "message"),
    [
        ({}, lambda: Start(teacher(), data(None)), "has no labels"),
        ({}, lambda: Start(teacher(), data(LABELS - 1)), "label -1"),
        ({}, lambda: Start(teacher(MLPClassifier(SHAPE, CLASSES)), data()), "no map of places.*or mask_ratio=0"),
        ({"keep": 0.005}, lambda: Start(teacher(), data()), "keep=0.005 of 90 examples keeps none"),
        ({"patch_size": 3}, lambda: Start(teacher(), data()), "patch=3 must divide"),
        ({"mask_ratio": 0.99}, lambda: Start(teacher(), data()), "leaves none to see"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(fields: Any, start: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatasetQuantization(**{**SMALL, **fields}).networks(start())


def test_samples_of_any_shape_can_be_kept_whole() -> None:
    shape = (5,)
    points = Dataset("points", torch.randn(30, 5, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3)
    net = NetworkClassifier(MLPClassifier(shape, 3, width=8), shape, 3)
    method = DatasetQuantization(bins=2, keep=0.5, mask_ratio=0.0)
    assert method.student(method.networks(Start(net, points))).x.shape == (15, 5)
    with pytest.raises(ValueError, match="no patches: choose mask_ratio=0"):
        dataclasses.replace(method, mask_ratio=0.2).networks(Start(net, points))


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch, usual: Condensed) -> None:
    """Looking at 7 samples at a time makes the same choice."""
    from fewstep.condense import dq, whole

    for module in (dq, whole):
        monkeypatch.setattr(module, "CHUNK", 7)
    small = made(keep=0.4)
    assert torch.equal(small.notes["bin"], usual.notes["bin"]) and torch.equal(small.notes["kept"], usual.notes["kept"])
    assert number_dropped(16, 0.2) == 4 and isinstance(networks(DatasetQuantization(**SMALL)).whole, Whole)


def test_the_report_shows_bins_their_numbers_and_what_is_stored(usual: Condensed) -> None:
    """Rows of bins by columns of classes, a row of the table a bin, three rows of ten pictures; without patches two of
    the figures, and of points the table alone."""
    found = figures(None, usual, data())  # type: ignore[arg-type]
    rows = re.findall("<tr><td>(.*?)</td></tr>", str(found[1].content))
    lines = [row.split("</td><td>") for row in rows]
    assert [line[0] for line in lines] == ["1", "2", "3", "4"]
    assert sum(int(line[1]) for line in lines) == N and sum(int(line[2]) for line in lines) == len(usual.x)
    some = torch.arange(0, 30, 3)
    original = data().read(usual.notes["kept"][some])
    holes = usual.notes["dropped"][some].view(10, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    shown = torch.cat([original, torch.where(holes, GREY, original), as_floats(usual.x[some])])
    assert found[2].content == sheet(shown, 10)
    first = [
        int(((usual.notes["bin"] == number) & (c == LABELS)).nonzero()[0]) for number in range(4) for c in range(3)
    ]
    assert found[0].content == sheet(data().read(torch.tensor(first)), 3, side=56)
    assert len(figures(None, made(mask_ratio=0.0), data())) == 2  # type: ignore[arg-type]


def test_spread_is_that_of_one_bin_within_classes() -> None:
    x = torch.tensor([[0.0], [2.0], [10.0], [30.0], [40.0]])
    labels, bin_of = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 0, 0])
    away, between = spread_of(x, labels, bin_of, 0)
    assert away == pytest.approx((((4 + 2) / 2) + 5) / 2) and between == pytest.approx((2 + 10) / 2)
