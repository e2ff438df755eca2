"""Damaged and hostile model folders: loaded rightly, or one line and exit code 2; nothing fetched, nothing unpickled.

``hostile.py`` makes the cases, thousands in all; here is every n-th of them, and each class of damage by name.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import DEEP, GOOD, SAMPLE, SPRUNG, Case, Trap, cases, flip, put, sockets_blocked, tensors, tried
from safetensors.torch import load_file, save_file

import fewstep as fs
from fewstep.data import load as load_data
from fewstep.denoisers import NetworkDenoiser
from fewstep.discrete.chains import Masked
from fewstep.discrete.denoisers import NetworkDiscreteDenoiser
from fewstep.discrete.learned import LearnedSampler
from fewstep.discrete.samplers import Plan as DiscretePlan
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import three_modes
from fewstep.flow_maps import EDMConsistency, Jump
from fewstep.hub import native
from fewstep.hub.diffusers import load_model, load_pipeline
from fewstep.hub.folders import check_config
from fewstep.hub.models import bundled_models, locate
from fewstep.hub.sampler_plans import load_plans, save_plans
from fewstep.hub.schedulers import BETA_TABLE, FLOW, PRECONDITIONED
from fewstep.hub.statistics import read_fingerprint
from fewstep.networks import MLP
from fewstep.networks.transformer import Transformer
from fewstep.predictions import EDMPrediction, TrigPrediction, V
from fewstep.sampling import Plan, Student
from fewstep.schedules import EDM, FlowMatching, TrigFlow, VPCosine, VPLinear
from fewstep.schemas import Place
from fewstep.training import snapshots

diffusers = pytest.importorskip("diffusers")

#: How many cases of each kind are tried here.
SHARE = {"student": 60, "routed": 40, "pixels": 60, "text": 24}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders that are damaged."""
    places = {kind: tmp_path_factory.mktemp("good") / kind for kind in GOOD}
    for kind, place in places.items():
        GOOD[kind](place)
    return places


@pytest.mark.parametrize("kind", GOOD)
def test_a_sample_of_all_damage(
    kind: str, good: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every n-th case ends in samples or in one line."""
    monkeypatch.chdir(tmp_path)
    made = cases(kind, good[kind])
    wrong = {}
    for case in made[:: len(made) // SHARE[kind]]:
        shutil.rmtree("victim", ignore_errors=True)
        shutil.copytree(good[kind], "victim")
        case.damage(Path("victim").absolute())
        found = tried(SAMPLE)
        if found.kind not in ("taken", "line"):
            wrong[case.name] = found
    assert wrong == {}


@pytest.fixture
def victim(good: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A copy of a good folder, as ``victim`` in the current folder."""
    monkeypatch.chdir(tmp_path)

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(good[kind], "victim")).absolute()

    return copy


DENOISER = ("model", "flow_map", "denoiser")
ROUTED = ("model", "flow_map")
PHASES = (*ROUTED, "experts", 1, "denoiser")
DIFFUSERS_NETWORK = (
    '{"name": "diffusers", "class": "UNet2DModel", "size": [8, 8], "pipeline": null, "latent": false, "config": %s}'
)
TEXT = "text_encoder/model.safetensors"
UNET = "unet/diffusion_pytorch_model"


def not_running(f: Path) -> None:
    """A U-Net that diffusers makes and saves, and cannot call."""
    config = json.loads((f / "unet/config.json").read_text())
    diffusers.UNet2DModel.from_config({**config, "upsample_type": "x"}).save_pretrained(f / "unet")


def config(path: tuple[Any, ...], text: str) -> Callable[[Path], object]:
    return lambda f: put(f / "config.json", path, text)


def at(file: str, path: tuple[Any, ...], text: str) -> Callable[[Path], object]:
    return lambda f: put(f / file, path, text)


def decoy(shard: str) -> Callable[[Path], object]:
    """An index that says that the weights are in ``shard``, a pickle."""

    def damage(f: Path) -> None:
        names = list(load_file(f / f"{UNET}.safetensors"))
        (f / f"{UNET}.safetensors").unlink()
        (f / "unet" / shard).write_bytes(pickle.dumps({"weight": Trap()}))
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
        (f / f"{UNET}.safetensors.index.json").write_text(json.dumps(index))

    return damage


def beside(f: Path) -> None:
    """A pickle, and a safetensors file that nobody reads."""
    os.rename(f / f"{UNET}.safetensors", f / "unet/other.safetensors")
    (f / f"{UNET}.bin").write_bytes(pickle.dumps({"weight": Trap()}))


def adapter(f: Path) -> None:
    """A LoRA whose base model is on the hub."""
    told = {"peft_type": "LORA", "base_model_name_or_path": "owner/name"}
    (f / "text_encoder/adapter_config.json").write_text(json.dumps(told))


def one_tensor_less(file: str) -> Callable[[Path], object]:
    return lambda f: tensors(f / file, lambda held: dict(list(held.items())[1:]))


def cast(dtype: torch.dtype) -> Callable[[Path], object]:
    return lambda f: tensors(f / "model.safetensors", lambda held: {k: v.to(dtype) for k, v in held.items()})


#: kind of folder, damage, what is said
NAMED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    # a fewstep folder
    "60,000 levels": (
        "student", lambda f: (f / "config.json").write_text(DEEP), "config.json: nested deeper than 64 levels"
    ),
    "a config that is a name on the hub": (
        "student", config((*DENOISER, "network"), DIFFUSERS_NETWORK % '"owner/name"'),
        'model.flow_map.denoiser.network.config = "owner/name" must be an object',
    ),
    "a value of a wrong type in a diffusers config": (
        "student", config((*DENOISER, "network"), DIFFUSERS_NETWORK % '{"in_channels": "owner/name"}'),
        'network.config: in_channels = "owner/name" must be a whole number',
    ),
    "ten million blocks": ("student", config((*DENOISER, "network", "blocks"), "10000000"), "tensors of weights, w"),
    "ten million diffusers layers": (
        "student", config((*DENOISER, "network"), DIFFUSERS_NETWORK % '{"layers_per_block": 10000000}'),
        "tensors of weights, where",
    ),
    "a width for all memory": (
        "student", config((*DENOISER, "network", "width"), "100000000"), "config.json asks for [100000000, "
    ),
    "a shape of words": (
        "student", config((*DENOISER, "shape"), '"x"'), 'denoiser.shape = "x" must be a list, each a whole number'
    ),
    "a shape that is not the network's": (
        "student", config((*DENOISER, "shape"), "[3, 8, 8]"), "the model's shape is (3, 8, 8), that of its network"
    ),
    "classes of words": ("student", config((*DENOISER, "classes"), '"x"'), 'classes = "x" must be a whole number'),
    "classes that are not the network's": (
        "student", config((*DENOISER, "classes"), "null"), "the model's classes is None, that of its network 3"
    ),
    "a card that is a list": ("student", config(("card",), "[1]"), "card = [1] must be an object"),
    "plans that are a list": ("student", config(("model", "plans"), "[]"), "model.plans = [] must be an object"),
    "no plans": ("student", config(("model", "plans"), "{}"), "at least one sampling plan"),
    "a plan of 0 steps": (
        "student", config(("model", "plans"), '{"0": {"times": [1.5]}}'), 'key = "0" must be a number of steps'
    ),
    "a plan of -1 steps": (
        "student", config(("model", "plans"), '{"-1": {"times": [1.5]}}'), 'key = "-1" must be a number of steps'
    ),
    "a plan of 1 step with three times": (
        "student", config(("model", "plans", "1"), '{"times": [1.5, 1.0, 0.5]}'), "the plan for 1 steps has 3 times"
    ),
    "a plan of words": (
        "student", config(("model", "plans", "1", "times"), '["x"]'), 'plans.1.times[0] = "x" must be a finite number'
    ),
    "a plan in negative time": ("student", config(("model", "plans", "1", "times"), "[-1]"), "not negative, got (-1.0"),
    "a plan of NaN": ("student", config(("model", "plans", "1", "times"), "[NaN]"), "NaN must be a finite number"),
    "a plan outside the schedule": ("student", config(("model", "plans", "1", "times"), "[9]"), "starts at 9.0, above"),
    "a prediction's argument that is null": (
        "student", config((*DENOISER, "prediction", "sigma_data"), "null"), "sigma_data = null must be a finite number"
    ),
    "a prediction's argument that is negative": (
        "student", config((*DENOISER, "prediction", "sigma_data"), "-1"), "sigma_data=-1 must be positive"
    ),
    "a schedule's argument that is missing": (
        "student", lambda f: drop_t_min(f / "config.json"), "'model.flow_map.denoiser.schedule.t_min' is missing"
    ),
    "weights of integers": ("student", cast(torch.int64), "is of type I64, the model needs torch.float32"),
    "weights of booleans": ("student", cast(torch.bool), "is of type BOOL, the model needs torch.float32"),
    "a flipped weight": (
        "student", lambda f: flip(f / "model.safetensors", -9), "its SHA-256 is not the one in config.json"
    ),
    "a plan that calls where there is no noise": (
        "student", config(("model", "plans", "1", "times"), "[0]"), "the plan for 1 steps calls at 0.0, where there is"
    ),
    "a card whose data is a number": ("student", config(("card", "data"), "7"), "card.data = 7 must be text or null"),
    "a card whose data has no name": ("student", config(("card", "data"), "{}"), "'card.data.source' is missing"),
    # a routed one
    "a part without an expert": (
        "routed", config((*ROUTED, "router", "parts"), "[[0], [1], [2]]"), "2 experts for a router of 3 parts: one each"
    ),
    "no experts": ("routed", config((*ROUTED, "experts"), "[]"), "0 experts for a router of 2 parts"),
    "a label of two experts": (
        "routed", config((*ROUTED, "router", "parts"), "[[0, 2], [0, 1]]"), "must hold every label from 0 on once"
    ),
    "labels that the experts do not know": (
        "routed", config((*ROUTED, "router", "parts"), "[[0, 2], [1, 3]]"), "divides 4 classes, the experts know 3"
    ),
    "a label of words": (
        "routed", config((*ROUTED, "router", "parts"), '[["x"], [1]]'), 'parts[0][0] = "x" must be a whole number'
    ),
    "an unknown router": (
        "routed", config((*ROUTED, "router"), '{"name": "x"}'), 'router.name = "x" must be one of by-class, by-time'
    ),
    "a bound beyond all times": (
        "routed", config((*PHASES, "router", "bounds"), "[9]"), "bound 9 leaves an expert without times"
    ),
    "a bound of NaN": ("routed", config((*PHASES, "router", "bounds"), "[NaN]"), "NaN must be a finite number"),
    "an expert on another schedule": (
        "routed", config((*PHASES, "experts", 1, "schedule", "t_max"), "1.2"), "expert 1 has schedule TrigFlow("
    ),
    "an expert of another size": (
        "routed", config((*PHASES, "experts", 1, "network", "width"), "16"), "config.json asks for [16,"
    ),
    "a kind of expert that is none": (
        "routed", config((*ROUTED, "experts", 0, "kind"), '"x"'), 'experts[0].kind = "x" must be one of jump, '
    ),
    "an expert's tensor that is missing": (
        "routed", one_tensor_less("model.safetensors"), "model.safetensors: tensor 'flow_map.experts."
    ),
    # a pipeline
    "a network that cannot be called": ("pixels", not_running, "unet: UNet2DModel: its first call failed (Sizes of"),
    "an unknown kind of upsampling": (
        "pixels", at("unet/config.json", ("upsample_type",), '"x"'), "has no tensor 'up_blocks.0.upsamplers.0.conv"
    ),
    "a network without layers": ("pixels", at("unet/config.json", ("layers_per_block",), "0"), "has no tensor 'down_b"),
    "an autoencoder without blocks": ("text", at("vae/config.json", ("up_block_types",), "[]"), "vae: the model that"),
    "a text encoder without layers": (
        "text", at("text_encoder/config.json", ("num_hidden_layers",), "-1"), "text_encoder: the model that its config"
    ),
    "a tokenizer without its words": (
        "text", lambda f: (f / "tokenizer/tokenizer.json").unlink(), "tokenizer: its vocabulary has 2 words, numbered"
    ),
    "a tokenizer with a word too many": (
        "text", at("tokenizer/tokenizer.json", ("model", "vocab", "more"), "8"), "numbered up to 8, the text encoder"
    ),
    "an infinite number": ("pixels", at("unet/config.json", ("norm_eps",), "1e999"), "norm_eps = Infinity must be"),
    "a class that is none": (
        "pixels", at("unet/config.json", ("_class_name",), '"x"'), '_class_name = "x" must be UNet2DModel, or another'
    ),
    "a range below 0": (
        "pixels", at("scheduler/scheduler_config.json", ("clip_sample_range",), "-1"), "clip_sample_range = -1 must be"
    ),
    "an unknown spacing": (
        "pixels", at("scheduler/scheduler_config.json", ("timestep_spacing",), '"x"'), 'timestep_spacing = "x" must be'
    ),
    "a scheduler of nothing": (
        "pixels", lambda f: (f / "scheduler/scheduler_config.json").write_text("{}"), "it holds no setting of DDPMSched"
    ),
    "an index that is a list": (
        "pixels", lambda f: (f / "model_index.json").write_text("[]"), "model_index.json: [] must be an object"
    ),
    "an index of 60,000 levels": (
        "pixels", lambda f: (f / "model_index.json").write_text(DEEP), "model_index.json: nested deeper than 64"
    ),
    "an unknown pipeline": (
        "pixels", at("model_index.json", ("_class_name",), '"x"'), '_class_name = "x" must be the name of a class'
    ),
    "a class that is no pipeline": (
        "pixels", at("model_index.json", ("_class_name",), '"UNet2DModel"'), "must be a pipeline"
    ),
    "no scheduler": ("pixels", at("model_index.json", ("scheduler",), "[null, null]"), "no scheduler among its comp"),
    "no network": ("pixels", at("model_index.json", ("unet",), "[null, null]"), "no unet or transformer among its c"),
    "a component of one word": ("pixels", at("model_index.json", ("unet",), '["diffusers"]'), "unet = ['diffusers']"),
    "a component of any library": (
        "pixels", at("model_index.json", ("unet",), '["os", "system"]'), 'unet = "os" must be diffusers, transformers'
    ),
    "a component whose folder is missing": ("pixels", lambda f: shutil.rmtree(f / "unet"), "unet: no such folder"),
    "an index that points to a pickle": ("pixels", decoy("w.bin"), 'must be a .safetensors file beside it'),
    "a pickle beside another safetensors": ("pixels", beside, "diffusion_pytorch_model.bin: pickled weights are never"),
    "a scheduler's word for a number": (
        "pixels", at("scheduler/scheduler_config.json", ("beta_end",), '"x"'), 'beta_end = "x" must be a finite number'
    ),
    "a scheduler's table that is a number": (
        "pixels", at("scheduler/scheduler_config.json", ("trained_betas",), "1"), "trained_betas = 1 must be a list"
    ),
    "a scheduler of 10^12 steps": (
        "pixels", at("scheduler/scheduler_config.json", ("num_train_timesteps",), "1000000000000"),
        "must be a whole number from 0 to 100000",
    ),
    "a scheduler config that is a number": (
        "pixels", lambda f: (f / "scheduler/scheduler_config.json").write_text("7"), "7 must be an object"
    ),
    "ten million layers": (
        "pixels", at("unet/config.json", ("layers_per_block",), "10000000"), "tensors of weights, where"
    ),
    "negative groups": (
        "pixels", at("unet/config.json", ("norm_num_groups",), "-1"), "norm_num_groups = -1 must be a whole number"
    ),
    "a tensor that the weights lack": ("pixels", one_tensor_less(f"{UNET}.safetensors"), "its weights lack the tensor"),
    "a tensor that a text encoder's weights lack": (
        "text", one_tensor_less("text_encoder/model.safetensors"), "text_encoder: its weights lack the tensor"
    ),
    "a network of integers": (
        "pixels", lambda f: tensors(f / f"{UNET}.safetensors", lambda held: {k: v.long() for k, v in held.items()}),
        "is of type I64, weights are floating-point numbers",
    ),
    "a text encoder of booleans": (
        "text", lambda f: tensors(f / TEXT, lambda held: {k: v.bool() for k, v in held.items()}),
        "is of type BOOL, weights are floating-point numbers",
    ),
    "a tokenizer that pads to 10^12 tokens": (
        "text", at("tokenizer/tokenizer_config.json", ("model_max_length",), "1000000000000"),
        "model_max_length = 1000000000000 must be a whole number from 1 to 1000",
    ),
    "an adapter of a model elsewhere": ("text", adapter, "text_encoder: an adapter (adapter_config.json)"),
    "code that a config names": (
        "text", at("text_encoder/config.json", ("auto_map",), '{"AutoModel": "o/n--m.C"}'), "'auto_map' names code"
    ),
    "weights that a config names": (
        "text", at("text_encoder/config.json", ("transformers_weights",), '"w.bin"'), "'transformers_weights' names"
    ),
}  # fmt: skip


def drop_t_min(file: Path) -> None:
    content = json.loads(file.read_text())
    content["model"]["flow_map"]["denoiser"]["schedule"].pop("t_min")
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("what", NAMED)
def test_named_damage(what: str, victim: Callable[[str], Path]) -> None:
    kind, damage, said = NAMED[what]
    damage(victim(kind))
    found = tried(SAMPLE)
    assert found.kind == "line" and said in found.said, found
    assert found.said.startswith("fewstep sample: victim"), "the folder is not named"
    assert not Path(SPRUNG).exists()


def test_good_folders_are_taken(victim: Callable[[str], Path]) -> None:
    """And so are they through links, in shards, and with a pickle beside the safetensors file that is read."""
    folder = victim("pixels")
    assert tried(SAMPLE).kind == "taken"
    (folder / f"{UNET}.bin").write_bytes(pickle.dumps({"weight": Trap()}))
    assert tried(SAMPLE).kind == "taken"
    held = load_file(folder / f"{UNET}.safetensors")
    shards = {"a.safetensors": dict(list(held.items())[:5]), "b.safetensors": dict(list(held.items())[5:])}
    for name, part in shards.items():
        save_file(part, folder / "unet" / name, {"format": "pt"})
    (folder / f"{UNET}.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": {k: name for name, part in shards.items() for k in part}}
    (folder / f"{UNET}.safetensors.index.json").write_text(json.dumps(index))
    os.rename(folder / "unet", "elsewhere")
    (folder / "unet").symlink_to(Path("elsewhere").absolute())
    assert tried(SAMPLE).kind == "taken"
    assert not Path(SPRUNG).exists()


#: Parts of configs in use that stretch the annotations of their classes: nulls, lists for numbers, infinity.
IN_USE: dict[str, list[dict[str, Any]]] = {
    "UNet2DConditionModel": [
        {"attention_head_dim": [5, 10, 20], "class_embed_type": None, "cross_attention_norm": None, "freq_shift": 0,
         "mid_block_only_cross_attention": None, "mid_block_scale_factor": 1, "num_attention_heads": None,
         "time_embedding_act_fn": None, "transformer_layers_per_block": [1, 2, 10], "upcast_attention": None},
        {"cross_attention_dim": 768, "only_cross_attention": [True, True, False], "sample_size": 64},
        {"transformer_layers_per_block": [[1, 1], [2, 2]], "reverse_transformer_layers_per_block": [[1], [2]]},
    ],
    "UNet2DModel": [
        {"attention_head_dim": None, "downsample_padding": 0, "freq_shift": 1, "mid_block_scale_factor": 1},
        {"sample_size": [64, 64], "num_class_embeds": 1000, "attn_norm_num_groups": 32, "class_embed_type": None},
    ],
    "FluxTransformer2DModel": [{"axes_dims_rope": [16, 56, 56], "guidance_embeds": False, "out_channels": None}],
    "SD3Transformer2DModel": [{"dual_attention_layers": [0, 1], "qk_norm": None}, {"dual_attention_layers": []}],
    "SanaTransformer2DModel": [{"interpolation_scale": None, "mlp_ratio": 2.5, "dropout": 0}],
    "AutoencoderKL": [{"force_upcast": None, "latents_mean": None, "shift_factor": None, "scaling_factor": 1}],
    "AutoencoderDC": [{"decoder_qkv_multiscales": [[], [5]], "decoder_act_fns": "silu", "encoder_block_types": ["a"]}],
    "DPMSolverMultistepScheduler": [{"lambda_min_clipped": -float("inf"), "variance_type": None, "flow_shift": 3}],
    "UniPCMultistepScheduler": [{"disable_corrector": [], "solver_p": None, "trained_betas": None}],
    "DDPMScheduler": [{"trained_betas": [0.1, 0.2]}, {"trained_betas": None, "variance_type": "fixed_large"}],
}  # fmt: skip


def test_configs_in_use_are_taken() -> None:
    """And the config that every scheduler of diffusers that is read here writes by itself."""
    for name, configs in IN_USE.items():
        for config in configs:
            check_config(config, attrgetter(name)(diffusers), Place(name))
    for name in (*BETA_TABLE, *FLOW, *PRECONDITIONED):
        if name in dir(diffusers):
            kind = attrgetter(name)(diffusers)
            check_config(json.loads(kind().to_json_string()), kind, Place(name))
    hidden = pytest.importorskip("diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer")
    kind = hidden.StableUnCLIPImageNormalizer  # which diffusers itself does not name
    check_config({"_class_name": kind.__name__, "embedding_dim": 8}, kind, Place("image_normalizer"))


def test_a_folder_without_a_checksum_is_taken(victim: Callable[[str], Path]) -> None:
    """Weights that somebody changed on purpose: without the line there is nothing to compare."""
    folder = victim("student")
    content = json.loads((folder / "config.json").read_text())
    del content["sha256"]
    (folder / "config.json").write_text(json.dumps(content))
    assert tried(SAMPLE).kind == "taken"


def test_bundled_models_have_checksums() -> None:
    for name in bundled_models():
        folder = locate(name)
        assert json.loads((folder / "config.json").read_text())["sha256"] == native.sha256(folder / "model.safetensors")


def test_a_bare_model_is_looked_at_too(victim: Callable[[str], Path]) -> None:
    """``load_model`` refuses the decoy index and the config that is no object."""
    folder = victim("pixels")
    decoy("w.bin")(folder)
    with pytest.raises(ValueError, match=r"must be a \.safetensors file beside it"), sockets_blocked() as asked:
        load_model(folder / "unet", diffusers.DDPMScheduler())
    (folder / "unet/config.json").write_text('"owner/name"')
    with pytest.raises(ValueError, match="must be an object"), sockets_blocked() as asked:
        load_model(folder / "unet", diffusers.DDPMScheduler())
    assert asked == [] and not Path(SPRUNG).exists()


def test_a_cached_pipeline_is_looked_at_too(victim: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub's cache holds under a name goes through the same checks as a folder."""
    folder = victim("pixels")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda *_, **__: str(folder))
    assert load_pipeline("owner/name").denoiser.shape == (1, 8, 8)
    decoy("w.bin")(folder)
    with pytest.raises(ValueError, match=r"must be a \.safetensors file beside it"):
        load_pipeline("owner/name")


def test_a_name_that_is_not_cached_asks_no_host() -> None:
    with sockets_blocked() as asked, pytest.raises(FileNotFoundError, match="not in the local hub cache"):
        load_pipeline("nobody/this-pipeline-is-not-cached")
    assert asked == []


# --- the same in Python --------------------------------------------------------------------------------------------


def test_arguments_that_cannot_be() -> None:
    """What a config may not say, a caller may not either."""
    for prediction in (V, EDMPrediction, TrigPrediction):
        with pytest.raises(ValueError, match="time_scale=0 must be positive"):
            prediction(time_scale=0)
    with pytest.raises(ValueError, match="sigma_data=nan must be positive"):
        EDMPrediction(sigma_data=float("nan"))
    with pytest.raises(ValueError, match="need 0 < log_snr_max <= 20"):
        VPCosine(log_snr_max=1e5)
    with pytest.raises(ValueError, match="t_max=2 must be at most 1"):
        FlowMatching(t_max=2)
    for times in ((float("nan"),), (float("inf"),), (-1.0,), (1.0, -1.0)):
        with pytest.raises(ValueError, match="strictly decreasing and not negative"):
            Plan(times)
    with pytest.raises(ValueError, match="times are not negative"):
        Plan((1.0, 0.5), inner=(-0.1,))
    world = three_modes(EDM())
    with pytest.raises(ValueError, match="sigma_data=0 must be positive"):
        EDMConsistency(world, 0)
    flow_map = Jump(world)
    with pytest.raises(ValueError, match="the plan for 2 steps has 1 times"):
        Student(flow_map, {2: Plan((80.0,))})
    with pytest.raises(ValueError, match=r"starts at 81\.0, above EDM"):
        Student(flow_map, {1: Plan((81.0,))})


def test_building_leaves_nothing_behind() -> None:
    """The bound on parameters ends with the load that it is of."""
    fs.load("digits")
    for _ in range(400):
        MLP((2,), 8, 1)


def test_every_kind_of_description_comes_back() -> None:
    """The schemas take what is written: schedules, predictions, networks, flow maps and samplers of every kind."""
    net = MLP((2,), 8, 1)
    for schedule in (EDM(), FlowMatching(), TrigFlow(), VPCosine(), VPLinear(), DiscreteVP.linear(5)):
        for prediction in (V(), EDMPrediction(), TrigPrediction()):
            made = NetworkDenoiser(net, schedule, prediction, (2,))
            again = native.build(json.loads(json.dumps(native.describe(made))))
            assert (again.schedule, again.prediction, again.shape) == (schedule, prediction, (2,))


# --- other JSON ----------------------------------------------------------------------------------------------------


def discrete(blocks: int = 1) -> NetworkDiscreteDenoiser:
    torch.manual_seed(0)
    chain = Masked(5)
    return NetworkDiscreteDenoiser(Transformer(4, 5, chain.states, 8, blocks, 2), chain, 4)


def test_discrete_models(tmp_path: Path) -> None:
    """Chains, noises and plans are checked like everything else."""
    sampler = LearnedSampler(discrete(), {2: DiscretePlan((1.0, 0.5, 0.01))})
    folder = native.save(sampler, tmp_path / "model")
    assert native.load(folder).plans == sampler.plans
    model = ("model", "denoiser")
    for path, text, said in (
        ((*model, "chain", "tokens"), '"x"', 'chain.tokens = "x" must be a whole number'),
        ((*model, "chain", "tokens"), "6", "the model's tokens is 6, that of its network 5"),
        ((*model, "chain", "noise", "rest"), "null", "noise.rest = null must be a finite number"),
        ((*model, "chain", "noise", "rest"), "2", r"rest=2 must lie in \(0, 1\)"),
        ((*model, "network", "blocks"), "10000000", "tensors of weights, where"),
        ((*model, "length"), "0", "length = 0 must be a whole number, at least 1"),
        (("model", "plans"), '{"0": {"times": [1, 0.5], "phi": [1]}}', "must be a number of steps"),
        (("model", "plans", "2", "times"), "[1, NaN, 0]", "must be a finite number"),
        (("model", "stepper"), '"x"', "stepper 'x' is unknown"),
    ):
        shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        put(tmp_path / "copy/config.json", path, text)
        with pytest.raises(ValueError, match=rf"copy.config\.json: .*{said}"):
            native.load(tmp_path / "copy")


def test_learned_plans(tmp_path: Path) -> None:
    sampler = LearnedSampler(discrete(), {2: DiscretePlan((1.0, 0.5, 0.01))})
    path = save_plans(sampler, tmp_path / "plans.json")
    assert load_plans(path, sampler.denoiser).plans == sampler.plans  # type: ignore[arg-type]
    for field, text, said in (
        ("plans", DEEP, "nested deeper"), ("plans", "[]", r"plans = \[\] must be"), ("format", "2", "must be 1"),
        ("fingerprint", "{}", "'fingerprint.chain' is missing"),
        ("plans", '{"2": {"times": ["x"], "phi": []}}', r'times\[0\] = "x" must be a finite number'),
    ):  # fmt: skip
        save_plans(sampler, path)
        put(path, (field,), text)
        with pytest.raises(ValueError, match=rf"plans\.json: .*{said}"):
            load_plans(path, sampler.denoiser)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{'a': 1}", "settings.json: not valid JSON"), (DEEP, "settings.json: nested deeper"),
        ("[]", "settings.json: [] must be an object"), ("{}", "settings.json: 'setting' is missing"),
        ('{"setting": {"solver": 1, "grid": null, "steps": 2, "threshold": null}}', "setting.solver = 1 must be text"),
        ('{"setting": {"solver": "ddim", "grid": null, "steps": 1e9, "threshold": null}}', "must be a whole number"),
        ('{"setting": {"solver": "ddim", "grid": null, "steps": 2, "threshold": null}, "guidance": NaN}', "guidance ="),
    ],
)  # fmt: skip
def test_settings_of_tune_steps(text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("settings.json").write_text(text)
    found = tried(["sample", "digits", "--settings", "settings.json", "--n", "2", "--out", "x.npz"])
    assert found.kind == "line" and said in found.said


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("start", DEEP, "nested deeper"),
        ("command", '"sing"', 'command = "sing" must be one of train, condense, distill'),
        ("data", "[]", "data = [] must be an object"), ("settings", "7", "settings = 7 must be an object"),
        ("start", '{"model": 7, "sha256": ""}', "start.model = 7 must be text"),
    ],
)  # fmt: skip
def test_recipes(field: str, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record = {
        "format": 1, "command": "distill", "method": "cm", "hyper_parameters": {}, "settings": {}, "versions": {},
        "start": {"model": "digits", "sha256": ""}, "data": {"source": "digits", "sha256": ""},
    }  # fmt: skip
    Path("recipe.json").write_text(json.dumps(record))
    put(Path("recipe.json"), (field,), text)
    found = tried(["distill", "--recipe", "recipe.json", "--dry-run"])
    assert found.kind == "line" and "recipe.json: " in found.said and said in found.said, found


def test_a_recipe_of_ten_million_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network without weights to compare with: it ends at some thousand tensors, not when memory does."""
    monkeypatch.chdir(tmp_path)
    words = ["train", "t", "--data", "digits", "--network", "mlp", "--width", "2", "--budget", "1steps", "--quiet"]
    assert tried([*words, "--dry-run", "--blocks", "10000000"]).kind == "line"
    assert tried([*words, "--out", "run"]).kind == "taken"
    put(Path("run/recipe.json"), ("start", "network", "blocks"), "10000000")
    found = tried(["train", "--recipe", "run/recipe.json", "--dry-run"])
    assert found.kind == "line" and "tensors of weights" in found.said, found


def test_a_damaged_log_of_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run leaves out what it cannot read of the logs of its stages."""
    monkeypatch.chdir(tmp_path)
    words = "distill pd --teacher digits --start 4 --end 1 --budget 2steps --batch 8 --precision fp32 --quiet --out run"
    assert tried(words.split()).kind == "taken"
    logs = sorted(Path("run").glob("stage-*/log.jsonl"))
    assert len(logs) == 2
    for line in (b"{}\n", b"7\n", b"\xff\n", DEEP.encode() + b"\n", b'{"step": "x", "images": 1, "seconds": 1}\n'):
        logs[0].write_bytes(line + logs[0].read_bytes())
        assert tried(words.split()).kind == "taken"
    logs[1].write_bytes(b"")
    assert tried(words.split()).kind == "taken"
    assert tried(["report", "run", "--n", "20", "--out", "page.html"]).kind == "taken"


def test_damaged_metadata_of_tensors(tmp_path: Path) -> None:
    """Statistics, snapshots and checkpoints keep JSON in the metadata of their tensors."""
    for text, said in (("{", "not valid JSON"), (DEEP, "nested deeper"), ("[]", "must be an object")):
        path = tmp_path / "s.safetensors"
        save_file({"x": torch.zeros(1)}, path, {"fingerprint": text})
        with pytest.raises(ValueError, match=rf"s\.safetensors: .*{said}"):
            read_fingerprint(path)
        save_file({"x": torch.zeros(1)}, tmp_path / "1.safetensors", {"counters": text})
        with pytest.raises(ValueError, match=rf"1\.safetensors: .*{said}"):
            snapshots.read(tmp_path)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (DEEP, "nested deeper"), ("[]", "must be an object"), ('{"_data_files": [7]}', r"_data_files\[0\] = 7"),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', "names no data files beside it"),
    ],
)  # fmt: skip
def test_a_saved_data_set(state: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(ValueError, match=said) as error:
        load_data(tmp_path)
    assert "state.json" in str(error.value)


def test_cases_have_names_of_their_own(good: dict[str, Path]) -> None:
    """The report of the whole set can be read."""
    for kind, folder in good.items():
        made: list[Case] = cases(kind, folder)
        assert len(made) > 650 and len({case.name for case in made}) > 0.99 * len(made)
