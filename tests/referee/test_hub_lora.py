"""LoRA students: trained as denoisers, loaded by plain diffusers pipelines."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from tiny_pipelines import autoencoder, ddim, dit, flux, kandinsky, sana, sd3, unet2d  # noqa: E402

import fewstep as fs  # noqa: E402
from fewstep.data.dataset import Dataset  # noqa: E402
from fewstep.denoisers import Denoiser, NetworkDenoiser  # noqa: E402
from fewstep.extras import Input  # noqa: E402
from fewstep.flow_maps import Jump  # noqa: E402
from fewstep.hub import lora, native  # noqa: E402
from fewstep.hub.diffusers import export, from_pipeline, load_pipeline  # noqa: E402
from fewstep.methods.flow_maps.boot import BOOT  # noqa: E402
from fewstep.methods.flow_maps.progressive import ProgressiveDistillation  # noqa: E402
from fewstep.methods.method import Networks, Optimizer  # noqa: E402
from fewstep.methods.start import Start  # noqa: E402
from fewstep.networks import MLP  # noqa: E402
from fewstep.networks.lora import factors, is_frozen, moving  # noqa: E402
from fewstep.predictions import EDMPrediction  # noqa: E402
from fewstep.sampling.rollout import Plan, Student  # noqa: E402
from fewstep.schedules import EDM  # noqa: E402


@pytest.fixture
def pipe() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, cross_attention_dim=6, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8), latent_channels=4, norm_num_groups=2, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = diffusers.TCDScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        original_inference_steps=4, steps_offset=1,
    )  # fmt: skip
    made = diffusers.StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=scheduler, text_encoder=None, tokenizer=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def trained(denoiser: Denoiser, **choices: Any) -> Denoiser:
    """A LoRA copy with weights that are not zero, as after training."""
    student = lora.attach(denoiser, rank=3, **choices)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moving(student):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return student.requires_grad_(False)


X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
PROMPT = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(3))
CONVOLUTIONS = ("to_q", "to_v", "conv1", "proj_in")


@pytest.mark.parametrize("choices", [{}, {"alpha": 7.0}, {"targets": CONVOLUTIONS, "alpha": 1.0}])
def test_plain_pipeline_loads_the_student(pipe: Any, tmp_path: Path, choices: dict[str, Any]) -> None:
    """load_lora_weights of a plain pipeline reproduces the student's images, whatever alpha and targets are."""
    teacher = from_pipeline(pipe).denoiser
    before = teacher(X, 500.0, PROMPT)
    student = Student(Jump(trained(teacher, **choices)), {4: Plan((999.0, 749.0, 499.0, 249.0), 0.0)})
    lora.save(student, tmp_path)
    expected = student(X, PROMPT).detach()
    call = {"prompt_embeds": PROMPT, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    start = float(teacher.schedule.sigma(torch.tensor(999.0, dtype=torch.float64)))
    without = pipe(**call, latents=start * X).images
    pipe.load_lora_weights(tmp_path)
    theirs = pipe(**call, latents=start * X).images
    assert float((theirs - expected).abs().max()) < 1e-4
    assert float((lora.merged(student)(X, PROMPT) - theirs).abs().max()) < 1e-4
    assert float((without - expected).abs().max()) > 0.1
    assert float(before.abs().max()) > 0.1


def test_student_starts_as_its_teacher_and_shares_its_weights(pipe: Any) -> None:
    """An untrained copy equals the teacher exactly, and its frozen weights are the teacher's memory."""
    teacher = from_pipeline(pipe).denoiser
    student = lora.attach(teacher, rank=4)
    assert torch.equal(student(X, 500.0, PROMPT), teacher(X, 500.0, PROMPT))
    mine = {tensor.data_ptr() for tensor in student.parameters() if is_frozen(tensor)}
    assert all(parameter.data_ptr() in mine for parameter in teacher.parameters())
    names = [name for name, tensor in student.named_parameters() if tensor.requires_grad]
    assert names and all("lora_" in name for name in names)
    assert all(parameter.requires_grad for parameter in teacher.parameters())  # left as it was
    again = lora.attach(teacher, rank=4)
    assert list(factors(student)) == [name.replace(".low_rank.", ".") for name in names]
    first = {name: value for name, value in student.named_parameters() if "lora_A" in name}
    other = dict(again.named_parameters())
    assert all(torch.equal(value, other[name]) for name, value in first.items())
    other = dict(lora.attach(teacher, rank=4, seed=1).named_parameters())
    assert not any(torch.equal(value, other[name]) for name, value in first.items())


def test_methods_train_the_low_rank_weights_only(pipe: Any) -> None:
    """Under a method's networks and optimiser the copy moves, its teacher and its frozen weights do not."""
    teacher = from_pipeline(pipe).denoiser
    student = Start(lora.attach(teacher, rank=2)).network()
    nets = Networks({"teacher": teacher, "student": Jump(student)}, {"student": Optimizer(("student",), 1e-2)})
    parameters = nets.group_parameters("student")
    base = [p for p in student.parameters() if is_frozen(p)]
    frozen, start = [b.clone() for b in base], [p.clone() for p in teacher.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(2):  # the first step moves the second factor, which is zero, the next one moves both
        optimiser.zero_grad()
        student(X, 500.0, PROMPT).square().mean().backward()
        optimiser.step()
    assert sum(p.numel() for p in parameters) < 0.2 * sum(b.numel() for b in frozen)
    assert all(float(p.grad.abs().max()) > 0 for p in parameters if p.grad is not None)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(frozen, base, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(start, teacher.parameters(), strict=True))
    assert float((student(X, 500.0, PROMPT) - teacher(X, 500.0, PROMPT)).abs().max()) > 1e-3


def test_merged_is_the_student_as_an_ordinary_network(pipe: Any, tmp_path: Path) -> None:
    """Merging gives the same function with the teacher's parameter names; the merged student is exported whole."""
    teacher = from_pipeline(pipe).denoiser
    student = trained(teacher)
    weights = copy.deepcopy(teacher.state_dict())
    plain = lora.merged(student)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in teacher.named_parameters()]
    assert float((plain(X, 500.0, PROMPT) - student(X, 500.0, PROMPT)).abs().max()) < 1e-5
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())
    with pytest.raises(ValueError, match=r"lora\.merged"):
        export(student, tmp_path / "model")
    written = export(plain, tmp_path / "model")
    saved = load_file(written.folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert not [name for name in saved if "lora" in name or "base_layer" in name]


def test_saved_weights_are_read_back(pipe: Any, tmp_path: Path) -> None:
    """load gives the student that save wrote, alpha included."""
    teacher = from_pipeline(pipe).denoiser
    student = trained(teacher, alpha=5.0)
    lora.save(student, tmp_path)
    again = lora.load(teacher, tmp_path)
    assert float((again(X, 500.0, PROMPT) - student(X, 500.0, PROMPT)).abs().max()) < 1e-5


FLOW = {"prompt_embeds": PROMPT, "pooled_prompt_embeds": PROMPT[:, 0, :5]}
IMAGE = {"image_embeds": PROMPT[:, 0, :5]}
MASK = {"prompt_embeds": PROMPT, "prompt_attention_mask": torch.ones(2, 7)}


@pytest.mark.parametrize(
    ("make", "cond"),
    [(sd3, FLOW), (lambda: flux(), FLOW), (sana, MASK), (kandinsky, IMAGE)],
    ids=["sd3", "flux", "sana", "kandinsky"],
)
def test_every_network_that_takes_lora_weights_loads_ours(make: Any, cond: dict[str, Tensor], tmp_path: Path) -> None:
    """load_lora_weights of the pipeline, or load_lora_adapter of its network where it has no such method."""
    torch.manual_seed(0)
    plain = make().to(torch.float32)
    teacher = from_pipeline(plain, size=(16, 16)).denoiser
    student = trained(teacher)
    expected, before = student(X, 0.5, cond), teacher(X, 0.5, cond)
    lora.save(student, tmp_path)
    net = plain.components[teacher.net.component]
    if isinstance(plain, diffusers.loaders.lora_base.LoraBaseMixin):
        plain.load_lora_weights(tmp_path)
    else:
        net.load_lora_adapter(tmp_path, weight_name=lora.WEIGHTS, prefix=teacher.net.component)
    with torch.no_grad():
        assert float((teacher(X, 0.5, cond) - expected).abs().max()) < 1e-5
    assert float((before - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["DiTPipeline", "DDPMPipeline"])
def test_networks_that_take_no_lora_weights_are_exported_merged(kind: str, tmp_path: Path) -> None:
    """DiT and UNet2DModel: save says so and writes nothing; the way that it names works."""
    torch.manual_seed(0)
    plain = diffusers.DDPMPipeline(unet2d(in_channels=4, out_channels=4, add_attention=True), ddim())
    if kind == "DiTPipeline":
        plain = diffusers.DiTPipeline(dit(), autoencoder(), ddim())
    student = trained(from_pipeline(plain).denoiser)
    with pytest.raises(ValueError, match=r"write the whole student with export\(lora\.merged\(student\), folder\)"):
        lora.save(student, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    labels = torch.tensor([1, 2]) if kind == "DiTPipeline" else None
    written = export(lora.merged(student), tmp_path / "model")
    again = load_pipeline(written.folder).denoiser
    with torch.no_grad():
        assert float((again(X, 500.0, labels) - student(X, 500.0, labels)).abs().max()) < 1e-5


def test_bad_requests_get_one_line(pipe: Any, tmp_path: Path) -> None:
    """Wrong ranks, targets, networks and files are named."""
    teacher = from_pipeline(pipe).denoiser
    with pytest.raises(ValueError, match="rank=0"):
        lora.attach(teacher, rank=0)
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        lora.attach(teacher, rank=2, targets=("to_nothing",))
    with pytest.raises(ValueError, match="already"):
        lora.attach(lora.attach(teacher, rank=2), rank=2)
    with pytest.raises(ValueError, match="no LoRA layers"):
        lora.save(teacher, tmp_path)
    with pytest.raises(ValueError, match="MLP is not a diffusers model"):
        lora.save(lora.attach(NetworkDenoiser(MLP((2,), 8, 1), EDM(), EDMPrediction(), (2,)), rank=2), tmp_path)
    with pytest.raises(FileNotFoundError, match="no such weights file"):
        lora.load(teacher, tmp_path)
    path = lora.save(trained(teacher), tmp_path)
    tensors: dict[str, Tensor] = load_file(path)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file({**tensors, name: tensors[name][:1]}, path)
    with pytest.raises(ValueError, match="has shape"):
        lora.load(teacher, tmp_path)
    save_file({key.replace(".to_q.", ".to_x."): value for key, value in tensors.items()}, path)
    with pytest.raises(ValueError, match="no layer"):
        lora.load(teacher, tmp_path)


def lora_run(teacher: Denoiser, folder: Path) -> Any:
    """A halving in a run folder, of a student that is low-rank factors on its teacher."""
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    return fs.distill(
        teacher, ProgressiveDistillation(steps=2, lr=1e-2), Dataset("latents", latents, PROMPT[:1].expand(8, 7, 6)),
        "4steps", folder=folder, batch=4, show=False, precision="fp32", save_seconds=0.0,
        student=lora.attach(teacher, 2),
    )  # fmt: skip


@pytest.mark.parametrize("place", ["a folder", "memory"])
def test_low_rank_students_train_in_a_run_folder(
    pipe: Any, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved as the factors over the base, which is opened where it lies; whole where it lies nowhere.  A run that goes
    on has the bits of one that was not stopped."""
    teacher: Denoiser = from_pipeline(pipe).denoiser
    if place == "a folder":
        pipe.save_pretrained(tmp_path / "pipe")
        teacher = load_pipeline(tmp_path / "pipe").denoiser
    made = lora_run(teacher, tmp_path / "run")
    again = native.load(tmp_path / "run" / "model")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(again(noise, PROMPT), made(noise, PROMPT))
    assert float((again(noise, PROMPT) - Student(Jump(teacher), again.plans)(noise, PROMPT)).abs().max()) > 1e-3
    torch.testing.assert_close(lora.merged(again)(noise, PROMPT), again(noise, PROMPT), rtol=1e-3, atol=1e-4)
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    kept = [n for n in load_file(tmp_path / "run" / "checkpoint.safetensors") if n.startswith("module/student/")]
    assert saved and kept and all("lora_" in name for name in kept)
    assert all("lora_" in name for name in saved) is (place == "a folder")

    updates = ProgressiveDistillation.updates

    def cut(self: Any, nets: Networks, batch: Any, progress: Any) -> Any:
        if progress.step == 2:
            raise KeyboardInterrupt
        return updates(self, nets, batch, progress)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ProgressiveDistillation, "updates", cut)
        lora_run(teacher, tmp_path / "parts")
    parts = lora_run(teacher, tmp_path / "parts")
    assert torch.equal(parts(noise, PROMPT), made(noise, PROMPT))


def test_a_base_that_is_another_is_named(pipe: Any, tmp_path: Path) -> None:
    """Factors mean nothing over other weights: a changed base, or none, is one line."""
    pipe.save_pretrained(tmp_path / "pipe")
    student = trained(load_pipeline(tmp_path / "pipe").denoiser)
    native.save(student, tmp_path / "student")
    assert torch.equal(native.load(tmp_path / "student")(X, 500.0, PROMPT), student(X, 500.0, PROMPT))
    weights = tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    held = load_file(weights)
    save_file({name: value + 0.1 for name, value in held.items()}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="has other weights than when"):
        native.load(tmp_path / "student")
    (tmp_path / "pipe").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="pipe is not there any more"):
        native.load(tmp_path / "student")


@pytest.mark.parametrize("base", ["in a folder", "in memory"])
def test_folders_of_earlier_versions_are_opened(pipe: Any, tmp_path: Path, base: str) -> None:
    """Their weights had other names: those of peft, beside ``base_layer`` where the base was kept with them."""
    teacher: Denoiser = from_pipeline(pipe).denoiser
    if base == "in a folder":
        pipe.save_pretrained(tmp_path / "pipe")
        teacher = load_pipeline(tmp_path / "pipe").denoiser
    student = trained(teacher, alpha=5.0, targets=("to_q", "conv1"))
    native.save(student, tmp_path / "student")
    weights, config = tmp_path / "student" / "model.safetensors", tmp_path / "student" / "config.json"
    tensors, described = load_file(weights), json.loads(config.read_text())
    targets = described["model"]["network"]["low_rank"]["targets"]
    layers = [f"net.model.{name}" for name in targets]

    def earlier(name: str) -> str:
        for letter in ("lora_A", "lora_B"):
            name = name.replace(f".low_rank.{letter}.", f".{letter}.default.")
        owner, _, leaf = name.rpartition(".")
        return f"{owner}.base_layer.{leaf}" if owner in layers else name

    renamed = {earlier(name): value for name, value in tensors.items()}
    assert len(set(renamed) - set(tensors)) == len(layers) * (2 if base == "in a folder" else 3) + (
        0 if base == "in a folder" else sum("conv1" in name for name in layers)
    )
    save_file(renamed, weights)
    del described["sha256"]
    config.write_text(json.dumps(described))
    assert torch.equal(native.load(tmp_path / "student")(X, 500.0, PROMPT), student(X, 500.0, PROMPT))


GIVEN = {"s": torch.tensor([100.0, 300.0]), "w": torch.tensor([1.0, 4.0])}


@pytest.mark.parametrize("order", ["low rank first", "inputs first"])
def test_further_inputs_are_trained_in_full_beside_low_rank_weights(pipe: Any, tmp_path: Path, order: str) -> None:
    """A target time, which no network of diffusers has, and a guidance weight, which this one can have: bit for bit the
    teacher until trained, saved as the factors and the inputs' own layers over the base, opened as it was."""
    pipe.save_pretrained(tmp_path / "pipe")
    teacher = load_pipeline(tmp_path / "pipe").denoiser
    if order == "low rank first":
        student = Start(teacher, given={"student": lora.attach(teacher, 2)}).network("student", extras=("s", "w"))
    else:
        wider = Start(teacher).network("student", extras=("s", "w"))
        student = lora.attach(wider, 2)
        assert not {p.data_ptr() for p in moving(student)} & {p.data_ptr() for p in wider.parameters()}
    assert torch.equal(student(X, 500.0, PROMPT, **GIVEN), teacher(X, 500.0, PROMPT))
    names = {name for name, p in student.named_parameters() if p.requires_grad and "lora_" not in name}
    assert names == {"net.further.projections.s.weight", "net.model.time_embedding.cond_proj.weight"}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moving(student):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    expected = student(X, 500.0, PROMPT, **GIVEN)
    for name, value in GIVEN.items():
        assert not torch.equal(student(X, 500.0, PROMPT, **{**GIVEN, name: value + 1}), expected), name
    made = Student(Jump(student, two_times=True, extras={"w": Input(1.0, 0.0, 14.0)}), {2: Plan((999.0, 499.0), 0.0)})
    native.save(made, tmp_path / "student")
    saved = load_file(tmp_path / "student" / "model.safetensors")
    assert all("lora_" in name or "further" in name or "cond_proj" in name for name in saved)
    opened = native.load(tmp_path / "student")
    assert torch.equal(opened(X, PROMPT, 2, w=5.0), made(X, PROMPT, 2, w=5.0))
    assert not torch.equal(opened(X, PROMPT, 2, w=5.0), opened(X, PROMPT, 2, w=2.0))
    whole = lora.merged(opened)(X, PROMPT, 2, w=5.0)
    torch.testing.assert_close(whole, opened(X, PROMPT, 2, w=5.0), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="no place for the layers of the further inputs w, s: keep the student in a"):
        lora.save(opened, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    config = tmp_path / "student" / "config.json"
    config.write_text(config.read_text().replace('"time_embedding.cond_proj.weight"', '"time_embedding.none"'))
    with pytest.raises(ValueError, match=r"low_rank\.trained: 'time_embedding\.none' is no weight"):
        native.load(tmp_path / "student")


def test_a_method_with_a_target_time_trains_a_low_rank_student(pipe: Any, tmp_path: Path) -> None:
    """BOOT in a run folder: the factors and the layer of the target time move, and lie there without the base."""
    pipe.save_pretrained(tmp_path / "pipe")
    teacher = load_pipeline(tmp_path / "pipe").denoiser
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    made: Any = fs.distill(
        teacher, BOOT(lr=1e-2), Dataset("latents", latents, PROMPT[:1].expand(8, 7, 6)), "3steps",
        folder=tmp_path / "run", batch=4, show=False, precision="fp32", student=lora.attach(teacher, 2),
    )  # fmt: skip
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all("lora_" in name or "further" in name for name in saved)
    moved = [name for name, value in saved.items() if ("lora_B" in name or "projections" in name) and value.any()]
    assert any("lora_B" in name for name in moved) and any("projections.s" in name for name in moved)
    opened = native.load(tmp_path / "run" / "model")
    assert torch.equal(opened(X, PROMPT), made(X, PROMPT))
