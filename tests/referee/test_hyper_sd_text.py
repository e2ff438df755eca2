"""Hyper-SD on text teachers of diffusers: all stages on latents with their prompts, and a reward that sees pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

from tiny_pipelines import clip_text, ddim, sd3_with_text, stable_diffusion, unet2d, unet2d_condition  # noqa: E402

import fewstep as fs  # noqa: E402
from fewstep.data import Dataset  # noqa: E402
from fewstep.hub.diffusers import export, from_pipeline, load_pipeline  # noqa: E402
from fewstep.methods.parts.feedback import Feedback  # noqa: E402
from fewstep.networks.latents import decode  # noqa: E402
from fewstep.rewards import Reward  # noqa: E402

CAPTIONS = ["a b", "c", "a b", "b", "c c", "a"]
RECIPE = fs.HyperSD(
    adversarial_weights=(0.0, 0.0, 0.1, 0.1), guidance_min=2.0, guidance_max=3.0, feedback=Feedback("given"),
    margins=(9.0,), pairs=4, ode_steps=2, eta=(0.3,), lr=1e-3,
)  # fmt: skip


def with_text() -> Any:
    pipe = stable_diffusion(unet2d_condition(), ddim(prediction_type="v_prediction", beta_schedule="scaled_linear"))
    pipe.register_modules(**clip_text(projected=False))
    return pipe


class Red(Reward):
    """Likes red pictures, and keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[int, ...]] = []

    def forward(self, pictures: Tensor, cond: Any) -> Tensor:
        assert set(cond) and len(next(iter(cond.values()))) == len(pictures)
        self.shown.append(tuple(pictures.shape[1:]))
        return pictures[:, 0].flatten(1).mean(1)


@pytest.mark.parametrize("made", [with_text, sd3_with_text], ids=["Stable Diffusion", "Stable Diffusion 3"])
def test_a_text_teacher_is_distilled_and_rated_by_its_pictures(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite losses in all six stages; the reward sees decoded pictures of three channels; the folder opens as the same
    student, and is exported with TCD's scheduler where the pipeline has a place for it."""
    torch.manual_seed(0)
    made().to(torch.float32).save_pretrained(tmp_path / "pipe")
    loaded = load_pipeline(tmp_path / "pipe")
    shape = loaded.denoiser.shape
    data = Dataset("captioned", torch.randn(len(CAPTIONS), *shape), loaded.embed(CAPTIONS))
    shown: list[tuple[int, ...]] = []
    monkeypatch.setattr(Red, "__deepcopy__", lambda self, memo: self, raising=False)
    reward = Red()
    reward.shown = shown
    given = {"budget": "7steps", "reward": reward, "batch": 2, "precision": "fp32", "show": False, "log_steps": 1}
    student = fs.distill(loaded.denoiser, RECIPE, data, folder=tmp_path / "run", **given)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == set(range(6))
    losses = [value for line in lines for key, value in line.items() if key.endswith("/loss")]
    assert len(losses) >= 9 and all(map(math.isfinite, losses))
    assert len(shown) >= 2 and set(shown) == {(3, 2 * shape[1], 2 * shape[2])}
    opened = fs.load(tmp_path / "run" / "model")
    cond = loaded.embed(["b", "c"])
    for steps in (1, 2, 4, 8):
        samples = student.sample(2, cond, steps=steps, seed=1)
        assert samples.shape == (2, *shape) and torch.equal(opened.sample(2, cond, steps=steps, seed=1), samples)
    written = export(opened, tmp_path / "plain")
    index = json.loads((written.folder / "model_index.json").read_text())
    assert written.code is (made is sd3_with_text)  # which has no scheduler of TCD's rule
    assert index["scheduler"][1] == ("StudentScheduler" if written.code else "TCDScheduler")


def test_latents_are_decoded_with_a_gradient() -> None:
    """To the latents, not to the autoencoder; the pictures are those of the pipeline."""
    torch.manual_seed(0)
    loaded = from_pipeline(with_text().to(torch.float32))
    z = torch.randn(2, *loaded.denoiser.shape, requires_grad=True)
    found = decode(loaded.denoiser, z)
    torch.testing.assert_close(found, loaded.decode(z.detach()))
    torch.testing.assert_close(found, fs.pictures(loaded.denoiser, z.detach()))
    found.square().sum().backward()
    assert z.grad is not None and bool(z.grad.abs().sum() > 0)
    vae: nn.Module = loaded.pipe.vae
    assert all(p.grad is None for p in vae.parameters()) and all(p.requires_grad for p in vae.parameters())
    bare = from_pipeline(diffusers.DDIMPipeline(unet2d(), ddim())).denoiser
    x = torch.randn(1, *bare.shape)
    assert decode(bare, x) is x
