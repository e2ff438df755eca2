"""The best solver, time grid and thresholding for a budget of network calls: a first win, without training.

  fewstep tune-steps digits --calls 8                     on 32 starting points of the model's own
  fewstep tune-steps digits --calls 8 --learn             then learn times and coefficients, at most 3 minutes
  fewstep tune-steps my-pipeline --calls 10 --guidance 7.5 --prompt "a red boat"
  fewstep sample digits --settings digits-8calls.json     with what was found

Every setting starts from the same points as a reference of many steps, and the one whose samples end nearest to it
wins.  --learn starts from it and fits times and coefficients to further points, as many as the minutes allow; held-out
points choose between the iterates, and both solvers are measured on fresh noise.  Writes JSON and a figure, --learn a
second one.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.cli.errors import UserError
from fewstep.cli.outputs import output_file

if TYPE_CHECKING:
    from fewstep.denoisers import Denoiser
    from fewstep.sampling.search import Reference, Setting, Trial

SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    parser.usage = "fewstep tune-steps MODEL --calls N [flags]"
    parser.add_argument("model", metavar="MODEL", help="a bundled teacher, a teacher's folder, a pipeline")
    parser.add_argument("--calls", metavar="N", type=int, default=8, help="network calls a sample (default 8)")
    parser.add_argument("--guidance", metavar="X", type=float, help="classifier-free guidance (doubles the calls)")
    parser.add_argument("--threshold", action="store_true", help="try static and dynamic thresholding too (pixels)")
    parser.add_argument("--class", metavar="K,..", dest="labels", help="class numbers, cycled (default: all classes)")
    parser.add_argument("--prompt", metavar="TEXT", help="for a pipeline with text encoders")
    parser.add_argument(
        "--learn", metavar="MINUTES", type=float, nargs="?", const=3.0, help="learn the solver (default 3)"
    )
    parser.add_argument("--n", metavar="N", type=int, default=32, help="starting points (default 32)")
    parser.add_argument(
        "--reference", metavar="N", type=int, help="calls of the reference (default 80, or 10 times --calls)"
    )
    parser.add_argument("--solvers", metavar="NAME", nargs="+", help="search these only")
    parser.add_argument("--grids", metavar="NAME", nargs="+", help="search these only")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="default 0")
    parser.add_argument("--device", metavar="DEVICE", default="cpu", help="default cpu")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default MODEL-Ncalls.json; the figure lies beside it")


def run(chosen: argparse.Namespace) -> None:
    from fewstep.cli import learning
    from fewstep.cli.models import named_model
    from fewstep.cli.runs import device_of
    from fewstep.cli.terminal import progress
    from fewstep.files import write_atomically
    from fewstep.hub.settings import save_settings
    from fewstep.sampling import search

    for flag, least in (("calls", 1), ("n", 2), ("reference", 20)):
        if getattr(chosen, flag) is not None and getattr(chosen, flag) < least:
            raise UserError(f"--{flag} {getattr(chosen, flag)} must be at least {least}")
    found = named_model(chosen.model)
    denoiser = found.denoiser("solvers are tuned for teachers")
    out = output_file("--out", chosen.out or Path(f"{found.stem}-{chosen.calls}calls.json"), json="")
    if chosen.learn is not None:
        learning.check(chosen)
    model = denoiser.to(device_of(chosen.device))
    settings = searched(chosen, model.schedule)
    began = time.monotonic()
    target = reference(chosen, model, chosen.n, chosen.seed)
    seconds_a_call = (time.monotonic() - began) / (chosen.n * reference_calls(chosen))
    with progress(f"{len(settings)} settings") as show:
        best_few = search.shortlist(model, settings, target, progress=lambda done, total: show(0.7 * done / total, ""))
        trials = search.tune(model, best_few, target, lambda done, total: show(0.7 + 0.3 * done / total, ""))
    usual, spread = search.measured(model, {"steps": chosen.calls}, target)
    best = trials[0]
    about = described(chosen, best, usual)
    files = [out, out.with_suffix(".png")]
    title = f"{found.stem}, {chosen.calls} calls"
    save_settings(out, best.setting, chosen.guidance, about)
    write_atomically(files[1], figure(trials, usual, title))
    for trial in trials[:SHOWN]:
        print(f"{trial.error:.4f} +- {trial.spread:.4f}  {trial.setting}")
    print(f"the default: {usual:.4f} +- {spread:.4f}")
    if chosen.learn is not None:
        setting, solver = learning.start_from(trials, model, target)
        points = learning.affordable(setting.calls, seconds_a_call, reference_calls(chosen), chosen.learn)
        train = reference(chosen, model, points, chosen.seed + 1)
        held_out = reference(chosen, model, points // 2, chosen.seed + 2)
        iterates, stopped = learning.learn(model, (setting, solver), train, held_out, chosen.learn)
        learned = min(iterates, key=lambda it: it.held_out)
        about |= {"learned_from": points, "held_out_error": learned.held_out, "shape": list(model.shape)}
        save_settings(out, setting, chosen.guidance, about, learned.solver)
        files.append(out.with_name(f"{out.stem}-learned.png"))
        write_atomically(files[-1], learning.figure(iterates, model.schedule, title))
        if stopped:
            print(f"stopped after {len(iterates) - 1} iterations; the best so far is kept")
        else:
            fresh = reference(chosen, model, max(chosen.n, points // 2), chosen.seed + 3)
            learning.print_errors(model, fresh, best.setting, setting, learned.solver)
    print(f"{', '.join(map(str, files))}\nfewstep sample {chosen.model} --settings {out}")


def reference_calls(chosen: argparse.Namespace) -> int:
    """Ten times as many as are tuned, and 80 at least."""
    return int(chosen.reference) if chosen.reference is not None else max(80, 10 * chosen.calls)


def reference(chosen: argparse.Namespace, model: Denoiser, n: int, seed: int) -> Reference:
    """``n`` starting points of a seed and where they end."""
    from fewstep.cli.conditions import conditions
    from fewstep.sampling import search

    asked = argparse.Namespace(**{**vars(chosen), "n": n, "cond": None, "guide": None})
    cond, _ = conditions(asked, model)
    return search.reference(model, search.noise_for(model, n, seed), cond, chosen.guidance, reference_calls(chosen))


def searched(chosen: argparse.Namespace, schedule: Any) -> list[Setting]:
    """The settings to try; :class:`UserError` for a name that is not known, or when none fits the budget."""
    from fewstep.sampling import search
    from fewstep.sampling.named import named_grid, named_solver

    for name in chosen.solvers or ():
        named_solver(name)
    for name in chosen.grids or ():
        named_grid(name)
    settings = search.candidates(
        chosen.calls, schedule, (None, "static", "dynamic") if chosen.threshold else (None,),
        chosen.solvers or search.SEARCHED_SOLVERS, chosen.grids or search.SEARCHED_GRIDS,
    )  # fmt: skip
    if not settings:
        raise UserError(f"--calls {chosen.calls}: none of the solvers fits into so few calls on these grids")
    return settings


def described(chosen: argparse.Namespace, best: Trial, usual: float) -> dict[str, Any]:
    """Where a setting came from and how good it is, for its file."""
    return {
        "error": best.error,
        "spread": best.spread,
        "error_of_the_default": usual,
        "model": chosen.model,
        "starting_points": chosen.n,
        "reference_calls": reference_calls(chosen),
        "seed": chosen.seed,
    }


def figure(trials: list[Trial], usual: float, title: str) -> bytes:
    """Every setting as a point: a row for each solver, the error on a logarithmic axis; the winner marked."""
    import math

    from matplotlib.figure import Figure

    solvers = list(dict.fromkeys(trial.setting.solver for trial in trials))
    fig = Figure(figsize=(8, 1 + 0.28 * len(solvers)), layout="constrained")
    axis = fig.subplots()
    finite = [trial for trial in trials if math.isfinite(trial.error)]
    heights = [-solvers.index(trial.setting.solver) for trial in finite]
    axis.scatter([trial.error for trial in finite], heights, s=14, alpha=0.5, label="a grid each")
    axis.scatter([trials[0].error], [-solvers.index(trials[0].setting.solver)], s=60, marker="*", color="C3",
                 label=str(trials[0].setting))  # fmt: skip
    axis.axvline(usual, color="grey", lw=1, ls="--", label="the default")
    axis.set_xscale("log")
    axis.set_yticks([-i for i in range(len(solvers))], solvers, fontsize=8)
    axis.set_xlabel("distance from the reference")
    axis.set_title(title)
    axis.legend(fontsize=8)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
