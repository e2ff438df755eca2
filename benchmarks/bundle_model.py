"""Measure a trained model and put it among those that ship with the package.

    python benchmarks/bundle_model.py runs/digits digits --data digits --command "fewstep train digits ..."
    python benchmarks/bundle_model.py runs/cm-fashion fashion-1step --data fashion --teacher fashion --command "..."

The card that it writes says what made the model, its quality beside the real-against-real floor, its memorisation and
the checksum of its weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fewstep import api
from fewstep.denoisers import Denoiser
from fewstep.hub import native
from fewstep.report import compare_models
from fewstep.sampling.rollout import Student

LICENCE = "weights: that of fewstep (Apache-2.0); trained on data under the licence named in data.json"


def figures(model: Student | Denoiser, teacher: Denoiser, data: str, n: int) -> list[dict[str, object]]:
    """One row per number of steps and features: distances with their floors, accuracy and memorisation."""
    rows: list[dict[str, object]] = []
    students, steps = ({"model": model}, ()) if isinstance(model, Student) else ({}, (1, 2, 4, 8, 16))
    for name in dict.fromkeys((data, "pixels")):
        for row in compare_models(teacher, students, data, n, 0, teacher_steps=steps, features=name).rows:
            q = row.quality
            rows.append({
                "features": name, "steps": row.steps, "calls": row.calls,
                "frechet": round(q.frechet.value, 3), "error": round(q.frechet.error, 3),
                "floor": round(q.floor.value, 3),
                "accuracy": None if q.accuracy is None else round(q.accuracy, 3),
                "memorisation_ratio": round(q.memorisation.ratio, 3), "n": q.n,
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--data", required=True, choices=("digits", "fashion"))
    parser.add_argument("--teacher", help="of a student: the bundled model it was distilled from")
    parser.add_argument("--command", required=True, help="the command that made it")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--about", default="")
    arguments = parser.parse_args()
    model = api.load(arguments.run)
    teacher = api.load(arguments.teacher) if arguments.teacher else model
    quality = figures(model, teacher, arguments.data, arguments.n)
    folder = api.BUNDLED / arguments.name
    card = {
        "about": arguments.about, "command": arguments.command, "data": arguments.data,
        "parameters": sum(p.numel() for p in model.parameters()), "quality": quality, "licence": LICENCE,
    }  # fmt: skip
    if arguments.teacher:
        card["teacher"] = arguments.teacher
    native.save(model, folder, card)
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
