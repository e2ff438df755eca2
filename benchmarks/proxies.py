"""How well scores of untrained students tell which is best after distillation: Kendall's tau of every proxy against the
bundled table of 27 students (``benchmarks/make_student_table.py``), and how far draws of a score agree.

    python benchmarks/proxies.py [--draws 16] [--picture docs/img/diswot.png] [--scores FILE]

A minute of one core.  ``--scores`` keeps what was computed in a file and takes it from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.bundled import read_bundled
from fewstep.files import load_tensors, save_tensors
from fewstep.randomness import Rng
from fewstep.students.proxies import ALONE, BESIDE, Scorer, kendall_tau, rank_sum, split_half_tau, z_sum
from fewstep.students.table import StudentTable, student_table

NAMES = (*BESIDE, *ALONE)


def scored(table: StudentTable, draws: int, seed: int = 0) -> Tensor:
    """``[draws, students, proxies]``, on batches of 64 of the digits that the students learn from."""
    data, rng = read_bundled("digits", "train"), Rng(seed, "proxies")
    assert data.labels is not None
    batches = []
    for d in range(draws):
        index = rng.stream(f"batch {d}").shuffled(table.about["learned"])[:64]
        batches.append((data.read(index), data.labels[index]))
    scorer = Scorer(table.teacher, batches, NAMES, rng.stream("weights"))
    return torch.stack([scorer(table.build(tuple(depths))) for depths in table.depths.tolist()], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--scores", type=Path)
    chosen = parser.parse_args()
    table = student_table()
    if chosen.scores is not None and chosen.scores.is_file():
        scores = load_tensors(chosen.scores)["scores"]
    else:
        scores = scored(table, chosen.draws)
        if chosen.scores is not None:
            save_tensors(chosen.scores, {"scores": scores})
    distilled, vanilla = table.distilled.mean(1), table.vanilla.mean(1)
    print(f"two seeds of distillation: tau {kendall_tau(*table.distilled.T):.2f}")
    print(f"two seeds from labels:     tau {kendall_tau(*table.vanilla.T):.2f}")
    print(f"labels and distillation:   tau {kendall_tau(vanilla, distilled):.2f}")
    best = [table.depths[int(a.argmax())].tolist() for a in (vanilla, distilled)]
    print(f"best from labels {best[0]} {float(vanilla.max()):.4f}, distilled {best[1]} {float(distilled.max()):.4f}")
    print(f"random student distilled {float(distilled.mean()):.4f}\n")
    print("| score | halves agree | tau, one draw | tau, distilled | tau, from labels | its choice, distilled |")
    print("|---|---:|---:|---:|---:|---:|")
    means = scores.mean(0).T
    rows = {name: means[k] for k, name in enumerate(NAMES)}
    pair = torch.stack([rows["relation"], rows["semantic"]])
    rows |= {
        "relation + semantic, as they are": pair.sum(0), "relation + semantic, ranks": rank_sum(pair),
        "relation + semantic, spreads": z_sum(pair), "blocks in all": table.depths.sum(1).double(),
    }  # fmt: skip
    for name, total in rows.items():
        halves = single = ""
        if name in NAMES:
            each = scores[:, :, NAMES.index(name)]
            single = f"{sum(kendall_tau(one, distilled) for one in each) / len(each):+.2f}"
            halves = f"{split_half_tau(each, Rng(0)):.2f}"
        taus = f"{kendall_tau(total, distilled):+.2f} | {kendall_tau(total, vanilla):+.2f}"
        print(f"| {name} | {halves} | {single} | {taus} | {float(distilled[total.argmax()]):.4f} |")
    if chosen.picture is not None:
        draw(chosen.picture, table, rows)


def draw(path: Path, table: StudentTable, rows: dict[str, Tensor]) -> None:
    """The distilled accuracy of every student against its parameters, and against the two scores together."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 3.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    distilled, vanilla = 100 * table.distilled.mean(1), 100 * table.vanilla.mean(1)
    shown = (
        ("from labels alone, %", vanilla), ("parameters", table.parameters.double()),
        ("relation + semantic, untrained", rows["relation + semantic, spreads"]),
    )  # fmt: skip
    for ax, (name, x) in zip(axes, shown, strict=True):
        dots = ax.scatter(x, distilled, c=table.depths.sum(1), cmap="viridis", s=26)
        ax.set_xlabel(name)
        ax.set_title(f"tau = {kendall_tau(x, distilled):+.2f}", fontsize=10)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("distilled, % right")
    figure.colorbar(dots, ax=axes, label="blocks")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
