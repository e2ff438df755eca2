"""The clocks of SANA-Sprint: a picture for its page.

    python benchmarks/sana_sprint.py --picture docs/img/sana-sprint.png

No training: how fast the time that a network is told changes with TrigFlow's angle, and the laws and times of training
and sampling.
"""

from __future__ import annotations

import argparse
import io
import math
from pathlib import Path

import numpy as np

SIGMA_DATA = 0.5


def slope(angle: np.ndarray) -> np.ndarray:
    """The derivative of flow matching's ``t = sin / (sin + cos)`` in the angle."""
    return 1 / (np.sin(angle) + np.cos(angle)) ** 2


def law(angle: np.ndarray, mean: float, deviation: float) -> np.ndarray:
    """The density of the angle where ``log(sigma_data tan angle)`` is normal."""
    level = np.log(SIGMA_DATA * np.tan(angle))
    rate = 1 / (np.sin(angle) * np.cos(angle))
    return np.exp(-0.5 * ((level - mean) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi)) * rate


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    angle = np.linspace(0.002, math.pi / 2 - 0.002, 800)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 4.8), sharex=True)
    for scale, name in ((1000, "told 1000 t"), (1, "told t in [0, 1]")):
        top.semilogy(angle, scale * slope(angle), label=name)
    top.semilogy(angle, np.ones_like(angle), label="told the angle", linestyle="--")
    top.set_ylabel("speed of the time input")
    top.set_ylim(0.2, 5000)
    top.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    half = law(angle, 0.0, 1.6)
    bottom.plot(angle, half, label="sCM's loss")
    bottom.plot(angle, law(angle, -0.6, 1.0), label="heads")
    bottom.plot(angle, 0.5 * half, label="adversary's samples,", linestyle="--", color="tab:red")
    bottom.plot([math.pi / 2] * 2, [0, 1.0], color="tab:red", linewidth=3, label="half of them at pi / 2")
    for k, times in ((1, (math.pi / 2,)), (2, (math.pi / 2, 1.3)), (4, (math.pi / 2, 1.3, 1.1, 0.6))):
        bottom.plot(times, [-0.1 - 0.1 * math.log2(k)] * len(times), "k.", markersize=6)
        bottom.annotate(f"{k} calls" if k > 1 else "1 call", (0.02, -0.14 - 0.1 * math.log2(k)), fontsize=7)
    bottom.set_ylim(-0.4, 1.2)
    bottom.set_ylabel("law of the angle")
    bottom.set_xlabel("angle: data at 0, noise at pi / 2")
    bottom.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    held = io.BytesIO()
    figure.savefig(held, dpi=110)
    Image.open(held).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=Path("docs/img/sana-sprint.png"))
    draw(parser.parse_args().picture)
