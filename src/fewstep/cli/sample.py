"""Pictures from a model, as a PNG grid, or the text of a language model.

  fewstep sample digits --solver unipc --steps 5          a teacher, with any solver
  fewstep sample runs/dmd2-digits --n 100                 a student, in the steps it was made for
  fewstep sample digits --class 3,5 --guidance 2
  fewstep sample runs/guided --extra w=3                  an input of the student ('fewstep systems MODEL' lists them)
  fewstep sample digits --solver dpmpp-2m-sde:eta=0.5 --grid karras:rho=5
  fewstep sample digits --settings digits-8calls.json     what 'fewstep tune-steps' found
  fewstep sample digits --statistics digits.safetensors --steps 6      DPM-Solver-v3
  fewstep sample runs/main --guide runs/small --guidance 2 --interval 0.2,5
  fewstep sample my-pipeline --prompt "a red boat"        a diffusers folder with text encoders
  fewstep sample my-pipeline --size 512x768 --prompt "a red boat" --guidance 3.5
  fewstep sample kandinsky --cond embeddings.safetensors  what else a network takes: image_embeds, concat, ...
  fewstep sample runs/target --prompt "to be or" --draft runs/draft      speculative decoding
  fewstep sample --list                                   the names of solvers and time grids

An --out that ends in .npz keeps the numbers, of samples that are not pictures too.
"""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.cli import texts
from fewstep.cli.conditions import conditions, seeds, takes_guidance
from fewstep.cli.errors import UserError
from fewstep.cli.inputs import add_extra, extras_of, with_guidance
from fewstep.cli.outputs import output_file

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.cli.models import Named

#: Flags on how to sample, which not every kind of model has a use for.
OPTIONS = (
    "solver", "grid", "guidance", "threshold", "settings", "guide", "interval", "statistics", "denoise", "one_path"
)  # fmt: skip
#: How many where nobody says.
PICTURES = 40
#: A preview of wider pictures would not fit a terminal.
PREVIEW_SIDE = 32


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    parser.usage = "fewstep sample MODEL [flags]"
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a bundled model, a model or run folder, a pipeline")
    parser.add_argument("--steps", metavar="N", type=int, help="default 10; of a student the fewest it has a plan for")
    parser.add_argument("--solver", metavar="NAME", help="of a teacher (default abm), NAME:parameter=value,...")
    parser.add_argument("--grid", metavar="NAME", help="a teacher's time grid (default: balanced)")
    parser.add_argument("--threshold", metavar="KIND", help="static or dynamic, of a pixel teacher's predictions")
    parser.add_argument("--denoise", action="store_true", help="one more call at the end (denoise to zero)")
    parser.add_argument("--one-path", action="store_true", help="stochastic solvers: one noise path for any --steps")
    parser.add_argument("--statistics", metavar="FILE", type=Path, help="sample with DPM-Solver-v3 and its statistics")
    parser.add_argument("--settings", metavar="FILE", type=Path, help="solver, grid, steps as tune-steps found them")
    parser.add_argument("--n", metavar="N", type=int, help="how many (default 40; of texts 1)")
    parser.add_argument("--class", metavar="K,..", dest="labels", help="class numbers, cycled (default: all classes)")
    parser.add_argument(
        "--guidance",
        metavar="X",
        type=float,
        help="guidance of a teacher, 1 for none; LCM and Flux take it as an input, and so do students with an input "
        "that is declared to be the guidance weight",
    )
    add_extra(parser, "a student")
    parser.add_argument("--guide", metavar="MODEL", help="guide away from this worse version of it (autoguidance)")
    parser.add_argument("--interval", metavar="LOW,HIGH", help="guide at these noise levels sigma / alpha only")
    parser.add_argument("--prompt", metavar="TEXT", help="for a pipeline with text encoders; what a text begins with")
    parser.add_argument(
        "--cond", metavar="FILE", type=Path,
        help="a pipeline's conditions by name (docs/hub.md), safetensors of 1 or N rows; negative_... to guide away",
    )  # fmt: skip
    parser.add_argument(
        "--size", metavar="HEIGHTxWIDTH", type=size_of, help="of a pipeline's pictures, in pixels (default: its own)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="default 0")
    parser.add_argument("--seeds", metavar="N,..", help="one a sample, in the place of --n and --seed")
    parser.add_argument("--device", metavar="DEVICE", default="cpu", help="default cpu")
    parser.add_argument("--out", metavar="FILE", type=Path, help=".png or .npz (default: the model's name and .png)")
    parser.add_argument("--columns", metavar="N", type=int, default=10, help="of the grid (default 10)")
    parser.add_argument("--preview", action=argparse.BooleanOptionalAction, help="small pictures in the terminal")
    texts.add_arguments(parser)
    parser.add_argument("--list", action="store_true", help="print the solvers and grids and stop")


def size_of(word: str) -> tuple[int, int]:
    """``512x768`` as height and width."""
    height, cross, width = word.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"'{word}' is not HEIGHTxWIDTH in pixels, such as 512x768")
    return int(height), int(width)


def run(chosen: argparse.Namespace) -> None:
    if chosen.list:
        print_names()
        return
    if chosen.model is None:
        raise UserError("MODEL is missing: a bundled model (digits), a model or run folder, a pipeline's folder")
    made_from = seeds(chosen)
    if made_from is not None:
        chosen.n = len(made_from)
    for flag in ("n", "columns"):
        if getattr(chosen, flag) is not None and getattr(chosen, flag) < 1:
            raise UserError(f"--{flag} {getattr(chosen, flag)} must be at least 1")
    from fewstep.cli.models import named_model

    found = named_model(chosen.model, chosen.size)
    is_text = found.kind.task == "language"
    if chosen.n is None:
        chosen.n = 1 if is_text else PICTURES
    if is_text:
        texts.run(found, chosen, OPTIONS)
        return
    texts.refuse_for_samples(found, chosen)
    out = samples_file(chosen.out or Path(f"{found.stem}.png"), found.model)
    x, what = draw(found, chosen)
    write(out, x, chosen.columns)
    preview(x, chosen)
    print(f"{what}\n{out}")


def print_names() -> None:
    from fewstep.grids import GRIDS
    from fewstep.sampling.named import ALL_SOLVERS

    for title, names in (("solvers: ", ALL_SOLVERS), ("grids:   ", GRIDS)):
        print(textwrap.fill(", ".join(sorted(names)), 80, initial_indent=title, subsequent_indent=" " * len(title),
                            break_on_hyphens=False))  # fmt: skip


def samples_file(out: Path, model: Any) -> Path:
    """Where the samples go, checked before they are made."""
    reason = no_pictures(model)
    if out.suffix == ".png" and reason is not None:
        raise UserError(f"{reason}: give --out FILE.npz")
    return output_file("--out", out, png="a grid of pictures", npz="numbers")


def no_pictures(model: Any) -> str | None:
    """Why what the model makes cannot be shown; None when it can."""
    from fewstep.hub.autoencoders import picture_channels
    from fewstep.hub.models import adapter_of
    from fewstep.report.pictures import is_picture

    net = adapter_of(model)
    if net is None or not net.latent:
        return None if is_picture(tuple(model.shape)) else f"samples of shape {list(model.shape)} are not pictures"
    if net.origin is None:
        return "the samples are latents, and the pipeline with their autoencoder is not where it was"
    channels = picture_channels(net.origin.pipe)
    return None if channels in (1, 3) else f"pictures of {channels} channels cannot be shown"


def draw(found: Named, chosen: argparse.Namespace) -> tuple[Tensor, str]:
    """The samples, and one line on what they cost."""
    from fewstep.cli.runs import device_of
    from fewstep.cli.solving import by_solver
    from fewstep.hub.models import adapter_of, pictures

    model = found.model.to(device_of(chosen.device))
    refuse_options(found, chosen)
    start = time.perf_counter()
    x, steps, calls = (by_solver if "solver" in found.kind.options else by_plan)(found, chosen)
    net = adapter_of(model)
    if net is not None and net.origin is not None:
        x = pictures(model, x)
    x = (x.float() if x.is_floating_point() else x).cpu()  # the copy waits for the device
    seconds = time.perf_counter() - start
    if not bool(x.isfinite().all()):
        raise UserError(f"'{chosen.model}' made samples that are not finite: its weights are damaged or have diverged")
    cost = f"{steps} step{'s' * (steps > 1)}, {calls} network call{'s' * (calls > 1)} each"
    return x, f"{len(x)} samples: {cost}, {seconds:.2f} s, {1000 * seconds / len(x):.1f} ms a sample"


def refuse_options(found: Named, chosen: argparse.Namespace) -> None:
    """:class:`UserError` for a flag that this kind of model has no use for."""
    from fewstep.extras import listed

    for flag in OPTIONS:
        if getattr(chosen, flag) in (None, False) or flag in found.kind.options:
            continue
        if flag == "guidance" and takes_guidance(found.model):
            continue
        word = flag.replace("_", "-")
        inputs = f"; --extra sets its inputs: {listed(found.kind.inputs)}" if found.kind.inputs else ""
        raise UserError(
            f"--{word} is for teachers: '{chosen.model}' is {found.kind.called} and samples in its own way{inputs}"
        )


def by_plan(found: Named, chosen: argparse.Namespace) -> tuple[Tensor, int, int]:
    """Samples, steps and network calls of a model that samples in its own way."""
    kind = found.kind
    try:
        kind.check_steps(chosen.steps)
    except ValueError as error:
        raise UserError(f"--steps {error}") from None
    options = {name: getattr(chosen, name) for name in kind.options if getattr(chosen, name) is not None}
    extras = with_guidance(kind, extras_of(kind, chosen.model, chosen.extra), chosen.guidance)
    cond = conditions(chosen, found.model)[0]
    x = kind.sample(chosen.n, cond, steps=chosen.steps, seed=chosen.seed, seeds=seeds(chosen), **options, **extras)
    steps = kind.usual_steps if chosen.steps is None else chosen.steps
    return x, steps, kind.calls(chosen.steps, **options)


def write(out: Path, x: Tensor, columns: int) -> None:
    """A PNG grid, or the numbers."""
    import numpy as np

    from fewstep.files import write_atomically
    from fewstep.report.pictures import sheet

    if out.suffix == ".png":
        write_atomically(out, sheet(x, min(columns, len(x)), side=56))
        return
    buffer = io.BytesIO()
    np.savez_compressed(buffer, samples=x.numpy())
    write_atomically(out, buffer.getvalue())


def preview(x: Tensor, chosen: argparse.Namespace) -> None:
    """A few small pictures as half blocks, two pixels a character."""
    wanted = sys.stdout.isatty() if chosen.preview is None else chosen.preview
    if not wanted or x.ndim != 4 or x.shape[1] not in (1, 3) or x.shape[3] > PREVIEW_SIDE:
        return
    from fewstep.cli.terminal import console

    terminal = console()
    from rich.text import Text

    shown = x[: max(1, min(chosen.columns, terminal.width // (x.shape[3] + 1)))]
    levels = ((shown.clamp(-1, 1) + 1) * 127.5).round().int().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).tolist()
    for row in range(0, x.shape[2], 2):
        line = Text()
        for picture in levels:
            upper, lower = picture[row], picture[min(row + 1, x.shape[2] - 1)]
            for (r, g, b), (s, h, c) in zip(upper, lower, strict=True):
                line.append("▀", style=f"rgb({r},{g},{b}) on rgb({s},{h},{c})")
            line.append(" ")
        terminal.print(line)
