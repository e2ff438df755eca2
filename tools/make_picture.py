"""Draw models beside each other from the same noise, for the pages of the documentation.

    python tools/make_picture.py docs/img/fashion.png "teacher, 16 network calls=fashion@16" \\
        "teacher, 1 call=fashion@1" "DMD2 student, 1 call=fashion-1step@1"

Every row is ``TITLE=MODEL@STEPS``: a bundled name, a model folder or a run folder.
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

from fewstep import api
from fewstep.report.comparison import timed_samples
from fewstep.report.pictures import sheet

COLUMNS, LINES = 10, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("rows", nargs="+", help="TITLE=MODEL@STEPS")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    figure, panels = plt.subplots(len(chosen.rows), 1, figsize=(6, 1.45 * len(chosen.rows)), squeeze=False)
    for panel, row in zip(panels[:, 0], chosen.rows, strict=True):
        title, _, source = row.partition("=")
        name, _, steps = source.rpartition("@")
        x = timed_samples(api.load(name), int(steps), COLUMNS * LINES, chosen.seed, "unipc", 100)[0]
        panel.imshow(plt.imread(BytesIO(sheet(x, COLUMNS))), cmap="gray")
        panel.set_title(title, loc="left", fontsize=9, pad=3)
        panel.axis("off")
    figure.tight_layout(pad=0.3, h_pad=0.6)
    figure.savefig(chosen.out, dpi=100)
    Image.open(chosen.out).convert("L").save(chosen.out, optimize=True)  # about half the size


if __name__ == "__main__":
    main()
