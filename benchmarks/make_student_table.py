"""Make the table of trained students that proxies of architectures are judged by: residual networks of 2, 4 and 8
channels with 1 or 3 blocks in each of three stages, or 2 in all, trained from labels alone and by distillation, several
seeds each.

    python benchmarks/make_student_table.py --fashion-mnist FOLDER [--seeds 2] [--out FILE]

FOLDER holds the four IDX files of Fashion-MNIST; pictures are means of 4x4 pixels.  The teacher learns from the first
50,000, students from the first 6,000, and all are tested on the 10,000 of the test part.  Five minutes of one core; a
call with the same file goes on where one was stopped, or adds seeds.

The loss is DisWOT's (:mod:`fewstep.students.diswot`), in a loop of its own: without views of the pictures the teacher
can tell everything once, and students of one architecture train side by side (:class:`SideBySide`).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from fewstep.classifiers import NetworkClassifier
from fewstep.data import load
from fewstep.divergences import kl
from fewstep.files import write_atomically
from fewstep.models.networks import fresh_network
from fewstep.networks.classifiers import ResNet
from fewstep.randomness import Rng
from fewstep.students.diswot import DisWOT
from fewstep.students.proxies import flops, parameters

SHAPE, CLASSES, WIDTHS = (1, 7, 7), 10, (2, 4, 8)
DEPTHS = (*product((1, 3), repeat=3), (2, 2, 2))
TEACHER, TEACHER_WIDTH = (4, 4, 4), 8
TAUGHT, LEARNED, TEACHER_STEPS, STEPS, BATCH, LR = 50_000, 6_000, 2000, 500, 64, 0.1
#: Networks side by side have so many channels in all.
TOGETHER = 16
METHOD = DisWOT()
OUT = Path(__file__).parent.parent / "src" / "fewstep" / "assets" / "students-fashion.json"
#: The losses ``[n]`` of ``n`` networks with logits ``[n, B, classes]`` on pictures with places ``[n, B]`` in the data.
Losses = Callable[[Tensor, Tensor], Tensor]


def small(pictures: Tensor) -> Tensor:
    """Pictures of 28x28 as means of 4x4 pixels."""
    return avg_pool2d(pictures, 4)


def read(folder: str, split: str) -> tuple[Tensor, Tensor]:
    """All pictures of a part, small, and their labels."""
    data = load(folder, split)  # type: ignore[arg-type]
    assert data.labels is not None
    return small(data.read(slice(None))), data.labels


def classifier(width: int, depths: tuple[int, ...], seed: int) -> NetworkClassifier:
    """A residual network with first weights from a seed."""
    config = {
        "name": "resnet", "shape": list(SHAPE), "classes": CLASSES, "width": width, "depths": list(depths),
        "norm": "batch",
    }  # fmt: skip
    return NetworkClassifier(fresh_network(config, seed), SHAPE, CLASSES)


class SideBySide(nn.Module):
    """``n`` networks as one of ``n`` times the channels, whose weights between two of them are 0: a convolution of 4
    channels takes the time of one of 16.  Logits ``[n, B, classes]`` of pictures ``[n, B, 1, H, W]``.

    ``own`` are pairs of a convolution's weights and a mask of those that are not 0, by which gradients are multiplied.
    """

    def __init__(self, width: int, depths: tuple[int, ...], seeds: Sequence[int]) -> None:
        super().__init__()
        nets: list[Any] = [classifier(width, depths, seed).net for seed in seeds]
        self.wide = ResNet((len(nets), *SHAPE[1:]), CLASSES, len(nets) * width, depths)
        self.wide.head = nn.Identity()  # type: ignore[assignment]
        self.own: list[tuple[nn.Parameter, Tensor]] = []
        for wide, *each in zip(self.wide.modules(), *(net.modules() for net in nets), strict=True):
            self.join(wide, each)
        self.weight = nn.Parameter(torch.stack([net.head.weight.detach() for net in nets]))
        self.bias = nn.Parameter(torch.stack([net.head.bias.detach() for net in nets])[:, None])

    @torch.no_grad()
    def join(self, wide: Any, each: Sequence[Any]) -> None:
        """Copy the weights of the same convolution of each network; norms start as they are."""
        if isinstance(wide, nn.Conv2d):
            wide.weight.copy_(blocks([one.weight for one in each]))
            self.own.append((wide.weight, blocks([torch.ones_like(one.weight) for one in each])))

    def forward(self, x: Tensor) -> Tensor:
        pictures = x[:, :, 0].transpose(0, 1).contiguous(memory_format=torch.channels_last)
        last = self.wide.maps(pictures)[-1].mean((-2, -1))
        return last.view(len(last), len(x), -1).transpose(0, 1) @ self.weight.mT + self.bias


def blocks(weights: Sequence[Tensor]) -> Tensor:
    """Weights ``[o, i, k, k]`` of ``n`` convolutions as those of one ``[n o, n i, k, k]``, 0 elsewhere."""
    n, (o, i, *k) = len(weights), weights[0].shape
    made = torch.zeros(n, o, n, i, *k)
    for j, weight in enumerate(weights):
        made[j, :, j] = weight
    return made.reshape(n * o, n * i, *k)


def trained(
    width: int, depths: tuple[int, ...], seeds: Sequence[int], steps: int, x: Tensor, losses: Losses
) -> SideBySide:
    """Networks with first weights and batches from these seeds, as DisWOT trains one: SGD with Nesterov's momentum, a
    cosine."""
    model = SideBySide(width, depths, seeds).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        model.parameters(), LR, METHOD.momentum, weight_decay=METHOD.weight_decay, nesterov=True, foreach=True
    )
    rngs, orders = {seed: Rng(seed, "order") for seed in seeds}, {}
    weights, own = zip(*model.own, strict=True)
    for step in range(steps):
        at = step % (len(x) // BATCH) * BATCH
        if at == 0:
            orders = {seed: rng.shuffled(len(x)) for seed, rng in rngs.items()}
        index = torch.stack([orders[seed][at : at + BATCH] for seed in seeds])
        optimizer.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        losses(model(x[index]), index).sum().backward()
        torch._foreach_mul_([weight.grad for weight in weights], own)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def logits(model: SideBySide, x: Tensor) -> Tensor:
    """What networks tell ``[n, N, classes]`` of the same pictures ``[N, 1, H, W]``."""
    n = len(model.weight)
    return torch.cat([model(part.expand(n, *part.shape)) for part in x.split(1000)], 1)


def accuracies(told: Tensor, labels: Tensor) -> list[float]:
    """Of logits ``[n, N, classes]``."""
    return [round(float(right), 5) for right in (told.argmax(2) == labels).double().mean(1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion-mnist", required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    x, labels = read(chosen.fashion_mnist, "train")
    held, truth = read(chosen.fashion_mnist, "test")

    def from_labels(told: Tensor, index: Tensor) -> Tensor:
        return cross_entropy(told.flatten(0, 1), labels[index].flatten(), reduction="none").view(index.shape).mean(1)

    teacher = trained(TEACHER_WIDTH, TEACHER, (0,), TEACHER_STEPS, x[:TAUGHT], from_labels)
    words, t, alpha = logits(teacher, x[:LEARNED])[0], METHOD.temperature, METHOD.alpha

    def both(told: Tensor, index: Tensor) -> Tensor:
        """From labels for every first network, distilled for every second."""
        hard, soft = from_labels(told, index), t**2 * kl(words[index[1::2]], told[1::2], t).mean(1)
        return torch.cat([hard[::2], (1 - alpha) * hard[1::2] + alpha * soft])

    about: dict[str, Any] = {
        "data": "Fashion-MNIST, means of 4x4 pixels", "shape": list(SHAPE), "classes": CLASSES, "learned": LEARNED,
        "tested": len(held), "steps": STEPS, "batch": BATCH, "lr": LR,
        "teacher": {
            "width": TEACHER_WIDTH, "depths": list(TEACHER), "learned": TAUGHT, "steps": TEACHER_STEPS,
            "accuracy": accuracies(logits(teacher, held), truth)[0],
        },
    }  # fmt: skip
    print(about, flush=True)
    rows: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}
    if chosen.out.is_file():
        rows = {(row["width"], tuple(row["depths"])): row for row in json.loads(chosen.out.read_text())["students"]}
    for width, depths in product(WIDTHS, DEPTHS):
        net = classifier(width, depths, 0)
        row = rows.setdefault((width, depths), {
            "width": width, "depths": list(depths), "vanilla": [], "kd": [],
            "parameters": int(parameters(net, torch.zeros(0))), "flops": int(flops(net, torch.zeros(1, *SHAPE))),
        })  # fmt: skip
        while len(row["kd"]) < chosen.seeds:
            first = len(row["kd"])
            seeds = range(first, min(chosen.seeds, first + TOGETHER // (2 * width)))
            students = trained(width, depths, [seed for seed in seeds for _ in range(2)], STEPS, x[:LEARNED], both)
            told = accuracies(logits(students, held), truth)
            row["vanilla"] += told[::2]
            row["kd"] += told[1::2]
            lines = ",\n  ".join(json.dumps(row) for row in rows.values())
            write_atomically(chosen.out, f'{{"about": {json.dumps(about)},\n "students": [\n  {lines}\n]}}\n'.encode())
            print(row, flush=True)


if __name__ == "__main__":
    main()
