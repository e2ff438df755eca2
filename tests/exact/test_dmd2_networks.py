"""DMD2 on networks of other make: heads for features of every shape, teachers seen on other schedules, checkpointed
activations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.denoisers import Denoiser, NetworkDenoiser, OnSchedule
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.method import Batch, Method, Networks, Progress, Update
from fewstep.methods.parts.adversary import Adversary, Discriminator
from fewstep.methods.parts.heads import FeatureHead
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.networks import UNet
from fewstep.networks.parts import Conditioning
from fewstep.predictions import EDMPrediction, TrigPrediction, V
from fewstep.randomness import Rng
from fewstep.schedules import EDM, FlowMatching, TrigFlow

SHAPE = (1, 8, 8)
SHAPES = {
    "grid": (16, 4, 4), "one place": (16, 1, 1), "one row": (16, 1, 5), "odd width": (7, 4, 4), "width 12": (12, 3, 3),
    "tokens": (5, 12), "one token": (1, 12), "vector": (12,), "video": (6, 2, 4, 4), "one frame": (6, 1, 4, 4),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_head_gives_one_logit_for_features_of_any_shape(shape: tuple[int, ...]) -> None:
    """One number a sample, that of the sample alone, with a gradient to all weights and all features."""
    torch.manual_seed(0)
    head = FeatureHead(shape)
    features = torch.randn(3, *shape, requires_grad=True)
    told = head(features)
    assert told.shape == (3,)
    torch.testing.assert_close(head(features[1:2])[0], told[1])
    told.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in head.parameters())
    assert features.grad is not None and bool((features.grad.flatten(1).abs().amax(1) > 0).all())


@pytest.mark.parametrize(
    ("shape", "places"),
    [
        ((8, 4, 6), (2, 3)),
        ((8, 1, 5), (1, 5)),
        ((8, 1, 1), (1, 1)),
        ((8, 2, 4, 6), (1, 2, 3)),
        ((8, 1, 4, 3), (1, 4, 3)),
    ],
)
def test_a_head_halves_the_places_where_every_side_has_two(shape: tuple[int, ...], places: tuple[int, ...]) -> None:
    """With DMD2's kernel of 4; else all places are kept."""
    assert FeatureHead(shape).layers[0](torch.zeros(1, *shape)).shape[2:] == places


def teacher() -> NetworkDenoiser:
    torch.manual_seed(0)
    net = UNet(SHAPE, (8, 24), 1, 32, 3)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return NetworkDenoiser(net, TrigFlow(sigma_data=0.7), V(), SHAPE, 3)  # no schedule but its own without a view


def batch_of(n: int = 4) -> Batch:
    rng = Rng(0)
    return Batch(rng.normal(n, *SHAPE), torch.arange(n) % 3, rng)


def test_a_view_tells_the_discriminator_what_its_network_does() -> None:
    """The logit of the same noised picture is the same on another schedule, where state and time are other numbers."""
    made = teacher()
    view = made.on(EDM())
    assert isinstance(view, OnSchedule) and view.feature_shape == made.feature_shape
    x, noise, cond = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE), torch.tensor([0, 2])
    level = torch.tensor([0.3, 4.0], dtype=torch.float64)
    here, there = (d.schedule.time_at(-level.log()) for d in (made, view))
    assert not torch.allclose(here, there)
    game = Discriminator(Adversary(), view)
    assert Discriminator(Adversary(), made).layers == game.layers
    torch.testing.assert_close(
        game.noised_logits(view, x, there, noise, cond), game.noised_logits(made, x, here, noise, cond),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("schedule", [EDM(), FlowMatching(t_min=1e-3)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "method", [DMD2(gan_weight=0.5), DMD2(gan_weight=0.0), Denoising()], ids=["gan", "no gan", "denoising"]
)
def test_a_teacher_seen_on_another_schedule_is_trained_from(method: Method, schedule: Any) -> None:
    """Every update has a finite loss, and a gradient for the networks that it moves."""
    nets = method.networks(Start(teacher().on(schedule)))
    for name, p in nets.named_parameters():
        if name.startswith("critic"):  # its start is the teacher, which leaves the student where it is
            p.data += 0.01 * torch.randn_like(p)
    for update in method.updates(nets, batch_of(), Progress()):
        assert isinstance(update, Update)
        assert bool(update.loss.isfinite())
        nets.zero_grad(set_to_none=True)
        update.loss.backward()
        for group in update.groups:
            for name in nets.groups[group].modules:
                moved = [p.grad for p in nets.get_submodule(name).parameters() if p.grad is not None]
                assert any(float(g.abs().max()) > 0 for g in moved), name


class Checkpointed(nn.Module):
    """Two layers, computed again in the backward pass or kept."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.shape, self.classes, self.again = SHAPE, 3, again
        self.conditioning = Conditioning(16, 3)
        self.enter, self.leave = nn.Linear(64, 16), nn.Linear(16, 64)
        self.feature_shape = (16,)

    def layer(self, x: Tensor, emb: Tensor) -> Tensor:
        return torch.tanh(self.enter(x.flatten(1)) + emb)

    def features(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        emb = self.conditioning(t, cond, {}, x.dtype)
        made: Tensor = checkpoint(self.layer, x, emb, use_reentrant=False) if self.again else self.layer(x, emb)
        return made

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        hidden = self.features(x, t, cond)
        out: Tensor = checkpoint(self.leave, hidden, use_reentrant=False) if self.again else self.leave(hidden)
        return out.reshape(x.shape)


def trained(method: DMD2, again: bool) -> Iterator[dict[str, Tensor]]:
    """The gradients of each update."""
    torch.manual_seed(0)
    made: Denoiser = NetworkDenoiser(
        Checkpointed(again), TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), SHAPE, 3
    )
    nets: Networks = method.networks(Start(made))
    for update in method.updates(nets, batch_of(), Progress()):
        nets.zero_grad(set_to_none=True)
        update.loss.backward()
        yield {name: p.grad.clone() for name, p in nets.named_parameters() if p.grad is not None}


def test_checkpointed_activations_give_the_same_gradients() -> None:
    """Layers of student, critic and head are computed again in the backward pass, with their parameters as they were:
    the student's update passes through a critic that is held until then."""
    kept, again = (list(trained(DMD2(gan_weight=0.5), choice)) for choice in (False, True))
    assert [len(gradients) > 0 for gradients in kept] == [True, True]
    for one, other in zip(kept, again, strict=True):
        assert one.keys() == other.keys()
        for name, gradient in one.items():
            assert torch.equal(gradient, other[name]), name


def test_several_steps_on_edm_are_equal_in_the_angle() -> None:
    """80, 1.2, 0.5, 0.2 and not the 80, 60, 40, 20 of a time that is the noise level."""
    method = DMD2(steps=4, gan_weight=0.0)
    nets = method.networks(Start(NetworkDenoiser(UNet(SHAPE, (8,), 1, 8, 3), EDM(), EDMPrediction(), SHAPE, 3)))
    assert method.plan(nets).times == pytest.approx((80.0, 1.2, 0.5, 0.2), rel=0.05)
