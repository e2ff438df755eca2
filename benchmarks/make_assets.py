"""Make what the library bundles: two small data sets and the classifiers whose activations are the metrics' features.

    python benchmarks/make_assets.py data --fashion-mnist FOLDER
    python benchmarks/make_assets.py classifier digits
    python benchmarks/make_assets.py classifier fashion --fashion-mnist FOLDER

FOLDER holds the four IDX files of Fashion-MNIST.  The digits come from scikit-learn.  Everything is seeded; the
classifiers are bit-reproducible with one thread on one kind of machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.data import Dataset, load
from fewstep.networks.classifier import Classifier
from fewstep.randomness import Rng

ASSETS = Path(__file__).parent.parent / "src" / "fewstep" / "assets"
DIGITS_TRAIN = 1297
SOURCES = {
    "digits": {
        "what": "1,797 grey 8x8 scans of handwritten digits, 1,297 for training and 500 held out, values x 255/16",
        "from": "scikit-learn's load_digits: the test part of the UCI set 'Optical Recognition of Handwritten Digits'",
        "authors": "E. Alpaydin and C. Kaynak, 1998",
        "licence": "CC BY 4.0 (UCI Machine Learning Repository)",
    },
    "fashion": {
        "what": "grey 28x28 pictures of clothing: 600 of each class from the training part, 200 from the test part",
        "from": "Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist",
        "authors": "H. Xiao, K. Rasul and R. Vollgraf, 2017",
        "licence": "MIT, see LICENCE-fashion-mnist.txt",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="the two bundled data sets")
    data.add_argument("--fashion-mnist", type=Path, required=True, metavar="FOLDER")
    classifier = commands.add_parser("classifier", help="one classifier and its card")
    classifier.add_argument("name", choices=sorted(SOURCES))
    classifier.add_argument("--fashion-mnist", type=Path, metavar="FOLDER")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    ASSETS.mkdir(exist_ok=True)
    if chosen.command == "data":
        make_data(chosen.fashion_mnist)
    elif chosen.name == "digits":
        make_classifier("digits", load("digits"), load("digits", "test"), epochs=60, shift=1)
    elif chosen.fashion_mnist is None:
        parser.error("classifier fashion needs --fashion-mnist FOLDER: it is trained on all 60,000 pictures")
    else:
        whole, test = load(chosen.fashion_mnist), load(chosen.fashion_mnist, "test")
        make_classifier("fashion", whole, test, epochs=3, shift=0)


def make_data(fashion_mnist: Path) -> None:
    """Writes ``digits.npz``, ``fashion.npz`` and the card ``data.json``."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    pictures = np.rint(scans.images * 255 / 16).astype(np.uint8)
    digits = Dataset("digits", torch.from_numpy(pictures)[:, None], torch.from_numpy(scans.target))
    digits = digits.subset(Rng(0, "digits").shuffled(len(digits)))
    save("digits", digits.subset(slice(0, DIGITS_TRAIN)), digits.subset(slice(DIGITS_TRAIN, None)))
    save("fashion", balanced(load(fashion_mnist), 600), balanced(load(fashion_mnist, "test"), 200))

    command = "python benchmarks/make_assets.py data --fashion-mnist FOLDER"
    card = {
        f"{name}.npz": source | {"command": command, "sha256": sha256(ASSETS / f"{name}.npz")}
        for name, source in SOURCES.items()
    }
    write_json(ASSETS / "data.json", card)


def save(name: str, train: Dataset, test: Dataset) -> None:
    np.savez_compressed(
        ASSETS / f"{name}.npz",
        train_images=train.x[:, 0].numpy(),
        train_labels=labels_of(train).byte().numpy(),
        test_images=test.x[:, 0].numpy(),
        test_labels=labels_of(test).byte().numpy(),
    )


def balanced(data: Dataset, count: int) -> Dataset:
    """``count`` random samples of each class, in random order."""
    labels = labels_of(data)
    order = Rng(0, "fashion", len(data)).shuffled(len(data))
    rows = torch.cat([order[labels[order] == c][:count] for c in range(data.classes or 0)])
    return data.subset(rows[Rng(0, "fashion order", len(data)).shuffled(len(rows))])


def labels_of(data: Dataset) -> Tensor:
    if data.labels is None:
        raise ValueError(f"'{data.name}' has no labels")
    return data.labels


def make_classifier(name: str, train: Dataset, test: Dataset, epochs: int, shift: int) -> None:
    """Writes ``classifier-NAME.safetensors`` and its card; pictures move by up to ``shift`` pixels in training."""
    torch.manual_seed(0)
    _, height, width = train.shape
    net = Classifier((1, height, width), classes=10)
    start = time.perf_counter()
    fit(net, train, epochs, shift)
    seconds = time.perf_counter() - start
    net.eval()
    normalise(net, train)
    accuracy = accuracy_of(net, test)
    file = ASSETS / f"classifier-{name}.safetensors"
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, file)
    file.chmod(0o644)  # safetensors writes files that only their owner can read
    folder = " --fashion-mnist FOLDER" if name == "fashion" else ""
    card = {
        "config": net.config,
        "parameters": sum(p.numel() for p in net.parameters()),
        "trained_on": f"{len(train)} pictures of the training part, {epochs} epochs",
        "accuracy": round(accuracy, 4),
        "accuracy_on": f"{len(test)} pictures of the test part",
        "training_accuracy": round(accuracy_of(net, train), 4),
        "command": f"python benchmarks/make_assets.py classifier {name}{folder}",
        "licence": f"weights: that of fewstep; data: {SOURCES[name]['licence']}",
        "sha256": sha256(file),
    }
    write_json(file.with_suffix(".json"), card)
    print(f"{name}: accuracy {accuracy:.4f} on {len(test)} held-out pictures, trained for {seconds:.0f} s")


def fit(net: Classifier, train: Dataset, epochs: int, shift: int, batch: int = 128, lr: float = 3e-3) -> None:
    labels, rng = labels_of(train), Rng(0, "classifier")
    optimiser = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * (len(train) // batch)
    step = 0
    for _ in range(epochs):
        for rows in rng.shuffled(len(train)).split(batch):
            if len(rows) < batch:
                continue
            optimiser.param_groups[0]["lr"] = lr * min(1, step / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
            x = train.read(rows)
            if shift:
                x = torch.nn.functional.pad(x, [shift] * 4, value=-1.0)
                down, right = rng.shared_integer(0, 2 * shift + 1), rng.shared_integer(0, 2 * shift + 1)
                x = x[..., down : down + train.shape[1], right : right + train.shape[2]]
            loss = torch.nn.functional.cross_entropy(net(x), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1


@torch.no_grad()
def normalise(net: Classifier, train: Dataset) -> None:
    """Scale the features by one number, undone in the head, so that their total variance on the training pictures is
    the number of features: distances of different classifiers are then on one scale, and logits stay as they are."""
    features = torch.cat([net.features(train.read(rows)) for rows in torch.arange(len(train)).split(1000)])
    scale = (features.shape[1] / features.var(dim=0).sum()).sqrt()
    net.penultimate.weight.mul_(scale)
    net.penultimate.bias.mul_(scale)
    net.head.weight.div_(scale)


@torch.no_grad()
def accuracy_of(net: Classifier, data: Dataset) -> float:
    right = [net(data.read(rows)).argmax(1) == labels_of(data)[rows] for rows in torch.arange(len(data)).split(1000)]
    return float(torch.cat(right).double().mean())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_json(path: Path, card: dict) -> None:
    path.write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    main()
