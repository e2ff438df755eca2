"""Reference networks: an MLP for points and small pictures, a space-to-depth U-Net, a U-Net over resolutions."""

from torch import nn

from fewstep.networks.cascade import CascadeUNet
from fewstep.networks.mlp import MLP
from fewstep.networks.unet import UNet

NETWORKS: dict[str, type[nn.Module]] = {"mlp": MLP, "unet": UNet, "cascade-unet": CascadeUNet}

__all__ = ["MLP", "NETWORKS", "CascadeUNet", "UNet"]
