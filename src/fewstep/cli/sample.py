"""Pictures from a model, as a PNG grid.

  fewstep sample digits --solver unipc --steps 5          a teacher, with any solver
  fewstep sample runs/dmd2-digits --n 100                 a student, in the steps it was made for
  fewstep sample digits --class 3,5 --guidance 2
  fewstep sample digits --solver dpmpp-2m-sde:eta=0.5 --grid karras:rho=5
  fewstep sample digits --settings digits-8calls.json     what 'fewstep tune-steps' found
  fewstep sample digits --statistics digits.safetensors --steps 6      DPM-Solver-v3
  fewstep sample runs/main --guide runs/small --guidance 2 --interval 0.2,5
  fewstep sample my-pipeline --prompt "a red boat"        a diffusers folder with text encoders
  fewstep sample my-pipeline --size 512x768 --prompt "a red boat" --guidance 3.5
  fewstep sample kandinsky --cond embeddings.safetensors  what else a network takes: image_embeds, concat, ...
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

from fewstep.cli.errors import UserError, choose

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.cli.models import Named
    from fewstep.denoisers import CountCalls, Denoiser
    from fewstep.hub.adapters import Adapter
    from fewstep.sampling import Solver, Student

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
    parser.add_argument("--n", metavar="N", type=int, default=40, help="how many (default 40)")
    parser.add_argument("--class", metavar="K,..", dest="labels", help="class numbers, cycled (default: all classes)")
    parser.add_argument(
        "--guidance",
        metavar="X",
        type=float,
        help="guidance of a teacher, 1 for none; LCM and Flux take it as an input",
    )
    parser.add_argument("--guide", metavar="MODEL", help="guide away from this worse version of it (autoguidance)")
    parser.add_argument("--interval", metavar="LOW,HIGH", help="guide at these noise levels sigma / alpha only")
    parser.add_argument("--prompt", metavar="TEXT", help="for a pipeline with text encoders")
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
        if getattr(chosen, flag) < 1:
            raise UserError(f"--{flag} {getattr(chosen, flag)} must be at least 1")
    from fewstep.cli.models import named_model

    found = named_model(chosen.model, chosen.size)
    out = output_file(chosen.out or Path(f"{found.stem}.png"), found.model)
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


def output_file(out: Path, model: Student | Denoiser) -> Path:
    """Where the samples go, checked before they are made."""
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: the name must end in .png (a grid of pictures) or .npz (numbers)")
    reason = no_pictures(model)
    if out.suffix == ".png" and reason is not None:
        raise UserError(f"{reason}: give --out FILE.npz")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: the folder {out.parent} does not exist")
    return out


def no_pictures(model: Student | Denoiser) -> str | None:
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
    from fewstep.hub.models import adapter_of, pictures
    from fewstep.sampling import Student

    model = found.model.to(device_of(chosen.device))
    start = time.perf_counter()
    if isinstance(model, Student):
        x, steps, calls = from_student(model, chosen)
    else:
        x, steps, calls = from_teacher(model, chosen)
    net = adapter_of(model)
    if net is not None and net.origin is not None:
        x = pictures(model, x)
    x = x.float().cpu()  # the copy waits for the device
    seconds = time.perf_counter() - start
    if not bool(x.isfinite().all()):
        raise UserError(f"'{chosen.model}' made samples that are not finite: its weights are damaged or have diverged")
    cost = f"{steps} step{'s' * (steps > 1)}, {calls} network call{'s' * (calls > 1)} each"
    return x, f"{len(x)} samples: {cost}, {seconds:.2f} s, {1000 * seconds / len(x):.1f} ms a sample"


def from_student(student: Student, chosen: argparse.Namespace) -> tuple[Tensor, int, int]:
    """Samples, steps and network calls of a student's own plan."""
    taken = ("guidance",) if takes_guidance(student) else ()
    for flag in ("solver", "grid", "guidance", "threshold", "settings", "guide", "interval", "statistics"):
        if getattr(chosen, flag) is not None and flag not in taken:
            raise UserError(f"--{flag} is for teachers: '{chosen.model}' is a student and samples in its own way")
    steps = chosen.steps if chosen.steps is not None else next(iter(student.plans))
    if steps not in student.plans:
        raise UserError(f"--steps {steps}: this student has plans for {', '.join(map(str, student.plans))} steps")
    x = student.sample(chosen.n, conditions(chosen, student)[0], steps=steps, seed=chosen.seed, seeds=seeds(chosen))
    return x, steps, len(student.plans[steps].times)


def from_teacher(model: Denoiser, chosen: argparse.Namespace) -> tuple[Tensor, int, int]:
    """Samples, steps and network calls of a solver."""
    from fewstep.denoisers import CountCalls
    from fewstep.grids import GRIDS
    from fewstep.sampling import sample
    from fewstep.sampling.named import ALL_SOLVERS

    if chosen.settings is not None:
        take_settings(chosen)
    grid = chosen.grid
    if chosen.statistics is None:
        solver: str | Solver = chosen.solver or "abm"
        if isinstance(solver, str):
            choose("solver", solver.partition(":")[0], sorted(ALL_SOLVERS))
    else:
        solver = with_statistics(model, chosen)
    if grid is not None:
        choose("grid", grid.partition(":")[0], sorted(GRIDS))
    counted = CountCalls(model)
    cond, negative = conditions(chosen, model)
    steered, guides = guided(counted, negative, chosen)
    steps: list[int] = []
    x = sample(
        steered, chosen.n, solver=solver, steps=chosen.steps, grid=grid, cond=cond, seed=chosen.seed,
        seeds=seeds(chosen), threshold=chosen.threshold, denoise=chosen.denoise, one_path=chosen.one_path,
        progress=lambda done, total: steps.append(done),
    )  # fmt: skip
    return x, len(steps), counted.calls + sum(guide.calls for guide in guides)


def with_statistics(model: Denoiser, chosen: argparse.Namespace) -> Solver:
    """DPM-Solver-v3 with the statistics of ``--statistics``, which must be those of this model under this guidance."""
    from fewstep.denoisers import Guided
    from fewstep.hub import model_statistics
    from fewstep.sampling.solvers.dpm_solver_v3 import DPMSolverV3

    if chosen.solver is not None:
        raise UserError("--statistics FILE samples with DPM-Solver-v3: leave out --solver")
    if chosen.guide is not None or chosen.interval is not None:
        raise UserError("--statistics FILE knows no --guide and no --interval")
    seen = model if chosen.guidance is None else Guided(model, chosen.guidance)
    return DPMSolverV3(model_statistics.load(chosen.statistics, seen))


def guided(model: CountCalls, negative: Any, chosen: argparse.Namespace) -> tuple[Denoiser, list[CountCalls]]:
    """The model under ``--guidance`` (away from ``negative``), ``--guide`` and ``--interval``, and the guides, whose
    calls count too."""
    from fewstep.cli.models import named_model
    from fewstep.cli.runs import device_of
    from fewstep.denoisers import Autoguided, CountCalls, Guidance, GuidanceInterval, Guided
    from fewstep.sampling import Student

    if chosen.guidance is None:
        for flag in ("guide", "interval"):
            if getattr(chosen, flag) is not None:
                raise UserError(f"--{flag} needs --guidance X, the weight")
        return model, []
    steered: Guidance
    guides = []
    if chosen.guide is not None:
        weak = named_model(chosen.guide, chosen.size).model
        if isinstance(weak, Student):
            raise UserError(f"--guide {chosen.guide}: a student cannot guide, name a worse teacher")
        guides.append(CountCalls(weak.to(device_of(chosen.device))))
        steered = Autoguided(model, guides[0], chosen.guidance)
    elif takes_guidance(model):
        if chosen.interval is not None:
            raise UserError(f"--interval: '{chosen.model}' takes its guidance as an input, at every noise level")
        return model, []  # it is in the condition
    else:
        if chosen.prompt is None and chosen.cond is None and not model.classes:
            raise UserError(f"--guidance {chosen.guidance:g}: '{chosen.model}' has no classes to guide to")
        steered = Guided(model, chosen.guidance, negative)
    if chosen.interval is None:
        return steered, guides
    low, comma, high = chosen.interval.partition(",")
    try:
        bounds = float(low), float(high)
    except ValueError:
        comma = ""
    if not comma:
        raise UserError(f"--interval {chosen.interval}: give two noise levels, such as 0.2,5 or 0.2,inf")
    return GuidanceInterval(steered, *bounds), guides


def take_settings(chosen: argparse.Namespace) -> None:
    """Fill in what ``fewstep tune-steps`` found; :class:`UserError` beside flags that say the same, or a wrong file."""
    from fewstep.hub.settings import load_settings
    from fewstep.sampling import LearnedSolver

    for flag in ("solver", "grid", "steps", "threshold"):
        if getattr(chosen, flag) is not None:
            raise UserError(f"--{flag} stands in {chosen.settings} already: leave out one of the two")
    found = load_settings(chosen.settings)
    for flag in ("solver", "grid", "steps", "threshold"):
        setattr(chosen, flag, found[flag])
    if chosen.guidance is None:
        chosen.guidance = found["guidance"]
    elif isinstance(chosen.solver, LearnedSolver) and chosen.guidance != found["guidance"]:
        taught = "no guidance" if found["guidance"] is None else f"guidance {found['guidance']:g}"
        raise UserError(f"--guidance {chosen.guidance:g}: the solver in {chosen.settings} was learned at {taught}")


def takes_guidance(model: Student | Denoiser) -> bool:
    """Whether the model's network takes the guidance scale as an input."""
    from fewstep.hub.models import adapter_of

    net = adapter_of(model)
    return net is not None and net.takes_guidance


def seeds(chosen: argparse.Namespace) -> list[int] | None:
    """``--seeds``, one a sample; None when it was not given."""
    if chosen.seeds is None:
        return None
    try:
        return [int(word) for word in chosen.seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds {chosen.seeds}: give one whole number a sample, such as 3,5,7") from None


def condition(chosen: argparse.Namespace, model: Student | Denoiser) -> Any:
    """What to make: an embedded ``--prompt``, or labels, or None for whatever comes."""
    from fewstep.hub.models import adapter_of

    return labels(chosen, model.classes) if chosen.prompt is None else prompted(chosen, adapter_of(model))


def conditions(chosen: argparse.Namespace, model: Student | Denoiser) -> tuple[Any, Any]:
    """What to make, and what ``--guidance`` leads away from: ``--prompt``, ``--cond`` and a guidance scale that the
    network takes as dicts of tensors, else labels, or None for whatever comes."""
    import torch

    from fewstep.cli.runs import device_of
    from fewstep.hub.models import adapter_of

    net = adapter_of(model)
    scale = chosen.guidance if takes_guidance(model) and chosen.guide is None else None
    if net is None or (chosen.prompt is None and chosen.cond is None and scale is None):
        if chosen.cond is not None:
            raise UserError(f"--cond: '{chosen.model}' is not a pipeline, it takes class numbers at most")
        return condition(chosen, model), None
    null = net.empty(chosen.n) or {}
    if model.classes:
        null = {"class_labels": torch.full((chosen.n,), -1)}
    given, negative = from_file(chosen)
    asked = labels(chosen, model.classes)
    if asked is not None:
        given["class_labels"] = asked
    cond = {**null, **({} if chosen.prompt is None else prompted(chosen, net)), **given}
    if scale is not None:
        cond["guidance_scale"] = torch.full((chosen.n,), scale)
    away = {**cond, **null, **negative}
    if chosen.guidance is not None and scale is None and not null and not negative:
        raise UserError(
            f"--guidance: '{chosen.model}' has no empty prompt; put negative_{next(iter(given))} into --cond"
        )
    device = device_of(chosen.device)
    cond, away = ({name: value.to(device) for name, value in part.items()} for part in (cond, away))
    return cond, away


def prompted(chosen: argparse.Namespace, net: Adapter | None) -> dict[str, Tensor]:
    """``--prompt``, embedded once for every sample."""
    import torch

    from fewstep.hub.adapters import TextAdapter

    if not isinstance(net, TextAdapter) or not net.reads_prompts:
        raise UserError(f"--prompt: '{chosen.model}' has no text encoder to read it")
    with torch.no_grad():
        return net.embed([chosen.prompt] * chosen.n)


def from_file(chosen: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``--cond``: the conditions in the file, and the negative ones, one row a sample."""
    from fewstep.files import load_tensors

    given: dict[str, Tensor] = {}
    negative: dict[str, Tensor] = {}
    if chosen.cond is None:
        return given, negative
    for name, value in load_tensors(chosen.cond).items():
        if value.ndim == 0 or len(value) not in (1, chosen.n):
            raise UserError(
                f"--cond {chosen.cond}: {name} has the shape {list(value.shape)}, for --n {chosen.n} samples"
            )
        part = negative if name.startswith("negative_") else given
        part[name.removeprefix("negative_")] = value.expand(chosen.n, *value.shape[1:])
    return given, negative


def labels(chosen: argparse.Namespace, classes: int | None) -> Tensor | None:
    """``--class`` as labels ``[n]``, cycled; None when it was not given."""
    import torch

    if chosen.labels is None:
        return None
    if not classes:
        raise UserError(f"--class {chosen.labels}: '{chosen.model}' is unconditional, it has no classes")
    try:
        asked = [int(word) for word in chosen.labels.split(",")]
    except ValueError:
        raise UserError(f"--class {chosen.labels}: give class numbers such as 3 or 0,1,2") from None
    for label in asked:
        if not 0 <= label < classes:
            raise UserError(f"--class {label}: '{chosen.model}' has the classes 0 to {classes - 1}")
    return torch.tensor(asked).repeat(-(-chosen.n // len(asked)))[: chosen.n]


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
