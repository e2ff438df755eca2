"""Learned sampler plans as small files: M or 2 M numbers, and the model that they belong to.

A plan is worth nothing on another model: the file holds a fingerprint of the chain, the length and the weights, and is
refused elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from fewstep.discrete.denoisers import DiscreteDenoiser
from fewstep.discrete.learned import LearnedSampler
from fewstep.discrete.samplers import Plan
from fewstep.files import write_atomically
from fewstep.hub.statistics import digest
from fewstep.models.students import STEPS
from fewstep.schemas import Map, fields_of, read_json

FORMAT = 1
KIND = "discrete sampler plans"
CONTENT = {
    "format": Literal[1], "kind": Literal["discrete sampler plans"], "stepper": str,
    "plans": Map(*STEPS, fields_of(Plan)), "fingerprint": {"chain": str, "length": str, "weights": str},
}  # fmt: skip


def fingerprint(denoiser: DiscreteDenoiser) -> dict[str, str]:
    """What a plan was learned for: the chain, the shape of a sample and the weights (SHA-256)."""
    weights = digest(tensor for _, tensor in sorted(denoiser.state_dict().items()))
    return {"chain": repr(denoiser.chain), "length": str(denoiser.shape[0]), "weights": weights}


def save_plans(sampler: LearnedSampler, path: str | Path) -> Path:
    """Write the plans of a sampler, without its network."""
    plans = {str(k): {"times": plan.times, "phi": plan.phi} for k, plan in sampler.plans.items()}
    content = {
        "format": FORMAT, "kind": KIND, "stepper": sampler.stepper, "plans": plans,
        "fingerprint": fingerprint(sampler.denoiser),
    }  # fmt: skip
    path = Path(path)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def load_plans(path: str | Path, denoiser: DiscreteDenoiser) -> LearnedSampler:
    """The sampler in a file, on its denoiser.

    Raises FileNotFoundError when there is no file, ValueError when it is damaged or belongs to another model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of sampler plans")
    content = read_json(path, CONTENT)
    try:
        for name, found in fingerprint(denoiser).items():
            recorded = content["fingerprint"][name]
            if recorded != found:
                raise ValueError(f"learned for another model: {name} {recorded[:60]}, this one has {found[:60]}")
        plans = {int(steps): Plan(**plan) for steps, plan in content["plans"].items()}
        return LearnedSampler(denoiser, plans, content["stepper"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
