"""Data sets: bundled ones and whatever lies on disk already."""

from fewstep.data.captions import Captioned
from fewstep.data.dataset import Dataset, Draw, Prior, Rows, Samples, epoch_indices
from fewstep.data.sources import held_out, load, load_samples
from fewstep.data.streamed import Streamed

__all__ = [
    "Captioned", "Dataset", "Draw", "Prior", "Rows", "Samples", "Streamed", "epoch_indices", "held_out", "load",
    "load_samples",
]  # fmt: skip
