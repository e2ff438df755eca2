"""AST: what its losses are where they are known, its components one by one, and its experts."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fewstep as fs
from fewstep.classifiers import NetworkClassifier
from fewstep.condense.ast import AST, LEAST_RATE, balance, lessons, matching_losses
from fewstep.condense.experts import Experts, Paths, gradient_penalty, smoothness
from fewstep.condense.representatives import representatives
from fewstep.condense.select import stratified
from fewstep.condense.unroll import FlatNet, vector_of
from fewstep.data import Dataset
from fewstep.data.condensed import Condensed
from fewstep.data.siamese import Siamese
from fewstep.files import load_tensors
from fewstep.methods.method import Batch, Networks, Progress
from fewstep.methods.start import Start
from fewstep.networks.classifiers import ConvNet, MLPClassifier
from fewstep.randomness import Rng
from fewstep.report.tasks.ast import figures
from fewstep.runs.course import run_recipe
from fewstep.runs.shelf import Shelf
from fewstep.training.budget import Budget
from fewstep.training.parallel import Parallel
from fewstep.training.settings import Settings

OPEN: Any = ...
#: The authors' README and code for one image a class of CIFAR-100: buffer.py --optim SGDMOM --loss_decay --gp True
#: --train_epochs=50 --num_experts=100; distill.py --ipc=1 --pix_init avg --weight_perturb --agg_middle_loss
#: --balance_loss --syn_steps=20 --expert_epochs=3 --max_start_epoch=20 --lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01.
PUBLISHED = {
    "per_class": 1, "clipping": 10, "penalty": 2.0, "initial": "representative", "balanced": True,
    "intermediate": "equal", "perturbation": 1.0, "experts": 100, "epochs": 50, "expert_batch": 256,
    "expert_lr": 0.003, "expert_momentum": 0.9, "expert_decay": 0.001, "steps": 20, "expert_epochs": 3,
    "max_start_epoch": 20, "inner_batch": None, "momentum": 0.9,
    "augment": Siamese.parse("color+crop+cutout+flip+scale+rotate"), "eta": 0.01, "second_order": None,
    "checkpointed": False, "stretches": 1, "lr_images": 1000.0, "lr_eta": 1e-5,
    "optimizer": {"kind": "sgd", "momentum": 0.5, "nesterov": False, "weight_decay": 0.0, "clip": None, "warmup": 0},
}  # fmt: skip

SHAPE, CLASSES = (1, 4, 4), 3
NO_AUGMENTATION = Siamese.parse("none")
#: Matching training trajectories, with momentum.
MTT = AST(
    initial="real", clipping=0, penalty=0.0, balanced=False, intermediate="none", perturbation=0.0, experts=2, epochs=4,
    expert_batch=5, expert_lr=0.1, expert_decay=0.0, steps=4, expert_epochs=2, max_start_epoch=3,
    augment=NO_AUGMENTATION, eta=0.1,
)  # fmt: skip


def start_of(net: nn.Module | None = None, n: int = 12) -> Start:
    """A classifier in float64, and points of three classes."""
    net = net or MLPClassifier(SHAPE, CLASSES, width=6, activation="tanh")
    x = Rng(0, "points").normal(n, *SHAPE, dtype=torch.float64)
    labels = torch.arange(n) % CLASSES
    return Start(NetworkClassifier(net.double(), SHAPE, CLASSES), Dataset("points", x, labels, ("a", "b", "c")))


def losses(method: AST, start: Start, seed: int = 0, eta: float | None = None) -> Tensor:
    nets = method.networks(start)
    if eta is not None:
        nets.eta.value.data.fill_(eta)
    return method.losses(nets, Rng(seed))


# --- the losses --------------------------------------------------------------------------------------------------


def test_a_student_that_does_not_move_has_losses_of_exactly_one() -> None:
    method = replace(MTT, intermediate="equal", perturbation=1.0, balanced=True)
    start = start_of(ConvNet(SHAPE, CLASSES, width=2, depth=1))
    assert losses(method, start, eta=0.0).tolist() == [1.0, 1.0]
    path = Rng(1).normal(4, 9, dtype=torch.float64)
    none = matching_losses(lambda theta, k: theta.square().sum(), path, path[0], torch.tensor(0.1), steps=0)
    assert none.tolist() == [1.0]


def test_the_whole_real_set_follows_the_expert_exactly() -> None:
    """Experts by gradient descent on all samples at once: an epoch is a step, and the student makes the same."""
    method = replace(
        MTT, per_class=4, expert_batch=12, epochs=3, steps=3, expert_epochs=3, max_start_epoch=1, eta=MTT.expert_lr,
        intermediate="equal",
    )  # fmt: skip
    found = losses(method, start_of())
    assert found.shape == (3,)
    assert float(found.max()) < 1e-10


def test_targets_on_the_way_stand_at_multiples_of_whole_steps() -> None:
    """20 steps for three epochs: after 6, 12 and 20.  On a linear loss the student goes straight on."""
    slope = Rng(0).normal(5, dtype=torch.float64)
    start = torch.zeros(5, dtype=torch.float64)
    path = torch.stack([start, *(-0.1 * k * slope for k in (6, 12, 20))])
    lr = torch.tensor(0.1, dtype=torch.float64)
    found = matching_losses(lambda theta, k: theta @ slope, path, start, lr, 20, momentum=0.0)
    assert float(found.abs().max()) < 1e-24
    elsewhere = torch.stack([start, *(-0.1 * k * slope for k in (7, 12, 20))])
    assert float(matching_losses(lambda theta, k: theta @ slope, elsewhere, start, lr, 20, momentum=0.0)[0]) > 0.01


def test_without_its_components_it_is_matching_training_trajectories() -> None:
    """Against MTT written with a parameter list, from its own equations."""
    start = start_of()
    nets = MTT.networks(start)
    rng = Rng(3)
    expert, s = rng.shared_integer(0, MTT.experts), rng.shared_integer(0, MTT.max_start_epoch)
    path = nets.experts.paths[expert]
    net = start.teacher.net
    shapes = [p.shape for p in net.parameters()]
    names = [name for name, _ in net.named_parameters()]

    def parts(vector: Tensor) -> list[Tensor]:
        return [p.view(shape) for p, shape in zip(vector.split([s.numel() for s in shapes]), shapes, strict=True)]

    x, eta = nets.images.x, nets.eta.value
    weights = [p.detach().requires_grad_() for p in parts(path[s])]
    buffers = [torch.zeros_like(p) for p in weights]
    for _ in range(MTT.steps):
        logits = torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (x,))
        slopes = torch.autograd.grad(cross_entropy(logits, nets.images.labels), weights, create_graph=True)
        buffers = [0.9 * v + g for v, g in zip(buffers, slopes, strict=True)]
        weights = [w - eta * v for w, v in zip(weights, buffers, strict=True)]
    target = parts(path[s + MTT.expert_epochs])
    missed = sum((w - t).square().sum() for w, t in zip(weights, target, strict=True))
    far = sum((w - t).square().sum() for w, t in zip(parts(path[s]), target, strict=True))
    wanted = missed / far
    found = (MTT.weights().double() * MTT.losses(nets, Rng(3))).sum()
    assert float(found) == pytest.approx(float(wanted), rel=1e-12)
    for mine, theirs in zip(torch.autograd.grad(found, (x, eta)), torch.autograd.grad(wanted, (x, eta)), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-14)


def test_one_epoch_has_nothing_on_the_way() -> None:
    method = replace(MTT, expert_epochs=1, intermediate="equal")
    assert losses(method, start_of()).shape == (1,)
    assert method.weights().tolist() == [1.0]


def test_the_weights_of_the_losses() -> None:
    method = replace(MTT, expert_epochs=4, max_start_epoch=1)
    assert replace(method, intermediate="none").weights().tolist() == [0, 0, 0, 1]
    assert replace(method, intermediate="equal").weights().tolist() == [1, 1, 1, 1]
    assert replace(method, intermediate="rising").weights().tolist() == [0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize(("epoch", "factor"), [(0, 0.557), (9, 0.732), (10, 1.292), (19, 1.760)])
def test_the_balance_of_early_and_late_stretches(epoch: int, factor: float) -> None:
    assert balance(epoch, 20) == pytest.approx(factor, abs=5e-4)


def test_the_balance_scales_the_inner_loss() -> None:
    """A learning rate that is as much smaller takes it back."""
    start, method = start_of(), replace(MTT, max_start_epoch=1, balanced=True)
    plain = losses(replace(method, balanced=False), start, eta=0.1)
    assert torch.allclose(losses(method, start, eta=0.1 / balance(0, 1)), plain, rtol=1e-12)
    assert not torch.allclose(losses(method, start, eta=0.1), plain, rtol=1e-3)


def test_noise_on_kernels_moves_the_start_and_what_it_is_compared_with() -> None:
    start = start_of(ConvNet(SHAPE, CLASSES, width=2, depth=1))
    assert not torch.allclose(losses(replace(MTT, perturbation=1.0), start), losses(MTT, start), rtol=1e-4)
    mlp = start_of()  # which has no kernels
    assert torch.equal(losses(replace(MTT, perturbation=1.0), mlp), losses(MTT, mlp))


def test_ways_to_save_memory() -> None:
    start = start_of()

    def gradients(method: AST) -> tuple[Tensor | None, ...]:
        nets = method.networks(start)
        found = method.losses(nets, Rng(0))[-1]
        return torch.autograd.grad(found, (nets.images.x, nets.eta.value), allow_unused=True)

    plain, checkpointed = gradients(MTT), gradients(replace(MTT, checkpointed=True))
    for one, other in zip(plain, checkpointed, strict=True):
        assert one is not None and other is not None and torch.allclose(one, other, rtol=1e-10, atol=1e-15)
    images, eta = gradients(replace(MTT, second_order=0))
    assert images is None and eta is not None


def test_inner_steps_read_all_images_before_one_comes_again() -> None:
    read = lessons(7, 3, 6, NO_AUGMENTATION, Rng(0))
    for one_pass in (read[:3], read[3:]):
        assert sorted(torch.cat([lesson.chosen for lesson in one_pass]).tolist()) == list(range(7))
        assert sorted(len(lesson.chosen) for lesson in one_pass) == [1, 3, 3]
    assert not torch.equal(torch.cat([x.chosen for x in read[:3]]), torch.cat([x.chosen for x in read[3:]]))


def test_images_are_augmented_each_by_a_draw_of_its_own() -> None:
    turn = Siamese.parse("rotate")
    for lesson in lessons(7, 3, 6, turn, Rng(0)):
        assert len(lesson.drawn.values.unique()) == len(lesson.chosen)
    start = start_of()
    nets = MTT.networks(start)
    assert not torch.allclose(replace(MTT, augment=turn).losses(nets, Rng(0)), MTT.losses(nets, Rng(0)), rtol=1e-3)
    turned = experts_of(start, augment=turn).trajectory(0, 0)["weights"][0]
    plain = experts_of(start).trajectory(0, 0)["weights"][0]
    assert torch.equal(turned[0], plain[0]) and not torch.allclose(turned[1], plain[1], rtol=1e-3)


# --- the method --------------------------------------------------------------------------------------------------


def update(method: AST, nets: Networks, part: int = 0, parts: int = 1, seed: int = 0) -> Any:
    (found,) = method.updates(nets, Batch(None, None, Rng(seed, part=part, parts=parts)), Progress())
    return found


def test_parts_share_the_stretches_out() -> None:
    method = replace(MTT, stretches=3, intermediate="equal")
    nets = method.networks(start_of())
    whole = float(update(method, nets).loss)
    shares = [float(update(method, nets, part, 4).loss) for part in range(4)]
    assert sum(shares) / 4 == pytest.approx(whole, rel=1e-12)
    assert shares[3] == 0 and min(shares[:3]) > 0 and len(set(shares)) > 2


def test_the_learning_rate_is_kept_above_zero() -> None:
    nets = MTT.networks(start_of())
    found = update(MTT, nets)
    assert found.groups == ("images",)
    nets.eta.value.data.fill_(-0.3)
    found.then()
    assert float(nets.eta.value) == pytest.approx(LEAST_RATE)
    nets.eta.value.data.fill_(0.3)
    found.then()
    assert float(nets.eta.value) == 0.3


def test_images_and_learning_rate_move_at_their_own_rates() -> None:
    group = replace(MTT, lr_images=10.0, lr_eta=1e-3).networks(start_of()).groups["images"]
    assert group.lr * group.rates["eta"] == pytest.approx(1e-3) and "images" not in group.rates


def test_what_it_hands_over() -> None:
    start = start_of()
    nets = replace(MTT, per_class=2).networks(start)
    with torch.no_grad():
        nets.images.x += 1
    made = MTT.student(nets)
    assert made.labels.tolist() == [0, 0, 1, 1, 2, 2] and made.class_names == ("a", "b", "c")
    assert torch.equal(made.x, nets.images.x.float())
    assert torch.allclose(made.notes["start"] + 1, made.x)
    assert float(made.notes["eta"]) == pytest.approx(MTT.eta)
    real = start.data.rows(slice(None)).x
    assert real is not None
    for image, label in zip(made.notes["start"], made.labels, strict=True):  # real ones, of their class
        (found,) = (real.float() == image).flatten(1).all(1).nonzero()[:, 0].tolist()
        assert found % CLASSES == int(label)


def test_images_can_start_as_noise_or_representatives() -> None:
    start = start_of()
    real = start.data.rows(slice(None)).x
    assert real is not None
    noise = replace(MTT, initial="noise", per_class=4).networks(start).images.x
    assert not any(bool((real == image).all()) for image in noise)
    assert 0.3 < float(noise.std()) < 0.7  # 0.5 of 192 numbers
    nets = replace(MTT, initial="representative", per_class=2).networks(start)
    paths = nets.experts.paths
    with torch.no_grad():
        choices = [
            representatives(FlatNet(start.teacher.net)(w[-1], real), start.data.labels, 2, rng)  # type: ignore[attr-defined]
            for w, rng in ((w, after_one_draw(start.seed)) for w in paths)
        ]
    assert any(torch.equal(nets.images.x, real[chosen]) for chosen in choices)


def after_one_draw(seed: int) -> Rng:
    """The method's draws after that of the expert."""
    rng = Rng(seed, "ast")
    rng.shared_integer(0, MTT.experts)
    return rng


def test_experts_can_be_of_anybodys_network(tmp_path: Path) -> None:
    """Colour, five classes, layers of the user's own: drawn anew for every expert, and known by the layers and by what
    they compute.  The images are made by none of its weights, and the caller's network stays as it was."""
    first = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True)
    layers = *first, nn.AvgPool2d(7), nn.Flatten(), nn.Linear(16, 5)
    net, labels = nn.Sequential(*layers), torch.arange(20) % 5
    data, before = Dataset("mine", Rng(0).normal(20, 3, 16, 16), labels), vector_of(net)
    method = replace(MTT, penalty=1.0, perturbation=1.0, initial="representative", augment=Siamese())
    made = fs.condense_data(method, data, "2steps", network=net, folder=tmp_path, batch=4, show=False)
    assert made.labels.tolist() == [0, 1, 2, 3, 4] and made.shape == (3, 16, 16)
    assert not torch.equal(made.x, made.notes["start"]) and torch.equal(vector_of(net), before)
    starts = [load_tensors(file)["weights"][0, 0] for file in sorted((tmp_path / "stores").rglob("*.safetensors"))]
    assert len(starts) == 2 and not any(torch.equal(start, before) for start in starts)

    def digest(net: nn.Module) -> str:
        return experts_of(Start(NetworkClassifier(net, (3, 16, 16), 5), data)).digest()

    assert digest(net) != digest(nn.Sequential(*layers[:2], nn.Tanh(), *layers[3:]))


def test_what_cannot_work_is_said() -> None:
    with pytest.raises(ValueError, match=r"epochs=3 must be at least max_start_epoch - 1 .* = 4, where the last"):
        replace(MTT, epochs=3)
    with pytest.raises(ValueError, match="steps=1 must be at least expert_epochs=2"):
        replace(MTT, steps=1)
    with pytest.raises(ValueError, match="is a BatchNorm2d, whose statistics are no weights"):
        MTT.networks(start_of(ConvNet(SHAPE, CLASSES, width=2, depth=1, norm="batch")))
    start = start_of()
    with pytest.raises(ValueError, match=r"per_class=5 of class 0 must lie in \[0, 4\]"):
        replace(MTT, per_class=5).networks(start)
    with pytest.raises(ValueError, match="data 'points' has no labels"):
        MTT.networks(replace(start, data=replace(start.data, cond=None)))
    with pytest.raises(ValueError, match=r"expert 0: its loss is no number in epoch .; lower its learning rate 1e"):
        replace(MTT, expert_lr=1e200).networks(start)


# --- the experts -------------------------------------------------------------------------------------------------


def experts_of(start: Start, experts: int = 2, epochs: int = 4, **fields: Any) -> Experts:
    return Experts(start, experts, epochs, **{"batch": 5, "lr": 0.1, "augment": NO_AUGMENTATION, **fields})


def test_an_expert_is_sgd_with_the_clipping_loss_and_the_gradient_penalty() -> None:
    """Against the same training written out, on all samples at once: the factor of the loss rises in the first epochs,
    the rate falls once, and the momentum starts anew then."""
    start = start_of()
    x, labels = start.data.rows(slice(None)).x, start.data.labels  # type: ignore[attr-defined]
    found = experts_of(start, 1, 6, batch=12, clipping=4, penalty=0.7).trajectory(0, 0)["weights"][0]
    net = copy.deepcopy(start.teacher.net)
    nn.utils.vector_to_parameters(found[0], net.parameters())
    velocity, lr = None, 0.1
    for epoch in range(6):
        here = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(here).sum(), here, create_graph=True)
        penalty = (slope[:, 0].abs() - 1).square().mean()
        loss = (0.5, 0.625, 0.75, 0.875, 1, 1)[epoch] * cross_entropy(net(x), labels) + 0.7 * penalty
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        step = nn.utils.parameters_to_vector(gradients) + 1e-3 * vector_of(net)
        velocity = step if velocity is None else 0.9 * velocity + step
        nn.utils.vector_to_parameters(vector_of(net) - lr * velocity, net.parameters())
        assert torch.allclose(found[epoch + 1], vector_of(net), rtol=0, atol=1e-12)
        if epoch == 4:  # 6 // 2 + 1
            velocity, lr = None, 0.06


def test_every_epoch_of_a_trajectory_is_a_memory_of_its_own() -> None:
    store = experts_of(start_of())
    (weights,) = store.dataset(dict(store.make(0, {0}))[0]).paths
    assert bool((weights.diff(dim=0).norm(dim=1) > 1e-3).all())
    assert len({weights[e].norm().item() for e in range(5)}) == 5


def test_experts_differ_and_each_is_made_alone_with_the_same_bits(tmp_path: Path) -> None:
    store = experts_of(start_of())
    whole = dict(store.make(0, range(2)))
    ((number, alone),) = store.make(0, {1})
    assert number == 1 and all(torch.equal(alone[key], whole[1][key]) for key in alone)
    assert not torch.equal(whole[0]["weights"][:, 0], whole[1]["weights"][:, 0])
    assert not torch.equal(dict(store.make(1, {0}))[0]["weights"], whole[0]["weights"])
    kept = Shelf(tmp_path, Parallel(), False)(store, 0)
    assert isinstance(kept, Paths)
    assert torch.equal(torch.stack(kept.paths), torch.cat([whole[0]["weights"], whole[1]["weights"]]))
    assert torch.equal(kept.x, torch.stack([path[-1] for path in kept.paths]))
    assert kept.columns["loss"].shape == kept.columns["accuracy"].shape == (2, 4)
    files = sorted((tmp_path / "stores").rglob("*.safetensors"))
    assert [load_tensors(file)["weights"].shape for file in files] == 2 * [whole[0]["weights"].shape]  # one a file


def test_dropout_of_an_expert_is_its_own() -> None:
    """Whichever others are made before it; and what others draw is left as it was."""
    layers = nn.Flatten(), nn.Linear(16, 6), nn.Dropout(0.5), nn.Linear(6, CLASSES)
    store, before = experts_of(start_of(nn.Sequential(*layers))), torch.get_rng_state()
    whole = dict(store.make(0, range(2)))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        ((_, alone),) = store.make(0, {1})
    assert torch.equal(alone["weights"], whole[1]["weights"])
    layers[2].p = 0.0
    assert not torch.allclose(dict(store.make(0, {1}))[1]["weights"], alone["weights"], rtol=1e-3)


def test_experts_are_read_where_they_lie(tmp_path: Path) -> None:
    """All of them can be gigabytes: a number that changes in the file changes in the path."""
    (path, _) = Shelf(tmp_path, Parallel(), False)(experts_of(start_of()), 0).paths  # type: ignore[attr-defined]
    before = path.clone()
    with next((tmp_path / "stores").rglob("part-000.safetensors")).open("r+b") as file:
        whole = file.read()
        file.seek(whole.index(before[1].numpy().tobytes()))
        file.write(torch.tensor([7.0], dtype=torch.float64).numpy().tobytes())
    assert float(path[1, 0]) == 7.0 != float(before[1, 0])
    assert torch.equal(path.flatten()[path.shape[1] + 1 :], before.flatten()[path.shape[1] + 1 :])


def test_a_plan_makes_one_expert_of_one_step_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step that nobody times; of 2 experts of 4 epochs of 3 steps it is a sixth."""
    store, read = experts_of(start_of()), []
    real = Experts.epoch

    def spy(self: Experts, net: Any, optimizer: Any, order: Tensor, *rest: Any) -> Tensor:
        read.append(len(order))
        return real(self, net, optimizer, order, *rest)

    monkeypatch.setattr(Experts, "epoch", spy)
    times = iter((10.0, 11.5))
    monkeypatch.setattr("fewstep.condense.experts.clock", lambda: next(times))
    tensors, seconds = store.glimpse(0)
    assert (read, seconds) == ([5, *[5] * 4], 9.0)
    (path,) = store.dataset(tensors).paths
    assert bool((path.diff(dim=0).norm(dim=1) > 1e-3).all())


def test_a_run_keeps_its_experts_once(tmp_path: Path) -> None:
    """In its store, read from there, and in no checkpoint; the images are those of a run without a folder."""
    start, settings = start_of(), Settings(Budget(3), batch=4, precision="fp32")
    for folder in (None, tmp_path):
        made = run_recipe(MTT, start.teacher, start.data, settings, folder, show=False).model
        if folder is None:
            alone = made
    assert torch.equal(made.x, alone.x)
    kept = load_tensors(tmp_path / "checkpoint.safetensors")
    assert {name.partition("/")[0] for name in kept} == {"module", "optimiser"}
    assert {name for name in kept if name.startswith("module")} == {
        "module/eta/value", "module/images/labels", "module/images/start", "module/images/x",
    }  # fmt: skip


def test_experts_read_the_data_in_orders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same first weights."""
    monkeypatch.setattr(Start, "fresh", lambda self, net, k: copy.deepcopy(net))
    one, other = (made["weights"][0] for _, made in experts_of(start_of()).make(0, range(2)))
    assert torch.equal(one[0], other[0])
    assert not torch.allclose(one[1], other[1], rtol=1e-3)


def test_a_store_is_known_by_all_that_it_is_made_of() -> None:
    start, store = start_of(), experts_of(start_of())
    assert store.digest() == experts_of(start_of()).digest()
    others = [
        experts_of(start, lr=0.2), experts_of(start, clipping=0), experts_of(start, penalty=0.0),
        experts_of(start, augment=Siamese.parse("crop")), experts_of(start_of(n=15)), experts_of(start, epochs=5),
        experts_of(start_of(MLPClassifier(SHAPE, CLASSES, width=6))),
    ]  # fmt: skip
    assert len({store.digest(), *(other.digest() for other in others)}) == 8


def test_the_gradient_penalty_of_a_linear_network() -> None:
    """Its slope is the sum of the rows of its weights; over channels, pixel by pixel."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 3, 4)).double()
    slope = net[1].weight.sum(0).view(2, 3, 3)
    wanted = (slope.square().sum(0).sqrt() - 1).square().mean()
    x = Rng(0).normal(5, 2, 3, 3, dtype=torch.float64)
    assert float(gradient_penalty(net, x)) == pytest.approx(float(wanted), rel=1e-12)
    (found,) = torch.autograd.grad(gradient_penalty(net, x), net[1].weight)
    assert float(found.norm()) > 0


def test_smoothness() -> None:
    steps = torch.tensor([3.0, 1.0, 1.0, 1.0])
    path = torch.cat([torch.zeros(1), steps.cumsum(0)])[:, None]
    assert float(smoothness(path)) == pytest.approx(2.0)
    assert smoothness(torch.stack([path, torch.arange(5.0)[:, None]])).tolist() == pytest.approx([2.0, 1.0])


# --- representatives ---------------------------------------------------------------------------------------------


def test_representatives_are_the_nearest_to_the_centres_of_clusters() -> None:
    """Two classes of three clusters each: every cluster is a cross about a point that is in the data."""
    cross = torch.tensor([[0.0, 0.0], [0.1, 0.0], [-0.1, 0.0], [0.0, 0.1], [0.0, -0.1]])
    points = torch.cat([cross + torch.tensor([10.0 * k, 3.0]) for k in range(6)])
    labels = torch.arange(6).repeat_interleave(5) % 2
    chosen = representatives(points, labels, 3, Rng(0))
    assert sorted(chosen[:3].tolist()) == [0, 10, 20] and sorted(chosen[3:].tolist()) == [5, 15, 25]


def test_no_sample_is_chosen_twice() -> None:
    """The point that is nearest to both centres belongs to one of the clusters."""
    rng, labels = Rng(0), torch.zeros(40).long()
    for _ in range(20):
        points = rng.normal(40, 1)
        for chosen in (representatives(points, labels, 15, rng), stratified(labels, 15, rng)):
            assert len(set(chosen.tolist())) == 15


def test_without_scikit_learn_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "sklearn":
            monkeypatch.delitem(sys.modules, name)

    class Nothing:
        def find_spec(self, name: str, *rest: Any) -> None:
            if name.partition(".")[0] == "sklearn":
                raise ModuleNotFoundError(f"No module named '{name}'", name=name.partition(".")[0])

    monkeypatch.setattr(sys, "meta_path", [Nothing(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="need scikit-learn: pip install fewstep"):
        representatives(torch.zeros(4, 2), torch.zeros(4).long(), 1, Rng(0))


# --- the report --------------------------------------------------------------------------------------------------


def test_the_pictures_of_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after, a column for each class; nothing for what is no picture."""
    nets = replace(MTT, per_class=2).networks(start_of())
    with torch.no_grad():
        nets.images.x += 1
    made = MTT.student(nets)
    shown: list[tuple[Tensor, int]] = []
    monkeypatch.setattr("fewstep.report.tasks.ast.sheet", lambda x, n: shown.append((x, n)) or b"\x89PNG")
    before, after = figures(None, made, start_of().data)  # type: ignore[arg-type]
    assert "0.1," in after.caption and before.title != after.title
    by_columns = [0, 2, 4, 1, 3, 5]  # the images come class by class
    assert torch.equal(shown[0][0], made.notes["start"][by_columns]) and shown[0][1] == 3
    assert torch.equal(shown[1][0], made.x[by_columns])
    points = Condensed(torch.zeros(2, 7), torch.arange(2), notes=made.notes)
    assert figures(None, points, start_of().data) == ()  # type: ignore[arg-type]
