"""Students written to folders: a process in which fewstep cannot be imported opens them and makes the same images.

Every folder is written first; one process of plain diffusers then opens them all and leaves its raw samples (before
clipping to pictures and before decoding) in a file, which the tests compare with the students' own.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

import tiny_pipelines as tiny  # noqa: E402
from tiny_pipelines import clip_text, kandinsky, latent_diffusion  # noqa: E402

from fewstep.denoisers import Clipped, Denoiser, NetworkDenoiser  # noqa: E402
from fewstep.discrete_vp import DiscreteVP  # noqa: E402
from fewstep.extras import Input  # noqa: E402
from fewstep.flow_maps import EDMConsistency, FlowMap, Jump  # noqa: E402
from fewstep.guidance import Guided  # noqa: E402
from fewstep.hub.diffusers import Exported, export, export_with_code, from_pipeline, load_pipeline, wrap  # noqa: E402
from fewstep.hub.source import standalone  # noqa: E402
from fewstep.hub.tables import network_of, plan_table, scheduler_table  # noqa: E402
from fewstep.hub.text_adapters import TextAdapter  # noqa: E402
from fewstep.methods.consistency.cm import ConsistencyDistillation  # noqa: E402
from fewstep.methods.consistency.lcm import LatentConsistencyDistillation  # noqa: E402
from fewstep.methods.consistency.pcm import PhasedConsistencyDistillation  # noqa: E402
from fewstep.methods.consistency.tscd import SegmentConsistency  # noqa: E402
from fewstep.methods.method import Method  # noqa: E402
from fewstep.methods.start import Start  # noqa: E402
from fewstep.networks import MLP, UNet  # noqa: E402
from fewstep.predictions import EDMPrediction, TrigPrediction  # noqa: E402
from fewstep.randomness import Rng, derive_seed  # noqa: E402
from fewstep.sampling.rollout import Plan, Student  # noqa: E402
from fewstep.sampling.student_samplers import tcd  # noqa: E402
from fewstep.schedules import EDM, TrigFlow  # noqa: E402

CLOSE = 1e-5  # between float32 images of size 1 to 4 (the promise is 1e-4; 1.1e-6 was measured)
BATCH = 3

PLAIN_PROCESS = """
import functools, json, sys

class NoFewstep:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fewstep":
            raise ImportError("fewstep is not here")

sys.meta_path.insert(0, NoFewstep())
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

out = {}
for case in json.loads(sys.argv[1]):
    index = json.load(open(case["folder"] + "/model_index.json"))
    absent = {name: None for name, value in index.items() if value == [None, None]}  # text encoders
    code = {"trust_remote_code": True} if case["code"] else {}
    pipe = DiffusionPipeline.from_pretrained(case["folder"], **code, **absent)
    pipe.set_progress_bar_config(disable=True)
    plain = pipe.scheduler.step
    seen = []

    @functools.wraps(plain)  # pipelines look at the arguments that step takes
    def step(*args, **kwargs):
        result = plain(*args, **kwargs)
        seen.append(result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    pipe.scheduler.step = step
    inputs = load_file(case["inputs"])
    for steps, call in case["calls"].items():
        seen.clear()
        torch.manual_seed(case["seed"])
        made = pipe(**call, **inputs, generator=torch.Generator().manual_seed(case["seed"]))
        out[case["name"] + "/" + steps] = seen[-1].contiguous()
        if call.get("output_type") == "np":
            out[case["name"] + "/" + steps + "/pictures"] = torch.from_numpy(made.images)
save_file(out, sys.argv[2])
assert not [name for name in sys.modules if name.partition(".")[0] == "fewstep"]
"""


README_PROCESS = """
import os, sys, warnings

class NoFewstep:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fewstep":
            raise ImportError("fewstep is not here")

sys.meta_path.insert(0, NoFewstep())
os.chdir(sys.argv[1])
for name in sys.argv[2:]:
    block = open(name + "/README.md").read().split("```python")[1].split("```")[0]
    names = {}
    for line in block.strip().splitlines():
        try:
            exec(line, names)
        except Exception as error:
            raise SystemExit(f"{name}: {line}: {type(error).__name__}: {error}")
        if line.startswith("images"):
            steps = int(line.split("#")[1].split()[0])
            assert len(names["pipe"].scheduler.timesteps) == steps and len(names["images"]) == 1, (name, line)
            print(name, steps)
assert not [name for name in sys.modules if name.partition(".")[0] == "fewstep"]
"""


class PackedRng(Rng):
    """Draws noise in the order of Flux's tokens."""

    def normal_like(self, x: Tensor) -> Tensor:
        tokens = super().normal_like(diffusers.FluxPipeline._pack_latents(x, *x.shape))
        sides = (x.shape[2] // 2, x.shape[3] // 2)
        return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, sides), 2)


@dataclass
class Case:
    """A student, where it was written, and what both sides are called with."""

    student: Student
    exported: Exported
    inputs: dict[str, Tensor] = field(default_factory=dict)  # of the pipeline
    call: dict[str, Any] = field(default_factory=dict)
    cond: Any = None
    noise: Tensor | None = None  # standard normal; None: drawn first from the generator
    pack: bool = False
    unseeded: bool = False  # the pipeline gives its scheduler no generator: noise comes from torch's global one
    extras: dict[str, float] = field(default_factory=dict)  # further inputs, as the student is told them

    @torch.no_grad()
    def expected(self, steps: int, seed: int) -> Tensor:
        """The student's own images, from the generator that the pipeline gets."""
        rng = PackedRng("case") if self.pack else Rng("case")
        rng.generator.manual_seed(seed)
        noise = self.noise
        if noise is None:
            noise = rng.normal(BATCH, *self.student.shape) / self.exported.start
        if self.unseeded:
            rng.generator.manual_seed(seed)
        data = self.student(noise, self.cond, steps, rng, **self.extras)
        return diffusers.FluxPipeline._pack_latents(data, BATCH, *data.shape[1:]) if self.pack else data


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Our networks start at zero; here they must not."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net.requires_grad_(False)


def unet2d(**changes: Any) -> Any:
    return tiny.unet2d(**{"in_channels": 1, "out_channels": 1, **changes})


def stable_diffusion(**changes: Any) -> Any:
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False, prediction_type="v_prediction",
    )  # fmt: skip
    return tiny.stable_diffusion(tiny.unet2d_condition(**changes), scheduler).to(torch.float32)


def sd3() -> Any:
    return tiny.sd3().to(torch.float32)


def flux(**changes: Any) -> Any:
    return tiny.flux(**changes).to(torch.float32)


def sana() -> Any:
    made = tiny.sana().to(torch.float32)
    made.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return made


def dit() -> Any:
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    return diffusers.DiTPipeline(tiny.dit(), tiny.autoencoder(), scheduler)


def gentle(**changes: Any) -> Any:
    """A scheduler under which untrained networks make images of ordinary size."""
    return diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **changes)


def plans(flow_map: FlowMap, times: dict[int, list[float]], gamma: float) -> Student:
    return Student(flow_map, {n: Plan(tuple(t), gamma) for n, t in times.items()}).requires_grad_(False)


LCM_WEIGHT = Input(6.5, 0.0, 14.0, unguided=0.0)
TRAILING = {1: [999.0], 2: [999.0, 499.0], 4: [999.0, 749.0, 499.0, 249.0]}
UNEVEN = {3: [999.0, 610.0, 150.0]}


def make_cases(root: Path) -> dict[str, Case]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(5)
    prompt, pooled = torch.randn(BATCH, 7, 6, generator=generator), torch.randn(BATCH, 5, generator=generator)
    noise = torch.randn(BATCH, 4, 8, 8, generator=generator)
    cases: dict[str, Case] = {}

    # --- diffusers networks that one of diffusers' own schedulers serves
    pixel = from_pipeline(diffusers.DDIMPipeline(unet2d(), gentle())).denoiser
    student = plans(Jump(pixel), TRAILING, 0.0)
    cases["unet2d-ddim"] = Case(student, export(student, root / "unet2d-ddim"), call={"batch_size": BATCH})

    student = plans(Jump(pixel), {1: [999.0]}, 1.0)
    cases["unet2d-one"] = Case(student, export(student, root / "unet2d-one"), call={"batch_size": BATCH})

    loaded = from_pipeline(stable_diffusion())
    text = {"prompt_embeds": prompt}
    for name, times, gamma in (
        ("sd-ddim", TRAILING, 0.0), ("sd-noisy", TRAILING, 1.0),
        ("sd-uneven-ddim", UNEVEN, 0.0), ("sd-uneven", UNEVEN, 1.0),
    ):  # fmt: skip
        student = plans(Jump(loaded.denoiser), times, gamma)
        written = export(student, root / name)
        inputs = {**text, "latents": written.start * noise}
        cases[name] = Case(student, written, inputs, {"output_type": "latent"}, text, noise)

    cond = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
    straight = from_pipeline(sd3())
    for name, gamma in (("sd3-euler", 0.0), ("sd3-noisy", 1.0)):
        times = {n: straight.grid(n)[:-1].tolist() for n in (1, 2, 4)}
        student = plans(Jump(straight.denoiser), times, gamma)
        inputs = {**cond, "latents": noise}
        cases[name] = Case(student, export(student, root / name), inputs, {"output_type": "latent"}, cond, noise)
    tokens = from_pipeline(flux(), size=(16, 16))
    student = plans(Jump(tokens.denoiser), {n: tokens.grid(n)[:-1].tolist() for n in (1, 4)}, 0.0)
    inputs = {**cond, "latents": diffusers.FluxPipeline._pack_latents(noise, BATCH, 4, 8, 8)}
    size = {"height": 16, "width": 16, "output_type": "latent"}
    cases["flux-euler"] = Case(student, export(student, root / "flux-euler"), inputs, size, cond, noise, pack=True)

    classes = from_pipeline(dit())
    labels = torch.tensor([7, 0, 999])
    student = plans(Jump(classes.denoiser), TRAILING, 0.0)
    written = export(student, root / "dit-ddim")
    cases["dit-ddim"] = Case(student, written, call={"class_labels": labels.tolist()}, cond=labels)

    # LCM's input, the guidance scale, is the pipeline's own argument
    lcm = stable_diffusion(time_cond_proj_dim=16)
    student = plans(Jump(from_pipeline(lcm).denoiser), TRAILING, 1.0)
    written = export(student, root / "sd-lcm")
    inputs = {**text, "latents": written.start * noise}
    cases["sd-lcm"] = Case(student, written, inputs, {"output_type": "latent"}, text, noise)

    # as a declared input of the student it is driven by that argument: at its default, as it is exported, as called
    weighted = Student(Jump(from_pipeline(lcm).denoiser, extras={"w": LCM_WEIGHT}), student.plans).requires_grad_(False)
    inputs = {**text, "latents": written.start * noise}
    for name, constant, asked, w in (
        ("sd-weight", {}, {}, 6.5), ("sd-weight-three", {"w": 3.0}, {}, 3.0), ("sd-weight-asked", {}, 3.0, 2.0),
    ):  # fmt: skip
        written = export(weighted, root / name, extras=constant)
        call = {"output_type": "latent", **({"guidance_scale": asked} if asked else {})}
        cases[name] = Case(weighted, written, inputs, call, text, noise, extras={"w": w})
    # TCD undercuts by a share of the time: eta of its scheduler
    student = Student(
        weighted.flow_map, {n: tcd(weighted.flow_map.schedule, n, eta=0.3) for n in (2, 4)}
    ).requires_grad_(False)
    written = export(student, root / "sd-tcd-weight")
    call = {"output_type": "latent", "guidance_scale": 3.0}
    inputs = {**text, "latents": written.start * noise}
    cases["sd-tcd-weight"] = Case(student, written, inputs, call, text, noise, extras={"w": 2.0})
    distilled = Jump(tokens.denoiser, extras={"w": Input(3.5, 1.0, 10.0, unguided=1.0)})
    student = plans(distilled, {n: tokens.grid(n)[:-1].tolist() for n in (1, 4)}, 0.0)
    inputs = {**cond, "latents": diffusers.FluxPipeline._pack_latents(noise, BATCH, 4, 8, 8)}
    for name, asked, w in (("flux-weight", {}, 3.5), ("flux-weight-asked", {"guidance_scale": 2.0}, 2.0)):
        written = export(student, root / name)
        cases[name] = Case(student, written, inputs, {**size, **asked}, cond, noise, pack=True, extras={"w": w})

    # students as LCM and PCM make them: LCM's scheduler, trailing DDIM, Euler; the weight is an input of a network that
    # had none
    null = {"prompt_embeds": prompt[:1], "pooled_prompt_embeds": pooled[:1]}
    empty = NetworkDenoiser(
        loaded.denoiser.net, loaded.denoiser.schedule, loaded.denoiser.prediction, loaded.denoiser.shape,
        null={"prompt_embeds": prompt[:1]},
    )  # fmt: skip
    for skip, plan_steps in ((20, (1, 2, 4, 8)), (40, (4,))):
        student = distilled_by(LatentConsistencyDistillation(skip=skip, steps=plan_steps), empty)
        for name, asked, w in ((f"sd-lcm-{skip}", {}, 1.5), (f"sd-lcm-{skip}-asked", {"guidance_scale": 3.0}, 2.0)):
            written = export(student, root / name)
            inputs = {**text, "latents": written.start * noise}
            call = {"output_type": "latent", **asked}
            cases[name] = Case(student, written, inputs, call, text, noise, extras={"w": w})
    for phases in (1, 4):
        student = distilled_by(PhasedConsistencyDistillation(phases=phases), empty)
        written = export(student, root / f"sd-pcm-{phases}")
        inputs = {**text, "latents": written.start * noise}
        cases[f"sd-pcm-{phases}"] = Case(student, written, inputs, {"output_type": "latent"}, text, noise)
    student = distilled_by(SegmentConsistency(eta=(0.3,)), empty)
    written = export(student, root / "sd-tscd")
    inputs = {**text, "latents": written.start * noise}
    cases["sd-tscd"] = Case(student, written, inputs, {"output_type": "latent"}, text, noise)
    baked = LatentConsistencyDistillation(guidance_max=1.0, steps=(1, 2, 4))
    for name, method in (("sd3-lcm", baked), ("sd3-pcm", PhasedConsistencyDistillation(phases=4))):
        student = distilled_by(method, straight.denoiser)
        inputs = {**cond, "latents": noise}
        cases[name] = Case(student, export(student, root / name), inputs, {"output_type": "latent"}, cond, noise)
    unweighted = from_pipeline(flux(guidance_embeds=False), size=(16, 16)).denoiser
    unweighted = NetworkDenoiser(
        unweighted.net, unweighted.schedule, unweighted.prediction, unweighted.shape, null=null
    )
    student = distilled_by(PhasedConsistencyDistillation(phases=2, guidance_max=5.0), unweighted)
    inputs = {**cond, "latents": diffusers.FluxPipeline._pack_latents(noise, BATCH, 4, 8, 8)}
    for name, asked, w in (("flux-pcm", {}, 3.0), ("flux-pcm-asked", {"guidance_scale": 2.0}, 2.0)):
        written = export(student, root / name)
        cases[name] = Case(student, written, inputs, {**size, **asked}, cond, noise, pack=True, extras={"w": w})

    # --- diffusers networks that need the student's own scheduler
    trig_weight = Jump(weighted.flow_map.denoiser.on(TrigFlow()), extras={"w": LCM_WEIGHT})
    student = plans(trig_weight, {2: [1.5, 0.8]}, 0.5)
    written = export(student, root / "sd-trig-weight", extras={"w": 1.0})
    inputs = {**text, "latents": noise}
    cases["sd-trig-weight"] = Case(student, written, inputs, {"output_type": "latent"}, text, noise, extras={"w": 1.0})
    wide = from_pipeline(diffusers.DDIMPipeline(unet2d(), gentle()), size=(8, 16)).denoiser  # DDIMPipeline has one size
    student = plans(Jump(wide), {1: [999.0]}, 0.0)
    cases["unet2d-wide"] = own(student, export(student, root / "unet2d-wide"))
    student = plans(Jump(pixel), TRAILING, 1.0)
    cases["unet2d-noisy"] = Case(student, export(student, root / "unet2d-noisy"), call={"batch_size": BATCH})
    for name, changes in (("unet2d-classes", {"num_class_embeds": 4}), ("unet2d-variance", {"out_channels": 2})):
        student = plans(Jump(wrap(unet2d(**changes), gentle())), TRAILING, 0.0)
        cases[name] = own(student, export(student, root / name))
    student = plans(Jump(loaded.denoiser.on(TrigFlow())), {2: [1.5, 0.8]}, 0.5)
    written = export(student, root / "sd-trig")
    cases["sd-trig"] = Case(student, written, {**text, "latents": noise}, {"output_type": "latent"}, text, noise)
    student = plans(Jump(loaded.denoiser), TRAILING, 1.0)
    written = export_with_code(student, root / "sd-code")
    cases["sd-code"] = Case(student, written, {**text, "latents": noise}, {"output_type": "latent"}, text, noise)
    student = plans(Jump(classes.denoiser), UNEVEN, 1.0)
    written = export(student, root / "dit-noisy")
    cases["dit-noisy"] = Case(student, written, call={"class_labels": labels.tolist()}, cond=labels, unseeded=True)

    # --- consistency models of flow-matching teachers: they start from noise of 0.98765, their pipelines from 1
    for name, teacher in (("sd3-cm", straight), ("flux-cm", tokens), ("sana-cm", from_pipeline(sana(), size=(32, 64)))):
        student = consistency(teacher.denoiser)
        given = {"prompt_embeds": prompt, "prompt_attention_mask": mask} if name == "sana-cm" else cond
        start = torch.randn(BATCH, *teacher.denoiser.shape, generator=generator)
        first = diffusers.FluxPipeline._pack_latents(start, BATCH, 4, 8, 8) if name == "flux-cm" else start
        written = export(student, root / name)
        seeded = {} if name == "sana-cm" else {"unseeded": True}
        cases[name] = Case(
            student, written, {**given, "latents": first}, {"output_type": "latent"}, given, start,
            pack=name == "flux-cm", **seeded,
        )  # fmt: skip

    # --- autoencoders of other names
    ldm = from_pipeline(latent_diffusion())
    for name, gamma in (("ldm-ddim", 0.0), ("ldm-noisy", 1.0)):
        student = plans(Jump(ldm.denoiser), TRAILING, gamma)
        written = export(student, root / name)
        cases[name] = Case(student, written, call={"batch_size": BATCH, "output_type": "np"}, unseeded=gamma > 0)
    student = plans(Jump(from_pipeline(latent_diffusion(num_class_embeds=4)).denoiser), TRAILING, 1.0)
    cases["ldm-classes"] = own(student, export(student, root / "ldm-classes"))
    cases["ldm-classes"].call["output_type"] = "np"
    images = from_pipeline(kandinsky())
    given = {"image_embeds": pooled}
    for name, gamma in (("kandinsky-ddim", 0.0), ("kandinsky-noisy", 1.0)):
        student = plans(Jump(images.denoiser), TRAILING, gamma)
        written = export(student, root / name)
        inputs = {"image_embeds": pooled, "negative_image_embeds": -pooled, "latents": written.start * noise}
        cases[name] = Case(student, written, inputs, {"output_type": "np"}, given, noise)

    # --- our own networks
    trig = TrigFlow()
    net = randomised(UNet((1, 8, 8), (8, 16), 1, 16, classes=4, double_norm=True))
    denoiser = NetworkDenoiser(net, trig, TrigPrediction(), (1, 8, 8), 4)
    student = plans(Jump(denoiser), {1: [trig.t_max], 2: [trig.t_max, 1.1]}, 1.0)
    cases["own-unet"] = own(student, export(student, root / "own-unet"))
    net = randomised(UNet((1, 8, 8), (8, 16), 1, 16, extras=("s",)))
    denoiser = NetworkDenoiser(net, trig, TrigPrediction(), (1, 8, 8))
    student = plans(Jump(denoiser, two_times=True), {1: [trig.t_max], 3: [trig.t_max, 1.2, 0.5]}, 0.4)
    cases["own-two-times"] = own(student, export(student, root / "own-two-times"))
    # with a weight that is constant, and a number of steps that each plan sets
    net = randomised(UNet((1, 8, 8), (8, 16), 1, 16, classes=4, extras=("k", "s", "w")))
    denoiser = NetworkDenoiser(net, trig, TrigPrediction(), (1, 8, 8), 4)
    told = {"w": Input(1.0, 0.0, 14.0, unguided=1.0), "k": Input(1.0, 1.0, 8.0)}
    planned = {n: Plan(tuple(t), 0.4, extras={"k": n}) for n, t in ((1, [trig.t_max]), (3, [trig.t_max, 1.2, 0.5]))}
    student = Student(Jump(denoiser, two_times=True, extras=told), planned).requires_grad_(False)
    cases["own-inputs"] = own(student, export(student, root / "own-inputs", extras={"w": 3.0}))
    cases["own-inputs"].extras["w"] = 3.0
    edm = EDM(0.01, 20.0)
    denoiser = NetworkDenoiser(randomised(MLP((2,), 16, 2)), edm, EDMPrediction(), (2,))
    student = plans(EDMConsistency(denoiser), {1: [20.0], 2: [20.0, 0.7]}, 1.0)
    cases["own-mlp"] = own(student, export(student, root / "own-mlp"))
    return cases


def consistency(teacher: Denoiser) -> Student:
    """The student that consistency distillation would hand over, untrained."""
    method = ConsistencyDistillation(steps=(1, 2))
    student = method.student(method.networks(Start(teacher)))
    assert isinstance(student, Student)
    return student.requires_grad_(False)


def distilled_by(method: Method, teacher: Denoiser) -> Student:
    """The student of a method, its weights away from their start, those of new inputs too."""
    nets = method.networks(Start(teacher))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in nets.group_parameters("student"):
            p += 0.03 * torch.randn(p.shape, generator=generator)
    student = method.student(nets)
    assert isinstance(student, Student)
    return student.requires_grad_(False).eval()


def own(student: Student, exported: Exported) -> Case:
    """Our own networks are called with the number of samples only: noise and labels are the pipeline's own."""
    labels = torch.arange(BATCH) % student.classes if student.classes else None
    return Case(student, exported, call={"batch_size": BATCH, "output_type": "latent"}, cond=labels)


SEED = derive_seed(11, "sample")  # what Student.sample(seed=11) draws from


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Case], dict[str, Tensor]]:
    """The cases, and what plain diffusers made of their folders."""
    root = tmp_path_factory.mktemp("exported")
    cases = make_cases(root)
    orders = []
    for name, case in cases.items():
        save_file(case.inputs, root / f"{name}.safetensors")
        orders.append({
            "name": name, "folder": str(case.exported.folder), "code": case.exported.code, "seed": SEED,
            "inputs": str(root / f"{name}.safetensors"),
            "calls": {steps: {**call, **case.call} for steps, call in case.exported.calls.items()},
        })  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN_PROCESS, json.dumps(orders), str(root / "out.safetensors")],
        env={**os.environ, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return cases, load_file(root / "out.safetensors")


PLAIN = {
    "unet2d-ddim": ("DDIMPipeline", "DDIMScheduler"),
    "unet2d-one": ("DDIMPipeline", "DDIMScheduler"),
    "sd-ddim": ("StableDiffusionPipeline", "DDIMScheduler"),
    "sd-noisy": ("StableDiffusionPipeline", "TCDScheduler"),
    "sd-uneven": ("StableDiffusionPipeline", "TCDScheduler"),
    "sd-uneven-ddim": ("StableDiffusionPipeline", "TCDScheduler"),
    "sd-lcm": ("StableDiffusionPipeline", "TCDScheduler"),
    "sd-weight": ("StableDiffusionPipeline", "TCDScheduler"),
    "sd-weight-three": ("StableDiffusionPipeline", "TCDScheduler"),
    "sd-weight-asked": ("StableDiffusionPipeline", "TCDScheduler"),
    "sd-tcd-weight": ("StableDiffusionPipeline", "TCDScheduler"),
    "sd-lcm-20": ("StableDiffusionPipeline", "LCMScheduler"),
    "sd-lcm-20-asked": ("StableDiffusionPipeline", "LCMScheduler"),
    "sd-lcm-40": ("StableDiffusionPipeline", "LCMScheduler"),
    "sd-lcm-40-asked": ("StableDiffusionPipeline", "LCMScheduler"),
    "sd-pcm-1": ("StableDiffusionPipeline", "DDIMScheduler"),
    "sd-pcm-4": ("StableDiffusionPipeline", "DDIMScheduler"),
    "sd-tscd": ("StableDiffusionPipeline", "TCDScheduler"),
    "sd3-lcm": ("StableDiffusion3Pipeline", "FlowMatchLCMScheduler"),
    "sd3-pcm": ("StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler"),
    "flux-pcm": ("FluxPipeline", "FlowMatchEulerDiscreteScheduler"),
    "flux-pcm-asked": ("FluxPipeline", "FlowMatchEulerDiscreteScheduler"),
    "flux-weight": ("FluxPipeline", "FlowMatchEulerDiscreteScheduler"),
    "flux-weight-asked": ("FluxPipeline", "FlowMatchEulerDiscreteScheduler"),
    "sd3-euler": ("StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler"),
    "sd3-noisy": ("StableDiffusion3Pipeline", "FlowMatchLCMScheduler"),
    "flux-euler": ("FluxPipeline", "FlowMatchEulerDiscreteScheduler"),
    "dit-ddim": ("DiTPipeline", "DDIMScheduler"),
    "ldm-ddim": ("LDMPipeline", "DDIMScheduler"),
    "ldm-noisy": ("LDMPipeline", "TCDScheduler"),
    "kandinsky-ddim": ("KandinskyV22Pipeline", "DDIMScheduler"),
}
WITH_CODE = {
    "unet2d-noisy": "StudentPipeline",
    "unet2d-wide": "StudentPipeline",
    "unet2d-classes": "StudentPipeline",
    "unet2d-variance": "StudentPipeline",
    "sd-trig": "StableDiffusionPipeline",
    "sd-trig-weight": "StableDiffusionPipeline",
    "sd-code": "StableDiffusionPipeline",
    "dit-noisy": "DiTPipeline",
    "ldm-classes": "StudentPipeline",
    "kandinsky-noisy": "StudentKandinskyV22Pipeline",
    "sd3-cm": "StudentStableDiffusion3Pipeline",
    "flux-cm": "StudentFluxPipeline",
    "sana-cm": "StudentSanaPipeline",
    "own-unet": "StudentPipeline",
    "own-two-times": "StudentPipeline",
    "own-inputs": "StudentPipeline",
    "own-mlp": "StudentPipeline",
}


@pytest.mark.parametrize("name", [*PLAIN, *WITH_CODE])
def test_plain_diffusers_makes_the_students_images(name: str, made: Any) -> None:
    """Every plan of every exported student: the images of a process without fewstep are the student's own."""
    cases, plain = made
    case = cases[name]
    for steps in case.student.plans:
        expected = case.expected(steps, SEED)
        assert 0.05 < float(expected.abs().max()) < 50  # images of ordinary size, not zeros
        assert float((plain[f"{name}/{steps}"] - expected).abs().max()) < CLOSE, steps


@pytest.mark.parametrize("name", ["ldm-ddim", "ldm-noisy", "ldm-classes", "kandinsky-ddim", "kandinsky-noisy"])
def test_exports_keep_their_autoencoder(name: str, made: Any) -> None:
    """What plain diffusers shows are the pictures that the student's latents decode to, not the latents."""
    cases, plain = made
    case = cases[name]
    for steps in case.student.plans:
        latents = case.expected(steps, SEED)
        decoded = from_pipeline(network_of(case.student).net.origin.pipe).decode(latents)
        expected = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        theirs = plain[f"{name}/{steps}/pictures"]
        assert theirs.shape == (BATCH, 16, 16, 3)
        assert float(theirs.std()) > 0.01
        # the codes of a VQ model jump
        assert float((theirs - expected).abs().max()) < CLOSE, steps


def test_every_line_of_every_readme_runs(made: Any, tmp_path: Path) -> None:
    """The lines of the cards, one by one, in plain diffusers beside the folders; each makes an image in as many calls
    as it says."""
    cases, _ = made
    root = cases["sd-ddim"].exported.folder.parent
    torch.manual_seed(0)
    pipe = stable_diffusion()
    pipe.register_modules(**clip_text(projected=False))
    student = plans(Jump(from_pipeline(pipe).denoiser), TRAILING, 1.0)
    export(student, root / "sd-prompts")
    done = subprocess.run(
        [sys.executable, "-I", "-c", README_PROCESS, str(root), *cases, "sd-prompts"],
        env={**os.environ, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == sum(len(case.student.plans) for case in cases.values()) + 3


def test_cards_name_no_argument_that_is_not_there(made: Any) -> None:
    """Where the start is not the pipeline's, the card says what can be done: pass latents, if they are taken."""
    cases, _ = made
    for name, case in cases.items():
        card = (case.exported.folder / "README.md").read_text()
        if case.exported.code or abs(case.exported.start - 1) <= 1e-6:
            assert "standard deviation" not in card, name
            continue
        pipeline = attrgetter(case.exported.pipeline)(diffusers)
        taken = "latents" in inspect.signature(pipeline.__call__).parameters
        assert ("pass `latents`" in card) == taken and ("--with-code" in card) != taken, name
    assert "--with-code" in (cases["unet2d-ddim"].exported.folder / "README.md").read_text()


def test_plain_folders_hold_no_code(made: Any) -> None:
    """Where a scheduler of diffusers serves, the folder holds weights and configs only; else code to be trusted."""
    cases, _ = made
    for name, (pipeline, scheduler) in PLAIN.items():
        written = cases[name].exported
        assert (written.pipeline, written.scheduler, written.code) == (pipeline, scheduler, False), name
        assert not list(written.folder.rglob("*.py"))
    for name, pipeline in WITH_CODE.items():
        written = cases[name].exported
        assert (written.pipeline, written.scheduler, written.code) == (pipeline, "StudentScheduler", True), name
        assert "fewstep" not in {
            line.split()[1].partition(".")[0]
            for file in written.folder.rglob("*.py")
            for line in file.read_text().splitlines()
            if line.startswith(("import ", "from "))
        }


def test_same_seed_same_images(made: Any) -> None:
    """Student.sample(seed) and a pipeline whose generator has the derived seed draw the same pictures."""
    cases, plain = made
    for name in ("own-unet", "own-two-times", "unet2d-noisy"):
        for steps in cases[name].student.plans:
            sampled = cases[name].student.sample(BATCH, steps=steps, seed=11)
            assert float((plain[f"{name}/{steps}"] - sampled).abs().max()) < CLOSE


def test_readme_names_the_call(made: Any) -> None:
    """The folder says with which arguments each plan is called, and how far the plain start is off."""
    cases, _ = made
    text = (cases["sd-noisy"].exported.folder / "README.md").read_text()
    assert "num_inference_steps=4, eta=1.0, guidance_scale=1.0" in text and "trust_remote_code" not in text
    assert f"{cases['sd-noisy'].exported.start:.6f}" in text
    assert "trust_remote_code=True" in (cases["own-unet"].exported.folder / "README.md").read_text()


def test_further_inputs_reach_the_exported_network(made: Any) -> None:
    """Another value makes other images, by a thousand times the tolerance: none of the inputs is without effect."""
    cases, _ = made
    for name, other in (
        ("sd-weight", {"w": 3.0}),
        ("flux-weight", {"w": 2.0}),
        ("own-inputs", {"w": 1.0}),
        ("sd-lcm-20", {"w": 1.0}),
        ("flux-pcm", {"w": 1.0}),
    ):
        case = cases[name]
        steps = max(case.student.plans)
        mine = case.expected(steps, SEED)
        told, case.extras = case.extras, other
        theirs = case.expected(steps, SEED)
        case.extras = told
        assert float((mine - theirs).abs().max()) > 1e3 * CLOSE, name
    case = cases["own-inputs"]
    mine = case.expected(3, SEED)
    case.extras["k"] = 1.0
    assert float((mine - case.expected(3, SEED)).abs().max()) > 1e3 * CLOSE
    del case.extras["k"]


def test_cards_say_what_becomes_of_further_inputs(made: Any) -> None:
    """Which guidance scales the student was made for, and what is constant."""
    cases, _ = made
    cards = {name: (case.exported.folder / "README.md").read_text() for name, case in cases.items()}
    assert "made for 1 to 15" in cards["sd-weight"] and "guidance_scale=7.5" in cards["sd-weight"]
    assert "guidance_scale=4.0" in cards["sd-weight-three"]
    assert "made for 1 to 10" in cards["flux-weight"] and "guidance_scale=3.5" in cards["flux-weight"]
    assert "Its input w is 3. Its input k is 1, 3 in 1, 3 steps." in cards["own-inputs"]
    assert "input" not in cards["own-two-times"].replace("inputs", "")


def test_inputs_that_nothing_can_set_are_refused(tmp_path: Path) -> None:
    """One line with the input, its range and default, and what would work; nothing is written."""
    told = {"w": Input(1.0, 0.0, 14.0, unguided=1.0)}
    trig = TrigFlow()
    net = NetworkDenoiser(randomised(UNet((1, 8, 8), (8, 16), 1, 16, extras=("w",))), trig, TrigPrediction(), (1, 8, 8))
    own_net = plans(Jump(net, extras=told), {1: [trig.t_max]}, 1.0)
    text = from_pipeline(stable_diffusion()).denoiser
    weighted = from_pipeline(stable_diffusion(time_cond_proj_dim=16)).denoiser
    none = "takes no further inputs"
    bare = wrap(unet2d(), gentle())
    both = {**told, "k": Input(1.0, 1.0, 8.0)}
    refused: list[tuple[Any, dict[str, float], str]] = [
        (own_net, {}, r"input w from 0 to 14 \(default 1\): .* fix it with --extra w=1"),
        (own_net, {"w": 15.0}, r"w=15 must lie in \[0, 14\]"),
        (own_net, {"v": 1.0}, r"v=1: this student takes w from 0 to 14 \(default 1\)"),
        (plans(Jump(text, extras=told), TRAILING, 1.0), {"w": 3.0}, f"this UNet2DConditionModel {none}"),
        (plans(Jump(bare, extras=told), TRAILING, 0.0), {"w": 3.0}, f"this UNet2DModel {none}"),
        (plans(Jump(weighted, extras=both), TRAILING, 1.0), {"k": 3.0}, "input k .* takes only w, its guidance weight"),
        (plans(Jump(net, extras=both), {1: [trig.t_max]}, 1.0), {"w": 1.0, "k": 1.0}, "input k .* the network takes w"),
    ]  # fmt: skip
    for student, extras, reason in refused:
        for write in (export, export_with_code):
            with pytest.raises(ValueError, match=reason) as found:
                write(student, tmp_path / "new", extras=extras)
            assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())


def test_denoiser_goes_back_into_its_pipeline(tmp_path: Path) -> None:
    """A trained denoiser is exported into the pipeline it came from, its scheduler and autoencoder kept."""
    pipe = stable_diffusion()
    denoiser = from_pipeline(pipe).denoiser
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(1.01)
    written = export(denoiser, tmp_path / "model")
    again = load_pipeline(written.folder)
    x, prompt = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 6)
    assert (written.pipeline, written.scheduler) == ("StableDiffusionPipeline", "DDIMScheduler")
    assert torch.equal(again.denoiser(x, 300.0, prompt), denoiser(x, 300.0, prompt))
    assert torch.allclose(again.decode(x), from_pipeline(pipe).decode(x), atol=1e-6)


def test_bare_denoiser_gets_deterministic_plans(tmp_path: Path) -> None:
    """A denoiser without a pipeline is exported with DDIM plans of 10, 20 and 50 steps."""
    written = export(wrap(unet2d(), gentle()), tmp_path / "vp")
    assert sorted(written.calls) == [10, 20, 50] and not written.code
    net = NetworkDenoiser(randomised(MLP((2,), 16, 2)), EDM(), EDMPrediction(), (2,))
    assert export(net, tmp_path / "edm").code


def test_students_share_their_teachers_pipeline() -> None:
    """Copying a denoiser copies its network, not the autoencoder and text encoders of the pipeline it came from."""
    import copy

    teacher = from_pipeline(stable_diffusion()).denoiser
    student = copy.deepcopy(teacher)
    assert isinstance(student.net, TextAdapter) and student.net.origin is teacher.net.origin
    assert student.net.model is not teacher.net.model


def test_tables_measure_what_schedulers_do() -> None:
    """TCD with eta = 0 is our deterministic plan and with eta = 1 our re-noising plan, row by row; neither is the
    other, and an LCM scheduler, which ends on clean data instead of the first level, is neither."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    denoiser = wrap(unet2d(), diffusers.DDIMScheduler(**betas))
    for gamma in (0.0, 1.0):
        table = plan_table(Jump(denoiser), Plan(tuple(TRAILING[4]), gamma))
        tcd = diffusers.TCDScheduler(**betas, original_inference_steps=4)
        count = {"num_inference_steps": 4}
        schedulers = {eta: scheduler_table(tcd, count, {"eta": eta}, True) for eta in (0.0, 1.0)}
        lcm = diffusers.LCMScheduler(**betas, original_inference_steps=4)
        assert schedulers[gamma].agrees(table) and not schedulers[1.0 - gamma].agrees(table)
        assert not scheduler_table(lcm, count, {}, True).agrees(table)


def test_nonlinear_and_guided_students_are_refused(tmp_path: Path) -> None:
    """Clipping, guidance and foreign networks get one line that says why, and nothing is written."""
    denoiser = wrap(unet2d(), gentle())
    refused = {
        "not linear": Jump(Clipped(denoiser)),
        "calls its network 2 times": Jump(Guided(denoiser, 2.0)),
        "neither a diffusers model": Jump(NetworkDenoiser(nn.Conv2d(1, 1, 1), EDM(), EDMPrediction(), (1, 8, 8))),
    }
    for reason, flow_map in refused.items():
        with pytest.raises(ValueError, match=reason):
            export(plans(flow_map, {1: [flow_map.schedule.t_max]}, 0.0), tmp_path / "new")
    with pytest.raises(ValueError, match="export the denoiser inside"):
        export(Guided(from_pipeline(stable_diffusion()).denoiser, 2.0), tmp_path / "new")
    text = wrap(stable_diffusion().unet, gentle())
    with pytest.raises(ValueError, match="no pipeline to go back into"):
        export(plans(Jump(text), TRAILING, 1.0), tmp_path / "new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export(plans(Jump(denoiser), TRAILING, 0.0), tmp_path / "full")


def test_unknown_number_of_steps_is_refused() -> None:
    """The exported scheduler names the numbers of steps that it has plans for."""
    from fewstep.hub.student_scheduler import StudentScheduler

    row = {"times": [1.0], "state": 0.0, "network": 1.0, "noise": 0.0}
    scheduler = StudentScheduler(plans={"1": {"start": 1.0, "calls": [row]}})
    with pytest.raises(ValueError, match=r"num_inference_steps=5: this student has plans for \[1\] steps"):
        scheduler.set_timesteps(5)


@pytest.mark.parametrize(("cls", "arguments"), [(UNet, ((1, 8, 8), (8, 16), 1, 16)), (MLP, ((2,), 8, 1))])
def test_standalone_source_is_the_network(cls: type, arguments: tuple[Any, ...]) -> None:
    """The self-contained source defines the same network without importing fewstep."""
    source = standalone(cls)
    names: dict[str, Any] = {}
    exec(compile(source, "standalone", "exec"), names)
    net = randomised(cls(*arguments))
    copy = names[cls.__name__](*arguments)
    copy.load_state_dict(net.state_dict())
    x, t = torch.randn(2, *net.shape), torch.rand(2)
    assert "fewstep" not in source and torch.equal(copy(x, t), net(x, t))


@pytest.mark.parametrize("with_pipeline", [True, False])
def test_zero_terminal_snr_survives_the_way_back(tmp_path: Path, with_pipeline: bool) -> None:
    """A table that ends at alpha = 0 is exported as one, from the config of its pipeline or from the numbers alone:
    the folder is read as the same schedule."""
    scheduler = gentle(rescale_betas_zero_snr=True)
    pipe = diffusers.DDIMPipeline(unet2d(), scheduler)
    denoiser = from_pipeline(pipe).denoiser if with_pipeline else wrap(unet2d(), scheduler)
    written = export(plans(Jump(denoiser), TRAILING, 0.0), tmp_path / "model")
    again = load_pipeline(written.folder).denoiser.schedule
    assert isinstance(again, DiscreteVP) and isinstance(denoiser.schedule, DiscreteVP)
    mine, theirs = (torch.tensor(s.alphas_cumprod, dtype=torch.float64) for s in (denoiser.schedule, again))
    assert written.scheduler == "DDIMScheduler" and float((mine - theirs).abs().max()) < 1e-6
