"""The masked autoencoder: patches and back, kept pixels untouched, dropped ones unseen, and which are dropped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.networks.mae import MaskedAutoencoder, least_important, number_dropped, random_drops
from fewstep.randomness import Rng


def net(shape: tuple[int, int, int] = (1, 8, 8), patch: int = 2) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(shape, patch, width=16, depth=2, heads=2).eval()


def pictures(n: int, *shape: int) -> Tensor:
    return 2 * torch.rand(n, *shape, generator=torch.Generator().manual_seed(n)) - 1


def test_patches_are_cut_row_by_row_and_put_together_again() -> None:
    made, x = net((3, 8, 12), 4), pictures(5, 3, 8, 12)
    cut = made.patches(x)
    assert cut.shape == (5, 6, 48) and made.grid == (2, 3) and made.length == 6
    assert torch.equal(cut[:, 4], x[:, :, 4:8, 4:8].flatten(1))
    assert torch.equal(made.pictures(cut), x)


def test_kept_pixels_are_exactly_as_they_were() -> None:
    """Dropped ones are what the network predicts, within [-1, 1]; with none dropped the picture is itself."""
    made, x = net(), pictures(6, 1, 8, 8)
    dropped = random_drops(6, 16, 5, Rng(0))
    filled = made.filled(x, dropped)
    changed = made.patches(filled != x).any(2)
    assert bool((changed <= dropped).all()) and int(changed.sum()) == 6 * 5
    assert torch.allclose(made.patches(filled)[dropped], made(x, dropped).clamp(-1, 1)[dropped], atol=1e-5)
    with torch.no_grad():
        made.leave.bias += 10
    assert bool((made.patches(made.filled(x, dropped))[dropped] == 1).all())
    assert torch.equal(made.filled(x, torch.zeros_like(dropped)), x)
    assert torch.equal(made.patches(made.filled(x.double(), dropped))[~dropped], made.patches(x.double())[~dropped])


def test_what_is_predicted_depends_on_the_seen_patches_alone() -> None:
    made, x = net(), pictures(3, 1, 8, 8)
    dropped = random_drops(3, 16, 8, Rng(1))
    other = torch.where(dropped[..., None], made.patches(pictures(3, 1, 8, 8).flip(0)), made.patches(x))
    assert torch.allclose(made(made.pictures(other), dropped), made(x, dropped), atol=1e-6)
    seen = (~dropped[0]).nonzero()[0, 0]
    other = made.patches(x)
    other[0, seen] += 0.5
    moved = (made(made.pictures(other), dropped) - made(x, dropped)).abs().amax((1, 2))
    assert float(moved[0]) > 1e-4 and float(moved[1:].max()) < 1e-6


def test_a_seen_patch_is_told_its_place() -> None:
    """What the encoder reads of a picture without its first patch, and without its last: the places of the others."""
    made, x, read = net(), torch.zeros(2, 1, 8, 8), []
    made.encoder.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    dropped = torch.zeros(2, 16, dtype=torch.bool)
    dropped[0, 0], dropped[1, 15] = True, True
    made(x, dropped)
    places = read[0] - made.enter.bias
    assert torch.allclose(places[0], made.place[1:], atol=1e-6)
    assert torch.allclose(places[1], made.place[:15], atol=1e-6)


def test_what_is_predicted_depends_on_the_place() -> None:
    """Of two dropped patches of one picture."""
    made, x = net(), pictures(3, 1, 8, 8)
    predicted = made(x, random_drops(3, 16, 2, Rng(1)))[random_drops(3, 16, 2, Rng(1))].view(3, 2, -1)
    assert float((predicted[:, 0] - predicted[:, 1]).abs().amax(1).min()) > 1e-4


def test_the_loss_is_that_of_the_dropped_patches() -> None:
    made, x = net(), pictures(4, 1, 8, 8)
    dropped = random_drops(4, 16, 3, Rng(2))
    errors = [
        (made(x, dropped)[i, place] - made.patches(x)[i, place]).square().mean()
        for i, place in dropped.nonzero().tolist()
    ]
    assert float(made.loss(x, dropped)) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)


def test_it_trains_in_bf16() -> None:
    """Under autocast its tokens are bfloat16 and what stands for an unseen patch is not."""
    made, x = net().train(), pictures(4, 1, 8, 8)
    dropped = random_drops(4, 16, 3, Rng(2))
    with torch.autocast("cpu", torch.bfloat16):
        made.loss(x, dropped).backward()
    assert made.unseen.grad is not None and bool(made.unseen.grad.isfinite().all())
    assert float(made.loss(x, dropped)) == pytest.approx(float(net().loss(x, dropped)))


def test_the_number_of_dropped_patches() -> None:
    """``L - int(L (1 - share))``: 10 of 49 at 0.2."""
    assert [number_dropped(49, share) for share in (0, 0.2, 0.5, 0.9)] == [0, 10, 25, 45]
    assert number_dropped(16, 0.2) == 4
    with pytest.raises(ValueError, match="leaves none to see"):
        number_dropped(4, 0.8)


def test_random_drops_are_as_many_in_every_picture_and_of_every_patch() -> None:
    """2,000 pictures: each patch within four standard errors of 3 in 8."""
    dropped = random_drops(2000, 8, 3, Rng(3))
    assert bool((dropped.sum(1) == 3).all())
    chance = 3 / 8
    assert bool(((dropped.float().mean(0) - chance).abs() < 4 * (chance * (1 - chance) / 2000) ** 0.5).all())


def test_the_least_important_patches_are_dropped_and_of_equal_ones_any() -> None:
    importance = torch.tensor([[0.3, 0.0, 0.9, 0.1]])
    assert least_important(importance, 2, Rng(0)).tolist() == [[False, True, False, True]]
    assert not bool(least_important(importance, 0, Rng(0)).any())
    dropped = least_important(torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]]).expand(2000, 5), 2, Rng(4))
    assert bool((dropped.sum(1) == 2).all()) and not bool(dropped[:, 4].any())
    assert bool(((dropped[:, :4].float().mean(0) - 0.5).abs() < 4 * (0.25 / 2000) ** 0.5).all())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch": 3}, "patch=3 must divide the sides of pictures of 8x8"),
        ({"width": 12, "heads": 4}, "width=12 must be a multiple"),
    ],
)
def test_what_cannot_be_made_is_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoder((1, 8, 8), **fields)
