"""Perceptual distances on latent teachers of diffusers: what is compared are the pictures that latents decode to."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

from tiny_pipelines import autoencoder, clip_text, ddim, stable_diffusion, unet2d_condition  # noqa: E402

import fewstep as fs  # noqa: E402
from fewstep.data import Dataset  # noqa: E402
from fewstep.hub.diffusers import LoadedPipeline, from_pipeline  # noqa: E402
from fewstep.methods.method import Batch, Progress, alone  # noqa: E402
from fewstep.methods.parts.distances import Distance  # noqa: E402
from fewstep.methods.parts.perceptual import FeatureDistance  # noqa: E402
from fewstep.methods.start import Start  # noqa: E402
from fewstep.networks.latents import decode  # noqa: E402
from fewstep.randomness import Rng  # noqa: E402

CAPTIONS = ["a b", "c", "a b", "b"]


def loaded() -> LoadedPipeline:
    """Stable Diffusion of latents 4x4, whose pictures are grey and 8x8."""
    torch.manual_seed(0)
    scheduler = ddim(prediction_type="v_prediction", beta_schedule="scaled_linear")
    pipe = stable_diffusion(unet2d_condition(sample_size=4), scheduler)
    vae = autoencoder(in_channels=1, out_channels=1, sample_size=8)
    pipe.register_modules(vae=vae, **clip_text(projected=False))
    return from_pipeline(pipe.to(torch.float32))


class Seen(nn.Module):
    """Two layers of grey pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def captioned(found: LoadedPipeline) -> Dataset:
    return Dataset("captioned", torch.randn(len(CAPTIONS), *found.denoiser.shape), found.embed(CAPTIONS))


@pytest.mark.parametrize("method", [fs.LatentConsistencyDistillation, fs.ConsistencyDistillation])
@pytest.mark.parametrize("by", ["features:digits", FeatureDistance(Seen(), ["first", "second"])], ids=["digits", "own"])
def test_the_gradient_reaches_the_student_through_the_decoder(method: Any, by: Any) -> None:
    """And nothing else: the autoencoder is not among the networks, and keeps its weights free."""
    here = loaded()
    vae, data = here.pipe.vae, captioned(here)
    nets = method(distance=by).networks(Start(here.denoiser, data))
    assert {id(p) for p in nets.parameters()}.isdisjoint(map(id, vae.parameters()))
    assert not any("vae" in name for name in nets.state_dict())
    calls: list[tuple[int, ...]] = []
    vae.decoder.register_forward_hook(lambda module, given, out: calls.append(tuple(out.shape)))
    (update,) = alone(method(distance=by).updates(nets, Batch(data.x, data.cond, Rng(0)), Progress()))
    update.loss.backward()
    assert calls == [(4, 1, 8, 8)] * 2 and math.isfinite(float(update.loss)) and float(update.loss) > 0
    moved = [p.grad for p in nets.weights("student") if p.grad is not None]
    assert moved and all(bool(grad.isfinite().all()) for grad in moved) and any(bool(grad.any()) for grad in moved)
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())
    assert all(p.grad is None for p in nets.distance.parameters())


def test_a_run_by_decoded_features_is_recorded_and_opens(tmp_path: Path) -> None:
    """Its folder says how it compared, and holds the student alone."""
    here = loaded()
    here.pipe.save_pretrained(tmp_path / "pipe")
    opened, data = fs.load(tmp_path / "pipe"), captioned(here)
    run = {"budget": "2steps", "batch": 2, "show": False, "precision": "fp32"}
    recipe = fs.LatentConsistencyDistillation(distance="features:digits", lr=1e-3)
    student = fs.distill(opened, recipe, data, folder=tmp_path / "run", **run)
    assert '"distance": "features:digits"' in (tmp_path / "run" / "recipe.json").read_text()
    plain = fs.distill(opened, fs.LatentConsistencyDistillation(lr=1e-3), data, **run)
    cond = here.embed(["b", "c"])
    samples = student.sample(2, cond, seed=1)
    assert not torch.equal(plain.sample(2, cond, seed=1), samples)
    assert torch.equal(fs.load(tmp_path / "run" / "model").sample(2, cond, seed=1), samples)


def test_pictures_that_do_not_fit_are_told_before_the_run() -> None:
    with pytest.raises(ValueError, match=r"compares pictures \[1, 28, 28\], the teacher makes \[1, 8, 8\] of latents"):
        Distance("features:fashion").network(loaded().denoiser)


def test_a_half_precision_autoencoder_decodes_in_float32() -> None:
    """By a frozen copy made once; the pipeline's own stays as it was."""
    here = loaded()
    z = torch.randn(2, *here.denoiser.shape, requires_grad=True)
    vae = here.pipe.vae.to(torch.bfloat16)
    whole = copy.deepcopy(vae).to(torch.float32)
    pictures = decode(here.denoiser, z)
    # frozen weights and trained ones may be convolved by different kernels; half precision is 1e-3 away
    torch.testing.assert_close(pictures, whole.decode(z / vae.config.scaling_factor).sample, rtol=1e-5, atol=1e-6)
    origin = here.denoiser.net.origin
    assert vae.dtype == torch.bfloat16 and origin.decoder(z.device) is origin.decoder(z.device) is not vae
    pictures.sum().backward()
    assert z.grad is not None and bool(z.grad.any()) and all(p.grad is None for p in vae.parameters())
    here.pipe.vae.to(torch.float32)
    assert origin.decoder(z.device) is vae
    elsewhere = origin.decoder(torch.device("meta"))  # as on an accelerator, where the pipeline is not
    assert elsewhere.device.type == "meta" and vae.device.type == "cpu"
    assert not any(p.requires_grad for p in elsewhere.parameters()) and all(p.requires_grad for p in vae.parameters())
