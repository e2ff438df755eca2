"""Reference networks: an MLP for points and small pictures, a space-to-depth U-Net, a U-Net over resolutions."""

from fewstep.networks.cascade import CascadeUNet
from fewstep.networks.mlp import MLP
from fewstep.networks.unet import UNet

NETWORKS = {"mlp": MLP, "unet": UNet, "cascade-unet": CascadeUNet}

__all__ = ["MLP", "NETWORKS", "CascadeUNet", "UNet"]
