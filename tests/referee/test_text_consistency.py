"""SCott and MLCM on a text teacher of diffusers: trained with prompts, MLCM without any picture and with a reward that
is told the prompt; saved, opened, and written for plain diffusers, whose LCMScheduler makes the calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

from tiny_pipelines import clip_text, ddim, stable_diffusion, unet2d_condition  # noqa: E402

import fewstep as fs  # noqa: E402
from fewstep.data import Dataset  # noqa: E402
from fewstep.data.dataset import Prior  # noqa: E402
from fewstep.hub.diffusers import export, load_pipeline  # noqa: E402
from fewstep.runs.course import run_recipe  # noqa: E402
from fewstep.training.budget import Budget  # noqa: E402
from fewstep.training.settings import Settings  # noqa: E402

CAPTIONS = ["a b", "c", "a b", "b", "c c", "a"]
SETTINGS = Settings(Budget(6), batch=2, precision="fp32", save_seconds=0.0, log_steps=1)


#: The shapes of the prompts that the reward was asked about, and of the pictures.
ASKED: list[tuple[int, ...]] = []
SHOWN: list[tuple[int, ...]] = []


class Warm(nn.Module):
    """A reward of bright pictures."""

    def forward(self, pictures: Tensor, cond: Any) -> Tensor:
        ASKED.append(tuple(cond["prompt_embeds"].shape))
        SHOWN.append(tuple(pictures.shape[1:]))
        return pictures.flatten(1).mean(1)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    pipe = stable_diffusion(unet2d_condition(), ddim(prediction_type="v_prediction", beta_schedule="scaled_linear"))
    pipe.register_modules(**clip_text(projected=False))
    place = tmp_path_factory.mktemp("text") / "pipe"
    pipe.to(torch.float32).save_pretrained(place)
    return load_pipeline(place)


def last(model: nn.Module) -> Tensor:
    return next(value for name, value in model.state_dict().items() if name.endswith("model.conv_out.weight"))


@pytest.mark.parametrize("name", ["scott", "mlcm"])
def test_prompts_make_a_student_that_plain_diffusers_opens(name: str, loaded: Any, tmp_path: Path) -> None:
    teacher, cond = loaded.denoiser, loaded.embed(CAPTIONS)
    data: Any = Dataset("captioned", torch.randn(len(CAPTIONS), *teacher.shape), cond)
    recipe: Any = fs.StochasticConsistencyDistillation(skip=25, lr=1e-3)
    given: dict[str, nn.Module] = {}
    if name == "mlcm":
        data, given = Prior(teacher.shape, cond), {"reward": Warm()}
        recipe = fs.MLCM(
            guidance=2.0, lr=1e-3, segments=4, merges=(2,), joining="both", skip=50, student_steps=2, steps=(2, 4, 8)
        )
    student = run_recipe(recipe, teacher, data, SETTINGS, tmp_path / "run", given=given, show=False).model
    assert not torch.equal(last(student), last(teacher))
    opened = fs.load(tmp_path / "run" / "model")
    prompts = loaded.embed(["b", "c"])
    assert torch.equal(opened.sample(2, prompts, seed=1), student.sample(2, prompts, seed=1))
    assert not torch.equal(opened.sample(2, loaded.embed(["a", "a b"]), seed=1), opened.sample(2, prompts, seed=1))
    assert ("w" in opened.extras) is (name == "scott")
    written = export(opened, tmp_path / "plain")
    assert not written.code
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "plain", safety_checker=None)
    assert type(pipe.scheduler) is diffusers.LCMScheduler
    pipe.set_progress_bar_config(disable=True)
    for steps, plan in opened.plans.items():
        pipe.scheduler.set_timesteps(steps)
        assert pipe.scheduler.timesteps.tolist() == list(plan.times)
    latents = pipe("a b", num_inference_steps=2, output_type="latent", guidance_scale=1.0).images
    assert latents.shape[1:] == teacher.shape and bool(latents.isfinite().all())
    if name == "mlcm":
        assert set(ASKED) == {(2, *prompts["prompt_embeds"].shape[1:])}
        assert set(SHOWN) == {tuple(pipe("a b", num_inference_steps=1, output_type="pt").images.shape[1:])}
