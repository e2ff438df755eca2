"""Samples a second and memory of training data: in memory, and read from a folder of pictures as training goes.

    python benchmarks/streaming.py [PICTURES [SIDE]]

Writes PNG pictures (5000 of 64x64 by default) into a temporary folder, reads one epoch after the other in batches of
64 for some seconds in each way, and prints one line for each: samples/s, and by how much the training process grew.
"""

from __future__ import annotations

import itertools
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.data import load, load_samples
from fewstep.data.dataset import Samples
from fewstep.training.feed import Feed

BATCH, SECONDS = 64, 5.0


def write(folder: Path, count: int, side: int) -> None:
    """Pictures with something in them, so that they are decoded at a usual speed."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    for i, pixels in enumerate(coarse):
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:06}.png")


def speed(data: Samples) -> float:
    """Samples a second of a feed, its first batch apart."""
    feed = Feed({"data": data}, BATCH, 0, range(1), 1)
    next(feed.read(0))
    start = time.perf_counter()
    for step in itertools.count(1):
        next(feed.read(step))
        if (spent := time.perf_counter() - start) > SECONDS:
            feed.close()
            return step * BATCH / spent
    raise AssertionError


def line(name: str, folder: Path, workers: int | None) -> None:
    """Measured in a process of its own, whose memory nobody else has used."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = load(folder) if workers is None else load_samples(folder, memory=0, workers=workers)
    rate = speed(data)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{name:22} {rate:10,.0f} samples/s   {grown:8.0f} MiB more", flush=True)


def main() -> None:
    given = [int(word) for word in sys.argv[1:]]
    count, side = [*given, *(5000, 64)[len(given) :]]
    with tempfile.TemporaryDirectory() as place:
        write(Path(place), count, side)
        print(
            f"{count} pictures of {side}x{side}, {count * side * side * 3 / 2**20:.0f} MiB decoded, batches of {BATCH}"
        )
        context = multiprocessing.get_context("spawn")
        for name, workers in (("in memory", None), ("streamed, 0 workers", 0), ("streamed, 2 workers", 2)):
            process = context.Process(target=line, args=(name, Path(place), workers))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
