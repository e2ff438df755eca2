"""Distances by name: against formulas written out, files of LPIPS weights, and what a recipe can record."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep import api
from fewstep.cli.methods import build
from fewstep.data import load as load_data
from fewstep.denoisers import NetworkDenoiser
from fewstep.files import save_tensors
from fewstep.methods.consistency.cm import ConsistencyDistillation
from fewstep.methods.flow_maps.rectified_flow import InstaFlow, ReflowDistillation
from fewstep.methods.matching.dmd import DMD
from fewstep.methods.parts.distances import CHOICES, Distance, l1
from fewstep.methods.parts.perceptual import FeatureDistance, LPIPSDistance, PictureDistance, of_unit_length
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.networks.classifier import bundled_classifier
from fewstep.networks.feature_nets import FeatureNet, TappedLayers
from fewstep.networks.lpips import SCALE, SHIFT, SLICES, read_lpips
from fewstep.predictions import TrigPrediction
from fewstep.runs.record import hyper_parameters
from fewstep.schedules import TrigFlow

F64 = torch.float64
DIGIT = (1, 8, 8)
WIDTHS = (2, 3, 4, 3, 5)


def pictures(n: int = 3, shape: tuple[int, ...] = DIGIT, seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def teacher(shape: tuple[int, ...], net: type[MLP] = MLP) -> NetworkDenoiser:
    """A small network of samples of this shape."""
    return NetworkDenoiser(net(shape, 4, 1), TrigFlow(), TrigPrediction(), shape)


def named(name: str, shape: tuple[int, ...]) -> nn.Module:
    return Distance(name).network(teacher(shape))


def lpips_tensors(naming: str = "lpips", seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a narrow network in the layout of LPIPS's own file, or with torchvision's names."""
    rng = torch.Generator().manual_seed(seed)
    tensors, width = {}, 3
    for k, (numbers, out) in enumerate(zip(SLICES, WIDTHS, strict=True)):
        for number in numbers:
            name = f"net.slice{k + 1}.{number}" if naming == "lpips" else f"features.{number}"
            tensors[f"{name}.weight"] = torch.randn(out, width, 3, 3, generator=rng) * (2 / (9 * width)) ** 0.5
            tensors[f"{name}.bias"] = 0.1 * torch.randn(out, generator=rng)
            width = out
        tensors[f"lin{k}.model.1.weight"] = torch.rand(1, out, 1, 1, generator=rng)
    return tensors


def lpips_by_hand(tensors: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """LPIPS of colour pictures as its paper has it, one layer after the other."""
    total = torch.zeros(len(a), dtype=a.dtype)
    states = [(x - torch.tensor(SHIFT)[:, None, None]) / torch.tensor(SCALE)[:, None, None] for x in (a, b)]
    for k, numbers in enumerate(SLICES):
        if k:
            states = [functional.max_pool2d(x, 2) for x in states]
        for number in numbers:
            name = f"net.slice{k + 1}.{number}"
            weight, bias = (tensors[f"{name}.{part}"].to(a) for part in ("weight", "bias"))
            states = [functional.conv2d(x, weight, bias, padding=1).clamp_min(0) for x in states]
        one, other = (x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in states)
        head = tensors[f"lin{k}.model.1.weight"].to(a).flatten()
        for sample in range(len(a)):
            at = (one[sample] - other[sample]).square()
            total[sample] += sum(float(head[c]) * float(at[c].mean()) for c in range(len(head)))
    return total


@pytest.mark.parametrize(("name", "expected"), [("l2", 2.5), ("l1", 1.5), ("pseudo-huber", 2.23530305)])
def test_plain_distances(name: str, expected: float) -> None:
    """Of (0, 0) and (1, 2): mean square 5/2, mean absolute 3/2, and sqrt(5 + c^2) - c with c = 0.00054 sqrt(2)."""
    d = named(name, (2,))(torch.zeros(1, 2, dtype=F64), torch.tensor([[1.0, 2.0]], dtype=F64))
    assert d.shape == (1,) and float(d) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_features_of_a_classifier_by_hand(name: str) -> None:
    """Three layers after their ReLUs, unit length over the channels, mean over places, sum over layers."""
    net = bundled_classifier(name).double()
    a, b = (pictures(shape=net.shape, seed=seed).double() for seed in (0, 1))
    expected = torch.zeros(3, dtype=F64)
    x, y = a, b
    for block in net.convolutions:
        x, y = block[:3](x), block[:3](y)
        one, other = (z / z.square().sum(1, keepdim=True).sqrt() for z in (x, y))
        expected += torch.nan_to_num(one - other).square().sum(1).mean((1, 2))
        x, y = block[3](x), block[3](y)
    d = named(f"features:{name}", net.shape).double()
    torch.testing.assert_close(d(a, b), expected, rtol=1e-9, atol=0)
    assert float(d(a, a).abs().max()) == 0
    assert bool((expected > 0.1).all())
    # the last layer is the one that the metrics' features are made of
    torch.testing.assert_close(net.penultimate(x.flatten(1)).relu(), net.features(a))


def test_features_see_a_digit_where_pixels_see_a_shift() -> None:
    """Pictures of one digit are nearer to each other than those of different digits, and the gradient is finite even
    where no unit of the network is active."""
    data = load_data("digits", split="test")
    x, labels = data.read(slice(0, 200)), data.labels[:200]
    d = named("features:digits", DIGIT)
    gaps = torch.stack([d(x, x.roll(k, 0)) for k in range(1, 20)])
    same = torch.stack([labels == labels.roll(k, 0) for k in range(1, 20)])
    assert float(gaps[same].mean()) < 0.75 * float(gaps[~same].mean())
    flat = torch.full((1, *DIGIT), -1.0, requires_grad=True)
    d(flat, x[:1]).sum().backward()
    assert bool(flat.grad.isfinite().all())
    nothing = torch.zeros(1, 4, 2, 2, requires_grad=True)
    made = of_unit_length(nothing.relu())
    made.sum().backward()
    assert torch.equal(made, torch.zeros_like(nothing)) and torch.equal(nothing.grad, torch.zeros_like(nothing))


@pytest.mark.parametrize("naming", ["lpips", "torchvision"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_lpips_from_a_file_is_the_formula(naming: str, suffix: str, tmp_path: Path) -> None:
    """In both layouts of names and both kinds of file; a file may hold more than is read."""
    path = tmp_path / f"vgg.{suffix}"
    tensors = lpips_tensors(naming) | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    if suffix == "pt":
        torch.save(tensors, path)
    else:
        save_tensors(path, tensors)
    a, b = (pictures(2, (3, 224, 224), seed).double() for seed in (0, 1))
    d = LPIPSDistance(path).double()
    torch.testing.assert_close(d(a, b), lpips_by_hand(lpips_tensors(), a, b), rtol=1e-6, atol=0)
    assert float(d(a, a).abs().max()) == 0 < float(d(a, b).min())


def test_lpips_standardises_with_imagenets_moments() -> None:
    """Those of levels in [0, 1], taken to [-1, 1]."""
    assert pytest.approx([2 * m - 1 for m in (0.485, 0.456, 0.406)], abs=1e-12) == SHIFT
    assert pytest.approx([2 * s for s in (0.229, 0.224, 0.225)], abs=1e-12) == SCALE


def test_lpips_of_small_and_grey_pictures(tmp_path: Path) -> None:
    """Grey is the same in all colours; below 224 pixels pictures are enlarged."""
    save_tensors(tmp_path / "w.safetensors", lpips_tensors())
    d = named(f"lpips:{tmp_path / 'w.safetensors'}", DIGIT)
    a, b = pictures(), pictures(seed=1)
    large = [functional.interpolate(x.expand(-1, 3, -1, -1), size=(224, 224), mode="bilinear") for x in (a, b)]
    assert torch.equal(d(a, b), d(*large))
    assert not any(p.requires_grad for p in d.parameters()) and LPIPSDistance.SIDE == 224
    with pytest.raises(ValueError, match=r"compares pictures of 1 or 3 channels, the teacher makes \[4, 8, 8\]$"):
        named(f"lpips:{tmp_path / 'w.safetensors'}", (4, 8, 8))


@pytest.mark.parametrize("change", ["absent", "head", "narrow", "not tensors", "cut", "code"])
def test_a_wrong_file_is_named(change: str, tmp_path: Path) -> None:
    tensors = lpips_tensors()
    path = tmp_path / "w.pt"
    if change == "head":
        del tensors["lin3.model.1.weight"]
    if change == "narrow":
        tensors["net.slice2.7.weight"] = tensors["net.slice2.7.weight"][:, :1]
    torch.save(tensors if change != "not tensors" else {"epoch": 3}, path)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-2000])
    if change == "code":
        path.write_bytes(pickle.dumps(Path("anything")))
    if change == "absent":
        path.unlink()
    said = {
        "absent": "no such weights file",
        "head": "no tensor lin3.model.1.weight in it: LPIPS needs VGG16's convolutions and five heads",
        "narrow": r"net.slice2.7 has shape \[3, 1, 3, 3\], \[any, 3, 3, 3\] is needed",
    }.get(change, "damaged, or more than tensors by name: save the state_dict")
    with pytest.raises((ValueError, FileNotFoundError), match=r"w\.pt: " + said) as caught:
        read_lpips(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DMD(distance="lpisp"), f"DMD: distance: 'lpisp' is not one of {CHOICES}"),
        (lambda: DMD(distance="features:digit"), "did you mean 'features:digits'"),
        (lambda: DMD(distance="lpips:"), "'lpips:' is not one of"),
        (lambda: DMD(distance=3), "distance: '3' is not a word"),
        (
            lambda: named("features:digits", (2,)),
            r"'features:digits' compares pictures \[1, 8, 8\], the teacher makes \[2\]$",
        ),
        (lambda: named("lpips:absent.safetensors", DIGIT), "absent.safetensors: no such weights file"),
    ],
)
def test_mistakes_are_one_line(make, said: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        make()


@pytest.mark.parametrize("method", ["cm", "cm-training", "instaflow", "dmd"])
def test_names_round_trip_through_a_recipe(method: str) -> None:
    """From the command line, into recipe.json, and back."""
    for name in ("l1", "features:digits", "lpips:some/file.safetensors"):
        recipe = build(method, {"distance": name})
        plain = hyper_parameters(recipe)
        assert plain["distance"] == name and build(method, plain) == recipe
    assert "distance='lpips:some/file.safetensors'," in repr(recipe)  # as in checkpoints since the first version
    assert recipe.distance == Distance("lpips:some/file.safetensors") and str(recipe.distance) == recipe.distance.by


class Halved(nn.Module):
    """A distance with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.factor * l1(a, b)


def test_any_function_compares_and_is_recorded_nowhere(tmp_path: Path) -> None:
    """A function gives the weights that its name gives; a module stays as it is; a run folder refuses both."""
    run = {"data": "digits", "budget": "2steps", "batch": 8, "show": False, "precision": "fp32"}

    def trained(distance: object) -> Tensor:
        made = api.distill("digits", ConsistencyDistillation(distance=distance), **run)
        return torch.cat([p.detach().flatten() for p in made.parameters()])

    assert torch.equal(trained(l1), trained("l1")) and not torch.equal(trained(l1), trained("l2"))
    module = Halved().train()
    trained(module)
    assert module.training and module.factor.requires_grad and module.factor.grad is None
    with pytest.raises(ValueError, match="'l1' is a function, which no file can record: name one, or use no folder"):
        api.distill("digits", ConsistencyDistillation(distance=l1), folder=tmp_path / "run", **run)
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_the_methods_compare_by_the_name() -> None:
    """Every method with a distance has it among its networks, frozen; InstaFlow hands it to its last stage."""
    start = Start(api.load("digits"))
    for method in (ConsistencyDistillation, ReflowDistillation, DMD):
        nets = method(distance="features:digits").networks(start)
        assert len(list(nets.distance.parameters())) > 0
        assert not any(p.requires_grad for p in nets.distance.parameters()) and not nets.distance.training
    last = InstaFlow(distance="features:digits").stages()[-1].method
    assert isinstance(last, ReflowDistillation) and last.distance == Distance("features:digits")


def test_perception_is_in_float32_whatever_trains() -> None:
    """Under autocast the value is the same bit for bit, and of the pictures' type."""
    d, a, b = named("features:digits", DIGIT), pictures(), pictures(seed=1)
    plain = d(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(d(a, b), plain)
    assert d(a.bfloat16(), b.bfloat16()).dtype == torch.bfloat16


class Halves(MLP):
    """A network whose latents are pictures of twice the side, of a decoder with a weight of its own."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def decode(self, samples: Tensor) -> Tensor:
        large = functional.interpolate(self.scale.detach() * samples, scale_factor=2, mode="bilinear")
        return (large @ torch.eye(8)).sin()


LATENT = (1, 4, 4)


def test_latents_are_decoded_before_they_are_compared() -> None:
    """Value and gradient are those of the decoded pictures, in parts as in the whole; the decoder has no gradient and
    is no part of the distance; plain distances and functions are given the latents."""
    model, a, b = teacher(LATENT, Halves), pictures(4, LATENT).requires_grad_(), pictures(4, LATENT, seed=1)
    d, alone = Distance("features:digits").network(model), named("features:digits", DIGIT)
    assert torch.equal(d(a, b), alone(model.net.decode(a), model.net.decode(b)))
    (found,) = torch.autograd.grad(d(a, b).sum(), a)
    (expected,) = torch.autograd.grad(alone(model.net.decode(a), model.net.decode(b)).sum(), a)
    assert torch.equal(found, expected) and bool((found.flatten(1).abs().sum(1) > 0).all())
    d(a, b).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    for part in (slice(0, 1), slice(1, 4)):
        torch.testing.assert_close(d(a[part], b[part]), d(a, b)[part])
    assert {id(p) for p in d.parameters()}.isdisjoint(map(id, model.parameters()))
    shapes = {name: value.shape for name, value in d.state_dict().items()}
    assert shapes == {f"distance.{name}": value.shape for name, value in alone.state_dict().items()}

    seen: list[Tensor] = []

    def gap(a: Tensor, b: Tensor) -> Tensor:
        seen.append(a)
        return l1(a, b)

    assert torch.equal(Distance(gap).network(model)(a, b), Distance("l1").network(model)(a, b)) and seen[0] is a
    assert torch.equal(Distance(Halved()).network(model)(a, b), l1(a, b) / 2)


def test_decoding_is_in_float32_whatever_trains() -> None:
    """Of half-precision latents, and under autocast."""
    model, a, b = teacher(LATENT, Halves), pictures(4, LATENT).bfloat16(), pictures(4, LATENT, seed=1).bfloat16()
    d = Distance("features:digits").network(model)
    found, plain = d(a, b), d(a.float(), b.float())
    assert found.dtype == torch.bfloat16 and torch.equal(found, plain.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(d(a.float(), b.float()), plain)


def test_pictures_that_do_not_fit_are_told_with_their_latents() -> None:
    said = r"'features:fashion' compares pictures \[1, 28, 28\], the teacher makes \[1, 8, 8\] of latents \[1, 4, 4\]$"
    with pytest.raises(ValueError, match=said):
        Distance("features:fashion").network(teacher(LATENT, Halves))

    class Lost(MLP):
        def decode(self, samples: Tensor) -> Tensor:
            raise ValueError("the autoencoder is not where it was")

    with pytest.raises(ValueError, match="'features:digits' compares pictures: the autoencoder is not where it was"):
        Distance("features:digits").network(teacher(LATENT, Lost))
    assert Distance("l2").network(teacher(LATENT, Lost))(pictures(2, LATENT), pictures(2, LATENT)).tolist() == [0, 0]


class Levels(nn.Module):
    """Somebody's own network of grids, tokens and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 5, 3, stride=2)
        self.tokens, self.last, self.unused = nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.tokens(self.second(self.first(x).relu()).flatten(2).mT).mean(1))


def test_layers_of_any_network_make_a_distance() -> None:
    """Each layer's units of length 1 at every place, grid or token or the whole; pictures and decoded latents."""
    torch.manual_seed(0)
    net, layers = Levels(), ["first", "tokens", "last"]
    mine, a, b = FeatureDistance(net, layers), pictures(), pictures(seed=1)

    def by_hand(x: Tensor) -> list[Tensor]:
        grid = net.first(x)
        tokens = net.tokens(net.second(grid.relu()).flatten(2).mT)
        channels_last = [grid.permute(0, 2, 3, 1), tokens, net(x)[:, None]]
        return [(part / part.norm(dim=-1, keepdim=True)).flatten(1, -2) for part in channels_last]

    expected = sum((one - other).square().sum(-1).mean(1) for one, other in zip(by_hand(a), by_hand(b), strict=True))
    torch.testing.assert_close(mine(a, b), expected)
    made = Distance(mine).network(teacher(DIGIT))
    torch.testing.assert_close(made(a, b), expected)
    assert mine.training and not made.training and mine.net is not made.net  # a copy of it
    latent = teacher(LATENT, Halves)
    z, y = pictures(shape=LATENT), pictures(shape=LATENT, seed=1)
    torch.testing.assert_close(Distance(mine).network(latent)(z, y), mine(latent.net.decode(z), latent.net.decode(y)))
    # what a network takes may be prepared
    flipped = FeatureDistance(TappedLayers(net, layers, prepare=lambda x: x.flip(-1)))
    torch.testing.assert_close(flipped(a, b), mine(a.flip(-1), b.flip(-1)))


def test_a_network_with_maps_counts_its_channels() -> None:
    class Weighted(FeatureNet):
        def maps(self, pictures: Tensor) -> list[Tensor]:
            return [torch.cat([pictures, torch.ones_like(pictures)], 1)]

        def weights(self) -> list[Tensor]:
            return [torch.tensor([0.0, 3.0])]

    a, b = pictures(), pictures(seed=1)
    lengths = [(1 + x.square()).rsqrt() for x in (a, b)]
    expected = 3 * (lengths[0] - lengths[1]).square().flatten(1).mean(1)
    torch.testing.assert_close(Distance(FeatureDistance(Weighted())).network(teacher(DIGIT))(a, b), expected)


def test_a_distance_of_ones_own_may_ask_for_pictures() -> None:
    class Large(PictureDistance):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            assert a.shape[1:] == b.shape[1:] == DIGIT
            return l1(a, b)

    model, a, b = teacher(LATENT, Halves), pictures(3, LATENT), pictures(3, LATENT, seed=1)
    assert torch.equal(Distance(Large()).network(model)(a, b), l1(model.net.decode(a), model.net.decode(b)))
    assert str(Distance(Large())) == "Large"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FeatureDistance(Levels()), "a Levels has no maps of its own: name the layers to compare at, or make"),
        (lambda: FeatureDistance(Levels(), ["third"]), "'third' is no layer of this Levels; it has first, second, tok"),
        (
            lambda: Distance(FeatureDistance(Levels(), ["unused"])).network(teacher(DIGIT)),
            "^layer 'unused' gave features 0",
        ),
        (
            lambda: Distance(FeatureDistance(Levels(), ["last"])).network(teacher((3, 8, 8))),
            r"^distance: 'FeatureDistance' compares pictures that its network takes \(.*\), the teacher makes \[3, 8, ",
        ),
    ],
)
def test_networks_that_cannot_compare_say_why(make, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)
