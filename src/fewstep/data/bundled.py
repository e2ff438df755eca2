"""The data sets that come with the library, so that every example runs at once and offline.

``digits`` is scikit-learn's copy of the optical recognition of handwritten digits: 1,797 grey 8x8 scans, 1,297 for
training.  ``fashion`` is a part of Fashion-MNIST (Xiao et al. 2017): 6,000 of its training and 2,000 of its test
pictures, grey 28x28, as many of each class.  ``benchmarks/make_assets.py`` made both files; where they come from and
under which licence stands in ``assets/data.json``.  ``shapes3d`` is made in code (:mod:`fewstep.data.shapes`): 1,600
solids of eight classes as 12x12x12 voxels, and 320 more for testing.
"""

from __future__ import annotations

from importlib import resources
from typing import Literal

from fewstep.data.arrays import read_arrays
from fewstep.data.dataset import Dataset
from fewstep.data.shapes import CLASSES as SHAPE_CLASSES
from fewstep.data.shapes import read_shapes

FASHION_CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

#: Name -> class names.
BUNDLED = {
    "digits": tuple(str(digit) for digit in range(10)), "fashion": FASHION_CLASSES, "shapes3d": SHAPE_CLASSES,
}  # fmt: skip


def read_bundled(name: str, split: Literal["train", "test"]) -> Dataset:
    """The bundled data set ``name``: uint8 pictures ``[N, 1, H, W]`` or voxels ``[N, 1, D, H, W]``, and labels."""
    if name == "shapes3d":
        return read_shapes(split)
    with resources.as_file(resources.files("fewstep") / "assets" / f"{name}.npz") as path:
        data = read_arrays(path, split)
    return Dataset(name, data.x, data.labels, BUNDLED[name])
