"""Pipelines on the command line: pictures, sizes and conditions, or one line and exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from tiny_pipelines import (  # noqa: E402
    autoencoder,
    clip_text,
    ddim,
    flux,
    inpainting,
    kandinsky,
    latent_diffusion,
    sd3_with_text,
    stable_diffusion,
    unet2d,
    unet2d_condition,
)

import fewstep as fs  # noqa: E402
from fewstep.cli import main  # noqa: E402
from fewstep.extras import Input  # noqa: E402
from fewstep.flow_maps import Jump  # noqa: E402
from fewstep.guidance import Guided  # noqa: E402
from fewstep.hub import native  # noqa: E402
from fewstep.sampling import Plan, Student  # noqa: E402

Fails = Callable[..., str]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and the same weights of the tiny models every time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    torch.manual_seed(0)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """The one line that a command ends with, with exit code 2."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        # before it are diffusers' own bars
        *bars, line = capsys.readouterr().err.strip().splitlines()
        assert not [bar for bar in bars if bar.strip() and "pipeline components" not in bar], bars
        return line

    return run


def sampled(*words: object, how: tuple[str, ...] = ("--solver", "ddim", "--steps", "2")) -> Tensor:
    """What ``fewstep sample`` writes."""
    assert main(["sample", *map(str, words), *how, "--out", "x.npz"]) == 0
    return torch.from_numpy(np.load("x.npz")["samples"])


def saved(pipe: Any, name: str = "pipe") -> str:
    pipe.to(torch.float32).save_pretrained(name)
    return name


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_latents_are_shown_as_pictures() -> None:
    """An LDM's samples are decoded, on the command line and by fs.pictures; a PNG is made of them."""
    name = saved(latent_diffusion())
    model = fs.load(name)
    expected = fs.pictures(model, fs.sample(model, 3, solver="ddim", steps=2))
    assert expected.shape == (3, 3, 16, 16)
    assert torch.equal(sampled(name, "--n", 3), expected)
    assert main(["sample", name, "--n", "3", "--out", "x.png"]) == 0
    assert torch.equal(fs.pictures(fs.load("digits"), expected), expected)  # a pixel model's samples are pictures


def test_latents_without_their_autoencoder_are_not_shown(fails: Fails) -> None:
    """A model saved by fewstep finds its pipeline again; when that is gone, its latents are numbers."""
    name = saved(latent_diffusion())
    fs.save(fs.load(name), "model")
    expected = sampled(name, "--n", 2)
    assert torch.equal(sampled("model", "--n", 2), expected)
    Path(name).rename("elsewhere")
    assert "the samples are latents" in fails("sample", "model", "--n", 2)
    assert sampled("model", "--n", 2).shape == (2, 4, 8, 8)
    assert "the pipeline with their autoencoder is not where it was" in fails("export", "model", "out")
    with pytest.raises(ValueError, match="the samples are latents"):
        fs.pictures(fs.load("model"), torch.zeros(2, 4, 8, 8))


def test_image_embeddings_come_from_a_file(fails: Fails) -> None:
    """Kandinsky with --cond, guided away from the negative embeddings in it."""
    name = saved(kandinsky())
    good, bad = rows(3, 5), rows(1, 5)
    save_file({"image_embeds": good, "negative_image_embeds": bad}, "both.safetensors")
    save_file({"image_embeds": good}, "one.safetensors")
    model, cond = fs.load(name), {"image_embeds": good}
    plain = fs.pictures(model, fs.sample(model, 3, solver="ddim", steps=2, cond=cond))
    assert torch.equal(sampled(name, "--n", 3, "--cond", "one.safetensors"), plain)
    guided = fs.sample(
        Guided(model, 3.0, {"image_embeds": bad.expand(3, 5)}), 3, solver="ddim", steps=2, cond=cond
    )  # fmt: skip
    found = sampled(name, "--n", 3, "--cond", "both.safetensors", "--guidance", 3)
    assert torch.equal(found, fs.pictures(model, guided))
    assert "a dict of image_embeds [B, 5]" in fails("sample", name, "--n", 3)
    assert "no empty prompt; put negative_image_embeds into --cond" in fails(
        "sample", name, "--n", 3, "--cond", "one.safetensors", "--guidance", 3
    )
    assert "image_embeds has the shape [3, 5], for --n 4 samples" in fails(
        "sample", name, "--n", 4, "--cond", "one.safetensors"
    )
    assert "has no text encoder" in fails("sample", name, "--prompt", "a boat")
    assert "--cond: 'digits' is not a pipeline" in fails("sample", "digits", "--cond", "one.safetensors")
    assert "no such weights file" in fails("sample", name, "--cond", "none.safetensors")


def test_inpainting_needs_its_mask(fails: Fails) -> None:
    """Nine channels: one line without the condition, pictures with it."""
    name = saved(inpainting(unet2d_condition(in_channels=9)))
    save_file({"prompt_embeds": rows(1, 7, 6)}, "prompt.safetensors")
    save_file({"prompt_embeds": rows(1, 7, 6), "concat": rows(1, 5, 8, 8)}, "all.safetensors")
    line = fails("sample", name, "--n", 2, "--cond", "prompt.safetensors")
    assert "needs concat [B, 5, any, any] (the mask, then the masked picture's latents)" in line
    assert sampled(name, "--n", 2, "--cond", "all.safetensors").shape == (2, 3, 16, 16)
    np.savez("data.npz", images=np.zeros((8, 4, 8, 8), dtype=np.float32))
    line = fails("distill", "cm", "--teacher", name, "--data", "data.npz", "--budget", "2steps", "--out", "run")
    assert "its network needs prompt_embeds [B, any, 6], concat [B, 5, any, any]" in line
    assert not Path("run").exists()


def test_sizes_in_pixels(fails: Fails) -> None:
    """--size and size= are height and width of the pictures."""
    name = saved(flux())
    save_file({"prompt_embeds": rows(1, 7, 6), "pooled_prompt_embeds": rows(1, 5)}, "text.safetensors")
    cond = {"prompt_embeds": rows(1, 7, 6).expand(2, 7, 6), "pooled_prompt_embeds": rows(1, 5).expand(2, 5)}
    model = fs.load(name, size=(16, 24))
    expected = fs.sample(model, 2, solver="ddim", steps=2, cond=cond)
    assert expected.shape == (2, 4, 8, 12)
    assert torch.equal(fs.sample(fs.load(name), 2, solver="ddim", steps=2, cond=cond, size=(16, 24)), expected)
    found = sampled(name, "--n", 2, "--cond", "text.safetensors", "--size", "16x24")
    assert found.shape == (2, 3, 16, 24) and torch.equal(found, fs.pictures(model, expected))
    assert "size=16x22: height and width in pixels must be multiples of 4" in fails("sample", name, "--size", "16x22")
    assert "'16' is not HEIGHTxWIDTH in pixels" in fails("sample", name, "--size", "16")
    assert "'digits' is not a pipeline" in fails("sample", "digits", "--size", "32x32")
    with pytest.raises(ValueError, match="size=32x32: only models read from a diffusers pipeline"):
        fs.sample(fs.load("digits"), 2, size=(32, 32))


def test_sdxl_is_loaded_with_its_size() -> None:
    """The size stands in SDXL's condition, so that sampling another one is refused."""
    unet = unet2d_condition(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 5
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=None, unet=unet, scheduler=ddim(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        add_watermarker=False,
    )  # fmt: skip
    denoiser = fs.hub.from_pipeline(pipe).denoiser
    with pytest.raises(ValueError, match="this network sees the size in its condition"):
        fs.sample(denoiser, 1, size=(16, 8))


@pytest.mark.parametrize("kind", ["flux", "lcm"])
def test_guidance_reaches_networks_that_take_it(kind: str, fails: Fails) -> None:
    """--guidance is an input of LCM's U-Nets and of Flux: one call a step, another picture."""
    text = {"prompt_embeds": rows(1, 7, 6)}
    pipe = stable_diffusion(unet2d_condition(time_cond_proj_dim=16), diffusers.LCMScheduler())
    if kind == "flux":
        pipe, text = flux(), {**text, "pooled_prompt_embeds": rows(1, 5)}
    name = saved(pipe)
    save_file(text, "text.safetensors")
    words = (name, "--n", 1, "--cond", "text.safetensors", "--size", "16x16")
    model = fs.load(name, size=(16, 16))
    expected = fs.sample(model, 1, solver="ddim", steps=2, cond={**text, "guidance_scale": torch.tensor([2.0])})
    found = sampled(*words, "--guidance", 2)
    assert torch.equal(found, fs.pictures(model, expected))
    assert float((found - sampled(*words)).abs().max()) > 1e-4
    assert "takes its guidance as an input" in fails("sample", *words, "--guidance", 2, "--interval", "0.2,5")


@pytest.mark.parametrize("kind", ["flux", "lcm"])
def test_students_with_a_guidance_weight_of_diffusers_networks(kind: str, fails: Fails) -> None:
    """Saved and opened, its input is what --guidance sets (in the network's unit), and what the export's own
    guidance_scale will be; the condition guidance_scale gives way to it."""
    text = {"prompt_embeds": rows(1, 7, 6)}
    pipe = stable_diffusion(unet2d_condition(time_cond_proj_dim=16), ddim())
    weight = Input(6.5, 0.0, 14.0, unguided=0.0)
    if kind == "flux":
        pipe, text, weight = flux(), {**text, "pooled_prompt_embeds": rows(1, 5)}, Input(3.5, 1.0, 9.0, unguided=1.0)
    denoiser = fs.load(saved(pipe), size=(16, 16))
    first = denoiser.schedule.t_max
    native.save(Student(Jump(denoiser, extras={"w": weight}), {1: Plan((first,))}), "student")
    save_file(text, "text.safetensors")
    words = ("student", "--n", 1, "--cond", "text.safetensors")
    model = fs.load("student")
    w = 2.0 if kind == "flux" else 1.0
    expected = fs.pictures(model, model.sample(1, text, w=w))
    for asked in (("--guidance", 2), ("--extra", f"w={w}")):
        assert torch.equal(sampled(*words, *asked, how=()), expected)
    assert float((expected - sampled(*words, how=())).abs().max()) > 1e-4
    given = {**text, "guidance_scale": torch.tensor([9.0])}
    assert torch.equal(model.sample(1, given, w=w), model.sample(1, text, w=w))
    assert "--guidance 20: w=" in fails("sample", *words, "--guidance", 20)
    assert main(["export", "student", "out", "--extra", f"w={w}"]) == 0
    assert "guidance_scale=2.0" in Path("out/README.md").read_text()


def test_dry_runs_say_what_the_export_will_be(capsys: pytest.CaptureFixture[str]) -> None:
    """Plain, with code, or why there is none: said before the training, true after it."""
    saved(diffusers.DDPMPipeline(unet2d(in_channels=1, out_channels=1), diffusers.DDPMScheduler()), "ddpm")
    saved(sd3_with_text(), "sd3")
    text = clip_text(projected=False)
    ldm = diffusers.LDMTextToImagePipeline(
        autoencoder(), text["text_encoder"], text["tokenizer"], unet2d_condition(), ddim()
    )
    saved(ldm, "ldm")
    np.savez("small.npz", images=np.zeros((8, 4, 8, 8), dtype=np.float32))
    np.savez("large.npz", images=np.zeros((8, 4, 16, 16), dtype=np.float32))
    foretold = {
        ("dmd2", "ddpm", "digits"): "plain, a DDIMPipeline with DDIMScheduler",
        ("cm", "digits", "digits"): "with code, a StudentPipeline with StudentScheduler",
        ("pd", "digits", "digits"): "with code, a StudentPipeline with StudentScheduler",
        ("cm", "sd3", "large.npz"): "with code, a StudentStableDiffusion3Pipeline with StudentScheduler",
        ("cm", "ldm", "small.npz"): "not possible: LDMTextToImagePipeline starts from unit noise, the student from 0",
    }  # fmt: skip
    for (method, teacher, data), line in foretold.items():
        capsys.readouterr()
        words = ["--teacher", teacher, "--data", data, "--budget", "1steps", "--batch", "2"]
        assert main(["distill", method, *words, "--dry-run"]) == 0
        assert f"export:    {line}" in capsys.readouterr().out, (method, teacher)
    done = main(["distill", "cm", "--teacher", "sd3", "--data", "large.npz", "--budget", "1steps", "--batch", "2",
                 "--quiet"])  # fmt: skip
    assert done == 0 and main(["export", "runs/cm-sd3", "out"]) == 0
    assert "a StudentStableDiffusion3Pipeline with StudentScheduler" in capsys.readouterr().out
