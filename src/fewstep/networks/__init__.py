"""Reference networks: an MLP for points and small pictures, a space-to-depth U-Net, a U-Net over resolutions."""

from torch import nn

from fewstep.networks.cascade import CascadeUNet
from fewstep.networks.mlp import MLP
from fewstep.networks.unet import UNet, UNet3d

NETWORKS: dict[str, type[nn.Module]] = {"mlp": MLP, "unet": UNet, "unet3d": UNet3d, "cascade-unet": CascadeUNet}

__all__ = ["MLP", "NETWORKS", "CascadeUNet", "UNet", "UNet3d"]
