"""Data sets: bundled ones and whatever lies on disk already."""

from fewstep.data.dataset import Dataset, Prior, Rows, Samples, epoch_indices
from fewstep.data.sources import held_out, load

__all__ = ["Dataset", "Prior", "Rows", "Samples", "epoch_indices", "held_out", "load"]
