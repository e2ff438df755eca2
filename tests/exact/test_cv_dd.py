"""CV-DD: votes, statistics, and what each stage does, against loops written out here."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.committee import Pool, Priors, draw_committees, percent_right, voting_weights
from fewstep.condense.cv_dd import CVDD, Judge, Recover, Relabelling, committee_loss, view_of_batch
from fewstep.condense.representatives import medium_patches
from fewstep.condense.soft_labels import RandomView, Replay
from fewstep.condense.squeeze import MEMBERS, Squeeze, apart, labelled
from fewstep.condense.statistics import batch_statistics
from fewstep.data import Dataset
from fewstep.data.condensed import Condensed, to_pictures
from fewstep.data.dataset import as_floats
from fewstep.data.views import crop, random_boxes, random_flips
from fewstep.methods.method import Batch, Progress, Update, alone
from fewstep.methods.start import Start
from fewstep.networks.classifiers import ConvNet, MLPClassifier
from fewstep.networks.norms import batch_norm, batch_norms
from fewstep.randomness import Rng
from fewstep.report.tasks.cv_dd import figures
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

# Jiacheng8/CV-DD: recover/scripts and recover.py (lr, committee, r_bn, first_bn_multiplier, weight_temperature, jitter
# of 4 in 32 pixels, RandomResizedCrop's own scale), relabel/relabel.py and scripts (epochs, batch, temperature 10, mix,
# fkd_seed), the pool of the scripts, squeeze of its ImageNet prior (lr)
PUBLISHED = {
    "per_class": ..., "initial": "patches",
    "pool": ("resnet18", "resnet50", "densenet121", "shufflenet-v2", "mobilenet-v2"), "committee": 2,
    "priors": Priors("distilled"), "temperature": 5.0, "statistics_weight": 0.01, "first": 10.0, "scale": 0.08,
    "shift": 4 / 32, "lr": 0.25, "pool_lr": 0.1, "label_epochs": 300, "label_batch": 16, "label_temperature": 10.0,
    "label_statistics": "halves", "mix": "cutmix", "label_seed": 42,
    **dict.fromkeys(("views", "held_out", "squeeze_share", "recover_share", "judge_share"), ...),
    "optimizer": {
        **dict.fromkeys(("kind", "betas", "weight_decay"), ...),  # of the pool and of pictures, see below
        "eps": 1e-8, "clip": None, "warmup": 0, "decay": "cosine",
    },
}  # fmt: skip

SHAPE, CLASSES = (1, 8, 8), 3
CIFAR_100 = (64, 60.6, 51.6, 59.4, 56.4)


def data(n: int = 60) -> Dataset:
    """A bright square that is elsewhere in each class, in noise."""
    labels = torch.arange(n) % CLASSES
    x = torch.randint(0, 120, (n, *SHAPE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):
        x[i, 0, 2 * label : 2 * label + 3, 3:6] += 130
    return Dataset("squares", x, labels, ("a", "b", "c"))


def classifier(name: str = "convnet", seed: int = 0) -> nn.Module:
    """A network with running statistics of its own, in evaluation mode, frozen."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = NetworkClassifier(MEMBERS[name](SHAPE, CLASSES), SHAPE, CLASSES).train()
        with torch.no_grad():
            for _ in range(20):
                net(as_floats(data().x) + 0.1 * torch.randn(60, *SHAPE))
    return net.eval().requires_grad_(False)


def fresh() -> NetworkClassifier:
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        return NetworkClassifier(MLPClassifier(SHAPE, CLASSES, width=16), SHAPE, CLASSES)


def some_pool() -> Pool:
    return Pool([classifier("convnet"), classifier("resnet"), classifier("classifier")], [64.0, 51.6, 60.0])


def recovering() -> Start:
    """What any of the stages can start from."""
    return Start(fresh(), data(), made={"pool": some_pool()})


@pytest.fixture(scope="module")
def pool() -> Pool:
    return some_pool()


# --- votes -------------------------------------------------------------------------------------------------------


def test_the_weights_of_votes() -> None:
    """Published priors by the published temperatures, to the digits printed; both limits; a constant does not count."""
    assert voting_weights((64, 51.6), 5).tolist() == pytest.approx([0.9227, 0.0773], abs=5e-5)
    five = [0.3226, 0.2296, 0.0933, 0.2036, 0.1509]
    assert voting_weights(CIFAR_100, 10).tolist() == pytest.approx(five, abs=6e-5)
    assert voting_weights(CIFAR_100, 1e12).tolist() == pytest.approx([0.2] * 5, abs=1e-10)
    assert voting_weights(CIFAR_100, 1e-3).tolist() == [1, 0, 0, 0, 0]
    shifted = [prior + 30 for prior in CIFAR_100]
    assert voting_weights(shifted, 5).tolist() == pytest.approx(voting_weights(CIFAR_100, 5).tolist(), rel=1e-12)
    with pytest.raises(ValueError, match="temperature=0 must be positive"):
        voting_weights(CIFAR_100, 0)


def test_who_is_in_a_committee() -> None:
    """The best pair for one picture a class, each of ten pairs once for ten, and all members in time otherwise."""
    assert draw_committees(1, CIFAR_100, 2, Rng(0)).tolist() == [[0, 1]]
    assert draw_committees(1, (1, 9, 3, 9, 5), 2, Rng(0)).tolist() == [[1, 3]]
    ten = draw_committees(10, CIFAR_100, 2, Rng(0)).tolist()
    assert ten == [[i, j] for i in range(5) for j in range(i + 1, 5)]
    many = draw_committees(50, CIFAR_100, 2, Rng(0))
    assert bool((many[:, 0] < many[:, 1]).all())
    assert len(many.unique(dim=0)) == 10  # fifty draws of ten miss one with probability 0.05; this seed does not
    assert not torch.equal(many, draw_committees(50, CIFAR_100, 2, Rng(1)))
    with pytest.raises(ValueError, match=r"committee=6 must lie in 1 \.\. 5"):
        draw_committees(3, CIFAR_100, 6, Rng(0))


def test_a_vote_is_weighted_before_it_is_rounded(pool: Pool) -> None:
    """Logits that float16 cannot hold are kept where their weighted sum can."""

    class Loud(nn.Module):
        def __init__(self, size: float) -> None:
            super().__init__()
            self.size = nn.Parameter(torch.tensor(size))

        def forward(self, x: Tensor) -> Tensor:
            return self.size * torch.ones(len(x), CLASSES)

    loud = Pool([Loud(163840.0), Loud(-65536.0)], [50.0, 50.0])
    relabel = Relabelling(epochs=1, batch=2, statistics="running")
    soft = relabel(data().x[:2], loud)
    assert soft.logits.unique().tolist() == [49152.0]
    x = as_floats(data().x[:8])
    weights = voting_weights(pool.priors, 10)
    each = torch.stack([weight * member(x) for weight, member in zip(weights, pool.members, strict=True)])
    assert torch.allclose(pool.vote(x, 10), each.sum(0).float(), atol=1e-6)
    equal = torch.stack([member(x) for member in pool.members]).mean(0)
    assert torch.allclose(pool.vote(x, 1e9), equal, atol=1e-6)


def test_priors_are_written_as_words() -> None:
    for word in ("held-out", "distilled", "64,51.6"):
        assert str(Priors.parse(word)) == word
    assert CVDD(pool=("convnet", "resnet"), priors="64,51.6").priors.given == (64, 51.6)  # type: ignore[arg-type]
    for fields, message in (
        ({"priors": "best"}, "priors 'best' is not one of held-out, distilled"),
        ({"priors": "1,2"}, r"priors=1,2 must be 3 numbers"),
        ({"committee": 4}, "committee=4 of a pool of 3"),
        ({"label_batch": 14}, "label_batch=14 must be even and at least 16"),
        ({"label_batch": 17}, "label_batch=17 must be even"),
        ({"pool": ("convnet", "vgg")}, "'vgg' is not one of convnet"),
    ):
        with pytest.raises(ValueError, match=message):
            CVDD(**fields)  # type: ignore[arg-type]
    assert CVDD(label_batch=4, label_statistics="running").label_batch == 4
    with pytest.raises(ValueError, match="2 members of the pool need one each"):
        Pool([fresh(), fresh()], [1.0])


# --- statistics --------------------------------------------------------------------------------------------------


def test_statistics_that_were_run_up_by_a_batch_itself_cost_nothing() -> None:
    """Momentum 1 and the biased variance: 0 to rounding, over all layers.  The unbiased one, which PyTorch runs up,
    would leave more."""
    net = copy.deepcopy(classifier("resnet")).double()
    x = Rng(0).normal(6, *SHAPE, dtype=torch.float64)
    with batch_norm(net, "batch"), batch_statistics(net) as taps:
        net(x)
    assert len(taps.seen) == len(batch_norms(net)) > 3
    for i, layer in enumerate(batch_norms(net)):
        layer.running_mean, layer.running_var = taps.seen[i].mean, taps.seen[i].var
    with batch_statistics(net) as taps:
        net(x)
    assert float(taps.loss(10.0)) < 1e-11
    taps.follow()  # a step of momentum 0.1 towards the unbiased ones
    with batch_statistics(net) as taps:
        net(x)
    assert float(taps.loss(10.0)) > 1e-5


def test_the_loss_of_statistics_is_of_norms() -> None:
    """By hand for two layers: roots of sums of squares, the first ten times."""
    net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2)).double().eval()
    x = 3 * Rng(0).normal(5, 2, 4, 4, dtype=torch.float64) + 1
    with batch_statistics(net) as taps:
        y = net[0](x)
        net[1](y)

    def distance(a: Tensor) -> float:
        mean, var = a.mean((0, 2, 3)), a.var((0, 2, 3), correction=0)
        return math.sqrt(float((mean**2).sum())) + math.sqrt(float(((var - 1) ** 2).sum()))

    assert float(taps.loss(10.0)) == pytest.approx(10 * distance(x) + distance(y), rel=1e-12)
    with batch_statistics(net) as taps:
        net[0](x)
    with pytest.raises(ValueError, match="layer 1 of the network was not called"):
        taps.loss()
    with pytest.raises(ValueError, match="has no batch normalisation"), batch_statistics(ConvNet(SHAPE, CLASSES)):
        pass


def test_the_gradient_of_the_loss_is_that_of_differences() -> None:
    """Central differences of the whole loss of a committee, in float64, in ten random directions."""
    members = [copy.deepcopy(classifier(name)).double() for name in ("resnet", "convnet")]
    committee, labels = Pool(members, [64.0, 60.0]), torch.arange(CLASSES)
    x = Rng(3).normal(CLASSES, *SHAPE, dtype=torch.float64).requires_grad_()

    def loss(at: Tensor) -> Tensor:
        return committee_loss(committee, at, labels, 5.0, 0.3, 10.0).loss

    loss(x).backward()
    rng, h = Rng(4), 1e-6
    for _ in range(10):
        d = rng.normal_like(x.detach())
        slope = float(loss(x.detach() + h * d) - loss(x.detach() - h * d)) / (2 * h)
        assert slope == pytest.approx(float((x.grad * d).sum()), rel=1e-5, abs=1e-6)  # ReLUs have corners


def test_taps_move_running_statistics_as_training_does() -> None:
    """Squeeze's passes use a batch's own statistics by name; what is run up is PyTorch's in training mode."""
    ours, theirs = copy.deepcopy(classifier()), copy.deepcopy(classifier()).train()
    start = Start(fresh(), data())
    method = Squeeze(("convnet",), views=RAW)
    nets = method.networks(start)
    nets.get_submodule("member-0").load_state_dict(ours.state_dict())
    x, labels = as_floats(data().x[:16]), data().labels
    assert labels is not None
    (update,) = alone(method.updates(nets, Batch(x, labels[:16], Rng(0)), Progress()))
    expected = nn.functional.cross_entropy(theirs(x), labels[:16])
    assert float(update.loss) == pytest.approx(float(expected), rel=1e-6)
    before = {name: b.clone() for name, b in nets.named_buffers()}
    assert update.then is not None
    update.then()
    moved = nets.get_submodule("member-0")
    for (name, mine), (_, other) in zip(moved.named_buffers(), theirs.named_buffers(), strict=True):
        if "running" in name:
            assert torch.allclose(mine, other, rtol=1e-5, atol=1e-7), name
            assert not torch.equal(mine, before[f"member-0.{name}"]), name


def test_statistics_of_half_precision_are_added_up_in_single() -> None:
    """Under autocast layers read bfloat16, whose own variance of 1 around a mean of 200 would be of steps of 1."""
    layer = nn.BatchNorm2d(1).eval()
    x = (Rng(0).normal(64, 1, 8, 8) + 200).bfloat16()
    with batch_statistics(layer) as taps:
        layer(x)
    seen = taps.seen[0]
    assert seen.mean.dtype == seen.var.dtype == torch.float32
    assert float(seen.mean) == pytest.approx(float(x.double().mean()), rel=1e-6)
    assert float(seen.var) == pytest.approx(float(x.double().var(correction=0)), rel=1e-4)
    taps.follow()
    assert layer.running_mean is not None
    assert float(layer.running_mean) == pytest.approx(20, rel=1e-2)


RAW = CVDD().views.parse("none")


# --- relabelling -------------------------------------------------------------------------------------------------


def test_labels_of_a_batch_are_those_of_its_halves_and_nothing_drifts(pool: Pool) -> None:
    """Batch-specific labels against the members in training mode on each half; running statistics stay as they were.
    Without batch normalisation they are the ordinary ones, to the last bit."""
    x = as_floats(data().x[:16])
    before = {name: tensor.clone() for name, tensor in pool.state_dict().items()}
    found = pool.vote(x, 10, "halves")
    assert all(torch.equal(tensor, before[name]) for name, tensor in pool.state_dict().items())
    expected = []
    for half in x.chunk(2):
        votes = [copy.deepcopy(member).train()(half) for member in pool.members]
        expected.append(sum(w * v for w, v in zip(voting_weights(pool.priors, 10).tolist(), votes, strict=True)))
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)
    assert not torch.allclose(found, pool.vote(x, 10, "batch"), atol=1e-2)
    assert not torch.allclose(found, pool.vote(x, 10), atol=1e-2)
    plain = Pool([NetworkClassifier(ConvNet(SHAPE, CLASSES, norm="none"), SHAPE, CLASSES), fresh()], [50.0, 40.0])
    assert torch.equal(plain.vote(x, 10, "halves"), plain.vote(x, 10))


def test_how_many_are_told_right() -> None:
    """By a classifier of another type than the samples, as they are moved to where it is; over several batches."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)).double()
    x, labels = labelled(data())
    right = int((net(x.double()).argmax(1) == labels).sum())
    assert 0 < right < 60 and percent_right(net, x, labels, batch=7) == pytest.approx(100 * right / 60)


def test_dropout_stays_off_while_batch_normalisation_switches() -> None:
    member = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, CLASSES)).eval()
    x = as_floats(data().x[:16])
    first, second = (Pool([member], [0.0]).vote(x, 10, "halves") for _ in range(2))
    assert torch.equal(first, second)
    halves = [(h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt() for h in x.flatten(1).chunk(2)]
    assert torch.allclose(first, member[3](torch.cat(halves)), atol=1e-5)


def test_stored_labels_are_votes_on_the_stored_views(pool: Pool) -> None:
    pictures = data().x[:6]
    soft = Relabelling(epochs=8, batch=16, view=RandomView(0.3))(pictures, pool)
    assert (soft.batches, soft.batch) == (3, 16)
    for k in range(soft.batches):
        again = pool.vote(soft.made(pictures, k), 10.0, "halves")
        assert torch.equal(soft.logits[k], again.half())


# --- recovery ----------------------------------------------------------------------------------------------------


def recovery(pool: Pool, **fields: Any) -> tuple[Recover, Any]:
    method = Recover(
        per_class=2, priors=Priors("given", pool.priors), held_out=0.0, relabelling=Relabelling(4, 16), **fields
    )  # fmt: skip
    return method, method.networks(Start(fresh(), data(), made={"pool": pool}))


def steps(method: Recover, nets: Any, n: int, optimizer: torch.optim.Optimizer) -> Iterator[Update]:
    """Train without a trainer, at a constant rate."""
    for step in range(n):
        for update in alone(method.updates(nets, Batch(None, None, Rng(7, step)), Progress())):
            optimizer.zero_grad(set_to_none=True)
            update.loss.backward()
            optimizer.step()
            assert update.then is not None
            update.then()
            yield update


def test_a_committee_of_one_is_sre2l_bit_for_bit(pool: Pool) -> None:
    """SRe2L++ written out: one network in evaluation mode, its cross-entropy and 0.01 of its statistics, one optimizer
    for each index of pictures."""
    single = Pool(pool.members[:1], [33.0])
    method, nets = recovery(single, committee=1)
    (spec,) = nets.groups.values()
    assert (spec.lr, spec.kind, spec.betas, spec.decay) == (0.1, "adam", (0.5, 0.9), "cosine")
    begun = [x.detach().clone() for x in nets.pictures.x]
    for _ in steps(method, nets, 5, torch.optim.Adam(nets.pictures.parameters(), 0.25, betas=(0.5, 0.9))):
        pass

    net, labels = pool.members[0], torch.arange(CLASSES)
    theirs = [nn.Parameter(x.clone()) for x in begun]
    optimizers = [torch.optim.Adam([x], 0.25, betas=(0.5, 0.9)) for x in theirs]
    seen: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in batch_norms(net)]
    for step in range(5):
        rng = Rng(Rng(7, step).shared_integer(0, 2**62))
        for x, optimizer in zip(theirs, optimizers, strict=True):
            boxes, flip = random_boxes(CLASSES, rng, (0.08, 1.0), shared=True), random_flips(1, rng)
            down, over = rng.shared_integer(0, 2), rng.shared_integer(0, 2)
            view = torch.roll(crop(x, boxes, flip.expand(CLASSES)), (down, over), (2, 3))
            seen.clear()
            cross_entropy = nn.functional.cross_entropy(net(view), labels)
            distances = []
            for layer, a in zip(batch_norms(net), seen, strict=True):
                var, mean = torch.var_mean(a, (0, 2, 3), correction=0)
                distances.append(torch.norm(mean - layer.running_mean) + torch.norm(var - layer.running_var))
            loss = cross_entropy + 0.01 * (10 * distances[0] + torch.stack(distances[1:]).sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                x.clamp_(-1, 1)
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(nets.pictures.x, theirs, strict=True))
    assert not torch.equal(nets.pictures.x[0], begun[0])


def test_a_committee_pulls_with_its_weights(pool: Pool) -> None:
    """The loss is the weighted sum of what each member alone would have; with equal votes, the mean."""
    x, labels = as_floats(data().x[:CLASSES]), torch.arange(CLASSES)
    each = [committee_loss(pool.chosen([m]), x, labels, 5.0, 0.01, 10.0) for m in range(3)]
    weights = voting_weights((64.0, 51.6), 5.0).tolist()
    both = committee_loss(pool.chosen([0, 1]), x, labels, 5.0, 0.01, 10.0)
    for part in range(3):
        expected = weights[0] * float(each[0][part]) + weights[1] * float(each[1][part])
        assert float(both[part]) == pytest.approx(expected, rel=1e-5)
    equal = committee_loss(pool, x, labels, 1e9, 0.01, 10.0)
    assert float(equal.loss) == pytest.approx(sum(float(e.loss) for e in each) / 3, rel=1e-5)


def test_pictures_stay_pictures_and_each_index_moves_by_its_own_loss(pool: Pool) -> None:
    method, nets = recovery(pool, lr=5.0)
    optimizer = torch.optim.Adam(nets.pictures.parameters(), 5.0, betas=(0.5, 0.9))
    before = [x.detach().clone() for x in nets.pictures.x]
    for k, update in enumerate(steps(method, nets, 1, optimizer)):
        assert {"cross_entropy", "statistics"} <= update.logs.keys()
        assert not torch.equal(nets.pictures.x[k], before[k])
        assert all(torch.equal(nets.pictures.x[j], before[j]) for j in range(k + 1, 2))
        assert float(nets.pictures.x[k].abs().max()) == 1.0


def test_one_view_for_the_whole_batch() -> None:
    """Equal pictures stay equal; over draws, views differ, flips and shifts happen, and no shift is past its bound."""
    x = as_floats(data().x[:1]).expand(4, *SHAPE)
    views = [view_of_batch(x, 0.08, 0.125, Rng(k)) for k in range(20)]
    assert all(torch.equal(view, view[:1].expand_as(view)) for view in views)
    assert len({float(view[0].sum()) for view in views}) == 20
    # around the edges: a column that is 1 is somewhere else, in whole crops at most by the bound and mirrored
    column = torch.zeros(1, 1, 8, 8)
    column[..., 0] = 1
    seen = torch.cat([view_of_batch(column, 1.0, 0.25, Rng(k))[0, 0, :1] for k in range(300)])
    exact = seen[((seen == 0) | (seen == 1)).all(1) & (seen.sum(1) == 1)].argmax(1)
    assert set(exact.tolist()) == {0, 1, 2, 7}  # by 0, 1 and 2; mirrored by 0, and by 1 and 2 past the edge


def test_pictures_start_as_different_ones_of_their_class(pool: Pool) -> None:
    method, nets = recovery(pool)
    begun, (x, labels) = nets.pictures.begun, labelled(data())
    assert begun.shape == (2, CLASSES)
    assert len(begun.unique()) == 2 * CLASSES
    assert torch.equal(labels[begun], torch.arange(CLASSES).expand(2, CLASSES))
    assert torch.equal(nets.pictures.all, x[begun.flatten()])
    with pytest.raises(ValueError, match="21 examples of each class are asked for, and class 0 has 20"):
        dataclasses.replace(method, per_class=21).networks(Start(fresh(), data(), made={"pool": pool}))


def test_pictures_can_start_as_patches_of_medium_difficulty(pool: Pool) -> None:
    """Against all that is tried, written out: each is a crop of the picture that it says, of the middle one of its five
    losses, and of those of its class as many are easier as are harder."""
    crops: list[Tensor] = []

    def vote(views: Tensor) -> Tensor:
        crops.append(views)
        return pool.vote(views, 5.0)

    x, labels = labelled(data())
    patches, index = medium_patches(data(), labels, 2, CLASSES, vote, Rng(0))
    assert patches.shape == (2, CLASSES, *SHAPE) and torch.equal(labels[index], torch.arange(CLASSES).expand(2, -1))
    assert len(index.unique()) == 2 * CLASSES and [len(views) for views in crops] == [20 * 5] * CLASSES
    for name, views in enumerate(crops):
        told = nn.functional.cross_entropy(pool.vote(views, 5.0), torch.full((100,), name), reduction="none")
        losses = told.unflatten(0, (20, 5))
        middle = losses.sort(1).values[:, 2]
        kept = [int((views == patch).flatten(1).all(1).nonzero()) for patch in patches[:, name]]
        assert [float(losses.flatten()[k]) for k in kept] == middle.sort().values[9:11].tolist()
        whole = torch.cat([x[i].expand(5, *SHAPE) for i in index[:, name].tolist()])
        lowest, highest = (whole.amin((2, 3)).min(1).values, whole.amax((2, 3)).max(1).values)
        assert all(lowest[5 * j] <= views[k].min() and views[k].max() <= highest[5 * j] for j, k in enumerate(kept))
    _, nets = recovery(pool, initial="patches")
    assert torch.isin(nets.pictures.begun, torch.arange(60)).all()
    assert not torch.equal(nets.pictures.all, x[nets.pictures.begun.flatten()])
    assert CVDD(initial="patches").stages()[-1].method.initial == "patches"  # type: ignore[attr-defined]


def test_what_is_held_out_is_held_out_from_all() -> None:
    kept, held = apart(data(), 0.25)
    assert not torch.isin(kept.index, held.index).any()
    assert (len(kept), len(held)) == (45, 15)
    assert len(apart(data(), 0.0)[0]) == 60
    with pytest.raises(ValueError, match="held_out=1 of 60 samples leaves none to train on"):
        apart(data(), 1.0)
    start = Start(fresh(), data(), seed=3)
    assert torch.equal(labelled(Squeeze(held_out=0.25).sources(start)["data"])[0], labelled(kept)[0])


# --- the recipe --------------------------------------------------------------------------------------------------

TINY = CVDD(per_class=2, pool=("convnet", "resnet"), label_epochs=8, views=RAW, held_out=0.2)
SETTINGS = Settings(Budget(40), batch=16, precision="fp32", log_steps=5)


@pytest.fixture(scope="module")
def made() -> Any:
    return run_recipe(TINY, fresh(), data(), SETTINGS, None, show=False)


def test_it_makes_pictures_with_their_story(made: Any) -> None:
    """Who voted with which weight, from which samples, and soft labels which are the pool's votes."""
    model, notes = made.model, made.model.notes
    assert isinstance(model, Condensed)
    assert model.x.dtype == torch.uint8
    assert model.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert model.class_names == ("a", "b", "c")
    assert notes["committees"].tolist() == [[0, 1], [0, 1]]
    weights = voting_weights(notes["priors"].tolist(), 5.0)
    assert torch.equal(notes["weights"], weights.expand(2, 2))
    kept, held = apart(data(), 0.2)
    assert torch.equal(labelled(data())[1][notes["begun"]], model.labels)
    assert torch.isin(notes["begun"], kept.index).all()
    pool = made.made["pool"]
    assert notes["priors"].tolist() == [percent_right(m, *labelled(held)) for m in pool.members]
    replay = Replay.of(model)
    assert (len(replay), replay.soft.batches) == (48, 3)
    votes = Pool(pool.members, notes["priors"].tolist()).vote(replay.rows(slice(0, 16)).x, 10.0, "halves")  # type: ignore[arg-type]
    assert torch.equal(replay.soft.logits[0], votes.half())
    assert model.bytes() == 6 * 64 + 6 + replay.soft.bytes
    first = next(record for record in made.records if record["stage"] == 1)
    assert made.records[-1]["pictures/statistics"] < first["pictures/statistics"]


def test_distilled_priors_are_how_well_each_member_distils(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery, a training on its stored labels and an examination for each member, in between."""
    recipe = dataclasses.replace(TINY, priors=Priors("distilled"))
    stages = recipe.stages()
    names = [stage.method.name for stage in stages]
    assert names == ["cv-dd-squeeze", "cv-dd-alone", "cv-dd-judge", "cv-dd-alone", "cv-dd-judge", "cv-dd-recover"]
    for judge in (stages[2], stages[4]):  # as officially: stops at half the rate, and biases do not decay
        moves = judge.method.optimizer()  # type: ignore[attr-defined]
        assert (moves.decay, moves.decayed, moves.weight_decay) == ("stretched-cosine:2", "matrices", 0.01)
    judged: list[tuple[int, float]] = []
    real = Judge.hands_on

    def spy(self: Judge, nets: Any) -> Any:
        found = real(self, nets)
        x, labels = labelled(apart(data(), 0.2)[1])
        judged.append((self.member, 100 * float((nets.student(x).argmax(1) == labels).double().mean())))
        return found

    monkeypatch.setattr(Judge, "hands_on", spy)
    result = run_recipe(recipe, fresh(), data(), dataclasses.replace(SETTINGS, budget=Budget(60)), None, show=False)
    assert [member for member, _ in judged] == [0, 1]
    assert result.model.notes["priors"].tolist() == pytest.approx([percent for _, percent in judged])
    alone_made = result.made["alone-1"]
    assert torch.equal(alone_made.labels, result.model.labels)
    assert not torch.equal(alone_made.x, result.made["alone-0"].x)


def test_data_of_another_kind_are_named() -> None:
    points = Dataset("points", torch.randn(8, 3), torch.arange(8) % 2)
    bare = Dataset("bare", torch.randn(8, *SHAPE))
    for wrong, message in ((points, "'points' has no pictures"), (bare, "'bare' has no labels")):
        with pytest.raises(ValueError, match=message):
            labelled(wrong)
    assert torch.equal(to_pictures(as_floats(data().x)), data().x)  # what is stored is what is labelled


def test_the_pictures_of_its_report(made: Any) -> None:
    """Begun and recovered in rows of a class each; the votes as numbers; nothing but votes for what is no picture."""
    sheet, votes = figures(None, made.model, data())  # type: ignore[arg-type]
    assert sheet.html().count("data:image/png") == 1
    assert isinstance(votes.content, str)
    weight = float(made.model.notes["weights"][1, 0])
    assert f"<td>1</td><td>member 0: {weight:.3f}, member 1: {1 - weight:.3f}" in votes.content
    shown: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.report.tasks.cv_dd.sheet", lambda x, *_: shown.append(x) or b"\x89PNG")
        figures(None, made.model, data())  # type: ignore[arg-type]
    real, model = as_floats(data().x), made.model
    expected = [
        real[model.notes["begun"][:3]], as_floats(model.x[:3]), real[model.notes["begun"][3:]], as_floats(model.x[3:]),
    ]  # fmt: skip
    assert torch.equal(shown[0], torch.cat(expected))
