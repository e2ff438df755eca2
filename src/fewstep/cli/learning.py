"""``fewstep tune-steps --learn``: fit the times and coefficients of the solver that the search found."""

from __future__ import annotations

import argparse
import io
import math
import time
from typing import TYPE_CHECKING

from fewstep.cli.errors import UserError

if TYPE_CHECKING:
    from fewstep.denoisers import Denoiser
    from fewstep.sampling.learned import LearnedSolver
    from fewstep.sampling.learning import Iterate
    from fewstep.sampling.search import Reference, Setting, Trial
    from fewstep.schedules import Schedule

ITERATIONS = 8


def check(chosen: argparse.Namespace) -> None:
    """:class:`UserError` for what cannot be learned."""
    from fewstep.sampling.learning import MOST_CALLS

    if not 0 < chosen.learn < float("inf"):
        raise UserError(f"--learn {chosen.learn:g}: minutes, more than 0")
    if chosen.calls > MOST_CALLS:
        raise UserError(f"--calls {chosen.calls}: --learn takes at most {MOST_CALLS}")


def affordable(calls: int, seconds_a_call: float, reference_calls: int, minutes: float) -> int:
    """From how many starting points to learn, 32 to 256: as many as references and five iterations take the time of."""
    from fewstep.sampling.learning import derivative_calls

    few, full = 2 / 4, 3  # iterations on a quarter of the points, and on all
    points = (
        60 * minutes / seconds_a_call / (1.5 * reference_calls + (few + full) * derivative_calls(calls) + 5 * 5 * calls)
    )
    return max(32, min(256, 2 ** int(math.log2(max(points, 1)))))


def start_from(trials: list[Trial], model: Denoiser, target: Reference) -> tuple[Setting, LearnedSolver]:
    """The best setting that is a solver of one call a level, and its solver written out."""
    from fewstep.sampling import Levels, folded
    from fewstep.sampling.learning import Task
    from fewstep.sampling.sample import laid_out

    for setting in (trial.setting for trial in trials):
        seen = Task.of(model, target, setting.threshold).denoiser
        try:
            solver, times = laid_out(seen, setting.solver, setting.steps, setting.grid)
            return setting, folded(solver.table(Levels.of(model.schedule, times)))
        except ValueError:
            continue
    raise UserError("--learn: none of these solvers calls the network once a level; add one to --solvers (abm)")


def learn(
    model: Denoiser, start: tuple[Setting, LearnedSolver], train: Reference, held_out: Reference, minutes: float
) -> tuple[list[Iterate], bool]:
    """The iterates, and whether Ctrl-C ended them: what was found by then is as good as any."""
    from fewstep.cli.terminal import progress
    from fewstep.sampling.learning import learning

    found: list[Iterate] = []
    setting, solver = start
    began = time.monotonic()
    with progress(f"learning {setting.calls} calls") as show:

        def tell(share: float) -> None:
            now = f"held-out error {min(it.held_out for it in found):.4f}, at first {found[0].held_out:.4f}"
            show((len(found) - 1 + share) / ITERATIONS, now)

        try:
            for it in learning(model, solver, train, held_out, setting.threshold, ITERATIONS, progress=tell):
                found.append(it)
                spent = time.monotonic() - began
                if spent * (len(found) + 1) / len(found) > 60 * minutes:
                    break
        except KeyboardInterrupt:
            if not found:
                raise
            return found, True
    return found, False


def print_errors(model: Denoiser, fresh: Reference, best: Setting, start: Setting, solver: LearnedSolver) -> None:
    """The best hand-made setting and the learned solver, on noise that neither was chosen on."""
    from fewstep.sampling.search import measured

    learned = {"solver": solver, "threshold": start.threshold}
    for name, options in ((str(best), best.options()), ("learned", learned)):
        error, spread = measured(model, options, fresh)
        print(f"on fresh noise: {error:.4f} +- {spread:.4f}  {name}")


def figure(iterates: list[Iterate], schedule: Schedule, title: str) -> bytes:
    """The errors over the iterations, and the noise levels of the calls before and after."""
    import torch
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 3.2), layout="constrained")
    errors, grids = fig.subplots(1, 2)
    errors.plot([it.train for it in iterates], "o-", ms=3, label="learned from")
    errors.plot([it.held_out for it in iterates], "o-", ms=3, label="held out")
    errors.axhline(iterates[0].held_out, color="grey", lw=1, ls="--", label="where it started, held out")
    errors.set(xlabel="iteration", ylabel="distance from the reference", yscale="log", ylim=(None, None))
    errors.legend(fontsize=8)
    best = min(iterates, key=lambda it: it.held_out)
    for height, solver in ((1, iterates[0].solver), (0, best.solver)):
        levels = schedule.ratio(torch.tensor(solver.times, dtype=torch.float64))
        grids.plot(levels.tolist(), [height] * len(levels), "o")
    grids.set(xlabel="noise level of the calls, sigma / alpha", xscale="log", ylim=(-0.6, 1.6))
    grids.set_yticks([1, 0], ["hand-made", "learned"])
    grids.invert_xaxis()
    fig.suptitle(title)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
