"""Learned sampler plans as small files: M or 2 M numbers, and the model that they belong to.

A plan is worth nothing on another model: the file holds a fingerprint of the chain, the length and the weights, and is
refused elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewstep.discrete.denoisers import DiscreteDenoiser
from fewstep.discrete.learned import LearnedSampler
from fewstep.discrete.samplers import Plan
from fewstep.hub.native import write_atomically
from fewstep.hub.statistics import digest

FORMAT = 1
KIND = "discrete sampler plans"


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
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict) or content.get("kind") != KIND or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a file of {KIND} of format {FORMAT}")
    try:
        recorded = content["fingerprint"]
        for name, found in fingerprint(denoiser).items():
            if recorded[name] != found:
                raise ValueError(f"learned for another model: {name} {recorded[name][:60]}, this one has {found[:60]}")
        plans = {int(k): Plan(tuple(p["times"]), tuple(p["phi"])) for k, p in content["plans"].items()}
        return LearnedSampler(denoiser, plans, content["stepper"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: a field is missing or of the wrong type ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
