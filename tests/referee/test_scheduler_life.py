"""Our schedulers where diffusers' own live: saved with a pipeline and reopened, converted, looked into by pipelines."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from fewstep.hub import SolverScheduler, as_scheduler, load_pipeline  # noqa: E402
from fewstep.hub.schedulers import BETA_TABLE, FLOW, READ, read_scheduler  # noqa: E402
from fewstep.predictions import V  # noqa: E402
from fewstep.sampling import DDIM, SOLVERS, balanced  # noqa: E402
from fewstep.schedules import FlowMatching  # noqa: E402

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def like(name: str) -> Any:
    """A scheduler of a class whose model is none of the defaults."""
    changes: dict[str, Any]
    if name in FLOW:
        changes = {"shift": 3.0}
    elif name in BETA_TABLE:
        changes = {**SD_BETAS, "prediction_type": "v_prediction"}
    else:
        changes = {"sigma_min": 0.01, "sigma_max": 20.0, "sigma_data": 0.7}
    return attrgetter(name)(diffusers)(**changes)


def normal(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(scheduler: Any) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = diffusers.DDPMPipeline(unet.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    return pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="np").images


REOPEN = """
import sys
import numpy, torch
folder, results = sys.argv[1:]
sys.modules["fewstep"] = None  # cannot be imported
from diffusers import DDPMPipeline, DDPMScheduler
def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="np").images
pipe = DDPMPipeline.from_pretrained(folder)
assert type(pipe.scheduler) is DDPMScheduler
plain = images(pipe)
del sys.modules["fewstep"]
from fewstep.hub import SolverScheduler
pipe.scheduler = SolverScheduler.from_config(pipe.scheduler.config)
numpy.savez(results, plain=plain, ours=images(pipe))
"""


def test_saved_pipelines_reopen_with_and_without_fewstep(tmp_path: Path) -> None:
    """One folder, in another process: where fewstep cannot be imported diffusers opens the pipeline with the scheduler
    that was replaced, and so with its model; where it can, our scheduler is back in one line.  Both make the images of
    this process bit for bit."""
    original = diffusers.DDPMScheduler(**SD_BETAS, prediction_type="v_prediction", clip_sample_range=2.0)
    pipe, folder, results = pixels(original), tmp_path / "saved", tmp_path / "images.npz"
    plain = images(pipe)
    pipe.scheduler = as_scheduler("dpmpp-2m", pipe, grid="trailing")
    ours = images(pipe)
    pipe.save_pretrained(folder)
    assert json.loads((folder / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDPMScheduler"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-W", "ignore", "-c", REOPEN, str(folder), str(results)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    reopened = np.load(results)
    assert np.array_equal(reopened["plain"], plain) and np.array_equal(reopened["ours"], ours)
    assert not np.array_equal(plain, ours)


def test_a_saved_pipeline_takes_our_scheduler_as_an_argument(tmp_path: Path) -> None:
    """diffusers' way of choosing another scheduler, and load_pipeline, which sees the solver by itself."""
    pipe = pixels(diffusers.DDPMScheduler(**SD_BETAS))
    pipe.scheduler = as_scheduler("unipc:p=3", pipe)
    pipe.save_pretrained(tmp_path)
    ours = SolverScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, scheduler=ours)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(images(again), images(pipe)) and ours.solver == SOLVERS["unipc"](p=3)
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(plain.scheduler) is diffusers.DDPMScheduler
    loaded = load_pipeline(str(tmp_path))
    assert loaded.reading == read_scheduler(ours)
    assert isinstance(loaded.pipe.scheduler, SolverScheduler) and loaded.pipe.scheduler.config == ours.config


@pytest.mark.parametrize("name", READ)
def test_configs_keep_the_model(name: str, tmp_path: Path) -> None:
    """From every class that is read to ours, through JSON, and back."""
    original = like(name)
    reading, given = read_scheduler(original), {k: v for k, v in original.config.items() if k[0] != "_"}
    ours = SolverScheduler.from_config(original.config, solver="ddim")  # which does not name its class
    assert isinstance(ours, SolverScheduler) and ours.reading == reading and ours.solver == DDIM()
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert {key: saved[key] for key in given} == json.loads(json.dumps(given))
    assert SolverScheduler.from_pretrained(tmp_path).reading == reading
    assert read_scheduler(type(original).from_pretrained(tmp_path)) == reading


@pytest.mark.parametrize("name", ["DDIMScheduler", "SASolverScheduler", "UniPCMultistepScheduler"])
def test_compatible_classes_keep_the_model(name: str) -> None:
    """And hand on what they do not know themselves, so that ours is back in one line."""
    original = like(name)
    ours = as_scheduler("ddim", original)
    assert {kind.__name__ for kind in ours.compatibles} == set(BETA_TABLE) & {name, *original._compatibles}
    for kind in ours.compatibles:
        other = kind.from_config(ours.config)
        assert torch.equal(other.alphas_cumprod, original.alphas_cumprod)
        back = SolverScheduler.from_config(other.config)
        assert (
            back.solver == DDIM() and back.reading.prediction == V() and back.reading.schedule == ours.reading.schedule
        )


def test_defaults_of_one_class_are_not_those_of_another() -> None:
    """A model that its class has by default is kept in a class with other defaults."""
    lcm = diffusers.LCMScheduler()
    ours = as_scheduler("ddim", lcm)
    assert torch.equal(diffusers.DDIMScheduler.from_config(ours.config).alphas_cumprod, lcm.alphas_cumprod)
    assert not torch.equal(diffusers.DDIMScheduler.from_config(lcm.config).alphas_cumprod, lcm.alphas_cumprod)


def test_overrides_of_from_config() -> None:
    """Keywords go before the config, those of the model and our own; what nobody knows is handed back."""
    ours = as_scheduler("ddim", diffusers.DDIMScheduler(**SD_BETAS))
    changes = {"prediction_type": "v_prediction", "beta_end": 0.02, "solver": "heun", "grid": "karras", "clean": False}
    made, unused = SolverScheduler.from_config(ours.config, return_unused_kwargs=True, **changes, colour="red")
    expected = diffusers.DDIMScheduler.from_config(ours.config, prediction_type="v_prediction", beta_end=0.02)
    assert made.reading == read_scheduler(expected) != ours.reading
    assert made.solver == SOLVERS["heun"]() and made.grid == "karras" and made.clean is False
    assert made.config.prediction_type == "v_prediction" and made.config.solver == "heun"
    assert unused["colour"] == "red"
    given = SolverScheduler.from_config(ours.config, solver=DDIM(eta=0.3), grid=[999, 400, 0])
    assert given.solver == DDIM(eta=0.3) and given.config.grid == [999.0, 400.0, 0.0]
    assert given.config.solver == {"class": "DDIM", "eta": 0.3}
    with pytest.raises(ValueError, match="solver='dpmpp-9' is not known"):
        SolverScheduler.from_config(ours.config, solver="dpmpp-9")
    with pytest.raises(ValueError, match="grid='even' is not known"):
        SolverScheduler.from_config(ours.config, grid="even")


ZERO = {**SD_BETAS, "rescale_betas_zero_snr": True}
RESCALING = [n for n in BETA_TABLE if "rescale_betas_zero_snr" in like(n).config]


@pytest.mark.parametrize("name", RESCALING)
def test_noise_prediction_at_zero_terminal_snr_is_refused(name: str, tmp_path: Path) -> None:
    """By every way in, for classes that leave alpha = 0 and for those that write a small number there."""
    kind = attrgetter(name)(diffusers)
    bad = kind(**ZERO, prediction_type="epsilon")
    message = f"{name}: prediction_type 'epsilon' is undefined at zero terminal SNR"
    with pytest.raises(ValueError, match=message):
        read_scheduler(bad)
    with pytest.raises(ValueError, match=message):
        as_scheduler("unipc", bad)
    with pytest.raises(ValueError, match=message):
        SolverScheduler.from_config({**bad.config, "_class_name": name})
    pixels(bad).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(tmp_path))
    fine = read_scheduler(kind(**ZERO, prediction_type="v_prediction"))
    if not name.startswith("CogVideoX"):
        assert fine.schedule == read_scheduler(diffusers.DDIMScheduler(**ZERO, prediction_type="sample")).schedule


def test_classes_that_lose_the_model_are_refused() -> None:
    """Some of diffusers' classes ignore what the config says of the model; the object is then of another model."""
    source = diffusers.DDIMScheduler(**ZERO, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="HeunDiscreteScheduler does not rescale its betas, but its config says"):
        as_scheduler("unipc", diffusers.HeunDiscreteScheduler.from_config(source.config))
    video = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", snr_shift_scale=3.0)
    with pytest.raises(ValueError, match="DDIMScheduler does not shift its table, but its config says snr_shift_scale"):
        as_scheduler("unipc", diffusers.DDIMScheduler.from_config(video.config))
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.register_to_config(sigma_max=80.0)
    with pytest.raises(ValueError, match=r"sigma_max=80\.0 is not read, flow matching's noise levels end at 1"):
        as_scheduler("unipc", flow)


def test_what_pipelines_look_into() -> None:
    """Tables of betas as the replaced scheduler has them, all its times before set_timesteps, the config as it is
    changed in place."""
    original = diffusers.DDIMScheduler(**SD_BETAS)
    ours = as_scheduler("unipc", original)
    for name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod", "timesteps"):
        assert torch.equal(vars(ours)[name], vars(original)[name])
    flow = as_scheduler("unipc", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert torch.equal(flow.timesteps, flow.original.timesteps) and torch.equal(flow.sigmas, flow.original.sigmas)
    assert "betas" not in vars(flow)
    edm = as_scheduler("euler", diffusers.EDMEulerScheduler(sigma_data=0.7))
    assert edm._get_conditioning_c_in(torch.tensor(2.0)) == pytest.approx((2.0**2 + 0.7**2) ** -0.5)
    x, kept = 3 * normal(1, 4, 8, 8), 0.1 * normal(1, 4, 8, 8)
    ours.set_timesteps(4)
    assert ours.step(kept, ours.timesteps[0], x).pred_original_sample.abs().max() == 1  # DDIMScheduler clips by default
    ours.config.clip_sample = False  # as Stable Cascade's pipeline does
    ours.set_timesteps(4)
    first = int(ours.timesteps[0])
    alpha, sigma = original.alphas_cumprod[first].sqrt(), (1 - original.alphas_cumprod[first]).sqrt()
    got = ours.step(kept, ours.timesteps[0], x)
    assert torch.allclose(got.pred_original_sample, (x - sigma * kept) / alpha, rtol=1e-5)
    ours.set_timesteps(4)
    pair = ours.step(kept, ours.timesteps[0], x, return_dict=False)
    assert torch.equal(pair[0], got.prev_sample) and torch.equal(pair[1], got.pred_original_sample)


@pytest.mark.parametrize("name", ["unipc", "heun", "dpmpp-3m"])
def test_a_step_made_again(name: str) -> None:
    """Cosmos' pipeline asks ``step`` for the data prediction of both halves of guidance, sets ``_step_index`` one back,
    and makes the step with the guided one: as a scheduler that is only told of that."""
    peeking = as_scheduler(name, diffusers.EDMEulerScheduler())
    told = copy.deepcopy(peeking)
    x, y = 80 * normal(1, 4, 8, 8), 80 * normal(1, 4, 8, 8)
    for scheduler in (peeking, told):
        scheduler.set_timesteps(5)
    for k, t in enumerate(peeking.timesteps):
        peeking.scale_model_input(x, t)
        outputs = normal(2, 4, 8, 8, seed=k)
        x0 = peeking.step(outputs, t, torch.cat([x, x]), return_dict=False)[1]
        peeking._step_index -= 1
        guided = x0[1:] + 0.5 * (x0[1:] - x0[:1])
        x = peeking.step(guided, t, x, return_dict=False, pred_original_sample=guided)[0]
        y = told.step(outputs[1:] + 0.5 * (outputs[1:] - outputs[:1]), t, y).prev_sample
    assert torch.allclose(x, y, rtol=1e-5, atol=1e-5)


def test_before_set_timesteps() -> None:
    """A step goes along all the times that the replaced scheduler begins with, as theirs does."""
    ours = as_scheduler("ddim", diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False))
    theirs = diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False)
    theirs.set_timesteps(1000)
    x, output = normal(1, 4, 8, 8), normal(1, 4, 8, 8, seed=6)
    assert torch.allclose(ours.step(output, 500, x).prev_sample, theirs.step(output, 500, x).prev_sample, atol=1e-5)
    assert ours.num_inference_steps == 1000 and ours.timesteps.tolist() == list(range(999, -1, -1))
    for name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):  # whose times are rounded past their range
        edm = as_scheduler("euler", like(name))
        assert edm.scale_model_input(x, edm.timesteps[0]).shape == x.shape


def test_networks_that_are_told_the_times_before_the_shift() -> None:
    """CogView4 gives timesteps and sigmas: the levels are shifted, the network's times are not."""
    config = {"use_dynamic_shifting": True, "time_shift_type": "linear"}
    given, mu = np.array([1000.0, 600.0, 200.0, 30.0]), 2.5
    ours = as_scheduler("dpmpp-2m", diffusers.FlowMatchEulerDiscreteScheduler(**config), grid="original")
    ours.set_timesteps(timesteps=given, sigmas=given / 1000, mu=mu)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    theirs.set_timesteps(timesteps=given, sigmas=given / 1000, mu=mu)
    assert torch.allclose(ours.timesteps, theirs.timesteps) and torch.allclose(ours.sigmas, theirs.sigmas)
    default = np.linspace(1000, 1, 4).astype(np.int64)  # the pipeline's when nobody gave any: the solver's own grid
    ours = as_scheduler("dpmpp-2m", ours)
    ours.set_timesteps(timesteps=default, sigmas=default / 1000, mu=mu)
    levels = balanced(FlowMatching(), 4, mu * ours.solver.centre)[:-1]
    assert torch.allclose(ours.sigmas[:-1].double(), levels)
    assert torch.allclose(ours.timesteps.double(), 1000 * levels / (mu - (mu - 1) * levels))
    with pytest.raises(ValueError, match="timesteps that are the sigmas before the shift"):
        ours.set_timesteps(timesteps=given, sigmas=[1.0, 0.5, 0.2, 0.1], mu=mu)


def test_final_levels_that_are_one() -> None:
    """A grid whose last call is at the level where it ends keeps that call."""
    original = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", final_sigmas_type="sigma_min")
    ours = as_scheduler("dpmpp-2m", original, grid="original")
    ours.set_timesteps(5)
    original.set_timesteps(5)
    assert original.sigmas[-1] == original.sigmas[-2] and ours.timesteps.tolist() == original.timesteps.tolist()


def test_copies_and_names() -> None:
    """Pickled and copied as ours; shown as ours, and known by the name of the class that it replaces."""
    ours = as_scheduler("unipc", like("PNDMScheduler"), grid="karras")
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(again) is type(ours) and again.config == ours.config and again.solver == ours.solver
    assert type(ours).__name__ == "PNDMScheduler" and not isinstance(ours, diffusers.PNDMScheduler)
    assert repr(ours).startswith("SolverScheduler(UniPC(") and "PNDMScheduler, grid='karras'" in repr(ours)
    assert repr(as_scheduler(DDIM(eta=0.3), ours)).endswith("eta=0.3), PNDMScheduler, grid=None, clean=True)")
