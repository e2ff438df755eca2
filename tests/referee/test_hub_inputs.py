"""Further inputs of diffusers' networks: they change nothing until they are trained, count afterwards, are saved and
opened, and go back to diffusers where it has a place for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import clip_text, dit, flux, sana, sd3, sd3_with_text, unet2d, unet2d_condition
from tiny_pipelines import stable_diffusion as stable_diffusion_of

diffusers = pytest.importorskip("diffusers")

import fewstep as fs  # noqa: E402
from fewstep.data import Dataset  # noqa: E402
from fewstep.denoisers import NetworkDenoiser  # noqa: E402
from fewstep.extras import Input  # noqa: E402
from fewstep.flow_maps import Jump  # noqa: E402
from fewstep.hub.diffusers import export, load_pipeline, wrap  # noqa: E402
from fewstep.hub.text_adapters import guidance_embedding  # noqa: E402
from fewstep.methods.consistency.lcm import LatentConsistencyDistillation  # noqa: E402
from fewstep.methods.consistency.pcm import PhasedConsistencyDistillation  # noqa: E402
from fewstep.methods.method import Method  # noqa: E402
from fewstep.methods.start import Start  # noqa: E402
from fewstep.networks.inputs import with_inputs  # noqa: E402
from fewstep.runs.course import run_recipe  # noqa: E402
from fewstep.sampling.rollout import Plan, Student  # noqa: E402
from fewstep.tangents import finite_difference, tangent  # noqa: E402
from fewstep.training.budget import Budget  # noqa: E402
from fewstep.training.settings import Settings  # noqa: E402

NETWORKS: dict[str, Callable[[], Any]] = {
    "unet": unet2d, "text unet": unet2d_condition, "dit": dit, "sd3": lambda: sd3().transformer,
    "flux": lambda: flux(guidance_embeds=False).transformer, "flux with guidance": lambda: flux().transformer,
    "sana": lambda: sana().transformer,
}  # fmt: skip
#: The networks that take a guidance weight the way diffusers has for it.
NATIVE = ("text unet", "flux", "flux with guidance")
FLOW = ("sd3", "flux", "flux with guidance", "sana")


def teacher(name: str) -> NetworkDenoiser:
    torch.manual_seed(0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if name in FLOW else diffusers.DDIMScheduler()
    made = wrap(NETWORKS[name]().float(), scheduler, size=(8, 8))
    if hasattr(made.net, "set_null"):
        rows = {k: [3 if side is None else side for side in shape] for k, shape in made.net.needs().items()}
        made.net.set_null({k: torch.randn(1, *shape) for k, shape in rows.items()})
    return made.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_with_new_inputs_starts_as_it_was(name: str) -> None:
    """Bit for bit whatever is put in; the original is untouched; a gradient reaches the new weights, and after one step
    every input counts; a second widening adds to the first; inputs that are missing are named."""
    plain = teacher(name)
    before = copy.deepcopy(plain.state_dict())
    start = Start(plain)
    wider = start.network("student", extras=("s",))
    wider = Start(plain, given={"student": Jump(wider, two_times=True)}).network("student", extras=("s", "w"))
    assert set(wider.net.extra_inputs) == {"s", "w"}
    assert tuple(wider.net.further.spans) == (("s",) if name in NATIVE else ("s", "w"))
    x, t = torch.randn(2, *plain.shape), torch.tensor([0.3, 0.8], dtype=torch.float64) * plain.schedule.t_max
    given = {"s": wider.label(t / 2, x), "w": torch.tensor([2.0, 5.0])}
    if name != "flux with guidance":  # which takes a weight already, so that another one makes another picture
        assert torch.equal(wider(x, t, **given), plain(x, t))
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    new = {k: p for k, p in wider.named_parameters() if k not in before}
    slopes = torch.autograd.grad(wider(x, t, **given).square().sum(), list(new.values()), allow_unused=True)
    found = {k: slope for k, slope in zip(new, slopes, strict=True) if slope is not None}
    assert sum(float(slope.abs().max()) > 0 for slope in found.values()) >= (1 if name == "flux with guidance" else 2)
    with torch.no_grad():
        for key, slope in found.items():
            new[key] -= 0.1 * slope / slope.norm().clamp_min(1e-12)
    for key in given:
        other = wider(x, t, **{**given, key: given[key] + (1 if key == "w" else 0.1 * given["s"])})
        assert not torch.equal(other, wider(x, t, **given)), key
    with pytest.raises(TypeError, match="it was given"):
        wider(x, t, w=given["w"])
    with pytest.raises(TypeError, match="takes no further inputs, it was given"):
        plain(x, t, s=given["s"])


def test_the_target_time_has_a_tangent_in_a_network_of_diffusers() -> None:
    """The derivative along the target time, which flow maps train on, is that of a difference."""
    wider = Start(teacher("text unet")).network("student", extras=("s",)).double()
    torch.nn.init.normal_(wider.net.further.projections["s"].weight, std=0.1)
    x, t = torch.randn(2, *wider.shape, dtype=torch.float64), torch.tensor([300.0, 700.0], dtype=torch.float64)

    def at(x_: torch.Tensor, s_: torch.Tensor) -> torch.Tensor:
        return wider(x_, t, s=s_)

    still, one = torch.zeros_like(x), torch.full_like(t, 10.0)
    _, slope = tangent(at, x, t / 2, still, one)
    _, difference = finite_difference(at, x, t / 2, still, one, step=1e-3)
    assert float(slope.norm()) > 0 and float((slope - difference).norm() / difference.norm()) < 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_two_time_students_are_saved_and_opened(name: str, tmp_path: Path) -> None:
    """A bare network with a target time and a weight: the folder opens as the same student, and is refused by name when
    its description asks for inputs that cannot be."""
    wider = Start(teacher(name)).network("student", extras=("s", "w"))
    with torch.no_grad():
        for p in wider.parameters():
            p += 0.05 * torch.randn_like(p)
    weight = Input(3.0, 0.0, 14.0, unguided=wider.net.unguided)
    t_max = wider.schedule.t_max
    student = Student(Jump(wider, two_times=True, extras={"w": weight}), {2: Plan((t_max, t_max / 2), gamma=0.0)})
    fs.save(student, tmp_path / "model")
    opened = fs.load(tmp_path / "model")
    rows = wider.net.needs()
    cond: Any = {k: torch.randn(2, *[3 if side is None else side for side in row]) for k, row in rows.items()} or None
    cond = torch.tensor([1, 2]) if name == "dit" else cond
    x = torch.randn(2, *wider.shape)
    with torch.no_grad():
        mine = student.eval()(x, cond, 2, w=5.0)
        torch.testing.assert_close(opened(x, cond, 2, w=5.0), mine, rtol=0, atol=2e-6 * float(mine.abs().max()))
        assert not torch.equal(opened(x, cond, 2, w=5.0), opened(x, cond, 2, w=2.0))
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace('"s": ', '"s t": '))
    with pytest.raises(ValueError, match=r"network\.inputs"):
        fs.load(tmp_path / "model")


@pytest.mark.parametrize("name", [name for name in NETWORKS if "flux" not in name])
def test_a_second_sample_beside_the_state(name: str, tmp_path: Path) -> None:
    """Bit for bit the network as it was until trained, whatever the second sample is; it counts afterwards, None stands
    for zeros, and the folder opens as the same network."""
    plain = teacher(name)
    wider = Start(plain).network("student", beside=plain.shape[0])
    assert wider.net.beside_channels == plain.shape[0]
    rows = plain.net.needs()
    cond: Any = {k: torch.randn(2, *[3 if side is None else side for side in row]) for k, row in rows.items()} or None
    cond = torch.tensor([1, 2]) if name == "dit" else cond
    x, second = torch.randn(2, *plain.shape), torch.randn(2, *plain.shape)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64) * plain.schedule.t_max
    assert torch.equal(wider(x, t, cond, beside=second), plain(x, t, cond))
    torch.nn.init.normal_(wider.net.second.beside.layer.weight, std=0.1)
    expected = wider(x, t, cond, beside=second)
    assert not torch.equal(expected, plain(x, t, cond)) and torch.equal(wider(x, t, cond), plain(x, t, cond))
    assert torch.equal(wider(x, t, cond, beside=torch.zeros_like(x)), plain(x, t, cond))
    fs.save(wider, tmp_path / "model")
    opened = fs.load(tmp_path / "model")
    torch.testing.assert_close(opened(x, t, cond, beside=second), expected, rtol=0, atol=1e-5)
    with pytest.raises(TypeError, match=r"takes no further inputs, it was given .'beside'"):
        plain(x, t, cond, beside=second)


CAPTIONS = ["a b", "c", "a b", "b", "c c", "a"]
SETTINGS = Settings(Budget(3), batch=4, precision="fp32", save_seconds=0.0)
METHODS: dict[str, Method] = {
    "lcm": LatentConsistencyDistillation(steps=(1, 2), lr=1e-3, guidance_max=5.0),
    "pcm": PhasedConsistencyDistillation(phases=2, lr=1e-3, label_dropout=0.5),
    "pcm with a weight": PhasedConsistencyDistillation(phases=2, lr=1e-3, guidance_max=5.0),
}


def stable_diffusion() -> Any:
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False, prediction_type="v_prediction",
    )  # fmt: skip
    made = stable_diffusion_of(unet2d_condition(), scheduler)
    made.register_modules(**clip_text(projected=False))
    return made


PIPELINES: dict[str, Callable[[], Any]] = {"Stable Diffusion": stable_diffusion, "Stable Diffusion 3": sd3_with_text}


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("name", METHODS)
def test_methods_train_on_prompts(name: str, kind: str, tmp_path: Path) -> None:
    """LCM and PCM, with captions that the pipeline's own text encoders embed: the student that a run leaves opens as it
    was, in its pipeline's folder, and its weight counts; it goes back to diffusers where its inputs are diffusers'."""
    torch.manual_seed(0)
    PIPELINES[kind]().to(torch.float32).save_pretrained(tmp_path / "pipe")
    loaded = load_pipeline(tmp_path / "pipe")
    assert loaded.denoiser.null is not None
    x = torch.randn(len(CAPTIONS), *loaded.denoiser.shape)
    data = Dataset("captioned", x, loaded.embed(CAPTIONS))
    student = run_recipe(METHODS[name], loaded.denoiser, data, SETTINGS, tmp_path / "run", show=False).model
    opened = fs.load(tmp_path / "run" / "model")
    cond = loaded.embed(["b", "c"])
    assert opened.extras == student.extras and ("w" in opened.extras) is (name != "pcm")
    assert torch.equal(opened.sample(2, cond, seed=1), student.sample(2, cond, seed=1))
    assert not torch.equal(opened.sample(2, cond, seed=1), opened.sample(2, loaded.embed(["a", "a b"]), seed=1))
    if "w" in opened.extras:
        high = opened.extras["w"].high
        assert not torch.equal(opened.sample(2, cond, seed=1, w=high), opened.sample(2, cond, seed=1))
    if kind == "Stable Diffusion 3" and "w" in opened.extras:
        with pytest.raises(ValueError, match="further inputs w, which no SD3Transformer2DModel of diffusers") as found:
            export(opened, tmp_path / "plain")
        assert "\n" not in str(found.value) and not (tmp_path / "plain").exists()
    else:
        written = export(opened, tmp_path / "plain")
        assert not written.code and (written.folder / "model_index.json").is_file()


def test_the_native_weight_is_the_one_of_diffusers() -> None:
    """A U-Net that was made to take the weight gives what diffusers gives for the same embedding, and its config says
    so; the embedding is that of the pipeline."""
    wider = Start(teacher("text unet")).network("student", extras=("w",))
    model = wider.net.model
    assert wider.net.further is None and model.config.time_cond_proj_dim == 256
    torch.nn.init.normal_(model.time_embedding.cond_proj.weight, std=0.1)
    x, t, w = torch.randn(2, *wider.shape), torch.tensor([300.0, 700.0]), torch.tensor([2.0, 6.5])
    prompt = torch.randn(2, 7, 6)
    embedded = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(None, w, 256)
    torch.testing.assert_close(guidance_embedding(w, 256), embedded, rtol=0, atol=2e-4)  # sines of 6500
    theirs = model(x, t, prompt, timestep_cond=guidance_embedding(w, 256)).sample
    torch.testing.assert_close(wider.net(x, t, prompt, w=w), theirs, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_says_so(tmp_path: Path) -> None:
    """A second sample, an export: one line each."""
    text = teacher("text unet")
    two_times = Jump(Start(text).network("student", extras=("s",)), two_times=True)
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: with_inputs(teacher("flux").net, beside=4), "FluxTransformer2DModel takes no second sample"),
        (lambda: Start(teacher("flux")).network("student", beside=4), "the student: a FluxTransformer2DModel takes no"),
        (lambda: export(Start(text).network("student", beside=4), tmp_path / "no"),
         "takes a second sample, which no UNet2DConditionModel of diffusers has"),
        (lambda: export(Student(two_times, {1: Plan((999.0,))}), tmp_path / "no"),
         "further inputs s, which no UNet2DConditionModel of diffusers has"),
    ]  # fmt: skip
    for make, reason in refused:
        with pytest.raises(ValueError, match=reason) as found:
            make()
        assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())
