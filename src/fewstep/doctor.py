"""What can be wrong with an installation, looked at one thing at a time."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

import fewstep
from fewstep.schemas import Map, read_json
from fewstep.training.precision import probe

ASSETS = Path(__file__).parent / "assets"
OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
CORE = ("numpy", "safetensors", "rich", "matplotlib", "pillow")
#: Distribution -> what needs it.
OPTIONAL = {
    "diffusers": "diffusers folders, in and out",
    "transformers": "text encoders of pipelines, language models",
    "peft": "LoRA adapters",
    "pyarrow": "parquet data",
    "scikit-learn": "representative images (AST) and bins of texts",
    "scipy": "nothing but tests and some metrics",
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at: "ok", a "note" that explains a missing feature, or "bad"."""

    state: Literal["ok", "note", "bad"]
    what: str
    text: str


def examine() -> Iterator[Finding]:
    """All findings, cheap ones first."""
    yield from versions()
    yield from optional()
    yield torchvision()
    yield from devices()
    yield from assets(ASSETS)


def versions() -> Iterator[Finding]:
    """Python, PyTorch and the core packages."""
    yield Finding("ok", "fewstep", fewstep.__version__)
    yield at_least("Python", platform.python_version(), OLDEST_PYTHON)
    yield at_least("PyTorch", torch.__version__, OLDEST_TORCH)
    for name in CORE:
        yield Finding("ok", name, metadata.version(name))


def at_least(name: str, version: str, oldest: tuple[int, int]) -> Finding:
    """A version beside the oldest that works."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    wanted = ".".join(map(str, oldest))
    if numbers < oldest:
        return Finding("bad", name, f"{version}, at least {wanted} is needed")
    return Finding("ok", name, version)


def optional() -> Iterator[Finding]:
    """The packages that single features need."""
    for name, purpose in OPTIONAL.items():
        try:
            yield Finding("ok", name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding("note", name, f"not installed; needed for {purpose}")


def torchvision() -> Finding:
    """Whether torchvision, which diffusers, transformers and peft import when it is there, can be imported.

    A build for another PyTorch cannot, and takes them all with it.  The attempt is made in a process of its own: a
    failed import leaves PyTorch's operator tables half changed.
    """
    if importlib.util.find_spec("torchvision") is None:
        return Finding("ok", "torchvision", "not installed, and not needed")
    tried = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        return Finding("ok", "torchvision", f"{metadata.version('torchvision')} works with this PyTorch")
    reason = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
    return Finding(
        "bad", "torchvision",
        f"cannot be imported ({reason}) and breaks diffusers, transformers and peft: pip uninstall torchvision, or "
        f"install the build for PyTorch {torch.__version__}",
    )  # fmt: skip


def devices() -> Iterator[Finding]:
    """Every device with the precision that "auto" would choose there."""
    found = [("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")]
    found += [(f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(("mps", platform.processor()))
    for name, text in found:
        seconds = probe(torch.device(name))
        chosen = "bf16" if seconds["bf16"] * 1.3 < seconds["fp32"] else "fp32"
        measured = ", ".join(f"{kind} {1e3 * value:.3g} ms" for kind, value in seconds.items())
        yield Finding("ok", name, f"{text}; a small matrix product takes {measured}: precision auto is {chosen}")


def assets(folder: Path) -> Iterator[Finding]:
    """The bundled files against the checksums of their cards."""
    for name, expected in sorted(checksums(folder).items()):
        path = folder / name
        if not path.is_file():
            yield Finding("bad", name, "is missing: install fewstep again")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            yield Finding("bad", name, "is damaged (its SHA-256 is not its card's): install fewstep again")
        else:
            yield Finding("ok", name, f"intact, {path.stat().st_size / 1e6:.2f} MB")


def checksums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, from the cards: ``data.json`` for the data, one card beside each classifier and in the
    configuration of each model."""
    found: dict[str, str] = {}
    data = folder / "data.json"
    if data.is_file():
        found |= {
            name: card["sha256"]
            for name, card in read_json(data, Map(".*", "a file", {"sha256": str, ...: Any})).items()
        }
    for path in folder.glob("classifier-*.json"):
        found[path.with_suffix(".safetensors").name] = read_json(path, {"sha256": str, ...: Any})["sha256"]
    for path in folder.glob("models/*/config.json"):
        found[f"models/{path.parent.name}/model.safetensors"] = read_json(path, {"sha256": str, ...: Any})["sha256"]
    return found
