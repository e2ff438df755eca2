"""One thread a process: the suite runs a process a core, and sums in PyTorch depend on how many threads share them, so
that what a test computes here and in a process it starts can be compared bit for bit."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when PyTorch is imported, here and in every process a test starts
