"""The network of LPIPS (Zhang et al. 2018, arXiv 1801.03924) from a weights file that the user has.

The file holds the convolutions of VGG16 and one linear head a layer, by the names that the package ``lpips`` gives them
(``net.slice1.0.weight``, ``lin0.model.1.weight``) or torchvision (``features.0.weight``).  It is made by::

    import lpips, safetensors.torch
    state = {k: v.contiguous() for k, v in lpips.LPIPS(net="vgg").state_dict().items() if not k.startswith("lins.")}
    safetensors.torch.save_file(state, "lpips-vgg.safetensors")
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.files import load_tensors
from fewstep.networks.feature_nets import FeatureNet

#: The numbers that VGG16's convolutions have among its modules, by slice; LPIPS reads what each slice ends with, after
#: its ReLU, and max-pooling lies between slices.
SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
#: By which colours in [-1, 1] are shifted and divided: ImageNet's mean and deviation in these units.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPSNetwork(FeatureNet):
    """Colour pictures ``[B, 3, H, W]`` in [-1, 1], H and W at least 16, to the activations of five layers; ``heads`` is
    the weight of every channel in each.

    Widths are those of the ``tensors``.  ValueError, naming the tensor, when one is missing or does not fit.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])
        self.slices, self.heads = nn.ModuleList(), nn.ParameterList()
        width = 3
        for k, numbers in enumerate(SLICES):
            layers: list[nn.Module] = [] if k == 0 else [nn.MaxPool2d(2)]
            for number in numbers:
                names = (f"net.slice{k + 1}.{number}", f"features.{number}")
                weight = found(tensors, *(f"{name}.weight" for name in names))
                check_shape(names[0], weight, (None, width, 3, 3))
                bias = found(tensors, *(f"{name}.bias" for name in names))
                check_shape(f"{names[0]}.bias", bias, (len(weight),))
                convolution = nn.Conv2d(width, len(weight), 3, padding=1)
                convolution.load_state_dict({"weight": weight, "bias": bias})
                layers += [convolution, nn.ReLU()]
                width = len(weight)
            head = found(tensors, f"lin{k}.model.1.weight")
            check_shape(f"lin{k}.model.1.weight", head, (1, width, 1, 1))
            self.slices.append(nn.Sequential(*layers))
            self.heads.append(nn.Parameter(head.float().flatten()))
        self.requires_grad_(False).eval()

    def weights(self) -> list[Tensor]:
        return list(self.heads)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """The activations ``[B, c, h, w]``."""
        x, found = (pictures - self.shift) / self.scale, []
        for part in self.slices:
            x = part(x)
            found.append(x)
        return found


def found(tensors: dict[str, Tensor], *names: str) -> Tensor:
    """The tensor that has one of the names; ValueError naming them when there is none."""
    for name in names:
        if name in tensors:
            return tensors[name]
    raise ValueError(f"no tensor {' or '.join(names)} in it: LPIPS needs VGG16's convolutions and five heads")


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """ValueError naming the tensor unless it is of this shape; None stands for any length."""
    fits = tensor.ndim == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}, [{wanted}] is needed")


def read_lpips(path: Path) -> LPIPSNetwork:
    """The network in a ``.safetensors`` file, or in a ``.pt`` or ``.pth`` file of nothing but tensors.

    FileNotFoundError, or a ValueError that names the file and what is wrong with it.
    """
    tensors = torch_tensors(path) if path.suffix in (".pt", ".pth") else load_tensors(path)
    try:
        return LPIPSNetwork(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def torch_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that PyTorch saved; ValueError naming it when there is more in it, or it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    wrong = f"{path}: damaged, or more than tensors by name: save the state_dict, better as safetensors"
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # of many kinds, by where the file is damaged
        raise ValueError(wrong) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(wrong)
    return tensors
