"""Empirical model statistics of a teacher, which the solver DPM-Solver-v3 needs: made once, from data.

  fewstep statistics digits                            writes digits-statistics.safetensors
  fewstep statistics digits --guidance 2               for guided samples: one file for each guidance scale
  fewstep statistics my-model --data none              from samples of the model itself
  fewstep sample digits --statistics digits-statistics.safetensors --steps 6

The file says which weights, noise schedule, range and guidance scale it is for, and is refused for others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.cli.errors import UserError
from fewstep.cli.outputs import output_file

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.cli.models import Named
    from fewstep.denoisers import Denoiser

#: ``--data`` for samples of the model itself, and how they are made.
NO_DATA = "none"
OWN_STEPS = 50


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    parser.usage = "fewstep statistics MODEL [flags]"
    parser.add_argument("model", metavar="MODEL", help="a bundled model, a model or run folder, a pipeline")
    parser.add_argument("--data", metavar="DATA", help="default: what it was made from; 'none' for its own samples")
    parser.add_argument("--guidance", metavar="X", type=float, help="of the samples to be made, 1 for none")
    parser.add_argument(
        "--grid", metavar="N", type=int, default=120, help="intervals between noise levels (default 120)"
    )
    parser.add_argument("--samples", metavar="N", type=int, default=1024, help="data samples (default 1024)")
    parser.add_argument("--batch", metavar="N", type=int, default=256, help="samples at a time (default 256)")
    parser.add_argument(
        "--finite-difference", action="store_true", help="for networks that have no forward-mode derivative"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="default 0")
    parser.add_argument("--device", metavar="DEVICE", default="cpu", help="default cpu")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: MODEL-statistics.safetensors")


def run(chosen: argparse.Namespace) -> None:
    for flag in ("samples", "batch"):
        if getattr(chosen, flag) < 1:
            raise UserError(f"--{flag} {getattr(chosen, flag)} must be at least 1")
    if chosen.grid < 2:
        raise UserError(f"--grid {chosen.grid} must be at least 2")
    from fewstep.cli.models import named_model
    from fewstep.cli.runs import device_of
    from fewstep.cli.terminal import progress
    from fewstep.guidance import Guided
    from fewstep.hub.model_statistics import save
    from fewstep.randomness import Rng
    from fewstep.sampling.solvers.dpm_solver_v3 import statistics_grid
    from fewstep.sampling.solvers.model_statistics import by_differences, estimate
    from fewstep.tangents import tangent

    found = named_model(chosen.model)
    plain = found.denoiser("statistics are of teachers")
    if chosen.guidance is not None and not found.model.classes:
        raise UserError(f"--guidance {chosen.guidance:g}: '{chosen.model}' has no classes to guide to")
    out = output_file("--out", chosen.out or Path(f"{found.stem}-statistics.safetensors"), safetensors="")
    device = device_of(chosen.device)
    plain = plain.to(device)
    model = plain if chosen.guidance is None else Guided(plain, chosen.guidance)
    start = time.perf_counter()
    with progress("statistics") as show:
        x0, cond = clean_samples(found, model, chosen, show)
        try:
            made = estimate(
                model, x0.to(device), Rng(chosen.seed, "statistics", device=device),
                cond=None if cond is None else cond.to(device),
                log_snr=statistics_grid(model.schedule, chosen.grid), batch=chosen.batch,
                derivative=by_differences if chosen.finite_difference else tangent,
                progress=lambda done, of: show(done / of, ""),
            )  # fmt: skip
        except NotImplementedError as error:
            raise UserError(
                f"'{chosen.model}' has no forward-mode derivative; add --finite-difference ({error})"
            ) from None
    save(out, made, model, len(x0))
    seconds = time.perf_counter() - start
    print(f"statistics at {chosen.grid + 1} noise levels from {len(x0)} samples, {seconds:.0f} s\n{out}")


def clean_samples(
    found: Named, model: Denoiser, chosen: argparse.Namespace, show: Callable[[float, str], None]
) -> tuple[Tensor, Tensor | None]:
    """Samples of the data, or of the model itself, with their labels (None for an unconditional model)."""
    from fewstep.cli.models import named_data

    if chosen.data == NO_DATA:
        return own_samples(model, chosen, show)
    if chosen.data is None and found.data is None:
        raise UserError(
            f"--data is missing, and '{chosen.model}' does not say what it was made from; 'none' takes its own samples"
        )
    from fewstep.data.dataset import labels_of
    from fewstep.randomness import Rng

    source, data = named_data(chosen.data, found)
    if data.shape != tuple(model.shape):
        raise UserError(f"'{chosen.model}' makes samples {list(model.shape)}, data '{source}' has {list(data.shape)}")
    if model.classes and (data.classes is None or data.classes > model.classes):
        has = "no labels" if data.classes is None else f"{data.classes} classes"
        raise UserError(f"'{chosen.model}' has {model.classes} classes, data '{source}' has {has}")
    rows = Rng(chosen.seed, "samples").shuffled(len(data)).repeat(-(-chosen.samples // len(data)))[: chosen.samples]
    read = data.rows(rows)
    if read.x is None:
        raise UserError(f"data '{source}' has no samples to measure")
    return read.x, labels_of(read.cond) if model.classes else None


def own_samples(
    model: Denoiser, chosen: argparse.Namespace, show: Callable[[float, str], None]
) -> tuple[Tensor, Tensor | None]:
    """Samples of the model in many steps, its classes in turn."""
    import torch

    from fewstep.randomness import Rng
    from fewstep.sampling import sample

    rng = Rng(chosen.seed, "samples", device=chosen.device)
    labels = torch.arange(chosen.samples) % model.classes if model.classes else None
    parts = []
    for start in range(0, chosen.samples, chosen.batch):
        show(0.0, f"sample {start} of {chosen.samples}")
        n = min(chosen.batch, chosen.samples - start)
        cond = None if labels is None else labels[start : start + n]
        parts.append(sample(model, n, steps=OWN_STEPS, cond=cond, noise=rng.normal(n, *model.shape)))
    return torch.cat(parts), labels
