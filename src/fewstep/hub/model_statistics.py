"""DPM-Solver-v3's statistics as a file that says which model they are of.

They are right for one model, one schedule and one guidance scale only, and look like any other numbers: a file is
refused for anything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fewstep.denoisers import Denoiser, denoisers_in
from fewstep.hub.statistics import digest, load_statistics, save_statistics
from fewstep.sampling.solvers.dpm_solver_v3 import Statistics
from fewstep.schedules import described

VERSION = 1


def fingerprint(denoiser: Denoiser) -> dict[str, Any]:
    """What the statistics of a denoiser are for: its kind, weights, schedule, sample and guidance scale (1 for none).

    Raises ValueError for a guidance scale that differs between samples.
    """
    scale = torch.as_tensor(1.0 if denoiser.guidance is None else denoiser.guidance, dtype=torch.float64)
    if scale.numel() != 1:
        raise ValueError(f"statistics are of one guidance scale, this model has {scale.numel()}")
    plain = denoiser.unguided
    return {
        "statistics": "dpm-solver-v3",
        "version": VERSION,
        "model": digest(plain.state_dict().values()),
        "kind": [type(part).__name__ for part in denoisers_in(plain)],
        "schedule": described(plain.schedule),
        "shape": list(plain.shape),
        "guidance": float(scale),
    }


def save(path: str | Path, statistics: Statistics, denoiser: Denoiser, samples: int) -> Path:
    """Write the statistics of ``denoiser`` (with its guidance), estimated from so many samples; single precision, far
    below their noise."""
    made = {
        "range": [float(statistics.log_snr[0]), float(statistics.log_snr[-1])],
        "grid": len(statistics.log_snr) - 1,
        "samples": samples,
    }
    tensors = statistics.tensors()
    rounded = {name: tensor if name == "log_snr" else tensor.float() for name, tensor in tensors.items()}
    return save_statistics(path, rounded, fingerprint(denoiser) | made)


def load(path: str | Path, denoiser: Denoiser) -> Statistics:
    """The statistics in a file, for ``denoiser`` (with its guidance).

    Raises ValueError naming the first thing that differs from what they were made for; FileNotFoundError and ValueError
    for a missing, damaged or foreign file.
    """
    tensors = load_statistics(path, fingerprint(denoiser))
    if set(tensors) != {"log_snr", "l", "s", "b"}:
        raise ValueError(f"{path}: holds {', '.join(sorted(tensors))}, not the statistics of DPM-Solver-v3")
    return Statistics(**tensors)
