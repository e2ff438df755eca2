"""The store of soft labels: what was labelled comes back to the last bit, whoever asks for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.soft_labels import Mix, RandomView, Replay, SoftLabels, View, label_views
from fewstep.condense.supervised import KnowledgeDistillation, SoftSupervised, Supervised
from fewstep.data.condensed import Condensed
from fewstep.data.dataset import as_floats
from fewstep.hub import native
from fewstep.methods.start import Start
from fewstep.networks.classifiers import MLPClassifier
from fewstep.randomness import Rng
from fewstep.runs.conditions import samples_of
from fewstep.training.feed import Feed

M, CLASSES, BATCH = 10, 3, 4
PICTURES = torch.randint(0, 256, (M, 2, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.arange(M) % CLASSES


class Labeller:
    """Remembers the views that it is shown, and says something of every pixel."""

    def __init__(self) -> None:
        self.shown: list[Tensor] = []
        self.weights = Rng(1).normal(60, CLASSES)

    def __call__(self, x: Tensor) -> Tensor:
        self.shown.append(x.clone())
        return x.flatten(1) @ self.weights


def labelled(mix: Mix = "cutmix", batches: int = 7) -> tuple[SoftLabels, list[Tensor]]:
    labeller = Labeller()
    return label_views(PICTURES, labeller, batches, BATCH, 42, RandomView(0.2, mix)), labeller.shown


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
def test_what_is_kept_makes_the_same_views_again(mix: Mix, tmp_path: Path) -> None:
    """The views of the labeller, bit for bit, after a file; and the logits are of the mixed views that were shown."""
    soft, shown = labelled(mix)
    soft.save(tmp_path / "soft.safetensors")
    loaded = SoftLabels.load(tmp_path / "soft.safetensors")
    for k, views in enumerate(shown):
        assert torch.equal(loaded.made(PICTURES, k), views)
        assert torch.equal(loaded.logits[k], Labeller()(views).half())
    assert loaded.tensors().keys() == soft.tensors().keys()
    # every part of the draws counts
    changes: dict[str, View] = {"flips": soft.views._replace(flips=~soft.views.flips)}  # type: ignore[operator]
    changes["boxes"] = soft.views._replace(boxes=soft.views.boxes.flip(1))  # type: ignore[union-attr]
    if mix != "none":
        changes["partner"] = soft.views._replace(partner=soft.views.partner.flip(1))  # type: ignore[union-attr]
    for name, views in changes.items():
        other = SoftLabels(soft.index, soft.logits, views)
        assert any(not torch.equal(other.made(PICTURES, k), shown[k]) for k in range(7)), name


def test_a_view_is_mixed_with_its_own_partner() -> None:
    """The whole picture pasted is the partner; so is all of the blend where nothing is its own; each after its crop."""
    x, partner = as_floats(PICTURES[:3]), torch.tensor([1, 2, 0]).int()
    whole = View(partner=partner, cut=torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert torch.equal(whole(x), x[[1, 2, 0]])
    assert torch.equal(View(partner=partner, own=torch.tensor(0.0))(x), x[[1, 2, 0]])
    assert torch.allclose(View(partner=partner, own=torch.tensor(0.75))(x), 0.75 * x + 0.25 * x[[1, 2, 0]])
    mirrored = torch.tensor([False, True, False])
    both = View(torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4), mirrored, *whole[2:])
    assert torch.equal(both(x), torch.stack([x[1].flip(-1), x[2], x[0]]))


def test_views_are_as_varied_as_they_should_be() -> None:
    """In 7 batches of 4: boxes, flips of both kinds, partners that are permutations, boxes that are pasted."""
    soft, shown = labelled()
    flips, partner, boxes, cut = soft.views.flips, soft.views.partner, soft.views.boxes, soft.views.cut
    assert flips is not None and partner is not None and boxes is not None and cut is not None
    assert 0 < int(flips.sum()) < flips.numel()
    assert torch.equal(partner.sort(1).values, torch.arange(BATCH).expand(7, BATCH).int())
    assert len(boxes.flatten(0, 1).unique(dim=0)) == 28
    area = boxes[..., 2] * boxes[..., 3]
    assert float(area.min()) >= 0.2 - 1e-6
    assert len(cut.unique(dim=0)) == 7
    plain = [View(*(None if p is None else p[k] for p in (boxes, flips)))(as_floats(PICTURES[soft.index[k].long()]))
             for k in range(7)]  # fmt: skip
    pasted = [float((a != b).double().mean()) for a, b in zip(shown, plain, strict=True)]
    assert max(pasted) > 0.2 > min(pasted)


def test_batch_k_does_not_depend_on_the_others_and_epochs_are_permutations() -> None:
    few, many = labelled(batches=3)[0], labelled(batches=7)[0]
    for name, tensor in few.tensors().items():
        assert torch.equal(tensor, many.tensors()[name][:3]), name
    order = many.index.flatten()[: 2 * M].view(2, M)
    assert torch.equal(order.sort(1).values, torch.arange(M).expand(2, M).int())
    assert not torch.equal(order[0], order[1])


def test_a_replay_is_data_whose_order_does_not_matter_to_a_view() -> None:
    soft, shown = labelled()
    replay = Replay(PICTURES, LABELS, soft)
    assert (len(replay), replay.shape, replay.classes) == (28, (2, 6, 5), 3)
    whole = torch.cat(shown)
    mixed = Rng(5).shuffled(28)[:9]
    rows = replay.rows(mixed)
    assert rows.x is not None
    assert torch.equal(rows.x, whole[mixed])
    assert torch.equal(rows.columns["logits"], soft.logits.flatten(0, 1)[mixed].float())
    assert torch.equal(replay.conditions(mixed), LABELS[soft.index.flatten().long()[mixed]])
    assert replay.sha256() != Replay(PICTURES, LABELS, labelled(batches=6)[0]).sha256()


def test_training_reads_a_replay_in_sequence_and_other_data_not() -> None:
    """Two stored batches a step, the last of an epoch with the first of the next; on two processes each its half."""
    soft, shown = labelled()
    whole = torch.cat([*shown, *shown])
    sources = {"data": Replay(PICTURES, LABELS, soft)}
    feed = Feed(sources, 8, 0, range(1), 1)
    read = [next(feed.read(step))["data"].x for step in range(7)]
    assert torch.equal(torch.cat([x for x in read if x is not None]), whole)
    second = Feed(sources, 8, 0, range(1, 2), 2)
    (found,) = (rows["data"].x for rows in second.read(3))
    assert found is not None
    assert torch.equal(found, whole[28:32])
    plain = Feed({"data": Condensed(PICTURES, LABELS).dataset()}, M, 0, range(1), 1)
    x = next(plain.read(0))["data"].x
    assert x is not None and not torch.equal(x, as_floats(PICTURES))


def test_they_know_their_bytes() -> None:
    """S = 7 batches of B = 4 of K = 3: an int32 and a float16 a class, and for CutMix 4 floats a box, a byte a flip, an
    int32 a partner, 4 floats a batch."""
    soft = labelled()[0]
    assert soft.bytes == 28 * (4 + 2 * CLASSES) + 28 * (16 + 1 + 4) + 7 * 16
    assert SoftLabels.column(torch.zeros(5, 4)).bytes == 5 * (4 + 2 * 4)


def test_a_column_needs_no_pictures(tmp_path: Path) -> None:
    """Logits of samples as they are, in any order, come back in that of the samples."""
    logits, order = Rng(0).normal(6, 4), torch.tensor([3, 0, 5, 1, 2, 4])
    plain = SoftLabels.column(logits)
    assert torch.equal(plain.of_samples(6), logits.half().float())
    SoftLabels.column(logits[order], order).save(tmp_path / "x")
    assert torch.equal(SoftLabels.load(tmp_path / "x").of_samples(6), logits.half().float())
    with pytest.raises(ValueError, match="are of 6 samples, not one of each of 7"):
        plain.of_samples(7)
    with pytest.raises(ValueError, match="are of views"):
        labelled()[0].of_samples(M)


def test_they_are_notes_of_a_condensed_set() -> None:
    soft, shown = labelled()
    made = Condensed(PICTURES, LABELS, notes={"priors": torch.ones(2), **soft.tensors()})
    replay = Replay.of(made)
    assert torch.equal(replay.rows(slice(4, 8)).x, shown[1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no soft labels among priors"):
        Replay.of(Condensed(PICTURES, LABELS, notes={"priors": torch.ones(2)}))


def test_a_run_that_made_soft_labels_is_data_for_training_with_them(tmp_path: Path) -> None:
    """``--data RUN`` gives the pictures with their hard labels; training from soft labels reads the labelled views."""
    soft, shown = labelled()
    native.save(Condensed(PICTURES, LABELS, ("a", "b", "c"), notes=soft.tensors()), tmp_path / "run")
    found = samples_of(tmp_path / "run")
    assert (found.name, len(found), found.class_names) == ("run", M, ("a", "b", "c"))
    assert torch.equal(found.rows(slice(0, 4)).x, as_floats(PICTURES[:4]))  # type: ignore[arg-type]
    start = Start(NetworkClassifier(MLPClassifier((2, 6, 5), CLASSES), (2, 6, 5), CLASSES), found)
    read = SoftSupervised().sources(start)["data"]
    assert torch.equal(read.rows(slice(0, 4)).x, shown[0])  # type: ignore[arg-type]
    assert torch.equal(read.rows(slice(0, 4)).columns["logits"], soft.logits[0].float())
    for method in (Supervised(), KnowledgeDistillation()):
        assert method.sources(start)["data"] is found
    plain = dataclasses.replace(start, data=Condensed(PICTURES, LABELS).dataset())
    assert SoftSupervised().sources(plain)["data"] is plain.data


def test_mistakes_are_named(tmp_path: Path) -> None:
    index, logits = torch.zeros(2, 3).int(), torch.zeros(2, 3, 4).half()
    for made, message in (
        (lambda: SoftLabels(index, logits[:1]), r"index \[2, 3\] and logits \[1, 3, 4\]"),
        (lambda: SoftLabels(index, logits.float()), "must be float16 and finite"),
        (lambda: SoftLabels.column(torch.tensor([[7e4]])), "above 65504"),
        (lambda: SoftLabels(index, logits, View(flips=torch.zeros(3, 3))), "3 batches of 'flips', 2 of logits"),
        (lambda: Replay(PICTURES[:1], LABELS[:1], SoftLabels(index + 1, logits)), "soft labels of picture 1"),
    ):
        with pytest.raises(ValueError, match=message):
            made()
    (tmp_path / "x").write_bytes(b"12345678910")
    with pytest.raises(ValueError, match=r"x: .*safetensors"):
        SoftLabels.load(tmp_path / "x")
