"""Damaged and hostile model folders, made by rule from good ones, and what ``fewstep sample`` makes of them.

    python tests/faults/hostile.py [PART ...]        the whole set, each case in a process of its own; counts and faults
    python tests/faults/hostile.py text:300          about 300 cases of a part, every n-th

A case is a name and a function that damages a folder.  Every JSON file is damaged as text and in each of its values,
every file is deleted, cut, flipped, emptied and replaced by links; weights change their types, shapes and names; decoys
point to pickles.  Nothing may end in a traceback, contact a host or unpickle.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

# as the command line does before it imports them
os.environ.update(DIFFUSERS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")

import torch
from safetensors.torch import load_file, save_file

SPRUNG = "sprung"


@dataclass(frozen=True)
class Case:
    """A way to damage a folder in place."""

    name: str
    damage: Callable[[Path], object]


@dataclass(frozen=True)
class Outcome:
    """How a command ended: "taken" (exit 0), "line" (exit 2, one line), or what it must never be."""

    kind: str
    said: str


# --- good folders --------------------------------------------------------------------------------------------------


def student_folder(place: Path) -> None:
    """A fewstep student with two plans, on a tiny MLP."""
    from fewstep.denoisers import NetworkDenoiser
    from fewstep.flow_maps import Jump
    from fewstep.hub import native
    from fewstep.networks import MLP
    from fewstep.predictions import EDMPrediction
    from fewstep.sampling import Plan, Student
    from fewstep.schedules import TrigFlow

    torch.manual_seed(0)
    denoiser = NetworkDenoiser(MLP((1, 8, 8), 8, 1, 3), TrigFlow(), EDMPrediction(), (1, 8, 8), 3)
    plans = {1: Plan((1.5,)), 2: Plan((1.5, 0.7), 0.5, (0.6,))}
    native.save(Student(Jump(denoiser), plans), place, {"data": "digits", "steps": 3})


def routed_folder(place: Path) -> None:
    """A fewstep student of two experts by class, one of which is two by time."""
    from fewstep.denoisers import NetworkDenoiser
    from fewstep.flow_maps import Jump
    from fewstep.hub import native
    from fewstep.networks import MLP
    from fewstep.predictions import EDMPrediction
    from fewstep.routing import ByClass, ByTime, RoutedDenoiser, RoutedFlowMap
    from fewstep.sampling import Plan, Student
    from fewstep.schedules import TrigFlow

    torch.manual_seed(0)
    one, two, three = (
        NetworkDenoiser(MLP((1, 8, 8), 8, 1, 3), TrigFlow(), EDMPrediction(), (1, 8, 8), 3) for _ in range(3)
    )
    phases = Jump(RoutedDenoiser([two, three], ByTime([1.0])))
    student = Student(RoutedFlowMap([Jump(one), phases], ByClass([[0, 2], [1]])), {2: Plan((1.5, 0.7))})
    native.save(student, place, {"data": "digits"})


def pixel_pipeline(place: Path) -> None:
    """DDPMPipeline with a tiny U-Net."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(clip_sample=False)).save_pretrained(place)


def text_pipeline(place: Path) -> None:
    """StableDiffusionPipeline with a text encoder for three letters and an autoencoder."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "c</w>", "a", "b", "c"]
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, cross_attention_dim=6, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=8,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    text = transformers.CLIPTextConfig(
        vocab_size=8, hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=77, projection_dim=5, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=False),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer(
            vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(place)  # fmt: skip


GOOD = {"student": student_folder, "routed": routed_folder, "pixels": pixel_pipeline, "text": text_pipeline}

# --- damage by rule ------------------------------------------------------------------------------------------------

DEEP = "[" * 60_000 + "]" * 60_000
#: What is put in the place of every value of every JSON file, as text.
WRONG = ("null", "true", "-1", "0", "0.5", "1000000000000", "1e999", "NaN", '"x"', '"owner/name"', "[]", "{}", DEEP)
FEW = ("null", "-1", "1000000000000", '"owner/name"', "[]", "{}")


class Trap:
    """Unpickling this makes a file in the current folder."""

    def __reduce__(self) -> Any:
        return (os.mkdir, (SPRUNG,))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document, containers included; of a list only the first element."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def put(file: Path, path: tuple[Any, ...], text: str) -> None:
    """Write ``text`` in the place of one value of a JSON file."""
    content = json.loads(file.read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = "@@HERE@@"
    file.write_text(json.dumps(content).replace('"@@HERE@@"', text))


def drop(file: Path, path: tuple[Any, ...]) -> None:
    """Take one value out of a JSON file."""
    content = json.loads(file.read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner.pop(path[-1])
    file.write_text(json.dumps(content))


def shown(text: str) -> str:
    return text if len(text) < 100 else f"{text[:3]}..{text[-90:]}"


def json_cases(folder: Path, name: str, wrong: tuple[str, ...]) -> Iterator[Case]:
    """A JSON file damaged as text, and each of its values replaced and taken out."""
    whole = {
        "deep": DEEP, "list": "[]", "null": "null", "empty": "", "not json": "{'a': 1}", "number": "7",
        "empty object": "{}", "bytes": "\udcff\udcfe", "cut": "{", "text": '"x"',
    }  # fmt: skip
    for what, text in whole.items():
        data = text.encode("utf-8", "surrogateescape")
        yield Case(f"{name} is {what}", lambda f, data=data: (f / name).write_bytes(data))
    content = json.loads((folder / name).read_text())
    if not isinstance(content, dict):
        return
    for path in places(content):
        said = ".".join(map(str, path))
        for text in wrong:
            yield Case(f"{name}: {said} = {shown(text)}", lambda f, p=path, t=text: put(f / name, p, t))
        yield Case(f"{name}: no {said}", lambda f, p=path: drop(f / name, p))
    yield Case(f"{name}: more", lambda f: put(f / name, ("a_strange_key",), '{"a": [1]}'))
    twice = json.dumps(content)[:-1] + ", " + json.dumps({next(iter(content)): "x"})[1:]
    yield Case(f"{name}: a key twice", lambda f: (f / name).write_text(twice))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at % len(data)] ^= 0x40
    file.write_bytes(bytes(data))


def link(file: Path, target: str | Path) -> None:
    file.unlink()
    file.symlink_to(target)


def file_cases(name: str) -> Iterator[Case]:
    """Any file, deleted, emptied, cut, flipped, replaced by folders, links and pickles."""
    yield Case(f"{name} is missing", lambda f: (f / name).unlink())
    yield Case(f"{name} is empty", lambda f: (f / name).write_bytes(b""))
    yield Case(f"{name} is cut", lambda f: (f / name).write_bytes((f / name).read_bytes()[: -9 - len(name)]))
    for at in (1, 9, 60):
        yield Case(f"{name} is flipped at {at}", lambda f, at=at: flip(f / name, at))
    yield Case(f"{name} is a folder", lambda f: ((f / name).unlink(), (f / name).mkdir()))
    yield Case(f"{name} links to itself", lambda f: link(f / name, f / name))
    yield Case(f"{name} links to nothing", lambda f: link(f / name, "nowhere"))
    yield Case(f"{name} links to /dev/null", lambda f: link(f / name, "/dev/null"))
    yield Case(f"{name} links to a pickle", lambda f: (trap(f / "x.bin"), link(f / name, f / "x.bin")))
    yield Case(f"{name} is a pickle", lambda f: trap(f / name))


def trap(file: Path) -> None:
    file.write_bytes(pickle.dumps({"weight": Trap()}))


def tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(file)), file, {"format": "pt"})


def header(file: Path, text: bytes, length: int | None = None) -> None:
    """A safetensors file with a header of its own."""
    size = len(text) if length is None else length
    file.write_bytes(struct.pack("<Q", size) + text + b"\0" * 64)


def weight_cases(name: str) -> Iterator[Case]:
    """Weights of other types, shapes and names, and headers that lie."""

    def cast(dtype: torch.dtype) -> Callable[[Path], object]:
        return lambda f: tensors(f / name, lambda held: {k: v.to(dtype) for k, v in held.items()})

    for dtype in (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float64, torch.float16):
        yield Case(f"{name} holds {str(dtype).removeprefix('torch.')}", cast(dtype))
    yield Case(f"{name} holds nothing", lambda f: tensors(f / name, lambda held: {}))
    yield Case(
        f"{name} has other names", lambda f: tensors(f / name, lambda held: {f"x.{k}": v for k, v in held.items()})
    )
    yield Case(f"{name} has one less", lambda f: tensors(f / name, lambda held: dict(list(held.items())[1:])))
    yield Case(f"{name} has one more", lambda f: tensors(f / name, lambda held: {**held, "x": torch.zeros(1)}))
    yield Case(
        f"{name} is flat", lambda f: tensors(f / name, lambda held: {k: v.reshape(-1).clone() for k, v in held.items()})
    )
    yield Case(f"{name} is not finite", lambda f: tensors(f / name, lambda held: {k: v / 0 for k, v in held.items()}))
    yield Case(f"{name} has a deep header", lambda f: header(f / name, b'{"a":' * 60_000 + b"1" + b"}" * 60_000))
    yield Case(f"{name} has a long header", lambda f: header(f / name, b"{}", 1 << 62))
    lie = b'{"x": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}'
    yield Case(f"{name} has a lying header", lambda f: header(f / name, lie))


def decoy_cases(folder: str, weights: str, pickled: str) -> Iterator[Case]:
    """Pickles beside or in the place of safetensors, and indices that point to them."""
    index = f"{weights}.index.json"

    def pointing(f: Path, shard: str, keep: bool) -> None:
        names = list(load_file(f / folder / weights))
        if not keep:
            (f / folder / weights).unlink()
        content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
        (f / folder / index).write_text(json.dumps(content))

    yield Case(f"{folder}: a pickle alone", lambda f: ((f / folder / weights).unlink(), trap(f / folder / pickled)))
    yield Case(
        f"{folder}: a pickle and another safetensors",
        lambda f: (os.rename(f / folder / weights, f / folder / "x.safetensors"), trap(f / folder / pickled)),
    )
    for keep in (False, True):
        beside = "beside the weights" if keep else "alone"
        for shard in (pickled, "../x.bin", "/tmp/x.bin", "nowhere.safetensors", "x.gguf"):
            yield Case(
                f"{folder}: an index {beside} that points to {shard}",
                lambda f, shard=shard, keep=keep: (
                    pointing(f, shard, keep), trap(f / folder / pickled), trap(f / "x.bin"), trap(f / folder / "x.gguf")
                ),
            )  # fmt: skip
        texts = {
            "deep": DEEP, "a list": "[]", "no map": "{}", "a map of numbers": '{"weight_map": {"a": 1}, "metadata": {}}'
        }  # fmt: skip
        for what, text in texts.items():
            yield Case(
                f"{folder}: an index {beside} that is {what}",
                lambda f, keep=keep, text=text: (pointing(f, "x", keep), (f / folder / index).write_text(text)),
            )


def adapter(f: Path, folder: str) -> None:
    """A LoRA beside the weights that names a model of the hub as its base."""
    content = {"peft_type": "LORA", "base_model_name_or_path": "owner/name", "task_type": None}
    (f / folder / "adapter_config.json").write_text(json.dumps(content))


def replaced(file: str, path: tuple[Any, ...], text: str) -> Case:
    """One value of a JSON file replaced."""
    return Case(f"{file}: {'.'.join(map(str, path))} = {shown(text)}", lambda f: put(f / file, path, text))


def index_cases() -> Iterator[Case]:
    """Component entries of model_index.json that are not what they should be."""
    index = "model_index.json"
    for what in (
        '[null, null]', '["os", "system"]', '["diffusers", "nothing"]', '["nothing", "UNet2DModel"]', '["diffusers"]',
        '["diffusers", null]', '[null, "UNet2DModel"]', '[1, 2]', '["diffusers", "UNet2DModel", 3]', '"UNet2DModel"',
        '["transformers", "AutoModel"]', '["diffusers", "AutoModel"]', '["diffusers", "DDPMScheduler"]',
        '["diffusers", "DiffusionPipeline"]', '["sys", "modules"]', '["diffusers", "__doc__"]',
        '["diffusers.utils", "logging"]', '["evil", "Evil"]',
    ):  # fmt: skip
        yield replaced(index, ("unet",), what)
        yield replaced(index, ("scheduler",), what)
    for kind in ("UNet2DModel", "nothing", "DiffusionPipeline", "KandinskyCombinedPipeline", "__doc__", "os.system"):
        yield replaced(index, ("_class_name",), json.dumps(kind))
    yield Case("model_index.json: own code", lambda f: own_code(f))
    yield Case("unet is missing", lambda f: shutil.rmtree(f / "unet"))
    yield Case("scheduler is missing", lambda f: shutil.rmtree(f / "scheduler"))
    yield Case("unet is a file", lambda f: (shutil.rmtree(f / "unet"), (f / "unet").write_text("x")))
    yield Case("unet is linked", lambda f: (os.rename(f / "unet", f / "x"), (f / "unet").symlink_to("x")))
    yield Case("unet links to itself", lambda f: (shutil.rmtree(f / "unet"), (f / "unet").symlink_to("unet")))
    yield Case("unet: an adapter", lambda f: adapter(f, "unet"))
    for code in ("owner/name--module.Class", "module.Class"):
        yield replaced("unet/config.json", ("auto_map",), json.dumps({"AutoModel": code, "AutoConfig": code}))
    quantized = '{"quant_method": "bitsandbytes", "load_in_4bit": true}'
    yield replaced("unet/config.json", ("quantization_config",), quantized)


def own_code(f: Path) -> None:
    (f / "own.py").write_text(f"import os; os.mkdir({SPRUNG!r})")
    put(f / "model_index.json", ("_class_name",), '["own", "Own"]')


def student_cases() -> Iterator[Case]:
    """A fewstep config with a network that is diffusers' own, plans, sizes and schedules that cannot be."""
    name, plans = "config.json", ("model", "plans")
    denoiser = ("model", "flow_map", "denoiser")
    network = (*denoiser, "network")
    sides = '"class": "UNet2DModel", "size": [8, 8]'
    for config in (
        '"owner/name"', '{"_class_name": "UNet2DModel"}', "[]", "null", '"."', DEEP, '{"layers_per_block": 10000000}',
        '{"block_out_channels": [1000000000, 1000000000]}', '{"in_channels": "owner/name"}',
    ):  # fmt: skip
        yield replaced(name, network, f'{{"name": "diffusers", {sides}, "pipeline": null, "config": {config}}}')
    for pipeline in ('"owner/name"', '"."', "7", '"\\u0000"', '"\\ud800"', '"/proc/self"'):
        yield replaced(name, network, f'{{"name": "diffusers", {sides}, "config": {{}}, "pipeline": {pipeline}}}')
    for key in ("0", "-1", "x", "1.5", "1e3", " 2", "02", "\\u0662", "9" * 5000):
        yield replaced(name, plans, f'{{"{key}": {{"times": [1.5]}}}}')
    for plan in (
        '{"times": [1.5, 1.0, 0.5]}', '{"times": [-1]}', '{"times": [9]}', '{"times": [1.5], "gamma": 2}',
        '{"times": []}', '{"times": [1.5], "more": 1}', '{"times": "1.5"}', '{"times": [1.5], "inner": [0.1]}',
        '{"times": ["1.5"]}', '{"times": [NaN]}', '{"times": [true]}', '{"times": [1e400]}',
    ):  # fmt: skip
        yield replaced(name, (*plans, "1"), plan)
    for field, value in (
        ("blocks", "10000000"), ("width", "100000000"), ("width", "7"), ("classes", "100000000000"),
        ("extras", '["x"]'), ("extras", "[1]"), ("beside", "100000000"), ("shape", "[1, 80000, 80000]"),
        ("shape", "[0]"), ("name", '"unet"'), ("name", '"cascade-unet"'), ("name", '"diffusers"'), ("name", "[]"),
    ):  # fmt: skip
        yield replaced(name, (*network, field), value)
    for kind in (
        "jump", "denoiser", "edm-consistency", "on-schedule", "discrete-denoiser", "learned-sampler", "nothing",
    ):  # fmt: skip
        yield replaced(name, ("model", "kind"), json.dumps(kind))
    yield replaced(name, ("model",), '{"kind": "jump", "two_times": false, "denoiser": ' * 300 + "null" + "}" * 300)
    for schedule in (
        '{"name": "DiscreteVP", "t_min": 0, "t_max": 1, "alphas_cumprod": [0.9, 0.1]}', '{"name": "DiscreteVP"}',
        '{"name": "DiscreteVP", "t_min": 0, "t_max": 0, "alphas_cumprod": ["a", "b"]}',
        '{"name": "VPCosine", "t_min": 0, "t_max": 1, "log_snr_max": -5}',
        '{"name": "VPCosine", "t_min": 0, "t_max": 1, "log_snr_max": 1e5}',
        '{"name": "EDM", "t_min": -1, "t_max": 80}', '{"name": "FlowMatching", "t_min": 0, "t_max": 2}',
        '{"name": "TrigFlow", "t_min": 0, "t_max": 2, "sigma_data": 0.5}',
    ):  # fmt: skip
        yield replaced(name, (*denoiser, "schedule"), schedule)


def cases(kind: str, folder: Path) -> list[Case]:
    """All cases of one of :data:`GOOD`, whose folder is ``folder``."""
    made: list[Case] = [Case("as it is", lambda f: None)]
    wrong = FEW if kind == "text" else WRONG
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    for name in files:
        if kind != "text" or "text_encoder" in name or "tokenizer" in name or "vae" in name:
            made += file_cases(name)
        if name.endswith(".json"):
            made += json_cases(folder, name, wrong)
        if name.endswith(".safetensors"):
            made += weight_cases(name)
    if kind == "student":
        made += student_cases()
    elif kind != "routed":
        made += index_cases()
        made += decoy_cases("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    if kind == "text":
        made += decoy_cases("text_encoder", "model.safetensors", "pytorch_model.bin")
        made.append(Case("text_encoder: an adapter", lambda f: adapter(f, "text_encoder")))
        pointing_elsewhere = {
            "auto_map": '{"AutoModel": "owner/name--m.C"}', "_attn_implementation": '"owner/name"',
            "attn_implementation": '"owner/name"', "model_type": '"bert"', "backbone": '"owner/name"',
            "quantization_config": '{"quant_method": "bitsandbytes", "load_in_4bit": true}',
            "num_hidden_layers": "10000000", "transformers_weights": '"pytorch_model.bin"',
        }  # fmt: skip
        made += [replaced("text_encoder/config.json", (key,), text) for key, text in pointing_elsewhere.items()]
    return made


# --- trying --------------------------------------------------------------------------------------------------------


class Contact(Exception):
    """Something wanted to talk to a host."""


@contextmanager
def sockets_blocked() -> Iterator[list[str]]:
    """No connection and no look-up of a name works inside; the list says what was asked for."""
    asked: list[str] = []

    def refuse(*arguments: object, **_: object) -> Any:
        asked.append(str(arguments[-1] if len(arguments) < 3 else arguments[:2]))
        raise Contact("the network was asked for")

    names = ("connect", "connect_ex", "sendto")
    held = {name: getattr(socket.socket, name) for name in names}
    resolvers = {name: getattr(socket, name) for name in ("getaddrinfo", "gethostbyname", "create_connection")}
    try:
        for name in names:
            setattr(socket.socket, name, refuse)
        for name in resolvers:
            setattr(socket, name, refuse)
        yield asked
    finally:
        for name, kept in held.items():
            setattr(socket.socket, name, kept)
        for name, kept in resolvers.items():
            setattr(socket, name, kept)


def tried(words: list[str]) -> Outcome:
    """What becomes of a command line in this process and the current folder."""
    from fewstep.cli import main

    out, err = StringIO(), StringIO()
    with sockets_blocked() as asked, redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(words)
        except BaseException as error:
            what = f"{type(error).__name__}: {error}"
            return Outcome("contact" if asked else "traceback", what[:300])
    # libraries' progress bars, which the command line switches off before it imports them
    said = "".join(f"{line}\n" for line in err.getvalue().splitlines() if not re.search(r"\d%\|", line) and line)
    if asked:
        return Outcome("contact", asked[0])
    if Path(SPRUNG).exists():
        return Outcome("unpickled", said)
    if code == 0:
        return Outcome("taken", said.strip()[:300])
    if code != 2 or said.count("\n") != 1 or len(said) > 700:
        return Outcome("lines", said[:300])
    return Outcome("line", said.strip())


SAMPLE = ["sample", "victim", "--n", "2", "--steps", "2", "--out", "made.npz"]


def in_a_child(case: Case, good: Path, seconds: int = 20) -> Outcome:
    """The outcome in a process of its own, with a bound on time."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.json"
        pid = os.fork()
        if pid == 0:
            try:
                os.chdir(place)
                signal.alarm(seconds)
                shutil.copytree(good, "victim")
                case.damage(Path("victim").absolute())
                found = tried(SAMPLE)
                report.write_text(json.dumps([found.kind, found.said], default=str))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        return (
            Outcome(*json.loads(report.read_text())) if report.exists() else Outcome("killed", "too long, or crashed")
        )


def main() -> int:
    """Every case of every good folder (or of those named); 1 when one ends as none may."""
    bad = 0
    with tempfile.TemporaryDirectory() as place:
        for part in sys.argv[1:] or GOOD:
            kind, _, number = part.partition(":")
            good = Path(place) / kind
            GOOD[kind](good)
            os.chdir(place)
            shutil.copytree(good, "victim")
            tried(SAMPLE)  # what is imported now is not imported again for every case
            shutil.rmtree("victim")
            start, counts = time.time(), Counter[str]()
            made = cases(kind, good)
            for case in made[:: len(made) // int(number) if number else 1]:
                found = in_a_child(case, good)
                counts[found.kind] += 1
                print(f"{kind:8} {found.kind:10} {case.name}   -> {found.said}", flush=True)
            print(f"{kind}: {sum(counts.values())} cases, {dict(counts)}, {time.time() - start:.0f} s", flush=True)
            bad += sum(n for name, n in counts.items() if name not in ("taken", "line"))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
