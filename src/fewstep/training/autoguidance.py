"""Choosing how to autoguide, after training: the weight, the averages of both models and how little the guide trained.

Autoguidance (Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself") is at its best
when main model and guide are averaged over different lengths and the guide has trained for a fraction.  None of this
needs training again: runs with two power-function averages keep snapshots, and any width at any of their moments is
made from them (:mod:`fewstep.training.snapshots`).  A run can be its own guide, as it was earlier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from fewstep.denoisers import Denoiser
from fewstep.guidance import Autoguided
from fewstep.hub.models import load
from fewstep.models import model_of
from fewstep.training import snapshots
from fewstep.training.snapshots import reconstruct_model


@dataclass(frozen=True)
class Choice:
    """What to guide with.

    ``scale`` is w of ``D_guide + w (D_main - D_guide)``; ``main_width`` and ``guide_width`` are relative widths of the
    averages (``sigma_rel`` of :class:`~fewstep.training.profiles.Power`); the guide's ends after ``guide_updates``
    updates of its run, the main model's at the end of its own.
    """

    scale: float
    main_width: float
    guide_width: float
    guide_updates: int


@dataclass(frozen=True)
class Trial:
    """A choice and what it scored; lower is better."""

    choice: Choice
    score: float


def moments(run: Path) -> list[int]:
    """The numbers of updates at which a run folder holds snapshots, in order."""
    return sorted({updates for updates, _, _ in snapshots.read(run)})


def autoguided(main: Path, guide: Path, choice: Choice) -> Autoguided:
    """The autoguided model of a choice, from the run folders of main model and guide (which may be the same)."""
    good = reconstruct_model(denoiser_of(main), main, choice.main_width)
    bad = reconstruct_model(denoiser_of(guide), guide, choice.guide_width, choice.guide_updates)
    return Autoguided(good, bad, choice.scale)


def search(
    main: Path,
    guide: Path,
    score: Callable[[Denoiser], float],
    *,
    scales: Sequence[float],
    main_widths: Sequence[float],
    guide_widths: Sequence[float],
    guide_moments: Sequence[int] | None = None,
    progress: Callable[[int, int, Trial], None] | None = None,
) -> list[Trial]:
    """Score every combination, best first: the first trial is the winner, the list the table.

    ``score(denoiser)`` samples and measures, the same noise every time, and gives a number to make small; one that is
    not finite ranks last.  ``guide_moments`` are some of :func:`moments` (default: the last).  A weight of 1 is the
    main model alone and is scored with the first guide only.  ``progress(done, total, trial)`` hears of every trial.

    ValueError for an empty list, a width that no average has, a moment without a snapshot, and models that do not fit
    each other; FileNotFoundError for a run without snapshots.
    """
    for name, values in (("scales", scales), ("main_widths", main_widths), ("guide_widths", guide_widths)):
        if not values:
            raise ValueError(f"{name} is empty: give at least one value to try")
    stored = moments(guide)
    chosen = stored[-1:] if guide_moments is None else list(guide_moments)
    if not chosen or not set(chosen) <= set(stored):
        raise ValueError(f"guide_moments={chosen}: {guide} has snapshots after {', '.join(map(str, stored))} updates")
    good, bad = denoiser_of(main), denoiser_of(guide)
    guides = list(product(chosen, guide_widths))
    plans = {pair: [w for w in scales if w != 1 or pair == guides[0]] for pair in guides}
    total = len(main_widths) * sum(len(plan) for plan in plans.values())
    trials: list[Trial] = []
    for (updates, guide_width), plan in plans.items():
        reconstruct_model(bad, guide, guide_width, updates)
        for main_width in main_widths if plan else ():
            reconstruct_model(good, main, main_width)  # again for every guide: memory holds two models, not all
            for scale in plan:
                choice = Choice(scale, main_width, guide_width, updates)
                trials.append(Trial(choice, float(score(Autoguided(good, bad, scale)))))
                if progress is not None:
                    progress(len(trials), total, trials[-1])
    return sorted(trials, key=lambda trial: trial.score if math.isfinite(trial.score) else math.inf)


def denoiser_of(run: Path) -> Denoiser:
    """The model of a run folder, to put averages into; ValueError for a student."""
    model = model_of(load(run))
    try:
        return model.denoiser()
    except ValueError as error:
        raise ValueError(f"{run}: {error}; name a run of 'fewstep train'") from None
