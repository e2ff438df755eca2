"""CV-DD on the bundled digits: random real pictures, one network, a committee with equal votes and one with priors,
each under hard labels, soft labels, and batch-specific soft labels.

    python benchmarks/cv_dd.py --seed 0 --out runs/cv-dd
    python benchmarks/cv_dd.py --table runs/cv-dd
    python benchmarks/cv_dd.py --picture docs/img/cv-dd.png --out runs/cv-dd

For every seed the pool is trained for ``SQUEEZE`` steps, pictures are recovered for ``RECOVER``, and a fresh network of
another kind than any of the pool (a ConvNet with instance normalisation) is trained for as many steps on each set of
pictures.  Soft labels are the votes of the whole pool with running statistics, batch-specific ones those with the
statistics of halves of 16 views; both on the same views.  Priors are distilled: what each member makes alone, judged.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.condense.committee import Pool, Priors
from fewstep.condense.cv_dd import CVDD, Relabelling
from fewstep.condense.soft_labels import RandomView, Replay
from fewstep.data import load as load_data
from fewstep.data.condensed import Condensed
from fewstep.data.views import Views
from fewstep.evaluation.classification import Candidate, Labels, Protocol, fresh_classifier, post_evaluate
from fewstep.files import save_tensors
from fewstep.report.pictures import sheet
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

IPC, SQUEEZE, RECOVER, TRAIN, EPOCHS = 5, 200, 200, 400, 100
EQUAL = 1e9
POOL = ("convnet", "resnet", "classifier")
COMMITTEES: dict[str, CVDD] = {
    "one network": CVDD(pool=("resnet",), committee=1),
    "committee, equal votes": CVDD(temperature=EQUAL, label_temperature=EQUAL),
    "committee, priors": CVDD(priors=Priors("distilled")),
}
KINDS = ("hard", "soft", "batch-specific")


def recipe_of(name: str) -> CVDD:
    """The recipe of a row, on digits: pictures of 8x8 are not cropped or mirrored while the pool is trained."""
    return replace(
        COMMITTEES[name], per_class=IPC, views=Views(), label_epochs=EPOCHS, squeeze_share=SQUEEZE,
        recover_share=RECOVER, judge_share=TRAIN,
    )  # fmt: skip


def steps_of(recipe: CVDD) -> int:
    """The budget in which every stage has its steps."""
    return round(sum(stage.share for stage in recipe.stages()))


def measure(seed: int, folder: Path) -> None:
    """All rows of a seed, each as a line of ``<seed>.jsonl``."""
    train, test = load_data("digits"), load_data("digits", "test")
    labels = train.labels
    assert labels is not None
    lines: list[dict[str, Any]] = []
    protocol = Protocol(networks={"convnet": {}}, seeds=(seed,), steps=TRAIN)

    def rows(name: str, x: Tensor, y: Tensor, pool: Pool, temperature: float, notes: dict[str, Any]) -> None:
        for kind in KINDS:
            stored = None
            if kind != "hard":
                relabel = Relabelling(EPOCHS, 16, temperature, "halves" if kind != "soft" else "running", RandomView())
                stored = Replay(x, y, relabel(x, pool))
            made = Condensed(x, y)
            candidate = Candidate(name, made.dataset(name), made.bytes(), stored=stored)
            labelled: Labels = "hard" if kind == "hard" else "stored"
            (row,) = post_evaluate([candidate], test, protocol, (labelled,))
            lines.append({"row": name, "kind": kind, "accuracy": row.mean, **notes})
            print(lines[-1], flush=True)

    for name in COMMITTEES:
        recipe = recipe_of(name)
        start = fresh_classifier("convnet", train, seed)
        settings = Settings(Budget(steps_of(recipe)), batch=64, seed=seed, precision="fp32")
        result = run_recipe(recipe, start, train, settings, show=False)
        made: Any = result.model
        pool = Pool(result.made["pool"].members, made.notes["priors"].tolist())
        notes = {"seconds": result.seconds, "priors": list(pool.priors), "weights": made.notes["weights"].tolist()}
        notes |= {"bytes": made.bytes()}
        if name == "committee, equal votes":
            real = train.x[made.notes["begun"]]
            save_tensors(folder / f"{seed}-random.safetensors", {"x": real})
            rows("random real", real, made.labels, pool, EQUAL, {})
        save_tensors(folder / f"{seed}-{len(lines)}.safetensors", {"x": made.x})
        rows(name, made.x, made.labels, pool, recipe.label_temperature, notes)
    (folder / f"{seed}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def table(folder: Path) -> None:
    """Means and standard deviations over the seeds that are there, as Markdown."""
    lines = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    print(f"| pictures | {' | '.join(KINDS)} |\n|---|{'---:|' * len(KINDS)}")
    for name in dict.fromkeys(line["row"] for line in lines):
        cells = []
        for kind in KINDS:
            found = [line["accuracy"] for line in lines if (line["row"], line["kind"]) == (name, kind)]
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            cells.append(f"{statistics.fmean(found):.3f} ± {spread:.3f}")
        print(f"| {name} | {' | '.join(cells)} |")


def picture(folder: Path, path: Path) -> None:
    """The first pictures of each row of seed 0: three of every class, random real ones above."""
    from fewstep.files import load_tensors

    files = [folder / "0-random.safetensors", *sorted(folder.glob("0-[0-9]*.safetensors"))]
    x = torch.cat([load_tensors(file)["x"][:20] for file in files])
    path.write_bytes(sheet(x.float() / 127.5 - 1, 20, 48))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/cv-dd"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    if chosen.table is not None:
        table(chosen.table)
    elif chosen.picture is not None:
        picture(chosen.out, chosen.picture)
    else:
        chosen.out.mkdir(parents=True, exist_ok=True)
        measure(chosen.seed, chosen.out)


if __name__ == "__main__":
    main()
