"""How well scores of untrained students tell which is best after distillation: Kendall's tau of every proxy against the
bundled table of 27 students (``benchmarks/make_student_table.py``), how far draws of a score agree, and how far the
seeds of the table do.

    python benchmarks/proxies.py [--draws 16] [--picture docs/img/diswot.png] [--scores FILE]

A minute of one core.  Scores that compare channel by channel are held against the students of the teacher's width
alone.  ``--scores`` keeps what was computed in a file and takes it from there.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import torch
from make_student_table import small
from torch import Tensor

from fewstep.data.bundled import read_bundled
from fewstep.files import load_tensors, save_tensors
from fewstep.randomness import Rng
from fewstep.students.diswot import SAME_WIDTH
from fewstep.students.proxies import ALONE, BESIDE, Scorer, kendall_tau, rank_sum, split_half_tau, z_sum
from fewstep.students.table import StudentTable, student_table

NAMES = (*BESIDE, *ALONE)
ANY_WIDTH = tuple(name for name in NAMES if name not in SAME_WIDTH)


def alike(table: StudentTable) -> Tensor:
    """Which students have the teacher's width."""
    return table.widths == table.about["teacher"]["width"]


def reliability(seeds: Tensor) -> str:
    """How far seeds ``[n, seeds]`` agree: the mean of Kendall's tau and of the correlation of two of them; and how well
    the mean of all is known, its correlation with another such mean (Spearman 1910, Brown 1910)."""
    pairs = list(combinations(seeds.T, 2))
    tau = sum(kendall_tau(*pair) for pair in pairs) / len(pairs)
    r = sum(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs) / len(pairs)
    k, known = seeds.shape[1], max(r, 0.0)
    return f"tau {tau:.2f}, correlation {r:.2f}, of the mean of {k} {k * known / (1 + (k - 1) * known):.2f}"


def scored(table: StudentTable, draws: int, seed: int = 0) -> dict[str, Tensor]:
    """``[draws, students]`` by proxy, on batches of 64 of the bundled pictures, made as small as those of the table;
    NaN where widths differ that must not."""
    data, rng = read_bundled("fashion", "train"), Rng(seed, "proxies")
    assert data.labels is not None
    batches = []
    for d in range(draws):
        index = rng.stream(f"batch {d}").shuffled(len(data))[:64]
        batches.append((small(data.read(index)), data.labels[index]))
    found = {name: torch.full((draws, len(table)), torch.nan, dtype=torch.float64) for name in NAMES}
    for names, rows in ((ANY_WIDTH, range(len(table))), (SAME_WIDTH, alike(table).nonzero().flatten().tolist())):
        scorer = Scorer(table.teacher, batches, names, rng.stream("weights"))
        for k in rows:
            for name, column in zip(names, scorer(table.student(k)).mT, strict=True):
                found[name][:, k] = column
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--scores", type=Path)
    chosen = parser.parse_args()
    table = student_table()
    if chosen.scores is not None and chosen.scores.is_file():
        scores = load_tensors(chosen.scores)
    else:
        scores = scored(table, chosen.draws)
        if chosen.scores is not None:
            save_tensors(chosen.scores, scores)
    distilled, vanilla, same = table.distilled.mean(1), table.vanilla.mean(1), alike(table)
    print(f"teacher {table.about['teacher']['accuracy']:.4f}")
    for name, seeds in (("distilled", table.distilled), ("from labels", table.vanilla)):
        print(f"{name}: seeds agree with {reliability(seeds)}; of the teacher's width {reliability(seeds[same])}")
        for width in table.widths.unique().tolist():
            some = seeds.mean(1)[table.widths == width]
            print(f"  width {width}: {float(some.min()):.4f} to {float(some.max()):.4f}, mean {float(some.mean()):.4f}")
    print(f"labels and distillation: tau {kendall_tau(vanilla, distilled):.2f}")
    print(f"distilled better than from labels: {int((distilled > vanilla).sum())} of {len(table)}")
    for name, accuracy in (("from labels", vanilla), ("distilled", distilled)):
        k = int(accuracy.argmax())
        print(f"best {name}: {table.depths[k].tolist()}, width {int(table.widths[k])}, {float(accuracy[k]):.4f}")
    means = {name: each.mean(0) for name, each in scores.items()}
    pair = torch.stack([means["relation"], means["semantic"]])[:, same]
    together = {"as they are": pair.sum(0), "by ranks": rank_sum(pair), "by spreads": z_sum(pair)}
    print("\n| score | halves agree | distilled, one draw | distilled | from labels | its choice |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in ANY_WIDTH:
        print(row(name, scores[name], distilled, vanilla))
    print(row("blocks in all", table.depths.sum(1).double()[None], distilled, vanilla))
    print(f"\nThe {int(same.sum())} students of the teacher's width:\n")
    print("| score | halves agree | distilled, one draw | distilled | from labels | its choice |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in NAMES:
        print(row(name, scores[name][:, same], distilled[same], vanilla[same]))
    for name, total in together.items():
        print(row(f"relation + semantic, {name}", total[None], distilled[same], vanilla[same]))
    if chosen.picture is not None:
        draw(chosen.picture, table, means["relation"])


def row(name: str, each: Tensor, distilled: Tensor, vanilla: Tensor) -> str:
    """A line of the table, of scores ``[draws, n]``."""
    total, halves, single = each.mean(0), "", ""
    if len(each) > 1:
        halves = f"{split_half_tau(each, Rng(0)):.2f}"
        single = f"{sum(kendall_tau(one, distilled) for one in each) / len(each):+.2f}"
    taus = f"{kendall_tau(total, distilled):+.2f} | {kendall_tau(total, vanilla):+.2f}"
    return f"| {name} | {halves} | {single} | {taus} | {float(distilled[total.argmax()]):.3f} |"


def draw(path: Path, table: StudentTable, relation: Tensor) -> None:
    """The distilled accuracy of every student against what it learns from labels, its parameters, and the relation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 3.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    distilled, vanilla = 100 * table.distilled.mean(1), 100 * table.vanilla.mean(1)
    shown = (
        ("from labels alone, %", vanilla), ("parameters", table.parameters.double()), ("relation, untrained", relation),
    )  # fmt: skip
    for ax, (name, x) in zip(axes, shown, strict=True):
        dots = ax.scatter(x, distilled, c=table.widths.double().log2(), cmap="viridis", s=8 * table.depths.sum(1))
        ax.set_xlabel(name)
        ax.set_title(f"tau = {kendall_tau(x, distilled):+.2f}", fontsize=10)
        ax.grid(alpha=0.3)
    axes[1].set_xscale("log")
    axes[1].minorticks_off()
    axes[1].set_xticks([2000, 10_000, 50_000], ["2,000", "10,000", "50,000"])
    axes[0].set_ylabel("distilled, % right")
    bar = figure.colorbar(dots, ax=axes, label="channels", ticks=[1, 2, 3])
    bar.ax.set_yticklabels(["2", "4", "8"])
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
