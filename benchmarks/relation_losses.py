"""DisWOT's two scores as losses beside distillation: students of the bundled table's set-up, four seeds.

    python benchmarks/relation_losses.py

A minute and a half of one core.  3000 is the weight of the relation in the official scripts.
"""

from __future__ import annotations

import statistics

from make_student_table import (
    LR,
    STEPS,
    TEACHER,
    TEACHER_STEPS,
    WIDTH,
    Given,
    accuracy,
    classifier,
    parts,
    settings,
)  # fmt: skip

from fewstep.condense.supervised import STUDENT, Supervised
from fewstep.runs.course import run_recipe

SEEDS = range(4)


def main() -> None:
    taught, learned, held = parts()
    fresh = classifier(WIDTH, TEACHER, 0)
    teacher = run_recipe(Supervised(lr=LR), fresh, taught, settings(TEACHER_STEPS, 0), show=False).model
    print("| blocks | relation | semantic | accuracy |\n|---|---:|---:|---:|")
    for depths in ((1, 1, 1), (2, 2, 2)):
        for relation, semantic in ((0.0, 0.0), (0.0, 1.0), (3000.0, 0.0), (3000.0, 1.0)):
            recipe = Given(lr=LR, relation_weight=relation, semantic_weight=semantic)
            found = []
            for seed in SEEDS:
                given = {STUDENT: classifier(WIDTH, depths, seed)}
                made = run_recipe(recipe, teacher, learned, settings(STEPS, seed), given=given, show=False).model
                found.append(accuracy(made, held))
            told = f"{statistics.fmean(found):.4f} ± {statistics.stdev(found) / len(found) ** 0.5:.4f}"
            print(f"| {'-'.join(map(str, depths))} | {relation:g} | {semantic:g} | {told} |", flush=True)


if __name__ == "__main__":
    main()
