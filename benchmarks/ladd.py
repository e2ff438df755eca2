"""What heads can tell at which noise level: a picture for the page of LADD.

    python benchmarks/ladd.py --picture docs/img/ladd.png

No training: laws on the line, noised on flow matching, and the distance in total variation of the noised laws, which is
1 minus the best hinge loss at that level.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

GRID = np.linspace(-12.0, 12.0, 24001)


def density(t: float, means: Sequence[float], deviation: float) -> np.ndarray:
    """The law of ``(1 - t) x + t eps`` on the grid, ``x`` in equal parts around the means."""
    spread = math.hypot((1 - t) * deviation, t)
    parts = [np.exp(-0.5 * ((GRID - (1 - t) * m) / spread) ** 2) / (spread * math.sqrt(2 * math.pi)) for m in means]
    return sum(parts) / len(means)


def variation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).sum() / 2 * (GRID[1] - GRID[0]))


def logit_normal(t: np.ndarray, mean: float, deviation: float) -> np.ndarray:
    logit = np.log(t / (1 - t))
    return np.exp(-0.5 * ((logit - mean) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi) * t * (1 - t))


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    comb = [-1.4, -1.0, -0.6, -0.2, 0.2, 0.6, 1.0, 1.4]
    data = (comb, 0.06)
    wrong = {
        "one half of the data missing": ([m for m in comb if m > 0], 0.06),
        "all samples shifted by a tenth": ([m + 0.1 for m in comb], 0.06),
        "the fine structure missing": (list(np.linspace(-1.6, 1.6, 65)), 0.06),
    }
    times = np.linspace(0.005, 0.995, 199)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.2, 4.6), sharex=True, height_ratios=(2, 1))
    for name, law in wrong.items():
        top.plot(times, [variation(density(t, *data), density(t, *law)) for t in times], label=name)
    top.set_ylabel("what the best heads can tell")
    top.set_ylim(0, 1)
    top.legend(frameon=False, fontsize=8)
    for mean in (-1.0, 0.0, 1.0):
        bottom.plot(times, logit_normal(times, mean, 1.0), label=f"m = {mean:g}", color=str(0.75 - 0.35 * (mean + 1)))
    bottom.set_ylabel("law of the level")
    bottom.set_xlabel("noise level at which heads look (flow matching)")
    bottom.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    held = io.BytesIO()
    figure.savefig(held, dpi=110)
    Image.open(held).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=Path("docs/img/ladd.png"))
    draw(parser.parse_args().picture)
