"""CV-DD on the bundled digits: random real pictures, one network, a committee with equal votes and one with priors,
each under hard labels, soft labels, and batch-specific soft labels.

    python benchmarks/cv_dd.py --seed 0 --out runs/cv-dd
    python benchmarks/cv_dd.py --table runs/cv-dd
    python benchmarks/cv_dd.py --parts --seed 0 --out runs/cv-dd-parts
    python benchmarks/cv_dd.py --picture docs/img/cv-dd.png --out runs/cv-dd

For every seed the pool is trained for ``SQUEEZE`` steps, pictures are recovered for ``RECOVER``, and a fresh network of
another kind than any of the pool (a ConvNet with instance normalisation) is trained for as many steps on each set of
pictures.  Soft labels are the votes of the whole pool with running statistics, batch-specific ones those with the
statistics of halves of 16 views; both on the same views.  Priors are distilled: what each member makes alone, judged.

``--parts`` is of what the official code has and the protocol that is common here has not: pictures that start as
patches, a learning rate that ends at a half, and a weight decay of matrices alone; with equal votes and batch-specific
labels.
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
#: A rate that ends at a half is 1.64 times as great in the mean, which a whole cosine can be too.
PARTS: dict[str, dict[str, Any]] = {
    "common": {}, "1.64 times the rate": {"soft_lr": 1.64e-3}, "half the rate": {"soft_decay": "stretched-cosine:2"},
    "matrices": {"soft_decayed": "matrices"},
    "both": {"soft_decay": "stretched-cosine:2", "soft_decayed": "matrices"},
}  # fmt: skip


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


def parts(seed: int, folder: Path) -> None:
    """Random real pictures, what is recovered from them, and from patches, each trained on in all ways of ``PARTS``."""
    train, test = load_data("digits"), load_data("digits", "test")
    lines: list[dict[str, Any]] = []
    recipe = recipe_of("committee, equal votes")
    settings = Settings(Budget(steps_of(recipe)), batch=64, seed=seed, precision="fp32")
    relabel = Relabelling(EPOCHS, 16, EQUAL)
    for initial, named in (("real", "random real"), ("patches", "patches")):
        start = fresh_classifier("convnet", train, seed)
        result = run_recipe(replace(recipe, initial=initial), start, train, settings, show=False)
        made: Any = result.model
        pool = Pool(result.made["pool"].members, made.notes["priors"].tolist())
        x = {f"recovered from {named}": made.x}
        if initial == "real":
            x = {named: train.x[made.notes["begun"]], **x}
        for name, pictures in x.items():
            stored = Replay(pictures, made.labels, relabel(pictures, pool))
            plain = Condensed(pictures, made.labels)
            candidate = Candidate(name, plain.dataset(name), plain.bytes(), stored=stored)
            for kind, fields in PARTS.items():
                protocol = Protocol(networks={"convnet": {}}, seeds=(seed,), steps=TRAIN, **fields)
                (row,) = post_evaluate([candidate], test, protocol, ("stored",))
                lines.append({"row": name, "kind": kind, "accuracy": row.mean})
                print(lines[-1], flush=True)
    (folder / f"{seed}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def table(folder: Path) -> None:
    """Means and standard deviations over the seeds that are there, as Markdown."""
    lines = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    kinds = list(dict.fromkeys(line["kind"] for line in lines))
    print(f"| pictures | {' | '.join(kinds)} |\n|---|{'---:|' * len(kinds)}")
    for name in dict.fromkeys(line["row"] for line in lines):
        cells = []
        for kind in kinds:
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
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    if chosen.table is not None:
        table(chosen.table)
    elif chosen.picture is not None:
        picture(chosen.out, chosen.picture)
    else:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (parts if chosen.parts else measure)(chosen.seed, chosen.out)


if __name__ == "__main__":
    main()
