"""On what a comparison was made: versions and machine, for the foot of the page."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import torch

import fewstep


def versions() -> dict[str, str]:
    """Name -> version of what the numbers depend on."""
    return {
        "fewstep": fewstep.__version__,
        "PyTorch": torch.__version__,
        "NumPy": np.__version__,
        "Python": platform.python_version(),
    }


def machine(device: torch.device | str = "cpu") -> dict[str, str]:
    """What the seconds depend on: processor, threads, accelerator, system."""
    device = torch.device(device)
    told = {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "PyTorch threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.release()}",
    }
    if device.type == "cuda":
        told["accelerator"] = torch.cuda.get_device_name(device)
    return told


def processor() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
