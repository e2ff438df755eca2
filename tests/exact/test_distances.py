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
from fewstep.files import save_tensors
from fewstep.methods.consistency.cm import ConsistencyDistillation
from fewstep.methods.flow_maps.rectified_flow import InstaFlow, ReflowDistillation
from fewstep.methods.matching.dmd import DMD
from fewstep.methods.parts.distances import CHOICES, Distance, LPIPSDistance, l1, named, of_unit_length
from fewstep.methods.start import Start
from fewstep.networks.classifier import bundled_classifier
from fewstep.networks.lpips import SCALE, SHIFT, SLICES, read_lpips
from fewstep.runs.record import hyper_parameters

F64 = torch.float64
DIGIT = (1, 8, 8)
WIDTHS = (2, 3, 4, 3, 5)


def pictures(n: int = 3, shape: tuple[int, ...] = DIGIT, seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


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
    d = named(f"lpips:{path}", (3, 224, 224)).double()
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
    assert torch.equal(d(a, b), named(f"lpips:{tmp_path / 'w.safetensors'}", (3, 224, 224))(*large))
    assert not any(p.requires_grad for p in d.parameters()) and LPIPSDistance.SIDE == 224


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
        (lambda: named("features:digits", (2,)), r"compares samples \[1, 8, 8\], the teacher makes \[2\]"),
        (lambda: named("lpips:x", (4, 32, 32)), r"1 or 3 channels, .* \[4, 32, 32\]; latents would have to be decoded"),
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
